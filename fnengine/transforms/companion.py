"""A companion: what computes the target's new tokens in a way of its own, in the same step, and drafts for many rows.

    step = companion.follow(step)                       # (params of both, state, batch) -> (state, out), as before
    first, later = companion.first, companion.later     # the same signature: one drafted token for each row

It has rows and block tables in common with the target, and behind the target's leaves of the pool some of its own, of
as many blocks. So whatever shares, copies, swaps or caches blocks carries its KV along, and nobody keeps books of it:
of a block it has computed what the target has. What it drafts it writes behind a row's length, where nobody reads;
`rows.length` goes along and is set back by whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fnengine.host.step import BLOCK
from fnengine.kernels import Ops
from fnengine.model import RunLayers, body, embed, head_logits
from fnengine.processors import PROCESSORS, Own, Processor, in_turn
from fnengine.sampling import choose
from fnengine.spec import ModelSpec
from fnengine.state import Batch, Out, Pool, Rows, State, Where, locate
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


def of_model(
    spec: ModelSpec,
    params: Any,
    ops: Ops,
    run_layers: RunLayers,
    layers: int,
    pool: Callable[[int], tuple[Pool, ...]],
    own: Sequence[Own] = (),
) -> Companion:
    """A draft model's: `model`'s three parts, without what a step does besides.

    Args:
        layers: of the target: so many leaves of the pool are its own.
        own: the engine's own logits processors.
    """
    processors = {**PROCESSORS, "own": in_turn(own)}

    def computed(params: Any, state: State, where: Where, token_T: Tensor) -> Tensor:
        x_TD = embed(spec, params, token_T, where.position)
        return body(spec, params, state.pool[layers:], where, ops, x_TD, run_layers)[0]

    def follow(target: Step) -> Step:
        def both(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
            rows = state.rows
            where = locate(rows, batch, BLOCK)  # before the target's step moves lengths on
            newest_T = rows.history[where.row_T, where.position.long().clamp_(max=rows.history.shape[1] - 1)]
            computed(params[1], state, where, torch.where(batch.token < 0, newest_T, batch.token))
            _, out = target(params[0], State(state.pool[:layers], rows), batch)
            return state, out

        return both

    def draft(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
        rows, row_R = state.rows, batch.row.long()
        position_R = rows.length[row_R]
        token_R = rows.history[row_R, position_R.long()]
        x_RD = computed(params[1], state, one_each(rows, batch, row_R, position_R), token_R)
        logits_RV = head_logits(spec, params[1], x_RD)
        return state, Out(drawn(batch, rows, row_R, position_R, logits_RV, ops, processors), batch.emit)

    return Companion(params, pool, follow, draft, draft)


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
