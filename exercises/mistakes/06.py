"""token_rewards of train_ppo.py, with one mistake. Find it by reading, then run the proofs."""


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """scores (B,), the rest (B, T) -> rewards (B, T): -beta k1 at every response token, the score on the last.

    Up to value_loss (B, T) is target-aligned, with response tokens where the mask is True. k1 = log pi - log pi_ref of
    the sampled token (joschu.net/blog/kl-approx.html) has mean KL(pi || pi_ref), and as a reward the right gradient.
    """
    rewards = (-beta * (logprobs - ref_logprobs)).masked_fill(~mask, 0.0)
    last = mask.long().argmax(1, keepdim=True)  # (B, 1): where the count of response tokens is complete
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))
