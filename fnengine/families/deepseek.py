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
    routed = MoE(
        E,
        f.chosen("num_experts_per_tok", 6, E // groups * kept),
        f.integer("moe_intermediate_size", 1407),
        normalized=False,
        wide=True,
        factor=f.number("routed_scaling_factor", 1.0),
        groups=groups,
        kept=kept,
        best=1,
        shared=f.integer("moe_intermediate_size", 1407) * f.integer("n_shared_experts", 2),
    )
    layers = _layers(f, routed, first=0, max_len=2048)
    return _spec(f, "deepseek_v2", "DeepseekV2ForCausalLM", layers, 2048)


def read_v3(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a DeepseekV3ForCausalLM config.

    Source: DeepSeek-V3 (arXiv 2412.19437); keys as in transformers' DeepseekV3Config.
    """
    f = Fields(config, where)
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    f.only("rope_interleave", True)
    E = f.integer("n_routed_experts", 256)
    groups, kept = _groups(f, E, 8, 4)
    routed = MoE(
        E,
        f.chosen("num_experts_per_tok", 8, E // groups * kept),
        f.integer("moe_intermediate_size", 2048),
        scores="sigmoid",
        normalized=f.flag("norm_topk_prob", True),
        factor=f.number("routed_scaling_factor", 2.5),
        correction=True,
        groups=groups,
        kept=kept,
        shared=f.integer("moe_intermediate_size", 2048) * f.integer("n_shared_experts", 1),
    )
    layers = _layers(f, routed, first=3, max_len=4096)
    f.integer("num_nextn_predict_layers", 1, least=0)  # layers after these, which predict further tokens
    return _spec(f, "deepseek_v3", "DeepseekV3ForCausalLM", layers, 4096)


def _groups(f: Fields, experts: int, groups: int, kept: int) -> tuple[int, int]:
    groups = f.integer("n_group", groups)
    if experts % groups:
        raise f.error("n_group", f"does not divide n_routed_experts = {experts}")
    return groups, f.chosen("topk_group", min(kept, groups), groups)


def _layers(f: Fields, routed: MoE, first: int, max_len: int) -> tuple[Layer, ...]:
    """The dense ones, so many of them by default, and those with experts."""
    L, H = f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    still, turning = f.integer("qk_nope_head_dim", 128), f.integer("qk_rope_head_dim", 64)
    if turning % 2:
        raise f.error("qk_rope_head_dim", "is odd, rotary positions need pairs of channels")
    rank = f.integer("kv_lora_rank", 512)
    if rank % 2:
        raise f.error("kv_lora_rank", "is odd, latents are kept by pairs of channels")
    if kv_heads(f, H) != H:
        raise f.error("num_key_value_heads", f"is not num_attention_heads = {H}; latents belong to all heads alike")
    f.only("attention_bias", False)
    f.only("hidden_act", "silu")
    f.only("moe_layer_freq", 1)
    turned = rope(f, turning, f.integer("max_position_embeddings", max_len))
    query_rank = f.integer("q_lora_rank", 0 if "q_lora_rank" in f.config else 1536)  # null: there is none
    mixer = Latent(
        heads=H,
        rank=rank,
        still=still,
        turning=turning,
        values=f.integer("v_head_dim", 128),
        rope=turned,
        scale=(still + turning) ** -0.5 * _stretch(f) ** 2,
        query_rank=query_rank,
    )
    dense, eps = Mlp(f.integer("intermediate_size")), f.number("rms_norm_eps", 1e-6)
    first = f.integer("first_k_dense_replace", first, least=0)
    return tuple(Layer(mixer, dense if i < first else routed, eps) for i in range(L))


def _stretch(f: Fields) -> float:
    """What yarn multiplies queries and keys by, each, beside the gain of their rotated channels."""
    given = f.config.get("rope_parameters") or f.config.get("rope_scaling") or {}
    if given.get("rope_type", given.get("type", "default")) == "default":
        return 1.0
    factor = given.get("factor") or 1.0
    return 0.1 * given.get("mscale_all_dim", 0) * math.log(factor) + 1.0 if factor > 1 else 1.0


def _spec(f: Fields, family: str, architecture: str, layers: tuple[Layer, ...], max_len: int) -> ModelSpec:
    return model_spec(
        f,
        family,
        architecture,
        layers,
        width=f.integer("hidden_size"),
        max_len=f.integer("max_position_embeddings", max_len),
        inert=INERT,
    )


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
