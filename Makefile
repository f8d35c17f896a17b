# make train | test | test-slow | test-reference | test-plan-tpu | test-plan-cuda | plan-table | lint
#      | wire-table | precision-table | format | bench | bench-peers | bench-saves | chaos | clean
# A newcomer needs git, make and Python >= 3.11 with venv; everything else is installed into .venv.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
CONSTRAINTS := .ci/constraints-py$(if $(filter 3.11,$(VERSION)),311,312).txt
BIN := $(VENV)/bin
WORKDIR ?= runs/tiny
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: train test test-slow test-reference test-plan-tpu test-plan-cuda plan-table wire-table precision-table lint format bench bench-peers bench-saves chaos lock clean
.DELETE_ON_ERROR:

train: $(VENV)/.train
	$(BIN)/spmd-train train --config=configs/lm_tiny.py --workdir=$(WORKDIR)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-reference: $(VENV)/.reference
	$(BIN)/python -m pytest -m reference

# Compiles for TPUs that are not here: half an hour; ONLY=tests/test_plan_composed.py a minute.
ONLY ?=
test-plan-tpu: $(VENV)/.plan-tpu
	$(BIN)/python -m pytest -m plan_tpu $(ONLY)

# The same for NVIDIA GPUs; Linux only.
test-plan-cuda: $(VENV)/.plan-cuda
	$(BIN)/python -m pytest -m plan_cuda $(ONLY)

# docs/plans.md: the pod configs on the topologies they are meant for. Hours on a small machine;
# what is in docs/plans already is not compiled again.
plan-table: $(VENV)/.plan-tpu $(VENV)/.plan-cuda
	$(BIN)/python scripts/plan_table.py

# docs/wire.md: what each mesh axis sends, by formula and counted. Some minutes.
wire-table: $(VENV)/.train
	JAX_PLATFORMS=cpu $(BIN)/python scripts/wire_table.py --table=docs/wire.md

# docs/precision.md: a short run under each precision policy. Half an hour; goes on where it stopped.
precision-table: $(VENV)/.test
	$(BIN)/python scripts/precision_runs.py --page=docs/precision.md

lint: $(VENV)/.lint $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/shellcheck scripts/*.sh scripts/peers/*.sh scripts/slurm.sbatch .ci/run
	$(BIN)/python scripts/check_k8s.py scripts/k8s/*.yaml

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The trainer and its peers in turn: docs/speed.md. An hour with all peers; PEERS=bare_jax: minutes.
PEERS ?= all
bench: $(VENV)/.train $(if $(filter all,$(PEERS)),bench-peers)
	$(BIN)/python scripts/bench.py --peers=$(PEERS)

# PyTorch, TensorFlow and Horovod, each in a venv of its own below .venv-peers: about 3 GB.
bench-peers:
	scripts/peers/install.sh $(PYTHON)

# What a checkpoint each 50 steps costs the 100M config: the report's line on saves. Some minutes.
SAVES ?= runs/saves
bench-saves: $(VENV)/.train
	$(BIN)/spmd-train train --config=configs/lm_100m.py --workdir=$(SAVES) \
	  --config.train.num_steps=100 --config.train.checkpoint_every=50 --config.train.eval_every=0 \
	  --config.train.global_batch_size=4 --config.train.grad_accumulation=1 --config.train.log_every=10 \
	  --config.data.sequence_length=256 --config.model.compute_dtype=float32 --config.model.remat=none
	$(BIN)/spmd-train report --workdir=$(SAVES)

# Sixty faults of all kinds against real runs; an hour or two.
FAULTS ?= 60
SEED ?= 0
chaos: $(VENV)/.test
	$(BIN)/python scripts/chaos.py --faults=$(FAULTS) --seed=$(SEED)

# The versions that CI and these targets use, made anew.
lock:
	scripts/lock.sh

clean:
	rm -rf .venv-* build *.egg-info .pytest_cache .ruff_cache .jax_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Each set of extras is installed once, and again when the dependencies change.
$(VENV)/.train: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) install --quiet -c $(CONSTRAINTS) -e .
	touch $@
$(VENV)/.test: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[test]'
	touch $@ $(VENV)/.train
$(VENV)/.lint: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[lint]'
	touch $@
$(VENV)/.plan-tpu: pyproject.toml $(CONSTRAINTS) | $(VENV)/.test
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[plan-tpu]'
	touch $@
$(VENV)/.plan-cuda: pyproject.toml $(CONSTRAINTS) | $(VENV)/.test
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[plan-cuda]'
	touch $@
$(VENV)/.reference: pyproject.toml $(CONSTRAINTS) | $(VENV)/.test
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[reference]'
	touch $@
