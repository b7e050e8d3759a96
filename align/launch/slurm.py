"""SLURM: submit prepared runs, one job each or a sweep as one array, and run a task of a job.

Runs are checked and their data prepared where the command is typed, as compute nodes often have no network. A preempted
job is queued again by SLURM, and a job whose time is up requeues itself; both continue in the same run folder from the
last checkpoint. Jobs are submitit's. Left out: waiting for them.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.choices import Launcher
from align.config import ClusterConfig, RunConfig
from align.say import Stopped, UserError, resolve

_TO_CHECKPOINT = 300  # seconds between SLURM's warning that the time is up and the end
_TO_REPORT = 30  # seconds that the first task has for its tracker, and to queue the job again


#: (function, its run, processes per node, on GPUs) of each run that waits for `submit`
_queue: list[tuple[Callable[[RunConfig], object], RunConfig, int, bool]] = []


def check() -> None:
    """Raise `UserError` on a machine that cannot submit."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError("cluster.launcher=slurm needs submitit: pip install submitit")
    if missing := [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]:
        raise UserError(
            f"cluster.launcher=slurm needs {', '.join(missing)}, which this machine lacks: type the command on a login "
            "node of the cluster, or use cluster=auto here"
        )


def enqueue(run: Callable[[RunConfig], object], cfg: RunConfig, per_node: int, on_gpu: bool) -> None:
    """Queue a checked run whose `run_dir` is set, with the function that runs it, for `submit`."""
    _queue.append((run, cfg, per_node, on_gpu))


def discard() -> bool:
    """Empty the queue after the command has failed. Returns True if it held runs."""
    any_queued = bool(_queue)
    _queue.clear()
    return any_queued


def submit() -> None:
    """Submit the queued runs, one job or an array, and print jobs and logs; `UserError` where SLURM refuses."""
    if not _queue:
        return
    import submitit

    functions, runs, per_node, on_gpu = zip(*_queue, strict=True)
    _queue.clear()
    logs = Path(str(runs[0].run_dir)).parent / "slurm"
    executor = submitit.SlurmExecutor(folder=str(logs / "%j"))
    said = io.StringIO()  # sbatch prints its refusal, which the error repeats
    try:
        executor.update_parameters(**_parameters(runs[0].cluster, per_node[0], on_gpu[0]))
        names = [f"{function.__module__}:{function.__qualname__}" for function in functions]
        with contextlib.redirect_stderr(said):
            jobs = executor.map_array(work, names, runs)
    except (submitit.core.utils.FailedJobError, ValueError, TypeError) as error:
        said_by = str(error).replace("\nsbatch: error: ", "; ").replace("sbatch: error: ", "")
        reason = f"{' '.join(said_by.split())[:400]}; what it is asked for is under cluster.slurm"
        raise UserError(f"SLURM refuses the job: {reason}") from error
    for cfg, job in zip(runs, jobs, strict=True):
        print(f"job {job.job_id}  {cfg.run_dir}\n  log  {job.paths.stdout}")
    print("squeue shows them, scancel <job> stops one; the same command again goes on where it stopped")


def _parameters(cluster: ClusterConfig, per_node: int, on_gpu: bool) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor, which leaves out those that are None."""
    slurm = cluster.slurm
    return {
        "job_name": "align",
        "nodes": cluster.nodes,
        "ntasks_per_node": per_node,
        "partition": slurm.partition,
        "account": slurm.account,
        "cpus_per_task": slurm.cpus_per_process,
        "gpus_per_node": per_node if on_gpu else None,
        "time": slurm.minutes,
        "array_parallelism": slurm.at_once,
        "setup": list(slurm.setup),
        "srun_args": ["--kill-on-bad-exit=1"],  # else the others wait in a collective for the one that failed
        "signal_delay_s": min(_TO_CHECKPOINT, 20 * slurm.minutes),  # the last third of a short job
        "additional_parameters": {"requeue": True, **slurm.options},
    }


def take_place() -> None:
    """Set the variables that torchrun would set, if this is one of several tasks of srun."""
    env = os.environ
    if "SLURM_STEP_ID" not in env or "RANK" in env or env["SLURM_NTASKS"] == "1":
        return
    world, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_STEP_NUM_NODES", 1))
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    first = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True).stdout
    os.environ |= {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world // nodes),
        "MASTER_ADDR": first.split()[0],
        "MASTER_PORT": env.get("MASTER_PORT", str(12000 + int(env["SLURM_JOB_ID"]) % 20000)),
    }


def work(run: str, cfg: RunConfig) -> None:
    """Run one task of a job. Exits with a status other than 0 if the run is not complete."""
    signal.signal(signal.SIGTERM, _stop)  # submitit ignores it
    signal.signal(signal.SIGUSR2, _stop)
    try:
        function = resolve(run, "a job")  # imports torch, which takes seconds, with the signals handled already
        here = replace(cfg.cluster, launcher=Launcher.local)  # else a single task would submit itself
        function(replace(cfg, cluster=here))
    except UserError as error:
        sys.exit(f"align: {error}")
    except Stopped as stop:
        if os.environ["SLURM_PROCID"] != "0":
            time.sleep(_TO_REPORT)  # the first task that ends takes the others with it
        print(f"align: stopped {stop}", file=sys.stderr, flush=True)
        if os.environ["SLURM_PROCID"] == "0" and (stop.time_is_up or _has_grace()):
            subprocess.run(["scontrol", "requeue", _job_name()], check=True)
        sys.exit(1)  # a task that returned would count as done


def _job_name() -> str:
    """Return the job's name for scontrol. SLURM_JOB_ID of an array's last task is that of the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _has_grace() -> bool:
    """Return True if the job is preempted with a GraceTime: SLURM requeues it only if it still runs at its end."""
    show = ["scontrol", "show", "job", "--oneliner", _job_name()]
    shown = subprocess.run(show, capture_output=True, text=True).stdout
    return "JobState=RUNNING" in shown and re.search(r"PreemptTime=\d", shown) is not None


def _stop(number: int, frame: object) -> None:
    """Handle SIGTERM, and SLURM's warning that the time is up, outside of a training."""
    time_is_up = number == signal.SIGUSR2
    why = "the time is up and no training" if time_is_up else "no training"
    raise Stopped(f"at once, as {why} was under way", time_is_up)
