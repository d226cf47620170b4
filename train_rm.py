"""Reward model: learn from pairs which of two answers people prefer.

    L(phi) = - mean over pairs of  log sigma( r_phi(x, y_chosen) - r_phi(x, y_rejected) )

This is the Bradley-Terry likelihood, P(chosen > rejected) = sigma(difference of rewards) (Stiennon et al., arXiv
2009.01325, section 3.4; InstructGPT, arXiv 2203.02155, equation 1). The reward r(x, y) is a linear head on the hidden
state of the last real token, the only one that has seen the whole answer.

Only differences are learned, so afterwards the scale is fixed: mean 0 and standard deviation 1 on answers sampled from
the model it started from. PPO's KL coefficient and its penalty for unfinished answers then always mean the same.

    python train_rm.py --init out/sft --data out/prefs/train.jsonl --valid out/prefs/valid.jsonl --out out/rm
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F

from nanopost.checkpoint import load_model
from nanopost.config import UserError, cli
from nanopost.data import batches, collate, load_pairs, split
from nanopost.model import upcast
from nanopost.reward import score_samples
from nanopost.run import Options, Run, adamw, schedule
from nanopost.sampling import sample_text


@dataclass
class Config(Options):
    init: str = "out/sft"  # the folder of the SFT model to start from
    data: str = "out/prefs/train.jsonl"  # pairs to learn from
    valid: str = "out/prefs/valid.jsonl"  # held-out pairs; empty: none
    out: str = "out/rm"  # folder to write; an earlier run there is replaced
    epochs: float = 1.0  # passes over the pairs; more than one over-fits
    steps: int = 0  # optimizer steps; 0: as many as the epochs need
    batch_size: int = 16  # pairs a step
    micro_batch: int = 16  # pairs a forward pass: more than a CPU's cache holds are slower; 0: the whole batch at once
    lr: float = 1e-3  # peak learning rate; 2e-5 suits GPT-2 124M
    warmup: float = 0.05  # share of the steps with rising learning rate; then linear decay to 0
    weight_decay: float = 0.0  # of the matrices
    grad_clip: float = 1.0  # largest norm of the gradient; 0: none
    normalise: int = 512  # answers of the initial model that get mean 0 and standard deviation 1; 0: off
    max_new_tokens: int = 80  # longest of those answers
    eval_every: int = 200  # steps between two held-out evaluations
    eval_pairs: int = 500  # held-out pairs to use then


def pairwise_loss(chosen, rejected):
    """Bradley-Terry negative log-likelihood in nats per pair: chosen (B,), rejected (B,) rewards -> scalar."""
    return -F.logsigmoid(upcast(chosen) - upcast(rejected)).mean()


def score_pairs(model, pairs, device):
    """Rewards of both sides in one forward pass: B pairs -> (B,), (B,)."""
    batch = collate([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], device)
    return model.score(batch.ids, batch.lengths).chunk(2)  # (2B,) -> (B,), (B,)


def update(run, model, optimizer, pairs, config):
    """One optimizer step on a batch of pairs; returns its loss, accuracy and margin and the gradient's norm."""
    stats = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    for part in split(run.shard(pairs), config.micro_batch):
        share = len(part) / len(pairs)  # the mean is over the pairs of the whole step
        with run.autocast():
            chosen, rejected = score_pairs(model, part, run.device)
            loss = pairwise_loss(chosen, rejected) * share
        run.backward(loss)
        stats["loss"] += loss.detach()
        stats["accuracy"] += (chosen > rejected).float().mean() * share
        stats["margin"] += (chosen - rejected).detach().mean() * share
    return {**run.sum(stats), "grad_norm": run.update(optimizer, config.grad_clip)}


@torch.no_grad()
def evaluate(model, pairs, device, batch_size=32):
    """Held-out loss, accuracy (chosen scores higher) and margin (mean difference) over all pairs."""
    pairs = sorted(pairs, key=lambda pair: max(len(side.ids) for side in pair))
    sides = [score_pairs(model, part, device) for part in split(pairs, batch_size)]
    chosen, rejected = (torch.cat(side) for side in zip(*sides))  # (P,), (P,)
    return {"loss": pairwise_loss(chosen, rejected), "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean()}


@torch.no_grad()
def normalise(model, samples):
    """Rescales the head so that the rewards of these samples (dicts of sample_text) have mean 0, standard deviation 1.

    r' = (r - mean) / std is again a linear head: weight / std, (bias - mean) / std. Returns the old mean and std.
    """
    scores = score_samples(model, samples)  # (N,)
    if len(scores) < 2 or (scores == scores[0]).all():
        raise UserError(f"--normalise needs answers with different rewards, it has {len(scores)}; lower "
                        "--max-new-tokens so that prompts have room, or give --normalise 0")
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    model.head.weight /= std
    model.head.bias.sub_(mean).div_(std)
    return mean, std


def main(config: Config):
    run = Run("rm", config)

    # model: the SFT trunk and a fresh head, its weights N(0, 1/sqrt(d+1))
    sft, tokenizer = load_model(config.init, run.device)
    model, _ = load_model(config.init, run.device)
    model.add_head(std=1 / math.sqrt(model.config.n_embd + 1))

    # data
    pairs = load_pairs(config.data, tokenizer, model.config.block_size)
    valid = load_pairs(config.valid, tokenizer, model.config.block_size, config.eval_pairs) if config.valid else []
    lengths = [max(len(chosen.ids), len(rejected.ids)) for chosen, rejected in pairs]
    total = config.steps or round(config.epochs * -(-len(pairs) // config.batch_size))

    # optimizer
    optimizer = adamw(model.parameters(), config.lr, eps=1e-5, weight_decay=config.weight_decay)

    def report(step):
        if valid:
            with run.autocast():
                metrics = evaluate(model, valid, run.device)
            run.log(step, {f"eval/{name}": value for name, value in metrics.items()})
            run.print(f"step {step}: held-out loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.1%}, "
                      f"margin {metrics['margin']:.2f}")

    # loop
    if not run.begin({"model": model}, optimizer, tokenizer, total):
        return
    order = islice(batches(lengths, config.batch_size, config.seed), run.start, None)
    if run.start == 0:
        report(0)
    for step in run.steps():
        lr = run.set_lr(optimizer, config.lr * schedule(step, total, round(config.warmup * total)))
        stats = update(run, model, optimizer, [pairs[i] for i in next(order)], config)
        if run.due(step, config.log_every):
            run.log(step + 1, {**stats, "lr": lr})
        if run.due(step, config.eval_every):
            report(step + 1)

    # one scale for every reward model
    if config.normalise:
        room = model.config.block_size - config.max_new_tokens
        prompts = [chosen.ids[: chosen.mask.index(True)] for chosen, _ in pairs]
        prompts = [ids for ids in prompts if len(ids) <= room][: config.normalise]
        samples = sample_text(sft, tokenizer, prompts, config.max_new_tokens, seed=config.seed)
        mean, std = normalise(model, samples)
        run.print(f"normalised on {len(samples)} answers of {config.init}: mean {mean:.2f} -> 0, std {std:.2f} -> 1")
        for sample, score in list(zip(samples, score_samples(model, samples)))[:4]:
            run.print(f"  {score:+.2f}  {tokenizer.decode(sample['prompt_ids'])}\n         -> {sample['text']}")
    run.finish()


if __name__ == "__main__":
    cli(main, Config)
