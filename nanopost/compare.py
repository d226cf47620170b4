"""Which answer is better? You judge pairs of a model's answers, and train_rm.py and train_dpo.py learn from it.

    python -m nanopost.compare out/sft --prompts prompts.jsonl --out prefs.jsonl
    python -m nanopost.compare out/sft --against out/ppo --prompts prompts.jsonl --out sft_ppo.jsonl    and a tally

Which answer stands on which side is random. Every judgement is on the disk before the next pair is shown; the same
command goes on where it stopped. Keys may also come from a pipe, one a line.

A choice is a line {"prompt", "chosen", "rejected", ...} of --out, and nothing else is in that file, so that it can be
trained on at any time. A tie teaches nothing and has no chosen side: ties and skips are kept in a file beside it
(prefs.undecided.jsonl), so that they are not asked again. "n" numbers the judgements of both files for undoing.
"""

import errno
import io
import json
import os
import random
import re
import shutil
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass

from nanopost.checkpoint import atomic, freeze, load_model, same_vocabulary
from nanopost.config import UserError, cli
from nanopost.data import load_prompts, parse_records
from nanopost.run import find_device
from nanopost.sampling import sample_text

TRIES = 4  # answers sampled for each side, in one batch, to find two that are finished and different
NARROW = 60  # columns of a terminal in which two answers do not fit side by side
KEYS = {"l": "left", "r": "right", "t": "tie", "s": "skip", "u": "undo", "q": "quit", "": "quit",
        "\x1b[d": "left", "\x1b[c": "right", "\xe0k": "left", "\xe0m": "right",  # the arrows, of terminals and Windows
        "\x03": "quit", "\x04": "quit"}  # Ctrl-C and Ctrl-D where they come as characters; "" is the end of the input


@dataclass
class Config:
    policy: str  # the folder of the model whose answers are compared
    prompts: str = "data/notes/prompts_train.jsonl"  # what it is asked
    out: str = "out/people/train.jsonl"  # the judgements; an existing file is continued
    against: str = ""  # the folder of another model that gives the second answers; empty: the same model
    max_new_tokens: int = 80  # longest answer; unfinished ones are not shown
    temperature: float = 1.0  # of the sampling
    seed: int = 0  # of the answers and of their sides
    device: str = "auto"  # auto, cpu, cuda, mps


# --------------------------------------------------------------------------------------------------------- the files


class Judgements:
    """The judgements in their order, in memory and on the disk: choices in `out`, ties and skips in a file beside it.

    add() appends a line and forces it to the disk; undo() replaces a file by one without the line. A crash at any time
    loses at most the judgement that is being written. Raises UserError if a file holds anything else, or judgements of
    other models than `names`, the two that are compared now.
    """

    def __init__(self, out: str, names: list[str]):
        self.out, self.undecided = out, "{}.undecided{}".format(*os.path.splitext(out))
        self.names, self.records = names, []
        for path in (self.out, self.undecided):
            for where, record in read_whole_lines(path):
                if not {"prompt", "models", "n", "judgement" if path == self.undecided else "position"} <= set(record):
                    raise UserError(f"{where}: not a judgement of this tool; give another --out")
                if record["models"] not in (names, names[::-1]):
                    raise UserError(f"{where}: judges {json.dumps(record['models'])}, not {json.dumps(names)}; give "
                                    "another --out")
                self.records.append(record)
        self.records.sort(key=lambda record: record["n"])

    def path(self, record: dict) -> str:
        return self.out if "chosen" in record else self.undecided

    def add(self, record: dict):
        record["n"] = self.records[-1]["n"] + 1 if self.records else 1
        os.makedirs(os.path.dirname(self.path(record)) or ".", exist_ok=True)
        line = json.dumps(record).encode() + b"\n"
        with open(self.path(record), "ab", buffering=0) as f:  # unbuffered: one write of the whole line
            start = f.seek(0, os.SEEK_END)
            try:
                if f.write(line) < len(line):  # what was left of the disk
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(f.fileno())
            except OSError as error:
                f.truncate(start)
                raise UserError(f"{self.path(record)}: {error.strerror}; the last judgement is not saved") from None
        self.records.append(record)

    def undo(self) -> list[dict]:
        """Removes the last judgement, and what the program itself skipped after it; returns the removed records."""
        people = [i for i, record in enumerate(self.records) if record.get("judgement") != "alike"]
        last = people[-1] if people else len(self.records)
        removed = self.records[last:]
        for path in {self.path(record) for record in removed}:
            rows = [row for _, row in read_whole_lines(path) if row not in removed]
            with atomic(path) as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        del self.records[last:]
        return removed

    def summary(self) -> str:
        counts = Counter(record.get("position") or record["judgement"] for record in self.records)
        text = (f"choices {counts['left'] + counts['right']} (left {counts['left']}, right {counts['right']}), "
                f"ties {counts['tie']}, skipped {counts['skip']}")
        if self.names[0] != self.names[1]:
            wins = Counter(record["models"][0] for record in self.records if "chosen" in record)
            text += f"; {self.names[0]} {wins[self.names[0]]} : {wins[self.names[1]]} {self.names[1]}"
        return text


