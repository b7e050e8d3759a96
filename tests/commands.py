"""`python -m align ...` typed as a user does, in processes of their own, and what becomes of these."""

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from conftest import ROOT, Result, quick
from safetensors.torch import load_file

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would commands
MARK = "ALIGN_TEST_MARK"  # in the environment of a command, and so of all that it starts: whose child a process is


class Command:
    """`python -m align <words>` typed as a user does: in a process of its own, which leads a group as in a terminal.

    Args:
        launcher: words before `-m align`, of torchrun.
        environment: variables besides those of this process.

    As a context it ends what is left of it, so that a test that fails leaves nothing behind.
    """

    def __init__(self, words: list[str], cwd: Path, *launcher: str, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self._said = [cwd / f"{self.mark}.out", cwd / f"{self.mark}.err"]  # files: a pipe would wait for an orphan
        path = os.pathsep.join(p for p in (environment.pop("PYTHONPATH", ""), str(ROOT)) if p)
        self.began = time.monotonic()
        with ExitStack() as files:
            out, err = (files.enter_context(file.open("w")) for file in self._said)
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "align", *words],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: self.mark, **environment},
                cwd=cwd,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.alive():
            process.kill()
        self.process.wait()

    def alive(self) -> list[psutil.Process]:
        """Every process of this command, whoever is its parent by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """The processes that `launch.start` started."""
        found = []
        for process in self.alive():
            try:
                if "spawn_main" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def left_after(self, seconds: float) -> list[psutil.Process]:
        """The processes that are still there after so long; returns as soon as there are none."""
        until = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.05)
        return left

    def wait_for(self, pattern: str, folder: Path, seconds: float = 120) -> None:
        """Until a file of that pattern is in the folder."""
        until = time.monotonic() + seconds
        while not any(folder.glob(pattern)):
            assert self.process.poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.002)

    def said(self) -> Result:
        out, err = (file.read_text() for file in self._said)
        return Result(self.process.poll(), out, err)

    def ends(self, seconds: float = 240) -> Result:
        """What it said, once it has ended; nothing of it is left ten seconds later."""
        self.process.wait(seconds)
        left = self.left_after(10)
        assert not left, f"orphans: {left}"
        return self.said()


def complete(words: list[str], cwd: Path, *launcher: str, **environment: str) -> Result:
    """Type it, and it succeeds."""
    with Command(words, cwd, *launcher, **environment) as command:
        result = command.ends()
        assert result.status == 0, result.err[-3000:]
        return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def fails_in_one_line(result: Result) -> str:
    """The one line that the terminal shows. No traceback; status 1, not that of a signal."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert result.status == 1, result
    assert "Traceback" not in result.out + result.err
    assert len(lines) == 1 and lines[0].startswith("align: "), result.err
    return lines[0]


def two_steps(folder: Path, model: Path, pairs: Path, *more: str) -> list[str]:
    """Words that train two steps on one thread."""
    return quick(model, pairs, f"run_dir={folder}", "tracker=none", "cluster.cpu_threads=1", *more)
