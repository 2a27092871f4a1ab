"""Anthropic's messages: /v1/messages as a chat, its answer as content blocks, and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from fnengine.errors import FnError, RequestError
from fnengine.host.grammar import Grammar, from_text_format
from fnengine.host.output import Delta
from fnengine.serve.answer import Answer, dump
from fnengine.serve.parsing.scan import read_object
from fnengine.serve.protocol import ChatBody, Generate, Int, TokenizeBody
from fnengine.serve.replies import as_json, header, problem
from fnengine.serve.routes import Core, Route, shared_fields
from fnengine.serve.sse import named_event
from fnengine.serve.translate import Job, from_tokenize

ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
ENDS = {"length": "max_tokens", "tool_calls": "tool_use"}


class CountBody(Generate):
    """What of a request decides how long its prompt is."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesBody(CountBody):
    max_tokens: Int  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    stop_sequences: list[str] | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


def _refuse(param: str, what: str, remedy: str | None = None) -> NoReturn:
    raise RequestError(what, where=param, param=param, remedy=remedy)


# --- from a body to a chat --------------------------------------------------------------------------------------------


def text_of(value: Any, where: str) -> str | list[dict[str, str]]:
    """A string, or the parts of a chat, out of a string or text blocks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse(where, "must be a string or a list of content blocks")
    for i, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            _refuse(f"{where}.{i}.type", f"{str(kind)[:40]!r} blocks are not implemented here, this model reads text")
        if not isinstance(block.get("text"), str):
            _refuse(f"{where}.{i}.text", "must be a string")
    parts = [{"type": "text", "text": block["text"]} for block in value]
    return parts[0]["text"] if len(parts) == 1 else parts


def turns_of(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message as turns of a chat: results of tools are turns of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        _refuse(f"{where}.role", f"must be user or assistant, got {str(role)[:40]!r}", "the system prompt is `system`")
    if not isinstance(content, list):
        return [{"role": role, "content": text_of(content, f"{where}.content")}]
    turns, said, calls, thought = [], [], [], []
    for i, block in enumerate(content):
        at, kind = f"{where}.content.{i}", block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            id, told = block.get("tool_use_id"), block.get("content")
            if not isinstance(id, str):
                _refuse(f"{at}.tool_use_id", "must be a string")
            told = "" if told is None else text_of(told, f"{at}.content")
            turns.append({"role": "tool", "tool_call_id": id, "content": told})
        elif kind == "tool_use" and role == "assistant":
            for name, type_ in (("id", str), ("name", str), ("input", dict)):
                if not isinstance(block.get(name), type_):
                    _refuse(f"{at}.{name}", f"must be {'an object' if type_ is dict else 'a string'}")
            function = {"name": block["name"], "arguments": dump(block["input"])}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "thinking" and role == "assistant":
            if not isinstance(block.get("thinking"), str):
                _refuse(f"{at}.thinking", "must be a string")
            thought.append(block["thinking"])
        else:
            text_of([block], at.rpartition(".")[0] if i == 0 else at)
            said.append({"type": "text", "text": block["text"]})
    if said or calls or not turns:
        text: Any = said[0]["text"] if len(said) == 1 else said or ("" if not calls else None)
        turn = {"role": role, "content": text}
        turns.append(turn | ({"tool_calls": calls} if calls else {}))
        if thought:
            turn = turns[-1]
            turn["reasoning_content"] = "".join(thought)
    return turns


def chat_fields(body: CountBody, thinks: bool = True) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(messages, tools and variables of the template, fields without effect).

    Args:
        thinks: whether reasoning is told apart, so that a budget of it can be kept.
    """
    fields: dict[str, Any] = {"messages": []}
    if body.system is not None:
        fields["messages"].append({"role": "system", "content": text_of(body.system, "system")})
    for i, message in enumerate(body.messages):
        fields["messages"] += turns_of(message, f"messages.{i}")
    ignored: tuple[str, ...] = ()
    if body.tools:
        fields["tools"] = [tool_of(tool, f"tools.{i}") for i, tool in enumerate(body.tools)]
    if body.thinking is not None:
        kind = body.thinking.get("type")
        if kind not in ("enabled", "disabled", "adaptive"):
            _refuse("thinking.type", f"must be enabled, disabled or adaptive, got {str(kind)[:40]!r}")
        if kind != "adaptive":
            on = kind == "enabled"
            fields["chat_template_kwargs"] = {"enable_thinking": on, "thinking": on}
        budget = body.thinking.get("budget_tokens")
        if budget is not None and (type(budget) is not int or budget < 0):
            _refuse("thinking.budget_tokens", "must be a number of tokens")
        if kind == "enabled" and budget is not None and thinks:
            fields["thinking_token_budget"] = budget
        used = ("type", *(["budget_tokens"] if thinks else ()))
        ignored = tuple(f"thinking.{name}" for name in body.thinking if name not in used)
    return fields, ignored


