"""Records, examples and batches: every shape, every mistake with its file and line, and the alignment of the mask."""

import json
import math
from itertools import islice

import pytest
import torch

from nanopost.config import UserError
from nanopost.data import (
    PAD_TO,
    Batch,
    Example,
    Pair,
    batches,
    collate,
    in_length_order,
    length_order,
    load_examples,
    load_pairs,
    load_prompts,
    map_batches,
    map_pairs,
    micro_batches,
)
from nanopost.records import parse_records, read_records, require, with_prompt


def targets(example):
    return [i for i, target in zip(example.ids, example.mask, strict=True) if target]


def turns(*texts):
    """user, assistant, user, ... in turn"""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# ------------------------------------------------------------------------------------------------- shapes of records


def test_prompt_and_completion_are_one_turn_each(tokenizer, lines):
    t = tokenizer
    [example] = load_examples(lines([{"prompt": "ask", "completion": "the answer", "id": 7}]), t)
    assert example.ids == [t.user, *t.encode("ask"), t.assistant, *t.encode("the answer"), t.end]
    assert targets(example) == t.encode("the answer") + [t.end]


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
    assert targets(as_prompt) == t.encode("later") + [t.end]
    assert targets(as_messages) == t.encode("hello") + [t.end] + t.encode("later") + [t.end]


def test_a_completion_of_several_turns_has_its_answers_as_targets(tokenizer, lines):
    t = tokenizer
    completion = [{"role": "assistant", "content": "one"}, *turns("more", "two")]
    [example] = load_examples(lines([{"prompt": "count", "completion": completion}]), t)
    assert targets(example) == t.encode("one") + [t.end] + t.encode("two") + [t.end]


def test_every_token_of_a_text_is_a_target(tokenizer, lines):
    [example] = load_examples(lines([{"text": "the moon"}]), tokenizer)
    assert (example.ids, example.mask) == tokenizer.document("the moon")


def test_pairs_share_the_prompt_and_have_their_own_answers_as_targets(tokenizer, lines):
    t = tokenizer
    prompt = [{"role": "system", "content": "s"}, *turns("ask")]
    rejected = [{"role": "assistant", "content": "no"}]
    [pair] = load_pairs(lines([{"prompt": prompt, "chosen": "yes", "rejected": rejected}]), t)
    ids = [t.system, *t.encode("s"), t.user, *t.encode("ask"), t.assistant]
    for side, text in ((pair.chosen, "yes"), (pair.rejected, "no")):
        assert side.ids == ids + t.encode(text) + [t.end]
        assert targets(side) == t.encode(text) + [t.end]


def test_a_pair_may_have_its_prompt_inside_both_conversations(tokenizer, lines):
    apart = {"prompt": turns("a", "b", "c"), "chosen": "yes", "rejected": "no"}
    inside = {"chosen": turns("a", "b", "c", "yes"), "rejected": turns("a", "b", "c", "no")}
    first, second = load_pairs(lines([apart, inside]), tokenizer)
    assert first == second


def test_prompts_end_with_the_assistant_token_and_come_back_as_they_stand(tokenizer, lines):
    t = tokenizer
    records = [{"prompt": "ask"}, {"prompt": turns("a", "b", "c"), "gold": 1}]
    prompts, ids = load_prompts(lines(records), t, 100)
    assert prompts == [record["prompt"] for record in records]
    assert ids == [[t.user, *t.encode("ask"), t.assistant], t.prompt(turns("a", "b", "c"))]


def test_blank_lines_are_skipped_and_a_limit_stops_reading(tokenizer, lines):
    path = lines(["", '{"text": "a"}', "   ", '{"text": "b"}', '{"text": "c"}', "not JSON"])
    assert [targets(example)[:-1] for example in load_examples(path, tokenizer, limit=2)] == [[97], [98]]


# -------------------------------------------------------------------------------------------------- broken records

GOOD = {
    "sft": {"prompt": "a", "completion": "b"},
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "prompts": {"prompt": "a"},
}


