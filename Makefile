# Needs Python 3.11, 3.12 or 3.13 and make, nothing else. `make help` says what there is.
#   make demo PYTHON=python3.12      choose the interpreter
#   make test VENV=/path/to/venv     choose the virtual environment
#   make test ARGS="tests/stats -x"  hand arguments to pytest

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
DEMO := runs/quickstart
WORKERS ?= 2
ARGS ?=

# One thread per process: two that share two cores with another process can be many times slower than one.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1

.PHONY: help demo test test-faults bench lint format types docs install develop clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     install into $(VENV), then learn, keep, forget, audit and report on handwritten digits"
	@echo "make test     the whole test suite"
	@echo "make test-faults  kills, full disks and damaged files (some minutes)"
	@echo "make bench    speed, as ratios against named baselines"
	@echo "make lint     ruff: rules and format        make format   mend what ruff can mend"
	@echo "make types    mypy                          make docs     build the documentation site into site/"
	@echo "make install  only install                  make develop  only install, with what tests need"
	@echo "make clean    remove $(VENV), caches and builds (never runs/)"

demo: install
	$(BIN)/engram run quickstart --out $(DEMO) $(if $(wildcard $(DEMO)),--resume)
	@echo "The report: $(DEMO)/report.html (open it in any browser; it needs no network)"

test: develop
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Kills, full disks and damaged files: docs/reliability.md
test-faults: develop
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m faults tests/faults $(ARGS)

bench: develop
	$(BIN)/python -m benchmarks $(ARGS)

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: develop
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: develop
	$(BIN)/mypy src

docs: $(VENV)/.engram-docs
	PYTHONPATH=. DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

install: $(VENV)/.engram-core
develop: $(VENV)/.engram-dev

# Stamp files: an install is repeated only when what it depends on has changed.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "engram needs Python 3.11, 3.12 or 3.13: none was found; name one with" \
		"make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "engram needs Python 3.11, 3.12 or 3.13; $(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1): choose another with make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.engram-core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing engram into $(VENV) (some minutes the first time)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.engram-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing engram with what its tests need into $(VENV) (some minutes the first time)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.engram-core

$(VENV)/.engram-docs: $(VENV)/.engram-dev
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests $(wildcard benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +
