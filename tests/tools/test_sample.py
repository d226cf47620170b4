"""Sampling to a file: what is kept is what was asked for, train_sft.py learns from it, best of n is what it says."""

import itertools
import json
import math
import os

import pytest
import torch

from enumerable import kl, random_scores, random_table, table_logprobs
from measured import at_most
from nanopost import sampling
from nanopost.checkpoint import load_model
from nanopost.config import UserError
from nanopost.data import Example, load_examples, load_prompts
from nanopost.reward import load_reward
from nanopost.sampling import generate, sample_text
from nanopost.tools import sample
from nanopost.tools.evaluate import sequence_logprobs
from nanopost.tools.sample import best_of, kl_of_best_of

JUDGES = """
def length(prompts, completions):
    return [float(len(text)) for text in completions]

def tenths(prompts, completions):
    return [len(text) / 10 for text in completions]

def prompt_length(prompts, completions):
    return [float(len(json_of(p))) for p in prompts]

def json_of(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]

def breaks_later(prompts, completions, calls=[]):
    calls.append(1)
    return [1.0] * (len(completions) if len(calls) == 1 else 0)
"""


@pytest.fixture
def judge(tmp_path):
    """judge("length") is the --reward of that function."""
    (tmp_path / "judges.py").write_text(JUDGES)
    return lambda name: f"{tmp_path / 'judges.py'}:{name}"


@pytest.fixture
def run(workshop, tmp_path, capsys):
    """run(**options) -> (the records written, what was printed)."""
    out = tmp_path / "folder" / "samples.jsonl"

    def run(**options):
        defaults = dict(
            policy=workshop.path("sft"),
            prompts=workshop.path("prompts_valid.jsonl"),
            out=str(out),
            max_new_tokens=8,
            device="cpu",
        )
        capsys.readouterr()
        sample.main(sample.Config(**{**defaults, **options}))
        return [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out

    run.out = out
    return run


@pytest.fixture
def seen(monkeypatch):
    """All samples that are drawn, in their order."""
    seen = []

    def record(*args, **options):
        samples = sample_text(*args, **options)
        seen.extend(samples)
        return samples

    monkeypatch.setattr(sample, "sample_text", record)
    return seen


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """scripted(answer): instead of a model answer(prompt ids, how many answers it had before) -> text, None: no end."""

    def script(answer):
        had = {}

        def samples(model, tokenizer, prompts, max_new_tokens, **options):
            out = []
            for ids in prompts:
                text = answer(ids, had.setdefault(tuple(ids), 0))
                had[tuple(ids)] += 1
                ended = text is not None
                text = text if ended else "cut o"
                response = tokenizer.encode(text) + [tokenizer.end] * ended
                mask = [False] * len(ids) + [True] * len(response)
                out.append(Example(ids + response, mask, text, ended, logprob=-1.0))
            return out

        monkeypatch.setattr(sample, "sample_text", samples)

    return script


def asked(prompt):
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


# ---------------------------------------------------------------------------------------------- what is written


def test_sft_reads_every_record_as_the_prompt_the_answer_and_its_end(run, tokenizer, seen):
    records, _ = run(n=30)
    examples = load_examples(str(run.out), tokenizer, 48)
    kept = [s for s in seen if s.ended and s.text.strip()]
    assert len(examples) == len(records) == len(kept) > 10
    as_sampled = 0
    for example, record, s in zip(examples, records, kept):
        prompt, answer = tokenizer.prompt(asked(record["prompt"])), tokenizer.encode(record["completion"])
        assert prompt == s.prompt and record["completion"] == s.text
        assert example.ids == prompt + answer + [tokenizer.end]
        assert example.mask == [False] * len(prompt) + [True] * (len(answer) + 1)
        as_sampled += example.ids == s.ids
    assert as_sampled > 5  # all whose bytes are UTF-8 and whose tokens are those that the tokenizer would choose


@pytest.mark.parametrize("batch_size", [1, 4, 7, 512])
def test_every_prompt_gets_n_answers_in_the_order_of_the_file(run, scripted, tokenizer, batch_size):
    scripted(lambda ids, k: f"{len(ids)} answer {k}")
    records, out = run(n=3, batch_size=batch_size)
    prompts = [f"Say {w}!" for w in ("cat", "dog", "sun", "moon", "tree")]
    assert [r["prompt"] for r in records] == [p for p in prompts for _ in range(3)]
    assert [r["completion"] for r in records] == [
        f"{len(tokenizer.prompt(asked(p)))} answer {k}" for p in prompts for k in range(3)
    ]
    assert all(r.keys() == {"prompt", "completion", "logprob"} for r in records)
    assert "15 of 15 answers to 5 prompts; 0 are unfinished or empty, 0 are below the threshold" in out


def test_how_many_are_sampled_at_a_time_changes_nothing(run):
    answers = [[r["completion"] for r in run(n=3, batch_size=size)[0]] for size in (512, 4, 1)]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_no_more_answers_are_sampled_at_a_time_than_asked_for(run, seen, monkeypatch, batch_size):
    sizes, real = [], sampling.generate

    def generate(model, prompts, *args, **options):
        sizes.append(len(prompts))
        return real(model, prompts, *args, **options)

    monkeypatch.setattr(sampling, "generate", generate)
    run(n=3, batch_size=batch_size)
    assert max(sizes) <= batch_size and sum(sizes) == len(seen) == 15


def test_limit_is_the_number_of_prompts(run, seen):
    run(n=4, limit=2)
    assert len(seen) == 8 and len({tuple(s.prompt) for s in seen}) == 2


def test_conversations_stay_conversations(run, lines, tokenizer):
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "H\u00e9!"}]
    records, _ = run(prompts=lines([{"prompt": talk}, {"prompt": "Hi"}]), n=8)
    assert [r["prompt"] for r in records].count(talk) > 2 and {"Hi"} < {str(r["prompt"]) for r in records}
    start = tokenizer.prompt(talk)
    assert load_examples(str(run.out), tokenizer)[0].ids[: len(start)] == start


