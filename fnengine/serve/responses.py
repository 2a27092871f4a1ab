"""OpenAI's responses: /v1/responses as a chat, its answer as items, and a bounded store of what was answered."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import Response

from fnengine.errors import FnError, NotFound, RequestError
from fnengine.host.grammar import Grammar, from_text_format
from fnengine.host.output import Delta
from fnengine.serve.answer import Answer, dump
from fnengine.serve.flight import Flight
from fnengine.serve.protocol import Bool, ChatBody, Generate, Int
from fnengine.serve.replies import Aborted, Fault, as_json
from fnengine.serve.routes import Core, Route, shared_fields
from fnengine.serve.sse import named_event
from fnengine.serve.translate import Job

MOST_STORED = 1024
STORE_BYTES = 64 << 20
"""Most responses that are kept, and most bytes of them as JSON; the ones not used for longest go first."""


class ResponsesBody(Generate):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Int | None = None
    previous_response_id: str | None = None
    store: Bool = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Bool = None
    reasoning: dict[str, Any] | None = None
    thinking_token_budget: Int | None = None
    text: dict[str, Any] | None = None
    truncation: str | None = None
    background: Bool = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    top_logprobs: Int | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def _refuse(param: str, what: str, remedy: str | None = None) -> NoReturn:
    raise RequestError(what, where=param, param=param, remedy=remedy)


# --- the store --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A response that was answered, and the items that it and all before it are."""

    response: dict[str, Any]
    items: tuple[dict[str, Any], ...]
    """Input and output, from the beginning of the conversation."""
    inputs: tuple[dict[str, Any], ...]
    """Its own input."""


class Store:
    """The newest responses; what nobody asked for the longest gives way. Gone with the process. Safe from any thread,
    because requests are read on others than the event loop's."""

    def __init__(self, most: int = MOST_STORED, most_bytes: int = STORE_BYTES):
        self.most, self.most_bytes, self.bytes = most, most_bytes, 0
        self._kept: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, stored: Stored) -> None:
        size = len(dump(stored.response)) + len(dump(stored.items))
        if size > self.most_bytes:
            return
        with self._lock:
            if (before := self._kept.pop(stored.response["id"], None)) is not None:
                self.bytes -= before[1]
            self._kept[stored.response["id"]] = stored, size
            self.bytes += size
            while len(self._kept) > self.most or self.bytes > self.most_bytes:
                self.bytes -= self._kept.popitem(last=False)[1][1]

    def get(self, id: str) -> Stored:
        """Raises `NotFound` for one that is not kept, or not any more."""
        with self._lock:
            if (found := self._kept.get(id)) is not None:
                self._kept.move_to_end(id)
                return found[0]
        raise NotFound(
            f"no response {id[:200]!r} is stored",
            param="response_id",
            remedy=f"the last {self.most} are kept, at most {self.most_bytes} bytes of them, unless store is false",
        )

    def drop(self, id: str) -> None:
        """Forgets one. Raises as `get` does."""
        self.get(id)
        with self._lock:
            if (found := self._kept.pop(id, None)) is not None:
                self.bytes -= found[1]


