"""One table of commands that must be refused: in one line that names what is wrong and what to type instead."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
from conftest import pair_row, quick, save_tiny, write_jsonl
from omegaconf import OmegaConf

from align.config import RunConfig
from align.train.optim import OWNED

Setup = Callable[[Path, Path], object]  # (working folder, tiny model) -> whatever
Patch = Callable[[pytest.MonkeyPatch], object]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A bad input: words typed behind `quick(...)`, or alone, and fragments that the one line must hold."""

    words: tuple[str, ...]
    says: tuple[str, ...]
    setup: Setup = lambda folder, model: None
    machine: Patch = lambda monkeypatch: None
    alone: bool = False
    tracker: str = "none"
    env: dict[str, str] = field(default_factory=dict)


def bad(name, *words, says, **more):
    """A row of the table."""
    says = (says,) if isinstance(says, str) else tuple(says)
    return pytest.param(Bad(words=words, says=says, **more), id=name.replace(" ", "_"))


def text(name, content):
    """A file in the working folder."""
    encoded = content if isinstance(content, bytes) else content.encode()
    return lambda folder, model: (folder / name).write_bytes(encoded)


def rows(*made, name="p.jsonl"):
    """A file of rows in the working folder."""
    return lambda folder, model: write_jsonl(folder / name, list(made))


def copy_without(*names):
    """A copy of the tiny model, ./model, that lacks some files."""

    def setup(folder, model):
        copy = Path(shutil.copytree(model, folder / "model"))
        for name in names:
            (copy / name).unlink()

    return setup


def copy_with(name, content):
    """A copy of the tiny model, ./model, one file of which holds something else."""
    return lambda folder, model: text(f"model/{name}", content)(folder, shutil.copytree(model, folder / "model"))


def no_eos_and_no_pad(folder, model):
    copy = Path(shutil.copytree(model, folder / "model"))
    file = copy / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("eos_token", "pad_token")}
    file.write_text(json.dumps(kept))


def small_embedding(folder, model):
    from align.playground.tokenizer import build_tokenizer

    save_tiny(folder / "model", build_tokenizer(), vocab_size=100)


def stored_dict(folder, model):
    stored = datasets.Dataset.from_list([pair_row(i) for i in range(8)])
    datasets.DatasetDict({"train_prefs": stored}).save_to_disk(str(folder / "stored"))


def folder_with_identity(content):
    def setup(folder, model):
        (folder / "there").mkdir()
        (folder / "there" / "identity.json").write_text(content)

    return setup


def empty(i):
    """A pair whose chosen answer is blank."""
    return pair_row(i, chosen=[{"role": "assistant", "content": " "}])


def hidden_row_6():
    """Eight rows; the bad one is the sixth of the file, whichever rows are held out."""
    return rows(*(empty(i) if i == 5 else pair_row(i) for i in range(8)))


def gpus(number):
    """A machine with so many GPUs."""
    return lambda monkeypatch: monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def without(package):
    """A machine that lacks a package."""
    find = importlib.util.find_spec

    def find_others(name, *more):
        return None if name == package else find(name, *more)

    return lambda monkeypatch: monkeypatch.setattr(importlib.util, "find_spec", find_others)


def without_slurm(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, *more, **options: None)


TINY = ("model=tiny_llama", "dataset.path=pairs.jsonl")  # a randomly initialised model, described by model.init

