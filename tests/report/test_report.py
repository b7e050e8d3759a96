"""The report over several runs: what is read, what counts as a method, what the three files say, and the page in a browser."""

import csv
import io
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
import yaml
from conftest import quick
from filelock import FileLock

from align import metrics
from align.__main__ import main
from align.report.methods import shares
from align.report.page import markdown, page, report
from align.report.read import State, read_runs
from align.report.study import Study, study
from align.report.text import figure, results_csv

SETTINGS = {
    "model": {"name": "tiny"},
    "dataset": {"name": "playground"},
    "optimizer": {"learning_rate": 3e-4, "max_steps": 4},
    "evaluation": {"prompts": 12, "samples_per_prompt": 2},
}
PROMPTS = [f"please list {i} cities" for i in range(12)]


def write_run(folder: Path, objective="dpo", seed=1, better=0.0, state="complete", prompts=PROMPTS, **more) -> Path:
    """A run folder as align writes it. `better` is by how much the policy's scores are above the start model's."""
    hyper = {"dpo": {"beta": 0.1}, "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5}, "wpo": {"beta": 0.1}}[objective]
    hyper |= more.pop("hyper", {})
    settings = {**SETTINGS, "objective": {"name": objective, **hyper}, "seed": seed, **more}
    folder.mkdir(parents=True)
    typed = {"cache_dir": f"/cache/{seed}", "command": f"python -m align objective={objective} seed={seed}"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, **typed}))
    fingerprints = {
        "start": "5b6d",
        "pairs": "0ffb",
        "device": "cpu",
        "bf16": False,
        "objective_code": {"X": objective},
    }
    (folder / "identity.json").write_text(json.dumps({**settings, **fingerprints}))
    (folder / "plan.txt").write_text("objective   X\nsteps       4 of 32 pairs\n")
    (folder / "model").mkdir()
    (folder / "model" / "README.md").write_text("# tiny\n\n- Made with align 0.1.0, torch 2.13.0\n")
    rows = []
    for step in range(5 if state == "complete" else 3):
        if step:
            rows.append({"step": step, "train/loss": 0.7 - step / 10, "train/accuracy/mean_logp": 0.7 + step / 20})
        if step % 2 == 0:
            rows.append({"step": step, "eval/accuracy/mean_logp": 0.7 + step / 20 + seed / 100, "eval/entropy": 1.4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state == "collapsed":
        (folder / "collapsed.json").write_text(json.dumps({"step": 2, "why": "answers repeat\nthemselves"}))
    if state == "failed":
        (folder / "logs").mkdir()
        (folder / "logs" / "0.traceback").write_text("Traceback:\n  here\nRuntimeError: the loss is not finite\n")
    if state != "complete":
        return folder
    ranked = [float(Random(f"{objective} {seed} {hyper} {pair}").random() < 0.7 + better / 2) for pair in range(30)]
    (folder / "held_out.jsonl").write_text(
        "".join(
            json.dumps({"pair": str(pair), "accuracy/mean_logp": right, "accuracy/log_ratio": 0.5}) + "\n"
            for pair, right in enumerate(ranked)
        )
    )
    samples = []
    for prompt in prompts:
        luck = Random(f"{objective} {seed} {hyper} {prompt}")
        hard = 0.5 * Random(prompt).random()
        start, policy = (
            [round(min(1.0, hard + 0.5 * luck.random() + of), 2) for _ in range(2)] for of in (0.0, better)
        )
        texts = {"start": [f"oslo {k}" for k in range(2)], "policy": [f"rome {objective} {seed} {k}" for k in range(2)]}
        samples.append({"prompt": prompt, **texts, "scores": {"start": start, "policy": policy}})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    rate = fmean((a > b) + 0.5 * (a == b) for s in samples for a in s["scores"]["policy"] for b in s["scores"]["start"])
    start = {"win_rate": 0.5, "sample_length": 8.0, "kl_policy_start": 0.0, "accuracy/mean_logp": 0.7, "loss": 0.7}
    trained = {
        "win_rate": rate,
        "ties": fmean(a == b for s in samples for a in s["scores"]["policy"] for b in s["scores"]["start"]),
        "sample_length": 9.0 + seed / 10,
        "kl_policy_start": 1.0 + seed / 10,
        "repetition": 0.02,
        "sample_entropy": 1.1,
        "accuracy/mean_logp": fmean(ranked),
        "loss": 0.3,
    }
    cost = {"seconds": 90.0 + seed, "tokens": 1_234_567, "peak_memory_gib": 0.84, "processes": 2}
    (folder / "results.json").write_text(json.dumps({"start": start, "trained": trained, "cost": cost}))
    return folder


def without_judge(run: Path) -> Path:
    """The run as it is where nobody judges answers."""
    (run / "samples.jsonl").unlink()
    results = json.loads((run / "results.json").read_text())
    of_pairs = {
        side: {name: value for name, value in of.items() if name in ("accuracy/mean_logp", "loss")}
        for side, of in results.items()
        if side != "cost"
    }
    (run / "results.json").write_text(json.dumps({**of_pairs, "cost": results["cost"]}))
    return run


def write_suite(run: Path, name: str, note: str, **results: float) -> None:
    """What `align evaluate` leaves in a run folder."""
    folder = run / "evaluation" / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({f"{name}/{key}": value for key, value in results.items()}))
    (folder / "settings.json").write_text(json.dumps({"made_of": {}, "note": note}))


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    """Three objectives with three seeds each; one failed, one was stopped."""
    runs = tmp_path / "runs"
    for objective, better in (("dpo", 0.0), ("simpo", 0.02), ("wpo", 0.6)):
        for seed in (1, 2, 3):
            write_run(runs / f"{objective}-{seed}", objective, seed, better)
    write_run(runs / "dpo-4", seed=4, state="failed")
    write_run(runs / "dpo-5", seed=5, state="incomplete")
    return runs


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def said_of(*folders: Path) -> str:
    """report.md, without the time that figures take."""
    return markdown(study_of(*folders), "Made now.")


def study_of(*folders: Path) -> Study:
    return study(read_runs(folders))


# Reading --------------------------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_depth_and_iterations_of_self_play_are_none(tmp_path):
    write_run(tmp_path / "a" / "b" / "deep")
    play = write_run(tmp_path / "play")
    write_run(play / "iter_1")
    write_run(tmp_path / "top" / "checkpoints" / "not-a-run")
    assert {run.dir.name for run in read_runs([tmp_path])} == {"deep", "play"}


def test_links_are_followed_and_circles_end(tmp_path):
    write_run(tmp_path / "elsewhere" / "one")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "runs")
    assert [run.dir.name for run in read_runs([tmp_path / "runs"])] == ["one"]


