# Each target sets up what it needs in .venv; only Python >= 3.10 and make have to be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m nmsparse demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -m "not slow"

# Also compiles every shipped kernel for every architecture: a quarter of an hour on two cores.
test-all: $(VENV)/.test
	$(BIN)/python -m pytest -q

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell

docs: $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs,hf]'
	$(BIN)/sphinx-build -W -q docs docs/_build

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
		|| { echo "nmsparse needs Python >= 3.10; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[hf,bench]'
	@touch $@

$(VENV)/.test: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.demo
