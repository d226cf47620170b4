"""Instructions in Alpaca's format -> SFT records and prompts, and pairs if the file has preferences too.

    python data/alpaca/prepare.py                                           downloads Stanford's 52,002 (23 MB)
    python data/alpaca/prepare.py --file instructions_with_preference.json  any file in this format

A row is {"instruction", "input", "output"} and may have "chosen" and "rejected" answers; a file is a JSON list or JSON
Lines. README.md says more.
"""

import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/, for public.py
from nanopost.config import UserError, cli
from nanopost.records import Drop, convert
from public import hold_out, load_rows, save, string_of

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
PUBLISHED = 52_002  # records


@dataclass
class Config:
    file: str = ""  # a local file; empty: download Stanford's
    out: str = os.path.dirname(os.path.abspath(__file__))  # folder for the files
    valid: float = 0.05  # share of the prompts to hold out

    def __post_init__(self):
        if not 0 < self.valid < 1:
            raise UserError(f"--valid must be between 0 and 1, not {self.valid}")


def prompt(where: str, row: dict) -> str:
    """The instruction and, after a blank line, the input, if there is one."""
    instruction = string_of(where, row, "instruction")
    if not instruction:
        raise Drop("without an instruction")
    given = string_of(where, row, "input") if "input" in row else ""
    if given.lower() in ("", "<noinput>", "<no input>"):  # files of this format use both marks
        return instruction
    return f"{instruction}\n\n{given}"


def demonstration(where: str, row: dict) -> dict:
    record = {"prompt": prompt(where, row), "completion": string_of(where, row, "output")}
    if not record["completion"]:
        raise Drop("with an empty output")
    return record


def preference(where: str, row: dict) -> dict:
    if not ("chosen" in row and "rejected" in row):
        raise Drop("without a chosen and a rejected answer")
    chosen, rejected = string_of(where, row, "chosen"), string_of(where, row, "rejected")
    if not (chosen and rejected):
        raise Drop("with an empty answer")
    if chosen == rejected:
        raise Drop("with two equal answers")
    return {"prompt": prompt(where, row), "chosen": chosen, "rejected": rejected}


def main(config: Config):
    rows = load_rows(URL, config.out, PUBLISHED, config.file)
    name = config.file or "Alpaca"
    sft = convert(rows, demonstration, f"{name}: SFT")
    pairs = []
    if any("chosen" in row for _, row in rows):
        pairs = convert(rows, preference, f"{name}: pairs")
    save(config.out, hold_out(sft, config.valid), hold_out(pairs, config.valid))


if __name__ == "__main__":
    cli(main, Config)
