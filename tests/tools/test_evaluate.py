"""Evaluation and the simulated annotator: KL against an exact enumeration, win rates, errors, and honest labels."""

import json
import math
import os
import random
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

import annotate
import gold
from conftest import contents
from nanopost.checkpoint import load_model, save_model
from nanopost.config import UserError
from nanopost.data import Example
from nanopost.reads_prompt import other_prompts, read_families, reads_prompt
from nanopost.sampling import sample_text
from nanopost.tools import evaluate, parse_temperatures
from nanopost.tools.evaluate import measure, pair_accuracy, print_answers, sequence_logprobs, summary, table

V, END = 5, 4  # a vocabulary whose answers of at most two tokens can all be written down: (end), and 4 x 5 others
LETTERS = SimpleNamespace(end=END, pad=0, decode=lambda ids: "".join("abcde"[i] for i in ids))
PROMPT = [1, 2, 3]


@pytest.fixture
def policy(tiny):
    return tiny(V, seed=1, noise=0.3).eval()


@pytest.fixture
def reference(tiny):
    return tiny(V, seed=2, noise=0.3).eval()


@torch.no_grad()
def answers(model, temperature=1.0) -> dict:
    """{answer: its log-probability} of all answers of at most two tokens to PROMPT."""

    def after(ids):
        return (model.logits(model(torch.tensor([ids])))[0, -1] / temperature).log_softmax(-1).tolist()

    first, out = after(PROMPT), {}
    for a in range(V):
        if a == END:
            out[(a,)] = first[a]
        else:
            for b, logp in enumerate(after(PROMPT + [a])):
                out[(a, b)] = first[a] + logp
    assert sum(map(math.exp, out.values())) == pytest.approx(1.0, abs=1e-5)
    return out


def estimate(model, other, n=6000):
    """(mean, standard error) of the KL estimated from n sampled answers, and their log-probabilities."""
    samples = sample_text(model, LETTERS, [PROMPT] * n, 2, seed=0)
    row = summary(measure(samples, sequence_logprobs(model, samples), sequence_logprobs(other, samples)))
    return row, samples


# --------------------------------------------------------------------------------------------------------- columns


def test_kl_and_entropy_agree_with_an_exact_enumeration(policy, reference):
    p, q = answers(policy), answers(reference)
    kl = sum(math.exp(p[y]) * (p[y] - q[y]) for y in p)
    reverse = sum(math.exp(q[y]) * (q[y] - p[y]) for y in p)
    entropy = -sum(math.exp(p[y]) * p[y] for y in p)
    row, _ = estimate(policy, reference)
    assert abs(row["kl"] - kl) < 4 * row["kl_stderr"] < 0.2 * kl
    assert abs(kl - reverse) > 8 * row["kl_stderr"]  # so that the wrong direction would be noticed
    assert abs(row["entropy"] - entropy) < 4 * row["entropy_stderr"] < 0.1 * entropy


@pytest.mark.parametrize("t", [0.3, 2.0])
def test_at_another_temperature_kl_and_entropy_are_those_of_what_was_sampled_from(policy, reference, t):
    p, q = answers(policy, t), answers(reference)

    def kl_to(q):
        return sum(math.exp(p[y]) * (p[y] - q[y]) for y in p)

    samples = sample_text(policy, LETTERS, [PROMPT] * 6000, 2, temperature=t, seed=0)
    row = summary(measure(samples, sequence_logprobs(policy, samples, t), sequence_logprobs(reference, samples)))
    entropy = -sum(math.exp(p[y]) * p[y] for y in p)
    assert abs(row["kl"] - kl_to(q)) < 4 * row["kl_stderr"]
    assert abs(row["entropy"] - entropy) < 4 * row["entropy_stderr"] + 1e-4
    # what would be measured with one of the temperatures forgotten, or given to the reference too, is far from that
    forgotten = answers(policy)
    assert abs(sum(math.exp(p[y]) * (forgotten[y] - q[y]) for y in p) - kl_to(q)) > 8 * row["kl_stderr"]
    assert abs(kl_to(answers(reference, t)) - kl_to(q)) > 8 * row["kl_stderr"]
    assert abs(-sum(math.exp(p[y]) * forgotten[y] for y in p) - entropy) > 8 * row["entropy_stderr"]


def test_kl_of_a_policy_to_itself_is_exactly_0(policy):
    row, _ = estimate(policy, policy, n=100)
    assert row["kl"] == row["kl_stderr"] == 0.0


