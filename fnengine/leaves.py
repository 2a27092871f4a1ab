"""Weights as leaves of several kinds, and the one `matmul(leaf, x)` that looks at the kind.

A leaf says how a weight is stored; layer code never asks. `packing` picks a kind by a fixed order and says why;
`products` puts what was measured on this machine, shape by shape, in its place; `checkpoint` places each weight in it
as soon as it is read.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine import kernels
from fnengine.errors import ConfigError
from fnengine.kernels import fp8, quantized
from fnengine.kernels.linear import PANEL
from fnengine.tree import static

DENSE_DEPTH = 256
"""Channels that torch's product of float32 on CPU is given at once. On an Intel processor MKL sums more of them in an
order that depends on the number of rows (4 rows against 130 of 1,024 channels, seen 2026-11-30 on a Xeon of family 6,
model 207, torch 2.13; not for 256 channels at 1 to 300 rows of eight shapes). It takes up to twice as long at few
rows; where there is a compiler, the native product is used instead."""

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


@dataclass(frozen=True)
class Quantized:
    """The same product with a weight of 8 or 4 bits (`kernels/quantized.py`), rounded when it was placed."""

    codes: Tensor
    """uint8 [ceil(N / 32), ceil(K / 8), 2, 32, 4] for 8 bits or [ceil(N / 32), ceil(K / 8), 32, 4] for 4"""
    scales: Tensor
    """[ceil(N / 32), groups of channels, 32] bfloat16"""
    bias: Tensor | None
    """[N]"""
    shape: tuple[int, int] = static()
    """(N, K)"""
    dtype: torch.dtype = static()
    """Of rows that are looked up: the model's."""
    dynamic: bool = static()
    """Rows of x are rounded to 8 bits, too."""


@dataclass(frozen=True)
class Fp8:
    """The same product with a weight of 8-bit floats (`kernels/fp8.py`), by which rows rounded alike are multiplied."""

    codes: Tensor
    """uint8 [N, K], both up to multiples of 16: the bits of float8_e4m3fn"""
    scales: Tensor
    """[N up to 16] float32"""
    bias: Tensor | None
    """[N]"""
    shape: tuple[int, int] = static()
    """(N, K)"""
    dtype: torch.dtype = static()
    """Of rows that are looked up: the model's."""


Leaf = Dense | Packed | Tiled | Quantized | Fp8
KINDS = (Dense, Packed, Tiled, Quantized, Fp8)
UNRECORDED = (Dense, Packed)
"""Kinds that torch multiplies, so that a step with one of them is not recorded (`kernels/recording.py`)."""

Shape = tuple[int, int]
"""(N, K) of a weight"""

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


def matmul(leaf: Leaf, x_TK: Tensor, wide: bool = False) -> Tensor:
    """y_TN = x_TK weight^T + bias, where a row of y depends on that row of x alone, bit for bit (on CPU).

    With `wide` y is float32: the sums as they are where our own kernel makes them, else what it was rounded to.
    """
    match leaf:
        case Tiled(tiles, bias, shape):
            return kernels.cpu.linear.fn(x_TK, tiles, bias, shape[0], wide)
        case Quantized(codes, scales, bias, shape, _, dynamic):
            product = _quantized_linear(x_TK.device, x_TK.dtype)
            return product(x_TK, codes, scales, bias, shape[0], dynamic, wide)
        case Fp8(codes, scales, bias, shape):
            return _fp8_linear(x_TK.device, x_TK.dtype)(x_TK, codes, scales, bias, shape[0], wide)
        case Packed(handle, bias, weight):
            y = torch.ops.fnengine.packed_linear(x_TK, handle, bias, weight.shape[0])
            return y.float() if wide else y
        case Dense(weight, bias):
            T = x_TK.shape[0]
            if x_TK.device.type != "cpu" or (isinstance(T, int) and T >= DENSE_ROWS):
                y = _dense(x_TK, weight, bias)
            else:  # while tracing, T is a symbol and must not be branched on: pad by max(16 - T, 0), whatever T will be
                y = _dense(_pad_rows(x_TK, DENSE_ROWS), weight, bias)[:T]
            return y.float() if wide else y
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
        case Quantized(codes, scales, _, (_, K), dtype):
            return quantized.lookup(codes, scales, index_T.long(), K).to(dtype)
        case Fp8(codes, scales, _, (_, K), dtype):
            row = index_T.long()
            return fp8.dequantize(codes[row], scales[row], len(row), K).to(dtype)
    raise AssertionError("a packed weight cannot be looked up")


def weight_bytes(leaf: Leaf) -> int:
    """Bytes of a leaf. A packed weight is counted by its logical shape: oneDNN's padding is below one block a side."""
    held = (leaf.codes, leaf.scales) if isinstance(leaf, Quantized | Fp8) else (leaf.weight,)
    return sum(t.numel() * t.dtype.itemsize for t in (*held, leaf.bias) if t is not None)


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


