"""Does a reward read the prompt? The same answer, graded under its own prompt and under another one.

A reward model learns from pairs of answers to one prompt, and may learn only what a good answer looks like. Then any
well-written answer is a good answer to anything. docs/faq.md says what that costs and how to mend it.
"""

import json
import random

import torch

from nanopost.data import Example
from nanopost.records import read_records


def wins(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """1 where ours is higher, 0 where theirs is, 1/2 for a tie: (N,), (N,) -> (N,)."""
    return 0.5 + 0.5 * (ours.float() - theirs.float()).sign()  # in fp32 differences by rounding are ties


def read_families(path: str, prompts: list) -> list[str | None]:
    """The `family` of each prompt in its file; None where that is missing, or no text."""
    wanted, families = {json.dumps(prompt) for prompt in prompts}, {}
    for _, record in read_records(path):
        if len(families) == len(wanted):  # nothing after the last prompt is read
            break
        if (prompt := json.dumps(record.get("prompt"))) in wanted:
            family = record.get("family")
            families.setdefault(prompt, family if isinstance(family, str) else None)
    return [families[json.dumps(prompt)] for prompt in prompts]


def other_prompts(prompts: list, families: list, seed: int = 0) -> list[int]:
    """For each of P prompts the position of a different one: of the same family where it has one, else any.

    The different prompts of a family stand in a circle, in an order that depends on the seed, and each is paired with
    the next. Raises ValueError if all prompts are equal."""
    texts = [json.dumps(prompt) for prompt in prompts]
    if len(set(texts)) < 2:
        raise ValueError("all prompts are equal")
    order = random.Random(seed).sample(range(len(texts)), len(texts))

    def circle(positions) -> dict[str, int]:
        first = {texts[i]: i for i in positions}  # equal prompts stand in it once
        return dict(zip(first, [*first.values()][1:] + [*first.values()][:1]))

    anywhere = circle(order)
    others = [anywhere[text] for text in texts]
    for family in set(families):
        members = [i for i in order if families[i] == family]
        within = circle(members)
        for i in members if len(within) > 1 else []:
            others[i] = within[texts[i]]
    return others


def reads_prompt(score, prompts: list, answers: list[Example], others: list[int]) -> float:
    """The share of N answers with a higher score under their own prompt than under another; a tie is one half.

    score(prompts, answers) -> (N,) is as load_reward returns it; the other prompt of answer i is that of answer
    others[i]."""
    moved = []
    for answer, other in zip(answers, others, strict=True):
        prompt, response = answers[other].prompt, answer.response
        mask = [False] * len(prompt) + [True] * len(response)
        moved.append(Example(prompt + response, mask, answer.text, answer.ended))
    own = score(prompts, answers)  # (N,)
    return wins(own, score([prompts[other] for other in others], moved)).mean().item()
