"""`nanopost versus`: its statistics on known numbers and by simulation; runs that are reused, killed, broken."""

import contextlib
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from statistics import fmean

import pytest
import torch

from conftest import ROOT, contents
from nanopost import trials
from nanopost.config import UserError
from nanopost.paired import at_equal_kl, compare, detectable_shift, t_quantile, value_at, within
from nanopost.tools import evaluate, versus

# ------------------------------------------------------------------------------------------------------ statistics

TABLE = {  # quantiles of Student's t as tables print them: degrees of freedom, then 0.8, 0.95, 0.975, 0.995
    1: (1.376, 6.314, 12.706, 63.657),
    2: (1.061, 2.920, 4.303, 9.925),
    3: (0.978, 2.353, 3.182, 5.841),
    4: (0.941, 2.132, 2.776, 4.604),
    5: (0.920, 2.015, 2.571, 4.032),
    9: (0.883, 1.833, 2.262, 3.250),
    10: (0.879, 1.812, 2.228, 3.169),
    30: (0.854, 1.697, 2.042, 2.750),
    120: (0.845, 1.658, 1.980, 2.617),
}


@pytest.mark.parametrize("df", TABLE)
def test_quantiles_are_those_of_the_tables(df):
    for p, expected in zip((0.8, 0.95, 0.975, 0.995), TABLE[df]):
        assert t_quantile(p, df) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 20])
def test_the_distribution_is_the_integral_of_its_density(df):
    x = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    constant = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    density = constant * (1 + x**2 / df) ** (-(df + 1) / 2)
    assert within(3.0, df) == pytest.approx(torch.trapezoid(density, x).item(), abs=1e-7)


A, B = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 5.0, 4.0, 8.0]  # differences 1, 2, 2, 0, 3: mean 1.6, variance 1.3


def test_the_interval_is_that_of_the_paired_t_test_by_hand():
    error = math.sqrt(1.3 / 5)
    result = compare(A, B)
    assert result["differences"] == [1, 2, 2, 0, 3]
    assert result["difference"] == pytest.approx(1.6)
    assert result["low"] == pytest.approx(1.6 - 2.776445 * error, abs=1e-5)
    assert result["high"] == pytest.approx(1.6 + 2.776445 * error, abs=1e-5)
    assert result["detectable"] == pytest.approx(detectable_shift(4) * error)
    assert result["verdict"] == "b"


def test_the_verdict_is_for_the_better_side_or_for_none():
    assert compare(B, A)["verdict"] == "a"
    assert compare(A, B, higher_is_better=False)["verdict"] == "a"
    assert compare(B, A, higher_is_better=False)["verdict"] == "b"
    assert compare(A[:4], B[:4])["verdict"] == "none"  # differences 1, 2, 2, 0: mean 1.25, t = 2.6 < 3.18


def test_the_detectable_difference_is_that_of_the_tables_of_power():
    """The pairs that an effect of d standard deviations needs: two-sided, 5%, power 80% (Cohen; G*Power)."""
    for d, pairs in ((0.2, 199), (0.5, 34), (0.8, 15)):
        small, enough = (detectable_shift(n - 1) / math.sqrt(n) for n in (pairs - 1, pairs))
        assert enough <= d < small


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_equal_differences_have_no_spread_to_judge_by(shift):
    result = compare([0.1, 0.2, 0.3], [0.1 + shift, 0.2 + shift, 0.3 + shift])
    assert result["verdict"] == "none" and result["low"] == result["high"] == pytest.approx(shift)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_of_equal_commands_5_percent_get_a_verdict_and_of_detectable_differences_80(n):
    """The values of a pair share what the seed does to both; the rest is independent, with standard deviation 1."""
    chance, times = random.Random(n), 4000

    def verdicts(shift):
        found = []
        for _ in range(times):
            shared = [chance.gauss(0, 3) for _ in range(n)]
            a, b = ([x + chance.gauss(0, 1) for x in shared] for _ in range(2))
            found.append(compare(a, [x + shift for x in b])["verdict"])
        return [found.count(verdict) / times for verdict in ("a", "b")]

    assert sum(verdicts(0.0)) == pytest.approx(0.05, abs=0.011)  # 3 standard errors
    right = verdicts(detectable_shift(n - 1) * math.sqrt(2 / n))[1]
    assert right == pytest.approx(0.8, abs=0.02)


