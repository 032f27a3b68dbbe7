# Both targets do all set-up themselves: Python 3.11+ with pip and venv is enough.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
DOCS := $(VENV)/.docs
LOWEST := .venv-lowest

.PHONY: quick test test-slow test-exhaustive test-lowest check lint docs gpu release clean architectures

quick: $(READY)  ## install, then compare three methods on four generated tasks: tables and a page, within 5 minutes
	$(BIN)/python -m benchmarks.run --methods lora,ept,tucka --tasks q_sst2,q_stsb,q_mnli,q_openbookqa --steps 100 --eval-rows 100

test: lint  ## install, then lint, types and the tests of three minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 15 -m "not slow"

test-slow: $(DOCS)  ## the other tests: simulations, compilation, several processes, whole runs, the later methods
	OMP_NUM_THREADS=1 MOEPEFT_SHAPES=unchecked $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 40 -m "slow and not exhaustive"

test-exhaustive: $(DOCS)  ## every method, preset, host and phase: an hour and more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m exhaustive

gpu:  ## nine minutes of what a GPU is to do, DATA=folder; again until all is done; REHEARSE=1 on the CPU; installs nothing
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu $(if $(DATA),--data-dir $(DATA)) $(if $(REHEARSE),--rehearse)

architectures: $(TOOLS)  ## rebuild docs/architectures.md: every method on every architecture, minutes
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.library.architectures

test-lowest: $(LOWEST)/.ready  ## contract, golden vectors and bridges at the lowest versions promised
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -n 2 -m "not exhaustive" -k "published and bert and not by-definition" tests/library/contract
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -n 2 -m "not exhaustive" tests/golden tests/library/unit/test_bridge_peft.py tests/library/unit/test_bridge_trainer.py

check: lint  ## all that is no test: lint, types, imports, the house's limits, the committed tables
	$(BIN)/python -m pytest -q tests/docs/test_house.py

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.report --check --readme README.md --verdict

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-compile $(CONSTRAINTS) -e ".[bench,offline]"
	touch $@

$(TOOLS): $(READY)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[peft,tucker,quantised,launch,trl,dev]"
	touch $@

release: $(TOOLS)  ## wheel, sdist and notes in dist/, checked; nothing is uploaded
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	awk '/^## \[/ {found += 1; next} found == 1' CHANGELOG.md > dist/NOTES.md
	$(BIN)/python -m pytest -q tests/docs/test_packaging.py
	cd dist && sha256sum *.whl *.tar.gz

docs: $(DOCS)  ## the documentation's site, in site/
	$(BIN)/mkdocs build --strict

$(DOCS): $(TOOLS)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[docs]"
	touch $@

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt -e ".[peft,trainer,tucker]" datasets pytest pytest-xdist hypothesis beartype
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST)