def test_a_folder_that_is_given_twice_is_read_once(tmp_path):
    run = write_run(tmp_path / "runs" / "one")
    assert len(read_runs([tmp_path, tmp_path / "runs", run])) == 1


def test_states_are_told_with_the_reason(study_folder):
    lock = FileLock(write_run(study_folder / "dpo-6", seed=6, state="incomplete") / ".lock")
    with lock:
        runs = {run.name: run for run in read_runs([study_folder])}
    assert runs["dpo-1"].state is State.complete
    assert (runs["dpo-4"].state, runs["dpo-4"].note) == (
        State.failed,
        "at step 2 of 4: RuntimeError: the loss is not finite (0.traceback)",
    )
    assert (runs["dpo-5"].state, runs["dpo-5"].note) == (
        State.incomplete,
        "stopped at step 2 of 4; the same command goes on",
    )
    assert (runs["dpo-6"].state, runs["dpo-6"].note) == (State.running, "at step 2 of 4")


def test_a_run_that_the_sentinel_ended_is_listed_with_its_reason(study_folder):
    write_run(study_folder / "wpo-4", "wpo", seed=4, state="collapsed")
    study = study_of(study_folder)
    (run,) = (run for run in study.runs if run.state is State.collapsed)
    assert (run.name, run.note) == ("wpo-4", "at step 2: answers repeat themselves")
    said = markdown(study, "")
    assert "1 failed; 1 collapsed; 1 incomplete" in said
    assert "| wpo, seed 4 | wpo-4 | collapsed | at step 2: answers repeat themselves |" in said
    assert [len(method.runs) for method in study.methods] == [3, 3, 3]


def test_a_run_that_failed_before_anything_was_written_is_listed(tmp_path):
    (tmp_path / "runs" / "early" / "logs").mkdir(parents=True)
    (tmp_path / "runs" / "early" / "logs" / "1.traceback").write_text("ImportError: no module\n")
    (run,) = read_runs([tmp_path / "runs"])
    assert (run.state, run.note) == (State.failed, "before the first step: ImportError: no module (1.traceback)")


