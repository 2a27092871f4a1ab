"""Gemma 4, its text model: layers that see a window, with narrow heads, and layers that see everything, with wide ones.

Some sizes have an input for each layer and layers at the end that borrow KV, one has experts beside each MLP. Of the
models that see and hear the part for text is read.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from fnengine.families.fields import Fields, act, check_layer_types, kv_heads, model_spec, rope, text_of
from fnengine.families.gemma import OWN
from fnengine.families.names import IGNORED, NAMES, Family, Names, within
from fnengine.spec import Act, Attention, Beside, Both, Ends, Layer, Mlp, ModelSpec, MoE, Rope, borrows


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a Gemma4ForCausalLM config.

    Source: Google 2026, the Gemma 4 release; keys as in transformers' Gemma4TextConfig.
    """
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    max_len, bias, doubles = f.integer("max_position_embeddings", 131072), f.flag("attention_bias"), f.flag(SAME)
    eps, F, how = f.number("rms_norm_eps", 1e-6), f.integer("intermediate_size"), act(f, "hidden_activation", GELU)
    f.only("use_bidirectional_attention", None, "vision")  # which is of images
    window, types = f.integer("sliding_window", 512), layer_types(f, L)
    shapes = [heads(f, i, kind, doubles) for i, kind in enumerate(types)]
    ropes = {(kind, C): turning(f, kind, C, max_len) for kind, (_, C) in zip(types, shapes, strict=True)}
    shared, twice = f.integer("num_kv_shared_layers", 0, least=0), f.flag("use_double_wide_mlp")
    P = f.integer("hidden_size_per_layer_input", 256, least=0)
    routed = experts(f, how) if f.flag("enable_moe_block") else None
    layers, lenders = [], []
    for i, (kind, (K, C)) in enumerate(zip(types, shapes, strict=True)):
        mixer = Attention(
            heads=H,
            kv_heads=K,
            width=C,
            rope=ropes[kind, C],
            scale=1.0,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            window=window if kind == SLIDING else None,
            v_norm=True,
            doubles=doubles and kind == FULL,
        )
        lender = i
        if i >= L - shared:
            own = [j for j in range(L - shared) if types[j] == kind]
            if not own:
                raise f.error("num_kv_shared_layers", f"leaves no {kind} layer with KV of its own")
            lender = own[-1]
            if layers[lender].mixer != mixer:
                raise f.error("num_kv_shared_layers", f"lets layer {i} read KV of layer {lender}, of another shape")
            mixer = replace(mixer, borrows=True)
        dense = Mlp(F * (2 if twice and mixer.borrows else 1), how)
        beside = Beside(P, how) if P else None
        half = dense if routed is None else Both(dense, routed)
        layers.append(Layer(mixer, half, eps, after=True, beside=beside, scaled=True))
        lenders.append(lender)
    rows = f.integer("vocab_size_per_layer_input", 262144)
    if P and rows < f.integer("vocab_size"):
        raise f.error("vocab_size_per_layer_input", "is less than vocab_size, so some tokens have no input for layers")
    ends = Ends(embed_scale=D**0.5, logit_cap=f.number("final_logit_softcapping", 0.0), inputs=rows if P else 0)
    sizes: dict[str, Any] = dict(width=D, max_len=max_len, tied=True, ends=ends)
    unread = ("num_experts", "top_k_experts", "moe_intermediate_size", "num_global_key_value_heads", "global_head_dim")
    spec = model_spec(f, "gemma4_text", "Gemma4ForCausalLM", tuple(layers), **sizes, inert=unread)
    return replace(spec, lenders=tuple(lenders) if shared else ())


def layer_types(f: Fields, layers: int) -> list[str]:
    """What each layer sees. The last one sees everything, whatever a config says, as upstream has it."""
    types = f.take("layer_types", None) or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]
    check_layer_types(f, types, layers, (FULL, SLIDING))
    return [*types[:-1], FULL]


