"""Parameters before they exist: shape, dtype, origin and initial distribution of every array of a spec.

From this one tree come checkpoint loading, dummy weights and the memory plan, so they cannot disagree.

    {"embed": Dense, "layers": ({"norm1", "qkv", "q_norm", "k_norm", "o", "norm2", "gate_up", "down"}, ...),
     "norm": array, "head": Dense, or None when the embedding is the head}

A model that reads texts whole has no head, but what its `Whole` asks for: {"types", "embed_norm", "label_dense",
"label_norm", "label_out", "bridge0", ...}, and no "norm" where none follows its last layer.

A layer with experts has {"router", "correction", "experts_gate_up", "experts_down", "shared_gate_up", "shared_down",
"shared_gate"} in place of the last two, None where its spec has no such thing. A recurrent layer has {"mix", "conv",
"conv_bias", "decay", "step_bias", "skip", "gate_norm", "o"} in place of attention's. One with latent attention has
{"q_down", "q_norm", "q_up"} or {"q"}, and {"kv_down", "kv_norm", "k_up", "v_up"}, in place of what goes before "o".
One with an MLP and experts has the arrays of both, {"router_scale", "expert_scale", "dense_after", "routed_norm",
"routed_after"}. Where layers have inputs of their own there are {"inputs", "inputs_project", "inputs_norm"} beside the
embedding and {"beside_gate", "beside_out", "beside_after"} in each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from fnengine import experts, fallback, tree
from fnengine.experts import Experts
from fnengine.families import FAMILIES
from fnengine.families.names import Family, Further, Grouped, Interleaved, Names, Order, Sorted
from fnengine.leaves import Dense, Packing, Shape
from fnengine.spec import (
    RMS,
    Attention,
    Both,
    DeltaNet,
    Latent,
    Layer,
    Mamba2,
    Mlp,
    ModelSpec,
    MoE,
    Norm,
    Recurrent,
    Whole,
)

TABLES = ("positions", "types", "inputs")
"""Arrays that are looked up and never multiplied, beside the embedding."""


@dataclass(frozen=True)
class Fused:
    """One tensor of a checkpoint that holds an array by another name or in another shape."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    """Its last two dimensions are the array's, swapped."""
    rows: tuple[int, int, int] | None = None
    """(groups, first, end): its rows stand in so many groups, of each of which the array has these."""


@dataclass(frozen=True)
class ArrayInfo:
    """One array of the params tree, abstractly."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]
    """(checkpoint tensor, its size along dim 0): laid one after another along dim 0 they make the array, experts
    [E, N, K] as [E N, K]."""
    std: float | None
    """Dummy weights: normal with this deviation; None means all `fill`."""
    fill: float = 0.0
    order: Order | None = None
    """Of the rows in the checkpoint, if not this one."""
    transposed: bool = False
    """The checkpoint has [columns, rows]."""
    fused: Fused | None = None
    """What holds all of it in some checkpoints, or in every one where there are no parts."""
    exact: bool = False
    """Kept in float32 whatever the parameters' dtype."""

    def kept_in(self, dtype: torch.dtype) -> torch.dtype:
        """Its own dtype, where parameters are kept in this one."""
        return torch.float32 if self.exact else dtype

    @property
    def size(self) -> int:
        return prod(self.shape)


def abstract(spec: ModelSpec) -> dict[str, Any]:
    """The params tree of a spec with an `ArrayInfo` in place of every tensor."""
    if spec.upstream is not None:
        return fallback.abstract(spec)
    family, ends, D = FAMILIES[spec.family], spec.ends, spec.width
    names = family.names
    embed = _linear(names["embed"], (spec.vocab,), D, False)
    table = {}
    if ends.positions:
        name = f"{names['positions']}.weight"
        table = {"positions": ArrayInfo((ends.positions, D), ((name, ends.positions),), 0.02)}
    if ends.inputs:
        table |= _inputs(names, spec)
    layers = tuple(_layer(family, i, kind, D) for i, kind in enumerate(spec.layers))
    if spec.whole is not None:
        final = _norm("norm", names["norm"], D, ends.norm) if spec.whole.final else {}
        return {"embed": embed, **table, "layers": layers, **final, **_whole(names, spec.whole, D)}
    return {
        "embed": embed,
        **table,
        "layers": layers,
        **_norm("norm", names["norm"], D, ends.norm),
        "head": None if spec.tied else _linear(names["head"], (spec.vocab,), D, ends.head_bias),
    }


