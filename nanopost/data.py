"""JSONL records -> examples (ids and mask) -> length-sorted, right-padded batches.

    {"text": ...}                                       language modelling: every token is a target
    {"prompt": ..., "completion": ...}                  SFT
    {"messages": [{"role", "content"}, ...]}            SFT: every assistant turn is a target
    {"prompt": ..., "chosen": ..., "rejected": ...}     reward model, DPO
    {"prompt": ...}                                     PPO, sampling, evaluation

In place of a string, prompt, completion, chosen and rejected may be conversations: lists of {"role", "content"}. A pair
without a prompt has it in both conversations: all but their last turns. Other keys are ignored. A malformed line stops
everything with its file and line. Records that do not fit the context or hold no target are dropped, counted, and the
count is printed.
"""

import json
import os
from dataclasses import dataclass

import numpy as np
import torch

from nanopost.config import UserError

ROLES = ("user", "assistant", "system")
PAD_TO = 8  # rows are padded to a multiple of this (as block_size is one): few shapes, little padding


# ------------------------------------------------------------------------------------------------------- records


def read_records(path: str):
    """Yields (where, record) per line, where = "file:line". Raises UserError for a missing file and invalid JSON."""
    if not os.path.isfile(path):
        hint = "; python data/notes/prepare.py writes the embedded data" if path.startswith("data/notes/") else ""
        raise UserError(f"no file {path}{hint}")
    with open(path, "rb") as f:
        yield from parse_records(path, f)


def parse_records(path: str, lines):
    """read_records of the lines, bytes each, of a file that is open or was unpacked."""
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}:{n}: not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{n}: invalid JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{n}: a record must be an object like {{\"prompt\": ...}}, not {line[:40]!r}")
        yield f"{path}:{n}", record


def conversation(where: str, record: dict, key: str, role: str) -> list[dict]:
    """record[key], a string or a conversation, as a list of messages; a string becomes one turn of `role`.

    Raises UserError unless every message has a known role and a text, and the last turn (of a prompt) or the first
    (of an answer) is of `role`. An assistant's text must not be empty: it would teach to say nothing.
    """
    value = record[key]
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key} must be a string or a list of messages, not {json.dumps(value)[:40]}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: {key}: a message must be {{\"role\": ..., \"content\": text}}, "
                            f"not {json.dumps(message)[:60]}")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}: {key}: the role must be one of {', '.join(ROLES)}, not {message.get('role')!r}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise UserError(f"{where}: {key} is empty; remove the record or give it an answer")
    if key == "prompt" and value[-1]["role"] != role:
        raise UserError(f"{where}: {key} must end with a turn of the {role}")
    if key not in ("prompt", "messages") and not value[0]["role"] == value[-1]["role"] == role:
        raise UserError(f"{where}: {key} must begin and end with a turn of the {role}")
    return value


@dataclass
class Example:
    """One sequence: its token ids and, per token, whether it is a target of the loss."""

    ids: list[int]
    mask: list[bool]


def with_prompt(where: str, pair: dict) -> dict:
    """A pair that has its prompt inside two conversations -> the same pair with prompt, chosen and rejected apart.

    Raises UserError if the sides do not share all but their last turns, or are strings: where the prompt ends in two
    strings that begin alike, nobody knows.
    """
    require(where, pair, "chosen", "rejected")
    if "prompt" in pair:
        return pair
    chosen, rejected = pair["chosen"], pair["rejected"]
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise UserError(f"{where}: prompt is missing; only chosen and rejected that are conversations may contain it")
    if not chosen[:-1] or chosen[:-1] != rejected[:-1]:
        raise UserError(f"{where}: prompt is missing, and chosen and rejected do not share all but their last turns")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def encode_answer(tokenizer, where: str, record: dict, key: str) -> Example:
    """The prompt and the answer under `key`: prompt ids and answer ids are made apart and concatenated."""
    prompt, _ = tokenizer.chat(conversation(where, record, "prompt", "user"))
    answer, mask = tokenizer.chat(conversation(where, record, key, "assistant"))
    return Example(prompt + answer, [False] * len(prompt) + mask)


def encode_example(tokenizer, where: str, record: dict) -> Example:
    """A record of any shape that SFT reads."""
    if "messages" in record:
        if isinstance(record["messages"], str):
            raise UserError(f"{where}: messages must be a list of messages, not a string")
        return Example(*tokenizer.chat(conversation(where, record, "messages", "user")))
    if "prompt" in record and "completion" in record:
        return encode_answer(tokenizer, where, record, "completion")
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"]:
            raise UserError(f"{where}: text must be a text that is not empty, not {json.dumps(record['text'])[:40]}")
        return Example(*tokenizer.document(record["text"]))
    raise UserError(f"{where}: needs text, messages, or prompt and completion; it has {', '.join(record) or 'nothing'}")


