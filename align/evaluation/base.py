"""The interface of a suite, and what suites share: a trained run, its answers to questions, tables of others.

A suite is a module align/evaluation/<kind>.py with three functions:

    inputs(evaluation)      values that decide its results besides settings, policy and sampling, such as fingerprints of
                            files; refuses what can be refused before the work
    work(evaluation, rank)  the heavy part, in each process; they share it by files of the folder
    measure(evaluation)     the results by name, and a line that says what was measured, from those files in the first
                            process; None where somebody else has to judge first
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.choices import Source
from align.config import RunConfig, SourceConfig
from align.data.prompts import PromptRow
from align.data.rows import read_rows
from align.evaluation.judging import Contestant, answer
from align.evaluation.settings import SuiteConfig, typed
from align.files import as_json, fingerprint
from align.launch.rank import Cluster, Rank
from align.model.load import Policy, start_model, trained_from
from align.onpolicy.sample import ResponseRow, read_samples
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import last_turn
from align.say import UserError

OURS, THEIRS = "policy", "opponent"  # origins of answers
TABLES = (".jsonl", ".json", ".parquet")  # files that rows are read from
Settings = TypeVar("Settings", bound=SuiteConfig)


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run folder that is complete, ordinary or of self-play."""

    dir: Path
    cfg: RunConfig  # as it was typed
    iterations: int  # of self-play; 0 of an ordinary run
    cache: Path  # what runs share

    @property
    def last(self) -> Path:
        """The folder of its last training."""
        return self.dir / f"iter_{self.iterations}" if self.iterations else self.dir

    @property
    def saved(self) -> Path:
        """The folder of its policy, with the model card."""
        model = self.last / "model"
        return model if model.is_dir() else self.last / "policy"  # of an iteration of self-play

    @property
    def name(self) -> str:
        """The name of its answers in the formats of others."""
        return self.dir.resolve().name

    def start(self) -> Policy:
        """Return the start model; a built-in one that the cache lacks is made anew."""
        return Policy(iteration=0, cfg=self.cfg.model, start=start_model(self.cfg, self.cache))

    def policies(self) -> list[Policy]:
        """Return the start model, and the policy of each training, with its adapter merged where there is one."""
        folders = [self.dir / f"iter_{number}" / "policy" for number in range(1, self.iterations + 1)]
        policies = [self.start()]
        for folder in folders or [self.saved]:
            policies.append(trained_from(policies[-1], folder, self.cache))
        return policies


def trained_run(key: str, path: str, cache: Path) -> TrainedRun:
    """Return the complete run in a folder; `key` is the knob that named it."""
    folder = existing(key, path)
    if not (folder / "config.yaml").is_file():
        inside = sorted(file.parent.name for file in folder.glob("*/config.yaml"))
        runs = f"; there are runs in it: {', '.join(inside[:4])}" if inside else ""
        raise UserError(f"{key}={path} is no run folder, as it has no config.yaml{runs}")
    try:
        cfg: RunConfig = typed(key, RunConfig, OmegaConf.load(folder / "config.yaml"))
    except (OmegaConfBaseException, OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{key}={folder}: its config.yaml is of another version of align, or damaged ({why})") from None
    if not (folder / "results.json").is_file():
        raise UserError(f"{key}={path} is not complete{_remedy(folder)}")
    results = json.loads((folder / "results.json").read_text())
    iterations = len(results["iterations"]) if cfg.source.name is Source.selfplay else 0
    run = TrainedRun(dir=folder, cfg=cfg, iterations=iterations, cache=cache)
    if not run.saved.is_dir():
        raise UserError(f"{key}={path} has lost its trained model: there is no {run.saved}")
    return run


def _remedy(folder: Path) -> str:
    """Say how a run without results comes to some."""
    collapsed, command = folder / "collapsed.json", folder / "command.txt"
    if collapsed.is_file():
        return f" and never will be: it collapsed ({json.loads(collapsed.read_text())['why']}); evaluate another run"
    words = f" ({command.read_text().strip()})" if command.is_file() else ""
    return f": the command that began it{words} finishes it when it is typed again"


@dataclass(frozen=True, kw_only=True)
class Evaluation(Generic[Settings]):
    """One suite on one run, checked and prepared."""

    run: TrainedRun
    policy: Policy
    cfg: RunConfig  # the run's, but scorer, cluster, cache, seed and sampling are the command's
    scored_by_name: bool  # the command names a scorer
    suite: Settings
    folder: Path  # of its files
    cluster: Cluster


def check_one_answer(evaluation: Evaluation[Any]) -> None:
    """Raise where several answers to a question are asked for."""
    if (samples := evaluation.cfg.sampling.samples) != 1:
        raise UserError(f"suite={evaluation.suite.kind} takes one answer to a question, not sampling.samples={samples}")


def ask(evaluation: Evaluation[Any], texts: Sequence[str], rank: Rank) -> None:
    """Let the policy answer questions, each once: as a user turn, or as plain text where it has no chat template."""
    chats = evaluation.policy.start.tokenizer.chat_template is not None
    prompts = [
        PromptRow(id=fingerprint(text), text=[{"role": "user", "content": text}] if chats else text, split="held_out")
        for text in dict.fromkeys(texts)
    ]
    policy = Contestant(name=OURS, policy=evaluation.policy, stream=1, folder=evaluation.folder / "responses")
    answer(policy, prompts, evaluation.cfg, evaluation.cfg.sampling, rank)


def answers(evaluation: Evaluation[Any]) -> dict[str, ResponseRow]:
    """Return the policy's answer to each question that `ask` has put, without white space at its ends."""
    rows = read_samples(evaluation.folder / "responses")
    return {last_turn(row.prompt): replace(row, response=row.response.strip()) for row in rows}


def scorer_identity(evaluation: Evaluation[Any]) -> dict[str, Any]:
    """Return the identity of the scorer, which is checked before anything is sampled."""
    first = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)
    identity: dict[str, Any] = as_json(asdict(registry.build(registry.scorer_of(evaluation.cfg), first).identity))
    return identity


def existing(key: str, path: str) -> Path:
    """Return the path of a file or folder that a knob names; an error where it does not exist."""
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{key}={path} does not exist; it is taken from the working folder {Path.cwd()}")
    return place


def read_table(key: str, path: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a .json, .jsonl or .parquet file, each of which has these columns."""
    existing(key, path)  # read_rows would look for it on the hub, which has none of these
    rows = [dict(row) for row in read_rows(key, path, "train", SourceConfig(path=path)).rows]
    for number, row in enumerate(rows, 1):
        if missing := [name for name in columns if name not in row]:
            raise UserError(f"{key}={path}, row {number} has no {missing[0]!r}; it has {', '.join(row)}")
    if not rows:
        raise UserError(f"{key}={path} is empty")
    return rows


@contextlib.contextmanager
def in_place_of_dataset(key: str, path: str | None) -> Iterator[None]:
    """Name a knob of the suite, in place of dataset.path for which it stands, in errors of the block.

    A path that is not there and looks more like a file than like owner/name of the hub is misspelled.
    """
    if path is not None:
        place = Path(path).expanduser()
        in_a_folder = "/" in path and place.parent.is_dir()
        if place.suffix in TABLES or path.count("/") > 1 or "\\" in path or in_a_folder:
            existing(key, path)
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("dataset.path", key).replace("dataset.", "suite.")) from error
