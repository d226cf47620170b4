"""The wiring of each main(): the right numbers reach the right functions, in the right order and at the right time.

The other files check the functions. Here each script runs as a whole on forty short records. What reaches its update()
is written down, and all that it logs is computed again from the records, the weights and the definitions.
"""

import contextlib
import copy
import functools
import math
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch

import train_rm
from conftest import FORKS, SCRIPTS, make_tokenizer, read_metrics, write_lines
from measured import at_most, distance
from nanopost.checkpoint import load_model, save_model
from nanopost.data import Example, encode_example
from nanopost.model import GPT, GPTConfig
from nanopost.run import AdamW, Run

# --------------------------------------------------------------------------------------------------- records and runs

METHODS = SCRIPTS + FORKS
TOKENIZER = make_tokenizer()
RECORDS = [
    {
        "prompt": f"Say {n}{'!' * (n % 5)}",
        "completion": f"{n} the {'and ' * (n % 3)}{n}",
        "chosen": f"The {n}{'.' * (n % 4)}",
        "rejected": f"{n} no{'o' * (n % 6)}",
    }
    for n in range(76)
]
TRAIN, VALID = RECORDS[:40], RECORDS[40:]  # 36 held out: more than one batch of an evaluation


def wide_model(workshop, folder):
    """256 channels, so that the spread of a head's random weights can be seen."""
    save_model(str(folder / "wide"), GPT(GPTConfig(TOKENIZER.vocab_size, 48, 1, 1, 256)), TOKENIZER, {})
    return str(folder / "wide")


def toy(name):
    """A model or a file of the workshop, by its name."""
    return lambda workshop, folder: workshop.path(name)


RUNS = {  # name: script, and the options that differ from Workshop.config. Batches of 15, 15 and 10 make an epoch
    "sft": ("sft", dict(steps=0, epochs=2, batch_size=15, warmup=1 / 3, weight_decay=0.1, init=toy("base"))),
    "rm": ("rm", dict(steps=0, epochs=2, batch_size=15, warmup=1 / 3, weight_decay=0.1, normalise=30)),
    "dpo": ("dpo", dict(steps=0, epochs=2, batch_size=15, warmup=1 / 3, beta=0.2)),
    "ppo": ("ppo", dict(steps=4, batch_size=10, warmup=1, kl_target=1.0, kl_horizon=100, eval_prompts=36)),
    "ipo": ("ipo", dict(steps=0, epochs=2, batch_size=15, warmup=1 / 3, beta=0.2)),
    "grpo": ("grpo", dict(steps=4, batch_size=20, k=2, warmup=1, eval_prompts=36)),
    "sft with nothing held out": ("sft", dict(steps=1, valid="")),
    "sft from scratch": ("sft", dict(steps=1, init="scratch", vocab=toy("vocab.tiktoken"))),
    "rm of a wide model": ("rm", dict(steps=1, init=wide_model, normalise=0)),
    "ppo with a critic": ("ppo", dict(steps=2, critic=toy("rm"))),
}
RATES = {  # the learning rate of every step as a share of --lr: up to 1, then down to what would be 0 one step later
    "sft": [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4],
    "rm": [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4],
    "dpo": [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4],
    "ppo": [1 / 2] * 4 + [1] * 4 + [2 / 3] * 4 + [1 / 3] * 4,  # 2 epochs x 2 minibatches per iteration
}
RATES |= {"ipo": RATES["dpo"], "grpo": RATES["ppo"]}
ADAMW = {  # nanoGPT's second beta in SFT; OpenAI's eps in reward models and PPO; the decay is the option's
    "sft": dict(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1),
    "rm": dict(betas=(0.9, 0.999), eps=1e-5, weight_decay=0.1),
    "dpo": dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    "ppo": dict(betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0),
}
ADAMW |= {"ipo": ADAMW["dpo"], "grpo": ADAMW["ppo"]}
DEFAULTS = {  # what the papers and the reference implementations use, and a reader therefore expects
    "sft": dict(epochs=1.0, weight_decay=0.0, grad_clip=1.0),
    "rm": dict(epochs=1.0, weight_decay=0.0, grad_clip=1.0),
    "dpo": dict(epochs=1.0, grad_clip=1.0, beta=0.1, label_smoothing=0.0),
    "ppo": dict(grad_clip=1.0, gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, temperature=1.0, kl_target=0.0),
    "ipo": dict(epochs=1.0, grad_clip=1.0, beta=0.1, label_smoothing=0.0),
    "grpo": dict(  # the unbiased choices
        grad_clip=1.0, clip=0.2, temperature=1.0, baseline="loo", divide_by_std=False, length_mean=False, kl="reward"
    ),
}  # fmt: skip


