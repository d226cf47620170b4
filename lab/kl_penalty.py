"""What the KL penalty is for

**Claim.** Without a KL penalty PPO ends up pleasing the reward model and nobody else. The penalty prevents that, but at
equal KL it has no more of the true reward: it acts like stopping early (Gao, Schulman and Hilton, arXiv 2210.10760).

PPO runs with beta 0, 0.03, 0.1 and 0.3, for equally many iterations. Copies of the model are kept on the way. Each
answers 200 held-out prompts, and the answers are judged by the gold reward and by the reward model that PPO was trained
on. Equal steps: compare the ends. Equal KL: compare the end of a run with the run without a penalty, where that one
passed the same KL. If a penalty only stops early, the two are alike.

Next: is it that the run with a penalty spends more iterations at its KL? Give beta 0 a fifth of the learning rate,
`--lr 1e-4`.
"""

from pathlib import Path
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, prompts_of, sample
from nanopost.paired import compare, value_at

RUN = "python train_ppo.py --init $start/sft --reward $start/rm --valid '' --seed $seed --out $here/model "
RUN += "--batch-size 64 --steps 20 --warmup 2 "
ARMS = {"beta 0": RUN + "--beta 0 --keep-every 1"}
ARMS |= {f"beta {beta}": RUN + f"--keep-every 4 --beta {beta}" for beta in ("0.03", "0.1", "0.3")}
COLUMNS = {
    "gold": ("gold at the end", "{:.2f}"),
    "score": ("score", "{:.2f}"),
    "kl": ("KL", "{:.2f}"),
    "best": ("best gold on the way", "{:.2f}"),
}


def measure(folders):
    steps = sorted(int(path.name[5:]) for path in Path(folders.here, "model").glob("step-*"))
    copies = [f"{folders.here}/model/step-{step}" for step in steps if step <= 8 or step % 4 == 0]
    curve = {"gold": [], "score": [], "kl": []}
    for model in [f"{folders.start}/sft", *copies]:
        found = sample(
            model,
            prompts_of("data/notes/prompts_eval.jsonl", 200),
            folders.seed,
            reference=f"{folders.start}/sft",
            reward=f"{folders.start}/rm",
        )
        for name, values in curve.items():
            values.append(fmean(found[name]))
    ends = {name: values[-1] for name, values in curve.items()}
    return ends | {"best": max(curve["gold"])} | {f"{name}s": values for name, values in curve.items()}


def judge(results):
    free, _, right, strong = results.values()
    curves = [list(zip(kls, golds)) for kls, golds in zip(free["kls"], free["golds"])]
    gain = compare([value_at(curve, kl) for curve, kl in zip(curves, right["kl"])], right["gold"])
    why = (
        f"Without a penalty gold falls from {fmean(free['best']):.2f} at its best to {fmean(free['gold']):.2f}, while "
        f"the score rises to {fmean(free['score']):.2f}; beta 0.1 ends at {fmean(right['gold']):.2f}, beta 0.3 at "
        f"{fmean(strong['gold']):.2f}. At equal KL, {fmean(right['kl']):.1f} nats, beta 0.1 has "
        f"{gain['difference']:+.2f} gold over beta 0 ({gain['low']:+.2f} to {gain['high']:+.2f}). "
    )
    saved = compare(free["gold"], right["gold"])["verdict"] == "b" and fmean(free["score"]) > fmean(right["score"])
    if gain["verdict"] == "b":
        why += "The penalty does more than stop early: it holds the KL while the policy goes on learning."
    elif gain["high"] < 0.5:  # points of gold
        why += "That is no more than stopping early would give."
        return (REPLICATES if saved else NOT_HERE), why
    else:
        why += "Whether the penalty does more than stop early, so few seeds do not tell."
    return (IN_PART if saved else NOT_HERE), why


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    for ax in (left, right):
        ax.set_xscale("function", functions=(lambda kl: abs(kl) ** 0.5, lambda root: root**2))
        ax.set_xlabel("KL to the SFT model, nats per answer (root scale)", fontsize=8)
        ax.grid(alpha=0.3)
    for color, row in enumerate(results.values()):
        for kls, golds, scores in zip(row["kls"], row["golds"], row["scores"]):
            for ax in (left, right):
                ax.plot(kls, golds, color=f"C{color}", lw=1.2, marker=".", ms=5)
            left.plot(kls, scores, color=f"C{color}", lw=1, ls="--")
    end = max(max(kls) for row in results.values() for kls in row["kls"])
    left.set(xticks=[0, *(4**i for i in range(5) if 4**i < end)], xlim=(0, 1.05 * end), ylim=(-5, 5))
    left.set_title("gold (solid), score (dashed)", fontsize=9)
    right.set(xlim=(0, 8), ylim=(0.5, 3.5), xticks=[0, 1, 2, 4, 6, 8])
    right.set_title("gold, the beginning enlarged", fontsize=9)
    left.legend(right.lines[:: len(row["kls"])], results, fontsize=8, loc="lower left")


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw)
