"""Is B better than A? Run two training commands over several seeds, and give a verdict.

    nanopost versus "train_dpo.py --beta 0.1" "train_dpo.py --beta 0.3" --seeds 5
    nanopost versus train_dpo.py "forks/train_ipo.py --beta 0.3" --keep-every 50 --plot out/ipo.png --json out/ipo.json
    nanopost versus train_dpo.py "train_dpo.py --seed 100"                               against itself
    nanopost versus train_rm.py "train_rm.py --lr 2e-4" --metric eval/accuracy
    nanopost versus mine.py "mine.py --lr 1e-5" --gold "" --prompts my_prompts.jsonl     by the reward model's score

A command is a training script and its options, without --out. Its runs have the seeds 0, 1, ... (with --seed N: from N
on) and one thread each; all policies answer the same prompts with the same random numbers. Runs that are there already
are used again, and a run that was killed goes on, so an interrupted command can simply be given again.

b - a       the mean difference over the pairs of runs with the same seed, with its 95% interval (Student's t)
detectable  the true difference that would get a verdict 80% of the time, given the spread between these seeds
verdict     one of the two is better if the interval leaves out 0; else they cannot be told apart

The interval is about other seeds, not about other prompts or another model to start from. Where copies of the models
were kept (--keep-every), both sides are also compared at equal KL: the largest that all runs reach, interpolated
between the copies.
"""

import importlib.util
import json
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from nanopost.config import UserError, at_least, clean, flag
from nanopost.files import atomic
from nanopost.huggingface import is_pretrained
from nanopost.paired import at_equal_kl, compare
from nanopost.tools import check_file, evaluate
from nanopost.trials import Runner, read_command

VERDICTS = {"a": "b is worse than a", "b": "b is better than a", "none": "a and b cannot be told apart"}
FORMATS = evaluate.FORMATS | {"gold": ".3f", "reward": ".3f"}


@dataclass
class Config:
    a: str  # the first command, in quotes: a training script and its options
    b: str  # the second command
    seeds: int = 5  # runs of each command
    jobs: int = 2  # runs at a time
    keep_every: int = 0  # steps between two kept copies of a model, where a command does not say; 0: none
    metric: str = ""  # a column of nanopost evaluate, or a number in metrics.jsonl, of which the last one counts
    # empty: gold, or without --gold reward
    better: str = ""  # higher or lower; empty: lower if the metric is a loss or a KL, else higher
    reference: str = ""  # folder of the policy that KL and win rate refer to; empty: the --init of the first command
    reward: str = "out/rm"  # folder of a reward model, or a Python function: file.py:function; empty: none
    gold: str = "data/notes/gold.py:score"  # the true reward, a Python function: file.py:function; empty: none
    prompts: str = "data/notes/prompts_eval.jsonl"  # held-out prompts
    limit: int = 500  # use at most this many prompts
    samples: int = 2  # answers per prompt
    max_new_tokens: int = 80  # the longest answer, in tokens
    device: str = "auto"  # for measuring: auto, cpu, cuda or mps
    out: str = "out/versus"  # folder for the runs
    json: str = ""  # file for the report; empty: only print it
    plot: str = ""  # file for a figure, .png; empty: none

    def __post_init__(self):
        at_least(self, 2, "seeds")  # one has no spread
        at_least(self, 1, "jobs", "limit", "samples", "max_new_tokens")
        at_least(self, 0, "keep_every")
        self.metric = self.metric or ("gold" if self.gold else "reward")
        for metric, judge in {"gold": self.gold, "win_rate": self.gold, "reward": self.reward}.items():
            if self.metric == metric and not judge:
                raise UserError(f"--metric {metric} needs {'--reward' if metric == 'reward' else '--gold'}")
        self.better = self.better or ("lower" if re.search(r"loss|\bkl\b", self.metric) else "higher")
        if self.better not in ("higher", "lower"):
            raise UserError(f"--better must be higher or lower, not {self.better}")


def cell(name: str, x: float, sign: str = "") -> str:
    return f"{x:{sign}{FORMATS.get(name, '.4g')}}"


def columns(row: dict, metric: str) -> list[str]:
    """What is shown of a row: the metric first, then gold, reward and KL."""
    return [name for name in dict.fromkeys([metric, "gold", "reward", "kl"]) if name in row]


def make_report(config: Config, a: list[list[dict]], b: list[list[dict]]) -> dict:
    """a, b: the rows of each run, of its kept copies and, last, of its end; every row has the metric."""
    metric, higher = config.metric, config.better == "higher"
    ends = [[rows[-1] for rows in side] for side in (a, b)]
    result = compare(*([row[metric] for row in side] for side in ends), higher)
    if metric not in FORMATS:
        equal_kl = {"reason": "the numbers in metrics.jsonl are not those of the kept copies"}
    elif metric == "kl":
        equal_kl = {"reason": "the metric is the KL"}
    else:
        curves = [[[(row["kl"], row[metric]) for row in rows] for rows in side] for side in (a, b)]
        equal_kl = at_equal_kl(*curves, higher)
    seeds = [row["seed"] for row in ends[0]]
    head = {"a": config.a, "b": config.b, "seeds": seeds, "metric": metric, "better": config.better}
    return head | result | {"equal_kl": equal_kl, "runs": {"a": ends[0], "b": ends[1]}}


