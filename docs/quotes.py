"""Numbers in documents: marked where they stand, kept in docs/results.md, written and checked by docs/results.py.

    PPO reaches 4.09<!--ppo.gold--> of 5        the number before the comment is the one with this name
    <!--table:seeds--> ... <!--end-->           a table or sample answers: everything between the two comments

A rendered page does not show the comments. To quote another number, write its name where the number should be,
<!--NAME-->, and run docs/results.py, which puts the number in front of it. docs/results.md holds the blocks, and at its
end every name with its value.
"""

import difflib
import re
from dataclasses import dataclass, field

from nanopost.config import UserError

NUMBER = (
    r"(?<![\w.,])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: ± [\d,]+(?:\.\d+)?)?%?"  # 4.09, 16,148, 1e-15, 47.8 ± 1.5%
)
NAME = r"[a-z][\w-]*(?:\.[\w\[\]-]+)+"  # ppo.gold, seed1.ppo.gold
MARKED = re.compile(rf"({NUMBER})?<!--({NAME})-->")
BLOCK = re.compile(r"(<!--table:([\w-]+)-->\n)(.*?)(<!--end-->)", re.DOTALL)
LIST = "## Every number by its name"  # the last section of results.md


@dataclass
class Results:
    """What docs/results.md holds."""

    numbers: dict[str, str] = field(default_factory=dict)  # name -> value, as it is written in a document
    blocks: dict[str, str] = field(default_factory=dict)  # name -> Markdown


def read_results(text: str) -> Results:
    """The blocks and the list of numbers of results.md."""
    head, _, numbers = text.partition(LIST)
    blocks = {name: content for _, name, content, _ in BLOCK.findall(head)}
    return Results(dict(re.findall(rf"^\| ({NAME}) +\| (.*?) +\|$", numbers, re.MULTILINE)), blocks)


def write_block(name: str, content: str) -> str:
    """A block as it stands in results.md. The blank lines let a table begin and end in every Markdown reader."""
    return f"<!--table:{name}-->\n\n{content}\n\n<!--end-->"


def write_list(legend: str, numbers: dict[str, str]) -> str:
    """The section at the end of results.md."""
    width = max(map(len, numbers))
    lines = [f"| {name:{width}} | {value} |" for name, value in numbers.items()]
    return "\n".join([LIST, "", legend, "", f"| {'name':{width}} | value |", f"| {'-' * width} | --- |", *lines, ""])


def fill(text: str, results: Results) -> str:
    """A document with the numbers and blocks of results.md. Names that results.md does not have are left alone."""

    def number(match):
        value, name = match.groups()
        return f"{results.numbers.get(name, value or '')}<!--{name}-->"

    def block(match):
        start, name, content, end = match.groups()
        return start + results.blocks.get(name, content) + end

    return MARKED.sub(number, BLOCK.sub(block, text))


def differences(text: str, results: Results) -> list[tuple[int, str]]:
    """(line, what is wrong) wherever a document does not quote results.md: an unknown name, another number or block."""
    found = []

    def add(position, message):
        found.append((text.count("\n", 0, position) + 1, message))

    def unknown(name, known):
        close = difflib.get_close_matches(name, known, 1)
        return f"results.md has no {name}" + (f"; is it {close[0]}?" if close else "")

    for match in MARKED.finditer(text):
        value, name = match.groups()
        if name not in results.numbers:
            add(match.start(), unknown(name, results.numbers))
        elif value != results.numbers[name]:
            add(match.start(), f"{name} is {results.numbers[name]} in results.md, not {value or 'missing'}")
    for match in BLOCK.finditer(text):
        _, name, content, _ = match.groups()
        if name not in results.blocks:
            add(match.start(), unknown(name, results.blocks))
        elif content != results.blocks[name]:
            add(match.start(), f"the block {name} is another one in results.md")
    if not text.count("<!--table:") == text.count("<!--end-->") == len(BLOCK.findall(text)):
        add(len(text), "a <!--table:NAME--> without its <!--end-->, or the other way round")
    return sorted(found)


# what holds no number that was measured: Markdown's code, formulas, links; numbers that are names
NOT_PROSE = [
    BLOCK,
    MARKED,
    re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE),
    re.compile(r"(?:^|(?<=\n\n))(?: {4,}.*(?:\n|$))+(?:\n*(?: {4,}.*(?:\n|$))+)*"),  # an indented block
    re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\1(?!`)", re.DOTALL),
    re.compile(r"\$\$.*?\$\$|\$[^$\n]+(?:\n[^$\n]+)?\$", re.DOTALL),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"(?<=\])\([^)\s]*\)"),
    re.compile(r"https?://\S+"),
    re.compile(r"(?i)arxiv[ :]*\d{4}\.\d{4,5}|\b\d{4}\.\d{5}\b"),
    re.compile(r"(?:Python|PyTorch|torch|TRL|transformers|CUDA|CC BY[\w-]*|version) v?\d+(?:\.\d+)+"),
    re.compile(r"\b\d+\.\d+\.\d+\b"),
]
MEASURED = re.compile(r"[-+−]?\d[\d,]*\.\d+(?:e[-+−]?\d+)?(?: ?%)?|\d+(?: ?%)|\d+e[-+−]?\d+")


def unmarked(text: str, constants=()) -> list[tuple[int, str]]:
    """(line, number) of every number with a decimal point, a percent sign or an exponent that no mark claims.

    It reads prose and tables: no code, formula or link, no version and no number of a paper. `constants` are phrases
    whose numbers were not measured.
    """

    def blank(match):
        return re.sub(r"[^\n]", "\0", match[0])  # the lines keep their numbers

    for pattern in NOT_PROSE:
        text = pattern.sub(blank, text)
    for phrase in constants:
        text = re.sub(r"(?<![\d.])" + r"\s+".join(map(re.escape, phrase.split())) + r"(?![\d%])", blank, text)
    return [(text.count("\n", 0, match.start()) + 1, match[0]) for match in MEASURED.finditer(text)]


def check(pages: dict[str, str], results: Results):
    """Raises UserError with a line for each difference between the pages (name -> text) and results.md."""
    lines = [f"{page}:{line}: {what}" for page, text in pages.items() for line, what in differences(text, results)]
    if lines:
        raise UserError("\n".join(["the documents and docs/results.md differ", *lines]))
