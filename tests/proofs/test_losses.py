"""The losses as pure functions: numbers computed by hand, closed forms, and what must not matter. Read this first."""

import math

import pytest
import torch

import train_grpo
import train_ppo
from enumerable import gae_by_double_sum
from measured import at_most, distance
from train_dpo import dpo_loss
from train_ppo import adapt, gae, policy_loss, token_rewards, value_loss, whiten
from train_rm import pairwise_loss
from train_sft import masked_cross_entropy


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------ SFT: masked_cross_entropy

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4]])
TARGETS, MASK = torch.tensor([1, 1, 0, 2]), torch.tensor([True, False, True, True])
BY_HAND = -(math.log(0.25) + math.log(0.2) + math.log(0.4))


def test_cross_entropy_is_the_mean_over_the_targets_only():
    assert masked_cross_entropy(PROBABILITIES.log(), TARGETS, MASK).item() == pytest.approx(BY_HAND / 3, abs=1e-6)


def test_cross_entropy_divides_by_the_count_it_is_given():
    loss = masked_cross_entropy(PROBABILITIES.log(), TARGETS, MASK, count=10)
    assert loss.item() == pytest.approx(BY_HAND / 10, abs=1e-6)


def test_cross_entropy_weighs_tokens_not_rows():
    logits, targets = PROBABILITIES.log().view(2, 2, 3), TARGETS.view(2, 2)  # rows with 1 and with 2 targets
    assert masked_cross_entropy(logits, targets, MASK.view(2, 2)).item() == pytest.approx(BY_HAND / 3, abs=1e-6)


def test_cross_entropy_leaves_positions_outside_the_mask_without_any_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    masked_cross_entropy(logits, TARGETS, MASK).backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[MASK] != 0).all()
    expected = (logits.softmax(-1) - torch.nn.functional.one_hot(TARGETS, 3)) / 3
    torch.testing.assert_close(logits.grad[MASK], expected[MASK])


def test_cross_entropy_is_computed_in_fp32_even_from_half_precision():
    logits = torch.randn(4, 3).bfloat16()
    assert masked_cross_entropy(logits, TARGETS, MASK).dtype == torch.float32


# -------------------------------------------------------------------------------------------------- RM: pairwise_loss


def test_pairwise_loss_is_the_mean_negative_log_sigmoid_of_the_difference():
    expected = -(math.log(sigmoid(2.0 - 1.0)) + math.log(sigmoid(0.0 - 3.0))) / 2
    assert pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])).item() == pytest.approx(expected, abs=1e-6)


def test_pairwise_loss_of_equal_rewards_is_ln_2_and_only_differences_matter():
    a, b = torch.randn(5), torch.randn(5)
    assert pairwise_loss(a, a).item() == pytest.approx(math.log(2), abs=1e-6)
    assert pairwise_loss(a + 3, b + 3).item() == pytest.approx(pairwise_loss(a, b).item(), abs=1e-5)


def test_pairwise_loss_stays_finite_for_extreme_rewards():
    assert pairwise_loss(torch.tensor([-1000.0]), torch.tensor([1000.0])).item() == pytest.approx(2000.0)
    assert pairwise_loss(torch.tensor([1000.0]), torch.tensor([-1000.0])).item() == 0.0


# ------------------------------------------------------------------------------------------------------ DPO: dpo_loss

CHOSEN, REJECTED = tensor(-10.0, -20.0), tensor(-12.0, -15.0)
REF_CHOSEN, REF_REJECTED = tensor(-11.0, -18.0), tensor(-11.5, -16.0)


def test_dpo_loss_at_the_reference_is_ln_2_with_rewards_0():
    losses, good, bad = dpo_loss(CHOSEN, REJECTED, CHOSEN, REJECTED, beta=0.3)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert good.tolist() == bad.tolist() == [0.0, 0.0]


def test_dpo_loss_is_equation_7():
    losses, good, bad = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=0.2)
    assert good.tolist() == pytest.approx([0.2 * 1.0, 0.2 * -2.0])
    assert bad.tolist() == pytest.approx([0.2 * -0.5, 0.2 * 1.0])
    assert losses.tolist() == pytest.approx([-math.log(sigmoid(0.2 * 1.5)), -math.log(sigmoid(0.2 * -3.0))])


def test_dpo_loss_stays_finite_for_extreme_log_probabilities():
    for h, loss in ((-1000.0, 1000.0), (1000.0, 0.0)):
        zero = tensor(0.0)
        assert dpo_loss(tensor(h), zero, zero, zero, beta=1.0)[0].item() == pytest.approx(loss)


def test_dpo_label_smoothing_mixes_in_the_loss_of_the_swapped_pair():
    losses, _, _ = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=0.2, label_smoothing=0.1)
    expected = [-0.9 * math.log(sigmoid(h)) - 0.1 * math.log(sigmoid(-h)) for h in (0.3, -0.6)]
    assert losses.tolist() == pytest.approx(expected)
    right, _, _ = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, label_smoothing=0.5)
    wrong, _, _ = dpo_loss(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, label_smoothing=0.5)
    torch.testing.assert_close(right, wrong)


