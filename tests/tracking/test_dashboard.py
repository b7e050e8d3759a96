"""wandb's workspace and report: what is in them, without a login and without a network.

The golden file is made by

    python -m align dashboard team/align group=study --dry-run > tests/golden/workspace.json
"""

import json
import socket
import sys

import pytest
from conftest import ROOT

from align import metrics
from align.__main__ import main
from align.say import UserError
from align.tracking.dashboard import importlib, view

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")  # theirs, when imported
GOLDEN = ROOT / "tests" / "golden" / "workspace.json"


@pytest.fixture(autouse=True)
def no_key_and_no_network(monkeypatch, tmp_path):
    def refused(*_, **__):
        raise AssertionError("the network was asked for")

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def typed(monkeypatch, capsys):
    """Type `python -m align dashboard <words>`: what it printed, or its one line of error."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["align", "dashboard", *words])
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run


def panels(made: dict) -> dict[str, list[dict]]:
    """Panels of a workspace by section."""
    sections = made["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def of_kind(some: list[dict], kind: str) -> list[dict]:
    """The configurations of those panels that are of a kind."""
    return [panel["config"] for panel in some if panel["viewType"] == kind]


def test_the_specification_is_the_golden_one(typed):
    assert json.loads(typed("team/align", "group=study", "--dry-run")) == json.loads(GOLDEN.read_text())


def test_runs_of_the_group_are_grouped_by_objective_and_the_best_is_first(typed):
    made = json.loads(typed("team/align", "group=study", "--dry-run"))
    (runs,) = made["workspace"]["spec"]["section"]["runSets"]
    assert [(one["key"]["name"], one["value"]) for one in runs["filters"]["filters"]] == [("group", "study")]
    assert runs["grouping"] == [{"section": "config", "name": "objective.value.name"}]
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "result/win_rate"}, "ascending": False}]


def test_curves_are_over_the_global_step_with_mean_and_deviation_and_all_are_comparable(typed):
    lines = of_kind(panels(json.loads(typed("team/align", "--dry-run")))["Training"], "Run History Line Plot")
    assert {line["xAxis"] for line in lines} == {"train/global_step"}
    assert {(line["groupBy"], line["groupAgg"], line["groupArea"]) for line in lines} == {
        ("objective.value.name", "mean", "stddev")
    }
    drawn = {name.partition("/")[2] for line in lines for name in line["metrics"]}
    assert {"accuracy/mean_logp", "mean_logp/chosen", "kl_start_policy"} <= drawn
    assert not drawn & {"loss", "rewards/margins", "rewards/accuracies", "grad_norm"}


def test_every_metric_that_is_drawn_is_one_that_a_run_has(typed):
    """Of a run of DPO on the built-in task, as README shows it; metrics are named nowhere else in the dashboard."""
    made = panels(json.loads(typed("team/align", "--dry-run")))
    named = {name for some in made.values() for panel in some for name in panel["config"].get("metrics", [])}
    recorded = {
        *("win_rate", "ties", "judge_score", "sample_length", "kl_policy_start", "repetition", "sample_entropy"),
        *("accuracy/mean_logp", "accuracy/log_ratio", "mean_logp/chosen", "mean_logp/rejected", "entropy"),
        *("kl_start_policy", "cost/seconds", "cost/tokens", "cost/peak_memory_gib"),
    }
    assert {name.partition("/")[2] for name in named} <= recorded


def test_beta_and_gamma_are_held_against_the_metric_that_is_chosen(typed):
    made = json.loads(typed("team/align", "metric=alpaca_eval/lc_win_rate", "--dry-run"))
    (plot,) = of_kind(panels(made)["Hyperparameters"], "Parallel Coordinates Plot")
    assert [column["accessor"] for column in plot["columns"]] == [
        "config:objective.value.beta",
        "config:objective.value.gamma_beta_ratio",
        "config:optimizer.value.learning_rate",
        "summary:alpaca_eval/lc_win_rate",
    ]
    assert of_kind(panels(made)["Results"], "Bar Chart")[0]["metrics"] == ["alpaca_eval/lc_win_rate"]


def test_where_less_is_better_the_least_is_first(typed):
    made = json.loads(typed("team/align", "metric=result/repetition", "--dry-run"))
    assert made["workspace"]["spec"]["section"]["runSets"][0]["sort"]["keys"][0]["ascending"] is True
    (plot,) = of_kind(panels(made)["Hyperparameters"], "Parallel Coordinates Plot")
    assert plot["columns"][-1]["inverted"] is True


def test_answers_and_differences_between_configurations_are_shown(typed):
    runs = panels(json.loads(typed("team/align", "--dry-run")))["Runs"]
    assert of_kind(runs, "Run Comparer") == [{"diffOnly": True}]
    (table,) = of_kind(runs, "Weave")
    assert '"samples"' in json.dumps(table)  # the name under which trackers show them


def test_the_report_has_the_panels_of_the_workspace_under_headings(typed):
    made = json.loads(typed("team/align", "name=Four methods", "--dry-run"))
    blocks = made["report"]["spec"]["blocks"]
    titles = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    grids = [block["metadata"]["panelBankSectionConfig"]["panels"] for block in blocks if block["type"] == "panel-grid"]
    assert made["report"]["displayName"] == "Four methods"
    assert titles == list(panels(made))
    for grid, some in zip(grids, panels(made).values(), strict=True):
        assert [panel["config"] for panel in grid] == [panel["config"] for panel in some]


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "align: type which project: python -m align dashboard entity/project"),
        (["--dry-run"], "align: type which project: python -m align dashboard entity/project"),
        (["align"], "align is not one entity/project"),
        (["a/b", "c/d"], "a/b c/d is not one entity/project"),
        (["a/b", "gruop=x"], "unknown option gruop (did you mean group?)"),
        (["a/b", "--dryrun"], "unknown option --dryrun (did you mean dry-run?)"),
        (["a/b", "metric=eval/accuracy/mean_logp"], "type metric=result/accuracy/mean_logp"),
        (["a/b", "metric=win_rate"], "type metric=result/win_rate"),
        (["a/b"], "no wandb key: type `wandb login`, or set WANDB_API_KEY; --dry-run does without"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_one_line(typed, words, says):
    said = typed(*words)
    assert said.startswith("align: ") and says in said and "\n" not in said


def test_without_the_package_it_says_what_to_install(typed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert typed("a/b", "--dry-run") == "align: the dashboard needs a package: pip install wandb-workspaces"


def test_with_a_key_both_are_saved_and_their_addresses_are_printed(typed, monkeypatch):
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    saved = []
    for kind, address in ((ws.Workspace, "https://wandb/w"), (wr.Report, "https://wandb/r")):
        monkeypatch.setattr(kind, "save", lambda self: saved.append(self))
        monkeypatch.setattr(kind, "url", address)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert typed("team/align", "group=study").split() == ["https://wandb/w", "https://wandb/r"]
    assert [(one.entity, one.project) for one in saved] == [("team", "align")] * 2
    runsets = [runset for block in saved[1].blocks for runset in getattr(block, "runsets", [])]
    assert {(runset.entity, runset.project) for runset in runsets} == {("team", "align")}


def test_what_wandb_refuses_is_one_line(typed, monkeypatch):
    import wandb_workspaces.workspaces as ws

    def refuse(self):
        raise RuntimeError("permission\ndenied")

    monkeypatch.setattr(ws.Workspace, "save", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert typed("team/align") == "align: wandb does not take it: permission denied"


def test_the_words_are_understood():
    assert view(["a/b", "group=x"]).name == "x: methods"
    with pytest.raises(UserError, match="unknown option"):
        view(["a/b", "-v"])
    assert metrics.find(view(["a/b"]).metric).goal == "maximize"
