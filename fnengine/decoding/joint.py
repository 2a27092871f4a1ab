"""A head as an engine's companion: its layer over all rows of a step at once, on the target's blocks.

A pair has the slot of the token whose hidden state it holds. Its other token is the one after that, so pairs are
written when a step is done, with what it has chosen; of a prompt that comes in pieces the row's history knows the next
token already. A shared block's last pair therefore holds the token that came next in the text that computed it, which
another text need not have: one pair of a block, of which a draft may be the worse.

    step      KV of all pairs of its tokens: two products a token; the newest one's hidden state is kept
    draft     pass by pass, the newest pair of each row through the whole layer; its output is the next pair's state
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnengine.companions import Ground, Ready
from fnengine.device import make_pool
from fnengine.errors import ConfigError
from fnengine.graphs.compile import Traces
from fnengine.host.step import BLOCK
from fnengine.layers import Angles, rope_angles
from fnengine.memory import Extra
from fnengine.processors import PROCESSORS, Own, in_turn
from fnengine.spec import Recurrent
from fnengine.state import Batch, Carry, Out, Pool, Rows, State, block_bytes, locate
from fnengine.step import Step
from fnengine.transforms.companion import Companion, drawn, one_each

if TYPE_CHECKING:
    from fnengine.decoding.heads import Head


def ready(head: Head, ground: Ground) -> Ready:
    """A head as `companions.Beside` promises it. Raises ConfigError if it was read for another model."""
    target = ground.target
    if head.target is not target:
        raise ConfigError("a head of another model", where=head.name, remedy="load it for the model that is served")
    assert not isinstance(head.kind.mixer, Recurrent)
    a, D, item = head.kind.mixer, target.spec.width, target.dtype.itemsize
    budget, qkv = ground.mode.budget, (a.heads + 2 * a.kv_heads) * a.width
    inside = budget * len(head.taps) * D * item
    extra = Extra(
        head.name,
        weights=head.bytes,
        per_block=block_bytes(head.ops.kv, a, target.dtype),
        rows=2 * (ground.mode.rows + 1) * D * item,
        workspace=2 * inside + budget * (6 * D + 2 * qkv) * item,
        beside=inside,
        on_card=2 * inside + budget * (6 * D + 2 * qkv) * item,
    )

    def made(max_len: int, traces: Traces) -> tuple[Companion, str]:
        return companion(head, max_len, ground.own), "eager"

    return Ready(extra, target.spec.max_len, False, 2, made)


def companion(head: Head, max_len: int, own: tuple[Own, ...] = ()) -> Companion:
    """What a device has to know of a head, for sequences of at most so many tokens. `own` are the engine's own logits
    processors."""
    target, layers = head.target, len(head.target.spec.layers)
    cos, sin = rope_angles(head.kind.mixer.rope, torch.arange(max_len, device=target.device))

    def angles(position_T: Tensor) -> Angles:
        at_T = position_T.clamp(max=max_len - 1)  # padding goes beyond
        return cos[at_T], sin[at_T]

    processors = {**PROCESSORS, "own": in_turn(own)}

    def kv_of(state: State) -> Pool:
        pool = state.pool[layers]
        assert isinstance(pool, Pool)
        return pool

    def follow(step: Step) -> Step:
        def both(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
            rows, asked, carry = state.rows, batch.ask.taps, state.carry
            assert carry is not None
            where = locate(rows, batch, BLOCK)  # before the step moves lengths on
            taps = (*asked, *(name for name in head.taps if name not in asked))
            wider = replace(batch, ask=replace(batch.ask, taps=taps))
            _, out = step(params[0], State(state.pool[:layers], rows), wider)
            seen = dict(zip(taps, out.taps, strict=True))
            hidden_TD = head.wiring.hidden([seen[name] for name in head.taps])
            token_T = _at(rows, where.row_T, where.position + 1)
            head.enter(token_T, hidden_TD, angles(where.position), kv_of(state), where)
            # Of the tokens that a row chooses after, the last that was drafted right.
            newest_R = (batch.start[1:] - batch.emit + out.count - 1).clamp(min=0).long()
            carry.seen[batch.row.long()] = hidden_TD[newest_R]
            return state, replace(out, taps=out.taps[: len(asked)])

        return both

    def draft(hidden_of: Callable[[Carry], Tensor]) -> Step:
        def drafted(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
            rows, carry = state.rows, state.carry
            assert carry is not None
            row_R = batch.row.long()
            position_R = rows.length[row_R]
            where = one_each(rows, batch, row_R, (position_R - 1).clamp_(min=0))  # the newest pair
            token_R = rows.history[row_R, position_R.long()]
            pool, hidden_RD = kv_of(state), hidden_of(carry)[row_R]
            entered = head.enter(token_R, hidden_RD, angles(where.position), pool, where)
            hidden_RD, logits_RV = head.wiring.leave(head.attend(*entered, pool, where))
            carry.ahead[row_R] = hidden_RD
            return state, Out(drawn(batch, rows, row_R, position_R, logits_RV, head.ops, processors), batch.emit)

        return drafted

    def pool(blocks: int) -> Any:
        assert not isinstance(head.kind.mixer, Recurrent)
        return make_pool([head.kind.mixer], head.ops.kv, blocks, target.dtype, target.device)

    first, later = draft(lambda carry: carry.seen), draft(lambda carry: carry.ahead)
    return Companion(head.params, pool, follow, first, later, carry=target.spec.width)


def _at(rows: Rows, row_T: Tensor, position_T: Tensor) -> Tensor:
    """The tokens that stand there."""
    return rows.history[row_T, position_T.long().clamp(max=rows.history.shape[1] - 1)]
