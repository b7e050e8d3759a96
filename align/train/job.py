"""A training that is checked and prepared: its steps, its objective, and its pairs as tensors.

The pairs come a micro-batch at a time, or all of them without gradients, by all processes in step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from torch import Tensor

import objectives
from align.choices import Layout
from align.config import RunConfig
from align.data.pairs import Pairs, as_group, pair_lengths
from align.engine import Batch, collate, to_device
from align.engine.batching import FORWARD_ONLY, MicroBatch, deal, steps_per_epoch
from align.launch.rank import Cluster, Rank
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
    dir: Path
    policy: Path  # the folder of the trained policy
    figures: Path  # the file of the figures before and after, written when the policy is there

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return total_steps(self.cfg, len(self.pairs.train))


def build_objective(cfg: RunConfig) -> Objective:
    """Return the objective that the configuration names, or raise `UserError` for its name, a key or a value."""
    values = dict(cfg.objective)
    try:
        if code := values.pop("code", None):
            objectives.load_file(code)
        return objectives.build(values)
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class PairBatch:
    """A micro-batch of b pairs, on its device."""

    responses: Batch  # 2b of them: each chosen one, and its rejected one behind it
    row_ids: tuple[str, ...]
    counted: Tensor  # [b] 1; 0 for a pair that only keeps this rank in step with the others
    truncated: Tensor  # [b] 1 where the prompt or a response was cut
    columns: dict[str, Tensor]  # [b, 2] statistics that come with the data: win_prob, ref_logp
    pairs_in_step: int  # what the sum of losses is divided by


class PairData:
    """The pairs of a split, for a policy that is attached in `layout`, and their reference column."""

    def __init__(self, pairs: datasets.Dataset, layout: Layout, pad_token_id: int) -> None:
        self.pairs, self.layout, self.pad_token_id = pairs, layout, pad_token_id
        self.lengths = pair_lengths(pairs)
        self.ref_logp: Tensor | None = None  # [N, 2] nats, once there is one

    def batch(self, micro_batch: MicroBatch, device: torch.device) -> PairBatch:
        """Collate the pairs of a micro-batch."""
        index = list(micro_batch.pairs)
        rows = self.pairs.select(index).to_list()
        responses = collate([as_group(row) for row in rows], self.layout, self.pad_token_id)
        columns = {"win_prob": torch.tensor([[row["chosen_win_prob"], row["rejected_win_prob"]] for row in rows])}
        if self.ref_logp is not None:
            columns["ref_logp"] = self.ref_logp[index]
        truncated = torch.tensor([float(row["cut_tokens"] + row["cut_prompt_tokens"] > 0) for row in rows])
        return PairBatch(
            responses=responses.to(device),
            row_ids=tuple(row["row_id"] for row in rows),
            counted=to_device(torch.tensor(micro_batch.counted, dtype=torch.float32), device),
            truncated=to_device(truncated, device),
            columns={name: to_device(values, device) for name, values in columns.items()},
            pairs_in_step=micro_batch.pairs_in_step,
        )

    def column(
        self, numbers: Sequence[int], values_of: Callable[[PairBatch], Tensor], budget: int, rank: Rank
    ) -> Tensor:
        """Return `[len(numbers), k]`, values of these pairs, dealt to all processes; `budget` is of training."""
        place = {number: at for at, number in enumerate(numbers)}
        places, values = [], []
        for some in deal(numbers, self.lengths, rank.world, self.layout, FORWARD_ONLY * budget)[rank.number]:
            values.append(values_of(self.batch(some, rank.device)))
            counted = zip(some.pairs, some.counted, strict=True)
            places += [place[number] if counts else len(numbers) for number, counts in counted]
        column = values[0].new_zeros(len(numbers) + 1, *values[0].shape[1:])  # the last row takes what is not counted
        column[places] = torch.cat(values)
        return summed(column, rank)[:-1]


def summed(values: Tensor, rank: Rank) -> Tensor:
    """Return the sum of every process's tensor; all of them call it."""
    if rank.world > 1:
        torch.distributed.all_reduce(values)
    return values
