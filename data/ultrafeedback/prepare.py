"""UltraFeedback, binarized -> pairs, SFT records (the chosen answers) and prompts.

    python data/ultrafeedback/prepare.py                                    downloads it (230 MB); needs pyarrow
    python data/ultrafeedback/prepare.py --file train.jsonl --valid test.jsonl      local copies: parquet or JSON Lines

A row holds two conversations that differ in the last answer, "chosen" and "rejected", and the score of each,
"score_chosen" and "score_rejected". README.md says more.
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/, for public.py
from nanopost.config import UserError, cli
from nanopost.records import ROLES, Drop, convert, require
from public import demonstrations, load_rows, pair_of, save

URL = (
    "https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized/resolve/main/data/{}-00000-of-00001.parquet"
)
PUBLISHED = {"train_prefs": 61_135, "test_prefs": 2_000}  # records


@dataclass
class Config:
    file: str = ""  # a local file of train_prefs; empty: download both
    valid: str = ""  # the local file of test_prefs that belongs to --file
    out: str = os.path.dirname(os.path.abspath(__file__))  # folder for the files

    def __post_init__(self):
        if bool(self.file) != bool(self.valid):
            raise UserError("--file and --valid go together: local files of train_prefs and test_prefs")


def is_message(message) -> bool:
    return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)


def conversation(where: str, row: dict, side: str) -> list[dict]:
    """The messages of one side. Raises UserError if it is anything else."""
    messages = row[side]
    if not isinstance(messages, list) or not all(is_message(message) for message in messages):
        wanted = f'a list of {{"role": {" or ".join(ROLES)}, "content": text}}'
        raise UserError(f"{where}: {side} must be {wanted}, not {json.dumps(messages, default=str)[:60]}")
    return [{"role": message["role"], "content": message["content"].strip()} for message in messages]


def preference(where: str, row: dict) -> dict:
    require(where, row, "chosen", "rejected", "score_chosen", "score_rejected")
    sides = [conversation(where, row, side) for side in ("chosen", "rejected")]
    if row["score_chosen"] == row["score_rejected"]:
        raise Drop("with equal scores")
    if any([message["role"] for message in side[-2:]] != ["user", "assistant"] for side in sides):
        raise Drop("that do not end with a user's turn and an answer")
    return pair_of(*sides)


def main(config: Config):
    splits = []
    for (split, published), file in zip(PUBLISHED.items(), (config.file, config.valid)):
        rows = load_rows(URL.format(split), config.out, published, file)
        splits.append(convert(rows, preference, file or split))
    save(config.out, [demonstrations(pairs) for pairs in splits], splits)


if __name__ == "__main__":
    cli(main, Config)
