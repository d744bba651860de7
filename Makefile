# Everything runs in .venv, which the first target that needs it sets up.
# Another interpreter: make PYTHON=python3.12 test (after "make clean" if .venv exists already).

PYTHON ?= python3
PYTEST_ARGS ?=
# JAX's own switches, NAME=value, under each of which the suite runs once.
SWITCHES ?= $(shell cat tests/switches.txt)
# A file stays with one worker, which compiles its programs once; tests/conftest.py says which come first. After a worker died
# that way of dealing out files waits for ever, so no other takes its place.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-switches lint clean

help:  ## this list
	@echo "ptq4dit_jax targets (each sets up .venv where it needs it):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-13s %s\n' "$$name" "$$text"; done

install: $(INSTALLED)  ## create .venv and install the package with its tests' dependencies

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' found; name a Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "ptq4dit_jax needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=..." >&2; exit 1; }
	@echo "Creating .venv with $$($(PYTHON) -V 2>&1) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) install --upgrade pip
	@echo "Installing into .venv (JAX, Flax, Orbax and the test tools; a few minutes the first time) ..."
	@$(PIP) install -e '.[test]'
	@touch $@
	@echo "Installed."

demo: $(INSTALLED)  ## quantize the shipped digits model and draw samples beside the float model's
	@$(BIN)/python -m models.digits.demo

test: $(INSTALLED)  ## run every test
	@$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-fast: $(INSTALLED)  ## run the tests that take seconds
	@$(BIN)/python -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-switches: $(INSTALLED)  ## run every test under each of JAX's switches (tests/switches.txt, or SWITCHES="NAME=value ...")
	@failed=; for switch in $(SWITCHES); do \
		printf '\n==== %s ====\n' "$$switch"; \
		env "$$switch" $(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS) || failed="$$failed $$switch"; \
	done; \
	if [ -n "$$failed" ]; then echo "Failed under:$$failed" >&2; exit 1; fi; \
	echo "Passed under: $(SWITCHES)"

lint: $(INSTALLED)  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove .venv and every cache; results in out/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
