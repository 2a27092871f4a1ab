"""What an engine of a model loads from the cache, known from its config alone: to fill the cache ahead of time, and to
say what is missing there and why.

Nothing here reads weights: a key depends on shapes, so parameters stand on the meta device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fnengine import checkpoint, kernels, keys, leaves, products, whole
from fnengine.build import choose_ops
from fnengine.encoder import attention_for
from fnengine.errors import ConfigError
from fnengine.graphs import compile
from fnengine.graphs.compile import Traces
from fnengine.kernels import KVLayout, Ops, native
from fnengine.products import Measured
from fnengine.program import Kind, wanted_kinds
from fnengine.settings import check_kv
from fnengine.spec import ModelSpec


@dataclass(frozen=True)
class Library:
    """A native library that an engine loads."""

    part: str
    """Its name in `native.SOURCES`."""
    key: keys.Key
    path: Path

    @property
    def digest(self) -> str:
        return self.path.stem.removeprefix(f"{self.part}-")


@dataclass(frozen=True)
class Needs:
    """What an engine would load, if what is missing can be built."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    quantization: str
    kv_cache_dtype: str
    attention_backend: str
    kv: KVLayout
    """How KV will lie in the pool."""
    libraries: tuple[Library, ...]
    layers: tuple[Kind, ...]
    eager: str | None
    """Why layers run eagerly and have no artifacts, or None."""
    unable: str | None
    """Why nothing can be compiled here, or None. What is in the cache can be loaded all the same."""


@dataclass(frozen=True)
class Status:
    """Whether one needed thing is in the cache."""

    name: str
    digest: str
    key: keys.Key
    warm: str | None
    """How it would be loaded, or None: it would be compiled."""
    nearest: keys.Nearest | None
    """Where it is cold: what is kept of the same library or model that is most like it."""


@dataclass(frozen=True)
class Made:
    """One needed thing that is in the cache now."""

    name: str
    digest: str
    key: keys.Key
    compiled: bool
    """False: it was there already."""
    seconds: float
    bytes: int


def needs(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
    attention_backend: str = "auto",
    enforce_eager: bool = False,
    impl: str = "auto",
    trust: bool = False,
) -> Needs:
    """What an engine of the model in `folder` will load; nothing is built, traced or compiled to know it.

    Raises:
        CheckpointError, SpecError, ConfigError: as `model.load`, but for the weights, which need not be there.
    """
    spec, on = checkpoint.read_spec(folder, impl, trust), checkpoint.pick_device(device)
    check_kv(kv_cache_dtype, on.type)
    try:  # where no compiler can build native code, what is chosen now is what will be
        compiler, tiles, choose = native.find_compiler(), leaves.expected_tiles, kernels.expected
    except native.BuildFailed:
        compiler, tiles, choose = None, leaves.tiles, kernels.ops
    kind, _ = checkpoint.pick_dtype(spec, dtype, on, tiles)
    ops = choose_ops(spec, on, kind, kv_cache_dtype, attention_backend, choose)
    fits, quantized = kernels.cpu.unfit(on, kind) is None, quantization != "none"
    libraries = _libraries(kernels.cpu.parts(kind, quantized, kv_cache_dtype), compiler) if fits else ()
    eager = ops.paged_attention.reason if ops.paged_attention.backend.name == "reference" else None
    if enforce_eager:
        eager = "--enforce-eager"
    if spec.whole is not None and not enforce_eager:
        eager = None
    layers: list[Kind] = []
    if eager is None:
        how = products.packing(spec, on, kind, quantization, tiles)
        layers, unable_to = _layers(spec, checkpoint.outline(spec, kind, how), ops, kind, on)
        eager = unable_to or None
    unable = compile.missing_compiler() if on.type == "cpu" else None
    return Needs(
        spec,
        kind,
        on,
        quantization,
        kv_cache_dtype,
        attention_backend,
        ops.kv,
        libraries,
        tuple(layers),
        eager,
        unable,
    )


def _layers(
    spec: ModelSpec, outline: Any, ops: Ops, dtype: torch.dtype, device: torch.device
) -> tuple[list[Kind], str]:
    """(the layers that will be compiled, those of a step, or of a model that reads texts whole; why nothing)."""
    if spec.whole is None:
        return wanted_kinds(spec, outline, ops, dtype, device)
    return whole.wanted_layers(spec, outline, attention_for(spec, device, dtype), dtype, device), ""


