"""The typed settings of a run: every knob with its default and unit, and the checks that need nothing else.

Hydra fills these dataclasses from `conf/`, `experiments/` and the command line, and refuses unknown keys and wrong
types. No torch here: `--help`, `--cfg job` and tab completion must answer at once. Not frozen, because OmegaConf
makes frozen nodes read-only before overrides reach them.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from align import choices
from align.say import UserError, unknown_key

MISSING: Any = "???"  # OmegaConf's mark for a value that must be given
GROUPS = Path("runs") / "groups"  # for each group of runs a folder of links to them, which a report can be made of


@dataclass
class ModelConfig:
    """The start model, which is also the reference."""

    name: str = MISSING
    path: str | None = None  # hub name, or a folder with config.json and safetensors
    revision: str | None = None  # hub revision; null: the newest
    shape: dict[str, int] = field(default_factory=dict)  # parameters, layers, hidden, vocabulary: for plans offline
    tokenizer: str | None = None  # hub name, folder, or with `init` "module:function"; null: the model's own
    chat_template: str | None = None  # a Jinja template or the path of one; null: the tokenizer's own
    system_message: choices.SystemMessage = choices.SystemMessage.template
    attn_implementation: str | None = None  # a name of transformers; null: its default
    trust_remote_code: bool = False
    lora: dict[str, Any] = field(default_factory=dict)  # fields of peft.LoraConfig; empty: train every weight
    init: dict[str, Any] = field(default_factory=dict)  # instead of path: transformers config of a random model
    init_seed: int = 0  # not `seed`, so that the seeds of one study share their start model
    fit: str | None = None  # "module:function" that fits a freshly initialised model; the result is cached


@dataclass
class SourceConfig:
    """One source of preference pairs."""

    path: str | None = None  # hub name; a .jsonl, .json or .parquet file; or a folder written by save_to_disk
    config: str | None = None  # hub configuration name
    revision: str | None = None  # hub revision; null: the newest
    split: str = "train"
    eval_path: str | None = None  # held-out pairs; null: from `path`
    eval_split: str | None = None  # null: `eval_fraction` of the training prompts is held out
    rows: str | None = None  # instead of path: "module:function" that returns the rows
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the source's
    wrap_plain: bool = False  # true: a plain prompt and response become one chat turn each
    weight: float = 1.0  # share of this source in a mix


@dataclass
class DatasetConfig(SourceConfig):
    """A data set of preference pairs: one source, or a mix of several."""

    name: str = MISSING
    mix: dict[str, SourceConfig] = field(default_factory=dict)  # several sources, instead of one
    eval_fraction: float = 0.05  # of the prompts, chosen by hash; for sources without held-out pairs
    limit: int | None = None  # at most so many training pairs
    eval_limit: int | None = 2000  # at most so many held-out pairs
    strict: bool = False  # true: a bad row is an error; false: it is dropped and counted
    group_by: str | None = None  # column: held-out accuracy is also reported per value of it
    judge: str | None = None  # "module:function" (prompt, response) -> [0, 1]: adds win rates to the results


@dataclass
class PairSourceConfig:
    """Choice between the dataset's pairs and self-play. Every field but `name` applies to self-play only."""

    name: choices.Source = choices.Source.dataset
    split_prompts: bool = False  # true: each iteration has its own share of the prompts (SPPO's way); false: all
    candidates: dict[str, str] = field(default_factory=dict)  # further answers: a name to each, and its column


@dataclass
class SamplingConfig:
    """Sampling of responses. Fields after `max_new_tokens` change speed and memory; results differ by rounding only."""

    backend: choices.Backend = choices.Backend.hf
    samples: int = 5  # K, responses to a prompt
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256  # of a response, its stop token included
    prompts_per_shard: int = 64  # unit of work among processes; a killed process loses at most one shard
    tokens_per_batch: int = 32768  # backend hf: prompt and response tokens in the cache at once
    urls: list[str] = field(default_factory=list)  # backend openai: e.g. http://localhost:8000
    served_model: str | None = None  # backend openai: the policy's name there; null: the first that a server lists
    requests_at_once: int = 64  # backend openai: over all servers


@dataclass
class JudgeConfig:
    """A language model behind an OpenAI-compatible endpoint; its key is the environment variable OPENAI_API_KEY."""

    urls: list[str] = field(default_factory=list)  # http://localhost:8000; several share the requests
    served_model: str | None = None  # the judge's name there
    requests_at_once: int = 16  # over all servers
    request: dict[str, Any] = field(default_factory=dict)  # further fields of a request; null removes one of ours


