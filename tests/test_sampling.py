"""Sampling: what generate() returns is what full forward passes say, whatever the lengths and however rows end."""

from types import SimpleNamespace

import pytest
import torch

import nanopost.sampling as sampling
from nanopost.data import batches
from nanopost.reward import score_samples
from nanopost.sampling import filter_logits, generate, sample_text, show_answers

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


# ----------------------------------------------------------------------------------- the bookkeeping of a sample


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_values_are_those_of_a_full_forward_pass(model, temperature):
    model.add_head(std=0.5)
    prompts = make_prompts()
    s = generate(model, prompts, 20, END, temperature=temperature)
    responses = s.lengths - s.prompt_lengths
    assert len(set(responses.tolist())) > 5  # rows end at different steps, so that rows are dropped on the way
    index = s.mask.flatten().nonzero()[:, 0]
    hidden = model(s.ids)
    torch.testing.assert_close(s.logprobs, model.logprobs(hidden, s.ids, index, temperature), rtol=0, atol=1e-5)
    values = model.scalar(hidden)[:, :-1].masked_fill(~s.mask, 0.0)
    torch.testing.assert_close(s.values, values, rtol=0, atol=1e-5)
    assert (s.values[s.mask] != 0).all()


def test_without_a_scalar_head_there_are_no_values(model):
    assert generate(model, [[1]], 3, END).values is None


def test_the_mask_marks_exactly_the_response_with_its_end_token(model):
    prompts = make_prompts()
    s = generate(model, prompts, 20, END)
    for row, prompt in enumerate(prompts):
        start, stop = len(prompt), s.lengths[row].item()
        assert s.ids[row, :start].tolist() == prompt
        assert s.mask[row].nonzero()[:, 0].tolist() == list(range(start - 1, stop - 1))
        assert (s.logprobs[row][~s.mask[row]] == 0).all() and (s.logprobs[row][s.mask[row]] < 0).all()


def test_a_row_has_ended_if_and_only_if_its_last_token_is_the_end_token(model):
    s = generate(model, make_prompts(), 12, END)
    assert s.ended.any() and not s.ended.all()
    for row in range(len(s.ids)):
        start, stop = s.prompt_lengths[row].item(), s.lengths[row].item()
        response = s.ids[row, start:stop].tolist()
        assert s.ended[row].item() == (response[-1] == END)
        assert END not in response[:-1]
        assert s.ended[row] or len(response) == 12


def test_the_buffer_is_cut_to_the_longest_row_and_padded_with_pad(model):
    s = generate(model, make_prompts(4), 20, END, pad=9)
    T = s.lengths.max().item()
    assert s.ids.shape == (4, T) and s.mask.shape == s.logprobs.shape == (4, T - 1)
    for row, length in enumerate(s.lengths.tolist()):
        assert (s.ids[row, length:] == 9).all()


def test_responses_are_the_answers_without_the_end_token(model):
    s = generate(model, make_prompts(), 12, END)
    for row, response in enumerate(s.responses()):
        assert END not in response
        whole = s.ids[row, s.prompt_lengths[row] : s.lengths[row]].tolist()
        assert whole == response + [END] * s.ended[row].item()


def test_an_end_token_in_the_prompt_does_not_end_the_answer(model):
    s = generate(model, [[END, 3, END]] * 20, 6, END)
    assert s.prompt_lengths.tolist() == [3] * 20 and (s.lengths > 3).all() and (s.lengths > 4).any()


# ----------------------------------------------------------------------------------------- which tokens are sampled


@torch.no_grad()
def test_greedy_takes_the_argmax_of_full_forward_passes(model):
    prompts = make_prompts(12)
    s = generate(model, prompts, 10, END, temperature=0)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + 10 and (len(ids) == len(prompt) or ids[-1] != END):
            ids.append(distribution(model, ids).argmax().item())
        assert s.ids[row, : s.lengths[row]].tolist() == ids


