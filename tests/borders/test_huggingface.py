"""GPT-2 in and Hugging Face out: model, gradients, ids and masks are those of the transformers library, to rounding."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

import nanopost.checkpoint
import train_sft
from conftest import assistant, contents, one_line, system, user
from measured import at_most, distance
from nanopost.checkpoint import load_model, save_model
from nanopost.config import UserError
from nanopost.data import Example, collate
from nanopost.huggingface import add_rows, to_huggingface
from nanopost.model import GPT
from nanopost.sampling import generate
from nanopost.tokenizer import CHAT_TOKENS, Tokenizer
from nanopost.tools import export

SPECIALS = ("<|endoftext|>", *CHAT_TOKENS)
SIZES = {  # vocab_size, n_positions, n_layer, n_head, n_embd
    "two layers": (97, 24, 2, 2, 16),
    "one wide layer, no spare row": (64, 16, 1, 4, 32),
    "three layers, positions that are cropped": (70, 29, 3, 1, 12),
}


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')


# ------------------------------------------------------------------------------------- the model is GPT-2, in float64


@pytest.fixture(params=[(name, seed) for name in SIZES for seed in (0, 1)], ids=lambda p: f"{p[0]}, seed {p[1]}")
def both(request, transformers, in_float64, tmp_path):
    """(transformers' GPT2LMHeadModel, our GPT that was read from the folder it was saved to, five examples)."""
    name, seed = request.param
    vocab_size, n_positions, n_layer, n_head, n_embd = SIZES[name]
    sizes = dict(vocab_size=vocab_size, n_positions=n_positions, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    others = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(**sizes, **others, attn_implementation="eager")
    theirs = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # far from its initialisation: no bias is 0, no gain 1
        for p in theirs.parameters():
            p.copy_((p.dim() == 1) * p + 0.3 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    rng, examples = random.Random(seed), []
    for length in (n_positions // 8 * 8, 9, 3, 12, 2):
        prompt = rng.randrange(1, length)
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        examples.append(Example(ids, [t >= prompt and rng.random() < 0.8 for t in range(length)]))
    examples[0].mask[-1] = True  # the last position is used
    return theirs, GPT.from_pretrained(str(tmp_path)), examples


def run_both(theirs, ours, batch):
    """Theirs and ours on the real tokens, as lists of tensors: every block's output, the final hidden, the logits."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for model in (theirs.transformer, ours)
        for block in model.h
    ]
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]  # (B, T)
    with torch.no_grad():
        out = theirs(batch.ids, attention_mask=real.long(), output_hidden_states=True)
        hidden = ours(batch.ids)
        logits = ours.logits(hidden)
    for hook in hooks:
        hook.remove()
    layers = len(ours.h)
    return (
        [x[real] for x in (*seen[:layers], out.hidden_states[-1], out.logits)],
        [x[real] for x in (*seen[layers:], hidden, logits)],
    )


def test_every_hidden_state_and_all_logits_are_those_of_transformers(both):
    theirs, ours, examples = both
    expected, got = run_both(theirs, ours, collate(examples))
    assert len(got) == len(ours.h) + 2 and got[-1].dtype == torch.float64
    assert min(x.std() for x in expected) > 0.1
    at_most(distance(expected, got), 1e-10)


def test_token_logprobs_are_those_of_transformers(both):
    theirs, ours, examples = both
    batch = collate(examples)
    with torch.no_grad():
        logp = theirs(batch.ids).logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
        got = ours.logprobs(ours(batch.ids), batch.ids, batch.index)
    at_most(distance(logp * batch.mask, got), 1e-10)


def test_the_sft_loss_and_all_its_gradients_are_those_of_transformers(both, monkeypatch):
    theirs, ours, examples = both
    batch = collate(examples)
    labels = torch.full_like(batch.ids, -100)
    labels[:, 1:][batch.mask] = batch.ids[:, 1:][batch.mask]
    with monkeypatch.context() as patch:  # their loss goes down to single precision; here it may not
        patch.setattr(torch.Tensor, "float", lambda self: self)
        expected = theirs(batch.ids, labels=labels).loss
    got = train_sft.batch_loss(ours, batch)
    assert got.dtype == expected.dtype == torch.float64
    at_most(abs(expected - got), 1e-10)
    expected.backward()
    got.backward()
    gradients, rows = {name: p.grad for name, p in ours.named_parameters()}, theirs.config.vocab_size
    for name, p in theirs.transformer.named_parameters():
        gradient, mine = p.grad, gradients.pop(name)
        if name == "wte.weight":
            assert not mine[rows:].any()
            mine = mine[:rows]
        elif name == "wpe.weight":
            assert not gradient[len(mine) :].any()
            gradient = gradient[: len(mine)]
        elif len(p.shape) == 2:  # Conv1D
            mine = mine.t()
        assert gradient.abs().max() > 1e-6, name
        at_most(distance(gradient, mine), 1e-10)
    assert not gradients


# ----------------------------------------------------------------------------------------------- reading GPT-2 folders


def write_gpt2(folder, model, prefix=""):
    """A folder as the hub's gpt2 is: no prefix, causal masks among the tensors, no vocabulary of ours."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    c = model.config
    tensors = {name.replace("transformer.", prefix): t for name, t in to_huggingface(model).items()}
    for i in range(c.n_layer):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, c.block_size, c.block_size)
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_ctx=c.block_size)
    sizes |= dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes, "resid_pdrop": 0.1}))
    return folder


