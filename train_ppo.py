"""PPO for language models: raise a reward while a KL penalty holds the policy near the reference.

    max over pi:  E[ r(x, y) - beta log( pi(y|x) / pi_ref(y|x) ) ]          optimum  pi* = pi_ref exp(r / beta) / Z

(InstructGPT, arXiv 2203.02155, equation 2.) An answer is an episode, a token an action. Each iteration samples answers
and computes, with k_t = log pi_old(y_t|s_t) - log pi_ref(y_t|s_t),

    R_t = -beta k_t, plus the score r(x, y) on the last token                              rewards
    A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = R_t + gamma V(s_{t+1}) - V(s_t)   GAE, arXiv 1506.02438, eq. 16
    G_t = A_t + V(s_t)                                                                     target of the value function

then, for a few epochs over them, with rho_t = pi_theta(y_t|s_t) / pi_old(y_t|s_t) and A whitened, minimises

    L = mean_t max(-A rho, -A clip(rho, 1-eps, 1+eps))  +  c_v/2 mean_t max((V-G)^2, (clip(V, V_old +- eps_v) - G)^2)

(PPO, arXiv 1707.06347, equation 7; the clipped value is OpenAI's baselines'.) One trunk, unless --critic gives another.

    python train_ppo.py --init out/sft --reward out/rm --prompts data/notes/prompts_train.jsonl --out out/ppo
"""

import copy
from dataclasses import dataclass
from itertools import chain, islice

import torch

from nanopost.checkpoint import freeze, load_model
from nanopost.config import UserError, cli
from nanopost.data import PAD_TO, batches, load_prompts, split, to_device
from nanopost.reward import load_reward, load_reward_model
from nanopost.run import Options, Run, adamw, schedule
from nanopost.sampling import generate, show_answers


@dataclass
class Config(Options):
    init: str = "out/sft"  # the folder of the SFT model: where the policy starts, and the reference
    reward: str = "out/rm"  # the folder of a reward model, or a Python function: file.py:function
    critic: str = ""  # the folder of a reward model to start a separate value network from; empty: a shared trunk
    prompts: str = "data/notes/prompts_train.jsonl"  # prompts to train on
    valid: str = "data/notes/prompts_eval.jsonl"  # held-out prompts; empty: none
    out: str = "out/ppo"  # folder to write; an earlier run there is replaced
    save_every: int = 10  # iterations between two checkpoints
    log_every: int = 1  # iterations between two lines of metrics.jsonl
    steps: int = 50  # iterations: a batch of answers and the updates on it
    batch_size: int = 128  # answers an iteration
    epochs: int = 2  # passes over the answers of an iteration
    minibatches: int = 2  # optimizer steps a pass
    micro_batch: int = 32  # answers a forward pass; 0: the whole minibatch at once
    max_new_tokens: int = 80  # longest answer
    temperature: float = 1.0  # of sampling, and so of every log-probability
    beta: float = 0.1  # weight of the KL penalty; 0: none, watch the reward being hacked
    kl_target: float = 0.0  # adapt beta to hold this KL, in nats per answer; 0: beta stays
    kl_horizon: int = 10000  # answers in which beta changes by at most a fifth
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda
    clip: float = 0.2  # of the probability ratio
    value_clip: float = 0.2  # of the change of a value
    value_coef: float = 0.5  # weight of the value loss
    missing_end_score: float = -1.0  # the score of an answer that does not end
    lr: float = 5e-4  # learning rate at the start, falling linearly to 0; 1e-5 suits GPT-2 124M
    warmup: int = 5  # iterations with rising learning rate
    grad_clip: float = 1.0  # largest norm of the gradient; 0: none
    eval_every: int = 20  # iterations between two held-out evaluations
    eval_prompts: int = 128  # held-out prompts to answer then


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """scores (B,), the rest (B, T) -> rewards (B, T): -beta k1 at every response token, the score on the last.

    (B, T) is target-aligned here and below, with response tokens where the mask is True. k1 = log pi - log pi_ref of
    the sampled token has mean KL(pi || pi_ref), and as a reward the right gradient too.
    """
    rewards = (-beta * (logprobs - ref_logprobs)).masked_fill(~mask, 0.0)
    last = mask.long().cumsum(1).argmax(1, keepdim=True)  # (B, 1): where the count of response tokens is complete
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: (B, T) each -> advantages, returns (B, T), zero outside the mask.

    The value after the last token is 0: the episode is over. returns = advantages + values, the value's target.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t], next_value = advantage, values[:, t]
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
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return losses.masked_fill(~mask, 0.0).sum() / (mask.sum() if count is None else count)


