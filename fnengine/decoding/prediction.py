"""Predicted outputs: a text that the answer will mostly repeat is given beforehand, as in OpenAI's `prediction` field.

The output is followed through the prediction. Where they part, one token is taken for another; if the next one does
not fit either, the nearest place ahead is sought where the newest tokens stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fnengine.decoding.ngram import occurrences
from fnengine.decoding.speculate import Draft, Drawing

LONGEST, SHORTEST = 8, 2
"""Newest tokens that are looked for after a difference."""


@dataclass(frozen=True)
class Aligned:
    """A place in the prediction."""

    at: int = 0
    """Index of the token that is expected next; all behind it are done with."""
    newest: tuple[int, ...] = ()
    """The output's last tokens"""
    astray: int = 0
    """Output tokens since one agreed; from 2 on the place is unknown."""
    matched: int = 0
    """Tokens of the prediction that the output had at their place."""


@dataclass(frozen=True)
class Prediction:
    """Proposes the prediction's continuation. One for each request."""

    tokens: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Iterable[int]) -> Prediction:
        return cls(tuple(int(t) for t in tokens))

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.array(self.tokens, np.int32)

    def start(self, tokens: Sequence[int], how: Drawing) -> Aligned:
        return Aligned()

    def propose(self, state: Aligned, k: int) -> Draft:
        return Draft(self.tokens[state.at : state.at + k] if state.astray < 2 else ())

    def advance(self, state: Aligned, tokens: Sequence[int]) -> Aligned:
        for t in tokens:
            state = self._follow(state, int(t))
        return state

    def _follow(self, s: Aligned, token: int) -> Aligned:
        newest = (*s.newest, token)[-LONGEST:]
        if s.at < len(self.tokens) and self.tokens[s.at] == token:
            return Aligned(s.at + 1, newest, 0, s.matched + 1)
        # A place behind `at` would count tokens twice, so one looks ahead only.
        found, n = occurrences(self._ids, np.array(newest, np.int32), LONGEST, s.at)
        if n >= SHORTEST:
            return Aligned(int(found[0]) + 1, newest, 0, s.matched + 1)
        return Aligned(min(s.at + (s.astray == 0), len(self.tokens)), newest, s.astray + 1, s.matched)


def usage(proposer: Prediction, state: Aligned) -> tuple[int, int]:
    """(accepted, rejected) prediction tokens, for `completion_tokens_details`: those that the output had at their
    place, and the others. They depend on the texts alone, not on how many were drafted at a time."""
    return state.matched, len(proposer.tokens) - state.matched
