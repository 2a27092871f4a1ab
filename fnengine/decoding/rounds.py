"""Many strategies at once over a Runtime: `run`. What they all wait for becomes one `extend` a round.

    strategies' thread   a b c compute | all wait, hand over |            | a b c compute | ...
    caller's thread      looks at them |                     | rt.extend  | looks at them | ...

Exactly one of the two threads is at work at any time, so the ledger needs no lock: `seq[:n]` in a strategy never meets
an `extend`. The loop itself says when everybody waits, by asking its selector to sleep (`Selector`), so a strategy may
use all of asyncio: child tasks, sleeps, sockets. The device is driven by the caller's thread, whose helpers are warm;
the strategies' thread has none (`team.alone`).
"""

from __future__ import annotations

import asyncio
import queue
import selectors
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from fnengine.decoding.live import (
    Ask,
    Bounds,
    Emitted,
    Job,
    Live,
    Outcome,
    answered,
    does_nothing,
    holds_thread,
)
from fnengine.decoding.watch import Watch
from fnengine.kernels import team
from fnengine.runtime import ALL_LOGITS_BYTES, Runtime
from fnengine.sequence import Likeliest

SPINS = 64
"""Turns of a loop that never rests after which those who wait are served nevertheless."""
FEW = 256
"""Tokens of calls that want one row of logits or none, up to which they join a call that wants all: reading the weights
once more costs more than that many rows of logits that nobody reads."""


def run(
    runtime: Runtime,
    jobs: Iterable[Job | tuple[Any, ...]],
    *,
    on_emit: Callable[[Emitted], bool | None] | None = None,
    eos: Iterable[int] | None = None,
    bounds: Bounds | None = None,
    at_once: int | None = None,
) -> list[Outcome]:
    """The outcomes of all jobs, in order. One that fails, stalls or is stopped takes nobody with it.

    Args:
        jobs: `Job`s or tuples of their fields, `(strategy, prompt, args)`.
        on_emit: sees what is emitted as it comes, in this thread; a true answer stops that strategy ("abort").
        eos: the model's end-of-sequence ids; None: those of its config.
        bounds: how long a strategy may keep to itself.
        at_once: strategies that run at the same time; None: the most rows of a step. The others wait for their turn.

    Raises:
        RequestError: a job cannot be run as it is (unknown arguments, empty prompt); none was started.
        ContextLengthError: a prompt leaves no room for a token.

    Example:
        >>> run(rt, [(sample, "Once upon a time", {})])[0].tokens
    """
    made = [job if isinstance(job, Job) else Job(*job) for job in jobs]
    model_eos = runtime.model.spec.eos if eos is None else eos
    rounds = _Rounds(runtime, bounds or Bounds(), at_once or runtime.rows)
    rounds.lives = [Live(rounds, i, job, model_eos) for i, job in enumerate(made)]
    if not made:
        return []
    rounds.thread.start()
    try:
        while rounds.serve(on_emit):
            pass
    except BaseException:
        rounds.close()
        raise
    finally:
        outcomes = [live.done for live in rounds.lives]
    return [o for o in outcomes if o is not None]


