"""Tool calls within a text, for every format that writes one between marks.

    content | spaces, silent marks | opener, the call as the format has it | spaces | opener ... | content

A call is told when it is whole and can be read, not before: what breaks off or cannot be read is content, word for
word, and content that was sent cannot be taken back. Spaces and silent marks beside calls belong to the format; beside
content they are content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from fnengine.serve.parsing.events import Call, Event, Tools, say
from fnengine.serve.parsing.scan import Scan, begun


class Read(NamedTuple):
    """What a format says of a text that begins with an opener."""

    kind: str
    """`more`: too short to say. `calls`: `upto` characters are `calls`. `wrong`: the first `upto` are content."""
    upto: int = 0
    calls: tuple[Call, ...] = ()
    scan: Scan = Scan()
    """With `more`: where to go on."""


@dataclass(frozen=True)
class Shape:
    """How calls are written in a format that nobody has named: JSON between marks."""

    mark: str
    """What begins a call, or all of them; empty where calls begin a text without a mark."""
    close: str
    """What ends it, if anything."""
    name: str
    """The key of the name; empty where the name stands before the arguments."""
    arguments: str
    """The key of the arguments."""
    nested: bool = False
    """Both stand in an object called `function`."""
    many: bool = False
    """A mark begins a list of all calls."""
    sep: str = ""
    """Between name and arguments."""
    around: tuple[str, str] = ("", "")
    """Before and behind all calls."""
    between: str = ""
    """Between calls without a mark."""


@dataclass(frozen=True)
class Format:
    """A way of writing tool calls."""

    name: str
    openers: tuple[str, ...]
    """Marks that begin a call, wherever they stand."""
    read: Callable[[str, str, Scan, bool, Tools], Read]
    """(text, its opener, where to go on, whether it is all there will be, tools) -> what can be said."""
    leading: tuple[str, ...] = ()
    """Marks that begin a call only where nothing, or nothing but calls, came before."""
    silent: tuple[str, ...] = ()
    """Marks around calls that say nothing by themselves."""
    within: tuple[str, ...] = ()
    """Marks inside of calls and at their ends."""
    short_ids: bool = False
    """Whether ids must be nine letters and digits."""
    shape: Shape | None = None
    """Of one that was read off a chat template."""

    @property
    def marks(self) -> tuple[str, ...]:
        return self.openers + self.silent


@dataclass(frozen=True)
class Calls:
    """The state of a text that may hold calls in a format."""

    format: Format
    tools: Tools
    count: int = 0
    """Calls so far."""
    start: bool = True
    """Nothing, or nothing but calls, so far."""
    held: str = ""
    """Text of which nothing was said yet: spaces and marks, then perhaps an opener with a call."""
    opener: str = ""
    """The one that `held` has at `at`, when a call has begun."""
    at: int = 0
    scan: Scan = Scan()


def feed(state: Calls, text: str, end: bool = False) -> tuple[Calls, list[Event]]:
    """The state after more text, and what is certain now. With `end` everything is."""
    plain = text and not (state.start or state.opener or state.held or text[-1].isspace())
    if plain and not any(mark[0] in text for mark in state.format.marks):
        return state, [Event("content", text)]  # most text of most answers
    events: list[Event] = []
    held = state.held + text
    while True:
        if not state.opener:
            state, said, held = _outside(replace(state, held=""), held, end)
            events += said
            if not state.opener:
                return replace(state, held=held), events
        body = held[state.at :]
        read = state.format.read(body, state.opener, state.scan, end, state.tools)
        if read.kind == "more":
            assert not end, "at the end nothing waits"
            return replace(state, held=held, scan=read.scan), events
        if read.kind == "calls":
            events += say(read.calls, state.count, state.tools)
            state = replace(state, count=state.count + len(read.calls), start=True)
        else:
            assert read.upto > 0, "what is wrong has a first character"
            events.append(Event("content", held[: state.at + read.upto]))
            state = replace(state, start=False)
        held = body[read.upto :]
        state = replace(state, opener="", at=0, scan=Scan())


def finish(state: Calls) -> list[Event]:
    """What is said by the text that was held when the text is over."""
    return feed(state, "", end=True)[1]


def _outside(state: Calls, text: str, end: bool) -> tuple[Calls, list[Event], str]:
    """(state, events, what is held) of text in which no call has begun yet."""
    form = state.format
    blank = _blank(text, form.silent)
    if blank == len(text):
        if not end:
            return state, [], text
        return state, [] if state.count and state.start else [Event("content", text)], ""
    if state.start:
        for mark in form.leading:
            if text.startswith(mark, blank):
                return replace(state, opener=mark, at=blank), [], text
    found = [(at, -len(m), m) for m in form.openers if (at := text.find(m, blank)) >= 0]
    if found:
        at, _, mark = min(found)
        before = _before(text[:at], form.silent)
        events = [Event("content", text[:before])] if before else []
        state = replace(state, opener=mark, at=at - before, start=state.start and not before)
        return state, events, text[before:]
    if end:
        return replace(state, start=False), [Event("content", text)], ""
    keep = begun(text, form.marks)
    if len(text) - keep <= blank:  # spaces, and perhaps the beginning of a mark
        return state, [], text
    before = _before(text[: len(text) - keep], form.silent)
    return replace(state, start=False), [Event("content", text[:before])], text[before:]


def _blank(text: str, silent: tuple[str, ...]) -> int:
    """Characters of spaces and silent marks at the beginning."""
    at = 0
    while True:
        rest = text[at:].lstrip() if at < len(text) else ""
        at = len(text) - len(rest)
        mark = next((m for m in silent if rest.startswith(m)), None)
        if mark is None:
            return at
        at += len(mark)


def _before(text: str, silent: tuple[str, ...]) -> int:
    """Characters before the spaces and silent marks at the end."""
    while True:
        text = text.rstrip()
        mark = next((m for m in silent if text.endswith(m)), None)
        if mark is None:
            return len(text)
        text = text[: len(text) - len(mark)]
