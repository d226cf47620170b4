"""Records, examples and batches: every shape, every mistake with its file and line, and the alignment of the mask."""

import json
from itertools import islice

import pytest
import torch

from nanopost.config import UserError
from nanopost.data import Example, batches, collate, load_examples, load_pairs, load_prompts, split


def supervised(example):
    return [i for i, target in zip(example.ids, example.mask, strict=True) if target]


def turns(*texts):
    """user, assistant, user, ... in turn"""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# ------------------------------------------------------------------------------------------------- shapes of records


def test_prompt_and_completion_are_one_turn_each(tokenizer, lines):
    t = tokenizer
    [example] = load_examples(lines([{"prompt": "ask", "completion": "the answer", "id": 7}]), t)
    assert example.ids == [t.user, *t.encode("ask"), t.assistant, *t.encode("the answer"), t.end]
    assert supervised(example) == t.encode("the answer") + [t.end]


def test_a_conversation_in_place_of_a_string_is_the_same_record(tokenizer, lines):
    strings = {"prompt": "ask", "completion": "answer"}
    conversations = {"prompt": turns("ask"), "completion": [{"role": "assistant", "content": "answer"}]}
    mixed = {"prompt": turns("ask"), "completion": "answer"}
    a, b, c, d = load_examples(lines([strings, conversations, mixed, {"messages": turns("ask", "answer")}]), tokenizer)
    assert a == b == c == d


def test_earlier_answers_are_context_in_a_prompt_and_targets_in_messages(tokenizer, lines):
    t, talk = tokenizer, turns("hi", "hello", "bye", "later")
    as_prompt, as_messages = load_examples(lines([{"prompt": talk[:3], "completion": talk[3:]}, {"messages": talk}]), t)
    assert as_prompt.ids == as_messages.ids
    assert supervised(as_prompt) == t.encode("later") + [t.end]
    assert supervised(as_messages) == t.encode("hello") + [t.end] + t.encode("later") + [t.end]


def test_a_completion_of_several_turns_has_its_answers_as_targets(tokenizer, lines):
    t = tokenizer
    completion = [{"role": "assistant", "content": "one"}, *turns("more", "two")]
    [example] = load_examples(lines([{"prompt": "count", "completion": completion}]), t)
    assert supervised(example) == t.encode("one") + [t.end] + t.encode("two") + [t.end]


def test_of_a_text_every_token_is_a_target(tokenizer, lines):
    [example] = load_examples(lines([{"text": "the moon"}]), tokenizer)
    assert (example.ids, example.mask) == tokenizer.document("the moon")


def test_pairs_share_the_prompt_and_have_their_own_answers_as_targets(tokenizer, lines):
    t = tokenizer
    path = lines([{"prompt": [{"role": "system", "content": "s"}, *turns("ask")], "chosen": "yes",
                   "rejected": [{"role": "assistant", "content": "no"}]}])
    [(chosen, rejected)] = load_pairs(path, t)
    prompt = [t.system, *t.encode("s"), t.user, *t.encode("ask"), t.assistant]
    assert chosen.ids == prompt + t.encode("yes") + [t.end] and supervised(chosen) == t.encode("yes") + [t.end]
    assert rejected.ids == prompt + t.encode("no") + [t.end] and supervised(rejected) == t.encode("no") + [t.end]


def test_prompts_end_with_the_assistant_token_and_come_back_as_they_stand(tokenizer, lines):
    t = tokenizer
    records = [{"prompt": "ask"}, {"prompt": turns("a", "b", "c"), "gold": 1}]
    prompts, ids = load_prompts(lines(records), t, 100)
    assert prompts == [r["prompt"] for r in records]
    assert ids == [[t.user, *t.encode("ask"), t.assistant], t.prompt(turns("a", "b", "c"))]


def test_blank_lines_are_skipped_and_a_limit_stops_reading(tokenizer, lines):
    path = lines(["", '{"text": "a"}', "   ", '{"text": "b"}', '{"text": "c"}', "not JSON"])
    assert [supervised(e)[:-1] for e in load_examples(path, tokenizer, limit=2)] == [[97], [98]]


# -------------------------------------------------------------------------------------------------- broken records

