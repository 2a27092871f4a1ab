"""The Triton backends: GPU kernels written in Python, imported (and compiled) when they are first called.

A file beside this one holds the kernels of one op and a function of the op's name that launches them. On a machine
without a GPU the same functions run in Triton's interpreter on tensors of the CPU, slowly, for tests: only a backend
that is asked for by name gets there (`Backend.interpreted`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from fnengine import environment
from fnengine.kernels.attention import PAGED_ATTENTION, Heads
from fnengine.kernels.contract import Backend, Contract
from fnengine.kernels.fp8 import FP8_LINEAR
from fnengine.kernels.grouped import GROUPED_LINEAR
from fnengine.kernels.layout import Codes, Fp8, KVLayout, Tokens
from fnengine.kernels.library import register
from fnengine.kernels.noise import GUMBEL_ARGMAX
from fnengine.kernels.penalties import PENALIZE
from fnengine.kernels.pool import COPY_BLOCKS
from fnengine.kernels.quantized import QUANTIZED_LINEAR
from fnengine.kernels.rope import ROPE_WRITE
from fnengine.kernels.truncation import APPLY_MASK, TRUNCATE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8_SINCE = (8, 9)
"""Compute capability of the first GPUs whose matrix units take 8-bit floats (Ada)."""


@cache
def installed() -> bool:
    """Whether the package is there; torch's CUDA builds bring it."""
    return find_spec("triton") is not None


def unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot serve this device and dtype, or None."""
    if device.type != "cuda":
        return "Triton's kernels run on GPUs"
    return _missing(dtype)


def _missing(dtype: torch.dtype) -> str | None:
    if not installed():
        return "triton is not installed; torch's CUDA builds bring it"
    return None if dtype in DTYPES else f"no kernels for {dtype}"


def interpreted(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's interpreter cannot stand in for a GPU here, or None."""
    if device.type != "cpu":
        return "the interpreter is for the CPU"
    if not environment.triton_interpreted():
        return "TRITON_INTERPRET=1 is not set; it must be before anything of Triton is imported"
    return _missing(dtype)


def unfit_for_fp8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products of 8-bit floats cannot run here, or None."""
    return unfit(device, dtype) or older_than(device, FP8_SINCE)


def older_than(device: torch.device, since: tuple[int, int]) -> str | None:
    """Why a GPU is none of at least this compute capability, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    has = torch.cuda.get_device_capability(device)
    wanted = ".".join(map(str, since))
    return None if has >= since else f"needs compute capability {wanted}, this GPU has {has[0]}.{has[1]}"


def layout(dtype: torch.dtype, kind: str) -> KVLayout:
    """How KV lies in the pool: a head's token in one piece."""
    kinds: dict[str, KVLayout] = {"auto": Tokens(), "int8": Codes(), "fp8": Fp8()}
    return kinds[kind]


def _latent(_device: torch.device, heads: Sequence[Heads]) -> str | None:
    return "no kernels for latent attention, whose values are its keys" if any(h.shares for h in heads) else None


def _lacks(device: torch.device, heads: Sequence[Heads]) -> str | None:
    return _latent(device, heads) or ("no kernels for chunks" if any(h.window < 0 for h in heads) else None)


def _too_old(device: torch.device, kind: str) -> str | None:
    if kind != "fp8" or device.type != "cuda" or not torch.cuda.is_available():
        return None
    why_not = older_than(device, FP8_SINCE)
    return why_not and f"fp8 {why_not}; int8 does not"


def _backend(
    op: Contract, module: str, invariant: bool, supports: Callable[..., str | None] = unfit, **more: Any
) -> Backend:
    def run(*args: Any, **kw: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), op.name)(*args, **kw)

    return Backend(
        "triton",
        op,
        register(op.name, "triton", run),
        supports,
        invariant,
        kv=layout,
        interpreted=interpreted,
        **more,
    )


paged_attention = _backend(PAGED_ATTENTION, "attention", invariant=True, refuses=_too_old, lacks=_lacks)
"""One shape of tile for prefill and decode, and KV cut at fixed positions: see `attention.py`."""

rope_write = _backend(ROPE_WRITE, "rope", invariant=True, refuses=_too_old, lacks=_latent)
"""Norm, rotation and KV write of all heads of a token, one launch."""

copy_blocks = _backend(COPY_BLOCKS, "pool", invariant=True)
quantized_linear = _backend(QUANTIZED_LINEAR, "quantized", invariant=False)
"""Not invariant: a row's sums are in one order for at most `tiles.FEW` tokens and in another for more."""
fp8_linear = _backend(FP8_LINEAR, "fp8", invariant=False, supports=unfit_for_fp8)
"""Not invariant, for the same reason."""
grouped_linear = _backend(GROUPED_LINEAR, "grouped", invariant=False)
"""Not invariant: the channels that are multiplied at once follow from the mean number of an expert's tokens."""
gumbel_argmax = _backend(GUMBEL_ARGMAX, "noise", invariant=True)
truncate = _backend(TRUNCATE, "truncation", invariant=True)
"""Where rows are cut, by integer sums, so that its tokens are the reference's."""
apply_mask = _backend(APPLY_MASK, "truncation", invariant=True)
penalize = _backend(PENALIZE, "penalties", invariant=True)
"""It counts in integers, so its logits are the reference's."""


def round_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `kernels.fp8.round_rows` for a tensor on a GPU, in one launch."""
    return import_module(f"{__name__}.fp8").round_rows(x_TK)
