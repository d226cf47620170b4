"""The sampler and PPO's rollout against the enumerated truth: what is sampled, how likely it was, what it is paid."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import train_ppo
from conftest import make_model, make_tokenizer
from enumerable import ANSWERS, END, FINISHED, LONGEST, NOWHERE, gpt_logprobs, random_scores, tiny_gpt
from measured import at_most, distance
from nanopost import reward, sampling
from nanopost.run import Run
from nanopost.sampling import choose, generate, sample_text

PROMPTS = [[1, 2], [0], [2, 0, 1]]  # of different lengths
NAMES = ["a question", "another one", "a third one"]  # the same prompts as they would stand in a file
SCORES = {name: random_scores(seed) for seed, name in enumerate(NAMES)}  # every prompt has rewards of its own
NUMBER = {answer: number for number, answer in enumerate(ANSWERS)}
MANY = 10_000  # answers to each
VOCABULARY = SimpleNamespace(end=END, pad=0)


# -------------------------------------------------------------------------------------------------------- the sampler


def sample(model, n=MANY, check_every=4, **options):
    """n answers to every prompt; answers that have ended are dropped from the cache every `check_every` tokens."""
    generator = torch.Generator().manual_seed(0)
    with mock.patch.object(sampling, "CHECK_EVERY", check_every):
        return generate(model, PROMPTS * n, LONGEST, END, generator=generator, **options)


def answer_numbers(samples, prompts):
    """Which of the 40 answers every row holds, (R,): the prompts are lists of ids."""
    rows = zip(samples.ids.tolist(), samples.lengths.tolist(), prompts)
    said = [tuple(ids[len(prompt) : stop]) for ids, stop, prompt in rows]
    assert set(said) <= NUMBER.keys()
    return torch.tensor([NUMBER[answer] for answer in said])


def which(samples, prompt):
    """The rows of a prompt (one of PROMPTS) and the numbers of the answers that they hold."""
    rows = torch.arange(PROMPTS.index(prompt), len(samples), len(PROMPTS))
    return rows, answer_numbers(samples.rows(rows), [prompt] * len(rows))


def logprobs_if(model, prompt, change):
    """log pi(answer) (40,) where every token is drawn from softmax(change(logits))."""
    logits, model.logits = model.logits, lambda hidden: change(logits(hidden))
    logp = gpt_logprobs(model, prompt)
    del model.__dict__["logits"]
    return logp.detach()


def tempered(temperature):
    return lambda logits: logits / temperature


def truncated(top_k=0, top_p=1.0):
    """Keeps the top_k likeliest tokens, or the fewest whose probabilities reach top_p: sorted, then counted."""

    def change(logits):
        kept = torch.full_like(logits, float("-inf")).view(-1, 4)
        for row, p in enumerate(logits.softmax(-1).view(-1, 4).tolist()):
            tokens = sorted(range(4), key=lambda token: -p[token])
            if top_k:
                tokens = tokens[:top_k]
            while sum(p[token] for token in tokens[:-1]) >= top_p:
                tokens.pop()
            kept[row, tokens] = logits.view(-1, 4)[row, tokens]
        return kept.view_as(logits)

    return change


def surprise(answers, p, least=4):
    """How far the counts of the answers are from their probabilities p (40,): the chi square of those that should come
    more than 20 times, in standard deviations above its mean."""
    n, counts = len(answers), answers.bincount(minlength=40)
    common = n * p > 20
    assert common.sum() >= least
    deviation = (counts - n * p) / (n * p).sqrt()
    return ((deviation**2)[common].sum() - common.sum()) / (2 * common.sum()) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_answer_is_sampled_as_often_as_its_probability_says(temperature):
    model = tiny_gpt(1)
    samples = sample(model, temperature=temperature)
    for prompt in PROMPTS:
        p = logprobs_if(model, prompt, tempered(temperature)).exp()
        at_most(surprise(which(samples, prompt)[1], p, least=9), 3.0)


@pytest.mark.parametrize("temperature, check_every", [(1.0, 4), (0.6, 4), (1.0, 1)])
def test_the_samplers_logprobs_are_those_of_the_answers(temperature, check_every):
    model = tiny_gpt(1)
    samples = sample(model, 100, check_every, temperature=temperature)
    for prompt in PROMPTS:
        rows, answers = which(samples, prompt)
        at_most(
            distance(samples.logprobs[rows].sum(1), logprobs_if(model, prompt, tempered(temperature))[answers]), 1e-12
        )
        assert (samples.ended[rows] == FINISHED[answers]).all()
        lengths = torch.tensor([len(ANSWERS[a]) for a in answers])
        assert (samples.lengths[rows] == len(prompt) + lengths).all() and (samples.mask[rows].sum(1) == lengths).all()


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.7}], ids=["top-k", "top-p"])
def test_truncated_sampling_is_scored_by_the_distribution_that_it_draws_from(options):
    model = tiny_gpt(1)
    samples = sample(model, 1000, **options)
    for prompt in PROMPTS:
        rows, answers = which(samples, prompt)
        logp = logprobs_if(model, prompt, truncated(**options))
        at_most(surprise(answers, logp.exp()), 5.0)
        at_most(distance(samples.logprobs[rows].sum(1), logp[answers]), 1e-12)


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
        apart = []
        for i in range(0, len(prompts), 7):
            apart += generate(model, prompts[i : i + 7], LONGEST, END, noise=noise[i : i + 7]).responses()
    assert together == apart and len(set(map(tuple, together))) > 10


def test_a_large_vocabulary_is_sampled_to_the_resolution_of_fp32():
    """50,257 tokens, most of them rare: over all noise the shares are the probabilities, to 2^-24 per token."""
    logits = 2.6 * torch.randn(50257, generator=torch.Generator().manual_seed(0))
    noise = (torch.arange(1000).float() + 0.5) / 1000  # an even comb
    drawn = torch.cat([choose(logits.expand(100, -1), part)[0] for part in noise.split(100)])
    shares = drawn.bincount(minlength=50257).double() / 1000
    at_most((shares.cumsum(0) - logits.double().softmax(-1).cumsum(0)).abs().max(), 1.1e-3)  # a comb of 1000 teeth


def test_sampled_text_keeps_the_tokens_that_were_sampled_and_their_log_probability():
    """Decoding an answer and encoding it again would give other tokens: here most answers are not even valid UTF-8."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size, favour=tokenizer.end).double().eval()
    prompts = [tokenizer.prompt([{"role": "user", "content": "x" * n}]) for n in (9, 2, 30, 5)] * 3
    examples = sample_text(model, tokenizer, prompts, 8, batch_size=5)
    for prompt, example in zip(prompts, examples, strict=True):
        assert example.prompt == prompt and example.ended == (example.ids[-1] == tokenizer.end)
        assert example.text == tokenizer.decode(example.response[:-1] if example.ended else example.response)
        logp = model.logits(model(torch.tensor([example.ids])))[0].log_softmax(-1)
        expected = sum(logp[t - 1, token] for t, token in enumerate(example.ids) if example.mask[t])
        at_most(abs(example.logprob - expected), 1e-9)
    assert {example.ended for example in examples} == {True, False}


