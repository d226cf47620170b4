"""Measure policies on held-out prompts: one row per policy and temperature, with standard errors.

    nanopost evaluate out/base out/sft out/dpo out/ppo --reference out/sft --reward out/rm \\
        --gold data/notes/gold.py:score --prompts data/notes/prompts_eval.jsonl --pairs out/prefs/valid.jsonl

gold        the mean true reward, which no training saw
reward      the mean score of the reward model, which PPO was trained on
win_rate    how often the answer beats the reference policy's answer to the same prompt by gold; a tie is half a win
kl          KL(policy || reference), nats per answer: the mean of log pi(y|x) - log pi_ref(y|x) over sampled answers
entropy     nats per answer: the mean of -log pi(y|x)
length      tokens per answer, the end token included
ended       share of answers that end by themselves
distinct    distinct answers / answers

--temperature 0,0.5,1 gives each policy three rows: sft@0 (greedy), sft@0.5 and sft. pi is what the answers were sampled
from, softmax(logits / temperature). The reference is one fixed distribution, its answers and its log-probabilities are
those at temperature 1, so all rows are compared with the same thing. Greedy rows have neither KL nor entropy, and one
answer to each prompt instead of --samples.

--best-of 4 adds a row: of 4 answers of the reference to each prompt, the one with the highest reward. Its KL is not
measured; what the table gives as "at most" is the bound log n - (n-1)/n (Beirami et al., arXiv 2401.01879).

With --reward it is also printed how often the reward reads the prompt: the share of the reference's answers with a
higher reward under their own prompt than under another one. A reward that ignores the prompt gets 50%.
"""

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from nanopost.checkpoint import load_model, same_vocabulary
from nanopost.config import UserError, at_least, clean
from nanopost.data import Example, encode_pair, load_prompts, map_batches
from nanopost.device import find_device
from nanopost.files import atomic
from nanopost.reads_prompt import other_prompts, read_families, reads_prompt, wins
from nanopost.records import convert, read_records
from nanopost.reward import call_reward, load_function, load_reward, load_reward_model, score_examples
from nanopost.sampling import sample_text
from nanopost.tools import at, check_file, parse_temperatures
from nanopost.tools.sample import best_of, kl_of_best_of

FORMATS = dict(
    gold=".2f", reward=".2f", win_rate=".1%", kl=".2f", entropy=".1f", length=".1f", ended=".1%", distinct=".1%"
)


@dataclass
class Config:
    policies: list[str]  # folders of the models to measure
    reference: str = "out/sft"  # folder of the policy that KL and win rate refer to, at temperature 1
    reward: str = ""  # folder of a reward model, or a Python function: file.py:function; empty: no such column
    gold: str = ""  # the true reward, a Python function: file.py:function; empty: no such columns
    prompts: str = "data/notes/prompts_eval.jsonl"  # held-out prompts
    pairs: str = ""  # held-out labelled pairs (with the probability of each label, if known), to measure --reward on
    limit: int = 500  # use at most this many prompts
    samples: int = 2  # answers per prompt
    max_new_tokens: int = 80  # the longest answer, in tokens
    temperature: str = "1"  # sampling temperatures, separated by commas: a row for each; 0: greedy
    best_of: int = 0  # a row for the best of this many answers of the reference, by --reward; 0: no such row
    seed: int = 0  # seed for sampling
    device: str = "auto"  # auto, cpu, cuda or mps
    json: str = ""  # file for the report; empty: only print the table
    since: float = 0.0  # start of the time that the report gives in seconds, as Unix time; 0: the start of this command
    show: int = 3  # print the answers to this many prompts

    def __post_init__(self):
        at_least(self, 1, "limit", "samples", "max_new_tokens")
        at_least(self, 0, "best_of", "show")
        parse_temperatures(self.temperature)
        if self.pairs and (not self.reward or is_program(self.reward)):
            raise UserError("--pairs measures a reward model: give --reward the folder of one")
        if self.best_of == 1:
            raise UserError("--best-of must be at least 2 (0: no such row), not 1")
        if self.best_of and not self.reward:
            raise UserError("--best-of keeps the answer with the highest reward: give --reward")


def is_program(reward: str) -> bool:
    return reward.partition(":")[0].endswith(".py")


@torch.no_grad()
def sequence_logprobs(model, answers: list[Example], temperature: float = 1.0, batch_size: int = 64) -> torch.Tensor:
    """log pi(y|x) of each answer, under softmax(logits / temperature): (N,) in nats."""

    def total(batch):
        logprobs = model.logprobs(model(batch.ids), batch.ids, batch.index, temperature)  # (B, T-1)
        return logprobs.cpu().double().sum(1)  # (B,)

    return map_batches(total, answers, batch_size, model.device)


