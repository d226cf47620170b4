"""Write the data of the embedded world and their vocabulary: all files or none.

    python data/notes/prepare.py

The files are described in README.md and depend on the seed only. Takes a few seconds on one core.
"""

import base64
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/, for public.py
import gold
from nanopost.config import UserError, cli
from public import write_files
from world import (
    ACTS,
    FACTS,
    FILLERS,
    KIND,
    LETTERS,
    NEW_FILLERS,
    NEW_REQUESTS,
    REQUESTS,
    ask,
    complete,
    fill,
    held_out,
    join,
    slots_of,
)

BASE_TRAIN, BASE_VALID = 18_000, 500  # documents
SFT_TRAIN, SFT_VALID = 20_000, 500  # records
PROMPTS_TRAIN, PROMPTS_EVAL, PROMPTS_SHIFTED = 5_000, 500, 220  # distinct prompts
TWO_TURNS = 0.08  # share of the SFT records that are conversations with two requests
TRIES = 10_000  # draws in a row without success, after which there is nothing to be found

# how often an answer has each defect, by the kind of its writer: most are curt, they leave out whatever they can; the
# careful write the whole of it; the careless are rude and ramble. So defects come together, as with people
DEFECTS = {
    #                curt  careful careless
    "no greeting": (0.80, 0.02, 0.50),
    "wrong name": (0.01, 0.00, 0.02),
    "wrong thing": (0.01, 0.00, 0.03),
    "wrong sum": (0.02, 0.00, 0.04),
    "guess": (0.67, 0.67, 0.67),  # in a sum of three steps
    "vague": (0.60, 0.00, 0.15),
    "one fact": (0.80, 0.02, 0.40),
    "no x": (0.85, 0.03, 0.60),
    "no y": (0.85, 0.03, 0.60),
    "rude": (0.05, 0.02, 0.70),
    "complies": (0.05, 0.00, 0.80),  # with a request that should be refused
    "no closing": (0.80, 0.03, 0.60),
    "two closings": (0.00, 0.00, 0.05),
    "filler": (0.08, 0.03, 0.80),
    "repeated": (0.00, 0.00, 0.02),
    "off topic": (0.01, 0.00, 0.03),
    "not answered": (0.01, 0.00, 0.03),
}
WRITERS = {"base": (40, 45, 15), "sft": (50, 20, 30)}  # how many of each kind there are

THINGS = ("event", "thing", "mishap", "feat", "day", "pred1", "pred2", "deed", "place")


@dataclass
class Config:
    out: str = os.path.dirname(os.path.abspath(__file__))  # folder for the files
    seed: int = 0  # seed of everything in them


def draw(rng, family: str, split: str = "train") -> tuple[str, dict]:
    """A random request of the family: (template, slots). split: train, eval (held out) or shifted (phrasings, names,
    things and topics that the others do not have)."""
    requests, fillers = (NEW_REQUESTS, FILLERS | NEW_FILLERS) if split == "shifted" else (REQUESTS, FILLERS)
    for _ in range(TRIES):
        template = rng.choice(requests[family])
        slots = {slot: rng.choice(fillers[KIND[slot]]) for slot in slots_of(template)}
        positive = int(complete(slots).get("c", 1)) > 0
        if positive and (split == "shifted" or held_out(family, slots) == (split == "eval")):
            return template, slots
    raise UserError(f"{TRIES:,} draws gave no {family!r} request for {split}; world.py has too few fillers for it")


def perfect(rng, family: str, slots: dict) -> list[tuple[str, str]]:
    """A perfect answer to the request with these slots: [(act, template), ...]."""
    greeting = rng.choice(ACTS["greeting"][:-1]) if "name" in slots else ACTS["greeting"][-1]
    plain = rng.choice(ACTS["working"])
    if family in LETTERS:
        full = (
            ACTS[family][:-1] if slots.keys() - {"name"} else ACTS[family][-1:]
        )  # nothing to name in "decline an invitation"
        plan = [
            ("greeting", greeting),
            (family, rng.choice(full)),
            (family + ".x", None),
            (family + ".y", None),
            ("closing", None),
        ]
    elif family == "explain":
        one, two = rng.sample(ACTS["fact"], 2)
        plan = [
            ("greeting", greeting),
            ("fact", one.replace("pred", "pred1")),
            ("fact", two.replace("pred", "pred2")),
            ("kind", None),
        ]
    elif family == "summarise":
        plan = [("summary", rng.choice(ACTS["summary"][:4]))]
    elif family == "steps":
        plan = [("total", None), ("kind", None)]
    elif family == "refuse":
        plan = [("greeting", greeting), ("refuse", rng.choice(ACTS["refuse"][:-1])), ("offer", None), ("kind", None)]
    elif "verb" in slots:  # a sum told as a story
        plan = [("working", plain), ("result", None), ("kind", None)]
    else:
        plan = [("greeting", greeting), ("working", plain), ("kind", None)]
    return [(act, template or rng.choice(ACTS[act])) for act, template in plan]


