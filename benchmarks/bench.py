"""How fast nanopost is, and how far that is from what the machine could do. It times the scripts' own functions.

    python benchmarks/bench.py                            # the embedded model, on one thread of the CPU
    python benchmarks/bench.py --size gpt2                # GPT-2 124M, on a GPU with 40 GB
    python benchmarks/bench.py --size trl-small --against trl --only sft,dpo

Every measurement is a process of its own, so its peak memory is its own. Only real tokens are counted, not padding, and
token ids are random: the arithmetic does not depend on them. The floor is the time for the multiply-adds on real tokens
at the machine's best measured rate of matrix multiplication, plus the time for the optimizer's reading and writing at
its best measured rate of copying; "of floor" is that time divided by the measured one. With --against trl every
measurement alternates with one of TRL (benchmarks/trl_side.py), and the ratio is that of the two neighbours. Beside sft
a profile says what its operations cost: what is left to gain.
"""

import copy
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import train_dpo  # noqa: E402
import train_ppo  # noqa: E402
import train_rm  # noqa: E402
import train_sft  # noqa: E402
from nanopost.checkpoint import freeze  # noqa: E402
from nanopost.config import UserError, at_least, cli  # noqa: E402
from nanopost.data import Example, Pair, batches  # noqa: E402
from nanopost.linear import linear  # noqa: E402
from nanopost.model import GPT, GPTConfig  # noqa: E402
from nanopost.run import Run, adamw  # noqa: E402
from nanopost.sampling import generate, in_parts  # noqa: E402


@dataclass
class Config:
    size: str = "embedded"  # the model and its batches: tiny, embedded, trl-small or gpt2 (for a GPU)
    only: str = "sft,rm,dpo,decode,ppo"  # what to measure; ppo-critic is PPO with a value network of its own
    repeat: int = 3  # processes per measurement; the table shows their median (smallest..largest)
    steps: int = 20  # timed steps per process for sft, rm and dpo; decode and ppo make a fifth of them
    threads: int = 1  # threads of the CPU
    device: str = "auto"  # auto, cpu, cuda
    against: str = ""  # trl: measure TRL too, on the same batches; trl-random: on rows in its own, random order
    json: str = ""  # file to write all figures to
    measure: str = ""  # measure this one thing in this very process, and print its figures as a line of JSON

    def __post_init__(self):
        at_least(self, 1, "repeat", "steps", "threads")
        if self.size not in SIZES:
            raise UserError(f"--size must be one of {', '.join(SIZES)}, not {self.size}")
        if self.against not in ("", "trl", "trl-random"):
            raise UserError(f"--against must be trl, trl-random or nothing, not {self.against}")
        known = ["sft", "rm", "dpo", *decodings(SIZES[self.size]), "ppo", "ppo-critic"]
        for name in self.names():
            if name not in (*known, "machine", "profile"):
                raise UserError(f"--only: there is no {name}; there are decode, {', '.join(known)}")

    def names(self) -> list[str]:
        """What to measure; decode stands for every number of rows."""
        names = []
        for name in (self.measure or self.only).split(","):
            names += decodings(SIZES[self.size]) if name == "decode" else [name]
        return names


@dataclass
class Size:
    """A model and its data. Lengths are in tokens: answers and prompts are log-normal with these medians."""

    model: GPTConfig
    prompt: int
    answer: int
    rows: int  # SFT: sequences per step
    pairs: int  # reward model and DPO: pairs per step
    micro: int  # sequences (SFT) or pairs per backward pass; 0: all
    decode: tuple[int, ...]  # how many rows are sampled together
    ppo: dict  # options of train_ppo.py
    full: bool = False  # SFT on whole contexts, with every token a target, as in pretraining


SIZES = {
    "tiny": Size(
        GPTConfig(64, 32, n_layer=1, n_head=2, n_embd=16),
        prompt=5, answer=6, rows=2, pairs=2, micro=0, decode=(2,),
        ppo=dict(batch_size=2, max_new_tokens=4, epochs=1, minibatches=1, micro_batch=0),
    ),
    "embedded": Size(
        GPTConfig(1024, 128, n_layer=2, n_head=4, n_embd=128),
        prompt=18, answer=27, rows=16, pairs=16, micro=16, decode=(64, 256),
        ppo=dict(batch_size=128, max_new_tokens=32, epochs=2, minibatches=2, micro_batch=16),
    ),
    "trl-small": Size(
        GPTConfig(1024, 128, n_layer=4, n_head=4, n_embd=128),
        prompt=18, answer=27, rows=32, pairs=32, micro=16, decode=(64,),
        ppo=dict(batch_size=64, max_new_tokens=32, epochs=4, minibatches=1, micro_batch=32),
    ),
    "gpt2": Size(
        GPTConfig(),
        prompt=64, answer=128, rows=64, pairs=64, micro=32, decode=(64, 256, 512), full=True,
        ppo=dict(batch_size=512, max_new_tokens=128, epochs=4, minibatches=4, micro_batch=64),
    ),
}  # fmt: skip


