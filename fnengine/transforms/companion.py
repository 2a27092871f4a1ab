"""A companion: what computes the target's tokens in a way of its own, and drafts for many rows at once.

    step = companion.follow(step)                       # (params of both, state, batch) -> (state, out), as before
    first, later = companion.first, companion.later     # the same signature: one drafted token for each row

It has rows and block tables in common with the target, and behind the target's leaves of the pool some of its own, of
as many blocks. So whatever shares, copies, swaps or caches blocks carries its KV along. One that reads what the target
computes (a head) does its part in the target's step; one that does not (a draft model) catches up when somebody wants a
draft, and costs nothing else. What it drafts it writes behind a row's length, where nobody reads; `rows.length` goes
along and is set back by whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fnengine.host.step import BLOCK
from fnengine.kernels import Ops
from fnengine.model import RunLayers, body, embed, head_logits
from fnengine.processors import PROCESSORS, Own, Processor, in_turn
from fnengine.sampling import choose
from fnengine.spec import ModelSpec
from fnengine.state import Batch, Out, Pool, Rows, State, Where
from fnengine.step import Step, make_step


@dataclass(frozen=True)
class Companion:
    """What a device has to know of one."""

    params: Any
    """Steps get the target's and these, as a pair."""
    pool: Callable[[int], tuple[Pool, ...]]
    """Its leaves for so many blocks, empty."""
    follow: Callable[[Step], Step]
    """The target's step -> one of both's params and state, that does the companion's part, if it has one there."""
    first: Step
    """Computes tokens that it has not seen, or the newest alone; draws the next one as the target would, writes it
    behind them and goes one further."""
    later: Step
    """The same after one token, which was drafted."""
    catches_up: bool = False
    """Whether `first` is given all tokens that it has not seen. If not, it has seen all but the newest."""
    carry: int = 0
    """Numbers that it keeps of each row between steps."""


def of_model(
    spec: ModelSpec,
    params: Any,
    ops: Ops,
    run_layers: RunLayers,
    layers: int,
    pool: Callable[[int], tuple[Pool, ...]],
    own: Sequence[Own] = (),
) -> Companion:
    """A draft model's: its own step over the target's rows, and for one token a row `model`'s three parts alone.

    Args:
        layers: of the target: so many leaves of the pool are its own.
        own: the engine's own logits processors.
    """
    whole, processors = make_step(spec, ops, run_layers, own), {**PROCESSORS, "own": in_turn(own)}

    def follow(target: Step) -> Step:
        def only(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
            _, out = target(params[0], State(state.pool[:layers], state.rows), batch)
            return state, out

        return only

    def first(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
        rows = replace(state.rows, behind=None)  # of states, which only the target may have
        _, out = whole(params[1], State(state.pool[layers:], rows), batch)
        return state, out

    def later(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
        rows, row_R = state.rows, batch.row.long()
        position_R = rows.length[row_R]
        token_R = rows.history[row_R, position_R.long()]
        where = replace(one_each(rows, batch, row_R, position_R), token=token_R)
        x_RD = embed(spec, params[1], token_R, where.position)
        x_RD, _ = body(spec, params[1], state.pool[layers:], where, ops, x_RD, run_layers)
        logits_RV = head_logits(spec, params[1], x_RD)
        return state, Out(drawn(batch, rows, row_R, position_R, logits_RV, ops, processors), batch.emit)

    return Companion(params, pool, follow, first, later, catches_up=True)


def one_each(rows: Rows, batch: Batch, row_R: Tensor, position_R: Tensor) -> Where:
    """`locate` where each row has one new token, at these positions: a third of the operators. Padding, whatever it is
    cut into, is the null row's first place again and again."""
    slot_R = rows.table[row_R, (position_R // BLOCK).long()] * BLOCK + position_R % BLOCK
    return Where(batch.row, batch.start, row_R, position_R, slot_R, position_R + batch.start.diff(), rows.table)


def drawn(
    batch: Batch,
    rows: Rows,
    row_R: Tensor,
    position_R: Tensor,
    logits_RV: Tensor,
    ops: Ops,
    processors: Mapping[str, Processor],
) -> Tensor:
    """The tokens after these positions, drawn as the target's are and written behind them; rows end there now. The
    null row stays empty."""
    after_R = position_R + 1
    token_R = choose(batch.ask, logits_RV, rows, row_R, after_R, ops, processors)
    rows.history[row_R, after_R.long()] = token_R
    rows.length[row_R] = after_R
    rows.length[-1:] = 0
    return token_R
