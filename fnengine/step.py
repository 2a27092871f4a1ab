"""The step: `step(params, state, batch) -> (state, out)`, one pure function for every kind of batch.

Prefill, decode and mixed batches differ only in integers. `state` is donated: KV pool and rows are written in place
through ops whose schema declares it, nothing else is. Noise depends on (seed, position, token) alone. No host sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fnengine import model as interpreted
from fnengine import sampling
from fnengine.host.step import BLOCK
from fnengine.kernels import Ops
from fnengine.model import Forward, RunLayers
from fnengine.processors import PROCESSORS, Own, in_turn
from fnengine.spec import ModelSpec, residual, steerable
from fnengine.state import Batch, Out, State, Top, Where, locate

Step = Callable[[Any, State, Batch], tuple[State, Out]]

SCORED_AT_ONCE = 64
"""Rows of logits [n, V] alive at once while prompts are scored: 39 MB for a vocabulary of 151,936."""


def make_step(
    spec: ModelSpec,
    ops: Ops,
    run_layers: RunLayers,
    own: Sequence[Own] = (),
    steer: Sequence[str] = (),
    forward: Forward = interpreted,
) -> Step:
    """The step of a model. `run_layers` is `model.one_by_one()`, or a compiled and recorded form of it; `own` are
    logits processors that rows may ask for beside the usual ones, `steer` the layers that rows may steer, `forward`
    what makes logits of tokens."""
    processors = {**PROCESSORS, "own": in_turn(own)}
    layer_of = {residual(i): i for i in range(len(spec.layers))}
    steered = [steerable(spec).index(name) for name in steer]

    def step(params: Any, state: State, batch: Batch) -> tuple[State, Out]:
        rows, ask = state.rows, batch.ask
        where = locate(rows, batch, BLOCK)

        at = where.position.long().clamp_(max=rows.history.shape[1] - 1)
        token_T = torch.where(batch.token < 0, rows.history[where.row_T, at], batch.token)
        rows.history[where.row_T, at] = token_T
        where = replace(where, token=token_T)

        embedding_TD = forward.embed(spec, params, token_T, where.position)
        after: dict[int, Callable[[Tensor], Tensor]] = {
            layer_of[name]: torch.clone for name in ask.taps if name in layer_of
        }
        for s, i in enumerate(steered):
            after[i] = partial(steered_by, rows.steer[:, s], where.row_T)
        x_TD, inside = forward.body(spec, params, state.pool, where, ops, embedding_TD, run_layers, after)

        row_R, length_R = batch.row.long(), where.length
        at_E, row_E, position_E = _picked(batch, where)
        wanted = ask.sample or ask.logits or ask.logprobs is not None
        logits_EV = forward.head_logits(spec, params, x_TD[at_E]) if wanted else None
        count_R = batch.emit
        token_E = torch.zeros_like(position_E)
        logprobs = None
        if ask.sample:
            assert logits_EV is not None
            token_E = newest_R = sampling.choose(ask, logits_EV, rows, row_E, position_E, ops, processors, batch.mask)
            if batch.pick is not None:
                count_R, newest_R = _kept(batch, token_T, token_E)
                length_R = length_R - (batch.emit - count_R)
            at_R = length_R.long().clamp(max=rows.history.shape[1] - 1)
            rows.history[row_R, at_R] = torch.where(count_R > 0, newest_R, rows.history[row_R, at_R])
        if ask.logprobs is not None:
            assert logits_EV is not None
            watched_EJ = rows.watched[row_E] if ask.watched else None
            logprobs = sampling.logprobs(logits_EV, token_E, ask.logprobs, watched_EJ)
        rows.length[row_R] = length_R
        if rows.behind is not None:
            rows.behind[row_R] = (count_R - 1).clamp(min=0)
        rows.length[-1:] = 0  # the null row stays empty, whatever padding did to it
        score = None
        if ask.score is not None:
            assert batch.target is not None
            watched_TJ = rows.watched[where.row_T] if ask.watched else None
            score = _score(forward, spec, params, x_TD, batch.target, ask.score, watched_TJ)
        seen = {"embedding": embedding_TD, **{residual(i): x for i, x in inside.items()}}
        if "final" in ask.taps:
            seen["final"] = forward.final_norm(spec, params, x_TD)
        taps = tuple(seen[name] for name in ask.taps)
        return state, Out(token_E, count_R, logprobs, score, logits_EV if ask.logits else None, taps)

    return step


def steered_by(steer_MD: Tensor, row_T: Tensor, x_TD: Tensor) -> Tensor:
    """x_TD plus the vector of each token's row. Where that is 0 the bits are those of x: -0.0 + 0 would be 0.0."""
    by_TD = steer_MD[row_T]
    return torch.where(by_TD == 0, x_TD, (x_TD.float() + by_TD).to(x_TD.dtype))


def _picked(batch: Batch, where: Where) -> tuple[Tensor, Tensor, Tensor]:
    """(index among the new tokens, state row, position of the token being chosen) of each picked token, [E] each."""
    if batch.pick is None:
        return (batch.start[1:] - 1).clamp_(min=0).long(), batch.row.long(), where.length
    at_E = batch.pick.long()
    return at_E, where.row_T[at_E], where.position[at_E] + 1


def _kept(batch: Batch, token_T: Tensor, chosen_E: Tensor) -> tuple[Tensor, Tensor]:
    """(how many tokens each row has chosen, the last of them), [R] each.

    Of the emit[r] tokens at a row's end the first is certain and the others are drafted. What was chosen after one
    counts as long as everything before it was drafted as the model would have it.
    """
    assert batch.pick is not None
    T, R = len(token_T), len(batch.row)
    index_T = torch.arange(T, device=token_T.device, dtype=torch.int32)
    r_T = torch.searchsorted(batch.start, index_T, right=True).sub_(1).clamp_(max=R - 1)
    end_R = batch.start[1:]
    first_R = (end_R - batch.emit).clamp(min=0)
    inside_T = index_T >= first_R[r_T]
    chosen_T = torch.zeros_like(token_T).scatter_(0, batch.pick.long(), chosen_E)
    wrong_T = inside_T & (index_T < end_R[r_T] - 1) & (chosen_T != token_T.roll(-1))
    before_T = wrong_T.cumsum(0) - wrong_T.long()
    right_T = inside_T & (before_T == before_T[first_R.clamp(max=T - 1).long()][r_T])
    count_R = torch.zeros_like(batch.emit).scatter_add_(0, r_T, right_T.int())
    return count_R, chosen_T[(first_R + count_R - 1).clamp(min=0).long()]


def _score(
    forward: Forward,
    spec: ModelSpec,
    params: Any,
    x_TD: Tensor,
    target_T: Tensor,
    k: int,
    watched_TJ: Tensor | None,
) -> Top:
    """Log-probabilities of `target_T` (or of token 0 where it is -1), a bounded number of rows at a time."""
    parts = []
    for i in range(0, len(x_TD), SCORED_AT_ONCE):
        some = slice(i, i + SCORED_AT_ONCE)
        logits = forward.head_logits(spec, params, x_TD[some])
        watched = None if watched_TJ is None else watched_TJ[some]
        parts.append(sampling.logprobs(logits, target_T[some].clamp(min=0), k, watched))
    names = ("chosen", "ids", "values", *(() if watched_TJ is None else ("watched",)))
    return Top(*(torch.cat([getattr(p, f) for p in parts]) for f in names))
