"""Write a model as a folder that Hugging Face's transformers can load.

    nanopost export out/ppo hf/ppo    AutoModelForCausalLM, AutoTokenizer with the chat template
    nanopost export out/rm hf/rm      AutoModelForSequenceClassification: logits[:, 0] is the reward

The token ids are the same as here for every text and, through apply_chat_template, for every conversation. One thing
differs: there, "<|end|>" and the like in plain text become special tokens, unless the tokenizer is called with
split_special_tokens=True; here they stay text. The chat template refuses a message that contains one.

The exported folder can also be read back, like any model here: --init hf/ppo.
"""

import os
import shutil
from dataclasses import dataclass

from nanopost.checkpoint import load_model
from nanopost.config import UserError
from nanopost.huggingface import import_transformers, to_huggingface
from nanopost.tokenizer import CHAT_TOKENS, Tokenizer

SPECIAL = ("<|endoftext|>", *CHAT_TOKENS)  # in the order of their ids
ALWAYS = {"config.json", "model.safetensors", "vocab.tiktoken", "tokenizer.json", "tokenizer_config.json"}
SOMETIMES = {"generation_config.json", "chat_template.jinja", "special_tokens_map.json"}  # depending on the version
# The turns of Tokenizer.chat; its mask is on what stands between the generation marks. No line break is in the text.
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
    model: str  # folder of a policy or of a reward model
    out: str  # folder to write; an earlier export there is replaced


def convert_model(model, tokenizer: Tokenizer):
    """transformers' GPT2LMHeadModel or, with a scalar head, GPT2ForSequenceClassification."""
    transformers = import_transformers()
    c = model.config
    sizes = dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    special = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), c.dropout)
    config = transformers.GPT2Config(**sizes, **special, **dropout)
    tensors = to_huggingface(model)
    if c.scalar_head:
        config.id2label = {0: "reward"}
        config.label2id = {"reward": 0}
        theirs = transformers.GPT2ForSequenceClassification(config)
    else:
        theirs = transformers.GPT2LMHeadModel(config)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # tied
    theirs.load_state_dict(tensors)
    return theirs


def convert_tokenizer(tokenizer: Tokenizer, block_size: int, padding_side: str):
    """transformers' PreTrainedTokenizerFast.

    Like tiktoken, it merges any two neighbours that make a token, the token of the lowest rank first, and takes a word
    that is a token as it is (ignore_merges). So every way to cut a token into two tokens is one of its merges.
    """
    transformers = import_transformers()
    import tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()  # in their files, every byte is a printable character
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in tokenizer.ranks.items()}
    cuts = [(token[:i], token[i:]) for token in sorted(vocab, key=vocab.get) for i in range(1, len(token))]
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # with tokenizer.PATTERN
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    # transformers 5 would write another name of the class, which transformers 4 does not know.
    kind = type("PreTrainedTokenizerFast", (transformers.PreTrainedTokenizerFast,), {})
    names = ["input_ids", "attention_mask"]  # token types would be added to the embeddings
    options = dict(padding_side=padding_side, model_max_length=block_size, model_input_names=names)
    special = dict(bos_token="<|endoftext|>", eos_token="<|end|>", pad_token="<|pad|>")
    return kind(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **special, **options)


def main(config: Config):
    model, tokenizer = load_model(config.model, reward=None)
    out = os.path.realpath(config.out)  # of a link, what it points to
    if os.path.exists(out):
        files = set(os.listdir(out)) if os.path.isdir(out) else {out}
        if files and not ALWAYS <= files <= ALWAYS | SOMETIMES:
            raise UserError(f"{config.out} exists and is not an earlier export; give a new folder, or empty it")
    # A policy reads prompts padded on the left, so that all answers start in one column; a reward model reads rows
    # padded on the right, up to the last token that is not <|pad|>.
    padding_side = "right" if model.config.scalar_head else "left"
    parts = convert_model(model, tokenizer), convert_tokenizer(tokenizer, model.config.block_size, padding_side)
    new = f"{out}.{os.getpid()}.tmp"
    old = f"{out}.{os.getpid()}.old.tmp"
    try:
        for part in parts:
            part.save_pretrained(new, max_shard_size="100GB")  # one file of weights
        with open(os.path.join(new, "vocab.tiktoken"), "w") as f:
            tokenizer.write(f)
        if os.path.exists(out):
            os.rename(out, old)
        os.rename(new, out)  # complete
        shutil.rmtree(old, ignore_errors=True)
    except OSError:
        raise
    except Exception as error:  # how the libraries say that the disk is full
        raise UserError(f"{config.out} cannot be written: {error}") from None
    finally:
        if os.path.exists(old) and not os.path.exists(out):
            os.rename(old, out)  # the last step failed
        shutil.rmtree(new, ignore_errors=True)
    kind = "SequenceClassification" if model.config.scalar_head else "CausalLM"
    print(f"wrote {config.out}: AutoModelFor{kind}.from_pretrained({config.out!r})")