def heads(f: Fields, layer: int, kind: str, doubles: bool) -> tuple[int, int]:
    """(K, C) of a layer, by its kind or, as transformers 5 writes it, by its number."""
    K, C = kv_heads(f, f.config["num_attention_heads"]), f.integer("head_dim", 256)
    by_number = f.take("per_layer_config", None)
    if by_number is None and kind == FULL:
        C = f.integer("global_head_dim", 512)
        K = f.integer("num_global_key_value_heads", K) if doubles else K
    by_number = {} if by_number is None else by_number
    if not isinstance(by_number, dict) or not all(str(n).isdecimal() for n in by_number):
        raise f.error("per_layer_config", "is no object of layers by their numbers")
    own = {int(n): value for n, value in by_number.items()}.get(layer, {})  # 5 may be written 05
    if not isinstance(own, dict):
        raise f.error("per_layer_config", f"says nothing that is understood of layer {layer}")
    one = Fields(own, f"{f.where}, per_layer_config.{layer}")
    K, C = one.integer("num_key_value_heads", K), one.integer("head_dim", C)
    one.close()
    if f.config["num_attention_heads"] % K or C % 2:
        raise f.error("num_attention_heads", f"cannot be {K} KV heads of {C} channels, as layer {layer} has them")
    return K, C


def turning(f: Fields, kind: str, width: int, max_len: int) -> Rope:
    """The rope of a kind of layer."""
    given = f.config.get("rope_parameters") or ROPES
    inner = Fields({"rope_parameters": given}, f.where)
    f.used.add("rope_parameters")
    return rope(inner, width, max_len, of=kind)


def experts(f: Fields, how: Act) -> MoE:
    """The experts beside an MLP."""
    E = f.integer("num_experts")
    chosen = f.integer("top_k_experts")
    if chosen > E:
        raise f.error("top_k_experts", f"is more than there are experts, {E}")
    return MoE(E, chosen, f.integer("moe_intermediate_size"), scaled=True, act=how)


def read_whole(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of the text model in a Gemma4ForConditionalGeneration config.

    Source: keys as in transformers' Gemma4Config.
    """
    spec = read(text_of(config, where, TOWERS, tied=True), where)
    return replace(spec, family="gemma4", architecture="Gemma4ForConditionalGeneration")


def renamed(kind: Layer) -> Names:
    """Of a layer without projections of its own for values, or for both."""
    a = kind.mixer
    if not isinstance(a, Attention) or not (a.borrows or a.doubles):
        return {}
    return {"qkv": NAMES["qkv"][:1] if a.borrows else NAMES["qkv"][:2]}


def unread(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor makes keys or values of a layer that borrows them: checkpoints may hold it."""
    found = re.search(r"\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.", name)
    at = int(found[1]) if found else len(spec.layers)
    return at < len(spec.layers) and borrows(spec.layers[at].mixer)


SLIDING, FULL, SAME, GELU = "sliding_attention", "full_attention", "attention_k_eq_v", "gelu_pytorch_tanh"
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
"""What a config that says nothing means."""
TOWERS = (
    *("vision_config", "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id"),
    *("boa_token_id", "eoa_token_id", "eoa_token_index", "audio_token_id", "vision_soft_tokens_per_image"),
)
_AT = "model.layers.{i}."
OURS: Names = {
    **OWN,
    "scalar": f"{_AT}layer_scalar",
    "beside_gate": f"{_AT}per_layer_input_gate",
    "beside_out": f"{_AT}per_layer_projection",
    "beside_after": f"{_AT}post_per_layer_input_norm",
    "dense_after": f"{_AT}post_feedforward_layernorm_1",
    "routed_norm": f"{_AT}pre_feedforward_layernorm_2",
    "routed_after": f"{_AT}post_feedforward_layernorm_2",
    "router": f"{_AT}router.proj",
    "router_scale": f"{_AT}router.scale",
    "expert_scale": f"{_AT}router.per_expert_scale",
    "fused.experts_gate_up": f"{_AT}experts.gate_up_proj",
    "fused.experts_down": f"{_AT}experts.down_proj",
    "inputs": "model.embed_tokens_per_layer",
    "inputs_project": "model.per_layer_model_projection",
    "inputs_norm": "model.per_layer_projection_norm",
}
INNER = "model.language_model"
FAMILY = Family("gemma4_text", "Gemma4ForCausalLM", read, {**NAMES, **OURS}, IGNORED, renamed=renamed, unread=unread)
WHOLE = Family(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    read_whole,
    within({**NAMES, **OURS}, INNER),
    IGNORED,
    renamed=lambda kind: within(renamed(kind), INNER),
    unread=unread,
    apart=("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."),
)
