"""Multi-token prediction: the extra layer that some checkpoints ship, trained with the model, as a proposer.

    x = project(norm(hidden state of token i) ++ norm(embedding of token i + 1))
    y = norm(decoder layer(x));    logits of token i + 2 = the model's own head (y)

The hidden state of a token that the target has computed is the one that its head reads. A layer that predicts one token
ahead drafts more by being used again on its own output, as vLLM and SGLang do.
Source: DeepSeek-V3 (arXiv 2412.19437), section 2.2; MiMo-7B (arXiv 2505.07608) and its modeling code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fnengine.decoding.heads import Found, Head, Wiring, embedding, normed, shared_head
from fnengine.leaves import matmul
from fnengine.model import Model
from fnengine.spec import Layer


@dataclass(frozen=True)
class Layout:
    """Where a family keeps the tensors of its MTP layer, and what it does otherwise than others."""

    layer: str
    """Prefix of the decoder layer's tensors; `{i}` is the MTP layer's number, `{n}` the number of the model's layers
    and it together."""
    token_norm: str
    hidden_norm: str
    project: str
    norm: str
    """All four below `layer`, without `.weight`."""
    hidden_first: bool
    """The projection reads the hidden state before the embedding."""
    feeds_normed: bool
    """The next drafted pair's hidden state is y, not what is normed to it."""


MIMO = Layout(
    "model.mtp_layers.{i}.", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm", True, True
)
DEEPSEEK = Layout("model.layers.{n}.", "enorm", "hnorm", "eh_proj", "shared_head.norm", False, False)
"""Also GLM-4-MoE's. Its decoder layer has to be of a kind that the engine has, which DeepSeek-V3's own is not."""


def read(
    tensors: Mapping[str, Tensor],
    target: Model,
    layout: Layout = MIMO,
    *,
    number: int = 0,
    kind: Layer | None = None,
    claims: bool = False,
    where: str = "mtp",
) -> Head:
    """The MTP layer among a checkpoint's tensors. What belongs to the model itself is not looked at.

    Args:
        number: which of several MTP layers.
        kind: its decoder layer, where that is not like the model's last one.
        where: for errors.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    spec = target.spec
    D, kind = spec.width, kind or spec.layers[-1]
    at = layout.layer.format(i=number, n=len(spec.layers) + number)
    found = Found(tensors, target, where)
    params = found.layer(kind, at, D)
    token_norm, hidden_norm, norm1, norm = (
        found.array(f"{at}{name}.weight", D)
        for name in (layout.token_norm, layout.hidden_norm, "input_layernorm", layout.norm)
    )
    project, output = found.linear([f"{at}{layout.project}"], (D,), 2 * D), shared_head(target)

    embed = embedding(target, token_norm, kind.eps)

    def enter(token: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        e, h = embed(token), normed(hidden, hidden_norm, kind.eps)
        x = matmul(project, torch.cat((h, e) if layout.hidden_first else (e, h), -1))
        return normed(x, norm1, kind.eps), x

    def leave(x: Tensor) -> tuple[Tensor, Tensor]:
        y = normed(x, norm, kind.eps)
        return (y if layout.feeds_normed else x), matmul(output, y, wide=True)

    wiring = Wiring(lambda seen: seen[0], enter, leave)
    return Head(target, ("final",), kind, params, wiring, claims, "mtp", sum(found.taken))
