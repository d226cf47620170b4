"""Draw the training curves of runs, and rewards against KL.

    nanopost plot out/*                                   everything in out/ that can be drawn -> out/plots/*.png
    nanopost plot out/ppo out/ppo-beta0 --out plots       two runs of PPO in one picture -> plots/ppo.png
    nanopost plot out/kl.json                             a report of nanopost evaluate -> out/plots/kl.png

There is one picture per method, with all its runs. In the picture of a report, each run is a line through the models
that it kept (--keep-every N): solid is the gold reward, which no training saw, dashed is the reward model's score.
Where they part, the reward model is being hacked (Gao et al., arXiv 2210.10760). Needs matplotlib, the extra [plot].
"""

import json
import math
import os
from dataclasses import dataclass

from nanopost.config import UserError, clean
from nanopost.files import atomic
from nanopost.records import parse_records
from nanopost.tools import at

# What matters for each method: (title, metric in training, held-out metric), at most three panels per row.
PAIR_LOSS = ("loss, nats per pair", "loss", "eval/loss")
PANELS = {
    "sft": [("loss, nats per token", "loss", "eval/loss"), ("gradient norm", "grad_norm", "")],
    "rm": [PAIR_LOSS, ("accuracy", "accuracy", "eval/accuracy"), ("margin", "margin", "eval/margin")],
    "dpo": [
        PAIR_LOSS,
        ("accuracy of the implicit reward", "rewards/accuracies", "eval/rewards/accuracies"),
        ("margin of the implicit reward", "rewards/margins", "eval/rewards/margins"),
        ("log-probability of the chosen, held out", "", "eval/logps/chosen"),  # in training it is mostly length
        ("log-probability of the rejected, held out", "", "eval/logps/rejected"),
        ("gradient norm", "grad_norm", ""),
    ],
    "ppo": [
        ("score", "objective/scores", "eval/scores"),
        ("KL to the reference, nats per answer", "objective/kl", "eval/kl"),
        ("entropy, nats per answer", "objective/entropy", "eval/entropy"),
        ("share of tokens clipped", "policy/clipfrac", ""),
        ("explained variance of the values", "val/explained_variance", ""),
        ("length, tokens", "response/length", ""),
    ],
}
PANELS["ipo"] = [("loss, squared nats per pair", "loss", "eval/loss"), *PANELS["dpo"][1:]]
PANELS["grpo"] = [*PANELS["ppo"][:4], ("share of groups with equal scores", "groups/equal", ""), PANELS["ppo"][5]]
STYLES = dict(ls="-"), dict(ls="--", mfc="white")  # solid, dashed


@dataclass
class Config:
    what: list[str]  # folders of runs, and reports of nanopost evaluate (.json); anything else is skipped
    out: str = "out/plots"  # folder for the pictures


def read_run(folder: str) -> tuple[str, list[dict]] | None:
    """(method, logged steps) of a run, or None if the folder holds no metrics of a method in PANELS.

    The method stands in the first line of metrics.jsonl. Raises UserError for a broken line, or what is no number.
    """
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        whole = [line for line in f if line.endswith(b"\n")]  # the last one may be being written, or was cut off
    lines = list(parse_records(path, whole))
    method = lines[0][1].get("method") if lines else None
    if not isinstance(method, str) or method not in PANELS:
        return None
    return method, [check_numbers(where, line) for where, line in lines if line.get("step") is not None]