def test_sequence_logprobs_are_those_of_the_whole_answer_and_those_it_was_sampled_with(policy):
    p = answers(policy)
    samples = sample_text(policy, LETTERS, [PROMPT] * 50, 2, seed=1)
    for sample, logprob in zip(samples, sequence_logprobs(policy, samples, batch_size=7).tolist()):
        assert logprob == pytest.approx(p[tuple(sample.response)], abs=1e-4)
        assert logprob == pytest.approx(sample.logprob, abs=1e-4)


def make_samples(*ids, ended=True):
    return [Example(PROMPT + i, [False] * len(PROMPT) + [True] * len(i), ended=ended) for i in ids]


ZEROS = torch.zeros(4, dtype=torch.float64)


def test_a_tie_is_half_a_win():
    samples = make_samples([1], [2], [3], [4])
    values = measure(samples, ZEROS, ZEROS, gold=[2.0, 1.0, 0.0, 3.0], reference_gold=[1.0, 1.0, 1.0, 1.0])
    assert values["win_rate"].tolist() == [1.0, 0.5, 0.0, 1.0]
    assert summary(values)["win_rate"] == pytest.approx(0.625)
    assert values["gold"].tolist() == [2.0, 1.0, 0.0, 3.0]


def test_a_difference_by_rounding_is_a_tie():
    values = measure(make_samples([1]), ZEROS[:1], ZEROS[:1], gold=[0.1 + 0.2], reference_gold=[0.3])
    assert values["win_rate"].tolist() == [0.5]


def test_distinct_is_the_number_of_different_answers_over_the_number_of_answers():
    samples = make_samples([1, 2], [1, 2], [1], [1, 2])
    assert summary(measure(samples, ZEROS, ZEROS))["distinct"] == pytest.approx(2 / 4)


def test_length_counts_the_end_token_and_ended_is_a_share():
    samples = make_samples([1, 2, END], [END]) + make_samples([1, 2, 3], [3, 3, 3], ended=False)
    row = summary(measure(samples, ZEROS, ZEROS))
    assert row["length"] == pytest.approx(10 / 4) and row["ended"] == pytest.approx(0.5)


def test_the_standard_error_is_that_of_the_mean():
    x = [1.0, 2.0, 4.0, 9.0]
    row = summary({"gold": torch.tensor(x, dtype=torch.float64)})
    assert row["gold"] == 4.0 and row["gold_stderr"] == pytest.approx(statistics.stdev(x) / 2)
    assert summary({"gold": torch.tensor([3.0])})["gold_stderr"] == 0.0


def test_without_a_judge_there_are_no_columns_of_it():
    samples = make_samples([1], [2], [3], [4])
    assert {"reward", "gold", "win_rate"}.isdisjoint(measure(samples, ZEROS, ZEROS))
    assert "reward" in measure(samples, ZEROS, ZEROS, rewards=torch.ones(4))


def test_the_table_shows_means_with_errors_and_shares_in_percent():
    row = {"stage": "sft", "gold": 1.25, "gold_stderr": 0.125, "ended": 0.5, "ended_stderr": 0.25}
    head, rule, line = table([row]).splitlines()
    assert [c.strip() for c in head.split("|")] == ["", "stage", "gold", "ended", ""]
    assert set(rule) <= set("|- ") and len({len(head), len(rule), len(line)}) == 1
    assert "1.25 ± 0.12" in line and "50.0 ± 25.0%" in line


def test_a_row_without_a_column_has_an_empty_cell_and_a_bound_is_no_measured_kl():
    rows = [
        {"stage": "sft@0", "length": 5.0, "length_stderr": 0.5},
        {"stage": "sft", "kl": 1.0, "kl_stderr": 0.25, "length": 6.0, "length_stderr": 0.5},
        {"stage": "sft best of 4", "kl_bound": 0.636, "length": 7.0, "length_stderr": 0.5},
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows).splitlines()]
    assert cells[0] == ["stage", "kl", "length"]
    assert [line[1] for line in cells[2:]] == ["", "1.00 ± 0.25", "at most 0.64"]
    assert table(rows[:1]).splitlines()[0].split() == ["|", "stage", "|", "length", "|"]


# ------------------------------------------------------------------------------------------- reading the prompt


