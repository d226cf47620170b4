"""Where the KL penalty stands

**Claim.** The KL is estimated from an answer's log-ratio r = log(pi / pi_ref): k1 = r, k2 = r^2 / 2, k3 = e^-r - 1 + r
(Schulman, joschu.net/blog/kl-approx.html). As a loss the three do not act alike. k1 has an expected gradient of 0 and
holds nothing. k2 has the gradient of the KL, as k1 has in the reward. k3, which is GRPO's (Shao et al., arXiv
2402.03300), has that of the KL in the other direction.

`forks/train_grpo.py` runs for 16 iterations with beta 0.1 and the penalty in each of these places. k1 as a loss is
planted by `sed`; nobody should want it, but it stands in published code. Without a penalty is the same with beta 0.

Next: does k3 hold where k1 in the reward does? Give it three times the weight, `--beta 0.3`.
"""

import math
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample
from nanopost.paired import compare

RUN = "--init $start/sft --reward $start/rm --valid '' --seed $seed --out $here/model --batch-size 64 --steps 16 "
RUN += "--warmup 2 --beta "
PLANT = r"""
sed 's/torch.expm1(-k1) + k1/k1/' forks/train_grpo.py > $here/script.py
if cmp -s forks/train_grpo.py $here/script.py; then echo "sed has changed nothing"; exit 1; fi
python $here/script.py --kl k3 """
ARMS = {
    "without a penalty": f"python forks/train_grpo.py {RUN} 0",
    "k1 as a loss": f"{PLANT} {RUN} 0.1",
    "k3 as a loss": f"python forks/train_grpo.py --kl k3 {RUN} 0.1",
    "k2 as a loss": f"python forks/train_grpo.py --kl k2 {RUN} 0.1",
    "k1 in the reward": f"python forks/train_grpo.py {RUN} 0.1",
}
COLUMNS = {"kl": ("KL", "{:.1f}"), "gold": ("gold", "{:.2f}"), "score": ("score", "{:.2f}")}


def measure(folders):
    prompts, start = prompts_of("data/notes/prompts_eval.jsonl", 250), folders.start
    found = sample(f"{folders.here}/model", prompts, folders.seed, reference=f"{start}/sft", reward=f"{start}/rm")
    return {column: fmean(found[column]) for column in COLUMNS}


def judge(results):
    logs = {arm: [math.log(kl) for kl in row["kl"]] for arm, row in results.items()}
    holds = {arm: compare(logs["without a penalty"], values)["verdict"] == "a" for arm, values in logs.items()}
    claims = [not holds["k1 as a loss"], holds["k2 as a loss"] and holds["k1 in the reward"]]
    said = ", ".join(f"{fmean(row['kl']):.1f} {arm}" for arm, row in results.items())
    gold = {arm: row["gold"] for arm, row in results.items()}
    harm = compare(gold["k1 in the reward"], gold["k1 as a loss"])
    why = f"KL at the end: {said}. k1 as a loss has {harm['difference']:+.2f} gold against k1 in the reward."
    return (REPLICATES if all(claims) else IN_PART if any(claims) else NOT_HERE), why


def draw(figure, results):
    left, right = figure.subplots(1, 2, sharey=True)
    dots(left, results, "kl", "KL, in nats per answer (log scale)")
    left.set_xscale("log")
    dots(right, results, "gold", "gold")


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw)
