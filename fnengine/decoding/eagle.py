"""EAGLE-3: a head that drafts from the target's residual stream after three of its layers.

    head = eagle.load("demo-eagle", model)
    speculate(Runtime(model), prompt, head, k=4)

The three activations of a token are projected to one hidden state; beside the embedding of the next token, each normed,
it enters one decoder layer twice as wide at its input. The layer's output is the next drafted pair's hidden state.
Source: Li et al. 2025 (arXiv 2503.01840); tensors are named as in the heads that were published with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnengine import checkpoint, hub
from fnengine.decoding.heads import Found, Head, Wiring, embedding, normed, shared_head
from fnengine.errors import SpecError
from fnengine.leaves import matmul
from fnengine.model import Model
from fnengine.runtime import Runtime
from fnengine.spec import Attention, Layer, Mlp, Rope


def load(name_or_path: str | Path, target: Model, *, claims: bool = False) -> Head:
    """The head in a folder, `demo-eagle` (of the bundled model), or a Hugging Face repository.

    Raises:
        CheckpointError: it cannot be read, or belongs to another model.
        SpecError: its config asks for what is not known here.
    """
    folder = hub.resolve(name_or_path)
    config = checkpoint.read_json(folder / "config.json")
    with checkpoint.open_tensors(folder) as files:
        tensors = {name: file.handle.get_tensor(name) for name, file in files.items()}
    return read(config, tensors, target, claims=claims, where=str(folder))


def demo(runtime: Runtime) -> Head:
    """The bundled model's own: `fnengine certify fnengine.decoding.eagle:demo`."""
    return load("demo-eagle", runtime.model)


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    target: Model,
    *,
    claims: bool = False,
    where: str = "eagle",
) -> Head:
    """The head that these tensors are.

    A head may have an output matrix of its own (`lm_head`), over some of the target's tokens only: `d2t` is what has to
    be added to a row's number to get its token.

    Raises:
        CheckpointError, SpecError: as `load`.
    """
    D, L, V = target.spec.width, len(target.spec.layers), target.spec.vocab
    kind, found = _kind(config, where), Found(tensors, tensors.__getitem__, target, where)
    # Published heads read what enters layers 2, L / 2 and L - 3.
    taps = config.get("taps") or [f"layers.{i}.residual" for i in (1, L // 2 - 1, L - 4)]
    params = found.layer(kind, "midlayer.", 2 * D)
    fc = found.linear(["fc"], (D,), len(taps) * D)
    token_norm, hidden_norm, norm = (
        found.array(f"{name}.weight", D) for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "norm")
    )
    embed = embedding(target, token_norm, kind.eps)
    ids, output = None, shared_head(target)
    if "lm_head.weight" in tensors:
        rows = len(tensors["lm_head.weight"])
        output = found.linear(["lm_head"], (rows,), D)
        if "d2t" in tensors:
            ids = (torch.arange(rows) + tensors["d2t"]).to(target.device)

    def enter(token: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((embed(token), normed(hidden, hidden_norm, kind.eps)), -1), hidden

    def leave(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = matmul(output, normed(x, norm, kind.eps), wide=True)
        if ids is not None:
            logits = logits.new_full((len(logits), V), -torch.inf).index_copy_(1, ids, logits)
        return x, logits

    wiring = Wiring(lambda seen: matmul(fc, torch.cat(seen, -1)), enter, leave)
    return Head(target, tuple(taps), kind, params, wiring, claims, "eagle", sum(found.taken))


def _kind(config: Mapping[str, Any], where: str) -> Layer:
    """The layer of a head's config, in the words of a Llama one."""
    for key, only in (("hidden_act", "silu"), ("rope_scaling", None), ("attention_bias", False)):
        if config.get(key, only) != only:
            raise SpecError(f"{key} = {config[key]!r} is not known of a head", where=where, param=key)
    try:
        H = int(config["num_attention_heads"])
        C = int(config.get("head_dim") or config["hidden_size"] // H)
        rope = Rope(float(config.get("rope_theta", 10_000.0)), C)
        mixer = Attention(H, int(config.get("num_key_value_heads", H)), C, rope, C**-0.5)
        return Layer(mixer, Mlp(int(config["intermediate_size"])), float(config.get("rms_norm_eps", 1e-6)))
    except KeyError as e:
        raise SpecError(f"{e.args[0]} is missing", where=where, param=str(e.args[0])) from None