def test_a_row_alone_is_the_row_in_a_batch(model):
    prompts = make_prompts(12)
    s = generate(model, prompts, 10, END, temperature=0)
    for row, prompt in enumerate(prompts):
        alone, length = generate(model, [prompt], 10, END, temperature=0), s.lengths[row].item()
        assert alone.ids[0].tolist() == s.ids[row, :length].tolist()
        torch.testing.assert_close(alone.logprobs[0], s.logprobs[row, : length - 1], rtol=0, atol=1e-5)


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
    model, n, prompt = tiny(V, noise=0.2), 6000, [1, 2, 3]
    s = generate(model, [prompt] * n, 1, END, temperature=temperature,
                 generator=torch.Generator().manual_seed(0))
    observed = s.ids[:, 3].bincount(minlength=V).double()
    expected = n * distribution(model, prompt, temperature).exp().double()
    assert expected.min() > 5
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 29.6  # exceeded once in a thousand by chance with 10 degrees of freedom


def test_the_same_generator_gives_the_same_answers_and_another_seed_others(model):
    def sample(seed):
        return generate(model, make_prompts(), 8, END, generator=torch.Generator().manual_seed(seed)).responses()

    assert sample(1) == sample(1) != sample(2)


def test_sampling_is_without_dropout_and_leaves_the_model_as_it_was(tiny):
    model = tiny(V, block_size=40, dropout=0.5, noise=0.4).train()
    before = torch.get_rng_state()
    first, second = (generate(model, make_prompts(), 8, END, temperature=0) for _ in range(2))
    assert torch.equal(first.ids, second.ids) and torch.equal(first.logprobs, second.logprobs)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


# ----------------------------------------------------------------------------------------------- top-k and top-p

P = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])


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


@torch.no_grad()
def test_with_top_k_the_logprobs_are_of_the_distribution_sampled_from(model):
    s = generate(model, [[1, 2]] * 50, 1, END, top_k=3)
    logp, tokens = distribution(model, [1, 2]).topk(3)
    expected = dict(zip(tokens.tolist(), (logp - logp.logsumexp(0)).tolist()))
    for token, logprob in zip(s.ids[:, 2].tolist(), s.logprobs[:, 1].tolist()):
        assert logprob == pytest.approx(expected[token], abs=1e-5)


# ---------------------------------------------------------------------------------------------- limits and errors


def test_a_prompt_that_leaves_no_room_or_is_empty_raises_valueerror(model):
    generate(model, [[1] * 30], 10, END)
    with pytest.raises(ValueError, match="30 tokens and 11 new ones exceed the context of 40"):
        generate(model, [[1] * 30], 11, END)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], 3, END)


def test_on_token_sees_the_tokens_of_the_rows_still_going(model):
    steps, prompts = [], make_prompts()
    s = generate(model, prompts, 20, END, on_token=steps.append, generator=torch.Generator().manual_seed(0))
    parts = zip(s.ids.tolist(), s.prompt_lengths.tolist(), s.lengths.tolist())
    answers = [ids[start:stop] for ids, start, stop in parts]
    assert steps == [[answer[n] for answer in answers if len(answer) > n] for n in range(max(map(len, answers)))]
    assert len(steps[0]) == len(prompts) > len(steps[-1])


def test_sampling_stops_when_all_rows_have_ended(model, monkeypatch):
    steps, extend = [], sampling.KVCache.extend
    monkeypatch.setattr(sampling.KVCache, "extend", lambda cache: steps.append(1) or extend(cache))
    s = generate(model, [[1]] * 3, 30, END, generator=torch.Generator().manual_seed(0))
    longest = int((s.lengths - s.prompt_lengths).max())
    assert longest < 25 and len(steps) < longest + sampling.CHECK_EVERY


def test_a_temperature_divides_logits_in_fp32_and_greedy_looks_at_the_logits(model, monkeypatch):
    """In half precision a quotient would be rounded once more; probabilities that are equal in fp32 hide which logit is
    the largest."""
    logits = torch.full((1, V), -1e9)
    logits[0, 3], logits[0, 7] = 1e-8, 2e-8
    monkeypatch.setattr(model, "logits", lambda hidden: logits)
    assert generate(model, [[1]], 1, END, temperature=0).responses() == [[7]]
    halves = torch.linspace(-3, 3, V).bfloat16()[None]
    monkeypatch.setattr(model, "logits", lambda hidden: halves)
    s = generate(model, [[1]], 1, END, temperature=0.7, noise=torch.tensor([[0.5]]))
    expected = (halves.float() / 0.7).log_softmax(-1)[0, s.ids[0, 1]]
    torch.testing.assert_close(s.logprobs[0, 0], expected, rtol=0, atol=1e-6)


