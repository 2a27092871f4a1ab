"""Products with weights in tiles: the layout, the contract, and the plain-torch reference.

A weight [N, K] is stored as [N / 32, K / a, 32, a] (N rounded up, the missing rows zero): 32 of its rows side by side,
an "atom" of `a` channels at a time, so that a product reads it front to back. `a` is 1, or 2 for bfloat16 where the
processor multiplies pairs of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine.kernels.contract import Contract

PANEL = 32
"""Rows of a weight that lie side by side."""


def tile(weight_NK: Tensor, atom: int) -> Tensor:
    """[ceil(N / 32), ceil(K / a), 32, a]: the weight in tiles, zeros where it has no element."""
    N, K = weight_NK.shape
    padded = F.pad(weight_NK, (0, -K % atom, 0, -N % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // atom, atom).permute(0, 2, 1, 3).contiguous()


def untile(tiles: Tensor, n: int, k: int) -> Tensor:
    """The weight [n, k] that `tile` was given."""
    P, K, _, atom = tiles.shape
    return tiles.permute(0, 2, 1, 3).reshape(P * PANEL, K * atom)[:n, :k]


def linear(x_TK: Tensor, tiles: Tensor, bias_N: Tensor | None, n: int, wide: bool = False) -> Tensor:
    """See `LINEAR.doc`."""
    weight = untile(tiles, n, x_TK.shape[1])
    if wide:
        return F.linear(x_TK.float(), weight.float(), None if bias_N is None else bias_N.float())
    return F.linear(x_TK, weight, bias_N)


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for T, N, K, bias, wide in (
        (1, 1, 1, True, False),
        (3, 33, 7, False, True),
        (5, 32, 64, True, False),
        (13, 70, 96, True, True),
        (14, 70, 96, True, False),
        (0, 40, 8, False, True),
    ):
        fused = torch.randn(T, K + 3, generator=g).to(dtype)
        weight = torch.randn(N, K, generator=g).to(dtype) / K**0.5
        yield {
            "x_TK": fused[:, :K],  # rows are strided
            "tiles": tile(weight, atom_of(dtype)),
            "bias_N": torch.randn(N, generator=g).to(dtype) if bias else None,
            "n": N,
            "wide": wide,
        }


def atom_of(dtype: torch.dtype) -> int:
    """Channels in an atom of this dtype on this machine."""
    from fnengine.kernels import native

    library = native.load(str(dtype).removeprefix("torch.")).library
    return 1 if library is None else library.fn_atom()


LINEAR = Contract(
    name="linear",
    doc="""(x_TK, tiles [ceil(n / 32), ceil(K / a), 32, a], bias_N or None, n int, wide) -> y_Tn = x weight^T + bias.

    `tiles` is the weight [n, K] as `linear.tile` lays it out, with the `a` that the machine's kernel wants
    (`linear.atom_of`). Sums are float32, rounded once, or with `wide` left as they are.""",
    reference=linear,
    mutates=(),
    examples=_examples,
)
