"""Sweeps: what a job is, what its sweep shares, what fails and goes on, and searches by Optuna.

The lower half types real commands; a tiny model trains two steps in a second.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, quick

from align.cli.compose import CONF, sweep_name
from align.runs import spine

SPACES = sorted(file.stem for file in CONF.glob("hparams/*.yaml"))
QUICK = "dpo_small"  # whose jobs are the fewest


# Which jobs there are ------------------------------------------------------------------------------------------------


def test_jobs_over_objectives_each_take_the_recipe_of_the_built_in_task(jobs):
    """Their values: experiments/recipe/tiny_<objective>.yaml."""
    made = jobs("-m", "objective=dpo,simpo,sppo,wpo")
    assert [(job.objective["name"], job.objective.get("beta"), job.optimizer.learning_rate) for job in made] == [
        ("dpo", 1.0, 3e-4),
        ("simpo", 2.0, 1.3e-4),
        ("sppo", 0.1, 5e-4),
        ("wpo", None, 3e-4),
    ]
    assert made[3].objective["base"] == {"name": "dpo", "beta": 1.0}


@pytest.mark.parametrize("space", [pytest.param(s, marks=[] if s == QUICK else pytest.mark.slow) for s in SPACES])
def test_a_search_space_is_a_sweep_without_further_words_and_its_first_line_is_its_command(space, jobs):
    first, second = (CONF / "hparams" / f"{space}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    words, _, runs = second.removeprefix("# python -m align ").partition("      ")
    made = jobs(*words.split())
    assert len(made) == int(runs.split()[0])
    assert {job.objective["name"] for job in made} == {space.split("_")[0]}
    settings = [json.dumps([job.objective, job.optimizer.learning_rate]) for job in made]
    assert len(set(settings)) == len(made)
    assert len({job.tracker.group for job in made}) == 1


def test_a_key_that_is_typed_is_not_searched(jobs):
    made = jobs("hparams=simpo_small", "model=gemma2_9b", "objective.beta=10", "optimizer.learning_rate=8e-7")
    found = [(job.objective["beta"], job.objective["gamma_beta_ratio"]) for job in made]
    assert found == [(10, 0.3), (10, 0.5)]
    assert {job.dataset.name for job in made} == {"gemma2_ultrafeedback_armorm"}  # of the recipe gemma2_9b_simpo


def test_a_job_knows_the_command_that_makes_it_alone(jobs):
    made = jobs("hparams=simpo_tiny", "objective.gamma_beta_ratio=0.5", "optimizer.learning_rate=1e-4")
    assert made[1].command == (
        "python -m align objective=simpo objective.beta=2.0 objective.gamma_beta_ratio=0.5 optimizer.learning_rate=0.0001"
    )
    assert jobs("objective=simpo", "objective.beta=3")[0].command == "python -m align objective=simpo objective.beta=3"


def test_the_same_words_are_the_same_sweep_whatever_they_run_on():
    words = ["-m", "objective=simpo", "objective.beta=1,2", "seed=1,2"]
    name = sweep_name(words)
    assert name.startswith("objective-simpo_beta-1-2_seed-1-2_")
    assert sweep_name([*reversed(words), "cluster=cpu", "tracker.mode=offline"])[-6:] == name[-6:]
    assert sweep_name([*words, "optimizer.max_steps=3"])[-6:] != name[-6:]
    assert sweep_name([*words, "tracker.group=my_study"]) == "my_study"
    assert sweep_name([*words, "++tracker.group='my study'"]) == "my study"
    assert (
        sweep_name([*words, "tracker.group=../up"])[-6:] == name[-6:]
    )  # refused by each job, and no folder made of it


def test_a_word_that_is_null_leaves_a_search_space_or_a_recipe_out(jobs):
    (job,) = jobs("hparams=null", "search=null", "recipe=null")
    assert (job.objective["name"], job.optimizer.learning_rate) == ("dpo", 5e-7)  # the recipe has 3e-4


# What becomes of them ------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tiny_llama, pairs_file):
    """Of a sweep's jobs."""
    return quick(tiny_llama, pairs_file)


