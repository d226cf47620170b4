"""Nothing that comes from a file is trusted: what is resumed, what is loaded, what is overwritten, what is printed."""

import contextlib
import errno
import functools
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, SCRIPTS, Killed, assert_same_tensors, contents, copies, die_after, one_line, rest_slow
from nanopost.checkpoint import Folder, load_file, load_model
from nanopost.config import UserError, clean, cli, parse
from nanopost.config import one_line as on_one_line
from nanopost.files import atomic
from nanopost.model import GPTConfig
from nanopost.resume import load_optimizer
from nanopost.run import Options, Run, adamw

LONG = dict(steps=6, save_every=2)


@pytest.fixture
def interrupted(workshop, tmp_path, monkeypatch):
    """interrupted(script, **options): a folder with a run that died after its checkpoint at step 4."""

    def interrupt(script="sft", **options):
        restore_log = die_after(monkeypatch, 5)
        with pytest.raises(Killed):
            workshop.run(script, tmp_path / "out", **LONG, **options)
        restore_log()
        return tmp_path / "out"

    return interrupt


@pytest.fixture
def resume(workshop):
    """resume(folder, script, **options) goes on with a run that was interrupted."""

    def resume(folder, script="sft", **options):
        return workshop.run(script, folder, **{**LONG, "overwrite": False, "resume": True, **options})

    return resume


def refused(function, *words: str):
    """Calls function(), which must raise a UserError of one line with these words in it."""
    with pytest.raises(UserError) as error:
        function()
    assert all(word in one_line(error) for word in words), error.value


# --------------------------------------------------------------------------------- only the run itself can be resumed


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_earlier_finished_run_with_other_options_is_not_taken_for_this_one(script, workshop, tmp_path, resume):
    out = workshop.run(script, tmp_path / "out", **LONG, seed=1)
    before = contents(out)
    refused(lambda: resume(out, script, seed=2), "--resume", "was started with seed = 1, not 2", "--overwrite")
    refused(lambda: resume(out, "sft" if script == "dpo" else "dpo", seed=1), f"is a run of train_{script}.py")
    assert contents(out) == before


def test_a_finished_run_is_refused_before_anything_is_loaded(workshop, tmp_path, resume):
    out = workshop.run("sft", tmp_path / "out", **LONG)
    refused(lambda: resume(out, lr=0.5, data="nowhere"), "was started with")


INPUTS = {  # script, option, its value in the workshop
    "data": ("sft", "data", "sft.jsonl"),
    "held-out data": ("sft", "valid", "sft_valid.jsonl"),
    "model": ("dpo", "init", "sft"),
    "prompts": ("ppo", "prompts", "prompts.jsonl"),
    "reward model": ("ppo", "reward", "rm"),
    "program": ("ppo", "reward", "reward.py:vowels"),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("what", INPUTS)
def test_a_run_whose_input_has_changed_is_not_resumed(what, finished, workshop, tmp_path, interrupted, resume):
    script, name, value = INPUTS[what]
    file = value.partition(":")[0]
    path, source = tmp_path / file, workshop.path(file)
    (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, path)
    option = {name: str(tmp_path / value)}
    out = workshop.run(script, tmp_path / "out", **LONG, **option) if finished else interrupted(script, **option)
    before = contents(out)
    changed = path / "config.json" if path.is_dir() else path
    old = changed.read_text()
    changed.write_text(old + "\n")
    refused(lambda: resume(out, script, **option), f"what {name} = {path}", "has changed since")
    assert contents(out) == before
    changed.write_text(old)
    resume(out, script, **option)


def test_what_a_run_was_made_from_stands_in_its_config_and_not_in_its_log(workshop, tmp_path):
    out = workshop.run("sft", tmp_path / "out", steps=1)
    assert json.loads((out / "config.json").read_text())["inputs"].keys() >= {"data", "init", "valid"}
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0]).keys() == {"method", "arguments"}


# -------------------------------------------------------------------------------------- what a checkpoint is made of


def pick(state, *keys):
    for key in keys:
        state = state[key]
    return state


