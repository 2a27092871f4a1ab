"""Bamba (9B): layers of Mamba 2, a few of attention among them, half of whose heads' channels rotate."""

from __future__ import annotations

from fnengine.families.fields import Fields, head_width, kv_heads, model_spec, rope
from fnengine.families.names import IGNORED, NAMES, Family, Names
from fnengine.spec import Attention, Layer, Mamba2, Mlp, ModelSpec


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a BambaForCausalLM config.

    Source: keys as in transformers' BambaConfig.
    """
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads", 32)
    C, bias = head_width(f, D, H), f.flag("attention_bias")
    max_len = f.integer("max_position_embeddings", 262144)
    eps = f.number("rms_norm_eps", 1e-5)
    f.only("hidden_act", "silu")
    if f.integer("attn_rotary_emb", C // 2) != C // 2:
        raise f.error("attn_rotary_emb", f"is not half of a head, {C // 2} channels")
    attention = Attention(
        heads=H,
        kv_heads=kv_heads(f, H),
        width=C,
        rope=rope(f, C, max_len, partial=0.5),
        scale=C**-0.5,
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = Mlp(f.integer("intermediate_size", 14336), bias=f.flag("mlp_bias"))
    attending = f.ids("attn_layer_indices")
    mixers = [attention if i in attending else mamba(f, D) for i in range(L)]
    layers = tuple(Layer(mixer, mlp, eps) for mixer in mixers)
    return model_spec(f, "bamba", "BambaForCausalLM", layers, width=D, max_len=max_len, inert=INERT)


def mamba(f: Fields, width: int) -> Mamba2:
    """The mixer of the other layers."""
    H, G = f.integer("mamba_n_heads", 128), f.integer("mamba_n_groups", 1)
    inner = f.integer("mamba_expand", 2) * width
    P = inner // H if f.take("mamba_d_head", "auto") == "auto" else f.integer("mamba_d_head")
    if inner != H * P or H % G:
        raise f.error("mamba_n_heads", f"does not divide {inner} channels into heads, or {G} groups do not divide it")
    limit = f.take("time_step_limit", (0.0, float("inf")))
    if not isinstance(limit, (list, tuple)) or len(limit) != 2:
        raise f.error("time_step_limit", "is no pair of numbers")
    least, most = map(float, limit)
    return Mamba2(
        H,
        G,
        f.integer("mamba_d_state", 256),
        P,
        taps=f.integer("mamba_d_conv", 4, least=2),
        conv_bias=f.flag("mamba_conv_bias", True),
        bias=f.flag("mamba_proj_bias"),
        least=least,
        most=most,
    )


def renamed(kind: Layer) -> Names:
    """What the arrays of a recurrent layer are called."""
    return MAMBA if isinstance(kind.mixer, Mamba2) else {}


INERT = (
    "use_mamba_kernels",
    "num_logits_to_keep",
    "mamba_chunk_size",
    "z_loss_coefficient",
    "layer_types",
    "layers_block_type",
)

MAMBA: Names = {
    "mix": "model.layers.{i}.mamba.in_proj",
    "conv": "model.layers.{i}.mamba.conv1d.weight",
    "conv_bias": "model.layers.{i}.mamba.conv1d.bias",
    "decay": "model.layers.{i}.mamba.A_log",
    "step_bias": "model.layers.{i}.mamba.dt_bias",
    "skip": "model.layers.{i}.mamba.D",
    "gate_norm": "model.layers.{i}.mamba.norm.weight",
    "o": "model.layers.{i}.mamba.out_proj",
}
OURS: Names = {
    "norm2": "model.layers.{i}.pre_ff_layernorm",
    "gate_up": ("model.layers.{i}.feed_forward.gate_proj", "model.layers.{i}.feed_forward.up_proj"),
    "down": "model.layers.{i}.feed_forward.down_proj",
    "norm": "model.final_layernorm",
}

FAMILY = Family("bamba", "BambaForCausalLM", read, {**NAMES, **OURS}, IGNORED, renamed=renamed)