def test_dpo_gradient_raises_the_chosen_and_lowers_the_rejected_by_beta_sigma_of_the_error():
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    losses, good, bad = dpo_loss(chosen, rejected, REF_CHOSEN, REF_REJECTED, beta=0.2)
    losses.sum().backward()
    expected = [0.2 * sigmoid(-0.3), 0.2 * sigmoid(0.6)]  # larger where the pair is ranked wrongly
    assert (-chosen.grad).tolist() == pytest.approx(expected) and rejected.grad.tolist() == pytest.approx(expected)
    assert not good.requires_grad and not bad.requires_grad


# --------------------------------------------------------------------------------------------- PPO: rewards and GAE

RESPONSE = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()  # three answers


def test_token_rewards_are_minus_beta_k1_with_the_score_on_the_last_response_token():
    logprobs, ref = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    rewards = token_rewards(tensor(2.0, -1.0, 0.5), logprobs, ref, RESPONSE, beta=0.1)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for b in range(3):
        for t in range(6):
            if RESPONSE[b, t]:
                expected[b, t] = -0.1 * (logprobs[b, t] - ref[b, t])
    expected[0, 3] += 2.0
    expected[1, 5] -= 1.0
    expected[2, 0] += 0.5
    torch.testing.assert_close(rewards, expected)


def test_token_rewards_are_lower_where_the_policy_is_surer_than_the_reference():
    mask = torch.tensor([[True, True]])
    rewards = token_rewards(tensor(0.0), tensor(-1.0, -3.0)[None], tensor(-2.0, -2.0)[None], mask, beta=1.0)
    assert rewards.tolist() == [[-1.0, 1.0]]


def test_rewards_advantages_and_losses_ignore_what_stands_outside_the_mask():
    def everything(junk):
        numbers = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))
        fill = [torch.where(RESPONSE, x, junk) for x in numbers]
        rewards = token_rewards(torch.ones(3), fill[0], fill[1], RESPONSE, 0.1)
        advantages, returns = gae(torch.where(RESPONSE, rewards, junk), fill[2], RESPONSE)
        white = whiten(torch.where(RESPONSE, advantages, junk), RESPONSE)
        losses = [policy_loss(fill[0], fill[3], white, RESPONSE), value_loss(fill[2], fill[4], returns, RESPONSE)]
        return [rewards, advantages, returns, white, *losses]

    for junk in (1e4, math.nan):
        for clean, dirty in zip(everything(0.0), everything(junk)):
            torch.testing.assert_close(clean, dirty)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma, lam):
    rewards, values = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    advantages, returns = gae(rewards, values, RESPONSE, gamma, lam)
    expected = gae_by_double_sum(rewards, values, RESPONSE, gamma, lam)
    at_most(distance([advantages, returns], [expected, (expected + values) * RESPONSE]), 1e-12)


def test_gae_with_lambda_1_has_the_sum_of_the_rewards_to_come_as_return():
    rewards, values = torch.randn(3, 6).double() * RESPONSE, torch.randn(3, 6).double()
    _, returns = gae(rewards, values, RESPONSE, gamma=1.0, lam=1.0)
    at_most(distance(returns, rewards.flip(1).cumsum(1).flip(1) * RESPONSE), 1e-12)


def test_gae_with_lambda_0_is_the_one_step_error():
    advantages, _ = gae(tensor(0.0, 1.0, 5.0)[None], tensor(2.0, 3.0, 4.0)[None], torch.ones(1, 3).bool(), 0.5, 0.0)
    assert advantages.tolist() == [[0 + 0.5 * 3 - 2, 1 + 0.5 * 4 - 3, 5 - 4]]


