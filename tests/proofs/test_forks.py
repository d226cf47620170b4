"""The forks: what GRPO's switches do to the gradient, and where IPO stops. By enumeration, then by training.

A group of k answers has a probability too, so an expectation over groups is a sum of 40^k terms.
"""

import math
from types import SimpleNamespace

import pytest
import torch

import test_convergence
import test_rollout
import train_dpo
import train_grpo
import train_ipo
from enumerable import (
    ANSWERS,
    END,
    EVERY_PAIR,
    FINISHED,
    LONGEST,
    MASK,
    NOWHERE,
    PROMPT,
    example,
    gpt_logprobs,
    kl,
    pairs_of,
    per_state,
    randn,
    random_scores,
    random_table,
    table_logprobs,
    tiny_gpt,
    total_variation,
)
from measured import at_most, cosine, distance, same_gradient
from nanopost.checkpoint import freeze
from nanopost.data import collate
from nanopost.run import Run, adamw, schedule
from test_enumeration import FIRST, SECOND, SOME_PAIRS, gradient, minimise, moved, objective_gradient

BETA = 0.3


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def config_of(**options):
    common = dict(device="cpu", out=NOWHERE, max_new_tokens=LONGEST, beta=BETA, batch_size=120)
    return train_grpo.Config(**common | options)


# ----------------------------------------------------------------------------------------- GRPO: advantages of a group


def test_advantages_are_rewards_beyond_the_mean_of_the_others_or_of_the_group():
    rewards = tensor(1.0, 2.0, 6.0, 0.0, -1.0, 4.0)  # two groups of three
    loo = train_grpo.group_advantages(rewards, 3)
    at_most(distance(loo, tensor(1 - 4, 2 - 3.5, 6 - 1.5, 0 - 1.5, -1 - 2, 4 + 0.5)), 1e-12)
    group = train_grpo.group_advantages(rewards, 3, "group")
    at_most(distance(group, tensor(-2, -1, 3, -1, -2, 3)), 1e-12)


def test_advantages_are_divided_by_the_standard_deviation_of_their_own_group():
    rewards = tensor(1.0, 2.0, 6.0, 0.0, -10.0, 40.0)
    group = train_grpo.group_advantages(rewards, 3, "group", divide_by_std=True)
    spread = [math.sqrt((4 + 1 + 9) / 2), math.sqrt((100 + 400 + 900) / 2)]  # of a sample: k - 1 in the denominator
    at_most(distance(group[:3], tensor(-2, -1, 3) / spread[0]), 1e-3)
    at_most(distance(group[3:], tensor(-10, -20, 30) / spread[1]), 1e-3)


@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("baseline", ["loo", "group"])
def test_advantages_of_a_group_with_equal_rewards_are_0_and_finite(baseline, divide_by_std):
    """So it has no policy gradient. In single precision the mean of equal numbers may be off by a rounding."""
    equal = torch.full((6,), 0.1)
    both = torch.cat([equal[:3], torch.tensor([0.0, 0.0, 1.0])])
    advantages = train_grpo.group_advantages(both, 3, baseline, divide_by_std)
    at_most(advantages[:3].abs().max(), 1e-3 if divide_by_std else 1e-7)
    assert (advantages[3:].abs() > 0.3).all()


def test_advantages_do_not_change_when_a_prompt_pays_more_for_every_answer():
    rewards, bonus = random_scores(1), torch.repeat_interleave(random_scores(2)[:10], 4)
    for options in ({}, {"baseline": "group"}, {"divide_by_std": True}):
        a, b = (train_grpo.group_advantages(r, 4, **options) for r in (rewards, rewards + 5 * bonus))
        at_most(distance(a, b), 1e-12)


# ------------------------------------------------------------------------------------------- GRPO: the policy gradient


def expected_advantages(logp, rewards, k, **options):
    """What the advantage of every answer is, on average over the k - 1 others in its group: (40,)."""
    groups = torch.cartesian_prod(*[torch.arange(40)] * k)  # (40^k, k)
    advantages = train_grpo.group_advantages(rewards[groups].flatten(), k, **options).view(-1, k)
    chance = logp[groups].sum(1, keepdim=True).exp()  # of the group
    total = torch.zeros(40).double().index_add(0, groups.flatten(), (chance * advantages).flatten())
    return total / (k * logp.exp())


