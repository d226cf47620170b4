"""A dataclass becomes a command line: one option per field, the comment beside the field is its help.

    @dataclass
    class Config:
        lr: float = 1e-3  # peak learning rate

    if __name__ == "__main__":
        cli(main, Config)
"""

import argparse
import dataclasses
import inspect
import io
import sys
import tokenize
import typing


class UserError(Exception):
    """A mistake in the input, told in one line: what is wrong, where, what to do. The command line exits with 2."""


def field_comments(config_class) -> dict[str, str]:
    """{field name: comment}: the comment on the field's line and on the comment-only lines right below it.

    A field that is inherited keeps its parent's comment."""
    comments, name = {}, None
    source = inspect.cleandoc("\n" + inspect.getsource(config_class))
    names = {field.name for field in dataclasses.fields(config_class)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.line.split(":")[0].strip() in names:
            name = token.line.split(":")[0].strip()
        elif token.type == tokenize.COMMENT and name:
            comments[name] = (comments.get(name, "") + " " + token.string.lstrip("# ")).strip()
        elif token.type == tokenize.NAME:
            name = None
    parent = config_class.__base__
    return {**field_comments(parent), **comments} if dataclasses.is_dataclass(parent) else comments


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the whole usage
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def parse(config_class, argv=None):
    """The config that the command line describes. `--no-x` turns a flag off; `--log_every` is `--log-every` too."""
    doc = inspect.getdoc(inspect.getmodule(config_class)) or ""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    types, comments = typing.get_type_hints(config_class), field_comments(config_class)
    for field in dataclasses.fields(config_class):
        help = comments.get(field.name, "").replace("%", "%%")
        kind, required = types[field.name], field.default is dataclasses.MISSING
        if not required and field.default not in ("", None):
            help += f" (default: {field.default})"
        if typing.get_origin(kind) is list:  # a list of paths: a positional argument
            parser.add_argument(field.name, nargs="+", help=help)
        elif required and kind is str:  # what the command is about: a positional argument too
            parser.add_argument(field.name, help=help)
        elif kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag(field.name), action=action, default=field.default, help=help)
        else:
            parser.add_argument(flag(field.name), type=number if kind is int else kind, required=required,
                                default=None if required else field.default, metavar=kind.__name__.upper(), help=help)
    argv = sys.argv[1:] if argv is None else argv
    argv = [flag(a.split("=")[0]) + a[len(a.split("=")[0]):] if a.startswith("--") else a for a in argv]
    return config_class(**vars(parser.parse_args(argv)))


def flag(name: str) -> str:
    return "--" + name.removeprefix("--").replace("_", "-")


def number(text: str) -> int:
    """An int, also written 10_000 or 1e4."""
    value = float(text)
    if not value.is_integer():  # nor are inf and nan
        raise ValueError
    return int(value)


def cli(main, config_class):
    """Runs main(config) from the command line. The user's mistakes become one line on stderr and exit code 2."""
    try:
        main(parse(config_class))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # no such folder, no permission, no space
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