def value_loss(values, old_values, returns, mask, clip=0.2, count=None):
    """Half the squared error, clipped so that a value moves no further than `clip` for free: (B, T) each -> scalar."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    losses = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return losses.masked_fill(~mask, 0.0).sum() / (mask.sum() if count is None else count)


@torch.no_grad()
def rollout(policy, critic, reference, score, prompts, prompt_ids, tokenizer, config, beta, noise=None):
    """Samples an answer to each prompt and computes all that the updates need; score(prompts, samples) -> (B,).

    Returns a dict, on the CPU: ids (B, T); lengths, scores, kl, entropy, ended (B,); the rest (B, T-1). Log-probs and
    values (of a shared trunk) are the sampling pass's; the first minibatch finds them again. noise: see generate.
    """
    samples = generate(policy, prompt_ids, config.max_new_tokens, tokenizer.end, temperature=config.temperature,
                       noise=noise, pad=tokenizer.pad)
    ids, mask, old = samples.ids, samples.mask, samples.logprobs
    index = mask.flatten().nonzero()[:, 0]
    ref = reference.logprobs(reference(ids), ids, index, config.temperature)
    values = samples.values if critic is None else critic.scalar(critic(ids))[:, :-1].masked_fill(~mask, 0.0)
    scores = torch.where(samples.ended, score(prompts, samples).to(old), config.missing_end_score)  # (B,)
    rewards = token_rewards(scores, old, ref, mask, beta)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    batch = dict(ids=ids, mask=mask, lengths=samples.lengths, old_logprobs=old, old_values=values, returns=returns,
                 advantages=advantages, scores=scores, kl=(old - ref).sum(1), entropy=-old.sum(1), ended=samples.ended)
    return {name: x.cpu() for name, x in batch.items()}


def minibatch_loss(policy, critic, batch, rows, count, config):
    """The loss of some rows of a rollout, and its statistics as sums over tokens / count, so that parts add up."""
    T = -(-int(batch["lengths"][rows].max()) // PAD_TO) * PAD_TO  # padding beyond the longest of these rows is cut off
    index = batch["mask"][rows, : T - 1].flatten().nonzero()[:, 0]  # (N,) of the response tokens
    names = "mask", "old_logprobs", "old_values", "returns", "advantages"
    tensors = [batch["ids"][rows, :T], index, *(batch[name][rows, : T - 1] for name in names)]
    ids, index, mask, old_logprobs, old_values, returns, advantages = (to_device(x, policy.device) for x in tensors)
    hidden = policy(ids)  # (B, T, C)
    logprobs = policy.logprobs(hidden, ids, index, config.temperature)  # (B, T-1)
    values = (policy.scalar(hidden) if critic is None else critic.scalar(critic(ids)))[:, :-1]  # (B, T-1)
    pg = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip, count)
    vf = value_loss(values, old_values, returns, mask, config.value_clip, count)
    with torch.no_grad():  # health: up to rounding all 0, and the ratio 1, on the first minibatch
        log_ratio = (logprobs - old_logprobs).flatten()[index]  # (N,)
        ratio, adv = log_ratio.exp(), advantages.flatten()[index]
        binds = -adv * ratio < -adv * ratio.clamp(1 - config.clip, 1 + config.clip)
        clipped = old_values + (values - old_values).clamp(-config.value_clip, config.value_clip)
        value_binds = ((values - returns) ** 2 < (clipped - returns) ** 2).flatten()[index]
        sums = {"policy/approxkl": 0.5 * log_ratio**2, "policy/approxkl_k3": ratio - 1 - log_ratio, "val/ratio": ratio,
                "policy/clipfrac": binds, "val/clipfrac": value_binds, "val/ratio_var": (ratio - 1) ** 2}
        stats = {name: x.sum() / count for name, x in sums.items()}
    return pg + config.value_coef * vf, {"loss/policy": pg.detach(), "loss/value": vf.detach(), **stats}


def update(run, policy, critic, optimizer, batch, config):
    """Exactly epochs x minibatches optimizer steps on one rollout; returns the statistics of every step."""
    batch, history = {**batch, "advantages": whiten(batch["advantages"], batch["mask"])}, []
    for _ in range(config.epochs):
        for rows in torch.randperm(len(batch["ids"])).tensor_split(config.minibatches):
            rows = rows[batch["lengths"][rows].argsort()]  # like lengths together: less padding
            count, total = batch["mask"][rows].sum(), {}  # one denominator: the whole minibatch's response tokens
            for part in split(run.shard(rows), config.micro_batch):
                with run.autocast():
                    loss, stats = minibatch_loss(policy, critic, batch, part, count, config)
                run.backward(loss)
                total = {name: value + total.get(name, 0.0) for name, value in stats.items()}
            total = run.sum(total)
            total["val/ratio_var"] -= (total["val/ratio"] - 1) ** 2  # so far it was the mean of (ratio - 1)^2
            history.append(total | {"grad_norm": run.update(optimizer, config.grad_clip)})
    return history


def statistics(batch, history, beta):
    """What to watch: per-token means are over response tokens only, KL and entropy are in nats per answer."""
    mask, kl, scores = batch["mask"], batch["kl"].mean(), batch["scores"].mean()
    returns, errors = batch["returns"][mask], (batch["returns"] - batch["old_values"])[mask]
    means = {name: sum(h[name] for h in history) / len(history) for name in history[0]}  # over the updates
    distinct = len({tuple(ids[m].tolist()) for ids, m in zip(batch["ids"][:, 1:], mask)})
    return {**means, "val/first_approxkl": history[0]["policy/approxkl"], "val/first_ratio": history[0]["val/ratio"],
            "objective/scores": scores, "objective/kl": kl, "objective/entropy": batch["entropy"].mean(),
            "objective/non_score_reward": -beta * kl, "objective/rlhf_reward": scores - beta * kl, "beta": beta,
            "val/explained_variance": 1 - errors.var(correction=0) / returns.var(correction=0),
            "returns/mean": returns.mean(), "returns/var": returns.var(correction=0),
            "advantages/mean": batch["advantages"][mask].mean(), "response/length": mask.sum(1).float().mean(),
            "response/ended": batch["ended"].float().mean(), "response/distinct": distinct / len(mask)}


def adapt(beta, kl, target, answers, horizon):
    """Ziegler et al.'s controller (arXiv 1909.08593): at most 20% up or down per `horizon` answers."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * answers / horizon) if target else beta