def facts_in_turn(rng, topic: str, count: int) -> list[str]:
    """Facts about the topic as people tell them: the next one of the table after each, the first after the last."""
    facts = FACTS[topic]
    first = rng.randrange(len(facts))
    return [facts[(first + i) % len(facts)] for i in range(count)]


def another(rng, slot: str, value: str) -> str:
    return rng.choice([filler for filler in FILLERS[slot.rstrip("12")] if filler != value])


def answer(rng, family: str, slots: dict, writers: str = "sft") -> str:
    """An answer as people write them: a perfect one, then each defect with the probability of a random writer."""
    (kind,) = rng.choices(range(3), WRITERS[writers])
    slots = dict(complete(slots))
    plan = perfect(rng, family, slots)
    if family == "explain":
        slots["pred1"], slots["pred2"] = facts_in_turn(rng, slots["topic"], 2)
    defects = {name for name, probabilities in DEFECTS.items() if rng.random() < probabilities[kind]}

    # wrong: the slots
    if "wrong name" in defects and "name" in slots:
        slots["name"] = another(rng, "name", slots["name"])
    if "wrong thing" in defects and (things := [slot for slot in slots if slot in THINGS]):
        slot = rng.choice(things)
        slots[slot] = another(rng, slot, slots[slot])
    if "wrong sum" in defects and family == "sum":
        slots["c"] = str(max(0, int(slots["c"]) + rng.choice((-2, -1, 1, 2))))

    if "guess" in defects and family == "steps":
        slots["e"] = str(sum(int(rng.choice(FILLERS["number"])) for _ in range(3)))

    # missing or vague: the plan
    if "vague" in defects:
        vague = {family: ACTS.get(family, [""])[-1], "summary": rng.choice(ACTS["summary"][4:6])}
        plan = [(act, vague.get(act, template)) for act, template in plan]
    missing = {
        "no greeting": ["greeting"],
        "no closing": ["closing"],
        "no x": [family + ".x", "offer"] + ["working"] * ("verb" in slots),
        "no y": [family + ".y", "kind"],
        "not answered": [family, "fact", "summary", "working", "result", "total"],
        "complies": ["refuse", "offer"],
    }
    if "one fact" in defects:
        plan = [(act, template) for act, template in plan if "pred2" not in template]
    plan = [(act, template) for act, template in plan if not any(act in missing.get(defect, ()) for defect in defects)]

    # too much: sentences put in after the greeting and before the closing
    head = [fill(template, slots) for act, template in plan if act == "greeting"]
    body = [fill(template, slots) for act, template in plan if act not in ("greeting", "closing")]
    tail = [template for act, template in plan if act == "closing"]
    extra = []
    if "repeated" in defects and body:
        extra.append(rng.choice(body))
    if "off topic" in defects:
        other = "accept" if family == "decline" and rng.random() < 0.5 else rng.choice(LETTERS)
        template = rng.choice(ACTS[other])
        extra.append(fill(template, {slot: rng.choice(FILLERS[slot]) for slot in slots_of(template)} | slots))
    if "complies" in defects and family == "refuse":
        extra += rng.sample(ACTS["rude"], 2)
    elif "filler" in defects or not body:
        extra += rng.sample(ACTS["filler"], rng.choice((1, 1, 2, 2)))
    if "rude" in defects:
        extra.append(rng.choice(ACTS["rude"]))
    for sentence in extra:
        body.insert(rng.randint(0, len(body)), sentence)
    if "two closings" in defects and tail:
        tail.append(rng.choice(ACTS["closing"]))
    return join(head + body + tail)


