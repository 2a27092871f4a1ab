"""Copying blocks of the paged KV pool: contract and plain-torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract


def copy_blocks(pools: list[Tensor], pairs_C2: Tensor) -> None:
    """See `COPY_BLOCKS.doc`."""
    source, target = pairs_C2.long().unbind(1)
    for pool in pools:
        pool.index_copy_(0, target, pool.index_select(0, source))


def _examples_copy(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for L, N, K, C, pairs in (
        (1, 2, 1, 8, []),
        (2, 4, 2, 20, [(1, 2), (0, 0)]),
        (3, 9, 3, 64, [(1, 5), (1, 6), (2, 7), (0, 0), (0, 0)]),
    ):
        yield {
            "pools": [torch.randn(N, 16, K, C, generator=g).to(dtype) for _ in range(L)],
            "pairs_C2": torch.tensor(pairs, dtype=torch.int32).view(-1, 2),
        }


EXACT = {torch.float32: (0.0, 0.0), torch.bfloat16: (0.0, 0.0), torch.float16: (0.0, 0.0)}

COPY_BLOCKS = Contract(
    name="copy_blocks",
    doc="""(pools: list of [N, ...], pairs_C2 int32 of (source, target)) -> None; writes every pool.

    A target occurs once and is no pair's source, except in the padding (0, 0).""",
    reference=copy_blocks,
    mutates=("pools",),
    examples=_examples_copy,
    tolerance=EXACT,
)
