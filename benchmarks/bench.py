"""How fast it is, and how far that is from what the machine could do. It times the scripts' own functions.

    python benchmarks/bench.py                            # the embedded model, on one thread of the CPU
    python benchmarks/bench.py --size gpt2                # GPT-2 124M, on a GPU
    python benchmarks/bench.py --size trl-small --against trl --only sft,dpo

Each measurement is a process of its own, so that its peak memory is its own. Tokens are real ones, padding is not
counted, and token ids are random: the arithmetic does not depend on them. The floor is the time that the multiply-adds
on real tokens take at the machine's best measured rate of matrix multiplication, plus the optimizer's reading and
writing at its best rate of copying; "of floor" is that time divided by the measured one. With --against trl every
measurement alternates with TRL's of the same (benchmarks/trl_side.py), whose ratio is of the two neighbours.
"""

import copy
import json
import os
import platform
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_dpo  # noqa: E402
import train_ppo  # noqa: E402
import train_rm  # noqa: E402
import train_sft  # noqa: E402
from benchmarks import trl_side  # noqa: E402
from nanopost.checkpoint import freeze  # noqa: E402
from nanopost.config import UserError, cli  # noqa: E402
from nanopost.data import Example, batches  # noqa: E402
from nanopost.model import GPT, GPTConfig, linear  # noqa: E402
from nanopost.run import Run, adamw  # noqa: E402
from nanopost.sampling import generate  # noqa: E402


@dataclass
class Config:
    size: str = "embedded"  # the model and its batches: tiny, embedded, trl-small or gpt2 (which wants a GPU)
    only: str = "sft,rm,dpo,decode,ppo"  # what to measure; ppo-critic is PPO with a value network of its own
    repeat: int = 3  # processes a measurement; the table has their median, and (smallest..largest)
    steps: int = 20  # timed steps a process, of sft, rm and dpo; of decode and ppo a fifth
    threads: int = 1  # of the CPU
    device: str = "auto"  # auto, cpu, cuda
    against: str = ""  # trl: measure TRL too, on the same batches; trl-random: on rows in its own, random order
    json: str = ""  # a file for all figures
    measure: str = ""  # one of --only, in this very process: prints its figures as a line of JSON


@dataclass
class Size:
    """A model and what it is fed. Lengths in tokens: answers and prompts are log-normal, with these medians."""

    model: GPTConfig
    prompt: int
    answer: int
    rows: int  # SFT: sequences a step
    pairs: int  # reward model, DPO: pairs a step
    micro: int  # sequences (SFT) or pairs a forward pass; 0: all
    decode: tuple[int, ...]  # rows that are sampled together
    ppo: dict  # options of train_ppo.py
    full: bool = False  # SFT on whole contexts, every token a target, as in pretraining


SIZES = {
    "tiny": Size(GPTConfig(64, 32, 1, 2, 16), 5, 6, 2, 2, 0, (2,),
                 dict(batch_size=2, max_new_tokens=4, epochs=1, minibatches=1, micro_batch=0)),
    "embedded": Size(GPTConfig(1024, 128, 2, 4, 128), 18, 27, 16, 16, 16, (64, 256),
                     dict(batch_size=128, max_new_tokens=32, epochs=2, minibatches=2, micro_batch=32)),
    "trl-small": Size(GPTConfig(1024, 128, 4, 4, 128), 18, 27, 32, 32, 16, (64,),
                      dict(batch_size=64, max_new_tokens=32, epochs=4, minibatches=1, micro_batch=32)),
    "gpt2": Size(GPTConfig(), 64, 128, 64, 64, 32, (64, 256, 512),
                 dict(batch_size=512, max_new_tokens=128, epochs=4, minibatches=4, micro_batch=64), full=True),
}

# --------------------------------------------------------------------------------------------------------- the floor


def forward_flops(model: GPTConfig, lengths: list[int], logits: int = 0) -> int:
    """Floating-point operations, 2 per multiply-add, of a forward pass over rows of these lengths.

    A layer's four matrices have 12 C^2 weights, each used once a token. Causal attention multiplies q k and p v, 2 C
    multiply-adds for every pair of a token and one that it sees: those before and itself. `logits` positions get V
    logits each. A backward pass is twice this: one more multiply-add for the gradient of either factor.
    """
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    trunk = model.n_layer * (12 * model.n_embd**2 * sum(lengths) + 2 * model.n_embd * pairs)
    return 2 * (trunk + logits * model.n_embd * model.vocab_size)


