"""What a run leaves beside its model: the copies kept on the way, and the curves of tensorboard."""

import importlib.util
import json
import math

import pytest
import torch

from conftest import SCRIPTS, Killed, assert_same_tensors, contents, copies, die_after, tensors
from nanopost.checkpoint import Folder, load_model
from nanopost.config import UserError
from nanopost.metrics import Metrics
from nanopost.run import Run

UNCHANGED = {"rm": {"normalise": 0}}  # the model that is saved is that of the last step
LONG = dict(steps=6, save_every=2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kept_copy_is_a_whole_folder_with_the_model_as_it_was_at_its_step(script, workshop, tmp_path, monkeypatch):
    then, log = {}, Run.log

    def snapshot(self, at, values):
        log(self, at, values)
        then[at] = {name: x.clone() for name, x in self.modules["model"].state_dict().items()}

    monkeypatch.setattr(Run, "log", snapshot)
    out = workshop.run(script, tmp_path / "out", steps=5, keep_every=2, **UNCHANGED.get(script, {}))
    assert copies(out) == ["step-2", "step-4"]
    for step in (2, 4):
        folder = out / f"step-{step}"
        model, tokenizer = load_model(str(folder), reward=script == "rm")
        expected = then[step] if script == "rm" else {n: x for n, x in then[step].items() if not n.startswith("head.")}
        assert_same_tensors(model.state_dict(), expected)
        assert any(not torch.equal(x, then[5][name]) for name, x in expected.items())
        assert sorted(contents(folder)) == ["config.json", "model.pt", "vocab.tiktoken"]
        assert json.loads((folder / "config.json").read_text())["method"] == script
        assert tokenizer == load_model(str(out), reward=script == "rm")[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_copy_of_the_last_step_is_the_final_model(script, workshop, tmp_path):
    out = workshop.run(script, tmp_path / "out", steps=4, keep_every=2, **UNCHANGED.get(script, {}))
    assert copies(out) == ["step-2", "step-4"]
    assert contents(out / "step-4").keys() <= contents(out).keys()
    assert_same_tensors(tensors(out / "step-4"), tensors(out))


def test_a_copy_of_a_reward_model_ranks_as_the_final_one_which_alone_is_normalised(workshop, tmp_path):
    out = workshop.run("rm", tmp_path / "out", steps=2, keep_every=2)
    ids, lengths = torch.randint(0, 256, (6, 20)), torch.full((6,), 20)
    raw, final = (load_model(str(f), reward=True)[0].score(ids, lengths).detach() for f in (out / "step-2", out))
    assert raw.argsort().tolist() == final.argsort().tolist() and not torch.allclose(raw, final, atol=1e-3)
    assert torch.allclose((raw - raw.mean()) / raw.std(), (final - final.mean()) / final.std(), atol=1e-4)


def test_what_ppo_makes_has_no_value_head(workshop, tmp_path):
    out = workshop.run("ppo", tmp_path / "out", steps=1, keep_every=1)
    for folder in (out, out / "step-1"):
        assert not any(name.startswith("head.") for name in tensors(folder))
        assert json.loads((folder / "config.json").read_text())["model"]["scalar_head"] is False


def test_without_keep_every_there_are_no_copies(workshop, tmp_path):
    assert copies(workshop.run("sft", tmp_path / "out")) == []


def test_with_overwrite_copies_and_curves_go_after_the_first_step_and_not_before(workshop, tmp_path, monkeypatch):
    out = workshop.run("ppo", tmp_path / "out [1]", steps=2, keep_every=1)  # brackets mean something to glob
    for name in ("tensorboard", "step-by-step", "notes"):
        (out / name).mkdir()
        (out / name / "file").write_text(name)
    before = contents(out)
    (tmp_path / "bad.py").write_text("def reward(prompts, completions):\n    return [1.0]\n")
    with pytest.raises(UserError, match="one finite number"):
        workshop.run("ppo", out, steps=2, reward=f"{tmp_path / 'bad.py'}:reward")
    assert contents(out) == before
    restore_log = die_after(monkeypatch, 2)
    with pytest.raises(Killed):
        workshop.run("ppo", out, steps=2)
    restore_log()
    assert sorted(contents(out)) == ["metrics.jsonl", "model.pt", "notes/file", "step-by-step/file", "vocab.tiktoken"]


@pytest.mark.parametrize("died", ["after a step", "before the checkpoint", "after the checkpoint"])
def test_resuming_ends_with_the_same_copies_as_an_uninterrupted_run(workshop, tmp_path, monkeypatch, died):
    options = LONG | {"keep_every": 1}
    whole, killed = workshop.run("sft", tmp_path / "whole", **options), tmp_path / "killed"
    with monkeypatch.context() as patch:
        if died == "after a step":
            die_after(patch, 4)
        else:
            checkpoint = Folder.checkpoint

            def die_at_the_second(self, state):
                if died == "after the checkpoint" or state["step"] < 4:
                    checkpoint(self, state)
                if state["step"] == 4:
                    raise Killed

            patch.setattr(Folder, "checkpoint", die_at_the_second)
        with pytest.raises(Killed):
            workshop.run("sft", killed, **options)
    assert not (killed / "step-5").exists()
    workshop.run("sft", killed, overwrite=False, resume=True, **options)
    assert copies(killed) == copies(whole) == [f"step-{n}" for n in range(1, 7)]
    for name in copies(whole):
        assert_same_tensors(tensors(killed / name), tensors(whole / name))


# ------------------------------------------------------------------------------------------------------- tensorboard


@pytest.fixture
def curves():
    """curves(folder): {metric: [(step, value)]} of the event files in its folder tensorboard."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module, reason="needs tensorboard: pip install tensorboard")

    def curves(folder):
        events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    return curves


def assert_same_curves(curves: dict, lines: list[dict]):
    expected = {}
    for line in lines:
        for name in line.keys() - {"step", "seconds"}:
            if line[name] is not None:
                expected.setdefault(name, []).append((line["step"], pytest.approx(line[name], rel=1e-6)))
    assert curves == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_shows_what_metrics_jsonl_holds(script, workshop, tmp_path, metrics, curves):
    out = workshop.run(script, tmp_path / "out", logs="tensorboard")
    assert_same_curves(curves(out), metrics(out))
    assert any(name.startswith("eval/") for name in curves(out))
    workshop.run(script, out, steps=2, logs="tensorboard")  # and nothing of the run before
    assert_same_curves(curves(out), metrics(out))


def test_a_statistic_that_is_undefined_is_no_point_of_a_curve(tmp_path, metrics, curves):
    log = Metrics(str(tmp_path), {"method": "test"}, tensorboard=True)
    log.add(1, 0.0, {"loss": 1.0, "val/explained_variance": math.nan})
    log.add(2, 0.0, {"loss": 0.5, "val/explained_variance": 0.25})
    log.flush()
    assert metrics(tmp_path)[0]["val/explained_variance"] is None
    assert curves(tmp_path) == {"loss": [(1, 1.0), (2, 0.5)], "val/explained_variance": [(2, 0.25)]}


@pytest.mark.parametrize("before", ["tensorboard", ""])
def test_after_resuming_tensorboard_shows_every_step_once(workshop, tmp_path, monkeypatch, metrics, curves, before):
    restore_log = die_after(monkeypatch, 5)  # after the checkpoint of step 4
    with pytest.raises(Killed):
        workshop.run("sft", tmp_path / "out", logs=before, **LONG)
    restore_log()
    out = workshop.run("sft", tmp_path / "out", logs="tensorboard", overwrite=False, resume=True, **LONG)
    assert_same_curves(curves(out), metrics(out))
    assert [step for step, _ in curves(out)["loss"]] == [1, 2, 3, 4, 5, 6]


def test_without_the_package_it_says_what_to_install(command, workshop, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    options = ["--init", workshop.path("sft"), "--out", tmp_path / "out", "--logs", "tensorboard", "--device", "cpu"]
    code, out, err = command("train_sft.py", *options)
    assert (code, out) == (2, "")
    assert err == 'error: --logs tensorboard needs a package: pip install tensorboard (or "nanopost[logs]")\n'
    assert not (tmp_path / "out").exists()
