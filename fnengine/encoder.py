"""The forward of a model that reads texts whole: `encode`, a pure function over a ragged batch, and what is made of it.

    hidden_TD = encode(spec, params, token_T, start_S1, type_T)     # text s is start[s] <= t < start[s + 1]
    vector_SD = pooled(spec.whole.pooling, hidden_TD, start_S1)
    labels_SN = judged(spec, params, vector_SD), or bridged(spec, params, vector_SD)

There is no pool and no state: keys and values live as long as their layer runs. Attention stays within a text, so what
is computed of it does not depend on its company, bit by bit where products keep rows apart (`leaves.matmul`). Tokens
beyond the last text are padding. S texts, N labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnengine import kernels
from fnengine.host.step import BLOCK
from fnengine.kernels import Chosen, Heads
from fnengine.kernels.rope import apply_rope
from fnengine.layers import ACTS, Angles, apart, block, normed, normed_heads, rope_angles, tempered
from fnengine.leaves import matmul
from fnengine.model import embed, final_norm
from fnengine.spec import Attention, Layer, ModelSpec, Turning

Attend = Callable[..., Tensor]
"""See `kernels.whole.WHOLE_ATTENTION`."""
RunLayer = Callable[[Layer, Any, Tensor, Tensor, Angles, Attend, Tensor], Tensor]
"""(layer, its params, start_S1, slot_T, angles, attend, x_TD) -> x_TD after it: `layer`, or a compiled form of it."""


def attention_for(spec: ModelSpec, device: torch.device, dtype: torch.dtype, only: str | None = None) -> Chosen:
    """The backend that attends within whole texts for a model, with its reason."""
    mixers = [kind.mixer for kind in spec.layers if isinstance(kind.mixer, Attention)]
    asked = [Heads(a.width, a.window or 0, a.soft_cap, a.sinks) for a in mixers]
    return kernels.choose(kernels.BACKENDS["whole_attention"], device, dtype, only, asked=asked)


def layer(
    kind: Layer,
    params: dict[str, Any],
    start_S1: Tensor,
    slot_T: Tensor,
    angles: Angles,
    attend: Attend,
    x_TD: Tensor,
) -> Tensor:
    """x_TD after one block over whole texts. `slot_T` is below `BLOCK` for tokens of padding, which experts ask."""

    a = kind.mixer
    assert isinstance(a, Attention) and not a.gated, a  # `families.whole.of` refuses models with others

    def mix(read_TD: Tensor) -> Tensor:
        return attention(a, params, start_S1, angles, attend, read_TD, kind.eps)

    return block(kind, params, mix, slot_T, x_TD)


def attention(
    a: Attention, params: dict[str, Any], start_S1: Tensor, angles: Angles, attend: Attend, x_TD: Tensor, eps: float
) -> Tensor:
    """Softmax attention of every token over its own text, projected back to [T, D]."""
    qkv_TE = matmul(params["qkv"], x_TD)
    if a.qk_norm:
        qkv_TE = normed_heads(a, params, eps, qkv_TE)
    if a.clip:
        qkv_TE = qkv_TE.clamp(-a.clip, a.clip)
    q_THC, k_TKC, v_TKC = qkv_TE.unflatten(1, (-1, a.width)).split((a.heads, a.kv_heads, a.kv_heads), dim=1)
    if a.rope is not None:
        turning, temperature_T = apart(a.rope, angles)
        q_THC, k_TKC = tempered(apply_rope(q_THC, *turning), temperature_T), apply_rope(k_TKC, *turning)
    window = 0 if a.window is None else a.window
    sinks = params["sinks"] if a.sinks else None
    o_THC = attend(q_THC, k_TKC, v_TKC, start_S1, a.scale, window, a.soft_cap, sinks, a.causal)
    return matmul(params["o"], o_THC.flatten(1))


def encode(
    spec: ModelSpec,
    params: dict[str, Any],
    token_T: Tensor,
    start_S1: Tensor,
    type_T: Tensor | None = None,
    *,
    attend: Attend | None = None,
    run_layer: RunLayer = layer,
) -> Tensor:
    """What the last layer says of every token, [T, D], after the last norm if there is one.

    Args:
        token_T: token ids, on the device of `params`.
        start_S1: int32 on the host: where each text begins, and where the last one ends.
        type_T: which text of a pair a token is of, 0 or 1; None: all are of the first.
        attend: a backend of `kernels.BACKENDS["whole_attention"]`; None takes the best.
    """
    whole = spec.whole
    assert whole is not None, f"{spec.architecture} is a language model: see `step`"
    attend = attend or attention_for(spec, token_T.device, params["embed"].weight.dtype)
    position_T, slot_T = (x.to(token_T.device) for x in _places(start_S1, len(token_T)))
    x_TD = embed(spec, params, token_T, position_T)
    if whole.types:
        types = params["types"]
        x_TD = x_TD + (types[torch.zeros_like(token_T) if type_T is None else type_T])
    if whole.norm is not None:
        x_TD = normed(whole.norm, params, "embed_norm", spec.eps, x_TD)
    angles: dict[Turning, Angles] = {}
    for kind, p in zip(spec.layers, params["layers"], strict=True):
        rope = kind.mixer.rope
        if rope not in angles:
            angles[rope] = rope_angles(rope, position_T)
        x_TD = run_layer(kind, p, start_S1, slot_T, angles[rope], attend, x_TD)
    return final_norm(spec, params, x_TD) if whole.final else x_TD


def _places(start_S1: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """(position of each token in its text, `BLOCK`; for padding 0 and 0), int32 on the host."""
    size_S = start_S1.diff()
    n = int(start_S1[-1])
    position = torch.arange(n, dtype=torch.int32) - start_S1[:-1].repeat_interleave(size_S)
    beyond = torch.zeros(T - n, dtype=torch.int32)
    return torch.cat([position, beyond]), torch.cat([torch.full_like(position, BLOCK), beyond])


def pooled(pooling: str, x_TD: Tensor, start_S1: Tensor) -> Tensor:
    """One vector of each text, [S, D] float32: its last token's, its first's (`cls`), or the mean of all."""
    start = start_S1.tolist()
    pairs = list(itertools.pairwise(start))
    if pooling == "mean":
        return torch.stack([x_TD[a:b].float().sum(0) / (b - a) for a, b in pairs])
    at = [b - 1 if pooling == "last" else a for a, b in pairs]
    assert pooling in ("last", "cls"), pooling
    return x_TD[torch.tensor(at, device=x_TD.device)].float()


def judged(spec: ModelSpec, params: dict[str, Any], vector_SD: Tensor) -> Tensor:
    """[S, N] float32: the number of each label, nothing made of them yet."""
    assert spec.whole is not None and spec.whole.head is not None, "this model has no labels"
    head = spec.whole.head
    x_SD = vector_SD.to(params["embed"].weight.dtype)
    if head.dense:
        dense_SD = matmul(params["label_dense"], x_SD)
        x_SD = (torch.tanh(dense_SD.float()) if head.act == "tanh" else ACTS[head.act](dense_SD)).to(x_SD.dtype)
    if head.norm is not None:
        x_SD = normed(head.norm, params, "label_norm", spec.eps, x_SD)
    return matmul(params["label_out"], x_SD, wide=True).float()


def bridged(spec: ModelSpec, params: dict[str, Any], vector_SD: Tensor) -> Tensor:
    """[S, D'] float32: the vectors after the layers that sentence-transformers puts behind the model."""
    assert spec.whole is not None
    for i, bridge in enumerate(spec.whole.bridges):
        x_SD = matmul(params[f"bridge{i}"], vector_SD.to(params["embed"].weight.dtype), wide=True).float()
        if bridge.act == "tanh":
            x_SD = torch.tanh(x_SD)
        vector_SD = x_SD if bridge.act in ("identity", "tanh") else ACTS[bridge.act](x_SD)
    return vector_SD


def read(
    spec: ModelSpec,
    params: dict[str, Any],
    token_T: Tensor,
    start_S1: Tensor,
    type_T: Tensor | None,
    asked: Sequence[str],
    **how: Any,
) -> list[Tensor]:
    """What each text asks for, float32: a pooling its embedding, `labels` the number of each label.

    Args:
        how: as `encode` takes it.
    """
    hidden_TD = encode(spec, params, token_T, start_S1, type_T, **how)
    found: list[Tensor] = [hidden_TD] * len(asked)
    for ask in dict.fromkeys(asked):
        head = spec.whole.head if spec.whole is not None and ask == "labels" else None
        vector_SD = pooled(ask if head is None else head.pooling, hidden_TD, start_S1)
        made = bridged(spec, params, vector_SD) if head is None else judged(spec, params, vector_SD)
        found = [made[s] if a == ask else old for s, (a, old) in enumerate(zip(asked, found, strict=True))]
    return found
