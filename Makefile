# make quickstart   sets up .venv and runs the whole pipeline on the embedded data (quickstart.sh)
# make test         sets up .venv and runs the tests
# make hacking      after quickstart: PPO without the KL penalty, to see the reward model being hacked

PYTHON ?= python3
VENV = .venv/bin/python

quickstart: .venv/installed
	PYTHON=$(VENV) ./quickstart.sh

test: .venv/installed
	$(VENV) -m pytest

hacking: .venv/installed
	$(VENV) train_ppo.py --init out/sft --reward out/rm --beta 0 --out out/ppo-beta0
	$(VENV) -m nanopost.evaluate out/sft out/ppo out/ppo-beta0 --reference out/sft --reward out/rm --gold data/notes/gold.py:score --json out/hacking.json

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --editable ".[test]"
	touch $@

.PHONY: quickstart test hacking
