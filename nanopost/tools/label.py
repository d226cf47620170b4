"""Say which of two answers is better; train_rm.py and train_dpo.py learn from it.

    nanopost label out/sft --prompts prompts.jsonl --out prefs.jsonl
    nanopost label out/sft --against out/ppo --prompts prompts.jsonl --out sft_ppo.jsonl     two models, with a tally

Which answer is on the left is random. Each judgement is on disk before the next pair appears, and the same command
continues where it stopped. With prompt_toolkit (pip install "nanopost[label]") a key is enough; otherwise press Enter
after it. Keys may also come from a pipe, one per line.

--out holds only choices, {"prompt", "chosen", "rejected", "position", "models", "n"}: train on it at any time. Ties and
skips are in a file beside it (prefs.undecided.jsonl), so that they are not asked again. "n" counts across both files.
"""

import importlib.util
import itertools
import json
import os
import random
import shutil
import textwrap
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from nanopost.checkpoint import load_model, same_vocabulary
from nanopost.config import UserError, at_least, clean
from nanopost.data import load_prompts
from nanopost.device import find_device
from nanopost.files import atomic
from nanopost.records import read_records
from nanopost.sampling import sample_text
from nanopost.tools import check_file, check_temperature, in_terminal, read_line

TRIES = 4  # answers sampled per side, to find two that are finished and different
QUESTION = "l left   r right   t tie   s skip   u undo   q quit > "
KEYS = {"l": "left", "r": "right", "t": "tie", "s": "skip", "u": "undo", "q": "quit", "left": "left", "right": "right"}


@dataclass
class Config:
    policy: str  # folder of the model that gives the answers
    prompts: str = "data/notes/prompts_train.jsonl"  # prompts to answer
    out: str = "out/people/train.jsonl"  # file for the judgements; an existing one is continued
    against: str = ""  # folder of another model that gives the second answers; empty: the same model
    max_new_tokens: int = 80  # the longest answer, in tokens; unfinished answers are not shown
    temperature: float = 1.0  # sampling temperature
    seed: int = 0  # seed for the answers and their sides
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        at_least(self, 1, "max_new_tokens")
        if not self.temperature > 0:
            raise UserError("--temperature must be above 0; at 0 all answers to a prompt are the same")
        check_temperature(self.temperature)


class Judgements:
    """The judgements about two models, `names`: choices in the file `out`, ties and skips in a file beside it."""

    def __init__(self, out: str, names: list[str]):
        stem, suffix = os.path.splitext(out)
        self.choices = out
        self.undecided = f"{stem}.undecided{suffix}"
        self.names = names

    def path(self, record: dict) -> str:
        return self.choices if "chosen" in record else self.undecided

    def ours(self, record: dict) -> bool:
        """Whether it is a judgement about the two models."""
        made = record.get("position" if "chosen" in record else "judgement")
        numbered = "prompt" in record and type(record.get("n")) is int
        return numbered and isinstance(made, str) and record.get("models") in (self.names, self.names[::-1])

    def load(self) -> list[dict]:
        """All records, oldest first. Raises UserError if a file holds anything else, or judges other models."""
        records = []
        for path in filter(os.path.exists, [self.choices, self.undecided]):
            check_file("--out", path)
            for where, record in read_records(path):
                if not self.ours(record) or self.path(record) != path:
                    raise UserError(f"{where}: not a judgement about {' and '.join(self.names)}; give another --out")
                records.append(record)
        return sorted(records, key=lambda record: record["n"])

    def save(self, path: str, records: list[dict]):
        """Replaces the file; the records are on disk when this returns. Raises UserError if that fails."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            with atomic(path) as f:
                f.writelines(json.dumps(record) + "\n" for record in records if self.path(record) == path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; the last judgement is not saved") from None

    def add(self, record: dict):
        records = self.load()
        record["n"] = records[-1]["n"] + 1 if records else 1
        self.save(self.path(record), [*records, record])

    def undo(self) -> bool:
        """Removes the last judgement that a person made; False if there is none."""
        records = self.load()
        by_people = [record for record in records if record.get("judgement") != "alike"]
        if by_people:
            records.remove(by_people[-1])
            self.save(self.path(by_people[-1]), records)
        return bool(by_people)

    def summary(self) -> str:
        records = self.load()
        counts = Counter(record.get("position") or record["judgement"] for record in records)
        text = f"left {counts['left']}, right {counts['right']}, ties {counts['tie']}, skipped {counts['skip']}"
        first, second = self.names
        if first != second:
            wins = Counter(record["models"][0] for record in records if "chosen" in record)
            text += f"; {first} {wins[first]} : {wins[second]} {second}"
        return text


def layout(prompt, left: str, right: str, width: int) -> str:
    """The prompt, a string or a conversation, and below it the two answers, in lines of at most `width` characters.

    Control characters are replaced: a model may say anything, and the terminal must not obey it.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [f"{turn['role']}: {turn['content']}" for turn in turns]
    texts += ["", "--- left", left, "", "--- right", right, ""]
    text = "\n".join(text.strip().expandtabs(4) for text in texts)
    return "\n".join(textwrap.fill(line, width) for line in clean(text).split("\n"))


