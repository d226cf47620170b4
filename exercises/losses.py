"""Fill in the loss. Eight functions, each with its formula and its shapes; the bodies are yours. README.md says how.

    python -m pytest tests/proofs --mine exercises/losses.py

Write one, run the line, write the next. While a function is not written, the script's own stands in for it.

Tensors with one number per token are target-aligned, (B, T): column t is about predicting the token after it. The mask
(B, T) is True at the tokens of the answer, the end token included; prompt is before them and padding behind. Outside
the mask may stand anything, infinity and NaN too, and no result may depend on it: use masked_fill, not a product.
`count` is the denominator of the whole optimizer step; None stands for mask.sum().
"""

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401

from nanopost.model import token_nll, upcast  # noqa: F401


def masked_cross_entropy(logits, targets, mask, count=None, nll=token_nll):
    """The loss of SFT: mean negative log-likelihood of the targets, in nats per token.

        L = - sum_n m_n log softmax(logits_n)[target_n]  /  count

    (InstructGPT, arXiv 2203.02155, section 3.5.)

    logits (..., V), targets (...) int64, mask (...) bool -> scalar.

    nll(logits (N, V), targets (N,)) -> (N,) gives -log softmax(logits)[target] of each row, in fp32. Positions outside
    the mask have no influence and a gradient of exactly 0.
    """
    raise NotImplementedError("your turn")


def pairwise_loss(chosen, rejected):
    """The loss of the reward model: Bradley-Terry negative log-likelihood, in nats per pair.

        L = - mean_b log sigma(chosen_b - rejected_b)

    (InstructGPT, arXiv 2203.02155, equation 1, with two answers to a prompt.)

    chosen (B,), rejected (B,) rewards, perhaps in half precision: upcast(x) makes them fp32 -> scalar.

    It stays finite for rewards of any size.
    """
    raise NotImplementedError("your turn")


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    """The loss of DPO, and the implicit rewards that it fits.

        h      = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]
        loss   = -(1 - e) log sigma(beta h) - e log sigma(-beta h)
        reward = beta [log pi(y|x) - log pi_ref(y|x)]

    (arXiv 2305.18290, equation 7, for e = label_smoothing = 0; any other e is conservative DPO. y_w: chosen, y_l:
    rejected.)

    Four vectors (B,) of log-probabilities, in nats per answer -> (losses, chosen_rewards, rejected_rewards), (B,) each.

    The losses are not averaged. The rewards are for the log: they have no gradient.
    """
    raise NotImplementedError("your turn")


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """What PPO is paid at every token: a penalty for leaving the reference, and the score at the end.

        R_t = -beta [log pi(y_t|s_t) - log pi_ref(y_t|s_t)],   plus the score on the last token of the answer

    (InstructGPT, arXiv 2203.02155, equation 2, token by token.)

    scores (B,), logprobs and ref_logprobs (B, T) of the sampled tokens, mask (B, T) -> (B, T), 0 outside the mask.

    The last token is the last True entry of its row of the mask. It earns its penalty as well.
    """
    raise NotImplementedError("your turn")


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation, and the targets of the value function.

        delta_t = R_t + gamma V_(t+1) - V_t
        A_t     = sum_(l >= 0) (gamma lam)^l delta_(t+l)
        G_t     = A_t + V_t

    (arXiv 1506.02438, equation 16.)

    rewards, values, mask (B, T) -> (advantages A, returns G), (B, T) each, 0 outside the mask.

    The sums end with the answer: after its last token the value is 0.
    """
    raise NotImplementedError("your turn")


def whiten(x, mask, shift_mean=True):
    """Mean 0 and variance 1 over the mask.

        (x - mean) / sqrt(variance + 1e-8),   plus the mean with shift_mean=False

    x (B, T), mask (B, T) -> (B, T), 0 outside the mask.

    Mean and variance are those of all entries in the mask together. The variance is the biased one: its denominator is
    their number.
    """
    raise NotImplementedError("your turn")


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, count=None):
    """PPO's clipped surrogate, negated, so that less is better.

        rho_t = pi(y_t|s_t) / pi_old(y_t|s_t)
        L     = sum_t max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps))  /  count

    (arXiv 1707.06347, equation 7.)

    logprobs, old_logprobs, advantages, mask (B, T); eps is `clip` -> scalar.

    Outside the mask the gradient is exactly 0, even where exp of what stands there would be infinite.
    """
    raise NotImplementedError("your turn")


def value_loss(values, old_values, returns, mask, clip=0.2, count=None):
    """Half the squared error of the values, clipped: moving one by more than `clip` gains nothing.

        V'_t = V_old_t + clip(V_t - V_old_t, -eps, eps)
        L    = 1/2 sum_t max((V_t - G_t)^2, (V'_t - G_t)^2)  /  count

    (As in OpenAI's baselines.)

    values V, old_values V_old, returns G, mask (B, T); eps is `clip` -> scalar.
    """
    raise NotImplementedError("your turn")
