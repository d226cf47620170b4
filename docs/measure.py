"""Measures what docs/faq.md says about the models of a quickstart and their logs do not.

    python docs/measure.py out --json measured.json

It also counts the defects of the demonstrations in data/notes.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "data", "notes")]
import gold  # noqa: E402
from nanopost.checkpoint import freeze, load_model  # noqa: E402
from nanopost.config import cli  # noqa: E402
from nanopost.data import Batch, collate, load_examples, load_pairs, load_prompts  # noqa: E402
from nanopost.files import atomic  # noqa: E402
from nanopost.records import read_records  # noqa: E402
from nanopost.reward import score_examples  # noqa: E402
from nanopost.sampling import generate, sample_text  # noqa: E402
from nanopost.tools.evaluate import sequence_logprobs  # noqa: E402
from train_ppo import token_rewards  # noqa: E402

STAGES = ("base", "sft", "dpo", "ppo", "ppo-beta0")
NEW_TOKENS = 80
BETA = 0.15  # of quickstart's PPO
PROMPTS = "data/notes/prompts_eval.jsonl"
EXAMPLES = (  # of the kind that every text on the subject uses
    "Write a polite email declining an invitation.",
    "Explain quantum computing to a 10-year-old.",
    "Summarise the following article: one day Rosa was at the market. It was raining. There Rosa found a coin.",
    "Write a rude note to Ben about the lamp.",
)


@dataclass
class Config:
    folder: str  # where quickstart.sh left its runs
    json: str = "measured.json"  # file to write


def log_ratios(policy, reference, batch: Batch) -> torch.Tensor:
    """log pi - log pi_ref of every sampled token, (B, T-1) in nats, by full forward passes at temperature 1."""
    logprobs, ref = (model.logprobs(model(batch.ids), batch.ids, batch.index) for model in (policy, reference))
    return logprobs - ref


def mean(x: torch.Tensor) -> list[float]:
    """[mean, standard error]"""
    return [x.mean().item(), (x.std() / len(x) ** 0.5).item()]


def loss_tokens(tokenizer) -> dict:
    """What the loss is on, in the held-out demonstrations."""
    batch = collate(load_examples("data/notes/sft_valid.jsonl", tokenizer))
    ends = int(((batch.ids[:, 1:] == tokenizer.end) & batch.mask).sum())
    return {"targets": batch.targets, "tokens": int(batch.lengths.sum()), "ends": ends}


def kl_estimates(policy, reference, sample) -> dict:
    """Estimates of the KL from samples of the policy, and from samples that are not the policy's."""
    batch = sample(policy)
    tokens = log_ratios(policy, reference, batch)
    answers = tokens.sum(1)
    return {
        "policy": mean(answers),
        "negative_answers": (answers < 0).float().mean().item(),
        "negative_tokens": (tokens[batch.mask] < 0).float().mean().item(),
        "lowest": answers.min().item(),
        "cold": mean(log_ratios(policy, reference, sample(policy, 0.7)).sum(1)),  # sampled at another temperature
        "reference": mean(log_ratios(policy, reference, sample(reference)).sum(1)),  # sampled from another model
    }


def shortest_answer(policy, reference, reward_model, sample, tokenizer) -> dict:
    """The token rewards of PPO, at the beta of quickstart, for the shortest of the policy's answers."""
    batch = sample(policy)
    k1 = log_ratios(policy, reference, batch)
    scores = reward_model.score(batch.ids, batch.lengths)
    rewards = token_rewards(scores, k1, torch.zeros_like(k1), batch.mask, BETA)
    row = int(batch.mask.sum(1).argmin())
    columns = batch.mask[row].nonzero()[:, 0].tolist()
    tokens = [[rewards[row, t].item(), tokenizer.decode([int(batch.ids[row, t + 1])])] for t in columns]
    total = rewards[row].sum().item()
    return {"tokens": tokens, "score": scores[row].item(), "kl": k1[row].sum().item(), "total": total}


def answer_examples(models: dict, tokenizer, temperature: float) -> list:
    """[prompt, {stage: [gold reward, answer]}] for each of EXAMPLES."""
    ids = [tokenizer.prompt([{"role": "user", "content": prompt}]) for prompt in EXAMPLES]
    rows = [[prompt, {}] for prompt in EXAMPLES]
    for stage, model in models.items():
        answers = sample_text(model, tokenizer, ids, NEW_TOKENS, temperature=temperature, seed=0)
        for row, answer in zip(rows, answers, strict=True):
            row[1][stage] = [gold.score([row[0]], [answer.text])[0], answer.text]
    return rows