KEYS = [
    bad("key at the top", "sead=1", says=("unknown key sead", "did you mean seed?", "run_dir")),
    bad("key in train", "train.pairs_per_stp=8", says=("train.pairs_per_stp", "did you mean train.pairs_per_step?")),
    bad("key in objective", "objective.btea=1", says=("objective.btea", "objective.beta", "objective.label_smoothing")),
    bad("key in optimizer", "optimizer.learning_rat=1", says=("optimizer.learning_rat", "learning_rate")),
    bad("key in dataset", "dataset.pth=x", says=("dataset.pth", "did you mean dataset.path?")),
    bad("key in cluster", "cluster.gpus=2", says=("cluster.gpus", "device, nodes, processes, strategy")),
    bad(
        "plus before an unknown key",
        "+sead=1",
        "plan=true",
        says=("sead", "did you mean seed?"),
    ),
    bad("int", "train.pairs_per_step=many", says=("train.pairs_per_step", "'many'", "Integer")),
    bad("int from a fraction", "train.pairs_per_step=8.5", says=("train.pairs_per_step", "'8.5'", "Integer")),
    bad("float", "dataset.eval_fraction=some", says=("dataset.eval_fraction", "'some'", "Float")),
    bad("bool", "engine.gradient_checkpointing=perhaps", says=("engine.gradient_checkpointing", "'perhaps'", "bool")),
    bad("enum", "train.truncation=left", says=("train.truncation", "'left'", "papers, drop")),
    bad(
        "key in engine",
        "engine.layuot=packed",
        says=("engine.layuot", "did you mean engine.layout?", "tokens_per_micro_"),
    ),
    bad("layout", "engine.layout=foo", says=("engine.layout", "'foo'", "shared, packed, padded")),
    bad("section as a value", "train=8", says=("train", "TrainConfig")),
    bad("word without =", "word", says=("'word'", "key=value")),
    bad(
        "value that is cut off",
        "objective.beta=[",
        says="objective.beta",
    ),
    bad("no key before =", "=8", says="=8"),
    bad(
        "number for a group",
        "objective=3",
        says=("objective=3", "dpo, ipo"),
    ),
    bad(
        "interpolation of nothing",
        "objective.beta=${oops}",
        says=("objective.beta", "'oops'"),
    ),
]

GROUPS = [
    bad("model", "model=nope", alone=True, says=("model=nope", "gemma2_9b", "tiny")),
    bad("dataset", "dataset=nope", alone=True, says=("dataset=nope", "dataset is one of", "playground")),
    bad("objective", "objective=simpl", alone=True, says=("objective=simpl", "did you mean simpo?", "dpo, ipo")),
    bad("cluster", "cluster=nope", alone=True, says=("cluster=nope", "auto, cpu")),
    bad("tracker", "tracker=nope", alone=True, tracker="", says=("tracker=nope", "none, tensorboard, trackio, wandb")),
    bad("recipe", "recipe=nope", alone=True, says=("recipe=nope", "tiny_dpo")),
]

OBJECTIVES = [
    bad("unknown name", "objective.name=dop", says=("'dop'", "dpo, ipo, plus_sft, simpo, sppo, wpo")),
    bad("unknown base", "objective=wpo", "objective.base=dop", says=("'dop'", "dpo, ipo, plus_sft")),
    bad("no base", "objective=wpo", "objective.base=null", says=("objective.base is missing", "dpo, ipo, plus_sft")),
    bad("beta 0", "objective.beta=0", says=("objective.beta must be above 0", "0.0")),
    bad("beta below 0", "objective.beta=-1", says=("objective.beta must be above 0", "-1.0")),
    bad("beta text", "objective.beta=abc", says=("objective.beta must be a number", "'abc'")),
    bad("beta null", "objective.beta=null", says=("objective.beta must be a number", "None")),
    bad(
        "gamma twice",
        "objective=simpo",
        "objective.gamma=1",
        "objective.gamma_beta_ratio=0.5",
        says=("objective.gamma and objective.gamma_beta_ratio are both given", "set the other to null"),
    ),
    bad("label smoothing", "objective.label_smoothing=0.7", says=("objective.label_smoothing", "[0, 0.5)", "0.7")),
    bad("choice", "objective=simpo", "objective.loss=hing", says=("objective.loss", "sigmoid or hinge", "'hing'")),
    bad("code that is not there", "objective.code=nope.py", says=("code", "nope.py", "working folder")),
]

