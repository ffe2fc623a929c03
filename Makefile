# make demo    environment, data, training, evaluation: runs/quickstart/ (20 to 30 minutes on 2 cores)
# make test    environment, whole test suite
# make parity  our numbers beside the published system's, as a table: docs/parity.md
# make soak    40 short distributed runs, each of which has to end well (about 10 minutes on 2 cores)
# make check   format, lint, types, quick unit tests: before every commit

VENV ?= .venv
RUN ?= runs/quickstart
SEED ?= 0
NPROC ?= 2
PYTHON ?=
PYTEST_ARGS ?=
# Many tests wait for processes; two at a time, a file each, fill two cores.
TEST_PROCESSES ?= 2

# Two processes on two cores spin against each other's threads unless each has one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# An environment variable of this name would put another checkout's modules before ours.
unexport PYTHONPATH

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help environment demo check test test-unit test-dist test-e2e test-kills soak parity bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

environment: $(READY)

$(READY): requirements.txt requirements-dev.txt scripts/make_environment.sh
	start=$$(date +%s); PYTHON="$(PYTHON)" bash scripts/make_environment.sh "$(VENV)" requirements-dev.txt && \
		echo $$(($$(date +%s) - start)) >$@

demo: $(READY)
	WEFT_SETUP_SECONDS="$$(cat $(READY))" $(BIN)/python scripts/quickstart.py --output_dir "$(RUN)" --seed "$(SEED)" --nproc "$(NPROC)"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/unit -q -m "not slow and not gpu" $(PYTEST_ARGS)

# Many tests start processes; each would compile our modules anew where python may not write what it has compiled.
test: $(READY)
	$(BIN)/python -m compileall -q data inference_pipeline modeling scripts tests train
	$(BIN)/pytest tests -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-unit: $(READY)
	$(BIN)/pytest tests/unit $(PYTEST_ARGS)

test-dist: $(READY)
	$(BIN)/pytest tests/distributed $(PYTEST_ARGS)

test-e2e: $(READY)
	$(BIN)/pytest tests/e2e $(PYTEST_ARGS)

soak: $(READY)
	$(BIN)/python -m tests.soak.exits --runs 40

test-kills: $(READY)
	WEFT_KILLS=30 $(BIN)/pytest tests/distributed/test_kills.py $(PYTEST_ARGS)

parity: $(READY)
	$(BIN)/python -m tests.parity.run --worst --table docs/parity.md

# benchmarks/gpu.py is for a machine with one.
bench: $(READY)
	@for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do [ -e "$$script" ] || continue; echo "# $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf "$(VENV)" .pytest_cache .ruff_cache .mypy_cache .hypothesis
