"""GRPO and RLOO: PPO without a critic. An answer is worth what it earns beyond the other answers to its prompt.

    max over pi:  E[ r(x, y) - beta log( pi(y|x) / pi_ref(y|x) ) ]          optimum  pi* = pi_ref exp(r / beta) / Z

A fork of train_ppo.py. It samples k answers y_1 ... y_k to a prompt, a group. A whole answer is one action:

    R_i = r(x, y_i) - beta log( pi_old(y_i|x) / pi_ref(y_i|x) )
    A_i = R_i - mean of the k - 1 other rewards           --baseline loo, unbiased: RLOO, arXiv 2402.14740
    A_i = R_i - mean of all k rewards                     --baseline group: GRPO, arXiv 2402.03300
    L   = mean_t max(-A rho, -A clip(rho, 1-eps, 1+eps))  GRPO, equation 3; PPO, arXiv 1707.06347, equation 7

with rho_t = pi_theta(y_t|s_t) / pi_old(y_t|s_t). The first A_i is the default. GRPO as published is --baseline group
--divide-by-std --length-mean --kl k3: it divides A_i by the group's standard deviation, takes the mean over each
answer's tokens first, and has the KL as a loss. Dr. GRPO (arXiv 2503.20783) is --baseline group without the next two.

    python forks/train_grpo.py --init out/sft --reward out/rm --prompts data/notes/prompts_train.jsonl --out out/grpo
"""

import copy
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch

from nanopost.checkpoint import freeze, load_model
from nanopost.config import UserError, at_least, cli
from nanopost.data import Batch, batches, load_prompts, micro_batches
from nanopost.model import GPT
from nanopost.reward import load_reward
from nanopost.run import Options, Run, adamw, schedule
from nanopost.sampling import generate, in_parts, show_answers


@dataclass
class Config(Options):
    init: str = "out/sft"  # folder of the SFT model: policy and reference start there
    reward: str = "out/rm"  # folder of a reward model, or a Python function: file.py:function
    prompts: str = "data/notes/prompts_train.jsonl"  # prompts to train on
    valid: str = "data/notes/prompts_eval.jsonl"  # held-out prompts; empty: none
    out: str = "out/grpo"  # folder to write
    save_every: int = 10  # iterations between two checkpoints
    log_every: int = 1  # iterations between two lines of metrics.jsonl
    steps: int = 50  # iterations: a batch of answers and the updates on it
    batch_size: int = 128  # answers per iteration
    k: int = 4  # answers per prompt: a group
    baseline: str = "loo"  # what is taken off a reward: loo, the mean of the others, or group, the mean of all k
    divide_by_std: bool = False  # divide advantages by the standard deviation of the group's rewards
    length_mean: bool = False  # mean over the tokens of each answer, then over answers; else the mean over all tokens
    kl: str = "reward"  # where the KL penalty stands: reward, or as a loss: k2 (of answers) or k3 (of tokens)
    epochs: int = 2  # passes over the answers of an iteration
    minibatches: int = 4  # optimizer steps per pass
    micro_batch: int = 16  # answers per forward pass of an update; 0: the whole minibatch at once
    max_new_tokens: int = 80  # longest answer
    temperature: float = 1.0  # sampling temperature, applied to log-probabilities too
    beta: float = 0.1  # weight of the KL penalty; with 0 the policy learns to hack the reward model
    clip: float = 0.2  # range of the probability ratio: 1 - clip to 1 + clip
    missing_end_score: float = -1.0  # score of an answer that does not end
    lr: float = 5e-4  # peak learning rate, falling linearly to 0; 1e-5 suits GPT-2 124M
    warmup: int = 5  # iterations in which the learning rate rises
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    eval_every: int = 20  # iterations between two evaluations on held-out prompts
    eval_prompts: int = 128  # held-out prompts to evaluate on

    def __post_init__(self):
        super().__post_init__()
        self.keep_apart("init", "reward")
        at_least(self, 1, "steps", "batch_size", "epochs", "minibatches", "max_new_tokens")
        at_least(self, 1, "eval_every", "eval_prompts")
        at_least(self, 2, "k")
        if self.batch_size % self.k:
            raise UserError(f"--batch-size must be a multiple of --k, not {self.batch_size} with groups of {self.k}")
        for name, choices in {"baseline": ("loo", "group"), "kl": ("reward", "k2", "k3")}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}, not {getattr(self, name)}")
        if self.temperature < 1e-6:
            raise UserError("--temperature must be at least 1e-6: greedy answers have no ratio")


