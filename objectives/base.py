"""The interface every objective implements: per-response statistics in, one loss per pair out.

An objective is a frozen dataclass of hyperparameters. It declares the statistics it `needs`; whoever computes
them (the engine, the reference column, the dataset) knows nothing of the objective, and it nothing of them.
Left out on purpose: averaging (the trainer's, over the pairs of the global batch), models, devices, processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

#: Every statistic a response can have, in the order of the documentation of `Response`.
STATISTICS = ("logp", "length", "ref_logp", "log_sum_sq", "log_max", "win_prob")


class MissingStatistic(LookupError):  # noqa: N818 - what is missing is not in error
    """An objective read a statistic that it does not declare in `needs`."""


class Response:
    """One side of B pairs: the chosen responses, or the rejected ones.

    Every statistic is a `[B]` float tensor; logs are in nats and summed over the |y| scored tokens. Only those an
    objective declares in `needs` are there: reading another raises `MissingStatistic`.
    """

    logp: Tensor  # log pi(y | x), with gradient
    length: Tensor  # |y|, the number of scored tokens
    ref_logp: Tensor  # log pi_ref(y | x), of the frozen start policy
    log_sum_sq: Tensor  # sum_t log sum_v pi(v | x, y_<t)^2, no gradient
    log_max: Tensor  # sum_t log max_v pi(v | x, y_<t), no gradient
    win_prob: Tensor  # P(y beats a fresh sample of pi_ref | x), in [0, 1]

    def __init__(self, **statistics: Tensor) -> None:
        assert statistics.keys() <= set(STATISTICS), f"unknown statistics {sorted(statistics.keys() - set(STATISTICS))}"
        self.__dict__.update(statistics)

    def __getattr__(self, name: str) -> Tensor:
        if name in STATISTICS:
            raise MissingStatistic(f"{name} is not computed: add {name!r} to the objective's `needs`")
        raise AttributeError(name)

    @property
    def mean_logp(self) -> Tensor:
        """`[B]` nats per token: logp / |y|."""
        return self.logp / self.length

    @property
    def log_ratio(self) -> Tensor:
        """`[B]` nats: log pi(y | x) - log pi_ref(y | x)."""
        return self.logp - self.ref_logp


class PairLoss(NamedTuple):
    """Result of an objective for B pairs; every tensor is `[B]`.

    `loss` carries the gradient. The implicit rewards and the metrics are detached: they are reported, and the
    reward margin (chosen minus rejected) decides the accuracy.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base of every objective. Fields are hyperparameters; `objectives.build` checks their types.

    Subclasses raise `ValueError` in `__post_init__` for a value out of range, naming the field and what is
    allowed.
    """

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Names of the statistics that `__call__` reads, out of `STATISTICS`."""

    @abstractmethod
    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:
        """Return loss, implicit rewards and metrics of B pairs."""

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Calculate figures of a step that are not means over its pairs, from the means of its metrics; default: none."""
        return {}


def published(default: Any, low: float, high: float, why: str) -> Any:
    """Declare a dataclass field with the published range of its value, and the reason to stay near it.

    A value more than ten times outside `[low, high]` makes `objectives.build` warn. Zero is left to
    `__post_init__`: if it is allowed, it means "off".
    """
    return field(default=default, metadata={"published": (low, high), "why": why})


def above_zero(objective: Objective, *fields: str) -> None:
    """Raise `ValueError` for the first of these fields that is not a finite number above 0."""
    for name in fields:
        value = getattr(objective, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, not {value}")
