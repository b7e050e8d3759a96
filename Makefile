# Each target works alone on a fresh machine with Python 3.11 or newer: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test nightly quick lint check install-dev clean

run: $(VENV)/.installed  ## the built-in task; ARGS="objective=wpo" for another
	$(BIN)/python -m align $(ARGS)

test: $(VENV)/.installed-heavy  ## every test but the nightly ones, the slow ones too
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10 -m "not (slow and multiprocess) and not nightly"
	$(BIN)/python -m pytest --durations 10 -m "slow and multiprocess and not nightly"

# What `make test` leaves out for its time, in parts of less than an hour. A part that was ended goes on behind the tests
# that passed on the same commit; FRESH=1 runs them again.
strategies := tests/launch/test_strategies.py
launch := tests/launch/test_launch.py
survival := tests/runs/test_survival.py
selfplay := tests/runs/test_selfplay.py
slurm := tests/launch/test_slurm.py
figures := tests/test_golden_runs.py tests/test_playground.py tests/test_benchmarks.py tests/train
PASSED := .nightly/$(PART)-$(shell git rev-parse --short HEAD)

nightly: $(VENV)/.installed-heavy  ## PART=strategies, launch, survival, selfplay, slurm (root on Debian: starts one) or figures
	test -n "$($(PART))" || { echo "PART is strategies, launch, survival, selfplay, slurm or figures"; exit 1; }
	test "$(PART)" != slurm || timeout 30 sinfo >/dev/null 2>&1 || tests/launch/slurm_node.sh
	mkdir -p .nightly && $(if $(FRESH),rm -f $(PASSED),true)
	$(BIN)/python -m pytest --durations 10 -m nightly --passed $(PASSED) $($(PART))

quick: $(VENV)/.installed-dev  ## the tests that take under two minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## what CI runs, one beside the other

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

$(VENV)/.installed-heavy: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev-heavy]'
	touch $@

install-dev: $(VENV)/.installed-heavy  ## what lint and every test need

clean:
	rm -rf $(VENV) .nightly runs build dist *.egg-info