def read_whole_lines(path: str):
    """Yields (where, record) of a file that may not exist. A line that was cut off while it was written (a full disk,
    no power) is removed from the file: whoever was judging has not seen the next pair yet."""
    if not os.path.isfile(path):
        return
    with open(path, "rb+") as f:
        data = f.read()
        rest = data[data.rfind(b"\n") + 1 :]
        if rest:
            try:
                json.loads(rest)
                f.write(b"\n")  # whole: someone's editor left out the end of the last line
            except ValueError:
                f.truncate(len(data) - len(rest))
                data = data[: -len(rest)]
                print(f"{path}: removed a line that was not written to its end")
    yield from parse_records(path, data.splitlines())


# -------------------------------------------------------------------------------------------------------- the screen


def cells(text: str) -> int:
    """The columns that a text takes in a terminal: Chinese characters and most emoji take two, accents none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells. Line breaks are kept, longer words cut, control characters made visible: a model
    may say anything, and the terminal must not obey it."""
    lines = []
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.strip().expandtabs(4))
    for paragraph in text.split("\n"):
        line = ""
        for piece in re.findall(r" +|[^ ]+", paragraph):
            while cells(line + piece) > width:
                if not line.strip():  # a word, or spaces, alone too long
                    fits = max(n for n in range(len(piece) + 1) if cells(line + piece[:n]) <= width)
                    line, piece = line + piece[:fits], piece[fits:]
                lines.append(line.rstrip())
                line, piece = "", piece.lstrip()
            line += piece
        lines.append(line.rstrip())
    return lines


def layout(prompt, left: str, right: str, width: int) -> str:
    """The prompt, and below it the two answers side by side, or one above the other on a narrow terminal."""
    width = max(width, 20)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    lines = [line for turn in turns for line in wrap(f"{turn['role']}: {turn['content']}", width)] + [""]
    if width < NARROW:
        lines += ["--- left", *wrap(left, width), "--- right", *wrap(right, width)]
    else:
        column = (width - 3) // 2
        sides = [["left", "-" * column, *wrap(text, column)] for text in (left, right)]
        sides[1][0] = "right"
        height = max(map(len, sides))
        for a, b in zip(*(side + [""] * (height - len(side)) for side in sides)):
            lines.append(f"{a}{' ' * (column - cells(a))} | {b}".rstrip())
    return "\n".join(lines) + "\n"


def ask(stream) -> str:
    """What the next key, or the next line of a pipe, means: a value of KEYS. Anything else is asked again."""
    while True:
        print("l left   r right   t tie   s skip   u undo   q quit > ", end="", flush=True)
        typed = read_key() if stream.isatty() else stream.readline()
        key = typed.strip().lower() or typed  # an empty line is not the end of the input
        print(KEYS.get(key, "not one of the keys"))
        if key in KEYS:
            return KEYS[key]


