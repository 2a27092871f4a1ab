"""Whole dialogues: single questions, stories on request, several turns, memory of what was said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import stories
import talk
import tasks
import words
from exchange import Exchange, invented, normal, roughen

Maker = Callable[[Random], Exchange]


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str  # system, user, assistant or tool
    text: str


@dataclass(frozen=True)
class Dialogue:
    """Messages of which the last is the assistant's, with what else counts as right there."""

    skill: str
    turns: tuple[Turn, ...]
    answers: tuple[str, ...]
    mentions: tuple[str, ...]
    keys: tuple[str, ...]  # held out when any of them is


GENERIC = (
    "You are a helpful assistant.",
    "You are a helpful and honest assistant.",
    "You are the demo model of fnengine.",
    "Be brief.",
    "You are a friendly assistant.",
    "Answer the user's questions.",
    "You are a helpful AI assistant. Answer in simple English.",
    "You are a chatbot.",
    "Be polite.",
    "Help the user.",
    "You are an assistant.",
)

# (how to make one, how often)
TASKS: tuple[tuple[Maker, float], ...] = (
    (tasks.repeat, 12), (tasks.capitals, 10), (tasks.small_letters, 3), (tasks.spell, 8), (tasks.first_letter, 3),
    (tasks.pick_word, 5), (tasks.reverse, 7), (tasks.count, 5), (tasks.times, 4), (tasks.listing, 4), (tasks.swap, 5),
    (tasks.has_word, 4), (tasks.sort_of, 4), (tasks.add, 12), (tasks.larger, 3), (tasks.counting, 3), (tasks.read, 8),
    (tasks.record, 2),
)  # fmt: skip
TALK: tuple[tuple[Maker, float], ...] = ((talk.faq, 13), (talk.fact, 7), (talk.unknown, 6), (talk.liking, 0.7))
SINGLE = TASKS + TALK
SHORT = (
    (talk.faq, 10.0),
    (talk.fact, 5.0),
    (talk.unknown, 4.0),
    (talk.liking, 1.0),
    (tasks.add, 2.0),
    (tasks.repeat, 2.0),
    (tasks.spell, 0.5),
    (tasks.reverse, 0.5),
)


def pick(rng: Random, table: tuple[tuple[Maker, float], ...]) -> Exchange:
    """An exchange from one of the makers of `table`."""
    return rng.choices([m for m, _ in table], [w for _, w in table])[0](rng)


def rough(rng: Random, e: Exchange) -> Exchange:
    """`e` as typed in a hurry, where that leaves the answer as it is."""
    return (
        replace(e, question=roughen(rng, e.question))
        if e.skill in ("about itself", "facts", "unknown", "small talk", "add", "subtract")
        else e
    )


def single(rng: Random) -> Dialogue:
    """One question and its answer, at times under a system message that changes nothing."""
    e = rough(rng, pick(rng, SINGLE))
    head = (Turn("system", rng.choice(GENERIC)),) if rng.random() < 0.2 else ()
    return finish(e.skill, head, e)


def finish(skill: str, head: tuple[Turn, ...], e: Exchange, keys: tuple[str, ...] = ()) -> Dialogue:
    """The dialogue `head` followed by `e`."""
    turns = (*head, Turn("user", e.question), Turn("assistant", e.answers[0]))
    return Dialogue(skill, turns, e.answers, e.mentions, (*keys, e.key))


def story_key(made: stories.Story) -> str:
    """The key under which stories are held out: the hero."""
    return f"story|{made.cast.hero.kind} {made.cast.hero.name}"


def tale(rng: Random) -> Exchange:
    """A story on request, with what was asked for in it."""
    style = rng.randrange(6)
    if style == 0:
        made = stories.story(rng)
        asked = rng.choice(
            [
                "Tell me a story.",
                "Please tell me a story.",
                "Tell me a short story.",
                "Write a story.",
                "Can you tell me a story?",
                "A story, please.",
            ]
        )
        return Exchange("story", asked, (made.text,), story_key(made), mentions=("one", "."))
    name = rng.choice(words.NAMES) if rng.random() < 0.75 else invented(rng).capitalize()
    if style in (1, 2):
        being = stories.being(rng, name)
        made = stories.story(rng, stories.cast(rng, name, being.kind))
        asked = rng.choice(
            [
                "Tell me a story about X.",
                "Write a story about X.",
                "Please tell me a story about X.",
                "Can you tell me a story about X?",
            ]
        )
        given = rng.choice(
            [
                f"{stories.a(being.kind)} named {name}",
                f"{stories.a(being.kind)} called {name}",
                f"{name} the {being.kind}",
            ]
        )
        return Exchange("story", asked.replace("X", given), (made.text,), story_key(made), mentions=(name, being.kind))
    if style == 3:
        kind = rng.choice(words.ANIMALS + words.PEOPLE)
        made = stories.story(rng, stories.cast(rng, kind=kind))
        asked = rng.choice(
            [
                f"Tell me a story about {stories.a(kind)}.",
                f"Write a story about {stories.a(kind)}.",
                f"A story about {stories.a(kind)}, please.",
            ]
        )
        return Exchange("story", asked, (made.text,), story_key(made), mentions=(kind,))
    if style == 4:
        made = stories.story(rng, stories.cast(rng, name))
        asked = rng.choice(
            [
                f"Tell me a story about {name}.",
                f"Write a short story about {name}.",
                f"Do you know a story about {name}?",
            ]
        )
        return Exchange("story", asked, (made.text,), story_key(made), mentions=(name,))
    thing, place = rng.choice(words.THINGS), rng.choice(words.PLACES)
    made = stories.story(rng, stories.cast(rng, place=place, thing=thing), rng.choice(stories.USES_THING))
    asked, must = rng.choice([
        (f"Tell me a story about {stories.a(thing)}.", (thing,)),
        (f"Tell me a story about a lost {thing}.", (thing,)),
        (f"Tell me a story with {stories.a(thing)} and {stories.a(place)}.", (thing, place)),
    ])  # fmt: skip
    if "lost" in asked:
        made = stories.story(rng, stories.cast(rng, place=place, thing=thing), "lost")
    return Exchange("story", asked, (made.text,), story_key(made), mentions=must)


