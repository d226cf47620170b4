"""Forgetting, and pretraining documents against it

**Claim.** Alignment has its tax: the aligned model is worse at what it learned before. Pretraining data mixed into the
training reduce the tax and cost little (Ouyang et al., arXiv 2203.02155, where they are mixed into PPO).

What was learned before are the base model's documents: letters, stories, facts and sums. The first four rows are the
loss on held-out documents of quickstart's own models, of a single seed. Then, for each seed, the base model learns from
3,000 demonstrations twice, without documents and with 300 of them among the records, and PPO goes on for 15 iterations
from the second model. The loss on held-out demonstrations and gold say what the documents cost.

Next: how few documents do? Change DOCUMENTS.
"""

import random
from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample
from nanopost.checkpoint import load_model
from nanopost.data import load_examples
from nanopost.paired import compare
from train_sft import evaluate

RECORDS, DOCUMENTS = 3000, 300


def make(folders):
    """The records: alone.jsonl, and mixed.jsonl with documents among them."""
    rng = random.Random(folders.seed)
    with open("data/notes/sft_train.jsonl") as records, open("data/notes/base_train.jsonl") as documents:
        alone, extra = rng.sample(list(records), RECORDS), rng.sample(list(documents), DOCUMENTS)
    for name, lines in {"alone": alone, "mixed": alone + extra}.items():
        with open(f"{folders.here}/{name}.jsonl", "w") as f:
            f.writelines(lines)


TUNE = "python train_sft.py --init $start/base --valid '' --lr 2e-3 --epochs 2 --seed $seed "
FIRST = f"""
{TUNE} --data $here/alone.jsonl --out $here/sft-alone
{TUNE} --data $here/mixed.jsonl --out $here/sft-mixed
"""
ARMS = {
    "base": "cp -r $start/base $here/model",
    "SFT, of quickstart": "cp -r $start/sft $here/model",
    "DPO, of quickstart": "cp -r $start/dpo $here/model",
    "PPO, of quickstart": "cp -r $start/ppo $here/model",
    "SFT": "cp -r $first/sft-alone $here/model",
    "SFT with documents": "cp -r $first/sft-mixed $here/model",
    "SFT with documents, then PPO": "python train_ppo.py --init $first/sft-mixed --reward $start/rm --valid '' "
    "--steps 15 --seed $seed --out $here/model",
}
COLUMNS = {
    "documents": ("loss on documents", "{:.2f}"),
    "records": ("loss on demonstrations", "{:.2f}"),
    "gold": ("gold", "{:.2f}"),
}


def measure(folders):
    model, tokenizer = load_model(f"{folders.here}/model")

    def loss(path):
        return evaluate(model, load_examples(f"data/notes/{path}.jsonl", tokenizer, limit=300), "cpu")

    answers = sample(f"{folders.here}/model", prompts_of("data/notes/prompts_eval.jsonl", 500), folders.seed)
    return {"documents": loss("base_valid"), "records": loss("sft_valid"), "gold": fmean(answers["gold"])}


def judge(results):
    base, _, _, _, alone, mixed, _ = results.values()
    forgotten = compare(base["documents"], alone["documents"])["verdict"] == "b"
    cure = compare(mixed["documents"], alone["documents"])["verdict"] == "b"
    cost = compare(alone["records"], mixed["records"])
    cheap = cost["high"] < 0.05 and compare(alone["gold"], mixed["gold"])["verdict"] != "a"
    loss = [f"{fmean(row['documents']):.2f}" for row in results.values()]
    why = (
        f"SFT takes the loss on documents from {loss[0]} to {loss[4]}, with documents among the records to {loss[5]}. "
        f"They cost {cost['difference']:+.3f} of loss on demonstrations, and gold is {fmean(mixed['gold']):.2f}, not "
        f"{fmean(alone['gold']):.2f}. PPO after it ends at {loss[6]}. Of quickstart's models SFT has {loss[1]}, DPO "
        f"{loss[2]} and PPO {loss[3]}"
    )
    sft, *later = (fmean(row["documents"]) for row in list(results.values())[1:4])
    why += ": it is SFT that forgets." if max(later) - sft < (sft - fmean(base["documents"])) / 4 else "."
    if not forgotten:
        return NOT_HERE, why
    return (REPLICATES if cure and cheap else IN_PART), why


def draw(figure, results):
    left, middle, right = figure.subplots(1, 3, sharey=True)
    dots(left, results, "documents", "loss on documents")
    dots(middle, results, "records", "loss on demonstrations")
    dots(right, results, "gold", "gold")


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw, make=make, first=FIRST)
