# The interpreter that makes the environment: any Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes side by side. Each may start processes of its own, and so has one thread.
JOBS ?= 3
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: compare test soak check docs horovod gpu clean

compare: $(VENV)/.installed
	$(BIN)/python benchmarks/compare.py $(ARGS)

test: $(VENV)/.installed
	$(TESTS) -m "not soak" $(ARGS)

soak: $(VENV)/.installed
	$(TESTS) -m soak $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

horovod: $(VENV)/.installed
	$(BIN)/python -m lbgm_compress.install_horovod --constraint constraints.txt $(ARGS)

$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,docs,flower,lightning,nvflare,test,test-frameworks,torchft,transformers]'
	touch $@

gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