OPTIMIZERS = [
    bad(
        "batch size",
        "optimizer.per_device_train_batch_size=4",
        says=("optimizer.per_device_train_batch_size", "train.pairs_per_step"),
    ),
    bad("seed", "optimizer.seed=3", says=("optimizer.seed is decided by seed", "set that")),
    bad("rate text", "optimizer.learning_rate=abc", says=("optimizer.learning_rate: Value 'abc'", "Float")),
    bad("rate 0", "optimizer.learning_rate=0", says=("optimizer.learning_rate must be above 0",)),
    bad(
        "rate null",
        "optimizer.learning_rate=null",
        says=("optimizer.learning_rate", "not Optional"),
    ),
    bad("optim", "optimizer.optim=adam", says=("optimizer.optim", "adamw_torch", "'adam'")),
    bad("scheduler", "optimizer.lr_scheduler_type=cos", says=("optimizer.lr_scheduler_type", "cosine", "'cos'")),
    bad("no epochs", "optimizer.num_train_epochs=0", says=("optimizer.num_train_epochs must be above 0",)),
    bad(
        "part of a step",
        "optimizer.max_steps=2.5",
        says="optimizer.max_steps",
    ),
    bad(
        "adam beta",
        "optimizer.adam_beta1=2",
        says=("optimizer.optim=adamw_torch", "beta", "2"),
    ),
    bad(
        "optim without its package",
        "optimizer.optim=adamw_8bit",
        says=("optimizer.optim=adamw_8bit", "pip install -U bitsandbytes"),
    ),
    bad(
        "optim that steps in the backward",
        "optimizer.optim=lomo",
        says=("optimizer.optim must be one of adamw_torch,", "'lomo'"),
    ),
    bad(
        "option of no optimizer",
        "optimizer.optim=rmsprop",
        "optimizer.optim_args='momentum=0.9,nesterov=true'",
        says=("optimizer.optim_args=momentum=0.9,nesterov=true", "momentum, alpha, eps, centered"),
    ),
    bad(
        "argument of no schedule",
        "optimizer.lr_scheduler_kwargs={num_cycles: 1, power: 2}",
        says=("optimizer.lr_scheduler_type=cosine", "'power'"),
    ),
    bad(
        "warmup below 0",
        "optimizer.warmup_steps=-3",
        says=("warmup_steps", "-3"),
    ),
    bad(
        "best model at the end",
        "optimizer.load_best_model_at_end=true",
        says=("unknown key optimizer.load_best_model_at_end", "learning_rate"),
    ),
    bad(
        "gradient norm below 0",
        "optimizer.max_grad_norm=-1",
        says="optimizer.max_grad_norm",
    ),
]

