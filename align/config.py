"""The typed shape of a run: every knob with its default and unit, and nothing else.

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

from align.choices import (
    Backend,
    Device,
    Launcher,
    Layout,
    Precision,
    Rejected,
    ResponseMask,
    Source,
    Strategy,
    SystemMessage,
    TrackerMode,
    TrackerName,
    Truncation,
    WinProb,
)
from align.say import UserError, closest

MISSING: Any = "???"  # what OmegaConf takes for a value that must be given


GROUPS = Path("runs") / "groups"  # a folder of links for each group of runs: what a report of one sweep reads


@dataclass
class ModelConfig:
    """The start model."""

    name: str = MISSING
    path: str | None = None  # hub name, or a folder with config.json and safetensors
    revision: str | None = None  # hub revision; null: the newest
    shape: dict[str, int] = field(default_factory=dict)  # parameters, layers, hidden, vocabulary: for plans offline
    tokenizer: str | None = None  # hub name, folder, or "module:function" beside `init`; null: beside the model
    chat_template: str | None = None  # a Jinja template or the path of one; null: the tokenizer's own
    system_message: SystemMessage = SystemMessage.template
    attn_implementation: str | None = None  # transformers' name of an attention; null: its choice
    trust_remote_code: bool = False
    lora: dict[str, Any] = field(default_factory=dict)  # fields of peft.LoraConfig; empty: train every weight
    init: dict[str, Any] = field(
        default_factory=dict
    )  # instead of path: transformers config fields of a randomly initialised model
    init_seed: int = 0  # apart from `seed`, so that seeds of one study share their start model
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
    rows: str | None = None  # instead of path: "module:function" that makes the rows
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the source's
    wrap_plain: bool = False  # true: a plain prompt and response become one chat turn each
    weight: float = 1.0  # share of this source in a mix


@dataclass
class DatasetConfig(SourceConfig):
    """The preference pairs: one source, or a mix of several."""

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
    """Where the pairs come from. The knobs behind the first are those of self-play."""

    name: Source = Source.dataset
    split_prompts: bool = False  # true: each iteration has its own share of the prompts (SPPO's way); false: all
    candidates: dict[str, str] = field(
        default_factory=dict
    )  # further answers, a name to each: a column of the prompts'


@dataclass
class SamplingConfig:
    """How responses are drawn. The knobs behind the first six do not change them, but for rounding."""

    backend: Backend = Backend.hf
    samples: int = 5  # K, responses to a prompt
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256  # of a response, its stop token included
    prompts_per_shard: int = 64  # what a killed process loses at most, and what processes share the work by
    tokens_per_batch: int = 32768  # backend hf: of prompts and responses that the cache holds at once
    urls: list[str] = field(default_factory=list)  # backend openai, and so are all below: e.g. http://localhost:8000
    served_model: str | None = None  # the policy's name there; null: the first that a server lists
    requests_at_once: int = 64  # over all servers


@dataclass
class JudgeConfig:
    """A language model behind an OpenAI-compatible endpoint; the key is OPENAI_API_KEY of the environment."""

    urls: list[str] = field(default_factory=list)  # http://localhost:8000; several share the requests
    served_model: str | None = None  # the judge's name there
    requests_at_once: int = 16  # over all servers
    request: dict[str, Any] = field(default_factory=dict)  # further fields of a request; null takes one of ours out


@dataclass
class ScorerConfig:
    """Who scores."""

    name: str | None = (
        None  # program, reward_model, armorm, pairrm, llm_judge, one of a package's, or "module:function"; null: the dataset's judge
    )
    path: str | None = None  # program: "module:function"; models: a hub name, or a folder
    revision: str | None = None  # hub revision; null: the newest. llm_judge: what you call the served version
    template: str | None = None  # or its file; null: the tokenizer's chat template, or the judge's own text
    system_message: SystemMessage = SystemMessage.template
    max_length: int | None = None  # tokens of prompt and response; null: what the model can take
    tokens_per_batch: int = 16384  # that go through the model at once, padding included; scores do not depend on it
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class SelectionConfig:
    """How candidates become pairs."""

    rejected: Rejected = Rejected.worst
    win_prob: WinProb = WinProb.all
    temperature: float = 1.0  # P(i beats j) = sigmoid(score difference / temperature); 0: the higher score wins surely
    min_gap: float = 0.0  # between the scores of a pair; of mean wins where the scorer only compares
    drop_identical: bool = True  # prompts to which all samples of the policy are one text


@dataclass
class SlurmConfig:
    """What a job asks of SLURM; null leaves it to the site's default."""

    partition: str | None = None
    account: str | None = None
    minutes: int = 24 * 60  # at its end a run checkpoints and is queued again
    cpus_per_process: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # any other of sbatch, no dashes: {mem: 200G, qos: long}
    setup: list[str] = field(default_factory=list)  # shell lines before the run: module load, source ...
    at_once: int = 256  # jobs of a sweep that run at the same time, at most


