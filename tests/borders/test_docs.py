"""What the documents say can be followed: commands parse, links lead somewhere, numbers are in docs/results.md."""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from docs import quotes, results
from nanopost.__main__ import TOOLS
from nanopost.config import UserError, parse

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*results.pages(), *ROOT.glob("docs/results.md"), *ROOT.glob("recipes/*.md")])
SHELL = sorted([*ROOT.glob("recipes/*.sh"), ROOT / ".ci" / "run"])
FOLDERS = (
    ".",
    "nanopost",
    "nanopost/tools",
    "data/*",
    "docs",
    "benchmarks",
    "forks",
    "exercises",
    "lab",
    "tests/proofs",
)
PYTHON = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------------------- commands

INTERPRETERS = ("python", "python3", ".venv/bin/python", "$python")
WRONG = (AssertionError, SystemExit, UserError)  # how a wrong command shows


def code_of_markdown(text: str) -> list[str]:
    """The lines of code blocks, and the code within the prose."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for original, copy in re.findall(r"\bcp (\S+\.py) (\S+\.py)", text):
        text = text.replace(copy, original)  # a script that the reader makes
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.sub(r" *\\\n\s*", " ", "\n".join([text, *(re.sub("^", "    ", block, flags=re.M) for block in fenced)]))
    blocks = [line for line in lines.splitlines() if line.startswith("    ") and line.strip()]
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return blocks + [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def code_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return code_of_markdown(text)
    if path.suffix == ".py":
        return code_of_markdown(ast.get_docstring(ast.parse(text), clean=False) or "")
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE):
        text = text.replace(f"${name}", value)  # options that the commands share
    usage = [line[1:] for line in text.splitlines() if line.startswith("#     ")]
    return re.sub(r" *\\\n\s*", " ", text).splitlines() + usage


def words_of(line: str) -> list[list[str]]:
    """The commands of a line, each as words: no comment, no prompt, no environment, and 0 for a variable."""
    line = re.sub(r"\s#.*|\s{2,}\S.*", "", line.strip().removeprefix("$ "))
    line = re.sub(r"\$\(\(.*?\)\)|\$\{[^}]*\}|\$(?!python\b|nanopost\b)\w+", "0", line)
    commands = []
    for part in re.split(r" (?:&&|\|\||\|)(?: |$)|; ", line):
        try:
            words = shlex.split(part)
        except ValueError:  # no command: prose with an apostrophe
            continue
        while words and (re.match(r"[A-Za-z_]+=", words[0]) or words[0] in ("do", "then")):
            words = words[1:]
        if words:
            commands.append(words)
    return commands


@functools.cache
def config_of(target: str):
    """The Config class of a script (a path) or a module, or None if it takes its options in another way."""
    if target.endswith(".py"):
        assert (ROOT / target).is_file(), f"there is no {target}"
        name = "parsed_" + target.removesuffix(".py").replace("/", "_")  # beside the module that other tests import
        spec = importlib.util.spec_from_file_location(name, ROOT / target)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(target)
    return getattr(module, "Config", None)


def check_options(words: list[str]):
    """A script or module, and arguments for its own parser."""
    target, *arguments = (word for word in words if word != "...")
    if config := config_of(target):
        parse(config, arguments)
    else:
        source = (ROOT / target).read_text(encoding="utf-8")
        for option in arguments:
            assert not option.startswith("--") or f'"{option}"' in source, f"{target} has no {option}"


def check_tool(words: list[str]):
    """nanopost TOOL arguments"""
    tool, *arguments = words
    assert tool in TOOLS or tool.isupper(), f"there is no tool {tool}"
    if arguments:
        check_options([f"nanopost.tools.{tool}", *arguments])


def check_pytest(words: list[str]):
    """Paths exist, and the words after -k select a test."""
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    for i, word in enumerate(words):
        if words[i - 1] == "-k":
            assert word in tests, f"-k {word} selects no test"
        elif "/" in word:
            assert (ROOT / word.split("::")[0]).exists(), f"there is no {word}"


def check_script(words: list[str]):
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"


def check_make(words: list[str]):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            used = makefile + "".join(path.read_text(encoding="utf-8") for path in SHELL)
            assert re.search(rf"\$[({{]{name}\b", used), f"make: nothing reads {name}"
        else:
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"make: there is no target {name}"


def check_pip(words: list[str]):
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    for names in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        for name in names.split(","):
            assert re.search(rf"^{name} = \[", extras, re.MULTILINE), f"pip: there is no extra {name}"


def checker(words: list[str]):
    """(what checks it, its arguments) of a command of ours, or None."""
    program, *rest = words
    if program in INTERPRETERS and rest:
        if rest[0] == "-m" and len(rest) > 1:
            if rest[1].startswith("nanopost."):
                return check_options, rest[1:]
            return checker(rest[1:])
        if rest[0].endswith(".py"):
            return check_options, rest
    if program == "torchrun":
        script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        return check_options, rest[script:]
    if re.fullmatch(r"(\./|recipes/)[\w/]+\.sh", program):
        return check_script, words
    checks = {
        "nanopost": check_tool,
        "$nanopost": check_tool,
        "pytest": check_pytest,
        "make": check_make,
        "pip": check_pip,
    }
    return (checks[program], rest) if rest and program in checks else None


def check(words: list[str]):
    """Raises one of WRONG if a command of ours does not parse."""
    function, arguments = checker(words)
    function(arguments)


SOURCES = PAGES + SHELL + PYTHON
EVERY = {(name_of(path), tuple(words)) for path in SOURCES for line in code_of(path) for words in words_of(line)}
OURS = sorted((page, words) for page, words in EVERY if checker(words))


@pytest.mark.parametrize("page, words", OURS, ids=[f"{page}: {' '.join(words)[:70]}" for page, words in OURS])
def test_a_command_parses(page, words):
    check(words)


def test_the_commands_are_found():
    assert len(OURS) > 60
    pages = {page for page, _ in OURS}
    assert pages >= {
        "README.md",
        "CONTRIBUTING.md",
        "docs/faq.md",
        "docs/proofs.md",
        "recipes/quickstart.sh",
        "docs/results.py",
    }
    assert pages >= {f"train_{script}.py" for script in ("sft", "rm", "dpo", "ppo")}
    assert pages >= {f"nanopost/tools/{tool}.py" for tool in TOOLS}


WRONG_COMMANDS = (
    """
