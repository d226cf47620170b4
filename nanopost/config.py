"""A dataclass becomes a command line: one option per field, the comment beside the field is its help.

    @dataclass
    class Config:
        lr: float = 1e-3  # peak learning rate

    if __name__ == "__main__":
        cli(main, Config)

A Config checks its bounds in __post_init__, with at_least and between.
"""

import argparse
import dataclasses
import inspect
import math
import re
import sys
import typing


class UserError(ValueError):
    """A mistake in the input, told in one line: what is wrong, where, what to do. The command line exits with 2."""


# Control characters, line separators, what reverses the direction of writing, halves of surrogate pairs.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

OUT_OF_MEMORY = re.compile("out of memory|allocate memory|Storage size")  # what PyTorch's errors say


def clean(text: str) -> str:
    """Text of a model or a file made safe for a terminal: control characters are written out (\\x1b), but for tabs and
    line breaks."""
    return UNSAFE.sub(lambda character: character[0].encode("unicode_escape").decode(), text)


def one_line(text: str, longest: int = 1000) -> str:
    """Text made safe, on one line; from the middle of a longer one something is left out."""
    text = clean(text).strip().replace("\n", "\\n")
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def flag(name: str) -> str:
    """The option of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def between(config, low: float, high: float, *names: str):
    """Raises UserError unless each of these fields is in [low, high]."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"{flag(name)} must be {bounds}, not {value}")


def at_least(config, low: float, *names: str):
    """Raises UserError unless each of these fields is at least `low`."""
    between(config, low, math.inf, *names)


def all_finite(config):
    """Raises UserError unless every number is finite."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag(name)} must be a finite number, not {value}")


def field_comments(config_class) -> dict[str, str]:
    """{field: comment}: the comment on the field's line and the comment-only lines right below it; a field that is
    inherited keeps its parent's comment."""
    comments = {}
    for cls in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        fields, name = {field.name for field in dataclasses.fields(cls)}, None
        for line in inspect.getsource(cls).splitlines():
            field = re.match(r"""\s+(\w+):(?:[^#"']|"[^"]*"|'[^']*')*(?:# *(.*))?$""", line)
            more = re.match(r"\s+# *(.*)$", line)
            if field and field[1] in fields:
                name = field[1]
                comments[name] = field[2] or comments.get(name, "")
            elif more and name:
                comments[name] = f"{comments[name]} {more[1]}".strip()
            else:
                name = None
    return comments


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the whole usage
        self.exit(2, f"error: {one_line(message)} ({self.prog} --help lists the options)\n")


def whole_number(text: str) -> int:
    """An int, also written 10_000 or 1e4."""
    value = float(text)
    if not value.is_integer() or abs(value) >= 2**63:  # nor are inf and nan
        raise ValueError
    return int(value) if abs(value) < 2**53 else int(text)  # a float has 53 bits


whole_number.__name__ = "whole number"  # what argparse calls it in errors


def parse(config_class, argv=None, prog=None):
    """The config that the command line describes. `--no-x` turns a flag off; `--log_every` is `--log-every` too."""
    doc = inspect.getdoc(inspect.getmodule(config_class)) or ""
    parser = Parser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    types, comments = typing.get_type_hints(config_class), field_comments(config_class)
    for field in dataclasses.fields(config_class):
        kind, default = types[field.name], field.default
        convert = whole_number if kind is int else kind
        help = comments.get(field.name, "").replace("%", "%%")
        if default not in ("", None, dataclasses.MISSING):
            help += f" (default: {default})"
        if typing.get_origin(kind) is list:  # a list of paths: a positional argument
            nargs = "+" if field.default_factory is dataclasses.MISSING else "*"
            parser.add_argument(field.name, nargs=nargs, help=help)
        elif default is dataclasses.MISSING:  # what the command is about: a positional argument too
            parser.add_argument(field.name, type=convert, help=help)
        elif kind is bool:
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, default=default, help=help)
        else:
            parser.add_argument(
                flag(field.name), type=convert, default=default, metavar=kind.__name__.upper(), help=help
            )
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--[^=]+", lambda option: option[0].replace("_", "-"), a) for a in argv]
    if nothing := [a for a in argv if a.endswith("=--")]:  # argparse itself stumbles over it
        parser.error(f"{nothing[0]} gives no value")
    config = config_class(**vars(parser.parse_args(argv)))
    all_finite(config)
    return config


def cli(main, config_class, argv=None, prog=None):
    """Runs main(config) from the command line. The user's mistakes become one line on stderr and exit code 2."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal does not know ends no run
    try:
        main(parse(config_class, argv, prog))
        flush()
    except UserError as error:
        fail(str(error))
    except OSError as error:  # no such folder, no permission, no space
        where = "" if error.filename is None else f": {error.filename}"
        fail(f"{error.strerror or error}{where}")
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"torch.compile failed; --compile off does without. {error}")
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        fail(f"not enough memory; make the batch, the model or the file smaller. {error}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def flush():
    """Notices a full disk or a closed pipe behind stdout now; Python would, in its own words, when it ends."""
    if sys.stdout:
        sys.stdout.flush()


def fail(message: str):
    """Ends the program with exit code 2, after one line on stderr."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    try:
        flush()
    except OSError:
        sys.stdout = None  # its rest is lost
    sys.exit(2)
