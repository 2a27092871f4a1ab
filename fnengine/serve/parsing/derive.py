"""A format of tool calls, read off a chat template: earlier turns are shown in it as the model writes them.

    render(user, assistant with call a)           ... <open> <mark> a <close> </open> end of turn
    render(user, assistant with calls a and b)    ... <open> <mark> a <close> <mark> b <close> </open> end of turn

What is found must read its own example back, or nothing is derived. Formats are found whose arguments are one JSON
object, with the function's name in it or before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fnengine.errors import RequestError
from fnengine.serve.parsing import calls as reading
from fnengine.serve.parsing.calls import Calls, Format, Read, Shape
from fnengine.serve.parsing.events import Call, Tools
from fnengine.serve.parsing.formats import LONGEST_NAME, MORE, NEVER, arguments_of, behind, head_of, unnamed
from fnengine.serve.parsing.scan import Scan, read_json, read_object, scan_json

NAME = "template"
LONGEST_MARK = 80
_A, _B = ("fn_alpha", {"key_alpha": "word_alpha"}), ("fn_beta", {"key_beta": "word_beta"})
_NAMED = re.compile(r"[\w.-]+")


def derive(template: str) -> Format | None:
    """The format in which a template shows tool calls; None where there is none that can be read."""
    try:
        plain, one, two = (_turn(template, c, calls) for c, calls in (("SAID", ()), ("", (_A,)), ("", (_A, _B))))
        shape = _shape(plain, one, two)
    except (RequestError, ValueError):
        return None
    if shape is None:
        return None
    first = "[" if shape.many else "{"
    made = Format(
        NAME,
        (shape.mark,) if shape.mark else (),
        partial(read_derived, shape),
        leading=() if shape.mark else (first,),
        silent=tuple(m for m in (*shape.around, shape.between) if m),
        within=tuple(m for m in (shape.sep, shape.close) if m),
        shape=shape,
    )
    return made if _reads(made, _body(plain, two)) else None


def _turn(template: str, content: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A conversation with a model's turn that says or calls something."""
    from fnengine.host.template import render  # with Jinja, which a command line need not wait for

    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        turn["tool_calls"] = [
            {"id": f"callid00{i}", "type": "function", "function": {"name": name, "arguments": dict(given)}}
            for i, (name, given) in enumerate(calls)
        ]
    tools = [{"type": "function", "function": {"name": n, "description": "", "parameters": {}}} for n, _ in (_A, _B)]
    nothing = {f"{name}_token": "" for name in ("bos", "eos", "pad", "unk")}
    messages = [{"role": "user", "content": "hi"}, turn]
    return render(template, messages, tools=tools, add_generation_prompt=False, variables=nothing)


def _body(plain: str, text: str) -> str:
    """The model's turn in a text, given the same text with another turn."""
    at = plain.rindex("SAID")
    return text[_common(plain[:at], text) :].removesuffix(plain[at + len("SAID") :])


