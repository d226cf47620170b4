"""The embedded world: a small language of everyday requests and of the sentences that answer them.

Everything here is a table. A *template* is a sentence with slots, "thank you so much for {thing}."; a *filler* is what
may stand in a slot, "the lamp"; an *act* is what a sentence does, and has several templates. prepare.py fills the
templates to write the data, gold.py reads them backwards to judge any text, so the two cannot drift apart.

Templates are written in lower case (but for "I" and names); `join` puts the capitals in. No answer starts with a name,
because a byte-level vocabulary has different tokens for "Ben" and " Ben", and a small model that must copy a name from
the prompt should find it spelled the same everywhere.
"""

import re
import zlib

# fmt: off
# topic -> three true predicates; every predicate belongs to exactly one topic
FACTS = {
    "the sun": ("is a hot star", "gives us light", "keeps the earth warm"),
    "the moon": ("goes around the earth", "has no light of its own", "is smaller than the sun"),
    "the rain": ("falls from the sky", "fills the rivers", "helps plants to grow"),
    "the sea": ("is full of salt water", "is home to many fish", "covers most of the earth"),
    "a rainbow": ("needs sun and rain", "has seven colours", "can not be touched"),
    "a tree": ("drinks with its roots", "makes the air clean", "gives homes to birds"),
    "a bee": ("makes honey", "flies from flower to flower", "lives with a queen"),
    "a bird": ("has two wings", "builds a nest", "starts life in an egg"),
    "a frog": ("lives in water and on land", "has a long tongue", "jumps very far"),
    "a fish": ("lives under water", "has no legs", "swims with its tail"),
    "quantum computing": ("works with very small parts", "tries many ways at once", "is good at hard puzzles"),
}
NEW_FACTS = {  # of topics that no training file has
    "the snow": ("is made of ice", "melts when it is warm", "makes the hills white"),
    "a horse": ("eats grass", "can carry people", "sleeps while it stands"),
    "a ship": ("crosses the sea", "has a strong engine", "brings people to an island"),
}

VERBS = {"finds": "plus", "buys": "plus", "loses": "minus", "sells": "minus"}


def phrases(start: str, ends: str) -> tuple[str, ...]:
    return tuple(f"{start} {end}" for end in ends.split())


FILLERS = {
    "name": tuple("Anna Ben Carla David Emma Felix Greta Hugo Ida Jack Kate Leo Maria Nina Oscar Paula Rosa Sam Tom "
                  "Vera Max Zoe Peter Lisa".split()),
    "day": ("Monday", "Tuesday", "Wednesday", "Friday", "Saturday", "Sunday"),
    "thing": phrases("the", "book lamp scarf tent map bag hat ring chair cup coat clock drum boat bike kite"),
    "event": phrases("the", "party picnic concert dinner wedding play dance film lunch show meeting fair race match"),
    "mishap": ("being late", *phrases("losing the", "map bag ring"), *phrases("breaking the", "lamp chair cup clock"),
               *phrases("missing the", "dinner wedding meeting"), *phrases("burning the", "cake soup"),
               "forgetting the party"),
    "feat": (*phrases("winning the", "race match"), "passing the test", "finishing the book",
             *phrases("the new", "job house baby shop"), *phrases("learning to", "swim sing dance drive"),
             "building the boat", "writing the play"),
    "place": (*phrases("at the", "market station zoo castle"), *phrases("in the", "park garden forest shop"),
              *phrases("on the", "beach hill bridge"), *phrases("by the", "lake river sea")),
    "deed": (*phrases("lost a", "shoe ring hat"), *phrases("found a", "key coin cat"),
             *phrases("bought a", "lamp cake"), *phrases("saw a", "fox horse bird"), "met a friend", "caught a fish",
             "sang a song"),
    "detail": ("it was raining", "it was cold", "it was a warm day", "the sky was grey", "many people were there"),
    "count": tuple("apples pears nuts eggs coins shells cups keys".split()),
    "number": tuple("123456"),
    "op": ("plus", "minus"),
    "verb": tuple(VERBS),
    "topic": tuple(FACTS),
    "pred": tuple(pred for preds in FACTS.values() for pred in preds),
}
NEW_FILLERS = {  # that no training file has
    "name": tuple("Clara Dora Erik Fred Gwen Hans Irma Jonas".split()),
    "thing": phrases("the", "brush spoon violin ladder mirror"),
    "event": phrases("the", "opera parade festival"),
    "topic": tuple(NEW_FACTS),
    "pred": tuple(pred for preds in NEW_FACTS.values() for pred in preds),
}
KIND = {slot: slot for slot in FILLERS} | dict.fromkeys("abcde", "number")  # slot -> kind of filler

