"""What a protocol needs of the application to have routes, and what several of them share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fnengine.errors import FnError, RequestError
from fnengine.host.grammar import FIELDS
from fnengine.serve.engine_port import EnginePort
from fnengine.serve.protocol import Generate
from fnengine.serve.replies import NotImplementedHere, problem

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Core:
    """The life of a request, as the application has it. Each protocol only says what is asked and how it is told."""

    engine: EnginePort
    read: Callable[..., Awaitable[Any]]
    """(request, body's type) -> (typed body, names of fields without effect)"""
    named: Callable[[Any], str]
    """The served name that a body means."""
    generate: Callable[..., Awaitable[Response]]
    """(request, body's type, make, task) -> the answer; `make` gives a `Job` with its writer, and the task is one of
    `SERVED`, by default `generate`."""
    from_chat: Callable[..., Any]
    """A `ChatBody` -> a `Job`."""
    wall: Callable[[], float]
    """Unix seconds."""
    thinks: bool = True
    """Whether reasoning is told apart here."""
    log: Callable[[str], None] = lambda _: None
    """Takes a text about a fault."""


@dataclass(frozen=True)
class Route:
    path: str
    methods: str
    endpoint: Endpoint
    model: Any = None
    """Of the body."""
    problem: Callable[[FnError], Response] = problem
    """How the protocol tells errors."""


SERVED = {
    "generate": "/v1/chat/completions, /v1/completions, /v1/responses and /v1/messages",
    "embed": "/v1/embeddings",
    "pool": "/pooling",
    "classify": "/classify",
    "score": "/score and /rerank",
}
"""Task of an engine -> the routes that ask for it."""


def check_task(engine: EnginePort, task: str) -> None:
    """Raises RequestError for a task that is not the engine's; names what is."""
    if task not in engine.tasks:
        raise RequestError(
            f"{engine.name} does not serve {SERVED[task]}",
            param="model",
            remedy=f"it serves {', '.join(SERVED[known] for known in engine.tasks)}",
        )


NOT_A_CHAT = (
    *("n", "prompt_logprobs", "logprob_token_ids", "return_token_ids", "return_tokens_as_token_ids", "timing"),
    "stream_options",
)
"""Fields of chats that ask for parts of an answer which other protocols do not have."""


def shared_fields(body: Generate) -> dict[str, Any]:
    """What a body of another protocol says about sampling and stopping, as fields of a chat.

    Raises:
        RequestError: it asks for something that an answer of its protocol has no place for.
    """
    given = {name: getattr(body, name) for name in Generate.model_fields if name in body.model_fields_set}
    given |= {name: value for name, value in (body.model_extra or {}).items() if name in FIELDS}
    for name in NOT_A_CHAT:
        value = given.pop(name, None)
        nothing = value is None or value is False or value == [] or (name == "n" and value == 1)
        if not nothing and not (name == "stream_options" and body.stream):
            raise RequestError("has no place in this answer", where=name, param=name, remedy="/v1/chat/completions has")
    return given


UNBUILT = (
    ("/v1/load_lora_adapter", "LoRA adapters are not implemented yet"),
    ("/v1/unload_lora_adapter", "LoRA adapters are not implemented yet"),
    ("/v1/responses/compact", "compacting a conversation is not implemented yet; send the whole of it"),
    ("/sleep", "giving memory back while nothing runs is not implemented yet"),
    ("/wake_up", "giving memory back while nothing runs is not implemented yet"),
)
"""Routes that clients know, and what is missing for them."""


def unbuilt() -> Sequence[Route]:
    """Routes that answer 501 and say what is missing."""

    def refuses(why: str) -> Endpoint:
        async def not_implemented(request: Request) -> Response:
            raise NotImplementedHere(why)

        return not_implemented

    return [Route(path, "POST", refuses(why)) for path, why in UNBUILT]