def parameters(model: GPTConfig) -> int:
    """Of the trunk and the embeddings, which are also the output matrix."""
    c = model.n_embd
    return model.n_layer * (12 * c * c + 13 * c) + (model.rows + model.block_size + 2) * c


ADAMW = 28  # bytes a parameter and step: weight, gradient and two moments are read, all but the gradient written, fp32


def decode_floor(model: GPTConfig, prompts: list[int], new_tokens: int, machine: dict) -> float:
    """Seconds to sample: the forward pass of prompts of these lengths, then a step a token, which reads all weights and
    the keys and values of all tokens so far, and multiplies by them; whichever takes longer."""
    rows, total = len(prompts), forward_flops(model, prompts, len(prompts)) / machine["flops"]
    for step in range(1, new_tokens):
        context = sum(prompts) + step * rows  # tokens attended to in this step
        weights = 12 * model.n_layer * model.n_embd**2 + model.n_embd * model.vocab_size
        cached = 2 * model.n_layer * model.n_embd * context  # keys and values, each used in one multiply-add
        total += max(2 * (rows * weights + cached) / machine["flops"],
                     machine["item"] * (weights + cached) / machine["bytes"])
    return total


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
    """The best rates in FLOP/s and bytes/s: of multiplying the matrices of the model's MLP and large square ones, and
    of copying as much as the model's weights and a large buffer (a byte copied is read and written: 2)."""
    device, c, large = run.device, size.model.n_embd, 8192 if run.device.type == "cuda" else 2048
    rates = {"device": str(device) if device.type != "cuda" else torch.cuda.get_device_name(device),
             "dtype": str(run.dtype)[6:], "item": run.dtype.itemsize}
    for name, (n, k, m) in {"own": (2048, c, 4 * c), "large": (large, large, large)}.items():
        a, b = (torch.randn(shape, device=device, dtype=run.dtype) for shape in ((n, k), (m, k)))
        with torch.no_grad():
            ways = lambda: F.linear(a, b), lambda: linear(a, b)  # on a CPU: MKL and oneDNN
            rates[f"{name}_flops"] = 2 * n * k * m / min(clock(way, device) for way in ways * 10)
    for name, n in {"own": parameters(size.model), "large": 2**26}.items():
        a, b = torch.randn(n, device=device), torch.zeros(n, device=device)
        rates[f"{name}_bytes"] = 2 * 4 * n / min(clock(lambda: b.copy_(a), device) for _ in range(10))
    return rates | {kind: max(rates[f"own_{kind}"], rates[f"large_{kind}"]) for kind in ("flops", "bytes")}


# --------------------------------------------------------------------------------------------------------------- data


