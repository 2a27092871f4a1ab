"""When a serving process looks for garbage: a bounded share of its time, and not among what start-up left.

Python's own rule starts a full collection whenever a quarter more objects live than after the last one, in the middle
of whatever allocates then. It walks over all of them: 0.1 s after importing torch alone, 0.9 s with 100,000 requests
waiting, in which no row gets a token. So while an engine serves

    - what start-up made is left out for good (`gc.freeze`),
    - young objects are collected as ever, which costs nothing that grows,
    - full collections happen between steps: after one that took t seconds none for `PERIOD * t` seconds while there is
      work, and for `IDLE * t` seconds when there is none. Garbage in cycles that grew old waits so long.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

PERIOD, IDLE = 1000.0, 20.0
"""Seconds between two full collections for every second the last one took: a thousandth of the time, a twentieth."""
LEAST = 1.0
"""Seconds between two full collections at least."""
NEVER = 1 << 30

_started: list[Collector] = []
"""Who asked for this; the process has one garbage collector."""
_before: tuple[int, int, int] = (0, 0, 0)


class Collector:
    """Decides about full collections from `start` to `stop`.

    Args:
        clock: seconds, monotonic.
        collect: a full collection.
    """

    def __init__(self, clock: Callable[[], float], collect: Callable[[], object] = gc.collect):
        self.clock, self.collect = clock, collect
        self.took = 0.0
        """Seconds of the last full collection."""
        self.ended = 0.0

    def start(self) -> None:
        """Freezes what lives and takes full collections over; twice is harmless."""
        global _before
        if self in _started:
            return
        now = self.clock()
        if not _started:
            _before = gc.get_threshold()
            self.collect()
            gc.freeze()
            gc.set_threshold(*_before[:2], NEVER)
        _started.append(self)
        self.ended = self.clock()
        self.took = self.ended - now

    def stop(self) -> None:
        """Gives Python its rule back when the last one stops; twice is harmless."""
        if self in _started:
            _started.remove(self)
            if not _started:
                gc.set_threshold(*_before)
                gc.unfreeze()

    def turn(self, busy: bool) -> None:
        """Between two steps: a full collection if one is due."""
        now = self.clock()
        if now - self.ended < max(LEAST, self.took * (PERIOD if busy else IDLE)):
            return
        self.collect()
        self.ended = self.clock()
        self.took = self.ended - now
