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

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
GAMED_WEIGHT = 0.2 / 2  # of a gamed row: regularize_to_baseline_lambda over two gamed baselines
_RIDGE = 1e-4  # of a squared weight: keeps a model that always wins finite, and moves no other by 0.001


@dataclass(frozen=True, kw_only=True)
class Glm:
    """Weights of one model against the baseline, in logits."""

    bias: float
    length: float  # of tanh of the baseline's length minus the model's, in standard deviations
    difficulty: float  # of the instruction's difficulty; 0 if difficulties are unknown


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """A length-controlled win rate in [0, 1], with its standard error over instructions, that of the fit included."""

    rate: float
    standard_error: float
    glm: Glm


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
    won, ours, theirs = (np.asarray(values, dtype=np.float64) for values in (preferences, lengths, baseline_lengths))
    columns = [np.ones_like(won), _length_term(ours, theirs)]
    if difficulties is not None:
        columns.append(np.asarray(difficulties, dtype=np.float64))
    _check(won, ours, theirs, *columns)
    rows = np.stack(columns, axis=1)  # [N, 2 or 3]
    fixed, fixed_won = np.zeros((0, rows.shape[1])), np.zeros(0)
    if gamed is not None:
        if difficulties is None:
            raise ValueError("gamed rows have difficulties: give those of your instructions too, or leave `gamed` out")
        table = np.asarray(gamed, dtype=np.float64)
        fixed = np.stack([np.zeros(len(table)), np.tanh(table[:, 1]), table[:, 2]], axis=1)
        fixed_won = table[:, 0]
        _check(fixed_won, *fixed.T)
    weights, hessian = _fit(rows, won, fixed, fixed_won)

    level = rows.copy()
    level[:, 1] = 0  # as long as the baseline
    predicted = _sigmoid(level @ weights)
    # One instruction changes its own prediction, and the weights (gradient of the mean, Newton's step of its residual).
    gradient = (level * (predicted * (1 - predicted))[:, None]).mean(axis=0)
    residual = (won - _sigmoid(rows @ weights))[:, None] * rows
    moved = predicted - predicted.mean() + len(won) * residual @ np.linalg.solve(hessian, gradient)
    return LengthControlled(
        rate=float(predicted.mean()),
        standard_error=_standard_error(moved),
        glm=Glm(
            bias=float(weights[0]),
            length=float(weights[1]),
            difficulty=float(weights[2]) if difficulties is not None else 0.0,
        ),
    )


def outcomes(annotated: Sequence[float]) -> Floats:
    """Convert AlpacaEval's `preference`, 1 (the baseline is surely better) to 2, to [0, 1]; 1.5 or 0 is a tie."""
    values = np.asarray(annotated, dtype=np.float64)
    values = np.where(values == 0, 0.5, values - 1)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("AlpacaEval's preferences lie between 1 and 2: leave out instructions without an annotation")
    return values


def average_length(responses: Sequence[str]) -> float:
    """Return the mean number of characters; the leaderboard's avg_length is this, cut to a whole number."""
    return fmean(len(text) for text in responses)


def _length_term(ours: Floats, theirs: Floats) -> Floats:
    """Return [N] tanh of the baseline's length minus the model's, in standard deviations; 0 if all are equal."""
    difference = theirs - ours
    std = difference.std(ddof=1) if difference.size > 1 else 0.0
    return np.tanh(difference / std) if std > 0 else np.zeros_like(difference)


def _fit(rows: Floats, won: Floats, fixed: Floats, fixed_won: Floats) -> tuple[Floats, Floats]:
    """Return the weights that minimise the cross-entropy, and its Hessian, by Newton's method with halved steps."""
    x, y = np.concatenate([rows, fixed]), np.concatenate([won, fixed_won])
    of_row = np.concatenate([np.ones(len(rows)), np.full(len(fixed), GAMED_WEIGHT)])

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


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1)) / float(np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -logits))
