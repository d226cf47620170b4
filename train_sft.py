r"""Supervised fine-tuning: imitate good answers.

    L(theta) = - sum_{b,t} m[b,t] log pi_theta(ids[b,t+1] | ids[b,:t+1])  /  sum_{b,t} m[b,t]

The mask m is 1 where the next token belongs to an assistant's answer, its <|end|> included, and 0 on prompts and
padding: the model learns to answer and to stop, not to ask. Both sums run over the whole optimizer step, so the split
into micro-batches changes nothing. It is the maximum-likelihood estimate (InstructGPT, arXiv 2203.02155, section 3.5).

With {"text"} records every token is a target: that is pretraining, with the same loss.

    python train_sft.py --init scratch --data data/notes/base_train.jsonl --valid data/notes/base_valid.jsonl \
        --lr 4e-3 --out out/base
    python train_sft.py --init out/base --data data/notes/sft_train.jsonl --valid data/notes/sft_valid.jsonl
"""

from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F

from nanopost.checkpoint import load_model
from nanopost.config import UserError, cli
from nanopost.data import batches, collate, load_examples, split
from nanopost.model import GPT, GPTConfig, upcast
from nanopost.run import Options, Run, adamw, schedule
from nanopost.sampling import show_answers
from nanopost.tokenizer import DEFAULT_VOCAB, load_tokenizer


@dataclass
class Config(Options):
    init: str = "scratch"  # what to start from: the folder of a run, gpt2 (or -medium, -large, -xl), or scratch
    data: str = "data/notes/sft_train.jsonl"  # records to learn from
    valid: str = "data/notes/sft_valid.jsonl"  # held-out records; empty: none
    out: str = "out/sft"  # folder to write; an earlier run there is replaced
    vocab: str = DEFAULT_VOCAB  # from scratch: a file of ranks, or gpt2
    block_size: int = 128  # from scratch: the context, in tokens
    n_layer: int = 2  # from scratch: the model's depth
    n_head: int = 4  # from scratch: attention heads
    n_embd: int = 128  # from scratch: the model's width
    dropout: float = 0.0  # from scratch
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimizer steps; 0: as many as the epochs need
    batch_size: int = 16  # sequences a step
    micro_batch: int = 0  # sequences a forward pass; 0: the whole batch at once
    lr: float = 3e-3  # peak learning rate; 3e-5 suits GPT-2 124M
    warmup: float = 0.03  # share of the steps with rising learning rate; then linear decay to 0
    weight_decay: float = 0.0  # of the matrices
    grad_clip: float = 1.0  # largest norm of the gradient; 0: none
    max_new_tokens: int = 80  # longest answer of the samples shown
    eval_every: int = 500  # steps between two held-out evaluations


def masked_cross_entropy(logits, targets, mask, count=None):
    """Mean negative log-likelihood of the targets, in nats per token.

    logits (..., V), targets (...) int64, mask (...) bool. The sum over the mask is divided by `count`, the number of
    targets of the whole optimizer step (default: of this call, mask.sum()). Positions outside the mask have no
    influence and a gradient of exactly 0.
    """
    nll = F.cross_entropy(upcast(logits).flatten(0, -2), targets.flatten(), reduction="none")  # (N,)
    nll = nll.masked_fill(~mask.flatten(), 0.0)
    return nll.sum() / (mask.sum() if count is None else count)


def batch_loss(model, batch, count=None, loss=masked_cross_entropy):
    """The loss of one micro-batch; `count` as in masked_cross_entropy, which may be given compiled.

    The mask of prompts and padding is applied by batch.index (collate made it): logits exist at the N targets only.
    """
    hidden = model(batch.ids)[:, :-1].flatten(0, 1)[batch.index]  # (B, T, C) -> (B, T-1, C) -> (N, C)
    targets = batch.ids[:, 1:].flatten()[batch.index]  # (N,)
    return loss(model.logits(hidden), targets, torch.ones_like(targets, dtype=torch.bool), count)


def update(run, model, optimizer, examples, config):
    """One optimizer step on a batch of examples; returns its loss and the gradient's norm."""
    count = sum(sum(example.mask[1:]) for example in examples)  # one denominator for the whole step
    loss = 0.0
    for rows in split(run.shard(examples), config.micro_batch):
        with run.autocast():
            part = batch_loss(model, collate(rows, run.device), count, run.compiled(masked_cross_entropy))
        run.backward(part)
        loss += part.detach()
    return {**run.sum({"loss": loss}), "grad_norm": run.update(optimizer, config.grad_clip)}


@torch.no_grad()
def evaluate(model, examples, device, batch_size=64):
    """Held-out loss in nats per target token."""
    parts = [collate(part, device) for part in split(sorted(examples, key=lambda e: len(e.ids)), batch_size)]
    count = sum(part.targets for part in parts)
    model.eval()
    loss = sum(batch_loss(model, part, count) for part in parts)
    model.train()
    return float(loss)


def main(config: Config):
    run = Run("sft", config)

    # model: from scratch or from a folder
    if config.init == "scratch":
        tokenizer = load_tokenizer(config.vocab)
        try:
            model = GPT(GPTConfig(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head,
                                  config.n_embd, config.dropout)).to(run.device)
        except ValueError as error:
            raise UserError(str(error)) from None
    else:
        model, tokenizer = load_model(config.init, run.device)
        for name in ("vocab", "block_size", "n_layer", "n_head", "n_embd", "dropout"):
            if getattr(config, name) != getattr(Config, name):
                raise UserError(f"--{name.replace('_', '-')} is for --init scratch; {config.init} brings its own")

    # data
    block_size = model.config.block_size
    examples = load_examples(config.data, tokenizer, block_size)
    valid = load_examples(config.valid, tokenizer, block_size) if config.valid else []
    lengths = [len(example.ids) for example in examples]
    total = config.steps or round(config.epochs * -(-len(examples) // config.batch_size))
    prompts = [e.ids[: e.mask.index(True)] for e in valid[:2]]  # up to the first target

    # optimizer
    optimizer = adamw(model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)

    def report(step):
        if valid:
            with run.autocast():
                loss = evaluate(model, valid, run.device)
            run.log(step, {"eval/loss": loss})
            run.print(f"step {step}: held-out loss {loss:.3f} nats/token")
            run.print(show_answers(model, tokenizer, prompts, min(config.max_new_tokens, block_size // 2)))

    # loop
    if not run.begin({"model": model}, optimizer, tokenizer, total):
        return
    model.train()
    order = islice(batches(lengths, config.batch_size, config.seed), run.start, None)
    if run.start == 0:
        report(0)
    for step in run.steps():
        lr = run.set_lr(optimizer, config.lr * schedule(step, total, round(config.warmup * total)))
        stats = update(run, model, optimizer, [examples[i] for i in next(order)], config)
        if run.due(step, config.log_every):
            run.log(step + 1, {**stats, "lr": lr})
        if run.due(step, config.eval_every):
            report(step + 1)

    run.finish()


if __name__ == "__main__":
    cli(main, Config)
