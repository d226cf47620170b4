"""Measures policies on held-out prompts, one row each, with standard errors.

    python -m nanopost.evaluate out/base out/sft out/dpo out/ppo --reference out/sft --reward out/rm \\
        --gold data/notes/gold.py:score --prompts data/notes/prompts_eval.jsonl --pairs out/prefs/valid.jsonl

gold        the mean true reward (what the policy never saw), if there is one
reward      the reward model's mean score (what PPO was trained on)
win_rate    how often the answer beats the reference policy's to the same prompt by gold; a tie is half a win
kl          KL(policy || reference) in nats per answer: the mean of log pi(y|x) - log pi_ref(y|x) over sampled answers
entropy     nats per answer: the mean of -log pi(y|x)
length      tokens per answer, the end token included
ended       share of the answers that end by themselves
distinct    distinct answers / answers
"""

import json
import os
import re
import time
from dataclasses import dataclass

import torch

from nanopost.checkpoint import atomic, freeze, load_model, same_vocabulary
from nanopost.config import UserError, cli
from nanopost.data import Example, collate, load_pairs, load_prompts, read_records, split
from nanopost.reward import call_reward, load_function, load_reward_model, score_samples
from nanopost.run import find_device
from nanopost.sampling import sample_text

COLUMNS = ("gold", "reward", "win_rate", "kl", "entropy", "length", "ended", "distinct")


@dataclass
class Config:
    policies: list[str]  # folders of the models to measure
    reference: str = "out/sft"  # the policy that KL and win rate refer to
    reward: str = ""  # folder of a reward model; empty: no such column
    gold: str = ""  # the true reward as a Python function, file.py:function; empty: no such columns
    prompts: str = "data/notes/prompts_eval.jsonl"  # held-out prompts
    pairs: str = ""  # held-out labelled pairs: the reward model's accuracy on them
    limit: int = 500  # prompts to use at most
    samples: int = 2  # answers a prompt
    max_new_tokens: int = 80  # longest answer
    temperature: float = 1.0  # of the answers; KL and entropy mean what they say at 1
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, mps
    json: str = ""  # file for the report; empty: only the table
    since: float = 0.0  # unix time at which the work to report on began, for its `seconds`; 0: this command's start
    show: int = 3  # prompts to print all answers of


@torch.no_grad()
def sequence_logprobs(model, samples, batch_size=64):
    """log pi(y|x) (N,) in nats, at temperature 1, of samples as sample_text returns them."""
    rows = [Example(s["prompt_ids"] + s["ids"], [False] * len(s["prompt_ids"]) + [True] * len(s["ids"]))
            for s in samples]
    order, out = sorted(range(len(rows)), key=lambda i: len(rows[i].ids)), torch.zeros(len(rows), dtype=torch.float64)
    for part in split(order, batch_size):
        batch = collate([rows[i] for i in part], model.device)
        out[part] = model.logprobs(model(batch.ids), batch.ids, batch.index).cpu().double().sum(1)
    return out


def measure(samples, logprobs, reference_logprobs, rewards=None, gold=None, reference_gold=None) -> dict:
    """Per-answer values (N,) of every column, whose means are the row of the table; logprobs in nats per answer."""
    copies = {}
    for s in samples:
        key = tuple(s["ids"])
        copies[key] = copies.get(key, 0) + 1
    values = {
        "kl": logprobs - reference_logprobs,
        "entropy": -logprobs,
        "length": [len(s["ids"]) for s in samples],
        "ended": [s["ended"] for s in samples],
        "distinct": [1 / copies[tuple(s["ids"])] for s in samples],  # sums to the number of different answers
    }
    if rewards is not None:
        values["reward"] = rewards
    if gold is not None:
        values["gold"] = gold
        wins = torch.tensor(gold) - torch.tensor(reference_gold)
        values["win_rate"] = 0.5 + 0.5 * wins.sign()
    return {name: torch.as_tensor(values[name], dtype=torch.float64) for name in COLUMNS if name in values}


def summary(values: dict[str, torch.Tensor], samples: int = 1) -> dict:
    """{name: mean, name_stderr: standard error}; the values are of all prompts, `samples` times over."""
    row = {}
    for name, x in values.items():
        x = x.view(samples, -1).mean(0)  # answers to the same prompt are alike: one value a prompt
        row[name] = x.mean().item()
        row[f"{name}_stderr"] = (x.std() / len(x) ** 0.5).item() if len(x) > 1 else 0.0
    return row


