"""What the pages say can be typed and followed: every command's options exist, every link leads somewhere."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from nanopost.config import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*/README.md")]
SCRIPTS = [ROOT / "quickstart.sh", *ROOT.glob("recipes/*.sh")]
PYTHON = re.compile(r"^(?:\$ |[A-Z_]+=\S+ )*(?:python3?|\.venv/bin/python|\$python) (?=-m nanopost|\S+\.py)")


def commands():
    """(file, what is run, its arguments) of every python command of the pages, the shell scripts and the docstrings."""
    sources = PAGES + SCRIPTS + [*ROOT.glob("*.py"), *ROOT.glob("nanopost/*.py"), *ROOT.glob("data/*/*.py")]
    for path in sources:
        text = re.sub(r"\\+\n\s*", "", path.read_text(encoding="utf-8"))  # continued lines
        for line in text.splitlines():
            line = line.strip().strip("`")
            if match := PYTHON.match(line):
                command = re.sub(r"\s#.*|\s{2,}.*|`.*| \|\| .*", "", line[match.end():])  # no comment after it
                words = shlex.split(re.sub(r"\$(seed|started|i)\b", "0", command))
                target, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
                yield path.relative_to(ROOT).as_posix(), target, arguments


def config_of(target: str):
    """The Config class of a script or module, or None if it takes its options in another way."""
    if "/" not in target:
        return getattr(importlib.import_module(target.removesuffix(".py")), "Config", None)
    name = target.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / target)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "Config", None)


COMMANDS = sorted({(path, target, tuple(arguments)) for path, target, arguments in commands()})


@pytest.mark.parametrize("path, target, arguments", COMMANDS,
                         ids=[f"{path}: {target} {' '.join(a)[:60]}" for path, target, a in COMMANDS])
def test_a_command_of_the_docs_has_options_that_exist(path, target, arguments):
    if config := config_of(target):
        parse(config, [argument for argument in arguments if argument != "..."])


def test_the_commands_are_found():
    assert len(COMMANDS) > 30 and {"quickstart.sh", "README.md"} <= {path for path, *_ in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_to_files_and_to_the_functions_they_name(page):
    for text, target in re.findall(r"!?\[([^\]]*)\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name
        assert path.exists(), target
        if anchor.startswith("L"):
            line = path.read_text(encoding="utf-8").splitlines()[int(anchor[1:]) - 1]
            assert line.startswith(f"def {text.split('`')[1]}("), (target, line)
