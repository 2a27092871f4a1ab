"""What a model may write where it calls tools, in its own format: a grammar that a grammar engine compiles.

    required, named     calls, and nothing else
    auto                any text; what begins like a call goes on like one
    auto, an answer     calls, or the answer

A call is a mark and what follows it. A mark that is one token is no text, so text ends before it; any other one ends
the text lazily, where it is first complete. Formats that begin a call without a mark do so only at the start of a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fnengine.host.grammar import guided
from fnengine.serve.parsing.calls import Shape
from fnengine.serve.parsing.choose import HARMONY

_ANY = {"type": "object"}
Functions = Sequence[Mapping[str, Any]]


def grammar_for(
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any],
    parser: str,
    *,
    parallel: bool = True,
    special: Mapping[str, int] | None = None,
    answer: str | None = None,
    shape: Shape | None = None,
) -> dict[str, Any]:
    """`{"type": "lark", "grammar": ...}` of texts that `parser` reads as calls, as llguidance reads Lark.

    It begins where reasoning has ended; that of gpt-oss with `auto` begins with the text, whose messages it knows. JSON
    within it is `%json` of the parameters' schemas.

    Args:
        tools: as a request has them.
        tool_choice: `required`, an object that names a function, or `auto`.
        parser: the name of a format of `choose.BY_NAME`, or gpt-oss.
        parallel: whether there may be several calls. A named function is called once.
        special: marks that are special tokens, with their ids: they have no text of their own in a grammar.
        shape: of a format that was read off a chat template.
        answer: with `auto`, what a text without calls has to be, as Lark has it on the right of a rule; None is any.
    """
    functions = [t["function"] for t in tools]
    if isinstance(tool_choice, Mapping):
        wanted = tool_choice["function"]["name"]
        functions = [f for f in functions if f["name"] == wanted]
        parallel = False
    assert functions, "somebody must check that the function is there"
    write = _Writer(special or {})
    free, told = tool_choice == "auto", None if answer is None else write.rule(answer)
    if parser == HARMONY:
        start = _harmony(write, functions, free, told)
    else:
        form = (_WRITTEN[parser] if shape is None else partial(_shaped, shape))(write, functions, parallel)
        start = _forced(write, form, parallel)
        if free:
            start = _free(write, form, parallel) if told is None else f"{start} | {told}"
    rules = [f"start: {start}", *write.rules, r"SPACE: /[ \t\r\n]{0,4}/", r"TEXT: /(.|\n)*/"]
    return {"type": "lark", "grammar": "\n".join(rules) + "\n"}


@dataclass(frozen=True)
class _Form:
    """How calls of some functions are written."""

    mark: str
    """What begins a call wherever it stands, or all of them."""
    body: str
    """What follows the mark."""
    one: bool
    """A mark begins one call, so several calls have several marks."""
    bare: str = ""
    """Calls without a mark, at the start of a text ..."""
    first: str = ""
    """... and the character that they begin with."""


def _forced(w: _Writer, form: _Form, parallel: bool) -> str:
    """Calls."""
    if form.bare:
        return form.bare
    call = w.rule(w.text(form.mark), form.body)
    return f"{call} (SPACE {call})*" if form.one and parallel else call


def _free(w: _Writer, form: _Form, parallel: bool) -> str:
    """Any text, in which what begins like a call is one."""
    if not form.bare:
        call = w.rule(w.until(form.mark), form.body)
        return f"{call}* TEXT" if parallel else f"{call} | TEXT"
    w.rules.append(rf"OTHER: /([ \t\r\n]*[^ \t\r\n\{form.first}](.|\n)*|[ \t\r\n]*)/")
    call = w.rule(w.until(form.mark, "OTHER"), form.body)
    return f"{form.bare} | {call}* OTHER" if parallel else f"{form.bare} | {call} | OTHER"


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, special: Mapping[str, int]):
        self.special = special
        self.rules: list[str] = []

    def text(self, *parts: str) -> str:
        """Exactly these texts; a special token by its id."""
        return " ".join(f"<[{self.special[p]}]>" if p in self.special else json.dumps(p) for p in parts if p)

    def texts(self, *parts: str) -> list[str]:
        """The same as parts of a rule; none where they are empty."""
        return [self.text(*parts)] if any(parts) else []

    def rule(self, *parts: str, attributes: str = "") -> str:
        """The name of a new rule."""
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {' '.join(parts)}")
        return name

    def json(self, schema: Mapping[str, Any]) -> str:
        """A value of a schema, on one line as the grammar's syntax wants it."""
        return self.rule(f"%json {json.dumps(guided(schema))}")

    def until(self, mark: str, before: str = "TEXT") -> str:
        """Text up to a mark, and the mark."""
        return self.rule(before, self.text(mark), attributes="" if mark in self.special else "[lazy]")

    def any(self, options: Sequence[str]) -> str:
        return "(" + " | ".join(options) + ")"


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or _ANY


