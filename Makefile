PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install quickstart space test test-fast faults check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV), about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/python train_base.py --preset quickstart-modern --output_dir runs/quickstart/base --overwrite_output_dir
	$(BIN)/python train_instruct.py --preset quickstart --output_dir runs/quickstart/instruct --overwrite_output_dir
	$(BIN)/python train_preference.py --preset quickstart --output_dir runs/quickstart/preference --overwrite_output_dir
	$(BIN)/fgpt evaluate runs/quickstart/base/model runs/quickstart/preference/model --tasks basic-qa,capitals-unseen
	$(BIN)/fgpt chat runs/quickstart/preference --greedy 'What is the capital of France?'
	$(BIN)/fgpt chat runs/quickstart/preference --greedy 'What is 2 + 2?'
	$(BIN)/python benchmarks/quickstart.py runs/quickstart

# The newest stage that the quickstart has reached, beside the base model where it came from one.
STAGE = $(firstword $(wildcard $(foreach stage,preference instruct base,runs/quickstart/$(stage)/model)))
BASE = $(filter-out $(STAGE),$(wildcard runs/quickstart/base/model))

space: install
	@test -n "$(STAGE)" || { echo "there is no runs/quickstart/*/model to serve: run make quickstart first"; exit 2; }
	MODEL_ID=$(STAGE) $(if $(BASE),BASE_MODEL_ID=$(BASE)) $(BIN)/python space/app.py

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-fast: install
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not slow'

# The long form of tests/faults: hundreds of kills, full disks, damaged files and signals; docs/reliability.md has the counts.
faults: install
	FGPT_FAULTS=long $(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/faults

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
