.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# What is installed is compiled when first imported: where that may not be kept, every command compiles it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test test-fast chromium ui lint bench-quality bench-diagnostics constraints

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt packaging_hook.py atft_pipeline_defaults.pth
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

run: $(STAMP)  ## embedded market to a judged model_50ep, with evaluation and diagnostics
	$(BIN)/python -m assets

test: $(STAMP) lint chromium  ## lint, types and the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

test-fast: $(STAMP)  ## what one runs while working: no process, no browser, nothing that takes long
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not process and not slow'

chromium:  ## the browser that the tests open pages with: Debian's, installed where this is root's machine
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get -o Acquire::http::Timeout=20 -o Acquire::Retries=1 update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium; } >/dev/null \
		|| echo "chromium: apt-get cannot install it; the tests that need a browser are skipped"; \
	else echo "chromium: not found, and only root can apt-get it; the tests that need a browser are skipped"; fi

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: $(STAMP)  ## the Dagster UI on http://localhost:3000
	DAGSTER_HOME=$(CURDIR) $(BIN)/dagster dev -w workspace.yaml

bench-quality: $(STAMP)  ## what the network learns of a market whose answer is known: the table in docs/synthetic-market.md
	$(BIN)/python -m bench.evaluation.quality output/quality --document docs/synthetic-market.md

bench-diagnostics: $(STAMP)  ## faults planted into real runs, and which of them the diagnosis names: the table in docs/diagnosis.md
	$(BIN)/python -m bench.diagnostics.diagnostics output/diagnostics --document docs/diagnosis.md

constraints: $(STAMP)  ## write what is installed back to constraints.txt
	{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//'; } > .constraints.new
	mv .constraints.new constraints.txt
