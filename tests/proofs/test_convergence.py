"""Training ends where the mathematics says: PPO and DPO both land on pi* = ref exp(r / beta) / Z.

The world is the enumerable one, so the distance to pi* is exact. Through tables the whole of PPO is twenty lines; then
the same through the real transformer, sampler, value head and optimizer steps of the scripts.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import train_dpo
import train_ppo
from enumerable import (
    ANSWERS,
    END,
    MASK,
    NOWHERE,
    STATE,
    STATES,
    example,
    gpt_logprobs,
    objective,
    optimum,
    per_state,
    random_scores,
    random_table,
    soft_values,
    table_logprobs,
    tiny_gpt,
    total_variation,
)
from measured import at_most
from nanopost.checkpoint import freeze
from nanopost.data import Pair
from nanopost.run import Run, adamw, schedule

# -------------------------------------------------------------------------------------------------- PPO through tables


def ppo_on_tables(reference, scores, beta, seed, iterations=120, answers=256, epochs=4, lr=0.05, lam=0.95):
    """The whole of PPO with the losses of train_ppo.py: a table of logits (13, 4), a table of values (13,)."""
    generator = torch.Generator().manual_seed(seed)
    policy, values = reference.clone().requires_grad_(), torch.zeros(len(STATES)).double().requires_grad_()
    optimizer = torch.optim.Adam([policy, values], eps=1e-5)
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
        with torch.no_grad():
            logprobs = table_logprobs(policy)
            rows = torch.multinomial(logprobs.sum(1).exp(), answers, replacement=True, generator=generator)
            mask, state, old, ref = MASK[rows], STATE[rows], logprobs[rows], table_logprobs(reference)[rows]
            rewards = train_ppo.token_rewards(scores[rows], old, ref, mask, beta)
            old_values = values[state].clone()
            advantages, returns = train_ppo.gae(rewards, old_values, mask, 1.0, lam)
            advantages = train_ppo.whiten(advantages, mask)
        for _ in range(epochs):
            new = table_logprobs(policy)[rows]
            loss = train_ppo.policy_loss(new, old, advantages, mask)
            loss = loss + 0.1 * train_ppo.value_loss(values[state], old_values, returns, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return table_logprobs(policy.detach()).sum(1), values.detach()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_on_tables_converges_to_the_optimum_and_to_its_values(seed):
    reference, scores, beta = random_table(4), random_scores(5), 0.5
    ref = table_logprobs(reference).sum(1)
    best, log_z = optimum(ref, scores, beta)
    found, values = ppo_on_tables(reference, scores, beta, seed)
    assert total_variation(ref, best) > 0.3  # there is a way to go
    at_most(total_variation(found, best), 0.02)
    at_most(beta * log_z - objective(found, ref, scores, beta), 0.005)
    visits = per_state(lambda rows, t: best[rows].exp().sum())
    at_most((visits * (values - soft_values(reference, scores, beta)).abs()).sum() / visits.sum(), 0.05)


# ---------------------------------------------------------------------------------- through the real model and sampler

PROMPTS = [[1, 2], [0]]  # two questions of different lengths, with different rewards for the same answer
BETA = 0.5


def scores_of(prompt):
    """Rewards (40,) that are whole multiples of log 3 apart: people prefer an answer that is one step better with
    probability 3/4. An answer that does not end has -1, as PPO's missing_end_score says."""
    steps = [1 + (i + len(prompt)) % 2 if answer[-1] == END else 0 for i, answer in enumerate(ANSWERS)]
    return -1.0 + math.log(3) * torch.tensor(steps).double()


@pytest.fixture(scope="module")
def reference():
    return freeze(tiny_gpt(seed=3, n_embd=32, noise=0.1).float())


def start(reference):
    """A policy that is the reference, so far."""
    return copy.deepcopy(reference).requires_grad_(True)


@torch.no_grad()
def logp(model, prompt):
    return gpt_logprobs(model, prompt).double()


def distances(policy, reference):
    """Total variation between the policy and pi*, and between the reference and pi*: the larger of the two prompts."""
    rows = []
    for prompt in PROMPTS:
        best, _ = optimum(logp(reference, prompt), scores_of(prompt), BETA)
        rows.append((total_variation(logp(policy, prompt), best), total_variation(logp(reference, prompt), best)))
    return max(distance for distance, _ in rows), min(way for _, way in rows)


