"""A dataclass as a command line: types, defaults, flags, bounds, help from the comments, mistakes told in one line."""

import math
import sys
import typing
from dataclasses import dataclass

import pytest

from conftest import SCRIPTS
from nanopost.config import UserError, at_least, between, cli, field_comments, parse


@dataclass
class Parent:
    out: str = "out/run"  # where the parent writes
    seed: int = 3  # seed of the random numbers


@dataclass
class Config(Parent):
    out: str = "out/here"  # where to write
    lr: float = 1e-3  # learning rate, 100% of it
    # and its second line
    max_steps: int = 20
    shuffle: bool = True  # mix the rows
    fast: bool = False
    name: str = ""  # name of the run

    def __post_init__(self):
        at_least(self, 1, "max_steps")


@dataclass
class Files:
    files: list[str]  # the files to read
    count: int  # how many lines
    more: bool = False


@dataclass
class Subject:
    model: str  # what to look at
    lr: float = 1.0


# ------------------------------------------------------------------------------------------------------------ values


def test_without_arguments_every_field_has_its_default():
    assert parse(Config, []) == Config()


def test_values_get_the_type_of_their_field():
    config = parse(Config, ["--lr", "3e-4", "--max-steps", "7", "--name", "5", "--out=x=y"])
    assert config == Config(lr=3e-4, max_steps=7, name="5", out="x=y")
    assert [type(config.lr), type(config.max_steps), type(config.name)] == [float, int, str]


@pytest.mark.parametrize("text, number", [("10_000", 10000), ("1e4", 10000), ("-3", -3), ("2.0", 2)])
def test_whole_numbers_can_be_written_in_several_ways(text, number):
    value = parse(Parent, ["--seed", text]).seed
    assert value == number and type(value) is int


def test_underscores_and_dashes_are_the_same():
    assert parse(Config, ["--max_steps", "5"]) == parse(Config, ["--max-steps", "5"])
    assert parse(Config, ["--max_steps=5", "--name=a_b-c"]) == Config(max_steps=5, name="a_b-c")


def test_flags_are_turned_on_and_off():
    assert parse(Config, ["--no-shuffle", "--fast"]) == Config(shuffle=False, fast=True)
    assert parse(Config, ["--shuffle", "--no-fast"]) == Config()
    assert parse(Config, ["--no_shuffle"]) == Config(shuffle=False)


def test_a_negative_number_is_a_value():
    assert parse(Config, ["--lr", "-1.5"]).lr == -1.5


def test_fields_without_a_default_are_positional_arguments_and_a_list_takes_all_but_the_last():
    assert parse(Subject, ["out/ppo", "--lr", "2"]) == Subject("out/ppo", 2.0)
    assert parse(Files, ["a_b", "2", "--more"]) == Files(["a_b"], 2, True)
    assert parse(Files, ["a", "b", "3"]) == Files(["a", "b"], 3)


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "config, argv",
    [
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
        (Files, ["a"]),  # the count is missing
        (Files, ["a", "b"]),  # the count is no number
        (Files, ["--more"]),
    ],
)
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


@dataclass
class Values:
    max_steps: float
    fine: float = 1.0


@pytest.mark.parametrize("value, bound", [(0, 1), (-0.1, 0), (math.nan, 0), (-math.inf, 0)])
def test_a_value_below_its_bound_is_refused_with_its_option_the_bound_and_the_value(value, bound):
    with pytest.raises(UserError, match=f"^--max-steps must be at least {bound}, not {value}$"):
        at_least(Values(value), bound, "fine", "max_steps")


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_a_bound_itself_is_allowed(value):
    at_least(Values(value), value, "max_steps")
    between(Values(value), 0, 1, "max_steps")


@pytest.mark.parametrize("value", [-0.001, 1.001, math.nan, math.inf, -math.inf])
def test_a_value_outside_its_range_is_refused(value):
    with pytest.raises(UserError, match=f"^--max-steps must be between 0 and 1, not {value}$"):
        between(Values(value), 0, 1, "fine", "max_steps")


# -------------------------------------------------------------------------------------------------------------- help


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
    assert "--name STR name of the run" in text and "name of the run (default" not in text


def test_help_of_an_inherited_field_is_the_parents_comment_and_of_a_redefined_one_its_own(capsys):
    text = help_of(Config, capsys)
    assert "--seed INT seed of the random numbers (default: 3)" in text
    assert "where to write (default: out/here)" in text and "where the parent writes" not in text


