"""An iteration in figures, each worked by hand."""

import math
from statistics import fmean

import pytest

from align.onpolicy.figures import chances, figures, line, repetition, side_by_side, ties, usable, win_rates
from align.onpolicy.sample import ResponseRow
from align.onpolicy.select import Candidate, ScoredPrompt


def answer(prompt, k, text="x", tokens=1, **fields):
    return ResponseRow(
        iteration=0, prompt_id=prompt, k=k, prompt=prompt, response=text, response_ids=[5] * tokens, **fields
    )


def scored(ours, theirs, name="p"):
    """A prompt with scores of two policies' answers."""
    both = [("new", score) for score in ours] + [("start", score) for score in theirs]
    candidates = [Candidate(text=f"{i}", length=1, score=s, origin=o) for i, (o, s) in enumerate(both)]
    return ScoredPrompt(id=name, candidates=candidates)


def win_rate(prompts, ours, theirs):
    return fmean(win_rates(prompts, ours, theirs))


def compared(matrix, origins):
    """A prompt of which only who beats whom is known."""
    candidates = [Candidate(text=f"{i}", length=1, origin=origin) for i, origin in enumerate(origins)]
    return ScoredPrompt(id="p", candidates=candidates, preferences=matrix)


# Side by side ------------------------------------------------------------------------------------------------------


def test_policies_answers_lie_side_by_side_under_numbers_of_their_own():
    new = [answer("b", 0), answer("b", 1), answer("a", 0), answer("a", 1)]
    start = [answer("b", 0), answer("b", 1), answer("a", 0), answer("a", 1)]
    rows = side_by_side({"new": new, "start": start}, iteration=3)
    assert [(row.prompt_id, row.k, row.origin) for row in rows] == [
        ("b", 0, "new"), ("b", 1, "new"), ("b", 2, "start"), ("b", 3, "start"),
        ("a", 0, "new"), ("a", 1, "new"), ("a", 2, "start"), ("a", 3, "start"),
    ]  # fmt: skip
    assert {row.iteration for row in rows} == {3}
    assert new[0].origin == "policy", "the rows that are given stay as they are"


def test_a_third_policy_comes_behind_the_first_two():
    rows = side_by_side({name: [answer("a", 0), answer("a", 1)] for name in ("x", "y", "z")}, iteration=1)
    assert [(row.k, row.origin) for row in rows] == [(0, "x"), (1, "x"), (2, "y"), (3, "y"), (4, "z"), (5, "z")]


# Who wins ----------------------------------------------------------------------------------------------------------


def test_the_higher_score_wins_surely_and_equal_scores_are_half_a_win():
    # 2 beats 1 and 0, 1 ties with 1 and beats 0: (1 + 1 + 1/2 + 1) / 4 = 7/8
    first = scored([2, 1], [1, 0])
    # 0 loses to 1 and ties with 0, twice: (0 + 1/2 + 0 + 1/2) / 4 = 1/4
    second = scored([0, 0], [1, 0])
    assert win_rate([first], "new", "start") == 7 / 8
    assert win_rate([first, second], "new", "start") == (7 / 8 + 1 / 4) / 2
    assert win_rate([first, second], "start", "new") == 1 - (7 / 8 + 1 / 4) / 2


def test_prompts_weigh_the_same_however_many_answers_they_have():
    assert win_rate([scored([1, 1, 1], [0, 0, 0]), scored([0], [1])], "new", "start") == 0.5


def test_a_pairwise_scorer_says_who_wins():
    # The first two are ours: they win against the third with 0.8 and 0.3, and against the fourth with 0.6 and 0.9.
    matrix = [[0.5, 0.1, 0.8, 0.6], [0.9, 0.5, 0.3, 0.9], [0.2, 0.7, 0.5, 0.5], [0.4, 0.1, 0.5, 0.5]]
    prompt = compared(matrix, ["new", "new", "start", "start"])
    assert win_rate([prompt], "new", "start") == pytest.approx((0.8 + 0.6 + 0.3 + 0.9) / 4)
    assert win_rate([prompt], "start", "new") == pytest.approx((0.2 + 0.7 + 0.4 + 0.1) / 4)


def test_a_policy_is_as_good_as_itself():
    # Against itself each answer meets all, itself included, so wins and losses cancel.
    assert win_rate([scored([3, 1, 2], [0]), scored([1, 1, 0], [0])], "new", "new") == 0.5
    cycle = [[0.5, 0.9, 0.3], [0.1, 0.5, 0.6], [0.7, 0.4, 0.5]]
    assert win_rate([compared(cycle, ["new"] * 3)], "new", "new") == pytest.approx(0.5)


