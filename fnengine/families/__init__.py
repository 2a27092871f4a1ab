"""Model families: each file turns its config.json into a `ModelSpec` and says where its weights are.

A new family is one file, listed in `FAMILIES`, and one test against the upstream model in float32.
"""

from __future__ import annotations

import difflib

from fnengine import fallback
from fnengine.errors import ConfigError, SpecError
from fnengine.families import (
    bamba,
    bert,
    cohere,
    deepseek,
    falcon,
    gemma,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    llama4,
    mimo,
    ministral3,
    mistral,
    mixtral,
    modernbert,
    olmo2,
    olmoe,
    opt,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    smollm3,
    stablelm,
    starcoder2,
    whole,
)
from fnengine.families.names import IGNORED, Family
from fnengine.spec import ModelSpec

_EVERY = (
    *(llama.FAMILY, mistral.FAMILY, mistral.MINISTRAL, ministral3.FAMILY, ministral3.WHOLE),
    *(qwen2.FAMILY, qwen3.FAMILY, smollm3.FAMILY, granite.FAMILY),
    *(olmo2.FAMILY, olmo2.OLMO3, phi3.FAMILY, gemma.FAMILY, gemma.GEMMA2, gemma3.FAMILY, gemma4.FAMILY, gemma4.WHOLE),
    *(cohere.FAMILY, cohere.COHERE2, glm4.GLM, glm4.FAMILY, starcoder2.FAMILY, stablelm.FAMILY),
    *(phi.FAMILY, gpt_neox.FAMILY, gpt2.FAMILY, opt.FAMILY, falcon.FAMILY),
    *(qwen3_next.FAMILY, qwen3_5.FAMILY, qwen3_5.MOE, qwen3_5.WHOLE, qwen3_5.WHOLE_MOE, bamba.FAMILY),
    *(mixtral.FAMILY, qwen2_moe.FAMILY, qwen3_moe.FAMILY, olmoe.FAMILY, glm4_moe.FAMILY, gpt_oss.FAMILY),
    *(bert.FAMILY, bert.ROBERTA, bert.XLM_ROBERTA, modernbert.FAMILY),
    *(phimoe.FAMILY, deepseek.V2, deepseek.V3, glm4_moe_lite.FAMILY, mimo.FAMILY, llama4.FAMILY),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _EVERY}
FALLBACK = Family("transformers", "any causal language model of transformers", fallback.read, {}, IGNORED)


def register(family: Family) -> Family:
    """Adds a family of one's own, from then on known to everything that reads a config; gives it back.

    Raises:
        ConfigError: another one has its name or reads its architecture.
    """
    for other in FAMILIES.values():
        if other != family and family.name == other.name:
            raise ConfigError(f"a family is called {family.name!r} already", where="register", remedy="rename it")
        if other != family and family.architecture == other.architecture:
            raise ConfigError(f"{other.name} reads {family.architecture} already", where="register")
    FAMILIES[family.name] = family
    return family


def family_of(spec: ModelSpec) -> Family:
    """The family of a spec; that of the fallback names nothing, its module does."""
    return FALLBACK if spec.upstream is not None else FAMILIES[spec.family]


def spec_from_config(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a config.json, read by the family that its `architectures[0]` (or `model_type`) names.

    Raises:
        SpecError: no family knows the architecture, or a key is missing, impossible or not understood.
    """
    known = {name: f for f in FAMILIES.values() for name in whole.architectures(f)}
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        raise SpecError(f"architectures = {named!r} is not a list of names", where=where, param="architectures")
    if named:
        if named[0] in known:
            return whole.read(known[named[0]], named[0], config, where)
        raise _unknown(named[0], list(known), where, "architectures")
    kind = config.get("model_type")
    if kind in FAMILIES:
        return FAMILIES[kind].read(config, where)
    if kind is None:
        raise SpecError(
            "the config names neither architectures nor model_type",
            where=where,
            remedy=f"use the model's own config.json; supported are {', '.join(sorted(known))}",
        )
    raise _unknown(str(kind), list(FAMILIES), where, "model_type")


def smallest(family: Family) -> ModelSpec:
    """A spec of a family of six layers, with everything that its configs need not say as it is by default."""
    sizes = dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=2, vocab_size=10)
    named = {"model_type": family.name, "architectures": [family.architecture]}
    return spec_from_config({**named, **sizes, **dict.fromkeys(family.asks, 8)})


class Unknown(SpecError):
    """No family knows the architecture; the fallback may run it."""


def _unknown(name: str, known: list[str], where: str, key: str) -> Unknown:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; nearest is {nearest[0]}" if nearest else ""
    return Unknown(
        f"no family knows {key} = {name!r}{hint}",
        where=where,
        remedy=f"families read {', '.join(sorted(f.architecture for f in FAMILIES.values()))}; the fallback "
        "(--model-impl auto or transformers) runs most causal models of transformers",
        param=key,
    )
