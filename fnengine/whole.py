"""A model that reads texts whole, made ready: limits, layers compiled, and `read`, from requests to vectors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fnengine
from fnengine import encoder, environment, experts, kernels, keys, layers, leaves, tree
from fnengine import memory as accounting
from fnengine.build import memory
from fnengine.encoder import RunLayer
from fnengine.errors import ConfigError
from fnengine.graphs import compile
from fnengine.graphs.bucket import fit
from fnengine.graphs.compile import Artifact, CannotCompile, Traces, Wanted
from fnengine.host.request import Request
from fnengine.kernels import Chosen, team
from fnengine.layers import Angles
from fnengine.memory import Account, Shapes
from fnengine.model import Model
from fnengine.params import memory_plan
from fnengine.program import Kind
from fnengine.settings import Mode, Settings
from fnengine.spec import Layer, ModelSpec, angle_pairs, for_length
from fnengine.whole_memory import fitted

log = logging.getLogger("fnengine")

Read = Callable[[Sequence[Request]], list[np.ndarray]]
"""Requests of one batch -> the vector of each, float32."""


@dataclass(frozen=True)
class Ready:
    read: Read
    attend: Chosen
    mode: Mode
    """Most tokens of a batch, but for one text that is longer, and most texts."""
    queue: int
    """Most texts that wait."""
    max_len: int
    """Tokens of the longest text."""
    length: str
    """Where that comes from."""
    execution: str
    """How layers run: compiled or eager, and why."""
    traces: Traces
    account: Account | None
    """The byte ledger; None on CUDA, where there is none yet."""
    threads: tuple[int, ...] = ()
    pinned: tuple[tuple[int, int], ...] = ()

    @property
    def budget(self) -> int:
        return self.mode.budget

    @property
    def rows(self) -> int:
        return self.mode.rows


def refuse(settings: Settings) -> None:
    """Raises ConfigError for the first setting that has no meaning where there is no pool and nothing is generated."""
    asked = {
        "--steer": settings.steer,
        "--kv-cache-memory-bytes": settings.kv_cache_memory_bytes,
        "--kv-cache-dtype": settings.kv_cache_dtype != "auto",
        "--swap-space": settings.swap_space,
        "--attention-backend": settings.attention_backend != "auto",
    }
    for flag, given in asked.items():
        if given:
            raise ConfigError(
                "has no meaning for a model that reads texts whole: it has no pool and writes nothing",
                where=flag,
                remedy="leave it out",
            )


def ready(model: Model, settings: Settings) -> Ready:
    """Chooses attention, compiles the layers and sets the limits.

    Raises:
        ConfigError: a setting is impossible or has no meaning here.
    """
    refuse(settings)
    spec, device = model.spec, model.device
    mode = settings.mode(device.type)
    attend = encoder.attention_for(spec, device, model.dtype)
    kinds = [] if settings.enforce_eager else wanted_layers(spec, model.params, attend, model.dtype, device)
    max_len, length, account = spec.max_len, "the model's own", None
    if device.type == "cpu":
        weights = memory_plan(spec, model.dtype, model.how).weights
        shapes = Shapes(
            spec,
            model.dtype,
            model.how,
            mode,
            max_len=spec.max_len,
            blocks=0,
            answer_bytes=settings.answer_bytes,
            threads=torch.get_num_threads(),
            compiled=bool(kinds),
            compiling=any(kind.wanted.kept(compile.folder()) is None for kind in kinds),
            base=model.before or max(accounting.base_now() - weights, 0),
        )
        max_len, length, account = fitted(shapes, settings, memory(device)[0], accounting.base_now())
    elif settings.memory is not None:
        raise ConfigError("is for the CPU, where everything lies in the process", where="--memory")
    elif (wanted := accounting.wanted_len(settings, spec.max_len)) is not None:
        max_len, length = wanted, "--max-model-len"
    traces = Traces()
    run_layer, execution = encoder.layer, "eager: --enforce-eager"
    if kinds:
        try:
            run_layer = compiled_layers(kinds, model.params, compile.folder(), traces)
            execution = "compiled: " + ", ".join(f"{name} {source} in {s:.1f} s" for name, source, s in traces.log)
        except CannotCompile as e:
            execution = f"eager: {e}"
    if execution.startswith("eager"):
        log.warning("layers run %s", execution)
    threads = team.members(torch.get_num_threads()) if device.type == "cpu" else []
    pinned = team.pin(threads, environment.processors()) if settings.pin_threads else {}
    read = reading(for_length(spec, max_len), model.params, device, attend, run_layer)
    return Ready(
        read,
        attend,
        mode,
        settings.max_queue,
        max_len,
        length,
        execution,
        traces,
        account,
        tuple(threads),
        tuple(pinned.items()),
    )


def reading(
    spec: ModelSpec, params: dict[str, Any], device: torch.device, attend: encoder.Attend, run_layer: RunLayer
) -> Read:
    """`read` over these weights: one ragged batch, padded as a step would be."""
    typed = spec.whole is not None and spec.whole.types > 1

    @torch.inference_mode()
    def read(requests: Sequence[Request]) -> list[np.ndarray]:
        sizes = [len(r.prompt) for r in requests]
        n = sum(sizes)
        token = np.zeros(fit(n, len(sizes)).tokens, np.int32)
        token[:n] = np.concatenate([r.prompt for r in requests])
        start = np.array([0, *itertools.accumulate(sizes)], np.int32)
        types = None
        if typed and any(r.pair for r in requests):
            of = np.zeros_like(token)
            for r, begin, end in zip(requests, start, start[1:], strict=False):
                of[begin + r.pair if r.pair else end : end] = 1
            types = torch.from_numpy(of).to(device)
        where = torch.from_numpy(token).to(device), torch.from_numpy(start), types
        asked = [r.pooling or "" for r in requests]
        found = encoder.read(spec, params, *where, asked, attend=attend, run_layer=run_layer)
        flat = torch.cat(found).cpu().numpy()
        return np.split(flat, np.cumsum([len(v) for v in found])[:-1])

    return read


# --- compiled layers --------------------------------------------------------------------------------------------------

FIXED = ("x", "cos", "sin", "slot", "start")
"""Names of an artifact's first tensors; the weights follow under their paths."""
_T, _S = 7, 11
"""Example sizes: distinct, so that each stands for its own symbol, and above 1, because 0 and 1 specialise."""


