"""See every token of an answer: one HTML file that opens by double click, without a server or a network.

    nanopost inspect out/sft out/dpo out/ppo --reference out/sft --reward out/rm --gold data/notes/gold.py:score
    nanopost inspect out/ppo --reference out/sft --reward out/rm --prompt "Thank Ben for the lamp."

The page has a number for each token, from its log-probability to its advantage, the answers of kept copies
(--keep-every) in the course of training, what the loss of SFT is on, what DPO makes of a pair, and the models
themselves, to type a prompt to. All of it is computed by the functions that training uses.

PPO keeps no value head. So each model gets one, fitted by least squares to the returns of answers that it samples.
"""

import base64
import importlib
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nanopost.checkpoint import freeze, load_model, same_vocabulary
from nanopost.config import UserError, at_least, clean
from nanopost.data import collate, load_examples, load_pairs, load_prompts
from nanopost.files import atomic
from nanopost.records import read_json
from nanopost.reward import call_reward, load_function, load_reward
from nanopost.tools import check_file

ROOT = Path(__file__).resolve().parents[2]  # where the training scripts are
PAGE = ROOT / "nanopost" / "page"  # the parts of the page
ROOM = 7_400_000  # bytes of models in the page: those that do not fit cannot be talked to
RECORDS = 4  # demonstrations, and pairs, at most


@dataclass
class Config:
    policies: list[str]  # folders of the models to show
    reference: str = ""  # folder of the policy that log-ratios refer to; empty: there are none
    reward: str = ""  # folder of a reward model, or a Python function: file.py:function; empty: no rewards
    gold: str = ""  # the true reward, a Python function: file.py:function; empty: it is not shown
    prompts: str = "data/notes/prompts_eval.jsonl"  # prompts to answer
    prompt: str = ""  # answer this prompt instead
    count: int = 8  # use at most this many prompts of the file
    demonstrations: str = "data/notes/sft_valid.jsonl"  # records to show SFT's mask on; empty: none
    pairs: str = "out/prefs/valid.jsonl"  # pairs to show DPO's loss on; empty: none
    beta: float = 0.1  # weight of the KL penalty for models that PPO has not made; a run of PPO has its own
    fit: int = 192  # answers per model that its values are fitted to; 0: no values, advantages and returns
    max_new_tokens: int = 80  # the longest answer, in tokens
    out: str = "out/inspect.html"  # file to write
    seed: int = 0  # seed for sampling

    def __post_init__(self):
        at_least(self, 1, "count", "max_new_tokens")
        at_least(self, 0, "fit", "beta")


def read_run(folder: str) -> tuple[str, dict]:
    """(method, arguments) of a run; of any other folder ("", {})."""
    path = os.path.join(folder, "config.json")
    run = read_json(path) if os.path.isfile(path) else {}
    return run.get("method", ""), run.get("arguments", {})


