"""JSONL records -> examples (ids and mask) -> right-padded batches.

    {"text": ...}                                       language modelling: every token is a target
    {"prompt": ..., "completion": ...}                  SFT
    {"messages": [{"role", "content"}, ...]}            SFT: every assistant turn is a target
    {"prompt": ..., "chosen": ..., "rejected": ...}     reward model, DPO
    {"prompt": ...}                                     PPO, sampling, evaluation

In place of a string, prompt, completion, chosen and rejected may be conversations: lists of {"role", "content"}. A pair
without a prompt has it in both conversations: all but their last turns. Other keys are ignored. A malformed line stops
the run with its file and line. Records that do not fit the context or hold no target are dropped and counted.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanopost.config import UserError
from nanopost.device import to_device
from nanopost.records import Drop, conversation, convert, read_records, require, with_prompt

PAD_TO = 4  # rows are padded to a multiple of this, and block_size is one: few shapes, little padding


@dataclass
class Example:
    """One sequence on the host: its ids, and a mask that is True where ids[i] itself is a target (Batch shifts it)."""

    ids: list[int]
    mask: list[bool]
    text: str = ""  # only if sampled: the response without <|end|>
    ended: bool = False  # only if sampled: whether <|end|> came
    logprob: float = 0.0  # only if sampled: of the response, in nats

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt(self) -> list[int]:
        """The ids before the first target."""
        return self.ids[: self.mask.index(True)]

    @property
    def response(self) -> list[int]:
        """The ids from the first target on, <|end|> included."""
        return self.ids[self.mask.index(True) :]


@dataclass
class Pair:
    """Two answers to one prompt. Its length is that of the longer side."""

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass
class Batch:
    """Many sequences on the device: right-padded rows. Everything per token is target-aligned: column t is about
    predicting ids[:, t+1], and 0 outside the mask."""

    ids: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T-1) bool: ids[:, t+1] is a target
    lengths: torch.Tensor  # (B,) int64: real tokens per row
    index: torch.Tensor | None = None  # (N,) int64: the flat positions of the targets in (B, T-1)
    # if the rows were sampled
    logprobs: torch.Tensor | None = None  # (B, T-1) nats, at the sampling temperature (0: at 1)
    values: torch.Tensor | None = None  # (B, T-1), if the model has a scalar head
    ended: torch.Tensor | None = None  # (B,) bool
    # what PPO's losses need
    ref_logprobs: torch.Tensor | None = None  # (B, T-1) nats
    scores: torch.Tensor | None = None  # (B,)
    advantages: torch.Tensor | None = None  # (B, T-1)
    returns: torch.Tensor | None = None  # (B, T-1)

    def __post_init__(self):
        if self.index is None:
            self.index = self.mask.flatten().nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many targets there are: a number of the host, no synchronisation."""
        return len(self.index)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors with a row per sequence: all but index, which follows from the mask."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "index"}
        return {name: x for name, x in fields.items() if x is not None}

    def rows(self, rows: torch.Tensor) -> "Batch":
        """Some rows, without the padding beyond the longest of them."""
        T = round_up(int(self.lengths[rows].max()))
        some = {name: x[rows, : T - 1] if x.dim() > 1 else x[rows] for name, x in self.tensors().items()}
        return Batch(**some | {"ids": self.ids[rows, :T]})

    def to(self, device) -> "Batch":
        tensors = self.tensors() | {"index": self.index}
        return Batch(**{name: to_device(x, device) for name, x in tensors.items()})

    @staticmethod
    def join(parts: list["Batch"], order: torch.Tensor) -> "Batch":
        """The rows of all parts in one batch: the i-th of them becomes row order[i]. Shorter parts get more padding."""
        T = max(part.ids.shape[1] for part in parts)
        back = order.argsort()
        joined = {}
        for name in parts[0].tensors():
            width = T if name == "ids" else T - 1
            tensors = [part.tensors()[name] for part in parts]
            rows = torch.cat([F.pad(x, (0, width - x.shape[1])) if x.dim() > 1 else x for x in tensors])
            joined[name] = rows[back]
        return Batch(**joined)

    def responses(self) -> list[list[int]]:
        """The target ids of every row, without the end token of those that ended."""
        rows = zip(self.ids[:, 1:].cpu(), self.mask.cpu(), self.ended.tolist(), strict=True)
        targets = [(ids[mask].tolist(), ended) for ids, mask, ended in rows]
        return [ids[:-1] if ended else ids for ids, ended in targets]


def round_up(length: int) -> int:
    return math.ceil(length / PAD_TO) * PAD_TO


def collate(rows: list[Example], device="cpu", pad_id: int = 0) -> Batch:
    """Pads B examples on the right to (B, T). What the padding holds does not matter: no real token attends to it and
    no target is in it."""
    lengths = np.array([len(row) for row in rows])
    T = round_up(int(lengths.max()))
    ids = np.full((len(rows), T), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), T), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        mask[i, : len(row)] = row.mask
    mask = np.ascontiguousarray(mask[:, 1:])  # token-aligned -> target-aligned
    index = np.flatnonzero(mask)  # made on the host: the device need not be asked how many targets there are
    return Batch(*(to_device(torch.from_numpy(x), device) for x in (ids, mask, lengths, index)))


