# make quickstart   sets up .venv and runs the whole pipeline on the embedded data (recipes/quickstart.sh)
# make test         sets up .venv and runs the tests; make test TEST=--slow adds those that take long
# make lint         checks the code with ruff, and that it is formatted (`ruff format` formats it)
# make bench        measures speed and memory; e.g. make bench BENCH="--size trl-small --against trl"
# make torture      kills, crashes, full disks, damaged and malformed files in full (docs/reliability.md)
# make lab          runs all experiments of the lab (lab/README.md), about 45 minutes on two cores
# make results      runs what the documents quote and writes docs/results.md

PYTHON ?= python3
VENV = .venv/bin/python

quickstart: .venv/installed
	PYTHON=$(VENV) recipes/quickstart.sh

test: .venv/installed
	$(VENV) -m pytest -n auto --dist worksteal $(TEST)

lint: .venv/installed
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check

torture: .venv/installed
	$(VENV) -m pytest -n auto tests/torture --torture 20 $(TORTURE)

bench: .venv/installed
	$(VENV) benchmarks/bench.py $(BENCH)

lab: .venv/installed
	$(VENV) -m nanopost lab all $(LAB)

results: .venv/installed
	$(VENV) -m pip install --quiet --editable ".[hf]"
	$(VENV) docs/results.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --editable ".[test,plot,dev]"
	touch $@

.PHONY: quickstart test lint torture bench lab results