def quantize_leaf(leaf: Dense, bits: int, dynamic: bool) -> Quantized:
    """The form of 8 or 4 bits of a dense leaf, made on CPU; `dynamic`: it will be multiplied by rows of 8 bits."""
    N, K = leaf.weight.shape
    dtype, device = leaf.weight.dtype, leaf.weight.device
    if leaf.weight.is_meta:  # shapes are all there is
        codes, scales = quantized.shapes(N, K, bits)
        w = leaf.weight
        empty = w.new_empty(codes, dtype=torch.uint8), w.new_empty(scales, dtype=torch.bfloat16)
        return Quantized(*empty, leaf.bias, (N, K), dtype, dynamic)
    weight = leaf.weight.cpu()  # so that codes are the same to the last bit wherever they go
    missing = kernels.cpu.quantized_linear.supports(weight.device, dtype)
    codes, scales = (quantized.quantize if missing else kernels.cpu.quantize)(weight, bits)
    return Quantized(codes.to(device), scales.to(device), leaf.bias, (N, K), dtype, dynamic)


def fp8_leaf(leaf: Dense) -> Fp8:
    """The form of 8-bit floats of a dense leaf, on its device."""
    w = leaf.weight
    N, K = w.shape
    if w.is_meta:
        codes, scales = fp8.shapes(N, K)
        held = w.new_empty(codes, dtype=torch.uint8), w.new_empty(scales, dtype=torch.float32)
    else:
        held = fp8.quantize(w)
    return Fp8(held[0], held[1], leaf.bias, (N, K), w.dtype)


@cache
def _quantized_linear(device: torch.device, dtype: torch.dtype) -> kernels.Chosen:
    return kernels.choose(kernels.BACKENDS["quantized_linear"], device, dtype)


@cache
def _fp8_linear(device: torch.device, dtype: torch.dtype) -> kernels.Chosen:
    return kernels.choose(kernels.BACKENDS["fp8_linear"], device, dtype)


