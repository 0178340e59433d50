# make demo   set up, prepare real data, train replica-nano, write samples, a checkpoint and pictures
# make test   set up, lint, type-check, run the whole suite but the slow and GPU tests
#
# Both create .venv first. TORCH= picks another torch: make test TORCH='torch==2.11.0'.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: demo test test-all lint bench aot gpu clean

# torch goes in first and alone: an open range in a dependency could pull gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/moe train replica-nano --out $(RUN) --fresh

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/expert_cpu.py

# Compiles every Triton kernel for A100, H100 and MI300, on a machine without a GPU too; fails on spills.
aot: $(VENV)/.installed
	$(BIN)/python -m moe.kernels.ahead

# On a machine with a CUDA GPU, with the python that has its torch: no .venv. FLAGS=--quick, FLAGS=--dry-run.
gpu:
	$(PYTHON) benchmarks/gpu.py $(FLAGS)

clean:
	rm -rf $(VENV) runs data dist .pytest_cache .ruff_cache
