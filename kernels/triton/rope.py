# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# (it takes tl.constexpr for a class of values, and jit functions for Python's)
"""From a fused projection to queries and written KV on a GPU, one launch.

A program takes some heads of one token, all of them of queries, of keys or of values. It holds a head as three pieces:
the first and the second half of what is rotated, and the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnengine import environment
from fnengine.kernels.layout import ROUNDED_BLOCK, heads_of
from fnengine.kernels.triton.launch import Launch
from fnengine.kernels.triton.numbers import e4m3, narrow, whole

ELEMENTS = 1024
"""Elements of the heads that a program takes, about: 16 bytes of bfloat16 for each of its 128 threads."""
WARPS = 4


@triton.jit
def _pieces(base, W: tl.constexpr, C: tl.constexpr, WP: tl.constexpr, REST: tl.constexpr, mask_head):
    """Three pieces of heads at `base` [heads], in float32."""
    i, j = tl.arange(0, WP), tl.arange(0, REST)
    first = mask_head[:, None] & (i < W)[None, :]
    rest = mask_head[:, None] & (j < C - 2 * W)[None, :]
    a = tl.load(base[:, None] + i[None, :], mask=first, other=0.0).to(tl.float32)
    b = tl.load(base[:, None] + W + i[None, :], mask=first, other=0.0).to(tl.float32)
    c = tl.load(base[:, None] + 2 * W + j[None, :], mask=rest, other=0.0).to(tl.float32)
    return a, b, c


@triton.jit
def _put(base, a, b, c, W: tl.constexpr, C: tl.constexpr, WP: tl.constexpr, REST: tl.constexpr, mask_head):
    i, j = tl.arange(0, WP), tl.arange(0, REST)
    first = mask_head[:, None] & (i < W)[None, :]
    rest = mask_head[:, None] & (j < C - 2 * W)[None, :]
    tl.store(base[:, None] + i[None, :], a, mask=first)
    tl.store(base[:, None] + W + i[None, :], b, mask=first)
    tl.store(base[:, None] + 2 * W + j[None, :], c, mask=rest)


@triton.jit
def _normed(
    a,
    b,
    c,
    norm,
    eps,
    kind: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    WP: tl.constexpr,
    REST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    i, j = tl.arange(0, WP), tl.arange(0, REST)
    wa = tl.load(norm + i, mask=i < W, other=0.0).to(tl.float32)
    wb = tl.load(norm + W + i, mask=i < W, other=0.0).to(tl.float32)
    wc = tl.load(norm + 2 * W + j, mask=j < C - 2 * W, other=0.0).to(tl.float32)
    square = tl.sum(tl.fma(a, a, b * b), 1) + tl.sum(c * c, 1)
    scale = tl.rsqrt(square / C + eps)[:, None]
    a = narrow(a * scale * wa[None, :], kind, INTERPRETED).to(tl.float32)
    b = narrow(b * scale * wb[None, :], kind, INTERPRETED).to(tl.float32)
    c = narrow(c * scale * wc[None, :], kind, INTERPRETED).to(tl.float32)
    return a, b, c


@triton.jit
def _rotated(a, b, cos, sin, kind: tl.constexpr, INTERPRETED: tl.constexpr):
    x = narrow(tl.fma(a, cos, -(b * sin)), kind, INTERPRETED).to(tl.float32)
    y = narrow(tl.fma(b, cos, a * sin), kind, INTERPRETED).to(tl.float32)
    return x, y


@triton.jit
def _write(
    pool,
    scales,
    slot,
    heads,
    mask,
    a,
    b,
    c,
    kind: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    WP: tl.constexpr,
    REST: tl.constexpr,
    B: tl.constexpr,
    KV: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Heads of a token to its slot, as the pool keeps them."""
    block = (slot // B).to(tl.int64)
    if KV == "int8":
        most = tl.maximum(tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1)), tl.max(tl.abs(c), 1))
        some = most >= 1e-30
        safe = tl.where(some, most, 1.0)
        inverse = tl.where(some, tl.div_rn(tl.full(most.shape, 127.0, tl.float32), safe), 0.0)[:, None]
        scale = tl.where(some, tl.div_rn(most, tl.full(most.shape, 127.0, tl.float32)), 0.0)
        head = (block * K + heads) * (4 * B + B * C)
        tl.store(scales + (block * K + heads) * (B + B * C // 4) + slot % B, scale, mask=mask)
        a, b, c = whole(a * inverse).to(tl.int8), whole(b * inverse).to(tl.int8), whole(c * inverse).to(tl.int8)
        _put(pool + head + 4 * B + (slot % B) * C, a, b, c, W, C, WP, REST, mask)
    else:
        base = pool + ((block * B + slot % B) * K + heads) * C
        if KV == "fp8":
            _put(base, e4m3(a), e4m3(b), e4m3(c), W, C, WP, REST, mask)
        else:
            a, b, c = narrow(a, kind, INTERPRETED), narrow(b, kind, INTERPRETED), narrow(c, kind, INTERPRETED)
            _put(base, a, b, c, W, C, WP, REST, mask)


@triton.jit
def _rope_write(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    k_pool,
    v_pool,
    k_scales,
    v_scales,
    slot,
    out,
    eps,
    qkv_token,
    angle_token,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    B: tl.constexpr,
    KV: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    kind = qkv.dtype.element_ty
    OF_Q: tl.constexpr = (H + HEADS - 1) // HEADS
    OF_KV: tl.constexpr = (K + HEADS - 1) // HEADS
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    h = tl.arange(0, HEADS)
    i = tl.arange(0, WP)
    token = qkv + t * qkv_token
    if part < OF_Q:
        heads = part * HEADS + h
        a, b, c = _pieces(token + heads * C, W, C, WP, REST, heads < H)
        if Q_NORM:
            a, b, c = _normed(a, b, c, q_norm, eps, kind, W, C, WP, REST, INTERPRETED)
        cos_W = tl.load(cos + t * angle_token + i, mask=i < W, other=0.0)[None, :]
        sin_W = tl.load(sin + t * angle_token + i, mask=i < W, other=0.0)[None, :]
        a, b = _rotated(a, b, cos_W, sin_W, kind, INTERPRETED)
        x, y, z = narrow(a, kind, INTERPRETED), narrow(b, kind, INTERPRETED), narrow(c, kind, INTERPRETED)
        _put(out + (t * H + heads) * C, x, y, z, W, C, WP, REST, heads < H)
    elif part < OF_Q + OF_KV:
        heads = (part - OF_Q) * HEADS + h
        a, b, c = _pieces(token + (H + heads) * C, W, C, WP, REST, heads < K)
        if K_NORM:
            a, b, c = _normed(a, b, c, k_norm, eps, kind, W, C, WP, REST, INTERPRETED)
        cos_W = tl.load(cos + t * angle_token + i, mask=i < W, other=0.0)[None, :]
        sin_W = tl.load(sin + t * angle_token + i, mask=i < W, other=0.0)[None, :]
        a, b = _rotated(a, b, cos_W, sin_W, kind, INTERPRETED)
        to = tl.load(slot + t)
        _write(k_pool, k_scales, to, heads, heads < K, a, b, c, kind, K, W, C, WP, REST, B, KV, INTERPRETED)
    else:
        heads = (part - OF_Q - OF_KV) * HEADS + h
        a, b, c = _pieces(token + (H + K + heads) * C, W, C, WP, REST, heads < K)
        to = tl.load(slot + t)
        _write(v_pool, v_scales, to, heads, heads < K, a, b, c, kind, K, W, C, WP, REST, B, KV, INTERPRETED)


def launch_of(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot: Tensor,
    eps: float,
    out: Tensor,
) -> Launch:
    """The kernel that puts queries into `out` and KV into the pools."""
    K, C = heads_of(k_pool, v_pool)
    T, W = cos.shape
    H = out.shape[1]
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(k_pool.dtype, "auto")
    B = ROUNDED_BLOCK if kind == "int8" else k_pool.shape[1]
    scales = (k_pool.view(torch.float32), v_pool.view(torch.float32)) if kind == "int8" else (k_pool, v_pool)
    if kind == "fp8":  # written as bits
        k_pool, v_pool = k_pool.view(torch.uint8), v_pool.view(torch.uint8)
    norms = (qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm)
    heads = max(1, min(triton.next_power_of_2(max(H, K)), ELEMENTS // triton.next_power_of_2(C)))
    return Launch(
        _rope_write,
        (T, triton.cdiv(H, heads) + 2 * triton.cdiv(K, heads)),
        (qkv, *norms, cos, sin, k_pool, v_pool, *scales, slot, out),
        (eps, qkv.stride(0), W),
        {
            "H": H,
            "K": K,
            "C": C,
            "W": W,
            "WP": triton.next_power_of_2(W),
            "REST": triton.next_power_of_2(max(1, C - 2 * W)),
            "HEADS": heads,
            "B": B,
            "KV": kind,
            "Q_NORM": q_norm is not None,
            "K_NORM": k_norm is not None,
            "INTERPRETED": environment.triton_interpreted(),
        },
        {"num_warps": WARPS, "enable_fp_fusion": False},
    )


def rope_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot: Tensor,
    eps: float,
) -> Tensor:
    """See `ROPE_WRITE.doc`."""
    K, C = heads_of(k_pool, v_pool)
    out = torch.empty((len(qkv), qkv.shape[1] // C - 2 * K, C), dtype=qkv.dtype, device=qkv.device)
    if not len(qkv):
        return out
    assert qkv.stride(1) == 1 and cos.dtype == sin.dtype == torch.float32 and slot.dtype == torch.int32
    assert k_pool.is_contiguous() and v_pool.is_contiguous()
    assert all(x is None or (x.is_contiguous() and x.dtype == qkv.dtype) for x in (q_norm, k_norm))
    angles = cos.contiguous(), sin.contiguous()
    launch_of(qkv, q_norm, k_norm, *angles, k_pool, v_pool, slot.contiguous(), eps, out)()
    return out
