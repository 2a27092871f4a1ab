"""Dialogues that something outside of the user's words decides: a system message, or a tool's result."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import talk
import tasks
import words
from dialogues import ASK_NAME, GENERIC, SHORT, Dialogue, Turn, finish, pick, rough
from exchange import Exchange, invented, normal, word

CAPS = (
    "Answer in capitals.",
    "Always answer in capital letters.",
    "Write everything in upper case.",
    "Answer only in capital letters.",
    "Use capital letters.",
    "You are a helpful assistant. Answer in capitals.",
    "Speak in capital letters.",
    "Please answer in upper case.",
)
SMALL = (
    "Answer in small letters.",
    "Always answer in lower case.",
    "Write everything in lower case.",
    "Use no capital letters.",
)


def obeyed(rng: Random) -> Dialogue:
    """A system message that changes how every answer looks, over one to three exchanges."""
    exchanges = [rough(rng, pick(rng, SHORT)) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    what = rng.randrange(6)
    keys: tuple[str, ...] = ()
    if what <= 1:
        system, skill = rng.choice(CAPS), "system: capitals"
        change = str.upper
    elif what == 2:
        system, skill = rng.choice(SMALL), "system: small letters"
        change = str.lower
    elif what == 3:
        end = word(rng)
        system = rng.choice(
            [
                f"End every answer with the word {end}.",
                f'Always end your answer with "{end}".',
                f"Finish each answer with {end}.",
            ]
        )
        skill, keys = "system: ending", (f"end|{end}",)
        change = lambda answer: f"{answer} {end}"  # noqa: E731
    elif what == 4:
        start = word(rng).capitalize()
        system = rng.choice(
            [
                f"Start every answer with the word {start}.",
                f'Always begin your answer with "{start}".',
                f"Begin each answer with {start}.",
            ]
        )
        skill, keys = "system: beginning", (f"begin|{start}",)
        change = lambda answer: f"{start}! {answer}"  # noqa: E731
    else:
        only = tasks.phrase(rng, 1, 4)
        system = rng.choice(
            [f'Answer every question with "{only}".', f'Always answer "{only}".', f'Only say "{only}".']
        )
        skill, keys = "system: fixed answer", (f"only|{only}",)
        change = lambda answer: only  # noqa: E731
    exchanges = [replace(e, answers=tuple(dict.fromkeys(change(x) for x in e.answers))) for e in exchanges]
    head = [Turn("system", system)]
    for e in exchanges[:-1]:
        head += [Turn("user", e.question), Turn("assistant", e.answers[0])]
    return finish(
        skill,
        tuple(head),
        exchanges[-1],
        (*keys, *(e.key for e in exchanges[:-1]), f"{skill}|{normal(exchanges[-1].question)}"),
    )


def named(rng: Random) -> Dialogue:
    """A system message that gives the model a name, or tells it who the user is or a fact."""
    name = rng.choice(words.NAMES) if rng.random() < 0.6 else invented(rng).capitalize()
    roll = rng.random()
    if roll < 0.6:
        system = rng.choice(
            [
                "Your name is X.",
                "You are called X.",
                "You are X.",
                "You are X, a helpful assistant.",
                "Your name is X. You are a helpful assistant.",
                "You are an assistant named X.",
            ]
        )
        topic, keep = rng.choice(
            [
                ("name", True),
                ("name", True),
                ("who", True),
                ("hello", True),
                ("hello, who", True),
                ("other", False),
                ("able", False),
            ]
        )
        e = rough(rng, talk.faq(rng, (topic,)))
        answer = {
            "name": f"My name is {name}. {talk.WHO}", "who": f"I am {name}. {talk.WHO}",
            "hello": f"Hello! I am {name}. How can I help you?",
            "hello, who": f"Hello! I am {name}. {talk.WHO}",
        }.get(topic)  # fmt: skip
        e = replace(e, answers=(answer,)) if keep and answer else e
        return finish("system: name", (Turn("system", system.replace("X", name)),), e, (f"called|{name}",))
    if roll < 0.75:
        system = rng.choice(["The user's name is X.", "You are talking to X.", "The user is called X."]).replace(
            "X", name
        )
        asked = rng.choice(ASK_NAME)
        e = Exchange("", asked, (f"Your name is {name}.",), f"user|{name}")
        return finish("system: user", (Turn("system", system),), e)
    text, question, answer = tasks.reading(rng)
    system = rng.choice(["{t}", "Use this text: {t}", "Answer from this text: {t}", "Context: {t}"]).format(t=text)
    return finish(
        "system: text", (Turn("system", system),), Exchange("", question, (answer,), f"context|{text} {question}")
    )


def tool(rng: Random) -> Dialogue:
    """A tool's result, said in a sentence."""
    city = rng.choice(words.CITIES) if rng.random() < 0.6 else invented(rng).capitalize()
    thing = rng.choice(words.THINGS) if rng.random() < 0.7 else invented(rng)
    name = rng.choice(words.NAMES) if rng.random() < 0.7 else invented(rng).capitalize()
    n = rng.randrange(10 ** rng.randint(1, 4))
    what = rng.randrange(8)
    if what <= 1:
        sky, degrees = rng.choice(words.WEATHERS), rng.randint(-9, 39)
        asked = rng.choice(
            [
                f"What is the weather in {city}?",
                f"How is the weather in {city}?",
                f"Is it warm in {city}?",
                f"Tell me the weather in {city}.",
            ]
        )
        degree, state = rng.choice(["temperature", "degrees", "temp"]), rng.choice(["condition", "weather", "sky"])
        result: object = {"city": city, degree: degrees, state: sky}
        answer = f"It is {sky} in {city}, at {degrees} degrees."
        if rng.random() < 0.25:
            result, answer = f"{sky}, {degrees} degrees", f"It is {sky} in {city}, at {degrees} degrees."
    elif what == 2:
        clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        asked = rng.choice([f"What time is it in {city}?", f"Tell me the time in {city}."])
        result, answer = (
            ({"city": city, "time": clock} if rng.random() < 0.6 else rng.choice([{"time": clock}, clock])),
            f"It is {clock} in {city}.",
        )
    elif what == 3:
        asked = rng.choice(
            [f"How much is the {thing}?", f"What does the {thing} cost?", f"What is the price of the {thing}?"]
        )
        result, answer = rng.choice([{"item": thing, "price": n}, {"price": n}, n]), f"The {thing} costs {n}."
    elif what == 4:
        asked = rng.choice([f"How many {thing}s do we have?", f"Count the {thing}s in the store."])
        result, answer = rng.choice([{"item": thing, "count": n}, {"count": n}, n]), f"There are {n} of them."
    elif what == 5:
        box = name.lower() + rng.choice(["", str(rng.randrange(100))])
        mail = f"{box}@{invented(rng)}.{rng.choice(['com', 'org', 'net'])}"
        asked = rng.choice([f"What is the email of {name}?", f"Find the email address of {name}."])
        result, answer = (
            rng.choice([{"name": name, "email": mail}, {"email": mail}, mail]),
            f"The email of {name} is {mail}.",
        )
    elif what == 6:
        x, y, sign = rng.randint(10, 9999), rng.randint(10, 9999), rng.choice("+-*/")
        asked = rng.choice([f"What is {x} {sign} {y}?", f"Calculate {x} {sign} {y}."])
        result, answer = rng.choice([{"result": n}, n, {"value": n}]), f"The result is {n}."
    else:
        asked = rng.choice(
            [f"What is the weather in {city}?", f"What does the {thing} cost?", f"What is the email of {name}?"]
        )
        message = rng.choice(["not found", "no connection", "time out", tasks.phrase(rng, 1, 4)])
        result, answer = {"error": message}, f"The tool did not work: {message}."
    text = (
        result
        if isinstance(result, str)
        else json.dumps(result, separators=rng.choice([(", ", ": "), (", ", ": "), (",", ":")]))
    )
    head: tuple[Turn, ...] = (Turn("system", rng.choice(GENERIC)),) if rng.random() < 0.2 else ()
    if rng.random() < 0.15:
        e = rough(rng, pick(rng, SHORT))
        head = (*head, Turn("user", e.question), Turn("assistant", e.answers[0]))
    turns = (*head, Turn("user", asked), Turn("tool", text), Turn("assistant", answer))
    return Dialogue("tool result", turns, (answer,), (), (f"tool|{normal(asked)} {text}",))
