"""Layers as pure functions over tensors; `spec` says which, `model` puts them in a row.

Tensors carry their dimension letters: T new tokens, D model width, H query heads, K KV heads, C head width, F
feed-forward width, E experts, J of them a token's, S = T J. Norms, rotary angles and activations are computed in
float32 whatever the parameters' dtype. Nothing here looks at a value, so a layer can be traced once for every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnengine import experts
from fnengine.activations import ACTS, sigmoid, softmax
from fnengine.host.step import BLOCK
from fnengine.kernels.attention import Heads
from fnengine.kernels.rope import apply_rope, rms_norm
from fnengine.leaves import matmul
from fnengine.recurrent import delta_net, mamba2
from fnengine.spec import (
    RMS,
    Attention,
    Both,
    DeltaNet,
    Half,
    Latent,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Mamba2,
    Mixer,
    Mlp,
    MoE,
    Norm,
    ProportionalScaling,
    Rope,
    Tempered,
    Turning,
    YarnScaling,
    sight,
)
from fnengine.state import LayerState, Memory, Pool, Where

if TYPE_CHECKING:
    from fnengine.kernels import Ops

Angles = tuple[Tensor, Tensor]
"""cos and sin, each [T, width / 2] float32."""


def asked_of_attention(mixer: Mixer) -> Heads:
    """What a layer's mixer needs of whoever does attention."""
    match mixer:
        case Attention():
            return Heads(mixer.width, sight(mixer), mixer.soft_cap, mixer.sinks)
        case Latent():
            return Heads(mixer.width, shares=True)


def layer(
    kind: Layer, params: dict[str, Any], state: LayerState, where: Where, angles: Angles, ops: Ops, x_TD: Tensor
) -> Tensor:
    """x_TD after one block.

    Donates: `state`, in which the KV of the new tokens is written (all of them, before attention reads any), or what
    their rows remember.
    """
    slot, table = where.of(kind.mixer)
    where = replace(where, slot=slot, table=table)
    x_TD = block(kind, params, partial(mix, kind, params, state, where, angles, ops), slot, x_TD)
    if kind.beside is not None:
        assert where.beside is not None, "the layer has an input of its own"
        gate_TP = ACTS[kind.beside.act](matmul(params["beside_gate"], x_TD))
        read_TP = (gate_TP * where.beside.float()).to(x_TD.dtype)
        x_TD = x_TD + normed(kind.norm, params, "beside_after", kind.eps, matmul(params["beside_out"], read_TP))
    return x_TD * params["scalar"] if kind.scaled else x_TD


def block(
    kind: Layer, params: dict[str, Any], mixed: Callable[[Tensor], Tensor], slot_T: Tensor, x_TD: Tensor
) -> Tensor:
    """x_TD after the two halves of a block, of which the first is `mixed`. `slot_T` is below `BLOCK` for tokens of
    padding."""
    read_TD = normed(kind.norm, params, "norm1", kind.eps, x_TD) if kind.before and not kind.bare else x_TD
    mixed_TD = mixed(read_TD)
    if kind.parallel:
        if kind.parallel == "two norms":
            read_TD = normed(kind.norm, params, "norm2", kind.eps, x_TD)
        return (
            x_TD
            + given(kind, params, "after1", mixed_TD)
            + given(kind, params, "after2", feed_forward(kind.mlp, params, slot_T, read_TD))
        )
    x_TD = joined(kind, params, "after1", x_TD, mixed_TD)
    if isinstance(kind.mlp, Both):
        return joined(kind, params, "after2", x_TD, both(kind.mlp, kind, params, slot_T, x_TD))
    read_TD = normed(kind.norm, params, "norm2", kind.eps, x_TD) if kind.before else x_TD
    return joined(kind, params, "after2", x_TD, feed_forward(kind.mlp, params, slot_T, read_TD))


def joined(kind: Layer, params: dict[str, Any], name: str, x_TD: Tensor, part_TD: Tensor) -> Tensor:
    """The residual stream after a part of a block."""
    if kind.onto:
        return normed(kind.norm, params, name, kind.eps, x_TD + part_TD)
    return x_TD + given(kind, params, name, part_TD)


