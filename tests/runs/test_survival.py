"""kill -9 at any moment: the same command goes on, and ends where a run that nobody killed ends.

One of the twenty moments is in CI; the others carry the mark `nightly`: `make nightly PART=survival`.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from commands import Command, complete, weights
from conftest import pair_row, quick, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

STEPS = 8
KILLS = {"single": 0, "ddp": 1, "fsdp": 0, "zero3": 0}  # in CI; test_trainer.py kills a single process
BY_HAND = 5  # for each strategy
EXACT = {"single", "ddp"}  # whose checkpoints hold every bit; sharded ones sum in an order that we do not promise


@dataclass(frozen=True)
class Moment:
    """When to kill, and whom.

    Attributes:
        share: of the length of the whole run, from its first instant.
        save: 1 to 4, for the moment at which that checkpoint is being written; 0 for `share`.
        victim: "worker", "parent" or "all". A single process is all three.
    """

    share: float
    save: int
    victim: str

    def __str__(self) -> str:
        at = f"in save {self.save}" if self.save else f"at {self.share:.0%}"
        return f"{self.victim} {at}"


def moments(strategy: str, number: int) -> list[Moment]:
    """The same at every call. Every other one is in a save, and the victims take turns."""
    draw = random.Random(f"kill -9, {strategy}")  # each strategy its own moments
    victims = ["worker", "parent", "all"]
    draw.shuffle(victims)
    return [
        Moment(share=draw.random(), save=draw.randint(1, STEPS // 2) if i % 2 == 0 else 0, victim=victims[i % 3])
        for i in range(number)
    ]


MOMENTS = [
    pytest.param(strategy, moment, id=f"{strategy}: {moment}", marks=[] if i < number else [pytest.mark.nightly])
    for strategy, number in KILLS.items()
    for i, moment in enumerate(moments(strategy, BY_HAND))
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", [pair_row(i) for i in range(43)])


@pytest.fixture(scope="module")
def words(pairs, tiny_gemma2) -> Callable[[Path, str], list[str]]:
    """A run that saves four times, with a cache of its own: it prepares its data and computes its reference column."""

    def of(parent: Path, strategy: str) -> list[str]:
        cluster = ["cluster=cpu"] if strategy == "single" else ["cluster=cpu_2", f"cluster.strategy={strategy}"]
        often = [f"optimizer.max_steps={STEPS}", "train.save_every_steps=2", "train.eval_every_steps=3"]
        alone = ["tracker=none", "cluster.cpu_threads=1", f"run_dir={parent / 'run'}", f"cache_dir={parent / 'cache'}"]
        return quick(tiny_gemma2, pairs, "objective=wpo", *often, *cluster, *alone)

    return of


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, words) -> Callable[[str], tuple[Path, float]]:
    """The folder of the run that nobody kills, and the seconds that it took."""
    known: dict[str, tuple[Path, float]] = {}

    def of(strategy: str) -> tuple[Path, float]:
        if strategy not in known:
            parent = tmp_path_factory.mktemp(f"whole-{strategy}")
            began = time.monotonic()
            complete(words(parent, strategy), parent)
            known[strategy] = parent / "run", time.monotonic() - began
        return known[strategy]

    return of


def wait_until(command: Command, moment: Moment, seconds: float, folder: Path) -> None:
    """The moment has come, or the command has ended."""
    if not moment.save:
        while time.monotonic() < command.began + moment.share * seconds and command.process.poll() is None:
            time.sleep(0.005)
        return
    unfinished = folder / "checkpoints" / "unfinished" / f"checkpoint-{2 * moment.save}"
    while not unfinished.exists() and command.process.poll() is None:
        time.sleep(0.001)
    time.sleep(moment.share * 0.05)  # a save of the tiny model takes about so long


def kill(command: Command, victim: str) -> int:
    """SIGKILL for the victim; for the command itself where it has no worker, or none yet. How many died of it."""
    workers = command.workers() if victim == "worker" else []
    chosen = {"worker": workers[-1:], "parent": [], "all": command.alive()}[victim]
    chosen = chosen or [process for process in command.alive() if process.pid == command.process.pid]
    for process in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(chosen)


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl, without what depends on the clock."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in read]


@pytest.mark.parametrize(("strategy", "moment"), MOMENTS)
def test_a_run_that_is_killed_goes_on_by_the_same_command_and_loses_nothing(
    tmp_path, words, uninterrupted, strategy, moment
):
    whole, seconds = uninterrupted(strategy)
    folder, typed = tmp_path / "run", words(tmp_path, strategy)

    with Command(typed, tmp_path) as command:
        wait_until(command, moment, seconds, folder)
        had = sorted(  # walk passes over what is renamed meanwhile
            str((Path(at) / name).relative_to(folder / "checkpoints"))
            for at, names, _ in os.walk(folder / "checkpoints")
            for name in names
            if name.startswith("checkpoint-")
        )
        number = kill(command, moment.victim)
        died = time.monotonic()
        status = command.process.wait(10)
        left = command.left_after(10 - (time.monotonic() - died))
        assert not left, f"orphans 10 seconds after kill -9: {left}"
        print("gone after:", round(time.monotonic() - died, 2))
        assert status in (0, 1, -signal.SIGKILL)  # it was complete before the moment came; told of a worker; was killed
        assert "Traceback" not in command.said().err
        if status == 1:
            assert "was ended by SIGKILL" in command.said().err.splitlines()[-1]
    done, trained = ((folder / name).exists() for name in ("results.json", "trained.json"))
    saved = sorted(path.parent.name for path in folder.glob("checkpoints/checkpoint-*/made_by.json"))
    print("moment:", f"{moment}: killed {number} with {had}, left {saved}{', complete' if done else ''}")

    again = complete(typed, tmp_path)
    assert ("This run is complete" in again.out) == done
    goes_on = bool(saved) and not (done or trained)  # killed after its training, it is only judged
    assert ("going on from" in again.out) == goes_on
    assert not goes_on or f"going on from {folder / 'checkpoints' / saved[-1]}" in again.out
    ours, theirs = lines(folder), lines(whole)
    assert [line["step"] for line in ours if "train/loss" in line] == list(range(1, STEPS + 1))
    results, wanted = (json.loads((place / "results.json").read_text()) for place in (folder, whole))
    differences = [(value - weights(folder)[name]).abs().max().item() for name, value in weights(whole).items()]
    print("worst weight:", max(differences))
    costs = [made.pop("cost") for made in (results, wanted)]
    assert costs[0]["tokens"] == costs[1]["tokens"]
    if strategy in EXACT:
        assert all(torch.equal(value, weights(folder)[name]) for name, value in weights(whole).items())
        assert (ours, results) == (theirs, wanted)
    else:
        assert max(differences) < 1e-6
        for side in ("start", "trained"):
            assert results[side] == pytest.approx(wanted[side], rel=1e-5, abs=1e-5)
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert not [path for path in folder.rglob("*unfinished*") if path != folder / "checkpoints" / "unfinished"]
