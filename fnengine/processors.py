"""Logits processors: pure functions of (logits, rows, position), each for a batch of rows at once.

    raw logits -> bias -> penalties -> (temperature) -> min_p -> top_k -> top_p -> Gumbel noise -> argmax

They take raw logits and give logits, a forbidden token being -inf. The last five of the chain are ops
(`kernels/truncation.py`, `kernels/noise.py`), which `sampling.choose` calls. A row's result never depends on the rows
beside it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from fnengine.host.step import PIPELINE
from fnengine.state import Rows

FEW = 1024
"""On CPU, up to four times as many leading tokens come from a partial sort (0.2 ms a row for 50 of 151,936 against
12 ms)."""

GROUP = 16
"""Logits in a group of `_topk`."""


@dataclass(frozen=True)
class View:
    """The rows that a batch of logits belongs to, and the position each one chooses for."""

    rows: Rows
    row_R: Tensor
    """[R] int64 state row of each batch row"""
    position_R: Tensor
    """[R] int32 index in the whole sequence of the token being chosen"""

    def of(self, name: str) -> Tensor:
        """[R, ...] the rows' values of a field of `Rows`."""
        return getattr(self.rows, name)[self.row_R]

    def take(self, index: Tensor) -> View:
        return View(self.rows, self.row_R[index], self.position_R[index])


_CAPTURED: ContextVar[bool] = ContextVar("captured", default=False)


@contextmanager
def captured() -> Iterator[None]:
    """While it is open, work is fixed on CPU, too: the eager twin of a graph runs what a GPU would."""
    token = _CAPTURED.set(True)
    try:
        yield
    finally:
        _CAPTURED.reset(token)


def fixed_work(x: Tensor) -> bool:
    """Whether the work may not depend on the data: away from the CPU, reading a value waits for the device, and a
    captured step must be the same each time. On CPU rows that need nothing cost nothing."""
    return x.device.type != "cpu" or _CAPTURED.get()


Processor = Callable[[Tensor, View], Tensor]
"""(logits_RV float32, view) -> logits_RV; the input is left alone, and may be returned when nothing changes."""


