"""dpo_loss of train_dpo.py, with one mistake. Find it by reading, then run the proofs."""

import torch.nn.functional as F


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    """DPO, equation 7; with label smoothing e, conservative DPO: -(1-e) log sigma(beta h) - e log sigma(-beta h).

    Four vectors (B,) of summed log-probabilities, in nats per response. Returns (losses, chosen_rewards,
    rejected_rewards), (B,) each; the implicit rewards beta log(pi/pi_ref) are detached, for the log.
    """
    chosen_rewards = beta * (policy_chosen - ref_chosen)  # (B,)
    rejected_rewards = beta * (policy_rejected - ref_rejected)  # (B,)
    beta_h = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(beta_h) - label_smoothing * F.logsigmoid(beta_h)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
