"""Chatting: what is streamed is the model's answer, and a conversation survives whatever is typed into it."""

import io
import sys
from types import SimpleNamespace

import pytest

from nanopost.checkpoint import load_model
from nanopost.config import UserError, clean
from nanopost.sampling import generate
from nanopost.tools import chat

BLOCK = 48  # the context of the workshop's models


def say(text):
    return {"role": "user", "content": text}


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """scripted(ids): from now on every answer consists of these tokens and the end token."""

    def script(ids):
        def generate(model, prompts, max_new_tokens, end, on_token, **options):
            for token in [*ids, end]:
                on_token([token])
            return SimpleNamespace(responses=lambda: [ids])

        monkeypatch.setattr(chat, "generate", generate)

    return script


@pytest.fixture
def talk(workshop, monkeypatch, capsys):
    """talk("Hi!", "Bye!", **options) holds a conversation -> (stdout, stderr, the messages of each answer)."""

    def conversation(*typed, **options):
        asked, real = [], chat.answer
        with monkeypatch.context() as patch:
            patch.setattr(chat, "answer", lambda *args: asked.append(list(args[2])) or real(*args))
            patch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in typed)))
            chat.main(chat.Config(workshop.path("base"), **{"max_new_tokens": 6, "device": "cpu", **options}))
        out, err = capsys.readouterr()
        return out, err, asked

    return conversation


@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_of_a_streamed_answer_are_the_decoded_greedy_answer(tiny, tokenizer, seed):
    model, pieces, messages = tiny(tokenizer.vocab_size, seed=seed).eval(), [], [say("Say cat!")]
    config = chat.Config("", temperature=0, max_new_tokens=20)
    answer = chat.answer(model, tokenizer, messages, config, None, pieces.append)
    ids = generate(model, [tokenizer.prompt(messages)], 20, tokenizer.end, temperature=0).responses()[0]
    assert answer == "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) == len(ids) + 1  # one per token, and what is left of a character that was cut off


def test_characters_that_span_tokens_are_written_whole(tiny, tokenizer, scripted):
    text, pieces = "na\u00efve \u4f60\u597d \U0001f600!", []
    scripted(list(text.encode()))  # a token for every byte
    config = chat.Config("", max_new_tokens=40)
    answer = chat.answer(tiny(tokenizer.vocab_size), tokenizer, [say("Hi!")], config, None, pieces.append)
    assert answer == text and [piece for piece in pieces if piece] == list(text)


def test_a_single_answer_is_printed_and_the_command_ends(workshop, command, tokenizer):
    options = ["--temperature", 0, "--max-new-tokens", 6, "--device", "cpu"]
    code, out, err = command("nanopost/__main__.py", "chat", workshop.path("base"), "--prompt", "Say cat!", *options)
    ids = tokenizer.prompt([say("Say cat!")])
    answer = generate(load_model(workshop.path("base"))[0], [ids], 6, tokenizer.end, temperature=0).responses()[0]
    assert (code, out.rstrip("\ufffd\n"), err) == (0, clean(tokenizer.decode(answer)).rstrip("\ufffd\n"), "")


def test_what_a_model_says_cannot_command_the_terminal(workshop, scripted, tool):
    scripted(list(b"a\x1b[2Jb\x07\r\xc2\x9b\nc\td"))
    out = tool("chat", workshop.path("base"), "--prompt", "Hi", "--device", "cpu")[1]
    assert out == "a\\x1b[2Jb\\x07\\r\\x9b\nc\td\n"


def test_an_input_that_is_closed_or_no_text_ends_no_conversation_badly(workshop, tool, monkeypatch):
    """A closed one is at its end; bytes that are no UTF-8 are replaced."""
    closed = io.StringIO()
    closed.close()
    bytes_of_latin_1 = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8")
    for stdin, answers in ((None, 0), (closed, 0), (bytes_of_latin_1, 1)):
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = tool("chat", workshop.path("base"), "--temperature", 0, "--device", "cpu")
        assert (code, err, bool(out)) == (0, "", bool(answers))


def test_a_prompt_longer_than_the_context_is_told_in_one_line(workshop, command):
    arguments = "chat", workshop.path("base"), "--prompt", "x" * 100, "--device", "cpu"
    code, out, err = command("nanopost/__main__.py", *arguments)
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert err.startswith("error: the prompt has 102 tokens, too many to answer in a context of 48")


def test_a_message_longer_than_the_context_does_not_end_the_conversation(talk):
    out, err, asked = talk("x" * 100, "Say sun!", temperature=0)
    assert len(err.splitlines()) == 1 and "the prompt has 102 tokens" in err
    assert asked == [[say("x" * 100)], [say("Say sun!")]]  # and is forgotten
    assert out == talk("Say sun!", temperature=0)[0] != "\n"


def test_an_empty_line_ends_the_conversation(talk):
    assert [messages[-1] for messages in talk("One", "", "Two")[2]] == [say("One")]


def test_the_oldest_turns_are_dropped_when_the_context_is_full(talk, tokenizer, scripted):
    scripted(list(b"yes"))
    typed = ["one", "two two", "three three", "4", "five five five", "six " * 7, "7"]
    system = {"role": "system", "content": "Be kind."}
    out, err, asked = talk(*typed, system="Be kind.")
    assert (out, err) == ("yes\n" * 7, "")
    conversation, dropped = [], set()
    for text, messages in zip(typed, asked, strict=True):
        conversation.append(say(text.strip()))
        assert messages[0] == system
        first = len(conversation) - len(messages[1:])
        assert first % 2 == 0 and messages[1:] == conversation[first:]
        assert len(tokenizer.prompt(messages)) + 6 <= BLOCK
        more = [system] + conversation[first - 2 :]  # no more is dropped than has to be
        assert not first or len(tokenizer.prompt(more)) + 6 > BLOCK
        dropped.add(first)
        conversation.append({"role": "assistant", "content": "yes"})
    assert len(dropped) > 2 and min(map(len, asked[1:])) == 2  # once all but the system's and the new message


def test_the_same_seed_gives_the_same_conversation(talk):
    lines = "One", "Two"
    assert talk(*lines, seed=1) == talk(*lines, seed=1) != talk(*lines, seed=2)


@pytest.mark.parametrize("option", [
    {"temperature": -0.1}, {"temperature": 1e-30}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}
])  # fmt: skip
def test_bad_options_are_refused(option):
    with pytest.raises(UserError, match="--" + next(iter(option)).replace("_", "-")):
        chat.Config("out/ppo", **option)
