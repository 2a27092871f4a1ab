"""GLM-4.7-Flash: DeepSeek-V3's latent attention and experts in GLM's sizes."""

from __future__ import annotations

from fnengine.families import deepseek
from fnengine.families.deepseek import dense_first, latent, layers_of, sigmoid_experts, spec_of
from fnengine.families.fields import Fields
from fnengine.families.names import DEEPSEEK, EXPERTS, IGNORED, NAMES, Family
from fnengine.spec import ModelSpec


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a Glm4MoeLiteForCausalLM config.

    Source: keys as in transformers' Glm4MoeLiteConfig.
    """
    f = Fields(config, where)
    f.only("partial_rotary_factor", 1.0)
    routed = sigmoid_experts(f, E=64, J=4, F=1536, factor=1.8, groups=1, kept=1)
    max_len = f.integer("max_position_embeddings", 202752)
    types, sparse = f.take("mlp_layer_types", None), dense_first(f, 1)
    if types is not None:
        if len(types) != len(sparse) or set(types) - {"dense", "sparse"}:
            raise f.error("mlp_layer_types", f"does not say dense or sparse of {len(sparse)} layers")
        sparse = tuple(t == "sparse" for t in types)
    mixer = latent(f, max_len, still=192, values=256, query_rank=768)
    layers = layers_of(f, mixer, routed, sparse, 1e-5)
    return spec_of(f, "glm4_moe_lite", "Glm4MoeLiteForCausalLM", layers, max_len)


FAMILY = Family(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    read,
    {**NAMES, **EXPERTS, **deepseek.LATENT},
    IGNORED,
    orders=deepseek.ORDERS,
    further=DEEPSEEK,
)
