"""The plan of a step: which pairs, on which rank, in which micro-batch. Pure functions of lengths and a seed.

The global batch is `pairs_per_step` pairs on any number of devices. A micro-batch holds as many pairs as a token budget
allows, and a pair is never split. All ranks get the same number of micro-batches, because sharded strategies gather
weights in each. The loss is a sum over pairs divided by the pairs of the step, so it does not depend on the plan.

Lengths describe a group: `(prompt, response, ...)` in tokens; a pair is a group with two responses. Left out: that
attention costs more per token in long rows.
"""

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from align.choices import Layout

CPU_TOKENS = 4096  # of a micro-batch; twice as many: 2% faster, nearly twice the memory (benchmarks/RESULTS.md)
FORWARD_ONLY = 4  # times as many tokens fit on a device without gradients as in training
Lengths = tuple[int, ...]  # tokens of a prompt and of its responses


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that one device holds at once."""

    pairs: tuple[int, ...]
    counted: tuple[bool, ...]  # false for a filler, which only gives a rank as many pairs as the others
    pairs_in_step: int  # divisor of the sum of losses


def fed_tokens(groups: Sequence[Lengths], layout: Layout) -> int:
    """Count the tokens that go through the model for these groups in one batch, padding included."""
    if layout is Layout.shared:  # the last token of a response predicts nothing
        return sum(prompt + sum(responses) - len(responses) for prompt, *responses in groups)
    rows = [prompt + response - 1 for prompt, *responses in groups for response in responses]
    return len(rows) * max(rows) if layout is Layout.padded else sum(rows)


def plan_micro_batches(lengths: Sequence[Lengths], layout: Layout, budget: int) -> list[list[int]]:
    """Batch positions of groups, longest first, at most `budget` tokens each; a longer group is a batch of its own."""
    batches: list[list[int]] = []
    for i in _longest_first(lengths, layout):
        if batches and fed_tokens([lengths[j] for j in (*batches[-1], i)], layout) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def plan_step(lengths: Sequence[Lengths], world: int, layout: Layout, budget: int) -> list[list[list[int]]]:
    """Return `[rank][micro-batch][pair]`, positions in `lengths`, with the same number of micro-batches for each rank.

    The number of pairs must be a multiple of `world`. Micro-batches are as few as the budget allows, of similar size.
    """
    assert len(lengths) % world == 0, f"{len(lengths)} pairs cannot be dealt evenly to {world} ranks"
    divide = _like_lengths if layout is Layout.padded else _like_sums

    def cost(batch: list[int]) -> int:
        return fed_tokens([lengths[i] for i in batch], layout)

    least = -(-sum(map(cost, ([i] for i in range(len(lengths))))) // (budget * world))
    for rounds in range(max(1, min(least, len(lengths) // world)), len(lengths) // world + 1):
        batches = divide(lengths, layout, rounds * world)
        if all(len(batch) == 1 or cost(batch) <= budget for batch in batches):
            break
    batches.sort(key=cost, reverse=True)
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    for at in range(0, len(batches), world):  # in each round the largest batch goes to the rank with the fewest tokens
        lightest = sorted(ranks, key=lambda rank: sum(map(cost, rank)))
        for rank, batch in zip(lightest, batches[at : at + world], strict=True):
            rank.append(batch)
    return ranks


def _longest_first(lengths: Sequence[Lengths], layout: Layout) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-fed_tokens([lengths[i]], layout), i))


def _like_sums(lengths: Sequence[Lengths], layout: Layout, number: int) -> list[list[int]]:
    """Return `number` batches of similar sums: each group, longest first, joins the batch with the fewest tokens."""
    batches: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, at) for at in range(number)]
    for i in _longest_first(lengths, layout):
        tokens, at = heapq.heappop(heap)
        batches[at].append(i)
        heapq.heappush(heap, (tokens + fed_tokens([lengths[i]], layout), at))
    return batches


def _like_lengths(lengths: Sequence[Lengths], layout: Layout, number: int) -> list[list[int]]:
    """Return `number` batches of similar lengths, for little padding: halve the costliest run of the sorted groups."""
    runs = [_longest_first(lengths, layout)]
    while len(runs) < number:
        several = (run for run in runs if len(run) > 1)
        costliest = max(several, key=lambda run: fed_tokens([lengths[i] for i in run], layout))
        runs.remove(costliest)
        runs += [costliest[: len(costliest) // 2], costliest[len(costliest) // 2 :]]
    return runs


def deal(
    pairs: Sequence[int], lengths: Sequence[Lengths], world: int, layout: Layout, budget: int
) -> list[list[MicroBatch]]:
    """Return `[rank][micro-batch]` for some pairs, with the same number of micro-batches for each rank.

    If the pairs cannot be divided evenly, the shortest is repeated and not counted, so results do not depend on the
    number of ranks.
    """
    shortest = min(pairs, key=lambda i: fed_tokens([lengths[i]], layout))
    filled = [*pairs, *[shortest] * (-len(pairs) % world)]
    plan = plan_step([lengths[i] for i in filled], world, layout, budget)

    def micro_batch(batch: list[int]) -> MicroBatch:
        return MicroBatch(tuple(filled[i] for i in batch), tuple(i < len(pairs) for i in batch), len(pairs))

    return [list(map(micro_batch, rank)) for rank in plan]


def steps_per_epoch(pairs: int, pairs_per_step: int) -> int:
    """Count the optimizer steps of an epoch. The last one takes the remaining pairs."""
    return -(-pairs // pairs_per_step)


@dataclass(frozen=True, eq=False)
class StepSampler:
    """Micro-batches of one rank for each step. Deterministic in (seed, step); every epoch has an order of its own."""

    lengths: Sequence[Lengths]  # (prompt, chosen, rejected) tokens of each pair
    layout: Layout
    pairs_per_step: int
    world: int
    rank: int
    budget: int  # tokens of a micro-batch, padding included
    seed: int

    def __len__(self) -> int:
        return steps_per_epoch(len(self.lengths), self.pairs_per_step)

    def epoch(self, number: int, first: int = 0) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of each step of an epoch, from its step `first` on; both count from 0."""
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed}, epoch {number}").shuffle(order)
        for step in range(first, len(self)):
            pairs = order[step * self.pairs_per_step : (step + 1) * self.pairs_per_step]
            yield deal(pairs, self.lengths, self.world, self.layout, self.budget)[self.rank]

    def after(self, steps: int) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of each step that follows the first `steps`, epoch after epoch without end."""
        number, first = divmod(steps, len(self))
        while True:
            yield from self.epoch(number, first)
            number, first = number + 1, 0
