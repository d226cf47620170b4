"""What every script needs around its loop: device, precision, optimizer, schedule, checkpoints, metrics, progress bar.

Run offers these as services. The loop itself stands in the script, every action one visible line.
"""

import dataclasses
import importlib.util
import inspect
import math
import os
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanopost import distributed
from nanopost.checkpoint import Folder
from nanopost.config import UserError, all_finite, at_least, between, clean
from nanopost.device import best_dtype, find_device
from nanopost.linear import CAPABILITY, ONEDNN
from nanopost.metrics import Metrics
from nanopost.model import token_nll
from nanopost.records import read_json
from nanopost.resume import check_same, damaged, hash_inputs, load_numbers, load_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_FROM = 20_000_000  # parameters


@dataclass
class Options:
    """The options that all training scripts share."""

    out: str = "out/run"  # folder to write
    overwrite: bool = False  # replace the run that is in --out (without effect with --resume)
    resume: bool = False  # continue from the last checkpoint in --out
    seed: int = 0  # seed of the initialisation, the data order and the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # precision of computation: fp32, bf16, fp16 or auto (the best on CUDA, else fp32)
    compile: str = "auto"  # torch.compile the model: on, off, or auto (on CUDA, if there is Triton and it is large)
    log_every: int = 10  # steps between two lines of metrics.jsonl
    save_every: int = 200  # steps between two checkpoints
    keep_every: int = 0  # steps between two copies of the model that are kept, in --out/step-N; 0: none
    logs: str = ""  # tensorboard: also write the metrics in its format, to --out/tensorboard

    def __post_init__(self):
        all_finite(self)
        numbers = [name for name, value in vars(self).items() if type(value) in (int, float)]
        at_least(self, 0, *(name for name in numbers if "score" not in name))  # no other number may be negative
        at_least(self, 1, "log_every", "save_every")
        between(self, 0, 2**63 - 1, "seed")
        if not self.out:
            raise UserError("--out must name a folder")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"--dtype must be auto or one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.compile not in ("auto", "on", "off"):
            raise UserError(f"--compile must be auto, on or off, not {self.compile}")
        if self.logs not in ("", "tensorboard"):
            raise UserError(f"--logs must be tensorboard or nothing, not {self.logs}")

    def keep_apart(self, *names: str):
        """Raises UserError if the run would overwrite a folder that it starts from, or a run whose step-N it is."""
        for name in names:
            folder = getattr(self, name)
            path = os.path.realpath(folder)
            if os.path.isdir(folder) and os.path.realpath(self.out) in (path, os.path.dirname(path)):
                raise UserError(f"--out {self.out} would overwrite --{name} {folder}; give another --out")


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW without the wrappers that keep torch.compile out of its methods: they import the whole compiler,
    which takes two seconds at the start of every run."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(parameters, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
    """AdamW, fused; weight decay on matrices only, not on biases and LayerNorm gains."""
    parameters = [p for p in parameters if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    return AdamW([matrices, vectors], lr=lr, betas=betas, eps=eps, fused=True)


def schedule(step: int, total: int, warmup: int = 0) -> float:
    """The learning rate's factor at step 1..total: linear warm-up to 1, then linear decay, which would reach 0 at step
    total + 1."""
    if step <= warmup:
        return step / (warmup + 1)
    return (total - step + 1) / (total - warmup)


class Run:
    """One training run and its folder. Making it seeds PyTorch, joins the other processes and picks the precision.
    Raises UserError if the folder holds a run and neither --overwrite nor --resume is given."""

    def __init__(self, method: str, options: Options):
        self.method = method
        self.options = options
        device, self.rank, self.world = distributed.start(options.device)
        self.device = find_device(device)
        dtype = best_dtype(self.device) if options.dtype == "auto" else options.dtype
        self.dtype = DTYPES[dtype]
        self.info = {"method": method, "arguments": dataclasses.asdict(options) | {"dtype": dtype}}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.folder = Folder(options.out, writes=self.rank == 0)
        self.replace = options.resume or options.overwrite
        self.folder.take(self.replace)
        if options.logs and importlib.util.find_spec("tensorboard") is None:
            raise UserError('--logs tensorboard needs a package: pip install tensorboard (or "nanopost[logs]")')
        self.metrics = Metrics(options.out, dict(self.info), bool(options.logs), silent=self.rank > 0)
        self.info["inputs"] = hash_inputs(options, without=Options)
        if options.resume and self.folder.finished():
            with damaged(self.folder.config):
                check_same(self.info, read_json(self.folder.config), options.out)
        self.bar = None
        self.started = time.time()
        self.grad_norm = 0.0
        torch.set_float32_matmul_precision("high")  # TF32 where there are tensor cores
        torch.manual_seed(options.seed)

    @staticmethod
    def print(text: str):
        """Above the progress bar; what a model says is made safe for a terminal."""
        tqdm.write(clean(text))

    # -- one optimizer step

    def compile(self, *models):
        """Compiles the blocks and the cross-entropy of these models, if --compile says so."""
        if not self.compiling(models[0]):
            return
        nll = torch.compile(token_nll, dynamic=True)
        for model in models:
            model.nll = nll
            for block in model.h:  # block by block: they share their graphs
                block.compile(dynamic=True)

    def compiling(self, model) -> bool:
        """auto: only where Triton can be found, and for a model so large that the minutes of compiling pay."""
        if self.options.compile != "auto":
            return self.options.compile == "on"
        size = sum(p.numel() for p in model.parameters())
        if self.device.type != "cuda" or size < COMPILE_FROM:
            return False
        triton = importlib.util.find_spec("triton") is not None
        if not triton:
            self.print("not compiled: the package triton is missing")
        return triton

    def autocast(self):
        """Compute in bf16 or fp16 where that is set; weights, optimizer and log-probabilities stay fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def set_lr(self, optimizer, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr

    def backward(self, loss: torch.Tensor):
        self.scaler.scale(loss).backward()

    def optimizer_step(self, optimizer, grad_clip: float) -> torch.Tensor:
        """Clips the gradient's norm (0: no limit), makes the step, clears the gradients. Returns the norm."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        distributed.all_reduce_gradients(parameters)
        self.scaler.unscale_(optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return self.grad_norm

    # -- several processes: each works on its share of a batch, and the results are added up

    shard = staticmethod(distributed.shard)
    all_gather = staticmethod(distributed.all_gather)

    def all_reduce(self, stats: dict) -> dict:
        return distributed.all_reduce(stats, self.device)

    # -- the loop

    def start(self, modules: dict, optimizer, tokenizer, state: dict | None = None, save_head: bool = True):
        """With --resume, restores the last checkpoint. Returns the number of steps already made, or None if the run to
        resume is finished. Call it when all inputs are loaded.

        modules {name: model} are trained; the one called "model" is saved, with its scalar head if save_head. `state`
        is the script's own dict of numbers that change from step to step: checkpointed, and restored in place."""
        self.modules, self.optimizer, self.state = modules, optimizer, {} if state is None else state
        self.save_model = lambda name: self.folder.save(name, modules["model"], tokenizer, self.info, save_head)
        self.folder.take(self.replace)  # again: another run may have made it since
        saved = self.folder.restore() if self.options.resume else None
        self.fresh = saved is None
        if self.options.resume and self.fresh:
            if self.folder.finished():
                self.folder.unlock()
                self.print(f"{self.options.out} is finished: nothing to resume")
                return None
            self.print(f"there is nothing to resume in {self.options.out}: starting from the beginning")
        first = 0 if self.fresh else self.restore(saved)
        distributed.broadcast(modules)
        return first

    def steps(self, first: int, total: int):
        """The steps still to make, first + 1 ... total, with a progress bar."""
        if total < 1:
            raise UserError(f"there is no step to make ({total}); check --steps, --epochs and the data")
        if 0 < first >= total:
            raise UserError(f"{self.folder.state} is damaged: it is of step {first} of {total}; give --overwrite")
        self.total = total
        size = sum(p.numel() for p in self.modules["model"].parameters()) / 1e6
        devices = f"{self.device} x {self.world}" if self.world > 1 else f"{self.device}"
        how = f"{str(self.dtype)[6:]}, {torch.get_num_threads()} threads, {size:.2f}M parameters"
        if self.device.type == "cpu":
            how += f", {CAPABILITY}: matrix products by {'oneDNN' if ONEDNN else 'PyTorch'}"
        self.print(f"{self.method}: {total} steps on {devices}, {how} -> {self.options.out}")
        off = self.rank > 0 or None  # None: tqdm shows the bar only in a terminal
        steps = range(first + 1, total + 1)
        self.bar = tqdm(steps, self.method, total, initial=first, disable=off, dynamic_ncols=True)
        return self.bar

    def due(self, step: int, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last one."""
        return step % every == 0 or step == self.total

    def log(self, step: int, metrics: dict):
        """Adds a line to metrics.jsonl. Tensors are read here, so call it only when due. Raises UserError for a loss or
        a gradient that is not finite."""
        metrics = {name: float(value) for name, value in metrics.items()}
        self.check_finite(metrics, step)
        self.metrics.add(step, time.time() - self.started, metrics)
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix({name.split("/")[-1]: f"{v:.3g}" for name, v in list(metrics.items())[:4]})

    def save(self, step: int):
        """Writes what is due after this step: the metrics, a checkpoint, a copy of the model that is kept.

        The first call deletes an earlier run's files: by then the first step has succeeded, so an immediate failure
        costs nothing. A copy comes before the checkpoint: a run resumed from there will not make it again."""
        keep = self.options.keep_every and step % self.options.keep_every == 0
        checkpoint = step % self.options.save_every == 0 and step < self.total
        if self.fresh or keep or checkpoint:
            self.check_finite({"grad_norm": float(self.grad_norm)}, step)
        if self.fresh:
            self.folder.replace_earlier_run(self.replace)
            self.fresh = False
        self.metrics.flush()
        if keep:
            self.save_model(f"step-{step}")
        if checkpoint:
            self.folder.checkpoint(self.everything(step))

    def finish(self):
        """Writes the finished model, then removes the state to resume from."""
        self.save_model("")
        self.folder.remove("state.pt", "state.pt.tmp")
        self.folder.unlock()
        self.print(f"wrote {self.options.out} after {time.time() - self.started:.0f} s")
        distributed.barrier()

    # -- inside

    def check_finite(self, metrics: dict[str, float], step: int):
        for name, value in metrics.items():
            # In fp16 the scaler skips such a step and lowers its scale; but not for ever.
            overflow = name == "grad_norm" and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
            if ("loss" in name or name == "grad_norm") and not overflow and not math.isfinite(value):
                raise UserError(f"{name} is {value} at step {step}: lower --lr, or look for a bad record in the data")

    def everything(self, step: int) -> dict:
        """All that the rest of the run depends on, for a checkpoint."""
        return {
            "step": step,
            **self.info,
            "state": self.state,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "seconds": time.time() - self.started,
        }

    def restore(self, saved: dict) -> int:
        """Takes up a checkpoint; returns its step. Raises UserError if it is of another run, or does not fit."""
        with damaged(self.folder.state):
            check_same(self.info, saved, self.options.out)
            for name, module in self.modules.items():
                module.load_state_dict(saved["modules"][name])
            load_numbers(self.state, saved["state"])
            load_optimizer(self.optimizer, saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            torch.set_rng_state(saved["rng"])
            if saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
            self.started = time.time() - saved["seconds"]
            if type(saved["step"]) is not int or saved["step"] < 1 or not math.isfinite(self.started):
                raise ValueError
        self.metrics.truncate(saved["step"])
        self.print(f"resuming {self.options.out} after step {saved['step']}")
        return saved["step"]