def load(kind, path, tokenizer, longest=100):
    return {"sft": load_examples, "pairs": load_pairs, "prompts": load_prompts}[kind](path, tokenizer, longest)


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
    ("prompts", '{"prompt": ' + "9" * 5000 + "}", "a number of thousands of digits"),
    ("prompts", '{"prompt": ' + "[" * 10**5, "hundreds of brackets"),
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
    ("sft", {"messages": turns("a", "")}, "messages: an assistant.s turn is empty"),
    ("sft", {"messages": turns("a")[0]}, "must be a string or a list"),
    ("sft", {"messages": "hello"}, "messages must be a list of messages, not a string"),
    ("sft", {"text": ""}, "text must be a non-empty string"),
    ("sft", {"text": ["x"]}, "text must be a non-empty string"),
    ("pairs", {"prompt": "x", "chosen": "a"}, "rejected is missing"),
    ("pairs", {"prompt": "x", "rejected": "a"}, "chosen is missing"),
    ("pairs", {"prompt": "x", "chosen": "", "rejected": "b"}, "chosen is empty"),
    ("pairs", {"prompt": "x", "chosen": "a", "rejected": "  "}, "rejected is empty"),
    ("pairs", {"prompt": "x", "chosen": "a", "rejected": turns("b")}, "must begin and end with a turn of the assist"),
    ("pairs", {"chosen": "a", "rejected": "b"}, "prompt is missing; only chosen and rejected that are conversations"),
    (
        "pairs",
        {"chosen": turns("a", "b"), "rejected": "b"},
        "prompt is missing; only chosen and rejected that are conv",
    ),
    ("pairs", {"chosen": turns("a", "b"), "rejected": turns("c", "d")}, "do not share all but their last turns"),
    ("pairs", {"chosen": turns("a")[:1], "rejected": turns("b")[:1]}, "do not share all but their last turns"),
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
    with pytest.raises(UserError, match=r"no file .*nowhere\.jsonl"):
        load(kind, "nowhere.jsonl", tokenizer)
    with pytest.raises(UserError, match=r"empty\.jsonl: no "):
        load(kind, lines([], "empty.jsonl"), tokenizer)
    with pytest.raises(UserError, match=r"small\.jsonl: no \w+; 3 are longer than 2 tokens"):
        load(kind, lines([GOOD[kind]] * 3, "small.jsonl"), tokenizer, 2)


def test_a_missing_file_of_the_embedded_data_comes_with_the_command_that_writes_it(tokenizer):
    with pytest.raises(UserError, match=r"prepare\.py"):
        load_examples("data/notes/no_such_file.jsonl", tokenizer)


def test_an_empty_path_means_no_records(tokenizer):
    assert load_examples("", tokenizer, 32) == load_pairs("", tokenizer, 32) == []
    assert load_prompts("", tokenizer, 32) == ([], [])


def test_a_limit_counts_what_is_kept(tokenizer, lines):
    path = lines([GOOD["sft"], {"prompt": "a", "completion": "x" * 60}, GOOD["sft"], GOOD["sft"]])
    assert len(load_examples(path, tokenizer, 32, limit=2)) == 2


def test_prompts_need_a_context_with_room_for_them(tokenizer, lines):
    with pytest.raises(UserError, match="lower --max-new-tokens"):
        load_prompts(lines([{"prompt": "a"}]), tokenizer, 0)


def test_dropped_records_are_counted_in_the_printed_line(tokenizer, lines, capsys):
    long = "x" * 60
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": long},
        {"prompt": long, "completion": "b"},
        {"messages": turns("only a question")},
    ]
    assert len(load_examples(lines(records, "sft.jsonl"), tokenizer, 32)) == 1
    dropped = "sft.jsonl: 1 examples, dropped 2 longer than 32 tokens, dropped 1 without a target\n"
    assert capsys.readouterr().out.endswith(dropped)

    records = [{"prompt": "a", "chosen": "b", "rejected": side} for side in ("c", "c", "c", "b", long)]
    assert len(load_pairs(lines(records, "pairs.jsonl"), tokenizer, 32)) == 3
    out = capsys.readouterr().out
    assert "3 pairs" in out and "dropped 1 with two equal sides" in out and "dropped 1 longer than 32 tokens" in out

    prompts, ids = load_prompts(lines([{"prompt": "a"}, {"prompt": long}], "prompts.jsonl"), tokenizer, 32)
    assert prompts == ["a"] and len(ids) == 1
    assert "1 prompts, dropped 1 longer than 32 tokens" in capsys.readouterr().out


def test_a_record_exactly_as_long_as_the_context_is_kept(tokenizer, lines):
    path = lines([{"prompt": "aaaa", "completion": "bbbb"}])  # 1 + 4 + 1 + 4 + 1 tokens
    assert len(load_examples(path, tokenizer, 11)[0]) == 11
    with pytest.raises(UserError, match="longer than 10 tokens"):
        load_examples(path, tokenizer, 10)


# ------------------------------------------------------------------------------------------- records by themselves


