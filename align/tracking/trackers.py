"""Experiment trackers behind one interface. The only file that imports wandb, trackio or tensorboard.

A tracker never costs a run: without a key or a network wandb writes to disk and says how to upload, and the failure of a
tracker is one line, since metrics.jsonl has everything. The x axis is `train/global_step`, as an offline run that is
resumed starts its own counter again. Left out: the answers of self-play's iterations, which are in its folders only.
"""

import contextlib
import importlib.util
import json
import netrc
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from align.choices import Source, TrackerMode, TrackerName
from align.config import RunConfig, is_group, plain
from align.files import flat
from align.metrics import METRICS
from align.say import UserError, first_line

CURVES = ("train/", "eval/", "selfplay/", "sentinel/")  # places of which a run has several values
_WITH_BEST = ("eval/", "selfplay/")  # those whose best value stands in the summary beside the last
_SUMMARY = {"maximize": "last,max", "minimize": "last,min"}
X_AXIS = "train/global_step"
_INIT_TIMEOUT = 15  # seconds; wandb's own 90 and retries are a hang to who sits before it
_FINISH_TIMEOUT = 120  # seconds that the last upload may take; what is not sent stays on disk
_SAMPLES = 64  # prompts whose answers are shown
_SAMPLE_COLUMNS = ["prompt", "start", "policy", "start_score", "policy_score", "win"]
_TAG_LENGTH, _PROJECT_LENGTH = 64, 128  # what wandb takes
_NOT_IN_PROJECT = r"[/\\#?%:]"


class Tracker:
    """Metrics of one run, sent somewhere. This one sends them nowhere."""

    step: int | None = None  # the last one that was sent

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step, under the names they have in metrics.jsonl."""

    def finish(self, results: Mapping[str, float], failed: bool, samples: Sequence[list[Any]] = ()) -> None:
        """Close the run: `results` become its summary, `samples` a table of `_SAMPLE_COLUMNS` where there are any."""


class Stretch(Tracker):
    """A training within a longer run: its steps follow those before it, and its end is not the run's."""

    def __init__(self, tracker: Tracker, steps_before: int) -> None:
        self._tracker, self._steps_before = tracker, steps_before

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(self._steps_before + step, metrics)


class _Careful(Tracker):
    """The tracker of a run folder, which costs the run nothing: if it fails, a line says where all is `kept`."""

    def __init__(self, cfg: RunConfig, run_dir: Path, samples: Path | None, kept: str) -> None:
        self._name, self._samples, self._kept = cfg.tracker.name, samples, kept
        self._tracker = Tracker()
        with self._saying_failures():
            self._tracker = _TRACKERS[self._name](cfg, run_dir)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._saying_failures():
            self._tracker.log(step, metrics)
            self._tracker.step = step

    def finish(self, results: Mapping[str, float], failed: bool, samples: Sequence[list[Any]] = ()) -> None:
        with self._saying_failures():
            if self._samples and self._samples.exists() and not failed:
                samples = _first_answers(self._samples)
            self._tracker.finish(results, failed, samples)

    @contextlib.contextmanager
    def _saying_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = Tracker()
            print(f"align: {self._name.value} failed ({first_line(error)[:120]}); {self._kept}", file=sys.stderr)


class WandbTracker(Tracker):
    """Weights & Biases, online or on disk."""

    def __init__(self, cfg: RunConfig, run_dir: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it holds up the end of a run whose server is silent
        import wandb

        folder = run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        identity = folder / "run_id"  # a run that goes on is the same run there
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        limits = {"init_timeout": _INIT_TIMEOUT, "finish_timeout": _FINISH_TIMEOUT, "finish_timeout_raises": True}
        options: dict[str, Any] = {
            "dir": str(run_dir.resolve()),  # its service may have been started in another folder
            "project": cfg.tracker.project,
            "entity": cfg.tracker.entity,
            "name": run_dir.name,
            "group": _group(cfg),
            "job_type": "selfplay" if cfg.source.name is Source.selfplay else "train",
            "tags": _tags(cfg),
            "config": plain(cfg),
            "settings": wandb.Settings(silent=True, **limits),
            "id": identity.read_text(),
            "resume": "allow",
            "reinit": "finish_previous",  # a second run in a sweep's process must not be merged into the first
        }
        mode: Any = _wandb_mode(cfg)
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # no network, a wrong key, a server error: the run matters more
            if mode != "online":
                raise
            print(f"align: wandb cannot go online ({first_line(error)[:120]}); writing to disk", file=sys.stderr)
            wandb.teardown()  # for its service the run's id would be in use
            mode = "offline"
            self._run = wandb.init(mode=mode, **options)
        if mode == "offline":  # all stretches of a run that was stopped, in their order
            print(f"align: wandb runs offline; to upload later: wandb sync {folder}/offline-run-*", file=sys.stderr)
        for place in (*CURVES, "result/"):
            self._run.define_metric(f"{place}*", step_metric=X_AXIS)
        for place, metric in product(_WITH_BEST, METRICS):
            if metric.goal:
                name, summary = f"{place}{metric.name}", _SUMMARY[metric.goal]
                self._run.define_metric(name, step_metric=X_AXIS, summary=summary)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, X_AXIS: step})

    def finish(self, results: Mapping[str, float], failed: bool, samples: Sequence[list[Any]] = ()) -> None:
        import wandb

        if samples:
            table = wandb.Table(columns=_SAMPLE_COLUMNS, data=list(samples))
            self._run.log({"samples": table, X_AXIS: self.step or 0})
        self._run.summary.update(dict(results))
        self._run.finish(exit_code=int(failed))


