"""BERT, RoBERTa and XLM-R: learned positions, norms of each sum, every token sees its whole text."""

from __future__ import annotations

from dataclasses import replace

from fnengine.families.fields import Fields, act, model_spec
from fnengine.families.names import Family, Names
from fnengine.families.whole import BESIDE, classifies, head
from fnengine.spec import Attention, Ends, Layer, Mlp, ModelSpec, Norm, Whole

NORM = Norm(centred=True, bias=True)
INERT = ("classifier_dropout", "output_past", "directionality", "pooler_fc_size", "pooler_num_attention_heads")
INERT += ("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", *BESIDE)


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a BertModel config, with a head or without.

    Source: Devlin et al. 2018 (arXiv 1810.04805); keys as in transformers' BertConfig.
    """
    return _read(config, where, "bert", 0)


def read_roberta(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a RobertaModel config. Positions are counted from the one after the padding token's id.

    Source: Liu et al. 2019 (arXiv 1907.11692); keys as in transformers' RobertaConfig.
    """
    return _read(config, where, "roberta", 1)


def read_xlm_roberta(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of an XLMRobertaModel config, which says what a RoBERTa's does.

    Source: Conneau et al. 2019 (arXiv 1911.02116).
    """
    return _read(config, where, "xlm-roberta", 1)


def _read(config: dict, where: str, family: str, padding: int) -> ModelSpec:
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    if D % H:
        raise f.error("num_attention_heads", f"does not divide hidden_size = {D}")
    f.only("position_embedding_type", "absolute")
    f.only("is_decoder", False)
    f.only("add_cross_attention", False)
    first = f.integer("pad_token_id", 1, least=0) + 1 if padding else 0
    table, eps = f.integer("max_position_embeddings", 512), f.number("layer_norm_eps", 1e-12)
    kind = Layer(
        Attention(H, H, D // H, None, (D // H) ** -0.5, qkv_bias=True, out_bias=True, causal=False),
        Mlp(f.integer("intermediate_size"), act(f, "hidden_act", "gelu"), bias=True, gated=False),
        eps,
        norm=NORM,
        before=False,
        after=True,
        onto=True,
    )
    labels = head(config, where, pooling="cls", dense=True) if classifies(config) else None
    types = f.integer("type_vocab_size", 2, least=0)
    whole = Whole("cls", types, NORM, final=False, head=labels)
    ends = Ends(norm=NORM, positions=table, first_position=first)
    said = str((config.get("architectures") or [f"{family} model"])[0])
    spec = model_spec(f, family, said, (kind,) * L, width=D, max_len=table - first, ends=ends, inert=INERT)
    return replace(spec, tied=False, whole=whole)


_LAYER = "{m}.encoder.layer.{i}."
_NAMES: Names = {
    "embed": "{m}.embeddings.word_embeddings",
    "positions": "{m}.embeddings.position_embeddings",
    "types": "{m}.embeddings.token_type_embeddings",
    "embed_norm": "{m}.embeddings.LayerNorm",
    "qkv": tuple(f"{_LAYER}attention.self.{part}" for part in ("query", "key", "value")),
    "o": f"{_LAYER}attention.output.dense",
    "after1": f"{_LAYER}attention.output.LayerNorm",
    "up": f"{_LAYER}intermediate.dense",
    "down": f"{_LAYER}output.dense",
    "after2": f"{_LAYER}output.LayerNorm",
}


def _named(model: str, **more: str) -> Names:
    def of(name: str) -> str:
        return name.replace("{m}", model)

    return {k: of(n) if isinstance(n, str) else tuple(map(of, n)) for k, n in _NAMES.items()} | more


_IGNORED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
"""The pooler is a head's first layer, or nothing: vectors are pooled from the last layer."""
_PREDICTS = tuple(f"cls.predictions.{part}" for part in ("bias", "decoder.weight", "decoder.bias"))
_PREDICTS += tuple(f"cls.predictions.transform.{a}.{b}" for a in ("dense", "LayerNorm") for b in ("weight", "bias"))
_PREDICTS += ("cls.seq_relationship.weight", "cls.seq_relationship.bias")
_FILLS = tuple(f"lm_head.{part}" for part in ("bias", "decoder.weight", "decoder.bias", "dense.weight", "dense.bias"))
_FILLS += ("lm_head.layer_norm.weight", "lm_head.layer_norm.bias")
_OF_ROBERTA = {"label_dense": "classifier.dense", "label_out": "classifier.out_proj"}

FAMILY = Family(
    "bert",
    "BertModel",
    read,
    _named("bert", label_dense="bert.pooler.dense", label_out="classifier"),
    _IGNORED + _PREDICTS,
    also=("BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining"),
    encodes=True,
)
ROBERTA = Family(
    "roberta",
    "RobertaModel",
    read_roberta,
    _named("roberta", **_OF_ROBERTA),
    _IGNORED + _FILLS,
    also=("RobertaForSequenceClassification", "RobertaForMaskedLM"),
    encodes=True,
)
XLM_ROBERTA = Family(
    "xlm-roberta",
    "XLMRobertaModel",
    read_xlm_roberta,
    _named("roberta", **_OF_ROBERTA),
    _IGNORED + _FILLS,
    also=("XLMRobertaForSequenceClassification", "XLMRobertaForMaskedLM"),
    encodes=True,
)