class _Rounds:
    """The two threads of a `run`, and what they hand each other."""

    def __init__(self, runtime: Runtime, bounds: Bounds, at_once: int):
        self.runtime, self.bounds, self.at_once = runtime, bounds, at_once
        self.watch = Watch(bounds.turn, time.monotonic)
        self.lives: list[Live] = []
        self.asks: list[Ask] = []
        self.parts: list[Emitted] = []
        self.closing = False
        self._aborted = False
        self.thread = threading.Thread(target=self._work, name="fnengine strategies", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._spins = 0
        self._looked = 0.0
        self._to_caller: queue.SimpleQueue[tuple[list[Ask], list[Emitted]] | BaseException | None] = queue.SimpleQueue()
        self._to_loop: queue.SimpleQueue[tuple[list[Any], set[int]] | None] = queue.SimpleQueue()

    # --- the port of each strategy --------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.runtime.model.tokenizer

    def ask(self, live: Live, ask: Ask) -> None:
        self.asks.append(ask)

    def withdraw(self, ask: Ask) -> None:
        self.asks = [a for a in self.asks if a is not ask]

    def emitted(self, live: Live, part: Emitted) -> None:
        self.parts.append(part)

    # --- the strategies' thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        end = None
        try:
            self.watch.thread = threading.get_ident()
            team.alone()
            self._loop = asyncio.SelectorEventLoop(Selector(self._rest))  # pyright: ignore[reportArgumentType]
            try:
                self._loop.run_until_complete(self._all())
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            finally:
                self._loop.close()
        except BaseException as e:
            end = e
        self._to_caller.put(end)

    async def _all(self) -> None:
        asyncio.get_running_loop().set_task_factory(self.watch.task)
        gate = asyncio.Semaphore(self.at_once)

        async def one(live: Live) -> None:
            async with gate:
                await live.go()

        await asyncio.gather(*(one(live) for live in self.lives))

    def _rest(self, busy: bool) -> bool:
        """Whether there is work again, for a loop that has none left, or that never rests."""
        if self.closing:
            return not self._aborted and self._abort_all()
        self._spins = self._spins + 1 if busy else 0
        if not (self.asks or self.parts) or (busy and self._spins < SPINS):
            return False
        self._spins = 0
        asks, self.asks = [a for a in self.asks if not a.future.done()], []
        emitted, self.parts = self.parts, []
        if not asks and not emitted:
            return False
        self._to_caller.put((asks, emitted))
        if (back := self._to_loop.get()) is None:
            return self._abort_all()
        answers, enough = back
        for ask, answer in zip(asks, answers, strict=True):
            if isinstance(answer, BaseException):
                ask.future.set_exception(answer)
            else:
                ask.future.set_result(answer)
        for index in enough:
            self.lives[index].abort()
        return True

    def _abort_all(self) -> bool:
        """True: there is work, that of ending."""
        self.closing = self._aborted = True
        for live in self.lives:
            live.abort()
        return True

    # --- the caller's thread --------------------------------------------------------------------------------------

    def serve(self, on_emit: Callable[[Emitted], bool | None] | None) -> bool:
        """One round, waited for and answered; False when all strategies have ended."""
        handed = self._wait()
        if handed is None:
            emitted, self.parts = self.parts, []
            _tell(on_emit, emitted)
            if not self.closing:
                self.thread.join()
            return False
        asks, emitted = handed
        try:
            enough = _tell(on_emit, emitted)
            self._to_loop.put((answer(asks), enough))
        finally:
            del handed, asks  # whoever keeps an error of `on_emit` must not keep sequences with it
        return True

    def _wait(self) -> tuple[list[Ask], list[Emitted]] | None:
        """What the strategies hand over; None when there are none any more."""
        pause = self.bounds.turn / 4
        while True:
            now = self.watch.clock()
            if now - self._looked > pause:
                self._looked = now
                if self._look(now):
                    return None
            try:
                handed = self._to_caller.get(timeout=pause)
            except queue.Empty:
                continue
            if isinstance(handed, BaseException):
                raise handed
            return handed

    def _look(self, now: float) -> bool:
        """Whether the thread is lost. Stops turns that are too long, and strategies that do nothing."""
        if (lost := self.watch.look()) is not None:
            self.closing = True  # should it ever come back, everything there ends
            error = holds_thread(lost.owner.name)
            for live in self.lives:
                if live.done is None:
                    live.done = Outcome(tuple(live.tokens), "error", None, error)
            return True
        for live in self.lives:
            if live.last and live.done is None and not live.asking and now - live.last > self.bounds.idle:
                assert self._loop is not None
                error = does_nothing(live.name, self.bounds.idle)
                self._call(live.condemn, error)
        return False

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(function, *args)
            except RuntimeError:  # closed in between
                return

    def close(self) -> None:
        """Ends all strategies at once and waits for that."""
        self.closing = True
        self._to_loop.put(None)
        self._call(self._abort_all)
        end = self.watch.clock() + 8 * self.bounds.turn
        while self.thread.is_alive() and self.watch.clock() < end:
            self.thread.join(self.bounds.turn / 4)
            self.watch.look()


class Selector:
    """A selector that tells when its loop would sleep. `rest(busy)` says whether there is work after all."""

    def __init__(self, rest: Callable[[bool], bool]):
        self._inner, self._rest = selectors.DefaultSelector(), rest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def select(self, timeout: float | None = None) -> Any:
        busy = timeout is not None and timeout <= 0
        return self._inner.select(0 if self._rest(busy) else timeout)


def _tell(on_emit: Callable[[Emitted], bool | None] | None, emitted: list[Emitted]) -> set[int]:
    """Jobs of which somebody has had enough."""
    enough: set[int] = set()
    for part in emitted:
        if on_emit is not None and part.index not in enough and on_emit(part):
            enough.add(part.index)
    return enough


# --- asks to calls ----------------------------------------------------------------------------------------------------


def answer(asks: list[Ask]) -> list[Any]:
    """What each ask gets: results as of its own `rt.extend`, or the exception."""
    answers: dict[Ask, Any] = {}
    for batch, want in _batches(asks):
        try:
            answers.update(_call(batch, want))
        except Exception as error:
            if len(batch) == 1:
                answers[batch[0]] = answered(error)
                continue
            # All or nothing is what each of them asked for itself, so each gets an answer of its own.
            for ask in batch:
                try:
                    answers.update(_call([ask], ask.want))
                except Exception as own:
                    answers[ask] = answered(own)
    return [answers[ask] for ask in asks]


def _batches(asks: list[Ask]) -> list[tuple[list[Ask], str | None]]:
    """(asks that share a call, the logits which that call wants)."""
    by_runtime: dict[int, list[Ask]] = {}
    for ask in asks:
        by_runtime.setdefault(id(ask.pairs[0][0].runtime), []).append(ask)
    batches = []
    for group in by_runtime.values():
        rt = group[0].pairs[0][0].runtime
        whole, rest = [a for a in group if a.want == "all"], [a for a in group if a.want != "all"]
        # A fresh sequence is looked up in the prefix cache, but not by a call that wants all logits, or taps.
        fresh = any(not len(s) for a in rest if not a.taps for s, _ in a.pairs)
        plain = [a for a in rest if not a.taps] if fresh else []
        rest = [a for a in rest if a not in plain]
        n = sum(a.tokens for a in rest)
        fits = 4 * rt.model.spec.vocab * (n + sum(a.tokens for a in whole)) <= ALL_LOGITS_BYTES
        if whole and rest and n <= FEW and fits:
            whole, rest = [a for a in group if a not in plain], []
        for part in (*_filled(whole, rt.rows), *_filled(rest, rt.rows), *_filled(plain, rt.rows)):
            wants = {a.want for a in part}
            batches.append((part, "all" if "all" in wants else "last" if "last" in wants else None))
    return batches


def _filled(asks: list[Ask], rows: int) -> list[list[Ask]]:
    """The asks in order, cut where they would need more rows than a step has."""
    parts: list[list[Ask]] = []
    room = 0
    for ask in asks:
        if len(ask.pairs) > room:
            parts.append([])
            room = rows
        parts[-1].append(ask)
        room -= len(ask.pairs)
    return parts


def _call(asks: list[Ask], want: str | None) -> dict[Ask, Any]:
    """The results of several asks of one Runtime from one call of it."""
    rt = asks[0].pairs[0][0].runtime
    taps = tuple(dict.fromkeys(name for ask in asks for name in ask.taps))
    most = max(ask.likeliest for ask in asks)
    results = rt.extend(
        [pair for ask in asks for pair in ask.pairs],
        logits=want,  # pyright: ignore[reportArgumentType]
        sample=[s for ask in asks for s in ask.samplings],  # pyright: ignore[reportArgumentType]
        taps=taps,
        likeliest=most,
    )
    answers, at = {}, 0
    for ask in asks:
        own = [_only(ask, want, taps, most, r) for r in results[at : at + len(ask.pairs)]]
        answers[ask] = own[0] if ask.single else own
        at += len(ask.pairs)
    return answers


def _only(ask: Ask, called: str | None, taps: tuple[str, ...], most: int, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """A result without the logits, the likeliest tokens and the taps that were not asked for."""
    rest = list(result)
    inside = rest.pop() if taps else {}
    found = rest.pop() if most else None
    if called:
        logits = rest.pop()
        if ask.want:
            rest.append(logits[-1] if (ask.want, called) == ("last", "all") else logits)
    if ask.likeliest and found is not None:
        k = ask.likeliest
        rest.append(found if k == most else Likeliest(found.ids[:k], found.logprobs[:k]))
    if ask.taps:
        rest.append({name: inside[name] for name in ask.taps})
    return tuple(rest) if len(rest) > 1 else (*rest, None)