@dataclass(frozen=True)
class Packing:
    """How weights will be stored on a device, and why."""

    kind: str
    """`tiled`, `packed`, `dense`, or one of `ROUNDED`"""
    reason: str
    atom: int = 1
    """Channels in an atom of a tile."""
    table: tuple[tuple[Shape, str], ...] = ()
    """Shapes of weights that are of another kind than `kind`, and of which."""
    experts: int = 0
    """Channels in an atom of a tile of experts' weights (`experts.py`); 0: they lie as in the checkpoint."""

    def at(self, N: int, K: int) -> Packing:
        """How a weight [N, K] is stored: one kind, no table."""
        return replace(self, kind=dict(self.table).get((N, K), self.kind), table=()) if self.table else self

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind there may be, the usual one first."""
        return tuple(dict.fromkeys((self.kind, *(kind for _, kind in self.table))))

    @property
    def name(self) -> str:
        """The kind of every shape, for people."""
        shapes = {kind: [f"{N} x {K}" for (N, K), k in self.table if k == kind] for kind in self.kinds[1:]}
        return "; ".join([self.kind, *(f"{kind} for {', '.join(names)}" for kind, names in shapes.items())])

    @property
    def indexable(self) -> bool:
        """Whether a placed weight can still be looked up, so that a tied embedding need not be held twice; ask it of
        `at` the embedding's shape."""
        assert not self.table, "which shape?"
        return self.kind != "packed"

    @property
    def ends(self) -> Packing:
        """How the head is stored, and an embedding that is the head as well: never in less than integers of 8 bits,
        because their errors reach the logits and the residual stream whole (docs/performance.md)."""
        return replace(self, kind=self.kind.replace("int4", "int8").replace("fp8", "int8"))

    def place(self, leaf: Dense) -> Leaf:
        """The leaf in its final form; the dense one may be freed afterwards. On the meta device only its shapes."""
        match self.at(leaf.weight.shape[0], leaf.weight.shape[1]).kind:
            case "tiled":
                return tile_leaf(leaf, self.atom)
            case "packed":
                return pack_leaf(leaf)
            case "fp8":
                return fp8_leaf(leaf)
            case kind if kind in QUANTIZED:
                return quantize_leaf(leaf, QUANTIZED[kind], kind.endswith("dynamic"))
        return leaf

    def nbytes(self, N: int, K: int, dtype: torch.dtype) -> int:
        """How many bytes a placed weight [N, K] holds."""
        kind = self.at(N, K).kind
        if kind in QUANTIZED:
            codes, scales = quantized.shapes(N, K, QUANTIZED[kind])
            return prod(codes) + prod(scales) * 2
        if kind == "fp8":
            codes, scales = fp8.shapes(N, K)
            return prod(codes) + prod(scales) * 4
        elements = -(-N // PANEL) * PANEL * (-(-K // self.atom) * self.atom) if kind == "tiled" else N * K
        return elements * dtype.itemsize


LAYOUTS = ("tiled", "packed", "dense")
"""Kinds of layout on CPU that hold a weight as it is, fastest first."""
QUANTIZED = {"int8": 8, "int4": 4, "int8-dynamic": 8, "int4-dynamic": 4}
"""Kinds that hold it as integers -> bits; a dynamic one rounds the rows that it is multiplied by to 8 bits as well."""
ROUNDED = (*QUANTIZED, "fp8")
"""Kinds that hold it rounded: integers, or 8-bit floats, which are multiplied by rows of such."""


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


def quantizing(device: torch.device, dtype: torch.dtype, kind: str, tiles: Tiles = tiles) -> Packing:
    """How weights are placed with 8 or 4 bits.

    Raises:
        ConfigError: there is no such kind, or the device does not multiply it.
    """
    if kind not in ROUNDED:
        raise ConfigError(
            f"{kind!r} is not implemented", where="--quantization", remedy=f"one of none, {', '.join(ROUNDED)}"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"{kind} weights are multiplied on cpu and cuda only, not on {device.type}",
            where="--quantization",
            remedy="leave it out, or use --device cpu",
        )
    if kind == "fp8":
        return _floating(device, dtype)
    native = tiles(device, dtype)  # what builds one product builds the other
    if device.type == "cuda":
        chosen = _quantized_linear(device, dtype)
        native = chosen.reason if chosen.backend.name == "reference" else Packing(kind, "")
    how = "by Triton" if device.type == "cuda" else "by a native product"
    how = f"by plain torch, decoded at every call: slow ({native})" if isinstance(native, str) else how
    head = ", head in 8 bits" if QUANTIZED[kind] == 4 else ""
    rows = ", rows to 8 bits" if kind.endswith("dynamic") else ""
    return Packing(kind, f"rounded from {str(dtype)[6:]}{head}{rows}, multiplied {how}")


def _floating(device: torch.device, dtype: torch.dtype) -> Packing:
    """How weights are placed as 8-bit floats.

    Raises:
        ConfigError: the device does not multiply them.
    """
    if why_not := kernels.triton.unfit_for_fp8(device, dtype):
        raise ConfigError(
            f"fp8 weights are multiplied by matrix units of GPUs, which is not possible on {device.type}: {why_not}",
            where="--quantization",
            remedy="int8 is as small and runs here",
        )
    head = "head in integers of 8 bits, rows to fp8"
    return Packing("fp8", f"rounded from {str(dtype)[6:]}, {head}; {_fp8_linear(device, dtype).reason}")


def packing(device: torch.device, dtype: torch.dtype, quantization: str = "none", tiles: Tiles = tiles) -> Packing:
    """The first layout of a fixed order, with what was passed over; or the one that `quantization` asks for.

    The order is that of speed on the processors at hand (benchmarks/products.py); `products.packing` knows what this
    one measured. Where the processor has matrix units (AMX), oneDNN uses them for bfloat16 and the native product does
    not.

    Raises:
        ConfigError: see `quantizing`.
    """
    if quantization != "none":
        return quantizing(device, dtype, quantization, tiles)
    found = layouts(device, dtype, tiles)
    if dtype is torch.bfloat16 and isinstance(found["packed"], Packing) and torch.cpu._is_amx_tile_supported():
        found["tiled"] = "oneDNN uses this processor's matrix units (AMX)"
    passed = [f"{kind}: {how}" for kind, how in found.items() if isinstance(how, str)]
    best = next(how for how in found.values() if isinstance(how, Packing))
    before = [reason for reason in passed if LAYOUTS.index(reason.split(":")[0]) < LAYOUTS.index(best.kind)]
    of_experts = tiles(device, dtype) if device.type == "cpu" else ""
    atom = of_experts.atom if isinstance(of_experts, Packing) else 0
    return replace(best, reason="; ".join([best.reason, *before]), experts=atom)


def place_ends(params: dict[str, Any], how: Packing) -> dict[str, Leaf | None]:
    """The final leaves of dense ends, `embed` and `head`; the head is None where the embedding itself serves.

    An embedding of its own stays dense because it is only looked up. One that is also the head (tied) is placed like
    any weight where it can still be looked up then; else it stays dense and a packed copy becomes the head.
    """
    embed, head = params["embed"], params["head"]
    how = how.at(embed.weight.shape[0], embed.weight.shape[1])
    if head is not None:
        return {"embed": embed, "head": how.ends.place(head)}
    return (
        {"embed": how.ends.place(embed), "head": None} if how.indexable else {"embed": embed, "head": how.place(embed)}
    )


def _pad_rows(x: Tensor, least: int) -> Tensor:
    missing: Any = torch.sym_max(least - x.shape[0], 0)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])])


def _dense(x_TK: Tensor, weight_NK: Tensor, bias: Tensor | None) -> Tensor:
    """y_TN, in float32 on CPU the sum of products over `DENSE_DEPTH` channels each, from the first on."""
    if x_TK.device.type != "cpu" or x_TK.dtype != torch.float32:
        return F.linear(x_TK, weight_NK, bias)
    parts = [slice(k, k + DENSE_DEPTH) for k in range(0, x_TK.shape[1], DENSE_DEPTH)]
    y_TN = F.linear(x_TK[:, parts[0]], weight_NK[:, parts[0]], bias)
    for part in parts[1:]:
        y_TN = y_TN + F.linear(x_TK[:, part], weight_NK[:, part])
    return y_TN
