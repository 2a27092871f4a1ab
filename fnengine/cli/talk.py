"""Text from a model, piece by piece: from an engine in this process or from a server, as one kind of function."""

from __future__ import annotations

import argparse
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fnengine.cli.client import Server
from fnengine.errors import DeviceFault

if TYPE_CHECKING:
    from fnengine.engine import Engine
    from fnengine.host.output import Delta
    from fnengine.host.request import Request

Pieces = Iterator[str]
Chat = Callable[[list[dict[str, Any]]], Pieces]
"""Messages -> the answer as it comes. Closing the iterator aborts the answer."""

SAMPLING = ("temperature", "top_p", "top_k")

_numbers = itertools.count()


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling values given on the command line, by the names of `Sampling`."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return given if args.sampling_seed is None else {**given, "seed": args.sampling_seed}


def server_chat(server: Server, model: str, args: argparse.Namespace) -> Chat:
    """Chat with a server's model."""
    fixed: dict[str, Any] = {"model": model, **asked(args)}
    if args.max_tokens is not None:
        fixed["max_tokens"] = args.max_tokens

    def chat(messages: list[dict[str, Any]]) -> Pieces:
        for event in server.events("/v1/chat/completions", {**fixed, "messages": messages}):
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    yield text

    return chat


def server_complete(server: Server, model: str, args: argparse.Namespace, prompt: str) -> Pieces:
    """The continuation of a prompt by a server's model."""
    body = {"model": model, "prompt": prompt, "max_tokens": args.max_tokens, **asked(args)}
    if args.ignore_eos:
        body["ignore_eos"] = True
    for event in server.events("/v1/completions", body):
        for choice in event["choices"]:
            if choice["text"]:
                yield choice["text"]


def local_chat(engine: Engine, args: argparse.Namespace) -> Chat:
    """Chat with an engine in this process."""

    def chat(messages: list[dict[str, Any]]) -> Pieces:
        tokenizer = engine.tokenizer
        ids = tokenizer.encode(tokenizer.render_chat(messages), add_special=False)
        return texts(engine, make_request(engine, ids, args))

    return chat


def local_complete(engine: Engine, args: argparse.Namespace, prompt: str) -> Pieces:
    """The continuation of a prompt by an engine in this process."""
    return texts(engine, make_request(engine, engine.tokenizer.encode(prompt), args, args.ignore_eos))


def make_request(engine: Engine, ids: list[int], args: argparse.Namespace, ignore_eos: bool = False) -> Request:
    """A request with the model's sampling defaults, and the command line's values over them."""
    import numpy as np

    from fnengine.host.request import Request, Sampling, Stop

    defaults = {k: v for k, v in engine.defaults.items() if k in Sampling.__dataclass_fields__}
    return Request(
        id=f"cli-{next(_numbers)}",
        prompt=np.array(ids, np.int32),
        sampling=Sampling(**{**defaults, **asked(args)}),
        stop=Stop(max_tokens=args.max_tokens, ignore_eos=ignore_eos),
    )


def texts(engine: Engine, request: Request) -> Pieces:
    """The text of one request as it comes, by turning the engine's loop here."""
    for _, delta in tagged(engine, [request]):
        if delta.text:
            yield delta.text


def tagged(engine: Engine, requests: list[Request]) -> Iterator[tuple[int, Delta]]:
    """All output of some requests as it comes, with the index of the request. Closing it aborts what still runs."""
    arrived: deque[tuple[int, Delta]] = deque()
    left = sum(r.n for r in requests)
    submitted = []
    try:
        for i, request in enumerate(requests):
            engine.submit_to(request, lambda delta, i=i: arrived.append((i, delta)))
            submitted.append(request.id)
        while left:
            turned = engine.turn()
            assert turned or arrived, "the engine has nothing to do, yet requests are open"
            while arrived:
                i, delta = arrived.popleft()
                if delta.finish == "error":
                    raise DeviceFault(delta.error or "the request failed")
                left -= delta.finish is not None
                yield i, delta
    finally:
        for request_id in submitted:
            engine.abort(request_id)
        while engine.turn():
            pass
