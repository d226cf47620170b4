"""Chat with a model: its answers are streamed token by token.

    nanopost chat out/ppo                                     a conversation; an empty line or Ctrl-D ends it
    nanopost chat out/ppo --prompt "Thank Ben for the lamp."  one answer

When the context is full, the oldest turns of the conversation are forgotten.
"""

import codecs
import sys
from contextlib import suppress
from dataclasses import dataclass

import torch

from nanopost.checkpoint import load_model
from nanopost.config import UserError, at_least, clean
from nanopost.device import find_device
from nanopost.sampling import generate
from nanopost.tools import check_temperature, in_terminal, read_line


@dataclass
class Config:
    policy: str  # folder of the model
    prompt: str = ""  # answer this one message and stop; empty: a conversation
    system: str = ""  # a system message that comes first
    max_new_tokens: int = 80  # the longest answer, in tokens
    temperature: float = 0.7  # lower is more predictable: 0 always takes the likeliest token, 1 is the model itself
    top_k: int = 0  # sample only among this many of the likeliest tokens; 0: among all
    top_p: float = 1.0  # sample only among the fewest tokens that together have this probability
    seed: int = 0  # seed for sampling
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        at_least(self, 0, "temperature", "top_k")
        check_temperature(self.temperature)
        at_least(self, 1, "max_new_tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, not {self.top_p}")


def answer(model, tokenizer, messages, config, generator, write) -> str:
    """Streams one answer to the conversation through write(text) and returns it.

    A token may hold only part of a character, so text is written as soon as its characters are complete. Raises
    UserError if the conversation leaves no room for an answer in the context.
    """
    ids = tokenizer.prompt(messages)
    context = model.config.block_size
    room = context - len(ids)
    if room < 1:
        raise UserError(f"the prompt has {len(ids)} tokens, too many to answer in a context of {context}; shorten it")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def on_token(tokens):
        [token] = tokens  # there is only one row
        if token != tokenizer.end:
            write(decoder.decode(tokenizer.encoding.decode_single_token_bytes(token)))

    options = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, generator=generator)
    batch = generate(model, [ids], min(config.max_new_tokens, room), tokenizer.end, **options, on_token=on_token)
    write(decoder.decode(b"", final=True))  # what is left of an answer that was cut off inside a character
    return tokenizer.decode(batch.responses()[0])


def main(config: Config):
    model, tokenizer = load_model(config.policy, find_device(config.device))
    generator = torch.Generator(model.device).manual_seed(config.seed)
    system = [{"role": "system", "content": config.system}] if config.system else []
    longest = model.config.block_size - config.max_new_tokens  # of a conversation, to leave room for the answer

    def write(text):
        print(clean(text), end="", flush=True)

    def reply(turns):
        text = answer(model, tokenizer, system + turns, config, generator, write)
        print()
        return [*turns, {"role": "assistant", "content": text}]

    if config.prompt:
        reply([{"role": "user", "content": config.prompt}])
        return
    turns = []
    with suppress(EOFError):
        while text := read_line("> " if in_terminal() else "").strip():
            asked = [*turns, {"role": "user", "content": text}]
            while len(asked) > 1 and len(tokenizer.prompt(system + asked)) > longest:
                asked = asked[2:]  # forget the oldest exchange
            try:
                turns = reply(asked)
            except UserError as error:  # a message that is too long does not end the conversation
                print(f"error: {error}", file=sys.stderr)
