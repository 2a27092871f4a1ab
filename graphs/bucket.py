"""Padded shapes, pure integers."""

from __future__ import annotations

from dataclasses import dataclass

LEAST = 2
"""No step has fewer tokens or rows: with one row alone the matrix libraries take another path, whose sums round
differently (docs/design.md section 12), and size 1 would need a trace of its own."""


@dataclass(frozen=True)
class Bucket:
    tokens: int
    """T after padding"""
    rows: int
    """R after padding; at least one of them is a padding row whenever tokens are padded."""


STEPS = ((32, 1), (128, 8))
"""(up to this size, multiples of this); above the last, multiples of `COARSE`."""
COARSE = 32


def fit(tokens: int, rows: int) -> Bucket:
    """The smallest shape of the ladder that holds a step.

    Small sizes are exact (but for `LEAST`), large ones rounded up by at most a quarter: the matrix libraries prepare
    something for every size they meet, and 512 sizes cost hundreds of megabytes and a slow first time each.
    """
    padded = _round(tokens)
    return Bucket(padded, _round(rows + (padded > tokens)))


def _round(n: int) -> int:
    multiple = next((m for top, m in STEPS if n <= top), COARSE)
    return max(LEAST, -(-n // multiple) * multiple)
