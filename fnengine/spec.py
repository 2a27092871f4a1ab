"""What a model is, as data. A family turns a config.json into a `ModelSpec`; `model.forward` interprets it.

A new kind of layer is one dataclass here, one pure function in `layers`, one test against the upstream model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
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


@dataclass(frozen=True)
class ProportionalScaling:
    """The first `pairs` pairs of channels turn, their frequencies divided by `factor`, and the others stand still.

    A pair is channels i and C / 2 + i, so what turns does not lie at a head's beginning, as it does with a `Rope` that
    is narrower than the head. Source: `rope_type: proportional` of transformers (Gemma 4).
    """

    pairs: int
    factor: float = 1.0


Scaling = Llama3Scaling | LinearScaling | YarnScaling | LongScaling | ProportionalScaling


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
class Tempered:
    """The query at position p is multiplied by 1 + scale * ln(1 + floor((p + first) / every)), after it was rotated, if
    it is.

    Source: Nakanishi 2025 (arXiv 2501.19399), as in Llama 4 and Ministral 3.
    """

    every: int
    """floor_scale"""
    scale: float
    """attn_scale"""
    first: int = 1
    """What the first position counts as."""
    rope: Rope | None = None
    """None: nothing rotates."""


@dataclass(frozen=True)
class Attention:
    """Softmax attention with grouped heads over the paged pool."""

    heads: int
    """H"""
    kv_heads: int
    """K"""
    width: int
    """C"""
    rope: Rope | Tempered | None
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
    causal: bool = True
    """A token sees what stands before it; else what stands behind it, too, and `window` counts to both sides. Only
    texts that are read whole can be seen so (`Whole`)."""
    gated: bool = False
    """The output is multiplied by the sigmoid of a projection of its own, which lies behind v's."""
    chunk: int = 0
    """A token sees nothing before the last multiple of so many positions; 0: it does."""
    v_norm: bool = False
    """Each head of values is normed, without a weight."""
    doubles: bool = False
    """There is no projection of values: they are the keys, as those are before norm and rope."""
    borrows: bool = False
    """It makes queries alone, and reads the KV of a layer before it that is like it otherwise (`ModelSpec.lenders`)."""


@dataclass(frozen=True)
class Latent:
    """Softmax attention over latents: of a token the pool keeps `rank` normed channels, of which each head's key and
    value are linear functions, and `turning` rotated ones, which belong to every head's key.

    Those functions are applied to queries and to what attention gives back, not to the pool. So it sees one KV head for
    all query heads, whose keys are the rotated channels and the latent, and whose values are its keys.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    heads: int
    """H"""
    rank: int
    """Channels of the latent."""
    still: int
    """Channels of a head's query that meet the latent, and do not rotate ..."""
    turning: int
    """... and those that rotate."""
    values: int
    """Channels of a head's value."""
    rope: Rope
    scale: float
    """Multiplies q.k before softmax."""
    query_rank: int = 0
    """Queries are made of so many normed channels; 0: of x."""
    eps: float = 1e-6
    """of the norms of latents, whatever the layer's is"""

    @property
    def kv_heads(self) -> int:
        """K that attention sees."""
        return 1

    @property
    def width(self) -> int:
        """C that attention sees."""
        return self.turning + self.rank


@dataclass(frozen=True)
class DeltaNet:
    """Linear attention by the gated delta rule: each head has a memory [C, P] that every token decays, corrects and
    reads. q, k and v pass a short convolution and SiLU; q and k are unit vectors; the output is normed head by head and
    multiplied by the SiLU of a gate.

    Source: Yang et al. 2024 (arXiv 2412.06464).
    """

    heads: int
    """H, of v"""
    key_heads: int
    """G, of q and k: each serves H / G heads of v."""
    key_width: int
    """C"""
    width: int
    """P"""
    taps: int = 4
    """Y: tokens that the convolution sees."""

    @property
    def channels(self) -> int:
        """X: those of the convolution, q, k and v."""
        return 2 * self.key_heads * self.key_width + self.heads * self.width

    @property
    def memory(self) -> tuple[int, int, int]:
        return self.heads, self.key_width, self.width

    @property
    def note(self) -> int:
        """Numbers that a token brings to the memory: k, v, decay and rate."""
        return self.key_heads * self.key_width + self.heads * (self.width + 2)

    @property
    def rope(self) -> None:
        """Nothing rotates."""
        return None