python train_dpo.py --bta 0.2
python train_sft.py --lr fast
python nowhere.py
PYTHON=x $python train_rm.py --nope 1  # a comment
cd somewhere && python train_rm.py --nope 1
torchrun --nproc_per_node=2 train_dpo.py --stesp 3
python data/notes/prepare.py --sed 1
nanopost evaluat out/sft
nanopost evaluate out/sft --samples 0
nanopost chat out/ppo --promt hello
.venv/bin/python -m nanopost sample --n 2
make quickstrat
make bench BNCH=x
pip install -e ".[nothing]"
python -m pytest tests/nowhere.py
python -m pytest -k no_such"""
    + """_property
recipes/nothing.sh file
"""
)


@pytest.mark.parametrize("line", WRONG_COMMANDS.strip().splitlines())
def test_a_wrong_command_is_found(line):
    with pytest.raises(WRONG):
        for words in words_of(line):
            if checker(words):
                check(words)


def test_commands_are_found_in_markdown_docstrings_and_scripts(tmp_path):
    text = (
        "Run `make\ntest`, or\n\n    $ nanopost chat x  # talk\n    python a.py \\\n        --b\n\n```\nmake c\n```\n"
    )
    found = [words_of(line) for line in code_of_markdown(text)]
    assert found == [[["nanopost", "chat", "x"]], [["python", "a.py", "--b"]], [["make", "c"]], [["make", "test"]]]
    copied = "Type `cp a.py mine.py`, then\n\n    python mine.py --b\n"
    assert [["python", "a.py", "--b"]] in [words_of(line) for line in code_of_markdown(copied)]
    (tmp_path / "a.py").write_text('"""Does it.\n\n    python a.py --b  does it\n"""\n')
    assert [words_of(line) for line in code_of(tmp_path / "a.py")] == [[["python", "a.py", "--b"]]]
    (tmp_path / "a.sh").write_text(
        'all="--c 1"\nSEED=$seed $python a.py $all --seed $seed --out $out/sft ||\\\n  echo no\n'
    )
    assert [words_of(line) for line in code_of(tmp_path / "a.sh")] == [
        [],
        [["$python", "a.py", "--c", "1", "--seed", "0", "--out", "0/sft"], ["echo", "no"]],
    ]


# ---------------------------------------------------------------------------------------------------------- links


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files, headings or code that are not there. `[name](file.py)` in code style needs the name in the file;
    with #L12 it must be defined in that line."""
    broken = []
    for label, target in re.findall(r"!?\[([^\]]*)\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        path = page.parent / name if name else page
        code = path.read_text(encoding="utf-8") if path.is_file() and path.suffix in (".py", ".md") else ""
        wanted = label.strip("`").split("`")[0] if label.startswith("`") else ""
        if not path.exists():
            broken.append(target)
        elif re.fullmatch(r"L\d+", anchor):
            line = [*code.splitlines(), *[""] * 10000][int(anchor[1:]) - 1]
            broken += [] if re.match(rf"(def|class) {wanted}\b", line) else [f"{target}: {line[:40]!r} is not {wanted}"]
        elif anchor and anchor not in map(slug, re.findall(r"^#+ (.*)$", code, re.MULTILINE)):
            broken.append(target)
        elif wanted and path.suffix == ".py" and wanted not in code:
            broken.append(f"{target}: no {wanted}")
    return broken


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=map(name_of, PAGES))
def test_links_lead_to_files_headings_and_the_code_they_name(page):
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("## Why, and how?\n")
    (tmp_path / "code.py").write_text("x = 1\ndef loss(a):\n")
    good = (
        "[a](code.py) [`loss`](code.py#L2) [`x`](code.py) [w](#why-and-how) [w](page.md#why-and-how) [u](https://x.y/z)"
    )
    assert broken_links(page, good) == []
    for bad in ("[a](none.py)", "[`loss`](code.py#L1)", "[`loss`](code.py#L9)", "[`y`](code.py)", "[w](#what)"):
        assert len(broken_links(page, good + bad)) == 1, bad


