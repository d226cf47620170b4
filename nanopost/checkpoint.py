"""What a run writes: one self-contained folder.

A finished one holds config.json (model, method, arguments), model.pt (tensors only), vocab.tiktoken and metrics.jsonl;
an unfinished one holds state.pt, to resume from; step-N are kept copies of the model. Every file but the growing
metrics.jsonl is written under a temporary name, flushed, then renamed, and config.json comes last: a folder that has
one is complete. Loading runs no code: only tensors and plain values are read.
"""

import contextlib
import dataclasses
import glob
import json
import os
import shutil

import torch

from nanopost.config import UserError
from nanopost.huggingface import is_pretrained, read_config
from nanopost.model import GPT, GPTConfig
from nanopost.tokenizer import CHAT_TOKENS, Tokenizer, load_tokenizer


@contextlib.contextmanager
def atomic(path: str, mode: str = "w"):
    """Opens a file that appears under its name only when it is complete and on the disk."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


class Folder:
    """The folder of a run. Only the first of several processes writes."""

    def __init__(self, path: str, writes: bool = True):
        self.path = path
        self.writes = writes
        self.state = os.path.join(path, "state.pt")

    def finished(self) -> bool:
        return os.path.exists(os.path.join(self.path, "config.json"))

    def refuse_earlier_run(self):
        """Raises UserError if the folder holds a run, finished or not."""
        if self.finished():
            raise UserError(f"{self.path} holds a finished run; give --overwrite to replace it, or another --out")
        if any(os.path.exists(os.path.join(self.path, name)) for name in ("state.pt", "metrics.jsonl")):
            raise UserError(f"{self.path} holds an unfinished run; give --resume to continue it, or --overwrite")

    def replace_earlier_run(self):
        """Makes the folder; deletes an earlier run's files in it except the weights, which are replaced at the end."""
        os.makedirs(self.path, exist_ok=True)
        self.remove("state.pt", "config.json", "metrics.jsonl")
        folders = ["tensorboard", *glob.glob("step-[0-9]*", root_dir=self.path)]
        for folder in folders if self.writes else ():
            shutil.rmtree(os.path.join(self.path, folder), ignore_errors=True)

    def restore(self) -> dict | None:
        """The last checkpoint, or None. Raises UserError if it cannot be read."""
        return load_file(self.state) if os.path.exists(self.state) else None

    def checkpoint(self, state: dict):
        """Everything that the rest of the run depends on, in one file: it is the old one or the new one, never half."""
        if self.writes:
            with atomic(self.state, "wb") as f:
                torch.save(state, f)

    def remove(self, *names: str):
        """Deletes files that are there."""
        for name in names if self.writes else ():
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.path, name))

    def save(self, name: str, model: GPT, tokenizer: Tokenizer, info: dict, head: bool):
        """save_model, into a folder inside this one, or ("") into this one."""
        if self.writes:
            save_model(os.path.join(self.path, name), model, tokenizer, info, head)


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
        raise UserError(f"no folder {folder}")
    try:
        with open(os.path.join(folder, "config.json")) as f:
            config = GPTConfig(**json.load(f)["model"])
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished model (no config.json); --resume its training") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json does not describe a model: {error}") from None
    tokenizer = load_tokenizer(os.path.join(folder, "vocab.tiktoken"))
    model = GPT(config)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: the vocabulary has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    path = os.path.join(folder, "model.pt")
    tensors = load_file(path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if not isinstance(tensors, dict) or {n: getattr(t, "shape", None) for n, t in tensors.items()} != shapes:
        raise UserError(f"{path} does not fit the model that config.json describes")
    model.load_state_dict(tensors)
    return model, tokenizer


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
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt file can raise anything
        raise UserError(f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def same_vocabulary(tokenizer: Tokenizer, other: Tokenizer, first: str, second: str):
    """Raises UserError unless both tokenizers, of the folders `first` and `second`, are the same."""
    if tokenizer != other:
        sizes = f"{tokenizer.vocab_size} and {other.vocab_size} tokens"
        raise UserError(f"{first} and {second} have different vocabularies ({sizes}); both must come from the same one")


def freeze(model: GPT) -> GPT:
    """For reference and reward models: no gradients, and no dropout."""
    return model.requires_grad_(False).eval()