def write_failed(folder: Path, **jobs: str) -> None:
    """What a sweep leaves of jobs that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    said = [{"job": f"objective={objective} seed=1", "why": why} for objective, why in jobs.items()]
    (folder / "failed.json").write_text(json.dumps(said))


def test_jobs_that_failed_without_a_folder_are_listed_and_those_that_ran_after_all_are_not(study_folder):
    write_failed(study_folder / "groups" / "friday", dpo="no such file", kto="no labels\nhere")
    write_failed(study_folder / "groups" / "monday", kto="the same again")
    without = said_of(study_folder / "wpo-1", study_folder / "simpo-1")
    study = study_of(study_folder)
    (job,) = (run for run in study.runs if not run.has_settings)
    assert (job.name, job.state, job.note) == ("objective=kto seed=1", State.failed, "no labels here")
    assert [method.label for method in study.methods] == ["wpo", "simpo", "dpo"]
    assert study.varied == study_of(*study_folder.glob("*-?")).varied and "groups" not in without
    said = markdown(study, "")
    assert "9 complete runs of 3 methods, 3 seeds each; 2 failed; 1 incomplete" in said
    assert "| objective=kto seed=1 |  | failed | no labels here |" in said
    assert "kto" not in said.split("## Provenance")[1]
    assert page(study, "").count("objective=kto seed=1") == 1
    assert {row["state"] for row in csv.DictReader(io.StringIO(results_csv(study))) if "kto" in row["run"]} == {
        "failed"
    }


def test_where_all_jobs_failed_the_report_says_why(tmp_path):
    write_failed(tmp_path / "friday", kto="no labels")
    html = report([str(tmp_path / "friday")]).read_text()
    assert "0 complete runs; 1 failed" in html and "<b>objective=kto seed=1</b>: failed, no labels" in html
    assert "| objective=kto seed=1 |  | failed | no labels |" in (tmp_path / "friday" / "report.md").read_text()


def test_a_damaged_list_of_failed_jobs_does_not_stop_the_report(study_folder):
    (study_folder / "failed.json").write_text('[{"job": "obj')
    assert len(study_of(study_folder).runs) == 11


@pytest.mark.parametrize("damage", ["results.json", "metrics.jsonl", "samples.jsonl", "config.yaml", "identity.json"])
def test_a_damaged_file_does_not_stop_the_report(study_folder, damage):
    whole = (study_folder / "wpo-1" / damage).read_text()
    (study_folder / "wpo-1" / damage).write_text(whole[: len(whole) // 2])
    study = study_of(study_folder)
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(results_csv(study)))}
    assert page(study, "") and len(rows) == 11
    assert rows["wpo-1"]["state"] == ("incomplete" if damage == "results.json" else "complete")


def test_wins_ties_and_win_rate_are_those_of_the_samples(tmp_path):
    run = write_run(tmp_path / "one", better=0.3)
    (read,) = read_runs([run])
    scores = [json.loads(line)["scores"] for line in (run / "samples.jsonl").read_text().splitlines()]
    pairs = [(a, b) for of in scores for a in of["policy"] for b in of["start"]]
    wins, ties, losses = (fmean(won) for won in zip(*((a > b, a == b, a < b) for a, b in pairs), strict=True))
    assert shares([read]) == pytest.approx((wins, ties, losses))
    assert fmean(answers.win_rate for answers in read.answers) == pytest.approx(read.trained["win_rate"])


def write_selfplay(folder: Path) -> Path:
    """A run of two iterations: answers and held-out pairs at its top are those of the last policy."""
    write_run(folder)
    for number in (1, 2):
        (folder / f"iter_{number}").mkdir()
        (folder / f"iter_{number}" / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": s, "eval/entropy": 1.0 + number + s / 10}) + "\n" for s in (0, 4))
        )
    results = json.loads((folder / "results.json").read_text())
    iterations = [{"iteration": n, "steps": 4, "win_rate": 0.5 + n / 10} for n in (1, 2)]
    (folder / "results.json").write_text(json.dumps({**results, "iterations": iterations}))
    return folder


def test_self_play_is_read_as_one_run_with_the_curves_of_its_iterations_in_a_row(tmp_path):
    (run,) = read_runs([write_selfplay(tmp_path / "play")])
    assert [answers.prompt for answers in run.answers] == PROMPTS
    assert run.steps == 8
    assert run.curves == {"eval/entropy": [(0, 2.0), (4, 2.4), (8, 3.4)]}
    assert study_of(tmp_path).methods[0].label == "dpo self-play"
    assert "win rate against the start model" in page(study_of(tmp_path), "").split("<h2>Iterations")[1]


# Methods and comparisons ----------------------------------------------------------------------------------------------


def test_runs_that_differ_by_their_seeds_are_one_method(study_folder):
    study = study_of(study_folder)
    assert [(method.label, len(method.runs)) for method in study.methods] == [("wpo", 3), ("simpo", 3), ("dpo", 3)]


def test_a_label_says_what_varies_and_no_more(tmp_path):
    for i, (beta, rate) in enumerate([(1.0, 1e-4), (2.0, 1e-4), (2.0, 3e-4)]):
        optimizer = {"learning_rate": rate, "max_steps": 4}
        write_run(tmp_path / str(i), "simpo", hyper={"beta": beta}, optimizer=optimizer)
    write_run(tmp_path / "dpo", "dpo")
    assert {method.label for method in study_of(tmp_path).methods} == {
        "dpo",
        "simpo beta=1 learning_rate=0.0001",
        "simpo beta=2 learning_rate=0.0001",
        "simpo beta=2 learning_rate=0.0003",
    }


def test_what_an_objective_wraps_is_named(tmp_path):
    for base in ("dpo", "simpo"):
        write_run(tmp_path / base, "wpo", hyper={"base": {"name": base}})
    assert {method.label for method in study_of(tmp_path).methods} == {"wpo base=dpo", "wpo base=simpo"}


def test_models_that_differ_are_named_also_where_objectives_do(tmp_path):
    write_run(tmp_path / "a", "dpo")
    write_run(tmp_path / "b", "wpo", model={"name": "other"})
    assert {method.label for method in study_of(tmp_path).methods} == {"dpo model=tiny", "wpo model=other"}


def test_two_and_two_point_zero_are_the_same_number(tmp_path):
    write_run(tmp_path / "a", "dpo", hyper={"beta": 2})
    write_run(tmp_path / "b", "dpo", seed=2, hyper={"beta": 2.0})
    assert [len(method.runs) for method in study_of(tmp_path).methods] == [2]


def test_the_same_run_in_two_folders_counts_once(tmp_path):
    shutil.copytree(write_run(tmp_path / "a"), tmp_path / "b")
    study = study_of(tmp_path)
    assert [len(method.runs) for method in study.methods] == [1]
    assert [(twin.name, kept.name) for twin, kept in study.twins] == [("b", "a")]


def test_a_large_difference_is_called_significant_and_a_small_one_is_not(study_folder):
    study = study_of(study_folder)
    wpo, simpo, dpo = study.methods
    against = study.main.between(wpo, dpo)
    assert against.result.significant and "wpo is above dpo: significant" in against.sentence
    assert "dpo is below wpo: significant" in study.main.between(dpo, wpo).sentence
    assert study.main.between(dpo, wpo).result.low == -against.result.high
    assert "simpo and dpo: not significant" in study.main.between(simpo, dpo).sentence


def test_one_seed_is_compared_by_prompts(tmp_path):
    write_run(tmp_path / "a", "dpo")
    write_run(tmp_path / "b", "wpo", better=0.6)
    (made,) = study_of(tmp_path).main.pairs
    assert (made.result.over, made.result.prompts) == ("prompts", 12)


def test_methods_that_answered_other_prompts_are_compared_by_those_they_share(tmp_path):
    write_run(tmp_path / "a", "dpo")
    write_run(tmp_path / "b", "wpo", prompts=[*PROMPTS[4:], "another"])
    write_run(tmp_path / "c", "simpo", prompts=["x", "y", "z"])
    assert [made.result.prompts for made in study_of(tmp_path).main.pairs] == [8]


def test_another_judge_is_another_measure_and_is_said(tmp_path):
    write_run(tmp_path / "a", "dpo", scorer={"name": "reward_model", "path": "armo"})
    write_run(tmp_path / "b", "wpo", dataset={"name": "playground", "judge": "my:judge"})
    assert "Not the same for all methods: judge (reward_model, armo for " in said_of(tmp_path)


def test_what_is_not_the_same_for_all_is_said(tmp_path):
    write_run(tmp_path / "a", "dpo")
    write_run(tmp_path / "b", "wpo", evaluation={"prompts": 20, "samples_per_prompt": 2})
    told = "Not the same for all methods: evaluation (prompts=12, samples_per_prompt=2 for dpo; prompts=20"
    assert told in said_of(tmp_path)
    the_same = "start model, training pairs, steps, learning rate, judge, seeds and precision"
    assert f"The same for all methods: {the_same}." in said_of(tmp_path)


def at_rate(rate: float) -> dict[str, float]:
    return {"learning_rate": rate, "max_steps": 4}


def test_learning_rates_that_differ_between_objectives_are_said(tmp_path):
    write_run(tmp_path / "a", "dpo", optimizer=at_rate(3e-4))
    write_run(tmp_path / "b", "simpo", optimizer=at_rate(1.3e-4))
    said = said_of(tmp_path)
    assert "Not the same for all methods: learning rate (0.00013 for simpo; 0.0003 for dpo)." in said
    assert "The same for all methods: start model, training pairs, steps, evaluation, judge, seeds and prec" in said


def test_learning_rates_over_which_every_objective_was_swept_are_in_the_names_only(tmp_path):
    for objective in ("dpo", "simpo"):
        for rate in (1e-4, 3e-4):
            write_run(tmp_path / f"{objective}-{rate}", objective, optimizer=at_rate(rate))
    assert " learning rate" not in said_of(tmp_path)
    assert "simpo learning_rate=0.0001" in said_of(tmp_path)


def test_the_p_of_several_comparisons_is_told_as_corrected_beside_an_interval_that_is_not(study_folder):
    one = study_of(study_folder).main.pairs[0]
    assert one.result.p_adjusted >= one.result.p_value and re.search(r"95%: .* to .*; p after Holm\s", one.sentence)
    (alone,) = study_of(study_folder / "dpo-1", study_folder / "wpo-1").main.pairs
    assert re.search(r"95%: .* to .*; p\s", alone.sentence)


def test_hollow_is_explained_only_where_a_method_is_not_significantly_below_the_highest(study_folder):
    assert "Hollow:" not in page(study_of(study_folder), "")  # wpo is above both
    assert "Hollow:" in page(study_of(study_folder / "dpo-1", study_folder / "simpo-1"), "")


def test_two_methods_are_what_settings_compares_first(study_folder):
    html = page(study_of(study_folder), "")
    chosen = re.findall(r'<select id="run-[ab]">.*?selected>(.*?)</option>', html)
    assert chosen == ["wpo, seed 1 (wpo-1)", "simpo, seed 1 (simpo-1)"]


# Files ----------------------------------------------------------------------------------------------------------------


def test_results_csv_has_a_row_for_each_run_with_its_results_unrounded(study_folder):
    report([str(study_folder)])
    rows = {row["run"]: row for row in rows_of(study_folder / "results.csv")}
    assert len(rows) == 11
    for name, row in rows.items():
        file = study_folder / name / "results.json"
        if file.exists():
            results = json.loads(file.read_text())
            assert {k: float(row[k]) for k in results["trained"]} == results["trained"]
            assert float(row["start/sample_length"]) == 8.0
            wins, ties, losses = (float(row[f"{name}_share"]) for name in ("win", "tie", "loss"))
            assert wins + ties + losses == pytest.approx(1)
            assert wins + ties / 2 == pytest.approx(float(row["win_rate"]))
            assert ties == pytest.approx(results["trained"]["ties"])
    assert {rows[name]["state"] for name in ("dpo-4", "dpo-5")} == {"failed", "incomplete"}
    assert rows["dpo-4"]["win_rate"] == ""
    heads = (study_folder / "results.csv").read_text().splitlines()[0].split(",")
    assert len(heads) == len({*heads})


def test_the_means_in_report_md_are_those_of_results_csv(study_folder):
    rows = csv.DictReader(io.StringIO(results_csv(study_of(study_folder))))
    rates = [float(row["win_rate"]) for row in rows if row["method"] == "simpo"]
    line = next(line for line in said_of(study_folder).splitlines() if line.startswith("| simpo |"))
    assert line.split("|")[3].strip().startswith(f"{fmean(rates):.3f} (")


def test_the_page_asks_nobody_for_anything_and_its_tags_and_ids_are_in_order(study_folder):
    html = report([str(study_folder)]).read_text()
    assert not re.findall(r"""(?:src|href|action)=["'](?!#|data:)""", html.replace("xlink:href", "href"))
    assert "http" not in re.sub(r"http-equiv|https?://www\.w3\.org\S*", "", html)

    open_tags: list[str] = []
    ids: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            ids.extend(value for name, value in attrs if name == "id" and tag not in ("path", "clippath"))
            if tag not in ("meta", "link", "br", "path", "use", "rect"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("path", "use", "rect"):
                assert open_tags.pop() == tag

    Checker().feed(html)
    assert open_tags == []
    assert len(ids) == len(set(ids))


def test_text_of_a_run_cannot_become_markup(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    write_run(tmp_path / "a", "dpo", prompts=[evil, "b", "c"], dataset={"name": evil})
    write_run(tmp_path / "b", "wpo", prompts=[evil, "b", "c"], dataset={"name": evil})
    html = report([str(tmp_path)]).read_text()
    assert "<img" not in html and "alert(1)</script>" not in html


def test_two_numbers_that_vary_make_heat_maps_and_one_makes_lines(tmp_path):
    for beta in (1.0, 2.0):
        for ratio in (0.3, 0.5):
            write_run(tmp_path / "grid" / f"{beta}{ratio}", "simpo", hyper={"beta": beta, "gamma_beta_ratio": ratio})
    for beta in (0.01, 0.1, 1.0):
        write_run(tmp_path / "line" / str(beta), "dpo", hyper={"beta": beta})
    study = study_of(tmp_path)
    line, grid = sorted(study.sweeps, key=lambda sweep: sweep.title)
    assert (grid.title, grid.x, grid.y) == ("simpo", "objective.beta", "objective.gamma_beta_ratio")
    assert (line.title, line.x, line.y) == ("dpo", "objective.beta", None)
    html = page(study, "")
    assert "gamma_beta_ratio</text>" in html and html.count("<figcaption>simpo: win rate</figcaption>") == 1
    assert html.index("dpo: win rate") < html.index("<details")  # the others of both are behind a click
    assert html.index("<details") < html.index("simpo: length")


def test_names_may_hold_any_letter(tmp_path):
    write_run(tmp_path / "a", "dpo", model={"name": "$a_{b$ 模型"})
    write_run(tmp_path / "b", "dpo", model={"name": "tiny"})
    assert "model=$a_{b$ 模型</text>" in report([str(tmp_path)]).read_text()


def test_where_nothing_is_complete_the_report_still_lists_the_runs(tmp_path):
    write_run(tmp_path / "a", state="failed")
    html = report([str(tmp_path)]).read_text()
    assert "the loss is not finite" in html and "No run is complete" in html


def test_without_a_judge_methods_are_compared_by_held_out_pairs_and_it_is_said(tmp_path):
    for name, objective, better in (("a", "dpo", -1.4), ("b", "wpo", 0.6)):  # all pairs wrong, all right
        without_judge(write_run(tmp_path / name, objective, better=better))
    study = study_of(tmp_path)
    (one,) = study.main.pairs
    assert (one.result.mean, one.result.prompts, one.result.over) == (1.0, 30, "prompts")
    assert [method.label for method in study.methods] == ["wpo", "dpo"] and study.beside is None
    said = said_of(tmp_path)
    assert "No judge: there are no win rates, and accuracy on held-out pairs is not quality." in said
    assert "## Differences of accuracy by mean_logp" in said and "wpo is above dpo: significant, +1.000" in said
    assert "at the same 30 held-out pairs, paired; 95% intervals over held-out pairs" in said
    assert page(study, "")


def test_beside_win_rates_accuracies_are_compared_too(study_folder):
    study = study_of(study_folder)
    assert (study.main.quantity, study.beside.quantity) == ("win rate", "accuracy by mean_logp")
    assert {one.result.prompts for one in study.main.pairs} == {12}
    assert {one.result.prompts for one in study.beside.pairs} == {30}


def test_pairs_of_other_data_are_not_taken_for_the_same(tmp_path):
    for name, objective in (("a", "dpo"), ("b", "wpo")):
        run = without_judge(write_run(tmp_path / name, objective))
        identity = json.loads((run / "identity.json").read_text())
        (run / "identity.json").write_text(json.dumps({**identity, "pairs": name}))
    assert study_of(tmp_path).main.pairs == []
    assert "cannot be told: they have no held-out pairs in common" in said_of(tmp_path)


def test_a_judge_that_only_compares_leaves_chances_and_the_report_reads_them(tmp_path):
    run = write_run(tmp_path / "a")
    chances = [[0.9, 0.5], [0.3, 0.5]]  # wins 0.9 + 0.3 + half of two ties: 2.2 of 4
    row = {"prompt": "p", "start": ["a", "b"], "policy": ["c", "d"], "chances": chances}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (answers,) = read_runs([run])[0].answers
    assert (answers.win_rate, answers.ties, answers.scores["policy"]) == (pytest.approx(0.55), 0.5, [])


def test_cost_ties_repetition_and_entropy_stand_beside_the_win_rate(study_folder):
    heads, *_ = [line for line in said_of(study_folder).splitlines() if line.startswith("| ")]
    names = [name.strip().replace("\xa0", " ") for name in heads.split("|")[1:-1]]
    assert names[:5] == ["method", "seeds", "win rate", "win / tie / loss, %", "LC win rate"]
    assert names[5:] == ["length", "KL", "repetition", "entropy"]
    cost = next(line for line in said_of(study_folder).splitlines() if "peak memory |" in line)
    assert cost.endswith("| time | tokens | peak memory |")
    assert "| 92.0\xa0s | 1.2M | 0.84\xa0GiB |" in said_of(study_folder)  # seconds 91, 92 and 93


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("cost/seconds", 8.21, "8.2 s"),
        ("cost/seconds", 750.0, "12.5 min"),
        ("cost/seconds", 9000.0, "2.5 h"),
        ("cost/tokens", 8123, "8,123"),
        ("cost/tokens", 812_300, "812.3k"),
        ("cost/tokens", 1_234_567_000, "1,234.6M"),
        ("cost/peak_memory_gib", 71.26, "71.3 GiB"),
        ("alpaca_eval/lc_win_rate", 0.72354, "72.4"),
        ("alpaca_eval/length", 1833.2, "1833"),
        ("win_rate", 0.65625, "0.656"),
        ("win_rate", math.nan, "–"),
    ],
)
def test_figures_are_written_in_units_that_are_read_at_once(name, value, shown):
    assert figure(metrics.row(name), value).replace("\xa0", " ") == shown


