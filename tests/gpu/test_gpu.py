"""What only a GPU can show. Without one the tests are skipped; NANOPOST_GPU=cpu rehearses them on the CPU, where they
find mistakes in themselves but nothing about GPUs.

Speed is measured elsewhere: `python benchmarks/bench.py --size gpt2`.
"""

import contextlib
import importlib.util
import json
import math
import os

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from conftest import SCRIPTS
from nanopost.checkpoint import load_model
from nanopost.device import best_dtype
from nanopost.model import GPT, LOGIT_ROWS, GPTConfig
from nanopost.sampling import sample_text

DEVICE = os.environ.get("NANOPOST_GPU", "cuda" if torch.cuda.is_available() else "")
CUDA = DEVICE.startswith("cuda")
pytestmark = pytest.mark.skipif(not DEVICE, reason="there is no CUDA GPU")
needs_triton = pytest.mark.skipif(
    CUDA and importlib.util.find_spec("triton") is None, reason="there is no Triton, which compiling for a GPU needs"
)


@pytest.fixture
def around_update(workshop, monkeypatch):
    """around_update(script, context, after): every optimizer step of the script runs inside context(), then after()."""

    def wrap(script, context=contextlib.nullcontext, after=lambda: None):
        module = workshop.module(script)
        update = module.update

        def wrapped(*arguments):
            with context():
                result = update(*arguments)
            after()
            return result

        monkeypatch.setattr(module, "update", wrapped)

    return wrap


@contextlib.contextmanager
def never_waiting():
    """Whatever makes the host wait for the GPU raises an error."""
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_optimizer_step_never_waits_for_the_gpu(script, workshop, tmp_path, around_update):
    made = []
    around_update(script, never_waiting, lambda: made.append(1))
    workshop.run(script, tmp_path / "out", device=DEVICE, dtype="fp32")  # in fp16 the scaler must look at the gradient
    assert len(made) == 4


@needs_triton
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_compiled_again_after_the_first_evaluations(script, workshop, tmp_path, around_update):
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    around_update(script, after=lambda: graphs.append(counters["stats"]["unique_graphs"]))
    workshop.run(script, tmp_path / "out", device=DEVICE, compile="on", steps=10, eval_every=2)
    torch._dynamo.reset()
    assert 0 < graphs[0] <= graphs[4] == graphs[-1]


@pytest.mark.parametrize("dtype, bound", [("fp32", 1e-5), ("bf16", 1e-3), ("fp16", 1e-4)])
def test_the_first_minibatch_finds_the_log_probabilities_that_were_sampled(dtype, bound, workshop, tmp_path, metrics):
    if CUDA and dtype == "bf16" and best_dtype(torch.device(DEVICE)) != "bf16":
        pytest.skip("this GPU does not compute in bf16")
    out = workshop.run("ppo", tmp_path / "out", device=DEVICE, dtype=dtype, lr=0.0)
    for line in metrics(out):
        if "val/first_approxkl" in line:
            assert abs(line["val/first_approxkl"]) < bound and abs(line["val/first_ratio"] - 1) < 10 * bound
            assert line["policy/clipfrac"] == 0


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_training_is_what_it_is_on_the_cpu(script, workshop, tmp_path, metrics):
    options = dict(dtype="fp32", steps=8)
    on_cpu = metrics(workshop.run(script, tmp_path / "cpu", device="cpu", **options), "seconds")
    on_gpu = metrics(workshop.run(script, tmp_path / "gpu", device=DEVICE, **options), "seconds")
    assert len(on_cpu) == len(on_gpu) >= 8
    for expected, found in zip(on_cpu, on_gpu):
        if script == "dpo" and found["step"] == 1:
            # the policy is still the reference: which reward is higher is rounding
            del expected["rewards/accuracies"], found["rewards/accuracies"]
        assert found == pytest.approx(expected, rel=0.05, abs=0.02)  # fp32 products are in TF32 on a GPU


def test_in_fp16_no_step_is_skipped_after_the_first_few(workshop, tmp_path, metrics):
    out = workshop.run("sft", tmp_path / "out", device=DEVICE, dtype="fp16", steps=50, valid="")
    lines = metrics(out)
    assert all(math.isfinite(line["grad_norm"]) for line in lines if line["step"] > 20)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.skipif(not CUDA, reason="only a GPU computes in half precision by itself")
def test_auto_is_half_precision_and_the_model_says_which(workshop, tmp_path):
    out = workshop.run("sft", tmp_path / "out", device=DEVICE)
    arguments = json.loads((out / "config.json").read_text())["arguments"]
    assert arguments["dtype"] == best_dtype(torch.device(DEVICE)) != "fp32"


@needs_triton
def test_a_compiled_model_gives_the_same_greedy_answers(workshop):
    model, tokenizer = load_model(workshop.path("base"), DEVICE)
    prompts = [tokenizer.prompt([{"role": "user", "content": f"Say {word}!"}]) for word in ("cat", "moon", "lamp, hat")]
    answers = [answer.text for answer in sample_text(model, tokenizer, prompts, 16, temperature=0)]
    for block in model.h:
        block.compile(dynamic=True)
    compiled = [answer.text for answer in sample_text(model, tokenizer, prompts, 16, temperature=0)]
    torch._dynamo.reset()
    assert answers == compiled and any(answers)


@pytest.mark.skipif(not CUDA, reason="only a GPU counts its memory")
def test_log_probabilities_take_the_memory_that_is_documented():
    """Without gradients: logits, quotient and log-softmax of LOGIT_ROWS rows at a time, however many there are."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=512)).to(DEVICE)
    ids = torch.randint(50_000, (32, 512), device=DEVICE)
    index = torch.arange(32 * 511, device=DEVICE)
    with torch.no_grad():
        hidden = model(ids)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.logprobs(hidden, ids, index)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 3.2 * LOGIT_ROWS * model.config.rows * 4 + 1e8