def demonstrations() -> dict:
    """How good the demonstrations of data/notes are, by the gold reward and its parts."""
    records = [record for _, record in read_records("data/notes/sft_train.jsonl") if "prompt" in record]
    answers = [(record["prompt"], record["completion"]) for record in records]
    parts = [gold.explain(*answer) for answer in answers]
    families = [gold.read_prompt(prompt)[0] for prompt, _ in answers]
    scores = torch.tensor(gold.score(*zip(*answers, strict=True)))

    def share(condition, among=lambda family: True):
        chosen = [p for p, family in zip(parts, families, strict=True) if among(family)]
        return sum(condition(p) for p in chosen) / len(chosen)

    return {
        "rude": share(lambda p: "rude" in p),
        "filler": share(lambda p: "filler" in p),
        "ending": share(lambda p: "closing" not in p and "kind" not in p, lambda family: family != "summarise"),
        "wrong_name": share(lambda p: "wrong name" in p),
        "wrong_sum": share(lambda p: p.get("result", 0) < 0, lambda family: family == "sum"),
        "gold": scores.mean().item(),
        "deviation": scores.std(correction=0).item(),
        "excellent": (scores >= 4.5).float().mean().item(),
    }


def slips(model, tokenizer, prompts, ids) -> float:
    """The share of answers at temperature 1 with a clause that no template makes: a slip of the pen."""
    answers = sample_text(model, tokenizer, ids, NEW_TOKENS, seed=0)
    return sum("unknown" in gold.explain(prompt, a.text) for prompt, a in zip(prompts, answers, strict=True)) / len(ids)


def unseen(records: list[dict], scores: torch.Tensor) -> dict[str, float]:
    """What these scores of chosen, then rejected answers (2P,) miss of the best possible accuracy, in points (0.01) of
    it: {part of the gold reward: points}, the most first.

    A pair in the wrong order costs what its better answer is preferred more often than its worse one. That goes to the
    parts of the gold reward in which the better answer is better, in proportion.
    """
    chosen, rejected = scores.chunk(2)
    points = Counter()
    for record, agrees in zip(records, (chosen > rejected).tolist(), strict=True):
        p = record["probability"]
        if agrees == (p > 0.5) or p == 0.5:
            continue
        better, worse = (gold.explain(record["prompt"], record[side]) for side in ("chosen", "rejected"))
        if p < 0.5:
            better, worse = worse, better
        ahead = {part: better.get(part, 0) - worse.get(part, 0) for part in {**better, **worse}}
        ahead = {part: x for part, x in ahead.items() if x > 0}
        for part, x in ahead.items():
            points[part] += 100 * abs(2 * p - 1) / len(records) * x / sum(ahead.values())
    return dict(points.most_common())


def gap(reward_model, sft, tokenizer, path: str) -> dict:
    """What the reward model misses on these pairs, and what it would miss if 0.3 of the SFT model's log-probability of
    the answer were added to the reward, both scaled to standard deviation 1."""
    records = [record for _, record in read_records(path)]
    pairs = load_pairs(path, tokenizer, reward_model.config.block_size)
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rewards = score_examples(reward_model, sides).double()
    logprobs = sequence_logprobs(sft, sides)
    mixed = rewards / rewards.std() + 0.3 * logprobs / logprobs.std()
    return {"pairs": len(pairs), "parts": unseen(records, rewards), "with_sft": unseen(records, mixed)}


@torch.no_grad()
def main(config: Config):
    models = {}
    for stage in STAGES:
        model, tokenizer = load_model(os.path.join(config.folder, stage))
        models[stage] = freeze(model)
    reward_model, _ = load_model(os.path.join(config.folder, "rm"), reward=True)
    prompts, ids = load_prompts(PROMPTS, tokenizer, model.config.block_size - NEW_TOKENS)

    def sample(model, temperature=1.0) -> Batch:
        generator = torch.Generator().manual_seed(0)
        options = dict(temperature=temperature, generator=generator, pad=tokenizer.pad)
        return generate(model, ids, NEW_TOKENS, tokenizer.end, **options)

    policy, reference = models["ppo"], models["sft"]
    spoken = {stage: models[stage] for stage in ("sft", "dpo", "ppo")}
    spoken["ppo-trunk"] = freeze(load_model(os.path.join(config.folder, "ppo-trunk"))[0])
    measured = {
        "loss": loss_tokens(tokenizer),
        "kl": kl_estimates(policy, reference, sample),
        "shortest": shortest_answer(policy, reference, reward_model, sample, tokenizer),
        "answers": answer_examples(models, tokenizer, 1.0),
        "greedy_answers": answer_examples(models, tokenizer, 0.0),
        "notes": demonstrations(),
        "slips": {stage: slips(model, tokenizer, prompts, ids) for stage, model in spoken.items()},
        "gap": gap(reward_model, reference, tokenizer, os.path.join(config.folder, "prefs", "valid.jsonl")),
    }
    with atomic(config.json) as f:
        json.dump(measured, f, indent=1)


if __name__ == "__main__":
    cli(main, Config)