def put(*path):
    """A function that puts a value at this path of a state: put("step", 9)."""
    *keys, last, value = path
    return lambda state: pick(state, *keys).__setitem__(last, value)


def drop(*path):
    *keys, last = path
    return lambda state: pick(state, *keys).pop(last)


FIRST = ("optimizer", "state", 0)
DAMAGES = {
    "moments of another shape": put(*FIRST, "exp_avg", torch.zeros(3)),
    "larger moments": put(*FIRST, "exp_avg_sq", torch.zeros(9999, 16)),
    "a moment that is a number": put(*FIRST, "exp_avg", torch.tensor(0.0)),
    "a step of many": put(*FIRST, "step", torch.zeros(320, 16)),
    "no moments": drop(*FIRST, "exp_avg"),
    "moments of nothing": put("optimizer", "state", 9999, {"exp_avg": torch.zeros(3)}),
    "moments that are text": put("optimizer", "state", "much"),
    "no optimizer": drop("optimizer"),
    "weights of another shape": put("modules", "model", "wpe.weight", torch.zeros(3)),
    "a weight that is text": put("modules", "model", "wpe.weight", "heavy"),
    "no weight": drop("modules", "model", "wpe.weight"),
    "no model": drop("modules", "model"),
    "models in a list": put("modules", []),
    "no step": drop("step"),
    "a negative step": put("step", -1),
    "half a step": put("step", 1.5),
    "a step after the last": put("step", 10**6),
    "the last step": put("step", 6),
    "a step that is text": put("step", "4"),
    "no method": drop("method"),
    "no arguments": drop("arguments"),
    "arguments in a list": put("arguments", [1]),
    "numbers of another script": put("state", {"beta": 1.0}),
    "short random numbers": put("rng", torch.zeros(3, dtype=torch.uint8)),
    "random numbers that are text": put("rng", "dice"),
    "no random numbers": drop("rng"),
    "no time": put("seconds", None),
    "time without end": put("seconds", math.inf),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line_that_names_it(damage, interrupted, resume):
    out = interrupted()
    state = torch.load(out / "state.pt", weights_only=True)
    DAMAGES[damage](state)
    torch.save(state, out / "state.pt")
    before = (out / "state.pt").read_bytes()
    refused(lambda: resume(out), str(out / "state.pt"), "--overwrite")
    assert (out / "state.pt").read_bytes() == before and not (out / "config.json").exists()


@pytest.mark.parametrize("content", [None, [], [1], {}, 3, "text", torch.zeros(3)], ids=repr)
def test_a_checkpoint_of_something_else_is_refused(content, interrupted, resume):
    out = interrupted()
    torch.save(content, out / "state.pt")
    refused(lambda: resume(out), str(out / "state.pt"))


def test_a_number_of_the_script_that_is_not_finite_is_refused(interrupted, resume):
    out = interrupted("ppo")
    state = torch.load(out / "state.pt", weights_only=True)
    state["state"]["beta"] = math.inf
    torch.save(state, out / "state.pt")
    refused(lambda: resume(out, "ppo"), str(out / "state.pt"), "--overwrite")


def test_moments_that_only_seem_to_have_their_size_are_given_memory():
    """AdamW's fused kernel looks at no strides: one number that is repeated would be written behind its end."""
    p = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = adamw([p], lr=0.1)
    repeated = torch.zeros(1).expand(64, 64)
    known = {"step": torch.tensor(1.0), "exp_avg": repeated, "exp_avg_sq": repeated.t()}
    load_optimizer(optimizer, {"state": {0: known}})
    assert all(x.untyped_storage().nbytes() >= 4 * 64 * 64 for x in optimizer.state[p].values() if x.dim())


def test_a_checkpoint_that_is_a_pipe_is_refused(interrupted, resume):
    out = interrupted()
    (out / "state.pt").unlink()
    os.mkfifo(out / "state.pt")
    refused(lambda: resume(out), "state.pt cannot be read")


LINES = {
    "half": "[",
    "a list": "[1]",
    "bytes": "\xff",
    "a step that is text": '{"step": "x"}',
    "digits": '{"step": ' + "9" * 5000 + "}",
    "brackets": "[" * 10**5,
}


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_line_of_the_log_is_refused_with_its_place(line, interrupted, resume):
    out = interrupted()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([lines[0], LINES[line], *lines[1:]]) + "\n", encoding="latin-1")
    before = contents(out)
    refused(lambda: resume(out), f"{out}/metrics.jsonl:2: ")
    assert contents(out) == before


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    path, saved = tmp_path / "x.pt", {"a": torch.randn(30, 7), "b": torch.randn(11)}
    torch.save(saved, path)
    whole, rng, counts = path.read_bytes(), random.Random(0), {True: 0, False: 0}
    for bit in rng.sample(range(8 * len(whole)), 400):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert_same_tensors(load_file(str(path)), saved)
            counts[False] += 1
        except UserError:
            counts[True] += 1
    assert min(counts.values()) > 0


