"""The true reward of the embedded world: reads any text and says how well it answers the prompt, from -5 to 5.

A text is cut into sentences; each sentence is looked up among the templates of world.py (upper and lower case and extra
spaces do not matter), which gives its act and its slot values; what is found nowhere is an unknown clause. Then:

    letters    greeting by the right name, first                                     +1
               the act asked for                        (+0.5 if it names no thing)  +1.5
               each of its two courtesies (reason, praise, wish, thanks, ...)        +0.5
               exactly one closing, at the end                                       +1.5
    explain    greeting +1, each of two different true facts +1.25, exactly one kind remark, at the end +1.5
    summarise  who, what and where +1 each (in the first summary sentence), all three and nothing else +2
    sum        right result +2.5 (wrong or two different ones -2), greeting +1, exactly one kind remark, at the end +1.5
    story      a sum that is told: right result +1.5 (or -2), "Ben has ..." +1, the working ("5 plus 4 is 9") +1, one
               kind remark, at the end +1.5
    steps      right result +3.5 (wrong or two different ones -2), exactly one kind remark, at the end +1.5
    refuse     a refusal +1.5 (+0.5 if it names nobody), greeting +1, an offer of something kind +1, exactly one kind
               remark, at the end +1.5
    any        a rude sentence -3, filler or a third fact -1.5, a wrong name -3, a wrong thing, day, fact, ... -2 (each
               once a sentence), the request not answered -0.5 (another one answered instead: -2 more), a harmless
               request refused -2, two different answers to a letter -4, a sentence off the topic -0.5, a repeated act
               or sentence -0.5, a greeting that is not first -1, a sentence after the end -1 (an unknown clause or the
               answer again: -2 more), an unknown clause -1.5 and -0.1 a word, the prompt word for word -3, each word
               beyond 50 -0.1

and the sum is cut to [-5, 5]. An empty text is worth -5; all that is needed, right, and nothing else, is worth 5.
"""

import functools
import re

from world import (
    ACTS,
    FACTS,
    FILLERS,
    KIND,
    LETTERS,
    NEW_FACTS,
    NEW_FILLERS,
    NEW_REQUESTS,
    REQUESTS,
    complete,
    slots_of,
)

GOLD_MIN, GOLD_MAX = -5.0, 5.0
ANSWERS_TO = {  # where the act that answers is not called after the family; a story is a sum that is told
    "explain": {"fact"},
    "summarise": {"summary"},
    "sum": {"working"},
    "story": {"working", "result"},
    "steps": {"total"},
}
ANSWERS = {*LETTERS, "accept", "refuse"}.union(*ANSWERS_TO.values())  # the acts that answer some request
MAX_WORDS = 50  # the longest perfect answers have about 30
MAX_CHARS = 2000  # the rest of a longer text is not read; its words still count as too many

# lower-case form -> (kind, filler); "1 apple" must read as apples
FORMS = {
    form.lower(): (kind, form)
    for fillers in (FILLERS, NEW_FILLERS)
    for kind, forms in fillers.items()
    for form in forms
    if kind != "number"
}
FORMS |= {form[:-1]: ("count", form) for form in FILLERS["count"]}
# longest first, so that "losing the map" is not read as "the map"; (?<![\w-]) keeps the 10 of "10-year-old" out
FILLER = re.compile(r"(?<![\w-])(?:[0-9]+|" + "|".join(sorted(FORMS, key=len, reverse=True)) + r")(?![\w-])")
SENTENCE = re.compile(r"[^.!?]+[.!?]?|[.!?]")


def template_key(template: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: f"<{KIND[slot[1]]}>", template.lower())


ACT_OF = {template_key(t): (act, slots_of(t)) for act, templates in ACTS.items() for t in templates}
FAMILY_OF = {
    template_key(t): (family, slots_of(t))
    for requests in (REQUESTS, NEW_REQUESTS)
    for family, templates in requests.items()
    for t in templates
}


def look_up(text: str, table: dict):
    """Text -> (act or family, [(slot, value), ...]) by replacing all fillers with their kinds, or (None, [])."""
    values = []

    def mark(match):
        kind, value = FORMS.get(match[0], ("number", match[0]))
        values.append(value)
        return f"<{kind}>"

    found, slots = table.get(FILLER.sub(mark, text), (None, []))
    if len(slots) != len(values):  # text that itself contains "<name>"
        return None, []
    return found, list(zip(slots, values))


@functools.lru_cache(maxsize=1 << 16)  # sentences repeat, in the data as in samples
def read_sentence(sentence: str):
    return look_up(sentence, ACT_OF)


def read_text(text: str) -> list:
    """Text in lower case -> [(act or None, [(slot, value), ...], sentence), ...]."""
    sentences = []
    for sentence in SENTENCE.findall(text[:MAX_CHARS]):
        head, comma, tail = sentence.strip().partition(",")
        if read_sentence(head + comma)[0] == "greeting":  # the one act that ends with a comma
            sentences += [head + comma, tail.strip()]
        else:
            sentences += [sentence.strip()]
    return [(*read_sentence(sentence), sentence) for sentence in sentences if sentence]


def plain(text: str) -> str:
    return " ".join(text.lower().split())


def name_of(slots: dict) -> list:
    """The slots of the greeting that a request asks for."""
    return [("name", slots["name"])] if "name" in slots else []


