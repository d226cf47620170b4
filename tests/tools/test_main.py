"""The command `nanopost`: it lists the tools without delay and runs the one that is named; and `nanopost show`."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import assistant, user
from nanopost.__main__ import TOOLS, main
from nanopost.config import parse
from nanopost.tools import show

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nanopost(command):
    """nanopost("chat", "out/ppo") -> (exit code, stdout, stderr), as from the command line."""
    return lambda *arguments: command("nanopost/__main__.py", *arguments)


@pytest.fixture
def vocab(tokenizer, tmp_path):
    with open(tmp_path / "v.tiktoken", "w") as f:
        tokenizer.write(f)
    return str(tmp_path / "v.tiktoken")


def docstring(tool) -> str:
    return ast.get_docstring(ast.parse((ROOT / "nanopost" / "tools" / f"{tool}.py").read_text(encoding="utf-8")))


# -------------------------------------------------------------------------------------------------------- the list


def test_every_file_among_the_tools_is_a_tool():
    files = {path.stem for path in (ROOT / "nanopost" / "tools").glob("*.py")} - {"__init__"}
    assert set(TOOLS) == files and len(TOOLS) == len(files)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_tool_all_are_listed_with_the_first_line_of_their_docstrings(nanopost, arguments):
    code, out, err = nanopost(*arguments)
    assert (code, err) == (0, "")
    listed = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("    ")]
    assert listed == [[tool, docstring(tool).splitlines()[0]] for tool in TOOLS]
    assert max(map(len, out.splitlines())) <= 120


def test_the_list_is_made_without_importing_pytorch():
    code = "import runpy, sys; runpy.run_module('nanopost', run_name='__main__'); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "chat" in run.stdout, run.stderr


@pytest.mark.parametrize("tool", ["compare", "Chat", "tools.chat", "__init__", ""])
def test_an_unknown_tool_is_one_line_that_names_the_tools(nanopost, tool):
    code, out, err = nanopost(tool, "out/ppo")
    assert (code, out) == (2, "")
    assert err == f"error: there is no tool {tool}; the tools are {', '.join(TOOLS)}\n"


# ------------------------------------------------------------------------------------------------------- the tools


@pytest.mark.parametrize("tool", TOOLS)
def test_the_help_of_a_tool_is_its_docstring_and_a_comment_for_every_option(nanopost, monkeypatch, tool):
    monkeypatch.setenv("COLUMNS", "10000")
    code, out, err = nanopost(tool, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: nanopost {tool} ")
    assert docstring(tool) in out
    module = importlib.import_module(f"nanopost.tools.{tool}")
    _, _, options = out.partition("positional arguments:\n")
    described = re.findall(r"^  (?:-h, )?(?:--)?([\w-]+)(?:, --no-\S+)?(?: [A-Z]+)?\s+(\S.*)$", options, re.MULTILINE)
    names = {name.replace("-", "_") for name, _ in described}
    assert names == {"help", *module.Config.__dataclass_fields__}


def commands():
    """(tool, arguments) of every command in the docstrings of the tools."""
    for tool in TOOLS:
        text = re.sub(r"\\\n\s*", "", docstring(tool))  # continued lines
        for line in re.findall(r"^ +nanopost (.*)$", text, re.MULTILINE):
            yield tool, shlex.split(re.sub(r"\s{2,}.*", "", line))  # without the comment after it


@pytest.mark.parametrize("tool, words", list(commands()), ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else x)
def test_a_command_in_a_docstring_has_options_that_exist(tool, words):
    assert words[0] == tool
    parse(importlib.import_module(f"nanopost.tools.{tool}").Config, words[1:])


def test_every_docstring_shows_a_command():
    assert {tool for tool, _ in commands()} == set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_wrong_option_is_one_line_under_the_name_of_the_tool(nanopost, tool):
    code, out, err = nanopost(tool, "--speed", "9")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("error: ") and err.endswith(f"(nanopost {tool} --help lists the options)\n")


def test_a_mistake_in_the_input_is_one_line_and_exit_code_2(nanopost):
    assert nanopost("chat", "nowhere") == (2, "", "error: no folder nowhere\n")
    assert nanopost("sample", "out/sft", "--n", "0") == (2, "", "error: --n must be at least 1, not 0\n")


def test_it_runs_as_a_module_from_any_folder(lines, vocab, tmp_path):
    path = lines([{"prompt": "Hi", "completion": "Hello"}])
    arguments = [sys.executable, "-m", "nanopost", "show", path, "--vocab", vocab]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "<|user|>Hi<|assistant|>[Hello<|end|>]" in run.stdout, run.stderr


def test_the_console_script_and_all_packages_are_in_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'nanopost = "nanopost.__main__:main"' in text and callable(main)
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("nanopost/**/*.py")}
    [listed] = re.findall(r"^packages = \[(.*)\]$", text, re.MULTILINE)
    assert set(re.findall(r'"(.*?)"', listed)) == packages


# ------------------------------------------------------------------------------------------------------------ show


def test_show_prints_each_record_with_its_targets_in_brackets(nanopost, vocab, lines):
    records = [
        {"prompt": "Hi", "completion": "Hello"},
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        {"text": "the moon"},
        {"prompt": "not", "completion": "shown"},
    ]
    code, out, err = nanopost("show", lines(records), "--vocab", vocab, "--count", 3)
    assert (code, err) == (0, "")
    assert [line for line in out.split("\n") if "<|" in line] == [
        "<|user|>Hi<|assistant|>[Hello<|end|>]",
        "<|user|>a<|assistant|>[b<|end|>]<|user|>c<|assistant|>[d<|end|>]",
        "<|endoftext|>[the moon<|endoftext|>]",
    ]


def test_in_colour_the_targets_are_green(tokenizer):
    ids, mask = tokenizer.chat([user("Hi"), assistant("Ho")])
    assert show.show_targets(tokenizer, ids, mask) == "<|user|>Hi<|assistant|>\033[32mHo<|end|>\033[0m"


def test_characters_of_several_tokens_are_shown_whole(tokenizer):
    ids, mask = tokenizer.chat([user("caf\u00e9"), assistant("\U0001f600")])
    assert show.show_targets(tokenizer, ids, mask, False) == "<|user|>caf\u00e9<|assistant|>[\U0001f600<|end|>]"


def test_show_obeys_no_record(nanopost, vocab, lines):
    path = lines([{"prompt": "\x1b[2J", "completion": "\r\x9b\u202e"}])
    out = nanopost("show", path, "--vocab", vocab)[1]
    assert "<|user|>\\x1b[2J<|assistant|>[\\r\\x9b\\u202e<|end|>]" in out and "\x1b" not in out


def test_an_unknown_tool_is_named_without_its_control_characters(nanopost):
    assert "there is no tool \\x1b[2J; " in nanopost("\x1b[2J")[2]


def test_show_tells_a_broken_record_with_its_file_and_line(nanopost, vocab, lines):
    path = lines([{"prompt": "Hi", "completion": "Hello"}, {"prompt": "Hi"}])
    code, _, err = nanopost("show", path, "--vocab", vocab)
    assert code == 2 and err.startswith(f"error: {path}:2: ") and len(err.splitlines()) == 1
