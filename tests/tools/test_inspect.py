"""The page of `nanopost inspect`: the numbers in it are those that training computes, and its text stays text."""

import base64
import json
import re

import numpy as np
import pytest
import torch

import train_dpo
import train_ppo
import train_sft
from conftest import one_line
from nanopost.checkpoint import load_model
from nanopost.config import UserError
from nanopost.data import collate, load_examples, load_pairs
from nanopost.reward import load_reward_model
from nanopost.sampling import generate
from nanopost.tools import inspect

GOLD = """
def explain(prompt, completion):
    if "?" in prompt:
        raise ValueError(f"{prompt} is no order")
    return {"length": len(completion) / 10, "<b>": 1.0}

def score(prompts, completions):
    return [sum(explain(*both).values()) for both in zip(prompts, completions)]
"""


@pytest.fixture(scope="session")
def runs(workshop, tmp_path_factory):
    """runs("ppo"): folders of short runs on the toy data; DPO and PPO have kept copies."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "gold.py").write_text(GOLD)
    for script, options in {
        "sft": {},
        "dpo": {"init": str(folder / "sft"), "keep_every": 2, "beta": 0.4},
        "ppo": {"init": str(folder / "sft"), "keep_every": 2, "beta": 0.2, "lam": 0.9, "missing_end_score": -3.0},
    }.items():
        workshop.run(script, folder / script, **options)
    return lambda name: str(folder / name)


@pytest.fixture(scope="session")
def pages():
    """{options: page} of what has been written."""
    return {}


@pytest.fixture
def page(workshop, runs, tmp_path, pages):
    """page(**options) -> (the file, the data in it). The same options are not computed again, but for another `out`."""

    def page(**options):
        defaults = dict(
            policies=[runs("sft"), runs("dpo"), runs("ppo")], reference=runs("sft"), reward=workshop.path("rm"),
            gold=runs("gold.py") + ":score", prompts=workshop.path("prompts_valid.jsonl"), max_new_tokens=8, fit=20,
            demonstrations=workshop.path("sft_valid.jsonl"), pairs=workshop.path("pairs_valid.jsonl"),
            out=str(tmp_path / "new" / "page.html"),
        )  # fmt: skip
        config = inspect.Config(**defaults | options)
        if repr(options) not in pages:
            inspect.main(config)
            with open(config.out, encoding="utf-8") as f:
                pages[repr(options)] = f.read()
        html = pages[repr(options)]
        return html, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])

    return page


def close(a, b, within=1e-4):
    a, b = (np.asarray(x.tolist() if isinstance(x, torch.Tensor) else x, dtype=float) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=within)


def models_of(data):
    return {found["name"].split("/")[-1]: found for found in data["models"]}


def each_answer(data):
    """(name, what is known of the model, prompt ids, answer) of every answer of the final models."""
    for name, found in models_of(data).items():
        for prompt, answer in zip(data["prompts"], found["answers"], strict=True):
            yield name, found, prompt, answer


# ---------------------------------------------------------------------------------------------------- the numbers


def test_log_probabilities_and_ratios_are_those_of_the_models(page, runs):
    _, data = page()
    reference, _ = load_model(runs("sft"))
    for name, found, prompt, answer in each_answer(data):
        model, _ = load_model(found["name"])
        ids = torch.tensor([prompt + answer["ids"]])
        index = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        own, theirs = (m.logprobs(m(ids), ids, index)[0, index].detach() for m in (model, reference))
        close(answer["columns"]["logprob"], own)
        close(answer["columns"]["ratio"], own - theirs)
        assert name == "sft" or max(map(abs, answer["columns"]["ratio"])) > 0.01


def test_the_answers_are_sampled_with_the_random_numbers_that_the_page_has(page):
    _, data = page()
    noise = torch.tensor(data["noise"][0]).repeat(len(data["prompts"]), 1)
    for found in data["models"]:
        model, tokenizer = load_model(found["name"])
        batch = generate(model, data["prompts"], 8, tokenizer.end, noise=noise)
        for row, answer in enumerate(found["answers"]):
            assert answer["ids"] == batch.ids[row, 1:][batch.mask[row]].tolist()
            assert answer["ended"] == bool(batch.ended[row]) == (answer["ids"][-1] == tokenizer.end)


def test_the_score_stands_on_the_last_token_and_the_penalty_on_all(page, workshop, runs):
    _, data = page()
    _, tokenizer = load_model(runs("sft"))
    rm = load_reward_model(workshop.path("rm"), tokenizer, "here", 48, "cpu")
    unfinished = 0
    for name, found, prompt, answer in each_answer(data):
        assert found["beta"] == {"sft": 0.1, "dpo": 0.1, "ppo": 0.2}[name]  # PPO's own, else --beta
        ids = torch.tensor([prompt + answer["ids"]])
        score = float(rm.score(ids, torch.tensor([ids.shape[1]])))
        if not answer["ended"]:
            score, unfinished = {"ppo": -3.0}.get(name, -1.0), unfinished + 1
        close(answer["score"], score)
        wanted = [-found["beta"] * k for k in answer["columns"]["ratio"]]
        wanted[-1] += score
        close(answer["columns"]["reward"], wanted, 2e-4)
    assert unfinished


def test_advantages_and_returns_are_those_of_gae(page):
    _, data = page()
    for name, _, _, answer in each_answer(data):
        rewards, values = (torch.tensor([answer["columns"][column]]) for column in ("reward", "value"))
        mask = torch.ones_like(rewards, dtype=torch.bool)
        advantages, returns = train_ppo.gae(rewards, values, mask, 1.0, 0.9 if name == "ppo" else 0.95)
        close(answer["columns"]["advantage"], advantages[0], 2e-3)
        close(answer["columns"]["return"], returns[0], 2e-3)
        assert values.abs().max() > 0.01


def test_the_value_head_is_a_ridge_regression_of_the_returns_and_the_rest_checks_it(page, workshop, runs, monkeypatch):
    config = inspect.Config(
        policies=[runs("ppo")], reference=runs("sft"), reward=workshop.path("rm"), fit=40, max_new_tokens=8,
        prompts=workshop.path("prompts_valid.jsonl"),
    )  # fmt: skip
    world, played = inspect.Inspection(config), []
    play = world.play
    monkeypatch.setattr(world, "play", lambda *arguments: played.append(play(*arguments)) or played[-1])
    model = world.models[runs("ppo")]
    explained = world.fit_values(model, world.settings(runs("ppo")))
    [(batch, rewards)] = played
    assert len(batch) == 40
    totals = rewards.flip(1).cumsum(1).flip(1)  # gamma and lambda are 1: all that is still to come
    hidden = model(batch.ids)[:, :-1]
    X, y = hidden[:30][batch.mask[:30]], totals[:30][batch.mask[:30]]
    weights = model.head.weight[0]
    close(X.T @ (y - X @ weights), weights, 1e-2)  # where the gradient of squared errors + |weights|^2 is 0
    X, y = hidden[30:][batch.mask[30:]], totals[30:][batch.mask[30:]]
    assert explained == pytest.approx(float(1 - (y - X @ weights).var() / y.var()), abs=1e-3)


def test_the_exact_kl_and_the_likeliest_tokens_under_every_model(page, runs):
    _, data = page()
    loaded = {found["name"]: load_model(found["name"])[0] for found in data["models"]}
    for _, found, prompt, answer in each_answer(data):
        ids = torch.tensor([prompt + answer["ids"]])
        logp = {
            name: model.logits(model(ids))[0, len(prompt) - 1 : -1].log_softmax(-1) for name, model in loaded.items()
        }
        own, reference = logp[found["name"]], logp[runs("sft")]
        close(answer["columns"]["kl"], (own.exp() * (own - reference)).sum(1).detach())
        for t, (chosen, *top) in enumerate(answer["likely"]):
            assert chosen == answer["ids"][t] and len(top) == 5
            close(own[t, top].detach(), own[t].topk(5).values.detach())
            for name in loaded:
                close(answer["under"][name][t], logp[name][t, [chosen, *top]].exp().detach())


def test_gold_and_its_parts(page):
    _, data = page()
    _, tokenizer = load_model(data["models"][0]["name"])
    for _, _, _, answer in each_answer(data):
        ids = answer["ids"][:-1] if answer["ended"] else answer["ids"]
        length = len(tokenizer.decode(ids)) / 10
        close([answer["gold"], answer["parts"]["length"]], [length + 1, length])


def test_a_demonstration_has_its_mask_and_the_loss_that_sft_computes(page, workshop):
    _, data = page()
    for found in data["models"]:
        model, tokenizer = load_model(found["name"])
        examples = load_examples(workshop.path("sft_valid.jsonl"), tokenizer)
        assert len(data["demonstrations"]) == 4
        for record, example in zip(data["demonstrations"], examples):
            assert (record["ids"], record["mask"]) == (example.ids, example.mask)
            losses = [x for x, target in zip(record["nll"][found["name"]], example.mask[1:], strict=True) if target]
            close(sum(losses) / len(losses), train_sft.batch_loss(model, collate([example])).detach())


def test_a_pair_has_what_dpo_computes_with_the_beta_of_the_run(page, workshop, runs):
    _, data = page()
    reference, tokenizer = load_model(runs("sft"))
    pairs = load_pairs(workshop.path("pairs_valid.jsonl"), tokenizer)
    config = train_dpo.Config(beta=0.4)
    for record, pair in zip(data["pairs"], pairs):
        assert record["beta"] == 0.4
        assert record["prompt"] + record["sides"][0] == pair.chosen.ids
        assert record["prompt"] + record["sides"][1] == pair.rejected.ids
        theirs = train_dpo.reference_logprobs(reference, [pair], "cpu")
        close(record["under"][""]["sums"], theirs[0])
        for found in data["models"]:
            losses, stats = train_dpo.batch_loss(load_model(found["name"])[0], [pair], theirs, config, "cpu")
            under = record["under"][found["name"]]
            close(under["loss"], losses[0].detach())
            close(under["rewards"], [stats["rewards/chosen"][0], stats["rewards/rejected"][0]])
            close(under["sums"], [stats["logps/chosen"][0], stats["logps/rejected"][0]])
            close([sum(side) for side in under["tokens"]], under["sums"], 1e-3)


def test_the_course_goes_from_the_reference_through_the_kept_copies(page, runs):
    _, data = page()
    found = models_of(data)
    assert found["sft"]["course"] == []
    for name in ("dpo", "ppo"):
        course = found[name]["course"]
        assert [stage["step"] for stage in course] == [0, 2, 4]
        for answer, own in zip(course[0]["answers"], found["sft"]["answers"]):
            assert answer["ids"] == own["ids"] and set(answer["columns"]["ratio"]) == {0.0}
        for answer, end in zip(course[2]["answers"], found[name]["answers"]):  # the last step is the end
            assert (answer["ids"], answer["score"], answer["gold"]) == (end["ids"], end["score"], end["gold"])
        ids = torch.tensor([data["prompts"][0] + course[1]["answers"][0]["ids"]])
        model, _ = load_model(runs(f"{name}/step-2"))
        index = torch.arange(len(data["prompts"][0]) - 1, ids.shape[1] - 1)
        close(course[1]["answers"][0]["columns"]["logprob"], model.logprobs(model(ids), ids, index)[0, index].detach())


def test_the_weights_can_be_unpacked_almost_exactly(page):
    _, data = page()
    for found in data["models"]:
        state = load_model(found["name"])[0].state_dict()
        bits, at = base64.b64decode(found["bits"]), 0
        for name, rows, *columns in found["shapes"]:
            scale = np.frombuffer(bits, np.float32, rows, at)
            at += 4 * rows
            x = scale
            if columns:
                x = np.frombuffer(bits, np.int16, rows * columns[0], at).reshape(rows, -1) * scale[:, None]
                at += 2 * x.size
            if name.startswith("head."):  # the fitted values, which the page does not use
                continue
            wanted = state.pop(name)
            close(x, wanted[: found["sizes"]["vocab_size"]], float(wanted.abs().max()) / 60_000)
        assert at == len(bits) and not state


# ---------------------------------------------------------------------------------------------------- what is left out


def test_without_reference_reward_and_gold_their_numbers_are_left_out(page):
    _, data = page(reference="", reward="", gold="")
    for _, found, _, answer in each_answer(data):
        assert answer.keys() == {"ids", "ended", "columns", "likely", "under"}
        assert answer["columns"].keys() == {"logprob"} and found["explained"] is None
        assert all(stage["step"] != 0 for stage in found["course"])
    assert data["pairs"] == [] and data["demonstrations"]


def test_with_a_reference_only_there_are_ratios_and_pairs_but_no_rewards(page):
    _, data = page(reward="", gold="")
    assert all(answer["columns"].keys() == {"logprob", "ratio", "kl"} for *_, answer in each_answer(data))
    assert data["pairs"]


def test_a_reward_that_is_a_program_and_no_values_without_a_fit(page, runs):
    _, data = page(reward=runs("gold.py") + ":score", fit=0)
    for _, _, _, answer in each_answer(data):
        assert answer["columns"].keys() == {"logprob", "ratio", "reward", "kl"}
        if answer["ended"]:
            close(answer["score"], answer["gold"])


def test_models_that_do_not_fit_are_left_out(page, monkeypatch, tmp_path):
    _, data = page()
    size = sum(p.numel() for p in load_model(data["models"][0]["name"])[0].parameters())
    monkeypatch.setattr(inspect, "ROOM", 2 * (size + 20) * 8 // 3)
    _, data = page(out=str(tmp_path / "small.html"))
    assert ["bits" in found for found in data["models"]] == [True, True, False]


def test_one_prompt_of_the_command_line(page):
    _, data = page(prompt="Say the and then!", seed=3)
    _, tokenizer = load_model(data["models"][0]["name"])
    assert data["prompts"] == [tokenizer.prompt([{"role": "user", "content": "Say the and then!"}])]
    assert data["noise"] != page()[1]["noise"]
    assert page(count=2)[1]["prompts"] == page()[1]["prompts"][:2]


def test_two_runs_of_the_same_command_write_the_same_page(page, tmp_path):
    assert page()[0] == page(out=str(tmp_path / "again.html"))[0]


# ------------------------------------------------------------------------------------------------------- the file


def test_the_page_asks_for_nothing_and_text_stays_text(page, lines):
    hostile = "</script><script>\"'<!--\u2028`${1}\U0001f600"
    html, data = page(prompts=lines([{"prompt": hostile}, {"prompt": "Hi"}]))
    _, tokenizer = load_model(data["models"][0]["name"])
    assert tokenizer.decode(data["prompts"][0][1:-1]) == hostile
    assert "default-src 'none'" in html
    inside = html[html.index('id="data">') + 10 :]
    assert "<" not in inside[: inside.index("</script>")]
    assert html.count("<script") == html.count("</script>") == 3 and "alert" not in html.split('id="data"')[0]
    without_namespace = html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//cdn|\bsrc=|@import|url\(|\bfetch\(|XMLHttp|innerHTML|\beval\(", without_namespace)
    assert "{{" not in html.split('id="data"')[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(policies=["nowhere"]), "no folder nowhere"),
        (dict(reference="nowhere"), "no folder nowhere"),
        (dict(reference="other_vocab"), "different vocabularies"),
        (dict(reward="sft"), "holds a language model; here a reward model is needed"),
        (dict(policies=["rm"]), "holds a reward model; here a language model is needed"),
        (dict(gold="nothing.py:score"), "no file nothing.py"),
        (dict(gold="gold.py:score", prompt="Why?"), "Why? is no order"),
        (dict(prompts="nothing.jsonl"), "no file"),
        (dict(prompt="a" * 100), "--prompt has 102 tokens; beside the answer there is room for 40"),
        (dict(max_new_tokens=48), "leaves no room for a prompt"),
        (dict(count=0), "--count must be at least 1"),
        (dict(fit=-1), "--fit must be at least 0"),
        (dict(pairs="nothing.jsonl"), "no file"),
        (dict(demonstrations="nothing.jsonl"), "no file"),
        (dict(out=""), "--out must name a file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_an_earlier_page_as_it_was(page, workshop, runs, tmp_path, options, message):
    out = tmp_path / "page.html"
    out.write_text("earlier")
    for name in options.keys() & {"policies", "reference", "reward", "gold"}:
        value = options[name]
        path = {"rm": workshop.path("rm"), "sft": runs("sft"), "other_vocab": workshop.path("other_vocab")}
        path |= {"gold.py:score": runs("gold.py") + ":score"}
        options = options | {
            name: [path.get(x, x) for x in value] if isinstance(value, list) else path.get(value, value)
        }
    with pytest.raises(UserError) as error:
        page(**{"out": str(out)} | options)
    assert message in one_line(error)
    assert out.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1


def test_numbers_that_are_not_finite_are_found_before_anything_is_written(page, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ppo, "token_rewards", lambda scores, logprobs, *_: logprobs / 0)
    with pytest.raises(UserError, match="finite"):
        page(fit=0, out=str(tmp_path / "page.html"))
    assert list(tmp_path.iterdir()) == []


def test_without_the_training_scripts_it_says_what_to_do(page, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "ROOT", tmp_path)
    with pytest.raises(UserError, match="no training scripts in .*pip install"):
        page(out=str(tmp_path / "none.html"))


def test_the_command_says_where_the_page_is(tool, workshop, runs, tmp_path):
    out = tmp_path / "p.html"
    arguments = ["--prompts", workshop.path("prompts_valid.jsonl"), "--max-new-tokens", 8, "--out", out]
    arguments += ["--demonstrations", "", "--pairs", ""]
    code, said, err = tool("inspect", workshop.path("base"), workshop.path("sft"), *arguments)
    assert (code, err) == (0, "") and out.is_file()
    assert re.fullmatch(rf"{out}: \d\.\d MB after \d+ s; open it in a browser", said.splitlines()[-1])
