"""Reinforcement fine-tuning with an exact grader: an example of a reward that is a program, not a model.

    python data/notes/sums.py                                   writes out/sums/train.jsonl and eval.jsonl
    python train_ppo.py --init out/sft --reward data/notes/sums.py:correct --prompts out/sums/train.jsonl \\
        --valid out/sums/eval.jsonl --missing-end-score 0 --out out/ppo-sums
    nanopost evaluate out/sft out/ppo-sums --gold data/notes/sums.py:correct --prompts out/sums/eval.jsonl

A grader reads the prompt and the answer and returns a number; train_ppo.py calls it with whole batches. This one knows
the right result, so unlike a reward model it cannot be wrong. It can still be gamed: look at what it does not check.
"""

import json
import random
import re
from dataclasses import dataclass

from nanopost.config import cli
from prepare import draw
from public import write_files
from world import VERBS, ask

TRAIN, EVAL = 1_000, 200  # different prompts


@dataclass
class Config:
    out: str = "out/sums"  # folder for train.jsonl and eval.jsonl


def result(prompt: str) -> int:
    """The right result of a request that is a sum: its two numbers, and plus or minus or a verb that means it."""
    a, b = map(int, re.findall(r"\d+", prompt))
    words = re.findall(r"[a-z]+", prompt.lower())
    return a + b if "plus" in {VERBS.get(word, word) for word in words} else a - b


def correct(prompts: list[str], completions: list[str]) -> list[float]:
    """1 for an answer whose last number is the right result, else 0."""
    said = [re.findall(r"\d+", completion) for completion in completions]
    return [float(bool(numbers) and int(numbers[-1]) == result(prompt)) for prompt, numbers in zip(prompts, said)]


def main(config: Config):
    rng = random.Random(0)
    files = {}
    for name, count, evaluation in (("train", TRAIN, False), ("eval", EVAL, True)):
        prompts = {}  # in order, without repetition
        while len(prompts) < count:
            prompts[ask(*draw(rng, "sum", evaluation))] = None
        files[f"{name}.jsonl"] = [json.dumps({"prompt": prompt}) for prompt in prompts]
    write_files(config.out, files)
    for name, lines in files.items():
        print(f"{config.out}/{name}: {len(lines)} prompts")


if __name__ == "__main__":
    cli(main, Config)
