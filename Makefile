# From a bare clone: `make demo` shows a taught student, `make test` runs everything that CI runs.
# Each step leaves a stamp when it is complete, so that an interrupted set-up goes on where it stopped and a second call does nothing twice.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   ?= runs/demo
JOBS   ?= 2

SOURCES := pyproject.toml setup.py CMakeLists.txt MANIFEST.in README.md $(shell find l2t csrc -type f -not -name '*.so' -not -path '*/__pycache__/*')
NATIVE  := $(shell find csrc tests/native benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu')

HAS_GPU := import sys, torch; from l2t import ops; sys.exit(None if ops.HAS_CUDA and torch.cuda.is_available() \
  else 'This needs a GPU, a torch that sees it, and l2t built with nvcc: l2t doctor says what there is.')

# What a compiler made is kept, by ccache: after a change only what depends on it is compiled again, and what a test
# builds in a clone, the flags being the same, is not compiled at all.
export CMAKE_CXX_COMPILER_LAUNCHER := $(abspath $(BIN))/ccache
export CMAKE_CUDA_COMPILER_LAUNCHER := $(abspath $(BIN))/ccache
export CCACHE_DIR := $(abspath $(VENV))/ccache
export CCACHE_BASEDIR := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-memcheck lint format bench bench-gpu bench-teaching bench-peers roofline results clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.wheel: $(VENV)/.requirements $(SOURCES)
	@rm -rf dist/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel . --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir dist/wheel
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall dist/wheel/l2t-*.whl
	@touch $@

setup: $(VENV)/.wheel  ## .venv with everything pinned, and l2t built and installed as a wheel

demo: setup  ## teach three teachers on mnist1d, compare with tuned baselines, write a page
	$(BIN)/l2t teach mnist1d --seeds 0 1 2 --jobs $(JOBS) --out $(RUNS) --resume
	$(BIN)/l2t compare $(RUNS) --jobs $(JOBS)
	$(BIN)/l2t report $(RUNS)

lint: setup  ## ruff, clang-format, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

test: lint  ## lint, house rules, native and Python tests, examples in the docs
	$(BIN)/pytest -n 2 -m "not long"

test-long: setup  ## the tests that take minutes
	$(BIN)/pytest -m long

test-memcheck: setup  ## on a GPU: the tests of the CUDA kernels under compute-sanitizer
	$(BIN)/python -I -c "$(HAS_GPU)"
	for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(BIN)/pytest -q -k cuda tests/test_ops.py tests/test_native.py || exit 1; \
	done

bench: setup  ## every op against PyTorch and the bound, some minutes on an idle machine; draws docs/benchmarks.md
	$(BIN)/python benchmarks/run.py --out docs/benchmarks/cpu.jsonl
	$(BIN)/python benchmarks/draw.py

roofline: setup  ## the paper roofline of the CUDA kernels (needs nvcc, no GPU); draws docs/benchmarks.md
	$(BIN)/python benchmarks/roofline.py --out docs/benchmarks/roofline.md
	$(BIN)/python benchmarks/draw.py

bench-teaching: setup  ## the guard against three runs that diverge
	$(BIN)/python benchmarks/guard.py

bench-peers: setup  ## one teacher gradient by l2t and by the libraries in PEERS, a virtual environment; draws docs/benchmarks.md
	$(BIN)/python benchmarks/unroll_peers.py $(if $(PEERS),--peers $(PEERS)) --out docs/benchmarks/unroll.jsonl
	$(BIN)/python benchmarks/draw.py

bench-gpu: setup  ## on a GPU: checks the CUDA kernels, then times every op against PyTorch and the bound
	$(BIN)/python -I -c "$(HAS_GPU)"
	$(BIN)/pytest -q -k cuda tests/test_ops.py
	$(BIN)/python benchmarks/run.py --gpu --seconds 0.1 --out docs/benchmarks/gpu.jsonl
	$(BIN)/python benchmarks/draw.py

results: setup  ## draw docs/results.md from the rows that benchmarks/teaching.py wrote
	$(BIN)/python benchmarks/draw_results.py

format: $(VENV)/.requirements  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:  ## remove everything that make made, .venv included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
