# make demo   set up, prepare real data, train replica-nano, write samples, a checkpoint and pictures
# make test   set up, lint, type-check, run the whole suite but the slow and GPU tests
#
# Both create .venv first. TORCH= picks another torch: make test TORCH='torch==2.11.0'.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: demo test test-all lint bench clean

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

clean:
	rm -rf $(VENV) runs data dist .pytest_cache .ruff_cache
