"""The built-in task: its judge by hand, its prompts, and the claim of the README for every objective."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from align.playground import task
from align.say import UserError


@pytest.mark.parametrize(
    "answer, score",
    [
        ("1. cat 2. dog 3. cow", 1.0),  # three different animals, numbered
        ("1. cat 2. dog", 2 / 3 * 0.8),  # two of three right, wrong count
        ("1. cat 2. cat 3. dog", 2 / 3),  # a repeat is no item
        ("1. cat 2. thing 3. dog", 2 / 3),  # nor is the filler
        ("1. cat 2. apple 3. dog", 2 / 3),  # nor one of another category
        ("cat, dog, cow", 0.5),  # right items, wrong layout
        ("1. cat 3. dog 2. cow", 0.5),  # wrong numbers are a wrong layout
        ("1. cat 2. dog 3. cow 4. pig", 3 / 4 * 0.8),  # one too many
        ("", 0.0),
    ],
)
def test_the_judge_scores_what_was_asked(answer, score):
    assert task.judge("please name 3 animals, numbered", answer) == pytest.approx(score)


@pytest.mark.parametrize("layout", task.LAYOUTS)
def test_a_rendered_answer_is_read_back_and_judged_perfect(layout):
    items = ["red", "blue"]
    assert task.read(task.render(items, layout), layout) == items
    assert task.judge(f"list 2 colours, {layout}", task.render(items, layout)) == 1.0


def test_the_judge_refuses_prompts_of_another_task():
    with pytest.raises(UserError, match="only knows prompts such as"):
        task.judge("what is the weather?", "cat")


def test_no_prompt_is_in_both_splits():
    assert not set(task.prompts("train")) & set(task.prompts("test"))
    assert (len(task.prompts("train")), len(task.prompts("test"))) == (400, 176)


def test_win_probabilities_are_the_mean_win_over_the_five_itself_included():
    # Scores 1, 0.5, 0.5, 0, 1: a perfect one beats three and ties with two, (3 + 2/2) / 5; the worst ties with itself.
    answers = ["1. cat 2. dog", "cat, dog", "cat, dog", "", "1. owl 2. fox"]
    (pair,) = task.pairs_of({"name 2 animals, numbered": answers})
    assert (pair["chosen_win_prob"], pair["rejected_win_prob"]) == pytest.approx((0.8, 0.1))
    assert (pair["chosen"], pair["rejected"]) == ("1. cat 2. dog", "")
    assert task.pairs_of({"name 2 animals, numbered": ["cat, dog"] * 5}) == []


def test_demonstrations_are_imperfect_and_always_the_same():
    made = list(task.demonstrations(500, seed=3))
    assert made == list(task.demonstrations(500, seed=3))
    scores = [task.judge(*demonstration) for demonstration in made]
    assert 0.5 < sum(scores) / len(scores) < 0.7 and max(scores) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["dpo", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("simpo", "sppo", "wpo"))]
)
def test_the_built_in_task_is_learned(tmp_path_factory, tmp_path, objective):
    cache = tmp_path_factory.getbasetemp() / "built-in"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ALIGN_CACHE": str(cache)}
    line = [sys.executable, "-m", "align", f"objective={objective}", "tracker=none", "run_dir=run"]
    line.append("cluster.cpu_threads=1")  # two that compete for a core take ten times as long
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    trained = json.loads((tmp_path / "run" / "results.json").read_text())["trained"]
    assert trained["rewards/accuracies"] >= 0.90
    assert trained["win_rate"] >= 0.60
    assert "win rate against the start model" in done.stdout
