"""Drafts that a device writes for many rows at once: which rows, how far, and where their KV may lie meanwhile.

Drafted tokens stand behind a row's newest one. Their KV lies in what the row's tail block has free and in blocks that
nobody needs now; all of it is let go before anything is planned, because the step that verifies a draft computes it
again. So a draft holds nothing, and is written into no block that anybody else reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fnengine.errors import OutOfBlocks
from fnengine.host.blocks import Path
from fnengine.host.pack import Draft, ask, asked_of
from fnengine.host.runs import Host, Run
from fnengine.host.step import Ask


@dataclass(frozen=True)
class Ahead:
    """A round of drafts. Pass j is of the rows that want more than j tokens: the first ones."""

    row: np.ndarray
    """[R] int32 state rows, those that want most first."""
    count: np.ndarray
    """[R] int32 tokens to draft, at least 1, never rising."""
    grow: np.ndarray
    """[G, 3] int32 as in `StepInput`, for the time of the round."""
    ask: Ask
    """How tokens are drawn: a pipeline, and noise or none."""

    @property
    def passes(self) -> list[int]:
        """Rows of each pass."""
        return [int((self.count > j).sum()) for j in range(int(self.count[0]))]


def drafts(
    host: Host, wishes: Sequence[tuple[Run, int]], device: Callable[[Ahead], np.ndarray], most: int
) -> list[tuple[int, ...]]:
    """Up to so many draft tokens for each run, none where there is no room.

    Args:
        wishes: runs whose newest token the device has and whose other tokens are computed, with nothing in flight.
        device: [R, K] tokens of a round.
        most: positions that the companion knows: no token is drafted beyond.
    """
    ledger, packed, policy = host.ledger, Draft(), host.policy
    # What a step cannot verify is not worth drafting: rows get equal shares of it, the first ones where it is less.
    left = max(min(policy.picks, policy.budget) - len(host.running), 1)
    share = max(left // max(len(wishes), 1), 1)
    held: list[Path] = []
    some: list[tuple[int, int]] = []
    grow: list[tuple[int, int, int]] = []
    for i, (run, k) in enumerate(wishes):
        free = max(ledger.available - host.owed, 0) * ledger.block + -run.path.length % ledger.block
        k = min(k, share, left, free, most - run.known)
        if k < 1 or not run.newest:
            continue
        try:
            extension = ledger.extend(run.path, k)
        except OutOfBlocks:
            continue
        held.append(extension.path)
        if extension.copy:  # its tail belongs to others, too
            continue
        left -= k
        grow += [(run.row, column, block) for column, block in extension.grown]
        some.append((k, i))
        ask(packed, run)
    found: list[tuple[int, ...]] = [()] * len(wishes)
    try:
        if some:
            some.sort(reverse=True)
            row = np.array([wishes[i][0].row for _, i in some], np.int32)
            count = np.array([k for k, _ in some], np.int32)
            tokens = device(Ahead(row, count, np.array(grow, np.int32).reshape(-1, 3), asked_of(packed))).tolist()
            for (k, i), line in zip(some, tokens, strict=True):
                found[i] = tuple(line[:k])
    finally:
        for path in held:
            ledger.free(path)
    return found