@dataclass
class ScorerConfig:
    """The scorer of responses: a program, a reward model or a language model."""

    #: program, reward_model, armorm, pairrm, llm_judge, one of a package, "module:function"; null: the dataset's judge
    name: str | None = None
    path: str | None = None  # program: "module:function"; models: a hub name, or a folder
    revision: str | None = None  # hub revision; null: the newest. llm_judge: your name for the served version
    template: str | None = None  # a template or its file; null: the tokenizer's chat template, or the judge's own text
    system_message: choices.SystemMessage = choices.SystemMessage.template
    max_length: int | None = None  # tokens of prompt and response; null: the model's limit
    tokens_per_batch: int = 16384  # through the model at once, padding included; scores do not depend on it
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class SelectionConfig:
    """Choice of pairs from scored candidates."""

    rejected: choices.Rejected = choices.Rejected.worst
    win_prob: choices.WinProb = choices.WinProb.all
    temperature: float = 1.0  # P(i beats j) = sigmoid(score difference / temperature); 0: the higher score wins surely
    min_gap: float = 0.0  # between the scores of a pair; between mean wins where the scorer only compares
    drop_identical: bool = True  # true: drop prompts to which all samples of the policy are one text


@dataclass
class SlurmConfig:
    """Request of a job to SLURM; null leaves a value to the site's default."""

    partition: str | None = None
    account: str | None = None
    minutes: int = 24 * 60  # at its end a run checkpoints and is queued again
    cpus_per_process: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # any other of sbatch, no dashes: {mem: 200G, qos: long}
    setup: list[str] = field(default_factory=list)  # shell lines before the run: module load, source ...
    at_once: int = 256  # jobs of a sweep that run at the same time, at most


@dataclass
class ClusterConfig:
    """Processes, devices and precision of a run."""

    device: choices.Device = choices.Device.auto
    nodes: int = 1
    processes: int | None = None  # per node; null: one for each GPU, one on a CPU
    strategy: choices.Strategy = choices.Strategy.auto
    offload: bool = False  # true: optimizer state and sharded weights stay in host memory
    precision: choices.Precision = choices.Precision.auto
    gpu_memory_gib: float | None = None  # of one GPU, for plans made on another machine; null: this machine's
    cpu_threads: int | None = None  # torch threads of a process; null: an equal share of the cores
    launcher: choices.Launcher = choices.Launcher.local
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class EngineConfig:
    """Forward and backward of the policy: speed and memory; results differ by rounding only."""

    layout: choices.Layout = choices.Layout.shared  # a model that cannot run it gets the next one, with a message
    tokens_per_micro_batch: int | str = "auto"  # on a device at once; auto: by free memory, 4096 on a CPU
    gradient_checkpointing: bool = False  # true: activations are computed twice and not kept


@dataclass
class TrackerConfig:
    """Destination of metrics besides metrics.jsonl."""

    name: choices.TrackerName = choices.TrackerName.none
    mode: choices.TrackerMode = choices.TrackerMode.auto
    project: str = "align"
    entity: str | None = None  # wandb team or user
    group: str | None = None  # of runs to compare; null: a sweep's own name, for a single run model and dataset
    tags: list[str] = field(default_factory=list)  # added to objective, model and dataset


@dataclass
class TrainConfig:
    """Steps: their size, their tokens, and how often to log, evaluate and save."""

    pairs_per_step: int = 128  # the global batch; micro-batches, accumulation and world size cannot change it
    max_length: int = 2048  # tokens of prompt and response
    max_prompt_length: int = 1800  # tokens
    response_mask: choices.ResponseMask = choices.ResponseMask.completion
    truncation: choices.Truncation = choices.Truncation.papers
    log_every_steps: int = 1
    eval_every_steps: int | None = None  # null: only before the first step and after the last
    save_every_steps: int = 100
    keep_checkpoints: int = 2


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule, under the names and with the defaults of transformers.TrainingArguments."""

    learning_rate: float = 5e-5
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None  # "momentum=0.9,nesterov=true"; null: the optimizer's own defaults
    optim_target_modules: Any = None  # of GaLore and APOLLO: names of linear layers, or all-linear
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0  # of all weights but norms and biases
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to this length; 0: never
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0.0  # below 1: a share of all steps
    num_train_epochs: float = 3.0
    max_steps: int = -1  # above 0: counts instead of the epochs


@dataclass
class SentinelConfig:
    """Limits beyond which a run has collapsed and ends early. A loss that is not finite ends every run."""

    mean_logp_drop: float | None = 5.0  # nats per token of chosen responses below the start model; null: no limit
    sample_every_steps: int | None = None  # interval at which a few held-out prompts are answered; null: never
    repetition: float = 0.5  # share of an answer's 4-grams that may repeat an earlier one


@dataclass
class EvaluationConfig:
    """Sampling for the win rate, which is measured if there is a judge: a scorer, or the dataset's own."""

    prompts: int = 160  # held-out prompts, at most
    samples_per_prompt: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass
