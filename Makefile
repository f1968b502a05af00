# Every command does its own set-up: the first one makes the virtual environment .venv, later ones use it.
PYTHON ?= python3
MINUTES ?= 30
SHARES ?= 2
HARDWARE ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n $(SHARES) --dist loadgroup --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --constraint .constraints/$(HARDWARE).txt

export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-unit test-integration soak check clean

demo: .venv/ready  ## Runs the whole job on the documentation of the installed Python packages.
	$(BIN)/python -m jobs.pipeline --config jobs/demo.yaml --replace

test: .venv/ready  ## Runs the tests, in two shares: first those that wait for Ray, then those that compute.
	$(PYTEST) tests/nodes tests/integration tests/gpu lib tests/unit

test-unit: .venv/ready
	$(PYTEST) lib tests/unit

test-integration: .venv/ready
	$(PYTEST) tests/nodes tests/integration tests/gpu

soak: .venv/ready  ## Runs nights under fire for half an hour, a fault every 20 s: soak.json says what was done.
	$(BIN)/python tests/soak.py --output runs/soak --minutes $(MINUTES)

check: .venv/ready  ## Checks style and types.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:  ## Removes the virtual environment, and what the demo and the soak made.
	rm -rf .venv runs/demo runs/soak

.venv/ready: pyproject.toml .constraints/$(HARDWARE).txt
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) --editable '.[$(HARDWARE),demo,dev,lora,tensorboard]'
	touch $@
