"""The processes of a run, by the `cluster` node of the configuration. Refuses a cluster that cannot work."""

import os

import torch

from align.choices import Device, Launcher, Precision, Strategy
from align.config import ClusterConfig
from align.launch.rank import Cluster, inside
from align.say import UserError


def cluster_of(cfg: ClusterConfig, plan: bool = False) -> Cluster:
    """Resolve the `cluster` node, on this machine or, for a plan or a batch job, on the machines that it describes.

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
