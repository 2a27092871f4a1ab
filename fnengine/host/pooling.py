"""One vector of many: how the activations of a prompt become its embedding, a chunk of it at a time. Torch-free.

A prompt is computed in chunks, and what is kept between two of them is one vector, never all rows: a prompt of 32,768
tokens of width 4,096 would be 537 MB. Tensors are the device's own; nothing but their methods is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fnengine.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from fnengine.host.runs import Run

POOLINGS = ("last", "mean", "cls")
"""The last token's activations, the mean of all, the first token's."""
LABELS = "labels"
"""What is asked of a classifier in place of a pooling: the number of each of its labels."""
DEFAULT = "last"
"""Where neither request nor checkpoint says: only the last token of a decoder has seen the others."""
TAP = "final"
"""What is pooled: the output of the last norm, which the head would read."""


def check_pooling(name: str | None) -> None:
    """Raises `RequestError` for a pooling that there is not."""
    if name is not None and name not in POOLINGS:
        raise RequestError(f"must be one of {', '.join(POOLINGS)}, got {name[:40]!r}", where="pooling", param="pooling")


def fold(pooling: str, before: list[Any], seen_TD: Any) -> list[Any]:
    """What is kept of a prompt's activations, float32, given what was kept before and those of the next tokens."""
    if pooling == "mean":
        total_D = seen_TD.float().sum(0)
        return [before[0] + total_D] if before else [total_D]
    if pooling == "cls":
        return before or [seen_TD[0].float().clone()]
    return [seen_TD[-1].float().clone()]


def vector(pooling: str, kept: list[Any], tokens: int) -> np.ndarray:
    """[D] float32: the embedding of a prompt of so many tokens."""
    (kept_D,) = kept
    return (kept_D / tokens if pooling == "mean" else kept_D).cpu().numpy()


def embedding(run: Run, finish: str) -> np.ndarray | None:
    """[D] float32 of a run that has ended as it should; None of one that asked for something else."""
    pooling = run.request.pooling
    return None if pooling is None or finish != "length" else vector(pooling, run.inside, run.known)


def spread(how: str, number_N: np.ndarray) -> np.ndarray:
    """[N] float32: shares of labels out of their numbers, each its own (`sigmoid`), or of 1 (`softmax`), or as they
    are (`identity`)."""
    x_N = number_N.astype(np.float64)
    if how == "sigmoid":
        x_N = np.exp(-np.logaddexp(0.0, -x_N))
    elif how == "softmax":
        x_N = np.exp(x_N - x_N.max())
        x_N = x_N / x_N.sum()
    else:
        assert how == "identity", how
    return x_N.astype(np.float32)


def declared(folder: Path | str | None, default: str = DEFAULT) -> str:
    """The pooling that a checkpoint asks for, as sentence-transformers writes it; the default where it says nothing.

    Raises:
        CheckpointError: it asks for another one than there are.
    """
    path = None if folder is None else Path(folder) / "1_Pooling" / "config.json"
    if path is None or not path.is_file():
        return default
    names = {"lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot be read: {e}", where=str(path)) from None
    asked = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    if len(asked) != 1 or asked[0] not in names:
        raise CheckpointError(
            f"asks for {', '.join(asked) or 'nothing'}", where=str(path), remedy=f"one of {', '.join(names)} is known"
        )
    return names[asked[0]]
