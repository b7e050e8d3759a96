"""A run, its iterations and its folder: who may use it, what identifies the run in it, and links to it from its group.

<run folder>/results.json      the start model and the trained policy, in figures
            /iter_0/, iter_1/  of self-play: the start model's answers, and a folder for each iteration

Offline training is one iteration whose pairs are given.
"""

import contextlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from align import config
from align.choices import Source
from align.config import RunConfig
from align.data.pairs import Pairs, show_pair
from align.data.prompts import Prompts
from align.files import differences, file_fingerprint, fingerprint, write_json, writing
from align.launch.rank import Cluster, inside, join, leave
from align.model.load import Policy, Start
from align.onpolicy.scorers.base import Identity
from align.say import UserError, is_first
from align.train.checkpoint import check_checkpoint
from objectives import Objective

#: Keys that cannot change a result, or that are written down otherwise.
_INDIFFERENT = (
    "tracker", "cluster", "engine", "sentinel", "run_dir", "cache_dir", "plan", "optimized_metric", "command",
)  # fmt: skip
_OF_SELFPLAY = ("source", "sampling", "scorer", "selection", "iterations")
_BOOKKEEPING = ("log_every_steps", "eval_every_steps", "save_every_steps", "keep_checkpoints")  # of `train`
_SPEED = ("tokens_per_batch", "urls", "served_model", "requests_at_once")  # of `sampling`
_WORTH_KEEPING = ("start.json", "logs/*.traceback", "iter_*/*/*.jsonl")  # in the folder of a run that is refused
_ENDING = 5.0  # seconds in which the processes of a run that was killed are gone


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is checked and prepared."""

    cfg: RunConfig
    start: Start
    source: Pairs | Prompts  # the pairs of a dataset, or the prompts that self-play makes pairs of
    cluster: Cluster
    identity: dict[str, Any]
    dir: Path
    plan: str  # what would run, in words

    @property
    def is_selfplay(self) -> bool:
        """True when every iteration samples its own pairs."""
        return isinstance(self.source, Prompts)

    @property
    def results(self) -> Path:
        """The file of the run's figures, written when all requested iterations are complete."""
        return self.dir / "results.json"

    @property
    def done(self) -> int:
        """The number of complete iterations that results.json is about."""
        if not self.results.exists():
            return 0
        return len(json.loads(self.results.read_text())["iterations"]) if self.is_selfplay else 1

    @property
    def is_complete(self) -> bool:
        """True when all requested iterations are complete; a larger `iterations` resumes from here."""
        return self.done >= self.cfg.iterations

    @property
    def start_policy(self) -> Policy:
        """The start model as a policy."""
        return Policy(iteration=0, cfg=self.cfg.model, start=self.start)

    @property
    def cache(self) -> Path:
        """The folder of what runs share."""
        return Path(self.cfg.cache_dir).expanduser()

    @property
    def iterations(self) -> "list[Iteration]":
        """The requested iterations, in order."""
        return [Iteration(run=self, number=number) for number in range(1, self.cfg.iterations + 1)]


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One training of a run, with its pairs before it and its evaluation behind it. Number 0 is the start model."""

    run: Run
    number: int

    @property
    def folder(self) -> Path:
        """The folder of its files: the run folder itself where the pairs are given."""
        return self.run.dir / f"iter_{self.number}" if self.run.is_selfplay else self.run.dir

    @property
    def policy(self) -> Path:
        """The folder of the policy that it trains."""
        return self.folder / ("policy" if self.run.is_selfplay else "model")

    @property
    def trained(self) -> Path:
        """The file of its training's figures; it exists when the policy does."""
        return self.folder / ("results.json" if self.run.is_selfplay else "trained.json")

    @property
    def summary(self) -> Path:
        """The file of the iteration's figures; it exists when the iteration is complete."""
        return self.folder / ("summary.json" if self.run.is_selfplay else "results.json")


def link_to_group(run: Run) -> Path | None:
    """Link the run into the folder of its group, and return the link; None for a run without a group."""
    if run.cfg.tracker.group is None or not is_first():
        return None
    folder = config.GROUPS / run.cfg.tracker.group
    with writing(f"tracker.group: cannot write {folder}", ""):
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(os.path.relpath(run.dir.resolve(), folder.resolve()))  # runs/ may be a link to another disk
        link = folder / "-".join(part for part in target.parts if part != "..")
        with contextlib.suppress(FileExistsError):  # of a run that goes on, or of another sweep at this moment
            link.symlink_to(target)
    return link


