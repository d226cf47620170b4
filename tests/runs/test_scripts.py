"""The four scripts, whole: short runs on toy data, what they write and log, and the wiring of each main()."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import nanopost.reward
import train_dpo
import train_ppo
import train_rm
import train_sft
from conftest import ROOT, SCRIPTS, rest_slow, tensors
from enumerable import gae_by_double_sum
from nanopost.checkpoint import load_model, save_model
from nanopost.config import UserError, flag
from nanopost.data import Batch, Example, load_examples, load_pairs
from nanopost.model import GPT, GPTConfig
from nanopost.reward import score_examples
from nanopost.run import AdamW, Run, adamw
from nanopost.sampling import sample_text
from train_ppo import Models, policy_loss, value_loss

# ----------------------------------------------------------------------------------------- whole runs of every script

NAMES = {  # {script: (metrics of a training step, metrics of an evaluation)}
    "sft": ({"loss", "grad_norm", "lr"}, {"eval/loss"}),
    "rm": (
        {"loss", "accuracy", "margin", "grad_norm", "lr"},
        {"eval/loss", "eval/accuracy", "eval/margin"},
    ),
    "dpo": (
        {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
         "logps/rejected", "grad_norm", "lr"},
        {"eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"},
    ),
    "ppo": (
        {"objective/scores", "objective/kl", "objective/entropy", "objective/non_score_reward",
         "objective/rlhf_reward", "loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "val/clipfrac",
         "val/ratio", "grad_norm", "beta", "lr"},
        {"eval/scores", "eval/kl"},
    ),
}  # fmt: skip


def training(lines: list[dict]) -> list[dict]:
    """The lines of training steps; the others are evaluations."""
    return [line for line in lines if "lr" in line]


def evaluations(lines: list[dict]) -> list[dict]:
    return [line for line in lines if any(name.startswith("eval/") for name in line)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_writes_a_loadable_folder_and_the_standard_metrics(script, workshop, tmp_path, metrics, tokenizer):
    out = workshop.run(script, tmp_path / "deep" / "out")
    assert sorted(os.listdir(out)) == ["config.json", "metrics.jsonl", "model.pt", "vocab.tiktoken"]
    model, vocabulary = load_model(str(out), reward=script == "rm")
    assert vocabulary == tokenizer and all(p.isfinite().all() for p in model.parameters())
    info = json.loads((out / "config.json").read_text())
    assert info["method"] == script and info["arguments"]["batch_size"] == 8
    lines = metrics(out)
    assert [line["step"] for line in training(lines)] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluations(lines)] == [0, 2, 4]
    trained, evaluated = NAMES[script]
    for line in lines:
        assert (trained if "lr" in line else evaluated) <= line.keys()
        assert all(isinstance(value, (int, float)) for value in line.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_log_begins_with_the_method_and_its_arguments(script, workshop, tmp_path):
    out = workshop.run(script, tmp_path / "out", steps=1)
    first, *others = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    config = dataclasses.asdict(workshop.config(script, out, steps=1)) | {"dtype": "fp32"}  # the one that auto found
    assert first == {"method": script, "arguments": config}
    assert others and all("step" in line for line in others)
    info = json.loads((out / "config.json").read_text())
    assert {name: info[name] for name in first} == first


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_the_same_for_the_same_seed_and_another_for_another(script, workshop, tmp_path, metrics):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs.append(metrics(workshop.run(script, tmp_path / name, steps=2, seed=seed), "seconds"))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_learning_rate_0_leaves_the_weights_unchanged(script, workshop, tmp_path):
    out = workshop.run(script, tmp_path / "out", init=workshop.path("sft"), lr=0.0)
    before, after = tensors(workshop.path("sft")), tensors(out)
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_the_folder_it_starts_from_untouched(script, workshop, tmp_path):
    def read():
        return {name: (workshop.folder / "sft" / name).read_bytes() for name in ("model.pt", "config.json")}

    before = read()
    workshop.run(script, tmp_path / "out", init=workshop.path("sft"), steps=1)
    assert read() == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(script, workshop, tmp_path, monkeypatch, in_float64):
    def gradient(micro_batch):
        seen = []

        def step(self, optimizer, grad_clip):
            seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
            optimizer.zero_grad()
            return torch.tensor(0.0)

        monkeypatch.setattr(Run, "optimizer_step", step)
        workshop.run(script, tmp_path / str(micro_batch), steps=1, micro_batch=micro_batch, valid="")
        return seen[0]

    whole = gradient(0)
    assert max(g.abs().max().item() for g in whole) > 1e-3 and whole[0].dtype == torch.float64
    for micro_batch in (3, 1):  # 3: parts of unequal size
        for a, b in zip(whole, gradient(micro_batch), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batches_log_the_same_statistics(script, workshop, tmp_path, metrics, in_float64):
    lines = []
    for micro_batch in (0, 3):
        out = workshop.run(script, tmp_path / str(micro_batch), steps=2, micro_batch=micro_batch, valid="")
        lines.append(metrics(out, "seconds")[-1])
    assert lines[0] == pytest.approx(lines[1], rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_evaluation_does_not_change_what_comes_next(script, workshop, tmp_path, metrics):
    options = {"init": workshop.path("dropout"), "steps": 3}  # with dropout, every use of random numbers would show
    often = workshop.run(script, tmp_path / "often", eval_every=1, **options)
    never = workshop.run(script, tmp_path / "never", valid="", **options)
    assert training(metrics(often, "seconds")) == training(metrics(never, "seconds"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_held_out_data_can_be_left_out(script, workshop, tmp_path, metrics):
    lines = metrics(workshop.run(script, tmp_path / "out", valid="", steps=1))
    assert len(lines) == 1 and not evaluations(lines)


@pytest.mark.parametrize("every", [{"keep_every": 3}, {"save_every": 3}])
@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_that_are_not_finite_are_never_kept(script, every, workshop, tmp_path):
    """A learning rate far too high, and a log that looks only at the end: the copies and checkpoints look before."""
    out = tmp_path / "out"
    with pytest.raises(UserError, match="grad_norm is (nan|inf) at step .*: lower --lr"):
        workshop.run(script, out, lr=1e30, grad_clip=0.0, steps=8, log_every=8, valid="", **every)
    for path in out.glob("*/model.pt"):
        assert all(w.isfinite().all() for w in torch.load(path, weights_only=True).values())
    assert not any((out / name).exists() for name in ("model.pt", "config.json", "state.pt"))


# ------------------------------------------------------------------------------------------------ impossible options

WRONG = [{"batch_size": 0}, {"micro_batch": -1}, {"lr": -1.0}, {"lr": math.nan}, {"eval_every": 0},
         {"max_new_tokens": 0}, {"seed": -1}, {"log_every": 0}, {"save_every": 0}, {"keep_every": -1}]  # fmt: skip
OWN = {
    "sft": [{"weight_decay": -0.1}],
    "rm": [{"weight_decay": -0.1}],
    "dpo": [{"beta": 0.0}, {"beta": -0.1}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}],
    "ppo": [{"beta": -1.0}, {"clip": -0.2}, {"value_clip": -0.2}, {"lam": 3.0}, {"lam": -0.1}, {"gamma": 1.1},
            {"gamma": -0.1}, {"temperature": 0.0}, {"temperature": -1.0}, {"kl_horizon": 0}, {"epochs": 0},
            {"minibatches": 0}, {"minibatches": 9}],
}  # fmt: skip


@pytest.mark.parametrize("script, wrong", [(s, wrong) for s in SCRIPTS for wrong in WRONG + OWN[s]], ids=str)
def test_an_impossible_number_is_refused_with_its_option(script, wrong, workshop, tmp_path):
    with pytest.raises(UserError, match=flag(next(iter(wrong)))):
        workshop.run(script, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ the wiring of main()

DEFAULTS = {  # what others use, stated once: the optimizer, then the options
    "sft": dict(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, grad_clip=1.0, dropout=0.0),
    "rm": dict(betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, grad_clip=1.0, epochs=1.0),
    "dpo": dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, grad_clip=1.0, epochs=1.0, beta=0.1,
                label_smoothing=0.0),
    "ppo": dict(betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, grad_clip=1.0, gamma=1.0, lam=0.95, clip=0.2,
                value_clip=0.2, value_coef=0.5, temperature=1.0, kl_target=0.0),
}  # fmt: skip


def test_the_optimizer_makes_the_steps_of_pytorchs_own_and_its_state_is_the_same():
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        adamw(ours.parameters(), 0.1, weight_decay=0.3),
        torch.optim.AdamW(theirs.parameters(), 0.1, weight_decay=0.3, fused=True),
    ]
    optimizers[1].param_groups[0]["params"].pop()  # the bias decays in neither
    optimizers[1].add_param_group({"params": [theirs.bias], "weight_decay": 0.0})
    for _ in range(5):
        x = torch.randn(7, 3)
        for layer, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (layer(x) ** 2).sum().backward()
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert not any(x.requires_grad for state in optimizers[0].state.values() for x in state.values())
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() == {0, 1}
    assert all(torch.equal(states[0][i][name], x) for i, state in states[1].items() for name, x in state.items())
    fresh = adamw(ours.parameters(), 0.1, weight_decay=0.3)
    fresh.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))  # it would share the moments
    for optimizer in (fresh, optimizers[1]):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    AdamW(ours.parameters(), 0.1, foreach=False).step()  # PyTorch refuses it where gradients are recorded


@pytest.mark.parametrize("script", rest_slow(SCRIPTS))
def test_a_run_does_not_import_pytorchs_compiler(script, workshop, tmp_path):
    """It would take two seconds at the start of every run."""
    arguments = []
    for name, value in vars(workshop.config(script, tmp_path / "out", steps=2)).items():
        arguments += [flag(name if value else f"no_{name}")] if isinstance(value, bool) else [flag(name), str(value)]
    code = f"import runpy, sys; runpy.run_path('train_{script}.py', run_name='__main__'); "
    code += "sys.exit('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "wrote" in run.stdout, run.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_optimizer_and_options_have_the_defaults_of_the_field(script, workshop, tmp_path, monkeypatch):
    optimizers, start = [], Run.start

    def watch(self, modules, optimizer, *rest, **options):
        optimizers.append(optimizer)
        return start(self, modules, optimizer, *rest, **options)

    monkeypatch.setattr(Run, "start", watch)
    workshop.run(script, tmp_path / "out", steps=1, valid="")
    [optimizer] = optimizers
    assert type(optimizer) is AdamW
    options = {field.name: field.default for field in dataclasses.fields(workshop.module(script).Config)}
    for group in optimizer.param_groups:
        actual = options | {name: group[name] for name in ("betas", "eps", "weight_decay")}
        assert {name: actual[name] for name in DEFAULTS[script]} == DEFAULTS[script]


@pytest.mark.parametrize("script", ["sft", "rm"])
def test_weight_decay_reaches_the_optimizer(script, workshop, tmp_path):
    """With a learning rate but no gradient worth the name, a matrix shrinks by lr x weight_decay at each step."""
    out = workshop.run(script, tmp_path / "out", init=workshop.path("sft"), steps=2, warmup=0, weight_decay=50.0)
    norm = tensors(out)["wte.weight"].norm() / tensors(workshop.path("sft"))["wte.weight"].norm()
    assert norm.item() == pytest.approx((1 - 0.01 * 50) * (1 - 0.005 * 50), abs=0.05)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_learning_rate_of_every_step_is_the_schedules_and_the_one_that_is_logged(
    script, workshop, tmp_path, monkeypatch, metrics
):
    used, step = [], Run.optimizer_step

    def watch(self, optimizer, grad_clip):
        used.append([group["lr"] for group in optimizer.param_groups])
        return step(self, optimizer, grad_clip)

    monkeypatch.setattr(Run, "optimizer_step", watch)
    warmup = 2 if script == "ppo" else 0.4  # iterations; a share of the steps
    out = workshop.run(script, tmp_path / "out", steps=5, warmup=warmup, lr=0.01, valid="")
    expected = [0.01 * factor for factor in (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)]
    assert [line["lr"] for line in metrics(out)] == pytest.approx(expected, rel=1e-5)
    updates = 4 if script == "ppo" else 1  # epochs x minibatches
    assert used == [pytest.approx([lr, lr]) for lr in expected for _ in range(updates)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loop_compiles_starts_steps_saves_and_finishes(script, workshop, tmp_path, monkeypatch):
    calls = []

    def watch(name):
        method = getattr(Run, name)

        def watched(self, *arguments, **options):
            calls.append(name)
            return method(self, *arguments, **options)

        monkeypatch.setattr(Run, name, watched)

    for name in ("compile", "start", "steps", "save", "finish"):
        watch(name)
    workshop.run(script, tmp_path / "out", steps=3)
    assert calls == ["compile", "start", "steps", "save", "save", "save", "finish"]
    calls.clear()
    workshop.run(script, tmp_path / "out", steps=3, resume=True)  # it is finished
    assert calls == ["compile", "start"]


@pytest.fixture
def batches_of(monkeypatch):
    """batches_of(module): a list that fills with the rows that each call of module.update gets."""

    def watch(module):
        seen, update = [], module.update

        def update_and_see(run, model, optimizer, rows, *rest):
            seen.append(rows)
            return update(run, model, optimizer, rows, *rest)

        monkeypatch.setattr(module, "update", update_and_see)
        return seen

    return watch


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_two_epochs_are_every_record_twice_the_second_time_in_another_order(
    script, workshop, tmp_path, metrics, batches_of
):
    seen = batches_of(workshop.module(script))
    out = workshop.run(script, tmp_path / "out", steps=0, epochs=2, batch_size=5, valid="")  # 24 records
    assert [line["step"] for line in metrics(out)] == list(range(1, 11))
    assert sorted(map(len, seen[:5])) == sorted(map(len, seen[5:])) == [4, 5, 5, 5, 5]
    epochs = [[id(row) for rows in half for row in rows] for half in (seen[:5], seen[5:])]
    assert len(set(epochs[0])) == 24 and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_a_number_of_steps_takes_precedence_over_the_epochs(script, workshop, tmp_path, metrics):
    out = workshop.run(script, tmp_path / "out", steps=2, epochs=9, valid="")
    assert [line["step"] for line in metrics(out)] == [1, 2]


def test_sft_starts_with_the_loss_of_the_model_it_is_given(workshop, tmp_path, metrics, batches_of, tokenizer):
    seen = batches_of(train_sft)
    out = workshop.run("sft", tmp_path / "out", steps=3, lr=0.0)
    model = load_model(workshop.path("base"))[0]
    valid = load_examples(workshop.path("sft_valid.jsonl"), tokenizer)
    lines = metrics(out)
    expected = [train_sft.evaluate(model, examples, "cpu") for examples in seen]
    assert [line["loss"] for line in training(lines)] == pytest.approx(expected, rel=1e-4)
    held_out = train_sft.evaluate(model, valid, "cpu")
    assert [line["eval/loss"] for line in evaluations(lines)] == pytest.approx([held_out] * 3, rel=1e-4)


def test_sft_from_scratch_starts_at_ln_V(workshop, tokenizer, tmp_path, metrics):
    """At first every token is about as likely as any other: the logits have a variance of 768 * 0.02**2."""
    sizes = dict(n_layer=1, n_head=2, n_embd=32, block_size=48, vocab=workshop.path("vocab.tiktoken"))
    out = workshop.run("sft", tmp_path / "out", init="scratch", steps=1, **sizes)
    held_out, trained = metrics(out)[:2]
    expected = math.log(tokenizer.vocab_size) + 768 * 0.02**2 / 2
    assert held_out["eval/loss"] == pytest.approx(expected, abs=0.1)
    assert trained["loss"] == pytest.approx(expected, abs=0.1)


def test_rm_starts_with_the_loss_of_an_untrained_head(workshop, tmp_path, metrics, batches_of, tokenizer):
    seen = batches_of(train_rm)
    out = workshop.run("rm", tmp_path / "out", steps=3, eval_every=3, lr=0.0, normalise=0)
    model = load_model(str(out), reward=True)[0]  # as it was at the start
    valid = load_pairs(workshop.path("pairs_valid.jsonl"), tokenizer)
    lines = metrics(out, "step", "seconds", "grad_norm", "lr")
    expected = [train_rm.evaluate(model, pairs, "cpu") for pairs in seen]
    logged = [line for line in lines if "loss" in line]
    for line, stats in zip(logged, expected, strict=True):
        assert line == pytest.approx({name: value.item() for name, value in stats.items()}, abs=1e-4)
    held_out = {f"eval/{name}": value.item() for name, value in train_rm.evaluate(model, valid, "cpu").items()}
    assert evaluations(lines) == [pytest.approx(held_out, abs=1e-4)] * 2  # before the first step and after the last


def test_rm_head_is_drawn_so_that_the_first_rewards_have_a_standard_deviation_of_about_1(workshop, tmp_path, tokenizer):
    """N(0, 1/sqrt(d+1)), on hidden states of d channels with mean square 1 (Stiennon et al., section 3.4)."""
    width = 512
    save_model(str(tmp_path / "wide"), GPT(GPTConfig(tokenizer.vocab_size, 48, 1, 1, width)), tokenizer, {})
    options = dict(init=str(tmp_path / "wide"), steps=1, lr=0.0, normalise=0, valid="")
    head = tensors(workshop.run("rm", tmp_path / "out", **options))["head.weight"]
    assert head.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.15)  # of 512 numbers: within 3%
    assert abs(head.mean().item()) < 4 / width
    other = tensors(workshop.run("rm", tmp_path / "other", seed=1, **options))["head.weight"]
    assert not torch.equal(head, other)  # it depends on the seed


def test_dpo_starts_with_a_loss_of_ln_2_and_margins_of_0_on_every_batch(workshop, tmp_path, metrics, batches_of):
    """The reference log-probabilities are those of the same pairs: at every step, held-out too."""
    seen = batches_of(train_dpo)
    out = workshop.run("dpo", tmp_path / "out", steps=0, epochs=1, lr=0.0, batch_size=5, micro_batch=2, beta=5.0)
    model, lines = load_model(workshop.path("sft"))[0], metrics(out)
    assert len(training(lines)) == 5
    for line in lines:
        prefix = "eval/" if "eval/loss" in line else ""
        assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-4)
        for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert line[prefix + name] == pytest.approx(0, abs=1e-4)
    for line, pairs in zip(training(lines), seen, strict=True):
        chosen = sum(sequence_logprob(model, pair.chosen) for pair in pairs) / len(pairs)
        rejected = sum(sequence_logprob(model, pair.rejected) for pair in pairs) / len(pairs)
        assert [line["logps/chosen"], line["logps/rejected"]] == pytest.approx([chosen, rejected], rel=1e-4)


# -------------------------------------------------------------------------------------------------------------- SFT


def test_sft_learns_a_toy_task_and_then_answers_right(workshop, tmp_path, metrics):
    out = workshop.run("sft", tmp_path / "out", steps=60, eval_every=30)
    held_out = [line["eval/loss"] for line in metrics(out) if "eval/loss" in line]
    assert held_out[0] > 4 and held_out[-1] < 0.5 * held_out[0]
    assert held_out == sorted(held_out, reverse=True)


def test_sft_from_scratch_makes_a_model_of_the_given_size_and_pretrains_on_text(workshop, tmp_path, lines, metrics):
    texts = lines([{"text": f"the {w} and the {w}"} for w in ("moon", "sun", "sea", "sky")] * 4)
    sizes = dict(block_size=32, n_layer=1, n_head=2, n_embd=16)
    data = dict(init="scratch", vocab=workshop.path("vocab.tiktoken"), data=texts, valid=texts)
    out = workshop.run("sft", tmp_path / "out", **data, **sizes, steps=40, eval_every=40)
    config = load_model(str(out))[0].config
    assert {name: getattr(config, name) for name in sizes} == sizes
    held_out = [line["eval/loss"] for line in metrics(out) if "eval/loss" in line]
    assert held_out[0] == pytest.approx(math.log(268), abs=0.1)  # at first every token is as likely as any other
    assert held_out[-1] < 0.6 * held_out[0]


def test_sft_of_an_impossible_size_is_refused(workshop, tmp_path):
    options = dict(init="scratch", vocab=workshop.path("vocab.tiktoken"), n_embd=10, n_head=4)
    with pytest.raises(UserError, match="multiple of n_head"):
        workshop.run("sft", tmp_path / "out", **options)


@pytest.mark.parametrize("size", [{"n_layer": 3}, {"block_size": 32}, {"dropout": 0.1}, {"vocab": "gpt2"}])
def test_sft_refuses_a_size_for_a_model_that_has_one(size, workshop, tmp_path):
    with pytest.raises(UserError, match=f"{flag(next(iter(size)))} is for --init scratch; .* brings its own"):
        workshop.run("sft", tmp_path / "out", **size)
    assert not (tmp_path / "out").exists()


def test_sft_held_out_loss_is_the_mean_over_all_target_tokens(workshop, tokenizer):
    model = load_model(workshop.path("base"))[0]
    examples = load_examples(workshop.path("sft.jsonl"), tokenizer)
    total = sum(sequence_logprob(model, example) for example in examples)
    count = sum(sum(example.mask) for example in examples)
    assert train_sft.evaluate(model, examples, "cpu", batch_size=5) == pytest.approx(-total / count, rel=1e-5)
    assert model.training


# --------------------------------------------------------------------------------------------------------------- RM


def test_rm_learns_to_rank_a_toy_task(workshop, tmp_path, metrics):
    out = workshop.run("rm", tmp_path / "out", steps=40, eval_every=40)
    first, last = evaluations(metrics(out))
    assert last["eval/accuracy"] == 1.0 and last["eval/loss"] < 0.3 < first["eval/loss"]


def test_rm_rewards_have_mean_0_and_standard_deviation_1_on_answers_of_the_initial_model(
    workshop, tmp_path, monkeypatch, tokenizer
):
    seen, normalise = [], train_rm.normalise
    monkeypatch.setattr(train_rm, "normalise", lambda model, answers: seen.append(answers) or normalise(model, answers))
    out = workshop.run("rm", tmp_path / "out", seed=3)
    [answers] = seen
    records = map(json.loads, Path(workshop.path("pairs.jsonl")).read_text().splitlines()[:8])
    prompts = [tokenizer.prompt([{"role": "user", "content": record["prompt"]}]) for record in records]
    assert answers == sample_text(load_model(workshop.path("sft"))[0], tokenizer, prompts, 8, seed=3)
    scores = score_examples(load_model(str(out), reward=True)[0], answers)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_rm_normalisation_keeps_the_ranking_and_rescales_all_rewards_alike(workshop, tokenizer):
    model = load_model(workshop.path("rm"), reward=True)[0]
    texts = [tokenizer.encode(f"Say {w}") for w in ("cat", "dog", "map", "ox")]
    answers = [Example(ids, [True] * len(ids)) for ids in texts]
    before = score_examples(model, answers)
    mean, std = train_rm.normalise(model, answers)
    assert (mean, std) == pytest.approx((before.mean().item(), before.std(correction=0).item()), rel=1e-4)
    torch.testing.assert_close(score_examples(model, answers), (before - mean) / std, rtol=1e-3, atol=1e-3)


def test_rm_without_different_answers_to_normalise_on_says_so_and_writes_no_model(workshop, tmp_path):
    with pytest.raises(UserError, match="--normalise needs answers with different rewards"):
        workshop.run("rm", tmp_path / "out", steps=1, normalise=1)
    assert not (tmp_path / "out" / "model.pt").exists()


def test_rm_notices_before_it_trains_that_no_prompt_leaves_room_for_normalising(workshop, tmp_path):
    with pytest.raises(UserError, match="--normalise: no prompt leaves room .* lower --max-new-tokens"):
        workshop.run("rm", tmp_path / "out", steps=1, max_new_tokens=48)
    assert not (tmp_path / "out").exists()
    workshop.run("rm", tmp_path / "out", steps=1, max_new_tokens=48, normalise=0)


def test_rm_evaluation_is_over_all_pairs_whatever_the_batch(workshop, tokenizer):
    model = load_model(workshop.path("rm"), reward=True)[0]
    pairs = load_pairs(workshop.path("pairs.jsonl"), tokenizer)

    def score(example):
        return model.score(torch.tensor([example.ids]), torch.tensor([len(example)])).item()

    margins = torch.tensor([score(pair.chosen) - score(pair.rejected) for pair in pairs], dtype=torch.float64)
    result = train_rm.evaluate(model, pairs, "cpu", batch_size=5)
    assert result["accuracy"].item() == pytest.approx((margins > 0).double().mean().item())
    assert result["margin"].item() == pytest.approx(margins.mean().item(), abs=1e-5)
    assert result["loss"].item() == pytest.approx(-F.logsigmoid(margins).mean().item(), abs=1e-5)


@pytest.mark.parametrize("script", ["rm", "dpo"])
def test_pairs_of_two_equal_answers_are_dropped(script, workshop, tmp_path, lines, capsys):
    good, tie = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}
    workshop.run(script, tmp_path / "out", steps=1, data=lines([good, tie, good, tie, tie]))
    assert "2 pairs, dropped 3 with two equal sides" in capsys.readouterr().out
    with pytest.raises(UserError, match="no pairs; 2 are with two equal sides"):
        workshop.run(script, tmp_path / "none", data=lines([tie, tie]))


# -------------------------------------------------------------------------------------------------------------- DPO


def test_dpo_learns_a_toy_preference(workshop, tmp_path, metrics):
    out = workshop.run("dpo", tmp_path / "out", steps=30, eval_every=30)
    first, last = evaluations(metrics(out))
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-5) and first["eval/rewards/margins"] == 0
    assert first["eval/rewards/accuracies"] == 0  # a tie is not right
    assert last["eval/rewards/accuracies"] == 1.0 and last["eval/rewards/margins"] > 0.5
    assert last["eval/loss"] < first["eval/loss"] - 0.2


@torch.no_grad()
def sequence_logprob(model, example):
    """The summed log-probability of one example's targets, from a forward pass of its own."""
    logp = model.logits(model(torch.tensor([example.ids])))[0].log_softmax(-1)
    return sum(logp[t - 1, example.ids[t]].item() for t in range(1, len(example.ids)) if example.mask[t])


