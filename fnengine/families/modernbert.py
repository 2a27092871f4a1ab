"""ModernBERT: rope, gated halves, norms before each part, layers that see a window on both sides, now and then all."""

from __future__ import annotations

from dataclasses import replace

from fnengine.families.fields import Fields, act, check_layer_types, model_spec, rope
from fnengine.families.names import Family, Names
from fnengine.families.whole import BESIDE, classifies, head
from fnengine.spec import Attention, Ends, Layer, Mlp, ModelSpec, Norm, Rope, Whole

INERT = ("mlp_dropout", "embedding_dropout", "classifier_dropout", "decoder_bias", "deterministic_flash_attn")
INERT += ("initializer_cutoff_factor", "reference_compile", "repad_logits_with_grad", "sparse_prediction")
INERT += ("sparse_pred_ignore_index", "layer_norm_eps", "position_embedding_type")


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a ModernBertModel config, with a head or without.

    Source: Warner et al. 2024 (arXiv 2412.13663); keys as in transformers' ModernBertConfig.
    """
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    if D % H or D // H % 2:
        raise f.error("num_attention_heads", f"does not divide hidden_size = {D} into pairs of channels")
    C, max_len, eps = D // H, f.integer("max_position_embeddings", 8192), f.number("norm_eps", 1e-5)
    norm = Norm(centred=True, bias=f.flag("norm_bias"))
    every, window = f.integer("global_attn_every_n_layers", 3), f.integer("local_attention", 128) // 2 + 1
    types = f.take("layer_types", ["sliding_attention" if i % every else "full_attention" for i in range(L)])
    check_layer_types(f, types, L, ("full_attention", "sliding_attention"))
    thetas = {"full_attention": f.number("global_rope_theta", 160000.0)}
    thetas["sliding_attention"] = f.number("local_rope_theta", 10000.0)
    kinds = config.get("rope_parameters") or {}
    ropes: dict[str, Rope] = {
        t: rope(f, C, max_len, theta=theta, of=t) if isinstance(kinds.get(t), dict) else Rope(theta, C)
        for t, theta in thetas.items()
    }
    bias = f.flag("attention_bias")
    mlp = Mlp(f.integer("intermediate_size"), act(f, "hidden_activation", "gelu"), bias=f.flag("mlp_bias"))
    layers = tuple(
        Layer(
            Attention(
                heads=H,
                kv_heads=H,
                width=C,
                rope=ropes[t],
                scale=C**-0.5,
                qkv_bias=bias,
                out_bias=bias,
                window=window if t == "sliding_attention" else None,
                causal=False,
            ),
            mlp,
            eps,
            norm=norm,
            bare=i == 0,  # embeddings are normed already
        )
        for i, t in enumerate(types)
    )
    pooling, of_head, how = f.take("classifier_pooling", "cls"), f.flag("classifier_bias"), "gelu"
    if pooling not in ("cls", "mean"):
        raise f.error("classifier_pooling", "is neither cls nor mean")
    f.only("classifier_activation", how)
    labels = None
    if classifies(config):
        labels = head(config, where, pooling=pooling, dense=True, dense_bias=of_head, act=how, norm=norm)
    said = str((config.get("architectures") or ["ModernBertModel"])[0])
    spec = model_spec(
        f, "modernbert", said, layers, width=D, max_len=max_len, ends=Ends(norm=norm), inert=(*INERT, *BESIDE)
    )
    return replace(spec, tied=False, whole=Whole("cls", norm=norm, head=labels))


_LAYER = "model.layers.{i}."
NAMES: Names = {
    "embed": "model.embeddings.tok_embeddings",
    "embed_norm": "model.embeddings.norm",
    "norm1": f"{_LAYER}attn_norm",
    "qkv": f"{_LAYER}attn.Wqkv",
    "o": f"{_LAYER}attn.Wo",
    "norm2": f"{_LAYER}mlp_norm",
    "gate_up": f"{_LAYER}mlp.Wi",
    "down": f"{_LAYER}mlp.Wo",
    "norm": "model.final_norm",
    "label_dense": "head.dense",
    "label_norm": "head.norm",
    "label_out": "classifier",
}
_FILLS = (
    "decoder.weight",
    "decoder.bias",
    "head.dense.weight",
    "head.dense.bias",
    "head.norm.weight",
    "head.norm.bias",
)

FAMILY = Family(
    "modernbert",
    "ModernBertModel",
    read,
    NAMES,
    _FILLS,
    also=("ModernBertForSequenceClassification", "ModernBertForMaskedLM"),
    encodes=True,
)
