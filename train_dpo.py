"""Direct preference optimisation: learn from pairs without a reward model.

    L(theta) = - mean over pairs of  log sigma( beta h ),
    h = [log pi_theta(y_w|x) - log pi_ref(y_w|x)] - [log pi_theta(y_l|x) - log pi_ref(y_l|x)]

(Rafailov et al., arXiv 2305.18290, equation 7.) y_w is the chosen answer, y_l the rejected one, pi_ref the SFT model
that training starts from. The log-probability of an answer is the sum over its tokens, <|end|> included. The implicit
reward beta log(pi/pi_ref) is fitted to the pairs just as a reward model r would be. Where the fit is exact, pi is the
policy that maximises r under a KL penalty of weight beta: pi* = pi_ref exp(r/beta) / Z.

    python train_dpo.py --init out/sft --data out/prefs/train.jsonl --valid out/prefs/valid.jsonl --out out/dpo
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F

from nanopost.checkpoint import load_model
from nanopost.config import UserError, at_least, between, cli
from nanopost.data import batches, load_pairs, map_pairs, micro_batches
from nanopost.device import to_device
from nanopost.run import Options, Run, adamw, schedule
from nanopost.sampling import show_answers


@dataclass
class Config(Options):
    init: str = "out/sft"  # folder of the SFT model: the policy's start, and the reference
    data: str = "out/prefs/train.jsonl"  # pairs to learn from
    valid: str = "out/prefs/valid.jsonl"  # held-out pairs; empty: none
    out: str = "out/dpo"  # folder to write
    beta: float = 0.1  # weight of the implicit KL penalty: higher stays closer to the reference
    label_smoothing: float = 0.0  # assumed share of wrong labels (conservative DPO)
    epochs: float = 1.0  # passes over the pairs; more than one over-fits
    steps: int = 0  # optimizer steps; 0: as many as the epochs need
    batch_size: int = 32  # pairs per step
    micro_batch: int = 16  # pairs per backward pass (fastest if they fit a CPU's cache); 0: the whole batch
    lr: float = 3e-4  # peak learning rate; 5e-6 suits GPT-2 124M
    warmup: float = 0.1  # share of the steps in which the learning rate rises; then it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    max_new_tokens: int = 80  # longest answer among the samples shown
    eval_every: int = 100  # steps between two evaluations on held-out pairs
    eval_pairs: int = 500  # held-out pairs to evaluate on

    def __post_init__(self):
        super().__post_init__()
        self.keep_apart("init")
        at_least(self, 1, "batch_size", "max_new_tokens", "eval_every", "eval_pairs")
        between(self, 0, 1, "warmup")
        between(self, 0, 0.499, "label_smoothing")
        if not self.beta > 0:
            raise UserError("--beta must be above 0: without it there is nothing to learn")


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    """DPO, equation 7; with label smoothing e, conservative DPO: -(1-e) log sigma(beta h) - e log sigma(-beta h).

    Four vectors (B,) of summed log-probabilities, in nats per response. Returns (losses, chosen_rewards,
    rejected_rewards), (B,) each; the implicit rewards beta log(pi/pi_ref) are detached, for the log.
    """
    chosen_rewards = beta * (policy_chosen - ref_chosen)  # (B,)
    rejected_rewards = beta * (policy_rejected - ref_rejected)  # (B,)
    beta_h = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(beta_h) - label_smoothing * F.logsigmoid(-beta_h)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def answer_logprobs(model, batch):
    """log pi(y|x), summed over the answer's tokens: a Batch of B answers -> (B,)."""
    logprobs = model.logprobs(model(batch.ids), batch.ids, batch.index)  # (B, T-1), 0 outside the answers
    return logprobs.sum(1)


def pair_logprobs(model, pairs, device, batch_size=0):
    """log pi(y|x) of both sides of B pairs: chosen (B,), rejected (B,). Of the 2B sides, at most batch_size go through
    the model together; 0: half of them."""
    return map_pairs(lambda batch: answer_logprobs(model, batch), pairs, batch_size, device)


