"""The shapes that are captured, as a value: which step runs in which, and the file that keeps a choice of them.

    buckets   (2,2) (4,4) (8,8) ...     a token a row: decode
              (512,65) (2048,65) ...    prompts among them: mixed

A step of T tokens in R rows runs in the cheapest bucket that holds it. Where tokens are padded, the last padding row
owns them, so such a bucket has room for a row more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fnengine.errors import ConfigError
from fnengine.graphs.bucket import LEAST, Bucket

FORMAT = 1
"""Of the file; another number is refused."""


def holds(bucket: Bucket, tokens: int, rows: int) -> bool:
    """Whether a step of so many tokens and rows can be padded to the bucket."""
    return bucket.tokens >= tokens and bucket.rows >= rows + (bucket.tokens > tokens)


@dataclass(frozen=True)
class Ladder:
    """Buckets in the order in which they are tried: fewest tokens first, then fewest rows."""

    buckets: tuple[Bucket, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(set(self.buckets), key=lambda b: (b.tokens, b.rows)))
        object.__setattr__(self, "buckets", ordered)

    def fit(self, tokens: int, rows: int) -> Bucket | None:
        """The first bucket that holds a step, or None: such a step runs eagerly."""
        return next((b for b in self.buckets if holds(b, tokens, rows)), None)

    @cached_property
    def largest_first(self) -> tuple[Bucket, ...]:
        """The order of capture: what a large graph has freed serves the smaller ones."""
        return self.buckets[::-1]


@dataclass(frozen=True)
class Exact:
    """Every shape is its own bucket: for measuring what a graph of it takes."""

    buckets: tuple[Bucket, ...] = ()

    def fit(self, tokens: int, rows: int) -> Bucket | None:
        """The step's own shape, but for `LEAST`."""
        return Bucket(max(tokens, LEAST), max(rows, LEAST))


MIXED = 2048
"""Tokens of the largest mixed step in the default ladder: above, the device is busy for longer than launches take."""


def default(budget: int, rows: int) -> Ladder:
    """Shapes for an engine of at most `budget` tokens and `rows` rows a step, with no trace to go by.

    Padding wastes at most a fifth of a decode step and at most a third of a mixed one; `fnengine tune` does better.
    """
    decode = [LEAST]
    while decode[-1] < rows:
        decode.append(min(decode[-1] + _stride(decode[-1], 4), rows))
    mixed = [16]
    while mixed[-1] < min(budget, MIXED):
        mixed.append(min(mixed[-1] + _stride(mixed[-1], 2), budget, MIXED))
    some = sorted({min(rows, 16), rows})
    # One row more than sequences: the padding tokens' owner.
    both = [Bucket(t, r + 1) for t in mixed for r in some if t >= r + 1]
    return Ladder((*(Bucket(n, n) for n in decode), *both))


def _stride(n: int, parts: int) -> int:
    """The distance to the next size: the power of two at or below n, in so many parts."""
    return max(1, (1 << (n.bit_length() - 1)) // parts)


def save(path: Path, ladder: Ladder, about: dict[str, Any]) -> None:
    """Writes a ladder and what it was made for, as JSON."""
    body = {"format": FORMAT, "buckets": [[b.tokens, b.rows] for b in ladder.buckets], "about": about}
    path.write_text(json.dumps(body, indent=1) + "\n")


def load(path: Path) -> tuple[Ladder, dict[str, Any]]:
    """The ladder of a file, and what it was made for.

    Raises:
        ConfigError: the file is not there, not JSON, of another format, or holds no buckets.
    """
    try:
        body = json.loads(path.read_text())
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']}, this version reads {FORMAT}")
        ladder = Ladder(tuple(Bucket(int(t), int(r)) for t, r in body["buckets"]))
        if not ladder.buckets or any(b.tokens < b.rows or b.rows < LEAST for b in ladder.buckets):
            raise ValueError(f"buckets are pairs of tokens and rows, at least {LEAST} rows, and a token a row")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"{path}: {e}", where="--graphs", remedy="`fnengine tune MODEL --out FILE` writes such a file"
        ) from e
    return ladder, body.get("about", {})