def _inputs(names: Names, spec: ModelSpec) -> dict[str, Any]:
    """The arrays that make an input for each layer."""
    P = next(kind.beside.width for kind in spec.layers if kind.beside is not None)
    rows, wide = spec.ends.inputs, len(spec.layers) * P
    return {
        "inputs": ArrayInfo((rows, wide), ((f"{names['inputs']}.weight", rows),), 0.02),
        "inputs_project": _linear(names["inputs_project"], (wide,), spec.width, False),
        **_norm("inputs_norm", names["inputs_norm"], P),
    }


def _whole(names: Names, w: Whole, D: int) -> dict[str, Any]:
    """The arrays of a model that reads texts whole, beside those that every model has."""
    found: dict[str, Any] = {}
    if w.types:
        found["types"] = ArrayInfo((w.types, D), ((f"{names['types']}.weight", w.types),), 0.02)
    if w.norm is not None:
        found |= _norm("embed_norm", names["embed_norm"], D, w.norm)
    if (head := w.head) is not None:
        if head.dense:
            found["label_dense"] = _linear(names["label_dense"], (D,), D, head.dense_bias)
        if head.norm is not None:
            found |= _norm("label_norm", names["label_norm"], D, head.norm)
        found["label_out"] = _linear(names.get("label_out", "score"), (len(head.labels),), D, head.bias)
    for i, bridge in enumerate(w.bridges):
        found[f"bridge{i}"] = _linear(f"{bridge.folder}/linear", (bridge.width,), bridge.reads, bridge.bias)
    return found


def further(spec: ModelSpec, layout: Further, number: int, kind: Layer) -> dict[str, Any]:
    """The abstract arrays of a layer that predicts further tokens: those of a decoder layer of this kind, `token_norm`,
    `hidden_norm`, `project` and `norm`."""
    D, at = spec.width, layout.at.format(i=number, n=len(spec.layers) + number)
    return {
        **_layer(FAMILIES[spec.family], number, kind, D, at + layout.layer),
        **_norm("token_norm", f"{at}{layout.token_norm}", D),
        **_norm("hidden_norm", f"{at}{layout.hidden_norm}", D),
        "project": _linear(f"{at}{layout.project}", (D,), 2 * D, False),
        **_norm("norm", f"{at}{layout.norm}", D),
    }


def stored_shape(info: ArrayInfo, rows: int) -> tuple[int, ...]:
    """Of a part in the checkpoint; a vector may be stored in any shape of as many elements (head by head, say)."""
    if info.fused is not None:
        return info.fused.shape
    shape = (rows, *info.shape[1:][-1:])
    return shape[::-1] if info.transposed else shape


def taken(info: ArrayInfo, held: Tensor) -> Tensor:
    """What an array has of a tensor of the checkpoint, in the array's order of dimensions."""
    if info.fused is not None and info.fused.rows is not None:
        groups, first, end = info.fused.rows
        held = held.unflatten(0, (groups, -1))[:, first:end]
    return held.mT if info.transposed or (info.fused is not None and info.fused.transposed) else held


def permutation(order: Order) -> Tensor:
    """Index of a checkpoint's row for every row of ours."""
    match order:
        case Interleaved(turning, still, C, pairs, first):
            turned = first + torch.arange(2 * pairs).view(pairs, 2).T.flatten()
            head = torch.cat([torch.arange(first), turned, torch.arange(first + 2 * pairs, C)])
            turned = torch.arange(turning)[:, None] * C + head
            return torch.cat([turned.flatten(), torch.arange(turning * C, (turning + still) * C)])
        case Grouped(groups, queries, C):
            rows = torch.arange(groups * (queries + 2) * C).view(groups, queries + 2, C)
            return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])
        case Sorted(projections, numbers):
            parts, at = [], 0
            for groups, sizes in projections:
                rows = torch.arange(at, at + groups * sum(sizes)).view(groups, -1)
                parts += [part.flatten() for part in rows.split(sizes, dim=1)]
                at += rows.numel()
            return torch.cat([parts[i] for i in numbers])


def arrays(infos: dict[str, Any]) -> Iterator[tuple[str, ArrayInfo]]:
    """(path, info) of every array of an abstract tree."""
    return tree.items(infos, stop=ArrayInfo)


