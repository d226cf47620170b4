"""Damaged and hostile files: refused in one line, no code in them runs, and no terminal obeys what they say."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import Killed, assistant, contents, die_after, make_model, make_tokenizer, user, write_lines
from nanopost.checkpoint import load_model, save_model
from nanopost.config import UserError
from torture.conftest import command_line, told_in_one_line

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's warnings about pickles


def same(one, other) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def flip(path: Path, rng, bits: int):
    data = bytearray(path.read_bytes())
    for _ in range(bits):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.fixture
def stopped(workshop, tmp_path):
    """The folder of a run that stopped at step 4 of 6, and the arguments that go on with it."""
    options = dict(steps=6, save_every=2, valid="")
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 5)
        with pytest.raises(Killed):
            workshop.run("sft", tmp_path / "stopped", **options)
    config = workshop.config("sft", tmp_path / "stopped", overwrite=False, resume=True, **options)
    return tmp_path / "stopped", command_line(config)


# ------------------------------------------------------------------------------------------------------ flipped bits


@pytest.mark.parametrize("bits", [1, 30])
def test_weights_with_flipped_bits_are_refused(workshop, tmp_path, rng, times, bits):
    """A bit outside all that is read, in the padding of the archive, may go unnoticed."""
    whole = load_model(workshop.path("sft"))[0].state_dict()
    for i in range(8 * times):
        folder = Path(shutil.copytree(workshop.path("sft"), tmp_path / str(i)))
        flip(folder / "model.pt", rng, bits)
        try:
            assert same(load_model(str(folder))[0].state_dict(), whole)
        except UserError as error:
            assert "model.pt" in str(error)
        shutil.rmtree(folder)


@pytest.mark.parametrize("bits", [1, 30])
def test_a_state_with_flipped_bits_is_refused(stopped, command, rng, times, bits):
    folder, arguments = stopped
    whole = (folder / "state.pt").read_bytes()
    state = torch.load(folder / "state.pt", weights_only=True)
    for _ in range(4 * times):
        flip(folder / "state.pt", rng, bits)
        try:
            harmless = same(torch.load(folder / "state.pt", weights_only=True), state)
        except Exception:  # whatever PyTorch says of a file that is broken
            harmless = False
        if not harmless:
            code, _, err = command("train_sft.py", *arguments)
            assert told_in_one_line(code, err, "state.pt"), err
        (folder / "state.pt").write_bytes(whole)


def test_files_cut_off_anywhere_are_refused(workshop, tmp_path, rng, times):
    for i in range(4 * times):
        folder = Path(shutil.copytree(workshop.path("sft"), tmp_path / str(i)))
        name = rng.choice(["model.pt", "config.json", "vocab.tiktoken"])
        os.truncate(folder / name, rng.randrange((folder / name).stat().st_size - 1))
        with pytest.raises(UserError, match=str(folder)) as error:
            load_model(str(folder))
        assert "\n" not in str(error.value)
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------ states of other runs


def moments_of_another_shape(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)


def weights_of_another_shape(state):
    name = next(iter(state["modules"]["model"]))
    state["modules"]["model"][name] = torch.zeros(2, 2)


STATES = {
    "nothing": lambda state: state.clear(),
    "moments of another shape": moments_of_another_shape,
    "weights of another shape": weights_of_another_shape,
    "no optimizer": lambda state: state.pop("optimizer"),
    "no random numbers": lambda state: state.pop("rng"),
    "random numbers of another length": lambda state: state.update(rng=torch.zeros(3, dtype=torch.uint8)),
    "a step beyond the end": lambda state: state.update(step=10**9),
    "a step before the start": lambda state: state.update(step=-1),
    "a step that is no number": lambda state: state.update(step="4"),
    "no arguments": lambda state: state.update(arguments=None),
    "another method": lambda state: state.update(method=["sft"]),
    "a time that is none": lambda state: state.update(seconds="long"),
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_of_something_else_is_refused(stopped, command, what):
    folder, arguments = stopped
    state = torch.load(folder / "state.pt", weights_only=True)
    STATES[what](state)
    torch.save(state, folder / "state.pt")
    before = contents(folder)
    code, _, err = command("train_sft.py", *arguments)
    assert told_in_one_line(code, err, str(folder)), err
    assert contents(folder) == before


@pytest.mark.parametrize("line", ["{oops", "[1]", "3", '{"step": "x"}', '{"step": null}'])
def test_a_damaged_log_is_refused(stopped, command, line):
    folder, arguments = stopped
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(line + "\n")
    before = contents(folder)
    code, _, err = command("train_sft.py", *arguments)
    assert told_in_one_line(code, err, "metrics.jsonl"), err
    assert contents(folder) == before


# --------------------------------------------------------------------------------------------------------- payloads


class Payload:
    """Unpickling it calls a function that leaves a trace."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = {
    "open": lambda trace: Payload(open, trace, "w"),
    "os.system": lambda trace: Payload(os.system, f"touch {trace}"),
    "exec": lambda trace: Payload(exec, f"open({trace!r}, 'w')"),
    "eval": lambda trace: Payload(eval, f"open({trace!r}, 'w')"),
    "os.mkdir": lambda trace: Payload(os.mkdir, trace),
    "with an escape": lambda trace: Payload(exec, f"open({trace!r}, 'w')  # \x1b[2J\r\n"),
}


