"""GPT-2 in and Hugging Face out: model, gradients, ids and masks are those of the transformers library, to rounding."""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanopost.huggingface
import train_sft
from measured import at_most, distance
from nanopost import export
from nanopost.checkpoint import load_model, save_model
from nanopost.config import UserError
from nanopost.data import Example, collate
from nanopost.huggingface import add_rows, to_huggingface
from nanopost.model import GPT
from nanopost.sampling import generate
from nanopost.tokenizer import CHAT_TOKENS, Tokenizer
from test_tokenizer import assistant, system, user

SPECIALS = ("<|endoftext|>", *CHAT_TOKENS)
SIZES = {  # vocab_size, n_positions, n_layer, n_head, n_embd
    "two layers": (97, 24, 2, 2, 16),
    "one wide layer, no spare row": (64, 16, 1, 4, 32),
    "three layers, positions that are cropped": (70, 29, 3, 1, 12),
}


@pytest.fixture(scope="session")
def safetensors():
    return pytest.importorskip("safetensors.torch", reason='needs safetensors: pip install -e ".[hf]"')


@pytest.fixture(scope="session")
def transformers(safetensors):
    library = pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[parity]"')
    library.utils.logging.disable_progress_bar()
    return library


def one_line(error) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# ------------------------------------------------------------------------------------- the model is GPT-2, in float64


@pytest.fixture(params=[(name, seed) for name in SIZES for seed in (0, 1)], ids=lambda p: f"{p[0]}, seed {p[1]}")
def both(request, transformers, in_float64, tmp_path):
    """(transformers' GPT2LMHeadModel, our GPT that was read from the folder it was saved to, five examples)."""
    name, seed = request.param
    vocab_size, n_positions, n_layer, n_head, n_embd = SIZES[name]
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=n_positions, n_layer=n_layer, n_head=n_head, n_embd=n_embd, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # far from its initialisation: no bias is 0, no gain 1
        for p in theirs.parameters():
            p.copy_((p.dim() == 1) * p + 0.3 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    rng, examples = random.Random(seed), []
    for length in (n_positions // 8 * 8, 9, 3, 12, 2):
        prompt = rng.randrange(1, length)
        examples.append(Example([rng.randrange(vocab_size) for _ in range(length)],
                                [t >= prompt and rng.random() < 0.8 for t in range(length)]))
    examples[0].mask[-1] = True  # the last position is used
    return theirs, GPT.from_pretrained(str(tmp_path)), examples


def run_both(theirs, ours, batch):
    """Theirs and ours on the real tokens, as lists of tensors: every block's output, the final hidden, the logits."""
    seen = []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
             for model in (theirs.transformer, ours) for block in model.h]
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]  # (B, T)
    with torch.no_grad():
        out = theirs(batch.ids, attention_mask=real.long(), output_hidden_states=True)
        hidden = ours(batch.ids)
        logits = ours.logits(hidden)
    for hook in hooks:
        hook.remove()
    layers = len(ours.h)
    return ([x[real] for x in (*seen[:layers], out.hidden_states[-1], out.logits)],
            [x[real] for x in (*seen[layers:], hidden, logits)])


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
    folder.mkdir(exist_ok=True)
    c = model.config
    tensors = {name.replace("transformer.", prefix): t for name, t in to_huggingface(model).items()}
    for i in range(c.n_layer):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, c.block_size, c.block_size)
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")
    sizes = {"vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size, "n_layer": c.n_layer,
             "n_head": c.n_head, "n_embd": c.n_embd}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes, "resid_pdrop": 0.1}))
    return folder


@pytest.fixture
def gpt2_is_tiny(monkeypatch, tokenizer):
    """The vocabulary called gpt2 is the tests' own one, of 263 tokens and 5 chat tokens."""
    real = nanopost.huggingface.load_tokenizer
    monkeypatch.setattr(nanopost.huggingface, "load_tokenizer", lambda n: tokenizer if n == "gpt2" else real(n))


@pytest.fixture
def plain(safetensors, gpt2_is_tiny, tiny, tokenizer, tmp_path):
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


