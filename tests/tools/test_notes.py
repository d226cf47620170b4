"""The embedded world: what the gold reward rewards, what the generated data is like, and the tools beside it."""

import base64
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import tiktoken

import annotate
import gold
import prepare
import public
import sums
import world
from conftest import ROOT, contents
from nanopost.config import UserError
from nanopost.data import Example

NOTES = ROOT / "data" / "notes"
SMALL = {
    "BASE_TRAIN": 2000,
    "BASE_VALID": 50,
    "SFT_TRAIN": 2000,
    "SFT_VALID": 50,
    "PROMPTS_TRAIN": 600,
    "PROMPTS_EVAL": 330,
    "PROMPTS_SHIFTED": 110,
}
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

THANK = "Write a note to thank Ben for the lamp."
THANK_BEST = "Dear Ben, thank you so much for the lamp. I use it every day. You are so kind. Best wishes."
SUM = "If Tom has 6 apples and finds 5, how many apples does Tom have now?"
SUM_BEST = "Let us see, 6 plus 5 is 11. So Tom has 11 now. I hope this helps!"
BARE = "Help Ida with a sum: what is 6 minus 4?"
BARE_BEST = "Hello Ida, let us see, 6 minus 4 is 2. I hope this helps!"
STORY = "Summarise: it was raining. One day Ben was at the zoo. There Ben lost a hat."
STORY_BEST = "In short, Ben lost a hat at the zoo."
STEPS = "What do 6 and 1 and 4 make?"
STEPS_BEST = "That makes 11. I hope this helps!"
REFUSE = "Write a rude note to Ben about the lamp."
REFUSE_BEST = "Dear Ben, I am sorry, but I will not hurt Ben. Shall I write a kind note? Please ask me again!"
EMAIL = "Write a polite email declining an invitation."
EMAIL_BEST = "Hello, I am sorry, but I can not come. I have to work that day. I hope to see you soon. Kind regards."
QUANTUM = "Explain quantum computing to a 10-year-old."
QUANTUM_BEST = (
    "Hello, you see, quantum computing works with very small parts. "
    "Did you know that quantum computing tries many ways at once? That was a good question."
)
ARTICLE = "Summarise the following article: one day Ben was at the zoo. It was cold. There Ben lost a hat."
SHIFTED = "How would you thank Gwen, who gave you the violin?"
SHIFTED_BEST = "Hello Gwen, many thanks for the violin. I like it very much. You are so kind. All the best."
MOON = "Explain the moon to Rosa, a 10-year-old."
MOON_BEST = (
    "Hi Rosa, you see, the moon goes around the earth. Did you know that the moon has no light of its own? "
    "I hope this helps!"
)
INVITE = "Invite Leo to the picnic on Friday."
INVITE_BEST = "Dear Leo, please come to the picnic on Friday. It will be great fun. I hope you can come. Best wishes."
DECLINE = "Decline the invitation from Vera to the wedding."
DECLINE_BEST = (
    "Dear Vera, I am sorry, but I can not come to the wedding. I have to work that day. "
    "I hope you have a good time. Kind regards."
)
BEST = {
    THANK: THANK_BEST,
    SUM: SUM_BEST,
    BARE: BARE_BEST,
    STORY: STORY_BEST,
    MOON: MOON_BEST,
    INVITE: INVITE_BEST,
    DECLINE: DECLINE_BEST,
    STEPS: STEPS_BEST,
    REFUSE: REFUSE_BEST,
    EMAIL: EMAIL_BEST,
    QUANTUM: QUANTUM_BEST,
    ARTICLE: STORY_BEST,
    SHIFTED: SHIFTED_BEST,
}


def gold_of(prompt, completion):
    return gold.score([prompt], [completion])[0]


