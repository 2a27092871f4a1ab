"""From a fused projection to attention: heads normed and rotated, keys and values written to the paged pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract
from fnengine.kernels.layout import heads_of, put, shared


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32, rounded once to x's dtype.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)


def apply_rope(x_THC: Tensor, cos_TW: Tensor, sin_TW: Tensor) -> Tensor:
    """x with channel i of the first half and of the second half rotated as a pair, in float32, rounded once.

    Channels beyond twice the width W of the angles pass unchanged.
    """
    cos, sin = cos_TW[:, None, :], sin_TW[:, None, :]
    half = cos.shape[-1]
    a, b = x_THC[..., :half].float(), x_THC[..., half : 2 * half].float()
    parts = [a * cos - b * sin, b * cos + a * sin, x_THC[..., 2 * half :].float()]
    return torch.cat(parts, dim=-1).to(x_THC.dtype)


def rope_write(
    qkv_TE: Tensor,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    cos_TW: Tensor,
    sin_TW: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_T: Tensor,
    eps: float,
) -> Tensor:
    """See `ROPE_WRITE.doc`."""
    K, C = heads_of(k_pool, v_pool)
    heads = qkv_TE.unflatten(1, (qkv_TE.shape[1] // C, C))
    v = heads[:, -K:]
    q, k = (heads[:, :-K], v) if shared(v_pool) else (heads[:, : -2 * K], heads[:, -2 * K : -K])
    if q_norm_C is not None:
        q = rms_norm(q, q_norm_C, eps)
    if k_norm_C is not None:
        k = rms_norm(k, k_norm_C, eps)
    put(k_pool, v_pool, slot_T.long(), apply_rope(k, cos_TW, sin_TW), v)
    return apply_rope(q, cos_TW, sin_TW)


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    # tokens, blocks, query heads, KV heads, channels, rotated pairs, norms
    cases = (
        (1, 2, 1, 1, 2, 1, True),
        (5, 3, 4, 2, 20, 10, True),
        (33, 7, 3, 3, 64, 32, False),
        (9, 2, 6, 1, 48, 8, True),
    )
    for T, N, H, K, C, W, norms in (*cases, (0, 2, 2, 1, 8, 4, False)):
        pool = torch.randn(2, N, 16, K, C, generator=g).to(dtype)
        angle = torch.randn(T, W, generator=g) * 3
        wide = torch.randn(T, (H + 2 * K) * C + 6, generator=g).to(dtype)
        yield {
            "qkv_TE": wide[:, : (H + 2 * K) * C],  # rows are strided
            "q_norm_C": torch.rand(C, generator=g).to(dtype) if norms else None,
            "k_norm_C": torch.rand(C, generator=g).to(dtype) if norms else None,
            "cos_TW": angle.cos(),
            "sin_TW": angle.sin(),
            "k_pool": pool[0].clone(),
            "v_pool": pool[1].clone(),
            "slot_T": torch.randperm(N * 16, generator=g)[:T].int(),
            "eps": 1e-6,
        }


ROPE_WRITE = Contract(
    name="rope_write",
    doc="""(qkv_TE, q_norm_C or None, k_norm_C or None, cos_TW, sin_TW, k_pool [N, B, K, C], v_pool, slot_T int32, eps)
    -> q_THC; writes both pools.

    qkv holds H + 2 K heads of C channels a token: those of q, k and v. Each head of q and k is RMS-normed (where there
    is a weight) and rotated by the token's angles: channel i < W with channel W + i, the rest as they are. Both are
    done in float32 and rounded after each. Token t's k and v go to block slot[t] // B at offset slot[t] % B; pools of 8
    bits (`layout.Rounded`) take what is rounded to them. Padding slots (of the null block) may repeat; any of their
    values may stay.

    Where v_pool is empty, [N, 0], a token's values are its keys as they are written: qkv holds H + K heads, those of q
    and k.""",
    reference=rope_write,
    mutates=("k_pool", "v_pool"),
    examples=_examples,
)
