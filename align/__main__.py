"""`python -m align ...` and `align ...`: compose, check, plan or run. A newcomer starts reading here.

Composing needs no torch, so `--help` and `--cfg job` answer at once; the run is imported when there is one.
An error that the user can put right is one line and exit status 1; any other keeps its traceback.
HYDRA_FULL_ERROR=1 keeps it for all.
"""

import os
import signal
import sys
import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align import compose, slurm
from align.config import RunConfig, Source, Stopped, UserError, resolve

_FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


_RUN = {Source.dataset: "align.run:run", Source.selfplay: "align.selfplay:selfplay"}


def _do(node: DictConfig, stage: str | None) -> float | None:
    """One composed command: a run, or the stage of one that "module:function" names."""
    try:
        cfg = OmegaConf.to_object(node)
        assert isinstance(cfg, RunConfig)
        function = resolve(stage or _RUN[cfg.source.name], "source")  # torch and transformers, only when something runs
        result: float | None = function(cfg)
        return result
    except (UserError, OmegaConfBaseException) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN or _FULL_ERROR:
            raise  # Hydra reports it, and the other jobs go on
        sys.exit(f"align: {compose.one_line(error)}")


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"align: warning: {message}\n"


def _as_ctrl_c(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(stage: str | None = None) -> None:
    """Entry point of the console script and of `python -m align`; of `python -m align.sample` and others with a stage."""

    @hydra.main(config_path=str(compose.CONF), config_name="config", version_base="1.3")
    def job(node: DictConfig) -> float | None:
        return _do(node, stage)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise, so that the line below can say it shorter
    warnings.formatwarning = _warning_line
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    compose.install()
    sys.path.insert(0, "")  # "module:function" of the working folder, for the console script as for python -m
    try:
        job()
        slurm.submit()
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
