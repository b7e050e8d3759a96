"""The benchmarks run, and what they count exactly stays within its bounds. Nothing here is timed."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.nightly
def test_a_step_stays_within_the_bounds_of_the_counters():
    done = run("benchmarks/counters.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("of the floor") == 2, done.stdout  # a Llama and a Gemma-2 shape


def test_the_script_for_a_gpu_can_be_imported_without_one():
    done = run("benchmarks/gpu.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--peak-tflops" in done.stdout


@pytest.mark.nightly
def test_trl_and_align_agree_on_the_losses_that_the_benchmark_compares():
    done = run("benchmarks/compare_trl.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "| align dpo / TRL dpo |" in done.stdout


@pytest.mark.nightly
def test_the_memory_table_has_a_row_for_each_vocabulary_and_budget():
    done = run("benchmarks/memory.py", "--vocabulary", "500", "1000", "--tokens", "1024")
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[-2:]] == ["500", "1000"]