def as_pickle(payload, path):
    Path(path).write_bytes(pickle.dumps({"wte.weight": payload}))


def as_archive(payload, path):
    torch.save({"wte.weight": payload}, path)


def as_old_file(payload, path):
    torch.save({"wte.weight": payload}, path, _use_new_zipfile_serialization=False)


def as_tar(payload, path):
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(payload)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def as_script(payload, path):
    """An archive as torch.jit.save writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("constants.pkl", "data.pkl"):
            archive.writestr(f"x/{name}", pickle.dumps(payload))
        archive.writestr("x/code/__torch__.py", "import os")
        archive.writestr("x/version", "3")


@pytest.mark.parametrize("container", [as_pickle, as_archive, as_old_file, as_tar, as_script])
def test_no_payload_runs(workshop, stopped, tmp_path, command, tool, container, rng, times):
    trace = tmp_path / "trace"
    folder = Path(shutil.copytree(workshop.path("sft"), tmp_path / "hostile"))
    judge = Path(shutil.copytree(workshop.path("rm"), tmp_path / "judge"))
    ppo = command_line(workshop.config("ppo", tmp_path / "out"))
    for call in CALLS if times > 1 else rng.sample(list(CALLS), 2):
        container(CALLS[call](str(trace)), folder / "model.pt")
        shutil.copy(folder / "model.pt", judge / "model.pt")
        shutil.copy(folder / "model.pt", stopped[0] / "state.pt")
        for code, _, err in (
            tool("chat", folder, "--prompt", "Hi"),
            command("train_sft.py", *command_line(workshop.config("sft", tmp_path / "out")), "--init", folder),
            command("train_ppo.py", *ppo, "--reward", judge),
            command("train_ppo.py", *ppo, "--critic", judge),
            command("train_sft.py", *stopped[1]),
        ):
            assert told_in_one_line(code, err, "cannot be read") and "weights_only" not in err, err
        assert not trace.exists()


# ---------------------------------------------------------------------------------------- archives and numbers that lie


def bomb(path):
    """Fifty megabytes of zeros in fifty kilobytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
        archive.writestr("archive/version", "3")


def huge_tensor(path):
    """A tensor of 4 TB that has 4 bytes."""
    file = io.BytesIO()
    torch.save({"wte.weight": torch.zeros(1)}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"K\x01\x85", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85")
            target.writestr(name, data)


ARCHIVES = {
    "a bomb": bomb,
    "a tensor larger than its bytes": huge_tensor,
    "an empty archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "a directory that lies": lambda path: path.write_bytes(
        b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 99, 99, 0)
    ),
    "zeros": lambda path: path.write_bytes(bytes(10_000)),
    "a tensor in place of a dict": lambda path: torch.save(torch.zeros(3), path),
    "names that are no text": lambda path: torch.save({3: torch.zeros(3)}, path),
    "a sparse tensor": lambda path: torch.save({"wte.weight": torch.eye(3).to_sparse()}, path),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_that_lies_is_refused_within_the_memory_that_there_is(workshop, tmp_path, forge, what):
    folder = Path(shutil.copytree(workshop.path("sft"), tmp_path / "hostile"))
    ARCHIVES[what](folder / "model.pt")
    job = "nanopost/__main__.py", ["chat", folder, "--prompt", "Hi", "--device", "cpu"], tmp_path
    code, _, err = forge.run(*job, memory=8 * 2**30)
    assert told_in_one_line(code, err, "model.pt"), err


@pytest.mark.parametrize("field", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "scalar_head"])
@pytest.mark.parametrize("value", [10**9, 10**30, -1, 0, 2.5, "2", None, [2], True, 1e400], ids=str)
def test_a_configuration_that_lies_is_refused_before_it_is_allocated(workshop, tmp_path, field, value):
    folder = Path(shutil.copytree(workshop.path("sft"), tmp_path / "hostile"))
    config = json.loads((folder / "config.json").read_text())
    if value == config["model"][field]:
        pytest.skip("it is true")
    config["model"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(folder)) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- links and pipes