def test_another_prompt_is_never_the_same_and_of_the_same_family_where_it_has_one():
    prompts = ["a", "b", "c", "d", "a", "e", "f"]
    families = ["x", "x", "y", "y", "x", "y", "alone"]
    for seed in range(20):
        others = other_prompts(prompts, families, seed)
        assert others == other_prompts(prompts, families, seed) and len(others) == len(prompts)
        assert all(prompts[i] != prompts[other] for i, other in enumerate(others))
        assert all(families[i] == families[other] for i, other in enumerate(others[:6]))
    assert len({tuple(other_prompts(prompts, families, seed)) for seed in range(20)}) > 1


def test_without_families_each_prompt_is_the_other_of_exactly_one():
    assert sorted(other_prompts(list("abcdefg"), ["null"] * 7)) == list(range(7))
    with pytest.raises(ValueError, match="all prompts are equal"):
        other_prompts(["a", "a"], ["null"] * 2)


def test_families_are_found_by_the_prompt_and_nothing_after_the_last_one_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "family": "x"}\n{"prompt": "z"}\n{"prompt": "b"}\n{"prompt": "c"}\nbroken\n')
    assert read_families(str(path), ["a", "b", "a"]) == ["x", None, "x"]


def test_reads_prompt_is_the_share_of_answers_that_score_higher_under_their_own_prompt():
    """Four answers: two belong to their prompt, one to neither, one to the other."""
    own, others, said = [[1, 1], [2], [3, 3], [4]], [1, 0, 3, 2], [1, 2, 0, 3]
    samples = [Example(p + [w], [False] * len(p) + [True], text="abcde"[w]) for p, w in zip(own, said)]

    def by_ids(prompts, answers):
        return torch.tensor([float(answer.response[0] in answer.prompt) for answer in answers])

    def by_text(prompts, answers):
        return torch.tensor([float(answer.text in prompt) for prompt, answer in zip(prompts, answers, strict=True)])

    prompts = ["bb", "c", "dd", "e"]
    assert reads_prompt(by_ids, prompts, samples, others) == reads_prompt(by_text, prompts, samples, others) == 2.5 / 4
    assert reads_prompt(lambda prompts, answers: torch.arange(4.0), prompts, samples, others) == 0.5
    assert reads_prompt(lambda prompts, answers: -by_ids(prompts, answers), prompts, samples, others) == 1.5 / 4


# ---------------------------------------------------------------------------------------------- the whole command


@pytest.fixture
def options(workshop):
    return dict(
        policies=[workshop.path("base"), workshop.path("sft")],
        reference=workshop.path("sft"),
        reward=workshop.path("rm"),
        gold=workshop.path("reward.py:vowels"),
        prompts=workshop.path("prompts_valid.jsonl"),
        pairs=workshop.path("pairs_valid.jsonl"),
        max_new_tokens=8,
        samples=3,
        device="cpu",
    )


def report(tmp_path, options, **more):
    evaluate.main(evaluate.Config(**{**options, **more, "json": str(tmp_path / "report.json")}))
    return json.loads((tmp_path / "report.json").read_text())


def test_the_report_has_a_row_for_each_policy_with_every_column_and_its_error(tmp_path, options, capsys):
    result = report(tmp_path, options)
    columns = {"gold", "reward", "win_rate", "kl", "entropy", "length", "ended", "distinct"}
    assert [row["stage"] for row in result["rows"]] == ["base", "sft"]
    for row in result["rows"]:
        assert row.keys() == {"stage", "temperature"} | columns | {f"{name}_stderr" for name in columns}
        assert all(isinstance(row[name], float) and math.isfinite(row[name]) for name in columns)
    assert 0 <= result["rm_accuracy"] <= 1 and result["rm_accuracy_ceiling"] is None
    assert result["seconds"] >= 0
    out = capsys.readouterr().out
    assert "answers to each: 3" in out and "win_rate" in out


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_kept_copy_is_named_after_its_run_and_its_step(tmp_path, workshop, options, slash, capsys):
    folders = [tmp_path / name for name in ("ppo/step-10", "dpo/step-10", "ppo", "step-by")]
    for folder in folders:
        shutil.copytree(workshop.path("sft"), folder, dirs_exist_ok=True)
    rows = report(tmp_path, options, policies=[f"{folder}{slash}" for folder in folders], show=1)["rows"]
    assert [row["stage"] for row in rows] == ["ppo/step-10", "dpo/step-10", "ppo", "step-by"]
    out = capsys.readouterr().out
    assert "| ppo/step-10 |" in out and "| ppo         |" in out
    assert "\n  ppo/step-10 " in out and "\n          ppo " in out  # the answers stand below each other


