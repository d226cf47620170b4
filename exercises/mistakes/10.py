"""value_loss of train_ppo.py, with one mistake. Find it by reading, then run the proofs."""

import torch


def value_loss(values, old_values, returns, mask, clip=0.2, count=None):
    """Half the squared error; moving a value by more than `clip` gains nothing: (B, T) each -> scalar."""
    clipped = returns + (values - returns).clamp(-clip, clip)
    losses = torch.max((values - returns) ** 2, (clipped - returns) ** 2).masked_fill(~mask, 0.0)
    return 0.5 * losses.sum() / (mask.sum() if count is None else count)
