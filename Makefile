# Every target does all of its set-up: the environment, the installation, the run.
# PYTHON: the interpreter to make the environment with (3.10 or newer). VENV: where it is.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# one thread a process: the tests and the quick start share the machine between processes
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test lint clean

$(BIN)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(BIN)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash quickstart.sh

test: $(BIN)/installed
	$(BIN)/python -m pytest --numprocesses 2

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs build *.egg-info
