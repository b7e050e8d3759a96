"""The choice of pairs: a 3 x 3 example by hand, one for each rule and each reason to drop, and what always holds."""

import math
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from align.choices import Rejected, WinProb
from align.config import SelectionConfig
from align.onpolicy.select import (
    Candidate,
    Dropped,
    ScoredPrompt,
    Selection,
    preferences,
    select,
    select_pair,
    win_probs,
)
from align.say import UserError

#: Three responses, none the best of all: a beats b with 0.9, b beats c with 0.6, c beats a with 0.7.
CYCLE = [[0.5, 0.9, 0.3], [0.1, 0.5, 0.6], [0.7, 0.4, 0.5]]


def scored(*scores: float, lengths=None, texts=None, origins=None) -> list[Candidate]:
    """Candidates "a", "b", ... with these scores."""
    lengths, texts = lengths or [10] * len(scores), texts or "abcdefgh"[: len(scores)]
    origins = origins or ["policy"] * len(scores)
    rows = zip(texts, lengths, scores, origins, strict=True)
    return [Candidate(text=t, length=n, score=s, origin=o) for t, n, s, o in rows]


def compared(count: int) -> list[Candidate]:
    """Candidates "a", "b", ... of which only who beats whom is known."""
    return [Candidate(text=text, length=10) for text in "abcdefgh"[:count]]


def choose(candidates, matrix=None, seed=0, **knobs) -> Selection | Dropped:
    config = SelectionConfig(**knobs)
    if matrix is None:
        matrix = preferences([candidate.score for candidate in candidates], config.temperature)
    return select_pair(candidates, matrix, config, Random(seed))


def indices(pair: Selection | Dropped) -> tuple[int, int]:
    """The chosen and the rejected one's place in the alphabet, which is theirs among candidates of different texts."""
    assert isinstance(pair, Selection), pair
    return "abcdefgh".index(pair.chosen), "abcdefgh".index(pair.rejected)


# SPPO's 3 x 3, worked by hand


def test_sppo_takes_the_mean_win_over_all_three_itself_included():
    # Scores 0, ln 3, -ln 3. sigmoid(ln 3) = 3 / (1 + 3) = 3/4 and sigmoid(2 ln 3) = 9 / (1 + 9) = 9/10, so
    #   P = [1/2  1/4  3/4 ]  mean (10 + 5 + 15)/60 = 1/2
    #       [3/4  1/2  9/10]  mean (15 + 10 + 18)/60 = 43/60
    #       [1/4  1/10 1/2 ]  mean (5 + 2 + 10)/60 = 17/60
    third = math.log(3)
    matrix = preferences([0, third, -third], temperature=1)
    assert matrix == [
        pytest.approx(row) for row in ([1 / 2, 1 / 4, 3 / 4], [3 / 4, 1 / 2, 9 / 10], [1 / 4, 0.1, 1 / 2])
    ]
    assert win_probs(matrix) == pytest.approx([1 / 2, 43 / 60, 17 / 60])
    pair = choose(scored(0, third, -third))
    assert pair == Selection(
        chosen="b",
        rejected="c",
        chosen_score=third,
        rejected_score=-third,
        chosen_win_prob=pytest.approx(43 / 60),
        rejected_win_prob=pytest.approx(17 / 60),
        chosen_origin="policy",
        rejected_origin="policy",
    )


def test_a_win_prob_of_the_pair_is_against_the_other_one_only():
    pair = choose(scored(0, math.log(3), -math.log(3)), win_prob=WinProb.pair)  # b against c: sigmoid(2 ln 3) = 9/10
    assert (pair.chosen_win_prob, pair.rejected_win_prob) == pytest.approx((9 / 10, 1 / 10))


def test_candidates_that_are_only_compared_are_ranked_by_their_mean_win():
    # Means of the rows: 1.7/3, 1.2/3, 1.6/3. The best is a and the worst b, although c beats a.
    pair = choose(compared(3), CYCLE)
    assert indices(pair) == (0, 1)
    assert (pair.chosen_score, pair.rejected_score) == pytest.approx((1.7 / 3, 1.2 / 3))
    assert (pair.chosen_win_prob, pair.rejected_win_prob) == pytest.approx((1.7 / 3, 1.2 / 3))
    pair = choose(compared(3), CYCLE, win_prob=WinProb.pair)
    assert (pair.chosen_win_prob, pair.rejected_win_prob) == pytest.approx((0.9, 0.1))


# Preferences from scores