def wanted_layers(spec: ModelSpec, params: Any, attend: Chosen, dtype: torch.dtype, device: torch.device) -> list[Kind]:
    """One wanted artifact for each kind of layer, as `program.wanted_layers` has them for language models."""
    alike: dict[Any, list[int]] = {}
    for i, (kind, p) in enumerate(zip(spec.layers, params["layers"], strict=True)):
        signature = (kind, tuple((path, tuple(w.shape), str(w.dtype)) for path, w in tree.items(p)))
        alike.setdefault(signature, []).append(i)
    return [
        Kind(_wanted(f"whole{n}", spec.layers[i[0]], spec.width, params["layers"][i[0]], attend, dtype, device), (*i,))
        for n, i in enumerate(alike.values())
    ]


def _wanted(
    name: str, kind: Layer, width: int, p: Any, attend: Chosen, dtype: torch.dtype, device: torch.device
) -> Wanted:
    def empty(*shape: int, dt: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dt, device="meta")

    angles = [empty(_T, angle_pairs(kind.mixer.rope), dt=torch.float32) for _ in range(2)]
    start = torch.empty(_S + 1, dtype=torch.int32)  # on the host, whatever the device is
    fixed = [empty(_T, width), *angles, empty(_T, dt=torch.int32), start]
    weights = tree.leaves(p)

    def fn(x: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, start: Tensor, *flat: Tensor) -> Tensor:
        rest = iter(flat)
        params = tree.map_with_path(lambda _path, _leaf: next(rest), p)
        return encoder.layer(kind, params, start, slot, (cos, sin), attend, x)

    return compile.wanted(
        name,
        fn,
        [*fixed, *weights],
        [*((0,) for _ in fixed), *(() for _ in weights)],
        device=device,
        key={
            "dtype": str(dtype).removeprefix("torch."),
            "kind": keys.described(kind),
            "ops": {"whole_attention": attend.backend.name},
            "source": _sources(),
        },
        names=[*FIXED, *(path for path, _ in tree.items(p))],
    )


@cache
def _sources() -> keys.Key:
    """Digests of the code that an artifact is traced from and made by."""
    files = [Path(m.__file__) for m in (encoder, layers, leaves, experts, fnengine.whole, compile) if m.__file__]
    return keys.of_files([*files, *sorted(Path(kernels.__path__[0]).glob("*.py"))])


def compiled_layers(kinds: Sequence[Kind], params: Any, folder: Path | None, traces: Traces) -> RunLayer:
    """Layers, each by the artifact of its kind; all artifacts are made here, at once."""
    of_layer: dict[int, Artifact] = {}
    for kind in kinds:
        artifact = compile.make(kind.wanted, folder, traces)
        of_layer.update((id(params["layers"][i]), artifact) for i in kind.layers)
    flat = {id(p): tree.leaves(p) for p in params["layers"]}

    def run_layer(
        kind: Layer, p: Any, start_S1: Tensor, slot_T: Tensor, angles: Angles, attend: encoder.Attend, x_TD: Tensor
    ) -> Tensor:
        return of_layer[id(p)].call(x_TD, *angles, slot_T, start_S1, *flat[id(p)])

    return run_layer
