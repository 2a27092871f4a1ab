"""Attention over the paged pool by torch's own `varlen_attn` (FlashAttention 3 or 4), as a backend called `torch`.

Only a choice by name comes here: FlashAttention takes other tiles for one query than for several, and splits KV by how
much work there is, so a query's bits depend on its company, and Triton's kernel, whose bits do not, stays the default.

torch has FlashAttention 2 built in, which reads pages of a multiple of 256 tokens; a block of ours has 16. The later
ones are packages of their own, which torch is told to use, for the whole process (`activate_flash_attention_impl`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnengine.kernels.attention import PAGED_ATTENTION, Heads
from fnengine.kernels.contract import Backend
from fnengine.kernels.library import register

DTYPES = (torch.bfloat16, torch.float16)


class Flash(NamedTuple):
    """A FlashAttention that reads pages of 16 tokens."""

    name: str
    """As torch calls it."""
    module: str
    """Python module that it comes with."""
    package: str
    widest: int
    """Most channels of a head over pages."""


FLASH = {
    9: Flash("FA3", "flash_attn_interface", "FlashAttention 3 (hopper/ of its repository)", 256),
    10: Flash("FA4", "flash_attn.cute.interface", "FlashAttention 4 (flash-attn-4)", 128),
}
"""Compute capability -> what serves it. torch refuses FA3 elsewhere, and FA4's pages on 9."""


def arguments(
    q_THC: Tensor,
    k_NBKC: Tensor,
    table_MP: Tensor,
    row_R: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    scale: float,
    window: int,
) -> dict[str, Any]:
    """Keyword arguments of `varlen_attn` beside queries and pools, from shapes and device tensors alone, so that a
    graph may hold the call.

    The most queries of a row are then all of them, and the longest row is as long as a table. A row of padding that is
    longer than its table ends with it; its queries see less, which nobody looks at. Offsets of keys are the block
    table's business.
    """
    longest = table_MP.shape[1] * k_NBKC.shape[1]
    return {
        "cu_seq_q": start_R1,
        "cu_seq_k": None,
        "max_q": len(q_THC),
        "max_k": longest,
        "scale": scale,
        "window_size": (window - 1 if window > 0 else -1, 0),  # what is seen to the left of a token, itself left out
        "enable_gqa": q_THC.shape[1] != k_NBKC.shape[2],
        "seqused_k": length_R.clamp(max=longest),
        "block_table": table_MP[row_R.long()],
    }


def varlen(*args: Any, **kw: Any) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, by the FlashAttention that fits the card."""
    _activate(FLASH[torch.cuda.get_device_capability(args[0].device)[0]].name)
    return _function()(*args, **kw)


@cache
def _activate(name: str) -> None:
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl(name)


@cache
def _function() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def paged(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: Tensor,
    row: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    sink: Tensor | None,
) -> Tensor:
    """See `PAGED_ATTENTION.doc`; soft caps and sinks are refused when the backend is chosen (`lacks`)."""
    assert soft_cap == 0 and sink is None, "varlen_attn has neither soft caps nor sinks"
    if not len(q):
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return varlen(q, k_pool, v_pool, **arguments(q, k_pool, table, row, start, length, scale, window)).contiguous()


def unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot serve this device and dtype, or None; nothing is activated to know it."""
    if device.type != "cuda":
        return "torch's varlen_attn runs on GPUs"
    if dtype not in DTYPES:
        return "torch's varlen_attn takes bfloat16 and float16"
    if (why_not := too_old()) is not None:
        return why_not
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    major, minor = torch.cuda.get_device_capability(device)
    if (flash := FLASH.get(major)) is None:
        return (
            "FlashAttention 2 reads pages of a multiple of 256 tokens, a block has 16; FlashAttention 3 and 4 need "
            f"compute capability 9.0 and 10.0, this GPU has {major}.{minor}"
        )
    if not installed(flash.module):
        return f"{flash.package} is not installed: no module {flash.module}"
    return None


def too_old(function: Callable[..., Any] | None = None) -> str | None:
    """Why the `varlen_attn` of this torch reads no pages, or None."""
    try:
        names = inspect.signature(function or _function()).parameters
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    missing = [name for name in ("enable_gqa", "seqused_k", "block_table") if name not in names]
    return (
        f"varlen_attn of torch {torch.__version__} has no {', '.join(missing)}; torch 2.12's has" if missing else None
    )


def installed(module: str) -> bool:
    """Whether a module is there."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a package that is not there, or is only half
        return False


def lacks(device: torch.device, heads: Sequence[Heads]) -> str | None:
    """What these layers need and it does not have, or how it fails on the device, or None."""
    flash = FLASH[torch.cuda.get_device_capability(device)[0]]
    if any(h.soft_cap > 0 for h in heads):
        return "varlen_attn has no soft caps, which this model's scores have"
    if any(h.shares for h in heads):
        return "varlen_attn reads values of their own, and this model's are its keys"
    if any(h.window < 0 for h in heads):
        return "varlen_attn has windows and no chunks, which this model's layers have"
    if any(h.sinks for h in heads):
        return "varlen_attn has no sinks, which this model's softmax has"
    if wrong := sorted({h.width for h in heads if h.width % 8 or h.width > flash.widest}):
        return f"{flash.name} takes heads of a multiple of 8, at most {flash.widest} channels, not {wrong[0]}"
    return _failure(device, flash.name)


def serves(example: dict[str, Any]) -> bool:
    """Whether attention of these inputs is among what it can do."""
    return example["soft_cap"] == 0 and example["sink_H"] is None and example["q_THC"].shape[2] % 8 == 0


@cache
def _failure(device: torch.device, name: str) -> str | None:
    """How a small call goes wrong, or None: packages differ in what they were built with."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*s, generator=g).bfloat16().to(device) for s in ((4, 2, 64), (4, 16, 1, 64), (4, 16, 1, 64)))
    at = [[[0, 3, 1], [2, 0, 0]], [1, 0], [0, 1, 4], [5, 20]]
    table, row, start, length = (torch.tensor(x, dtype=torch.int32, device=device) for x in at)
    given = (q, k, v, table, row, start, length, 0.125, 0, 0.0, None)
    try:
        worst = (paged(*given) - PAGED_ATTENTION.reference(*given)).abs().max().item()
    except Exception as e:  # whatever a foreign package raises is a reason
        return f"{name} failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    return None if worst < 0.05 else f"{name} is wrong by {worst:.2g} over pages of 16 tokens"


def _rounded(_device: torch.device, kind: str) -> str | None:
    return None if kind == "auto" else f"varlen_attn reads KV as it was computed, not in {kind}"


paged_attention = Backend(
    "torch",
    PAGED_ATTENTION,
    register(PAGED_ATTENTION.name, "torch", paged),
    unfit,
    invariant=False,
    note=lambda _dtype: "torch's varlen_attn, because it was asked for",
    refuses=_rounded,
    lacks=lacks,
    serves=serves,
    unless_named="fits, but its bits depend on company, so only --attention-backend torch takes it",
)
