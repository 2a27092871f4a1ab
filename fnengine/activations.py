"""Activations in float32 whose bits do not depend on where an element stands among others.

Each is spelled in operations that torch computes alike at the ragged end of a thread's chunk: see `silu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fnengine.spec import Act


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) in float32.

    Spelled out: `F.silu` in fp32 on CPU gives other bits to elements at the ragged end of a thread's chunk (scalar exp
    there, vector exp elsewhere), so that a row's value would depend on how many rows stand beside it. `exp` does not.
    """
    x32 = x.float()
    return x32 / (1 + torch.exp(-x32))


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) in float32."""
    x32 = x.float()
    return x32 * 0.5 * (1 + torch.erf(x32 * math.sqrt(0.5)))


def gelu_tanh(x: Tensor) -> Tensor:
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), in float32; as x * sigmoid(2 u), see `silu`."""
    x32 = x.float()
    u = math.sqrt(2 / math.pi) * (x32 + 0.044715 * x32 * x32 * x32)
    return x32 / (1 + torch.exp(-2 * u))


def relu(x: Tensor) -> Tensor:
    """max(x, 0) in float32."""
    return x.float().clamp(min=0)


ACTS: dict[Act, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
}


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)"""
    return cap * torch.tanh(x / cap)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) in float32, spelled out as `silu` is."""
    return 1 / (1 + torch.exp(-x.float()))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in float32, which does not overflow."""
    x32 = x.float()
    return x32.clamp(min=0) + torch.log1p(torch.exp(-x32.abs()))


def softmax(x_TE: Tensor) -> Tensor:
    """Over the last dimension in float32, spelled out as `silu` is."""
    weight_TE = torch.exp(x_TE - x_TE.amax(-1, keepdim=True))
    return weight_TE / weight_TE.sum(-1, keepdim=True)
