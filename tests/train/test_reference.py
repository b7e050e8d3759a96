"""The reference's column: right, in shards, each computed once by whoever comes first, whatever is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from oracle import group, oracle, tiny

from align import engine
from align.choices import Layout, Strategy
from align.data.pairs import as_group, pair_lengths
from align.engine.batching import fed_tokens
from align.files import Shards
from align.launch.rank import Rank
from align.say import UserError
from align.train import reference
from align.train.job import PairData

PAIRS, OF_A_SHARD = 22, 4  # six shards, the last of two pairs
REST = {"row_id": "", "cut_tokens": 0, "cut_prompt_tokens": 0, "chosen_win_prob": 1.0, "rejected_win_prob": 0.0}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(reference, "_SHARD_PAIRS", OF_A_SHARD)


def made_pairs():
    """Pairs of many lengths, not in their order."""
    groups = [group(3 + 7 * i % 19, 1 + 5 * i % 11, 1 + 3 * i % 13) for i in range(PAIRS)]
    return datasets.Dataset.from_list(
        [
            {**REST, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for prompt, (chosen, rejected) in groups
        ]
    )


def logps(cache: Path, *, policy=None, layout=Layout.shared, number=0, world=1, **more):
    """The column, by a policy of one's own."""
    if policy is None:
        policy = tiny("llama")
    engine.attach(policy, layout)
    values = {
        "policy": policy,
        "weights": "of-the-policy",
        "data": PairData(made_pairs(), layout, pad_token_id=0),
        "pairs_fingerprint": "of-the-pairs",
        "rank": Rank(device=torch.device("cpu"), bf16=False, number=number, world=world),
        "budget": 30,  # times four: some pairs in a forward, seldom all of a shard
        "cache": cache,
        "name": "train",
    }
    return reference.reference_logps(**{**values, **more})


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("reference/*/*.jsonl"))


@pytest.fixture
def seen(monkeypatch):
    """Tokens of the responses of every forward, as it is made."""
    made = []
    original = reference.response_statistics

    def count(policy, batch, statistics):
        made.append(tuple(batch.length.tolist()))
        return original(policy, batch, statistics)

    monkeypatch.setattr(reference, "response_statistics", count)
    return made


def responses(forwards) -> int:
    return sum(map(len, forwards))


@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.name)
def test_the_column_is_each_responses_logp_by_the_models_own_logits(layout, tmp_path, seen):
    with torch.no_grad():
        expected = oracle(tiny("llama"), [as_group(pair) for pair in made_pairs()])["logp"].view(-1, 2)
    policy = tiny("llama").train()
    torch.testing.assert_close(logps(tmp_path, policy=policy, layout=layout), expected, rtol=1e-5, atol=1e-5)
    assert responses(seen) == 2 * PAIRS
    assert policy.training and all(p.grad is None for p in policy.parameters())


def test_shards_are_files_of_pairs_in_order_of_length_longest_first(tmp_path):
    column = logps(tmp_path)
    files = shards(tmp_path)
    assert [file.name for file in files] == [f"0000{i}-of-00006.jsonl" for i in range(6)]
    stored = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(rows) for rows in stored] == [4, 4, 4, 4, 4, 2]
    lengths = pair_lengths(made_pairs())
    order = sorted(range(PAIRS), key=lambda i: (-fed_tokens([lengths[i]], Layout.shared), i))
    assert [[row["chosen"], row["rejected"]] for rows in stored for row in rows] == column[order].tolist(), "to the bit"
    assert {path.name for path in files[0].parent.iterdir()} == {
        "manifest.json",
        "locks",
        *(file.name for file in files),
    }