def test_the_metric_at_a_kl_is_interpolated_along_its_square_root():
    curve = [(1.0, 0.0), (4.0, 2.0), (9.0, 3.0)]
    assert value_at(curve, 1.0) == 0.0 and value_at(curve, 9.0) == 3.0
    assert value_at(curve, 2.25) == pytest.approx(1.0)  # half way from 1 to 2
    assert value_at(curve, 6.25) == pytest.approx(2.5)
    assert value_at([(-0.01, 1.0), (4.0, 2.0)], 1.0) == pytest.approx(1.5)
    assert value_at([(1.0, 5.0), (1.0, 6.0), (2.0, 7.0)], 1.0) == 5.0
    with pytest.raises(ValueError):
        value_at(curve, 10.0)


def test_a_run_that_returns_to_a_kl_counts_where_it_first_reaches_it():
    assert value_at([(0.0, 0.0), (4.0, 2.0), (1.0, 8.0)], 1.0) == pytest.approx(1.0)


def test_at_equal_kl_both_are_compared_at_the_largest_kl_that_all_reach():
    a = [[(0.0, 0.0), (4.0, 2.0)], [(0.0, 0.0), (9.0, 3.0)]]
    b = [[(0.0, 0.0), (16.0, 8.0)], [(0.0, 0.0), (16.0, 12.0), (9.0, 0.0)]]
    result = at_equal_kl(a, b)
    assert result["kl"] == 4.0 and result["differences"] == pytest.approx([4.0 - 2.0, 6.0 - 2.0])
    assert result == {"kl": 4.0} | compare([2.0, 2.0], [4.0, 6.0])
    assert at_equal_kl(a, b, higher_is_better=False)["verdict"] in ("a", "none")


def test_without_copies_or_without_an_overlap_the_reason_is_told():
    run = [(1.0, 0.0), (2.0, 1.0)]
    assert "--keep-every" in at_equal_kl([run, run], [run, run[1:]])["reason"]
    beyond = [(3.0, 0.0), (5.0, 1.0)]
    reason = at_equal_kl([run, run], [beyond, beyond])["reason"]
    assert "do not overlap" in reason and "1.00 to 2.00" in reason and "3.00 to 5.00" in reason


# ---------------------------------------------------------------------------------------------------- the processes

# A training script that draws its result, and may first wait, fail or be killed.
SCRIPT = """
import json, os, random, signal, time
from dataclasses import dataclass
from pathlib import Path
from nanopost.config import UserError, cli

@dataclass
class Config:
    lift: float = 0.0
    fails: bool = False
    dies: bool = False  # the first time, with seed 1
    waits: float = 0.0  # seconds
    seed: int = 0
    out: str = "out/drawn"
    resume: bool = False
    keep_every: int = 0

    def __post_init__(self):
        if self.lift < 0:
            raise UserError("--lift must not be negative")

def main(config):
    folder = Path(config.out)
    folder.mkdir(exist_ok=True)
    if config.waits:
        import fcntl
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(folder / "starts", "a") as f:
        print(os.environ["OMP_NUM_THREADS"], config.resume, file=f)
    time.sleep(config.waits)
    print("drawing")
    if config.fails and config.seed == 1:
        raise UserError("no luck with seed 1")
    if config.dies and config.seed == 1 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    score = random.Random(f"{config.seed} {config.lift}").gauss(config.lift, 1)
    lines = [{"method": "drawn"}, {"step": 1, "seconds": 0, "score": 99, "loss": 1}, {"step": 2, "seconds": 0, "score": score}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    (folder / "config.json").write_text("{}")

if __name__ == "__main__":
    cli(main, Config)
"""  # noqa: E501


