"""Where text becomes events: what each delta of a choice adds to its message, in the words of the API."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fnengine.host.output import Delta
from fnengine.serve.engine_port import Text
from fnengine.serve.parsing.events import Event
from fnengine.serve.parsing.parser import State, call_id, feed, finish


@dataclass(frozen=True)
class Reader:
    """How the texts of one answer are read."""

    start: State
    """Behind the prompt."""
    salt: str
    """Of ids of calls."""
    short_ids: bool = False
    show: bool = True
    """Whether reasoning is sent."""
    thinks: bool = True
    """Whether reasoning is told apart."""
    skip_special: bool = True
    """Whether special tokens have no text."""


@dataclass
class Reading:
    """How far one choice has been read."""

    state: State
    calls: int = 0
    chars: int = 0
    """Characters so far, by the bytes of their tokens."""
    starts: array[int] = field(default_factory=lambda: array("q"))
    """Where each token begins, where reasoning is told apart: 8 bytes a token."""
    waiting: list[Any] = field(default_factory=list)
    """Log-probabilities ..."""
    ids: list[int] = field(default_factory=list)
    """... and tokens of text that was not told yet."""


def read(reader: Reader, here: Reading, delta: Delta, choice: int, text: Text) -> list[dict[str, Any]]:
    """Additions to the message, in order; `here` goes on. Of a call first come id and name, then arguments."""
    here.state, events = feed(here.state, delta.text)
    if reader.thinks:
        here.starts.extend(begun_at(here, delta.tokens, text, reader.skip_special))
    if delta.finish is not None:
        events += finish(here.state)
    added = []
    for event in events:
        here.calls += event.kind == "call"
        if event.kind != "reasoning" or reader.show:
            added.append(addition(reader, event, choice))
    return added


def addition(reader: Reader, event: Event, choice: int) -> dict[str, Any]:
    """A delta of the API."""
    if event.kind == "content":
        return {"content": event.text}
    if event.kind == "reasoning":
        return {"reasoning_content": event.text, "reasoning": event.text}
    if event.kind == "arguments":
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
    id = call_id(reader.salt, choice, event.index, reader.short_ids)
    function = {"name": event.text, "arguments": ""}
    return {"tool_calls": [{"index": event.index, "id": id, "type": "function", "function": function}]}


def begun_at(here: Reading, tokens: Sequence[int], text: Text, skip_special: bool) -> list[int]:
    """Where in the text each of the next tokens begins, in characters; one within a character where that does."""
    starts, at = [], here.chars
    for id in tokens:
        raw = b"" if skip_special and id in text.special_ids else text.token_bytes(id)
        starts.append(at - (bool(raw) and raw[0] & 0xC0 == 0x80))
        at += sum((b & 0xC0) != 0x80 for b in raw)
    here.chars = at
    return starts


def thought(here: Reading) -> int:
    """Tokens so far that are reasoning: those that begin in it. The same however the text was cut."""
    return sum(bisect_left(here.starts, to) - bisect_left(here.starts, since) for since, to in here.state.spans)


def message(role: str, parts: Sequence[dict[str, Any]], reader: Reader) -> dict[str, Any]:
    """The message that all additions make."""
    calls: list[dict[str, Any]] = []
    content = thought = ""
    for part in parts:
        content += part.get("content", "")
        thought += part.get("reasoning", "")
        for piece in part.get("tool_calls", ()):
            if "id" in piece:
                function = dict(piece["function"])
                calls.append({"id": piece["id"], "type": "function", "function": function})
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    out: dict[str, Any] = {"role": role, "content": content or None if calls else content, "refusal": None}
    if reader.thinks:
        out |= {"reasoning_content": thought or None, "reasoning": thought or None}
    return out | ({"tool_calls": calls} if calls else {})
