"""What every script needs around its loop: device, precision, optimizer, schedule, checkpoints, metrics, progress bar.

A run writes one self-contained folder: config.json, model.pt (tensors only), vocab.tiktoken, metrics.jsonl and, while
it is unfinished, state.pt to resume from. Every file is written under a temporary name, flushed, then renamed, and
config.json comes last: a folder that has one is whole.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanopost.config import UserError
from nanopost.model import GPT, GPTConfig
from nanopost.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Options:
    """The options that all training scripts share."""

    out: str = "out/run"  # folder to write; an earlier run there is replaced
    resume: bool = False  # go on from the last checkpoint in that folder
    seed: int = 0  # of the initialisation, the data order and the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of the computation, weights stay fp32: auto (bf16 or fp16 on CUDA, else fp32), fp32, bf16, fp16
    compile: bool = torch.cuda.is_available()  # torch.compile the blocks
    log_every: int = 10  # steps between two lines of metrics.jsonl
    save_every: int = 200  # steps between two checkpoints


# ------------------------------------------------------------------------------------------------ files and folders


@contextlib.contextmanager
def atomic(path: str, mode: str = "w"):
    """Opens a file that appears under its name only when it is complete and on the disk."""
    temporary = f"{path}.tmp"
    with open(temporary, mode) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def save_model(folder: str, model: GPT, tokenizer: Tokenizer, info: dict):
    """Writes weights, vocabulary and, last, config.json = info plus the model's configuration."""
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(config_path := os.path.join(folder, "config.json")):
        os.remove(config_path)
    with atomic(os.path.join(folder, "vocab.tiktoken")) as f:
        tokenizer.write(f)
    with atomic(os.path.join(folder, "model.pt"), "wb") as f:
        torch.save({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, f)
    with atomic(config_path) as f:
        json.dump({**info, "model": dataclasses.asdict(model.config)}, f, indent=1)


def load_model(folder: str, device="cpu", reward: bool = False) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a finished run; `reward` says which kind is wanted: a reward or a language model.

    Raises UserError if the folder is missing, unfinished, of the other kind, or if its parts do not fit together.
    """
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder}")
    try:
        with open(os.path.join(folder, "config.json")) as f:
            config = GPTConfig(**json.load(f)["model"])
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished model (no config.json); is its training still to be resumed?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json does not describe a model: {error}") from None
    if config.scalar_head != reward:
        kinds = "a language model", "a reward model"
        raise UserError(f"{folder} holds {kinds[config.scalar_head]}; here {kinds[reward]} is needed")
    tokenizer, model = load_tokenizer(os.path.join(folder, "vocab.tiktoken")), GPT(config)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: the vocabulary has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    model.load_state_dict(load_tensors(os.path.join(folder, "model.pt"), model))
    return model.to(device), tokenizer


def load_file(path: str):
    """A checkpoint: tensors and plain values; nothing else is ever unpickled. UserError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no exception that a broken file does not raise
        raise UserError(f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def load_tensors(path: str, model: GPT) -> dict:
    """A model's tensors. UserError if the file is broken or does not fit the model."""
    tensors = load_file(path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if not isinstance(tensors, dict) or {n: getattr(t, "shape", None) for n, t in tensors.items()} != shapes:
        raise UserError(f"{path} does not fit the model that config.json describes")
    return tensors


def same_vocabulary(tokenizer: Tokenizer, other: Tokenizer, first: str, second: str):
    if tokenizer != other:
        raise UserError(f"{first} and {second} have different vocabularies ({tokenizer.vocab_size} and "
                        f"{other.vocab_size} tokens); both must come from the same one")


def load_function(spec: str):
    """The Python function "file.py:function". Its file may import its neighbours. UserError if there is none."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise UserError(f"no file {path or spec}; a function is given as file.py:function")
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module_spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path} has no function {name}")
    return getattr(module, name)


def call_reward(function, prompts: list, completions: list[str]) -> list[float]:
    """function(prompts, completions) with its result checked: one finite number a completion, else UserError."""
    try:
        scores = [float(x) for x in function(prompts, completions)]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward function {function.__name__}: {error}") from None
    if len(scores) != len(completions) or not all(map(math.isfinite, scores)):
        raise UserError(f"reward function {function.__name__}: must return one finite number for each of the "
                        f"{len(completions)} completions; it returned {len(scores)}")
    return scores


# -------------------------------------------------------------------------------------------- optimizer and schedule


def adamw(parameters, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
    """AdamW, fused; weight decay on matrices only, not on biases and LayerNorm gains."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def schedule(step: int, total: int, warmup: int = 0) -> float:
    """The learning rate's factor at step 0..total-1: linear warm-up to 1, then linear decay, which would reach 0 at
    step `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total - step) / max(1, total - warmup)


def freeze(model: GPT) -> GPT:
    """For reference and reward models: no gradients, no dropout."""
    return model.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------------------- a run


class Run:
    """One training run: `for step in run.steps(total)` with everything around it.

    The scripts call, in this order: Run(...), begin(...), then in the loop autocast(), backward(), update(), log(),
    and finish() at the end.
    """

    def __init__(self, method: str, options: Options):
        self.method, self.options = method, options
        name = options.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(name)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
        cuda = self.device.type == "cuda"
        best = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "fp32"
        if options.dtype not in ("auto", *DTYPES):
            raise UserError(f"--dtype must be auto or one of {', '.join(DTYPES)}, not {options.dtype}")
        self.dtype = DTYPES[best if options.dtype == "auto" else options.dtype]
        smallest = dict.fromkeys(("log_every", "save_every", "eval_every", "batch_size", "minibatches", "max_new_tokens"), 1)
        for name, bound in (smallest | dict.fromkeys(("micro_batch", "lr", "weight_decay"), 0)).items():
            if getattr(options, name, bound) < bound:
                raise UserError(f"--{name.replace('_', '-')} must be at least {bound}")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        torch.set_float32_matmul_precision("high")  # TF32 where there are tensor cores
        torch.manual_seed(options.seed)
        self.bar, self.started, self.start = None, time.time(), 0

    def path(self, name: str) -> str:
        return os.path.join(self.options.out, name)

    def print(self, text: str):
        tqdm.write(text)

    # -- precision

    def autocast(self):
        """Compute in bf16 or fp16 where that is set; weights, optimizer and log-probabilities stay fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: torch.Tensor):
        self.scaler.scale(loss).backward()

    def update(self, optimizer, grad_clip: float) -> torch.Tensor:
        """Clips the gradient's norm, makes the optimizer's step, clears the gradients; returns the norm."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    # -- the loop

    def begin(self, modules: dict, optimizer, tokenizer: Tokenizer, total: int) -> bool:
        """Call when all inputs are loaded: makes the folder, or with --resume takes up the last checkpoint.

        Returns False if there is nothing to do, because the run to resume is finished.

        `modules` {name: model} are what is trained; the one called "model" is what finish() saves. Anything else that
        changes from step to step goes into `run.extra` (a dict of numbers), which is saved and restored.
        """
        if total < 1:
            raise UserError(f"there is no step to make ({total}); check --steps, --epochs and the data")
        self.total = total
        self.modules, self.optimizer, self.tokenizer, self.extra = modules, optimizer, tokenizer, {}
        os.makedirs(self.options.out, exist_ok=True)
        state = self.path("state.pt")
        if self.options.resume and os.path.exists(state):
            self.restore(state)
        elif self.options.resume and os.path.exists(self.path("config.json")):
            self.print(f"{self.options.out} is finished: nothing to resume")
            return False
        else:  # a fresh run: what an earlier one left here no longer counts
            for name in ("state.pt", "config.json", "metrics.jsonl"):
                if os.path.exists(self.path(name)):
                    os.remove(self.path(name))
        if self.options.compile:
            for model in modules.values():
                for block in model.h:
                    block.compile()
        return True

    def steps(self):
        """The steps still to do, 0..total-1, with a progress bar and a checkpoint every save_every steps."""
        total = self.total
        parameters = sum(p.numel() for p in self.modules["model"].parameters())
        self.print(f"{self.method}: {total} steps on {self.device}, {str(self.dtype)[6:]}, {torch.get_num_threads()} "
                   f"threads, {parameters / 1e6:.2f}M parameters -> {self.options.out}")
        self.bar = tqdm(total=total, initial=self.start, desc=self.method, disable=None, dynamic_ncols=True)
        for step in range(self.start, total):
            yield step
            self.bar.update()
            if (step + 1) % self.options.save_every == 0 and step + 1 < total:
                self.checkpoint(step + 1)
        self.bar.close()

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps happens after this one; the last step counts."""
        return (step + 1) % every == 0 or step + 1 == self.total

    def log(self, step: int, metrics: dict):
        """Appends a line to metrics.jsonl: `step` updates done, seconds since the start, and the metrics.

        Tensors are read here, so call it only when due. Raises UserError when the loss is not a finite number.
        """
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if "loss" in name and not math.isfinite(value):
                raise UserError(f"{name} is {value} at step {step}: lower --lr, or look for a bad record in the data")
        line = {"step": step, "seconds": round(time.time() - self.started, 2)}
        for name, value in metrics.items():  # JSON has no NaN: null where a statistic is undefined
            line[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        with open(self.path("metrics.jsonl"), "a") as f:
            f.write(json.dumps(line) + "\n")
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix({name.split("/")[-1]: f"{v:.3g}" for name, v in list(metrics.items())[:4]})

    # -- checkpoints

    def arguments(self) -> dict:
        """The options that decide what a run computes."""
        return {k: v for k, v in dataclasses.asdict(self.options).items() if k not in ("resume", "out", "log_every")}

    def checkpoint(self, step: int):
        """Everything that the rest of the run depends on, in one file: it is the old one or the new one, never half."""
        state = {
            "step": step, "arguments": self.arguments(), "extra": self.extra,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        with atomic(self.path("state.pt"), "wb") as f:
            torch.save(state, f)

    def restore(self, path: str):
        state = load_file(path)
        for name, value in self.arguments().items():
            if state["arguments"].get(name) != value:
                raise UserError(f"--resume: {self.options.out} was started with {name} = "
                                f"{state['arguments'].get(name)}, not {value}; give the same options")
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.start, self.extra = state["step"], state["extra"]
        if os.path.exists(self.path("metrics.jsonl")):  # drop the lines of steps that will be made again
            with open(self.path("metrics.jsonl")) as f:
                lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= self.start]
            with atomic(self.path("metrics.jsonl")) as f:
                f.writelines(lines)
        self.print(f"resuming {self.options.out} after step {self.start}")

    def finish(self, info: dict | None = None):
        """Writes the finished folder, then removes the state to resume from."""
        info = {"method": self.method, "arguments": dataclasses.asdict(self.options), **(info or {})}
        save_model(self.options.out, self.modules["model"], self.tokenizer, info)
        if os.path.exists(self.path("state.pt")):
            os.remove(self.path("state.pt"))
        self.print(f"wrote {self.options.out} after {time.time() - self.started:.0f} s")