def policy_and_reference(prompt=PROMPT):
    """Two models, and log pi of the 40 answers under each."""
    policy, reference = tiny_gpt(3), tiny_gpt(2)
    return policy, reference, gpt_logprobs(policy, prompt).detach(), gpt_logprobs(reference, prompt).detach()


def all_answers(policy, reference, advantages, prompt=PROMPT):
    """The 40 answers as the Batch of a rollout."""
    batch = collate([example(answer, prompt) for answer in ANSWERS])
    with torch.no_grad():
        for name, model in (("logprobs", policy), ("ref_logprobs", reference)):
            setattr(batch, name, model.logprobs(model(batch.ids), batch.ids, batch.index))
    batch.advantages = advantages[:, None] * batch.mask
    return batch


def expected_loss(policy, reference, advantages, config, prompt=PROMPT):
    """Over the answers of the policy: each is a minibatch by itself, and weighs as much as it is likely."""
    batch, chances = all_answers(policy, reference, advantages, prompt), gpt_logprobs(policy, prompt).detach().exp()
    models = train_grpo.Models(policy, reference, None)
    losses = [train_grpo.minibatch_loss(models, batch.rows(torch.tensor([i])), 1, 1, config)[0] for i in range(40)]
    return sum(p * loss for p, loss in zip(chances, losses))


def expected_gradient(policy, reference, advantages, config):
    """The direction in which the policy moves: minus the gradient of the loss."""
    return gradient(-expected_loss(policy, reference, advantages, config), policy)


def rewards_of(logp, ref, in_reward=True):
    """r - beta (log pi - log pi_ref) of the 40 answers."""
    return random_scores(3) - BETA * (logp - ref) * in_reward


@pytest.mark.parametrize("where", ["reward", "k2"])
@pytest.mark.parametrize("k", [2, 3])
def test_leave_one_out_has_exactly_the_gradient_of_the_objective(k, where):
    """Of E[r] - beta KL, through the whole transformer, with the KL in the rewards or as a loss."""
    policy, reference, logp, ref = policy_and_reference()
    advantages = expected_advantages(logp, rewards_of(logp, ref, where == "reward"), k)
    found = expected_gradient(policy, reference, advantages, config_of(kl=where))
    same_gradient(found, objective_gradient(policy, reference, random_scores(3), BETA), 1e-10)


@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_of_the_group_leaves_k_minus_1_of_k_parts_of_the_gradient(k):
    policy, reference, logp, ref = policy_and_reference()
    advantages = expected_advantages(logp, rewards_of(logp, ref), k, baseline="group")
    found = expected_gradient(policy, reference, advantages, config_of())
    right = objective_gradient(policy, reference, random_scores(3), BETA)
    same_gradient(found, [(k - 1) / k * g for g in right], 1e-10)


@pytest.mark.parametrize("k", [2, 3])
def test_dividing_by_the_standard_deviation_turns_the_gradient(k):
    """Two prompts, one of which pays a tenth. Divided by their spread, its groups weigh as much as the other's."""
    policy, reference = tiny_gpt(3), tiny_gpt(2)
    right, divided = 0.0, 0.0
    for prompt, rewards in ((PROMPT, random_scores(3)), ([0], 0.1 * random_scores(4))):
        logp = gpt_logprobs(policy, prompt)
        right = right + (logp.exp() * rewards).sum()
        advantages = expected_advantages(logp.detach(), rewards, k, divide_by_std=True)
        divided = divided - expected_loss(policy, reference, advantages, config_of(beta=0.0), prompt)
    at_most(cosine(gradient(divided, policy), gradient(right, policy)), 0.9)


def test_the_mean_over_each_answer_turns_the_gradient():
    """It makes short answers count for more, good ones and bad ones."""
    policy, reference, logp, ref = policy_and_reference()
    right = objective_gradient(policy, reference, random_scores(3), BETA)
    advantages = expected_advantages(logp, rewards_of(logp, ref), 2)
    at_most(cosine(expected_gradient(policy, reference, advantages, config_of(length_mean=True)), right), 0.9)
    same_gradient(expected_gradient(policy, reference, advantages, config_of(length_mean=False)), right, 1e-10)


# ---------------------------------------------------------------------------------------------- GRPO: the KL as a loss


