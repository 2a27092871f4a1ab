"""Which kind of leaf multiplies each shape of a model's weights fastest: measured once, kept, read by every start.

`fnengine compile` measures; a start never does. Kinds differ in how they round, so the choice must not change between
two starts of one installation, as it would if a busy minute could turn it. Where nothing was measured the fixed order
of `leaves.packing` stands.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fnengine import keys, leaves
from fnengine.environment import cache_bytes, cache_dir, processor
from fnengine.errors import ConfigError
from fnengine.kernels import native
from fnengine.kernels.recording import RECORDED_TOKENS
from fnengine.leaves import LAYOUTS, UNRECORDED, Dense, Leaf, Packing, Shape, Tiles, matmul
from fnengine.params import NOISE, Products, noise, products
from fnengine.spec import ModelSpec, routed

SHARES = {2: 0.3, 8: 0.25, 32: 0.2, 256: 0.25}
"""Rows of a step -> the share of its time that a server spends in such steps. Three quarters are decode steps: with
prompts and answers of 128 tokens (W1, docs/performance.md) one sequence spends 94 % of its time in them, 8 together
67 %, and 32 together 64 %; a third of each of these three is about this. The head is only multiplied by rows whose
logits are wanted, and so never by 256."""
MARGIN = 0.1
"""How much less time another kind must take than the fixed order's, all told, to be chosen. Noise must not choose: of
150 measurements of a kind against itself, four processes to a core, the lowest score was 0.92, the next 0.97."""
UNRECORDED_SECONDS = 250e-6
"""What a layer of a small step takes longer when steps are not recorded: 7 ms of Python in 28 layers."""
SLOW = 4
"""A kind that takes so many times as long as the fixed order's, at any number of rows, is out."""
LEAST = 1 << 20
"""Bytes of a weight below which nothing is measured: a product is then over in the time of calling it."""
SLICE = 32 << 20
"""Bytes of a weight above which only its first rows are measured; a product's time grows with them."""
SECONDS = 1.0
"""Time for measuring one shape, beside twice three rounds of every kind, which always run."""
ROUNDS = 20
"""Most rounds of a pass."""
LAW = (1, 2, 3, 5, 8, 13, 31)
"""Numbers of rows at which a row must have the bits that it has among most rows."""

Times = dict[Shape, dict[str, dict[int, float]]]
"""Shape -> kind -> rows -> seconds of a product; kinds that cannot be chosen are not in it."""


@dataclass(frozen=True)
class Measured:
    """What was measured on a machine, and what follows from it."""

    kinds: dict[Shape, str]
    times: Times
    out: dict[Shape, dict[str, str]]
    """Why a kind cannot be chosen."""
    path: Path
    """Where it is kept."""
    seconds: float = 0.0
    """How long that took; 0: it was kept already."""

    @property
    def new(self) -> bool:
        return self.seconds > 0


def packing(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, quantization: str = "none", tiles: Tiles = leaves.tiles
) -> Packing:
    """How the weights of a spec are stored: in the kinds that were measured on this machine, or by the fixed order.

    Raises:
        ConfigError: see `leaves.quantizing`; or the model has experts, whose weights are not quantized yet.
    """
    if quantization != "none" and any(routed(layer.mlp) for layer in spec.layers):
        raise ConfigError(
            f"{quantization}: weights of experts are not rounded yet, and {spec.architecture} has experts",
            where="--quantization",
            remedy="leave it out",
        )
    fixed = leaves.packing(device, dtype, quantization, tiles)
    if quantization != "none" or not measurable(products(spec), device, dtype):
        return fixed
    kept = read(spec, dtype)
    if kept is None:
        return replace(fixed, reason=f"{fixed.reason}; fixed order; `fnengine compile MODEL` measures")
    found = leaves.layouts(device, dtype, tiles)
    for kind in kept.kinds.values():
        if isinstance(why := found[kind], str):
            return replace(fixed, reason=f"{fixed.reason}; fixed order, for {kind} was measured, but {why}")
    return packed_by(kept.kinds, fixed, {k: how for k, how in found.items() if isinstance(how, Packing)})