def draw(seed, lift=0.0):
    return random.Random(f"{seed} {lift}").gauss(lift, 1)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "drawn.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def run(tool, tmp_path, script):
    """run("", "--lift 2", "--seeds", 3) compares drawn.py with options -> (exit code, stdout, stderr, report)."""

    def start(a, b, *arguments):
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        words = [f"{script} {a}", f"{script} {b}", "--metric", "score", "--out", tmp_path / "out", "--json", report]
        result = tool("versus", *words, *arguments)
        return *result, json.loads(report.read_text()) if report.exists() else None

    return start


def starts(tmp_path) -> dict:
    """{folder of a run: how often it was started}"""
    found = {}
    for path in (tmp_path / "out").glob("*/seed*/starts"):
        lines = path.read_text().splitlines()
        assert set(lines) <= {"1 True"}  # one thread, --resume
        if lines:
            found["/".join(path.parts[-3:-1])] = len(lines)
    return found


def test_the_report_holds_every_seed_the_interval_and_the_verdict(run, tmp_path):
    code, out, err, report = run("", "--lift 20", "--seeds", 3)
    assert (code, err) == (0, "")
    a, b = ([draw(seed, lift) for seed in range(3)] for lift in (0.0, 20.0))
    assert report == {
        "a": f"{tmp_path / 'drawn.py'} ",
        "b": f"{tmp_path / 'drawn.py'} --lift 20",
        "seeds": [0, 1, 2],
        "metric": "score",
        "better": "higher",
        **compare(a, b),
        "equal_kl": {"reason": report["equal_kl"]["reason"]},
        "runs": {
            "a": [{"seed": seed, "score": x} for seed, x in enumerate(a)],
            "b": [{"seed": seed, "score": x} for seed, x in enumerate(b)],
        },
    }
    assert report["verdict"] == "b" and "Verdict: b is better than a by score" in out
    assert f"| mean | {fmean(a):.4g} " in out and "not compared at equal KL" in out
    progress = [line for line in out.splitlines() if line[1:4] == "/6 "]
    assert len(progress) == 6 and all("min left" in line for line in progress)
    assert len(starts(tmp_path)) == 6


def test_of_the_other_commands_the_lower_value_is_better_if_it_is_said_so(run):
    code, out, _, report = run("", "--lift 20", "--seeds", 3, "--better", "lower")
    assert report["verdict"] == "a" and "b is worse than a" in out and code == 0
    assert versus.Config("a", "b", metric="eval/loss").better == "lower"
    assert versus.Config("a", "b", metric="kl").better == "lower"
    assert versus.Config("a", "b", metric="eval/accuracy").better == "higher"


def test_what_is_there_is_not_made_again_and_other_code_or_options_are(run, script, tmp_path):
    first = run("", "--lift 2", "--seeds", 2)
    again = run("", "--lift 2", "--seeds", 2)
    assert again[3] == first[3] and first[1].count("it was there") == 0
    assert list(starts(tmp_path).values()) == [1] * 4
    assert again[1].count("it was there") == 4
    run("--lift 3", "--lift 2", "--seeds", 3)  # two new runs of lift 3, and the third seeds
    assert list(starts(tmp_path).values()) == [1] * 8
    script.write_text(SCRIPT.replace("class Config:", "class Config:  # a comment"))
    assert run("", "--lift 2", "--seeds", 2)[3] == first[3] and len(starts(tmp_path)) == 8
    script.write_text(SCRIPT.replace("gauss(config.lift, 1)", "gauss(config.lift, 2)"))
    assert run("", "--lift 2", "--seeds", 2)[3]["a"] == first[3]["a"] and len(starts(tmp_path)) == 12


def test_other_inputs_are_another_run(script, tmp_path):
    script.write_text(SCRIPT.replace("lift: float = 0.0", "lift: float = 0.0\n    data: str = ''"))
    (tmp_path / "x.jsonl").write_text("1")
    command = f"{script} --data {tmp_path / 'x.jsonl'}"

    def folders():
        return {trial.folder for trial in trials.read_command(command, "a", "out", 2)[0]}

    before = folders()
    assert folders() == before and len(before) == 2
    (tmp_path / "x.jsonl").write_text("2")
    assert folders().isdisjoint(before)


