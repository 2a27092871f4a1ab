"""The contracts' own references as a backend: plain torch, on any device, where nothing better is found."""

from __future__ import annotations

import torch

from fnengine.kernels.attention import PAGED_ATTENTION
from fnengine.kernels.contract import Backend, Contract
from fnengine.kernels.fp8 import FP8_LINEAR
from fnengine.kernels.grouped import GROUPED_LINEAR, GROUPED_TILES
from fnengine.kernels.library import register
from fnengine.kernels.linear import LINEAR
from fnengine.kernels.noise import GUMBEL_ARGMAX
from fnengine.kernels.penalties import PENALIZE
from fnengine.kernels.pool import COPY_BLOCKS
from fnengine.kernels.quantized import QUANTIZED_LINEAR
from fnengine.kernels.recurrence import CAUSAL_CONV, GATED_SCAN
from fnengine.kernels.rope import ROPE_WRITE
from fnengine.kernels.routing import ARRANGE_EXPERTS, TOP_EXPERTS
from fnengine.kernels.truncation import APPLY_MASK, TRUNCATE
from fnengine.kernels.whole import WHOLE_ATTENTION


def _supports(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _backend(op: Contract, invariant: bool, capturable: bool = True) -> Backend:
    fn = register(op.name, "reference", op.reference)
    return Backend("reference", op, fn, _supports, invariant, capturable=capturable)


paged_attention = _backend(PAGED_ATTENTION, invariant=False, capturable=False)
"""It reads where rows start and end on the host, so a graph cannot hold it. Not invariant: torch's matmul picks its
order of summation by shape, hence by chunk and by neighbours."""
whole_attention = _backend(WHOLE_ATTENTION, invariant=True, capturable=False)
"""It looks at one text at a time, whose place it reads on the host."""
rope_write = _backend(ROPE_WRITE, invariant=False)
copy_blocks = _backend(COPY_BLOCKS, invariant=True)
linear = _backend(LINEAR, invariant=False)
"""Not invariant, for the same reason."""
quantized_linear = _backend(QUANTIZED_LINEAR, invariant=False)
"""Not invariant, for the same reason; and it decodes the whole weight at every call."""
fp8_linear = _backend(FP8_LINEAR, invariant=False)
"""Not invariant, for the same reason; and it widens the whole weight at every call."""
grouped_linear = _backend(GROUPED_LINEAR, invariant=False, capturable=False)
"""Not invariant, for the same reason, but for few rows on CPU, which it pads; and it waits for the offsets."""
grouped_tiles = _backend(GROUPED_TILES, invariant=False, capturable=False)
"""As `grouped_linear`."""
top_experts = _backend(TOP_EXPERTS, invariant=True)
arrange_experts = _backend(ARRANGE_EXPERTS, invariant=True)
gumbel_argmax = _backend(GUMBEL_ARGMAX, invariant=True)
truncate = _backend(TRUNCATE, invariant=True)
apply_mask = _backend(APPLY_MASK, invariant=True)
penalize = _backend(PENALIZE, invariant=True)
causal_conv = _backend(CAUSAL_CONV, invariant=True)
gated_scan = _backend(GATED_SCAN, invariant=False, capturable=False)
"""It goes from token to token in Python, which is slow, and reads on the host where rows start. Not invariant: torch
chooses how it multiplies by shape."""
