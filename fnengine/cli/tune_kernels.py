"""`fnengine compile --tune-kernels`: free knobs of Triton's kernels, timed on this card for a model's shapes, kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnengine.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fnengine.kernels.layout import KVLayout
    from fnengine.spec import ModelSpec

WHERE = "--tune-kernels"


def check(device: torch.device) -> None:
    """Raises ConfigError where there is nothing to time: no CUDA device, or no Triton."""
    import torch

    from fnengine.kernels import triton

    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f"kernels are timed on a GPU, and there is no CUDA device here, or {device} was chosen",
            where=WHERE,
            remedy="run it on the machine that has the card; on CPU `fnengine compile` measures products without it",
        )
    if why := triton.unfit(device, torch.bfloat16):
        raise ConfigError(why, where=WHERE, remedy="install torch with CUDA")


def measure(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    layout: KVLayout,
    quantization: str = "none",
    where: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Each shape of a model with its knobs, and whether they were measured now; kept as soon as known.

    Raises:
        ConfigError: the folder cannot be written.
    """
    import torch

    from fnengine.kernels.triton import tune, tuned
    from fnengine.params import products
    from fnengine.spec import attentions

    where = where or tuned.folder()
    mixers = dict.fromkeys(attentions(spec))
    heads = [(m.heads, m.kv_heads, m.width) for m in mixers]
    on = tuned.card(device)
    makers = tune.cases(device, dtype, layout, heads, products(spec).count, quantization)
    with torch.inference_mode(), torch.cuda.device(device if device.type == "cuda" else -1):
        for make in makers:  # one at a time: together they may not fit the card
            try:
                ((case, entry, new),) = tune.tune_all([make()], on, where, tune.on_card)
            except OSError as e:
                raise ConfigError(
                    f"what was measured could not be kept: {e}",
                    where=str(where),
                    remedy="point FNENGINE_CACHE to a folder that can be written",
                ) from e
            path = tuned.path_of(where, tuned.key(on, case.op))
            yield {"op": case.op, "shape": case.shape, "new": new, "file": str(path), **_plain(entry)}


def _plain(entry: Any) -> dict[str, Any]:
    best = min(entry.times.values(), default=1.0)
    return {"knobs": dict(entry.knobs), "times": dict(entry.times), "out": dict(entry.out), "best": best}


def line(found: dict[str, Any]) -> str:
    """What was measured of a shape, for people."""
    knobs = ", ".join(f"{knob} {value}" for knob, value in found["knobs"].items()) or "the default"
    how = "measured" if found["new"] else "measured before"
    out = f", {len(found['out'])} out" if found["out"] else ""
    return f"{found['op']:<16} {found['shape']:<28} {knobs} ({how}: {found['best']:.2f} of the default's time{out})"
