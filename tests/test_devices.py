"""What a GPU asks of the code, proved without one.

Steps that never wait for the device are run on PyTorch's meta device, whose tensors have shapes and no numbers: it
cannot be looked at, and tensors of the host do not mix with it. A CUDA graph repeats the same kernels on the same
tensors; so does a trace of the step, which is replayed here in its place. Graphs of torch.compile are counted as they
are made. The CPU's own multiplication, by oneDNN, equals PyTorch's.
"""

import contextlib
import copy
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import train_dpo
import train_ppo
import train_rm
import train_sft
from enumerable import EXAMPLES, tiny_gpt
from measured import at_most
from nanopost import model as model_file
from nanopost import sampling
from nanopost.data import to_device
from nanopost.model import KVCache, linear
from nanopost.run import Run, find_device

# --------------------------------------------------------------------------------------- one step never waits

PAIRS = [(EXAMPLES[0], EXAMPLES[1]), (EXAMPLES[1], EXAMPLES[2]), (EXAMPLES[2], EXAMPLES[0])]


def rollout_on_the_host(config):
    torch.manual_seed(1)
    policy = tiny_gpt(1).add_head(0.1)
    score = lambda prompts, samples: samples.lengths.double()  # noqa: E731
    no_end = type("Tokenizer", (), {"end": -1, "pad": 0})
    prompts = [[1, 2], [3], [1], [2, 2]]
    return train_ppo.rollout(policy, None, tiny_gpt(2), score, [""] * 4, prompts, no_end, config, 0.1)


