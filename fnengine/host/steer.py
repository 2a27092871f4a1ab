"""What a request adds to the residual stream, checked and in one order, and the salt of what is computed under it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fnengine.errors import RequestError
from fnengine.host.blocks import Salt


@dataclass(frozen=True, eq=False)
class Steering:
    """Vectors that are added after layers, for every token. Those of zeros change nothing and are not held."""

    vectors: tuple[tuple[str, np.ndarray], ...]
    """(layer, [D] float32), in the order in which layers were declared."""
    digest: str
    """Of all of it, 256 bits: equal digests, equal steering."""


def steering(given: Mapping[str, Any], declared: Sequence[str], width: int) -> Steering | None:
    """The steering that was given as layer -> vector of `width` numbers; None for none, or for zeros.

    Raises:
        RequestError: a layer is not among those that were declared, or a vector is none of that width and finite.
    """
    vectors: dict[str, np.ndarray] = {}
    for name, value in given.items():
        if name not in declared:
            raise RequestError(
                f"layer {str(name)[:80]!r} is not one that may be steered here",
                param="steer",
                remedy=f"one of {', '.join(declared)}" if declared else f"start with --steer {str(name)[:80]}",
            )
        try:
            with np.errstate(over="ignore"):
                vector = np.array(value, np.float32)
        except (TypeError, ValueError):
            raise RequestError(f"the vector of {name} is not made of numbers", param="steer") from None
        if vector.shape != (width,):
            shape = f"{len(vector)} numbers" if vector.ndim == 1 else f"the shape {list(vector.shape)}"
            raise RequestError(f"the vector of {name} has {shape}, the model is {width} wide", param="steer")
        if not np.isfinite(vector).all():
            raise RequestError(f"the vector of {name} holds a number that is not finite in float32", param="steer")
        if vector.any():
            vectors[name] = vector
    if not vectors:
        return None
    ordered = tuple((name, vectors[name]) for name in declared if name in vectors)
    digest = hashlib.blake2b(digest_size=32)
    for name, vector in ordered:
        digest.update(f"{name}\n".encode() + vector.tobytes())
    return Steering(ordered, digest.hexdigest())


def steerings(given: Any, pairs: int, declared: Sequence[str], width: int) -> list[Steering | None]:
    """One for each of so many pairs, of one mapping (or None) for all or a list with one each.

    Raises:
        RequestError: as `steering`, or they are not as many.
    """
    if not isinstance(given, (list, tuple)):
        return [steering(given, declared, width) if given else None] * pairs
    if len(given) != pairs:
        raise RequestError(f"{pairs} pairs but {len(given)} steerings", param="steer")
    return [steering(one, declared, width) if one else None for one in given]


def digest_of(salt: Salt) -> str:
    """Of the steering under which blocks of this salt were computed; empty for none."""
    return salt[0] if isinstance(salt, tuple) else ""


def salted(salt: str, steering: Steering | None) -> Salt:
    """The salt of what is computed under a steering. A pair, so that no salt of a request's own is equal to it."""
    return salt if steering is None else (steering.digest, salt)