PAIR = ("chosen", "rejected")
ANSWERS = {"sft": ("completion",), "rm": PAIR, "dpo": PAIR, "ipo": PAIR}  # what is learned from; the others sample

# ------------------------------------------------------------------------------------------------------ looking at them


@dataclass
class Update:
    """A call of a script's update()."""

    weights: dict  # of the model, before it
    training: bool = False  # whether dropout is on
    rows: object = None  # what it learns from: examples, pairs, or the Batch of a rollout
    rates: list = field(default_factory=list)  # the learning rate of every optimizer step that it makes
    limits: list = field(default_factory=list)  # the largest norm of the gradient in each
    parts: list = field(default_factory=list)  # PPO, GRPO: the rows in each, a number per row


@dataclass
class Ran:
    """A run of a script, and all that was seen of it."""

    config: object
    updates: list = field(default_factory=list)
    model: GPT = None  # that is trained
    optimizer: torch.optim.Optimizer = None
    rollouts: list = field(default_factory=list)  # PPO, GRPO: (arguments, Batch), those for evaluation included
    models: object = None  # PPO, GRPO: its Models
    answers: list = field(default_factory=list)  # reward model: the Examples that it was normalised on
    unnormalised: Update = None  # reward model: its weights before
    lines: list = None  # of metrics.jsonl

    def at(self, update: Update) -> GPT:
        """The model before this update, in double precision."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(update.weights)
        return model.double().eval()

    def trained(self) -> list[dict]:
        return [line for line in self.lines if "lr" in line]

    def held_out(self) -> list[dict]:
        return [line for line in self.lines if "lr" not in line]


def before(owner, name, look):
    """Calls look(*arguments) before every owner.name(*arguments)."""
    function = getattr(owner, name)

    def watched(*arguments, **options):
        look(*arguments, **options)
        return function(*arguments, **options)

    return mock.patch.object(owner, name, watched)


def watch(name, workshop, folder) -> Ran:
    """Makes a run of RUNS and writes down what happens, without changing it."""
    script, options = RUNS[name]
    options = {name: x(workshop, folder) if callable(x) else x for name, x in options.items()}
    data = {"data" if script in ANSWERS else "prompts": write_lines(folder / "train.jsonl", TRAIN)}
    data["valid"] = write_lines(folder / "valid.jsonl", VALID)
    config = workshop.config(script, folder / "out", **{"init": workshop.path("dropout"), **data, **options})
    module, ran = workshop.module(script), Ran(config)

    def look_at_update(run, models, optimizer, rows, *_):
        ran.models, ran.optimizer = models, optimizer
        ran.model = models if script in ANSWERS else models.policy
        weights = copy.deepcopy(ran.model.state_dict())
        ran.updates.append(Update(weights, ran.model.training, copy.deepcopy(rows)))

    def look_at_step(run, optimizer, grad_clip):
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1, "more than one learning rate in a step"
        ran.updates[-1].rates += rates
        ran.updates[-1].limits.append(grad_clip)

    def look_at_minibatch(models, batch, *_):
        ran.updates[-1].parts.append(fingerprints(batch))

    def look_at_answers(model, answers):
        ran.answers, ran.unnormalised = answers, Update(copy.deepcopy(model.state_dict()))

    sample = getattr(module, "rollout", None)

    def rollout(*arguments):
        batch = sample(*arguments)
        ran.rollouts.append((arguments, copy.deepcopy(batch)))
        return batch

    with contextlib.ExitStack() as stack:
        stack.enter_context(before(module, "update", look_at_update))
        stack.enter_context(before(Run, "optimizer_step", look_at_step))
        stack.enter_context(before(train_rm, "normalise", look_at_answers))
        if script not in ANSWERS:
            stack.enter_context(before(module, "minibatch_loss", look_at_minibatch))
            stack.enter_context(mock.patch.object(module, "rollout", rollout))
        module.main(config)
    ran.lines = read_metrics(folder / "out")
    return ran


def runs_in(workshop, new_folder):
    """runs("dpo") is what that run of RUNS did. It is made when it is asked for, once."""
    return functools.cache(lambda name: watch(name, workshop, new_folder()))


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    return runs_in(workshop, lambda: tmp_path_factory.mktemp("run"))


def fingerprints(batch):
    """A number per sampled answer, by which it is found again whatever its padding."""
    return batch.logprobs.sum(1).tolist()


# ----------------------------------------------------------------------------------------------------- the definitions


def encode(prompt, answer) -> Example:
    t = TOKENIZER
    question, response = [t.user, *t.encode(prompt), t.assistant], [*t.encode(answer), t.end]
    return Example(question + response, [False] * len(question) + [True] * len(response))


def encoded(records, *keys):
    """The records as rows: a tuple of the Examples with the answers under these keys."""
    return [tuple(encode(record["prompt"], record[key]) for key in keys) for record in records]


def as_rows(batch):
    """What an update learns from, examples or pairs, as such tuples."""
    return [(row,) if isinstance(row, Example) else (row.chosen, row.rejected) for row in batch]


def ids_of(row):
    return tuple(tuple(example.ids) for example in row)


@torch.no_grad()
def logprob(model, example):
    """log pi(answer | prompt) of one row by itself: softmax of all logits, then a sum over the answer's tokens."""
    logp = model.logits(model(torch.tensor([example.ids])))[0].log_softmax(-1)
    return sum(logp[t - 1, token].item() for t, token in enumerate(example.ids) if example.mask[t])


