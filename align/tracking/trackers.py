"""Experiment trackers behind one interface. The only file that imports wandb, trackio or tensorboard.

A tracker never costs a run: without a key or a network wandb writes to disk and says how to upload, and the failure of a
tracker is one line, since metrics.jsonl has everything. The x axis is `train/global_step`, as an offline run that is
resumed starts its own counter again. Left out: the answers of self-play's iterations, which are in its folders only.
"""

import contextlib
import importlib.util
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from align.choices import Source, TrackerMode, TrackerName
from align.config import RunConfig, is_group, plain
from align.files import flat
from align.metrics import goal
from align.say import UserError

CURVES = ("train/", "eval/", "selfplay/", "sentinel/")  # places of which a run has several values
_WITH_BEST = ("eval/", "selfplay/")  # those whose best value stands in the summary beside the last
_SUMMARY = {"maximize": "last,max", "minimize": "last,min"}
_X_AXIS = "train/global_step"

_INIT_TIMEOUT = 15  # seconds; wandb's own 90 and retries are a hang to who sits before it
_FINISH_TIMEOUT = 120  # seconds that the last upload may take; what is not sent stays on disk

_SAMPLES = 64  # prompts whose answers are shown
_SAMPLE_COLUMNS = ["prompt", "start", "policy", "start_score", "policy_score", "win"]

_TAG_LENGTH, _PROJECT_LENGTH = 64, 128  # what wandb takes
_NOT_IN_PROJECT = r"[/\\#?%:]"


class Tracker:
    """Metrics of one run, sent somewhere. This one sends them nowhere."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step, under the names they have in metrics.jsonl."""

    def show(self, samples: list[list[Any]]) -> None:
        """Send answers to some prompts, rows of `_SAMPLE_COLUMNS`, where there are tables."""

    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        """Close the run; `results` become its summary."""


class Stretch(Tracker):
    """A training within a longer run: its steps follow those before it, and its end is not the run's."""

    def __init__(self, tracker: Tracker, steps_before: int) -> None:
        self._tracker, self._steps_before = tracker, steps_before

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(self._steps_before + step, metrics)


class _Careful(Tracker):
    """The tracker of a run folder, which costs the run nothing: its failure is one line, and the run goes on without.

    At a good end it shows the answers that the run has left in samples.jsonl.
    """

    def __init__(self, name: str, run_dir: Path, make: Callable[[], Tracker]) -> None:
        self._name, self._samples = name, run_dir / "samples.jsonl"
        self._tracker = Tracker()
        with self._saying_failures():
            self._tracker = make()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._saying_failures():
            self._tracker.log(step, metrics)

    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        with self._saying_failures():
            if not failed and self._samples.exists():
                self._tracker.show(_first_answers(self._samples))
        with self._saying_failures():
            self._tracker.finish(results, failed)

    @contextlib.contextmanager
    def _saying_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = Tracker()
            print(f"align: {self._name} failed ({_brief(error)}); metrics.jsonl goes on", file=sys.stderr)


