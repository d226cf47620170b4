# make quickstart   sets up .venv and runs the whole pipeline on the embedded data (quickstart.sh)
# make test         sets up .venv and runs the tests
# make bench        sets up .venv and measures speed and memory; e.g. make bench BENCH="--size trl-small --against trl"

PYTHON ?= python3
VENV = .venv/bin/python

quickstart: .venv/installed
	PYTHON=$(VENV) ./quickstart.sh

test: .venv/installed
	$(VENV) -m pytest

bench: .venv/installed
	$(VENV) benchmarks/bench.py $(BENCH)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --editable ".[test,plot]"
	touch $@

.PHONY: quickstart test bench