class Inspection:
    """The models, what judges their answers, and the prompts. Its methods compute what the page shows."""

    def __init__(self, config: Config):
        if not (ROOT / "train_ppo.py").is_file():
            raise UserError(f'no training scripts in {ROOT}, but inspect runs them; pip install -e "." in a clone')
        sys.path.append(str(ROOT))
        self.config = config
        self.ppo, self.dpo = map(importlib.import_module, ("train_ppo", "train_dpo"))
        _, self.tokenizer = load_model(config.policies[0])
        self.models = {folder: self.load(folder) for folder in config.policies}
        self.reference = self.load(config.reference) if config.reference else None
        self.context = min(m.config.block_size for m in (*self.models.values(), self.reference) if m)
        room = self.context - config.max_new_tokens
        if config.prompt:
            self.prompts = [config.prompt]
            self.ids = [self.tokenizer.prompt([{"role": "user", "content": config.prompt}])]
            if len(self.ids[0]) > room:
                raise UserError(f"--prompt has {len(self.ids[0])} tokens; beside the answer there is room for {room}")
        else:
            self.prompts, self.ids = load_prompts(config.prompts, self.tokenizer, room, config.count)
        judge = (self.tokenizer, config.policies[0], self.context, "cpu")
        self.judge = load_reward(config.reward, *judge) if config.reward else lambda asked, _: torch.zeros(len(asked))
        self.gold = load_function(config.gold) if config.gold else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.noise = torch.rand(10, config.max_new_tokens, generator=self.generator)  # the first row for the answers

    def load(self, folder: str):
        """The model of a folder, with a value head that says 0."""
        model, tokenizer = load_model(folder)
        same_vocabulary(self.tokenizer, tokenizer, self.config.policies[0], folder)
        return freeze(model.add_head(std=0.0))

    def settings(self, folder: str):
        """What rewards and advantages depend on: a run of PPO has its own."""
        settings = self.ppo.Config(beta=self.config.beta, max_new_tokens=self.config.max_new_tokens)
        method, own = read_run(folder)
        names = {"beta", "gamma", "lam", "missing_end_score"} & own.keys() if method == "ppo" else ()
        return replace(settings, **{name: own[name] for name in names})

    def play(self, model, settings, noise):
        """PPO's own rollout: as many answers to each prompt as `noise` has rows for, and the reward of every token."""
        models = self.ppo.Models(model, model, self.reference or model, self.judge)
        n = len(noise) // len(self.ids)
        batch = self.ppo.rollout(models, self.tokenizer, self.prompts * n, self.ids * n, settings, settings.beta, noise)
        logprobs = batch.logprobs, batch.ref_logprobs
        return batch, self.ppo.token_rewards(batch.scores, *logprobs, batch.mask, settings.beta)

    def fit_values(self, model, settings) -> float:
        """Fits the value head; returns the share explained of the variance of a quarter of the answers, kept back."""
        rows = max(4, self.config.fit // len(self.ids)) * len(self.ids)
        batch, rewards = self.play(model, settings, torch.rand(rows, settings.max_new_tokens, generator=self.generator))
        _, returns = self.ppo.gae(rewards, torch.zeros_like(rewards), batch.mask, settings.gamma, lam=1.0)
        hidden = model(batch.ids)[:, :-1].double()  # (R, T-1, C); ln_f makes a bias superfluous
        fitted = torch.arange(rows)[:, None] < rows * 3 // 4  # (R, 1)
        X, y = (x[batch.mask & fitted] for x in (hidden, returns.double()))  # (N, C), (N,)
        weights = torch.linalg.solve(X.T @ X + torch.eye(X.shape[1]), X.T @ y)  # ridge regression
        model.head.weight.copy_(weights[None])
        X, y = (x[batch.mask & ~fitted] for x in (hidden, returns.double()))
        return float(1 - (y - X @ weights).var(correction=0) / y.var(correction=0).clamp(min=1e-9))

    def grade(self, texts: list[str]) -> list[dict]:
        """The gold rewards of answers to all prompts, with their named parts if the file has a function explain()."""
        explain = getattr(self.gold, "__globals__", {}).get("explain", lambda *_: {})
        try:
            golds = call_reward(self.gold, self.prompts, texts)
            return [{"gold": gold, "parts": explain(*of)} for gold, *of in zip(golds, self.prompts, texts)]
        except ValueError as error:  # a prompt that this reward does not know
            raise UserError(f"--gold {self.config.gold}: {error}") from None

    def answers(self, model, settings, values: bool = False) -> list[dict]:
        """The answers to all prompts; every column has a number for each token."""
        batch, rewards = self.play(model, settings, self.noise[:1].repeat(len(self.ids), 1))
        columns = {"logprob": batch.logprobs}
        columns |= {"ratio": batch.logprobs - batch.ref_logprobs} if self.reference else {}
        columns |= {"reward": rewards} if self.reference and self.config.reward else {}
        columns |= {"value": batch.values, "advantage": batch.advantages, "return": batch.returns} if values else {}
        texts = [self.tokenizer.decode(response) for response in batch.responses()]
        shown = self.grade(texts) if self.gold else [{} for _ in texts]
        for row, (answer, mask) in enumerate(zip(shown, batch.mask)):
            answer |= {"ids": batch.ids[row, 1:][mask], "ended": bool(batch.ended[row])}
            answer |= {"columns": {name: x[row][mask] for name, x in columns.items()}}
            answer |= {"score": batch.scores[row]} if self.config.reward else {}
        return shown

    def logprobs(self, model, ids: list[int], start: int = 1) -> torch.Tensor:
        """log p of all V tokens at the N places from `start` on: (N, V)."""
        return model.logits(model(torch.tensor([ids]))[0, start - 1 : -1]).log_softmax(-1)

    def compare(self, folder: str, answers: list[dict]) -> list[dict]:
        """Adds the likeliest tokens at each place, their probabilities under every model, and the exact KL."""
        for prompt, answer in zip(self.ids, answers):
            place = prompt + answer["ids"].tolist(), len(prompt)
            logprobs = {other: self.logprobs(model, *place) for other, model in self.models.items()}
            own = logprobs[folder]  # (N, V)
            ids = torch.cat([answer["ids"][:, None], own.topk(5).indices], dim=1)  # (N, 6): the chosen first
            answer |= {"likely": ids, "under": {other: x.gather(1, ids).exp() for other, x in logprobs.items()}}
            if self.reference:
                answer["columns"]["kl"] = (own.exp() * (own - self.logprobs(self.reference, *place))).sum(1)
        return answers

    def course(self, folder: str, settings) -> list[dict]:
        """The answers of a run's kept copies, and before them those of the reference that it started from."""
        copies = {path.parent.name[5:]: path.parent for path in Path(folder).glob("step-*/config.json")}
        steps = sorted(int(step) for step in copies if step.isdecimal())
        models = {0: self.reference} if self.reference and steps else {}
        models |= {step: self.load(str(copies[str(step)])) for step in steps}
        return [{"step": step, "answers": self.answers(model, settings)} for step, model in models.items()]

    def demonstrations(self, path: str) -> list[dict]:
        """SFT's records: the mask, and -log p of each token under every model."""
        shown = []
        for example in load_examples(path, self.tokenizer, self.context, RECORDS):
            targets = torch.tensor(example.ids[1:])[:, None]  # (T-1, 1)
            nll = {name: -self.logprobs(x, example.ids).gather(1, targets)[:, 0] for name, x in self.models.items()}
            shown.append({"ids": example.ids, "mask": example.mask, "nll": nll})
        return shown

    def pairs(self, path: str) -> list[dict]:
        """DPO's pairs: log-probabilities token by token, and what train_dpo.py's loss makes of their sums."""
        betas = [arguments["beta"] for method, arguments in map(read_run, self.models) if method == "dpo"]
        shown, beta = [], [*betas, self.dpo.Config.beta][0]
        for pair in load_pairs(path, self.tokenizer, self.context, RECORDS):
            batch, under = collate([pair.chosen, pair.rejected]), {}
            reference = self.dpo.answer_logprobs(self.reference, batch).chunk(2)
            for name, model in {"": self.reference, **self.models}.items():
                tokens = model.logprobs(model(batch.ids), batch.ids, batch.index)  # (2, T-1)
                sums = self.dpo.answer_logprobs(model, batch).chunk(2)
                losses, *rewards = self.dpo.dpo_loss(*sums, *reference, beta)
                under[name] = {"tokens": [x[mask] for x, mask in zip(tokens, batch.mask)], "sums": torch.cat(sums)}
                under[name] |= {"rewards": torch.cat(rewards), "loss": losses[0]}
            sides = [pair.chosen.response, pair.rejected.response]
            shown.append({"prompt": pair.chosen.prompt, "sides": sides, "beta": beta, "under": under})
        return shown


def pack(model) -> dict:
    """The weights in base64, with names and shapes. In a matrix a number takes 16 bits, an integer times the scale of
    its row: more exact than half precision."""
    parts, shapes = [], []
    for name, x in model.state_dict().items():
        x = x[: model.config.vocab_size] if name == "wte.weight" else x  # the rows of real tokens
        scale = x.abs().amax(1) / 32767 + 1e-30 if x.dim() == 2 else x
        parts += [scale, (x / scale[:, None]).round().short()] if x.dim() == 2 else [x]
        shapes.append([name, *x.shape])
    bits = base64.b64encode(b"".join(part.numpy().tobytes() for part in parts)).decode()
    return {"sizes": asdict(model.config), "shapes": shapes, "bits": bits}


def plain(x: torch.Tensor):
    """For JSON: numbers with four decimals. Raises UserError for what is no number."""
    if not x.isfinite().all():
        raise UserError("not all numbers are finite: the weights of a model are broken")
    return x.double().mul(1e4).round().div(1e4).tolist() if x.is_floating_point() else x.tolist()


@torch.no_grad()
def main(config: Config):
    check_file("--out", config.out)
    started, world, room = time.time(), Inspection(config), ROOM
    ranks = world.tokenizer.ranks
    data = {
        "tokens": [token.decode("latin-1") for token in sorted(ranks, key=ranks.get)],
        "special": [world.tokenizer.decode([i]) for i in range(len(ranks), world.tokenizer.vocab_size)],
        "reference": config.reference, "context": world.context, "noise": world.noise.tolist(),
        "prompts": world.ids, "models": [], "demonstrations": world.demonstrations(config.demonstrations),
        "pairs": world.pairs(config.pairs) if config.reference else [],
    }  # fmt: skip
    for folder, model in world.models.items():
        settings, (method, _) = world.settings(folder), read_run(folder)
        explained = world.fit_values(model, settings) if config.fit and config.reward and config.reference else None
        found = {"name": folder, "method": method, "beta": settings.beta, "explained": explained}
        found["answers"] = world.compare(folder, world.answers(model, settings, explained is not None))
        found["course"] = world.course(folder, settings)
        room -= sum(p.numel() for p in model.parameters()) * 8 // 3  # two bytes a number, in base64
        data["models"].append(found | (pack(model) if room >= 0 else {}))
    parts = {name: (PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "transformer.js", "page.js")}
    parts["data"] = json.dumps(data, default=plain, separators=(",", ":"))
    parts["data"] = parts["data"].replace("<", "\\u003c")  # no text can end the script that holds it
    page = re.sub("{{(.*?)}}", lambda name: parts[name[1]], (PAGE / "page.html").read_text(encoding="utf-8"))
    os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)
    with atomic(config.out) as f:
        f.write(page)
    print(clean(f"{config.out}: {len(page) / 1e6:.1f} MB after {time.time() - started:.0f} s; open it in a browser"))
