"""Plants the mistakes of mutants.py, one at a time. At least one test of this folder must fail for each of them.

    python -m pytest tests/proofs/test_mutants.py -v --slow             one line per mistake
    python -m pytest tests/proofs/test_mutants.py -v -k policy_loss     those of one function

A mistake is planted in the function's own code, so whoever calls it gets the wrong one: the scripts, main() included,
run with the mistake inside.
"""

import functools
import importlib
import inspect
import itertools
import pkgutil
import re
import textwrap

import pytest
import torch

import measured
import test_enumeration
import test_wiring
from conftest import FORKS, SCRIPTS, put_in_place, resembled, script_path
from mutants import MUTANTS
from properties import PROPERTIES, properties

# ------------------------------------------------------------------------------------------------------ calling a test


def cases(test, script, fixtures):
    """Calls of a test for all its parameters, without pytest; of those for several scripts, the one that is asked."""
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for values in itertools.product(*(rows for _, rows, *_ in marks)):
        arguments = {name: fixtures[name] for name in inspect.signature(test).parameters if name in fixtures}
        for (names, *_), row in zip(marks, values):
            names = [name.strip() for name in names.split(",")]
            arguments |= dict(zip(names, row if len(names) > 1 else [row]))
        if script is None or arguments.get("script", script) == script:
            yield functools.partial(test, **arguments)


@pytest.fixture
def fixtures(workshop, tmp_path_factory, monkeypatch):
    """What the tests of test_wiring.py ask for. What is measured with a mistake inside is not for the table."""
    monkeypatch.setattr(measured, "MEASURED", {})
    return {"workshop": workshop, "runs": test_wiring.runs_in(workshop, lambda: tmp_path_factory.mktemp("run"))}


# ------------------------------------------------------------------------------------------------ planting a mistake


def find(name):
    """The function of this name, or None."""
    try:
        return inspect.unwrap(pkgutil.resolve_name(name))
    except (AttributeError, ImportError):
        return None


def source_of(function):
    return textwrap.dedent(inspect.getsource(function))


def code_of(function, right, wrong):
    """The function's code with one place of its source changed."""
    namespace = dict(function.__globals__)
    source = source_of(function).replace(right, wrong)
    exec(compile(source, f"<{function.__name__} with a mistake>", "exec"), namespace)
    return inspect.unwrap(namespace[function.__name__]).__code__


def outdated(name):
    """The places that mistakes of this function look for, and that do not occur in it exactly once."""
    source = source_of(find(name)) if find(name) else ""
    return [right for _, right, _ in MUTANTS[name] if source.count(right) != 1]


@pytest.mark.parametrize("name", MUTANTS)
def test_the_catalogue_fits_the_code(name):
    if find(name) is None:
        pytest.fail(
            f"there is no {name}: rename or remove its {len(MUTANTS[name])} mistakes in tests/proofs/mutants.py"
        )
    if places := outdated(name):
        others = f" and {len(places) - 1} other places" if len(places) > 1 else ""
        pytest.fail(
            f"{name} no longer contains `{places[0]}`{others} exactly once: you edited it. Update or remove its "
            f"{len(places)} mistakes in tests/proofs/mutants.py that look for it; they are skipped until then. The "
            "other files of tests/proofs still tell whether your code is right."
        )


# Functions of which a mistake shows only after many properties or in whole runs. Without --slow only the first mistake
# of each is planted; those of the other functions, the losses among them, are all planted every time.
LONG = re.compile(r"\.(main|update|rollout|normalise|statistics|adamw|schedule|batches|choose|Run\.\w+|Decoding\.\w+)$")


def plantings():
    """(function, what is wrong, right code, wrong code) of every mistake."""
    for name, mistakes in MUTANTS.items():
        for i, mistake in enumerate(mistakes):
            marks = [pytest.mark.slow] if i > 0 and LONG.search(name) else []
            yield pytest.param(name, *mistake, id=f"{name}: {mistake[0]}", marks=marks)


@pytest.mark.parametrize("name, what, right, wrong", list(plantings()))
def test_a_planted_mistake_is_found(name, what, right, wrong, fixtures, monkeypatch):
    if right in outdated(name):
        pytest.skip(f"{name} was edited, see test_the_catalogue_fits_the_code")
    monkeypatch.setattr(find(name), "__code__", code_of(find(name), right, wrong))
    script = name.split(".")[0].removeprefix("train_") if name.startswith("train_") else None
    for test in properties(name):
        for case in cases(test, script, fixtures):
            torch.manual_seed(0)
            try:
                case()
            except AssertionError:
                return
    pytest.fail(f"{name} with {what}: every test still passes")


@pytest.mark.slow
def test_without_a_mistake_every_property_holds(fixtures):
    for test in {test for tests in PROPERTIES.values() for test in tests}:
        for case in cases(test, None, fixtures):
            torch.manual_seed(0)
            case()


# -------------------------------------------------------------------------------------------------------------- --mine

MY_LOSS = """
def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    h = policy_chosen - ref_chosen - policy_rejected + ref_rejected
    return (h - 1 / (2 * beta)) ** 2, torch.zeros_like(h), torch.zeros_like(h)

def pair_logprobs(model, pairs, device, batch_size):
    return torch.zeros(1), torch.ones(1)
"""


def test_a_file_that_is_given_as_mine_is_tested_in_the_place_of_the_script_that_it_resembles(tmp_path, as_they_were):
    for script in SCRIPTS + FORKS:
        assert resembled(script_path(script)) == script
    ours = importlib.import_module("train_dpo")
    (tmp_path / "train_ipo.py").write_text(MY_LOSS)
    put_in_place(tmp_path / "train_ipo.py")
    pair = test_enumeration.pairs_of([(0, 1)])
    losses, _ = ours.batch_loss(None, pair, torch.zeros(1, 2), ours.Config(beta=0.5), "cpu")
    assert losses.tolist() == [(-1.0 - 1.0) ** 2]
