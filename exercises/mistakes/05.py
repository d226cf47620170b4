"""answer_logprobs of train_dpo.py, with one mistake. Find it by reading, then run the proofs."""


def answer_logprobs(model, batch):
    """log pi(y|x), summed over the answer's tokens: a Batch of B answers -> (B,)."""
    logprobs = model.logprobs(model(batch.ids), batch.ids, batch.index)  # (B, T-1), 0 outside the answers
    return logprobs.sum(1).div(batch.mask.sum(1))