def test_a_part_that_claims_to_be_a_folder_would_be_read_as_whatever_is_in_the_memory(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(64)}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"x/data/0"))
    content[entry + 38] ^= 0x10  # a directory, says MS-DOS
    path.write_bytes(content)
    refused(lambda: load_file(str(path)), "cannot be read", "damaged")


def test_the_refusal_of_a_file_does_not_say_how_to_run_what_is_in_it(tmp_path):
    torch.save({"a": random.Random}, tmp_path / "x.pt")
    with pytest.raises(UserError) as error:
        load_file(str(tmp_path / "x.pt"))
    assert "weights_only" not in one_line(error) and "nothing of it was run" in str(error.value)


# ---------------------------------------------------------------------------------------------- one run in a folder

HOLD = """
import sys
import nanopost.checkpoint
folder = nanopost.checkpoint.Folder(sys.argv[1])
folder.lock()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that writes to tmp_path/out."""
    pytest.importorskip("fcntl", reason="only Unix has these locks")
    (tmp_path / "out").mkdir(exist_ok=True)
    command, environment = [sys.executable, "-c", HOLD, str(tmp_path / "out")], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("how", rest_slow([{}, {"overwrite": False}, {"overwrite": False, "resume": True}]), ids=str)
def test_a_second_run_in_a_folder_is_refused_until_the_first_one_is_dead(how, other, workshop, tmp_path):
    run = {"steps": 1, **how}
    refused(lambda: workshop.run("sft", tmp_path / "out", **run), "another run is writing to", str(tmp_path / "out"))
    assert contents(tmp_path / "out") == {}
    other.send_signal(signal.SIGKILL)
    other.wait()
    workshop.run("sft", tmp_path / "out", **run)
    load_model(str(tmp_path / "out"))


def test_a_run_that_was_made_while_this_one_loaded_its_inputs_is_refused_too(workshop, tmp_path, tiny, tokenizer):
    out, model = str(tmp_path / "out"), tiny(tokenizer.vocab_size)
    run = Run("test", Options(out=out, device="cpu"))
    finished = contents(workshop.run("sft", out, steps=1))
    refused(lambda: run.start({"model": model}, adamw(model.parameters(), 0.1), tokenizer), "holds a finished run")
    run = Run("test", Options(out=str(tmp_path / "new"), device="cpu"))
    run.start({"model": model}, adamw(model.parameters(), 0.1), tokenizer)
    shutil.copytree(out, tmp_path / "new")
    refused(lambda: run.save(1), "holds a finished run")
    assert contents(tmp_path / "new") == contents(out) == finished


