"""What the experiments share: their runs, over seeds and kept; the table, the verdict, the place in the book.

An experiment is one file, which says

    make        (folders) writes the files that all arms of a seed start from into folders.here, their $first
    FIRST       commands that are run there next; both may be left out
    ARMS        {name: commands}: what is compared
    measure     (folders of one run) -> {column: number, or a list for a curve}
    COLUMNS     {column: (its title, how to write it)}: the table
    judge       (results) -> (verdict, why); results[arm][column] is a list over the seeds
    draw        (figure, results)

and hands them to conduct(). Commands are a script for bash in the root of the repository. They see $start, the folder
of quickstart, $here, their own, $first and $seed. They name the length of every run, which --quick shortens.
"""

import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "data" / "notes")]  # for docs/, and the gold reward
from docs.runs import conditions  # noqa: E402
from gold import score  # noqa: E402
from nanopost.checkpoint import load_model  # noqa: E402
from nanopost.config import UserError, cli  # noqa: E402
from nanopost.files import atomic  # noqa: E402
from nanopost.paired import compare  # noqa: E402
from nanopost.resume import fingerprint, meaning  # noqa: E402
from nanopost.reward import load_reward  # noqa: E402
from nanopost.sampling import sample_text  # noqa: E402
from nanopost.tools.evaluate import markdown, sequence_logprobs  # noqa: E402
from nanopost.tools.lab import Options  # noqa: E402

REPLICATES, IN_PART, NOT_HERE = "Replicates", "Replicates in part", "Does not replicate here"
BOOK, FIGURES = ROOT / "lab" / "README.md", ROOT / "lab" / "figures"
CODE = "train_*.py", "forks/*.py", "nanopost/*.py", "nanopost/tools/evaluate.py", "data/notes/*.py"  # of all runs
START = ("base", "sft", "prefs/train.jsonl", "rm", "dpo", "ppo")  # what quickstart leaves
QUICK = {r"--epochs \S+": "--steps 4", r"--steps \d+": "--steps 2", r"--(pairs|limit) \d+": r"--\1 24"}
QUICK |= {r"--init \$start/base": "--init $start/sft"}  # a base model does not learn to end its answers in 4 steps
QUICK |= {r"--n \d+": "--n 4", r"--samples \d+": "--samples 2", r"--keep-every \d+": "--keep-every 1"}


@dataclass
class Config(Options):
    """Of one experiment."""


@dataclass(frozen=True)
class Folders:
    """Where one run finds what it needs; commands see the same names."""

    start: str  # of quickstart
    first: str  # of FIRST, of this seed
    here: str  # of the run
    seed: int


def execute(folders: Folders, make, commands: str):
    """Runs the commands in a new folder, which gets its name once they are done. Raises UserError if they fail."""
    unfinished = f"{folders.here}.{os.getpid()}"
    os.makedirs(unfinished)
    try:
        if make:
            make(replace(folders, here=unfinished))
        seconds = shell(replace(folders, here=unfinished), commands)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    Path(unfinished, "seconds").write_text(str(seconds))
    os.rename(unfinished, folders.here)


def shell(folders: Folders, commands: str) -> float:
    """Runs the commands, and returns their processor time in seconds. Raises UserError if they fail."""
    names = {name: str(x) for name, x in vars(folders).items()} | {"PYTHONPATH": str(ROOT)}
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\nnanopost() {{ python -m nanopost "$@"; }}\n'
    command = ["bash", "-e", "-o", "pipefail", "-c", python + commands]
    with open(f"{folders.here}/log.txt", "w") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | names, **streams)
        _, process.returncode, usage = os.wait4(process.pid, 0)
    if process.returncode:
        end = Path(folders.here, "log.txt").read_text()[-1000:]
        raise UserError(f"a run of the experiment failed; the end of what it said is\n{end}")
    return usage.ru_utime + usage.ru_stime


def work(folders: Folders, make, commands: str, measure, code: str) -> dict:
    """One run, in a process of its own, unless it is there: its measurements, and the processor time that it took."""
    kept, began = Path(folders.here, f"measured-{code}.json"), time.process_time()
    if not os.path.exists(folders.here):
        execute(folders, make, commands)
    if not measure:
        return {"seconds": time.process_time() - began + float(Path(folders.here, "seconds").read_text())}
    if not kept.exists():
        measured = measure(folders)
        measured["seconds"] = time.process_time() - began + float(Path(folders.here, "seconds").read_text())
        with atomic(str(kept)) as f:
            json.dump(measured, f)
    return json.loads(kept.read_text())


