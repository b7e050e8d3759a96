"""Intervals that hold the truth, verdicts that are right about chance, and the small formulas by hand."""

import math

import numpy as np
import pytest

from align.report.stats import compare, compare_all, estimate, holm, mean_over_seeds, t_quantile, win_rate, wins

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


@pytest.mark.parametrize(
    "seeds, prompts, seed_scatter",
    [(3, 160, 0.02), (3, 160, 0.04), (1, 160, 0.0), (5, 40, 0.02)],
    ids=["3 seeds", "3 seeds that scatter", "1 seed", "5 seeds and 40 prompts"],
)
def test_95_percent_intervals_hold_the_true_difference_in_93_to_97_percent_of_1000_draws(seeds, prompts, seed_scatter):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(DRAWS):
        made = compare(*drawn(rng, seeds, prompts, difference=0.05, seed_scatter=seed_scatter))
        held += made.low <= 0.05 <= made.high
    assert 0.93 <= held / DRAWS <= 0.97


@pytest.mark.parametrize("seeds", [3, 1], ids=["3 seeds", "1 seed"])
def test_methods_that_are_equal_are_called_not_significant_in_95_percent_of_1000_draws(seeds):
    rng = np.random.default_rng(1)
    scatter = 0.02 if seeds > 1 else 0.0  # of one seed each, luck of a seed cannot be told from the method
    calm = sum(
        not compare(*drawn(rng, seeds, 160, difference=0, seed_scatter=scatter)).significant for _ in range(DRAWS)
    )
    assert 0.93 <= calm / DRAWS <= 0.97


def test_a_difference_of_a_tenth_is_found_nearly_always_with_3_seeds_and_160_prompts():
    rng = np.random.default_rng(2)
    assert sum(compare(*drawn(rng, 3, 160, difference=0.1)).significant for _ in range(200)) >= 180


def test_what_one_seed_each_says_is_about_the_models_and_wrong_about_methods_whose_seeds_scatter():
    rng = np.random.default_rng(3)
    drawn_ = [compare(*drawn(rng, 1, 160, difference=0.05, seed_scatter=0.04)) for _ in range(300)]
    assert {made.over for made in drawn_} == {"prompts"}
    assert sum(made.low <= 0.05 <= made.high for made in drawn_) / 300 < 0.85


def test_the_interval_of_one_method_holds_its_mean_in_93_to_97_percent_of_1000_draws():
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(DRAWS):
        made = estimate(drawn(rng, 5, 160, difference=0)[0])
        held += made.low <= 0.5 <= made.high
    assert 0.93 <= held / DRAWS <= 0.97


def test_four_equal_methods_show_a_significant_pair_in_about_5_percent_of_families_or_less():
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(300):
        a, b = drawn(rng, 1, 160, difference=0, seed_scatter=0), drawn(rng, 1, 160, difference=0, seed_scatter=0)
        made = compare_all({"dpo": a[0], "simpo": a[1], "sppo": b[0], "wpo": b[1]})
        wrong += any(of.significant for of in made.values())
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
    assert str(made) == "0.600 ± 0.248 (95% over seeds, 3 seeds)"


def test_one_seed_has_no_interval_and_says_so():
    made = mean_over_seeds([0.6])
    assert made.over == "nothing" and math.isnan(made.margin)
    assert str(made) == "0.600 (one seed: no interval)"


def test_with_one_seed_the_interval_is_students_over_the_prompts_differences():
    # Differences 1 and 0 in turn over 400 prompts: mean 0.5, standard error 0.5 / sqrt(399) = 0.02503, t(399) = 1.9659
    first = np.tile([1.0, 0.0], 200)
    made = compare(first, np.zeros(400))
    assert made.difference == 0.5 and made.over == "prompts"
    assert (made.high - made.low) / 2 == pytest.approx(
        1.9659 * 0.5 / math.sqrt(399), rel=0.03
    )  # 9,999 resamples: 1% of chance