@dataclass(frozen=True)
class Mamba2:
    """A state-space layer: each head has a state [C, P] that every token decays and adds to, by a step of its own.
    x, B and C pass a short convolution and SiLU; the output is gated and then normed, group by group.

    Source: Dao and Gu 2024 (arXiv 2405.21060).
    """

    heads: int
    """H"""
    groups: int
    """G, of B and C: each serves H / G heads."""
    key_width: int
    """C: the width of B and C, often called the size of the state"""
    width: int
    """P"""
    taps: int = 4
    """Y"""
    conv_bias: bool = True
    bias: bool = False
    """of the projections"""
    least: float = 0.0
    """A step is at least that, ..."""
    most: float = float("inf")
    """... and at most that."""

    @property
    def channels(self) -> int:
        """X: those of the convolution, x, B and C."""
        return self.heads * self.width + 2 * self.groups * self.key_width

    @property
    def memory(self) -> tuple[int, int, int]:
        return self.heads, self.key_width, self.width

    @property
    def note(self) -> int:
        """Numbers that a token brings to the memory: k, v and decay."""
        return self.groups * self.key_width + self.heads * (self.width + 1)

    @property
    def rope(self) -> None:
        """Nothing rotates."""
        return None


Recurrent = DeltaNet | Mamba2
"""Mixers with a state of one size for any number of tokens."""

Attending = Attention | Latent
"""Mixers that keep KV of every token."""
Mixer = Attention | Latent | DeltaNet | Mamba2


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
    in float32; the `logits` themselves, which weigh by their softmax over the chosen ones; or the logits that are
    `near`, which weigh each chosen one by a softmax of its own (`layers.near_weights`); or logits that weigh by the
    sigmoids of the chosen ones, `gates`."""
    early: bool = False
    """Weights multiply what experts read, and not what they give."""
    normalized: bool = True
    """Weights of the chosen ones are divided by their sum."""
    factor: float = 1.0
    """Then multiplies them."""
    near: float = 0.0
    """How far below the best a logit may lie, relative to the larger of itself and the best, to share its softmax."""
    correction: bool = False
    """The parameter `correction` [E] is added to scores for the choice, not for the weights."""
    wide: bool = False
    """The router's logits are not rounded to the model's dtype; those of sigmoids never are."""
    groups: int = 1
    """Experts stand in so many groups, and ..."""
    kept: int = 1
    """... only those of so many groups, ..."""
    best: int = 2
    """... whose so many best ones have the largest sums, can be chosen."""
    router_bias: bool = False
    bias: bool = False
    """of experts"""
    scaled: bool = False
    """Then the parameter `expert_scale` [E] multiplies that of each expert."""
    act: Act | Literal["clamped"] = "silu"
    """act(gate) * up; or `clamped`: (up + 1) * gate * sigmoid(1.702 gate), gate at most and up within +- `limit`, which
    alternate in the rows of the fused weight"""
    limit: float = 0.0
    shared: int = 0
    """F of the shared expert; 0: there is none"""
    shared_gate: bool = False
    """Its output is multiplied by the sigmoid of a row of its own, times x."""


@dataclass(frozen=True)
class Both:
    """after1(dense(norm1(x))) + after2(routed(norm2(x))), each half with norms of its own. The router reads x normed
    once more, times the parameter `router_scale` [D] and D ** -0.5.

    Source: Gemma 4, the sizes with experts.
    """

    dense: Mlp
    routed: MoE

    @property
    def width(self) -> int:
        """The wider F."""
        return max(self.dense.width, self.routed.width)


Half = Mlp | MoE | Both
"""The second half of a layer."""


def routed(half: Half) -> MoE | None:
    """The experts of it, if it has some."""
    return half.routed if isinstance(half, Both) else half if isinstance(half, MoE) else None


@dataclass(frozen=True)
class Beside:
    """What ends a layer that has an input of its own: x += norm(out(act(gate(x)) * input)).

    Source: Gemma 4, the sizes with per-layer embeddings (`Ends.inputs`).
    """

    width: int
    """P, channels of the input."""
    act: Act = "gelu_tanh"


@dataclass(frozen=True)
class Layer:
    """Residual block: x += mixer(norm(x)); x += mlp(norm(x)). Equal layers share one compiled artifact.

    `before` and `after` say where norms stand: of what a part reads, and of what it gives back.
    """

    mixer: Mixer
    mlp: Half
    eps: float
    """of the norms"""
    norm: Norm = RMS
    before: bool = True
    after: bool = False
    parallel: Literal["", "one norm", "two norms"] = ""
    """x += mixer(norm(x)) + mlp(norm(x)): both read the same x, through the same norm or each through its own."""
    scale: float = 1.0
    """Of what each part adds to x."""
    onto: bool = False
    """The norms `after` are of the sum: x = norm(x + part(x))."""
    bare: bool = False
    """The mixer reads x as it is, though the other half reads it normed."""
    beside: Beside | None = None
    scaled: bool = False
    """x is multiplied by the parameter `scalar` [1] at the end."""


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
    inputs: int = 0
    """Rows of a table that has an input for every layer, by the token; the embedding adds to it
    (`model.inputs_of_layers`). 0: layers have none."""


@dataclass(frozen=True)
class Head:
    """What a model makes of the one vector of a text: a number for each label, out(norm(act(dense(x))))."""

    labels: tuple[str, ...]
    """Their names, in order."""
    pooling: str
    """`last`, `mean` or `cls`: how the text becomes one vector."""
    dense: bool = False
    """There is a layer of its own before the labels'."""
    dense_bias: bool = True
    act: Literal["tanh", "gelu"] = "tanh"
    """of that layer"""
    norm: Norm | None = None
    """of what that gives"""
    bias: bool = True
    """of the labels"""
    spread: Literal["softmax", "sigmoid", "identity"] = "softmax"
    """What makes shares of the numbers when texts are classified."""
    judged: Literal["softmax", "sigmoid", "identity"] = "sigmoid"
    """What makes a score of the one number of a pair of texts."""


