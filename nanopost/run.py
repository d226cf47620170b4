"""What every script needs around its loop: device, precision, optimizer, schedule, checkpoints, metrics, progress bar.

A run writes one self-contained folder (checkpoint.py says what is in it), appends to its metrics.jsonl and, while it is
unfinished, keeps there a state.pt to resume from.
"""

import dataclasses
import glob
import importlib.util
import math
import os
import shutil
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanopost import distributed
from nanopost.checkpoint import atomic, load_file, save_model
from nanopost.config import UserError
from nanopost.metrics import Metrics
from nanopost.model import token_nll
from nanopost.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Options:
    """The options that all training scripts share."""

    out: str = "out/run"  # folder to write; an earlier run there is replaced
    resume: bool = False  # go on from the last checkpoint in that folder
    seed: int = 0  # of the initialisation, the data order and the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of the computation, weights stay fp32: fp32, bf16, fp16 or auto (the best on CUDA, else fp32)
    compile: bool = True  # torch.compile the blocks and the cross-entropy; on CUDA only
    log_every: int = 10  # steps between two lines of metrics.jsonl
    save_every: int = 200  # steps between two checkpoints
    keep_every: int = 0  # steps between two copies of the model that are kept, in step-N of the folder; 0: none
    logs: str = ""  # tensorboard: write the metrics for it too, into tensorboard of the folder


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


# ------------------------------------------------------------------------------------------------------------- a run


