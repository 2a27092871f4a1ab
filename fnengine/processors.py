"""Logits processors: pure functions of (logits, rows, position), each for a batch of rows at once.

    raw logits -> bias -> penalties -> (temperature) -> min_p -> top_k -> top_p -> Gumbel noise -> argmax

They take raw logits and give logits, a forbidden token being -inf; min_p and top_p look at softmax(logits / T), and the
division itself happens where the noise is added. A row at T = 0 is left to the argmax of what bias and penalties leave.
A row's result never depends on the rows beside it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fnengine.host.step import PIPELINE
from fnengine.state import Rows

FEW = 1024
"""On CPU, up to this many leading tokens come from a partial sort (0.2 ms a row for 50 of 151,936 against 12 ms)."""

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


def fixed_work(x: Tensor) -> bool:
    """Whether the work may not depend on the data: away from the CPU, reading a value waits for the device, and a
    captured step must be the same each time. On CPU rows that need nothing cost nothing."""
    return x.device.type != "cpu"


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
    count = torch.zeros_like(logits_RV).scatter_add_(1, token_RS, made.float()).gather(1, token_RS)
    old = logits_RV.gather(1, token_RS)
    repetition, frequency, presence = (view.of(n)[:, None] for n in ("repetition", "frequency", "presence"))
    new = torch.where(old > 0, old / repetition, old * repetition) - frequency * count - presence * (count > 0)
    # A token that stands at several places is written several times, each time with the same value.
    return logits_RV.scatter(1, token_RS, torch.where(position > 0, new, old))


def keep_min_p(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with -inf where softmax(logits / T) is below min_p times its maximum."""

    def keep(logits: Tensor, v: View) -> Tensor:
        floor = logits.amax(1) + v.of("temperature") * v.of("min_p").log()  # p / p_max = exp((x - x_max) / T)
        if fixed_work(logits):
            return torch.where(logits >= floor[:, None], logits, -torch.inf)
        out = torch.empty_like(logits)  # `where` takes up to 0.6 ms a row of 151,936, `threshold` 0.03 ms
        below = floor.nextafter(torch.tensor(-torch.inf)).tolist()
        for r, t in enumerate(below):  # x <= t becomes -inf
            torch.ops.aten.threshold.out(logits[r], t, -torch.inf, out=out[r])
        return out

    return _where((view.of("temperature") > 0) & (view.of("min_p") > 0), keep, logits_RV, view)


def keep_top_k(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with -inf for all but the k largest, ties to the lowest id."""
    V = logits_RV.shape[1]

    def keep(logits: Tensor, v: View) -> Tensor:
        k = v.of("top_k").clamp(max=V)[:, None]
        n = int(k.max()) if not fixed_work(logits) else V
        value, id = leading(logits, n)
        return _only(logits, id, torch.where(torch.arange(n, device=k.device) < k, value, -torch.inf))

    k = view.of("top_k")
    active = (view.of("temperature") > 0) & (k > 0) & (k < V)
    if fixed_work(logits_RV):
        return _where(active, keep, logits_RV, view)
    # One row with a large k must not make the others sort everything.
    logits_RV = _where(active & (k <= FEW), keep, logits_RV, view)
    return _where(active & (k > FEW), keep, logits_RV, view)


def keep_top_p(logits_RV: Tensor, view: View) -> Tensor:
    """Logits with -inf outside the smallest set of most likely tokens whose probability reaches top_p.

    The token that crosses is kept, so at least one is; ties to the lowest id. Probabilities are softmax(logits / T) in
    float32, added up in float64, most likely first.
    """
    return _where((view.of("temperature") > 0) & (view.of("top_p") < 1), _keep_top_p, logits_RV, view)


def _keep_top_p(logits_RV: Tensor, view: View) -> Tensor:
    T, top_p = view.of("temperature")[:, None], view.of("top_p").double()[:, None]
    p_RV = (logits_RV / torch.where(T > 0, T, 1.0)).softmax(1)
    R, V = logits_RV.shape

    def keep(n: int, logits: Tensor, p: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(id, value) of the kept ones among the n leading tokens, and whether these were enough."""
        value, id = leading(logits, n)
        mass = p.gather(1, id).cumsum(1, dtype=torch.float64)
        before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
        enough = (mass[:, -1:] >= top_p) | (value[:, -1:] == -torch.inf)
        return id, torch.where(before < top_p, value, -torch.inf), enough[:, 0]

    out = torch.full_like(logits_RV, -torch.inf)
    if fixed_work(logits_RV):
        id, value, _ = keep(V, logits_RV, p_RV, top_p)
        return out.scatter_(1, id, value)
    rest = torch.arange(R)
    for n in (FEW // 16, FEW, V):  # a flat distribution needs more tokens, and pays for them alone
        part = (logits_RV, p_RV, top_p) if len(rest) == R else (logits_RV[rest], p_RV[rest], top_p[rest])
        id, value, enough = keep(min(n, V), *part)
        out[rest[enough][:, None], id[enough]] = value[enough]
        rest = rest[~enough]
        if n >= V or len(rest) == 0:
            break
    return out


PROCESSORS: dict[str, Processor] = {
    "bias": add_bias,
    "penalties": penalize,
    "min_p": keep_min_p,
    "top_k": keep_top_k,
    "top_p": keep_top_p,
}
assert tuple(PROCESSORS) == PIPELINE


def leading(x_RV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row, descending, ties by lowest id (entries of -inf: in no particular order).

    Shapes: [R, V] -> values [R, n], ids [R, n] int64.
    """
    V = x_RV.shape[1]
    if fixed_work(x_RV) or n > 4 * FEW or n >= V // 4:
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
    """`fn` applied to active rows, the others as they are."""
    if fixed_work(logits_RV):
        return torch.where(active_R[:, None], fn(logits_RV, view), logits_RV)
    index = active_R.nonzero()[:, 0]
    if len(index) == 0:
        return logits_RV
    if len(index) == len(logits_RV):
        return fn(logits_RV, view)
    out = logits_RV.clone()
    out[index] = fn(logits_RV[index], view.take(index))
    return out


def _only(logits_RV: Tensor, id_Rn: Tensor, value_Rn: Tensor) -> Tensor:
    """Values at their ids and -inf everywhere else."""
    return torch.full_like(logits_RV, -torch.inf).scatter_(1, id_Rn, value_Rn)
