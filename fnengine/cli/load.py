"""Many streams at once against a server, each with its times. One thread, raw sockets: a client must cost less than
what it measures, for it often shares the server's cores."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fnengine.cli.client import Server


@dataclass(frozen=True)
class Done:
    """One request, from sending it to its last event. Seconds."""

    first: float = 0.0
    """To the first event that carries text or ends the choice."""
    gaps: tuple[float, ...] = ()
    """Between events."""
    whole: float = 0.0
    tokens: int = 0
    """Generated, as the server counts them."""
    error: str | None = None


def drive(
    server: Server,
    route: str,
    bodies: list[dict[str, Any]],
    *,
    limit: int | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> tuple[list[Done], float]:
    """What became of each body, in order, and the seconds for all.

    Args:
        limit: most requests at once.
        rate: mean arrivals a second, at random moments (a Poisson process drawn from `seed`); None sends at once.
    """
    return asyncio.run(_drive(server, route, bodies, limit, rate, seed))


async def _drive(
    server: Server, route: str, bodies: list[dict[str, Any]], limit: int | None, rate: float | None, seed: int
) -> tuple[list[Done], float]:
    draw = random.Random(seed)
    gate = asyncio.Semaphore(limit or len(bodies))
    moments, at = [], 0.0
    for _ in bodies:
        moments.append(at)
        at += draw.expovariate(rate) if rate else 0.0

    async def one(body: dict[str, Any], moment: float) -> Done:
        await asyncio.sleep(moment)
        async with gate:
            try:
                return await stream(server, route, body)
            except (OSError, asyncio.IncompleteReadError, ValueError) as e:
                return Done(error=f"{type(e).__name__}: {e}")

    begin = time.perf_counter()
    done = await asyncio.gather(*(one(b, m) for b, m in zip(bodies, moments, strict=True)))
    return list(done), time.perf_counter() - begin


async def stream(server: Server, route: str, body: dict[str, Any]) -> Done:
    """One streamed POST, timed."""
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls, limit=1 << 22)
    try:
        data = json.dumps(body).encode()
        head = {"host": parts.netloc, "connection": "close", "content-length": str(len(data)), **server.headers()}
        lines = [f"POST {server.path(route)} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + data)
        status = (await reader.readline()).split()
        chunked = False
        while (line := await reader.readline()).strip():
            chunked |= line.lower().startswith(b"transfer-encoding:") and b"chunked" in line.lower()
        if len(status) < 2 or status[1] != b"200":
            return Done(error=f"{b' '.join(status).decode()}: {(await reader.read(2000)).decode(errors='replace')}")
        times, tokens, ended = [], 0, False
        async for event in _events(reader, chunked):
            if event == b"[DONE]":
                ended = True
                break
            value = json.loads(event)
            if value.get("error"):
                return Done(error=value["error"]["message"])
            if value["choices"]:
                times.append(time.perf_counter() - begin)
            if value.get("usage"):
                tokens = value["usage"]["completion_tokens"]
        if not ended or not times:
            return Done(error="the stream broke off")
        gaps = tuple(b - a for a, b in itertools.pairwise(times))
        return Done(times[0], gaps, times[-1], tokens)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader, chunked: bool):
    """The data of each server-sent event."""
    rest = b""
    while True:
        if chunked:
            size = int(await reader.readline() or b"0", 16)
            piece = (await reader.readexactly(size + 2))[:-2]
        else:
            piece = await reader.read(1 << 16)
        if not piece:
            return
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[6:]
