"""Composition: which recipe a command picks, what wins over what, and that composing needs no torch."""

import os
import resource
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest
from conftest import ROOT

import objectives
from align.__main__ import STAGES, TOOLS, main
from align.choices import Source
from align.cli.compose import CONF

OBJECTIVES = sorted(file.stem for file in CONF.glob("objective/*.yaml"))
START_SECONDS = 1.5  # what the first issue allows `--help` and `--cfg job`


# What a command picks ----------------------------------------------------------------------------------------------


def test_nothing_typed_is_dpo_on_the_built_in_task(composed):
    cfg = composed()
    assert (cfg.model.name, cfg.dataset.name, cfg.objective["name"]) == ("tiny", "playground", "dpo")
    assert cfg.train.pairs_per_step == 32  # of recipe tiny_dpo: config.py's default is 128


def test_two_words_pick_the_recipe(composed):
    cfg = composed("objective=wpo", "model=gemma2_9b")
    assert cfg.dataset.name == "gemma2_ultrafeedback_hybrid"
    assert (cfg.optimizer.learning_rate, cfg.optimizer.num_train_epochs, cfg.seed) == (1e-6, 2, 1)


def test_the_order_of_the_words_does_not_matter(composed):
    one_way, other_way = (
        composed("objective=wpo", "model=gemma2_9b"),
        composed("model=gemma2_9b", "objective=wpo"),
    )
    assert one_way == other_way


@pytest.mark.parametrize(
    "off",
    [
        "recipe=none",
        "~recipe",
        "recipe=null",
    ],
)
def test_a_recipe_can_be_switched_off(composed, off):
    cfg = composed("objective=wpo", "model=gemma2_9b", off)
    assert cfg.objective["base"]["beta"] == 0.01  # conf/objective/wpo.yaml
    assert cfg.dataset.name == "gemma2_ultrafeedback_armorm"  # conf/model/gemma2_9b.yaml
    assert (cfg.optimizer.learning_rate, cfg.optimizer.num_train_epochs, cfg.seed) == (
        5e-7,
        1,
        42,
    )  # conf/config.yaml


def test_a_recipe_can_be_named(composed):
    cfg = composed("recipe=llama3_8b_simpo_v01")
    assert (cfg.model.name, cfg.objective["name"], cfg.dataset.name) == ("llama3_8b", "simpo", "llama3_ultrafeedback")
    assert cfg.objective["gamma_beta_ratio"] == 0.55


def test_without_a_recipe_the_model_chooses_the_data(composed):
    cfg = composed("objective=ipo", "model=llama3_8b")
    assert cfg.dataset.name == "llama3_ultrafeedback_armorm"
    assert cfg.optimizer.learning_rate == 5e-7  # conf/config.yaml


# What wins over what -----------------------------------------------------------------------------------------------


def test_a_recipes_data_wins_over_the_models(composed):
    assert composed("objective=ipo", "model=gemma2_9b").dataset.name == "gemma2_ultrafeedback_armorm"
    assert composed("objective=wpo", "model=gemma2_9b").dataset.name == "gemma2_ultrafeedback_hybrid"


def test_a_value_typed_wins_over_the_recipe(composed):
    typed = ["objective.beta=0.5", "optimizer.learning_rate=1e-7", "train.max_length=4096", "seed=7"]
    cfg = composed(*typed, "objective=wpo", "model=gemma2_9b")
    assert (cfg.objective["beta"], cfg.optimizer.learning_rate) == (0.5, 1e-7)
    assert (cfg.train.max_length, cfg.seed) == (4096, 7)
    assert cfg.optimizer.num_train_epochs == 2  # the recipe's, as nothing else was typed


