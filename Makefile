# Longtake's two commands, each with its own set-up:
#   make quickstart   train a tiny STDiT on real clips on the CPU, sample it, write a report
#   make test         the whole test suite
#   make services     what needs a cluster or an object storage: a Ray and an S3 server of this machine
#   make matrix       every model on every layout of up to 16 processes against one process
#   make kernels      compile every fused kernel for a GPU (none needed) and look for spilled registers
# PYTHON=python3.12 picks an interpreter; TORCH_BACKEND=cpu fetches PyTorch's small CPU build on Linux
# (needs access to PyTorch's own package index; the default is whatever your index offers).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv reads its own variables: hand it pip's list of local wheel folders, if there is one.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
INSTALL = VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))

.PHONY: quickstart test services matrix kernels lint types clean help

help:
	@sed -n '1,7p' Makefile

quickstart: $(VENV)/.ready-quickstart
	$(BIN)/longtake clips
	$(BIN)/longtake train --preset quickstart --fresh

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2

services: $(VENV)/.ready-dev
	$(INSTALL) -e . --group services
	$(BIN)/python -m pytest -m services

matrix: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m matrix

kernels: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m compiled

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/basedpyright

$(VENV)/.ready-quickstart: $(VENV)/.ready-python pyproject.toml
	$(INSTALL) -e '.[train]' --group clips
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-python pyproject.toml
	$(INSTALL) -e . --group dev
	@touch $@ $(VENV)/.ready-quickstart

$(VENV)/.ready-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Longtake needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing). Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "$(PYTHON) cannot make virtual environments here. Debian, Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
