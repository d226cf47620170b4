"""Judging by hand: what is shown, what every key does, and that no judgement is ever lost."""

import errno
import io
import json
import os
import random
import re
import sys

import pytest

from conftest import contents
from nanopost.config import UserError
from nanopost.data import Example, load_pairs
from nanopost.tools import label
from nanopost.tools.label import Judgements, layout, record_of, two_answers

SHOWN = [("x", "of x"), ("y", "of y")]  # left and right


def read(path):
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


def answer(text, ended=True):
    return Example(ids=[1], mask=[True], text=text, ended=ended)


@pytest.fixture
def judge(workshop, tool, monkeypatch, tmp_path):
    """judge("lrq") types these keys, one per line, then the input ends -> (stdout, choices, ties and skips).

    The answers are numbers that depend on what a model's would depend on: its weights, the prompt, the seed.
    """
    real_sample_text = label.sample_text
    out = tmp_path / "prefs" / "p.jsonl"

    def numbers(model, tokenizer, prompts, max_new_tokens, *, temperature, seed):
        rng = random.Random(json.dumps([model.ln_f.bias.tolist(), prompts, seed]))
        return [answer(f"Answer {rng.random()}.") for _ in prompts]

    def judge(keys="", *options, fails=False, stdin=None, real=False):
        monkeypatch.setattr(label, "sample_text", real_sample_text if real else numbers)
        monkeypatch.setattr(sys, "stdin", stdin or io.StringIO("".join(key + "\n" for key in keys)))
        options = ["--prompts", workshop.path("prompts.jsonl"), "--device", "cpu", "--max-new-tokens", 8, *options]
        code, shown, err = tool("label", workshop.path("sft"), "--out", out, *options)
        assert (code, err.count("\n")) == ((2, 1) if fails else (0, 0)), err
        return err if fails else (shown, read(out), read(out.with_name("p.undecided.jsonl")))

    judge.out = out
    return judge


def pairs_shown(out):
    """[(prompt, left, right)] of all screens."""
    return re.findall(r"user: (.*)\n\n--- left\n(.*)\n\n--- right\n(.*)\n", out)


# ------------------------------------------------------------------------------------------------------- the screen


def test_the_conversation_stands_above_the_two_answers_in_lines_that_fit():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why? " * 9}]
    lines = layout(prompt, "yes " * 30, "a\n\n  b", 40).split("\n")
    assert max(map(len, lines)) <= 40 and lines[0] == "system: Be kind."
    assert " ".join(lines[1 : lines.index("")]) == "user: " + " ".join(["Why?"] * 9)
    left = lines[lines.index("--- left") + 1 : lines.index("--- right")]
    assert " ".join(left).split() == ["yes"] * 30
    assert lines[lines.index("--- right") + 1 :] == ["a", "", "  b", ""]


def test_a_model_cannot_send_commands_to_the_terminal():
    assert layout("", "a\x1b[2Jb\x07", "", 20).split("\n")[3] == "a\\x1b[2Jb\\x07"
    assert not {"\x1b", "\x9b", "\u202e"} & set(layout("\x1b[31m", "\x1b]0;x\x07\u202e", "\x9b2J", 100))


# --------------------------------------------------------------------------------------------------------- the keys


def test_every_key_does_what_it_says(judge):
    out, choices, undecided = judge("lrts")
    shown = pairs_shown(out)
    assert [(r["prompt"], r["chosen"], r["rejected"], r["position"], r["n"]) for r in choices] == [
        (*shown[0], "left", 1),
        (shown[1][0], shown[1][2], shown[1][1], "right", 2),
    ]
    assert [(r["prompt"], r["left"], r["right"], r["judgement"], r["n"]) for r in undecided] == [
        (*shown[2], "tie", 3),
        (*shown[3], "skip", 4),
    ]
    assert choices[0].keys() == {"prompt", "chosen", "rejected", "position", "models", "n"}
    assert undecided[0].keys() == {"prompt", "left", "right", "judgement", "models", "n"}
    assert f"\n{judge.out}: left 1, right 1, ties 1, skipped 1\ntrain on them: python train_dpo.py --init" in out


