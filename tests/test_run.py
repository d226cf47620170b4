"""Runs: files that are whole or absent, folders that fit together or are refused, and resuming to the last bit."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanopost.checkpoint import atomic, freeze, load_model, same_vocabulary, save_model
from nanopost.config import UserError
from nanopost.model import GPT, GPTConfig
from nanopost.reward import call_reward, load_function
from nanopost.run import Options, Run, adamw, schedule
from nanopost.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sft", "rm", "dpo", "ppo"]


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def contents(folder) -> dict:
    """{path in the folder: what is in the file}"""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def tensors(folder) -> dict:
    return torch.load(Path(folder) / "model.pt", weights_only=True)


def assert_same_tensors(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


def copies(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("step-*"))


# ------------------------------------------------------------------------------------------------------ atomic()


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        with atomic(str(path)) as f:
            f.write("half of the new")
            1 / 0
    assert path.read_text() == "old"


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
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    info = json.loads((tmp_path / "config.json").read_text())
    assert info["method"] == "test" and info["arguments"] == {"lr": 1}


def test_a_folder_has_a_config_only_when_it_is_whole(tmp_path, tiny, tokenizer, monkeypatch):
    save_model(str(tmp_path), tiny(tokenizer.vocab_size), tokenizer, {})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save_model(str(tmp_path), tiny(tokenizer.vocab_size, seed=9), tokenizer, {})
    assert not (tmp_path / "config.json").exists()


def edit_config(folder, **model):
    path = folder / "config.json"
    info = json.loads(path.read_text())
    info["model"].update(model)
    path.write_text(json.dumps(info))


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


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_folder_is_a_user_error_that_names_it(workshop, tmp_path, breakage):
    folder = Path(shutil.copytree(workshop.path("sft"), tmp_path / "broken"))
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


class Code:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_code_in_a_checkpoint_is_never_run(workshop, tmp_path, how):
    folder, trace = Path(shutil.copytree(workshop.path("sft"), tmp_path / "evil")), tmp_path / "trace"
    with open(folder / "model.pt", "wb") as f:
        (pickle.dump if how == "pickle" else torch.save)({"wte.weight": Code(trace)}, f)
    with pytest.raises(UserError, match="cannot be read") as error:
        load_model(str(folder))
    one_line(error)
    shutil.copy(folder / "model.pt", folder / "state.pt")
    with pytest.raises(UserError, match="cannot be read") as error:
        workshop.run("sft", folder, resume=True)
    one_line(error)
    assert not trace.exists()


def test_different_vocabularies_are_told_apart_even_when_they_are_of_one_size(tokenizer):
    same_vocabulary(tokenizer, Tokenizer(dict(tokenizer.ranks)), "a", "b")
    swapped = {**tokenizer.ranks, b"a": tokenizer.ranks[b"b"], b"b": tokenizer.ranks[b"a"]}
    with pytest.raises(UserError, match="a and b have different vocabularies"):
        same_vocabulary(tokenizer, Tokenizer(swapped), "a", "b")


# ---------------------------------------------------------------------------------------------- reward functions

FUNCTIONS = """
from neighbour import CONSTANT

def constant(prompts, completions):
    return [CONSTANT for _ in completions]

number = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour.py").write_text("CONSTANT = 7")
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    yield str(tmp_path / "functions.py")
    sys.modules.pop("neighbour", None)


def test_a_function_is_loaded_from_its_file_which_may_import_its_neighbours(functions):
    assert load_function(f"{functions}:constant")([], ["a", "b"]) == [7, 7]


@pytest.mark.parametrize("spec, message", [
    ("{}:nothing", "has no function nothing"), ("{}:number", "has no function number"), ("{}:", "has no function"),
    ("nowhere.py:f", "no file nowhere.py"), ("{}", "file.py:function"), ("README:f", "no file README"),
    (":f", "no file")])
def test_a_function_that_is_not_there_is_a_user_error(functions, spec, message):
    with pytest.raises(UserError, match=message) as error:
        load_function(spec.format(functions))
    one_line(error)