def test_the_same_command_is_compared_with_itself_over_other_seeds(run):
    code, _, err, _ = run("", "", "--seeds", 2)
    assert code == 2 and err.endswith("give one of them --seed 2 to compare it with itself\n")
    assert run("", "--seed 1", "--seeds", 2)[0] == 2  # seed 1 is in both
    code, out, _, report = run("", "--seed 2", "--seeds", 2)
    assert code == 0 and [row["seed"] for row in report["runs"]["b"]] == [2, 3]
    assert report["runs"]["b"][0]["score"] == draw(2) and "| 0 and 2 |" in out


def test_copies_are_kept_where_a_command_does_not_say():
    [trial], options = trials.read_command("train_dpo.py --beta 0.2", "a", "out", 1, keep_every=7)
    assert (options.keep_every, options.beta, trial.seed) == (7, 0.2, 0)
    assert trials.read_command("train_dpo.py --keep-every 3", "a", "out", 1, keep_every=7)[1].keep_every == 3


def test_a_run_that_fails_ends_it_with_the_end_of_its_log_and_the_others_are_kept(run, tmp_path):
    code, out, err, report = run("--fails", "", "--seeds", 2, "--jobs", 1)
    assert code == 2 and report is None and len(err.splitlines()) == 1
    assert "failed with exit code 2: no luck with seed 1" in err and "seed1.log" in err
    assert "drawing\nerror: no luck with seed 1" in out
    before = starts(tmp_path)
    assert run("", "--lift 1", "--seeds", 2)[0] == 0
    assert all(before.get(name, 1) == times for name, times in starts(tmp_path).items() if name.endswith("seed0"))


def test_a_run_that_is_killed_goes_on_when_the_command_is_given_again(run, tmp_path):
    expected = run("--lift 1", "", "--seeds", 3)[3]
    code, _, err, report = run("--lift 1 --dies", "--dies", "--seeds", 3)
    assert code == 2 and report is None and "failed with exit code -9" in err
    times = 1
    while code and times < 4:  # each side has a run that dies
        times += 1
        code, _, _, report = run("--lift 1 --dies", "--dies", "--seeds", 3)
    assert report | {"a": "", "b": ""} == expected | {"a": "", "b": ""}
    assert max(starts(tmp_path).values()) > 1


@pytest.mark.slow
def test_killed_itself_and_given_again_it_waits_for_what_is_still_running(run, script, tmp_path):
    pytest.importorskip("fcntl")
    expected = run("--lift 1", "", "--seeds", 2)[3]
    words = [f"{script} --lift 1 --waits 2", f"{script} --waits 2", "--metric", "score", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanopost", "versus", *map(str, words), "--seeds", "2"],
        cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while len(starts(tmp_path)) < 6:  # two of four are at work
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, out, err, report = run("--lift 1 --waits 2", "--waits 2", "--seeds", 2)
    assert (code, err) == (0, "") and out.count("waiting for another process") == 2
    assert report | {"a": "", "b": ""} == expected | {"a": "", "b": ""}
    assert list(starts(tmp_path).values()) == [1] * 8


def test_interrupted_it_stops_what_it_started(run, script, tmp_path, monkeypatch):
    def interrupt(futures):
        while not starts(tmp_path):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "as_completed", interrupt)
    code, _, err, report = run("--waits 60", "--lift 1 --waits 60")
    assert code == 130 and "interrupted" in err and report is None
    assert not list((tmp_path / "out").glob("*/seed*/config.json"))  # else it waited for the end of the runs


# ----------------------------------------------------------------------------------------------------------- policies


