"""Server-sent events: framing, and a response that notices when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from fnengine.serve.connections import at_once

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
SILENCE = 30.0
"""Seconds without an event after which a comment is sent, so that proxies do not give the connection up."""
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

Send = Callable[[dict[str, Any]], Any]
Receive = Callable[[], Any]


def named_event(name: str, data: str) -> str:
    """An event of a protocol that names them."""
    return f"event: {name}\ndata: {data}\n\n"


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection (or the response is complete)."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that sends text as it comes, comments while nothing comes, and ends when nobody listens.

    Args:
        events: pieces of ready-made events; must end soon after `close`.
        close: frees what stands behind the events. Called as soon as the client has gone, and at the end in every
            case, so it must bear being called twice.
        silence: seconds between keep-alive comments.
        straight: is given a function that writes text at once, or says False where the connection does not take it
            now; it may be called while nothing of `events` is being written.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        close: Callable[[], None],
        headers: dict[str, str],
        silence: float = SILENCE,
        straight: Callable[[Callable[[str], bool]], None] = lambda write: None,
    ):
        self.events, self.close, self.silence, self.straight = events, close, silence, straight
        self.status_code, self.background = 200, None
        self.init_headers({**HEADERS, **headers})

    async def __call__(self, scope, receive: Receive, send: Send) -> None:
        lost = False
        clock = asyncio.get_running_loop().time
        last = clock()

        async def listen():
            nonlocal lost, last
            waiting = asyncio.ensure_future(until_gone(receive))
            try:
                while True:
                    done, _ = await asyncio.wait({waiting}, timeout=max(0.01, last + self.silence - clock()))
                    if done:
                        break
                    if clock() - last >= self.silence:
                        last = clock()
                        await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            finally:
                waiting.cancel()
            lost = True
            self.close()

        listener = asyncio.ensure_future(listen())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            send = scope.get("fnengine.send", send)
            if (write := at_once(send)) is not None:

                def direct(text: str) -> bool:
                    nonlocal last
                    last = clock()
                    return not lost and write(text.encode("ascii"))

                self.straight(direct)
            async with aclosing(self.events) as events:
                async for text in events:
                    if lost:
                        break
                    last = clock()
                    await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": True})
            if not lost:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # how other ASGI servers say that the client has gone
            pass
        finally:
            listener.cancel()
            self.close()
