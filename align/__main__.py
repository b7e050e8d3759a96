"""`python -m align ...` and `align ...`: compose, check, plan or run. A newcomer starts reading here.

Composing needs no torch, so `--help` and `--cfg job` answer at once; the run is imported when there is one.
An error that the user can put right is one line and exit status 1; any other keeps its traceback.
HYDRA_FULL_ERROR=1 keeps it for all. A job of a sweep that fails does not stop the others; the sweep ends with their list.
"""

import json
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align import compose, slurm
from align.config import GROUPS, Launcher, RunConfig, Source, Stopped, UserError, resolve

_FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"
_OF_SWEEPS = ("hparams=", "search=")  # words that say which jobs there are, and nothing of one of them
_SHOWN = 3  # jobs that failed, in the last line: each has said why
_RUN = {Source.dataset: "align.run:run", Source.selfplay: "align.selfplay:selfplay"}


@dataclass
class _Sweep:
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
            _check_search(typed, trains and cfg.cluster.launcher is not Launcher.slurm)
        if _is_first():
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
        if _is_first():
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
            print(f"\nsweep   {folders}\nreport  python -m align.report {folders}")


def _is_first() -> bool:
    """Of several processes that were started from outside, the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def _check_search(typed: Any, one_after_another: bool) -> None:
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


def _do(node: DictConfig, stage: str | None, sweep: _Sweep) -> float | None:
    """One composed command: a run, or the stage of one that "module:function" names."""
    typed = HydraConfig.get()
    sweeps = typed.mode is RunMode.MULTIRUN
    given: Any = OmegaConf.to_container(typed.overrides.task)  # as typed: ${seed} is not resolved
    words = shlex.join(word for word in given if not word.startswith(_OF_SWEEPS))
    try:
        cfg: Any = OmegaConf.to_object(node)
        if isinstance(cfg, RunConfig):
            own = [source.path for source in typed.runtime.config_sources if source.provider == "command-line"]
            cfg.command = shlex.join(["python", "-m", "align", *(f"--config-dir={path}" for path in own)]) + f" {words}"
        if sweeps:
            sweep.begin_job(cfg, stage is None and not cfg.plan, words)
        function = resolve(stage or _RUN[cfg.source.name], "source")  # torch and transformers, only when something runs
        result: float | None = function(cfg)
        return result
    except Exception as error:
        by_user = isinstance(error, UserError | OmegaConfBaseException)
        if sweeps:
            if not by_user or _FULL_ERROR:
                traceback.print_exc()
            sweep.fail_job(error, words)
            raise  # Hydra goes on with the others
        if not by_user or _FULL_ERROR:
            raise
        sys.exit(f"align: {compose.one_line(error)}")


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"align: warning: {message}\n"


def _as_ctrl_c(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(stage: str | None = None, root: str = "config", schema: type = RunConfig) -> None:
    """Entry point of the console script and of `python -m align`; of `python -m align.sample` and others with a stage.

    `root` is the YAML of conf/ that is composed, and `schema` its type; others than a run's have a stage.
    """

    sweep = _Sweep()

    @hydra.main(config_path=str(compose.CONF), config_name=root, version_base="1.3")
    def job(node: DictConfig) -> float | None:
        return _do(node, stage, sweep)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise, so that the line below can say it shorter
    warnings.formatwarning = _warning_line
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    compose.install(schema)
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # wherever it was typed
    sys.path.insert(0, "")  # "module:function" of the working folder, for the console script as for python -m
    try:
        try:
            job()
            slurm.submit()
        except Exception as error:
            if error not in sweep.errors and len(sweep.failed) < max(1, sweep.jobs):
                raise
            sweep.end(ended_by_jobs=True)  # what is raised is what the first of them raised, which is said
        sweep.end(ended_by_jobs=False)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        unsent = "; nothing was submitted" if slurm.discard() else ""
        if _FULL_ERROR:
            raise
        sys.exit(f"align: {compose.one_line(error)}{unsent}")
    except KeyboardInterrupt as stop:
        at = f" {stop}" if isinstance(stop, Stopped) else ""
        print(f"align: stopped{at}; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