def test_kl_losses_by_hand():
    """Two answers, of two tokens and of one; what stands beside them does not count."""
    ref, mask = tensor(-1.0, -3.0, 9.0, 9.0).view(2, 2), torch.tensor([[True, True], [False, True]])
    logprobs = ref + tensor(0.5, -1.0, 7.0, 2.0).view(2, 2)
    k3 = [math.exp(-x) - 1 + x for x in (0.5, -1.0, 2.0)]
    at_most(abs(train_grpo.kl_loss(logprobs, ref, mask, "k3") - sum(k3) / 3), 1e-12)
    at_most(abs(train_grpo.kl_loss(logprobs, ref, mask, "k2") - (0.5**2 + 2.0**2) / 2 / 3), 1e-12)
    each = tensor(4.0, 2.0)[:, None]  # a count for each answer
    at_most(abs(train_grpo.kl_loss(logprobs, ref, mask, "k3", each) - (k3[0] + k3[1]) / 4 - k3[2] / 2), 1e-12)
    at_most(abs(train_grpo.kl_loss(logprobs, ref, mask, "k2", 10) - (0.5**2 + 2.0**2) / 20), 1e-12)
    assert train_grpo.kl_loss(ref, ref, mask, "k2") == train_grpo.kl_loss(ref, ref, mask, "k3") == 0


def test_kl_as_a_loss_has_no_gradient_as_k1_the_right_one_as_k2_and_that_of_the_other_direction_as_k3():
    """The sampler is the policy, and its samples have no gradient. k3 stands for each token, so its KL is that of the
    next token, KL(pi_ref || pi), on average over the states that the policy visits."""
    table, reference = (random_table(2) + 0.7 * random_table(3)).requires_grad_(), random_table(2)
    logprobs, ref = table_logprobs(table), table_logprobs(reference)
    chances = logprobs.sum(1).exp().detach()

    def slope(loss):
        return torch.autograd.grad(loss, table, retain_graph=True)

    def of_kind(kind):
        rows = [train_grpo.kl_loss(logprobs[i : i + 1], ref[i : i + 1], MASK[i : i + 1], kind, 1) for i in range(40)]
        return slope((chances * torch.stack(rows)).sum())

    k1 = (logprobs - ref).sum(1)
    at_most(abs((chances * k1).sum() - kl(logprobs.sum(1), ref.sum(1))), 1e-12)  # its mean is the KL
    at_most(slope((chances * k1).sum())[0].abs().max(), 1e-12)
    right = slope(kl(logprobs.sum(1), ref.sum(1)))
    same_gradient(of_kind("k2"), right, 1e-12)
    visits = per_state(lambda rows, t: chances[rows].sum())  # (13,)
    pi, pi_ref = table.log_softmax(-1), reference.log_softmax(-1)
    other = slope((visits * (pi_ref.exp() * (pi_ref - pi)).sum(-1)).sum())
    same_gradient(of_kind("k3"), other, 1e-12)
    at_most(cosine(other, right), 0.98)


# ---------------------------------------------------------------------------------------------- GRPO: one minibatch


def a_moved_policy():
    """The 40 answers with random advantages, and a policy that has moved since it gave them."""
    policy, reference = tiny_gpt(3), tiny_gpt(2)
    batch = all_answers(policy, reference, random_scores(5))
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * randn(*p.shape, seed=7)
    return policy, reference, batch


