# make demo   set up what it needs, prepare real data, train replica-nano, write samples, a checkpoint and pictures
# make recipe the article's recipe at replica scale: epochs and batch ramp, more context, conversations, chat
# make test   set up the rest, lint, type-check, run the whole suite but the slow and GPU tests
# make matrix that suite on Python 3.11 to 3.13 with the oldest and the newest torch, in .venv-matrix/
# make docs   the pages of docs/ as a site in site/
#
# All create .venv first. TORCH= picks another torch: make test TORCH='torch==2.11.0'.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
RECIPE ?= runs/recipe

.PHONY: demo recipe test test-all matrix lint docs bench aot gpu gpu-env-check clean

# torch goes in first and alone: an open range in a dependency could pull gigabytes of CUDA packages.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check '$(TORCH)'
$(VENV)/.installed-torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL)
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-torch
	$(INSTALL) -e '.[demo]'
	touch $@

# Everything: what tests, recipe, pages and benchmarks need besides.
$(VENV)/.installed: $(VENV)/.installed-torch
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	$(BIN)/moe train replica-nano --out $(RUN) --fresh

# Every line goes on where it was interrupted, and does nothing where it is complete.
recipe: $(VENV)/.installed
	$(BIN)/moe data prepare --out $(RECIPE)/data --vocab-size 4096 --sample 0.1
	$(BIN)/moe train recipe-256 --data $(RECIPE)/data --out $(RECIPE)/256
	$(BIN)/moe train recipe-1k --from $(RECIPE)/256/final --data $(RECIPE)/data --out $(RECIPE)/1k
	$(BIN)/moe data instructions --tokenizer $(RECIPE)/1k/final --out $(RECIPE)/conversations
	$(BIN)/moe finetune $(RECIPE)/1k/final --data $(RECIPE)/conversations --out $(RECIPE)/chat --set train.steps=60
	$(BIN)/moe chat $(RECIPE)/chat/final --message "What is AI?" --max-tokens 64

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadgroup

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not gpu"

# Narrowed down: make matrix PYTHONS=3.11 TORCHES=2.11.0 TESTS="tests/kernels tests/test_model.py"
PYTHONS ?= 3.11 3.12 3.13
TORCHES ?= 2.11.0 2.13.0
TESTS ?= tests
matrix:
	.ci/matrix "$(PYTHONS)" "$(TORCHES)" $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The variable silences the theme's notice on a later release of mkdocs, which pyproject.toml rules out.
docs: $(VENV)/.installed
	$(BIN)/python docs/generated.py
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/expert_cpu.py

# Compiles every Triton kernel for every kind of GPU that can run it, on a machine without one; fails on spills.
aot: $(VENV)/.installed-demo
	$(BIN)/python -m moe.kernels.ahead

# On a machine with a CUDA GPU, with the python that has its torch: no .venv. All of it, six commands of under nine minutes
# each, or some: make gpu PART="tests peers". FLAGS=--quick, FLAGS=--dry-run; docs/gpu.md.
PART ?=
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(PART),--only $(PART)) $(FLAGS)

# The same, dry, with the versions of the machine that it was written for, in .venv-matrix/.
gpu-env-check:
	.ci/gpu-env-check $(if $(PART),--only $(PART)) $(FLAGS)

clean:
	rm -rf $(VENV) .venv-matrix runs data dist site .pytest_cache .ruff_cache
