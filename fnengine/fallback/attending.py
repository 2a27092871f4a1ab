"""What transformers calls where it wants attention: two functions under names of our own in its interface.

Its modules do not all hand extra arguments down, so what attention needs of a step (`Call`) is found in a variable of
the context that `forward` sets around its one call; nothing outlives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine.host.step import BLOCK
from fnengine.spec import Attention
from fnengine.state import Pool, Where

PAGED, SEEN = "fnengine", "fnengine-probe"
"""Names in transformers' attention interface: attention over the pool, and one that only writes down its arguments."""

FAR = 1_000_003
"""A position beyond any context, at which masks are asked what they let through."""


@dataclass
class Call:
    """One forward over the pool: the layers whose turn it is, in the order in which attention is called."""

    mixers: Sequence[Attention]
    pool: Sequence[Pool]
    where: Where
    ops: Any
    at: int = 0

    def attend(self, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, sinks: Tensor | None) -> Tensor:
        """[T, H, width of v]. Donates the pool of this call's layer."""
        a, pool, w = self.mixers[self.at], self.pool[self.at], self.where
        self.at += 1
        heads = [F.pad(x, (0, a.width - x.shape[-1])) if x.shape[-1] < a.width else x for x in (q_THC, k_TKC, v_TKC)]
        still = torch.zeros(q_THC.shape[0], 1, device=q_THC.device)  # rotated by upstream already
        qkv_TE = torch.cat(heads, 1).flatten(1)
        q_THC = self.ops.rope_write(qkv_TE, None, None, still + 1, still, pool.k, pool.v, w.slot, 1e-6)
        at = (w.table, w.row, w.start, w.length)
        window = a.window or 0
        o_THC = self.ops.paged_attention(q_THC, pool.k, pool.v, *at, a.scale, window, a.soft_cap, sinks)
        return o_THC[..., : v_TKC.shape[-1]]


@dataclass(frozen=True)
class Mask:
    """What a token at position `FAR` sees by a mask of transformers: those before it, or only a window."""

    window: int | None
    why_not: str = ""
    """It sees something else."""


@dataclass(frozen=True)
class Asked:
    """One call of attention, as a probe saw it."""

    module: Any
    heads: int
    kv_heads: int
    width: int
    of_values: int
    """Channels of v."""
    scale: float
    soft_cap: float
    sinks: bool
    mask: Mask


@dataclass
class Probe:
    asked: list[Asked] = field(default_factory=list)
    masks: list[tuple[Tensor, Mask]] = field(default_factory=list)
    """Stand-ins for masks, and what each lets through."""


_CALL: ContextVar[Call] = ContextVar("fnengine.call")
_PROBE: ContextVar[Probe] = ContextVar("fnengine.probe")


def calling() -> Call:
    """The forward that is going on."""
    return _CALL.get()


def probing() -> Probe:
    """The look that is going on."""
    return _PROBE.get()


def is_mask(x: Tensor) -> bool:
    """Whether a tensor of a look stands for a mask."""
    return any(_is_all_of(x, stand_in) for stand_in, _ in _PROBE.get().masks)


@contextlib.contextmanager
def over(call: Call) -> Iterator[None]:
    """Attention inside is that of `call`."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


@contextlib.contextmanager
def watched() -> Iterator[Probe]:
    """Calls of attention inside are written down."""
    probe = Probe()
    token = _PROBE.set(probe)
    try:
        yield probe
    finally:
        _PROBE.reset(token)


@cache
def register() -> None:
    """Makes both known to transformers. Masks are only made for the probe: attention over the pool has its own."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PAGED, _paged)
    AttentionInterface.register(SEEN, _seen)
    AttentionMaskInterface.register(SEEN, _mask)


def _paged(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, s_aux: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """[1, H, T, C] of all rows' new tokens -> [1, T, H, C]."""
    q_THC, k_TKC, v_TKC = (x[0].transpose(0, 1) for x in (query, key, value))
    o_THC = _CALL.get().attend(q_THC, k_TKC, v_TKC, s_aux)
    return o_THC[None], None


INERT = frozenset(
    ["dropout", "position_ids", "use_cache", "output_attentions", "is_causal", "sliding_window", "cache_position"]
)
"""Arguments of attention that change nothing here: windows are read off masks."""


def _seen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    probe = _PROBE.get()
    mask = next((known for stand_in, known in probe.masks if _is_all_of(attention_mask, stand_in)), None)
    unknown = [name for name, value in more.items() if value is not None and name not in INERT]
    if unknown:
        mask = Mask(None, f"attention is given {unknown[0]}, which ours does not know")
    elif mask is None:
        mask = Mask(None, "it makes its own mask" if attention_mask is not None else "attention has no mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    H, K, C, of_values = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    probe.asked.append(Asked(module, H, K, C, of_values, scale, softcap or 0.0, s_aux is not None, mask))
    return query.new_empty(1, query.shape[2], H, of_values), None


def _is_all_of(mask: Any, stand_in: Tensor) -> bool:
    """Whether a mask is the stand-in, or a view of all of it."""
    if not isinstance(mask, Tensor) or mask.shape != stand_in.shape:
        return False
    return mask.untyped_storage()._cdata == stand_in.untyped_storage()._cdata


def _mask(*, q_length: int, kv_length: int, mask_function: Any, **_: Any) -> Tensor:
    """A stand-in for the mask, known by its identity."""
    probe = _PROBE.get()
    stand_in = torch.empty(1, 1, q_length, kv_length, device="meta")
    probe.masks.append((stand_in, seen_by(mask_function)))
    return stand_in


def seen_by(mask_function: Any) -> Mask:
    """What a mask lets through, asked at places that tell causal masks and windows from all others."""

    def sees(q: int, kv: int) -> bool:
        with torch.device("cpu"):
            zero = torch.tensor(0)
            return bool(mask_function(zero, zero, torch.tensor(q), torch.tensor(kv)))

    if sees(FAR, FAR + 1) or sees(0, 1):
        return Mask(None, "tokens see what comes after them")
    if not sees(FAR, FAR):
        return Mask(None, "a token does not see itself")
    low, high = 0, FAR  # the first position that FAR sees, if there is one place where sight begins
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sees(FAR, middle) else (middle + 1, high)
    window = None if low == 0 else FAR - low + 1
    for q in (0, 1, BLOCK, 1000, 4097, FAR - 77, FAR):
        first = 0 if window is None else max(0, q - window + 1)
        inside = {first, q, (first + q) // 2, max(first, q - 3)}
        outside = {first - 1, first // 2, 0} if first else set()
        if not all(sees(q, kv) for kv in inside) or any(sees(q, kv) for kv in outside):
            return Mask(None, "its mask is neither causal nor a sliding window")
    return Mask(window)
