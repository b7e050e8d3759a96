"""The processes of a run, and this one among them: its rank, device and precision; joining, leaving, stopping.

    cluster_of(cfg)  the processes that the `cluster` node of the configuration describes
    join(cluster)    this process's rank, connected to the others; it may `leave` and join again any number of times
    alone(cluster)   the same rank in a world of one, for work before, between and after that needs no others

It works in one process, in a worker of local.py, and under torchrun, accelerate launch and srun.
"""

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

from align.choices import Device, Launcher, Precision, Strategy
from align.config import ClusterConfig
from align.say import UserError, is_first

_PATIENCE = timedelta(hours=2)  # for which processes wait for each other: longer than rank 0 reads or writes alone
#: A store for each time that this process has joined. They are kept: in srun's rank 0 the first one listens, and the
#: others connect to it again. Every time has a new one, as a network may drop an idle connection.
_stores: list[torch.distributed.Store] = []


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes of a run, one to a device."""

    device: str  # "cuda" or "cpu"
    bf16: bool = False  # forwards in bfloat16; master weights are float32
    nodes: int = 1
    per_node: int = 1  # processes on each of the nodes
    strategy: Strategy = Strategy.single
    offload: bool = False
    memory: int | None = None  # bytes of a GPU; None on a CPU, or if a plan does not know
    cpu_threads: int | None = None

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.nodes * self.per_node


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among those of the run."""

    device: torch.device
    bf16: bool  # autocast; master weights are float32
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
        """True if the weights are divided among the processes, which must then run every forward together."""
        return self.strategy in (Strategy.fsdp, Strategy.zero3)

    @property
    def numerics(self) -> str:
        """Name of the rounding of a forward."""
        if not self.bf16:
            return "fp32"
        return "bf16 weights" if self.sharded or self.strategy is Strategy.zero2 else "bf16 autocast"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Enter the precision of forwards, the same in training, evaluation and the reference pass."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def least(self, number: int) -> int:
        """Return the smallest of all processes' numbers."""
        if self.world == 1:
            return number
        smallest = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        return int(smallest.item())

    def gathered(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        if self.world == 1:
            return values
        lists: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(lists, values)
        return [value for some in lists for value in some]

    def from_first(self, decide: Callable[[], Any]) -> Any:
        """Call `decide` on rank 0 only. Returns its result, or raises its `UserError`, on every process."""
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


def inside() -> bool:
    """Return True in one of several processes that torchrun, accelerate launch, srun or local.py has started."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def cluster_of(cfg: ClusterConfig, plan: bool = False) -> Cluster:
    """Resolve the `cluster` node, on this machine, or for a plan or a batch job as it is said; or raise `UserError`."""
    elsewhere = plan or (cfg.launcher is Launcher.slurm and not inside())
    if cfg.launcher is Launcher.slurm and cfg.device is Device.auto:
        needed = "cluster.launcher=slurm needs cluster.device=gpu or cpu"
        raise UserError(f"{needed}: where this is typed is not where it runs")
    gpus = torch.cuda.device_count()
    on_gpu = cfg.device is Device.gpu or (cfg.device is Device.auto and gpus > 0)
    nodes, per_node = _processes(cfg, gpus if on_gpu else None, elsewhere)
    has_bf16 = on_gpu and (elsewhere or torch.cuda.is_bf16_supported(including_emulation=False))
    if cfg.precision is Precision.bf16 and not has_bf16:
        found = f"this run is on {'cuda' if on_gpu else 'cpu'}"
        raise UserError(f"cluster.precision=bf16 needs a GPU that has it; {found}: use fp32 or auto")
    memory = int(cfg.gpu_memory_gib * 2**30) if cfg.gpu_memory_gib else None
    if memory is None and on_gpu and gpus:
        memory = torch.cuda.get_device_properties(0).total_memory
    return Cluster(
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
    """Return (nodes, processes per node). `gpus` is the number on this machine, None for a run on CPUs."""
    per_node = cfg.processes or max(gpus or 0, 1)
    if inside():  # the processes are running already, and the command must agree with them
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
    """Return the strategy, or `auto` if memory will decide."""
    strategy = cfg.strategy
    if world == 1 and strategy is Strategy.ddp:
        strategy = Strategy.single
    if world > 1 and strategy is Strategy.single:
        found = f"cluster.strategy=single is one process, and this run has {world}"
        raise UserError(f"{found}: use ddp, fsdp, zero2 or zero3")
    if cfg.offload and strategy in (Strategy.single, Strategy.ddp):
        dividing = "cluster.strategy=fsdp, zero2 or zero3"
        raise UserError(f"cluster.offload=true works with {dividing}, not with {strategy.value}")
    if cfg.offload and not on_gpu:
        raise UserError("cluster.offload=true moves to the host what a GPU need not hold, and this run is on the CPU")
    return strategy


def join(cluster: Cluster) -> Rank:
    """Connect to the other processes, also again after `leave`, and return the rank; or raise `UserError`."""
    rank = alone(cluster)
    if cluster.strategy is not Strategy.single and not torch.distributed.is_initialized():
        _connect(rank.device)
    return replace(rank, world=cluster.world, strategy=cluster.strategy, offload=cluster.offload)


def alone(cluster: Cluster) -> Rank:
    """Return this process's rank while it works without the others: its device, its number, and a world of one."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if cluster.device == "cpu" else torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        shared = max(1, (os.cpu_count() or 1) // cluster.per_node) if cluster.world > 1 else None
        if threads := cluster.cpu_threads or shared:
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # without it accelerate sets another number, and warns
    if cluster.strategy is Strategy.single:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # set by torchrun or srun for one process, which accelerate would take for many
    return Rank(device=device, bf16=cluster.bf16, number=rank, world=1)


def _connect(device: torch.device) -> None:
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FSDP2 would shard onto a GPU of this machine
    warnings.simplefilter("ignore", FutureWarning)  # torch's, about accelerate and DeepSpeed
    try:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=_PATIENCE))
        store.set_timeout(_PATIENCE)
        _stores.append(store)
        # The store still holds the addresses of an earlier group, at which a new one would look for closed sockets.
        prefixed = torch.distributed.PrefixStore(f"align-{len(_stores)}", store)
        torch.distributed.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        meeting = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
        reason = f": {' '.join(str(error).split())[:200]}"
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            reason = ", that port is in use: set MASTER_PORT to a free one, or torchrun --standalone"
        raise UserError(f"the processes cannot meet at {meeting}{reason}") from error


