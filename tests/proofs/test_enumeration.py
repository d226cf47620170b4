"""By enumeration: what the scripts compute equals what the mathematics says, summed over all 40 answers.

Nothing is trained or sampled here (test_convergence.py does that), so every property is exact, to rounding. The
functions are the scripts' own; what they are compared with is written from the definitions in enumerable.py.
"""

import math
from dataclasses import replace

import pytest
import torch

import train_dpo
import train_grpo
import train_ipo
import train_ppo
import train_rm
import train_sft
from enumerable import (
    ANSWERS,
    EVERY_PAIR,
    EXAMPLES,
    FINISHED,
    IDS,
    LENGTHS,
    LONGEST,
    MASK,
    NOWHERE,
    STATE,
    STATES,
    exact_values,
    gpt_logprobs,
    kl,
    objective,
    optimum,
    pairs_of,
    randn,
    random_scores,
    random_table,
    soft_values,
    table_logprobs,
    table_of,
    tiny_gpt,
)
from measured import at_most, distance, relative, same_gradient
from nanopost.data import Batch, collate
from nanopost.run import Run

BETAS = [0.1, 0.5]


def gradient(loss, model):
    return [g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None]


# ------------------------------------------------------------------------------------------------- the world itself


def test_every_policy_gives_the_40_answers_probability_1_together():
    assert (len(ANSWERS), len(STATES), int(FINISHED.sum())) == (40, 13, 13)
    for logp in (table_logprobs(random_table(1)).sum(1), gpt_logprobs(tiny_gpt(1)), gpt_logprobs(tiny_gpt(2), [0])):
        at_most(abs(logp.exp().sum().item() - 1), 1e-12)


def test_the_optimum_is_better_than_its_neighbours_and_worth_beta_log_z():
    ref, scores = table_logprobs(random_table(1)).sum(1), random_scores(2)
    best, log_z = optimum(ref, scores, 0.5)
    at_most(abs(objective(best, ref, scores, 0.5) - 0.5 * log_z), 1e-12)
    for seed in range(5):
        near = (best + 0.1 * random_scores(seed)).log_softmax(0)
        assert objective(near, ref, scores, 0.5) < 0.5 * log_z - 1e-4


# ------------------------------------------------------------------------------------------- SFT: what is the loss on


def answers_nll(model):
    """- log pi(answer) over all answers, per token: the definition of the SFT loss on the 40 examples."""
    return -gpt_logprobs(model).sum() / MASK.sum()


def test_sft_loss_and_gradient_are_those_of_the_answers_probabilities():
    model = tiny_gpt()
    loss = train_sft.batch_loss(model, collate(EXAMPLES))
    at_most(distance(loss, answers_nll(model)), 1e-12)
    at_most(relative(gradient(loss, model), gradient(answers_nll(model), model)), 1e-12)


def test_sft_does_not_see_what_the_padding_holds_nor_the_order_of_the_rows():
    model = tiny_gpt()

    def loss_and_gradient(batch):
        loss = train_sft.batch_loss(model, batch)
        return [loss, *gradient(loss, model)]

    expected = loss_and_gradient(collate(EXAMPLES))
    for other in (collate(EXAMPLES, pad_id=3), collate(EXAMPLES[::-1])):
        at_most(distance(loss_and_gradient(other), expected), 1e-12)