@torch.no_grad()
def reward_of(model, example):
    """The scalar head at the last token of one row by itself."""
    return model.scalar(model(torch.tensor([example.ids])))[0, -1].item()


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def softplus(x):
    """-log sigma(-x)"""
    return math.log1p(math.exp(x))


def sft_loss(model, rows):
    return -sum(logprob(model, example) for (example,) in rows) / sum(sum(example.mask) for (example,) in rows)


def rm_statistics(model, rows):
    margins = [reward_of(model, chosen) - reward_of(model, rejected) for chosen, rejected in rows]
    accuracy = mean(float(margin > 0) for margin in margins)
    return {"loss": mean(softplus(-m) for m in margins), "accuracy": accuracy, "margin": mean(margins)}


def dpo_rewards(policy, reference, rows, beta):
    logps = torch.tensor([[logprob(policy, side) for side in row] for row in rows])  # (B, 2): chosen, rejected
    moved = logps - torch.tensor([[logprob(reference, side) for side in row] for row in rows])
    (chosen, rejected), (logp_chosen, logp_rejected) = (beta * moved.mean(0)).tolist(), logps.mean(0).tolist()
    names = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    return names | {"logps/chosen": logp_chosen, "logps/rejected": logp_rejected}


def dpo_loss(policy, reference, rows, beta):
    each = (dpo_rewards(policy, reference, [row], beta)["rewards/margins"] for row in rows)
    return {"loss": mean(softplus(-margin) for margin in each)}