def prepare(config: Config) -> str:
    """Makes what quickstart leaves, unless it is there. Returns a hash of it."""
    paths = [Path(config.start, name) for name in START]
    if not all((path / "config.json").exists() or path.is_file() for path in paths):
        print(f"{config.start} is not complete: quickstart first")
        environment = os.environ | {"PYTHON": sys.executable, "OUT": config.start, "PYTHONPATH": str(ROOT)}
        if subprocess.run(["bash", "recipes/quickstart.sh"], cwd=ROOT, env=environment).returncode:
            raise UserError("quickstart failed")
    code = [meaning(path) for pattern in CODE for path in sorted(ROOT.glob(pattern))]
    return hashlib.sha256("".join([*code, *(fingerprint(str(path)) for path in paths)]).encode()).hexdigest()


def run_all(config: Config, name: str, make, first: str, arms: dict, measure) -> tuple[dict, float]:
    """(results[arm][column], a list over the seeds; the processor time of all runs, in seconds)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LAB_QUICK"] = "1" if config.quick else ""  # for the processes of the runs
    base, code = prepare(config), hashlib.sha256(meaning(Path(sys.argv[0])).encode()).hexdigest()[:8]
    out, start = Path(config.out).resolve(), str(Path(config.start).resolve())

    def folder(arm: str, commands: str, seed: int) -> str:
        parts = [base, shorten(first), commands, f"{seed} {config.quick}", inspect.getsource(make) if make else ""]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
        (out / name).mkdir(parents=True, exist_ok=True)
        return str(out / name / f"{re.sub(r'[^a-z0-9]+', '-', arm.lower())}-seed{seed}-{key}")

    def shorten(commands: str) -> str:
        for pattern, replacement in QUICK.items() if config.quick else ():
            commands = re.sub(pattern, replacement, commands)
        return commands

    results, total, began = {arm: [None] * config.seeds for arm in arms}, 0.0, time.time()
    with ProcessPoolExecutor(config.jobs, get_context("spawn")) as pool:
        for stage in ({"first": first} if first or make else {}), arms:
            jobs = {}
            for seed in range(config.seeds):
                shared = folder("first", shorten(first), seed) if first or make else ""
                for arm, commands in stage.items():
                    commands = shorten(commands)
                    folders = Folders(start, "" if stage is not arms else shared, folder(arm, commands, seed), seed)
                    after = (None, commands, measure) if stage is arms else (make, commands, None)
                    job = pool.submit(work, folders, *after, code)
                    jobs[job] = arm, seed
            for done, job in enumerate(as_completed(jobs), 1):
                arm, seed = jobs[job]
                measured = job.result()
                total += measured.pop("seconds")
                if stage is arms:
                    results[arm][seed] = measured
                left = (time.time() - began) / done * (len(jobs) - done) / 60
                print(f"{done}/{len(jobs)}  {arm}, seed {seed} (about {left:.1f} min left)", flush=True)
            began = time.time()
    columns = {arm: {column: [row[column] for row in rows] for column in rows[0]} for arm, rows in results.items()}
    return columns, total


def prompts_of(path: str, limit: int) -> list[str]:
    """The first prompts of a file: `limit`, or with --quick at most 33, which has every family three times."""
    limit = min(limit, 33) if os.environ.get("LAB_QUICK") else limit
    with open(path, encoding="utf-8") as f:
        return [json.loads(line)["prompt"] for line in f][:limit]


@torch.no_grad()
def sample(
    model: str, prompts: list[str], seed: int, temperature=1.0, reference="", reward="", prefix=""
) -> dict[str, list]:
    """An answer of the model in this folder to each prompt: {"text", "gold", "length"}, each a list; with a folder for
    the reference also "kl", in nats per answer, with one for the reward model also "score". The model also reads the
    prefix, the gold reward does not."""
    policy, tokenizer = load_model(model)
    ids = [tokenizer.prompt([{"role": "user", "content": prefix + prompt}]) for prompt in prompts]
    answers = sample_text(policy, tokenizer, ids, 80, temperature=temperature, seed=seed)
    texts = [answer.text for answer in answers]
    found = {"text": texts, "gold": score(prompts, texts), "length": [len(answer.response) for answer in answers]}
    if reference:
        logprobs = sequence_logprobs(policy, answers) - sequence_logprobs(load_model(reference)[0], answers)
        found["kl"] = logprobs.tolist()
    if reward:
        judge = load_reward(reward, tokenizer, model, policy.config.block_size, "cpu")
        found["score"] = judge(prompts, answers).tolist()
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval, by Student's t."""
    found = compare([0.0] * len(values), values)
    return found["difference"], (found["high"] - found["low"]) / 2


