"""One compiled artifact per kind of layer, used for every layer of that kind.

The artifact takes tensors in one fixed order: what the step derived, the layer's pool, the layer's weights. It is
dynamic in tokens, rows, blocks and table size, so one artifact serves prefill, decode and every pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fnengine
from fnengine import kernels, layers, leaves, tree
from fnengine.graphs.compile import Artifact, Traces, compile_flat
from fnengine.host.step import BLOCK
from fnengine.kernels import Ops
from fnengine.spec import Layer, ModelSpec
from fnengine.state import Pool, Where

_T, _R, _N, _M, _P = 7, 11, 13, 17, 19
"""Example sizes: distinct, so that each stands for its own symbol, and above 1, because 0 and 1 specialise."""


def compiled_layers(
    spec: ModelSpec,
    params: Any,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path | None,
    traces: Traces,
) -> Callable[..., Tensor]:
    """A drop-in for `layers.layer` that calls the artifact of the layer's kind; all are made here, at once."""
    artifacts: dict[Any, Artifact] = {}
    flat: dict[int, list[Tensor]] = {}
    of_layer: dict[int, Artifact] = {}
    for kind, p in zip(spec.layers, params["layers"], strict=True):
        weights = tree.leaves(p)
        signature = (kind, tuple((path, tuple(w.shape), str(w.dtype)) for path, w in tree.items(p)))
        if signature not in artifacts:
            artifacts[signature] = _compile_kind(kind, p, ops, dtype, device, folder, traces, len(artifacts))
        of_layer[id(p)], flat[id(p)] = artifacts[signature], weights

    def run_layer(
        kind: Layer, p: Any, pool: Pool, where: Where, angles: tuple[Tensor, Tensor], ops: Ops, x_TD: Tensor
    ) -> Tensor:
        w = where
        return of_layer[id(p)].call(
            x_TD, *angles, w.slot, w.row, w.start, w.length, w.table, pool.k, pool.v, *flat[id(p)]
        )

    return run_layer


def _compile_kind(
    kind: Layer,
    p: Any,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path | None,
    traces: Traces,
    number: int,
) -> Artifact:
    a = kind.mixer

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    def floats(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dt, device=device)

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

    key = {"kind": repr(kind), "source": _source_key(), "ops": repr(kernels.describe(ops))}
    return compile_flat(
        fn,
        [*fixed, *weights],
        [*dynamic, *(() for _ in weights)],
        name=f"layer{number}",
        key=key,
        folder=folder,
        traces=traces,
    )


def _source_key() -> str:
    """A digest of the code an artifact was traced from."""
    files = [Path(m.__file__) for m in (layers, leaves, fnengine.program) if m.__file__]
    files += sorted(Path(kernels.__path__[0]).glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
