"""Drafts that a device writes for many rows at once: which rows, how far, and where their KV may lie meanwhile.

A draft model computes what it has not seen of a row's tokens, the newest included, and then one drafted token after the
other; the ledger knows of each block how much it has seen:

    tokens    p p p p g g n d d d        n newest, d drafted
    followed        4 |
    computed            6 |              first pass: g g n, of all rows; then a pass for each d but the last

A block's tokens are computed once for all who share it, when the first of them drafts. Drafted tokens stand behind a
row's newest one. KV from there on lies in what the row's tail block has free and in blocks that nobody needs now; all
of it is let go before anything is planned. So a draft holds nothing, and is written into no block that anybody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fnengine.errors import OutOfBlocks
from fnengine.host.blocks import Node, Path
from fnengine.host.pack import Draft, ask, asked_of
from fnengine.host.runs import Host, Run
from fnengine.host.step import Ask


@dataclass(frozen=True)
class Ahead:
    """A round of drafts. Its first pass is of all rows, pass j of those that want more than j tokens."""

    row: np.ndarray
    """[R] int32 state rows, those that want most first."""
    count: np.ndarray
    """[R] int32 tokens to draft, never rising; 0: its tokens are only computed, as far as they are here."""
    begin: np.ndarray
    """[R] int32 tokens that the companion has computed already."""
    length: np.ndarray
    """[R] int32 tokens that the target has: what the rows are set back to."""
    start: np.ndarray
    """[R+1] int32, as in `StepInput`, of ..."""
    token: np.ndarray
    """[T] int32 ... the tokens of the first pass."""
    grow: np.ndarray
    """[G, 3] int32 as in `StepInput`, for the time of the round."""
    ask: Ask
    """How tokens are drawn: a pipeline, and noise or none."""

    @property
    def passes(self) -> list[int]:
        """Rows of each pass."""
        most = int(self.count.max(initial=0))
        return [len(self.row), *(int((self.count > j).sum()) for j in range(1, most))]


@dataclass(slots=True)
class _Part:
    """A row of a round."""

    at: int
    """Of the wishes."""
    run: Run
    k: int
    begin: int
    end: int
    """Its first pass has tokens begin:end."""


def drafts(
    host: Host,
    wishes: Sequence[tuple[Run, int]],
    device: Callable[[Ahead], np.ndarray],
    most: int,
    *,
    follows: bool = True,
) -> list[tuple[int, ...]]:
    """Up to so many draft tokens for each run, none where there is no room, or the companion has to see more of it.

    Args:
        wishes: runs whose newest token the device has and whose other tokens are computed, with nothing in flight.
        device: [R, K] tokens of a round.
        most: positions that the companion knows: no token is drafted beyond.
        follows: it has to compute tokens that it has not seen; else it has seen all, and begins at the newest.
    """
    ledger, packed, policy = host.ledger, Draft(), host.policy
    # What a step cannot verify is not worth drafting: rows get equal shares of it, the first ones where it is less.
    left = max(min(policy.picks, policy.budget) - len(host.running), 1)
    share, tokens = max(left // max(len(wishes), 1), 1), policy.budget
    held: list[Path] = []
    before: list[tuple[Node, int]] = []
    parts: list[_Part] = []
    grow: list[tuple[int, int, int]] = []
    order = list(range(len(wishes)))
    if follows:  # a prompt that is caught up with in pieces keeps nobody else from drafting
        order.sort(key=lambda i: wishes[i][0].path.length - ledger.followed(wishes[i][0].path))
    for i in order:
        run, k = wishes[i]
        length = run.path.length
        begin = ledger.followed(run.path) if follows else length
        free = max(ledger.available - host.owed, 0) * ledger.block + -length % ledger.block
        k = min(k, share, left, free, most - run.known)
        if k < 1 or not run.newest or tokens < 1:
            continue
        if length + 1 - begin > tokens:  # the rest in later rounds
            parts.append(_Part(i, run, 0, begin, begin + tokens))
            before += ledger.follow(run.path, begin + tokens)
            break
        try:
            extension = ledger.extend(run.path, k)
        except OutOfBlocks:
            continue
        held.append(extension.path)
        if extension.copy:  # its tail belongs to others, too
            continue
        left -= k
        tokens -= length + 1 - begin
        grow += [(run.row, column, block) for column, block in extension.grown]
        parts.append(_Part(i, run, k, begin, length + 1))
        if follows:  # all rows' KV is written before any is read, so the next one may begin behind this one's blocks
            before += ledger.follow(run.path, length)
        ask(packed, run)
    found: list[tuple[int, ...]] = [()] * len(wishes)
    try:
        if parts:
            parts.sort(key=lambda part: -part.k)
            drawn = device(_round(parts, grow, packed)).tolist()
            for part, line in zip(parts, drawn, strict=True):
                found[part.at] = tuple(line[: part.k])
    except BaseException:
        ledger.unfollow(before)
        raise
    finally:
        for path in held:
            ledger.free(path)
    return found


def _round(parts: list[_Part], grow: list[tuple[int, int, int]], packed: Draft) -> Ahead:
    sizes = [part.end - part.begin for part in parts]
    return Ahead(
        row=np.array([part.run.row for part in parts], np.int32),
        count=np.array([part.k for part in parts], np.int32),
        begin=np.array([part.begin for part in parts], np.int32),
        length=np.array([part.run.path.length for part in parts], np.int32),
        start=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        token=np.concatenate([part.run.tokens[part.begin : part.end] for part in parts]).astype(np.int32),
        grow=np.array(grow, np.int32).reshape(-1, 3),
        ask=asked_of(packed) if parts[0].k else Ask(sample=False),
    )
