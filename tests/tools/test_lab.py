"""The lab: its list, its runs that are kept, its table and book; and that every experiment says what it claims."""

import ast
import importlib
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import experiment
from conftest import ROOT
from nanopost.config import UserError
from nanopost.tools import lab

SCRIPTS = lab.scripts()


# --------------------------------------------------------------------------------------------------- the experiments


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_experiment_states_its_claim_with_a_paper_and_what_to_try_next(name):
    text = ast.get_docstring(ast.parse(SCRIPTS[name].read_text(encoding="utf-8")))
    title, empty, *body = text.splitlines()
    assert len(title) < 60 and not empty
    assert "**Claim.**" in text and re.search(r"arXiv\s\d{4}\.\d{5}", text) and "Next:" in text
    assert len(SCRIPTS[name].read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_book_has_its_claim_picture_and_verdict(name):
    book = experiment.BOOK.read_text(encoding="utf-8")
    block = re.search(rf"<!--lab:{name}-->\n(.*?)\n<!--end of {name}-->", book, re.DOTALL)[1]
    assert block.startswith(f"## {lab.title(SCRIPTS[name])}\n")
    text = ast.get_docstring(ast.parse(SCRIPTS[name].read_text(encoding="utf-8")))
    assert text.partition("\n\n")[2] in block
    assert (experiment.FIGURES / f"{name}.png").stat().st_size < 150_000
    verdicts = experiment.REPLICATES, experiment.IN_PART, experiment.NOT_HERE
    [found] = re.findall(r"^\*\*([^*]*)\.\*\* ", block.partition("](figures/")[2], re.MULTILINE)
    assert found in verdicts
    assert f"| {found}" in book.split("<!--end of summary-->")[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_published_verdict_follows_from_the_published_numbers(name):
    module = importlib.import_module(name)
    report = json.loads((experiment.FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    assert module.judge(report["results"]) == (report["verdict"], report["why"])
    assert report["results"].keys() == module.ARMS.keys()
    book = experiment.BOOK.read_text(encoding="utf-8")
    assert f"**{report['verdict']}.** {report['why']}\n" in book
    for arm, row in report["results"].items():
        cells = [experiment.cell(row[column], form) for column, (_, form) in module.COLUMNS.items()]
        assert re.search(r"\| " + r" +\| ".join(map(re.escape, [arm, *cells])) + r" +\|\n", book), arm
        assert min(map(len, row.values())) == max(map(len, row.values())) >= 3, "three seeds"


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_lies_in_data_notes_is_imported_after_the_harness_that_puts_it_on_the_path(name):
    nodes = ast.parse(SCRIPTS[name].read_text(encoding="utf-8")).body
    names = [(node.lineno, node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [(node.lineno, alias.name) for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    order = [module for _, module in sorted(names)]
    notes = {path.stem for path in (ROOT / "data" / "notes").glob("*.py")}
    assert not notes & {*order[: order.index("experiment")]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_of_an_experiment_is_short_in_quick_mode(name):
    """Each training command names its length, so that --quick can shorten it."""
    module = importlib.import_module(name)
    scripts = [*module.ARMS.values(), getattr(module, "FIRST", "")]
    for line in "\n".join(scripts).replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|;", line):
            if re.search(r"\S*train_\w+\.py .*--init", command):
                assert re.search(r"--(steps|epochs) \S", command), command


@pytest.mark.parametrize("name", ["bugs", "where_the_kl_stands"])
def test_every_mistake_that_an_experiment_plants_changes_its_script(name):
    commands = "\n".join(importlib.import_module(name).ARMS.values())
    edits = set(re.findall(r"^sed '(.*)' (\S+) > ", commands, flags=re.MULTILINE))
    assert edits
    for edit, script in edits:
        text = subprocess.run(["sed", edit, script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert text != (ROOT / script).read_text(encoding="utf-8"), edit
        compile(text, script, "exec")


# -------------------------------------------------------------------------------------------------------- the harness


@pytest.fixture
def start(tmp_path):
    """A folder that looks like quickstart's."""
    for name in experiment.START:
        path = tmp_path / "start" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text("{}\n")
        else:
            path.mkdir()
            (path / "config.json").write_text("{}")
    return tmp_path / "start"


TOY = '''"""A toy

**Claim.** Ten is more than one (arXiv 0000.00000). Next: try eleven.
"""

import sys
from pathlib import Path

from experiment import IN_PART, REPLICATES, conduct, dots

ARMS = {{
    "one": "echo ran >> {log}; echo 1 > $here/x # --steps 90",
    "ten": "echo ran >> {log}; {fail} cp $first/ten $here/x",
}}


def make(folders):
    Path(folders.here, "ten").write_text("10")


def measure(folders):
    return {{"x": int(Path(folders.here, "x").read_text()) + folders.seed, "curve": [1, 2]}}


def judge(results):
    return (REPLICATES if max(results["one"]["x"]) < min(results["ten"]["x"]) else IN_PART), "Ten is more."


def draw(figure, results):
    dots(figure.subplots(), results, "x", "x")


if __name__ == "__main__":
    conduct(ARMS, {{"x": ("value", "{{:.1f}}")}}, measure, judge, draw, make=make)
'''


def run_toy(tmp_path, start, *options, fail=""):
    path, log = tmp_path / "toy.py", tmp_path / "log"
    path.write_text(TOY.format(log=log, fail=fail))
    words = [sys.executable, str(path), "--start", str(start), "--out", str(tmp_path / "out"), "--jobs", "1", *options]
    paths = ":".join([str(ROOT), str(ROOT / "lab"), str(ROOT / "data" / "notes")])
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": paths, "HOME": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    return done, log.read_text().count("ran") if log.exists() else 0


@pytest.mark.slow
def test_an_experiment_runs_each_arm_and_seed_once(tmp_path, start):
    pytest.importorskip("matplotlib")
    done, runs = run_toy(tmp_path, start)
    assert done.returncode == 0, done.stderr
    assert runs == 6
    report = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert report["results"]["ten"] == {"x": [10, 11, 12], "curve": [[1, 2]] * 3}
    assert report["verdict"] == "Replicates"
    assert re.search(r"\| ten +\| 11\.0 ± 2\.5 \|", done.stdout)  # t(0.975, 2) = 4.303, times 1 / sqrt(3)
    assert (tmp_path / "out" / "toy.png").stat().st_size > 1000

    done, runs = run_toy(tmp_path, start)
    assert done.returncode == 0 and runs == 6, "all is kept"
    done, runs = run_toy(tmp_path, start, "--seeds", "4")
    assert done.returncode == 0 and runs == 8, "only the new seed runs"
    (start / "rm" / "config.json").write_text("{} ")  # another start
    assert run_toy(tmp_path, start)[1] == 14


@pytest.mark.slow
def test_a_run_that_fails_leaves_no_folder_and_says_why(tmp_path, start):
    done, _ = run_toy(tmp_path, start, fail="echo no such thing; false;")
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()  # Matplotlib may have said something before
    assert line.startswith("error: ") and "no such thing" in line
    assert not list((tmp_path / "out" / "toy").glob("ten-*"))
    done, _ = run_toy(tmp_path, start)
    assert done.returncode == 0, "the next call goes on"


@pytest.mark.slow
def test_quick_gives_no_verdict_and_is_not_published(tmp_path, start):
    done, _ = run_toy(tmp_path, start, "--quick", "--publish")
    assert done.returncode == 2 and "--publish" in done.stderr
    done, runs = run_toy(tmp_path, start, "--quick")
    assert done.returncode == 0 and "No verdict." in done.stdout
    assert run_toy(tmp_path, start)[1] == runs + 6, "what was measured in a hurry is not taken for the whole"


def test_one_seed_is_no_evidence(tmp_path, start):
    done, _ = run_toy(tmp_path, start, "--seeds", "1")
    assert done.returncode == 2 and "seeds" in done.stderr


def test_the_interval_is_students():
    mean, half = experiment.interval([1.0, 2.0, 6.0])
    assert mean == pytest.approx(3.0)
    assert half == pytest.approx(4.302653 * math.sqrt(7) / math.sqrt(3), rel=1e-6)  # the variance is 14 / 2
    assert experiment.cell([0.5, 0.5], "{:.0%}") == "50%"


def test_publishing_fills_the_book_and_its_summary(tmp_path, monkeypatch):
    book = tmp_path / "README.md"
    book.write_text(
        "# Lab\n\n<!--lab:summary-->\nold\n<!--end of summary-->\n\n<!--lab:a-->\nold\n<!--end of a-->\n"
        "\n<!--lab:b-->\n## B, and more\n\n**Replicates in part.** So so.\n<!--end of b-->\n\nthe end\n"
    )
    monkeypatch.setattr(experiment, "BOOK", book)
    experiment.fill_book("a", "## A is\n\n**Claim.** C.\n\n**Replicates.** Yes.")
    text = book.read_text()
    assert "old" not in text and text.endswith("the end\n")
    assert re.search(r"\| \[A is\]\(#a-is\) +\| Replicates +\|", text)
    assert re.search(r"\| \[B, and more\]\(#b-and-more\) +\| Replicates in part +\|", text)
    with pytest.raises(UserError, match="lab:c"):
        experiment.fill_book("c", "")


# ------------------------------------------------------------------------------------------------------------- the tool


def test_the_tool_lists_the_experiments_with_their_verdicts(tool, tmp_path):
    (tmp_path / "safety.json").write_text('{"verdict": "Replicates"}')
    (tmp_path / "other.json").write_text("broken")
    code, out, _ = tool("lab", "--out", tmp_path)
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == [*SCRIPTS]
    [line] = [line for line in lines if line.split()[0] == "safety"]
    assert lab.title(SCRIPTS["safety"]) in line and line.endswith("Replicates")


def test_the_tool_runs_what_is_named_with_its_options(tool, tmp_path, monkeypatch):
    called = []

    def run(words, **_):
        called.append(words)
        return types.SimpleNamespace(returncode=0 if len(called) < 3 else 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert tool("lab", "safety", "--quick", "--seeds", "2", "--out", tmp_path)[0] == 0
    [words] = called
    assert Path(words[1]) == SCRIPTS["safety"] and {"--quick", "--seeds=2", f"--out={tmp_path}"} <= {*words}
    assert "--publish" not in words
    monkeypatch.setattr(lab, "scripts", lambda: dict.fromkeys("abc", SCRIPTS["safety"]))
    code, _, err = tool("lab", "all")
    assert code == 2 and len(called) == 3 and "experiment b" in err


def test_a_name_that_is_none_gets_one_line(tool):
    code, out, err = tool("lab", "nope")
    assert code == 2 and not out
    assert re.fullmatch(r"error: there is no experiment nope; there are .*safety.*\n", err)
