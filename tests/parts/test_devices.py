"""What a GPU asks of the code, checked without one.

Steps that must not wait for the device run on PyTorch's meta device, whose tensors have shapes and no numbers: nothing
can be read from it, and tensors of the host do not mix with it. Graphs of torch.compile are counted as they are made.
"""

import contextlib
import functools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # before any test replaces a function of torch, which it would remember

import train_dpo
import train_ppo
import train_rm
import train_sft
from nanopost import run as run_file
from nanopost.config import UserError
from nanopost.data import Batch, Example, Pair
from nanopost.device import find_device, to_device
from nanopost.model import GPT, KVCache, token_nll
from nanopost.run import Run
from nanopost.sampling import Decoding

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------ the device's name


def test_auto_is_the_gpu_if_there_is_one(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(device) or SimpleNamespace(device=CPU))
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert find_device("auto") == CPU
    assert asked == ["cuda", "cpu"]


@pytest.mark.parametrize("name", ["abacus", "gpu", "meta", ""])
def test_what_is_no_device_of_ours_is_refused_with_what_it_may_be(name):
    """PyTorch would take meta, and compute nothing; of abacus it would list dozens that there might be."""
    with pytest.raises(UserError, match="--device must be auto, cpu, cuda, .* or mps, not "):
        find_device(name)


def test_a_device_that_is_unavailable_is_refused_in_one_line():
    with pytest.raises(UserError, match="--device cuda:99: ") as error:
        find_device("cuda:99")
    assert "\n" not in str(error.value)


def test_the_gpu_of_the_run_becomes_the_current_one(monkeypatch):
    """--device cuda:1: what is not told its device, as a random number generator, then uses it too."""
    calls = []
    second = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(torch, "empty", lambda *_, device: second if device == "cuda:1" else None)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    assert find_device("cuda:1") == second.device
    assert calls == [second.device, False]


# --------------------------------------------------------------------------------------------- copies to the device


def test_copies_to_a_gpu_are_pinned_and_asynchronous_and_no_others(monkeypatch):
    """Elsewhere an asynchronous copy may read memory that is already freed."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking=False: calls.append((device, non_blocking)))
    for device in ("cuda:1", CPU, torch.device("mps")):
        to_device(torch.ones(2), device)
    assert calls == ["pinned", ("cuda:1", True), (CPU, False), (torch.device("mps"), False)]


# ------------------------------------------------------------------------------------ a training step never waits

EXAMPLES = [Example([1, 2, 3], [False, False, True]), Example([1, 2, 0, 1, 3], [False, False] + [True] * 3)]
EXAMPLES.append(Example([1, 2, 2, 3], [False, False, True, True]))
PAIRS = [Pair(EXAMPLES[0], EXAMPLES[1]), Pair(EXAMPLES[1], EXAMPLES[2]), Pair(EXAMPLES[2], EXAMPLES[0])]


def rollout_on_the_host(tiny, config):
    policy = tiny(8).add_head(0.1)
    models = train_ppo.Models(policy, policy, tiny(8, seed=1), lambda prompts, batch: batch.lengths.double())
    no_end = SimpleNamespace(end=-1, pad=0)
    prompts = [[1, 2], [3], [1], [2, 2]]
    noise = torch.rand(4, config.max_new_tokens)
    return train_ppo.rollout(models, no_end, [""] * 4, prompts, config, 0.1, noise)


def two_steps(module, tiny, run, model, config):
    """The statistics of two optimizer steps of the module's update()."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    if module is train_ppo:
        models = train_ppo.Models(model, model, None, None)
        return train_ppo.update(run, models, optimizer, rollout_on_the_host(tiny, config), config)
    rows = EXAMPLES if module is train_sft else PAIRS
    extra = [torch.zeros(3, 2)] if module is train_dpo else []
    return [module.update(run, model, optimizer, rows, *extra, config) for _ in range(2)]