class OneByOne(contextlib.nullcontext):
    """A pool without threads: what is submitted is done at once."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **options):
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs scripts and tools without starting Python for each, and without threads: all share sys.stdout."""

    pool = OneByOne()
    pool.enter_result = pool

    def execute(self, what, words, log):
        monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "a") as f, contextlib.redirect_stdout(f):
            try:
                path = ROOT / "nanopost" / "__main__.py" if words[0] == "-m" else words[0]
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                assert not end.code

    monkeypatch.setattr(trials.Runner, "execute", execute)
    monkeypatch.setattr(trials, "ThreadPoolExecutor", lambda jobs: pool)


@pytest.fixture
def policies(workshop, tmp_path):
    """The arguments that compare DPO at two learning rates on the workshop."""
    path = workshop.path
    common = f"train_dpo.py --init {path('sft')} --data {path('pairs.jsonl')} --valid '' --batch-size 8 --device cpu"
    common += " --steps 6 --log-every 1"
    judges = ["--reward", path("rm"), "--gold", path("reward.py:vowels"), "--prompts", path("prompts_valid.jsonl")]
    few = ["--samples", 1, "--max-new-tokens", 8, "--device", "cpu", "--seeds", 2, "--jobs", 1]
    out = ["--out", tmp_path / "out", "--json", tmp_path / "report.json"]
    return [f"{common} --lr 1e-2", f"{common} --lr 2e-2", *judges, *few, *out]


def test_policies_are_measured_on_the_same_prompts_at_the_end_and_at_equal_kl(
    in_this_process, tool, policies, workshop, tmp_path
):
    code, out, err = tool("versus", *policies, "--keep-every", 2)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metric"] == "gold" and report["seeds"] == [0, 1]
    assert all(f"{name} {side}" in out for name in ("gold", "reward", "kl") for side in "ab")

    # the same as nanopost evaluate of the folders
    trials_of = [trials.read_command(words, "", str(tmp_path / "out"), 2, 2)[0] for words in policies[:2]]
    curves = {}
    for side, (trial, other) in zip("ab", trials_of):
        for row, run in zip(report["runs"][side], (trial, other)):
            folders = [run.folder / f"step-{step}" for step in (2, 4, 6)] + [run.folder]
            config = evaluate.Config(
                [str(folder) for folder in folders], workshop.path("sft"), workshop.path("rm"),
                workshop.path("reward.py:vowels"), workshop.path("prompts_valid.jsonl"), samples=1, max_new_tokens=8,
                device="cpu", json=str(tmp_path / "again.json"),
            )  # fmt: skip
            evaluate.main(config)
            rows = json.loads((tmp_path / "again.json").read_text())["rows"]
            assert row == {"seed": run.seed, **rows[-1]}
            curves.setdefault(side, []).append([(point["kl"], point["gold"]) for point in rows])
    assert report["equal_kl"] == at_equal_kl(curves["a"], curves["b"])

    # all of it is there now: another metric needs no new run
    before = contents(tmp_path / "out")
    code, out, _ = tool("versus", *policies, "--keep-every", 2, "--metric", "reward", "--gold", policies[5])
    assert code == 0 and "by reward" in out and contents(tmp_path / "out") == before


