"""Phi-3.5-MoE: LayerNorm, biases to the head, and two of sixteen experts, each weighed among those nearly as good."""

from __future__ import annotations

from fnengine.families.fields import Fields, head_width, kv_heads, model_spec, rope
from fnengine.families.names import EXPERTS, IGNORED, NAMES, ROUTING, Family
from fnengine.spec import Attention, Ends, Layer, ModelSpec, MoE, Norm


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a PhimoeForCausalLM config.

    Source: Phi-3 (arXiv 2404.14219), section 5; keys as in transformers' PhimoeConfig.
    """
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    C, K = head_width(f, D, H), kv_heads(f, H)
    max_len = f.integer("max_position_embeddings", 4096 * 32)
    f.only("hidden_act", "silu")
    f.only("num_experts_per_tok", 2)  # upstream chooses two, whatever it says
    bias, norm = f.flag("attention_bias"), Norm(centred=True, bias=True)
    E = f.integer("num_local_experts", 16, least=2)
    kind = Layer(
        Attention(
            heads=H,
            kv_heads=K,
            width=C,
            rope=rope(f, C, max_len, theta=1e6),
            scale=C**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            window=f.integer("sliding_window", None),
        ),
        MoE(E, 2, f.integer("intermediate_size"), scores="near", near=2 * f.number("router_jitter_noise", 0.01)),
        f.number("rms_norm_eps", 1e-5),
        norm=norm,
    )
    ends = Ends(norm, head_bias=f.flag("lm_head_bias"))
    return model_spec(f, "phimoe", "PhimoeForCausalLM", (kind,) * L, width=D, max_len=max_len, ends=ends, inert=ROUTING)


OURS = {
    "router": "model.layers.{i}.block_sparse_moe.gate",
    "fused.router": "model.layers.{i}.mlp.router",
    "experts_gate_up": (
        "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    ),
    "experts_down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}

FAMILY = Family(
    "phimoe",
    "PhimoeForCausalLM",
    read,
    {**NAMES, **EXPERTS, **OURS},
    IGNORED,
    also=("PhiMoEForCausalLM",),  # its own code's
)