def read_key() -> str:
    """One key of the terminal, unbuffered. What was typed before the pair was shown is discarded."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        import msvcrt

        while msvcrt.kbhit():
            msvcrt.getwch()
        key = msvcrt.getwch()
        return key + msvcrt.getwch() if key in "\0\xe0" else key
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSAFLUSH)
        key = os.read(fd, 8)  # an arrow is several bytes and comes at once
        return key.decode(errors="replace").replace("\x1bO", "\x1b[")
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


# ---------------------------------------------------------------------------------------------------------- judging


def two_answers(models, tokenizer, prompt, ids, config):
    """((answer of models[0], answer of models[1]), whether they change sides): finished, different answers, or None.

    They depend on the models, the prompt and the seed alone: what is asked again after an undo is the same.
    """
    rng = random.Random(json.dumps([config.seed, prompt]))
    swap, sides = rng.random() < 0.5, []
    for model in models:
        samples = sample_text(model, tokenizer, [ids] * TRIES, config.max_new_tokens,
                              temperature=config.temperature, seed=rng.getrandbits(31))
        sides.append([s["text"] for s in samples if s["ended"] and s["text"].strip()])
    return next(((a, b) for a in sides[0] for b in sides[1] if a.strip() != b.strip()), None), swap


def record_of(prompt, shown: list[tuple[str, str]], judgement: str) -> dict:
    """The line of a judgement about what was shown: (model's name, answer) on the left and on the right.

    {"prompt", "chosen", "rejected", "position", "models"}: where the chosen answer stood, and who gave the chosen and
    the rejected one. {"prompt", "left", "right", "judgement", "models"}: a tie or a skip.
    """
    models, answers = zip(*(shown[::-1] if judgement == "right" else shown))
    if judgement in ("left", "right"):
        keys = "chosen", "rejected", "position"
    else:
        keys = "left", "right", "judgement"
    return {"prompt": prompt, **dict(zip(keys, (*answers, judgement))), "models": list(models)}


def judge(judgements, models, tokenizer, prompts, all_ids, config):
    """Asks about every prompt that has not been judged, until the end or until someone quits."""
    ids_of = {json.dumps(prompt): ids for prompt, ids in zip(prompts, all_ids)}  # a prompt is asked once
    done = {json.dumps(record["prompt"]) for record in judgements.records}
    waiting = [prompt for prompt in ids_of if prompt not in done]
    while waiting:
        prompt = json.loads(waiting[0])
        answers, swap = two_answers(models, tokenizer, prompt, ids_of[waiting[0]], config)
        if not answers:
            print(f"skipped: no two finished, different answers in {TRIES} tries to {waiting[0][:60]}")
            judgements.add({"prompt": prompt, "judgement": "alike", "models": judgements.names})
            waiting.pop(0)
            continue
        shown = list(zip(judgements.names, answers))[:: -1 if swap else 1]
        print(f"\n{len(ids_of) - len(waiting) + 1} of {len(ids_of)}; {judgements.summary()}\n")
        print(layout(prompt, shown[0][1], shown[1][1], shutil.get_terminal_size().columns))
        judgement = ask(sys.stdin or io.StringIO())  # None: started without an input
        if judgement == "quit":
            return
        if judgement == "undo":
            removed = [json.dumps(record["prompt"]) for record in judgements.undo()]
            print("the last judgement is undone" if removed else "there is nothing to undo")
            waiting = [prompt for prompt in removed if prompt in ids_of] + waiting
        else:
            judgements.add(record_of(prompt, shown, judgement))
            waiting.pop(0)
    print("\nall prompts are judged")


def main(config: Config):
    if config.temperature <= 0 or config.max_new_tokens < 1:
        raise UserError("--temperature must be above 0, or all answers are the same, --max-new-tokens at least 1")
    device, folders = find_device(config.device), [config.policy, config.against or config.policy]
    models, tokenizers = zip(*(load_model(folder, device) for folder in folders))
    same_vocabulary(*tokenizers, *folders)
    judgements = Judgements(config.out, [os.path.normpath(folder) for folder in folders])
    room = min(model.config.block_size for model in models) - config.max_new_tokens
    prompts, ids = load_prompts(config.prompts, tokenizers[0], room)
    try:
        judge(judgements, [freeze(model) for model in models], tokenizers[0], prompts, ids, config)
    except KeyboardInterrupt:
        print()
    print(f"\n{config.out}: {judgements.summary()}\n"
          f"train on them: python train_dpo.py --init {config.policy} --data {config.out} --valid HELD_OUT\n"
          "(or train_rm.py; HELD_OUT: judgements of other prompts, made in the same way)")


if __name__ == "__main__":
    cli(main, Config)
