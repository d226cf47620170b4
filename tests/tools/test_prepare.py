"""Public data sets: each publisher's format becomes records that the loaders read, and nothing is half-written."""

import gzip
import io
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import public
from conftest import contents
from nanopost.config import UserError
from nanopost.data import load_examples, load_pairs, load_prompts


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def dialogue(*turns):
    """A dialogue in Anthropic's format: Human, Assistant, Human, ... in turn."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))


def tasks(n):
    return [{"instruction": f"Count to {i}.", "input": "", "output": f"One to {i}."} for i in range(n)]


def hh_row(chosen, rejected="Go away.", question="Tea?"):
    return {"chosen": dialogue(question, chosen), "rejected": dialogue(question, rejected)}


def hh_rows(n, word="tea"):
    return [hh_row("Yes, please.", question=f"{word} {i}?") for i in range(n)]


def uf_row(prompt, chosen, rejected, scores=(8.0, 5.5)):
    sides = {"chosen": [user(prompt), assistant(chosen)], "rejected": [user(prompt), assistant(rejected)]}
    return {"prompt": prompt, **sides, "score_chosen": scores[0], "score_rejected": scores[1]}


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def files(folder):
    return sorted(contents(folder))


@pytest.fixture
def run(command, tmp_path, tokenizer):
    """run("hh", "--file", ...) prepares into tmp_path/"out" -> (stdout, {file: records}), which the loaders read; no
    prompt is in both splits. fails=True: -> the one line on stderr, with exit code 2; nothing is written."""

    def run(name, *arguments, fails=False):
        code, out, err = command(f"data/{name}/prepare.py", *arguments, "--out", tmp_path / "out")
        if fails:
            assert (code, err.count("\n")) == (2, 1) and not (tmp_path / "out").exists(), err
            return err
        assert (code, err) == (0, "")
        written = {path.stem: read(path) for path in (tmp_path / "out").glob("*.jsonl")}
        for name, records in written.items():
            load = {"sft": load_examples, "pairs": load_pairs, "prompts": load_prompts}[name.split("_")[0]]
            loaded = load(str(tmp_path / "out" / f"{name}.jsonl"), tokenizer, 10**6)
            assert len(loaded[0] if load is load_prompts else loaded) == len(records)
        train, valid = ({json.dumps(r["prompt"]) for r in written[f"prompts_{split}"]} for split in ("train", "valid"))
        assert train and valid and not train & valid
        return out, written

    return run


# ----------------------------------------------------------------------------------------------------------- alpaca


def test_alpaca_joins_instruction_and_input_by_a_blank_line(run, tmp_path):
    rows = [
        {"instruction": "Turn it round.", "input": " left ", "output": "right\n"},
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
        {"instruction": "Say bye.", "input": "<noinput>", "output": "Bye."},
        {"instruction": "Say it all.", "output": "All \ud83d"},  # half a character, as damaged data may have
        {"instruction": "Say nothing.", "input": "", "output": " "},
        {"instruction": " ", "input": "", "output": "What?"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows + tasks(60), indent=2))
    out, written = run("alpaca", "--file", tmp_path / "a.json")
    assert "SFT: 64 records, dropped 1 with an empty output, dropped 1 without an instruction" in out
    answers = {r["prompt"]: r["completion"] for r in written["sft_train"] + written["sft_valid"]}
    assert len(answers) == 64 and answers["Turn it round.\n\nleft"] == "right"
    assert answers["Say hi."] == "Hi." and answers["Say bye."] == "Bye." and answers["Say it all."] == "All \ud83d"
    assert sorted(written) == ["prompts_train", "prompts_valid", "sft_train", "sft_valid"]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_json_list_and_json_lines_gzipped_or_not_are_the_same(run, tmp_path, lines, zipped):
    rows = tasks(100)
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (tmp_path / "a").write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    _, written = run("alpaca", "--file", tmp_path / "a")
    records = [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]
    assert (written["sft_train"], written["sft_valid"]) == public.hold_out(records, 0.05)


def test_alpaca_with_preferences_gives_pairs_too_and_they_go_when_a_file_has_none(run, tmp_path):
    rows = [{**task, "chosen": task["output"], "rejected": f"No. {i}"} for i, task in enumerate(tasks(100))]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["rejected"] = ""
    del rows[7]["chosen"]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    out, written = run("alpaca", "--file", tmp_path / "p.json")
    assert "SFT: 100 records\n" in out and len(written) == 6
    for reason in ("with two equal answers", "with an empty answer", "without a chosen and a rejected answer"):
        assert f", dropped 1 {reason}" in out.partition("pairs: 97 records")[2]
    assert {"prompt": "Count to 0.", "chosen": "One to 0.", "rejected": "No. 0"} in written["pairs_train"]
    (tmp_path / "p.json").write_text(json.dumps(tasks(100)))
    assert len(run("alpaca", "--file", tmp_path / "p.json")[1]) == 4


# --------------------------------------------------------------------------------------------------- hold-out splits


def test_a_prompt_is_held_out_whatever_stands_around_it():
    records = [{"prompt": f"p{i % 300}", "completion": str(i)} for i in range(600)]  # each prompt twice
    train, valid = public.hold_out(records, 0.1)
    held_out = {r["prompt"] for r in valid}
    assert len(train) + len(valid) == 600 and 30 < len(valid) < 90 and not held_out & {r["prompt"] for r in train}
    others, again = public.hold_out(records[::-1][:450], 0.1)
    assert {r["prompt"] for r in again} <= held_out and not {r["prompt"] for r in others} & held_out
    assert {r["prompt"] for r in public.hold_out(records, 0.05)[1]} < held_out  # a smaller share is a part of a larger


def test_training_records_with_a_held_out_prompt_are_dropped(run, lines):
    out, written = run("hh", "--file", lines(hh_rows(6), "train.jsonl"), "--valid", lines(hh_rows(2), "test.jsonl"))
    assert "dropped 4 training records whose prompt is held out" in out  # two pairs, and their two demonstrations
    assert [len(written[f"{kind}_train"]) for kind in ("sft", "pairs", "prompts")] == [4, 4, 4]


def test_a_prompt_that_one_kind_holds_out_is_held_out_of_the_other_too(tmp_path):
    a, b, c, d = ({"prompt": p} for p in "abcd")
    public.save(str(tmp_path), ([a, b, c], [d]), ([b, c, d], [a]))
    assert read(tmp_path / "sft_train.jsonl") == read(tmp_path / "pairs_train.jsonl") == [b, c]
    assert read(tmp_path / "prompts_valid.jsonl") == [d, a]


# --------------------------------------------------------------------------------------------------------------- hh


def test_dialogues_are_split_at_the_last_answer(run, lines):
    talk = dialogue("May I ask?", "Of course.\n\nGo on.", "How do Humans: say hello?")
    rows = [{"chosen": talk + "\n\nAssistant: Hello.\n\nOr hi. ", "rejected": talk + "\n\nAssistant: Assistant: no"}]
    _, written = run("hh", "--file", lines(rows, "train.jsonl"), "--valid", lines(hh_rows(3), "test.jsonl"))
    prompt = [user("May I ask?"), assistant("Of course.\n\nGo on."), user("How do Humans: say hello?")]
    answers = {"chosen": "Hello.\n\nOr hi.", "rejected": "Assistant: no"}
    assert written["pairs_train"] == [{"prompt": prompt, **answers}]
    assert written["sft_train"] == [{"prompt": prompt, "completion": "Hello.\n\nOr hi."}]
    assert written["prompts_train"] == [{"prompt": prompt}] and len(written["pairs_valid"]) == 3


UNUSABLE = {
    "with two different prompts": [
        (dialogue("a", "b", "c", "d"), dialogue("a", "B", "c", "e")),
        (dialogue("a", "b"), dialogue("a", "c", "more", "d")),
    ],
    "with two equal answers": [(dialogue("a", "b"), dialogue("a", "b "))],
    "with an empty turn": [
        (dialogue("a", ""), dialogue("a", "b")),
        (dialogue("a", "b"), dialogue("a", " \n")),
        (dialogue("a", "", "c", "d"), dialogue("a", "", "c", "e")),
        (dialogue("", "b"), dialogue("", "c")),
    ],
    "in which Human and Assistant do not take turns": [
        ("\n\nAssistant: b", "\n\nAssistant: c"),
        ("\n\nAssistant: a" + dialogue("b", "c"), "\n\nAssistant: a" + dialogue("b", "d")),
        ("Well." + dialogue("a", "b"), "Well." + dialogue("a", "c")),
        (dialogue("a", "b", "c"), dialogue("a", "d", "c")),
        (dialogue("a"), dialogue("a")),
        (dialogue("a") + dialogue("b", "c"), dialogue("a") + dialogue("b", "d")),
        (dialogue("a", "b") + "\n\nAssistant: c", dialogue("a", "b") + "\n\nAssistant: d"),
        ("just text", "other text"),
        ("", ""),
    ],
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_dialogues_that_cannot_be_used_are_dropped_with_the_reason(run, lines, reason):
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in UNUSABLE[reason]]
    train = lines(hh_rows(2) + rows, "train.jsonl")
    out, written = run("hh", "--file", train, "--valid", lines(hh_rows(2, "milk"), "test.jsonl"))
    assert f"train.jsonl: 2 records, dropped {len(rows)} {reason}\n" in out and len(written["pairs_train"]) == 2


# ---------------------------------------------------------------------------------------------------- ultrafeedback

TALK = [user("Hi"), assistant("Yes?"), user("2+2?")]
ULTRA = [
    uf_row("Name a bird.", "A robin.", "A cat."),
    {**uf_row("", "", ""), "chosen": [*TALK, assistant("4.")], "rejected": [*TALK, assistant("5.")]},
    uf_row("Tie.", "one", "two", (7, 7.0)),
    uf_row("Equal.", "same", " same"),
    uf_row("Empty.", "", "something"),
    {**uf_row("Other.", "a", "b"), "rejected": [user("Another."), assistant("b")]},
    {**uf_row("Half.", "a", "b"), "rejected": [user("Half.")]},
]


@pytest.mark.parametrize("kind", ["parquet", "JSON Lines, without pyarrow"])
def test_ultrafeedback_in_parquet_and_in_json_lines_is_the_same(run, tmp_path, lines, monkeypatch, kind):
    train, test = lines(ULTRA, "train"), lines([uf_row("Sing.", "La.", "No.")], "test")
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        for path in (train, test):
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(read(path)), path)
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    out, written = run("ultrafeedback", "--file", train, "--valid", test)
    assert (
        "2 records, dropped 1 with equal scores, dropped 1 with two equal answers, dropped 1 with an empty turn, "
        "dropped 1 with two different prompts, dropped 1 that do not end with a user's turn and an answer"
    ) in out
    assert written["pairs_train"] == [
        {"prompt": [user("Name a bird.")], "chosen": "A robin.", "rejected": "A cat."},
        {"prompt": TALK, "chosen": "4.", "rejected": "5."},
    ]


def test_without_pyarrow_parquet_is_refused_before_it_is_downloaded(run, lines, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    local = lines(["PAR1"])
    for options in ([], ["--file", local, "--valid", local]):
        err = run("ultrafeedback", *options, fails=True)
        assert err.startswith("error: parquet needs pyarrow; pip install pyarrow")


# --------------------------------------------------------------------------------------------------------- bad input

FINE = {"hh": hh_rows(2), "ultrafeedback": [uf_row("q", "b", "c")] * 2, "alpaca": tasks(2)}
MALFORMED = [
    ("hh", '{"chosen": "\\n\\nHuman: a', "invalid JSON"),
    ("hh", [1], "a record must be an object"),
    ("hh", {"chosen": dialogue("a", "b")}, "needs rejected; rejected is missing"),
    ("hh", {"chosen": "x", "rejected": None}, "rejected must be a string, not null"),
    ("hh", {"chosen": dialogue("a", "b"), "rejected": 3}, "rejected must be a string, not 3"),
    ("ultrafeedback", {"chosen": [], "rejected": []}, "needs chosen, .*; score_chosen is missing"),
    ("ultrafeedback", {**uf_row("a", "b", "c"), "chosen": "b"}, "chosen must be a list of"),
    ("ultrafeedback", {**uf_row("a", "b", "c"), "rejected": [user("a"), {"role": "bot", "content": "c"}]},
     "rejected must be a list of"),
    ("ultrafeedback", {**uf_row("a", "b", "c"), "rejected": [user("a"), assistant(None)]}, "rejected must be a list"),
    ("ultrafeedback", {**uf_row("a", "", "c", (1, 1)), "rejected": "c"}, "rejected must be a list of"),
    ("alpaca", {"instruction": "a"}, "needs output; output is missing"),
    ("alpaca", {"instruction": "a", "input": 4, "output": ""}, "input must be a string, not 4"),
]  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name, row, message", MALFORMED)
def test_a_malformed_row_is_refused_with_its_line_and_nothing_is_written(run, lines, name, row, message, zipped):
    path = Path(lines([*FINE[name], row, *FINE[name]], "rows.jsonl"))
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    others = [] if name == "alpaca" else ["--valid", lines(FINE[name], "fine.jsonl")]
    err = run(name, "--file", path, *others, fails=True)
    assert re.search(rf"^error: \S*rows\.jsonl:3: {message}", err), err


@pytest.mark.parametrize("content, message", [
    (json.dumps([*tasks(2), {"instruction": "a"}]), r"rows.json[2]: needs output; output is missing"),
    (json.dumps([*tasks(2), 3]), r"rows.json[2]: a record must be an object"),
    (json.dumps(tasks(9), indent=1)[:-20], "rows.json is broken: Unterminated string starting at: line 45"),
    (b"[\xe9]", "rows.json is broken: 'utf-8' codec"),
    ("[]", "rows.json: SFT: no records"),
    ("", "rows.json: SFT: no records"),
    ("<html>", "rows.json:1: invalid JSON"),
    ("[" * 100_000, "rows.json is broken: "),
    ("[" + "9" * 5000 + "]", "rows.json"),
    (gzip.compress(json.dumps(tasks(9)).encode(), mtime=0)[:-9], "rows.json is broken: Compressed file ended"),
    (gzip.compress(b"[]", mtime=0)[:9] + b"\xff" * 20, "rows.json is broken: Error -3 while decompressing"),
])  # fmt: skip
def test_a_broken_file_is_refused_with_the_place(run, tmp_path, content, message):
    (tmp_path / "rows.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in run("alpaca", "--file", tmp_path / "rows.json", fails=True)


def test_a_broken_parquet_file_is_refused(run, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x").write_bytes(b"PAR1" * 9)
    assert "x is broken: " in run("ultrafeedback", "--file", tmp_path / "x", "--valid", tmp_path / "x", fails=True)


def test_a_pipe_is_refused_and_not_waited_for(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no file " in run("alpaca", "--file", tmp_path / "pipe", fails=True)


def test_a_file_that_unpacks_to_more_than_the_memory_is_told_in_one_line(run, tmp_path, monkeypatch):
    def fail(data):
        raise MemoryError

    monkeypatch.setattr(public.gzip, "decompress", fail)
    (tmp_path / "rows.json").write_bytes(gzip.compress(b"[]"))
    assert "rows.json is broken: MemoryError" in run("alpaca", "--file", tmp_path / "rows.json", fails=True)


def test_other_mistakes_are_one_line(run, tmp_path, lines):
    assert "nowhere.json" in run("alpaca", "--file", "nowhere.json", fails=True)
    for name in ("hh", "ultrafeedback"):
        assert "--file and --valid go together" in run(name, "--file", "x", fails=True)
    assert "--subset must be one of helpful-base" in run("hh", "--subset", "all", fails=True)
    for share in (0, 1, -0.1):
        assert "--valid must be between 0 and 1" in run("alpaca", "--valid", share, fails=True)
    useless = lines([{"chosen": "a", "rejected": "b"}] * 3)
    assert "no records; 3 are in which" in run("hh", "--file", useless, "--valid", useless, fails=True)
    assert "too few records to split" in run("alpaca", "--file", lines(tasks(1)), fails=True)


@pytest.mark.parametrize("name", FINE)
def test_help_explains_the_format_and_the_options(command, name):
    code, out, err = command(f"data/{name}/prepare.py", "--help")
    assert (code, err) == (0, "") and f"python data/{name}/prepare.py" in out and "--file" in out and "--out" in out


# -------------------------------------------------------------------------------------------------- all files or none

OLD = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(8)]


def save(folder, pairs):
    sft = public.demonstrations(pairs)
    public.save(str(folder), (sft[:-4], sft[-4:]), (pairs[:-4], pairs[-4:]))


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_a_failure_midway_leaves_the_old_files_as_they_were(tmp_path, monkeypatch, fails_at):
    save(tmp_path, OLD)
    before = contents(tmp_path)
    lines = itertools.count(1)

    def dumps(value, real=json.dumps):
        if isinstance(value, dict) and next(lines) == 3 * fails_at:  # in another file each time
            raise KeyboardInterrupt
        return real(value)

    monkeypatch.setattr(public.json, "dumps", dumps)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, OLD[1:])
    assert len(before) == 6 and contents(tmp_path) == before


def test_a_disk_that_is_full_when_the_last_bytes_are_written_leaves_the_old_files(tmp_path):
    resource = pytest.importorskip("resource")
    save(tmp_path, OLD)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError):
            save(tmp_path, OLD[1:7] + [{**OLD[7], "chosen": "x" * 6000}])  # fits Python's buffer, not the disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------------- downloads


def load(path, folder, published=3):
    return [row for _, row in public.load_rows(path.as_uri(), str(folder), published)]


def test_a_download_is_kept_and_used_again(tmp_path, capfd):
    page = tmp_path / "page.json"
    page.write_text(json.dumps(tasks(3)))
    assert load(page, tmp_path / "out") == tasks(3) and capfd.readouterr() == ("", "")
    page.unlink()
    assert load(page, tmp_path / "out", 52_002) == tasks(3)
    out, err = capfd.readouterr()
    assert "is already there and is not downloaded again" in out
    assert "has 3 records, 52,002 were published" in err and err.count("\n") == 1


@pytest.mark.parametrize("content", [b"<html>Sign in</html>", b"[3]", gzip.compress(b"[]" * 99, mtime=0)[:-1]])
def test_a_broken_download_is_refused_and_downloaded_again_next_time(tmp_path, content):
    page = tmp_path / "page.json"
    page.write_bytes(content)
    with pytest.raises(UserError, match="page.json"):
        load(page, tmp_path / "out")
    assert files(tmp_path) == ["page.json"]
    page.write_text(json.dumps(tasks(3)))
    assert load(page, tmp_path / "out") == tasks(3)


class BreaksOff(io.BytesIO):
    headers = {}

    def read(self, size):
        if self.tell():
            raise ConnectionResetError("connection reset")
        return super().read(10)

    def info(self):
        return type("Headers", (), {"get_all": lambda *_: None})


@pytest.mark.parametrize("answer, reason", [
    (OSError("HTTP Error 404: Not Found"), "HTTP Error 404: Not Found"),
    (TimeoutError("timed out"), "timed out"),
    (ConnectionResetError(), "ConnectionResetError"),
    (BreaksOff(b"[" * 100), "connection reset"),
])  # fmt: skip
def test_a_failed_download_says_the_address_and_the_way_round_and_leaves_nothing(
    tmp_path, monkeypatch, command, answer, reason
):
    def urlopen(_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    code, _, err = command("data/alpaca/prepare.py", "--out", tmp_path)
    address = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
    assert (code, err.count("\n")) == (2, 1)
    assert f"{address} could not be downloaded ({reason})" in err and "--file" in err and files(tmp_path) == []


@pytest.mark.parametrize("options, subset", [([], "helpful-base"), (["--subset", "harmless-base"], "harmless-base")])
def test_both_files_of_a_subset_are_downloaded(command, lines, tmp_path, monkeypatch, options, subset):
    splits = {"train": lines(hh_rows(5), "train"), "test": lines(hh_rows(3, "milk"), "test")}
    folder = f"https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{subset}"
    pages = {f"{folder}/{split}.jsonl.gz": path for split, path in splits.items()}
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, progress: shutil.copy(pages[url], path))
    code, _, err = command("data/hh/prepare.py", *options, "--out", tmp_path / "out")
    assert code == 0 and err.count("warning") == 2 and len(read(tmp_path / "out/pairs_valid.jsonl")) == 3
    assert files(tmp_path / "out/download") == [f"{subset}-{split}.jsonl.gz" for split in ("test", "train")]


def test_both_files_of_ultrafeedback_are_downloaded(command, lines, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(public, "import_parquet", lambda: None)
    monkeypatch.setattr(public, "download", lambda url, folder: asked.append(url) or lines([uf_row(url, "a", "b")]))
    assert command("data/ultrafeedback/prepare.py", "--out", tmp_path / "out")[0] == 0
    folder = "https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized/resolve/main/data"
    assert asked == [f"{folder}/{split}_prefs-00000-of-00001.parquet" for split in ("train", "test")]
