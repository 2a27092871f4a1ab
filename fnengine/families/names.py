"""Where Llama-shaped checkpoints keep their weights. A tuple is a fused array: its parts one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fnengine.spec import Layer, ModelSpec

Names = Mapping[str, str | tuple[str, ...]]
"""Key of the params tree -> checkpoint module(s); `{i}` stands for the layer. `.weight` and `.bias` are appended."""


@dataclass(frozen=True)
class Interleaved:
    """Rows of heads whose rotated channels 2 i and 2 i + 1 are a pair; here channels i and i + pairs are one.

    Queries and keys are put in another order alike, which no product of the two can see.
    """

    turning: int
    """Heads that rotate: they come first."""
    still: int
    """Heads after them, which are left alone."""
    width: int
    """C"""
    pairs: int
    first: int = 0
    """Channels before those that rotate."""


@dataclass(frozen=True)
class Grouped:
    """Rows of one projection, group by group: `queries` heads of q, one of k, one of v."""

    groups: int
    """K"""
    queries: int
    """H / K"""
    width: int
    """C"""


@dataclass(frozen=True)
class Sorted:
    """Rows of projections one under the other, each of them group by group; here part by part."""

    projections: tuple[tuple[int, tuple[int, ...]], ...]
    """(groups, rows of each part in a group) of each"""
    parts: tuple[int, ...]
    """Numbers of the parts, counted through all projections, in the order in which they stand here."""


Order = Interleaved | Grouped | Sorted
"""In which a checkpoint has the rows of an array, if not in ours."""


@dataclass(frozen=True)
class Further:
    """Where a family keeps a layer that predicts further tokens, and what it reads first."""

    at: str
    """Prefix of its tensors; `{i}` is its number among such layers, `{n}` that after the model's own."""
    token_norm: str
    hidden_norm: str
    project: str
    norm: str
    """All four below `at`, without `.weight`; beside them those of a decoder layer, under the names of the model's."""
    hidden_first: bool
    """The projection reads the hidden state before the embedding."""
    layer: str = ""
    """Between `at` and the names of the decoder layer's tensors: several layers share what stands around them."""

    def has(self, name: str, layers: int) -> bool:
        """Whether a tensor is of such a layer, of a model of so many layers of its own."""
        begin, numbered, rest = self.at.partition("{")
        if not numbered:
            return name.startswith(begin)
        number = name.removeprefix(begin).partition(".")[0]
        least = layers if rest.startswith("n") else 0
        return name.startswith(begin) and number.isdecimal() and int(number) >= least


MIMO = Further(
    "model.mtp_layers.{i}.", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm", hidden_first=True
)
DEEPSEEK = Further("model.layers.{n}.", "enorm", "hnorm", "eh_proj", "shared_head.norm", hidden_first=False)
"""Also GLM-4-MoE's."""
QWEN = Further(
    "mtp.",
    "pre_fc_norm_embedding",
    "pre_fc_norm_hidden",
    "fc",
    "norm",
    hidden_first=False,
    layer="layers.{i}.",
)
"""Of Qwen3-Next and Qwen3.5. Source: names in the index of their checkpoints; how they are put together, vLLM's
qwen3_next_mtp.py, as read: transformers ignores these tensors, and no such checkpoint was at hand."""


class Read(Protocol):
    def __call__(self, config: dict, where: str) -> ModelSpec:
        """The spec of a config.json; `where` goes into errors.

        Raises:
            SpecError: a key is missing, impossible, or not understood.
        """
        ...