def mix(
    kind: Layer, params: dict[str, Any], state: LayerState, where: Where, angles: Angles, ops: Ops, x_TD: Tensor
) -> Tensor:
    """What the first half of a layer makes of x_TD, as its spec says. Donates `state`."""
    match kind.mixer:
        case Attention() | Latent() as a:
            assert isinstance(state, Pool)
            q_THC, gate_TE = queries(a, params, state, where, angles, ops, x_TD, kind.eps)
            return attended(a, params, state, where, ops, q_THC, gate_TE)
        case DeltaNet() as d:
            assert isinstance(state, Memory)
            return delta_net(d, params, state, where, x_TD, kind.eps)
        case Mamba2() as m:
            assert isinstance(state, Memory)
            return mamba2(m, params, state, where, x_TD, kind.eps)
    raise AssertionError(f"not a mixer: {kind.mixer}")


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


def queries(
    a: Attention | Latent,
    params: dict[str, Any],
    pool: Pool,
    where: Where,
    angles: Angles,
    ops: Ops,
    x_TD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """(q_THC, what the new tokens ask, rotated; what the answers are gated by, if anything). Donates `pool`, to which
    their keys and values are written."""
    if isinstance(a, Latent):
        return latent_queries(a, params, pool, where, angles, ops, x_TD), None
    turning, temperature_T = apart(a.rope, angles)
    qkv_TE, gate_TE = matmul(params["qkv"], x_TD), None
    if a.borrows:
        q_THC = qkv_TE.unflatten(1, (a.heads, a.width))
        if a.qk_norm:
            q_THC = normed(a.qk_as, params, "q_norm", eps, q_THC)
        return tempered(apply_rope(q_THC, *turning), temperature_T), None
    if a.doubles or a.v_norm:
        qkv_TE = with_values(a, eps, qkv_TE)
    if a.gated:
        qkv_TE, gate_TE = qkv_TE.split(((a.heads + 2 * a.kv_heads) * a.width, a.heads * a.width), dim=-1)
    norms = (None, None)
    if a.qk_norm and a.qk_over == "head" and a.qk_as == RMS and not a.clip:
        norms = (params["q_norm"], params["k_norm"])  # the one kind that kernels know
    elif a.qk_norm:
        qkv_TE = normed_heads(a, params, eps, qkv_TE)
    if a.clip:
        qkv_TE = qkv_TE.clamp(-a.clip, a.clip)
    q_THC = ops.rope_write(qkv_TE, *norms, *turning, pool.k, pool.v, where.slot, eps)
    return tempered(q_THC, temperature_T), gate_TE


def with_values(a: Attention, eps: float, qkv_TE: Tensor) -> Tensor:
    """qkv_TE with values that are the keys where there are no others, and are normed where they are."""
    kv = a.kv_heads * a.width
    qk_TE, v_TE = (qkv_TE, qkv_TE[:, -kv:]) if a.doubles else qkv_TE.split((qkv_TE.shape[1] - kv, kv), dim=-1)
    if a.v_norm:
        v_TE = normed(Norm(weight=False), {}, "", eps, v_TE.unflatten(-1, (-1, a.width))).flatten(-2)
    return torch.cat([qk_TE, v_TE], dim=-1)


def apart(rope: Turning, angles: Angles) -> tuple[Angles, Tensor | None]:
    """(the angles that rotate, the temperature that stands behind their cosines, [T], if there is one)."""
    if not isinstance(rope, Tempered):
        return angles, None
    cos, sin = (x[:, :-1].contiguous() for x in angles)
    return (cos, sin), angles[0][:, -1]


def tempered(q_THC: Tensor, temperature_T: Tensor | None) -> Tensor:
    """Queries times the temperature of their positions."""
    return q_THC if temperature_T is None else (q_THC.float() * temperature_T[:, None, None]).to(q_THC.dtype)


def attended(
    a: Attention | Latent,
    params: dict[str, Any],
    pool: Pool,
    where: Where,
    ops: Ops,
    q_THC: Tensor,
    gate_TE: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of queries over their rows' KV, gated, projected back to [T, D]."""
    at = (where.table, where.row, where.start, where.length)
    if isinstance(a, Latent):
        o_THC = ops.paged_attention(q_THC, pool.k, pool.v, *at, a.scale, 0, 0.0, None)
        return matmul(params["o"], each_head(params["v_up"], o_THC[..., a.turning :]).flatten(1))
    sinks = params["sinks"] if a.sinks else None
    o_TE = ops.paged_attention(q_THC, pool.k, pool.v, *at, a.scale, sight(a), a.soft_cap, sinks).flatten(1)
    if gate_TE is not None:
        o_TE = (o_TE.float() * sigmoid(gate_TE)).to(o_TE.dtype)
    return matmul(params["o"], o_TE)


def latent_queries(
    a: Latent, params: dict[str, Any], pool: Pool, where: Where, angles: Angles, ops: Ops, x_TD: Tensor
) -> Tensor:
    """q_THC: what the new tokens ask of latents. Donates `pool`, to which their own are written."""
    if a.query_rank:
        q_TE = matmul(params["q_up"], rms_norm(matmul(params["q_down"], x_TD), params["q_norm"], a.eps))
    else:
        q_TE = matmul(params["q"], x_TD)
    still_THC, turning_THC = q_TE.unflatten(1, (a.heads, -1)).split((a.still, a.turning), dim=-1)
    latent_TE, key_TE = matmul(params["kv_down"], x_TD).split((a.rank, a.turning), dim=-1)
    heads_THC = torch.cat([turning_THC, each_head(params["k_up"], still_THC)], dim=-1)
    qk_TE = torch.cat([heads_THC.flatten(1), key_TE, rms_norm(latent_TE, params["kv_norm"], a.eps)], dim=-1)
    return ops.rope_write(qk_TE, None, None, *angles, pool.k, pool.v, where.slot, a.eps)


def each_head(leaf: experts.Experts | experts.TiledExperts, x_THC: Tensor) -> Tensor:
    """y_THC: the rows of each head times a matrix of its own, as experts are multiplied."""
    T, H, _ = x_THC.shape
    offsets_H1 = torch.arange(H + 1, device=x_THC.device, dtype=torch.int32) * T
    y_SC = experts.grouped_matmul(leaf, x_THC.transpose(0, 1).flatten(0, 1), offsets_H1)
    return y_SC.unflatten(0, (H, T)).transpose(0, 1)


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


def both(m: Both, kind: Layer, params: dict[str, Any], slot_T: Tensor, x_TD: Tensor) -> Tensor:
    """What an MLP and experts beside it make of the same x_TD, each half with norms of its own."""

    def norm(name: str, x_TD: Tensor) -> Tensor:
        return normed(kind.norm, params, name, kind.eps, x_TD)

    dense_TD = norm("dense_after", mlp(m.dense, params, norm("norm2", x_TD)))
    seen_TD = rms_norm(x_TD, params["router_scale"], kind.eps) * x_TD.shape[1] ** -0.5
    routed_TD = moe(m.routed, params, slot_T, norm("routed_norm", x_TD), seen_TD)
    return dense_TD + norm("routed_after", routed_TD)


def feed_forward(m: Half, params: dict[str, Any], slot_T: Tensor, x_TD: Tensor) -> Tensor:
    """The second half of a layer, as its spec says; that of `Both` is `both`, because it reads x through two norms."""
    assert not isinstance(m, Both), m
    return moe(m, params, slot_T, x_TD) if isinstance(m, MoE) else mlp(m, params, x_TD)


def moe(m: MoE, params: dict[str, Any], slot_T: Tensor, x_TD: Tensor, seen_TD: Tensor | None = None) -> Tensor:
    """The weighted sum of what each token's experts make of it, and what the shared one does. `seen_TD` is what the
    router reads, if not x_TD.

    Rows are sorted by expert, so that an expert's weights are read once for all of its tokens. Tokens of padding, which
    lie in the null block, go where the first token goes: they cost no expert of their own. The sum is float32, in the
    order in which experts were chosen, whatever other tokens there are.
    """
    chosen_TJ, weight_TJ = route(m, params, x_TD if seen_TD is None else seen_TD)
    T, S = x_TD.shape[0], x_TD.shape[0] * m.chosen
    chosen_TJ = torch.where((slot_T < BLOCK)[:, None], chosen_TJ[:1], chosen_TJ)
    offsets_E1, order_S, place_S = experts.arrange(chosen_TJ.reshape(S), m.experts)
    x_SD = x_TD[order_S // m.chosen]
    if m.early:
        x_SD = (x_SD.float() * weight_TJ.reshape(S, 1)[order_S]).to(x_TD.dtype)
        weight_TJ = torch.ones_like(weight_TJ)
    gate_up_SF = experts.grouped_matmul(params["experts_gate_up"], x_SD, offsets_E1)
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
    logits_TE = matmul(params["router"], x_TD, wide=m.wide or m.scores == "sigmoid").float()
    if m.scores == "sigmoid":
        score_TE = sigmoid(logits_TE)
    elif m.scores == "softmax":
        score_TE = softmax(logits_TE)
    else:
        assert m.scores in ("logits", "near", "gates"), m.scores
        score_TE = logits_TE
    chosen_TJ = experts.top(eligible(m, params, score_TE), m.chosen)
    if m.scores == "near":
        return chosen_TJ, near_weights(m, score_TE, chosen_TJ) * m.factor
    weight_TJ = score_TE.gather(1, chosen_TJ.long())
    if m.scores == "logits":
        weight_TJ = softmax(weight_TJ)
    elif m.scores == "gates":
        weight_TJ = sigmoid(weight_TJ)
    elif m.normalized:
        weight_TJ = weight_TJ / (weight_TJ.sum(1, keepdim=True) + (1e-20 if m.scores == "sigmoid" else 0.0))
    if m.scaled:
        weight_TJ = weight_TJ * params["expert_scale"].float()[chosen_TJ.long()]
    return chosen_TJ, weight_TJ * m.factor


def near_weights(m: MoE, score_TE: Tensor, chosen_TJ: Tensor) -> Tensor:
    """weight_TJ: of each chosen expert in a softmax over the logits that are near to its own, without those of experts
    that were chosen before it.

    Source: SparseMixer-v2, as it is evaluated (Liu et al. 2024, arXiv 2409.12136).
    """
    weights, left_TE = [], score_TE
    for j in range(m.chosen):
        one_T1 = chosen_TJ[:, j : j + 1].long()
        best_T1 = score_TE.gather(1, one_T1)
        far_TE = (best_T1 - score_TE) / torch.maximum(score_TE.abs(), best_T1) > m.near
        weights.append(1 / torch.exp(left_TE.masked_fill(far_TE, -math.inf) - best_T1).sum(1, keepdim=True))
        left_TE = left_TE.scatter(1, one_T1, -math.inf)
    return torch.cat(weights, 1)


def eligible(m: MoE, params: dict[str, Any], score_TE: Tensor) -> Tensor:
    """What experts are chosen by: scores with their correction, -inf in groups that are not kept."""
    if m.correction:
        score_TE = score_TE + params["correction"]
    if m.kept == m.groups:
        return score_TE
    each_Gn = score_TE.view(-1, m.experts // m.groups)
    best_TG = each_Gn.gather(1, experts.top(each_Gn, m.best).long()).sum(1).view(-1, m.groups)
    group_G = torch.arange(m.groups, device=score_TE.device, dtype=torch.int32)
    kept_TG = (experts.top(best_TG, m.kept)[:, :, None] == group_G).any(1)
    return score_TE.masked_fill(~kept_TG.repeat_interleave(m.experts // m.groups, 1), -math.inf)


def expert_act(m: MoE, gate_up_SF: Tensor) -> Tensor:
    """What an expert's down projection reads, float32."""
    if m.act != "clamped":
        gate_SF, up_SF = gate_up_SF.split(m.width, dim=-1)
        return ACTS[m.act](gate_SF) * up_SF.float()
    gate_SF = gate_up_SF[:, ::2].float().clamp(max=m.limit)
    up_SF = gate_up_SF[:, 1::2].float().clamp(-m.limit, m.limit)
    return (up_SF + 1) * gate_SF * sigmoid(gate_SF * 1.702)


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
        case ProportionalScaling(pairs, factor):
            index = torch.arange(rope.width // 2, device=device)
            return torch.where(index < pairs, freq / factor, torch.zeros_like(freq))
        case LongScaling(short, long, original, _, longest):
            factors = torch.tensor(long if longest > original else short, device=device, dtype=torch.float32)
            return 1.0 / (factors * rope.theta**exponent)  # rounded as upstream: an ulp is 0.006 rad at 100,000 tokens
    raise AssertionError(f"not a scaling: {rope.scaling}")


def rope_angles(rope: Turning, position_T: Tensor) -> Angles:
    """(cos, sin) of every token's rotary angles, [T, width / 2] float32; once a step for each distinct Rope.

    Where nothing rotates one pair of channels turns by 0, which leaves its bits, so that kernels need no second form.
    A temperature stands behind the cosines, in a column of its own.
    """
    if rope is None:
        still = torch.zeros(len(position_T), 1, device=position_T.device)
        return still + 1, still
    if isinstance(rope, Tempered):
        times_T = torch.floor((position_T.float() + rope.first) / rope.every)
        temperature_T1 = (torch.log1p(times_T) * rope.scale + 1)[:, None]
        cos, sin = rope_angles(rope.rope, position_T)
        return torch.cat([cos, temperature_T1], 1), torch.cat([sin, torch.zeros_like(temperature_T1)], 1)
    gain = rope.scaling.gain if isinstance(rope.scaling, (YarnScaling, LongScaling)) else 1.0
    angle = position_T.float()[:, None] * inverse_frequencies(rope, position_T.device)
    return (angle.cos(), angle.sin()) if gain == 1 else (angle.cos() * gain, angle.sin() * gain)
