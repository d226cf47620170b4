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
from nanopost.data import Batch, Example, map_batches
from nanopost.model import GPT


def load_reward(spec: str, tokenizer, owner: str, block_size: int, device):
    """The judge as a function score(prompts, answers) -> (N,).

    answers: Examples as sample_text returns them, or the Batch that generate returned. spec: the folder of a reward
    model (the rest is as for load_reward_model), or file.py:function, whose numbers keep their float64."""
    if spec.partition(":")[0].endswith(".py"):
        function = load_function(spec)

        def score(prompts, answers):
            batched = isinstance(answers, Batch)
            texts = map(tokenizer.decode, answers.responses()) if batched else [answer.text for answer in answers]
            return torch.tensor(call_reward(function, prompts, list(texts)), dtype=torch.float64)
    else:
        model = load_reward_model(spec, tokenizer, owner, block_size, device)

        def score(prompts, answers):
            batched = isinstance(answers, Batch)
            return model.score(answers.ids, answers.lengths) if batched else score_examples(model, answers)

    return score


def load_reward_model(folder: str, tokenizer, owner: str, block_size: int, device) -> GPT:
    """A frozen reward model. Raises UserError unless its vocabulary is that of `owner` (the folder of `tokenizer`) and
    its context holds block_size tokens."""
    model, other = load_model(folder, device, reward=True)
    same_vocabulary(tokenizer, other, owner, folder)
    if model.config.block_size < block_size:
        raise UserError(f"{folder} reads {model.config.block_size} tokens, but {owner} may write {block_size}")
    return freeze(model)


@torch.no_grad()
def score_examples(model: GPT, examples: list[Example], batch_size: int = 64) -> torch.Tensor:
    """The reward model's scores (N,), on the CPU."""
    return map_batches(lambda batch: model.score(batch.ids, batch.lengths), examples, batch_size, model.device).cpu()


def load_function(spec: str):
    """The Python function "file.py:function". Its file may import its neighbours. Raises UserError if there is none, or
    the file is no Python; any other error in the file is let through."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise UserError(f"no file {path or spec}; a function is given as file.py:function")
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module_spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except SystemExit:
        raise UserError(f"{path} ends the program; it must only define {name}") from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path} has no function {name}")
    return getattr(module, name)


def call_reward(function, prompts: list, completions: list[str]) -> list[float]:
    """function(prompts, completions), checked: one finite number per completion. Otherwise raises UserError; an error
    inside the function is let through, to be seen with its place."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        result = function(prompts, completions)
    except SystemExit:
        raise UserError(f"reward function {name} ends the program; it must return numbers") from None
    except TypeError as error:
        if error.__traceback__.tb_next:  # raised inside
            raise
        raise UserError(f"reward function {name}: {error}") from None
    try:
        scores = [float(x) for x in result]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"reward function {name}: it must return numbers: {reason}") from None
    if len(scores) != len(completions) or not all(map(math.isfinite, scores)):
        wanted = f"must return one finite number for each of the {len(completions)} completions"
        raise UserError(f"reward function {name}: {wanted}; it returned {len(scores)}")
    return scores