@pytest.mark.parametrize(
    "temperature, wins",
    [
        (2, 0.75),  # (2 ln 3 - 0) / 2 = ln 3
        (1, 0.9),  # 2 ln 3
        (1e-300, 1.0),
        (0, 1.0),
    ],
)
def test_a_lower_temperature_makes_wins_surer(temperature, wins):
    matrix = preferences([2 * math.log(3), 0, 0], temperature)
    assert matrix == [pytest.approx(row) for row in ([0.5, wins, wins], [1 - wins, 0.5, 0.5], [1 - wins, 0.5, 0.5])]


def test_scores_far_apart_do_not_overflow():
    assert preferences([1e308, -1e308], 1e-300) == [[0.5, 1], [0, 0.5]]


@pytest.mark.parametrize("temperature", [-1, math.nan])
def test_a_temperature_below_zero_is_refused(temperature):
    with pytest.raises(UserError, match="must be 0 or above"):
        preferences([0, 1], temperature)


# Ties: WPO's second version


def test_of_the_best_the_shortest_is_chosen_and_of_the_worst_the_closest_in_length_to_it():
    # Best: b and d, d is shorter (20 tokens). Worst: a, c and f, whose lengths differ from 20 by 15, 4 and 6.
    candidates = scored(1, 9, 1, 9, 5, 1, lengths=[5, 30, 24, 20, 20, 14])
    assert indices(choose(candidates)) == (3, 2)


def test_what_lengths_leave_open_goes_to_the_first():
    assert indices(choose(scored(9, 9, 1, 1, lengths=[10, 10, 8, 12]))) == (0, 2)


def test_ties_of_compared_candidates_do_not_depend_on_the_order_of_summation():
    # a and b each win 0.5, 0.5, 0.55 and 0.85 of four, met in two orders; plain sums of them differ in the last digit.
    matrix = [[0.5, 0.5, 0.55, 0.85], [0.5, 0.5, 0.85, 0.55], [0.45, 0.15, 0.5, 0.5], [0.15, 0.45, 0.5, 0.5]]
    assert sum(matrix[0]) != sum(matrix[1])
    candidates = [Candidate(text=text, length=length) for text, length in zip("abcd", (12, 9, 10, 10), strict=True)]
    assert indices(choose(candidates, matrix))[0] == 1  # the shorter one


# Random rejected: WPO's first version


def test_a_random_rejected_is_any_but_the_chosen_one():
    candidates = scored(1, 9, 5, 3)
    drawn = [indices(choose(candidates, seed=seed, rejected=Rejected.random)) for seed in range(400)]
    assert {chosen for chosen, _ in drawn} == {1}
    shares = [sum(rejected == i for _, rejected in drawn) / 400 for i in range(4)]
    assert shares[1] == 0 and shares == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.07)  # three standard deviations


def test_a_repeat_of_the_chosen_text_is_not_drawn():
    candidates = scored(9, 9, 9, 1, texts="aaab")
    assert {indices(choose(candidates, seed=s, rejected=Rejected.random)) for s in range(50)} == {(0, 1)}


def test_a_random_rejected_depends_on_the_seed_and_the_prompt_only():
    prompts = [ScoredPrompt(id=str(i), candidates=scored(9, 1, 2, 3, 4)) for i in range(40)]
    config = SelectionConfig(rejected=Rejected.random)
    pairs, _ = select(prompts, config, seed=1)
    again, _ = select(reversed(prompts[10:]), config, seed=1)
    assert again == {id: pair for id, pair in pairs.items() if int(id) >= 10}
    assert select(prompts, config, seed=2)[0] != pairs
    # Python's random() is the same in every version, so these are the pairs of any machine.
    assert "".join(pairs[str(i)].rejected for i in range(10)) == "edecdeeebc"


# Hybrid data


def test_a_further_source_is_chosen_where_it_is_best_and_is_no_opponent_of_the_policy():
    # Scores ln 9, 0, ln 3 at temperature 1, the first by gpt-4-turbo. Against the policy's two samples, of 0 and ln 3:
    #   gpt-4-turbo: (9/10 + 3/4)/2 = 33/40, as ln 9 - ln 3 = ln 3
    #   the worst:   (1/2 + 1/4)/2 = 3/8
    origins = ["gpt-4-turbo", "policy", "policy"]
    pair = choose(scored(math.log(9), 0, math.log(3), origins=origins))
    assert (pair.chosen_origin, pair.rejected_origin) == ("gpt-4-turbo", "policy") and indices(pair) == (0, 1)
    assert (pair.chosen_win_prob, pair.rejected_win_prob) == pytest.approx((33 / 40, 3 / 8))