def final(ran) -> GPT:
    """The model that the run wrote, in double precision."""
    return load_model(ran.config.out, reward=None)[0].double()


def initial(ran) -> GPT:
    """The model that the run started from, in double precision."""
    return load_model(ran.config.init)[0].double()


def assert_logged(line, expected, prefix=""):
    for name, value in expected.items():
        at_most(abs(line[prefix + name] - value) / max(1.0, abs(value)), 2e-4)  # logged in single precision


# ------------------------------------------------------------------------------------------------ what is learned from

TALK = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "the d")]


def test_the_targets_of_a_record_are_the_answers_and_their_ends_whatever_its_shape():
    """The whole contract of the mask, to the token. A text cannot contain an end token, whatever it says."""
    t = TOKENIZER
    end = "the <|end|>"
    roles = {"system": t.system, "user": t.user, "assistant": t.assistant}
    turns = [[roles[role], *t.encode(content), *[t.end] * (role == "assistant")] for role, content in TALK]
    records = [
        ({"prompt": end, "completion": end}, [[t.user, *t.encode(end), t.assistant, *t.encode(end), t.end]], [end]),
        ({"messages": [{"role": r, "content": c} for r, c in TALK]}, turns, ["b", "the d"]),
    ]
    for record, ids, answers in records:
        example = encode_example(t, "", record)
        assert example.ids == sum(ids, []) and len(example.mask) == len(example.ids)
        targets = [token for token, target in zip(example.ids, example.mask) if target]
        assert targets == sum(([*t.encode(answer), t.end] for answer in answers), [])
    assert t.end not in t.encode(end) and t.decode(t.encode(end)) == end
    text = encode_example(t, "", {"text": "the d"})
    assert text.ids == [t.eot, *t.encode("the d"), t.eot] and text.mask == [False] + [True] * (len(text.ids) - 1)


# ----------------------------------------------------------------------------------------- steps, rates, the optimizer


@pytest.mark.parametrize("script", ANSWERS)
def test_every_record_is_learned_once_per_epoch_and_the_epochs_differ(script, runs):
    """2 epochs over 40 records in batches of 15: 6 steps, the rest of 10 included."""
    updates = runs(script).updates
    assert len(updates) == 6
    batches = [[ids_of(row) for row in as_rows(update.rows)] for update in updates]
    everything = [ids_of(row) for row in encoded(TRAIN, *ANSWERS[script])]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(map(len, epoch)) == [10, 15, 15]
        assert Counter(sum(epoch, [])) == Counter(everything)
    first, second = ({frozenset(batch) for batch in epoch} for epoch in (batches[:3], batches[3:]))
    assert first != second and frozenset(everything[:15]) not in first  # shuffled, not in the order of the file


@pytest.mark.parametrize("script", ANSWERS)
def test_the_targets_of_every_step_are_the_answers_and_their_ends(script, runs):
    masks = {ids_of(row): [example.mask for example in row] for row in encoded(TRAIN, *ANSWERS[script])}
    for update in runs(script).updates:
        assert all([example.mask for example in row] == masks[ids_of(row)] for row in as_rows(update.rows))


@pytest.mark.parametrize("script", METHODS)
def test_the_learning_rate_rises_to_its_peak_and_falls_linearly(script, runs):
    ran = runs(script)
    rates = [rate / ran.config.lr for update in ran.updates for rate in update.rates]
    assert rates == pytest.approx(RATES[script])
    assert [line["lr"] for line in ran.trained()] == pytest.approx([update.rates[-1] for update in ran.updates])


@pytest.mark.parametrize("script", METHODS)
def test_the_optimizer_is_adamw_with_the_settings_of_the_field(script, runs):
    """Weight decay is for matrices alone; every parameter is trained, and in one group."""
    ran, wanted = runs(script), dict(ADAMW[script])
    groups = ran.optimizer.param_groups
    weight_decay = wanted.pop("weight_decay")
    assert type(ran.optimizer) is AdamW
    for group in groups:
        assert {name: group[name] for name in ("betas", "eps", "amsgrad")} == wanted | {"amsgrad": False}
    names = {p: name for name, p in ran.model.named_parameters()}
    decay = [(names[p], group["weight_decay"]) for group in groups for p in group["params"]]
    expected = [(name, weight_decay if p.dim() >= 2 else 0.0) for p, name in names.items()]
    assert sorted(decay) == sorted(expected)


