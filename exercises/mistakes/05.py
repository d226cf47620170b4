"""pair_logprobs of train_dpo.py, with one mistake. Find it by reading, then run the proofs."""


def pair_logprobs(model, batch):
    """log pi(y|x) of both sides, summed over the answer's tokens: a Batch of B pairs -> chosen (B,), rejected (B,)."""
    logprobs = model.logprobs(model(batch.ids), batch.ids, batch.index)  # (2B, T-1), 0 outside the answers
    return logprobs.sum(1).div(batch.mask.sum(1)).chunk(2)  # (2B,) -> (B,), (B,)
