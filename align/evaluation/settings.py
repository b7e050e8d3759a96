"""The typed shape of an evaluation, `align evaluate run=<folder> suite=<suite>`: every knob with its default.

`suite` and `sampling` are typed when they are read: the first has the knobs of its kind only, and the second falls back
to the run's own. No torch here: `--help` must answer at once.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from align.config import MISSING, ClusterConfig, ScorerConfig


@dataclass
class EvaluateConfig:
    """One suite on one run."""

    run: str = MISSING  # the folder of a run that is complete
    suite: dict[str, Any] = field(default_factory=dict)  # one of SUITES
    sampling: dict[str, Any] = field(default_factory=dict)  # of SamplingConfig; else as the run's own evaluation
    scorer: ScorerConfig = field(default_factory=ScorerConfig)  # name null: the run's own
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed: int | None = None  # of the answers; null: the run's
    cache_dir: str = MISSING  # as the run's


@dataclass
class SuiteConfig:
    """The knobs that every suite has."""

    kind: str = MISSING  # which suite
    name: str = MISSING  # of its folder under <run>/evaluation and before its results: another for other settings
    limit: int | None = None  # at most so many pairs, prompts, questions, or examples of a task; the first ones


@dataclass
class PairsConfig(SuiteConfig):
    """Accuracies on preference pairs."""

    path: str | None = None  # as dataset.path; null: the run's held-out pairs
    split: str = "train"  # of a hub set or a save_to_disk folder
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the source's
    wrap_plain: bool = False  # true: a plain prompt and response become one chat turn each
    group_by: str | None = None  # column: accuracies are also reported per value of it


@dataclass
class JudgeConfig(SuiteConfig):
    """The run's answers against others, by a scorer. `limit` null: the run's evaluation.prompts."""

    against: str | None = None  # a run folder, or a file of prompts and responses; null: the start model
    prompts: str | None = None  # as dataset.path; null: the run's held-out prompts
    wrap_plain: bool = False  # true: a plain prompt becomes a chat turn


@dataclass
class AlpacaEvalConfig(SuiteConfig):
    """AlpacaEval 2. Files are its own; hub: from its dataset, tatsu-lab/alpaca_eval."""

    instructions: str = "hub"  # rows of instruction, and dataset
    reference: str = "hub"  # rows of instruction, output and generator, which the answers are compared with
    annotations: str | None = None  # a judge's, in AlpacaEval's format, of the answers written here
    difficulties: str | None = None  # df_gamed.csv, or hub; null: the length-controlled win rate does without


@dataclass
class ArenaHardConfig(SuiteConfig):
    """Arena-Hard-Auto: answers in its format, and its judgments read back."""

    questions: str = MISSING  # its question.jsonl
    judgments: str | None = None  # the file that its gen_judgment.py has made of the answers written here


@dataclass
class LmEvalConfig(SuiteConfig):
    """Tasks of EleutherAI's lm-evaluation-harness."""

    tasks: list[str] = field(default_factory=list)  # their names there
    num_fewshot: int | None = None  # null: as the task has it
    task_folder: str | None = None  # with tasks of yours, a YAML file each
    chat_template: bool = False  # true: questions are put as chat turns
    batch_size: int = 8  # requests at once
    start: bool = True  # also the start model, once for all runs that share the cache: what training cost


SUITES: dict[str, type[SuiteConfig]] = {
    "pairs": PairsConfig,
    "judge": JudgeConfig,
    "alpaca_eval": AlpacaEvalConfig,
    "arena_hard": ArenaHardConfig,
    "lm_eval": LmEvalConfig,
}


def typed(key: str, shape: Any, words: Any) -> Any:
    """Return an instance of a dataclass with these words, or a copy of an instance; an error names the key."""
    node = OmegaConf.merge(OmegaConf.create({key: OmegaConf.structured(shape)}), {key: words})
    merged: Any = OmegaConf.to_object(node)
    return merged[key]