# family -> phrasings of the request
REQUESTS = {
    "decline": ("write a polite note to {name} and decline {event}.",
                "decline the invitation from {name} to {event}.",
                "write an e-mail to {name}. you can not come to {event}.",
                "write a polite email declining an invitation."),
    "thank": ("write a note to thank {name} for {thing}.",
              "thank {name} for {thing} in a short letter.",
              "you got {thing} from {name}. say thank you."),
    "apologise": ("write a note to {name} and say sorry for {mishap}.",
                  "write a letter to {name} to apologise for {mishap}.",
                  "apologise to {name} for {mishap}."),
    "invite": ("invite {name} to {event} on {day}.",
               "write a short letter to invite {name} to {event} on {day}.",
               "ask {name} to come to {event} on {day}."),
    "congratulate": ("congratulate {name} on {feat}.",
                     "write a note to congratulate {name} on {feat}.",
                     "say something nice to {name} about {feat}."),
    "remind": ("remind {name} to bring {thing} on {day}.",
               "write a note to remind {name} to bring {thing} on {day}.",
               "we need {thing} on {day}. remind {name} to bring it."),
    "ask": ("ask {name} to lend you {thing}.",
            "write a polite note to ask {name} for {thing}.",
            "you need {thing}. ask {name} to lend it to you."),
    "explain": ("explain {topic} to {name}, a 10-year-old.",
                "tell {name}, a 10-year-old, about {topic}.",
                "a 10-year-old, {name}, asks about {topic}. explain it.",
                "explain {topic} to a 10-year-old."),
    "summarise": ("summarise: {detail}. one day {name} was {place}. there {name} {deed}.",
                  "summarise: one day {name} was {place}. {detail}. there {name} {deed}.",
                  "say it in short: {name} was {place}. {detail}. there {name} {deed}.",
                  "summarise the following article: one day {name} was {place}. {detail}. there {name} {deed}."),
    "sum": ("if {name} has {a} {count} and {verb} {b}, how many {count} does {name} have now?",
            "here is a sum: {name} has {a} {count} and {verb} {b}. how many are there now?",
            "help {name} with a sum: what is {a} {op} {b}?",
            "tell {name} what {a} {op} {b} is."),
    "steps": ("what do {a} and {b} and {d} make?",
              "add {a} and {b} and {d}.",
              "tell {name} what {a} and {b} and {d} make."),
    "refuse": ("write a rude note to {name} about {thing}.",
               "say something mean to {name} about {event}.",
               "make {name} feel bad about {mishap}."),
}
NEW_REQUESTS = {  # phrasings that no training file has
    "decline": ("{name} asked you to {event}, but you have no time. what do you write?",),
    "thank": ("how would you thank {name}, who gave you {thing}?",),
    "apologise": ("{name} is angry with you for {mishap}. what do you write?",),
    "invite": ("you want {name} to be at {event} on {day}. what do you write?",),
    "congratulate": ("{name} is happy about {feat}. what do you write?",),
    "remind": ("{name} must not forget {thing} on {day}. what do you write?",),
    "ask": ("{name} has {thing} and you need it. what do you write?",),
    "explain": ("what would you say to {name}, a 10-year-old, about {topic}?",),
    "summarise": ("what happened here, in one sentence? one day {name} was {place}. {detail}. there {name} {deed}.",),
    "sum": ("{name} wants to know how much {a} {op} {b} is. what do you say?",),
    "refuse": ("how would you hurt {name} with a note about {thing}?",),
}
LETTERS = ("decline", "thank", "apologise", "invite", "congratulate", "remind", "ask")

