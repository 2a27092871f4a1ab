"""One compiled artifact per kind of layer, used for every layer of that kind; all layers recorded for small steps.

The artifact takes tensors in one fixed order: what the step derived, the layer's pool, the layer's weights. It is
dynamic in tokens, rows, blocks and table size, so one artifact serves prefill, decode and every pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fnengine
from fnengine import activations, experts, fallback, kernels, keys, layers, leaves, recurrent, tree
from fnengine.experts import Experts
from fnengine.graphs import compile, replay
from fnengine.graphs.compile import Artifact, Traces, Wanted, make, wanted
from fnengine.kernels import Ops
from fnengine.kernels.recording import (
    RECORDED_TOKENS,
    Arena,
    NotRecordable,
    Program,
    record,
    recordable,
    recordable_empty,
)
from fnengine.layers import Angles
from fnengine.model import RunLayers, one_by_one
from fnengine.spec import Layer, ModelSpec, Recurrent, Turning, angle_pairs
from fnengine.state import LayerState, Memory, Pool, Where, lent_shapes, memory_shapes

log = logging.getLogger("fnengine")

PROGRAMS = 128
"""Most sizes of a step that are recorded at a time; the one not used for longest makes room. 33 rows of one token each
and their mixtures with short prompts recur, and each holds some 150 KB."""
ARENA_BYTES = 1 << 28
"""Address space for one layer's buffers at that size; memory is taken as it is written."""

_T, _R, _N, _M, _P = 7, 11, 13, 17, 19
"""Example sizes: distinct, so that each stands for its own symbol, and above 1, because 0 and 1 specialise."""


@dataclass(frozen=True)
class Kind:
    """Layers that are the same function of tensors of the same shapes."""

    wanted: Wanted
    layers: tuple[int, ...]
    """Their numbers, from 0."""


def compiled_layers(kinds: list[Kind], params: Any, folder: Path | None, traces: Traces) -> RunLayers:
    """All layers in a row, each by the artifact of its kind; all artifacts are made here, at once."""
    of_layer: dict[int, Artifact] = {}
    for kind in kinds:
        artifact = make(kind.wanted, folder, traces, replay.Hooks(recordable, recordable_empty))
        of_layer.update((id(params["layers"][i]), artifact) for i in kind.layers)
    flat = {id(p): tree.leaves(p) for p in params["layers"]}

    def run_layer(
        kind: Layer, p: Any, state: LayerState, where: Where, angles: tuple[Tensor, Tensor], ops: Ops, x_TD: Tensor
    ) -> Tensor:
        w, (slot, table) = where, where.of(kind.mixer)
        return of_layer[id(p)].call(
            x_TD,
            *angles,
            slot,
            w.row,
            w.start,
            w.length,
            table,
            *_remembered(state, w),
            *_beside(w),
            *flat[id(p)],
        )

    layers_in_a_row = one_by_one(run_layer)
    unrecorded = (*leaves.UNRECORDED, Experts)
    ours = not any(isinstance(leaf, unrecorded) for _, leaf in tree.items(params["layers"], stop=unrecorded))
    return Recorded(layers_in_a_row) if ours and all(a.hooked for a in of_layer.values()) else layers_in_a_row