class WandbTracker(Tracker):
    """Weights & Biases, online or on disk."""

    def __init__(self, cfg: RunConfig, run_dir: Path, config: dict[str, Any], labels: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it holds up the end of a run whose server is silent
        import wandb

        folder = run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        identity = folder / "run_id"  # a run that goes on is the same run there
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        settings = {"init_timeout": _INIT_TIMEOUT, "finish_timeout": _FINISH_TIMEOUT, "finish_timeout_raises": True}
        options: dict[str, Any] = {
            "dir": str(run_dir.resolve()),  # its service may have been started in another folder
            "project": cfg.tracker.project,
            "entity": cfg.tracker.entity,
            "config": config,
            "settings": wandb.Settings(silent=True, **settings),
            "id": identity.read_text(),
            "resume": "allow",
            "reinit": "finish_previous",  # a second run in a sweep's process must not be merged into the first
            **labels,
        }
        mode: Any = _wandb_mode(cfg)
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # no network, a wrong key, a server error: the run matters more
            if mode != "online":
                raise
            print(f"align: wandb cannot go online ({_brief(error)}); writing to disk", file=sys.stderr)
            wandb.teardown()  # for its service the run's id would be in use
            mode = "offline"
            self._run = wandb.init(mode=mode, **options)
        if mode == "offline":  # all stretches of a run that was stopped, in their order
            print(f"align: wandb runs offline; to upload later: wandb sync {folder}/offline-run-*", file=sys.stderr)
        for place in (*CURVES, "result/"):
            self._run.define_metric(f"{place}*", step_metric=_X_AXIS)
        self._known: set[str] = set()
        self._step = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for metric in metrics.keys() - self._known:
            direction = goal(metric) if metric.startswith(_WITH_BEST) else None
            if direction:
                self._run.define_metric(metric, step_metric=_X_AXIS, summary=_SUMMARY[direction])
        self._known |= metrics.keys()
        self._step = step
        self._run.log({**metrics, _X_AXIS: step})

    def show(self, samples: list[list[Any]]) -> None:
        import wandb

        self._run.log({"samples": wandb.Table(columns=_SAMPLE_COLUMNS, data=samples), _X_AXIS: self._step})

    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        self._run.summary.update(dict(results))
        self._run.finish(exit_code=int(failed))


class TrackioTracker(Tracker):
    """trackio: a local dashboard without an account."""

    def __init__(self, cfg: RunConfig, run_dir: Path, config: dict[str, Any], labels: dict[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        known = run_dir / "trackio_run"  # a run is found by its name there, which another folder may have had
        run = trackio.init(
            project=cfg.tracker.project,
            name=labels["name"],
            group=labels["group"],
            config=flat(config),  # its dashboard groups by plain values only
            resume="allow" if known.exists() else "never",
            embed=False,
        )
        known.write_text(run.id)
        self._step: int | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._trackio.log(dict(metrics), step=step)

    def show(self, samples: list[list[Any]]) -> None:
        table = self._trackio.Table(columns=_SAMPLE_COLUMNS, data=samples)
        self._trackio.log({"samples": table}, step=self._step)

    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        if results:
            self._trackio.log(dict(results), step=self._step)
        self._trackio.finish()


class TensorboardTracker(Tracker):
    """Event files under the run folder."""

    def __init__(self, cfg: RunConfig, run_dir: Path, config: dict[str, Any], labels: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        self._step = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        self.log(self._step, results)
        self._writer.close()


_TRACKERS: dict[TrackerName, Callable[[RunConfig, Path, dict[str, Any], dict[str, Any]], Tracker]] = {
    TrackerName.wandb: WandbTracker,
    TrackerName.trackio: TrackioTracker,
    TrackerName.tensorboard: TensorboardTracker,
}


def start(cfg: RunConfig, run_dir: Path, config: dict[str, Any], rank: int) -> Tracker:
    """Open the configured tracker on rank 0, elsewhere one that sends nothing.

    Args:
        config: the resolved configuration, nested.
    """
    if cfg.tracker.name is TrackerName.none or rank != 0:
        return Tracker()
    return _Careful(cfg.tracker.name.value, run_dir, lambda: _open(cfg, run_dir, config))


def add_results(run_dir: Path, cfg: RunConfig, results: Mapping[str, float]) -> None:
    """Put results that came after the run into the summary of the run that the folder has in its tracker."""
    if cfg.tracker.name is TrackerName.none:
        return
    try:
        _open(cfg, run_dir, plain(cfg)).finish(results, failed=False)
    except Exception as error:
        print(
            f"align: {cfg.tracker.name.value} failed ({_brief(error)}); the results are in {run_dir}", file=sys.stderr
        )


def _open(cfg: RunConfig, run_dir: Path, config: dict[str, Any]) -> Tracker:
    labels = {
        "name": run_dir.name,
        "group": cfg.tracker.group or f"{cfg.model.name}-{cfg.dataset.name}",
        "job_type": "selfplay" if cfg.source.name is Source.selfplay else "train",
        "tags": _tags(cfg),
    }
    return _TRACKERS[cfg.tracker.name](cfg, run_dir, config, labels)


def check(cfg: RunConfig) -> None:
    """Refuse a tracker whose package is absent, or that would refuse its words, before the run does any work."""
    name, group = cfg.tracker.name, cfg.tracker.group
    if group is not None and not is_group(group):
        raise UserError(f"tracker.group={group}: a folder in runs/groups is called so, as in tracker.group=my_study")
    if name is not TrackerName.none and importlib.util.find_spec(name.value) is None:
        raise UserError(f"tracker={name.value} needs a package: pip install {name.value}")
    if name is not TrackerName.wandb:
        return
    project = cfg.tracker.project
    if not 0 < len(project) <= _PROJECT_LENGTH or re.search(_NOT_IN_PROJECT, project):
        raise UserError(
            f"tracker.project={project}: wandb takes up to {_PROJECT_LENGTH} characters, none of them / \\ # ? % :"
        )
    for tag in _tags(cfg):
        if not 0 < len(tag) <= _TAG_LENGTH:
            raise UserError(f"tracker.tags: wandb takes tags of 1 to {_TAG_LENGTH} characters, not {tag!r}")
    if _wandb_mode(cfg) == "online" and not has_wandb_key():
        raise UserError(
            "tracker.mode=online (or WANDB_MODE) needs a wandb key: set WANDB_API_KEY, run `wandb login`, or use "
            "tracker.mode=offline"
        )


def has_wandb_key() -> bool:
    """True when wandb will find a key, in the environment or in .netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_mode(cfg: RunConfig) -> str:
    if cfg.tracker.mode is not TrackerMode.auto:
        return cfg.tracker.mode.name
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


def _tags(cfg: RunConfig) -> list[str]:
    return list(dict.fromkeys([str(cfg.objective["name"]), cfg.model.name, cfg.dataset.name, *cfg.tracker.tags]))


def _first_answers(file: Path) -> list[list[Any]]:
    """Read rows of `_SAMPLE_COLUMNS`: to each prompt the first answer of start model and policy, and the judge's word.

    That is a score of each, or P(the policy's wins) where the judge only compares.
    """
    rows = []
    with file.open() as lines:
        for row in map(json.loads, islice(lines, _SAMPLES)):
            start, policy, win = None, None, row.get("chances", [[0.5]])[0][0]
            if "scores" in row:
                start, policy = (row["scores"][side][0] for side in ("start", "policy"))
                win = (policy > start) + 0.5 * (policy == start)
            rows.append([row["prompt"], row["start"][0], row["policy"][0], start, policy, win])
    return rows


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
