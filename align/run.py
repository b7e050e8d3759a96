"""From a configuration to a run: check, prepare, plan, and start who trains. Typing the command again goes on or is done.

What can be wrong with the words, the data, the cluster and the run folder is found here, in the process that was typed,
before a model is loaded or a process started. Left out: the training itself (train.py).
"""

import contextlib
import inspect
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from align import (
    arguments,
    card,
    config,
    data,
    judging,
    launch,
    model,
    plan,
    sentinel,
    slurm,
    strategy,
    tracking,
    train,
)
from align.cache import write_json
from align.config import ClusterConfig, Launcher, Precision, RunConfig, ScorerConfig, Source, Strategy, UserError
from align.launch import Fleet, Place
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Identity
from align.tracking import Tracker
from align.train import Job, last_checkpoint
from align.trainer import MADE_BY
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
    def fleet(self) -> Fleet:
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


def run(cfg: RunConfig) -> float | None:
    """Run `cfg` to its end, or print its plan, or submit it. Returns the win rate against the start model where there is
    a judge, else the held-out accuracy by mean_logp; None where nothing was trained.

    Raises:
        UserError: anything the user can put right.
        Stopped: it was asked to stop.
    """
    train.quieten()
    slurm.take_place()
    return carry_out(prepare(cfg), run, begin)


def carry_out(made: T, command: Callable[[RunConfig], object], start: Callable[[T], None]) -> float | None:
    """What `run` does with what it has prepared; `command` is `run` itself, for a job that SLURM starts elsewhere."""
    cfg = made.cfg
    if cfg.plan:
        say(made.plan)
        return None
    if not made.is_done:
        sentinel.refuse(made.dir)
        if cfg.cluster.launcher is Launcher.slurm and not launch.inside():
            given = replace(
                cfg, run_dir=str(made.dir.resolve()), cache_dir=str(Path(cfg.cache_dir).expanduser().resolve())
            )
            slurm.enqueue(
                command,
                replace(given, cluster=_as_resolved(cfg.cluster, made.fleet)),
                made.fleet.per_node,
                made.fleet.device == "cuda",
            )
            return None
        with _in_its_group(made):
            start(made)
    else:
        _link(made)
        say(f"This run is complete: {made.dir}. To train it anew, delete that folder or give another run_dir=")
    results = json.loads(made.results.read_text()) if is_first() else None
    if results is None:
        return None
    say(card.text_table(results["start"], results["trained"]))
    say(f"cost     {card.cost_line(results['cost'])}")
    say(f"model    {made.policy}\nmetrics  {made.metrics}")
    trained: dict[str, float] = results["trained"]
    metric = cfg.optimized_metric or ("win_rate" if "win_rate" in trained else "accuracy/mean_logp")
    if metric not in trained:
        raise UserError(
            f"optimized_metric={metric} is none of this run's results{config.closest(metric, list(trained))}: "
            f"{', '.join(trained)}"
        )
    return trained[metric]


@contextlib.contextmanager
def _in_its_group(made: Prepared) -> Iterator[None]:
    link = _link(made)
    try:
        yield
    finally:
        if link is not None and not link.exists():  # the run was refused, and its folder is gone
            link.unlink(missing_ok=True)


def _link(made: Prepared) -> Path | None:
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


