"""Where a run runs: how many processes, how they start, fail and stop together; one line says what happened.

The lower half types real commands, in processes of their own, as test_strategies.py and test_survival.py do.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import Command, complete, fails_in_one_line, two_steps, weights
from conftest import ROOT, quick

from align.choices import Device, Precision, Strategy
from align.config import ClusterConfig
from align.launch.local import each
from align.launch.rank import Cluster, Rank, alone, cluster_of, join, leave
from align.model.load import load_policy
from align.runs.stages import training
from align.say import Stopped, UserError
from align.tracking.trackers import Tracker
from align.train.train import train

# What a cluster comes to --------------------------------------------------------------------------------------------


@pytest.fixture
def outside(monkeypatch):
    """Nobody else has started this process, and the machine has no GPU."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def in_torchrun(outside, monkeypatch):
    """This process is the first of four, on two machines with two processes each."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


def on_cpu(**fields) -> Cluster:
    return cluster_of(ClusterConfig(device=Device.cpu, **fields))


@pytest.mark.parametrize(
    ("processes", "asked", "comes_to"),
    [
        (None, "auto", "auto"),  # memory decides, once the model is known (test_memory.py)
        (1, "ddp", "single"),  # gradients of one process need no averaging
        (1, "fsdp", "fsdp"),  # one process may go on from a checkpoint that was written in shards
        (1, "zero3", "zero3"),
        (2, "auto", "auto"),
        (2, "ddp", "ddp"),
        (2, "zero2", "zero2"),
    ],
)
def test_one_process_needs_no_strategy_and_several_keep_theirs(outside, processes, asked, comes_to):
    cluster = on_cpu(processes=processes, strategy=Strategy(asked))
    assert (cluster.strategy.value, cluster.world) == (comes_to, processes or 1)


def test_several_processes_cannot_be_single(outside):
    with pytest.raises(UserError, match="is one process, and this run has 2: use ddp, fsdp, zero2 or zero3"):
        on_cpu(processes=2, strategy=Strategy.single)


def test_more_gpus_than_the_machine_has_are_refused_with_the_number_that_works(outside, monkeypatch):
    with pytest.raises(UserError, match="this machine has 0 of the 1 GPUs that are asked for: try cluster=auto"):
        cluster_of(ClusterConfig(device=Device.gpu))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        UserError, match=r"this machine has 2 of the 4 GPUs that are asked for: set cluster.processes=2"
    ):
        cluster_of(ClusterConfig(device=Device.auto, processes=4))


def test_a_plan_may_describe_gpus_that_are_not_here(outside):
    cluster = cluster_of(ClusterConfig(device=Device.gpu, processes=8, gpu_memory_gib=80), plan=True)
    assert (cluster.world, cluster.device, cluster.bf16, cluster.memory) == (8, "cuda", True, 80 * 2**30)


def test_several_machines_need_somebody_who_starts_on_each(outside):
    with pytest.raises(UserError, match=r"nodes=2 needs .* torchrun --nnodes 2 --nproc-per-node 3 "):
        on_cpu(nodes=2, processes=3)


def test_bf16_on_a_cpu_is_refused(outside):
    with pytest.raises(UserError, match="bf16 needs a GPU that has it; this run is on cpu: use fp32 or auto"):
        on_cpu(precision=Precision.bf16)


def test_inside_torchrun_the_processes_are_those_that_it_started(in_torchrun):
    for fields in ({}, {"nodes": 2, "processes": 2}):
        cluster = on_cpu(**fields)
        assert (cluster.nodes, cluster.per_node, cluster.world) == (2, 2, 4)


@pytest.mark.parametrize("fields", [{"processes": 2}, {"processes": 3}, {"nodes": 4, "processes": 2}])
def test_inside_torchrun_other_numbers_are_refused_with_those_that_agree(in_torchrun, fields):
    with pytest.raises(UserError, match=r"has started 4 processes, .* add cluster.nodes=2 cluster.processes=2"):
        on_cpu(**fields)


@pytest.mark.parametrize(
    ("strategy", "rounds_as"),
    [
        ("single", "bf16 autocast"),
        ("ddp", "bf16 autocast"),
        ("fsdp", "bf16 weights"),  # gathered in bf16
        ("zero2", "bf16 weights"),  # DeepSpeed keeps a bf16 copy to compute with
        ("zero3", "bf16 weights"),
    ],
)
def test_reference_columns_are_shared_by_strategies_that_round_alike(strategy, rounds_as):
    def place(bf16):
        return Rank(device=torch.device("cpu"), bf16=bf16, number=0, world=2, strategy=Strategy(strategy))

    assert place(bf16=True).numerics == rounds_as
    assert place(bf16=False).numerics == "fp32"  # where all strategies compute the same


def test_apart_a_process_keeps_its_rank_and_its_cores_and_waits_for_nobody(in_torchrun, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    place = alone(on_cpu(strategy=Strategy.fsdp, cpu_threads=1))
    assert (place.number, place.world, place.sharded, place.device.type) == (3, 1, False, "cpu")
    assert (place.least(7), place.gathered([7]), place.from_first(lambda: 7)) == (7, [7], 7)
    assert not torch.distributed.is_initialized()
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "4")  # it is still one of them, and may join


def test_apart_the_only_process_of_torchrun_is_alone_as_it_is_in_training(in_torchrun, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    cluster = on_cpu(strategy=Strategy.ddp)
    assert alone(cluster) == join(cluster)
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & os.environ.keys()


# Starting -----------------------------------------------------------------------------------------------------------

TWO = Cluster(device="cpu", per_node=2, strategy=Strategy.ddp, cpu_threads=1)
FOREVER = 600.0  # seconds, beyond the patience of every test


def rank() -> int:
    return int(os.environ["RANK"])


def add_rank(number: int) -> int:
    """Also connects, so that both processes must be there."""
    place = join(TWO)
    total = place.least(-place.number)  # -1 once both have spoken
    leave()
    return number + place.number + total


def meet_three_times() -> list[list[int]]:
    """What both processes gather each time. Neither waits for the other in between, and either may be the later."""
    met = []
    for turn in range(3):
        assert alone(TWO).least(rank()) == rank()
        time.sleep(0.5 * (turn % 2 == rank()))
        place = join(TWO)
        met.append(place.gathered([10 * turn + place.number]))
        leave()
    return met


def train_twice(jobs: list[Any]) -> list[int]:
    """Weights of a policy as one process has it before each training: all of them, whatever has been divided before."""
    sizes = []
    for job in jobs:
        alone(job.cluster)
        policy = load_policy(job.cfg.model, job.start, job.cfg.seed)
        sizes.append(sum(weight.numel() for weight in policy.parameters()))
        train(job, Tracker())
    return sizes


def sleep(folder: Path) -> None:
    """Say that it has begun, and go on until somebody ends it."""
    (folder / f"{rank()}.sleeps").touch()
    time.sleep(FOREVER)


def fail(how: str) -> None:
    """Rank 1 fails; rank 0 would wait for it much longer than any test does."""
    if rank() == 0:
        time.sleep(FOREVER)
    if how == "user":
        raise UserError("rank 1 knows what to type")
    if how == "error":
        raise ZeroDivisionError("the sky fell")
    os.kill(os.getpid(), getattr(signal, how))


def stop() -> None:
    raise Stopped(f"at step 3 of 9, says {rank()}")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_start_returns_what_the_first_process_returns(tmp_path):
    assert each(TWO, tmp_path, add_rank, 41) == 40  # 41 + rank 0 - 1


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_have_left_meet_again(tmp_path):
    assert each(TWO, tmp_path, meet_three_times) == [[0, 1], [10, 11], [20, 21]]


STARTERS = {
    "torchrun c10d": "torch.distributed.run --standalone --nproc-per-node=2 {script}",
    "torchrun static": "torch.distributed.run --nproc-per-node=2 --master-port={port} {script}",
    "accelerate": "accelerate.commands.launch --num_processes=2 --num_machines=1 --main_process_port={port} "
    "--mixed_precision=no --dynamo_backend=no --multi_gpu {script}",
}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "starter",
    [
        "torchrun c10d",
        "variables",
        *(pytest.param(s, marks=pytest.mark.nightly) for s in ("torchrun static", "accelerate")),
    ],
)
def test_processes_that_somebody_else_has_started_meet_again(tmp_path, starter):
    (tmp_path / "meet.py").write_text("import test_launch\nprint(test_launch.meet_three_times())")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "launch"]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if starter == "variables":  # as srun's tasks have them: rank 0 is where they meet
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        commands = [(["meet.py"], {**meeting, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    else:
        commands = [(["-m", *STARTERS[starter].format(port=port, script="meet.py").split()], {})]
    started = [
        subprocess.Popen([sys.executable, *words], env={**environment, **more}, cwd=tmp_path, stdout=subprocess.PIPE)
        for words, more in commands
    ]
    said = b"".join(process.communicate(timeout=120)[0] for process in started)
    assert [process.returncode for process in started] == [0] * len(started)
    assert said.count(b"[[0, 1], [10, 11], [20, 21]]") == 2


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "how", ["ddp", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("fsdp", "zero2", "zero3"))]
)  # each library keeps something of the first
def test_a_second_training_in_the_same_processes_is_as_the_first(
    align, monkeypatch, tmp_path, tiny_llama, pairs_file, how
):
    jobs: list[Any] = []  # of align.train.job.Job

    def keep(cluster: Cluster, logs: Path, iterate: Any, run: Any) -> None:
        jobs.append(training(run.iterations[0], run.start_policy, run.source))
        raise UserError("the test trains it")

    monkeypatch.setattr("align.runs.spine.each", keep)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main() sets it, and the commands that other tests type would have it
    for name in ("first", "second"):
        align(*two_steps(tmp_path / name, tiny_llama, pairs_file, "cluster=cpu_2", f"cluster.strategy={how}"))
        jobs[-1].dir.mkdir()
    sizes = each(jobs[0].cluster, tmp_path / "logs", train_twice, jobs)
    assert sizes[0] == sizes[1] > 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_are_stopped_outside_of_training_end_at_once(tmp_path):
    def ask() -> None:
        while len(list(tmp_path.glob("*.sleeps"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Stopped, match=r"^at once, as no training was under way$"):
        each(TWO, tmp_path, sleep, tmp_path)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("user", r"^rank 1 knows what to type$"),
        (
            "error",
            r"^process 1 of 2: ZeroDivisionError: the sky fell \(test_launch.py:\d+\); traceback in .*1.traceback$",
        ),
        pytest.param(
            "SIGKILL",
            r"^process 1 of 2 was ended by SIGKILL; out of memory\? try a smaller engine.tokens_per_micro_batch",
            marks=pytest.mark.nightly,  # as `oom` below
        ),
        pytest.param(
            "SIGSEGV",
            r"^process 1 of 2 was ended by SIGSEGV; what it printed last is in .*1.log$",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["UserError", "another error", "SIGKILL", "SIGSEGV"],
)
def test_a_process_that_fails_is_named_and_the_one_that_hangs_is_ended_with_it(tmp_path, how, line):
    began = time.monotonic()
    with pytest.raises(UserError, match=line):
        each(TWO, tmp_path, fail, how)
    assert time.monotonic() - began < 60  # two imports of torch, on a machine that others use too; not FOREVER
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert (tmp_path / "1.traceback").exists() == (how == "error")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_stop_as_asked_are_no_failure(tmp_path):
    with pytest.raises(Stopped, match=r"^at step 3 of 9, says "):
        each(TWO, tmp_path, stop)


# Real commands ------------------------------------------------------------------------------------------------------

BAD_ON_RANK_1 = """
import os
import signal
from dataclasses import dataclass