JUDGE = """
def score(prompts, texts):
    return [sum(c in prompt for c in text) + len(text) / 100 for prompt, text in zip(prompts, texts, strict=True)]
"""


@pytest.fixture
def asked(workshop, tokenizer):
    """The ids of the held-out prompts, three times over: what three answers per prompt are sampled from."""
    prompts = [f"Say {w}!" for w in ("cat", "dog", "sun", "moon", "tree")] * 3
    return prompts, [tokenizer.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]


def test_each_policy_has_a_row_for_each_temperature_with_its_own_kl_and_entropy(
    tmp_path, workshop, options, asked, tokenizer, capsys
):
    result = report(tmp_path, options, policies=[workshop.path("base")], temperature="0,0.5,1")
    cold, half, plain = result["rows"]
    assert [row["stage"] for row in result["rows"]] == ["base@0", "base@0.5", "base"]
    assert [row["temperature"] for row in result["rows"]] == [0, 0.5, 1]
    assert {"kl", "entropy", "kl_stderr", "entropy_stderr"}.isdisjoint(cold) and "gold" in cold and "win_rate" in cold
    reference = load_model(workshop.path("sft"))[0]
    greedy = sample_text(load_model(workshop.path("base"))[0], tokenizer, asked[1][:5], 8, temperature=0)
    golds = evaluate.load_function(options["gold"])(asked[0][:5], [answer.text for answer in greedy])
    assert cold["gold"] == pytest.approx(sum(golds) / 5)
    for row, t in ((half, 0.5), (plain, 1.0)):
        answers = sample_text(load_model(workshop.path("base"))[0], tokenizer, asked[1], 8, temperature=t)
        sampled = torch.tensor([answer.logprob for answer in answers], dtype=torch.float64)
        assert row["kl"] == pytest.approx((sampled - sequence_logprobs(reference, answers)).mean().item(), abs=1e-3)
        assert row["entropy"] == pytest.approx(-sampled.mean().item(), abs=1e-3)
        of_prompts = sampled.view(3, 5).mean(0)  # the three answers to a prompt are not independent
        assert row["entropy_stderr"] == pytest.approx((of_prompts.std() / 5**0.5).item(), abs=1e-3)
    assert report(tmp_path, options, policies=[workshop.path("base")])["rows"] == [plain]
    assert report(tmp_path, options, policies=[workshop.path("base")], temperature="0")["rows"] == [cold]
    assert "| base@0.5 |" in capsys.readouterr().out


def test_best_of_n_is_the_highest_reward_of_every_n_answers_of_the_reference(
    tmp_path, workshop, options, asked, tokenizer, capsys
):
    (tmp_path / "judge.py").write_text(JUDGE)
    judge = f"{tmp_path / 'judge.py'}:score"
    rows = report(tmp_path, options, reward=judge, gold=judge, pairs="", best_of=4, temperature="0.5")["rows"]
    assert [row["stage"] for row in rows] == ["base@0.5", "sft@0.5", "sft best of 4"]
    prompts, ids = (x[:5] for x in asked)  # one set of answers: --samples 3 does not matter
    answers = sample_text(load_model(workshop.path("sft"))[0], tokenizer, ids * 4, 8, seed=2)
    scores = evaluate.load_function(judge)(prompts * 4, [answer.text for answer in answers])
    best = torch.tensor(scores).view(4, -1).max(0).values.mean().item()
    assert rows[-1]["reward"] == pytest.approx(best) and rows[-1]["gold"] == pytest.approx(best)
    assert best > torch.tensor(scores).mean().item()
    assert {"kl", "entropy"}.isdisjoint(rows[-1]) and rows[-1]["temperature"] == 1
    assert rows[-1]["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert "at most 0.64" in capsys.readouterr().out


def test_how_often_the_reward_reads_the_prompt_is_in_the_report_and_printed(tmp_path, options, capsys):
    assert 0 <= report(tmp_path, options)["reads_prompt"] <= 1
    assert "reads_prompt" not in report(tmp_path, options, reward="", pairs="")
    capsys.readouterr()
    (tmp_path / "judge.py").write_text("def score(prompts, texts):\n    return [len(text) for text in texts]\n")
    blind = report(tmp_path, options, reward=f"{tmp_path / 'judge.py'}:score", pairs="")["reads_prompt"]
    assert blind == 0.5 and "reads the prompt: 50% (" in capsys.readouterr().out


def test_the_answers_of_the_reference_are_graded_under_another_prompt_of_the_file(
    tmp_path, workshop, options, asked, tokenizer
):
    (tmp_path / "judge.py").write_text(JUDGE)
    judge = f"{tmp_path / 'judge.py'}:score"
    prompts, ids = asked
    others = other_prompts(prompts[:5], ["null"] * 5, seed=0)
    texts = [a.text for a in sample_text(load_model(workshop.path("sft"))[0], tokenizer, ids, 8, seed=1)]
    score = evaluate.load_function(judge)
    own, other = score(prompts, texts), score([prompts[i] for i in others] * 3, texts)
    expected = statistics.fmean((a > b) + 0.5 * (a == b) for a, b in zip(own, other))
    assert report(tmp_path, options, reward=judge, pairs="")["reads_prompt"] == pytest.approx(expected) != 0.5


def test_a_single_prompt_has_no_other_one(tmp_path, options):
    assert "reads_prompt" not in report(tmp_path, options, limit=1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a", "numbers separated by commas"),
        ("", "numbers separated by commas"),
        ("0,,1", "numbers separated by commas"),
        ("-1", "0 or at least 1e-6"),
        ("nan", "0 or at least 1e-6"),
        ("inf", "finite"),
        ("1,0.5,1.0", "twice"),
        ("0,-0", "twice"),
    ],
)
def test_temperatures_that_are_none_are_told_in_one_line(text, message):
    with pytest.raises(UserError, match=f"--temperature.*{message}"):
        parse_temperatures(text)