def test_the_same_seed_writes_the_same_file_and_another_seed_another(run, workshop):
    options = dict(n=4, reward=workshop.path("rm"))
    first = run(seed=1, **options)
    assert run(seed=1, **options) == first
    assert run(seed=2, **options)[0] != first[0] != run(seed=0, **options)[0]


def test_two_batches_of_one_prompt_are_different_answers(run, lines):
    records, _ = run(prompts=lines([{"prompt": "Hi"}] * 8), n=2, batch_size=2)
    assert len({r["completion"] for r in records}) > len(records) / 2


def test_the_temperature_is_that_of_the_sampling(run, seen):
    with pytest.raises(UserError, match="15 are unfinished"):  # the likeliest answer of this model goes on forever
        run(n=3, temperature=0.0)
    for i in range(0, 15, 3):
        assert seen[i].ids == seen[i + 1].ids == seen[i + 2].ids


# ----------------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize("spec", ["rm", "reward.py:vowels"])
def test_the_scores_of_sampled_text_are_those_that_ppo_sees(workshop, tokenizer, spec):
    model, _ = load_model(workshop.path("sft"))
    prompts, ids = load_prompts(workshop.path("prompts_valid.jsonl"), tokenizer, 40)
    prompts, ids = zip(*sorted(zip(prompts * 20, ids * 20), key=lambda pair: len(pair[1])))  # as sample_text does it
    batch = generate(model, list(ids), 8, tokenizer.end, generator=torch.Generator().manual_seed(3))
    answers = sample_text(model, tokenizer, list(ids), 8, seed=3)
    score = load_reward(workshop.path(spec), tokenizer, "sft", 48, "cpu")
    scores = score(prompts, answers)
    assert scores.shape == (100,) and len(set(scores.tolist())) > 2
    assert scores.tolist() == pytest.approx(score(prompts, batch).tolist(), abs=1e-5)


