"""Run, around a script's loop: one step, the log, whom it replaces (and when), and resuming to the last bit."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from conftest import (
    ROOT,
    SCRIPTS,
    Killed,
    assert_same_tensors,
    contents,
    copies,
    die_after,
    one_line,
    rest_slow,
    tensors,
)
from nanopost import run as run_file
from nanopost.checkpoint import load_model, save_model
from nanopost.config import UserError, flag
from nanopost.run import Options, Run, adamw, schedule

# ------------------------------------------------------------------------------------------- optimizer and schedule


def test_the_learning_rate_rises_linearly_then_falls_linearly():
    factors = [schedule(step, total=10, warmup=3) for step in range(1, 11)]
    assert factors == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


def test_without_warmup_the_first_step_has_the_whole_learning_rate():
    assert [schedule(step, total=4) for step in (1, 2, 3, 4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert schedule(1, total=1) == 1


def test_a_warmup_as_long_as_the_run_is_no_error():
    assert [schedule(step, total=3, warmup=3) for step in (1, 2, 3)] == pytest.approx([0.25, 0.5, 0.75])


def test_weight_decay_is_on_matrices_only(tiny):
    model = tiny(70, scalar_head=True)
    decayed, others = adamw(model.parameters(), lr=0.1, weight_decay=0.5).param_groups
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_not_optimised(tiny):
    model = tiny(70)
    model.wpe.requires_grad_(False)
    groups = adamw(model.parameters(), lr=0.1).param_groups
    assert not any(p is model.wpe.weight for group in groups for p in group["params"])


# ------------------------------------------------------------------------------------------------------- Run itself

OPTIONS = dict(device="cpu", compile="off", log_every=2, save_every=3)


@pytest.fixture
def begin(tmp_path, tiny, tokenizer):
    """begin(state, **options): a Run that has started, and how many steps were already made."""

    def begin(state=None, **options):
        run = Run("test", Options(out=str(tmp_path / "out"), **{**OPTIONS, **options}))
        model = tiny(tokenizer.vocab_size)
        return run, run.start({"model": model}, adamw(model.parameters(), 0.1), tokenizer, state)

    return begin


def step(run, gradient: float = 0.01):
    """An optimizer step of any kind."""
    for p in run.modules["model"].parameters():
        run.backward((p * gradient).sum())
    run.optimizer_step(run.optimizer, 0.0)


@pytest.fixture
def run(begin):
    """A run that has made a step."""
    run, _ = begin()
    step(run)
    return run


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "abacus"}, {"dtype": "int8"}, {"log_every": 0}, {"save_every": 0}, {"keep_every": -1},
        {"logs": "paper"}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_option_is_a_user_error(tmp_path, wrong):
    with pytest.raises(UserError, match=flag(next(iter(wrong)))) as error:
        Run("test", Options(**{"out": str(tmp_path / "out"), "device": "cpu", **wrong}))
    one_line(error)
    assert not (tmp_path / "out").exists()


def test_an_optimizer_step_clips_the_norm_of_the_gradient_and_returns_the_norm_before(run):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for clip, expected in ((1.0, [-0.6, -0.8]), (10.0, [-3.0, -4.0]), (0.0, [-3.0, -4.0])):
        with torch.no_grad():
            p.zero_()
        run.backward((p * torch.tensor([3.0, 4.0])).sum())
        assert run.optimizer_step(optimizer, clip).item() == pytest.approx(5.0)
        assert p.tolist() == pytest.approx(expected, abs=1e-4)
        assert p.grad is None


def test_the_learning_rate_is_set_for_every_parameter(run):
    assert run.set_lr(run.optimizer, 0.25) == 0.25
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.25, 0.25]


def test_steps_count_from_the_first_that_is_still_to_make_and_do_nothing_else(run):
    before = contents(run.options.out)
    assert list(run.steps(0, 8)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(run.steps(6, 8)) == [7, 8]
    assert contents(run.options.out) == before == {}


def test_something_is_due_every_so_many_steps_and_after_the_last(run):
    assert [step for step in run.steps(0, 8) if run.due(step, 3)] == [3, 6, 8]


def test_what_is_printed_commands_no_terminal(run, capsys):
    run.print("a\x1b[2Jb\nc\u202e")
    assert capsys.readouterr().out == "a\\x1b[2Jb\nc\\u202e\n"


@pytest.mark.parametrize("total", [0, -4])
def test_no_steps_are_an_error_that_names_the_options(run, total):
    with pytest.raises(UserError, match="--steps, --epochs"):
        run.steps(0, total)


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(run, loss):
    with pytest.raises(UserError, match="loss is .* at step 5: lower --lr, or look for a bad record"):
        run.log(5, {"accuracy": 0.5, "loss": loss})
    with pytest.raises(UserError, match="loss/value is"):
        run.log(5, {"loss/value": loss})
    with pytest.raises(UserError, match="grad_norm is"):
        run.log(5, {"loss": 1.0, "grad_norm": loss})


# ------------------------------------------------------------------------------------------------------- metrics.jsonl


def lines_of(folder) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [json.loads(line, parse_constant=refuse) for line in f]


def test_the_log_is_a_header_and_a_json_line_per_logged_step_with_tensors_as_numbers(run):
    run.log(0, {"eval/loss": 2.0})
    run.log(2, {"loss": torch.tensor(1.25), "lr": 0.5})
    run.log(4, {"loss": 1, "lr": 1.23456789e-9})
    run.save(4)
    header, *lines = lines_of(run.options.out)
    assert header == {"method": "test", "arguments": vars(run.options) | {"dtype": "fp32"}}
    assert all(line.pop("seconds") >= 0 for line in lines)
    assert lines == [
        {"step": 0, "eval/loss": 2.0},
        {"step": 2, "loss": 1.25, "lr": 0.5},
        {"step": 4, "loss": 1.0, "lr": 1.23457e-9},
    ]


def test_the_log_is_written_when_a_step_is_saved_and_not_before(run):
    run.log(0, {"loss": 1.0})
    assert contents(run.options.out) == {}
    for at in (1, 2):
        run.log(at, {"loss": 1.0})
        run.save(at)
        assert [line["step"] for line in lines_of(run.options.out)[1:]] == list(range(at + 1))


def test_a_statistic_that_is_undefined_is_null_in_the_log(run):
    run.log(1, {"val/explained_variance": math.nan, "other": -math.inf})
    run.save(1)
    line = lines_of(run.options.out)[1]
    assert line["val/explained_variance"] is None and line["other"] is None


# --------------------------------------------------------------------------------- a run that is already in the folder

LONG = dict(steps=6, save_every=2)


@pytest.fixture
def interrupted(workshop, tmp_path, monkeypatch):
    """A folder with a run of SFT that died after its checkpoint at step 4."""
    restore_log = die_after(monkeypatch, 5)
    with pytest.raises(Killed):
        workshop.run("sft", tmp_path / "out", **LONG)
    restore_log()
    return tmp_path / "out"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_is_refused_in_one_line_before_anything_is_loaded(script, workshop, tmp_path, command):
    out = workshop.run(script, tmp_path / "out", steps=1)
    before = contents(out)
    code, _, err = command(f"train_{script}.py", "--init", "nowhere", "--device", "cpu", "--out", out)
    message = f"error: {out} holds a finished run; give --overwrite to replace it, or another --out\n"
    assert (code, err) == (2, message)
    assert contents(out) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unfinished_run_is_refused_in_one_line_that_names_resume(script, workshop, interrupted, command):
    before = contents(interrupted)
    code, _, err = command(f"train_{script}.py", "--init", "nowhere", "--device", "cpu", "--out", interrupted)
    message = f"error: {interrupted} holds an unfinished run; give --resume to continue it, or --overwrite\n"
    assert (code, err) == (2, message)
    assert contents(interrupted) == before


def test_a_run_that_died_before_its_first_checkpoint_is_refused_too(workshop, tmp_path, monkeypatch):
    """It has kept copies, perhaps of hours of training."""
    restore_log = die_after(monkeypatch, 3)
    with pytest.raises(Killed):
        workshop.run("sft", tmp_path / "out", keep_every=1)
    restore_log()
    before = contents(tmp_path / "out")
    assert copies(tmp_path / "out") == ["step-1", "step-2"] and "state.pt" not in before
    with pytest.raises(UserError, match="holds an unfinished run"):
        workshop.run("sft", tmp_path / "out", overwrite=False)
    assert contents(tmp_path / "out") == before


def test_a_folder_without_a_run_is_no_obstacle_and_keeps_what_is_in_it(workshop, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    out = workshop.run("sft", tmp_path / "out", steps=1, overwrite=False)
    assert sorted(contents(out)) == ["config.json", "metrics.jsonl", "model.pt", "notes.txt", "vocab.tiktoken"]


@pytest.mark.parametrize("unfinished", [False, True])
def test_overwrite_starts_again_as_in_an_empty_folder(unfinished, workshop, tmp_path, interrupted, metrics):
    out = tmp_path / "out"
    if not unfinished:
        workshop.run("sft", out, overwrite=False, resume=True, **LONG)
    options = {**LONG, "seed": 7, "steps": 3}  # another run than the one before
    workshop.run("sft", out, **options)
    assert_same_run(metrics, workshop.run("sft", tmp_path / "empty", overwrite=False, **options), out)
    assert sorted(contents(out)) == ["config.json", "metrics.jsonl", "model.pt", "vocab.tiktoken"]


def test_a_run_may_not_overwrite_what_it_starts_from(workshop, tmp_path):
    with pytest.raises(UserError, match="--out .*sft would overwrite --init .*sft; give another --out"):
        workshop.run("dpo", workshop.path("sft"), init=workshop.path("sft"))
    kept = workshop.run("dpo", tmp_path / "out", steps=2, keep_every=1) / "step-1"  # --overwrite would remove it
    with pytest.raises(UserError, match="--out .* would overwrite --init") as error:
        workshop.run("dpo", tmp_path / "out", init=str(kept))
    one_line(error)
    load_model(str(kept))
    workshop.run("dpo", tmp_path / "other", init=str(kept), steps=1)
    for name, other in (("reward", ""), ("critic", workshop.path("reward.py:vowels"))):
        options = {"reward": other, name: workshop.path("rm")}
        with pytest.raises(UserError, match=f"--out .*rm would overwrite --{name}"):
            workshop.run("ppo", workshop.path("rm"), **options)


# ------------------------------------------------------------------- an immediate failure leaves the earlier run alone

DATA = {"sft": "data", "rm": "data", "dpo": "data", "ppo": "prompts"}


def bad_record(script, workshop, tmp_path):
    with open(workshop.path({"sft": "sft", "ppo": "prompts"}.get(script, "pairs") + ".jsonl")) as f:
        (tmp_path / "bad.jsonl").write_text(f.read() + "{oops\n")
    return {DATA[script]: str(tmp_path / "bad.jsonl")}


def weights_with_a_nan(script, workshop, tmp_path):
    model, tokenizer = load_model(workshop.path("sft"))
    with torch.no_grad():
        model.wpe.weight[0, 0] = math.nan  # the first position
    save_model(str(tmp_path / "nan"), model, tokenizer, {})
    return {"init": str(tmp_path / "nan"), "valid": ""}


def bad_reward(script, workshop, tmp_path):
    (tmp_path / "bad.py").write_text("def reward(prompts, completions):\n    return [1.0]\n")
    return {"reward": f"{tmp_path / 'bad.py'}:reward", "valid": ""}


FAILURES = {
    "no data": lambda script, *_: {DATA[script]: "nowhere.jsonl"},
    "no held-out data": lambda script, *_: {"valid": "nowhere.jsonl"},
    "no initial model": lambda script, *_: {"init": "nowhere"},
    "no steps": lambda script, *_: {"steps": 0, "epochs": 0},
    "a bad record": bad_record,
    "a NaN in the first loss": weights_with_a_nan,
    "a NaN in a first loss that is not logged": lambda *where: weights_with_a_nan(*where) | {"log_every": 3},
}


@pytest.fixture(params=["finished", "unfinished"])
def earlier(request, workshop, tmp_path, monkeypatch):
    """A folder with a finished run, or an unfinished one, with all that a run can leave."""
    out, options = tmp_path / "out", dict(steps=4, save_every=2, keep_every=1)
    if request.param == "finished":
        workshop.run("sft", out, **options)
    else:
        restore_log = die_after(monkeypatch, 3)
        with pytest.raises(Killed):
            workshop.run("sft", out, **options)
        restore_log()
    (out / "tensorboard").mkdir()
    (out / "tensorboard" / "events").write_text("curves")
    return out


@pytest.mark.parametrize(
    "script, failure", [(s, f) for s in SCRIPTS for f in FAILURES] + [("ppo", "a bad reward")], ids=str
)
def test_a_run_that_fails_at_once_leaves_the_earlier_one_untouched(script, failure, earlier, workshop, tmp_path):
    before = contents(earlier)
    options = {**FAILURES, "a bad reward": bad_reward}[failure](script, workshop, tmp_path)
    with pytest.raises(UserError) as error:
        workshop.run(script, earlier, **options)
    one_line(error)
    assert contents(earlier) == before


def test_an_unfinished_run_can_still_be_resumed_after_another_one_failed_at_once(
    interrupted, workshop, tmp_path, metrics
):
    with pytest.raises(UserError):
        workshop.run("sft", interrupted, **weights_with_a_nan("sft", workshop, tmp_path))
    workshop.run("sft", interrupted, overwrite=False, resume=True, **LONG)
    assert_same_run(metrics, workshop.run("sft", tmp_path / "whole", **LONG), interrupted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_after_the_first_step_the_earlier_run_is_gone(script, earlier, workshop, monkeypatch, metrics):
    weights = (earlier / "model.pt").exists()
    restore_log = die_after(monkeypatch, 2)
    with pytest.raises(Killed):
        workshop.run(script, earlier, valid="")
    restore_log()
    left = ["metrics.jsonl"] + ["model.pt", "vocab.tiktoken"] * weights  # these two are replaced at the end
    assert sorted(contents(earlier)) == left
    assert lines_of(earlier)[0]["method"] == script and [line["step"] for line in metrics(earlier)] == [1]


# ---------------------------------------------------------------------------------------------------------- resuming


def assert_same_run(metrics, one, other):
    """The same files with the same bits, but for the time that it took and what the command line said."""
    assert sorted(contents(one)) == sorted(contents(other))
    for name in ["", *copies(one)]:
        assert_same_tensors(tensors(one / name), tensors(other / name))
    assert metrics(one, "seconds") == metrics(other, "seconds")
    for folder in (one, other):
        header, *lines = lines_of(folder)
        assert header.keys() == {"method", "arguments"} and all("step" in line for line in lines)
        logged = [line["step"] for line in lines if "lr" in line]
        assert logged == list(range(1, len(logged) + 1))  # every step once
        seconds = [line["seconds"] for line in lines]
        assert seconds == sorted(seconds)


# dropout makes the global random numbers matter; an adaptive beta and a critic are state of their own
RESUMABLE = {
    "sft": {},
    "rm": {},
    "dpo": {},
    "ppo": {},
    "ppo with an adaptive beta": dict(kl_target=0.5, kl_horizon=20),
    "ppo with a critic": dict(critic="rm"),
    "ppo with both": dict(critic="rm", kl_target=0.5, kl_horizon=20),
}


@pytest.mark.parametrize("case", RESUMABLE)
def test_a_killed_and_resumed_run_ends_with_the_same_bits_as_an_uninterrupted_one(
    case, workshop, tmp_path, monkeypatch, metrics
):
    script, options = case.split()[0], LONG | RESUMABLE[case] | {"init": "dropout", "keep_every": 3}
    options |= {name: workshop.path(options[name]) for name in ("init", "critic") if name in options}
    whole, killed = workshop.run(script, tmp_path / "whole", **options), tmp_path / "killed"
    restore_log = die_after(monkeypatch, 5)  # after the checkpoint of step 4
    with pytest.raises(Killed):
        workshop.run(script, killed, **options)
    restore_log()
    assert not (killed / "config.json").exists() and (killed / "state.pt").exists()
    with open(killed / "metrics.jsonl", "a") as f:  # lines of a step that will be made again, one cut off
        f.write('{"step": 5, "seconds": 0.1, "loss": 1.0}\n{"step": 5, "lo')
    torch.manual_seed(1234)
    workshop.run(script, killed, overwrite=False, resume=True, **options)
    assert_same_run(metrics, whole, killed)
    assert copies(whole) == ["step-3", "step-6"]


@pytest.mark.parametrize("at", rest_slow([3, 1, 2, 4, 5, 6]))
def test_whenever_it_is_killed_it_ends_the_same(at, workshop, tmp_path, monkeypatch, metrics):
    options = LONG | {"init": workshop.path("dropout"), "keep_every": 1}
    whole = workshop.run("sft", tmp_path / "whole", **options)
    restore_log = die_after(monkeypatch, at)
    with pytest.raises(Killed):
        workshop.run("sft", tmp_path / "killed", **options)
    restore_log()
    workshop.run("sft", tmp_path / "killed", overwrite=False, resume=True, **options)
    assert_same_run(metrics, whole, tmp_path / "killed")


def test_a_run_can_die_while_it_resumes_and_be_resumed_again(workshop, tmp_path, monkeypatch, metrics):
    whole = workshop.run("dpo", tmp_path / "whole", **LONG)
    for step, resume in ((3, False), (3, True), (5, True)):
        restore_log = die_after(monkeypatch, step)
        with pytest.raises(Killed):
            workshop.run("dpo", tmp_path / "killed", overwrite=False, resume=resume, **LONG)
        restore_log()
    workshop.run("dpo", tmp_path / "killed", overwrite=False, resume=True, **LONG)
    assert_same_run(metrics, whole, tmp_path / "killed")


DIE_WHILE_SAVING = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import train_sft
save, calls = torch.save, []
def save_half_of_the_second(state, f):
    calls.append(f)
    if len(calls) == 2:
        f.write(b"half a checkpoint")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, f)
torch.save = save_half_of_the_second
train_sft.main(train_sft.Config(**json.loads(sys.argv[1])))
"""


