"""The published GLM: its formula by hand, and what it recovers of data whose weights are known."""

import math

import numpy as np
import pytest

from align.stats.length_control import length_controlled_win_rate, outcomes


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def annotations(bias, length, difficulty, count=805, seed=0, longer_by=300):
    """Made annotations of a model whose weights are known: lengths, difficulties and the judge's exact probabilities."""
    rng = np.random.default_rng(seed)
    baseline = rng.integers(200, 4000, count)
    ours = np.maximum(1, baseline + rng.normal(longer_by, 700, count).round())
    hard = rng.normal(0, 1.48, count)  # the deviation of the published ones
    gap = baseline - ours
    chance = sigmoid(bias + length * np.tanh(gap / gap.std(ddof=1)) + difficulty * hard)
    return ours, baseline, hard, chance


# The fit ------------------------------------------------------------------------------------------------------------


def test_two_instructions_and_two_terms_are_solved_exactly():
    # The model's answers are 100 longer, then 100 shorter than the baseline's: std = 200 / sqrt(2), x = -+tanh(1/sqrt(2)).
    # Won with sigmoid(1) and sigmoid(0) of chance: bias 0.5, length -0.5 / tanh(1/sqrt(2)) = -0.8213; rate sigmoid(0.5)
    made = length_controlled_win_rate([sigmoid(1), 0.5], [300, 200], [200, 300])
    assert made.weights == pytest.approx([0.5, -0.5 / math.tanh(1 / math.sqrt(2))], abs=1e-3)
    assert made.rate == pytest.approx(sigmoid(0.5), abs=2e-4)


def test_the_fit_recovers_the_weights_that_made_the_annotations():
    # The published weights of gemma-2-9b-it-SimPO
    ours, baseline, hard, chance = annotations(bias=1.1709, length=-1.1421, difficulty=0.6125)
    made = length_controlled_win_rate(chance, ours, baseline, hard)
    assert made.weights == pytest.approx([1.1709, -1.1421, 0.6125], abs=1e-3)
    assert made.rate == pytest.approx(sigmoid(made.weights[0] + made.weights[2] * hard).mean())


def test_a_longer_model_that_is_preferred_for_its_length_loses_its_advantage():
    ours, baseline, hard, chance = annotations(bias=0, length=-2, difficulty=0, longer_by=1000)
    made = length_controlled_win_rate(chance, ours, baseline, hard)
    assert chance.mean() > 0.7
    assert made.rate == pytest.approx(0.5, abs=1e-3)


def test_without_difficulties_the_rate_is_the_sigmoid_of_the_bias():
    ours, baseline, _, chance = annotations(bias=0.4, length=-1, difficulty=0)
    made = length_controlled_win_rate(chance, ours, baseline)
    assert made.rate == pytest.approx(sigmoid(0.4), abs=1e-4)
    assert len(made.weights) == 2


def test_the_baseline_judged_against_itself_wins_half_and_has_no_weights():
    lengths = np.arange(100, 905)
    made = length_controlled_win_rate(np.full(805, 0.5), lengths, lengths, np.linspace(-3, 5, 805))
    assert made.rate == 0.5 and made.weights == [0, 0, 0]


def test_a_model_that_always_wins_stays_finite():
    ours, baseline, hard, _ = annotations(bias=0, length=0, difficulty=0)
    made = length_controlled_win_rate(np.ones(805), ours, baseline, hard)
    assert 0.9999 < made.rate < 1


def test_lengths_in_another_unit_change_nothing():
    ours, baseline, hard, chance = annotations(bias=0.3, length=-1, difficulty=0.5)
    in_characters = length_controlled_win_rate(chance, ours, baseline, hard)
    in_tokens = length_controlled_win_rate(chance, ours / 4, baseline / 4, hard)
    assert in_tokens.rate == pytest.approx(in_characters.rate, abs=1e-12)


def test_gamed_rows_hold_length_and_difficulty_where_they_say():
    # A hundred thousand rows, a tenth of the weight each, outweigh 50 annotations: their length -1.8 and difficulty 0.75 win
    ours, baseline, hard, chance = annotations(bias=0.5, length=0, difficulty=0, count=50)
    rng = np.random.default_rng(1)
    gap, at = rng.normal(0, 1, 100_000), rng.normal(0, 1.48, 100_000)
    gamed = np.stack([sigmoid(-1.8 * np.tanh(gap) + 0.75 * at), gap, at], axis=1)
    made = length_controlled_win_rate(chance, ours, baseline, hard, gamed=gamed)
    assert made.weights[1:] == [pytest.approx(-1.8, abs=0.1), pytest.approx(0.75, abs=0.05)]


def test_the_standard_error_is_the_scatter_over_repeated_annotation():
    rates, errors = [], []
    for seed in range(200):
        ours, baseline, hard, chance = annotations(bias=0.5, length=-1.2, difficulty=0.6, seed=seed)
        judged = np.random.default_rng(seed).binomial(1, chance)
        made = length_controlled_win_rate(judged, ours, baseline, hard)
        rates.append(made.rate), errors.append(made.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(rates), rel=0.15)  # of 200: 5% of chance


# What goes in -------------------------------------------------------------------------------------------------------


def test_alpaca_evals_preferences_become_probabilities_and_zero_was_a_tie():
    assert outcomes([1, 1.25, 1.5, 2, 0]).tolist() == [0, 0.25, 0.5, 1, 0.5]
    with pytest.raises(ValueError, match="between 1 and 2"):
        outcomes([1, math.nan])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0.5, 1], [3], [4, 5]), "one number per instruction"),
        (([0.5, 1], [3, 4, 5], [4, 5]), "one number per instruction"),
        (([0.5, math.nan], [3, 4], [4, 5]), "leave those instructions out"),
        (([1.5, 2], [3, 4], [4, 5]), "pass through `outcomes` first"),
        (([], [], []), "one number per instruction"),
    ],
)
def test_annotations_that_do_not_fit_are_refused_with_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(*arguments)


def test_gamed_rows_without_difficulties_are_refused():
    with pytest.raises(ValueError, match="gamed rows have difficulties"):
        length_controlled_win_rate([0.5, 1], [3, 4], [4, 5], gamed=[[0.5, 0.1, 0.2]])
