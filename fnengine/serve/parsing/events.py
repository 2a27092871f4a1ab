"""What a parser says of a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class Event(NamedTuple):
    """A piece of an answer. The events of a text, joined, are the same however the text was cut."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    """`call`: a tool call begins. `arguments`: text of the arguments of the call that began last."""
    text: str = ""
    """Of a `call`, the function's name."""
    index: int = 0
    """Of `call` and `arguments`: which call of the answer, from 0."""


class Call(NamedTuple):
    """A call as a model wrote it."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Tools:
    """What parsers need to know of a request's tools: their names, and the schemas of their parameters."""

    schemas: Mapping[str, Mapping[str, Any]]
    parallel: bool = True
    """False: calls after the first are left out."""


def called(name: str, before: int, tools: Tools) -> list[Event]:
    """The event of a call that begins behind `before` others."""
    return [Event("call", name, before)] if before == 0 or tools.parallel else []


def say(calls: Iterable[Call], before: int, tools: Tools) -> list[Event]:
    """Events of calls of which `before` came earlier."""
    events = []
    for index, call in enumerate(calls, before):
        if index == 0 or tools.parallel:
            events.append(Event("call", call.name, index))
            events.append(Event("arguments", json.dumps(call.arguments, ensure_ascii=False), index))
    return events


def joined(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same with neighbours of one kind as one, and none without text (but calls)."""
    out: list[Event] = []
    for e in events:
        if not e.text and e.kind != "call":
            continue
        if out and e.kind != "call" and (out[-1].kind, out[-1].index) == (e.kind, e.index):
            out[-1] = e._replace(text=out[-1].text + e.text)
        else:
            out.append(e)
    return tuple(out)
