"""Weights as leaves of several kinds, and the one `matmul(leaf, x)` that looks at the kind.

A leaf says how a weight is stored; layer code never asks. `packing` picks the kind that the device multiplies fastest,
and says why; `checkpoint` places each weight in it as soon as it is read.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine import kernels
from fnengine.kernels.linear import PANEL
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


@dataclass(frozen=True)
class Tiled:
    """The same product with the weight in tiles (`kernels/linear.py`), which a native kernel reads front to back."""

    weight: Tensor
    """[ceil(N / 32), ceil(K / a), 32, a]"""
    bias: Tensor | None
    """[N]"""
    shape: tuple[int, int] = static()
    """(N, K)"""


Leaf = Dense | Packed | Tiled
KINDS = (Dense, Packed, Tiled)

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
        case Tiled(tiles, bias, shape):
            return kernels.cpu.linear.fn(x_TK, tiles, bias, shape[0])
        case Packed(handle, bias, weight):
            return torch.ops.fnengine.packed_linear(x_TK, handle, bias, weight.shape[0])
        case Dense(weight, bias):
            T = x_TK.shape[0]
            if x_TK.device.type != "cpu" or (isinstance(T, int) and T >= DENSE_ROWS):
                return F.linear(x_TK, weight, bias)
            # While tracing, T is a symbol and must not be branched on: pad by max(16 - T, 0), whatever T will be.
            return F.linear(_pad_rows(x_TK, DENSE_ROWS), weight, bias)[:T]
    raise AssertionError(f"not a leaf: {type(leaf).__name__}")


def lookup(leaf: Leaf, index_T: Tensor) -> Tensor:
    """x_TK: rows of a leaf's weight.

    Raises:
        AssertionError: a packed weight, which has no rows to look up.
    """
    match leaf:
        case Dense(weight):
            return F.embedding(index_T, weight)
        case Tiled(tiles, _, (_, K)):
            row = index_T.long()
            return tiles[row // PANEL, :, row % PANEL].flatten(1)[:, :K]
    raise AssertionError("a packed weight cannot be looked up")


def weight_bytes(leaf: Leaf) -> int:
    """Bytes of a leaf. A packed weight is counted by its logical shape: oneDNN's padding is below one block a side."""
    return sum(t.numel() * t.dtype.itemsize for t in (leaf.weight, leaf.bias) if t is not None)


def pack_leaf(leaf: Dense) -> Packed:
    """The packed form of a dense leaf on CPU; rows of 32 are what the layout is tuned for, any number may follow."""
    if leaf.weight.is_meta:
        return Packed(torch.empty(1, dtype=torch.int64, device="meta"), leaf.bias, leaf.weight)
    weight = torch.ops.mkldnn._reorder_linear_weight(leaf.weight.contiguous(), 32)
    address = next(_ADDRESSES)
    _PACKED[address] = weight
    return Packed(torch.tensor([address]), leaf.bias, weight)


def tile_leaf(leaf: Dense, atom: int) -> Tiled:
    """The tiled form of a dense leaf on CPU, with this machine's atom; the library tiles, but for a tensor of no values
    it need not be there."""
    w = leaf.weight
    return Tiled(
        kernels.linear.tile(w, atom) if w.is_meta else kernels.cpu.tile(w), leaf.bias, (w.shape[0], w.shape[1])
    )


