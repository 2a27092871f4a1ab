# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# (Triton's functions take tensors and numbers for each other)
"""Choosing tokens: `philox.gumbel` step by step, so that tokens are the reference's.

Every float32 step must round as written: products are not fused into sums (`FLOATS`), and division is `div_rn`, because
`/` is an approximation on GPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = {"enable_fp_fusion": False}
"""Launch option of every kernel whose floats must have the reference's bits."""
PROGRAMS = 1024
"""About as many programs share a batch: several for each of 132 multiprocessors."""
MOST = 64
"""Most programs of a row; a power of two."""
BLOCK = 1024


def splits(R: int, V: int, block: int) -> tuple[int, int]:
    """(programs of a row, tokens of each): a function of shapes; results do not depend on it."""
    S = max(1, min(MOST, PROGRAMS // R, triton.cdiv(V, block)))
    length = triton.cdiv(triton.cdiv(V, S), block) * block
    return triton.cdiv(V, length), length


@triton.jit
def log32(x):
    bits = x.to(tl.int32, bitcast=True)
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = m < 0.70710678118654752
    e = ((bits >> 23) - 126 - small.to(tl.int32)).to(tl.float32)
    f = tl.where(small, m + m, m) - 1.0
    z = f * f
    y = 7.0376836292e-2 * f + -1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f + -1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f + -1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f + -2.4999993993e-1
    y = y * f + 3.3333331174e-1
    y = y * f * z
    y = y + e * -2.12194440e-4
    y = y - z * 0.5
    return (f + y) + e * 0.693359375


@triton.jit
def _gumbel(id, position, stream, k0, k1):
    """Noise of tokens; counters and keys are uint32."""
    c0, c1, c2 = id.to(tl.uint32), tl.zeros_like(id).to(tl.uint32) + position, tl.zeros_like(id).to(tl.uint32) + stream
    c3 = tl.zeros_like(c0)
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    k0, k1 = tl.zeros_like(c0) + k0, tl.zeros_like(c0) + k1
    step0, step1 = tl.full(c0.shape, 0x9E3779B9, tl.uint32), tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0, high1, low1 = tl.umulhi(c0, m0), c0 * m0, tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + step0, k1 + step1
    u = ((c0 >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -log32(-log32(u))


@triton.jit(do_not_specialize=["stream"])  # 1 would become a constant, which has no `to`
def _draw(
    logits,
    temperature,
    seed,
    position,
    last,
    value,
    token,
    V,
    stride,
    stream,
    length,
    TRUNCATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best (value, token) of a row's piece; of equal ones the first."""
    r, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = logits + r * stride
    T = tl.load(temperature + r)
    warm = T > 0
    T = tl.where(warm, T, 1.0)
    key = tl.load(seed + r)
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    at = tl.load(position + r).to(tl.uint32)
    if TRUNCATED:
        cut = tl.load(last + r)
        least = tl.where(cut < 0, -float("inf"), tl.load(row + tl.maximum(cut, 0)))
        cut = tl.where(cut < 0, V, cut)
    best, best_id = tl.full((), -float("inf"), tl.float32), tl.full((), 0, tl.int32)
    begin, end = s * length, tl.minimum((s + 1) * length, V)
    while begin < end:
        id = begin + tl.arange(0, BLOCK)
        x = tl.load(row + id, mask=id < V, other=-float("inf"))
        if TRUNCATED:
            x = tl.where((x > least) | ((x == least) & (id <= cut)), x, -float("inf"))
        x = tl.div_rn(x, tl.zeros_like(x) + T)
        most = tl.max(x, 0)
        # No noise is above 16.6356, so a block may be known to lose, as nearly all do of a truncated row.
        if (most > -float("inf")) & (tl.where(warm, most + 16.6356, most) >= best):
            if warm:
                x = x + _gumbel(id, at, stream.to(tl.uint32), k0, k1)
            most = tl.max(x, 0)
            if most > best:
                best = most
                best_id = tl.min(tl.where(x == most, id, V), 0)
        begin += BLOCK
    tl.store(value + r * tl.num_programs(1) + s, best)
    tl.store(token + r * tl.num_programs(1) + s, best_id)


@triton.jit(do_not_specialize=["S"])
def _pick(value, token, out, S, V, MOST: tl.constexpr):
    """The best of a row's pieces."""
    r, s = tl.program_id(0), tl.arange(0, MOST)
    v = tl.load(value + r * S + s, mask=s < S, other=-float("inf"))
    id = tl.load(token + r * S + s, mask=s < S, other=0)
    most = tl.max(v, 0)
    best = tl.min(tl.where(v == most, id, V), 0)
    tl.store(out + r, tl.where(most > -float("inf"), best, 0))


def gumbel_argmax(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int, last: Tensor | None = None
) -> Tensor:
    """See `GUMBEL_ARGMAX.doc`."""
    assert logits.dtype == temperature.dtype == torch.float32 and seed.dtype == torch.int64
    assert position.dtype == torch.int32 and (last is None or last.dtype == torch.int32)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    R, V = logits.shape
    out = torch.empty(R, dtype=torch.int32, device=logits.device)
    if not R:
        return out
    S, length = splits(R, V, BLOCK)
    value = torch.empty(R, S, dtype=torch.float32, device=logits.device)
    token = torch.empty(R, S, dtype=torch.int32, device=logits.device)
    _draw[R, S](
        logits,
        temperature.contiguous(),
        seed.contiguous(),
        position.contiguous(),
        token if last is None else last.contiguous(),
        value,
        token,
        V,
        logits.stride(0),
        stream,
        length,
        TRUNCATED=last is not None,
        BLOCK=BLOCK,
        num_warps=8,
        **FLOATS,
    )
    _pick[(R,)](value, token, out, S, V, MOST=MOST, num_warps=2)
    return out