def test_benchmarks_are_printed_as_the_papers_do_and_what_else_a_suite_says_in_a_table_of_its_own(study_folder):
    # SimPO's and DPO's Gemma-2-9B rows of the papers: 72.4 / 65.9 / 1833 / 59.1, 67.8 / 65.4 / 2016 / 58.9
    for name, *row in (("simpo-1", 0.724, 0.659, 1833, 0.591), ("dpo-1", 0.678, 0.654, 2016, 0.589)):
        lc, rate, length, arena = row
        of_alpaca = {"lc_win_rate": lc, "win_rate": rate, "length": length, "standard_error": 0.014}
        write_suite(study_folder / name, "alpaca_eval", "805 instructions", **of_alpaca)
        write_suite(study_folder / name, "arena_hard", "500 questions", win_rate=arena)
        write_suite(study_folder / name, "my_pairs", "pairs of mine", **{"accuracy/mean_logp": 0.875})
    write_suite(study_folder / "simpo-2", "lm_eval", "tasks", gsm8k=0.8125, arc=0.5, **{"start/gsm8k": 0.75})
    said = said_of(study_folder)
    benchmarks, others = said.split("## Benchmarks")[1].split("## Suite lm_eval")
    assert "| method | seeds | AE2 LC | AE2 WR | AE2 length | Arena-Hard | GSM8K |" in benchmarks
    assert "| simpo | 1 of 3 | 72.4 | 65.9 (± 1.4 s.e.) | 1833 | 59.1 | 81.2 |" in benchmarks
    assert "| dpo | 1 of 3 | 67.8 | 65.4 (± 1.4 s.e.) | 2016 | 58.9 | – |" in benchmarks and "| wpo |" not in benchmarks
    assert "| start model |  | – | – | – | – | 75.0 |" in benchmarks
    assert "alpaca_eval: 805 instructions." in benchmarks
    of_tasks, of_pairs = others.split("## Suite my_pairs")
    assert "| method | seeds | arc |" in of_tasks and "| simpo | 1 of 3 | 0.500 |" in of_tasks
    assert "| method | seeds | accuracy/mean_logp |" in of_pairs and "my_pairs: pairs of mine." in of_pairs
    assert "| dpo | 1 of 3 | 0.875 |" in of_pairs
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(results_csv(study_of(study_folder))))}
    assert (rows["simpo-1"]["alpaca_eval/lc_win_rate"], rows["simpo-2"]["lm_eval/arc"]) == ("0.724", "0.5")
    assert rows["simpo-1"]["cost/seconds"] == "91.0" and rows["simpo-1"]["lm_eval/arc"] == ""


