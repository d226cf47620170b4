"""Malformed input for every command: exit code 2, one line that says what is wrong and where, and nothing is lost.

To add an input, add a line to BAD: (command, options, what is in FILE, words of the error). The names of COMMANDS are
the commands, with options that are right; those of a line come after them and take their place. In options, SFT, RM
and the like are folders of the workshop. `make torture` makes many more: MUTATIONS of the right files and numbers.
"""

import dataclasses
import importlib
import io
import json
import os
import runpy
import shlex
import shutil
import sys
import typing

import pytest

from conftest import ROOT, SCRIPTS, contents, write_lines
from nanopost.config import flag
from torture.conftest import command_line, told_in_one_line

DEEP = "[" * 100_000
DIGITS = "9" * 5000

TRAINING = "--device cpu --steps 2 --max-new-tokens 8 --overwrite --out OUT"
COMMANDS = {  # name: (file, right options); OUT is a folder with a finished run, NEW does not exist
    "chat": ("nanopost/__main__.py", "chat SFT --prompt Hi --max-new-tokens 4 --device cpu"),
    "sample": ("nanopost/__main__.py", "sample SFT --prompts PROMPTS --max-new-tokens 8 --device cpu --out NEW/x"),
    "evaluate": (
        "nanopost/__main__.py",
        "evaluate SFT --reference SFT --prompts PROMPTS --reward RM --pairs PAIRS --gold REWARD:vowels --samples 1 "
        "--max-new-tokens 8 --device cpu",
    ),
    "label": ("nanopost/__main__.py", "label SFT --prompts PROMPTS --max-new-tokens 8 --device cpu --out NEW/x"),
    "show": ("nanopost/__main__.py", "show SFT_DATA --vocab VOCAB"),
    "alpaca": ("data/alpaca/prepare.py", "--file ALPACA --valid 0.5 --out NEW"),
    "hh": ("data/hh/prepare.py", "--file HH --valid HH --out NEW"),
    "ultrafeedback": ("data/ultrafeedback/prepare.py", "--file UF --valid UF --out NEW"),
    "annotate": ("data/notes/annotate.py", "--policy SFT --prompts PROMPTS --device cpu --max-new-tokens 8 --out NEW"),
    "sums": ("data/notes/sums.py", "--out NEW"),
    "notes": ("data/notes/prepare.py", "--out NEW"),
    "plot": ("nanopost/__main__.py", "plot REPORT --out NEW"),
    **{script: (f"train_{script}.py", "") for script in SCRIPTS},  # Workshop.config has the rest
}
GOOD = [name for name in COMMANDS if name not in ("annotate", "notes", "plot", "hh", "ultrafeedback")]

PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
BAD = [
    # numbers
    ("sft", "--lr nan", None, "--lr"),
    ("sft", "--lr inf", None, "--lr"),
    ("sft", "--lr 1e400", None, "--lr"),
    ("sft", "--weight-decay nan", None, "--weight-decay"),
    ("sft", "--grad-clip nan", None, "--grad-clip"),
    ("sft", "--grad-clip -1", None, "--grad-clip"),
    ("sft", "--warmup nan", None, "--warmup"),
    ("sft", "--warmup -1", None, "--warmup"),
    ("sft", "--warmup 5", None, "--warmup"),
    ("sft", "--seed -1", None, "--seed"),
    ("sft", "--seed 1e30", None, "--seed"),
    ("sft", "--batch-size 0", None, "--batch-size"),
    ("sft", "--batch-size 1.5", None, "--batch-size"),
    ("sft", "--log-every 0", None, "--log-every"),
    ("sft", "--steps many", None, "--steps"),
    ("sft", "--speed 9", None, "--speed"),
    ("sft", "--device abacus", None, "--device"),
    ("sft", "--device meta", None, "--device"),
    ("sft", "--dtype fp8", None, "--dtype"),
    ("sft", "--logs paper", None, "--logs"),
    ("sft", "--out ''", None, "--out"),
    ("sft", "--steps=--", None, "--steps"),
    ("rm", "--normalise -1", None, "--normalise"),
    ("rm", "--max-new-tokens 48 --normalise 1", None, "--max-new-tokens"),
    ("dpo", "--beta nan", None, "--beta"),
    ("dpo", "--label-smoothing 2", None, "--label-smoothing"),
    ("ppo", "--value-coef -1", None, "--value-coef"),
    ("ppo", "--kl-target nan", None, "--kl-target"),
    ("ppo", "--kl-target -1", None, "--kl-target"),
    ("ppo", "--temperature nan", None, "--temperature"),
    ("ppo", "--temperature 1e-30", None, "--temperature"),
    ("ppo", "--minibatches 0", None, "--minibatches"),
    ("chat", "--temperature -1", None, "--temperature"),
    ("chat", "--temperature 1e-30", None, "--temperature"),
    ("chat", "--top-p 2", None, "--top-p"),
    ("chat", "--max-new-tokens 0", None, "--max-new-tokens"),
    ("chat", "--seed 1e30", None, "--seed"),
    ("sample", "--n 0", None, "--n"),
    ("sample", "--threshold nan --reward RM", None, "--threshold"),
    ("sample", "--keep worst", None, "--keep"),
    ("sample", "--keep best", None, "--reward"),
    ("sample", "--out OUT", None, "--out"),
    ("sample", "--out ''", None, "--out"),
    ("evaluate", "--max-new-tokens 0", None, "--max-new-tokens"),
    ("evaluate", "--temperature -1", None, "--temperature"),
    ("evaluate", "--reward ''", None, "--reward"),
    ("evaluate", "--json OUT", None, "--json"),
    ("evaluate", "--json nowhere/x.json", None, "--json"),
    ("label", "--temperature 0", None, "--temperature"),
    ("label", "--out OUT", None, "--out"),
    ("show", "--count -1", None, "--count"),
    ("alpaca", "--valid nan", None, "--valid"),
    ("hh", "--valid ''", None, "--valid"),
    ("annotate", "--pairs 0", None, "--pairs"),
    ("annotate", "--temperature nan", None, "--temperature"),
    ("annotate", "--policy nowhere", None, "nowhere"),
    ("sums", "--outt x", None, "--outt"),
    ("notes", "--seed x", None, "--seed"),
    # models and judges
    ("sft", "--init nowhere", None, "nowhere"),
    ("sft", "--init RM", None, "reward model"),
    ("ppo", "--reward SFT", None, "language model"),
    ("ppo", "--reward OTHER_RM", None, "different vocabularies"),
    ("ppo", "--critic OTHER_RM", None, "different vocabularies"),
    ("ppo", "--reward REWARD:nothing", None, "nothing"),
    ("ppo", "--reward FILE.py:f", "def f(prompts, completions): return [float('nan')] * len(prompts)", "finite"),
    ("ppo", "--reward FILE.py:f", "def f(prompts, completions): return []", "number"),
    ("ppo", "--reward FILE.py:f", "def f(prompts, completions): return ['x'] * len(prompts)", "f"),
    ("evaluate", "--gold FILE.py:f", "def f(prompts, completions): return [10**400] * len(prompts)", "f"),
    ("show", "--vocab FILE", "x", "FILE:1"),
    ("show", "--vocab FILE", "eA== 0\neA== 1", "FILE"),
    ("show", "--vocab FILE", f"eA== {DIGITS}", "FILE:1"),
    # records
    ("sft", "--data FILE", "", "FILE: no examples"),
    ("sft", "--data FILE", "{oops", "FILE:1: invalid JSON"),
    ("sft", "--data FILE", b'{"text": "\xff"}', "FILE:1: not UTF-8"),
    ("sft", "--data FILE", DEEP, "FILE:1"),
    ("sft", "--data FILE", f'{{"text": {DIGITS}}}', "FILE:1"),
    ("sft", "--data FILE", "[1]", "FILE:1: a record must be an object"),
    ("sft", "--data FILE", "{}", "FILE:1: needs text"),
    ("sft", "--data FILE", '{"text": ""}', "FILE:1: text"),
    ("sft", "--data FILE", '{"prompt": "a", "completion": ""}', "FILE:1: completion is empty"),
    ("sft", "--data FILE", '{"prompt": 3, "completion": "a"}', "FILE:1: prompt"),
    ("sft", "--data FILE", '{"messages": "a"}', "FILE:1: messages"),
    ("sft", "--data FILE", '{"messages": [{"role": "bot", "content": "a"}]}', "FILE:1"),
    ("sft", "--data FILE", '{"\\u001b[2J": 1}', "FILE:1"),
    ("sft", "--data FILE", json.dumps({"k" * 10**6: 1}), "FILE:1"),
    ("sft", "--data PIPE", None, "PIPE"),
    ("sft", "--data OUT", None, "OUT"),
    ("sft", "--valid FILE", "{oops", "FILE:1"),
    ("rm", "--data FILE", '{"chosen": "a", "rejected": "b"}', "FILE:1: prompt"),
    ("rm", "--data FILE", f"{PAIR}\n{PAIR[:-3]}", "FILE:2"),
    ("dpo", "--data FILE", '{"prompt": "a", "chosen": "b"}', "FILE:1"),
    ("dpo", "--data FILE", '{"prompt": "a", "chosen": "b", "rejected": "b"}', "FILE"),
    ("ppo", "--prompts FILE", '{"prompt": [{"role": "assistant", "content": "a"}]}', "FILE:1"),
    ("ppo", "--prompts FILE", json.dumps({"prompt": "x" * 60}), "FILE"),
    ("evaluate", "--pairs FILE", PAIR[:-1] + ', "probability": 2}', "FILE:1: probability"),
    ("evaluate", "--pairs FILE", PAIR[:-1] + ', "probability": "x"}', "FILE:1: probability"),
    ("label", "--out FILE", "two words", "FILE:1"),
    ("label", "--out FILE", PAIR, "FILE:1"),
    ("alpaca", "--file FILE", DEEP, "FILE"),
    ("alpaca", "--file FILE", b"\x1f\x8b\x08", "FILE"),
    ("alpaca", "--file FILE", b"PAR1PAR1", "arquet"),
    ("alpaca", "--file FILE", '[{"instruction": 1}]', "FILE[0]"),
    ("alpaca", "--file PIPE", None, "PIPE"),
    ("hh", "--file FILE", '{"chosen": "x"}', "FILE:1"),
    ("ultrafeedback", "--file FILE", '{"chosen": "x"}', "FILE:1"),
    ("annotate", "--prompts FILE", '{"prompt": "x"}', "FILE"),
    ("plot", "FILE", "hello", "nothing to draw"),
    ("plot", "FILE", '{"rows": [{"stage": "a", "kl": "x", "gold": 1}]}', "FILE"),
    ("plot", "PIPE", None, "nothing to draw"),
]  # fmt: skip


