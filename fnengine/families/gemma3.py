"""Gemma 3 (text): layers that see a window, with a rope of their own, and now and then one that sees everything."""

from __future__ import annotations

from fnengine.families.fields import Fields, kv_heads, layer_windows, model_spec, rope
from fnengine.families.gemma import INERT, NORM, OWN, gelu
from fnengine.families.names import IGNORED, NAMES, Family
from fnengine.spec import Attention, Ends, Layer, Mlp, ModelSpec, Rope


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a Gemma3ForCausalLM config.

    Source: Gemma 3 (arXiv 2503.19786); keys as in transformers' Gemma3TextConfig.
    """
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    C, K = f.integer("head_dim", 256), kv_heads(f, H)
    max_len, bias = f.integer("max_position_embeddings", 131072), f.flag("attention_bias")
    scale, cap = f.number("query_pre_attn_scalar", 256.0) ** -0.5, f.number("attn_logit_softcapping", 0.0)
    eps, F, how = f.number("rms_norm_eps", 1e-6), f.integer("intermediate_size"), gelu(f)
    both = f.flag("use_bidirectional_attention")  # the window is then what a token sees on both sides together
    every = f.integer("sliding_window_pattern", f.integer("_sliding_window_pattern", 6))
    seen = f.integer("sliding_window", 4096)
    usual = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(L)]
    far = rope(f, C, max_len, theta=1000000.0, of="full_attention")
    own = f.number("rope_local_base_freq", 10000.0)
    near = Rope(own, C)
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        near = rope(f, C, max_len, theta=own, of="sliding_attention")
    layers = tuple(
        Layer(
            Attention(
                heads=H,
                kv_heads=K,
                width=C,
                rope=far if window is None else near,
                scale=scale,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=True,
                window=window,
                soft_cap=cap,
                qk_as=NORM,
                causal=not both,
            ),
            Mlp(F, how),
            eps,
            norm=NORM,
            after=True,
        )
        for window in layer_windows(f, L, seen // 2 + 1 if both else seen, usual)
    )
    ends = Ends(norm=NORM, embed_scale=D**0.5, logit_cap=f.number("final_logit_softcapping", 0.0))
    return model_spec(
        f, "gemma3_text", "Gemma3ForCausalLM", layers, width=D, max_len=max_len, tied=True, ends=ends, inert=INERT
    )


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    read,
    {**NAMES, **OWN},
    IGNORED,
    also=("Gemma3TextModel", "Gemma3TextForSequenceClassification"),
)