@pytest.mark.parametrize("where", ["reward", "k2", "k3"])
@pytest.mark.parametrize("length_mean", [False, True])
def test_grpo_loss_of_a_minibatch_and_its_statistics_are_their_definitions_once_the_policy_has_moved(
    length_mean, where
):
    policy, reference, batch = a_moved_policy()
    config, models = config_of(clip=0.1, length_mean=length_mean, kl=where), train_grpo.Models(policy, reference, None)
    mask, lengths = batch.mask, batch.mask.sum(1)
    loss, stats = train_grpo.minibatch_loss(models, batch, mask.sum(), 40, config)
    logp = policy.logits(policy(batch.ids)).log_softmax(-1)[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0]
    ratio = (logp - batch.logprobs).masked_fill(~mask, 0.0).exp()
    too_far = torch.where(batch.advantages > 0, ratio > 1.1, ratio < 0.9) & mask
    surrogate = torch.where(too_far, ratio.clamp(0.9, 1.1), ratio) * batch.advantages * mask
    k1 = (logp - batch.ref_logprobs).masked_fill(~mask, 0.0)
    k3 = ((-k1).exp() - 1 + k1).sum(1)
    penalty = {"reward": torch.zeros(40), "k2": k1.sum(1) ** 2 / 2, "k3": k3}[where]  # (40,)

    def mean(x):  # of a sum over each answer's tokens, (40,)
        return (x / lengths).mean() if length_mean else x.sum() / lengths.sum()

    expected = {
        "loss/policy": -mean(surrogate.sum(1)),
        "loss/kl": mean(penalty),
        "val/ratio": ratio[mask].mean(),
        "policy/approxkl": (ratio[mask].log() ** 2).mean() / 2,
        "policy/clipfrac": too_far[mask].double().mean(),
    }
    assert stats.keys() == expected.keys() and 0.1 < expected["policy/clipfrac"] < 0.9
    for name, number in expected.items():
        at_most(abs(stats[name] - number), 1e-6)  # shares are logged in single precision
    at_most(abs(loss - expected["loss/policy"] - BETA * expected["loss/kl"]), 1e-12)


# ----------------------------------------------------------------------------------------------------- GRPO: an update

VARIANTS = {
    "RLOO": {},
    "GRPO": dict(baseline="group", divide_by_std=True, length_mean=True, kl="k3"),
    "Dr. GRPO": dict(baseline="group", beta=0.0),
    "k2": dict(kl="k2"),
}


def an_update(micro_batch=0, **options):
    """A step with learning rate 1 on the 40 answers, as 20 groups of 2 -> the gradient that was followed, and that of
    the loss as it is defined."""
    policy, reference = tiny_gpt(3), tiny_gpt(2)
    config = config_of(
        **{"k": 2, "epochs": 1, "minibatches": 1, "grad_clip": 0.0, "micro_batch": micro_batch} | options
    )
    batch = all_answers(policy, reference, torch.zeros(40).double())
    batch.scores, batch.ended = random_scores(3), FINISHED
    kl_of_answers = (batch.logprobs - batch.ref_logprobs).sum(1)
    rewards = batch.scores - (config.beta * kl_of_answers if config.kl == "reward" else 0.0)
    pairs = rewards.view(20, 2)
    advantages = pairs - (pairs.flip(1) if config.baseline == "loo" else pairs.mean(1, keepdim=True))
    if config.divide_by_std:
        advantages = advantages / (pairs.std(1, keepdim=True) + 1e-4)
    logp, mask = policy.logprobs(policy(batch.ids), batch.ids, batch.index), batch.mask
    k1 = logp - batch.ref_logprobs
    penalty = {"reward": 0 * k1.sum(1), "k2": k1.sum(1) ** 2 / 2, "k3": ((-k1).exp() - 1 + k1).sum(1)}[config.kl]
    losses = config.beta * penalty - ((logp - batch.logprobs).exp() * mask).sum(1) * advantages.flatten()  # (40,)
    expected = gradient((losses / mask.sum(1)).mean() if config.length_mean else losses.sum() / mask.sum(), policy)
    before = [p.detach().clone() for p in policy.parameters()]
    models, optimizer = train_grpo.Models(policy, reference, None), torch.optim.SGD(policy.parameters(), lr=1.0)
    [stats] = train_grpo.update(Run("grpo", config), models, optimizer, batch, config)
    assert not stats["loss/policy"].requires_grad
    return moved(before, [p.detach() for p in policy.parameters()]), expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("micro_batch", [0, 7])
def test_grpo_update_follows_the_gradient_of_its_loss_however_it_is_cut_into_micro_batches(micro_batch, variant):
    same_gradient(*an_update(micro_batch, **VARIANTS[variant]), 1e-10)


def test_grpo_update_on_groups_whose_answers_all_have_the_same_reward_changes_nothing():
    policy, reference = tiny_gpt(3), tiny_gpt(2)
    config = config_of(k=4, beta=0.0)
    batch = all_answers(policy, reference, torch.zeros(40).double())
    batch.scores = torch.repeat_interleave(random_scores(1)[:10], 4)
    before = [p.detach().clone() for p in policy.parameters()]
    models, optimizer = train_grpo.Models(policy, reference, None), torch.optim.SGD(policy.parameters(), lr=1.0)
    train_grpo.update(Run("grpo", config), models, optimizer, batch, config)
    at_most(distance([p.detach() for p in policy.parameters()], before), 1e-12)


