"""Writing to the paged KV pool: contracts and plain-torch references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract


def kv_write(k_TKC: Tensor, v_TKC: Tensor, k_pool: Tensor, v_pool: Tensor, slot_T: Tensor) -> None:
    """See `KV_WRITE.doc`."""
    slot = slot_T.long()
    k_pool.view(-1, *k_pool.shape[2:]).index_copy_(0, slot, k_TKC.to(k_pool.dtype))
    v_pool.view(-1, *v_pool.shape[2:]).index_copy_(0, slot, v_TKC.to(v_pool.dtype))


def copy_blocks(pools: list[Tensor], pairs_C2: Tensor) -> None:
    """See `COPY_BLOCKS.doc`."""
    source, target = pairs_C2.long().unbind(1)
    for pool in pools:
        pool.index_copy_(0, target, pool.index_select(0, source))


def _examples_write(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for T, N, B, K, C in ((1, 2, 16, 1, 1), (5, 3, 16, 2, 20), (33, 7, 16, 3, 64), (0, 2, 16, 1, 8)):
        pool = torch.randn(2, N, B, K, C, generator=g).to(dtype)
        qkv = torch.randn(T, 3, K, C, generator=g).to(dtype)
        yield {
            "k_TKC": qkv[:, 1],  # a slice of a fused projection: tokens are strided
            "v_TKC": qkv[:, 2],
            "k_pool": pool[0].clone(),
            "v_pool": pool[1].clone(),
            "slot_T": torch.randperm(N * B, generator=g)[:T].int(),
        }


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

KV_WRITE = Contract(
    name="kv_write",
    doc="""(k_TKC, v_TKC, k_pool [N, B, K, C], v_pool [N, B, K, C], slot_T int32) -> None; writes both pools.

    Token t goes to block slot[t] // B at offset slot[t] % B. Padding slots (of the null block) may repeat; any of
    their values may stay.""",
    reference=kv_write,
    mutates=("k_pool", "v_pool"),
    examples=_examples_write,
    tolerance=EXACT,
)

COPY_BLOCKS = Contract(
    name="copy_blocks",
    doc="""(pools: list of [N, B, K, C], pairs_C2 int32 of (source, target)) -> None; writes every pool.

    A target occurs once and is no pair's source, except in the padding (0, 0).""",
    reference=copy_blocks,
    mutates=("pools",),
    examples=_examples_copy,
    tolerance=EXACT,
)