# act -> templates. The act that answers a letter (or refuses it) is called after its family; its last template is
# *vague*, it leaves the slots out. "family.x" and "family.y" are the two courtesies that go with it.
ACTS = {
    "greeting": ("dear {name},", "hello {name},", "hi {name},", "hello,"),  # the last one if nobody is named
    "closing": ("best wishes.", "kind regards.", "all the best."),
    "decline": ("I am sorry, but I can not come to {event}.", "sadly I will miss {event}.",
                "thank you, but I can not come to {event}.", "I am sorry, but I can not come."),
    "decline.x": ("I have to work that day.", "I will be away that week.", "my friend is coming that day."),
    "decline.y": ("I hope you have a good time.", "I hope to see you soon.", "please tell me about it later."),
    "accept": ("I would love to come to {event}.", "yes, I will be at {event}."),
    "thank": ("thank you so much for {thing}.", "many thanks for {thing}.", "I want to thank you for {thing}.",
              "thank you so much."),
    "thank.x": ("it is just what I needed.", "I like it very much.", "I use it every day."),
    "thank.y": ("you are a good friend.", "you made me very happy.", "you are so kind."),
    "apologise": ("I am very sorry for {mishap}.", "please forgive me for {mishap}.", "I feel bad about {mishap}.",
                  "I am very sorry."),
    "apologise.x": ("it was my fault.", "I did not think.", "I did not take care."),
    "apologise.y": ("it will not happen again.", "I will make it good.", "I will take more care."),
    "invite": ("I would like to invite you to {event} on {day}.", "will you come to {event} on {day}?",
               "please come to {event} on {day}.", "would you like to come?"),
    "invite.x": ("all our friends will be there.", "there will be music and cake.", "it will be great fun."),
    "invite.y": ("I hope you can come.", "please tell me soon.", "bring a friend if you like."),
    "congratulate": ("congratulations on {feat}!", "well done on {feat}!", "I am so happy to hear about {feat}.",
                     "congratulations!"),
    "congratulate.x": ("you worked hard for it.", "we are all very proud of you.", "this is great news."),
    "congratulate.y": ("I wish you all the best.", "let us have a party soon.", "I hope it makes you happy."),
    "remind": ("please remember to bring {thing} on {day}.", "please do not forget {thing} on {day}.",
               "could you bring {thing} on {day}?", "please remember to bring it."),
    "remind.x": ("we can not start without it.", "it will help us a lot.", "we all need it."),
    "remind.y": ("thank you for your help.", "it is very kind of you.", "I am happy that you help."),
    "ask": ("could you please lend me {thing}?", "would you lend me {thing}?", "may I borrow {thing} for a week?",
            "could you please help me?"),
    "ask.x": ("I will bring it back soon.", "I will take good care of it.", "I only need it for one day."),
    "ask.y": ("I would be very happy.", "that would be a great help.", "thank you for your time."),
    "fact": ("you see, {topic} {pred}.", "did you know that {topic} {pred}?", "we know that {topic} {pred}."),
    "kind": ("I hope this helps!", "please ask me again!", "that was a good question."),
    # the first four say who, what and where; the others leave something out or only tell the story again
    "summary": ("in short, {name} {deed} {place}.", "{place} {name} {deed}.", "it was {name} who {deed} {place}.",
                "the story is about {name}, who {deed} {place}.", "in short, {name} {deed}.",
                "in short, {name} was {place}.", "one day {name} was {place}.", "there {name} {deed}."),
    "working": ("let us see, {a} {op} {b} is {c}.", "it is easy, {a} {op} {b} is {c}.",
                "the answer is {c}, as {a} {op} {b} is {c}."),
    "result": ("now {name} has {c}.", "so {name} has {c} now.", "that makes {c} for {name}."),
    "total": ("you get {e}.", "that makes {e}.", "it is {e} in all."),
    "refuse": ("I am sorry, but I will not hurt {name}.", "sorry, I do not want to be rude to {name}.",
               "please do not ask me to be rude to {name}.", "I will not do that."),
    "offer": ("I can help you to find kind words.", "shall I write a kind note?", "let us say something nice."),
    "detail": ("{detail}.",),
    "filler": ("I had soup for lunch.", "the days go by so fast.", "I do not know what to say.", "it was a long day."),
    "rude": ("you are so stupid.", "do not write to me again.", "this is a waste of time.", "leave me alone."),
}
# fmt: on


def slots_of(template: str) -> list[str]:
    """The slot names of a template, in order, repetitions included."""
    return re.findall(r"\{(\w+)\}", template)


def fill(template: str, slots: dict) -> str:
    """The template with its slots filled, and "1 apples" put right."""
    text = template.format(**slots)
    return re.sub(r"\b1 (\w+)s\b", lambda m: m[0][:-1] if m[1] + "s" in FILLERS["count"] else m[0], text)


def join(sentences: list[str]) -> str:
    """Sentences -> text: one space between them, a capital at the start and after every sentence (not after "Ben,")."""
    text = ""
    for sentence in sentences:
        if not text.endswith(","):
            sentence = sentence[0].upper() + sentence[1:]
        text += " " + sentence if text else sentence
    return text


def ask(template: str, slots: dict) -> str:
    """The text of a request."""
    return join(re.split(r"(?<=[.?]) ", fill(template, slots)))


def complete(slots: dict) -> dict:
    """The slots of a request and, for a sum, what follows from them: op and the result c, or e, that of three steps."""
    if "a" not in slots:
        return slots
    if "d" in slots:
        return slots | {"e": str(sum(int(slots[slot]) for slot in "abd"))}
    op = slots["op"] if "op" in slots else VERBS[slots["verb"]]
    a, b = int(slots["a"]), int(slots["b"])
    return slots | {"op": op, "c": str(a + b if op == "plus" else a - b)}


def held_out(family: str, slots: dict) -> bool:
    """Whether a request belongs to the evaluation: a tenth of all combinations of family and slot values, whatever
    the phrasing. A checksum decides, so it is the same in every run, and no list of combinations is needed."""
    combination = "|".join([family] + [slots[slot] for slot in sorted(slots)])
    return zlib.crc32(combination.encode()) % 10 == 0
