"""Questions whose answer can be read or worked out from the question: word games, small sums, reading, JSON."""

from __future__ import annotations

import json
from random import Random

import stories
import words
from exchange import Exchange, expand, invented, odd, word


def phrase(rng: Random, low: int, high: int) -> str:
    """`low` to `high` lower-case words."""
    return " ".join(word(rng) for _ in range(rng.randint(low, high)))


def passage(rng: Random) -> str:
    """Text to copy: a few words of any sort, or sentences out of a story."""
    if rng.random() < 0.25:
        sentences = stories.story(rng).text.split(". ")
        at = rng.randrange(len(sentences))
        return ". ".join(sentences[at : at + rng.randint(1, 2)])
    text = " ".join(odd(rng) for _ in range(min(rng.randint(1, 12), rng.randint(1, 20))))
    return text.capitalize() + rng.choice(".!?") if rng.random() < 0.25 else text


def ask(rng: Random, skill: str, forms: tuple[str, ...], given: str, answer: str, key: str | None = None) -> Exchange:
    """An exchange in one of the wordings `forms`, where X stands for what is given."""
    key = key or given
    return Exchange(
        skill, rng.choice(forms).replace("X", given), (answer,), key if key.startswith("core|") else f"{skill}|{key}"
    )


REPEAT = (
    *expand("{Please repeat|Repeat|Say|Copy|Echo|Write} this: X"),
    *expand("{Repeat|Repeat after me|Say|Copy|Echo|Please repeat}: X"),
    *expand('{Repeat|Say|Please say|Write|Copy} "X"'),
    "Repeat exactly what I say: X",
    'Can you say "X"?',
    'Please say "X".',
)


def repeat(rng: Random) -> Exchange:
    """Say the text again, unchanged."""
    text = passage(rng)
    return ask(rng, "repeat", REPEAT, text, text)


UPPER = (
    *expand("{Say|Write|Repeat|Put} X in {capitals|capital letters|upper case}"),
    *expand("{Capitals|Upper case|In capital letters}: X"),
    *expand('{Say|Write} "X" in {capitals|capital letters}.'),
    "Make this upper case: X",
    "Write this in capitals: X",
)
LOWER = (
    *expand("{Say|Write|Put} X in {small letters|lower case}"),
    "Make this lower case: X",
    "Lower case: X",
    "Write this in small letters: X",
)


def capitals(rng: Random) -> Exchange:
    """The text in upper case."""
    text = phrase(rng, 1, 6) if rng.random() < 0.8 else rng.choice(words.NAMES)
    return ask(rng, "capitals", UPPER, text, text.upper())


def small_letters(rng: Random) -> Exchange:
    """The text in lower case."""
    text = phrase(rng, 1, 4)
    return ask(rng, "lower case", LOWER, text.upper(), text)


SPELL = (
    *expand("{Spell|Please spell|Spell the word|How do you spell|Can you spell} X{?|}"),
    "Spell this word: X",
    'Spell "X".',
)


def spell(rng: Random) -> Exchange:
    """The letters of a word."""
    text = word(rng)
    return ask(rng, "spell", SPELL, text, "-".join(text))


def first_letter(rng: Random) -> Exchange:
    """The first or the last letter of a word."""
    text, which = word(rng), rng.choice(["first", "last"])
    forms = (
        f"What is the {which} letter of X?",
        f'What is the {which} letter of the word "X"?',
        f"Tell me the {which} letter of X.",
    )
    return ask(rng, "letter", forms, text, text[0 if which == "first" else -1], f"{which} {text}")


def pick_word(rng: Random) -> Exchange:
    """The first, second or last word of a phrase."""
    items = [odd(rng) for _ in range(rng.randint(3, 8))]
    which = rng.choice(["first", "last", "second"])
    text = " ".join(items)
    forms = (f"What is the {which} word of: X", f'What is the {which} word of "X"?', f"{which.capitalize()} word of X",
             f"Tell me the {which} word: X", f"Give me the {which} word of this: X")  # fmt: skip
    return ask(rng, "pick a word", forms, text, items[{"first": 0, "second": 1, "last": -1}[which]], f"{which} {text}")


REVERSE = (
    *expand("{Reverse|Turn around} the {order of the words|words}: X"),
    "Say the words in reverse order: X",
    'Reverse the words of "X".',
    "Reverse the order of the words in: X",
    "Say these words backwards: X",
)


def reverse(rng: Random) -> Exchange:
    """The words from last to first."""
    items = [word(rng) for _ in range(rng.randint(2, 7))]
    return ask(rng, "reverse", REVERSE, " ".join(items), " ".join(reversed(items)))


COUNT = (
    *expand("{Count the words|How many words are there|How many words are in this}: X"),
    'How many words are in "X"?',
    "Count the words in: X",
)