def identify(bad) -> str:
    command, options, content, _ = bad
    return f"{command} {options} {str(content)[:30] if content is not None else ''}".strip()


# ------------------------------------------------------------------------------------------------------ the commands


class Commands:
    """commands(name, options, content) runs one -> (exit code, stdout, stderr). No finished run is lost by it."""

    def __init__(self, workshop, folder, capfd, monkeypatch):
        self.workshop, self.folder, self.capfd, self.monkeypatch = workshop, folder, capfd, monkeypatch
        self.out = shutil.copytree(workshop.path("base"), folder / "out")
        self.file = folder / "file"
        os.mkfifo(folder / "pipe")
        turns = "\n\nHuman: Tea{}?\n\nAssistant: {}."
        rows = [{"chosen": turns.format(i, "Yes"), "rejected": turns.format(i, "No")} for i in range(4)]
        messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": c}] for c in "bc"]
        uf = dict(chosen=messages[0], rejected=messages[1], score_chosen=2.0, score_rejected=1.0)
        task = [{"instruction": f"Count to {i}.", "input": "", "output": f"To {i}."} for i in range(20)]
        report = {"rows": [{"stage": "a", "kl": 1.0, "gold": 1.0}]}
        self.names = dict(
            SFT=workshop.path("sft"), RM=workshop.path("rm"), OTHER_RM=workshop.path("other_vocab_rm"),
            REWARD=workshop.path("reward.py"), VOCAB=workshop.path("vocab.tiktoken"),
            SFT_DATA=workshop.path("sft_valid.jsonl"), PROMPTS=workshop.path("prompts_valid.jsonl"),
            PAIRS=workshop.path("pairs_valid.jsonl"), ALPACA=write_lines(folder / "alpaca", task),
            HH=write_lines(folder / "hh", rows), UF=write_lines(folder / "uf", [uf]),
            REPORT=write_lines(folder / "report.json", [report]), OUT=str(self.out), NEW=str(folder / "new"),
            PIPE=str(folder / "pipe"), FILE=str(self.file),
        )  # fmt: skip
        self.before = contents(self.out)

    def named(self, word: str) -> str:
        """The word with the path in place of a name."""
        for name in sorted(self.names, key=len, reverse=True):
            if word == name or word.startswith((f"{name}:", f"{name}/", f"{name}.", f"{name}[")):
                return self.names[name] + word[len(name) :]
        return word

    def right(self, name: str) -> list[str]:
        if name in SCRIPTS:
            return command_line(self.workshop.config(name, self.out, steps=2))
        return [self.named(word) for word in shlex.split(COMMANDS[name][1])]

    def __call__(self, name: str, options: str = "", content=None) -> tuple[int, str, str]:
        words = [self.named(word) for word in shlex.split(options)]
        for path in (self.file, self.file.with_suffix(".py")):
            path.unlink(missing_ok=True)
        if content is not None:
            path = next((word.partition(":")[0] for word in words if word.startswith(str(self.file))), self.file)
            write = open(path, "wb")
            write.write(content if isinstance(content, bytes) else content.encode())
            write.close()
        right = self.right(name)
        if name == "plot" and words:
            right[1:2] = []  # what is drawn is given in its place
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("l\n"))
        self.monkeypatch.setattr(sys, "argv", [os.path.basename(COMMANDS[name][0]), *right, *words])
        self.capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / COMMANDS[name][0]), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return code, *self.capfd.readouterr()

    def complaint(self, name: str, options: str, content, *words: str) -> str:
        """What is wrong with how the command refuses this, or "" if nothing is."""
        try:
            code, _, err = self(name, options, content)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        lost = contents(self.out) != self.before
        if lost:
            shutil.rmtree(self.out)
            shutil.copytree(self.workshop.path("base"), self.out)
            return "the finished run in --out is lost"
        leftover = [path.name for path in self.folder.rglob("*.tmp")]
        if leftover:
            return f"it left {leftover}"
        if not told_in_one_line(code, err, *(self.named(word) for word in words)):
            return f"exit code {code}, {err[:300]!r}"
        return ""