from objectives import Objective, PairLoss, register


@register("bad")
@dataclass(frozen=True, kw_only=True)
class Bad(Objective):
    how: str
    needs = frozenset({"logp"})

    def __call__(self, chosen, rejected):
        loss = rejected.logp - chosen.logp
        if os.environ.get("RANK") == "1" and loss.requires_grad:
            if self.how == "raise":
                raise ZeroDivisionError("the sky fell")
            if self.how == "nan":
                loss = loss * float("nan")
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return PairLoss(loss, chosen.logp.detach(), rejected.logp.detach(), {})
"""


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", "process 1 of 2: ZeroDivisionError: the sky fell (bad.py:"),
        ("oom", "process 1 of 2 was ended by SIGKILL; out of memory? try a smaller engine.tokens_per_micro_batch"),
        ("nan", "step 1: the loss is not finite for pairs row-"),  # which rank 1 has seen, and rank 0 has not
    ],
    ids=["raise", "oom", "nan"],
)
def test_one_worker_that_fails_ends_the_command_with_one_line(tmp_path, tiny_llama, pairs_file, how, says):
    (tmp_path / "bad.py").write_text(BAD_ON_RANK_1)
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "bad.yaml").write_text(f"name: bad\ncode: bad.py\nhow: {how}\n")
    words = two_steps(tmp_path / "run", tiny_llama, pairs_file, "cluster=cpu_2", "objective=bad")
    with Command(["--config-dir", ".", *words], tmp_path) as command:
        line = fails_in_one_line(command.ends(60))  # 12 seconds alone on two cores
    assert says in line
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_port_in_use_is_named_with_what_to_type(tmp_path, tiny_llama, pairs_file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        words = two_steps(tmp_path / "run", tiny_llama, pairs_file)
        with Command(words, tmp_path, **place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) as command:
            line = fails_in_one_line(command.ends(60))
    assert f"127.0.0.1:{port}, that port is in use: set MASTER_PORT to a free one" in line


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 600 KiB: less than the weights of the tiny Llama (274 KiB) and AdamW's state (twice that)."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only root can mount a small disk: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "cluster",
    [
        pytest.param(["cluster=cpu"], id="single"),
        pytest.param(["cluster=cpu_2"], id="ddp"),
        pytest.param(["cluster=cpu_2", "cluster.strategy=fsdp"], id="fsdp"),
    ],
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_once_there_is_room(
    tmp_path, small_disk, tiny_llama, pairs_file, cluster
):
    words = two_steps(small_disk / "run", tiny_llama, pairs_file, *cluster)
    with Command(words, tmp_path) as command:
        line = fails_in_one_line(command.ends(60))
    assert "cannot write" in line and "the disk is full" in line and "the same command goes on" in line
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    complete(words, tmp_path)


@pytest.mark.slow
def test_a_read_only_disk_is_one_line(tmp_path, small_disk, tiny_llama, pairs_file):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Command(two_steps(small_disk / "run", tiny_llama, pairs_file), tmp_path) as command:
        line = fails_in_one_line(command.ends(60))
    assert f"run_dir: cannot write {small_disk / 'run'} (Read-only file system); give another run_dir=" in line


def test_a_file_where_the_run_folder_should_be_is_one_line(align, tmp_path, tiny_llama, pairs_file):
    (tmp_path / "taken").write_text("not a folder")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "run"):
        result = align(*quick(tiny_llama, pairs_file, f"run_dir={folder}"))
        assert f"align: run_dir: cannot write {folder} (" in fails_in_one_line(result)


def test_zero3_without_deepspeed_says_what_to_install(align, monkeypatch, tmp_path, tiny_llama, pairs_file):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # which Python takes for a module that is not installed
    result = align(
        *quick(tiny_llama, pairs_file, "cluster=cpu_2", "cluster.strategy=zero3", f"run_dir={tmp_path / 'r'}")
    )
    line = fails_in_one_line(result)
    assert "cluster.strategy=zero3 needs deepspeed: pip install deepspeed, or use cluster.strategy=fsdp" in line
    assert not (tmp_path / "r").exists()


# Stopping -----------------------------------------------------------------------------------------------------------

STEPS = 40  # of 15 ms: enough to be asked in the middle


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_llama):
    """Weights of the run that nobody stops, by the words of its cluster."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def of(cluster: str, pairs: Path) -> dict[str, torch.Tensor]:
        if cluster not in known:
            folder = tmp_path_factory.mktemp("whole")
            complete(long_run(folder / "run", tiny_llama, pairs, cluster), folder)
            known[cluster] = weights(folder / "run")
        return known[cluster]

    return of