def test_a_second_call_reads_what_the_first_computed_and_runs_no_forward(tmp_path, seen):
    first = logps(tmp_path)
    seen.clear()
    assert torch.equal(logps(tmp_path), first)
    assert seen == []


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "others"},
        {"pairs_fingerprint": "others"},
        {"name": "held_out"},
        {"rank": Rank(device=torch.device("cpu"), bf16=True, number=0, world=1)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_decides_the_numbers_is_in_the_key(other, tmp_path, seen):
    logps(tmp_path)
    seen.clear()
    logps(tmp_path, **other)
    assert responses(seen) == 2 * PAIRS and len(shards(tmp_path)) == 12


@pytest.mark.parametrize(
    "bf16, alike",
    [
        (False, [list(Strategy)]),
        (True, [[Strategy.single, Strategy.ddp], [Strategy.fsdp, Strategy.zero2, Strategy.zero3]]),  # weights in bf16
    ],
)
def test_strategies_share_a_column_where_their_forwards_round_alike(bf16, alike, tmp_path, seen):
    for number, strategies in enumerate(alike, start=1):
        for strategy in strategies:
            own_rank = Rank(device=torch.device("cpu"), bf16=bf16, number=0, world=1, strategy=strategy)
            logps(tmp_path, rank=own_rank)
            assert len(shards(tmp_path)) == 6 * number and responses(seen) == 2 * PAIRS * number


def test_after_a_failure_only_the_missing_shards_are_computed(tmp_path, monkeypatch, seen):
    whole = logps(tmp_path / "whole")
    seen.clear()
    counting = reference.response_statistics

    def stop(*args):
        if len(shards(tmp_path / "killed")) == 2:
            raise KeyboardInterrupt
        return counting(*args)

    monkeypatch.setattr(reference, "response_statistics", stop)
    with pytest.raises(KeyboardInterrupt):
        logps(tmp_path / "killed")
    before = {file: file.stat().st_mtime_ns for file in shards(tmp_path / "killed")}
    assert len(before) == 2 and responses(seen) == 2 * 2 * OF_A_SHARD

    monkeypatch.setattr(reference, "response_statistics", counting)
    seen.clear()
    assert torch.equal(logps(tmp_path / "killed"), whole)
    assert responses(seen) == 2 * (PAIRS - 2 * OF_A_SHARD)
    assert before.items() <= {file: file.stat().st_mtime_ns for file in shards(tmp_path / "killed")}.items()


def test_what_others_left_in_the_folder_is_harmless_and_stays(tmp_path, seen):
    whole = logps(tmp_path)
    folder = shards(tmp_path)[0].parent
    third = folder / "00002-of-00006.jsonl"
    third.unlink()
    left = {
        "00002-of-00006.unfinished": b"half a shard",  # of a process that was killed while it wrote
        "notes.txt": b"mine",
        "00000-of-00003.jsonl": b"of shards of another size",
    }
    for name, content in left.items():
        (folder / name).write_bytes(content)
    seen.clear()
    assert torch.equal(logps(tmp_path), whole)
    assert responses(seen) == 2 * OF_A_SHARD and third.exists()
    assert not (folder / "00002-of-00006.unfinished").exists()  # written anew and put in its place
    assert {name: (folder / name).read_bytes() for name in left if name in ("notes.txt", "00000-of-00003.jsonl")} == {
        name: left[name] for name in ("notes.txt", "00000-of-00003.jsonl")
    }


def test_two_runs_at_once_share_the_shards_out(tmp_path, monkeypatch, seen):
    """Two runs of a sweep: threads with a policy each. The first waits until the second is there."""
    whole = logps(tmp_path / "whole")
    seen.clear()
    counting, both, who = reference.response_statistics, threading.Barrier(2, timeout=60), []

    def together(*args):
        if threading.get_ident() not in who:
            who.append(threading.get_ident())
            both.wait()  # each holds a shard
        return counting(*args)

    monkeypatch.setattr(reference, "response_statistics", together)
    made = {}

    def work(run):
        made[run] = logps(tmp_path / "shared")

    threads = [threading.Thread(target=work, args=(run,)) for run in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert torch.equal(made[0], whole) and torch.equal(made[1], whole)
    assert len(who) == 2 and responses(seen) == 2 * PAIRS  # every shard once


def test_one_that_is_done_waits_for_the_shard_that_another_is_about(tmp_path, monkeypatch, seen):
    whole = logps(tmp_path / "whole")
    seen.clear()
    counting, begun, go_on = reference.response_statistics, threading.Event(), threading.Event()
    slow = threading.Thread(target=lambda: made.append(logps(tmp_path / "shared")))
    made = []

    def hold(*args):
        if threading.current_thread() is slow and not go_on.is_set():
            begun.set()
            assert go_on.wait(60)
        return counting(*args)

    monkeypatch.setattr(reference, "response_statistics", hold)
    slow.start()
    assert begun.wait(60)
    threading.Thread(target=lambda: (time.sleep(0.3), go_on.set())).start()
    assert torch.equal(logps(tmp_path / "shared"), whole)  # it has done all but the first, and waited for that
    slow.join(60)
    assert torch.equal(made[0], whole) and responses(seen) == 2 * PAIRS


def test_a_damaged_shard_is_said_and_not_taken_for_numbers(tmp_path):
    logps(tmp_path)
    third = shards(tmp_path)[2]
    third.write_bytes(third.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"{third.name} is damaged .*: delete it, and type the command"):
        logps(tmp_path)
    third.unlink()
    logps(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "reference").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*reference.*; set cache_dir= or ALIGN_CACHE"):
        logps(tmp_path)


# Real processes -----------------------------------------------------------------------------------------------------


def work(cache: str, log: str, stop_after: str) -> None:
    """What a process below does: the column; a line of `log` for every forward; after some shards it only waits."""
    reference._SHARD_PAIRS = OF_A_SHARD
    torch.set_num_threads(1)
    original = reference.response_statistics

    def statistics(policy, batch, names):
        if len(shards(Path(cache))) >= int(stop_after):
            time.sleep(600)
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()} {len(batch.length)}\n")
        time.sleep(0.05)  # so that the other process gets its share
        return original(policy, batch, names)

    reference.response_statistics = statistics
    logps(Path(cache))


def start(cache: Path, log: Path, stop_after: int = 99) -> subprocess.Popen:
    code = "import sys, test_reference; test_reference.work(*sys.argv[1:])"
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "train"]))
    line = [sys.executable, "-c", code, str(cache), str(log), str(stop_after)]
    return subprocess.Popen(line, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)