def storytelling(rng: Random) -> Dialogue:
    """A story on request."""
    head = (Turn("system", rng.choice(GENERIC)),) if rng.random() < 0.15 else ()
    return finish("story", head, tale(rng))


def continued(rng: Random) -> Dialogue:
    """A story whose beginning the user gives; the assistant goes on from there."""
    made = stories.story(rng)
    parts = made.text.split(". ")
    cut = rng.randint(1, min(5, len(parts) - 2))
    begin, rest = ". ".join(parts[:cut]) + ".", ". ".join(parts[cut:])
    asked = rng.choice(
        [
            "Continue this story: X",
            "Go on with this story: X",
            "Finish this story: X",
            "What happens next? X",
            "Continue: X",
        ]
    )
    e = Exchange("continue", asked.replace("X", begin), (rest,), story_key(made), mentions=(made.cast.hero.name,))
    return finish("continue", (), e)


def chat(rng: Random) -> Dialogue:
    """Several unrelated exchanges in a row."""
    exchanges = [rough(rng, pick(rng, SHORT if rng.random() < 0.7 else SINGLE)) for _ in range(rng.randint(2, 6))]
    if rng.random() < 0.2:
        exchanges[rng.randrange(len(exchanges))] = tale(rng)
    head: list[Turn] = [Turn("system", rng.choice(GENERIC))] if rng.random() < 0.2 else []
    for e in exchanges[:-1]:
        head += [Turn("user", e.question), Turn("assistant", e.answers[0])]
    return finish("several turns", tuple(head), exchanges[-1], tuple(e.key for e in exchanges[:-1]))


TELL_NAME = (
    "My name is X.",
    "I am X.",
    "Hi, I am X.",
    "Hello, my name is X.",
    "Hello! I'm X.",
    "You can call me X.",
    "Please call me X.",
    "I'm X.",
    "my name is X",
    "hi, i am X",
)
ASK_NAME = (
    "What is my name?",
    "Do you remember my name?",
    "What's my name?",
    "Who am I?",
    "Can you tell me my name?",
    "Do you know my name?",
    "Say my name.",
)


def remembered(rng: Random) -> tuple[Exchange, Exchange, Exchange]:
    """(the user says something about themselves, asks for it later, asks without having said it)."""
    what = rng.randrange(6)
    key = "memory"
    if what <= 2:
        x = rng.choice(words.NAMES) if rng.random() < 0.6 else invented(rng).capitalize()
        told, asked, never = rng.choice(TELL_NAME), rng.choice(ASK_NAME), "You have not told me your name yet."
        said, answer = f"Nice to meet you, {x}!", f"Your name is {x}."
    elif what == 3:
        x = rng.choice(words.COLOURS)
        told, asked, never = (
            "My favourite colour is X.",
            "What is my favourite colour?",
            "You have not told me that yet.",
        )
        said, answer = f"{x.capitalize()} is a nice colour.", f"Your favourite colour is {x}."
    elif what == 4:
        x = str(rng.randint(3, 99))
        told, asked, never = (
            rng.choice(["I am X years old.", "My age is X."]),
            rng.choice(["How old am I?", "What is my age?"]),
            "You have not told me that yet.",
        )
        said, answer = "Thank you for telling me.", f"You are {x} years old."
    else:
        x = rng.choice(words.CITIES) if rng.random() < 0.6 else invented(rng).capitalize()
        told, asked, never = (
            rng.choice(["I live in X.", "I come from X.", "I am from X."]),
            rng.choice(["Where do I live?", "Where am I from?"]),
            "You have not told me that yet.",
        )
        said, answer = (
            f"I hope that {x} is a nice place.",
            f"You live in {x}." if "I live" in told else f"You are from {x}.",
        )
        asked = "Where do I live?" if "I live" in told else "Where am I from?"
    told = told.replace("X", x)
    return (
        Exchange(key, told, (said,), f"memory|{normal(told)}"),
        Exchange(key, asked, (answer,), f"memory|{normal(asked)} {x.lower()}"),
        Exchange(key, asked, (never,), f"never|{normal(asked)}"),
    )


def memory(rng: Random) -> Dialogue:
    """The user's own facts, asked for after zero to four other exchanges."""
    told, asked, never = remembered(rng)
    between = [
        rough(rng, pick(rng, SHORT if rng.random() < 0.8 else SINGLE)) for _ in range(rng.choice([0, 0, 1, 1, 2, 3, 4]))
    ]
    before = [rough(rng, pick(rng, SHORT))] if rng.random() < 0.3 else []
    if rng.random() < 0.12:
        path, last, skill = [*before, *between], never, "never told"
    else:
        path, last, skill = [*before, told, *between], asked, "memory"
        if rng.random() < 0.25:
            other, asked_other, _ = remembered(rng)
            if asked_other.question != asked.question and asked_other.answers[0][:8] != asked.answers[0][:8]:
                path.insert(rng.randint(0, len(path)), other)
    head: list[Turn] = [Turn("system", rng.choice(GENERIC))] if rng.random() < 0.15 else []
    for e in path:
        head += [Turn("user", e.question), Turn("assistant", e.answers[0])]
    return finish(skill, tuple(head), last, tuple(e.key for e in path if e.skill != "memory"))
