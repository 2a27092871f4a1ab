"""Qwen3.5, dense and with experts: Qwen3-Next's layers. Of a model that also sees, the part for text alone."""

from __future__ import annotations

from functools import partial

from fnengine.families.fields import Fields, experts, model_spec, text_of
from fnengine.families.names import DELTA_NET, EXPERTS, IGNORED, NAMES, QWEN, ROUTING, Family, Names, within
from fnengine.families.qwen3_next import ENDS, NORM, gated_queries, mixers, with_shared
from fnengine.spec import DeltaNet, Layer, Mlp, ModelSpec


def read(config: dict, where: str = "config.json", *, family: str, architecture: str) -> ModelSpec:
    """The spec of a Qwen3.5 config, of the text model alone or with a `text_config` in it.

    Source: keys as in transformers' Qwen3_5TextConfig and Qwen3_5MoeTextConfig.
    """
    f = Fields(text_of(config, where, TOWER), where)
    D, L = f.integer("hidden_size"), f.integer("num_hidden_layers")
    max_len = f.integer("max_position_embeddings", 32768)
    eps = f.number("rms_norm_eps", 1e-6)
    f.only("hidden_act", "silu")
    f.only("attn_output_gate", True)
    if "Moe" in architecture:
        mlp = with_shared(f, experts(f, 256), 8, normalized=True)
    else:
        mlp = Mlp(f.integer("intermediate_size", 12288))
    layers = tuple(Layer(mixer, mlp, eps, norm=NORM) for mixer in mixers(f, L, max_len))
    inert = (*ROUTING, "mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mlp_only_layers")
    return model_spec(f, family, architecture, layers, width=D, max_len=max_len, ends=ENDS, inert=inert)


def renamed(kind: Layer) -> Names:
    """What the arrays of a recurrent layer are called."""
    return DELTA_NET if isinstance(kind.mixer, DeltaNet) else {}


TOWER = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _family(name: str, architecture: str, whole: bool) -> Family:
    names = {**NAMES, **EXPERTS}
    return Family(
        name,
        architecture,
        partial(read, family=name, architecture=architecture),
        within(names, "model.language_model") if whole else names,
        IGNORED,
        orders={"qkv": gated_queries},
        renamed=(lambda kind: within(renamed(kind), "model.language_model")) if whole else renamed,
        asks=() if "Moe" in architecture else ("intermediate_size",),
        further=QWEN,
        apart=("model.visual.",),
    )


FAMILY = _family("qwen3_5_text", "Qwen3_5ForCausalLM", False)
MOE = _family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", False)
WHOLE = _family("qwen3_5", "Qwen3_5ForConditionalGeneration", True)
WHOLE_MOE = _family("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", True)
