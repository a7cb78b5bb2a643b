# Two commands: `make quickstart` (the main job) and `make test`. Each sets up .venv when there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint

quickstart: .venv/installed
	$(BIN)/danceopd quickstart

test: .venv/installed lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --cov --cov-report=term-missing:skip-covered
	$(BIN)/coverage report --include='*/fields/*,*/distill/*,*/states.py' --fail-under=90

lint: .venv/installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