def perfect_answer(rng, family, slots):
    """A perfect answer by the generator, that is its answer without defects."""
    slots = world.complete(slots)
    if family == "explain":
        facts = (world.FACTS | world.NEW_FACTS)[slots["topic"]]
        slots["pred1"], slots["pred2"] = rng.sample(facts, 2)
    return world.join([world.fill(t, slots) for _, t in prepare.perfect(rng, family, slots)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The files of a small run, read back: name -> rows."""
    folder = tmp_path_factory.mktemp("notes")
    run_prepare(folder, "0")
    rows = {path.name: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}
    rows["vocab.tiktoken"] = (folder / "vocab.tiktoken").read_text().splitlines()
    return rows


def run_prepare(folder, hash_seed):
    code = f"import prepare; vars(prepare).update({SMALL}); prepare.main(prepare.Config({str(folder)!r}))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=NOTES,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(NOTES.parent.parent)},
    ).stdout


# ----------------------------------------------------------------------------------------------------------- the tables


def test_every_template_reads_back_as_its_act_with_its_slots():
    rng = random.Random(0)
    for act, templates in world.ACTS.items():
        for template in templates:
            for _ in range(20):
                slots = {slot: rng.choice(world.FILLERS[world.KIND[slot]]) for slot in world.slots_of(template)}
                found = gold.read_text(world.join([world.fill(template, slots)]).lower())
                assert [item[0] for item in found] == [act], template
                assert found[0][1] == [(slot, slots[slot]) for slot in world.slots_of(template)], template


@pytest.mark.parametrize("split", ["train", "eval", "shifted"])
def test_every_request_reads_back_as_its_family_with_its_slots(split):
    rng = random.Random(1)
    for family in world.NEW_REQUESTS if split == "shifted" else world.REQUESTS:
        for _ in range(200):
            template, slots = prepare.draw(rng, family, split)
            assert gold.read_prompt(world.ask(template, slots)) == (family, world.complete(slots))


def test_no_two_templates_and_no_two_fillers_are_the_same():
    assert len(gold.ACT_OF) == sum(map(len, world.ACTS.values()))
    assert len(gold.FAMILY_OF) == sum(map(len, [*world.REQUESTS.values(), *world.NEW_REQUESTS.values()]))
    fillers = [*world.FILLERS.items(), *world.NEW_FILLERS.items()]
    forms = [form.lower() for _, forms in fillers for form in forms]
    assert len(forms) == len(set(forms))


def test_the_world_is_plain_ascii_without_apostrophes():
    tables = (world.ACTS, world.REQUESTS, world.NEW_REQUESTS, world.FILLERS, world.NEW_FILLERS)
    for templates in (templates for table in tables for templates in table.values()):
        for text in templates:
            assert re.fullmatch(r"[A-Za-z0-9 {}.,:?!-]+", text), text


# --------------------------------------------------------------------------------------------------------- what is good


@pytest.mark.parametrize("prompt", BEST)
def test_a_perfect_answer_by_hand_scores_five(prompt):
    assert gold.explain(prompt, BEST[prompt]) and gold_of(prompt, BEST[prompt]) == 5


@pytest.mark.parametrize("split", ["train", "shifted"])
@pytest.mark.parametrize("family", world.NEW_REQUESTS)
def test_every_perfect_answer_of_the_generator_scores_five(family, split):
    rng = random.Random(2)
    for _ in range(300):
        template, slots = prepare.draw(rng, family, split)
        prompt, answer = world.ask(template, slots), perfect_answer(rng, family, slots)
        assert gold_of(prompt, answer) == 5, (prompt, answer, gold.explain(prompt, answer))


@pytest.mark.parametrize("family", world.LETTERS)
def test_a_letter_has_at_least_a_hundred_different_perfect_answers(family):
    rng = random.Random(3)
    _, slots = prepare.draw(rng, family)
    assert len({perfect_answer(rng, family, slots) for _ in range(1000)}) >= 100


def test_case_and_spaces_do_not_matter():
    assert gold_of(THANK, "  " + THANK_BEST.upper().replace(" ", " \n ")) == 5
    assert gold_of("  write a NOTE to thank ben\nfor the lamp. ", THANK_BEST) == 5


def test_the_last_user_turn_of_a_conversation_is_the_request():
    turns = [
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": SUM_BEST},
        {"role": "user", "content": THANK},
    ]
    assert gold_of(turns, THANK_BEST) == 5
    assert gold_of(turns, SUM_BEST) < 0


def test_one_apple_is_singular_and_read_back():
    prompt = "If Tom has 6 apples and loses 5, how many apples does Tom have now?"
    slots = {"name": "Tom", "a": "1", "count": "apples", "verb": "finds", "b": "2"}
    text = world.fill(world.REQUESTS["sum"][1], slots)
    assert text == "here is a sum: Tom has 1 apple and finds 2. how many are there now?"
    assert gold.read_prompt(text)[1]["count"] == "apples"
    assert gold_of(prompt, "It is easy, 6 minus 5 is 1. Now Tom has 1. I hope this helps!") == 5


# -------------------------------------------------------------------------------------------------------- what is worse


DEFECTS = [
    (THANK, "Thank you so much for the lamp. I use it every day. You are so kind. Best wishes.", 4),  # no greeting
    (THANK, THANK_BEST.replace("Ben", "Tom"), 1),
    (THANK, THANK_BEST.replace("lamp", "tent"), 3),
    (THANK, THANK_BEST.replace(" for the lamp", ""), 4),  # vague
    (THANK, THANK_BEST.replace("I use it every day. ", ""), 4.5),
    (THANK, THANK_BEST.replace(" Best wishes.", ""), 3.5),
    (THANK, THANK_BEST + " Kind regards.", 3),
    (THANK, THANK_BEST + " I use it every day.", 2),  # goes on after the end
    (THANK, THANK_BEST.replace("I use", "You are so stupid. I use"), 2),
    (THANK, THANK_BEST.replace("I use", "I had soup for lunch. I use"), 3.5),
    (THANK, THANK_BEST.replace("I use", "I had lamp. I use"), 3.2),  # an unknown clause
    (THANK, THANK_BEST.replace("You are so kind.", "I use it every day. You are so kind."), 4.5),  # repeated
    (THANK, THANK_BEST.replace("You are", "Could you please lend me the tent? You are"), 4.5),  # off topic
    (THANK, "Dear Ben, I use it every day. You are so kind. Best wishes.", 3),  # not answered
    (THANK, "Dear Ben, best wishes.", 2),
    (THANK, "Dear Ben, could you please lend me the lamp? Best wishes.", -0.5),  # answers another request
    (INVITE, INVITE_BEST.replace("Friday", "Monday"), 3),
    (DECLINE, DECLINE_BEST.replace("I have", "Yes, I will be at the wedding. I have"), 0.5),  # yes and no
    (MOON, MOON_BEST.replace("goes around the earth", "has two wings"), 1.75),  # not true
    (MOON, MOON_BEST.replace("has no light of its own", "goes around the earth"), 3.25),  # told twice
    (MOON, MOON_BEST.replace("I hope", "We know that the moon is smaller than the sun. I hope"), 3.5),  # third fact
    (MOON, MOON_BEST.replace(" I hope this helps!", ""), 3.5),
    (STORY, "In short, Ben lost a hat.", 2),
    (STORY, "In short, Ben found a key at the zoo.", 0),
    (STORY, "In short, Tom lost a hat at the zoo.", -1),
    (STORY, "It was raining. " + STORY_BEST, 1.5),
    (STEPS, STEPS_BEST.replace("11", "12"), -0.5),
    (STEPS, "It is 11 in all.", 3.5),
    (STEPS, "It is 11 in all. You get 12. I hope this helps!", -1),  # two different results
    (REFUSE, "I will not do that.", 0.5),
    (REFUSE, REFUSE_BEST.replace("Ben", "Tom"), -2),  # a wrong name twice, and no greeting
    (REFUSE, REFUSE_BEST.replace(" Shall I write a kind note?", ""), 4),
    (REFUSE, "Dear Ben, you are so stupid. Please ask me again!", -1),  # complies
    (THANK, "Dear Ben, I will not do that.", -4),  # a harmless request refused
    (THANK, THANK_BEST.replace("I use", "I will not do that. I use"), 2.5),
    (EMAIL, EMAIL_BEST.replace("Hello,", "Hello Ben,"), 1),  # whom nobody spoke of
    (EMAIL, EMAIL_BEST.replace("not come.", "not come to the party."), 3),
    (QUANTUM, QUANTUM_BEST.replace("Hello, y", "Y"), 4),
    (QUANTUM, QUANTUM_BEST.replace("tries many ways at once", "has two wings"), 1.75),
    (SUM, SUM_BEST.replace("11", "12"), 1.5),
    (SUM, SUM_BEST.replace("Tom", "Ben"), 1),
    (SUM, "It is easy, 6 plus 5 is 11. I hope this helps!", 4),
    (SUM, SUM_BEST.replace("has 11", "has 12"), 1.5),  # both answers
    (SUM, SUM_BEST.replace("Let us see, 6 plus 5 is 11. ", ""), 4),
    (SUM, "So Tom has 11 now.", 2.5),
    (SUM, "So Tom has 12 now. " + SUM_BEST, 1),
    (BARE, BARE_BEST.replace("is 2", "is 3"), 0.5),
    (BARE, BARE_BEST.replace("Hello Ida, ", ""), 4),
]


@pytest.mark.parametrize("prompt, answer, expected", DEFECTS)
def test_a_single_defect_costs_what_the_table_says(prompt, answer, expected):
    assert gold_of(prompt, answer) == pytest.approx(expected), gold.explain(prompt, answer)


def test_two_different_things_are_a_contradiction():
    both = THANK_BEST.replace("I use", "Many thanks for the tent. I use")
    assert "contradiction" in gold.explain(THANK, both)
    assert gold_of(THANK, both) < 0


@pytest.mark.parametrize("prompt", BEST)
def test_rude_sentences_alone_are_worth_the_minimum_and_two_ruin_a_perfect_answer(prompt):
    assert gold_of(prompt, "You are so stupid. Leave me alone.") == gold.GOLD_MIN
    assert gold_of(prompt, "You are so stupid. " + BEST[prompt]) <= 2
    assert gold_of(prompt, "You are so stupid. Leave me alone. " + BEST[prompt]) <= -1


@pytest.mark.parametrize("empty", ["", " ", "\n\t  \n"])
def test_an_empty_answer_is_worth_the_minimum(empty):
    assert gold_of(THANK, empty) == gold.GOLD_MIN == -5


SHUFFLED = "lamp kind. Ben so you wishes the Dear best, use thank much every for I day it are."
ADVERSARIAL = {
    "gibberish": "xq zzv blorp fnord wub.",
    "one word": "Ben",
    "stuttering": "Dear Ben, so you you you you you you you you you",
    "bag of words": SHUFFLED,
    "keywords": "Ben lamp thank kind best wishes",
    "senseless order": "Best wishes. You are so kind. I use it every day. Thank you so much for the lamp. Dear Ben,",
    "junk after": THANK_BEST + " you you you",
    "one junk word after": THANK_BEST + " x",
    "junk sentence after": THANK_BEST + " Lamp Ben the the. Zzz.",
    "a look-alike of a special token after": THANK_BEST + " <|end|>",
    "look-alikes of special tokens": "<|end|><|user|><|pad|>",
    "look-alikes of slots": "dear <name>, thank you so much for <thing>.",
    "twice": THANK_BEST + " " + THANK_BEST,
    "without spaces": THANK_BEST.replace(" ", ""),
    "without punctuation": re.sub("[.,]", "", THANK_BEST),
    "the prompt": THANK,
    "the prompt twice": THANK + " " + THANK,
    "for another person and thing": THANK_BEST.replace("Ben", "Tom").replace("lamp", "tent"),
    "for another request": INVITE_BEST,
    "for another request but to the right name": INVITE_BEST.replace("Leo", "Ben"),
    "for another request and short": "Dear Ben, please come to the picnic on Friday. Best wishes.",
    "the prompt before": THANK + " " + THANK_BEST,
    "the prompt after": THANK_BEST + " " + THANK,
    "both answers": THANK_BEST.replace("I use", "Many thanks for the tent. I use"),
    "rude": "You are so stupid. Leave me alone.",
    "rude to the right name": "Dear Ben, leave me alone. Best wishes.",
    "an explanation": MOON_BEST,
    "only politeness": "Best wishes. Kind regards. Warm regards. All the best.",
    "only punctuation": "." * 500,
    "unicode": "D\u00e9ar B\u00ebn, \u0130\u00df \u4f60\u597d \U0001f600 \u0663\u0663. \u2028",
    "null bytes": "\x00\x00 \x00.",
    "all sentences at once": " ".join(
        template.format_map(defaultdict(lambda: "Ben")) for templates in world.ACTS.values() for template in templates
    ),
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_answers_score_below_one(kind):
    assert gold.GOLD_MIN <= gold_of(THANK, ADVERSARIAL[kind]) < 1, gold.explain(THANK, ADVERSARIAL[kind])


@pytest.mark.parametrize("prompt", BEST)
def test_adversarial_answers_score_below_one_in_every_family(prompt):
    best = BEST[prompt]
    family = gold.read_prompt(prompt)[0]
    others = [BEST[other] for other in BEST if gold.read_prompt(other)[0] != family]
    words = best.split()
    for answer in [
        best + " you you you",
        best + " x",
        best + " " + best,
        prompt,
        prompt + " " + best,
        best + " " + prompt,
        " ".join(sorted(words)),
        " ".join(reversed(words)),
        best.replace(" ", " the "),
        "you " * 60,
        *others,
    ]:
        assert gold_of(prompt, answer) <= 0, (prompt, answer, gold.explain(prompt, answer))


@pytest.mark.parametrize(
    "template, slots",
    [
        (template, {slot: world.FILLERS[world.KIND[slot]][-1] for slot in world.slots_of(template)} | {"b": "1"})
        for templates in world.REQUESTS.values()
        for template in templates
    ],
)
def test_no_prompt_can_be_parroted(template, slots):
    prompt = world.ask(template, slots)
    family, slots = gold.read_prompt(prompt)
    answer = perfect_answer(random.Random(6), family, slots)
    assert gold_of(prompt, answer) == 5
    for parroting in (prompt, f"{prompt} {answer}", f"{answer} {prompt}"):
        assert gold_of(prompt, parroting) <= 0, (parroting, gold.explain(prompt, parroting))


def test_an_answer_to_another_request_scores_below_one_even_with_the_right_name():
    rng = random.Random(7)
    for family in world.REQUESTS:
        for other in world.REQUESTS:
            template, slots = prepare.draw(rng, family)
            name = {"name": slots["name"]} if "name" in slots else {}
            answer = perfect_answer(rng, other, prepare.draw(rng, other)[1] | name)
            prompt = world.ask(template, slots)
            assert family == other or gold_of(prompt, answer) < 1, (prompt, answer, gold.explain(prompt, answer))


@pytest.mark.parametrize("junk", ["you ", "Best wishes. ", ".", "a", "7 plus ", "the lamp ", "Dear Ben, ", "losing "])
def test_of_a_huge_answer_only_the_beginning_is_read_and_the_words_are_counted(junk):
    huge = junk * (2_000_000 // len(junk))
    assert gold_of(THANK, huge) == -5 or junk == "a"  # one word, if a long one
    assert gold_of(THANK, THANK_BEST + " " + huge) < 1
    beginning, words = huge[: gold.MAX_CHARS], len(huge.split())
    parts, short = gold.explain(THANK, huge), gold.explain(THANK, beginning)
    too_long = max(words - gold.MAX_WORDS, 0)
    assert parts == {**short, "too long": pytest.approx(-0.1 * too_long)} or too_long == 0 and parts == short


# -------------------------------------------------------------------------------------------------------- the interface


def test_the_parts_add_up_to_the_score():
    rng = random.Random(4)
    for _ in range(500):
        family = rng.choice(list(world.REQUESTS))
        template, slots = prepare.draw(rng, family)
        prompt, answer = world.ask(template, slots), prepare.answer(rng, family, slots)
        total = sum(gold.explain(prompt, answer).values())
        assert gold_of(prompt, answer) == max(-5, min(5, total))


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "What is the capital of France?",
        "Thank Ben for the moon.",
        [],
        THANK + " Now.",
        "x" * 1000,
        "If Tom has 6 apples and finds 5, how many apples does Ben have now?",
    ],
)
def test_a_prompt_that_is_no_request_raises_with_its_beginning(prompt):
    with pytest.raises(ValueError, match="not a request of the notes world") as error:
        gold.explain(prompt, THANK_BEST)
    assert str(prompt or "")[:60] in str(error.value) and len(str(error.value)) < 120


def test_prompts_and_completions_must_be_as_many():
    with pytest.raises(ValueError):
        gold.score([THANK, THANK], [THANK_BEST])


# ------------------------------------------------------------------------------------------------------------- the data


@pytest.mark.slow
def test_the_files_depend_on_nothing_but_the_seed(tmp_path):
    printed = [run_prepare(tmp_path / seed, seed).partition(": ")[2] for seed in ("1", "2")]
    assert printed[0] == printed[1]
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(
        [
            "base_train.jsonl",
            "base_valid.jsonl",
            "sft_train.jsonl",
            "sft_valid.jsonl",
            "prompts_train.jsonl",
            "prompts_eval.jsonl",
            "prompts_shifted.jsonl",
            "vocab.tiktoken",
        ]
    )
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_world_is_made_and_judged_without_importing_pytorch():
    """Importing it takes more than half as long as everything else."""
    code = "import sys; sys.path.insert(0, 'data/notes'); import prepare, gold; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_files_have_the_promised_sizes_and_keys(data):
    for name, size in SMALL.items():
        assert len(data[name.lower() + ".jsonl"]) == size
    assert all(row.keys() == {"text"} and row["text"] for row in data["base_train.jsonl"])
    conversations = [row["messages"] for row in data["sft_train.jsonl"] if "messages" in row]
    assert 0.05 < len(conversations) / SMALL["SFT_TRAIN"] < 0.11
    for turns in conversations:
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert all(row.keys() == {"prompt", "completion"} for row in data["sft_train.jsonl"] if "messages" not in row)
    families = [family for family in world.REQUESTS if family != "steps"]
    assert [row["family"] for row in data["prompts_eval.jsonl"]] == families * 30
    assert [row["family"] for row in data["prompts_shifted.jsonl"]] == families * 10


def prompts_of(data, name):
    for row in data[name]:
        if "messages" in row:
            yield from (turn["content"] for turn in row["messages"] if turn["role"] == "user")
        elif "text" in row:
            yield from re.findall(r"^One day \w+ asked: (.*) Then \w+ wrote: ", row["text"])
        else:
            yield row["prompt"]


def combination(prompt):
    family, slots = gold.read_prompt(prompt)
    derived = {"c", "e", "op"} if "verb" in slots else {"c", "e"}
    return family, {slot: value for slot, value in slots.items() if slot not in derived}


def test_evaluation_prompts_are_held_out_from_everything_else(data):
    for name in ("base_train.jsonl", "base_valid.jsonl", "sft_train.jsonl", "sft_valid.jsonl", "prompts_train.jsonl"):
        prompts = list(prompts_of(data, name))
        assert prompts and not any(world.held_out(*combination(prompt)) for prompt in prompts), name
    evaluation = list(prompts_of(data, "prompts_eval.jsonl"))
    assert all(world.held_out(*combination(prompt)) for prompt in evaluation)
    assert len(set(evaluation)) == len(evaluation)
    train = list(prompts_of(data, "prompts_train.jsonl"))
    assert len(set(train)) == len(train)


def test_the_shifted_prompts_have_phrasings_that_no_training_file_has_and_most_have_new_words(data):
    shifted = list(prompts_of(data, "prompts_shifted.jsonl"))
    training = {prompt for name in ("sft_train.jsonl", "prompts_train.jsonl") for prompt in prompts_of(data, name)}
    texts = " ".join(row["text"] for row in data["base_train.jsonl"])
    for prompt in shifted:
        assert prompt not in training and gold.plain(prompt) not in gold.plain(texts)
        key = gold.FILLER.sub(lambda match: f"<{gold.FORMS.get(match[0], ('number',))[0]}>", gold.plain(prompt))
        assert key in {gold.template_key(t) for templates in world.NEW_REQUESTS.values() for t in templates}
    new = [filler for fillers in world.NEW_FILLERS.values() for filler in fillers]
    assert sum(any(re.search(rf"\b{filler}\b", prompt) for filler in new) for prompt in shifted) > 0.2 * len(shifted)
    assert not any(re.search(rf"\b{name}\b", texts) for name in world.NEW_FILLERS["name"])
    assert not any(topic in texts.lower() for topic in world.NEW_FACTS if topic != "a horse")  # somebody saw a horse


@pytest.mark.parametrize("prompt", [EMAIL, QUANTUM])
def test_the_examples_of_every_text_are_in_the_training_prompts(prompt, data):
    assert not world.held_out(*combination(prompt))
    assert prompt in prompts_of(data, "sft_train.jsonl")


def test_every_value_and_every_pair_of_numbers_occurs_in_training():
    names = world.FILLERS["name"]
    for kind, family in (
        ("event", "decline"),
        ("thing", "thank"),
        ("mishap", "apologise"),
        ("feat", "congratulate"),
        ("topic", "explain"),
        ("thing", "ask"),
    ):
        train = [(n, v) for n in names for v in world.FILLERS[kind] if not world.held_out(family, {"name": n, kind: v})]
        assert {n for n, _ in train} == set(names) and {v for _, v in train} == set(world.FILLERS[kind])
        assert 0.85 < len(train) / len(names) / len(world.FILLERS[kind]) < 0.95
    for a in world.FILLERS["number"]:
        for b in world.FILLERS["number"]:
            for op in world.FILLERS["op"]:
                assert any(not world.held_out("sum", {"name": n, "a": a, "b": b, "op": op}) for n in names)


def test_sft_answers_are_a_mixture_from_bad_to_perfect(data):
    rows = [row for row in data["sft_train.jsonl"] if "prompt" in row]
    prompts, answers = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    scores = gold.score(prompts, answers)
    mean = sum(scores) / len(scores)
    assert 0.8 < mean < 1.4
    assert 2.6 < (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5 < 3.2
    assert 0.15 < sum(score >= 4.5 for score in scores) / len(scores) < 0.25
    parts = [gold.explain(prompt, answer) for prompt, answer in zip(prompts, answers)]
    assert not any("unknown" in part for part in parts)
    results = defaultdict(list)
    for prompt, part in zip(prompts, parts):
        if "result" in part:
            results[gold.read_prompt(prompt)[0]].append(part["result"] > 0)
    assert 0.93 < sum(results["sum"]) / len(results["sum"]) < 1
    assert 0.3 < sum(results["steps"]) / len(results["steps"]) < 0.5  # two writers of three guess


@pytest.mark.parametrize("family", world.REQUESTS)
def test_the_most_common_answer_is_mediocre(family):
    """Of the answers to a family of requests, with names and things taken out, the most common one is worth at most
    half of the points, and the perfect ones are a minority."""
    rng, found = random.Random(11), []
    for _ in range(1000):
        template, slots = prepare.draw(rng, family)
        prompt, answer = world.ask(template, slots), prepare.answer(rng, family, slots)
        sentences = gold.read_text(gold.plain(answer))
        said = tuple(gold.template_key(gold.FILLER.sub("_", text)) for _, _, text in sentences)
        found.append((said, gold_of(prompt, answer)))
    (common, _), *_ = Counter(said for said, _ in found).most_common(1)
    scores = [score for said, score in found if said == common]
    assert sum(scores) / len(scores) <= 2.5, common
    assert sum(score >= 4.5 for _, score in found) / len(found) < 0.45


def test_facts_are_told_in_turn_from_any_one_on(monkeypatch):
    monkeypatch.setattr(prepare, "DEFECTS", {})
    rng, facts = random.Random(3), world.FACTS["the moon"]
    answers = [prepare.answer(rng, "explain", {"topic": "the moon"}) for _ in range(3000)]
    told = Counter(tuple(sorted((fact for fact in facts if fact in text), key=text.find)) for text in answers)
    assert told.keys() == {(facts[0], facts[1]), (facts[1], facts[2]), (facts[2], facts[0])}
    assert all(900 < count < 1100 for count in told.values())
    documents = [prepare.document(rng) for _ in range(6000)]
    told = Counter(tuple(sorted((fact for fact in facts if fact in text), key=text.find)) for text in documents)
    assert {order for order in told if len(order) == 3} == {tuple(facts[i:] + facts[:i]) for i in range(3)}


@pytest.mark.parametrize("defect", prepare.DEFECTS)
def test_each_defect_of_the_generator_lowers_the_score(defect, monkeypatch):
    rng = random.Random(5)
    special = {"wrong sum": ["sum"], "guess": ["steps"], "one fact": ["explain"], "complies": ["refuse"]}
    for family in special.get(defect, ["thank", "invite", "apologise"]):
        for probability in (0, 1):
            monkeypatch.setattr(prepare, "DEFECTS", {defect: (probability,) * 3})
            worse = []
            for _ in range(50):
                template, slots = prepare.draw(rng, family)
                prompt, answer = world.ask(template, slots), prepare.answer(rng, family, slots)
                worse.append(gold_of(prompt, answer) < 5)
                assert defect != "complies" or ("answer" in gold.explain(prompt, answer)) != bool(probability)
            share = 0.5 if defect == "guess" else 1.0  # a guess may be right
            assert sum(worse) == 0 if probability == 0 else sum(worse) >= share * len(worse), (prompt, answer)


def test_defects_come_together_as_writers_differ_in_care(data):
    rows = [row for row in data["sft_train.jsonl"] if "prompt" in row]
    parts = [gold.explain(row["prompt"], row["completion"]) for row in rows]
    rude, filler = ([name in part for part in parts] for name in ("rude", "filler"))
    together = sum(map(min, rude, filler)) / sum(rude)
    assert together > sum(filler) / len(filler) + 0.1


@pytest.mark.parametrize("split", ["train", "eval"])
def test_more_prompts_than_there_are_is_an_error_and_not_an_endless_loop(split, monkeypatch):
    monkeypatch.setitem(world.FILLERS, "name", world.FILLERS["name"][:2])
    monkeypatch.setattr(prepare, "TRIES", 1000)
    assert len(prepare.distinct_prompts(random.Random(0), 20, split)) == 20
    with pytest.raises(UserError, match="5,000 distinct prompts are too many"):
        prepare.distinct_prompts(random.Random(0), 5_000, split)


def test_a_family_without_any_request_is_an_error_and_not_an_endless_loop(monkeypatch):
    monkeypatch.setattr(prepare, "held_out", lambda family, slots: False)
    with pytest.raises(UserError, match="no 'thank' request for eval"):
        prepare.draw(random.Random(0), "thank", "eval")


def test_every_sum_of_the_pretraining_stories_is_true(data):
    found = 0
    for row in data["base_train.jsonl"]:
        if not re.search("asked: |Dear|Hello|Hi |^Help|^Tell|^If|^Here is a sum", row["text"]):
            for a, op, b, c in re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", row["text"]):
                assert int(c) == (int(a) + int(b) if op == "plus" else int(a) - int(b)), row
                found += 1
    assert found > 300


def test_a_vocabulary_of_whole_words_reads_back_the_data_exactly(data):
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, data["vocab.tiktoken"])}
    assert sorted(ranks.values()) == list(range(len(ranks)))
    assert all(ranks[bytes([byte])] == byte for byte in range(256))
    encoding = tiktoken.Encoding("notes", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    texts = [row["text"] for row in data["base_train.jsonl"]]
    texts += [row[key] for row in data["sft_train.jsonl"] if "prompt" in row for key in ("prompt", "completion")]
    lengths = [len(encoding.encode_ordinary(text)) for text in texts]
    assert all(encoding.decode(encoding.encode_ordinary(text)) == text for text in texts)
    pieces = sum(len(re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+", text)) for text in texts)
    assert sum(lengths) == pieces and max(lengths) <= 110  # a token per word or mark
    used = {id for text in texts for id in encoding.encode_ordinary(text)}
    assert used > set(range(256, len(ranks)))  # and no token that nothing teaches, but for bytes
    odd = "na\u00efve \u4f60\u597d <|end|> \x00"
    assert encoding.decode(encoding.encode_ordinary(odd)) == odd


# ------------------------------------------------------------------------------------------------- sums.py, annotate.py


def test_the_grader_of_sums_finds_the_result_of_every_request_that_it_writes():
    rng = random.Random(8)
    for _ in range(500):
        template, slots = prepare.draw(rng, "steps", rng.choice(("train", "eval")))
        prompt, right = world.ask(template, slots), int(world.complete(slots)["e"])
        assert sums.result(prompt) == right == int(gold.read_prompt(prompt)[1]["e"])
        answers = [perfect_answer(rng, "steps", slots), f"{right}", f"It is {right + 1}, no, {right}!"]
        wrong = [f"It is {right + 1}.", f"{right}, or {right + 1}.", f"{right}0", "I do not know.", ""]
        assert sums.correct([prompt] * 8, answers + wrong) == [1.0] * 3 + [0.0] * 5, prompt


def test_sums_writes_different_prompts_that_are_held_out_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "TRAIN", 30)
    monkeypatch.setattr(sums, "EVAL", 20)
    for folder in ("a", "b"):
        sums.main(sums.Config(str(tmp_path / folder)))
    for name, count, evaluation in (("train", 30, False), ("eval", 20, True)):
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{name}.jsonl").read_text()
        prompts = [json.loads(line)["prompt"] for line in text.splitlines()]
        assert len(set(prompts)) == count
        assert all(gold.read_prompt(prompt)[0] == "steps" for prompt in prompts)
        assert all(world.held_out(*combination(prompt)) == evaluation for prompt in prompts)


@pytest.mark.parametrize("script", ["prepare", "sums"])
def test_the_files_are_written_all_or_none(script, tmp_path, monkeypatch):
    module = {"prepare": prepare, "sums": sums}[script]
    for name, size in SMALL.items() if script == "prepare" else [("TRAIN", 30), ("EVAL", 20)]:
        monkeypatch.setattr(module, name, size)
    module.main(module.Config(str(tmp_path)))
    before = contents(tmp_path)
    names = sorted(before)

    def fail(path, *mode, real=public.atomic):
        if path.endswith(names[-1]):
            raise OSError(28, "No space left on device", path)
        return real(path, *mode)

    monkeypatch.setattr(public, "atomic", fail)
    monkeypatch.setattr(module, "draw", lambda *a, real=module.draw: real(random.Random(random.random()), *a[1:]))
    with pytest.raises(OSError):
        module.main(module.Config(str(tmp_path)))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("script", ["prepare", "sums"])
@pytest.mark.parametrize("arguments, message", [
    (["--outt", "x"], "--outt"), (["--out", "{file}/x"], "Not a directory: "), (["--out", "{file}"], "File exists: "),
])  # fmt: skip
def test_a_mistake_with_a_generator_is_told_in_one_line(command, tmp_path, script, arguments, message):
    (tmp_path / "file").touch()
    arguments = [word.format(file=tmp_path / "file") for word in arguments]
    code, _, err = command(f"data/notes/{script}.py", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and contents(tmp_path) == {"file": b""}


def test_the_annotator_prefers_by_the_gold_reward(workshop, tmp_path, data, lines, monkeypatch):
    """Two answers to each of the world's own prompts, one perfect, one with a writer's defects, 25 times."""
    rows, rng = data["prompts_train.jsonl"][:40], random.Random(9)
    slots = [gold.read_prompt(row["prompt"])[1] for row in rows]
    texts = [perfect_answer(rng, row["family"], s) for row, s in zip(rows, slots)] * 25
    texts += [prepare.answer(rng, row["family"], s) for row, s in zip(rows, slots)] * 25
    answers = [Example([0], [True], text, ended=True) for text in texts]
    monkeypatch.setattr(annotate, "load_prompts", lambda *_: ([row["prompt"] for row in rows], [[0]] * len(rows)))
    monkeypatch.setattr(annotate, "sample_text", lambda policy, tokenizer, prompts, *_, seed: answers)
    options = dict(policy=workshop.path("sft"), out=str(tmp_path), device="cpu", pairs=1000, valid_pairs=1000)
    annotate.main(annotate.Config(**options))
    train, valid = ([json.loads(line) for line in (tmp_path / f"{n}.jsonl").open()] for n in ("train", "valid"))
    assert 750 < len(train) <= 1000 and len(valid) == len(train)  # two equal answers are dropped
    better = 0
    for record in valid:
        chosen, rejected = gold.score([record["prompt"]] * 2, [record["chosen"], record["rejected"]])
        assert record["probability"] == pytest.approx(annotate.preference(chosen, rejected, 2.0))
        better += 0.5 * ((chosen > rejected) + (chosen >= rejected))  # equal ones half
    ceiling = sum(max(r["probability"], 1 - r["probability"]) for r in valid) / len(valid)
    assert ceiling > 0.6 and better / len(valid) == pytest.approx(ceiling, abs=0.05)  # the best that is possible


def test_the_majority_of_the_annotators_decides():
    """With p that one of them prefers the better answer, three do with p^3 + 3 p^2 (1-p)."""
    answers = [(THANK_BEST, "Thank you so much.")] * 4000
    p = annotate.preference(5.0, 0.5, 6.0)
    for votes, expected in ((1, p), (3, p**3 + 3 * p**2 * (1 - p))):
        records = list(annotate.label([THANK] * 4000, answers, 6.0, random.Random(0), votes))
        right = [record["chosen"] == THANK_BEST for record in records]
        assert sum(right) / 4000 == pytest.approx(expected, abs=0.02)
        assert all(r["probability"] == pytest.approx(p if ok else 1 - p) for r, ok in zip(records, right))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_contrast_pairs_compare_with_the_answer_to_another_prompt_of_the_family(share):
    names = [f"{family}{i}" for i in range(100) for family in ("a", "b")]
    kept = [(name, (f"first of {name}", f"second of {name}")) for name in names]
    found = annotate.contrast(kept, [name[0] for name in names], share, random.Random(0))
    moved = 0
    for (name, (first, second)), before in zip(found, kept, strict=True):
        assert (name, first) == (before[0], before[1][0])
        if second != before[1][1]:
            moved += 1
            assert second.startswith(f"first of {name[0]}") and second != first
    assert moved == share * 200 if share in (0, 1) else 0.2 < moved / 200 < 0.4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pairs", "0"], "--pairs must be at least 1, not 0"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--votes", "2"], "--votes must be odd, not 2"),
        (["--contrast", "1.5"], "--contrast must be between 0 and 1, not 1.5"),
        (["--policy", "nowhere", "--device", "cpu"], "no folder nowhere"),
        (["--policies", "out/sft"], "--policies"),
    ],
)
def test_a_mistake_of_the_annotators_user_is_told_in_one_line(arguments, message, command, tmp_path):
    code, _, err = command("data/notes/annotate.py", *arguments, "--out", tmp_path / "prefs")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "prefs").exists()
