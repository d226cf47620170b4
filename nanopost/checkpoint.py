"""What a run writes: one self-contained folder.

A finished one holds config.json (model, method, arguments), model.pt (tensors only), vocab.tiktoken and metrics.jsonl;
an unfinished one holds state.pt, to resume from; step-N are kept copies of the model. Every file but the growing
metrics.jsonl is written under a temporary name, flushed, then renamed, and config.json comes last: a folder that has
one is complete. Loading runs no code: only tensors and plain values are read.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import warnings
import weakref
import zipfile

import torch
from torch.overrides import TorchFunctionMode

from nanopost.config import UserError
from nanopost.files import atomic, remove, remove_link
from nanopost.huggingface import is_pretrained, read_config
from nanopost.model import GPT, GPTConfig
from nanopost.records import read_json
from nanopost.tokenizer import CHAT_TOKENS, Tokenizer, load_tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCKS = {}  # {folder: what releases it}, of this process


class Folder:
    """The folder of a run. Only the first of several processes writes."""

    def __init__(self, path: str, writes: bool = True):
        self.path = path
        self.writes = writes
        self.state = os.path.join(path, "state.pt")
        self.config = os.path.join(path, "config.json")

    def lock(self):
        """Keeps other processes from writing to the folder, if there is one, until unlock(), or until this process
        ends, however it ends. Raises UserError if another one has it."""
        self.unlock()  # of an earlier run in this process
        if self.writes and fcntl and os.path.isdir(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
            LOCKS[os.path.realpath(self.path)] = weakref.finalize(self, os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.unlock()
                raise UserError(f"another run is writing to {self.path}; wait for it, or give another --out") from None
            except OSError:
                pass  # some network file systems have no locks

    def unlock(self):
        LOCKS.pop(os.path.realpath(self.path), lambda: None)()

    def finished(self) -> bool:
        return os.path.exists(self.config)

    def take(self, replace: bool):
        """lock(). Unless `replace`, raises UserError if the folder holds a run, finished or not."""
        self.lock()
        if not replace and self.finished():
            raise UserError(f"{self.path} holds a finished run; give --overwrite to replace it, or another --out")
        if not replace and any(os.path.exists(os.path.join(self.path, name)) for name in ("state.pt", "metrics.jsonl")):
            raise UserError(f"{self.path} holds an unfinished run; give --resume to continue it, or --overwrite")

    def replace_earlier_run(self, replace: bool):
        """Makes and takes the folder; deletes an earlier run's files in it except the weights, which are replaced at
        the end."""
        os.makedirs(self.path, exist_ok=True)
        self.take(replace)
        self.remove("state.pt", "config.json", "metrics.jsonl")
        for name in os.listdir(self.path) if self.writes else ():
            path = os.path.join(self.path, name)
            if re.fullmatch("step-[1-9][0-9]*", name) and os.path.isdir(path):
                remove_link(path)
                remove(os.path.join(path, "config.json"))  # first: without it, the rest is no model
                shutil.rmtree(path, ignore_errors=True)
            elif name == "tensorboard":
                shutil.rmtree(path, ignore_errors=True)

    def restore(self) -> dict | None:
        """The last checkpoint, or None. Raises UserError if it cannot be read."""
        if not os.path.exists(self.state):
            return None
        saved = load_file(self.state)
        if not isinstance(saved, dict):
            raise UserError(f"{self.state} is no checkpoint; give --overwrite to start again")
        return saved

    def checkpoint(self, state: dict):
        """Everything that the rest of the run depends on, in one file: it is the old one or the new one, never half."""
        if self.writes:
            with atomic(self.state, "wb") as f:
                torch.save(state, f)

    def remove(self, *names: str):
        """Deletes files that are there."""
        for name in names if self.writes else ():
            remove(os.path.join(self.path, name))

    def save(self, name: str, model: GPT, tokenizer: Tokenizer, info: dict, head: bool):
        """save_model, into a folder inside this one, or ("") into this one."""
        path = os.path.join(self.path, name)
        if self.writes:
            if name:
                remove_link(path)
            save_model(path, model, tokenizer, info, head)


def save_model(folder: str, model: GPT, tokenizer: Tokenizer, info: dict, head: bool = True):
    """Writes weights, vocabulary and, last, config.json = info plus the model's configuration.

    head=False leaves the scalar head out: PPO's policy has one for its values, but what PPO makes is a language model.
    """
    tensors = {name: x.detach().cpu() for name, x in model.state_dict().items() if head or not name.startswith("head.")}
    config = dataclasses.replace(model.config, scalar_head=model.config.scalar_head and head)
    config_path = os.path.join(folder, "config.json")
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(config_path):
        os.remove(config_path)
    with atomic(os.path.join(folder, "vocab.tiktoken")) as f:
        tokenizer.write(f)
    with atomic(os.path.join(folder, "model.pt"), "wb") as f:
        torch.save(tensors, f)
    with atomic(config_path) as f:
        json.dump({**info, "model": dataclasses.asdict(config)}, f, indent=1)


def load_model(name: str, device="cpu", reward: bool | None = False) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a finished run, or a GPT-2: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in
    Hugging Face's layout. reward=False asks for a language model, True for a reward model, None for either.

    Dropout is off (eval mode): with it, two log-probabilities of the same answer would not be comparable. Raises
    UserError if the folder is missing, unfinished, of the other kind, or if its parts do not fit together."""
    model, tokenizer = load_pretrained(name) if is_pretrained(name) else load_run(name)
    if reward not in (None, model.config.scalar_head):
        kinds = ("a language model", "a reward model")
        raise UserError(f"{name} holds {kinds[not reward]}; here {kinds[reward]} is needed")
    return model.to(device).eval(), tokenizer


