# Every target does all of its set-up: the environment, the installation, the run.
# PYTHON: the interpreter to make the environment with (3.10 or newer). VENV: where it is.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# one thread a process: the tests and the quick start share the machine between processes
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-oldest test-newest lint clean

$(BIN)/installed: pyproject.toml
	@echo "Installing into $(VENV): some minutes and about 2 GB, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

quickstart: $(BIN)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash quickstart.sh

test: $(BIN)/installed
	$(BIN)/python -m pytest --numprocesses 2

# The whole suite with the lower bounds of pyproject.toml (wheels of them exist for Python 3.10 to 3.12), and
# with the newest releases that it allows today; each in an environment of its own.
test-oldest: .venv-oldest/bin/installed
	.venv-oldest/bin/python -m pytest --numprocesses 2

.venv-oldest/bin/installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --editable '.[dev]' --constraint tests/oldest.txt
	touch $@

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-newest/bin/python -m pytest --numprocesses 2

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs build *.egg-info