DATA = [
    bad("no file", "dataset.path=nope.jsonl", says=("dataset.path=nope.jsonl does not exist", "working folder")),
    bad("no folder", "dataset.path=./nope", says=("dataset.path=./nope does not exist", "working folder")),
    bad("no held-out file", "dataset.eval_path=nope.jsonl", says=("dataset.eval_path=nope.jsonl does not exist",)),
    bad(
        "folder that is no data set",
        "dataset.path=./there",
        setup=lambda folder, model: (folder / "there").mkdir(),
        says=("dataset.path=./there is a folder", "save_to_disk", "give a file"),
    ),
    bad(
        "suffix",
        "dataset.path=p.csv",
        setup=text("p.csv", "prompt,chosen\n"),
        says=("dataset.path=p.csv", ".jsonl, .json, .parquet"),
    ),
    bad(
        "line that is not JSON",
        "dataset.path=p.jsonl",
        setup=text("p.jsonl", f"{json.dumps(pair_row(0))}\n\n{{oops\n"),
        says=("p.jsonl, line 3 is not JSON",),
    ),
    bad(
        "line that is no object",
        "dataset.path=p.jsonl",
        setup=text("p.jsonl", f"{json.dumps(pair_row(0))}\n[1]\n"),
        says=("p.jsonl, line 2 is not a JSON object", "[1]"),
    ),
    bad(
        "line that is not UTF-8",
        "dataset.path=p.jsonl",
        setup=text("p.jsonl", '{"prompt": "caf\xe9"}\n'.encode("latin-1")),
        says=("p.jsonl, line 1 is not JSON", "utf-8"),
    ),
    bad("JSON that is no list", "dataset.path=p.json", setup=text("p.json", "{}"), says=("p.json", "list of JSON obj")),
    bad(
        "JSON lines under .json",
        "dataset.path=p.json",
        setup=text("p.json", '{"a": 1}\n{"a": 2}\n'),
        says=("p.json is not JSON", "line 2", ".jsonl"),
    ),
    bad(
        "parquet that is text",
        "dataset.path=p.parquet",
        setup=text("p.parquet", "hello"),
        says=("p.parquet is not a parquet file",),
    ),
    bad("empty file", "dataset.path=p.jsonl", setup=text("p.jsonl", ""), says=("p.jsonl is empty",)),
    bad(
        "columns",
        "dataset.path=p.jsonl",
        setup=rows({"question": "a", "answer": "b"}),
        says=("p.jsonl has no column 'chosen'", "question, answer", "dataset.columns={ours: yours}"),
    ),
    bad(
        "renamed column that is not there",
        "+dataset.columns={chosen: best}",
        says=("pairs.jsonl has no column 'best' (dataset.columns)", "it has id, prompt"),
    ),
    bad(
        "renamed column that is not there, without a plus",
        "dataset.columns={chosen: best}",
        says=("pairs.jsonl has no column 'best' (dataset.columns)", "it has id, prompt"),
    ),
    bad(
        "renamed to what is not ours",
        "+dataset.columns={promt: id}",
        says=("dataset.columns: 'promt'", "prompt, chosen, rejected"),
    ),
    bad("group_by", "dataset.group_by=nope", says=("no column 'nope' (dataset.group_by)", "it has")),
    bad(
        "split",
        "dataset.path=./stored",
        setup=stored_dict,
        says=("dataset.path=./stored has no split 'train'", "it has train_prefs"),
    ),
    bad(
        "no usable row",
        "dataset.path=p.jsonl",
        setup=rows(*map(empty, range(4))),
        says=("p.jsonl: none of 3 rows can be used", "empty response: 3"),  # 1 of the 4 is held out
    ),
    bad(
        "strict row",
        "dataset.path=p.jsonl",
        "dataset.strict=true",
        setup=hidden_row_6(),
        says=("p.jsonl, row 6: empty response", "dataset.strict=false"),
    ),
    bad(
        "one prompt",
        "dataset.path=p.jsonl",
        setup=rows(*(pair_row(i, prompt=pair_row(0)["prompt"]) for i in range(8))),
        says=("p.jsonl has one prompt only", "dataset.eval_path"),
    ),
    bad(
        "no win_prob",
        "objective=sppo",
        "dataset.path=p.jsonl",
        setup=rows(*(pair_row(i, chosen_win_prob=None) for i in range(20))),
        says=("sppo needs win_prob", "dataset local", "objective.target=hard"),
    ),
    bad("no source", "dataset.path=null", says=("dataset needs one of path, rows or mix", "dataset.path=pairs.jsonl")),
    bad("two sources", "dataset.rows=align.playground.task:rows", says=("path, rows or mix", "path and rows")),
    bad(
        "rows not importable",
        "dataset.path=null",
        "dataset.rows=nowhere:rows",
        says=("dataset.rows=nowhere:rows", "module:function", "nowhere"),
    ),
    bad(
        "judge not importable",
        "dataset.judge=nowhere:judge",
        says=("dataset.judge=nowhere:judge", "module:function"),
    ),
    bad(
        "file of a mix",
        "dataset.path=null",
        "++dataset.mix={a:{path: nope.jsonl}}",
        says=("dataset.mix.a.path=nope.jsonl does not exist",),
    ),
    bad(
        "file of a mix, without a plus",
        "dataset.path=null",
        "dataset.mix={a:{path: nope.jsonl}}",
        says=("dataset.mix.a.path=nope.jsonl does not exist",),
    ),
    bad(
        "weight of a mix",
        "dataset.path=null",
        "++dataset.mix={a:{path: pairs.jsonl, weight: 0}}",
        says=("dataset.mix.a.weight must be above 0",),
    ),
    bad("hub data set", "dataset.path=nobody/nothing", says=("dataset.path=nobody/nothing", "'train'", "hub")),
    bad("all held out", "dataset.eval_fraction=1", says=("dataset.eval_fraction must lie in (0, 1)",)),
]

