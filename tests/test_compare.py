"""Judging by hand: what is shown, what every key does, and that no judgement is ever lost."""

import errno
import io
import json
import os
import random
import select
import sys

import pytest

from nanopost import compare, sampling
from nanopost.checkpoint import load_model
from nanopost.compare import Judgements, ask, cells, layout, record_of, two_answers, wrap
from nanopost.config import UserError
from nanopost.data import load_pairs
from nanopost.sampling import sample_text

MODEL = ["m", "m"]


def read(path):
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


@pytest.fixture
def judge(workshop, command, monkeypatch, tmp_path):
    """judge("lrq") types these keys, one a line, and then the input ends -> (stdout, choices, ties and skips).

    The answers are numbers that depend on what a model's would: its weights, the prompt, the seed; or, with real=True,
    they are a model's."""
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "prefs" / "p.jsonl"

    def numbers(model, tokenizer, prompts, max_new_tokens, *, temperature, seed):
        rng = random.Random(json.dumps([model.ln_f.bias.tolist(), prompts, seed]))
        return [{"text": f"Answer {rng.random()}.", "ended": True} for _ in prompts]

    def judge(keys, *options, code=0, stdin=None, real=False):
        monkeypatch.setattr(sampling, "sample_text", sample_text if real else numbers)
        monkeypatch.setattr(sys, "stdin", stdin or io.StringIO("".join(key + "\n" for key in keys)))
        got, shown, err = command("nanopost/compare.py", workshop.path("sft"), "--prompts",
                                  workshop.path("prompts.jsonl"), "--out", out, "--max-new-tokens", 8,
                                  "--device", "cpu", *options)
        assert got == code and err.count("\n") == (code == 2), err
        return (shown, read(out), read(out.with_name("p.undecided.jsonl"))) if not code else err

    judge.out = out
    return judge


def pairs_shown(out):
    """[(prompt, left, right)] of the screens, where every text fits on one line."""
    screens = out.split("\nuser: ")[1:]
    return [(s.split("\n")[0], *(side.strip() for side in s.split("\n")[4].split(" | "))) for s in screens]


# ------------------------------------------------------------------------------------------------------- the screen


@pytest.mark.parametrize("width", [60, 61, 80, 200])
def test_answers_stand_side_by_side_in_columns_that_fit(width):
    left, right = "one two three " * 12, "a\n\nb " + "x" * 150
    lines = layout("Say it. " * 20, left, right, width).split("\n")
    assert max(map(len, lines)) <= width
    column = (width - 3) // 2
    table = lines[lines.index("") + 1 : -1]
    assert {line[column : column + 3] for line in table} == {" | ", " |"}
    assert " ".join(line[:column].strip() for line in table[2:]).split() == left.split()
    assert "".join(line[column + 3 :] for line in table[2:]).replace(" ", "") == "ab" + "x" * 150
    assert table[0].split(" | ") == ["left".ljust(column), "right"]


def test_on_a_narrow_terminal_one_answer_is_above_the_other():
    lines = layout("Why?", "yes " * 30, "no", 59).split("\n")
    assert max(map(len, lines)) <= 59 and lines[:3] == ["user: Why?", "", "--- left"]
    assert lines[-3:] == ["--- right", "no", ""]


def test_a_conversation_is_shown_turn_by_turn():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert layout(prompt, "a", "b", 80).startswith("system: Be kind.\nuser: Hi\n\n")


def test_lines_are_wrapped_by_the_columns_that_characters_take():
    assert wrap("\u4f60\u597d" * 4, 6) == ["\u4f60\u597d\u4f60", "\u597d\u4f60\u597d", "\u4f60\u597d"]
    assert wrap("\u4f60" * 3, 5) == ["\u4f60\u4f60", "\u4f60"]
    assert cells("\uff21\U0001f600") == 4 and cells("e\u0301") == 1 and wrap("e\u0301" * 4, 4) == ["e\u0301" * 4]
    assert wrap("ab  cd efgh", 6) == ["ab  cd", "efgh"] and wrap("abcdef gh", 4) == ["abcd", "ef", "gh"]
    assert wrap("a\n\n  b", 9) == ["a", "", "  b"] and wrap("", 5) == [""]
    assert len({line.index("|") for line in layout("q", "\u4f60\u597d", "x", 80).split("\n") if "|" in line}) == 2