def main(config: Config):
    run = Run("ppo", config)
    # the policy, its values, the reference it must stay near, and what judges the answers
    policy, tokenizer = load_model(config.init, run.device)
    reference, block_size = freeze(copy.deepcopy(policy)), policy.config.block_size
    critic = (load_reward_model(config.critic, tokenizer, config.init, block_size, run.device).requires_grad_(True)
              if config.critic else None)
    if critic is None:
        policy.add_head(std=0.0)  # values begin at 0 and do not disturb the trunk
    score = load_reward(config.reward, tokenizer, config.init, block_size, run.device)
    room = block_size - config.max_new_tokens
    prompts, prompt_ids = load_prompts(config.prompts, tokenizer, room)
    valid, valid_ids = load_prompts(config.valid, tokenizer, room, config.eval_prompts) if config.valid else ([], [])
    if config.minibatches * run.world > config.batch_size or config.epochs < 1 or config.temperature <= 0:
        raise UserError("needed: --epochs >= 1, --temperature > 0 and --minibatches <= --batch-size (a process)")
    trained = {"model": policy} if critic is None else {"model": policy, "critic": critic}
    optimizer = adamw([p for model in trained.values() for p in model.parameters()], config.lr, eps=1e-5)

    def report(step):
        generator = torch.Generator().manual_seed(config.seed)  # looking must not change what comes next
        noise, beta = torch.rand(len(valid), config.max_new_tokens, generator=generator), run.extra["beta"]
        with run.autocast():
            batch = rollout(policy, critic, reference, score, valid, valid_ids, tokenizer, config, beta, noise)
        means = {f"eval/{name}": batch[name].float().mean() for name in ("scores", "kl", "entropy", "ended")}
        run.log(step, means)
        run.print(f"step {step}, held-out: " + ", ".join(f"{name[5:]} {value:.2f}" for name, value in means.items()))
        run.print(show_answers(policy, tokenizer, valid_ids[:3], config.max_new_tokens))

    if not run.begin(trained, optimizer, tokenizer, config.steps, beta=config.beta):
        return
    order = chain.from_iterable(batches([len(ids) for ids in prompt_ids], config.batch_size, config.seed, window=1))
    order = islice(order, run.start * config.batch_size, None)  # prompt after prompt, so that every batch is full
    if run.start == 0 and valid:
        report(0)
    for step in run.steps():
        beta, rows = run.extra["beta"], list(islice(order, config.batch_size))
        lr = run.set_lr(optimizer, config.lr * schedule(step, config.steps, config.warmup))
        mine, noise = run.shard(rows), run.shard(torch.rand(len(rows), config.max_new_tokens))
        with run.autocast():
            batch = run.gather(rollout(policy, critic, reference, score, [prompts[i] for i in mine],
                                       [prompt_ids[i] for i in mine], tokenizer, config, beta, noise))
        history = update(run, policy, critic, optimizer, batch, config)
        run.extra["beta"] = adapt(beta, batch["kl"].mean().item(), config.kl_target, len(rows), config.kl_horizon)
        if run.due(step, config.log_every):
            run.log(step + 1, {**statistics(batch, history, beta), "lr": lr})
        if run.due(step, config.eval_every) and valid:
            report(step + 1)
    run.finish()


if __name__ == "__main__":
    cli(main, Config)
