"""What a chat request says about tools and reasoning, checked. Pure functions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fnengine.errors import RequestError
from fnengine.host.grammar import Grammar, as_rule, written
from fnengine.host.guide import Reasoning
from fnengine.host.schema import check_schema
from fnengine.host.thinking import FIELD, Budget
from fnengine.serve.engine_port import Text
from fnengine.serve.parsing.choose import HARMONY
from fnengine.serve.parsing.events import Tools
from fnengine.serve.parsing.grammar import grammar_for
from fnengine.serve.parsing.parser import Parsers, State
from fnengine.serve.parsing.reasoning import reasons
from fnengine.serve.protocol import ChatBody

MOST_TOOLS = 1024
EFFORTS: Mapping[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
}
"""Tokens of reasoning that an effort comes to, where the chat template knows none; None is no limit."""
FORMATS = ("response_format", "text.format", "output_")
"""Fields that say what an answer's content is."""
FINAL = "<|channel|>final<|message|>"
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


@dataclass(frozen=True)
class Wanted:
    """What a request wants with its tools."""

    shown: list[dict[str, Any]] | None = None
    """Tools for the chat template."""
    tools: Tools | None = None
    """For the parser; None where no call may come."""
    grammar: Grammar | None = None
    """What the answer must follow once its reasoning is over; None for anything."""
    call: bool | None = None
    """Whether that is a call, or a content; None where it may be either."""
    ignored: tuple[str, ...] = ()
    """Fields without effect."""


def _refuse(param: str, what: str, remedy: str | None = None) -> NoReturn:
    raise RequestError(what, where=param, param=param, remedy=remedy)


def wanted(body: ChatBody, parsers: Parsers, text: Text, *, answer: Grammar | None = None, auto: bool = True) -> Wanted:
    """What the request's tools come to.

    Args:
        answer: what an answer that is no call has to be; None is anything.
        auto: whether models may choose tools by themselves here (--enable-auto-tool-choice).

    Raises:
        RequestError: tools or the choice are malformed, contradict each other, or this model's text cannot be read for
            calls; `param` names the field.
    """
    choice, names = _choice(body)
    content = Wanted() if answer is None else Wanted(grammar=answer, call=False, ignored=answer.ignored)
    if body.tools is None:
        return content
    schemas = check(body.tools)
    for name in names or ():
        if name not in schemas:
            _refuse("tool_choice", f"names the function {name[:80]!r}, tools has {', '.join(schemas)[:400]}")
    if choice == "none":  # what is not shown to the model cannot be called by it
        return content
    if choice == "auto" and not auto:
        _refuse("tool_choice", "auto is turned off here", "start the server with --enable-auto-tool-choice")
    template = text.templates.get("tool_use", text.templates.get("default", ""))
    if "tools" not in template:
        _refuse("tools", "this model's chat template does not show tools", "start the server with --chat-template FILE")
    if parsers.tools is None:
        why = "; ".join(parsers.notes[:1])
        _refuse("tools", f"calls cannot be read: {why}", "start the server with --tool-call-parser NAME")
    parallel = body.parallel_tool_calls is not False
    found = Tools(schemas, parallel)
    if choice != "auto" and answer is not None and not answer.field.startswith(FORMATS):
        # A format is of the answer's content, and such an answer has none.
        _refuse(answer.field, "only one constraint is possible, and tool_choice is another", "leave one out")
    rule = None if answer is None or choice != "auto" else as_rule(answer)
    if choice == "auto" and answer is not None and rule is None:
        what = "cannot stand beside tools that the model may call"
        _refuse(answer.field, what, 'send tool_choice "none", or a schema, a pattern or choices')
    strict = any(t["function"].get("strict") for t in body.tools)
    if choice == "auto" and answer is None and names is None and not strict:
        return Wanted(body.tools, found)
    form, shape = (HARMONY, None) if parsers.tools == HARMONY else (parsers.tools.name, parsers.tools.shape)
    # A mark that is one token is meant as that token, called special or not: that is how models write it.
    special = {mark: ids[0] for mark in parsers.marks(True) if len(ids := text.encode(mark, add_special=False)) == 1}
    checked, ignored = [], [] if answer is None else list(answer.ignored)
    for i, tool in enumerate(body.tools):
        function = tool["function"]
        if names is not None and function["name"] not in names:
            continue
        where = f"tools.{i}.function.parameters"
        given = function.get("parameters") or {"type": "object"}
        schema, notes = check_schema(given, where, strict=bool(function.get("strict")))
        checked.append({"function": {"name": function["name"], "parameters": schema}})
        ignored += notes
    made = grammar_for(checked, choice, form, parallel=parallel, special=special, answer=rule, shape=shape)
    grammar = written(made["grammar"], "tools", tuple(ignored))
    return Wanted(body.tools, found, grammar, None if choice == "auto" else True, grammar.ignored)