def free() -> None:
    """Release memory of the device that a model or a stage has used."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def leave() -> None:
    """Disconnect from the other processes, so that none waits for this one. All may `join` again."""
    if torch.distributed.is_initialized():
        deepspeed: Any = sys.modules.get("deepspeed.comm")  # it keeps groups of its own, and would use them again
        owner = deepspeed if deepspeed is not None and deepspeed.is_initialized() else torch.distributed
        owner.destroy_process_group()


class StopRequest:
    """Record of a request to stop: SIGTERM, Ctrl-C, or SLURM's warning that the time is up (SIGUSR2)."""

    came = time_is_up = False

    def __call__(self, number: int, frame: Any) -> None:
        """Handle a signal: record it, and tell the user. A second Ctrl-C does not wait."""
        if self.came and number == signal.SIGINT and not inside():
            raise KeyboardInterrupt
        if not self.came and is_first():
            print("align: stopping at the end of this step, with a checkpoint", file=sys.stderr)
        self.came = True
        self.time_is_up |= number == signal.SIGUSR2


@contextlib.contextmanager
def heeding_signals() -> Iterator[StopRequest]:
    """Record requests to stop instead of obeying them at once. Ignored signals, in workers Ctrl-C, stay ignored."""
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    with handling(request, *(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)):
        yield request


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Handle signals by `handler` for the length of a block; in another thread than the main one do nothing."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if in_main}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
