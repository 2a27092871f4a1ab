"""What a model is, as data. A family turns a config.json into a `ModelSpec`; `model.forward` interprets it.

A new kind of layer is one dataclass here, one pure function in `layers`, one test against the upstream model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
"""`gelu` is the exact one, by erf; `relu2` is relu(x)^2."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions: inverse frequencies are theta^(-2i/width), then scaled by `scaling`.

    Source: Su et al. 2021 (arXiv 2104.09864), half-split ("neox") layout as in transformers.
    """

    theta: float
    width: int
    """Channels of the head that rotate (C for full rotation)."""
    scaling: Scaling | None = None


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency-dependent scaling. Source: `rope_type: llama3` of transformers."""

    factor: float
    low: float
    """low_freq_factor"""
    high: float
    """high_freq_factor"""
    original: int
    """original_max_position_embeddings"""


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """Frequencies that turn less than `slow` times in `original` positions are divided by `factor`, those that turn
    more than `fast` times are kept, with a ramp between; cos and sin are multiplied by `gain`.

    Source: Peng et al. 2023 (arXiv 2309.00071), as in transformers' `rope_type: yarn`.
    """

    factor: float
    fast: float
    """beta_fast"""
    slow: float
    """beta_slow"""
    original: int
    """original_max_position_embeddings"""
    gain: float
    """attention_factor"""
    whole: bool = True
    """The ends of the ramp are whole channels (`truncate`)."""


@dataclass(frozen=True)
class LongScaling:
    """Every frequency divided by a factor of its own; cos and sin are multiplied by `gain`.

    Upstream changes from `short` to `long` when a text grows beyond `original`, and throws its KV away. Here KV is
    shared between texts and never rotated again, so one set serves a whole engine: `for_length`.
    Source: Ding et al. 2024 (arXiv 2402.13753), as in transformers' `rope_type: longrope`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    """original_max_position_embeddings"""
    gain: float
    """attention_factor"""
    longest: int
    """Most tokens of a sequence: up to `original` the short factors are taken, else the long ones."""


Scaling = Llama3Scaling | LinearScaling | YarnScaling | LongScaling


@dataclass(frozen=True)
class Norm:
    """How vectors are normed: x / rms(x) * weight, or with `centred` (x - mean(x)) / std(x) * weight + bias."""

    centred: bool = False
    """LayerNorm"""
    bias: bool = False
    plus: float = 0.0
    """Added to the stored weight: 1 where a checkpoint stores what differs from 1 (Gemma)."""
    weight: bool = True


RMS = Norm()


@dataclass(frozen=True)
class Attention:
    """Softmax attention with grouped heads over the paged pool."""

    heads: int
    """H"""
    kv_heads: int
    """K"""
    width: int
    """C"""
    rope: Rope | None
    """None: nothing rotates."""
    scale: float
    """Multiplies q.k before softmax, normally C ** -0.5."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normed before rope."""
    window: int | None = None
    """Sliding window: a token sees itself and the window - 1 before it; None sees all."""
    soft_cap: float = 0.0
    """A score becomes soft_cap * tanh(score / soft_cap) before softmax; 0 leaves it."""
    sinks: bool = False
    """Each query head has a logit without a value in its softmax, the parameter `sinks` [H]."""
    qk_over: Literal["head", "heads", "all"] = "head"
    """Norms of q and k are over C with one weight [C] for every head; over C with a weight [H, C]; over all H C."""
    qk_as: Norm = RMS
    clip: float = 0.0
    """q, k and v are clamped to +- clip after their norms; 0 leaves them."""


@dataclass(frozen=True)
class Mlp:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    width: int
    """F"""
    act: Act = "silu"
    bias: bool = False
    gated: bool = True


@dataclass(frozen=True)
class MoE:
    """The sum over a token's experts of weight * expert(x), each an `Mlp`, and beside it shared(x), another."""

    experts: int
    """E"""
    chosen: int
    """J: experts of a token, of equal ones the first"""
    width: int
    """F of an expert"""
    scores: str = "softmax"
    """By what of the router's logits experts are chosen and weighed: their `softmax`; the `sigmoid` of each, of logits
    in float32; or the `logits` themselves, which weigh by their softmax over the chosen ones."""
    normalized: bool = True
    """Weights of the chosen ones are divided by their sum."""
    factor: float = 1.0
    """Then multiplies them."""
    correction: bool = False
    """The parameter `correction` [E] is added to scores for the choice, not for the weights."""
    groups: int = 1
    """Experts stand in so many groups, and ..."""
    kept: int = 1
    """... only those of so many groups, whose best two have the largest sums, can be chosen."""
    router_bias: bool = False
    bias: bool = False
    """of experts"""
    act: str = "silu"
    """act(gate) * up; or `clamped`: (up + 1) * gate * sigmoid(1.702 gate), gate at most and up within +- `limit`, which
    alternate in the rows of the fused weight"""
    limit: float = 0.0
    shared: int = 0
    """F of the shared expert; 0: there is none"""
    shared_gate: bool = False
    """Its output is multiplied by the sigmoid of a row of its own, times x."""


@dataclass(frozen=True)
class Layer:
    """Residual block: x += mixer(norm(x)); x += mlp(norm(x)). Equal layers share one compiled artifact.

    `before` and `after` say where norms stand: of what a part reads, and of what it gives back.
    """

    mixer: Attention
    mlp: Mlp | MoE
    eps: float
    """of the norms"""
    norm: Norm = RMS
    before: bool = True
    after: bool = False
    parallel: Literal["", "one norm", "two norms"] = ""
    """x += mixer(norm(x)) + mlp(norm(x)): both read the same x, through the same norm or each through its own."""
    scale: float = 1.0
    """Of what each part adds to x."""


