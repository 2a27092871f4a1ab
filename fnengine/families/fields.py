"""Reading a config.json so that nothing in it is swallowed.

`Fields` hands out values by key with their types checked and remembers which keys were asked for; `close` raises for
any key that nobody asked for and that is not known to leave the maths alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fnengine.errors import SpecError
from fnengine.spec import (
    Act,
    Ends,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    ModelSpec,
    ProportionalScaling,
    Rope,
    Scaling,
    YarnScaling,
)

INERT = frozenset(
    """
    architectures model_type transformers_version auto_map torch_dtype dtype use_cache initializer_range
    attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob embd_pdrop resid_pdrop
    pad_token_id sep_token_id cls_token_id decoder_start_token_id bad_words_ids
    return_dict return_dict_in_generate output_hidden_states output_attentions output_scores torchscript
    is_decoder is_encoder_decoder gradient_checkpointing id2label label2id num_labels problem_type task_specific_params
    finetuning_task tokenizer_class prefix chunk_size_feed_forward tf_legacy_loss use_bfloat16
    max_length min_length do_sample num_beams num_beam_groups early_stopping length_penalty repetition_penalty
    no_repeat_ngram_size temperature top_k top_p typical_p diversity_penalty num_return_sequences
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    remove_invalid_values suppress_tokens begin_suppress_tokens pruned_heads unsloth_version unsloth_fixed
    """.split()  # noqa: SIM905 (seventy lines of one word each say no more)
)
"""Keys that training, generation or bookkeeping read and the forward does not. Keys that start with `_` count too."""

_REQUIRED = object()
NO_ENDS = Ends()

REMEDY = "load a checkpoint without it, or teach fnengine/families what it means"


@dataclass
class Fields:
    """A config with a memory of what was read from it."""

    config: dict[str, Any]
    where: str
    used: set[str] = field(default_factory=set)

    def error(self, key: str, what: str, remedy: str | None = None) -> SpecError:
        return SpecError(f"{key} = {self.config.get(key)!r} {what}", where=self.where, remedy=remedy, param=key)

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands; null counts as absent."""
        self.used.add(key)
        value = self.config.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise SpecError(f"the config has no {key}", where=self.where, remedy="use the model's own config.json")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        value = self.take(key, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise self.error(key, f"is not an integer of at least {least}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.take(key, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise self.error(key, "is not a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "is neither true nor false")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: an integer, a list of them, or nothing."""
        value = self.take(key, ())
        found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(x, bool) or not isinstance(x, int) for x in found):
            raise self.error(key, "is neither a token id nor a list of them")
        return found

    def chosen(self, key: str, default: int, experts: int) -> int:
        """How many of so many experts a token goes to."""
        n = self.integer(key, default)
        if n > experts:
            raise self.error(key, f"is more than there are experts, {experts}")
        return n

    def only(self, key: str, *allowed: Any) -> None:
        """The key is absent or has one of the values that the family implements."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise self.error(key, f"is not implemented, only {' or '.join(map(repr, allowed))}", REMEDY)

    def close(self, inert: Iterable[str] = ()) -> None:
        """Raises for the first key that was neither read nor known to be inert."""
        stored = self.config.get("quantization_config")
        method = stored.get("quant_method", "unknown") if isinstance(stored, dict) else stored
        if method is not None and method != "fp8":  # floats of 8 bits are decoded as they are read, `fp8_file`
            raise SpecError(
                f"quantization_config: the weights are stored quantized ({method}), which cannot be read yet",
                where=self.where,
                remedy="use the unquantized checkpoint",
                param="quantization_config",
            )
        known = self.used | INERT | set(inert) | {"quantization_config"}
        for key, value in self.config.items():
            if value is not None and key not in known and not key.startswith("_"):
                raise self.error(key, "is not understood and may change the maths", REMEDY)


def head_width(f: Fields, width: int, heads: int) -> int:
    """C: head_dim, or the model width over the heads."""
    C = f.integer("head_dim", None)
    if C is None:
        if width % heads:
            raise f.error("num_attention_heads", f"does not divide hidden_size = {width}, and there is no head_dim")
        C = width // heads
    if C % 2:
        raise f.error("head_dim", "is odd, rotary positions need pairs of channels")
    return C


def kv_heads(f: Fields, heads: int) -> int:
    """K: num_key_value_heads, by default one for every query head."""
    K = f.integer("num_key_value_heads", heads)
    if heads % K:
        raise f.error("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
    return K


def rope(
    f: Fields,
    width: int,
    max_len: int,
    *,
    partial: float | None = None,
    theta: float = 10000.0,
    of: str | None = None,
    inert: Iterable[str] = (),
) -> Rope:
    """Rotary positions from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Args:
        partial: the family's usual share of a head's channels that rotate; None: it always rotates all of them.
        of: the kind of layer, where each kind has parameters of its own.
        inert: keys of the parameters that leave text alone.
    """
    theta = f.number("rope_theta", theta)
    share = 1.0 if partial is None else f.number("partial_rotary_factor", partial)
    key = "rope_parameters" if f.config.get("rope_parameters") is not None else "rope_scaling"
    given = f.take("rope_parameters", None) or f.take("rope_scaling", None) or {}
    f.used |= {"rope_parameters", "rope_scaling"}
    if isinstance(given, dict) and isinstance(given.get(of), dict):
        key, given = f"{key}.{of}", given[of]
    if not isinstance(given, dict):
        raise f.error(key, "is not an object")
    inner = Fields(given, f"{f.where}, {key}")
    theta = inner.number("rope_theta", theta)
    if partial is None and inner.config.get("rope_type") != "proportional":
        inner.only("partial_rotary_factor", 1.0)
    elif partial is not None:
        share = inner.number("partial_rotary_factor", share)
    if inner.config.get("rope_type") == "proportional":  # all channels are given angles, some of them 0
        pairs = int(inner.number("partial_rotary_factor", 1.0) * width // 2)
        if not 0 < pairs <= width // 2:
            raise f.error("partial_rotary_factor", f"makes {pairs} of {width // 2} pairs of channels rotate")
        inner.take("rope_type")
        found = Rope(theta, width, ProportionalScaling(pairs, inner.number("factor", 1.0)))
        inner.close(inert)
        return found
    turning = int(width * share)
    if turning % 2 or not 0 < turning <= width:
        raise f.error("partial_rotary_factor", f"makes {turning} of {width} channels rotate, which are no pairs")
    found = Rope(theta, turning, scaling(f, inner, key, turning, max_len))
    inner.close(inert)
    return found


def scaling(f: Fields, inner: Fields, key: str, width: int, max_len: int) -> Scaling | None:
    """How the frequencies of `width` channels are scaled, from the object `inner` that stands under `key`."""
    kind = inner.take("rope_type", inner.take("type", "default"))
    factor, gain = inner.number("factor", 1.0), inner.number("attention_factor", 0.0)
    original = inner.integer("original_max_position_embeddings", f.config.get("original_max_position_embeddings"))
    f.used.add("original_max_position_embeddings")
    if kind in ("linear", "llama3", "dynamic") and inner.config.get("factor") is None:
        inner.number("factor")  # raises
    if kind in ("default", "dynamic"):
        # Dynamic: frequencies change with the length of the text once it is longer than max_position_embeddings, which
        # no key that is already in a pool can follow; up to there, which is what `max_len` allows, nothing is scaled.
        return None
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high < low:  # equal ones leave nothing in between, as in Llama 4
            raise inner.error("high_freq_factor", f"is below low_freq_factor = {low}")
        return Llama3Scaling(factor, low, high, original or max_len)
    if kind == "yarn":
        original = original or max_len
        factor = factor if inner.config.get("factor") else max_len / original
        m, m_all = inner.take("mscale", 0), inner.take("mscale_all_dim", 0)
        stretch = 0.1 * math.log(max(factor, 1.0))
        inferred = (m * stretch + 1) / (m_all * stretch + 1) if m and m_all else stretch + 1
        fast, slow = inner.number("beta_fast", 32.0), inner.number("beta_slow", 1.0)
        whole = inner.flag("truncate", True)
        return YarnScaling(factor, fast, slow, original, gain or inferred, whole)
    if kind in ("longrope", "su"):
        original = original or max_len
        factor = factor if inner.config.get("factor") else max_len / original
        usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = (_factors(inner, name, width // 2) for name in ("short_factor", "long_factor"))
        usual = inner.number("short_mscale", usual)
        inner.only("long_mscale", inner.take("short_mscale", None))
        return LongScaling(short, long, original, gain or usual, max_len)
    raise f.error(
        key,
        "is a kind of rope scaling that is not implemented",
        "implemented are default, linear, dynamic, llama3, yarn, longrope and proportional",
    )


def _factors(inner: Fields, key: str, pairs: int) -> tuple[float, ...]:
    found = inner.take(key)
    if not isinstance(found, list) or len(found) != pairs or not all(isinstance(x, (int, float)) for x in found):
        raise inner.error(key, f"is not a list of {pairs} numbers, one for every pair of channels")
    return tuple(float(x) for x in found)


def text_of(config: dict[str, Any], where: str, towers: Iterable[str], tied: bool = False) -> dict[str, Any]:
    """The config of the text model in that of one that also sees or hears; of a text model itself, the same.

    Args:
        towers: keys of the outer config that say nothing about text.
        tied: what it means where neither says whether embeddings are tied.
    """
    if config.get("text_config") is None:
        return config
    outer = Fields(config, where)
    text = outer.take("text_config")
    if not isinstance(text, dict):
        raise outer.error("text_config", "is not an object")
    shared = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "quantization_config")
    dtypes = {key: outer.take(key, None) for key in shared}
    inner = text.get("tie_word_embeddings")
    tied = outer.flag("tie_word_embeddings", tied if inner is None else inner)
    outer.close(towers)
    own = {key: value for key, value in dtypes.items() if text.get(key) is None}
    return {**text, **own, "tie_word_embeddings": tied}


def is_a(config: dict[str, Any], architecture: str, model_type: str) -> bool:
    """Whether a config says that it is of this architecture, where a family reads two."""
    said = config.get("architectures") or [config.get("model_type")]
    return said[0] in (architecture, model_type)


def layer_windows(f: Fields, layers: int, window: int | None, usual: Sequence[str]) -> tuple[int | None, ...]:
    """Each layer's window by `layer_types`, or as a family usually has them."""
    types = f.take("layer_types", None) or list(usual)
    check_layer_types(f, types, layers, ("full_attention", "sliding_attention"))
    return tuple(window if t == "sliding_attention" else None for t in types)


def model_spec(
    f: Fields,
    family: str,
    architecture: str,
    layers: tuple[Layer, ...],
    *,
    width: int,
    max_len: int,
    tied: bool = False,
    ends: Ends = NO_ENDS,
    inert: Iterable[str] = (),
) -> ModelSpec:
    """The spec, with what every family reads alike; `tied` is what an absent tie_word_embeddings means.

    Raises:
        SpecError: a key of the config was neither read nor known to be inert (`Fields.close`).
    """
    spec = ModelSpec(
        family=family,
        architecture=architecture,
        vocab=f.integer("vocab_size"),
        width=width,
        layers=layers,
        eps=layers[0].eps,
        tied=f.flag("tie_word_embeddings", tied),
        max_len=max_len,
        dtype=dtype_name(f),
        eos=f.ids("eos_token_id"),
        bos=f.integer("bos_token_id", None, least=0),
        ends=ends,
    )
    f.close(inert)
    return spec


ACTS: dict[str, Act] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Activations by the names that configs give them."""


def act(f: Fields, key: str, usual: str) -> Act:
    """The activation that a config names."""
    name = f.take(key, usual)
    if name not in ACTS:
        raise f.error(key, f"is not implemented, only {', '.join(ACTS)}", REMEDY)
    return ACTS[name]


def windows(f: Fields, layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, as Qwen2 and Qwen3 spell it: from `max_window_layers` on, or by `layer_types`."""
    on = f.flag("use_sliding_window")
    window, first = f.integer("sliding_window", None), f.integer("max_window_layers", 28, least=0)
    types = f.take("layer_types", None)
    window = window if on else None
    if types is None:
        return tuple(window if i >= first else None for i in range(layers))
    check_layer_types(f, types, layers, ("full_attention", "sliding_attention"))
    return tuple(window if t == "sliding_attention" else None for t in types)


def sparse(f: Fields, layers: int, experts: int) -> tuple[bool, ...]:
    """Which layers have experts, as Qwen spells it: every `decoder_sparse_step`-th one not in `mlp_only_layers`."""
    step, only = f.integer("decoder_sparse_step", 1), f.ids("mlp_only_layers")
    return tuple(i not in only and experts > 0 and (i + 1) % step == 0 for i in range(layers))


def experts(f: Fields, default: int) -> int:
    """E: num_experts, or num_local_experts, as transformers 5 writes it for all families."""
    return f.integer("num_local_experts", f.integer("num_experts", default, least=0), least=0)


def check_layer_types(f: Fields, types: Any, layers: int, allowed: tuple[str, ...]) -> None:
    """Raises unless `layer_types` names one of the allowed kinds for every layer."""
    if not isinstance(types, list) or len(types) != layers:
        raise f.error("layer_types", f"does not name {layers} layers, as num_hidden_layers says")
    for t in types:
        if t not in allowed:
            raise f.error("layer_types", f"holds {t!r}; implemented here: {', '.join(allowed)}", REMEDY)


def dtype_name(f: Fields) -> str:
    """The checkpoint's own dtype; float32 when it does not say."""
    for key in ("dtype", "torch_dtype"):
        value = f.config.get(key)
        if value is not None:
            name = str(value).removeprefix("torch.")
            if name not in ("bfloat16", "float16", "float32"):
                raise f.error(key, "is not a dtype that can run", "give --dtype bfloat16 and a checkpoint in floats")
            return name
    return "float32"
