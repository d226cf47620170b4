"""Anthropic's helpful and harmless preferences -> pairs, SFT records (the chosen answers) and prompts.

    python data/hh/prepare.py                                               downloads helpful-base (16 MB)
    python data/hh/prepare.py --file train.jsonl.gz --valid test.jsonl.gz   local copies, gzipped or not

A row holds two dialogues, {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}, that differ in the last
answer. README.md says more.
"""

import os
import re
from dataclasses import dataclass

from nanopost.config import UserError, cli
from nanopost.prepare import Drop, convert, demonstrations, load, save, text

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{}/{}.jsonl.gz"
PUBLISHED = {"helpful-base": (43_835, 2_354), "helpful-online": (22_007, 1_137), "harmless-base": (42_537, 2_312),
             "helpful-rejection-sampled": (52_421, 2_749)}  # records of train and test
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class Config:
    subset: str = "helpful-base"  # or helpful-online, helpful-rejection-sampled, harmless-base
    file: str = ""  # a local train.jsonl or train.jsonl.gz; empty: download the subset
    valid: str = ""  # the local test.jsonl or test.jsonl.gz that belongs to --file
    out: str = os.path.dirname(os.path.abspath(__file__))  # folder for the files


def conversation(dialogue: str) -> list[dict]:
    """The messages of a dialogue. Raises Drop unless Human and Assistant take turns and the Assistant comes last.

    A dialogue in which someone speaks twice in a row is not repaired: such are rare, the two turns may be one text with
    a "Human:" of its own in it or two messages, and a model that is trained on turns would learn to skip one.
    """
    before, *parts = TURN.split(dialogue)
    messages = [{"role": ROLES[speaker], "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2])]
    alternating = ["user", "assistant"] * max(1, len(messages) // 2)
    if before.strip() or [message["role"] for message in messages] != alternating:
        raise Drop("in which Human and Assistant do not take turns")
    if not all(message["content"] for message in messages):
        raise Drop("with an empty turn")
    return messages


def preference(where: str, row: dict) -> dict:
    """Split at the last turn of the Assistant: what is before is the prompt, and must be the same on both sides."""
    sides = [text(where, row, side) for side in ("chosen", "rejected")]
    (*prompt, chosen), (*other, rejected) = (conversation("\n\n" + side) for side in sides)
    if prompt != other:
        raise Drop("with two different prompts")
    if chosen == rejected:
        raise Drop("with two equal answers")
    return {"prompt": prompt, "chosen": chosen["content"], "rejected": rejected["content"]}


def main(config: Config):
    if config.subset not in PUBLISHED:
        raise UserError(f"--subset must be one of {', '.join(PUBLISHED)}")
    if bool(config.file) != bool(config.valid):
        raise UserError("--file and --valid go together: the local train and test files of one subset")
    splits = []
    for split, file, published in zip(("train", "test"), (config.file, config.valid), PUBLISHED[config.subset]):
        rows = load(URL.format(config.subset, split), config.out, file, ("chosen", "rejected"), published)
        splits.append(convert(rows, preference, file or f"{config.subset} {split}"))
    save(config.out, tuple(map(demonstrations, splits)), tuple(splits))


if __name__ == "__main__":
    cli(main, Config)
