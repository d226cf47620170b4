"""GPT-2 in and Hugging Face out: the files are read and written by their library, transformers (the extra [hf]).

The tensors have the same names there as here, after the prefix "transformer.". Three things differ: GPT-2's Conv1D
stores a matrix as (in, out), nn.Linear as (out, in); a reward model's head is called score and has no bias; and the
embedding has no spare rows, which the chat tokens need.
"""

import os
import textwrap

import torch

from nanopost.config import UserError
from nanopost.records import read_json

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # 124M, 355M, 774M and 1.5B parameters
OWNER = "openai-community/"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out)
UNUSED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # masks, and a copy of the embedding
# Fields of config.json that the computation depends on, with the values that agree with model.py.
COMPUTATION = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def import_transformers():
    """The library, silenced. Raises UserError, with the command that installs it, if it is missing."""
    try:
        import huggingface_hub
        import transformers
    except ImportError:
        hint = 'pip install "nanopost[hf]" (in a checkout: pip install -e ".[hf]")'
        raise UserError(f"transformers is not installed; {hint}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # of downloads
    return transformers


def is_pretrained(name: str) -> bool:
    """Whether this is one of GPT-2's names or a folder in Hugging Face's layout, not one that a run here wrote."""
    if not os.path.isdir(name):
        return name.removeprefix(OWNER) in NAMES
    try:
        return "model_type" in read_json(os.path.join(name, "config.json"))
    except (OSError, UserError, TypeError):
        return False


def load(kind: str, name: str, **options):
    """transformers.kind.from_pretrained, from a folder or by GPT-2's name. UserError for whatever goes wrong."""
    loader = getattr(import_transformers(), kind)
    local = os.path.isdir(name)
    if not local and not is_pretrained(name):
        raise UserError(f"no folder {name}, and it is none of {', '.join(NAMES)}")
    source = name if local else OWNER + name.removeprefix(OWNER)
    try:
        return loader.from_pretrained(source, **options)
    except Exception as error:  # a broken file and the network can raise anything
        reason = textwrap.shorten(str(error), 200)
        online = "; go online once, to get it into Hugging Face's cache, or give a local folder"
        hint = "" if local else online
        raise UserError(f"{name} cannot be read: {reason}{hint}") from None


def read_config(name: str):
    """The model's GPT2Config (of transformers). Raises UserError unless model.py computes what it describes."""
    config = load("AutoConfig", name, num_labels=1, trust_remote_code=False)
    n_inner = (None, 4 * getattr(config, "n_embd", 0))
    for field, values in {**COMPUTATION, "n_inner": n_inner}.items():
        if (value := getattr(config, field, values[0])) not in values:
            only = " or ".join(map(repr, values))
            fault = f"{field} is {value!r}; nanopost's model supports only {only}"
            raise UserError(f"{name}/config.json: {fault}")
    return config


def read(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(GPTConfig's fields, the tensors by our names) of a GPT-2, by its name or from a folder.

    GPT2ForSequenceClassification with one label becomes a model with a scalar head. Dropout is 0, not the 0.1 of
    GPT-2's pretraining: with dropout, two log-probabilities of one answer would differ. Nothing is unpickled, and no
    code from the folder is run. Raises UserError for anything that is missing, broken or unknown to model.py.
    """
    config = read_config(name)
    reward = config.architectures == ["GPT2ForSequenceClassification"]
    kind = "GPT2ForSequenceClassification" if reward else "GPT2Model"
    options = dict(config=config, dtype=torch.get_default_dtype(), use_safetensors=True)
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    check_sizes(name, config)
    model, info = load(kind, name, **options)
    for what in ("missing", "unexpected", "mismatched"):
        if keys := [key for key in map(str, info[f"{what}_keys"]) if not key.endswith(UNUSED)]:
            fault = f"{what} {min(keys)}"
            raise UserError(f"{name}: model.safetensors does not fit config.json: {fault}")
    state = {key.removeprefix("transformer."): tensor for key, tensor in model.state_dict().items()}
    state |= {key: tensor.t() for key, tensor in state.items() if key.endswith(CONV1D)}
    if reward:
        state |= {"head.weight": state.pop("score.weight"), "head.bias": torch.zeros(1)}
    positions = config.n_positions // 8 * 8  # GPTConfig wants a multiple of 8
    state["wpe.weight"] = state["wpe.weight"][:positions]
    fields = ("vocab_size", "n_layer", "n_head", "n_embd")
    sizes = {field: getattr(config, field) for field in fields}
    return {**sizes, "block_size": positions, "scalar_head": reward}, state


def check_sizes(name: str, config):
    """Raises UserError if the sizes in a folder's config.json are not those of its embeddings, or are absurd: the
    library would allocate them first."""
    path = os.path.join(name, "model.safetensors")
    if not os.path.isfile(path):  # a name, or several files
        return
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as f:
            shapes = {key: f.get_slice(key).get_shape() for key in f.keys()}
    except Exception as error:  # a broken file can raise anything
        raise UserError(f"{name} cannot be read: model.safetensors: {error}") from None
    sizes = {"wte.weight": [config.vocab_size, config.n_embd], "wpe.weight": [config.n_positions, config.n_embd]}
    for key, shape in sizes.items():
        found = [shape for name, shape in shapes.items() if name.removeprefix("transformer.") == key]
        if found != [shape]:
            fault = f"{'mismatched' if found else 'missing'} {key}"
            raise UserError(f"{name}: model.safetensors does not fit config.json: {fault}")
    if config.n_layer not in range(1, len(shapes) + 1):
        raise UserError(f"{name}/config.json: n_layer is {config.n_layer}, but there are {len(shapes)} tensors")


def add_rows(wte: torch.Tensor, count: int) -> torch.Tensor:
    """wte (V, C) -> (V + count, C): new tokens start at the mean row plus noise with a tenth of the rows' own spread.

    The mean row's logit is the mean of all logits, so its probability is at most 1/V (exp is convex); a random row
    could be the likeliest token of all. The noise makes the tokens differ. It is the same at every call.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, wte.shape[1], generator=generator, dtype=wte.dtype)
    return torch.cat([wte, wte.mean(0) + 0.1 * wte.std(0, correction=0) * noise])


def to_huggingface(model) -> dict[str, torch.Tensor]:
    """A GPT's tensors with Hugging Face's names and shapes, on the CPU; only real tokens have a row.

    Their scalar head w has no bias, so ours, b, moves into the bias of the last LayerNorm, which only the head reads:
    w (h + b w / |w|^2) = w h + b. Raises UserError for a head of zeros, which has no such direction.
    """
    state = {f"transformer.{name}": tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state |= {name: tensor.t().contiguous() for name, tensor in state.items() if name.endswith(CONV1D)}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: model.config.vocab_size]
    if model.head is not None:
        w = state["score.weight"] = state.pop("transformer.head.weight")  # (1, C)
        b = state.pop("transformer.head.bias")  # (1,)
        if not w.any():
            raise UserError("the reward model's head is all zeros: all scores are equal, there is nothing to export")
        state["transformer.ln_f.bias"] = state["transformer.ln_f.bias"] + (b * w / w.square().sum())[0]  # (C,)
    return state
