PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lanes servers bench lint format docs interleavings mutants constraints clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/demo.stamp ## Run the demo
	@$(BIN)/python scripts/demo.py

test: .venv/dev.stamp ## Run the tests, with 100 % coverage required
	@scripts/test

lanes: .venv/dev.stamp ## Run the tests on each supported version (on one: make lane-floor)
	@$(BIN)/python scripts/lane

lane-%: .venv/dev.stamp
	@$(BIN)/python scripts/lane $*

servers: .venv/dev.stamp ## Test the servers, and write the table of what each of them keeps
	@$(BIN)/python scripts/servers.py

bench: ## Compare with the peers, as ratios, and write the table and the plot
	@$(PYTHON) scripts/bench

lint: .venv/dev.stamp ## Check style, types, imports and the README
	@scripts/lint

format: .venv/dev.stamp ## Format the code and fix what can be fixed
	@scripts/format

docs: .venv/dev.stamp ## Build the documentation into docs/_build/html
	@$(BIN)/sphinx-build -n -W --keep-going -b html docs docs/_build/html

interleavings: .venv/dev.stamp ## Try for a minute in which orders things can happen
	@scripts/interleavings

mutants: .venv/dev.stamp .venv/mutants.stamp ## Change the code a little, and see which tests notice
	@$(BIN)/python scripts/mutants

constraints: ## Pin the newest versions of all development packages anew
	@scripts/constraints $(PYTHON)

clean: ## Remove everything that the other targets made
	@scripts/clean

.venv/%.stamp: pyproject.toml requirements-dev.txt scripts/venv
	@scripts/venv $(PYTHON) $*
