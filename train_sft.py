r"""Supervised fine-tuning: imitate good answers.

    L(theta) = - sum_{b,t} m[b,t] log pi_theta(ids[b,t+1] | ids[b,:t+1])  /  sum_{b,t} m[b,t]

The mask m is 1 where the next token belongs to an assistant's answer, its <|end|> included, and 0 everywhere else:
the model learns to answer and to stop, not to ask. Both sums run over the whole optimizer step, so the split
into micro-batches changes nothing. Minimising L is maximum likelihood (InstructGPT, arXiv 2203.02155, section 3.5).

With {"text"} records every token is a target: that is pretraining, with the same loss.

    python train_sft.py --init scratch --data data/notes/base_train.jsonl --valid data/notes/base_valid.jsonl \
        --lr 4e-3 --out out/base
    python train_sft.py --init out/base --data data/notes/sft_train.jsonl --valid data/notes/sft_valid.jsonl
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch

from nanopost.checkpoint import load_model
from nanopost.config import UserError, at_least, between, cli, flag
from nanopost.data import batches, collate, in_length_order, load_examples, micro_batches
from nanopost.model import GPT, GPTConfig, token_nll
from nanopost.run import Options, Run, adamw, schedule
from nanopost.sampling import show_answers
from nanopost.tokenizer import DEFAULT_VOCAB, load_tokenizer


@dataclass
class Config(Options):
    init: str = "scratch"  # start: a run's or Hugging Face's folder, gpt2 (or -medium, -large, -xl), or scratch
    data: str = "data/notes/sft_train.jsonl"  # records to learn from
    valid: str = "data/notes/sft_valid.jsonl"  # held-out records; empty: none
    out: str = "out/sft"  # folder to write
    vocab: str = DEFAULT_VOCAB  # with --init scratch: a vocabulary file (tiktoken ranks), or gpt2
    block_size: int = 128  # with --init scratch: context in tokens
    n_layer: int = 2  # with --init scratch: number of layers
    n_head: int = 4  # with --init scratch: attention heads per layer
    n_embd: int = 128  # with --init scratch: channels
    dropout: float = 0.0  # with --init scratch: dropout probability
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimizer steps; 0: as many as the epochs need
    batch_size: int = 16  # sequences per step
    micro_batch: int = 0  # sequences per forward pass; 0: the whole batch at once
    lr: float = 3e-3  # peak learning rate; 3e-5 suits GPT-2 124M
    warmup: float = 0.03  # share of the steps in which the learning rate rises; then it falls linearly to 0
    weight_decay: float = 0.0  # weight decay, on matrices only
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    max_new_tokens: int = 80  # longest answer among the samples shown
    eval_every: int = 500  # steps between two evaluations on held-out records

    def __post_init__(self):
        super().__post_init__()
        self.keep_apart("init")
        at_least(self, 1, "batch_size", "max_new_tokens", "eval_every")
        between(self, 0, 1, "warmup")


def masked_cross_entropy(logits, targets, mask, count=None, nll=token_nll):
    """Mean negative log-likelihood of the targets, in nats per token.

    logits (..., V), targets (...) int64, mask (...) bool. The sum over the mask is divided by `count`, the number of
    targets of the whole optimizer step (default: of this call, mask.sum()). Positions outside the mask have no
    influence and a gradient of exactly 0. nll is -log softmax(logits)[target] in fp32 (F.cross_entropy per token).
    """
    losses = nll(logits.flatten(0, -2), targets.flatten())  # (N,)
    losses = losses.masked_fill(~mask.flatten(), 0.0)
    return losses.sum() / (mask.sum() if count is None else count)


def batch_loss(model, batch, count=None):
    """The loss of one micro-batch; `count` as in masked_cross_entropy. Logits exist only where the mask is True: these
    N positions are batch.index."""
    hidden = model(batch.ids)[:, :-1].flatten(0, 1)[batch.index]  # (B, T, C) -> (B, T-1, C) -> (N, C)
    targets = batch.ids[:, 1:].flatten()[batch.index]  # (N,)
    mask = batch.mask.flatten()[batch.index]  # (N,), all True: the selection above is already the mask
    return masked_cross_entropy(model.logits(hidden), targets, mask, count, model.nll)


def update(run, model, optimizer, examples, config):
    """One optimizer step on a batch of examples. Returns its loss and the norm of the gradient."""
    count = sum(sum(example.mask[1:]) for example in examples)  # one denominator for the whole step
    loss = 0.0
    for rows in micro_batches(run.shard(examples), config.micro_batch):
        with run.autocast():
            part = batch_loss(model, collate(rows, run.device), count)
        run.backward(part)
        loss += part.detach()
    stats = run.all_reduce({"loss": loss})
    return stats | {"grad_norm": run.optimizer_step(optimizer, config.grad_clip)}


@torch.no_grad()
def evaluate(model, examples, device, batch_size=8):
    """Held-out loss in nats per target token."""
    parts = [batch for _, batch in in_length_order(examples, batch_size, device)]
    count = sum(batch.targets for batch in parts)
    model.eval()
    loss = sum(batch_loss(model, batch, count) for batch in parts)
    model.train()
    return float(loss)


def load(config, device):
    """The model and the tokenizer to start from."""
    if config.init == "scratch":
        tokenizer = load_tokenizer(config.vocab)
        sizes = (config.block_size, config.n_layer, config.n_head, config.n_embd, config.dropout)
        return GPT(GPTConfig(tokenizer.vocab_size, *sizes)).to(device), tokenizer
    for name in ("vocab", "block_size", "n_layer", "n_head", "n_embd", "dropout"):
        if getattr(config, name) != getattr(Config, name):
            raise UserError(f"{flag(name)} is for --init scratch; {config.init} brings its own")
    return load_model(config.init, device)


def main(config: Config):
    run = Run("sft", config)

    # model and data
    model, tokenizer = load(config, run.device)
    block_size = model.config.block_size
    examples = load_examples(config.data, tokenizer, block_size)
    valid = load_examples(config.valid, tokenizer, block_size)
    total = config.steps or round(config.epochs * math.ceil(len(examples) / config.batch_size))
    warmup = round(config.warmup * total)

    optimizer = adamw(model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)

    def report(step):
        with run.autocast():
            loss = evaluate(model, valid, run.device)
        run.log(step, {"eval/loss": loss})
        run.print(f"step {step}: held-out loss {loss:.3f} nats/token")
        prompts = [example.prompt for example in valid[:2]]
        run.print(show_answers(model, tokenizer, prompts, min(config.max_new_tokens, block_size // 2)))

    # loop
    run.compile(model)
    first = run.start({"model": model}, optimizer, tokenizer)
    if first is None:
        return
    order = islice(batches(examples, config.batch_size, config.seed), first, None)
    model.train()
    if valid and first == 0:
        report(0)
    for step in run.steps(first, total):
        lr = run.set_lr(optimizer, config.lr * schedule(step, total, warmup))
        batch = [examples[i] for i in next(order)]
        stats = update(run, model, optimizer, batch, config)
        if run.due(step, config.log_every):
            run.log(step, stats | {"lr": lr})
        if valid and run.due(step, config.eval_every):
            report(step)
        run.save(step)
    run.finish()


if __name__ == "__main__":
    cli(main, Config)
