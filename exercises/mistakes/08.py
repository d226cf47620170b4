"""whiten of train_ppo.py, with one mistake. Find it by reading, then run the proofs."""


def whiten(x, mask, shift_mean=True):
    """(B, T) -> mean 0 and variance 1 over the mask (shift_mean=False keeps the mean), zero outside it."""
    mean = x.masked_fill(~mask, 0.0).sum() / mask.sum()
    variance = ((x - mean) ** 2).sum() / mask.sum()
    white = (x - mean) / (variance + 1e-8).sqrt() + (0.0 if shift_mean else mean)
    return white.masked_fill(~mask, 0.0)