def test_records_come_with_their_file_and_line(lines):
    path = lines(['{"a": 1}', "", '{"b": 2}'])
    expected = [(f"{path}:1", {"a": 1}), (f"{path}:3", {"b": 2})]
    assert list(read_records(path)) == expected
    with open(path, "rb") as f:
        assert list(parse_records(path, f)) == expected
    assert list(parse_records("unpacked", [b'{"a": "caf\xc3\xa9"}'])) == [("unpacked:1", {"a": "café"})]


def test_with_prompt_takes_the_shared_turns_out_and_leaves_a_pair_with_a_prompt_alone():
    talk = turns("a", "b", "c")
    yes, no = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    pair = with_prompt("file:1", {"chosen": [*talk, yes], "rejected": [*talk, no]})
    assert pair == {"prompt": talk, "chosen": [yes], "rejected": [no]}
    assert with_prompt("file:1", pair) is pair


def test_require_names_the_missing_key_and_all_that_are_needed():
    require("file:1", {"a": 0, "b": None}, "a", "b")
    with pytest.raises(UserError, match="file:1: needs a, b; b is missing"):
        require("file:1", {"a": 0}, "a", "b")


# --------------------------------------------------------------------------------------------------- examples, pairs

EXAMPLES = [
    Example([5, 6, 7], [False, False, True]),
    Example([1, 2, 3, 4, 5, 6, 7, 8, 9], [False, True] * 4 + [True]),
    Example([3, 4], [False, True]),
]