def test_dpo_pair_logprobs_are_sums_over_the_answer_with_its_end_token(workshop, tokenizer):
    model = load_model(workshop.path("sft"))[0]
    pairs = load_pairs(workshop.path("pairs_valid.jsonl"), tokenizer)
    both = train_dpo.reference_logprobs(model, pairs, "cpu", batch_size=2)
    for pair, (chosen, rejected) in zip(pairs, both.tolist(), strict=True):
        assert chosen == pytest.approx(sequence_logprob(model, pair.chosen), abs=1e-3)
        assert rejected == pytest.approx(sequence_logprob(model, pair.rejected), abs=1e-3)


def test_dpo_measures_against_the_model_it_started_from_to_the_end(workshop, tmp_path, metrics, tokenizer):
    out = workshop.run("dpo", tmp_path / "out", steps=10, eval_every=10, beta=0.2)
    before, after = load_model(workshop.path("sft"))[0], load_model(str(out))[0]
    pairs = load_pairs(workshop.path("pairs_valid.jsonl"), tokenizer)
    expected = []
    for answers in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs]):
        moved = [sequence_logprob(after, answer) - sequence_logprob(before, answer) for answer in answers]
        expected.append(0.2 * sum(moved) / len(moved))
    last = metrics(out)[-1]
    assert [last["eval/rewards/chosen"], last["eval/rewards/rejected"]] == pytest.approx(expected, abs=1e-3)
    assert abs(expected[0]) > 0.01


