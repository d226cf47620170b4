"""What the tortures share: how often, random numbers, processes that may die, and how an error must be told."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, contents, read_metrics
from nanopost.config import flag

pytest.importorskip("resource")  # only Unix has forks and limits

FOLDER = Path(__file__).parent


def pytest_report_header(config):
    return f"torture: {config.getoption('--torture')} times, --torture-seed {config.getoption('--torture-seed')}"


@pytest.fixture
def times(request) -> int:
    """How many times the small amount is wanted."""
    return request.config.getoption("--torture")


@pytest.fixture
def rng(request) -> random.Random:
    """Random numbers that depend on --torture-seed and the name of the test. A failure shows the seed."""
    seed = request.config.getoption("--torture-seed")
    print(f"--torture-seed {seed}")
    return random.Random(f"{seed} {request.node.name}")


def command_line(config) -> list[str]:
    """The arguments that make this configuration."""
    arguments = []
    for name, value in vars(config).items():
        if isinstance(value, bool):
            arguments.append(flag(name if value else f"no_{name}"))
        else:
            arguments += [flag(name), str(value)]
    return arguments


class Forge:
    """forge.run(file, arguments, out) -> (exit code, stdout, stderr) of a process of its own. See forge.py."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.server = subprocess.Popen([sys.executable, FOLDER / "forge.py"], cwd=ROOT, env=environment, **pipes)
        self.log = folder / "job"

    def start(self, file: str, arguments, out, **more) -> int:
        """Starts a job; returns its process id. Call wait() before the next one."""
        job = dict(file=file, arguments=list(map(str, arguments)), out=str(out), log=str(self.log), **more)
        self.server.stdin.write(json.dumps(job) + "\n")
        return int(self.server.stdout.readline())

    def wait(self) -> tuple[int, str, str]:
        code = int(self.server.stdout.readline())
        read = [Path(f"{self.log}.{end}").read_text(errors="replace") for end in ("out", "err")]
        return code, *read

    def run(self, *job, **more) -> tuple[int, str, str]:
        self.start(*job, **more)
        return self.wait()

    def operations(self) -> int:
        """How many operations on files the last job made."""
        return int(Path(f"{self.log}.operations").read_text())

    def kill_after(self, seconds: float, *job) -> tuple[int, str, str]:
        pid = self.start(*job)
        time.sleep(seconds)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it was faster
            pass
        return self.wait()


@pytest.fixture(scope="session")
def forge(tmp_path_factory):
    forge = Forge(tmp_path_factory.mktemp("forge"))
    yield forge
    forge.server.stdin.close()
    forge.server.wait()


def told_in_one_line(code: int, err: str, *words: str) -> bool:
    """Whether a mistake was told as all are: exit code 2, one line, these words in it, no control characters."""
    line = err.removesuffix("\n")
    return code == 2 and line.startswith("error: ") and line.isprintable() and all(word in line for word in words)


def end_of(folder: Path) -> dict:
    """What must be the same at the end of a run however often it was killed: all files, but for the times in
    metrics.jsonl and how it was started (--resume, --overwrite)."""
    files = contents(folder)
    for name in [name for name in files if name.endswith("config.json")]:
        config = json.loads(files[name])
        for how in ("resume", "overwrite", "out"):
            config["arguments"].pop(how)
        files[name] = config
    files["metrics.jsonl"] = read_metrics(folder, "seconds")
    return files
