"""minibatch_loss of train_ppo.py, with one mistake. Find it by reading, then run the proofs."""

import torch

from train_ppo import policy_loss, value_loss


def minibatch_loss(models, batch, count, config):
    """The loss of some rows of a rollout, and its statistics as sums over tokens / count, so that parts add up."""
    # Policy loss
    hidden = models.policy(batch.ids)  # (B, T, C)
    logprobs = models.policy.logprobs(hidden, batch.ids, batch.index)  # (B, T-1)
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
