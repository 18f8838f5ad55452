PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs constraints clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/demo.stamp ## Run the demo
	@$(BIN)/python scripts/demo.py

test: .venv/dev.stamp ## Run the tests, with 100 % coverage required
	@scripts/test

lint: .venv/dev.stamp ## Check style, types, imports and the README
	@scripts/lint

format: .venv/dev.stamp ## Format the code and fix what can be fixed
	@scripts/format

docs: .venv/dev.stamp ## Build the documentation into docs/_build/html
	@$(BIN)/sphinx-build -n -W --keep-going -b html docs docs/_build/html

constraints: ## Pin the newest versions of all development packages anew
	@scripts/constraints $(PYTHON)

clean: ## Remove everything that the other targets made
	@scripts/clean

.venv/%.stamp: pyproject.toml requirements-dev.txt scripts/venv
	@scripts/venv $(PYTHON) $*