def load_run(folder: str) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer that save_model wrote."""
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder or repr(folder)}")
    config = read_sizes(folder)
    tokenizer = load_tokenizer(os.path.join(folder, "vocab.tiktoken"))
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: the vocabulary has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    path = os.path.join(folder, "model.pt")
    tensors = load_file(path)
    if not fits(tensors, config):
        raise UserError(f"{path} does not fit the model that config.json describes")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{path} holds weights that are not finite numbers; train it again")
    model = GPT(config)
    model.load_state_dict(tensors)
    return model, tokenizer


def read_sizes(folder: str) -> GPTConfig:
    """The model's sizes in config.json. Raises UserError if there are none, or they are no sizes."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise UserError(f"{folder} holds no finished model (no config.json); --resume its training")
    try:
        sizes = read_json(path)["model"]
        for name, value in sizes.items():
            kind = type(getattr(GPTConfig, name))
            if type(value) is not kind and name != "dropout":
                raise TypeError(f"{name} must be of type {kind.__name__}")
        return GPTConfig(**sizes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe a model: {error}") from None


def fits(tensors, config: GPTConfig) -> bool:
    """Whether these are the tensors of such a model. It is not allocated to find out: its sizes could be absurd."""
    if not isinstance(tensors, dict) or config.n_layer > len(tensors):
        return False
    try:
        shapes = shapes_of(dataclasses.astuple(config))
    except (RuntimeError, TypeError, OverflowError):  # numbers beyond 64 bits
        return False
    return {name: getattr(tensor, "shape", None) for name, tensor in tensors.items()} == shapes


class WithoutDrawing(TorchFunctionMode):
    """No normal numbers are drawn. On "meta" the first ones cost two seconds: PyTorch imports its compiler for them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if getattr(function, "__name__", "") == "normal_" else function(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=8)  # the kept copies of a run all have the same
def shapes_of(sizes: tuple) -> dict[str, torch.Size]:
    """The shapes of the tensors of a model with these sizes, the fields of GPTConfig."""
    with torch.device("meta"), WithoutDrawing():
        return {name: tensor.shape for name, tensor in GPT(GPTConfig(*sizes)).state_dict().items()}


def load_pretrained(name: str) -> tuple[GPT, Tokenizer]:
    """A GPT-2 and its tokenizer: the folder's vocab.tiktoken (`nanopost export` writes one), else GPT-2's own.

    A model without the five chat tokens gets them. Raises UserError if model and vocabulary do not fit together.
    """
    tokens = read_config(name).vocab_size
    vocabulary = os.path.join(name, "vocab.tiktoken")
    tokenizer = load_tokenizer(vocabulary if os.path.exists(vocabulary) else "gpt2")
    new_tokens = tokenizer.vocab_size - tokens
    if new_tokens not in (0, len(CHAT_TOKENS)):
        fitting = f"{tokenizer.vocab_size - len(CHAT_TOKENS)}, or {tokenizer.vocab_size} with the chat tokens"
        raise UserError(f"{name}: the model has {tokens} tokens; its vocabulary needs {fitting}")
    return GPT.from_pretrained(name, new_tokens), tokenizer


def load_file(path: str):
    """Tensors and plain values; nothing else is ever unpickled. Raises UserError if it cannot be read."""
    try:
        if not os.path.isfile(path):
            raise UserError("there is no such file")
        with zipfile.ZipFile(path) as archive:  # torch.load itself compares no checksums
            odd = any(part.compress_type or part.external_attr for part in archive.infolist())  # torch.save has neither
            if odd or archive.testzip():
                raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensors that no model of ours has
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, MemoryError, PermissionError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "there is not enough memory"
    except Exception:  # a corrupt file can raise anything
        reason = "it is damaged, or holds more than tensors and numbers; nothing of it was run"
    raise UserError(f"{path} cannot be read: {reason}")


def same_vocabulary(tokenizer: Tokenizer, other: Tokenizer, first: str, second: str):
    """Raises UserError unless both tokenizers, of the folders `first` and `second`, are the same."""
    if tokenizer != other:
        sizes = f"{tokenizer.vocab_size} and {other.vocab_size} tokens"
        raise UserError(f"{first} and {second} have different vocabularies ({sizes}); both must come from the same one")


def freeze(model: GPT) -> GPT:
    """For reference and reward models: no gradients, and no dropout."""
    return model.requires_grad_(False).eval()
