"""Connections that take more than they should: heads without an end, bodies that drip, answers that nobody reads.

uvicorn has a timeout for idle connections only. It lets a client that sends a letter a minute, or stops reading in the
middle of an answer, keep its socket and its memory for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from uvicorn.protocols.http.flow_control import FlowControl

State = Literal["head", "body", "unread"]
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 34\r\nconnection: close\r\n\r\nThe request's head is much too big"
)


@dataclass(frozen=True)
class Limits:
    """What a client may take. Seconds are those that a connection stays in one state."""

    head: float = 30.0
    """Until the head of a request is whole, from its first byte or from connecting."""
    body: float = 300.0
    """Until the body of a request is whole."""
    unread: float = 60.0
    """In which the client reads nothing of what waits for it."""
    head_bytes: int = 1 << 16
    every: float = 1.0
    """Seconds between two looks at all connections."""


def in_head(protocol: Any) -> bool:
    """Whether what comes next belongs to a head: nothing has come so far, or a message has begun whose head is not
    whole. (Each message has a scope of its own, which its cycle gets when the head is whole.)"""
    return protocol.cycle is None or protocol.cycle.scope is not protocol.scope


def state_of(protocol: Any) -> State | None:
    """What a connection waits for its client to do, if it does."""
    if protocol.transport is None:
        return None
    if protocol.flow.write_paused or protocol.transport.is_closing():
        return "unread"
    if in_head(protocol):
        return "head"
    return "body" if protocol.cycle.more_body else None


class Overdue:
    """Finds connections that have been in one state for too long."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._since: dict[Any, tuple[State, float]] = {}

    def __call__(self, connections: Iterable[Any], now: float) -> list[Any]:
        """Those whose time is over. To be called every second or so, with all connections that there are."""
        before, self._since, over = self._since, {}, []
        for protocol in connections:
            state = state_of(protocol)
            if state is None:
                continue
            known, since = before.get(protocol, (state, now))
            since = since if known == state else now
            self._since[protocol] = state, since
            if now - since > getattr(self.limits, state):
                over.append(protocol)
        return over


async def watch(connections: set[Any], limits: Limits) -> None:
    """Cuts connections whose time is over, until cancelled."""
    overdue, clock = Overdue(limits), asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(limits.every)
        for protocol in overdue(list(connections), clock()):
            protocol.transport.abort()


def outermost(app: Callable[..., Any]) -> Callable[..., Any]:
    """The application, to which a scope also tells the server's own `send`: what stands between has seen all that it
    looks at when an answer has begun, and would cost a coroutine each for every event."""

    async def told(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scope["fnengine.send"] = send
        await app(scope, receive, send)

    return told


def at_once(send: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]) -> Callable[[bytes], bool] | None:
    """A function that sends a piece of a body without waiting, or says False, and sends nothing, while the client does
    not read what it was sent. None where the server is not uvicorn, which alone tells what it would wait for."""
    flow = getattr(getattr(send, "__self__", None), "flow", None)
    if not isinstance(flow, FlowControl):
        return None

    def write(data: bytes) -> bool:
        if flow.write_paused:
            return False
        sending = send({"type": "http.response.body", "body": data, "more_body": True})
        try:
            sending.send(None)
        except StopIteration:
            return True
        sending.close()  # it waits before it does anything
        return False

    return write


def bounded(make: Callable[..., Any], limits: Limits) -> Callable[..., Any]:
    """A maker of protocols whose heads have a largest size; a larger one is a 431, and the end of its connection."""

    def make_bounded(*args: Any, **kw: Any) -> Any:
        protocol = make(*args, **kw)
        plain, size = protocol.data_received, 0

        def data_received(data: bytes) -> None:
            nonlocal size
            if protocol.transport.is_closing():
                return
            plain(data)
            size = size + len(data) if in_head(protocol) else 0
            if size > limits.head_bytes and not protocol.transport.is_closing():
                protocol.transport.write(TOO_LARGE)
                protocol.transport.close()

        protocol.data_received = data_received
        return protocol

    return make_bounded
