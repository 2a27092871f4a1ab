"""Products with weights of 8 or 4 bits: the layout, the contract, and the plain-torch reference.

A weight [N, K] is a tensor of codes and one of scales. Both lie in panels of 32 rows, as `linear.py` has them, with
N and K rounded up to multiples of 32 and 8; a code is decoded and multiplied by the scale of its row and group of
channels.

- 8 bits: uint8 [N / 32, K / 8, 2, 32, 4], the integer + 128, in groups of 128 channels.
- 4 bits: uint8 [N / 32, K / 8, 32, 4], in groups of 32. Channel 8k + 2j + p is in byte 2p + j / 2, in the lower half
  for an even j; what it stands for is in `CODES`, which lie closer together where weights are many.

Scales are bfloat16 [N / 32, groups, 32]: 8.125 and 4.5 bits a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine.kernels.contract import Contract
from fnengine.kernels.linear import PANEL, tile, untile

DEEP = 8
"""K is rounded up to this."""
GROUP = {8: 128, 4: 32}
"""bits -> channels that share a scale."""
CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What codes of 4 bits stand for. Source: IQ4_NL of llama.cpp."""
TRIED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Scales tried for a group of 4 bits: its largest value becomes this much of the first code. The least squared error
wins."""


def bits_of(codes: Tensor) -> int:
    """8 or 4, which the shape of codes says."""
    return 8 if codes.dim() == 5 else 4


def shapes(N: int, K: int, bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales of a weight [N, K]."""
    panels, deep = -(-N // PANEL), -(-K // DEEP)
    codes = (panels, deep, 2, PANEL, 4) if bits == 8 else (panels, deep, PANEL, 4)
    return codes, (panels, -(-K // GROUP[bits]), PANEL)


def quantize(weight_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight, the same to the last bit as the native library makes them."""
    N, K = weight_NK.shape
    G = GROUP[bits]
    groups = -(-K // G)
    grouped = F.pad(weight_NK.float(), (0, -K % G, 0, -N % PANEL)).view(-1, groups, G)
    there = (torch.arange(groups * G) < K).view(groups, G)
    index = grouped.abs().argmax(2, keepdim=True)
    largest = grouped.gather(2, index)[..., 0]
    if bits == 8:
        up = (largest.abs() / 127).view(torch.int32) + 0xFFFF & -0x10000
        scale = up.view(torch.float32)
    else:
        scale, least = torch.zeros_like(largest), torch.full_like(largest, 3e38)
        for tried in TRIED:
            s = (largest / torch.tensor(tried * CODES[0], dtype=torch.float32)).bfloat16().float()
            squares = (_values(_nearest(grouped, s)) * s[..., None] - grouped) ** 2 * there
            error = torch.zeros_like(s)
            for k in range(G):  # in this order, as the native library adds them
                error = error + squares[..., k]
            scale, least = torch.where(error < least, s, scale), torch.where(error < least, error, least)
    code = (grouped * _inverse(scale)[..., None]).round() if bits == 8 else _nearest(grouped, scale)
    code = (code * there).flatten(1)[:, : K + -K % DEEP]
    scales = scale.bfloat16().view(-1, PANEL, groups).transpose(1, 2).contiguous()
    if bits == 8:
        biased = torch.where(there.flatten()[: code.shape[1]], code + 128, 0)  # beyond K nothing is added
        return tile(biased.to(torch.uint8), 4).view(shapes(N, K, 8)[0]), scales
    nibbles = code.to(torch.uint8).view(-1, PANEL, code.shape[1] // DEEP, 2, 2, 2)  # panel, row, k, j / 2, j % 2, p
    packed = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    return packed.permute(0, 2, 1, 4, 3).reshape(shapes(N, K, 4)[0]).contiguous(), scales


def dequantize(codes: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
    """The weight [n, k] in float32 that codes and scales stand for."""
    if bits_of(codes) == 8:
        value = untile(codes.flatten(1, 2), n, k).float() - 128
    else:
        value = _values(_nibbles(codes.transpose(1, 2)).flatten(2).flatten(0, 1)[:n, :k].long())
    scale = scales.transpose(1, 2).flatten(0, 1)[:n].float()
    return value * scale.repeat_interleave(GROUP[bits_of(codes)], 1)[:, :k]


def lookup(codes: Tensor, scales: Tensor, row_T: Tensor, k: int) -> Tensor:
    """[T, k] float32: rows of the weight."""
    panel, lane = row_T // PANEL, row_T % PANEL
    if bits_of(codes) == 8:
        value = codes[panel, :, :, lane].flatten(1).float() - 128
    else:
        value = _values(_nibbles(codes[panel, :, lane]).flatten(1).long())
    scale = scales[panel, :, lane].float().repeat_interleave(GROUP[bits_of(codes)], 1)
    return value[:, :k] * scale[:, :k]


def round_rows(x_TK: Tensor, bits: int, group: int) -> Tensor:
    """float32: each group of channels of a row rounded to integers of so many bits against its largest value."""
    T, K = x_TK.shape
    most = 2 ** (bits - 1) - 1
    grouped = F.pad(x_TK.float(), (0, -K % group)).view(T, -(-K // group), group)
    largest = grouped.abs().amax(2, keepdim=True).clamp(min=2.0**-100)
    return ((grouped * (most / largest)).round() * (largest / most)).flatten(1)[:, :K]


def quantized_linear(
    x_TK: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias_N: Tensor | None,
    n: int,
    dynamic: bool = False,
    wide: bool = False,
) -> Tensor:
    """See `QUANTIZED_LINEAR.doc`."""
    weight = dequantize(codes, scales, n, x_TK.shape[1])
    x = round_rows(x_TK, 8, GROUP[bits_of(codes)]) if dynamic else x_TK.float()
    y = F.linear(x, weight, None if bias_N is None else bias_N.float())
    return y if wide else y.to(x_TK.dtype)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, 1 / scale, 0.0)


def _nearest(grouped: Tensor, scale: Tensor) -> Tensor:
    codes = torch.tensor(CODES, dtype=torch.float32)
    return torch.bucketize(grouped * _inverse(scale)[..., None], (codes[1:] + codes[:-1]) * 0.5)


def _values(index: Tensor) -> Tensor:
    return torch.tensor(CODES, dtype=torch.float32, device=index.device)[index]


def _nibbles(codes: Tensor) -> Tensor:
    """[..., 4] bytes -> [..., 8] codes in the order of channels."""
    both = torch.stack([codes & 15, codes >> 4], -1)  # byte 2p + j / 2, j % 2
    return both.unflatten(-2, (2, 2)).movedim(-3, -1).flatten(-3)


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for T, N, K, bias, bits, dynamic, wide in (
        (1, 1, 1, True, 8, False, False),
        (1, 1, 1, True, 8, True, True),
        (1, 3, 9, True, 4, False, True),
        (1, 3, 9, True, 4, True, False),
        (3, 33, 37, False, 4, False, False),
        (2, 33, 37, False, 8, True, True),
        (5, 32, 264, True, 8, False, True),
        (8, 32, 264, True, 8, True, False),
        (13, 70, 300, True, 4, False, False),
        (13, 70, 300, True, 4, True, True),
        (30, 70, 129, False, 8, False, True),
        (30, 70, 129, False, 8, True, False),
        (0, 40, 8, False, 8, True, False),
        (0, 40, 8, True, 4, False, True),
    ):
        fused = torch.randn(T, K + 3, generator=g).to(dtype)
        codes, scales = quantize(torch.randn(N, K, generator=g) / K**0.5, bits)
        yield {
            "x_TK": fused[:, :K],  # rows are strided
            "codes": codes,
            "scales": scales,
            "bias_N": torch.randn(N, generator=g).to(dtype) if bias else None,
            "n": N,
            "dynamic": dynamic,
            "wide": wide,
        }


QUANTIZED_LINEAR = Contract(
    name="quantized_linear",
    doc="""(x_TK, codes, scales, bias_N or None, n int, dynamic, wide) -> y_Tn = x weight^T + bias.

    Codes and scales stand for the weight [n, K] as `quantized.quantize` lays it out. A backend may round each group of
    a row of x to 16 bits against its largest value; with `dynamic` each is rounded to 8 bits (`round_rows`). Sums are
    exact or float32, rounded once, or with `wide` left as float32.""",
    reference=quantized_linear,
    mutates=(),
    examples=_examples,
    tolerance={torch.float32: (2e-4, 2e-4), torch.bfloat16: (2e-2, 2e-2), torch.float16: (5e-3, 5e-3)},
)