def load_examples(path: str, tokenizer, block_size: int | None = None, limit: int | None = None) -> list[Example]:
    """The examples of a file for SFT or pretraining, at most `limit`. Raises UserError if none is left."""
    examples, dropped = [], {}
    for where, record in read_records(path):
        if limit is not None and len(examples) == limit:
            break
        example = encode_example(tokenizer, where, record)
        if block_size and len(example.ids) > block_size:
            count(dropped, f"longer than {block_size} tokens")
        elif not any(example.mask[1:]):
            count(dropped, "without a target")
        else:
            examples.append(example)
    report(path, len(examples), "examples", dropped)
    return examples


def load_pairs(path: str, tokenizer, block_size: int | None = None, limit: int | None = None) -> list:
    """(chosen, rejected) Examples of a file of preferences, at most `limit`. Pairs whose two sides are the same teach
    nothing and are dropped."""
    pairs, dropped = [], {}
    for where, record in read_records(path):
        if limit is not None and len(pairs) == limit:
            break
        record = with_prompt(where, record)
        pair = tuple(encode_answer(tokenizer, where, record, key) for key in ("chosen", "rejected"))
        if block_size and max(len(side.ids) for side in pair) > block_size:
            count(dropped, f"longer than {block_size} tokens")
        elif pair[0].ids == pair[1].ids:
            count(dropped, "with two equal sides")
        else:
            pairs.append(pair)
    report(path, len(pairs), "pairs", dropped)
    return pairs


def load_prompts(path: str, tokenizer, longest: int, limit: int | None = None) -> tuple[list, list[list[int]]]:
    """(prompts as they stand in the file, the token ids), at most `limit`. `longest` is the room for one, in tokens."""
    if longest < 1:
        raise UserError("the longest answer leaves no room for a prompt in the context; lower --max-new-tokens")
    prompts, ids, dropped = [], [], {}
    for where, record in read_records(path):
        if limit is not None and len(prompts) == limit:
            break
        require(where, record, "prompt")
        prompt = tokenizer.prompt(conversation(where, record, "prompt", "user"))
        if len(prompt) > longest:
            count(dropped, f"longer than {longest} tokens")
        else:
            prompts.append(record["prompt"])
            ids.append(prompt)
    report(path, len(prompts), "prompts", dropped)
    return prompts, ids


def require(where: str, record: dict, *keys: str):
    for key in keys:
        if key not in record:
            raise UserError(f"{where}: needs {', '.join(keys)}; {key} is missing")


def count(counts: dict, key: str):
    counts[key] = counts.get(key, 0) + 1


def report(path: str, kept: int, what: str, dropped: dict):
    if not kept:
        raise UserError(f"{path}: no {what}" + "".join(f"; {n} are {why}" for why, n in dropped.items()))
    print(f"{path}: {kept:,} {what}" + "".join(f", dropped {n:,} {why}" for why, n in dropped.items()))


# ------------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Right-padded rows. Everything per token is target-aligned: column t is about predicting ids[:, t+1].

    ids (B, T) int64; mask (B, T-1) bool, True where ids[:, t+1] is a target; index (N,) int64, the flat positions of
    the targets in (B, T-1), made on the host; lengths (B,) int64, real tokens a row.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    index: torch.Tensor
    lengths: torch.Tensor

    @property
    def targets(self) -> int:
        """How many targets there are: a number of the host, no synchronisation."""
        return len(self.index)


def collate(examples: list[Example], device="cpu", pad_id: int = 0) -> Batch:
    """Pads on the right. What the padding holds does not matter: no real token sees it and no target is in it."""
    lengths = np.array([len(e.ids) for e in examples])
    T = -(-int(lengths.max()) // PAD_TO) * PAD_TO
    ids = np.full((len(examples), T), pad_id, dtype=np.int64)
    mask = np.zeros((len(examples), T), dtype=bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = example.mask
    mask = mask[:, 1:]  # token-aligned -> target-aligned
    tensors = ids, mask, np.flatnonzero(mask), lengths
    return Batch(*(to_device(torch.from_numpy(np.ascontiguousarray(t)), device) for t in tensors))


def to_device(x: torch.Tensor, device) -> torch.Tensor:
    """x of the host on the device. From pinned memory a GPU fetches it by itself: nobody waits for anybody."""
    return (x.pin_memory() if torch.device(device).type == "cuda" else x).to(device, non_blocking=True)


def batches(lengths: list[int], batch_size: int, seed: int = 0, window: int = 16):
    """Yields lists of row numbers for ever, epoch after epoch: every row once an epoch, rows of like length together.

    Rows are shuffled, sorted by length inside windows of `window` batches, cut into batches, and the batches shuffled.
    A last, smaller batch is yielded too: nothing is left out. The order depends on nothing but the arguments, so a
    resumed run finds its place by counting.
    """
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths)
    while True:
        order, epoch = rng.permutation(len(lengths)), []
        for start in range(0, len(order), window * batch_size):
            rows = order[start : start + window * batch_size]
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            epoch += [rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size)]
        for i in rng.permutation(len(epoch)):
            yield epoch[i]


def split(rows: list, size: int) -> list[list]:
    """The micro-batches of a batch: consecutive parts of at most `size` rows (0: all in one)."""
    size = size or max(1, len(rows))
    return [rows[i : i + size] for i in range(0, len(rows), size)]
