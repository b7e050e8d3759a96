"""What a suite is given and returns, and what suites share: a trained run, its answers, their scores.

A suite is a module align/evaluation/<kind>.py with three functions:

    made_of(given)      what decides its results besides settings, policy and sampling, such as fingerprints of files;
                        refuses what can be refused before the work
    work(given, where)  in each process: the heavy part, shared by files of the folder, where nothing is made twice
    measure(given)      in the first: from those files an Outcome, or None where somebody else has to judge them first
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.choices import Source
from align.config import RunConfig, SamplingConfig, SourceConfig
from align.data.prompts import PromptRow
from align.data.rows import read_rows
from align.evaluation.settings import SuiteConfig
from align.files import fingerprint
from align.launch.rank import Cluster, Rank
from align.model.load import start_model
from align.model.policy import Policy, trained_from
from align.onpolicy.pairs import scored_prompts
from align.onpolicy.sample import ResponseRow, read_samples, sample_from
from align.onpolicy.score import read_scores, score_responses
from align.onpolicy.scorers import registry
from align.onpolicy.select import ScoredPrompt
from align.say import UserError


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run folder that is complete, ordinary or of self-play."""

    dir: Path
    cfg: RunConfig  # as it was typed
    iterations: int  # of self-play; 0 of an ordinary run

    @property
    def saved(self) -> Path:
        """The folder of its policy, with the model card."""
        if self.iterations:
            return self._iteration(self.iterations) / "policy"
        alone = self.dir / "model"
        return alone if alone.is_dir() else self.dir / "policy"  # of an iteration of self-play by itself

    @property
    def judged(self) -> Path:
        """The folder of what its own judge has seen and said."""
        return (self._iteration(self.iterations) if self.iterations else self.dir) / "evaluation"

    @property
    def name(self) -> str:
        """The name that others give its answers."""
        return self.dir.resolve().name

    def start(self, cache: Path) -> Policy:
        """Where its training began; made anew where it is a built-in one that the cache lacks."""
        return Policy(iteration=0, cfg=self.cfg.model, start=start_model(self.cfg, cache))

    def policy(self, cache: Path) -> Policy:
        """The policy that it has trained, with its adapter merged into it where there is one."""
        return self.policies(cache)[-1]

    def policies(self, cache: Path) -> list[Policy]:
        """The start model, and the policy of each training."""
        made = [self.start(cache)]
        for number in range(1, self.iterations + 1):
            made.append(trained_from(made[-1], self._iteration(number) / "policy", cache))
        return made if self.iterations else [*made, trained_from(made[-1], self.saved, cache)]

    def _iteration(self, number: int) -> Path:
        return self.dir / f"iter_{number}"