@pytest.mark.parametrize("objective", ["wpo", "ipo"])  # with a recipe that chooses data, and without
def test_a_dataset_typed_wins_over_recipe_and_model(composed, objective):
    words = [f"objective={objective}", "model=gemma2_9b"]
    for order in ([*words, "dataset=local"], ["dataset=local", *words]):
        cfg = composed(*order, "dataset.path=pairs.jsonl")
        assert (cfg.dataset.name, cfg.dataset.path, cfg.dataset.eval_split) == ("local", "pairs.jsonl", None)


def test_a_typed_model_wins_over_a_named_recipes(composed):
    assert composed("recipe=llama3_8b_simpo_v01", "model=gemma2_2b").model.name == "gemma2_2b"


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_keys_of_an_objective_need_no_plus(composed, prefix):
    cfg = composed("objective=simpo", "optimizer.adam_beta2=0.95", f"{prefix}objective.sft_weight=0.1")
    assert cfg.optimizer.adam_beta2 == 0.95
    assert cfg.objective["sft_weight"] == 0.1


@pytest.mark.parametrize(
    "typed", ["source.candidates.gpt4=answers.jsonl", "source.candidates={gpt4: answers.jsonl}"], ids=["key", "whole"]
)
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_candidates_and_a_judges_request_need_no_plus(composed, typed, prefix):
    cfg = composed("source=selfplay", f"{prefix}{typed}", f"{prefix}scorer.judge.request.seed=1")
    assert cfg.source.name is Source.selfplay
    assert cfg.source.candidates == {"gpt4": "answers.jsonl"}
    assert cfg.scorer.judge.request == {"seed": 1}


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("sampling.sampels=5", "unknown key sampling.sampels (did you mean sampling.samples?); sampling has backend, "),
        ("selection.min_gop=1", "unknown key selection.min_gop (did you mean selection.min_gap?); selection has "),
        ("source.candidats.a=b", "unknown key source.candidats (did you mean source.candidates?); source has name, "),
        ("scorer.judge.url=x", "unknown key scorer.judge.url (did you mean scorer.judge.urls?); scorer.judge has urls"),
        ("scorer=armrom", "there is no scorer=armrom (did you mean armorm?); scorer is one of armorm, dataset, "),
        ("source=selfply", "there is no source=selfply (did you mean selfplay?); source is one of dataset, selfplay"),
        ("iteratons=3", "unknown key iteratons (did you mean iterations?); the top level has "),
        ("sampling.samples=five", "sampling.samples: Value 'five' of type 'str' could not be converted to Integer"),
    ],
)
def test_a_typing_error_in_a_node_of_selfplay_is_one_line(refusal, typed, says):
    assert refusal(typed).startswith(says)


# Sweeps ------------------------------------------------------------------------------------------------------------


def test_a_sweep_picks_a_recipe_per_job(jobs):
    made = jobs("-m", "objective=dpo,wpo", "model=gemma2_9b,llama3_8b")
    assert [(j.model.name, j.objective["name"], j.dataset.name, j.optimizer.learning_rate) for j in made] == [
        ("gemma2_9b", "dpo", "gemma2_ultrafeedback_armorm", 5e-7),
        ("llama3_8b", "dpo", "llama3_ultrafeedback_armorm", 3e-7),
        ("gemma2_9b", "wpo", "gemma2_ultrafeedback_hybrid", 1e-6),
        ("llama3_8b", "wpo", "llama3_ultrafeedback_hybrid_v2", 1e-6),
    ]


def test_a_sweep_over_a_value_keeps_the_recipe(jobs):
    made = jobs("-m", "objective=simpo", "model=gemma2_9b", "objective.beta=2,10", "objective.gamma_beta_ratio=0.3,0.5")
    assert [(j.objective["beta"], j.objective["gamma_beta_ratio"]) for j in made] == [
        (2, 0.3),
        (2, 0.5),
        (10, 0.3),
        (10, 0.5),
    ]
    assert {j.optimizer.learning_rate for j in made} == {8e-7}  # the recipe's