def read_report(path: str) -> list[dict] | None:
    """The rows of a report of nanopost evaluate that can be drawn, or None if there are none.

    Greedy answers and best of n have no KL, and no place in the picture. Raises UserError for what is no number
    in them."""
    if os.path.exists(path) and not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)["rows"]
        rows = [row for row in rows if row.get("kl") is not None and row.keys() & {"gold", "reward"}]
        rows = [row for row in rows if isinstance(row.get("stage"), str)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return [check_numbers(f"{path}: {row['stage']}", row) for row in rows] or None


def check_numbers(where: str, row: dict) -> dict:
    """The row, whose values are numbers, or null for one that is undefined; the stage of a report is its name."""
    for name, x in row.items():
        if name != "stage" and x is not None and not (isinstance(x, (int, float)) and abs(x) < 1e300):
            raise UserError(f"{where}: {name} must be a finite number, not {json.dumps(x)[:40]}")
    return row


def series(rows: list[dict], y: str, x: str = "step") -> tuple[list, list]:
    """(xs, ys) of the rows that have a y."""
    points = [(row[x], row[y]) for row in rows if row.get(y) is not None]
    return [x for x, _ in points], [y for _, y in points]


def suffix(row: dict) -> str:
    """What the stage of this row ends with for its temperature; reports of before there were several have none."""
    return at(1 if row.get("temperature") is None else row["temperature"])


def trajectories(rows: list[dict]) -> dict[str, list[dict]]:
    """{run: its rows in the order of training}: "ppo/step-5" and "ppo/step-10" come before "ppo", their end.

    A run with kept copies starts at the reference, at a KL of 0; any other run is a single point. Each temperature has
    a line of its own, "ppo@0.5", which starts at the reference of that temperature.
    """
    runs = {}
    for row in rows:
        run, _, step = row["stage"].removesuffix(suffix(row)).partition("/step-")
        runs.setdefault(run + suffix(row), {})[float(step) if step.isdecimal() else math.inf] = row
    runs = {run: [points[step] for step in sorted(points)] for run, points in runs.items()}
    reference = [row["stage"] for row in rows if row["kl"] == 0][:1]  # no other model is at exactly 0
    for run, points in runs.items():
        if len(points) > 1:
            start = [stage + suffix(points[0]) for stage in reference]
            runs[run] = [row for row in rows if row["stage"] in start and row not in points] + points
    return runs


def draw(panels: list[tuple], runs: dict[str, list[dict]], x: str, labels: tuple[str, str]):
    """A figure with a panel for each (title, solid, dashed), two names of series over x. One colour per run.

    labels: what solid and dashed mean. The legend stands below the panels, where it hides nothing.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: only files, no window, no global state
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError('plots need matplotlib: pip install matplotlib (or "nanopost[plot]")') from None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (title, *names) in zip(axes.flat, panels, strict=True):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(x)
        for i, lines in enumerate(runs.values()):
            for name, style in zip(names, STYLES):
                xs, ys = series(lines, name, x)
                if xs:  # single points lie on top of the lines
                    dots = dict(marker="o" if len(xs) <= 20 else "", ms=4, zorder=3 + (len(xs) == 1))
                    ax.plot(xs, ys, color=f"C{i}", clip_on=False, **dots, **style)
    names = [clean(run).replace("$", r"\$") for run in runs]  # text between two $ would be mathematics
    handles = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(names)]
    handles += [Line2D([], [], color="black", label=label, **style) for label, style in zip(labels, STYLES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    return figure


def draw_method(method: str, runs: dict[str, list[dict]]):
    return draw(PANELS[method], runs, "step", ("training", "held out"))


def draw_kl(rows: list[dict]):
    """Gold reward and score against KL, on a square-root axis as in Gao et al."""
    figure = draw([("", "gold", "reward")], trajectories(rows), "kl", ("gold reward", "reward model's score"))
    figure.set_size_inches(7, 4.4)
    [ax] = figure.axes
    # an estimate near 0 may come out below it, and is drawn at 0
    ax.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x**2))
    ax.set_xlim(left=0)
    ax.set_xlabel("KL(policy || reference), nats per answer (square-root axis)")
    ax.set_ylabel("reward")
    return figure


def short_name(path: str, taken) -> str:
    """The last part of a path, or all of it if that is taken."""
    path = os.path.normpath(path).removesuffix(".json")
    name = os.path.basename(path)
    return path.replace(os.sep, "-") if name in taken else name


def main(config: Config):
    runs, figures = {}, {}
    for path in config.what:
        if run := read_run(path):
            method, lines = run
            several = runs.setdefault(method, {})
            several[short_name(path, several)] = lines
        elif rows := read_report(path):
            figures[short_name(path, [*PANELS, *figures])] = draw_kl(rows)
        else:
            print(clean(f"skipped {path}"))
    figures |= {method: draw_method(method, several) for method, several in runs.items()}
    if not figures:
        raise UserError("nothing to draw: give folders of runs (with metrics.jsonl) or reports of nanopost evaluate")

    os.makedirs(config.out, exist_ok=True)
    for name, figure in figures.items():
        path = os.path.join(config.out, f"{name}.png")
        with atomic(path, "wb") as f:
            figure.savefig(f, format="png", dpi=110, metadata={"Software": None})  # the same bytes for the same numbers
        print(clean(f"wrote {path}"))