@dataclass(frozen=True)
class Packing:
    """How weights will be stored on a device, and why."""

    kind: str
    """`tiled`, `packed` or `dense`"""
    reason: str
    atom: int = 1
    """Channels in an atom of a tile."""

    @property
    def indexable(self) -> bool:
        """Whether a placed weight can still be looked up, so that a tied embedding need not be held twice."""
        return self.kind != "packed"

    def place(self, leaf: Dense) -> Leaf:
        """The leaf in its final form; the dense one may be freed afterwards. On the meta device only its shapes."""
        match self.kind:
            case "tiled":
                return tile_leaf(leaf, self.atom)
            case "packed":
                return pack_leaf(leaf)
        return leaf

    def elements(self, N: int, K: int) -> int:
        """How many elements a placed weight [N, K] holds."""
        return -(-N // PANEL) * PANEL * (-(-K // self.atom) * self.atom) if self.kind == "tiled" else N * K


LAYOUTS = ("tiled", "packed", "dense")
"""Kinds of layout on CPU, fastest first."""


Tiles = Callable[[torch.device, torch.dtype], Packing | str]
"""How weights are placed in tiles, or why they cannot be."""


def tiles(device: torch.device, dtype: torch.dtype) -> Packing | str:
    """By the native library, which is built for it."""
    name = str(dtype).removeprefix("torch.")
    return kernels.cpu.linear.supports(device, dtype) or Packing(
        "tiled", f"a native product in {name}", kernels.linear.atom_of(dtype)
    )


def expected_tiles(device: torch.device, dtype: torch.dtype) -> Packing | str:
    """What `tiles` will say once the library is built, without building it."""
    if why_not := kernels.cpu.unfit(device, dtype):
        return why_not
    native = kernels.native
    try:
        atom = native.expected_atom(native.find_compiler(), native.host_isa(), kernels.cpu.ELEMENT[dtype])
    except native.BuildFailed as e:
        return str(e)
    return Packing("tiled", "a native product, once it is built", atom)


def layouts(device: torch.device, dtype: torch.dtype, tiles: Tiles = tiles) -> dict[str, Packing | str]:
    """Each kind of layout -> how weights are placed in it on this device, or why that cannot be."""
    name = str(dtype).removeprefix("torch.")
    dense = Packing("dense", f"as in the checkpoint, in {name}")
    if device.type != "cpu":
        why_not = f"{device.type} multiplies dense weights"
        return {"tiled": why_not, "packed": why_not, "dense": dense}
    packed: Packing | str = "this torch was built without oneDNN (torch.backends.mkldnn)"
    if torch.backends.mkldnn.is_available():
        packed = Packing("packed", f"oneDNN packed linears in {name}")
        try:
            matmul(pack_leaf(Dense(torch.zeros(32, 32, dtype=dtype))), torch.zeros(4, 32, dtype=dtype))
        except (RuntimeError, AttributeError) as e:
            packed = f"oneDNN cannot pack {name} here: {e}"
    return {"tiled": tiles(device, dtype), "packed": packed, "dense": dense}


def packing(device: torch.device, dtype: torch.dtype, tiles: Tiles = tiles) -> Packing:
    """The layout whose product is fastest here, with what was passed over.

    Where the processor has matrix units (AMX), oneDNN uses them for bfloat16 and the native product does not.
    """
    found = layouts(device, dtype, tiles)
    if dtype is torch.bfloat16 and isinstance(found["packed"], Packing) and torch.cpu._is_amx_tile_supported():
        found["tiled"] = "oneDNN uses this processor's matrix units (AMX)"
    passed = [f"{kind}: {how}" for kind, how in found.items() if isinstance(how, str)]
    best = next(how for how in found.values() if isinstance(how, Packing))
    before = [reason for reason in passed if LAYOUTS.index(reason.split(":")[0]) < LAYOUTS.index(best.kind)]
    return replace(best, reason="; ".join([best.reason, *before]))


def place_ends(params: dict[str, Any], how: Packing) -> dict[str, Leaf | None]:
    """The final leaves of dense ends, `embed` and `head`; the head is None where the embedding itself serves.

    An embedding of its own stays dense because it is only looked up. One that is also the head (tied) is placed like
    any weight where it can still be looked up then; else it stays dense and a packed copy becomes the head.
    """
    embed, head = params["embed"], params["head"]
    if head is not None:
        return {"embed": embed, "head": how.place(head)}
    return {"embed": how.place(embed), "head": None} if how.indexable else {"embed": embed, "head": how.place(embed)}


def _pad_rows(x: Tensor, least: int) -> Tensor:
    missing: Any = torch.sym_max(least - x.shape[0], 0)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])])
