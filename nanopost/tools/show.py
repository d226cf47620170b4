"""Show records as the model reads them, with the targets of the loss in colour.

    nanopost show data/notes/sft_train.jsonl

The targets are the tokens that train_sft.py computes its cross-entropy on. Special tokens are written out.
"""

import sys
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from nanopost.config import at_least, clean
from nanopost.data import load_examples
from nanopost.tokenizer import DEFAULT_VOCAB, Tokenizer, load_tokenizer


@dataclass
class Config:
    file: str  # a file of records that train_sft.py reads
    vocab: str = DEFAULT_VOCAB  # a vocabulary in tiktoken's format, or gpt2
    count: int = 5  # show at most this many records; 0: all

    def __post_init__(self):
        at_least(self, 0, "count")


def show_targets(tokenizer: Tokenizer, ids: list[int], mask: list[bool], colour: bool = True) -> str:
    """The text of the ids, harmless to a terminal; the targets are green or, without colour, in [brackets]."""
    on, off = ("\033[32m", "\033[0m") if colour else ("[", "]")
    runs = groupby(zip(mask, ids, strict=True), key=itemgetter(0))
    pieces = [(target, clean(tokenizer.decode([token for _, token in run]))) for target, run in runs]
    return "".join(on + piece + off if target else piece for target, piece in pieces)


def main(config: Config):
    tokenizer = load_tokenizer(config.vocab)
    colour = sys.stdout.isatty()
    print(f"targets of the loss are {'green' if colour else 'in [brackets]'}\n")
    for example in load_examples(config.file, tokenizer, limit=config.count or None):
        print(show_targets(tokenizer, example.ids, example.mask, colour) + "\n")
