"""One question with its accepted answers, and small tools for building many of them."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from random import Random

import words


@dataclass(frozen=True)
class Exchange:
    """A user's turn and the answers that count as right."""

    skill: str
    question: str
    answers: tuple[str, ...]
    key: str  # what the question is about, whatever its wording: the unit that is held out
    mentions: tuple[str, ...] = ()  # if given, an answer is right when it contains all of these instead


def expand(pattern: str) -> tuple[str, ...]:
    """Every string of a pattern such as `{Hi|Hello} there{!|}`, in order."""
    parts = [part[1:-1].split("|") if part.startswith("{") else [part] for part in re.split(r"(\{[^}]*\})", pattern)]
    return tuple("".join(choice) for choice in itertools.product(*parts))


def normal(text: str) -> str:
    """`text` in lower case with single spaces and no closing punctuation, for keys."""
    return " ".join(re.sub(r"[.,!?;:\"']", " ", text.lower()).split())


def roughen(rng: Random, question: str) -> str:
    """The question as somebody in a hurry may type it; its normal form stays the same."""
    roll = rng.random()
    if roll < 0.62:
        return question
    if roll < 0.74:
        return question.lower()
    if roll < 0.86:
        return question.rstrip("?.!")
    if roll < 0.97:
        return question.lower().rstrip("?.!")
    return question + rng.choice([" ", "!", "??", "\n"])


def invented(rng: Random) -> str:
    """A word that may not exist, of one to four syllables."""
    starts = [
        "b",
        "c",
        "d",
        "f",
        "g",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "w",
        "z",
        "bl",
        "br",
        "ch",
        "cl",
        "cr",
        "dr",
        "fl",
        "fr",
        "gl",
        "gr",
        "pl",
        "pr",
        "sh",
        "sk",
        "sl",
        "sp",
        "st",
        "th",
        "tr",
    ]
    ends = ["", "", "", "n", "r", "s", "t", "l", "m", "ck", "nd", "st", "ng", "x", "p"]
    return "".join(
        rng.choice(starts) + rng.choice("aeiouy") + rng.choice(ends) for _ in range(rng.choice([1, 2, 2, 2, 3, 3, 4]))
    )


LOWER_WORDS = tuple(dict.fromkeys(words.PLAIN + words.THINGS + words.ANIMALS + words.COLOURS + words.PLACES))


def word(rng: Random) -> str:
    """A lower-case word, known or invented."""
    return rng.choice(LOWER_WORDS) if rng.random() < 0.6 else invented(rng)


def odd(rng: Random) -> str:
    """A token of any sort: word, name, number, code, accented word."""
    roll = rng.random()
    if roll < 0.62:
        return word(rng)
    if roll < 0.74:
        return rng.choice(words.NAMES + words.CITIES)
    if roll < 0.80:
        return invented(rng).capitalize()
    if roll < 0.88:
        return str(rng.randrange(10 ** rng.randint(1, 6)))
    if roll < 0.93:
        return "".join(
            rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ0123456789-_./")
            for _ in range(rng.randint(2, 8))
        )
    if roll < 0.97:
        return word(rng).upper()
    return rng.choice(words.ACCENTED)