def test_the_reference_itself_has_kl_0_and_another_policy_more(tmp_path, options):
    base, sft = report(tmp_path, options)["rows"]
    assert sft["kl"] == 0.0 and base["kl"] > 1


def test_wins_are_counted_against_answers_of_the_reference_to_the_same_prompts_from_another_seed(
    tmp_path, workshop, options, monkeypatch, tokenizer
):
    calls = []

    def judge(prompts, texts):
        calls.append((prompts, texts))
        return [float(len(text)) for text in texts]

    monkeypatch.setattr(evaluate, "load_function", lambda spec: judge)
    row = report(tmp_path, options, gold="judge.py:judge", policies=[workshop.path("base")])["rows"][0]
    prompts = [f"Say {w}!" for w in ("cat", "dog", "sun", "moon", "tree")] * 3
    ids = [tokenizer.prompt([{"role": "user", "content": p}]) for p in prompts]

    def texts(name, seed):
        return [s.text for s in sample_text(load_model(workshop.path(name))[0], tokenizer, ids, 8, seed=seed)]

    of_reference, of_base = texts("sft", 1), texts("base", 0)
    assert calls == [(prompts, of_reference), (prompts, of_base)]
    wins = [(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in zip(of_base, of_reference)]
    assert row["win_rate"] == pytest.approx(sum(wins) / len(wins)) and row["win_rate"] > 0.5


def test_a_report_is_the_same_for_the_same_seed(tmp_path, options):
    assert report(tmp_path, options)["rows"] == report(tmp_path, options)["rows"]
    assert report(tmp_path, options, seed=5)["rows"] != report(tmp_path, options)["rows"]


def test_the_highest_gold_reward_is_reported_where_the_function_says_it(tmp_path, options):
    (tmp_path / "judge.py").write_text("GOLD_MAX = 5.0\ndef score(prompts, texts):\n    return [1.0] * len(texts)\n")
    assert report(tmp_path, options, gold=str(tmp_path / "judge.py:score"))["gold_max"] == 5.0
    assert report(tmp_path, options)["gold_max"] is None
    assert report(tmp_path, options, gold="")["gold_max"] is None


def test_pair_accuracy_is_the_share_of_judgements_ranked_right_and_its_ceiling_the_mean_of_max_p(
    workshop, tokenizer, lines
):
    model = load_model(workshop.path("rm"), reward=True)[0].eval()
    pairs = [json.loads(line) for line in (workshop.folder / "pairs_valid.jsonl").read_text().splitlines()]
    probabilities = [0.9, 0.2, 0.5, 1.0, 0.4]
    path = lines([{**pair, "probability": p} for pair, p in zip(pairs, probabilities)])

    def score(pair, side):
        messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
        ids, _ = tokenizer.chat(messages)
        return model.score(torch.tensor([ids]), torch.tensor([len(ids)])).item()

    right = [score(pair, "chosen") > score(pair, "rejected") for pair in pairs]
    assert True in right and False in right
    accuracy, ceiling = pair_accuracy(model, tokenizer, path)
    assert accuracy == pytest.approx(sum(p if ok else 1 - p for p, ok in zip(probabilities, right)) / 5)
    assert ceiling == pytest.approx((0.9 + 0.8 + 0.5 + 1.0 + 0.6) / 5)
    # a pair without a probability counts whole, and the best possible accuracy is not known
    half = lines([*({**pair, "probability": p} for pair, p in zip(pairs[:2], probabilities)), *pairs[2:]])
    accuracy, ceiling = pair_accuracy(model, tokenizer, half)
    expected = sum(p if ok else 1 - p for p, ok in zip(probabilities[:2] + [1, 1, 1], right)) / 5
    assert accuracy == pytest.approx(expected) and ceiling is None


def test_a_pair_with_two_equal_scores_is_not_ranked_right(workshop, tokenizer, lines):
    model = load_model(workshop.path("rm"), reward=True)[0].eval()
    torch.nn.init.zeros_(model.head.weight)
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c", "probability": p} for p in (0.2, 0.9)]
    assert pair_accuracy(model, tokenizer, lines(pairs)) == (0.0, pytest.approx(0.85))


def test_a_pair_that_is_of_no_use_counts_in_neither_accuracy(workshop, tokenizer, lines):
    model = load_model(workshop.path("rm"), reward=True)[0].eval()
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "probability": 0.8}
    useless = [pair | {"chosen": "c", "probability": 0.5}, pair | {"chosen": "b " * 999, "probability": 1}]
    assert pair_accuracy(model, tokenizer, lines([pair, *useless])) == pair_accuracy(model, tokenizer, lines([pair]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"policies": ["nowhere"]}, "no folder nowhere"),
        ({"policies": ["other_vocab"]}, "different vocabularies"),
        ({"reference": "rm"}, "holds a reward model"),
        ({"reward": "sft"}, "holds a language model"),
        ({"reward": ""}, "--pairs measures a reward model"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"temperature": "-1"}, "--temperature"),
        ({"show": -1}, "--show"),
        ({"temperature": "1,a"}, "--temperature"),
        ({"best_of": 1}, "--best-of must be at least 2"),
        ({"best_of": -2}, "--best-of"),
        ({"reward": "judge.py:f"}, "--pairs measures a reward model"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"gold": "nowhere.py:f"}, "no file nowhere.py"),
        ({"prompts": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"max_new_tokens": 48}, "lower --max-new-tokens"),
        ({"temperature": "1e-30"}, "--temperature must be 0 or at least 1e-6"),
        ({"pairs": "nowhere.jsonl"}, "no file nowhere.jsonl"),
    ],
)
def test_a_mistake_is_a_user_error_and_no_report_is_written(tmp_path, workshop, options, change, message):
    [(name, value)] = change.items()
    if value in (["other_vocab"], "rm", "sft"):
        value = [workshop.path(value[0])] if isinstance(value, list) else workshop.path(value)
    with pytest.raises(UserError, match=message):
        report(tmp_path, options, **{name: value})
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("p", ["0.5", 2, -0.1, None, [1], float("nan"), float("inf")], ids=str)
def test_a_probability_that_is_none_is_told_with_its_line(tmp_path, options, lines, workshop, p):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = lines([{**good, "probability": 1}, {**good, "probability": p}])
    with pytest.raises(UserError, match=r"data.jsonl:2: probability must be a number between 0 and 1, not "):
        report(tmp_path, options, pairs=pairs)


