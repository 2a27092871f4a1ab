"""Attention within texts that are read whole, without a pool: contract and plain-torch reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract

TILE = 256
"""Queries whose scores are alive at once. Tiles begin at multiples of it within a text, so that what a token gets
depends on its own text alone."""


def seen_by(first: int, last: int, n: int, window: int, causal: bool) -> tuple[int, int]:
    """(first, one past the last) of n keys that any of the queries first <= i < last sees."""
    low = max(0, first - window + 1) if window else 0
    high = last if causal else min(n, last + window - 1) if window else n
    return low, high


def unseen(first: int, last: int, low: int, high: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """[last - first, high - low] which keys a query does not see."""
    ahead = torch.arange(low, high, device=device) - torch.arange(first, last, device=device)[:, None]
    out = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    return out | (ahead.abs() >= window) if window else out


def whole_attention(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    start_S1: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    sink_H: Tensor | None,
    causal: bool,
) -> Tensor:
    """See `WHOLE_ATTENTION.doc`."""
    G = q_THC.shape[1] // k_TKC.shape[1]
    out = torch.zeros(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
    start = start_S1.tolist()
    for a, b in itertools.pairwise(start):
        n = b - a
        q, k, v = (x[a:b].transpose(0, 1).float().contiguous() for x in (q_THC, k_TKC, v_TKC))
        k, v = k.repeat_interleave(G, 0), v.repeat_interleave(G, 0)
        for first in range(0, n, TILE):
            last = min(first + TILE, n)
            low, high = seen_by(first, last, n, window, causal)
            score = torch.matmul(q[:, first:last], k[:, low:high].mT).mul_(scale)
            if soft_cap > 0:
                score = score.div_(soft_cap).tanh_().mul_(soft_cap)
            if causal or window:
                score.masked_fill_(unseen(first, last, low, high, window, causal, q.device), -torch.inf)
            if sink_H is not None:
                score = torch.cat([score, sink_H.float().view(-1, 1, 1).expand(-1, last - first, 1)], -1)
            weight = score.softmax(-1)[..., : high - low]
            out[a + first : a + last] = torch.matmul(weight, v[:, low:high]).transpose(0, 1).to(out.dtype)
    return out


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    cases = (  # H, K, C, window, soft cap, sinks, causal, lengths of texts, tokens of padding
        (1, 1, 8, 0, 0.0, False, False, [1], 0),
        (4, 2, 64, 0, 0.0, False, False, [40, 0, 7, 1, 129], 3),
        (4, 2, 64, 0, 0.0, False, True, [3, 90], 0),
        (6, 2, 20, 17, 1.5, True, False, [65, 300, 16], 1),
        (2, 2, 48, 5, 0.0, False, False, [9, 530, 4], 0),
        (8, 1, 32, 33, 0.0, False, True, [1, 600], 0),
        (3, 3, 16, 1, 0.0, True, True, [5, 2], 2),
    )
    for H, K, C, window, soft_cap, sinks, causal, texts, padding in cases:
        qkv = torch.randn(sum(texts) + padding, H + 2 * K, C, generator=g).to(dtype)
        yield {
            "q_THC": qkv[:, :H],  # a slice of a fused projection: tokens are strided
            "k_TKC": qkv[:, H : H + K],
            "v_TKC": qkv[:, H + K :],
            "start_S1": torch.tensor([0, *texts]).cumsum(0).int(),
            "scale": C**-0.5,
            "window": window,
            "soft_cap": soft_cap,
            "sink_H": torch.randn(H, generator=g).to(dtype) if sinks else None,
            "causal": causal,
        }


WHOLE_ATTENTION = Contract(
    name="whole_attention",
    doc="""Softmax attention of every token over its own text: o_THC.

    Text s is the tokens start[s] <= t < start[s + 1], which `start_S1`, int32 on the host, says; it may be empty, and
    what lies beyond the last one is padding, whose result is 0. A score is q.k * scale, capped by
    soft_cap * tanh(score / soft_cap) where that is positive, and query head h reads KV head h // (H / K). A token sees
    its text, with `causal` only up to itself, with `window` > 0 only what is less than so many tokens away. `sink_H`
    joins each head's softmax as one more score, without a value.""",
    reference=whole_attention,
    mutates=(),
    examples=_examples,
)