def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(workshop, tmp_path, metrics):
    options = {**LONG, "init": workshop.path("dropout")}
    whole = workshop.run("sft", tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    config = json.dumps(vars(workshop.config("sft", killed, **options)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIE_WHILE_SAVING, config]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (killed / "state.pt.tmp").read_bytes() == b"half a checkpoint"
    workshop.run("sft", killed, overwrite=False, resume=True, **options)
    assert_same_run(metrics, whole, killed)


def test_start_says_how_many_steps_were_made_and_restores_the_scripts_own_numbers_in_place(begin):
    state = {"beta": 0.1, "others": 3}
    run, made = begin(state)
    assert made == 0
    step(run)
    state["beta"] = 0.7
    list(run.steps(0, 8))
    run.log(3, {"loss": 1.0})
    run.save(3)  # a checkpoint
    state["beta"] = 0.8
    fresh = {"beta": 0.1, "others": 3}
    again, made = begin(fresh, resume=True)
    assert made == 3 and again.state is fresh and fresh == {"beta": 0.7, "others": 3}
    assert_same_tensors(again.modules["model"].state_dict(), run.modules["model"].state_dict())
    again.finish()
    assert begin(resume=True)[1] is None  # it is finished


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.5}, {"seed": 1}, {"batch_size": 4}, {"steps": 7}, {"init": "sft"}, {"data": "sft_valid.jsonl"}],
    ids=str,
)
def test_resuming_with_other_options_is_refused_and_changes_nothing(workshop, interrupted, change):
    before, [name] = contents(interrupted), change
    change = {name: workshop.path(change[name])} if name in ("data", "init") else change
    with pytest.raises(UserError, match=f"--resume: .* was started with {name} = .*, not .*same options") as error:
        workshop.run("sft", interrupted, overwrite=False, resume=True, **{**LONG, **change})
    one_line(error)
    assert contents(interrupted) == before


