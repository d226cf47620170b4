"""What is written and read back: files that are whole or absent, folders that fit together or are refused."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import assert_same_tensors, contents, one_line, tensors
from nanopost.checkpoint import freeze, load_model, same_vocabulary, save_model
from nanopost.config import UserError
from nanopost.files import atomic
from nanopost.model import GPT, GPTConfig
from nanopost.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------- atomic()


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(str(path)) as f:
        f.write("half of the new")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"file": b"old"}


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: calls.append("fsync") or fsync(f))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or rename(*paths))
    with atomic(str(tmp_path / "file")) as f:
        f.write("new")
    assert calls == ["fsync", "rename"] and contents(tmp_path) == {"file": b"new"}


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    with atomic(str(path), "wb") as f:
        f.write(b"new")
        f.flush()
        assert not path.exists()
    assert contents(tmp_path) == {"file": b"new"}


# ------------------------------------------------------------------------------------------------ saving and loading


@pytest.mark.parametrize("reward", [False, True])
def test_a_saved_model_and_its_vocabulary_are_loaded_back_the_same(tmp_path, tiny, tokenizer, reward):
    model = tiny(tokenizer.vocab_size, scalar_head=reward, dropout=0.25)
    save_model(str(tmp_path), model, tokenizer, {"method": "test", "arguments": {"lr": 1}})
    again, vocabulary = load_model(str(tmp_path), reward=reward)
    assert again.config == model.config and vocabulary == tokenizer
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert not again.training
    info = json.loads((tmp_path / "config.json").read_text())
    assert info["method"] == "test" and info["arguments"] == {"lr": 1}


@pytest.mark.parametrize("has_head", [False, True])
def test_a_model_is_saved_without_its_head_where_that_is_asked(tmp_path, tiny, tokenizer, has_head):
    model = tiny(tokenizer.vocab_size, scalar_head=has_head)
    save_model(str(tmp_path), model, tokenizer, {}, head=False)
    assert model.config.scalar_head == has_head  # the model in memory stays what it is
    expected = {name: x for name, x in model.state_dict().items() if not name.startswith("head.")}
    assert_same_tensors(load_model(str(tmp_path))[0].state_dict(), expected)


def test_an_untrained_model_can_be_saved_on_its_own_in_a_new_folder(tmp_path, tokenizer):
    save_model(str(tmp_path / "a" / "b"), GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 1, 8)), tokenizer, {})
    assert load_model(str(tmp_path / "a" / "b"))[0].config.n_layer == 1


def test_a_folder_has_a_config_only_when_it_is_whole(tmp_path, tiny, tokenizer, monkeypatch):
    save_model(str(tmp_path), tiny(tokenizer.vocab_size), tokenizer, {})
    before = tensors(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save_model(str(tmp_path), tiny(tokenizer.vocab_size, seed=9), tokenizer, {})
    assert sorted(contents(tmp_path)) == ["model.pt", "vocab.tiktoken"]
    assert_same_tensors(tensors(tmp_path), before)


def edit_config(folder, **model):
    path = folder / "config.json"
    info = json.loads(path.read_text())
    info["model"].update(model)
    path.write_text(json.dumps(info))


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def compress(path):
    """What an archive says about its size can be a lie only if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


