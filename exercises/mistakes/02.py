"""batch_loss of train_sft.py, with one mistake. Find it by reading, then run the proofs."""

from train_sft import masked_cross_entropy


def batch_loss(model, batch, count=None):
    """The loss of one micro-batch; `count` as in masked_cross_entropy. Logits exist only where the mask is True: these
    N positions are batch.index."""
    hidden = model(batch.ids)[:, :-1].flatten(0, 1)[batch.index]  # (B, T, C) -> (B, T-1, C) -> (N, C)
    targets = batch.ids[:, :-1].flatten()[batch.index]  # (N,)
    mask = batch.mask.flatten()[batch.index]  # (N,), all True: the selection above is already the mask
    return masked_cross_entropy(model.logits(hidden), targets, mask, count, model.nll)
