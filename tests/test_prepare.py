"""Public data sets: each publisher's format becomes records that the loaders read, and nothing is half-written."""

import gzip
import io
import json
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nanopost import prepare
from nanopost.config import UserError
from nanopost.data import load_examples, load_pairs, load_prompts

SETS = ("alpaca", "hh", "ultrafeedback")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def dialogue(*turns):
    """A dialogue in Anthropic's format: Human, Assistant, Human, ... in turn."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))


def tasks(n):
    return [{"instruction": f"Count to {i}.", "input": "", "output": f"One to {i}."} for i in range(n)]


def hh_rows(n, word="tea"):
    return [{"chosen": dialogue(f"{word} {i}?", "Yes, please."), "rejected": dialogue(f"{word} {i}?", "Go away.")}
            for i in range(n)]


def uf_row(prompt, chosen, rejected, scores=(8.0, 5.5)):
    return {"prompt": prompt, "prompt_id": "0f", "chosen": [user(prompt), assistant(chosen)],
            "rejected": [user(prompt), assistant(rejected)], "messages": [user(prompt), assistant(chosen)],
            "score_chosen": scores[0], "score_rejected": scores[1]}


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def files(folder):
    return sorted(p.name for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture
def run(command, tmp_path):
    """run("hh", "--file", ...) prepares into tmp_path/"out" -> (stdout, stderr). A failure: one line, exit code 2."""

    def run(name, *arguments, fails=False):
        code, out, err = command(f"data/{name}/prepare.py", *arguments, "--out", tmp_path / "out")
        assert (code, err.count("\n") if fails else 0) == ((2, 1) if fails else (0, 0)), err
        return out, err

    return run


@pytest.fixture
def internet(monkeypatch):
    """internet[url] = bytes, or an exception: what urlopen finds there; internet.asked lists what was opened."""

    class Internet(dict):
        asked = []

    class Response(io.BytesIO):
        headers = {}

    def urlopen(url, timeout):
        internet.asked.append(url)
        content = internet.get(url, urllib.error.URLError("[Errno -2] Name or service not known"))
        if isinstance(content, Exception):
            raise content
        response = content if isinstance(content, io.BytesIO) else Response(content)
        response.headers = {"Content-Length": str(internet.length or len(response.getvalue()))}
        return response

    internet = Internet()
    internet.asked, internet.length = [], None
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return internet


def check_loads(folder, tokenizer):
    """Every record of every file that was written is one that the loaders take."""
    for path in Path(folder).glob("*.jsonl"):
        kind, count = path.name.split("_")[0], len(read(path))
        if kind == "sft":
            assert len(load_examples(str(path), tokenizer)) == count
        elif kind == "pairs":
            assert len(load_pairs(str(path), tokenizer)) == count
        else:
            assert len(load_prompts(str(path), tokenizer, 10**6)[0]) == count


def check_apart(folder):
    """No prompt is in two splits."""
    prompts = {split: {json.dumps(r["prompt"]) for p in Path(folder).glob(f"*_{split}.jsonl") for r in read(p)}
               for split in ("train", "valid")}
    assert prompts["train"] and prompts["valid"] and not prompts["train"] & prompts["valid"]


# ---------------------------------------------------------------------------------------------------------- alpaca


def test_alpaca_joins_instruction_and_input_by_a_blank_line(run, tmp_path, tokenizer):
    rows = [{"instruction": "Turn it round.", "input": " left ", "output": "right\n"},
            {"instruction": "Say hi.", "input": "", "output": "Hi."},
            {"instruction": "Say bye.", "input": "<noinput>", "output": "Bye."},
            {"instruction": "Say it all.", "output": "All \ud83d"},  # half a character, as damaged data may have
            {"instruction": "Say nothing.", "input": "", "output": " "},
            {"instruction": " ", "input": "", "output": "What?"}] + tasks(60)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    out, _ = run("alpaca", "--file", tmp_path / "a.json")
    assert "SFT: 64 records, dropped 1 with an empty output, dropped 1 without an instruction" in out
    records = [r for split in ("train", "valid") for r in read(tmp_path / "out" / f"sft_{split}.jsonl")]
    by_prompt = {r["prompt"]: r["completion"] for r in records}
    assert len(by_prompt) == 64 and by_prompt["Turn it round.\n\nleft"] == "right" and by_prompt["Say hi."] == "Hi."
    assert by_prompt["Say bye."] == "Bye."
    assert files(tmp_path / "out") == ["prompts_train.jsonl", "prompts_valid.jsonl", "sft_train.jsonl",
                                       "sft_valid.jsonl"]
    check_loads(tmp_path / "out", tokenizer)
    check_apart(tmp_path / "out")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_a_json_list_and_json_lines_gzipped_or_not_are_the_same(run, tmp_path, name):
    rows = tasks(100)
    text = "\n".join(map(json.dumps, rows)) if "jsonl" in name else json.dumps(rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    run("alpaca", "--file", tmp_path / name)
    written = [read(tmp_path / "out" / f"sft_{split}.jsonl") for split in ("train", "valid")]
    assert written == [[{"prompt": r["instruction"], "completion": r["output"]} for r in rows
                        if (r["instruction"] in {v["prompt"] for v in written[1]}) == held] for held in (False, True)]


def test_alpaca_with_preferences_gives_pairs_and_prompts_too(run, tmp_path, tokenizer):
    rows = [{**task, "chosen": task["output"], "rejected": f"No. {i}"} for i, task in enumerate(tasks(100))]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["rejected"] = ""
    del rows[7]["chosen"]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    out, _ = run("alpaca", "--file", tmp_path / "p.json")
    assert "SFT: 100 records\n" in out
    assert ("pairs: 97 records, dropped 1 with two equal answers, dropped 1 with an empty answer, dropped 1 without a "
            "chosen and a rejected answer") in out
    assert len(files(tmp_path / "out")) == 6
    pairs = read(tmp_path / "out/pairs_train.jsonl")
    assert {"prompt": "Count to 0.", "chosen": "One to 0.", "rejected": "No. 0"} in pairs
    assert all(pair.keys() == {"prompt", "chosen", "rejected"} for pair in pairs)
    check_loads(tmp_path / "out", tokenizer)
    check_apart(tmp_path / "out")


def test_files_of_an_earlier_run_that_do_not_belong_are_removed(run, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{**t, "chosen": "a", "rejected": "b"} for t in tasks(60)]))
    (tmp_path / "a.json").write_text(json.dumps(tasks(60)))
    run("alpaca", "--file", tmp_path / "p.json")
    assert "pairs_train.jsonl" in files(tmp_path / "out")
    run("alpaca", "--file", tmp_path / "a.json")
    assert "sft_train.jsonl" in files(tmp_path / "out") and "pairs_train.jsonl" not in files(tmp_path / "out")


# --------------------------------------------------------------------------------------------------- hold-out splits


def test_a_prompt_is_held_out_whatever_stands_around_it():
    records = [{"prompt": f"p{i % 300}", "completion": str(i)} for i in range(600)]  # each prompt twice
    train, valid = prepare.hold_out(records, 0.1)
    assert len(train) + len(valid) == 600 and 30 < len(valid) < 90
    again = prepare.hold_out(records[::-1][:450], 0.1)
    held = {r["prompt"] for r in valid}
    assert not held & {r["prompt"] for r in train}
    assert {r["prompt"] for r in again[1]} <= held and not {r["prompt"] for r in again[0]} & held
    assert {r["prompt"] for r in prepare.hold_out(records, 0.05)[1]} < held  # a smaller share is a part of a larger


def test_the_same_file_gives_the_same_bytes(run, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(tasks(200)))
    contents = []
    for _ in range(2):
        run("alpaca", "--file", tmp_path / "a.json")
        contents.append([(tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")])
    assert contents[0] == contents[1]


def test_training_records_with_a_held_out_prompt_are_dropped(run, tmp_path, lines, tokenizer):
    train, valid = lines(hh_rows(6), "train.jsonl"), lines(hh_rows(2), "test.jsonl")
    out, _ = run("hh", "--file", train, "--valid", valid)
    assert "dropped 4 training records whose prompt is held out" in out  # two pairs, and their two demonstrations
    assert [len(read(tmp_path / f"out/{kind}_train.jsonl")) for kind in ("sft", "pairs", "prompts")] == [4, 4, 4]
    check_apart(tmp_path / "out")


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_that_leaves_one_side_empty_is_refused(run, tmp_path, share):
    assert "--valid must be between 0 and 1" in run("alpaca", "--valid", share, fails=True)[1]


def test_too_few_records_to_split_are_refused(run, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(tasks(1)))
    assert "too few" in run("alpaca", "--file", tmp_path / "a.json", fails=True)[1]
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- hh


def test_dialogues_are_split_at_the_last_answer(run, tmp_path, lines, tokenizer):
    talk = dialogue("May I ask?", "Of course.\n\nGo on.", "How do Humans: say hello?")
    rows = [{"chosen": talk + "\n\nAssistant: Hello.\n\nOr hi. ", "rejected": talk + "\n\nAssistant: Assistant: no"}]
    out, _ = run("hh", "--file", lines(rows, "train.jsonl"), "--valid", lines(hh_rows(3), "test.jsonl"))
    prompt = [user("May I ask?"), assistant("Of course.\n\nGo on."), user("How do Humans: say hello?")]
    assert read(tmp_path / "out/pairs_train.jsonl") == [
        {"prompt": prompt, "chosen": "Hello.\n\nOr hi.", "rejected": "Assistant: no"}]
    assert read(tmp_path / "out/sft_train.jsonl") == [{"prompt": prompt, "completion": "Hello.\n\nOr hi."}]
    assert read(tmp_path / "out/prompts_train.jsonl") == [{"prompt": prompt}]
    assert len(read(tmp_path / "out/pairs_valid.jsonl")) == 3
    check_loads(tmp_path / "out", tokenizer)


TURNS, EMPTY = "in which Human and Assistant do not take turns", "with an empty turn"
UNUSABLE = [
    (dialogue("a", "b", "c", "d"), dialogue("a", "B", "c", "e"), "with two different prompts"),
    (dialogue("a", "b"), dialogue("a", "c", "more", "d"), "with two different prompts"),
    (dialogue("a", "b"), dialogue("a", "b "), "with two equal answers"),
    (dialogue("a", ""), dialogue("a", "b"), EMPTY),
    (dialogue("a", "b"), dialogue("a", " \n"), EMPTY),
    (dialogue("a", "", "c", "d"), dialogue("a", "", "c", "e"), EMPTY),
    (dialogue("", "b"), dialogue("", "c"), EMPTY),
    ("\n\nAssistant: b", "\n\nAssistant: c", TURNS),
    ("\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", "\n\nAssistant: a\n\nHuman: b\n\nAssistant: d", TURNS),
    ("Well.\n\nHuman: a\n\nAssistant: b", "Well.\n\nHuman: a\n\nAssistant: c", TURNS),
    (dialogue("a", "b", "c"), dialogue("a", "d", "c"), TURNS),
    (dialogue("a"), dialogue("a"), TURNS),
    (dialogue("a") + dialogue("b", "c"), dialogue("a") + dialogue("b", "d"), TURNS),
    (dialogue("a", "b") + "\n\nAssistant: c", dialogue("a", "b") + "\n\nAssistant: d", TURNS),
    ("just text", "other text", TURNS),
    ("", "", TURNS),
]


@pytest.mark.parametrize("chosen, rejected, reason", UNUSABLE)
def test_dialogues_that_cannot_be_used_are_dropped_with_the_reason(run, tmp_path, lines, chosen, rejected, reason):
    train = lines([*hh_rows(2), {"chosen": chosen, "rejected": rejected}], "train.jsonl")
    out, _ = run("hh", "--file", train, "--valid", lines(hh_rows(2, "milk"), "test.jsonl"))
    assert f"train.jsonl: 2 records, dropped 1 {reason}\n" in out
    assert len(read(tmp_path / "out/pairs_train.jsonl")) == 2


# --------------------------------------------------------------------------------------------------- ultrafeedback

ULTRA = [uf_row("Name a bird.", "A robin.", "A cat."), uf_row("Tie.", "one", "two", (7, 7.0)),
         uf_row("Equal.", "same", " same"), uf_row("Empty.", "", "something"),
         {**uf_row("Other.", "a", "b"), "rejected": [user("Another."), assistant("b")]},
         {**uf_row("Half.", "a", "b"), "rejected": [user("Half.")]},
         {**uf_row("", "", ""), "chosen": [user("Hi"), assistant("Yes?"), user("2+2?"), assistant("4.")],
          "rejected": [user("Hi"), assistant("Yes?"), user("2+2?"), assistant("5.")]}]
DROPPED = ("2 records, dropped 1 with equal scores, dropped 1 with two equal answers, dropped 1 with an empty turn, "
           "dropped 1 with two different prompts, dropped 1 that do not end with a user's turn and an answer")


def check_ultra(out, folder, tokenizer):
    assert DROPPED in out
    assert read(folder / "pairs_train.jsonl") == [
        {"prompt": [user("Name a bird.")], "chosen": "A robin.", "rejected": "A cat."},
        {"prompt": [user("Hi"), assistant("Yes?"), user("2+2?")], "chosen": "4.", "rejected": "5."}]
    check_loads(folder, tokenizer)
    check_apart(folder)


def test_ultrafeedback_in_json_lines_needs_no_pyarrow(run, tmp_path, lines, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    out, _ = run("ultrafeedback", "--file", lines(ULTRA, "train.jsonl"), "--valid",
                 lines([uf_row("Sing.", "La.", "No.")], "test.jsonl"))
    check_ultra(out, tmp_path / "out", tokenizer)


def test_ultrafeedback_in_parquet_is_the_same(run, tmp_path, tokenizer, internet):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for split, rows in (("train", ULTRA), ("test", [uf_row("Sing.", "La.", "No.")])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
        internet["https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized/resolve/main/data/"
                 f"{split}_prefs-00000-of-00001.parquet"] = (tmp_path / "x.parquet").read_bytes()
    out, err = run("ultrafeedback")
    assert err.count("warning") == 2 and "61,135 were published" in err
    check_ultra(out, tmp_path / "out", tokenizer)
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:200])
    err = run("ultrafeedback", "--file", tmp_path / "x.parquet", "--valid", tmp_path / "x.parquet", fails=True)[1]
    assert "broken parquet file" in err


def test_without_pyarrow_parquet_is_refused_before_it_is_downloaded(run, tmp_path, monkeypatch, internet):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "parquet: parquet needs pyarrow; pip install pyarrow" in run("ultrafeedback", fails=True)[1]
    assert not internet.asked and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- bad input

BAD_JSON = '{"chosen": "\\n\\nHuman: a'
MALFORMED = [
    ("hh", BAD_JSON, ":3: invalid JSON"),
    ("hh", [1], ":3: a record must be an object"),
    ("hh", {"chosen": "x"}, ":3: needs chosen, rejected; rejected is missing"),
    ("hh", {"chosen": "x", "rejected": None}, ":3: rejected must be a string, not null"),
    ("hh", {"chosen": dialogue("a", "b"), "rejected": 3}, ":3: rejected must be a string, not 3"),
    ("ultrafeedback", {"chosen": [], "rejected": []}, ":3: .*score_chosen is missing"),
    ("ultrafeedback", {**uf_row("a", "b", "c"), "chosen": "b"}, ":3: chosen must be a list of"),
    ("ultrafeedback", {**uf_row("a", "b", "c"), "rejected": [user("a"), {"role": "bot", "content": "c"}]},
     ":3: rejected must be a list of"),
    ("ultrafeedback", {**uf_row("a", "b", "c"), "rejected": [user("a"), {"role": "assistant", "content": None}]},
     ":3: rejected must be a list of"),
    ("alpaca", {"instruction": "a"}, ":3: needs instruction, output; output is missing"),
    ("ultrafeedback", {**uf_row("a", "", "c", (1, 1)), "rejected": "c"}, ":3: rejected must be a list of"),
    ("alpaca", {"instruction": "a", "input": 4, "output": ""}, ":3: input must be a string, not 4"),
]
FINE = {"hh": hh_rows(2), "ultrafeedback": [uf_row("q", "b", "c")] * 2, "alpaca": tasks(2)}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name, row, message", MALFORMED)
def test_a_malformed_row_is_refused_with_its_line_and_nothing_is_written(run, tmp_path, lines, name, row, message,
                                                                         zipped):
    path = Path(lines([*FINE[name], row, *FINE[name]], "rows.jsonl"))
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    others = [] if name == "alpaca" else ["--valid", lines(FINE[name], "fine.jsonl")]
    _, err = run(name, "--file", path, *others, fails=True)
    assert re.search(rf"^error: .*rows\.jsonl{message}", err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, message", [
    (json.dumps([*tasks(2), {"instruction": "a"}]), r"rows.json[2]: needs instruction, output; output is missing"),
    (json.dumps([*tasks(2), "text"]), r"rows.json[2]: a record must be an object"),
    (json.dumps(tasks(9), indent=1)[:-20], r"rows.json:45: invalid JSON"),
    (b"[\xe9]", "not UTF-8"),
    ("[]", "holds no records"), ("", "holds no records"), ("<html>", "rows.json:1: invalid JSON"),
    (gzip.compress(json.dumps(tasks(9)).encode())[:-9], "broken gzip file"),
])
def test_a_broken_file_is_refused_with_the_place(run, tmp_path, content, message):
    (tmp_path / "rows.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in run("alpaca", "--file", tmp_path / "rows.json", fails=True)[1]
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_one_line(run, tmp_path, lines):
    assert "no file nowhere.json" in run("alpaca", "--file", "nowhere.json", fails=True)[1]
    for name in ("hh", "ultrafeedback"):
        assert "--file and --valid go together" in run(name, "--file", "x", fails=True)[1]
    assert "--subset must be one of helpful-base" in run("hh", "--subset", "all", fails=True)[1]
    useless = lines([{"chosen": "a", "rejected": "b"}] * 3)
    assert "no records; 3 are in which" in run("hh", "--file", useless, "--valid", useless, fails=True)[1]


@pytest.mark.parametrize("name", SETS)
def test_help_explains_the_format_and_the_options(command, name):
    code, out, err = command(f"data/{name}/prepare.py", "--help")
    assert (code, err) == (0, "") and f"python data/{name}/prepare.py" in out and "--file" in out and "--out" in out


# ------------------------------------------------------------------------------------------------- all files or none


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_a_failure_midway_leaves_the_old_files_as_they_were(tmp_path, monkeypatch, fails_at):
    pairs = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(8)]
    sft = prepare.demonstrations(pairs)
    prepare.save(str(tmp_path), (sft[:4], sft[4:]), (pairs[:4], pairs[4:]))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert len(before) == 6
    calls = []

    class Full(Exception):
        pass

    def dumps(record, real=json.dumps):
        if "completion" in record or "chosen" in record or list(record) == ["prompt"]:  # a line of a file
            calls.append(record)
            if len(calls) == 3 * fails_at:
                raise Full
        return real(record)

    monkeypatch.setattr(prepare.json, "dumps", dumps)
    with pytest.raises(Full):
        prepare.save(str(tmp_path), (sft[2:4], sft[4:]), (pairs[2:4], pairs[4:]))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_disk_that_is_full_when_the_last_bytes_are_written_leaves_the_old_files(tmp_path):
    resource = pytest.importorskip("resource")
    prepare.save(str(tmp_path), ([{"prompt": "a", "completion": "b"}], [{"prompt": "c", "completion": "d"}]), ([], []))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    limits, long = resource.getrlimit(resource.RLIMIT_FSIZE), "x" * 6000  # fits Python's buffer, not the disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError):
            prepare.save(str(tmp_path), ([{"prompt": "a", "completion": long}], [{"prompt": "c", "completion": "e"}]),
                         ([], []))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


# -------------------------------------------------------------------------------------------------------- downloads

ALPACA = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
HH = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{}/{}.jsonl.gz"


def test_a_download_is_kept_and_used_again(run, tmp_path, internet):
    internet[ALPACA] = json.dumps(tasks(60)).encode()
    out, err = run("alpaca")
    assert "has 60 records, 52,002 were published" in err and len(err.splitlines()) == 1
    assert "alpaca_data.json" in files(tmp_path / "out")
    first = (tmp_path / "out/sft_train.jsonl").read_bytes()
    out, err = run("alpaca")
    assert "not downloaded again" in out and internet.asked == [ALPACA]
    assert (tmp_path / "out/sft_train.jsonl").read_bytes() == first


def test_as_many_records_as_were_published_are_no_reason_to_warn(run, internet):
    internet[ALPACA] = json.dumps(tasks(52_002)).encode()
    assert run("alpaca")[1] == ""


@pytest.mark.parametrize("subset", ["helpful-base", "harmless-base"])
def test_both_files_of_a_subset_are_downloaded(run, tmp_path, internet, tokenizer, subset):
    for split, word, n in (("train", "tea", 5), ("test", "milk", 3)):
        content = "\n".join(map(json.dumps, hh_rows(n, word)))
        internet[HH.format(subset, split)] = gzip.compress(content.encode())
    out, err = run("hh", "--subset", subset)
    assert internet.asked == [HH.format(subset, split) for split in ("train", "test")]
    assert {f"{subset}-train.jsonl.gz", f"{subset}-test.jsonl.gz"} < set(files(tmp_path / "out"))
    assert len(read(tmp_path / "out/pairs_train.jsonl")) == 5 and len(read(tmp_path / "out/pairs_valid.jsonl")) == 3
    check_loads(tmp_path / "out", tokenizer)


@pytest.mark.parametrize("error, reason", [
    (urllib.error.HTTPError(ALPACA, 404, "Not Found", {}, None), "HTTP Error 404: Not Found"),
    (urllib.error.URLError("[Errno -2] Name or service not known"), "Name or service not known"),
    (TimeoutError("timed out"), "timed out"), (ConnectionResetError(), "ConnectionResetError"),
])
def test_a_failed_download_says_the_address_and_the_way_round(run, tmp_path, internet, error, reason):
    internet[ALPACA] = error
    _, err = run("alpaca", fails=True)
    assert ALPACA in err and reason in err and "--file" in err
    assert not (tmp_path / "out").exists()


def test_a_connection_that_breaks_off_leaves_nothing_half_written(run, tmp_path, internet):
    internet[ALPACA] = json.dumps(tasks(60)).encode()
    internet.length = 10**6
    assert "of 1,000,000 bytes came" in run("alpaca", fails=True)[1]

    class Breaks(io.BytesIO):
        def read(self, size):
            if self.tell():
                raise ConnectionResetError("connection reset")
            return super().read(10)

    internet[ALPACA] = Breaks(b"[" * 100)
    assert "connection reset" in run("alpaca", fails=True)[1]
    internet[ALPACA], internet.length = b"", None
    assert "0 of 0 bytes came" in run("alpaca", fails=True)[1]
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize("content", [b"<html>Sign in</html>", b'[{"instruction": "a"}]', b"[]"])
def test_a_download_of_something_else_is_refused_and_fetched_again_next_time(run, tmp_path, internet, content):
    internet[ALPACA] = content
    assert "alpaca_data.json" in run("alpaca", fails=True)[1]
    assert files(tmp_path / "out") == []
    internet[ALPACA] = json.dumps(tasks(60)).encode()
    run("alpaca")


# ------------------------------------------------------------------------------- the shapes that TRL documents load


def test_the_standard_and_conversational_formats_of_trl_load(lines, tokenizer):
    q, a, b = "What colour is grass?", "It is green.", "It is loud."
    examples = load_examples(lines([
        {"text": a}, {"messages": [user(q), assistant(a)]},  # language modelling
        {"prompt": "Grass is", "completion": " green."}, {"prompt": [user(q)], "completion": [assistant(a)]},
    ], "sft.jsonl"), tokenizer)
    assert len(examples) == 4 and examples[1] == examples[3]
    prompts, ids = load_prompts(lines([{"prompt": "Grass is"}, {"prompt": [user(q)]}], "p.jsonl"), tokenizer, 100)
    assert len(ids) == 2
    explicit, implicit = load_pairs(lines([
        {"prompt": [user(q)], "chosen": [assistant(a)], "rejected": [assistant(b)]},
        {"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)]},  # the prompt is in both
    ], "pairs.jsonl"), tokenizer)
    assert explicit == implicit
    assert tokenizer.decode(implicit[1].ids) == f"<|user|>{q}<|assistant|>{b}<|end|>"
    assert len(load_pairs(lines([{"prompt": "Grass is", "chosen": " green.", "rejected": " loud."}]), tokenizer)) == 1


def test_a_prompt_inside_two_conversations_ends_before_their_last_turns(lines, tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello."), user("Bye")]
    [(chosen, rejected)] = load_pairs(lines([{"chosen": [*talk, assistant("See you.")],
                                              "rejected": [*talk, assistant("No.")]}]), tokenizer)
    answers = [tokenizer.decode([i for i, t in zip(side.ids, side.mask) if t]) for side in (chosen, rejected)]
    assert answers == ["See you.<|end|>", "No.<|end|>"]


@pytest.mark.parametrize("pair, message", [
    ({"chosen": "Grass is green.", "rejected": "Grass is loud."}, "prompt is missing; only .* conversations"),
    ({"chosen": [user("a"), assistant("b")], "rejected": "c"}, "prompt is missing; only .* conversations"),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "do not share all but"),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c"), user("d"), assistant("e")]},
     "do not share all but"),
    ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "do not share all but"),
    ({"chosen": [], "rejected": []}, "do not share all but"),
    ({"chosen": [user("a"), user("b")], "rejected": [user("a"), user("c")]}, "chosen must begin and end"),
])
def test_a_prompt_that_cannot_be_found_is_refused_with_the_line(lines, tokenizer, pair, message):
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{message}"):
        load_pairs(lines([{"prompt": "a", "chosen": "b", "rejected": "c"}, pair]), tokenizer)
