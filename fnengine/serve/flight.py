"""The engine's streams behind one HTTP request, and the table of those that are open."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from fnengine.errors import FnError
from fnengine.host.output import Delta
from fnengine.host.request import Request
from fnengine.serve.engine_port import EnginePort, Stream

Batch = list[tuple[int, Delta]]
"""(prompt, delta) pairs that were there at the same time."""
AT_ONCE = 1024
"""Deltas of several prompts that are taken out of their streams before they are sent."""


class Flight:
    """Streams of one HTTP request, one per prompt; closing ends all of them."""

    def __init__(self, id: str, table: dict[str, Flight]):
        self.id, self.streams, self._table = id, [], table
        self.streams: list[Stream]
        self.reason: FnError | None = None
        """Why it was ended from outside; None when it was not."""
        table[id] = self

    def submit(self, engine: EnginePort, requests: Sequence[Request]) -> None:
        """Hands all prompts to the engine, or none: what was accepted before one is refused is closed again."""
        try:
            for request in requests:
                self.streams.append(engine.submit(request))
        except BaseException:
            self.close()
            raise

    def straight(self, take: Callable[[int, Delta], bool]) -> None:
        """Offers deltas to `take` before they come in batches, where one stream is all there is (see `Stream`)."""
        if len(self.streams) == 1:
            self.streams[0].straight(partial(take, 0))

    def close(self, reason: FnError | None = None) -> None:
        """Aborts whatever still runs. At any time, any number of times; the first reason is what the client reads."""
        if self.reason is None:
            self.reason = reason
        for stream in self.streams:
            stream.close()
        if self._table.get(self.id) is self and reason is None:
            del self._table[self.id]

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Deltas in order of arrival; those that are there together come together, so that one write sends them."""
        if len(self.streams) == 1:
            stream = self.streams[0]
            async for delta in stream:
                batch = [(0, delta)]
                while stream.ready():
                    batch.append((0, await anext(stream)))
                yield batch
            return
        arrived: deque[tuple[int, Delta]] = deque()
        wake, taken = asyncio.Event(), asyncio.Event()

        async def pump(prompt: int, stream: Stream):
            async for delta in stream:
                arrived.append((prompt, delta))
                wake.set()
                while len(arrived) >= AT_ONCE:  # the rest waits in its stream, which knows how much is too much
                    taken.clear()
                    await taken.wait()

        pumps = [asyncio.ensure_future(pump(p, s)) for p, s in enumerate(self.streams)]
        for p in pumps:
            p.add_done_callback(lambda _: wake.set())
        try:
            while True:
                over = all(p.done() for p in pumps)
                if arrived:
                    batch = list(arrived)
                    arrived.clear()
                    taken.set()
                    yield batch
                elif over:
                    for p in pumps:
                        p.result()
                    return
                wake.clear()
                if not arrived and not all(p.done() for p in pumps):
                    await wake.wait()
        finally:
            for p in pumps:
                p.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


class Thinning:
    """Makes one delta of several, so that a chunk holds at least `interval` tokens; a choice's first and last are not
    held up."""

    def __init__(self, interval: int):
        self.interval = interval
        self._held: dict[tuple[int, int], Delta | None] = {}

    def __call__(self, batch: Batch) -> Batch:
        if self.interval <= 1:
            return batch
        out: Batch = []
        for prompt, delta in batch:
            key = (prompt, delta.index)
            if key in self._held:
                held = self._held[key]
                whole = delta if held is None else joined(held, delta)
                if len(whole.tokens) < self.interval and whole.finish is None:
                    self._held[key] = whole
                    continue
                delta = whole
            self._held[key] = None
            out.append((prompt, delta))
        return out


def joined(first: Delta, second: Delta) -> Delta:
    """Two consecutive deltas of one choice as one."""
    assert first.finish is None and first.index == second.index
    logprobs = second.logprobs if first.logprobs is None else first.logprobs + (second.logprobs or ())
    return second._replace(
        text=first.text + second.text,
        tokens=first.tokens + second.tokens,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )


def open_flight(table: dict[str, Flight], wanted: str | None) -> Flight:
    """A flight under the wanted id, or under that id and a suffix while another one has it."""
    id = wanted or uuid.uuid4().hex
    while id in table:
        id = f"{wanted}-{uuid.uuid4().hex[:8]}"
    return Flight(id, table)