def test_rewards_are_floats_in_order():
    rewards = call_reward(lambda prompts, texts: [len(t) for t in texts], ["p", "q"], ["abc", ""])
    assert rewards == [3.0, 0.0] and all(type(r) is float for r in rewards)
    assert call_reward(lambda prompts, texts: torch.tensor([1.0, 2.0]), ["p", "q"], ["a", "b"]) == [1.0, 2.0]


@pytest.mark.parametrize("result", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [math.inf, 1.0], ["a", "b"], None,
                                    [1.0, None], 5.0])
def test_anything_but_one_finite_number_for_each_completion_is_a_user_error(result):
    def broken(prompts, completions):
        return result

    with pytest.raises(UserError, match="reward function broken: ") as error:
        call_reward(broken, ["p", "q"], ["a", "b"])
    one_line(error)


# ---------------------------------------------------------------------------------- optimizer, schedule, freezing


def test_the_learning_rate_rises_linearly_then_falls_linearly():
    factors = [schedule(step, total=10, warmup=3) for step in range(10)]
    assert factors == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


def test_without_warmup_the_first_step_has_the_whole_learning_rate():
    assert [schedule(step, total=4) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert schedule(0, total=1) == 1


def test_a_warmup_as_long_as_the_run_is_no_error():
    assert [schedule(step, total=3, warmup=3) for step in range(3)] == pytest.approx([0.25, 0.5, 0.75])


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


def test_a_frozen_model_has_no_gradients_and_no_dropout(tiny):
    model = freeze(tiny(70, dropout=0.5))
    ids = torch.randint(70, (1, 5))
    assert not model(ids).requires_grad and torch.equal(model(ids), model(ids))


# ------------------------------------------------------------------------------------------------------- Run itself


@pytest.fixture
def run(tmp_path, tiny, tokenizer):
    """A run that has begun, of a model with one parameter tensor that matters."""
    run = Run("test", Options(out=str(tmp_path / "out"), device="cpu", compile=False, log_every=2, save_every=3))
    model = tiny(tokenizer.vocab_size)
    run.begin({"model": model}, adamw(model.parameters(), 0.1), tokenizer, 8)
    run.replace()
    return run


@pytest.mark.parametrize("wrong", [{"device": "abacus"}, {"dtype": "int8"}, {"log_every": 0}, {"save_every": 0},
                                   {"keep_every": -1}, {"logs": "paper"}])
def test_an_impossible_option_is_a_user_error(tmp_path, wrong):
    with pytest.raises(UserError) as error:
        Run("test", Options(**{"out": str(tmp_path / "out"), "device": "cpu", **wrong}))
    one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(run, loss):
    with pytest.raises(UserError, match="loss is .* at step 5"):
        run.log(5, {"accuracy": 0.5, "loss": loss})
    with pytest.raises(UserError, match="loss/value is"):
        run.log(5, {"loss/value": loss})


def test_the_log_is_a_json_line_a_step_with_tensors_as_numbers(run, metrics):
    run.log(2, {"loss": torch.tensor(1.25), "lr": 0.5})
    run.log(4, {"loss": 1, "lr": 1e-9})
    assert metrics(run.options.out, "seconds") == [{"step": 2, "loss": 1.25, "lr": 0.5},
                                                   {"step": 4, "loss": 1.0, "lr": pytest.approx(1e-9, rel=1e-3)}]


def test_a_line_of_the_log_is_json_for_everyone_even_where_a_statistic_is_undefined(run):
    run.log(1, {"val/explained_variance": math.nan})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with open(run.path("metrics.jsonl")) as f:
        json.loads(f.read(), parse_constant=refuse)


def test_something_is_due_every_so_many_steps_and_after_the_last(run):
    due = [step + 1 for step in run.steps() if run.due(step, 3)]
    assert due == [3, 6, 8]


def test_an_update_clips_the_norm_of_the_gradient_and_returns_the_norm_before(run):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for clip, expected in ((1.0, [-0.6, -0.8]), (10.0, [-3.0, -4.0]), (0.0, [-3.0, -4.0])):
        with torch.no_grad():
            p.zero_()
        run.backward((p * torch.tensor([3.0, 4.0])).sum())
        assert run.update(optimizer, clip).item() == pytest.approx(5.0)
        assert p.tolist() == pytest.approx(expected, abs=1e-4)
        assert p.grad is None


def test_no_steps_are_an_error_that_names_the_options(run, tokenizer):
    with pytest.raises(UserError, match="--steps"):
        run.begin(run.modules, run.optimizer, tokenizer, 0)


def test_a_mistake_that_shows_in_the_first_step_leaves_an_earlier_run_whole(workshop, tmp_path):
    workshop.run("ppo", tmp_path / "out", steps=2)
    earlier = contents(tmp_path / "out")
    (tmp_path / "bad.py").write_text("def reward(prompts, completions):\n    return [1.0]\n")
    with pytest.raises(UserError, match="one finite number"):
        workshop.run("ppo", tmp_path / "out", steps=2, reward=f"{tmp_path / 'bad.py'}:reward")
    assert contents(tmp_path / "out") == earlier


def test_a_run_may_not_overwrite_what_it_starts_from(workshop, tmp_path):
    with pytest.raises(UserError, match="--out and --init"):
        workshop.run("dpo", workshop.path("sft"), init=workshop.path("sft"))
    kept = workshop.run("dpo", tmp_path / "out", steps=2, keep_every=1) / "step-1"  # a fresh run removes it
    with pytest.raises(UserError, match="--out and --init") as error:
        workshop.run("dpo", tmp_path / "out", init=str(kept))
    one_line(error)
    load_model(str(kept))
    workshop.run("dpo", tmp_path / "other", init=str(kept), steps=1)


def test_a_fresh_run_forgets_what_an_earlier_one_left(workshop, tmp_path, metrics):
    workshop.run("sft", tmp_path / "out", steps=3)
    workshop.run("sft", tmp_path / "out", steps=2)
    assert max(line["step"] for line in metrics(tmp_path / "out")) == 2
    assert sorted(contents(tmp_path / "out")) == ["config.json", "metrics.jsonl", "model.pt", "vocab.tiktoken"]


# ------------------------------------------------------------------------------------------------------- resuming


class Killed(BaseException):
    """The power goes off."""


def die_after(monkeypatch, step):
    """The next run dies right after it has logged this step."""
    log = Run.log

    def log_and_die(self, at, values):
        log(self, at, values)
        if at == step:
            raise Killed

    monkeypatch.setattr(Run, "log", log_and_die)
    return lambda: monkeypatch.setattr(Run, "log", log)


def assert_same_run(metrics, one, other):
    assert sorted(contents(one)) == sorted(contents(other))
    assert_same_tensors(tensors(one), tensors(other))
    assert metrics(one, "seconds") == metrics(other, "seconds")


LONG = dict(steps=6, save_every=2)
# dropout makes the global random numbers matter; an adaptive beta and a critic are state of their own
RESUMABLE = {"sft": {}, "rm": {}, "dpo": {}, "ppo": dict(kl_target=0.5, kl_horizon=20), "ppo with critic": {}}


@pytest.mark.parametrize("case", RESUMABLE)
def test_a_killed_and_resumed_run_ends_with_the_same_bits_as_an_uninterrupted_one(
        case, workshop, tmp_path, monkeypatch, metrics):
    script, options = case.split()[0], {**LONG, **RESUMABLE[case]}
    options |= {"init": workshop.path("dropout")} | ({"critic": workshop.path("rm")} if "critic" in case else {})
    whole = workshop.run(script, tmp_path / "whole", **options)
    restore_log = die_after(monkeypatch, 5)  # after the checkpoint of step 4
    with pytest.raises(Killed):
        workshop.run(script, tmp_path / "killed", **options)
    restore_log()
    assert not (tmp_path / "killed" / "config.json").exists() and metrics(tmp_path / "killed")[-1]["step"] == 5
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # cut off in the middle of a line
    torch.manual_seed(1234)
    workshop.run(script, tmp_path / "killed", resume=True, **options)
    assert_same_run(metrics, whole, tmp_path / "killed")


def test_a_run_can_die_while_it_resumes_and_be_resumed_again(workshop, tmp_path, monkeypatch, metrics):
    whole = workshop.run("dpo", tmp_path / "whole", **LONG)
    for step, resume in ((3, False), (3, True), (5, True)):
        restore_log = die_after(monkeypatch, step)
        with pytest.raises(Killed):
            workshop.run("dpo", tmp_path / "killed", resume=resume, **LONG)
        restore_log()
    workshop.run("dpo", tmp_path / "killed", resume=True, **LONG)
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
    arguments = json.dumps(vars(workshop.config("sft", killed, **options)))
    process = subprocess.run([sys.executable, "-c", DIE_WHILE_SAVING, arguments], cwd=ROOT, capture_output=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (killed / "state.pt.tmp").read_bytes() == b"half a checkpoint"
    workshop.run("sft", killed, resume=True, **options)
    assert_same_run(metrics, whole, killed)


@pytest.fixture
def interrupted(workshop, tmp_path, monkeypatch):
    """A folder with a run of SFT that died after its checkpoint at step 4."""
    restore_log = die_after(monkeypatch, 5)
    with pytest.raises(Killed):
        workshop.run("sft", tmp_path / "out", **LONG)
    restore_log()
    return tmp_path / "out"


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"seed": 1}, {"batch_size": 4}, {"steps": 7}, {"data": "pairs"}])
def test_resuming_with_other_options_is_refused_and_changes_nothing(workshop, interrupted, change):
    before = contents(interrupted)
    if "data" in change:
        change = {"data": workshop.path("sft_valid.jsonl")}
    with pytest.raises(UserError, match=f"--resume: .*{next(iter(change))} = ") as error:
        workshop.run("sft", interrupted, resume=True, **{**LONG, **change})
    one_line(error)
    assert contents(interrupted) == before


