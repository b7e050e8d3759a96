"""Where a run runs: device, precision, rank and world size. One process on this machine, or a place in torchrun's.

`python -m align` uses one device. Under torchrun or accelerate launch every process runs the same command and takes
its share; starting the workers ourselves comes with the `cluster` group's larger choices.
"""

import contextlib
import os
from dataclasses import dataclass

import torch

from align.config import ClusterConfig, Device, Precision, UserError


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those of the run."""

    device: torch.device
    bf16: bool  # autocast; weights are float32 all the same
    rank: int
    world: int

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


def place(cfg: ClusterConfig) -> Place:
    """Find this process's place, and set the threads of a CPU run.

    Raises:
        UserError: bf16 on a device that has none.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = cfg.device is Device.auto and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported()
    if cfg.precision is Precision.bf16 and not has_bf16:
        raise UserError(
            f"cluster.precision=bf16 needs a GPU that has it; this run is on {device.type}: use fp32 or auto"
        )
    if cfg.cpu_threads is not None:
        torch.set_num_threads(cfg.cpu_threads)
    return Place(device=device, bf16=has_bf16 and cfg.precision is not Precision.fp32, rank=rank, world=world)
