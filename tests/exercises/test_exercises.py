"""Solves the exercises: the answers hold, what is wrong is found, and what is not written yet is said to be so."""

import ast
import difflib
import importlib
import os
import subprocess
import sys

import pytest
import torch

import properties
import solutions
import test_mutants
import test_variants
from conftest import FORKS, ROOT, SCRIPTS, VARIANTS, one_line, put_in_place, script_path, unwritten
from mutants import MUTANTS
from nanopost.config import UserError
from test_mutants import fixtures  # noqa: F401

STUBS = ROOT / "exercises" / "losses.py"
OWNERS = {  # of the eight functions
    "masked_cross_entropy": "sft",
    "pairwise_loss": "rm",
    "dpo_loss": "dpo",
    **dict.fromkeys(("token_rewards", "gae", "whiten", "policy_loss", "value_loss"), "ppo"),
}


def functions(path) -> dict:
    """{name: node} of the functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def prove(file):
    """-> (exit code, the lines of stdout)"""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["tests/proofs/test_losses.py", "tests/proofs/test_variants.py", "--mine", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


# ---------------------------------------------------------------------------------------------------- fill in the loss


def filled(*names) -> str:
    """exercises/losses.py with these functions as the scripts have them."""
    stubs = text = STUBS.read_text(encoding="utf-8")
    for name in names:
        stub = ast.get_source_segment(stubs, functions(STUBS)[name])
        text = text.replace(stub, properties.source_of(OWNERS[name], name))
    return text


def test_the_stubs_are_those_functions_with_the_scripts_signatures():
    assert list(functions(STUBS)) == list(OWNERS) == unwritten(STUBS)
    for name, stub in functions(STUBS).items():
        assert ast.dump(stub.args) == ast.dump(functions(script_path(OWNERS[name]))[name].args), name
        assert "->" in ast.get_docstring(stub)


def test_nothing_written_is_refused_in_one_line(as_they_were):
    with pytest.raises(UserError, match="nothing is written yet") as error:
        put_in_place(STUBS)
    one_line(error)


@pytest.mark.slow
def test_the_scripts_functions_fill_them_in(tmp_path):
    """The file has all that they need, and they return there what they return in their script."""
    namespace = {}
    exec(filled(*OWNERS), namespace)
    for name, script in OWNERS.items():
        calls = properties.arguments()[name]
        ours = properties.results(getattr(importlib.import_module(f"train_{script}"), name), calls)
        torch.testing.assert_close(properties.results(namespace[name], calls), ours, rtol=0, atol=0)
    (tmp_path / "mine.py").write_text(filled(*OWNERS))
    code, out = prove(tmp_path / "mine.py")
    assert code == 0 and not any(line.startswith(("FAILS", "not written")) for line in out)
    for beginning in ("cross entropy", "pairwise", "dpo loss", "token rewards", "gae", "whiten", "policy", "value"):
        assert any(line.startswith(f"holds: {beginning}") for line in out), beginning


@pytest.mark.slow
def test_they_can_be_written_one_at_a_time(tmp_path):
    """Only what is written is looked at, also where a property needs another function."""
    file = tmp_path / "mine.py"
    file.write_text(filled("whiten", "policy_loss").replace("torch.max(unclipped", "torch.min(unclipped"))
    code, out = prove(file)
    assert code == 1
    assert {line.split(": ")[1] for line in out if line.startswith("FAILS")} == {"policy_loss"}
    assert "holds: whitening equal numbers gives zeros" in out
    assert not any(line.startswith("holds: gae") for line in out)
    assert "not written yet: " + ", ".join(n for n in OWNERS if n not in ("whiten", "policy_loss")) in out


HALF_WRITTEN = """
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    '''Mine.'''
    advantages = rewards
    raise NotImplementedError("your turn")

def whiten(x, mask, shift_mean=True):
    if not shift_mean:
        raise NotImplementedError
    return x

def value_loss():
    raise NotImplementedError

def policy_loss():
    raise ValueError
