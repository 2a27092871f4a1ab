"""Small talk, questions about the model and fnengine, a small table of facts, and honest ignorance.

In each row the first wording is always trained on (its key begins with `core`); the others may be held out.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import words
from exchange import Exchange, expand, invented, normal, word

WHO = "I am the small demo model of fnengine."
UNSURE = "I am a very small model, I do not know that."
TOO_HARD = "That is too hard for me. I can only add and subtract small numbers."


def sections(name: str) -> dict[str, list[str]]:
    """The lines of every `[section]` of a text file beside this one; # opens a comment."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


def _wordings(lines: list[str]) -> tuple[str, ...]:
    """What the lines that are not answers stand for."""
    return tuple(form for line in lines if not line.startswith("> ") for form in expand(line))


def _answers(lines: list[str]) -> tuple[str, ...]:
    """The answers among the lines."""
    return tuple(line[2:].replace("\\n", "\n").replace("$WHO", WHO) for line in lines if line.startswith("> "))


# topic -> (wordings, answers)
FAQ = {topic: (_wordings(lines), _answers(lines)) for topic, lines in sections("faq.txt").items()}
UNKNOWN = {name: _wordings(lines) for name, lines in sections("unknown.txt").items()}


# Questions with one wording and one answer each.
ROWS = (
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
    ("How many days are in a year?", "There are 365 days in a year."),
    ("How many fingers does a hand have?", "A hand has five fingers."),
    ("What are the days of the week?", f"The days are {', '.join(words.DAYS)}."),
    ("How many letters are in the alphabet?", "There are 26 letters."),
    ("What is the alphabet?", "a b c d e f g h i j k l m n o p q r s t u v w x y z"),
    ("Say the alphabet.", "a b c d e f g h i j k l m n o p q r s t u v w x y z"),
    ("What are the seasons?", "The seasons are spring, summer, autumn and winter."),
    ("Is the sun hot?", "Yes, the sun is very hot."),
    ("What do cows drink?", "Cows drink water."),
    ("Who wrote this story?", WHO),
    ("What do bees make?", "Bees make honey."),
)


def _key(kind: str, forms: tuple[str, ...], question: str) -> str:
    """The key of a question; the first wording of a row is never held out."""
    return f"{'core' if normal(question) == normal(forms[0]) else kind}|{normal(question)}"


def faq(rng: Random, topics: tuple[str, ...] = tuple(FAQ)) -> Exchange:
    """A question out of `FAQ`; the greeting and who it is come most often."""
    topic = rng.choice(topics + ("hello", "hello, who", "who", "name") * (3 if len(topics) == len(FAQ) else 0))
    forms, answers = FAQ[topic]
    question = forms[0] if rng.random() < 0.15 else rng.choice(forms)
    return Exchange(
        "about itself", question, tuple(sorted(answers, key=lambda _: rng.random())), _key("faq", forms, question)
    )


def _row(rng: Random, forms: tuple[str, ...], given: str, answer: str) -> Exchange:
    question = (forms[0] if rng.random() < 0.3 else rng.choice(forms)).replace("X", given)
    usual = forms[0].replace("X", given)
    return Exchange("facts", question, (answer,), f"{'core' if question == usual else 'fact'}|{normal(question)}")


