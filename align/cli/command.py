"""One command by Hydra: compose the configuration, then carry it out; a sweep goes job by job.

Composing needs no torch, so `--help` and `--cfg job` answer at once; the code of a run is imported when one begins. An
error that the user can correct is one line and exit status 1; any other keeps its traceback. HYDRA_FULL_ERROR=1 keeps
it for all. A job of a sweep that fails does not stop the others, and is listed at the end.
"""

import contextlib
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.cli import compose
from align.cli.sweep import OF_SWEEPS, Sweep
from align.config import RunConfig
from align.launch import slurm
from align.say import FULL_ERROR, Stopped, UserError, resolve

_RUN = "align.runs.spine:carry_out"


def job_of(
    sweep: Sweep, help_text: str, stage: str | None = None, root: str = "config", schema: str = "align.config:RunConfig"
) -> Callable[[], None]:
    """Return a function that composes the words of the command and carries out a run, or the stage "module:function".

    Args:
        sweep: told about each job, if there are several.
        help_text: the beginning of `--help`.
        root: the YAML of conf/ that is composed.
        schema: "module:class" of its type.
    """

    @hydra.main(config_path=str(compose.CONF), config_name=root, version_base="1.3")
    def job(node: DictConfig) -> float | None:
        typed = HydraConfig.get()
        sweeps = typed.mode is RunMode.MULTIRUN
        task: Any = OmegaConf.to_container(typed.overrides.task)  # as typed: ${seed} is not resolved
        words = shlex.join(word for word in task if not word.startswith(OF_SWEEPS))
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
    warnings.formatwarning = _warning_line
    signal.signal(signal.SIGTERM, _as_ctrl_c)
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


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"align: warning: {message}\n"


def _as_ctrl_c(number: int, frame: object) -> None:
    raise KeyboardInterrupt