class TrackioTracker(Tracker):
    """trackio: a local dashboard without an account."""

    def __init__(self, cfg: RunConfig, run_dir: Path) -> None:
        import trackio

        self._trackio = trackio
        known = run_dir / "trackio_run"  # a run is found by its name there, which another folder may have had
        run = trackio.init(
            project=cfg.tracker.project,
            name=run_dir.name,
            group=_group(cfg),
            config=flat(plain(cfg)),  # its dashboard groups by plain values only
            resume="allow" if known.exists() else "never",
            embed=False,
        )
        known.write_text(run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def finish(self, results: Mapping[str, float], failed: bool, samples: Sequence[list[Any]] = ()) -> None:
        if samples:
            table = self._trackio.Table(columns=_SAMPLE_COLUMNS, data=list(samples))
            self._trackio.log({"samples": table}, step=self.step)
        if results:
            self._trackio.log(dict(results), step=self.step)
        self._trackio.finish()


class TensorboardTracker(Tracker):
    """Event files under the run folder."""

    def __init__(self, cfg: RunConfig, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, results: Mapping[str, float], failed: bool, samples: Sequence[list[Any]] = ()) -> None:
        self.log(self.step or 0, results)
        self._writer.close()


_TRACKERS: dict[TrackerName, Callable[[RunConfig, Path], Tracker]] = {
    TrackerName.wandb: WandbTracker,
    TrackerName.trackio: TrackioTracker,
    TrackerName.tensorboard: TensorboardTracker,
}


def start(cfg: RunConfig, run_dir: Path, rank: int) -> Tracker:
    """Open the configured tracker on rank 0, elsewhere one that sends nothing."""
    if cfg.tracker.name is TrackerName.none or rank != 0:
        return Tracker()
    return _Careful(cfg, run_dir, run_dir / "samples.jsonl", "metrics.jsonl goes on")


def add_results(run_dir: Path, cfg: RunConfig, results: Mapping[str, float]) -> None:
    """Put results that came after the run into the summary of the run that the folder has in its tracker."""
    if cfg.tracker.name is not TrackerName.none:
        _Careful(cfg, run_dir, None, f"the results are in {run_dir}").finish(results, failed=False)


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
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    return False


def _wandb_mode(cfg: RunConfig) -> str:
    if cfg.tracker.mode is not TrackerMode.auto:
        return cfg.tracker.mode.name
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


def _group(cfg: RunConfig) -> str:
    return cfg.tracker.group or f"{cfg.model.name}-{cfg.dataset.name}"


def _tags(cfg: RunConfig) -> list[str]:
    return list(dict.fromkeys([str(cfg.objective["name"]), cfg.model.name, cfg.dataset.name, *cfg.tracker.tags]))


def _first_answers(file: Path) -> list[list[Any]]:
    """Read rows of `_SAMPLE_COLUMNS`: each prompt's first answers, with scores or, of a judge that compares, a chance."""
    rows = []
    with file.open() as lines:
        for row in map(json.loads, islice(lines, _SAMPLES)):
            start, policy, win = None, None, row.get("chances", [[0.5]])[0][0]
            if "scores" in row:
                start, policy = (row["scores"][side][0] for side in ("start", "policy"))
                win = (policy > start) + 0.5 * (policy == start)
            rows.append([row["prompt"], row["start"][0], row["policy"][0], start, policy, win])
    return rows
