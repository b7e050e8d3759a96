"""SLURM: submit prepared runs, one job each, a sweep as one array; and what a task does once it runs.

What can be wrong is found where the command is typed, and data are prepared there: compute nodes often have no network.
A job that is preempted is queued again by SLURM, and one whose time is up asks for it itself; either way the same run
folder goes on from its last checkpoint. Jobs are submitit's; left out: waiting for them.
"""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.choices import Launcher
from align.config import ClusterConfig, RunConfig
from align.say import Stopped, UserError, resolve

_TO_CHECKPOINT = 300  # seconds between SLURM's warning that the time is up and the end


_TO_SPEAK = 30  # seconds that the first task has for its tracker, and to queue the job again


@dataclass(frozen=True, kw_only=True)
class _Queued:
    run: Callable[[RunConfig], object]
    cfg: RunConfig
    per_node: int
    on_gpu: bool


_queue: list[_Queued] = []


def check() -> None:
    """Raise `UserError` where nothing can be submitted."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError("cluster.launcher=slurm needs submitit: pip install submitit")
    if missing := [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]:
        raise UserError(
            f"cluster.launcher=slurm needs {', '.join(missing)}, which this machine lacks: type the command on a login "
            "node of the cluster, or use cluster=auto here"
        )


def enqueue(run: Callable[[RunConfig], object], cfg: RunConfig, per_node: int, on_gpu: bool) -> None:
    """Take a checked run whose `run_dir` is set, and what runs it; `submit` hands in all that one command makes."""
    _queue.append(_Queued(run=run, cfg=cfg, per_node=per_node, on_gpu=on_gpu))


def discard() -> bool:
    """Forget what is queued, where the command has failed; whether there was any."""
    any_queued = bool(_queue)
    _queue.clear()
    return any_queued


def submit() -> None:
    """Hand in what is queued: one job, or an array. Prints the jobs, and where they write.

    Raises:
        UserError: SLURM refuses.
    """
    if not _queue:
        return
    import submitit

    runs, first = list(_queue), _queue[0]
    _queue.clear()
    logs = Path(str(first.cfg.run_dir)).parent / "slurm"
    executor = submitit.SlurmExecutor(folder=str(logs / "%j"))
    said = io.StringIO()  # what sbatch prints where it refuses, which the error says too
    try:
        executor.update_parameters(**_parameters(first.cfg.cluster, first.per_node, first.on_gpu))
        names = [f"{queued.run.__module__}:{queued.run.__qualname__}" for queued in runs]
        with contextlib.redirect_stderr(said):
            jobs = executor.map_array(work, names, [queued.cfg for queued in runs])
    except (submitit.core.utils.FailedJobError, ValueError, TypeError) as error:
        reason = " ".join(str(error).replace("\nsbatch: error: ", "; ").replace("sbatch: error: ", "").split())
        raise UserError(
            f"SLURM refuses the job: {reason[:400]}; what it is asked for is under cluster.slurm"
        ) from error
    for queued, job in zip(runs, jobs, strict=True):
        print(f"job {job.job_id}  {queued.cfg.run_dir}\n  log  {job.paths.stdout}")
    print("squeue shows them, scancel <job> stops one; the same command again goes on where it stopped")


def _parameters(cluster: ClusterConfig, per_node: int, on_gpu: bool) -> dict[str, Any]:
    """Of submitit's SlurmExecutor."""
    wanted = cluster.slurm
    given = {
        "partition": wanted.partition,
        "account": wanted.account,
        "cpus_per_task": wanted.cpus_per_process,
        "gpus_per_node": per_node if on_gpu else None,
    }
    return {
        "job_name": "align",
        "nodes": cluster.nodes,
        "ntasks_per_node": per_node,
        "time": wanted.minutes,
        "array_parallelism": wanted.at_once,
        "setup": list(wanted.setup),
        "srun_args": ["--kill-on-bad-exit=1"],  # else the others wait in a collective for the one that failed
        "signal_delay_s": min(_TO_CHECKPOINT, 20 * wanted.minutes),  # of a short job: the last third
        "additional_parameters": {"requeue": True, **wanted.options},
        **{name: value for name, value in given.items() if value is not None},
    }


def take_place() -> None:
    """As one of several tasks of srun: tell torch so, in torchrun's words."""
    if "SLURM_STEP_ID" not in os.environ or "RANK" in os.environ:
        return
    of_srun = os.environ
    world, nodes = int(of_srun["SLURM_NTASKS"]), int(of_srun.get("SLURM_STEP_NUM_NODES", 1))
    if world == 1:
        return
    hosts = of_srun.get("SLURM_STEP_NODELIST", of_srun.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    first = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True).stdout
    os.environ |= {
        "RANK": of_srun["SLURM_PROCID"],
        "LOCAL_RANK": of_srun["SLURM_LOCALID"],
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world // nodes),
        "MASTER_ADDR": first.split()[0],
        "MASTER_PORT": of_srun.get("MASTER_PORT", str(12000 + int(of_srun["SLURM_JOB_ID"]) % 20000)),
    }


def work(run: str, cfg: RunConfig) -> None:
    """What each task of a job does. Leaves with a status that is not 0 where the run is not complete."""
    signal.signal(signal.SIGTERM, _to_leave)  # submitit ignores it
    signal.signal(signal.SIGUSR2, _time_is_up)
    try:
        function = resolve(run, "a job")  # torch is imported here: the signals are heeded by then
        here = replace(cfg.cluster, launcher=Launcher.local)  # else a task that is alone would submit itself
        function(replace(cfg, cluster=here))
    except UserError as error:
        sys.exit(f"align: {error}")
    except Stopped as stop:
        if os.environ["SLURM_PROCID"] != "0":
            time.sleep(_TO_SPEAK)  # the first task that ends takes the others with it
        print(f"align: stopped {stop}", file=sys.stderr, flush=True)
        if os.environ["SLURM_PROCID"] == "0" and (stop.time_is_up or _has_grace()):
            subprocess.run(["scontrol", "requeue", _job_name()], check=True)
        sys.exit(1)  # a task that returned would count as done


def _job_name() -> str:
    """As scontrol takes it: SLURM_JOB_ID of an array's last task is that of the whole array."""
    of_array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{of_array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if of_array else os.environ["SLURM_JOB_ID"]


def _has_grace() -> bool:
    """Whether this job is preempted with a GraceTime: SLURM queues it again only if it is still there at its end."""
    shown = subprocess.run(
        ["scontrol", "show", "job", "--oneliner", _job_name()], capture_output=True, text=True
    ).stdout
    return "JobState=RUNNING" in shown and re.search(r"PreemptTime=\d", shown) is not None


def _time_is_up(number: int, frame: object) -> None:
    raise Stopped("at once, as the time is up and no training was under way", time_is_up=True)


def _to_leave(number: int, frame: object) -> None:
    raise Stopped("at once, as no training was under way")
