"""The plan of a step: which pairs, on which rank, in which micro-batch. Pure functions of lengths and a seed.

The global batch is `pairs_per_step` pairs, whatever the devices; a micro-batch holds as many pairs as a token budget
allows, and a pair is never split. Every rank gets the same number of micro-batches (sharded strategies gather weights
in each), so the loss, a sum over pairs divided by the pairs of the step, is the same however they are dealt.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that one device holds at once; `pairs_in_step` is what the sum of losses is divided by."""

    pairs: tuple[int, ...]
    pairs_in_step: int


def padded_tokens(lengths: Sequence[int]) -> int:
    """Tokens that a padded micro-batch of pairs occupies, both sides: `lengths` are prompt + longer response."""
    return 2 * len(lengths) * max(lengths)


def plan_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions of pairs, longest first, in groups of at most `budget` padded tokens; a longer pair stands alone."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and padded_tokens([lengths[j] for j in (*groups[-1], i)]) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def plan_step(lengths: Sequence[int], world: int, budget: int) -> list[list[list[int]]]:
    """`[rank][micro-batch][pair]`: positions in `lengths`, every rank with the same number of micro-batches.

    `lengths` are tokens of prompt + longer response, one per pair; their number is a multiple of `world`.
    """
    assert len(lengths) % world == 0, f"{len(lengths)} pairs cannot be dealt evenly to {world} ranks"

    def cost(group: list[int]) -> int:
        return padded_tokens([lengths[i] for i in group])

    groups = plan_micro_batches(lengths, budget)
    while len(groups) % world:  # split the costliest group that can be split
        widest = max((g for g in groups if len(g) > 1), key=cost)
        groups.remove(widest)
        groups += [widest[::2], widest[1::2]]
    groups.sort(key=cost, reverse=True)
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    for at in range(0, len(groups), world):  # the costliest of each round to the rank with the least so far
        lightest = sorted(ranks, key=lambda rank: sum(map(cost, rank)))
        for rank, group in zip(lightest, groups[at : at + world], strict=True):
            rank.append(group)
    return ranks


def steps_per_epoch(pairs: int, pairs_per_step: int, world: int) -> int:
    """Optimizer steps of an epoch. The last takes what is left, as far as it can be dealt evenly to the ranks."""
    return pairs // pairs_per_step + (pairs % pairs_per_step >= world)


class StepSampler:
    """For each step of an epoch, this rank's micro-batches. Deterministic in (seed, epoch, step).

    Args:
        lengths: tokens of prompt + longer response, per pair.
        budget: padded tokens of a micro-batch.
    """

    def __init__(
        self, lengths: Sequence[int], *, pairs_per_step: int, world: int, rank: int, budget: int, seed: int
    ) -> None:
        self.lengths, self.pairs_per_step, self.budget = lengths, pairs_per_step, budget
        self.world, self.rank, self.seed, self.epoch = world, rank, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch: every epoch has an order of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return steps_per_epoch(len(self.lengths), self.pairs_per_step, self.world)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed}, epoch {self.epoch}").shuffle(order)
        for step in range(len(self)):
            pairs = order[step * self.pairs_per_step : (step + 1) * self.pairs_per_step]
            pairs = pairs[: len(pairs) // self.world * self.world]
            plan = plan_step([self.lengths[i] for i in pairs], self.world, self.budget)
            yield [MicroBatch(tuple(pairs[i] for i in group), len(pairs)) for group in plan[self.rank]]