def count(spec: ModelSpec) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(info.size for _, info in arrays(abstract(spec)))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of weights on the device, before anything is loaded."""

    weights: int
    """Everything below together."""
    packed_head: int
    """Of `weights`: the packed copy of a tied embedding (which stays dense to be indexed)."""
    peak: int
    """Most bytes alive while loading: `weights`, and one array in both of its forms."""


def memory_plan(spec: ModelSpec, dtype: torch.dtype, how: Packing) -> MemoryPlan:
    """What the weights of a spec take in `dtype`, stored as `how` says."""
    end = how.at(spec.vocab, spec.width)
    looked_up = not spec.tied or not end.indexable  # the embedding stays as it is

    def held(path: str, info: ArrayInfo) -> int:
        if len(info.shape) == 3:
            return experts.size(*info.shape, how.experts) * dtype.itemsize
        if len(info.shape) != 2 or path in TABLES or (path == "embed.weight" and looked_up):
            return info.size * info.kept_in(dtype).itemsize
        placed = how if path.startswith("layers.") else how.ends
        return placed.nbytes(*info.shape, dtype)

    every = list(arrays(abstract(spec)))
    head = how.ends.nbytes(spec.vocab, spec.width, dtype) if spec.tied and not end.indexable else 0
    weights = sum(held(path, info) for path, info in every) + head
    multiplied = [x for x in every if len(x[1].shape) == 2 and x[0] not in TABLES]
    placed = [x for x in multiplied if how.at(x[1].shape[0], x[1].shape[1]).kind != "dense"]
    placed += [x for x in every if len(x[1].shape) == 3 and how.experts]
    both = max((max(held(path, info), info.size * dtype.itemsize) for path, info in placed), default=0)
    return MemoryPlan(weights, head, weights + both)


NOISE = 1_048_573
"""Length of the noise that dummy weights repeat: a prime, so that no two of an array's first 1,048,573 rows are equal,
and short, because drawing 600 million normals takes ten seconds and copying them takes half of one."""


def noise(seed: int) -> Tensor:
    """[NOISE] standard normal float32, a function of the seed."""
    return torch.randn(NOISE, generator=torch.Generator().manual_seed(seed))


def dummy_array(
    path: str, info: ArrayInfo, dtype: torch.dtype, noise: Tensor, device: torch.device | None = None
) -> Tensor:
    """A random array for `--load-format dummy`: the noise, scaled, from a place that depends on the path, repeated.

    It is repeated where the array is to lie: a card copies its own memory at terabytes a second, and would else wait
    for every byte to come over the bus.
    """
    out = torch.empty(info.shape, dtype=info.kept_in(dtype), device=device)
    if info.std is None:
        return out.fill_(info.fill)
    start = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=6).digest(), "little") % NOISE
    period = (noise * info.std).to(dtype).roll(-start).to(out.device)
    for chunk in out.view(-1).split(NOISE):
        chunk.copy_(period[: len(chunk)])
    return out


@dataclass(frozen=True)
class Products:
    """The products of a step, by the shapes of their weights."""

    layers: tuple[tuple[Shape, int], ...]
    """Shape -> how many products of all layers have it."""
    depth: int
    """Layers."""
    head: Shape | None
    """None: there is no vocabulary to choose from."""
    tied: bool
    """The head's weight is the embedding, too."""

    @property
    def count(self) -> dict[Shape, int]:
        """Shape -> how many products of a step have it, those of the layers first."""
        ends = {} if self.head is None else {self.head: dict(self.layers).get(self.head, 0) + 1}
        return {**dict(self.layers), **ends}


@cache
def products(spec: ModelSpec) -> Products:
    """The products of a step of a spec."""
    shapes = Counter(info.shape for _, info in arrays({"layers": abstract(spec)["layers"]}) if len(info.shape) == 2)
    layers = tuple((shape, n) for shape, n in shapes.items() if len(shape) == 2)
    head = (spec.vocab, spec.width) if spec.whole is None else None
    return Products(layers, len(spec.layers), head, spec.tied)