def test_resuming_the_run_of_another_script_is_refused(workshop, interrupted):
    with pytest.raises(UserError, match="--resume"):
        workshop.run("dpo", interrupted, resume=True, **LONG)


def test_how_often_it_logs_and_keeps_may_change_when_resuming(workshop, interrupted):
    workshop.run("sft", interrupted, resume=True, log_every=3, keep_every=1, **LONG)
    assert (interrupted / "config.json").exists()
    assert copies(interrupted) == ["step-5", "step-6"]  # those of the steps that were still to be made


def test_an_unfinished_folder_is_not_taken_for_a_model(interrupted):
    with pytest.raises(UserError, match="no finished model"):
        load_model(str(interrupted))


def test_without_resume_an_interrupted_run_starts_anew(workshop, interrupted, tmp_path, metrics):
    options = {**LONG, "seed": 7}  # another run than the interrupted one
    workshop.run("sft", interrupted, **options)
    assert_same_run(metrics, workshop.run("sft", tmp_path / "whole", **options), interrupted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resuming_a_finished_run_does_nothing(script, workshop, tmp_path, capsys):
    out = workshop.run(script, tmp_path / "out", steps=1)
    before = contents(out)
    capsys.readouterr()
    workshop.run(script, out, steps=1, resume=True)
    assert contents(out) == before
    assert "is finished: nothing to resume" in capsys.readouterr().out


DATA = {"sft": "data", "rm": "data", "dpo": "data", "ppo": "prompts"}
FAILING = {"no data": lambda script: {DATA[script]: "nowhere.jsonl"},
           "no held-out data": lambda script: {"valid": "nowhere.jsonl"},
           "no initial model": lambda script: {"init": "nowhere"},
           "no steps": lambda script: {"steps": 0, "epochs": 0}}


@pytest.mark.parametrize("failure", FAILING)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failing_start_leaves_an_earlier_run_untouched(script, failure, workshop, tmp_path):
    out = shutil.copytree(workshop.path("sft"), tmp_path / "out")
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(out)
    with pytest.raises(UserError) as error:
        workshop.run(script, out, **FAILING[failure](script))
    one_line(error)
    assert contents(out) == before


def test_an_untrained_model_can_be_saved_on_its_own(tmp_path, tokenizer):
    save_model(str(tmp_path / "a" / "b"), GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 1, 8)), tokenizer, {})
    assert load_model(str(tmp_path / "a" / "b"))[0].config.n_layer == 1