# ------------------------------------------------------------------------------------------------- GRPO: the rollout


def rollout(policy, reference, n=8, **options):
    """n answers to every prompt of test_rollout.py: the batch, the numbers of the answers, models and config."""
    config = config_of(**options)
    models, prompts = train_grpo.Models(policy, reference, test_rollout.judge), test_rollout.PROMPTS * n
    batch = train_grpo.rollout(models, test_rollout.VOCABULARY, test_rollout.NAMES * n, prompts, config, None)
    return batch, test_rollout.answer_numbers(batch, prompts), models, config


def test_grpo_rollout_samples_every_answer_as_often_as_it_says_that_it_does():
    batch = rollout(tiny_gpt(1), tiny_gpt(1), n=3000)[0]
    for prompt in test_rollout.PROMPTS:
        rows, answers = test_rollout.which(batch, prompt)
        p = torch.zeros(40).double()
        p[answers] = batch.logprobs[rows].sum(1).exp()
        at_most(test_rollout.surprise(answers, p), 5.0)


def test_grpo_rollout_has_the_log_probabilities_of_the_policy_and_of_the_reference():
    policy, reference = tiny_gpt(1), tiny_gpt(2)
    batch = rollout(policy, reference)[0]
    answers = [test_rollout.answer_logprobs(model, batch) for model in (policy, reference)]
    at_most(distance([batch.logprobs.sum(1), batch.ref_logprobs.sum(1)], answers), 1e-12)


def test_grpo_rollout_scores_an_answer_under_its_own_prompt_and_pays_the_same_to_all_that_do_not_end():
    batch, answers, _, config = rollout(tiny_gpt(1), tiny_gpt(1), n=64)
    expected = torch.where(FINISHED[answers], test_rollout.judge(test_rollout.NAMES * 64, batch), -1.0)
    at_most(distance(batch.scores, expected), 1e-12)
    assert config.missing_end_score == -1.0 and 0 < FINISHED[answers].sum() < len(answers)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_grpo_rollout_with_learning_rate_0_has_ratio_1_and_against_itself_kl_0(temperature):
    policy, reference = tiny_gpt(1), tiny_gpt(1)
    batch, _, models, config = rollout(policy, reference, temperature=temperature, k=3, minibatches=3, kl="k3")
    at_most((batch.logprobs - batch.ref_logprobs).abs().max(), 1e-12)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    history = train_grpo.update(Run("grpo", config), models, optimizer, batch, config)
    assert len(history) == config.epochs * 3
    for stats in history:
        at_most(abs(stats["val/ratio"] - 1), 1e-12)
        at_most(stats["policy/approxkl"] + stats["loss/kl"], 1e-12)
        assert stats["policy/clipfrac"] == 0


def test_grpo_statistics_are_means_over_answers_and_the_share_of_groups_with_equal_scores():
    policy, reference = tiny_gpt(1), tiny_gpt(2)
    batch, answers, _, config = rollout(policy, reference, n=64, k=3)
    batch.scores[:6], batch.scores[6:9] = tensor(1, 1, 1, 2, 2, 2), tensor(1, 1, 2)
    unmoved = [{"policy/approxkl": torch.tensor(0.0), "val/ratio": torch.tensor(1.0)}]
    logged = train_grpo.statistics(batch, unmoved, config)
    pi, ref = (test_rollout.answer_logprobs(model, batch) for model in (policy, reference))
    equal = [len(set(group)) == 1 for group in batch.scores.view(-1, 3).tolist()]
    expected = {
        "objective/kl": (pi - ref).mean(),
        "objective/entropy": -pi.mean(),
        "objective/scores": batch.scores.mean(),
        "objective/rlhf_reward": (batch.scores - BETA * (pi - ref)).mean(),
        "groups/equal": tensor(sum(equal) / 64)[0],
        "response/ended": FINISHED[answers].double().mean(),
        "response/length": torch.tensor([len(ANSWERS[a]) for a in answers]).double().mean(),
        "val/first_ratio": torch.tensor(1.0),
    }
    assert expected["objective/kl"] > 0.1 and sum(equal) >= 2
    for name, value in expected.items():
        at_most(abs(logged[name] - value), 1e-6)


# ----------------------------------------------------------------------------------------- GRPO: where training ends


