"""How products are cut into programs, and the sum of the parts where several programs share a row's channels.

All products here compute y^T = weight x^T: rows of the weight are the first side of `tl.dot`, so that a few tokens fill
its second side, which may be as small as 16 (a warp group of Hopper multiplies 64 x n), and decoded weights can stay in
registers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (it takes tl.constexpr for a class of values and kernels for plain functions)
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 64
"""Most tokens of the tiles for decoding, which wait for memory; above it arithmetic is the limit."""
PROGRAMS = 264
"""Programs that keep a card's memory busy: two to each of an H200's 132 multiprocessors."""
SHORTEST = 1024
"""Fewest channels of a part of a sum: below it the parts cost more than they bring."""
BAND = 8
"""Tiles of rows that run beside each other for all tokens before the next ones, so that L2 holds what they share."""
PIECE = 1024
"""Outputs that a program adds up from their parts."""


@dataclass(frozen=True)
class Tile:
    """What one program multiplies, and how."""

    rows: int
    """Of the weight."""
    tokens: int
    splits: int
    """Programs that share the channels of a sum, each with a run of as many."""
    warps: int
    stages: int
    """Loads in flight."""


def cut(T: int, N: int, K: int, step: int = 128, few: int = 64, many: int = 128) -> Tile:
    """The tile for T tokens and a weight [N, K] that is multiplied `step` channels at a time: it has `few` rows where
    there are few tokens, and at most `many` tokens where there are many.

    How channels are split follows from N and K alone, and only for few tokens: a row's bits depend on the number of
    tokens only through `T <= FEW`.
    """
    if T > FEW:
        rows = 128 if -(-N // 128) * -(-T // many) * 2 >= PROGRAMS else 64
        return Tile(rows, many, 1, rows // 16, 3)
    steps = -(-K // step)
    wanted = max(1, min(-(-PROGRAMS // -(-N // few)), K // SHORTEST))
    splits = next(n for n in range(wanted, 0, -1) if steps % n == 0)
    return Tile(few, max(16, 1 << (T - 1).bit_length()), splits, 4, 4)


@triton.jit
def place(row_tiles, token_tiles, BAND: tl.constexpr):
    """(tile of rows, tile of tokens) of a program: bands of rows, tokens slower than rows inside a band."""
    at = tl.program_id(0)
    band = at // (BAND * token_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    inside = at % (BAND * token_tiles)
    return band * BAND + inside % height, inside // height


@triton.jit
def multiply(a, b, NATIVE: tl.constexpr):
    """a b with exact products, added up as float32, or as int32 for integers. `NATIVE`: on a GPU; the interpreter takes
    bfloat16 for the integers that it is stored as."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, out_dtype=tl.int32)
    elif NATIVE:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def finish(total, y, parts, bias, n, t, T, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr):
    """Writes a tile [rows, tokens] of sums as y[t, n], or as a part of them in float32."""
    at = t.to(tl.int64)[None, :] * N + n[:, None]
    inside = (n < N)[:, None] & (t < T)[None, :]
    if SPLIT:
        tl.store(parts + tl.program_id(1).to(tl.int64) * T * N + at, total, mask=inside)
    else:
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _add(parts, bias, y, size, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, PIECE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    inside = at < size
    total = tl.zeros((PIECE,), tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts + at + part * size.to(tl.int64), mask=inside, other=0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


def parts_of(y: Tensor, splits: int) -> Tensor:
    """Memory for the parts of y's sums; y itself, unused, where there is one part."""
    return torch.empty((splits, *y.shape), dtype=torch.float32, device=y.device) if splits > 1 else y


def add_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y: the parts added, first to last, and the bias."""
    size = y.numel()
    _add[(triton.cdiv(size, PIECE),)](
        parts,
        y if bias is None else bias.contiguous(),
        y,
        size,
        y.shape[1],
        SPLITS=len(parts),
        HAS_BIAS=bias is not None,
        PIECE=PIECE,
    )
