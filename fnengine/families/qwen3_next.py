"""Qwen3-Next (80B-A3B): three layers of gated delta nets, then one of gated attention; experts with a shared one."""

from __future__ import annotations

from fnengine.families.fields import Fields, check_layer_types, experts, kv_heads, model_spec, rope, sparse
from fnengine.families.names import DELTA_NET, EXPERTS, IGNORED, NAMES, QWEN, ROUTING, Family, Names, Sorted
from fnengine.spec import Attention, DeltaNet, Ends, Layer, Mlp, ModelSpec, MoE, Norm

NORM = Norm(plus=1.0)
ENDS = Ends(norm=NORM)
LINEAR, FULL = "linear_attention", "full_attention"


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a Qwen3NextForCausalLM config.

    Source: keys as in transformers' Qwen3NextConfig.
    """
    f = Fields(config, where)
    D, L = f.integer("hidden_size"), f.integer("num_hidden_layers")
    max_len = f.integer("max_position_embeddings", 32768)
    eps = f.number("rms_norm_eps", 1e-6)
    f.only("hidden_act", "silu")
    f.only("use_sliding_window", False)
    f.integer("num_nextn_predict_layers", 1, least=0)  # layers after these, which predict further tokens
    E = experts(f, 512)
    routed = with_shared(f, E, 10, normalized=f.flag("norm_topk_prob", True))
    dense = Mlp(f.integer("intermediate_size", 5632))
    mlps = [routed if has else dense for has in sparse(f, L, E)]
    layers = tuple(Layer(m, mlp, eps, norm=NORM) for m, mlp in zip(mixers(f, L, max_len), mlps, strict=True))
    return model_spec(
        f, "qwen3_next", "Qwen3NextForCausalLM", layers, width=D, max_len=max_len, ends=ENDS, inert=ROUTING
    )


def with_shared(f: Fields, experts: int, chosen: int, normalized: bool) -> MoE:
    """So many experts, so many for a token unless the config says otherwise, and a gated one for all of them."""
    return MoE(
        experts,
        f.chosen("num_experts_per_tok", chosen, experts),
        f.integer("moe_intermediate_size", 512),
        normalized=normalized,
        shared=f.integer("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


def mixers(f: Fields, layers: int, max_len: int) -> list[Attention | DeltaNet]:
    """Each layer's mixer: by `layer_types`, or attention in every `full_attention_interval`-th layer."""
    H = f.integer("num_attention_heads", 16)
    C, bias = f.integer("head_dim", 256), f.flag("attention_bias")
    attention = Attention(
        heads=H,
        kv_heads=kv_heads(f, H),
        width=C,
        rope=rope(f, C, max_len, partial=0.25, inert=("mrope_section", "mrope_interleaved")),
        scale=C**-0.5,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        qk_as=NORM,
        gated=True,
    )
    G, H = f.integer("linear_num_key_heads", 16), f.integer("linear_num_value_heads", 32)
    if H % G:
        raise f.error("linear_num_value_heads", f"is no multiple of linear_num_key_heads = {G}")
    C, P = f.integer("linear_key_head_dim", 128), f.integer("linear_value_head_dim", 128)
    linear = DeltaNet(H, G, C, P, f.integer("linear_conv_kernel_dim", 4, least=2))
    every = f.integer("full_attention_interval", 4)
    types = f.take("layer_types", None) or [FULL if (i + 1) % every == 0 else LINEAR for i in range(layers)]
    check_layer_types(f, types, layers, (FULL, LINEAR))
    return [attention if t == FULL else linear for t in types]


def renamed(kind: Layer) -> Names:
    """What the arrays of a recurrent layer are called."""
    return {**DELTA_NET, "mix": MIX} if isinstance(kind.mixer, DeltaNet) else {}


def gated_queries(a: Attention) -> Sorted:
    """q_proj holds a head's query and then its gate; gates go to the end."""
    C, kv = a.width, a.kv_heads * a.width
    return Sorted(((a.heads, (C, C)), (1, (kv,)), (1, (kv,))), (0, 2, 3, 1))


def grouped_mix(d: DeltaNet) -> Sorted:
    """in_proj_qkvz and in_proj_ba go group by group: q, k, v and its gate; the rate and the decay."""
    each = d.heads // d.key_heads
    wide = each * d.width
    return Sorted(
        ((d.key_heads, (d.key_width, d.key_width, wide, wide)), (d.key_heads, (each, each))), (0, 1, 2, 3, 4, 5)
    )


MIX = ("model.layers.{i}.linear_attn.in_proj_qkvz", "model.layers.{i}.linear_attn.in_proj_ba")

FAMILY = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    read,
    {**NAMES, **EXPERTS},
    IGNORED,
    orders={"qkv": gated_queries, "mix": grouped_mix},
    renamed=renamed,
    further=QWEN,
)