def _objects(
    functions: Sequence[Mapping[str, Any]], key: str, name: str = "name"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of `{name: ..., key: ...}` for any of the functions, and what it refers to, for the root."""
    found: dict[str, Any] = {}
    options = []
    for i, f in enumerate(functions):
        schema = _at_root(_schema(f), str(i), found)
        options.append(
            {
                "type": "object",
                "properties": {name: {"const": f["name"]}, key: schema},
                "required": [name, key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": options}, {"$defs": found} if found else {}


def _at_root(schema: Any, name: str, found: dict[str, Any]) -> Any:
    """The schema with references to places in `found`, where it is put whole under its name if it has any."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        if not isinstance(value, dict):
            return value
        return {
            k: f"#/$defs/{name}{v[1:]}" if k == "$ref" and isinstance(v, str) and v.startswith("#") else moved(v)
            for k, v in value.items()
        }

    whole = moved(schema)
    if whole != schema:
        found[name] = whole
    return whole


def _hermes(w: _Writer, functions: Functions, parallel: bool) -> _Form:
    schema, root = _objects(functions, "arguments")
    return _Form("<tool_call>", w.rule("SPACE", w.json(schema | root), "SPACE", w.text("</tool_call>")), True)


def _llama(w: _Writer, functions: Functions, parallel: bool) -> _Form:
    schema, root = _objects(functions, "parameters")
    one = w.json(schema | root)
    calls = w.rule(f'{one} (";" SPACE {one})*' if parallel else one)
    return _Form("<|python_tag|>", w.rule("SPACE", calls), False, calls, "{")


def _mistral(w: _Writer, functions: Functions, parallel: bool) -> _Form:
    if "[ARGS]" in w.special:  # newer tokenizers
        calls = [w.rule(w.text(f["name"], "[ARGS]"), w.json(_schema(f))) for f in functions]
        return _Form("[TOOL_CALLS]", w.rule(w.any(calls)), True)
    length = {} if parallel else {"maxItems": 1}
    items, root = _objects(functions, "arguments")
    schema = {"type": "array", "items": items, "minItems": 1, **length, **root}
    return _Form("[TOOL_CALLS]", w.rule("SPACE", w.json(schema)), False)


def _coder(w: _Writer, functions: Functions, parallel: bool) -> _Form:
    calls = []
    for f in functions:
        schema = _schema(f)
        given = []
        for key, value in _properties(schema):
            kind = value.get("type") if isinstance(value, dict) else None
            begin = w.text(f"<parameter={key}>\n")
            if kind in ("integer", "number", "boolean", "array", "object"):
                one = w.rule(begin, w.json(_alone(value, schema)), w.text("\n</parameter>\n"))
            else:  # without quotes: a text is anything up to its mark
                one = w.rule(begin, _unquoted(w))
            given.append(one if key in (schema.get("required") or ()) else f"{one}?")
        if _open(schema):
            given.append(w.rule(w.text("<parameter="), r"/[^<>\n]{1,240}/", w.text(">\n"), _unquoted(w)) + "*")
        calls.append(w.rule(w.text(f"\n<function={f['name']}>\n"), *given, w.text("</function>\n", "</tool_call>")))
    return _Form("<tool_call>", w.rule(w.any(calls)), True)


def _unquoted(w: _Writer) -> str:
    return w.rule(r"/(.|\n)*/", attributes=r'[suffix="\n</parameter>\n"]')


def _pythonic(w: _Writer, functions: Functions, parallel: bool) -> _Form:
    calls = []
    for f in functions:
        schema = _schema(f)
        needed = schema.get("required") or ()
        every = {k: w.rule(w.text(f"{k}="), w.json(_alone(v, schema))) for k, v in _properties(schema)}
        first = [rule for k, rule in every.items() if k in needed]
        rest = [rule for k, rule in every.items() if k not in needed]
        if first:
            given = ' ", " '.join(first) + "".join(f' (", " {rule})?' for rule in rest)
        elif _open(schema):
            one = w.rule(r"/[a-zA-Z_][a-zA-Z0-9_]{0,63}=/", w.json({}))
            given = f'({one} (", " {one})*)?'
        else:
            tails = [rule + "".join(f' (", " {r})?' for r in rest[i:]) for i, rule in enumerate(rest, 1)]
            given = f"({' | '.join(tails)})?" if tails else ""
        calls.append(w.rule(w.text(f"{f['name']}("), *([given] if given else []), w.text(")")))
    one = w.any(calls)
    every = w.rule(f'"[" {one} (", " {one})* "]"' if parallel else f'"[" {one} "]"')
    return _Form("<|python_start|>", w.rule(every, w.text("<|python_end|>")), False, every, "[")


def _deepseek(kind: tuple[str, ...], block: tuple[str, str], w: _Writer, functions: Functions, parallel: bool) -> _Form:
    calls = []
    for f in functions:
        begin = w.text("<｜tool▁call▁begin｜>", *kind, *((f["name"],) if kind else (f["name"], "<｜tool▁sep｜>")))
        end = w.text(block[1], "<｜tool▁call▁end｜>")
        calls.append(w.rule(begin, *([w.text(block[0])] if block[0] else []), w.json(_schema(f)), end))
    one = w.any(calls)
    between = f"{one} (SPACE {one})*" if parallel else one
    return _Form("<｜tool▁calls▁begin｜>", w.rule(between, w.text("<｜tool▁calls▁end｜>")), False)


def _shaped(shape: Shape, w: _Writer, functions: Functions, parallel: bool) -> _Form:
    if not shape.name:
        calls = [w.rule(w.text(f["name"]), *w.texts(shape.sep), "SPACE", w.json(_schema(f))) for f in functions]
        one = w.rule(w.any(calls), "SPACE", *w.texts(shape.close))
    else:
        schema, root = _objects(functions, shape.arguments, shape.name)
        if shape.nested:
            inner = {"type": "object", "properties": {"type": {"const": "function"}, "function": schema}}
            schema = {**inner, "required": ["function"], "additionalProperties": False}
        if shape.many:
            length = {} if parallel else {"maxItems": 1}
            schema = {"type": "array", "items": schema, "minItems": 1, **length}
        one = w.rule(w.json(schema | root), "SPACE", *w.texts(shape.close))
    if not shape.mark:
        between = f" (SPACE {w.text(shape.between)} SPACE {one})*" if shape.between else f" (SPACE {one})*"
        calls_ = w.rule(one + between if parallel and not shape.many else one)
        return _Form("", "", False, calls_, "[" if shape.many else "{")
    if not any(shape.around):
        return _Form(shape.mark, w.rule("SPACE", one), not shape.many)
    call = w.rule(*w.texts(shape.mark), "SPACE", one)
    every = w.rule(f"SPACE {call}" + (f" (SPACE {call})*" if parallel else ""), "SPACE", *w.texts(shape.around[1]))
    if shape.around[0]:
        return _Form(shape.around[0], every, False)
    return _Form(shape.mark, w.rule("SPACE", one), True)


def _harmony(w: _Writer, functions: Functions, free: bool, answer: str | None) -> str:
    """One call in any case: `<|call|>` ends the text, where it is a token that does so by itself. Where a model is free
    its messages of reasoning, and those before calls, are any text."""
    calls = []
    end, head = f"({w.text('<|call|>')})?", (w.text("<|channel|>"), w.text("<|constrain|>", "json", "<|message|>"))
    for f in functions:
        to = f"to=functions.{f['name']}"
        name = w.any(
            [f"{head[0]} {w.text(f'commentary {to} ')}", f"{w.text(f' {to}')} {head[0]} {w.text('commentary ')}"]
        )
        calls.append(w.rule(name, head[1], w.json(_schema(f)), end))
    if not free:
        return f"({w.text('<|start|>', 'assistant')})? {w.any(calls)}"
    any_text = w.rule(w.any([w.text("analysis"), w.text("commentary")]), w.text("<|message|>"), w.until("<|end|>"))
    between = w.rule(head[0], any_text, w.text("<|start|>", "assistant"))
    final = w.rule(head[0], w.text("final", "<|message|>"), answer or "TEXT")
    return f"{between}* {w.any([final, *calls])}"


def _properties(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list((schema.get("properties") or {}).items())


def _open(schema: Mapping[str, Any]) -> bool:
    """Whether it names no parameters and does not say that there are none."""
    return not schema.get("properties") and schema.get("additionalProperties") is not False


def _alone(value: Any, schema: Mapping[str, Any]) -> Any:
    """The schema of one parameter, with the definitions it may refer to."""
    kept = {k: v for k, v in schema.items() if k in ("$defs", "definitions")}
    return {**value, **kept} if isinstance(value, dict) else value


_WRITTEN: dict[str, Callable[[_Writer, Functions, bool], _Form]] = {
    "hermes": _hermes,
    "llama3_json": _llama,
    "mistral": _mistral,
    "pythonic": _pythonic,
    "qwen3_coder": _coder,
    "deepseek_v3": partial(_deepseek, ("function", "<｜tool▁sep｜>"), ("\n```json\n", "\n```")),
    "deepseek_v31": partial(_deepseek, (), ("", "")),
}
