"""Where a JSON value, a Python list or a marker ends in text that comes in pieces. Each character is looked at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

MOST_DEEP = 64
"""Levels of nesting. Deeper values are no tool call; without a limit, `[` times 10**5 ends in a RecursionError."""
_SPACE = " \t\n\r"
CLOSERS = "}] \t\n\r"
"""What may stand behind arguments without saying anything."""
_SCALAR = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Scan(NamedTuple):
    """How far a value has been read. The empty one stands before its first character."""

    at: int = 0
    """Characters read since the value's first one."""
    stack: str = ""
    """Brackets that are open."""
    quote: str = ""
    """The quote that is open."""
    escaped: bool = False
    want: Literal["value", "first", "key", "colon", "next", "scalar"] = "value"
    """JSON: what may come. `first`: a value or key, or the closing bracket."""
    end: Literal["", "whole", "wrong"] = ""
    """`whole`: the value ends before `at`; `wrong`: the character at `at` cannot be there."""


def scan_json(scan: Scan, text: str, start: int, until: str | None = None) -> Scan:
    """`scan` after all of `text`, whose value begins at `start` with a bracket.

    Args:
        until: stops behind the bracket that leaves just these open.

    Numbers and words are only looked at roughly; who reads the value later will see.
    """
    at, stack, quote, escaped, want, end = scan
    for c in text[start + at :]:
        if end:
            break
        if quote:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                quote = ""
                want = "colon" if want == "key" else "next"
            at += 1
            continue
        if want == "scalar":
            if c in _SCALAR:
                at += 1
                continue
            want = "next"
        if c in _SPACE:
            pass
        elif c in "}]" and stack and want in ("next", "first") and (c == "}") == (stack[-1] == "{"):
            stack, want = stack[:-1], "next"
            end = "" if stack else "whole"
            if stack == until:
                at += 1
                break
        elif c == "," and want == "next":
            want = "key" if stack[-1] == "{" else "value"
        elif c == ":" and want == "colon":
            want = "value"
        elif c == '"' and (want in ("value", "first", "key")):
            quote = '"'
            want = "key" if want == "key" or (want == "first" and stack[-1] == "{") else "value"
        elif c in "{[" and (want == "value" or (want == "first" and stack[-1] == "[")) and len(stack) < MOST_DEEP:
            stack, want = stack + c, "first"
        elif c in _SCALAR and stack and (want == "value" or (want == "first" and stack[-1] == "[")):
            want = "scalar"
        else:
            end = "wrong"
            break
        at += 1
    return Scan(at, stack, quote, escaped, want, end)


def legal(scan: Scan, text: str) -> str:
    """`text` as JSON, given where it begins: line ends and tabs within strings, which models write, are escaped."""
    if not any(c < " " for c in text):
        return text
    out, quote, escaped = [], scan.quote, scan.escaped
    for c in text:
        out.append(json.dumps(c)[1:-1] if quote and c < " " else c)
        if not quote:
            quote = '"' if c == '"' else ""
        elif escaped:
            escaped = False
        elif c == "\\":
            escaped = True
        elif c == '"':
            quote = ""
    return "".join(out)


def scan_python(scan: Scan, text: str, start: int) -> Scan:
    """`scan` after all of `text`, where a Python expression in brackets begins at `start`."""
    at, stack, quote, escaped, want, end = scan
    for c in text[start + at :]:
        if end:
            break
        if quote:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == quote:
                quote = ""
        elif c in "\"'":
            quote = c
        elif c in "([{":
            if len(stack) == MOST_DEEP:
                end = "wrong"
                break
            stack += c
        elif c in ")]}":
            if {")": "(", "]": "[", "}": "{"}[c] != stack[-1:]:
                end = "wrong"
                break
            stack = stack[:-1]
            end = "" if stack else "whole"
        at += 1
    return Scan(at, stack, quote, escaped, want, end)


def read_json(text: str) -> Any:
    """The value written in `text`. Line ends within strings, which models write, are taken as such.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text, strict=False, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that is all of `text`, empty for none; None where it is something else."""
    text = text.strip() or "{}"
    scan = scan_json(Scan(), text, 0) if text[0] == "{" else Scan()
    if (scan.at, scan.end) != (len(text), "whole"):
        return None
    try:
        return read_json(text)
    except ValueError:
        return None


def _no_constant(name: str):
    raise ValueError(f"JSON has no {name}")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def begun(text: str, markers: Iterable[str]) -> int:
    """Characters at the end of `text` that could be the beginning of a marker, at most all but its last."""
    longest = 0
    for marker in markers:
        for n in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:n]):
                longest = n
                break
    return longest
