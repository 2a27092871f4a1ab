"""Checkpoints whose weights are floats of 8 bits, with their scales beside them: read as what they stand for.

    a.weight            [N, K] float8_e4m3fn
    a.weight_scale_inv  what to multiply it by: one number, one a row, or one for each block of rows and channels
    a.activation_scale  for products of 8 bits, which are not made here: left out

So Ministral 3 and DeepSeek-V3 are published (`quant_method: fp8`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fnengine.errors import CheckpointError

SCALES = ("_scale_inv", "_scale")
"""What follows a weight's name in that of its scales."""
UNREAD = (".activation_scale", ".input_scale")
"""Ends of names of what belongs to products of 8 bits."""


class Held(Protocol):
    """A tensor of a checkpoint: `checkpoint.Stored`."""

    @property
    def path(self) -> Path: ...
    @property
    def handle(self) -> Any: ...
    @property
    def name(self) -> str: ...
    def tensor(self) -> Tensor: ...


@dataclass(frozen=True)
class Scaled:
    """A weight and its scales. Like a handle of safetensors, which knows tensors by name."""

    weight: Held
    scales: Held

    def get_tensor(self, _name: str) -> Tensor:
        """Decoded to float32."""
        return decoded(self.weight.tensor(), self.scales.tensor(), self.weight.name, str(self.weight.path))

    def get_slice(self, _name: str) -> Scaled:
        return self

    def get_shape(self) -> list[int]:
        return list(self.weight.handle.get_slice(self.weight.name).get_shape())

    def get_dtype(self) -> str:
        return "F32"


def pairs(files: Mapping[str, Held]) -> dict[str, tuple[Held, Held]]:
    """Name of each weight of 8 bits that has scales beside it -> both of them."""
    found = {}
    for end in SCALES:
        for name, scales in files.items():
            weight = files.get(name.removesuffix(end)) if name.endswith(end) else None
            if weight is not None and weight.handle.get_slice(weight.name).get_dtype() == "F8_E4M3":
                found[name.removesuffix(end)] = weight, scales
    return found


def unread(files: Mapping[str, Held], weights: Mapping[str, Any]) -> set[str]:
    """Names that a checkpoint has beside these weights and that nothing here reads: scales of what they multiply, and
    the weights' own, which are read with them."""
    own = {weight + end for weight in weights for end in SCALES}
    given = {weight.removesuffix(".weight") + end for weight in weights for end in UNREAD}
    return (own | given) & set(files)


def decoded(weight: Tensor, scales: Tensor, name: str = "a weight", where: str = "") -> Tensor:
    """The weight [..., N, K] in float32. Raises CheckpointError when the scales do not fit it.

    Blocks have sides of a power of two: 128 in every checkpoint so far.
    """
    if not scales.dtype.is_floating_point:
        raise CheckpointError(
            f"tensor {name}: its scales are {scales.dtype}, which is not understood",
            where=where,
            remedy="use the unquantized checkpoint",
        )
    wide, s = weight.float(), scales.float()
    if s.numel() == 1:
        return wide * s.reshape(())
    while s.dim() < wide.dim():
        s = s[..., None]
    for dim in (-2, -1):
        n, have = wide.shape[dim], s.shape[dim]
        if have in (1, n):
            continue
        side = 1
        while -(-n // side) > have:
            side *= 2
        if -(-n // side) != have:
            raise CheckpointError(
                f"tensor {name} has shape {list(weight.shape)}, and its scales {list(scales.shape)} are of no block",
                where=where,
                remedy="use the unquantized checkpoint",
            )
        s = s.repeat_interleave(side, dim).narrow(dim, 0, n)
    return wide * s


def said(folder: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """What a start says of a folder whose weights are such."""
    config = folder / "config.json"
    given = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if (given.get("quantization_config") or {}).get("quant_method") != "fp8":
        return ()
    name = str(dtype).removeprefix("torch.")
    return (f"weights are stored as floats of 8 bits and decoded to {name}; activations are not rounded",)