@torch.no_grad()
def test_score_gold_and_logprob_are_those_of_the_answer(run, workshop, seen, judge):
    records, _ = run(n=4, reward=workshop.path("rm"), gold=judge("tenths"), batch_size=8)
    kept = [s for s in seen if s.ended and s.text.strip()]
    reward, model = load_model(workshop.path("rm"), reward=True)[0], load_model(workshop.path("sft"))[0]
    for record, s, logprob in zip(records, kept, sequence_logprobs(model, kept).tolist(), strict=True):
        ids = torch.tensor([s.ids])
        assert record["score"] == pytest.approx(reward.score(ids, torch.tensor([ids.shape[1]])).item(), abs=1e-5)
        assert record["gold"] == len(record["completion"]) / 10
        assert record["logprob"] == pytest.approx(logprob, abs=1e-4)


def test_a_judge_is_asked_about_each_answer_with_its_own_prompt(run, judge):
    records, _ = run(n=3, reward=judge("prompt_length"))
    assert {r["score"] for r in records} == {8.0, 9.0} and all(r["score"] == len(r["prompt"]) for r in records)


def test_means_are_those_of_all_answers_and_of_those_kept(run, scripted, judge):
    scripted(lambda ids, k: "x" * (k + 1))  # lengths 1, 2, 3, 4 to each prompt
    records, out = run(n=4, reward=judge("length"), gold=judge("tenths"), keep="best")
    assert "mean score: 2.50 of all, 4.00 of those kept" in out and "mean gold: 0.25 of all, 0.40 of those kept" in out
    assert "mean score" not in run(n=4)[1]


# ------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("spec", ["rm", "reward.py:vowels"])
@pytest.mark.parametrize("batch_size", [5, 12, 512])
def test_the_best_is_the_one_of_each_prompts_own_answers_that_the_judge_likes_most(
    run, workshop, seen, tokenizer, spec, batch_size
):
    records, out = run(n=6, reward=workshop.path(spec), keep="best", batch_size=batch_size)
    scores = load_reward(workshop.path(spec), tokenizer, "sft", 48, "cpu")([""] * 30, seen).tolist()
    expected = []
    for i in range(0, 30, 6):
        usable = [j for j in range(i, i + 6) if seen[j].ended and seen[j].text.strip()]
        expected += [max(usable, key=lambda j: scores[j])] if usable else []
    assert [r["completion"] for r in records] == [seen[j].text for j in expected]
    assert [r["score"] for r in records] == pytest.approx([scores[j] for j in expected], abs=1e-5)
    assert any(j % 6 for j in expected)
    assert ("best of 6: at most 0.96 nats of KL to" in out) == (len(records) == 5)


def test_an_answer_that_cannot_be_kept_cannot_be_the_best(run, scripted, judge):
    scripted(lambda ids, k: ["ab", None, " " * 9, "a"][k])
    records, out = run(n=4, reward=judge("length"), keep="best")
    assert [r["completion"] for r in records] == ["ab"] * 5
    assert "5 of 20 answers to 5 prompts; 10 are unfinished or empty, 0 are below" in out


def test_of_equal_answers_the_first_is_kept(run, scripted, judge):
    scripted(lambda ids, k: ["a", "bb", "cc", "dd"][k])
    assert [r["completion"] for r in run(n=4, reward=judge("length"), keep="best")[0]] == ["bb"] * 5
    assert best_of(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]


def test_a_threshold_keeps_what_reaches_it(run, scripted, judge):
    scripted(lambda ids, k: "x" * (6 + k % 3))
    records, out = run(n=3, reward=judge("tenths"), threshold=0.7)
    assert [r["score"] for r in records] == [0.7, 0.8] * 5  # 0.7 as the function returned it, not its float32
    assert "10 of 15 answers to 5 prompts; 0 are unfinished or empty, 5 are below the threshold" in out


def test_a_threshold_is_for_the_best_too_and_then_nothing_is_said_of_its_kl(run, scripted, judge):
    scripted(lambda ids, k: "x" * (1 + len(ids) * (k == 1)))
    records, out = run(n=2, reward=judge("length"), keep="best", threshold=12)
    assert {r["prompt"] for r in records} == {"Say moon!", "Say tree!"}
    assert "2 of 10" in out and "3 are below the threshold" in out and "nats" not in out