MODELS = [
    bad("neither path nor init", "model.path=null", says=("give model.path", "or model.init", "not both")),
    bad(
        "both path and init", *TINY, "model.path=./model", alone=True, says=("model.path", "or model.init", "not both")
    ),
    bad("no folder", "model.path=./nope", says=("model.path=./nope", "does not exist")),
    bad("measure of a model", "++model.shape={paramters: 1}", says=("model.shape", "paramters")),
    bad("hub model", "model.path=nobody/nothing", says=("model.path=nobody/nothing", "hub", "HF_TOKEN")),
    bad("hub tokenizer", "model.tokenizer=nobody/nothing", says=("model.tokenizer=nobody/nothing", "hub", "HF_TOKEN")),
    bad(
        "no config", "model.path=./model", setup=copy_without("config.json"), says=("model.path=./model", "config.jso")
    ),
    bad(
        "no tokenizer",
        "model.path=./model",
        setup=copy_without("tokenizer.json"),
        says=("model.path=./model", "tokenizer"),
    ),
    bad(
        "no weights",
        "model.path=./model",
        setup=copy_without("model.safetensors"),
        says=("model.path=./model", "safetensors"),
    ),
    bad(
        "weights that are none",
        "model.path=./model",
        setup=copy_with("model.safetensors", "xx"),
        says=("model.path=./model", "safetensors"),
    ),
    bad(
        "small embedding",
        "model.path=./model",
        setup=small_embedding,
        says=("tokenizer has 614 tokens", "embeds only 100", "model.tokenizer and model.path"),
    ),
    bad(
        "attention",
        "model.attn_implementation=nope",
        says=("model.attn_implementation", "eager"),
    ),
    bad(
        "neither eos nor pad",
        "model.path=./model",
        setup=no_eos_and_no_pad,
        says=("tokenizer ./model has no eos_token", "tokenizer_config.json"),
    ),
    bad(
        "no chat template",
        "model.path=./model",
        setup=copy_without("chat_template.jinja"),
        says=("no chat template", "model.chat_template"),
    ),
    bad(
        "template without the answer",
        "model.chat_template='{{ messages[0].content }}'",
        says=("does not write the assistant's turn", "model.chat_template"),
    ),
    bad("template that is no template", "model.chat_template='{% for %}'", says=("chat template fails", "Expected an")),
    bad("template file", "model.chat_template=nope.jinja", says=("model.chat_template=nope.jinja", "nor a file")),
    bad("type to initialise", *TINY, "model.init.model_type=lama", alone=True, says=("model.init", "lama")),
    bad(
        "init without tokenizer", *TINY, "model.tokenizer=null", alone=True, says=("model.init needs model.tokenizer",)
    ),
    bad(
        "heads to initialise",
        *TINY,
        "model.init.num_attention_heads=5",
        alone=True,
        says=("model.init", "heads"),
    ),
    bad("fit", *TINY, "model.fit=nowhere:fit", alone=True, says=("model.fit=nowhere:fit", "module:function")),
    bad(
        "LoRA field",
        "model.lora={rank: 8}",
        says=("model.lora", "rank", "peft.LoraConfig"),
    ),
    bad(
        "LoRA dropout",
        "model.lora={r: 8, lora_dropout: 0.1}",
        says=("model.lora.lora_dropout must be 0",),
    ),
]

