"""The sampler and PPO's rollout against the enumerated truth: what is sampled, how likely it was, what it is paid."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import nanopost.sampling as sampling
import train_ppo
from enumerable import ANSWERS, END, FINISHED, LONGEST, gpt_logprobs, random_scores, tiny_gpt
from measured import at_most, distance
from nanopost.run import Run
from nanopost.sampling import generate

PROMPTS = [[1, 2], [0], [2, 0, 1]]  # of different lengths
MANY = 10_000  # answers to each
VOCABULARY, CPU = SimpleNamespace(end=END, pad=0), torch.device("cpu")


def sample(model, n=MANY, temperature=1.0, check_every=4):
    """n answers to every prompt; answers that have ended are dropped from the cache every so many steps."""
    generator = torch.Generator().manual_seed(0)
    with mock.patch.object(sampling, "CHECK_EVERY", check_every):
        return generate(model, PROMPTS * n, LONGEST, END, temperature=temperature, generator=generator)


def which(samples, prompt):
    """The rows of a prompt (one of PROMPTS) and the numbers of the answers (0..39) that they hold."""
    rows = torch.arange(PROMPTS.index(prompt), len(samples.ids), len(PROMPTS))
    ends = samples.lengths[rows].tolist()
    said = [tuple(ids[len(prompt) : stop]) for ids, stop in zip(samples.ids[rows].tolist(), ends)]
    assert set(said) <= set(ANSWERS)
    return rows, torch.tensor([ANSWERS.index(answer) for answer in said])


def tempered(model, prompt, temperature):
    """log pi(answer) (40,) where every token is said with softmax(logits / temperature)."""
    logits, model.logits = model.logits, lambda hidden: logits(hidden) / temperature
    logp = gpt_logprobs(model, prompt)
    del model.__dict__["logits"]
    return logp.detach()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_answer_is_sampled_as_often_as_its_probability_says(temperature):
    model = tiny_gpt(1)
    samples = sample(model, temperature=temperature)
    for prompt in PROMPTS:
        p = tempered(model, prompt, temperature).exp()
        counts = which(samples, prompt)[1].bincount(minlength=40)
        common = MANY * p > 20
        deviation = (counts - MANY * p).abs() / (MANY * p * (1 - p)).sqrt()
        assert common.sum() >= 9
        chi2, counts = (deviation**2 * (1 - p))[common].sum().item(), int(common.sum())
        at_most((chi2 - counts) / (2 * counts) ** 0.5, 3.0)  # chi square, in its standard deviations above its mean


@pytest.mark.parametrize("temperature, check_every", [(1.0, 4), (0.6, 4), (1.0, 1)])
def test_the_samplers_logprobs_are_those_of_the_answers(temperature, check_every):
    model = tiny_gpt(1)
    samples = sample(model, 100, temperature, check_every)
    for prompt in PROMPTS:
        rows, answers = which(samples, prompt)
        at_most(distance(samples.logprobs[rows].sum(1), tempered(model, prompt, temperature)[answers]), 1e-12)
        assert (samples.ended[rows] == FINISHED[answers]).all()
        lengths = torch.tensor([len(ANSWERS[a]) for a in answers])
        assert (samples.lengths[rows] == len(prompt) + lengths).all() and (samples.mask[rows].sum(1) == lengths).all()


def test_a_row_alone_says_what_it_says_in_a_batch():
    model, greedy = tiny_gpt(1), dict(temperature=0.0, max_new_tokens=LONGEST, end=END)
    together = generate(model, PROMPTS, **greedy)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], **greedy)
        assert alone.responses()[0] == together.responses()[row]
        at_most((alone.logprobs.sum() - together.logprobs[row].sum()).abs(), 1e-12)


def test_an_answer_depends_on_its_prompt_and_its_own_noise_and_on_no_other_row():
    """So neither the size of a batch nor who is in it, nor when ended rows are dropped, changes what is sampled."""
    model, prompts = tiny_gpt(1), PROMPTS * 20
    noise = torch.rand(len(prompts), LONGEST, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(sampling, "CHECK_EVERY", 1):
        together = generate(model, prompts, LONGEST, END, noise=noise).responses()
        apart = [generate(model, prompts[i : i + 7], LONGEST, END, noise=noise[i : i + 7]).responses()
                 for i in range(0, len(prompts), 7)]
    assert together == sum(apart, []) and len(set(map(tuple, together))) > 10


def rollout(policy, reference, n=8, beta=0.0, critic=None, **options):
    """PPO's rollout with the reward random_scores(1) of an answer, and the numbers of the answers, row by row."""
    config = train_ppo.Config(device="cpu", max_new_tokens=LONGEST, **options)
    scores = random_scores(1)
    seen = {}

    def judge(prompts, samples):
        seen["answers"] = torch.empty(len(samples.ids), dtype=torch.long)
        for prompt in PROMPTS:
            rows, seen["answers"][rows] = which(samples, prompt)[0], which(samples, prompt)[1]
        return scores[seen["answers"]]

    batch = train_ppo.rollout(policy, critic, reference, judge, None, PROMPTS * n, VOCABULARY, config, beta)
    return batch, seen["answers"], config