@pytest.mark.slow
def test_a_sweep_names_its_jobs_gathers_them_and_runs_only_what_is_missing(align, words, tmp_path):
    sweep = ["-m", "objective=dpo,simpo", "seed=7"]
    first = align(*sweep, *words)
    assert first.status == 0, first.err
    assert "job 2: objective=simpo seed=7" in first.out and "job 3" not in first.out
    (group,) = (tmp_path / "runs" / "groups").iterdir()
    assert f"python -m align report {group.relative_to(tmp_path)}" in first.out
    dpo, simpo = runs = sorted((tmp_path / "runs").glob("local-*"))
    assert sorted(link.resolve() for link in group.iterdir() if link.is_symlink()) == runs
    assert all(f"group: {group.name}" in (run / "config.yaml").read_text() for run in runs)
    made = (simpo / "results.json").stat().st_mtime_ns
    (dpo / "results.json").unlink()
    again = align(*sweep, *words)
    assert again.out.count("This run is complete") == 1
    assert (dpo / "results.json").exists() and (simpo / "results.json").stat().st_mtime_ns == made


@pytest.mark.slow
def test_a_sweep_with_failed_jobs_lists_them_at_its_end(align, words, tmp_path):
    result = align("-m", "objective.beta=-1,0.05", *words)
    assert result.status == 1
    assert "align: job 1 failed: objective dpo: objective.beta must be above 0, not -1" in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("align: 1 of 2 jobs failed: objective.beta=-1")
    assert last.endswith("The same command runs these again, and none that is complete")
    assert len(list((tmp_path / "runs").glob("*/results.json"))) == 1
    (file,) = (tmp_path / "runs" / "groups").glob("*/failed.json")
    (failed,) = json.loads(file.read_text())
    assert failed["job"].startswith("objective.beta=-1") and "must be above 0" in failed["why"]


def test_a_plan_of_a_sweep_makes_no_links(align, words, tmp_path):
    result = align("-m", "seed=1,2", "plan=true", *words)
    assert result.status == 0 and "align.report" not in result.out
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


@pytest.mark.slow
def test_the_links_are_where_the_sweep_says_whatever_its_own_folder_and_the_disk_of_runs(align, words, tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "deep")
    typed = ["-m", "seed=1", "hydra.sweep.dir=elsewhere", "tracker.group=my study", "run_dir=own/run"]
    result = align(*typed, *words)
    assert result.status == 0, result.err
    assert "report  python -m align report 'runs/groups/my study'" in result.out
    (link,) = (tmp_path / "runs" / "groups" / "my study").iterdir()
    assert link.resolve() == tmp_path / "own" / "run"


@pytest.mark.parametrize("group", ["../up", "a/b", "''"])
def test_a_group_that_is_no_name_of_a_folder_is_refused(refusal, words, group):
    said = refusal(f"tracker.group={group}", *words)
    assert "a folder in runs/groups is called so, as in tracker.group=my_study" in said


@pytest.mark.slow
def test_a_group_that_is_named_gathers_runs_but_none_that_is_refused(align, monkeypatch, words, tmp_path):
    from align.say import UserError

    def refuse(folder, cluster):
        raise UserError("no")

    assert align("seed=1", "tracker.group=study", *words).status == 0
    monkeypatch.setattr("align.runs.folder.check_checkpoint", refuse)
    assert align("seed=2", "tracker.group=study", *words).status == 1
    (link,) = (tmp_path / "runs" / "groups" / "study").iterdir()
    assert (link / "results.json").exists()


# Searches ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_returns_the_metric_that_is_named_and_says_which_there_are(align, monkeypatch, words):

    returned = []
    carry_out = spine.carry_out
    monkeypatch.setattr(spine, "carry_out", lambda *args: returned.append(carry_out(*args)))
    for metric in ("accuracy/log_ratio", "accuracy/mean_logp"):
        assert align(*words, "run_dir=run", f"optimized_metric={metric}").status == 0
    assert align(*words, "run_dir=run").status == 0
    results = json.loads((Path("run") / "results.json").read_text())["trained"]
    assert returned == [results["accuracy/log_ratio"], results["accuracy/mean_logp"], results["accuracy/mean_logp"]]


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("accuracy/mean_lopg", "is no metric of results.json (did you mean accuracy/mean_logp?)"),
        ("log_ratio/chosn", "is no metric of results.json (did you mean log_ratio/chosen?)"),
        ("win_rate", "needs a judge, and there is none: give scorer=..., or optimized_metric=accuracy/mean_logp"),
        ("quality", "is no metric of results.json; there are rewards/accuracies, "),
    ],
)
def test_a_metric_that_a_run_will_not_have_is_refused_before_it_trains(refusal, words, metric, says):
    assert f"optimized_metric={metric} {says}" in refusal(*words, f"optimized_metric={metric}")


