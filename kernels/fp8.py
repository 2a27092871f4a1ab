"""Products of rows and weights rounded to 8-bit floats (e4m3): the layout, the contract, and the plain-torch reference.

A weight [N, K] is a tensor of codes, the bits of float8_e4m3fn as uint8 [N, K] with both rounded up to multiples of 16
and zeros beyond, and one float32 scale a row. (Few operators take the dtype itself; a view is free.) A row of x is
rounded against its largest value at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine.kernels.contract import Contract

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of e4m3."""
LEAST = 2.0**-100
"""Rows whose largest value is smaller are rounded as if it were this."""
MULTIPLE = 16
"""N and K are rounded up to this: matrix units take rows of 16 bytes."""


def shapes(N: int, K: int) -> tuple[tuple[int, int], tuple[int]]:
    """Shapes of the codes and the scales of a weight [N, K]."""
    rows = -(-N // MULTIPLE) * MULTIPLE
    return (rows, -(-K // MULTIPLE) * MULTIPLE), (rows,)


def round_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [T, K up to 16], float32 [T]): rows divided by 1/448 of their largest value, and that divisor."""
    x = x_TK.float()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    largest = largest.clamp(min=LEAST)
    factor = torch.full_like(largest, LARGEST) / largest  # a number over a tensor is not rounded correctly
    codes = (x * factor[:, None]).to(FP8)
    return F.pad(codes.view(torch.uint8), (0, -x.shape[1] % MULTIPLE)), largest / LARGEST


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight, on its device."""
    return round_rows(F.pad(weight_NK, (0, 0, 0, -weight_NK.shape[0] % MULTIPLE)))


def dequantize(codes: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
    """The weight [n, k] in float32 that codes and scales stand for."""
    return codes[:n, :k].view(FP8).float() * scales[:n, None]


def fp8_linear(
    x_TK: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, n: int, wide: bool = False
) -> Tensor:
    """See `FP8_LINEAR.doc`."""
    x, factor_T = round_rows(x_TK)
    y = F.linear(x.view(FP8).float(), codes[:n].view(FP8).float()) * factor_T[:, None] * scales[:n]
    y = y if bias_N is None else y + bias_N.float()
    return y if wide else y.to(x_TK.dtype)


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for T, N, K, bias, wide in (
        (1, 1, 1, True, False),
        (3, 33, 37, False, True),
        (5, 32, 264, True, False),
        (13, 70, 300, True, True),
        (30, 70, 129, False, False),
        (0, 40, 8, False, True),
    ):
        fused = torch.randn(T, K + 3, generator=g).to(dtype)
        codes, scales = quantize(torch.randn(N, K, generator=g) / K**0.5)
        yield {
            "x_TK": fused[:, :K],  # rows are strided
            "codes": codes,
            "scales": scales,
            "bias_N": torch.randn(N, generator=g).to(dtype) if bias else None,
            "n": N,
            "wide": wide,
        }


FP8_LINEAR = Contract(
    name="fp8_linear",
    doc="""(x_TK, codes uint8 [N, K up to 16], scales float32 [N up to 16], bias_N or None, n int, wide) -> y_Tn
    = x weight^T + bias.

    Codes, as e4m3, times their row's scale are the weight [n, K] (`fp8.quantize`). Rows of x are rounded to e4m3 with
    one float32 factor each (`fp8.round_rows`). Sums are float32, rounded once, or with `wide` left as float32; a
    backend whose matrix product gives only bfloat16 may widen that.""",
    reference=fp8_linear,
    mutates=(),
    examples=_examples,
    tolerance={torch.float32: (1e-3, 1e-3), torch.bfloat16: (2e-2, 2e-2), torch.float16: (5e-3, 5e-3)},
)