@pytest.mark.parametrize("script", METHODS)
def test_the_limit_of_the_gradient_is_the_one_of_the_configuration(script, runs):
    ran = runs(script)
    assert {limit for update in ran.updates for limit in update.limits} == {ran.config.grad_clip}


@pytest.mark.parametrize("script", METHODS)
def test_dropout_is_on_in_sft_and_off_where_log_probabilities_or_rewards_are_compared(script, runs):
    for name in [script] + ["sft with nothing held out"] * (script == "sft"):
        assert {update.training for update in runs(name).updates} == {script == "sft"}


@pytest.mark.parametrize("script", METHODS)
def test_the_defaults_are_those_of_the_field(script, workshop):
    config = workshop.module(script).Config()
    assert {name: getattr(config, name) for name in DEFAULTS[script]} == DEFAULTS[script]


# ------------------------------------------------------------------------------------------------------------------ SFT


def test_sft_from_scratch_starts_at_the_logarithm_of_the_vocabulary(runs):
    """And half the variance of the logits, which is 768 * 0.02**2 whatever the width."""
    ran = runs("sft from scratch")
    for loss in (ran.held_out()[0]["eval/loss"], ran.trained()[0]["loss"]):
        at_most(abs(loss - math.log(TOKENIZER.vocab_size) - 768 * 0.02**2 / 2), 0.2)


def test_sft_loss_is_that_of_the_batch_of_every_step(runs):
    ran = runs("sft")
    for update, line in zip(ran.updates, ran.trained(), strict=True):
        assert_logged(line, {"loss": sft_loss(ran.at(update), as_rows(update.rows))})


def test_sft_held_out_loss_is_that_of_the_held_out_records_before_and_after(runs):
    ran, rows = runs("sft"), encoded(VALID, "completion")
    first, *_, last = ran.held_out()
    assert_logged(first, {"loss": sft_loss(initial(ran), rows)}, "eval/")
    assert_logged(last, {"loss": sft_loss(final(ran), rows)}, "eval/")


# --------------------------------------------------------------------------------------------------------- reward model


def test_rm_begins_with_the_sft_model_and_a_head_of_spread_1_over_the_root_of_d_plus_1(runs):
    """Then rewards have a standard deviation of about 1 over the choice of the head (Stiennon et al.)."""
    ran = runs("rm of a wide model")
    weights = dict(ran.updates[0].weights)
    head = weights.pop("head.weight")
    at_most(abs(head.std() * math.sqrt(257) - 1), 0.15)
    at_most(abs(head.mean() * math.sqrt(257)), 0.2)
    assert weights.pop("head.bias") == 0
    trunk = load_model(ran.config.init)[0].state_dict()
    assert weights.keys() == trunk.keys() and all(torch.equal(weights[name], trunk[name]) for name in trunk)


def test_rm_loss_accuracy_and_margin_are_those_of_the_pairs_of_every_step(runs):
    ran = runs("rm")
    for update, line in zip(ran.updates, ran.trained(), strict=True):
        assert_logged(line, rm_statistics(ran.at(update), as_rows(update.rows)))


def test_rm_held_out_figures_are_those_of_the_untrained_head_and_then_of_the_trained_one(runs):
    ran, rows = runs("rm"), encoded(VALID, "chosen", "rejected")
    assert len(ran.answers) == 30, "it was not normalised"
    first, *_, last = ran.held_out()
    assert_logged(first, rm_statistics(ran.at(ran.updates[0]), rows), "eval/")
    assert_logged(last, rm_statistics(ran.at(ran.unnormalised), rows), "eval/")