def test_where_prompts_do_not_matter_the_interval_is_the_two_sample_t_over_seeds():
    # Seeds' means 0.5 0.6 0.7 and 0.3 0.4 0.5, pooled deviation 0.1: 2.7764 * 0.1 * sqrt(2 / 3) = 0.2267
    first, second = (np.repeat(np.array(of)[:, None], 50, axis=1) for of in ([0.5, 0.6, 0.7], [0.3, 0.4, 0.5]))
    made = compare(first, second)
    assert made.difference == pytest.approx(0.2) and made.over == "seeds and prompts" and made.seeds == (3, 3)
    assert (made.high - made.low) / 2 == pytest.approx(0.2267, rel=1e-3)


def test_a_method_with_one_seed_is_taken_to_scatter_like_the_other():
    # Pooled deviation 0.1 with 2 degrees of freedom: 4.3027 * 0.1 * sqrt(1 / 3 + 1) = 0.4968
    first = np.repeat(np.array([0.5, 0.6, 0.7])[:, None], 50, axis=1)
    made = compare(first, np.full(50, 0.4))
    assert made.seeds == (3, 1) and (made.high - made.low) / 2 == pytest.approx(0.4968, rel=1e-3)


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
    assert (made.difference, made.low, made.high, made.p_value) == (0, 0, 0, 1)


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


def test_a_comparison_that_stands_alone_may_not_stand_among_six():
    rng = np.random.default_rng(10)
    first = rng.normal(0, 1, 200)
    first = first - first.mean() + 0.165  # 2.3 standard errors
    same = {f"method {n}": rng.normal(0, 1, 200) for n in range(2)}
    alone = compare(first, np.zeros(200))
    among = compare_all({"new": first, "zero": np.zeros(200), **same})[("new", "zero")]
    assert alone.significant and not among.significant
    assert among.p_value == alone.p_value and among.p_adjusted > 3 * among.p_value
    assert (among.low, among.high) == (alone.low, alone.high)


# Win rates ----------------------------------------------------------------------------------------------------------


def test_a_tie_is_half_a_win_and_the_standard_error_is_that_of_the_mean():
    # 1 1 0.5 0: mean 0.625, squared deviations .140625 .140625 .015625 .390625, / 3 / 4 = 0.057292
    made = win_rate([1, 1, 0.5, 0])
    assert (made.rate, made.wins, made.ties, made.losses) == (0.625, 2, 1, 1)
    assert made.standard_error == pytest.approx(math.sqrt(0.057292), abs=1e-5)
    assert str(made) == "62.5% ± 23.9 (standard error; 2 won, 1 tied, 1 lost)"


def test_a_win_rate_is_what_alpaca_eval_counts_for_simpos_gemma():
    # The leaderboard's row gemma-2-9b-it-SimPO: n_wins 540, n_draws 1, n_wins_base 264, discrete_win_rate 67.1429
    made = win_rate([1.0] * 540 + [0.5] + [0.0] * 264)
    assert 100 * made.rate == pytest.approx(67.1429, abs=5e-5)


def test_samples_of_a_prompt_are_no_independent_trials():
    once = win_rate([1, 0, 1, 0, 1])
    repeated = win_rate([[1] * 4, [0] * 4, [1] * 4, [0] * 4, [1] * 4])
    assert repeated.standard_error == once.standard_error
    assert (repeated.wins, repeated.losses) == (12, 8)


def test_outcomes_of_scores_compare_every_sample_with_every_other():
    # Prompt 1: 2 beats 1, ties 2; 3 beats both: 3.5 of 4. Prompt 2: 0 loses to both, 1 ties one: 0.5 of 4
    assert wins([[2, 3], [0, 1]], [[1, 2], [1, 5]]).tolist() == [0.875, 0.125]


def test_outcomes_outside_zero_to_one_are_refused():
    with pytest.raises(ValueError, match="from 0"):
        win_rate([1.5, 2])
