"""Layers as pure functions over tensors; `spec` says which, `model` puts them in a row.

Tensors carry their dimension letters: T new tokens, D model width, H query heads, K KV heads, C head width, F
feed-forward width. Norms, rotary angles and activations are computed in float32 whatever the parameters' dtype.
Nothing here looks at a value, so a layer can be traced once for every batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnengine.kernels.rope import rms_norm
from fnengine.leaves import matmul
from fnengine.spec import Attention, Layer, LinearScaling, Llama3Scaling, Mlp, Rope
from fnengine.state import Pool, Where

if TYPE_CHECKING:
    from fnengine.kernels import Ops

Angles = tuple[Tensor, Tensor]
"""cos and sin, each [T, width / 2] float32."""


def layer(
    kind: Layer, params: dict[str, Any], pool: Pool, where: Where, angles: Angles, ops: Ops, x_TD: Tensor
) -> Tensor:
    """x_TD after one block.

    Donates: `pool`, in which the KV of the new tokens is written (all of them, before attention reads any).
    """
    x_TD = x_TD + attention(
        kind.mixer, params, pool, where, angles, ops, rms_norm(x_TD, params["norm1"], kind.eps), kind.eps
    )
    return x_TD + mlp(kind.mlp, params, rms_norm(x_TD, params["norm2"], kind.eps))


def attention(
    a: Attention,
    params: dict[str, Any],
    pool: Pool,
    where: Where,
    angles: Angles,
    ops: Ops,
    x_TD: Tensor,
    eps: float,
) -> Tensor:
    """Causal softmax attention of the new tokens over their rows' KV, projected back to [T, D]. Donates `pool`."""
    qkv_TE = matmul(params["qkv"], x_TD)
    norms = (params["q_norm"], params["k_norm"]) if a.qk_norm else (None, None)
    q_THC = ops.rope_write(qkv_TE, *norms, *angles, pool.k, pool.v, where.slot, eps)
    window = 0 if a.window is None else a.window
    sinks = params["sinks"] if a.sinks else None
    at = (where.table, where.row, where.start, where.length)
    o_THC = ops.paged_attention(q_THC, pool.k, pool.v, *at, a.scale, window, a.soft_cap, sinks)
    return matmul(params["o"], o_THC.flatten(1))


def mlp(m: Mlp, params: dict[str, Any], x_TD: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x))"""
    assert m.act == "silu", m.act
    gate_TF, up_TF = matmul(params["gate_up"], x_TD).split(m.width, dim=-1)
    return matmul(params["down"], (silu(gate_TF) * up_TF.float()).to(x_TD.dtype))


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) in float32.

    Spelled out: `F.silu` in fp32 on CPU gives other bits to elements at the ragged end of a thread's chunk (scalar exp
    there, vector exp elsewhere), so that a row's value would depend on how many rows stand beside it. `exp` does not.
    """
    x32 = x.float()
    return x32 / (1 + torch.exp(-x32))


def inverse_frequencies(rope: Rope, device: torch.device) -> Tensor:
    """[width / 2] float32: radians per position of each pair of channels."""
    exponent = torch.arange(0, rope.width, 2, device=device, dtype=torch.float32) / rope.width
    freq = 1.0 / (rope.theta**exponent)
    match rope.scaling:
        case None:
            return freq
        case LinearScaling(factor):
            return freq / factor
        case Llama3Scaling(factor, low, high, original):
            # Wavelengths beyond original/low are stretched by `factor`, those below original/high are left alone, and
            # the share of the unstretched frequency rises linearly in between.
            wavelength = 2 * math.pi / freq
            keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return (1 - keep) * freq / factor + keep * freq
    raise AssertionError(f"not a scaling: {rope.scaling}")


def rope_angles(rope: Rope, position_T: Tensor) -> Angles:
    """(cos, sin) of every token's rotary angles, [T, width / 2] float32; once a step for each distinct Rope."""
    angle = position_T.float()[:, None] * inverse_frequencies(rope, position_T.device)
    return angle.cos(), angle.sin()