GOOD = {"sft": {"prompt": "a", "completion": "b"}, "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "prompts": {"prompt": "a"}}


def load(kind, path, tokenizer, room=100):
    return {"sft": load_examples, "pairs": load_pairs, "prompts": load_prompts}[kind](path, tokenizer, room)


BROKEN = [
    ("prompts", {"prompt": 3}, "must be a string or a list of messages, not 3"),
    ("prompts", {"prompt": None}, "must be a string or a list"),
    ("prompts", {"prompt": []}, "must be a string or a list"),
    ("prompts", {"prompt": ["hello"]}, "a message must be"),
    ("prompts", {"prompt": [{"role": "user"}]}, "a message must be"),
    ("prompts", {"prompt": [{"role": "user", "content": None}]}, "a message must be"),
    ("prompts", {"prompt": [{"content": "x"}]}, "role must be one of user, assistant, system"),
    ("prompts", {"prompt": [{"role": "human", "content": "x"}]}, "not 'human'"),
    ("prompts", {"prompt": turns("a", "b")}, "must end with a turn of the user"),
    ("prompts", {"question": "x"}, "prompt is missing"),
    ("prompts", "[1, 2]", "must be an object"),
    ("prompts", '"text"', "must be an object"),
    ("prompts", "null", "must be an object"),
    ("prompts", '{"prompt": "x"', "invalid JSON: .* at column"),
    ("prompts", "{'prompt': 'x'}", "invalid JSON"),
    ("prompts", '{"prompt": "x"} {"prompt": "y"}', "invalid JSON"),
    ("sft", {"prompt": "x"}, "needs text, messages, or prompt and completion; it has prompt"),
    ("sft", {}, "it has nothing"),
    ("sft", {"prompt": "x", "completion": ""}, "completion is empty"),
    ("sft", {"prompt": "x", "completion": " \n"}, "completion is empty"),
    ("sft", {"prompt": "x", "completion": 4}, "must be a string or a list"),
    ("sft", {"prompt": "x", "completion": turns("b", "c")}, "must begin and end with a turn of the assistant"),
    ("sft", {"prompt": turns("a", "b"), "completion": "c"}, "must end with a turn of the user"),
    ("sft", {"messages": []}, "must be a string or a list"),
    ("sft", {"messages": turns("a", "")}, "messages is empty"),
    ("sft", {"messages": turns("a")[0]}, "must be a string or a list"),
    ("sft", {"text": ""}, "text must be a text that is not empty"),
    ("sft", {"text": ["x"]}, "text must be a text"),
    ("pairs", {"prompt": "x", "chosen": "a"}, "rejected is missing"),
    ("pairs", {"chosen": "a", "rejected": "b"}, "prompt is missing"),
    ("pairs", {"prompt": "x", "chosen": "", "rejected": "b"}, "chosen is empty"),
    ("pairs", {"prompt": "x", "chosen": "a", "rejected": "  "}, "rejected is empty"),
    ("pairs", {"prompt": "x", "chosen": "a", "rejected": turns("b")}, "must begin and end with a turn of the assist"),
]


@pytest.mark.parametrize("kind, record, message", BROKEN, ids=[f"{k}-{json.dumps(r)[:44]}" for k, r, _ in BROKEN])
def test_a_malformed_record_is_reported_with_file_and_line(tokenizer, lines, kind, record, message):
    path = lines([GOOD[kind]] * 16 + [record] + [GOOD[kind]], "records.jsonl")
    with pytest.raises(UserError, match=rf"records\.jsonl:17: .*{message}") as error:
        load(kind, path, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", GOOD)
def test_bytes_that_are_not_utf8_are_reported_with_file_and_line(tokenizer, tmp_path, kind):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD[kind]).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:2: not UTF-8"):
        load(kind, str(path), tokenizer)


@pytest.mark.parametrize("kind", GOOD)
def test_a_missing_an_empty_and_an_unusable_file_are_errors(tokenizer, lines, kind):
    with pytest.raises(UserError, match="no file .*nowhere.jsonl"):
        load(kind, "nowhere.jsonl", tokenizer)
    with pytest.raises(UserError, match="empty.jsonl: no "):
        load(kind, lines([], "empty.jsonl"), tokenizer)
    with pytest.raises(UserError, match=r"small.jsonl: no \w+; 3 are longer than 2 tokens"):
        load(kind, lines([GOOD[kind]] * 3, "small.jsonl"), tokenizer, 2)


def test_a_missing_file_of_the_embedded_data_says_how_to_make_it(tokenizer):
    with pytest.raises(UserError, match="prepare.py"):
        load_examples("data/notes/no_such_file.jsonl", tokenizer)


def test_dropped_records_are_counted_in_the_printed_line(tokenizer, lines, capsys):
    long = "x" * 60
    examples = load_examples(lines([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": long},
                                    {"prompt": long, "completion": "b"}, {"messages": turns("only a question")}],
                                   "sft.jsonl"), tokenizer, 32)
    assert len(examples) == 1
    assert capsys.readouterr().out.endswith("sft.jsonl: 1 examples, dropped 2 longer than 32 tokens, "
                                            "dropped 1 without a target\n")
    pairs = load_pairs(lines([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
                             + [{"prompt": "a", "chosen": "b", "rejected": "b"}]
                             + [{"prompt": "a", "chosen": "b", "rejected": long}], "pairs.jsonl"), tokenizer, 32)
    assert len(pairs) == 3
    out = capsys.readouterr().out
    assert "3 pairs" in out and "dropped 1 with two equal sides" in out and "dropped 1 longer than 32 tokens" in out
    prompts, ids = load_prompts(lines([{"prompt": "a"}, {"prompt": long}], "prompts.jsonl"), tokenizer, 32)
    assert prompts == ["a"] and len(ids) == 1
    assert "1 prompts, dropped 1 longer than 32 tokens" in capsys.readouterr().out


def test_a_record_exactly_as_long_as_the_context_is_kept(tokenizer, lines):
    path = lines([{"prompt": "aaaa", "completion": "bbbb"}])  # 1 + 4 + 1 + 4 + 1 tokens
    assert len(load_examples(path, tokenizer, 11)[0].ids) == 11
    with pytest.raises(UserError, match="longer than 10 tokens"):
        load_examples(path, tokenizer, 10)


# --------------------------------------------------------------------------------------------------------- collate

EXAMPLES = [Example([5, 6, 7], [False, False, True]), Example([1, 2, 3, 4, 5, 6, 7, 8, 9], [False, True] * 4 + [True]),
            Example([3, 4], [False, True])]


def test_column_t_of_the_mask_is_about_the_token_in_column_t_plus_1():
    batch = collate(EXAMPLES)
    for row, example in enumerate(EXAMPLES):
        targets = [batch.ids[row, t + 1].item() for t in batch.mask[row].nonzero()[:, 0].tolist()]
        assert targets == supervised(example)


def test_index_lists_the_flat_positions_of_the_mask_and_targets_counts_them():
    batch = collate(EXAMPLES)
    assert torch.equal(batch.index, batch.mask.flatten().nonzero()[:, 0])
    assert batch.targets == sum(map(sum, (e.mask for e in EXAMPLES))) == batch.mask.sum()


def test_rows_start_at_column_0_and_are_padded_on_the_right_to_a_multiple_of_8():
    batch = collate(EXAMPLES, pad_id=63)
    assert batch.ids.shape == (3, 16) and batch.mask.shape == (3, 15)
    assert batch.lengths.tolist() == [3, 9, 2]
    for row, example in enumerate(EXAMPLES):
        assert batch.ids[row].tolist() == example.ids + [63] * (16 - len(example.ids))
    assert collate([Example([1] * 8, [True] * 8)]).ids.shape == (1, 8)


def test_a_first_token_is_never_a_target_because_nothing_predicts_it():
    assert collate([Example([4, 5], [True, True])]).index.tolist() == [0]


@torch.no_grad()
def test_what_the_padding_holds_does_not_matter(tiny):
    model = tiny(64)
    for pad in (0, 63):
        batch = collate(EXAMPLES, pad_id=pad)
        logprobs = model.logprobs(model(batch.ids), batch.ids, batch.index)
        for row, example in enumerate(EXAMPLES):
            alone = torch.tensor([example.ids])
            index = torch.tensor(example.mask[1:]).nonzero()[:, 0]
            expected = model.logprobs(model(alone), alone, index)
            torch.testing.assert_close(logprobs[row, : len(example.ids) - 1], expected[0])
        assert (logprobs[~batch.mask] == 0).all()


# --------------------------------------------------------------------------------------------------------- batches

LENGTHS = torch.randint(1, 100, (53,), generator=torch.Generator().manual_seed(1)).tolist()


def epochs(n, batch_size=8, **options):
    """The first n epochs: a list of batches each. 53 rows in batches of 8 are 7 batches, the last one of 5."""
    stream = batches(LENGTHS, batch_size, **options)
    return [list(islice(stream, -(-len(LENGTHS) // batch_size))) for _ in range(n)]


def test_every_row_comes_once_an_epoch_and_a_last_smaller_batch_is_kept():
    for epoch in epochs(3):
        assert sorted(row for batch in epoch for row in batch) == list(range(53))
        assert sorted(len(batch) for batch in epoch) == [5] + [8] * 6


def test_every_row_comes_once_an_epoch_with_several_windows():
    for epoch in epochs(3, window=2):
        assert sorted(row for batch in epoch for row in batch) == list(range(53))


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = epochs(2, seed=3)
    torch.manual_seed(2)
    assert epochs(2, seed=3) == first
    assert epochs(2, seed=4) != first
    assert first[0] != first[1]


def test_rows_of_like_length_are_together_within_a_window():
    [epoch] = epochs(1)  # all rows in one window: the batches, in some order, cut the sorted lengths
    groups = sorted(sorted(LENGTHS[row] for row in batch) for batch in epoch)
    assert sum(groups, []) == sorted(LENGTHS)


def test_short_and_long_batches_come_mixed():
    means = [[sum(LENGTHS[row] for row in batch) / len(batch) for batch in epoch] for epoch in epochs(5)]
    assert all(epoch != sorted(epoch) and epoch != sorted(epoch, reverse=True) for epoch in means)


def test_rows_are_grouped_anew_every_epoch():
    first, second = ({frozenset(batch) for batch in epoch} for epoch in epochs(2, window=2))
    assert first != second


def test_a_resumed_run_finds_its_place_by_counting():
    whole = list(islice(batches(LENGTHS, 8, seed=5), 30))
    assert list(islice(batches(LENGTHS, 8, seed=5), 11, 30)) == whole[11:]


@pytest.mark.parametrize("size, expected", [
    (2, [[1, 2], [3, 4], [5]]), (5, [[1, 2, 3, 4, 5]]), (9, [[1, 2, 3, 4, 5]]), (0, [[1, 2, 3, 4, 5]])])
def test_split_cuts_consecutive_parts_of_at_most_size(size, expected):
    assert split([1, 2, 3, 4, 5], size) == expected
