"""What --resume checks before it goes on: that it is the same run, and that what the checkpoint holds fits."""

import ast
import contextlib
import hashlib
import math
import os
import re

import torch

from nanopost.config import UserError

MAY_CHANGE = {"resume", "overwrite", "out", "compile", "log_every", "save_every", "keep_every", "logs"}  # options
MODEL = {"config.json", "model.pt", "vocab.tiktoken"}  # and *.safetensors: the files of a folder that make a model


def fingerprint(path: str) -> str:
    """A hash of a file, or of the files in a folder that make a model."""
    paths = [path]
    if os.path.isdir(path):
        names = [name for name in sorted(os.listdir(path)) if name in MODEL or name.endswith(".safetensors")]
        paths = [os.path.join(path, name) for name in names]
    digest = hashlib.sha256()
    for path in filter(os.path.isfile, paths):
        with open(path, "rb") as f:
            while part := f.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def meaning(path) -> str:
    """What a Python file does: its source without layout, comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def hash_inputs(options, without) -> dict[str, str]:
    """{option: hash} of the files and folders that options name, but for the options of the class `without`. Of
    file.py:function, it is the file's."""
    texts = {name: x for name, x in vars(options).items() if isinstance(x, str) and not hasattr(without, name)}
    paths = {name: re.sub(r"\.py:\w*$", ".py", text) for name, text in texts.items()}
    return {name: fingerprint(path) for name, path in paths.items() if os.path.exists(path)}


@contextlib.contextmanager
def damaged(path: str):
    """Whatever goes wrong with what this file holds becomes a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        fault = f"it does not fit this run ({type(error).__name__})"
        raise UserError(f"{path} is damaged: {fault}; give --overwrite to start again") from None


def check_same(info: dict, saved: dict, out: str):
    """Raises UserError if the run in `out`, whose info was saved, is of another script, options or inputs."""
    if saved["method"] != info["method"]:
        raise UserError(f"--resume: {out} is a run of train_{saved['method']}.py")
    for name, value in info["arguments"].items():
        before = saved["arguments"].get(name)
        if before != value and name not in MAY_CHANGE:
            what = f"{out} was started with {name} = {before}, not {value}"
            raise UserError(f"--resume: {what}; give the same options, or --overwrite to start again")
    for name, value in saved.get("inputs", {}).items():
        if value != info["inputs"].get(name):
            what = f"what {name} = {info['arguments'].get(name)} holds has changed since {out} was started"
            raise UserError(f"--resume: {what}; bring it back, or give --overwrite to start again")


def load_numbers(state: dict, saved: dict):
    """Puts the saved numbers into the state. Raises ValueError if they are others, or not finite."""
    if saved.keys() != state.keys() or not all(map(math.isfinite, saved.values())):
        raise ValueError
    state.update(saved)


def load_optimizer(optimizer, saved: dict):
    """optimizer.load_state_dict, of what it knows about each parameter: the rest is in the options.

    Raises ValueError for other shapes, with which the fused kernel would write outside its memory."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: dict(known) for i, known in saved["state"].items()}
    for i, known in state.items():
        if isinstance(optimizer, torch.optim.AdamW) and not {"step", "exp_avg", "exp_avg_sq"} <= known.keys():
            raise ValueError
        for name, x in known.items():
            if isinstance(x, torch.Tensor):
                if x.shape not in (torch.Size(), parameters[i].shape) or (name != "step") != (x.dim() > 0):
                    raise ValueError
                known[name] = x.contiguous()  # nor does the kernel look at strides
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