def prepare(cfg: RunConfig) -> Job:
    """Check everything, and make what the processes need: data, start model, plan, the run folder's name."""
    objective = check(cfg)
    judge = judging.judge_of(cfg)
    scorer = who_scores(cfg, judge) if judge is not None else None
    fleet = launch.fleet(cfg.cluster, cfg.plan)
    cache = Path(cfg.cache_dir).expanduser()
    start = start_model(cfg, cache)
    pairs = data.prepare(cfg.dataset, cfg.train, cfg.model.system_message, start, cache)
    check_data(cfg, objective, start, pairs, fleet)
    longest = plan.longest(cfg, pairs)
    fleet = plan.settle_strategy(cfg, start, fleet, longest)
    check_sentinel(cfg, fleet)
    if not cfg.plan:
        strategy.check(fleet)
        if cfg.cluster.launcher is Launcher.slurm and not launch.inside():
            slurm.check()
    if warning := arguments.high_learning_rate(cfg.optimizer, plan.shape(cfg.model, start).parameters):
        warnings.warn(warning, UserWarning, stacklevel=2)
    if warning := plan.too_large(cfg, start, fleet, longest):
        warnings.warn(warning, UserWarning, stacklevel=2)
    identity = identify(config.plain(cfg), objective, start, pairs.fingerprint, fleet)
    if scorer is not None and cfg.scorer.name is not None:  # else dataset.judge is there
        identity |= scored_by(cfg, scorer)
    names = f"{cfg.model.name}-{cfg.dataset.name}-{cfg.objective['name']}"
    folder = Path(cfg.run_dir or f"runs/{names}-{config.fingerprint(identity)[:6]}").expanduser()
    text = plan.describe(cfg, start, pairs, objective, fleet)
    job = Job(
        cfg=cfg,
        start=start,
        pairs=pairs,
        fleet=fleet,
        identity=identity,
        dir=folder,
        policy=folder / "model",
        plan=text,
    )
    recognise(job)
    return job


#: Metrics that depend on the objective and the data, by how their names begin; and those of every run without a judge.
_OPEN_METRICS = ("objective/", "accuracy/", "rewards/", "mean_logp/", "length/", "log_ratio/")
_METRICS = (
    "accuracy/mean_logp",
    "accuracy/log_ratio",
    "rewards/accuracies",
    "loss",
    "entropy",
    "truncated",
    "kl_start_policy",
)


def check_metric(cfg: RunConfig) -> None:
    """Refuse what a search could not maximise, as far as that can be known before the first training ends."""
    metric = cfg.optimized_metric
    if metric is None:
        return
    if metric in judging.METRICS and judging.judge_of(cfg) is None:
        raise UserError(
            f"optimized_metric={metric} needs a judge, and there is none: give scorer=..., or "
            "optimized_metric=accuracy/mean_logp"
        )
    known = [
        *_METRICS,
        *sorted(judging.METRICS),
        *(["win_rate/previous"] if cfg.source.name is Source.selfplay else []),
    ]
    near = config.closest(metric, known)
    if metric not in known and (near or not metric.startswith(_OPEN_METRICS)):
        raise UserError(f"optimized_metric={metric} is no metric of results.json{near}; there are {', '.join(known)}")


def who_scores(cfg: RunConfig, scorer: ScorerConfig) -> Identity:
    """The scorer's identity, before anything is sampled or trained; a plan does without its files."""
    try:
        return registry.build(scorer, Place(device=torch.device("cpu"), bf16=False, rank=0, world=1)).identity
    except model.NotHereError as error:
        if not cfg.plan:
            raise
        say(f"align: {error}")
        return registry.stand_in(scorer)


def scored_by(cfg: RunConfig, scorer: Identity) -> dict[str, Any]:
    """What of the scorer decides a result: its settings but those of how fast, and what it is made of."""
    node = config.plain(cfg)["scorer"]
    judge = {key: node["judge"][key] for key in ("served_model", "request")}
    settings = {key: value for key, value in node.items() if key not in ("tokens_per_batch", "judge")}
    return {"scorer": settings, "judge": judge, "scored_by": config.fingerprint(asdict(scorer))}


def start_model(cfg: RunConfig, cache: Path) -> model.Start:
    """The start model; a plan for one that is not here counts by another tokenizer, and says so."""
    try:
        return model.prepare_start(cfg.model, cache)
    except model.NotHereError as error:
        if not cfg.plan:
            raise
        say(f"align: {error}; the plan counts tokens by the built-in tokenizer: more of them, the same steps")
        return model.stand_in(cfg.model)


def _as_resolved(cluster: ClusterConfig, fleet: Fleet) -> ClusterConfig:
    """What compute nodes must not decide anew: the precision is part of what a run is."""
    return replace(cluster, precision=Precision.bf16 if fleet.bf16 else Precision.fp32)


def is_first() -> bool:
    """Of several processes that were started from outside, the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print, once per run."""
    if is_first():
        print(text)


