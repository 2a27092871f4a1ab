"""What sentence-transformers keeps beside a model: layers after pooling, the longest text, whether there is a head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fnengine.errors import CheckpointError
from fnengine.spec import Bridge, ModelSpec

KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
"""Kinds of modules that have a meaning here: `Pooling` is read by `host.pooling`, `Normalize` is what /v1/embeddings
does anyway."""
ACTS: dict[str, Literal["identity", "tanh", "gelu", "relu", "silu"]] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
}


def read(folder: Path) -> Any:
    """The value in a JSON file of a model's folder, or None where there is none. Raises CheckpointError."""
    try:
        return json.loads(folder.read_text(encoding="utf-8")) if folder.is_file() else None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot be read as JSON: {e}", where=str(folder), remedy="fetch it again") from None


def bridges(folder: Path) -> tuple[Bridge, ...]:
    """The layers between a text's vector and its embedding, in order.

    Raises:
        CheckpointError: a file cannot be read, or names a module or a function that is not known.
    """
    path, found = folder / "modules.json", []
    for module in read(path) or ():
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in KNOWN:
            raise CheckpointError(
                f"asks for a module of type {module.get('type')!r}",
                where=str(path),
                remedy=f"known: {', '.join(KNOWN)}",
            )
        if kind != "Dense":
            continue
        at = str(module.get("path", ""))
        if not at or Path(at).name != at:
            raise CheckpointError(f"the path {at!r} of a module is no plain name", where=str(path))
        said = folder / at / "config.json"
        config = read(said) or {}
        act = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        reads, width = config.get("in_features"), config.get("out_features")
        if act not in ACTS or not (isinstance(reads, int) and isinstance(width, int) and min(reads, width) > 0):
            raise CheckpointError(
                f"says in_features = {reads}, out_features = {width}, activation_function = {act!r}",
                where=str(said),
                remedy=f"functions known are {', '.join(ACTS)}",
            )
        found.append(Bridge(at, width, reads, config.get("bias", True) is not False, ACTS[act]))
    for bridge, reads in zip(found, [None, *(b.width for b in found)], strict=False):
        if reads not in (None, bridge.reads):
            raise CheckpointError(
                f"reads {bridge.reads} numbers, and is given {reads}", where=str(folder / bridge.folder / "config.json")
            )
    return tuple(found)


def longest(folder: Path, spec: ModelSpec) -> ModelSpec:
    """The spec with no more positions than its makers let texts have."""
    most = (read(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    if isinstance(most, int) and 0 < most < spec.max_len:
        return replace(spec, max_len=most)
    return spec