def add_bias(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with each row's sparse (id, bias) entries added while position < until."""
    live_RJ = (view.of("bias_id") >= 0) & (view.of("bias_until") > view.position_R[:, None])

    def add(logits: Tensor, v: View) -> Tensor:
        ids = v.of("bias_id")
        live = (ids >= 0) & (v.of("bias_until") > v.position_R[:, None])
        return logits.scatter_add(1, ids.clamp(min=0).long(), torch.where(live, v.of("bias"), 0.0))

    return _where(live_RJ.any(1), add, logits_RV, view)


def penalize(logits_RV: Tensor, view: View) -> Tensor:
    """Logits after repetition (prompt and output), then frequency and presence (output only).

    Only tokens of the history change: logit > 0 is divided by the repetition penalty, logit < 0 multiplied by it, then
    frequency times the count and presence once are subtracted.
    Source: Keskar et al. 2019 (repetition); OpenAI's API reference (frequency, presence).
    """
    active = (view.of("repetition") != 1) | (view.of("frequency") != 0) | (view.of("presence") != 0)
    return _where(active & (view.position_R > 0), _penalize, logits_RV, view)


def _penalize(logits_RV: Tensor, view: View) -> Tensor:
    position = view.position_R[:, None]
    S = view.rows.history.shape[1]
    if not fixed_work(logits_RV):
        S = int(view.position_R.max())  # elsewhere reading it would wait for the device
    token_RS = view.rows.history[view.row_R, :S].long()
    at_S = torch.arange(S, device=token_RS.device)
    seen = at_S < position
    token_RS = torch.where(seen, token_RS, token_RS[:, :1])  # beyond the end: the first token once more, count 0
    made = seen & (at_S >= view.of("prompt_len")[:, None])
    out_RV = torch.zeros_like(logits_RV)  # first the counts, then the logits: one copy of [R, V]
    count = out_RV.scatter_add_(1, token_RS, made.float()).gather(1, token_RS)
    old = logits_RV.gather(1, token_RS)
    repetition, frequency, presence = (view.of(n)[:, None] for n in ("repetition", "frequency", "presence"))
    new = torch.where(old > 0, old / repetition, old * repetition) - frequency * count - presence * (count > 0)
    # A token that stands at several places is written several times, each time with the same value.
    return out_RV.copy_(logits_RV).scatter_(1, token_RS, torch.where(position > 0, new, old))


PROCESSORS: dict[str, Processor] = {"bias": add_bias, "penalties": penalize}
TRUNCATION = ("min_p", "top_k", "top_p")
"""Fields of `Rows` that `Ops.truncate` reads, beside the temperature."""
assert (*PROCESSORS, *TRUNCATION) == PIPELINE


def leading(x_RV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row, descending, ties by lowest id (entries of -inf: in no particular order).

    Shapes: [R, V] -> values [R, n], ids [R, n] int64.
    """
    V = x_RV.shape[1]
    if fixed_work(x_RV):
        # One integer for value and id, so that topk has no ties to break: a float's bits, in an order that is its own.
        bits = (x_RV + 0.0).view(torch.int32).long()
        ranked = (bits ^ (bits >> 63 & 0x7FFFFFFF)) << 32 | torch.arange(V - 1, -1, -1, device=x_RV.device)
        id = V - 1 - (ranked.topk(n, dim=1).values & 0xFFFFFFFF)
        return x_RV.gather(1, id), id
    if n > 4 * FEW or n >= V // 4:
        value, id = x_RV.sort(dim=1, descending=True, stable=True)
        return value[:, :n], id[:, :n]
    if n == 0:
        return x_RV[:, :0], torch.zeros_like(x_RV[:, :0], dtype=torch.int64)
    # topk breaks ties as it likes. Some more than n are taken, so that a tie across the cut is usually whole.
    value, id = _topk(x_RV, n + 16 + n // 4)
    id, order = id.sort(dim=1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    id = id.gather(1, order)
    last, cut = value[:, -1], value[:, n - 1]
    value, id = value[:, :n], id[:, :n]
    torn = ((last == cut) & (cut > -torch.inf)).nonzero()[:, 0].tolist()
    if torn:
        id = id.contiguous()
    for r in torn:
        above = int((value[r] > cut[r]).sum())
        id[r, above:] = (x_RV[r] == cut[r]).nonzero()[: n - above, 0]
    return value, id


def _topk(x_RV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row, unordered, by way of the n groups with the largest maxima: they hold them all.

    Group g is the ids g, g + G, g + 2G, ..., so that the maxima are a vertical reduction. Three times faster than
    `topk` on 151,936 logits at n = 78.
    """
    V = x_RV.shape[1]
    G = V // GROUP
    if n > G // 4:
        return x_RV.topk(min(n, V), dim=1, sorted=False)
    whole = G * GROUP
    best = x_RV[:, :whole].unflatten(1, (GROUP, G)).amax(1).topk(n, dim=1, sorted=False).indices
    id = (best[:, None, :] + torch.arange(0, whole, G)[:, None]).flatten(1)
    id = torch.cat([id, torch.arange(whole, V).expand(len(id), -1)], dim=1)
    value, at = x_RV.gather(1, id).topk(n, dim=1, sorted=False)
    return value, id.gather(1, at)


def _where(active_R: Tensor, fn: Processor, logits_RV: Tensor, view: View) -> Tensor:
    """`fn` applied to active rows; `fn` itself leaves the others as they are, and here they cost nothing."""
    if fixed_work(logits_RV):
        return fn(logits_RV, view)
    index = active_R.nonzero()[:, 0]
    if len(index) == 0:
        return logits_RV
    if len(index) == len(logits_RV):
        return fn(logits_RV, view)
    out = logits_RV.clone()
    out[index] = fn(logits_RV[index], view.take(index))
    return out
