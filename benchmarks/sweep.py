"""One sweep of eight jobs against the same eight runs typed one by one, on the built-in task.

    python benchmarks/sweep.py                    ten minutes on two cores; prints a row for RESULTS.md

In turns A B A B, each in a folder of its own; data, start model and reference log-probabilities are made before, by the
first turn's first job, and shared by both sides, so what differs is starting: imports, loading, checks. The log of the
first turn shows what was made, once. A ratio is of seconds by the clock, and of CPU seconds beside it.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

_GRID = {"objective.beta": ("1", "2"), "objective.gamma_beta_ratio": ("0.3", "0.5"), "seed": ("1", "2")}
_WORDS = ["objective=simpo", "tracker=none", "cluster=cpu", "cluster.cpu_threads=1"]
_TURNS = 2


def _run(commands: Sequence[Sequence[str]], home: Path, cache: Path) -> tuple[float, float, str]:
    """(seconds by the clock, CPU seconds, what was printed) of commands, one after another."""
    home.mkdir(parents=True)
    used, began, said = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), ""
    for words in commands:
        line = [sys.executable, "-m", "align", *words, *_WORDS]
        environment = {**os.environ, "ALIGN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        said += subprocess.run(line, cwd=home, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, said


def main() -> None:
    """Print what was made once, and the ratio of each turn."""
    sweep = [["-m", *(f"{key}={','.join(values)}" for key, values in _GRID.items())]]
    alone = [[f"{key}={value}" for key, value in zip(_GRID, job, strict=True)] for job in product(*_GRID.values())]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for turn in range(_TURNS):
            if turn == 0:
                _, _, said = _run(sweep, home / "first", home / "cache")
                print("\n".join(line for line in said.splitlines() if line.startswith("made ")))
            a, a_cpu, _ = _run(sweep, home / f"sweep-{turn}", home / "cache")
            b, b_cpu, _ = _run(alone, home / f"alone-{turn}", home / "cache")
            print(
                f"turn {turn + 1}: sweep {a:.0f} s, eight runs {b:.0f} s: {a / b:.2f}; CPU seconds {a_cpu / b_cpu:.2f}"
            )


if __name__ == "__main__":
    main()