def test_best_of_n_needs_a_reward(options):
    with pytest.raises(UserError, match="--best-of .* give --reward"):
        evaluate.Config(**options | {"reward": "", "pairs": "", "best_of": 4})


def test_broken_weights_are_an_error_when_decoding_is_greedy_too(tmp_path, options, tiny, tokenizer):
    model = tiny(tokenizer.vocab_size)
    with torch.no_grad():
        model.ln_f.bias[0] = math.nan
    save_model(str(tmp_path / "nan"), model, tokenizer, {})
    with pytest.raises(UserError, match="not finite"):
        report(tmp_path, options, policies=[str(tmp_path / "nan")], temperature="0", pairs="")


@pytest.mark.parametrize("judge", [False, True])
def test_weights_that_are_not_finite_are_an_error_and_no_row(tmp_path, options, workshop, tiny, tokenizer, judge):
    model = tiny(tokenizer.vocab_size, scalar_head=judge)
    with torch.no_grad():
        model.ln_f.bias[0] = math.nan
    save_model(str(tmp_path / "nan"), model, tokenizer, {})
    broken = {"reward": str(tmp_path / "nan")} if judge else {"policies": [str(tmp_path / "nan")]}
    with pytest.raises(UserError, match="nan"):
        report(tmp_path, options, **broken, pairs="")
    assert not (tmp_path / "report.json").exists()


