"""The transformer: initialisation, causality, padding, the tied head, log-probabilities, the cache, GPT-2's details."""

import math

import pytest
import torch

from nanopost.config import UserError
from nanopost.model import GPT, GPTConfig, KVCache

V = 70  # so that the matrix has 128 rows, 58 of them unused


@pytest.fixture
def model(tiny):
    return tiny(V, block_size=24).double().eval()


def random_ids(*shape):
    return torch.randint(V, shape)


# ------------------------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize("n_embd, std", [(768, 0.02), (48, 0.08)])
def test_weights_start_at_gpt2s_std_for_the_width_and_residual_projections_at_less(n_embd, std):
    model = GPT(GPTConfig(1000, 64, n_layer=8, n_head=2, n_embd=n_embd, scalar_head=True))
    for name, p in model.named_parameters():
        if p.dim() == 2 and p.numel() > 1000:
            expected = std / math.sqrt(2 * 8) if "c_proj.weight" in name else std
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 0.1 * expected, name


def test_biases_start_at_0_and_layernorm_gains_at_1():
    for name, p in GPT(GPTConfig(100, 8, 2, 2, 16, scalar_head=True)).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name


def test_an_untrained_model_gives_every_token_about_the_same_probability():
    model = GPT(GPTConfig(V, 16, 2, 2, 16))
    ids = random_ids(4, 12)
    logits = model.logits(model(ids))
    assert logits.var().item() == pytest.approx(768 * 0.02**2, rel=0.1)  # as GPT-2's, whatever the width
    assert (torch.distributions.Categorical(logits=logits).entropy() > math.log(V) - 0.3).all()


def test_gpt2_124m_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    padding = (50304 - 50257) * 768  # rows that fill the matrix up to a multiple of 64
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + padding


@pytest.mark.parametrize("vocab_size, rows", [(1, 64), (64, 64), (65, 128), (50257, 50304)])
def test_the_matrix_has_a_multiple_of_64_rows(vocab_size, rows):
    assert GPTConfig(vocab_size).rows == rows


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_embd": 10, "n_head": 4}, "must be a multiple of n_head"),
        ({"block_size": 100}, "must be a multiple of 8"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"n_head": 0}, "n_head must be at least 1"),
        ({"n_embd": -8}, "n_embd must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"dropout": -0.1}, "dropout must be in"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**{"vocab_size": 10, "n_embd": 8, "n_head": 2, **wrong})


# ------------------------------------------------------------------------------------------------------ the trunk


def gpt2_by_hand(model, row):
    """The hidden states (T, C) of one row, from the formulas of GPT-2 alone: loops over positions and heads."""

    def layer_norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def linear(x, layer):
        return x @ layer.weight.T + layer.bias

    config = model.config
    D = config.n_embd // config.n_head
    x = torch.stack([model.wte.weight[token] + model.wpe.weight[t] for t, token in enumerate(row)])
    for block in model.h:
        q, k, v = linear(layer_norm(x, block.ln_1), block.attn.c_attn).split(config.n_embd, dim=1)
        mixed = torch.zeros_like(x)
        for t in range(len(row)):
            for head in range(config.n_head):
                part = slice(head * D, (head + 1) * D)
                weights = (k[: t + 1, part] @ q[t, part] / math.sqrt(D)).softmax(0)
                mixed[t, part] = weights @ v[: t + 1, part]
        x = x + linear(mixed, block.attn.c_proj)
        u = linear(layer_norm(x, block.ln_2), block.mlp["c_fc"])
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, block.mlp["c_proj"])
    return layer_norm(x, model.ln_f)


@torch.no_grad()
def test_the_forward_pass_is_gpt2_written_out_by_hand(model):
    ids = random_ids(2, 9)
    for row, hidden in zip(ids, model(ids)):
        torch.testing.assert_close(hidden, gpt2_by_hand(model, row), rtol=0, atol=1e-10)


@torch.no_grad()
def test_layernorm_adds_1e_5_to_the_variance(model):
    model.wte.weight *= 1e-3  # variances near 1e-6, where the constant decides
    model.wpe.weight *= 1e-3
    ids = random_ids(1, 6)
    torch.testing.assert_close(model(ids)[0], gpt2_by_hand(model, ids[0]), rtol=0, atol=1e-10)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_hidden_states(model):
    ids = random_ids(3, 12)
    before = model(ids)
    for t in range(1, 12):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any(1).all()  # while the changed position itself does notice


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_and_a_row_alone_is_the_row_in_a_batch(model):
    ids, lengths = random_ids(4, 16), [5, 16, 9, 1]
    hidden = model(ids)  # what stands beyond a row's length is its padding
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(hidden[row, :length], alone[0], rtol=0, atol=1e-10)


