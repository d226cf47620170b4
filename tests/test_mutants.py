"""Planted mistakes. Each one is a plausible slip in one line, many of them found in published code; for each, at least
one of the properties that the other files prove must fail. So the proofs have teeth.

    python -m pytest tests/test_mutants.py -v       one line a mistake

A mistake is given as (what it is, the right code, the wrong code). The right code is looked up in the function's own
source, so this list can not fall behind the scripts.
"""

import inspect
import itertools
import textwrap

import pytest
import torch

import test_losses
import test_proofs
import test_rollout
import train_dpo
import train_ppo
import train_rm
import train_sft
from conftest import make_tokenizer
from nanopost.data import collate, encode_answer, encode_example
from nanopost.model import GPT, Attention, token_nll
from nanopost.sampling import generate
from nanopost.tokenizer import Tokenizer

MUTANTS = {
    train_sft.masked_cross_entropy: [
        ("prompts and padding in the loss", "nll.masked_fill(~mask.flatten(), 0.0)", "nll"),
        ("the mask inverted", "~mask.flatten()", "mask.flatten()"),
        ("prompts and padding in the denominator", "mask.sum() if", "mask.numel() if"),
        ("every row with equal weight, however long", "nll.sum() / (mask.sum() if count is None else count)",
         "(nll.view(mask.shape).sum(-1) / mask.sum(-1)).mean()"),
        ("a denominator of its own for every micro-batch", "mask.sum() if count is None else count", "mask.sum()"),
        ("the sum, not the mean", " / (mask.sum() if count is None else count)", ""),
        ("half precision in the softmax", "upcast(logits)", "logits"),
    ],
    train_sft.batch_loss: [
        ("the hidden state of the target itself", "[:, :-1]", "[:, 1:]"),
        ("targets not shifted", "batch.ids[:, 1:]", "batch.ids[:, :-1]"),
        ("the count not handed on", ", count)", ")"),
        ("another loss than the one given", "return loss(", "return 2 * loss("),
    ],
    train_sft.update: [
        ("a mean of means over micro-batches", "count, run.compiled(masked_cross_entropy))",
         "None) / len(split(examples, config.micro_batch))"),
        ("only the last micro-batch learns", "run.backward(part)", "run.backward(part * (rows[-1] is examples[-1]))"),
        ("the first token counted, which nothing predicts", "example.mask[1:]", "[True] + example.mask[1:]"),
    ],
    collate: [
        ("the mask not shifted", "mask = mask[:, 1:]", "mask = mask[:, :-1]"),
        ("the last target lost", "mask[row, : len(example.ids)] = example.mask",
         "mask[row, : len(example.ids) - 1] = example.mask[:-1]"),
        ("padding on the left", "ids[row, : len(example.ids)] = example.ids",
         "ids[row, T - len(example.ids) :] = example.ids"),
        ("padding counted as real tokens", "np.flatnonzero(mask), lengths", "np.flatnonzero(mask), lengths * 0 + T"),
    ],
    Tokenizer.chat: [
        ("the end token is not a target", "[True] * (len(content) + 1)", "[True] * len(content) + [False]"),
        ("the first word of the answer is not a target", "[False] + [True] * (len(content) + 1)",
         "[False] * 2 + [True] * len(content)"),
        ("<|assistant|> is a target", "[False] + [True] * (len(content) + 1)", "[True] * (len(content) + 2)"),
        ("questions are targets", "[False] * (len(content) + 1)", "[True] * (len(content) + 1)"),
        ("answers without an end", "*content, self.end]", "*content]"),
    ],
    encode_answer: [
        ("the prompt is a target", "[False] * len(prompt)", "[True] * len(prompt)"),
        ("the mask one token early", "[False] * len(prompt) + mask", "[False] * (len(prompt) - 1) + mask + [False]"),
    ],
    train_rm.pairwise_loss: [
        ("chosen and rejected swapped", "upcast(chosen) - upcast(rejected)", "upcast(rejected) - upcast(chosen)"),
        ("the wrong sign", "-F.logsigmoid", "F.logsigmoid"),
        ("a logarithm that underflows", "F.logsigmoid(upcast(chosen) - upcast(rejected))",
         "(upcast(chosen) - upcast(rejected)).sigmoid().log()"),
        ("the sum, not the mean", ".mean()", ".sum()"),
        ("a hinge instead of Bradley-Terry", "-F.logsigmoid(upcast(chosen) - upcast(rejected))",
         "F.relu(1 - upcast(chosen) + upcast(rejected))"),
        ("every reward by itself, not the difference", "-F.logsigmoid(upcast(chosen) - upcast(rejected)).mean()",
         "(-F.logsigmoid(upcast(chosen)) - F.logsigmoid(-upcast(rejected))).mean()"),
    ],
    train_rm.score_pairs: [
        ("the sides swapped", "[chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]",
         "[rejected for _, rejected in pairs] + [chosen for chosen, _ in pairs]"),
    ],
    train_rm.update: [
        ("a mean of means over micro-batches", "len(part) / len(pairs)", "1 / len(split(pairs, config.micro_batch))"),
        ("the sum over micro-batches", "pairwise_loss(chosen, rejected) * share", "pairwise_loss(chosen, rejected)"),
    ],
    GPT.score: [
        ("the reward read at the last column, padding or not", "lengths - 1", "-1"),
        ("the reward read before the end token", "lengths - 1", "lengths - 2"),
        ("the reward read at the first token", "lengths - 1", "0 * lengths"),
        ("the mean over all positions", "self.scalar(self(ids)[rows, lengths - 1])", "self.scalar(self(ids)).mean(1)"),
    ],
    train_dpo.dpo_loss: [
        ("chosen and rejected swapped", "chosen_rewards - rejected_rewards", "rejected_rewards - chosen_rewards"),
        ("without a reference", "policy_chosen - ref_chosen", "policy_chosen"),
        ("policy and reference swapped on one side", "policy_rejected - ref_rejected",
         "ref_rejected - policy_rejected"),
        ("beta left out", "beta * (policy_chosen - ref_chosen)", "(policy_chosen - ref_chosen)"),
        ("beta twice", "label_smoothing) * F.logsigmoid(logits)", "label_smoothing) * F.logsigmoid(beta * logits)"),
        ("the wrong sign", "losses = -(1", "losses = (1"),
        ("the smoothed label added, not mixed in", "-(1 - label_smoothing)", "-1"),
        ("the smoothed label with the wrong sign", "F.logsigmoid(-logits)", "F.logsigmoid(logits)"),
        ("gradient through the logged rewards", "chosen_rewards.detach()", "chosen_rewards"),
        ("a squared loss", "-(1 - label_smoothing) * F.logsigmoid(logits)", "(logits - 1) ** 2"),
    ],
    train_dpo.pair_logprobs: [
        ("the mean over the tokens, not the sum", ".sum(1)", ".mean(1)"),
        ("the mean over the answer's tokens", ".sum(1)", ".sum(1).div(batch.mask.sum(1))"),
        ("the end token left out", "batch.index)", "batch.index[torch.isin(batch.index, batch.index + 1)])"),
        ("the prompt's tokens counted too", "batch.index)", "torch.arange(batch.mask.numel()))"),
    ],
    train_dpo.reference_logprobs: [
        ("rows in sorted order, not in the pairs'", "out[rows] =", "out[order.index(rows[0]):][:len(rows)] ="),
        ("chosen and rejected swapped", "dim=1)", "dim=1).flip(1)"),
    ],
    train_dpo.update: [
        ("a mean of means over micro-batches", "losses.sum() / len(pairs)", "losses.mean()"),
        ("the reference's log-probabilities of other rows", "ref_logprobs[rows]", "ref_logprobs[: len(rows)]"),
    ],
    GPT.logprobs: [
        ("the hidden state of the token itself", "hidden[:, :-1]", "hidden[:, 1:]"),
        ("the token before", "ids[:, 1:].flatten()", "ids[:, :-1].flatten()"),
        ("the wrong sign", "-self.nll", "self.nll"),
    ],
    token_nll: [
        ("no temperature", "upcast(logits) / temperature", "upcast(logits)"),
        ("the temperature upside down", "upcast(logits) / temperature", "upcast(logits) * temperature"),
        ("the logit instead of its log-probability", "F.cross_entropy(upcast(logits) / temperature, targets, "
         "reduction=\"none\")", "-logits.gather(1, targets[:, None])[:, 0] / temperature"),
    ],
    GPT.logits: [("unused rows of the matrix get probability", "[..., : self.config.vocab_size]", "")],
    Attention.forward: [
        ("tokens see their future", "is_causal=mask is None", "is_causal=False"),
        ("heads mixed up", ".transpose(1, 2).reshape(B, T, C)", ".reshape(B, T, C)"),
    ],
    GPT.forward: [
        ("cached tokens do not see themselves", "<= position", "< position"),
        ("cached tokens see what other rows wrote", "<= position)", "<= position.max() + 0 * position)"),
        ("positions of the padded row, not of the token", "position = cache.pos[:, None]",
         "position = torch.full_like(cache.pos, cache.span)[:, None]"),
    ],
    train_ppo.token_rewards: [
        ("the penalty with the wrong sign", "-beta *", "beta *"),
        ("policy and reference swapped", "logprobs - ref_logprobs", "ref_logprobs - logprobs"),
        ("beta left out", "-beta * ", "-"),
        ("k2 in the reward", "(logprobs - ref_logprobs)", "0.5 * (logprobs - ref_logprobs) ** 2"),
        ("k3 in the reward", "(logprobs - ref_logprobs)",
         "((ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs))"),
        ("k3 upside down", "(logprobs - ref_logprobs)",
         "((logprobs - ref_logprobs).exp() - 1 - (logprobs - ref_logprobs))"),
        ("the absolute value of k1", "(logprobs - ref_logprobs)", "(logprobs - ref_logprobs).abs()"),
        ("no penalty on the end token", "rewards.scatter_add(", "rewards.scatter(1, last, 0.0).scatter_add("),
        ("a penalty on prompt and padding", ".masked_fill(~mask, 0.0)", ""),
        ("the score twice", "scores[:, None]", "2 * scores[:, None]"),
        ("the score on every token", "return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))",
         "return rewards + scores[:, None] * mask"),
        ("the score on the first token", "mask.long().cumsum(1).argmax(1", "mask.long().argmax(1"),
        ("the score in the last column", "mask.long().cumsum(1).argmax(1, keepdim=True)",
         "torch.full_like(mask[:, :1].long(), mask.shape[1] - 1)"),
        ("the score one token early", "scatter_add(1, last,", "scatter_add(1, (last - 1).clamp(min=0),"),
    ],
    train_ppo.gae: [
        ("values have no future", "gamma * next_value", "0.0"),
        ("the value of the state itself as its future", "advantages[:, t], next_value = advantage, values[:, t]",
         "advantages[:, t], next_value = advantage, values[:, t - 1]"),
        ("no discount in lambda's sum", "gamma * lam * advantage", "lam * advantage"),
        ("lambda left out", "gamma * lam * advantage", "gamma * advantage"),
        ("the value added, not taken away", "- values[:, t]", "+ values[:, t]"),
        ("forwards in time", "reversed(range(rewards.shape[1]))", "range(rewards.shape[1])"),
        ("what stands after the end flows back", "* mask[:, t]", "* 1"),
        ("padding has values", "values.masked_fill(~mask, 0.0)", "values"),
        ("padding has rewards", "rewards.masked_fill(~mask, 0.0), values", "rewards, values"),
        ("returns without values", "return advantages, advantages + values", "return advantages, advantages"),
    ],
    train_ppo.whiten: [
        ("the mean kept where it should go", "(0.0 if shift_mean else mean)", "(mean if shift_mean else 0.0)"),
        ("padding in the mean", "mean = x.masked_fill(~mask, 0.0).sum() / mask.sum()", "mean = x.mean()"),
        ("padding in the variance", "((x - mean) ** 2).masked_fill(~mask, 0.0).sum()", "((x - mean) ** 2).sum()"),
        ("the variance, not its root", "(variance + 1e-8).sqrt()", "(variance + 1e-8)"),
        ("the variance of one sample less", "mask.sum()\n    white", "(mask.sum() - 1)\n    white"),
        ("padding left with a number", "return white.masked_fill(~mask, 0.0)", "return white"),
    ],
    train_ppo.policy_loss: [
        ("the optimist's bound", "torch.max(", "torch.min("),
        ("the wrong sign", "torch.max(-advantages * ratio, -advantages * ratio.clamp",
         "torch.max(advantages * ratio, advantages * ratio.clamp"),
        ("the ratio upside down", "logprobs - old_logprobs", "old_logprobs - logprobs"),
        ("no clip", "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
        ("clipped on one side", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
        ("clipped always, never the larger loss", "torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, "
         "1 + clip))", "-advantages * ratio.clamp(1 - clip, 1 + clip)"),
        ("the log-ratio as the ratio", "0.0).exp()", "0.0) + 1"),
        ("the mean of every answer, then over answers", "0.0).sum() / (mask.sum() if count is None else count)",
         "0.0).sum(1).div(mask.sum(1)).sum() / (1 if count is None else count)"),
        ("padding in the loss", "return losses.masked_fill(~mask, 0.0)", "return losses"),
        ("padding in the denominator", "mask.sum() if", "mask.numel() if"),
        ("a denominator of its own for every micro-batch", "mask.sum() if count is None else count", "mask.sum()"),
        ("the end token left out", "losses.masked_fill(~mask, 0.0)",
         "losses.masked_fill(~mask | (mask.long().cumsum(1) == mask.sum(1, keepdim=True)), 0.0)"),
    ],
    train_ppo.value_loss: [
        ("without the half", "0.5 * ", ""),
        ("the smaller error", "torch.max(", "torch.min("),
        ("no clip", "(values - old_values).clamp(-clip, clip)", "(values - old_values)"),
        ("clipped around the return", "old_values + (values - old_values)", "returns + (values - returns)"),
        ("padding in the loss", "return losses.masked_fill(~mask, 0.0)", "return losses"),
        ("a denominator of its own for every micro-batch", "mask.sum() if count is None else count", "mask.sum()"),
    ],
    train_ppo.rollout: [
        ("the reference at another temperature", "index, config.temperature)", "index)"),
        ("cut-off answers are paid like others", "torch.where(samples.ended, score(prompts, samples).to(old), "
         "config.missing_end_score)", "score(prompts, samples).to(old)"),
        ("returns from whitened advantages", "returns=returns", "returns=whiten(advantages, mask) + values"),
        ("values of the next token", "critic.scalar(critic(ids))[:, :-1]", "critic.scalar(critic(ids))[:, 1:]"),
        ("the mean KL a token, not the sum", "(old - ref).sum(1)", "(old - ref).mean(1)"),
        ("lambda not handed on", "mask, config.gamma, config.lam)", "mask, config.gamma)"),
        ("gamma not handed on", "mask, config.gamma, config.lam)", "mask, 1.0, config.lam)"),
    ],
    train_ppo.minibatch_loss: [
        ("log-probabilities at another temperature", "index, config.temperature)", "index)"),
        ("values of the next token", "critic.scalar(critic(ids)))[:, :-1]", "critic.scalar(critic(ids)))[:, 1:]"),
        ("a denominator of its own for every micro-batch", "advantages, mask, config.clip, count)",
         "advantages, mask, config.clip)"),
        ("the value's coefficient left out", "config.value_coef * vf", "vf"),
        ("the value loss left out", "pg + config.value_coef * vf", "pg"),
        ("the KL of the wrong pair", "ratio - 1 - log_ratio", "(1 / ratio) - 1 + log_ratio"),
    ],
    train_ppo.update: [
        ("a mean of means over micro-batches", "batch[\"mask\"][rows].sum(), {}",
         "batch[\"mask\"][rows].sum() / len(split(rows, config.micro_batch)) ** 0.5, {}"),
        ("one epoch only", "range(config.epochs)", "range(1)"),
        ("advantages not whitened", "whiten(batch[\"advantages\"], batch[\"mask\"])", "batch[\"advantages\"]"),
        ("minibatches make no steps of their own", "tensor_split(config.minibatches)", "tensor_split(1)"),
    ],
    generate: [
        ("log-probabilities without the temperature", "p.gather(1, token[:, None])",
         "model.logits(hidden).softmax(-1).gather(1, token[:, None])"),
        ("probabilities for log-probabilities", "[:, 0].log(), 0.0)", "[:, 0], 0.0)"),
        ("the temperature forgotten", "temperature not in (0, 1)", "temperature > 1"),
        ("the prompt's last column, padding or not", "lengths - 1]  # (R, C)", "-1]  # (R, C)"),
        ("the cache begins one token early", "cache.fill(lengths, P)", "cache.fill((lengths - 1).clamp(min=1), P)"),
        ("the end token does not end", "live & (token == end)", "live & (token == -1)"),
        ("the end token not counted", "lengths[rows] += live", "lengths[rows] += live & (token != end)"),
        ("ended rows go on talking", "live = ~ended[rows]", "live = torch.ones_like(ended[rows])"),
        ("the mask one token late", "(column >= prompt_lengths[:, None])", "(column > prompt_lengths[:, None])"),
        ("the mask one token too long", "(column < lengths[:, None])", "(column <= lengths[:, None])"),
        ("probabilities squared", "p.cumsum(-1)", "(p * p).cumsum(-1)"),
        ("the first token twice as likely", "p.cumsum(-1)", "p.cumsum(-1) + p[:, :1]"),
        ("the token before", "right=True)[:, 0]", "right=True)[:, 0].sub(1).clamp(min=0)"),
        ("the same noise at every step", "noise[rows, column - prompt_lengths[rows], None]", "noise[rows, 0, None]"),
        ("the noise of another row", "noise[rows, column", "noise[rows * 0, column"),
        ("log-probabilities one column late", "logprobs[rows, column - 1]", "logprobs[rows, column.clamp(max=S - 2)]"),
        ("values one column late", "values[rows, column - 1]", "values[rows, column.clamp(max=S - 2)]"),
        ("values after the token, not before", "torch.where(live, model.scalar(hidden), 0.0)",
         "torch.where(live, model.scalar(model.ln_f(hidden)), 0.0)"),
        ("other rows dropped than from the cache", "rows, token = rows[stay]", "rows, token = rows[: stay.sum()]"),
        ("the same token fed twice", "model(token[:, None], cache)", "model(ids[rows, cache.pos - 1][:, None], cache)"),
    ],
}


def targets_are_the_answers_and_their_ends():
    """The whole contract of the mask, on a record of each kind: what is learned, to the token."""
    t = make_tokenizer()

    def learned(example):
        return [token for token, target in zip(example.ids, example.mask, strict=True) if target]

    pair = {"prompt": "the ask", "completion": "an answer"}
    example = encode_example(t, "", pair)
    assert example.ids == [t.user, *t.encode("the ask"), t.assistant, *t.encode("an answer"), t.end]
    assert learned(example) == [*t.encode("an answer"), t.end]
    talk = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"),
                                                   ("assistant", "the d"))]
    assert learned(encode_example(t, "", {"messages": talk})) == [*t.encode("b"), t.end, *t.encode("the d"), t.end]


