"""The recipes: every published figure, every YAML composes, and every recipe trains.

The figures are of the recipe table of FACTS.md (the project's facts from papers, authors' repositories and model
cards); the sources are named row by row. They were read again at the sources where `checked` says so.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import yaml

import objectives
from align.choices import Device, Launcher, Precision, Rejected, Source, Strategy, WinProb
from align.cli.compose import CONF, shipped
from align.config import OptimizerConfig, PairSourceConfig, ScorerConfig, SelectionConfig
from align.onpolicy.scorers import registry
from align.playground import task
from align.runs.prepare import check_settings

RECIPES = sorted(file for file in (shipped("experiments") / "recipe").glob("*.yaml") if file.stem != "none")
ELSEWHERE = ("suite", "hparams", "search")  # no choice of one run: composed in tests/suites and test_sweep.py
GROUP_FILES = sorted(file for file in CONF.glob("*/*.yaml") if file.parent.name not in ELSEWHERE)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of the table. The defaults are what the table says holds "unless the row says otherwise"."""

    model: str
    dataset: str | tuple[str, ...]  # several: a mix
    objective: dict[str, Any]
    learning_rate: float
    optim: str = "adamw_torch"
    schedule: str = "cosine"
    warmup: float = 0.1  # a share of all steps
    weight_decay: float = 0.0
    clip: float = 1.0
    epochs: int = 1
    pairs_per_step: int = 128
    max_length: int = 2048
    max_prompt_length: int = 1800
    seed: int = 42
    attention: str | None = None
    words: tuple[str, ...] = ()  # empty: objective=... model=..., as the file is named
    selfplay: "SelfPlay | None" = None
    checked: str = field(repr=False)  # where the figures were read again


@dataclass(frozen=True, kw_only=True)
class SelfPlay:
    """How a run makes its pairs. Best against worst of the scores, for all of them."""

    scorer: tuple[str, str]
    temperature: float
    top_p: float
    max_new_tokens: int
    samples: int = 5
    iterations: int = 1
    split_prompts: bool = False
    candidates: tuple[str, ...] = ()  # origins besides the policy


GEMMA = {"model": "google/gemma-2-9b-it", "attention": "eager"}
LLAMA = {"model": "meta-llama/Meta-Llama-3-8B-Instruct"}
SHORT = {"max_length": 1024, "max_prompt_length": 512}
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
ARMORM = ("armorm", "RLHFlow/ArmoRM-Llama3-8B-v0.1")
SPPO = {
    "dataset": tuple(f"UCLA-AGI/data-mistral-7b-instruct-sppo-iter{i}" for i in (1, 2, 3)),
    "selfplay": SelfPlay(
        scorer=("pairrm", "llm-blender/PairRM-hf"),
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=2048,
        iterations=3,
        split_prompts=True,
    ),
    "objective": {"name": "sppo", "beta": 1e-3, "target": "soft"},
    "learning_rate": 5e-7,
    "optim": "rmsprop",
    "schedule": "linear",
    "pairs_per_step": 64,  # 4 x 2 x 8
    **SHORT,
    "checked": "model cards UCLA-AGI/*-SPPO-Iter3; uclaml/SPPO recipes/uclaml-sppo/config_full.yaml, run_sppo_*.sh, "
    "scripts/pipeline.sh, generate.py, rank.py, compute_prob.py; set cards UCLA-AGI/data-mistral-7b-instruct-sppo-iter1 and 2",
}


def simpo(beta: float, ratio: float) -> dict[str, Any]:
    return {"name": "simpo", "beta": beta, "gamma_beta_ratio": ratio, "gamma": None, "loss": "sigmoid"}


DPO = {"name": "dpo", "beta": 0.01, "label_smoothing": 0.0}
WPO = {"name": "wpo", "base": {"name": "dpo", "beta": 0.01}, "alignment": "sampled"}
SIMPO_SAMPLES = {"scorer": ARMORM, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 4096}
SIMPO_REPO = "princeton-nlp/SimPO training_configs/"
SIMPO_README = "princeton-nlp/SimPO README.md, hyperparameters of the DPO baselines"

