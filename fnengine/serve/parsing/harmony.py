"""The harmony format of gpt-oss: messages, each with a channel, of which some are reasoning and some tool calls.

    <|channel|>analysis<|message|> reasoning <|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>
    <|start|>assistant<|channel|>final<|message|> content <|return|>

The prompt ends with `<|start|>assistant`. Source: OpenAI, "OpenAI harmony response format" (2025).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from fnengine.serve.parsing.events import Call, Event, Tools, called, say
from fnengine.serve.parsing.formats import OBJECT
from fnengine.serve.parsing.scan import Scan, begun, legal, read_object, scan_json

_MESSAGE = "<|message|>"
_CLOSERS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")
MARKS = ("<|channel|>", "<|constrain|>", _MESSAGE, *_CLOSERS)
_BEGIN = ("<|start|>", "<|channel|>", "to=")
"""What a message may begin with; anything else is content without a header."""
LONGEST_HEADER = 256
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


@dataclass(frozen=True)
class Harmony:
    """The state of a text in this format."""

    tools: Tools | None
    """None: no tools were given, calls are content."""
    phase: Literal["header", "body", "arguments", "behind"] = "header"
    """`arguments` of a call are being told; `behind` them is what else its message says."""
    kind: Literal["content", "reasoning", "call"] = "content"
    """Of the message whose body is being read."""
    name: str = ""
    """Of the function, in a call."""
    header: str = ""
    """Of a call: it is content, too, if the call is none."""
    scan: Scan = Scan()
    """Of arguments"""
    held: str = ""
    count: int = 0
    passed: int = 0
    """Characters before `held`."""
    thought: tuple[tuple[int, int], ...] = ()
    """[from, to) in characters of reasoning that is over."""
    since: int = 0
    """Where the body began."""

    @property
    def inside(self) -> bool:
        """Whether the text so far ends in reasoning."""
        return self.phase == "body" and self.kind == "reasoning"

    @property
    def spans(self) -> tuple[tuple[int, float], ...]:
        """[from, to) in characters of what is reasoning, the mark at its end included."""
        return (*self.thought, (self.since, float("inf"))) if self.inside else self.thought


def feed(state: Harmony, text: str, end: bool = False) -> tuple[Harmony, list[Event]]:
    """The state after more text, and what is certain now. With `end` everything is."""
    events: list[Event] = []
    rest = state.held + text
    while True:
        before, length, at = state, len(rest), state.passed
        read = {"header": _header, "arguments": _arguments}.get(state.phase, _body)
        state, said, rest, goes_on = read(state, rest, end)
        events += said
        state = replace(state, passed=at + length - len(rest))
        if state.inside and not before.inside:
            state = replace(state, since=state.passed)
        elif before.inside and not state.inside:
            state = replace(state, thought=(*state.thought, (state.since, state.passed)))
        if not goes_on:
            return replace(state, held=rest), events


def finish(state: Harmony) -> list[Event]:
    """What is said by the text that was held when the text is over."""
    return feed(state, "", end=True)[1]


_Step = tuple[Harmony, list[Event], str, bool]
"""(state, events, text that is left, whether it can be read now)"""


def _header(state: Harmony, text: str, end: bool) -> _Step:
    """Reads up to the body of a message."""
    rest = text.lstrip()
    closer = next((m for m in _CLOSERS if m != "<|start|>" and rest.startswith(m)), None)
    if closer is not None:
        return state, [], rest[len(closer) :], True
    at = text.find(_MESSAGE)
    begins = rest.startswith(_BEGIN) or any(m.startswith(rest) for m in (*_BEGIN, *_CLOSERS))
    if not begins or at > LONGEST_HEADER or (at < 0 and len(text) > LONGEST_HEADER + len(_MESSAGE)):
        return replace(state, phase="body", kind="content", name=""), [], text, True
    if at < 0:
        if not end:
            return state, [], text, False
        return state, [Event("content", text)] if rest else [], "", False
    header, body = text[: at + len(_MESSAGE)], text[at + len(_MESSAGE) :]
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    state = replace(state, phase="body", kind="content", name="", header="")
    if channel is not None and channel[1] == "analysis":
        return replace(state, kind="reasoning"), [], body, True
    if recipient is None:
        return state, [], body, True
    if recipient[1].startswith("functions.") and state.tools is not None:
        return replace(state, kind="call", name=recipient[1][len("functions.") :], header=header), [], body, True
    return state, [Event("content", header)], body, True  # a call that nobody can answer


def _body(state: Harmony, text: str, end: bool) -> _Step:
    """Reads up to the end of a message, as far as it has come."""
    if state.kind == "call" and state.phase == "body":
        start = len(text) - len(text.lstrip())
        if OBJECT.match(text, start) and state.tools is not None:
            told = called(state.name, state.count, state.tools)
            return replace(state, phase="arguments", scan=Scan(), count=state.count + 1), told, text[start:], True
    found = min(((at, m) for m in _CLOSERS if (at := text.find(m)) >= 0), default=None)
    if found is None and not end:
        if state.kind == "call":
            return state, [], text, False
        at = len(text) - begun(text, _CLOSERS)
        return state, [Event(state.kind, text[:at])], text[at:], False
    at, mark = found or (len(text), "")
    passed = at if mark == "<|start|>" else at + len(mark)
    over = replace(state, phase="header")
    if state.phase == "behind":  # spaces there are the format's
        said = [Event("content", text[:at])] if text[:at].strip() else []
        return over, said, text[passed:], not end or bool(mark)
    if state.kind == "call":
        arguments = read_object(text[:at])
        if arguments is None or state.tools is None:
            return over, [Event("content", state.header + text[:passed])], text[passed:], not end or bool(mark)
        events = say([Call(state.name, arguments)], state.count, state.tools)
        return replace(over, count=state.count + 1), events, text[passed:], not end or bool(mark)
    return over, [Event(state.kind, text[:at])], text[passed:], not end or bool(mark)


def _arguments(state: Harmony, text: str, end: bool) -> _Step:
    """Tells arguments as far as they have come."""
    assert state.tools is not None
    before = state.scan._replace(at=0)
    scan = scan_json(before, text, 0)
    shown = legal(before, text[: scan.at])
    events = [Event("arguments", shown, state.count - 1)] if state.count == 1 or state.tools.parallel else []
    if not scan.end:
        return replace(state, scan=scan), events, "", False
    return replace(state, phase="behind"), events, text[scan.at :], True