def test_without_a_gold_reward_the_reward_models_score_is_compared(in_this_process, tool, policies, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = tool("versus", *policies, "--gold", "", "--plot", tmp_path / "x.png")
    assert (code, err) == (0, "") and "by reward" in out and "gold" not in out
    assert "not compared at equal KL: a run kept no copies of its model; give --keep-every N" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metric"] == "reward" and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_in_the_figure_every_run_is_a_dot_and_every_difference():
    pytest.importorskip("matplotlib")
    runs = {side: [{"seed": i, "gold": x} for i, x in enumerate(xs)] for side, xs in (("a", A), ("b", B))}
    comparison = compare(A, B)
    report = {"a": "a $x$.py", "b": "b.py", "metric": "gold", "runs": runs, "equal_kl": {"kl": 1.5, **comparison}}
    left, right = versus.draw(report | comparison).axes
    dots = [points for collection in left.collections for points in collection.get_offsets().tolist()]
    assert sorted(dots) == sorted([[0, x] for x in A] + [[1, x] for x in B])
    assert [label.get_text() for label in right.get_xticklabels()] == ["at the end", "at KL 1.50"]
    grey = right.collections[0].get_offsets()[:, 1].tolist()
    assert grey == comparison["differences"]


@pytest.mark.slow
def test_in_a_process_of_its_own_a_run_is_measured_as_in_this_one(policies, workshop, tmp_path, request):
    def rows(out):
        [trial], options = trials.read_command(policies[0], "a", str(tmp_path / out), 1)
        how = dict(gold=workshop.path("reward.py:vowels"), prompts=workshop.path("prompts_valid.jsonl"), device="cpu")
        reference = workshop.path("sft")
        evaluation = evaluate.Config([reference], reference, samples=1, max_new_tokens=8, **how)
        return trials.Runner("gold", evaluation).measure(trial)

    [row] = rows("processes")
    request.getfixturevalue("in_this_process")
    assert [row] == rows("here") and row["seed"] == 0 and row["kl"] > 0


# ---------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "a, arguments, message",
    [
        ("nowhere.py", [], "'nowhere.py': no script nowhere.py; give a training script"),
        ("", [], "'': no script "),
        ("python train_dpo.py", [], "no script python; give a training script"),
        ("train_dpo.py 'x", [], "is no command: No closing quotation"),
        ("train_dpo.py --out x", [], "leave out --out"),
        ("train_dpo.py --overwrite", [], "leave out --overwrite"),
        ("train_dpo.py --resume", [], "leave out --resume"),
        ("train_dpo.py --bta 1", [], "--bta 1 (train_dpo.py --help lists the options)"),
        ("train_dpo.py --beta 0", [], "train_dpo.py: --beta must be above 0"),
        ("docs/quotes.py", [], "docs/quotes.py: it is no training script"),
        ("train_dpo.py", ["--seeds", 1], "--seeds must be at least 2, not 1"),
        ("train_dpo.py", ["--jobs", 0], "--jobs must be at least 1, not 0"),
        ("train_dpo.py", ["--better", "best"], "--better must be higher or lower, not best"),
        ("train_dpo.py", ["--gold", "", "--metric", "gold"], "--metric gold needs --gold"),
        ("train_dpo.py", ["--gold", "", "--metric", "win_rate"], "--metric win_rate needs --gold"),
        ("train_dpo.py", ["--gold", "", "--reward", ""], "--metric reward needs --reward"),
        ("train_dpo.py", ["--plot", "x.jpg"], "--plot must name a .png file, not x.jpg"),
        ("train_dpo.py", ["--json", "nowhere/x.json"], "--json: there is no folder nowhere"),
        ("train_sft.py --init scratch", [], "no folder scratch: give --reference"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_run(tool, tmp_path, a, arguments, message):
    code, out, err = tool("versus", a, "train_dpo.py --beta 0.3", "--out", tmp_path / "out", *arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and message in err, err
    assert not (tmp_path / "out").exists()


def test_a_script_that_is_no_python_is_told_with_its_line(tmp_path):
    (tmp_path / "x.py").write_text("a = 1\ndef\n")
    with pytest.raises(UserError, match=r"x\.py: line 2: invalid syntax"):
        trials.read_command(str(tmp_path / "x.py"), "a", "out", 2)


def test_a_metric_that_is_not_there_is_told_with_those_that_are(run):
    code, _, err, _ = run("", "--lift 1", "--seeds", 2, "--metric", "scroe")
    assert code == 2 and len(err.splitlines()) == 1
    assert "--metric scroe: " in err and "has no such number; it has loss, score" in err


@pytest.mark.slow
def test_a_judge_that_is_missing_is_noticed_before_anything_is_trained(tool, policies, tmp_path):
    code, _, err = tool("versus", *policies, "--reward", "nowhere")
    assert code == 2 and "nanopost evaluate failed with exit code 2: no folder nowhere" in err
    assert not list((tmp_path / "out").glob("train_dpo*"))
