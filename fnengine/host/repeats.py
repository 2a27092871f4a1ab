"""Whether a text goes in circles: the newest tokens are one pattern, several times over. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fnengine.errors import RequestError

FIELD = "repetition_detection"
LONGEST, OFTENEST = 1024, 1024
"""Tokens of a pattern, and times that it may be asked to come, at most."""
REPETITION = "repetition"
"""Why such a text ended, where others name their stop string."""


@dataclass(frozen=True)
class Repetition:
    """What counts as going in circles."""

    longest: int
    """Tokens of a pattern, at most ..."""
    shortest: int = 1
    """... and at least."""
    times: int = 2
    """How often one has to come in a row."""

    def __post_init__(self):
        for name, value, least, most in (
            ("max_pattern_size", self.longest, 1, LONGEST),
            ("min_pattern_size", self.shortest, 1, self.longest),
            ("min_count", self.times, 2, OFTENEST),
        ):
            if not least <= value <= most:
                where = f"{FIELD}.{name}"
                raise RequestError(f"must be between {least} and {most}, got {value}", where=where, param=where)


@dataclass(eq=False)
class Repeats:
    """Takes the tokens of one text; each costs one operation over all sizes of patterns."""

    wanted: Repetition
    _newest: np.ndarray = field(init=False, repr=False)
    """The last tokens, newest first; -1 before the first."""
    _equal: np.ndarray = field(init=False, repr=False)
    """By size p - 1: how many of the newest tokens in a row equal the one p before them."""
    _enough: np.ndarray = field(init=False, repr=False)
    """How many that have to be."""

    def __post_init__(self):
        sizes = np.arange(1, self.wanted.longest + 1)
        self._newest, self._equal = np.full(len(sizes), -1, np.int32), np.zeros(len(sizes), np.int64)
        self._enough = sizes * (self.wanted.times - 1)
        self._enough[: self.wanted.shortest - 1] = np.iinfo(np.int64).max

    def push(self, token: int) -> bool:
        """Whether a pattern is complete with this token."""
        self._equal = (self._equal + 1) * (self._newest == token)
        self._newest[1:] = self._newest[:-1].copy()
        self._newest[0] = token
        return bool((self._equal >= self._enough).any())
