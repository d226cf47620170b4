"""Instructions in Alpaca's format -> SFT records and prompts, and pairs where the file holds preferences too.

    python data/alpaca/prepare.py                                           downloads Stanford's 52,002 (23 MB)
    python data/alpaca/prepare.py --file instructions_with_preference.json  any file in this format

A row is {"instruction", "input", "output"} and may have "chosen" and "rejected" answers; a file is a JSON list or JSON
Lines. README.md says more.
"""

import os
from dataclasses import dataclass

from nanopost.config import UserError, cli
from nanopost.prepare import Drop, convert, hold_out, load, save, text

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
PUBLISHED = 52_002  # records


@dataclass
class Config:
    file: str = ""  # a local file; empty: download Stanford's
    out: str = os.path.dirname(os.path.abspath(__file__))  # folder for the files
    valid: float = 0.05  # share of the prompts that is held out


def prompt(where: str, row: dict) -> str:
    """The instruction and, after a blank line, the input, where there is one."""
    instruction = text(where, row, "instruction")
    if not instruction:
        raise Drop("without an instruction")
    given = text(where, row, "input") if "input" in row else ""
    if given.lower() in ("", "<noinput>", "<no input>"):  # the two marks occur in files of this format
        return instruction
    return f"{instruction}\n\n{given}"


def demonstration(where: str, row: dict) -> dict:
    record = {"prompt": prompt(where, row), "completion": text(where, row, "output")}
    if not record["completion"]:
        raise Drop("with an empty output")
    return record


def preference(where: str, row: dict) -> dict:
    if not ("chosen" in row and "rejected" in row):
        raise Drop("without a chosen and a rejected answer")
    chosen, rejected = text(where, row, "chosen"), text(where, row, "rejected")
    if not (chosen and rejected):
        raise Drop("with an empty answer")
    if chosen == rejected:
        raise Drop("with two equal answers")
    return {"prompt": prompt(where, row), "chosen": chosen, "rejected": rejected}


def main(config: Config):
    if not 0 < config.valid < 1:
        raise UserError("--valid must be between 0 and 1")
    rows = list(load(URL, config.out, config.file, ("instruction", "output"), PUBLISHED))
    name = config.file or "Alpaca"
    sft, pairs = convert(rows, demonstration, f"{name}: SFT"), []
    if any("chosen" in row for _, row in rows):
        pairs = convert(rows, preference, f"{name}: pairs")
    save(config.out, hold_out(sft, config.valid), hold_out(pairs, config.valid))


if __name__ == "__main__":
    cli(main, Config)