# -------------------------------------------------------------------------------------------------------- numbers

STRICT = [path for path in results.pages() if path.parent in (ROOT, ROOT / "docs")]

CONSTANTS = {  # phrases of the documents whose numbers nobody measured, and where they are from
    "sampled at 0.7": "the temperature that kl.cold was measured at (docs/measure.py)",
    "Add to the reward 0.3 standard deviations": "the better of 0.1 and 0.3 on an earlier run's pairs",
    "= 0.15$": "quickstart's --beta of PPO",
    "= 0.3$": "quickstart's --beta of DPO",
    "PPO has 0.15": "quickstart's --beta",
    "loss 0.693": "ln 2",
    "above 0.3 or an approxkl above 0.1": "rules of thumb",
    "about 1.5 billion parameters": "an estimate from the bytes per parameter",
    "more than 0.3 away": "asserted by tests/proofs/test_convergence.py",
}


def test_the_documents_quote_results_md():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    quotes.check({name_of(path): text for path, text in results.pages().items()}, quotes.read_results(text))


@pytest.mark.parametrize("page", STRICT, ids=map(name_of, STRICT))
def test_every_number_of_a_document_is_measured_or_a_constant(page):
    assert quotes.unmarked(page.read_text(encoding="utf-8"), CONSTANTS) == []


