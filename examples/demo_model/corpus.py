"""The training text of the demo model: an endless, seeded stream of documents, and the rule for what is held out.

All of it comes from this folder and the seed. A document is held out (never trained on, used for the scores) when the
hash of one of its keys says so; the keys name what a question is about, whatever its wording.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import dialogues
import stories
import systems
import talk
from dialogues import Dialogue, Turn
from exchange import word

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Document:
    """A piece of training text."""

    text: str
    keys: tuple[str, ...]


def held_out(keys: tuple[str, ...]) -> bool:
    """Whether a document with these keys is kept from training."""
    for key in keys:
        if key and not key.startswith("core|"):
            digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
            if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0:
                return True
    return False


def render(turns: tuple[Turn, ...]) -> str:
    """The turns as the chat template writes them (evaluate.py checks that it does)."""
    return "".join(f"{IM_START}{turn.role}\n{turn.text}{IM_END}\n" for turn in turns)


def plain_story(rng: Random) -> Document:
    """A story without any chat around it, one in ten of them from the middle on."""
    made = stories.story(rng)
    text = made.text
    if rng.random() < 0.1:
        parts = text.split(". ")
        text = ". ".join(parts[rng.randrange(len(parts) // 2) :])
    return Document(text, (dialogues.story_key(made),))


def plain_facts(rng: Random) -> Document:
    """A few facts one after the other, or a counted row."""
    if rng.random() < 0.25:
        start = rng.randrange(50)
        return Document(", ".join(str(n) for n in range(start, start + rng.randint(5, 30))), ())
    return Document(rng.choice([" ", "\n"]).join(rng.sample(talk.PLAIN_FACTS, rng.randint(1, 8))), ())


def word_forms(rng: Random) -> Document:
    """Words in their forms, such as `goat = GOAT = g-o-a-t = Goat`: what the tokenizer hides and copying needs."""
    chosen = [word(rng) for _ in range(rng.randint(1, 6))]
    lines = []
    for item in chosen:
        forms = [item, item.upper(), "-".join(item), item.capitalize()]
        rng.shuffle(forms)
        lines.append(" = ".join(forms))
    keys = tuple(f"{skill}|{item}" for item in chosen for skill in ("spell", "capitals", "lower case"))
    return Document("\n".join(lines), keys)


def questions(rng: Random) -> Document:
    """Questions and answers as plain lines."""
    exchanges = [dialogues.pick(rng, dialogues.SINGLE) for _ in range(rng.randint(2, 5))]
    ask, answer = rng.choice([("Q: ", "A: "), ("Question: ", "Answer: "), ("User: ", "Assistant: ")])
    return Document(
        "\n".join(f"{ask}{e.question}\n{answer}{e.answers[0]}" for e in exchanges), tuple(e.key for e in exchanges)
    )


def long_chat(rng: Random) -> Dialogue:
    """A chat of many turns, so that long contexts are seen too."""
    parts = [dialogues.memory(rng), *(dialogues.chat(rng) for _ in range(rng.randint(3, 6)))]
    turns = parts[0].turns + tuple(turn for part in parts[1:] for turn in part.turns if turn.role != "system")
    return Dialogue("long chat", turns, parts[-1].answers, (), tuple(key for part in parts for key in part.keys))


# (how to make one, how often)
DIALOGUES: tuple[tuple[Callable[[Random], Dialogue], float], ...] = (
    (dialogues.single, 1.25),
    (dialogues.storytelling, 0.042),
    (dialogues.continued, 0.010),
    (dialogues.chat, 0.045),
    (dialogues.memory, 0.075),
    (systems.obeyed, 0.12),
    (systems.named, 0.055),
    (systems.tool, 0.055),
    (long_chat, 0.004),
)
PLAIN: tuple[tuple[Callable[[Random], Document], float], ...] = (
    (plain_story, 0.04),
    (plain_facts, 0.015),
    (word_forms, 0.11),
    (questions, 0.015),
)


def candidates(rng: Random) -> Iterator[Document | Dialogue]:
    """Documents and dialogues without end, held-out ones among them."""
    makers = [maker for maker, _ in (*DIALOGUES, *PLAIN)]
    weights = [weight for _, weight in (*DIALOGUES, *PLAIN)]
    while True:
        yield rng.choices(makers, weights)[0](rng)


def documents(seed: int) -> Iterator[str]:
    """Training documents without end, the same for the same seed."""
    for made in candidates(Random(seed)):
        if not held_out(made.keys):
            yield (made.text if isinstance(made, Document) else render(made.turns)) + END