def texts(size: Size, count: int, answers: int, full: bool = False) -> list:
    """`count` times (prompt ids, [answer ids, ...]): random tokens, none of them the last three, which are special at
    TRL; log-normal lengths, two thirds of them within 1.5 times the median. `full`: no prompt and a whole context."""
    rng, block = np.random.default_rng(0), size.model.block_size

    def draw(median):
        n = block if full else int(np.clip(rng.lognormal(np.log(median), 0.4), 2, min(block // 2, 4 * median)))
        return rng.integers(0, size.model.vocab_size - 3, n).tolist()

    return [([] if full else draw(size.prompt), [draw(size.answer) for _ in range(answers)]) for _ in range(count)]


def training_batches(what: str, size: Size, steps: int) -> list[list]:
    """What sft, rm and dpo train on: `steps` batches of (prompt, answers), grouped by length as the scripts do it."""
    rows = size.rows if what == "sft" else size.pairs
    data = texts(size, steps * rows, 1 if what == "sft" else 2, size.full and what == "sft")
    order = batches([len(prompt) + max(map(len, answers)) for prompt, answers in data], rows)
    return [[data[i] for i in next(order)] for _ in range(steps)]


def prompts(size: Size, count: int) -> list[list[int]]:
    return [prompt for prompt, _ in texts(size, count, 0)]


def with_warmup(steps: list, device) -> tuple[list, int]:
    """The steps with some of them before, and how many: all of them on CUDA, so that nothing is left to compile."""
    warm = len(steps) if device.type == "cuda" else min(3, len(steps))
    return steps[:warm] + steps, warm


# ----------------------------------------------------------------------------------------------------- what is measured

# the optimizers of the scripts, for TRL to use the same; learning rates are the scripts' defaults, and stay
OPTIMIZERS = {"sft": {"betas": (0.9, 0.99)}, "rm": {"eps": 1e-5}, "dpo": {}, "ppo": {"eps": 1e-5}}


def new_run(module, config: Config, **options) -> Run:
    return Run("bench", module.Config(out=tempfile.mkdtemp(), device=config.device, **options))


def initial(size: Size, head: float | None = None) -> GPT:
    """The model with random weights, seed 0. `head`: standard deviation of a scalar head's weights; None: no head."""
    torch.manual_seed(0)
    model = GPT(copy.deepcopy(size.model))
    return model if head is None else model.add_head(head)


def measure_training(what: str, size: Size, config: Config) -> dict:
    """sft, rm, dpo: update() of the script on every batch. DPO's reference log-probabilities, one pass over the same
    pairs, are a phase of their own."""
    module = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo}[what]
    run = new_run(module, config, micro_batch=size.micro)
    model, options = initial(size, 0.1 if what == "rm" else None).to(run.device), run.options
    optimizer = adamw(model.parameters(), options.lr, **OPTIMIZERS[what])
    data, warm = with_warmup(training_batches(what, size, config.steps), run.device)
    data = [[tuple(Example(p + a, [not p] * len(p) + [True] * len(a)) for a in answers) for p, answers in batch]
            for batch in data]
    if what == "sft":
        data = [[row for row, in batch] for batch in data]
    run.begin({"model": model}, optimizer, None, len(data))
    phases, extra = Phases(run.device), [()] * len(data)
    before = memory(run.device)
    if what == "dpo":
        flat, n = sum(data[warm:], []), size.pairs
        with run.autocast():
            ref = phases.timed("reference", train_dpo.reference_logprobs)(model, flat, run.device)
        extra = [(ref[i * n : (i + 1) * n],) for i in [*range(warm), *range(len(data) - warm)]]
    losses = []

    def steps(start, stop):
        for i in range(start, stop):
            losses.append(module.update(run, model, optimizer, data[i], *extra[i], options)["loss"])

    first = clock(lambda: steps(0, warm), run.device)
    phases.timed("update", steps)(warm, len(data))
    tokens = sum(len(row.ids) for batch in data[warm:] for rows in batch for row in (rows if what != "sft" else [rows]))
    return report(run, phases, tokens, len(data) - warm, first, warm, before, loss=float(sum(losses) / len(losses)))


def measure_decode(what: str, size: Size, config: Config) -> dict:
    """generate() with as many rows as the name says; no answer ends early (the end is no token)."""
    run, rows, new = new_run(train_ppo, config), int(what.split("-")[1]), size.ppo["max_new_tokens"]
    model, data = initial(size).to(run.device), prompts(size, rows)
    phases, before = Phases(run.device), memory(run.device)

    def sample():
        with run.autocast():
            generate(model, data, new, end=-1)

    first, count = clock(sample, run.device), max(1, config.steps // 5)
    for _ in range(count):
        phases.timed("generation", sample)()
    return report(run, phases, count * rows * new, count * new, first, new, before)


def measure_ppo(what: str, size: Size, config: Config) -> dict:
    """Iterations of rollout() and update() of train_ppo.py; no answer ends early. ppo-critic: a separate critic."""
    run = new_run(train_ppo, config, **size.ppo)
    options, rows, phases = run.options, size.ppo["batch_size"], Phases(run.device)
    policy, judge = initial(size).to(run.device), freeze(initial(size, 0.1).to(run.device))
    reference = freeze(copy.deepcopy(policy))
    critic = initial(size, 0.1).to(run.device) if what == "ppo-critic" else None
    trained = {"model": policy if critic else policy.add_head(0.0), **({"critic": critic} if critic else {})}
    optimizer = adamw([p for m in trained.values() for p in m.parameters()], options.lr, **OPTIMIZERS["ppo"])
    run.begin(trained, optimizer, None, config.steps)
    for name in ("forward", "logprobs"):
        setattr(reference, name, phases.timed("reference", getattr(reference, name)))
    score = phases.timed("reward", lambda _, samples: judge.score(samples.ids, samples.lengths))
    no_end = SimpleNamespace(end=-1, pad=0)
    data, before = prompts(size, rows), memory(run.device)

    def iteration():
        with run.autocast(), mock.patch.object(train_ppo, "generate", phases.timed("generation", generate)):
            batch = train_ppo.rollout(policy, critic, reference, score, data, data, no_end, options, options.beta)
        phases.timed("update", train_ppo.update)(run, policy, critic, optimizer, batch, options)

    first, count = clock(iteration, run.device), max(1, config.steps // 5)
    phases.clear()
    seconds = clock(lambda: [iteration() for _ in range(count)], run.device)
    phases["advantages"] = seconds - sum(phases.values())
    tokens = sum(len(prompt) + options.max_new_tokens for prompt in data)
    return report(run, phases, count * tokens, count, first, 1, before)


class Phases(dict):
    """Seconds spent in each phase."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def timed(self, name: str, function):
        def call(*args, **kwargs):
            out = []
            seconds = clock(lambda: out.append(function(*args, **kwargs)), self.device)
            self[name] = self.get(name, 0.0) + seconds
            return out[0]

        return call


def memory(device) -> float:
    """Peak so far in MB: of the GPU's allocator, or resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def report(run: Run, phases: dict, tokens: int, steps: int, first: float, warm: int, before: float, **more) -> dict:
    """The figures of a measurement: seconds in all and by phase, real tokens; what the first steps took beyond their
    usual time, which on CUDA is compilation; MB at the peak and before the first step."""
    seconds = sum(phases.values())
    return {"tokens": tokens, "steps": steps, "seconds": seconds, "phases": dict(phases),
            "compile_s": max(0.0, first - warm * seconds / steps) if run.device.type == "cuda" else 0.0,
            "memory_mb": memory(run.device), "before_mb": before, **more}


def measure(what: str, size: Size, config: Config) -> dict:
    torch.set_num_threads(config.threads)
    if what == "machine":
        return measure_machine(size, new_run(train_sft, config))
    function = {"decode": measure_decode, "ppo": measure_ppo}.get(what.split("-")[0], measure_training)
    return function(what, size, config)


def floor(what: str, size: Size, config: Config, machine: dict) -> float:
    """Seconds that the steps of a measurement take at least, by the formulas above."""
    model, ppo = size.model, SimpleNamespace(**size.ppo)
    adamw_s = ADAMW * parameters(model) / machine["bytes"]
    if what.startswith("decode"):
        ids = prompts(size, int(what.split("-")[1]))
        return max(1, config.steps // 5) * decode_floor(model, list(map(len, ids)), ppo.max_new_tokens, machine)
    if what.startswith("ppo"):
        before = [len(ids) for ids in prompts(size, ppo.batch_size)]
        after, targets = [n + ppo.max_new_tokens for n in before], ppo.batch_size * ppo.max_new_tokens
        flops = (1 + 3 * ppo.epochs) * forward_flops(model, after, targets) + forward_flops(model, after)
        if what == "ppo-critic":
            flops, adamw_s = flops + (1 + 3 * ppo.epochs) * forward_flops(model, after), 2 * adamw_s
        iteration = decode_floor(model, before, ppo.max_new_tokens, machine) + flops / machine["flops"]
        return max(1, config.steps // 5) * (iteration + ppo.epochs * ppo.minibatches * adamw_s)
    passes = {"sft": 3, "rm": 3, "dpo": 4}[what]  # a backward pass is two forward ones; DPO's reference is one more
    rows = [(prompt, a) for batch in training_batches(what, size, config.steps) for prompt, answers in batch
            for a in answers]
    targets = 0 if what == "rm" else sum(len(a) - (not prompt) for prompt, a in rows)  # nothing predicts a first token
    flops = passes * forward_flops(model, [len(prompt) + len(a) for prompt, a in rows], targets)
    return flops / machine["flops"] + config.steps * adamw_s


# ----------------------------------------------------------------------------------------------------------- the table


def child(command: list[str], threads: int) -> dict:
    """Runs a measurement in a process of its own; its last line is the result."""
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(value: dict, digits: int = 0) -> str:
    return "{median:,.{d}f} ({min:,.{d}f}..{max:,.{d}f})".format(**value, d=digits)


def summary(results: list[dict], floor_s: float) -> dict:
    """The runs of one measurement as median, min and max: tokens per second, ms a step (and by phase), share of the
    floor, MB."""
    phases = {name: spread([1000 * r["phases"][name] / r["steps"] for r in results]) for name in results[0]["phases"]}
    return {"tokens_per_s": spread([r["tokens"] / r["seconds"] for r in results]),
            "step_ms": spread([1000 * r["seconds"] / r["steps"] for r in results]),
            "floor_ms": 1000 * floor_s / results[0]["steps"],
            "of_floor": spread([floor_s / r["seconds"] for r in results]),
            "memory_mb": spread([r["memory_mb"] for r in results]),
            "before_mb": spread([r["before_mb"] for r in results]),
            "compile_s": spread([r["compile_s"] for r in results]), "phases_ms": phases,
            "loss": results[0].get("loss"), "runs": results}


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_table(figures: dict):
    machine = figures["machine"]
    print(", ".join(str(value) for value in figures["conditions"].values()))
    print("best of own size and large: {:.1f} GFLOP/s (own {:.1f}), {:.1f} GB/s copied\n".format(
        *(machine[name] / 1e9 for name in ("flops", "own_flops", "bytes"))))
    row = "{:<13} {:<9} {:>28} {:>23} {:>9} {:>9} {:>9} {:>20} {:>8}".format
    print(row("what", "", "real tokens/s", "ms/step", "of floor", "peak MB", "before", "ratio", "loss"))
    for what, sides in figures["rows"].items():
        for name, s in sides.items():
            if name == "ratio":
                continue
            ratio = show(sides["ratio"], 2) if name == "trl" else ""
            loss = "" if s["loss"] is None else f"{s['loss']:.4f}"
            print(row(what, name, show(s["tokens_per_s"]), show(s["step_ms"], 1), f"{s['of_floor']['median']:.1%}",
                      f"{s['memory_mb']['median']:,.0f}", f"{s['before_mb']['median']:,.0f}", ratio, loss))
            if len(s["phases_ms"]) > 1:
                for phase, ms in s["phases_ms"].items():
                    print(row("", "  " + phase, "", show(ms, 1), "", "", "", "", "").rstrip())
            if s["compile_s"]["max"]:
                print(f"    and {s['compile_s']['median']:.0f} s to compile")


def main(config: Config):
    if config.size not in SIZES:
        raise UserError(f"--size must be one of {', '.join(SIZES)}, not {config.size}")
    size = SIZES[config.size]
    known = ["sft", "rm", "dpo", *(f"decode-{rows}" for rows in size.decode), "ppo", "ppo-critic"]
    names = [name for part in (config.measure or config.only).split(",")
             for name in (known if part == "decode" else [part]) if part != "decode" or name.startswith("decode")]
    if wrong := [name for name in names if name not in known and name != "machine"]:
        raise UserError(f"--only: there is no {wrong[0]}, but sft, rm, dpo, decode, {', '.join(known[3:])}")
    if min(config.repeat, config.steps, config.threads) < 1:
        raise UserError("--repeat, --steps and --threads must be at least 1")
    if config.against not in ("", "trl", "trl-random"):
        raise UserError(f"--against must be trl, trl-random or nothing, not {config.against}")
    if config.measure:
        print(json.dumps(measure(names[0], size, config)))
        return

    options = ["--size", config.size, "--steps", str(config.steps), "--threads", str(config.threads)]
    ours = [sys.executable, os.path.abspath(__file__), *options, "--device", config.device, "--measure"]
    machine = child([*ours, "machine"], config.threads)
    if config.against:
        if machine["device"] != "cpu":
            raise UserError("--against compares on the CPU: give --device cpu")
        theirs = [trl_side.install(), trl_side.__file__, *options, "--against", config.against, "--measure"]
    conditions = {"device": machine["device"], "cpu": f"{cpu_name()} x {os.cpu_count()}",
                  "threads": f"threads: {config.threads}", "dtype": machine["dtype"], "size": config.size,
                  "python": f"Python {platform.python_version()}", "torch": f"torch {torch.__version__}"}
    figures = {"conditions": conditions, "machine": machine, "rows": {}}
    for name in names:
        pairs = []
        for _ in range(config.repeat):
            pair = {"nanopost": child([*ours, name], config.threads)}
            if config.against and not name.startswith("decode"):
                pair["trl"] = child([*theirs, name], config.threads)
            pairs.append(pair)
        floor_s = floor(name, size, config, machine)
        figures["rows"][name] = {side: summary([pair[side] for pair in pairs], floor_s) for side in pairs[0]}
        if "trl" in pairs[0]:
            speed = [{side: r["tokens"] / r["seconds"] for side, r in pair.items()} for pair in pairs]
            figures["rows"][name]["ratio"] = spread([s["nanopost"] / s["trl"] for s in speed])
            conditions["trl ppo" if name.startswith("ppo") else "trl"] = pairs[0]["trl"]["version"]
    print_table(figures)
    if config.json:
        with open(config.json, "w") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    cli(main, Config)
