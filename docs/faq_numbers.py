"""Prints the numbers that faq.md quotes, from the runs that `make quickstart` left in out/.

    .venv/bin/python docs/faq_numbers.py
"""

import json
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from nanopost.checkpoint import load_model  # noqa: E402
from nanopost.data import collate, load_examples, load_prompts  # noqa: E402
from nanopost.sampling import generate  # noqa: E402
from train_ppo import token_rewards  # noqa: E402


def metrics(run):
    with open(f"out/{run}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def ends(run, name):
    """A metric's first and last value."""
    values = [line[name] for line in metrics(run) if name in line]
    return f"{name} of {run}: {values[0]:.4g} -> {values[-1]:.4g}"


def log_ratios(policy, reference, samples):
    """log pi - log ref of every answer, in nats (R,), by full forward passes at temperature 1."""
    index = samples.mask.flatten().nonzero()[:, 0]
    logp, ref = (model.logprobs(model(samples.ids), samples.ids, index) for model in (policy, reference))
    return logp - ref, (logp - ref).sum(1)


@torch.no_grad()
def main():
    (sft, tokenizer), (ppo, _) = load_model("out/sft"), load_model("out/ppo")
    reward, _ = load_model("out/rm", reward=True)
    prompts, ids = load_prompts("data/notes/prompts_eval.jsonl", tokenizer, 48)

    def sample(model, temperature=1.0):
        generator = torch.Generator().manual_seed(0)
        return generate(model, ids, 80, tokenizer.end, temperature=temperature, generator=generator, pad=tokenizer.pad)

    print("\n-- what is the loss on")
    batch = collate(load_examples("data/notes/sft_valid.jsonl", tokenizer))
    answers = [e for e in (batch.ids[:, 1:] == tokenizer.end) & batch.mask]
    ends_in_loss = int(torch.stack(answers).sum())
    tokens = int(batch.lengths.sum())
    print(f"{batch.targets} of {tokens} tokens are targets ({batch.targets / tokens:.0%}), of them {ends_in_loss} "
          f"<|end|>; the padded rows hold {batch.ids.numel()} ids")

    print("\n-- where the reward is placed: one answer of the PPO policy")
    samples = sample(ppo)
    tokens, kl = log_ratios(ppo, sft, samples)
    scores = reward.score(samples.ids, samples.lengths)
    row = int((samples.lengths - samples.prompt_lengths).argmin())
    paid = token_rewards(scores, tokens, torch.zeros_like(tokens), samples.mask, 0.1)[row]
    first, last = int(samples.prompt_lengths[row]), int(samples.lengths[row])
    for t in range(first, last):
        print(f"  {paid[t - 1]:+.3f} {tokenizer.decode([samples.ids[row, t]])!r}")
    print(f"  the score is {scores[row]:.3f}, the KL {kl[row]:.3f}, all rewards together {paid.sum():.3f}")

    print("\n-- the KL of PPO's policy, over", len(ids), "prompts")
    error = kl.std() / len(kl) ** 0.5
    print(f"mean {kl.mean():.2f} +- {error:.2f} nats an answer; {(kl < 0).float().mean():.0%} of the answers and "
          f"{(tokens[samples.mask] < 0).float().mean():.0%} of the tokens are below 0; the lowest answer {kl.min():.2f}")
    for name, model, temperature in (("sampled at temperature 0.7, measured at 1", ppo, 0.7),
                                     ("sampled from the reference, not from the policy", sft, 1.0)):
        other = log_ratios(ppo, sft, sample(model, temperature))[1]
        print(f"{name}: {other.mean():.2f} +- {other.std() / len(other) ** 0.5:.2f}")

    print("\n-- the first minibatch of every PPO iteration")
    lines = [line for line in metrics("ppo") if "val/first_ratio" in line]
    print(f"in {len(lines)} iterations the ratio is between {min(line['val/first_ratio'] for line in lines)} and "
          f"{max(line['val/first_ratio'] for line in lines)}, approxkl at most "
          f"{max(line['val/first_approxkl'] for line in lines):.1e}")

    for name in ("policy/clipfrac", "policy/approxkl"):
        print(f"{name}: at most {max(line[name] for line in lines):.3g}")

    print("\n-- out/report.json")
    with open("out/report.json") as f:
        report = json.load(f)
    print(f"reward model: accuracy {report['rm_accuracy']:.1%}, best possible {report['rm_accuracy_ceiling']:.1%}")
    for row in report["rows"]:
        print(f"{row['stage']}: gold {row['gold']:.2f}, score {row['reward']:.2f}, KL {row['kl']:.2f}")

    print("\n-- first and last of what is logged")
    for run, names in {"dpo": ["eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/chosen",
                               "eval/logps/rejected", "eval/rewards/chosen", "eval/rewards/rejected"],
                       "rm": ["eval/loss", "eval/accuracy", "eval/margin"],
                       "ppo": ["eval/scores", "eval/kl", "eval/entropy", "val/explained_variance", "policy/clipfrac",
                               "policy/approxkl", "objective/rlhf_reward"]}.items():
        print("\n".join(ends(run, name) for name in names))


if __name__ == "__main__":
    main()
