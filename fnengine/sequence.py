"""Sequences as values: what a `Runtime` and strategies hand around, and what an `extend` of some is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from fnengine.errors import RequestError
from fnengine.host.blocks import Path
from fnengine.host.request import Sampling
from fnengine.spec import ModelSpec, tap_names

if TYPE_CHECKING:
    from fnengine.runtime import Runtime

Logits = Literal["last", "all"] | None

MOST_LIKELIEST = 1024
"""Most tokens that `likeliest` may ask for: as many as a partial sort finds in a memory that log-probabilities take
anyway."""


class Likeliest(NamedTuple):
    """The likeliest next tokens, in falling order; of equals the lowest id comes first."""

    ids: np.ndarray
    """[k] int32"""
    logprobs: np.ndarray
    """[k] float32, log_softmax of the raw logits"""


class Tokens:
    """An append-only buffer of token ids, shared by every sequence along one line of growth."""

    __slots__ = ("data", "used")

    def __init__(self, data: np.ndarray, used: int):
        self.data, self.used = data, used

    def extend(self, at: int, tokens: np.ndarray) -> Tokens:
        """The buffer holding `self[:at] + tokens`: this one when `at` is its end, a copy otherwise."""
        if at != self.used:
            return Tokens(self.data[:at].copy(), at).extend(at, tokens)
        end = at + len(tokens)
        if end > len(self.data):
            grown = np.empty(max(2 * len(self.data), end, 64), np.int32)
            grown[:at] = self.data[:at]
            self.data = grown
        self.data[at:end] = tokens
        self.used = end
        return self


class Sequence:
    """An immutable sequence of computed tokens. `seq[:n]` is a prefix, `len(seq)`, `seq.tokens`.

    Its blocks return to the pool when the last reference goes, or at once with `close()` or `with`.
    """

    __slots__ = ("__weakref__", "_buffer", "_path", "_prompt_len", "_pure", "_row", "_runtime")

    def __init__(
        self,
        runtime: Runtime,
        path: Path,
        buffer: Tokens,
        prompt_len: int,
        pure: int,
        row: tuple[int, int] = (-1, -1),
    ):
        self._runtime, self._path, self._buffer = runtime, path, buffer
        # The first `pure` tokens were computed under the steering that is the path's salt; those behind the first that
        # was not are never published, for KV depends on all that came before.
        self._prompt_len, self._pure = prompt_len, pure
        # (row, stamp): while the row bears this stamp it holds these tokens, or this sequence's continuation.
        self._row = row

    def __len__(self) -> int:
        return self._path.length

    @property
    def runtime(self) -> Runtime:
        """The one that computed it, and can extend it."""
        return self._runtime

    @property
    def tokens(self) -> list[int]:
        """The token ids, as a new list."""
        return self._buffer.data[: len(self)].tolist()

    def __getitem__(self, at: slice) -> Sequence:
        """A prefix; raises `RequestError` for anything but `seq[:n]`."""
        if not isinstance(at, slice) or at.start not in (None, 0) or at.step not in (None, 1):
            raise RequestError("a sequence can only be cut to a prefix", where=f"seq[{at}]", remedy="write seq[:n]")
        n = range(len(self))[at]
        rt = self._runtime
        rt._need_open(self)
        # A prefix that has the whole prompt can go on in the same row: only the row's length is another.
        row = self._row if len(n) >= self._prompt_len > 0 else (-1, -1)
        with rt._books:
            path = rt._ledger.cut(self._path, len(n))
        prompt_len, pure = min(self._prompt_len, len(n)), min(self._pure, len(n))
        return Sequence(rt, path, self._buffer, prompt_len, pure, row)

    def close(self) -> None:
        """Lets the blocks go now; the value must not be used afterwards. Twice is harmless."""
        path, self._path = self._path, CLOSED
        if path is not CLOSED:
            self._runtime._dropped.append(path)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self):
        # A finalizer may run at any moment, so it only hands the path over; the ledger is touched at the next call.
        with contextlib.suppress(AttributeError):  # construction failed, there is no path
            self.close()

    def __repr__(self) -> str:
        return f"Sequence({len(self)} tokens)"


CLOSED = Path(None, 0, "closed")


def as_arrays(steer: Any) -> Any:
    """What was given as steering, with arrays for tensors: those of taps, for instance, wherever they lie."""
    if isinstance(steer, (list, tuple)):
        return [as_arrays(one) for one in steer]
    if steer is None:
        return None
    if not isinstance(steer, Mapping):
        raise RequestError(f"steer must be layer -> vector, got {type(steer).__name__}", param="steer")
    return {k: v.detach().float().cpu().numpy() if isinstance(v, Tensor) else v for k, v in steer.items()}


def wishes(
    pairs: int, logits: Any, sample: Any, taps: Any, likeliest: Any, spec: ModelSpec
) -> tuple[Logits, list[Sampling | None], tuple[str, ...]]:
    """(the logits wanted, a sampling or None for each pair, the taps) of the arguments of an `extend` of so many pairs.

    Raises:
        RequestError: they mean nothing, or are not as many.
    """
    want: Logits = ("last" if sample is None and not likeliest else None) if logits == "default" else logits
    if want not in ("last", "all", None):
        raise RequestError(f"logits must be 'last', 'all' or None, got {want!r}", param="logits")
    if type(likeliest) is not int or not 0 <= likeliest <= MOST_LIKELIEST:
        raise RequestError(f"likeliest must be 0 to {MOST_LIKELIEST}, got {likeliest!r}", param="likeliest")
    samplings = list(sample) if isinstance(sample, (list, tuple)) else [sample] * pairs
    if len(samplings) != pairs:
        raise RequestError(f"{pairs} pairs but {len(samplings)} samplings", param="sample")
    names = (taps,) if isinstance(taps, str) else tuple(taps)
    if names:  # 29 strings for a model of 27 layers, which every token of every strategy would make
        known = tap_names(spec)
        if unknown := [name for name in names if name not in known]:
            raise RequestError(
                f"there is no tap {unknown[0]!r}",
                param="taps",
                remedy=f"{known[0]}, {known[1]} to {known[-2]}, or {known[-1]}",
            )
    return want, samplings, names
