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


def in_terminal() -> bool:
    """Whether a person types the input."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def read_line(question: str = "") -> str:
    """As input(), and a closed input is at its end, too: EOFError."""
    if sys.stdin is None or sys.stdin.closed:
        raise EOFError
    return input(question)