@dataclass(frozen=True)
class Family:
    """One file of this package: which configs it reads, how, and where its weights are."""

    name: str
    """model_type of its configs"""
    architecture: str
    """architectures[0] of its configs"""
    read: Read
    names: Names
    ignored: tuple[str, ...]
    """Suffixes of checkpoint tensors that carry nothing: buffers that old versions saved."""
    orders: Mapping[str, Callable[[Any], Order | None]] = field(default_factory=dict)
    """Key of the params tree -> (mixer of the layer) -> the order of its rows in the checkpoint, if not ours."""
    renamed: Callable[[Layer], Names] = lambda kind: {}
    """What the arrays of such a layer are called instead."""
    transposed: bool = False
    """Linears of layers are stored as [K, N]."""
    asks: tuple[str, ...] = ("intermediate_size",)
    """Sizes that a config must say, beside those that every config does."""
    prefix: str = ""
    """What every name but the head's begins with, and what some checkpoints leave out."""
    also: tuple[str, ...] = ()
    """Further names that its configs have in `architectures` (`whole.architectures`)."""
    encodes: bool = False
    """Its models read texts whole and have no form that writes any."""
    further: Further | None = None
    """Layers that predict further tokens, which checkpoints may have beside the config's: `decoding.mtp` loads them."""
    apart: tuple[str, ...] = ()
    """Beginnings of names of tensors that are no part of what runs here, and are not loaded: other towers."""
    unread: Callable[[ModelSpec, str], bool] = lambda spec, name: False
    """Whether a tensor of this name may be there and belongs to nothing in such a model."""
    spelt: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of names as some checkpoints have them -> ours."""


NAMES: Names = {
    "embed": "model.embed_tokens",
    "norm1": "model.layers.{i}.input_layernorm",
    "qkv": (
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ),
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "o": "model.layers.{i}.self_attn.o_proj",
    "sinks": "model.layers.{i}.self_attn.sinks",
    "norm2": "model.layers.{i}.post_attention_layernorm",
    "gate_up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
"""Llama's, with the parts that a spec has; other families change what they call otherwise."""

EXPERTS: Names = {
    "router": "model.layers.{i}.mlp.gate",
    "correction": "model.layers.{i}.mlp.gate.e_score_correction_bias",
    "experts_gate_up": ("model.layers.{i}.mlp.experts.{e}.gate_proj", "model.layers.{i}.mlp.experts.{e}.up_proj"),
    "experts_down": "model.layers.{i}.mlp.experts.{e}.down_proj",
    "fused.experts_gate_up": "model.layers.{i}.mlp.experts.gate_up_proj",
    "fused.experts_down": "model.layers.{i}.mlp.experts.down_proj",
    "shared_gate_up": ("model.layers.{i}.mlp.shared_expert.gate_proj", "model.layers.{i}.mlp.shared_expert.up_proj"),
    "shared_down": "model.layers.{i}.mlp.shared_expert.down_proj",
    "shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
}
"""What layers with experts have beside these; `{e}` stands for the expert. `fused.` begins the name of one tensor that
holds what the key's modules hold, which newer releases of transformers save on request; with `fused.transposed` those
of experts are [E, K, N], and their biases lie beside them."""

DELTA_NET: Names = {
    "mix": (
        "model.layers.{i}.linear_attn.in_proj_qkv",
        "model.layers.{i}.linear_attn.in_proj_z",
        "model.layers.{i}.linear_attn.in_proj_b",
        "model.layers.{i}.linear_attn.in_proj_a",
    ),
    "conv": "model.layers.{i}.linear_attn.conv1d.weight",
    "decay": "model.layers.{i}.linear_attn.A_log",
    "step_bias": "model.layers.{i}.linear_attn.dt_bias",
    "gate_norm": "model.layers.{i}.linear_attn.norm.weight",
    "o": "model.layers.{i}.linear_attn.out_proj",
}
"""What layers of gated delta nets have in place of attention: `Family.renamed`."""


def within(names: Names, outer: str) -> Names:
    """The names where the text model is a part of another."""

    def one(name: str) -> str:
        return name.replace("model.", f"{outer}.", 1) if name.startswith("model.") else name

    return {key: one(n) if isinstance(n, str) else tuple(map(one, n)) for key, n in names.items()}


IGNORED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".self_attn.masked_bias")

ROUTING = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise")
"""Keys of configs with experts that only training reads."""