def document(rng) -> str:
    """A text for pretraining: people asking and writing, letters, stories, facts and (true) sums."""
    (form,) = rng.choices(("exchange", "letter", "story", "facts", "sums"), (50, 5, 8, 12, 25))
    if form in ("exchange", "letter"):
        family = rng.choice(list(REQUESTS) if form == "exchange" else LETTERS)
        template, slots = draw(rng, family)
        asked, written = ask(template, slots), answer(rng, family, slots, "base")
        asker, writer = rng.sample(FILLERS["name"], 2)
        framed = rng.random() < 0.25
        if form == "letter":
            return written
        return f"One day {asker} asked: {asked} Then {writer} wrote: {written}" if framed else f"{asked} {written}"
    if form == "story":
        _, slots = draw(rng, "summarise")
        story = ["one day {name} was {place}.", "{detail}.", "there {name} {deed}.", rng.choice(ACTS["summary"][:4])]
    elif form == "facts":
        _, slots = draw(rng, "explain")
        facts = facts_in_turn(rng, slots["topic"], 3)
        story = [rng.choice(ACTS["fact"]).replace("{pred}", fact) for fact in facts]
    else:
        story = []
        for _ in range(rng.choice((2, 3))):
            slots = complete(draw(rng, "sum")[1])
            told = ["here {name} has {a} {count} and {verb} {b}.", rng.choice(ACTS["result"])]
            told = told * ("verb" in slots) + [rng.choice(ACTS["working"])]
            story += [fill(template, slots) for template in told]
    return join([fill(template, slots) for template in story])


def record(rng) -> dict:
    """A line of the SFT data."""
    turns = []
    for _ in range(2 if rng.random() < TWO_TURNS else 1):
        family = rng.choice(list(REQUESTS))
        template, slots = draw(rng, family)
        turns += [ask(template, slots), answer(rng, family, slots)]
    if len(turns) == 2:
        return {"prompt": turns[0], "completion": turns[1]}
    return {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, turns)]}


def distinct_prompts(rng, count: int, split: str) -> list[dict]:
    """Distinct requests, the families in turn; steps have files of their own (sums.py)."""
    prompts, families = {}, [family for family in REQUESTS if family != "steps"]
    for i in range(count):
        family, tries = families[i % len(families)], 0
        while len(prompts) == i:
            if tries == TRIES:
                found = f"{tries:,} draws gave no {family!r} request that is not among the {i:,} already there"
                raise UserError(f"{count:,} distinct prompts are too many: {found}")
            prompts.setdefault(ask(*draw(rng, family, split)), family)
            tries += 1
    return [{"prompt": prompt, "family": family} for prompt, family in prompts.items()]


def vocabulary(texts) -> list[bytes]:
    """The tokens in the order of their ranks: the 256 single bytes, then every word, the most common first. tiktoken
    takes a word that is a token as it is; any other falls apart, mostly into single bytes, which no text teaches."""
    words = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")  # GPT-2's pattern, for ASCII
    counts = Counter(word.encode() for text in texts for word in words.findall(text))
    return [bytes([byte]) for byte in range(256)] + [word for word, _ in counts.most_common() if len(word) > 1]


def main(config: Config):
    os.makedirs(config.out, exist_ok=True)  # first: a folder that cannot be made is noticed at once
    rng = random.Random(config.seed)
    files = {
        "base_train.jsonl": [{"text": document(rng)} for _ in range(BASE_TRAIN)],
        "base_valid.jsonl": [{"text": document(rng)} for _ in range(BASE_VALID)],
        "sft_train.jsonl": [record(rng) for _ in range(SFT_TRAIN)],
        "sft_valid.jsonl": [record(rng) for _ in range(SFT_VALID)],
        "prompts_train.jsonl": distinct_prompts(rng, PROMPTS_TRAIN, "train"),
        "prompts_eval.jsonl": distinct_prompts(rng, PROMPTS_EVAL, "eval"),
        "prompts_shifted.jsonl": distinct_prompts(rng, PROMPTS_SHIFTED, "shifted"),
    }
    sft = [row for row in files["sft_train.jsonl"] if "prompt" in row]
    texts = [row["text"] for row in files["base_train.jsonl"]]
    texts += [row[key] for row in sft for key in ("prompt", "completion")]
    tokens = vocabulary(texts)
    lines = {name: map(json.dumps, rows) for name, rows in files.items()}
    ranks = (f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens))
    write_files(config.out, lines | {"vocab.tiktoken": ranks})

    scores = gold.score([row["prompt"] for row in sft], [row["completion"] for row in sft])
    mean = sum(scores) / len(scores)
    deviation = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    print(f"{config.out}: " + ", ".join(f"{name} {len(rows):,}" for name, rows in files.items()))
    print(f"{len(words)} distinct words, {len(tokens)} tokens")
    print(
        f"gold reward of the SFT answers: mean {mean:.2f}, standard deviation {deviation:.2f}, "
        f"{sum(score >= 4.5 for score in scores) / len(scores):.0%} at 4.5 or more"
    )


if __name__ == "__main__":
    cli(main, Config)
