"""PPO for language models: raise a reward while a KL penalty holds the policy near the reference.

    max over pi:  E[ r(x, y) - beta log( pi(y|x) / pi_ref(y|x) ) ]          optimum  pi* = pi_ref exp(r / beta) / Z

(InstructGPT, arXiv 2203.02155, equation 2, without pretraining.) An answer is an episode, each token an action.
PPO samples answers and computes, with k_t = log pi_old(y_t|s_t) - log pi_ref(y_t|s_t),

    R_t = -beta k_t, plus the score r(x, y) on the last token                              rewards
    A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = R_t + gamma V(s_{t+1}) - V(s_t)   GAE, arXiv 1506.02438, eq. 16
    G_t = A_t + V(s_t)                                                                     target of the value function

then, for a few epochs over them, with rho_t = pi_theta(y_t|s_t) / pi_old(y_t|s_t) and A whitened, minimises

    L = mean_t max(-A rho, -A clip(rho, 1-eps, 1+eps))  +  c_v/2 mean_t max((V-G)^2, (clip(V, V_old +- eps_v) - G)^2)

(PPO, arXiv 1707.06347, equation 7; the clipped value loss is OpenAI baselines'.) With --critic, V has its own trunk.

    python train_ppo.py --init out/sft --reward out/rm --prompts data/notes/prompts_train.jsonl --out out/ppo
"""

import copy
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch

from nanopost.checkpoint import freeze, load_model
from nanopost.config import UserError, at_least, between, cli
from nanopost.data import Batch, batches, load_prompts, micro_batches
from nanopost.model import GPT
from nanopost.reward import load_reward, load_reward_model
from nanopost.run import Options, Run, adamw, schedule
from nanopost.sampling import generate, in_parts, show_answers


@dataclass
class Config(Options):
    init: str = "out/sft"  # folder of the SFT model: policy and reference start there
    reward: str = "out/rm"  # folder of a reward model, or a Python function: file.py:function
    critic: str = ""  # folder of a reward model to start a separate critic from; empty: one trunk for both, less memory
    prompts: str = "data/notes/prompts_train.jsonl"  # prompts to train on
    valid: str = "data/notes/prompts_eval.jsonl"  # held-out prompts; empty: none
    out: str = "out/ppo"  # folder to write
    save_every: int = 10  # iterations between two checkpoints
    log_every: int = 1  # iterations between two lines of metrics.jsonl
    steps: int = 50  # iterations: a batch of answers and the updates on it
    batch_size: int = 128  # answers per iteration
    epochs: int = 2  # passes over the answers of an iteration
    minibatches: int = 4  # optimizer steps per pass
    micro_batch: int = 16  # answers per forward pass of an update; 0: the whole minibatch at once
    max_new_tokens: int = 80  # longest answer
    temperature: float = 1.0  # sampling temperature, applied to log-probabilities too
    beta: float = 0.1  # weight of the KL penalty; with 0 the policy learns to hack the reward model
    kl_target: float = 0.0  # adapt beta to hold this KL, in nats per answer; 0: beta stays as it is
    kl_horizon: int = 10000  # answers in which beta moves by at most about 20%
    gamma: float = 1.0  # discount factor
    lam: float = 0.95  # GAE's lambda
    clip: float = 0.2  # range of the probability ratio: 1 - clip to 1 + clip
    value_clip: float = 0.2  # range of a value around its old value
    value_coef: float = 0.5  # weight of the value loss
    missing_end_score: float = -1.0  # score of an answer that does not end
    lr: float = 5e-4  # peak learning rate, falling linearly to 0; 1e-5 suits GPT-2 124M
    warmup: int = 5  # iterations in which the learning rate rises
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    eval_every: int = 20  # iterations between two evaluations on held-out prompts
    eval_prompts: int = 128  # held-out prompts to evaluate on

    def __post_init__(self):
        super().__post_init__()
        self.keep_apart("init", "reward", "critic")
        at_least(self, 1, "steps", "batch_size", "epochs", "minibatches", "max_new_tokens", "kl_horizon")
        at_least(self, 1, "eval_every", "eval_prompts")
        between(self, 0, 1, "gamma", "lam")
        if self.temperature < 1e-6:
            raise UserError("--temperature must be at least 1e-6: greedy answers have no ratio")


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """scores (B,), the rest (B, T) -> rewards (B, T): -beta k1 at every response token, the score on the last.

    Up to value_loss (B, T) is target-aligned, with response tokens where the mask is True. k1 = log pi - log pi_ref of
    the sampled token (joschu.net/blog/kl-approx.html) has mean KL(pi || pi_ref), and as a reward the right gradient.
    """
    rewards = (-beta * (logprobs - ref_logprobs)).masked_fill(~mask, 0.0)
    last = mask.long().cumsum(1).argmax(1, keepdim=True)  # (B, 1): where the count of response tokens is complete
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: (B, T) each -> advantages, returns (B, T), zero outside the mask.

    The value after the last token is 0: the episode is over. returns = advantages + values, the value's target.
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(x, mask, shift_mean=True):
    """(B, T) -> mean 0 and variance 1 over the mask (shift_mean=False keeps the mean), zero outside it."""
    mean = x.masked_fill(~mask, 0.0).sum() / mask.sum()
    variance = ((x - mean) ** 2).masked_fill(~mask, 0.0).sum() / mask.sum()
    white = (x - mean) / (variance + 1e-8).sqrt() + (0.0 if shift_mean else mean)
    return white.masked_fill(~mask, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, count=None):
    """PPO's clipped surrogate, negated: (B, T) each -> scalar, the sum over the mask / count (default: mask.sum())."""
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.max(unclipped, clipped).masked_fill(~mask, 0.0)
    return losses.sum() / (mask.sum() if count is None else count)


