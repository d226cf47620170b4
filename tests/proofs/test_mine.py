"""`--mine FILE`: the properties of a file's own functions, run in the place of ours, and told in words."""

import os
import subprocess
import sys

import pytest

import properties
from conftest import FORKS, ROOT, SCRIPTS, VARIANTS, functions_in, one_line, put_in_place, rest_slow, script_path
from mutants import MUTANTS
from nanopost.config import UserError


def prove(file, *files):
    """-> (exit code, stdout, stderr)"""
    tests = [str(ROOT / "tests" / "proofs" / name) for name in ("test_losses.py", *files)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--mine", file], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS + FORKS)
def test_a_copy_of_a_script_passes(script, tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text("# a comment\n" + script_path(script).read_text())
    code, out, _ = prove(copy, "test_forks.py" if script in FORKS else "test_enumeration.py")
    assert code == 0 and "FAILS" not in out and out.count("holds: ") > 5
    *_, absent, _ = out.splitlines()
    assert absent.startswith("does not apply")
    assert ("dpo_loss" in absent) == (script != "dpo") and "update" not in absent


def losses(*names) -> str:
    """A file that holds these functions of the scripts and nothing else."""
    text = "import torch\nimport torch.nn.functional as F\nfrom nanopost.model import token_nll, upcast\n"
    return "\n\n".join([text, *(properties.source_of(script, name) for script, name in names)])


@pytest.mark.slow
def test_functions_of_several_scripts_in_one_file_each_replace_their_own(tmp_path):
    file = tmp_path / "mine.py"
    mine = [("sft", "masked_cross_entropy"), ("rm", "pairwise_loss"), ("ppo", "gae"), ("grpo", "kl_loss")]
    file.write_text(losses(*mine))
    code, out, _ = prove(file, "test_forks.py")
    assert code == 0
    for property in ("cross entropy weighs tokens", "pairwise loss of equal", "gae with lambda 0", "kl losses by hand"):
        assert f"holds: {property}" in out
    mistaken = file.read_text().replace("next_value = values[:, t]", "next_value = 0 * values[:, t]")
    file.write_text(mistaken.replace("0.5 * k1.sum", "k1.sum"))
    code, out, _ = prove(file, "test_forks.py")
    assert code == 1
    assert "FAILS: gae: not the sum of (gamma lambda)^l delta" in out
    assert "FAILS: kl_loss: not half the square of the answer's log-ratio" in out
    assert "kl_loss returns what it would with this mistake of mutants.py: k2 without its half" in out
    assert "FAILS: masked_cross_entropy" not in out and "FAILS: pairwise_loss" not in out


SLIPS = {  # a mistake of the catalogue: what is said
    "train_ppo.policy_loss: the end token left out": "the gradient is not that of E[r] - beta KL: cosine 0.",
    "train_ppo.token_rewards: the penalty with the wrong sign": "the penalty is a bonus",
    "train_dpo.answer_logprobs: the end token left out": "not equation 7 of whole answers: the end token left out",
    "train_grpo.update: the KL per token, not per answer": "a step does not follow the gradient of the loss",
    "train_ipo.ipo_loss: DPO's loss": "it runs away where all labels agree",
}


def with_slip(name, what) -> str:
    """The text of a script with a mistake of the catalogue."""
    script, function = name.removeprefix("train_").split(".")
    [(right, wrong)] = [(right, wrong) for title, right, wrong in MUTANTS[name] if title == what]
    source = properties.source_of(script, function)
    return script_path(script).read_text().replace(source, source.replace(right, wrong))


@pytest.mark.parametrize("slip", rest_slow(SLIPS))
def test_a_mistake_is_told_with_its_function(slip, tmp_path):
    name, what = slip.split(": ", 1)
    file, function = tmp_path / "mine.py", name.split(".")[1]
    file.write_text(with_slip(name, what))
    code, out, _ = prove(
        file, "test_forks.py" if name.startswith(("train_grpo", "train_ipo")) else "test_enumeration.py"
    )
    failures = [line for line in out.splitlines() if line.startswith("FAILS")]
    assert code == 1 and all(line.startswith(f"FAILS: {function}: ") for line in failures)
    assert any(SLIPS[slip] in line for line in failures), failures
    if function in properties.arguments():
        assert f"{function} returns what it would with this mistake of mutants.py: {what}\n" in out


@pytest.mark.slow
def test_an_error_in_a_function_is_told_as_what_it_is(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def whiten(x, mask, shift_mean=True):\n    return x / nothing\n")
    code, out, _ = prove(file)
    assert code == 1 and "FAILS: whiten: it raises NameError: name 'nothing' is not defined" in out


WRONG = {
    "no file": (None, "no file"),
    "no Python": ("def dpo_loss(:\n", "invalid syntax"),
    "no text": ("\0", "null bytes"),
    "no function that is known": ("def my_loss(x):\n    return x\n", "defines no function of the scripts, such as"),
    "what does not run": ("1 / 0\n\ndef dpo_loss():\n    pass\n", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(kind, tmp_path, as_they_were):
    text, message = WRONG[kind]
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        put_in_place(tmp_path / "mine.py")
    assert str(tmp_path / "mine.py") in one_line(error)


def test_then_the_exit_code_is_2(tmp_path):
    code, out, err = prove(tmp_path / "mine.py")
    assert (code, out, err) == (2, "", f"Exit: --mine: no file {tmp_path / 'mine.py'}\n")


def test_every_word_is_about_functions_and_tests_that_exist():
    functions = {name for script in SCRIPTS + FORKS for name in functions_in(script_path(script))}
    tests = [test.__name__.removeprefix("test_") for tests in properties.PROPERTIES.values() for test in tests]
    for names, rows in properties.WORDS.items():
        assert set(names.split(", ")) <= functions | {*VARIANTS, ""}
        for start in rows:
            assert any(test.startswith(start) for test in tests), start