def long_run(folder: Path, model: Path, pairs: Path, cluster: str) -> list[str]:
    return two_steps(folder, model, pairs, cluster, f"optimizer.max_steps={STEPS}", "train.save_every_steps=2")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "cluster, how",
    [
        ("cluster=cpu_2", "Ctrl-C"),
        *(pytest.param("cluster=cpu", how, marks=pytest.mark.nightly) for how in ("SIGINT", "SIGTERM", "Ctrl-C")),
        *(pytest.param("cluster=cpu_2", how, marks=pytest.mark.nightly) for how in ("SIGINT", "SIGTERM")),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_the_same_command_goes_on(
    tmp_path, tiny_llama, pairs_file, uninterrupted, cluster, how
):
    folder = tmp_path / "run"
    words = long_run(folder, tiny_llama, pairs_file, cluster)
    with Command(words, tmp_path) as command:
        command.wait_for("checkpoints/checkpoint-4", folder)
        if how == "Ctrl-C":  # a terminal sends it to every process of the group
            os.killpg(command.process.pid, signal.SIGINT)
        else:  # `kill`, and SLURM or a container, send it to the first
            command.process.send_signal(getattr(signal, how))
        result = command.ends(60)
    saved = max(folder.glob("checkpoints/checkpoint-*/made_by.json"), key=lambda file: file.stat().st_mtime).parent
    step = int(saved.name.removeprefix("checkpoint-"))
    assert result.status == 130  # 128 + SIGINT, which shells take for "stopped by the user"
    assert 4 <= step < STEPS
    last = result.err.splitlines()[-1]
    assert last == (
        f"align: stopped at step {step} of {STEPS}, with a checkpoint; the same command goes on where it stopped"
    )
    assert "Traceback" not in result.err
    again = complete(words, tmp_path)
    assert f"going on from {saved}" in again.out
    assert all(torch.equal(value, weights(folder)[name]) for name, value in uninterrupted(cluster, pairs_file).items())
