"""Where a run runs: its processes, this process's place among them, and how they start, stop and fail together.

    fleet(cfg)      what the `cluster` node comes to on this machine: refuses what cannot work, before anything runs
    start(...)      runs a function once per process of this machine, and watches them: torch's elastic agent without
                    its restarts, whose one signal could not tell "a neighbour died" (die too) from "stop" (save first)
    join(fleet)     this process's place: alone, a worker of `start`, or one of torchrun's, accelerate's or srun's;
                    a process may `leave` and join again, as often as it likes
    apart(fleet)    the same place for work without the others, before, between and after

A worker that fails is one line in the parent's terminal, with its rank; the others are ended at once, since they would
wait for it in a collective. A worker whose parent is gone ends itself. Left out: starting processes on other machines,
which is SLURM's (slurm.py) or torchrun's part.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from align import lifeline
from align.config import ClusterConfig, Device, Launcher, Precision, Stopped, Strategy, UserError

#: Processes wait for each other that long: more than the first of them takes to write or read anything alone.
_PATIENCE = timedelta(hours=2)
_LAST_WORDS = 1.0  # seconds that the others get to say what they know once one has failed
_TO_CHECKPOINT = 600.0  # seconds from a stop to its checkpoint, at most; a second Ctrl-C does not wait
#: The stores at which this process has met the others, one for each time. They are kept: in srun's rank 0 the first is
#: what listens, and the others come to it again. Each time has one of its own, as some network may drop an idle one.
_stores: list[torch.distributed.Store] = []


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The processes of a run, one to a device.

    Attributes:
        per_node: processes on each of the `nodes`.
        device: "cuda" or "cpu".
        bf16: forwards in bfloat16; master weights are float32 all the same.
        memory: bytes of a GPU; None on a CPU, or where a plan does not know.
    """

    device: str
    bf16: bool = False
    nodes: int = 1
    per_node: int = 1
    strategy: Strategy = Strategy.single
    offload: bool = False
    memory: int | None = None
    cpu_threads: int | None = None

    @property
    def world(self) -> int:
        """How many processes."""
        return self.nodes * self.per_node


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those of the run."""

    device: torch.device
    bf16: bool  # autocast; master weights are float32 all the same
    rank: int
    world: int
    strategy: Strategy = Strategy.single
    offload: bool = False

    @property
    def sharded(self) -> bool:
        """Weights are divided among the processes: every forward is one of all of them, in step."""
        return self.strategy in (Strategy.fsdp, Strategy.zero3)

    @property
    def numerics(self) -> str:
        """What decides how a forward rounds."""
        if not self.bf16:
            return "fp32"
        deepspeed = self.strategy in (Strategy.zero2, Strategy.zero3)
        return "bf16 weights" if self.sharded or deepspeed else "bf16 autocast"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The precision that forwards run in, in training, evaluation and the reference pass alike."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers, once they are connected."""
        if self.world == 1:
            return number
        smallest = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        return int(smallest.item())

    def gathered(self, values: list[Any]) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.world == 1:
            return values
        lists: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(lists, values)
        return [value for some in lists for value in some]

    def from_first(self, decide: Callable[[], Any]) -> Any:
        """What rank 0's `decide()` returns, or its `UserError`, on every process."""
        if self.world == 1:
            return decide()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = decide()
            except UserError as error:
                box[1] = str(error)
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]


# What the cluster comes to ------------------------------------------------------------------------------------------


