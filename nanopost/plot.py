"""Draws what runs logged: one PNG a method, several runs of it over each other; and rewards against KL.

    python -m nanopost.plot out/*                                   whatever in out/ can be drawn -> out/plots/*.png
    python -m nanopost.plot out/ppo out/ppo-beta0 --out plots       two runs of PPO to compare
    python -m nanopost.plot out/kl.json                             a report of nanopost.evaluate -> out/plots/kl.png

In kl.png each run is a line through the models that it kept (--keep-every N): solid is the gold reward, which no training
saw, dashed is the reward model's score. Where they part, the reward model is being hacked (Gao et al., arXiv 2210.10760).
Needs matplotlib, the extra [plot]; the figures are drawn from metrics.jsonl and the report, which need nothing.
"""

import json
import os
from dataclasses import dataclass

from nanopost.config import UserError, cli

# what matters for each method: (title, metrics drawn together)
PANELS = {
    "sft": [("loss, nats a token", ["loss", "eval/loss"]), ("gradient norm", ["grad_norm"])],
    "rm": [("loss, nats a pair", ["loss", "eval/loss"]), ("accuracy", ["accuracy", "eval/accuracy"]),
           ("margin", ["margin", "eval/margin"])],
    "dpo": [("loss, nats a pair", ["loss", "eval/loss"]),
            ("accuracy of the implicit reward", ["rewards/accuracies", "eval/rewards/accuracies"]),
            ("margin of the implicit reward", ["rewards/margins", "eval/rewards/margins"]),
            ("held-out log-probability: chosen, rejected", ["eval/logps/chosen", "eval/logps/rejected"])],
    "ppo": [("score", ["objective/scores", "eval/scores"]), ("KL to the reference, nats an answer",
            ["objective/kl", "eval/kl"]), ("entropy, nats an answer", ["objective/entropy", "eval/entropy"]),
            ("share of tokens clipped", ["policy/clipfrac"]), ("explained variance of the values",
            ["val/explained_variance"]), ("length, tokens", ["response/length"])],
}
STYLES = ("-", "--")  # of the metrics drawn together: training and held out


@dataclass
class Config:
    what: list[str]  # folders of runs, and reports of nanopost.evaluate (.json); anything else is passed over
    out: str = "out/plots"  # folder for the pictures


def read_run(folder: str) -> tuple[str, list[dict]] | None:
    """(method, lines of metrics.jsonl) of a run, or None if the folder holds none. UserError for a broken line."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        return None
    lines = []
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            try:
                lines.append(json.loads(line))
                lines[-1]["step"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{n}: not a line of metrics") from None
    names = {name for line in lines for name in line}
    for method in ("ppo", "dpo", "rm", "sft"):  # by what is logged: an unfinished run has no config.json
        if {"ppo": "objective/kl", "dpo": "rewards/margins", "rm": "margin", "sft": "loss"}[method] in names:
            return method, lines
    return None


def read_report(path: str) -> list[dict] | None:
    """The rows of a report of nanopost.evaluate that can be drawn, or None if the file is something else."""
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)["rows"]
        rows = [row for row in rows if "stage" in row and "kl" in row]
    except (ValueError, KeyError, TypeError):
        return None
    return rows or None


def series(lines: list[dict], name: str) -> tuple[list, list]:
    """(steps, values) of a metric: only the lines that have it."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def trajectories(rows: list[dict]) -> dict[str, list[dict]]:
    """{run: its rows in the order of training}: "ppo/step-10" and "ppo/step-20" come before "ppo", their end."""
    runs = {}
    for row in rows:
        run, _, step = row["stage"].partition("/step-")
        runs.setdefault(run, []).append((int(step) if step else float("inf"), row))
    return {run: [row for _, row in sorted(points, key=lambda point: point[0])] for run, points in runs.items()}


def draw_method(plt, method: str, runs: dict[str, list[dict]]):
    """One figure: a panel a quantity, a colour a run; solid is training, dashed is held out."""
    panels = PANELS[method]
    figure, axes = plt.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False, layout="constrained",
                                figsize=(4 * min(3, len(panels)), 3 * -(-len(panels) // 3)))
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, (title, names) in zip(axes.flat, panels):
        for color, (run, lines) in enumerate(runs.items()):
            for name, style in zip(names, STYLES):
                x, y = series(lines, name)
                ax.plot(x, y, style, color=f"C{color % 10}", label=run if style == "-" else None)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"{method} (dashed: held out)", fontsize=11)
    return figure


def draw_kl(plt, rows: list[dict]):
    """Gold reward (solid) and score (dashed) against KL, on an axis of its square root as in Gao et al."""
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    runs = trajectories(rows)
    start = [row for points in runs.values() for row in points if row["kl"] == 0]  # the reference: where all begin
    runs = {run: start[:1] + points for run, points in runs.items() if points[0] not in start}
    ax.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    for color, (run, points) in enumerate(runs.items()):
        for name, style in (("gold", "-"), ("reward", "--")):
            if all(name in row for row in points):
                ax.plot([max(row["kl"], 0.0) for row in points], [row[name] for row in points], style,
                        color=f"C{color % 10}", marker=".", label=run if style == "-" else None)
    ax.plot([], [], "k-", label="gold reward")
    ax.plot([], [], "k--", label="reward model's score")
    ax.set_xlim(left=0)
    ax.set_xlabel("KL(policy || reference), nats an answer (square-root axis)")
    ax.set_ylabel("reward")
    ax.legend(fontsize=8)
    return figure


def main(config: Config):
    try:
        import matplotlib

        matplotlib.use("Agg")  # files only, no window
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('plots need matplotlib: pip install matplotlib (or "nanopost[plot]")') from None
    runs, rows, passed_over = {}, {}, []
    for path in config.what:
        if not os.path.exists(path):
            raise UserError(f"there is no {path}")
        name = os.path.basename(os.path.normpath(path))
        if os.path.isdir(path) and (run := read_run(path)):
            runs.setdefault(run[0], {})[name] = run[1]
        elif path.endswith(".json") and (report := read_report(path)):
            rows |= {row["stage"]: row for row in report}
        else:
            passed_over.append(path)
    if not runs and not rows:
        raise UserError("nothing to draw: give folders of runs (with metrics.jsonl) or reports of nanopost.evaluate")
    os.makedirs(config.out, exist_ok=True)
    figures = {method: draw_method(plt, method, several) for method, several in runs.items()}
    if rows:
        figures["kl"] = draw_kl(plt, list(rows.values()))
    for name, figure in figures.items():
        path = os.path.join(config.out, f"{name}.png")
        figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes for the same numbers
        plt.close(figure)
        print(f"wrote {path}")
    if passed_over:
        print("passed over " + ", ".join(passed_over))


if __name__ == "__main__":
    cli(main, Config)
