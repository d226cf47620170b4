"""pairwise_loss of train_rm.py, with one mistake. Find it by reading, then run the proofs."""

from nanopost.model import upcast


def pairwise_loss(chosen, rejected):
    """Bradley-Terry negative log-likelihood in nats per pair: chosen (B,), rejected (B,) rewards -> scalar."""
    return -(upcast(chosen) - upcast(rejected)).sigmoid().log().mean()
