"""Padded shapes, pure integers."""

from __future__ import annotations

from dataclasses import dataclass

LEAST = 4
"""No step has fewer tokens or rows: with one row alone the matrix libraries take another path, whose sums round
differently (docs/design.md section 12), and size 1 would need a trace of its own."""


@dataclass(frozen=True)
class Bucket:
    tokens: int
    """T after padding"""
    rows: int
    """R after padding; at least one of them is a padding row whenever tokens are padded."""


def exact(tokens: int, rows: int) -> Bucket:
    """The smallest legal shape that holds a step: exact but for `LEAST`."""
    padded = max(tokens, LEAST)
    return Bucket(padded, max(LEAST, rows + (padded > tokens)))
