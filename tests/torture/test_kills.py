"""Killed whenever, on a full disk or not: a run goes on and ends with the same bits; no folder is ever in between."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, SCRIPTS, contents, write_lines
from nanopost.checkpoint import load_model
from nanopost.config import UserError
from torture.conftest import command_line, end_of, told_in_one_line

OPTIONS = dict(steps=6, save_every=2, keep_every=3, valid="")
EXTRA = {"ppo": dict(kl_target=0.5, kl_horizon=20)}


class Finished:
    """What a run ends as that nobody kills, and another run in whose place it may be made."""

    def __init__(self, script: str, workshop, folder, forge):
        self.script = script
        self.workshop = workshop
        self.wanted = folder / "wanted"
        self.earlier = folder / "earlier"
        forge.run(*self.job(self.earlier, seed=1))
        begun = time.time()
        forge.run(*self.job(self.wanted))
        self.seconds = time.time() - begun
        self.operations = forge.operations()
        assert (self.wanted / "config.json").exists() and (self.earlier / "config.json").exists()

    def job(self, out, **options):
        """(file, arguments, out) of the forge."""
        options = OPTIONS | EXTRA.get(self.script, {}) | {"init": self.workshop.path("dropout")} | options
        return f"train_{self.script}.py", command_line(self.workshop.config(self.script, out, **options)), out


@pytest.fixture(scope="session")
def finished(workshop, tmp_path_factory, forge):
    """finished("sft"), made once."""

    @functools.cache
    def make(script):
        return Finished(script, workshop, tmp_path_factory.mktemp(script), forge)

    return make


class Chain:
    """A run that is started, killed and resumed until it ends. earlier: there is another run in its folder."""

    def __init__(self, finished: Finished, earlier: bool, out, forge):
        self.finished = finished
        self.earlier = earlier
        self.out = out
        self.forge = forge
        self.start = finished.job(out, overwrite=True)
        self.resume = finished.job(out, overwrite=False, resume=True)

    def again(self):
        """Everything as before the start."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.earlier:
            shutil.copytree(self.finished.earlier, self.out)

    def check(self):
        """The folder and its copies hold a whole model each, or none; a whole one is the earlier one or the new one."""
        for folder in [self.out, *self.out.glob("step-*")]:
            try:
                load_model(str(folder), reward=None)
            except UserError as error:
                assert "no finished model" in str(error) or "no folder" in str(error), error
        if (self.out / "config.json").exists():
            models = [folder / "model.pt" for folder in (self.finished.earlier, self.finished.wanted)]
            assert (self.out / "model.pt").read_bytes() in [model.read_bytes() for model in models]

    def finish(self):
        """Resumes the run; where only the earlier one is left, which --resume must not take for this one, starts it."""
        code, _, err = self.forge.run(*self.resume)
        if code != 0 and self.earlier:
            assert told_in_one_line(code, err, "seed"), err
            code, _, err = self.forge.run(*self.start)
        assert (code, err) == (0, "")
        assert end_of(self.out) == end_of(self.finished.wanted)


@pytest.fixture
def chain(request, finished, tmp_path, forge):
    script, earlier = request.param
    return Chain(finished(script), earlier, tmp_path / "out", forge)


every_chain = pytest.mark.parametrize(
    "chain",
    [(script, earlier) for script in SCRIPTS for earlier in (False, True)],
    ids=lambda p: f"{p[0]}-{'over an earlier run' if p[1] else 'fresh'}",
    indirect=True,
)


@every_chain
def test_killed_at_random_moments_it_ends_with_the_same_bits(chain, rng, times):
    for _ in range(times):
        chain.again()
        command = chain.start
        for _ in range(rng.randint(1, 3)):
            code, _, err = chain.forge.kill_after(rng.uniform(0, chain.finished.seconds), *command)
            assert code in (0, -signal.SIGKILL) or (chain.earlier and told_in_one_line(code, err, "seed")), err
            chain.check()
            command = chain.start if code == 2 else chain.resume
        chain.finish()


@every_chain
def test_killed_before_an_operation_on_a_file_it_ends_with_the_same_bits(chain, rng, times):
    operations = range(1, chain.finished.operations + 1)
    for n in rng.sample(operations, min(times, len(operations))):
        chain.again()
        assert chain.forge.run(*chain.start, dies_before=n)[0] == -signal.SIGKILL, n
        chain.check()
        chain.finish()