def measure(answers, logprobs, reference_logprobs, rewards=None, gold=None, reference_gold=None) -> dict:
    """One value per answer (N,) for every column; its mean is the cell of the table. Log-probs in nats per answer.

    logprobs are those of the distribution that was sampled from; None, where there is none, leaves out KL and entropy.
    """
    responses = [tuple(answer.response) for answer in answers]
    copies = Counter(responses)
    values = {"gold": gold, "reward": rewards}
    if logprobs is not None:
        values |= {"kl": logprobs - reference_logprobs, "entropy": -logprobs}
    values["length"] = [len(response) for response in responses]
    values["ended"] = [answer.ended for answer in answers]
    values["distinct"] = [1 / copies[response] for response in responses]  # sums to the number of distinct ones
    if gold is not None:
        values["win_rate"] = wins(torch.tensor(gold), torch.tensor(reference_gold))
    present = [name for name in FORMATS if values.get(name) is not None]
    return {name: torch.as_tensor(values[name], dtype=torch.float64) for name in present}


def summary(values: dict[str, torch.Tensor], samples: int = 1) -> dict:
    """{name: mean, name_stderr: standard error} of values for all prompts, `samples` times over."""
    row = {}
    for name, x in values.items():
        x = x.view(samples, -1).mean(0)  # answers to one prompt are not independent: average them first
        row[name] = x.mean().item()
        row[f"{name}_stderr"] = (x.std() / len(x) ** 0.5).item() if len(x) > 1 else 0.0
    return row


@torch.no_grad()
def pair_accuracy(model, tokenizer, path: str) -> tuple[float, float | None]:
    """The reward model's accuracy on labelled pairs, and the best possible accuracy where it is known.

    A record may have the `probability` of its label, as those of data/notes/annotate.py do. The pair then counts with
    the share of all judgements that agree with the reward model; a pair without one counts whole, and a tie nothing.
    If all records have one, the best possible accuracy is the mean of max(p, 1-p); otherwise it is None. Raises
    UserError if a `probability` is no number from 0 to 1.
    """

    def encode(where, record):
        p = record.get("probability", 1.0)
        if not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise UserError(f"{where}: probability must be a number between 0 and 1, not {json.dumps(p)[:40]}")
        return encode_pair(tokenizer, where, record, model.config.block_size), p, "probability" in record

    pairs, p, known = zip(*convert(read_records(path), encode, path, "pairs"))
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    chosen, rejected = score_examples(model, sides).chunk(2)  # (P,), (P,)
    p = torch.tensor(p, dtype=torch.float64)  # (P,)
    right = torch.where(chosen > rejected, p, torch.where(chosen < rejected, 1 - p, 0.0)).mean().item()
    return right, torch.maximum(p, 1 - p).mean().item() if all(known) else None


def table(rows: list[dict]) -> str:
    """A Markdown table: mean ± standard error. A row without a column has an empty cell there."""
    formats = {name: style for name, style in FORMATS.items() if any(name in row for row in rows)}

    def cell(row, name, style):
        if name == "kl" and "kl_bound" in row:
            return f"at most {row['kl_bound']:{style}}"
        return f"{row[name]:{style}} ± {row[name + '_stderr']:{style}}".replace("% ±", " ±") if name in row else ""

    lines = [["stage", *formats]]
    lines += [[row["stage"], *(cell(row, name, style) for name, style in formats.items())] for row in rows]
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table of cells; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def print_answers(prompts: list[str], measured: list[tuple[str, list[Example], dict]]):
    """The answers to the first prompts, below each other, with their gold rewards: (stage, answers, values) each."""
    width = max(8, *(len(stage) for stage, _, _ in measured))
    for i, prompt in enumerate(prompts):
        print(f"\n{clean(prompt)}")
        for stage, answers, values in measured:
            gold = f" {values['gold'][i]:+5.2f}" if "gold" in values else ""
            print(f"  {stage:>{width}}{gold}  {clean(answers[i].text)}")


def name_of(folder: str) -> str:
    """The stage of a folder: ppo, or of a kept copy ppo/step-10."""
    return re.search(r"[^/]+(/step-\d+)?$", Path(folder).as_posix())[0]


def check_finite(answers: list[Example], values: dict[str, torch.Tensor], models: str):
    """Raises UserError unless the log-probabilities of the answers, and all values, are finite."""
    values = {"log-probability": torch.tensor([answer.logprob for answer in answers]), **values}
    for name, x in values.items():
        if not x.isfinite().all():
            raise UserError(f"{name} is not finite for all answers: the weights in {models} are broken")