def test_a_model_whose_weights_are_nan_samples_tokens_that_exist_and_shows_it(model):
    model.ln_f.weight.data.fill_(float("nan"))
    s = generate(model, [[1, 2]], 4, END)
    assert s.ids.max() < V and s.logprobs[s.mask].isnan().all()


def test_a_model_in_bf16_has_fp32_log_probabilities(model):
    s = generate(model.bfloat16(), make_prompts(), 8, END)
    assert s.logprobs.dtype == torch.float32 and 0 < s.logprobs[s.mask].exp().mean() < 1


def test_on_token_sees_every_token_of_a_single_answer(model):
    seen = []
    s = generate(model, [[1, 2]], 12, END, on_token=lambda ids: seen.extend(ids))
    assert seen == s.ids[0, 2:].tolist()


# ------------------------------------------------------------------------------------------- text in, text out


class Letters(SimpleNamespace):
    def decode(self, ids):
        return "".join("abcdefghijk"[i] for i in ids)


LETTERS = Letters(end=END, pad=0)


def test_sample_text_keeps_the_order_of_the_prompts(model):
    prompts = make_prompts(17)
    for batch_size in (4, 100):
        out = sample_text(model, LETTERS, prompts, 8, batch_size=batch_size, temperature=0)
        assert [s["prompt_ids"] for s in out] == prompts
        for s in out:
            [alone] = sample_text(model, LETTERS, [s["prompt_ids"]], 8, temperature=0)
            assert alone["ids"] == s["ids"] and alone["text"] == s["text"] and alone["ended"] == s["ended"]


@torch.no_grad()
def test_sample_text_returns_the_response_with_its_end_token_its_text_and_its_logprob(model):
    for s in sample_text(model, LETTERS, make_prompts(10), 8, seed=3):
        assert s["ended"] == (s["ids"][-1] == END)
        assert s["text"] == LETTERS.decode(s["ids"][:-1] if s["ended"] else s["ids"])
        total, ids = 0.0, list(s["prompt_ids"])
        for token in s["ids"]:
            total += distribution(model, ids)[token].item()
            ids.append(token)
        assert s["logprob"] == pytest.approx(total, abs=1e-4)


def test_sample_text_bounds_the_tokens_of_a_batch_and_that_changes_nothing(model, monkeypatch):
    prompts, letters, sizes = make_prompts(), Letters(end=END, pad=0), []
    whole = sample_text(model, letters, prompts, 8, seed=3)
    monkeypatch.setattr(sampling, "BATCH_TOKENS", 60)
    real = sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda m, part, new, *a, **k: sizes.append(
        len(part) * (max(map(len, part)) + new)) or real(m, part, new, *a, **k))
    parts = sample_text(model, letters, prompts, 8, seed=3)
    assert [s["ids"] for s in parts] == [s["ids"] for s in whole]
    assert len(sizes) > 1 and max(sizes) <= 60


def test_sample_text_depends_on_its_seed_only(model):
    def texts(seed):
        torch.rand(seed + 1)  # the global random numbers do not matter
        return [s["text"] for s in sample_text(model, LETTERS, make_prompts(), 8, seed=seed)]

    assert texts(1) == texts(1) != texts(2)


def test_show_answers_leaves_out_prompts_without_room(model, tokenizer, tiny):
    model = tiny(tokenizer.vocab_size, favour=tokenizer.end)
    shown = show_answers(model, tokenizer, [tokenizer.encode("short"), tokenizer.encode("x" * 47)], 10)
    assert "short" in shown and "xxx" not in shown


@torch.no_grad()
def test_score_samples_keeps_the_order_and_scores_the_last_token(model):
    model.add_head(std=0.5)
    samples = [{"prompt_ids": p, "ids": p[::-1] + [END]} for p in make_prompts(9)]
    scores = score_samples(model, samples, batch_size=4)
    for sample, score in zip(samples, scores.tolist()):
        ids = torch.tensor([sample["prompt_ids"] + sample["ids"]])
        assert score == pytest.approx(model.scalar(model(ids))[0, -1].item(), abs=1e-5)


def test_an_order_of_batches_can_feed_the_sampler(model):
    prompts = make_prompts(10)
    rows = next(batches([len(p) for p in prompts], 4))
    s = generate(model, [prompts[i] for i in rows], 4, END)
    assert s.prompt_lengths.tolist() == [len(prompts[i]) for i in rows]
