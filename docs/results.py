"""Runs what the documents quote, writes docs/results.md, and fills the numbers into the documents.

    python docs/results.py                          # or `make results`: about an hour of processor time
    python docs/results.py --instructions FILE      # also recipes/instructions.sh, on a file of yours
    python docs/results.py --check                  # runs nothing: do the documents quote docs/results.md?

What has run is kept in out/results, so a second call only rewrites the documents. With --versus and reports of
`nanopost versus`, nothing is run, and only their table is written. docs/runs.py has the commands,
docs/measure.py measures what the logs do not say, docs/tables.py makes tables and numbers of all that, and
docs/quotes.py says how a document quotes a number.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from docs import quotes, runs, tables  # noqa: E402
from nanopost.config import UserError, at_least, cli  # noqa: E402
from nanopost.files import atomic  # noqa: E402

RESULTS = ROOT / "docs" / "results.md"


def pages() -> dict[Path, str]:
    """The documents that may quote numbers: {path: text}."""
    folders = (".", "docs", "data/*", "tests/*", "lab", "forks", "exercises", "benchmarks")
    paths = sorted({path for folder in folders for path in ROOT.glob(f"{folder}/*.md")} - {RESULTS})
    return {path: path.read_text(encoding="utf-8") for path in paths}


@dataclass
class Config:
    out: str = "out/results"  # folder for the runs
    jobs: int = 2  # runs at a time, each on one thread
    seeds: int = 3  # runs of the whole pipeline
    instructions: str = ""  # a JSON list of instructions with preferences, for recipes/instructions.sh; empty: what
    # results.md says about that recipe stays
    bench: str = ""  # reports of benchmarks/bench.py --json, separated by commas; empty: the table of speeds stays
    versus: str = ""  # reports of `nanopost versus --json`, separated by commas: only their table is written
    check: bool = False  # only compare the documents with results.md
    quick: bool = False  # a few steps of everything, to try this command: writes results.md into --out, no document

    def __post_init__(self):
        at_least(self, 1, "jobs", "seeds")
        for option in ("bench", "versus"):
            for path in filter(None, getattr(self, option).split(",")):
                if not Path(path).is_file():
                    raise UserError(f"--{option}: there is no file {path}")


# title -> how to measure it, the names of its numbers
OPTIONAL = {
    "Parity with transformers": ('pip install -e ".[hf]"', "parity."),
    "Real instructions": ("--instructions FILE", "instructions."),
    "Verdicts over seeds": ("nanopost versus ... --json FILE, then --versus FILE", "versus."),
    "Speed": ("make bench BENCH='--json FILE ...', then --bench FILE", "speed."),
}


def keep_earlier(page: tables.Page, earlier: str):
    """The sections of OPTIONAL that were not measured this time stay as they are in results.md, with their numbers."""
    parts = re.split(r"^## (.*)\n\n", earlier, flags=re.MULTILINE)
    sections, numbers = dict(zip(parts[1::2], parts[2::2])), quotes.read_results(earlier).numbers
    for title, (how, prefix) in OPTIONAL.items():
        if title not in page.sections:
            page.section(title, sections.get(title, f"Not measured yet ({how}).").strip())
            page.numbers |= {name: value for name, value in numbers.items() if name.startswith(prefix)}
            print(f"{title}: not measured ({how}), left as it was")


# ------------------------------------------------------------------------------------------------------- results.md

HEAD = """# Results

Everything that was measured here. `make results` writes this page, and its numbers into the other documents.

Measured on {date} on {processor} ({capability}), {cores} cores, one thread per run, fp32;
Python {Python}, torch {torch}; seeds {seeds}. Another machine rounds differently, and its numbers differ a little."""

LEGEND = """\
- STAGE.COLUMN: the tables above, seed 0; seedN.STAGE.COLUMN: another seed; STAGE.way: how much of the way from the SFT
  model's gold reward to the best possible; quickstart.minutes: on one thread, with seed 0
