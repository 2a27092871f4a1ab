"""One compiled artifact per kind of layer, used for every layer of that kind.

The artifact takes tensors in one fixed order: what the step derived, the layer's pool, the layer's weights. It is
dynamic in tokens, rows, blocks and table size, so one artifact serves prefill, decode and every pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fnengine
from fnengine import kernels, keys, layers, leaves, tree
from fnengine.graphs import compile
from fnengine.graphs.compile import Artifact, Traces, Wanted, make, wanted
from fnengine.host.step import BLOCK
from fnengine.kernels import Ops
from fnengine.spec import Layer, ModelSpec
from fnengine.state import Pool, Where

_T, _R, _N, _M, _P = 7, 11, 13, 17, 19
"""Example sizes: distinct, so that each stands for its own symbol, and above 1, because 0 and 1 specialise."""


@dataclass(frozen=True)
class Kind:
    """Layers that are the same function of tensors of the same shapes."""

    wanted: Wanted
    layers: tuple[int, ...]
    """Their numbers, from 0."""


def compiled_layers(kinds: list[Kind], params: Any, folder: Path | None, traces: Traces) -> Callable[..., Tensor]:
    """A drop-in for `layers.layer` that calls the artifact of the layer's kind; all are made here, at once."""
    of_layer: dict[int, Artifact] = {}
    for kind in kinds:
        artifact = make(kind.wanted, folder, traces)
        of_layer.update((id(params["layers"][i]), artifact) for i in kind.layers)
    flat = {id(p): tree.leaves(p) for p in params["layers"]}

    def run_layer(
        kind: Layer, p: Any, pool: Pool, where: Where, angles: tuple[Tensor, Tensor], ops: Ops, x_TD: Tensor
    ) -> Tensor:
        w = where
        return of_layer[id(p)].call(
            x_TD, *angles, w.slot, w.row, w.start, w.length, w.table, pool.k, pool.v, *flat[id(p)]
        )

    return run_layer


def wanted_layers(spec: ModelSpec, params: Any, ops: Ops, dtype: torch.dtype, device: torch.device) -> list[Kind]:
    """One wanted artifact for each kind of layer; nothing is traced yet. Of `params` only shapes and dtypes are looked
    at, so they may be on the meta device (`checkpoint.outline`), and of `ops` only names."""
    alike: dict[Any, list[int]] = {}
    for i, (kind, p) in enumerate(zip(spec.layers, params["layers"], strict=True)):
        signature = (kind, tuple((path, tuple(w.shape), str(w.dtype)) for path, w in tree.items(p)))
        alike.setdefault(signature, []).append(i)
    return [
        Kind(_wanted(f"layer{n}", spec.layers[i[0]], params["layers"][i[0]], ops, dtype, device), tuple(i))
        for n, i in enumerate(alike.values())
    ]


FIXED = ("x", "cos", "sin", "slot", "row", "start", "length", "table", "k", "v")
"""Names of an artifact's first tensors; the weights follow under their paths."""


def _wanted(name: str, kind: Layer, p: Any, ops: Ops, dtype: torch.dtype, device: torch.device) -> Wanted:
    a = kind.mixer

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    def floats(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dt, device="meta")

    width = next(w.shape[-1] for path, w in tree.items(p) if path.startswith("norm1"))
    angles = [floats(_T, a.rope.width // 2, dt=torch.float32) for _ in range(2)]
    pools = [floats(_N, BLOCK, a.kv_heads, a.width) for _ in range(2)]
    fixed = [floats(_T, width), *angles, ints(_T), ints(_R), ints(_R + 1), ints(_R), ints(_M, _P), *pools]
    dynamic: list[tuple[int, ...]] = [(0,), (0,), (0,), (0,), (0,), (0,), (0,), (0, 1), (0,), (0,)]
    weights = tree.leaves(p)

    def fn(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot: Tensor,
        row: Tensor,
        start: Tensor,
        length: Tensor,
        table: Tensor,
        k: Tensor,
        v: Tensor,
        *flat: Tensor,
    ) -> Tensor:
        rest = iter(flat)
        params = tree.map_with_path(lambda _path, _leaf: next(rest), p)
        where = Where(row=row, start=start, row_T=row, position=slot, slot=slot, length=length, table=table)
        return layers.layer(kind, params, Pool(k, v), where, (cos, sin), ops, x)

    return wanted(
        name,
        fn,
        [*fixed, *weights],
        [*dynamic, *(() for _ in weights)],
        device=device,
        key={
            "dtype": str(dtype).removeprefix("torch."),
            "kind": keys.described(kind),
            "ops": {op: backend for op, backend, _, _ in kernels.describe(ops)},
            "source": _sources(),
        },
        names=[*FIXED, *(path for path, _ in tree.items(p))],
    )


@cache
def _sources() -> keys.Key:
    """Digests of the code that an artifact is traced from and made by."""
    files = [Path(m.__file__) for m in (layers, leaves, fnengine.program, compile) if m.__file__]
    return keys.of_files([*files, *sorted(Path(kernels.__path__[0]).glob("*.py"))])
