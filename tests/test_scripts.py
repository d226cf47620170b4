"""The four scripts, whole: runs on toy data, what they write and log, resume, and the command line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanopost.reward
import train_dpo
import train_ppo
import train_rm
import train_sft
from nanopost.checkpoint import load_model
from nanopost.config import UserError
from nanopost.data import load_pairs
from nanopost.reward import score_samples
from nanopost.run import Run
from test_losses import gae_by_double_sum, sigmoid
from train_ppo import policy_loss, value_loss

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sft", "rm", "dpo", "ppo"]


# ----------------------------------------------------------------------------------------- whole runs of every script

NAMES = {
    "sft": ({"loss", "grad_norm", "lr"}, {"loss"}),
    "rm": ({"loss", "accuracy", "margin", "grad_norm", "lr"}, {"loss", "accuracy", "margin"}),
    "dpo": ({"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected", "grad_norm", "lr"}, {"loss", "rewards/accuracies", "rewards/margins"}),
    "ppo": ({"objective/scores", "objective/kl", "objective/entropy", "objective/non_score_reward",
             "objective/rlhf_reward", "loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "val/clipfrac",
             "val/ratio", "beta", "lr"}, {"scores", "kl"}),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_writes_a_loadable_folder_and_the_standard_metrics(script, workshop, tmp_path, metrics, tokenizer):
    out = workshop.run(script, tmp_path / "deep" / "out")
    assert sorted(os.listdir(out)) == ["config.json", "metrics.jsonl", "model.pt", "vocab.tiktoken"]
    model, vocabulary = load_model(str(out), reward=script == "rm")
    assert vocabulary == tokenizer and all(p.isfinite().all() for p in model.parameters())
    info = json.loads((out / "config.json").read_text())
    assert info["method"] == script and info["arguments"]["batch_size"] == 8
    trained, evaluated = NAMES[script]
    lines = metrics(out)
    assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if any(name.startswith("eval/") for name in line)] == [0, 2, 4]
    for line in lines:
        wanted = trained if "lr" in line else {f"eval/{name}" for name in evaluated}
        assert wanted <= line.keys()
        assert all(isinstance(value, (int, float)) for value in line.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_the_same_for_the_same_seed_and_another_for_another(script, workshop, tmp_path, metrics):
    runs = [metrics(workshop.run(script, tmp_path / name, steps=2, seed=seed), "seconds")
            for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_learning_rate_0_leaves_the_weights_unchanged(script, workshop, tmp_path):
    out = workshop.run(script, tmp_path / "out", init=workshop.path("sft"), lr=0.0)
    before = load_model(workshop.path("sft"))[0].state_dict()
    after = torch.load(out / "model.pt", weights_only=True)
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

        def update(self, optimizer, grad_clip):
            seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
            optimizer.zero_grad()
            return torch.tensor(0.0)

        monkeypatch.setattr(Run, "update", update)
        workshop.run(script, tmp_path / str(micro_batch), steps=1, micro_batch=micro_batch, eval_every=100)
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


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"micro_batch": -1}, {"lr": -1.0}, {"eval_every": 0}])
@pytest.mark.parametrize("script", SCRIPTS)
def test_impossible_numbers_are_refused(script, wrong, workshop, tmp_path):
    with pytest.raises(UserError, match="--" + next(iter(wrong)).replace("_", "-")):
        workshop.run(script, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, wrong", [
    ("dpo", {"beta": 0.0}), ("dpo", {"beta": -0.1}), ("dpo", {"label_smoothing": 0.5}), ("ppo", {"beta": -1.0}),
    ("ppo", {"clip": -0.2}), ("ppo", {"value_clip": -0.2}), ("ppo", {"lam": 3.0}), ("ppo", {"gamma": 1.1})])
def test_numbers_that_make_no_sense_are_refused(script, wrong, workshop, tmp_path):
    with pytest.raises(UserError, match="--" + next(iter(wrong)).replace("_", "-")):
        workshop.run(script, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


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


def test_held_out_data_can_be_left_out(workshop, tmp_path, metrics):
    for script in SCRIPTS:
        lines = metrics(workshop.run(script, tmp_path / script, valid="", steps=1))
        assert len(lines) == 1 and not any(name.startswith("eval/") for name in lines[0])


# -------------------------------------------------------------------------------------------------------------- SFT


def test_sft_learns_a_toy_task_and_then_answers_right(workshop, tmp_path, metrics, tokenizer):
    out = workshop.run("sft", tmp_path / "out", steps=60, eval_every=30)
    held_out = [line["eval/loss"] for line in metrics(out) if "eval/loss" in line]
    assert held_out[0] > 4 and held_out[-1] < 0.5 * held_out[0]
    assert held_out == sorted(held_out, reverse=True)


def test_sft_from_scratch_makes_a_model_of_the_given_size_and_pretrains_on_text(workshop, tmp_path, lines, metrics):
    texts = lines([{"text": f"the {w} and the {w}"} for w in ("moon", "sun", "sea", "sky")] * 4)
    out = workshop.run("sft", tmp_path / "out", init="scratch", vocab=workshop.path("vocab.tiktoken"), data=texts,
                       valid=texts, block_size=32, n_layer=1, n_head=2, n_embd=16, steps=40, eval_every=40)
    config = load_model(str(out))[0].config
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (1, 2, 16, 32)
    held_out = [line["eval/loss"] for line in metrics(out) if "eval/loss" in line]
    assert held_out[0] == pytest.approx(math.log(268), abs=0.1)  # at first every token is as likely as any other
    assert held_out[-1] < 0.6 * held_out[0]


def test_sft_of_an_impossible_size_is_refused(workshop, tmp_path):
    with pytest.raises(UserError, match="multiple of n_head"):
        workshop.run("sft", tmp_path / "out", init="scratch", vocab=workshop.path("vocab.tiktoken"), n_embd=10,
                     n_head=4)


def test_sft_makes_as_many_steps_as_the_epochs_need(workshop, tmp_path, metrics):
    out = workshop.run("sft", tmp_path / "out", steps=0, epochs=2, batch_size=5)  # 24 records: 5 batches an epoch
    assert metrics(out)[-1]["step"] == 10


def test_sft_held_out_loss_is_the_mean_over_all_target_tokens(workshop, tokenizer):
    model = load_model(workshop.path("base"))[0]
    examples = train_sft.load_examples(workshop.path("sft.jsonl"), tokenizer)
    total = count = 0
    for e in examples:
        logp = model.logits(model(torch.tensor([e.ids])))[0].log_softmax(-1)
        picked = [-logp[t - 1, e.ids[t]].item() for t in range(1, len(e.ids)) if e.mask[t]]
        total, count = total + sum(picked), count + len(picked)
    assert train_sft.evaluate(model, examples, "cpu", batch_size=5) == pytest.approx(total / count, rel=1e-5)
    assert model.training


# --------------------------------------------------------------------------------------------------------------- RM


def test_rm_learns_to_rank_a_toy_task(workshop, tmp_path, metrics):
    out = workshop.run("rm", tmp_path / "out", steps=40, eval_every=40)
    evaluated = [line for line in metrics(out) if "eval/loss" in line]
    assert evaluated[-1]["eval/accuracy"] == 1.0 and evaluated[-1]["eval/loss"] < 0.3 < evaluated[0]["eval/loss"]


def test_rm_rewards_have_mean_0_and_standard_deviation_1_on_answers_of_the_initial_model(
        workshop, tmp_path, monkeypatch, tokenizer):
    seen, normalise = [], train_rm.normalise
    monkeypatch.setattr(train_rm, "normalise", lambda model, samples: seen.append(samples) or normalise(model, samples))
    out = workshop.run("rm", tmp_path / "out")
    [samples] = seen
    assert len(samples) == 8 and all(len(s["ids"]) <= 8 for s in samples)
    prompts = [json.loads(line)["prompt"] for line in Path(workshop.path("pairs.jsonl")).read_text().splitlines()[:8]]
    assert [tokenizer.decode(s["prompt_ids"]) for s in samples] == [f"<|user|>{p}<|assistant|>" for p in prompts]
    scores = score_samples(load_model(str(out), reward=True)[0], samples)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_rm_normalisation_keeps_the_ranking_and_rescales_all_rewards_alike(workshop, tokenizer):
    model = load_model(workshop.path("rm"), reward=True)[0]
    samples = [{"prompt_ids": tokenizer.encode("Say"), "ids": tokenizer.encode(w)} for w in ("cat", "dog", "map", "ox")]
    before = score_samples(model, samples)
    mean, std = train_rm.normalise(model, samples)
    assert (mean, std) == pytest.approx((before.mean().item(), before.std(correction=0).item()), rel=1e-4)
    torch.testing.assert_close(score_samples(model, samples), (before - mean) / std, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [dict(normalise=1), dict(max_new_tokens=48)], ids=["one answer", "no room"])
def test_rm_never_writes_weights_that_are_not_finite(options, workshop, tmp_path):
    try:
        workshop.run("rm", tmp_path / "out", steps=1, **options)
    except UserError:
        pass
    if (tmp_path / "out" / "model.pt").exists():
        assert all(w.isfinite().all() for w in torch.load(tmp_path / "out" / "model.pt", weights_only=True).values())


def test_rm_evaluation_is_over_all_pairs_whatever_the_batch(workshop, tokenizer):
    model = load_model(workshop.path("rm"), reward=True)[0]
    pairs = load_pairs(workshop.path("pairs.jsonl"), tokenizer)
    scores = [[model.score(torch.tensor([side.ids]), torch.tensor([len(side.ids)])).item() for side in pair]
              for pair in pairs]
    result = train_rm.evaluate(model, pairs, "cpu", batch_size=5)
    assert result["accuracy"].item() == pytest.approx(sum(c > r for c, r in scores) / len(pairs))
    assert result["margin"].item() == pytest.approx(sum(c - r for c, r in scores) / len(pairs), abs=1e-5)
    expected = sum(-math.log(sigmoid(c - r)) for c, r in scores) / len(pairs)
    assert result["loss"].item() == pytest.approx(expected, abs=1e-5)


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
    first, last = (line for line in metrics(out) if "eval/loss" in line)
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-5) and first["eval/rewards/margins"] == 0
    assert first["eval/rewards/accuracies"] == 0  # a tie is not right
    assert last["eval/rewards/accuracies"] == 1.0 and last["eval/rewards/margins"] > 0.5
    assert last["eval/loss"] < first["eval/loss"] - 0.2


@torch.no_grad()
def sequence_logprob(model, example):
    """log pi(y|x) of one example, from a forward pass of its own."""
    logp = model.logits(model(torch.tensor([example.ids])))[0].log_softmax(-1)
    return sum(logp[t - 1, example.ids[t]].item() for t in range(1, len(example.ids)) if example.mask[t])


def test_dpo_pair_logprobs_are_sums_over_the_answer_with_its_end_token(workshop, tokenizer):
    model = load_model(workshop.path("sft"))[0]
    pairs = load_pairs(workshop.path("pairs_valid.jsonl"), tokenizer)
    both = train_dpo.reference_logprobs(model, pairs, "cpu", batch_size=2)
    for (chosen, rejected), (good, bad) in zip(pairs, both.tolist()):
        assert good == pytest.approx(sequence_logprob(model, chosen), abs=1e-3)
        assert bad == pytest.approx(sequence_logprob(model, rejected), abs=1e-3)


def test_dpo_measures_against_the_model_it_started_from_to_the_end(workshop, tmp_path, metrics, tokenizer):
    out = workshop.run("dpo", tmp_path / "out", steps=10, eval_every=10, beta=0.2)
    before, after = load_model(workshop.path("sft"))[0], load_model(str(out))[0]
    pairs = load_pairs(workshop.path("pairs_valid.jsonl"), tokenizer)
    expected = []
    for answers in zip(*pairs):  # all the chosen ones, then all the rejected ones
        moved = [sequence_logprob(after, answer) - sequence_logprob(before, answer) for answer in answers]
        expected.append(0.2 * sum(moved) / len(moved))
    last = metrics(out)[-1]
    assert [last["eval/rewards/chosen"], last["eval/rewards/rejected"]] == pytest.approx(expected, abs=1e-3)
    assert abs(expected[0]) > 0.01


# -------------------------------------------------------------------------------------------------------------- PPO


@pytest.fixture
def watched(monkeypatch):
    """Everything that rollout() and update() take and return while PPO runs: watched.rollouts, watched.histories."""

    class Watched:
        rollouts, histories = [], []

    Watched.rollouts, Watched.histories = [], []
    rollout, update = train_ppo.rollout, train_ppo.update

    def watch_rollout(policy, critic, reference, *rest, **options):
        batch = rollout(policy, critic, reference, *rest, **options)
        values = None if critic is None else critic.scalar(critic(batch["ids"]))[:, :-1].detach()
        Watched.rollouts.append({"policy": policy, "reference": reference, "critic_values": values,
                                 **{name: x.clone() for name, x in batch.items()}})
        return batch

    def watch_update(*arguments, **options):
        history = update(*arguments, **options)
        Watched.histories.append(history)
        return history

    monkeypatch.setattr(train_ppo, "rollout", watch_rollout)
    monkeypatch.setattr(train_ppo, "update", watch_update)
    return Watched


VOWELS = "reward.py:vowels"


def test_ppo_raises_a_reward_that_is_a_python_function(workshop, tmp_path, metrics):
    out = workshop.run("ppo", tmp_path / "out", reward=workshop.path(VOWELS), steps=20, batch_size=24, beta=0.0,
                       lr=2e-2, epochs=4, eval_every=100, missing_end_score=0.0)
    scores = [line["objective/scores"] for line in metrics(out) if "objective/scores" in line]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15  # a policy that does not learn stays at 0.01
    assert all(0 <= score <= 1 for score in scores)


def test_ppo_with_a_large_beta_stays_nearer_to_the_reference(workshop, tmp_path, metrics):
    kl = {}
    for beta in (0.0, 5.0):
        out = workshop.run("ppo", tmp_path / str(beta), reward=workshop.path(VOWELS), steps=12, batch_size=24,
                           beta=beta, epochs=4, eval_every=100)
        kl[beta] = metrics(out)[-2]["objective/kl"]
    assert kl[5.0] < kl[0.0] / 2


@pytest.mark.parametrize("init", ["sft", "dropout"])
def test_ppo_has_ratio_1_no_kl_and_nothing_clipped_on_the_first_minibatch(init, workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", init=workshop.path(init), steps=2)
    for history in watched.histories:
        first = history[0]
        assert float(first["val/ratio"]) == pytest.approx(1.0, abs=1e-5)
        assert float(first["policy/approxkl"]) < 1e-9
        assert float(first["policy/clipfrac"]) == float(first["val/clipfrac"]) == 0.0
    assert any(float(later["policy/approxkl"]) > 1e-6 for later in watched.histories[0][1:])


def test_ppo_starts_with_ratio_1_and_kl_0_at_other_temperatures_too(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=1, temperature=0.7)
    assert float(watched.histories[0][0]["policy/approxkl"]) < 1e-9
    assert (watched.rollouts[0]["kl"].abs() < 1e-4).all()


def test_ppo_never_touches_the_reference_while_the_policy_moves(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out")
    before = load_model(workshop.path("sft"))[0].state_dict()
    last = watched.rollouts[-1]
    for name, weight in before.items():
        assert torch.equal(last["reference"].state_dict()[name], weight), name
    assert not any(p.requires_grad for p in last["reference"].parameters())
    assert not torch.equal(last["policy"].wte.weight, before["wte.weight"])
    assert (watched.rollouts[0]["kl"].abs() < 1e-4).all() and last["kl"].mean() > 1e-3


def test_ppo_first_values_are_0_and_the_trunk_is_the_sft_models(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=1, lr=0.0)
    assert (watched.rollouts[0]["old_values"] == 0).all()


def test_ppo_advantages_come_from_the_score_the_kl_and_the_values(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", beta=0.3, lam=0.9)
    batch = watched.rollouts[-2]  # of the last iteration; the last one is the held-out evaluation's
    mask, ids = batch["mask"], batch["ids"]
    index = mask.flatten().nonzero()[:, 0]
    with torch.no_grad():
        ref = batch["reference"].logprobs(batch["reference"](ids), ids, index)
    torch.testing.assert_close(batch["kl"], (batch["old_logprobs"] - ref).sum(1), rtol=1e-3, atol=1e-4)
    rewards = -0.3 * (batch["old_logprobs"] - ref)
    for row in range(len(ids)):
        rewards[row, mask[row].nonzero()[-1, 0]] += batch["scores"][row]
    advantages = gae_by_double_sum(rewards, batch["old_values"], mask, 1.0, 0.9)
    torch.testing.assert_close(batch["returns"], (advantages + batch["old_values"]) * mask, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch["advantages"], advantages * mask, rtol=1e-3, atol=1e-3)


def test_ppo_gives_answers_that_do_not_end_the_missing_end_score(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=3, batch_size=24, missing_end_score=-7.5)
    for batch in watched.rollouts:
        assert (batch["scores"][~batch["ended"]] == -7.5).all() and (batch["scores"][batch["ended"]] != -7.5).all()
    assert any(batch["ended"].any() and not batch["ended"].all() for batch in watched.rollouts)


def test_ppo_scores_are_the_reward_models_for_prompt_and_answer(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=1, eval_every=100)
    reward, batch = load_model(workshop.path("rm"), reward=True)[0], watched.rollouts[0]
    for row in batch["ended"].nonzero()[:, 0].tolist():
        ids = batch["ids"][row, : batch["lengths"][row]]
        alone = reward.score(ids[None], torch.tensor([len(ids)]))
        assert batch["scores"][row].item() == pytest.approx(alone.item(), abs=1e-4)


def test_ppo_hands_a_python_reward_the_prompts_as_they_stand_and_the_answers_as_text(
        workshop, tmp_path, monkeypatch, watched, tokenizer):
    calls = []

    def reward(prompts, completions):
        calls.append((prompts, completions))
        return [0.5] * len(completions)

    monkeypatch.setattr(nanopost.reward, "load_function", lambda spec: reward)
    workshop.run("ppo", tmp_path / "out", reward="anything.py:reward", steps=1, eval_every=100)
    prompts, completions = calls[1]  # after the evaluation before the first step
    batch = watched.rollouts[1]
    assert len(prompts) == len(completions) == len(batch["ids"]) == 8 and len(set(prompts)) > 1
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        whole = tokenizer.decode(batch["ids"][row, : batch["lengths"][row]])
        assert whole == f"<|user|>{prompt}<|assistant|>{completion}" + "<|end|>" * int(batch["ended"][row])


def test_ppo_with_a_separate_critic_takes_its_values_and_trains_both(workshop, tmp_path, watched, metrics):
    out = workshop.run("ppo", tmp_path / "out", critic=workshop.path("rm"))
    for batch in watched.rollouts:
        torch.testing.assert_close(batch["old_values"], batch["critic_values"] * batch["mask"])
    assert not torch.equal(watched.rollouts[0]["critic_values"][0, :3], watched.rollouts[-1]["critic_values"][0, :3])
    model = load_model(str(out))[0]  # a language model without a head
    assert not torch.equal(model.wte.weight, load_model(workshop.path("sft"))[0].wte.weight)
    assert all("loss/value" in line for line in metrics(out) if "lr" in line)


def test_ppo_adapts_beta_to_hold_the_kl(workshop, tmp_path, metrics):
    out = workshop.run("ppo", tmp_path / "out", beta=0.1, kl_target=1e9, kl_horizon=16)
    betas = [line["beta"] for line in metrics(out) if "beta" in line]
    assert betas == pytest.approx([0.1 * 0.9**i for i in range(4)], rel=1e-4)  # a fifth of 8 / 16 less each time
    fixed = workshop.run("ppo", tmp_path / "fixed", beta=0.1)
    assert {line["beta"] for line in metrics(fixed) if "beta" in line} == {0.1}


def test_ppo_evaluation_does_not_change_what_comes_next(workshop, tmp_path, metrics):
    often = workshop.run("ppo", tmp_path / "often", eval_every=1)
    never = workshop.run("ppo", tmp_path / "never", valid="")
    trained = [[line for line in metrics(out, "seconds") if "lr" in line] for out in (often, never)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_evaluation_does_not_change_what_comes_next(script, workshop, tmp_path, metrics):
    options = {"init": workshop.path("dropout"), "steps": 3}  # with dropout, every use of random numbers would show
    often = workshop.run(script, tmp_path / "often", eval_every=1, **options)
    never = workshop.run(script, tmp_path / "never", valid="", **options)
    trained = [[line for line in metrics(out, "seconds") if "lr" in line] for out in (often, never)]
    assert trained[0] == trained[1]


def test_ppo_minibatch_loss_is_the_policy_loss_plus_the_weighted_value_loss(workshop, tmp_path, watched):
    policy = load_model(workshop.path("sft"))[0].add_head(std=0.1).eval()
    config = workshop.config("ppo", tmp_path, value_coef=0.3)
    workshop.run("ppo", tmp_path / "out", steps=1, eval_every=100)
    batch = {k: v for k, v in watched.rollouts[0].items() if isinstance(v, torch.Tensor)}
    rows, count = torch.arange(len(batch["ids"])), batch["mask"].sum()
    with torch.no_grad():
        policy.wte.weight += 0.05 * torch.randn_like(policy.wte.weight)
        loss, _ = train_ppo.minibatch_loss(policy, None, batch, rows, count, config)
        hidden, index = policy(batch["ids"]), batch["mask"].flatten().nonzero()[:, 0]
        logprobs, values = policy.logprobs(hidden, batch["ids"], index), policy.scalar(hidden)[:, :-1]
        expected = (policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"])
                    + 0.3 * value_loss(values, batch["old_values"], batch["returns"], batch["mask"]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_ppo_statistics_are_masked_means_by_hand_over_the_response_tokens(workshop, tmp_path, watched):
    policy = load_model(workshop.path("sft"))[0].add_head(std=0.5).eval()
    workshop.run("ppo", tmp_path / "out", steps=1, eval_every=100)
    batch = {k: v for k, v in watched.rollouts[0].items() if isinstance(v, torch.Tensor)}
    mask, count, config = batch["mask"], batch["mask"].sum(), workshop.config("ppo", tmp_path)
    with torch.no_grad():
        policy.wte.weight += 0.05 * torch.randn_like(policy.wte.weight)
        _, stats = train_ppo.minibatch_loss(policy, None, batch, torch.arange(len(mask)), count, config)
        hidden, index = policy(batch["ids"]), mask.flatten().nonzero()[:, 0]
        ratio = (policy.logprobs(hidden, batch["ids"], index) - batch["old_logprobs"])[mask].exp()
        values, old = policy.scalar(hidden)[:, :-1][mask], batch["old_values"][mask]
    returns, advantages = batch["returns"][mask], batch["advantages"][mask]
    clipped = (values.clamp(old - 0.2, old + 0.2) - returns) ** 2
    outside = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert stats["policy/clipfrac"].item() == pytest.approx(outside.float().mean().item())
    assert stats["val/clipfrac"].item() == pytest.approx((clipped > (values - returns) ** 2).float().mean().item())
    assert stats["val/ratio"].item() == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert stats["val/ratio_var"].item() == pytest.approx(((ratio - 1) ** 2).mean().item(), rel=1e-3)  # about 1 so far
    assert stats["policy/approxkl"].item() == pytest.approx((ratio.log() ** 2 / 2).mean().item(), rel=1e-3)
    assert 0 < stats["val/clipfrac"] < 1 and 0 < stats["policy/clipfrac"] < 1  # neither is trivially right


def test_ppo_ratio_variance_is_about_its_own_mean_whatever_the_micro_batches(workshop, tmp_path, monkeypatch):
    """Two parts with the ratios {1, 2} and {6}: mean 3, variance 14/3."""
    parts = iter([(3 / 3, (0 + 1) / 3), (6 / 3, 25 / 3)])

    def fake(policy, critic, batch, rows, count, config):
        mean, square = next(parts)
        loss = sum(p.sum() for p in policy.parameters()) * 0.0
        return loss, {"val/ratio": torch.tensor(mean), "val/ratio_var": torch.tensor(square)}

    monkeypatch.setattr(train_ppo, "minibatch_loss", fake)
    config = workshop.config("ppo", tmp_path / "out", epochs=1, minibatches=1, micro_batch=2)
    policy = load_model(workshop.path("sft"))[0]
    batch = {"ids": torch.zeros(3, 4), "mask": torch.ones(3, 3, dtype=torch.bool), "lengths": torch.tensor([4, 4, 4]),
             "advantages": torch.randn(3, 3)}
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    history = train_ppo.update(Run("ppo", config), policy, None, optimizer, batch, config)
    assert float(history[0]["val/ratio"]) == pytest.approx(3.0)
    assert float(history[0]["val/ratio_var"]) == pytest.approx(14 / 3)


def test_ppo_makes_exactly_epochs_times_minibatches_steps_even_when_they_do_not_divide(workshop, tmp_path, watched):
    workshop.run("ppo", tmp_path / "out", steps=1, batch_size=5, epochs=3, minibatches=4, eval_every=100)
    assert [len(history) for history in watched.histories] == [3 * 4]


def test_ppo_distinct_counts_answers_and_not_prompts(workshop, tmp_path, watched, metrics):
    """Nearly greedy and one token long: different prompts get the same answer."""
    out = workshop.run("ppo", tmp_path / "out", steps=1, batch_size=24, max_new_tokens=1, temperature=0.01,
                       eval_every=100)
    batch = max(watched.rollouts, key=lambda rollout: len(rollout["ids"]))  # not that of the held-out prompts
    last = batch["ids"][torch.arange(24), batch["lengths"] - 1]
    answers = {token if not ended else "end" for token, ended in zip(last.tolist(), batch["ended"].tolist())}
    [distinct] = [line["response/distinct"] for line in metrics(out) if "response/distinct" in line]
    assert distinct == pytest.approx(len(answers) / 24, rel=1e-4)
    assert len(answers) < len({tuple(row) for row in batch["ids"].tolist()})


def test_ppo_updates_use_every_answer_once_an_epoch(workshop, tmp_path, monkeypatch):
    seen, lengths, minibatch_loss = [], [], train_ppo.minibatch_loss

    def watch(policy, critic, batch, rows, *rest):
        seen.append(rows.tolist())
        lengths.append(batch["lengths"][rows].tolist())
        return minibatch_loss(policy, critic, batch, rows, *rest)

    monkeypatch.setattr(train_ppo, "minibatch_loss", watch)
    workshop.run("ppo", tmp_path / "out", steps=1, epochs=3, minibatches=2, micro_batch=3, eval_every=100)
    rows = sum(seen, [])
    epochs = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert [len(part) for part in seen] == [3, 1] * 6
    for first, second in zip(lengths[::2], lengths[1::2]):  # like lengths together in a minibatch's parts
        assert first + second == sorted(first + second)
    assert len(set(sum(lengths, []))) > 1
    assert set(epochs[0][:4]) != set(epochs[1][:4]) or set(epochs[1][:4]) != set(epochs[2][:4])


# ------------------------------------------------------------------------------------------------- the command line


def mistakes(workshop, lines):
    """{what is wrong: (script, arguments, what the message says)}"""
    def seventeen(good, bad):
        return lines([good] * 16 + [bad, good], "seventeen.jsonl")

    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    sft, rm = workshop.path("sft"), workshop.path("rm")
    return {
        "missing file": ("sft", ["--init", sft, "--data", "nowhere.jsonl"], "no file nowhere.jsonl"),
        "unknown option": ("dpo", ["--learning-rate", "1"], "--learning-rate"),
        "bad number": ("ppo", ["--steps", "many"], "--steps"),
        "prompt too long": ("ppo", ["--init", sft, "--reward", rm, "--max-new-tokens", "8", "--prompts",
                                    lines([{"prompt": "x" * 60}], "long.jsonl")], "1 are longer than 40 tokens"),
        "no room for prompts": ("ppo", ["--init", sft, "--reward", rm, "--max-new-tokens", "48", "--prompts",
                                        workshop.path("prompts.jsonl")], "lower --max-new-tokens"),
        "number as prompt": ("ppo", ["--init", sft, "--reward", rm, "--max-new-tokens", "8", "--prompts",
                                     lines([{"prompt": 3}], "number.jsonl")], "number.jsonl:1: prompt must be"),
        "invalid JSON": ("rm", ["--init", sft, "--data", seventeen(pair, "{oops")], "seventeen.jsonl:17: invalid JSON"),
        "empty completion": ("sft", ["--init", sft, "--data",
                                     lines([{"prompt": "a", "completion": ""}], "empty.jsonl")],
                             "empty.jsonl:1: completion is empty"),
        "reward of another vocabulary": ("ppo", ["--init", sft, "--reward", workshop.path("other_vocab_rm")],
                                         "different vocabularies"),
        "critic of another vocabulary": ("ppo", ["--init", sft, "--critic", workshop.path("other_vocab_rm")],
                                         "different vocabularies"),
        "reward model as start": ("dpo", ["--init", rm], "holds a reward model"),
        "language model as reward": ("ppo", ["--init", sft, "--reward", sft], "holds a language model"),
        "no such reward function": ("ppo", ["--init", sft, "--reward", workshop.path("reward.py:nothing")],
                                    "has no function nothing"),
    }


KINDS = ["missing file", "unknown option", "bad number", "prompt too long", "no room for prompts", "number as prompt",
         "invalid JSON", "empty completion", "reward of another vocabulary", "critic of another vocabulary",
         "reward model as start", "language model as reward", "no such reward function"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_mistake_is_one_line_on_stderr_exit_code_2_and_nothing_written(
        kind, workshop, tmp_path, lines, command):
    script, arguments, message = mistakes(workshop, lines)[kind]
    out = tmp_path / "out"
    code, _, err = command(f"train_{script}.py", *arguments, "--device", "cpu", "--out", out)
    assert code == 2
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["invalid JSON", "unknown option"])
def test_so_it_is_for_a_process_of_its_own(kind, workshop, tmp_path, lines):
    script, arguments, message = mistakes(workshop, lines)[kind]
    process = subprocess.run([sys.executable, f"train_{script}.py", *arguments, "--out", tmp_path / "out"], cwd=ROOT,
                             capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 2
    assert message in process.stderr and process.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_line_runs_a_script_and_writes_to_stdout_only(script, workshop, tmp_path, command):
    config = vars(workshop.config(script, tmp_path / "out", steps=2))
    arguments = []
    for name, value in config.items():
        arguments += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    code, out, err = command(f"train_{script}.py", *arguments)
    assert code == 0 and err == "" and f"wrote {tmp_path / 'out'}" in out
    load_model(str(tmp_path / "out"), reward=script == "rm")
