"""The command `nanopost` (or `python -m nanopost`): lists the tools, or runs the one that is named."""

import ast
import importlib
import sys
from pathlib import Path

from nanopost.config import cli, fail

TOOLS = ("chat", "sample", "evaluate", "versus", "lab", "inspect", "label", "plot", "export", "show")


def summary(tool: str) -> str:
    """The first line of a tool's docstring. It is parsed, not imported: importing PyTorch takes seconds."""
    path = Path(__file__).parent / "tools" / f"{tool}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


def main():
    tool, *arguments = sys.argv[1:] or ["--help"]
    if tool in ("-h", "--help"):
        print("usage: nanopost TOOL [arguments]     (nanopost TOOL --help lists a tool's arguments)\n")
        print("\n".join(f"    {name:10}{summary(name)}" for name in TOOLS))
    elif tool in TOOLS:
        module = importlib.import_module(f"nanopost.tools.{tool}")
        cli(module.main, module.Config, arguments, prog=f"nanopost {tool}")
    else:
        fail(f"there is no tool {tool}; the tools are {', '.join(TOOLS)}")


if __name__ == "__main__":
    main()
