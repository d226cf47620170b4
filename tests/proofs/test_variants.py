"""SimPO, ORPO and KTO: what a right answer to the third part of exercises/README.md has, by the formulas of the papers.

With --mine they look at the reader's copy of train_dpo.py, and at the solution without. All that they need of it is
batch_loss, and the options --beta and, for SimPO, --gamma.
"""

import pytest
import torch
from torch.nn.functional import logsigmoid

import solutions
import train_dpo
from enumerable import ANSWERS, gpt_logprobs, pairs_of, tiny_gpt
from measured import at_most, distance, same_gradient
from test_enumeration import SOME_PAIRS, gradient

LENGTHS = torch.tensor([len(answer) for answer in ANSWERS])  # in tokens, the end token among them


def variant(name):
    """train_dpo with the reader's functions in it, if this loss is one of them, or the solution."""
    return train_dpo if hasattr(train_dpo, name) else solutions.solved(name)


def losses_of(name, policy, reference, rows=SOME_PAIRS, **options):
    """The losses of pairs (i, j), answer i chosen: (B,)."""
    script, pairs = variant(name), pairs_of(rows)
    ref = script.reference_logprobs(reference, pairs, "cpu")
    return script.batch_loss(policy, pairs, ref, script.Config(**options), "cpu")[0]


def sides(logp, rows=SOME_PAIRS):
    """The numbers (40,) of the answers on both sides of the pairs: (B,), (B,)."""
    chosen, rejected = zip(*rows)
    return logp[list(chosen)], logp[list(rejected)]


def per_token(model):
    """log pi of the 40 answers, divided by their lengths: (40,)."""
    return gpt_logprobs(model) / LENGTHS


# ------------------------------------------------------------------------------------------- SimPO, arXiv 2405.14734


@pytest.mark.parametrize("beta, gamma", [(2.0, 0.5), (0.7, 1.6)])
def test_simpo_losses_are_equation_6_of_whole_answers(beta, gamma):
    """-log sigma(beta/|y_w| log pi(y_w) - beta/|y_l| log pi(y_l) - gamma): the margin is not multiplied by beta."""
    policy = tiny_gpt(1)
    found = losses_of("simpo_loss", policy, tiny_gpt(2), beta=beta, gamma=gamma)
    chosen, rejected = sides(per_token(policy))
    at_most(distance(found, torch.log1p((gamma - beta * (chosen - rejected)).exp())), 1e-12)


def test_simpo_does_not_look_at_the_reference():
    one, other = (losses_of("simpo_loss", tiny_gpt(1), tiny_gpt(seed), beta=2.0, gamma=0.5) for seed in (2, 3))
    at_most(distance(one, other), 0.0)


def test_simpo_gradient_is_that_of_equation_6():
    """-beta sigma(gamma - margin) [grad log pi(y_w) / |y_w| - grad log pi(y_l) / |y_l|]: every answer weighs as much,
    however long it is."""
    policy, (beta, gamma) = tiny_gpt(1), (2.0, 0.5)
    chosen, rejected = sides(per_token(policy))
    weight = torch.sigmoid(gamma - beta * (chosen - rejected)).detach()
    paper = (-beta * weight * (chosen - rejected)).mean()
    found = losses_of("simpo_loss", policy, tiny_gpt(2), beta=beta, gamma=gamma).mean()
    same_gradient(gradient(found, policy), gradient(paper, policy), 1e-10)


# -------------------------------------------------------------------------------------------- ORPO, arXiv 2403.07691


def odds(logp):
    return logp.exp() / (1 - logp.exp())


@pytest.mark.parametrize("lam", [0.1, 1.5])
def test_orpo_losses_are_equations_3_to_7(lam):
    """-log P(y_w) - lambda log sigma(log(odds(y_w) / odds(y_l))), with log P the mean over the answer's tokens."""
    policy = tiny_gpt(1)
    chosen, rejected = sides(per_token(policy))
    ratio = odds(chosen) / odds(rejected)
    found = losses_of("orpo_loss", policy, tiny_gpt(2), beta=lam)
    at_most(distance(found, -chosen - lam * logsigmoid(ratio.log())), 1e-12)