def group_advantages(rewards, k, baseline="loo", divide_by_std=False):
    """Rewards (B,), the k of a prompt side by side -> advantages (B,): how much better than its group an answer is.

    The mean of the others does not depend on the answer: the expected policy gradient stays what it is. The mean of all
    k does, and leaves (k-1)/k of it. Dividing by the standard deviation gives groups other weights."""
    groups = rewards.view(-1, k)  # (B/k, k)
    mean = groups.mean(1, keepdim=True)  # (B/k, 1)
    others = (k * mean - groups) / (k - 1)  # (B/k, k)
    advantages = groups - (others if baseline == "loo" else mean)
    spread = groups.std(1, keepdim=True) + 1e-4 if divide_by_std else 1.0
    return (advantages / spread).flatten()  # (B,)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, count=None):
    """PPO's clipped surrogate, negated: (B, T) each -> scalar, the sum over the mask / count, a number or (B, 1)."""
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.max(unclipped, clipped).masked_fill(~mask, 0.0)
    return (losses / (mask.sum() if count is None else count)).sum()


def kl_loss(logprobs, ref_logprobs, mask, kind="k3", count=None):
    """The KL penalty as a loss (joschu.net/blog/kl-approx.html): (B, T) each -> scalar, count as in policy_loss.

    At ratio 1, k2 of whole answers has the expected gradient of KL(pi || pi_ref). k3 of each token (GRPO, equation 4)
    has that of the other direction, KL(pi_ref || pi), in each state. k1, the log-ratio itself, would have none."""
    k1 = (logprobs - ref_logprobs).masked_fill(~mask, 0.0)
    losses = 0.5 * k1.sum(1, keepdim=True) ** 2 if kind == "k2" else torch.expm1(-k1) + k1  # (B, 1) or (B, T)
    return (losses / (mask.sum() if count is None else count)).sum()


@dataclass
class Models:
    policy: GPT  # what is trained
    reference: GPT  # the frozen SFT model
    score: object  # what judges: score(prompts, batch) -> (B,)


@torch.no_grad()
def rollout(models, tokenizer, prompts, prompt_ids, config, noise) -> Batch:
    """Samples an answer to each prompt and computes what the updates need: a Batch, on the CPU. noise: see generate."""
    # Sample the answers. The first minibatch must reproduce these log-probabilities.
    options = {"temperature": config.temperature, "noise": noise, "pad": tokenizer.pad}
    batch = generate(models.policy, prompt_ids, config.max_new_tokens, tokenizer.end, **options)
    # Log-probabilities under the reference
    hidden = models.reference(batch.ids)  # (B, T, C)
    batch.ref_logprobs = models.reference.logprobs(hidden, batch.ids, batch.index, config.temperature)  # (B, T-1)
    # Scores: the reward model has never seen an answer that does not end
    scores = models.score(prompts, batch).to(batch.logprobs)  # (B,)
    batch.scores = torch.where(batch.ended, scores, config.missing_end_score)
    return batch.to("cpu")


def minibatch_loss(models, batch, tokens, answers, config):
    """The loss of some rows of a minibatch of so many tokens and answers, and its statistics, so that parts add up."""
    count = answers * batch.mask.sum(1, keepdim=True) if config.length_mean else tokens  # (B, 1), or one number
    # Policy loss
    hidden = models.policy(batch.ids)  # (B, T, C)
    logprobs = models.policy.logprobs(hidden, batch.ids, batch.index, config.temperature)  # (B, T-1)
    pg_loss = policy_loss(logprobs, batch.logprobs, batch.advantages, batch.mask, config.clip, count)
    # KL loss, if it is not in the rewards
    kl = 0 * pg_loss if config.kl == "reward" else kl_loss(logprobs, batch.ref_logprobs, batch.mask, config.kl, count)
    # Health: on the first minibatch the ratio is 1 and all else 0, up to rounding
    with torch.no_grad():
        log_ratio = (logprobs - batch.logprobs).flatten()[batch.index]  # (N,)
        ratio = log_ratio.exp()
        advantages = batch.advantages.flatten()[batch.index]
        sums = {
            "policy/approxkl": 0.5 * log_ratio**2,
            "val/ratio": ratio,
            "policy/clipfrac": -advantages * ratio < -advantages * ratio.clamp(1 - config.clip, 1 + config.clip),
        }
        stats = {name: x.sum() / tokens for name, x in sums.items()}
    stats |= {"loss/policy": pg_loss.detach(), "loss/kl": kl.detach()}
    return pg_loss + config.beta * kl, stats