RUNS = [
    bad(
        "prompt as long as all",
        "train.max_prompt_length=2048",
        says=("train.max_prompt_length (2048)", "below train.ma"),
    ),
    bad("no pairs in a step", "train.pairs_per_step=0", says=("train.pairs_per_step must be above 0",)),
    bad(
        "more than there are",
        "train.pairs_per_step=500",
        says=("train.pairs_per_step=500", "38 training pairs", "train.pairs_per_step=38"),  # 5% of 40 are held out
    ),
    bad(
        "batch that cannot be divided",
        "plan=true",
        env={"WORLD_SIZE": "3", "RANK": "0"},
        says=("train.pairs_per_step=8 cannot be divided among 3 processes", "9 can"),
    ),
    bad(
        "no tokens in a micro-batch",
        "engine.tokens_per_micro_batch=0",
        says=("engine.tokens_per_micro_batch must be above 0, not 0",),
    ),
    bad(
        "words for tokens in a micro-batch",
        "engine.tokens_per_micro_batch=many",
        says=("engine.tokens_per_micro_batch must be a whole number of tokens or auto, not 'many'",),
    ),
    bad("part of a token", "engine.tokens_per_micro_batch=2.5", says=("engine.tokens_per_micro_batch", "2.5")),
    bad("top_p", "evaluation.top_p=0", says=("evaluation.top_p must lie in (0, 1]",)),
    bad(
        "folder of another run",
        "run_dir=there",
        setup=folder_with_identity('{"seed": 7}'),
        says=("there holds another run", "run_dir="),
    ),
    bad(
        "folder with half an identity",
        "run_dir=there",
        setup=folder_with_identity('{"seed": '),
        says=("there", "run_dir="),
    ),
    bad("run_dir below a file", "run_dir=pairs.jsonl/below", says=("run_dir", "pairs.jsonl/below", "give another")),
    bad(
        "cache_dir below a file", "cache_dir=pairs.jsonl/below", says=("cache_dir", "pairs.jsonl/below", "ALIGN_CACHE")
    ),
    bad("online", "tracker.mode=online", tracker="wandb", says=("WANDB_API_KEY", "tracker.mode=offline")),
]


CLUSTER = [
    bad("bf16 on a CPU", "cluster.precision=bf16", says=("cluster.precision=bf16", "cpu", "use fp32 or auto")),
    bad("strategy", "cluster.strategy=zero1", says=("cluster.strategy", "'zero1'", "single, ddp, fsdp, zero2, zero3")),
    bad("no processes", "cluster.processes=0", says=("cluster.processes must be above 0, not 0",)),
    bad("no nodes", "cluster.nodes=0", says=("cluster.nodes must be above 0, not 0",)),
    bad("memory below 0", "cluster.gpu_memory_gib=-1", says=("cluster.gpu_memory_gib must be above 0, not -1",)),
    bad(
        "eight GPUs where there is none",
        *(*TINY, "cluster=gpus_8"),
        alone=True,
        machine=gpus(0),
        says=("8 GPUs", "this machine has 0", "cluster=auto", "cluster.device=cpu"),
    ),
    bad(
        "eight GPUs where there are two",
        *(*TINY, "cluster=gpus_8"),
        alone=True,
        machine=gpus(2),
        says=("8 GPUs", "this machine has 2", "cluster.processes=2"),
    ),
    bad(
        "a GPU where there is none",
        *(*TINY, "cluster=gpu_1"),
        alone=True,
        machine=gpus(0),
        says=("1 GPU", "this machine has 0", "cluster=auto"),
    ),
    bad(
        "single on two processes",
        "cluster=cpu_2",
        "cluster.strategy=single",
        says=("cluster.strategy=single", "this run has 2", "use ddp, fsdp, zero2 or zero3"),
    ),
    bad(
        "nodes without a launcher",
        "cluster.nodes=2",
        says=("cluster.nodes=2", "cluster.launcher=slurm", "torchrun --nnodes 2 --nproc-per-node 1", "-m align"),
    ),
    bad(
        "processes that torchrun has not started",
        "cluster.processes=2",
        env={"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0"},
        says=("has started 4 processes", "cluster asks for 1 x 2", "cluster.nodes=1 cluster.processes=4"),
    ),
    bad(
        "offload with ddp",
        "cluster=cpu_2",
        "cluster.strategy=ddp",
        "cluster.offload=true",
        says=("cluster.offload=true", "cluster.strategy=fsdp, zero2 or zero3", "not with ddp"),
    ),
    bad("offload of one process", "cluster.offload=true", says=("cluster.offload=true", "on the CPU")),
    bad(
        "offload in a plan",
        "plan=true",
        "cluster=cpu_2",
        "cluster.strategy=ddp",
        "cluster.offload=true",
        says=("cluster.offload=true", "cluster.strategy=fsdp, zero2 or zero3", "not with ddp"),
    ),
    bad(
        "zero3 without DeepSpeed",
        "cluster=cpu_2",
        "cluster.strategy=zero3",
        machine=without("deepspeed"),
        says=("cluster.strategy=zero3 needs deepspeed", "pip install deepspeed", "cluster.strategy=fsdp"),
    ),
    bad(
        "slurm without submitit",
        "cluster.launcher=slurm",
        machine=without("submitit"),
        says=("cluster.launcher=slurm needs submitit", "pip install submitit"),
    ),
    bad(
        "slurm where there is none",
        "cluster.launcher=slurm",
        machine=without_slurm,
        says=("cluster.launcher=slurm needs sbatch, srun, scontrol", "login node", "cluster=auto"),
    ),
]