@dataclass
class ClusterConfig:
    """What a run runs on."""

    device: Device = Device.auto
    nodes: int = 1
    processes: int | None = None  # per node; null: one for each GPU, one on a CPU
    strategy: Strategy = Strategy.auto
    offload: bool = False  # true: optimizer state, and weights that are sharded, lie in host memory
    precision: Precision = Precision.auto
    gpu_memory_gib: float | None = None  # of one GPU, for plans made elsewhere; null: as this machine's
    cpu_threads: int | None = None  # torch threads of a process; null: the cores, shared out
    launcher: Launcher = Launcher.local
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class EngineConfig:
    """How a policy is fed: decides speed and memory, and results only as far as rounding goes."""

    layout: Layout = Layout.shared  # a model that cannot run it takes the next, and says so
    tokens_per_micro_batch: int | str = "auto"  # that a device holds at once; auto: by free memory, 4096 on a CPU
    gradient_checkpointing: bool = False  # true: activations are computed twice and not kept


@dataclass
class TrackerConfig:
    """Who is told."""

    name: TrackerName = TrackerName.none
    mode: TrackerMode = TrackerMode.auto
    project: str = "align"
    entity: str | None = None  # wandb team or user
    group: str | None = None  # runs to be compared; null: a sweep's own name, of a single run the model and dataset
    tags: list[str] = field(default_factory=list)  # besides objective, model and dataset


@dataclass
class TrainConfig:
    """How pairs become steps."""

    pairs_per_step: int = 128  # the global batch; micro-batches, accumulation and world size cannot change it
    max_length: int = 2048  # tokens of prompt and response
    max_prompt_length: int = 1800  # tokens
    response_mask: ResponseMask = ResponseMask.completion
    truncation: Truncation = Truncation.papers
    log_every_steps: int = 1
    eval_every_steps: int | None = None  # null: only before the first step and after the last
    save_every_steps: int = 100
    keep_checkpoints: int = 2


@dataclass
class SentinelConfig:
    """When a run is beyond hope: it ends then, and says so. A loss that is not finite ends every run."""

    mean_logp_drop: float | None = (
        5.0  # nats per token that chosen responses may fall below the start model's; null: any
    )
    sample_every_steps: int | None = None  # a few held-out prompts are answered so often; null: never
    repetition: float = 0.5  # share of an answer's 4-grams that may repeat an earlier one; more is a collapse


@dataclass
class EvaluationConfig:
    """Sampling for the win rate, where there is a judge: a scorer, or the dataset's own."""

    prompts: int = 160  # held-out prompts, at most
    samples_per_prompt: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass
class RunConfig:
    """A whole run."""

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
    optimizer: dict[str, Any] = field(default_factory=dict)  # fields of transformers.TrainingArguments, their names
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sentinel: SentinelConfig = field(default_factory=SentinelConfig)
    optimized_metric: str | None = (
        None  # of the trained policy in results.json: what a search maximises; null: win_rate, else accuracy/mean_logp
    )
    seed: int = 42
    run_dir: str | None = None  # null: runs/<model>-<dataset>-<objective>-<fingerprint of what decides the result>
    cache_dir: str = MISSING  # prepared data, start models, reference log-probabilities: shared by runs
    plan: bool = False  # true: print what would run, start nothing
    command: str = ""  # what was typed, of a sweep what would be typed for this job alone: align fills it in


