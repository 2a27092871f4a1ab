"""Memory for what a step streams through: weights and the KV pool.

Linux backs it with pages of 2 MiB where it may (transparent huge pages, `madvise` or `always`): one core then reads
half as fast again, because hardware prefetch ends at the border of a page (docs/performance.md).
"""

from __future__ import annotations

import math
import mmap
import sys

import numpy as np
import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes of a huge page."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on CPU, in fresh memory that costs neither time nor space before it is written.

    Begins at a multiple of `HUGE` where it is that large, else of a page.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + (HUGE if size >= HUGE else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE if size >= HUGE else 0
    if size >= HUGE and sys.platform == "linux":
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE * HUGE)
    return torch.from_numpy(whole[start : start + size]).view(dtype).view(shape)
