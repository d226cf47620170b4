"""SFT over-fits its loss, and what good examples are worth

**Claim.** SFT over-fits: the held-out loss rises after an epoch or a few, yet answers go on getting better (Ouyang et
al., arXiv 2203.02155, section 3.5). A few hundred excellent and diverse demonstrations are worth more than many mixed
ones (LIMA: Zhou et al., arXiv 2305.11206).

The base model learns from 300 demonstrations for 20 epochs, with five looks along the way: at both losses, at gold, at
the share of answers with a wrong name, thing or sum, and at how many of 20 answers to a prompt are distinct. Then every
model sees 3,000 answers: 3,000 mixed demonstrations once, 300 of them ten times, 300 excellent ones (gold of 4.5 or
more) ten times, and 300 excellent ones from three of the twelve families. Quickstart's has seen 20,000 mixed ones.

Next: how few excellent demonstrations do? Change COUNT, and the epochs with it.
"""

import json
import os
import random
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample
from gold import explain, read_prompt, score
from nanopost.checkpoint import load_model
from nanopost.data import load_examples
from nanopost.paired import compare
from train_sft import evaluate

HELD_OUT = "data/notes/sft_valid.jsonl"
COUNT, EPOCH, LOOKS = 300, 19, (2, 4, 8, 12)  # demonstrations; steps of an epoch; epochs of the looks but the last


def make(folders):
    """The demonstrations: many.jsonl, mixed.jsonl, excellent.jsonl and narrow.jsonl."""
    with open("data/notes/sft_train.jsonl") as f:
        rows = [row for row in map(json.loads, f) if "prompt" in row]
    random.Random(folders.seed).shuffle(rows)
    gold = score([row["prompt"] for row in rows], [row["completion"] for row in rows])
    excellent = [row for row, points in zip(rows, gold) if points >= 4.5]
    narrow = [row for row in excellent if read_prompt(row["prompt"])[0] in ("thank", "explain", "sum")]
    for name, kept in {"many": rows, "mixed": rows, "excellent": excellent, "narrow": narrow}.items():
        with open(f"{folders.here}/{name}.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in kept[: 10 * COUNT if name == "many" else COUNT])


TUNE = """cp $first/{}.jsonl $here/data.jsonl; python train_sft.py --init $start/base --valid '' --lr 1e-3 \
--seed $seed --out $here/model --data $here/data.jsonl --epochs """
ARMS = {
    "300 mixed, 20 epochs": TUNE.format("mixed") + f"20 --keep-every {2 * EPOCH}",
    "300 mixed, 10 epochs": TUNE.format("mixed") + "10",
    "3,000 mixed, 1 epoch": TUNE.format("many") + "1",
    "20,000 mixed, quickstart": "cp -r $start/sft $here/model; cp data/notes/sft_train.jsonl $here/data.jsonl",
    "300 excellent, 10 epochs": TUNE.format("excellent") + "10",
    "300 excellent, 3 families": TUNE.format("narrow") + "10",
}
COLUMNS = {"train": ("training loss", "{:.2f}"), "valid": ("held-out loss", "{:.2f}"), "gold": ("gold", "{:.2f}")}
COLUMNS |= {"wrong": ("wrong", "{:.0%}"), "distinct": ("distinct of 20", "{:.1f}")}


def look(folder: str, data: str, seed: int) -> dict[str, float]:
    """What is measured of one model."""
    model, tokenizer = load_model(folder)
    losses = [evaluate(model, load_examples(path, tokenizer, limit=300), "cpu") for path in (data, HELD_OUT)]
    prompts = prompts_of("data/notes/prompts_eval.jsonl", 300)
    answers = sample(folder, prompts, seed)
    parts = [explain(prompt, text) for prompt, text in zip(prompts, answers["text"])]
    wrong = fmean("wrong name" in p or "wrong thing" in p or p.get("result", 0) < 0 for p in parts)
    repeated = sample(folder, prompts[:10] * 20, seed)["text"]
    distinct = fmean(len(set(repeated[i::10])) for i in range(10))
    return dict(zip(COLUMNS, (*losses, fmean(answers["gold"]), wrong, distinct), strict=True))


def measure(folders):
    model, data = f"{folders.here}/model", f"{folders.here}/data.jsonl"
    copies = [f"{model}/step-{EPOCH * epochs}" for epochs in LOOKS]
    looks = [look(path, data, folders.seed) for path in (*copies, model) if os.path.exists(path)]
    return looks[-1] | {f"{column} by epoch": [found[column] for found in looks] for column in COLUMNS}


def judge(results):
    long, *rest = results.values()
    mixed, many, most, excellent, narrow = (row["gold"] for row in rest)
    early = {column: [curve[1] for curve in long[f"{column} by epoch"]] for column in COLUMNS}  # after 4 epochs
    overfits = compare(early["valid"], long["valid"])["verdict"] == "b"
    harmless = compare(early["gold"], long["gold"])["low"] > -0.3
    quality, diversity = (compare(less, excellent)["verdict"] == "b" for less in (most, narrow))
    change = {column: f"{fmean(early[column]):.2f} to {fmean(long[column]):.2f}" for column in COLUMNS}
    why = (
        f"From epoch 4 to 20 the held-out loss goes from {change['valid']}, gold from {change['gold']}, distinct "
        f"answers of 20 from {change['distinct']}. Gold is {fmean(excellent):.2f} after 300 excellent demonstrations; "
        f"{fmean(mixed):.2f}, {fmean(many):.2f} and {fmean(most):.2f} after 300, 3,000 and 20,000 mixed ones, and "
        f"{fmean(narrow):.2f} after 300 excellent ones of three families."
    )
    found = [overfits and harmless, quality, diversity]
    return (REPLICATES if all(found) else IN_PART if any(found) else NOT_HERE), why


def draw(figure, results):
    long, epochs = next(iter(results.values())), [*LOOKS, 20]
    *axes, right = figure.subplots(1, 4)
    for ax, column in zip(axes, ("valid", "gold", "distinct")):
        for curve in long[f"{column} by epoch"]:
            ax.plot(epochs[-len(curve) :], curve, "o-", ms=3, lw=1, alpha=0.7)
        ax.set_xscale("log", base=2)
        ax.set_xticks(epochs, epochs)
        ax.set_title(f"{COLUMNS[column][0]}, by epoch", fontsize=9)
    dots(right, dict(list(results.items())[1:]), "gold", "gold")


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw, make=make)