@pytest.fixture
def commands(workshop, tmp_path, capfd, monkeypatch):
    return Commands(workshop, tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize("name", GOOD)
def test_the_right_options_are_right(commands, name):
    code, _, err = commands(name)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("bad", BAD, ids=identify)
def test_bad_input_is_told_in_one_line_and_costs_nothing(commands, bad):
    name, options, content, words = bad
    assert commands.complaint(name, options, content, words) == ""


# ----------------------------------------------------------------------------------------------------- the mutations

NUMBERS = ["nan", "-nan", "inf", "-inf", "1e400", "one", "", "0x1", "1e", "1,5", "1" + "0" * 400, "٣e", "1 2"]
MODULES = {"annotate": "annotate", "notes": "prepare", **{script: f"train_{script}" for script in SCRIPTS}}
MODULES |= {tool: f"nanopost.tools.{tool}" for tool in ("chat", "sample", "evaluate", "label", "show")}
VALUES = ["null", "3", "true", "[]", "{}", "[[]]", '""', "NaN", "1e400", DIGITS, '["a"]', '[{"role": "user"}]', DEEP]


def numbers() -> list[tuple]:
    """Every option that is a number, with what is none."""
    cases = []
    for name, module in MODULES.items():
        config = importlib.import_module(module).Config
        for field in dataclasses.fields(config):
            if typing.get_type_hints(config)[field.name] in (int, float):
                cases += [(name, f"{flag(field.name)}={shlex.quote(x)}", None, flag(field.name)) for x in NUMBERS]
    return cases


# {command and option: a right record, the keys that it needs}
RECORDS = {
    "sft --data": ({"prompt": "a", "completion": "b"}, ["prompt", "completion"]),
    "sft --valid": ({"prompt": "a", "completion": "b"}, ["prompt", "completion"]),
    "rm --data": ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["prompt", "chosen", "rejected"]),
    "dpo --data": ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["prompt", "chosen", "rejected"]),
    "dpo --valid": ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["prompt", "chosen", "rejected"]),
    "ppo --prompts": ({"prompt": "a"}, ["prompt"]),
    "sample --prompts": ({"prompt": "a"}, ["prompt"]),
    "evaluate --prompts": ({"prompt": "a"}, ["prompt"]),
    "evaluate --pairs": ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["prompt", "chosen", "rejected"]),
    "label --prompts": ({"prompt": "a"}, ["prompt"]),
    "alpaca --file": ({"instruction": "a", "input": "", "output": "b"}, ["instruction", "output"]),
    "hh --file": ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, ["chosen"]),
}