def test_the_answers_are_shown_without_control_characters(capsys):
    print_answers(["\x1b[2J"], [("sft", [SimpleNamespace(text="a\r\x07b")], {})])
    assert capsys.readouterr().out == "\n\\x1b[2J\n       sft  a\\r\\x07b\n"


@pytest.mark.parametrize("name", ["", "folder/", "pipe"])
def test_a_report_that_can_be_no_file_is_refused_before_anything_is_measured(tmp_path, options, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="--json must name a file, not"):
        evaluate.main(evaluate.Config(**options, json=f"{tmp_path}/{name}"))


def test_a_highest_gold_reward_that_is_no_number_is_none(tmp_path, options):
    (tmp_path / "judge.py").write_text("GOLD_MAX = {3}\ndef score(prompts, texts):\n    return [1.0] * len(texts)\n")
    assert report(tmp_path, options, gold=str(tmp_path / "judge.py:score"))["gold_max"] is None


# -------------------------------------------------------------------------------------------------- the annotator


def test_a_preference_is_the_sigmoid_of_the_difference_over_the_temperature():
    assert annotate.preference(3.0, 1.0, 0.5) == pytest.approx(1 / (1 + math.exp(-4.0)))
    assert annotate.preference(1.0, 1.0, 2.0) == 0.5
    assert annotate.preference(2.0, 5.0, 1.0) == pytest.approx(1 - annotate.preference(5.0, 2.0, 1.0))
    assert annotate.preference(1e6, 0.0, 0.1) == pytest.approx(1.0) and annotate.preference(0.0, 1e6, 0.1) < 1e-9


