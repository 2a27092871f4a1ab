"""Layers as pure functions over tensors; `spec` says which, `model` puts them in a row.

Tensors carry their dimension letters: T new tokens, D model width, H query heads, K KV heads, C head width, F
feed-forward width, E experts, J of them a token's, S = T J. Norms, rotary angles and activations are computed in
float32 whatever the parameters' dtype. Nothing here looks at a value, so a layer can be traced once for every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnengine import experts
from fnengine.host.step import BLOCK
from fnengine.kernels.rope import rms_norm
from fnengine.leaves import matmul
from fnengine.spec import (
    RMS,
    Act,
    Attention,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Mlp,
    MoE,
    Norm,
    Rope,
    YarnScaling,
)
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
    read_TD = normed(kind.norm, params, "norm1", kind.eps, x_TD) if kind.before else x_TD
    mixed_TD = attention(kind.mixer, params, pool, where, angles, ops, read_TD, kind.eps)
    if kind.parallel:
        if kind.parallel == "two norms":
            read_TD = normed(kind.norm, params, "norm2", kind.eps, x_TD)
        return (
            x_TD
            + given(kind, params, "after1", mixed_TD)
            + given(kind, params, "after2", feed_forward(kind.mlp, params, where, read_TD))
        )
    x_TD = x_TD + given(kind, params, "after1", mixed_TD)
    read_TD = normed(kind.norm, params, "norm2", kind.eps, x_TD) if kind.before else x_TD
    return x_TD + given(kind, params, "after2", feed_forward(kind.mlp, params, where, read_TD))


def given(kind: Layer, params: dict[str, Any], name: str, x_TD: Tensor) -> Tensor:
    """What a part of a block adds to the residual stream: its result, normed and scaled where the block says so."""
    if kind.after:
        x_TD = normed(kind.norm, params, name, kind.eps, x_TD)
    return x_TD if kind.scale == 1 else x_TD * kind.scale


def normed(n: Norm, params: dict[str, Any], name: str, eps: float, x: Tensor) -> Tensor:
    """x normed over its last dimension by the parameters `name` and `name`_bias, in float32, rounded once."""
    if n == RMS and len(params[name]) == x.shape[-1]:
        return rms_norm(x, params[name], eps)
    x32 = x.float()
    if n.centred:
        x32 = x32 - x32.mean(-1, keepdim=True)
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if n.weight:
        x32 = x32 * (params[name].float() + n.plus).view(-1, x.shape[-1])
    if n.bias:
        x32 = x32 + params[f"{name}_bias"].float()
    return x32.to(x.dtype)


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
    norms = (None, None)
    if a.qk_norm and a.qk_over == "head" and a.qk_as == RMS and not a.clip:
        norms = (params["q_norm"], params["k_norm"])  # the one kind that kernels know
    elif a.qk_norm:
        qkv_TE = normed_heads(a, params, eps, qkv_TE)
    if a.clip:
        qkv_TE = qkv_TE.clamp(-a.clip, a.clip)
    q_THC = ops.rope_write(qkv_TE, *norms, *angles, pool.k, pool.v, where.slot, eps)
    window = 0 if a.window is None else a.window
    sinks = params["sinks"] if a.sinks else None
    at = (where.table, where.row, where.start, where.length)
    o_THC = ops.paged_attention(q_THC, pool.k, pool.v, *at, a.scale, window, a.soft_cap, sinks)
    return matmul(params["o"], o_THC.flatten(1))


def normed_heads(a: Attention, params: dict[str, Any], eps: float, qkv_TE: Tensor) -> Tensor:
    """qkv_TE with queries and keys normed, and values as they are."""
    q, kv = a.heads * a.width, a.kv_heads * a.width
    q_TE, k_TE, v_TE = qkv_TE.split((q, kv, kv), dim=-1)

    def one(name: str, x_TE: Tensor) -> Tensor:
        if a.qk_over == "all":
            return normed(a.qk_as, params, name, eps, x_TE)
        return normed(a.qk_as, params, name, eps, x_TE.unflatten(-1, (-1, a.width))).flatten(-2)

    return torch.cat([one("q_norm", q_TE), one("k_norm", k_TE), v_TE], dim=-1)


def mlp(m: Mlp, params: dict[str, Any], x_TD: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x)), or down(act(up(x)))"""
    if not m.gated:
        return matmul(params["down"], ACTS[m.act](matmul(params["up"], x_TD)).to(x_TD.dtype))
    gate_TF, up_TF = matmul(params["gate_up"], x_TD).split(m.width, dim=-1)
    return matmul(params["down"], (ACTS[m.act](gate_TF) * up_TF.float()).to(x_TD.dtype))


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


def feed_forward(m: Mlp | MoE, params: dict[str, Any], where: Where, x_TD: Tensor) -> Tensor:
    """The second half of a layer, as its spec says."""
    return moe(m, params, where.slot, x_TD) if isinstance(m, MoE) else mlp(m, params, x_TD)