def test_a_model_cannot_send_commands_to_the_terminal():
    assert wrap("a\x1b[2Jb\r\x07", 20) == ["a\ufffd[2Jb\ufffd\ufffd"]
    assert "\x1b" not in layout("\x1b[31m", "\x1b]0;x\x07", "\x9b2J", 100)


# ---------------------------------------------------------------------------------------------------------- the keys


def test_every_key_does_what_it_says(judge):
    out, choices, undecided = judge("lrts")
    shown = pairs_shown(out)
    assert choices == [
        {"prompt": shown[0][0], "chosen": choices[0]["chosen"], "rejected": choices[0]["rejected"], "position": "left",
         "models": choices[0]["models"], "n": 1},
        {"prompt": shown[1][0], "chosen": choices[1]["chosen"], "rejected": choices[1]["rejected"], "position": "right",
         "models": choices[1]["models"], "n": 2}]
    assert [(r["judgement"], r["prompt"], r["n"]) for r in undecided] == [("tie", shown[2][0], 3),
                                                                          ("skip", shown[3][0], 4)]
    sides = [(r["chosen"], r["rejected"]) for r in choices]
    assert sides == [shown[0][1:], shown[1][:0:-1]]  # what stood on the chosen side is the chosen answer
    assert "choices 2 (left 1, right 1), ties 1, skipped 1" in out and "train_dpo.py --init" in out


def test_quit_and_the_end_of_the_input_leave_the_pair_unjudged(judge):
    for keys in ("lq", "l"):
        judge.out.unlink(missing_ok=True)
        assert len(judge(keys)[1]) == 1
    assert len(judge("ql")[1]) == 1


def test_other_keys_and_empty_lines_are_asked_again(judge):
    out, choices, undecided = judge(["x", "", "left", " L "])
    assert out.count("not one of the keys") == 3 and len(choices) == 1 and not undecided


def test_undo_takes_back_choices_ties_and_skips_and_shows_the_same_pair(judge):
    out, choices, undecided = judge("lrtsuuuur")
    shown = pairs_shown(out)
    assert shown == [*shown[:5], *shown[3::-1], shown[1]] and len(shown) == 10
    assert [(r["prompt"], r["position"], r["n"]) for r in choices] == [(shown[0][0], "right", 1)] and not undecided
    assert "there is nothing to undo" in judge("uu")[0]


@pytest.mark.parametrize("typed, meaning", [
    ("\x1b[D", "left"), ("\x1b[C", "right"), ("\xe0K", "left"), ("\xe0M", "right"), ("L", "left"), ("t", "tie"),
    ("\x03", "quit"), ("\x04", "quit"), ("", "quit")])
def test_keys_of_a_terminal(monkeypatch, typed, meaning):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    keys = iter(["\n", "?", "\x1b[A", typed])
    monkeypatch.setattr(compare, "read_key", lambda: next(keys))
    assert ask(Terminal()) == meaning


def test_a_terminal_is_read_key_by_key_without_what_was_typed_before(monkeypatch):
    termios = pytest.importorskip("termios")
    master, slave = os.openpty()
    with os.fdopen(slave) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(stdin)
        for typed, key in ((b"r", "r"), (b"\x1b[D", "\x1b[D"), (b"\x1bOC", "\x1b[C")):
            os.write(master, b"early\n")
            assert select.select([stdin], [], [], 5)[0]  # it has arrived
            with monkeypatch.context() as patch:  # the key comes when the program waits for it
                real = os.read
                patch.setattr(os, "read", lambda fd, n: os.write(master, typed) and real(fd, n))
                assert compare.read_key() == key
        assert termios.tcgetattr(stdin) == before  # the terminal is as it was
    os.close(master)


# --------------------------------------------------------------------------------------------------- nothing is lost