def test_intervals_of_a_suite_are_over_seeds_only_and_equal_seeds_have_none(study_folder):
    for seed, rate in ((1, 0.5), (2, 0.6), (3, 0.7)):  # 0.6 +- 4.303 * 0.1 / sqrt(3)
        write_suite(study_folder / f"wpo-{seed}", "judge", "mine", win_rate=rate, games=159, length=80.0 + seed)
    said = said_of(study_folder).split("## Suite judge")[1]
    assert "| method | seeds | games | length, characters | win_rate |" in said
    assert "| wpo | 3 of 3 | 159 | 82 (79.5 to 84.5) | 0.600 (0.352 to 0.848) |" in said
    told = "its 95% interval over seeds only: all runs answered the same prompts."
    assert f"Mean over seeds; in brackets, {told}" in said
    html = page(study_of(study_folder), "")
    assert f"Mean over seeds; small, {told}" in html and "in brackets" not in html


def test_the_command_of_each_run_is_shown_under_provenance(study_folder):
    assert "python -m align objective=wpo seed=3" in said_of(study_folder).split("## Provenance")[1]


# The command ----------------------------------------------------------------------------------------------------------


def test_a_sweep_of_links_is_read_alone_and_with_all_runs_each_counts_once(study_folder):
    sweep = study_folder / "groups" / "friday"
    sweep.mkdir(parents=True)
    for name in ("dpo-1", "wpo-1"):
        (sweep / name).symlink_to(Path("../..") / name, target_is_directory=True)
    assert [run.name for run in read_runs([sweep])] == ["dpo-1", "wpo-1"]
    names = [run.name for run in read_runs([study_folder])]
    assert len(names) == 11 and not any("groups" in name for name in names)
    assert report([str(sweep)]) == sweep / "report.html"  # beside the links, not where they lead
    assert {row["run"] for row in rows_of(sweep / "results.csv")} == {"dpo-1", "wpo-1"}
    assert not (study_folder / "report.html").exists()