def _layer(family: Family, i: int, kind: Layer, D: int, at: str = "") -> dict[str, Any]:
    """The abstract arrays of layer i, whose tensors begin with `at` if they do not with what the family says."""
    mixer, m, names = kind.mixer, kind.mlp, {**family.names, **family.renamed(kind)}

    def put(n: str) -> str:
        return (at + n.partition("layers.{i}.")[2] if at else n).replace("{i}", str(i))

    def name(key: str) -> Any:
        n = names[key]
        return put(n) if isinstance(n, str) else tuple(map(put, n))

    def linear(key: str, rows: tuple[int, ...], K: int, bias: bool) -> dict[str, Any]:
        order = family.orders[key](mixer) if key in family.orders else None
        if isinstance(order, Sorted):
            rows = tuple(groups * sum(sizes) for groups, sizes in order.projections)
        return {key: _linear(name(key), rows, K, bias, order, family.transposed)}

    def norm(key: str, there: bool) -> dict[str, Any]:
        return _norm(key, name(key), D, kind.norm) if there else {}

    def head_norm(key: str, a: Attention, heads: int) -> dict[str, Any]:
        if not a.qk_norm:
            return {key: None}
        width = a.width if a.qk_over == "head" else heads * a.width
        one = name(key)
        if isinstance(one, str) and "{h}" in one:
            one = tuple(one.replace("{h}", str(h)) for h in range(heads))
        return _norm(key, one, width, a.qk_as, family.orders[key](a) if key in family.orders else None)

    def vector(key: str, n: int, there: bool = True, std: float | None = None, fill: float = 0.0) -> dict[str, Any]:
        return {key: ArrayInfo((n,), ((name(key), n),), std, fill) if there else None}

    def mlp(m: Mlp) -> dict[str, Any]:
        first = linear("gate_up", (m.width, m.width), D, m.bias) if m.gated else linear("up", (m.width,), D, m.bias)
        return {**first, **linear("down", (D,), m.width, m.bias)}

    def attention(a: Attention) -> dict[str, Any]:
        q, kv = a.heads * a.width, a.kv_heads * a.width
        written = () if a.borrows else (kv,) if a.doubles else (kv, kv)
        return {
            **linear("qkv", ((1 + a.gated) * q, *written), D, a.qkv_bias),
            **head_norm("q_norm", a, a.heads),
            **({"k_norm": None} if a.borrows else head_norm("k_norm", a, a.kv_heads)),
            "sinks": ArrayInfo((a.heads,), ((name("sinks"), a.heads),), None) if a.sinks else None,
            **linear("o", (D,), q, a.out_bias),
        }

    def recurrent(r: Recurrent) -> dict[str, Any]:
        H, inner = r.heads, r.heads * r.width

        rows = (r.channels, inner, H, H) if isinstance(r, DeltaNet) else (inner + r.channels + H,)
        biased, mamba = isinstance(r, Mamba2) and r.bias, isinstance(r, Mamba2)
        return {
            **linear("mix", rows, D, biased),
            **vector("conv", r.channels * r.taps, std=0.3),
            **vector("conv_bias", r.channels, isinstance(r, Mamba2) and r.conv_bias),
            **vector("decay", H),
            **vector("step_bias", H, fill=1.0),
            **vector("skip", H, mamba, fill=1.0),
            **vector("gate_norm", inner if mamba else r.width, fill=1.0),
            **linear("o", (D,), inner, biased),
        }

    def latent(a: Latent) -> dict[str, Any]:
        both = f"{name('kv_up')}.weight"  # of each head first what keys are made by, then values
        rows = a.still + a.values
        k_up = Fused(both, (a.heads * rows, a.rank), transposed=True, rows=(a.heads, 0, a.still))
        v_up = Fused(both, (a.heads * rows, a.rank), rows=(a.heads, a.still, rows))
        asked = a.heads * (a.still + a.turning)
        down = {}
        if a.query_rank:
            down = {**linear("q_down", (a.query_rank,), D, False), **_norm("q_norm", name("q_norm"), a.query_rank)}
        return {
            **down,
            **(linear("q_up", (asked,), a.query_rank, False) if a.query_rank else linear("q", (asked,), D, False)),
            **linear("kv_down", (a.rank + a.turning,), D, False),
            **_norm("kv_norm", name("kv_norm"), a.rank),
            "k_up": Experts(ArrayInfo((a.heads, a.rank, a.still), (), 0.02, fused=k_up)),  # type: ignore[arg-type]
            "v_up": Experts(ArrayInfo((a.heads, a.values, a.rank), (), 0.02, fused=v_up)),  # type: ignore[arg-type]
            **linear("o", (D,), a.heads * a.values, False),
        }

    def mixed() -> dict[str, Any]:
        match mixer:
            case Attention():
                return attention(mixer)
            case Latent():
                return latent(mixer)
        return recurrent(mixer)

    def half() -> dict[str, Any]:
        if isinstance(m, Both):
            own = {**norm("dense_after", True), **norm("routed_norm", True), **norm("routed_after", True)}
            return {**mlp(m.dense), **vector("router_scale", D, fill=1.0), **_moe(names, name, m.routed, D), **own}
        return _moe(names, name, m, D) if isinstance(m, MoE) else mlp(m)

    def ending() -> dict[str, Any]:
        if kind.beside is None:
            return {}
        P = kind.beside.width
        return {
            **linear("beside_gate", (P,), D, False),
            **linear("beside_out", (D,), P, False),
            **norm("beside_after", True),
        }

    return {
        **norm("norm1", kind.before and not kind.bare),
        **mixed(),
        **norm("after1", kind.after),
        **norm("norm2", kind.before and kind.parallel != "one norm"),
        **half(),
        **norm("after2", kind.after),
        **ending(),
        **(vector("scalar", 1, fill=1.0) if kind.scaled else {}),
    }