@pytest.mark.slow
def test_a_metric_of_an_objectives_own_that_it_does_not_have_is_refused_at_the_end_when_that_is_known(align, words):
    result = align(*words, "optimized_metric=objective/weight")
    assert result.status == 1
    assert "optimized_metric=objective/weight is none of this run's results: " in result.err


def test_a_search_goes_on_when_a_trial_fails_and_says_the_best(align, monkeypatch, words, tmp_path):
    """The metric is -(beta - 3)^2, so the best of the trials is known; the second of them crashes."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    tried = []

    def run(cfg):
        tried.append(cfg.objective["beta"])
        if len(tried) == 2:
            raise RuntimeError("CUDA out of memory")
        return -((tried[-1] - 3.0) ** 2)

    monkeypatch.setattr("align.runs.spine.carry_out", run)
    typed = ["search=optuna", "objective=simpo", "objective.beta=interval(0.5,8.0)", "hydra.sweeper.n_trials=8"]
    result = align(*typed)
    assert result.status == 0, result.err
    assert len(tried) == 8
    assert "align: job 2 failed: CUDA out of memory" in result.err
    assert "1 of 8 jobs failed" in result.err
    best = min((beta for number, beta in enumerate(tried) if number != 1), key=lambda beta: abs(beta - 3))
    assert f"best    objective.beta={best}: {-((best - 3) ** 2):.4g}" in result.out
    assert abs(best - 3) < abs(tried[0] - 3)
    first = list(tried)
    tried.clear()
    assert align(*typed).status == 0
    assert tried == first  # the same trials again: of real runs those that are complete return at once


@pytest.mark.parametrize("word", ["plan=true", "cluster=slurm_1x8"])
def test_a_search_that_would_see_no_result_is_refused_at_its_first_trial(align, word):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    result = align("search=optuna", "objective.beta=interval(0.5,8.0)", word)
    assert result.status == 1
    assert "align: search=optuna needs the result of each run before the next" in result.err
    assert "job 1" not in result.out


def test_a_search_of_nothing_says_what_to_type(align):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    result = align("search=optuna", "objective=simpo", "hydra.sweeper.n_trials=3")
    assert result.status == 1
    assert "search=optuna has nothing to search: type 'objective.beta=interval(0.5,8)'" in result.err


@pytest.mark.parametrize("typed", ["objective.beta=1,2", "objective.beta=interval(1,2)"])
def test_several_values_without_m_say_what_to_type(align, typed):
    result = align(typed)
    assert result.status == 1
    assert result.err.startswith(f"align: {typed} are several values: type -m for a run of each")


def test_m_may_stand_anywhere(jobs):
    assert [job.seed for job in jobs("objective=dpo", "-m", "seed=1,2")] == [1, 2]


def test_a_search_without_its_package_says_what_to_install(align, monkeypatch):
    from hydra.core.config_store import ConfigStore

    repository = ConfigStore.instance().repo["hydra"]
    monkeypatch.setitem(repository, "sweeper", {k: v for k, v in repository["sweeper"].items() if "optuna" not in k})
    monkeypatch.setattr("hydra.core.plugins.Plugins._initialize", lambda self: None, raising=False)
    result = align("search=optuna")
    assert result.status == 1
    assert result.err == "align: search=optuna needs a package: pip install hydra-optuna-sweeper\n"


# Killed --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_what_is_missing(words, tmp_path, own_cache):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ALIGN_CACHE": str(own_cache)}
    command = [sys.executable, "-m", "align", "-m", "seed=1,2,3,4", "tracker=none", *words]
    command = [word.replace("optimizer.max_steps=2", "optimizer.max_steps=12") for word in command]

    def results():
        return sorted((tmp_path / "runs").glob("local-*/results.json"))

    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as killed:
        while len(results()) < 2:
            assert killed.poll() is None
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
    done = {file: file.stat().st_mtime_ns for file in results()}
    assert 2 <= len(done) < 4
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("This run is complete") == len(done)
    assert len(results()) == 4
    assert {file: file.stat().st_mtime_ns for file in done} == done