# -------------------------------------------------------------------------------------------------------------- PPO


@pytest.fixture
def watched(monkeypatch):
    """What rollout() and update() return while PPO runs: watched.rollouts, watched.histories.

    A rollout has models, batch (a copy) and, if there is a critic of its own, its values at that time."""
    seen = SimpleNamespace(rollouts=[], histories=[])
    rollout, update = train_ppo.rollout, train_ppo.update

    def watch_rollout(models, *rest, **options):
        batch = rollout(models, *rest, **options)
        critic = models.critic
        values = None if critic is models.policy else critic.scalar(critic(batch.ids))[:, :-1].detach()
        seen.rollouts.append(SimpleNamespace(models=models, batch=copy.deepcopy(batch), critic_values=values))
        return batch

    def watch_update(*arguments, **options):
        history = update(*arguments, **options)
        seen.histories.append(history)
        return history

    monkeypatch.setattr(train_ppo, "rollout", watch_rollout)
    monkeypatch.setattr(train_ppo, "update", watch_update)
    return seen


def kl(batch: Batch) -> torch.Tensor:
    """log pi - log pi_ref of every answer, (B,)"""
    return (batch.logprobs - batch.ref_logprobs).sum(1)


VOWELS = "reward.py:vowels"


def test_ppo_raises_a_reward_that_is_a_python_function(workshop, tmp_path, metrics):
    options = dict(steps=20, batch_size=24, beta=0.0, lr=2e-2, epochs=4, valid="", missing_end_score=0.0)
    out = workshop.run("ppo", tmp_path / "out", reward=workshop.path(VOWELS), **options)
    scores = [line["objective/scores"] for line in metrics(out)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15  # a policy that does not learn stays at 0.01
    assert all(0 <= score <= 1 for score in scores)


def test_ppo_with_a_large_beta_stays_nearer_to_the_reference(workshop, tmp_path, metrics):
    last = {}
    options = dict(reward=workshop.path(VOWELS), steps=12, batch_size=24, epochs=4, valid="")
    for beta in (0.0, 5.0):
        out = workshop.run("ppo", tmp_path / str(beta), beta=beta, **options)
        last[beta] = metrics(out)[-1]["objective/kl"]
    assert last[5.0] < last[0.0] / 2


@pytest.mark.parametrize("options", [{}, {"init": "dropout"}, {"critic": "rm"}, {"temperature": 0.7}], ids=str)
def test_ppo_starts_with_ratio_1_kl_0_and_nothing_clipped(options, workshop, tmp_path, watched, metrics):
    options = {k: workshop.path(v) if isinstance(v, str) else v for k, v in options.items()}
    out = workshop.run("ppo", tmp_path / "out", steps=2, **options)
    for history in watched.histories:
        first = history[0]
        assert float(first["val/ratio"]) == pytest.approx(1.0, abs=1e-5)
        assert float(first["policy/approxkl"]) < 1e-9
        assert float(first["policy/clipfrac"]) == float(first["val/clipfrac"]) == 0.0
    assert any(float(later["policy/approxkl"]) > 1e-6 for later in watched.histories[0][1:])
    held_out, trained = metrics(out)[:2]
    assert [held_out["eval/kl"], trained["objective/kl"]] == pytest.approx([0, 0], abs=1e-4)
    assert trained["objective/rlhf_reward"] == pytest.approx(trained["objective/scores"], abs=1e-4)
    assert trained["val/first_ratio"] == pytest.approx(1.0, abs=1e-5) and trained["val/first_approxkl"] < 1e-9
    for rollout in watched.rollouts[:2]:  # the held-out evaluation before the first step, and the first iteration
        assert (kl(rollout.batch).abs() < 1e-4).all()


def test_ppo_logs_the_penalty_with_its_sign(workshop, tmp_path, metrics):
    out = workshop.run("ppo", tmp_path / "out", steps=6, batch_size=24, epochs=4, beta=0.5, valid="")
    for line in metrics(out):
        assert line["objective/non_score_reward"] == pytest.approx(-0.5 * line["objective/kl"], rel=1e-4, abs=1e-6)
        total = line["objective/scores"] + line["objective/non_score_reward"]
        assert line["objective/rlhf_reward"] == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert metrics(out)[-1]["objective/kl"] > 0.01


def test_ppo_logs_means_over_the_answers_of_an_iteration(workshop, tmp_path, watched, metrics):
    out = workshop.run("ppo", tmp_path / "out", steps=3, batch_size=24, valid="")
    for line, rollout in zip(metrics(out), watched.rollouts, strict=True):
        batch = rollout.batch
        expected = {
            "objective/kl": kl(batch).mean(),
            "objective/entropy": -batch.logprobs.sum(1).mean(),
            "objective/scores": batch.scores.mean(),
            "response/ended": batch.ended.float().mean(),
            "response/length": batch.mask.sum() / 24,
        }
        for name, value in expected.items():
            assert line[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_ppo_never_touches_the_reference_while_the_policy_moves(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out")
    before, last = tensors(workshop.path("sft")), watched.rollouts[-1]
    for name, weight in before.items():
        assert torch.equal(last.models.reference.state_dict()[name], weight), name
    assert not any(p.requires_grad for p in last.models.reference.parameters())
    assert not torch.equal(last.models.policy.wte.weight, before["wte.weight"])
    assert kl(last.batch).mean() > 1e-3


def test_ppo_first_values_are_0(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=1, valid="")
    assert (watched.rollouts[0].batch.values == 0).all()


def test_ppo_asks_every_prompt_once_before_any_twice(workshop, tmp_path, monkeypatch):
    """Six iterations of 8 answers, 24 prompts. Batches are full whatever their size, and the order is new each time."""
    asked, rollout = [], train_ppo.rollout

    def watch(models, tokenizer, prompts, prompt_ids, *rest):
        assert [tokenizer.decode(ids) for ids in prompt_ids] == [f"<|user|>{p}<|assistant|>" for p in prompts]
        asked.append([id(ids) for ids in prompt_ids])
        return rollout(models, tokenizer, prompts, prompt_ids, *rest)

    monkeypatch.setattr(train_ppo, "rollout", watch)
    workshop.run("ppo", tmp_path / "out", steps=6, valid="")
    assert [len(ids) for ids in asked] == [8] * 6
    passes = [sum(asked[:3], []), sum(asked[3:], [])]
    assert [len(set(ids)) for ids in passes] == [24, 24] and passes[0] != passes[1]
    asked.clear()
    workshop.run("ppo", tmp_path / "out", steps=5, batch_size=7, valid="")
    counts = Counter(sum(asked, []))
    assert [len(ids) for ids in asked] == [7] * 5 and sorted(counts.values()) == [1] * 13 + [2] * 11


def test_ppo_advantages_come_from_the_score_the_kl_and_the_values(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", beta=0.3, lam=0.9, valid="")
    batch, reference = watched.rollouts[-1].batch, watched.rollouts[-1].models.reference
    with torch.no_grad():
        ref_logprobs = reference.logprobs(reference(batch.ids), batch.ids, batch.index)
    torch.testing.assert_close(batch.ref_logprobs, ref_logprobs, rtol=1e-3, atol=1e-4)
    rewards = -0.3 * (batch.logprobs - ref_logprobs)
    for row in range(len(batch)):
        rewards[row, batch.mask[row].nonzero()[-1, 0]] += batch.scores[row]
    advantages = gae_by_double_sum(rewards, batch.values, batch.mask, 1.0, 0.9)
    torch.testing.assert_close(batch.returns, (advantages + batch.values) * batch.mask, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.advantages, advantages * batch.mask, rtol=1e-3, atol=1e-3)
    assert kl(batch).abs().mean() > 1e-3 and batch.values.abs().mean() > 1e-3


def test_ppo_gives_answers_that_do_not_end_the_missing_end_score(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=3, batch_size=24, missing_end_score=-7.5)
    batches = [rollout.batch for rollout in watched.rollouts]
    for batch in batches:
        assert (batch.scores[~batch.ended] == -7.5).all() and (batch.scores[batch.ended] != -7.5).all()
    assert any(batch.ended.any() and not batch.ended.all() for batch in batches)


def test_ppo_scores_are_the_reward_models_for_prompt_and_answer(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=1, valid="")
    reward, batch = load_model(workshop.path("rm"), reward=True)[0], watched.rollouts[0].batch
    for row in batch.ended.nonzero()[:, 0].tolist():
        ids = batch.ids[row, : batch.lengths[row]]
        alone = reward.score(ids[None], torch.tensor([len(ids)]))
        assert batch.scores[row].item() == pytest.approx(alone.item(), abs=1e-4)


def test_ppo_hands_a_python_reward_the_prompts_as_they_stand_and_the_answers_as_text(
    workshop, tmp_path, monkeypatch, watched, tokenizer
):
    calls = []

    def reward(prompts, completions):
        calls.append((prompts, completions))
        return [0.5] * len(completions)

    monkeypatch.setattr(nanopost.reward, "load_function", lambda spec: reward)
    workshop.run("ppo", tmp_path / "out", reward="anything.py:reward", steps=1, valid="")
    [(prompts, completions)], batch = calls, watched.rollouts[0].batch
    assert len(prompts) == len(completions) == len(batch) == 8 and len(set(prompts)) > 1
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        whole = tokenizer.decode(batch.ids[row, : batch.lengths[row]])
        assert whole == f"<|user|>{prompt}<|assistant|>{completion}" + "<|end|>" * int(batch.ended[row])


def test_ppo_with_a_separate_critic_takes_its_values_and_trains_both(workshop, tmp_path, watched, metrics):
    out = workshop.run("ppo", tmp_path / "out", critic=workshop.path("rm"), valid="")
    first, last = watched.rollouts[0], watched.rollouts[-1]
    for rollout in watched.rollouts:
        torch.testing.assert_close(rollout.batch.values, rollout.critic_values * rollout.batch.mask)
    before = tensors(workshop.path("rm"))
    assert first.models.critic.state_dict().keys() == before.keys()  # it starts from the reward model
    assert not torch.equal(last.models.critic.wte.weight, before["wte.weight"])
    model = load_model(str(out))[0]  # a language model without a head
    assert not torch.equal(model.wte.weight, tensors(workshop.path("sft"))["wte.weight"])
    assert all("loss/value" in line for line in metrics(out))


def test_ppo_adapts_beta_to_hold_the_kl(workshop, tmp_path, metrics):
    out = workshop.run("ppo", tmp_path / "out", beta=0.1, kl_target=1e9, kl_horizon=16, valid="")
    betas = [line["beta"] for line in metrics(out)]
    assert betas == pytest.approx([0.1 * 0.9**i for i in range(4)], rel=1e-4)  # a fifth of 8 / 16 less each time
    fixed = workshop.run("ppo", tmp_path / "fixed", beta=0.1, valid="")
    assert {line["beta"] for line in metrics(fixed)} == {0.1}


def test_ppo_evaluation_does_not_change_what_comes_next(workshop, tmp_path, metrics):
    often = workshop.run("ppo", tmp_path / "often", eval_every=1)
    never = workshop.run("ppo", tmp_path / "never", valid="")
    assert training(metrics(often, "seconds")) == training(metrics(never, "seconds"))


@pytest.fixture
def one_rollout(workshop, tmp_path, watched):
    """(a rollout, models whose policy has moved away from the one that sampled it)"""
    workshop.run("ppo", tmp_path / "out", steps=1, valid="")
    policy = load_model(workshop.path("sft"))[0].add_head(std=0.5).eval()
    with torch.no_grad():
        policy.wte.weight += 0.05 * torch.randn_like(policy.wte.weight)
    return watched.rollouts[0].batch, Models(policy, policy, None, None)


def now(models, batch):
    """The log-probabilities and values (B, T-1) of a rollout under the policy as it is now."""
    hidden = models.policy(batch.ids)
    return models.policy.logprobs(hidden, batch.ids, batch.index), models.policy.scalar(hidden)[:, :-1]


@torch.no_grad()
def test_ppo_minibatch_loss_is_the_policy_loss_plus_the_weighted_value_loss(workshop, tmp_path, one_rollout):
    batch, models = one_rollout
    config = workshop.config("ppo", tmp_path, value_coef=0.3)
    loss, _ = train_ppo.minibatch_loss(models, batch, batch.mask.sum(), config)
    logprobs, values = now(models, batch)
    expected = policy_loss(logprobs, batch.logprobs, batch.advantages, batch.mask)
    expected += 0.3 * value_loss(values, batch.values, batch.returns, batch.mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_ppo_statistics_are_masked_means_by_hand_over_the_response_tokens(workshop, tmp_path, one_rollout):
    batch, models = one_rollout
    mask = batch.mask
    _, stats = train_ppo.minibatch_loss(models, batch, mask.sum(), workshop.config("ppo", tmp_path))
    logprobs, values = (x[mask] for x in now(models, batch))
    ratio = (logprobs - batch.logprobs[mask]).exp()
    old, returns, advantages = batch.values[mask], batch.returns[mask], batch.advantages[mask]
    clipped = (values.clamp(old - 0.2, old + 0.2) - returns) ** 2
    outside = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    expected = {
        "policy/clipfrac": outside,
        "policy/approxkl": ratio.log() ** 2 / 2,
        "policy/approxkl_k3": ratio - 1 - ratio.log(),
        "val/clipfrac": clipped > (values - returns) ** 2,
        "val/ratio": ratio,
        "val/ratio_squares": (ratio - 1) ** 2,
    }
    for name, x in expected.items():
        assert stats[name].item() == pytest.approx(x.float().mean().item(), rel=1e-3), name
    assert 0 < stats["val/clipfrac"] < 1 and 0 < stats["policy/clipfrac"] < 1  # neither is trivially right


def test_ppo_ratio_variance_is_about_its_own_mean_whatever_the_micro_batches(workshop, tmp_path, monkeypatch):
    """Two parts with the ratios {1, 2} and {6}: mean 3, variance 14/3."""
    parts = iter([(3 / 3, (0 + 1) / 3), (6 / 3, 25 / 3)])

    def fake(models, batch, count, config):
        mean, squares = next(parts)
        loss = sum(p.sum() for p in models.policy.parameters()) * 0.0
        return loss, {"val/ratio": torch.tensor(mean), "val/ratio_squares": torch.tensor(squares)}

    monkeypatch.setattr(train_ppo, "minibatch_loss", fake)
    config = workshop.config("ppo", tmp_path / "out", epochs=1, minibatches=1, micro_batch=2)
    policy = load_model(workshop.path("sft"))[0]
    mask = torch.ones(3, 3, dtype=torch.bool)
    batch = Batch(torch.zeros(3, 4), mask, torch.tensor([4, 4, 4]), advantages=torch.randn(3, 3))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    models = Models(policy, policy, None, None)
    [stats] = train_ppo.update(Run("ppo", config), models, optimizer, batch, config)
    assert float(stats["val/ratio"]) == pytest.approx(3.0)
    assert float(stats["val/ratio_var"]) == pytest.approx(14 / 3)
    assert "val/ratio_squares" not in stats


def test_ppo_makes_exactly_epochs_times_minibatches_steps_even_when_they_do_not_divide(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=1, batch_size=5, epochs=3, minibatches=4, valid="")
    assert [len(history) for history in watched.histories] == [3 * 4]


def test_ppo_distinct_counts_answers_and_not_prompts(workshop, tmp_path, watched, metrics):
    """Nearly greedy and one token long: different prompts get the same answer."""
    options = dict(steps=1, batch_size=24, max_new_tokens=1, temperature=0.01, valid="")
    out = workshop.run("ppo", tmp_path / "out", **options)
    batch = watched.rollouts[0].batch
    last = batch.ids[torch.arange(24), batch.lengths - 1]
    [line] = metrics(out)
    assert line["response/distinct"] == pytest.approx(len(set(last.tolist())) / 24, rel=1e-4)
    assert len(set(last.tolist())) < len({tuple(row) for row in batch.ids.tolist()})


def test_ppo_updates_use_every_answer_once_per_epoch(workshop, tmp_path, monkeypatch):
    seen, lengths, rows_of = [], [], Batch.rows

    def watch(batch, rows):
        seen.append(rows.tolist())
        lengths.append(batch.lengths[rows].tolist())
        return rows_of(batch, rows)

    monkeypatch.setattr(Batch, "rows", watch)
    workshop.run("ppo", tmp_path / "out", steps=1, epochs=3, minibatches=2, micro_batch=3, valid="")
    rows = sum(seen, [])
    epochs = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert [len(part) for part in seen] == [3, 1] * 6
    for first, second in zip(lengths[::2], lengths[1::2]):  # similar lengths together in a minibatch's parts
        assert first + second == sorted(first + second)
    assert len(set(sum(lengths, []))) > 1
    assert set(epochs[0][:4]) != set(epochs[1][:4]) or set(epochs[1][:4]) != set(epochs[2][:4])


# ------------------------------------------------------------------------------------------------- the command line


def ppo(w, *arguments):
    return "ppo", ["--init", w.path("sft"), "--reward", w.path("rm"), "--max-new-tokens", "8", *arguments]


def sixteen_good_lines_and_a_bad_one(lines):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    return lines([good] * 16 + ["{oops", good], "records.jsonl")


MISTAKES = {  # what is wrong: (script, arguments), what the message says
    "missing file": (
        lambda w, lines: ("sft", ["--init", w.path("sft"), "--data", "nowhere.jsonl"]),
        "no file nowhere.jsonl",
    ),
    "missing model": (lambda w, lines: ("dpo", ["--init", "nowhere"]), "no folder nowhere"),
    "unknown option": (lambda w, lines: ("dpo", ["--learning-rate", "1"]), "--learning-rate"),
    "not a number": (lambda w, lines: ppo(w, "--steps", "many"), "--steps"),
    "number out of bounds": (lambda w, lines: ("rm", ["--batch-size", "0"]), "--batch-size must be at least 1, not 0"),
    "prompt too long": (
        lambda w, lines: ppo(w, "--prompts", lines([{"prompt": "x" * 60}], "records.jsonl")),
        "1 are longer than 40 tokens",
    ),
    "no room for prompts": (
        lambda w, lines: ppo(w, "--prompts", w.path("prompts.jsonl"), "--max-new-tokens", "48"),
        "lower --max-new-tokens",
    ),
    "number as prompt": (
        lambda w, lines: ppo(w, "--prompts", lines([{"prompt": 3}], "records.jsonl")),
        "records.jsonl:1: prompt must be",
    ),
    "invalid JSON": (
        lambda w, lines: ("rm", ["--init", w.path("sft"), "--data", sixteen_good_lines_and_a_bad_one(lines)]),
        "records.jsonl:17: invalid JSON",
    ),
    "empty completion": (
        lambda w, lines: (
            "sft",
            ["--init", w.path("sft"), "--data", lines([{"prompt": "a", "completion": ""}], "records.jsonl")],
        ),
        "records.jsonl:1: completion is empty",
    ),
    "reward of another vocabulary": (
        lambda w, lines: ppo(w, "--reward", w.path("other_vocab_rm")),
        "different vocabularies",
    ),
    "critic of another vocabulary": (
        lambda w, lines: ppo(w, "--critic", w.path("other_vocab_rm")),
        "different vocabularies",
    ),
    "reward model to start from": (lambda w, lines: ("dpo", ["--init", w.path("rm")]), "holds a reward model"),
    "language model as reward": (lambda w, lines: ppo(w, "--reward", w.path("sft")), "holds a language model"),
    "no such reward function": (
        lambda w, lines: ppo(w, "--reward", w.path("reward.py:nothing")),
        "has no function nothing",
    ),
    "more minibatches than answers": (
        lambda w, lines: ppo(w, "--batch-size", "2", "--minibatches", "3"),
        "--batch-size must be at least --minibatches",
    ),
    "no step to make": (
        lambda w, lines: (
            "sft",
            ["--init", w.path("sft"), "--data", w.path("sft.jsonl"), "--valid", "", "--epochs", "0"],
        ),
        "there is no step to make",
    ),
    "no device of this name": (
        lambda w, lines: ("sft", ["--init", w.path("sft"), "--device", "abacus"]),
        "--device must be auto, cpu, cuda, ",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_users_mistake_is_one_line_on_stderr_exit_code_2_and_nothing_written(
    kind, workshop, tmp_path, lines, command
):
    make, message = MISTAKES[kind]
    script, arguments = make(workshop, lines)
    out = tmp_path / "out"
    code, _, err = command(f"train_{script}.py", "--device", "cpu", *arguments, "--out", out)
    assert code == 2
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize("kind", rest_slow(["invalid JSON", "unknown option"]))
def test_so_it_is_for_a_process_of_its_own(kind, workshop, tmp_path, lines):
    make, message = MISTAKES[kind]
    script, arguments = make(workshop, lines)
    process = subprocess.run(
        [sys.executable, f"train_{script}.py", *arguments, "--out", tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 2
    assert message in process.stderr and process.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_line_runs_a_script_and_writes_to_stdout_only(script, workshop, tmp_path, command):
    arguments = []
    for name, value in vars(workshop.config(script, tmp_path / "out", steps=2)).items():
        if isinstance(value, bool):
            arguments.append(flag(name if value else f"no_{name}"))
        else:
            arguments += [flag(name), value]
    code, out, err = command(f"train_{script}.py", *arguments)
    assert code == 0 and err == "" and f"wrote {tmp_path / 'out'}" in out
    load_model(str(tmp_path / "out"), reward=script == "rm")