@pytest.fixture
def without_autocast(monkeypatch):
    """It does not know the meta device; it is off in these tests anyhow."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != "meta" and enabled(device))


def refuse_copies_that_wait(monkeypatch):
    """A tensor goes to another device through to_device() only."""
    to = torch.Tensor.to

    def watched(x, *arguments, **options):
        y = to(x, *arguments, **options)
        asynchronous = sys._getframe(1).f_code is to_device.__code__
        assert y.device == x.device or asynchronous, f"a copy to {y.device} that waits"
        return y

    monkeypatch.setattr(torch.Tensor, "to", watched)


@pytest.mark.parametrize("module", [train_sft, train_rm, train_dpo, train_ppo], ids=lambda module: module.__name__)
def test_an_optimizer_step_never_waits_for_the_device(module, tiny, without_autocast, monkeypatch, tmp_path):
    options = {"max_new_tokens": 4, "minibatches": 1, "epochs": 2} if module is train_ppo else {}
    config = module.Config(out=str(tmp_path / "run"), device="cpu", micro_batch=2, **options)
    run = Run("test", config)
    run.device = torch.device("meta")
    model = tiny(8).add_head(0.1).to("meta")
    refuse_copies_that_wait(monkeypatch)
    stats = two_steps(module, tiny, run, model, config)
    assert len(stats) == 2
    for name, value in stats[0].items():
        assert isinstance(value, torch.Tensor) and value.is_meta, f"{name} was read"


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3),
    ],
)
def test_reading_the_meta_device_or_mixing_it_with_the_host_fails(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(3, device="meta"))


def test_a_rollout_is_brought_to_the_host_at_once(tiny, monkeypatch):
    """All its tensors together, before the advantages are made."""
    brought, to = [], Batch.to

    def watched(batch, device):
        assert batch.advantages is None  # made on the host: a loop of small operations over the columns
        brought.append((device, to(batch, device)))
        return brought[-1][1]

    monkeypatch.setattr(Batch, "to", watched)
    batch = rollout_on_the_host(tiny, train_ppo.Config(device="cpu", max_new_tokens=4))
    assert [device for device, _ in brought] == ["cpu"] and brought[0][1] is batch
    given = {"ids", "mask", "lengths", "logprobs", "values", "ended", "ref_logprobs", "scores", "advantages", "returns"}
    assert batch.tensors().keys() == given


# ------------------------------------------------------------------------------------ a decoding step never waits

PROMPTS = [[1, 2, 3], [4, 5], [6] * 30, [7, 8], [9], [1, 1]]


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (0, 0, 1.0), (1.0, 5, 0.9)])
@torch.no_grad()
def test_a_decoding_step_reads_nothing_back_and_uses_nothing_of_the_host(
    temperature, top_k, top_p, tiny, without_autocast
):
    model = tiny(60, block_size=56).add_head(1.0).to("meta")
    rows = Decoding(model, PROMPTS, 20, pad=0)
    noise = torch.rand(len(PROMPTS), 20, device="meta")
    hidden = rows.prefill()
    for _ in range(20):
        rows.append(hidden, 3, noise, temperature, top_k, top_p)
        rows.cache.extend()
        hidden = rows.step()
        assert hidden.is_meta and hidden.shape == (len(PROMPTS), 16)
    for x in (rows.ids, rows.logprobs, rows.values, rows.lengths, rows.ended, rows.token, rows.cache.kv):
        assert x.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        rows.drop_ended(at_once=False)  # the one place that reads


@torch.no_grad()
def test_decoding_reads_few_widths_of_the_cache(tiny):
    """A step attends to a multiple of 8 columns, or to all: the same kernels serve several steps."""
    cache = KVCache(tiny(60).config, rows=2, length=5)
    cache.GROWTH = 16
    cache.fill(torch.tensor([5, 3]), 5)
    spans = []
    for _ in range(16):
        cache.extend()
        spans.append(cache.span)
    assert spans == [8] * 3 + [16] * 8 + [21] * 5


# ------------------------------------------------------------------------------------------ graphs of torch.compile


@pytest.fixture
def graphs(monkeypatch):
    """Compiling is on, with a compiler that only counts: [number of graphs so far, at every optimizer step]."""
    torch._dynamo.reset()
    made, at_step = [], type("List", (list,), {})()
    compile, optimizer_step = torch.compile, Run.optimizer_step

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def counted(self, *arguments):
        at_step.append(len(made))
        return optimizer_step(self, *arguments)

    at_step.made = made
    monkeypatch.setattr(torch, "compile", functools.partial(compile, backend=backend))
    monkeypatch.setattr(Run, "optimizer_step", counted)
    yield at_step
    torch._dynamo.reset()


@pytest.mark.parametrize("wanted", ["on", "off"])
def test_all_models_of_a_run_are_compiled_if_wanted_and_share_the_cross_entropy(wanted, tiny, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: made.append(function) or functools.partial(function))
    models = [tiny(8), tiny(8)]
    Run("test", train_sft.Config(out=str(tmp_path / "run"), device="cpu", compile=wanted)).compile(*models)
    wanted = wanted == "on"
    assert made.count(token_nll) == wanted and len(made) == (1 + 4) * wanted
    assert (models[0].nll is models[1].nll) and (models[0].nll is not GPT.nll) == wanted
    for block in [*models[0].h, *models[1].h]:
        assert (block._compiled_call_impl is not None) == wanted


@pytest.mark.parametrize(
    "device, triton, large", [("cuda", True, True), ("cpu", True, True), ("cuda", False, True), ("cuda", True, False)]
)
def test_auto_compiles_large_models_where_triton_is(device, triton, large, tiny, monkeypatch, tmp_path):
    run = Run("test", train_sft.Config(out=str(tmp_path / "run"), device="cpu"))
    run.device = torch.device(device)
    monkeypatch.setattr(run_file, "COMPILE_FROM", 1 if large else 10**9)
    monkeypatch.setattr(run_file.importlib.util, "find_spec", lambda name: triton or None)
    assert run.compiling(tiny(8)) == (device == "cuda" and triton and large)


def test_an_unknown_way_to_compile_is_refused(tmp_path):
    with pytest.raises(UserError, match="--compile must be auto, on or off, not yes"):
        train_sft.Config(out=str(tmp_path / "run"), compile="yes")


def test_nothing_is_compiled_on_the_cpu(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", None)
    model = tiny(8)
    Run("test", train_sft.Config(out=str(tmp_path / "run"), device="cpu", compile="auto")).compile(model)
    assert model.nll is token_nll and all(block._compiled_call_impl is None for block in model.h)


def test_the_rows_of_ppo_have_few_lengths_too(tiny, monkeypatch, tmp_path):
    """Minibatches are cut to multiples of 4 columns, or are as wide as the rollout."""
    widths, forward = [], GPT.forward
    config = train_ppo.Config(out=str(tmp_path / "run"), device="cpu", minibatches=1, epochs=1, micro_batch=1)
    lengths = torch.tensor([3, 8, 9, 22])
    mask = torch.arange(1, 22) < lengths[:, None]  # (4, 21)
    zeros = dict.fromkeys(("logprobs", "values", "returns", "advantages"), torch.zeros(4, 21))
    batch = Batch(torch.ones(4, 22, dtype=torch.long), mask, lengths, **zeros)
    monkeypatch.setattr(GPT, "forward", lambda self, ids: widths.append(ids.shape[1]) or forward(self, ids))
    policy = tiny(60).add_head(0.1)
    models = train_ppo.Models(policy, policy, None, None)
    train_ppo.update(Run("test", config), models, torch.optim.SGD(policy.parameters(), 0.0), batch, config)
    assert widths == [4, 8, 12, 22]


TEXTS = [
    {"prompt": "Say", "completion": "so " * (n % 13 + 1), "chosen": "a" * (n % 37 + 1), "rejected": "no"}
    for n in range(60)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, key, options",
    [
        ("sft", "data", {}),
        ("rm", "data", {"normalise": 0}),
        ("dpo", "data", {}),
        ("ppo", "prompts", {"max_new_tokens": 30, "minibatches": 1, "temperature": 0.9}),
    ],
)
def test_nothing_is_compiled_after_the_first_steps(script, key, options, graphs, workshop, tmp_path, lines):
    """Batches of every length, whole and cut into unequal micro-batches: the blocks share two graphs (with
    gradients and without), whatever the shape of the first batch, and the cross-entropy has one or two."""
    options |= {key: lines(TEXTS), "steps": 12, "batch_size": 5, "micro_batch": 3, "eval_every": 100, "compile": "on"}
    workshop.run(script, tmp_path / "run", **options)
    assert len(graphs) >= 12
    assert set(graphs[4:]) == {graphs[-1]}, f"graphs made up to every step: {graphs}"
    losses = [graph for graph in graphs.made if "cross_entropy" in graph.code]
    assert 1 <= len(losses) <= 2 if script != "rm" else not losses
    blocks = [graph for graph in graphs.made if "scaled_dot_product_attention" in graph.code]
    assert 1 <= len(blocks) <= 2 and len(blocks) + len(losses) == len(graphs.made)