def test_out_is_where_the_files_go_and_the_runs_stay_as_they_are(study_folder, tmp_path):
    before = sorted(study_folder.rglob("*"))
    assert report([str(study_folder), f"out={tmp_path / 'made'}"]) == tmp_path / "made" / "report.html"
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"report.html", "report.md", "results.csv"}
    assert sorted(study_folder.rglob("*")) == before


def test_without_out_the_files_go_into_what_the_given_folders_have_in_common(study_folder, tmp_path):
    assert report([str(study_folder / "dpo-1"), str(study_folder / "wpo-1")]).parent == study_folder
    assert report([str(study_folder / "dpo-1")]).parent == study_folder / "dpo-1"


def test_a_prompt_with_a_score_that_is_no_number_is_left_out_as_in_the_win_rate(tmp_path):
    run = write_run(tmp_path / "a")
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    rows[0]["scores"]["policy"][0] = float("nan")
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = re.search(r'id="data">(.*?)</script>', report([str(tmp_path)]).read_text(), re.DOTALL)[1]
    assert json.loads(data)["answers"]["prompts"] == [row["prompt"] for row in rows[1:]]


@pytest.mark.parametrize(
    "file, line, note",
    [
        (
            "samples.jsonl",
            '{"prompt": "where?", "start": ["a"], "policy": ["b"], "scores": {"start": [1], "policy": []}}',
            "lacks scores of answers to 'where?'",
        ),
        ("samples.jsonl", '{"prompt": "where?", "start": [], "policy": [], "chances": []}', "lacks scores of answers"),
        ("samples.jsonl", '{"prompt": "?", "start": ["a"], "policy": ["b"], "scores": [1]}', "answers cannot be read"),
        ("metrics.jsonl", '{"train/loss": 1.0}', ""),
        ("metrics.jsonl", '{"step": null, "train/loss": 1.0}', ""),
    ],
)
def test_a_line_that_is_damaged_does_not_end_the_report(tmp_path, file, line, note):
    run = write_run(tmp_path / "a")
    with (run / file).open("a") as lines:
        lines.write(f"{line}\n")
    (made,) = study_of(tmp_path).runs
    assert made.trained["win_rate"] > 0
    assert note in made.note and bool(note) == bool(made.note)