def test_the_same_command_goes_on_where_it_stopped(judge):
    whole, choices, _ = judge("lrlrlr")
    judge.out.unlink()
    parts = [pairs_shown(judge(keys)[0])[0] for keys in ("l", "r", "l", "r", "l", "r")]
    assert parts == pairs_shown(whole)[:6] and read(judge.out) == choices
    assert len(judge("t" * 20)[2]) == 6  # twelve different prompts: each is asked once, though the file has them twice
    assert "all prompts are judged" in judge("")[0]


def test_undo_works_across_restarts_and_files(judge):
    judge("lt")
    judge("r")
    assert [len(rows) for rows in judge("u")[1:]] == [1, 1]
    assert [len(rows) for rows in judge("u")[1:]] == [1, 0]
    assert [len(rows) for rows in judge("us")[1:]] == [0, 1]


def test_every_judgement_is_on_the_disk_before_the_next_pair_is_shown(judge, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (real(fd), synced.append(len(read(judge.out)))))

    class Typing(io.StringIO):
        asked = 0

        def readline(self):
            assert len(read(judge.out)) == len(synced) == self.asked and synced == list(range(1, self.asked + 1))
            self.asked += 1
            return "l\n" if self.asked < 5 else ""

    assert len(judge("", stdin=Typing())[1]) == 4


def test_control_c_ends_cleanly_and_loses_nothing(judge):
    class Interrupted(io.StringIO):
        def readline(self):
            if not (line := super().readline()):
                raise KeyboardInterrupt
            return line

    out, choices, _ = judge("", stdin=Interrupted("l\nr\n"))
    assert len(choices) == 2 and "choices 2 (left 1, right 1)" in out


def test_without_an_input_it_ends_cleanly(judge, monkeypatch):
    real = compare.judge
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(compare, "two_answers", lambda *_: (("a", "b"), False))
    log = Judgements(str(judge.out), MODEL)
    real(log, None, None, ["q"], [[1]], compare.Config("m"))
    assert log.records == []


@pytest.mark.parametrize("cut", [1, 20, -3, -1])
def test_a_line_that_was_cut_off_is_removed_and_its_prompt_asked_again(judge, tmp_path, tokenizer, cut):
    first, choices, _ = judge("lr")
    whole = judge.out.read_bytes()
    second = whole.index(b"\n") + 1
    cut = cut if cut > 0 else len(whole) - second + cut
    judge.out.write_bytes(whole[: second + cut])
    out, again, _ = judge("")
    complete = cut == len(whole) - second - 1  # nothing but the end of the line was missing
    assert again == choices[: 1 + complete] and judge.out.read_bytes() == whole[: None if complete else second]
    assert ("removed a line that was not written to its end" in out) != complete
    assert pairs_shown(out)[0] == pairs_shown(first)[1 + complete]
    assert len(load_pairs(str(judge.out), tokenizer)) == 1 + complete


def test_a_full_disk_leaves_whole_lines_and_is_told(tmp_path, monkeypatch):
    log = Judgements(str(tmp_path / "p.jsonl"), MODEL)
    log.add(record_of("q", [("m", "a"), ("m", "b")], "left"))
    before = (tmp_path / "p.jsonl").read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="p.jsonl: No space left on device; the last judgement is not saved"):
        log.add(record_of("r", [("m", "a"), ("m", "b")], "left"))
    assert (tmp_path / "p.jsonl").read_bytes() == before and len(log.records) == 1
    with pytest.raises(OSError):
        log.undo()
    assert (tmp_path / "p.jsonl").read_bytes() == before and len(log.records) == 1