def test_sft_held_out_loss_is_the_mean_over_all_target_tokens_without_dropout():
    model = tiny_gpt().train()
    expected = answers_nll(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    at_most(abs(train_sft.evaluate(model, EXAMPLES, "cpu", batch_size=7) - expected), 1e-12)
    assert model.training  # and goes on with it


def test_sft_gradient_at_the_logits_of_prompt_and_padding_is_exactly_0():
    logits = randn(*MASK.shape, 4, seed=1).requires_grad_()
    train_sft.masked_cross_entropy(logits, IDS[:, 1:], MASK).backward()
    assert (logits.grad[~MASK] == 0).all() and (logits.grad[MASK] != 0).all()


def test_sft_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary():
    targets = torch.tensor([[0, 50256]])
    loss = train_sft.masked_cross_entropy(torch.zeros(1, 2, 50257).double(), targets, targets >= 0)
    at_most(abs(loss.item() - math.log(50257)), 1e-12)


# ----------------------------------------------------------------------------------------- reward model: Bradley-Terry

FIRST, SECOND = torch.tensor(EVERY_PAIR).T  # (1560,) each


def each(loss, *vectors):
    """The loss of every pair by itself, (P,): so that expectations over pairs can be written down."""
    return torch.func.vmap(loss)(*(v[:, None] for v in vectors))


def minimise(loss, x, steps=2000):
    """A minimum of loss() over the tensor x, to rounding."""
    options = dict(tolerance_grad=1e-12, tolerance_change=1e-16, history_size=50, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([x], max_iter=steps, **options)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_rm_loss_over_all_noisy_labels_is_least_at_the_true_rewards():
    """People prefer i to j with probability sigma(r_i - r_j); the fitted rewards are r, up to a constant."""
    truth = random_scores(1)
    prefer = torch.sigmoid(truth[FIRST] - truth[SECOND])
    fitted = torch.zeros_like(truth, requires_grad=True)
    minimise(lambda: (prefer * each(train_rm.pairwise_loss, fitted[FIRST], fitted[SECOND])).mean(), fitted)
    error = (fitted - truth).detach()
    at_most((error - error.mean()).abs().max(), 1e-6)


def test_rm_gradient_is_sigma_of_the_error_and_none_for_the_bias():
    model = tiny_gpt().add_head(std=0.5)
    pairs = pairs_of(EVERY_PAIR[::40])
    chosen, rejected = train_rm.score_pairs(model, pairs, "cpu")
    for scores in (chosen, rejected):
        scores.retain_grad()
    train_rm.pairwise_loss(chosen, rejected).backward()
    wrong = torch.sigmoid(rejected - chosen).detach() / len(pairs)
    at_most(distance([chosen.grad, rejected.grad], [-wrong, wrong]), 1e-15)
    at_most(abs(model.head.bias.grad.item()), 1e-15)


def test_rm_score_is_the_head_on_the_last_real_token_in_a_batch_of_any_padding():
    model = tiny_gpt().add_head(std=0.5)
    pairs = pairs_of((i, 39 - i) for i in range(40))
    chosen, rejected = train_rm.score_pairs(model, pairs, "cpu")
    alone = torch.stack([model.scalar(model(torch.tensor([e.ids])))[0, -1] for e in EXAMPLES])
    at_most(distance([chosen, rejected], [alone, alone.flip(0)]), 1e-12)


class Judge:
    """Stands for a perfect reward model: it scores an answer by its true reward."""

    def __init__(self, truth):
        self.truth = {tuple(e.ids): r for e, r in zip(EXAMPLES, truth)}

    def score(self, ids, lengths):
        return torch.stack([self.truth[tuple(row[:n])] for row, n in zip(ids.tolist(), lengths.tolist())])


def test_rm_accuracy_of_a_perfect_model_is_the_ceiling_that_the_noise_of_the_labels_sets():
    """Rewards that are multiples of log 3, each pair as often as its odds say: of 3^k + 1 people, 1 disagrees."""
    levels = [i % 3 for i in range(len(ANSWERS))]
    pairs, ceiling, floor = [], 0, 0.0
    for i, j in EVERY_PAIR[::7]:
        k = levels[i] - levels[j]
        if k > 0:
            pairs += pairs_of([(i, j)] * 3**k + [(j, i)])
            p = 3**k / (3**k + 1)
            ceiling += 3**k
            floor -= (3**k + 1) * (p * math.log(p) + (1 - p) * math.log(1 - p))
    result = train_rm.evaluate(Judge(math.log(3) * torch.tensor(levels).double()), pairs, "cpu")
    at_most(abs(result["accuracy"].item() - ceiling / len(pairs)), 1e-6)
    at_most(abs(result["loss"].item() - floor / len(pairs)), 1e-12)  # the entropy of the labels


# -------------------------------------------------------------------------------------------------------- DPO


def dpo_on_gpt(policy, reference, rows, beta, smoothing=0.0):
    pairs = pairs_of(rows)
    ref = train_dpo.reference_logprobs(reference, pairs, "cpu", batch_size=7)
    config = train_dpo.Config(beta=beta, label_smoothing=smoothing)
    return train_dpo.batch_loss(policy, pairs, ref, config, "cpu")


SHORT = [i for i, answer in enumerate(ANSWERS) if len(answer) < LONGEST]
SOME_PAIRS = EVERY_PAIR[::31] + [(SHORT[0], SHORT[1]), (SHORT[2], SHORT[0])]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_losses_are_equation_7_on_whole_answers(smoothing):
    """With smoothing, a share of the labels is taken to be wrong: -(1-e) log sigma(beta h) - e log sigma(-beta h)."""
    policy, reference, rows = tiny_gpt(1), tiny_gpt(2), SOME_PAIRS
    losses, _ = dpo_on_gpt(policy, reference, rows, 0.3, smoothing)
    moved = gpt_logprobs(policy) - gpt_logprobs(reference)
    beta_h = 0.3 * torch.stack([moved[i] - moved[j] for i, j in rows])
    right, wrong = torch.log1p((-beta_h).exp()), torch.log1p(beta_h.exp())
    at_most(distance(losses, (1 - smoothing) * right + smoothing * wrong), 1e-12)


def test_dpo_log_probabilities_and_rewards_are_those_of_whole_answers():
    """Sums over all tokens, the end token among them, and the reference's for the same answers. True of any loss."""
    policy, reference = tiny_gpt(1), tiny_gpt(2)
    _, stats = dpo_on_gpt(policy, reference, SOME_PAIRS, beta=0.3)
    pi, ref = gpt_logprobs(policy), gpt_logprobs(reference)
    for side, name in enumerate(("chosen", "rejected")):
        answers = [pair[side] for pair in SOME_PAIRS]
        at_most(distance(stats[f"logps/{name}"], pi[answers]), 1e-12)
        at_most(distance(stats[f"rewards/{name}"], 0.3 * (pi - ref)[answers]), 1e-12)
    at_most(distance(stats["rewards/margins"], stats["rewards/chosen"] - stats["rewards/rejected"]), 1e-12)
    assert not any(stat.requires_grad for stat in stats.values())


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_dpo_gradient_is_the_one_of_the_paper(dtype, bound):
    """The display after equation 7: -beta sigma(-beta h) [grad log pi(chosen) - grad log pi(rejected)]."""
    policy, reference, rows = tiny_gpt(1).to(dtype), tiny_gpt(2).to(dtype), [(0, 39), (5, 8), (30, 2), (17, 11)]
    losses, stats = dpo_on_gpt(policy, reference, rows, beta=0.3)
    wrong = torch.sigmoid(-stats["rewards/margins"])
    logp = gpt_logprobs(policy)
    paper = -0.3 * sum(w * (logp[i] - logp[j]) for w, (i, j) in zip(wrong, rows)) / len(rows)
    same_gradient(gradient(losses.mean(), policy), gradient(paper, policy), bound)


def test_dpo_starts_at_ln_2_with_margin_0_and_accuracy_0():
    losses, stats = dpo_on_gpt(tiny_gpt(1), tiny_gpt(1), EVERY_PAIR[::31], beta=0.3)
    at_most(distance(losses, torch.full_like(losses, math.log(2))), 1e-12)
    at_most(stats["rewards/margins"].abs().max(), 1e-12)
    pairs, policy = pairs_of(EVERY_PAIR[::31]), tiny_gpt(1)
    its_own = torch.stack(train_dpo.pair_logprobs(policy, pairs, "cpu"), dim=1).detach()
    stats = train_dpo.batch_loss(policy, pairs, its_own, train_dpo.Config(), "cpu")[1]
    assert (stats["rewards/accuracies"] == 0).all()  # a tie is not right


@pytest.mark.parametrize("smoothing", [0.1, 0.25])
def test_conservative_dpo_stops_where_the_margin_says_how_often_labels_are_wrong(smoothing):
    """Its loss is least at beta h = log((1 - e) / e); plain DPO (e = 0) has no such place and goes on for ever."""
    zero, beta = torch.zeros(1).double(), 0.1
    margin = torch.zeros(1).double().requires_grad_()
    minimise(lambda: train_dpo.dpo_loss(margin, zero, zero, zero, beta, smoothing)[0].sum(), margin, 200)
    at_most(abs(margin.item() - math.log((1 - smoothing) / smoothing) / beta), 1e-5)


@pytest.mark.parametrize("pairs_from", ["every pair alike", "samples of the reference"])
@pytest.mark.parametrize("beta", BETAS)
def test_dpo_on_the_preferences_of_everybody_has_its_minimum_at_the_optimum_of_rlhf(beta, pairs_from):
    """Equations 4 to 7: fitted to labels of probability sigma(r_i - r_j), the policy is pi* = ref exp(r/beta) / Z, its
    implicit reward is r, and its loss that of the best reward model. Which pairs are compared does not matter."""
    table, scores = random_table(3), random_scores(4)
    ref = table_logprobs(table).sum(1)
    often = torch.ones(len(FIRST)).double() if pairs_from == "every pair alike" else (ref[FIRST] + ref[SECOND]).exp()
    weights = often / often.sum() * torch.sigmoid(scores[FIRST] - scores[SECOND]) * 2

    def loss(logp):
        return (weights * train_dpo.dpo_loss(logp[FIRST], logp[SECOND], ref[FIRST], ref[SECOND], beta)[0]).sum()

    theta = table.clone().requires_grad_()
    minimise(lambda: loss(table_logprobs(theta).sum(1)), theta, 4000)
    found, (best, _) = table_logprobs(theta.detach()).sum(1), optimum(ref, scores, beta)
    at_most(0.5 * (found.exp() - best.exp()).abs().sum(), 1e-5)
    implicit = beta * (found - ref) - scores
    at_most((implicit - implicit.mean()).abs().max(), 1e-4)
    as_rewards = (weights * each(train_rm.pairwise_loss, scores[FIRST], scores[SECOND])).sum()
    at_most(abs(loss(found) - as_rewards), 1e-10)


# ------------------------------------------------------------------------------------ PPO: rewards, values, advantages


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("beta", BETAS)
def test_at_the_optimum_every_answer_earns_beta_log_z_and_every_advantage_is_0(beta, lam):
    """The soft Bellman equation. So near its goal PPO's gradient noise vanishes, and it can settle there."""
    reference, scores = random_table(1), random_scores(2)
    ref = table_logprobs(reference)
    best, log_z = optimum(ref.sum(1), scores, beta)
    rewards = train_ppo.token_rewards(scores, table_logprobs(table_of(best)), ref, MASK, beta)
    at_most((rewards.sum(1) - beta * log_z).abs().max(), 1e-12)
    values = soft_values(reference, scores, beta)[STATE]
    advantages, returns = train_ppo.gae(rewards, values, MASK, 1.0, lam)
    at_most(advantages.abs().max(), 1e-12)
    at_most(distance(returns, values.masked_fill(~MASK, 0.0)), 1e-12)


def test_the_expected_penalty_is_beta_times_the_kl():
    policy, ref = table_logprobs(random_table(1)), table_logprobs(random_table(2))
    rewards = train_ppo.token_rewards(torch.zeros(40).double(), policy, ref, MASK, 0.3)
    p, q = policy.sum(1), ref.sum(1)
    at_most(abs((p.exp() * rewards.sum(1)).sum() + 0.3 * kl(p, q)), 1e-12)
    assert (rewards.sum(1) > 0).any()  # of a single answer the estimate may well be negative


def test_of_the_usual_estimators_only_k1_has_the_right_gradient_as_a_reward():
    """As a reward: k1 pulls towards the reference; k3, whose mean is the same KL, does not. Differentiated as a loss:
    k1 does nothing at all, and k3 is the KL the other way round (arXiv 2506.09477)."""
    ref = table_logprobs(random_table(2)).sum(1)
    theta = (random_table(2) + 0.7 * random_table(3)).requires_grad_()
    logp = table_logprobs(theta).sum(1)
    p, k1 = logp.exp().detach(), logp - ref  # of whole answers
    k3 = (-k1).exp() - 1 + k1
    at_most(abs((p * k1).sum() - kl(logp, ref)), 1e-12)
    at_most(abs((p * k3).sum() - kl(logp, ref)), 1e-12)

    def slope(x):
        return torch.autograd.grad(x, theta, retain_graph=True)[0]

    right, reverse = slope(kl(logp, ref)), slope(kl(ref, logp))
    at_most(relative([slope((p * k1.detach() * logp).sum())], [right]), 1e-12)
    at_most(relative([slope((p * k3.detach() * logp).sum())], [right - reverse]), 1e-12)
    assert relative([right - reverse], [right]) > 0.5
    at_most(slope((p * k1).sum()).abs().max(), 1e-12)
    at_most(relative([slope((p * k3).sum())], [reverse]), 1e-12)


@pytest.mark.parametrize("mu, spread", [(0.1, 20.0), (1.0, 2.0)])
def test_k1_of_two_gaussians_has_schulmans_mean_and_spread(mu, spread):
    """joschu.net/blog/kl-approx.html: pi = N(0, 1), reference = N(mu, 1), KL = mu^2 / 2, by Gauss-Hermite sums."""
    import numpy as np

    x, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    weights, one = weights / weights.sum(), torch.ones(60, 1, dtype=torch.bool)
    logp, ref, zero = (-(x**2) / 2)[:, None], (-((x - mu) ** 2) / 2)[:, None], torch.zeros(60).double()
    k1 = -train_ppo.token_rewards(zero, logp, ref, one, 1.0)[:, 0]
    mean = (weights * k1).sum().item()
    at_most(abs(mean - mu**2 / 2), 1e-12)
    at_most(abs(((weights * k1**2).sum().item() - mean**2) ** 0.5 / mean - spread), 1e-9)


# --------------------------------------------------------------------------------------- PPO: the surrogate's gradient


def everything_as_a_rollout(policy, reference, scores, beta, lam, values=None):
    """All 40 answers as the Batch of a rollout, with the exact values of the states unless others are given."""
    batch = Batch(IDS, MASK, LENGTHS)
    with torch.no_grad():
        batch.logprobs, ref = (m.logprobs(m(IDS), IDS, batch.index) for m in (policy, reference))
        rewards = train_ppo.token_rewards(scores, batch.logprobs, ref, MASK, beta)
        batch.values = exact_values(batch.logprobs, rewards)[STATE] if values is None else values
        batch.advantages, batch.returns = train_ppo.gae(rewards, batch.values, MASK, 1.0, lam)
    return batch


def everything_as_groups(policy, reference, scores):
    """All 40 answers as the Batch of GRPO's rollout."""
    batch = Batch(IDS, MASK, LENGTHS, scores=scores, ended=FINISHED)
    with torch.no_grad():
        batch.logprobs, batch.ref_logprobs = (m.logprobs(m(IDS), IDS, batch.index) for m in (policy, reference))
    return batch


def own_rollout(policy):
    """Everything as a rollout, with the values of the policy's own head, as rollout() makes it."""
    values = policy.scalar(policy(IDS))[:, :-1].detach().masked_fill(~MASK, 0.0)
    return everything_as_a_rollout(policy, tiny_gpt(2), random_scores(3), 0.3, 0.95, values)


def probabilities(policy):
    """The probability of every answer, (40, 1): what weighs the rows of a Batch in an expectation."""
    return gpt_logprobs(policy).detach().exp()[:, None]


def surrogate_gradient(policy, batch, advantages):
    """Of the expected surrogate. It is linear in the advantages: an answer's probability is a factor of them."""
    batch = replace(batch, advantages=probabilities(policy) * advantages)
    models = train_ppo.Models(policy, policy, None, None)
    loss, _ = train_ppo.minibatch_loss(models, batch, 1, train_ppo.Config(value_coef=0.0))
    return [-g for g in gradient(loss, policy)[: len(list(policy.parameters())) - 2]]  # without the value head's


def objective_gradient(policy, reference, scores, beta):
    value = objective(gpt_logprobs(policy), gpt_logprobs(reference).detach(), scores, beta)
    return gradient(value, policy)


NOISE = randn(len(STATES), seed=9)[STATE]  # values of the states that have nothing to do with anything


@pytest.mark.parametrize(
    "lam, values",
    [(1.0, 0 * NOISE), (1.0, NOISE), (0.0, None), (0.95, None)],
    ids=["lambda 1, no values", "lambda 1, any values", "lambda 0, true values", "lambda .95, true values"],
)
def test_the_ppo_surrogate_has_exactly_the_gradient_of_the_objective(lam, values):
    """At ratio 1 the expected surrogate's gradient is that of E[r] - beta KL, through the whole model. The values are
    only a baseline where lambda is 1; below 1 they must be the true ones."""
    policy, reference, scores = tiny_gpt(1).add_head(std=0.0), tiny_gpt(2), random_scores(3)
    batch = everything_as_a_rollout(policy, reference, scores, 0.3, lam, values)
    found = surrogate_gradient(policy, batch, batch.advantages)
    same_gradient(found, objective_gradient(policy, reference, scores, 0.3), 1e-10)


def test_whitening_changes_the_length_of_the_gradient_and_not_its_direction():
    """A constant added to all advantages adds nothing on average, because the probabilities sum to 1."""
    policy, reference, scores = tiny_gpt(1).add_head(std=0.0), tiny_gpt(2), random_scores(3)
    batch = everything_as_a_rollout(policy, reference, scores, 0.3, 1.0, 0 * NOISE)
    std = batch.advantages[MASK].std(correction=0)
    found = surrogate_gradient(policy, batch, std * train_ppo.whiten(batch.advantages, MASK))
    same_gradient(found, objective_gradient(policy, reference, scores, 0.3), 1e-7)


def test_whitened_advantages_do_not_depend_on_the_rewards_scale_and_zero():
    """Without a penalty: from r to 5 r - 2, every answer's advantage is the same."""
    scores, logp = random_scores(1), table_logprobs(random_table(1))
    white = []
    for r in (scores, 5 * scores - 2):
        rewards = train_ppo.token_rewards(r, logp, logp, MASK, beta=0.0)
        white.append(train_ppo.whiten(train_ppo.gae(rewards, 0 * NOISE, MASK, 1.0, 1.0)[0], MASK))
    at_most(distance(*white), 1e-7)


def expected_statistics(policy, old):
    """The expectation, over the answers of `old`, of what minibatch_loss logs for `policy`, summed over the tokens."""
    batch = everything_as_a_rollout(old, old, random_scores(1), 0.0, 1.0)
    models = train_ppo.Models(policy, policy, None, None)
    with torch.no_grad():
        rows = [batch.rows(torch.tensor([i])) for i in range(40)]
        each = [train_ppo.minibatch_loss(models, row, 1, train_ppo.Config())[1] for row in rows]
    return {name: sum(p * stats[name] for p, stats in zip(probabilities(old), each)).item() for name in each[0]}


def test_logged_ratio_and_kl_are_unbiased():
    """E_old[ratio] = 1 per token, and the mean of ratio - 1 - log ratio is KL(old || new), for any two policies."""
    new, old = tiny_gpt(1).add_head(std=0.0), tiny_gpt(2)
    stats, p, q = expected_statistics(new, old), gpt_logprobs(old).detach(), gpt_logprobs(new).detach()
    at_most(abs(stats["val/ratio"] - (p.exp() * MASK.sum(1)).sum().item()), 1e-10)
    at_most(abs(stats["policy/approxkl_k3"] - kl(p, q).item()), 1e-10)


def test_the_loss_of_a_minibatch_and_its_statistics_are_their_definitions_once_the_policy_has_moved():
    """All of them over the response tokens alone, with the clips and the coefficient of the configuration."""
    policy = tiny_gpt(1).add_head(std=0.5)
    batch = own_rollout(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * randn(*p.shape, seed=7)
    config = train_ppo.Config(clip=0.1, value_clip=0.3, value_coef=0.7)
    models = train_ppo.Models(policy, policy, None, None)
    loss, stats = train_ppo.minibatch_loss(models, batch, MASK.sum(), config)
    logp = policy.logits(policy(IDS)).log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    ratio, advantage = (logp - batch.logprobs)[MASK].exp(), batch.advantages[MASK]
    value, old, target = (x[MASK] for x in (policy.scalar(policy(IDS))[:, :-1], batch.values, batch.returns))
    too_far = torch.where(advantage > 0, ratio > 1.1, ratio < 0.9)
    clipped_error = (torch.clamp(value, old - 0.3, old + 0.3) - target) ** 2
    expected = {
        "loss/policy": -torch.where(too_far, ratio.clamp(0.9, 1.1) * advantage, ratio * advantage).mean(),
        "loss/value": torch.maximum((value - target) ** 2, clipped_error).mean() / 2,
        "val/ratio": ratio.mean(),
        "val/ratio_squares": ((ratio - 1) ** 2).mean(),
        "policy/approxkl": (ratio.log() ** 2).mean() / 2,
        "policy/approxkl_k3": (ratio - 1 - ratio.log()).mean(),
        "policy/clipfrac": too_far.double().mean(),
        "val/clipfrac": (clipped_error > (value - target) ** 2).double().mean(),
    }
    assert stats.keys() == expected.keys()
    for name, number in expected.items():
        at_most(abs(stats[name] - number), 1e-6)  # shares are logged in single precision
    at_most(abs(loss - expected["loss/policy"] - 0.7 * expected["loss/value"]), 1e-12)
    assert 0.1 < expected["policy/clipfrac"] < 0.9 and 0.1 < expected["val/clipfrac"] < 0.9


def test_the_best_value_function_is_the_expected_return():
    """Minimised over the values of all states, the value loss on lambda = 1 returns gives V(s) of the policy."""
    logp = table_logprobs(random_table(1))
    rewards = train_ppo.token_rewards(random_scores(2), logp, table_logprobs(random_table(2)), MASK, 0.3)
    _, returns = train_ppo.gae(rewards, NOISE, MASK, 1.0, 1.0)
    weights, values = logp.sum(1).exp(), torch.zeros(len(STATES)).double().requires_grad_()

    def loss():
        guess = values[STATE]
        each_row = [train_ppo.value_loss(guess[i], guess[i].detach(), returns[i], MASK[i], count=1) for i in range(40)]
        return (weights * torch.stack(each_row)).sum()

    minimise(loss, values, 100)
    at_most(distance(values.detach(), exact_values(logp, rewards)), 1e-6)


# ------------------------------------------------------------------------------------- one step of each of the scripts

SCRIPTS = {
    "sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": train_ppo, "ipo": train_ipo, "grpo": train_grpo
}  # fmt: skip
PAIRS = pairs_of(EVERY_PAIR[::151])  # 11 pairs of different lengths


class Training:
    """A script's own update() on all answers or pairs, by plain gradient descent with learning rate 1."""

    def __init__(self, script, micro_batch=0, grad_clip=0.0, backwards=False):
        whole = dict(epochs=1, minibatches=1, clip=99.0)  # one step on all answers
        options = {"ppo": dict(value_clip=99.0, **whole), "grpo": dict(batch_size=40, **whole)}.get(script, {})
        common = dict(device="cpu", out=NOWHERE, micro_batch=micro_batch, grad_clip=grad_clip)
        self.script, self.config = script, SCRIPTS[script].Config(**common, **options)
        self.run, self.order = Run(script, self.config), -1 if backwards else 1
        torch.manual_seed(0)
        self.model = tiny_gpt(1).add_head(std=0.2) if script in ("rm", "ppo") else tiny_gpt(1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        if script == "ppo":
            self.rollout = own_rollout(self.model)
        if script == "grpo":
            self.rollout = everything_as_groups(self.model, tiny_gpt(2), random_scores(3))

    def parameters(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def step(self):
        """One optimizer step. Returns the loss and the norm of the gradient that the script reports."""
        tools = (self.run, self.model, self.optimizer)
        pairs = PAIRS[:: self.order]
        if self.script == "sft":
            stats = train_sft.update(*tools, EXAMPLES[:: self.order], self.config)
        if self.script == "rm":
            stats = train_rm.update(*tools, pairs, self.config)
        if self.script in ("dpo", "ipo"):
            ref = SCRIPTS[self.script].reference_logprobs(tiny_gpt(2), pairs, "cpu")
            stats = SCRIPTS[self.script].update(*tools, pairs, ref, self.config)
        if self.script == "ppo":
            models = train_ppo.Models(self.model, self.model, None, None)
            batch = self.rollout.rows(torch.tensor(list(range(40))[:: self.order]))
            [stats] = train_ppo.update(self.run, models, self.optimizer, batch, self.config)
            stats["loss"] = stats["loss/policy"] + 0.5 * stats["loss/value"]
        if self.script == "grpo":
            models = train_grpo.Models(self.model, None, None)
            batch = self.rollout.rows(torch.tensor(list(range(40))[:: self.order]))
            [stats] = train_grpo.update(self.run, models, self.optimizer, batch, self.config)
            stats["loss"] = stats["loss/policy"]
        assert not stats["loss"].requires_grad
        return stats["loss"], stats["grad_norm"]

    def loss(self):
        """The loss of that step, by definition."""
        model = self.model
        if self.script == "sft":
            return answers_nll(model)
        if self.script == "rm":
            chosen, rejected = (
                torch.stack([model.scalar(model(torch.tensor([side.ids])))[0, -1] for side in sides])
                for sides in zip(*((pair.chosen, pair.rejected) for pair in PAIRS))
            )
            return torch.log1p((rejected - chosen).exp()).mean()
        if self.script in ("dpo", "ipo"):
            moved = gpt_logprobs(model) - gpt_logprobs(tiny_gpt(2)).detach()
            h = torch.stack([moved[i] - moved[j] for i, j in EVERY_PAIR[::151]])
            return torch.log1p((-0.1 * h).exp()).mean() if self.script == "dpo" else ((h - 5) ** 2).mean()
        batch, hidden = self.rollout, model(IDS)
        logp = model.logits(hidden).log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
        if self.script == "grpo":  # ten groups of four: an answer's reward beyond the mean of the other three
            rewards = batch.scores - 0.1 * (batch.logprobs - batch.ref_logprobs).sum(1)
            groups = rewards.view(10, 4)
            beyond = groups - (groups.sum(1, keepdim=True) - groups) / 3
            return -((logp - batch.logprobs).exp() * beyond.view(40, 1))[MASK].sum() / MASK.sum()
        mean, variance = batch.advantages[MASK].mean(), batch.advantages[MASK].var(correction=0)
        white = (batch.advantages - mean) / (variance + 1e-8).sqrt()
        surrogate = ((logp - batch.logprobs).exp() * white)[MASK].sum()
        errors = ((model.scalar(hidden)[:, :-1] - batch.returns) ** 2)[MASK].sum()
        return (0.5 * errors / 2 - surrogate) / MASK.sum()

    def gradient(self):
        """The gradient of that loss, 0 for parameters that it does not depend on."""
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(self.loss(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters)]


def moved(before, after):
    return [b - a for a, b in zip(after, before)]


@pytest.mark.parametrize("micro_batch", [0, 1, 7])
@pytest.mark.parametrize("script", SCRIPTS)
def test_one_step_follows_the_gradient_of_the_loss_however_it_is_cut_into_micro_batches(script, micro_batch):
    training = Training(script, micro_batch)
    expected, before = training.gradient(), training.parameters()
    expected_loss = training.loss()
    loss, _ = training.step()
    at_most(abs(loss - expected_loss), 1e-12)
    at_most(distance(moved(before, training.parameters()), expected), 1e-12)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_step_is_the_same_in_one_piece_and_in_micro_batches_whatever_the_loss(script):
    whole, ones, sevens = (Training(script, micro_batch) for micro_batch in (0, 1, 7))
    for training in (whole, ones, sevens):
        training.step()
    at_most(distance(ones.parameters(), whole.parameters()), 1e-12)
    at_most(distance(sevens.parameters(), whole.parameters()), 1e-12)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_step_does_not_depend_on_the_order_of_the_rows(script):
    forwards, backwards = Training(script, 7), Training(script, 7, backwards=True)
    forwards.step()
    backwards.step()
    at_most(distance(forwards.parameters(), backwards.parameters()), 1e-12)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_next_step_follows_its_own_gradient_and_nothing_that_the_last_one_left(script):
    training = Training(script)
    training.optimizer.param_groups[0]["lr"] = 0.1
    training.step()
    expected, before = training.gradient(), training.parameters()
    training.step()
    at_most(distance(moved(before, training.parameters()), [0.1 * g for g in expected]), 1e-12)


@pytest.mark.parametrize("limit", [0.5, 2.0])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gradient_longer_than_the_limit_is_shortened_to_it_and_a_shorter_one_stays(script, limit):
    """The limit is half of the gradient's norm, or twice. What is logged is the norm before."""
    norm = torch.cat([g.flatten() for g in Training(script).gradient()]).norm().item()
    training = Training(script, grad_clip=limit * norm)
    expected, before = training.gradient(), training.parameters()
    _, logged = training.step()
    at_most(abs(logged - norm) / norm, 1e-12)
    at_most(distance(moved(before, training.parameters()), [min(limit, 1.0) * g for g in expected]), 1e-5)


@pytest.mark.parametrize("micro_batch", [0, 7])
def test_an_update_of_the_reward_model_reports_its_accuracy_and_margin(micro_batch):
    torch.manual_seed(0)
    model = tiny_gpt(1).add_head(std=0.5)
    config = train_rm.Config(device="cpu", out=NOWHERE, micro_batch=micro_batch)
    expected = train_rm.evaluate(model, PAIRS, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = train_rm.update(Run("rm", config), model, optimizer, PAIRS, config)
    for name in ("loss", "accuracy", "margin"):
        at_most(abs(stats[name] - expected[name]), 1e-6)
    assert 0 < expected["accuracy"] < 1
    undecided = tiny_gpt(1).add_head(std=0.0)  # a tie is not right
    assert train_rm.update(Run("rm", config), undecided, optimizer, PAIRS, config)["accuracy"] == 0
    assert train_rm.evaluate(undecided, PAIRS, "cpu")["accuracy"] == 0


# ------------------------------------------------------------------------------------------------- best of n, the limit


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_best_of_n_costs_at_most_log_n_of_kl_and_gains_less_than_the_optimum_of_equal_kl(n):
    """P(best) = F(y)^n - F(just below y)^n; KL <= log n - (n-1)/n (Stiennon et al. 2009.01325, G.3)."""
    ref, scores = table_logprobs(random_table(6)).sum(1), random_scores(5)
    order = scores.argsort()
    below = ref[order].exp().cumsum(0)
    chance = torch.empty(40).double()
    chance[order] = below**n - (below - ref[order].exp()).clamp(min=0) ** n
    cost = (chance * ((chance + 1e-300).log() - ref)).sum().item()
    at_most(cost, math.log(n) - (n - 1) / n + 1e-9)
    low, high = 1e-3, 1e4  # the beta whose optimum costs the same
    for _ in range(100):
        beta = math.sqrt(low * high)
        best, _ = optimum(ref, scores, beta)
        low, high = (beta, high) if kl(best, ref) > cost else (low, beta)
    at_most((chance * scores).sum() - (best.exp() * scores).sum(), 1e-9)