def value_loss(values, old_values, returns, mask, clip=0.2, count=None):
    """Half the squared error; moving a value by more than `clip` gains nothing: (B, T) each -> scalar."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    losses = torch.max((values - returns) ** 2, (clipped - returns) ** 2).masked_fill(~mask, 0.0)
    return 0.5 * losses.sum() / (mask.sum() if count is None else count)


def adapt(beta, kl, target, answers, horizon):
    """Ziegler et al.'s controller (arXiv 1909.08593): beta moves by at most about 20% per `horizon` answers."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * answers / horizon)


@dataclass
class Models:
    policy: GPT  # what is trained
    critic: GPT  # what predicts values: the policy, by a head on its trunk, or a network of its own
    reference: GPT  # the frozen SFT model
    score: object  # what judges: score(prompts, batch) -> (B,)


@torch.no_grad()
def rollout(models, tokenizer, prompts, prompt_ids, config, beta, noise) -> Batch:
    """Samples an answer to each prompt and computes what the updates need: a Batch, on the CPU. noise: see generate."""
    # Sample the answers. The first minibatch must reproduce these log-probabilities, and the values of a shared trunk.
    options = {"temperature": config.temperature, "noise": noise, "pad": tokenizer.pad}
    batch = generate(models.policy, prompt_ids, config.max_new_tokens, tokenizer.end, **options)
    if models.critic is not models.policy:
        values = models.critic.scalar(models.critic(batch.ids))[:, :-1]  # (B, T) -> (B, T-1)
        batch.values = values.masked_fill(~batch.mask, 0.0)
    # Log-probabilities under the reference
    hidden = models.reference(batch.ids)  # (B, T, C)
    batch.ref_logprobs = models.reference.logprobs(hidden, batch.ids, batch.index, config.temperature)  # (B, T-1)
    # Scores: the reward model has never seen an answer that does not end
    scores = models.score(prompts, batch).to(batch.logprobs)  # (B,)
    batch.scores = torch.where(batch.ended, scores, config.missing_end_score)
    # Rewards and advantages, on the host: a loop over the columns
    batch = batch.to("cpu")
    rewards = token_rewards(batch.scores, batch.logprobs, batch.ref_logprobs, batch.mask, beta)
    batch.advantages, batch.returns = gae(rewards, batch.values, batch.mask, config.gamma, config.lam)
    return batch


