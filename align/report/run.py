"""A run as the report knows it: typed rows of what its folder holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from statistics import fmean
from typing import Any

Values = Mapping[str, Any]


class State(Enum):
    """Progress of a run."""

    complete = "complete"
    failed = "failed"  # it left a traceback
    collapsed = "collapsed"  # ended early, as it had nothing to hope for
    running = "running"  # a process holds its folder
    incomplete = "incomplete"  # stopped or killed: the same command goes on


@dataclass(frozen=True, kw_only=True)
class Answers:
    """K answers of start model and policy to one prompt, with the judge's word on them."""

    prompt: str
    start: list[str]
    policy: list[str]
    start_scores: list[float]  # empty where the scorer only compares
    policy_scores: list[float]
    chances: list[list[float]]  # [K][K] P(the policy's i-th answer beats the start model's j-th); a tie is one half

    @property
    def win_rate(self) -> float:
        """The mean chance of the policy; a tie is half a win."""
        return fmean(chance for row in self.chances for chance in row)

    @property
    def ties(self) -> float:
        """The share of pairs of answers that are equally good."""
        return fmean(chance == 0.5 for row in self.chances for chance in row)

    @property
    def wins(self) -> float:
        """The share of pairs in which the policy's answer is the better one."""
        return self.win_rate - self.ties / 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    dir: Path
    name: str  # what the report calls it: its folder, without what all folders have in common
    state: State
    note: str = ""  # why it is not complete, in a line
    config: Values = field(default_factory=dict)  # "objective.beta": 2.0, ... all of config.yaml
    identity: Values = field(default_factory=dict)  # likewise, of identity.json: what decides the result
    start: Mapping[str, float] = field(default_factory=dict)  # results of the start model
    trained: Mapping[str, float] = field(default_factory=dict)  # of the policy; "cost/..." and what suites say, too
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # accuracy: pair: 0, 0.5 or 1
    suites: Mapping[str, str] = field(default_factory=dict)  # what `align evaluate` has measured, a line each
    curves: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)  # metric: (step, value), in order
    answers: list[Answers] = field(default_factory=list)
    iterations: Sequence[Mapping[str, float]] = field(default_factory=list)  # of self-play
    steps: int | None = None  # planned; of self-play those of all iterations that are done
    made_with: str = ""  # versions
    command: str = ""

    @property
    def has_settings(self) -> bool:
        """True where its settings are known; a run that failed early has left none."""
        return bool(self.config or self.identity) or self.state is State.complete

    @property
    def objective(self) -> str:
        """The objective's name."""
        return str(self.config.get("objective.name", "unknown"))

    @property
    def seed(self) -> int | None:
        """The seed of data order, new weights and sampling."""
        return self.config.get("seed")

    @property
    def last_step(self) -> int:
        """The last step that is in metrics.jsonl."""
        return max((points[-1][0] for points in self.curves.values()), default=0)
