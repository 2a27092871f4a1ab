"""Blocks of a fallback, compiled: one artifact for all that are alike, called in the module's own loop.

How a block is called is found by looking, too: the forward without values shows its arguments. Blocks are alike if they
are of one class, called alike, with weights of the same shapes, and no attribute of a module in them differs but the
number of the layer. What that misses (a block that computes with its number) would give other logits, so the compiled
forward is compared with the plain one before it is used (`compare`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fnengine import kernels, keys, leaves, tree
from fnengine.fallback import attending, compare, forward, probe, template
from fnengine.fallback.attending import Call, over
from fnengine.graphs import compile
from fnengine.graphs.compile import Artifact, Traces, Wanted, wanted
from fnengine.host.step import BLOCK
from fnengine.spec import Attention, ModelSpec
from fnengine.state import Pool, Where

_T, _R, _N, _M, _P = probe.T, 11, 17, 19, 23
"""Example sizes: distinct, as in `program`."""

PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Kind:
    """Blocks that are the same function of tensors of the same shapes."""

    wanted: Wanted
    layers: tuple[int, ...]
    """Their numbers in the list."""


@dataclass(frozen=True)
class Called:
    """How a block is called, and what it gives."""

    flat: tuple[Any, ...]
    """Arguments, flattened: `Shape` for a tensor, else the constant."""
    spec: Any
    """Their pytree"""
    out: Any
    """The pytree of its result, whose first leaf is its one tensor."""
    attends: tuple[int, int]
    """Which calls of attention are in it: from, to."""


@dataclass(frozen=True)
class Shape:
    sizes: tuple[int, ...]
    """-1 is T"""
    dtype: torch.dtype


class CannotBeCompiled(Exception):
    """Why blocks run operator by operator."""


def watch(found: template.Bare, spec: ModelSpec) -> list[Called]:
    """How the blocks of a module are called in its forward.

    Raises:
        CannotBeCompiled: one is called with more than tensors and constants, or not once in each forward.
    """
    assert spec.upstream is not None
    blocks: Any = found.module.get_submodule(found.blocks[:-1])
    seen: list[Any] = [None] * len(blocks)
    reasons: list[str] = []

    def before(i: int):
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            if seen[i] is not None:
                reasons.append(f"block {i} is called twice in a forward")
            seen[i] = [len(attending.probing().asked), args, kwargs]

        return hook

    def after(i: int):
        def hook(_module: Any, _args: Any, _kwargs: Any, out: Any) -> None:
            given, out_spec = pytree.tree_flatten(out)
            if not given or not isinstance(given[0], Tensor) or any(x is not None for x in given[1:]):
                reasons.append(f"block {i} gives more than one tensor")
            begin, args, kwargs = seen[i]
            flat, arg_spec = pytree.tree_flatten((args, kwargs))
            odd = [x for x in flat if not isinstance(x, (Tensor, *PLAIN))]
            if odd:
                reasons.append(f"block {i} is called with a {type(odd[0]).__name__}")
            seen[i] = Called(tuple(map(_shape, flat)), arg_spec, out_spec, (begin, len(attending.probing().asked)))

        return hook

    handles = [b.register_forward_pre_hook(before(i), with_kwargs=True) for i, b in enumerate(blocks)]
    handles += [b.register_forward_hook(after(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        probe.look(spec.upstream, found)
    finally:
        for handle in handles:
            handle.remove()
    if not all(isinstance(x, Called) for x in seen):
        reasons.append("not every block is called in a forward")
    if reasons:
        raise CannotBeCompiled(reasons[0])
    return seen


def _shape(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if attending.is_mask(x):
        return None  # over the pool there are none
    return Shape(tuple(-1 if n == _T else n for n in x.shape), x.dtype)


def wanted_blocks(spec: ModelSpec, params: Any, ops: Any, dtype: torch.dtype, device: torch.device) -> list[Kind]:
    """One wanted artifact for each kind of block; nothing is traced yet. Of `params` only shapes and dtypes are looked
    at, so they may be on the meta device.

    Raises:
        CannotBeCompiled: with the reason.
    """
    assert spec.upstream is not None
    found = template.bare(spec.upstream, dtype)
    if found.blocks == ".":
        raise CannotBeCompiled("the module has no list of blocks")
    calls = watch(found, spec)
    blocks = _list(found, template.ready(spec.upstream, params, dtype, device).body)
    alike: dict[Any, list[int]] = {}
    for i, (block, called) in enumerate(zip(blocks, calls, strict=True)):
        mixers = tuple(x.mixer for x in spec.layers[slice(*called.attends)])
        shapes = tuple((path, tuple(w.shape), str(w.dtype)) for path, w in tree.items(params["layers"][i]))
        signature = (called.flat, str(called.spec), str(called.out), mixers, shapes, _attributes(block))
        alike.setdefault(signature, []).append(i)
    return [
        Kind(_wanted(f"block{n}", spec, found, i[0], blocks[i[0]], calls[i[0]], params, ops, dtype, device), tuple(i))
        for n, i in enumerate(alike.values())
    ]


def _list(found: template.Bare, body: Any) -> Any:
    return body.get_submodule(found.blocks[:-1].removeprefix(f"{found.parts.base}."))


def _attributes(block: nn.Module) -> tuple[Any, ...]:
    """Everything plain that the modules of a block know, but the number of their layer."""
    return tuple(
        (name, type(m).__qualname__, key, value)
        for name, m in block.named_modules()
        for key, value in sorted(vars(m).items())
        if isinstance(value, PLAIN) and key not in ("layer_idx", "layer_id", "layer_number", "training")
    )


def tensors_of(found: template.Bare, i: int, params: Any, block: nn.Module) -> dict[str, Tensor]:
    """Name in block i -> tensor: of params, and what the block has computed itself."""
    begin = f"{found.blocks}{i}."
    there = found.module.state_dict()
    out = {name: b for name, b in block.named_buffers() if not b.is_meta}
    for name in (*found.linear, *found.plain):
        if not name.startswith(begin):
            continue
        held = found.at(params, name)
        if isinstance(held, leaves.KINDS):
            out.update((f"{name.removeprefix(begin)}.{field}", t) for field, t in tree.items(held))
        else:
            out[name.removeprefix(begin)] = held.view(there[name].shape)
    return out


def _wanted(
    name: str,
    spec: ModelSpec,
    found: template.Bare,
    i: int,
    block: nn.Module,
    called: Called,
    params: Any,
    ops: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Wanted:
    mixers = [x.mixer for x in spec.layers[slice(*called.attends)] if isinstance(x.mixer, Attention)]

    def empty(*shape: int, dt: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dt, device="meta")

    given = [x for x in called.flat if isinstance(x, Shape)]
    examples = [empty(*(_T if n < 0 else n for n in x.sizes), dt=x.dtype) for x in given]
    dynamic = [tuple(d for d, n in enumerate(x.sizes) if n < 0) for x in given]
    labels = [f"given.{n}" for n in range(len(given))]
    fixed = [empty(_T), empty(_R), empty(_R + 1), empty(_R), empty(_M, _P)]
    pools = [
        empty(*shape, dt=ops.kv.element(dtype))
        for a in mixers
        for shape in ops.kv.shapes(_N, BLOCK, a.kv_heads, a.width)
    ]
    kv = [f"{which}.{n}" for n in range(len(mixers)) for which in "kv"]
    weights = tensors_of(found, i, params, block)

    def fn(*flat: Tensor) -> Tensor:
        rest = iter(flat)
        arguments = [next(rest) if isinstance(x, Shape) else x for x in called.flat]
        args, kwargs = pytree.tree_unflatten(arguments, called.spec)
        slot, row, start, length, table = (next(rest) for _ in range(5))
        where = Where(row=row, start=start, row_T=row, position=slot, slot=slot, length=length, table=table)
        pool = [Pool(next(rest), next(rest)) for _ in mixers]
        named = {key: next(rest) for key in weights}
        with over(Call(mixers, pool, where, ops)):
            out = functional_call(block, named, args, kwargs, tie_weights=False)
        return pytree.tree_leaves(out)[0]

    return wanted(
        name,
        fn,
        [*examples, *fixed, *pools, *weights.values()],
        [*dynamic, (0,), (0,), (0,), (0,), (0, 1), *[(0,)] * len(pools), *[()] * len(weights)],
        device=device,
        key={
            "dtype": str(dtype).removeprefix("torch."),
            "upstream": {
                "class": f"{type(block).__module__}.{type(block).__qualname__}",
                "transformers": transformers.__version__,
                "attributes": keys.digest({"all": repr(_attributes(block))}),
                "called": keys.digest({"all": repr((called.flat, str(called.spec)))}),
            },
            "mixers": {str(n): keys.described(a) for n, a in enumerate(mixers)},
            "kv": ops.kv.name,
            "ops": {op: backend for op, backend, _, _ in kernels.describe(ops)},
            "source": _sources(type(block)),
        },
        names=[*labels, *("slot", "row", "start", "length", "table"), *kv, *weights],
    )


@cache
def _sources(cls: type) -> keys.Key:
    files = [Path(str(m.__file__)) for m in (attending, forward, template, leaves, compile)]
    files += [Path(inspect.getfile(cls)), Path(__file__)]
    return keys.of_files([*files, *sorted(Path(kernels.__path__[0]).glob("*.py"))])


class Compiled(nn.Module):
    """Stands for a block in the module's list, and calls its artifact."""

    def __init__(self, artifact: Artifact, called: Called, weights: Sequence[Tensor]):
        super().__init__()
        self.artifact, self.called = artifact, called
        self.weights = list(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = pytree.tree_leaves((args, kwargs))
        call, (begin, end) = attending.calling(), self.called.attends
        assert call.at == begin and len(flat) == len(self.called.flat), "a block is called as it was without values"
        call.at = end
        w = call.where
        given = [x for x, shape in zip(flat, self.called.flat, strict=True) if isinstance(shape, Shape)]
        pools = [t for pool in call.pool[begin:end] for t in (pool.k, pool.v)]
        out = self.artifact.call(*given, w.slot, w.row, w.start, w.length, w.table, *pools, *self.weights)
        n = self.called.out.num_leaves - 1
        return pytree.tree_unflatten([out, *[None] * n], self.called.out)


def compiled(
    made: forward.Fallback, spec: ModelSpec, params: Any, kinds: Sequence[Kind], folder: Path | None, traces: Traces
) -> None:
    """Puts artifacts in the place of a forward's blocks, for these params alone. They are made here.

    Raises:
        CannotCompile: as `compile.make`.
        SpecError: the compiled forward computes something else.
    """
    found = made.found
    blocks, calls = _list(found, made.ready.body), watch(found, spec)
    for kind in kinds:
        artifact = compile.make(kind.wanted, folder, traces)
        for i in kind.layers:
            weights = tensors_of(found, i, params, blocks[i])
            blocks[i] = Compiled(artifact, calls[i], list(weights.values()))
    made.only_for(params, found.blocks)
    first = tree.leaves(params)[0]
    compare.check(spec, params, made.ready.dtype, first.device, made)
