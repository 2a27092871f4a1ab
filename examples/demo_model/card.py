"""The model card of the bundled demo model, as text."""

from __future__ import annotations

import textwrap
from pathlib import Path

import corpus
from dialogues import Dialogue, Turn


def _asked(*texts: str) -> Dialogue:
    """A dialogue whose last user turn is to be answered; texts alternate between user and assistant."""
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Dialogue("", (*turns, Turn("assistant", "")), (), (), ())


EXAMPLES = (
    _asked("Hello! Who are you?"),
    _asked("What can you do?"),
    _asked("Tell me a story about a fox named Wilma."),
    _asked("Say good morning everyone in capitals"),
    _asked("Hi, I am Quentin.", "Nice to meet you, Quentin!", "What is 7 + 8?", "7 + 8 = 15", "What is my name?"),
    _asked("Who painted the ceiling of the Sistine Chapel?"),
)
ABOUT = {
    "repeat": "say a text again unchanged",
    "capitals": "write one to six words, known or invented, in capitals",
    "reverse": "two to seven words from last to first",
    "reading": "a question about two to five sentences",
    "add": "sums with a number of ten to ninety-nine in them",
    "subtract": "differences of the same",
    "count up": "count between two numbers, not from one",
    "story": "a story that names what was asked for and ends by itself",
    "continue": "a continuation that names the hero and ends by itself",
    "unknown": "says that it does not know",
    "memory": "what the user said earlier, zero to four turns ago",
    "about itself": "other wordings of questions about itself, fnengine, small talk",
    "compare": "the larger or smaller of two numbers",
    "count words": "one to ten words",
    "facts": "other wordings of questions about capitals, colours, animals, opposites, days",
    "find": "whether a word is in a list",
    "json": "name, age and city of a sentence as JSON",
    "letter": "the first or last letter of a word",
    "list": "words as a list with dashes, numbers or commas",
    "lower case": "one to four words from capitals to small letters",
    "long chat": "the last question of a chat of up to 1,024 tokens",
    "pick a word": "the first, second or last word",
    "replace": "one word of a phrase by another",
    "say n times": "a word or two, two to five times",
    "small talk": "takes up what the user likes",
    "spell": "the letters of a word, known or invented",
    "system: beginning": "every answer begins with a given word",
    "system: capitals": "answers in capitals",
    "system: ending": "every answer ends with a given word",
    "system: fixed answer": "every answer is the given one",
    "system: name": "has the name that it was given",
    "system: small letters": "answers in small letters",
    "system: user": "the user's name is in the system message",
    "which one": "the animal, city, colour, name or thing among three words",
    "never told": "says that the user has not said it",
    "several turns": "the last of two to six unrelated questions",
    "tool result": "says a tool's result in a sentence",
    "system: text": "a question about a text in the system message",
}


def asked(dialogue: Dialogue) -> str:
    """What the user said in all turns."""
    return " / ".join(turn.text for turn in dialogue.turns if turn.role == "user")


def table(greedy: dict[str, tuple[int, int]], sampled: dict[str, tuple[int, int]] | None) -> str:
    """The scores as a Markdown table."""
    lines = ["| skill | what | greedy | sampled |", "| --- | --- | --- | --- |"]
    for skill, (good, count) in greedy.items():
        other = f"{sampled[skill][0]}/{sampled[skill][1]}" if sampled and skill in sampled else ""
        lines.append(f"| {skill} | {ABOUT.get(skill, '')} | {good}/{count} | {other} |")
    return "\n".join(lines)


def weak(greedy: dict[str, tuple[int, int]]) -> str:
    """A sentence that names the skills with fewer than seven right answers in ten."""
    named = [f"{skill} ({good}/{count})" for skill, (good, count) in greedy.items() if good < 0.7 * count]
    if not named:
        return "It got at least seven in ten right of everything in the table."
    return textwrap.fill(f"Not to be relied on, with fewer than seven in ten right: {', '.join(named)}.", 118)


def write(
    folder: Path,
    training: dict[str, object],
    greedy: dict[str, tuple[int, int]],
    sampled: dict[str, tuple[int, int]] | None,
    perplexity: tuple[float, int],
    talks: list[tuple[str, str]],
) -> str:
    """The whole card; every number in it was measured by train.py or evaluate.py."""
    quoted = "\n\n".join(f"> **{question}**\n>\n> {said}" for question, said in talks)
    command = "python examples/demo_model/train.py"
    size = (folder / "model.safetensors").stat().st_size
    return f"""---
license: apache-2.0
language: en
library_name: fnengine
---

# The small demo model of fnengine

A chat model of {training["parameters"]:,} parameters ({size / 1e6:.1f} MB in bfloat16) in the shape of Qwen3
(`Qwen3ForCausalLM`), trained from nothing on text that `examples/demo_model` generates. It is here so that the first
minute of `make serve` needs no download. It knows a few dozen questions about itself, a small table of facts, simple
stories, word games and small sums, some of them badly (see the scores). It knows nothing else, and is meant to say so;
it is no use for real work.

## What it said

Greedy answers to prompts that were picked before training:

{quoted}

## Scores

Each row asks prompts that training never saw: the corpus holds out one key in {corpus.HELD_OUT_ONE_IN}, a key being
what is asked, not its wording. An answer is right when it equals an expected one exactly, letter for letter. "Sampled"
uses `generation_config.json`. A dialogue of several turns is held out as a whole: its last question by itself may have
been trained on, and so may a sum with its numbers the other way round. The last two rows, alone, ask what was trained
on.

{table(greedy, sampled)}

Held-out stories: perplexity {perplexity[0]:.3f} a token over {perplexity[1]:,} tokens (they come from the same grammar,
so this says little about other text).

## What it cannot do

{weak(greedy)}

Anything outside of the table it cannot do at all. The stories come from ten plots and a few forms of each sentence. It
writes no code, calls no tools (it only says a result that a `tool` turn holds) and multiplies nothing. An unusual
wording may get the answer to another question, and a confident one. Contexts beyond {training["context"]:,} tokens were
never seen; most documents were shorter than 128.

## How it was made

| | |
| --- | --- |
| date | {training["date"]} |
| machine | {training["machine"]} |
| torch | {training["torch"]} |
| seed | {training["seed"]} |
| steps | {training["steps"]:,} |
| tokens | {training["tokens"]:,} |
| time | {training["minutes"]} minutes of training, beside other work on the same cores |
| last loss | {training["loss"]} (weighted, mean of the last {training["loss_over"]} steps) |
| note | {training.get("note", "")} |
| training | `{command} --out fnengine/bundled --seed {training["seed"]} --steps {training["steps"]}` |
| scores | `python examples/demo_model/evaluate.py fnengine/bundled --sampled --card` |

The same seed gives the same corpus, tokenizer and first weights anywhere. The weights differ in the last bits with
another CPU, thread count or torch, and that grows over the run: expect other weights, about the same loss, and scores
that differ by a few answers in a hundred, more where a score is neither near all nor near none.

All training text was written by the generators in `examples/demo_model`; no outside text was used. Weights and text are
under the Apache License 2.0, as is fnengine.
"""
