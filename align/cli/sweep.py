"""The jobs of a sweep: their group, those that failed, and the summary at the end."""

import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from align.choices import Launcher
from align.cli import compose
from align.config import GROUPS, RunConfig
from align.say import UserError, is_first

OF_SWEEPS = ("hparams=", "search=")  # beginnings of words that choose the jobs, and are no part of any of them
_SHOWN = 3  # failed jobs in the last line: each has printed why


@dataclass
class Sweep:
    """The jobs that this command has begun, if it is a sweep."""

    jobs: int = 0
    failed: list[str] = field(default_factory=list)  # words of the jobs that failed
    errors: list[Exception] = field(default_factory=list)  # errors of these
    groups: dict[Path, list[dict[str, str]]] = field(default_factory=dict)  # folder -> jobs that failed
    group: Path | None = None  # folder of the current job's group; None if it does not train
    found: Path | None = None  # the result of a search

    def begin_job(self, cfg: Any, trains: bool, words: str) -> None:
        """Put the job into the sweep's group, and print its words."""
        typed = HydraConfig.get()
        self.jobs += 1
        if isinstance(cfg, RunConfig):
            cfg.tracker.group = cfg.tracker.group or compose.sweep_name(sys.argv[1:])
        if isinstance(cfg, RunConfig) and trains:
            self.group = GROUPS / str(cfg.tracker.group)
            self.groups.setdefault(self.group, [])
        if typed.runtime.choices["hydra/sweeper"] == "optuna":
            self.found = Path(typed.sweep.dir) / "optimization_results.yaml"
            check_search(typed, trains and cfg.cluster.launcher is not Launcher.slurm)
        if is_first():
            print(f"\njob {self.jobs}: {words}", flush=True)

    def fail_job(self, error: Exception, words: str) -> None:
        """Print and record why the job failed."""
        why = compose.one_line(error)
        print(f"align: job {self.jobs} failed: {why}", file=sys.stderr, flush=True)
        self.failed.append(words)
        self.errors.append(error)
        if self.group is not None:
            self.groups[self.group].append({"job": words, "why": why})

    def end(self, ended_by_jobs: bool) -> None:
        """Print the result of a search, how to compare, and the jobs that failed.

        Raises:
            UserError: `ended_by_jobs`, on every process.
        """
        some = "; ".join(self.failed[:_SHOWN]) + (" ..." if len(self.failed) > _SHOWN else "")
        failed = (
            f"{len(self.failed)} of {self.jobs} jobs failed: {some}. The same command runs these again, and none that "
            "is complete"
        )
        if is_first():
            self._tell(ended_by_jobs)
            if self.failed and not ended_by_jobs:
                print(f"align: {failed}", file=sys.stderr)
        if ended_by_jobs:
            raise UserError(failed)

    def _tell(self, ended_by_jobs: bool) -> None:
        for folder, jobs in self.groups.items():  # for the report, as a refused job leaves no folder
            file = folder / "failed.json"
            if jobs or file.exists():
                folder.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(jobs, indent=2))
        if self.found is not None and self.found.exists() and not ended_by_jobs:
            best = OmegaConf.load(self.found)
            print(f"\nbest    {' '.join(f'{k}={v}' for k, v in best.best_params.items())}: {best.best_value:.4g}")
        if self.groups:
            folders = shlex.join(map(str, self.groups))
            print(f"\nsweep   {folders}\nreport  python -m align report {folders}")


def check_search(typed: Any, one_after_another: bool) -> None:
    """Exit if Optuna cannot search with this command, as every trial would fail."""
    if not one_after_another:
        sys.exit(
            "align: search=optuna needs the result of each run before the next: it goes with python -m align, "
            "without plan=true, and on this machine or inside one SLURM job, not with cluster.launcher=slurm"
        )
    if not typed.sweeper.params and not any(re.search(r"=.*(\(|,)", word) for word in sys.argv[1:]):
        sys.exit(
            "align: search=optuna has nothing to search: type 'objective.beta=interval(0.5,8)', or a search space, "
            "hparams=simpo_small"
        )