def inside() -> bool:
    """Whether somebody else has started this process as one of several: torchrun, accelerate launch, srun."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def fleet(cfg: ClusterConfig, plan: bool = False) -> Fleet:
    """What the `cluster` node comes to: here, or for a plan or a batch job on the machines that it describes.

    Raises:
        UserError: more GPUs than there are, bf16 without a GPU, a strategy that contradicts the number of processes.
    """
    elsewhere = plan or (cfg.launcher is Launcher.slurm and not inside())
    if cfg.launcher is Launcher.slurm and cfg.device is Device.auto:
        raise UserError(
            "cluster.launcher=slurm needs cluster.device=gpu or cpu: where this is typed is not where it runs"
        )
    gpus = torch.cuda.device_count()
    on_gpu = cfg.device is Device.gpu or (cfg.device is Device.auto and gpus > 0)
    nodes, per_node = _processes(cfg, gpus if on_gpu else None, elsewhere)
    has_bf16 = on_gpu and (elsewhere or torch.cuda.is_bf16_supported(including_emulation=False))
    if cfg.precision is Precision.bf16 and not has_bf16:
        raise UserError(
            f"cluster.precision=bf16 needs a GPU that has it; this run is on {'cuda' if on_gpu else 'cpu'}: use fp32 or auto"
        )
    memory = int(cfg.gpu_memory_gib * 2**30) if cfg.gpu_memory_gib else None
    if memory is None and on_gpu and gpus:
        memory = torch.cuda.get_device_properties(0).total_memory
    return Fleet(
        device="cuda" if on_gpu else "cpu",
        bf16=has_bf16 and cfg.precision is not Precision.fp32,
        nodes=nodes,
        per_node=per_node,
        strategy=_strategy(cfg, nodes * per_node, on_gpu),
        offload=cfg.offload,
        memory=memory if on_gpu else None,
        cpu_threads=cfg.cpu_threads,
    )


def _processes(cfg: ClusterConfig, gpus: int | None, elsewhere: bool) -> tuple[int, int]:
    """(nodes, processes per node); `gpus` of this machine, None for a run on CPUs."""
    per_node = cfg.processes or max(gpus or 0, 1)
    if inside():  # as started from outside; what the command says must agree
        world = int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if cfg.processes is not None and cfg.nodes * cfg.processes != world:
            raise UserError(
                f"torchrun or srun has started {world} processes, and cluster asks for {cfg.nodes} x {cfg.processes}: "
                f"add cluster.nodes={max(1, world // local)} cluster.processes={local}"
            )
        return max(1, world // local), local
    if gpus is not None and not elsewhere and per_node > gpus:
        raise UserError(
            f"cluster: this machine has {gpus} of the {per_node} GPUs that are asked for: "
            + (f"set cluster.processes={gpus}" if gpus else "try cluster=auto, or cluster.device=cpu")
        )
    if cfg.nodes > 1 and not elsewhere:
        raise UserError(
            f"cluster.nodes={cfg.nodes} needs somebody to start the processes on each: cluster.launcher=slurm, or "
            f"torchrun --nnodes {cfg.nodes} --nproc-per-node {per_node} --rdzv-endpoint <host of the first>:29500 -m align ..."
        )
    return cfg.nodes, per_node


def _strategy(cfg: ClusterConfig, world: int, on_gpu: bool) -> Strategy:
    """The strategy, or `auto` where memory will decide."""
    strategy = cfg.strategy
    if world == 1 and strategy is Strategy.ddp:
        strategy = Strategy.single
    if world > 1 and strategy is Strategy.single:
        raise UserError(
            f"cluster.strategy=single is one process, and this run has {world}: use ddp, fsdp, zero2 or zero3"
        )
    if cfg.offload and strategy in (Strategy.single, Strategy.ddp):
        raise UserError(
            f"cluster.offload=true works with cluster.strategy=fsdp, zero2 or zero3, not with {strategy.value}"
        )
    if cfg.offload and not on_gpu:
        raise UserError("cluster.offload=true moves to the host what a GPU need not hold, and this run is on the CPU")
    return strategy


def join(fleet: Fleet) -> Place:
    """This process's place in the fleet, connected to the others; also again, after `leave`.

    Raises:
        UserError: the processes cannot meet.
    """
    alone = apart(fleet)
    if fleet.strategy is not Strategy.single and not torch.distributed.is_initialized():
        _connect(alone.device)
    return replace(alone, world=fleet.world, strategy=fleet.strategy, offload=fleet.offload)


def apart(fleet: Fleet) -> Place:
    """This process's place while it works without the others: its device, its cores, its rank, and a world of one."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if fleet.device == "cpu" else torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_cores(fleet)
    if fleet.strategy is Strategy.single:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # of torchrun or srun with one process, which accelerate would take for many
    return Place(device=device, bf16=fleet.bf16, rank=rank, world=1)


def _share_cores(fleet: Fleet) -> None:
    shared = max(1, (os.cpu_count() or 1) // fleet.per_node) if fleet.world > 1 else None
    if threads := fleet.cpu_threads or shared:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else accelerate sets its own number, and warns


def _connect(device: torch.device) -> None:
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FSDP2 would shard onto a GPU that is there
    warnings.simplefilter("ignore", FutureWarning)  # torch's, at accelerate and DeepSpeed
    try:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=_PATIENCE))
        store.set_timeout(_PATIENCE)
        _stores.append(store)
        # What a group has written at the store is still there: by its addresses the next would look for who is gone.
        own = torch.distributed.PrefixStore(f"align-{len(_stores)}", store)
        torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        meeting = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise UserError(
                f"the processes cannot meet at {meeting}, that port is in use: set MASTER_PORT to a free one, or "
                "torchrun --standalone"
            ) from error
        raise UserError(f"the processes cannot meet at {meeting}: {' '.join(str(error).split())[:200]}") from error