TABLE = [*KEYS, *GROUPS, *OBJECTIVES, *OPTIMIZERS, *DATA, *MODELS, *RUNS, *CLUSTER]
LATER = {  # found when the model, the optimizer or the folder is made
    *("no_weights", "weights_that_are_none", "small_embedding", "attention", "heads_to_initialise", "fit"),
    *("LoRA_field", "LoRA_dropout", "adam_beta", "optim_without_its_package", "run_dir_below_a_file"),
}
TYPED = LATER | {
    *("key_at_the_top", "word_without_=", "recipe", "beta_0", "line_that_is_not_JSON", "hub_model"),
    *("folder_of_another_run", "online", "eight_GPUs_where_there_is_none", "slurm_without_submitit"),
}


@pytest.fixture
def words(case, align, tiny_llama, pairs_file, tmp_path, monkeypatch):
    """The words of a row, on a machine and in a folder that are as the row says."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    case.machine(monkeypatch)
    case.setup(tmp_path, tiny_llama)
    tracker = [f"tracker={case.tracker}"] if case.tracker else []
    return [*(case.words if case.alone else quick(tiny_llama, pairs_file, *case.words)), *tracker]


@pytest.mark.parametrize("case", [row for row in TABLE if row.id not in TYPED])
def test_a_bad_input_is_refused_in_one_line_before_a_model_is_loaded(case, words, refusal, tmp_path):
    before = set(tmp_path.rglob("*"))
    line = refusal(*words)
    for fragment in case.says:
        assert fragment in line
    assert set(tmp_path.rglob("*")) == before, "what is refused leaves nothing behind"


@pytest.mark.parametrize("case", [row for row in TABLE if row.id in TYPED])
def test_a_command_that_is_refused_says_one_line_and_leaves_nothing_behind(case, words, align, tmp_path):
    before = set(tmp_path.rglob("*"))
    result = align(*words, tracker="")
    assert result.status != 0
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("align: ")
    for fragment in case.says:
        assert fragment in lines[0]
    assert set(tmp_path.rglob("*")) == before, "a refused command leaves nothing behind"


def test_every_row_that_is_typed_is_in_the_table():
    assert {row.id for row in TABLE} >= TYPED


@pytest.mark.parametrize("theirs, ours", OWNED.items())
def test_what_decides_a_field_that_is_not_taken_is_a_knob(theirs, ours):
    known = OmegaConf.to_container(OmegaConf.structured(RunConfig))
    known["objective"]["label_smoothing"] = 0.0  # DPO's
    for key in ours.split(" and "):
        node = known
        for name in key.split("."):
            assert name in node, f"{theirs} is said to be decided by {key}"
            node = node[name]
