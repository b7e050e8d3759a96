"""Confidence intervals and comparisons: means over seeds and prompts, and whether two methods differ. Pure numpy.

A method's scores are a table [seeds, prompts]: each cell is the mean score (a win, a reward, a length) of one prompt
under one training seed. Both are samples of something larger, so

    score[s, p] = mean + seed_s + prompt_p + rest_sp

and the mean of the table errs by Var(seed)/S + Var(prompt)/P + Var(rest)/(S P). Two methods answer the same prompts, so
the difficulty of a prompt cancels in their difference; seeds are not paired. An interval adds two independent errors:

- prompts: a bootstrap that draws prompts with replacement, all methods and seeds of a prompt together, stretched by
  sqrt(P/(P-1)) t(P-1)/z, as the plain one is too narrow for few prompts (Hesterberg 2015,
  https://arxiv.org/abs/1411.5279). It covers Var(rest)/(S P).
- seeds: Student's t with the pooled variance of the seeds' means, S_a + S_b - 2 degrees of freedom, from which 0.6 of
  Var(rest)/P is subtracted, as the prompts' part covers that already; what is left is at least 0.

With one seed each, an interval is the prompts' part alone and describes these trained models, not their methods; `over`
says which. A p-value counts the same errors: p <= 0.05 exactly if the interval excludes 0. Beyond the farthest resample
it is the tail of a Student's t with the same interval. docs/intervals.md has the reasons and the measured coverage.

Left out: asymmetric intervals, so one near a bound of the scale may reach beyond it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
Over = Literal["nothing", "prompts", "seeds", "seeds and prompts"]
LEVEL = 0.95
RESAMPLES = 9_999  # fewer for many prompts, whose mean is close to normal
_CELLS = 10_000_000  # resamples x prompts, 4 bytes each
_SEED = 20_240_404
_ALL_AGREE = 1000  # prompts; with more of them 2^(1-P) is as good as 0
_IN_PROMPTS = 0.6  # share of Var(rest)/P that is subtracted from the seeds' variance


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95% confidence interval over seeds, prompts or both; without one `low` and `high` are the mean."""

    mean: float
    low: float
    high: float
    over: Over

    @property
    def margin(self) -> float:
        """Half the interval's width; NaN without an interval."""
        return math.nan if self.over == "nothing" else (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Comparison(Estimate):
    """First minus second with the 95% interval of this comparison alone; `significant` accounts for all of a family."""

    p_value: float  # two-sided, of no difference; with 6 prompts or more <= 0.05 exactly if the interval excludes 0
    p_adjusted: float  # by Holm, among the comparisons made together; p_value if this is the only one
    prompts: int

    @property
    def significant(self) -> bool:
        """True if chance alone shows such a difference in at most 5% of families of comparisons."""
        return self.p_adjusted <= 1 - LEVEL + 1e-12


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Estimate the mean of a metric with one value per seed, by Student's t; one seed has no interval."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 1 or not table.size:
        raise ValueError(f"one value per seed is needed, not the shape {list(table.shape)}")
    mean, several = float(table.mean()), table.size > 1
    margin = float(t_quantile(table.size - 1)) * float(table.std(ddof=1)) / math.sqrt(table.size) if several else 0.0
    return Estimate(mean=mean, low=mean - margin, high=mean + margin, over="seeds" if several else "nothing")


def estimate(scores: ArrayLike) -> Estimate:
    """Estimate the mean of [seeds, prompts] scores, or [prompts] of one seed, with its interval over both."""
    table = _table(scores)
    errors, _, over = _errors([table])
    mean, margin = float(table.mean()), _margin(errors)
    return Estimate(mean=mean, low=mean - margin, high=mean + margin, over=over)


def compare(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Compare two methods on the same prompts: is the first better or worse, or is it chance?

    Both are [seeds, prompts], or [prompts] of one seed, with the same prompts in the same order. The numbers of seeds
    may differ; if only one has several, the other's are assumed to scatter like them.
    """
    a, b = _table(first), _table(second)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{a.shape[1]} and {b.shape[1]} prompts: compare two methods on the prompts that both answered"
        )
    errors, freedom, over = _errors([a, b])
    difference, margin = float(a.mean() - b.mean()), _margin(errors)
    as_far = np.count_nonzero(errors >= abs(difference) * (1 - 1e-6))  # the resamples are in float32
    p = float(1 + as_far) / (1 + errors.size)
    if not as_far and margin:  # Holm multiplies by hundreds, so it matters how far beyond all resamples this is
        p = min(p, _t_tail(freedom, abs(difference) / margin * float(t_quantile(freedom))))
    p = max(p, 2.0 ** (1 - min(a.shape[1], _ALL_AGREE)))  # at least the sign test's for prompts that all agree
    return Comparison(
        mean=difference,
        low=difference - margin,
        high=difference + margin,
        p_value=p,
        p_adjusted=p,
        prompts=a.shape[1],
        over=over,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values: the k-th smallest of m times m - k + 1, made monotone, at most 1 (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    rising = np.maximum.accumulate(np.minimum(1.0, np.arange(p.size, 0, -1) * p[order]))
    return rising[np.argsort(order)].tolist()


def t_quantile(degrees_of_freedom: int, inside: ArrayLike = LEVEL) -> Floats:
    """Return t with P(|T| <= t) = inside for Student's T; of 0.95, 12.706 for 1 degree of freedom, 1.960 for many."""
    angle, below = _t_distribution(degrees_of_freedom)
    return math.sqrt(degrees_of_freedom) * np.tan(np.interp(np.asarray(inside), below, angle))


def _errors(tables: Sequence[Floats]) -> tuple[Floats, int, Over]:
    """Draw errors of the mean of a table, or of the difference of two tables' means.

    Returns absolute errors [resamples], the degrees of freedom of a Student's t whose tail is no lighter than theirs,
    and what they are over.
    """
    prompts = tables[0].shape[1]
    by_prompt = tables[0].mean(axis=0) - (tables[1].mean(axis=0) if len(tables) > 1 else 0)
    by_prompt = by_prompt - by_prompt.mean()
    stretch = (
        math.sqrt(prompts / (prompts - 1)) * float(t_quantile(prompts - 1)) / NormalDist().inv_cdf((1 + LEVEL) / 2)
    )
    from_prompts = stretch * (_resamples(prompts) @ by_prompt.astype(np.float32)).astype(np.float64)
    freedom = sum(len(table) - 1 for table in tables)
    if not freedom:
        return np.abs(from_prompts), prompts - 1, "prompts"

    share = sum(1 / len(table) for table in tables)
    seeds = [table.mean(axis=1, keepdims=True) - table.mean() for table in tables]
    rests = [t - t.mean() - s - (t.mean(axis=0) - t.mean()) for t, s in zip(tables, seeds, strict=True)]
    by_seed = share * sum(float((s**2).sum()) for s in seeds) / freedom  # Var(seed)/S + Var(rest)/(S P), both methods
    by_rest = share * sum(float((r**2).sum()) for r in rests) / (freedom * (prompts - 1)) / prompts  # the second term
    scale = math.sqrt(max(0.0, by_seed - _IN_PROMPTS * by_rest))
    heaviest = min(freedom, prompts - 1) if scale else prompts - 1
    return np.abs(from_prompts + scale * _t_draws(freedom, len(from_prompts))), heaviest, "seeds and prompts"


def _margin(errors: Floats) -> float:
    """Return the error that 95% of the draws do not exceed."""
    at = math.ceil(LEVEL * (errors.size + 1) - 1e-9) - 1
    return float(np.partition(errors, at)[at])


@lru_cache(maxsize=2)
def _resamples(prompts: int) -> Floats:
    """Draw shares [resamples, prompts] of each prompt in a sample with replacement; the same at every call."""
    count = max(999, min(RESAMPLES, (_CELLS // prompts // 1_000) * 1_000 - 1))
    drawn = np.random.default_rng([_SEED, prompts]).multinomial(prompts, np.full(prompts, 1 / prompts), size=count)
    return (drawn / prompts).astype(np.float32)


@lru_cache(maxsize=8)
def _t_draws(degrees_of_freedom: int, count: int) -> Floats:
    """Draw [count] values of Student's t, the same at every call: one from each `count`-th of |t| for a smooth tail."""
    rng = np.random.default_rng([_SEED, 1, degrees_of_freedom])
    size = t_quantile(degrees_of_freedom, (np.arange(count) + 0.5) / count)
    return rng.permutation(size) * rng.choice([-1.0, 1.0], size=count)


def _t_tail(degrees_of_freedom: int, t: float) -> float:
    """Return P(|T| > t)."""
    angle, below = _t_distribution(degrees_of_freedom)
    return float(1 - np.interp(math.atan(t / math.sqrt(degrees_of_freedom)), angle, below))


@lru_cache(maxsize=8)
def _t_distribution(degrees_of_freedom: int) -> tuple[Floats, Floats]:
    """Return angles a and P(|T| <= sqrt(n) tan(a)), which is the share of cos(x)^(n-1) over [0, pi/2] in [0, a]."""
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (degrees_of_freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return angle, below / below[-1]


def _table(scores: ArrayLike) -> Floats:
    table = np.atleast_2d(np.ascontiguousarray(scores, dtype=np.float64))  # [seeds, prompts]
    if not np.isfinite(table).all():
        raise ValueError("NaN or infinite scores: leave out the prompts that have none, of all methods alike")
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"scores are [seeds, prompts] with two prompts or more, not {list(table.shape)}")
    return table