def test_the_score_is_paid_on_the_last_token_whether_the_end_comes_first_later_last_or_never():
    """With gamma 1/2, no penalty and no values, a token that has k tokens after it is owed the score / 2^k."""
    policy = tiny_gpt(1).add_head(std=0.0)
    batch, answers, config = rollout(policy, tiny_gpt(1), n=64, gamma=0.5, lam=1.0)
    for row, answer in enumerate(answers.tolist()):
        score = random_scores(1)[answer].item() if FINISHED[answer] else config.missing_end_score
        length, start = len(ANSWERS[answer]), len(PROMPTS[row % 3]) - 1
        owed = [score / 2 ** (length - 1 - t) for t in range(length)]
        expected = torch.zeros_like(batch["returns"][row])
        expected[start : start + length] = torch.tensor(owed, dtype=torch.float64)
        at_most(distance(batch["returns"][row], expected), 1e-12)
    kinds = {(len(ANSWERS[a]), bool(FINISHED[a])) for a in answers.tolist()}
    assert kinds == {(1, True), (2, True), (3, True), (3, False)}


def test_the_kl_and_the_entropy_of_an_answer_are_those_of_its_log_probabilities():
    policy, reference = tiny_gpt(1).add_head(std=0.0), tiny_gpt(2)
    batch, answers, _ = rollout(policy, reference)
    for row, answer in enumerate(answers.tolist()):
        prompt = PROMPTS[row % 3]
        expected = (gpt_logprobs(policy, prompt) - gpt_logprobs(reference, prompt))[answer]
        at_most((batch["kl"][row] - expected).abs(), 1e-12)
        at_most((batch["entropy"][row] + gpt_logprobs(policy, prompt)[answer]).abs(), 1e-12)


def test_penalty_score_and_values_make_the_returns_and_advantages():
    """lambda 1: the advantage of an answer's first token is its score - beta log(pi / ref) - V(prompt)."""
    policy, reference = tiny_gpt(1).add_head(std=0.3), tiny_gpt(2)
    batch, answers, config = rollout(policy, reference, beta=0.3, lam=1.0)
    first = batch["mask"].long().argmax(1, keepdim=True)
    values = policy.scalar(policy(batch["ids"]))[:, :-1].detach()
    at_most(distance(batch["old_values"], values.masked_fill(~batch["mask"], 0.0)), 1e-12)
    advantage = batch["scores"] - 0.3 * batch["kl"] - values.gather(1, first)[:, 0]
    at_most(distance(batch["advantages"].gather(1, first)[:, 0], advantage), 1e-12)


@pytest.mark.parametrize("separate", [False, True], ids=["one trunk", "a critic of its own"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_with_learning_rate_0_the_ratio_stays_1_and_nothing_is_clipped(temperature, separate):
    """The training forward finds the sampler's log-probabilities and values again, minibatch after minibatch."""
    policy, critic = tiny_gpt(1), tiny_gpt(5).add_head(std=0.3) if separate else None
    if not separate:
        policy.add_head(std=0.3)
    batch, _, config = rollout(policy, tiny_gpt(2), critic=critic, temperature=temperature, beta=0.1, minibatches=3)
    run = Run("ppo", config)
    history = train_ppo.update(run, policy, critic, torch.optim.SGD(policy.parameters(), lr=0.0), batch, config)
    assert len(history) == config.epochs * 3
    for stats in history:
        at_most(abs(stats["val/ratio"] - 1), 1e-12)
        at_most(stats["policy/approxkl"], 1e-24)
        assert stats["policy/clipfrac"] == stats["val/clipfrac"] == 0


def test_the_reference_is_measured_at_the_temperature_of_the_sampling():
    """Then a policy that is still the reference has KL 0."""
    batch, _, _ = rollout(tiny_gpt(1).add_head(std=0.0), tiny_gpt(1), temperature=0.6)
    at_most(batch["kl"].abs().max(), 1e-12)


def test_a_large_vocabulary_is_sampled_to_the_resolution_of_fp32():
    """50,257 tokens, most of them rare: over all noise the shares are the probabilities, to 2^-24 a token and rounding."""
    logits = 2.6 * torch.randn(50257, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1)

    class Constant:
        """Stands for a model that always has the same distribution."""

        config = SimpleNamespace(block_size=8, n_layer=1, n_head=1, n_embd=1)
        head, device, training = None, CPU, False
        wte, eval, train = torch.nn.Embedding(1, 1), lambda self: self, lambda self, mode: self

        def __call__(self, ids, cache=None):
            return torch.zeros(*ids.shape, 1)

        def logits(self, hidden):
            return logits.expand(len(hidden), -1)

    model = Constant()
    noise = (torch.arange(1000).float() + 0.5) / 1000  # an even comb
    tokens = [generate(model, [[0]] * 100, 1, -1, noise=part[:, None]).ids[:, 1] for part in noise.split(100)]
    drawn = torch.cat(tokens).bincount(minlength=50257).double() / 1000
    at_most((drawn.cumsum(0) - p.cumsum(0)).abs().max(), 1.1e-3)  # a comb of 1000 teeth
