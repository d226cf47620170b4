"""Samples answers to a file of prompts; with a judge, keeps the best. What it writes, train_sft.py reads.

    python -m nanopost.sample out/sft --prompts data/notes/prompts_train.jsonl --out out/samples.jsonl
    python -m nanopost.sample out/sft --n 16 --reward out/rm --keep best --out out/best.jsonl

Best of n samples n answers and keeps the one with the highest score. It needs no training and is the honest baseline of
PPO; its policy has at most log n - (n-1)/n nats of KL to the one it samples from (Stiennon et al., arXiv 2009.01325,
appendix G.3). Fine-tuning on what it keeps is rejection sampling; doing so again and again is ReST (arXiv 2308.08998).
"""

import json
import math
import os
from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanopost.checkpoint import atomic, freeze, load_model
from nanopost.config import UserError, cli
from nanopost.data import load_prompts
from nanopost.reward import load_judge
from nanopost.run import find_device
from nanopost.sampling import sample_text


@dataclass
class Config:
    policy: str  # the folder of a model
    prompts: str = "data/notes/prompts_train.jsonl"  # prompts to answer
    out: str = "out/samples.jsonl"  # file to write: {"prompt", "completion", "logprob", "score"} a line
    n: int = 1  # answers to each prompt
    reward: str = ""  # what scores them: the folder of a reward model, or file.py:function
    keep: str = "all"  # all, or best: of each prompt only the answer with the highest score. Never kept are answers
    # that are empty or do not end
    threshold: float = -math.inf  # only answers with at least this score (ReST raises it from round to round)
    gold: str = ""  # a second judge, file.py:function: its mean is printed and decides nothing
    limit: int = 0  # prompts to use at most; 0: all
    max_new_tokens: int = 80  # longest answer
    temperature: float = 1.0  # of the sampling
    batch_size: int = 512  # answers at a time
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, mps


def best_of(scores: torch.Tensor) -> torch.Tensor:
    """The best of every prompt's n answers: scores (P, n) -> its column (P,), the first of equal ones."""
    return scores.argmax(1)


def kl_of_best_of(n: int) -> float:
    """The most that KL(best of n || policy) can be, in nats per answer (Beirami et al., arXiv 2401.01879). It comes
    close where no answer is likely and no two score the same."""
    return math.log(n) - (n - 1) / n


def main(config: Config):
    if min(config.n, config.max_new_tokens, config.batch_size) < 1 or config.limit < 0 or config.temperature < 0:
        raise UserError("--n, --max-new-tokens, --batch-size must be at least 1, --limit and --temperature at least 0")
    if config.keep not in ("all", "best"):
        raise UserError(f"--keep must be all or best, not {config.keep}")
    if not config.reward and (config.keep == "best" or config.threshold > -math.inf):
        raise UserError("--keep best and --threshold need a judge: give --reward")
    if os.path.isdir(config.out):
        raise UserError(f"--out must be a file; {config.out} is a folder")
    device = find_device(config.device)
    model, tokenizer = load_model(config.policy, device)
    freeze(model)
    block_size = model.config.block_size
    score, gold = (load_judge(spec, tokenizer, config.policy, block_size, device) if spec else None
                   for spec in (config.reward, config.gold))
    prompts, ids = load_prompts(config.prompts, tokenizer, block_size - config.max_new_tokens, config.limit or None)
    os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)

    kept, means, unusable, low = [], {"score": [], "gold": []}, 0, 0
    size = max(1, config.batch_size // config.n)  # prompts at a time
    with atomic(config.out) as f:  # opened now: where nothing can be written, that shows before the sampling
        for start in tqdm(range(0, len(prompts), size), desc="sampling", disable=None):
            some = prompts[start : start + size]
            # every prompt has random numbers of its own: how many are answered at a time changes nothing
            seeds = [config.seed * 1_000_003 + i for i in range(start, start + len(some))]
            noise = [torch.rand(config.n, config.max_new_tokens, generator=torch.Generator().manual_seed(seed))
                     for seed in seeds]  # (n, max_new_tokens) each
            samples = sample_text(model, tokenizer, [i for i in ids[start : start + size] for _ in range(config.n)],
                                  config.max_new_tokens, batch_size=config.batch_size, temperature=config.temperature,
                                  noise=torch.cat(noise))
            asked = [prompt for prompt in some for _ in range(config.n)]
            # train_sft.py would teach an answer without an end one that it never had, and refuses an empty one
            usable = torch.tensor([s["ended"] and s["text"].strip() != "" for s in samples])  # (P * n,)
            unusable += int((~usable).sum())
            chosen = range(len(samples))
            if score:
                scores = score(asked, samples)  # (P * n,)
                means["score"] += scores.tolist()
                if config.keep == "best":
                    best = best_of(scores.masked_fill(~usable, -math.inf).view(len(some), config.n))
                    chosen = (torch.arange(len(some)) * config.n + best).tolist()
            if gold:
                truth = gold(asked, samples)
                means["gold"] += truth.tolist()
            for i in chosen:
                if usable[i] and score and scores[i] < config.threshold:
                    low += 1
                elif usable[i]:
                    kept.append({"prompt": asked[i], "completion": samples[i]["text"], "logprob": samples[i]["logprob"]}
                                | ({"score": scores[i].item()} if score else {})
                                | ({"gold": truth[i].item()} if gold else {}))
        if not kept:
            raise UserError(f"none of the answers can be kept: {unusable:,} do not end or are empty, {low:,} are below "
                            "--threshold; train longer, raise --max-new-tokens or lower --threshold")
        f.writelines(json.dumps(record) + "\n" for record in kept)
    print(f"{config.out}: {len(kept):,} of {len(prompts) * config.n:,} answers to {len(prompts):,} prompts; "
          f"{unusable:,} do not end or are empty, {low:,} are below the threshold")
    for name, values in means.items():
        if values:
            mean = sum(record[name] for record in kept) / len(kept)
            print(f"mean {name}: {sum(values) / len(values):.2f} of all, {mean:.2f} of those kept")
    if config.keep == "best" and len(kept) == len(prompts):  # where a prompt is left out, this would not hold
        print(f"best of {config.n}: at most {kl_of_best_of(config.n):.2f} nats of KL to {config.policy} at temperature "
              f"{config.temperature:g}")


if __name__ == "__main__":
    cli(main, Config)
