"""What judges answers: a reward model, or a Python function given as "file.py:function".

Such a function has the signature function(prompts, completions) -> list of floats, one per completion: prompts as they
stand in the file of prompts (strings or conversations), completions as text without the end token.
"""

import importlib.util
import math
import os
import sys

import torch

from nanopost.checkpoint import freeze, load_model, same_vocabulary
from nanopost.config import UserError
from nanopost.data import Example, collate
from nanopost.model import GPT


def load_reward_model(folder: str, tokenizer, owner: str, block_size: int, device) -> GPT:
    """A reward model, frozen, for texts of a policy. UserError unless its vocabulary is that of `owner` (the folder
    that `tokenizer` is from) and its context holds block_size tokens."""
    model, other = load_model(folder, device, reward=True)
    same_vocabulary(tokenizer, other, owner, folder)
    if model.config.block_size < block_size:
        raise UserError(f"{folder} reads {model.config.block_size} tokens, but {owner} may write {block_size}")
    return freeze(model)


def load_reward(spec: str, tokenizer, owner: str, block_size: int, device):
    """The reward as a function score(prompts, samples) -> (R,) of the Samples that generate() returns.

    spec: file.py:function, or the folder of a reward model; the rest is as for load_reward_model.
    """
    if ".py:" in spec:
        function = load_function(spec)

        def score(prompts, samples):
            texts = [tokenizer.decode(ids) for ids in samples.responses()]
            return torch.tensor(call_reward(function, prompts, texts), device=device)
    else:
        model = load_reward_model(spec, tokenizer, owner, block_size, device)

        def score(prompts, samples):
            return model.score(samples.ids, samples.lengths)
    return score


def load_judge(spec: str, tokenizer, owner: str, block_size: int, device):
    """As load_reward, for samples as sample_text returns them: score(prompts, samples) -> (N,), on the CPU. What a
    function returns keeps its precision, so that 0.7 is not below a threshold of 0.7."""
    if ".py:" in spec:
        function = load_function(spec)
        return lambda prompts, samples: torch.tensor(call_reward(function, prompts, [s["text"] for s in samples]),
                                                     dtype=torch.float64)
    model = load_reward_model(spec, tokenizer, owner, block_size, device)
    return lambda prompts, samples: score_samples(model, samples)


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


@torch.no_grad()
def score_samples(model: GPT, samples: list[dict], batch_size: int = 64) -> torch.Tensor:
    """The reward model's scores (N,), on the CPU, of samples as sample_text returns them."""
    rows = [Example(s["prompt_ids"] + s["ids"], [False] * (len(s["prompt_ids"]) + len(s["ids"]))) for s in samples]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    scores = torch.zeros(len(rows), dtype=model.wte.weight.dtype)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = collate([rows[i] for i in part], model.device)
        scores[part] = model.score(batch.ids, batch.lengths).cpu()
    return scores