def test_rm_is_normalised_on_answers_of_the_model_that_it_started_from(runs):
    """Mean 0 and standard deviation 1 on the answers of the SFT model to the first prompts, by a linear map."""
    ran = runs("rm")
    prompts = [encode(record["prompt"], "").prompt for record in TRAIN[:30]]
    assert [answer.prompt for answer in ran.answers] == prompts
    for answer in ran.answers:
        at_most(abs(answer.logprob - logprob(initial(ran), answer)), 1e-3)
    before, after = ran.at(ran.unnormalised), final(ran)
    raw, rewards = (torch.tensor([reward_of(m, answer) for answer in ran.answers]).double() for m in (before, after))
    at_most(distance(rewards, (raw - raw.mean()) / raw.std(correction=0)), 1e-3)


# ------------------------------------------------------------------------------------------------------------------ DPO


@pytest.mark.parametrize("script", ["dpo", "ipo"])
def test_dpo_starts_with_rewards_of_0_in_training_and_on_held_out_pairs(script, runs):
    ran = runs(script)
    for line, prefix in ((ran.trained()[0], ""), (ran.held_out()[0], "eval/")):
        at_most(max(abs(line[prefix + f"rewards/{name}"]) for name in ("chosen", "rejected", "margins")), 1e-4)
        assert line[prefix + "rewards/accuracies"] < 0.5  # a tie is not right


def test_dpo_starts_at_ln_2_in_training_and_on_held_out_pairs(runs):
    ran = runs("dpo")
    for loss in (ran.trained()[0]["loss"], ran.held_out()[0]["eval/loss"]):
        at_most(abs(loss - math.log(2)), 1e-5)


@pytest.mark.parametrize("script", ["dpo", "ipo"])
def test_dpo_rewards_are_measured_against_the_initial_model_on_the_same_pairs_in_every_step(script, runs):
    ran = runs(script)
    for update, line in zip(ran.updates, ran.trained(), strict=True):
        assert_logged(line, dpo_rewards(ran.at(update), initial(ran), as_rows(update.rows), 0.2))
    assert abs(ran.trained()[-1]["rewards/margins"]) > 0.05  # there is something to see


@pytest.mark.parametrize("script", ["dpo", "ipo"])
def test_dpo_held_out_rewards_are_those_of_the_held_out_pairs(script, runs):
    ran, rows = runs(script), encoded(VALID, "chosen", "rejected")
    assert_logged(ran.held_out()[-1], dpo_rewards(final(ran), initial(ran), rows, 0.2), "eval/")


def test_dpo_loss_is_equation_7_on_the_pairs_of_every_step_and_on_the_held_out_ones(runs):
    ran = runs("dpo")
    for update, line in zip(ran.updates, ran.trained(), strict=True):
        assert_logged(line, dpo_loss(ran.at(update), initial(ran), as_rows(update.rows), 0.2))
    held_out = dpo_loss(final(ran), initial(ran), encoded(VALID, "chosen", "rejected"), 0.2)
    assert_logged(ran.held_out()[-1], held_out, "eval/")


def test_ipo_loss_is_equation_17_on_the_pairs_of_every_step_and_on_the_held_out_ones(runs):
    ran = runs("ipo")

    def loss(policy, rows):
        each = (dpo_rewards(policy, initial(ran), [row], 0.2)["rewards/margins"] for row in rows)
        return {"loss": mean((margin / 0.2 - 1 / 0.4) ** 2 for margin in each)}

    for update, line in zip(ran.updates, ran.trained(), strict=True):
        assert_logged(line, loss(ran.at(update), as_rows(update.rows)))
    assert_logged(ran.held_out()[-1], loss(final(ran), encoded(VALID, "chosen", "rejected")), "eval/")


# ------------------------------------------------------------------------------------------------------------ PPO, GRPO

