"""A companion: what computes the target's new tokens in a way of its own, in the same step, and drafts for many rows.

    step = companion.follow(step)                       # (params of both, state, batch) -> (state, out), as before
    first, later = companion.first, companion.later     # the same signature: one drafted token for each row

It has rows and block tables in common with the target, and behind the target's leaves of the pool some of its own, of
as many blocks. So whatever shares, copies, swaps or caches blocks carries its KV along, and nobody keeps books of it:
of a block it has computed what the target has. What it drafts it writes behind a row's length, where nobody reads;
`rows.length` goes along and is set back by whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fnengine.host.step import Ask
from fnengine.state import Batch, Out, Pool, State
from fnengine.step import Step


@dataclass(frozen=True)
class Companion:
    """What a device has to know of one."""

    params: Any
    """Steps get the target's and these, as a pair."""
    pool: Callable[[int], tuple[Pool, ...]]
    """Its leaves for so many blocks, empty."""
    follow: Callable[[Step], Step]
    """The target's step -> one that does the companion's part, too."""
    first: Step
    """After each row's newest token: draws the next one as the target would, writes it behind it, goes one further."""
    later: Step
    """The same after a token that was drafted."""
    carry: int = 0
    """Numbers that it keeps of each row between steps."""


def of_model(params: Any, step: Step, layers: int, pool: Callable[[int], tuple[Pool, ...]]) -> Companion:
    """A draft model's.

    Args:
        step: of the draft model, as `step.make_step` gives it, with the target's processors.
        layers: of the target: so many leaves of the pool are its own.
    """

    def follow(target: Step) -> Step:
        def both(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
            # The target's step moves the rows' lengths on; both begin from the same ones.
            rows = replace(state.rows, length=state.rows.length.clone())
            only = replace(batch, target=None, pick=None, mask=None, ask=Ask(sample=False))
            step(params[1], State(state.pool[layers:], rows), only)
            _, out = target(params[0], State(state.pool[:layers], state.rows), batch)
            return state, out

        return both

    def draft(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
        _, out = step(params[1], State(state.pool[layers:], state.rows), batch)
        return state, out

    return Companion(params, pool, follow, draft, draft)
