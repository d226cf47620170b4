"""The tokenizer and the chat format: what is a target, and that no text can inject a special token."""

import base64
import random

import pytest
import tiktoken

from conftest import assistant, system, user
from nanopost.config import UserError
from nanopost.tokenizer import CHAT_TOKENS, Tokenizer, cut, load_tokenizer

SPECIALS = ("<|endoftext|>",) + CHAT_TOKENS


def supervised(ids, mask):
    return [i for i, target in zip(ids, mask, strict=True) if target]


# ----------------------------------------------------------------------------------------------- the chat format


def test_the_targets_are_every_answer_and_its_end_token(tokenizer):
    t = tokenizer
    ids, mask = t.chat([system("be kind"), user("say hello"), assistant("hello"), user("and?"), assistant("later")])
    assert supervised(ids, mask) == t.encode("hello") + [t.end] + t.encode("later") + [t.end]


def test_a_conversation_is_each_turn_behind_the_token_of_its_role(tokenizer):
    t = tokenizer
    ids, _ = t.chat([system("s"), user("the map"), assistant("the end")])
    assert ids == [t.system, *t.encode("s"), t.user, *t.encode("the map"), t.assistant, *t.encode("the end"), t.end]


def test_role_tokens_are_never_targets(tokenizer):
    t = tokenizer
    ids, mask = t.chat([system("s"), user("u"), assistant("a"), assistant("b")])
    assert not {t.user, t.assistant, t.system} & set(supervised(ids, mask))


def test_the_prompt_is_a_prefix_of_the_conversation_with_its_answer(tokenizer):
    messages = [system("the rules"), user("and"), assistant("the"), user("then")]
    prompt = tokenizer.prompt(messages)
    ids, mask = tokenizer.chat(messages + [assistant(" answer")])
    assert ids[: len(prompt)] == prompt and prompt[-1] == tokenizer.assistant
    assert mask.index(True, len(prompt) - 1) == len(prompt)  # the first target of the last turn comes right after it


def test_prompt_and_answer_are_not_tokenised_together(tokenizer):
    assert len(tokenizer.encode("the")) == 1
    ids, _ = tokenizer.chat([user("t"), assistant("he")])
    assert tokenizer.encode("the")[0] not in ids


def test_a_document_stands_between_two_endoftext_tokens_and_all_but_the_first_are_targets(tokenizer):
    ids, mask = tokenizer.document("the moon")
    assert ids == [tokenizer.eot, *tokenizer.encode("the moon"), tokenizer.eot]
    assert mask == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("text", SPECIALS + ("a<|end|>b", "<|user|><|assistant|><|end|>"))
def test_text_that_looks_like_a_special_token_stays_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert max(ids) < len(tokenizer.ranks) and tokenizer.decode(ids) == text
    chat, mask = tokenizer.chat([user(text), assistant(text)])
    assert [i for i in chat if i >= len(tokenizer.ranks)] == [tokenizer.user, tokenizer.assistant, tokenizer.end]
    document, _ = tokenizer.document(text)
    assert [i for i in document if i >= len(tokenizer.ranks)] == [tokenizer.eot, tokenizer.eot]


def test_the_special_tokens_take_the_ids_after_the_vocabulary(tokenizer):
    t, n = tokenizer, len(tokenizer.ranks)
    assert [t.eot, t.user, t.assistant, t.system, t.end, t.pad] == list(range(n, n + 6))
    assert t.vocab_size == n + 6
    assert t.decode([t.eot, t.user, t.assistant, t.system, t.end, t.pad]) == "".join(SPECIALS)


# --------------------------------------------------------------------------------------------------- text <-> ids


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\t ", "the and the", "naïve café", "日本語", "🙂👩‍👩‍👧", "a\x00b", "  x  "]
)
def test_decoding_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_gives_back_any_unicode(tokenizer):
    rng = random.Random(0)
    points = [p for p in range(0x11000) if not 0xD800 <= p < 0xE000]
    for _ in range(200):
        text = "".join(map(chr, rng.choices(points, k=rng.randrange(1, 30))))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_very_long_white_space_is_cut_where_the_pattern_cuts_it(tokenizer, monkeypatch):
    assert cut("a" + " " * 10**6 + "b c") == ["a" + " " * (10**6 - 1), " b c"]  # tiktoken cannot read it whole
    assert len(tokenizer.encode("a" + " " * 10**6 + "b")) == 10**6 + 2
    monkeypatch.setattr("nanopost.tokenizer.LONG", 3)
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(" \n\t\u2028\x85\x1c'a1!\u00e9") for _ in range(rng.randrange(25)))
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


def test_half_a_character_decodes_to_a_replacement_character_not_to_an_error(tokenizer):
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud800"))  # a lone surrogate, which JSON can hold


def test_merges_are_used(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("the and")] == ["the", " a", "n", "d"]


# --------------------------------------------------------------------------------------------------- vocabularies


def vocabulary_lines():
    return [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]


def test_a_written_vocabulary_is_read_back_the_same(tokenizer, tmp_path):
    path = tmp_path / "vocab.tiktoken"
    with open(path, "w") as f:
        tokenizer.write(f)
    again = load_tokenizer(str(path))
    assert again == tokenizer and again.vocab_size == tokenizer.vocab_size
    assert again.encode("the moon and the sea") == tokenizer.encode("the moon and the sea")
    assert again != Tokenizer({bytes([i]): i for i in range(256)})


@pytest.mark.parametrize(
    "line, wrong",
    [(3, "not base64! 2"), (1, "AA=="), (256, "/w== 255 7"), (17, "EA== sixteen"), (5, ""), (9, "éé 8"), (2, "AQ 1")],
)
def test_a_malformed_line_of_a_vocabulary_is_reported_with_file_and_line(tmp_path, line, wrong):
    lines = vocabulary_lines()
    lines[line - 1] = wrong
    path = tmp_path / "broken.tiktoken"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"broken\.tiktoken:{line}: "):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:255],  # a byte is missing
        lambda lines: lines[:255] + ["YWI= 255"],  # "ab" in its place
        lambda lines: lines[:-1] + ["/w== 300"],  # a gap in the ranks
        lambda lines: lines[:-1] + ["/w== 3"],  # a rank twice
        lambda lines: [],
    ],
    ids=["too few", "no byte 255", "gap", "twice", "empty"],
)
def test_ranks_that_do_not_make_a_vocabulary_are_refused(tmp_path, change):
    path = tmp_path / "broken.tiktoken"
    path.write_text("".join(line + "\n" for line in change(vocabulary_lines())))
    with pytest.raises(UserError, match="broken.tiktoken"):
        load_tokenizer(str(path))


def test_a_missing_vocabulary_or_a_folder_in_its_place_is_refused(tmp_path):
    with pytest.raises(UserError, match="no vocabulary at .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no vocabulary at"):
        load_tokenizer(str(tmp_path))


def test_gpt2_tokens_are_gpt2s_and_the_chat_tokens_come_after_endoftext(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" don't  stop\n") == [836, 470, 220, 2245, 198]
    assert (gpt2.eot, gpt2.user, gpt2.pad, gpt2.vocab_size) == (50256, 50257, 50261, 50262)
    original = tiktoken.get_encoding("gpt2")
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices("aB 9'st,\n\téß日🙂", k=40))
        assert gpt2.encode(text) == original.encode_ordinary(text)


def test_gpt2_without_files_or_network_is_a_user_error_that_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")