def random_examples(n, longest=40, seed=0):
    """n examples of 2 to `longest` tokens, a prompt and an answer each. Their first token is their number."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n,), generator=generator).tolist()
    prompts = [int(torch.randint(1, length, (), generator=generator)) for length in lengths]
    return [
        Example([i] + [7] * (length - 1), [False] * prompt + [True] * (length - prompt))
        for i, (length, prompt) in enumerate(zip(lengths, prompts))
    ]


def test_an_example_is_its_prompt_and_its_response():
    example = Example([5, 6, 7, 8], [False, False, True, True])
    assert (example.prompt, example.response, len(example)) == ([5, 6], [7, 8], 4)
    talk = Example([1, 2, 3, 4, 5], [False, True, False, False, True])  # two answers: the prompt ends before the first
    assert (talk.prompt, talk.response) == ([1], [2, 3, 4, 5])


def test_a_pair_is_as_long_as_its_longer_side():
    assert len(Pair(EXAMPLES[0], EXAMPLES[1])) == len(Pair(EXAMPLES[1], EXAMPLES[0])) == 9


# --------------------------------------------------------------------------------------------------------- collate


def test_column_t_of_the_mask_is_about_the_token_in_column_t_plus_1():
    batch = collate(EXAMPLES)
    for row, example in enumerate(EXAMPLES):
        ids = [batch.ids[row, t + 1].item() for t in batch.mask[row].nonzero()[:, 0].tolist()]
        assert ids == targets(example)


def test_index_lists_the_flat_positions_of_the_mask_and_targets_counts_them():
    batch = collate(EXAMPLES)
    assert torch.equal(batch.index, batch.mask.flatten().nonzero()[:, 0])
    assert batch.targets == sum(sum(example.mask) for example in EXAMPLES) == batch.mask.sum()


def test_rows_start_at_column_0_and_are_padded_on_the_right_to_a_multiple_of_4():
    batch = collate(EXAMPLES, pad_id=63)
    assert len(batch) == 3 and batch.ids.shape == (3, 12) and batch.mask.shape == (3, 11)
    assert batch.lengths.tolist() == [3, 9, 2]
    for row, example in enumerate(EXAMPLES):
        assert batch.ids[row].tolist() == example.ids + [63] * (12 - len(example))
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
            torch.testing.assert_close(logprobs[row, : len(example) - 1], expected[0])
        assert (logprobs[~batch.mask] == 0).all()


# ----------------------------------------------------------------------------------------------------------- Batch


def full_batch(n=9, seed=0):
    """A batch with every field, whose numbers say where they stand: 100 times the row plus the column."""
    batch = collate(random_examples(n, seed=seed))
    place = 100.0 * torch.arange(n)[:, None] + torch.arange(batch.mask.shape[1])
    for name in ("logprobs", "values", "ref_logprobs", "advantages", "returns"):
        setattr(batch, name, place.masked_fill(~batch.mask, 0.0))
    batch.ended = torch.arange(n) % 2 == 0
    batch.scores = torch.arange(n).double()
    return batch


@pytest.mark.parametrize("rows", [[0], [8, 3], [2, 2, 5], list(range(9)), list(range(9))[::-1]])
def test_rows_cuts_the_padding_and_keeps_everything_aligned(rows):
    batch, examples = full_batch(), random_examples(9)
    part = batch.rows(torch.tensor(rows))
    longest = max(len(examples[i]) for i in rows)
    T = math.ceil(longest / PAD_TO) * PAD_TO
    assert part.ids.shape == (len(rows), T) and len(part) == len(rows)
    for row, i in enumerate(rows):
        length = len(examples[i])
        assert part.lengths[row] == length and part.scores[row] == i and part.ended[row] == (i % 2 == 0)
        assert part.ids[row, :length].tolist() == examples[i].ids
        assert part.mask[row].tolist() == examples[i].mask[1:] + [False] * (T - length)
        for name in ("logprobs", "values", "ref_logprobs", "advantages", "returns"):
            assert torch.equal(getattr(part, name)[row], getattr(batch, name)[i, : T - 1]), name
    # of what is not padding, nothing is lost
    assert part.targets == sum(sum(examples[i].mask[1:]) for i in rows)
    assert part.tensors().keys() == batch.tensors().keys()


def test_rows_never_adds_padding_to_a_batch_whose_width_is_no_multiple_of_4():
    """As the sampler returns it: as wide as its longest row."""
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    batch = Batch(torch.ones(2, 5, dtype=torch.long), mask, torch.tensor([5, 3]), logprobs=torch.ones(2, 4))
    for rows in ([0], [1], [0, 1]):
        part = batch.rows(torch.tensor(rows))
        T = 4 if rows == [1] else 5
        assert part.ids.shape == (len(rows), T) and part.mask.shape == part.logprobs.shape == (len(rows), T - 1)


def test_index_follows_the_mask_wherever_a_batch_comes_from():
    batch = full_batch()
    bare = Batch(batch.ids, batch.mask, batch.lengths)
    for x in (batch, bare, batch.to("cpu"), batch.rows(torch.tensor([1, 4])), batch.rows(torch.tensor([7]))):
        assert torch.equal(x.index, x.mask.flatten().nonzero()[:, 0]) and x.targets == x.mask.sum()
        assert torch.equal(x.mask.flatten()[x.index], torch.ones(x.targets, dtype=torch.bool))
    without = Batch(batch.ids, torch.zeros_like(batch.mask), batch.lengths)
    assert without.targets == 0


def test_to_takes_every_tensor_along():
    batch = full_batch()
    there = batch.to("meta")
    assert there.index.is_meta and there.index.shape == batch.index.shape
    assert there.tensors().keys() == batch.tensors().keys()
    for name, x in there.tensors().items():
        assert x.is_meta and x.shape == getattr(batch, name).shape and x.dtype == getattr(batch, name).dtype, name
    assert collate(EXAMPLES, "meta").ids.is_meta
    back = batch.to("cpu")
    assert all(torch.equal(x, getattr(back, name)) for name, x in batch.tensors().items())


def test_fields_that_are_not_given_stay_none():
    batch = collate(EXAMPLES)
    for x in (batch, batch.to("cpu"), batch.rows(torch.tensor([0]))):
        assert x.tensors().keys() == {"ids", "mask", "lengths"} and x.logprobs is None and x.ended is None


def test_responses_are_the_targets_without_the_end_token_of_those_that_ended():
    batch = collate([Example([1, 2, 8, 9], [False, False, True, True]), Example([1, 7, 6], [False, True, True])])
    batch.ended = torch.tensor([True, False])
    assert batch.responses() == [[8], [7, 6]]
    batch.ended = torch.tensor([False, True])
    assert batch.responses() == [[8, 9], [7]]


# --------------------------------------------------------------------------------------------------------- batches

ROWS = random_examples(53, longest=99, seed=1)
LENGTHS = [len(row) for row in ROWS]


def epochs(n, batch_size=8, **options):
    """The first n epochs: a list of batches each. 53 rows in batches of 8 are 7 batches, the last one of 5."""
    stream = batches(ROWS, batch_size, **options)
    return [list(islice(stream, math.ceil(len(ROWS) / batch_size))) for _ in range(n)]


def test_every_row_comes_once_per_epoch_and_a_last_smaller_batch_is_kept():
    for epoch in epochs(3):
        assert sorted(row for batch in epoch for row in batch) == list(range(53))
        assert sorted(len(batch) for batch in epoch) == [5] + [8] * 6


def test_every_row_comes_once_per_epoch_with_several_windows():
    for epoch in epochs(3, window=2):
        assert sorted(row for batch in epoch for row in batch) == list(range(53))


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = epochs(2, seed=3)
    torch.manual_seed(2)
    assert epochs(2, seed=3) == first
    assert epochs(2, seed=4) != first
    assert first[0] != first[1]


def test_rows_of_similar_length_are_together_within_a_window():
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
    whole = list(islice(batches(ROWS, 8, seed=5), 30))
    assert list(islice(batches(ROWS, 8, seed=5), 11, 30)) == whole[11:]


def test_anything_with_a_length_can_be_put_into_batches():
    """Examples, pairs, or the ids of prompts: only the lengths count."""
    lists = [[0] * length for length in LENGTHS]
    pairs = [Pair(EXAMPLES[2], row) for row in ROWS]
    orders = [list(islice(batches(rows, 8), 9)) for rows in (ROWS, lists, pairs)]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(
    "size, expected",
    [(2, [[1, 2], [3, 4], [5]]), (5, [[1, 2, 3, 4, 5]]), (9, [[1, 2, 3, 4, 5]]), (0, [[1, 2, 3, 4, 5]])],
)
def test_micro_batches_are_consecutive_parts_of_at_most_size(size, expected):
    assert micro_batches([1, 2, 3, 4, 5], size) == expected
    assert [part.tolist() for part in micro_batches(torch.arange(1, 6), size)] == expected
    assert micro_batches([], size) == []


# ------------------------------------------------------------------------------------- in order of length, and back


@pytest.mark.parametrize("size", [1, 3, 8, 53, 99, 0])
def test_in_length_order_every_row_comes_once_with_its_position_the_shortest_first(size):
    seen = []
    for positions, batch in in_length_order(ROWS, size, "cpu"):
        assert len(positions) == len(batch) <= (size or 53)
        assert batch.ids[:, 0].tolist() == positions  # an example begins with its number
        assert batch.lengths.tolist() == [LENGTHS[i] for i in positions]
        # no more padding than needed
        assert batch.ids.shape[1] == math.ceil(max(batch.lengths.tolist()) / PAD_TO) * PAD_TO
        seen += positions
    assert sorted(seen) == list(range(53)) and seen == length_order(ROWS)
    assert [LENGTHS[i] for i in seen] == sorted(LENGTHS)


@pytest.mark.parametrize("size", [1, 2, 7, 53, 99, 0])
@pytest.mark.parametrize("n", [1, 2, 9, 53])
def test_map_batches_gives_the_results_in_the_order_of_the_rows(size, n):
    rows = ROWS[:n]
    numbers = map_batches(lambda batch: batch.ids[:, 0], rows, size, "cpu")
    assert numbers.tolist() == list(range(n)) and numbers.dtype == torch.int64
    both = map_batches(lambda batch: torch.stack([batch.ids[:, 0], batch.lengths], dim=1).double(), rows, size, "cpu")
    assert both.shape == (n, 2) and both.dtype == torch.float64
    assert both[:, 1].tolist() == LENGTHS[:n]


def test_map_batches_lets_gradients_through():
    weight = torch.randn(60, dtype=torch.float64, requires_grad=True)  # a number for every token id
    map_batches(lambda batch: weight[batch.ids[:, 0]], ROWS, 8, "cpu")[7].backward()
    assert weight.grad.nonzero().tolist() == [[7]] and weight.grad[7] == 1


@pytest.mark.parametrize("size", [0, 5, 200])
def test_map_pairs_gives_both_sides_in_the_order_of_the_pairs(size):
    pairs = [Pair(a, b) for a, b in zip(ROWS, ROWS[::-1])]
    chosen, rejected = map_pairs(lambda batch: batch.ids[:, 0], pairs, size, "cpu")
    assert chosen.tolist() == list(range(53)) and rejected.tolist() == list(range(52, -1, -1))


def test_map_pairs_takes_the_shorter_sides_and_then_the_longer_ones():
    batches = []
    pairs = [Pair(a, b) for a, b in zip(ROWS[:26], ROWS[26:52])]
    map_pairs(lambda batch: batches.append(batch) or batch.lengths, pairs, 0, "cpu")
    assert [len(batch) for batch in batches] == [26, 26]
    assert batches[0].lengths.tolist() + batches[1].lengths.tolist() == sorted(LENGTHS[:52])
    assert batches[0].ids.shape[1] < batches[1].ids.shape[1]


def test_map_pairs_of_no_pairs_is_two_empty_sides():
    chosen, rejected = map_pairs(lambda batch: batch.lengths, [], 4, "cpu")
    assert len(chosen) == len(rejected) == 0


def test_map_batches_of_no_rows_is_empty():
    assert len(map_batches(lambda batch: batch.lengths, [], 4, "cpu")) == 0
