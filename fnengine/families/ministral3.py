"""Ministral 3: Mistral with yarn and a temperature of queries that grows with the position. And Mistral 3, which sees:
the part of it for text, which is Mistral's (Mistral Small 3.1 and later) or Ministral 3's."""

from __future__ import annotations

from dataclasses import replace

from fnengine.families import mistral
from fnengine.families.fields import Fields, head_width, kv_heads, model_spec, rope, text_of
from fnengine.families.names import IGNORED, NAMES, Family, within
from fnengine.spec import Attention, Layer, Mlp, ModelSpec, Tempered


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a Ministral3ForCausalLM config.

    Source: Mistral AI 2026 (arXiv 2601.08584); keys as in transformers' Ministral3Config.
    """
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        config = {**config, "rope_parameters": YARN}
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    C, K = head_width(f, D, H), kv_heads(f, H)
    max_len, eps = f.integer("max_position_embeddings", 262144), f.number("rms_norm_eps", 1e-5)
    f.only("hidden_act", "silu")
    turning = rope(f, C, max_len, theta=1000000.0, inert=(BETA, "max_position_embeddings"))
    given = Fields(config.get("rope_parameters") or config["rope_scaling"], f"{where}, rope_parameters")
    beta = given.take(BETA, 0)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or beta < 0:
        raise given.error(BETA, "is not a number of at least 0")
    every = given.integer("original_max_position_embeddings", max_len)
    kind = Layer(
        Attention(
            heads=H,
            kv_heads=K,
            width=C,
            rope=Tempered(every, float(beta), first=0, rope=turning) if beta else turning,
            scale=C**-0.5,
            window=f.integer("sliding_window", None),
        ),
        Mlp(f.integer("intermediate_size")),
        eps,
    )
    return model_spec(f, "ministral3", "Ministral3ForCausalLM", (kind,) * L, width=D, max_len=max_len)


def read_whole(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of the text model in a Mistral3ForConditionalGeneration config.

    Source: keys as in transformers' Mistral3Config.
    """
    text = text_of(config, where, TOWER, tied=True)
    spec = (mistral.read if text.get("model_type") == "mistral" else read)(text, where)
    return replace(spec, family="mistral3", architecture="Mistral3ForConditionalGeneration")


BETA = "llama_4_scaling_beta"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    BETA: 0.1,
}
"""What a config that says nothing means."""
TOWER = (
    *("vision_config", "vision_feature_layer", "image_token_index", "image_token_id", "spatial_merge_size"),
    *("projector_hidden_act", "multimodal_projector_bias"),
)

FAMILY = Family("ministral3", "Ministral3ForCausalLM", read, NAMES, IGNORED)
WHOLE = Family(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    read_whole,
    within(NAMES, "model.language_model"),
    IGNORED,
    apart=("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector."),
    spelt={"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
)
