"""Best of n: too much of a good thing

**Claim.** Keep the best of n answers by a reward model. As n grows the true reward rises by d (alpha - beta d), d being
the root of the KL, and falls in the end. More pairs for the reward model help (Gao, Schulman and Hilton, arXiv
2210.10760). Where several reward models must agree it does not fall (Coste et al., arXiv 2310.02743).

The SFT model answers 32 held-out prompts 256 times each, other prompts for every seed. Reward models of 150, 1,000 and
10,000 pairs rank the answers, and so does the lowest score of three that saw the same 150 pairs. The gold of the best
of n follows from the ranks, exactly. Its KL is at most log n - (n - 1)/n (Beirami et al., arXiv 2401.01879).

Next: does agreement help more where the models differ more? Give each of the three its own 150 pairs.
"""

import json
from itertools import groupby
from math import comb
from pathlib import Path
from statistics import fmean

import torch

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct
from nanopost.checkpoint import load_model
from nanopost.data import load_examples
from nanopost.paired import compare
from nanopost.reward import score_examples
from nanopost.tools.sample import kl_of_best_of

NS = [2**i for i in range(9)]
ROOTS = [kl_of_best_of(n) ** 0.5 for n in NS]
TRAIN = "python train_rm.py --init $start/sft --valid '' --data $here/pairs.jsonl --out $here/"
FIRST = f"""
sed -n "$((32 * seed + 1)),$((32 * seed + 32))p" data/notes/prompts_eval.jsonl > $here/prompts.jsonl
nanopost sample $start/sft --prompts $here/prompts.jsonl --n 256 --gold data/notes/gold.py:score --seed $seed \\
    --out $here/pool.jsonl
sed -n "$((1000 * seed + 1)),$((1000 * seed + 150))p" $start/prefs/train.jsonl > $here/pairs.jsonl
for i in 1 2 3; do {TRAIN}small$i --epochs 4 --seed $((3 * seed + i)); done
sed -n "$((1000 * seed + 1)),$((1000 * seed + 1000))p" $start/prefs/train.jsonl > $here/pairs.jsonl
{TRAIN}middle --epochs 1 --seed $seed
"""
ARMS = {
    "150 pairs": "ln -s $first/small1 $here/rm1",
    "150 pairs, lowest of 3": "for i in 1 2 3; do ln -s $first/small$i $here/rm$i; done",
    "1,000 pairs": "ln -s $first/middle $here/rm1",
    "10,000 pairs": "ln -s $start/rm $here/rm1",
    "the gold reward": "true",
}
COLUMNS = {f"n={n}": (f"n = {n}", "{:.2f}") for n in (1, 4, 16, 64, 256)}  # gold


def best_of(values, scores, prompts):
    """The mean value of the best of n by score, for each of NS; prompts: the rows of each. The answer of rank i, from
    the lowest, is the best of n if it is among them and the n - 1 others are among the i below it."""
    curves = []
    for rows in prompts:
        ranked = [values[row] for row in sorted(rows, key=lambda row: scores[row])]
        N = len(ranked)  # 256, less those that did not end
        curves.append([sum(comb(i, n - 1) / comb(N, n) * ranked[i] for i in range(N)) for n in [min(n, N) for n in NS]])
    return [fmean(column) for column in zip(*curves)]


def fit(golds, bend=lambda d: d):
    """d (alpha - beta bend(d)) above the start, fitted to the gold of the best of NS by least squares."""
    d = torch.tensor(ROOTS[1:])
    terms = torch.stack([d, -d * bend(d)], dim=1)
    alpha_beta = torch.linalg.lstsq(terms, torch.tensor(golds[1:])[:, None] - golds[0]).solution
    return [golds[0], *(golds[0] + (terms @ alpha_beta)[:, 0]).tolist()]


def measure(folders):
    _, tokenizer = load_model(f"{folders.start}/sft")
    answers = load_examples(f"{folders.first}/pool.jsonl", tokenizer)
    records = [json.loads(line) for line in Path(folders.first, "pool.jsonl").read_text().splitlines()]
    gold = scores = [record["gold"] for record in records]
    if models := [load_model(str(path), reward=True)[0] for path in Path(folders.here).glob("rm*")]:
        scores = torch.stack([score_examples(model, answers) for model in models]).amin(0).tolist()
    prompts = [list(rows) for _, rows in groupby(range(len(records)), key=lambda row: records[row]["prompt"])]
    golds = best_of(gold, scores, prompts)
    return {f"n={n}": x for n, x in zip(NS, golds)} | {"golds": golds}


def judge(results):
    small, lowest, _, large, _ = results.values()
    fall, fall_large = (compare(row["n=64"], row["n=256"]) for row in (small, large))
    more, agree = compare(small["n=64"], large["n=64"]), compare(small["n=256"], lowest["n=256"])
    mean = [fmean(golds) for golds in zip(*large["golds"])]
    off, off_rl = (max(abs(x - y) for x, y in zip(mean, fit(mean, bend))) for bend in (lambda d: d, torch.log))
    why = (
        f"From n = 64 to 256 gold changes by {fall['difference']:+.2f} with the model of 150 pairs and by "
        f"{fall_large['difference']:+.2f} with that of 10,000. The formula fits the latter to {off:.2f}, that for RL, "
        f"d (alpha - beta log d), to {off_rl:.2f}. At n = 64 more pairs are worth {more['difference']:+.2f}; at n = "
        f"256 three models {agree['difference']:+.2f} over one ({agree['low']:+.2f} to {agree['high']:+.2f})."
    )
    claims = [fall["verdict"] == "a", more["verdict"] == "b", agree["verdict"] == "b"]
    if not claims[0]:
        why += (
            f" Whether gold falls or only levels off is open: {fall['low']:+.2f} to {fall['high']:+.2f} for 150 pairs."
        )
    return (REPLICATES if all(claims) else IN_PART if any(claims) else NOT_HERE), why


def draw(figure, results):
    ax = figure.subplots()
    for color, (arm, row) in enumerate(results.items()):
        ax.plot(ROOTS, fit([fmean(golds) for golds in zip(*row["golds"])]), f"C{color}", label=arm)
        ax.plot(ROOTS, list(zip(*row["golds"])), f".C{color}", ms=5)
    ax.set(xlabel="root of the KL; n = 1, 2, 4, ... 256", ylabel="gold", title="every seed, and Gao's formula")
    ax.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right")


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw, first=FIRST)
