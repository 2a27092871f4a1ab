"""Models that no family knows, run through transformers' own modules with our attention, products and pool.

`probe` looks at a class without its weights and says what a `ModelSpec` has to: the attention of each layer. `template`
is the module without values, whose products are ours; `forward` calls it functionally; `compare` sets the two side by
side on the weights at hand. All of it, and transformers, is imported only when a model asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from fnengine.fallback.forward import Fallback
    from fnengine.spec import ModelSpec

COSTS = (
    "what stands between its blocks runs operator by operator; norms and activations are not this engine's, so equal "
    "requests may differ by rounding with what runs beside them; no taps but the final one, no steering"
)
"""What users should know of a model that runs so."""


def said(spec: ModelSpec) -> str:
    """The sentence about it that a start shows."""
    return f"fallback: {spec.architecture} runs as transformers' own module, {COSTS}"


def read(config: Mapping[str, Any], where: str, code: str = "") -> ModelSpec:
    """See `probe.read`."""
    from fnengine.fallback import probe

    return probe.read(config, where, code)


def abstract(spec: ModelSpec) -> dict[str, Any]:
    """See `probe.abstract`."""
    from fnengine.fallback import probe

    return probe.abstract(spec)


def classes() -> list[tuple[str, str]]:
    """(model_type, architecture) of every causal language model that the installed transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return [(kind, name) for kind, names in found for name in ((names,) if isinstance(names, str) else names)]


def names(spec: ModelSpec, stored: Iterable[str]) -> dict[str, str]:
    """See `probe.names`."""
    from fnengine.fallback import probe

    return probe.names(spec, stored)


def parts(spec: ModelSpec, params: Any, dtype: torch.dtype, device: torch.device) -> Fallback:
    """See `forward.parts`."""
    from fnengine.fallback import forward

    return forward.parts(spec, params, dtype, device)


def wanted_blocks(
    spec: ModelSpec, params: Any, ops: Any, dtype: torch.dtype, device: torch.device
) -> tuple[list[Any], str]:
    """(see `blocks.wanted_blocks`, why there is nothing)."""
    from fnengine.fallback import blocks

    try:
        return list(blocks.wanted_blocks(spec, params, ops, dtype, device)), ""
    except blocks.CannotBeCompiled as e:
        return [], f"{e}, so blocks of the fallback are not compiled"


def compiled(made: Fallback, spec: ModelSpec, params: Any, kinds: Any, folder: Path | None, traces: Any) -> None:
    """See `blocks.compiled`."""
    from fnengine.fallback import blocks

    blocks.compiled(made, spec, params, kinds, folder, traces)


def check(spec: ModelSpec, params: Any, dtype: torch.dtype, device: torch.device) -> str:
    """What was compared of a fallback and its class. See `compare.check`."""
    from fnengine.fallback import compare

    return compare.check(spec, params, dtype, device)