@every_chain
def test_on_a_full_disk_it_stops_with_one_line_and_goes_on_when_there_is_room(chain, rng, times):
    largest = max(map(len, contents(chain.finished.wanted).values()))
    for _ in range(times):
        chain.again()
        limit = rng.randrange(largest)
        code, _, err = chain.forge.run(*chain.start, limit=limit)
        assert told_in_one_line(code, err, "File too large", str(chain.out)), (limit, err)
        assert not list(chain.out.rglob("*.tmp"))
        chain.check()
        chain.finish()


def tool(name, workshop, out):
    """(file, arguments) of a command that writes into the folder `out`."""
    sft, rm, prompts = (workshop.path(part) for part in ("sft", "rm", "prompts.jsonl"))
    few = ["--prompts", prompts, "--max-new-tokens", 8, "--device", "cpu"]
    task = [{"instruction": f"Count to {i}.", "input": "", "output": f"To {i}."} for i in range(20)]
    report = json.dumps({"rows": [{"stage": "a", "kl": 1.0, "gold": 1.0}]})
    return {
        "sample": ("nanopost/__main__.py", ["sample", sft, *few, "--out", out / "samples.jsonl"]),
        "evaluate": (
            "nanopost/__main__.py",
            ["evaluate", sft, "--reference", sft, "--reward", rm, *few, "--json", out / "report.json"],
        ),
        "export": ("nanopost/__main__.py", ["export", sft, out / "hf"]),
        "plot": ("nanopost/__main__.py", ["plot", write_lines(out.parent / "kl.json", [report]), "--out", out]),
        "alpaca": ("data/alpaca/prepare.py", ["--file", write_lines(out.parent / "task", task), "--out", out]),
        "sums": ("data/notes/sums.py", ["--out", out]),
    }[name]


@pytest.mark.parametrize("name", ["sample", "evaluate", "export", "plot", "alpaca", "sums"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_tool_on_a_full_disk_stops_with_one_line_and_loses_nothing(
    workshop, tmp_path, forge, rng, times, name, earlier
):
    if times == 1 and not earlier:
        pytest.skip("with an earlier file is enough in small")
    for package in {"export": ["transformers"], "plot": ["matplotlib"]}.get(name, []):
        pytest.importorskip(package)
    out = tmp_path / "out"
    out.mkdir()
    file, arguments = tool(name, workshop, out)
    if earlier:
        assert forge.run(file, arguments, out)[0] == 0
    before = contents(out)
    limit = 2000 if name == "export" else rng.randrange(100)  # in the middle of its weights
    code, _, err = forge.run(file, arguments, out, limit=limit)
    assert told_in_one_line(code, err), err
    assert contents(out) == before


def test_the_second_of_two_runs_in_one_folder_is_refused_and_the_first_goes_on(finished, tmp_path, forge, command):
    out = tmp_path / "out"
    file, arguments, _ = job = finished("sft").job(out)
    pid = forge.start(*job)
    for _ in range(1000):
        if (out / "metrics.jsonl").exists():
            break
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    try:
        before = contents(out)
        code, _, err = command(file, *arguments)
        assert told_in_one_line(code, err, str(out)), err
        assert contents(out) == before
    finally:
        os.kill(pid, signal.SIGCONT)
        ended = forge.wait()
    assert ended[0] == 0 and end_of(out) == end_of(finished("sft").wanted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_so_it_is_for_processes_from_the_command_line(script, workshop, tmp_path, rng, times):
    if times == 1 and script != "sft":
        pytest.skip("one is enough in small")
    wanted = workshop.run(script, tmp_path / "wanted", **OPTIONS)
    for i in range(max(1, times // 8)):
        out = tmp_path / str(i)
        options = dict(overwrite=False, **OPTIONS)
        for resume in (False, True):
            arguments = command_line(workshop.config(script, out, resume=resume, **options))
            process = subprocess.Popen(
                [sys.executable, f"train_{script}.py", *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: threads change the last bits
                stdout=subprocess.PIPE,
                text=True,
            )
            if not resume:
                for line in process.stdout:
                    if " steps on " in line:  # the loop begins
                        break
                time.sleep(rng.uniform(0, 0.5))
                process.kill()
            process.communicate()
        assert process.returncode == 0 and end_of(out) == end_of(wanted)