class RunConfig:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    source: PairSourceConfig = field(default_factory=PairSourceConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    iterations: int = 1  # of self-play: sample, score, choose pairs, train
    objective: dict[str, Any] = field(default_factory=dict)  # name and hyperparameters; objectives.build checks them
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sentinel: SentinelConfig = field(default_factory=SentinelConfig)
    optimized_metric: str | None = None  # of results.json, for a search; null: win_rate, else accuracy/mean_logp
    seed: int = 42
    run_dir: str | None = None  # null: runs/<model>-<dataset>-<objective>-<fingerprint of all that decides the result>
    cache_dir: str = MISSING  # prepared data, start models, reference log-probabilities: shared by runs
    plan: bool = False  # true: print what would run, start nothing
    command: str = ""  # filled in by align: the command of this run, or of this job of a sweep alone


#: Numbers that may be 0 or less, and numbers that may be 1 at most. All others are above 0; optim.py checks its own.
_UNBOUNDED = ("seed", "model.init_seed", "selection.temperature", "selection.min_gap")
_SHARES = ("top_p", "repetition")


def check(cfg: RunConfig) -> None:
    """Raise `UserError` for settings that no type can refuse, before any data or model is touched."""
    sources = {"dataset": cfg.dataset, **{f"dataset.mix.{name}": source for name, source in cfg.dataset.mix.items()}}
    for key, node in {"": cfg, **sources}.items():
        check_node(node, key and f"{key}.")
    train, every, budget = cfg.train, cfg.sentinel.sample_every_steps, cfg.engine.tokens_per_micro_batch
    if isinstance(budget, str) and budget != "auto":
        raise UserError(f"engine.tokens_per_micro_batch must be a whole number of tokens or auto, not {budget!r}")
    if cfg.dataset.eval_fraction >= 1:
        raise UserError(f"dataset.eval_fraction must lie in (0, 1), not {cfg.dataset.eval_fraction}")
    if cfg.iterations > 1 and cfg.source.name is not choices.Source.selfplay:
        raise UserError(f"iterations={cfg.iterations} needs source=selfplay: pairs of a dataset are trained on once")
    for key, steps, why in (
        (
            "train.save_every_steps",
            train.save_every_steps,
            "a run that goes on would average other steps than a whole one",
        ),
        ("sentinel.sample_every_steps", every or 0, "what it finds is logged with a step's metrics"),
    ):
        if steps % train.log_every_steps:
            found = f"({steps}) must be a multiple of train.log_every_steps ({train.log_every_steps})"
            raise UserError(f"{key} {found}: {why}")
    if train.max_prompt_length >= train.max_length:
        raise UserError(
            f"train.max_prompt_length ({train.max_prompt_length}) must be below train.max_length "
            f"({train.max_length}): the difference is what is left of a response when both are too long"
        )
    if (cfg.model.path is None) == (not cfg.model.init):
        raise UserError(
            "give model.path (a hub name or a folder) or model.init (config fields), and not both; "
            "for a model of yours type model=local model.path=<folder or hub name>"
        )
    for key, source in sources.items():
        origins = [name for name in ("path", "rows", "mix") if getattr(source, name, None)]
        if len(origins) != 1:
            example = f"{'dataset=local ' if key == 'dataset' else ''}{key}.path=pairs.jsonl"
            raise UserError(
                f"{key} needs one of path, rows or mix, and has {' and '.join(origins) or 'none'}: e.g. {example}"
            )


def check_node(node: Any, prefix: str) -> None:
    """Raise `UserError` for a number out of range, and for a key that a `+` smuggled past the types."""
    known = [field.name for field in fields(node)]
    for name, value in vars(node).items():
        key = f"{prefix}{name}"
        if name not in known:
            raise UserError(unknown_key(key, known))
        if is_dataclass(value):
            check_node(value, f"{key}.")
        elif name in _SHARES and not 0 < value <= 1:
            raise UserError(f"{key} must lie in (0, 1], not {value}")
        elif type(value) in (int, float) and prefix != "optimizer." and key not in _UNBOUNDED and not value > 0:
            raise UserError(f"{key} must be above 0, not {value}")


def is_group(name: str) -> bool:
    """Tell whether a folder in `GROUPS` can have this name."""
    return Path(name).name == name and name not in ("", "..")


#: A secret in a line of shell, `export OPENAI_API_KEY=...`, or in an address, `https://user:password@host`.
_SECRET = r"((?:\b[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*=)|(?<=://))(?:(?<==)\S+|[^\s/@]+:[^\s/@]+(?=@))"


def plain(cfg: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain values, for YAML, JSON and trackers. What looks like a secret is hidden."""

    def value(node: Any) -> Any:
        if isinstance(node, Enum):
            return node.value
        if isinstance(node, Mapping):
            return {str(name): value(inner) for name, inner in node.items()}
        if isinstance(node, str):
            return re.sub(_SECRET, r"\1***", node)
        return [value(inner) for inner in node] if isinstance(node, list) else node

    values: dict[str, Any] = value(asdict(cfg))
    return values
