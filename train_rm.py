"""Reward model: learn from pairs which of two answers people prefer.

    L(phi) = - mean over pairs of  log sigma( r_phi(x, y_chosen) - r_phi(x, y_rejected) )

This is the Bradley-Terry likelihood, P(chosen > rejected) = sigma(difference of rewards) (Stiennon et al., arXiv
2009.01325, section 3.4; InstructGPT, arXiv 2203.02155, equation 1). The reward r(x, y) is a linear head on the hidden
state of the last real token, the only one that has seen the whole answer.

Only differences are learned. Afterwards offset and scale are fixed: mean 0, standard deviation 1 on answers sampled
from the model it started from. PPO's KL coefficient and its penalty for unfinished answers then always mean the same.

    python train_rm.py --init out/sft --data out/prefs/train.jsonl --valid out/prefs/valid.jsonl --out out/rm
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F

from nanopost.checkpoint import load_model
from nanopost.config import UserError, at_least, between, cli
from nanopost.data import batches, load_pairs, map_pairs, micro_batches
from nanopost.model import upcast
from nanopost.reward import score_examples
from nanopost.run import Options, Run, adamw, schedule
from nanopost.sampling import sample_text


@dataclass
class Config(Options):
    init: str = "out/sft"  # folder of the SFT model to start from
    data: str = "out/prefs/train.jsonl"  # pairs to learn from
    valid: str = "out/prefs/valid.jsonl"  # held-out pairs; empty: none
    out: str = "out/rm"  # folder to write
    epochs: float = 1.0  # passes over the pairs; more than one over-fits
    steps: int = 0  # optimizer steps; 0: as many as the epochs need
    batch_size: int = 16  # pairs per step
    micro_batch: int = 16  # pairs per backward pass (fastest if they fit a CPU's cache); 0: the whole batch
    lr: float = 1e-3  # peak learning rate; 2e-5 suits GPT-2 124M
    warmup: float = 0.05  # share of the steps in which the learning rate rises; then it falls linearly to 0
    weight_decay: float = 0.0  # weight decay, on matrices only
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    normalise: int = 512  # sampled answers of the initial model whose scores get mean 0, standard deviation 1; 0: off
    max_new_tokens: int = 80  # longest answer sampled for --normalise
    eval_every: int = 200  # steps between two evaluations on held-out pairs
    eval_pairs: int = 500  # held-out pairs to evaluate on

    def __post_init__(self):
        super().__post_init__()
        self.keep_apart("init")
        at_least(self, 1, "batch_size", "max_new_tokens", "eval_every", "eval_pairs")
        between(self, 0, 1, "warmup")


def pairwise_loss(chosen, rejected):
    """Bradley-Terry negative log-likelihood in nats per pair: chosen (B,), rejected (B,) rewards -> scalar."""
    return -F.logsigmoid(upcast(chosen) - upcast(rejected)).mean()


def score_pairs(model, pairs, device, batch_size=0):
    """The rewards of both sides of B pairs: chosen (B,), rejected (B,). Of the 2B sides, at most batch_size go through
    the model together; 0: half of them."""
    return map_pairs(lambda batch: model.score(batch.ids, batch.lengths), pairs, batch_size, device)


def update(run, model, optimizer, pairs, config):
    """One optimizer step on a batch of pairs. Returns its loss, accuracy and margin, and the norm of the gradient."""
    stats = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    for part in micro_batches(run.shard(pairs), config.micro_batch):
        share = len(part) / len(pairs)  # the mean is over the pairs of the whole step
        with run.autocast():
            chosen, rejected = score_pairs(model, part, run.device)
            loss = pairwise_loss(chosen, rejected) * share
        run.backward(loss)
        stats["loss"] += loss.detach()
        stats["accuracy"] += (chosen > rejected).float().mean() * share
        stats["margin"] += (chosen - rejected).detach().mean() * share
    return run.all_reduce(stats) | {"grad_norm": run.optimizer_step(optimizer, config.grad_clip)}


@torch.no_grad()
def evaluate(model, pairs, device, batch_size=64):
    """Held-out loss, accuracy (chosen scores higher) and margin (mean difference) over all pairs."""
    chosen, rejected = score_pairs(model, pairs, device, batch_size)  # (P,), (P,)
    return {
        "loss": pairwise_loss(chosen, rejected),
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
    }


@torch.no_grad()
def normalise(model, answers):
    """Rescales the head so that the rewards of these Examples have mean 0 and standard deviation 1.

    r' = (r - mean) / std is again a linear head: weight / std, (bias - mean) / std. Returns the old mean and std.
    """
    scores = score_examples(model, answers)  # (N,)
    if len(scores) < 2 or (scores == scores[0]).all():
        raise UserError(
            f"--normalise needs answers with different rewards, it has {len(scores)}; lower --max-new-tokens so that "
            "prompts have room, or give --normalise 0"
        )
    mean = scores.mean().item()
    std = scores.std(correction=0).item()
    model.head.weight /= std
    model.head.bias.sub_(mean).div_(std)
    return mean, std


def main(config: Config):
    run = Run("rm", config)

    # model: the SFT trunk and a fresh head, its weights of variance 1/(d+1) (Stiennon et al.)
    sft, tokenizer = load_model(config.init, run.device)
    model, _ = load_model(config.init, run.device)
    model.add_head(std=1 / math.sqrt(model.config.n_embd + 1))
    block_size = model.config.block_size

    # data
    pairs = load_pairs(config.data, tokenizer, block_size)
    valid = load_pairs(config.valid, tokenizer, block_size, config.eval_pairs)
    total = config.steps or round(config.epochs * math.ceil(len(pairs) / config.batch_size))
    warmup = round(config.warmup * total)
    longest = block_size - config.max_new_tokens
    prompts = [pair.chosen.prompt for pair in pairs if len(pair.chosen.prompt) <= longest][: config.normalise]
    if config.normalise and not prompts:
        raise UserError("--normalise: no prompt leaves room for an answer in the context; lower --max-new-tokens")

    optimizer = adamw(model.parameters(), config.lr, eps=1e-5, weight_decay=config.weight_decay)

    def report(step):
        with run.autocast():
            stats = evaluate(model, valid, run.device)
        run.log(step, {f"eval/{name}": value for name, value in stats.items()})
        run.print(
            f"step {step}: held-out loss {stats['loss']:.3f}, accuracy {stats['accuracy']:.1%}, "
            f"margin {stats['margin']:.2f}"
        )

    # loop
    run.compile(model)
    first = run.start({"model": model}, optimizer, tokenizer)
    if first is None:
        return
    order = islice(batches(pairs, config.batch_size, config.seed), first, None)
    if valid and first == 0:
        report(0)
    for step in run.steps(first, total):
        lr = run.set_lr(optimizer, config.lr * schedule(step, total, warmup))
        batch = [pairs[i] for i in next(order)]
        stats = update(run, model, optimizer, batch, config)
        if run.due(step, config.log_every):
            run.log(step, stats | {"lr": lr})
        if valid and run.due(step, config.eval_every):
            report(step)
        run.save(step)

    # one scale for every reward model
    if config.normalise:
        answers = sample_text(sft, tokenizer, prompts, config.max_new_tokens, seed=config.seed)
        mean, std = normalise(model, answers)
        run.print(f"normalised on {len(answers)} answers of {config.init}: mean {mean:.2f} -> 0, std {std:.2f} -> 1")
        for answer, score in list(zip(answers, score_examples(model, answers), strict=True))[:4]:
            run.print(f"  {score:+.2f}  {tokenizer.decode(answer.prompt)}\n         -> {answer.text}")
    run.finish()


if __name__ == "__main__":
    cli(main, Config)
