# Everything a fresh machine needs: each target sets up .venv/ by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= test
ARGS ?=
SEEDS ?= 500
PLANT ?=

.PHONY: setup demo test test-fast sim lint format types bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     set up, then train, serve and check MovieLens-100k on a local cluster (ARGS=\"--json out.json\")"
	@echo "make test     set up, then run the whole test suite (ARGS are passed to pytest)"
	@echo "make sim      whole clusters under faults, on all cores, as JSON (SEEDS=10000; PLANT=name or all: planted bugs must be found)"
	@echo "make lint     ruff (lint and format) and mypy"
	@echo "make bench    kernels, pulls, placements and pushes, with peers (apt-get install redis-server)"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/embring demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow" $(ARGS)

sim: $(STAMP)
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --plant "$(PLANT)" --json $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@command -v redis-server >/dev/null || echo "redis-server is not on the PATH; 'apt-get install redis-server' adds that peer"
	$(BIN)/embring bench kernels $(ARGS)
	$(BIN)/embring bench pull $(ARGS)
	$(BIN)/embring bench placement --quick
	$(BIN)/embring bench push

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