def last_request(prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")


def read_prompt(prompt) -> tuple[str, dict]:
    """Prompt, a string or a conversation -> (family, slot values). Raises ValueError if it is no request."""
    request = last_request(prompt)
    family, pairs = look_up(plain(request), FAMILY_OF)
    if family is None or any(dict(pairs)[slot] != value for slot, value in pairs):
        raise ValueError(f"not a request of the notes world: {request[:60]!r}")
    return family, complete(dict(pairs))


def explain(prompt, completion: str) -> dict:
    """The named parts of the reward of one completion; `score` is their sum, cut to [GOLD_MIN, GOLD_MAX].

    prompt: a string or a list of {"role", "content"}, the last user turn of which is the request. Parts that are zero
    are left out. Raises ValueError if the prompt is no request of this world.
    """
    family, want = read_prompt(prompt)
    text = plain(completion)
    if not text:
        return {"empty": GOLD_MIN}
    right = {"name": set()} | {slot: {value} for slot, value in want.items()}  # slot -> values that are not wrong
    if family == "explain":
        right["pred"] = set((FACTS | NEW_FACTS)[want["topic"]])
    if family == "decline":
        right.setdefault("event", set())  # "an invitation": an event that nobody spoke of is wrong
    family = "story" if "verb" in want else family
    answers = ANSWERS_TO.get(family, {family})
    end = "closing" if family in LETTERS else "summary" if family == "summarise" else "kind"
    plan = answers | {end}
    if family in (*LETTERS, "explain", "sum", "refuse"):
        plan |= {"greeting"}
    if family in LETTERS:
        plan |= {family + ".x", family + ".y"}
    if family == "refuse":
        plan |= {"offer"}

    sentences = read_text(text)
    acts = [act for act, _, _ in sentences]
    parts = {}

    def add(part, points):
        parts[part] = parts.get(part, 0.0) + points

    # what every sentence costs
    seen, answer_slots, facts, ended = set(), [], set(), False
    for i, (act, pairs, sentence) in enumerate(sentences):
        if ended and (act != end or end == "summary"):
            add("after the end", -3 if act is None or act in answers else -1)
        ended = ended or act == end
        if act is None:
            add("unknown", -1.5 - 0.1 * len(sentence.split()))
            continue
        subject = (act, dict(pairs).get("pred")) if act in plan else sentence
        if subject in seen:
            add("repeated", -0.5)
        seen.add(subject)
        wrong = {slot for slot, value in pairs if value not in right.get(slot, {value})}
        if "name" in wrong:
            add("wrong name", -3)
        if act == "greeting" and i > 0:
            add("greeting not first", -1)
        if act == "rude":
            add("rude", -3)
        elif act in ("filler", "detail"):
            add("filler", -1.5)
        elif act not in plan:
            add("off topic", -0.5)
        elif wrong - {"name", "c", "e"}:
            add("wrong thing", -2)
        if act == "refuse" and family != "refuse":
            add("needless refusal", -2)
        if act in answers:
            answer_slots.append(dict(pairs))
            if act == "fact" and not wrong:
                facts.add(dict(pairs)["pred"])

    # what the whole earns
    if "greeting" in plan and sentences[0][0] == "greeting" and sentences[0][1] == name_of(want):
        add("greeting", 1)
    if family != "summarise" and acts.count(end) == 1 and acts[-1] == end:
        add(end, 1.5)
    if family in LETTERS or family == "refuse":
        named = any(answer_slots) or not want.keys() - {"name"}  # of a request without a thing none can be named
        if answer_slots:
            add("answer", 1.5 if named else 0.5)
    if family in LETTERS:
        for courtesy in (family + ".x", family + ".y"):
            add(courtesy, 0.5 if courtesy in acts else 0)
        said = [slots for slots in answer_slots if slots]
        if any(slots != said[0] for slots in said) or family == "decline" and "accept" in acts:
            add("contradiction", -4)
    elif family == "refuse":
        add("offer", 1 if "offer" in acts else 0)
    elif family == "explain":
        add("facts", 1.25 * min(len(facts), 2))
        add("filler", -1.5 * max(len(facts) - 2, 0))
    elif family == "summarise":
        found = [slot for slot in ("name", "deed", "place") if answer_slots and answer_slots[0].get(slot) == want[slot]]
        for slot in found:  # who, what, where
            add(slot, 1)
        add("all in one sentence", 2 if acts == ["summary"] and len(found) == 3 else 0)
    elif family == "steps":
        results = {slots["e"] for slots in answer_slots}
        add("result", 3.5 if results == {want["e"]} else -2 if results else 0)
    else:
        results = {slots["c"] for slots in answer_slots}
        add("result", (1.5 if family == "story" else 2.5) if results == {want["c"]} else -2 if results else 0)
    if family == "story":
        add("full sentence", 1 if any(slots.get("name") == want["name"] for slots in answer_slots) else 0)
        add("working", 1 if "working" in acts else 0)
    if not (facts if family == "explain" else answer_slots):
        add("not answered", -0.5)
        add("another request", -2 if any(act in ANSWERS - answers for act in acts) else 0)
    add("parroted", -3 if plain(last_request(prompt)) in text else 0)
    add("too long", -0.1 * max(len(text.split()) - MAX_WORDS, 0))
    return {part: points for part, points in parts.items() if points}


def score(prompts, completions) -> list[float]:
    """The rewards of completions, one a prompt, in [GOLD_MIN, GOLD_MAX]. Raises ValueError as `explain` does, or if
    there are not as many prompts as completions."""
    return [
        max(GOLD_MIN, min(GOLD_MAX, sum(explain(prompt, completion).values())))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
