"""Reinforcement fine-tuning with an exact grader: an example of a reward that is a program, not a model.

The requests are sums of three numbers, which the SFT model hardly ever gets right: good answers are rare, so imitation
and best of n find little, and PPO can climb.

    python data/notes/sums.py                                   writes out/sums/train.jsonl and eval.jsonl
    python train_ppo.py --init out/sft --reward data/notes/sums.py:correct --prompts out/sums/train.jsonl \\
        --valid out/sums/eval.jsonl --missing-end-score 0 --beta 0.02 --lr 1e-3 --steps 100 --out out/ppo-sums
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
from world import ask

TRAIN, EVAL = 1_000, 200  # different prompts


@dataclass
class Config:
    out: str = "out/sums"  # folder for train.jsonl and eval.jsonl


def result(prompt: str) -> int:
    """The right result of a request for a sum: that of the numbers in it."""
    return sum(map(int, re.findall(r"\d+", prompt)))


def correct(prompts: list[str], completions: list[str]) -> list[float]:
    """1 for an answer whose last number is the right result, else 0."""
    said = [re.findall(r"\d+", completion) for completion in completions]
    return [float(bool(numbers) and int(numbers[-1]) == result(prompt)) for prompt, numbers in zip(prompts, said)]


def main(config: Config):
    rng = random.Random(0)
    files = {}
    for split, count in (("train", TRAIN), ("eval", EVAL)):
        prompts = {}  # in order, without repetition
        while len(prompts) < count:
            prompts[ask(*draw(rng, "steps", split))] = None
        files[f"{split}.jsonl"] = [json.dumps({"prompt": prompt}) for prompt in prompts]
    write_files(config.out, files)
    for name, lines in files.items():
        print(f"{config.out}/{name}: {len(lines)} prompts")


if __name__ == "__main__":
    cli(main, Config)
