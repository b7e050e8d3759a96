"""The run folder: who may use it, what identifies the run in it, and the links to it from its group."""

import contextlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from align import config
from align.config import RunConfig
from align.data.prompts import Prompts
from align.files import differences, file_fingerprint, write_json
from align.launch.rank import Cluster
from align.model.load import Start
from align.say import UserError, is_first
from objectives import Objective

OF_SELFPLAY = ("source", "sampling", "scorer", "selection", "iterations")  # nodes of self-play; a scorer also judges
_WORTH_KEEPING = ("start.json", "logs/*.traceback", "iter_*/*/*.jsonl")  # in the folder of a run that is refused
_ENDING = 5.0  # seconds in which the processes of a run that was killed are gone


class Prepared(Protocol):
    """What is checked and can be started: one training (train.Job), or self-play (selfplay.Play)."""

    @property
    def cfg(self) -> RunConfig:
        """As the user gave it."""

    @property
    def cluster(self) -> Cluster:
        """Who does it."""

    @property
    def dir(self) -> Path:
        """The run folder."""

    @property
    def policy(self) -> Path:
        """The folder of the trained policy."""

    @property
    def results(self) -> Path:
        """results.json."""

    @property
    def metrics(self) -> Path:
        """Of every step; of several trainings a pattern."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result."""

    @property
    def plan(self) -> str:
        """What would run."""


T = TypeVar("T", bound=Prepared)


@contextlib.contextmanager
def in_its_group(made: Prepared) -> Iterator[None]:
    """Link the run into the folder of its group; a run that is refused leaves no link."""
    link = link_to_group(made)
    try:
        yield
    finally:
        if link is not None and not link.exists():  # the run was refused, and its folder is gone
            link.unlink(missing_ok=True)


def link_to_group(made: Prepared) -> Path | None:
    """A link to the run in the folder of its group; of a run without a group None."""
    if made.cfg.tracker.group is None or not is_first():
        return None
    folder = config.GROUPS / made.cfg.tracker.group
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(os.path.relpath(made.dir.resolve(), folder.resolve()))  # runs/ may be a link to another disk
        link = folder / "-".join(part for part in target.parts if part != "..")
        with contextlib.suppress(FileExistsError):  # of a run that goes on, or of another sweep at this moment
            link.symlink_to(target)
    except OSError as error:
        raise UserError(f"tracker.group: cannot write {folder} ({error.strerror})") from error
    return link


def recognise(job: Prepared) -> None:
    """Refuse a folder that holds another run."""
    known = job.dir / "identity.json"
    if not known.exists():
        return
    try:
        before = json.loads(known.read_text())
    except ValueError as error:
        raise UserError(f"run_dir: {known} is damaged; delete {job.dir} or give another run_dir=") from error
    differs = differences(before, json.loads(json.dumps(job.identity, default=str)))
    if differs:
        raise UserError(f"{job.dir} holds another run ({'; '.join(differs[:4])}); give another run_dir= or delete it")


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """The run folder, which is created, and its lock. A run that is refused before step 1 leaves no folder behind."""
    lock = FileLock(folder / ".lock", timeout=_ENDING)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"another process is training in {folder}; give another run_dir=") from error
    except OSError as error:
        raise UserError(f"run_dir: cannot write {folder} ({error.strerror}); give another run_dir=") from error
    try:
        yield
    except UserError:
        if made and not any(any(folder.glob(pattern)) for pattern in _WORTH_KEEPING):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made[1:]:
                with contextlib.suppress(OSError):  # somebody else's run is there
                    parent.rmdir()
        raise
    finally:
        lock.release()


def open_folder(job: Prepared, first: str = "") -> None:
    """Write down and print what runs; `first` is its first pair."""
    try:
        OmegaConf.save(OmegaConf.create(config.plain(job.cfg)), job.dir / "config.yaml")
        (job.dir / "plan.txt").write_text(job.plan + "\n")
        if first:
            (job.dir / "first_pair.txt").write_text(first + "\n")
        write_json(job.dir / "identity.json", job.identity)
    except OSError as error:
        raise UserError(f"run_dir: cannot write {job.dir} ({error.strerror}); give another run_dir=") from error
    print("\n".join(filter(None, (job.plan, first, f"run folder  {job.dir}"))), flush=True)


def identify(
    config_: dict[str, Any], objective: Objective, start: Start, pairs: str, cluster: Cluster
) -> dict[str, Any]:
    """What decides the result of a training: its settings, start model, pairs (their fingerprint), precision, and the
    code of its objective."""
    indifferent = {
        "tracker",
        "cluster",
        "engine",
        "sentinel",
        "run_dir",
        "cache_dir",
        "plan",
        "optimized_metric",
        "command",
        *OF_SELFPLAY,
    }
    bookkeeping = {
        "log_every_steps",
        "eval_every_steps",
        "save_every_steps",
        "keep_checkpoints",
    }
    settings = {name: value for name, value in config_.items() if name not in indifferent}
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in bookkeeping}
    for node, key in (("model", "path"), ("dataset", "path"), ("dataset", "eval_path")):
        if settings[node][key] is not None and Path(settings[node][key]).expanduser().exists():
            settings[node] = {**settings[node], key: "local"}  # wherever it lies: what it holds is fingerprinted
    code, inner = {}, [objective]
    for part in inner:
        code[type(part).__qualname__] = file_fingerprint(Path(inspect.getfile(type(part))))
        inner += [value for value in vars(part).values() if isinstance(value, Objective)]
    computed = {"device": cluster.device, "bf16": cluster.bf16}
    return {**settings, **computed, "start": start.fingerprint, "pairs": pairs, "objective_code": code}


@dataclass(frozen=True, kw_only=True)
class Play:
    """Self-play that is checked and prepared, as it is handed to the processes."""

    cfg: RunConfig
    start: Start
    prompts: Prompts
    cluster: Cluster
    identity: dict[str, Any]
    dir: Path
    plan: str

    @property
    def results(self) -> Path:
        """Of all iterations that are done."""
        return self.dir / "results.json"

    @property
    def metrics(self) -> Path:
        """A file for each iteration."""
        return self.dir / "iter_*" / "metrics.jsonl"

    @property
    def done(self) -> int:
        """How many iterations are."""
        return len(json.loads(self.results.read_text())["iterations"]) if self.results.exists() else 0

    @property
    def is_done(self) -> bool:
        """Whether as many iterations are done as are asked for: more of them go on from these."""
        return self.done >= self.cfg.iterations

    @property
    def policy(self) -> Path:
        """Of the last iteration, which is the one that results.json is about."""
        return self.folder(max(self.done, self.cfg.iterations)) / "policy"

    def folder(self, iteration: int) -> Path:
        """Of an iteration; 0 is the start model."""
        return self.dir / f"iter_{iteration}"