def cell(values: list[float | None], form: str) -> str:
    if None in values:  # the arm has no such number
        return ""
    mean, half = interval(values)
    return f"{form.format(mean)} ± {form.format(half)}" if half else form.format(mean)


def dots(ax, results: dict, column: str, title: str, color=None, label=None):
    """A row for each arm, with a dot for each seed and a line at the mean. Each arm has its colour, unless one is
    given; a label is for the legend."""
    for y, arm in enumerate(reversed(results)):
        style = {"ms": 5, "alpha": 0.7, "clip_on": False, "color": color, "label": None if y else label}
        ax.plot(results[arm][column], [y] * len(results[arm][column]), "o", **style)
        ax.plot([fmean(results[arm][column])] * 2, [y - 0.3, y + 0.3], color="black", lw=1)
    ax.set_yticks(range(len(results)), reversed(results), fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.grid(axis="x", alpha=0.3)


def fill_book(name: str, text: str):
    """Puts the text into the experiment's place in the book, and the verdicts of all into the table at its head."""
    book = BOOK.read_text(encoding="utf-8")
    block = re.compile(rf"(<!--lab:{name}-->\n).*?(\n<!--end of {name}-->)", re.DOTALL)
    if not block.search(book):
        raise UserError(f"{BOOK} has no <!--lab:{name}--> and <!--end of {name}-->")
    book = block.sub(lambda match: match[1] + text + match[2], book)
    verdicts = "|".join([REPLICATES, IN_PART, NOT_HERE])
    found = re.findall(rf"^## (.*?)\n.*?^\*\*({verdicts})\.\*\* ", book, re.DOTALL | re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title, _ in found]
    rows = [["experiment", "verdict"], *([f"[{title}](#{slug})", v] for (title, v), slug in zip(found, slugs))]
    summary = re.compile(r"(<!--lab:summary-->\n).*?(\n<!--end of summary-->)", re.DOTALL)
    with atomic(str(BOOK)) as f:
        f.write(summary.sub(lambda match: match[1] + markdown(rows) + match[2], book))


def conduct(arms: dict, columns: dict, measure, judge, draw, make=None, first: str = ""):
    """The whole experiment of the file that is being run: `python lab/NAME.py`."""
    path, text = Path(sys.argv[0]), sys.modules["__main__"].__doc__.strip()

    def main(config: Config):
        from matplotlib.figure import Figure

        results, seconds = run_all(config, path.stem, make, first, arms, measure)
        head = ["", *(title for title, _ in columns.values())]
        rows = [[arm, *(cell(row[c], form) for c, (_, form) in columns.items())] for arm, row in results.items()]
        table = markdown([head, *rows])
        verdict, why = judge(results) if not config.quick else ("No verdict", "A few steps show nothing.")
        machine = "{processor} ({capability}), {cores} cores, torch {torch}".format(**conditions())
        note = f"{config.seeds} seeds; mean and 95% interval; {seconds / 120:.1f} min on two cores of {machine}."
        print(f"\n{table}\n\n{verdict}. {why}\n\n{note}")
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        draw(figure, results)
        picture = Path(config.out, f"{path.stem}.png")
        figure.savefig(picture, dpi=90, metadata={"Software": None})
        with atomic(str(picture.with_suffix(".json"))) as f:
            json.dump({"results": results, "verdict": verdict, "why": why, "note": note}, f, indent=1)
        print(f"wrote {picture}")
        if config.publish:
            shutil.copy(picture, FIGURES)
            shutil.copy(picture.with_suffix(".json"), FIGURES)  # a test asks whether the verdict follows from it
            title, _, body = text.partition("\n\n")
            image = f"![{title}](figures/{picture.name})"
            fill_book(path.stem, f"## {title}\n\n{body}\n\n{image}\n\n{table}\n\n**{verdict}.** {why}\n\n{note}")

    cli(main, Config)
