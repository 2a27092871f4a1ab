"""Tool calls within a text, for every format that writes one between marks.

    content | spaces, silent marks | opener, the call as the format has it | spaces | opener ... | content

A call is told when it is certain, not before: what is none, or breaks off earlier, is content, word for word, and
content that was sent cannot be taken back. Where arguments are written as a JSON object behind the name, it is certain
with the first character of them, and they are told as they come, in the model's own words; where they are tags, each
is told when it is whole; in every other form the call is certain when it is whole. Arguments that are told and go
wrong, or break off, end there; what follows is content. Spaces and silent marks beside calls belong to the format;
beside content they are content.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from fnengine.serve.parsing.events import Call, Event, Tools, called, say
from fnengine.serve.parsing.scan import CLOSERS, Scan, begun, legal, scan_json

Build = Callable[[str, str, Tools], "tuple[Call, ...] | None"]
"""(name from before the value, the value's text, tools) -> calls; None for what is none."""


Part = Callable[[str, str, bool, Tools], "tuple[str, str, int]"]
"""(name of the function, text, whether it is all there will be, tools) -> (what is certain next, JSON of an argument,
characters that say it): `one` more argument, the `last` was one, `more` has to be seen, or it is `wrong`."""


class Opening(NamedTuple):
    """A call whose arguments come next, and what stands around them."""

    name: str
    at: int
    """Where the object of arguments begins, in the text from the call's mark on."""
    inside: str
    """Brackets that are open around it, the outermost first."""
    head: re.Pattern[str] | None
    """In a list: what the next call is written as up to its arguments."""
    build: Build
    """What any other one is read by, when it is whole."""
    tail: str
    """The mark behind it all; may be missing."""
    openers: tuple[str, ...]
    """Marks of the next call."""
    part: Part | None = None
    """What reads arguments that are no JSON; None where they are."""


class Read(NamedTuple):
    """What a format says of a text that begins with an opener."""

    kind: str
    """`more`: too short to say. `calls`: `upto` characters are `calls`. `wrong`: the first `upto` are content. `begun`:
    a call whose arguments come next."""
    upto: int = 0
    calls: tuple[Call, ...] = ()
    scan: Scan = Scan()
    """With `more`: where to go on."""
    opening: Opening | None = None


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
    told: Opening | None = None
    """The call of which arguments were told, while it, or the list that it stands in, goes on ..."""
    phase: str = ""
    """... as `arguments`, `around` them, in the list before the `next` one, or at the `tail`."""


def feed(state: Calls, text: str, end: bool = False) -> tuple[Calls, list[Event]]:
    """The state after more text, and what is certain now. With `end` everything is."""
    plain = text and not (state.start or state.opener or state.held or state.told or text[-1].isspace())
    if plain and not any(mark[0] in text for mark in state.format.marks):
        return state, [Event("content", text)]  # most text of most answers
    events: list[Event] = []
    held = state.held + text
    while True:
        if state.told is not None:
            state, said, held, waits = _told(replace(state, held=""), held, end)
            events += said
            if waits:
                return replace(state, held=held), events
            continue
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
        if read.opening is not None:
            events += called(read.opening.name, state.count, state.tools)
            held = body[read.opening.at :]
            state = _begun(state, read.opening)
            continue
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


def _begun(state: Calls, opening: Opening) -> Calls:
    """The state before the arguments of a call that was told."""
    state = replace(state, opener="", at=0, scan=Scan(), count=state.count + 1, start=True)
    return replace(state, told=opening, phase="arguments")


def _told(state: Calls, text: str, end: bool) -> tuple[Calls, list[Event], str, bool]:
    """(state, events, what is held, whether it waits for more) of text within a call that was told, and behind it as
    far as it belongs to it."""
    told = state.told
    assert told is not None
    over = replace(state, told=None, phase="", scan=Scan())
    if state.phase == "arguments" and told.part is not None:
        kind, given, upto = told.part(told.name, text, end, state.tools)
        if kind in ("more", "wrong"):
            return (over, [], text, False) if kind == "wrong" else (state, [], text, True)
        mark = "}" if kind == "last" else "{" if not state.scan.at else ", "
        events = [Event("arguments", mark + given, state.count - 1)] if _shown(state) else []
        state = replace(state, scan=Scan(at=1), phase="arguments" if kind == "one" else "tail")
        return state, events, text[upto:], False
    if state.phase == "arguments":
        before = state.scan._replace(at=0)
        scan = scan_json(before, text, 0)
        shown = legal(before, text[: scan.at])
        events = [Event("arguments", shown, state.count - 1)] if shown and _shown(state) else []
        if scan.end == "wrong":
            return over, events, text[scan.at :], False
        if not scan.end:
            return replace(state, scan=scan), events, "", True
        around = Scan(stack=told.inside, want="next")
        phase = "around" if told.inside else "tail"
        return replace(state, scan=around, phase=phase), events, text[scan.at :], False
    if state.phase == "around":
        scan = scan_json(state.scan, text, 0, until="[")
        listed = scan.stack == "[" and not scan.quote
        if scan.end == "wrong" or (end and not scan.end and not listed):
            return over, [], "" if end and not text.strip(CLOSERS) else text, False
        if not scan.end and not listed:
            return replace(state, scan=scan), [], text, True
        return replace(state, scan=Scan(), phase="next" if listed else "tail"), [], text[scan.at :], False
    if state.phase == "next":
        rest = text.lstrip()
        if rest.startswith("]"):
            return replace(state, scan=Scan(), phase="tail"), [], rest[1:], False
        if not rest.startswith(","):
            return (state, [], text, True) if not (rest or end) else (over, [], text, False)
        start = len(text) - len(rest[1:].lstrip())
        assert told.head is not None
        if (head := told.head.match(text, start)) is not None:
            opening = told._replace(name=head["name"])
            return _begun(state, opening), called(opening.name, state.count, state.tools), text[head.end() :], False
        if start == len(text):
            return (over, [], text, False) if end else (state, [], text, True)
        scan = scan_json(state.scan, text, start) if text[start] == "{" else Scan(end="wrong")
        if not scan.end:
            return (over, [], text, False) if end else (replace(state, scan=scan), [], text, True)
        upto = start + scan.at
        calls = told.build("", text[start:upto], state.tools) if scan.end == "whole" else None
        if calls is None:
            return over, [], text, False
        said = say(calls, state.count, state.tools)
        return replace(state, count=state.count + len(calls), scan=Scan()), said, text[upto:], False
    upto = ends(text, 0, told.tail, told.openers, end)
    return (state, [], text, True) if upto is None else (over, [], text[upto:], False)


def _shown(state: Calls) -> bool:
    """Whether the newest call is one that the client wants."""
    return state.count == 1 or state.tools.parallel


def ends(text: str, at: int, tail: str, openers: tuple[str, ...], end: bool) -> int | None:
    """Where a call ends whose value ends at `at`; None if more has to be seen. The mark may be missing."""
    rest = text[at:].lstrip(" \t\r\n`")
    if not tail and not openers:
        return at
    if tail and rest.startswith(tail):
        return len(text) - len(rest) + len(tail)
    if openers and rest.startswith(openers):
        return at
    if not end and any(mark and mark.startswith(rest) for mark in (tail, *openers)):
        return None
    return len(text) if tail.startswith(rest) else at


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
