"""What a training has cost: time, tokens, memory.

Counted are the steps that the policy is made of, with the checkpoints between them, in all stretches of a run that was
stopped: not evaluation, the reference pass and start-up, and not steps that were lost to a kill. Memory is that of the
process that needed most: on a GPU the peak of what torch has allocated, on a CPU the peak of the resident memory.
"""

import contextlib
import json
import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from align.files import write_json

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the steps so far."""

    seconds: float = 0.0
    tokens: int = 0  # fed, padding left out
    peak_memory_gib: float = 0.0
    processes: int = 1

    def write(self, file: Path) -> None:
        """With a checkpoint, so that a run that goes on counts from there."""
        write_json(file, asdict(self))

    @staticmethod
    def read(file: Path) -> "Cost":
        """What `write` wrote; nothing, where a checkpoint is older than this."""
        return Cost(**json.loads(file.read_text())) if file.exists() else Cost()


def together(costs: Iterable[Cost]) -> Cost:
    """Of trainings one after the other."""
    whole = Cost()
    for cost in costs:
        whole = Cost(
            seconds=whole.seconds + cost.seconds,
            tokens=whole.tokens + cost.tokens,
            peak_memory_gib=max(whole.peak_memory_gib, cost.peak_memory_gib),
            processes=max(whole.processes, cost.processes),
        )
    return whole


def forget_peak(device: torch.device) -> None:
    """What was used before does not count: of an earlier run in this process, too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # no Linux, or a system that does not let us
            _RESET.write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes, since `forget_peak`; where a CPU's system cannot forget, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