def test_unfinished_and_empty_answers_are_left_out_and_counted(run, seen):
    records, out = run(n=20)
    good = [s.text for s in seen if s.ended and s.text.strip()]
    empty = sum(s.ended and not s.text.strip() for s in seen)
    unfinished = sum(not s.ended for s in seen)
    assert empty and unfinished and [r["completion"] for r in records] == good
    assert f"{len(good)} of 100 answers to 5 prompts; {empty + unfinished} are unfinished or empty" in out


def test_an_answer_without_an_end_is_not_below_the_threshold_too(run, scripted, judge):
    scripted(lambda ids, k: [None, "", "x", "xxx"][k])
    assert "10 are unfinished or empty, 5 are below the threshold" in run(n=4, reward=judge("length"), threshold=2)[1]


# ---------------------------------------------------------------------------------------- whole files, one-line errors


def test_a_file_appears_only_when_it_is_complete(run, judge):
    with pytest.raises(UserError, match="breaks_later: must return one finite number"):
        run(reward=judge("breaks_later"), batch_size=2)
    assert list(run.out.parent.iterdir()) == []


def test_a_failure_leaves_the_earlier_file(run, scripted):
    records, _ = run()
    before = run.out.read_bytes()
    scripted(lambda ids, k: None)
    with pytest.raises(UserError, match="none of the answers can be kept: 5 are unfinished") as error:
        run()
    assert "\n" not in str(error.value) and records
    assert run.out.read_bytes() == before and [p.name for p in run.out.parent.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize("name", ["", "folder/", "pipe", "a_file/samples.jsonl", "x" * 300])
def test_a_file_that_cannot_be_written_shows_before_the_sampling(command, workshop, tmp_path, monkeypatch, name):
    def refuse(*args, **options):
        raise AssertionError("it sampled")

    monkeypatch.setattr(sample, "sample_text", refuse)
    (tmp_path / "a_file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    arguments = ["--prompts", workshop.path("prompts.jsonl"), "--max-new-tokens", 8, "--device", "cpu"]
    out = f"{tmp_path}/{name}"
    code, _, err = command("nanopost/__main__.py", "sample", workshop.path("sft"), *arguments, "--out", out)
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n": 0}, "--n"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"batch_size": 0}, "--batch-size"),
        ({"limit": -1}, "--limit"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": 1e-30}, "--temperature"),
        ({"keep": "worst"}, "--keep must be all or"),
        ({"keep": "best"}, "give --reward"),
        ({"threshold": 0.0}, "give --reward"),
        ({"policy": "nowhere"}, "no folder"),
        ({"policy": "rm"}, "a language model is needed"),
        ({"reward": "sft"}, "a reward model is needed"),
        ({"reward": "other_vocab_rm"}, "different vocabularies"),
        ({"reward": "reward.py:nothing"}, "no function nothing"),
        ({"gold": "reward.py:nothing"}, "no function nothing"),
        ({"prompts": "nowhere.jsonl"}, "no file"),
        ({"prompts": "sft.jsonl", "max_new_tokens": 47}, "no prompts"),
        ({"device": "abacus"}, "--device must be"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(run, workshop, wrong, message):
    for name in ("policy", "reward", "gold", "prompts"):
        if name in wrong:
            wrong = wrong | {name: workshop.path(wrong[name])}
    with pytest.raises(UserError, match=message) as error:
        run(**wrong)
    assert "\n" not in str(error.value) and not run.out.exists()


def test_from_the_command_line(command, workshop, tmp_path):
    arguments = [workshop.path("sft"), "--prompts", workshop.path("prompts_valid.jsonl"), "--n", 4]
    arguments += ["--max-new-tokens", 8, "--device", "cpu", "--out", tmp_path / "best.jsonl"]
    code, out, err = command(
        "nanopost/__main__.py",
        "sample",
        *arguments,
        "--keep",
        "best",
        "--reward",
        workshop.path("rm"),
        "--threshold",
        "-9.5",
    )
    assert code == 0 and "of 20 answers to 5 prompts" in out and (tmp_path / "best.jsonl").exists()
    code, out, err = command("nanopost/__main__.py", "sample", *arguments, "--keep", "best")
    assert (code, err) == (2, "error: --keep best and --threshold need scores: give --reward\n")
    code, out, err = command("nanopost/__main__.py", "sample", "--n", 4)
    assert code == 2 and "policy" in err and len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------- what best of n is


def distribution(logp, scores, n):
    """log of the distribution of best_of, by enumerating all n-tuples of the 40 answers."""
    tuples = torch.tensor(list(itertools.product(range(len(logp)), repeat=n)))  # (40^n, n)
    weights, winners = logp[tuples].sum(1).exp(), tuples[torch.arange(len(tuples)), best_of(scores[tuples])]
    return torch.zeros_like(logp).index_add(0, winners, weights).log()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_best_of_n_says_an_answer_as_often_as_it_beats_all_others(n, seed):
    """P(best of n is y) = F(y)^n - F(y-)^n, F(y) being the probability of an answer that scores no more than y."""
    logp, scores = table_logprobs(random_table(seed)).sum(1), random_scores(seed + 10)
    best = distribution(logp, scores, n)
    below = (logp.exp() * (scores[None] < scores[:, None])).sum(1)  # F(y-)
    at_most((best.exp() - ((below + logp.exp()) ** n - below**n)).abs().max(), 1e-14)
    assert best.exp().sum().item() == pytest.approx(1)
    assert 0 <= kl_of_best_of(n) - kl(best, logp).item() + 1e-12
    assert n == 1 or 0.3 * kl_of_best_of(n) < kl(best, logp) < kl_of_best_of(n)
    assert (best.exp() * scores).sum() >= (logp.exp() * scores).sum() + (n > 1) * 0.1


def test_ties_only_lower_the_kl_of_best_of_n():
    logp, scores = table_logprobs(random_table(0)).sum(1), random_scores(10)
    kls = [kl(distribution(logp, s, 2), logp).item() for s in (scores, scores.round(), scores * 0)]
    assert kl_of_best_of(2) > kls[0] > kls[1] > abs(kls[2]) and kls[2] == pytest.approx(0, abs=1e-12)


def test_the_kl_of_best_of_n_is_log_n_less_n_minus_1_over_n():
    assert [kl_of_best_of(n) for n in (1, 2, 4)] == pytest.approx([0, 0.193147, 0.636294], abs=1e-6)
    assert kl_of_best_of(16) == pytest.approx(math.log(16) - 15 / 16)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_bound_is_reached_where_no_answer_is_likely(n):
    K = 100_000  # answers, all as likely, no two with the same score
    rank = torch.arange(K + 1, dtype=torch.float64) / K
    best = rank[1:] ** n - rank[:-1] ** n
    at_most(abs((best * (best * K).log()).sum().item() - kl_of_best_of(n)), 1e-3)


# ----------------------------------------------------------------------------------------------------------- ReST


def test_fine_tuning_on_the_best_of_n_raises_the_score_of_the_policy(run, workshop, tmp_path):
    """Two rounds of ReST: each samples from the model of the round before."""
    options = dict(reward=workshop.path("reward.py:vowels"), prompts=workshop.path("prompts.jsonl"))
    policy, means = workshop.path("sft"), []
    for step in range(3):
        out = run(policy=policy, n=16, keep="best", seed=step, **options)[1]
        [mean] = [line for line in out.splitlines() if line.startswith("mean score: ")]
        means.append(float(mean.split()[2]))  # of all answers, before the best are chosen
        if step < 2:
            policy = str(
                workshop.run(
                    "sft", tmp_path / f"round-{step}", init=policy, data=str(run.out), valid="", steps=30, lr=2e-2
                )
            )
    assert means[1] > 2 * means[0] and means[2] > means[1] + 0.1, means


def test_a_large_seed_is_as_good_as_any(run):
    assert run(seed=2**62 + 1)[0] != run(seed=0)[0]
