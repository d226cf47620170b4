"""Half precision: bf16, and fp16 with its gradient scaler, change the rounding and nothing else.

Autocast on the CPU does the same mathematics as on a GPU, slowly. Weights, optimizer, log-probabilities and losses are
fp32 throughout; only the matrix products are not. How a product is rounded is up to the processor, so nothing is
asserted here but what follows from the unit roundoff u: a rounded number is off by at most u times itself.

    |f in half precision - f|  <=  6 u sqrt( sum_i (x_i df/dx_i)^2 )        x_i: every number that is rounded on the way

To first order f is off by the sum of the x_i df/dx_i times an error of at most u each. If the errors are independent,
the sum is larger than this in one case of 30 million (Hoeffding's inequality; for rounding: Higham and Mary 2019).
"""

import contextlib
import copy
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import train_dpo
import train_ppo
import train_rm
import train_sft
from nanopost import linear as linear_file
from nanopost import model as model_file
from nanopost.checkpoint import load_model
from nanopost.data import Example, Pair, collate
from nanopost.model import upcast
from nanopost.run import Run

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # 8 and 11 significant bits, rounded to the nearest
V = 60


def example(*lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    prompt, answer = lengths
    ids = torch.randint(V, (prompt + answer,), generator=generator).tolist()
    return Example(ids, [False] * prompt + [True] * answer)


EXAMPLES = [example(3, 3, seed=1), example(4, 8, seed=2), example(2, 5, seed=3)]
PAIRS = [Pair(EXAMPLES[0], EXAMPLES[1]), Pair(EXAMPLES[1], EXAMPLES[2]), Pair(EXAMPLES[2], EXAMPLES[0])]
BATCH = collate(EXAMPLES)


# ----------------------------------------------------------------------------------------------- what rounding may do


@contextlib.contextmanager
def every_rounding():
    """The model computes with an explicit relative error, of 0, on every number that half precision rounds: what goes
    into a product and what comes out, and their gradients on the way back. Yields the list of these errors."""
    errors = []

    def rounded(x):
        forward, backward = (torch.zeros_like(x, requires_grad=True) for _ in range(2))
        errors.extend((forward, backward))
        x = x * (1 + forward)
        x.register_hook(lambda gradient: gradient * (1 + backward))
        return x

    def linear(x, weight, bias=None):
        return rounded(F.linear(rounded(x), rounded(weight), None if bias is None else rounded(bias)))

    def attention(q, k, v, dropout_p, is_causal):
        scores = rounded(rounded(q) @ rounded(k).mT / math.sqrt(q.shape[-1]))  # (B, H, T, T)
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        return rounded(rounded(scores.masked_fill(~seen, -math.inf).softmax(-1)) @ rounded(v))

    with (
        mock.patch.object(model_file, "linear", linear),
        mock.patch.object(linear_file, "linear", linear),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield errors


def exact_and_error(function, model):
    """function(model) -> (N,) in double precision; and by how much rounding may move it, as a multiple of u, (N,)."""
    with every_rounding() as errors:
        exact = function(copy.deepcopy(model).double())  # (N,)
    squares = []
    for number in exact:
        gradients = torch.autograd.grad(number, errors, retain_graph=True, allow_unused=True)
        squares.append(sum(g.square().sum() for g in gradients if g is not None))
    return exact.detach(), 6 * torch.stack(squares).sqrt()


def assert_rounded(half, exact, error, dtype):
    """Within the bound, and not all exact: something was computed in half precision."""
    assert half.dtype == torch.float32
    distance = (half.detach().double() - exact).abs()
    assert (distance <= ROUNDOFF[dtype] * error).all(), (distance / error / ROUNDOFF[dtype]).max()
    assert distance.max() > 1e-6 * exact.abs().max()


def test_the_bound_is_that_of_a_sum_by_hand():
    """f = x . w: the squares of x_i w_i once for x_i and once for w_i, and the square of f for the result."""
    x, w = torch.randn(2, 5, dtype=torch.float64)
    with every_rounding() as errors:
        f = linear_file.linear(x[None], w[None])[0]
    [square] = [sum(g.square().sum() for g in torch.autograd.grad(f, errors, allow_unused=True) if g is not None)]
    torch.testing.assert_close(square, 2 * ((x * w) ** 2).sum() + (x @ w) ** 2)


# --------------------------------------------------------------------------------------- log-probabilities and losses


@pytest.mark.parametrize("dtype", HALF)
def test_logprobs_and_scores_are_fp32_and_right_up_to_rounding(dtype, tiny):
    model = tiny(V).add_head(0.5).eval()

    def logprobs(model):
        return model.logprobs(model(BATCH.ids), BATCH.ids, BATCH.index).flatten()[BATCH.index]

    def scores(model):
        return model.score(BATCH.ids, BATCH.lengths)

    for function in (logprobs, scores):
        exact, error = exact_and_error(function, model)
        with torch.autocast("cpu", HALF[dtype]):
            half = function(model)
        assert_rounded(half, exact, error, dtype)


def ppo_batch(model):
    """A rollout in fp32, as update() makes it ready: advantages and all."""
    config = train_ppo.Config(max_new_tokens=6)
    models = train_ppo.Models(model, model, copy.deepcopy(model), lambda prompts, batch: batch.lengths.float())
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    no_end = SimpleNamespace(end=-1, pad=0)
    return train_ppo.rollout(models, no_end, [""] * 4, prompts, config, 0.1, torch.rand(4, 6))


REFERENCE = torch.tensor([[-20.0, -18.0], [-25.0, -30.0], [-15.0, -14.0]])  # (3, 2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("module", [train_sft, train_rm, train_dpo, train_ppo], ids=lambda module: module.__name__)
def test_an_update_has_the_loss_and_the_gradient_of_fp32_up_to_rounding(module, dtype, tiny, tmp_path):
    """What update() reports, the gradient scaler of fp16 included, is the loss and the norm of its gradient."""
    options = {"minibatches": 1, "epochs": 1} if module is train_ppo else {}
    config = module.Config(
        out=str(tmp_path / "run"), device="cpu", dtype=dtype, micro_batch=0, grad_clip=0.0, **options
    )
    model = tiny(V)
    if module in (train_rm, train_ppo):
        model.add_head(0.5)
    batch = ppo_batch(model) if module is train_ppo else None
    model.train()

    def loss_of(model):
        if module is train_sft:
            return train_sft.batch_loss(model, BATCH)
        if module is train_rm:
            return train_rm.pairwise_loss(*train_rm.score_pairs(model, PAIRS, "cpu"))
        if module is train_dpo:
            return train_dpo.batch_loss(model, PAIRS, REFERENCE, config, "cpu")[0].mean()
        white = train_ppo.replace(batch, advantages=train_ppo.whiten(batch.advantages, batch.mask))
        models = train_ppo.Models(model, model, None, None)
        return train_ppo.minibatch_loss(models, white, batch.mask.sum(), config)[0]

    def loss_and_norm(model):
        loss = loss_of(model)
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return torch.stack([loss, torch.cat([g.flatten() for g in gradients]).norm()])

    exact, error = exact_and_error(loss_and_norm, model)

    run, optimizer = Run("test", config), torch.optim.SGD(model.parameters(), lr=0.0)
    if module is train_ppo:
        models = train_ppo.Models(model, model, None, None)
        [stats] = train_ppo.update(run, models, optimizer, batch, config)
        stats["loss"] = stats["loss/policy"] + config.value_coef * stats["loss/value"]
    else:
        rows = EXAMPLES if module is train_sft else PAIRS
        stats = module.update(run, model, optimizer, rows, *[REFERENCE] * (module is train_dpo), config)
    assert_rounded(torch.stack([stats["loss"], stats["grad_norm"]]), exact, error, dtype)


def test_upcast_leaves_double_precision_alone():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert upcast(torch.ones(2, dtype=dtype)).dtype == torch.float32
    assert upcast(torch.ones(2).double()).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("script, loss", [("sft", "loss"), ("rm", "loss"), ("dpo", "loss"), ("ppo", "loss/value")])
def test_a_run_in_half_precision_has_finite_losses_and_fp32_weights(script, loss, dtype, workshop, tmp_path, metrics):
    lines = {}
    for name in ("fp32", dtype):
        out = workshop.run(script, tmp_path / name, dtype=name)
        lines[name] = [line for line in metrics(out, "seconds") if "lr" in line]
        weights = load_model(str(out), reward=script == "rm")[0].state_dict().values()
        assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights)
    assert all(math.isfinite(line[loss]) for line in lines[dtype])
    assert sum(line["grad_norm"] is not None for line in lines[dtype]) >= 3  # null where fp16 overflowed
    assert lines["fp32"] != lines[dtype]  # it is not fp32 after all


def test_a_step_that_overflows_fp16_is_left_out_and_the_scale_is_halved(tiny, tmp_path):
    run, model = Run("sft", train_sft.Config(out=str(tmp_path / "run"), device="cpu", dtype="fp16")), tiny(V)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before, scale = [p.detach().clone() for p in model.parameters()], run.scaler.get_scale()
    run.backward(1e36 * model(BATCH.ids).sum())  # times the scale it is infinite
    run.optimizer_step(optimizer, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert run.scaler.get_scale() == scale / 2
    run.backward(train_sft.batch_loss(model, BATCH))
    norm = run.optimizer_step(optimizer, 0.0)
    assert norm.isfinite() and not torch.equal(before[0], model.wte.weight)


# ---------------------------------------------------------------------------------------- the sampler and the update


@pytest.mark.parametrize("dtype", HALF)
def test_the_sampler_and_the_training_forward_agree_up_to_rounding(dtype, tiny, tmp_path):
    """In half precision the cache may round otherwise than the full forward: PPO's first ratio is near 1, and only in
    fp32 is it 1. Either is within the bound of the truth, so they are within twice the bound of each other."""
    config = train_ppo.Config(out=str(tmp_path / "run"), device="cpu", dtype=dtype, minibatches=1, micro_batch=0)
    policy = tiny(V).add_head(0.5)
    with torch.autocast("cpu", HALF[dtype]):
        batch = ppo_batch(policy)
    for name, x in batch.tensors().items():
        if x.is_floating_point():
            assert x.dtype == torch.float32 and x.isfinite().all(), name

    def logprobs(model):
        return model.logprobs(model(batch.ids), batch.ids, batch.index).flatten()[batch.index]

    exact, error = exact_and_error(logprobs, policy)
    assert_rounded(batch.logprobs.flatten()[batch.index], exact, error, dtype)
    apart = 2 * ROUNDOFF[dtype] * error  # (N,)
    models, optimizer = train_ppo.Models(policy, policy, None, None), torch.optim.SGD(policy.parameters(), lr=0.0)
    first = train_ppo.update(Run("test", config), models, optimizer, batch, config)[0]
    assert first["policy/approxkl"] <= 0.5 * apart.square().mean()
    assert abs(first["val/ratio"] - 1) <= apart.expm1().mean()


def test_ppo_logs_how_far_the_sampler_and_the_training_forward_are_apart(workshop, tmp_path, metrics):
    """In fp32, where they differ in the order of sums only."""
    out = workshop.run("ppo", tmp_path / "run", dtype="fp32", steps=2, batch_size=16)
    lines = [line for line in metrics(out) if "val/first_approxkl" in line]
    assert len(lines) == 2
    for line in lines:
        assert abs(line["val/first_ratio"] - 1) <= 1e-5 and 0 <= line["val/first_approxkl"] <= 1e-9
