"""policy_loss of train_ppo.py, with one mistake. Find it by reading, then run the proofs."""

import torch


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, count=None):
    """PPO's clipped surrogate, negated: (B, T) each -> scalar, the sum over the mask / count (default: mask.sum())."""
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.min(unclipped, clipped).masked_fill(~mask, 0.0)
    return losses.sum() / (mask.sum() if count is None else count)