def find_device(name: str) -> torch.device:
    """The device called so; auto is the first GPU if there is one. UserError if it is not to be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current one
        torch.backends.cuda.enable_cudnn_sdp(False)  # its attention plans anew for every new shape, and takes its time
    return device


class Run:
    """One training run: `for step in run.steps()` with everything around it.

    The scripts call, in this order: Run(...), begin(...), then in the loop autocast(), backward(), update(), log(),
    and finish() at the end.
    """

    def __init__(self, method: str, options: Options):
        self.method, self.options = method, options
        device, self.rank, self.world = distributed.start(options.device)
        self.device = find_device(device)
        cuda = self.device.type == "cuda"
        best = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "fp32"
        if options.dtype not in ("auto", *DTYPES):
            raise UserError(f"--dtype must be auto or one of {', '.join(DTYPES)}, not {options.dtype}")
        self.dtype = DTYPES[best if options.dtype == "auto" else options.dtype]
        if options.logs not in ("", "tensorboard"):
            raise UserError(f"--logs must be tensorboard or nothing, not {options.logs}")
        if options.logs and importlib.util.find_spec("tensorboard") is None:
            raise UserError('--logs tensorboard needs a package: pip install tensorboard (or "nanopost[logs]")')
        positive = "log_every", "save_every", "eval_every", "batch_size", "minibatches", "max_new_tokens", "kl_horizon"
        others = "seed", "micro_batch", "lr", "weight_decay", "keep_every"
        for name, bound in (dict.fromkeys(positive, 1) | dict.fromkeys(others, 0)).items():
            if getattr(options, name, bound) < bound:
                raise UserError(f"--{name.replace('_', '-')} must be at least {bound}")
        shares = dict.fromkeys(("gamma", "lam"), (0, 1)) | dict.fromkeys(("beta", "clip", "value_clip"), (0, math.inf))
        for name, (low, high) in (shares | {"label_smoothing": (0, 0.499)}).items():
            if not low <= getattr(options, name, low) <= high:
                raise UserError(f"--{name.replace('_', '-')} must be between {low} and {high}")
        for name in ("init", "reward", "critic"):
            folder, out = getattr(options, name, ""), os.path.realpath(options.out)
            if os.path.isdir(folder) and out in (path := os.path.realpath(folder), os.path.dirname(path)):  # a copy
                raise UserError(f"--out and --{name} are {options.out} and {folder}; a run may not overwrite what it "
                                "starts from")
        self.compiling, self.functions = options.compile and cuda, {}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        torch.set_float32_matmul_precision("high")  # TF32 where there are tensor cores
        torch.manual_seed(options.seed)
        self.bar, self.started, self.start, self.norm = None, time.time(), 0, 0.0
        self.fresh, self.metrics = False, Metrics(options.out, bool(options.logs), silent=self.rank > 0)

    def path(self, name: str) -> str:
        return os.path.join(self.options.out, name)

    def print(self, text: str):
        tqdm.write(text)

    # -- precision

    def autocast(self):
        """Compute in bf16 or fp16 where that is set; weights, optimizer and log-probabilities stay fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def set_lr(self, optimizer, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr

    def backward(self, loss: torch.Tensor):
        self.scaler.scale(loss).backward()

    def update(self, optimizer, grad_clip: float) -> torch.Tensor:
        """Clips the gradient's norm, makes the optimizer's step, clears the gradients; returns the norm."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        distributed.add_gradients(parameters)
        self.scaler.unscale_(optimizer)
        norm = self.norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    # -- several processes: each works on its share of a batch, and what it computes is added up

    def shard(self, rows):
        return distributed.shard(rows)

    def sum(self, stats: dict) -> dict:
        return distributed.add_up(stats, self.device)

    def gather(self, x):
        return distributed.gather(x, self.device)

    # -- the loop

    def begin(self, modules: dict, optimizer, tokenizer: Tokenizer, total: int, **extra) -> bool:
        """Call when all inputs are loaded: makes the folder, or with --resume takes up the last checkpoint.

        `modules` {name: model} are what is trained; the one called "model" is what finish() saves. `extra` are numbers
        that may change from step to step: `run.extra`, saved and restored. Returns False if there is nothing to do,
        because the run to resume is finished.
        """
        if total < 1:
            raise UserError(f"there is no step to make ({total}); check --steps, --epochs and the data")
        self.modules, self.optimizer, self.tokenizer = modules, optimizer, tokenizer
        self.total, self.extra = total, extra
        os.makedirs(self.options.out, exist_ok=True)
        state = self.path("state.pt")
        if self.options.resume and os.path.exists(state):
            self.restore(state)
        elif self.options.resume and os.path.exists(self.path("config.json")):
            self.print(f"{self.options.out} is finished: nothing to resume")
            return False
        else:  # a fresh run: what an earlier one left here no longer counts
            if self.options.resume:
                self.print(f"there is nothing to resume in {self.options.out}: starting from the beginning")
            self.fresh = True
            self.metrics.hold()  # until `replace`
        distributed.same_start(modules)
        if self.compiling:
            for model in modules.values():
                model.nll = self.compiled(token_nll)
                for block in model.h:  # block by block: they share their graphs
                    block.compile()
        return True

    def compiled(self, function):
        """The function, compiled once where compiling is on; for tensors of any length."""
        if not self.compiling:
            return function
        if function not in self.functions:
            self.functions[function] = torch.compile(function, dynamic=True)
        return self.functions[function]

    def steps(self):
        """The steps still to do, 0..total-1, with a progress bar and a checkpoint every save_every steps."""
        total = self.total
        parameters = sum(p.numel() for p in self.modules["model"].parameters())
        many = f" x {self.world}" if self.world > 1 else ""
        self.print(f"{self.method}: {total} steps on {self.device}{many}, {str(self.dtype)[6:]}, "
                   f"{torch.get_num_threads()} threads, {parameters / 1e6:.2f}M parameters -> {self.options.out}")
        self.bar = tqdm(total=total, initial=self.start, desc=self.method, disable=self.rank > 0 or None,
                        dynamic_ncols=True)
        for step in range(self.start, total):
            yield step
            if self.fresh:
                self.replace()
            self.bar.update()
            keep = self.options.keep_every and (step + 1) % self.options.keep_every == 0
            checkpoint = (step + 1) % self.options.save_every == 0 and step + 1 < total
            if keep or checkpoint:
                self.check({"grad_norm": float(self.norm)}, step + 1)
            if keep:
                self.save(self.path(f"step-{step + 1}"))  # before the checkpoint: resuming there will not make it again
            if checkpoint:
                self.checkpoint(step + 1)
        self.bar.close()

    def replace(self):
        """What an earlier run left in the folder goes when the new one has made its first step, not before: a mistake
        that shows at once costs nothing."""
        self.fresh = False
        if not self.rank:
            for name in ("state.pt", "config.json", "metrics.jsonl"):
                if os.path.exists(self.path(name)):
                    os.remove(self.path(name))
            for folder in ["tensorboard", *glob.glob("step-[0-9]*", root_dir=self.options.out)]:
                shutil.rmtree(self.path(folder), ignore_errors=True)
        self.metrics.release()

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps happens after this one; the last step counts."""
        return (step + 1) % every == 0 or step + 1 == self.total

    def log(self, step: int, metrics: dict):
        """Appends a line to metrics.jsonl: what Metrics.add says.

        Tensors are read here, so call it only when due. Raises UserError as check() does.
        """
        metrics = {name: float(value) for name, value in metrics.items()}
        self.check(metrics, step)
        self.metrics.add(step, time.time() - self.started, metrics)
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix({name.split("/")[-1]: f"{v:.3g}" for name, v in list(metrics.items())[:4]})

    def check(self, metrics: dict[str, float], step: int):
        """Raises UserError when the loss or the gradient is not a finite number (fp16: the scaler sees to those)."""
        for name, value in metrics.items():
            if ("loss" in name or name == "grad_norm" and not self.scaler.is_enabled()) and not math.isfinite(value):
                raise UserError(f"{name} is {value} at step {step}: lower --lr, or look for a bad record in the data")

    # -- checkpoints

    def arguments(self) -> dict:
        """The options that decide what a run computes."""
        others = "resume", "out", "compile", "log_every", "keep_every", "logs"
        return {name: value for name, value in dataclasses.asdict(self.options).items() if name not in others}

    def checkpoint(self, step: int):
        """Everything that the rest of the run depends on, in one file: it is the old one or the new one, never half."""
        if self.rank:
            return
        state = {
            "step": step, "arguments": self.arguments(), "extra": self.extra,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(), "seconds": time.time() - self.started,
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
        self.started = time.time() - state["seconds"]
        self.metrics.cut(self.start)
        self.print(f"resuming {self.options.out} after step {self.start}")

    def save(self, folder: str):
        """Writes the model as a folder of its own. Only a reward model keeps its scalar head."""
        if self.rank:
            return
        info = {"method": self.method, "arguments": dataclasses.asdict(self.options)}
        save_model(folder, self.modules["model"], self.tokenizer, info, head=self.method == "rm")

    def finish(self):
        """Writes the finished folder, then removes the state to resume from."""
        self.save(self.options.out)
        if os.path.exists(self.path("state.pt")) and not self.rank:
            os.remove(self.path("state.pt"))
        self.print(f"wrote {self.options.out} after {time.time() - self.started:.0f} s")
        distributed.wait()
