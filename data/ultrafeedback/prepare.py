"""UltraFeedback, binarized -> pairs, SFT records (the chosen answers) and prompts.

    python data/ultrafeedback/prepare.py                                    downloads it (230 MB); parquet needs pyarrow
    python data/ultrafeedback/prepare.py --file train.jsonl --valid test.jsonl      local copies: parquet or JSON Lines

A row holds two conversations that differ in the last answer, "chosen" and "rejected", and the mark of each,
"score_chosen" and "score_rejected". README.md says more.
"""

import json
import os
from dataclasses import dataclass

from nanopost.config import UserError, cli
from nanopost.data import ROLES
from nanopost.prepare import Drop, convert, demonstrations, load, save

URL = ("https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized/resolve/main/"
       "data/{}-00000-of-00001.parquet")
PUBLISHED = {"train_prefs": 61_135, "test_prefs": 2_000}  # records
KEYS = ("chosen", "rejected", "score_chosen", "score_rejected")


@dataclass
class Config:
    file: str = ""  # a local file of train_prefs; empty: download both
    valid: str = ""  # the local file of test_prefs that belongs to --file
    out: str = os.path.dirname(os.path.abspath(__file__))  # folder for the files


def conversation(where: str, row: dict, side: str) -> list[dict]:
    """The messages of one side. Raises UserError if they are none."""
    messages = row[side]
    if not isinstance(messages, list) or not all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages):
        raise UserError(f"{where}: {side} must be a list of {{\"role\": {' or '.join(ROLES)}, \"content\": text}}, not "
                        f"{json.dumps(messages, default=str)[:60]}")
    return [{"role": m["role"], "content": m["content"].strip()} for m in messages]


def preference(where: str, row: dict) -> dict:
    sides = [conversation(where, row, side) for side in ("chosen", "rejected")]
    if row["score_chosen"] == row["score_rejected"]:
        raise Drop("with equal scores")
    if any([m["role"] for m in side[-2:]] != ["user", "assistant"] for side in sides):
        raise Drop("that do not end with a user's turn and an answer")
    if not all(m["content"] for side in sides for m in side):
        raise Drop("with an empty turn")
    (*prompt, chosen), (*other, rejected) = sides
    if prompt != other:
        raise Drop("with two different prompts")
    if chosen == rejected:
        raise Drop("with two equal answers")
    return {"prompt": prompt, "chosen": chosen["content"], "rejected": rejected["content"]}


def main(config: Config):
    if bool(config.file) != bool(config.valid):
        raise UserError("--file and --valid go together: local files of train_prefs and test_prefs")
    splits = []
    for (split, published), file in zip(PUBLISHED.items(), (config.file, config.valid)):
        rows = load(URL.format(split), config.out, file, KEYS, published)
        splits.append(convert(rows, preference, file or split))
    save(config.out, tuple(map(demonstrations, splits)), tuple(splits))


if __name__ == "__main__":
    cli(main, Config)