@pytest.mark.parametrize("name", ["config.json", "model.pt", "vocab.tiktoken"])
def test_a_pipe_in_a_model_is_not_waited_for(workshop, tmp_path, forge, name):
    folder = Path(shutil.copytree(workshop.path("sft"), tmp_path / "hostile"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    pid = forge.start("nanopost/__main__.py", ["chat", folder, "--prompt", "Hi", "--device", "cpu"], tmp_path)
    timer = threading.Timer(20, os.kill, [pid, 9])
    timer.start()
    code, _, err = forge.wait()
    timer.cancel()
    assert told_in_one_line(code, err, str(folder)), (code, err)


@pytest.mark.parametrize("hard", [False, True])
def test_no_link_leads_a_run_out_of_its_folder(workshop, tmp_path, hard):
    """What a run writes goes into its folder, not into a file that a link there leads to."""
    names = ["model.pt", "vocab.tiktoken", "config.json", "state.pt"]
    (tmp_path / "out").mkdir()
    for name in names:
        for end in ("", ".tmp"):
            mine = tmp_path / f"mine.{name}{end}"
            mine.write_text("mine")
            (os.link if hard else os.symlink)(mine, tmp_path / "out" / f"{name}{end}")
    workshop.run("sft", tmp_path / "out", steps=2, save_every=1)
    assert all(path.read_text() == "mine" for path in tmp_path.glob("mine.*"))
    load_model(str(tmp_path / "out"))


# ------------------------------------------------------------------------------------------------- terminal escapes

ESCAPES = "\x1b[2J\x1b]0;x\x07\x9b31m\r\b\u202e\x00"


def harmless(*texts: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for text in texts for c in text)


@pytest.fixture
def rude(workshop, tmp_path):
    """A model whose every token is an escape, and data full of them."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.wte.weight.zero_()
        model.wte.weight[[0x1B, 0x07, 0x0D]] = model.ln_f.bias
    save_model(str(tmp_path / "rude"), model, tokenizer, {"method": "toy"})
    say = [{"prompt": ESCAPES + str(i), "completion": ESCAPES} for i in range(8)]
    pairs = [{"prompt": r["prompt"], "chosen": ESCAPES, "rejected": ESCAPES + "!"} for r in say]
    return dict(
        model=str(tmp_path / "rude"), sft=write_lines(tmp_path / f"sft{ESCAPES[:4]}", say),
        pairs=write_lines(tmp_path / "pairs", pairs), prompts=write_lines(tmp_path / "prompts", say),
        chats=write_lines(tmp_path / "chats", [{"messages": [user(ESCAPES), assistant(ESCAPES)]}]),
    )  # fmt: skip


def test_nothing_that_is_shown_commands_the_terminal(workshop, rude, tool, command, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("l\nq\n"))
    few = ["--max-new-tokens", 4, "--device", "cpu"]
    model, prompts, vocab = rude["model"], ["--prompts", rude["prompts"]], workshop.path("vocab.tiktoken")
    shown = [
        tool("chat", model, "--prompt", ESCAPES.replace("\x00", ""), *few),
        tool("evaluate", model, "--reference", model, *prompts, *few),
        tool("sample", model, *prompts, "--out", tmp_path / "s.jsonl", *few),
        tool("label", model, *prompts, "--out", tmp_path / "l.jsonl", *few),
        tool("show", rude["sft"], "--vocab", vocab),
        tool("show", rude["chats"], "--vocab", vocab),
        tool("plot", tmp_path / "\x1b[2J"),
        tool("\x1b[2J"),
        command("data/alpaca/prepare.py", "--file", rude["sft"], "--out", tmp_path / "alpaca"),
        command("train_sft.py", "--\x1b[2J"),
        command("train_sft.py", "--steps", "\x1b[2J"),
    ]
    for script in ("sft", "rm", "dpo", "ppo"):
        data = {"sft": rude["sft"], "rm": rude["pairs"], "dpo": rude["pairs"]}.get(script)
        config = workshop.config(script, tmp_path / script, steps=2, init=model, valid="")
        more = ["--data", data, "--valid", data] if data else [*prompts, "--valid", rude["prompts"]]
        shown.append(command(f"train_{script}.py", *command_line(config), *more))
    for code, out, err in shown:
        assert code in (0, 2) and "Traceback" not in err
        assert harmless(out, err), (out, err)
