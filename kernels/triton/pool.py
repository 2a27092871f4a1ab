"""Copying blocks of the paged pool, all pairs of a pool in one launch."""

# pyright: reportArgumentType=false
# (it takes tl.constexpr for a class of values)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1024
"""Elements that a program copies."""


@triton.jit
def _copy(pool, pairs, elements, PIECE: tl.constexpr):
    source = tl.load(pairs + 2 * tl.program_id(0)).to(tl.int64)
    target = tl.load(pairs + 2 * tl.program_id(0) + 1).to(tl.int64)
    if source != target:  # padding is (0, 0)
        at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
        inside = at < elements
        tl.store(pool + target * elements + at, tl.load(pool + source * elements + at, mask=inside), mask=inside)


def copy_blocks(pools: list[Tensor], pairs_C2: Tensor) -> None:
    """See `COPY_BLOCKS.doc`. No target is another pair's source, so pairs may go in any order."""
    if not len(pairs_C2):
        return
    pairs = pairs_C2.contiguous()
    assert pairs.dtype == torch.int32, pairs.dtype
    for pool in pools:
        assert pool.is_contiguous()
        elements = pool.numel() // len(pool)
        _copy[len(pairs), triton.cdiv(elements, PIECE)](pool, pairs, elements, PIECE=PIECE)
