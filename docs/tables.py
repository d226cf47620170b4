"""What the runs of docs/runs.py left, as sections of docs/results.md: tables, and numbers with names."""

import json
import math
import re
import runpy
import textwrap
from pathlib import Path
from statistics import fmean

import torch

from docs import quotes, runs
from nanopost.config import UserError
from nanopost.tools.evaluate import markdown


class Page:
    """results.md while it is being written."""

    def __init__(self):
        self.sections = {}  # title -> text
        self.numbers = {}  # name -> value

    def section(self, title: str, *paragraphs: str):
        self.sections[title] = "\n\n".join(paragraphs)


# ------------------------------------------------------------------------------------------------- numbers and tables


def fixed(x: float, digits: int = 2) -> str:
    text = f"{x:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no -0.00


def percent(x: float, digits: int = 0) -> str:
    return f"{fixed(100 * x, digits)}%"


def rounded(x: float) -> str:
    """An error, as 3e-15, 0.0063 or 2.3."""
    if x == 0:
        return "0"
    return f"{x:.0e}".replace("e-0", "e-") if x < 1e-3 else f"{x:.2g}"


def table(*rows: list) -> str:
    """A Markdown table; the first row is its head."""
    return markdown([*rows])


COLUMNS = {  # column of `nanopost evaluate` -> title, how to write it
    "gold": ("gold", fixed),
    "reward": ("score", fixed),
    "win_rate": ("win rate", lambda x: percent(x, 1)),
    "kl": ("KL", fixed),
    "entropy": ("entropy", lambda x: fixed(x, 1)),
    "length": ("length", lambda x: fixed(x, 1)),
    "ended": ("ended", lambda x: percent(x, 1)),
    "distinct": ("distinct", lambda x: percent(x, 1)),
}


def values(row: dict) -> dict[str, str]:
    """{column: value} of a row of a report."""
    return {column: write(row[column]) for column, (_, write) in COLUMNS.items() if column in row}


def report_table(rows: dict[str, dict], *columns: str) -> str:
    """Mean ± standard error. Greedy answers and best of n have no KL, the latter a bound on it."""

    def cell(row, column):
        write = COLUMNS[column][1]
        if column == "kl" and "kl_bound" in row:
            return f"at most {write(row['kl_bound'])}"
        if column not in row:
            return ""
        return f"{write(row[column]).removesuffix('%')} ± {write(row[column + '_stderr'])}"

    lines = [[stage, *(cell(row, column) for column in columns)] for stage, row in rows.items()]
    return table(["stage", *(COLUMNS[column][0] for column in columns)], *lines)


def number_name(stage: str) -> str:
    """A stage as the names of its numbers begin: sft@0 -> sft-at-0, sft best of 4 -> sft-best-of-4."""
    return stage.replace("@", "-at-").replace(" ", "-")


def read_report(folder: Path, name: str = "report.json") -> tuple[dict, dict[str, dict]]:
    """(the report of `nanopost evaluate` in a folder, {stage: its row})"""
    report = json.loads((folder / name).read_text())
    return report, {row["stage"]: row for row in report["rows"]}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def series(run: Path, metric: str) -> list[float]:
    """The values of a metric, in the order of the steps."""
    return [line[metric] for line in read_lines(run / "metrics.jsonl") if line.get(metric) is not None]


# -------------------------------------------------------------------------------------- what every run has to tell


def pipeline_rows(folder: Path) -> tuple[dict, dict[str, dict]]:
    """(the report of quickstart in a folder, {stage: its row, with that of PPO without a penalty})"""
    report, rows = read_report(folder)
    hacked = json.loads((folder / "hacked.json").read_text())
    return report, rows | {row["stage"]: row for row in hacked["rows"]}


