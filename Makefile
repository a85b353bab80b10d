# Every target does its own set-up: a virtual environment in .venv with the exact versions of constraints.txt, or one in
# .venv-oldest with the oldest versions that hold.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-text test test-slow test-oldest check format hooks
demo: .venv/ready
	$(BIN)/fewstep demo --resume

demo-text: .venv/ready
	$(BIN)/fewstep demo --text --resume

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -n 2 --dist loadscope

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

hooks: .venv/ready
	$(BIN)/python -m pip install --quiet 'pre-commit>=3'
	$(BIN)/pre-commit install

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . pytest pytest-xdist hypothesis tensorboard torchmetrics
	touch $@