def test_whitened_advantages_have_mean_0_and_biased_variance_1_over_the_mask():
    x = torch.where(RESPONSE, torch.randn(3, 6).double() * 3 + 7, 1000.0)
    white = whiten(x, RESPONSE)
    assert white[RESPONSE].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert white[RESPONSE].var(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert (white[~RESPONSE] == 0).all()


def test_whitening_without_shift_keeps_the_mean():
    x = torch.where(RESPONSE, torch.randn(3, 6).double() * 3 + 7, 1000.0)
    white = whiten(x, RESPONSE, shift_mean=False)
    assert white[RESPONSE].mean().item() == pytest.approx(x[RESPONSE].mean().item())
    assert white[RESPONSE].var(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert (white[~RESPONSE] == 0).all()


def test_whitening_is_one_map_for_all_answers_so_that_the_better_answer_stays_the_better_one():
    """Whitened row by row, three answers with advantages of 1, 2 and 3 per token would all be alike."""
    x = RESPONSE * tensor(1.0, 2.0, 3.0)[:, None]
    white = whiten(x, RESPONSE)
    mean = (3 * 1.0 + 4 * 2.0 + 1 * 3.0) / 8
    std = math.sqrt((3 * (1.0 - mean) ** 2 + 4 * (2.0 - mean) ** 2 + (3.0 - mean) ** 2) / 8)
    at_most(distance(white, RESPONSE * (x - mean) / std), 1e-7)


def test_whitening_equal_numbers_gives_zeros():
    assert whiten(torch.full((3, 6), 2.5), RESPONSE).abs().max() < 1e-3


# ------------------------------------------------------------------------------------------------------ PPO: losses

POLICY_LOSS = {"ppo": train_ppo.policy_loss, "grpo": train_grpo.policy_loss}  # GRPO's is PPO's


@pytest.mark.parametrize("script", POLICY_LOSS)
@pytest.mark.parametrize(
    "ratio, advantage, loss, learns",
    [
        (1.5, 1.0, -1.2, False),  # a good token, already likelier by more than the clip: no further
        (0.5, 1.0, -0.5, True),  # a good token that became less likely: bring it back
        (1.5, -1.0, 1.5, True),  # a bad token that became likelier: bring it back
        (0.5, -1.0, 0.8, False),  # a bad token, already less likely by more than the clip: no further
        (1.1, 2.0, -2.2, True),  # inside the clip
        (0.9, -2.0, 1.8, True),  # inside the clip
    ],
)
def test_policy_loss_clips_only_what_has_moved_far_enough_the_right_way(ratio, advantage, loss, learns, script):
    old = tensor(-2.0)[None]
    new = (old + math.log(ratio)).requires_grad_()
    value = POLICY_LOSS[script](new, old, tensor(advantage)[None], torch.tensor([[True]]), clip=0.2)
    assert value.item() == pytest.approx(loss)
    value.backward()
    at_most(abs(new.grad.item() - (-advantage * ratio if learns else 0.0)), 1e-12)


@pytest.mark.parametrize("script", POLICY_LOSS)
def test_policy_loss_is_the_mean_over_response_tokens_or_the_sum_over_a_count(script):
    policy_loss, zeros, advantages = POLICY_LOSS[script], torch.zeros(3, 6).double(), torch.randn(3, 6).double()
    expected = -advantages[RESPONSE].sum().item()
    assert policy_loss(zeros, zeros, advantages, RESPONSE).item() == pytest.approx(expected / 8)
    assert policy_loss(zeros, zeros, advantages, RESPONSE, count=20).item() == pytest.approx(expected / 20)


@pytest.mark.parametrize("script", POLICY_LOSS)
def test_policy_loss_ignores_what_stands_outside_the_mask(script):
    new, old, advantages = torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(0)).double()
    clean, dirty = (
        POLICY_LOSS[script](*(torch.where(RESPONSE, x, junk) for x in (new, old, advantages)), RESPONSE)
        for junk in (0.0, 1e3)
    )
    at_most(abs(clean - dirty), 1e-12)


def test_losses_have_a_finite_gradient_whatever_stands_outside_the_mask():
    new, values = torch.zeros(3, 6).double().requires_grad_(), torch.zeros(3, 6).double().requires_grad_()
    junk = torch.where(RESPONSE, 0.0, -1e4)  # a ratio of e^10000 is infinite, and infinity times 0 is no number
    policy_loss(new, junk, torch.ones(3, 6), RESPONSE).backward()
    value_loss(values, junk, torch.ones(3, 6), RESPONSE).backward()
    for x in (new, values):
        assert (x.grad[~RESPONSE] == 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    "value, old, target, loss, learns",
    [
        (1.0, 0.0, 2.0, 0.5 * 1.8**2, False),  # moved towards the target by more than the clip: no further
        (1.0, 0.0, 0.0, 0.5 * 1.0, True),  # moved away from the target: the whole error counts
        (0.1, 0.0, 1.0, 0.5 * 0.81, True),  # moved by less than the clip
    ],
)
def test_value_loss_is_half_the_larger_of_the_plain_and_the_clipped_squared_error(value, old, target, loss, learns):
    new = tensor(value)[None].requires_grad_()
    result = value_loss(new, tensor(old)[None], tensor(target)[None], torch.tensor([[True]]), clip=0.2)
    assert result.item() == pytest.approx(loss)
    result.backward()
    assert new.grad.item() == pytest.approx(value - target if learns else 0.0)


def test_value_loss_is_the_mean_over_response_tokens_or_the_sum_over_a_count():
    values, returns = torch.randn(2, 3, 6).double()
    expected = 0.5 * (values - returns)[RESPONSE].square().sum().item()
    assert value_loss(values, values, returns, RESPONSE).item() == pytest.approx(expected / 8)
    assert value_loss(values, values, returns, RESPONSE, count=20).item() == pytest.approx(expected / 20)


def test_adaptive_beta_follows_the_kl_and_by_no_more_than_a_fifth_of_the_horizon():
    assert adapt(0.1, kl=6.0, target=6.0, answers=128, horizon=10000) == pytest.approx(0.1)
    assert adapt(0.1, kl=6.6, target=6.0, answers=128, horizon=10000) == pytest.approx(0.1 * (1 + 0.1 * 0.0128))
    assert adapt(0.1, kl=60.0, target=6.0, answers=128, horizon=10000) == pytest.approx(0.1 * (1 + 0.2 * 0.0128))
    assert adapt(0.1, kl=0.0, target=6.0, answers=128, horizon=10000) == pytest.approx(0.1 * (1 - 0.2 * 0.0128))