def print_report(report: dict):
    metric, a, b = report["metric"], report["runs"]["a"], report["runs"]["b"]
    names = columns(a[0], metric)
    print(clean(f"\na: {report['a']}\nb: {report['b']}\n"))

    # Every run, and the means
    means = [{name: fmean(row[name] for row in side) for name in names} for side in (a, b)]
    heads = [f"{name} {side}" for name in names for side in "ab"]
    lines = [["seed", *heads[:2], "b - a", *heads[2:]]]
    differences = [*report["differences"], report["difference"]]
    for pair, difference in zip([*zip(a, b), means], differences):
        seeds = dict.fromkeys(str(row.get("seed", "mean")) for row in pair)  # one, if it is the same
        cells = [cell(name, row[name]) for name in names for row in pair]
        lines.append([" and ".join(seeds), *cells[:2], cell(metric, difference, "+"), *cells[2:]])
    print(evaluate.markdown(lines) + "\n")

    # The comparisons
    equal_kl = report["equal_kl"]
    lines = [[metric, "b - a", "95% interval", "detectable", "verdict"]]
    for where, result in compared(report).items():
        difference, low, high = (cell(metric, result[name], "+") for name in ("difference", "low", "high"))
        detectable, verdict = cell(metric, result["detectable"]), VERDICTS[result["verdict"]]
        lines.append([where, difference, f"{low} to {high}", detectable, verdict])
    print(evaluate.markdown(lines) + "\n")
    if "reason" in equal_kl:
        print(f"not compared at equal KL: {equal_kl['reason']}")
    print(f"Verdict: {VERDICTS[report['verdict']]} by {metric} ({report['better']} is better).")


def compared(report: dict) -> dict[str, dict]:
    """The comparisons there are, by where along the runs they were made."""
    equal_kl = report["equal_kl"]
    return {"at the end": report} | ({f"at KL {equal_kl['kl']:.2f}": equal_kl} if "kl" in equal_kl else {})


def draw(report: dict):
    """Every run as a dot, those of a pair connected; and every difference, beside the mean and its interval."""
    from matplotlib.figure import Figure  # not pyplot: only files, no window, no global state

    metric = report["metric"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sides = [[run[metric] for run in report["runs"][side]] for side in "ab"]
    left.plot([0, 1], sides, color="0.8", zorder=1)
    for x, values in enumerate(sides):
        left.scatter([x] * len(values), values, color=f"C{x}", zorder=2)
        left.plot([x - 0.15, x + 0.15], [fmean(values)] * 2, color=f"C{x}")
    left.set(xlim=(-0.5, 1.5), xticks=[0, 1], xticklabels=["a", "b"], ylabel=metric)
    for x, result in enumerate(compared(report).values()):
        right.scatter([x - 0.1] * len(result["differences"]), result["differences"], color="0.6")
        half = result["high"] - result["difference"]
        right.errorbar(x + 0.1, result["difference"], half, color="black", marker="o", capsize=4)
    right.axhline(0, color="0.6", ls=":")
    places = list(compared(report))
    right.set(xlim=(-0.5, len(places) - 0.5), xticks=range(len(places)), xticklabels=places)
    right.set_ylabel(f"{metric}, b - a: mean and 95% interval")
    commands = [textwrap.fill(clean(f"{side}: {report[side]}"), 110) for side in "ab"]
    figure.suptitle("\n".join(commands).replace("$", r"\$"), fontsize=9)  # text between two $ would be mathematics
    return figure


def check_files(config: Config):
    """Raises UserError unless the report and the figure can be written: to be noticed now, not after the runs."""
    for name in ("json", "plot"):
        if path := getattr(config, name):
            check_file(flag(name), path)
            if not Path(path).parent.is_dir():
                raise UserError(f"{flag(name)}: there is no folder {Path(path).parent}")
    if config.plot and not config.plot.endswith(".png"):
        raise UserError(f"--plot must name a .png file, not {config.plot}")
    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError('--plot needs matplotlib: pip install matplotlib (or "nanopost[plot]")')


def main(config: Config):
    check_files(config)
    how = config.out, config.seeds, config.keep_every
    a, of_a = read_command(config.a, "a", *how)
    b, of_b = read_command(config.b, "b", *how)
    if {trial.folder for trial in a} & {trial.folder for trial in b}:
        hint = f"change an option, or give one of them --seed {a[-1].seed + 1}"
        raise UserError(f"both commands make the same runs; {hint} to compare it with itself")

    init, other_init = (getattr(options, "init", "") for options in (of_a, of_b))

    def describe(row):
        return ", ".join(f"{name} {cell(name, row[name])}" for name in columns(row, config.metric))

    # The reference is measured before anything is trained, so that a mistake shows at once
    runner = Runner(config.metric)
    if config.metric in FORMATS:
        reference = config.reference or init
        if not (os.path.isdir(reference) or is_pretrained(reference)):
            raise UserError(f"no folder {reference or repr(reference)}: give --reference the policy that KL refers to")
        names = ("reward", "gold", "prompts", "limit", "samples", "max_new_tokens", "device")
        measuring = {name: getattr(config, name) for name in names}
        runner = Runner(config.metric, evaluate.Config([reference], reference, **measuring))
        [row] = runner.evaluate(f"{config.out}/reference", [reference])
        print(clean(f"reference {reference}: {describe(row)}"), flush=True)
    if init != other_init:
        print(clean(f"note: a starts from {init}, b from {other_init}"))

    trials = [trial for pair in zip(a, b) for trial in pair]
    rows = runner.measure_all(trials, config.jobs, describe)
    report = make_report(config, rows[::2], rows[1::2])
    print_report(report)
    if config.json:
        with atomic(config.json) as f:
            json.dump(report, f, indent=1)
    if config.plot:
        with atomic(config.plot, "wb") as f:
            draw(report).savefig(f, format="png", dpi=110, metadata={"Software": None})