def logged(log: Path) -> list[tuple[str, int]]:
    return [(pid, int(count)) for pid, count in (line.split() for line in log.read_text().splitlines())]


@pytest.mark.slow
def test_a_pass_that_is_killed_goes_on_where_it_was(tmp_path):
    whole, log = logps(tmp_path / "whole"), tmp_path / "log"
    with start(tmp_path / "killed", log, stop_after=3) as process:
        until = time.monotonic() + 120
        while len(shards(tmp_path / "killed")) < 3:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)  # it holds the lock of the fourth
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert sum(count for _, count in logged(log)) == 2 * 3 * OF_A_SHARD
    log.unlink()
    with start(tmp_path / "killed", log) as process:
        assert process.wait(120) == 0, process.stderr.read()
    assert sum(count for _, count in logged(log)) == 2 * (PAIRS - 3 * OF_A_SHARD)
    assert torch.equal(logps(tmp_path / "killed"), whole)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_at_once_compute_every_shard_once(tmp_path):
    whole, log = logps(tmp_path / "whole"), tmp_path / "log"
    with start(tmp_path / "shared", log) as one, start(tmp_path / "shared", log) as other:
        assert (one.wait(120), other.wait(120)) == (0, 0), one.stderr.read() + other.stderr.read()
    assert sum(count for _, count in logged(log)) == 2 * PAIRS
    assert torch.equal(logps(tmp_path / "shared"), whole)


def take_part(rank: int, world: int, store: str, folder: str) -> None:
    """What a rank below does: the column, into `folder`; a line of `log` for every forward and for every shard written."""
    out = Path(folder)
    reference._SHARD_PAIRS = OF_A_SHARD
    torch.set_num_threads(1)
    statistics, write = reference.response_statistics, Shards.write

    def note(what: str, number: int) -> None:
        with (out / "log").open("a") as file:
            file.write(f"{what}-{rank} {number}\n")

    def count(policy, batch, names):
        note("forward", len(batch.length))
        return statistics(policy, batch, names)

    def count_shards(shards, number, rows):
        note("wrote", number)
        write(shards, number, rows)

    reference.response_statistics, Shards.write = count, count_shards
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(logps(out / "cache", number=rank, world=world), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [2, 3])  # shards of four pairs, and one of two: only three ranks must be filled up
def test_the_ranks_of_a_run_work_on_one_shard_in_step_and_get_the_column_of_one_process(world, tmp_path):
    """Another run, which is the test, holds the first shard and lets go of it: rank 0 alone may wait for its lock."""
    whole = logps(tmp_path / "whole")
    cache = tmp_path / "cache" / "reference" / shards(tmp_path / "whole")[0].parent.name
    (cache / "locks").mkdir(parents=True)
    with FileLock(cache / "locks" / "00000-of-00006.jsonl.lock"):
        args = (world, str(tmp_path / "store"), str(tmp_path))
        ranks = torch.multiprocessing.spawn(take_part, args=args, nprocs=world, join=False)
        until = time.monotonic() + 120
        while len(shards(tmp_path / "cache")) < 5:
            assert time.monotonic() < until and all(process.is_alive() for process in ranks.processes)
            time.sleep(0.02)
        time.sleep(0.3)
        assert not (cache / "00000-of-00006.jsonl").exists()
    while not ranks.join(timeout=1):
        assert time.monotonic() < until
    columns = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    torch.testing.assert_close(columns[0], whole, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(column, columns[0]) for column in columns)
    events = logged(tmp_path / "log")
    assert [number for name, number in events if name == "wrote-0"] == [1, 2, 3, 4, 5, 0]
    assert not [name for name, _ in events if name.startswith("wrote") and name != "wrote-0"]
    forwards = [[count for name, count in events if name == f"forward-{rank}"] for rank in range(world)]
    assert len({len(counts) for counts in forwards}) == 1 and len(forwards[0]) >= 6
    fed = {2: PAIRS, 3: 5 * 6 + 3}[world]
    assert sum(map(sum, forwards)) == 2 * fed