PUBLISHED = {
    "gemma2_9b_simpo": Published(
        **GEMMA,
        dataset="princeton-nlp/gemma2-ultrafeedback-armorm",
        objective=simpo(10, 0.5),
        learning_rate=8e-7,
        checked=SIMPO_REPO + "gemma-2-9b-it-simpo.yaml",
    ),
    "gemma2_9b_simpo_selfplay": Published(
        **GEMMA,
        dataset=ULTRAFEEDBACK,
        objective=simpo(10, 0.5),
        learning_rate=8e-7,
        words=("recipe=gemma2_9b_simpo_selfplay",),
        selfplay=SelfPlay(**SIMPO_SAMPLES),
        checked=SIMPO_REPO + "gemma-2-9b-it-simpo.yaml; on_policy_data_gen/",
    ),
    "gemma2_9b_dpo": Published(
        **GEMMA,
        dataset="princeton-nlp/gemma2-ultrafeedback-armorm",
        objective=DPO,
        learning_rate=5e-7,
        checked=SIMPO_README,
    ),
    "gemma2_9b_wpo": Published(
        **GEMMA,
        dataset="wzhouad/gemma-2-ultrafeedback-hybrid",
        objective=WPO,
        learning_rate=1e-6,
        epochs=2,
        seed=1,
        checked="model card wzhouad/gemma-2-9b-it-WPO-HB",
    ),
    "gemma2_9b_wpo_selfplay": Published(
        **GEMMA,
        dataset=ULTRAFEEDBACK,
        objective=WPO,
        learning_rate=1e-6,
        epochs=2,
        seed=1,
        words=("recipe=gemma2_9b_wpo_selfplay", "source.candidates.gpt4=answers.jsonl"),
        selfplay=SelfPlay(**SIMPO_SAMPLES, candidates=("gpt4",)),
        checked="model card wzhouad/gemma-2-9b-it-WPO-HB, set card wzhouad/gemma-2-ultrafeedback-hybrid",
    ),
    "gemma2_9b_sppo": Published(**GEMMA, **SPPO),
    "llama3_8b_simpo": Published(
        **LLAMA,
        dataset="princeton-nlp/llama3-ultrafeedback-armorm",
        objective=simpo(10, 0.3),
        learning_rate=1e-6,
        checked=SIMPO_REPO + "llama-3-8b-instruct-simpo-v2.yaml",
    ),
    "llama3_8b_dpo": Published(
        **LLAMA,
        dataset="princeton-nlp/llama3-ultrafeedback-armorm",
        objective=DPO,
        learning_rate=3e-7,
        checked=SIMPO_README,
    ),
    "llama3_8b_simpo_v01": Published(
        **LLAMA,
        dataset="princeton-nlp/llama3-ultrafeedback",
        objective=simpo(2.5, 0.55),
        learning_rate=1e-6,
        words=("recipe=llama3_8b_simpo_v01",),
        checked=SIMPO_REPO + "llama-3-8b-instruct-simpo.yaml",
    ),
    "llama3_8b_wpo": Published(
        **LLAMA,
        dataset="wzhouad/llama3-ultrafeedback-hybrid-v2",
        objective=WPO,
        learning_rate=1e-6,
        epochs=2,
        seed=1,
        checked="model card wzhouad/Llama3-Instruct-8B-WPO-HB-v2",
    ),
    "llama3_8b_sppo": Published(**LLAMA, **SPPO),
    "mistral_7b_base_simpo": Published(
        model="alignment-handbook/zephyr-7b-sft-full",
        dataset=ULTRAFEEDBACK,
        objective=simpo(2, 0.8),
        learning_rate=3e-7,
        **SHORT,
        checked=SIMPO_REPO + "mistral-7b-base-simpo.yaml",
    ),
    "mistral_7b_simpo": Published(
        model="mistralai/Mistral-7B-Instruct-v0.2",
        dataset="princeton-nlp/mistral-instruct-ultrafeedback",
        objective=simpo(2.5, 0.1),
        learning_rate=5e-7,
        checked=SIMPO_REPO + "mistral-7b-instruct-simpo.yaml",
    ),
    "mistral_7b_sft_wpo": Published(
        model="HuggingFaceH4/mistral-7b-sft-beta",
        dataset=ULTRAFEEDBACK,
        objective=WPO,
        learning_rate=5e-7,
        **SHORT,
        checked="wzhouad/WPO training_configs/mistral-base.yaml",
    ),
}

