"""Solutions of "Change two lines" in exercises/README.md. Try it first.

Each is a copy of train_dpo.py with these places changed: (the right code of DPO, what stands there instead). MISTAKES
has what one gets wrong, in the form of tests/proofs/mutants.py: (what is wrong, the right code, the wrong code).
"""

import functools
import sys
from types import ModuleType

from conftest import script_path

SIGNATURE = "dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):"
SUM = "return logprobs.sum(1)\n"
MEAN = "return logprobs.sum(1) / batch.mask.sum(1)\n"
CALL = "= dpo_loss("
VALUES = "1 - (torch.sigmoid(chosen_rewards - z) + torch.sigmoid(z - rejected_rewards)) / 2"  # KTO
LOSSES = "    losses = -(1 - label_smoothing) * F.logsigmoid(beta_h) - label_smoothing * F.logsigmoid(-beta_h)\n"

SOLUTIONS = {
    "simpo_loss": [
        (SIGNATURE, SIGNATURE.replace("dpo", "simpo").replace("label_smoothing=0.0", "gamma=0.5")),
        (CALL, "= simpo_loss("),
        ("    epochs: float", "    gamma: float = 0.5  # margin to reach\n    epochs: float"),
        ("config.beta, config.label_smoothing", "config.beta, config.gamma"),
        (SUM, MEAN),
        ("beta * (policy_chosen - ref_chosen)", "beta * policy_chosen"),
        ("beta * (policy_rejected - ref_rejected)", "beta * policy_rejected"),
        (LOSSES, "    losses = -F.logsigmoid(beta_h - gamma)\n"),
    ],
    "orpo_loss": [
        (SIGNATURE, SIGNATURE.replace("dpo", "orpo")),
        (CALL, "= orpo_loss("),
        (SUM, MEAN),
        ("beta * (policy_chosen - ref_chosen)", "policy_chosen - torch.log(-torch.expm1(policy_chosen))"),
        ("beta * (policy_rejected - ref_rejected)", "policy_rejected - torch.log(-torch.expm1(policy_rejected))"),
        (LOSSES, "    losses = -policy_chosen - beta * F.logsigmoid(beta_h)\n"),
    ],
    "kto_loss": [
        (SIGNATURE, SIGNATURE.replace("dpo", "kto")),
        (CALL, "= kto_loss("),
        (
            LOSSES,
            "    z = torch.cat([chosen_rewards, rejected_rewards]).mean().clamp(min=0).detach()  # beta z_0\n"
            f"    losses = {VALUES}\n",
        ),
    ],
}  # fmt: skip

MISTAKES = {
    "simpo_loss": [
        ("sums over the answers' tokens, not means", MEAN, SUM),
        ("the margin with the wrong sign", "beta_h - gamma", "beta_h + gamma"),
        ("the margin times beta", "beta_h - gamma", "beta_h - beta * gamma"),
        ("the margin left out", "beta_h - gamma", "beta_h"),
        ("with a reference", "beta * policy_chosen", "beta * (policy_chosen - ref_chosen)"),
        ("no gradient for the rejected answer", "policy_rejected  #", "policy_rejected.detach()  #"),
    ],
    "orpo_loss": [
        ("probabilities of whole answers", MEAN, SUM),
        ("the ratio of the probabilities, not of the odds", " - torch.log(-torch.expm1(policy_chosen))", ""),
        ("the odds upside down", "policy_chosen - torch.log(", "policy_chosen + torch.log("),
        ("without the SFT loss", "losses = -policy_chosen - beta", "losses = -beta"),
        ("SFT on the rejected answer too", "losses = -policy_chosen -", "losses = -policy_chosen - policy_rejected -"),
        ("lambda left out", "beta * F.logsigmoid(", "F.logsigmoid("),
    ],
    "kto_loss": [
        ("a gradient through z_0", ".clamp(min=0).detach()", ".clamp(min=0)"),
        ("z_0 below 0", ".mean().clamp(min=0)", ".mean()"),
        ("z_0 left out", "z = torch.cat", "z = 0 * torch.cat"),
        ("z_0 of the chosen answers only", "[chosen_rewards, rejected_rewards]).mean()", "[chosen_rewards]).mean()"),
        ("z_0 of every pair", "torch.cat([chosen_rewards, rejected_rewards]).mean()", "(chosen_rewards - beta_h / 2)"),
        ("the difference of a pair, as in DPO", VALUES, "1 - torch.sigmoid(beta_h)"),
        ("the rejected side with the wrong sign", "(z - rejected_rewards)", "(rejected_rewards - z)"),
        ("the sum over both sides, not the mean", VALUES, f"2 * ({VALUES})"),
    ],
}  # fmt: skip


def changed(text, places) -> str:
    """The text with each place, which occurs in it exactly once, changed."""
    for right, other in places:
        assert text.count(right) == 1, f"occurs {text.count(right)} times: {right}"
        text = text.replace(right, other)
    return text


def solution(name, *mistakes) -> str:
    """The text of a whole script with this loss."""
    return changed(changed(script_path("dpo").read_text(encoding="utf-8"), SOLUTIONS[name]), mistakes)


def module_of(text) -> ModuleType:
    """A script that is a text, as a module."""
    module = ModuleType("copy_of_train_dpo")
    sys.modules[module.__name__] = module  # where dataclass looks for it
    exec(compile(text, f"<{module.__name__}>", "exec"), vars(module))
    return module


@functools.cache
def solved(name) -> ModuleType:
    return module_of(solution(name))