- ppo-trunk: PPO without `--critic`, values and policy on one trunk, with as many answers
- ppo-two-passes: PPO with two passes over the answers of an iteration, in four steps each
- STAGE-at-0: the model at temperature 0, that is greedy; sft-best-of-4: the best of 4 of the SFT model's answers by the
  reward model's score; rm.reads_prompt: how often that score is higher under an answer's own prompt than under another
  of its family; contrastN: the same with N% of the pairs made for contrast; pairs40000: with four times as many pairs
- best4, best16, rest1, rest2: best of n by the sample tool, and one and two rounds of ReST
- RUN.METRIC.first, last, most: what the runs of seed 0 logged; ppo.first_ratio, ppo.first_approxkl: in the first
  minibatch of an iteration, the value farthest from 1 and from 0
- kl: log π - log π_ref of PPO's policy on 500 answers, in nats per answer; cold: sampled at temperature 0.7;
  reference: sampled from the reference; negative_answers, negative_tokens: how many are below 0
- loss: tokens of the held-out demonstrations, targets among them, ends among those; shortest: the answer above
- notes: the demonstrations of data/notes; sums: right answers to 200 held-out sums of three numbers before
  PPO, before it and greedy, and after it
- proof, parity: errors of the tests whose names begin so; proof.mistakes: how many are planted"""


def collect(config: Config, out: Path, stamps: dict) -> tables.Page:
    """All sections and numbers."""
    page, documents = tables.Page(), "".join(pages().values())
    measured = json.loads((out / "measured" / "measured.json").read_text())
    tables.pipeline(page, out, stamps)
    tables.sample_answers(page, measured)
    tables.best_of_n(page, out)
    tables.other_pairs(page, out)
    tables.betas(page, out)
    tables.sums(page, out)
    tables.logs(page, out)
    tables.closer_look(page, measured)
    tables.proofs(page, out, documents)
    if "parity" in stamps:
        tables.parity(page, out, stamps["parity"], documents)
    if "instructions" in stamps:
        tables.instructions(page, out, stamps["instructions"])
    if config.bench:
        tables.speed(page, config.bench.split(","))
    return page


def put_section(title: str, text: str, page: str) -> str:
    """results.md with another text of this section, which is the last one if it is new."""
    head, mark, numbers = page.partition(quotes.LIST)
    parts = re.split(r"^## (.*)\n\n", head, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2])) | {title: f"{text}\n\n"}
    return parts[0] + "".join(f"## {name}\n\n{body}" for name, body in sections.items()) + mark + numbers


def main(config: Config):
    out = Path(config.out).resolve()
    target = out / "results.md" if config.quick else RESULTS
    if config.versus:
        page = tables.Page()
        tables.versus(page, config.versus.split(","))
        [(title, text)] = page.sections.items()
        text = put_section(title, text, RESULTS.read_text(encoding="utf-8"))
        with atomic(str(RESULTS)) as f:
            f.write(text)
    elif not config.check:
        stamps = runs.run_all(runs.all_steps(out, config.seeds, config.instructions, config.quick), out, config.jobs)
        page = collect(config, out, stamps)
        keep_earlier(page, target.read_text(encoding="utf-8") if target.exists() else "")
        date = max(stamp["date"] for stamp in stamps.values())
        head = HEAD.format(date=date, seeds=", ".join(map(str, range(config.seeds))), **runs.conditions())
        sections = [f"## {title}\n\n{text}" for title, text in page.sections.items()]
        with atomic(str(target)) as f:
            f.write("\n\n".join([head, *sections, quotes.write_list(LEGEND, page.numbers)]))
        print(f"wrote {target}")
        picture = out / "seed0" / "plots" / "kl.png"
        if picture.exists() and not config.quick:
            shutil.copy(picture, ROOT / "docs" / "kl.png")
    if config.quick:
        return
    if not RESULTS.exists():
        raise UserError(f"there is no {RESULTS}; run docs/results.py")
    results, texts = quotes.read_results(RESULTS.read_text(encoding="utf-8")), pages()
    for path, text in texts.items():
        filled = quotes.fill(text, results)
        if not config.check and filled != text:
            texts[path] = filled
            with atomic(str(path)) as f:
                f.write(filled)
            print(f"filled {path.relative_to(ROOT)}")
    quotes.check({str(path.relative_to(ROOT)): text for path, text in texts.items()}, results)
    print(f"the documents quote {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    cli(main, Config)