def judge(prompts, batch):
    """The reward as rollout() asks for it: score(prompts, batch) -> (B,)."""
    table = {(*prompt, *answer): score for prompt in PROMPTS for answer, score in zip(ANSWERS, scores_of(prompt))}
    return torch.stack([table[tuple(ids[:n])] for ids, n in zip(batch.ids.tolist(), batch.lengths.tolist())])


def train_by_ppo(reference, critic=None, iterations=60, answers=256):
    options = dict(steps=iterations, batch_size=answers, epochs=4, minibatches=1, micro_batch=0, max_new_tokens=3)
    config = train_ppo.Config(device="cpu", out=NOWHERE, beta=BETA, lr=3e-3, missing_end_score=-1.0, **options)
    run, policy, vocabulary = Run("ppo", config), start(reference), SimpleNamespace(end=END, pad=0)
    models = train_ppo.Models(policy, critic or policy.add_head(std=0.0), reference, judge)
    parameters = [*policy.parameters(), *(critic.parameters() if critic else ())]
    optimizer = adamw(parameters, config.lr, eps=1e-5)
    for step in range(1, iterations + 1):
        run.set_lr(optimizer, config.lr * schedule(step, iterations))
        prompts = PROMPTS * (answers // len(PROMPTS))
        batch = train_ppo.rollout(models, vocabulary, prompts, prompts, config, BETA, None)
        train_ppo.update(run, models, optimizer, batch, config)
    return policy


def one_step_better(prompt):
    """Pairs of a better and a worse answer, their rewards log 3 apart. They connect all answers with each other."""
    scores, pairs = scores_of(prompt), []
    for i, better in enumerate(ANSWERS):
        worse = [j for j in range(len(ANSWERS)) if 1 < (scores[i] - scores[j]) < 1.2]
        picked = [ANSWERS[worse[(3 * i + k) % len(worse)]] for k in range(6) if worse]
        pairs += [Pair(example(better, prompt), example(answer, prompt)) for answer in picked]
    return pairs


def train_by_dpo(reference, steps=200):
    """All pairs in every step. Labels of everybody, a quarter of them for the worse answer, are what label_smoothing
    1/4 means."""
    config = train_dpo.Config(device="cpu", out=NOWHERE, beta=BETA, label_smoothing=0.25, lr=2e-3, micro_batch=0)
    run, policy = Run("dpo", config), start(reference)
    optimizer = adamw(policy.parameters(), config.lr)
    pairs = [pair for prompt in PROMPTS for pair in one_step_better(prompt)]
    ref = train_dpo.reference_logprobs(reference, pairs, "cpu")
    for step in range(1, steps + 1):
        run.set_lr(optimizer, config.lr * schedule(step, steps))
        train_dpo.update(run, policy, optimizer, pairs, ref, config)
    return policy


@pytest.fixture(scope="module")
def trained(reference):
    torch.manual_seed(0)
    before = copy.deepcopy(reference.state_dict())
    trained = {"ppo": train_by_ppo(reference), "dpo": train_by_dpo(reference)}
    assert all(torch.equal(before[name], weight) for name, weight in reference.state_dict().items())
    return trained


@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_the_script_brings_the_transformer_to_the_optimum(method, trained, reference):
    distance, way = distances(trained[method], reference)
    assert way > 0.3
    at_most(distance, 0.03)


@pytest.mark.slow
def test_ppo_with_a_critic_of_its_own_comes_to_the_same_optimum(reference):
    torch.manual_seed(1)
    critic = tiny_gpt(seed=5, n_embd=32, noise=0.1).float().add_head(std=0.0)
    at_most(distances(train_by_ppo(reference, critic), reference)[0], 0.03)


def test_ppo_and_dpo_land_on_the_same_policy(trained):
    """One was given the rewards and its own samples, the other only who preferred what."""
    for prompt in PROMPTS:
        at_most(total_variation(logp(trained["ppo"], prompt), logp(trained["dpo"], prompt)), 0.03)