def main(config: Config):
    started = config.since or time.time()
    if config.json:
        check_file("--json", config.json)
    if not Path(config.json).parent.is_dir():
        raise UserError(f"--json: there is no folder {Path(config.json).parent}")

    # The models, and what judges their answers
    device = find_device(config.device)
    reference, tokenizer = load_model(config.reference, device)
    policies = []
    for folder in config.policies:
        policy, other = load_model(folder, device)
        same_vocabulary(tokenizer, other, config.reference, folder)
        policies.append(policy)
    context = min(model.config.block_size for model in (reference, *policies))
    prompts, ids = load_prompts(config.prompts, tokenizer, context - config.max_new_tokens, config.limit)
    gold = load_function(config.gold) if config.gold else None
    gold_max = getattr(gold, "__globals__", {}).get("GOLD_MAX")
    report = {"rows": [], "gold_max": gold_max if isinstance(gold_max, (int, float)) else None}
    judge = load_reward(config.reward, tokenizer, config.reference, context, device) if config.reward else None
    if config.pairs:
        reward = load_reward_model(config.reward, tokenizer, config.reference, context, device)
        accuracy, ceiling = pair_accuracy(reward, tokenizer, config.pairs)
        report |= {"rm_accuracy": accuracy, "rm_accuracy_ceiling": ceiling}
        best = f", best possible {ceiling:.1%}" if ceiling else ""
        print(f"reward model: accuracy {accuracy:.1%} on {config.pairs}{best}")

    # The reference's answers at temperature 1: what all rows are compared with
    P = len(prompts)
    others = None
    if judge and len({json.dumps(prompt) for prompt in prompts}) > 1:
        others = other_prompts(prompts, read_families(config.prompts, prompts), config.seed)

    def sample(model, seed, temperature=1.0, n=config.samples):
        """n answers to each prompt, P after P."""
        return sample_text(model, tokenizer, ids * n, config.max_new_tokens, temperature=temperature, seed=seed)

    def asked(answers):
        """The prompts of these answers."""
        return prompts * (len(answers) // P)

    def grade(answers):
        return call_reward(gold, asked(answers), [answer.text for answer in answers]) if gold else None

    of_reference = sample(reference, config.seed + 1) if gold or others else []
    reference_gold = grade(of_reference)
    if others:
        check_finite(of_reference, {}, config.reference)
        share = reads_prompt(judge, asked(of_reference), of_reference, others * config.samples)
        report["reads_prompt"] = share
        print(f"reads the prompt: {share:.0%} (answers with a higher reward under their own prompt than under another)")

    # One row per policy and temperature
    measured = []

    def add(folder, stage, temperature, answers, logprobs=None, reference_logprobs=None, **more):
        N = len(answers)  # a multiple of P
        rewards = judge(asked(answers), answers) if judge else None
        against = reference_gold[:N] if gold else None
        values = measure(answers, logprobs, reference_logprobs, rewards, grade(answers), against)
        check_finite(answers, values, " or ".join(filter(None, (folder, config.reference, config.reward))))
        measured.append((stage, answers, values))
        row = {"stage": stage, "temperature": temperature, **summary(values, N // P), **more}
        report["rows"].append(row)

    for folder, policy in zip(config.policies, policies):
        for temperature in parse_temperatures(config.temperature):
            stage = name_of(folder) + at(temperature)
            if temperature == 0:  # the same answer every time: one will do
                add(folder, stage, 0, sample(policy, config.seed, 0, n=1))
            else:
                answers = sample(policy, config.seed, temperature)
                logprobs = [sequence_logprobs(policy, answers, temperature), sequence_logprobs(reference, answers)]
                add(folder, stage, temperature, answers, *logprobs)
    if config.best_of:
        n = config.best_of
        candidates = sample(reference, config.seed + 2, n=n)
        scores = judge(asked(candidates), candidates).view(n, P).T  # (P, n)
        best = [candidates[k * P + i] for i, k in enumerate(best_of(scores).tolist())]
        add(config.reference, f"{name_of(config.reference)} best of {n}", 1.0, best, kl_bound=kl_of_best_of(n))

    # The table and the report
    print_answers([tokenizer.decode(prompt) for prompt in ids[: config.show]], measured)
    print(f"\n{P} prompts of {config.prompts}; answers to each: {config.samples} (greedy, best of n: 1)\n")
    print(table(report["rows"]) + "\n")
    report["seconds"] = round(time.time() - started, 1)
    print(f"{report['seconds']:.0f} s")
    if config.json:
        with atomic(config.json) as f:
            json.dump(report, f, indent=1)