@dataclass(frozen=True)
class Ends:
    """What stands before the first layer and after the last, where it is more than an embedding and a head."""

    norm: Norm = RMS
    """The final one."""
    embed_scale: float = 1.0
    """Embeddings are multiplied by it."""
    positions: int = 0
    """Rows of a table of learned positions, which are added to embeddings; 0: there is none."""
    first_position: int = 0
    """Row of the table that position 0 reads."""
    head_bias: bool = False
    logit_scale: float = 1.0
    """Logits are multiplied by it."""
    logit_cap: float = 0.0
    """A logit becomes cap * tanh(logit / cap); 0 leaves it."""


@dataclass(frozen=True)
class Upstream:
    """A class of transformers that computes the forward of a model that no family knows (`fallback`)."""

    config: str
    """config.json, as text"""
    architecture: str
    code: str = ""
    """Folder whose own Python files define the class, if transformers does not."""
    where: str = field(default="config.json", compare=False, repr=False)
    """For errors."""


@dataclass(frozen=True)
class ModelSpec:
    family: str
    architecture: str
    """The checkpoint's own name for it, e.g. Qwen3ForCausalLM."""
    vocab: int
    """V"""
    width: int
    """D"""
    layers: tuple[Layer, ...]
    """L of them"""
    eps: float
    """of the final norm"""
    tied: bool
    """The head is the embedding."""
    max_len: int
    """max_position_embeddings"""
    dtype: str
    """The checkpoint's own dtype: bfloat16, float16 or float32."""
    eos: tuple[int, ...]
    bos: int | None
    ends: Ends = Ends()
    upstream: Upstream | None = None
    """What runs instead of `model.body`; layers then say what each asks of attention and of memory."""


def features(spec: ModelSpec) -> tuple[str, ...]:
    """What sets a model apart from Llama, in words, from its spec alone."""
    layer, ends = spec.layers[0], spec.ends
    mixers = [kind.mixer for kind in spec.layers]
    turning = {m.rope for m in mixers} - {None}
    norms = {"one norm": "one norm for both", "two norms": "a norm for each", "": ""}[layer.parallel]
    said = {
        "transformers' own module": spec.upstream is not None,
        "LayerNorm": layer.norm.centred,
        "weights of norms from 1": layer.norm.plus == 1,
        "norms after each part": layer.after and not layer.before,
        "norms before and after each part": layer.after and layer.before,
        f"parts side by side, {norms}": bool(layer.parallel),
        "learned positions": ends.positions > 0,
        "layers without rope": len(turning) > 0 and any(m.rope is None for m in mixers),
        "a rope for each kind of layer": len(turning) > 1,
        "part of a head rotates": any(r.width < m.width for m in mixers if (r := m.rope)),
        "q and k normed": any(m.qk_norm for m in mixers),
        "biases": any(m.qkv_bias or m.out_bias for m in mixers),
        "sliding window": any(m.window for m in mixers),
        "soft caps": any(m.soft_cap for m in mixers) or ends.logit_cap > 0,
        "multipliers": (layer.scale, ends.embed_scale, ends.logit_scale) != (1, 1, 1),
        "sinks": any(m.sinks for m in mixers),
        "q, k and v clamped": any(m.clip for m in mixers),
        **said_of_mlps([kind.mlp for kind in spec.layers]),
    }
    return tuple(name for name, holds in said.items() if holds)


def said_of_mlps(mlps: list[Mlp | MoE]) -> dict[str, bool]:
    """What may be said of the second halves of layers -> whether it holds."""
    dense = [m for m in mlps if isinstance(m, Mlp)]
    routed = [m for m in mlps if isinstance(m, MoE)]
    return {
        **{f"{m.act} experts" if isinstance(m, MoE) else m.act: m.act != "silu" for m in mlps},
        "no gate": any(not m.gated for m in dense),
        **{f"{m.chosen} of {m.experts} experts": True for m in routed},
        "a shared expert": any(m.shared for m in routed),
        "dense layers beside those with experts": bool(dense and routed),
    }


def for_length(spec: ModelSpec, longest: int) -> ModelSpec:
    """The spec for sequences of at most so many tokens: what a `LongScaling` divides by depends on it."""

    def fitted(kind: Layer) -> Layer:
        rope = kind.mixer.rope
        if rope is None or not isinstance(rope.scaling, LongScaling):
            return kind
        rope = replace(rope, scaling=replace(rope.scaling, longest=longest))
        return replace(kind, mixer=replace(kind.mixer, rope=rope))

    return replace(spec, layers=tuple(fitted(kind) for kind in spec.layers))


def residual(layer: int) -> str:
    """Name of the residual stream after a layer."""
    return f"layers.{layer}.residual"


def tap_names(spec: ModelSpec) -> tuple[str, ...]:
    """Where a step can be tapped, in the order in which it passes: `embedding`, the residual stream after each layer,
    `final` (after the last norm, what the head reads)."""
    if spec.upstream is not None:
        return ("final",)
    return ("embedding", *(residual(i) for i in range(len(spec.layers))), "final")


def steerable(spec: ModelSpec) -> tuple[str, ...]:
    """Layers after which a vector can be added to the residual stream."""
    if spec.upstream is not None:
        return ()
    return tuple(f"layers.{i}" for i in range(len(spec.layers)))


def kv_bytes_per_token(spec: ModelSpec, itemsize: int) -> int:
    """Bytes of KV a token takes over all layers: the k of the performance formulas."""
    return sum(2 * layer.mixer.kv_heads * layer.mixer.width * itemsize for layer in spec.layers)


def angle_pairs(rope: Rope | None) -> int:
    """Pairs of channels that a mixer is given angles for: one, which stands still, where nothing rotates."""
    return 1 if rope is None else rope.width // 2