def count(rng: Random) -> Exchange:
    """How many words a phrase has."""
    n = rng.randint(1, 10)
    text = " ".join(word(rng) for _ in range(n))
    return ask(rng, "count words", COUNT, text, "There is 1 word." if n == 1 else f"There are {n} words.")


def times(rng: Random) -> Exchange:
    """A word or two, said several times."""
    text, n = phrase(rng, 1, 2), rng.randint(2, 5)
    said = {2: rng.choice(["twice", "two times", "2 times"]), 3: rng.choice(["three times", "3 times"])}
    much = said.get(n) or rng.choice([f"{words.NUMBERS[n]} times", f"{n} times"])
    forms = (f"Say X {much}", f'Say "X" {much}.', f"Repeat X {much}", f"Write X {much}")
    return ask(rng, "say n times", forms, text, " ".join([text] * n), f"{n} {text}")


def listing(rng: Random) -> Exchange:
    """The words as a list, with dashes, numbers or commas."""
    items = [odd(rng) for _ in range(rng.randint(2, 6))]
    style = rng.choice(["list", "numbered list", "commas"])
    given = rng.choice([" ", ", "]).join(items) if style != "commas" else " ".join(items)
    forms = (f"Make a {style} of: X", f"Turn this into a {style}: X", f"Write these words as a {style}: X")
    if style == "commas":
        forms = ("Put commas between the words: X", "Join these words with commas: X")
    answer = {
        "list": "\n".join(f"- {item}" for item in items),
        "numbered list": "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
        "commas": ", ".join(items),
    }[style]
    return ask(rng, "list", forms, given, answer, f"{style} {' '.join(items)}")


def swap(rng: Random) -> Exchange:
    """A phrase with one word replaced by another."""
    items = list(dict.fromkeys(word(rng) for _ in range(rng.randint(3, 7))))
    old, new = rng.choice(items), word(rng)
    text = " ".join(items)
    forms = (
        f"Replace {old} with {new}: X",
        f"Replace {old} with {new} in: X",
        f'Change "{old}" to "{new}": X',
        f"Swap {old} for {new} in this: X",
    )
    return ask(
        rng, "replace", forms, text, " ".join(new if item == old else item for item in items), f"{old} {new} {text}"
    )


def has_word(rng: Random) -> Exchange:
    """Whether a word is among others."""
    items = list(dict.fromkeys(word(rng) for _ in range(rng.randint(3, 7))))
    there = rng.random() < 0.5
    asked = rng.choice(items) if there else word(rng)
    while not there and asked in items:
        asked = word(rng)
    text = " ".join(items)
    forms = (f"Is {asked} in this list: X", f'Is the word "{asked}" in: X', f"Does this contain {asked}? X")
    answer = f"Yes, {asked} is there." if there else f"No, {asked} is not there."
    return ask(rng, "find", forms, text, answer, f"{asked} {text}")


def sort_of(rng: Random) -> Exchange:
    """Which of three words is an animal, a colour, a food or a city."""
    kinds = {
        "an animal": words.ANIMALS,
        "a colour": words.COLOURS,
        "a city": words.CITIES,
        "a person's name": words.NAMES,
        "a thing": words.THINGS,
    }
    kind = rng.choice(list(kinds))
    others = [k for k in kinds if k != kind]
    right = rng.choice(kinds[kind])
    items = [right, *(rng.choice(kinds[k]) for k in rng.sample(others, 2))]
    rng.shuffle(items)
    forms = (f"Which one is {kind}: X?", f"Which of these is {kind}? X", f"Which word is {kind}: X")
    return ask(rng, "which one", forms, ", ".join(items), right, f"{kind} {' '.join(items)}")


def add(rng: Random) -> Exchange:
    """A sum or a difference of small numbers; those of one digit are never held out."""
    top = rng.choice([10, 20, 20, 100])
    x, y = rng.randrange(top), rng.randrange(top)
    minus = rng.random() < 0.4
    if minus:
        x, y = max(x, y), min(x, y)
    key = f"core|{x} {y}" if max(x, y) < 10 else f"{x} {y}"
    sign, result = ("-", x - y) if minus else ("+", x + y)
    named = "minus" if minus else "plus"
    bare = (f"{x} {sign} {y}", f"{x}{sign}{y}", f"{x} {sign} {y} =", f"{x}{sign}{y}=?")
    forms = (
        *bare,
        f"What is {x} {sign} {y}?",
        f"What is {x}{sign}{y}?",
        f"What is {x} {named} {y}?",
        f"How much is {x} {sign} {y}?",
        f"Calculate {x} {sign} {y}.",
    )
    if not minus:
        forms += (f"Add {x} and {y}.",)
    return ask(rng, "subtract" if minus else "add", forms, "", f"{x} {sign} {y} = {result}", key)