@torch.no_grad()
def reference_logprobs(model, pairs, device, batch_size=64):
    """pair_logprobs of all P pairs under the reference model, computed once: (P, 2), on the CPU."""
    return torch.stack(pair_logprobs(model, pairs, device, batch_size), dim=1).cpu()


def batch_loss(policy, pairs, ref_logprobs, config, device, batch_size=0):
    """Losses (B,) of B pairs and the statistics to log, (B,) each. ref_logprobs (B, 2): from reference_logprobs."""
    chosen, rejected = pair_logprobs(policy, pairs, device, batch_size)
    ref_chosen, ref_rejected = to_device(ref_logprobs, device).unbind(1)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing
    )
    return losses, {
        "loss": losses.detach(),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
    }


def update(run, policy, optimizer, pairs, ref_logprobs, config):
    """One optimizer step on a batch of pairs with their ref_logprobs (B, 2). Returns the means of its statistics."""
    means = {}
    for rows in micro_batches(run.shard(list(range(len(pairs)))), config.micro_batch):
        with run.autocast():
            losses, stats = batch_loss(policy, [pairs[i] for i in rows], ref_logprobs[rows], config, run.device)
        run.backward(losses.sum() / len(pairs))  # one denominator: the pairs of the whole step
        means = {name: means.get(name, 0.0) + values.sum() / len(pairs) for name, values in stats.items()}
    return run.all_reduce(means) | {"grad_norm": run.optimizer_step(optimizer, config.grad_clip)}


@torch.no_grad()
def evaluate(policy, pairs, ref_logprobs, config, device, batch_size=64):
    """The means over all held-out pairs of what batch_loss reports."""
    _, stats = batch_loss(policy, pairs, ref_logprobs, config, device, batch_size)
    return {name: values.mean() for name, values in stats.items()}


def main(config: Config):
    run = Run("dpo", config)

    # model and data
    policy, tokenizer = load_model(config.init, run.device)
    block_size = policy.config.block_size
    pairs = load_pairs(config.data, tokenizer, block_size)
    valid = load_pairs(config.valid, tokenizer, block_size, config.eval_pairs)
    prompts = [pair.chosen.prompt for pair in valid[:2]]
    total = config.steps or round(config.epochs * math.ceil(len(pairs) / config.batch_size))
    warmup = round(config.warmup * total)

    # the reference is the policy before its first step: its log-probabilities are constants of the data
    with run.autocast():
        ref_logprobs = run.all_gather(reference_logprobs(policy, run.shard(pairs), run.device))  # (P, 2)
        valid_ref_logprobs = reference_logprobs(policy, valid, run.device)

    optimizer = adamw(policy.parameters(), config.lr)

    def report(step):
        with run.autocast():
            means = evaluate(policy, valid, valid_ref_logprobs, config, run.device)
        run.log(step, {f"eval/{name}": value for name, value in means.items()})
        run.print(
            f"step {step}: held-out loss {means['loss']:.3f}, accuracy {means['rewards/accuracies']:.1%}, "
            f"implicit rewards {means['rewards/chosen']:+.2f} / {means['rewards/rejected']:+.2f}"
        )
        run.print(show_answers(policy, tokenizer, prompts, config.max_new_tokens))

    # loop
    run.compile(policy)
    first = run.start({"model": policy}, optimizer, tokenizer)
    if first is None:
        return
    order = islice(batches(pairs, config.batch_size, config.seed), first, None)
    if valid and first == 0:
        report(0)
    for step in run.steps(first, total):
        lr = run.set_lr(optimizer, config.lr * schedule(step, total, warmup))
        rows = next(order)
        batch = [pairs[i] for i in rows]
        stats = update(run, policy, optimizer, batch, ref_logprobs[rows], config)
        if run.due(step, config.log_every):
            run.log(step, stats | {"lr": lr})
        if valid and run.due(step, config.eval_every):
            report(step)
        run.save(step)
    run.finish()


if __name__ == "__main__":
    cli(main, Config)