def test_prompts_with_an_answer_that_has_no_score_are_left_out():
    good = scored([1], [0])
    assert usable([good, scored([0], [math.nan]), scored([-math.inf], [1])]) == [good]
    unclear = compared([[0.5, math.nan], [math.nan, 0.5]], ["new", "start"])
    clear = compared([[0.5, 0.3], [0.7, 0.5]], ["new", "start"])
    assert usable([unclear, clear]) == [clear] and usable([unclear]) == []


def test_ties_are_the_share_of_answers_that_are_equally_good():
    # Of the six pairs the two 2 are even, and the two 1.
    assert ties([scored([2, 1], [1, 0, 2])], "new", "start") == pytest.approx(2 / 6)
    assert ties([scored([2, 1], [1, 0, 2]), scored([0], [0])], "new", "start") == pytest.approx((2 / 6 + 1) / 2)
    matrix = [[0.5, 0.1, 0.5, 0.6], [0.9, 0.5, 0.3, 0.9], [0.5, 0.7, 0.5, 0.5], [0.4, 0.1, 0.5, 0.5]]
    assert ties([compared(matrix, ["new", "new", "start", "start"])], "new", "start") == 1 / 4


def test_an_answer_is_no_tie_with_itself():
    # Of 1, 1, 0 one of three pairs is even, whichever is named first.
    assert ties([scored([1, 1, 0], [9])], "new", "new") == pytest.approx(1 / 3)
    assert math.isnan(ties([scored([1], [9])], "new", "new"))


def test_chances_are_rows_of_ours_against_columns_of_theirs():
    assert chances(scored([2, 1], [1, 0, 3]), "new", "start") == [[1, 1, 0], [0.5, 1, 0]]
    assert chances(scored([2, 1], [1, 0, 3]), "start", "new") == [[0, 0.5], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    "tokens, share",
    [
        ([], 0.0),
        ([7, 7, 7], 0.0),  # no 4-gram
        ([1, 2, 3, 4], 0.0),  # one
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234: the last was there before
        ([9] * 8, 4 / 5),  # five, of which one is new
        ([1, 2, 1, 2, 1, 2], 1 / 3),  # 1212 2121 1212
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(tokens, share):
    assert repetition(tokens) == pytest.approx(share)


# Figures -----------------------------------------------------------------------------------------------------------

ROWS = [
    answer("a", 0, "cat", tokens=2, origin="new"),
    answer("a", 1, "cat", tokens=2, origin="new"),
    answer("a", 2, "dog", tokens=9, origin="start"),
    answer("b", 0, "cow", tokens=3, origin="new"),
    answer("b", 1, "pig", tokens=5, origin="new", finished=False),
    answer("b", 2, "dog", tokens=9, origin="start", finished=False),
]


def test_figures_are_of_a_policys_own_answers():
    made = figures(ROWS, [scored([4, 1], [9], "a"), scored([2, 2.5], [9], "b")], "new")
    assert made == {
        "sample_length": 3,  # (2 + 2 + 3 + 5) / 4
        "distinct": 0.75,  # one text of two, and two of two: (1/2 + 1) / 2
        "unfinished": 0.25,  # one of four
        "judge_score": 2.375,  # (4 + 1 + 2 + 2.5) / 4
        "score_spread": 1.75,  # (3 + 0.5) / 2
        "repetition": 0.125,  # five equal tokens have two 4-grams, of which one is new: (0 + 0 + 0 + 1/2) / 4
    }
    theirs = figures(ROWS, [scored([1, 4], [9], "a"), scored([2, 2.5], [9], "b")], "start")
    assert theirs.pop("repetition") == pytest.approx(5 / 6)  # nine equal tokens: six 4-grams, one of them new
    assert theirs == {"sample_length": 9, "distinct": 1, "unfinished": 0.5, "judge_score": 9, "score_spread": 0}


def test_scores_are_told_of_prompts_that_have_them_and_not_where_none_is_known():
    made = figures(ROWS, [scored([2, 2.5], [9], "b")], "new")
    assert (made["judge_score"], made["score_spread"], made["sample_length"]) == (2.25, 0.5, 3)
    pairwise = compared([[0.5, 0.3], [0.7, 0.5]], ["new", "start"])
    assert set(figures(ROWS, [pairwise], "new")) == {"sample_length", "distinct", "unfinished", "repetition"}


def test_the_line_says_what_is_known():
    made = {"iteration": 1, "win_rate": 0.75, "win_rate/previous": 2 / 3, "sample_length": 12.0, "distinct": 0.955}
    assert line(made) == (
        "win rate against the start model 0.75, win rate against the policy before 0.667, length of an answer 12, "
        "share of different answers to a prompt 0.955"
    )