def _moe(names: dict[str, Any], name: Callable[[str], Any], m: MoE, D: int) -> dict[str, Any]:
    F = m.shared

    def stacked(key: str, rows: tuple[int, ...], K: int) -> Experts:
        modules, fused = name(key) if key in names else (), names.get(f"fused.{key}") and name(f"fused.{key}")
        modules = (modules,) if isinstance(modules, str) else modules
        N, parts = sum(rows), []
        for e in range(m.experts if modules else 0):
            parts += [(f"{n.replace('{e}', str(e))}.weight", r) for n, r in zip(modules, rows, strict=True)]
        swapped = bool(names.get("fused.transposed"))
        shape = (m.experts, K, N) if swapped else (m.experts, N, K)
        whole = Fused(fused, shape, swapped) if fused else None
        weight = ArrayInfo((m.experts, N, K), tuple(parts), 0.02, fused=whole)
        bias = ArrayInfo((m.experts * N,), (), None, fused=Fused(f"{fused}_bias", (m.experts, N))) if m.bias else None
        return Experts(weight, bias)  # type: ignore[arg-type]

    correction = ArrayInfo((m.experts,), ((name("correction"), m.experts),), None, exact=True) if m.correction else None
    router = _linear(name("router"), (m.experts,), D, m.router_bias)
    if "fused.router" in names:
        other = Fused(f"{name('fused.router')}.weight", (m.experts, D))
        router = replace(router, weight=replace(router.weight, fused=other))
    return {
        "router": router,
        "correction": correction,
        **(
            {"expert_scale": ArrayInfo((m.experts,), ((name("expert_scale"), m.experts),), None, 1.0)}
            if m.scaled
            else {}
        ),
        "experts_gate_up": stacked("experts_gate_up", (m.width, m.width), D),
        "experts_down": stacked("experts_down", (D,), m.width),
        "shared_gate_up": _linear(name("shared_gate_up"), (F, F), D, False) if F else None,
        "shared_down": _linear(name("shared_down"), (D,), F, False) if F else None,
        "shared_gate": _linear(name("shared_gate"), (1,), D, False) if m.shared_gate else None,
    }


def _linear(
    names: str | tuple[str, ...],
    rows: tuple[int, ...],
    K: int,
    bias: bool,
    order: Order | None = None,
    transposed: bool = False,
) -> Any:
    names, rows = ((names,), (sum(rows),)) if isinstance(names, str) else (names, rows)

    def parts(suffix: str) -> tuple[tuple[str, int], ...]:
        return tuple((f"{n}.{suffix}", r) for n, r in zip(names, rows, strict=True))

    N = sum(rows)
    b = ArrayInfo((N,), parts("bias"), None, 0.0, order) if bias else None
    return Dense(ArrayInfo((N, K), parts("weight"), 0.02, 0.0, order, transposed), b)  # type: ignore[arg-type]


def _norm(key: str, names: str | tuple[str, ...], width: int, n: Norm = RMS, order: Order | None = None) -> Any:
    """The arrays of a norm under their keys. Several names hold as many equal parts."""
    names = (names,) if isinstance(names, str) else names
    each = width // len(names)

    def array(suffix: str, fill: float) -> ArrayInfo:
        return ArrayInfo((width,), tuple((f"{name}.{suffix}", each) for name in names), None, fill, order)

    weight = {key: array("weight", 1.0 - n.plus) if n.weight else None}
    return {**weight, f"{key}_bias": array("bias", 0.0)} if n.bias else weight