def listed(item: dict[str, Any], id: str) -> dict[str, Any]:
    """An item of an input in the full shape that a listing has, whatever was left out of it."""
    kind = item.get("type", "message")
    out = {"id": id, "status": "completed", **item, "type": kind}
    if kind == "message":
        answered = item["role"] == "assistant"
        text = {"type": "output_text", "annotations": []} if answered else {"type": "input_text"}
        content = item["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        out["content"] = [p if p["type"] == "refusal" else {**text, "text": p["text"]} for p in parts]
    elif kind == "function_call_output" and not isinstance(item["output"], str):
        out["output"] = [{"type": "input_text", "text": p.get("text", "")} for p in item["output"]]
    elif kind == "reasoning":
        out |= {"summary": item.get("summary") or [], "content": item.get("content") or []}
    return out


# --- from a body to a chat --------------------------------------------------------------------------------------------


def items_of(value: str | list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Input as a list of items."""
    if not value:
        _refuse("input", "must not be empty")
    return ({"type": "message", "role": "user", "content": value},) if isinstance(value, str) else tuple(value)


def parts_of(value: Any, where: str, kinds: Sequence[str] = ("input_text", "output_text", "text", "refusal")) -> Any:
    """Text as a chat's content."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse(where, "must be a string or a list of parts")
    parts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            _refuse(f"{where}.{i}.type", f"{str(kind)[:40]!r} parts are not implemented here, this model reads text")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            _refuse(f"{where}.{i}.text", "must be a string")
        parts.append({"type": "text", "text": text})
    return parts[0]["text"] if len(parts) == 1 else parts


def turns_of(items: Sequence[dict[str, Any]], where: str = "input") -> list[dict[str, Any]]:
    """Items as turns of a chat: a model's text and the calls behind it are one turn."""
    turns: list[dict[str, Any]] = []
    thought = ""
    for i, item in enumerate(items):
        at, kind = f"{where}.{i}", item.get("type", "message" if "role" in item else None)
        if kind == "message":
            turn = {"role": item.get("role"), "content": parts_of(item.get("content"), f"{at}.content")}
            if turn["role"] not in ("user", "assistant", "system", "developer"):
                _refuse(f"{at}.role", f"must be user, assistant, system or developer, got {str(turn['role'])[:40]!r}")
            if thought and turn["role"] == "assistant":
                turn["reasoning_content"], thought = thought, ""
            turns.append(turn)
        elif kind == "function_call":
            for name in ("call_id", "name", "arguments"):
                if not isinstance(item.get(name), str):
                    _refuse(f"{at}.{name}", "must be a string")
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": None})
                if thought:
                    turns[-1]["reasoning_content"], thought = thought, ""
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            turns[-1] = {**turns[-1], "tool_calls": [*turns[-1].get("tool_calls", ()), call]}
        elif kind == "function_call_output":
            if not isinstance(item.get("call_id"), str):
                _refuse(f"{at}.call_id", "must be a string")
            told = parts_of(item.get("output"), f"{at}.output")
            turns.append({"role": "tool", "tool_call_id": item["call_id"], "content": told})
        elif kind == "reasoning":
            content = item.get("content") or ()
            if not isinstance(content, list | tuple) or not all(isinstance(p, dict) for p in content):
                _refuse(f"{at}.content", "must be a list of parts")
            thought += "".join(str(p.get("text", "")) for p in content)
        else:
            _refuse(f"{at}.type", f"{str(kind)[:40]!r} items are not implemented")
    return turns


def chat_of(body: ResponsesBody, before: Sequence[dict[str, Any]]) -> tuple[ChatBody, Grammar | None, tuple[str, ...]]:
    """(the chat that a request is, what its answer has to be, fields without effect), given the items of the
    conversation before it.

    Raises:
        RequestError: `param` names the field, in the words of this protocol.
    """
    for name, nothing in (
        ("conversation", (None,)),
        ("prompt", (None,)),
        ("top_logprobs", (None, 0)),
        ("truncation", (None, "disabled")),
        ("max_tokens", (None,)),
    ):
        if getattr(body, name) not in nothing:
            remedy = "the field is called max_output_tokens here" if name == "max_tokens" else "leave it out"
            _refuse(name, "is not implemented", remedy)
    asked = (body.text or {}).get("format")
    form = None if asked is None else from_text_format(asked)
    if body.background and (body.stream or body.store is False):
        what = "what is made in the background cannot be streamed, and is stored"
        _refuse("background", what, "leave out stream, and store: false")
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        _refuse("max_output_tokens", f"must be at least 1, got {body.max_output_tokens}")
    first = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    turns = [*turns_of(before, "previous_response_id"), *turns_of(items_of(body.input))]
    fields: dict[str, Any] = {**shared_fields(body), "messages": [*first, *turns]}
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if body.tools:
        fields["tools"] = [tool_of(tool, f"tools.{i}") for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        named = isinstance(body.tool_choice, dict) and body.tool_choice.get("type") == "function"
        function = {"type": "function", "function": {"name": body.tool_choice.get("name")}} if named else None  # pyright: ignore[reportAttributeAccessIssue]
        fields["tool_choice"] = function or body.tool_choice
    for name in ("parallel_tool_calls", "chat_template_kwargs", "thinking_token_budget"):
        if getattr(body, name) is not None:
            fields[name] = getattr(body, name)
    ignored = [f"text.{name}" for name in body.text or () if name != "format"]
    for name, value in (body.reasoning or {}).items():
        if name == "effort" and isinstance(value, str):
            fields["reasoning_effort"] = value
        elif value is not None:
            ignored.append(f"reasoning.{name}")
    return ChatBody(**fields), form, tuple(ignored)


def tool_of(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool as chats have it."""
    if tool.get("type") != "function":
        _refuse(f"{where}.type", f"{str(tool.get('type'))[:40]!r} tools are not implemented", "send functions")
    given = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {k: tool[k] for k in given if tool.get(k) is not None}}


# --- from pieces to items ---------------------------------------------------------------------------------------------


class Items:
    """An answer as items; the events of the stream and the whole response come of the same steps.

    Args:
        body: what was asked.
        keep: takes the response when it is whole.
        wall: Unix seconds.
    """

    def __init__(
        self,
        answer: Answer,
        body: ResponsesBody,
        keep: Callable[[dict[str, Any], list[dict[str, Any]]], None],
        wall: Callable[[], float],
    ):
        self.answer, self.asked, self.keep, self.wall = answer, body, keep, wall
        self.items: list[dict[str, Any]] = []
        self.finish: str | None = None
        self.numbered = 0

    @property
    def done(self) -> bool:
        return self.answer.done

    def response(self, status: str, error: FnError | None = None) -> dict[str, Any]:
        """The response as it is now."""
        shape, body, over = self.answer.shape, self.asked, status in ("completed", "incomplete")
        return {
            "id": shape.id,
            "object": "response",
            "created_at": shape.created,
            "completed_at": int(self.wall()) if status == "completed" else None,
            "status": status,
            "background": body.background is True,
            "error": None if error is None else {"code": "server_error", "message": str(error)},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": shape.model,
            "output": [dict(item) for item in self.items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self.usage() if over else None,
            "user": None,
            "metadata": body.metadata or {},
        }

    def usage(self) -> dict[str, Any]:
        u = self.answer.usage()
        return {
            "input_tokens": u["prompt_tokens"],
            # Nobody pays for writing to the prefix cache, and nothing is kept there on purpose: 0 of that are counted.
            "input_tokens_details": {
                "cached_tokens": u["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": u["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": u.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
            },
            "total_tokens": u["total_tokens"],
        }

    def events(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """What a delta adds, as events."""
        out: list[dict[str, Any]] = []
        for _, piece in self.answer.pieces(prompt, delta):
            if "role" in piece:
                began = self.response("in_progress")
                out += [{"type": "response.created", "response": began}]
                out += [{"type": "response.in_progress", "response": began}]
                continue
            added = piece.get("delta", {"content": piece["text"]} if piece["text"] else {})
            if "content" in added:
                out += self.add("message", added["content"])
            if "reasoning" in added:
                out += self.add("reasoning", added["reasoning"])
            for call in added.get("tool_calls", ()):
                if "id" in call:
                    out += self.begin("function_call", call_id=call["id"], name=call["function"]["name"], arguments="")
                if arguments := call["function"]["arguments"]:
                    self.items[-1]["arguments"] += arguments
                    out.append(self.at("response.function_call_arguments.delta", delta=arguments))
            if piece.get("finish") is not None:
                self.finish = piece["finish"]
                out += self.close("incomplete" if self.finish == "length" else "completed")
        return out

    def at(self, type: str, **more: Any) -> dict[str, Any]:
        """An event about the newest item."""
        return {"type": type, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **more}

    def about(self, type: str) -> dict[str, Any]:
        """An event that carries the newest item."""
        item = self.items[-1]
        content = {"content": [dict(p) for p in item["content"]]} if "content" in item else {}
        return {"type": type, "output_index": len(self.items) - 1, "item": {**item, **content}}

    def begin(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """A new item, behind the end of the one before."""
        out = self.close("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        id = f"{prefix}_{self.answer.shape.id.removeprefix('resp_')}_{len(self.items)}"
        self.items.append({"id": id, "type": kind, "status": "in_progress", **fields})
        return [*out, self.about("response.output_item.added")]

    def add(self, kind: str, text: str) -> list[dict[str, Any]]:
        """Text, in an item of its kind."""
        out = []
        if not self.items or self.items[-1]["type"] != kind or self.items[-1]["status"] != "in_progress":
            own = {"role": "assistant"} if kind == "message" else {"summary": []}
            out = self.begin(kind, **own, content=[])
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.items[-1]["content"].append(part)
            out.append(self.at("response.content_part.added", content_index=0, part=dict(part)))
        self.items[-1]["content"][0]["text"] += text
        if kind == "message":
            return [*out, self.at("response.output_text.delta", content_index=0, delta=text, logprobs=[])]
        return [*out, self.at("response.reasoning_text.delta", content_index=0, delta=text)]

    def close(self, status: str) -> list[dict[str, Any]]:
        """The end of the newest item, if it is open."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item, out = self.items[-1], []
        item["status"] = status
        if item["type"] == "function_call":
            more = {"name": item["name"], "arguments": item["arguments"]}
            out.append(self.at("response.function_call_arguments.done", **more))
        else:
            part = item["content"][0]
            name = "output_text" if item["type"] == "message" else "reasoning_text"
            more = {"logprobs": []} if item["type"] == "message" else {}
            out.append(self.at(f"response.{name}.done", content_index=0, text=part["text"], **more))
            out.append(self.at("response.content_part.done", content_index=0, part=dict(part)))
        return [*out, self.about("response.output_item.done")]

    def told(self, events: Sequence[dict[str, Any]]) -> str:
        out = []
        for event in events:
            out.append(named_event(event["type"], dump({**event, "sequence_number": self.numbered})))
            self.numbered += 1
        return "".join(out)

    def chunks(self, prompt: int, delta: Delta) -> str:
        return self.told(self.events(prompt, delta))

    def straight(self, prompt: int, delta: Delta, write: Callable[[str], bool]) -> bool:
        return False

    def last(self) -> str:
        response = self.body()
        return self.told([{"type": f"response.{response['status']}", "response": response}])

    def failed(self, error: FnError) -> str:
        return self.told([{"type": "response.failed", "response": self.response("failed", error)}])

    def take(self, prompt: int, delta: Delta) -> None:
        self.events(prompt, delta)

    def body(self) -> dict[str, Any]:
        """The whole response, which is kept from now on."""
        response = self.response("incomplete" if self.finish == "length" else "completed")
        self.keep(response, self.items)
        return response


class Background:
    """Responses that nobody waits for, while they are made."""

    def __init__(self, store: Store, log: Callable[[str], None] = lambda _: None):
        self.store, self._log = store, log
        self.open: dict[str, tuple[Flight, Items, Callable[[dict[str, Any], list[dict[str, Any]]], None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(
        self,
        keep: Callable[[dict[str, Any], list[dict[str, Any]]], None],
        flight: Flight,
        items: Items,
        rest: Coroutine[Any, Any, Any],
    ) -> Response:
        """Lets a response go on by itself; as it is now. What becomes of it goes to `keep`."""
        id = items.answer.shape.id
        self.open[id] = flight, items, keep
        task = asyncio.get_running_loop().create_task(self._run(id, items, rest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return as_json(items.response("in_progress"))

    async def _run(self, id: str, items: Items, rest: Coroutine[Any, Any, Any]) -> None:
        status, error = "", None
        try:
            await rest  # and keeps what came of it
        except FnError as e:
            status, error = "failed", e
        except Exception:
            self._log(f"response {id}: {traceback.format_exc()}")
            status, error = "failed", Fault("internal error; the server's log says more")
        found = self.open.pop(id, None)
        if found is not None and status:
            items.close("incomplete")
            found[2](items.response(status, error), items.items)

    def get(self, id: str) -> dict[str, Any] | None:
        """One of them, as far as it has come."""
        return None if (found := self.open.get(id)) is None else found[1].response("in_progress")

    def end(self, id: str) -> dict[str, Any] | None:
        """Cancels one: as far as it came, and kept like that."""
        if (found := self.open.pop(id, None)) is None:
            return None
        flight, items, keep = found
        flight.close(Aborted("the response was cancelled"))
        items.close("incomplete")
        response = items.response("cancelled")
        keep(response, items.items)
        return response


def routes(core: Core, store: Store | None = None) -> list[Route]:
    """The routes of responses."""
    store = Store() if store is None else store
    background = Background(store, core.log)

    def make(body: ResponsesBody, engine: Any, *, id: str, created: int, model: str) -> Job:
        before: tuple[dict[str, Any], ...] = ()
        if body.previous_response_id is not None:
            if body.previous_response_id in background.open:
                _refuse("previous_response_id", "names a response that is still in progress", "wait for its end")
            before = store.get(body.previous_response_id).items
        chat, form, ignored = chat_of(body, before)
        job: Job = core.from_chat(chat, engine, id=id, created=created, model=model, form=form)
        inputs = items_of(body.input)

        def keep(response: dict[str, Any], output: list[dict[str, Any]]) -> None:
            if body.store is not False:
                store.put(Stored(response, (*before, *inputs, *output), inputs))

        return Job(
            job.requests,
            replace(job.shape, id=f"resp_{id}"),
            job.ignored + ignored,
            lambda shape, *more: Items(Answer(shape, *more), body, keep, core.wall),
            partial(background.begin, keep) if body.background else None,
        )

    async def create(request: Request) -> Response:
        return await core.generate(request, ResponsesBody, make)

    def stored(request: Request) -> Stored:
        return store.get(request.path_params["id"])

    async def retrieve(request: Request) -> Response:
        if request.query_params.get("stream") == "true":
            _refuse("stream", "what has been answered is not streamed again", "leave it out")
        return as_json(background.get(request.path_params["id"]) or stored(request).response)

    async def cancel(request: Request) -> Response:
        response = background.end(request.path_params["id"]) or stored(request).response
        if not response["background"]:
            _refuse("response_id", "names a response that was not made in the background", "close its connection")
        return as_json(response)

    async def delete(request: Request) -> Response:
        id = request.path_params["id"]
        background.end(id)
        store.drop(id)
        return as_json({"id": id, "object": "response", "deleted": True})

    async def input_tokens(request: Request) -> Response:
        body, _ = await core.read(request, ResponsesBody)
        name = core.named(body)
        job = await asyncio.to_thread(make, body, core.engine, id="counted", created=0, model=name)
        return as_json({"object": "response.input_tokens", "input_tokens": sum(map(len, job.shape.prompts))})

    async def input_items(request: Request) -> Response:
        id = request.path_params["id"]
        items = [listed(it, f"in_{id.removeprefix('resp_')}_{i}") for i, it in enumerate(stored(request).inputs)]
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"], "has_more": False}
        return as_json({"object": "list", "data": items, **ends})

    return [
        Route("/v1/responses", "POST", create, ResponsesBody),
        Route("/v1/responses/input_tokens", "POST", input_tokens, ResponsesBody),
        Route("/v1/responses/{id}", "GET", retrieve),
        Route("/v1/responses/{id}", "DELETE", delete),
        Route("/v1/responses/{id}/cancel", "POST", cancel),
        Route("/v1/responses/{id}/input_items", "GET", input_items),
    ]
