"""The Triton backends: GPU kernels written in Python, imported (and compiled) when they are first called.

A file beside this one holds the kernels of one op and a function of the op's name that launches them. On a machine
without a GPU the same functions run in Triton's interpreter on tensors of the CPU, slowly, for tests: only a backend
that is asked for by name gets there (`Backend.interpreted`).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from fnengine import environment
from fnengine.kernels.contract import Backend, Contract
from fnengine.kernels.library import register
from fnengine.kernels.noise import GUMBEL_ARGMAX
from fnengine.kernels.pool import COPY_BLOCKS
from fnengine.kernels.truncation import APPLY_MASK, TRUNCATE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def _backend(op: Contract, module: str, invariant: bool, **more: Any) -> Backend:
    def run(*args: Any, **kw: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), op.name)(*args, **kw)

    return Backend(
        "triton",
        op,
        register(op.name, "triton", run),
        unfit,
        invariant,
        interpreted=interpreted,
        **more,
    )


copy_blocks = _backend(COPY_BLOCKS, "pool", invariant=True)

gumbel_argmax = _backend(GUMBEL_ARGMAX, "noise", invariant=True)
truncate = _backend(TRUNCATE, "truncation", invariant=True)
"""Where rows are cut, by integer sums, so that its tokens are the reference's."""
apply_mask = _backend(APPLY_MASK, "truncation", invariant=True)
