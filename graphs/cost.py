"""Seconds of a step as a function of its shape, from times measured at some shapes.

measured at      T = 2 4 8 16 ... , R = 2 4 8 ... with R <= T
made monotone    more tokens or more rows never cost less
in between       linear in each cell of the grid
beyond           along the slope of the last cell; below the first size, its own time
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, int]
"""(T, R)"""


@dataclass(frozen=True)
class Surface:
    """A monotone function of (T, R), given at the points of a grid."""

    tokens: tuple[int, ...]
    """Ascending."""
    rows: tuple[int, ...]
    """Ascending: the first of `tokens`."""
    seconds: tuple[tuple[float, ...], ...]
    """[token size][row size]"""

    def __call__(self, tokens: int, rows: int) -> float:
        """Seconds of a step of so many tokens in so many rows."""
        i, u = _cell(self.tokens, tokens)
        j, v = _cell(self.rows, rows)
        i2, j2 = min(i + 1, len(self.tokens) - 1), min(j + 1, len(self.rows) - 1)
        a, b, c, d = self.seconds[i][j], self.seconds[i2][j], self.seconds[i][j2], self.seconds[i2][j2]
        # Slopes beyond the grid are those at its far corner, whatever the other size is: a sum of monotone terms.
        far_u, far_v = max(u - 1.0, 0.0), max(v - 1.0, 0.0)
        u, v = min(u, 1.0), min(v, 1.0)
        inside = a + u * (b - a) + v * (c - a) + u * v * (a - b - c + d)
        last = self.seconds[-1][-1]
        slope_u = last - self.seconds[max(len(self.tokens) - 2, 0)][-1]
        slope_v = last - self.seconds[-1][max(len(self.rows) - 2, 0)]
        return inside + far_u * slope_u + far_v * slope_v


def _cell(grid: tuple[int, ...], x: int) -> tuple[int, float]:
    """(index of the cell, position in it): 0..1 within the grid, above 1 beyond it, never below 0."""
    if len(grid) == 1 or x <= grid[0]:
        return 0, 0.0
    i = min(bisect_right(grid, x) - 1, len(grid) - 2)
    return i, (x - grid[i]) / (grid[i + 1] - grid[i])


def surface(measured: Mapping[Shape, float]) -> Surface:
    """The monotone interpolation of measured times.

    Times are made monotone by (M + m) / 2, where M is the largest time of any shape that is no larger in both, m the
    smallest of any that is no smaller: it changes nothing where times are monotone already, and of all monotone
    functions it is one with the smallest largest error (Ubhaya, Isotone optimization, 1974). A point of the grid that
    was not measured gets the plane through its three neighbours where it closes a cell at the diagonal (there are no
    steps with more rows than tokens), and otherwise the mean of its bounds.
    """
    assert measured, "nothing was measured"
    smooth = {}
    for t, r in measured:
        below = max(s for (t2, r2), s in measured.items() if t2 <= t and r2 <= r)
        above = min(s for (t2, r2), s in measured.items() if t2 >= t and r2 >= r)
        smooth[t, r] = (below + above) / 2
    tokens = tuple(sorted({t for t, _ in smooth} | {r for _, r in smooth}))
    rows = tuple(sorted({r for _, r in smooth}))
    assert rows == tuple(t for t in tokens if t <= rows[-1]), "token sizes up to the most rows are row sizes, too"
    table = {}
    for i, t in enumerate(tokens):
        for j, r in enumerate(rows):
            if (t, r) in smooth:
                table[i, j] = smooth[t, r]
                continue
            low = max((s for (t2, r2), s in smooth.items() if t2 <= t and r2 <= r), default=None)
            high = min((s for (t2, r2), s in smooth.items() if t2 >= t and r2 >= r), default=None)
            known = [x for x in (low, high) if x is not None]
            table[i, j] = sum(known) / len(known)
    # Above the diagonal only the corner next to it is ever read: the plane through the other three.
    for j in range(1, len(rows)):
        i = tokens.index(rows[j]) - 1
        if (tokens[i], rows[j]) not in smooth:
            table[i, j] = table[i, j - 1] + table[i + 1, j] - table[i + 1, j - 1]
    return Surface(tokens, rows, tuple(tuple(table[i, j] for j in range(len(rows))) for i in range(len(tokens))))


def sample(budget: int, rows: int, level: int) -> tuple[Shape, ...]:
    """Shapes to measure for an engine of such sizes; every level is a part of the next, which has twice as many sizes.

    Sizes stand in equal proportion, and every row size is also a token size.
    """
    few = _sizes(2, max(rows, 2), 1 << level)
    many = sorted({*few, *_sizes(max(rows, 2), max(budget, rows, 2), 1 << level)})
    return tuple((t, r) for t in many for r in few if r <= t)


def _sizes(low: int, high: int, parts: int) -> list[int]:
    return sorted({round(low * (high / low) ** (i / parts)) for i in range(parts + 1)})