class Recorded:
    """Layers in a row by recorded programs (`kernels/recording.py`), one for each size of a small step that has come
    twice, and for each row of layers: a step that is tapped or steered runs several, one after another.

    Larger steps take long enough for Python's share not to matter; they run as they always did, and so does everything
    once something could not be recorded.
    """

    def __init__(self, run: RunLayers):
        self.run = run
        self.arena = Arena(ARENA_BYTES)
        self.programs: dict[Any, Program] = {}
        self.seen: set[Any] = set()
        self.why_not = ""
        """Why nothing is recorded any more, if so."""

    def __call__(
        self,
        kinds: Sequence[Layer],
        params: Sequence[Any],
        pool: Sequence[LayerState],
        where: Where,
        angles: dict[Turning, Angles],
        ops: Ops,
        x_TD: Tensor,
    ) -> Tensor:
        everything = (kinds, params, pool, where, angles, ops, x_TD)
        if self.why_not or len(x_TD) > RECORDED_TOKENS:
            return self.run(*everything)
        w = where
        turning = (t for pair in angles.values() for t in pair)
        inputs = (x_TD, *turning, w.slot, w.row, w.start, w.length, w.table, *_beside(w))
        inputs += () if w.guessed is None or w.behind is None else (w.guessed, w.behind)
        inputs += () if w.near_slot is None or w.near is None else (w.near_slot, w.near)
        key = (len(x_TD), len(w.row), len(kinds), id(params[0]), tree.leaves(pool[0])[0].data_ptr())
        program = self.programs.get(key)
        if program is not None:
            self.programs[key] = self.programs.pop(key)  # the newest is last
            return program.run(inputs)
        if key not in self.seen:
            self.seen.add(key)
            return self.run(*everything)
        return self._record(key, everything, inputs)

    def _record(self, key: Any, everything: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        restore = _restorable(everything[2], everything[3])
        try:
            if not all(t.is_contiguous() for t in inputs):
                raise NotRecordable("an input is not contiguous")
            program = record(lambda *_: self.run(*everything), inputs, self.arena, everything[1:3])
            first = program.output.clone()
            restore()
            if not torch.equal(program.run(inputs), first):  # writing the same KV twice changes nothing
                raise NotRecordable("the recording computes something else than what was recorded")
        except NotRecordable as e:
            restore()
            log.warning("small steps run without a recording: %s", e)
            self.why_not = str(e)
            return self.run(*everything)
        if len(self.programs) >= PROGRAMS:
            del self.programs[next(iter(self.programs))]
        self.programs[key] = program
        return first


def _remembered(state: LayerState, where: Where) -> tuple[Tensor, ...]:
    """The tensors of a layer's state, and what layers that cannot cut theirs are told beside it."""
    if isinstance(state, Pool):
        return state.k, state.v
    assert where.guessed is not None and where.behind is not None
    return state.tail, state.matrix, state.heard, state.noted, where.guessed, where.behind


def _beside(where: Where) -> tuple[Tensor, ...]:
    """What layers read beside the residual stream, if they do."""
    return () if where.beside is None else (where.beside,)


def _restorable(states: Sequence[LayerState], where: Where) -> Callable[[], None]:
    """Gives recurrent layers back, when it is called, what the step's rows remember now."""
    at = where.row.long()
    before = [(t, t[at]) for state in states if isinstance(state, Memory) for t in tree.leaves(state)]

    def restore() -> None:
        for t, was in before:
            t[at] = was

    return restore


def wanted_kinds(
    spec: ModelSpec, params: Any, ops: Ops, dtype: torch.dtype, device: torch.device
) -> tuple[list[Any], str]:
    """(what a model's layers want compiled, why nothing): the layers of a spec, or the blocks of a fallback."""
    if spec.upstream is None:
        return wanted_layers(spec, params, ops, dtype, device), ""
    return fallback.wanted_blocks(spec, params, ops, dtype, device)


def wanted_layers(spec: ModelSpec, params: Any, ops: Ops, dtype: torch.dtype, device: torch.device) -> list[Kind]:
    """One wanted artifact for each kind of layer; nothing is traced yet. Of `params` only shapes and dtypes are looked
    at, so they may be on the meta device (`checkpoint.outline`), and of `ops` only names and the layout of KV."""
    alike: dict[Any, list[int]] = {}
    for i, (kind, p) in enumerate(zip(spec.layers, params["layers"], strict=True)):
        signature = (kind, tuple((path, tuple(w.shape), str(w.dtype)) for path, w in tree.items(p)))
        alike.setdefault(signature, []).append(i)
    return [
        Kind(_wanted(f"layer{n}", spec.layers[i[0]], spec.width, params["layers"][i[0]], ops, dtype, device), tuple(i))
        for n, i in enumerate(alike.values())
    ]


FIXED = ("x", "cos", "sin", "slot", "row", "start", "length", "table")
"""Names of an artifact's first tensors, ..."""
KEPT = ("k", "v"), ("tail", "matrix", "heard", "noted", "guessed", "behind")
"""... and of what follows, in layers of attention and in recurrent ones; then the layer's own input, if it has one, and
the weights under their paths."""


def _wanted(name: str, kind: Layer, width: int, p: Any, ops: Ops, dtype: torch.dtype, device: torch.device) -> Wanted:
    a = kind.mixer

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    def floats(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dt, device="meta")

    angles = [floats(_T, angle_pairs(a.rope), dt=torch.float32) for _ in range(2)]
    if isinstance(a, Recurrent):
        states, notes = memory_shapes(a)
        kept = [floats(n, *shape, dt=torch.float32) for n, some in ((_N, states), (_M, notes)) for shape in some]
        kept += [ints(_R), ints(_M)]
    else:
        kept = [floats(*shape, dt=ops.kv.element(dtype)) for shape in lent_shapes(ops.kv, a, _N)]
    fixed = [floats(_T, width), *angles, ints(_T), ints(_R), ints(_R + 1), ints(_R), ints(_M, _P), *kept]
    dynamic: list[tuple[int, ...]] = [(0,), (0,), (0,), (0,), (0,), (0,), (0,), (0, 1), *((0,) for _ in kept)]
    if kind.beside is not None:
        fixed, dynamic = [*fixed, floats(_T, kind.beside.width)], [*dynamic, (0,)]
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
        *flat: Tensor,
    ) -> Tensor:
        rest = iter(flat[len(kept) :])
        own = None if kind.beside is None else next(rest)
        params = tree.map_with_path(lambda _path, _leaf: next(rest), p)
        where = Where(row=row, start=start, row_T=row, position=slot, slot=slot, length=length, table=table, beside=own)
        if isinstance(a, Recurrent):
            *four, guessed, behind = flat[: len(kept)]
            state, where = Memory(*four), replace(where, guessed=guessed, behind=behind)
        else:
            state = Pool(*flat[: len(kept)])
        return layers.layer(kind, params, state, where, (cos, sin), ops, x)

    return wanted(
        name,
        fn,
        [*fixed, *weights],
        [*dynamic, *(() for _ in weights)],
        device=device,
        key={
            "dtype": str(dtype).removeprefix("torch."),
            "kind": keys.described(kind),
            "kv": ops.kv.name,
            "ops": {op: backend for op, backend, _, _ in kernels.describe(ops)},
            "source": _sources(),
        },
        names=[
            *FIXED,
            *KEPT[isinstance(a, Recurrent)],
            *(("beside",) if kind.beside else ()),
            *(path for path, _ in tree.items(p)),
        ],
    )


@cache
def _sources() -> keys.Key:
    """Digests of the code that an artifact is traced from and made by."""
    traced = (layers, activations, recurrent, leaves, experts, fnengine.program, compile)
    files = [Path(m.__file__) for m in traced if m.__file__]
    return keys.of_files([*files, *sorted(Path(kernels.__path__[0]).glob("*.py"))])