def test_the_precision_is_the_resolved_one_when_resuming(workshop, interrupted, monkeypatch):
    """auto may stand for another precision on another machine; the gradient scaler's state would not fit."""
    before = contents(interrupted)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(run_file, "best_dtype", lambda device: "bf16")
        with pytest.raises(UserError, match="was started with dtype = fp32, not bf16"):
            workshop.run("sft", interrupted, overwrite=False, resume=True, **LONG)
    assert contents(interrupted) == before
    workshop.run("sft", interrupted, overwrite=False, resume=True, **LONG, dtype="fp32")  # what auto was
    assert (interrupted / "config.json").exists()


def test_resuming_the_run_of_another_script_is_refused(workshop, interrupted):
    before = contents(interrupted)
    with pytest.raises(UserError, match="--resume"):
        workshop.run("dpo", interrupted, overwrite=False, resume=True, **LONG)
    assert contents(interrupted) == before


def test_how_often_it_logs_saves_and_keeps_may_change_when_resuming(workshop, interrupted, tmp_path):
    options = dict(LONG, log_every=3, save_every=1, keep_every=1, compile="auto", overwrite=False, resume=True)
    workshop.run("sft", interrupted, **options)
    assert (interrupted / "config.json").exists()
    assert copies(interrupted) == ["step-5", "step-6"]  # those of the steps that were still to be made
    assert_same_tensors(tensors(interrupted), tensors(workshop.run("sft", tmp_path / "whole", **LONG)))


def test_an_unfinished_folder_is_not_taken_for_a_model(interrupted):
    with pytest.raises(UserError, match="no finished model"):
        load_model(str(interrupted))


@pytest.mark.parametrize("script", SCRIPTS)
def test_resuming_a_finished_run_does_nothing(script, workshop, tmp_path, capsys):
    out = workshop.run(script, tmp_path / "out", steps=1)
    before = contents(out)
    capsys.readouterr()
    workshop.run(script, out, steps=1, overwrite=False, resume=True)
    assert contents(out) == before
    assert "is finished: nothing to resume" in capsys.readouterr().out


def test_resuming_where_there_is_nothing_starts_from_the_beginning_and_says_so(workshop, tmp_path, capsys, metrics):
    out = workshop.run("sft", tmp_path / "out", overwrite=False, resume=True, **LONG)
    assert f"there is nothing to resume in {out}: starting from the beginning" in capsys.readouterr().out
    assert_same_run(metrics, workshop.run("sft", tmp_path / "whole", **LONG), out)