@dataclass(frozen=True)
class Bridge:
    """A layer between the vector of a text and its embedding, as sentence-transformers keeps them beside a model."""

    folder: str
    """Where its weights are, within the model's."""
    width: int
    """Numbers that it gives."""
    reads: int
    bias: bool
    act: Literal["identity", "tanh", "gelu", "relu", "silu"] = "identity"


@dataclass(frozen=True)
class Whole:
    """Of a model that reads texts whole and writes none: encoders, classifiers, embedders.

    It needs no pool: what is computed of a text is used in the same step. Its vectors are those of the last layer.
    """

    pooling: str = "last"
    """`last`, `mean` or `cls`: how embeddings are pooled where nothing says otherwise."""
    types: int = 0
    """Rows of a table that tells the first text of a pair from the second; it is added to embeddings. 0: none."""
    norm: Norm | None = None
    """of embeddings"""
    final: bool = True
    """There is a norm after the last layer."""
    head: Head | None = None
    bridges: tuple[Bridge, ...] = ()


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
    whole: Whole | None = None
    """None: a language model, which has a head over its vocabulary."""
    lenders: tuple[int, ...] = ()
    """The number of the layer whose KV each layer reads, where some borrow it; else nothing: each reads its own."""
    upstream: Upstream | None = None
    """What runs instead of `model.body`; layers then say what each asks of attention and of memory."""

    @property
    def vector(self) -> int:
        """Numbers of an embedding."""
        bridges = () if self.whole is None else self.whole.bridges
        return bridges[-1].width if bridges else self.width


def features(spec: ModelSpec) -> tuple[str, ...]:
    """What sets a model apart from Llama, in words, from its spec alone."""
    layer, ends = spec.layers[0], spec.ends
    every = [kind.mixer for kind in spec.layers]
    mixers = [m for m in every if isinstance(m, Attention)]
    ropes = [rotation(m.rope) for m in mixers]
    turning = {rotation(m.rope) for m in every} - {None}
    norms = {"one norm": "one norm for both", "two norms": "a norm for each", "": ""}[layer.parallel]
    said = {
        "transformers' own module": spec.upstream is not None,
        "LayerNorm": layer.norm.centred,
        "weights of norms from 1": layer.norm.plus == 1,
        "reads texts whole": any(not m.causal for m in mixers),
        "norms of each sum": layer.onto,
        "norms after each part": layer.after and not layer.before and not layer.onto,
        "norms before and after each part": layer.after and layer.before,
        f"parts side by side, {norms}": bool(layer.parallel),
        "learned positions": ends.positions > 0,
        "layers without rope": len(turning) > 0 and None in ropes,
        "a temperature by position": any(isinstance(m.rope, Tempered) for m in mixers),
        "a rope for each kind of layer": len(turning) > 1,
        "part of a head rotates": any(turns(r) < m.width for m, r in zip(mixers, ropes, strict=True) if r),
        "q and k normed": any(m.qk_norm for m in mixers),
        "v normed": any(m.v_norm for m in mixers),
        "keys as values": any(m.doubles for m in mixers),
        "layers that borrow KV": any(m.borrows for m in mixers),
        "an input for each layer": ends.inputs > 0,
        "a scalar for each layer": any(kind.scaled for kind in spec.layers),
        "heads of several widths": len({m.width for m in mixers}) > 1,
        "biases": any(m.qkv_bias or m.out_bias for m in mixers),
        "sliding window": any(m.window for m in mixers),
        "attention in chunks": any(m.chunk for m in mixers),
        "soft caps": any(m.soft_cap for m in mixers) or ends.logit_cap > 0,
        "multipliers": (layer.scale, ends.embed_scale, ends.logit_scale) != (1, 1, 1),
        "sinks": any(m.sinks for m in mixers),
        "q, k and v clamped": any(m.clip for m in mixers),
        "gated attention": any(m.gated for m in mixers),
        "gated delta rule": any(isinstance(m, DeltaNet) for m in every),
        "Mamba 2": any(isinstance(m, Mamba2) for m in every),
        "latent attention": any(isinstance(m, Latent) for m in every),
        **said_of_mlps([kind.mlp for kind in spec.layers]),
    }
    return tuple(name for name, holds in said.items() if holds)


