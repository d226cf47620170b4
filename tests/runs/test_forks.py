"""The forks, whole: short runs on toy data, and how far they are from the scripts that they were copied from."""

import copy
import difflib
import json
import os
import subprocess
import sys

import pytest
import torch

import train_grpo
from conftest import FORKS, ROOT, Killed, assert_same_tensors, copies, die_after, tensors
from nanopost.checkpoint import load_model
from nanopost.config import flag

PARENTS = {"ipo": ("dpo", 31), "grpo": ("ppo", 217)}  # the fork's parent, and the lines of the diff between them
ABOUT = {  # what a fork is about: a line of the diff holds one of these
    "ipo": ["IPO", "ipo"],
    "grpo": ["GRPO", "grpo"],
}
VOWELS = "reward.py:vowels"
OPTIONS = {
    "published": dict(baseline="group", divide_by_std=True, length_mean=True, kl="k3"),
    "Dr. GRPO": dict(baseline="group"),
    "k2": dict(kl="k2", beta=0.5),
}


def text_of(script) -> list[str]:
    path = ROOT / "forks" / f"train_{script}.py" if script in FORKS else ROOT / f"train_{script}.py"
    return path.read_text(encoding="utf-8").splitlines()


def test_a_fork_is_as_near_to_its_parent_as_it_says():
    for fork, (parent, lines) in PARENTS.items():
        print(fork, [x for x in difflib.unified_diff(text_of(parent), text_of(fork), lineterm="", n=0)].__len__())