def test_orpo_does_not_look_at_the_reference():
    one, other = (losses_of("orpo_loss", tiny_gpt(1), tiny_gpt(seed), beta=0.5) for seed in (2, 3))
    at_most(distance(one, other), 0.0)


def test_orpo_gradient_is_that_of_equations_8_to_10():
    """Of the second term: delta h, with delta = 1 / (1 + odds(y_w) / odds(y_l)) and h = grad log P(y_w) / (1 - P(y_w))
    - grad log P(y_l) / (1 - P(y_l))."""
    policy, lam = tiny_gpt(1), 0.5
    chosen, rejected = sides(per_token(policy))
    delta = 1 / (1 + odds(chosen) / odds(rejected)).detach()
    h = chosen / (1 - chosen.exp().detach()) - rejected / (1 - rejected.exp().detach())
    paper = (-chosen - lam * delta * h).mean()
    found = losses_of("orpo_loss", policy, tiny_gpt(2), beta=lam).mean()
    same_gradient(gradient(found, policy), gradient(paper, policy), 1e-10)


# --------------------------------------------------------------------------------------------- KTO, arXiv 2402.01306

BOTH_WAYS = [(1, 2), (2, 1)]  # policy and reference: the mean log-ratio is above 0 in one, and below 0 in the other


def ratios(policy, reference, rows=SOME_PAIRS):
    """log pi / ref on both sides, (B,) each, and z_0: their mean, but not below 0."""
    chosen, rejected = sides(gpt_logprobs(policy) - gpt_logprobs(reference).detach(), rows)
    return chosen, rejected, max(0.0, torch.cat([chosen, rejected]).mean().item())


def test_kto_losses_are_the_mean_of_1_minus_v_over_both_sides():
    above = set()
    for pair in BOTH_WAYS:
        policy, reference = map(tiny_gpt, pair)
        chosen, rejected, z = ratios(policy, reference)
        value = torch.sigmoid(0.3 * (chosen - z)) + torch.sigmoid(0.3 * (z - rejected))
        at_most(distance(losses_of("kto_loss", policy, reference, beta=0.3), 1 - value / 2), 1e-12)
        above.add(z > 0)
    assert above == {True, False}


def test_kto_starts_at_one_half():
    losses = losses_of("kto_loss", tiny_gpt(1), tiny_gpt(1), beta=0.3)
    at_most(distance(losses, torch.full_like(losses, 0.5)), 1e-12)


@pytest.mark.parametrize("pair", BOTH_WAYS)
def test_kto_gradient_has_none_through_z(pair):
    """beta v (1 - v) of each side by itself: it vanishes for answers that moved far in either direction."""
    policy, reference = map(tiny_gpt, pair)
    chosen, rejected, z = ratios(policy, reference)
    good, bad = (torch.sigmoid(0.3 * x.detach()) for x in (chosen - z, z - rejected))
    paper = 0.3 * (bad * (1 - bad) * rejected - good * (1 - good) * chosen).mean() / 2
    found = losses_of("kto_loss", policy, reference, beta=0.3).mean()
    same_gradient(gradient(found, policy), gradient(paper, policy), 1e-10)


def test_kto_does_not_know_which_answers_were_a_pair():
    policy, reference = tiny_gpt(1), tiny_gpt(2)
    chosen, rejected = zip(*SOME_PAIRS)
    others = list(zip(chosen, rejected[1:] + rejected[:1]))
    one, other = (losses_of("kto_loss", policy, reference, rows, beta=0.3).mean() for rows in (SOME_PAIRS, others))
    at_most(abs(one - other), 1e-12)
    same_gradient(gradient(other, policy), gradient(one, policy), 1e-10)
