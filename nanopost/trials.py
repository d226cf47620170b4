"""Runs of training commands over seeds, in folders that are named after all that the outcome depends on.

What is there already is not made again: a finished run or report is taken as it is, a run that was killed is resumed.
Another script, another nanopost, other options or inputs have another folder. `nanopost versus` compares such runs.
"""

import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path

from nanopost.checkpoint import Folder
from nanopost.config import UserError, clean, flag, parse
from nanopost.records import read_json, read_records
from nanopost.resume import hash_inputs, meaning
from nanopost.run import Options

PACKAGE = Path(__file__).resolve().parent
UNUSED = {"trials.py", "paired.py"}  # files of the package that no run depends on
FREE = {"seed", "out", "resume", "overwrite", "policies"}  # options that are not part of a folder's name


@dataclass(frozen=True)
class Trial:
    """A run of a command with one seed."""

    name: str  # what it is called in lines of progress
    words: tuple[str, ...]  # the script and its options
    seed: int
    folder: Path

    def finished(self) -> bool:
        return Folder(str(self.folder)).finished()

    def locked(self) -> bool:
        """Whether another process is writing to its folder."""
        folder = Folder(str(self.folder))
        try:
            folder.lock()
        except UserError:
            return True
        folder.unlock()
        return False


def read_command(command: str, name: str, out: str, seeds: int, keep_every: int = 0) -> tuple[list[Trial], object]:
    """The trials of a command, and its options as the script's Config reads them: seeds from its --seed on.

    Raises UserError if it names no training script. A wrong option ends the program as the script itself would.
    """
    try:
        script, *words = shlex.split(command) or [""]
    except ValueError as error:
        raise UserError(f"{command!r} is no command: {error}") from None
    if not script.endswith(".py") or not os.path.isfile(script):
        raise UserError(f"{command!r}: no script {script}; give a training script and its options in quotes")
    if ours := [word for word in words if re.match("--(out|resume|overwrite)(=|$)", word)]:
        raise UserError(f"{command!r}: leave out {ours[0]}; every run has a folder of its own in {out}")
    if keep_every:
        words = [f"--keep-every={keep_every}", *words]  # first, so that the command's own counts
    try:
        options = parse(load_config_class(script), [*words, f"--out={out}/run"], prog=script)
    except UserError as error:
        raise UserError(f"{script}: {error}") from None
    folder = Path(out, f"{Path(script).stem}-{digest(script, options)}")
    numbers = range(options.seed, options.seed + seeds)
    return [Trial(name, (script, *words), seed, folder / f"seed{seed}") for seed in numbers], options


def load_config_class(script: str):
    """The script's Config. Raises UserError if it has none with the options that every training script has."""
    name = "command_" + re.sub(r"\W", "_", script)
    spec = importlib.util.spec_from_file_location(name, script)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    path = sys.path
    sys.path = [os.path.dirname(os.path.abspath(script)), str(PACKAGE.parent), *path]  # as when it is run
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"line {error.lineno}: {error.msg}") from None
    finally:
        sys.path = path
    config_class = getattr(module, "Config", None)
    names = {field.name for field in fields(config_class)} if is_dataclass(config_class) else set()
    if not {"seed", "out", "resume"} <= names:
        raise UserError("it is no training script: it has no Config with seed, out and resume")
    return config_class


@cache
def package_code() -> list[str]:
    return [meaning(path) for path in sorted(PACKAGE.glob("*.py")) if path.name not in UNUSED]


def digest(script: str, options) -> str:
    """A hash of what a script's outcome depends on: its code and the package's, its options and the files they name."""
    code = [meaning(Path(script)), *package_code()]
    settings = {name: value for name, value in asdict(options).items() if name not in FREE}
    inputs = hash_inputs(options, without=Options)
    return hashlib.sha256(json.dumps([code, settings, inputs]).encode()).hexdigest()[:8]