def reasoning_of(start: State | None, text: Text, call: bool | None) -> Reasoning | None:
    """Where an answer that follows a grammar may reason first; None where it begins with what it has to say.

    Args:
        start: of the parser, behind the prompt.
        call: whether the grammar is that of a call, or of a content; None where it may be either.
    """
    if start is None:
        return None

    if start.harmony is not None:  # a grammar of either knows its reasoning
        return None if call is None else Reasoning("<|end|>" if call else FINAL)
    thoughts = start.thoughts
    if thoughts is None or not reasons(thoughts):
        return None
    if thoughts.inside:
        return Reasoning(thoughts.tags.end)
    begin = text.encode(thoughts.tags.start, add_special=False)
    return Reasoning(thoughts.tags.end, begin[0]) if len(begin) == 1 else None


def budget_of(start: State | None, text: Text, tokens: int | None, call: bool | None) -> Budget | None:
    """How an answer is kept from reasoning longer than so many tokens; None where nothing has to be done for it.

    Args:
        start: of the parser, behind the prompt.
        call: whether the answer is held to a call, or to a content; None where it may be either.

    Raises:
        RequestError: nothing here tells reasoning from the answer.
    """
    if tokens is None:
        return None

    def ids(*marks: str) -> tuple[int, ...]:
        return tuple(i for m in marks for i in text.encode(m, add_special=False))

    if start is not None and start.harmony is not None:
        begin = "<|channel|>analysis<|message|>"
        if call:
            return Budget(tokens, ("<|end|>",), ids("<|end|>"), begin)
        on = ids("<|end|>", "<|start|>", "assistant", "<|channel|>")
        if call is None:
            return Budget(tokens, ("<|channel|>final", "<|channel|>commentary"), on, begin, ids("analysis")[0])
        return Budget(tokens, (FINAL,), on + ids("final", "<|message|>"), begin)
    thoughts = None if start is None else start.thoughts
    if thoughts is None:
        _refuse(FIELD, "nothing tells reasoning from the answer here", "start the server with --reasoning-parser NAME")
    if not reasons(thoughts):
        return None
    tags = thoughts.tags
    return Budget(tokens, (tags.end,), ids(tags.end), None if thoughts.inside else tags.start)


def _choice(body: ChatBody) -> tuple[str | dict[str, Any], tuple[str, ...] | None]:
    """(none, auto, required or an object that names a function; functions that may be called, None for all)."""
    choice = body.tool_choice
    if choice is None:
        return ("none" if body.tools is None else "auto"), None
    names: tuple[str, ...] | None = None
    if isinstance(choice, dict):
        if choice.get("type") == "custom":
            _refuse("tool_choice", "custom is not implemented", "send functions")
        if choice.get("type") == "allowed_tools":
            choice, names = _allowed(choice)
        else:
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if choice.get("type", "function") != "function" or not isinstance(name, str):
                _refuse("tool_choice", 'must be {"type": "function", "function": {"name": "..."}}')
            names = (name,)
    elif choice not in ("none", "auto", "required"):
        _refuse("tool_choice", f"must be none, auto, required or an object, got {choice[:40]!r}")
    if body.tools is None and choice not in ("none", "auto"):
        _refuse("tool_choice", "needs tools")
    return choice, names


