"""A simulated annotator: which of two answers of a model is better?

For every prompt, two answers are sampled from the policy and judged by the gold reward g, with the noise of people:

    P(first preferred) = sigma( (g(first) - g(second)) / temperature )                  Bradley-Terry

Each training pair is judged by three annotators, and the majority decides; a held-out pair by one. Every record has
the probability with which one annotator makes this choice. With it, one judgement of a held-out pair is enough:
`nanopost evaluate` computes the share of all judgements that the reward model predicts. Nobody can predict such noisy
labels every time: the best possible accuracy, the Bayes ceiling, is the mean of max(P, 1-P), reached by whoever knows
g. It is printed with the number of pairs.

    python data/notes/annotate.py --policy out/sft --out out/prefs
"""

import json
import math
import os
import random
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/, for public.py
from gold import score
from nanopost.checkpoint import freeze, load_model
from nanopost.config import UserError, at_least, cli
from nanopost.data import load_prompts
from nanopost.device import find_device
from nanopost.reads_prompt import other_prompts, read_families
from nanopost.sampling import sample_text
from public import write_files


@dataclass
class Config:
    policy: str = "out/sft"  # folder of the model whose answers are compared
    prompts: str = "data/notes/prompts_train.jsonl"  # prompts of the training pairs
    valid_prompts: str = "data/notes/prompts_eval.jsonl"  # prompts of the held-out pairs
    out: str = "out/prefs"  # folder for train.jsonl and valid.jsonl
    pairs: int = 10000  # training pairs
    valid_pairs: int = 2000  # held-out pairs
    votes: int = 3  # annotators of each training pair, who vote: an odd number
    temperature: float = 2.0  # noise of the annotator, in points of the gold reward
    contrast: float = 0.0  # share of the training pairs whose second answer belongs to another prompt of the family
    max_new_tokens: int = 80  # longest answer
    seed: int = 0  # seed of the sampling and of the judgements
    device: str = "auto"  # auto, cpu, cuda, mps

    def __post_init__(self):
        at_least(self, 1, "pairs", "valid_pairs", "votes", "max_new_tokens")
        if self.temperature <= 0:
            raise UserError("--temperature must be above 0")
        if self.votes % 2 == 0:
            raise UserError(f"--votes must be odd, not {self.votes}: half of them decide nothing")
        if not 0 <= self.contrast <= 1:
            raise UserError(f"--contrast must be between 0 and 1, not {self.contrast}")


def preference(first: float, second: float, temperature: float) -> float:
    """The probability that the answer with gold reward `first` is preferred (Bradley and Terry 1952)."""
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, (first - second) / temperature))))


def label(prompts, answers, temperature, rng, votes=1):
    """Pairs of answers -> records for train_rm.py and train_dpo.py, as most of `votes` annotators prefer; `probability`
    is that with which a single one makes this choice."""
    firsts = score(prompts, [first for first, _ in answers])
    seconds = score(prompts, [second for _, second in answers])
    for prompt, (first, second), gold_first, gold_second in zip(prompts, answers, firsts, seconds):
        p = preference(gold_first, gold_second, temperature)
        if 2 * sum(rng.random() < p for _ in range(votes)) > votes:
            yield {"prompt": prompt, "chosen": first, "rejected": second, "probability": p}
        else:
            yield {"prompt": prompt, "chosen": second, "rejected": first, "probability": 1 - p}


def usable(a, b) -> bool:
    """Two answers that can be compared: finished, not empty, and different."""
    return a.ended and b.ended and a.text != b.text and bool(a.text.strip() and b.text.strip())


def contrast(kept, families, share, rng):
    """Pairs [(prompt, (first, second)), ...] with `share` of the second answers replaced by the first one to another
    prompt of the family: what only somebody who reads the prompt can tell apart."""
    others = other_prompts([prompt for prompt, _ in kept], families)
    return [
        (prompt, (first, kept[other][1][0] if rng.random() < share else second))
        for (prompt, (first, second)), other in zip(kept, others)
    ]


def annotate(policy, tokenizer, path, wanted, votes, seed, rng, config, share=0.0):
    """The records of one file of prompts: `wanted` pairs of answers, each judged by `votes` annotators; `share` of them
    are for contrast."""
    prompts, ids = load_prompts(path, tokenizer, policy.config.block_size - config.max_new_tokens)
    times = math.ceil(wanted / len(ids))  # more pairs than prompts: some prompts again, with other answers
    prompts, ids = (prompts * times)[:wanted], (ids * times)[:wanted]
    answers = sample_text(policy, tokenizer, ids * 2, config.max_new_tokens, seed=seed)
    both = zip(prompts, answers[:wanted], answers[wanted:])
    kept = [(prompt, (a.text, b.text)) for prompt, a, b in both if usable(a, b)]
    if not kept:
        raise UserError(f"{path}: no pair is left of {wanted}: no two different answers that are finished")
    if share:
        kept = contrast(kept, read_families(path, [prompt for prompt, _ in kept]), share, rng)
        kept = [(prompt, (first, second)) for prompt, (first, second) in kept if first != second]
    prompts, pairs = zip(*kept)
    try:
        records = list(label(prompts, pairs, config.temperature, rng, votes))
    except ValueError as error:
        raise UserError(f"{path}: the gold reward cannot judge it: {error}") from None
    return records, len(kept), wanted - len(kept)


def main(config: Config):
    policy, tokenizer = load_model(config.policy, find_device(config.device))
    freeze(policy)
    rng = random.Random(config.seed)
    os.makedirs(config.out, exist_ok=True)  # first: a folder that cannot be made is noticed before the sampling
    files, report = {}, []
    train = annotate(
        policy, tokenizer, config.prompts, config.pairs, config.votes, config.seed, rng, config, config.contrast
    )
    valid = annotate(policy, tokenizer, config.valid_prompts, config.valid_pairs, 1, config.seed + 1, rng, config)
    for name, (records, kept, dropped) in (("train", train), ("valid", valid)):
        files[f"{name}.jsonl"] = map(json.dumps, records)
        report.append(f"{config.out}/{name}.jsonl: {kept:,} pairs (dropped {dropped} unfinished, empty or equal)")
    ceiling = sum(max(r["probability"], 1 - r["probability"]) for r in records) / len(records)
    report[1] += f"; no reward model can agree with more than {ceiling:.1%} of the judgements of these pairs"
    write_files(config.out, files)
    print("\n".join(report))


if __name__ == "__main__":
    cli(main, Config)