SPLITS = {  # of the sets' hub pages; null: none that may be evaluated on
    ULTRAFEEDBACK: ("train_prefs", "test_prefs"),
    **dict.fromkeys(SPPO["dataset"], ("train", None)),
}


def command(recipe) -> list[str]:
    """The words of the command that a recipe's second line gives."""
    first, second = recipe.read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith("# python -m align "), f"{recipe.name}: the second line must be its command"
    return second.removeprefix("# python -m align ").split()


def published_words(name: str) -> tuple[str, ...]:
    """The words that pick a recipe of the table."""
    model, objective = name.rsplit("_", 1)
    return PUBLISHED[name].words or (f"objective={objective}", f"model={model}")


def test_every_recipe_is_in_the_table_or_built_in():
    names = {recipe.stem for recipe in RECIPES if not recipe.stem.startswith("tiny")}
    assert names == set(PUBLISHED), "a recipe without a row, or a row without a recipe"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_the_command_in_a_recipe_picks_that_recipe(recipe, composition):
    words = command(recipe)
    if recipe.stem in PUBLISHED and not PUBLISHED[recipe.stem].words:
        model, objective = recipe.stem.rsplit("_", 1)
        assert words == [f"objective={objective}", f"model={model}"]
    assert composition(*words).hydra.runtime.choices["recipe"] == recipe.stem


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_every_published_figure(name, composed):
    row = PUBLISHED[name]
    cfg = composed(*published_words(name))
    assert cfg.model.path == row.model
    assert cfg.model.attn_implementation == row.attention
    assert cfg.model.lora == {}
    sources = list(cfg.dataset.mix.values()) or [cfg.dataset]
    published = (row.dataset,) if isinstance(row.dataset, str) else row.dataset
    assert tuple(source.path for source in sources) == published
    for source in sources:
        assert (source.split, source.eval_split) == SPLITS.get(source.path, ("train", "test"))
    assert cfg.dataset.limit is None
    assert cfg.objective == row.objective
    assert cfg.optimizer == OptimizerConfig(
        learning_rate=row.learning_rate,
        optim=row.optim,
        lr_scheduler_type=row.schedule,
        warmup_steps=row.warmup,
        weight_decay=row.weight_decay,
        max_grad_norm=row.clip,
        num_train_epochs=row.epochs,
    )
    assert cfg.train.pairs_per_step == row.pairs_per_step
    assert (cfg.train.max_length, cfg.train.max_prompt_length) == (row.max_length, row.max_prompt_length)
    assert cfg.engine.gradient_checkpointing
    assert cfg.seed == row.seed
    assert (cfg.cluster.device, cfg.cluster.precision) == (Device.auto, Precision.auto)  # bf16 on the GPUs


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_makes_its_pairs_as_published(name, composed):
    row = PUBLISHED[name]
    cfg = composed(*published_words(name))
    if row.selfplay is None:
        assert (cfg.source, cfg.iterations, cfg.scorer) == (PairSourceConfig(), 1, ScorerConfig())
        return
    how, drawn = row.selfplay, cfg.sampling
    assert cfg.source.name is Source.selfplay
    assert (cfg.iterations, cfg.source.split_prompts) == (how.iterations, how.split_prompts)
    assert tuple(cfg.source.candidates) == how.candidates
    assert (drawn.samples, drawn.temperature, drawn.top_p) == (how.samples, how.temperature, how.top_p)
    assert drawn.max_new_tokens == how.max_new_tokens
    for knob in ("temperature", "top_p", "max_new_tokens"):
        assert getattr(cfg.evaluation, knob) == getattr(drawn, knob)  # ours: policies are compared as they answer
    assert cfg.scorer == ScorerConfig(name=how.scorer[0], path=how.scorer[1])
    assert cfg.selection == SelectionConfig(rejected=Rejected.worst, win_prob=WinProb.all)


