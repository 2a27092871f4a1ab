"""What may draft beside a model on its rows and blocks, as users give it: draft models here, heads in `decoding`.

    Engine.build(model, companion=SecondModel(fn.load("demo-draft")), speculate=Speculate("draft_model"))

`build` asks it to get ready, which says what it takes of memory, sizes the pool with that, and has it made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fnengine import kernels, memory
from fnengine.device import make_pool
from fnengine.errors import ConfigError
from fnengine.graphs.compile import CannotCompile, Traces, folder
from fnengine.kernels import Ops
from fnengine.memory import Extra, Shapes
from fnengine.model import Model, RunLayers, one_by_one
from fnengine.processors import Own
from fnengine.program import Kind, Recorded, compiled_layers, wanted_layers
from fnengine.settings import Mode, Settings
from fnengine.spec import ModelSpec, attentions, for_length, recurrents
from fnengine.state import Pool
from fnengine.transforms.companion import Companion, of_model

log = logging.getLogger("fnengine")


@dataclass(frozen=True)
class Ground:
    """What a device is made from, as far as a companion has to know."""

    target: Model
    settings: Settings
    mode: Mode
    own: tuple[Own, ...]
    """The engine's own logits processors."""
    compiling: bool
    """Layers run compiled where they can be."""
    captured: bool
    """Steps are captured, so that nothing is recorded."""
    ops: Callable[[ModelSpec, torch.dtype], Ops]
    """For a model on the target's device."""


@dataclass(frozen=True)
class Ready:
    """A companion whose sizes are known."""

    extra: Extra
    positions: int
    """Longest sequence that it knows."""
    compiles: bool
    """Something of it is not in the cache of compiled layers."""
    kinds: int
    """Of passes that draft, each with graphs of its own where steps are captured."""
    made: Callable[[int, Traces], tuple[Companion, str]]
    """(longest sequence of the engine, where compilations are counted) -> what the device gets, and how it runs."""


class Beside(Protocol):
    """A companion as users give it."""

    @property
    def method(self) -> str:
        """Its name in `Speculate`."""
        ...

    @property
    def name(self) -> str:
        """For people."""
        ...

    def ready(self, ground: Ground) -> Ready:
        """It, for this model. Raises ConfigError where the two do not fit."""
        ...


@dataclass(frozen=True)
class SecondModel:
    """A smaller model that writes drafts for all sequences that want some, one token of each at a time."""

    model: Model
    method: str = "draft_model"

    @property
    def name(self) -> str:
        return self.model.name

    def ready(self, ground: Ground) -> Ready:
        model, target, settings = self.model, ground.target, ground.settings
        check_pair(target, model)
        kernels.start(model.device, model.dtype, model.quantization != "none", settings.kv_cache_dtype)
        ops = ground.ops(model.spec, model.dtype)
        kinds = wanted_layers(model.spec, model.params, ops, model.dtype, model.device) if ground.compiling else []
        shapes = Shapes(
            model.spec,
            model.dtype,
            model.how,
            ground.mode,
            max_len=model.spec.max_len,
            blocks=1,
            threads=torch.get_num_threads(),
            compiled=bool(kinds),
            kv=ops.kv,
        )

        def made(max_len: int, traces: Traces) -> tuple[Companion, str]:
            run_layers, how = layers_of(kinds, model, traces, ground.captured)
            spec = for_length(model.spec, min(max_len, model.spec.max_len))
            mixers = attentions(spec)

            def pool(blocks: int) -> tuple[Pool, ...]:
                return make_pool(mixers, ops.kv, blocks, model.dtype, model.device)

            layers = len(target.spec.layers)
            return of_model(spec, model.params, ops, run_layers, layers, pool, ground.own), how

        compiles = any(kind.wanted.kept(folder()) is None for kind in kinds)
        return Ready(memory.beside(shapes, model.name), model.spec.max_len, compiles, 2, made)


def check_pair(target: Model, draft: Model) -> None:
    """Raises ConfigError unless both models have the same tokens and lie on one device."""
    where = draft.name or "draft model"
    if target.spec.vocab != draft.spec.vocab:
        raise ConfigError(
            f"a draft model of {draft.spec.vocab} tokens for a target of {target.spec.vocab}",
            where=where,
            remedy="take one of the same family",
        )
    if recurrents(draft.spec):  # it is blocks that are shared, copied and lent to a draft
        raise ConfigError(
            f"a draft model with recurrent layers ({draft.spec.architecture}), which keep nothing in blocks",
            where=where,
            remedy="take one without, or a layer that predicts further tokens",
        )
    if target.device != draft.device:
        raise ConfigError(
            f"a draft model on {draft.device} for a target on {target.device}",
            where=where,
            remedy="load both on one device",
        )


def layers_of(kinds: Sequence[Kind], model: Model, traces: Traces, captured: bool) -> tuple[RunLayers, str]:
    """(how a companion's layers run, the same for people)."""
    if not kinds:
        return one_by_one(), "eager"
    try:
        run_layers = compiled_layers(list(kinds), model.params, folder(), traces)
    except CannotCompile as e:
        log.warning("layers of the draft model run eagerly: %s", e)
        return one_by_one(), f"eager: {e}"
    if isinstance(run_layers, Recorded):
        return (run_layers.run, "compiled") if captured else (run_layers, "compiled and recorded")
    return run_layers, "compiled"
