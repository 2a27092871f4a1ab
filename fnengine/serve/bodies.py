"""JSON of large bodies, read in pieces: Python's own reader holds the interpreter until it is done, 200 ms for a
million token ids, and everybody's stream stands still meanwhile, whatever thread it runs in.

Values are those of `json.loads`. Objects and lists are gone through here, where other threads get their turns; strings
and numbers are read by the same functions in C, numbers of a list some thousands at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

PIECE = 1 << 14
"""Characters of a list of numbers that are read at once: half a millisecond."""
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBERS = re.compile(r"[-+0-9.eE \t\n\r,]*")


def loads(text: str, constant: Callable[[str], Any], piece: int = PIECE) -> Any:
    """The value of a JSON text.

    Args:
        constant: makes something of NaN, Infinity and -Infinity, or raises.

    Raises:
        json.JSONDecodeError, ValueError, RecursionError: as `json.loads`.
    """
    decoder = json.JSONDecoder(parse_constant=constant)
    scan, string = decoder.scan_once, json.decoder.scanstring  # pyright: ignore[reportAttributeAccessIssue]

    def fail(what: str, at: int):
        raise json.JSONDecodeError(what, text, at)

    def skip(at: int) -> int:
        found = _SPACE.match(text, at)
        assert found is not None
        return found.end()

    def value(at: int) -> tuple[Any, int]:
        c = text[at : at + 1]
        if c == "{":
            return members(at + 1)
        if c == "[":
            return items(at + 1)
        try:
            return scan(text, at)
        except StopIteration as e:
            raise json.JSONDecodeError("Expecting value", text, e.value) from None

    def another(at: int, end: str) -> tuple[bool, int]:
        """(whether one more value follows in an object or list that `end` closes, where what is next begins)"""
        at = skip(at)
        c = text[at : at + 1]
        if c not in (end, ","):
            fail("Expecting ',' delimiter", at)
        return (False, at + 1) if c == end else (True, skip(at + 1))

    def members(at: int) -> tuple[dict[str, Any], int]:
        out: dict[str, Any] = {}
        at = skip(at)
        if text[at : at + 1] == "}":
            return out, at + 1
        while True:
            if text[at : at + 1] != '"':
                fail("Expecting property name enclosed in double quotes", at)
            key, at = string(text, at + 1, True)
            at = skip(at)
            if text[at : at + 1] != ":":
                fail("Expecting ':' delimiter", at)
            out[key], at = value(skip(at + 1))
            more, at = another(at, "}")
            if not more:
                return out, at

    def items(at: int) -> tuple[list[Any], int]:
        out: list[Any] = []
        at = skip(at)
        if text[at : at + 1] == "]":
            return out, at + 1
        slow = 0  # up to here numbers are read one by one, because something is wrong in them
        while True:
            found = _NUMBERS.match(text, at, at + piece)
            comma = -1 if found is None or at < slow else text.rfind(",", at, found.end())
            if comma > at:  # numbers, as far as the last comma
                try:
                    out += json.loads(f"[{text[at:comma]}]")
                    at = skip(comma + 1)
                    continue
                except json.JSONDecodeError:
                    slow = comma
            one, at = value(at)
            out.append(one)
            more, at = another(at, "]")
            if not more:
                return out, at

    found, at = value(skip(0))
    at = skip(at)
    if at != len(text):
        fail("Extra data", at)
    return found


def is_text(value: Any) -> bool:
    """Whether no string of a JSON value holds half of a surrogate pair."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                return False
        elif isinstance(one, dict):
            todo += one
            todo += one.values()
        elif isinstance(one, list):
            todo += one
    return True