def tool_of(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool as chats have it."""
    if tool.get("type", "custom") != "custom":
        _refuse(f"{where}.type", f"{str(tool['type'])[:40]!r} tools are not implemented", "send functions of your own")
    if not isinstance(tool.get("input_schema"), dict):
        _refuse(f"{where}.input_schema", "must be a JSON schema, which is an object")
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def chat_of(body: MessagesBody, thinks: bool = True) -> tuple[ChatBody, tuple[str, ...]]:
    """(the chat that a request is, fields without effect).

    Raises:
        RequestError: `param` names the field, in the words of this protocol.
    """
    fields, ignored = chat_fields(body, thinks)
    fields |= shared_fields(body)
    for i, stop in enumerate(body.stop_sequences or ()):
        if not stop:
            _refuse(f"stop_sequences.{i}", "must not be empty")
    if body.stop_sequences:
        fields["stop"] = body.stop_sequences
    choice = body.tool_choice
    if choice is not None:
        names = {"auto": "auto", "any": "required", "none": "none"}
        kind = choice.get("type")
        if kind == "tool":
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
        elif kind in names:
            fields["tool_choice"] = names[kind]
        else:
            _refuse("tool_choice.type", f"must be auto, any, tool or none, got {str(kind)[:40]!r}")
        if choice.get("disable_parallel_tool_use"):
            fields["parallel_tool_calls"] = False
    return ChatBody(**fields), ignored


def form_of(body: MessagesBody) -> tuple[Grammar | None, tuple[str, ...]]:
    """(what the answer has to be, fields without effect); the format stands in a field of its own or in a newer one."""
    config = body.output_config or {}
    given = {"output_format": body.output_format, "output_config.format": config.get("format")}
    found = [(name, value) for name, value in given.items() if value is not None]
    if len(found) > 1:
        _refuse("output_format", "is the older name of output_config.format", "give one of them")
    form = None
    for name, value in found:
        if not isinstance(value, dict) or value.get("type") != "json_schema":
            _refuse(f"{name}.type", "must be json_schema")
        form = from_text_format(value, name)
    return form, tuple(f"output_config.{name}" for name in config if name != "format")


# --- from pieces to blocks --------------------------------------------------------------------------------------------


class Message:
    """An answer as content blocks; the events of the stream and the whole message come of the same steps."""

    def __init__(self, answer: Answer, stops: Sequence[str] = ()):
        self.answer, self.stops = answer, stops
        self.blocks: list[dict[str, Any]] = []
        self.open = False
        self.arguments = ""
        """Of the block that is open, as far as they have come."""
        self.ended: tuple[str | None, str | None] = (None, None)
        """(stop_reason, stop_sequence)"""

    @property
    def done(self) -> bool:
        return self.answer.done

    def whole(self, blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The message with these blocks."""
        shape, (reason, sequence) = self.answer.shape, self.ended
        told: dict[str, Any] = {"id": shape.id, "type": "message", "role": "assistant", "model": shape.model}
        told |= {"content": list(blocks), "stop_reason": reason, "stop_sequence": sequence}
        return told | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens so far; those found in the cache are not among `input_tokens`, as Anthropic counts."""
        u = self.answer.usage()
        cached = u["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": u["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": u["completion_tokens"],
        }

    def events(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """What a delta adds, as events."""
        out: list[dict[str, Any]] = []
        for _, piece in self.answer.pieces(prompt, delta):
            if "role" in piece:
                out.append({"type": "message_start", "message": self.whole(())})
                continue
            added = piece.get("delta", {"content": piece["text"]} if piece["text"] else {})
            if "content" in added:
                out += self.add("text", "text", "text_delta", "text", added["content"])
            if "reasoning" in added:
                out += self.add("thinking", "thinking", "thinking_delta", "thinking", added["reasoning"])
            for call in added.get("tool_calls", ()):
                if "id" in call:
                    begun = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
                    out += self.begin(begun)
                if arguments := call["function"]["arguments"]:
                    self.arguments += arguments
                    out.append(self.grown("input_json_delta", "partial_json", arguments))
            if (finish := piece.get("finish")) is not None:
                out += self.close()
                matched = piece["stop_reason"] if piece["stop_reason"] in self.stops else None
                self.ended = ENDS.get(finish, "stop_sequence" if matched else "end_turn"), matched
        return out

    def add(self, kind: str, place: str, change: str, name: str, text: str) -> list[dict[str, Any]]:
        """Text, in a block of its kind."""
        out = []
        if not self.open or self.blocks[-1]["type"] != kind:
            out = self.begin({"type": kind, place: "", **({"signature": ""} if kind == "thinking" else {})})
        self.blocks[-1][place] += text
        return [*out, self.grown(change, name, text)]

    def begin(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        out = self.close()
        self.blocks.append(block)
        self.open = True
        return [*out, {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}]

    def grown(self, change: str, name: str, text: str) -> dict[str, Any]:
        delta = {"type": change, name: text}
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def close(self) -> list[dict[str, Any]]:
        was, self.open = self.open, False
        if was and self.arguments:
            given = read_object(self.arguments)  # None where they broke off
            self.blocks[-1]["input"], self.arguments = {"unreadable": self.arguments} if given is None else given, ""
        return [{"type": "content_block_stop", "index": len(self.blocks) - 1}] if was else []

    def chunks(self, prompt: int, delta: Delta) -> str:
        return "".join([named_event(e["type"], dump(e)) for e in self.events(prompt, delta)])

    def straight(self, prompt: int, delta: Delta, write: Callable[[str], bool]) -> bool:
        return False

    def last(self) -> str:
        reason, sequence = self.ended
        change = {"stop_reason": reason, "stop_sequence": sequence}
        ends = ({"type": "message_delta", "delta": change, "usage": self.usage()}, {"type": "message_stop"})
        return "".join([named_event(e["type"], dump(e)) for e in ends])

    def failed(self, error: FnError) -> str:
        return named_event("error", dump(error_of(error)))

    def take(self, prompt: int, delta: Delta) -> None:
        self.events(prompt, delta)

    def body(self) -> dict[str, Any]:
        return self.whole(self.blocks)


def error_of(error: FnError) -> dict[str, Any]:
    """An error as Anthropic's clients expect it."""
    return {"type": "error", "error": {"type": ERRORS.get(error.code, "api_error"), "message": str(error)}}


def told(error: FnError) -> Response:
    """The response that an error is."""
    plain = problem(error)
    keep = {k: v for k, v in plain.headers.items() if k in ("retry-after", "x-should-retry")}
    return as_json(error_of(error), plain.status_code, keep)


def routes(core: Core) -> list[Route]:
    """The routes of messages."""

    def make(body: MessagesBody, engine: Any, *, id: str, created: int, model: str) -> Job:
        chat, ignored = chat_of(body, core.thinks)
        form, notes = form_of(body)
        job: Job = core.from_chat(chat, engine, id=id, created=created, model=model, form=form)
        shape, stop = replace(job.shape, id=f"msg_{id}"), job.requests[0].stop
        return Job(
            job.requests,
            shape,
            job.ignored + ignored + notes,
            lambda shape, *more: Message(Answer(shape, *more), stop.strings + stop.patterns),
        )

    async def messages(request: Request) -> Response:
        return await core.generate(request, MessagesBody, make)

    async def count_tokens(request: Request) -> Response:
        body, ignored = await core.read(request, CountBody)
        core.named(body)
        fields, more = chat_fields(body)
        ids = from_tokenize(TokenizeBody(**fields), core.engine.tokenizer)
        names = tuple(sorted({*ignored, *more}))
        return as_json({"input_tokens": len(ids)}, headers={"x-fnengine-ignored": header(names)} if names else None)

    return [
        Route("/v1/messages", "POST", messages, MessagesBody, told),
        Route("/v1/messages/count_tokens", "POST", count_tokens, CountBody, told),
    ]
