# Each target works alone on a fresh machine with Python 3.11 or newer: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test test-matrix test-slurm quick lint check clean

run: $(VENV)/.installed  ## the built-in task; ARGS="objective=wpo" for another
	$(BIN)/python -m align $(ARGS)

test: $(VENV)/.installed-dev  ## every test, the slow ones too
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations 10 -m "not (slow and multiprocess) and not matrix and not slurm"
	$(BIN)/python -m pytest --durations 10 -m "slow and multiprocess and not matrix and not slurm"

test-matrix: $(VENV)/.installed-dev  ## more of the slow ones: every strategy by every starter, thirty kills, self-play: an hour
	$(BIN)/python -m pytest -m matrix tests/launch tests/runs tests/test_golden_runs.py tests/test_playground.py tests/test_benchmarks.py

test-slurm: $(VENV)/.installed-dev  ## jobs on a real SLURM of one node, which it installs and starts: root on Debian or Ubuntu
	timeout 30 sinfo >/dev/null 2>&1 || tests/launch/slurm_node.sh
	$(BIN)/python -m pytest -m slurm tests/launch/test_slurm.py

quick: $(VENV)/.installed-dev  ## the tests that take under two minutes
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## what CI runs

# torch first, by itself: where a CPU build of the constrained version is at hand, pip takes it and no CUDA follows.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs build dist *.egg-info
