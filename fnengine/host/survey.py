"""The host as people look at it: a row for every run, and who holds which block. Nothing here changes anything.

block     1 2 3 4 5 6 7 8 9          two runs share 1 and 2; 3 and 4 are the first one's, 5 the second one's;
owner     s s 0 0 1 c c . .          6 and 7 are cached, the rest is free
lengths   [SHARED, 2, 0, 2, 1, 1, CACHED, 2, FREE, 2]
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fnengine.host.output import Finished
from fnengine.host.request import Request
from fnengine.host.runs import Host, Preempted, Run

WAITING = 100
"""Waiting runs that a survey lists; there may be thousands."""


@dataclass(frozen=True, slots=True)
class Row:
    """One choice of a request that has not ended."""

    id: str
    """The request's."""
    choice: int
    state: str
    """`prefilling`, `generating` or `waiting`."""
    waiting_for: str | None
    """What keeps it waiting; None while it runs."""
    prompt: int
    cached: int
    """Prompt tokens found in the prefix cache when it was first admitted."""
    computed: int
    """Tokens whose KV is there, those of the step in flight included."""
    generated: int
    max_tokens: int
    blocks: int
    """Of its path, shared ones included."""
    preemptions: int
    priority: int
    arrival: float
    """Seconds of the engine's clock, like the next two."""
    scheduled: float | None
    first_token: float | None


@dataclass(frozen=True, slots=True)
class Survey:
    """The host at one moment."""

    rows: tuple[Row, ...]
    """Running ones, then the first of those that wait, in the order in which they are served."""
    unlisted: int
    """Waiting runs beyond them."""
    pool: tuple[int, ...] | None
    """Lengths of equal neighbours, as (owner, blocks, owner, blocks, ...): the owner is an index into `rows`, or one of
    the constants beside `Ledger.owners`. None if it was not asked for."""
    preempted: tuple[Preempted, ...]
    """The newest preemptions, newest last."""


def survey(host: Host, blocks: bool = True) -> Survey:
    """What runs and waits, and with `blocks` what the pool looks like. O(runs + blocks that are not free)."""
    running = list(host.running)
    entries = [e for e in host.queue if not e[1].ended]
    waiting = [run for _, run in (heapq.nsmallest(WAITING, entries) if len(entries) > 1 else entries)]
    rows = [_row(run, None) for run in running]
    rows += [_row(run, waits_for(host, run, first=run is waiting[0])) for run in waiting]
    pool = lengths(host.ledger.owners([run.path for run in running])) if blocks else None
    return Survey(tuple(rows), len(entries) - len(waiting), pool, tuple(host.preempted))


def lengths(owners: array[int]) -> tuple[int, ...]:
    """Run lengths of a list: (value, count, value, count, ...)."""
    a = np.frombuffer(owners, np.intc) if len(owners) else np.empty(0, np.intc)
    if not a.size:
        return ()
    first = np.concatenate(([0], np.flatnonzero(a[1:] != a[:-1]) + 1))
    out = np.empty(2 * first.size, np.int64)
    out[0::2], out[1::2] = a[first], np.diff(first, append=a.size)
    return tuple(out.tolist())


def waits_for(host: Host, run: Run, first: bool) -> str:
    """What a waiting run waits for, in words; its luck with the prefix cache is not looked up for this."""
    ledger = host.ledger
    if run.inflight:
        return "its last step to be read"
    if not first:
        return "its turn"
    if not host.free_rows:
        return "a row"
    if -(-run.total // ledger.block) + host.owed > ledger.spare or not ledger.available:
        return "blocks"
    return "the next step"


def _row(run: Run, waiting_for: str | None) -> Row:
    state = "waiting" if waiting_for else "prefilling" if run.computed < run.prompt_len else "generating"
    tip = run.path.tip
    return Row(
        id=run.request.id,
        choice=run.index,
        state=state,
        waiting_for=waiting_for,
        prompt=run.prompt_len,
        cached=run.cached,
        computed=run.computed,
        generated=run.generated,
        max_tokens=run.max_tokens,
        blocks=0 if tip is None else tip.column + 1,
        preemptions=run.preemptions,
        priority=run.priority,
        arrival=run.arrival,
        scheduled=run.scheduled,
        first_token=run.first_token,
    )


def told(request: Request, runs: Sequence[Run], finish: str, max_tokens: int, end: float) -> Finished:
    """The facts of a request that has ended, for metrics and logs.

    Args:
        max_tokens: most tokens that a choice of it could have had.
        end: seconds of the engine's clock.
    """
    return Finished(
        id=request.id,
        finish=finish,  # type: ignore[arg-type]
        prompt=len(request.prompt),
        cached=runs[0].cached,
        completion=sum(r.generated for r in runs),
        n=len(runs),
        max_tokens=max_tokens,
        preemptions=sum(r.preemptions for r in runs),
        arrival=request.arrival,
        scheduled=min((r.scheduled for r in runs if r.scheduled is not None), default=None),
        first_token=min((r.first_token for r in runs if r.first_token is not None), default=None),
        end=end,
    )
