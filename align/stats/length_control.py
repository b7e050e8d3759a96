"""AlpacaEval 2's length-controlled win rate: that of a model whose answers were as long as the baseline's.

Dubois, Galambosi, Liang, Hashimoto 2024, https://arxiv.org/abs/2404.04475, as in alpaca_eval's `length_controlled_v1`:

    P(model beats baseline on x) = sigmoid(bias + length tanh((|y_baseline| - |y_model|) / std) + difficulty gamma_x)
    length-controlled win rate   = mean over x of sigmoid(bias + difficulty gamma_x)

|y| is in characters, std the standard deviation of |y_baseline| - |y_model| over the instructions, gamma_x the
difficulty of the instruction (fitted once over many models). `length` is negative for a model that is preferred for its
length. The baseline against itself has all three weights at 0 and wins 50%.

The weights minimise the cross-entropy with the judge's probabilities, plus 0.1 times that of two "gamed" baselines (the
baseline told to be concise, and verbose) in rows without bias, which hold length and difficulty near the effect of
length on one model's answers. docs/intervals.md has the agreement with the leaderboard: 0.02 points in the median.

alpaca_eval reads difficulties and gamed rows from its dataset tatsu-lab/alpaca_eval (instruction_difficulty.csv,
df_gamed.csv). Without difficulties the GLM has two terms (its `length_controlled_minimal`), and the result is no
leaderboard figure. Left out: alpaca_eval's L1 penalty, chosen by cross-validation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
GAMED_WEIGHT = 0.2 / 2  # of a gamed row: regularize_to_baseline_lambda over two gamed baselines
_RIDGE = 1e-4  # of a squared weight: keeps a model that always wins finite, and moves no other by 0.001


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """A length-controlled win rate in [0, 1], with its standard error over instructions, that of the fit included."""

    rate: float
    standard_error: float
    weights: list[float]  # bias, length and, where difficulties are known, difficulty; in logits


def length_controlled_win_rate(
    preferences: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    difficulties: ArrayLike | None = None,
    *,
    gamed: ArrayLike | None = None,
) -> LengthControlled:
    """Fit the GLM to a judge's preferences, and predict the win rate at equal lengths.

    Args:
        preferences: [N] in [0, 1], the probability that the model's answer beats the baseline's; `outcomes` converts
            AlpacaEval's annotations.
        lengths, baseline_lengths: [N] characters of the model's and the baseline's answer. Tokens will do as well: only
            differences in standard deviations count.
        difficulties: [N], those of instruction_difficulty.csv.
        gamed: [R, 3] preference in [0, 1], std_delta_len and instruction_difficulty of df_gamed.csv.
    """
    known = [values for values in (preferences, lengths, baseline_lengths, difficulties) if values is not None]
    won, ours, theirs, *difficulty = (np.asarray(values, dtype=np.float64) for values in known)
    _check(won, ours, theirs, *difficulty)
    gap = theirs - ours
    std = gap.std(ddof=1) if gap.size > 1 else 0.0
    length = np.tanh(gap / std) if std > 0 else np.zeros_like(gap)
    rows = np.stack([np.ones_like(won), length, *difficulty], axis=1)  # [N, 2 or 3]
    x, y, of_row = rows, won, np.ones_like(won)
    if gamed is not None:
        if difficulties is None:
            raise ValueError("gamed rows have difficulties: give those of your instructions too, or leave `gamed` out")
        gamed_won, gamed_gap, gamed_difficulty = np.asarray(gamed, dtype=np.float64).T
        _check(gamed_won, gamed_gap, gamed_difficulty)
        fixed = np.stack([np.zeros_like(gamed_won), np.tanh(gamed_gap), gamed_difficulty], axis=1)
        x, y = np.concatenate([rows, fixed]), np.concatenate([won, gamed_won])
        of_row = np.concatenate([of_row, np.full_like(gamed_won, GAMED_WEIGHT)])
    weights, hessian = _fit(x, y, of_row)

    level = rows.copy()
    level[:, 1] = 0  # as long as the baseline
    predicted = _sigmoid(level @ weights)
    # One instruction changes its own prediction, and the weights (gradient of the mean, Newton's step of its residual).
    gradient = (level * (predicted * (1 - predicted))[:, None]).mean(axis=0)
    residual = (won - _sigmoid(rows @ weights))[:, None] * rows
    moved = predicted - predicted.mean() + len(won) * residual @ np.linalg.solve(hessian, gradient)
    error = moved.std(ddof=1) / np.sqrt(len(moved)) if len(moved) > 1 else np.nan
    return LengthControlled(rate=float(predicted.mean()), standard_error=float(error), weights=weights.tolist())


def rate_by_answers(prompts: Iterable[tuple[Sequence[Sequence[float]], Sequence[str], Sequence[str]]]) -> float:
    """Return the win rate by all pairs of answers: of each prompt [K][J] chances of ours, our K answers, their J."""
    games = [
        (chance, len(mine), len(other))
        for chances, ours, theirs in prompts
        for mine, row in zip(ours, chances, strict=True)
        for other, chance in zip(theirs, row, strict=True)
    ]
    return length_controlled_win_rate(*zip(*games, strict=True)).rate


def outcomes(annotated: Sequence[float]) -> Floats:
    """Convert AlpacaEval's `preference`, 1 (the baseline is surely better) to 2, to [0, 1]; 1.5 or 0 is a tie."""
    values = np.asarray(annotated, dtype=np.float64)
    values = np.where(values == 0, 0.5, values - 1)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("AlpacaEval's preferences lie between 1 and 2: leave out instructions without an annotation")
    return values


def _fit(x: Floats, y: Floats, of_row: Floats) -> tuple[Floats, Floats]:
    """Return the weights that minimise the cross-entropy, and its Hessian, by Newton's method with halved steps."""

    def loss(weights: Floats) -> float:
        logits = x @ weights
        return float(of_row @ (np.logaddexp(0, logits) - y * logits) + _RIDGE / 2 * weights @ weights)

    weights = np.zeros(x.shape[1])
    for _ in range(100):
        p = _sigmoid(x @ weights)
        gradient = x.T @ (of_row * (p - y)) + _RIDGE * weights
        hessian = (x * (of_row * p * (1 - p))[:, None]).T @ x + _RIDGE * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        if np.abs(step).max() < 1e-9:
            return weights, hessian
        now = loss(weights)
        while loss(weights - step) > now and np.abs(step).max() > 1e-9:
            step = step / 2
        weights = weights - step
    raise AssertionError("the loss is convex: Newton's method converges")


def _check(won: Floats, *others: Floats) -> None:
    if won.ndim != 1 or not won.size or any(other.shape != won.shape for other in others):
        raise ValueError(f"one number per instruction is needed of each, not {[list(o.shape) for o in (won, *others)]}")
    if not all(np.isfinite(values).all() for values in (won, *others)):
        raise ValueError("NaN among preferences, lengths or difficulties: leave those instructions out")
    if won.min() < 0 or won.max() > 1:
        raise ValueError("preferences lie in [0, 1]; AlpacaEval's, between 1 and 2, pass through `outcomes` first")


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -logits))
