# What a clone needs: `make demo` and `make test`. Only Python 3.11+, make and a package index are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev

.PHONY: demo test test-reliability test-reliability-full check clean
.DELETE_ON_ERROR:

$(VENV)/.run-installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "semi_fast needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev-installed: $(VENV)/.run-installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/.run-installed  ## three methods on the bundled digits, compared on one page
	$(BIN)/semi-fast demo

test: $(VENV)/.dev-installed  ## all tests, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

FAULTS := tests/reliability tests/test_preemption.py tests/test_processes.py

test-reliability: $(VENV)/.dev-installed  ## a share of the faults, as CI makes them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(FAULTS)

test-reliability-full: $(VENV)/.dev-installed  ## all faults, one after the other; writes benchmarks/results/reliability.csv
	OMP_NUM_THREADS=1 SEMI_FAST_RELIABILITY=full $(BIN)/python -m pytest --timeout 7200 $(FAULTS)

check: $(VENV)/.dev-installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist *.egg-info