BOTH = pytest.mark.parametrize("script", ["ppo", "grpo"])


def in_training(ran):
    """(prompts, their ids, noise, batch) of the rollouts that were learned from."""
    for (_, _, prompts, prompt_ids, *_, noise), batch in ran.rollouts:
        if len(prompts) == ran.config.batch_size:
            yield prompts, prompt_ids, noise, batch


def answers_of(batch):
    """The rows of a Batch as Examples."""
    rows = zip(batch.ids.tolist(), batch.mask.tolist(), batch.lengths.tolist())
    return [Example(ids[:length], [False, *mask[: length - 1]]) for ids, mask, length in rows]


def test_ppo_begins_with_ratio_1_kl_0_and_values_0(runs):
    ran = runs("ppo")
    first = ran.trained()[0]
    for name in ("objective/kl", "objective/non_score_reward", "val/first_approxkl"):
        at_most(abs(first[name]), 1e-5)
    assert (ran.updates[0].rows.values == 0).all()
    for line in ran.trained():
        at_most(abs(line["val/first_ratio"] - 1), 1e-5)
        at_most(line["val/first_approxkl"], 1e-9)
    at_most(abs(ran.held_out()[0]["eval/kl"]), 1e-5)


def test_ppo_asks_every_prompt_once_per_epoch_each_time_with_new_random_numbers(runs):
    """4 iterations with 10 of the 40 prompts. What is graded with a prompt was sampled from it."""
    asked, noises = [], []
    for prompts, prompt_ids, noise, batch in in_training(runs("ppo")):
        for prompt, ids, answer in zip(prompts, prompt_ids, answers_of(batch), strict=True):
            assert ids == encode(prompt, "").prompt == answer.prompt
        asked += prompts
        noises.append(noise)
    assert Counter(asked) == Counter(record["prompt"] for record in TRAIN)
    assert asked != [record["prompt"] for record in TRAIN]  # shuffled
    for i, noise in enumerate(noises):
        assert noise.shape == (10, 8) and not any(torch.equal(noise, other) for other in noises[:i])


