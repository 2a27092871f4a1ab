"""Attention over the paged pool: contract and plain-torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract
from fnengine.kernels.layout import ROUNDED_BLOCK, gather, heads_of

AT_ONCE = 1 << 18
"""Elements of K gathered for rows that go together on CPU: what is copied should still be in cache when it is used."""


@dataclass(frozen=True)
class Heads:
    """What a model's layer asks of attention, as far as a backend may lack it."""

    width: int
    """C"""
    window: int = 0
    """As in the contract: of chunks it is negative."""
    soft_cap: float = 0.0
    sinks: bool = False
    shares: bool = False
    """A token's values are its keys."""


def _attend(
    q_RnHC: Tensor,
    k_RSKC: Tensor,
    v_RSKC: Tensor,
    end_R: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    sink_H: Tensor | None,
) -> Tensor:
    """Attention of rows with n queries each over their gathered KV; a row's last query stands at end - 1. [R,n,H,C]

    Values from `end` on, and before what the first query sees, are cleared, because a weight of zero does not silence a
    NaN that a former owner left there, or a later one.
    """
    R, n, H, C = q_RnHC.shape
    S, K = k_RSKC.shape[1:3]
    G = H // K
    q = q_RnHC.float().view(R, n, K, G, C).permute(0, 2, 3, 1, 4).reshape(R, K, G * n, C)
    score = torch.matmul(q, k_RSKC.float().permute(0, 2, 3, 1)).mul_(scale).view(R, K, G, n, S)
    if soft_cap > 0:
        score = score.div_(soft_cap).tanh_().mul_(soft_cap)
    kv = torch.arange(S, device=q.device)
    position_Rn = (end_R.long() - n)[:, None] + torch.arange(n, device=q.device)
    seen = kv <= position_Rn[..., None]
    if window > 0:
        seen &= kv > position_Rn[..., None] - window
    if window < 0:
        seen &= kv >= (position_Rn // -window * -window)[..., None]
    score = score.masked_fill_(~seen[:, None, None], -torch.inf)
    if sink_H is not None:
        score = torch.cat([score, sink_H.float().view(K, G, 1, 1).expand(R, K, G, n, 1)], -1)
    weight = score.softmax(-1)[..., :S].reshape(R, K, G * n, S)
    unseen = (kv >= end_R.long()[:, None]) | ~(seen.any(1) if window else kv >= 0)
    v = v_RSKC.float().masked_fill_(unseen[..., None, None], 0.0)
    out = torch.matmul(weight, v.permute(0, 2, 1, 3))
    return out.view(R, K, G, n, C).permute(0, 3, 1, 2, 4).reshape(R, n, H, C).to(q_RnHC.dtype)


def paged_attention(
    q_THC: Tensor,
    k_NBKC: Tensor,
    v_NBKC: Tensor,
    table_MP: Tensor,
    row_R: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    sink_H: Tensor | None,
) -> Tensor:
    """See `PAGED_ATTENTION.doc`.

    Rows with one query go in groups, the others one by one; the shapes come from `start` and `length`, so on a GPU
    this waits for the device once a call.
    """
    B = k_NBKC.shape[1] if k_NBKC.dim() == 4 else ROUNDED_BLOCK
    start, length = start_R1.tolist(), length_R.tolist()
    out = torch.zeros(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)

    def go(rows: list[int], token: slice | Tensor, n: int) -> None:
        index = torch.tensor(rows, device=q_THC.device)
        blocks = -(-max(length[r] for r in rows) // B)
        column = torch.arange(blocks, device=q_THC.device).clamp_(max=table_MP.shape[1] - 1)
        at = table_MP[row_R[index].long()][:, column].long()
        k, v = (x.flatten(1, 2) for x in gather(k_NBKC, v_NBKC, at))
        q = q_THC[token].unflatten(0, (len(rows), n))
        out[token] = _attend(q, k, v, length_R[index], scale, window, soft_cap, sink_H).flatten(0, 1)

    single = [r for r in range(len(length)) if start[r + 1] - start[r] == 1 and length[r] > 0]
    longest = max((length[r] for r in single), default=1)
    each = longest * prod(heads_of(k_NBKC, v_NBKC))
    together = max(1, AT_ONCE // each) if q_THC.device.type == "cpu" else len(single)
    for i in range(0, len(single), together or 1):
        rows = single[i : i + together]
        go(rows, torch.tensor([start[r] for r in rows], device=q_THC.device), 1)
    for r in range(len(length)):
        if start[r + 1] - start[r] > 1:
            go([r], slice(start[r], start[r + 1]), start[r + 1] - start[r])
    return out


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    B = 16
    cases = (  # H, K, C, window, soft cap, sinks, [(new tokens, length)]
        (1, 1, 8, 0, 0.0, False, [(1, 1)]),
        (4, 2, 64, 0, 0.0, False, [(1, 40), (0, 9), (7, 7), (1, 129), (20, 90)]),
        (6, 2, 20, 17, 1.5, True, [(3, 65), (1, 64), (1, 200), (70, 70), (0, 0)]),
        (8, 1, 128, 0, 0.0, True, [(33, 150), (1, 16), (1, 17)]),
        (4, 4, 48, 1, 0.0, True, [(5, 80), (1, 3)]),
        (14, 2, 64, 64, 30.0, False, [(1, 300), (130, 260), (2, 65)]),
    )
    for H, K, C, window, soft_cap, sinks, rows in cases:
        P = max(-(-n // B) for _, n in rows) + 1
        M = len(rows) + 2
        N = 1 + M * P
        table = (torch.randperm(N - 1, generator=g)[: M * P] + 1).int().view(M, P)
        row = torch.randperm(M, generator=g)[: len(rows)].int()
        new = torch.tensor([n for n, _ in rows])
        qkv = torch.randn(int(new.sum()), H + 2 * K, C, generator=g).to(dtype)
        yield {
            "q_THC": qkv[:, :H],  # a slice of a fused projection: tokens are strided
            "k_NBKC": torch.randn(N, B, K, C, generator=g).to(dtype),
            "v_NBKC": torch.randn(N, B, K, C, generator=g).to(dtype),
            "table_MP": table,
            "row_R": row,
            "start_R1": torch.cat([torch.zeros(1), new.cumsum(0)]).int(),
            "length_R": torch.tensor([n for _, n in rows]).int(),
            "scale": C**-0.5,
            "window": window,
            "soft_cap": soft_cap,
            "sink_H": torch.randn(H, generator=g).to(dtype) if sinks else None,
        }


PAGED_ATTENTION = Contract(
    name="paged_attention",
    doc="""(q_THC, k_NBKC, v_NBKC, table_MP int32, row_R int32, start_R1 int32, length_R int32, scale, window, soft_cap,
    sink_H or None) -> o_THC.

    Ragged causal attention. Batch row r owns the queries start[r]:start[r+1]; query t stands at position
    length[r] - (start[r+1] - t) and sees the KV positions up to and including its own; with window > 0 only the last
    `window` of those, with window < 0 those from the last multiple of -window on (chunks). KV position p of batch row r
    lies in block table[row[r], p // B] at offset p % B (beyond the table, where only padding goes, its last column
    stands for the missing ones; a column that no query of the row sees may name any block of the pool, whatever lies in
    it); the pool already holds the new tokens' KV (the write of *all* rows comes first). Query
    head h reads KV head h // (H // K). Softmax in float32, output in the dtype of q. start[r] == start[r+1] is legal:
    the row has no queries.

    A score is q.k * scale, and with soft_cap > 0 then soft_cap * tanh(score / soft_cap) (Gemma 2, arXiv 2408.00118).
    Pools may be rounded to 8 bits (`layout.Rounded`); a backend may then round queries and weights to 16.

    Where v_NBKC is empty, [N, 0], a token's values are its keys: C channels, however many of them a caller wants.

    A sink is a logit of a query head that takes part in the softmax's sum, but has no value (GPT-OSS): with it weights
    add up to less than 1.

        start[r]        t          start[r+1]
        |---------------q---------------|           queries of row r
        0 ......... position ....... length[r]      its KV""",
    reference=paged_attention,
    mutates=(),
    examples=_examples,
)