def _common(a: str, b: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shape(plain: str, one: str, two: str) -> Shape | None:
    body, both = _body(plain, one), _body(plain, two)
    start, end, value = _object(body, next(iter(_A[1])))
    many = value != _A[1] and body[:start].rstrip().endswith("[") and body[end:].lstrip().startswith("]")
    if many:
        keys = _keys(value)
        mark, close = body[:start].rstrip()[:-1].strip(), body[end:].lstrip()[1:].strip()
        return None if keys is None or not _is_mark(mark) else Shape(mark, close, *keys, many=True)
    later, _, other = _object(both, next(iter(_B[1])))
    if both[:end] != body[:end]:
        return None
    keys, sep = ("", "", False), ""
    if value == _A[1] and other == _B[1]:  # the name stands before the arguments
        sep_at, sep_later = body.rindex(_A[0], 0, start), both.rindex(_B[0], end, later)
        sep = body[sep_at + len(_A[0]) : start]
        if sep != both[sep_later + len(_B[0]) : later]:
            return None
        start, later = sep_at, sep_later
    elif (found := _keys(value)) is None or found != _keys(other):
        return None
    else:
        keys = found
    before, between, rest = body[:start], both[end:later], body[end:].strip()
    common = _common(before[::-1], between[::-1])
    common -= next((i for i, c in enumerate(before[len(before) - common :]) if c in "<["), 0)  # not in half a mark
    mark, close = before[len(before) - common :].strip(), between[: len(between) - common].strip()
    if not mark:  # calls that nothing begins, with something between them
        bare = not before.strip() and not rest and bool(keys[0])
        return Shape("", "", *keys, between=between.strip()) if bare else None
    if not _is_mark(mark) or not rest.startswith(close):
        return None
    around = before[: len(before) - common].strip(), rest[len(close) :].strip()
    if any(len(m) > LONGEST_MARK or re.search(r"\s", m) for m in around):
        around = ("", "")
    return Shape(mark, close, *keys, sep=sep.strip(), around=around)


def _is_mark(text: str) -> bool:
    return 1 < len(text) <= LONGEST_MARK and not text[0].isalnum()


def _object(text: str, key: str) -> tuple[int, int, Any]:
    """(begin, end, value) of the outermost JSON object around a key. Raises ValueError where there is none."""
    at = text.index(key)
    for found in re.finditer(r"\{", text[:at]):
        start = found.start()
        scan = scan_json(Scan(), text, start)
        if scan.end == "whole" and start + scan.at > at:
            return start, start + scan.at, read_json(text[start : start + scan.at])
    raise ValueError("no object")


def _keys(value: Any) -> tuple[str, str, bool] | None:
    """(key of the name, key of the arguments, whether both stand in an object called `function`)."""
    inside = value.get("function")
    nested = isinstance(inside, dict)
    call: Mapping[str, Any] = inside if nested else value
    name = next((k for k, v in call.items() if v in (_A[0], _B[0])), None)
    given = next((k for k, v in call.items() if arguments_of(v) in (_A[1], _B[1])), None)
    return None if name is None or given is None else (name, given, nested)


def _reads(made: Format, text: str) -> bool:
    """Whether the format finds both calls in the example, and nothing else."""
    tools = Tools({name: {} for name, _ in (_A, _B)})
    state, events = reading.feed(Calls(made, tools), text)
    found: list[tuple[str, str]] = []
    for e in (*events, *reading.finish(state)):
        if e.kind == "call":
            found.append((e.text, ""))
        elif e.kind == "arguments":
            found[-1] = (found[-1][0], found[-1][1] + e.text)
        elif e.text:
            return False
    return [(name, read_object(given)) for name, given in found] == [_A, _B]


def keyed(shape: Shape, known: bool, name: str, value: str, tools: Tools) -> tuple[Call, ...] | None:
    """Calls of an object, or of a list of them.

    Args:
        known: only names of tools count: the object could as well be an answer.
    """
    try:
        read = read_json(value)
    except ValueError:
        return None
    found = []
    for one in read if isinstance(read, list) else [read]:
        call = one.get("function") if shape.nested and isinstance(one, dict) else one
        function = call.get(shape.name) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, str) or not function:
            return None
        given = arguments_of(call.get(shape.arguments))
        if given is None or (known and (function not in tools.schemas or shape.arguments not in call)):
            return None
        found.append(Call(function, given))
    return tuple(found) or None


def read_derived(shape: Shape, text: str, opener: str, scan: Scan, end: bool, tools: Tools) -> Read:
    """One call, or a list of all of them, in a format that was derived."""
    size = len(opener) if shape.mark else 0
    wrong, start = Read("wrong", max(1, size)), len(text) - len(text[size:].lstrip())
    name = ""
    known = not shape.mark
    build: Callable[..., Any] = partial(keyed, shape, known)
    if not shape.name:
        at = text.find(shape.sep or "{", start)
        if at < 0 or at > size + LONGEST_NAME:
            return MORE if at < 0 and len(text) <= size + LONGEST_NAME and not end else wrong
        name, build = text[start:at].strip(), unnamed
        if not _NAMED.fullmatch(name):
            return wrong
        at += len(shape.sep)
        start = len(text) - len(text[at:].lstrip())
    if start == len(text):
        return wrong if end else MORE
    if text[start] != ("[" if shape.many else "{"):
        return wrong
    head = head_of(shape.name, (shape.arguments,), shape.nested) if shape.name else NEVER
    openers = (shape.mark,) if shape.mark else ()
    return behind(text, start, scan, end, name, tools, build, shape.close, openers, head, known)
