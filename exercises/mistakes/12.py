"""group_advantages of forks/train_grpo.py, with one mistake. Find it by reading, then run the proofs."""


def group_advantages(rewards, k, baseline="loo", divide_by_std=False):
    """Rewards (B,), the k of a prompt side by side -> advantages (B,): how much better than its group an answer is.

    The mean of the others does not depend on the answer: the expected policy gradient stays what it is. The mean of all
    k does, and leaves (k-1)/k of it. Dividing by the standard deviation gives groups other weights."""
    groups = rewards.view(-1, k)  # (B/k, k)
    mean = groups.mean(1, keepdim=True)  # (B/k, 1)
    others = (k * mean - groups) / (k - 1)  # (B/k, k)
    advantages = groups - (others if baseline == "loo" else mean)
    spread = groups.std() + 1e-4 if divide_by_std else 1.0
    return (advantages / spread).flatten()  # (B,)