@pytest.mark.parametrize("end", rest_slow(["finished", "failed", "killed"]))
def test_a_run_that_has_ended_holds_its_folder_no_longer(end, workshop, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    if end == "finished":
        workshop.run("sft", tmp_path / "out", steps=1)
    elif end == "failed":
        (tmp_path / "out").mkdir()
        refused(lambda: workshop.run("sft", tmp_path / "out", data="nowhere"), "nowhere")
    else:
        restore_log = die_after(monkeypatch, 1)
        with pytest.raises(Killed):
            workshop.run("sft", tmp_path / "out")
        restore_log()
    workshop.run("sft", tmp_path / "out", steps=1)  # in the same process, whatever is left of the first run
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.stdout == b"held\n", done.stderr


# ---------------------------------------------------------------------------------------------- what is overwritten


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(make, tmp_path):
    (tmp_path / "mine").write_text("mine")
    make(tmp_path / "mine", tmp_path / "file.tmp")
    with atomic(str(tmp_path / "file")) as f:
        f.write("new")
    assert contents(tmp_path) == {"mine": b"mine", "file": b"new"}


def test_only_kept_copies_are_removed_with_an_earlier_run(workshop, tmp_path):
    out = workshop.run("sft", tmp_path / "out", steps=2, keep_every=1)
    others = ["step-5-best", "step-100.old", "step-", "step-05", "step-1e3"]
    for name in others:
        (out / name).mkdir()
        (out / name / "file").write_text(name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    (out / "step-1").rename(tmp_path / "step-1")
    for name in ("step-1", "step-7"):
        (out / name).symlink_to(tmp_path / "mine")
    workshop.run("sft", out, steps=1, keep_every=1)
    assert copies(out) == sorted([*others, "step-1"]) and not (out / "step-1").is_symlink()
    assert contents(tmp_path / "mine") == {"config.json": b"mine"}


def test_a_kept_copy_is_not_written_through_a_link(workshop, tmp_path, tiny, tokenizer):
    (tmp_path / "mine").mkdir()
    (tmp_path / "step-2").symlink_to(tmp_path / "mine")
    Folder(str(tmp_path)).save("step-2", tiny(tokenizer.vocab_size), tokenizer, {}, head=True)
    assert os.listdir(tmp_path / "mine") == [] and not (tmp_path / "step-2").is_symlink()
    load_model(str(tmp_path / "step-2"))


def test_a_copy_that_is_half_removed_is_no_model(workshop, tmp_path, monkeypatch):
    out = workshop.run("sft", tmp_path / "out", steps=2, keep_every=1)

    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(Killed):
        workshop.run("sft", out, steps=1)
    half = [name for name in copies(out) if not (out / name / "config.json").exists()]
    assert len(half) == 1
    refused(lambda: load_model(str(out / half[0])), "no finished model")


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self):
        return 0


@pytest.mark.parametrize("write", [lambda f: f.write(b"x"), lambda f: torch.save({"a": torch.zeros(9)}, f)])
def test_a_full_disk_is_told_with_the_name_of_the_file(write, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_: Full())
    with pytest.raises(OSError) as error, atomic(str(tmp_path / "model.pt"), "wb") as f:
        write(f)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "model.pt")


def test_other_errors_while_a_file_is_written_stay_what_they_are(tmp_path):
    for wrong in (RuntimeError("mine"), OSError("mine"), OSError(errno.ENOENT, "mine", "theirs")):
        with pytest.raises(type(wrong)) as error, atomic(str(tmp_path / "file")):
            raise wrong
        assert error.value is wrong


# -------------------------------------------------------------------------------------------- options and what is told


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_a_script_must_be_finite(script, number, workshop, tmp_path):
    config = workshop.config(script, tmp_path / "out")
    names = [name for name, value in vars(config).items() if isinstance(value, float)]
    assert {"lr", "warmup", "grad_clip"} <= {*names, *["warmup"] * (script == "ppo")}
    for name in names:
        option = "--" + name.replace("_", "-")
        wrong = {name: number}
        refused(functools.partial(workshop.config, script, tmp_path / "out", **wrong), option, str(number))


@pytest.mark.parametrize("wrong", [{"seed": 2**63}, {"out": ""}, {"warmup": 5}], ids=str)
def test_what_would_be_taken_without_a_word_is_refused_with_what_it_may_be(wrong, workshop, tmp_path):
    refused(lambda: workshop.config("sft", **{"out": tmp_path / "out", **wrong}), f"--{next(iter(wrong))} must ")


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_a_warmup_is_a_share_of_the_steps(script, workshop, tmp_path):
    refused(lambda: workshop.config(script, tmp_path / "out", warmup=1.5), "--warmup must be ")