def pipeline(page: Page, out: Path, stamps: dict):
    """The whole pipeline, seed by seed."""
    seeds = [name for name in stamps if name.startswith("seed")]
    number, lines = page.numbers, []
    for seed in seeds:
        report, rows = pipeline_rows(out / seed)
        found = {}
        for stage, row in (rows | read_report(out / seed, "variants.json")[1]).items():
            found |= {f"{number_name(stage)}.{column}": value for column, value in values(row).items()}
        start, best = rows["sft"]["gold"], report["gold_max"]
        for stage in ("sft@0", "sft best of 4", "dpo", "ppo"):
            found[f"{number_name(stage)}.way"] = percent((rows[stage]["gold"] - start) / (best - start))
        found["rm.accuracy"] = percent(report["rm_accuracy"], 1)
        found["rm.ceiling"] = percent(report["rm_accuracy_ceiling"], 1)
        found["rm.reads_prompt"] = percent(report["reads_prompt"])
        prefix = "" if seed == "seed0" else f"{seed}."
        number |= {prefix + name: value for name, value in found.items()}
        stages = ("sft", "sft-at-0", "sft-best-of-4", "dpo", "ppo", "ppo-trunk", "ppo-two-passes", "ppo-beta0")
        gold = [found[f"{stage}.gold"] for stage in stages]
        gold = [f"{x} ({found[f'{stage}.way']})" if f"{stage}.way" in found else x for stage, x in zip(stages, gold)]
        kl = [found[f"{stage}.kl"] for stage in ("dpo", "ppo", "ppo-beta0")]
        distinct = [found[f"{stage}.distinct"] for stage in ("sft", "dpo", "ppo")]
        accuracy = f"{found['rm.accuracy']} of {found['rm.ceiling']}"
        lines.append([seed[4:], *gold, " / ".join(kl), " / ".join(distinct), accuracy, found["rm.reads_prompt"]])
    head = ["seed", "SFT", "SFT, greedy", "best of 4", "DPO", "PPO", "on one trunk", "PPO, two passes", "beta 0"]
    head += ["KL DPO / PPO / beta 0", "distinct SFT / DPO / PPO", "RM's accuracy", "reads the prompt"]
    number["quickstart.minutes"] = fixed(read_report(out / "seed0")[0]["seconds"] / 60, 1)
    _, rows = pipeline_rows(out / "seed0")
    page.section(
        "The pipeline",
        "`recipes/quickstart.sh` with seed 0, on 500 held-out prompts with 2 answers each (greedy, best of 4: one),\n"
        "mean ± standard error. STAGE@0 is greedy decoding; ppo-beta0 is the run of `recipes/hacking.sh`, without a\n"
        "penalty:",
        quotes.write_block("quickstart-full", report_table(rows, *COLUMNS)),
        "gold: the true reward, from -5 to 5. score: the reward model's. win rate: against the SFT model, by gold, a\n"
        "tie counting half. KL: to the SFT model, in nats per answer. entropy in nats, length in tokens, per answer.",
        "The first columns alone:",
        quotes.write_block("quickstart", report_table(rows, "gold", "reward", "win_rate", "kl")),
        "Every seed: gold reward (and how much of the way from the SFT model to 5), KL and distinct answers:",
        quotes.write_block("seeds", table(head, *lines)),
    )


def sample_answers(page: Page, measured: dict):
    def answer(label: str, text: str, lines: int) -> str:
        lines = textwrap.wrap(" ".join(text.split()), 112 - len(label), max_lines=lines, placeholder=" ...")
        return "\n".join(f"    {label if i == 0 else ' ' * len(label)}{line}" for i, line in enumerate(lines or [""]))

    def block(answers, *stages):
        texts, width = [], max(map(len, stages))
        for prompt, said in answers:
            lines = [answer(f"  {s:>{width}} {said[s][0]:+.2f}  ", said[s][1], 1 + (s != "base")) for s in stages]
            texts.append("\n".join([f"    {prompt}", *lines]))
        return "\n\n".join(texts)

    sampled, greedy = measured["answers"], measured["greedy_answers"]
    page.section(
        "Answers",
        "The models of seed 0, with the gold reward. Greedy, that is at temperature 0:",
        quotes.write_block("answers-greedy", block(greedy, "base", "sft", "dpo", "ppo")),
        "Sampled at temperature 1:",
        quotes.write_block("answers", block(sampled, "base", "sft", "dpo", "ppo")),
        "PPO without a KL penalty:",
        quotes.write_block("answers-hacked", block(sampled, "ppo-beta0")),
        "The README's examples, greedy, and the first prompt with and without the penalty:",
        quotes.write_block("examples", block(greedy[:3], "base", "sft", "ppo")),
        quotes.write_block("hacked", block(sampled[:1], "ppo", "ppo-beta0")),
    )


