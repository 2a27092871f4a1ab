"""Products with one weight an expert. The number of programs follows from shapes: each finds its expert and rows in the
offsets, and those that find none end."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (it takes tl.constexpr for a class of values and kernels for plain functions)
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnengine import environment
from fnengine.kernels.triton.tiles import multiply


@dataclass(frozen=True)
class Tile:
    """What one program multiplies, and how."""

    rows: int
    """Of the weight."""
    tokens: int
    channels: int
    """Multiplied at once."""
    warps: int
    stages: int
    """Loads in flight."""


def cut(T: int, E: int, N: int, wide: bool = False) -> Tile:
    """The tile for T tokens over E experts of N rows each, by the mean number of an expert's tokens; `wide` for
    float32, which is multiplied without matrix units."""
    mean = -(-T // max(E, 1))
    if wide:
        return Tile(64, 16 if mean <= 16 else 32, 32, 4, 2)
    if mean <= 64:
        return Tile(64, max(16, 1 << (mean - 1).bit_length()), 128, 4, 4)
    return Tile(128 if N > 64 else 64, 128, 64, 8 if N > 64 else 4, 3)


@triton.jit
def _product(
    x,
    offsets,
    weight,
    y,
    N,
    x_stride,
    K: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # The tiles of all experts, one after another, are numbered through; this program has number `at`.
    at = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    begins = tl.load(offsets + e, mask=e < E, other=0)
    ends = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = (ends - begins + TOKENS - 1) // TOKENS
    before = tl.cumsum(tiles, 0) - tiles
    mine = (at >= before) & (at < before + tiles)
    expert = tl.sum(tl.where(mine, e, 0), 0)
    begin = tl.sum(tl.where(mine, begins + (at - before) * TOKENS, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    if begin < end:
        n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        t = begin + tl.arange(0, TOKENS)
        channel = tl.arange(0, CHANNELS)
        weight_at = weight + expert.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + channel[None, :]
        x_at = x + t.to(tl.int64)[:, None] * x_stride + channel[None, :]
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        for k in range(0, K, CHANNELS):
            if K % CHANNELS == 0:
                w_NC = tl.load(weight_at + k, mask=(n < N)[:, None], other=0)
                x_TC = tl.load(x_at + k, mask=(t < end)[:, None], other=0)
            else:
                inside = (channel < K - k)[None, :]
                w_NC = tl.load(weight_at + k, mask=(n < N)[:, None] & inside, other=0)
                x_TC = tl.load(x_at + k, mask=(t < end)[:, None] & inside, other=0)
            total += multiply(w_NC, tl.trans(x_TC), NATIVE)
        inside = (n < N)[:, None] & (t < end)[None, :]
        tl.store(y + t.to(tl.int64)[None, :] * N + n[:, None], total.to(y.dtype.element_ty), mask=inside)


def grouped_linear(x_TK: Tensor, offsets_E1: Tensor, weight_ENK: Tensor) -> Tensor:
    """See `GROUPED_LINEAR.doc`."""
    (T, K), (E, N, _) = x_TK.shape, weight_ENK.shape
    assert weight_ENK.is_contiguous() and weight_ENK.shape[2] == K and x_TK.dtype == weight_ENK.dtype
    assert offsets_E1.dtype == torch.int32 and offsets_E1.shape == (E + 1,) and offsets_E1.is_contiguous()
    y = torch.empty((T, N), dtype=x_TK.dtype, device=x_TK.device)
    if not y.numel():
        return y
    x = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    tile = cut(T, E, N, x.dtype is torch.float32)
    most = T // tile.tokens + min(E, T)  # full tiles, and one that is not for every expert that has any
    _product[(most, triton.cdiv(N, tile.rows))](
        x,
        offsets_E1,
        weight_ENK,
        y,
        N,
        x.stride(0),
        K=K,
        E=E,
        EXPERTS=triton.next_power_of_2(E),
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        CHANNELS=tile.channels,
        NATIVE=not environment.triton_interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y
