"""gae of train_ppo.py, with one mistake. Find it by reading, then run the proofs."""

import torch


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
        advantage = (delta + lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values