def best_of_n(page: Page, out: Path):
    number = page.numbers
    for n in (4, 16):
        records = read_lines(out / "best" / f"best{n}.jsonl")
        for column, key in (("gold", "gold"), ("reward", "score")):
            number[f"best{n}.{column}"] = fixed(sum(record[key] for record in records) / len(records))
        number[f"best{n}.kl"] = fixed(math.log(n) - (n - 1) / n)
    for stage, row in read_report(out / "rest")[1].items():
        number |= {f"{stage}.{column}": value for column, value in values(row).items()}
    titles = {
        "sft": "SFT",
        "sft-at-0": "SFT, greedy (temperature 0)",
        "best4": "best of 4",
        "best16": "best of 16",
        "rest1": "ReST, one round (n = 8)",
    }
    titles |= {"rest2": "ReST, two rounds", "dpo": "DPO", "ppo": "PPO"}
    lines = []
    for stage, title in titles.items():
        bound = "at most " if stage.startswith("best") else ""
        kl = bound + number.get(f"{stage}.kl", "")  # greedy answers are no samples, so they have none
        lines.append([title, number[f"{stage}.gold"], number[f"{stage}.reward"], kl])
    page.section(
        "Best of n and rejection sampling",
        "Seed 0, on the held-out prompts:",
        quotes.write_block("baseline", table(["", "gold", "score", "KL"], *lines)),
    )


def other_pairs(page: Page, out: Path):
    """Reward models that learned from contrast pairs too, and from more pairs."""
    trained = {"contrast0": ("as in quickstart", pipeline_rows(out / "seed0"))}
    for percents in (20, 50):
        title = f"{percents}% for contrast"
        trained[f"contrast{percents}"] = (title, read_report(out / "contrast", f"report{percents}.json"))
    trained["pairs40000"] = ("four times as many", read_report(out / "pairs"))
    lines = [["training pairs", "accuracy on other pairs", "reads the prompt", "gold of best of 4"]]
    for name, (title, (report, rows)) in trained.items():
        found = {
            "accuracy": percent(report["rm_accuracy"], 1),
            "reads_prompt": percent(report["reads_prompt"]),
            "best_of_4": fixed(rows["sft best of 4"]["gold"]),
        }
        page.numbers |= {f"{name}.{column}": value for column, value in found.items()}
        lines.append([title, *found.values()])
    page.section(
        "Does the reward model read the prompt?",
        "Seed 0. A contrast pair sets an answer beside one to another prompt of the same family\n"
        "(`annotate.py --contrast`). The last row has none, but 40,000 pairs instead of 10,000:",
        quotes.write_block("contrast", table(*lines)),
    )


def betas(page: Page, out: Path):
    """DPO at several betas."""
    rows = read_report(out / "betas")[1] | {"dpo-0.3": pipeline_rows(out / "seed0")[1]["dpo"]}
    rows = {name.removeprefix("dpo-"): row for name, row in sorted(rows.items())}
    for name, row in rows.items():
        page.numbers |= {f"beta-{name.replace('.', '')}.{column}": value for column, value in values(row).items()}
    page.section(
        "DPO's beta",
        "Seed 0, `train_dpo.py --beta`:",
        quotes.write_block("betas", report_table(rows, "gold", "reward", "kl", "distinct").replace("stage", "beta ")),
    )


