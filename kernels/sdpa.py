"""Attention within whole texts by torch's own fused kernel, one text at a time, as a backend called `torch`.

A call sees one text and nothing else, copied to the same alignment, so its bits are its own. torch's kernel for ragged
batches (`varlen_attn`) is for GPUs of the newest kinds and chooses its tiles by the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine.kernels.attention import Heads
from fnengine.kernels.contract import Backend
from fnengine.kernels.library import register
from fnengine.kernels.whole import WHOLE_ATTENTION, seen_by, unseen

TILE = 512
"""Queries of a call where only near keys are seen: what is masked of its keys costs as much as what is not."""


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
    """See `WHOLE_ATTENTION.doc`; without caps and sinks."""
    G = q_THC.shape[1] // k_TKC.shape[1]
    out = torch.zeros(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
    start = start_S1.tolist()
    for a, b in itertools.pairwise(start):
        n = b - a
        if n == 0:
            continue
        q, k, v = (x[a:b].transpose(0, 1).contiguous()[None] for x in (q_THC, k_TKC, v_TKC))
        if G > 1:
            k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
        if not window or n <= window:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
            out[a:b] = o[0].transpose(0, 1)
            continue
        for first in range(0, n, TILE):
            last = min(first + TILE, n)
            low, high = seen_by(first, last, n, window, causal)
            seen = ~unseen(first, last, low, high, window, causal, q.device)
            near = (x[:, :, low:high] for x in (k, v))
            o = F.scaled_dot_product_attention(q[:, :, first:last], *near, attn_mask=seen, scale=scale)
            out[a + first : a + last] = o[0].transpose(0, 1)
    return out


def _lacks(_device: torch.device, asked: Sequence[Heads]) -> str | None:
    if any(h.soft_cap > 0 or h.sinks for h in asked):
        return "torch's fused attention has neither soft caps nor sinks"
    return None


backend = Backend(
    "torch",
    WHOLE_ATTENTION,
    register("whole_attention", "torch", whole_attention),
    lambda _device, _dtype: None,
    invariant=True,
    capturable=False,
    lacks=_lacks,
    serves=lambda example: not example["soft_cap"] and example["sink_H"] is None,
)
"""It reads where texts begin on the host, so a graph cannot hold it."""
