"""Sample answers to a file of prompts; with a reward, keep only the best.

    nanopost sample out/sft --prompts data/notes/prompts_train.jsonl --out out/samples.jsonl
    nanopost sample out/sft --n 16 --reward out/rm --keep best --out out/best.jsonl

train_sft.py can train on the file: answers that are empty or unfinished are left out. Best of n keeps the one of n
answers with the highest score: the honest baseline for PPO, without training (Stiennon et al., arXiv 2009.01325).
Fine-tuning on what it keeps is rejection sampling; repeated, that is ReST (arXiv 2308.08998).
"""

import json
import math
import os
from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm import tqdm

from nanopost.checkpoint import load_model
from nanopost.config import UserError, at_least
from nanopost.data import load_prompts, micro_batches
from nanopost.device import find_device
from nanopost.files import atomic
from nanopost.reward import load_reward
from nanopost.sampling import sample_text
from nanopost.tools import check_file, check_temperature

LOWEST = -1e30  # a threshold that every score reaches


@dataclass
class Config:
    policy: str  # folder of the model
    prompts: str = "data/notes/prompts_train.jsonl"  # prompts to answer
    out: str = "out/samples.jsonl"  # file to write, one answer per line: {"prompt", "completion", "logprob", "score"}
    n: int = 1  # answers per prompt
    reward: str = ""  # what scores them: the folder of a reward model, or file.py:function
    keep: str = "all"  # all, or best: only the answer with the highest score to each prompt
    threshold: float = LOWEST  # keep only answers with at least this score (ReST raises it from round to round)
    gold: str = ""  # a second reward, whose mean is printed and which has no influence on what is kept
    limit: int = 0  # use at most this many prompts; 0: all
    max_new_tokens: int = 80  # the longest answer, in tokens
    temperature: float = 1.0  # sampling temperature
    batch_size: int = 512  # answers sampled at a time
    seed: int = 0  # seed for sampling
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        at_least(self, 1, "n", "max_new_tokens", "batch_size")
        at_least(self, 0, "limit", "temperature")
        check_temperature(self.temperature)
        if self.keep not in ("all", "best"):
            raise UserError(f"--keep must be all or best, not {self.keep}")
        if not self.reward and (self.keep == "best" or self.threshold > LOWEST):
            raise UserError("--keep best and --threshold need scores: give --reward")


def best_of(scores: torch.Tensor) -> torch.Tensor:
    """The best of each prompt's n answers: scores (P, n) -> its column (P,), the first among equals."""
    return scores.argmax(1)


def kl_of_best_of(n: int) -> float:
    """An upper bound on KL(best of n || policy), in nats per answer (Beirami et al., arXiv 2401.01879).

    It is nearly reached where no single answer is likely and no two answers have the same score.
    """
    return math.log(n) - (n - 1) / n


def sample(model, tokenizer, prompts: list, ids: list[list[int]], judges: dict, config: Config):
    """Yields (record, usable) of n answers to each prompt, in the order of the file. judges: {column: load_reward(...)}

    Not usable are unfinished answers, which train_sft.py would teach an end that they do not have, and empty ones. Each
    prompt has its own random numbers, so it does not matter how many are answered at a time.
    """
    parts = micro_batches(range(len(prompts)), max(1, config.batch_size // config.n))
    for part in tqdm(parts, desc="sampling", disable=None):
        seeds = [torch.Generator().manual_seed((config.seed * 1_000_003 + row) % 2**63) for row in part]
        noise = [torch.rand(config.n, config.max_new_tokens, generator=seed) for seed in seeds]
        rows = [row for row in part for _ in range(config.n)]
        options = dict(batch_size=config.batch_size, temperature=config.temperature, noise=torch.cat(noise))
        answers = sample_text(model, tokenizer, [ids[row] for row in rows], config.max_new_tokens, **options)
        asked = [prompts[row] for row in rows]
        scores = {name: judge(asked, answers).tolist() for name, judge in judges.items()}
        for i, answer in enumerate(answers):
            record = {"prompt": asked[i], "completion": answer.text, "logprob": answer.logprob}
            record |= {name: column[i] for name, column in scores.items()}
            yield record, answer.ended and answer.text.strip() != ""


def select(records: list[dict], usable: list[bool], config: Config) -> tuple[list[dict], str]:
    """The records to keep, and how many are left out and why. Raises UserError if none can be kept."""
    scores = [record.get("score", 0.0) if use else -math.inf for record, use in zip(records, usable)]
    rows = range(len(records))
    if config.keep == "best":
        columns = best_of(torch.tensor(scores, dtype=torch.float64).view(-1, config.n)).tolist()  # (P,)
        rows = [prompt * config.n + column for prompt, column in enumerate(columns)]
    candidates = [row for row in rows if usable[row]]
    kept = [records[row] for row in candidates if scores[row] >= config.threshold]
    left_out = f"{usable.count(False):,} are unfinished or empty, "
    left_out += f"{len(candidates) - len(kept):,} are below the threshold"
    if not kept:
        hint = "train longer, raise --max-new-tokens or lower --threshold"
        raise UserError(f"none of the answers can be kept: {left_out}; {hint}")
    return kept, left_out


def main(config: Config):
    check_file("--out", config.out)
    device = find_device(config.device)
    model, tokenizer = load_model(config.policy, device)
    context = model.config.block_size
    specs = {"score": config.reward, "gold": config.gold}
    of_policy = tokenizer, config.policy, context, device
    judges = {name: load_reward(spec, *of_policy) for name, spec in specs.items() if spec}
    longest = context - config.max_new_tokens
    prompts, ids = load_prompts(config.prompts, tokenizer, longest, config.limit or None)

    os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)
    with atomic(config.out) as f:  # opened first: a file that cannot be written is noticed before the sampling
        records, usable = zip(*sample(model, tokenizer, prompts, ids, judges, config))
        kept, left_out = select(records, usable, config)
        f.writelines(json.dumps(record) + "\n" for record in kept)

    print(f"{config.out}: {len(kept):,} of {len(records):,} answers to {len(ids):,} prompts; {left_out}")
    for name in judges:
        of_all, of_kept = (fmean(record[name] for record in part) for part in (records, kept))
        print(f"mean {name}: {of_all:.2f} of all, {of_kept:.2f} of those kept")
    if config.keep == "best" and len(kept) == len(ids):  # the bound holds only if no prompt is left out
        kl = f"{kl_of_best_of(config.n):.2f} nats of KL to {config.policy}"
        print(f"best of {config.n}: at most {kl} at temperature {config.temperature:g}")
