"""What suites make of numbers, by hand: no models, no files."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from align.evaluation import alpaca_eval, arena_hard, judge, lm_eval, pairs
from align.evaluation.evaluate import table, with_evaluations
from align.evaluation.settings import LmEvalConfig
from align.onpolicy.figures import usable
from align.onpolicy.sample import ResponseRow
from align.onpolicy.select import Candidate, ScoredPrompt
from align.say import UserError
from align.stats.length_control import length_controlled_win_rate


def test_accuracies_count_ties_half_and_lengths_are_divided_by():
    logp = torch.tensor([[-10.0, -12.0], [-6.0, -2.0], [-4.0, -8.0], [-9.0, -3.0]])
    length = torch.tensor([[5, 4], [3, 1], [2, 4], [3, 3]])  # mean_logp: -2 > -3, -2 = -2, -2 = -2, -3 < -1
    ref_logp = torch.tensor(
        [[-10.0, -11.0], [-8.0, -2.0], [-4.0, -9.0], [-9.0, -3.0]]
    )  # ratio: 0 > -1, 2 > 0, 0 < 1, 0 = 0
    found = pairs.figures(logp, ref_logp, length, ["a", "b", "b", ""])
    assert found["accuracy/mean_logp"] == (1 + 0.5 + 0.5 + 0) / 4
    assert found["accuracy/log_ratio"] == (1 + 1 + 0 + 0.5) / 4
    assert (found["accuracy/mean_logp/a"], found["accuracy/mean_logp/b"]) == (1, 0.5)
    assert (found["accuracy/log_ratio/a"], found["accuracy/log_ratio/b"]) == (1, 0.5)
    assert found["mean_logp/chosen"] == (-2 - 2 - 2 - 3) / 4 and found["log_ratio/rejected"] == (-1 + 0 + 1 + 0) / 4
    assert (found["length/chosen"], found["length/rejected"]) == (13 / 4, 12 / 4)
    start = pairs.figures(ref_logp, None, length, [""] * 4)
    assert start["accuracy/mean_logp"] == (1 + 0 + 1 + 0) / 4  # -2 > -2.75, -2.67 < -2, -2 > -2.25, -3 < -1
    assert not any("log_ratio" in name for name in start)


def scored(name: str, ours: list[str], theirs: list[str], matrix=None, scores=None) -> ScoredPrompt:
    told = [("policy", text) for text in ours] + [("opponent", text) for text in theirs]
    of = scores or [None] * len(told)
    candidates = [Candidate(text=t, length=1, score=s, origin=o) for (o, t), s in zip(told, of, strict=True)]
    return ScoredPrompt(id=name, candidates=candidates, preferences=matrix)


def answered(prompts: list[ScoredPrompt]) -> list[ResponseRow]:
    return [
        ResponseRow(
            iteration=1,
            prompt_id=p.id,
            k=k,
            prompt="?",
            response=c.text,
            response_ids=[1] * len(c.text),
            origin=c.origin,
        )
        for p in prompts
        for k, c in enumerate(p.candidates)
    ]


def test_a_prompt_counts_once_and_the_standard_error_is_clustered_by_prompt():
    half = [0.5, 0.5, 0.5]
    prompts = [
        scored("a", ["aa", "b"], ["c"], [[0.5, 0.5, 0.9], [0.5, 0.5, 0.5], [0.1, 0.5, 0.5]]),  # 0.9 and a tie: 0.7
        scored("b", ["aaaa"], ["cc"], [[0.5, 0.2], [0.8, 0.5]]),  # 0.2
        scored("c", ["a"], ["c", "c"], [half, half, half]),  # two ties: 0.5
    ]
    found = judge.compared(answered(prompts), prompts)
    assert found["win_rate"] == pytest.approx((0.7 + 0.2 + 0.5) / 3)
    spread = math.sqrt(sum((x - 1.4 / 3) ** 2 for x in (0.7, 0.2, 0.5)) / 2)
    assert found["standard_error"] == pytest.approx(spread / math.sqrt(3))
    assert found["ties"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["length"] == (2 + 1 + 4 + 1) / 4 and found["opponent/length"] == (1 + 2 + 1 + 1) / 4
    assert found["repetition"] == pytest.approx(0)  # the longest has one 4-gram only
    by_answers = length_controlled_win_rate([0.9, 0.5, 0.2, 0.5, 0.5], [2, 1, 4, 1, 1], [1, 1, 2, 1, 1])
    assert found["lc_win_rate"] == by_answers.rate
    assert "score" not in found and found["prompts"] == 3


def test_of_scores_the_higher_one_wins_and_prompts_without_a_finite_one_are_left_out():
    prompts = [
        scored("a", ["x", "y"], ["z"], scores=[0.1, 0.3, 0.2]),  # a loss and a win
        scored("b", ["x"], ["z"], scores=[0.4, 0.1]),
        scored("c", ["x"], ["z"], scores=[math.nan, 0.1]),
    ]
    found = judge.compared(answered(prompts), usable(prompts))
    assert found["win_rate"] == pytest.approx((0.5 + 1) / 2) and found["prompts"] == 2
    assert found["score"] == pytest.approx((0.1 + 0.3 + 0.4) / 3) and found["opponent/score"] == pytest.approx(0.15)


def annotation(preference: float, ours: int, theirs: int) -> dict:
    return {"preference": preference, "output_1": "x" * theirs, "output_2": "y" * ours}


def test_alpaca_evals_figures_are_those_of_its_annotations():
    found = alpaca_eval.figures(
        [annotation(2, 10, 4), annotation(1.2, 3, 4), annotation(0, 5, 8), annotation(1.9, 8, 8)]
    )
    won = [1, 0.2, 0.5, 0.9]  # 0 is an old way to say tie
    assert found["win_rate"] == pytest.approx(2.6 / 4)
    assert found["standard_error"] == pytest.approx(torch.tensor(won).std().item() / 2)
    assert found["ties"] == 0.25 and found["length"] == 26 / 4 and found["reference/length"] == 24 / 4
    assert found["lc_win_rate"] == pytest.approx(length_controlled_win_rate(won, [10, 3, 5, 8], [4, 4, 8, 8]).rate)
    hard = alpaca_eval.figures([annotation(2, 10, 4), annotation(1.2, 3, 4)], [1.0, -1.0], [[0.4, 1.0, 0.5]])
    assert (
        hard["lc_win_rate"]
        == length_controlled_win_rate([1, 0.2], [10, 3], [4, 4], [1, -1], gamed=[[0.4, 1, 0.5]]).rate
    )


def game(first: str | None, second: str | None, **more) -> dict:
    return {"games": [{"score": first}, {"score": second}], **more}


def test_a_clear_verdict_of_arena_hard_counts_three_times_and_the_second_game_is_the_other_way_round():
    # In the first game the model is B. show_result.py of the repository's newest commit: scores 1, 1, 1, 1 | 0, 0, 0, .5 | 1, 0.
    rows = [game("B>>A", "A>B"), game("A>>B", "A=B"), game("B>A", "B>A"), game(None, "A>B"), game("A>B", "?")]
    found = arena_hard.figures(rows)
    assert found["win_rate"] == pytest.approx((4 + 0.5 + 1) / 10) and found["questions"] == 3
    off = [4 - 4 * 0.55, 0.5 - 4 * 0.55, 1 - 2 * 0.55]  # of each question: what its games won above the mean
    assert found["standard_error"] == pytest.approx(math.sqrt(3 / 2 * sum(o * o for o in off)) / 10)
    with pytest.raises(UserError, match="no question has verdicts on two games"):
        arena_hard.figures([game(None, None)])


def test_categories_of_arena_hard_have_rates_of_their_own():
    found = arena_hard.figures(
        [game("B>A", "A>B", category="hard_prompt"), game("A>B", "A=B", category="creative_writing")]
    )
    assert found["win_rate"] == (2 + 0.5) / 4
    assert (found["win_rate/hard_prompt"], found["win_rate/creative_writing"]) == (1, 0.25)


def test_of_a_task_the_first_metric_counts_and_of_a_group_not_its_parts():
    of_harness = {  # as lm-eval 0.4.13 gives them
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": 0.1,
            "exact_match,flexible-extract": 0.6,
            "exact_match_stderr,flexible-extract": 0.1,
        },
        "mmlu": {"acc,none": 0.7, "acc_stderr,none": "N/A", "alias": "mmlu"},
        "mmlu_astronomy": {"acc,none": 0.9, "acc_stderr,none": 0.01},
        "empty": {"alias": "empty"},
    }
    assert lm_eval.figures(of_harness, ["gsm8k", "mmlu"]) == {"gsm8k": 0.5, "gsm8k/standard_error": 0.1, "mmlu": 0.7}
    assert lm_eval.figures(of_harness, ["mmlu_*"]).keys() >= {"mmlu_astronomy", "mmlu", "gsm8k"}
    assert lm_eval.figures(of_harness, ["empty"]) == {}


def test_a_misspelt_task_is_refused_before_another_is_loaded_from_the_hub(monkeypatch):
    loaded = []
    manager = SimpleNamespace(
        all_tasks=["gsm8k", "mmlu"],
        match_tasks=lambda names: [name for name in names if name in ("gsm8k", "mmlu")],
        load=loaded.append,
    )
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=lambda **_: manager))
    with pytest.raises(UserError, match=r"has no task mmul \(did you mean mmlu"):
        lm_eval._tasks(LmEvalConfig(kind="lm_eval", name="lm_eval", tasks=["gsm8k", "mmul"]))
    assert not loaded


def test_the_cards_section_is_replaced_and_stands_before_the_configuration():
    card = "# a model\n\n## Results\n\ntable\n\n## Configuration\n\n```json\n{}\n```\n"
    first = with_evaluations(card, {"judge": ("against x", {"judge/win_rate": 0.25})})
    assert first == card.replace(
        "## Configuration",
        "## Evaluation\n\nAgainst x.\n\n| | |\n| --- | ---: |\n| judge/win_rate | 0.25 |\n\n## Configuration",
    )
    assert with_evaluations(first, {"judge": ("against x", {"judge/win_rate": 0.25})}) == first
    assert with_evaluations(first, {}) == card
    alone = with_evaluations("# a card of somebody's\n", {"pairs": ("of y", {"pairs/pairs": 3.0})})
    assert alone.startswith("# a card of somebody's\n## Evaluation\n") and "| pairs/pairs | 3 |" in alone


def test_the_table_is_in_line():
    assert table({"a": 0.5, "long/name": 123.456}) == "a                 0.5\nlong/name       123.5"
