"""masked_cross_entropy of train_sft.py, with one mistake. Find it by reading, then run the proofs."""

from nanopost.model import token_nll


def masked_cross_entropy(logits, targets, mask, count=None, nll=token_nll):
    """Mean negative log-likelihood of the targets, in nats per token.

    logits (..., V), targets (...) int64, mask (...) bool. The sum over the mask is divided by `count`, the number of
    targets of the whole optimizer step (default: of this call, mask.sum()). Positions outside the mask have no
    influence and a gradient of exactly 0. nll is -log softmax(logits)[target] in fp32 (F.cross_entropy per token).
    """
    losses = nll(logits.flatten(0, -2), targets.flatten())  # (N,)
    losses = losses.masked_fill(~mask.flatten(), 0.0)
    return losses.sum() / (mask.numel() if count is None else count)
