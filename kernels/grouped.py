"""Products with one weight an expert, over tokens that lie sorted by expert: the contract and the plain-torch
reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract


def grouped_linear(x_TK: Tensor, offsets_E1: Tensor, weight_ENK: Tensor) -> Tensor:
    """See `GROUPED_LINEAR.doc`."""
    bounds = pairwise(offsets_E1.tolist())
    parts = [x_TK[a:b].float() @ w.float().T for (a, b), w in zip(bounds, weight_ENK, strict=True)]
    return torch.cat(parts).to(x_TK.dtype)


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for counts, N, K in (
        ((1,), 1, 1),
        ((0, 3, 0, 0, 2, 0), 33, 40),  # empty experts, the first and the last among them; more experts than tokens
        ((5, 0, 1, 40), 70, 136),
        ((0, 0, 0), 16, 8),
        ((17, 16), 64, 64),
    ):
        T, E = sum(counts), len(counts)
        fused = torch.randn(T, K + 3, generator=g).to(dtype)
        yield {
            "x_TK": fused[:, :K],  # rows are strided
            "offsets_E1": torch.tensor([0, *counts]).cumsum(0).int(),
            "weight_ENK": (torch.randn(E, N, K, generator=g) / K**0.5).to(dtype),
        }


GROUPED_LINEAR = Contract(
    name="grouped_linear",
    doc="""(x_TK, offsets_E1 int32, weight_ENK) -> y_TN: row t is x_t weight_e^T, offsets[e] <= t < offsets[e + 1].

    Offsets do not fall, from 0 to T: every row has an expert, and experts may have none. They lie on the device, and
    nothing may wait for them. Sums are float32, rounded once.""",
    reference=grouped_linear,
    mutates=(),
    examples=_examples,
)