def moe(m: MoE, params: dict[str, Any], slot_T: Tensor, x_TD: Tensor) -> Tensor:
    """The weighted sum of what each token's experts make of it, and what the shared one does.

    Rows are sorted by expert, so that an expert's weights are read once for all of its tokens. Tokens of padding, which
    lie in the null block, go where the first token goes: they cost no expert of their own. The sum is float32, in the
    order in which experts were chosen, whatever other tokens there are.
    """
    chosen_TJ, weight_TJ = route(m, params, x_TD)
    T, S = x_TD.shape[0], x_TD.shape[0] * m.chosen
    chosen_TJ = torch.where((slot_T < BLOCK)[:, None], chosen_TJ[:1], chosen_TJ)
    offsets_E1, order_S, place_S = experts.arrange(chosen_TJ.reshape(S), m.experts)
    gate_up_SF = experts.grouped_matmul(params["experts_gate_up"], x_TD[order_S // m.chosen], offsets_E1)
    y_SD = experts.grouped_matmul(params["experts_down"], expert_act(m, gate_up_SF).to(x_TD.dtype), offsets_E1)
    place_TJ = place_S.view(T, m.chosen)
    y_TD = y_SD[place_TJ[:, 0]].float() * weight_TJ[:, :1]
    for j in range(1, m.chosen):
        y_TD = y_TD + y_SD[place_TJ[:, j]].float() * weight_TJ[:, j : j + 1]
    if not m.shared:
        return y_TD.to(x_TD.dtype)
    shared_TD = mlp(Mlp(m.shared), {name: params[f"shared_{name}"] for name in ("gate_up", "down")}, x_TD).float()
    if m.shared_gate:
        shared_TD = shared_TD * sigmoid(matmul(params["shared_gate"], x_TD))
    return (y_TD + shared_TD).to(x_TD.dtype)


def route(m: MoE, params: dict[str, Any], x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(experts of each token, best first, int32; their weights, float32), both [T, J]. Logits are rounded to the
    model's dtype where upstream's are, because that is what makes them equal or not."""
    logits_TE = matmul(params["router"], x_TD, wide=m.scores == "sigmoid").float()
    if m.scores == "sigmoid":
        score_TE = sigmoid(logits_TE)
    elif m.scores == "softmax":
        score_TE = softmax(logits_TE)
    else:
        assert m.scores == "logits", m.scores
        score_TE = logits_TE
    chosen_TJ = experts.top(eligible(m, params, score_TE), m.chosen)
    weight_TJ = score_TE.gather(1, chosen_TJ.long())
    if m.scores == "logits":
        weight_TJ = softmax(weight_TJ)
    elif m.normalized:
        weight_TJ = weight_TJ / (weight_TJ.sum(1, keepdim=True) + (1e-20 if m.scores == "sigmoid" else 0.0))
    return chosen_TJ, weight_TJ * m.factor


def eligible(m: MoE, params: dict[str, Any], score_TE: Tensor) -> Tensor:
    """What experts are chosen by: scores with their correction, -inf in groups that are not kept."""
    if m.correction:
        score_TE = score_TE + params["correction"].float()
    if m.kept == m.groups:
        return score_TE
    each_Gn = score_TE.view(-1, m.experts // m.groups)
    best_TG = each_Gn.gather(1, experts.top(each_Gn, 2).long()).sum(1).view(-1, m.groups)
    group_G = torch.arange(m.groups, device=score_TE.device, dtype=torch.int32)
    kept_TG = (experts.top(best_TG, m.kept)[:, :, None] == group_G).any(1)
    return score_TE.masked_fill(~kept_TG.repeat_interleave(m.experts // m.groups, 1), -math.inf)


def expert_act(m: MoE, gate_up_SF: Tensor) -> Tensor:
    """What an expert's down projection reads, float32."""
    if m.act == "silu":
        gate_SF, up_SF = gate_up_SF.split(m.width, dim=-1)
        return silu(gate_SF) * up_SF.float()
    assert m.act == "clamped", m.act
    gate_SF = gate_up_SF[:, ::2].float().clamp(max=m.limit)
    up_SF = gate_up_SF[:, 1::2].float().clamp(-m.limit, m.limit)
    return (up_SF + 1) * gate_SF * sigmoid(gate_SF * 1.702)


def softmax(x_TE: Tensor) -> Tensor:
    """Over the last dimension in float32, spelled out as `silu` is."""
    weight_TE = torch.exp(x_TE - x_TE.amax(-1, keepdim=True))
    return weight_TE / weight_TE.sum(-1, keepdim=True)


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
        case YarnScaling(factor, fast, slow, original, _, whole):

            def pair(turns: float) -> float:  # the pair of channels that turns so often in `original` positions
                return rope.width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

            first, last = pair(fast), pair(slow)
            first, last = (math.floor(first), math.ceil(last)) if whole else (first, last)
            first, last = max(first, 0), min(last, rope.width - 1)
            last += 0.001 if first == last else 0
            ramp = (torch.arange(rope.width // 2, device=device, dtype=torch.float32) - first) / (last - first)
            stretched = ramp.clamp(0, 1)
            return freq / factor * stretched + freq * (1 - stretched)
        case LongScaling(short, long, original, _, longest):
            factors = torch.tensor(long if longest > original else short, device=device, dtype=torch.float32)
            return 1.0 / (factors * rope.theta**exponent)  # rounded as upstream: an ulp is 0.006 rad at 100,000 tokens
    raise AssertionError(f"not a scaling: {rope.scaling}")


def rope_angles(rope: Rope | None, position_T: Tensor) -> Angles:
    """(cos, sin) of every token's rotary angles, [T, width / 2] float32; once a step for each distinct Rope.

    Where nothing rotates one pair of channels turns by 0, which leaves its bits, so that kernels need no second form.
    """
    if rope is None:
        still = torch.zeros(len(position_T), 1, device=position_T.device)
        return still + 1, still
    gain = rope.scaling.gain if isinstance(rope.scaling, (YarnScaling, LongScaling)) else 1.0
    angle = position_T.float()[:, None] * inverse_frequencies(rope, position_T.device)
    return (angle.cos(), angle.sin()) if gain == 1 else (angle.cos() * gain, angle.sin() * gain)
