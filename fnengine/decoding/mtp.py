"""Multi-token prediction: the extra layer that some checkpoints ship, trained with the model, as a proposer.

    head = mtp.load(model)
    speculate(Runtime(model), prompt, head, k=2)

    x = project(norm(hidden state of token i) ++ norm(embedding of token i + 1))
    y = norm(decoder layer(x));    logits of token i + 2 = the model's own head (y)

The hidden state of a token that the target has computed is the one that its head reads. A layer that predicts one token
ahead drafts more by being used again on its own output y, as transformers and SGLang do.
Source: DeepSeek-V3 (arXiv 2412.19437), section 2.2; MiMo-7B (arXiv 2505.07608) and its modeling code; of Qwen3-Next
and Qwen3.5, where a layer of full attention follows layers with states, vLLM's code, as read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fnengine import checkpoint, params, tree
from fnengine.decoding.heads import Found, Head, Wiring, embedding, normed, shared_head
from fnengine.errors import CheckpointError
from fnengine.families import FAMILIES
from fnengine.families.names import DEEPSEEK, MIMO, QWEN, Further
from fnengine.leaves import matmul, packing
from fnengine.model import Model
from fnengine.params import ArrayInfo
from fnengine.spec import Attending, Layer

__all__ = ["DEEPSEEK", "MIMO", "QWEN", "load", "read"]


def load(target: Model, *, number: int = 0, claims: bool = False) -> Head:
    """The layer that a model's own checkpoint ships.

    Args:
        number: which of several.

    Raises:
        CheckpointError: the model's family has none, its folder holds no such weights, or they do not fit.
    """
    spec, where = target.spec, str(target.folder)
    layout = FAMILIES[spec.family].further
    if layout is None:
        raise CheckpointError(
            f"a {spec.architecture} ships no layer that predicts further tokens",
            where=where,
            remedy=f"those that do: {', '.join(f.architecture for f in FAMILIES.values() if f.further)}",
        )
    with checkpoint.open_tensors(target.folder) as files:
        if not any(layout.has(name, len(spec.layers)) for name in files):
            raise CheckpointError(
                "holds no layer that predicts further tokens",
                where=where,
                remedy="some conversions leave it out: take the model's own checkpoint",
            )
        return _head(Found(files, lambda name: files[name].tensor(), target, where), layout, number, None, claims)


def read(
    tensors: Mapping[str, Tensor],
    target: Model,
    layout: Further = MIMO,
    *,
    number: int = 0,
    kind: Layer | None = None,
    claims: bool = False,
    where: str = "mtp",
) -> Head:
    """The MTP layer among a checkpoint's tensors. What belongs to the model itself is not looked at.

    Args:
        number: which of several MTP layers.
        kind: its decoder layer, where that is not like the model's last one of attention.
        where: for errors.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    return _head(Found(tensors, tensors.__getitem__, target, where), layout, number, kind, claims)


def _head(found: Found, layout: Further, number: int, kind: Layer | None, claims: bool) -> Head:
    target = found.target
    kind = kind or [k for k in target.spec.layers if isinstance(k.mixer, Attending)][-1]
    how = packing(target.device, target.dtype)  # nothing is rounded

    def make(_path: str, info: ArrayInfo) -> Tensor:
        info = checkpoint.stored_as(info, found.names)
        shapes = {name: params.stored_shape(info, rows) for name, rows in info.parts}
        whole = checkpoint.assembled(info, lambda name: found.stored(name, *shapes[name]), target.dtype)
        return whole.to(target.device)

    infos = params.further(target.spec, layout, number, kind)
    p = {name: checkpoint.placed(name, node, make, how) for name, node in infos.items()}
    if kind.norm.plus:  # weights of norms are kept as what they add to it
        own = ("token_norm", "hidden_norm", "norm", "norm1", "norm2")
        p |= {name: (p[name].float() + kind.norm.plus).to(target.dtype) for name in own}
    output, embed = shared_head(target), embedding(target, p["token_norm"], kind.eps)

    def enter(token: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        e, h = embed(token), normed(hidden, p["hidden_norm"], kind.eps)
        x = matmul(p["project"], torch.cat((h, e) if layout.hidden_first else (e, h), -1))
        return normed(x, p["norm1"], kind.eps), x

    def leave(x: Tensor) -> tuple[Tensor, Tensor]:
        y = normed(x, p["norm"], kind.eps)
        return y, matmul(output, y, wide=True)

    wiring = Wiring(lambda seen: seen[0], enter, leave)
    held = sum(x.nbytes for x in tree.leaves(p))
    return Head(target, ("final",), kind, p, wiring, claims, "mtp", held)
