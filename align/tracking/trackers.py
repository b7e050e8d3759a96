"""Experiment trackers behind one interface. The only file that imports wandb, trackio or tensorboard.

A tracker never costs a run: without a key or a network wandb writes to disk and says how to upload, and a tracker that
fails is said once, since metrics.jsonl has everything. The x axis is `train/global_step`, as an offline run that is
resumed starts its own counter again. Left out: the answers of self-play, which are in its folders only.
"""

import contextlib
import importlib.util
import json
import os
import re
import secrets
import ssl
import sys
import threading
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from align.choices import Source, TrackerMode, TrackerName
from align.config import RunConfig, is_group, plain
from align.metrics import goal
from align.say import UserError

_X_AXIS = "train/global_step"


CURVES = ("train/", "eval/", "selfplay/", "sentinel/")  # of which a run has several values


_WITH_BEST = ("eval/", "selfplay/")  # whose best value stands in the summary beside the last


_SUMMARY = {"maximize": "last,max", "minimize": "last,min"}


_ANSWER_TIMEOUT = 5.0  # seconds in which a server says anything


_INIT_TIMEOUT = 15  # seconds; wandb's own 90 and retries are a hang to who sits before it


_FINISH_TIMEOUT = 120  # seconds that the last upload may take; what is not sent stays on disk


_SAMPLES = 64  # prompts whose answers are shown


_SAMPLE_COLUMNS = ["prompt", "start", "policy", "start_score", "policy_score", "win"]


_TAG_LENGTH, _PROJECT_LENGTH = 64, 128  # what wandb takes


_NOT_IN_PROJECT = r"[/\\#?%:]"


class Tracker(ABC):
    """One run's metrics, sent somewhere."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, under the names they have in metrics.jsonl."""

    @abstractmethod
    def show(self, samples: list[list[Any]]) -> None:
        """Answers to some prompts, rows of `_SAMPLE_COLUMNS`, where there are tables."""

    @abstractmethod
    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        """Close the run; `results` become its summary."""


class NoTracker(Tracker):
    """Nobody is told."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def show(self, samples: list[list[Any]]) -> None: ...

    def finish(self, results: Mapping[str, float], failed: bool) -> None: ...


class Stretch(Tracker):
    """A stretch of a run: its steps follow those before it, and its end is not the run's."""

    def __init__(self, tracker: Tracker, steps_before: int) -> None:
        self._tracker, self._steps_before = tracker, steps_before

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(self._steps_before + step, metrics)

    def show(self, samples: list[list[Any]]) -> None: ...

    def finish(self, results: Mapping[str, float], failed: bool) -> None: ...


class _Careful(Tracker):
    """The tracker of a run folder, which costs the run nothing: its failure is said once, and the run goes on without.

    At a good end it shows the answers that the run has left in samples.jsonl.
    """

    def __init__(self, name: str, run_dir: Path, make: Callable[[], Tracker]) -> None:
        self._name, self._samples = name, run_dir / "samples.jsonl"
        self._tracker: Tracker = NoTracker()
        with self._saying_failures():
            self._tracker = make()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._saying_failures():
            self._tracker.log(step, metrics)

    def show(self, samples: list[list[Any]]) -> None:
        with self._saying_failures():
            self._tracker.show(samples)

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
            self._tracker = NoTracker()
            print(f"align: {self._name} failed ({_brief(error)}); metrics.jsonl goes on", file=sys.stderr)


class WandbTracker(Tracker):
    """Weights & Biases, online or on disk."""

    def __init__(self, cfg: RunConfig, run_dir: Path, config: dict[str, Any], labels: dict[str, Any]) -> None:
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
        why = _unanswered(_wandb_url()) if mode == "online" else ""
        if not why:
            try:
                self._run = wandb.init(mode=mode, **options)
            except Exception as error:  # a wrong key, a server error: the run matters more
                if mode != "online":
                    raise
                why = _brief(error)
                options["id"] = secrets.token_hex(4)  # the first one counts as in use
                identity.write_text(options["id"])
        if why:
            print(f"align: wandb cannot go online ({why}); writing to disk", file=sys.stderr)
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
            config=_dotted(config),  # its dashboard groups by plain values only
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

    def show(self, samples: list[list[Any]]) -> None: ...

    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        self.log(self._step, results)
        self._writer.close()


_TRACKERS: dict[TrackerName, Callable[[RunConfig, Path, dict[str, Any], dict[str, Any]], Tracker]] = {
    TrackerName.wandb: WandbTracker,
    TrackerName.trackio: TrackioTracker,
    TrackerName.tensorboard: TensorboardTracker,
}


def start(cfg: RunConfig, run_dir: Path, config: dict[str, Any], rank: int) -> Tracker:
    """The configured tracker on rank 0, silence elsewhere. `config` is the resolved configuration, nested."""
    if cfg.tracker.name is TrackerName.none or rank != 0:
        return NoTracker()
    return _Careful(cfg.tracker.name.value, run_dir, lambda: _open(cfg, run_dir, config))


def add_results(run_dir: Path, cfg: RunConfig, results: Mapping[str, float]) -> None:
    """Results that came after the run, into the summary of the run that the folder has in its tracker."""
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


def _tags(cfg: RunConfig) -> list[str]:
    return list(dict.fromkeys([str(cfg.objective["name"]), cfg.model.name, cfg.dataset.name, *cfg.tracker.tags]))


def _first_answers(file: Path) -> list[list[Any]]:
    """Rows of `_SAMPLE_COLUMNS`: to each prompt the first answer of start model and policy, and what the judge says.

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


def _dotted(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the keys that are typed: objective.beta."""
    made: dict[str, Any] = {}
    for name, value in node.items():
        made |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return made


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _wandb_mode(cfg: RunConfig) -> str:
    if cfg.tracker.mode is not TrackerMode.auto:
        return cfg.tracker.mode.name
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


def _wandb_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def has_wandb_key() -> bool:
    """Whether wandb will find a key, in the environment or in .netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = urlparse(_wandb_url()).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _unanswered(url: str) -> str:
    """Why a server says nothing, in words; "" where it says anything at all: what it means is for wandb to judge."""
    said = [f"no answer from {url} in {_ANSWER_TIMEOUT:g} s"]

    def ask() -> None:
        try:
            urllib.request.build_opener(_Stay).open(url, timeout=_ANSWER_TIMEOUT).close()  # by a proxy, if one is set
        except urllib.error.URLError as error:
            answered = isinstance(error, urllib.error.HTTPError)
            certificate = isinstance(error.reason, ssl.SSLError)  # wandb has its own
            said.append("" if answered or certificate else f"{url}: {error.reason}")
        except TimeoutError:
            pass
        else:
            said.append("")

    asking = threading.Thread(target=ask, daemon=True)  # a name server that is silent heeds no timeout
    asking.start()
    asking.join(_ANSWER_TIMEOUT)
    return said[-1]


class _Stay(urllib.request.HTTPRedirectHandler):
    """Where a redirect leads is no matter: it is an answer."""

    def redirect_request(self, *_: Any) -> None:
        return None
