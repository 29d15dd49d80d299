# make run: train the quickstart here.  make test: everything a change must pass.  make slow: the tests that take minutes.  All set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# Tests start hundreds of Pythons: the package is compiled once, whatever the surroundings say of it.
export PYTHONDONTWRITEBYTECODE =
# Test files run side by side: most of them wait for ranks of their own.
WORKERS ?= 3

.PHONY: run test slow setup lint types clean

run: $(STAMP)
	$(BIN)/efflaunch +experiment=quickstart

test: lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" --durations=15

# What takes minutes by itself: whole lives of runs on clusters.
slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try: make $(MAKECMDGOALS) PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq "pip>=24"
	@# torch first and alone: later packages that only name it then keep this build.
	@echo "installing torch into $(VENV) ..."
	@$(BIN)/python -m pip install -qq -c constraints.txt torch
	@# DeepSpeed's setup.py imports torch, and would compile its operations, none of which is used.
	@$(BIN)/python -m pip install -qq -c constraints.txt "setuptools>=77" wheel ninja
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation deepspeed
	@echo "installing efflaunch and the rest ..."
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[test]"
	@# mypy needs a directory called efflaunch, whatever this one is called.
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/efflaunch
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