def test_control_characters_are_written_out_and_all_other_text_stays():
    assert clean("a\x1b[2J\x9b\x07b\rc\x7f\u202ed\ud800") == r"a\x1b[2J\x9b\x07b\rc\x7f\u202ed\ud800"
    for text in ("é 漢字 👩‍👩‍👧 \u00a0", "two\nlines and a\ttab", "\\x1b"):
        assert clean(text) == text


def test_an_error_is_one_line_of_limited_length():
    assert on_one_line("a\nb\x1b[0m") == r"a\nb\x1b[0m"
    long = on_one_line("begin " + "x" * 10**6 + " end")
    assert len(long) < 1100 and long.startswith("begin x") and long.endswith("x end")


def test_a_character_that_the_output_cannot_encode_ends_no_run(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    cli(lambda options: print("\ufffd and \u6f22"), Options, [])
    assert out.buffer.getvalue() == b"? and ?" + os.linesep.encode()


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device\n"),
        (OSError(errno.EACCES, "Permission denied", "a\x1bb"), "Permission denied: a\\x1bb\n"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "not enough memory"),
        (UserError("a\nb"), "a\\nb\n"),
    ],
    ids=str,
)
def test_an_error_of_the_machine_is_one_line(error, words, capsys):
    def main(options):
        raise error

    with pytest.raises(SystemExit) as end:
        cli(main, Options, [])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(f"error: {words}") and err.count("\n") == 1
    for other in (RuntimeError("an illegal memory access"), ValueError()):
        error = other
        with pytest.raises(type(other)):
            cli(main, Options, [])


class Closed(io.RawIOBase):
    """A pipe whose reader has gone."""

    def writable(self):
        return True

    def write(self, content):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_closed_pipe_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Closed())))
    with pytest.raises(SystemExit) as end:
        cli(lambda options: print("hello"), Options, [])
    assert end.value.code == 2 and capsys.readouterr().err == "error: Broken pipe\n"
    assert sys.stdout is None  # nothing is left that Python could not write when it ends


def test_whole_numbers_of_64_bits_keep_their_digits():
    assert parse(Options, ["--seed", str(2**53 + 1)]).seed == 2**53 + 1


# -- what else a person could meet


def test_a_model_of_a_billion_layers_is_refused():
    with pytest.raises(UserError, match="n_layer must be at most 1,000"):
        GPTConfig(n_layer=10**9)


def test_weights_that_are_not_finite_are_refused(workshop, tmp_path):
    folder = shutil.copytree(workshop.path("dropout"), tmp_path / "model")
    weights = torch.load(folder / "model.pt")
    weights["wpe.weight"][3, 2] = torch.nan
    torch.save(weights, folder / "model.pt")
    with pytest.raises(UserError, match="model.pt holds weights that are not finite"):
        load_model(str(folder))


def test_a_compiler_that_fails_is_told_in_one_line(capsys):
    failure = type("TritonMissing", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def main(config):
        raise failure("Cannot find a working triton installation.\nMore lines.")

    with pytest.raises(SystemExit, match="2"):
        cli(main, Options, [])
    err = capsys.readouterr().err
    assert (
        err.startswith("error: torch.compile failed; --compile off does without. Cannot find") and err.count("\n") == 1
    )


@pytest.mark.parametrize("scale, refused", [(1024.0, False), (1.0, False), (0.5, True)])
def test_in_half_precision_steps_are_skipped_but_not_for_ever(scale, refused):
    scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale)
    with pytest.raises(UserError, match="grad_norm is inf") if refused else contextlib.nullcontext():
        Run.check_finite(SimpleNamespace(scaler=scaler), {"grad_norm": math.inf}, 3)


@pytest.mark.slow
def test_to_load_a_model_no_compiler_is_imported(workshop):
    """Importing it takes as long as importing PyTorch."""
    code = f"""
import sys
from nanopost.checkpoint import load_model
before = set(sys.modules)
load_model({workshop.path("sft")!r})
sys.exit("sympy" in sys.modules.keys() - before)"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