def decodings(size: Size) -> list[str]:
    return [f"decode-{rows}" for rows in size.decode]


def iterations(steps: int) -> int:
    """How many of the longer steps, of decode and ppo, are timed."""
    return max(1, steps // 5)


# --------------------------------------------------------------------------------------------------------- the floor


def forward_flops(model: GPTConfig, lengths: list[int], logits: int = 0) -> int:
    """Floating-point operations, 2 per multiply-add, of a forward pass over rows of these lengths.

    A layer's four matrices have 12 C^2 weights, each used once per token. Causal attention multiplies q k and p v, 2 C
    multiply-adds for every pair of a token and one that it sees: those before it and itself. `logits` positions get V
    logits each. A backward pass is twice this: one more multiply-add for the gradient of either factor.
    """
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    trunk = model.n_layer * (12 * model.n_embd**2 * sum(lengths) + 2 * model.n_embd * pairs)
    return 2 * (trunk + logits * model.n_embd * model.vocab_size)


def parameters(model: GPTConfig) -> int:
    """How many parameters the trunk and the embeddings have; the latter are also the output matrix."""
    c = model.n_embd
    return model.n_layer * (12 * c * c + 13 * c) + (model.rows + model.block_size + 2) * c


ADAMW = 28  # bytes per parameter and step: reads weight, gradient and two moments, writes all but the gradient; fp32


def decode_floor(model: GPTConfig, prompts: list[int], new_tokens: int, machine: dict) -> float:
    """Seconds to sample new_tokens for prompts of these lengths: the forward pass over the prompts, then the steps.

    A step reads all weights and the keys and values of all tokens so far, and multiplies by them; whichever takes
    longer counts.
    """
    rows = len(prompts)
    total = forward_flops(model, prompts, rows) / machine["flops"]
    weights = 12 * model.n_layer * model.n_embd**2 + model.n_embd * model.vocab_size
    for step in range(1, new_tokens):
        context = sum(prompts) + step * rows  # tokens attended to in this step
        cached = 2 * model.n_layer * model.n_embd * context  # keys and values, each used in one multiply-add
        arithmetic = 2 * (rows * weights + cached) / machine["flops"]
        reading = machine["item"] * (weights + cached) / machine["bytes"]
        total += max(arithmetic, reading)
    return total


def floor(what: str, size: Size, config: Config, machine: dict) -> float:
    """The least seconds that the steps of a measurement can take, by the formulas above."""
    model, ppo = size.model, SimpleNamespace(**size.ppo)
    adamw_s = ADAMW * parameters(model) / machine["bytes"]
    if what.startswith("decode"):
        lengths = [len(ids) for ids in prompts(size, int(what.split("-")[1]))]
        return iterations(config.steps) * decode_floor(model, lengths, ppo.max_new_tokens, machine)
    if what.startswith("ppo"):
        before = [len(ids) for ids in prompts(size, ppo.batch_size)]
        after = [n + ppo.max_new_tokens for n in before]
        passes = 1 + 3 * ppo.epochs  # the reference, and per epoch a forward and a backward pass
        flops = passes * forward_flops(model, after, ppo.batch_size * ppo.max_new_tokens)
        flops += forward_flops(model, after)  # the reward model
        if what == "ppo-critic":
            flops += passes * forward_flops(model, after)
            adamw_s *= 2
        sampling_s = decode_floor(model, before, ppo.max_new_tokens, machine)
        update_s = flops / machine["flops"] + ppo.epochs * ppo.minibatches * adamw_s
        return iterations(config.steps) * (sampling_s + update_s)
    passes = {"sft": 3, "rm": 3, "dpo": 4}[what]  # a backward pass is two forward ones; DPO's reference is one more
    rows = [side for batch in training_batches(what, size, config.steps) for row in batch for side in sides(row)]
    targets = 0 if what == "rm" else sum(sum(row.mask[1:]) for row in rows)
    flops = passes * forward_flops(model, [len(row) for row in rows], targets)
    return flops / machine["flops"] + config.steps * adamw_s


def clock(function, device) -> float:
    """Seconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_machine(size: Size, run: Run) -> dict:
    """The best rates, in FLOP/s of multiplying matrices and in bytes/s of copying.

    Either is tried at the model's own size (the matrices of its MLP; as much as its weights) and at a large one.
    """
    device, c = run.device, size.model.n_embd
    large = 8192 if device.type == "cuda" else 2048
    rates = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(run.dtype)[6:],
        "item": run.dtype.itemsize,
        "own_flops": multiplication_rate(2048, c, 4 * c, run),
        "large_flops": multiplication_rate(large, large, large, run),
        "own_bytes": copying_rate(parameters(size.model), device),
        "large_bytes": copying_rate(2**26, device),
    }
    return rates | {kind: max(rates[f"own_{kind}"], rates[f"large_{kind}"]) for kind in ("flops", "bytes")}


@torch.no_grad()
def multiplication_rate(n: int, k: int, m: int, run: Run) -> float:
    """FLOP/s of (n, k) times (k, m): PyTorch's own way or, on a CPU, nanopost.linear, whichever is faster."""
    a = torch.randn(n, k, device=run.device, dtype=run.dtype)
    b = torch.randn(m, k, device=run.device, dtype=run.dtype)
    ways = [lambda: F.linear(a, b), lambda: linear(a, b)]
    return 2 * n * k * m / min(clock(way, run.device) for way in ways * 10)


def copying_rate(n: int, device) -> float:
    """bytes/s of copying n numbers; a byte that is copied counts twice: it is read and written."""
    a, b = torch.randn(n, device=device), torch.zeros(n, device=device)
    return 2 * 4 * n / min(clock(lambda: b.copy_(a), device) for _ in range(10))


# --------------------------------------------------------------------------------------------------------------- data


def texts(size: Size, count: int, answers: int, full: bool = False) -> list[tuple[list[int], list[list[int]]]]:
    """`count` times (prompt ids, [answer ids, ...]): random tokens, but not the last three, which are special in TRL.

    Lengths are log-normal, two thirds of them within 1.5 times the median. `full`: no prompt, and a whole context.
    """
    rng, block_size = np.random.default_rng(0), size.model.block_size

    def draw(median):
        length = block_size
        if not full:
            length = int(np.clip(rng.lognormal(np.log(median), 0.4), 2, min(block_size // 2, 4 * median)))
        return rng.integers(0, size.model.vocab_size - 3, length).tolist()

    return [([] if full else draw(size.prompt), [draw(size.answer) for _ in range(answers)]) for _ in range(count)]


def training_batches(what: str, size: Size, steps: int) -> list[list[Example] | list[Pair]]:
    """What sft, rm and dpo train on: `steps` batches, whose rows have similar lengths as in the scripts."""
    sft = what == "sft"
    count = size.rows if sft else size.pairs
    rows = []
    for prompt, answers in texts(size, steps * count, 1 if sft else 2, full=size.full and sft):
        examples = [Example(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers]
        rows.append(examples[0] if sft else Pair(*examples))
    order = batches(rows, count)
    return [[rows[i] for i in next(order)] for _ in range(steps)]


def sides(row: Example | Pair) -> list[Example]:
    return [row] if isinstance(row, Example) else [row.chosen, row.rejected]


def tokens_of(batches: list[list]) -> int:
    """Real tokens, without padding."""
    return sum(len(side) for batch in batches for row in batch for side in sides(row))


def prompts(size: Size, count: int) -> list[list[int]]:
    return [prompt for prompt, _ in texts(size, count, 0)]


def with_warmup(steps: list, device) -> tuple[list, int]:
    """The steps, after some of them to warm up, and how many: all on CUDA, so that nothing is left to compile."""
    warm = len(steps) if device.type == "cuda" else min(3, len(steps))
    return steps[:warm] + steps, warm


# ----------------------------------------------------------------------------------------------------- measurements

# what the scripts give AdamW, so that TRL gets the same; learning rates are the scripts' defaults, and constant
OPTIMIZERS = {"sft": {"betas": (0.9, 0.99)}, "rm": {"eps": 1e-5}, "dpo": {}, "ppo": {"eps": 1e-5}}


def new_run(module, config: Config, **options) -> Run:
    return Run("bench", module.Config(out=tempfile.mkdtemp(), device=config.device, **options))


def initial(size: Size, head: float | None = None) -> GPT:
    """The model with random weights, seed 0. head: the standard deviation of a scalar head's weights; None: no head."""
    torch.manual_seed(0)
    model = GPT(copy.deepcopy(size.model))
    return model if head is None else model.add_head(head)


def measure_training(what: str, size: Size, config: Config) -> dict:
    """sft, rm, dpo: update() of the script on every batch. DPO's reference log-probabilities, one pass over the same
    pairs, are a phase of their own."""
    module = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo}[what]
    run = new_run(module, config, micro_batch=size.micro)
    options = run.options
    model = initial(size, 0.1 if what == "rm" else None).to(run.device)
    optimizer = adamw(model.parameters(), options.lr, **OPTIMIZERS[what])
    run.compile(model)
    data, warm = with_warmup(training_batches(what, size, config.steps), run.device)
    phases = Phases(run.device)
    before = memory(run.device)

    extra = [[] for _ in data]
    if what == "dpo":
        reference_logprobs = phases.timed("reference", train_dpo.reference_logprobs)
        with run.autocast():
            ref = reference_logprobs(model, sum(data[warm:], []), run.device)  # (P, 2)
        ref = ref.split(size.pairs)
        extra = [[part] for part in ref[:warm] + ref]
    losses = []

    def steps(start, stop):
        for batch, more in zip(data[start:stop], extra[start:stop]):
            losses.append(module.update(run, model, optimizer, batch, *more, options)["loss"])

    warm_s = clock(lambda: steps(0, warm), run.device)
    phases.timed("update", steps)(warm, len(data))
    count = len(data) - warm
    loss = float(sum(losses) / len(losses))
    return result(run.device, tokens_of(data[warm:]), count, phases, before, warm, warm_s, loss=loss)


def measure_decode(what: str, size: Size, config: Config) -> dict:
    """generate() with as many rows as the name says. No answer ends early: no token is the end."""
    run = new_run(train_ppo, config)
    rows, new = int(what.split("-")[1]), size.ppo["max_new_tokens"]
    model, data = initial(size).to(run.device), prompts(size, rows)
    phases = Phases(run.device)
    before = memory(run.device)

    def sample():
        with run.autocast():
            generate(model, data, new, end=-1)

    warm_s = clock(sample, run.device)
    count = iterations(config.steps)
    for _ in range(count):
        phases.timed("generation", sample)()
    return result(run.device, count * rows * new, count * new, phases, before, new, warm_s)


def measure_ppo(what: str, size: Size, config: Config) -> dict:
    """Iterations of train_ppo.py's rollout() and update(); no answer ends early. ppo-critic: with a separate critic."""
    run = new_run(train_ppo, config, **size.ppo)
    options, phases = run.options, Phases(run.device)

    # models
    policy = initial(size).to(run.device)
    reference = freeze(copy.deepcopy(policy))
    critic = initial(size, 0.1).to(run.device) if what == "ppo-critic" else policy.add_head(0.0)
    judge = freeze(initial(size, 0.1).to(run.device))
    trained = [policy] if critic is policy else [policy, critic]
    optimizer = adamw([p for model in trained for p in model.parameters()], options.lr, **OPTIMIZERS["ppo"])
    run.compile(*trained)

    # what is timed
    reference.forward = phases.timed("reference", reference.forward)
    reference.logprobs = phases.timed("reference", reference.logprobs)
    score = phases.timed("reward", lambda prompts, batch: judge.score(batch.ids, batch.lengths))
    timed_generate = phases.timed("generation", generate)
    timed_update = phases.timed("update", train_ppo.update)

    models = train_ppo.Models(policy, critic, reference, score)
    no_end = SimpleNamespace(end=-1, pad=0)
    data = prompts(size, options.batch_size)
    before = memory(run.device)

    def play(prompts, prompt_ids, noise):
        return train_ppo.rollout(models, no_end, prompts, prompt_ids, options, options.beta, noise)

    def iteration():
        noise = torch.rand(options.batch_size, options.max_new_tokens)
        with run.autocast(), mock.patch.object(train_ppo, "generate", timed_generate):
            batch = in_parts(play, data, data, noise)
        timed_update(run, models, optimizer, batch, options)

    warm_s = clock(iteration, run.device)
    phases.clear()
    count = iterations(config.steps)
    seconds = clock(lambda: [iteration() for _ in range(count)], run.device)
    phases["advantages"] = seconds - sum(phases.values())
    tokens = sum(len(prompt) + options.max_new_tokens for prompt in data)
    return result(run.device, count * tokens, count, phases, before, 1, warm_s)


KINDS = {  # of PyTorch's operations, by their names; the first that fits counts
    "matrix products": r"mm$|linear|convolution|mkldnn",
    "attention": r"attention",
    "GELU": r"gelu",
    "log-softmax": r"softmax|nll_loss",
    "LayerNorm": r"layer_norm",
    "Adam": r"adam|norm|foreach",
    "copies and sums": r"copy_|cat|add|sum|index|embedding|fill|mul|where|gather",
}


def measure_profile(size: Size, config: Config) -> dict:
    """Where the time of PyTorch's operations goes in SFT's steps on a CPU: {kind of operation: share}."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        measure_training("sft", size, config)
    microseconds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "the rest")
        microseconds[kind] += event.self_cpu_time_total
    total = sum(microseconds.values())
    return {kind: x / total for kind, x in microseconds.items()}


class Phases(dict):
    """Seconds spent in each phase."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def timed(self, name: str, function):
        """The function, whose time is added to this phase."""

        def call(*args, **kwargs):
            out = []
            seconds = clock(lambda: out.append(function(*args, **kwargs)), self.device)
            self[name] = self.get(name, 0.0) + seconds
            return out[0]

        return call


def memory(device) -> float:
    """The peak so far in MB: of the GPU's allocator, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def result(device, tokens, steps, phases, before, warm=0, warm_s=0.0, **more) -> dict:
    """The figures of a measurement: real tokens, steps, seconds in all and by phase, MB at the peak and `before` it.

    The `warm` steps before took warm_s seconds; what that is beyond their usual time is, on CUDA, compiling.
    """
    seconds = sum(phases.values())
    return {
        "tokens": tokens,
        "steps": steps,
        "seconds": seconds,
        "phases": dict(phases),
        "compile_s": max(0.0, warm_s - warm * seconds / steps) if device.type == "cuda" else 0.0,
        "memory_mb": memory(device),
        "before_mb": before,
        **more,
    }


def measure(what: str, size: Size, config: Config) -> dict:
    torch.set_num_threads(config.threads)
    if what == "machine":
        return measure_machine(size, new_run(train_sft, config))
    if what == "profile":
        return measure_profile(size, config)
    function = {"decode": measure_decode, "ppo": measure_ppo}.get(what.split("-")[0], measure_training)
    return function(what, size, config)


# --------------------------------------------------------------------------------------------------- TRL's environment

TRL_SIDE = os.path.join(HERE, "trl_side.py")
VENV = os.path.join(HERE, ".trl-venv")
PPO = os.path.join(VENV, "ppo")  # a folder with an older TRL, on the same transformers
PPO_VERSION = "1.12.0"  # the last with a PPOTrainer


def install() -> str:
    """The Python of an environment with TRL and the torch that is running; makes it if there is none."""
    python, done = os.path.join(VENV, "bin", "python"), os.path.join(VENV, "installed")
    if os.path.exists(done):
        return python
    print(f"making {VENV} with TRL: a few minutes", file=sys.stderr)
    pip = [python, "-m", "pip", "install", "--quiet"]
    torch_version = torch.__version__.split("+")[0]
    for command in (
        [sys.executable, "-m", "venv", "--clear", VENV],
        [*pip, f"torch=={torch_version}", "trl", "transformers", "datasets", "tiktoken", "tqdm"],
        [*pip, "--no-deps", "--target", PPO, f"trl=={PPO_VERSION}"],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)
    open(done, "w").close()
    return python


# ----------------------------------------------------------------------------------------------------------- the table


def child(command: list[str], threads: int) -> dict:
    """Runs a measurement in a process of its own; its last line is the result."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values) -> dict:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(value: dict, digits: int = 0) -> str:
    return "{median:,.{d}f} ({min:,.{d}f}..{max:,.{d}f})".format(**value, d=digits)


def summary(results: list[dict], floor_s: float) -> dict:
    """The runs of one measurement as median, min and max: tokens per second, ms per step (in all and by phase), share
    of the floor, MB."""
    phases = results[0]["phases"]
    return {
        "tokens_per_s": spread(r["tokens"] / r["seconds"] for r in results),
        "step_ms": spread(1000 * r["seconds"] / r["steps"] for r in results),
        "floor_ms": 1000 * floor_s / results[0]["steps"],
        "of_floor": spread(floor_s / r["seconds"] for r in results),
        "memory_mb": spread(r["memory_mb"] for r in results),
        "before_mb": spread(r["before_mb"] for r in results),
        "compile_s": spread(r["compile_s"] for r in results),
        "phases_ms": {name: spread(1000 * r["phases"][name] / r["steps"] for r in results) for name in phases},
        "loss": results[0].get("loss"),
        "runs": results,
    }


def cpu_name() -> str:
    """The processor, its cores, and which of its vector instructions PyTorch uses."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name} x {os.cpu_count()} ({torch.backends.cpu.get_cpu_capability()})"


def print_table(figures: dict):
    machine = figures["machine"]
    print(", ".join(str(value) for value in figures["conditions"].values()))
    best, own, copied = (machine[name] / 1e9 for name in ("flops", "own_flops", "bytes"))
    print(f"best of own size and large: {best:.1f} GFLOP/s (own {own:.1f}), {copied:.1f} GB/s copied\n")
    row = "{:<13} {:<9} {:>28} {:>23} {:>9} {:>9} {:>9} {:>20} {:>8}".format
    print(row("what", "", "real tokens/s", "ms/step", "of floor", "peak MB", "before", "ratio", "loss"))
    for what, sides in figures["rows"].items():
        for name, side in sides.items():
            if name != "ratio":
                print_side(row, what, name, side, show(sides["ratio"], 2) if name == "trl" else "")
    if profile := figures.get("profile"):
        print("an sft step, operation by operation: " + ", ".join(f"{kind} {x:.0%}" for kind, x in profile.items()))


def print_side(row, what: str, name: str, side: dict, ratio: str):
    """The lines of one side, nanopost or TRL, of one measurement."""
    speed, step = show(side["tokens_per_s"]), show(side["step_ms"], 1)
    share = f"{side['of_floor']['median']:.1%}"
    peak, before = (f"{side[key]['median']:,.0f}" for key in ("memory_mb", "before_mb"))
    loss = "" if side["loss"] is None else f"{side['loss']:.4f}"
    print(row(what, name, speed, step, share, peak, before, ratio, loss))
    if len(side["phases_ms"]) > 1:
        for phase, ms in side["phases_ms"].items():
            print(row("", "  " + phase, "", show(ms, 1), "", "", "", "", "").rstrip())
    if side["compile_s"]["max"]:
        print(f"    and {side['compile_s']['median']:.0f} s to compile")


def main(config: Config):
    size, names = SIZES[config.size], config.names()
    if config.measure:
        print(json.dumps(measure(names[0], size, config)))
        return

    # the commands of both sides, and what the machine can do
    options = ["--size", config.size, "--steps", str(config.steps), "--threads", str(config.threads)]
    ours = [sys.executable, os.path.abspath(__file__), *options, "--device", config.device, "--measure"]
    machine = child([*ours, "machine"], config.threads)
    theirs = []
    if config.against:
        if machine["device"] != "cpu":
            raise UserError("--against compares on the CPU: give --device cpu")
        theirs = [install(), TRL_SIDE, *options, "--against", config.against, "--measure"]
    conditions = {
        "device": machine["device"],
        "cpu": cpu_name(),
        "threads": f"threads: {config.threads}",
        "dtype": machine["dtype"],
        "size": config.size,
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
    }
    figures = {"conditions": conditions, "machine": machine, "rows": {}}

    if "sft" in names and machine["device"] == "cpu":
        figures["profile"] = child([*ours, "profile"], config.threads)
    for name in names:
        pairs = []
        for _ in range(config.repeat):
            pair = {"nanopost": child([*ours, name], config.threads)}
            if theirs and not name.startswith("decode"):
                pair["trl"] = child([*theirs, name], config.threads)
            pairs.append(pair)
        floor_s = floor(name, size, config, machine)
        figures["rows"][name] = {side: summary([pair[side] for pair in pairs], floor_s) for side in pairs[0]}
        if "trl" in pairs[0]:
            speeds = [{side: r["tokens"] / r["seconds"] for side, r in pair.items()} for pair in pairs]
            figures["rows"][name]["ratio"] = spread(speed["nanopost"] / speed["trl"] for speed in speeds)
            conditions["trl ppo" if name.startswith("ppo") else "trl"] = pairs[0]["trl"]["version"]

    print_table(figures)
    if config.json:
        with open(config.json, "w") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    cli(main, Config)
