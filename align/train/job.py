"""A training that is checked and prepared, its objective and its number of steps."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import objectives
from align.config import RunConfig
from align.data.pairs import Pairs
from align.engine.batching import steps_per_epoch
from align.launch.rank import Cluster
from align.model.load import Start
from align.say import UserError
from objectives import Objective


def check_batch(cfg: RunConfig, pairs: int, world: int) -> None:
    """Raise `UserError` for a global batch that the processes or the data cannot fill."""
    size = cfg.train.pairs_per_step
    if size % world:
        fits = size + world - size % world
        raise UserError(f"train.pairs_per_step={size} cannot be divided among {world} processes; {fits} can")
    if pairs < size:
        raise UserError(
            f"train.pairs_per_step={size} is more than the {pairs} training pairs: give more data or train.pairs_per_step={pairs}"
        )


def total_steps(cfg: RunConfig, pairs: int) -> int:
    """Return the optimizer steps of a training on so many pairs."""
    limit, epochs = cfg.optimizer.max_steps, cfg.optimizer.num_train_epochs
    return limit if limit > 0 else math.ceil(epochs * steps_per_epoch(pairs, cfg.train.pairs_per_step))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training that is checked and prepared, as it is handed to the processes that train."""

    cfg: RunConfig
    start: Start
    pairs: Pairs
    cluster: Cluster
    identity: dict[str, Any]
    dir: Path
    policy: Path  # the folder of the trained policy
    figures: Path  # the file of what it has come to, written when the policy is there
    plan: str

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return total_steps(self.cfg, len(self.pairs.train))


def build_objective(cfg: RunConfig) -> Objective:
    """Return the objective that the configuration names.

    Raises:
        UserError: an unknown name or hyperparameter, or a value out of range.
    """
    values = dict(cfg.objective)
    try:
        if code := values.pop("code", None):
            objectives.load_file(code)
        return objectives.build(values)
    except ValueError as error:
        raise UserError(str(error)) from error