@pytest.fixture
def gpt2_is_tiny(monkeypatch, tokenizer):
    """The vocabulary called gpt2 is the tests' own one, of 263 tokens and 5 chat tokens."""
    real = nanopost.checkpoint.load_tokenizer
    monkeypatch.setattr(nanopost.checkpoint, "load_tokenizer", lambda n: tokenizer if n == "gpt2" else real(n))


@pytest.fixture
def plain(transformers, gpt2_is_tiny, tiny, tokenizer, tmp_path):
    """(model, a folder of it as the hub's are): it knows <|endoftext|>, but no chat token."""
    model = tiny(tokenizer.vocab_size - len(CHAT_TOKENS))
    return model, write_gpt2(tmp_path / "plain", model)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_may_have_a_prefix_and_causal_masks_are_left_out(plain, tmp_path, prefix):
    model, _ = plain
    again = GPT.from_pretrained(str(write_gpt2(tmp_path / "again", model, prefix=prefix)))
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        rows = model.config.vocab_size if name == "wte.weight" else None
        assert torch.equal(again.state_dict()[name][:rows], tensor[:rows]), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_any_precision_and_number_of_files_is_read_into_single(dtype, plain, transformers, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(plain[1]).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    again = GPT.from_pretrained(str(tmp_path / "parts"))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, tensor in GPT.from_pretrained(str(plain[1])).named_parameters():
        rows = plain[0].config.vocab_size if name == "wte.weight" else None
        assert torch.equal(again.get_parameter(name)[:rows], tensor[:rows].to(getattr(torch, dtype)).float()), name


def test_a_plain_gpt2_gets_the_chat_tokens_and_keeps_its_logits(plain, tokenizer):
    model, folder = plain
    again, vocabulary = load_model(str(folder))
    assert vocabulary == tokenizer and again.config.vocab_size == tokenizer.vocab_size and not again.training
    assert again.config.dropout == 0.0
    ids = torch.randint(model.config.vocab_size, (3, 8))
    with torch.no_grad():
        before, after = model.logits(model.eval()(ids)), again.logits(again(ids))
    assert torch.equal(before, after[..., : model.config.vocab_size])
    assert after.shape[-1] == model.config.vocab_size + 5


def test_a_new_token_starts_with_less_than_the_average_probability_and_unlike_the_others(plain):
    model, folder = plain
    V = model.config.vocab_size
    rows = model.wte.weight[:V].detach()
    new = GPT.from_pretrained(str(folder), new_tokens=5).wte.weight[V:].detach()
    assert len(new) == 320 - V  # the rows that stay unused too
    assert torch.equal(new, GPT.from_pretrained(str(folder), new_tokens=5).wte.weight[V:])  # always the same
    spread = (new - rows.mean(0)).std(0) / rows.std(0)
    assert 0.05 < spread.min() and spread.max() < 0.2  # a tenth, as measured on 57 rows
    assert len({tuple(row.tolist()) for row in new}) == len(new)
    again = GPT.from_pretrained(str(folder), new_tokens=5)
    with torch.no_grad():
        p = again.logits(again(torch.randint(V, (20, 8)))).softmax(-1)[..., V:]
    assert p.mean() < 1 / V and p.max() < 2 / V and p.min() > 0.01 / V


def test_new_rows_do_not_depend_on_the_random_state_nor_change_it():
    rows = torch.randn(6, 4)
    torch.manual_seed(1)
    first = add_rows(rows, 3)
    state = torch.get_rng_state()
    assert torch.equal(first, add_rows(rows, 3)) and torch.equal(first[:6], rows)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("script", ["sft", "rm", "dpo", "ppo"])
def test_every_script_starts_from_a_plain_gpt2(script, plain, workshop, tmp_path, tokenizer):
    extra = {"reward": workshop.path("reward.py") + ":vowels"} if script == "ppo" else {}
    out = workshop.run(script, tmp_path / "out", init=str(plain[1]), steps=1, **extra)
    model, vocabulary = load_model(str(out), reward=script == "rm")
    assert vocabulary == tokenizer and model.config.block_size == 48


def test_options_from_scratch_are_refused_with_a_pretrained_model(plain, workshop, tmp_path):
    with pytest.raises(UserError, match="--block-size is for --init scratch"):
        workshop.run("sft", tmp_path / "out", init=str(plain[1]), block_size=64)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(**changes):
    """A function that changes tensors of a folder (dots in their names are written __; None: takes it away)."""

    def damage(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        new = {name.replace("__", "."): shape for name, shape in changes.items()}
        tensors |= {name: torch.zeros(shape) for name, shape in new.items() if shape is not None}
        kept = {name: tensor for name, tensor in tensors.items() if new.get(name, ()) is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def only_pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


SCORE = {"architectures": ["GPT2ForSequenceClassification"]}
REFUSALS = {
    "another family": (lambda d: edit(d, model_type="llama"), "config.json: model_type is 'llama'; .* only 'gpt2'"),
    "an unknown family": (lambda d: edit(d, model_type="mine"), "cannot be read: .* model type `mine`"),
    "another activation": (
        lambda d: edit(d, activation_function="relu"),
        "activation_function is 'relu'; nanopost's model supports only 'gelu_new' or 'gelu_pytorch_tanh'",
    ),
    "another epsilon": (lambda d: edit(d, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06; .* only 1e-05"),
    "unscaled attention": (lambda d: edit(d, scale_attn_weights=False), "scale_attn_weights is False"),
    "attention by layer": (lambda d: edit(d, scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx is True"),
    "reordered attention": (lambda d: edit(d, reorder_and_upcast_attn=True), "reorder_and_upcast_attn is True"),
    "cross-attention": (lambda d: edit(d, add_cross_attention=True), "add_cross_attention is True"),
    "untied": (lambda d: edit(d, tie_word_embeddings=False), "tie_word_embeddings is False"),
    "a narrow MLP": (lambda d: edit(d, n_inner=32), "n_inner is 32; .* only None or 64"),
    "a size that is text": (lambda d: edit(d, n_embd="16"), "cannot be read: "),
    "a size that is missing": (lambda d: edit(d, n_layer=None), "cannot be read: "),
    "impossible heads": (lambda d: edit(d, n_head=3), "cannot be read: .* must be divisible"),
    "another vocabulary": (lambda d: edit(d, vocab_size=300), "has 300 tokens; its vocabulary needs 263, or 268"),
    "too small a vocabulary": (lambda d: edit(d, vocab_size=262), "has 262 tokens; its vocabulary needs 263, or 268"),
    "config is half": (lambda d: (d / "config.json").write_text('{"model_type": "gpt2",'), "config.json"),
    "config is a list": (lambda d: (d / "config.json").write_text('["model_type"]'), "cannot be read"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
    "only pickled weights": (only_pickled, "no file named model.safetensors"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "cannot be read"),
    "half the weights": (lambda d: os.truncate(d / "model.safetensors", 9000), "cannot be read"),
    "text as weights": (lambda d: (d / "model.safetensors").write_text("hello\nworld" * 9), "cannot be read"),
    "a tensor is missing": (edit_tensors(h__1__ln_2__bias=None), r"missing h\.1\.ln_2\.bias"),
    "a tensor too many": (edit_tensors(v_head__weight=(1, 16)), r"unexpected v_head\.weight"),
    "a head in a language model": (edit_tensors(score__weight=(1, 16)), r"unexpected score\.weight"),
    "a reward model without head": (lambda d: edit(d, **SCORE), r"missing score\.weight"),
    "two labels": (
        lambda d: (edit(d, **SCORE), edit_tensors(score__weight=(2, 16))(d)),
        r"mismatched .*score\.weight|is corrupted",  # transformers 4 misses the prefix first
    ),
    "fewer layers than tensors": (lambda d: edit(d, n_layer=1), r"unexpected .*h\.1\."),
    "more layers than tensors": (lambda d: edit(d, n_layer=3), r"missing h\.2\."),
    "a layer for every person": (lambda d: edit(d, n_layer=10**10), r"n_layer is 10000000000, but there are \d+"),
    "a context of exabytes": (lambda d: edit(d, n_positions=2**50), r"mismatched wpe\.weight"),
    "a matrix the other way round": (
        edit_tensors(h__0__attn__c_attn__weight=(48, 16)),
        r"mismatched .*h\.0\.attn\.c_attn\.weight",
    ),
    "a matrix that is a vector": (edit_tensors(h__0__mlp__c_fc__weight=(16,)), r"mismatched .*mlp\.c_fc\.weight"),
    "too few rows": (edit_tensors(wte__weight=(262, 16)), r"mismatched .*wte\.weight"),
    "too few positions": (edit_tensors(wpe__weight=(32, 16)), r"mismatched .*wpe\.weight"),
    "too many positions": (edit_tensors(wpe__weight=(56, 16)), r"mismatched .*wpe\.weight"),
    "a broken vocabulary": (lambda d: (d / "vocab.tiktoken").write_text("x"), "vocab.tiktoken:1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_this_gpt2_is_refused_in_one_line_that_names_the_folder(case, plain):
    folder = plain[1]
    load_model(str(folder))
    damage, message = REFUSALS[case]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(folder))
    assert str(folder) in one_line(error)


@pytest.mark.parametrize("content", [b"[", b"[]", b"3", b"{}", b"\xff\xfe"])
def test_a_malformed_config_is_refused_by_from_pretrained_itself(plain, content):
    folder = plain[1]
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read: ") as error:
        GPT.from_pretrained(str(folder))
    assert str(folder) in one_line(error)
    with pytest.raises(UserError, match="does not describe a model") as error:  # could be a run's folder as well
        load_model(str(folder))
    assert str(folder) in one_line(error)


def test_no_code_of_a_folder_is_run(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks a question"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (plain[1] / "mine.py").write_text(code)
    (plain[1] / "custom_generate").mkdir()
    (plain[1] / "custom_generate" / "generate.py").write_text(code + "def generate(*_, **__): pass\n")
    edit(plain[1], auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model", "AutoModelForCausalLM": "mine.LM"})
    GPT.from_pretrained(str(plain[1]))
    edit(plain[1], model_type="mine")
    with pytest.raises(UserError, match="custom code"):
        GPT.from_pretrained(str(plain[1]))
    assert not (tmp_path / "ran").exists()


def test_a_name_that_is_neither_a_folder_nor_gpt2s_is_refused(transformers):
    with pytest.raises(UserError, match="no folder gpt3, and it is none of gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(UserError, match="no folder out/nothing"):
        load_model("out/nothing")


def test_the_command_line_tells_a_refusal_in_one_line_and_exits_with_2(plain, command, tool, tmp_path):
    edit(plain[1], activation_function="relu")
    for start, *arguments in (
        (command, "train_sft.py", "--init", plain[1], "--out", tmp_path / "o"),
        (tool, "export", plain[1], tmp_path / "o"),
        (tool, "chat", plain[1], "--prompt", "Hi!"),
    ):
        code, _, err = start(*arguments)
        assert code == 2 and len(err.splitlines()) == 1 and "activation_function is 'relu'" in err
        assert not (tmp_path / "o").exists()


# --------------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def hub(transformers, monkeypatch, tmp_path):
    """Hugging Face's cache: a folder where a test puts repositories. The library is told that it is offline."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.chdir(tmp_path)  # where no folder is called gpt2
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "openai-community/gpt2-xl"])
def test_a_name_of_gpt2_is_read_from_openais_repository(plain, hub, name):
    commit, repository = "a" * 40, hub / f"models--openai-community--{name.removeprefix('openai-community/')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(plain[1], repository / "snapshots" / commit)
    model, _ = load_model(name)
    assert torch.equal(model.wpe.weight, plain[0].wpe.weight)


def test_a_local_folder_goes_before_a_name(plain, hub):
    plain[1].rename("gpt2")
    assert torch.equal(load_model("gpt2")[0].wpe.weight, plain[0].wpe.weight)


def test_a_failing_download_is_one_line_that_says_what_to_do(hub, command, tmp_path):
    code, _, err = command("train_sft.py", "--init", "gpt2-medium", "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: gpt2-medium cannot be read: ")
    assert err.endswith("; go online once, to get it into Hugging Face's cache, or give a local folder\n")


def test_without_transformers_one_line_says_what_to_install(command, tool, workshop, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    load_model(workshop.path("sft"))  # ours
    for code, _, err in (
        command("train_sft.py", "--init", "gpt2", "--out", tmp_path / "out"),
        tool("export", workshop.path("sft"), tmp_path / "out"),
    ):
        message = 'transformers is not installed; pip install "nanopost[hf]" (in a checkout: pip install -e ".[hf]")'
        assert (code, err) == (2, f"error: {message}\n")
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------- the export: the models


@pytest.fixture(scope="session")
def exported(transformers, workshop, tmp_path_factory):
    """exported("sft") exports that model of the workshop and returns the folder; only read by the tests."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def path(name) -> str:
        if name not in done:
            export.main(export.Config(workshop.path(name), str(folder / name)))
        done[name] = str(folder / name)
        return done[name]

    return path


def save_and_export(tmp_path, model, tokenizer) -> str:
    save_model(str(tmp_path / "run"), model, tokenizer, {})
    export.main(export.Config(str(tmp_path / "run"), str(tmp_path / "hf")))
    return str(tmp_path / "hf")


PROMPTS = [[user("Say cat!")], [user("Say the moon and the lamp!")], [system("Be kind."), user("x")], [user("")]]


def test_an_exported_policy_has_the_same_logits(transformers, in_float64, tiny, tokenizer, tmp_path):
    model = tiny(tokenizer.vocab_size, seed=3).eval()
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        save_and_export(tmp_path, model, tokenizer), output_loading_info=True
    )
    assert type(theirs).__name__ == "GPT2LMHeadModel" and not any(report.values())
    ids = torch.randint(tokenizer.vocab_size, (4, 48))
    with torch.no_grad():
        logits = theirs(ids).logits
        assert logits.shape[-1] == tokenizer.vocab_size
        at_most(distance(logits, model.logits(model(ids))), 1e-10)


def test_an_exported_reward_model_has_the_same_scores(transformers, in_float64, tiny, tokenizer, tmp_path):
    model = tiny(tokenizer.vocab_size, seed=4, scalar_head=True).eval()
    with torch.no_grad():
        model.head.bias += 3.0  # a bias that counts: there is none in their head
    folder = save_and_export(tmp_path, model, tokenizer)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "GPT2ForSequenceClassification" and not any(report.values())
    assert theirs.config.num_labels == 1
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    answers = "yes", "the cat and the map"
    conversations = [messages + [assistant(answer)] for messages in PROMPTS for answer in answers]
    rows = tok.apply_chat_template(conversations, tokenize=True, return_dict=True, padding=True, return_tensors="pt")
    batch = collate([Example(*tokenizer.chat(messages)) for messages in conversations])
    with torch.no_grad():
        scores = theirs(**rows).logits
        assert scores.shape == (8, 1) and scores.std() > 0.1
        at_most(distance(scores[:, 0], model.score(batch.ids, batch.lengths)), 1e-10)
        again, _ = load_model(folder, reward=True)
        assert not again.head.bias.any()
        at_most(distance(again.score(batch.ids, batch.lengths), model.score(batch.ids, batch.lengths)), 1e-10)


def test_greedy_answers_of_transformers_are_ours(transformers, tiny, tokenizer, tmp_path):
    lengths = set()
    for seed in range(6):
        model = tiny(tokenizer.vocab_size, seed=seed)
        with torch.no_grad():  # so that some answers end
            model.wte.weight[tokenizer.end] *= 3
        folder = save_and_export(tmp_path, model, tokenizer)
        ours = generate(model, [tokenizer.prompt(p) for p in PROMPTS], 16, tokenizer.end, temperature=0)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tok = transformers.AutoTokenizer.from_pretrained(folder)
        rows = tok.apply_chat_template(
            PROMPTS, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
        )
        answers = theirs.generate(**rows, max_new_tokens=16, do_sample=False)[:, rows["input_ids"].shape[1] :]
        expected = [ids + [tokenizer.end] * ended for ids, ended in zip(ours.responses(), ours.ended.tolist())]
        assert [[i for i in row.tolist() if i != tokenizer.pad] for row in answers] == expected
        lengths |= {len(ids) for ids in expected}
    assert len(lengths) > 3 and 16 in lengths


def test_context_and_dropout_are_told(transformers, tiny, tokenizer, tmp_path):
    folder = save_and_export(tmp_path, tiny(tokenizer.vocab_size, dropout=0.25), tokenizer)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop, config.n_positions) == (0.25, 0.25, 0.25, 48)
    assert transformers.AutoTokenizer.from_pretrained(folder).model_max_length == 48


def test_a_policy_goes_out_and_in_with_the_same_bits(exported, workshop):
    before, vocabulary = load_model(workshop.path("sft"))
    after, again = load_model(exported("sft"))
    assert after.config == before.config and again == vocabulary
    for name, tensor in before.state_dict().items():
        rows = before.config.vocab_size if name == "wte.weight" else None
        assert torch.equal(after.state_dict()[name][:rows], tensor[:rows]), name


def test_a_second_export_is_the_first_byte_for_byte(exported, tmp_path):
    for name in ("sft", "rm"):
        export.main(export.Config(exported(name), str(tmp_path / name)))
        assert contents(tmp_path / name) == contents(exported(name))


@pytest.mark.parametrize("script", ["sft", "rm", "dpo", "ppo"])
def test_every_script_starts_from_an_export(script, exported, workshop, tmp_path, tokenizer):
    extra = {"reward": exported("rm")} if script == "ppo" else {}
    out = workshop.run(script, tmp_path / "out", init=exported("sft"), steps=1, **extra)
    assert load_model(str(out), reward=script == "rm")[1] == tokenizer


def test_an_exported_reward_model_is_no_language_model_nor_the_other_way_round(exported):
    with pytest.raises(UserError, match="holds a reward model; here a language model is needed"):
        load_model(exported("rm"))
    with pytest.raises(UserError, match="holds a language model; here a reward model is needed"):
        load_model(exported("sft"), reward=True)


def test_a_reward_model_that_always_says_the_same_is_refused(transformers, tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match="head is all zeros"):
        save_and_export(tmp_path, tiny(tokenizer.vocab_size).add_head(0.0), tokenizer)
    assert not (tmp_path / "hf").exists()


# -------------------------------------------------------------------------------- the export: tokenizer and template


def pairs_tokenizer() -> Tokenizer:
    """Every pair of bytes is a token: wherever the text is split, the ids show it."""
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    return Tokenizer({token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + pairs)})


def words_tokenizer() -> Tokenizer:
    """Tokens that are not made of two earlier ones: only a whole word is found, or parts that come later."""
    words = [b"the", b" and", b"don", b"nd", b" a", "é".encode(), b"xx", b"xxx", b"thethe"]
    return Tokenizer({token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + words)})


def write_tokenizer(folder, tokenizer) -> str:
    export.convert_tokenizer(tokenizer, 64, "left").save_pretrained(folder)
    return str(folder)


PIECES = ["the ", " and", "don't", "I'll've", "'S", "x", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000"]
PIECES += [
    "12",
    " 3½",
    "٣",
    "!?",
    "--",
    "naïve",
    "e\u0301",
    "日本語",
    "🙂",
    "👩\u200d👩",
    "\u200b",
    "\x00",
    "\x1c",
    "\x85",
]
PIECES += ["<|", "|>", "_", "ǅ", "thethe", "xxxxx"]


def texts(count, pieces=PIECES, seed=0):
    rng = random.Random(seed)
    points = [p for p in range(0x20000) if not 0xD800 <= p < 0xE000]
    for _ in range(count):
        yield "".join(rng.choices(pieces, k=rng.randrange(12)))
        yield "".join(map(chr, rng.choices(points, k=rng.randrange(1, 12)))) + rng.choice(pieces)


@pytest.mark.parametrize("which", ["few merges", "all pairs of bytes", "words without merges", "gpt2"])
def test_ids_of_any_text_are_ours(which, transformers, request, tokenizer, tmp_path):
    ours = {
        "few merges": lambda: tokenizer,
        "all pairs of bytes": pairs_tokenizer,
        "words without merges": words_tokenizer,
        "gpt2": lambda: request.getfixturevalue("gpt2"),
    }[which]()
    theirs = transformers.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, ours))
    assert len(theirs) == ours.vocab_size
    for text in texts(400):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text


def test_special_tokens_have_our_ids_and_stay_text_when_asked(transformers, exported, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(exported("sft"))
    assert theirs.convert_tokens_to_ids(list(SPECIALS)) == list(range(tokenizer.eot, tokenizer.pad + 1))
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|end|>", "<|pad|>")
    for text in ("a<|end|>b", *SPECIALS, " <|user|> ", "<|END|>", "<|end |>"):
        assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
    assert theirs("a <|end|> b")["input_ids"] == [*tokenizer.encode("a "), tokenizer.end, *tokenizer.encode(" b")]
    ids = tokenizer.chat([user("Hi"), assistant("Ho")])[0]
    assert theirs.decode(ids) == tokenizer.decode(ids) and theirs.decode(ids, skip_special_tokens=True) == "HiHo"


def conversations(count, seed=0):
    rng, content = random.Random(seed), texts(10**9, seed=seed + 1)
    for _ in range(count):
        yield [
            {"role": rng.choice(["user", "assistant", "system"]), "content": next(content)}
            for _ in range(rng.randrange(1, 6))
        ]


@pytest.mark.parametrize("which", ["few merges", "gpt2"])
def test_the_chat_template_gives_our_ids_and_our_mask(which, transformers, request, tokenizer, tmp_path):
    ours = tokenizer if which == "few merges" else request.getfixturevalue("gpt2")
    theirs = transformers.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, ours))
    targets = 0
    for messages in conversations(200):
        ids, mask = ours.chat(messages)
        rows = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert rows["input_ids"] == ids and rows["assistant_masks"] == [int(target) for target in mask], messages
        rows = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        assert rows.keys() == {"input_ids", "attention_mask"}
        assert rows["input_ids"] == ours.prompt(messages)
        targets += sum(mask)
    assert targets > 1000


@pytest.mark.parametrize(
    "message, complaint",
    [
        (user("a<|end|>b"), r"must not contain the special token <\|end\|>"),
        (assistant("<|user|>"), r"must not contain the special token <\|user\|>"),
        ({"role": "tool", "content": "4"}, "the role must be user, assistant or system, not tool"),
    ],
)
def test_the_chat_template_refuses_what_would_inject_a_special_token(transformers, exported, message, complaint):
    theirs = transformers.AutoTokenizer.from_pretrained(exported("sft"))
    with pytest.raises(Exception, match=complaint):
        theirs.apply_chat_template([user("Hi"), message])


def test_random_vocabularies_give_our_ids(transformers):
    """Tokens in any order, whether or not a merge leads to them."""
    rng = random.Random(0)
    for _ in range(100):
        tokens = {bytes(rng.choices(b"abc", k=rng.randrange(2, 5))): None for _ in range(rng.randrange(3, 20))}
        ours = Tokenizer({token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *tokens])})
        theirs = export.convert_tokenizer(ours, 64, "left")
        for _ in range(20):
            text = "".join(rng.choices("abc", k=rng.randrange(1, 20)))
            assert theirs(text)["input_ids"] == ours.encode(text), (tokens, text)


def test_gpt2s_own_vocabulary_goes_out_and_in(gpt2, transformers, tiny, tmp_path):
    plain = write_gpt2(tmp_path / "plain", tiny(50257))
    export.main(export.Config(str(plain), str(tmp_path / "hf")))
    model, tokenizer = load_model(str(tmp_path / "hf"))
    assert tokenizer == gpt2 and model.config.vocab_size == 50262
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("Hello world")["input_ids"] == [15496, 995] and theirs.pad_token_id == 50261
    (tmp_path / "hf" / "vocab.tiktoken").unlink()  # as where transformers saved the model again: 50262 is GPT-2's, too
    again, tokenizer = load_model(str(tmp_path / "hf"))
    assert tokenizer == gpt2 and torch.equal(again.wte.weight[:50262], model.wte.weight[:50262])


# ------------------------------------------------------------------------------------------- the export: the folder


def test_the_command_writes_a_folder_and_replaces_an_earlier_export(tool, workshop, exported, tmp_path):
    for name, kind in (("sft", "CausalLM"), ("rm", "SequenceClassification")):
        code, out, err = tool("export", workshop.path(name), f"{tmp_path}/deep/hf/")
        assert (code, err) == (0, "") and f"AutoModelFor{kind}.from_pretrained" in out
        assert contents(tmp_path / "deep") == {f"hf/{file}": data for file, data in contents(exported(name)).items()}
    (tmp_path / "empty").mkdir()
    assert tool("export", workshop.path("sft"), tmp_path / "empty")[0] == 0


def test_the_weights_are_one_file_of_safetensors(exported):
    weights = {file for file in contents(exported("sft")) if not file.endswith((".json", ".jinja"))}
    assert weights == {"model.safetensors", "vocab.tiktoken"}


def test_a_folder_that_is_no_export_is_not_overwritten(tool, workshop, exported, tmp_path):
    run = shutil.copytree(workshop.path("base"), tmp_path / "run")
    more = shutil.copytree(exported("sft"), tmp_path / "more")
    (more / "notes.txt").write_text("mine")
    less = shutil.copytree(exported("sft"), tmp_path / "less")
    (less / "vocab.tiktoken").unlink()  # a folder of somebody else
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for out in (run, more, less, tmp_path / "file"):
        code, _, err = tool("export", workshop.path("sft"), out)
        message = f"{out} exists and is not an earlier export; give a new folder, or empty it"
        assert (code, err) == (2, f"error: {message}\n")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", ["PreTrainedModel.save_pretrained", "PreTrainedTokenizerFast.save_pretrained"])
def test_an_export_that_fails_in_the_middle_leaves_what_was_there(failing, workshop, exported, tmp_path, monkeypatch):
    shutil.copytree(exported("rm"), tmp_path / "old")
    before = contents(tmp_path)

    def fail(self, folder, **_):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").touch()
        raise OSError("disk full")

    monkeypatch.setattr(f"transformers.{failing}", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            export.main(export.Config(workshop.path("sft"), str(tmp_path / name)))
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["old"]


def test_an_export_onto_a_link_goes_where_it_points_and_leaves_nothing_beside_it(tool, workshop, exported, tmp_path):
    shutil.copytree(exported("rm"), tmp_path / "there" / "hf")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "hf")
    assert tool("export", workshop.path("sft"), tmp_path / "link")[0] == 0
    assert contents(tmp_path / "there" / "hf") == contents(exported("sft"))
    assert sorted(os.listdir(tmp_path)) == ["link", "there"] and os.listdir(tmp_path / "there") == ["hf"]
    assert (tmp_path / "link").is_symlink()


def test_an_export_whose_last_step_fails_leaves_the_earlier_one_in_its_place(workshop, exported, tmp_path, monkeypatch):
    shutil.copytree(exported("rm"), tmp_path / "hf")
    before, rename, moved = contents(tmp_path), os.rename, []

    def fail_at_the_second(a, b):
        moved.append(a)
        if len(moved) == 2:
            raise OSError("disk full")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        export.main(export.Config(workshop.path("sft"), str(tmp_path / "hf")))
    assert contents(tmp_path) == before


def test_an_earlier_export_is_there_until_the_new_one_is_complete(workshop, exported, tmp_path, monkeypatch):
    shutil.copytree(exported("rm"), tmp_path / "hf")
    seen, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: seen.append((Path(a), contents(a), Path(b))) or rename(a, b))
    export.main(export.Config(workshop.path("sft"), str(tmp_path / "hf")))
    (first, old, _), (_, new, last) = [move for move in seen if move[0].parent == tmp_path]
    assert first == last == tmp_path / "hf" and old == contents(exported("rm")) and new == contents(exported("sft"))