# --------------------------------------------------------------------------------------------------------- the judge


def some_answers():
    """Answers to NAMES as the sampler gives them in training and in evaluation: a Batch, and the same as Examples."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size, favour=tokenizer.end)
    prompts = [tokenizer.prompt([{"role": "user", "content": name}]) for name in NAMES] * 4
    noise = torch.rand(len(prompts), 8, generator=torch.Generator().manual_seed(0))
    batch = generate(model, prompts, 8, tokenizer.end, noise=noise)
    assert batch.ended.any() and not batch.ended.all()
    return tokenizer, batch, sample_text(model, tokenizer, prompts, 8, noise=noise)


def test_a_reward_function_is_given_every_answer_with_its_own_prompt_and_without_its_end():
    asked = []

    def judge(prompts, completions):
        asked.append(list(zip(prompts, completions)))
        return [float(len(text)) for text in completions]

    tokenizer, batch, examples = some_answers()
    with mock.patch.object(reward, "load_function", return_value=judge):
        score = reward.load_reward("file.py:judge", tokenizer, "the policy", 48, "cpu")
    scores = [score(NAMES * 4, answers) for answers in (batch, examples)]
    for row, (name, text) in enumerate(asked[0]):
        whole = tokenizer.decode(batch.ids[row, : batch.lengths[row]])
        assert whole == f"<|user|>{NAMES[row % 3]}<|assistant|>{text}" + "<|end|>" * int(batch.ended[row])
        assert name == NAMES[row % 3] and scores[0][row] == len(text)
    assert asked[0] == asked[1] and torch.equal(*scores)


def test_a_reward_model_reads_prompt_and_answer_to_the_last_token():
    tokenizer, batch, examples = some_answers()
    model = make_model(tokenizer.vocab_size, scalar_head=True, seed=4).double()
    with mock.patch.object(reward, "load_reward_model", return_value=model):
        score = reward.load_reward("a folder", tokenizer, "the policy", 48, "cpu")
    alone = torch.stack([model.scalar(model(torch.tensor([example.ids])))[0, -1] for example in examples]).detach()
    at_most(distance([score(NAMES * 4, batch).detach(), score(NAMES * 4, examples)], [alone, alone]), 1e-12)


# --------------------------------------------------------------------------------------------------------- the rollout


def judge(names, batch):
    """The reward as rollout() asks for it: score(prompts, answers) -> (B,)."""
    answers = answer_numbers(batch, [PROMPTS[row % 3] for row in range(len(batch))])
    return torch.stack([SCORES[name][answer] for name, answer in zip(names, answers)])


def rollout(policy, reference, n=8, beta=0.0, critic=None, **options):
    """PPO's rollout of n answers to every prompt: the batch, the numbers of the answers, the models and the config."""
    config = train_ppo.Config(device="cpu", out=NOWHERE, max_new_tokens=LONGEST, **options)
    models = train_ppo.Models(policy, critic or policy, reference, judge)
    batch = train_ppo.rollout(models, VOCABULARY, NAMES * n, PROMPTS * n, config, beta, None)
    return batch, answer_numbers(batch, PROMPTS * n), models, config