def update(run, models, optimizer, batch, config):
    """Exactly epochs x minibatches optimizer steps on one rollout. Returns the statistics of every step."""
    beta = config.beta if config.kl == "reward" else 0.0
    rewards = batch.scores - beta * (batch.logprobs - batch.ref_logprobs).sum(1)  # (B,)
    advantages = group_advantages(rewards, config.k, config.baseline, config.divide_by_std)  # (B,)
    batch = replace(batch, advantages=advantages[:, None] * batch.mask)  # (B, T-1): all tokens have their answer's
    history = []
    for _ in range(config.epochs):
        for rows in torch.randperm(len(batch)).tensor_split(config.minibatches):
            rows = rows[batch.lengths[rows].argsort()]  # similar lengths together: less padding
            count = batch.mask[rows].sum()  # one denominator: the response tokens of the whole minibatch
            stats = {}
            for part in micro_batches(run.shard(rows), config.micro_batch):
                with run.autocast():
                    loss, sums = minibatch_loss(models, batch.rows(part).to(run.device), count, len(rows), config)
                run.backward(loss)
                stats = {name: value + stats.get(name, 0.0) for name, value in sums.items()}
            stats = run.all_reduce(stats)
            stats["grad_norm"] = run.optimizer_step(optimizer, config.grad_clip)
            history.append(stats)
    return history


def answer_means(batch):
    """Means over the answers of a rollout; KL and entropy are in nats per answer."""
    return {
        "scores": batch.scores.mean(),
        "kl": (batch.logprobs - batch.ref_logprobs).sum(1).mean(),
        "entropy": -batch.logprobs.sum(1).mean(),
        "ended": batch.ended.float().mean(),
    }


def statistics(batch, history, config):
    """What to watch, by TRL's names (val/ratio is the policy's). Per-token means are over response tokens only."""
    answers = answer_means(batch)
    groups = batch.scores.view(-1, config.k)  # (B/k, k)
    means = {f"objective/{name}": answers[name] for name in ("scores", "kl", "entropy")}
    means |= {name: sum(stats[name] for stats in history) / len(history) for name in history[0]}
    return means | {
        "val/first_ratio": history[0]["val/ratio"],
        "objective/rlhf_reward": answers["scores"] - config.beta * answers["kl"],
        "groups/equal": (groups == groups[:, :1]).all(1).float().mean(),  # the scores of these teach nothing
        "response/length": batch.mask.sum(1).float().mean(),
        "response/ended": answers["ended"],
    }


def main(config: Config):
    run = Run("grpo", config)
    if config.minibatches * run.world > config.batch_size:
        raise UserError("--batch-size must be at least --minibatches times the number of processes")

    # models: the policy, the reference it must stay near, and what judges the answers
    policy, tokenizer = load_model(config.init, run.device)
    block_size = policy.config.block_size
    reference = freeze(copy.deepcopy(policy))
    models = Models(policy, reference, load_reward(config.reward, tokenizer, config.init, block_size, run.device))

    # data
    longest = block_size - config.max_new_tokens
    prompts, prompt_ids = load_prompts(config.prompts, tokenizer, longest)
    valid, valid_ids = load_prompts(config.valid, tokenizer, longest, config.eval_prompts)
    optimizer = adamw(policy.parameters(), config.lr, eps=1e-5)

    def play(prompts, prompt_ids, noise):
        with run.autocast():
            return rollout(models, tokenizer, prompts, prompt_ids, config, noise)

    def report(step):
        generator = torch.Generator().manual_seed(config.seed)  # evaluation must not advance the training RNG
        noise = torch.rand(len(valid), config.max_new_tokens, generator=generator)
        means = answer_means(in_parts(play, valid, valid_ids, noise))
        run.log(step, {f"eval/{name}": value for name, value in means.items()})
        run.print(f"step {step}, held-out: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()))
        run.print(show_answers(policy, tokenizer, valid_ids[:3], config.max_new_tokens))

    # loop
    run.compile(policy)
    first = run.start({"model": policy}, optimizer, tokenizer)
    if first is None:
        return
    size = config.batch_size // config.k  # prompts per iteration
    order = chain.from_iterable(batches(prompt_ids, size, config.seed, window=1))
    order = islice(order, first * size, None)  # one endless stream
    if valid and first == 0:
        report(0)
    for step in run.steps(first, config.steps):
        lr = run.set_lr(optimizer, config.lr * schedule(step, config.steps, config.warmup))
        noise = torch.rand(config.batch_size, config.max_new_tokens)
        rows = run.shard([i for i in islice(order, size) for _ in range(config.k)])  # k times each, side by side
        asked, asked_ids = [prompts[i] for i in rows], [prompt_ids[i] for i in rows]
        batch = run.all_gather(in_parts(play, asked, asked_ids, run.shard(noise)))
        stats = statistics(batch, update(run, models, optimizer, batch, config), config)
        if run.due(step, config.log_every):
            run.log(step, stats | {"lr": lr})
        if valid and run.due(step, config.eval_every):
            report(step)
        run.save(step)
    run.finish()


if __name__ == "__main__":
    cli(main, Config)
