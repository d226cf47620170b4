"""Reinforcement fine-tuning with an exact grader: an example of a reward that is a program, not a model.

    python data/notes/sums.py                                   writes out/sums/train.jsonl and eval.jsonl
    python train_ppo.py --init out/sft --reward data/notes/sums.py:correct --prompts out/sums/train.jsonl \\
        --valid out/sums/eval.jsonl --missing-end-score 0 --out out/ppo-sums
    nanopost evaluate out/sft out/ppo-sums --gold data/notes/sums.py:correct --prompts out/sums/eval.jsonl

A grader reads the prompt and the answer and returns a number; train_ppo.py calls it with whole batches. This one knows
the right result, so unlike a reward model it cannot be wrong. It can still be gamed: look at what it does not check.
"""

import json
import os
import random
import re

from prepare import draw
from world import VERBS, ask

TRAIN, EVAL = 1_000, 200  # different prompts


def result(prompt: str) -> int:
    """The right result of a request that is a sum: its two numbers, and plus or minus or a verb that means it."""
    a, b = map(int, re.findall(r"\d+", prompt))
    words = re.findall(r"[a-z]+", prompt.lower())
    return a + b if "plus" in {VERBS.get(word, word) for word in words} else a - b


def correct(prompts: list[str], completions: list[str]) -> list[float]:
    """1 for an answer whose last number is the right result, else 0."""
    said = [re.findall(r"\d+", completion) for completion in completions]
    return [float(bool(numbers) and int(numbers[-1]) == result(prompt)) for prompt, numbers in zip(prompts, said)]


def main(folder: str = "out/sums"):
    rng = random.Random(0)
    os.makedirs(folder, exist_ok=True)
    for name, count, evaluation in (("train", TRAIN, False), ("eval", EVAL, True)):
        prompts = {}  # in order, without repetition
        while len(prompts) < count:
            prompts[ask(*draw(rng, "sum", evaluation))] = None
        with open(os.path.join(folder, f"{name}.jsonl"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        print(f"{folder}/{name}.jsonl: {count} prompts")


if __name__ == "__main__":
    main()
