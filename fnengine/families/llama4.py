"""Llama 4's text model: chunks of attention, every fourth layer without rope, one expert whose input is weighed.

The published checkpoints (Scout, Maverick) hold this model inside of one that sees; that one is not read yet.
"""

from __future__ import annotations

from fnengine.families.fields import Fields, check_layer_types, head_width, kv_heads, model_spec, rope
from fnengine.families.names import IGNORED, NAMES, ROUTING, Family, Interleaved
from fnengine.spec import Attention, Layer, Mlp, ModelSpec, MoE, Norm, Rope, Tempered


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a Llama4ForCausalLM config.

    Source: Meta 2025, the Llama 4 release; keys as in transformers' Llama4TextConfig.
    """
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    C, K = head_width(f, D, H), kv_heads(f, H)
    max_len = f.integer("max_position_embeddings", 4096 * 32)
    eps, bias = f.number("rms_norm_eps", 1e-5), f.flag("attention_bias")
    f.only("hidden_act", "silu")
    turning, normed = rope(f, C, max_len, theta=500000.0), f.flag("use_qk_norm", True)
    every, scale = f.integer("floor_scale", 8192), f.number("attn_scale", 0.1)
    still = Tempered(every, scale) if f.take("attn_temperature_tuning", True) else None  # some configs say 4
    step = f.integer("no_rope_layer_interval", 4)
    turns = f.take("no_rope_layers", None) or [int((i + 1) % step != 0) for i in range(L)]
    if not isinstance(turns, list) or len(turns) < L or any(t not in (0, 1) for t in turns):
        raise f.error("no_rope_layers", f"does not say 0 or 1 of {L} layers")
    chunk = f.integer("attention_chunk_size", 0 if "attention_chunk_size" in config else 8192)  # null: there is none
    types = f.take("layer_types", None) or [CHUNKED if t and chunk else FULL for t in turns[:L]]
    check_layer_types(f, types, L, (CHUNKED, FULL))
    if CHUNKED in types and not chunk:
        raise f.error("attention_chunk_size", "is missing, and layer_types has chunked_attention")
    between = f.integer("interleave_moe_layer_step", 1)
    sparse = f.take("moe_layers", list(range(between - 1, L, between)))
    E, F = f.integer("num_local_experts", 16), f.integer("intermediate_size", 8192)
    chosen = f.chosen("num_experts_per_tok", 1, E)
    routed = MoE(E, chosen, F, scores="gates", early=True, shared=F)
    dense = Mlp(f.integer("intermediate_size_mlp", 16384))
    layers = tuple(
        Layer(
            Attention(
                heads=H,
                kv_heads=K,
                width=C,
                rope=turning if turns[i] else still,
                scale=C**-0.5,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=normed and bool(turns[i]),
                qk_as=Norm(weight=False),  # after rope upstream, which leaves lengths as they are
                chunk=chunk if types[i] == CHUNKED else 0,
            ),
            routed if i in sparse else dense,
            eps,
        )
        for i in range(L)
    )
    inert = (*ROUTING, "for_llm_compressor", "cache_implementation")
    return model_spec(f, "llama4_text", "Llama4ForCausalLM", layers, width=D, max_len=max_len, inert=inert)


CHUNKED, FULL = "chunked_attention", "full_attention"
_AT = "model.layers.{i}.feed_forward."
OURS = {
    "gate_up": (f"{_AT}gate_proj", f"{_AT}up_proj"),
    "down": f"{_AT}down_proj",
    "router": f"{_AT}router",
    "fused.experts_gate_up": f"{_AT}experts.gate_up_proj",
    "fused.experts_down": f"{_AT}experts.down_proj",
    "fused.transposed": "yes",
    "shared_gate_up": (f"{_AT}shared_expert.gate_proj", f"{_AT}shared_expert.up_proj"),
    "shared_down": f"{_AT}shared_expert.down_proj",
}


def _turning(a: Attention) -> Interleaved | None:
    if not isinstance(a.rope, Rope):
        return None
    return Interleaved(a.heads + a.kv_heads, a.kv_heads, a.width, a.rope.width // 2)


FAMILY = Family("llama4_text", "Llama4ForCausalLM", read, {**NAMES, **OURS}, IGNORED, orders={"qkv": _turning})
