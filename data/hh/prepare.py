"""Anthropic's helpful and harmless preferences -> pairs, SFT records (the chosen answers) and prompts.

    python data/hh/prepare.py                                               downloads helpful-base (16 MB)
    python data/hh/prepare.py --file train.jsonl.gz --valid test.jsonl.gz   local copies, gzipped or not

A row holds two dialogues, {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}, that differ in the last
answer. README.md says more.
"""

import os
import re
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/, for public.py
from nanopost.config import UserError, cli
from nanopost.records import Drop, convert
from public import demonstrations, load_rows, pair_of, save, string_of

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{}/{}.jsonl.gz"
PUBLISHED = {  # subset: records of train and of test
    "helpful-base": (43_835, 2_354),
    "helpful-online": (22_007, 1_137),
    "helpful-rejection-sampled": (52_421, 2_749),
    "harmless-base": (42_537, 2_312),
}
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class Config:
    subset: str = "helpful-base"  # or helpful-online, helpful-rejection-sampled, harmless-base
    file: str = ""  # a local train.jsonl or train.jsonl.gz; empty: download the subset
    valid: str = ""  # the local test.jsonl or test.jsonl.gz that belongs to --file
    out: str = os.path.dirname(os.path.abspath(__file__))  # folder for the files

    def __post_init__(self):
        if self.subset not in PUBLISHED:
            raise UserError(f"--subset must be one of {', '.join(PUBLISHED)}, not {self.subset}")
        if bool(self.file) != bool(self.valid):
            raise UserError("--file and --valid go together: the local train and test files of one subset")


def conversation(dialogue: str) -> list[dict]:
    """The messages of a dialogue. Raises Drop unless Human and Assistant take turns and the Assistant comes last.

    A dialogue in which someone speaks twice in a row is dropped, not repaired. There are few, and nothing shows whether
    the two turns are two messages or one text that quotes "Human:".
    """
    before, *parts = TURN.split("\n\n" + dialogue)
    messages = [{"role": ROLES[speaker], "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2])]
    alternating = ["user", "assistant"] * max(1, len(messages) // 2)
    if before.strip() or [message["role"] for message in messages] != alternating:
        raise Drop("in which Human and Assistant do not take turns")
    return messages


def preference(where: str, row: dict) -> dict:
    """Split at the Assistant's last turn: everything before it is the prompt, and must be the same on both sides."""
    chosen, rejected = string_of(where, row, "chosen"), string_of(where, row, "rejected")
    return pair_of(conversation(chosen), conversation(rejected))


def main(config: Config):
    splits = []
    for split, file, published in zip(("train", "test"), (config.file, config.valid), PUBLISHED[config.subset]):
        rows = load_rows(URL.format(config.subset, split), config.out, published, file)
        splits.append(convert(rows, preference, file or f"{config.subset} {split}"))
    save(config.out, [demonstrations(pairs) for pairs in splits], splits)


if __name__ == "__main__":
    cli(main, Config)