def packed_by(kinds: dict[Shape, str], fixed: Packing, found: dict[str, Packing]) -> Packing:
    """The kinds of shapes as one value: the fixed order's is the usual one, if any shape keeps it."""
    chosen = set(kinds.values())
    usual = fixed if fixed.kind in chosen else found[next(iter(kinds.values()))]
    others = tuple((shape, kind) for shape, kind in kinds.items() if kind != usual.kind)
    atom = found["tiled"].atom if "tiled" in chosen else usual.atom
    return replace(
        usual, atom=atom, table=others, experts=fixed.experts, reason=f"{usual.reason}; measured on this machine"
    )


def measurable(shapes: Products, device: torch.device, dtype: torch.dtype) -> list[Shape]:
    """Shapes whose products are worth measuring: none on a device that multiplies one kind only."""
    return [s for s in shapes.count if device.type == "cpu" and s[0] * s[1] * dtype.itemsize >= LEAST]


# --- the choice -------------------------------------------------------------------------------------------------------


def choose(shapes: Products, times: Times, fixed: str) -> dict[Shape, str]:
    """Shape -> kind: the one with the least time of a server's day (`SHARES`), if that is less than the fixed order's
    by the margin.

    The layers are looked at together once more, because one product outside of our own kernels keeps the whole step
    from being recorded, and all of them inside let it be: what that costs must be gained, by the margin. A tied head is
    not given to a kind that holds the embedding twice, unless the fixed order does.
    """
    kinds = {shape: _fastest(shape, times.get(shape, {}), shapes, fixed) for shape in shapes.count}
    layers = [shape for shape, _ in shapes.layers]
    standing = dict.fromkeys(layers, fixed)
    options = [standing, {shape: kinds[shape] for shape in layers}]
    if all("tiled" in times.get(shape, {}) for shape in layers):
        options.append(dict.fromkeys(layers, "tiled"))

    def worth(option: dict[Shape, str]) -> float:
        found = score_of_layers(shapes, times, option, standing)
        changes = recorded(option.values()) != recorded(standing.values())
        return found if found < 1 - MARGIN * changes else 1.0

    return {**kinds, **min(options, key=worth)}  # the first of equals


def _fastest(shape: Shape, times: dict[str, dict[int, float]], shapes: Products, fixed: str) -> str:
    if fixed not in times:
        return fixed
    scores = {kind: score(found, times[fixed]) for kind, found in times.items()}
    if shape == shapes.head and shapes.tied and fixed != "packed":
        scores.pop("packed", None)
    best = min(scores, key=lambda kind: scores[kind])
    return best if scores[best] < 1 - MARGIN else fixed


def score(times: dict[int, float], than: dict[int, float]) -> float:
    """Time of a product, all told, as a part of what another kind takes: if it is 1 for every number of rows, 1."""
    weights = {rows: SHARES[rows] for rows in than}
    return sum(w * times[rows] / than[rows] for rows, w in weights.items()) / sum(weights.values())


def score_of_layers(shapes: Products, times: Times, kinds: dict[Shape, str], than: dict[Shape, str]) -> float:
    """The same of all products of all layers and, where steps of so many rows are recorded, of not being recorded."""
    measured = [(shape, n) for shape, n in shapes.layers if shape in times]

    def seconds(kinds: dict[Shape, str], rows: int) -> float:
        python = 0.0 if recorded(kinds.values()) or rows > RECORDED_TOKENS else UNRECORDED_SECONDS * shapes.depth
        return python + sum(n * times[shape][kinds[shape]][rows] for shape, n in measured)

    if not measured:
        return 1.0
    return score(*({rows: seconds(k, rows) for rows in SHARES} for k in (kinds, than)))


