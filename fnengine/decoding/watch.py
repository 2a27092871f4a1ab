"""Turns of strategies, watched from another thread: one that never comes back to its event loop is stopped.

    loop's thread   --[ turn of a ]--[ turn of b ........ ! StrategyStalled ]--[ turn of c ]--
    caller's thread      look             look   look: too long, raise there

A *turn* is what a coroutine computes between two awaits. Every task of a strategy, and every task that it makes itself,
goes through `Watch.turn`. What is raised into the thread is raised only while that turn lasts: arming and disarming
share a lock with `look`, and an exception that comes too late is taken back.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fnengine.errors import StrategyStalled

TRIES = 3
"""Times that `look` raises into one turn before it says that it cannot be stopped."""

YIELDS, RETURNS, RAISES, STALLS = "yields", "returns", "raises", "stalls"


class Halt(BaseException):
    """Raised into a strategy's turn from another thread. No `Exception`, so that `except Exception` lets it pass."""


class Owner(Protocol):
    """The strategy that tasks belong to."""

    name: str
    tasks: set[asyncio.Task[Any]]

    def condemn(self, error: Exception) -> None:
        """Ends the strategy, and every task of it, with this error."""
        ...


OWNER: ContextVar[Owner | None] = ContextVar("owner", default=None)
"""The strategy on whose behalf the code runs; tasks that it creates inherit it."""


@dataclass(eq=False, slots=True)
class Turn:
    owner: Owner
    began: float
    raised: int = 0
    """Times that it was told to stop."""


class Watch:
    """Whose turn it is on one thread, and since when.

    Args:
        bound: seconds that a turn may take.
    """

    def __init__(self, bound: float, clock: Callable[[], float] = time.monotonic):
        self.bound, self.clock = bound, clock
        self.thread = 0
        """The thread that takes turns, once it has started."""
        self._now: Turn | None = None
        self._lock = threading.Lock()

    def turn(self, owner: Owner, resume: Callable[[Any], Any], value: Any) -> tuple[str, Any]:
        """(what became of `resume(value)`, its value or what it raised).

        No `Halt` is on its way to this thread when it returns.
        """
        mine = Turn(owner, self.clock())
        kind, got = STALLS, None
        try:
            try:
                self._now = mine  # from here until it is None again `look` may raise
                kind, got = YIELDS, resume(value)
            except StopIteration as end:
                kind, got = RETURNS, end.value
            except Halt as halt:
                kind, got = STALLS, _place(halt)
            except BaseException as e:
                # Without this frame in its traceback, which would hold it: a cycle that keeps sequences alive.
                kind, got = RAISES, e.with_traceback(None if e.__traceback__ is None else e.__traceback__.tb_next)
        except Halt:  # in one of the clauses above
            kind, got = STALLS, None
        while True:
            try:
                with self._lock:
                    self._now = None
                if mine.raised:
                    _raise_in(self.thread, None)
                break
            except Halt:
                pass
        if mine.raised and kind in (YIELDS, RAISES):  # it swallowed what it was told, or came too late
            kind, got = STALLS, None if kind == RAISES else got
        return kind, got

    def look(self) -> Turn | None:
        """The turn that cannot be stopped, if there is one. Raises into one that lasts too long."""
        with self._lock:
            turn = self._now
            if turn is None or self.clock() - turn.began <= self.bound * (turn.raised + 1):
                return None
            if turn.raised == TRIES:
                return turn
            turn.raised += 1
            _raise_in(self.thread, Halt)
        return None

    def task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """A task of the loop, watched if it belongs to a strategy: a task factory."""
        context = options.get("context")
        owner = OWNER.get() if context is None else context.get(OWNER)
        if owner is None:
            return asyncio.Task(coro, loop=loop, **options)
        task = asyncio.Task(Watched(self, owner, coro), loop=loop, **options)  # pyright: ignore[reportArgumentType]
        owner.tasks.add(task)
        task.add_done_callback(owner.tasks.discard)
        return task


class Watched:
    """A coroutine whose every turn goes through a watch."""

    __slots__ = ("__weakref__", "_coro", "_owner", "_watch")

    def __init__(self, watch: Watch, owner: Owner, coro: Any):
        self._watch, self._owner, self._coro = watch, owner, coro

    def send(self, value: Any) -> Any:
        return self._turn(self._coro.send, value)

    def throw(self, error: Any, *_: Any) -> Any:
        try:
            return self._turn(self._coro.throw, error)
        finally:
            del error  # see the end of `_turn`

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Any:
        raise AssertionError("only a task runs it")

    def _turn(self, resume: Callable[[Any], Any], value: Any) -> Any:
        kind, got = self._watch.turn(self._owner, resume, value)
        if kind == YIELDS:
            return got
        if kind == RETURNS:
            raise StopIteration(got)
        if kind == STALLS:
            # What it has to clean up is a turn of its own, with a bound of its own.
            self._watch.turn(self._owner, lambda _: self._coro.close(), None)
            got = StrategyStalled(
                f"strategy {self._owner.name!r} computed for more than {self._watch.bound:g} s without an await",
                where=got if isinstance(got, str) else None,
                remedy="put `await asyncio.sleep(0)` into long loops, and slow functions into `asyncio.to_thread`",
            )
            self._owner.condemn(got)
        elif isinstance(got, (KeyboardInterrupt, SystemExit)):  # would end the loop, and with it everybody
            got = RuntimeError(f"the strategy raised {type(got).__name__}")
        try:
            raise got
        finally:
            # A frame in the traceback of what its own variables hold would be a cycle, and keep sequences alive.
            del got, value, resume


def _place(halt: Halt) -> str | None:
    """file:line where the strategy was, as far as its traceback goes."""
    at = halt.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return None if at is None else f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Makes a thread raise at its next bytecode; None takes that back."""
    target = ctypes.c_ulong(thread)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(target, None if error is None else ctypes.py_object(error))