def sums(page: Page, out: Path):
    _, rows = read_report(out / "sums")
    for name, stage in (("before", "sft"), ("greedy", "sft@0"), ("after", "ppo")):
        row = rows[stage]
        page.numbers[f"sums.{name}"] = f"{100 * row['gold']:.0f} ± {100 * row['gold_stderr']:.0f}%"
    page.numbers["sums.kl"] = fixed(rows["ppo"]["kl"], 1)


LOGGED = {  # run -> metric -> how to write it
    "rm": {"eval/loss": lambda x: fixed(x, 3), "eval/accuracy": percent},
    "dpo": {
        "eval/loss": lambda x: fixed(x, 3),
        "eval/rewards/accuracies": lambda x: percent(x, 1),
        "eval/rewards/margins": lambda x: fixed(x, 3),
        "eval/logps/chosen": lambda x: fixed(x, 1),
        "eval/logps/rejected": lambda x: fixed(x, 1),
    },
    "ppo": {
        "eval/scores": fixed,
        "eval/kl": lambda x: fixed(x, 1),
        "eval/entropy": lambda x: fixed(x, 1),
        "val/explained_variance": fixed,
        "loss/policy": lambda x: fixed(x, 3),
        "val/ratio": lambda x: fixed(x, 4),
        "policy/clipfrac": rounded,
        "policy/approxkl": rounded,
    },
}


def logs(page: Page, out: Path):
    """First, last and largest values of what the runs of seed 0 logged."""
    number, blocks, ppo = page.numbers, [], out / "seed0" / "ppo"
    for run, metrics in LOGGED.items():
        lines = [["", "first", "last", "largest"]]
        for metric, write in metrics.items():
            x, name = series(out / "seed0" / run, metric), metric.split("/", 1)[1].replace("/", ".")
            found = {"first": write(x[0]), "last": write(x[-1]), "most": write(max(x))}
            number |= {f"{run}.{name}.{which}": value for which, value in found.items()}
            lines.append([f"`{metric}`", *found.values()])
        blocks += [f"{run}:", quotes.write_block(f"logs-{run}", table(*lines))]
    number["ppo.first_ratio"] = f"{max(series(ppo, 'val/first_ratio'), key=lambda ratio: abs(ratio - 1)):.6g}"
    number["ppo.first_approxkl"] = f"{max(series(ppo, 'val/first_approxkl')):.1e}"
    page.section("What the runs logged", "Seed 0; eval/ is held out.", *blocks)


def closer_look(page: Page, measured: dict):
    """What docs/measure.py found."""
    number, loss, shortest = page.numbers, measured["loss"], measured["shortest"]
    number |= {f"loss.{name}": f"{count:,}" for name, count in loss.items()}
    number["loss.share"] = percent(loss["targets"] / loss["tokens"])
    for name, x in measured["kl"].items():
        if isinstance(x, list):
            number[f"kl.{name}"] = "{:.2f} ± {:.2f}".format(*x)
        else:
            number[f"kl.{name}"] = fixed(x) if name == "lowest" else percent(x)
    number |= {f"shortest.{name}": fixed(shortest[name], 3) for name in ("score", "kl", "total")}
    for name, x in measured["notes"].items():
        number[f"notes.{name}"] = fixed(x) if name in ("gold", "deviation") else percent(x)
    number |= {f"slips.{stage}": percent(share) for stage, share in measured["slips"].items()}
    gap = measured["gap"]
    number |= {f"gap.{part.replace(' ', '-')}": fixed(points, 1) for part, points in [*gap["parts"].items()][:8]}
    number |= {"gap.total": fixed(sum(gap["parts"].values()), 1)}
    number |= {"gap.with-sft": fixed(sum(gap["with_sft"].values()), 1)}
    number |= {"gap.with-sft.unknown": fixed(gap["with_sft"]["unknown"], 1)}
    lines = [[part, fixed(x), fixed(gap["with_sft"].get(part, 0.0))] for part, x in [*gap["parts"].items()][:8]]
    page.section(
        "What the reward model does not see",
        f"Seed 0, {gap['pairs']:,} held-out pairs. A pair in the wrong order costs accuracy; what it costs goes to\n"
        "the parts of the gold reward in which the better answer is better. unknown: a slip of the pen, a clause that\n"
        f"no template makes. {number['gap.total']} points of accuracy in all, {number['gap.with-sft']} with 0.3\n"
        "standard deviations of the SFT model's log-probability of the answer added to the reward. The parts with\n"
        "the most:",
        quotes.write_block("gap", table(["part", "points", "with the log-probability"], *lines)),
    )
    tokens = "   ".join(f"{reward:+.3f} {token!r}" for reward, token in shortest["tokens"])
    page.section(
        "Token rewards",
        "Those of the shortest answer of PPO's policy (seed 0), at beta 0.15:",
        quotes.write_block("shortest", f"    {tokens}"),
    )