def test_other_keys_and_empty_lines_are_asked_again(judge):
    out, choices, undecided = judge(["x", "", "lr", " L "])
    assert out.count("not one of the keys") == 3 and len(choices) == 1 and not undecided


def test_quitting_leaves_the_pair_unjudged(judge):
    class Interrupted(io.StringIO):
        def readline(self, size=-1):
            if line := super().readline():
                return line
            raise KeyboardInterrupt

    for stdin in (io.StringIO("l\nq\n"), io.StringIO("l\n"), Interrupted("l\n")):
        out, choices, _ = judge(stdin=stdin)
        assert len(choices) == 1 and "left 1, right 0" in out.split("train on them")[0]
        judge.out.unlink()


def test_undo_takes_back_choices_ties_and_skips_and_shows_the_same_pair(judge):
    out, choices, undecided = judge("lrtsuuuur")
    shown = pairs_shown(out)
    assert shown == [*shown[:5], *shown[3::-1], shown[1]] and len(set(shown)) == 5
    assert [(r["prompt"], r["position"], r["n"]) for r in choices] == [(shown[0][0], "right", 1)] and not undecided
    assert "there is nothing to undo" in judge("uu")[0]


def test_undo_works_across_restarts_and_files(judge):
    judge("lt")
    judge("r")
    assert [[len(rows) for rows in judge(keys)[1:]] for keys in ("u", "u", "us")] == [[1, 1], [1, 0], [0, 1]]


def test_one_key_is_enough_in_a_terminal_and_keys_typed_too_early_are_discarded(judge, monkeypatch):
    toolkit = pytest.importorskip("prompt_toolkit")
    master, slave = pytest.importorskip("pty").openpty()
    keys = iter([b"ltt", b"\x1b[D", b"xR", b"\x1bOC", b"?", b"s", b"q"])  # two of them arrows

    def prompt(session, real=toolkit.PromptSession.prompt):
        os.write(master, next(keys) + b"\r")  # if the key was enough, Enter comes too early for the next question
        return real(session)

    monkeypatch.setattr(toolkit.PromptSession, "prompt", prompt)
    os.write(master, b"t\nt")  # before the first question
    with os.fdopen(slave) as stdin:
        out, choices, undecided = judge(stdin=stdin)
    os.close(master)
    assert [r["position"] for r in choices] == ["left", "left", "right", "right"]
    assert [r["judgement"] for r in undecided] == ["skip"] and out.count("not one of the keys") == 1
    assert next(keys, None) is None