class Runner:
    """Trains and measures, in processes with one thread each.

    A policy is measured by nanopost evaluate with the options `evaluation`; without them, a run by the last number
    called `metric` in its metrics.jsonl.
    """

    def __init__(self, metric: str, evaluation=None):
        self.metric = metric
        self.evaluation = evaluation
        self.hash = digest(inspect.getsourcefile(type(evaluation)), evaluation) if evaluation else ""
        self.processes = set()
        self.stopped = False
        path = [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}

    def execute(self, what: str, words: list[str], log: str):
        """Runs python with these words, and adds what it prints to the log. Raises UserError if it fails, after
        printing the end of the log."""
        if self.stopped:
            raise UserError("stopped")
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "a", encoding="utf-8") as f:
            print("$ python", shlex.join(words), file=f, flush=True)
            streams = {"stdin": subprocess.DEVNULL, "stdout": f, "stderr": subprocess.STDOUT}
            process = subprocess.Popen([sys.executable, *words], env=self.environment, **streams)
        self.processes.add(process)
        code = process.wait()
        self.processes.remove(process)
        if code:
            lines = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
            if not self.stopped:
                print(clean("\n".join(lines[-12:])), flush=True)
            reason = lines[-1].removeprefix("error: ")
            raise UserError(f"{what} failed with exit code {code}: {reason} (the whole log: {log})")

    def train(self, trial: Trial):
        """Makes or resumes the run, unless it is finished. If another process is at work on it, waits for that one."""
        told = False
        while not (trial.finished() or self.stopped):
            if trial.locked():  # by what a killed program has left running, for example
                if not told:
                    print(f"{trial.name}, seed {trial.seed}: waiting for another process in {trial.folder}", flush=True)
                told = True
                time.sleep(1)
                continue
            try:
                words = [*trial.words, f"--seed={trial.seed}", f"--out={trial.folder}", "--resume"]
                self.execute(shlex.join(trial.words), words, f"{trial.folder}.log")
            except UserError:
                if not trial.locked():  # else the other one was first
                    raise

    def report(self, folder) -> Path:
        """The file of an evaluation: another one for other prompts, judges or code."""
        return Path(f"{folder}-{self.hash}.json")

    def measured(self, trial: Trial) -> bool:
        return not self.evaluation or self.report(trial.folder).exists()

    def evaluate(self, folder, policies: list) -> list[dict]:
        """nanopost evaluate's rows of these policies."""
        report = self.report(folder)
        if not report.exists():
            options = {name: x for name, x in vars(self.evaluation).items() if name != "policies"}
            options |= {"json": report, "show": 0}
            words = [*map(str, policies), *(f"{flag(name)}={x}" for name, x in options.items())]
            self.execute("nanopost evaluate", ["-m", "nanopost", "evaluate", *words], f"{folder}.log")
        return read_json(str(report))["rows"]

    def measure(self, trial: Trial) -> list[dict]:
        """A row for each kept copy of the run, in the order of training, and the last one for its end."""
        self.train(trial)
        if not self.evaluation:
            value = last_value(f"{trial.folder}/metrics.jsonl", self.metric)
            return [{"seed": trial.seed, self.metric: value}]
        copies = sorted(trial.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        rows = self.evaluate(trial.folder, [*copies, trial.folder])
        return [{"seed": trial.seed, **row} for row in rows]

    def measure_all(self, trials: list[Trial], jobs: int, describe) -> list[list[dict]]:
        """measure() of each, `jobs` at a time, with a line of progress, describe(row), for each one that is done."""
        new = {trial for trial in trials if not (trial.finished() and self.measured(trial))}
        began, rows = time.time(), {}
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(self.measure, trial): trial for trial in trials}
            try:
                for future in as_completed(futures):
                    trial = futures[future]
                    rows[trial] = future.result()
                    left = "it was there"
                    if trial in new:
                        each = (time.time() - began) / len(new & rows.keys())
                        left = f"about {each * len(new - rows.keys()) / 60:.1f} min left"
                    line = f"{trial.name}, seed {trial.seed}: {describe(rows[trial][-1])} ({left})"
                    print(f"{len(rows)}/{len(trials)}  {line}", flush=True)
            except BaseException:
                self.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.terminate()
                raise
        return [rows[trial] for trial in trials]


def last_value(path: str, metric: str) -> float:
    """The last number of this name in a metrics.jsonl. Raises UserError if there is none."""
    lines = [line for _, line in read_records(path) if "step" in line]
    values = [line[metric] for line in lines if line.get(metric) is not None]
    if not values:
        names = sorted({name for line in lines for name in line} - {"step", "seconds"})
        raise UserError(f"--metric {metric}: {path} has no such number; it has {', '.join(names)}")
    return values[-1]
