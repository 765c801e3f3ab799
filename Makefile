# The interpreter that makes the environment: any Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: compare test check horovod clean

compare: $(VENV)/.installed
	$(BIN)/python benchmarks/compare.py $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

horovod: $(VENV)/.installed
	$(BIN)/python -m lbgm_compress.install_horovod --constraint constraints.txt $(ARGS)

$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,flower,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
