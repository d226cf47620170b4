"""A simulated annotator: which of two answers of a model is better?

For every prompt, two answers are sampled from the policy and judged by the gold reward g, with the noise of people:

    P(first preferred) = sigma( (g(first) - g(second)) / temperature )                  Bradley-Terry

No one who learns from such labels can predict them always: the best possible accuracy, the Bayes ceiling, is the mean
of max(P, 1-P), reached by whoever knows g. It is printed for the held-out pairs, next to the figures of the labels.

    python data/notes/annotate.py --policy out/sft --out out/prefs
"""

import json
import math
import os
import random
from dataclasses import dataclass

from gold import score

from nanopost.checkpoint import atomic, freeze, load_model
from nanopost.config import UserError, cli
from nanopost.data import load_prompts
from nanopost.run import find_device
from nanopost.sampling import sample_text


@dataclass
class Config:
    policy: str = "out/sft"  # the folder of the model whose answers are compared
    prompts: str = "data/notes/prompts_train.jsonl"  # prompts of the training pairs
    valid_prompts: str = "data/notes/prompts_eval.jsonl"  # prompts of the held-out pairs
    out: str = "out/prefs"  # folder for train.jsonl and valid.jsonl
    pairs: int = 10000  # training pairs
    valid_pairs: int = 2000  # held-out pairs
    annotators: int = 16  # judgements of each held-out pair: a steadier measure for no more sampling
    temperature: float = 3.0  # of the annotator, in points of the gold reward: higher is noisier
    max_new_tokens: int = 80  # longest answer
    seed: int = 0  # of the sampling and of the judgements
    device: str = "auto"  # auto, cpu, cuda, mps


def preference(first: float, second: float, temperature: float) -> float:
    """The probability that the answer with gold reward `first` is preferred (Bradley and Terry 1952)."""
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, (first - second) / temperature))))


def label(prompts, answers, temperature, rng):
    """Pairs of answers -> records for train_rm.py and train_dpo.py; `probability` is that of the choice made."""
    gold = [score(prompts, [pair[side] for pair in answers]) for side in (0, 1)]
    for prompt, pair, first, second in zip(prompts, answers, *gold):
        p = preference(first, second, temperature)
        winner = 0 if rng.random() < p else 1
        yield {"prompt": prompt, "chosen": pair[winner], "rejected": pair[1 - winner],
               "probability": p if winner == 0 else 1 - p}


def main(config: Config):
    if config.temperature <= 0:
        raise UserError("--temperature must be above 0")
    policy, tokenizer = load_model(config.policy, find_device(config.device))
    freeze(policy)
    room, rng = policy.config.block_size - config.max_new_tokens, random.Random(config.seed)
    os.makedirs(config.out, exist_ok=True)
    for name, path, wanted, annotators in (("train", config.prompts, config.pairs, 1),
                                           ("valid", config.valid_prompts, config.valid_pairs, config.annotators)):
        prompts, ids = load_prompts(path, tokenizer, room)
        rounds = -(-wanted // len(ids))  # more pairs than prompts: some prompts again, with other answers
        prompts, ids = (prompts * rounds)[:wanted], (ids * rounds)[:wanted]
        samples = sample_text(policy, tokenizer, ids * 2, config.max_new_tokens, seed=config.seed + (name == "valid"))
        both = list(zip(prompts, samples[: len(ids)], samples[len(ids) :]))
        kept = [(prompt, a["text"], b["text"]) for prompt, a, b in both
                if a["ended"] and b["ended"] and a["text"] != b["text"] and a["text"].strip() and b["text"].strip()]
        asked, pairs = [k[0] for k in kept], [k[1:] for k in kept]
        records = [r for _ in range(annotators) for r in label(asked, pairs, config.temperature, rng)]
        if not records:
            raise UserError(f"{path}: no pair is left of {len(both)}: no two different answers that are finished")
        with atomic(os.path.join(config.out, f"{name}.jsonl")) as f:
            f.writelines(json.dumps(record) + "\n" for record in records)
        ceiling = sum(max(r["probability"], 1 - r["probability"]) for r in records) / len(records)
        print(f"{config.out}/{name}.jsonl: {len(records):,} judgements of {len(kept):,} pairs (dropped "
              f"{len(both) - len(kept)} unfinished, empty or equal); no reward model can agree with more than "
              f"{ceiling:.1%} of such judgements")


if __name__ == "__main__":
    cli(main, Config)