def table(rows: list[dict]) -> str:
    """A Markdown table: mean ± standard error."""
    names = [name for name in COLUMNS if name in rows[0]]
    percent = {"win_rate", "ended", "distinct"}

    def cell(row, name):
        scale, digits = (100, 1) if name in percent else (1, 1 if name in ("length", "entropy") else 2)
        return f"{scale * row[name]:.{digits}f} ± {scale * row[name + '_stderr']:.{digits}f}" + "%" * (name in percent)

    lines = [["stage", *names], *([row["stage"]] + [cell(row, name) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


@torch.no_grad()
def pair_accuracy(model, tokenizer, path, batch_size=64):
    """(accuracy of the reward model on labelled pairs, best possible accuracy or None).

    The best possible is known where the records carry the `probability` of the label (data/notes/annotate.py).
    """
    pairs = load_pairs(path, tokenizer, model.config.block_size)
    texts = list({tuple(side.ids) for pair in pairs for side in pair})  # a pair may be judged more than once
    rewards = dict(zip(texts, score_samples(model, [{"prompt_ids": [], "ids": list(ids)} for ids in texts]).tolist()))
    right = [rewards[tuple(chosen.ids)] > rewards[tuple(rejected.ids)] for chosen, rejected in pairs]
    probabilities = [record["probability"] for _, record in read_records(path) if "probability" in record]
    ceiling = sum(max(p, 1 - p) for p in probabilities) / len(probabilities) if probabilities else None
    return sum(right) / len(right), ceiling


def main(config: Config):
    started = time.time()
    device = find_device(config.device)
    reference, tokenizer = load_model(config.reference, device)
    freeze(reference)
    models = []
    for folder in config.policies:
        model, other = load_model(folder, device)
        same_vocabulary(tokenizer, other, config.reference, folder)
        models.append(freeze(model))
    block_size = min(model.config.block_size for model in (reference, *models))
    reward_model = None
    if config.reward:
        reward_model = load_reward_model(config.reward, tokenizer, config.reference, block_size, device)
    gold = load_function(config.gold) if config.gold else None
    if config.json and not os.path.isdir(os.path.dirname(config.json) or "."):
        raise UserError(f"--json: there is no folder {os.path.dirname(config.json)}")
    if config.samples < 1 or config.limit < 1:
        raise UserError("--samples and --limit must be at least 1")
    prompts, ids = load_prompts(config.prompts, tokenizer, block_size - config.max_new_tokens)
    accuracy = ceiling = None
    if config.reward and config.pairs:
        accuracy, ceiling = pair_accuracy(reward_model, tokenizer, config.pairs)
    prompts, ids = prompts[: config.limit] * config.samples, ids[: config.limit] * config.samples

    def answer(model, seed):
        return sample_text(model, tokenizer, ids, config.max_new_tokens, temperature=config.temperature, seed=seed)

    def true_reward(samples):
        return call_reward(gold, prompts, [s["text"] for s in samples]) if gold else None

    reference_gold = true_reward(answer(reference, config.seed + 1)) if gold else None
    rows, answers = [], []
    for folder, model in zip(config.policies, models):
        samples = answer(model, config.seed)
        rewards = score_samples(reward_model, samples) if reward_model else None
        values = measure(samples, sequence_logprobs(model, samples), sequence_logprobs(reference, samples), rewards,
                         true_reward(samples), reference_gold)
        parts = os.path.normpath(folder).split(os.sep)
        stage = "/".join(parts[-2:] if re.fullmatch(r"step-\d+", parts[-1]) else parts[-1:])  # ppo/step-10
        rows.append({"stage": stage, **summary(values, config.samples)})
        answers.append((stage, samples, values))

    width = max(8, *(len(row["stage"]) for row in rows))
    for i in range(min(config.show, len(ids))):
        print(f"\n{tokenizer.decode(ids[i])}")
        for stage, samples, values in answers:
            print(f"  {stage:>{width}}" + (f" {values['gold'][i]:+5.2f}" if gold else "") + f"  {samples[i]['text']}")
    print(f"\n{len(ids)} answers to {len(ids) // config.samples} prompts of {config.prompts}\n\n{table(rows)}\n")

    report = {"rows": rows, "gold_max": getattr(gold, "__globals__", {}).get("GOLD_MAX")}
    if accuracy is not None:
        report |= {"rm_accuracy": accuracy, "rm_accuracy_ceiling": ceiling}
        print(f"reward model: accuracy {accuracy:.1%} on {config.pairs}"
              + (f", best possible {ceiling:.1%}" if ceiling else ""))
    report["seconds"] = round(time.time() - (config.since or started), 1)
    print(f"{report['seconds']:.0f} s")
    if config.json:
        with atomic(config.json) as f:
            json.dump(report, f, indent=1)


if __name__ == "__main__":
    cli(main, Config)
