"""Products that torch itself brings for GPUs (cuBLAS and CUTLASS), as backends called `torch`."""

# pyright: reportPrivateImportUsage=false, reportCallIssue=false
# (these operators have no public name in every supported torch)

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine.kernels import fp8, grouped, triton
from fnengine.kernels.contract import Backend, Contract
from fnengine.kernels.library import register

HOPPER = (9, 0)
"""Compute capability of the GPUs that torch's kernels of both kinds were written for."""
FEW = 64
"""Up to so many tokens memory is the limit, and Triton's kernel splits the channels of short weights to fill the card;
torch's has one program for each of its tiles."""


def _fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, n: int, wide: bool = False) -> Tensor:
    if x.is_cuda and len(x) <= FEW:
        return triton.fp8_linear.fn(x, codes, scales, bias, n, wide)
    dtype = torch.float32 if wide else x.dtype
    if not len(x):
        return torch.empty((0, n), dtype=dtype, device=x.device)
    rows, factor = triton.round_rows(x) if x.is_cuda else fp8.round_rows(x)
    y = torch._scaled_mm(
        rows.view(fp8.FP8), codes.view(fp8.FP8).T, factor[:, None], scales[None], out_dtype=torch.bfloat16
    )
    y = y[:, :n] if bias is None else y[:, :n] + bias
    return y.to(dtype, memory_format=torch.contiguous_format)


def _grouped_linear(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Rows that are no multiples of 16 bytes are copied at every call; no known model has such."""
    N, K = weight.shape[1:]
    if not len(x):
        return torch.empty((0, N), dtype=x.dtype, device=x.device)
    if N % 8 or K % 8:
        weight = F.pad(weight, (0, -K % 8, 0, -N % 8))
    if K % 8 or x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = F.pad(x, (0, -K % 8)) if K % 8 else x.clone(memory_format=torch.contiguous_format)
    return torch._grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])[:, :N].contiguous()


def _unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "torch's kernel is for GPUs"
    if dtype is not torch.bfloat16:
        return "torch's kernel gives bfloat16 only"
    return triton.unfit(device, dtype) or triton.older_than(device, HOPPER)


def _stands_in(call: Callable[[], Tensor]) -> Callable[[torch.device, torch.dtype], str | None]:
    @cache
    def missing() -> str | None:
        try:
            call()
        except (RuntimeError, AttributeError, NotImplementedError) as e:
            return f"this torch has it not on CPU: {str(e).splitlines()[0]}"
        return None

    def interpreted(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu" or dtype is not torch.bfloat16:
            return "torch's CPU form of it stands in for bfloat16 only"
        return missing()

    return interpreted


def _backend(op: Contract, fn: Callable[..., Tensor], note: str, probe: Callable[[], Tensor]) -> Backend:
    return Backend(
        "torch",
        op,
        register(op.name, "torch", fn),
        _unfit,
        False,
        lambda _dtype: note,
        interpreted=_stands_in(probe),
    )


def _probe_fp8() -> Tensor:
    x = torch.zeros(2, 16)
    return _fp8_linear(x.bfloat16(), *fp8.quantize(x), None, 2)


def _probe_grouped() -> Tensor:
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    return _grouped_linear(x, torch.tensor([0, 2], dtype=torch.int32), x[None])


fp8_linear = _backend(
    fp8.FP8_LINEAR, _fp8_linear, f"torch._scaled_mm, Triton's kernel for up to {FEW} tokens", _probe_fp8
)
"""Not invariant: torch picks its tiles by shape."""
grouped_linear = _backend(grouped.GROUPED_LINEAR, _grouped_linear, "torch._grouped_mm", _probe_grouped)
"""Not invariant, for the same reason."""
