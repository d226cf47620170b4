# make quickstart   sets up .venv and runs the whole pipeline on the embedded data (quickstart.sh)
# make test         sets up .venv and runs the tests

PYTHON ?= python3
VENV = .venv/bin/python

quickstart: .venv/installed
	PYTHON=$(VENV) ./quickstart.sh

test: .venv/installed
	$(VENV) -m pytest

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --editable ".[test,plot]"
	touch $@

.PHONY: quickstart test
