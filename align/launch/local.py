"""Processes of a run on this machine: start them, watch them, pass signals on, name the first that fails.

It is torch's elastic agent without restarts, whose one signal could not tell "a neighbour died" (end too) from "stop"
(write a checkpoint first). A worker that fails is one line in the parent's terminal, with its rank, and the others are
ended at once, since they would wait for it in a collective. A worker whose parent is gone ends itself (lifeline.py).
Left out: starting processes on other machines, which SLURM (slurm.py) or torchrun does.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from align.choices import Strategy
from align.files import write_json
from align.launch import lifeline
from align.launch.rank import Cluster, handling, inside
from align.say import Stopped, UserError

_LAST_WORDS = 1.0  # seconds in which the others may report once one process has failed
_TO_CHECKPOINT = 600.0  # seconds from a stop to its checkpoint, at most; a second Ctrl-C does not wait


def each(cluster: Cluster, logs: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)` once in each process of the cluster. Returns the result, of rank 0 if there are several.

    It runs in this process if that is the only one, or if it was started from outside (torchrun, srun) as one of
    several. Otherwise a process is started for each rank, all on this machine.

    Args:
        logs: folder for the output of processes other than rank 0, and for the traceback of one that fails.
        function: importable, with arguments that can be pickled. It may call `join`.

    Raises:
        UserError: a process failed; the message names it. The others have ended by then.
        Stopped: the processes were asked to stop, and did.
    """
    alone = cluster.world == 1 and cluster.strategy in (Strategy.single, Strategy.auto)  # auto: nothing is trained
    if inside() or alone:
        return function(*args)
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.outcome"):
        old.unlink()
    # The parent holds the store at which the processes meet: on a port that the system picks, closed with the parent.
    store = torch.distributed.TCPStore("127.0.0.1", 0, cluster.world, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        context.Process(
            target=lifeline.call,
            args=(os.getpid(), pickle.dumps((_work, (rank, cluster, store.port, logs, function, args)))),
            name=f"align-{rank}",
        )
        for rank in range(cluster.world)
    ]
    asked: list[float] = []  # times at which Ctrl-C or SIGTERM came, each passed on as SIGTERM

    def pass_on(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    with handling(pass_on, signal.SIGINT, signal.SIGTERM):
        try:
            for process in processes:
                process.start()
            ended = _watch(processes, asked)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
    return _verdict(len(processes), ended, logs, asked)


def _watch(processes: list[BaseProcess], asked: list[float]) -> dict[int, int]:
    """Wait until all processes have ended, one has failed, or a stop took too long. Returns {rank: exit status}."""

    def ended() -> dict[int, int]:
        return {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode is not None}

    while len(ended()) < len(processes):
        wait([p.sentinel for p in processes if p.exitcode is None], timeout=0.5)
        too_long = asked and time.monotonic() - asked[0] > _TO_CHECKPOINT
        if any(ended().values()) or len(asked) > 1 or too_long:
            until = time.monotonic() + _LAST_WORDS
            while len(ended()) < len(processes) and time.monotonic() < until:
                time.sleep(0.02)
            break
    return ended()


def _verdict(world: int, ended: dict[int, int], logs: Path, asked: list[float]) -> Any:
    """Return the result of rank 0, or raise the failure that came first."""
    said: dict[int, dict[str, Any]] = {}
    for rank in range(world):
        with contextlib.suppress(OSError, ValueError):
            said[rank] = json.loads((logs / f"{rank}.outcome").read_text())
    in_order = sorted(said.values(), key=lambda outcome: outcome["time"])
    texts = {kind: [o["text"] for o in in_order if o["kind"] == kind] for kind in ("done", "user", "stopped", "failed")}
    if len(texts["done"]) == world:
        return said[0]["text"]
    if texts["user"]:
        raise UserError(texts["user"][0])
    if texts["stopped"]:
        raise Stopped(texts["stopped"][0])
    stop = signal.SIGTERM if asked else None  # ends a process in which no training is under way
    for rank, status in ended.items():  # a process ended by a signal reports nothing; the others report its absence
        if status < 0 and -status != stop:
            memory = "; out of memory? try a smaller engine.tokens_per_micro_batch or fewer cluster.processes"
            hint = memory if -status == signal.SIGKILL else f"; what it printed last is in {logs / f'{rank}.log'}"
            raise UserError(f"process {rank} of {world} was ended by {signal.Signals(-status).name}{hint}")
    if texts["failed"]:
        raise UserError(texts["failed"][0])
    if len(asked) > 1:
        raise Stopped("at once, without a checkpoint")
    if asked:
        long = f"killed, as no checkpoint came in {_TO_CHECKPOINT:.0f} s"
        raise Stopped("at once, as no training was under way" if ended else long)
    silent = min(rank for rank in range(world) if rank not in said)
    raise UserError(f"process {silent} of {world} ended with status {ended.get(silent)} and without a word; see {logs}")


def _work(
    rank: int, cluster: Cluster, port: int, logs: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Run the function as one process of the cluster, and write `<rank>.outcome`: how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to everyone; the parent passes on SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cluster.world, "LOCAL_WORLD_SIZE": cluster.per_node}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    tqdm.set_lock(threading.RLock())  # tqdm's own lock outlives a process that is killed, and the system complains
    os.environ |= {name: str(value) for name, value in {**ranks, **meeting}.items()}
    if rank > 0:
        log = os.open(logs / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
    outcome: dict[str, Any] = {"kind": "done"}
    try:
        outcome["text"] = function(*args)
    except UserError as error:
        outcome = {"kind": "user", "text": str(error)}
    except Stopped as stop:
        outcome = {"kind": "stopped", "text": str(stop)}
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        trace = logs / f"{rank}.traceback"
        trace.write_text(traceback.format_exc())
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(at.filename).name}:{at.lineno})"
        outcome = {"kind": "failed", "text": f"process {rank} of {cluster.world}: {text}; traceback in {trace}"}
    write_json(logs / f"{rank}.outcome", {**outcome, "time": time.time()})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if outcome["kind"] in ("done", "stopped") else 1)  # at once: an open connection must not delay it


def logs_of(folder: Path) -> Path:
    """Return the log folder of a stage that runs by itself; each command has its own, as several may share `folder`."""
    return folder / "logs" / f"{socket.gethostname()}-{os.getpid()}"