def cases(test):
    """Calls of a parametrised test, without pytest: one function a combination of its parameters."""
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for values in itertools.product(*(rows for _, rows, *_ in marks)):
        arguments = {}
        for (names, *_), row in zip(marks, values):
            names = [name.strip() for name in names.split(",")]
            arguments |= dict(zip(names, row if len(names) > 1 else [row]))
        yield lambda: test(**arguments)


def with_prefix(module, *prefixes):
    return [f for name, f in vars(module).items() if name.startswith(prefixes)]


PROPERTIES = {
    "train_sft": with_prefix(test_losses, "test_cross_entropy") + with_prefix(test_proofs, "test_sft", "test_one_step"),
    "train_rm": with_prefix(test_losses, "test_pairwise") + with_prefix(test_proofs, "test_rm", "test_one_step"),
    "train_dpo": with_prefix(test_losses, "test_dpo") + with_prefix(test_proofs, "test_dpo", "test_conservative",
                                                                    "test_one_step"),
    "train_ppo": with_prefix(test_losses, "test_token", "test_rewards", "test_gae", "test_whiten", "test_policy",
                             "test_value") + with_prefix(test_rollout, "test_") + with_prefix(
                                 test_proofs, "test_the", "test_at", "test_logged", "test_one_step"),
    "nanopost.data": [targets_are_the_answers_and_their_ends] + with_prefix(test_proofs, "test_sft", "test_rm"),
    "nanopost.tokenizer": [targets_are_the_answers_and_their_ends],
    "nanopost.model": with_prefix(test_rollout, "test_") + with_prefix(test_proofs, "test_dpo", "test_rm_score"),
    "nanopost.sampling": with_prefix(test_rollout, "test_"),
}


def code_of(function, right, wrong):
    """The function's code with one place of its source changed."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{right!r} occurs {source.count(right)} times in {function.__qualname__}"
    namespace = dict(function.__globals__)
    exec(compile(source.replace(right, wrong), f"<{function.__name__}, mutated>", "exec"), namespace)
    return inspect.unwrap(namespace[function.__name__]).__code__


ALL = [(inspect.unwrap(function), *mutant) for function, mutants in MUTANTS.items() for mutant in mutants]


@pytest.mark.parametrize("function, name, right, wrong", ALL,
                         ids=[f"{f.__module__}.{f.__name__}: {name}" for f, name, *_ in ALL])
def test_a_planted_mistake_is_found(function, name, right, wrong, monkeypatch):
    monkeypatch.setattr(function, "__code__", code_of(function, right, wrong))
    for test in PROPERTIES[function.__module__]:
        for case in cases(test):
            torch.manual_seed(0)
            try:
                case()
            except AssertionError:
                return
    pytest.fail(f"{function.__qualname__} with {name}: every property still holds")


def test_without_a_mistake_every_property_holds():
    for test in {test for tests in PROPERTIES.values() for test in tests}:
        for case in cases(test):
            torch.manual_seed(0)
            case()