def begin(job: Job, tracker: Tracker | None = None) -> None:
    """Train in this process, in processes of ours, or as one of several that were started from outside."""
    with contextlib.ExitStack() as held:

        def open_() -> None:
            held.enter_context(own_folder(job.dir))
            check_checkpoint(job)
            open_folder(job, data.show_pair(job.pairs.train[0], job.start.tokenizer))

        if launch.inside() or job.fleet.strategy is Strategy.single:
            place = launch.join(job.fleet)
            place.from_first(open_)
            train.work(job, place, tracker)
        else:
            open_()
            launch.start(job.fleet, job.dir / "logs", train.work, job)


def check(cfg: RunConfig) -> Objective:
    """Everything that can be wrong with the configuration alone; builds the objective."""
    config.check(cfg)
    arguments.check_optimizer(cfg.optimizer)
    tracking.check(cfg)
    if cfg.dataset.judge is not None:
        config.resolve(cfg.dataset.judge, "dataset.judge")
    check_metric(cfg)
    return train.build_objective(cfg)


def check_data(cfg: RunConfig, objective: Objective, start: model.Start, pairs: data.Pairs, fleet: Fleet) -> None:
    """What the objective and the batch ask of the data."""
    data.check_bos(pairs, start.tokenizer)
    plan.check_batch(cfg, len(pairs.train), fleet.world)
    for name, split in (("training", pairs.train), ("held-out", pairs.held_out)):
        sides = zip(split["chosen_win_prob"], split["rejected_win_prob"], strict=True)
        without = sum(math.isnan(chosen) or math.isnan(rejected) for chosen, rejected in sides)
        if "win_prob" in objective.needs and without:
            raise UserError(
                f"{cfg.objective['name']} needs win_prob, which {without} of {len(split)} {name} pairs of dataset "
                f"{cfg.dataset.name} lack: give rows chosen_win_prob and rejected_win_prob (dataset.columns renames), or "
                "for sppo take the labels as certain with objective.target=hard"
            )


def check_sentinel(cfg: RunConfig, fleet: Fleet) -> None:
    """Raise where nobody could sample the policy in training."""
    if cfg.sentinel.sample_every_steps is not None and fleet.strategy in (Strategy.fsdp, Strategy.zero3):
        raise UserError(
            f"sentinel.sample_every_steps={cfg.sentinel.sample_every_steps} samples with one process, and cluster.strategy="
            f"{fleet.strategy.value} divides the weights among all: set it to null, or use ddp or zero2"
        )


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


def check_checkpoint(job: Job) -> None:
    """Raise `UserError` for a checkpoint that this strategy on so many processes cannot read."""
    checkpoint = last_checkpoint(job.dir / "checkpoints")
    if checkpoint is None:
        return
    try:
        made = json.loads((checkpoint / MADE_BY).read_text())
    except ValueError as error:
        raise UserError(
            f"{checkpoint / MADE_BY} is damaged: delete {checkpoint}, and the run goes on from the one before"
        ) from error
    before, now = Strategy(made["strategy"]), job.fleet.strategy
    whole = {Strategy.single, Strategy.ddp}  # both write weights and optimizer in one piece
    same = before is now or {before, now} <= whole
    by_rank = before in (Strategy.zero2, Strategy.zero3)  # DeepSpeed's shards are those of its ranks
    if not same or (by_rank and made["processes"] != job.fleet.world):
        other = f"cluster.strategy={before.value}" + (f" cluster.processes={made['processes']}" if by_rank else "")
        raise UserError(
            f"{checkpoint} was written by {before.value} on {made['processes']} process(es), and this is {now.value} on "
            f"{job.fleet.world}: go on with {other}, or begin anew with another run_dir="
        )


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
    config_: dict[str, Any], objective: Objective, start: model.Start, pairs: str, fleet: Fleet
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
        code[type(part).__qualname__] = config.file_fingerprint(Path(inspect.getfile(type(part))))
        inner += [value for value in vars(part).values() if isinstance(value, Objective)]
    computed = {"device": fleet.device, "bf16": fleet.bf16}
    return {**settings, **computed, "start": start.fingerprint, "pairs": pairs, "objective_code": code}


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """ "key: was -> is" for every value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for name in sorted({*before, *now})
            for difference in differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if before == now else [f"{key}: {before} -> {now}"]