def measured_errors(page: Page, path: Path, kind: str, documents: str) -> str:
    """The table of what `pytest --measured` printed. proof.X, where a document quotes it, is the largest error of the
    tests whose names begin with test_X; the same with parity.X."""
    found = re.findall(r"^ *([-+.\de]+) <= (\S+)  (\S.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    errors = {test: max(float(error), 0.0) for error, _, test in found}
    for _, name in quotes.MARKED.findall(documents):
        start = "test_" + name.removeprefix(f"{kind}.")
        tests = [test for test in errors if test.split("::")[-1].startswith(start)]
        if not name.startswith(f"{kind}.") or not tests:
            continue
        if len(files := {test.split("::")[0] for test in tests}) > 1:
            raise UserError(f"{name} begins the names of tests in {' and '.join(sorted(files))}: say more of it")
        page.numbers[name] = rounded(max(errors[test] for test in tests))
    lines = [[rounded(max(float(error), 0.0)), bound, f"`{test}`"] for error, bound, test in found]
    return table(["error", "bound", "test"], *lines)


def proofs(page: Page, out: Path, documents: str):
    mistakes = runpy.run_path(str(runs.ROOT / "tests" / "proofs" / "mutants.py"))["MUTANTS"]
    page.numbers["proof.mistakes"] = str(sum(map(len, mistakes.values())))
    command = "`python -m pytest tests/proofs --measured`"
    errors = measured_errors(page, out / "proofs" / "measured.txt", "proof", documents)
    page.section("The proofs", f"{command} prints the largest error of each test, and its bound:", errors)


# -------------------------------------------------------------------------------- what not every machine can measure


def measured_on(stamp: dict) -> str:
    conditions = runs.conditions()
    return f"Measured on {stamp['date']} on {conditions['processor']}, torch {conditions['torch']}."


def parity(page: Page, out: Path, stamp: dict, documents: str):
    errors = measured_errors(page, out / "parity" / "measured.txt", "parity", documents)
    page.section("Parity with transformers", measured_on(stamp), errors)


def instructions(page: Page, out: Path, stamp: dict):
    """recipes/instructions.sh on the file that --instructions names."""
    folder = out / "instructions"
    weights = torch.load(folder / "sft" / "model.pt", weights_only=True)
    row = read_report(folder)[1]["ppo"]
    number = {
        "parameters": fixed(sum(x.numel() for x in weights.values()) / 1e6, 1),  # millions
        "minutes": fixed(stamp["cpu_seconds"] / 60, 1),
        "kl": fixed(row["kl"], 1),
    }
    lines = []
    for name, run, metric, write in (
        ("loss", "sft", "eval/loss", fixed),
        ("rm", "rm", "eval/accuracy", percent),
        ("dpo", "dpo", "eval/rewards/accuracies", percent),
        ("score", "ppo", "eval/scores", fixed),
    ):
        x = series(folder / run, metric)
        number |= {f"{name}.first": write(x[0]), f"{name}.last": write(x[-1])}
        lines.append([run, f"`{metric}`", write(x[0]), write(x[-1])])
    page.numbers |= {f"instructions.{name}": value for name, value in number.items()}
    page.section(
        "Real instructions",
        "`recipes/instructions.sh` on a file of instructions with preferences: a model from scratch, "
        f"{number['parameters']}M parameters,\n{number['minutes']} minutes of processor time. PPO ends at "
        f"{number['kl']} nats of KL. {measured_on(stamp)}",
        table(["run", "metric", "first", "last"], *lines),
    )


def speed(page: Page, paths: list[str]):
    """The figures of benchmarks/bench.py."""

    def middle(x, digits=0):
        return f"{x['median']:,.{digits}f}"

    paragraphs = []
    for path in paths:
        figures, lines = json.loads(Path(path).read_text()), []
        for name, sides in figures["rows"].items():
            ours = sides["nanopost"]
            line = [name, middle(ours["tokens_per_s"]), f"{ours['of_floor']['median']:.0%}", middle(ours["memory_mb"])]
            if theirs := sides.get("trl"):
                line += [middle(theirs["tokens_per_s"]), middle(theirs["memory_mb"]), middle(sides["ratio"], 1)]
            lines.append([*line, "", "", ""][:7])
        head = ["", "nanopost", "of the floor", "peak MB", "TRL", "its peak MB", "ratio"]
        paragraphs += [", ".join(figures["conditions"].values()) + ":", table(head, *lines)]
        if profile := figures.get("profile"):
            shares = ", ".join(f"{kind} {percent(share)}" for kind, share in profile.items())
            rate = f"{figures['machine']['flops'] / 1e9:.0f} GFLOP/s"
            paragraphs.append(f"The best rate of matrix products here is {rate}. An SFT step, by operations: {shares}.")
    page.section("Speed", "Real tokens per second, medians (`make bench`).", *paragraphs)


def versus(page: Page, paths: list[str]):
    """The verdicts of `nanopost versus --json`, one row for each report."""
    lines = []
    for path in paths:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        metric, interval = report["metric"], [signed(report[end]) for end in ("low", "high")]
        sides = [[row[metric] for row in report["runs"][side]] for side in "ab"]
        kls = [[row["kl"] for row in report["runs"][side] if "kl" in row] for side in "ab"]
        lines.append([
            *(f"`{report[side]}`" for side in "ab"),
            " / ".join(fixed(fmean(values)) for values in sides),
            signed(report["difference"]),
            " to ".join(interval),
            fixed(report["detectable"]),
            {"a": "a is better", "b": "b is better", "none": "not to be told apart"}[report["verdict"]],
            " / ".join(fixed(fmean(values)) for values in kls if values),
            at_equal_kl(report["equal_kl"]),
        ])  # fmt: skip
    head = ["a", "b", f"{metric} a / b", "b - a", "95% interval", "detectable", "verdict", "KL a / b", "at equal KL"]
    seeds = len(json.loads(Path(paths[0]).read_text(encoding="utf-8"))["runs"]["a"])
    legend = (
        f"Both commands with {seeds} seeds, from the same SFT model, paired by seed (`nanopost versus`). detectable: "
        "the true difference that this many seeds find in 80% of the cases."
    )
    page.section("Verdicts over seeds", legend, quotes.write_block("versus", table(head, *lines)))


def signed(x: float) -> str:
    return f"{x:+.2f}"


def at_equal_kl(found: dict) -> str:
    """b - a, where all runs have the same KL, with the verdict; or nothing, where they share none."""
    if "kl" not in found:
        return ""
    verdict = {"a": ", a is better", "b": ", b is better", "none": ""}[found["verdict"]]
    return f"{signed(found['difference'])} at {fixed(found['kl'], 1)} nats{verdict}"
