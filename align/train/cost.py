"""The cost of a training: time, tokens, memory.

Counted are the steps that the policy is made of, with the checkpoints between them, in all stretches of a run that was
stopped: not evaluation, the reference pass and start-up, and not steps that were lost to a kill. Memory is that of the
process that needed most: on a GPU the peak of what torch has allocated, on a CPU the peak of the resident memory.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from align.launch.rank import Rank

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of some steps, of all processes."""

    seconds: float = 0.0
    tokens: int = 0  # fed, padding left out
    peak_memory_gib: float = 0.0
    processes: int = 1


def together(costs: Iterable[Cost]) -> Cost:
    """Return the cost of trainings one after the other."""
    whole = Cost()
    for cost in costs:
        whole = Cost(
            seconds=whole.seconds + cost.seconds,
            tokens=whole.tokens + cost.tokens,
            peak_memory_gib=max(whole.peak_memory_gib, cost.peak_memory_gib),
            processes=max(whole.processes, cost.processes),
        )
    return whole


class Meter:
    """Count the cost of a training on this process from here on; time in `paused` does not count.

    Args:
        before: the cost of earlier stretches of the run.
    """

    def __init__(self, rank: Rank, before: Cost) -> None:
        self._rank, self._before = rank, before
        self.tokens = 0  # of this process
        self._began = self._lap_began = time.perf_counter()
        _forget_peak(rank.device)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done meanwhile."""
        at = time.perf_counter()
        yield
        seconds = time.perf_counter() - at
        self._began, self._lap_began = self._began + seconds, self._lap_began + seconds

    def lap(self) -> float:
        """Return the seconds since this was last asked."""
        began, self._lap_began = self._lap_began, time.perf_counter()
        return self._lap_began - began

    def cost(self) -> Cost:
        """Return the cost up to now. Every process calls it."""
        seconds = time.perf_counter() - self._began
        peaks, tokens = zip(*self._rank.gathered([(_peak_memory(self._rank.device), self.tokens)]), strict=True)
        return Cost(
            seconds=self._before.seconds + seconds,
            tokens=self._before.tokens + sum(tokens),
            peak_memory_gib=max(max(peaks) / 2**30, self._before.peak_memory_gib),
            processes=self._rank.world,
        )


def _forget_peak(device: torch.device) -> None:
    """Let memory that was used before not count: of an earlier run in this process, too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # no Linux, or a system that does not let us
            _RESET.write_text("5")


def _peak_memory(device: torch.device) -> int:
    """Return the bytes since `_forget_peak`; where a CPU's system cannot forget, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
