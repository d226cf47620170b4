"""Draws what runs logged: one picture a method, several runs of it over each other; and rewards against KL.

    python -m nanopost.plot out/*                                   whatever in out/ can be drawn -> out/plots/*.png
    python -m nanopost.plot out/ppo out/ppo-beta0 --out plots       two runs of PPO to compare -> plots/ppo.png
    python -m nanopost.plot out/kl.json                             a report of nanopost.evaluate -> out/plots/kl.png

In the picture of a report each run is a line through the models that it kept (--keep-every N): solid is the gold
reward, which no training saw, dashed is the reward model's score. Where they part, the reward model is being hacked
(Gao et al., arXiv 2210.10760). Needs matplotlib, the extra [plot]; metrics.jsonl and the reports need nothing.
"""

import json
import os
from dataclasses import dataclass

from nanopost.config import UserError, cli

# what matters for each method: (title, metric in training, metric held out), at most three in a row
PANELS = {
    "sft": [("loss, nats a token", "loss", "eval/loss"), ("gradient norm", "grad_norm", "")],
    "rm": [("loss, nats a pair", "loss", "eval/loss"), ("accuracy", "accuracy", "eval/accuracy"),
           ("margin", "margin", "eval/margin")],
    "dpo": [("loss, nats a pair", "loss", "eval/loss"),
            ("accuracy of the implicit reward", "rewards/accuracies", "eval/rewards/accuracies"),
            ("margin of the implicit reward", "rewards/margins", "eval/rewards/margins"),
            ("log-probability of the chosen, held out", "", "eval/logps/chosen"),  # in training it is mostly length
            ("log-probability of the rejected, held out", "", "eval/logps/rejected"),
            ("gradient norm", "grad_norm", "")],
    "ppo": [("score", "objective/scores", "eval/scores"),
            ("KL to the reference, nats an answer", "objective/kl", "eval/kl"),
            ("entropy, nats an answer", "objective/entropy", "eval/entropy"),
            ("share of tokens clipped", "policy/clipfrac", ""),
            ("explained variance of the values", "val/explained_variance", ""),
            ("length, tokens", "response/length", "")],
}
TELLTALE = {"kl": "ppo", "margins": "dpo", "margin": "rm", "loss": "sft"}  # last part of a metric's name -> method


@dataclass
class Config:
    what: list[str]  # folders of runs, and reports of nanopost.evaluate (.json); anything else is passed over
    out: str = "out/plots"  # folder for the pictures