def _allowed(choice: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """(auto or required, names) of a choice among some of the tools, all of which are shown to the model. Chats have it
    in an object of its own, responses do not."""
    inner = choice.get("allowed_tools", choice)
    mode = inner.get("mode") if isinstance(inner, dict) else None
    listed = inner.get("tools") if isinstance(inner, dict) else None
    functions = [t.get("function", t) for t in listed if isinstance(t, dict)] if isinstance(listed, list) else []
    names = tuple(f["name"] for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str))
    if mode not in ("auto", "required") or not names or len(names) != len(listed or ()):
        _refuse("tool_choice", "allowed_tools needs a mode, auto or required, and tools, a list of functions' names")
    return mode, names


def check(tools: list[dict[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Schemas of parameters by function name.

    Raises:
        RequestError: a tool is none; `param` says which part of it.
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    if len(tools) > MOST_TOOLS:
        _refuse("tools", f"must be at most {MOST_TOOLS}, got {len(tools)}")
    for i, tool in enumerate(tools):
        where, kind = f"tools.{i}", tool.get("type")
        if kind != "function":
            _refuse(f"{where}.type", f"must be 'function', got {json.dumps(kind)[:40]}")
        function = tool.get("function")
        if not isinstance(function, dict):
            _refuse(f"{where}.function", "is required")
        name, parameters = function.get("name"), function.get("parameters")
        if name is None:
            _refuse(f"{where}.function.name", "is required")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            what = f"must be up to 128 letters, digits, _, - or ., got {json.dumps(name)[:80]}"
            _refuse(f"{where}.function.name", what)
        if name in schemas:
            _refuse(f"{where}.function.name", f"{name!r} is there twice")
        if parameters is not None and not isinstance(parameters, dict):
            _refuse(f"{where}.function.parameters", "must be a JSON schema, which is an object")
        for key, type_, word in (("description", str, "a string"), ("strict", bool, "true or false")):
            if function.get(key) is not None and not isinstance(function[key], type_):
                _refuse(f"{where}.function.{key}", f"must be {word}")
        schemas[name] = parameters or {}
    return schemas


def special_marks(parsers: Parsers, text: Text, tools: bool = True) -> dict[str, int]:
    """Marks of the parsers that are special tokens of this tokenizer, with their ids. Their text is left out of answers
    unless it is asked for."""
    found = {}
    for mark in parsers.marks(tools):
        ids = text.encode(mark, add_special=False)
        if len(ids) == 1 and ids[0] in text.special_ids:
            found[mark] = ids[0]
    return found


@dataclass(frozen=True)
class Effort:
    """What a request says about how long the model reasons."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template."""
    budget: int | None = None
    """Tokens; None is no limit."""
    ignored: tuple[str, ...] = ()
    """Fields without effect."""


def effort(body: ChatBody, parsers: Parsers, text: Text) -> Effort:
    """What `reasoning_effort` and `thinking_token_budget` come to.

    An effort is given to the chat template; one that the template does not look at is a budget. `none` also turns
    thinking off where the template can do that. `chat_template_kwargs` wins, and so does a budget in tokens.

    Raises:
        RequestError: a value is none; `param` names it.
    """
    budget = body.thinking_token_budget
    if budget is not None and budget < -1:
        _refuse(FIELD, f"must be a number of tokens, or -1 for no limit, got {budget}")
    if body.reasoning_effort is None:
        return Effort(budget=None if budget == -1 else budget)
    template = text.templates.get("tool_use" if body.tools else "default", text.templates.get("default", ""))
    variables: dict[str, Any] = {"reasoning_effort": body.reasoning_effort}
    if body.reasoning_effort == "none":
        variables |= {"enable_thinking": False, "thinking": False}
    seen = any(re.search(rf"\b{name}\b", template) for name in variables)
    if seen or not parsers.thinks:
        return Effort(variables, None if budget == -1 else budget, () if seen else ("reasoning_effort",))
    if body.reasoning_effort not in EFFORTS:
        what = f"must be one of {', '.join(EFFORTS)}, got {body.reasoning_effort!r}"
        _refuse("reasoning_effort", what, f"or send {FIELD}")
    budget = EFFORTS[body.reasoning_effort] if budget is None else budget
    return Effort(variables, None if budget == -1 else budget)


def salt_of(id: str, created: int, prompt: tuple[int, ...]) -> str:
    """What ids of calls are made from. The prompt is in it: a client that gives every request the same id would else
    find equal ids in one conversation."""
    return hashlib.sha256(f"{id}:{created}:{prompt}".encode()).hexdigest()
