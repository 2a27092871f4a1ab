"""Models that read texts whole: which architectures are such, and what their configs say of labels.

Every decoder family has two more names, the model without its head (`Qwen3Model`) and with one that labels whole texts
(`Qwen3ForSequenceClassification`); encoders are families of their own and say which names theirs are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from fnengine.errors import SpecError
from fnengine.families.names import Family
from fnengine.spec import Attention, Head, ModelSpec, Whole

CLASSIFIES = "ForSequenceClassification"
BESIDE = ("sentence_transformers", "sbert_ce_default_activation_function")
"""Keys of configs that say what becomes of a score, and nothing about the model."""
SPREADS: dict[str, Literal["softmax", "sigmoid", "identity"]] = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Softmax": "softmax",
}


def architectures(family: Family) -> tuple[str, ...]:
    """Every name that configs of a family have in `architectures`."""
    if family.encodes:
        return (family.architecture, *family.also)
    base = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return (family.architecture, f"{base}Model", f"{base}{CLASSIFIES}", *family.also)


def read(family: Family, architecture: str, config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a config of one of `architectures(family)`.

    Raises:
        SpecError: as the family's own `read`; or a text of such a model cannot be read whole, or cannot be written.
    """
    own = {k: v for k, v in config.items() if k not in BESIDE}
    if family.encodes:
        return family.read(config, where)
    spec = family.read({**own, "architectures": [family.architecture]}, where)
    if architecture != family.architecture and architecture.endswith(("Model", CLASSIFIES)):
        found = head(config, where, pooling="last", bias=False) if architecture.endswith(CLASSIFIES) else None
        return of(replace(spec, architecture=architecture), Whole(head=found), where)
    if not all(
        isinstance(x.mixer, Attention) and x.mixer.causal for x in spec.layers if isinstance(x.mixer, Attention)
    ):
        raise SpecError(
            f"{architecture} sees what stands behind a token, so it can write no text",
            where=where,
            remedy="if it is an embedder, its architecture is the model without the head",
            param="use_bidirectional_attention",
        )
    return spec


def of(spec: ModelSpec, whole: Whole, where: str) -> ModelSpec:
    """The spec of a language model without the head over its vocabulary.

    Raises:
        SpecError: it has layers that need what was computed of a text before.
    """
    for kind in spec.layers:
        if not isinstance(kind.mixer, Attention) or kind.mixer.gated or kind.mixer.v_norm or kind.scaled:
            raise SpecError(
                f"layers of {type(kind.mixer).__name__}, as {spec.architecture} has, are not run over whole texts yet",
                where=where,
                remedy="load it as a language model; its vectors are read off at /v1/embeddings, too",
            )
    if whole.pooling == "last" and not all(isinstance(x.mixer, Attention) and x.mixer.causal for x in spec.layers):
        whole = replace(whole, pooling="mean")  # the last token is no better than any other
    ends = replace(spec.ends, head_bias=False, logit_scale=1.0, logit_cap=0.0)
    return replace(spec, tied=False, ends=ends, whole=whole)


def classifies(config: dict[str, Any]) -> bool:
    """Whether a config is of a model with labels."""
    return str((config.get("architectures") or [""])[0]).endswith(CLASSIFIES)


def head(config: dict[str, Any], where: str, **shape: Any) -> Head:
    """The labels of a config, on a head of this shape.

    Source: transformers' PreTrainedConfig (id2label, num_labels, problem_type); what becomes of scores as in
    sentence-transformers' CrossEncoder.

    Raises:
        SpecError: labels are not numbered from 0, or a function is not known.
    """
    names = config.get("id2label")
    if names is None:
        n = config.get("num_labels", config.get("_num_labels", 2))
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SpecError(f"num_labels = {n!r} is not an integer of at least 1", where=where, param="num_labels")
        names = {str(i): f"LABEL_{i}" for i in range(n)}
    numbers = [str(i) for i in range(len(names))] if isinstance(names, dict) else []
    if not numbers or set(map(str, names)) != set(numbers):
        raise SpecError(f"id2label = {str(names)[:80]} does not name labels from 0 on", where=where, param="id2label")
    labels = tuple(str({str(k): v for k, v in names.items()}[i]) for i in numbers)
    kind = config.get("problem_type")
    spread = "sigmoid" if len(labels) == 1 or kind == "multi_label_classification" else "softmax"
    asked = (config.get("sentence_transformers") or {}).get("activation_fn", config.get(BESIDE[1]))
    if asked is not None and asked not in SPREADS:
        raise SpecError(
            f"the function of scores is {str(asked)[:80]!r}",
            where=where,
            remedy=f"one of {', '.join(SPREADS)} is known",
            param="sentence_transformers.activation_fn",
        )
    return Head(
        labels,
        spread="identity" if kind == "regression" else spread,
        judged="sigmoid" if asked is None else SPREADS[asked],
        **shape,
    )