def read_run(folder: str) -> tuple[str, list[dict]] | None:
    """(method, lines of metrics.jsonl) of a run, or None if the folder holds none. UserError for a broken line."""
    path, lines = os.path.join(folder, "metrics.jsonl"), []
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                break  # being written now, or cut off when the run died
            try:
                lines.append(json.loads(line))
                lines[-1]["step"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{n}: not a line of metrics") from None
    names = {name.split("/")[-1] for line in lines for name in line}
    for name, method in TELLTALE.items():  # by what is logged: an unfinished run has no config.json
        if name in names:
            return method, lines
    return None


def read_report(path: str) -> list[dict] | None:
    """The rows of a report of nanopost.evaluate that can be drawn, or None if the file has none."""
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)["rows"]
        return [row for row in rows if {"stage", "kl"} <= row.keys() and row.keys() & {"gold", "reward"}] or None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def series(lines: list[dict], name: str) -> tuple[list, list]:
    """(steps, values) of a metric: only the lines that have it."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def trajectories(rows: list[dict]) -> dict[str, list[dict]]:
    """{run: its rows in the order of training}: "ppo/step-5" and "ppo/step-10" come before "ppo", their end. A run of
    which copies were kept starts where the reference is, at a KL of 0; any other is a point."""
    runs = {}
    for row in rows:
        run, _, step = row["stage"].partition("/step-")
        runs.setdefault(run, []).append((int(step) if step.isdigit() else float("inf"), row))
    start = [row for row in rows if row["kl"] == 0][:1]  # the reference: another model is never exactly at 0
    for run, points in runs.items():
        points = [row for _, row in sorted(points, key=lambda point: point[0])]
        begins_there = len(points) > 1 and not any(row in points for row in start)
        runs[run] = start + points if begins_there else points
    return runs


def empty_figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure  # not pyplot: files only, no window, nothing global
    except ImportError:
        raise UserError('plots need matplotlib: pip install matplotlib (or "nanopost[plot]")') from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_method(method: str, runs: dict[str, list[dict]]):
    """A panel a quantity, a colour a run; solid is training, dashed is held out."""
    panels = PANELS[method]
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    figure = empty_figure(4 * columns, 3 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (title, training, held_out) in zip(axes.flat, panels, strict=True):
        for i, lines in enumerate(runs.values()):
            for name, style in ((training, "-"), (held_out, "--")):
                x, y = series(lines, name)
                ax.plot(x, y, style, color=f"C{i}", marker="." if len(x) == 1 else "")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
    figure.suptitle(method)
    legend(figure, runs, {"training": dict(ls="-"), "held out": dict(ls="--")})
    return figure


def draw_kl(rows: list[dict]):
    """Gold reward (solid) and score (dashed) against KL, on an axis of its square root as in Gao et al."""
    styles = {"gold": dict(ls="-", marker="o", ms=4), "reward": dict(ls="--", marker="o", ms=4, mfc="white")}
    figure, runs = empty_figure(7, 4.4), trajectories(rows)
    ax = figure.subplots()
    ax.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    for i, points in enumerate(runs.values()):
        for name, style in styles.items():
            if all(name in row for row in points):  # a KL near 0 is estimated, and may come out below it
                ax.plot([max(row["kl"], 0.0) for row in points], [row[name] for row in points], color=f"C{i}",
                        clip_on=False, zorder=4 if len(points) == 1 else 3, **style)  # a point lies on the lines
    ax.set_xlim(left=0)
    ax.set_xlabel("KL(policy || reference), nats an answer (square-root axis)")
    ax.set_ylabel("reward")
    legend(figure, runs, {"gold reward": styles["gold"], "reward model's score": styles["reward"]})
    return figure


def legend(figure, runs, styles: dict[str, dict]):
    """Below the panels, where it hides nothing: the colour of each run, then what the styles of the lines mean."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=f"C{i}", label=run) for i, run in enumerate(runs)]
    handles += [Line2D([], [], color="black", label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)


def short_name(path: str, taken) -> str:
    """The last part of a path; where that is taken, all of it."""
    path = os.path.normpath(path).removesuffix(".json")
    return path.replace(os.sep, "-") if os.path.basename(path) in taken else os.path.basename(path)


def main(config: Config):
    runs, reports, passed_over = {}, {}, []
    for path in config.what:
        if not os.path.exists(path):
            raise UserError(f"there is no {path}")
        if os.path.isdir(path) and (run := read_run(path)):
            several = runs.setdefault(run[0], {})
            several[short_name(path, several)] = run[1]
        elif os.path.isfile(path) and (rows := read_report(path)):
            reports[short_name(path, [*PANELS, *reports])] = rows
        else:
            passed_over.append(path)
    if not runs and not reports:
        raise UserError("nothing to draw: give folders of runs (with metrics.jsonl) or reports of nanopost.evaluate")
    figures = {method: draw_method(method, several) for method, several in runs.items()}
    figures |= {name: draw_kl(rows) for name, rows in reports.items()}
    os.makedirs(config.out, exist_ok=True)
    for name, figure in figures.items():
        path = os.path.join(config.out, f"{name}.png")
        figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes for the same numbers
        print(f"wrote {path}")
    if passed_over:
        print("passed over " + ", ".join(passed_over))


if __name__ == "__main__":
    cli(main, Config)