def test_more_tokens_than_the_context_raise_valueerror(model):
    model(random_ids(1, 24))
    with pytest.raises(ValueError, match="25 tokens.*24"):
        model(random_ids(1, 25))


def test_dropout_acts_in_training_only(tiny):
    model, ids = tiny(V, dropout=0.5), random_ids(2, 8)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@torch.no_grad()
def test_dropout_acts_on_the_attention_too_and_in_training_only(tiny):
    model = tiny(V, dropout=0.5)
    ids = random_ids(2, 8)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # what is left is the attention's own
    assert torch.equal(model.eval()(ids), model(ids))
    assert not torch.allclose(model.train()(ids), model.eval()(ids))


# -------------------------------------------------------------------------------------------- logits and log-probs


def test_the_output_matrix_is_the_embedding_matrix(model):
    names = [name for name, p in model.named_parameters() if p.shape == model.wte.weight.shape]
    assert names == ["wte.weight"]
    hidden = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.wte.weight[:V].T)


@torch.no_grad()
def test_unused_rows_of_the_matrix_get_no_probability(model):
    model.wte.weight[V:] = 100.0
    logits = model.logits(model(random_ids(2, 5)))
    assert logits.shape == (2, 5, V)
    ids = random_ids(2, 5)
    hidden, total = model(ids), 0.0
    for token in range(V):  # the probability of every token to come second
        ids[0, 1] = token
        total += model.logprobs(hidden, ids, torch.tensor([0]))[0, 0].exp()
    assert total.item() == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_logprobs_are_the_log_softmax_at_the_asked_positions_and_0_elsewhere(model, temperature):
    ids = random_ids(3, 7)
    hidden, asked = model(ids), torch.tensor([0, 4, 6, 11, 17])  # of the 18 flat positions of (3, 6)
    logprobs = model.logprobs(hidden, ids, asked, temperature)
    assert logprobs.shape == (3, 6)
    for row in range(3):
        for t in range(6):
            expected = 0.0
            if row * 6 + t in asked:
                p = (model.logits(hidden[row, t]) / temperature).softmax(0)
                expected = p[ids[row, t + 1]].log().item()
            assert logprobs[row, t].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_logprobs_and_their_gradient_are_the_same_however_many_logits_are_made_at_once(model, monkeypatch, rows):
    ids, index = random_ids(2, 6), torch.tensor([0, 2, 3, 4, 6, 7, 9])

    def both():
        logprobs = model.logprobs(model(ids), ids, index, 0.7)
        return logprobs, torch.autograd.grad(logprobs.sum(), model.wte.weight)[0]

    whole = both()
    monkeypatch.setattr("nanopost.model.LOGIT_ROWS", rows)
    for a, b in zip(whole, both()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_logprobs_carry_gradient_from_the_asked_positions_only(model):
    ids = random_ids(2, 6)
    hidden = model(ids).detach().requires_grad_()
    model.logprobs(hidden, ids, torch.tensor([2, 8])).sum().backward()  # (row 0, t 2) and (row 1, t 3)
    touched = hidden.grad.abs().sum(2) > 0
    assert touched.nonzero().tolist() == [[0, 2], [1, 3]]


# ------------------------------------------------------------------------------------------------- the scalar head


@torch.no_grad()
def test_score_reads_the_last_real_token(model):
    model.add_head(std=1.0)
    ids, lengths = random_ids(4, 16), torch.tensor([5, 16, 9, 1])
    scores = model.score(ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        last = model(ids[row : row + 1, :length])[0, -1]
        by_hand = (last * model.head.weight[0]).sum() + model.head.bias[0]
        assert scores[row].item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert torch.equal(model.score(ids.masked_fill(torch.arange(16) >= lengths[:, None], 3), lengths), scores)


@torch.no_grad()
def test_a_fresh_head_of_std_0_gives_0_everywhere_and_is_all_that_is_added(model):
    names = set(model.state_dict())
    model.add_head(std=0.0)
    assert model.config.scalar_head and model.head.weight.dtype == torch.float64
    assert (model.scalar(model(random_ids(2, 5))) == 0).all()
    assert set(model.state_dict()) - names == {"head.weight", "head.bias"}


def test_the_scalar_head_computes_in_fp32_even_under_autocast(tiny):
    model = tiny(60).add_head(std=1.0)
    hidden = torch.randn(50, model.config.n_embd)
    with torch.autocast("cpu", torch.bfloat16):
        values = model.scalar(hidden)
    assert values.dtype == torch.float32 and torch.equal(values, model.scalar(hidden))


# ------------------------------------------------------------------------------------------------------- the cache


@torch.no_grad()
def test_decoding_step_by_step_equals_the_full_forward_for_prompts_of_different_lengths(model):
    ids, prompts, steps = random_ids(4, 20), torch.tensor([3, 9, 1, 6]), 8
    full, rows = model(ids), torch.arange(4)
    cache = KVCache(model.config, 4, 9, dtype=torch.float64)
    cache.GROWTH = 3  # so that it grows on the way
    padded = ids[:, :9].masked_fill(torch.arange(9) >= prompts[:, None], 7)
    torch.testing.assert_close(model(padded, cache)[rows, prompts - 1], full[rows, prompts - 1], rtol=0, atol=1e-10)
    cache.fill(prompts, 9)
    for step in range(steps):
        column = prompts + step
        cache.extend()
        hidden = model(ids[rows, column][:, None], cache)
        torch.testing.assert_close(hidden[:, 0], full[rows, column], rtol=0, atol=1e-10)


@torch.no_grad()
def test_rows_dropped_from_the_cache_leave_the_others_as_they_were(model):
    ids, prompts = random_ids(3, 12), torch.tensor([4, 2, 6])
    full, stay = model(ids), torch.tensor([0, 2])
    cache = KVCache(model.config, 3, 12, dtype=torch.float64)
    model(ids[:, :6], cache)
    cache.fill(prompts, 6)
    cache.keep(stay)
    cache.extend()
    hidden = model(ids[stay, prompts[stay]][:, None], cache)
    torch.testing.assert_close(hidden[:, 0], full[stay, prompts[stay]], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_row_may_be_kept_more_than_once(model):
    """What a prompt costs once, several answers to it share."""
    ids, prompts, rows = random_ids(2, 12), torch.tensor([4, 6]), torch.tensor([1, 0, 1, 1])
    cache = KVCache(model.config, 2, 6, dtype=torch.float64)
    model(ids[:, :6], cache)
    cache.keep(rows)
    cache.fill(prompts[rows], 6)
    cache.extend()
    tokens = torch.tensor([8, 3, 5, 8])
    hidden = model(tokens[:, None], cache)
    for row, token, found in zip(rows.tolist(), tokens, hidden[:, 0]):
        alone = torch.cat([ids[row, : prompts[row]], token[None]])
        torch.testing.assert_close(found, model(alone[None])[0, -1], rtol=0, atol=1e-10)


@torch.no_grad()
def test_decoding_beyond_the_context_raises_valueerror(model):
    with pytest.raises(ValueError, match="32 tokens are longer than the context of 24"):
        KVCache(model.config, 1, 32)
    cache = KVCache(model.config, 1, 20, dtype=torch.float64)
    model(random_ids(1, 20), cache)
    cache.fill(torch.tensor([20]), 20)
    for _ in range(4):
        cache.extend()
    assert cache.kv.shape[4] == cache.span == 24
    with pytest.raises(ValueError, match="the context has 24 tokens"):
        cache.extend()


@torch.no_grad()
def test_logits_far_from_zero_are_not_rounded_to_bf16(tiny):
    """GPT-2's logits share a large negative offset, which softmax does not see; rounding to bf16 would."""
    model = tiny(60).eval()
    unit = torch.nn.functional.normalize(torch.randn(16), dim=0)
    weight = model.wte.weight
    weight += unit - (weight @ unit)[:, None] * unit  # every token's weight along the unit vector is now 1
    model.ln_f.bias -= 110 * unit
    ids = torch.randint(60, (4, 8))
    index = torch.arange(4 * 7)
    hidden = model(ids)
    exact = model.logprobs(hidden, ids, index)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(hidden)
        ours = model.logprobs(hidden, ids, index)
    assert logits.dtype == torch.float32 and logits.mean() < -100
    assert (ours - exact).abs().max() < 1e-3
    assert (logits.bfloat16().float() - logits).abs().max() > 0.1  # what rounding them would have done
