"""One command by Hydra: compose the configuration, then carry it out; a sweep goes job by job.

Composing needs no torch, so `--help` and `--cfg job` answer at once; the code of a run is imported when one begins. An
error that the user can correct is one line and exit status 1; any other keeps its traceback. HYDRA_FULL_ERROR=1 keeps
it for all. A job of a sweep that fails does not stop the others, and is listed at the end.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.choices import Launcher
from align.cli import compose
from align.config import GROUPS, RunConfig
from align.launch import slurm
from align.say import FULL_ERROR, Stopped, UserError, is_first, resolve

_RUN = "align.runs.spine:carry_out"
_OF_SWEEPS = ("hparams=", "search=")  # beginnings of words that choose the jobs, and are no part of any of them
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
            _check_search(typed, trains and cfg.cluster.launcher is not Launcher.slurm)
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
        """Print the result of a search, how to compare, and which jobs failed; `UserError` if `ended_by_jobs`."""
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


def _check_search(typed: Any, one_after_another: bool) -> None:
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


def job_of(
    sweep: Sweep, help_text: str, stage: str | None = None, root: str = "config", schema: str = "align.config:RunConfig"
) -> Callable[[], None]:
    """Return a function that composes the words of the command and carries out a run, or the stage "module:function".

    Args:
        help_text: the beginning of `--help`.
        root: the YAML of conf/ that is composed, into the type `schema`, "module:class".
    """

    @hydra.main(config_path=str(compose.CONF), config_name=root, version_base="1.3")
    def job(node: DictConfig) -> float | None:
        typed = HydraConfig.get()
        sweeps = typed.mode is RunMode.MULTIRUN
        task: Any = OmegaConf.to_container(typed.overrides.task)  # as typed: ${seed} is not resolved
        words = shlex.join(word for word in task if not word.startswith(_OF_SWEEPS))
        try:
            cfg: Any = OmegaConf.to_object(node)
            if isinstance(cfg, RunConfig):
                sources = [source for source in typed.runtime.config_sources if source.provider == "command-line"]
                folders = [f"--config-dir={source.path}" for source in sources]
                cfg.command = f"{shlex.join(['python', '-m', 'align', *folders])} {words}"
            if sweeps:
                sweep.begin_job(cfg, stage is None and not cfg.plan, words)
            function = resolve(stage or _RUN, "a run")  # imports torch and transformers, only when something runs
            result: float | None = function(cfg)
            return result
        except Exception as error:
            by_user = isinstance(error, UserError | OmegaConfBaseException)
            if sweeps:
                if not by_user or FULL_ERROR:
                    traceback.print_exc()
                sweep.fail_job(error, words)
                raise  # Hydra continues with the others
            if not by_user or FULL_ERROR:
                raise
            sys.exit(f"align: {compose.one_line(error)}")

    shape: Any = resolve(schema, "schema")
    compose.install(shape, help_text)
    run: Callable[[], None] = job
    return run


@contextlib.contextmanager
def one_line_errors(sweep: Sweep) -> Iterator[None]:
    """Set up the process for one command, and end it as users should see it: an error is one line, a stop is none."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise, so that one line can say it below
    warnings.formatwarning = lambda message, *_: f"align: warning: {message}\n"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # -m may stand anywhere
    sys.path.insert(0, "")  # finds "module:function" in the working folder, as python -m does
    try:
        try:
            yield
            slurm.submit()
        except Exception as error:
            if error not in sweep.errors and len(sweep.failed) < max(1, sweep.jobs):
                raise
            sweep.end(ended_by_jobs=True)  # Hydra raises the error of the first job, which has been printed
        sweep.end(ended_by_jobs=False)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        unsent = "; nothing was submitted" if slurm.discard() else ""
        if FULL_ERROR:
            raise
        sys.exit(f"align: {compose.one_line(error)}{unsent}")
    except KeyboardInterrupt as stop:
        at = f" {stop}" if isinstance(stop, Stopped) else ""
        print(f"align: stopped{at}; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