def trained_run(key: str, path: str) -> TrainedRun:
    """The run in a folder; `key` is the knob that named it.

    Raises:
        UserError: it is no run folder, or one of a run that is not complete.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise absent(key, path)
    if not (folder / "config.yaml").is_file():
        inside = sorted(file.parent.name for file in folder.glob("*/config.yaml"))
        runs = f"; there are runs in it: {', '.join(inside[:4])}" if inside else ""
        raise UserError(f"{key}={path} is no run folder, as it has no config.yaml{runs}")
    cfg = _config(key, folder)
    if not (folder / "results.json").is_file():
        raise UserError(f"{key}={path} is not complete{_remedy(folder)}")
    results = json.loads((folder / "results.json").read_text())
    made = len(results["iterations"]) if cfg.source.name is Source.selfplay else 0
    found = TrainedRun(dir=folder, cfg=cfg, iterations=made)
    if not found.saved.is_dir():
        raise UserError(f"{key}={path} has lost its trained model: there is no {found.saved}")
    return found


def _config(key: str, folder: Path) -> RunConfig:
    """What a run has written down of itself, typed again."""
    try:
        cfg: Any = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(folder / "config.yaml"))
        )
    except (OmegaConfBaseException, OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{key}={folder}: its config.yaml is of another version of align, or damaged ({why})") from None
    made: RunConfig = cfg
    return made


def _remedy(folder: Path) -> str:
    """How a run without results comes to some."""
    collapsed, command = folder / "collapsed.json", folder / "command.txt"
    if collapsed.is_file():
        return f" and never will be: it collapsed ({json.loads(collapsed.read_text())['why']}); evaluate another run"
    typed = f" ({command.read_text().strip()})" if command.is_file() else ""
    return f": the command that began it{typed} finishes it when it is typed again"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a suite is given."""

    run: TrainedRun
    policy: Policy
    cfg: RunConfig  # the run's, but who scores, what it runs on, the cache and the seed are the command's
    scored_by_name: bool  # the command names a scorer
    suite: SuiteConfig
    sampling: SamplingConfig
    folder: Path  # of what is made
    cluster: Cluster

    @property
    def cache(self) -> Path:
        """Shared by runs."""
        return Path(self.cfg.cache_dir).expanduser()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a suite has found."""

    results: Mapping[str, float]  # by names that the suite's own is put before
    note: str  # what was measured, in a line, for people


_FILES = (".jsonl", ".json", ".parquet")  # that rows are read from


OURS, THEIRS = "policy", "opponent"  # whose answers they are; each has random numbers of its own


def answer(given: Evaluation, policy: Policy, prompts: Sequence[PromptRow], whose: str, rank: Rank) -> None:
    """Answers of a policy to prompts, as far as they are not there; `answers_of` reads them."""
    sample_from(
        policy,
        [replace(prompt, candidates=()) for prompt in prompts],
        given.cfg,
        given.sampling,
        _folder_of(given, whose),
        int(whose == OURS),
        f"answers of the {whose}",
        rank,
    )


def answers_of(given: Evaluation, whose: str) -> list[ResponseRow]:
    """What `answer` has made."""
    return read_samples(_folder_of(given, whose))


def _folder_of(given: Evaluation, whose: str) -> Path:
    return given.folder / ("responses" if whose == OURS else f"responses_of_{whose}")


def score(given: Evaluation, rows: Sequence[ResponseRow], rank: Rank) -> None:
    """Scores of answers, as far as they are not there; `scored` reads them."""
    score_responses(rows, given.cfg, given.folder / "scores", rank)


def scored(given: Evaluation, rows: Sequence[ResponseRow]) -> list[ScoredPrompt]:
    """The answers with the scores that `score` has made."""
    return list(scored_prompts(rows, read_scores(given.folder / "scores")))


def scorer_identity(given: Evaluation) -> dict[str, Any]:
    """Who scores, checked before anything is sampled."""
    here = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)
    identity = registry.build(registry.scorer_of(given.cfg), here).identity
    return {**asdict(identity), "kind": identity.kind.value}


def absent(key: str, path: str) -> UserError:
    """What is said of a file or folder that is not there."""
    return UserError(f"{key}={path} does not exist; it is taken from the working folder {Path.cwd()}")


def check_place(key: str, path: str) -> None:
    """Raise for a misspelled path: what is not there, and looks more like a file than like owner/name of the hub."""
    place = Path(path).expanduser()
    beside = "/" in path and place.parent.is_dir()  # its folder is there
    if not place.exists() and (place.suffix in _FILES or path.count("/") > 1 or "\\" in path or beside):
        raise absent(key, path)


@contextlib.contextmanager
def in_words_of(suite: str) -> Iterator[None]:
    """Errors about the dataset that a word of the suite stands for, in that word."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("dataset.path", suite).replace("dataset.", "suite.")) from error


def questions(given: Evaluation, texts: Sequence[str]) -> list[PromptRow]:
    """Questions as the policy is asked them, each once: a user turn, or a plain text where it has no chat template."""
    chats = given.policy.start.tokenizer.chat_template is not None
    return [
        PromptRow(id=fingerprint(text), text=[{"role": "user", "content": text}] if chats else text, split="held_out")
        for text in dict.fromkeys(texts)
    ]


def check_one_answer(given: Evaluation) -> None:
    """Raise where several answers to a question are asked for."""
    if given.sampling.samples != 1:
        raise UserError(
            f"suite={given.suite.kind} takes one answer to a question, not sampling.samples={given.sampling.samples}"
        )


def answers_by_text(given: Evaluation, texts: Sequence[str]) -> dict[str, str]:
    """The policy's answer to each of the `questions`, without white space at its ends."""
    said = {row.prompt_id: row.response.strip() for row in answers_of(given, OURS)}
    return {text: said[fingerprint(text)] for text in texts}


def read_table(key: str, path: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a .json, .jsonl or .parquet file.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    if not Path(path).expanduser().exists():  # read_rows would look for it on the hub, which has none of these
        raise absent(key, path)
    made = [dict(row) for row in read_rows(key, path, "train", SourceConfig(path=path)).rows]
    for number, row in enumerate(made, 1):
        if missing := [name for name in columns if name not in row]:
            raise UserError(f"{key}={path}, row {number} has no {missing[0]!r}; it has {', '.join(row)}")
    if not made:
        raise UserError(f"{key}={path} is empty")
    return made