@dataclass
class Odd:
    """A docstring that mentions a field
    plain: and what follows it.
    """

    # a heading above a field belongs to none

    plain: int = 0
    spaced: int = 0  #   spaces before it are dropped
    empty: int = 0  #
    wide: dict[str, int] | None = None  # a type: with a colon, # and a second mark
    quoted: str = "it's: 'so'"  # quotes don't matter
    long: float = 1.0  # first
    # second
    #   third
    after: int = 0

    # a comment after an empty line belongs to none
    below: int = 0
    # only below
    lines: int = 0  # of a file

    def method(self):
        # a comment inside a method belongs to no field
        if self.plain:
            pass  # nor does this one
        return {"plain": 1}  # nor this


@dataclass
class Middle(Odd):
    plain: int = 1  # now it has one
    long: float = 2.0


class NoDataclass:
    empty: int = 3  # annotations of another kind of class are no fields


@dataclass
class Child(Middle, NoDataclass):
    own: bool = False  # its own


COMMENTS = {
    "plain": "",
    "spaced": "spaces before it are dropped",
    "empty": "",
    "wide": "a type: with a colon, # and a second mark",
    "quoted": "quotes don't matter",
    "long": "first second third",
    "after": "",
    "below": "only below",
    "lines": "of a file",
}


def test_a_comment_is_what_stands_beside_a_field_and_in_the_lines_right_below_it():
    assert field_comments(Odd) == COMMENTS


def test_comments_are_inherited_through_several_classes_until_a_field_has_a_new_one():
    middle = COMMENTS | {"plain": "now it has one"}
    assert field_comments(Middle) == middle
    assert field_comments(Child) == middle | {"own": "its own"}


@dataclass
class Colours:
    one: str = "#fff"  # a colour
    other: str = "#000"


def test_a_hash_inside_a_string_begins_no_comment():
    assert field_comments(Colours) == {"one": "a colour", "other": ""}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_the_scripts_is_explained_in_the_help(script, workshop, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no words are broken
    config = workshop.module(script).Config
    comments, text = field_comments(config), help_of(config, capsys)
    for name, kind in typing.get_type_hints(config).items():
        option = name.replace("_", "-")
        value = f", --no-{option}" if kind is bool else f" {kind.__name__.upper()}"
        assert comments[name] and f"--{option}{value} {comments[name]}" in text


# --------------------------------------------------------------------------------------------------------------- cli


def exit_of(main, capsys, argv=()):
    """cli(main, Config) -> (exit code, stdout, stderr)"""
    with pytest.raises(SystemExit) as end:
        cli(main, Config, list(argv))
    return end.value.code, *capsys.readouterr()


def raises(error):
    def main(config):
        raise error

    return main


def test_cli_tells_a_user_error_in_one_line_and_exits_with_2(capsys):
    told = exit_of(raises(UserError("data.jsonl:17: invalid JSON")), capsys)
    assert told == (2, "", "error: data.jsonl:17: invalid JSON\n")


def test_cli_tells_an_impossible_value_in_the_same_way_before_anything_runs(capsys):
    told = exit_of(raises(AssertionError), capsys, ["--max-steps", "0"])
    assert told == (2, "", "error: --max-steps must be at least 1, not 0\n")


def test_cli_tells_an_error_of_the_file_system_with_its_file(tmp_path, capsys):
    told = exit_of(lambda config: open(tmp_path / "nowhere"), capsys)
    assert told == (2, "", f"error: No such file or directory: {tmp_path / 'nowhere'}\n")


def test_cli_hands_over_the_parsed_config_and_lets_programming_errors_through(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["prog", "--lr", "2"])
    cli(seen.append, Config)
    cli(seen.append, Config, ["--lr", "3"])  # the arguments can be given instead
    assert seen == [Config(lr=2.0), Config(lr=3.0)]
    for error in (ZeroDivisionError, ValueError, KeyError):
        with pytest.raises(error):
            cli(raises(error), Config, [])


def test_an_interruption_exits_with_130_and_no_traceback(capsys):
    code, _, err = exit_of(raises(KeyboardInterrupt), capsys)
    assert code == 130 and err == "\ninterrupted\n"