def test_without_prompt_toolkit_a_terminal_is_read_line_by_line(judge, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert len(judge(stdin=Terminal("l\nr\n"))[1]) == 2


# -------------------------------------------------------------------------------------------------- nothing is lost


def test_the_same_command_continues_where_it_stopped(judge):
    whole, choices, _ = judge("lrlrlr")
    judge.out.unlink()
    parts = [pairs_shown(judge(key)[0])[0] for key in "lrlrlr"]
    assert parts == pairs_shown(whole)[:6] and read(judge.out) == choices
    assert len(judge("t" * 20)[2]) == 6  # twelve different prompts: each is asked once, though the file has it twice
    assert "all prompts are judged" in judge()[0]


def test_every_judgement_is_on_disk_before_the_next_pair_is_shown(judge, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd, real=os.fsync: (real(fd), synced.append(os.fstat(fd).st_ino)))

    class Typing(io.StringIO):
        asked = 0

        def readline(self, size=-1):
            assert len(read(judge.out)) == self.asked
            assert self.asked == 0 or os.stat(judge.out).st_ino == synced[-1]
            self.asked += 1
            return "l\n" if self.asked < 5 else ""

    assert len(judge(stdin=Typing())[1]) == 4 == len(synced)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_files_as_they_were_and_is_reported(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    log = Judgements(str(tmp_path / "p.jsonl"), ["x", "y"])
    log.add(record_of("q", SHOWN, "left"))
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    for change in (lambda: log.add(record_of("r", SHOWN, "left")), log.undo):
        with pytest.raises((UserError, KeyboardInterrupt), match="p.jsonl: No space left .* is not saved|^$"):
            change()
        assert contents(tmp_path) == before


def test_two_people_who_judge_into_one_file_lose_nothing(tmp_path):
    logs = [Judgements(str(tmp_path / "p.jsonl"), ["x", "y"]) for _ in range(2)]
    for log, prompt in zip(logs * 2, "abcd"):
        log.add(record_of(prompt, SHOWN, "left"))
    assert [(r["prompt"], r["n"]) for r in logs[0].load()] == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]


# ---------------------------------------------------------------------------------------------- what is judged, how


def test_the_answers_depend_on_the_seed_and_the_prompt_only(judge):
    first = pairs_shown(judge("lrlr")[0])
    judge.out.unlink()
    assert pairs_shown(judge("tttt")[0]) == first
    judge.out.with_name("p.undecided.jsonl").unlink()
    assert pairs_shown(judge("lrlr", "--seed", 1)[0]) != first


def answers_of(monkeypatch, samples, prompt="q", seeds=None):
    """two_answers of the models "x" and "y" where samples(model) are sampled; the seeds are noted."""

    def sample_text(model, *_, seed, **__):
        if seeds is not None:
            seeds.append(seed)
        return samples(model)

    monkeypatch.setattr(label, "sample_text", sample_text)
    return two_answers([("x", "x"), ("y", "y")], None, prompt, [1], label.Config(""))


def test_each_model_stands_on_either_side_equally_often_with_randomness_of_its_own(monkeypatch):
    seeds = []
    found = [answers_of(monkeypatch, lambda m: [answer("of " + m)], f"prompt {i}", seeds) for i in range(1000)]
    assert all(sorted(shown) == SHOWN for shown in found)
    assert abs(sum(shown == SHOWN for shown in found) - 500) < 60  # four standard deviations
    assert len(set(seeds)) == 2000


def test_pairs_are_finished_different_and_not_empty(monkeypatch):
    x = [answer(""), answer("cut", ended=False), answer(" yes"), answer("so")]
    y = [answer("yes "), answer("no")]

    def texts(x, y):
        return sorted(answers_of(monkeypatch, {"x": x, "y": y}.get) or [])

    assert texts(x, y) == [("x", " yes"), ("y", "no")]
    assert texts(x, y[:1]) == [("x", "so"), ("y", "yes ")]
    assert texts(x[:3], y[:1]) == []


def test_a_prompt_without_two_answers_is_skipped_with_a_note_and_not_tried_again(judge):
    options = "--temperature", 1e-4  # the likeliest answer, again and again
    out, choices, undecided = judge("l", *options, real=True)
    assert not choices and len(undecided) == 12 and {r["judgement"] for r in undecided} == {"alike"}
    assert out.count("skipped: no two finished, different answers in 4 tries") == 12
    assert "skipped: no" not in judge("l", *options, real=True)[0]


def test_undo_goes_past_what_the_program_skipped_itself(tmp_path):
    log = Judgements(str(tmp_path / "p.jsonl"), ["x", "y"])
    log.add({"prompt": "p", "judgement": "alike", "models": ["x", "y"]})
    log.add(record_of("q", SHOWN, "right"))
    log.add({"prompt": "r", "judgement": "alike", "models": ["x", "y"]})
    assert log.undo() and not log.undo()
    assert [r["prompt"] for r in log.load()] == ["p", "r"] and read(log.choices) == []


def test_every_choice_is_a_pair_that_the_trainers_read(judge, tokenizer, workshop, tmp_path):
    _, choices, _ = judge("lrtslrtslr", real=True)
    assert all(r["chosen"].strip() != r["rejected"].strip() for r in choices)
    assert len(load_pairs(str(judge.out), tokenizer)) == len(choices) > 3
    workshop.run("dpo", tmp_path / "dpo", data=str(judge.out), valid="", steps=1)
    workshop.run("rm", tmp_path / "rm", data=str(judge.out), valid="", steps=1, normalise=0)


def test_the_answers_in_a_record_are_of_the_models_that_it_names():
    answers = {"chosen": "of y", "rejected": "of x", "position": "right"}
    assert record_of("q", SHOWN, "right") == {"prompt": "q", "models": ["y", "x"], **answers}
    answers = {"chosen": "of x", "rejected": "of y", "position": "left"}
    assert record_of("q", SHOWN, "left") == {"prompt": "q", "models": ["x", "y"], **answers}
    answers = {"left": "of x", "right": "of y", "judgement": "tie"}
    assert record_of("q", SHOWN, "tie") == {"prompt": "q", "models": ["x", "y"], **answers}


def test_one_model_against_another_is_tallied_and_the_screen_does_not_tell_which_is_where(judge, workshop):
    sft, base = workshop.path("sft"), workshop.path("base")
    out, choices, ties = judge("lrlrl" + "t" * 7, "--against", base)
    wins = [sum(r["models"][0] == name for r in choices) for name in (sft, base)]
    assert sum(wins) == 5 and f"ties 7, skipped 0; {sft} {wins[0]} : {wins[1]} {base}\ntrain on them" in out
    assert {r["models"][0] for r in ties} == {sft, base}  # either is on the left
    assert [(r["left"], r["right"]) for r in ties] == [shown[1:] for shown in pairs_shown(out)[5:]]
    assert "p.jsonl:1: not a judgement about" in judge("l", fails=True)  # without --against: other models


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("options, message", [
    (["--temperature", 0], "--temperature must be above 0"),
    (["--temperature", 1e-30], "--temperature must be 0 or at least 1e-6"),
    (["--max-new-tokens", 0], "--max-new-tokens must be at least 1"),
    (["--max-new-tokens", 48], "lower --max-new-tokens"),
    (["--prompts", "nowhere.jsonl"], "no file nowhere.jsonl"),
    (["--against", "nowhere"], "no folder nowhere"),
    (["--against", "other_vocab"], "different vocabularies"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(judge, workshop, options, message):
    options = [workshop.path(o) if o == "other_vocab" else o for o in options]
    assert message in judge("l", *options, fails=True) and not judge.out.exists()


@pytest.mark.parametrize("line, message", [
    ({"prompt": "a", "chosen": "b", "rejected": "c", "models": ["x", "y"]}, "not a judgement about"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "models": ["x", "y"], "n": 1}, "not a judgement about"),
    ({"prompt": "a", "left": "b", "right": "c", "judgement": "tie", "models": None, "n": 1}, "not a judgement about"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "position": "left", "n": "1"}, "not a judgement about"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "position": ["left"], "n": 1}, "not a judgement about"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "n": 1}, "not a judgement about"),
    ("[1]", "a record must be an object"),
    ("two words", "invalid JSON"),
    ('{"a": 1', "invalid JSON"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused_and_left_alone(judge, workshop, line, message):
    if isinstance(line, dict):
        if not line.get("models"):  # the right models, as for a tie in the file of the choices
            line = line | {"models": [workshop.path("sft")] * 2}
        line = json.dumps(line)
    judge.out.parent.mkdir()
    judge.out.write_text(line)
    err = judge("l", fails=True)
    assert "p.jsonl:1: " in err and message in err and judge.out.read_text() == line


def test_what_is_no_file_is_neither_written_nor_waited_for(judge):
    judge.out.parent.mkdir()
    os.mkfifo(judge.out.with_name("pipe.jsonl"))
    for name in ("pipe.jsonl", "", "folder/"):
        out = f"{judge.out.parent}/{name}" if name else ""
        assert f"--out must name a file, not {out or 'nothing'}" in judge("l", "--out", out, fails=True)
    os.mkfifo(judge.out.with_name("p.undecided.jsonl"))
    assert "--out must name a file, not" in judge("l", fails=True)
    assert sorted(os.listdir(judge.out.parent)) == ["p.undecided.jsonl", "pipe.jsonl"]


def test_a_closed_input_is_the_end_of_it(judge, monkeypatch):
    closed = io.StringIO()
    closed.close()
    assert not judge(stdin=closed)[1]
