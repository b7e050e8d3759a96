"""The plan of a step, by property: nothing lost, nothing twice, every rank the same, the budget kept."""

from hypothesis import given
from hypothesis import strategies as st

from align.batching import MicroBatch, StepSampler, padded_tokens, plan_micro_batches, plan_step, steps_per_epoch

lengths_ = st.lists(st.integers(2, 3000), min_size=8, max_size=200)
worlds = st.sampled_from([1, 2, 3, 8])
budgets = st.integers(64, 30_000)


@given(lengths_, budgets)
def test_micro_batches_hold_every_pair_once_within_the_budget_unless_alone(lengths, budget):
    groups = plan_micro_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or padded_tokens([lengths[i] for i in group]) <= budget for group in groups)


@given(lengths_, worlds, budgets)
def test_a_step_deals_every_pair_once_and_every_rank_the_same_number_of_micro_batches(lengths, world, budget):
    lengths = lengths[: len(lengths) // world * world]
    plan = plan_step(lengths, world, budget)
    assert sorted(i for rank in plan for group in rank for i in group) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan}) == 1 and len(plan) == world
    assert all(len(g) == 1 or padded_tokens([lengths[i] for i in g]) <= budget for rank in plan for g in rank)


@given(lengths_, worlds, budgets)
def test_a_plan_depends_on_nothing_but_its_arguments(lengths, world, budget):
    lengths = lengths[: len(lengths) // world * world]
    assert plan_step(lengths, world, budget) == plan_step(list(lengths), world, budget)


def test_a_hand_worked_plan():
    # Padded tokens: [9, 8] cost 2*2*9 = 36; with 3 they would cost 2*3*9 = 54 > 40. [3, 2] cost 2*2*3 = 12.
    assert plan_micro_batches([3, 9, 2, 8], budget=40) == [[1, 3], [0, 2]]
    # Two ranks get one each: the costlier group to the first.
    assert plan_step([3, 9, 2, 8], world=2, budget=40) == [[[1, 3]], [[0, 2]]]
    # A pair longer than the budget stands alone.
    assert plan_micro_batches([3, 90, 2], budget=40) == [[1], [0, 2]]


def sampler(rank=0, world=1, pairs=50, pairs_per_step=16, seed=1, budget=200):
    lengths = [5 + 7 * i % 41 for i in range(pairs)]
    return StepSampler(lengths, pairs_per_step=pairs_per_step, world=world, rank=rank, budget=budget, seed=seed)


def pairs_of(steps):
    return [sorted(i for micro in step for i in micro.pairs) for step in steps]


def test_an_epoch_holds_every_pair_once_and_each_epoch_has_an_order_of_its_own():
    steps = sampler()
    first = pairs_of(steps)
    assert sorted(i for step in first for i in step) == list(range(50))
    assert [len(step) for step in first] == [16, 16, 16, 2]
    steps.set_epoch(1)
    assert pairs_of(steps) != first
    steps.set_epoch(0)
    assert pairs_of(steps) == first


def test_the_pairs_of_a_step_do_not_depend_on_the_number_of_ranks():
    alone = pairs_of(sampler())
    ranks = [pairs_of(sampler(rank=r, world=2)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == alone


def test_every_micro_batch_knows_what_its_sum_is_divided_by():
    last = list(sampler())[-1]
    assert all(isinstance(micro, MicroBatch) and micro.pairs_in_step == 2 for micro in last)


def test_the_last_step_takes_what_the_ranks_can_share_evenly():
    # 53 = 3 * 16 + 5: two ranks share 4 of the last 5, eight none.
    assert steps_per_epoch(53, 16, world=2) == 4
    assert sum(len(micro.pairs) for r in range(2) for micro in list(sampler(r, 2, pairs=53))[-1]) == 4
    assert steps_per_epoch(53, 16, world=8) == 3
