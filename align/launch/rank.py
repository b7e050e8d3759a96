"""This process among those of a run: its rank, device and precision; how it joins, leaves and is stopped."""

import contextlib
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from align.choices import Strategy
from align.say import UserError

#: Processes wait for each other that long: more than the first of them takes to write or read anything alone.
_PATIENCE = timedelta(hours=2)
#: The stores at which this process has met the others, one for each time. They are kept: in srun's rank 0 the first is
#: what listens, and the others come to it again. Each time has one of its own, as some network may drop an idle one.
_stores: list[torch.distributed.Store] = []


@dataclass(frozen=True, kw_only=True)
class Cluster:
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
class Rank:
    """This process among those of the run."""

    device: torch.device
    bf16: bool  # autocast; master weights are float32 all the same
    number: int
    world: int
    strategy: Strategy = Strategy.single
    offload: bool = False

    @property
    def is_first(self) -> bool:
        """True on rank 0, or when not distributed."""
        return self.number == 0

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
        if self.is_first:
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


def join(cluster: Cluster) -> Rank:
    """This process's place in the fleet, connected to the others; also again, after `leave`.

    Raises:
        UserError: the processes cannot meet.
    """
    own = alone(cluster)
    if cluster.strategy is not Strategy.single and not torch.distributed.is_initialized():
        _connect(own.device)
    return replace(own, world=cluster.world, strategy=cluster.strategy, offload=cluster.offload)


def alone(cluster: Cluster) -> Rank:
    """This process's place while it works without the others: its device, its cores, its rank, and a world of one."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if cluster.device == "cpu" else torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_cores(cluster)
    if cluster.strategy is Strategy.single:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # of torchrun or srun with one process, which accelerate would take for many
    return Rank(device=device, bf16=cluster.bf16, number=rank, world=1)


def _share_cores(cluster: Cluster) -> None:
    shared = max(1, (os.cpu_count() or 1) // cluster.per_node) if cluster.world > 1 else None
    if threads := cluster.cpu_threads or shared:
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