def cut(record, keys, rng):
    text = json.dumps(record)
    return text[: rng.randrange(1, len(text))]


def no_text(record, keys, rng):
    data = json.dumps(record).encode()
    at = rng.randrange(len(data))
    return data[:at] + b"\xff" + data[at:]


def without(record, keys, rng):
    gone = rng.choice(keys)
    return json.dumps({key: value for key, value in record.items() if key != gone})


def another_type(record, keys, rng):
    key = rng.choice(keys)
    return json.dumps(record).replace(json.dumps(record[key]), rng.choice([v for v in VALUES if v != '""']), 1)


def no_record(record, keys, rng):
    return rng.choice([*VALUES, "oops", "{]", "'a'", '{"a" 1}', "\x00", "{" * 9])


def a_character_more(record, keys, rng):
    return json.dumps(record) + rng.choice(']},:"x1\x00\x1b')


MUTATIONS = [cut, no_text, without, another_type, no_record, a_character_more]


def mutated(rng) -> tuple:
    """A right file, changed so that it is wrong: the fault is in one of its lines."""
    place = rng.choice(list(RECORDS))
    record, keys = RECORDS[place]
    line = rng.choice(MUTATIONS)(record, keys, rng)
    good = json.dumps(record)
    before = rng.randrange(4)
    lines = [*[good] * before, line, *[good] * rng.randrange(3)]
    content = b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines)
    command, option = place.split()
    return command, f"{option} FILE", content, "FILE"


def test_numbers_that_are_none_and_mutated_files_are_told_in_one_line(commands, rng, times):
    cases = rng.sample(numbers(), min(20 * times, len(numbers()))) + [mutated(rng) for _ in range(25 * times)]
    complaints = {}
    for name, options, content, words in cases:
        if complaint := commands.complaint(name, options, content, words):
            complaints[f"{name} {options}", str(content)[:100]] = complaint
    assert not complaints, f"{len(complaints)} of {len(cases)}"
