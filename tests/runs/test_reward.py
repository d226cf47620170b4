"""What judges answers: Python functions and reward models, through the same load_reward()."""

import functools
import math
import sys

import pytest
import torch

from conftest import one_line
from nanopost.checkpoint import load_model
from nanopost.config import UserError
from nanopost.reward import call_reward, load_function, load_reward, load_reward_model, score_examples
from nanopost.sampling import generate, sample_text

FUNCTIONS = """
from neighbour import CONSTANT

def constant(prompts, completions):
    return [CONSTANT for _ in completions]

def length(prompts, completions):
    return [len(p) + len(c) / 10 for p, c in zip(prompts, completions, strict=True)]

number = 3
"""

# --------------------------------------------------------------------------------------------------------- functions


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour.py").write_text("CONSTANT = 7")
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    yield str(tmp_path / "functions.py")
    sys.modules.pop("neighbour", None)


def test_a_function_is_loaded_from_its_file_which_may_import_its_neighbours(functions):
    assert load_function(f"{functions}:constant")([], ["a", "b"]) == [7, 7]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{}:nothing", "has no function nothing"),
        ("{}:number", "has no function number"),
        ("{}:", "has no function"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("{}", "file.py:function"),
        ("README:f", "no file README"),
        (":f", "no file"),
    ],
)
def test_a_function_that_is_not_there_is_a_user_error(functions, spec, message):
    with pytest.raises(UserError, match=message) as error:
        load_function(spec.format(functions))
    one_line(error)


def test_rewards_are_floats_in_order():
    rewards = call_reward(lambda prompts, texts: [len(t) for t in texts], ["p", "q"], ["abc", ""])
    assert rewards == [3.0, 0.0] and all(type(r) is float for r in rewards)
    assert call_reward(lambda prompts, texts: torch.tensor([1.0, 2.0]), ["p", "q"], ["a", "b"]) == [1.0, 2.0]


@pytest.mark.parametrize(
    "result", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [math.inf, 1.0], ["a", "b"], None, [1.0, None], 5.0], ids=str
)
def test_anything_but_one_finite_number_per_completion_is_a_user_error(result):
    def broken(prompts, completions):
        return result

    with pytest.raises(UserError, match="reward function broken: ") as error:
        call_reward(broken, ["p", "q"], ["a", "b"])
    one_line(error)


def number_of_digits(prompts, completions):
    return [10**400 for _ in completions]


def one_argument(completions):
    return [0.0 for _ in completions]


def ends(prompts, completions):
    sys.exit(0)


@pytest.mark.parametrize(
    "function, message",
    [
        (number_of_digits, "number_of_digits: it must return numbers: int too large"),
        (one_argument, "one_argument: .*takes 1 positional argument but 2 were given"),
        (ends, "ends ends the program; it must return numbers"),
        (lambda prompts, completions: torch.zeros(2, 2), "<lambda>: it must return numbers"),
        (functools.partial(number_of_digits), "partial: it must return numbers"),
    ],
    ids=["digits", "one argument", "exit", "matrix", "partial"],
)
def test_what_a_function_does_instead_of_returning_numbers_is_told_in_one_line(function, message):
    with pytest.raises(UserError, match=f"reward function {message}") as error:
        call_reward(function, ["p", "q"], ["a", "b"])
    one_line(error)


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, RuntimeError])
def test_an_error_inside_the_function_keeps_its_place(error):
    def broken(prompts, completions):
        raise error("mine")

    with pytest.raises(error, match="mine") as raised:
        call_reward(broken, ["p"], ["a"])
    assert not isinstance(raised.value, UserError) and raised.traceback[-1].name == "broken"


def test_a_callable_without_a_name_is_a_function_too():
    assert call_reward(functools.partial(lambda x, prompts, texts: [x], 2), ["p"], ["a"]) == [2.0]


@pytest.mark.parametrize(
    "text, message",
    [("import sys; sys.exit(0)", "ends the program"), ("\ndef f(:\n", "py:2: ")],
    ids=["exit", "syntax"],
)
def test_a_file_that_cannot_be_loaded_is_told_in_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_function(f"{tmp_path / 'bad.py'}:f")
    assert str(tmp_path / "bad.py") in one_line(error)


# ------------------------------------------------------------------------------------------------------ load_reward()


@pytest.fixture
def sampled(workshop, tokenizer):
    """(prompts, the same answers as Examples and as a Batch)"""
    model, prompts = load_model(workshop.path("sft"))[0], ["Say cat!", "Say moon!", "Say hi!", "And the sun?"] * 4
    ids = [tokenizer.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    noise = torch.rand(len(prompts), 8, generator=torch.Generator().manual_seed(1))
    examples = sample_text(model, tokenizer, ids, 8, noise=noise)
    batch = generate(model, ids, 8, tokenizer.end, noise=noise)
    assert len({example.ended for example in examples}) == 2  # some have ended, others not
    return prompts, examples, batch


def test_a_function_judges_texts_without_their_end_token_in_either_form(functions, tokenizer, sampled):
    prompts, examples, batch = sampled
    score = load_reward(f"{functions}:length", tokenizer, "owner", 48, "cpu")
    expected = [len(prompt) + len(example.text) / 10 for prompt, example in zip(prompts, examples)]
    assert score(prompts, examples).tolist() == score(prompts, batch).tolist() == expected
    assert score(prompts, batch).dtype == torch.float64  # 0.7 is not below a threshold of 0.7


def test_a_reward_model_judges_prompt_and_answer_in_either_form(workshop, tokenizer, sampled):
    prompts, examples, batch = sampled
    score = load_reward(workshop.path("rm"), tokenizer, "owner", 48, "cpu")
    model = load_model(workshop.path("rm"), reward=True)[0]
    alone = [model.score(torch.tensor([e.ids]), torch.tensor([len(e)])).item() for e in examples]
    for answers in (examples, batch):
        scores = score(prompts, answers)
        assert scores.tolist() == pytest.approx(alone, abs=1e-4) and not scores.requires_grad
    assert score_examples(model, examples).tolist() == pytest.approx(alone, abs=1e-4)


def test_a_reward_model_is_frozen(workshop, tokenizer):
    model = load_reward_model(workshop.path("rm"), tokenizer, "owner", 48, "cpu")
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize(
    "name, block_size, message",
    [
        ("other_vocab_rm", 48, "owner and .*other_vocab_rm have different vocabularies"),
        ("rm", 49, "rm reads 48 tokens, but owner may write 49"),
        ("sft", 48, "sft holds a language model; here a reward model is needed"),
        ("nowhere", 48, "no folder .*nowhere"),
    ],
)
def test_a_reward_model_that_does_not_fit_is_refused(workshop, tokenizer, name, block_size, message):
    with pytest.raises(UserError, match=message) as error:
        load_reward(workshop.path(name), tokenizer, "owner", block_size, "cpu")
    one_line(error)