def _libraries(parts: tuple[str, ...], compiler: str | None) -> tuple[Library, ...]:
    isa, folder = native.host_isa(), native.folder()

    def library(part: str) -> Library:
        kept = native.find_kept(folder, isa, part) if compiler is None else None
        if kept is not None:
            return Library(part, keys.kept(folder, f"{kept.stem}.json")[kept.stem], kept)
        return Library(part, native.key(compiler, isa), native.target(compiler, folder, isa, part))

    return tuple(library(part) for part in parts)


def statuses(needs: Needs) -> list[Status]:
    """Whether each needed thing is in the cache, and where it is not, what differs."""
    return [*map(_library_status, needs.libraries), *map(_layer_status, needs.layers)]


def _library_status(lib: Library) -> Status:
    if lib.path.exists():
        return Status(f"native {lib.part}", lib.digest, lib.key, "as it is", None)
    kept = keys.kept(lib.path.parent, f"{lib.part}-*.json")
    return Status(f"native {lib.part}", lib.digest, lib.key, None, keys.nearest(lib.key, kept))


def _layer_status(kind: Kind) -> Status:
    w, folder = kind.wanted, compile.folder()

    def related(key: keys.Key) -> bool:
        """Of this model: the same layer in other shapes (another dtype), or another layer in the same ones."""
        return any(key.get(field) == w.key[field] for field in ("kind", "shapes"))

    warm = w.kept(folder)
    near = keys.nearest(w.key, keys.kept(folder), related) if warm is None else None
    return Status(w.name, keys.digest(w.key), w.key, warm, near)


def fill(needs: Needs) -> Iterator[Made | Measured]:
    """Builds, measures, traces and compiles what is not in the cache, and loads what is, one after another. Where there
    are products to choose between, their measurement comes between the libraries, which it needs, and the layers,
    which it changes.

    Raises:
        ConfigError: the compiler is missing or refuses, or the cache cannot be written.
    """
    if needs.unable is not None and any(status.warm is None for status in statuses(needs)):
        raise ConfigError(f"nothing can be compiled: {needs.unable}", where="compile")
    cold = any(kind.wanted.kept(compile.folder()) is None for kind in needs.layers)
    if cold:
        compile.start_in_background()  # while the native kernels are built
    with ThreadPoolExecutor(len(needs.libraries) or 1) as pool:
        yield from pool.map(_build, needs.libraries)
    spec, dtype, device = needs.spec, needs.dtype, needs.device
    if device.type == "cpu" and needs.quantization == "none":
        if cold and needs.unable is None:
            compile.start()  # not while products are measured
        try:
            found = products.measure(spec, dtype)
        except OSError as e:
            raise _unwritable(products.folder(), f"what was measured could not be kept: {e}") from e
        if isinstance(found, Measured):
            yield found
    if not needs.layers:
        return
    outline = checkpoint.outline(spec, dtype, products.packing(spec, device, dtype, needs.quantization))
    ops = choose_ops(spec, device, dtype, needs.kv_cache_dtype, needs.attention_backend)
    for kind in _layers(spec, outline, ops, dtype, device)[0]:
        w = kind.wanted
        artifact = compile.make(w, compile.folder(), Traces())
        if w.kept(compile.folder()) is None:
            raise _unwritable(compile.folder())
        compiled = artifact.source == "compiled"
        yield Made(w.name, artifact.key, w.key, compiled, artifact.seconds, w.bytes(compile.folder()))


def _build(lib: Library) -> Made:
    t0, there = time.perf_counter(), lib.path.exists()
    try:
        path = lib.path if there else native.build(native.find_compiler(), lib.path.parent, native.host_isa(), lib.part)
    except native.BuildFailed as e:
        raise ConfigError(str(e), where=f"native library {lib.part}") from None
    seconds = time.perf_counter() - t0
    return Made(f"native {lib.part}", lib.digest, lib.key, not there, seconds, path.stat().st_size)


def _unwritable(folder: Path, what: str = "an artifact was compiled but could not be kept") -> ConfigError:
    return ConfigError(what, where=str(folder), remedy="point FNENGINE_CACHE to a folder that can be written")
