"""Weights as leaves of several kinds, and the one `matmul(leaf, x)` that looks at the kind.

A leaf says how a weight is stored; layer code never asks. `pack` turns a tree of dense leaves into the kind that the
device multiplies fastest, and says why.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine.tree import static

DENSE_ROWS = 16
"""Fewest rows of a dense product on CPU. MKL and the small-matrix paths below 12 rows take the last `M mod 4` rows
through another kernel, whose sums round differently (fp32: rows change bits for M = 1, 2, 3, 5, 6, 7, 9, 10, 11 and for
no other M up to 777; torch 2.13, AVX-512). Padding with zero rows keeps a row's bits independent of its neighbours."""

PACKED_ROWS = 2
"""Fewest rows of a packed product: oneDNN gives a row the same bits for every M >= 2, but not for M = 1."""


@dataclass(frozen=True)
class Dense:
    """y = x weight^T + bias, as stored in the checkpoint."""

    weight: Tensor
    """[N, K]"""
    bias: Tensor | None = None
    """[N]"""


@dataclass(frozen=True)
class Packed:
    """The same product with the weight in oneDNN's blocked layout, which is opaque: it can be multiplied, not indexed.

    An opaque tensor cannot stand in a traced graph, so what a graph sees is `handle`, the address under which the op
    `fnengine::packed_linear` finds the weight; the leaf keeps the weight alive.
    """

    handle: Tensor
    """[1] int64"""
    bias: Tensor | None
    """[N]"""
    weight: Tensor = static()
    """[N, K] as an mkldnn tensor"""


Leaf = Dense | Packed

_ADDRESSES = itertools.count()
_PACKED: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""Address -> packed weight, for as long as some leaf holds the weight. Addresses are never reused."""

_library = torch.library.Library("fnengine", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor handle, Tensor? bias, int n) -> Tensor")


def _packed_linear(x_TK: Tensor, handle: Tensor, bias: Tensor | None, n: int) -> Tensor:
    T = x_TK.shape[0]
    if T < PACKED_ROWS:
        return _packed_linear(_pad_rows(x_TK, PACKED_ROWS), handle, bias, n)[:T].clone()
    return torch.ops.mkldnn._linear_pointwise(x_TK, _PACKED[int(handle)], bias, "none", [], "")


_library.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake(
    "fnengine::packed_linear", lambda x, handle, bias, n: x.new_empty(*x.shape[:-1], n), lib=_library
)


def matmul(leaf: Leaf, x_TK: Tensor) -> Tensor:
    """y_TN = x_TK weight^T + bias, where a row of y depends on that row of x alone, bit for bit (on CPU)."""
    match leaf:
        case Packed(handle, bias, weight):
            return torch.ops.fnengine.packed_linear(x_TK, handle, bias, weight.shape[0])
        case Dense(weight, bias):
            T = x_TK.shape[0]
            if x_TK.device.type != "cpu" or (isinstance(T, int) and T >= DENSE_ROWS):
                return F.linear(x_TK, weight, bias)
            # While tracing, T is a symbol and must not be branched on: pad by max(16 - T, 0), whatever T will be.
            return F.linear(_pad_rows(x_TK, DENSE_ROWS), weight, bias)[:T]
    raise AssertionError(f"not a leaf: {type(leaf).__name__}")


def weight_bytes(leaf: Leaf) -> int:
    """Bytes of a leaf. A packed weight is counted by its logical shape: oneDNN's padding is below one block a side."""
    return sum(t.numel() * t.dtype.itemsize for t in (leaf.weight, leaf.bias) if t is not None)


def pack_leaf(leaf: Dense) -> Packed:
    """The packed form of a dense leaf on CPU; rows of 32 are what the layout is tuned for, any number may follow."""
    weight = torch.ops.mkldnn._reorder_linear_weight(leaf.weight.contiguous(), 32)
    address = next(_ADDRESSES)
    _PACKED[address] = weight
    return Packed(torch.tensor([address]), leaf.bias, weight)


@dataclass(frozen=True)
class Packing:
    """How weights will be stored on a device, and why."""

    kind: str
    """`packed` or `dense`"""
    reason: str

    @property
    def packed(self) -> bool:
        return self.kind == "packed"

    def place(self, leaf: Dense) -> Leaf:
        """The leaf in its final form; the dense one may be freed afterwards."""
        return pack_leaf(leaf) if self.packed else leaf


def packing(device: torch.device, dtype: torch.dtype) -> Packing:
    """Whether oneDNN's packed layout serves this device and dtype, found by packing a small weight."""
    if device.type != "cpu":
        return Packing("dense", f"{device.type} multiplies dense weights")
    if not torch.backends.mkldnn.is_available():
        return Packing("dense", "this torch was built without oneDNN (torch.backends.mkldnn is not available)")
    try:
        probe = pack_leaf(Dense(torch.zeros(32, 32, dtype=dtype)))
        matmul(probe, torch.zeros(4, 32, dtype=dtype))
    except (RuntimeError, AttributeError) as e:
        return Packing("dense", f"oneDNN cannot pack {str(dtype).removeprefix('torch.')} here: {e}")
    return Packing("packed", f"oneDNN packed linears in {str(dtype).removeprefix('torch.')}")


def pack(params: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], str]:
    """(params with every multiplied weight in the device's best form, the reason).

    The embedding stays dense because it is indexed; when it is also the head (tied), a packed copy becomes the head.
    Dense weights are freed as soon as the caller lets the old tree go; `checkpoint.load` places leaf by leaf instead,
    so that both forms never exist at once.
    """
    how = packing(device, params["embed"].weight.dtype)

    def place(key: str, child: Any) -> Any:
        return how.place(child) if isinstance(child, Dense) else child

    layers = tuple({k: place(k, v) for k, v in p.items()} for p in params["layers"])
    return {**params, "layers": layers, "head": place_head(params, how.place if how.packed else None)}, how.reason


def place_head(params: dict[str, Any], place: Callable[[Dense], Leaf] | None) -> Leaf | None:
    """The head's final leaf: its own, or a packed copy of a tied embedding; None when the embedding itself serves."""
    head = params["head"]
    if place is None or isinstance(head, Packed):
        return head
    return place(params["embed"] if head is None else head)


def _pad_rows(x: Tensor, least: int) -> Tensor:
    missing: Any = torch.sym_max(least - x.shape[0], 0)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])])