"""


def test_a_function_is_not_written_if_it_only_raises(tmp_path):
    (tmp_path / "mine.py").write_text(HALF_WRITTEN)
    assert unwritten(tmp_path / "mine.py") == ["value_loss"]


# --------------------------------------------------------------------------------------------------- find the mistake

FILES = sorted((ROOT / "exercises" / "mistakes").glob("*.py"))


def slip_of(path):
    """(function, what is wrong, right, wrong): the one mistake of the catalogue that this file has."""
    [name] = functions(path)
    text = path.read_text(encoding="utf-8")
    found = []
    for script in SCRIPTS + FORKS:
        for mistake in MUTANTS.get(f"train_{script}.{name}", []):
            source = properties.source_of(script, name).replace(*mistake[1:])
            found += [(f"train_{script}.{name}", *mistake)] if text.endswith(f"\n\n\n{source}\n") else []
    assert len({what for _, what, *_ in found}) == 1, found
    return found[0]  # a fork may have the function, and the mistake, of its parent


def test_there_are_twelve_with_a_mistake_of_the_catalogue_each_and_no_hint():
    assert [path.name for path in FILES] == [f"{n:02}.py" for n in range(1, 13)]
    slips = [slip_of(path) for path in FILES]
    assert len({name for name, *_ in slips}) == 12
    assert {name.split(".")[1] for name, *_ in slips} > set(OWNERS)
    for path, (name, what, *_) in zip(FILES, slips):
        assert what not in path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(path.read_text())).startswith(name.split(".")[1])


def first_failure(name, given):
    """The first property of a function that fails."""
    for test in properties.properties(name):
        for case in test_mutants.cases(test, name.split(".")[0].removeprefix("train_"), given):
            torch.manual_seed(0)
            try:
                case()
            except AssertionError:
                return test.__name__
    return None


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_mistake_is_found_and_its_function_named(path, fixtures, monkeypatch, as_they_were):  # noqa: F811
    """The file's own function stands in the place of the script's. Without its mistake it is the script's, of which
    test_mutants.py shows that every property holds."""
    name, *_ = slip_of(path)
    script, function = name.removeprefix("train_").split(".")
    module = importlib.import_module(f"train_{script}")
    ours = getattr(module, function)
    assert put_in_place(path) == [(script, function)]
    monkeypatch.setattr(ours, "__code__", getattr(module, function).__code__)
    failed = first_failure(name, fixtures)
    assert failed and function in (properties.words_for(failed)[0] or [function])


# --------------------------------------------------------------------------------------------------- change two lines


@pytest.mark.parametrize("name", VARIANTS)
def test_a_solution_has_its_properties_and_is_a_few_lines_from_dpo(name):
    assert first_failure(f"train_dpo.{name}", {}) is None
    ours, text = script_path("dpo").read_text(encoding="utf-8"), solutions.solution(name)
    changed = [line for line in difflib.ndiff(ours.splitlines(), text.splitlines()) if line.startswith("+")]
    assert len(changed) <= 8


WRONG = [(name, *mistake) for name, mistakes in solutions.MISTAKES.items() for mistake in mistakes]


@pytest.mark.parametrize("name, what, right, wrong", WRONG, ids=[f"{name}: {what}" for name, what, *_ in WRONG])
def test_a_wrong_solution_has_not(name, what, right, wrong, monkeypatch):
    module = solutions.module_of(solutions.solution(name, (right, wrong)))
    monkeypatch.setattr(test_variants, "variant", lambda _: module)
    assert first_failure(f"train_dpo.{name}", {})


@pytest.mark.parametrize("name", VARIANTS)
def test_dpo_under_another_name_is_no_solution(name, monkeypatch):
    text = (
        script_path("dpo").read_text(encoding="utf-8").replace("    epochs:", "    gamma: float = 0.5\n    epochs:", 1)
    )
    monkeypatch.setattr(test_variants, "variant", lambda _: solutions.module_of(text))
    assert first_failure(f"train_dpo.{name}", {})


@pytest.mark.slow
def test_a_readers_copy_is_tested_as_what_it_should_be(tmp_path):
    """And not as the DPO that it is no longer."""
    file = tmp_path / "mine.py"
    file.write_text(solutions.solution("kto_loss", (".clamp(min=0).detach()", ".clamp(min=0)")))
    code, out = prove(file)
    assert code == 1
    failed = [line for line in out if line.startswith("FAILS")]
    assert len(failed) == 1 and failed[0].startswith("FAILS: kto_loss: the gradient is not beta v (1 - v) on each side")
    assert "holds: kto starts at one half" in out and not any(line.startswith("holds: dpo") for line in out)
