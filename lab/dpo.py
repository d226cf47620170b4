"""DPO: what beta does, and where the probability goes

**Claim.** A smaller beta moves DPO's policy farther from its reference (Rafailov et al., arXiv 2305.18290). Training
lowers the probability not only of the rejected answers but of the chosen ones as well (Pal et al., arXiv 2402.13228),
and what is lost there may go to answers that mean the opposite (Razin et al., arXiv 2410.08847).

DPO learns from 2,000 pairs of the SFT model's answers, with four values of beta, once for three epochs. Measured is the
change of log-probability of 300 held-out pairs: of the chosen answers, the rejected, and the excellent ones among both.
On average it must fall: over the reference's answers its mean is -KL(pi_ref || pi). What is lost may go to excellent
answers (gold of 4.5 or more), to curt ones, which only leave something out, to rude ones, to garbled ones, with a
sentence that nobody in this world says, or to other faults.

Next: does the learning rate do what beta does? Give beta 1 `--lr 1e-3`.
"""

import json
import random
from itertools import islice
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample
from gold import explain
from nanopost.checkpoint import load_model
from nanopost.data import load_pairs
from nanopost.paired import compare
from train_dpo import reference_logprobs

CLASSES = {"excellent": "tab:green", "curt": "tab:blue", "rude": "tab:red", "garbled": "tab:purple", "faulty": "silver"}


def make(folders):
    """The seed's own pairs: pairs.jsonl."""
    with open(f"{folders.start}/prefs/train.jsonl") as pairs, open(f"{folders.here}/pairs.jsonl", "w") as f:
        f.writelines(random.Random(folders.seed).sample(list(pairs), 2000))


TRAIN = "python train_dpo.py --init $start/sft --data $first/pairs.jsonl --valid '' --seed $seed --out $here/model "
ARMS = {
    "SFT": "cp -r $start/sft $here/model",
    "beta 1": TRAIN + "--beta 1 --epochs 1",
    "beta 0.3": TRAIN + "--beta 0.3 --epochs 1",
    "beta 0.1": TRAIN + "--beta 0.1 --epochs 1",
    "beta 0.03": TRAIN + "--beta 0.03 --epochs 1",
    "beta 0.1, 3 epochs": TRAIN + "--beta 0.1 --epochs 3",
}
COLUMNS = {"gold": ("gold", "{:.2f}"), "kl": ("KL", "{:.2f}"), "chosen": ("log-prob of chosen", "{:.1f}")}
COLUMNS |= {"rejected": ("of rejected", "{:.1f}"), "good": ("of excellent", "{:.1f}")}
COLUMNS |= {name: (name, "{:.0%}") for name in CLASSES}


def class_of(prompt: str, text: str) -> str:
    parts = explain(prompt, text)
    if min(parts.values(), default=0) < 0:
        return "rude" if "rude" in parts else "garbled" if "unknown" in parts else "faulty"
    return "excellent" if sum(parts.values()) >= 4.5 else "curt"


def measure(folders):
    model, reference, held_out = f"{folders.here}/model", f"{folders.start}/sft", f"{folders.start}/prefs/valid.jsonl"
    prompts = prompts_of("data/notes/prompts_eval.jsonl", 500)
    answers = sample(model, prompts, folders.seed, reference=reference)
    classes = [class_of(prompt, text) for prompt, text in zip(prompts, answers["text"])]
    policy, tokenizer = load_model(model)
    pairs = load_pairs(held_out, tokenizer, limit=300)
    change = reference_logprobs(policy, pairs, "cpu") - reference_logprobs(load_model(reference)[0], pairs, "cpu")
    with open(held_out) as f:
        records = [json.loads(line) for line in islice(f, len(pairs))]
    sides = [(record["prompt"], record[side]) for record in records for side in ("chosen", "rejected")]
    good = [x for side, x in zip(sides, change.flatten().tolist()) if class_of(*side) == "excellent"]
    chosen, rejected = change.mean(0).tolist()
    found = {"gold": fmean(answers["gold"]), "kl": fmean(answers["kl"]), "chosen": chosen, "rejected": rejected}
    return found | {"good": fmean(good)} | {name: classes.count(name) / len(classes) for name in CLASSES}


def judge(results):
    means = {arm: {column: fmean(values) for column, values in row.items()} for arm, row in results.items()}
    sft, near, _, one, far, three = means.values()
    shares = {name: f"{sft[name]:.0%}, {one[name]:.0%} and {three[name]:.0%}" for name in CLASSES}
    why = (
        f"From beta 1 to 0.03 the KL grows from {near['kl']:.1f} to {far['kl']:.1f}, gold from {near['gold']:.2f} to "
        f"{far['gold']:.2f}. With beta 0.1 the chosen answers lose {-one['chosen']:.1f} nats in one epoch and "
        f"{-three['chosen']:.1f} in three. Before, after one and after three epochs {shares['excellent']} of the "
        f"answers are excellent, {shares['rude']} rude, {shares['garbled']} garbled"
    )
    farther = compare(results["beta 1"]["kl"], results["beta 0.03"]["kl"])["verdict"] == "b"
    falls = compare(results["SFT"]["chosen"], results["beta 0.1, 3 epochs"]["chosen"])["verdict"] == "a"
    opposite = compare(results["SFT"]["rude"], results["beta 0.1, 3 epochs"]["rude"])["verdict"] == "b"
    if falls and one["excellent"] > sft["excellent"] and three["garbled"] > 2 * one["garbled"] and not opposite:
        why += (
            ": the probability goes to better answers, then to sentences that nobody has shown, and not to the opposite"
        )
    found = [farther, falls, opposite]
    return (REPLICATES if all(found) else IN_PART if any(found) else NOT_HERE), why + "."


def draw(figure, results):
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 5))
    for arm, row in results.items():
        left.plot(row["kl"], row["gold"], "o", ms=5, alpha=0.7, label=arm)
    left.set_title("gold against KL", fontsize=9)
    left.legend(fontsize=7, handlelength=1)
    for column, color in {"chosen": "tab:blue", "rejected": "tab:red", "good": "tab:green"}.items():
        dots(middle, results, column, "change of log-probability", color, COLUMNS[column][0].split()[-1])
    for column, color in CLASSES.items():
        dots(right, results, column, "share of the samples", color, column)
    right.set_yticklabels([])
    for ax in (middle, right):
        ax.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.1), handlelength=0, columnspacing=1)


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw, make=make)
