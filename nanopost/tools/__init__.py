"""The tools around training: `nanopost` lists them, `nanopost chat out/ppo` runs one (nanopost/__main__.py).

Here is what they share.
"""

import os
import sys

from nanopost.config import UserError


def check_file(option: str, path: str):
    """Raises UserError unless a file can be written under this name: it is neither empty nor a folder's or a pipe's."""
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"{option} must name a file, not {path or 'nothing'}")


def check_temperature(temperature: float):
    """Raises UserError unless it is 0, the likeliest token, or large enough for logits to be divided by it."""
    if not (temperature == 0 or temperature >= 1e-6):
        raise UserError(f"--temperature must be 0 or at least 1e-6, not {temperature}")


def parse_temperatures(text: str) -> list[float]:
    """The temperatures in "0,0.5,1". Raises UserError if one is none, stands there twice, or there are none."""
    temperatures = []
    for part in text.split(","):
        try:
            temperature = float(part)
        except ValueError:
            raise UserError(f"--temperature must be numbers separated by commas, like 0,0.5,1, not {text!r}") from None
        if temperature == float("inf"):
            raise UserError("--temperature must be finite, not inf")
        check_temperature(temperature)
        temperatures.append(temperature)
    if len(set(map(at, temperatures))) < len(temperatures):
        raise UserError(f"--temperature: {text} has the same temperature twice")
    return temperatures


def at(temperature: float) -> str:
    """What a row's name ends with: @0.5; nothing at temperature 1."""
    return "" if temperature == 1 else f"@{abs(temperature):g}"  # abs: -0 is 0


def in_terminal() -> bool:
    """Whether a person types the input."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def read_line(question: str = "") -> str:
    """As input(), and a closed input is at its end, too: EOFError."""
    if sys.stdin is None or sys.stdin.closed:
        raise EOFError
    return input(question)