def minibatch_loss(models, batch, count, config):
    """The loss of some rows of a rollout, and its statistics as sums over tokens / count, so that parts add up."""
    # Policy loss
    hidden = models.policy(batch.ids)  # (B, T, C)
    logprobs = models.policy.logprobs(hidden, batch.ids, batch.index, config.temperature)  # (B, T-1)
    pg_loss = policy_loss(logprobs, batch.logprobs, batch.advantages, batch.mask, config.clip, count)
    # Value loss
    hidden = hidden if models.critic is models.policy else models.critic(batch.ids)  # (B, T, C)
    values = models.critic.scalar(hidden)[:, :-1]  # (B, T) -> (B, T-1)
    vf_loss = value_loss(values, batch.values, batch.returns, batch.mask, config.value_clip, count)
    # Health: on the first minibatch the ratio is 1 and all else 0, up to rounding
    with torch.no_grad():
        log_ratio = (logprobs - batch.logprobs).flatten()[batch.index]  # (N,)
        ratio = log_ratio.exp()
        advantages = batch.advantages.flatten()[batch.index]
        clipped_values = batch.values + (values - batch.values).clamp(-config.value_clip, config.value_clip)
        value_clips = (values - batch.returns) ** 2 < (clipped_values - batch.returns) ** 2  # (B, T-1)
        sums = {
            "policy/approxkl": 0.5 * log_ratio**2,
            "policy/approxkl_k3": ratio - 1 - log_ratio,
            "val/ratio": ratio,
            "policy/clipfrac": -advantages * ratio < -advantages * ratio.clamp(1 - config.clip, 1 + config.clip),
            "val/clipfrac": value_clips.flatten()[batch.index],
            "val/ratio_squares": (ratio - 1) ** 2,
        }
        stats = {name: x.sum() / count for name, x in sums.items()}
    stats |= {"loss/policy": pg_loss.detach(), "loss/value": vf_loss.detach()}
    return pg_loss + config.value_coef * vf_loss, stats


def update(run, models, optimizer, batch, config):
    """Exactly epochs x minibatches optimizer steps on one rollout. Returns the statistics of every step."""
    batch = replace(batch, advantages=whiten(batch.advantages, batch.mask))
    history = []
    for _ in range(config.epochs):
        for rows in torch.randperm(len(batch)).tensor_split(config.minibatches):
            rows = rows[batch.lengths[rows].argsort()]  # similar lengths together: less padding
            count = batch.mask[rows].sum()  # one denominator: the response tokens of the whole minibatch
            stats = {}
            for part in micro_batches(run.shard(rows), config.micro_batch):
                with run.autocast():
                    loss, sums = minibatch_loss(models, batch.rows(part).to(run.device), count, config)
                run.backward(loss)
                stats = {name: value + stats.get(name, 0.0) for name, value in sums.items()}
            stats = run.all_reduce(stats)
            stats["val/ratio_var"] = stats.pop("val/ratio_squares") - (stats["val/ratio"] - 1) ** 2
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


