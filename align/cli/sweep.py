"""The jobs of a sweep: what each is called, which failed, and what is said at the end."""

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

OF_SWEEPS = ("hparams=", "search=")  # words that say which jobs there are, and nothing of one of them
_SHOWN = 3  # jobs that failed, in the last line: each has said why


@dataclass
class Sweep:
    """The jobs of this command, where it is a sweep."""

    jobs: int = 0
    failed: list[str] = field(default_factory=list)  # their words
    errors: list[Exception] = field(default_factory=list)  # and what they raised
    groups: dict[Path, list[dict[str, str]]] = field(
        default_factory=dict
    )  # of runs that are trained: what failed there
    group: Path | None = None  # of this job
    found: Path | None = None  # of a search

    def begin_job(self, cfg: Any, trains: bool, words: str) -> None:
        """All runs are one group, and each job says what it is."""
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
        """Say why; the others go on."""
        why = compose.one_line(error)
        print(f"align: job {self.jobs} failed: {why}", file=sys.stderr, flush=True)
        self.failed.append(words)
        self.errors.append(error)
        if self.group is not None:
            self.groups[self.group].append({"job": words, "why": why})

    def end(self, ended_by_jobs: bool) -> None:
        """Say what a search found, how to compare, and which jobs failed; these are an error where they end the sweep."""
        some = "; ".join(self.failed[:_SHOWN]) + (" ..." if len(self.failed) > _SHOWN else "")
        failed = (
            f"{len(self.failed)} of {self.jobs} jobs failed: {some}. The same command runs these again, and none that "
            "is complete"
        )
        if is_first():
            self._tell(ended_by_jobs)
            if self.failed and not ended_by_jobs:
                print(f"align: {failed}", file=sys.stderr)
        if ended_by_jobs:  # on every process
            raise UserError(failed)

    def _tell(self, ended_by_jobs: bool) -> None:
        for folder, jobs in self.groups.items():  # for the report: a job that was refused has left no folder
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
    """End the command where Optuna could not search: else every trial would be one that failed."""
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
