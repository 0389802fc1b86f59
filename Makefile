# Every target does its own set-up: a virtual environment in .venv, made once.
#   make demo    an expert's whole life on text that this machine has, in a few minutes
#   make test    the tests          make test-slow   those that take minutes as well
#   make test-vllm  vLLM with masks, in an environment of its own: some gigabytes once, then about ten minutes
#   make check   formatter, linter, types
#   make docs    what is generated: docs/cli.md, the package's names, the figures and pictures of README
#   make record  a run of the life that README's first screen shows, some minutes; then make docs
#   make release the wheel: built, checked, installed in a bare environment, and the demo run from it
#   make bench   measurements; they never fail on time
#   make gpu     on a CUDA device: its tests, training, memory, inference and kernels at the size of 1B, in 8 minutes

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
MIN_PYTHON := 3.10
MAX_PYTHON := 3.13

.PHONY: help venv demo test test-slow test-vllm check docs record release bench gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

venv: $(STAMP)

# PYTHON=... chooses another one. A name that exists may still be a shim that does not run.
$(STAMP): pyproject.toml constraints.txt
	@python=""; \
	for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10; do \
		if "$$candidate" -c 'import sys, venv, ensurepip; v = sys.version_info[:2]; \
		low, high = (tuple(map(int, x.split("."))) for x in ("$(MIN_PYTHON)", "$(MAX_PYTHON)")); \
		sys.exit(not low <= v <= high)' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "no Python $(MIN_PYTHON) to $(MAX_PYTHON) with venv found; name one: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	"$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/flexctl demo --overwrite

# A process for every core, each with one thread; the tests of one file stay together, as they share what they build.
TEST_PROCESSES := 2

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --durations=25

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu and not network and not vllm'

test-vllm: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm --durations=10

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m flexctl.cli.reference
	$(BIN)/python -m tools.readme

record: $(STAMP)
	$(BIN)/python -m tools.record

release: $(STAMP)
	$(BIN)/python -m tools.release

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

gpu: $(STAMP)
	rm -rf gpu-figures
	$(BIN)/python -m tests.gpu --out gpu-figures --limit 480

clean:
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
