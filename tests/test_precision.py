"""Half precision: bf16, and fp16 with its gradient scaler, change the rounding and nothing else.

Autocast on the CPU does the same mathematics as on a GPU, slowly. Weights, optimizer, log-probabilities and losses are
fp32 throughout; only the matrix products are not.
"""

import math

import pytest
import torch

import train_ppo
import train_sft
from enumerable import EXAMPLES, tiny_gpt
from nanopost.checkpoint import load_model
from nanopost.data import collate
from nanopost.run import Run

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("script, loss", [("sft", "loss"), ("rm", "loss"), ("dpo", "loss"), ("ppo", "loss/value")])
def test_a_run_in_half_precision_follows_the_one_in_fp32(script, loss, dtype, workshop, tmp_path, metrics):
    lines = {}
    for name in ("fp32", dtype):
        out = workshop.run(script, tmp_path / name, dtype=name, lr=1e-6)  # a step that fp16 leaves out shall not matter
        lines[name] = [line for line in metrics(out) if "lr" in line]
        weights = load_model(str(out), reward=script == "rm")[0].state_dict().values()
        assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights)
    if script != "ppo":  # whose samples may differ by a token, and then everything does
        for exact, rounded in zip(lines["fp32"], lines[dtype]):
            assert rounded[loss] == pytest.approx(exact[loss], rel=0.05, abs=0.02)
            if rounded["grad_norm"] is not None:  # of the gradient without its scale; null where fp16 overflowed
                assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
        assert sum(line["grad_norm"] is not None for line in lines[dtype]) >= 3
        assert lines["fp32"] != lines[dtype]  # it is not fp32 after all
    assert all(math.isfinite(line[loss]) for line in lines[dtype])


@pytest.mark.parametrize("dtype", HALF)
def test_logprobs_and_losses_are_fp32_whatever_computes_the_hidden_states(dtype):
    model, batch = tiny_gpt(1).float(), collate(EXAMPLES)
    with torch.autocast("cpu", HALF[dtype]):
        hidden = model(batch.ids)
        logits = model.logits(hidden)
        logprobs = model.logprobs(hidden, batch.ids, batch.index)
        loss = train_sft.batch_loss(model, batch)
    assert logits.dtype == HALF[dtype] and logprobs.dtype == loss.dtype == torch.float32
    exact = model.logprobs(model(batch.ids), batch.ids, batch.index)
    assert 0 < (logprobs - exact).abs().max() < 0.1


def test_a_step_that_overflows_fp16_is_left_out_and_the_scale_is_halved():
    config = train_sft.Config(device="cpu", dtype="fp16")
    run, model = Run("sft", config), tiny_gpt(1).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before, scale = [p.detach().clone() for p in model.parameters()], run.scaler.get_scale()
    run.backward(1e36 * model(collate(EXAMPLES).ids).sum())  # times the scale it is infinite
    run.update(optimizer, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert run.scaler.get_scale() == scale / 2
    run.backward(train_sft.batch_loss(model, collate(EXAMPLES)))
    norm = run.update(optimizer, 0.0)
    assert norm.isfinite() and not torch.equal(before[0], model.wte.weight)


@pytest.mark.parametrize("dtype", HALF)
def test_ppo_logs_how_far_the_sampler_and_the_training_forward_are_apart(dtype, workshop, tmp_path, metrics):
    """In half precision the cache rounds otherwise than the full forward: the first ratio is near 1, not 1."""
    for name, low, high in (("fp32", 0.0, 1e-9), (dtype, 1e-12, 1e-2)):
        out = workshop.run("ppo", tmp_path / name, dtype=name, steps=2, batch_size=16)
        for line in metrics(out):
            if "val/first_approxkl" in line:
                assert abs(line["val/first_ratio"] - 1) <= (1e-5 if name == "fp32" else 0.05)
                assert low <= line["val/first_approxkl"] <= high


def test_the_rollout_of_a_model_in_bf16_gives_fp32_tensors():
    from test_rollout import rollout

    policy, reference = tiny_gpt(1).float().add_head(std=0.3), tiny_gpt(2).float()
    with torch.autocast("cpu", torch.bfloat16):
        batch, _, config = rollout(policy, reference, n=16, beta=0.1)
    for name in ("old_logprobs", "old_values", "returns", "advantages", "scores", "kl", "entropy"):
        assert batch[name].dtype == torch.float32 and batch[name].isfinite().all(), name
    run = Run("ppo", config)
    history = train_ppo.update(run, policy, None, torch.optim.SGD(policy.parameters(), lr=0.0), batch, config)
    assert abs(float(history[0]["val/ratio"]) - 1) < 0.05
