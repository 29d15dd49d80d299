# make run: train the quickstart here.  make test: everything a change must pass.  Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: run test setup lint types clean

run: $(STAMP)
	$(BIN)/efflaunch +experiment=quickstart

test: lint types
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"efflaunch needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "pip>=24"
	@# torch first and alone: later packages that only name it then keep this build.
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	@# mypy needs a directory called efflaunch, whatever this one is called.
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/efflaunch
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
