"""The forward that interprets a spec, in three pure parts: `embed`, `body`, `head_logits`; and `Model`, the data.

The step puts its own work between the parts: it picks the rows whose logits somebody wants before the head runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch
from torch import Tensor

from fnengine import checkpoint, environment, fallback, kernels
from fnengine.activations import soft_capped
from fnengine.graphs import compile
from fnengine.host.tokenizer import Tokenizer
from fnengine.kernels.rope import rms_norm
from fnengine.layers import Angles, layer, normed, rope_angles
from fnengine.leaves import Packing, lookup, matmul
from fnengine.spec import Layer, ModelSpec, Turning
from fnengine.state import LayerState, Where

if TYPE_CHECKING:
    from fnengine.kernels import Ops

RunLayer = Callable[[Layer, Any, LayerState, Where, Angles, "Ops", Tensor], Tensor]
"""`layers.layer`, or anything that computes the same: a compiled form of it."""
RunLayers = Callable[
    [Sequence[Layer], Sequence[Any], Sequence[LayerState], Where, dict[Turning, Angles], "Ops", Tensor], Tensor
]
"""(layers in a row, their params, their pools, where, angles, ops, x_TD) -> x_TD after them: `one_by_one`, or a
recorded form of it, whose x_TD the next call overwrites."""


@dataclass(frozen=True)
class Model:
    """Spec and weights on a device: data, nothing that runs."""

    spec: ModelSpec
    params: dict[str, Any]
    dtype: torch.dtype
    """Of parameters, activations and KV."""
    device: torch.device
    how: Packing
    """How the weights are stored."""
    folder: Path
    """Where the config, the tokenizer and the weights came from."""
    name: str = ""
    """What a user calls it."""
    notes: tuple[str, ...] = ()
    """What was decided on the way, to be shown: dtype, layout of weights, dummy weights."""
    quantization: str = "none"
    before: int = 0
    """Bytes that were resident in this process before it was loaded; 0 when nobody looked."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back, read from the folder at first use. Raises CheckpointError when there is none."""
        return Tokenizer.load(self.folder)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens the model expects."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    @cached_property
    def generation_defaults(self) -> dict[str, Any]:
        """The sampling values of generation_config.json, by the names of `Sampling`; empty when it has none.

        A model that says `do_sample: false` is greedy unless asked otherwise.
        """
        says = checkpoint.generation_config(self.folder)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        chosen = {k: says[k] for k in names if says.get(k) is not None}
        return {**chosen, "temperature": 0.0} if says.get("do_sample") is False and chosen else chosen


def load(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    load_format: str = "auto",
    quantization: str = "none",
    seed: int = 0,
    progress: checkpoint.Progress | None = None,
    impl: str = "auto",
    trust: bool = False,
) -> Model:
    """The model in a local folder (see `hub.resolve` for names).

    Args:
        dtype: auto (the checkpoint's own, see `checkpoint.pick_dtype`), bfloat16, float16 or float32.
        device: auto (cuda where torch finds one, else cpu), cpu, cuda or cuda:N.
        load_format: auto or safetensors read the weights, pt those of pickled .bin files; dummy draws random ones
            from `seed` and needs only a config.json.
        quantization: none, int8 or int4: weights are rounded to so many bits as they are read; with int8-dynamic and
            int4-dynamic the rows they are multiplied by are rounded to 8 bits as well. fp8 (GPUs of compute capability
            8.9 or later): both are rounded to 8-bit floats.
        progress: called with (bytes done, bytes in all) while weights are read.
        impl, trust: see `checkpoint.read_spec`.

    Raises:
        SpecError: the config cannot be built.
        CheckpointError: weights are missing, damaged or of the wrong shape.
        ConfigError: dtype, device, load_format or quantization has no meaning here.
    """
    before = psutil.Process().memory_info().rss
    device = checkpoint.pick_device(device)
    spec = checkpoint.read_spec(folder, impl, trust)
    torch_dtype, why = checkpoint.pick_dtype(spec, dtype, device)
    if kernels.start(device, torch_dtype, quantization != "none"):  # built while the weights are read
        compile.start_in_background()  # a first start on this machine will compile layers, too
    environment.allocate(environment.LOADING)
    try:
        params, how, notes = checkpoint.fill(
            folder, spec, torch_dtype, device, load_format, quantization=quantization, seed=seed, progress=progress
        )
    finally:
        environment.allocate(environment.SERVING)
    if spec.upstream is not None:
        notes = (*notes, fallback.said(spec), fallback.check(spec, params, torch_dtype, device))
    return Model(
        spec,
        params,
        torch_dtype,
        device,
        how,
        Path(folder),
        Path(folder).name,
        (why, *notes),
        quantization=quantization,
        before=before,
    )


class Forward(Protocol):
    """The parts of a forward, between which a step puts its own work: this module's, or a fallback's."""

    def embed(self, spec: ModelSpec, params: Any, token_T: Tensor, position_T: Tensor) -> Tensor: ...

    def body(
        self,
        spec: ModelSpec,
        params: Any,
        pool: tuple[LayerState, ...],
        where: Where,
        ops: Ops,
        x_TD: Tensor,
        run_layers: RunLayers,
        after: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]: ...

    def final_norm(self, spec: ModelSpec, params: Any, hidden_nD: Tensor) -> Tensor: ...

    def head_logits(self, spec: ModelSpec, params: Any, hidden_nD: Tensor) -> Tensor: ...