def test_a_model_in_several_files_is_read_whole(plain, safetensors):
    model, folder = plain
    whole = GPT.from_pretrained(str(folder)).state_dict()
    tensors = safetensors.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for i in (0, 1):
        safetensors.save_file({n: tensors[n] for n in names[i::2]}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    parts = GPT.from_pretrained(str(folder)).state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_half_precision_is_read_into_single(plain, safetensors):
    model, folder = plain
    tensors = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file({n: t.half() for n, t in tensors.items()}, folder / "model.safetensors")
    again = GPT.from_pretrained(str(folder))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.wpe.weight, model.wpe.weight.half().float())


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


def edit_tensors(change):
    def damage(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def reshape(name, *shape):
    return edit_tensors(lambda tensors: tensors.update({name: torch.zeros(shape)}))


REFUSALS = {
    "another family": (lambda d: edit(d, model_type="llama"), "config.json: model_type is 'llama'; only gpt2"),
    "another activation": (lambda d: edit(d, activation_function="relu"), "activation_function is 'relu'; nanopost's "
                           "model computes only with 'gelu_new' or 'gelu_pytorch_tanh'"),
    "another epsilon": (lambda d: edit(d, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06; .* only with 1e-05"),
    "unscaled attention": (lambda d: edit(d, scale_attn_weights=False), "scale_attn_weights is False"),
    "attention by layer": (lambda d: edit(d, scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx is True"),
    "reordered attention": (lambda d: edit(d, reorder_and_upcast_attn=True), "reorder_and_upcast_attn is True"),
    "cross-attention": (lambda d: edit(d, add_cross_attention=True), "add_cross_attention is True"),
    "untied": (lambda d: edit(d, tie_word_embeddings=False), "tie_word_embeddings is False"),
    "a narrow MLP": (lambda d: edit(d, n_inner=32), "n_inner is 32; .* only with None or 64"),
    "a size that is text": (lambda d: edit(d, n_embd="16"), "n_embd must be a whole number, not '16'"),
    "a size that is missing": (lambda d: edit(d, n_layer=None), "n_layer must be a whole number, not None"),
    "impossible heads": (lambda d: edit(d, n_head=3), r"config.json: n_embd \(16\) must be a multiple of n_head"),
    "a tiny context": (lambda d: edit(d, n_positions=7), "config.json: block_size must be at least 1"),
    "another vocabulary": (lambda d: edit(d, vocab_size=300),
                           "has 300 tokens, but the vocabulary gpt2 263 and 5 chat tokens"),
    "too small a vocabulary": (lambda d: edit(d, vocab_size=262), "has 262 tokens, but the vocabulary gpt2 263 and 5"),
    "config is half": (lambda d: (d / "config.json").write_text('{"model_type": "gpt2",'), "config.json"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
    "half the weights": (lambda d: os.truncate(d / "model.safetensors", 9000), "model.safetensors cannot be read"),
    "text as weights": (lambda d: (d / "model.safetensors").write_text("hello\nworld" * 9), "cannot be read"),
    "a tensor is missing": (edit_tensors(lambda t: t.pop("h.1.ln_2.bias")), r"lacks the tensor h\.1\.ln_2\.bias"),
    "a tensor too many": (edit_tensors(lambda t: t.update({"v_head.weight": torch.ones(1)})),
                          r"has an unknown tensor v_head\.weight"),
    "fewer layers than tensors": (lambda d: edit(d, n_layer=1), r"has an unknown tensor h\.1\."),
    "more layers than tensors": (lambda d: edit(d, n_layer=3), r"lacks the tensor h\.2\."),
    "a matrix the other way round": (reshape("h.0.attn.c_attn.weight", 48, 16),
                                     r"h\.0\.attn\.c_attn\.weight has shape \(48, 16\); config.json says \(16, 48\)"),
    "a matrix that is a vector": (reshape("h.0.mlp.c_fc.weight", 16), r"shape \(16,\); config.json says \(16, 64\)"),
    "too few rows": (reshape("wte.weight", 262, 16), r"wte\.weight has shape \(262, 16\); config.json says \(263,"),
    "too few positions": (reshape("wpe.weight", 32, 16), r"wpe\.weight has shape \(32, 16\); config.json says \(48, "),
    "too many positions": (reshape("wpe.weight", 56, 16), r"wpe\.weight has shape \(56, 16\); config.json says \(48, "),
    "positions without width": (reshape("wpe.weight", 48), r"wpe\.weight has shape \(48,\)"),
    "two labels": (reshape("score.weight", 2, 16), r"score\.weight has shape \(2, 16\); config.json says \(1, 16\)"),
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


@pytest.mark.parametrize("content, message", [("[", "is not JSON"), ("[]", "model_type is None"), ("3", "is None"),
                                              ("{}", "model_type is None"), (b"\xff\xfe", "is not JSON")])
def test_a_malformed_config_is_refused_by_from_pretrained_itself(plain, content, message):
    folder = plain[1]
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        GPT.from_pretrained(str(folder))
    assert str(folder) in one_line(error)
    with pytest.raises(UserError, match="does not describe a model") as error:  # could be a run's folder as well
        load_model(str(folder))
    assert str(folder) in one_line(error)


def test_a_name_that_is_neither_a_folder_nor_gpt2s_is_refused():
    with pytest.raises(UserError, match="no folder gpt3, and it is none of gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(UserError, match="no folder out/nothing"):
        load_model("out/nothing")


def test_the_command_line_tells_a_refusal_in_one_line_and_exits_with_2(plain, command, tmp_path):
    edit(plain[1], activation_function="relu")
    for file, *arguments in (("train_sft.py", "--init", plain[1], "--out", tmp_path / "o"),
                             ("nanopost/export.py", plain[1], tmp_path / "o"),
                             ("nanopost/chat.py", plain[1], "--prompt", "Hi!")):
        code, out, err = command(file, *arguments)
        assert code == 2 and len(err.splitlines()) == 1 and "activation_function is 'relu'" in err
        assert not (tmp_path / "o").exists()


# --------------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def hub(monkeypatch):
    """hub(function) puts it in the place of huggingface_hub.hf_hub_download."""
    return lambda function: monkeypatch.setitem(sys.modules, "huggingface_hub",
                                                SimpleNamespace(hf_hub_download=function))


@pytest.mark.parametrize("name, repository", [
    ("gpt2", "openai-community/gpt2"), ("gpt2-medium", "openai-community/gpt2-medium"),
    ("gpt2-large", "openai-community/gpt2-large"), ("openai-community/gpt2-xl", "openai-community/gpt2-xl")])
def test_a_name_of_gpt2_is_downloaded_from_openais_repository(plain, hub, monkeypatch, tmp_path, name, repository):
    asked = []
    monkeypatch.chdir(tmp_path)  # where no folder has that name
    hub(lambda *args: asked.append(args) or str(plain[1] / args[1]))
    model, _ = load_model(name)
    assert set(asked) == {(repository, "config.json"), (repository, "model.safetensors")}
    assert torch.equal(model.wpe.weight, plain[0].wpe.weight)


def test_a_local_folder_goes_before_a_name(plain, hub, monkeypatch, tmp_path):
    hub(lambda *args: pytest.fail("there is nothing to download"))
    monkeypatch.chdir(tmp_path)
    plain[1].rename("gpt2")
    assert torch.equal(load_model("gpt2")[0].wpe.weight, plain[0].wpe.weight)


def test_a_failing_download_is_one_line_that_says_what_to_do(safetensors, hub, command, tmp_path):
    def download(*_):
        raise ConnectionError("no\nnetwork")

    hub(download)
    code, _, err = command("train_sft.py", "--init", "gpt2-medium", "--out", tmp_path / "out")
    assert code == 2 and err == ("error: openai-community/gpt2-medium is neither in Hugging Face's cache nor could it "
                                 "be downloaded (ConnectionError); go online once or give a local folder\n")


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_a_missing_package_is_one_line_that_says_what_to_install(package, command, tmp_path, monkeypatch):
    if package == "huggingface_hub":
        pytest.importorskip("safetensors")
    for module in [name for name in sys.modules if name.split(".")[0] == package] + [package, f"{package}.torch"]:
        monkeypatch.setitem(sys.modules, module, None)
    code, _, err = command("train_sft.py", "--init", "gpt2", "--out", tmp_path / "out")
    assert code == 2 and err == (f'error: {package} is not installed; pip install "nanopost[hf]" (in a checkout: '
                                 'pip install -e ".[hf]")\n')


def test_without_safetensors_an_export_writes_nothing(workshop, tmp_path, monkeypatch):
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="safetensors is not installed"):
        export.main(export.Config(workshop.path("sft"), str(tmp_path / "hf")))
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------- the export: the models


@pytest.fixture(scope="session")
def exported(safetensors, workshop, tmp_path_factory):
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
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(save_and_export(tmp_path, model, tokenizer),
                                                                       output_loading_info=True)
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
        rows = tok.apply_chat_template(PROMPTS, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       padding=True, return_tensors="pt")
        answers = theirs.generate(**rows, max_new_tokens=16, do_sample=False)[:, rows["input_ids"].shape[1] :]
        expected = [ids + [tokenizer.end] * ended for ids, ended in zip(ours.responses(), ours.ended.tolist())]
        assert [[i for i in row.tolist() if i != tokenizer.pad] for row in answers] == expected
        lengths |= {len(ids) for ids in expected}
    assert len(lengths) > 3 and 16 in lengths


def test_context_dropout_and_the_tokenizers_habits_are_told(transformers, tiny, tokenizer, tmp_path):
    folder = save_and_export(tmp_path, tiny(tokenizer.vocab_size, dropout=0.25), tokenizer)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop, config.n_positions) == (0.25, 0.25, 0.25, 48)
    assert transformers.AutoTokenizer.from_pretrained(folder).model_max_length == 48
    habits = json.loads(Path(folder, "tokenizer_config.json").read_text())
    assert habits["model_input_names"] == ["input_ids", "attention_mask"]  # with token types, the logits are others
    assert habits["clean_up_tokenization_spaces"] is False
    from safetensors import safe_open

    with safe_open(Path(folder, "model.safetensors"), "pt") as f:
        assert f.metadata() == {"format": "pt"}  # without it, some versions refuse the file


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
        for file in export.FILES:
            assert (tmp_path / name / file).read_bytes() == Path(exported(name), file).read_bytes(), (name, file)


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


def test_a_reward_model_that_always_says_the_same_is_refused(safetensors, tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match="head is all zeros"):
        save_and_export(tmp_path, tiny(tokenizer.vocab_size).add_head(0.0), tokenizer)
    assert not (tmp_path / "hf").exists()


# -------------------------------------------------------------------------------- the export: tokenizer and template


def pairs_tokenizer() -> Tokenizer:
    """Every pair of bytes is a token: wherever the text is split, the ids show it."""
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    return Tokenizer({token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + pairs)})


def write_tokenizer(folder, tokenizer) -> str:
    for name, content in export.tokenizer_files(tokenizer, 64, "left").items():
        Path(folder, name).write_text(json.dumps(content))
    return str(folder)


PIECES = ["the ", " and", "don't", "I'll've", "'S", "x", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000",
          "12", " 3½", "٣", "!?", "--", "naïve", "e\u0301", "日本語", "🙂", "👩\u200d👩", "\u200b", "\x00", "\x1c", "\x85",
          "<|", "|>", "_", "ǅ"]


def texts(count, pieces=PIECES, seed=0):
    rng = random.Random(seed)
    points = [p for p in range(0x20000) if not 0xD800 <= p < 0xE000]
    for _ in range(count):
        yield "".join(rng.choices(pieces, k=rng.randrange(12)))
        yield "".join(map(chr, rng.choices(points, k=rng.randrange(1, 12)))) + rng.choice(pieces)


@pytest.mark.parametrize("which", ["few merges", "all pairs of bytes", "gpt2"])
def test_ids_of_any_text_are_ours(which, transformers, request, tokenizer, tmp_path):
    ours = {"few merges": lambda: tokenizer, "all pairs of bytes": pairs_tokenizer,
            "gpt2": lambda: request.getfixturevalue("gpt2")}[which]()
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
        yield [{"role": rng.choice(["user", "assistant", "system"]), "content": next(content)}
               for _ in range(rng.randrange(1, 6))]


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


@pytest.mark.parametrize("message, complaint", [
    (user("a<|end|>b"), r"must not contain the special token <\|end\|>"),
    (assistant("<|user|>"), r"must not contain the special token <\|user\|>"),
    ({"role": "tool", "content": "4"}, "the role must be user, assistant or system, not tool")])
def test_the_chat_template_refuses_what_would_inject_a_special_token(transformers, exported, message, complaint):
    theirs = transformers.AutoTokenizer.from_pretrained(exported("sft"))
    with pytest.raises(Exception, match=complaint):
        theirs.apply_chat_template([user("Hi"), message])


def test_merges_are_the_two_parts_of_a_token_in_order(tokenizer):
    assert export.merges(tokenizer.ranks) == [(b"t", b"h"), (b"th", b"e"), (b" ", b"a"), (b" ", b"th"), (b"a", b"n"),
                                              (b"an", b"d")]


def test_gpt2s_merges_and_vocabulary_come_back_from_the_ranks(gpt2):
    files = Path(os.environ["NANOPOST_GPT2_FILES"])
    model = export.tokenizer_files(gpt2, 1024, "left")["tokenizer.json"]["model"]
    assert model["merges"] == files.joinpath("vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    vocabulary = json.loads(files.joinpath("encoder.json").read_text(encoding="utf-8"))
    assert vocabulary == {**model["vocab"], "<|endoftext|>": gpt2.eot}


def test_a_vocabulary_that_is_not_made_by_merging_is_refused():
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    with pytest.raises(UserError, match=r"token 256 of the vocabulary, b'abc', is not two earlier ones merged"):
        export.merges(ranks)
    with pytest.raises(UserError, match="token 256"):
        export.merges(ranks | {b"ab": 257})  # a part, but a later one


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


def contents(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_the_command_writes_a_folder_and_replaces_an_earlier_export(safetensors, command, workshop, exported, tmp_path):
    for name, kind in (("sft", "CausalLM"), ("rm", "SequenceClassification")):
        code, out, err = command("nanopost/export.py", workshop.path(name), f"{tmp_path}/deep/hf/")
        assert (code, err) == (0, "") and f"AutoModelFor{kind}.from_pretrained" in out
        assert contents(tmp_path / "deep") == {f"hf/{file}": data for file, data in contents(exported(name)).items()}
    (tmp_path / "empty").mkdir()
    assert command("nanopost/export.py", workshop.path("sft"), tmp_path / "empty")[0] == 0


def test_a_folder_that_is_no_export_is_not_overwritten(safetensors, command, workshop, exported, tmp_path):
    run = shutil.copytree(workshop.path("base"), tmp_path / "run")
    more = shutil.copytree(exported("sft"), tmp_path / "more")
    (more / "notes.txt").write_text("mine")
    less = shutil.copytree(exported("sft"), tmp_path / "less")
    (less / "vocab.tiktoken").unlink()  # a folder of somebody else
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for out in (run, more, less, tmp_path / "file"):
        code, _, err = command("nanopost/export.py", workshop.path("sft"), out)
        assert code == 2 and err == f"error: {out} is there and is no earlier export; give a new folder, or empty it\n"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", ["save", "dump"])
def test_an_export_that_fails_in_the_middle_leaves_what_was_there(failing, safetensors, workshop, exported, tmp_path,
                                                                  monkeypatch):
    shutil.copytree(exported("rm"), tmp_path / "old")
    before = contents(tmp_path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(*{"save": (safetensors, "save"), "dump": (json, "dump")}[failing], fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            export.main(export.Config(workshop.path("sft"), str(tmp_path / name)))
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["old"]


def test_an_earlier_export_is_there_until_the_new_one_is_complete(workshop, exported, tmp_path, monkeypatch):
    shutil.copytree(exported("rm"), tmp_path / "hf")
    seen, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: seen.append((Path(a), contents(a), Path(b))) or rename(a, b))
    export.main(export.Config(workshop.path("sft"), str(tmp_path / "hf")))
    (first, old, _), (_, new, last) = seen
    assert first == last == tmp_path / "hf" and old == contents(exported("rm")) and new == contents(exported("sft"))
