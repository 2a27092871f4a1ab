"""How model families write tool calls. Each format is a pure function that reads one call (see `calls.Read`).

Sources: the chat templates published with the models, which show calls of earlier turns as the models write them:
NousResearch/Hermes-2-Pro and Qwen/Qwen3 (hermes), meta-llama/Llama-3.1 and 3.2 (llama3_json, pythonic),
mistralai (mistral; `[ARGS]` and `[CALL_ID]` are of tokenizers v11 and v13), Qwen/Qwen3-Coder (qwen3_coder),
deepseek-ai/DeepSeek-V3, R1-0528 and V3.1 (deepseek_v3, deepseek_v31).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

from fnengine.serve.parsing.calls import Build, Format, Opening, Read, ends
from fnengine.serve.parsing.events import Call, Tools
from fnengine.serve.parsing.scan import Scan, read_json, read_object, scan_json, scan_python

LONGEST_NAME = 256
"""Characters that may stand between an opener and the arguments."""
MORE = Read("more")


def arguments_of(value: Any) -> Mapping[str, Any] | None:
    """Arguments; models now and then write them as JSON in a string, or null."""
    if isinstance(value, str):
        return read_object(value)
    return {} if value is None else value if isinstance(value, dict) else None


def named(name: str, value: str, tools: Tools, known: bool = False) -> tuple[Call, ...] | None:
    """Calls of `{"name": ..., "arguments": ...}` or a list of such.

    Args:
        known: only names of tools count, and arguments must be there: the object could as well be an answer.
    """
    try:
        read = read_json(value)
    except ValueError:
        return None
    calls = []
    for one in read if isinstance(read, list) else [read]:
        function = one.get("name") if isinstance(one, dict) else None
        if not isinstance(function, str) or not function or (known and function not in tools.schemas):
            return None
        key = next((k for k in ("arguments", "parameters") if k in one), None)
        arguments = arguments_of(None if key is None else one[key])
        if arguments is None or (known and key is None):
            return None
        calls.append(Call(function, arguments))
    return tuple(calls) or None


def unnamed(name: str, value: str, tools: Tools) -> tuple[Call, ...] | None:
    """The call of a name and an object of arguments."""
    try:
        arguments = read_json(value)
    except ValueError:
        return None
    return (Call(name, arguments),) if name and isinstance(arguments, dict) else None


_SKIPPED = r'(?:"(?:id|type|index)"\s{0,9}:\s{0,9}(?:"[^"\\]{0,99}"|\d{1,9})\s{0,9},\s{0,9})?'
_INSIDE = r'\{(?=\s{0,64}["}])'
"""The begin of arguments that are certain to be an object."""
OBJECT = re.compile(_INSIDE)
NEVER = re.compile(r"(?P<name>)(?!)")
"""Begins no call."""


@lru_cache(maxsize=64)
def head_of(name: str, arguments: tuple[str, ...], nested: bool = False) -> re.Pattern[str]:
    """How an object that is a call is written up to its arguments, where they come behind the name: what models are
    taught. All of it is bounded, because it is looked for again with every token; objects of any other form are read
    when they are whole."""
    keys = "|".join(map(re.escape, arguments))
    named = rf'"{re.escape(name)}"\s{{0,9}}:\s{{0,9}}"(?P<name>[^"\\\x00-\x1f]{{1,{LONGEST_NAME}}})"\s{{0,9}},\s{{0,9}}'
    inner = rf'\{{\s{{0,9}}{_SKIPPED}{named}"(?:{keys})"\s{{0,9}}:\s{{0,9}}'
    if nested:
        inner = rf'\{{\s{{0,9}}{_SKIPPED}"function"\s{{0,9}}:\s{{0,9}}{inner}'
    return re.compile(f"{inner}(?={_INSIDE})")


_NAMED = head_of("name", ("arguments", "parameters"))


def behind(
    text: str,
    start: int,
    scan: Scan,
    end: bool,
    name: str,
    tools: Tools,
    build: Build,
    tail: str,
    openers: tuple,
    head: re.Pattern[str] = _NAMED,
    known: bool = False,
) -> Read:
    """Reads the JSON value at `start` and the mark behind it.

    Args:
        name: from before the value, which then is the object of arguments.
        tail: may be missing; "" where there is none.
        head: how a value without a name before it begins, up to its arguments.
        known: only names of tools count.
    """
    listed = text[start] == "["
    if name and OBJECT.match(text, start):
        return Read("begun", opening=Opening(name, start, "", None, build, tail, openers))
    first = start if not listed else start + 1 + len(text[start + 1 :]) - len(text[start + 1 :].lstrip())
    if not name and (found := head.match(text, first)) is not None and (not known or found["name"] in tools.schemas):
        inside = "[" * listed + "".join("{" for c in re.sub(r'"[^"]*"', "", found[0]) if c == "{")
        return Read("begun", opening=Opening(found["name"], found.end(), inside, head, build, tail, openers))
    scan = scan_json(scan, text, start)
    upto = start + scan.at
    if scan.end == "wrong" or (end and not scan.end):
        return Read("wrong", max(1, upto))
    if not scan.end:
        return Read("more", scan=scan)
    after = ends(text, upto, tail, openers, end)
    if after is None:
        return Read("more", scan=scan)
    calls = build(name, text[start:upto], tools)
    return Read("wrong", upto) if calls is None else Read("calls", after, calls)


def read_hermes(text: str, opener: str, scan: Scan, end: bool, tools: Tools) -> Read:
    """`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`"""
    start = len(text) - len(text[len(opener) :].lstrip())
    if text[start : start + 1] != "{":
        return MORE if start == len(text) and not end else Read("wrong", len(opener))
    return behind(text, start, scan, end, "", tools, named, "</tool_call>", ("<tool_call>",))


def read_llama(text: str, opener: str, scan: Scan, end: bool, tools: Tools) -> Read:
    """`{"name": "f", "parameters": {...}}`, `; ` between several, perhaps behind `<|python_tag|>`."""
    start = 0 if opener == "{" else len(text) - len(text[len(opener) :].lstrip())
    if text[start : start + 1] != "{":
        return MORE if start == len(text) and not end else Read("wrong", len(opener))
    known = opener == "{"
    return behind(text, start, scan, end, "", tools, partial(named, known=known), "", (), known=known)


_MISTRAL = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\])?\s*")


def read_mistral(text: str, opener: str, scan: Scan, end: bool, tools: Tools) -> Read:
    """`[TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]`, or newer `[TOOL_CALLS]f[ARGS]{...}`."""
    start = len(text) - len(text[len(opener) :].lstrip())
    if text[start : start + 1] == "[":
        return behind(text, start, scan, end, "", tools, named, "", ())
    brace = text.find("{", start)
    if brace < 0 and len(text) - len(opener) <= LONGEST_NAME and not end:
        return MORE
    head = _MISTRAL.fullmatch(text, len(opener), brace) if 0 <= brace <= len(opener) + LONGEST_NAME else None
    if head is None:
        return Read("wrong", len(opener))
    return behind(text, brace, scan, end, head[1], tools, unnamed, "", ())


_DEEPSEEK = "<｜tool▁call▁begin｜>"
_DEEPSEEK_V3 = re.compile(r"\s*\w*\s*<｜tool▁sep｜>\s*([^\s`<]+)\s*(?:```(?:json)?)?\s*")
_DEEPSEEK_V31 = re.compile(r"\s*([^\s`<]+)\s*<｜tool▁sep｜>\s*")


def read_deepseek(head: re.Pattern[str], text: str, opener: str, scan: Scan, end: bool, tools: Tools) -> Read:
    """`<｜tool▁call▁begin｜>function<｜tool▁sep｜>f`, line end, a block of JSON, `<｜tool▁call▁end｜>`; V3.1 writes
    `f<｜tool▁sep｜>{...}` without type and block."""
    brace = text.find("{")
    if brace < 0 and len(text) - len(opener) <= LONGEST_NAME and not end:
        return MORE
    found = head.fullmatch(text, len(opener), brace) if 0 <= brace <= len(opener) + LONGEST_NAME else None
    if found is None:
        return Read("wrong", len(opener))
    return behind(text, brace, scan, end, found[1], tools, unnamed, "<｜tool▁call▁end｜>", (_DEEPSEEK,))


_FUNCTION = re.compile(r"\s*<function=([^<>\n]{1,240})>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]{1,240})>")
_CLOSED = re.compile(r"\s*</function>")
_UNFINISHED = re.compile(r"<(?:function|parameter)=[^<>\n]{0,240}")


def read_coder(text: str, opener: str, scan: Scan, end: bool, tools: Tools) -> Read:
    """`<tool_call><function=f><parameter=x>` value `</parameter></function></tool_call>`

    A call is certain with its first parameter, or where it ends without one.
    """
    head = _FUNCTION.match(text, len(opener))
    if head is None:
        return MORE if _comes(text, len(opener), ("<function=",)) and not end else Read("wrong", len(opener))
    name, rest = head[1], text[head.end() :]
    kind, _, upto = parameter(name, rest, end, tools)
    if kind == "one":
        opening = Opening(name, head.end(), "", None, unnamed, "</tool_call>", ("<tool_call>",), parameter)
        return Read("begun", opening=opening)
    if kind != "last":
        return MORE if kind == "more" else Read("wrong", head.end() + upto)
    after = ends(text, head.end() + upto, "</tool_call>", ("<tool_call>",), end)
    return MORE if after is None else Read("calls", after, (Call(name, {}),))


def parameter(name: str, text: str, end: bool, tools: Tools) -> tuple[str, str, int]:
    """The next parameter, or the end of them: a `calls.Part`."""
    found = _PARAMETER.match(text)
    if found is not None:
        close = text.find("</parameter>", found.end())
        if close < 0:
            return ("wrong", "", len(text)) if end else ("more", "", 0)
        schemas = tools.schemas.get(name, {}).get("properties")
        value = text[found.end() : close].removeprefix("\n").removesuffix("\n")
        given = typed(value, schemas.get(found[1]) if isinstance(schemas, dict) else None)
        said = f"{json.dumps(found[1], ensure_ascii=False)}: {json.dumps(given, ensure_ascii=False)}"
        return "one", said, close + len("</parameter>")
    if (closed := _CLOSED.match(text)) is not None:
        return "last", "", closed.end()
    return ("more" if not end and _comes(text, 0, ("<parameter=", "</function>")) else "wrong"), "", 0


def _comes(text: str, at: int, marks: tuple[str, ...]) -> bool:
    """Whether what begins at `at` may still become one of `marks` with its name."""
    rest = text[at:].lstrip()
    if any(mark.startswith(rest) for mark in marks):
        return True
    return rest.startswith(marks) and _UNFINISHED.fullmatch(rest) is not None


def typed(value: str, schema: Any) -> Any:
    """A parameter written without quotes as what its schema says; as text where that does not fit."""
    kinds = _kinds(schema)
    if "null" in kinds and value.strip() in ("null", "None"):  # templates write Python's word
        return None
    if not kinds or "string" in kinds:
        return value
    word = value.strip()
    if "boolean" in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        return read_json(word)
    except ValueError:
        return value


def _kinds(schema: Any) -> set[str]:
    """The types that a schema names, by itself or in alternatives."""
    if not isinstance(schema, dict):
        return set()
    kind = schema.get("type")
    found = {kind} if isinstance(kind, str) else {k for k in kind if isinstance(k, str)} if kind else set()
    for name in ("anyOf", "oneOf"):
        for one in schema.get(name) or ():
            found |= _kinds(one)
    return found


_PYTHON_START = "<|python_start|>"


def read_pythonic(text: str, opener: str, scan: Scan, end: bool, tools: Tools) -> Read:
    """`[f(x="a"), g()]`, perhaps between `<|python_start|>` and `<|python_end|>`."""
    start = 0 if opener == "[" else len(text) - len(text[len(opener) :].lstrip())
    if text[start : start + 1] != "[":
        return MORE if start == len(text) and not end else Read("wrong", len(opener))
    scan = scan_python(scan, text, start)
    upto = start + scan.at
    if scan.end == "wrong" or (end and not scan.end):
        return Read("wrong", max(1, upto))
    if not scan.end:
        return Read("more", scan=scan)
    calls = python_calls(text[start:upto])
    if calls is None or (opener == "[" and any(c.name not in tools.schemas for c in calls)):
        return Read("wrong", upto)
    return Read("calls", upto, calls)


def python_calls(text: str) -> tuple[Call, ...] | None:
    """The calls in a Python list of calls with literal keyword arguments; None for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of the backslash in "\d", which models write
            tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return tuple(_python_call(node) for node in tree.elts)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("no call with keywords")
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError("no name")
    return Call(name, {str(k.arg): _literal(k.value) for k in node.keywords})