def train_by_grpo(reference, iterations=60, answers=256, k=4, **options):
    options |= dict(steps=iterations, batch_size=answers, k=k, epochs=4, minibatches=1, micro_batch=0, lr=3e-3)
    config = config_of(beta=test_convergence.BETA, missing_end_score=-1.0, **options)
    run, policy = Run("grpo", config), test_convergence.start(reference)
    models = train_grpo.Models(policy, reference, test_convergence.judge)
    optimizer, vocabulary = adamw(policy.parameters(), config.lr, eps=1e-5), SimpleNamespace(end=END, pad=0)
    prompts = [prompt for prompt in test_convergence.PROMPTS * (answers // k // 2) for _ in range(k)]
    for step in range(1, iterations + 1):
        run.set_lr(optimizer, config.lr * schedule(step, iterations))
        batch = train_grpo.rollout(models, vocabulary, prompts, prompts, config, None)
        train_grpo.update(run, models, optimizer, batch, config)
    return policy


@pytest.fixture(scope="module")
def reference():
    return freeze(tiny_gpt(seed=3, n_embd=32, noise=0.1).float())


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["loo", "group"])
def test_grpo_with_the_kl_in_the_reward_brings_the_transformer_to_the_optimum(baseline, reference):
    torch.manual_seed(0)
    gap, way = test_convergence.distances(train_by_grpo(reference, baseline=baseline), reference)
    assert way > 0.3
    at_most(gap, 0.03)


# ------------------------------------------------------------------------------------------------------ IPO: the loss


def test_ipo_loss_is_the_squared_distance_of_the_margin_from_one_over_two_beta():
    losses, good, bad = train_ipo.ipo_loss(
        tensor(-10, -20), tensor(-12, -15), tensor(-11, -18), tensor(-11.5, -16), 0.2
    )
    at_most(distance(losses, tensor((1.5 - 2.5) ** 2, (-3.0 - 2.5) ** 2)), 1e-12)
    at_most(distance([good, bad], [0.2 * tensor(1, -2), 0.2 * tensor(-0.5, 1)]), 1e-12)


def test_ipo_loss_gives_logged_rewards_without_a_gradient():
    chosen, rejected = tensor(-10.0).requires_grad_(), tensor(-12.0).requires_grad_()
    losses, good, bad = train_ipo.ipo_loss(chosen, rejected, tensor(-11.0), tensor(-11.5), 0.2)
    losses.sum().backward()
    at_most(distance([chosen.grad, rejected.grad], [tensor(2 * (1.5 - 2.5)), tensor(-2 * (1.5 - 2.5))]), 1e-12)
    assert not good.requires_grad and not bad.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ipo_losses_are_equation_17_on_whole_answers(smoothing):
    policy, reference, pairs = tiny_gpt(1), tiny_gpt(2), pairs_of(SOME_PAIRS)
    ref = train_ipo.reference_logprobs(reference, pairs, "cpu", batch_size=7)
    config = train_ipo.Config(beta=0.3, label_smoothing=smoothing)
    losses, stats = train_ipo.batch_loss(policy, pairs, ref, config, "cpu")
    change, logp = gpt_logprobs(policy) - gpt_logprobs(reference), gpt_logprobs(policy)
    h = torch.stack([change[i] - change[j] for i, j in SOME_PAIRS])
    right, wrong = (h - 1 / 0.6) ** 2, (h + 1 / 0.6) ** 2
    at_most(distance(losses, (1 - smoothing) * right + smoothing * wrong), 1e-10)
    for side, name in enumerate(("chosen", "rejected")):
        answers = [pair[side] for pair in SOME_PAIRS]
        at_most(distance(stats[f"logps/{name}"], logp[answers]), 1e-12)
        at_most(distance(stats[f"rewards/{name}"], 0.3 * change[answers]), 1e-12)
    assert not any(stat.requires_grad for stat in stats.values())


def test_ipo_starts_at_one_over_four_beta_squared_with_margin_0_and_accuracy_0():
    policy, pairs = tiny_gpt(1), pairs_of(EVERY_PAIR[::31])
    its_own = torch.stack(train_ipo.pair_logprobs(policy, pairs, "cpu"), dim=1).detach()
    losses, stats = train_ipo.batch_loss(policy, pairs, its_own, train_ipo.Config(beta=0.3), "cpu")
    at_most(distance(losses, torch.full_like(losses, 1 / (4 * 0.3**2))), 1e-10)
    at_most(stats["rewards/margins"].abs().max(), 1e-12)
    assert (stats["rewards/accuracies"] == 0).all()  # a tie is not right


# -------------------------------------------------------------------------------------------------- IPO: where it stops


def ipo_optimum(ref, prefer, often, beta):
    """pi*(y) = ref(y) exp(P(y) / beta) / Z, with P(y) the chance that y is preferred to an answer drawn by `often`
    (40,): the paper's optimum of E[P] - beta KL. prefer (40, 40): the chance that i is preferred to j."""
    return (ref + (prefer * often).sum(1) / beta).log_softmax(0)


def fit(module_loss, ref, prefer, often, beta, start):
    """The table policy whose loss over all pairs, each label as often as people give it, is least."""
    theta, weights = start.clone().requires_grad_(), (often[FIRST] * often[SECOND]) * prefer[FIRST, SECOND]

    def loss():
        logp = table_logprobs(theta).sum(1)
        return (weights * module_loss(logp[FIRST], logp[SECOND], ref[FIRST], ref[SECOND], beta)[0]).sum()

    minimise(loss, theta, 4000)
    return table_logprobs(theta.detach()).sum(1)


PREFERENCES = {
    "people who differ": lambda scores: torch.sigmoid(scores[:, None] - scores),
    "labels that all agree": lambda scores: (scores[:, None] > scores).double() + 0.5 * torch.eye(40).double(),
}


@pytest.mark.parametrize("compared", ["every pair alike", "samples of the reference"])
@pytest.mark.parametrize("people", PREFERENCES)
def test_ipo_has_its_minimum_at_the_optimum_of_the_paper_even_for_labels_that_all_agree(people, compared):
    table, scores, beta = random_table(3), random_scores(4), 0.5
    ref, prefer = table_logprobs(table).sum(1), PREFERENCES[people](scores)
    often = ref.exp() if compared == "samples of the reference" else torch.full((40,), 1 / 40).double()
    found = fit(train_ipo.ipo_loss, ref, prefer, often, beta, table)
    best = ipo_optimum(ref, prefer, often, beta)
    at_most(total_variation(found, best), 1e-5)
    assert kl(best, ref) < 1 / beta  # P is at most 1, so nothing is gained by going further


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.25])
def test_ipo_stops_at_the_margin_that_the_share_of_agreeing_labels_sets(smoothing):
    """At h = (p - 1/2) / beta, finite for p = 1. There DPO still pulls, and at any other h."""
    zero, beta = torch.zeros(1).double(), 0.1
    margin = torch.zeros(1).double().requires_grad_()
    minimise(lambda: train_ipo.ipo_loss(margin, zero, zero, zero, beta, smoothing)[0].sum(), margin, 200)
    at_most(abs(margin.item() - (0.5 - smoothing) / beta), 1e-6)
    for h in (margin.item(), 10 / beta, 100 / beta):
        far = tensor(h).requires_grad_()
        train_dpo.dpo_loss(far, zero, zero, zero, beta)[0].sum().backward()
        assert far.grad < 0


def test_ipo_stays_near_the_reference_where_dpo_runs_away_on_labels_that_all_agree():
    """Adam on a table. Twice the steps bring IPO no further, and DPO takes ever more KL."""
    table, scores, beta = random_table(3), random_scores(4), 0.5
    ref, prefer = table_logprobs(table).sum(1), PREFERENCES["labels that all agree"](scores)

    def trained(module_loss, steps):
        theta, weights = table.clone().requires_grad_(), prefer[FIRST, SECOND] / len(FIRST)
        optimizer = torch.optim.Adam([theta], lr=0.1)
        for _ in range(steps):
            logp = table_logprobs(theta).sum(1)
            loss = (weights * module_loss(logp[FIRST], logp[SECOND], ref[FIRST], ref[SECOND], beta)[0]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return kl(table_logprobs(theta.detach()).sum(1), ref)

    ipo, dpo = ([trained(loss, steps) for steps in (300, 600)] for loss in (train_ipo.ipo_loss, train_dpo.dpo_loss))
    at_most(abs(ipo[1] - ipo[0]), 1e-3)
    assert dpo[0] > 3 * ipo[0] and dpo[1] > dpo[0] + 0.1
