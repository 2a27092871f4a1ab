# `make serve` and `make test` are all a stranger needs; `make help` lists the rest.

PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000
MODEL  ?=
ARGS   ?=
# Test files are shared out among processes, each of which computes with one thread. A file stays whole: what its tests
# share is made once.
WORKERS ?= -n auto --maxprocesses 4 --dist loadfile
bin    := $(VENV)/bin
pip    := $(bin)/python -m pip --disable-pip-version-check -q

# PyTorch's default wheels for Linux bring several GB of CUDA packages. Without an NVIDIA GPU the CPU build is installed
# first, from PyTorch's own CPU index (or from any wheel folder that pip is configured with); the range in
# pyproject.toml is then satisfied and nothing more is downloaded.
TORCH_CPU := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help serve test test-all lint bench example install clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/.installed  ## serve the bundled model (PORT=8000 MODEL=path-or-name ARGS="...")
	@exec $(bin)/fnengine serve $(MODEL) --port $(PORT) $(ARGS)

test: $(VENV)/.installed-test  ## the quick tests, as CI runs them
	$(bin)/python -m pytest -q -m "not slow and not gpu" $(WORKERS) $(ARGS)

test-all: $(VENV)/.installed-test  ## everything, soak and fuzz included (minutes)
	$(bin)/python -m pytest -q $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyright

bench: $(VENV)/.installed  ## throughput of the bundled model in this process
	$(bin)/fnengine bench throughput $(ARGS)

example: $(VENV)/.installed  ## the shortest example
	$(bin)/python examples/offline_generate.py

install: $(VENV)/.installed  ## only set up the virtual environment

clean:  ## remove the virtual environment and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "fnengine needs Python 3.11, 3.12 or 3.13; set PYTHON=python3.12, say"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "no virtual environments here: apt install python3-venv"; exit 1; }

$(VENV)/.torch: | $(bin)/python
	@echo "setting up $(VENV) (about a minute and 1 GB the first time)"
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(pip) install "torch>=2.11,<2.14"; \
	else \
	  $(pip) install "$(TORCH_CPU)" --retries 1 --extra-index-url $(CPU_INDEX) 2>$(VENV)/pip.log \
	    || { cat $(VENV)/pip.log; exit 1; }; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@$(pip) install -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml
	@$(pip) install -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	@$(pip) install -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
