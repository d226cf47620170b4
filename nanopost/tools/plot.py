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

from nanopost.config import UserError
from nanopost.records import parse_records

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
STYLES = dict(ls="-"), dict(ls="--", mfc="white")  # solid, dashed


@dataclass
class Config:
    what: list[str]  # folders of runs, and reports of nanopost evaluate (.json); anything else is skipped
    out: str = "out/plots"  # folder for the pictures


def read_run(folder: str) -> tuple[str, list[dict]] | None:
    """(method, logged steps) of a run, or None if the folder holds no metrics of a method in PANELS.

    The method stands in the first line of metrics.jsonl. Raises UserError for a broken line.
    """
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        whole = [line for line in f if line.endswith(b"\n")]  # the last one may be being written, or was cut off
    lines = [line for _, line in parse_records(path, whole)]
    method = lines[0].get("method") if lines else None
    return (method, [line for line in lines if "step" in line]) if method in PANELS else None


def read_report(path: str) -> list[dict] | None:
    """The rows of a report of nanopost evaluate that can be drawn, or None if there are none."""
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)["rows"]
        return [row for row in rows if {"stage", "kl"} <= row.keys() and row.keys() & {"gold", "reward"}] or None
    except (IsADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def series(rows: list[dict], y: str, x: str = "step") -> tuple[list, list]:
    """(xs, ys) of the rows that have a y."""
    points = [(row[x], row[y]) for row in rows if row.get(y) is not None]
    return [x for x, _ in points], [y for _, y in points]


def trajectories(rows: list[dict]) -> dict[str, list[dict]]:
    """{run: its rows in the order of training}: "ppo/step-5" and "ppo/step-10" come before "ppo", their end.

    A run with kept copies starts at the reference, at a KL of 0; any other run is a single point.
    """
    runs = {}
    for row in rows:
        run, _, step = row["stage"].partition("/step-")
        runs.setdefault(run, {})[int(step) if step.isdigit() else math.inf] = row
    runs = {run: [points[step] for step in sorted(points)] for run, points in runs.items()}
    reference = [row for row in rows if row["kl"] == 0][:1]  # no other model is at exactly 0
    for run, points in runs.items():
        if len(points) > 1:
            runs[run] = [row for row in reference if row not in points] + points
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
    handles = [Line2D([], [], color=f"C{i}", label=run) for i, run in enumerate(runs)]
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
            print(f"skipped {path}")
    figures |= {method: draw_method(method, several) for method, several in runs.items()}
    if not figures:
        raise UserError("nothing to draw: give folders of runs (with metrics.jsonl) or reports of nanopost evaluate")

    os.makedirs(config.out, exist_ok=True)
    for name, figure in figures.items():
        path = os.path.join(config.out, f"{name}.png")
        figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes for the same numbers
        print(f"wrote {path}")