@BOTH
def test_ppo_makes_epochs_times_minibatches_steps_and_each_epoch_uses_every_answer_once(script, runs):
    ran = runs(script)
    assert len(ran.updates) == 4
    shuffled = 0
    for update in ran.updates:
        assert [len(part) for part in update.parts] == [ran.config.batch_size // 2] * 4 and len(update.rates) == 4
        one, two, three, four = map(sorted, update.parts)
        assert sorted(one + two) == sorted(three + four) == sorted(fingerprints(update.rows))
        shuffled += one not in (three, four)
    assert shuffled >= 3


@BOTH
def test_ppo_learns_from_what_it_has_sampled(script, runs):
    ran = runs(script)
    for update, (*_, batch) in zip(ran.updates, in_training(ran), strict=True):
        assert all(torch.equal(update.rows.tensors()[name], x) for name, x in batch.tensors().items())


@BOTH
def test_ppo_measures_kl_and_entropy_against_the_initial_model_in_every_iteration(script, runs):
    ran = runs(script)
    for update, line in zip(ran.updates, ran.trained(), strict=True):
        answers, policy = answers_of(update.rows), ran.at(update)
        pi, ref = ([logprob(model, answer) for answer in answers] for model in (policy, initial(ran)))
        assert_logged(line, {"objective/kl": mean(pi) - mean(ref), "objective/entropy": -mean(pi)})
    assert abs(ran.trained()[-1]["objective/kl"]) > 0.05  # there is something to see


@BOTH
def test_ppo_scores_are_the_reward_models_and_those_of_unfinished_answers_minus_1(script, runs):
    ran = runs(script)
    judge = load_model(ran.config.reward, reward=True)[0].double()
    for update, line in zip(ran.updates, ran.trained(), strict=True):
        finished = [answer.ids[-1] == TOKENIZER.end for answer in answers_of(update.rows)]
        rewards = [reward_of(judge, answer) for answer in answers_of(update.rows)]
        scores = [reward if end else -1.0 for reward, end in zip(rewards, finished)]
        assert_logged(line, {"objective/scores": mean(scores), "response/ended": mean(map(float, finished))})


def test_ppo_uses_the_beta_that_it_logs_and_adapts_it_to_the_kl_of_the_iteration(runs):
    ran = runs("ppo")
    expected = ran.config.beta
    betas = [beta for (_, _, prompts, _, _, beta, _), _ in ran.rollouts if len(prompts) == 10]
    for beta, line in zip(betas, ran.trained(), strict=True):
        assert beta == pytest.approx(expected) and line["beta"] == pytest.approx(expected, rel=1e-4)
        objective = line["objective/scores"] - beta * line["objective/kl"]
        at_most(abs(line["objective/rlhf_reward"] - objective), 1e-4)
        error = min(max(line["objective/kl"] / 1.0 - 1, -0.2), 0.2)
        expected *= 1 + error * 10 / 100


@BOTH
def test_ppo_held_out_figures_are_those_of_answers_to_the_held_out_prompts(script, runs):
    ran = runs(script)
    held_out = [(prompts, batch) for (_, _, prompts, *_), batch in ran.rollouts if len(prompts) == 36]
    assert all(prompts == [record["prompt"] for record in VALID] for prompts, _ in held_out)
    answers, policy = answers_of(held_out[-1][1]), final(ran)
    kl = mean(logprob(policy, answer) - logprob(initial(ran), answer) for answer in answers)
    assert_logged(ran.held_out()[-1], {"kl": kl}, "eval/")


def test_grpo_begins_with_ratio_1_and_kl_0(runs):
    ran = runs("grpo")
    at_most(abs(ran.trained()[0]["objective/kl"]), 1e-5)
    at_most(abs(ran.held_out()[0]["eval/kl"]), 1e-5)
    for line in ran.trained():
        at_most(abs(line["val/first_ratio"] - 1), 1e-5)


def test_grpo_asks_a_prompt_k_times_side_by_side_and_every_prompt_once_per_epoch(runs):
    """4 iterations with 10 of the 40 prompts, 2 answers each with random numbers of their own."""
    asked, noises = [], []
    for prompts, prompt_ids, noise, batch in in_training(runs("grpo")):
        assert prompts[::2] == prompts[1::2]
        for prompt, ids, answer in zip(prompts, prompt_ids, answers_of(batch), strict=True):
            assert ids == encode(prompt, "").prompt == answer.prompt
        asked += prompts[::2]
        noises += [tuple(row) for row in noise.tolist()]
    assert Counter(asked) == Counter(record["prompt"] for record in TRAIN)
    assert asked != [record["prompt"] for record in TRAIN]  # shuffled
    assert len(noises) == len(set(noises)) == 80 and len(noises[0]) == 8


def test_grpo_logs_the_groups_whose_scores_are_equal(runs):
    ran = runs("grpo")
    for update, line in zip(ran.updates, ran.trained(), strict=True):
        groups = update.rows.scores.view(10, 2).tolist()
        assert_logged(line, {"groups/equal": mean(float(a == b) for a, b in groups)})


def test_ppo_with_a_critic_takes_its_values_from_it_and_trains_both(runs):
    ran = runs("ppo with a critic")
    critic = load_model(ran.config.critic, reward=True)[0]
    batch = ran.updates[0].rows
    values = critic.scalar(critic(batch.ids))[:, :-1].detach() * batch.mask
    at_most((batch.values - values).abs().max(), 1e-5)
    names = {p: f"critic.{name}" for name, p in ran.models.critic.named_parameters()}
    names |= {p: f"policy.{name}" for name, p in ran.models.policy.named_parameters()}
    trained = [names[p] for group in ran.optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(names.values())
    assert ran.model.head is None and all(p.requires_grad for p in ran.models.critic.parameters())