def recorded(kinds: Iterable[str]) -> bool:
    """Whether a step whose layers are of these kinds is recorded."""
    return not {kind.__name__.lower() for kind in UNRECORDED} & set(kinds)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(spec: ModelSpec, dtype: torch.dtype, tiles: Tiles = leaves.tiles) -> Measured | str:
    """What was measured of a model's shapes on CPU, now or before, or why nothing is. Weights are random, and one shape
    is measured after another: `SECONDS` each, and at most twice the largest cache and three slices of memory.

    Raises:
        OSError: the cache cannot be written.
    """
    device, shapes = torch.device("cpu"), products(spec)
    wanted = measurable(shapes, device, dtype)
    if not wanted:
        return f"every weight is smaller than {LEAST >> 20} MiB: the fixed order's kind"
    kinds = {k: how for k, how in leaves.layouts(device, dtype, tiles).items() if isinstance(how, Packing)}
    if len(kinds) == 1:
        return f"{next(iter(kinds))} is the only kind there is here"
    if (kept := read(spec, dtype)) is not None:
        return kept
    began, fixed = time.perf_counter(), leaves.packing(device, dtype, tiles=tiles).kind
    times: Times = {}
    out: dict[Shape, dict[str, str]] = {}
    of_layers = dict(shapes.layers)
    for shape in wanted:
        rows = [r for r in SHARES if shape in of_layers or r <= RECORDED_TOKENS]
        times[shape], out[shape] = measure_shape(shape, shapes.count[shape], rows, kinds, fixed, dtype)
    chosen = choose(shapes, times, fixed)
    path = path_of(key(spec, dtype))
    return write(key(spec, dtype), Measured(chosen, times, out, path, time.perf_counter() - began))


