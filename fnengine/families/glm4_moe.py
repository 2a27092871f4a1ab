"""GLM-4.5, 4.6 and 4.7: sigmoid routing with corrections, a shared expert, half of each head rotates."""

from __future__ import annotations

from fnengine.families.fields import Fields, head_width, kv_heads, model_spec, rope
from fnengine.families.names import DEEPSEEK, EXPERTS, IGNORED, NAMES, ROUTING, Family
from fnengine.spec import Attention, Layer, Mlp, ModelSpec, MoE


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a Glm4MoeForCausalLM config.

    Source: GLM-4.5 (arXiv 2508.06471); keys as in transformers' Glm4MoeConfig.
    """
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    C, K = head_width(f, D, H), kv_heads(f, H)
    max_len = f.integer("max_position_embeddings", 131072)
    eps = f.number("rms_norm_eps", 1e-5)
    f.only("hidden_act", "silu")
    mixer = Attention(
        heads=H,
        kv_heads=K,
        width=C,
        rope=rope(f, C, max_len, partial=0.5),
        scale=C**-0.5,
        qkv_bias=f.flag("attention_bias"),
        qk_norm=f.flag("use_qk_norm"),
    )
    E, F = f.integer("n_routed_experts", 128), f.integer("moe_intermediate_size", 1408)
    groups = f.integer("n_group", 1)
    if E % groups:
        raise f.error("n_group", f"does not divide n_routed_experts = {E}")
    routed = MoE(
        E,
        f.chosen("num_experts_per_tok", 8, E),
        F,
        scores="sigmoid",
        normalized=f.flag("norm_topk_prob", True),
        factor=f.number("routed_scaling_factor", 1.0),
        correction=True,
        groups=groups,
        kept=f.chosen("topk_group", 1, groups),
        shared=F * f.integer("n_shared_experts", 1),
    )
    dense, first = Mlp(f.integer("intermediate_size", 10944)), f.integer("first_k_dense_replace", 1, least=0)
    layers = tuple(Layer(mixer, dense if i < first else routed, eps) for i in range(L))
    f.integer("num_nextn_predict_layers", 1, least=0)  # layers after these, which predict further tokens
    return model_spec(f, "glm4_moe", "Glm4MoeForCausalLM", layers, width=D, max_len=max_len, inert=ROUTING)


OURS = {
    "correction": "model.layers.{i}.mlp.gate.e_score_correction_bias",
    "shared_gate_up": (
        "model.layers.{i}.mlp.shared_experts.gate_proj",
        "model.layers.{i}.mlp.shared_experts.up_proj",
    ),
    "shared_down": "model.layers.{i}.mlp.shared_experts.down_proj",
}

FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", read, {**NAMES, **EXPERTS, **OURS}, IGNORED, further=DEEPSEEK)