@pytest.fixture
def judged_by_length(monkeypatch):
    """The gold reward of an answer is its length."""
    monkeypatch.setattr(annotate, "score", lambda prompts, texts: [float(len(text)) for text in texts])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_labels_follow_the_bradley_terry_frequencies(judged_by_length, temperature):
    n = 4000
    answers = [("aaa", "b")] * n + [("c", "ddd")] * n  # the better one first, then second
    records = list(annotate.label(["p"] * 2 * n, answers, temperature, random.Random(0)))
    p = 1 / (1 + math.exp(-2 / temperature))
    for half, better in ((records[:n], "aaa"), (records[n:], "ddd")):
        frequency = sum(r["chosen"] == better for r in half) / n
        assert abs(frequency - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_a_record_keeps_its_two_answers_and_the_probability_of_the_choice_made(judged_by_length):
    p = 1 / (1 + math.exp(-2.0))
    records = list(annotate.label(list("pq" * 50), [("aaa", "b")] * 100, 1.0, random.Random(0)))
    assert [r["prompt"] for r in records] == list("pq" * 50)
    assert {r["chosen"] for r in records} == {"aaa", "b"}
    for r in records:
        assert {r["chosen"], r["rejected"]} == {"aaa", "b"}
        assert r["probability"] == pytest.approx(p if r["chosen"] == "aaa" else 1 - p)


@pytest.fixture
def annotator(workshop, tmp_path, judged_by_length):
    def run(**options):
        annotate.main(
            annotate.Config(
                **{
                    **dict(
                        policy=workshop.path("sft"),
                        prompts=workshop.path("prompts.jsonl"),
                        max_new_tokens=8,
                        device="cpu",
                        valid_prompts=workshop.path("prompts_valid.jsonl"),
                        out=str(tmp_path / "prefs"),
                        temperature=1.0,
                        pairs=40,
                        valid_pairs=20,
                    ),
                    **options,
                }
            )
        )
        files = (tmp_path / "prefs" / "train.jsonl", tmp_path / "prefs" / "valid.jsonl")
        return [[json.loads(line) for line in path.read_text().splitlines()] for path in files]

    return run


def test_the_annotator_writes_two_files_of_pairs_for_the_reward_model_and_dpo(annotator, workshop, tmp_path, capsys):
    train, valid = annotator()
    assert 0 < len(valid) < 20 and len(valid) < len(train) < 40  # those with an unfinished or empty answer are left out
    for record in train + valid:
        assert record.keys() == {"prompt", "chosen", "rejected", "probability"}
        assert record["chosen"] != record["rejected"] and record["chosen"].strip() and record["rejected"].strip()
        p = annotate.preference(len(record["chosen"]), len(record["rejected"]), 1.0)
        assert record["probability"] == pytest.approx(p)
    ceiling = sum(max(r["probability"], 1 - r["probability"]) for r in valid) / len(valid)
    assert f"{ceiling:.1%}" in capsys.readouterr().out
    for script in ("rm", "dpo"):
        workshop.run(
            script,
            tmp_path / script,
            data=str(tmp_path / "prefs" / "train.jsonl"),
            valid=str(tmp_path / "prefs" / "valid.jsonl"),
            steps=1,
        )


def test_the_annotator_is_the_same_for_the_same_seed_and_its_two_answers_are_two_samples(annotator):
    first = annotator(seed=1)
    assert annotator(seed=1) == first != annotator(seed=2)


def test_an_annotator_without_noise_always_prefers_the_better_answer(annotator):
    for record in annotator(temperature=1e-6)[0]:
        assert len(record["chosen"]) >= len(record["rejected"])


def test_the_training_pairs_are_put_to_the_vote_and_the_held_out_ones_are_not(annotator, monkeypatch):
    asked = []
    real = annotate.label
    monkeypatch.setattr(annotate, "label", lambda *a: asked.append((len(a[0]), a[4])) or real(*a))
    train, valid = annotator(votes=5)
    assert asked == [(len(train), 5), (len(valid), 1)]


def test_held_out_answers_are_sampled_with_other_random_numbers(annotator, monkeypatch):
    seeds = []
    real = annotate.sample_text
    monkeypatch.setattr(annotate, "sample_text", lambda *a, seed: seeds.append(seed) or real(*a, seed=seed))
    annotator(seed=3)
    assert len(seeds) == len(set(seeds)) == 2


def test_no_more_pairs_are_made_than_asked_for(annotator):
    train, valid = annotator(pairs=5, valid_pairs=40)
    assert 0 < len(train) <= 5 < len(valid)


def test_the_annotator_refuses_a_temperature_of_0(annotator, tmp_path):
    with pytest.raises(UserError, match="--temperature"):
        annotator(temperature=0.0)
    assert not (tmp_path / "prefs").exists()


def test_the_annotator_says_so_when_no_pair_is_left(annotator, workshop):
    with pytest.raises(UserError):
        annotator(policy=workshop.path("base"), max_new_tokens=1)  # one token: an empty answer, or one without an end


def test_prompts_of_another_world_are_told_in_one_line(annotator, workshop, monkeypatch, tmp_path):
    monkeypatch.setattr(annotate, "score", gold.score)
    with pytest.raises(UserError, match="prompts.jsonl: the gold reward cannot judge it: "):
        annotator()
    assert list((tmp_path / "prefs").iterdir()) == []


def test_the_two_files_of_the_annotator_belong_together(annotator, tmp_path, monkeypatch):
    annotator()
    before = contents(tmp_path / "prefs")
    with pytest.raises(UserError):
        annotator(seed=1, valid_prompts="nowhere.jsonl")
    assert contents(tmp_path / "prefs") == before


def test_the_standard_error_is_that_of_independent_prompts_not_of_their_answers():
    """Two prompts, three answers each, all alike within a prompt: the values 0 and 1 have a standard error of 1/2."""
    row = summary({"gold": torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)}, samples=3)
    assert row == {"gold": pytest.approx(0.5), "gold_stderr": pytest.approx(0.5)}


def test_greedy_answers_are_as_distinct_however_often_they_are_decoded(tmp_path, options):
    shares = []
    for samples in (1, 3):
        rows = report(tmp_path, options, temperature="0", samples=samples, pairs="")["rows"]
        shares.append([row["distinct"] for row in rows])
    assert shares[0] == pytest.approx(shares[1]) and max(shares[0]) > 0.5
