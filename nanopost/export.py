"""Writes a model as a folder that Hugging Face's transformers loads without any code of ours.

    python -m nanopost.export out/ppo hf/ppo    AutoModelForCausalLM, AutoTokenizer with the chat template
    python -m nanopost.export out/rm hf/rm      AutoModelForSequenceClassification: logits[:, 0] is the reward

The token ids are those of nanopost.tokenizer for every text and, by apply_chat_template, every conversation. One thing
differs: in a plain text, "<|end|>" and the like become the special tokens there, unless the tokenizer is called with
split_special_tokens=True; here they stay text. The chat template refuses a message that contains one.

The folder also goes back in, as any model here: --init hf/ppo.
"""

import json
import os
import shutil
from dataclasses import dataclass

from nanopost.checkpoint import atomic, load_model
from nanopost.config import UserError, cli
from nanopost.huggingface import extra, to_huggingface
from nanopost.tokenizer import CHAT_TOKENS, Tokenizer

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "vocab.tiktoken"}
SPECIAL = ("<|endoftext|>", *CHAT_TOKENS)  # in the order of their ids
# The turns of Tokenizer.chat; between the generation marks is what its mask is on. No line break is part of the text.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- for token in SPECIAL if token in message['content'] %}
        {{- raise_exception('a message must not contain the special token ' + token) }}
    {%- endfor %}
    {%- if message['role'] not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('the role must be user, assistant or system, not ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
""".replace("SPECIAL", str(list(SPECIAL)))


@dataclass
class Config:
    model: str  # the folder of a policy or of a reward model
    out: str  # folder to write; an earlier export there is replaced


def byte_letters() -> list[str]:
    """The character that stands for each byte in GPT-2's files: its own if that is printable, else one from U+0100."""
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts that each longer token is merged from, in the order of the ranks.

    They are what its bytes are merged to by the tokens of lower rank. In a text too, the merges inside of a token come
    in this same order, so the pair is the only one that ever becomes the token. UserError if there are not two.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            if (lowest := min(found)) == rank:
                raise UserError(f"token {rank} of the vocabulary, {token!r}, is not two earlier ones merged: Hugging "
                                "Face's tokenizers can not express it")
            i = found.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append(tuple(parts))
    return pairs


def tokenizer_files(tokenizer: Tokenizer, block_size: int, padding_side: str) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json. ByteLevel splits text by GPT-2's pattern, as tokenizer.PATTERN does."""
    letters = byte_letters()

    def write(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    special = [{"id": len(tokenizer.ranks) + i, "content": name, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True} for i, name in enumerate(SPECIAL)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": {write(token): rank for token, rank in tokenizer.ranks.items()},
                "merges": [f"{write(first)} {write(second)}" for first, second in merges(tokenizer.ranks)],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|end|>",
            "pad_token": "<|pad|>", "model_max_length": block_size, "padding_side": padding_side,
            "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
            "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add token types to the embeddings
        },
    }


def model_files(model, tokenizer: Tokenizer) -> dict[str, dict]:
    """config.json and generation_config.json."""
    config = model.config
    special = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    label = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if config.scalar_head else {}
    return {
        "config.json": {
            "model_type": "gpt2",
            "architectures": ["GPT2ForSequenceClassification" if config.scalar_head else "GPT2LMHeadModel"],
            "vocab_size": config.vocab_size, "n_positions": config.block_size, "n_layer": config.n_layer,
            "n_head": config.n_head, "n_embd": config.n_embd, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, **dropout, **special, **label,
        },
        "generation_config.json": special,
    }


def write_folder(out: str, model, tokenizer: Tokenizer):
    """The export of a model. The folder gets its name when it is complete; UserError if it holds anything else."""
    out = os.path.normpath(out)
    if os.path.exists(out) and (not os.path.isdir(out) or set(os.listdir(out)) not in (set(), FILES)):
        raise UserError(f"{out} is there and is no earlier export; give a new folder, or empty it")
    save = extra("safetensors.torch").save
    # A policy answers prompts, which are padded on the left so that all answers start in one column; a reward model
    # reads rows that are padded on the right, up to the last token that is not <|pad|>.
    padding_side = "right" if model.config.scalar_head else "left"
    files = {**model_files(model, tokenizer), **tokenizer_files(tokenizer, model.config.block_size, padding_side)}
    tensors = to_huggingface(model)
    new, old = f"{out}.{os.getpid()}.tmp", f"{out}.{os.getpid()}.old.tmp"
    os.makedirs(new)
    try:
        with atomic(os.path.join(new, "model.safetensors"), "wb") as f:
            f.write(save(tensors, metadata={"format": "pt"}))
        with atomic(os.path.join(new, "vocab.tiktoken")) as f:
            tokenizer.write(f)
        for name, content in files.items():
            with atomic(os.path.join(new, name)) as f:
                json.dump(content, f, indent=1)
        if os.path.exists(out):
            os.rename(out, old)
        os.rename(new, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main(config: Config):
    model, tokenizer = load_model(config.model, reward=None)
    write_folder(config.out, model, tokenizer)
    kind = "SequenceClassification" if model.config.scalar_head else "CausalLM"
    print(f"wrote {config.out}: AutoModelFor{kind}.from_pretrained({config.out!r})")


if __name__ == "__main__":
    cli(main, Config)
