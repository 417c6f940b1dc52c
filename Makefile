.DEFAULT_GOAL := help
PYTHON ?= python3
PORT ?= 6543
CHAOS ?=
MUTANTS ?=
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo dev test chaos lint types docs bench house mutants ci clean

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo ## Install, and run the demo application (PORT=6543)
	@exec $(BIN)/ws-celery demo --port $(PORT)

dev: $(VENV)/demo ## Run development.ini: web, worker, beat, broker, reloaded on change
	@exec $(BIN)/ws-celery dev --ini development.ini --reload

test: $(VENV)/dev ## Install, and run the tests with coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses auto --maxprocesses 4
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

chaos: $(VENV)/dev ## Kill real processes at every step, count the losses, write the table (CHAOS=options)
	$(BIN)/python -m tests.chaos $(CHAOS)
	$(BIN)/python -m tests.chaos.beats

lint: $(VENV)/dev ## Check style and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/dev ## Check types
	$(BIN)/mypy

docs: $(VENV)/dev ## Build the documentation
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/bench ## Measure side by side with plain Celery; write docs/benchmarks
	$(BIN)/python -m benchmarks --write docs/benchmarks
	$(BIN)/python -m benchmarks.beat

house: $(VENV)/dev ## Count modules, lines and how far a reader has to walk
	$(BIN)/python tools/house.py

mutants: $(VENV)/dev ## Change the code, a line at a time, and see whether its tests notice (MUTANTS=names)
	$(BIN)/python tools/mutants.py $(MUTANTS)

ci: lint types docs test ## Everything that CI runs

clean: ## Remove what was made
	rm -rf $(VENV) build dist docs/_build var .coverage* .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One file for each set of extras says that it is installed.
$(VENV)/%: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
