# Both targets do all set-up themselves: Python 3.11+ with pip and venv is enough.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quick test test-slow check clean

quick: $(READY)  ## install, then train two methods on the embedded suite and print the tables
	$(BIN)/python -m benchmarks.run --methods ept,tucka

test: $(READY) check  ## install, then lint, types and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: $(READY)  ## what takes minutes: simulations, compilation, several processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[bench,offline,peft,dev]"
	touch $@

clean:
	rm -rf $(VENV)
