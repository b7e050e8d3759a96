"""Intervals that hold the truth, verdicts that are right about chance, and the small formulas by hand."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from align.stats import intervals
from align.stats.intervals import compare, estimate, holm, mean_over_seeds, t_quantile

DRAWS = 1_000


def drawn(rng, seeds, prompts, difference, seed_scatter=0.02, samples=4):
    """Scores [2, seeds, prompts] of two methods: shares of wins in `samples`, the true means being apart by `difference`.

    A prompt is easy or hard for both (uniform, 0.2 either way), suits one more than the other (0.1), a seed lifts or lowers
    a method on all prompts (normal, cut at three deviations), and each cell is off by itself (0.05). No probability leaves
    [0, 1], so the difference is exact.
    """
    chance = 0.5 + rng.uniform(-0.2, 0.2, prompts) + rng.uniform(-0.1, 0.1, (2, 1, prompts))
    chance = chance + np.clip(rng.normal(0, seed_scatter, (2, seeds, 1)), -3 * seed_scatter, 3 * seed_scatter)
    chance = chance + rng.uniform(-0.05, 0.05, (2, seeds, prompts)) + difference / 2 * np.array([1, -1])[:, None, None]
    return rng.binomial(samples, chance) / samples


# Over many draws ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fewer_resamples(monkeypatch):
    """Of 1,999 instead of 9,999 the margin is 1% off, and a thousand intervals take a fifth of the time."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1_999)
    intervals._resamples.cache_clear()
    yield
    intervals._resamples.cache_clear()


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_95_percent_intervals_hold_the_true_difference_in_93_to_97_percent_of_1000_draws(seeds, fewer_resamples):
    rng = np.random.default_rng(0)
    scatter = 0.02 if seeds > 1 else 0.0  # of one seed each, luck of a seed cannot be told from the method
    held = 0
    for _ in range(DRAWS):
        made = compare(*drawn(rng, seeds, 160, difference=0.05, seed_scatter=scatter))
        held += made.low <= 0.05 <= made.high
    assert 0.93 <= held / DRAWS <= 0.97


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_methods_that_are_equal_are_called_not_significant_in_95_percent_of_1000_draws(seeds, fewer_resamples):
    rng = np.random.default_rng(1)
    scatter = 0.02 if seeds > 1 else 0.0
    calm = sum(
        not compare(*drawn(rng, seeds, 160, difference=0, seed_scatter=scatter)).significant for _ in range(DRAWS)
    )
    assert 0.93 <= calm / DRAWS <= 0.97


def test_seeds_that_happen_to_agree_leave_the_interval_over_prompts():
    # Two seeds whose means are equal, though each is off by 0.3 at every prompt: the scatter between them is 0
    off = np.tile([0.3, -0.3], 80)
    hard = np.random.default_rng(12).uniform(0.3, 0.7, 160)
    made = estimate(np.stack([hard + off, hard - off]))
    alone = estimate((hard + off)[None])
    assert made.over == "seeds and prompts" and made.margin == pytest.approx(estimate(hard).margin)
    assert 0 < made.margin < alone.margin


def test_a_difference_of_a_tenth_is_found_nearly_always_with_3_seeds_and_160_prompts(fewer_resamples):
    rng = np.random.default_rng(2)
    assert sum(compare(*drawn(rng, 3, 160, difference=0.1)).significant for _ in range(200)) >= 180


def test_what_one_seed_each_says_is_about_the_models_and_wrong_about_methods_whose_seeds_scatter(fewer_resamples):
    rng = np.random.default_rng(3)
    drawn_ = [compare(*drawn(rng, 1, 160, difference=0.05, seed_scatter=0.04)) for _ in range(300)]
    assert {made.over for made in drawn_} == {"prompts"}
    assert sum(made.low <= 0.05 <= made.high for made in drawn_) / 300 < 0.85


def test_the_interval_of_one_method_holds_its_mean_in_93_to_97_percent_of_1000_draws(fewer_resamples):
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(DRAWS):
        made = estimate(drawn(rng, 5, 160, difference=0)[0])
        held += made.low <= 0.5 <= made.high
    assert 0.93 <= held / DRAWS <= 0.97


def test_four_equal_methods_show_a_significant_pair_in_about_5_percent_of_families_or_less(fewer_resamples):
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(300):
        a, b = drawn(rng, 1, 160, difference=0, seed_scatter=0), drawn(rng, 1, 160, difference=0, seed_scatter=0)
        made = [compare(one, other).p_value for one, other in combinations([*a, *b], 2)]
        wrong += min(holm(made)) <= 0.05
    assert wrong / 300 <= 0.08  # 0.05 and two and a half standard errors


# By hand ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "freedom, t", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (804, 1.9629)]
)
def test_students_t_is_that_of_the_printed_tables(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-5)


def test_the_mean_over_three_seeds_has_students_interval():
    # mean 0.6, deviation 0.1: 4.3027 * 0.1 / sqrt(3) = 0.2484
    made = mean_over_seeds([0.5, 0.6, 0.7])
    assert (made.mean, made.margin) == (pytest.approx(0.6), pytest.approx(0.2484, abs=1e-4))


def test_one_seed_has_no_interval():
    made = mean_over_seeds([0.6])
    assert made.over == "nothing" and math.isnan(made.margin)