def test_in_a_sweep_too_a_dataset_typed_wins(jobs):
    made = jobs("-m", "objective=wpo,ipo", "model=gemma2_9b,tiny", "dataset=local", "dataset.path=pairs.jsonl")
    assert [j.dataset.name for j in made] == ["local"] * 4
    assert [j.objective["name"] for j in made] == ["wpo", "wpo", "ipo", "ipo"]


def test_in_a_sweep_too_a_recipe_can_be_switched_off(jobs):
    made = jobs("-m", "objective=dpo,wpo", "model=gemma2_9b", "recipe=none")
    assert [(j.seed, j.dataset.name) for j in made] == [(42, "gemma2_ultrafeedback_armorm")] * 2


# The program -------------------------------------------------------------------------------------------------------


def cpu_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start(*words, code=None, cwd=ROOT):
    """(CPU seconds, stdout) of `python -m align <words>`, or of other code, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, *(["-c", code] if code else ["-m", "align"]), *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = cpu_seconds_of_children() - before
    assert done.returncode == 0, done.stderr
    return seconds, done.stdout


LISTS_HEAVY_MODULES = """
import runpy, sys
sys.argv[0] = "align"
try:
    runpy.run_module("align", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", *(name for name in ("torch", "transformers", "datasets", "wandb", "trl", "numpy") if name in sys.modules))
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["objective=wpo", "model=gemma2_9b", "--cfg", "job"]], ids=["help", "cfg"]
)
def test_composing_imports_nothing_heavy(words):
    _, out = start(*words, code=LISTS_HEAVY_MODULES)
    assert out.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]], ids=["help", "cfg"])
def test_help_and_cfg_answer_at_once(words):
    times = []
    for _ in range(3):  # the best of three, in CPU seconds, which are those of the clock on a machine that is free
        times.append(start(*words)[0])
        if times[-1] < START_SECONDS:
            break
    assert min(times) < START_SECONDS, times


def test_help_says_the_verbs_and_a_verb_explains_itself(align):
    shown = align("--help", tracker="").out
    assert all(f"\n  {verb} " in shown for verb in (*TOOLS, *STAGES))
    assert "\nmodel: " in shown and "\nsuite: " not in shown  # which is a group of evaluate's
    assert align("report", "--help", tracker="").out.startswith("`python -m align report [folder ...]")
    shown = align("evaluate", "--help", tracker="").out
    assert shown.startswith("align evaluate run=<folder>")
    assert "\nsuite: " in shown and "\nmodel: " not in shown


def test_the_shell_completes_the_choices_of_a_group(align, monkeypatch):
    line = "align objective=si"
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert align("-sc", "query=bash", tracker="").out.split() == ["objective=simpo"]


def test_a_misspelled_verb_is_one_line_that_says_the_verbs(align):
    said = align("reprt", tracker="")
    assert (said.status, said.err.count("\n")) == (1, 1)
    assert said.err.startswith("align: there is no verb 'reprt' (did you mean report?): the verbs are report, ")


def test_the_console_script_is_the_same_program():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    script = EntryPoint(name="align", value=scripts["align"], group="console_scripts")
    assert script.load() is main
    words = ["objective=wpo", "model=gemma2_9b", "--cfg", "job"]
    _, by_script = start(*words, code=f"from {script.module} import {script.attr}; {script.attr}()")
    assert by_script == start(*words)[1]


def test_it_works_from_any_working_folder(tmp_path):
    words = ["objective=wpo", "model=gemma2_9b", "--cfg", "job"]
    assert start(*words, cwd=tmp_path)[1] == start(*words)[1]
    assert list(tmp_path.iterdir()) == []  # and leaves nothing there


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_yaml_builds_its_objective(composed, name):
    cfg = composed(f"objective={name}", "recipe=none")
    objective = objectives.build(cfg.objective)
    assert type(objective) is objectives.registry.available()[name]
    assert objective.needs <= set(objectives.base.STATISTICS)