def fact(rng: Random) -> Exchange:
    """A question out of the small table of facts."""
    kind = rng.randrange(9)
    if kind == 0:
        x = rng.choice(list(words.CAPITALS))
        forms = (
            *expand("{What is|Tell me|Do you know|What's} the capital{ city|} of X?"),
            "Capital of X?",
            "Which city is the capital of X?",
        )
        return _row(rng, forms, x, f"The capital of {x} is {words.CAPITALS[x]}.")
    if kind == 1:
        x = rng.choice(list(words.COLOUR_OF))
        colour = words.COLOUR_OF[x]
        forms = (
            *expand("{What colour|What color|Which colour|Which color} {is|has} X?"),
            "Tell me the colour of X.",
            "What is the colour of X?",
        )
        return _row(rng, forms, x, f"{x.capitalize()} is {colour}.")
    if kind == 2:
        x = rng.choice(list(words.SOUND_OF))
        forms = (
            "What does X say?",
            "What sound does X make?",
            "Which sound does X make?",
            "How does X sound?",
            "What noise does X make?",
        )
        return _row(rng, forms, x, f"{x.capitalize()} says {words.SOUND_OF[x]}.")
    if kind == 3:
        x, y = rng.choice(list(words.OPPOSITE.items()))
        if rng.random() < 0.5:
            x, y = y, x
        forms = (
            "What is the opposite of X?",
            "Tell me the opposite of X.",
            "Opposite of X?",
            'What is the opposite of "X"?',
            "Give me the opposite of X.",
        )
        return _row(rng, forms, x, f"The opposite of {x} is {y}.")
    if kind == 4:
        x = rng.choice(list(words.LEGS))
        forms = (
            "How many legs does X have?",
            "How many legs has X?",
            "What number of legs does X have?",
            "Tell me how many legs X has.",
        )
        return _row(rng, forms, x, f"{x.capitalize()} has {words.LEGS[x]} legs.")
    if kind == 5:
        x = rng.choice(list(words.HOMES))
        forms = ("Where does X live?", "Where can I find X?", "Tell me where X lives.", "Where is the home of X?")
        return _row(rng, forms, x, f"{x.capitalize()} lives {words.HOMES[x]}.")
    if kind == 6:
        names = rng.choice([words.DAYS, words.MONTHS])
        at, after = rng.randrange(len(names)), rng.random() < 0.6
        step = "after" if after else "before"
        what = "day" if names is words.DAYS else "month"
        forms = (
            f"What {what} comes {step} X?",
            f"Which {what} comes {step} X?",
            f"Which {what} is {step} X?",
            f"What {what} is {step} X?",
        )
        return _row(
            rng, forms, names[at], f"{names[(at + (1 if after else -1)) % len(names)]} comes {step} {names[at]}."
        )
    if kind == 7:
        question, answer = rng.choice(ROWS)
        return Exchange("facts", question, (answer,), f"core|{normal(question)}")
    pool = {
        "animal": words.ANIMALS,
        "colour": words.COLOURS,
        "city": words.CITIES,
        "food": words.FOODS,
        "name": words.NAMES,
        "number": words.NUMBERS,
    }
    x = rng.choice(list(pool))
    forms = (f"Name {_one(x)}.", f"Tell me {_one(x)}.", f"Give me {_one(x)}.", f"Can you name {_one(x)}?")
    return Exchange("facts", rng.choice(forms), tuple(rng.sample(pool[x], len(pool[x]))), f"core|any {x}")


def _one(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


PLAIN_FACTS = tuple(
    [f"The capital of {x} is {y}." for x, y in words.CAPITALS.items()]
    + [f"{x.capitalize()} is {y}." for x, y in words.COLOUR_OF.items()]
    + [f"{x.capitalize()} says {y}." for x, y in words.SOUND_OF.items()]
    + [f"The opposite of {x} is {y}." for x, y in words.OPPOSITE.items()]
    + [f"{x.capitalize()} has {y} legs." for x, y in words.LEGS.items()]
    + [f"{x.capitalize()} lives {y}." for x, y in words.HOMES.items()]
    + [
        f"{y} comes after {x}."
        for names in (words.DAYS, words.MONTHS)
        for x, y in zip(names, names[1:] + names[:1], strict=True)
    ]
)


def topic(rng: Random) -> str:
    """Something that the model was taught nothing about."""
    roll = rng.random()
    if roll < 0.2:
        return f"{invented(rng).capitalize()} {invented(rng).capitalize()}"
    if roll < 0.45:
        return rng.choice(UNKNOWN["field"])
    if roll < 0.6:
        return f"the {rng.choice(words.PLAIN)} {word(rng)}"
    if roll < 0.8:
        return rng.choice(words.UNKNOWN_COUNTRIES + words.CITIES)
    return rng.choice(UNKNOWN["thing"])


def unknown(rng: Random) -> Exchange:
    """A question that it cannot answer, and says so."""
    roll = rng.random()
    if roll < 0.12:
        question = f"What is the capital of {rng.choice(words.UNKNOWN_COUNTRIES)}?"
    elif roll < 0.24:
        x, y, sign = (
            rng.randint(100, 9999),
            rng.randint(2, 9999),
            rng.choice(["+", "-", "*", "/", "times", "divided by", "plus", "minus", "x"]),
        )
        if rng.random() < 0.4:
            x, y, sign = rng.randint(2, 99), rng.randint(2, 99), rng.choice(["*", "/", "times", "divided by", "x"])
        question = rng.choice(["What is {}?", "{}", "How much is {}?", "Calculate {}."]).format(f"{x} {sign} {y}")
        return Exchange("unknown", question, (TOO_HARD,), f"hard|{x} {sign} {y}")
    elif roll < 0.32:
        question = " ".join(invented(rng) for _ in range(rng.randint(1, 5)))
    else:
        question = rng.choice(UNKNOWN["question"]).replace("X", topic(rng))
    return Exchange("unknown", question, (UNSURE,), f"unknown|{normal(question)}")


def liking(rng: Random) -> Exchange:
    """The user likes something, and the model takes it up."""
    thing = rng.choice(
        words.FOODS
        + tuple(f"{a}s" for a in words.ANIMALS if a not in ("mouse", "sheep", "deer", "fox", "wolf", "goose"))
        + ("music", "books", "rain", "snow", "the sea", "stories")
    )
    return Exchange(
        "small talk",
        rng.choice([f"I like {thing}.", f"I love {thing}.", f"I really like {thing}!"]),
        (f"It is nice that you like {thing}!",),
        f"like|{thing}",
    )
