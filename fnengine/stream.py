"""The deltas of one request, for a reader on the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from fnengine.host.output import Delta
from fnengine.host.request import Request

log = logging.getLogger("fnengine")


class Aborts(Protocol):
    """What a stream needs of an engine."""

    def abort(self, request_id: str) -> bool: ...


class Stream:
    """The deltas of one request, as an async iterator; ends when every choice has finished. `close()` aborts.

    A reader that stays away is not waited for, and not kept for either: when more than `most` deltas wait, the request
    is aborted, and they give way to one that says so.
    """

    def __init__(self, engine: Aborts, request: Request, most: int):
        self._engine, self._id, self._open, self._most = engine, request.id, request.n, most
        self._items: deque[Delta] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._straight: Callable[[Delta], bool] | None = None

    def put(self, delta: Delta) -> None:
        """The sink the engine writes to."""
        if self._straight is not None and self._wake is not None and not self._wake.done() and self._straight(delta):
            return
        self._items.append(delta)
        if len(self._items) > self._most and delta.finish is None:
            self._give_up()
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def straight(self, take: Callable[[Delta], bool]) -> None:
        """Offers each delta to `take`, in the engine's own call, while the reader waits and nothing else does; what it
        says False to comes by the iterator. To wake a task costs several times what it takes to write an event."""
        self._straight = take

    def _give_up(self) -> None:
        why = f"the client left {len(self._items)} deltas unread; at most {self._most} are kept (--answer-memory)"
        log.warning("request %s was aborted: %s", self._id, why)
        self._engine.abort(self._id)
        self._items = deque([Delta(0, finish="abort", error=why)])
        self._open = 1

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._items:
            if self._open <= 0:
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None
        delta = self._items.popleft()
        self._open -= delta.finish is not None
        return delta

    def ready(self) -> bool:
        """Whether the next delta is there already, so that a writer can put several into one packet."""
        return bool(self._items)

    def close(self) -> None:
        """Aborts what is still running; safe at any time and twice."""
        self._engine.abort(self._id)
        self._open = 0
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
