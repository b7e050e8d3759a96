"""Experiment trackers behind one interface. The only file that imports wandb, trackio or tensorboard.

A tracker never costs a run: without a key or a network wandb writes to disk, and says how to sync. The x axis is
`train/global_step`, since an offline run that is resumed starts its own counter again.
"""

import importlib.util
import os
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.config import RunConfig, TrackerMode, TrackerName, UserError

_INIT_TIMEOUT = 20  # seconds; wandb's own 90 and retries are a hang to who sits before it


class Tracker(ABC):
    """One run's metrics, sent somewhere."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, under the names they have in metrics.jsonl."""

    @abstractmethod
    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        """Close the run; `results` become its summary."""


class NoTracker(Tracker):
    """Nobody is told."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, results: Mapping[str, float], failed: bool) -> None: ...


class Stretch(Tracker):
    """A stretch of a run: its steps follow those before it, and its end is not the run's."""

    def __init__(self, tracker: Tracker, steps_before: int) -> None:
        self._tracker, self._steps_before = tracker, steps_before

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(self._steps_before + step, metrics)

    def finish(self, results: Mapping[str, float], failed: bool) -> None: ...


class WandbTracker(Tracker):
    """Weights & Biases, online or on disk."""

    def __init__(self, cfg: RunConfig, run_dir: Path, config: dict[str, Any], labels: dict[str, Any]) -> None:
        import wandb

        tracker = cfg.tracker
        mode: Any = _wandb_mode(cfg)
        (run_dir / "wandb").mkdir(exist_ok=True)
        identity = run_dir / "wandb" / "run_id"  # a run that goes on is the same run there
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._lost = False
        settings = wandb.Settings(init_timeout=_INIT_TIMEOUT, silent=True)
        options: dict[str, Any] = {
            "dir": str(run_dir),
            "project": tracker.project,
            "entity": tracker.entity,
            "config": config,
            "settings": settings,
            "id": identity.read_text(),
            "resume": "allow",
            "reinit": "finish_previous",  # a second run in a sweep's process must not be merged into the first
            **labels,
        }
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # no network, a wrong key, a server error: the run matters more
            print(
                f"align: wandb cannot go online ({' '.join(str(error).split())[:120]}); writing to disk",
                file=sys.stderr,
            )
            mode = "offline"
            options["id"] = secrets.token_hex(4)  # the first one counts as in use
            identity.write_text(options["id"])
            self._run = wandb.init(mode=mode, **options)
        if mode == "offline":
            print(
                f"align: wandb runs offline; to upload later: wandb sync {Path(self._run.dir).parent}", file=sys.stderr
            )
        for prefix in ("train", "eval", "selfplay", "result"):
            self._run.define_metric(f"{prefix}/*", step_metric="train/global_step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._guarded(lambda: self._run.log({**metrics, "train/global_step": step}))

    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        self._guarded(lambda: self._run.summary.update(dict(results)))
        self._guarded(lambda: self._run.finish(exit_code=int(failed)))

    def _guarded(self, call: Callable[[], object]) -> None:
        """A tracker that fails is said once and costs nothing more: metrics.jsonl has everything."""
        if self._lost:
            return
        try:
            call()
        except Exception as error:
            self._lost = True
            print(f"align: wandb failed ({' '.join(str(error).split())[:120]}); metrics.jsonl goes on", file=sys.stderr)


class TrackioTracker(Tracker):
    """trackio: a local dashboard without an account."""

    def __init__(self, cfg: RunConfig, run_dir: Path, config: dict[str, Any], labels: dict[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        names = {"project": cfg.tracker.project, "name": labels["name"], "group": labels["group"]}
        trackio.init(**names, config=config, resume="allow", embed=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def finish(self, results: Mapping[str, float], failed: bool) -> None:
        self._trackio.log(dict(results))
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
    """The configured tracker on rank 0, silence elsewhere. `config` is the resolved configuration, nested."""
    if cfg.tracker.name is TrackerName.none or rank != 0:
        return NoTracker()
    objective, model, dataset = str(cfg.objective["name"]), cfg.model.name, cfg.dataset.name
    labels = {
        "name": run_dir.name,
        "group": cfg.tracker.group or f"{model}-{dataset}",
        "job_type": "train",
        "tags": [objective, model, dataset, *cfg.tracker.tags],
    }
    return _TRACKERS[cfg.tracker.name](cfg, run_dir, config, labels)


def check(cfg: RunConfig) -> None:
    """Refuse a tracker whose package is absent, before the run does any work."""
    if cfg.tracker.name is not TrackerName.none and importlib.util.find_spec(cfg.tracker.name.value) is None:
        raise UserError(f"tracker={cfg.tracker.name.value} needs a package: pip install {cfg.tracker.name.value}")
    if cfg.tracker.name is TrackerName.wandb and _wandb_mode(cfg) == "online" and not _has_wandb_key():
        raise UserError(
            "tracker.mode=online (or WANDB_MODE) needs a wandb key: set WANDB_API_KEY, run `wandb login`, or use "
            "tracker.mode=offline"
        )


def _wandb_mode(cfg: RunConfig) -> str:
    if cfg.tracker.mode is not TrackerMode.auto:
        return cfg.tracker.mode.name
    return os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
