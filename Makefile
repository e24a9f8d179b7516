PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install quickstart test check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV), about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/python train_base.py --preset quickstart --output_dir runs/quickstart/base --overwrite_output_dir
	$(BIN)/python train_instruct.py --preset quickstart --output_dir runs/quickstart/instruct --overwrite_output_dir
	$(BIN)/python train_preference.py --preset quickstart --output_dir runs/quickstart/preference --overwrite_output_dir
	$(BIN)/fgpt evaluate runs/quickstart/base/model runs/quickstart/preference/model --tasks pydocs-choice --limit 64
	$(BIN)/fgpt chat runs/quickstart/preference --greedy 'What does `load(path)` do?'

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
