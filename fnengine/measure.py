"""Seconds of a device's steps by shape, measured, and the interpolation of them that plans go by.

Steps are made by hand, without a scheduler: of R rows all but the last few decode one token and the rest of the T
tokens are prompts, as in a server's mixed steps; every row stands at `context` tokens. Shapes are timed one after
the other, round after round, so that a slow moment of the machine does not fall on one of them; medians count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from fnengine.graphs.cost import Shape, Surface, sample, surface
from fnengine.host.request import Sampling
from fnengine.host.step import BLOCK, Admission, Device, StepInput

LEVELS = 4
"""Finest grid: 16 steps from the smallest size to the largest."""


@dataclass(frozen=True)
class Measured:
    """Times of a device's steps."""

    surface: Surface
    medians: tuple[tuple[int, int, float], ...]
    """(T, R, seconds)"""
    rounds: int
    """Times that the least often measured shape was."""
    context: int
    """Tokens at which rows stood; fewer where a shape would not have fitted the pool."""


def staged(device: Device, tokens: int, rows: int, context: int, rng: np.random.Generator, vocab: int) -> Staged | None:
    """Two steps: one that gives rows their place, one of (T, R) to be timed; None if the device cannot hold them."""
    if rows > device.rows or rows > tokens:
        return None
    new, room = np.ones(rows, np.int64), device.max_len - 1
    left = tokens - rows
    for r in range(rows - 1, -1, -1):
        take = min(left, room - 1)
        new[r] += take
        left -= take
    if left:
        return None
    # A row holds its context, the token that gives it its place, and the new ones.
    context = min(context, room - int(new.max()))
    while context and (-(-(context + 1 + new) // BLOCK)).sum() > device.blocks - 1:
        context //= 2
    each = -(-(context + 1 + new) // BLOCK)
    if context < 0 or each.sum() > device.blocks - 1:
        return None
    blocks = np.split(np.arange(1, 1 + each.sum(), dtype=np.int32), np.cumsum(each)[:-1])
    ids = rng.integers(0, vocab, (rows, context), np.int32)
    row, none = np.arange(rows, dtype=np.int32), np.zeros((0, 3), np.int32)

    def step(counts: np.ndarray, admit: tuple[Admission, ...]) -> StepInput:
        return StepInput(
            row=row,
            start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            token=rng.integers(0, vocab, int(counts.sum()), np.int32),
            emit=np.ones(rows, np.int32),
            copy=none[:, :2],
            grow=none,
            admit=admit,
        )

    admit = tuple(
        Admission(r, context, blocks[r], ids[r], context, Sampling(temperature=0.0, seed=0), 0) for r in range(rows)
    )
    return step(np.ones(rows, np.int64), admit), step(new, ())


Staged = tuple[StepInput, StepInput]


def measure(
    device: Device,
    *,
    budget: int,
    rows: int,
    vocab: int,
    context: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> Measured:
    """Times of steps up to `budget` tokens and `rows` rows, in about so many seconds.

    The grid gets finer while half of the time allows; the rest goes into more rounds. The coarsest grid is measured
    once however long that takes.
    """
    rng, begin = np.random.default_rng(seed), clock()
    times: dict[Shape, list[float]] = {}
    budget = max(min(budget, rows * (device.max_len - 2)), rows)

    def timed(shape: Shape) -> float | None:
        tokens, rows = shape
        steps = staged(device, tokens, rows, context, rng, vocab)
        if steps is None:
            return None
        device.launch(steps[0]).read()
        began = clock()
        device.launch(steps[1]).read()
        return clock() - began

    def known() -> Surface:
        return surface({s: median(t) for s, t in times.items()})

    for level in range(LEVELS + 1):
        new = [s for s in sample(budget, rows, level) if s not in times]
        if level and clock() - begin + 3 * sum(known()(*s) for s in new) > seconds / 2:
            break
        for s in new:
            timed(s)  # the first of its size prepares what later ones find
            t = timed(s)
            if t is not None:
                times[s] = [t]
    assert times, "no step fits this device"
    order = list(times)
    while True:
        began = clock()
        if began - begin + sum(median(t) for t in times.values()) > seconds:
            break
        for i in rng.permutation(len(order)):
            t = timed(order[int(i)])
            assert t is not None
            times[order[i]].append(t)
            if clock() - begin > seconds:
                break
    return Measured(
        known(),
        tuple((*s, median(t)) for s, t in sorted(times.items())),
        min(len(t) for t in times.values()),
        context,
    )
