"""Jobs on a real SLURM: one, of two processes, an array, one that is preempted, one whose time is up, and refusals.

`make nightly PART=slurm` makes a SLURM of one node (slurm_node.sh) and runs this file; elsewhere it is skipped, also beside
somebody's own cluster, which has other partitions and better things to do. Commands are typed as a user types them. What
a job must come to is what the same command trains without SLURM.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import pair_row, quick, write_jsonl
from safetensors.torch import load_file

OURS = "align_test"  # ClusterName in slurm_node.sh
PATIENCE = 120.0  # seconds for anything that a job does: an idle node starts one in a second, torch is imported in five


def _why_not() -> str:
    """Why no job can be submitted here; empty where one can."""
    try:
        asked = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=30)
        nodes = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        return f"no SLURM here ({error.filename} is missing): make nightly PART=slurm makes one"
    except subprocess.TimeoutExpired:
        return "SLURM's controller does not answer: make nightly PART=slurm starts one"
    if asked.returncode or nodes.returncode:
        return "SLURM's controller does not answer: make nightly PART=slurm starts one"
    if not re.search(rf"^ClusterName\s*= {OURS}$", asked.stdout, re.MULTILINE):
        return "the SLURM that answers is not the one of tests/launch/slurm_node.sh"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]


@dataclass(frozen=True)
class Job:
    """A submitted run, as the command printed it."""

    id: str
    folder: Path
    log: Path

    @property
    def said(self) -> str:
        """What its first process has printed, in all its lives: SLURM appends."""
        files = [self.log, self.log.with_suffix(".err")]
        return "".join(file.read_text() for file in files if file.exists())

    @property
    def facts(self) -> dict[str, str]:
        """What SLURM knows of it: JobState, Restarts, NumTasks, ... It forgets a job five minutes after its end."""
        shown = slurm("scontrol", "show", "job", "--oneliner", self.id)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights, once SLURM calls the job completed."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        until(lambda: self.facts["JobState"] in ended, self, "ends")
        assert self.facts["JobState"] == "COMPLETED", self.said
        assert (self.folder / "results.json").exists(), f"SLURM calls it completed: {self.said}"
        return weights(self.folder)


def slurm(*words: str) -> str:
    """What one of SLURM's own commands prints."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