def read_key(question: str) -> str:
    """As input(), but a key is enough. What was typed before the question appeared is discarded."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.input.typeahead import clear_typeahead
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()
    for key in [*KEYS, *"LRTSUQ"]:  # the arrow keys are called left and right
        bindings.add(key)(lambda event: event.app.exit(event.key_sequence[0].key))
    session = PromptSession(question, key_bindings=bindings)
    with session.input.raw_mode():
        session.input.read_keys()
    clear_typeahead(session.input)
    return session.prompt()


def ask() -> str:
    """What the person wants, a value of KEYS. Raises EOFError at the end of the input, or with Ctrl-D."""
    single_keys = in_terminal() and importlib.util.find_spec("prompt_toolkit")
    read = read_key if single_keys else read_line
    while (key := read(QUESTION).strip().lower()) not in KEYS:
        print("not one of the keys")
    print(KEYS[key])
    return KEYS[key]


def two_answers(models: list, tokenizer, prompt, ids: list[int], config: Config) -> list[tuple[str, str]] | None:
    """[(name, answer), (name, answer)], left then right: two finished, different answers, or None if there are none.

    models: two (name, model). All chance is from the prompt and the seed: after an undo the same pair appears.
    """
    rng = random.Random(json.dumps([config.seed, prompt]))
    swap = rng.random() < 0.5
    sides = []
    for name, model in models:
        options = dict(temperature=config.temperature, seed=rng.getrandbits(31))
        examples = sample_text(model, tokenizer, [ids] * TRIES, config.max_new_tokens, **options)
        sides.append([(name, example.text) for example in examples if example.ended and example.text.strip()])
    for first, second in itertools.product(*sides):
        if first[1].strip() != second[1].strip():
            return [second, first] if swap else [first, second]


def record_of(prompt, shown: list[tuple[str, str]], judgement: str) -> dict:
    """The record of a judgement about the (name, answer) shown on the left and on the right; a choice names the chosen
    one first."""
    names, answers = zip(*(shown[::-1] if judgement == "right" else shown))
    decided = judgement in ("left", "right")
    keys = ("chosen", "rejected", "position") if decided else ("left", "right", "judgement")
    return {"prompt": prompt, **dict(zip(keys, [*answers, judgement])), "models": list(names)}


def judge(judgements: Judgements, models: list, tokenizer, ids_of: dict[str, list[int]], config: Config):
    """Asks about every prompt that has no judgement, until someone quits. ids_of: {prompt as JSON: token ids}."""
    while True:
        judged = {json.dumps(record["prompt"]) for record in judgements.load()}
        waiting = [key for key in ids_of if key not in judged]
        if not waiting:
            print("\nall prompts are judged")
            return
        prompt = json.loads(waiting[0])
        shown = two_answers(models, tokenizer, prompt, ids_of[waiting[0]], config)
        if not shown:
            print(f"skipped: no two finished, different answers in {TRIES} tries to {clean(waiting[0][:60])}")
            judgements.add({"prompt": prompt, "judgement": "alike", "models": judgements.names})
            continue

        print(f"\n{len(ids_of) - len(waiting) + 1} of {len(ids_of)}; {judgements.summary()}\n")
        print(layout(prompt, shown[0][1], shown[1][1], shutil.get_terminal_size().columns))
        judgement = ask()
        if judgement == "quit":
            return
        if judgement == "undo":
            print("the last judgement is undone" if judgements.undo() else "there is nothing to undo")
        else:
            judgements.add(record_of(prompt, shown, judgement))


def main(config: Config):
    check_file("--out", config.out)
    device = find_device(config.device)
    folders = [config.policy, config.against or config.policy]
    models, tokenizers = zip(*(load_model(folder, device) for folder in folders))
    same_vocabulary(*tokenizers, *folders)
    longest = min(model.config.block_size for model in models) - config.max_new_tokens
    prompts, ids = load_prompts(config.prompts, tokenizers[0], longest)
    ids_of = dict(zip(map(json.dumps, prompts), ids))  # a prompt that occurs twice is asked once
    names = [os.path.normpath(folder) for folder in folders]
    judgements = Judgements(config.out, names)
    with suppress(EOFError, KeyboardInterrupt):
        judge(judgements, list(zip(names, models)), tokenizers[0], ids_of, config)
    print(f"\n{config.out}: {judgements.summary()}")
    print(f"train on them: python train_dpo.py --init {config.policy} --data {config.out} --valid HELD_OUT")