def test_half_a_line_that_the_disk_had_room_for_is_removed(tmp_path):
    resource = pytest.importorskip("resource")
    log = Judgements(str(tmp_path / "p.jsonl"), MODEL)
    log.add(record_of("q", [("m", "a"), ("m", "b")], "left"))
    before, limits = (tmp_path / "p.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(UserError, match="the last judgement is not saved"):
            log.add(record_of("r", [("m", "a"), ("m", "b")], "left"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "p.jsonl").read_bytes() == before and len(log.records) == 1


def test_two_who_judge_into_one_file_at_once_lose_nothing(tmp_path):
    logs = [Judgements(str(tmp_path / "p.jsonl"), MODEL) for _ in range(2)]
    for log, prompt in zip(logs * 2, "abcd"):
        log.add(record_of(prompt, [("m", "x"), ("m", "y")], "left"))
    assert [r["prompt"] for r in logs[0].undo()] == ["c"]
    assert [r["prompt"] for r in read(logs[0].out)] == ["a", "b", "d"]


# ------------------------------------------------------------------------------------------------ what is judged, how


def test_the_answers_depend_on_the_seed_and_the_prompt_alone(judge):
    first = judge("lrlr")[0]
    judge.out.unlink()
    assert pairs_shown(judge("tttt")[0]) == pairs_shown(first)
    judge.out.with_name("p.undecided.jsonl").unlink()
    assert pairs_shown(judge("lrlr", "--seed", 1)[0]) != pairs_shown(first)


@pytest.fixture
def loaded(workshop):
    return [load_model(workshop.path(name))[0] for name in ("sft", "base")], load_model(workshop.path("sft"))[1]


def test_each_model_stands_on_either_side_equally_often(loaded):
    models, tokenizer = loaded
    config = compare.Config("", max_new_tokens=4)
    patch = pytest.MonkeyPatch()
    with patch.context() as p:
        p.setattr(compare, "sample_text", lambda model, *_, **__: [{"text": "ab"[model], "ended": True}])
        found = [two_answers([0, 1], tokenizer, f"prompt {i}", [1], config) for i in range(1000)]
    assert all(answers == ("a", "b") for answers, _ in found)
    assert abs(sum(swap for _, swap in found) - 500) < 60  # four standard deviations


def test_pairs_are_finished_different_and_not_empty(loaded):
    models, tokenizer = loaded
    samples = {0: [("", True), ("cut", False), (" yes", True), ("so", True)], 1: [("yes ", True), ("no", True)]}
    with pytest.MonkeyPatch.context() as p:
        p.setattr(compare, "sample_text",
                  lambda model, *_, **__: [{"text": text, "ended": ended} for text, ended in samples[model]])
        assert two_answers([0, 1], tokenizer, "q", [1], compare.Config(""))[0] == (" yes", "no")
        samples[1] = samples[1][:1]
        assert two_answers([0, 1], tokenizer, "q", [1], compare.Config(""))[0] == ("so", "yes ")
        samples[0] = samples[0][:3]
        assert two_answers([0, 1], tokenizer, "q", [1], compare.Config(""))[0] is None


def test_every_prompt_and_side_has_its_own_randomness(loaded):
    seeds = []
    with pytest.MonkeyPatch.context() as p:
        p.setattr(compare, "sample_text", lambda *_, seed, **__: seeds.append(seed) or [])
        for prompt in "abcd":
            two_answers([0, 0], loaded[1], prompt, [1], compare.Config(""))
    assert len(set(seeds)) == 8


def test_the_sides_of_one_model_are_different_answers(loaded):
    (model, _), tokenizer = loaded
    ids = tokenizer.prompt([{"role": "user", "content": "Say cat!"}])
    (a, b), _ = two_answers([model, model], tokenizer, "Say cat!", ids, compare.Config("", max_new_tokens=8))
    assert a.strip() != b.strip()


def test_a_prompt_without_two_answers_is_skipped_with_a_note_and_not_tried_again(judge, monkeypatch):
    options = "--temperature", 1e-4  # the likeliest answer, again and again
    out, choices, undecided = judge("l", *options, real=True)
    assert not choices and len(undecided) == 12 and {r["judgement"] for r in undecided} == {"alike"}
    assert out.count("skipped: no two finished, different answers in 4 tries") == 12
    assert "skipped: no" not in judge("l", *options, real=True)[0]


def test_undo_goes_past_what_the_program_skipped_itself(tmp_path):
    log = Judgements(str(tmp_path / "p.jsonl"), MODEL)
    log.add(record_of("q", [("m", "a"), ("m", "b")], "right"))
    log.add({"prompt": "r", "judgement": "alike", "models": MODEL})
    assert [r["prompt"] for r in log.undo()] == ["q", "r"] and log.undo() == [] == log.records
    assert not read(log.out) and not read(log.undecided)
    log.add({"prompt": "r", "judgement": "alike", "models": MODEL})
    assert log.undo() == [] and len(Judgements(log.out, MODEL).records) == 1


def test_every_choice_is_a_pair_that_the_trainers_read(judge, tokenizer, workshop, tmp_path):
    _, choices, _ = judge("lrtslrtslr", real=True)
    assert len(load_pairs(str(judge.out), tokenizer)) == len(choices) > 3
    workshop.run("dpo", tmp_path / "dpo", data=str(judge.out), valid="", steps=1)
    workshop.run("rm", tmp_path / "rm", data=str(judge.out), valid="", steps=1, normalise=0)


def test_one_model_against_another_is_tallied(judge, workshop):
    sft, base = workshop.path("sft"), workshop.path("base")
    out, choices, undecided = judge("lrlrt", "--against", base)
    wins = [sum(r["models"] == pair for r in choices) for pair in ([sft, base], [base, sft])]
    assert sum(wins) == 4 and f"; {sft} {wins[0]} : {wins[1]} {base}\n" in out.split("train on them")[0]
    assert undecided[-1].keys() == {"prompt", "left", "right", "judgement", "models", "n"}
    assert 'judges ["' in judge("l", code=2)  # and without --against: other models


def test_the_screen_does_not_tell_which_model_stands_where(judge, workshop):
    out, _, ties = judge("t" * 12, "--against", workshop.path("base"))
    assert {r["models"][0] for r in ties} == {workshop.path("sft"), workshop.path("base")}  # on the left
    assert [(r["left"], r["right"]) for r in ties] == [shown[1:] for shown in pairs_shown(out)]


def test_the_answer_in_a_record_is_of_the_model_that_it_names():
    shown = [("x", "of x"), ("y", "of y")]
    assert record_of("q", shown, "left") == {"prompt": "q", "chosen": "of x", "rejected": "of y", "position": "left",
                                             "models": ["x", "y"]}
    assert record_of("q", shown, "right") == {"prompt": "q", "chosen": "of y", "rejected": "of x", "position": "right",
                                              "models": ["y", "x"]}
    assert record_of("q", shown, "tie") == {"prompt": "q", "left": "of x", "right": "of y", "judgement": "tie",
                                            "models": ["x", "y"]}


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("options, message", [
    (["--temperature", 0], "--temperature must be above 0"), (["--max-new-tokens", 0], "--max-new-tokens at least 1"),
    (["--prompts", "nowhere.jsonl"], "no file nowhere.jsonl"), (["--against", "nowhere"], "no folder nowhere"),
    (["--against", "other_vocab"], "different vocabularies"), (["--max-new-tokens", 48], "lower --max-new-tokens"),
])
def test_mistakes_are_one_line_and_exit_code_2(judge, workshop, options, message):
    options = [workshop.path(o) if o == "other_vocab" else o for o in options]
    assert message in judge("l", *options, code=2) and not judge.out.exists()


@pytest.mark.parametrize("line, message", [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "not a judgement of this tool; give another --out"),
    ("[1]", "a record must be an object"), ('{"a": 1', "invalid JSON"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "position": "left", "models": ["x", "y"], "n": 1},
     'judges ["x", "y"], not'),
    ({"prompt": "a", "left": "b", "right": "c", "judgement": "tie", "models": ["x", "y"], "n": 1}, "not a judgement"),
])
def test_a_file_of_something_else_is_refused_and_left_alone(judge, line, message):
    judge.out.parent.mkdir()
    text = (line if isinstance(line, str) else json.dumps(line)) + "\n"
    judge.out.write_text(text)
    err = judge("l", code=2)
    assert "p.jsonl:1: " in err and message in err and judge.out.read_text() == text
