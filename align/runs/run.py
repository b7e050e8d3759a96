"""A run and its iterations, as they are handed to every process. Offline training is one iteration whose pairs are given.

<run folder>/results.json      the start model and the trained policy, in figures
            /iter_0/, iter_1/  of self-play: the start model's answers, and a folder for each iteration
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.config import RunConfig
from align.data.pairs import Pairs
from align.data.prompts import Prompts
from align.launch.rank import Cluster
from align.model.load import Policy, Start


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is checked and prepared.

    Attributes:
        source: the pairs of a dataset, or the prompts that self-play makes pairs of.
        plan: what would run, in words.
    """

    cfg: RunConfig
    start: Start
    source: Pairs | Prompts
    cluster: Cluster
    identity: dict[str, Any]
    dir: Path
    plan: str

    @property
    def is_selfplay(self) -> bool:
        """True when every iteration samples its own pairs."""
        return isinstance(self.source, Prompts)

    @property
    def results(self) -> Path:
        """The file of the run's figures, written when all requested iterations are complete."""
        return self.dir / "results.json"

    @property
    def metrics(self) -> Path:
        """The metrics of every step; of self-play a pattern."""
        return self.dir / ("iter_*" if self.is_selfplay else "") / "metrics.jsonl"

    @property
    def done(self) -> int:
        """The number of complete iterations that results.json is about."""
        if not self.results.exists():
            return 0
        return len(json.loads(self.results.read_text())["iterations"]) if self.is_selfplay else 1

    @property
    def is_complete(self) -> bool:
        """True when all requested iterations are complete; a larger `iterations` resumes from here."""
        return self.done >= self.cfg.iterations

    @property
    def policy(self) -> Path:
        """The folder of the trained policy that results.json is about."""
        return Iteration(run=self, number=max(self.done, self.cfg.iterations)).policy

    @property
    def start_policy(self) -> Policy:
        """The start model as a policy."""
        return Policy(iteration=0, cfg=self.cfg.model, start=self.start)

    @property
    def cache(self) -> Path:
        """The folder of what runs share."""
        return Path(self.cfg.cache_dir).expanduser()

    @property
    def iterations(self) -> "list[Iteration]":
        """The requested iterations, in order."""
        return [Iteration(run=self, number=number) for number in range(1, self.cfg.iterations + 1)]


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One training of a run, with its pairs before it and its evaluation behind it. Number 0 is the start model."""

    run: Run
    number: int

    @cached_property
    def folder(self) -> Path:
        """The folder of its files: the run folder itself where the pairs are given."""
        return self.run.dir / f"iter_{self.number}" if self.run.is_selfplay else self.run.dir

    @property
    def policy(self) -> Path:
        """The folder of the policy that it trains."""
        return self.folder / ("policy" if self.run.is_selfplay else "model")

    @property
    def trained(self) -> Path:
        """The file of its training's figures; it exists when the policy does."""
        return self.folder / ("results.json" if self.run.is_selfplay else "trained.json")

    @property
    def summary(self) -> Path:
        """The file of the iteration's figures; it exists when the iteration is complete."""
        return self.folder / ("summary.json" if self.run.is_selfplay else "results.json")
