"""Text <-> token ids, and the chat format: text -> (ids, mask), built together.

    <|user|>Thank Ben for the lamp.<|assistant|>Dear Ben, thank you ...<|end|>
                                                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ the targets: the answer and its <|end|>

The encoding is a tiktoken `Encoding`: byte-level BPE ranks from a file in tiktoken's format, or `gpt2`. The five chat
tokens take the ids after the vocabulary's own. Text goes through `encode_ordinary`, so a text that contains "<|end|>"
stays text: no input can inject a special token.

    nanopost show data/notes/sft_train.jsonl      shows in colour what the loss is on
"""

import base64
import binascii
import os
import re

import tiktoken

from nanopost.config import UserError

# GPT-2's split pattern: contractions, words, numbers, punctuation (each with its leading space), other white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # the pattern's \s+
LONG = 100_000  # characters; the pattern's look ahead fails after some more white space
CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>")
DEFAULT_VOCAB = "data/notes/vocab.tiktoken"


def cut(text: str) -> list[str]:
    """The text, cut before the last character of very long white space, where PATTERN cuts it too."""
    spaces = SPACE.finditer(text) if len(text) > LONG else ()
    ends = [space.end() - 1 for space in spaces if len(space[0]) > LONG and space.end() < len(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


class Tokenizer:
    """A tiktoken Encoding plus the chat tokens `user`, `assistant`, `system`, `end`, `pad`; `eot` ends a document."""

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks = ranks
        names = ("<|endoftext|>",) + CHAT_TOKENS
        special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.encoding = tiktoken.Encoding("nanopost", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.eot, self.user, self.assistant, self.system, self.end, self.pad = special.values()
        self.vocab_size = len(ranks) + len(special)

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.ranks == other.ranks

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in cut(text):
            ids += self.encoding.encode_ordinary(part)
        return ids

    def decode(self, ids) -> str:
        """Text of the ids. Invalid UTF-8 becomes U+FFFD; special tokens are written out."""
        return self.encoding.decode([int(i) for i in ids])

    def document(self, text: str) -> tuple[list[int], list[bool]]:
        """(ids, mask) for language modelling: every token and the end of the document are targets. It starts with
        <|endoftext|> too, so that the first word has something to be predicted from."""
        ids = self.encode(text)
        return [self.eot, *ids, self.eot], [False] + [True] * (len(ids) + 1)

    def chat(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """(ids, mask) of a conversation [{"role", "content"}, ...]: assistant turns with their <|end|> are targets."""
        ids, mask = [], []
        for message in messages:
            content = self.encode(message["content"])
            if message["role"] == "assistant":
                ids += [self.assistant, *content, self.end]
                mask += [False] + [True] * (len(content) + 1)
            else:
                ids += [self.user if message["role"] == "user" else self.system, *content]
                mask += [False] * (len(content) + 1)
        return ids, mask

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation up to the assistant's answer: it ends with <|assistant|>."""
        return self.chat(messages)[0] + [self.assistant]

    def write(self, f):
        """Writes the ranks to an open file in tiktoken's format: base64 of the token's bytes, a space, its rank."""
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            f.write(f"{base64.b64encode(token).decode()} {rank}\n")


def load_tokenizer(name: str) -> Tokenizer:
    """From a file of ranks in tiktoken's format, or "gpt2" (tiktoken downloads it once, or finds it in its cache)."""
    if name == "gpt2":
        try:
            return Tokenizer(tiktoken.get_encoding("gpt2")._mergeable_ranks)
        except Exception as error:  # whatever the network layer raises
            where = f"in tiktoken's cache (TIKTOKEN_CACHE_DIR) nor online ({type(error).__name__})"
            raise UserError(f"no gpt2 vocabulary {where}; go online once, or give a vocabulary file") from None
    if not os.path.isfile(name):
        hint = "; python data/notes/prepare.py writes it" if name == DEFAULT_VOCAB else ""
        raise UserError(f"no vocabulary at {name}{hint}")
    ranks = {}
    with open(name, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise UserError(f"{name}:{n}: not a line of a tiktoken vocabulary (base64, space, rank)") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([i]) in ranks for i in range(256)):
        raise UserError(f"{name}: the ranks must be 0, 1, 2, ... with the 256 single bytes among them")
    return Tokenizer(ranks)
