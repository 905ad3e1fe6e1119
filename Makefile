# Every target makes the virtual environment that it needs. `make VENV=folder PYTHON=python3.11 ...` chooses others.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/demo.yaml
BIN := $(VENV)/bin
ROOMS := launcher model parallel data cluster
STAMP := $(VENV)/.onetrain-setup

.PHONY: setup demo test chaos check types clean

setup: $(STAMP)

# torch first and alone, so that its pinned version (or a local build of it) is what everything else finds.
$(STAMP): setup.py constraints.txt
	@echo "installing into $(VENV); minutes the first time, then never again"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# From simulated logs to a table of results: 2 Ray workers, ZeRO-2.
demo: setup
	@set -e; for verb in prepare tokenize train evaluate; do \
		printf '\n==== onetrain %s %s ====\n' "$$verb" "$(CONFIG)"; \
		$(BIN)/onetrain "$$verb" "$(CONFIG)"; \
	done

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# 20 faults at random moments of a run on several Ray nodes of this machine, then nodes that go and come back; needs root.
chaos: setup
	$(BIN)/python tests/chaos/chaos.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory types

# mypy sees the rooms under the name they are imported by.
types: setup
	@mkdir -p .typecheck/onetrain
	@for room in $(ROOMS); do ln -sfn "$(CURDIR)/$$room" ".typecheck/onetrain/$$room"; done
	MYPYPATH=.typecheck $(BIN)/mypy --explicit-package-bases -p onetrain

# Removes what the tools made; the virtual environment, prepared data and runs stay.
clean:
	rm -rf build dist *.egg-info .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(ROOMS) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
