"""Where good answers are rare

**Claim.** Where good answers are rare under the model that one starts from, methods that sample anew as they learn, or
push bad answers down, beat the imitation of good ones (Tajwar et al., arXiv 2404.14367). PPO beats DPO there (Xu et
al., arXiv 2404.10719).

The requests are sums of three numbers, and a program knows the result. The SFT model gets about one in seven right.
Every method may have 3,840 answers judged by the program. ReST imitates the right ones, DPO prefers a right one to a
wrong one: both learn from what the SFT model said, four answers to each of 960 requests. PPO and RLOO
(`forks/train_grpo.py`, eight answers to a request) sample as they learn. Best of 16 is chosen by the reward model of
the quickstart. Asked are 200 other sums, five times each.

Next: who learns faster? Give PPO and RLOO `--steps 20`, and the others 320 requests in make().
"""

import json
import os
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample

# isort: split
# data/notes is on the path now
import sums
from nanopost.paired import compare


def make(folders):
    """The requests, in sums/; of four answers to each of 960 a right one in right.jsonl, and pairs.jsonl."""
    sums.main(sums.Config(out=f"{folders.here}/sums"))
    prompts = prompts_of(f"{folders.here}/sums/train.jsonl", 960)
    texts = sample(f"{folders.start}/sft", prompts * 4, folders.seed)["text"]
    with open(f"{folders.here}/right.jsonl", "w") as right, open(f"{folders.here}/pairs.jsonl", "w") as pairs:
        for i, prompt in enumerate(prompts):
            answers = texts[i :: len(prompts)]
            marks = sums.correct([prompt] * 4, answers)
            if 1.0 in marks:
                good = answers[marks.index(1.0)]
                right.write(json.dumps({"prompt": prompt, "completion": good}) + "\n")
                if 0.0 in marks:
                    bad = answers[marks.index(0.0)]
                    pairs.write(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) + "\n")


START = "--init $start/sft --valid '' --seed $seed --out $here/model "
ON_POLICY = START + "--reward data/notes/sums.py:correct --prompts $first/sums/train.jsonl --missing-end-score 0 "
ON_POLICY += "--batch-size 64 --steps 60 --beta 0.02 --lr"
ARMS = {
    "SFT": "ln -s $start/sft $here/model",
    "best of 16": "ln -s $start/sft $here/model; ln -s $start/rm $here/rm",
    "ReST": f"python train_sft.py {START} --data $first/right.jsonl --lr 1e-3 --epochs 4",
    "DPO": f"python train_dpo.py {START} --data $first/pairs.jsonl --beta 0.1 --epochs 4",
    "PPO": f"python train_ppo.py {ON_POLICY} 1e-3",
    "RLOO": f"python forks/train_grpo.py {ON_POLICY} 3e-4 --k 8",
}
COLUMNS = {"right": ("right", "{:.0%}"), "greedy": ("right, greedy", "{:.0%}")}


def measure(folders):
    prompts = prompts_of(f"{folders.first}/sums/eval.jsonl", 200)
    model, judge, P = f"{folders.here}/model", f"{folders.here}/rm", len(prompts)
    if os.path.exists(judge):
        found = sample(model, prompts * 16, folders.seed, reward=judge)
        best = [max(range(i, 16 * P, P), key=lambda row: found["score"][row]) for i in range(P)]
        texts = [found["text"][row] for row in best]
        return {"right": fmean(sums.correct(prompts, texts)), "greedy": None}
    texts = sample(model, prompts * 5, folders.seed)["text"]
    greedy = sample(model, prompts, folders.seed, temperature=0)["text"]
    return {"right": fmean(sums.correct(prompts * 5, texts)), "greedy": fmean(sums.correct(prompts, greedy))}


def judge(results):
    right = {arm: row["right"] for arm, row in results.items()}
    shares = {arm: f"{fmean(values):.0%}" for arm, values in right.items()}
    over_dpo, over_rest = compare(right["DPO"], right["PPO"]), compare(right["ReST"], right["PPO"])
    why = (
        f"SFT gets {shares['SFT']} right, best of 16 {shares['best of 16']}. From equally many judged answers PPO "
        f"learns to get {shares['PPO']}, RLOO {shares['RLOO']}, DPO {shares['DPO']}, ReST {shares['ReST']}. "
    )
    won = [over_dpo["verdict"] == "b", over_rest["verdict"] == "b" and over_rest["difference"] > 0.05]
    if won[0] and not won[1]:
        why += "PPO beats DPO. Imitation (ReST) is not to be told apart from it: few right answers are enough to "
        why += "imitate."
    return (REPLICATES if all(won) else IN_PART if any(won) else NOT_HERE), why


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    dots(left, results, "right", "share right at temperature 1")
    dots(
        right, {arm: row for arm, row in results.items() if None not in row["greedy"]}, "greedy", "share right, greedy"
    )
    for ax in (left, right):
        ax.set_xlim(0, 1)


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw, make=make)
