"""The table of metrics: a run writes no number that is not in it, and no other file of align holds a list of them."""

import ast
import json
from pathlib import Path
from typing import get_args

import pytest
from conftest import ROOT, pair_row, quick, write_jsonl

from align.metrics import METRICS, Where, among, find, row, shown
from align.onpolicy.figures import line

JUDGE = "def short(prompt, answer):\n    return 1 / (1 + len(answer))\n"


@pytest.fixture
def judge(tmp_path, monkeypatch) -> None:
    """A scorer that can be imported."""
    (tmp_path / "metrics_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))


def written(run: Path) -> set[str]:
    """Names of all numbers in the metrics and results of a run folder, of its iterations too."""
    names = {
        name
        for file in run.rglob("metrics.jsonl")
        for text in file.read_text().splitlines()
        for name in json.loads(text).keys() - {"step"}
    }
    for file in run.rglob("results.json"):
        results = json.loads(file.read_text())
        parts = [results["start"], results["trained"], *results.get("iterations", [])]
        names |= {f"result/{name}" for part in parts for name, value in part.items() if isinstance(value, int | float)}
        names |= {f"result/cost/{name}" for name in results["cost"]}
    return names


@pytest.mark.slow
def test_every_metric_that_a_run_writes_is_in_the_table(align, judge, tiny_llama, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair_row(i, kind="animals") for i in range(40)])
    words = ["objective=wpo", "dataset.judge=metrics_judge:short", "dataset.group_by=kind", "train.eval_every_steps=1"]
    short = ["sentinel.sample_every_steps=1", "evaluation.prompts=2", "evaluation.max_new_tokens=8"]
    result = align(*quick(tiny_llama, pairs, f"run_dir={tmp_path / 'run'}", *words, *short))
    assert result.status == 0, result.err
    names = written(tmp_path / "run")
    assert {"eval/accuracy/animals", "train/objective/weight", "sentinel/repetition", "result/win_rate"} <= names
    assert [name for name in sorted(names) if find(name) is None] == []
    assert "held-out accuracy, animals" in result.out


@pytest.mark.slow
def test_every_metric_of_self_play_is_in_the_table(align, judge, tiny_llama, tmp_path):
    for name, many in (("prompts", 12), ("held_out", 4)):
        rows = [{"prompt": [{"role": "user", "content": f"{name} {i}"}]} for i in range(many)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    words = ["source=selfplay", "scorer=program", "scorer.path=metrics_judge:short", "objective=dpo", "iterations=1"]
    words += [f"dataset.eval_path={tmp_path / 'held_out.jsonl'}", "sampling.samples=3", "sampling.max_new_tokens=6"]
    words += ["evaluation.samples_per_prompt=2", "evaluation.max_new_tokens=6", "train.pairs_per_step=4"]
    result = align(*quick(tiny_llama, tmp_path / "prompts.jsonl", f"run_dir={tmp_path / 'run'}"), *words)
    assert result.status == 0, result.err
    names = written(tmp_path / "run")
    assert {"result/win_rate/previous", "result/distinct", "train/rewards/margins"} <= names
    assert [name for name in sorted(names) if find(name) is None] == []


# The table ------------------------------------------------------------------------------------------------------------


def test_names_are_told_once_and_places_are_those_that_there_are():
    names = [metric.name for metric in METRICS]
    assert len({*names}) == len(names)
    assert {where for metric in METRICS for where in metric.shown.split()} == {*get_args(Where)}
    assert all(metric.heading for metric in (*shown("column"), *shown("sweep")))


def test_a_member_of_a_family_has_its_own_words_and_a_metric_of_its_own_comes_first():
    assert row("accuracy/cooking").words == "accuracy, cooking"
    assert row("accuracy/mean_logp").heading == "accuracy, mean_logp"
    assert (row("lm_eval/arc").words, row("lm_eval/mmlu").heading) == ("arc", "MMLU")
    assert row("train/loss") is None and find("train/loss").name == "loss"
    assert find("train/objective/weight").name == "objective/weight" and find("judge/standard_error") is None
    assert [metric.name for metric in among(["accuracy/x", "loss", "win_rate", "accuracy/mean_logp"], "terminal")] == [
        "win_rate",
        "accuracy/mean_logp",
        "accuracy/x",
    ]


def test_what_is_better_is_known_by_the_whole_name():
    assert find("eval/accuracy/mean_logp").goal == find("alpaca_eval/lc_win_rate").goal == "maximize"
    assert find("result/repetition").goal == find("eval/loss").goal == "minimize"
    assert find("result/kl_policy_start").goal is find("result/cost/tokens").goal is None
    assert find("train/objective/scaled_loss").goal is find("judge/standard_error") is None


def test_the_line_of_an_iteration_is_in_the_words_of_the_table():
    assert line({"win_rate": 0.5, "distinct": 0.25, "steps": 3}) == (
        "win rate against the start model 0.5, share of different answers to a prompt 0.25"
    )


# Nowhere else ---------------------------------------------------------------------------------------------------------


def metrics_in(node: ast.AST) -> list[str]:
    """Names of metrics that a literal lists; a dict that computes a value for each name is no list of names."""
    match node:
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            inner = [name for part in parts for name in metrics_in(part)]
            words = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        case ast.Dict(keys=keys, values=values) if all(is_plain(value) for value in values):
            inner = []
            words = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
        case _:
            return []
    return inner + [word for word in words if find(word)]


def is_plain(node: ast.AST) -> bool:
    """True for a constant, and for a literal of constants."""
    return not any(isinstance(part, ast.Name | ast.Call | ast.Subscript) for part in ast.walk(node))


def test_no_other_file_of_align_holds_a_list_of_metrics():
    files = [file for file in (ROOT / "align").rglob("*.py") if file != ROOT / "align" / "metrics.py"]
    lists = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {', '.join(found)}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if len(found := metrics_in(node)) >= 3
    ]
    assert lists == []
