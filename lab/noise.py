"""DPO: flipped labels, foreign pairs, labels that agree

**Claim.** Flipped labels harm DPO (Chowdhury et al., arXiv 2403.00409). Pairs that the policy did not write itself
teach it less (Tajwar et al., arXiv 2404.14367). Where nobody disagrees, DPO's margin between the two answers grows
without end, whatever beta is; IPO's stops at 1/(2 beta) (Azar et al., arXiv 2310.12036).

The labels of 1,000 pairs are made anew from gold, without noise, and a share of them is flipped. Foreign pairs are two
answers to the same requests by the writers of the pretraining documents, more of whom are careful. The last two arms
learn from 200 pairs without noise for ten epochs; after every second one the margin of these pairs is measured.

Next: do more pairs make up for the noise? Change PAIRS.
"""

import json
import os
import random
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample
from gold import read_prompt, score
from nanopost.checkpoint import load_model
from nanopost.data import load_pairs
from nanopost.paired import compare
from prepare import answer
from train_dpo import reference_logprobs

PAIRS, FEW, BETA = 1000, 200, 0.1


def make(folders):
    """The pairs: own.jsonl, flipped-20.jsonl, flipped-40.jsonl, foreign.jsonl and few.jsonl."""
    rng, own, foreign = random.Random(folders.seed), [], []
    with open(f"{folders.start}/prefs/train.jsonl") as f:
        drawn = [json.loads(line) for line in rng.sample(list(f), 2 * PAIRS)]
    for row in drawn:
        prompt = row["prompt"]
        written = [answer(rng, *read_prompt(prompt), "base") for _ in range(2)]
        for rows, texts in ((own, (row["chosen"], row["rejected"])), (foreign, written)):
            (low, worse), (high, better) = sorted(zip(score([prompt] * 2, texts), texts))
            if high > low:
                rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    own, foreign = own[:PAIRS], foreign[:PAIRS]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in own]
    files = {"own": own, "foreign": foreign, "few": own[:FEW]}
    files |= {f"flipped-{n}": swapped[: n * PAIRS // 100] + own[n * PAIRS // 100 :] for n in (20, 40)}
    for name, rows in files.items():
        with open(f"{folders.here}/{name}.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def train(script: str, data: str, options: str) -> str:
    command = f"python {script} --init $start/sft --valid '' --beta {BETA} --seed $seed --out $here/model"
    return f"cp $first/{data}.jsonl $here/data.jsonl; {command} --data $here/data.jsonl {options}"


LONG = "--epochs 10 --keep-every 14"
ARMS = {
    "own pairs": train("train_dpo.py", "own", "--epochs 1"),
    "20% flipped": train("train_dpo.py", "flipped-20", "--epochs 1"),
    "40% flipped": train("train_dpo.py", "flipped-40", "--epochs 1"),
    "foreign pairs": train("train_dpo.py", "foreign", "--epochs 1"),
    "200 pairs, DPO": train("train_dpo.py", "few", LONG),
    "200 pairs, IPO": train("forks/train_ipo.py", "few", LONG),
}
COLUMNS = {"gold": ("gold", "{:.2f}"), "kl": ("KL", "{:.2f}")}


def measure(folders):
    model, reference = f"{folders.here}/model", f"{folders.start}/sft"
    answers = sample(model, prompts_of("data/notes/prompts_eval.jsonl", 300), folders.seed, reference=reference)
    before, tokenizer = load_model(reference)
    pairs = load_pairs(f"{folders.here}/data.jsonl", tokenizer, limit=FEW)
    copies = [f"{model}/step-{steps}" for steps in (14, 28, 42, 56)]
    models = [load_model(folder)[0] for folder in copies if os.path.exists(folder)] + [load_model(model)[0]]
    before = reference_logprobs(before, pairs, "cpu")
    changes = [(reference_logprobs(policy, pairs, "cpu") - before).mean(0).tolist() for policy in models]
    margins = [chosen - rejected for chosen, rejected in changes]
    found = {"gold": fmean(answers["gold"]), "kl": fmean(answers["kl"])}
    return found | {"margin": margins[-1], "margins": margins}


def judge(results):
    own, some, many, foreign, _, _ = (row["gold"] for row in results.values())
    *_, dpo, ipo = results.values()
    harm, less = (compare(worse, own)["verdict"] == "b" for worse in (many, foreign))
    stops = compare(ipo["margin"], dpo["margin"])["verdict"] == "b"
    why = (
        f"Gold is {fmean(own):.2f} without noise, {fmean(some):.2f} with 20% of the labels flipped, {fmean(many):.2f} "
        f"with 40%. Foreign pairs, among which more are excellent, give {fmean(foreign):.2f}. On labels that all agree "
        f"DPO's margin ends at {fmean(dpo['margin']):.1f} (gold {fmean(dpo['gold']):.2f}, KL {fmean(dpo['kl']):.1f}), "
        f"IPO's at {fmean(ipo['margin']):.1f} ({fmean(ipo['gold']):.2f}, {fmean(ipo['kl']):.1f})."
    )
    found = [harm, less, stops]
    return (REPLICATES if all(found) else IN_PART if any(found) else NOT_HERE), why


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    dots(left, results, "gold", "gold")
    for (arm, row), color in zip(list(results.items())[-2:], ("tab:orange", "tab:blue")):
        for i, margins in enumerate(row["margins"]):
            epochs = range(2, 11, 2)[-len(margins) :]
            right.plot(epochs, margins, "o-", ms=3, lw=1, color=color, label=None if i else arm)
    right.axhline(1 / (2 * BETA), color="black", lw=1, ls="--", label="1 / (2 beta)")
    right.legend(fontsize=8, title="margin in nats, by epoch", title_fontsize=8)


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw, make=make)