def larger(rng: Random) -> Exchange:
    """The larger or the smaller of two numbers."""
    top = rng.choice([10, 100, 100, 1000])
    x, y = rng.sample(range(top), 2)
    which = rng.choice(["larger", "bigger", "smaller"])
    answer = min(x, y) if which == "smaller" else max(x, y)
    forms = (f"Which is {which}, {x} or {y}?", f"Which number is {which}: {x} or {y}?", f"What is {which}, {x} or {y}?")
    return ask(rng, "compare", forms, "", f"{answer} is {which}.", f"{which} {x} {y}")


def counting(rng: Random) -> Exchange:
    """Counting from one number to another; from one it is never held out."""
    start = rng.choice([1, 1, 1, rng.randrange(0, 40)])
    stop = start + rng.randint(2, 12)
    down = rng.random() < 0.25
    run = range(stop, start - 1, -1) if down else range(start, stop + 1)
    low, high = (stop, start) if down else (start, stop)
    forms = (
        f"Count from {low} to {high}.",
        f"Please count from {low} to {high}.",
        f"Can you count from {low} to {high}?",
    )
    if start == 1 and not down:
        forms += (f"Count to {stop}.", f"Can you count to {stop}?")
    return ask(
        rng, "count up", forms, "", ", ".join(str(n) for n in run), f"{'core|' if start == 1 else ''}{low} {high}"
    )


def owner(rng: Random) -> tuple[str, str, str, str]:
    """(sentence, question, answer, person) about who has, is or lives where."""
    name = rng.choice(words.NAMES) if rng.random() < 0.8 else invented(rng).capitalize()
    he = "he" if name in words.HE else "she"
    what = rng.randrange(5)
    thing = stories.a(rng.choice(words.COLOURS + words.SIZES)) + " " + (rng.choice(words.THINGS))
    city = rng.choice(words.CITIES) if rng.random() < 0.7 else invented(rng).capitalize()
    if what == 0:
        return f"{name} has {thing}.", f"What does {name} have?", f"{name} has {thing}.", name
    if what == 1:
        return f"{name} lives in {city}.", f"Where does {name} live?", f"{name} lives in {city}.", name
    if what == 2:
        age = rng.randint(2, 99)
        return f"{name} is {age} years old.", f"How old is {name}?", f"{name} is {age} years old.", name
    if what == 3:
        like = rng.choice(words.FOODS) if rng.random() < 0.7 else invented(rng)
        return f"{name} likes {like}.", f"What does {name} like?", f"{name} likes {like}.", name
    job = stories.a(rng.choice(words.PEOPLE))
    return (
        f"{name} is {job} and {he} works in the {(place := rng.choice(words.PLACES))}.",
        f"Where does {name} work?",
        f"{name} works in the {place}.",
        name,
    )


def reading(rng: Random) -> tuple[str, str, str]:
    """(text, question, answer) with two to five people, each with one fact."""
    facts: list[tuple[str, str, str, str]] = []
    while len(facts) < rng.randint(2, 5):
        fact = owner(rng)
        if fact[3] not in {f[3] for f in facts}:
            facts.append(fact)
    text = " ".join(f[0] for f in facts)
    _, question, answer, _ = rng.choice(facts)
    if rng.random() < 0.12:
        stranger = owner(rng)
        if stranger[3] not in {f[3] for f in facts}:
            return text, stranger[1], "The text does not say that."
    return text, question, answer


def read(rng: Random) -> Exchange:
    """A question about a short text."""
    text, question, answer = reading(rng)
    form = rng.choice(["{t} {q}", "{t}\n{q}", "{t}\n\n{q}", "Read this: {t} {q}", "Text: {t}\nQuestion: {q}"])
    return Exchange("reading", form.format(t=text, q=question), (answer,), f"reading|{text} {question}")


def record(rng: Random) -> Exchange:
    """The facts of a sentence as a JSON object."""
    name = rng.choice(words.NAMES) if rng.random() < 0.7 else invented(rng).capitalize()
    city = rng.choice(words.CITIES) if rng.random() < 0.7 else invented(rng).capitalize()
    age = rng.randint(1, 99)
    fields: dict[str, object] = {"name": name, "age": age, "city": city}
    keys = rng.choice([("name", "age", "city"), ("name", "age"), ("name", "city")])
    fields = {key: fields[key] for key in keys}
    middle = " and ".join({"age": f"is {age} years old", "city": f"lives in {city}"}[key] for key in keys[1:])
    forms = (
        "Give me JSON: X",
        "Turn this into JSON: X",
        "Write this as JSON: X",
        "Extract the facts as JSON: X",
        f"JSON with {' and '.join(keys)}: X",
    )
    return ask(rng, "json", forms, f"{name} {middle}.", json.dumps(fields))
