# one command each; every target sets up .venv first, where it is not there yet

PYTHON ?= python3
# installed before anything else, so that the resolver never picks another build
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# two workers of one thread each: tensors in tests are small, and more threads only wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations 40
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready
# for the tests alone: hundreds of megabytes that nothing else needs
GPU := $(VENV)/.gpu
OUT ?= demo-out

.PHONY: help setup demo test check lint size clean

help:
	@echo "make demo   compress the embedded model to 4.25 bits a weight and write its report"
	@echo "make test   the test suite, at most 15 minutes on 2 cores"
	@echo "make check  the long suite too: kills, fuzz, installed peers, browser"
	@echo "make lint   ruff and mypy"
	@echo "make size   how large the house is"

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/laconic/kernels/cpu/*.cpp src/laconic/kernels/cpu/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "laconic needs Python 3.10 or newer; run: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt "$(TORCH)"
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

$(GPU): $(READY)
	$(PIP) --constraint constraints.txt "triton; platform_system == 'Linux'"
	@touch $(GPU)

setup: $(READY)

demo: $(READY)
	$(BIN)/laconic compress --budget bits=4.25 -o $(OUT) --overwrite
	$(BIN)/laconic report $(OUT)

test: $(GPU)
	$(PYTEST) -m "not long"

check: $(GPU)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

size: $(READY)
	$(BIN)/python bench/size.py

clean:
	rm -rf $(VENV) $(OUT) .$(OUT).laconic .pytest_cache .ruff_cache .mypy_cache
