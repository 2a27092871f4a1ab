"""Ops that the compiler cannot write well, each under a contract. See `contract.py` for what a contract is.

    ops = fnengine.kernels.ops(torch.device("cpu"), torch.bfloat16)
    q_THC = ops.rope_write(qkv_TE, q_norm, k_norm, cos, sin, pool.k, pool.v, where.slot, eps)
    at = (where.table, where.row, where.start, where.length)
    o_THC = ops.paged_attention(q_THC, pool.k, pool.v, *at, scale, window, soft_cap, sinks)

A backend is one file listed in `BACKENDS`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fnengine.kernels import cpu, native, reference, sdpa, triton, varlen, vendor
from fnengine.kernels.attention import Heads
from fnengine.kernels.contract import Backend, Chosen, Contract, choose
from fnengine.kernels.layout import KVLayout

__all__ = [
    "BACKENDS",
    "Backend",
    "Chosen",
    "Contract",
    "Heads",
    "KVLayout",
    "Ops",
    "choose",
    "describe",
    "expected",
    "ops",
    "start",
]

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "paged_attention": (
        cpu.paged_attention,
        varlen.paged_attention,
        triton.paged_attention,
        reference.paged_attention,
    ),
    "whole_attention": (sdpa.backend, reference.whole_attention),
    "rope_write": (cpu.rope_write, triton.rope_write, reference.rope_write),
    "copy_blocks": (cpu.copy_blocks, triton.copy_blocks, reference.copy_blocks),
    "gumbel_argmax": (cpu.gumbel_argmax, triton.gumbel_argmax, reference.gumbel_argmax),
    "truncate": (cpu.truncate, triton.truncate, reference.truncate),
    "apply_mask": (cpu.apply_mask, triton.apply_mask, reference.apply_mask),
    "penalize": (triton.penalize, reference.penalize),
    "linear": (cpu.linear, reference.linear),
    "quantized_linear": (cpu.quantized_linear, triton.quantized_linear, reference.quantized_linear),
    "fp8_linear": (vendor.fp8_linear, triton.fp8_linear, reference.fp8_linear),
    "grouped_tiles": (cpu.grouped_tiles, reference.grouped_tiles),
    "top_experts": (cpu.top_experts, reference.top_experts),
    "arrange_experts": (cpu.arrange_experts, reference.arrange_experts),
    "causal_conv": (cpu.causal_conv, reference.causal_conv),
    "gated_scan": (cpu.gated_scan, reference.gated_scan),
    "grouped_linear": (triton.grouped_linear, vendor.grouped_linear, reference.grouped_linear),
}
"""op -> its backends, best first."""


@dataclass(frozen=True)
class Ops:
    """The backends an engine uses, chosen once; model code gets it as an argument.

    Products are not among them: how a weight is stored says how it is multiplied, and its leaf knows (`leaves.py`). Nor
    is `penalize`, whose backends all give the same bits: the processor knows.
    """

    paged_attention: Chosen
    rope_write: Chosen
    copy_blocks: Chosen
    gumbel_argmax: Chosen
    truncate: Chosen
    apply_mask: Chosen
    kv: KVLayout
    """How KV lies in the pool: what `rope_write` writes and `paged_attention` reads."""

    @property
    def invariant(self) -> bool:
        """Whether no op's result for a row depends on other rows, chunking or cache hits."""
        return all(getattr(self, name).backend.invariant for name in CHOSEN)


CHOSEN = ("paged_attention", "rope_write", "copy_blocks", "gumbel_argmax", "truncate", "apply_mask")
"""The ops of `Ops`, in its order."""


ATTENTION = tuple(b.name for b in BACKENDS["paged_attention"])
"""Names that a choice of attention may have."""


def ops(
    device: torch.device | str,
    dtype: torch.dtype,
    only: str | None = None,
    kv: str = "auto",
    attention: str | None = None,
    heads: Sequence[Heads] = (),
) -> Ops:
    """The best backend of each op for a device and a dtype; `only` restricts the choice to one backend's name, and
    `attention` that of attention; `kv` says how KV is kept: `auto`, in that dtype, or rounded to 8 bits, as `int8` with
    a scale to each vector or as `fp8`; `heads` are what a model's layers ask of attention.

    Raises:
        LookupError: no backend fits, with each one's reason.
    """
    device = torch.device(device)
    names = _names(only, attention)
    chosen = {name: choose(BACKENDS[name], device, dtype, names[name], kv, heads) for name in CHOSEN}
    writes, reads = (chosen[name].backend.kv(dtype, kv) for name in ("rope_write", "paged_attention"))
    assert writes == reads, f"KV would be written as {writes} and read as {reads}"
    return Ops(**chosen, kv=reads)


def _names(only: str | None, attention: str | None) -> dict[str, str | None]:
    """Op -> the name its choice is restricted to. Whoever reads KV and can write it does both, in its own layout."""
    names: dict[str, str | None] = {name: only for name in CHOSEN}
    if attention is not None:
        names["paged_attention"] = attention
        if any(b.name == attention for b in BACKENDS["rope_write"]):
            names["rope_write"] = attention
    return names


def expected(
    device: torch.device | str,
    dtype: torch.dtype,
    kv: str = "auto",
    attention: str | None = None,
    heads: Sequence[Heads] = (),
) -> Ops:
    """What `ops` will choose once the native code is built, without building it.

    Raises:
        BuildFailed: there is no compiler to build it with.
        LookupError: as `ops`.
    """
    device = torch.device(device)
    if cpu.unfit(device, dtype) is not None:
        return ops(device, dtype, kv=kv, attention=attention, heads=heads)
    chosen = {name: Chosen(BACKENDS[name][0], "once it is built") for name in CHOSEN}
    names = _names(None, attention)
    for name, first in chosen.items():
        if names[name] not in (None, first.backend.name):
            chosen[name] = choose(BACKENDS[name], device, dtype, names[name], kv, heads)
        elif why_not := first.backend.refuses(device, kv):
            if names[name] is not None:
                raise LookupError(f"no backend for {name}: {first.backend.name}: {why_not}")
            other = choose(BACKENDS[name][1:], device, dtype, kv=kv, asked=heads)
            chosen[name] = Chosen(other.backend, f"{first.backend.name}: {why_not}; {other.reason}")
    reads = chosen["paged_attention"].backend
    return Ops(**chosen, kv=cpu.expected_layout(dtype, kv) if reads.name == "cpu" else reads.kv(dtype, kv))


def describe(chosen: Ops) -> list[tuple[str, str, bool, str]]:
    """(op, backend, invariant, reason) for each op, to be printed."""
    pairs = [(name, getattr(chosen, name)) for name in CHOSEN]
    return [(name, c.backend.name, c.backend.invariant, c.reason) for name, c in pairs]


def start(device: torch.device | str, dtype: torch.dtype, quantized: bool = False, kv: str = "auto") -> bool:
    """Begins in the background what `ops` and products of `quantized` weights would wait for: the native build. Whether
    it will take seconds."""
    if torch.device(device).type != "cpu" or dtype not in cpu.ELEMENT:
        return False
    parts = cpu.parts(dtype, quantized, kv)
    building = not all(map(native.built, parts))
    for part in parts:
        threading.Thread(target=native.load, args=(part,), name=f"native build, {part}", daemon=True).start()
    return building
