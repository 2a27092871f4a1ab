"""The engine of models that read texts whole: requests in, vectors out, many texts in one forward.

    submit -> waiting -> take (by priority, then arrival, up to a budget of tokens) -> read -> Delta with its vector

It has the face of `Engine` where the two do the same, so that servers and callers need not know which one they have.
There is no pool, and nothing of a text outlives its batch: what is cancelled in the meantime is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fnengine import __version__, environment
from fnengine.drafting import Drafting
from fnengine.errors import ContextLengthError, DeviceFault, FnError, QueueFull, RequestError
from fnengine.host.garbage import Collector
from fnengine.host.output import Delta, Finish, Finished, Gauges, StepFacts, Usage
from fnengine.host.pooling import LABELS, POOLINGS, check_pooling, declared
from fnengine.host.request import Request
from fnengine.host.survey import WAITING, Row, Survey
from fnengine.host.tokenizer import Tokenizer
from fnengine.model import Model
from fnengine.settings import Settings
from fnengine.spec import Head
from fnengine.stream import Stream
from fnengine.whole import Ready, ready

log = logging.getLogger("fnengine")

Sink = Callable[[Delta], None]


@dataclass
class _Live:
    """What is kept of a request until it ends."""

    request: Request
    sink: Sink
    key: tuple[int, float, int]
    """Order of service: priority, arrival, number."""
    scheduled: float | None = None

    def __lt__(self, other: _Live) -> bool:
        return self.key < other.key


class Reader:
    """Serves requests for what a model makes of whole texts.

    Args:
        model: whose spec has a `Whole`.
        made: how it is read, and the limits (`whole.ready`).
        clock: seconds, monotonic; the only time it sees.
    """

    def __init__(
        self,
        model: Model,
        made: Ready,
        tokenizer: Tokenizer,
        *,
        names: tuple[str, ...] = ("model",),
        pooling: str = "last",
        fingerprint: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        whole = model.spec.whole
        assert whole is not None, f"{model.spec.architecture} is a language model: see `Engine`"
        self.model, self.made, self.tokenizer, self.clock = model, made, tokenizer, clock
        self.names, self.fingerprint = names, fingerprint
        self.head: Head | None = whole.head
        self.pooling = pooling if self.head is None else LABELS
        """Of requests that ask for none."""
        self.defaults: dict[str, Any] = {}
        self.max_logprobs = 0
        self.drafting = Drafting()
        self.on_step: list[Callable[[StepFacts], None]] = []
        self.on_finish: list[Callable[[Finished], None]] = []
        self._live: dict[str, _Live] = {}
        self._waiting: list[_Live] = []
        """A heap; who was aborted stays in it until his turn comes."""
        self._running: list[_Live] = []
        self._numbered = self._steps = self._rejections = 0
        self._compiled = made.traces.compiled
        self._work, self._state = asyncio.Event(), "not started"
        self._task: asyncio.Task[None] | None = None
        self._garbage = Collector(clock)

    @classmethod
    def build(
        cls,
        model: Model,
        settings: Settings | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        names: tuple[str, ...] = (),
        **options: Any,
    ) -> Reader:
        """A reader for a loaded model; `options` are fields of `Settings`."""
        settings = settings or Settings(**options)
        made = ready(model, settings)
        tokenizer = tokenizer or model.tokenizer
        environment.trim()  # what reading it took
        assert model.spec.whole is not None
        facts = [repr(model.spec), str(model.dtype), repr(settings), made.execution, made.attend.reason, __version__]
        return cls(
            model,
            made,
            tokenizer,
            names=names or (model.name,),
            pooling=declared(model.folder, model.spec.whole.pooling),
            fingerprint=f"fnengine-{__version__}-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8],
        )

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def most(self) -> int:
        """Texts that are read at once."""
        return self.made.rows

    @property
    def tasks(self) -> tuple[str, ...]:
        """What may be asked of it."""
        if self.head is None:
            return ("embed", "pool", "score")
        return ("classify", "pool", "score") if len(self.head.labels) == 1 else ("classify", "pool")

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.model.spec.vector

    @property
    def max_len(self) -> int:
        """Longest text in tokens."""
        return self.made.max_len

    @property
    def _reading(self) -> int:
        """Texts of the batch that is being read whose vectors somebody still wants."""
        return sum([self._live.get(x.request.id) is x for x in self._running])

    # --- requests -------------------------------------------------------------------------------------------------

    async def prepare(self, request: Request) -> Request:
        return request

    def submit(self, request: Request) -> Stream:
        """The request's stream of one delta; it waits in the queue from now on.

        Raises:
            RequestError, ContextLengthError: the request cannot be served as it is.
            QueueFull: too many wait already.
        """
        stream = Stream(self, request, most=1)
        self.submit_to(request, stream.put)
        return stream

    def submit_to(self, request: Request, sink: Sink) -> None:
        """Like `submit`, with a function that takes the delta."""
        self._check(request)
        waiting = len(self._live) - self._reading
        if waiting >= self.made.queue:
            self._rejections += 1
            raise QueueFull(f"{waiting} texts wait already, one more does not fit", remedy="try again later")
        request, self._numbered = replace(request, arrival=self.clock()), self._numbered + 1
        live = _Live(request, sink, (request.priority, request.arrival, self._numbered))
        self._live[request.id] = live
        heapq.heappush(self._waiting, live)
        self._work.set()

    def _check(self, request: Request) -> None:
        if request.id in self._live:
            raise RequestError(f"a request with id {request.id!r} is being served already", param="request_id")
        if request.pooling is None or request.strategy is not None:
            raise RequestError(
                f"{self.name} reads texts and writes none", remedy=f"what it does is {', '.join(self.tasks)}"
            )
        if request.pooling == LABELS and self.head is None:
            raise RequestError(f"{self.name} has no labels", param="pooling", remedy=f"one of {', '.join(POOLINGS)}")
        if request.pooling != LABELS:
            check_pooling(request.pooling)
        if request.n != 1 or request.stop.max_tokens != 0:
            raise RequestError("a text has one vector: n is 1 and max_tokens 0", param="pooling")
        n, vocab = len(request.prompt), self.model.spec.vocab
        if n == 0:
            raise RequestError("the text is empty", param="input")
        if n > self.max_len:
            raise ContextLengthError(f"the text has {n} tokens and the model reads {self.max_len}", param="input")
        wrong = request.prompt[(request.prompt < 0) | (request.prompt >= vocab)]
        if len(wrong):
            raise RequestError(f"token {wrong[0]} is outside the vocabulary of {vocab}", param="input")

    def abort(self, request_id: str) -> bool:
        """Ends a request; if it is being read, what comes of it is thrown away."""
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        self._finished(live, "abort")
        if len(self._waiting) > 64 and len(self._waiting) > 2 * len(self._live):  # mostly of the aborted
            self._waiting = [x for x in self._waiting if self._live.get(x.request.id) is x]
            heapq.heapify(self._waiting)
        return True

    # --- the loop -------------------------------------------------------------------------------------------------

    def take(self) -> list[_Live]:
        """The next batch, out of the queue: in order, as many as fit, and at least one if any waits."""
        batch: list[_Live] = []
        tokens = 0
        while self._waiting and len(batch) < self.made.rows:
            first = self._waiting[0]
            if self._live.get(first.request.id) is first:
                tokens += len(first.request.prompt)
                if batch and tokens > self.made.budget:
                    break
                batch.append(first)
            heapq.heappop(self._waiting)
        return batch

    def _begin(self) -> list[_Live]:
        self._running, now = self.take(), self.clock()
        for live in self._running:
            live.scheduled = now
        return self._running

    def _end(self, batch: Sequence[_Live], vectors: Sequence[np.ndarray] | Exception) -> None:
        """Hands out what became of a batch."""
        self._running = []
        error = None
        if isinstance(vectors, Exception):
            fault = vectors if isinstance(vectors, FnError) else DeviceFault(f"{type(vectors).__name__}: {vectors}")
            log.error("a batch failed: %s", fault, exc_info=vectors)
            error = str(fault)
        for i, live in enumerate(batch):
            if self._live.get(live.request.id) is not live:
                continue
            del self._live[live.request.id]
            usage = Usage(len(live.request.prompt), 0, 0)
            if isinstance(vectors, Exception):
                live.sink(Delta(0, finish="error", error=error, usage=usage))
            else:
                live.sink(Delta(0, finish="length", usage=usage, vector=vectors[i]))
            self._finished(live, "length" if error is None else "error")
        self._steps += 1
        tokens, seconds = sum(len(x.request.prompt) for x in batch), self.clock() - (batch[0].scheduled or 0.0)
        for observe in self.on_step:
            observe(StepFacts(tokens, len(batch), tokens, 0, (), (), seconds))

    def _read(self, batch: Sequence[_Live]) -> list[np.ndarray] | Exception:
        try:
            return self.made.read([live.request for live in batch])
        except Exception as e:
            return e

    def turn(self) -> bool:
        """One batch, for callers without an event loop: True while there is work."""
        batch = self._begin()
        if batch:
            self._end(batch, self._read(batch))
        return bool(self._live)

    async def start(self) -> None:
        """Starts the loop on the running event loop; twice is harmless."""
        if self._task is None or self._task.done():
            self._state = "running"
            self._garbage.start()
            self._task = asyncio.get_running_loop().create_task(self._loop())

    async def stop(self, timeout: float = 0.0) -> None:
        """Lets requests finish for at most `timeout` seconds, ends the rest, stops the loop."""
        self._garbage.stop()
        if self._task is None:
            return
        end = self.clock() + timeout
        while self._live and self.clock() < end and not self._task.done():
            await asyncio.sleep(0.01)
        self._fail("the server is shutting down")
        self._state = "stopped"
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None

    async def _loop(self) -> None:
        # One thread, always the same: a thread that computes has a team of OpenMP's of its own.
        with ThreadPoolExecutor(1, thread_name_prefix="reader") as thread:
            try:
                while True:
                    batch = self._begin()
                    if not batch:
                        self._garbage.turn(busy=False)
                        self._work.clear()
                        await self._work.wait()
                        continue
                    self._end(batch, await asyncio.get_running_loop().run_in_executor(thread, self._read, batch))
                    self._garbage.turn(busy=True)
                    await asyncio.sleep(0)
            except asyncio.CancelledError:
                raise
            except Exception as e:
                log.exception("the reader's loop ended")
                self._state = f"the reader's loop ended: {type(e).__name__}: {e}"
                self._fail("internal error: the reader's loop ended")

    def _fail(self, message: str) -> None:
        """Ends every request with an error."""
        lives, self._live, self._waiting = list(self._live.values()), {}, []
        for live in lives:
            live.sink(Delta(0, finish="error", error=message, usage=Usage(len(live.request.prompt), 0, 0)))
            self._finished(live, "error")

    def _finished(self, live: _Live, finish: Finish) -> None:
        r, now = live.request, self.clock()
        facts = Finished(r.id, finish, len(r.prompt), 0, 0, 1, 0, 0, r.arrival, live.scheduled, None, now)
        for observe in self.on_finish:
            observe(facts)

    # --- readings -------------------------------------------------------------------------------------------------

    def healthy(self) -> str | None:
        """None when able to serve, else why not."""
        return None if self._state == "running" else self._state

    def gauges(self) -> Gauges:
        """There is no pool: what is said of blocks is 0."""
        running = self._reading
        waiting = len(self._live) - running
        return Gauges(
            running=running,
            waiting=waiting,
            waiting_by_reason=(("capacity", waiting), ("deferred", 0)),
            kv_usage=0.0,
            kv_waste=0.0,
            blocks_total=0,
            blocks_held=0,
            blocks_cached=0,
            prefix_queries=0,
            prefix_hits=0,
            preemptions=0,
            swaps=0,
            rejections=self._rejections,
            steps=self._steps,
            recompiles=self.made.traces.compiled - self._compiled,
        )

    def survey(self, blocks: bool = True) -> Survey:
        """Every text that is being read, and the first of those that wait; the pool is empty."""
        running = [x for x in self._running if self._live.get(x.request.id) is x]
        waiting = [x for x in self._waiting if self._live.get(x.request.id) is x]
        listed = [*running, *heapq.nsmallest(WAITING, waiting)]
        return Survey(tuple(map(_row, listed)), max(len(waiting) - WAITING, 0), () if blocks else None, ())

    def graphs(self) -> None:
        """Nothing is captured."""
        return None

    def reset_prefix_cache(self) -> None:
        """There is none."""


def _row(live: _Live) -> Row:
    r, reads = live.request, live.scheduled is not None
    return Row(
        id=r.id,
        choice=0,
        state="prefilling" if reads else "waiting",
        waiting_for=None if reads else "its turn",
        prompt=len(r.prompt),
        cached=0,
        computed=len(r.prompt) if reads else 0,
        generated=0,
        max_tokens=0,
        blocks=0,
        preemptions=0,
        priority=r.priority,
        arrival=r.arrival,
        scheduled=live.scheduled,
        first_token=None,
    )