@pytest.mark.parametrize("model", ["gemma2_9b", "llama3_8b"])
def test_sppo_can_be_one_iteration_on_the_authors_pairs(model, composed):
    cfg = composed("objective=sppo", f"model={model}", "source=dataset", "dataset=sppo_iter1", "iterations=1")
    check_settings(cfg)
    assert cfg.source.name is Source.dataset
    assert cfg.dataset.path == "UCLAML/synthetic_data_mistral-7b-instruct-sppo-iter1_score"
    assert cfg.dataset.mix == {}
    assert (cfg.optimizer.optim, cfg.train.pairs_per_step) == ("rmsprop", 64)


def test_hybrid_data_are_refused_without_their_further_answers(align):
    result = align("recipe=gemma2_9b_wpo_selfplay")
    assert result.status == 1
    assert result.err == "align: source.candidates.gpt4 has no value yet: type source.candidates.gpt4=...\n"


@pytest.mark.parametrize("objective", sorted(file.stem for file in CONF.glob("objective/*.yaml")))
def test_the_built_in_task_plays_itself_as_its_own_pairs_were_made(objective, composed):
    cfg = composed(f"objective={objective}", "source=selfplay", "iterations=3")
    assert (cfg.model.name, cfg.dataset.name, cfg.iterations) == ("tiny", "playground", 3)
    drawn, chosen = cfg.sampling, cfg.selection
    assert (drawn.samples, drawn.temperature, drawn.top_p, drawn.max_new_tokens) == (task.SAMPLES, 1.0, 1.0, 64)
    assert chosen == SelectionConfig(temperature=0.0, min_gap=task.MIN_GAP)
    assert cfg.scorer.name is None and cfg.dataset.judge == "align.playground.task:judge"


def test_cfg_job_prints_the_wpo_recipe(align):
    result = align("objective=wpo", "model=gemma2_9b", "--cfg", "job", tracker="")
    assert result.status == 0, result.err
    shown = yaml.load(result.out, yaml.BaseLoader)  # as text, as a reader sees it
    assert shown["model"]["path"] == "google/gemma-2-9b-it"
    assert shown["dataset"]["path"] == "wzhouad/gemma-2-ultrafeedback-hybrid"
    assert shown["objective"] == {"name": "wpo", "base": {"name": "dpo", "beta": "0.01"}, "alignment": "sampled"}
    assert {
        "learning_rate": "1.0e-06",
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "warmup_steps": "0.1",
        "weight_decay": "0.0",
        "max_grad_norm": "1.0",
        "num_train_epochs": "2.0",
    }.items() <= shown["optimizer"].items()
    train = shown["train"]
    assert (train["pairs_per_step"], train["max_length"], train["max_prompt_length"]) == ("128", "2048", "1800")
    assert shown["seed"] == "1"


