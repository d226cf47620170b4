"""A dataclass as a command line: types, defaults, flags, help from the comments, and mistakes told in one line."""

import dataclasses
import sys
from dataclasses import dataclass, field

import pytest

from nanopost.config import UserError, cli, parse


@dataclass
class Parent:
    out: str = "out/run"  # where the parent writes
    seed: int = 3  # of the random numbers


@dataclass
class Config(Parent):
    out: str = "out/here"  # where to write
    lr: float = 1e-3  # learning rate, 100% of it
    # and its second line
    max_steps: int = 20
    shuffle: bool = True  # mix the rows
    fast: bool = False
    name: str = ""  # of the run


@dataclass
class Files:
    files: list[str]  # the files to read
    needed: int = field()  # has no default
    more: bool = False


@dataclass
class Subject:
    model: str  # what to look at
    lr: float = 1.0


def test_without_arguments_every_field_has_its_default():
    assert parse(Config, []) == Config()


def test_values_get_the_type_of_their_field():
    config = parse(Config, ["--lr", "3e-4", "--max-steps", "7", "--name", "5", "--out=x=y"])
    assert config == Config(lr=3e-4, max_steps=7, name="5", out="x=y")
    assert [type(config.lr), type(config.max_steps), type(config.name)] == [float, int, str]


@pytest.mark.parametrize("text, number", [("10_000", 10000), ("1e4", 10000), ("-3", -3), ("2.0", 2)])
def test_whole_numbers_can_be_written_in_several_ways(text, number):
    value = parse(Config, ["--max-steps", text]).max_steps
    assert value == number and type(value) is int


def test_underscores_and_dashes_are_one():
    assert parse(Config, ["--max_steps", "5"]) == parse(Config, ["--max-steps", "5"])
    assert parse(Config, ["--max_steps=5", "--name=a_b-c"]) == Config(max_steps=5, name="a_b-c")


def test_flags_are_turned_on_and_off():
    assert parse(Config, ["--no-shuffle", "--fast"]) == Config(shuffle=False, fast=True)
    assert parse(Config, ["--shuffle", "--no-fast"]) == Config()
    assert parse(Config, ["--no_shuffle"]) == Config(shuffle=False)


def test_a_negative_number_is_a_value():
    assert parse(Config, ["--lr", "-1.5"]).lr == -1.5


def test_a_list_field_takes_the_positional_arguments():
    config = parse(Files, ["a_b", "--needed", "2", "--more"])
    assert config == Files(["a_b"], 2, True)
    assert parse(Files, ["a", "b", "--needed=2"]).files == ["a", "b"]


def test_a_text_without_a_default_is_a_positional_argument_too():
    assert parse(Subject, ["out/ppo", "--lr", "2"]) == Subject("out/ppo", 2.0)


@pytest.mark.parametrize("config, argv", [
    (Subject, []),
    (Config, ["--learning-rate", "1"]),
    (Config, ["--max", "5"]),  # no abbreviations: a later option could change what they mean
    (Config, ["--lr", "fast"]),
    (Config, ["--lr"]),
    (Config, ["--max-steps", "1.5"]),
    (Config, ["--max-steps", "inf"]),
    (Config, ["--max-steps", "nan"]),
    (Config, ["--max-steps", "many"]),
    (Config, ["--shuffle=yes"]),
    (Config, ["stray"]),
    (Files, ["a"]),  # --needed is missing
    (Files, ["--needed", "2"]),  # the files are missing
])
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(config, argv, capsys):
    with pytest.raises(SystemExit) as end:
        parse(config, argv)
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and "error: " in captured.err and "--help" in captured.err


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--learning_rate", "1"])
    assert "--learning-rate" in capsys.readouterr().err


def help_of(config, capsys):
    with pytest.raises(SystemExit) as end:
        parse(config, ["--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_is_the_module_docstring_and_the_comments(capsys):
    text = help_of(Config, capsys)
    assert "A dataclass as a command line" in text
    assert "--lr FLOAT learning rate, 100% of it and its second line (default: 0.001)" in text
    assert "--max-steps INT (default: 20)" in text
    assert "--shuffle, --no-shuffle mix the rows (default: True)" in text
    assert "--name STR of the run" in text and "of the run (default" not in text


def test_help_of_an_inherited_field_is_the_parents_comment_and_of_a_redefined_one_its_own(capsys):
    text = help_of(Config, capsys)
    assert "--seed INT of the random numbers (default: 3)" in text
    assert "where to write (default: out/here)" in text and "where the parent writes" not in text


@pytest.mark.parametrize("script", ["sft", "rm", "dpo", "ppo"])
def test_every_option_of_the_scripts_is_explained_by_its_help_or_its_name(script, workshop, capsys):
    config = workshop.module(script).Config
    text = help_of(config, capsys)
    for f in dataclasses.fields(config):
        assert "--" + f.name.replace("_", "-") in text
    assert "go on from the last checkpoint" in text and "an earlier run there is replaced" in text


def test_cli_tells_a_user_error_in_one_line_and_exits_with_2(monkeypatch, capsys):
    def main(config):
        raise UserError("data.jsonl:17: invalid JSON")

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as end:
        cli(main, Config)
    assert end.value.code == 2 and capsys.readouterr().err == "error: data.jsonl:17: invalid JSON\n"


def test_cli_hands_over_the_parsed_config_and_lets_programming_errors_through(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["prog", "--lr", "2"])
    cli(seen.append, Config)
    assert seen == [Config(lr=2.0)]
    with pytest.raises(ZeroDivisionError):
        cli(lambda config: 1 / 0, Config)


def test_an_interruption_exits_with_130(monkeypatch, capsys):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as end:
        cli(main, Config)
    assert end.value.code == 130 and "Traceback" not in capsys.readouterr().err
