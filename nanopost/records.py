"""JSON -> checked records. Malformed text stops the run with its file and line, and what to do."""

import json
import os
from collections import Counter

from nanopost.config import UserError, clean

ROLES = ("user", "assistant", "system")
TOO_DEEP = "invalid JSON: hundreds of brackets inside each other"


class Drop(Exception):
    """Raised for a record that is well-formed but of no use; its text completes "dropped 3 ..."."""


def convert(rows, function, name: str, what: str = "records", limit: int | None = None) -> list:
    """[function(where, row)] of (where, row) pairs, at most `limit`, without the rows for which it raises Drop. Prints
    how many were kept, and how many dropped and why. Raises UserError if none is left."""
    kept, dropped = [], Counter()
    for where, row in rows:
        if len(kept) == limit:
            break
        try:
            kept.append(function(where, row))
        except Drop as reason:
            dropped[str(reason)] += 1
        except RecursionError:  # comparing and printing go deeper than reading
            raise UserError(f"{where}: {TOO_DEEP}") from None
    if not kept:
        reasons = [f"; {n} are {reason}" for reason, n in dropped.items()]
        raise UserError(f"{name}: no {what}" + "".join(reasons))
    reasons = [f", dropped {n:,} {reason}" for reason, n in dropped.items()]
    print(clean(f"{name}: {len(kept):,} {what}") + "".join(reasons))
    return kept


def read_records(path: str):
    """Yields (where, record) per line, where = "file:line". Raises UserError for a missing file and invalid JSON."""
    if not os.path.isfile(path):
        embedded = path.startswith("data/notes/")
        hint = "; python data/notes/prepare.py writes the embedded data" if embedded else ""
        raise UserError(f"no file {path}{hint}")
    with open(path, "rb") as f:
        yield from parse_records(path, f)


def parse_records(path: str, lines):
    """read_records for lines of bytes: an open file, or one that was unpacked."""
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse_json(f"{path}:{n}", line)
        if not isinstance(record, dict):
            shape = '{"prompt": ...}'
            raise UserError(f"{path}:{n}: a record must be an object like {shape}, not {line[:40]!r}")
        yield f"{path}:{n}", record


def parse_json(where: str, text: bytes):
    """The value of this JSON. Raises UserError, with where it stands, if it is none."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: invalid JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise UserError(f"{where}: invalid JSON: a number of thousands of digits") from None
    except RecursionError:
        raise UserError(f"{where}: {TOO_DEEP}") from None


def read_json(path: str):
    """The value in a file of JSON. Raises UserError if the file is missing (or a pipe, which would never end), or the
    JSON invalid."""
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    with open(path, "rb") as f:
        return parse_json(path, f.read())


def conversation(where: str, record: dict, key: str, role: str) -> list[dict]:
    """record[key], a string or a conversation, as a list of messages; a string becomes one turn of `role`.

    Raises UserError unless every message has a known role and a text, and the last turn (of a prompt) or the first and
    the last (of an answer) is of `role`. An empty answer is an error: it would teach the model to say nothing.
    """
    value = record[key]
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key} must be a string or a list of messages, not {json.dumps(value)[:40]}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            shape = '{"role": ..., "content": text}'
            raise UserError(f"{where}: {key}: a message must be {shape}, not {json.dumps(message)[:60]}")
        if message.get("role") not in ROLES:
            found = message.get("role")
            raise UserError(f"{where}: {key}: the role must be one of {', '.join(ROLES)}, not {found!r}")
        if message["role"] == "assistant" and not message["content"].strip():
            what = key if len(value) == 1 else f"{key}: an assistant's turn"
            raise UserError(f"{where}: {what} is empty; remove the record or give it an answer")
    if key == "prompt" and value[-1]["role"] != role:
        raise UserError(f"{where}: {key} must end with a turn of the {role}")
    if key not in ("prompt", "messages") and not value[0]["role"] == value[-1]["role"] == role:
        raise UserError(f"{where}: {key} must begin and end with a turn of the {role}")
    return value


def with_prompt(where: str, pair: dict) -> dict:
    """A pair whose prompt is inside its two conversations -> the same pair with prompt, chosen and rejected apart.

    Raises UserError if the sides do not share all but their last turns, or are strings: two plain strings do not say
    where the shared prompt ends.
    """
    require(where, pair, "chosen", "rejected")
    if "prompt" in pair:
        return pair
    chosen, rejected = pair["chosen"], pair["rejected"]
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        hint = "only chosen and rejected that are conversations may contain it"
        raise UserError(f"{where}: prompt is missing; {hint}")
    if not chosen[:-1] or chosen[:-1] != rejected[:-1]:
        hint = "chosen and rejected do not share all but their last turns"
        raise UserError(f"{where}: prompt is missing, and {hint}")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def require(where: str, record: dict, *keys: str):
    for key in keys:
        if key not in record:
            raise UserError(f"{where}: needs {', '.join(keys)}; {key} is missing")