def _literal(node: ast.expr) -> Any:
    """The JSON value of a literal; JSON's own words count as well."""
    words = {"true": True, "false": False, "null": None}
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool | int | float | None):
        if isinstance(node.value, float) and abs(node.value) == float("inf"):
            raise ValueError("too large a number")
        if isinstance(node.value, int) and node.value.bit_length() > 4096:
            raise ValueError("too large a number")
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if type(value) in (int, float):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(e) for e in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_literal(k) for k in node.keys if k is not None]
        if all(isinstance(k, str) for k in keys):
            return dict(zip(keys, map(_literal, node.values), strict=True))
    raise ValueError("no literal")


_AROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_WITHIN = ("<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
HERMES = Format("hermes", ("<tool_call>",), read_hermes, within=("</tool_call>",))
FORMATS = (
    HERMES,
    Format("llama3_json", ("<|python_tag|>",), read_llama, leading=("{",), silent=(";",)),
    Format("mistral", ("[TOOL_CALLS]",), read_mistral, within=("[ARGS]", "[CALL_ID]"), short_ids=True),
    Format("pythonic", (_PYTHON_START,), read_pythonic, leading=("[",), silent=("<|python_end|>",)),
    Format("qwen3_coder", ("<tool_call>",), read_coder, within=("</tool_call>",)),
    Format("deepseek_v3", (_DEEPSEEK,), partial(read_deepseek, _DEEPSEEK_V3), silent=_AROUND, within=_WITHIN),
    Format("deepseek_v31", (_DEEPSEEK,), partial(read_deepseek, _DEEPSEEK_V31), silent=_AROUND, within=_WITHIN),
)