def check(cfg: RunConfig) -> None:
    """Raise `UserError` for what no type can refuse, before any data or model is touched."""
    _check_no_extra(cfg, "")
    train, dataset = cfg.train, cfg.dataset
    positive = {
        "train.pairs_per_step": train.pairs_per_step,
        "train.max_length": train.max_length,
        "train.max_prompt_length": train.max_prompt_length,
        "train.log_every_steps": train.log_every_steps,
        "train.eval_every_steps": train.eval_every_steps,
        "train.save_every_steps": train.save_every_steps,
        "train.keep_checkpoints": train.keep_checkpoints,
        "dataset.limit": dataset.limit,
        "dataset.eval_limit": dataset.eval_limit,
        "dataset.weight": dataset.weight,
        "cluster.nodes": cfg.cluster.nodes,
        "cluster.processes": cfg.cluster.processes,
        "cluster.gpu_memory_gib": cfg.cluster.gpu_memory_gib,
        "cluster.cpu_threads": cfg.cluster.cpu_threads,
        "cluster.slurm.minutes": cfg.cluster.slurm.minutes,
        "cluster.slurm.cpus_per_process": cfg.cluster.slurm.cpus_per_process,
        "cluster.slurm.at_once": cfg.cluster.slurm.at_once,
        "evaluation.prompts": cfg.evaluation.prompts,
        "evaluation.samples_per_prompt": cfg.evaluation.samples_per_prompt,
        "evaluation.temperature": cfg.evaluation.temperature,
        "evaluation.max_new_tokens": cfg.evaluation.max_new_tokens,
        "sentinel.mean_logp_drop": cfg.sentinel.mean_logp_drop,
        "sentinel.sample_every_steps": cfg.sentinel.sample_every_steps,
    }
    if isinstance(budget := cfg.engine.tokens_per_micro_batch, int):
        positive["engine.tokens_per_micro_batch"] = budget
    elif budget != "auto":
        raise UserError(f"engine.tokens_per_micro_batch must be a whole number of tokens or auto, not {budget!r}")
    positive |= {f"dataset.mix.{name}.weight": source.weight for name, source in dataset.mix.items()}
    for key, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"{key} must be above 0, not {value}")
    if not 0 < cfg.evaluation.top_p <= 1:
        raise UserError(f"evaluation.top_p must lie in (0, 1], not {cfg.evaluation.top_p}")
    if not 0 < cfg.sentinel.repetition <= 1:
        raise UserError(f"sentinel.repetition must lie in (0, 1], not {cfg.sentinel.repetition}")
    if (every := cfg.sentinel.sample_every_steps) is not None and every % train.log_every_steps:
        raise UserError(
            f"sentinel.sample_every_steps ({every}) must be a multiple of train.log_every_steps "
            f"({train.log_every_steps}): what it finds is logged with a step's metrics"
        )
    if cfg.iterations < 1:
        raise UserError(f"iterations must be 1 or more, not {cfg.iterations}")
    if cfg.iterations > 1 and cfg.source.name is not Source.selfplay:
        raise UserError(f"iterations={cfg.iterations} needs source=selfplay: pairs of a dataset are trained on once")
    if not 0 < dataset.eval_fraction < 1:
        raise UserError(f"dataset.eval_fraction must lie in (0, 1), not {dataset.eval_fraction}")
    if train.save_every_steps % train.log_every_steps:
        raise UserError(
            f"train.save_every_steps ({train.save_every_steps}) must be a multiple of train.log_every_steps "
            f"({train.log_every_steps}): a run that goes on would average other steps than one that was not stopped"
        )
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
    for key, source in {"dataset": dataset, **{f"dataset.mix.{n}": s for n, s in dataset.mix.items()}}.items():
        given = [n for n in ("path", "rows") if getattr(source, n)] + (
            ["mix"] if source is dataset and dataset.mix else []
        )
        if len(given) != 1:
            example = f"{'dataset=local ' if source is dataset else ''}{key}.path=pairs.jsonl"
            raise UserError(
                f"{key} needs one of path, rows or mix, and has {' and '.join(given) or 'none'}: e.g. {example}"
            )


def _check_no_extra(node: Any, prefix: str) -> None:
    """Refuse keys that a `+` smuggled past the types: nothing would read them."""
    known = [field.name for field in fields(node)]
    for name, value in vars(node).items():
        if name not in known:
            raise UserError(
                f"unknown key {prefix}{name}{closest(name, known, prefix)}; {prefix.rstrip('.') or 'the top level'} has {', '.join(known)}"
            )
        if is_dataclass(value):
            _check_no_extra(value, f"{prefix}{name}.")


def is_group(name: str) -> bool:
    """Whether a folder in `GROUPS` can be called so."""
    return Path(name).name == name and name not in ("", "..")


#: In a line of the shell, `export OPENAI_API_KEY=...`, and in an address, `https://user:password@host`.
_SECRET = r"((?:\b[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*=)|(?<=://))(?:(?<==)\S+|[^\s/@]+:[^\s/@]+(?=@))"


def plain(cfg: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, for YAML, JSON and trackers. What looks like a secret is left out."""

    def value(node: Any) -> Any:
        if isinstance(node, Enum):
            return node.value
        if isinstance(node, Mapping):
            return {str(name): value(inner) for name, inner in node.items()}
        if isinstance(node, str):
            return re.sub(_SECRET, r"\1***", node)
        return [value(inner) for inner in node] if isinstance(node, list) else node

    made: dict[str, Any] = value(asdict(cfg))
    return made