def test_every_constant_is_still_quoted():
    text = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in STRICT)
    assert [phrase for phrase in CONSTANTS if phrase not in text] == []


RESULTS = quotes.Results(
    {"ppo.gold": "4.09", "kl.policy": "1.71 ± 0.07", "loss.share": "68%"}, {"seeds": "\n| 1 |\n\n"}
)
GOOD = """# Page

PPO reaches 4.09<!--ppo.gold--> at 1.71 ± 0.07<!--kl.policy--> nats, and 68%<!--loss.share--> are targets.

<!--table:seeds-->

| 1 |

<!--end-->
"""


def test_results_md_is_read_back_as_it_was_written():
    page = quotes.write_block("seeds", "| 1 |") + "\n\n" + quotes.write_list("legend", RESULTS.numbers)
    assert quotes.read_results(page) == RESULTS
    assert quotes.differences(GOOD, RESULTS) == [] and quotes.unmarked(GOOD) == []


@pytest.mark.parametrize(
    "right, wrong, line",
    [
        ("4.09<", "4.10<", 3),
        ("4.09<", "-4.09<", 3),
        ("4.09<", "14.09<", 3),
        ("4.09<", "<", 3),
        ("± 0.07", "± 0.08", 3),
        ("68%", "68", 3),
        ("ppo.gold", "ppo.glod", 3),
        ("| 1 |", "| 2 |", 5),
        ("table:seeds", "table:sedes", 5),
        ("<!--end-->\n", "", 9),
    ],
)
def test_a_number_that_is_not_the_one_of_results_md_is_found_and_mended(right, wrong, line):
    page = GOOD.replace(right, wrong)
    found = quotes.differences(page, RESULTS)
    assert [at for at, _ in found] == [line]
    with pytest.raises(UserError, match=rf"page\.md:{line}: "):
        quotes.check({"page.md": page}, RESULTS)
    known = all(message not in found[0][1] for message in ("results.md has no", "without its"))
    assert (quotes.fill(page, RESULTS) == GOOD) == known


UNMARKED = """
It reaches 4.09 now.
About 97% are right.
| gold | -3.00 |
An error of 1e-15.
4.09 <!--ppo.gold-->
**0.5**
half (0.5), as in arXiv 2009.01325
from 1.5 to 4.09<!--ppo.gold-->
4.09<!--ppo.gold--> and 5.5
`a` 0.5 `b`
$x$ 0.5 $y$
1,234.5
≈0.5
- 0.5
[0.5](https://x.y)
"""


@pytest.mark.parametrize("text", UNMARKED.strip().splitlines())
def test_a_number_that_no_mark_claims_is_found(text):
    assert len(quotes.unmarked(f"# Page\n\n{text}\n")) == 1


NO_NUMBERS = """
500 prompts, 10,000 answers
`--lr 0.5`
    python x.py --lr 0.5
$x = 0.5$
arXiv 2009.01325
[a](https://x.y/0.5)
[2009.01325](https://arxiv.org/abs/2009.01325)
https://arxiv.org/abs/2009.01325
CPython 3.10 and torch 2.13
TRL 1.16.0
4.09<!--ppo.gold-->
the default of 0.5
"""


@pytest.mark.parametrize("text", [*NO_NUMBERS.strip("\n").splitlines(), "```\n0.5\n```", "a `b\n0.5`"])
def test_code_formulas_versions_papers_marks_and_constants_are_no_measured_numbers(text):
    assert quotes.unmarked(f"# Page\n\n{text}\n", {"default of 0.5": "given"}) == []


def test_a_constant_is_only_its_own_phrase():
    found = quotes.unmarked("default of 0.55, 0.5, default of\n0.5", {"default of 0.5"})
    assert found == [(1, "0.55"), (1, "0.5")]