@pytest.mark.parametrize("file", GROUP_FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_yaml_composes_to_a_run_that_passes_the_checks(file, composed):
    words = [f"{file.parent.name}={file.stem}"]
    if file.stem == "local" and file.parent.name == "model":
        words.append("model.path=my-model")
    cfg = composed(*words)
    if cfg.dataset.name == "local":
        cfg = composed(*words, "dataset.path=pairs.jsonl")
    check_settings(cfg)
    chosen = getattr(cfg, file.parent.name)
    if file.parent.name in ("model", "dataset"):
        assert chosen.name == file.stem  # the name is part of the run folder and of the model card
    if file.parent.name == "source":
        assert chosen.name.name == file.stem
    if file.parent.name == "scorer":
        assert chosen.name == (None if file.stem == "dataset" else file.stem)
    if file.parent.name == "objective":
        assert chosen["name"] == file.stem
        objectives.build(chosen)


CLUSTERS = {  # device, nodes, processes on each, strategy, launcher
    "auto": (Device.auto, 1, None, Strategy.auto, Launcher.local),
    "cpu": (Device.cpu, 1, None, Strategy.auto, Launcher.local),
    "cpu_2": (Device.cpu, 1, 2, Strategy.auto, Launcher.local),
    "gpu_1": (Device.gpu, 1, 1, Strategy.auto, Launcher.local),
    "gpus_8": (Device.gpu, 1, 8, Strategy.auto, Launcher.local),
    "h100x8": (Device.gpu, 1, 8, Strategy.fsdp, Launcher.local),
    "slurm_1x8": (Device.gpu, 1, 8, Strategy.auto, Launcher.slurm),
    "slurm_2x8": (Device.gpu, 2, 8, Strategy.auto, Launcher.slurm),
}


@pytest.mark.parametrize("name", sorted({file.stem for file in CONF.glob("cluster/*.yaml")} | CLUSTERS.keys()))
def test_a_cluster_is_what_its_name_says(name, composed):
    cfg = composed("objective=wpo", "model=gemma2_9b", f"cluster={name}")
    cluster = cfg.cluster
    made = (cluster.device, cluster.nodes, cluster.processes, cluster.strategy, cluster.launcher)
    assert made == CLUSTERS[name]
    assert not cluster.offload and cluster.precision is Precision.auto
    assert cluster.gpu_memory_gib == (80 if name == "h100x8" else None)
    assert cfg.train.pairs_per_step == 128 and 128 % (cluster.nodes * (cluster.processes or 1)) == 0


@pytest.mark.parametrize("file", sorted(CONF.glob("dataset/*.yaml")), ids=lambda file: file.stem)
def test_a_dataset_says_in_its_first_line_what_it_is(file):
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    node = yaml.safe_load(file.read_text())
    path = node.get("path")
    assert path is None or first == f"# https://huggingface.co/datasets/{path}"
    paths = [source["path"] for source in node.get("mix", {}).values()]
    assert not paths or first.startswith(f"# https://huggingface.co/datasets/{paths[0]}")


@pytest.mark.parametrize("file", sorted(CONF.glob("scorer/*.yaml")), ids=lambda file: file.stem)
def test_a_scorer_says_where_it_is_from_and_what_to_type(file, composed):
    comment = " ".join(line[2:] for line in file.read_text().splitlines() if line.startswith("# "))
    cfg = composed(f"scorer={file.stem}")
    if cfg.scorer.path is not None:
        assert comment.startswith(f"https://huggingface.co/{cfg.scorer.path} ")
    if cfg.scorer.name is not None:
        assert f"scorer={cfg.scorer.name}" in comment
        _, reads = registry._BUILT_IN[cfg.scorer.name]
        default = asdict(ScorerConfig())
        assert all(
            v == default[k] or k in ("name", *reads) for k, v in asdict(cfg.scorer).items()
        )  # else it is refused


def test_every_built_in_scorer_can_be_typed():
    assert {file.stem for file in CONF.glob("scorer/*.yaml")} == {"dataset", *registry._BUILT_IN}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_trains_one_step(recipe, align, tiny_llama, tiny_gemma2, pairs_file, tmp_path):
    words = [word for word in command(recipe) if not word.startswith("dataset.path=")]
    built_in = recipe.stem.startswith("tiny")
    small = ["model.fit=null"] if built_in else [f"model.path={tiny_gemma2 if 'gemma' in recipe.stem else tiny_llama}"]
    result = align(
        *words,
        *small,
        "source=dataset",
        "scorer=dataset",  # a model would judge the answers
        "iterations=1",
        "dataset=local",
        f"dataset.path={pairs_file}",
        "cluster=cpu",
        "train.pairs_per_step=8",
        "train.max_length=128",
        "train.max_prompt_length=64",
        "optimizer.max_steps=1",
        f"run_dir={tmp_path / 'run'}",
    )
    assert result.status == 0, result.err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["train/loss"] for step in steps if "train/loss" in step]
    assert len(losses) == 1 and math.isfinite(losses[0])
    assert (tmp_path / "run" / "model" / "config.json").exists()
