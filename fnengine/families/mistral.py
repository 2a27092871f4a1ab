"""Mistral 7B (v0.1 with its sliding window, v0.2 and v0.3 without) and later models of that architecture."""

from __future__ import annotations

from fnengine.families.fields import Fields, check_layer_types, dtype_name, head_width, kv_heads, rope
from fnengine.families.names import IGNORED, NAMES, Family
from fnengine.spec import Attention, Layer, Mlp, ModelSpec


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a MistralForCausalLM config.

    Source: Jiang et al. 2023 (arXiv 2310.06825); keys as in transformers' MistralConfig.
    """
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    C, K = head_width(f, D, H), kv_heads(f, H)
    max_len = f.integer("max_position_embeddings", 4096 * 32)
    eps = f.number("rms_norm_eps", 1e-6)
    f.only("hidden_act", "silu")
    # null means no window; absent means the default of the first release.
    window = f.integer("sliding_window", None) if "sliding_window" in config else 4096
    if "layer_types" in config and f.take("layer_types", None) is not None:
        one = "full_attention" if window is None else "sliding_attention"
        check_layer_types(f, config["layer_types"], L, (one,))
    kind = Layer(
        Attention(heads=H, kv_heads=K, width=C, rope=rope(f, C, max_len), scale=C**-0.5, window=window),
        Mlp(f.integer("intermediate_size")),
        eps,
    )
    spec = ModelSpec(
        family="mistral",
        architecture="MistralForCausalLM",
        vocab=f.integer("vocab_size"),
        width=D,
        layers=(kind,) * L,
        eps=eps,
        tied=f.flag("tie_word_embeddings"),
        max_len=max_len,
        dtype=dtype_name(f),
        eos=f.ids("eos_token_id"),
        bos=f.integer("bos_token_id", None, least=0),
    )
    f.close()
    return spec


FAMILY = Family("mistral", "MistralForCausalLM", read, NAMES, IGNORED)
