"""GPT-2's weights in Hugging Face's layout, in and out: config.json and model.safetensors.

The names of the tensors there are the ones here, usually behind "transformer.". Three things differ: GPT-2's Conv1D
keeps a matrix as (in, out), nn.Linear as (out, in); a reward model's head is called score and has no bias; and the
embedding has no rows to spare, while the chat tokens need some.
"""

import dataclasses
import glob
import importlib
import json
import os

import torch

from nanopost.config import UserError
from nanopost.model import GPT, GPTConfig
from nanopost.tokenizer import CHAT_TOKENS, Tokenizer, load_tokenizer

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # 124M, 355M, 774M and 1.5B parameters
OWNER = "openai-community/"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out)
UNUSED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks, and the embedding's matrix once more
# Fields of config.json that change what is computed, with the values that mean what model.py does; GPT-2's own first.
COMPUTATION = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def extra(module: str):
    """An optional package's module. UserError with the way to install it if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module.split('.')[0]} is not installed; pip install \"nanopost[hf]\" "
                        "(in a checkout: pip install -e \".[hf]\")") from None


# --------------------------------------------------------------------------------------------------------------- in


def is_pretrained(name: str) -> bool:
    """Whether it is one of GPT-2's names or a folder in Hugging Face's layout (not one that a run here wrote)."""
    if not os.path.isdir(name):
        return name.removeprefix(OWNER) in NAMES
    try:
        with open(os.path.join(name, "config.json"), encoding="utf-8") as f:
            return "model_type" in json.load(f)
    except (OSError, ValueError, TypeError):
        return False


def find_folder(name: str) -> str:
    """`name` if it is a folder; for one of GPT-2's names the folder of its download, in Hugging Face's cache."""
    if os.path.isdir(name):
        return name
    if not is_pretrained(name):
        raise UserError(f"no folder {name}, and it is none of {', '.join(NAMES)}")
    extra("safetensors.torch")  # without it there is no use in a download
    hub, repository = extra("huggingface_hub"), OWNER + name.removeprefix(OWNER)
    try:
        paths = [hub.hf_hub_download(repository, file) for file in ("config.json", "model.safetensors")]
    except Exception as error:  # whatever the network layer raises
        raise UserError(f"{repository} is neither in Hugging Face's cache nor could it be downloaded "
                        f"({type(error).__name__}); go online once or give a local folder") from None
    return os.path.dirname(paths[0])


def read_config(folder: str) -> GPTConfig:
    """The sizes of the model in the folder. UserError unless model.py computes exactly what its config.json describes.

    Dropout is 0, not the 0.1 of GPT-2's own pretraining: with it, two log-probabilities of an answer would differ.
    """
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: model_type is {kind!r}; only gpt2 can be read")
    for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
        if type(config.get(name)) is not int:
            raise UserError(f"{path}: {name} must be a whole number, not {config.get(name)!r}")
    for name, values in {**COMPUTATION, "n_inner": (None, 4 * config["n_embd"])}.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {config[name]!r}; nanopost's model computes only with "
                            + " or ".join(map(repr, values)))
    try:  # positions beyond a multiple of 8 are left out: rows of a batch are padded to one
        return GPTConfig(config["vocab_size"], config["n_positions"] // 8 * 8, config["n_layer"], config["n_head"],
                         config["n_embd"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_tensors(folder: str) -> dict[str, torch.Tensor]:
    """Everything in model.safetensors, or in its parts model-00001-of-00002.safetensors ..., but UNUSED."""
    load_file, path = extra("safetensors.torch").load_file, os.path.join(folder, "model.safetensors")
    parts = sorted(glob.glob(os.path.join(glob.escape(folder), "model-*-of-*.safetensors")))
    paths = [path] if os.path.exists(path) else parts
    if not paths:
        raise UserError(f"{folder} has no model.safetensors")
    tensors = {}
    for path in paths:
        try:
            tensors |= load_file(path)
        except Exception as error:  # a broken file, whatever is wrong with it
            raise UserError(f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    return {name.removeprefix("transformer."): t for name, t in tensors.items() if not name.endswith(UNUSED)}


def add_rows(wte: torch.Tensor, count: int) -> torch.Tensor:
    """wte (V, C) -> (V + count, C): rows for new tokens, the mean row plus a tenth of the rows' own spread as noise.

    The mean row gets the mean of all logits, so a new token starts with at most 1/V of the probability (exp is convex)
    and what the model knew is left as it was; a random row could start as the likeliest token of all. The noise, from a
    generator of its own and so always the same, makes the new tokens different from each other.
    """
    noise = torch.randn(count, wte.shape[1], generator=torch.Generator().manual_seed(0), dtype=wte.dtype)
    return torch.cat([wte, wte.mean(0) + 0.1 * wte.std(0, correction=0) * noise])


def from_pretrained(name: str, new_tokens: int = 0) -> GPT:
    """GPT.from_pretrained: a GPT-2 by its name or from a folder, with `new_tokens` more tokens than it has there.

    GPT2ForSequenceClassification with one label becomes a model with a scalar head. Raises UserError, with the folder,
    for anything that is missing, broken, of another shape or not known to model.py.
    """
    folder = find_folder(name)
    config, tensors = read_config(folder), read_tensors(folder)
    vocab_size, reward = config.vocab_size, "score.weight" in tensors
    model = GPT(dataclasses.replace(config, vocab_size=vocab_size + new_tokens, scalar_head=reward))
    expected = {}  # name there -> (name here, shape there)
    for own, tensor in model.state_dict().items():
        shape = tuple(tensor.shape[::-1] if own.endswith(CONV1D) else tensor.shape)
        expected[own.replace("head.weight", "score.weight")] = own, shape
    expected.pop("head.bias", None)
    expected["wte.weight"] = "wte.weight", (vocab_size, config.n_embd)
    if different := sorted(expected.keys() ^ tensors.keys()):
        what = "lacks the tensor" if different[0] in expected else "has an unknown tensor"
        raise UserError(f"{folder}: model.safetensors {what} {different[0]}")
    state = {"head.bias": torch.zeros(1)} if reward else {}
    for there, (own, shape) in expected.items():
        tensor = tensors[there].to(model.wte.weight.dtype)
        if there == "wpe.weight" and tensor.dim() == 2:
            tensor = tensor[: len(tensor) // 8 * 8]
        if tensor.shape != shape:
            raise UserError(f"{folder}: {there} has shape {tuple(tensor.shape)}; config.json says {shape}")
        state[own] = tensor.t() if own.endswith(CONV1D) else tensor
    state["wte.weight"] = add_rows(state["wte.weight"], model.config.rows - vocab_size)
    model.load_state_dict(state)
    return model


def load_pretrained(name: str) -> tuple[GPT, Tokenizer]:
    """A GPT-2 and its tokenizer: vocab.tiktoken of the folder (nanopost.export leaves one there), else GPT-2's own.

    A model that does not know the five chat tokens yet gets them. UserError if model and vocabulary do not fit.
    """
    folder = find_folder(name)
    vocabulary = os.path.join(folder, "vocab.tiktoken")
    vocabulary = vocabulary if os.path.exists(vocabulary) else "gpt2"
    config, tokenizer = read_config(folder), load_tokenizer(vocabulary)
    new_tokens = tokenizer.vocab_size - config.vocab_size
    if new_tokens not in (0, len(CHAT_TOKENS)):
        raise UserError(f"{folder} has {config.vocab_size} tokens, but the vocabulary {vocabulary} "
                        f"{tokenizer.vocab_size - len(CHAT_TOKENS)} and {len(CHAT_TOKENS)} chat tokens")
    return from_pretrained(folder, new_tokens), tokenizer


# -------------------------------------------------------------------------------------------------------------- out


def to_huggingface(model: GPT) -> dict[str, torch.Tensor]:
    """The model's tensors in Hugging Face's names and shapes, on the CPU; only real tokens have a row.

    Their scalar head has no bias, so ours, b, goes into the bias of the last LayerNorm, which nothing but the head w
    reads: w (h + b w / |w|^2) = w h + b. Raises UserError for a head of zeros, which has no such direction.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state["wte.weight"] = state["wte.weight"][: model.config.vocab_size]
    tensors = {f"transformer.{name}": (t.t() if name.endswith(CONV1D) else t).contiguous()
               for name, t in state.items() if not name.startswith("head.")}
    if model.head is not None:
        w, b = state["head.weight"], state["head.bias"]  # (1, C), (1,)
        if not w.any():
            raise UserError("the reward model's head is all zeros: it judges nothing, so there is nothing to export")
        tensors["score.weight"] = w
        tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"] + (b * w / w.square().sum())[0]  # (C,)
    return tensors