def test_without_samples_of_the_policy_all_are_opponents():
    pair = choose(scored(math.log(3), 0, origins=["gpt-4-turbo", "claude"]))
    assert (pair.chosen_win_prob, pair.rejected_win_prob) == pytest.approx((5 / 8, 3 / 8))  # (1/2 + 3/4)/2


def test_identical_samples_are_dropped_although_a_further_source_differs():
    hybrid = scored(1, 1, 9, texts="aab", origins=["policy", "policy", "gpt-4-turbo"])
    assert choose(hybrid) is Dropped.identical
    assert indices(choose(hybrid, drop_identical=False)) == (1, 0)


def test_a_single_sample_beside_a_further_source_is_not_identical_samples():
    assert indices(choose(scored(1, 9, origins=["policy", "gpt-4-turbo"]))) == (1, 0)


# Dropped, one by one


@pytest.mark.parametrize("candidates", [[], scored(1.0)])
def test_fewer_than_two_candidates_are_dropped(candidates):
    assert choose(candidates) is Dropped.too_few


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_score_that_is_not_finite_drops_the_prompt(score, temperature):
    assert choose(scored(1, score, 3), temperature=temperature) is Dropped.not_finite
    assert choose(scored(1, score, 3), CYCLE) is Dropped.not_finite


@pytest.mark.parametrize("p", [math.nan, math.inf])
def test_a_preference_that_is_not_finite_drops_the_prompt(p):
    assert choose(compared(2), [[0.5, p], [-p, 0.5]]) is Dropped.not_finite


def test_identical_samples_are_dropped():
    assert choose(scored(1, 2, 3, texts="aaa")) is Dropped.identical


def test_one_text_as_chosen_and_rejected_is_dropped():
    assert choose(scored(1, 2, 3, texts="aba")) is Dropped.equal_texts  # a scorer that contradicts itself
    assert choose(scored(1, 3, texts="aa"), drop_identical=False) is Dropped.equal_texts
    assert choose(scored(1, 3, texts="aa"), drop_identical=False, rejected=Rejected.random) is Dropped.equal_texts


def test_equal_scores_prefer_nothing():
    assert choose(scored(2, 2, 2)) is Dropped.equal_scores
    assert choose(compared(2), [[0.5, 0.5], [0.5, 0.5]]) is Dropped.equal_scores


def test_scores_must_lie_min_gap_apart_or_more():
    assert indices(choose(scored(1, 1.5), min_gap=0.5)) == (1, 0)
    assert choose(scored(1, 1.375), min_gap=0.5) is Dropped.small_gap
    assert choose(compared(3), CYCLE, min_gap=0.17) is Dropped.small_gap  # of mean wins: (1.7 - 1.2)/3


def test_where_nothing_is_dropped_nothing_is_counted():
    assert select([ScoredPrompt(id="kept", candidates=scored(1, 2))], SelectionConfig(), seed=0)[1] == {}


def test_everything_dropped_is_counted_by_its_reason():
    prompts = {
        "kept": scored(1, 2),
        "one": scored(1),
        "nan": scored(1, math.nan),
        "same": scored(1, 2, texts="aa"),
        "same too": scored(3, 3, texts="aa"),
        "contradiction": scored(1, 2, 3, texts="aba"),
        "tie": scored(1, 1),
        "close": scored(1, 1.1),
        "kept too": scored(4, 2),
    }
    rows = (ScoredPrompt(id=id, candidates=candidates) for id, candidates in prompts.items())
    pairs, counts = select(rows, SelectionConfig(min_gap=0.5), seed=0)
    assert list(pairs) == ["kept", "kept too"]
    assert counts == {
        "fewer than two candidates": 1,
        "a score is not a finite number": 1,
        "all samples are identical": 2,
        "chosen and rejected are identical": 1,
        "chosen and rejected score the same": 1,
        "scores closer than min_gap": 1,
    }


# Refused: not the data's fault but a scorer's


