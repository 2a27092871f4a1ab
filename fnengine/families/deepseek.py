"""DeepSeek V2, V2-Lite, V2.5, V3, V3.1 and R1: latent attention, many small experts, a shared one, dense layers first.

The released checkpoints of V3 and R1 hold 8-bit floats with scales to blocks, which are refused; those converted to
bfloat16 are read.
"""

from __future__ import annotations

import math

from fnengine.families.fields import Fields, kv_heads, model_spec, rope
from fnengine.families.names import DEEPSEEK, EXPERTS, IGNORED, NAMES, ROUTING, Family, Interleaved
from fnengine.spec import Latent, Layer, Mlp, ModelSpec, MoE


def read_v2(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a DeepseekV2ForCausalLM config.

    Source: DeepSeek-V2 (arXiv 2405.04434); keys as in transformers' DeepseekV2Config.
    """
    f = Fields(config, where)
    f.only("scoring_func", "softmax")
    f.only("norm_topk_prob", False)
    method, E = f.take("topk_method", "greedy"), f.integer("n_routed_experts", 64)
    if method not in ("greedy", "group_limited_greedy"):
        raise f.error("topk_method", "is not implemented, only 'greedy' and 'group_limited_greedy'")
    groups, kept = _groups(f, E, 1, 1)
    if method == "greedy":
        groups = kept = 1
    F = f.integer("moe_intermediate_size", 1407)
    routed = MoE(
        E,
        f.chosen("num_experts_per_tok", 6, E // groups * kept),
        F,
        normalized=False,
        wide=True,
        factor=f.number("routed_scaling_factor", 1.0),
        groups=groups,
        kept=kept,
        best=1,
        shared=F * f.integer("n_shared_experts", 2),
    )
    max_len = f.integer("max_position_embeddings", 2048)
    layers = layers_of(f, latent(f, max_len), routed, dense_first(f, 0))
    return spec_of(f, "deepseek_v2", "DeepseekV2ForCausalLM", layers, max_len)


def read_v3(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a DeepseekV3ForCausalLM config.

    Source: DeepSeek-V3 (arXiv 2412.19437); keys as in transformers' DeepseekV3Config.
    """
    f = Fields(config, where)
    routed = sigmoid_experts(f, E=256, J=8, F=2048, factor=2.5, groups=8, kept=4)
    max_len = f.integer("max_position_embeddings", 4096)
    layers = layers_of(f, latent(f, max_len), routed, dense_first(f, 3))
    return spec_of(f, "deepseek_v3", "DeepseekV3ForCausalLM", layers, max_len)


def sigmoid_experts(f: Fields, *, E: int, J: int, F: int, factor: float, groups: int, kept: int) -> MoE:
    """V3's experts; the values are those of a config that does not say."""
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    E, F = f.integer("n_routed_experts", E), f.integer("moe_intermediate_size", F)
    groups, kept = _groups(f, E, groups, kept)
    return MoE(
        E,
        f.chosen("num_experts_per_tok", J, E // groups * kept),
        F,
        scores="sigmoid",
        normalized=f.flag("norm_topk_prob", True),
        factor=f.number("routed_scaling_factor", factor),
        correction=True,
        groups=groups,
        kept=kept,
        shared=F * f.integer("n_shared_experts", 1),
    )


def _groups(f: Fields, experts: int, groups: int, kept: int) -> tuple[int, int]:
    groups = f.integer("n_group", groups)
    if experts % groups:
        raise f.error("n_group", f"does not divide n_routed_experts = {experts}")
    return groups, f.chosen("topk_group", min(kept, groups), groups)


def latent(f: Fields, max_len: int, *, still: int = 128, values: int = 128, query_rank: int = 1536) -> Latent:
    """Latent attention; the values are those of a config that does not say."""
    H = f.integer("num_attention_heads")
    still, turning = f.integer("qk_nope_head_dim", still), f.integer("qk_rope_head_dim", 64)
    if turning % 2:
        raise f.error("qk_rope_head_dim", "is odd, rotary positions need pairs of channels")
    rank = f.integer("kv_lora_rank", 512)
    if rank % 2:
        raise f.error("kv_lora_rank", "is odd, latents are kept by pairs of channels")
    if kv_heads(f, H) != H:
        raise f.error("num_key_value_heads", f"is not num_attention_heads = {H}; latents belong to all heads alike")
    f.only("attention_bias", False)
    f.only("rope_interleave", True)
    return Latent(
        heads=H,
        rank=rank,
        still=still,
        turning=turning,
        values=f.integer("v_head_dim", values),
        rope=rope(f, turning, max_len),
        scale=(still + turning) ** -0.5 * _stretch(f) ** 2,
        query_rank=f.integer("q_lora_rank", 0 if "q_lora_rank" in f.config else query_rank),  # null: there is none
    )


def dense_first(f: Fields, usual: int) -> tuple[bool, ...]:
    """Which layers have experts: all but the first."""
    first = f.integer("first_k_dense_replace", usual, least=0)
    return tuple(i >= first for i in range(f.integer("num_hidden_layers")))


def layers_of(f: Fields, mixer: Latent, routed: MoE, sparse: tuple[bool, ...], eps: float = 1e-6) -> tuple[Layer, ...]:
    """The layers, of which some have experts."""
    f.only("hidden_act", "silu")
    f.only("moe_layer_freq", 1)
    dense, eps = Mlp(f.integer("intermediate_size")), f.number("rms_norm_eps", eps)
    return tuple(Layer(mixer, routed if has else dense, eps) for has in sparse)


def _stretch(f: Fields) -> float:
    """What yarn multiplies queries and keys by, each, beside the gain of their rotated channels."""
    given = f.config.get("rope_parameters") or f.config.get("rope_scaling") or {}
    if given.get("rope_type", given.get("type", "default")) == "default":
        return 1.0
    factor = given.get("factor") or 1.0
    return 0.1 * given.get("mscale_all_dim", 0) * math.log(factor) + 1.0 if factor > 1 else 1.0


def spec_of(f: Fields, family: str, architecture: str, layers: tuple[Layer, ...], max_len: int) -> ModelSpec:
    """The spec of such layers."""
    f.integer("num_nextn_predict_layers", 1, least=0)  # layers after these, which predict further tokens
    width = f.integer("hidden_size")
    return model_spec(f, family, architecture, layers, width=width, max_len=max_len, inert=INERT)


INERT = (
    *ROUTING,
    *("head_dim", "qk_head_dim", "pretraining_tp", "mlp_bias", "aux_loss_alpha", "seq_aux", "ep_size"),
)
"""`head_dim` and `qk_head_dim` are written by transformers from the others."""

_AT = "model.layers.{i}.self_attn."

LATENT = {
    "q": f"{_AT}q_proj",
    "q_down": f"{_AT}q_a_proj",
    "q_norm": f"{_AT}q_a_layernorm",
    "q_up": f"{_AT}q_b_proj",
    "kv_down": f"{_AT}kv_a_proj_with_mqa",
    "kv_norm": f"{_AT}kv_a_layernorm",
    "kv_up": f"{_AT}kv_b_proj",
    "shared_gate_up": (
        "model.layers.{i}.mlp.shared_experts.gate_proj",
        "model.layers.{i}.mlp.shared_experts.up_proj",
    ),
    "shared_down": "model.layers.{i}.mlp.shared_experts.down_proj",
}


def _queries(a: Latent) -> Interleaved:
    return Interleaved(a.heads, 0, a.still + a.turning, a.turning // 2, first=a.still)


def _key(a: Latent) -> Interleaved:
    return Interleaved(1, 0, a.rank + a.turning, a.turning // 2, first=a.rank)


ORDERS = {"q": _queries, "q_up": _queries, "kv_down": _key}

V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", read_v2, {**NAMES, **EXPERTS, **LATENT}, IGNORED, orders=ORDERS)
V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    read_v3,
    {**NAMES, **EXPERTS, **LATENT},
    IGNORED,
    orders=ORDERS,
    further=DEEPSEEK,
)
