"""The lab: experiments on what goes wrong in post-training. Without a name it lists them.

    nanopost lab                    each experiment, with its verdict if it has run here
    nanopost lab safety             runs lab/safety.py: at most 5 minutes on two cores
    nanopost lab all                runs all of them

They start from quickstart's models. lab/README.md is their book: claims, figures, numbers, verdicts.
"""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from nanopost.config import UserError, at_least, clean, fail, flag

ROOT = Path(__file__).resolve().parent.parent.parent
LAB = ROOT / "lab"


@dataclass
class Options:
    """What every experiment takes too (lab/experiment.py)."""

    start: str = "out"  # folder of quickstart, which is run if it is not complete
    out: str = "out/lab"  # folder for runs, numbers and pictures
    seeds: int = 3  # runs of each arm
    jobs: int = 2  # runs at a time, each on one thread
    quick: bool = False  # a few steps of everything, to try it: no verdict
    publish: bool = False  # write pictures, tables and verdicts into lab/README.md

    def __post_init__(self):
        at_least(self, 1, "jobs")
        at_least(self, 2, "seeds")  # one seed is no evidence
        if self.quick and self.publish:
            raise UserError("--publish: what --quick measures is no evidence")


@dataclass
class Config(Options):
    experiments: list[str] = field(default_factory=list)  # names, or all; none: list them


def title(path: Path) -> str:
    """The first line of an experiment's docstring."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


def scripts() -> dict[str, Path]:
    """{name: file} of all experiments: the files of lab/ that end by conducting one."""
    paths = sorted(LAB.glob("*.py"))
    return {path.stem: path for path in paths if path.stem != "experiment"}


def verdict(report: Path) -> str:
    """What an experiment found here, or nothing if it has not run."""
    try:
        return json.loads(report.read_text(encoding="utf-8"))["verdict"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def main(config: Config):
    found = scripts()
    if not found:
        raise UserError(f"there is no experiment in {LAB}; the lab needs a checkout of nanopost's repository")
    if not config.experiments:
        for name, path in found.items():
            print(clean(f"    {name:24}{title(path):60}{verdict(Path(config.out, f'{name}.json'))}").rstrip())
        return
    names = list(found) if config.experiments == ["all"] else config.experiments
    for name in names:
        if name not in found:
            raise UserError(f"there is no experiment {name}; there are {', '.join(found)}, and all")
    options = [f"{flag(name)}={getattr(config, name)}" for name in ("start", "out", "seeds", "jobs")]
    options += [flag(name) for name in ("quick", "publish") if getattr(config, name)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for name in names:
        print(f"== {name}: {title(found[name])}", flush=True)
        code = subprocess.run([sys.executable, str(found[name]), *options], cwd=ROOT, env=environment).returncode
        if code:
            fail(f"the experiment {name} ended with exit code {code}")