def measure_shape(
    shape: Shape, count: int, rows: list[int], kinds: dict[str, Packing], fixed: str, dtype: torch.dtype
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """(kind -> rows -> seconds, kind -> why it cannot be chosen) of one shape.

    Kinds take turns, each over as many copies of the weight as the model has and the caches do not hold. The shortest
    time of a pass counts, which other work on the machine disturbs least, and there are two passes (`sober`).
    """
    N, K = shape
    n = min(N, max(SLICE // (K * dtype.itemsize) // 32, 1) * 32)
    one = n * K * dtype.itemsize
    copies = min(count, -(-2 * cache_bytes() // (one * len(kinds))))
    base = noise(0).to(dtype)
    weights = [_random(base, n, K, c) for c in range(copies)]
    placed = {kind: [how.place(Dense(w)) for w in weights] for kind, how in kinds.items()}
    passes: list[dict[str, dict[int, float]]] = [{kind: {} for kind in kinds} for _ in range(2)]
    out: dict[str, str] = {}
    for times in passes:
        for M in rows:
            x = _random(base, M, K, copies)
            racing = {kind: placed[kind] for kind in kinds if kind not in out}
            best = _race(racing, x, fixed, SECONDS / len(rows) / len(passes))
            for kind, seconds in best.items():
                times[kind][M] = seconds * N / n
                if seconds > SLOW * best[fixed]:
                    out[kind] = f"{seconds / best[fixed]:.0f} times as slow as {fixed} at {M} rows"
    x = _random(base, max(rows), K, copies)
    for kind in kinds:
        if kind not in out and (M := breaks(placed[kind][0], x)) is not None:
            out[kind] = f"the bits of a row at {M} rows are not those at {len(x)}"
    first, second = ({k: v for k, v in times.items() if k not in out or k == fixed} for times in passes)
    return sober(first, second, fixed), out


def sober(
    first: dict[str, dict[int, float]], second: dict[str, dict[int, float]], fixed: str
) -> dict[str, dict[int, float]]:
    """Times of two passes as one: of the fixed order's kind the shorter, of every other the longer, so that another
    wins only where it won twice."""
    return {
        kind: {rows: (min if kind == fixed else max)(t, second[kind][rows]) for rows, t in found.items()}
        for kind, found in first.items()
    }


def _race(placed: dict[str, list[Leaf]], x: Tensor, fixed: str, seconds: float) -> dict[str, float]:
    """Kind -> shortest time of its product with x. They take turns to and fro, because on a busy machine the slices of
    the scheduler keep time with a fixed order: one kind was always the one that waited (13 times its time, in both
    passes). One that is too slow in the first three rounds has no more."""
    best = dict.fromkeys(placed, float("inf"))
    began, done = time.perf_counter(), 0
    while done < 4 or (done < ROUNDS and time.perf_counter() - began < seconds):
        for kind, copies in list(placed.items())[:: 1 if done % 2 else -1]:
            if done > 3 and best[kind] > SLOW * best[fixed]:
                continue
            start = time.perf_counter()
            matmul(copies[done % len(copies)], x)
            took = time.perf_counter() - start
            if done:  # the first round makes what a library keeps for a size
                best[kind] = min(best[kind], took)
        done += 1
    return best


def breaks(leaf: Leaf, x: Tensor) -> int | None:
    """The first number of rows of `LAW` with which a row's bits depend on other rows, or None."""
    whole = matmul(leaf, x)
    return next((M for M in LAW if len(x) > M and not torch.equal(matmul(leaf, x[:M]), whole[:M])), None)


def _random(noise: Tensor, rows: int, K: int, start: int) -> Tensor:
    """[rows, K] of the noise, repeated, from a place that differs with `start`."""
    out = torch.empty(rows, K, dtype=noise.dtype)
    period = noise.roll(-7919 * start)
    for chunk in out.view(-1).split(NOISE):
        chunk.copy_(period[: len(chunk)])
    return out


# --- kept -------------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where measurements are kept."""
    return cache_dir() / "products"


def key(spec: ModelSpec, dtype: torch.dtype) -> keys.Key:
    """What a choice depends on: the shapes of a model, the machine, and the code that multiplies and chooses."""
    shapes, here = products(spec), Path(__file__).parent
    code = [*native.SOURCE.glob("*.[ch]*"), here / "leaves.py", here / "products.py"]
    return {
        "shapes": {_text(shape): str(n) for shape, n in shapes.count.items()},
        "layers": str(shapes.depth),
        "head": "none" if shapes.head is None else _text(shapes.head) + ", tied" * shapes.tied,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        **processor(),
        "flags": " ".join((*native.FLAGS, *native.host_isa())),
        "threads": str(torch.get_num_threads()),
        "source": keys.of_files(sorted(code)),
    }


def path_of(key: keys.Key) -> Path:
    """Where the measurement of this key is, or would be."""
    return folder() / f"{keys.digest(key)}.json"


def write(key: keys.Key, found: Measured) -> Measured:
    """Keeps a measurement, whole: of two processes that race the last one's stands.

    Raises:
        OSError: the cache cannot be written.
    """
    content = {
        "key": key,
        "kinds": {_text(shape): kind for shape, kind in found.kinds.items()},
        "times": {_text(shape): times for shape, times in found.times.items()},
        "out": {_text(shape): why for shape, why in found.out.items()},
    }
    found.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=found.path.parent, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, found.path)
    return found


def read(spec: ModelSpec, dtype: torch.dtype) -> Measured | None:
    """The kept measurement of a model's shapes on this machine, or None where there is none, or a damaged one."""
    wanted = key(spec, dtype)
    path = path_of(wanted)
    try:
        content = json.loads(path.read_text())
        found = Measured(
            {_shape(name): kind for name, kind in content["kinds"].items()},
            {
                _shape(name): {kind: {int(r): float(t) for r, t in rows.items()} for kind, rows in times.items()}
                for name, times in content["times"].items()
            },
            {_shape(name): dict(why) for name, why in content["out"].items()},
            path,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = set(found.kinds) == set(products(spec).count) and set(found.kinds.values()) <= set(LAYOUTS)
    return found if whole and content["key"] == wanted else None


def nearest(spec: ModelSpec, dtype: torch.dtype) -> keys.Nearest | None:
    """Of the kept measurements of this model's shapes the one most like what is wanted, to explain a miss."""
    wanted = key(spec, dtype)
    every = {name: content["key"] for name, content in keys.kept(folder()).items() if "key" in content}
    return keys.nearest(wanted, every, lambda k: k.get("shapes") == wanted["shapes"])


def table(found: Measured) -> list[str]:
    """A measurement as aligned lines: milliseconds of each kind by rows, and what was chosen."""
    lines = [f"  {'weight':<16} {'kind':<7}" + "".join(f"{f'{rows} rows':>11}" for rows in SHARES) + "   ms"]
    for shape, times in found.times.items():
        for kind in LAYOUTS:
            cells = [f"{times[kind][r] * 1e3:>11.3f}" if r in times.get(kind, {}) else f"{'-':>11}" for r in SHARES]
            why = "chosen" if found.kinds[shape] == kind else found.out.get(shape, {}).get(kind, "")
            if kind in times or why:
                lines.append(f"  {_text(shape):<16} {kind:<7}{''.join(cells)}   {why}".rstrip())
    small = [f"{_text(shape)} {kind}" for shape, kind in found.kinds.items() if shape not in found.times]
    return [*lines, *([f"  too small to measure: {', '.join(small)}"] if small else [])]


def _text(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def _shape(text: str) -> Shape:
    N, K = text.split(" x ")
    return int(N), int(K)
