# Every target does its own set-up: a virtual environment in .venv with the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-text test test-slow check format
demo: .venv/ready
	$(BIN)/fewstep demo --resume

demo-text: .venv/ready
	$(BIN)/fewstep demo --text --resume

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
