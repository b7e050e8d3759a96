"""Trackers as a user has them: what a sweep leaves in wandb's files, without a key, without a network, after a failure."""

import contextlib
import importlib.machinery
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import pair_row, quick, write_jsonl
from wandb_files import read_offline

from align.__main__ import main
from align.choices import TrackerName
from align.config import RunConfig, TrackerConfig
from align.tracking import trackers

JUDGE = "def short(prompt, answer):\n    return 1 / (1 + len(answer))\n"
JUDGED = ["dataset.judge=my_judge:short", "evaluation.prompts=2", "evaluation.max_new_tokens=8"]
BAD_ONCE = """
calls = []

def short(prompt, answer):
    calls.append(answer)
    if len(calls) == 1:
        raise RuntimeError("the judge is out")
    return 1 / (1 + len(answer))
"""


def figures(folder: Path) -> list[tuple[int, dict]]:
    """Step and metrics of each line of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("step"), line) for line in lines]


def told(offline: dict) -> list[tuple[int, dict]]:
    """The same, as wandb has it."""
    made = []
    for row in offline["history"]:
        metrics = {name: value for name, value in row.items() if re.match("(train|eval)/", name)}
        step = metrics.pop("train/global_step")
        made += [(step, metrics)] if metrics else []
    return made


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_llama) -> Path:
    """The working folder of a sweep over two methods, evaluated at each of two steps, by a judge at the end."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "my_judge.py").write_text(JUDGE)
    pairs = write_jsonl(folder / "pairs.jsonl", [pair_row(i) for i in range(40)])
    words = ["-m", "objective=dpo,simpo", "tracker=wandb", "tracker.tags=[mine,dpo]", "train.eval_every_steps=1"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.chdir(folder)
        without_wandb_settings(patch, folder)
        patch.setenv("ALIGN_CACHE", str(folder / "cache"))
        patch.setattr(sys, "argv", ["align", *words, *JUDGED, *quick(tiny_llama, pairs)])
        main()
    assert said.getvalue().count("to upload later: wandb sync runs/local-local-") == 2  # there is no key
    return folder


def without_wandb_settings(patch: pytest.MonkeyPatch, home: Path) -> None:
    """As on a machine on which nobody has typed `wandb login`."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("NETRC", str(home / "none"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_a_job_of_a_sweep_is_one_run_of_wandb_and_loses_nothing(sweep, objective):
    (folder,) = (sweep / "runs").glob(f"local-local-{objective}-*")
    (offline,) = read_offline(folder)
    run = offline["run"]
    (group,) = (entry.name for entry in (sweep / "runs" / "groups").iterdir())
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("align", group, "train", folder.name)
    assert sorted(run.tags) == sorted({objective, "local", "mine", "dpo"})
    config = yaml.safe_load((folder / "config.yaml").read_text())
    kept = {name: value for name, value in offline["config"].items() if name != "_wandb"}
    assert kept == config and kept["objective"]["name"] == objective
    lines = figures(folder)
    assert [step for step, _ in lines] == [0, 1, 1, 2, 2]  # the start; train and eval at each step
    assert told(offline) == lines
    results = json.loads((folder / "results.json").read_text())
    expected = {f"result/{name}": value for name, value in results["trained"].items()}
    expected |= {f"result/cost/{name}": value for name, value in results["cost"].items()}
    assert expected.items() <= offline["summary"].items() and "result/win_rate" in expected
    assert offline["exit"] == 0


@pytest.mark.slow
def test_the_x_axis_is_the_global_step_and_the_summary_knows_what_is_better(sweep):
    (folder,) = (sweep / "runs").glob("local-local-dpo-*")
    (offline,) = read_offline(folder)
    axes = {name: metric.step_metric for name, metric in offline["metrics"].items() if name != "train/global_step"}
    assert set(axes.values()) == {"train/global_step"}
    assert axes.keys() >= {f"{place}/*" for place in ("train", "eval", "selfplay", "sentinel", "result")}
    accuracies = [values["eval/accuracy/mean_logp"] for _, values in figures(folder) if "eval/loss" in values]
    losses = [values["eval/loss"] for _, values in figures(folder) if "eval/loss" in values]
    assert len(losses) == 3
    assert offline["summary"]["eval/accuracy/mean_logp"] == {"last": accuracies[-1], "max": max(accuracies)}
    assert offline["summary"]["eval/loss"] == {"last": losses[-1], "min": min(losses)}
    assert offline["summary"]["eval/length/chosen"] > 0  # neither more nor less of it is better: the last value


@pytest.mark.slow
def test_the_first_answers_are_a_table_of_the_run(sweep):
    (folder,) = (sweep / "runs").glob("local-local-simpo-*")
    (offline,) = read_offline(folder)
    assert offline["summary"]["samples/nrows"] == 2  # evaluation.prompts
    table = json.loads((offline["folder"] / "files" / offline["summary"]["samples/path"]).read_text())
    assert table["columns"] == ["prompt", "start", "policy", "start_score", "policy_score", "win"]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for shown, row in zip(table["data"], rows, strict=True):
        start, policy = row["scores"]["start"][0], row["scores"]["policy"][0]
        win = 1.0 if policy > start else 0.5 if policy == start else 0.0
        assert shown == [row["prompt"], row["start"][0], row["policy"][0], start, policy, win]


@pytest.mark.slow
def test_a_job_that_fails_is_marked_and_is_not_mixed_into_the_next_one(align, tiny_llama, pairs_file, tmp_path):
    (tmp_path / "bad_once.py").write_text(BAD_ONCE)
    words = ["-m", "objective=dpo,simpo", "tracker.group=study", "dataset.judge=bad_once:short"]
    result = align(*words, *JUDGED[1:], *quick(tiny_llama, pairs_file), tracker="wandb")
    assert result.status == 1 and "the judge is out" in result.err
    made = {}
    for objective in ("dpo", "simpo"):
        (folder,) = (tmp_path / "runs").glob(f"local-local-{objective}-*")
        (made[objective],) = read_offline(folder)
        assert told(made[objective]) == figures(folder)
        assert made[objective]["config"]["objective"]["name"] == objective
    assert (made["dpo"]["exit"], made["simpo"]["exit"]) == (1, 0)
    assert "result/win_rate" in made["simpo"]["summary"]
    assert {run["run"].run_group for run in made.values()} == {"study"}
    assert made["dpo"]["run"].run_id != made["simpo"]["run"].run_id


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_the_same_run_and_takes_results_later(
    align, monkeypatch, tiny_llama, pairs_file, run_dir
):
    words = quick(tiny_llama, pairs_file, f"run_dir={run_dir}", "optimizer.max_steps=4")
    log = trackers.WandbTracker.log

    def stop_at_one(self, step, metrics):
        log(self, step, metrics)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trackers.WandbTracker, "log", stop_at_one)
        stopped = align(*words, tracker="wandb")
    assert "stopping at the end of this step" in stopped.err and not (run_dir / "results.json").exists()
    assert align(*words, tracker="wandb").status == 0
    before, after = read_offline(run_dir)
    assert before["run"].run_id == after["run"].run_id
    assert told(before) + told(after) == figures(run_dir)
    assert 1 <= told(before)[-1][0] < told(after)[0][0] <= 4
    assert (before["exit"], after["exit"]) == (0, 0)

    trackers.add_results(run_dir, settings(TrackerName.wandb), {"alpaca_eval/lc_win_rate": 0.625, "lm_eval/gsm8k": 0.5})
    *_, later = read_offline(run_dir)
    assert (later["run"].run_id, later["run"].run_group) == (after["run"].run_id, after["run"].run_group)
    assert later["summary"]["alpaca_eval/lc_win_rate"] == 0.625 and later["summary"]["lm_eval/gsm8k"] == 0.5
    assert later["history"] == [] and later["exit"] == 0


def settings(tracker: TrackerName) -> RunConfig:
    """As a run's config.yaml has them, as far as a tracker reads them."""
    cfg = RunConfig(objective={"name": "dpo"}, tracker=TrackerConfig(name=tracker), cache_dir="")
    cfg.model.name = cfg.dataset.name = "local"
    return cfg


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


# Without a key, without a network ------------------------------------------------------------------------------------


@pytest.fixture(params=["refuses", "is silent"])
def server(request) -> Iterator[str]:
    """The address of a server that cannot be reached, or takes a connection and then says nothing."""
    if request.param == "refuses":
        yield "http://127.0.0.1:9"
        return
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)  # the kernel takes the connections, and nobody reads
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.slow
def test_with_a_key_and_no_network_a_run_starts_within_30_seconds_and_loses_nothing(
    align, monkeypatch, tiny_llama, pairs_file, run_dir, tmp_path, server
):
    key = "0123456789abcdef" * 2 + "01234567"
    without_wandb_settings(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    result = align(*quick(tiny_llama, pairs_file, f"run_dir={run_dir}"), tracker="wandb")
    assert result.status == 0, result.err
    opened, measured = ((run_dir / name).stat().st_mtime for name in ("identity.json", "start.json"))
    assert measured - opened < 30  # seconds, in which the tracker starts and the start model is measured
    assert "wandb cannot go online" in result.err and key not in result.err + result.out
    assert f"to upload later: wandb sync {run_dir}/wandb/offline-run-*" in result.err
    (offline,) = read_offline(run_dir)
    assert told(offline) == figures(run_dir) and len(figures(run_dir)) == 4
    assert offline["exit"] == 0 and offline["run"].run_id == (run_dir / "wandb" / "run_id").read_text()
    ids = {file.stem for file in run_dir.glob("wandb/*run-*/run-*.wandb")}
    assert ids == {f"run-{offline['run'].run_id}"}  # it stays the run that it was while it tried to go online


@pytest.mark.parametrize(
    "word, says",
    [
        ("tracker.project=a/b", "tracker.project=a/b: wandb takes up to 128 characters, none of them"),
        (f"tracker.tags=[{'x' * 65}]", "tracker.tags: wandb takes tags of 1 to 64 characters"),
    ],
    ids=["project", "tag"],
)
def test_words_that_wandb_would_refuse_are_refused_at_once(refusal, tiny_llama, pairs_file, word, says):
    assert says in refusal(*quick(tiny_llama, pairs_file, word, "tracker=wandb"))


# Other trackers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_has_every_figure(align, tiny_llama, pairs_file, run_dir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert align(*quick(tiny_llama, pairs_file, f"run_dir={run_dir}"), tracker="tensorboard").status == 0
    made = accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    losses = {point.step: point.value for point in made.Scalars("train/loss")}
    assert losses == pytest.approx({step: values["train/loss"] for step, values in figures(run_dir)[1:3]})
    results = json.loads((run_dir / "results.json").read_text())["trained"]
    (last,) = made.Scalars("result/accuracy/mean_logp")
    assert (last.step, last.value) == (2, pytest.approx(results["accuracy/mean_logp"]))


@pytest.mark.slow
def test_a_run_of_trackio_goes_on_in_its_folder_only(align, monkeypatch, tiny_llama, pairs_file, run_dir):
    """A folder of the same name elsewhere, or made anew, may hold another method."""
    asked, said = [], []

    def init(**words):
        asked.append(words)
        return types.SimpleNamespace(id=f"id-{len(asked)}")

    fake = types.ModuleType("trackio")
    fake.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    fake.init, fake.finish = init, lambda: None
    fake.log = lambda metrics, step=None: said.append((step, metrics))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    words = quick(tiny_llama, pairs_file, f"run_dir={run_dir}", "tracker.group=study", "objective.beta=0.3")
    assert align(*words, tracker="trackio").status == 0
    assert said[:-1] == figures(run_dir)
    assert said[-1][0] == 2 and said[-1][1].keys() >= {"result/accuracy/mean_logp", "result/cost/seconds"}
    trackers.add_results(run_dir, settings(TrackerName.trackio), {"judge/win_rate": 0.75})
    assert said[-1] == (None, {"judge/win_rate": 0.75})
    shutil.rmtree(run_dir)
    assert align(*words, tracker="trackio").status == 0
    assert [of_one["resume"] for of_one in asked] == ["never", "allow", "never"]
    assert (asked[1]["name"], asked[1]["group"]) == ("run", "local-local")  # no group of its own in these settings
    assert {(of_one["name"], of_one["group"], of_one["project"]) for of_one in asked[::2]} == {
        ("run", "study", "align")
    }
    assert asked[0]["config"]["objective.beta"] == 0.3  # by dotted names: its dashboard groups by plain values only


@pytest.mark.parametrize("tracker", [TrackerName.none, TrackerName.tensorboard])
def test_results_that_no_tracker_takes_fail_nothing(monkeypatch, capsys, tmp_path, tracker):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(trackers.TensorboardTracker, "__init__", full)
    trackers.add_results(tmp_path, settings(tracker), {"judge/win_rate": 0.75})
    said = f"align: tensorboard failed (no space left on device); the results are in {tmp_path}\n"
    assert capsys.readouterr().err == ("" if tracker is TrackerName.none else said)


@pytest.mark.slow
def test_a_tracker_that_fails_is_said_once_and_costs_nothing(align, monkeypatch, tiny_llama, pairs_file, run_dir):
    pytest.importorskip("tensorboard")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(trackers.TensorboardTracker, "log", full)
    result = align(*quick(tiny_llama, pairs_file, f"run_dir={run_dir}"), tracker="tensorboard")
    assert result.status == 0 and result.err.count("tensorboard failed (no space left on device)") == 1
    assert len(figures(run_dir)) == 4