def recognise(run: Run) -> None:
    """Refuse a folder that holds another run."""
    known = run.dir / "identity.json"
    if not known.exists():
        return
    try:
        before = json.loads(known.read_text())
    except ValueError as error:
        raise UserError(f"run_dir: {known} is damaged; delete {run.dir} or give another run_dir=") from error
    if differs := differences(before, json.loads(json.dumps(run.identity, default=str))):
        raise UserError(f"{run.dir} holds another run ({'; '.join(differs[:4])}); give another run_dir= or delete it")


@contextlib.contextmanager
def owned(run: Run) -> Iterator[None]:
    """Lock the run folder, and write down what runs. It is gone again if the run is refused before its first step.

    Processes that were started from outside all learn of a refusal, as none of them may wait for the first.
    """
    with contextlib.ExitStack() as held:

        def begin() -> None:
            if link := link_to_group(run):  # gone again with the folder of a run that is refused
                held.callback(lambda: None if link.exists() else link.unlink(missing_ok=True))
            held.enter_context(_locked(run.dir))
            for iteration in run.iterations:
                check_checkpoint(iteration.folder / "checkpoints", run.cluster)
            open_folder(run)

        if inside() and run.cluster.world > 1:
            rank = join(run.cluster)
            try:
                rank.from_first(begin)
            finally:
                leave()
        else:
            begin()
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create and lock the run folder. A run that is refused before step 1 leaves no folder behind."""
    lock = FileLock(folder / ".lock", timeout=_ENDING)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise UserError(f"another process is training in {folder}; give another run_dir=") from error
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


def open_folder(run: Run) -> None:
    """Write down and print what runs, with its first pair if the pairs are there."""
    first = show_pair(run.source.train[0], run.start.tokenizer) if isinstance(run.source, Pairs) else ""
    with _writing(run.dir):
        OmegaConf.save(OmegaConf.create(config.plain(run.cfg)), run.dir / "config.yaml")
        (run.dir / "plan.txt").write_text(run.plan + "\n")
        if first:
            (run.dir / "first_pair.txt").write_text(first + "\n")
        write_json(run.dir / "identity.json", run.identity)
    print("\n".join(filter(None, (run.plan, first, f"run folder  {run.dir}"))), flush=True)


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    return writing(f"run_dir: cannot write {folder}", "; give another run_dir=")


def identify(
    cfg: RunConfig, objective: Objective, start: Start, data: str, cluster: Cluster, scorer: Identity | None
) -> dict[str, Any]:
    """Return the values that decide the result of a run, by key; what only decides how fast it comes is left out.

    `data` is the fingerprint of the pairs or prompts; `scorer` scores in self-play, or judges in place of the dataset's.
    """
    everything = config.plain(cfg)
    settings = {name: value for name, value in everything.items() if name not in (*_INDIFFERENT, *_OF_SELFPLAY)}
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in _BOOKKEEPING}
    for node, key in (("model", "path"), ("dataset", "path"), ("dataset", "eval_path")):
        if settings[node][key] is not None and Path(settings[node][key]).expanduser().exists():
            settings[node] = {**settings[node], key: "local"}  # wherever it lies: what it holds is fingerprinted
    code, inner = {}, [objective]
    for part in inner:
        code[type(part).__qualname__] = file_fingerprint(Path(inspect.getfile(type(part))))
        inner += [value for value in vars(part).values() if isinstance(value, Objective)]
    computed = {"device": cluster.device, "bf16": cluster.bf16}
    known = {**settings, **computed, "start": start.fingerprint, "pairs": data, "objective_code": code}
    if cfg.source.name is Source.selfplay:
        known |= {name: everything[name] for name in ("source", "selection")}
        known["sampling"] = {key: value for key, value in everything["sampling"].items() if key not in _SPEED}
        if cfg.source.split_prompts:  # else more iterations go on from those that are done
            known["iterations"] = cfg.iterations
    if scorer is not None:
        judge = {key: everything["scorer"]["judge"][key] for key in ("served_model", "request")}
        who = {key: value for key, value in everything["scorer"].items() if key not in ("tokens_per_batch", "judge")}
        known |= {"scorer": who, "judge": judge, "scored_by": fingerprint(asdict(scorer))}
    return known
