"""A streaming client for /v1/completions that keeps the time of every event, and can go away in the middle.

It costs little, because it shares the machine with the server it measures: events are kept as bytes and read
afterwards. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

COMPLETIONS = "/v1/completions"
GOODBYE = b"[DONE]"


@dataclass
class Exchange:
    """One request and what came back, with times of `time.perf_counter`."""

    started: float
    status: int = 0
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    """(time, data) of every event, the last one included."""
    plain: bytes = b""
    """The body, when it is no event stream."""
    ended: float = 0.0
    cut: bool = False
    """The client went away on purpose."""
    late: bool = False
    """It did so because its time was up."""
    failure: str | None = None
    """What broke the connection."""

    @property
    def done(self) -> bool:
        return bool(self.arrivals) and self.arrivals[-1][1] == GOODBYE


@dataclass(frozen=True)
class Answer:
    """What an exchange says once it is read."""

    text: str
    tokens: list[int]
    """Ids, where the server sends them."""
    counts: list[int]
    """New tokens of each event that brought some; 1 where the server sends no ids."""
    times: list[float]
    """When each of these events came."""
    started: float
    ended: float
    finish: str | None
    usage: dict[str, Any] | None
    error: str | None
    """Why this is not a whole answer; None when it is one, or when the client left on purpose."""

    @property
    def first(self) -> float | None:
        """Seconds to the first token."""
        return self.times[0] - self.started if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between events that brought tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def produced(self) -> int:
        """Tokens generated: what the server counted, else what was seen."""
        return sum(self.counts) if self.usage is None else self.usage["completion_tokens"]


def read(x: Exchange) -> Answer:
    """The answer in an exchange; nothing in it is trusted."""
    text: list[str] = []
    tokens: list[int] = []
    counts: list[int] = []
    times: list[float] = []
    finish, usage, error = None, None, x.failure
    if x.status != 200 and error is None:
        error = f"status {x.status}: {x.plain[:300].decode(errors='replace')}"
    for at, data in x.arrivals:
        if data == GOODBYE:
            continue
        try:
            event = json.loads(data)
        except ValueError:
            error = error or f"an event is no JSON: {data[:200]!r}"
            continue
        if event.get("error"):
            error = error or f"error event: {event['error']}"
            continue
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids")
            piece = choice.get("text") or ""
            finish = choice.get("finish_reason") or finish
            text.append(piece)
            count = len(ids) if ids is not None else int(bool(piece))
            if count:
                tokens.extend(ids or ())
                counts.append(count)
                times.append(at)
    if x.cut:
        error = x.failure if x.status == 200 else error
    elif error is None and not x.done:
        error = "the stream ended without [DONE]"
    elif error is None and finish is None:
        error = "the stream ended without a finish reason"
    return Answer("".join(text), tokens, counts, times, x.started, x.ended, finish, usage, error)


def body_of(prompt: Sequence[int] | str, new: int, model: str | None = None, **more: Any) -> dict[str, Any]:
    """A greedy streaming request of exactly `new` tokens."""
    out: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **more,
    }
    return out if model is None else {"model": model, **out}


async def exchange(
    url: str,
    body: dict[str, Any],
    *,
    path: str = COMPLETIONS,
    cut_after: int | None = None,
    abrupt: bool = False,
    leave_at: float | None = None,
    limit: float = 600.0,
) -> Exchange:
    """One request on a connection of its own, never raising for what the other side does.

    Args:
        cut_after: go away after so many events (0: as soon as the request is sent).
        abrupt: go away by a reset instead of an orderly close.
        leave_at: go away at this time of `time.monotonic`.
        limit: seconds after which the request has failed.
    """
    at = urlsplit(url)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    ).encode()
    x = Exchange(time.perf_counter())
    writer = None
    try:
        async with asyncio.timeout(limit):
            reader, writer = await asyncio.open_connection(at.hostname, at.port or 80, limit=1 << 20)
            writer.write(head + data)
            await writer.drain()
            left = None if leave_at is None else max(0.0, leave_at - time.monotonic())
            try:
                async with asyncio.timeout(left) as clock:
                    await _receive(reader, x, cut_after)
            except TimeoutError:
                if not clock.expired():
                    raise
                x.cut = x.late = True
            if x.cut and not x.status:
                x.status = 200  # left before the server said anything
    except TimeoutError:
        x.failure = f"no end within {limit:g} s"
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as e:
        x.failure = f"{type(e).__name__}: {e}"
    finally:
        x.ended = time.perf_counter()
        if writer is not None:
            if abrupt:
                writer.transport.abort()
            else:
                writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return x


async def _receive(reader: asyncio.StreamReader, x: Exchange, cut_after: int | None) -> None:
    if cut_after == 0:
        x.cut = True
        return
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    x.status = int(head.split(None, 2)[1])
    streaming = b"text/event-stream" in head
    rest = b""
    async with contextlib.aclosing(_parts(reader, b"transfer-encoding: chunked" in head)) as parts:
        async for part in parts:
            if not streaming:
                x.plain += part
                continue
            now = time.perf_counter()
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                event = event.strip(b"\r\n")
                if event.startswith(b"data:"):
                    x.arrivals.append((now, event[5:].strip()))
                    if cut_after is not None and len(x.arrivals) >= cut_after:
                        x.cut = True
                        return


async def _parts(reader: asyncio.StreamReader, chunked: bool) -> AsyncGenerator[bytes, None]:
    """The body as it comes: its chunks, or what has arrived until the connection ends."""
    if not chunked:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def all_at_once(url: str, bodies: Iterable[dict[str, Any]], limit: float = 600.0) -> list[Exchange]:
    """Every request at the same moment, each on its own connection."""
    return list(await asyncio.gather(*(exchange(url, body, limit=limit) for body in bodies)))