def answer_logprobs(model, batch):
    """log pi(answer) of every row by its definition, (B,)."""
    logp = [gpt_logprobs(model, prompt).detach() for prompt in PROMPTS]
    answers = answer_numbers(batch, PROMPTS * (len(batch) // 3))
    return torch.stack([logp[row % 3][answer] for row, answer in enumerate(answers)])


def test_the_score_is_paid_on_the_last_token_whether_the_end_comes_first_later_last_or_never():
    """With gamma 1/2, no penalty and no values, a token that has k tokens after it is owed the score / 2^k."""
    batch, answers, _, config = rollout(tiny_gpt(1).add_head(std=0.0), tiny_gpt(1), n=64, gamma=0.5, lam=1.0)
    for row, answer in enumerate(answers.tolist()):
        score = SCORES[NAMES[row % 3]][answer].item() if FINISHED[answer] else config.missing_end_score
        length, start = len(ANSWERS[answer]), len(PROMPTS[row % 3]) - 1
        owed = [score / 2 ** (length - 1 - t) for t in range(length)]
        expected = torch.zeros_like(batch.returns[row])
        expected[start : start + length] = torch.tensor(owed, dtype=torch.float64)
        at_most(distance(batch.returns[row], expected), 1e-12)
    kinds = {(len(ANSWERS[a]), bool(FINISHED[a])) for a in answers.tolist()}
    assert kinds == {(1, True), (2, True), (3, True), (3, False)}


def test_a_rollout_samples_every_answer_as_often_as_it_says_that_it_does():
    """Sampled with top-k or top-p and scored without, the answers would come too often for their probabilities."""
    policy = tiny_gpt(1).add_head(std=0.0)
    batch = rollout(policy, tiny_gpt(1), n=3000)[0]
    for prompt in PROMPTS:
        rows, answers = which(batch, prompt)
        p = torch.zeros(40).double()
        p[answers] = batch.logprobs[rows].sum(1).exp()
        at_most(surprise(answers, p), 5.0)


def test_the_log_probabilities_of_an_answer_are_the_policys_and_the_references():
    policy, reference = tiny_gpt(1).add_head(std=0.0), tiny_gpt(2)
    batch = rollout(policy, reference)[0]
    found = [batch.logprobs.sum(1), batch.ref_logprobs.sum(1)]
    at_most(distance(found, [answer_logprobs(policy, batch), answer_logprobs(reference, batch)]), 1e-12)


def test_penalty_score_and_values_make_the_returns_and_advantages():
    """lambda 1: the advantage of an answer's first token is its score - beta log(pi / ref) - V(prompt)."""
    policy, reference = tiny_gpt(1).add_head(std=0.3), tiny_gpt(2)
    batch = rollout(policy, reference, beta=0.3, lam=1.0)[0]
    first = batch.mask.long().argmax(1, keepdim=True)
    values = policy.scalar(policy(batch.ids))[:, :-1].detach()
    at_most(distance(batch.values, values.masked_fill(~batch.mask, 0.0)), 1e-12)
    kl = answer_logprobs(policy, batch) - answer_logprobs(reference, batch)
    advantage = batch.scores - 0.3 * kl - values.gather(1, first)[:, 0]
    at_most(distance(batch.advantages.gather(1, first)[:, 0], advantage), 1e-12)


@pytest.mark.parametrize("separate", [False, True], ids=["one trunk", "a critic of its own"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_with_learning_rate_0_the_ratio_stays_1_and_nothing_is_clipped(temperature, separate):
    """The training forward finds the sampler's log-probabilities and values again, minibatch after minibatch."""
    policy, critic = tiny_gpt(1), tiny_gpt(5).add_head(std=0.3) if separate else None
    if not separate:
        policy.add_head(std=0.3)
    options = dict(temperature=temperature, beta=0.1, minibatches=3)
    batch, _, models, config = rollout(policy, tiny_gpt(2), critic=critic, **options)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    history = train_ppo.update(Run("ppo", config), models, optimizer, batch, config)
    assert len(history) == config.epochs * 3
    for stats in history:
        at_most(abs(stats["val/ratio"] - 1), 1e-12)
        at_most(stats["policy/approxkl"], 1e-24)
        assert stats["policy/clipfrac"] == stats["val/clipfrac"] == 0


def test_the_reference_is_measured_at_the_temperature_of_the_sampling():
    """Then a policy that is still the reference has KL 0."""
    batch = rollout(tiny_gpt(1).add_head(std=0.0), tiny_gpt(1), temperature=0.6)[0]
    at_most((batch.logprobs - batch.ref_logprobs).abs().max(), 1e-12)


# ------------------------------------------------------------------------------------------------------ what is logged

UNMOVED = [{"policy/approxkl": torch.tensor(0.0), "val/ratio": torch.tensor(1.0)}]  # a history of updates: one step


def test_the_objective_is_logged_as_score_minus_beta_kl_with_the_kl_of_policy_to_reference():
    """All in nats per answer, none per token: KL is log pi - log ref, and the entropy is - log pi, of whole answers."""
    policy, reference = tiny_gpt(1).add_head(std=0.0), tiny_gpt(2)
    batch, answers, _, config = rollout(policy, reference, n=64, beta=0.3)
    logged = train_ppo.statistics(batch, UNMOVED, 0.3)
    pi, ref = answer_logprobs(policy, batch), answer_logprobs(reference, batch)
    ended = FINISHED[answers]
    scores = torch.where(ended, judge(NAMES * 64, batch), config.missing_end_score)
    expected = {
        "objective/kl": (pi - ref).mean(),
        "objective/entropy": -pi.mean(),
        "objective/scores": scores.mean(),
        "objective/non_score_reward": -0.3 * (pi - ref).mean(),
        "objective/rlhf_reward": (scores - 0.3 * (pi - ref)).mean(),
        "response/ended": ended.double().mean(),
        "response/length": torch.tensor([len(ANSWERS[a]) for a in answers]).double().mean(),
    }
    assert expected["objective/kl"] > 0.1  # the sign can be seen
    for name, value in expected.items():
        at_most(abs(logged[name] - value), 1e-6)


def test_the_explained_variance_is_1_for_perfect_values_0_for_a_constant_and_ignores_all_but_the_answers():
    batch = rollout(tiny_gpt(1).add_head(std=0.0), tiny_gpt(2), beta=0.3)[0]
    for values, expected in ((batch.returns, 1.0), (torch.full_like(batch.returns, 7.0), 0.0), (-batch.returns, -3.0)):
        batch.values = torch.where(batch.mask, values, 1e6)
        at_most(abs(train_ppo.statistics(batch, UNMOVED, 0.3)["val/explained_variance"] - expected), 1e-9)