def batches(rows: list, batch_size: int, seed: int = 0, window: int = 32):
    """Yields lists of row numbers forever: every row once per epoch, rows of similar length together.

    Rows are shuffled, sorted by length within windows of `window` batches, cut into batches (the last one may be
    smaller), and the batches shuffled. The order depends only on the arguments, so a resumed run finds its place by
    counting. Raises UserError if there are no rows.
    """
    if not rows:
        raise UserError("there is nothing to train on; give a file of records (--data, --prompts)")
    rng = np.random.default_rng(seed)
    lengths = np.array([len(row) for row in rows])
    while True:
        order, epoch = rng.permutation(len(rows)), []
        for start in range(0, len(order), window * batch_size):
            part = order[start : start + window * batch_size]
            part = part[np.argsort(lengths[part], kind="stable")]
            epoch += [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
        for i in rng.permutation(len(epoch)):
            yield epoch[i]


def micro_batches(rows: list, size: int) -> list[list]:
    """Consecutive parts of at most `size` rows (0: all in one)."""
    size = size or max(1, len(rows))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def length_order(rows: list) -> list[int]:
    """The positions of the rows, the shortest first."""
    return sorted(range(len(rows)), key=lambda i: len(rows[i]))


def in_length_order(rows: list[Example], size: int, device):
    """Yields (positions, Batch) of at most `size` rows each, rows of similar length together: little padding."""
    for positions in micro_batches(length_order(rows), size):
        yield positions, collate([rows[i] for i in positions], device)


def map_batches(function, rows: list[Example], size: int, device) -> torch.Tensor:
    """function(batch) -> (B, ...) of all rows, in length order and put back: (N, ...), on their device."""
    parts, order = [], []
    for positions, batch in in_length_order(rows, size, device):
        parts.append(function(batch))
        order += positions
    if not parts:
        return torch.zeros(0)
    back = torch.tensor(order).argsort()
    return torch.cat(parts)[to_device(back, parts[0].device)]


def map_pairs(function, pairs: list[Pair], size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """function(batch) -> (B, ...) of both sides of P pairs: chosen (P, ...), rejected (P, ...).

    At most `size` sides go through it together; 0: half of them, the shorter ones, then the longer ones. The two sides
    of a pair differ in length: in one batch, much of it would be padding."""
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return map_batches(function, sides, size or len(pairs), device).chunk(2)


# ------------------------------------------------------------------------------------------------- from files


def load_examples(path: str, tokenizer, block_size: int = 10**9, limit: int | None = None) -> list[Example]:
    """The examples of a file for SFT or pretraining, at most `limit`; of an empty path, none. Raises UserError if the
    file has none."""

    def encode(where, record):
        example = encode_example(tokenizer, where, record)
        if len(example) > block_size:
            raise Drop(f"longer than {block_size} tokens")
        if not any(example.mask[1:]):
            raise Drop("without a target")
        return example

    return convert(read_records(path), encode, path, "examples", limit) if path else []


def load_pairs(path: str, tokenizer, block_size: int = 10**9, limit: int | None = None) -> list[Pair]:
    """The pairs of a file of preferences, as load_examples. Two equal sides teach nothing: such pairs are dropped."""

    def encode(where, record):
        return encode_pair(tokenizer, where, record, block_size)

    return convert(read_records(path), encode, path, "pairs", limit) if path else []


def load_prompts(path: str, tokenizer, longest: int, limit: int | None = None) -> tuple[list, list[list[int]]]:
    """(the prompts as they stand in the file, their ids), of at most `longest` tokens each, as load_examples."""
    if longest < 1:
        raise UserError("the longest answer leaves no room for a prompt in the context; lower --max-new-tokens")

    def encode(where, record):
        require(where, record, "prompt")
        ids = tokenizer.prompt(conversation(where, record, "prompt", "user"))
        if len(ids) > longest:
            raise Drop(f"longer than {longest} tokens")
        return record["prompt"], ids

    both = convert(read_records(path), encode, path, "prompts", limit) if path else []
    return [prompt for prompt, _ in both], [ids for _, ids in both]


def encode_answer(tokenizer, where: str, record: dict, key: str) -> Example:
    """The prompt and the answer under `key`: each is tokenised by itself, then their ids are concatenated."""
    prompt, _ = tokenizer.chat(conversation(where, record, "prompt", "user"))
    answer, mask = tokenizer.chat(conversation(where, record, key, "assistant"))
    return Example(prompt + answer, [False] * len(prompt) + mask)


def encode_pair(tokenizer, where: str, record: dict, block_size: int) -> Pair:
    """A record of two answers. Raises Drop if it is of no use."""
    record = with_prompt(where, record)
    pair = Pair(*(encode_answer(tokenizer, where, record, side) for side in ("chosen", "rejected")))
    if len(pair) > block_size:
        raise Drop(f"longer than {block_size} tokens")
    if pair.chosen.ids == pair.rejected.ids:
        raise Drop("with two equal sides")
    return pair


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
            raise UserError(f"{where}: text must be a non-empty string, not {json.dumps(record['text'])[:40]}")
        return Example(*tokenizer.document(record["text"]))
    raise UserError(f"{where}: needs text, messages, or prompt and completion; it has {', '.join(record) or 'nothing'}")