def until(reached: Callable[[], object], job: Job, what: str) -> None:
    """Ask again and again; a job that does not get there fails the test with all that it has said."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, f"not in {PATIENCE:.0f} s: job {what}\n{job.facts}\n{job.said}"
        time.sleep(0.2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def steps(folder: Path) -> list[int]:
    """The steps whose metrics were written, in the order of the file."""
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Desk:
    """Where commands are typed: a folder with a start model and pairs."""

    folder: Path
    model: Path
    environment: dict[str, str]

    def align(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = quick(self.model, self.folder / "pairs.jsonl", "tracker=none", "cluster.cpu_threads=1")
        given.remove("cluster=cpu")
        multirun, rest = [word for word in words if word == "-m"], [word for word in words if word != "-m"]
        return subprocess.run(
            [sys.executable, "-m", "align", *multirun, *given, *rest],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def here(self, folder: str, *words: str) -> Path:
        """Train without SLURM. Returns the run folder."""
        result = self.align(*words, f"run_dir={folder}")
        assert result.returncode == 0, result.stderr
        return self.folder / folder

    def submit(self, *words: str, **environment: str) -> list[Job]:
        """Returns what the command printed: one job, or those of a sweep."""
        result = self.align(*words, "cluster=slurm_1x8", "cluster.device=cpu", **environment)
        assert result.returncode == 0, result.stderr
        printed = re.findall(r"^job (\S+)  (.+)\n  log  (.+)$", result.stdout, re.MULTILINE)
        return [Job(name, Path(folder), Path(log)) for name, folder, log in printed]


@pytest.fixture(scope="module")
def shared_desk(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    write_jsonl(folder / "pairs.jsonl", [pair_row(i) for i in range(40)])
    # One thread: sums over several are added in another order. A job inherits what the command was typed with.
    environment = {"OMP_NUM_THREADS": "1", "ALIGN_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    return Desk(folder, tiny_llama, {**os.environ, **environment})


@pytest.fixture
def desk(shared_desk: Desk) -> Iterator[Desk]:
    """No job outlives its test: the next one needs the node."""
    yield shared_desk
    slurm("scancel", "--user", str(os.getuid()))
    deadline = time.monotonic() + PATIENCE
    while slurm("squeue", "--noheader"):
        assert time.monotonic() < deadline, slurm("squeue")
        time.sleep(0.2)


@pytest.fixture(scope="module")
def two_steps(shared_desk: Desk) -> dict[str, torch.Tensor]:
    """What a process alone trains in two steps."""
    return weights(shared_desk.here("two_steps", "cluster=cpu"))


BEGUN = 10  # steps after which a run may be interrupted


def steps_without_checkpoint(number: int) -> tuple[str, str]:
    """Enough to be interrupted between, and no checkpoint but the one that the interruption causes."""
    return f"optimizer.max_steps={number}", "train.save_every_steps=1000"


#: SLURM looks for jobs to preempt every few seconds at most.
LONG = steps_without_checkpoint(200)


@pytest.fixture(scope="module")
def whole(shared_desk: Desk) -> Path:
    """A run that nobody interrupts, without SLURM."""
    return shared_desk.here("whole", "cluster=cpu", *LONG)


def is_training(job: Job) -> bool:
    metrics = job.folder / "metrics.jsonl"
    return metrics.exists() and max(steps(job.folder), default=0) >= BEGUN


def test_a_job_is_handed_in_at_once_and_trains_what_the_same_command_trains_here(desk, two_steps):
    (job,) = desk.submit("cluster.processes=1", "run_dir=one")
    assert not (job.folder / "results.json").exists()  # the command has returned, and the job has to import torch yet
    assert job.facts["JobState"] in ("PENDING", "RUNNING", "CONFIGURING")
    assert job.folder == desk.folder / "one" and job.log.is_relative_to(desk.folder / "slurm" / job.id)
    assert same(job.trained(), two_steps)
    assert "\nsteps       2 of 8 pairs" in job.said  # the plan, in the log that the command named


def test_two_processes_of_one_job_train_what_one_trains_here(desk, two_steps):
    (job,) = desk.submit("cluster.processes=2", "run_dir=pair")
    trained = job.trained()
    assert job.facts["NumTasks"] == "2" and "\nprocesses   2 on cpu, ddp, fp32\n" in job.said
    assert trained.keys() == two_steps.keys()
    # The gradient is a mean of two means instead of one, so float32 rounds otherwise: weights of order 0.1.
    assert max((value - two_steps[name]).abs().max().item() for name, value in trained.items()) < 1e-6


def test_a_sweep_is_one_array_and_every_run_has_its_own_folder(desk):
    sweep = ("objective=simpo", "objective.beta=1,2", "objective.gamma_beta_ratio=0.3,0.5")
    jobs = desk.submit("-m", *sweep, "cluster.processes=1")
    first = jobs[0].id.partition("_")[0]
    assert [job.id for job in jobs] == [f"{first}_{i}" for i in range(4)]
    assert {job.facts["ArrayJobId"] for job in jobs} == {first}
    assert len({job.folder for job in jobs}) == 4
    made = [(job.trained(), (job.folder / "config.yaml").read_text()) for job in jobs]
    wanted = [(beta, ratio) for beta in (1, 2) for ratio in (0.3, 0.5)]  # in Hydra's order: the last word turns fastest
    for (_, config), (beta, ratio) in zip(made, wanted, strict=True):
        assert re.search(rf"\n  beta: {beta}(\.0)?\n", config) and f"\n  gamma_beta_ratio: {ratio}\n" in config
    assert not same(made[0][0], made[1][0])


def test_a_preempted_job_writes_a_checkpoint_is_queued_again_and_loses_nothing(desk, whole):
    (job,) = desk.submit("cluster.processes=1", "run_dir=preempted", *LONG)
    until(lambda: is_training(job), job, "trains")
    # A job of the partition that may take the node from others, on all its processors.
    slurm("sbatch", "--partition=high", "--ntasks=4", "--output=/dev/null", "--wrap=sleep 1")
    assert same(job.trained(), weights(whole))
    assert steps(job.folder) == steps(whole)
    went_on(job)


def test_of_a_sweep_only_the_run_whose_time_is_up_is_queued_again_and_loses_nothing(desk, whole):
    other, job = desk.submit("-m", "objective.beta=0.2,0.1", "cluster.processes=1", *LONG)  # 0.1 is the default
    until(lambda: is_training(job), job, "trains")
    assert "\n#SBATCH --signal=USR2@300\n" in slurm("scontrol", "write", "batch_script", job.id, "-")
    slurm("scancel", "--signal=USR2", job.id)  # what SLURM does by itself 300 seconds before the limit
    assert same(job.trained(), weights(whole))
    assert steps(job.folder) == steps(whole)
    went_on(job)
    other.trained()
    assert other.facts["Restarts"] == "0", other.said


def test_of_two_processes_the_one_that_has_stopped_first_waits_until_the_job_is_queued_again(desk, tmp_path):
    # srun ends all once one has left, and the first process may be late: a tracker to close, a controller that is busy.
    late = tmp_path / "scontrol"
    late.write_text(f'#!/bin/sh\n[ "$1" != requeue ] || sleep 4\nexec {shutil.which("scontrol")} "$@"\n')
    late.chmod(0o755)
    words = ("cluster.processes=2", "run_dir=time_is_up", *steps_without_checkpoint(100))
    (job,) = desk.submit(*words, PATH=f"{tmp_path}:{os.environ['PATH']}")
    until(lambda: is_training(job), job, "trains")
    slurm("scancel", "--signal=USR2", job.id)
    job.trained()
    assert steps(job.folder) == [*range(101), 100]  # at the start, every step, after the last
    went_on(job)


def went_on(job: Job) -> None:
    """It was started twice, and the second time began where the first one ended."""
    assert job.facts["Restarts"] == "1", job.said
    resumed = re.findall(r"going on from \S+checkpoint-(\d+)", job.said)
    assert len(resumed) == 1, job.said
    assert BEGUN <= int(resumed[0]) < max(steps(job.folder))


def test_what_slurm_refuses_is_one_line_with_its_reason(desk):
    result = desk.align("cluster=slurm_1x8", "cluster.device=cpu", "cluster.slurm.partition=nowhere", "run_dir=refused")
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert "align: SLURM refuses the job" in result.stderr and "invalid partition specified: nowhere" in result.stderr


def test_a_sweep_with_one_bad_value_submits_nothing(desk):
    before = slurm("squeue", "--states=all", "--noheader", "--array", "--format=%i")
    result = desk.align(
        "-m", "cluster=slurm_1x8", "cluster.device=cpu", "cluster.processes=1", "objective.beta=0.1,much"
    )
    assert result.returncode == 1
    *said, last = result.stderr.splitlines()
    assert "align: job 2 failed: objective.beta must be a number, not 'much'" in said
    assert last.startswith("align: 1 of 2 jobs failed: ") and last.endswith("; nothing was submitted")
    assert slurm("squeue", "--states=all", "--noheader", "--array", "--format=%i") == before


def test_a_machine_that_cannot_submit_is_told_in_one_line(desk, tmp_path):
    (tmp_path / Path(sys.executable).name).symlink_to(shutil.which(sys.executable) or sys.executable)
    result = desk.align("cluster=slurm_1x8", "cluster.device=cpu", "cluster.processes=1", PATH=str(tmp_path))
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert "cluster.launcher=slurm needs sbatch, srun, scontrol, which this machine lacks" in result.stderr
