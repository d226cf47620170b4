"""What is popular becomes the only answer

**Claim.** A model imitates shares, and what is done with it sharpens them: sampled at temperature 1 it uses a phrase as
often as its demonstrations did, and a lower temperature leaves the popular phrase alone. Training on preferences has a
similar effect (RLHF reduces the diversity of answers: Kirk et al., arXiv 2310.06452).

The demonstrations are 3,000 letters, 60% of which end with "Kind regards." and 20% with each of the other two closings.
The gold reward does not care which it is. Measured is the share of the popular one among the closings of the answers to
held-out requests, at three temperatures, and in the best of 16 answers by quickstart's reward model; then again after
DPO on 1,500 pairs of the model's own answers.

Next: is a majority needed? Make all three closings equally frequent with POPULAR, and look at temperature 0.
"""

import json
import random
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample
from gold import read_prompt
from nanopost.paired import compare
from world import ACTS, LETTERS

POPULAR = (0.2, 0.6, 0.2)  # the shares of the closings
CLOSINGS = [closing.capitalize() for closing in ACTS["closing"]]
TEMPERATURES = {"1": 1.0, "0.7": 0.7, "0": 0.0}


def make(folders):
    """The letters: letters.jsonl."""
    rng, letters = random.Random(folders.seed), []
    with open("data/notes/sft_train.jsonl") as f:
        for row in map(json.loads, f):
            ends = [closing for closing in CLOSINGS if row.get("completion", "").endswith(closing)]
            if ends:
                (closing,) = rng.choices(CLOSINGS, POPULAR)
                letters.append(row | {"completion": row["completion"].removesuffix(ends[0]) + closing})
    with open(f"{folders.here}/letters.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rng.sample(letters, 3000))


FIRST = """
python train_sft.py --init $start/base --data $here/letters.jsonl --valid '' --lr 2e-3 --epochs 2 --seed $seed \
    --out $here/sft
"""
ARMS = {
    "SFT": "cp -r $first/sft $here/model",
    "SFT, then DPO": """
python data/notes/annotate.py --policy $first/sft --pairs 1500 --valid-pairs 20 --seed $seed --out $here/prefs
python train_dpo.py --init $first/sft --data $here/prefs/train.jsonl --valid '' --epochs 1 --seed $seed \
    --out $here/model
""",
}
COLUMNS = {f"at {name}": (f"at temperature {name}", "{:.0%}") for name in TEMPERATURES}
COLUMNS |= {"best": ("best of 16", "{:.0%}"), "gold": ("gold", "{:.2f}")}


def share(texts: list[str]) -> float:
    """Of the popular closing among all."""
    counts = [sum(text.endswith(closing) for text in texts) for closing in CLOSINGS]
    return counts[1] / max(sum(counts), 1)


def measure(folders):
    model, seed = f"{folders.here}/model", folders.seed
    prompts = prompts_of("data/notes/prompts_eval.jsonl", 500)
    letters = [prompt for prompt in prompts if read_prompt(prompt)[0] in LETTERS]
    answers = {name: sample(model, letters, seed, temperature=t) for name, t in TEMPERATURES.items()}
    found = {f"at {name}": share(row["text"]) for name, row in answers.items()} | {"gold": fmean(answers["1"]["gold"])}
    pool = sample(model, letters[:60] * 16, seed, reward=f"{folders.start}/rm")
    scored = list(zip(pool["score"], pool["text"]))
    return found | {"best": share([max(scored[i::60])[1] for i in range(60)])}


def judge(results):
    sft, dpo = results.values()
    mean = {column: fmean(values) for column, values in sft.items()}
    imitates = abs(mean["at 1"] - POPULAR[1]) < 0.1
    sharpens = compare(sft["at 1"], sft["at 0"])["verdict"] == "b" and mean["at 0"] > mean["at 0.7"] > mean["at 1"]
    preferred = compare(sft["at 1"], dpo["at 1"])["verdict"] == "b"
    why = (
        f"The popular closing has {POPULAR[1]:.0%} of the demonstrations and {mean['at 1']:.0%} of the SFT model's "
        f"answers at temperature 1, {mean['at 0.7']:.0%} at 0.7 and {mean['at 0']:.0%} at 0, and {mean['best']:.0%} of "
        f"the best of 16. DPO makes {min(dpo['at 1']):.0%} to {max(dpo['at 1']):.0%} of it at temperature 1"
    )
    why += "." if preferred else ": nothing rewards a closing, and each run drifts its own way."
    if not (imitates and sharpens):
        return (IN_PART if imitates or sharpens else NOT_HERE), why
    return (REPLICATES if preferred else IN_PART), why


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    for (arm, row), color in zip(results.items(), ("tab:orange", "tab:blue")):
        for i, shares in enumerate(zip(*(row[f"at {name}"] for name in TEMPERATURES))):
            left.plot(TEMPERATURES.values(), shares, "o-", ms=4, lw=1, color=color, alpha=0.7, label=None if i else arm)
    left.axhline(POPULAR[1], color="black", lw=1, ls="--", label="demonstrations")
    left.set_title("share of the popular closing, by temperature", fontsize=9)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    dots(right, results, "best", "its share among the best of 16")


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw, make=make, first=FIRST)