def statistics(batch, history, beta):
    """What to watch, by TRL's names (val/ratio is the policy's). Per-token means are over response tokens only."""
    answers = answer_means(batch)
    mask = batch.mask
    returns = batch.returns[mask]
    errors = (batch.returns - batch.values)[mask]
    distinct = {tuple(ids[m].tolist()) for ids, m in zip(batch.ids[:, 1:], mask, strict=True)}
    means = {f"objective/{name}": answers[name] for name in ("scores", "kl", "entropy")}
    means |= {name: sum(stats[name] for stats in history) / len(history) for name in history[0]}
    return means | {
        "val/first_approxkl": history[0]["policy/approxkl"],
        "val/first_ratio": history[0]["val/ratio"],
        "objective/non_score_reward": -beta * answers["kl"],
        "objective/rlhf_reward": answers["scores"] - beta * answers["kl"],
        "beta": beta,
        "val/explained_variance": 1 - errors.var(correction=0) / returns.var(correction=0),
        "returns/mean": returns.mean(),
        "returns/var": returns.var(correction=0),
        "advantages/mean": batch.advantages[mask].mean(),
        "response/length": mask.sum(1).float().mean(),
        "response/ended": answers["ended"],
        "response/distinct": len(distinct) / len(batch),
    }


def main(config: Config):
    run = Run("ppo", config)
    if config.minibatches * run.world > config.batch_size:
        raise UserError("--batch-size must be at least --minibatches times the number of processes")

    # models: the policy with its values, the reference it must stay near, and what judges the answers
    policy, tokenizer = load_model(config.init, run.device)
    block_size = policy.config.block_size
    reference = freeze(copy.deepcopy(policy))
    trained = {"model": policy}
    if config.critic:
        critic = load_reward_model(config.critic, tokenizer, config.init, block_size, run.device)
        trained["critic"] = critic.requires_grad_(True)  # it was loaded frozen
    else:
        critic = policy.add_head(std=0.0)  # values begin at 0
    score = load_reward(config.reward, tokenizer, config.init, block_size, run.device)
    models = Models(policy, critic, reference, score)

    # data
    longest = block_size - config.max_new_tokens
    prompts, prompt_ids = load_prompts(config.prompts, tokenizer, longest)
    valid, valid_ids = load_prompts(config.valid, tokenizer, longest, config.eval_prompts)

    parameters = [p for model in trained.values() for p in model.parameters()]
    optimizer = adamw(parameters, config.lr, eps=1e-5)
    state = {"beta": config.beta}

    def play(prompts, prompt_ids, noise):
        with run.autocast():
            return rollout(models, tokenizer, prompts, prompt_ids, config, state["beta"], noise)

    def report(step):
        generator = torch.Generator().manual_seed(config.seed)  # evaluation must not advance the training RNG
        noise = torch.rand(len(valid), config.max_new_tokens, generator=generator)
        means = answer_means(in_parts(play, valid, valid_ids, noise))
        run.log(step, {f"eval/{name}": value for name, value in means.items()})
        run.print(f"step {step}, held-out: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()))
        run.print(show_answers(policy, tokenizer, valid_ids[:3], config.max_new_tokens))

    # loop
    run.compile(*trained.values())
    first = run.start(trained, optimizer, tokenizer, state, save_head=False)  # a language model has no head
    if first is None:
        return
    order = chain.from_iterable(batches(prompt_ids, config.batch_size, config.seed, window=1))
    order = islice(order, first * config.batch_size, None)  # one endless stream
    if valid and first == 0:
        report(0)
    for step in run.steps(first, config.steps):
        lr = run.set_lr(optimizer, config.lr * schedule(step, config.steps, config.warmup))
        noise = torch.rand(config.batch_size, config.max_new_tokens)
        rows = run.shard(list(islice(order, config.batch_size)))
        asked, asked_ids = [prompts[i] for i in rows], [prompt_ids[i] for i in rows]
        batch = run.all_gather(in_parts(play, asked, asked_ids, run.shard(noise)))
        history = update(run, models, optimizer, batch, config)
        stats = statistics(batch, history, state["beta"])
        if config.kl_target:
            kl = stats["objective/kl"].item()
            state["beta"] = adapt(state["beta"], kl, config.kl_target, config.batch_size, config.kl_horizon)
        if run.due(step, config.log_every):
            run.log(step, stats | {"lr": lr})
        if valid and run.due(step, config.eval_every):
            report(step)
        run.save(step)
    run.finish()


if __name__ == "__main__":
    cli(main, Config)
