"""The one parser of an answer's text: reasoning first, what is left of it as content and tool calls.

    state = begin(parsers, prompt, tools)
    state, events = feed(state, text)       # as often as there is text
    events = finish(state)

Law: all events, joined, are the same however the text was cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

from fnengine.serve.parsing import calls, harmony, reasoning
from fnengine.serve.parsing.calls import Calls, Format
from fnengine.serve.parsing.events import Event, Tools, joined
from fnengine.serve.parsing.harmony import Harmony
from fnengine.serve.parsing.reasoning import Tags, Thoughts


@dataclass(frozen=True)
class Parsers:
    """How a model's text is read, chosen once for a server."""

    tools: Format | Literal["gpt-oss"] | None = None
    reasoning: Tags | None = None
    """None as well where `tools` is gpt-oss, whose format holds both."""
    short_ids: bool = False
    """Ids of calls have nine letters and digits."""
    notes: tuple[str, ...] = ()
    """What was chosen and why, a sentence each."""

    @property
    def thinks(self) -> bool:
        """Whether reasoning is told apart."""
        return self.reasoning is not None or self.tools == "gpt-oss"

    def marks(self, tools: bool) -> tuple[str, ...]:
        """Marks that must be seen in the text, be they special tokens or not."""
        if self.tools == "gpt-oss":
            return harmony.MARKS
        found = () if self.reasoning is None else (self.reasoning.start, self.reasoning.end)
        return found + (self.tools.marks + self.tools.within if tools and self.tools is not None else ())


@dataclass(frozen=True)
class State:
    """How far the text of one choice has been read."""

    thoughts: Thoughts | None = None
    calls: Calls | None = None
    harmony: Harmony | None = None

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends in reasoning."""
        stage = self.harmony or self.thoughts
        return stage is not None and stage.inside

    @property
    def spans(self) -> tuple[tuple[int, float], ...]:
        """[from, to) in characters of what is reasoning."""
        stage = self.harmony or self.thoughts
        return () if stage is None else stage.spans


def begin(parsers: Parsers, prompt: str, tools: Tools | None, going_on: str | None = None) -> State | None:
    """The state behind a prompt; None where all text is content.

    Args:
        going_on: the last message, when the prompt ends inside it.
    """
    if parsers.tools == "gpt-oss":
        return State(harmony=Harmony(tools, phase="header" if going_on is None else "body"))
    thoughts = None if parsers.reasoning is None else reasoning.begin(parsers.reasoning, prompt, going_on)
    found = None if tools is None or parsers.tools is None else Calls(parsers.tools, tools)
    return None if thoughts is None and found is None else State(thoughts, found)


def feed(state: State, text: str) -> tuple[State, tuple[Event, ...]]:
    """The state after more text, and what is certain now."""
    if state.harmony is not None:
        after, events = harmony.feed(state.harmony, text)
        return replace(state, harmony=after), joined(events)
    events = [Event("content", text)]
    if state.thoughts is not None:
        thoughts, events = reasoning.feed(state.thoughts, text)
        state = replace(state, thoughts=thoughts)
    return _contents(state, events)


def finish(state: State) -> tuple[Event, ...]:
    """What is said by text that was held when the text is over."""
    if state.harmony is not None:
        return joined(harmony.finish(state.harmony))
    state, events = _contents(state, [] if state.thoughts is None else reasoning.finish(state.thoughts))
    return events if state.calls is None else joined([*events, *calls.finish(state.calls)])


def _contents(state: State, events: list[Event]) -> tuple[State, tuple[Event, ...]]:
    """Contents read once more for calls."""
    if state.calls is None:
        return state, joined(events)
    found, out = state.calls, []
    for event in events:
        if event.kind != "content":
            out.append(event)
        elif event.text:
            found, said = calls.feed(found, event.text)
            out += said
    return replace(state, calls=found), joined(out)


def call_id(salt: str, choice: int, index: int, short: bool) -> str:
    """The id of a call, a function of what it stands in: unique wherever the salt is."""
    digest = hashlib.sha256(f"{salt}:{choice}:{index}".encode()).hexdigest()
    return digest[:9] if short else f"call_{digest[:24]}"