@pytest.mark.parametrize(
    "candidates, matrix, says",
    [
        (compared(2), [[0.5, 1]], "must be 2 rows of as many numbers"),
        (compared(2), [[0.5, 1], [0]], "must be 2 rows of as many numbers"),
        (compared(2), [[0.5, 1.2], [-0.2, 0.5]], r"P\(0 beats 1\) is 1.2, which is no probability"),
        (compared(2), [[0.5, 0.9], [0.4, 0.5]], "take the mean of both orders"),
        (compared(2), [[0.0, 1], [0, 0.0]], "1/2 against itself"),
        (compared(2), None, "neither a score for every candidate nor preferences"),
    ],
)
def test_what_cannot_be_preferences_is_refused_with_the_prompts_name(candidates, matrix, says):
    with pytest.raises(UserError, match=f"prompt 'p7': .*{says}"):
        select([ScoredPrompt(id="p7", candidates=candidates, preferences=matrix)], SelectionConfig(), seed=0)


# What always holds


@st.composite
def matrices(draw) -> list[list[float]]:
    """Any preferences: P_ij in [0, 1], P_ij + P_ji = 1."""
    count = draw(st.integers(2, 7))
    matrix = [[0.5] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            matrix[i][j] = draw(st.floats(0, 1))
            matrix[j][i] = 1 - matrix[i][j]
    return matrix


#: Multiples of 1/8, so that adding a constant is exact.
EIGHTHS = st.integers(-80, 80).map(lambda n: n / 8)
SETTINGS = st.builds(
    SelectionConfig,
    rejected=st.sampled_from(Rejected),
    win_prob=st.sampled_from(WinProb),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    min_gap=st.sampled_from([0.0, 1.0]),
)


@settings(deadline=None)  # a machine may be busy
@given(matrices())
def test_win_probs_average_to_one_half(matrix):
    wins = win_probs(matrix)
    assert sum(wins) / len(wins) == pytest.approx(0.5)
    assert all(0 <= win <= 1 for win in wins)


@settings(deadline=None)  # a machine may be busy
@given(matrices())
def test_a_best_candidate_wins_at_least_as_often_as_it_loses(matrix):
    pair = choose(compared(len(matrix)), matrix)
    assume(isinstance(pair, Selection))
    assert pair.chosen_win_prob >= 0.5 - 1e-9 and pair.rejected_win_prob <= 0.5 + 1e-9


@settings(deadline=None)  # a machine may be busy
@given(st.lists(EIGHTHS, min_size=2, max_size=7, unique=True), SETTINGS, st.integers(0, 9), st.randoms())
def test_permuting_candidates_permutes_the_choice(scores, config, seed, shuffler):
    candidates = scored(*scores)
    order = list(range(len(scores)))
    shuffler.shuffle(order)
    shuffled = [candidates[i] for i in order]
    (pair, permuted) = (
        select_pair(listed, preferences([c.score for c in listed], config.temperature), config, Random(seed))
        for listed in (candidates, shuffled)
    )
    if isinstance(pair, Dropped):
        assert permuted is pair
        return
    assert indices(permuted) == indices(pair)
    assert (permuted.chosen_win_prob, permuted.rejected_win_prob) == (pair.chosen_win_prob, pair.rejected_win_prob)


@settings(deadline=None)  # a machine may be busy
@given(st.lists(EIGHTHS, min_size=2, max_size=7), SETTINGS, st.integers(0, 9), EIGHTHS)
def test_a_constant_added_to_all_scores_changes_nothing_else(scores, config, seed, constant):
    pair, shifted = (
        select_pair(scored(*own), preferences(own, config.temperature), config, Random(seed))
        for own in (scores, [score + constant for score in scores])
    )
    if isinstance(pair, Dropped):
        assert shifted is pair
        return
    assert indices(shifted) == indices(pair)
    assert (shifted.chosen_win_prob, shifted.rejected_win_prob) == (pair.chosen_win_prob, pair.rejected_win_prob)
    assert shifted.chosen_score - pair.chosen_score == shifted.rejected_score - pair.rejected_score == constant


@settings(deadline=None)  # a machine may be busy
@given(st.lists(EIGHTHS, min_size=2, max_size=7), SETTINGS)
def test_a_pair_is_two_candidates_the_better_one_chosen(scores, config):
    candidates = scored(*scores)
    pair = choose(candidates, **vars(config))
    assume(isinstance(pair, Selection))
    chosen, rejected = (candidates[i] for i in indices(pair))
    assert (pair.chosen, pair.chosen_score, pair.chosen_origin) == (chosen.text, max(scores), "policy")
    assert (pair.rejected, pair.rejected_score, pair.rejected_origin) == (rejected.text, rejected.score, "policy")
    assert pair.chosen_score - pair.rejected_score >= max(config.min_gap, 1 / 8)
    assert pair.chosen_win_prob > pair.rejected_win_prob