def steps(module, **options):
    """A function (run, model) that makes two optimizer steps with the module's update()."""
    config = module.Config(device="cpu", micro_batch=2, **options)
    data = {train_sft: EXAMPLES, train_rm: PAIRS, train_dpo: PAIRS}
    extra = (torch.zeros(3, 2),) if module is train_dpo else ()

    def go(run, model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
        if module is train_ppo:
            return train_ppo.update(run, model, None, optimizer, rollout_on_the_host(config), config)
        return [module.update(run, model, optimizer, data[module], *extra, config) for _ in range(2)]

    return config, go


@pytest.fixture
def without_autocast(monkeypatch):
    """It has no meta device; it is off in these tests anyhow."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def refuse_copies_that_wait(monkeypatch):
    to = torch.Tensor.to

    def without_waiting(x, *arguments, **options):
        y = to(x, *arguments, **options)
        assert y.device == x.device or options.get("non_blocking"), f"a copy to {y.device} that waits"
        return y

    monkeypatch.setattr(torch.Tensor, "to", without_waiting)


@pytest.mark.parametrize("module", [train_sft, train_rm, train_dpo, train_ppo], ids=lambda m: m.__name__)
def test_an_optimizer_step_never_waits_for_the_device(module, without_autocast, monkeypatch):
    options = dict(max_new_tokens=4, minibatches=1, epochs=2) if module is train_ppo else {}
    config, go = steps(module, **options)
    run = Run("test", config)
    run.device = torch.device("meta")
    model = tiny_gpt(1).add_head(0.1).to("meta")
    refuse_copies_that_wait(monkeypatch)
    stats = go(run, model)
    assert len(stats) == 2
    for name, value in stats[0].items():
        assert isinstance(value, torch.Tensor) and value.is_meta, f"{name} was looked at"


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool((x > 0).any()),
                                  lambda x: x[x > 0], lambda x: x.cpu(), lambda x: x + torch.ones(3)])
def test_looking_at_the_meta_device_or_mixing_it_with_the_host_fails(look):
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(torch.ones(3, device="meta"))


def test_a_rollout_is_brought_to_the_host_whole(monkeypatch):
    brought, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: brought.append(cpu(x)) or brought[-1])
    batch = rollout_on_the_host(train_ppo.Config(device="cpu", max_new_tokens=4))
    assert all(any(x is y for y in brought) for x in batch.values())


def test_what_goes_to_a_gpu_is_pinned_and_nobody_waits(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking=False: calls.append((device, non_blocking)))
    to_device(torch.ones(2), "cuda:1")
    to_device(torch.ones(2), torch.device("cpu"))
    assert calls == ["pinned", ("cuda:1", True), (torch.device("cpu"), True)]


# ------------------------------------------------------------------------------------- decoding steps are replayed


def buffers(function):
    """The tensors that a closure works on."""
    for x in inspect.getclosurevars(function).nonlocals.values():
        if inspect.isfunction(x):
            yield from buffers(x)
        elif isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, KVCache):
            yield from (x.kv, x.pos)


@pytest.fixture
def traces(monkeypatch):
    """In place of capture(): the kernels of a step, with its tensors and every number of the host frozen into them,
    which is what a CUDA graph is. Looking at a tensor while it is traced raises an error. A list of the traces."""
    made = []

    def trace(step):
        before = [(x, x.clone()) for x in buffers(step)]
        made.append(make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)())
        for x, value in before:  # tracing changes some of them, capturing none
            x.copy_(value)
        return made[-1]

    monkeypatch.setattr(sampling, "capture", trace)
    monkeypatch.setattr(sampling, "GRAPHS", ("cpu",))
    return made


def run_on_meta(function):
    """Calls a closure, and those that it calls, with all their tensors and models on the meta device."""
    cells, queue = [], [function]
    while queue:
        for cell in queue.pop().__closure__ or ():
            x = cell.cell_contents
            if inspect.isfunction(x):
                queue.append(x)
            elif isinstance(x, (torch.Tensor, torch.nn.Module, KVCache)):
                cells.append((cell, x))
    on_meta = {}  # a tensor that two closures share stays one tensor
    for cell, x in cells:
        if id(x) not in on_meta and isinstance(x, KVCache):
            on_meta[id(x)] = copy.copy(x)
            on_meta[id(x)].kv, on_meta[id(x)].pos = x.kv.to("meta"), x.pos.to("meta")
        elif id(x) not in on_meta:
            on_meta[id(x)] = copy.deepcopy(x).to("meta")
        cell.cell_contents = on_meta[id(x)]
    function()
    for cell, x in cells:
        cell.cell_contents = x


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}])
def test_a_decoding_step_looks_at_nothing_and_uses_nothing_of_the_host(options, tiny, without_autocast, monkeypatch):
    tried = []
    monkeypatch.setattr(sampling, "capture", lambda step: tried.append(run_on_meta(step)) or step)
    monkeypatch.setattr(sampling, "GRAPHS", ("cpu",))
    sampling.generate(tiny(60, block_size=160).add_head(1.0), PROMPTS, 120, 3, **options)
    assert tried


PROMPTS = [[1, 2, 3], [4, 5], [6] * 30, [7, 8], [9], [1, 1]]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}])
def test_replayed_steps_sample_what_steps_sample(options, traces, tiny, monkeypatch):
    model, noise = tiny(60, block_size=160).double().add_head(1.0), torch.rand(6, 120).double()
    drops, keep = [], KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda cache, rows: drops.append(rows) or keep(cache, rows))
    replayed = sampling.generate(model, PROMPTS, 120, 3, noise=noise, **options)
    assert len(traces) >= 2  # more columns, or fewer rows: another graph
    assert drops or options, "no row was dropped"
    monkeypatch.setattr(sampling, "GRAPHS", ())
    usual = sampling.generate(model, PROMPTS, 120, 3, noise=noise, **options)
    assert len(set(usual.lengths.tolist())) > 1
    for a, b in zip(vars(replayed).values(), vars(usual).values(), strict=True):
        assert a.shape == b.shape
        at_most((a.double() - b.double()).abs().max(), 1e-12)


def test_a_graph_serves_all_steps_of_a_shape(traces, tiny):
    """Rows are dropped when half of them have ended, and columns come 64 at a time: few graphs, whatever the length."""
    sampling.generate(tiny(60, block_size=160).double(), PROMPTS, 120, end=-1)  # no row ends: 30 + 120 columns
    assert len(traces) == 3  # of 64, 128 and 150 columns
    traces.clear()
    generator = torch.Generator().manual_seed(0)
    sampling.generate(tiny(60, block_size=160).double(), [[1]] * 64, 30, end=5, generator=generator)
    assert 1 <= len(traces) <= 6  # 64 rows can be halved six times


def test_a_step_is_captured_and_not_run(monkeypatch):
    """What capture() asks of CUDA: torch.cuda.graph around the step, in the mode that lets NCCL's thread go on."""
    log = []

    @contextlib.contextmanager
    def graph(made, capture_error_mode):
        log.append(("begin", made, capture_error_mode))
        yield
        log.append("end")

    made = type("CUDAGraph", (), {"replay": "replay"})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    assert sampling.capture(lambda: log.append("step")) == "replay"
    assert log == [("begin", made, "thread_local"), "step", "end"]
    assert sampling.GRAPHS == ("cuda",)


def test_the_first_step_is_a_warm_up_the_second_is_captured(monkeypatch):
    log = []
    replay = functools.partial(log.append, "replay")
    monkeypatch.setattr(sampling, "capture", lambda step: log.append("capture") or replay)
    call = sampling.replayed(lambda: log.append("step"))
    for _ in range(4):
        call()
    assert log == ["step", "capture", "replay", "replay", "replay"]


def test_graphs_are_captured_on_the_device_of_the_run(monkeypatch):
    """--device cuda:1 makes it the current one, where torch.cuda.graph captures."""
    calls = []
    second = type("Tensor", (), {"device": torch.device("cuda:1")})
    monkeypatch.setattr(torch, "empty", lambda *_, device: second if device == "cuda:1" else None)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    assert find_device("cuda:1") == second.device
    assert calls == [second.device, False]


# ------------------------------------------------------------------------------------------ graphs of torch.compile


@pytest.fixture
def graphs(monkeypatch):
    """Compiling is on, by a compiler that only counts: [number of graphs so far at every optimizer step]."""
    torch._dynamo.reset()
    made, at_step = [], type("List", (list,), {})()
    compile, begin, update = torch.compile, Run.begin, Run.update

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def begin_compiling(self, *arguments, **extra):
        self.compiling = True
        return begin(self, *arguments, **extra)

    def counted(self, *arguments):
        at_step.append(len(made))
        return update(self, *arguments)

    at_step.made = made
    monkeypatch.setattr(torch, "compile", functools.partial(compile, backend=backend))
    monkeypatch.setattr(Run, "begin", begin_compiling)
    monkeypatch.setattr(Run, "update", counted)
    yield at_step
    torch._dynamo.reset()


def test_a_function_is_compiled_once_and_only_where_compiling_is_on(monkeypatch):
    run = Run("test", train_sft.Config(device="cpu"))
    assert not run.compiling and run.compiled(max) is max
    run.compiling = True
    assert run.compiled(linear) is run.compiled(linear) is not linear
    monkeypatch.setattr("nanopost.run.find_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for wanted in (True, False):
        assert Run("test", train_sft.Config(device="cuda:0", compile=wanted)).compiling == wanted


def test_the_rows_of_ppo_have_few_lengths_too(tiny, monkeypatch):
    """Minibatches are cut to multiples of 8 columns, or are as wide as the rollout."""
    widths, forward = [], model_file.GPT.forward
    config = train_ppo.Config(device="cpu", minibatches=1, epochs=1, micro_batch=1)
    lengths = torch.tensor([3, 8, 9, 22])
    mask = torch.arange(1, 22) < lengths[:, None]  # (4, 21)
    zeros = dict.fromkeys(("old_logprobs", "old_values", "returns", "advantages"), torch.zeros(4, 21))
    batch = {"ids": torch.ones(4, 22, dtype=torch.long), "lengths": lengths, "mask": mask, **zeros}
    monkeypatch.setattr(model_file.GPT, "forward", lambda self, ids: widths.append(ids.shape[1]) or forward(self, ids))
    policy = tiny(60).add_head(0.1)
    train_ppo.update(Run("test", config), policy, None, torch.optim.SGD(policy.parameters(), 0.0), batch, config)
    assert widths == [8, 8, 16, 22]


TEXTS = [{"prompt": "Say", "completion": "so " * (n % 13 + 1), "chosen": "a" * (n % 37 + 1), "rejected": "no"}
         for n in range(60)]


@pytest.mark.parametrize("script, key, options", [
    ("sft", "data", {}), ("rm", "data", {"normalise": 0}), ("dpo", "data", {}),
    ("ppo", "prompts", {"max_new_tokens": 30, "minibatches": 1, "temperature": 0.9})])
def test_nothing_is_compiled_after_the_first_steps(script, key, options, graphs, workshop, tmp_path, lines):
    """Batches of every length, whole and cut into unequal micro-batches: the blocks share three graphs or fewer (of the
    first shape, of any shape, and without gradients), and the cross-entropy has one or two."""
    options |= {key: lines(TEXTS), "steps": 12, "batch_size": 5, "micro_batch": 3, "eval_every": 100}
    workshop.run(script, tmp_path / "run", **options)
    assert len(graphs) >= 12 and 0 < graphs[-1] <= 5
    assert set(graphs[4:]) == {graphs[-1]}, f"graphs made up to every step: {graphs}"
    losses = [graph for graph in graphs.made if "cross_entropy" in graph.code]
    assert 1 <= len(losses) <= 2 if script != "rm" else not losses
    assert sum("scaled_dot_product_attention" in graph.code for graph in graphs.made) == len(graphs.made) - len(losses)


# ------------------------------------------------------------------------------------- the CPU's matrix products


@pytest.fixture
def convolutions(monkeypatch):
    """What linear() has oneDNN multiply: a list of shapes."""
    shapes, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *rest, **options: shapes.append(x.shape) or conv2d(x, *rest, **options))
    return shapes


@pytest.mark.parametrize("shape", [(300, 128), (7, 61, 128), (256, 1, 128), (2, 3, 50, 128)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_convolution_is_the_matrix_product_and_so_are_its_gradients(shape, biased, convolutions):
    inputs = [torch.randn(shape), torch.randn(96, 128), torch.randn(96) if biased else None]
    weight = torch.randn(*shape[:-1], 96)  # of a sum over the output, so that every gradient is another number
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        x, w, b = (None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs)
        y = function(x, w, b)
        (y * weight).sum().backward()
        results.append([y, x.grad, w.grad, *([b.grad] if biased else [])])
    assert len(convolutions) == model_file.ONEDNN
    for ours, exact in zip(*results):
        assert ours.shape == exact.shape and ours.dtype == torch.float32
        at_most((ours.double() - exact).abs().max() / exact.abs().max(), 1e-5)


def test_a_cpu_with_avx_has_onednn_multiply():
    x86 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert model_file.ONEDNN or not x86


@pytest.mark.parametrize("x", [torch.ones(300, 128).double(), torch.ones(200, 128), torch.ones(127, 512),
                               torch.ones(300, 128).bfloat16(), torch.ones(300, 128, device="meta")],
                         ids=["double", "few numbers", "few rows", "bf16", "another device"])
def test_everything_else_is_multiplied_as_ever(x, convolutions):
    assert linear(x, x.new_ones(5, x.shape[-1])).shape == (*x.shape[:-1], 5) and not convolutions


def test_autocast_and_a_pytorch_without_onednn_multiply_as_ever(convolutions, monkeypatch):
    x, w = torch.randn(300, 128), torch.randn(5, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    monkeypatch.setattr(model_file, "ONEDNN", False)
    assert torch.equal(linear(x, w), F.linear(x, w)) and not convolutions


def test_a_models_matrices_are_all_multiplied_so(convolutions):
    model = model_file.GPT(model_file.GPTConfig(200, 64, 2, 2, 64))
    hidden = model(torch.zeros(10, 64, dtype=torch.long))
    model.logits(hidden)
    assert len(convolutions) == (2 * 4 + 1) * model_file.ONEDNN
