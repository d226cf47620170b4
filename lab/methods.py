"""The methods side by side

**Claim.** PPO with a good reward model beats DPO (Xu et al., arXiv 2404.10719). RLOO, which has no critic, is no worse
than PPO (Ahmadian et al., arXiv 2402.14740). Best of n earns the same for far less KL (Gao, Schulman and Hilton, arXiv
2210.10760).

All start from the same SFT model. ReST, PPO and RLOO (`forks/train_grpo.py`) sample 2,560 answers and ask the reward
model of the quickstart, for which all its pairs were labelled. DPO learns from 1,280 labelled pairs, which are as many
answers. PPO's critic is a network of its own, as in the quickstart. Best of n trains nothing, and samples n answers to
every request for ever; its KL is an upper bound. Gold is that of answers at temperature 1, greedy that at temperature
0. Distinct: the share of distinct ones among 20 answers to a request. Forgotten: what the loss on documents of
pretraining has risen by, in nats per token. Seconds are those of one thread for training, without the reward model.

Next: is DPO short of labels? Give it all pairs, `--data $start/prefs/train.jsonl --epochs 1`.
"""

from pathlib import Path
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample
from nanopost.checkpoint import load_model
from nanopost.data import load_examples
from nanopost.paired import compare
from nanopost.tools.sample import kl_of_best_of
from train_sft import evaluate

SAME = "--init $start/sft --valid '' --seed $seed --out $here/model"
ON_POLICY = f"{SAME} --reward $start/rm --batch-size 64 --steps 40 --warmup 3"
RM = "ln -s $start/prefs/train.jsonl $here/labels.jsonl"  # the pairs that were labelled
BEST = f"{RM}; ln -s $start/sft $here/model; echo"
ARMS = {
    "SFT": "ln -s $start/sft $here/model",
    "best of 4": f"{BEST} 4 > $here/n",
    "best of 16": f"{BEST} 16 > $here/n",
    "ReST": f"""{RM}
        nanopost sample $start/sft --n 8 --keep best --reward $start/rm --limit 320 --seed $seed --out $here/best.jsonl
        python train_sft.py {SAME} --data $here/best.jsonl --lr 1e-3 --epochs 3""",
    "DPO": f"""
        sed -n "$((1280 * seed + 1)),$((1280 * seed + 1280))p" $start/prefs/train.jsonl > $here/labels.jsonl
        python train_dpo.py {SAME} --data $here/labels.jsonl --beta 0.3 --epochs 2""",
    "PPO": f"{RM}; python train_ppo.py {ON_POLICY} --critic $start/rm",
    "RLOO": f"{RM}; python forks/train_grpo.py {ON_POLICY}",
}
COLUMNS = {"gold": ("gold", "{:.2f}"), "greedy": ("greedy", "{:.2f}"), "kl": ("KL", "{:.2f}")}
COLUMNS |= {"distinct": ("distinct", "{:.0%}"), "forgotten": ("forgotten", "{:.2f}")}
COLUMNS |= {"labels": ("labels", "{:,.0f}"), "cost": ("seconds", "{:.0f}")}


def ask(folders, prompts, n, **options):
    """sample() of the run's model; with n > 1, the best of n by the reward model."""
    model, P = f"{folders.here}/model", len(prompts)
    if n == 1:
        return sample(model, prompts, folders.seed, **options)
    found = sample(model, prompts * n, folders.seed, reward=f"{folders.start}/rm")
    best = [max(range(i, n * P, P), key=lambda row: found["score"][row]) for i in range(P)]
    return {name: [values[row] for row in best] for name, values in found.items()} | {"kl": [kl_of_best_of(n)]}


def forgotten(model, start):
    losses = []
    for name in (f"{start}/base", model):
        policy, tokenizer = load_model(name)
        losses.append(evaluate(policy, load_examples("data/notes/base_valid.jsonl", tokenizer, limit=200), "cpu"))
    return losses[1] - losses[0]


def measure(folders):
    here, prompts = Path(folders.here), prompts_of("data/notes/prompts_eval.jsonl", 300)
    n = int((here / "n").read_text()) if (here / "n").exists() else 1
    labels = (here / "labels.jsonl").read_text().splitlines() if (here / "labels.jsonl").exists() else []
    found = ask(folders, prompts, n, reference=f"{folders.start}/sft")
    texts = ask(folders, prompts[:20] * 20, n)["text"]
    greedy = sample(f"{folders.here}/model", prompts, folders.seed, temperature=0)["gold"] if n == 1 else None
    return {
        "gold": fmean(found["gold"]),
        "greedy": greedy and fmean(greedy),
        "kl": fmean(found["kl"]),
        "distinct": fmean(len(set(texts[i::20])) / 20 for i in range(20)),
        "forgotten": forgotten(f"{folders.here}/model", folders.start),
        "labels": len(labels),
        "cost": float((here / "seconds").read_text()),
    }


def judge(results):
    gold = {arm: row["gold"] for arm, row in results.items()}
    over_dpo, critic = compare(gold["DPO"], gold["PPO"]), compare(gold["RLOO"], gold["PPO"])
    over_best = compare(gold["best of 16"], gold["PPO"])
    pairs = {arm: f"{fmean(results[arm]['labels']):,.0f}" for arm in ("DPO", "PPO")}
    claims = [over_dpo["verdict"] == "b", critic["difference"] < 0.3, over_best["difference"] < 0.3]
    why = (
        f"PPO has {over_dpo['difference']:+.2f} gold over DPO ({over_dpo['low']:+.2f} to {over_dpo['high']:+.2f}; "
        f"{pairs['PPO']} labels against {pairs['DPO']}), "
        f"{critic['difference']:+.2f} over RLOO ({critic['low']:+.2f} to {critic['high']:+.2f}) and "
        f"{over_best['difference']:+.2f} over best of 16 ({over_best['low']:+.2f} to {over_best['high']:+.2f}), which "
        f"has a KL of at most {fmean(results['best of 16']['kl']):.1f} nats against {fmean(results['PPO']['kl']):.1f}. "
        "What PPO buys is that one answer is enough afterwards."
    )
    return (REPLICATES if all(claims) else IN_PART if any(claims) else NOT_HERE), why


def draw(figure, results):
    for ax, column in zip(figure.subplots(1, 3, sharey=True), ("gold", "kl", "distinct"), strict=True):
        dots(ax, results, column, COLUMNS[column][0])


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw)