@pytest.mark.parametrize(
    "words, told",
    [
        (["nowhere"], "no folder nowhere"),
        ([], "no folder runs"),
        (["outt=x"], "unknown option outt"),
        (["."], "no runs in .: train first"),
    ],
)
def test_a_wrong_command_is_one_line(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["align", "report", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value).startswith("align: ") and told in str(end.value) and "\n" not in str(end.value)


def judge(prompt: str, response: str) -> float:
    """More words are better."""
    return min(1.0, len(response.split()) / 8)


@pytest.mark.slow
def test_what_align_has_trained_is_reported(align, tiny_llama, pairs_file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    words = quick(tiny_llama, pairs_file, "dataset.judge=test_report:judge", "evaluation.prompts=4")
    assert align("-m", "objective=dpo,simpo", "seed=1,2", *words, "evaluation.max_new_tokens=4").status == 0
    html = report([]).read_text()
    rows = rows_of(tmp_path / "runs" / "results.csv")
    assert [row["method"] for row in rows].count("dpo") == 2 and len(rows) == 4
    for row in rows:
        trained = json.loads((tmp_path / "runs" / row["run"] / "results.json").read_text())["trained"]
        assert float(row["win_rate"]) == trained["win_rate"]
        assert float(row["win_share"]) + float(row["tie_share"]) / 2 == pytest.approx(trained["win_rate"])
    assert "The same for all methods" in html


@pytest.mark.slow
def test_the_last_policy_of_self_play_is_reported_with_its_answers_and_held_out_pairs(
    align, tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name, many in (("prompts", 12), ("held_out", 4)):
        rows = [{"prompt": [{"role": "user", "content": f"{name} {i}"}]} for i in range(many)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["source=selfplay", "iterations=2", "scorer=program", "scorer.path=test_report:judge", "objective=dpo"]
    words += [f"dataset.eval_path={tmp_path / 'held_out.jsonl'}", "sampling.samples=3", "sampling.max_new_tokens=8"]
    words += ["evaluation.samples_per_prompt=2", "evaluation.max_new_tokens=8", "train.pairs_per_step=4"]
    made = align(*quick(tiny_llama, tmp_path / "prompts.jsonl", f"run_dir={tmp_path / 'runs' / 'play'}"), *words)
    assert made.status == 0, made.err
    (run,) = read_runs([tmp_path / "runs"])
    assert len(run.answers) == 4 and run.steps == 4 and len(run.iterations) == 2 and run.made_with
    assert fmean(answers.win_rate for answers in run.answers) == pytest.approx(run.trained["win_rate"])
    ranked = run.held_out["accuracy/mean_logp"].values()
    assert fmean(ranked) == pytest.approx(run.trained["accuracy/mean_logp"])
    assert "dpo self-play" in said_of(tmp_path / "runs")
