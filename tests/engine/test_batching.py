"""The plan of a step, by property and by hand: nothing lost, nothing twice, every rank the same, the budget kept."""

import random
from itertools import chain, islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.choices import Layout
from align.engine.batching import (
    MicroBatch,
    StepSampler,
    deal,
    fed_tokens,
    plan_micro_batches,
    plan_step,
    steps_per_epoch,
)

pairs_ = st.tuples(st.integers(1, 1500), st.integers(1, 1500), st.integers(1, 1500))
lengths_ = st.lists(pairs_, min_size=8, max_size=100)
worlds = st.sampled_from([1, 2, 3, 8])
budgets = st.integers(1, 30_000)
layouts = st.sampled_from(Layout)


def dealt(lengths, world):
    """As many as can be dealt evenly."""
    return lengths[: len(lengths) // world * world]


@settings(deadline=None)  # a machine may be busy
@given(lengths_, layouts, budgets)
def test_micro_batches_hold_every_pair_once_within_the_budget_unless_alone(lengths, layout, budget):
    batches = plan_micro_batches(lengths, layout, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or fed_tokens([lengths[i] for i in b], layout) <= budget for b in batches)


@settings(deadline=None)  # a machine may be busy
@given(lengths_, worlds, layouts, budgets)
def test_a_step_deals_every_pair_once_and_every_rank_the_same_number_of_micro_batches(lengths, world, layout, budget):
    lengths = dealt(lengths, world)
    plan = plan_step(lengths, world, layout, budget)
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
    assert len(plan) == world and len({len(rank) for rank in plan}) == 1
    batches = [batch for rank in plan for batch in rank]
    assert all(batches)  # none is empty
    assert all(len(b) == 1 or fed_tokens([lengths[i] for i in b], layout) <= budget for b in batches)


@settings(deadline=None)  # a machine may be busy
@given(lengths_, worlds, layouts, budgets)
def test_a_plan_depends_on_nothing_but_its_arguments(lengths, world, layout, budget):
    lengths = dealt(lengths, world)
    assert plan_step(lengths, world, layout, budget) == plan_step(list(lengths), world, layout, budget)
    assert plan_micro_batches(lengths, layout, budget) == plan_micro_batches(list(lengths), layout, budget)


@settings(deadline=None)  # a machine may be busy
@given(st.lists(st.lists(st.integers(1, 90), min_size=2, max_size=6), min_size=1, max_size=20), layouts)
def test_tokens_of_groups_of_any_size_are_those_of_their_rows(groups, layout):
    rows = [prompt + response - 1 for prompt, *responses in groups for response in responses]
    expected = {
        Layout.shared: sum(sum(group) - (len(group) - 1) for group in groups),  # prompt + chosen + rejected - 2
        Layout.packed: sum(rows),
        Layout.padded: len(rows) * max(rows),
    }
    assert fed_tokens([tuple(group) for group in groups], layout) == expected[layout]


def realistic(seed):
    """128 pairs within 2048 tokens: prompts of 150 at the median, responses of 270, both log-normal."""
    draw = random.Random(seed).lognormvariate
    pairs = []
    while len(pairs) < 128:
        prompt, *responses = (max(1, round(draw(*shape))) for shape in ((5.0, 0.9), (5.6, 0.7), (5.6, 0.7)))
        if prompt + max(responses) <= 2048:
            pairs.append((prompt, *responses))
    return pairs


@pytest.mark.parametrize("budget", [4096, 8192, 16384, 65536])
@pytest.mark.parametrize("layout", [Layout.shared, Layout.packed], ids=lambda layout: layout.name)
def test_eight_ranks_get_the_same_tokens_within_a_tenth_in_as_few_micro_batches_as_can_be(layout, budget):
    extra = 0
    for seed in range(20):
        lengths = realistic(seed)
        plan = plan_step(lengths, 8, layout, budget)
        tokens = [sum(fed_tokens([lengths[i] for i in batch], layout) for batch in rank) for rank in plan]
        assert max(tokens) / min(tokens) - 1 <= 0.10, seed
        extra += len(plan[0]) - -(-sum(tokens) // (8 * budget))
    assert extra <= 20  # at most one more than would hold all tokens without gaps


def test_hand_worked_plans_of_shared_rows():
    # Fed tokens, prompt + chosen + rejected - 2: 10, 30, 8, 22, 16.
    lengths = [(4, 4, 4), (10, 10, 12), (2, 7, 1), (20, 1, 3), (6, 6, 6)]
    assert [fed_tokens([pair], Layout.shared) for pair in lengths] == [10, 30, 8, 22, 16]
    # Longest first, as long as they fit: 30; 22 + 16 = 38; 10 + 8.
    assert plan_micro_batches(lengths, Layout.shared, 40) == [[1], [3, 4], [0, 2]]
    # A pair longer than the budget stands alone.
    assert plan_micro_batches(lengths, Layout.shared, 20) == [[1], [3], [4], [0, 2]]
    # Two ranks, 70 tokens without the 16: each the lighter of two: 30 and 22; 10 to the 22; 8 to the 30.
    assert plan_step(lengths[:4], 2, Layout.shared, 40) == [[[1, 2]], [[3, 0]]]
    # A budget of 30 asks for 70 / 60, two rounds: 30, 22, 10 and 8 each alone; 30 and 22, then 10 to the lighter.
    assert plan_step(lengths[:4], 2, Layout.shared, 30) == [[[1], [2]], [[3], [0]]]


def test_hand_worked_plans_of_packed_rows():
    # Fed tokens, both rows: 3 + 4 - 1 + 3 + 2 - 1 = 10; 18; 4.
    lengths = [(3, 4, 2), (8, 2, 2), (1, 1, 3)]
    assert [fed_tokens([pair], Layout.packed) for pair in lengths] == [10, 18, 4]
    assert plan_micro_batches(lengths, Layout.packed, 20) == [[1], [0, 2]]


def test_hand_worked_plans_of_padded_rows():
    # Rows of 9, 3, 2 and 8 tokens. [9, 8] cost 4 * 9 = 36; with 3 they would cost 6 * 9 = 54 > 40. [3, 2] cost 4 * 3.
    lengths = [(1, 3, 1), (1, 9, 2), (1, 2, 2), (4, 5, 5)]
    assert plan_micro_batches(lengths, Layout.padded, 40) == [[1, 3], [0, 2]]
    # Two ranks get one each: the costlier to the first.
    assert plan_step(lengths, 2, Layout.padded, 40) == [[[1, 3]], [[0, 2]]]


@settings(deadline=None)  # a machine may be busy
@given(lengths_, worlds, budgets)
def test_like_lengths_stay_together_in_padded_rows(lengths, world, budget):
    """A micro-batch is a run of the pairs in order of their longer row: no other pair's lies strictly within it."""
    lengths = dealt(lengths, world)
    longer = [prompt + max(responses) for prompt, *responses in lengths]
    batches = [batch for rank in plan_step(lengths, world, Layout.padded, budget) for batch in rank]
    runs = sorted((min(longer[i] for i in batch), max(longer[i] for i in batch)) for batch in batches)
    assert all(below[1] <= above[0] for below, above in pairwise(runs))


# Dealt to the ranks ---------------------------------------------------------------------------------------------------

SHORT = (1, 1, 1)  # shorter than, or as short as, any


@settings(deadline=None)  # a machine may be busy
@given(st.lists(pairs_, min_size=1, max_size=60), st.integers(1, 12), layouts, budgets)
def test_every_pair_is_counted_once_whatever_the_ranks_and_the_shortest_fills_up(lengths, world, layout, budget):
    lengths = [SHORT] * 3 + lengths + [SHORT]  # others of the data: a step must not touch them
    pairs = list(range(3, len(lengths) - 1))[::-1]
    ranks = deal(pairs, lengths, world, layout, budget)
    batches = [batch for rank in ranks for batch in rank]
    each = [(i, counts) for batch in batches for i, counts in zip(batch.pairs, batch.counted, strict=True)]
    assert sorted(i for i, counts in each if counts) == sorted(pairs)
    fillers = [i for i, counts in each if not counts]
    assert len(fillers) == -len(pairs) % world < world and set(fillers) <= set(pairs)
    least = min(fed_tokens([lengths[i]], layout) for i in pairs)
    assert all(fed_tokens([lengths[i]], layout) == least for i in fillers)

    assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1
    assert all(batch.pairs for batch in batches)  # none is empty
    assert all(len(b.pairs) == 1 or fed_tokens([lengths[i] for i in b.pairs], layout) <= budget for b in batches)
    assert {batch.pairs_in_step for batch in batches} == {len(pairs)}


@settings(deadline=None)  # a machine may be busy
@given(lengths_, worlds, layouts, budgets)
def test_pairs_that_divide_evenly_are_dealt_as_planned_and_nothing_is_filled_up(lengths, world, layout, budget):
    lengths = dealt(lengths, world)
    made = deal(range(len(lengths)), lengths, world, layout, budget)
    assert all(all(batch.counted) for rank in made for batch in rank)
    assert [[list(batch.pairs) for batch in rank] for rank in made] == plan_step(lengths, world, layout, budget)


def test_more_ranks_than_pairs_have_a_pair_each():
    # Fed tokens of the pairs of this step, 4 and 2: 30 and 8. The shorter, 2, goes to all but one.
    lengths = [SHORT, SHORT, (2, 7, 1), SHORT, (10, 10, 12)]
    ranks = deal([4, 2], lengths, 5, Layout.shared, budget=100)
    assert sorted(ranks, key=lambda rank: (rank[0].pairs, rank[0].counted)) == [
        *[[MicroBatch((2,), (False,), 2)]] * 3,
        [MicroBatch((2,), (True,), 2)],
        [MicroBatch((4,), (True,), 2)],
    ]


def test_a_hand_worked_step_of_three_pairs_on_two_ranks():
    # Fed tokens 10, 30 and 8; with the 8 twice, 56 in two batches: 30 and 10; then the 8s to the lighter: 30, 10 + 8 + 8.
    lengths = [(4, 4, 4), (10, 10, 12), (2, 7, 1)]
    assert deal([0, 1, 2], lengths, 2, Layout.shared, budget=40) == [
        [MicroBatch((1,), (True,), 3)],
        [MicroBatch((0, 2, 2), (True, True, False), 3)],
    ]


# The sampler --------------------------------------------------------------------------------------------------------


def sampler(rank=0, world=1, pairs=50, pairs_per_step=16, seed=1, budget=200, layout=Layout.shared):
    lengths = [(5 + 7 * i % 41, 3 + i % 11, 1 + i % 17) for i in range(pairs)]
    return StepSampler(lengths, layout, pairs_per_step=pairs_per_step, world=world, rank=rank, budget=budget, seed=seed)


def pairs_of(steps):
    """Counted ones."""
    return [
        sorted(i for micro in step for i, counts in zip(micro.pairs, micro.counted, strict=True) if counts)
        for step in steps
    ]


def test_an_epoch_holds_every_pair_once_and_each_epoch_has_an_order_of_its_own():
    steps = sampler()
    first = pairs_of(steps.epoch(0))
    assert sorted(i for step in first for i in step) == list(range(50))
    assert [len(step) for step in first] == [16, 16, 16, 2]
    second = pairs_of(steps.epoch(1))
    assert sorted(i for step in second for i in step) == list(range(50)) and second != first
    assert pairs_of(steps.epoch(0)) == first


def test_a_run_that_goes_on_is_fed_the_steps_that_an_uninterrupted_one_is():
    steps = sampler()  # 4 an epoch
    whole = pairs_of(islice(steps.after(0), 10))
    assert whole == pairs_of([*steps.epoch(0), *steps.epoch(1), *steps.epoch(2)])[:10]
    for done in (1, 4, 7):
        assert pairs_of(islice(steps.after(done), 10 - done)) == whole[done:]


@pytest.mark.parametrize("world", [2, 3, 8, 64])
@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.name)
def test_the_pairs_of_a_step_depend_neither_on_ranks_nor_on_layout_nor_on_budget(layout, world):
    alone = pairs_of(sampler().epoch(0))
    ranks = [pairs_of(sampler(rank=r, world=world, layout=layout, budget=90).epoch(0)) for r in range(world)]
    assert [sorted(chain(*shares)) for shares in zip(*ranks, strict=True)] == alone


def test_every_micro_batch_knows_what_its_sum_is_divided_by():
    last = list(sampler().epoch(0))[-1]
    assert all(isinstance(micro, MicroBatch) and micro.pairs_in_step == 2 for micro in last)


def test_one_process_counts_all_that_it_feeds():
    assert all(all(micro.counted) for step in sampler().epoch(0) for micro in step)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_the_last_step_takes_all_that_is_left_whatever_the_ranks(world):
    # 53 = 3 * 16 + 5: two ranks feed 6 in the last step, eight ranks 8, and 5 are counted.
    ranks = [list(sampler(rank, world, pairs=53).epoch(0)) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {len(sampler(0, world, pairs=53))} == {4}
    last = [micro for steps in ranks for micro in steps[-1]]
    assert sum(len(micro.pairs) for micro in last) == {1: 5, 2: 6, 8: 8}[world]
    assert sum(sum(micro.counted) for micro in last) == 5
    assert {micro.pairs_in_step for micro in last} == {5}


@pytest.mark.parametrize("pairs, steps", [(53, 4), (49, 4), (48, 3), (47, 3), (16, 1), (1, 1)])
def test_an_epoch_has_a_step_more_for_what_is_left(pairs, steps):
    assert steps_per_epoch(pairs, 16) == steps == len(sampler(pairs=pairs))