def test_with_one_seed_the_interval_is_students_over_the_prompts_differences():
    # Differences 1 and 0 in turn over 400 prompts: mean 0.5, standard error 0.5 / sqrt(399) = 0.02503, t(399) = 1.9659
    first = np.tile([1.0, 0.0], 200)
    made = compare(first, np.zeros(400))
    assert made.mean == 0.5 and made.over == "prompts"
    assert (made.high - made.low) / 2 == pytest.approx(
        1.9659 * 0.5 / math.sqrt(399), rel=0.03
    )  # 9,999 resamples: 1% of chance


def test_where_prompts_do_not_matter_the_interval_is_the_two_sample_t_over_seeds():
    # Seeds' means 0.5 0.6 0.7 and 0.3 0.4 0.5, pooled deviation 0.1: 2.7764 * 0.1 * sqrt(2 / 3) = 0.2267
    first, second = (np.repeat(np.array(of)[:, None], 50, axis=1) for of in ([0.5, 0.6, 0.7], [0.3, 0.4, 0.5]))
    made = compare(first, second)
    assert made.mean == pytest.approx(0.2) and made.over == "seeds and prompts"
    assert (made.high - made.low) / 2 == pytest.approx(0.2267, rel=1e-3)


def test_a_method_with_one_seed_is_taken_to_scatter_like_the_other():
    # Pooled deviation 0.1 with 2 degrees of freedom: 4.3027 * 0.1 * sqrt(1 / 3 + 1) = 0.4968
    first = np.repeat(np.array([0.5, 0.6, 0.7])[:, None], 50, axis=1)
    made = compare(first, np.full(50, 0.4))
    assert (made.high - made.low) / 2 == pytest.approx(0.4968, rel=1e-3)


def test_what_makes_a_prompt_hard_for_both_methods_cancels():
    rng = np.random.default_rng(6)
    hard = rng.uniform(0, 1, 160)
    made = compare(hard + 0.01 + rng.normal(0, 0.01, 160), hard)
    assert made.significant and made.high - made.low < 0.01


@pytest.mark.parametrize("difference", np.linspace(-0.3, 0.3, 25))
def test_a_p_value_up_to_5_percent_and_an_interval_without_zero_are_the_same(difference):
    made = compare(*drawn(np.random.default_rng(7), 3, 60, difference))
    assert made.significant == (made.p_value <= 0.05) == (made.low > 0 or made.high < 0)


def test_the_same_scores_give_the_same_interval_and_swapped_ones_its_mirror_image():
    first, second = drawn(np.random.default_rng(8), 3, 50, difference=0.1)
    made, mirrored = compare(first, second), compare(second, first)
    assert made == compare(first, second)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-made.high, abs=2e-3), pytest.approx(-made.low, abs=2e-3))


def test_methods_that_answer_alike_differ_by_nothing_surely():
    scores = drawn(np.random.default_rng(9), 1, 50, difference=0)[0]
    made = compare(scores, scores)
    assert (made.mean, made.low, made.high, made.p_value) == (0, 0, 0, 1)


def test_one_prompt_of_many_that_differs_is_not_significant():
    made = compare(np.eye(1, 160)[0], np.zeros(160))
    assert not made.significant and made.low < 0 < made.high < 0.05


def test_scores_that_do_not_fit_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"3 and 2 prompts: compare two methods on the prompts that both answered"):
        compare([0.1, 0.2, 0.3], [0.1, 0.2])
    with pytest.raises(ValueError, match="leave out the prompts that have none"):
        compare([0.1, math.nan], [0.1, 0.2])
    with pytest.raises(ValueError, match="two prompts or more"):
        compare([0.1], [0.2])
    with pytest.raises(ValueError, match="one value per seed"):
        mean_over_seeds([])


# Many comparisons ---------------------------------------------------------------------------------------------------


def test_holm_multiplies_the_smallest_p_value_most_and_never_falls():
    # 0.01 * 4, 0.02 * 3, max(0.03 * 2, 0.06), max(0.04, 0.06)
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_difference_beyond_all_resamples_stands_among_any_number_of_comparisons(seeds):
    """10,000 prompts leave 999 resamples: a p-value of 0.001 at the least, times 190 comparisons of 20 methods."""
    tables = np.random.default_rng(12).normal(0, 1, (2, seeds, 10_000))
    made = compare(tables[0] + 1, tables[1])
    assert holm([made.p_value] * 190)[0] < 0.001
    assert compare(*tables).p_value > 0.001
    assert compare([1, 1, 1], [0, 0, 0]).p_value > 0  # that all agree does not make three prompts many


def test_a_comparison_that_stands_alone_may_not_stand_among_six():
    rng = np.random.default_rng(10)
    first = rng.normal(0, 1, 200)
    first = first - first.mean() + 0.165  # 2.3 standard errors
    alone = compare(first, np.zeros(200))
    others = [compare(*rng.normal(0, 1, (2, 200))).p_value for _ in range(5)]
    adjusted = holm([alone.p_value, *others])[0]
    assert alone.significant and not replace(alone, p_adjusted=adjusted).significant
    assert adjusted > 3 * alone.p_value


def test_few_prompts_that_all_agree_are_no_more_certain_than_a_sign_test_says():
    """Two-sided, P of P wins: 2 * 2^-P = 2^(1-P)."""
    for prompts in (2, 3, 6):
        made = compare(np.ones(prompts), np.zeros(prompts))
        assert made.p_value == pytest.approx(2.0 ** (1 - prompts))