def free() -> None:
    """Give the device back what a model or a stage has used."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def leave() -> None:
    """Disconnect from the other processes, so that none waits for this one. All may `join` again."""
    if torch.distributed.is_initialized():
        deepspeed: Any = sys.modules.get("deepspeed.comm")  # it keeps groups of its own, and would use them again
        whose = deepspeed if deepspeed is not None and deepspeed.is_initialized() else torch.distributed
        whose.destroy_process_group()


# Stopping -----------------------------------------------------------------------------------------------------------


class StopRequest:
    """Whether this process was asked to stop: SIGTERM, Ctrl-C, or SLURM's warning that the time is up (SIGUSR2)."""

    def __init__(self) -> None:
        self.came = self.time_is_up = False

    def __call__(self, number: int, frame: Any) -> None:
        """The signal handler: remember, and say that it was heard. A second Ctrl-C does not wait."""
        if self.came and number == signal.SIGINT and not inside():
            raise KeyboardInterrupt
        if not self.came and os.environ.get("RANK", "0") == "0":
            print("align: stopping at the end of this step, with a checkpoint", file=sys.stderr)
        self.came = True
        self.time_is_up |= number == signal.SIGUSR2


@contextlib.contextmanager
def heeding_signals() -> Iterator[StopRequest]:
    """A request to stop is noted, not obeyed at once; where Ctrl-C is ignored (a worker of `start`) it stays so."""
    request = StopRequest()
    before: dict[int, Any] = {}
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            before[number] = signal.getsignal(number)
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, request)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Starting -----------------------------------------------------------------------------------------------------------


def start(fleet: Fleet, logs: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)` once in each process of the fleet, all on this machine. Returns what rank 0's returns.

    Args:
        logs: folder for what processes other than rank 0 print, and for the traceback of one that fails.
        function: importable, and all that it takes can be pickled. It may call `join`.

    Raises:
        UserError: a process failed; the message names it. The others are gone by then.
        Stopped: the processes were asked to stop, and did.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.outcome"):
        old.unlink()
    # The parent keeps the store at which the processes meet: a port that the system picks, and gone with the parent.
    store = torch.distributed.TCPStore("127.0.0.1", 0, fleet.world, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        context.Process(
            target=lifeline.call,
            args=(os.getpid(), pickle.dumps((_work, (rank, fleet, store.port, logs, function, args)))),
            name=f"align-{rank}",
        )
        for rank in range(fleet.world)
    ]
    with _passing_on_signals(processes) as asked:
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
    """Wait until all processes have ended, one has failed, or they took too long to stop. {rank: exit status}."""

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


@contextlib.contextmanager
def _passing_on_signals(processes: list[BaseProcess]) -> Iterator[list[float]]:
    """Ctrl-C and SIGTERM become SIGTERM for every process. Yields the moments when they came."""
    asked: list[float] = []

    def pass_on(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _verdict(world: int, ended: dict[int, int], logs: Path, asked: list[float]) -> Any:
    """What rank 0 returned, or the failure that came first."""
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
    of_stop = signal.SIGTERM if asked else None  # what it comes to wherever no training is under way
    for rank, status in ended.items():  # one that a signal ended could not speak; the others only say that it is gone
        if status < 0 and -status != of_stop:
            memory = "; out of memory? try a smaller engine.tokens_per_micro_batch or fewer cluster.processes"
            hint = memory if -status == signal.SIGKILL else f"; what it printed last is in {logs / f'{rank}.log'}"
            raise UserError(f"process {rank} of {world} was ended by {signal.Signals(-status).name}{hint}")
    if texts["failed"]:
        raise UserError(texts["failed"][0])
    if asked:
        if len(asked) > 1:
            raise Stopped("at once, without a checkpoint")
        long = f"killed, as no checkpoint came in {_TO_CHECKPOINT:.0f} s"
        raise Stopped("at once, as no training was under way" if ended else long)
    silent = min(rank for rank in range(world) if rank not in said)
    raise UserError(f"process {silent} of {world} ended with status {ended.get(silent)} and without a word; see {logs}")


def _work(rank: int, fleet: Fleet, port: int, logs: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The body of a process: take the place, run, and leave word of how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to everyone; the parent passes on SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": fleet.world, "LOCAL_WORLD_SIZE": fleet.per_node}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    tqdm.set_lock(threading.RLock())  # its own outlives a process that is killed, and the system complains
    os.environ |= {name: str(value) for name, value in {**places, **meeting}.items()}
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
        outcome = {"kind": "failed", "text": f"process {rank} of {fleet.world}: {text}; traceback in {trace}"}
    unfinished = logs / f"{rank}.unfinished"
    unfinished.write_text(json.dumps({**outcome, "time": time.time()}))
    unfinished.replace(logs / f"{rank}.outcome")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if outcome["kind"] in ("done", "stopped") else 1)  # nothing that is connected may keep it here