BREAKAGES = {
    "no folder": (lambda d: shutil.rmtree(d), "no folder"),
    "no config": (lambda d: (d / "config.json").unlink(), "no finished model"),
    "config is half": (lambda d: (d / "config.json").write_text('{"model": {'), "does not describe a model"),
    "config without model": (lambda d: (d / "config.json").write_text("{}"), "does not describe a model"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "does not describe a model"),
    "config is binary": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "does not describe a model"),
    "unknown key": (lambda d: edit_config(d, n_experts=8), "does not describe a model"),
    "impossible size": (lambda d: edit_config(d, n_head=3), "does not describe a model"),
    "wrong width": (lambda d: edit_config(d, n_embd=32), "does not fit the model"),
    "a size that is no whole number": (lambda d: edit_config(d, n_layer=2.0), "n_layer must be of type int"),
    "a size that is text": (lambda d: edit_config(d, n_head="2"), "does not describe a model"),
    "a layer for every person": (lambda d: edit_config(d, n_layer=10**10), "n_layer must be at most 1,000"),
    "a width of exabytes": (lambda d: edit_config(d, n_embd=2**40, n_head=1), "does not fit the model"),
    "a context beyond 64 bits": (lambda d: edit_config(d, block_size=2**80), "does not fit the model"),
    "config of brackets": (lambda d: (d / "config.json").write_text("[" * 10**5), "does not describe a model"),
    "config is a pipe": (lambda d: replace_by_pipe(d / "config.json"), "no finished model"),
    "weights are a pipe": (lambda d: replace_by_pipe(d / "model.pt"), "cannot be read"),
    "compressed weights": (lambda d: compress(d / "model.pt"), "cannot be read"),
    "wrong depth": (lambda d: edit_config(d, n_layer=1), "does not fit the model"),
    "wrong vocabulary size": (lambda d: edit_config(d, vocab_size=99), "vocabulary has 268 tokens, the model 99"),
    "no vocabulary": (lambda d: (d / "vocab.tiktoken").unlink(), "no vocabulary"),
    "broken vocabulary": (lambda d: (d / "vocab.tiktoken").write_text("x"), "vocab.tiktoken:1"),
    "no weights": (lambda d: (d / "model.pt").unlink(), "cannot be read"),
    "empty weights": (lambda d: (d / "model.pt").write_bytes(b""), "cannot be read"),
    "half the weights": (lambda d: os.truncate(d / "model.pt", 5000), "cannot be read"),
    "text as weights": (lambda d: (d / "model.pt").write_text("hello\nworld"), "cannot be read"),
    "no tensors": (lambda d: torch.save({"wte.weight": 1}, d / "model.pt"), "does not fit"),
    "a list as weights": (lambda d: torch.save([torch.ones(1)], d / "model.pt"), "does not fit"),
}


@pytest.fixture
def folder(workshop, tmp_path) -> Path:
    """A copy of a finished run, to damage."""
    return Path(shutil.copytree(workshop.path("sft"), tmp_path / "copy"))


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_folder_is_a_user_error_that_names_it(folder, breakage):
    load_model(str(folder))
    damage, message = BREAKAGES[breakage]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(folder))
    assert str(folder) in one_line(error)


def test_a_reward_model_is_no_language_model_nor_the_other_way_round(workshop):
    with pytest.raises(UserError, match="holds a reward model; here a language model is needed"):
        load_model(workshop.path("rm"))
    with pytest.raises(UserError, match="holds a language model; here a reward model is needed"):
        load_model(workshop.path("sft"), reward=True)
    assert [load_model(workshop.path(n), reward=None)[0].config.scalar_head for n in ("sft", "rm")] == [False, True]


class Code:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_code_in_a_checkpoint_is_never_run(workshop, folder, tmp_path, how):
    trace = tmp_path / "trace"
    with open(folder / "model.pt", "wb") as f:
        (pickle.dump if how == "pickle" else torch.save)({"wte.weight": Code(trace)}, f)
    with pytest.raises(UserError, match="cannot be read") as error:
        load_model(str(folder))
    one_line(error)
    shutil.copy(folder / "model.pt", folder / "state.pt")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be read") as error:
        workshop.run("sft", folder, resume=True)
    one_line(error)
    assert not trace.exists()


def test_vocabularies_of_the_same_size_can_be_different(tokenizer):
    same_vocabulary(tokenizer, Tokenizer(dict(tokenizer.ranks)), "a", "b")
    swapped = {**tokenizer.ranks, b"a": tokenizer.ranks[b"b"], b"b": tokenizer.ranks[b"a"]}
    with pytest.raises(UserError, match="a and b have different vocabularies"):
        same_vocabulary(tokenizer, Tokenizer(swapped), "a", "b")


def test_a_frozen_model_has_no_gradients_and_no_dropout(tiny):
    model = freeze(tiny(70, dropout=0.5))
    ids = torch.randint(70, (1, 5))
    assert not model(ids).requires_grad and torch.equal(model(ids), model(ids))