def attentions(spec: ModelSpec) -> list[Attending]:
    """The mixers that keep KV, layer by layer."""
    return [kind.mixer for kind in spec.layers if isinstance(kind.mixer, Attending)]


def sight(mixer: Mixer) -> int:
    """How far back a layer's tokens see, as attention's contract has it: 0 for everything."""
    return -mixer.chunk or mixer.window or 0 if isinstance(mixer, Attention) else 0


def reach(spec: ModelSpec) -> int:
    """Tokens, the newest included, that the longest window or chunk of a model covers; 0: no layer has one."""
    return max((abs(sight(m)) for m in attentions(spec)), default=0)


def recurrents(spec: ModelSpec) -> list[Recurrent]:
    """The mixers that keep a state, layer by layer."""
    return [kind.mixer for kind in spec.layers if isinstance(kind.mixer, Recurrent)]


def state_bytes(spec: ModelSpec) -> int:
    """Bytes of one state of all recurrent layers: float32, whatever the weights are."""
    return sum(4 * ((m.taps - 1) * m.channels + prod(m.memory)) for m in recurrents(spec))


def said_of_mlps(mlps: list[Half]) -> dict[str, bool]:
    """What may be said of the second halves of layers -> whether it holds."""
    dense = [m.dense if isinstance(m, Both) else m for m in mlps if not isinstance(m, MoE)]
    sparse = [found for m in mlps if (found := routed(m)) is not None]
    both = any(isinstance(m, Both) for m in mlps)
    return {
        **{m.act: m.act != "silu" for m in dense},
        **{f"{m.act} experts": m.act != "silu" for m in sparse},
        "no gate": any(not m.gated for m in dense),
        **{f"{m.chosen} of {m.experts} experts": True for m in sparse},
        "a shared expert": any(m.shared for m in sparse),
        "experts beside an MLP": both,
        "dense layers beside those with experts": bool(dense and sparse) and not both,
    }


def for_length(spec: ModelSpec, longest: int) -> ModelSpec:
    """The spec for sequences of at most so many tokens: what a `LongScaling` divides by depends on it."""

    def fitted(kind: Layer) -> Layer:
        mixer, rope = kind.mixer, rotation(kind.mixer.rope)
        if isinstance(mixer, Recurrent) or rope is None or not isinstance(rope.scaling, LongScaling):
            return kind
        rope = replace(rope, scaling=replace(rope.scaling, longest=longest))
        told = replace(mixer.rope, rope=rope) if isinstance(mixer.rope, Tempered) else rope
        return replace(kind, mixer=replace(mixer, rope=told))

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
    own = [m for m in attentions(spec) if not borrows(m)]
    return sum((1 if shares(m) else 2) * m.kv_heads * m.width * itemsize for m in own)


def shares(mixer: Mixer) -> bool:
    """Whether values are keys, so that the pool keeps a token's once."""
    return isinstance(mixer, Latent)


def borrows(mixer: Mixer) -> bool:
    """Whether it keeps no KV of its own."""
    return isinstance(mixer, Attention) and mixer.borrows


def turns(rope: Rope) -> int:
    """Channels of a head that rotate."""
    return 2 * rope.scaling.pairs if isinstance(rope.scaling, ProportionalScaling) else rope.width


Turning = Rope | Tempered | None
"""What a mixer is given angles by."""


def rotation(rope: Turning) -> Rope | None:
    """What of it rotates."""
    return rope.rope if isinstance(rope, Tempered) else rope


def angle_pairs(rope: Turning) -> int:
    """Pairs of channels that a mixer is given angles for: one, which stands still, where nothing rotates, and behind
    them the temperature where there is one."""
    turning = rotation(rope)
    return (1 if turning is None else turning.width // 2) + isinstance(rope, Tempered)
