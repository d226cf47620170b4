"""Sampling: what generate() returns is what full forward passes say, whatever the lengths and however rows end."""

from types import SimpleNamespace

import pytest
import torch

import nanopost.sampling as sampling
from nanopost.data import Example, batches, collate
from nanopost.reward import score_examples
from nanopost.sampling import Decoding, choose, filter_logits, generate, sample_text, show_answers

V, END = 11, 5  # a vocabulary so small that rows end soon, in a matrix with 53 unused rows


@pytest.fixture
def model(tiny):
    return tiny(V, block_size=40, noise=0.4).eval()


def make_prompts(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n,), generator=generator).tolist()
    return [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]


def distribution(model, ids, temperature=1.0):
    """log-probabilities (V,) of the token after these, from a full forward pass."""
    return (model.logits(model(torch.tensor([ids])))[0, -1] / temperature).log_softmax(-1)


def comb(n):
    """n numbers spread evenly over [0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


# ------------------------------------------------------------------------------------ choose: one token per row

P = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05], dtype=torch.float64)


def choices(logits, noise, **options):
    """choose() with the same logits (V,) for every number of the noise (n,)."""
    return choose(logits.expand(len(noise), -1), noise, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_over_all_noise_a_token_is_chosen_as_often_as_its_probability(temperature):
    expected = (P.log() / temperature).softmax(0)
    tokens, logprobs = choices(P.log(), comb(1000), temperature=temperature)
    shares = tokens.bincount(minlength=5) / 1000
    assert (shares - expected).abs().max() <= 1.001 / 1000  # a tooth of the comb
    torch.testing.assert_close(logprobs, expected[tokens].log(), rtol=0, atol=1e-12)


def test_a_token_is_where_the_noise_falls_among_the_cumulative_probabilities():
    quarters = torch.tensor([0.0, -float("inf"), 0.0, 0.0, 0.0])  # 1/4, 0, 1/4, 1/4, 1/4: exact in binary
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.7499, 0.75, 0.9999])
    assert choices(quarters, noise)[0].tolist() == [0, 0, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_noise_reaches_a_token_of_probability_0(dtype):
    """Neither 0, nor the largest number below 1, nor 1, which noise becomes when it is rounded to fewer digits."""
    below = torch.tensor(1.0, dtype=dtype).nextafter(torch.tensor(0.0, dtype=dtype))
    noise = torch.stack([torch.zeros((), dtype=dtype), below, torch.ones((), dtype=dtype)])
    for probabilities in ([0.0, 0.3, 0.7, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.9, 1e-6, 0.0]):
        logits = torch.tensor(probabilities, dtype=dtype).log()
        tokens, logprobs = choices(logits, noise)
        possible = logits.isfinite().nonzero()[:, 0].tolist()
        assert tokens.tolist() == [possible[0], possible[-1], possible[-1]]
        assert logprobs.isfinite().all()


def test_every_row_has_its_own_logits_and_noise():
    logits = torch.stack([P.log(), P.flip(0).log()])
    tokens, logprobs = choose(logits, torch.tensor([0.08, 0.08], dtype=torch.float64))
    assert tokens.tolist() == [0, 1]  # the first probabilities are 0.1 and 0.05
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 0.3], dtype=torch.float64))


def test_temperature_0_takes_the_likeliest_token_and_needs_no_noise():
    tokens, logprobs = choose(P.log()[None], None, temperature=0)
    assert tokens.tolist() == [1] and logprobs.exp().item() == pytest.approx(0.5)
    logits = torch.full((1, V), -1e9)
    logits[0, 3], logits[0, 7] = 1e-8, 2e-8  # their probabilities are equal in fp32
    assert choose(logits, None, temperature=0)[0].tolist() == [7]


def test_half_precision_logits_become_fp32_before_anything_is_done_with_them():
    """A quotient in half precision would be rounded once more."""
    halves = torch.linspace(-3, 3, V).bfloat16()[None]
    for temperature in (1.0, 0.7):
        token, logprob = choose(halves, torch.tensor([0.5]), temperature)
        expected = (halves.float() / temperature).log_softmax(-1)[0, token]
        assert logprob.dtype == torch.float32
        torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-6)


def test_where_all_is_nan_the_token_exists_and_its_logprob_shows_it():
    for options in ({}, {"temperature": 0}, {"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.5}):
        tokens, logprobs = choices(torch.full((4,), float("nan")), torch.tensor([0.0, 0.5, 0.99]), **options)
        assert (tokens >= 0).all() and (tokens < 4).all() and logprobs.isnan().all()


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.75}, {"top_k": 3, "top_p": 0.7}])
def test_a_truncated_distribution_is_chosen_from_and_scored_as_one(options):
    expected = torch.tensor([0, 0.5 / 0.8, 0, 0.3 / 0.8, 0], dtype=torch.float64)
    tokens, logprobs = choices(P.log(), comb(1000), **options)
    assert (tokens.bincount(minlength=5) / 1000 - expected).abs().max() <= 1.001 / 1000
    torch.testing.assert_close(logprobs, expected[tokens].log(), rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------- top-k and top-p


def kept(logits):
    return logits.isfinite().nonzero()[:, 0].tolist()


def test_top_k_keeps_the_k_likeliest_tokens():
    assert kept(filter_logits(P.log(), top_k=1)) == [1]
    assert kept(filter_logits(P.log(), top_k=2)) == [1, 3]
    assert kept(filter_logits(P.log(), top_k=3)) == [0, 1, 3]
    assert kept(filter_logits(P.log(), top_k=99)) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    assert kept(filter_logits(P.log(), top_p=0.3)) == [1]
    assert kept(filter_logits(P.log(), top_p=0.6)) == [1, 3]
    assert kept(filter_logits(P.log(), top_p=0.85)) == [0, 1, 3]
    assert kept(filter_logits(P.log(), top_p=1.0)) == [0, 1, 2, 3, 4]


def test_top_p_that_is_reached_exactly_needs_no_further_token():
    assert kept(filter_logits(torch.zeros(1, 2), top_p=0.5)[0]) in ([0], [1])  # two tokens of probability 1/2


def test_the_likeliest_token_survives_any_top_p():
    assert kept(filter_logits(P.log(), top_p=1e-6)) == [1]


def test_filters_work_row_by_row_and_leave_the_kept_logits_alone():
    logits = torch.stack([P.log(), P.flip(0).log()])
    filtered = filter_logits(logits, top_k=2)
    assert kept(filtered[0]) == [1, 3] and kept(filtered[1]) == [1, 3]
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


# ----------------------------------------------------------------------------------- the bookkeeping of a sample


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_values_are_those_of_a_full_forward_pass(model, temperature):
    model.add_head(std=0.5)
    batch = generate(model, make_prompts(), 20, END, temperature=temperature)
    assert len(set(batch.mask.sum(1).tolist())) > 5  # rows end at different steps, so rows are dropped on the way
    hidden = model(batch.ids)
    expected = model.logprobs(hidden, batch.ids, batch.index, temperature)
    torch.testing.assert_close(batch.logprobs, expected, rtol=0, atol=1e-5)
    values = model.scalar(hidden)[:, :-1].masked_fill(~batch.mask, 0.0)
    torch.testing.assert_close(batch.values, values, rtol=0, atol=1e-5)
    assert (batch.values[batch.mask] != 0).all()


def test_without_a_scalar_head_there_are_no_values(model):
    assert generate(model, [[1]], 3, END).values is None


def test_the_mask_marks_exactly_the_response_with_its_end_token(model):
    prompts = make_prompts()
    batch = generate(model, prompts, 20, END)
    for row, prompt in enumerate(prompts):
        start, stop = len(prompt), batch.lengths[row].item()
        assert batch.ids[row, :start].tolist() == prompt
        assert batch.mask[row].nonzero()[:, 0].tolist() == list(range(start - 1, stop - 1))
        assert (batch.logprobs[row][~batch.mask[row]] == 0).all() and (batch.logprobs[row][batch.mask[row]] < 0).all()
    assert torch.equal(batch.index, batch.mask.flatten().nonzero()[:, 0])


def test_a_row_has_ended_if_and_only_if_its_last_token_is_the_end_token(model):
    prompts = make_prompts()
    batch = generate(model, prompts, 12, END)
    assert batch.ended.any() and not batch.ended.all()
    for row, prompt in enumerate(prompts):
        response = batch.ids[row, len(prompt) : batch.lengths[row]].tolist()
        assert batch.ended[row].item() == (response[-1] == END)
        assert END not in response[:-1]
        assert batch.ended[row] or len(response) == 12


def test_the_batch_is_cut_to_the_longest_row_and_padded_with_pad(model):
    batch = generate(model, make_prompts(4), 20, END, pad=9)
    T = batch.lengths.max().item()
    assert batch.ids.shape == (4, T) and batch.mask.shape == batch.logprobs.shape == (4, T - 1)
    for row, length in enumerate(batch.lengths.tolist()):
        assert (batch.ids[row, length:] == 9).all()


def test_responses_are_the_answers_without_the_end_token(model):
    prompts = make_prompts()
    batch = generate(model, prompts, 12, END)
    for row, response in enumerate(batch.responses()):
        assert END not in response
        whole = batch.ids[row, len(prompts[row]) : batch.lengths[row]].tolist()
        assert whole == response + [END] * batch.ended[row].item()


def test_an_end_token_in_the_prompt_does_not_end_the_answer(model):
    batch = generate(model, [[END, 3, END]] * 20, 6, END)
    assert (batch.mask[:, :2] == 0).all() and (batch.lengths > 3).all() and (batch.lengths > 4).any()


def test_what_is_sampled_is_a_batch_to_train_on(model):
    """The same rows collated from their ids and masks."""
    prompts = make_prompts(7)
    batch = generate(model, prompts, 12, END)
    examples = []
    for row, prompt in enumerate(prompts):
        length = batch.lengths[row].item()
        mask = [False] * len(prompt) + [True] * (length - len(prompt))
        examples.append(Example(batch.ids[row, :length].tolist(), mask))
    collated = collate(examples)
    T = batch.ids.shape[1]
    assert torch.equal(batch.lengths, collated.lengths) and torch.equal(batch.ids, collated.ids[:, :T])
    assert torch.equal(batch.mask, collated.mask[:, : T - 1]) and batch.targets == collated.targets


# ----------------------------------------------------------------------------------------- which tokens are sampled


@torch.no_grad()
def test_greedy_takes_the_argmax_of_full_forward_passes(model):
    prompts = make_prompts(12)
    batch = generate(model, prompts, 10, END, temperature=0)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + 10 and (len(ids) == len(prompt) or ids[-1] != END):
            ids.append(distribution(model, ids).argmax().item())
        assert batch.ids[row, : batch.lengths[row]].tolist() == ids


def test_a_row_alone_is_the_row_in_a_batch(model):
    prompts = make_prompts(12)
    batch = generate(model, prompts, 10, END, temperature=0)
    for row, prompt in enumerate(prompts):
        alone, length = generate(model, [prompt], 10, END, temperature=0), batch.lengths[row].item()
        assert alone.ids[0].tolist() == batch.ids[row, :length].tolist()
        torch.testing.assert_close(alone.logprobs[0], batch.logprobs[row, : length - 1], rtol=0, atol=1e-5)


def test_equal_prompts_are_read_once_and_answered_as_if_alone(model, monkeypatch):
    prompts, noise = [PROMPTS[i] for i in (2, 0, 2, 1, 0, 2)], torch.rand(6, 12)
    alone = [generate(model, [p], 12, END, noise=noise[i : i + 1]).responses()[0] for i, p in enumerate(prompts)]
    read, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args: read.append(len(args[1])) or forward(*args))
    assert generate(model, prompts, 12, END, noise=noise).responses() == alone
    assert read[0] == 3 and read[1] == 6  # three different prompts, then six answers


def test_how_often_ended_rows_are_dropped_changes_nothing(model, monkeypatch):
    results = []
    for every in (1, 3, 100):
        monkeypatch.setattr(sampling, "CHECK_EVERY", every)
        results.append(generate(model, make_prompts(), 16, END, temperature=0))
    for other in results[1:]:
        assert torch.equal(results[0].ids, other.ids) and torch.equal(results[0].lengths, other.lengths)
        torch.testing.assert_close(results[0].logprobs, other.logprobs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_unused_row_of_the_matrix_is_never_sampled(model):
    model.wte.weight[V:] = 50 * model.wte.weight[END]  # as tokens they would be the likeliest or the least likely
    for temperature in (0, 1.0, 5.0):
        assert generate(model, make_prompts(40), 10, END, temperature=temperature).ids.max() < V


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_frequencies_of_sampled_tokens_follow_the_softmax(tiny, temperature):
    model, prompt = tiny(V, noise=0.2), [1, 2, 3]
    batch = generate(model, [prompt] * 2000, 1, END, temperature=temperature, noise=comb(2000)[:, None])
    shares = batch.ids[:, 3].bincount(minlength=V) / 2000
    p = distribution(model, prompt, temperature).exp()
    assert (shares - p).abs().max() < 1.1 / 2000  # a tooth of the comb, and rounding


@torch.no_grad()
def test_with_top_k_the_logprobs_are_of_the_distribution_sampled_from(model):
    batch = generate(model, [[1, 2]] * 50, 1, END, top_k=3)
    logp, tokens = distribution(model, [1, 2]).topk(3)
    expected = dict(zip(tokens.tolist(), (logp - logp.logsumexp(0)).tolist()))
    for token, logprob in zip(batch.ids[:, 2].tolist(), batch.logprobs[:, 1].tolist()):
        assert logprob == pytest.approx(expected[token], abs=1e-5)


def test_the_same_generator_gives_the_same_answers_and_another_seed_others(model):
    def sample(seed):
        return generate(model, make_prompts(), 8, END, generator=torch.Generator().manual_seed(seed)).responses()

    assert sample(1) == sample(1) != sample(2)


def test_all_chance_is_in_the_noise_one_number_per_token(model):
    prompts, generator = make_prompts(), torch.Generator().manual_seed(1)
    drawn = generate(model, prompts, 8, END, generator=generator).responses()
    noise = torch.rand(len(prompts), 8, generator=torch.Generator().manual_seed(1))
    assert generate(model, prompts, 8, END, noise=noise).responses() == drawn
    noise[:, 3:] = 1 - noise[:, 3:]  # what comes later changes nothing that came before
    other = generate(model, prompts, 8, END, noise=noise).responses()
    assert [ids[:3] for ids in other] == [ids[:3] for ids in drawn] and other != drawn


def test_sampling_is_without_dropout_and_leaves_the_model_as_it_was(tiny):
    model = tiny(V, block_size=40, dropout=0.5, noise=0.4).train()
    before = torch.get_rng_state()
    first, second = (generate(model, make_prompts(), 8, END, temperature=0) for _ in range(2))
    assert torch.equal(first.ids, second.ids) and torch.equal(first.logprobs, second.logprobs)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------- Decoding


PROMPTS = [[1, 2, 3], [4, 5], [6] * 9, [7, 8], [9], [1, 1]]


@torch.no_grad()
def test_a_decoding_by_hand_is_generate(model):
    """prefill, then append, extend and step, without ever looking at which rows have ended."""
    noise = torch.rand(6, 12)
    rows = Decoding(model, PROMPTS, 12, pad=0)
    hidden = rows.prefill()
    for n in range(12):
        rows.append(hidden, END, noise, 1.0, 0, 1.0)
        if n < 11:
            rows.cache.extend()
            hidden = rows.step()
    by_hand, expected = rows.batch(), generate(model, PROMPTS, 12, END, noise=noise)
    for name, x in expected.tensors().items():
        torch.testing.assert_close(getattr(by_hand, name), x, rtol=0, atol=1e-5)
    assert len(set(by_hand.lengths.tolist())) > 2


@torch.no_grad()
def test_rows_that_have_ended_are_dropped_all_at_once_or_when_a_third_have(model):
    rows = Decoding(model, PROMPTS, 12, pad=0)
    rows.append(rows.prefill(), END, torch.rand(6, 12), 1.0, 0, 1.0)
    rows.ended[:] = torch.tensor([False, True, False, False, False, False])
    token = rows.token
    assert rows.drop_ended(at_once=False) == 5 and len(rows.rows) == 6  # 5 of 6 still going: not worth a copy
    rows.ended[4] = True
    assert rows.drop_ended(at_once=False) == 4 and rows.rows.tolist() == [0, 2, 3, 5]
    assert torch.equal(rows.token, token[[0, 2, 3, 5]]) and rows.cache.pos[1:].tolist() == [9, 2, 2]
    rows.ended[3] = True
    assert rows.drop_ended(at_once=False) == 3 and len(rows.rows) == 4
    assert rows.drop_ended(at_once=True) == 3 and rows.rows.tolist() == [0, 2, 5]
    rows.ended[:] = True
    assert rows.drop_ended(at_once=True) == 0


@torch.no_grad()
def test_a_row_that_has_ended_stays_as_it_is(model):
    rows = Decoding(model, PROMPTS, 12, pad=0)
    rows.append(rows.prefill(), END, torch.rand(6, 12), 1.0, 0, 1.0)
    rows.ended[1] = True
    before = [x[1].clone() for x in (rows.ids, rows.logprobs, rows.lengths)]
    for _ in range(3):
        rows.cache.extend()
        rows.append(rows.step(), END, torch.rand(6, 12), 1.0, 0, 1.0)
    assert all(torch.equal(a, b[1]) for a, b in zip(before, (rows.ids, rows.logprobs, rows.lengths)))
    assert rows.lengths[0] == 3 + 4 or rows.ended[0]


def test_generate_looks_at_the_device_every_few_steps_only(model, monkeypatch):
    looks, drop_ended = [], Decoding.drop_ended
    monkeypatch.setattr(Decoding, "drop_ended", lambda r, at_once: looks.append(r.cache.used) or drop_ended(r, at_once))
    generate(model, [[1]] * 3, 12, end=-1)
    every = sampling.CHECK_EVERY
    assert every > 1 and looks == list(range(every, 12, every))  # used: the prompt's token and all but the last new one


# ---------------------------------------------------------------------------------------------- limits and errors


def test_a_prompt_that_leaves_no_room_or_is_empty_raises_valueerror(model):
    generate(model, [[1] * 30], 10, END)
    with pytest.raises(ValueError, match="30 tokens and 11 new ones exceed the context of 40"):
        generate(model, [[1] * 30], 11, END)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], 3, END)


def test_on_token_sees_the_tokens_of_the_rows_still_going(model):
    steps, prompts = [], make_prompts()
    batch = generate(model, prompts, 20, END, on_token=steps.append, generator=torch.Generator().manual_seed(0))
    answers = [ids[mask].tolist() for ids, mask in zip(batch.ids[:, 1:], batch.mask)]
    longest = max(map(len, answers))
    assert steps == [[answer[n] for answer in answers if len(answer) > n] for n in range(longest)]
    assert len(steps[0]) == len(prompts) > len(steps[-1])


def test_on_token_sees_every_token_of_a_single_answer(model):
    seen = []
    batch = generate(model, [[1, 2]], 12, END, on_token=lambda ids: seen.extend(ids))
    assert seen == batch.ids[0, 2:].tolist()


def test_sampling_stops_when_all_rows_have_ended(model, monkeypatch):
    steps, extend = [], sampling.KVCache.extend
    monkeypatch.setattr(sampling.KVCache, "extend", lambda cache: steps.append(1) or extend(cache))
    batch = generate(model, [[1]] * 3, 30, END, generator=torch.Generator().manual_seed(0))
    longest = int(batch.mask.sum(1).max())
    assert longest < 25 and len(steps) < longest + sampling.CHECK_EVERY


def test_a_model_whose_weights_are_nan_samples_tokens_that_exist_and_shows_it(model):
    model.ln_f.weight.data.fill_(float("nan"))
    batch = generate(model, [[1, 2]], 4, END)
    assert batch.ids.max() < V and batch.logprobs[batch.mask].isnan().all()


def test_a_model_in_bf16_has_fp32_log_probabilities(model):
    batch = generate(model.bfloat16(), make_prompts(), 8, END)
    assert batch.logprobs.dtype == torch.float32 and 0 < batch.logprobs[batch.mask].exp().mean() < 1


# ------------------------------------------------------------------------------------------- text in, text out


class Letters(SimpleNamespace):
    def decode(self, ids):
        return "".join("abcdefghijk"[i] for i in ids)


LETTERS = Letters(end=END, pad=0)


def test_sample_text_keeps_the_order_of_the_prompts(model):
    prompts = make_prompts(17)
    for batch_size in (4, 100):
        answers = sample_text(model, LETTERS, prompts, 8, batch_size=batch_size, temperature=0)
        assert [answer.prompt for answer in answers] == prompts
        for answer in answers:
            [alone] = sample_text(model, LETTERS, [answer.prompt], 8, temperature=0)
            assert (alone.ids, alone.mask) == (answer.ids, answer.mask)
            assert (alone.text, alone.ended) == (answer.text, answer.ended)


@torch.no_grad()
def test_sample_text_returns_the_response_with_its_end_token_its_text_and_its_logprob(model):
    answers = sample_text(model, LETTERS, make_prompts(10), 8, seed=3)
    assert len({answer.ended for answer in answers}) == 2
    for answer in answers:
        assert answer.mask == [False] * len(answer.prompt) + [True] * len(answer.response)
        assert answer.ended == (answer.response[-1] == END)
        assert answer.text == LETTERS.decode(answer.response[:-1] if answer.ended else answer.response)
        total, ids = 0.0, list(answer.prompt)
        for token in answer.response:
            total += distribution(model, ids)[token].item()
            ids.append(token)
        assert answer.logprob == pytest.approx(total, abs=1e-4)


def test_sample_text_bounds_the_tokens_of_a_batch_and_that_changes_nothing(model, monkeypatch):
    prompts, sizes, real = make_prompts(), [], sampling.generate
    whole = sample_text(model, LETTERS, prompts, 8, seed=3)

    def measured(model, part, new, *rest, **options):
        sizes.append(len(part) * (max(map(len, part)) + new))
        return real(model, part, new, *rest, **options)

    monkeypatch.setattr(sampling, "BATCH_TOKENS", 60)
    monkeypatch.setattr(sampling, "generate", measured)
    parts = sample_text(model, LETTERS, prompts, 8, seed=3)
    assert [answer.ids for answer in parts] == [answer.ids for answer in whole]
    assert len(sizes) > 1 and max(sizes) <= 60


def test_sample_text_puts_equal_prompts_side_by_side(model, monkeypatch):
    batches, real = [], sampling.generate

    def watched(model, part, *rest, **options):
        batches.append(part)
        return real(model, part, *rest, **options)

    monkeypatch.setattr(sampling, "generate", watched)
    sample_text(model, LETTERS, [[1, 2], [3], [2, 1], [1, 2], [3], [2, 1]], 6, batch_size=2)
    assert batches == [[[3], [3]], [[1, 2], [1, 2]], [[2, 1], [2, 1]]]


def test_sample_text_depends_on_its_seed_only(model):
    def texts(seed):
        torch.rand(seed + 1)  # the global random numbers do not matter
        return [answer.text for answer in sample_text(model, LETTERS, make_prompts(), 8, seed=seed)]

    assert texts(1) == texts(1) != texts(2)


def test_sample_text_takes_noise_in_the_order_of_the_prompts(model):
    prompts = make_prompts()
    noise = torch.rand(len(prompts), 8)
    together = sample_text(model, LETTERS, prompts, 8, noise=noise, batch_size=5)
    for i, prompt in enumerate(prompts):
        [alone] = sample_text(model, LETTERS, [prompt], 8, noise=noise[i : i + 1])
        assert alone.ids == together[i].ids


def test_sample_text_of_no_prompts_is_empty(model):
    assert sample_text(model, LETTERS, [], 8) == []


def test_show_answers_leaves_out_prompts_without_room(tokenizer, tiny):
    model = tiny(tokenizer.vocab_size, favour=tokenizer.end)
    shown = show_answers(model, tokenizer, [tokenizer.encode("short"), tokenizer.encode("x" * 47)], 10)
    assert "short" in shown and "xxx" not in shown


@torch.no_grad()
def test_score_examples_keeps_the_order_and_scores_the_last_token(model):
    model.add_head(std=0.5)
    answers = [Example(p + p[::-1] + [END], [False] * len(p) + [True] * (len(p) + 1)) for p in make_prompts(9)]
    scores = score_examples(model, answers, batch_size=4)
    for answer, score in zip(answers, scores.tolist(), strict=True):
        assert score == pytest.approx(model.scalar(model(torch.tensor([answer.ids])))[0, -1].item(), abs=1e-5)


def test_batches_of_prompts_can_feed_the_sampler(model):
    prompts = make_prompts(10)
    rows = next(batches(prompts, 4))
    batch = generate(model, [prompts[i] for i in rows], 4, END)
    assert batch.mask.long().argmax(1).tolist() == [len(prompts[i]) - 1 for i in rows]


@pytest.mark.parametrize("part_rows, parts", [(100, 1), (4, 2), (2, 4), (1, 4)])
def test_a_rollout_in_parts_has_the_same_samples_in_the_same_rows(part_rows, parts, tiny, monkeypatch):
    model, calls = tiny(60).add_head(0.5).eval(), []
    prompts = [[7] * n for n in (5, 1, 9, 3, 30, 2, 4, 6)]
    noise = torch.rand(8, 12)

    def rollout(names, prompts, noise):
        calls.append(names)
        batch = generate(model, prompts, 12, 3, noise=noise)
        batch.scores = torch.tensor([float(name) for name in names])
        return batch

    whole = rollout(range(8), prompts, noise)
    calls.clear()
    monkeypatch.setattr(sampling, "PART_ROWS", part_rows)
    batch = sampling.in_parts(rollout, list(range(8)), prompts, noise)
    assert len(calls) == parts and batch.scores.tolist() == list(range(8))
    longest = [max(len(prompts[i]) for i in names) for names in calls]
    assert longest == sorted(longest) and longest[-1] == 30  # each part is as wide as its own prompts need
    T = whole.ids.shape[1]
    assert torch.equal(batch.lengths, whole.lengths) and torch.equal(batch.ended, whole.ended)
    assert batch.ids.shape[1] == T and torch.equal(batch.mask, whole.mask)
    assert torch.equal(batch.ids[:, 1:][batch.mask], whole.ids[:, 1:][whole.mask])
    torch.testing.assert_close(batch.logprobs, whole.logprobs)
    torch.testing.assert_close(batch.values, whole.values)
