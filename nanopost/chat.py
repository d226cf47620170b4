"""Talk to a model: its answer is streamed token by token, and the conversation goes on.

    python -m nanopost.chat out/ppo                                     a conversation; an empty line or Ctrl-D ends it
    python -m nanopost.chat out/ppo --prompt "Thank Ben for the lamp."  one answer
"""

import codecs
import sys
from dataclasses import dataclass

import torch

from nanopost.checkpoint import freeze, load_model
from nanopost.config import UserError, cli
from nanopost.run import find_device
from nanopost.sampling import generate


@dataclass
class Config:
    policy: str  # the folder of a model
    prompt: str = ""  # say this and stop; empty: a conversation
    system: str = ""  # a system message to begin with
    max_new_tokens: int = 80  # longest answer
    temperature: float = 0.7  # lower is more predictable; 0 always takes the likeliest token; 1 is the model itself
    top_k: int = 0  # sample among so many tokens only; 0: all
    top_p: float = 1.0  # sample among the fewest tokens that have this probability together
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, mps


def answer(model, tokenizer, messages, config, generator, write) -> str:
    """Streams one answer to the conversation through write(text) and returns it.

    A token may hold a part of a character: text is written as soon as it is complete. Raises UserError if the
    conversation leaves no room for an answer in the context.
    """
    ids = tokenizer.prompt(messages)
    room = model.config.block_size - len(ids)
    if room < 1:
        raise UserError(f"the prompt has {len(ids)} tokens; the context of {model.config.block_size} has no room for "
                        "it and an answer; shorten it")
    decoder, said = codecs.getincrementaldecoder("utf-8")(errors="replace"), []

    def on_token(step):
        if step[0] != tokenizer.end:
            said.append(decoder.decode(tokenizer.encoding.decode_single_token_bytes(step[0])))
            write(said[-1])

    generate(model, [ids], min(config.max_new_tokens, room), tokenizer.end, temperature=config.temperature,
             top_k=config.top_k, top_p=config.top_p, generator=generator, on_token=on_token)
    if rest := decoder.decode(b"", final=True):  # an answer that was cut off within a character
        write(rest)
    return "".join(said) + rest


def main(config: Config):
    if config.temperature < 0 or config.top_k < 0 or not 0 < config.top_p <= 1 or config.max_new_tokens < 1:
        raise UserError("--temperature and --top-k must be at least 0, --top-p in (0, 1], --max-new-tokens at least 1")
    device = find_device(config.device)
    model, tokenizer = load_model(config.policy, device)
    freeze(model)
    generator = torch.Generator(device).manual_seed(config.seed)

    def write(text):
        print(text, end="", flush=True)

    start = [{"role": "system", "content": config.system}] if config.system else []
    if config.prompt:
        answer(model, tokenizer, start + [{"role": "user", "content": config.prompt}], config, generator, write)
        print()
        return
    turns = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not text:
            break
        turns.append({"role": "user", "content": text})
        kept = turns
        while len(kept) > 1 and len(tokenizer.prompt(start + kept)) + config.max_new_tokens > model.config.block_size:
            kept = kept[2:]  # the context is full: the oldest exchange goes
        try:
            said = answer(model, tokenizer, start + kept, config, generator, write)
        except UserError as error:  # one long message does not end the conversation
            print(f"error: {error}", file=sys.stderr)
            turns.pop()
            continue
        print()
        turns = [*kept, {"role": "assistant", "content": said}]


if __name__ == "__main__":
    cli(main, Config)