def forward_of(model: Model) -> Forward:
    """The forward of a model: this module, which interprets its spec, or what runs a class of transformers.

    Raises:
        SpecError: that class cannot be run.
    """
    if model.spec.upstream is None:
        return sys.modules[__name__]  # type: ignore[return-value]
    return fallback.parts(model.spec, model.params, model.dtype, model.device)


def embed(spec: ModelSpec, params: dict[str, Any], token_T: Tensor, position_T: Tensor) -> Tensor:
    """x_TD: the embedding of each token, and of its position where a model has learned those."""
    x_TD = lookup(params["embed"], token_T)
    if spec.ends.embed_scale != 1:
        x_TD = x_TD * x_TD.new_full((), spec.ends.embed_scale)  # a scale rounded to the dtype, as it was in training
    if spec.ends.positions:
        at_T = (position_T.long() + spec.ends.first_position).clamp(max=spec.ends.positions - 1)  # padding goes beyond
        x_TD = x_TD + params["positions"][at_T]
    return x_TD


def body(
    spec: ModelSpec,
    params: dict[str, Any],
    pool: tuple[LayerState, ...],
    where: Where,
    ops: Ops,
    x_TD: Tensor,
    run_layers: RunLayers,
    after: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """(x_TD after all layers, what each function of `after` made of x_TD). Donates `pool`.

    Args:
        after: number of a layer -> a function of x_TD after it, whose result, a new tensor, the next layer reads.
            Layers between two of them are one call of `run_layers`.
    """
    if spec.lenders:
        pool = tuple(pool[i] for i in spec.lenders)
    inputs_LTP = inputs_of_layers(spec, params, where, x_TD) if spec.ends.inputs else None
    angles: dict[Turning, Angles] = {}
    for kind in spec.layers:
        if kind.mixer.rope not in angles:
            angles[kind.mixer.rope] = rope_angles(kind.mixer.rope, where.position)
    after, made, begin = after or {}, {}, 0
    for end in sorted({*(i + 1 for i in after), len(spec.layers)}):
        part = slice(begin, end)
        if inputs_LTP is not None:
            where = replace(where, beside=inputs_LTP[part])
        x_TD = run_layers(spec.layers[part], params["layers"][part], pool[part], where, angles, ops, x_TD)
        if end - 1 in after:
            x_TD = made[end - 1] = after[end - 1](x_TD)
        begin = end
    return x_TD, made


def inputs_of_layers(spec: ModelSpec, params: dict[str, Any], where: Where, x_TD: Tensor) -> Tensor:
    """[L, T, P]: what each layer reads beside the residual stream, from a table by the token and from its embedding.

    Source: Gemma 4's per-layer embeddings, as in transformers' `project_per_layer_inputs`.
    """
    assert where.token is not None, "who calls says which tokens there are"
    D, L = spec.width, len(spec.layers)
    own_TLP = params["inputs"][where.token.long()].unflatten(1, (L, -1))
    own_TLP = own_TLP * own_TLP.new_full((), own_TLP.shape[-1] ** 0.5)
    made_TLP = (matmul(params["inputs_project"], x_TD) * D**-0.5).unflatten(1, (L, -1))
    made_TLP = rms_norm(made_TLP, params["inputs_norm"], spec.eps)
    return ((made_TLP + own_TLP) * 2.0**-0.5).transpose(0, 1).contiguous()


def one_by_one(run_layer: RunLayer = layer) -> RunLayers:
    """Layers in a row, each by `run_layer`."""

    def run_layers(
        kinds: Sequence[Layer],
        params: Sequence[Any],
        pool: Sequence[LayerState],
        where: Where,
        angles: dict[Turning, Angles],
        ops: Ops,
        x_TD: Tensor,
    ) -> Tensor:
        for i, (kind, p, kv) in enumerate(zip(kinds, params, pool, strict=True)):
            own = where if where.beside is None else replace(where, beside=where.beside[i])
            x_TD = run_layer(kind, p, kv, own, angles[kind.mixer.rope], ops, x_TD)
        return x_TD

    return run_layers


def final_norm(spec: ModelSpec, params: dict[str, Any], hidden_nD: Tensor) -> Tensor:
    """What the head reads, of any selection of hidden rows."""
    return normed(spec.ends.norm, params, "norm", spec.eps, hidden_nD)


def head_logits(spec: ModelSpec, params: dict[str, Any], hidden_nD: Tensor) -> Tensor:
    """logits_nV in float32 of any selection of hidden rows; a row's bits do not depend on the others."""
    head = params["embed"] if params["head"] is None else params["head"]
    logits_nV = matmul(head, final_norm(spec, params, hidden_nD), wide=True)
    if spec.ends.logit_scale != 1:
        logits_nV = logits_nV * spec.ends.logit_scale
    return soft_capped(logits_nV, spec.ends.logit_cap) if spec.ends.logit_cap else logits_nV
