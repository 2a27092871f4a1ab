"""Layers with a state, as pure functions: the gated delta rule and Mamba 2.

Tensors carry their dimension letters, as in `kernels/recurrence.py`: T new tokens, G heads of q and k, H heads of v, C
and P channels of them, X channels of the convolution. What the recurrence reads, and its state, is float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fnengine import kernels
from fnengine.activations import sigmoid, silu, softplus
from fnengine.leaves import matmul
from fnengine.spec import DeltaNet, Mamba2, Recurrent
from fnengine.state import Memory, Where


def delta_net(d: DeltaNet, params: dict[str, Any], memory: Memory, where: Where, x_TD: Tensor, eps: float) -> Tensor:
    """The gated delta rule over the new tokens of each row, projected back to [T, D]. Donates `memory`."""
    G, H, C, P = d.key_heads, d.heads, d.key_width, d.width
    mixed_TX, z_TE, b_TH, a_TH = matmul(params["mix"], x_TD).split((d.channels, H * P, H, H), dim=-1)
    q_TE, k_TE, v_TE = silu(convolved(d, params, memory, where, mixed_TX)).split((G * C, G * C, H * P), dim=-1)
    q_TGC, k_TGC = unit(q_TE.unflatten(-1, (G, C))) * C**-0.5, unit(k_TE.unflatten(-1, (G, C)))
    decay_TH = torch.exp(-torch.exp(params["decay"].float()) * softplus(a_TH.float() + params["step_bias"].float()))
    o_THP = scanned(memory, where, q_TGC, k_TGC, v_TE.unflatten(-1, (H, P)), decay_TH, sigmoid(b_TH))
    o_THP = o_THP * torch.rsqrt(o_THP.square().mean(-1, keepdim=True) + eps) * params["gate_norm"].float()
    return matmul(params["o"], (o_THP.flatten(1) * silu(z_TE)).to(x_TD.dtype))


def mamba2(m: Mamba2, params: dict[str, Any], memory: Memory, where: Where, x_TD: Tensor, eps: float) -> Tensor:
    """Mamba 2 over the new tokens of each row, projected back to [T, D]. Donates `memory`."""
    G, H, C, P = m.groups, m.heads, m.key_width, m.width
    z_TE, mixed_TX, dt_TH = matmul(params["mix"], x_TD).split((H * P, m.channels, H), dim=-1)
    x_TE, b_TE, c_TE = silu(convolved(m, params, memory, where, mixed_TX)).split((H * P, G * C, G * C), dim=-1)
    x_THP, step_TH = x_TE.unflatten(-1, (H, P)), softplus(dt_TH.float() + params["step_bias"].float())
    step_TH = step_TH.clamp(m.least, m.most)
    decay_TH = torch.exp(-torch.exp(params["decay"].float()) * step_TH)
    q_TGC, k_TGC = c_TE.unflatten(-1, (G, C)), b_TE.unflatten(-1, (G, C))
    o_THP = scanned(memory, where, q_TGC, k_TGC, x_THP * step_TH[:, :, None], decay_TH, None)
    o_THP = o_THP + x_THP * params["skip"].float()[:, None]
    o_TGE = (o_THP.flatten(1) * silu(z_TE)).unflatten(-1, (G, -1))
    o_TE = (o_TGE * torch.rsqrt(o_TGE.square().mean(-1, keepdim=True) + eps)).flatten(1) * params["gate_norm"].float()
    return matmul(params["o"], o_TE.to(x_TD.dtype))


def convolved(m: Recurrent, params: dict[str, Any], memory: Memory, where: Where, x_TX: Tensor) -> Tensor:
    """x_TX after the short convolution over its row's tokens, float32. Donates `memory`'s tails."""
    bias_X = None if params["conv_bias"] is None else params["conv_bias"].float()
    weight_XY = params["conv"].float().view(m.channels, m.taps)
    return _chosen("causal_conv", x_TX.device)(x_TX.float(), weight_XY, bias_X, memory.tail, memory.heard, *_at(where))


def scanned(
    memory: Memory, where: Where, q_TGC: Tensor, k_TGC: Tensor, v_THP: Tensor, decay_TH: Tensor, beta_TH: Tensor | None
) -> Tensor:
    """What each token reads of its row's memory. Donates `memory`'s matrices."""
    two = memory.matrix, memory.noted
    return _chosen("gated_scan", v_THP.device)(q_TGC, k_TGC, v_THP, decay_TH, beta_TH, *two, *_at(where))


def take_in(m: Recurrent, memory: Memory, row_R: Tensor, behind_M: Tensor) -> None:
    """Lets the states of these rows take in what was noted of right guesses, as their next step would. Donates
    `memory`."""
    groups, delta = (m.key_heads, True) if isinstance(m, DeltaNet) else (m.groups, False)
    none = torch.zeros_like(row_R)
    where = Where(row_R, none.new_zeros(len(none) + 1), none, none, none, none + 1, none, none, behind_M)

    def no(*shape: int) -> Tensor:
        return memory.matrix.new_zeros(0, *shape)

    conv, scan = (_chosen(op, row_R.device) for op in ("causal_conv", "gated_scan"))
    weight_XY = memory.tail.new_zeros(m.channels, m.taps)
    conv(no(m.channels), weight_XY, None, memory.tail, memory.heard, *_at(where))
    q_TGC, rate_TH = no(groups, m.key_width), no(m.heads) if delta else None
    two = memory.matrix, memory.noted
    scan(q_TGC, q_TGC, no(m.heads, m.width), no(m.heads), rate_TH, *two, *_at(where))


def _at(where: Where) -> tuple[Tensor, ...]:
    """Where the new tokens of each row stand, as ops take it."""
    assert where.behind is not None and where.guessed is not None
    return where.row, where.start, where.length, where.behind, where.guessed


def unit(x: Tensor) -> Tensor:
    """x over its length, along the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def backends(device: torch.device) -> tuple[kernels.Backend, ...]:
    """What runs the recurrences on a device."""
    return tuple(_chosen(op, device).backend for op in ("causal_conv", "gated_scan"))


@cache
def _chosen(op: str, device: torch.device) -> kernels.Chosen:
    return kernels.choose(kernels.BACKENDS[op], device, torch.float32)
