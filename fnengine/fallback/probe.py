"""A config -> a `ModelSpec`, found by looking at what its class does: one forward without weights, on the meta device.

The forward calls attention as often as it needs a layer of KV; heads, widths, scales and caps are those of the calls,
windows are read off the masks. What cannot be seen so is found when weights are there (`compare`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fnengine.errors import SpecError
from fnengine.fallback import template
from fnengine.fallback.attending import SEEN, Asked, watched
from fnengine.fallback.template import Bare
from fnengine.leaves import Dense
from fnengine.params import ArrayInfo, Fused
from fnengine.spec import Attention, Layer, Mlp, ModelSpec, Upstream

T = 13
"""Tokens of the probe: a number that no other size of a module is likely to be."""
MIXING = (nn.Conv1d, nn.Conv2d, nn.RNNBase)
"""Modules that mix tokens outside of attention."""
RESCALED = ("dynamic", "longrope", "su")
"""Kinds of rope whose frequencies change with the length of a text."""


def read(config: Mapping[str, Any], where: str, code: str = "") -> ModelSpec:
    """The spec of a config that the fallback runs.

    Args:
        code: folder whose Python files may define the class.

    Raises:
        SpecError: transformers does not have the class, or the class cannot run over a paged pool; says why.
    """
    named = config.get("architectures") or []
    if not named:
        raise SpecError("the config names no architecture", where=where, param="architectures")
    up = Upstream(json.dumps(dict(config), sort_keys=True), str(named[0]), _own_code(config, code), where)
    return spec_of(up)


def spec_of(up: Upstream) -> ModelSpec:
    """The spec of what an `Upstream` names. Raises SpecError as `read` does."""
    given = template.config_of(up)
    inner = given.get_text_config()
    _refuse_by_config(up, given, inner)
    found = template.bare(up, torch.float32)
    _refuse_by_modules(up, found)
    asked = look(up, found)
    layers = tuple(_layer(up, found, inner, i, a) for i, a in enumerate(asked))
    own = json.loads(up.config)
    dtype = str(own.get("dtype") or own.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise SpecError(f"dtype = {dtype!r} is not one that can run", where=up.where, param="dtype")
    eos = getattr(inner, "eos_token_id", None)
    eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    bos = getattr(inner, "bos_token_id", None)
    return ModelSpec(
        family="transformers",
        architecture=up.architecture,
        vocab=found.parts.vocab,
        width=found.parts.width,
        layers=layers,
        eps=1e-6,
        tied=found.parts.tied,
        max_len=_longest(up, inner),
        dtype=dtype,
        eos=eos,
        bos=bos if isinstance(bos, int) else None,
        upstream=up,
    )


def look(up: Upstream, found: Bare) -> list[Asked]:
    """Every call of attention in one forward, in order.

    Raises:
        SpecError: the forward needs values that it should not, or attends in a way that ours does not.
    """
    module, base = found.module, found.module.get_submodule(found.parts.base)
    experts = module._can_set_experts_implementation()
    module.config._attn_implementation = SEEN
    if experts:
        module.set_experts_implementation("batched_mm")  # the only one without values
    try:
        with watched() as probe, torch.no_grad(), torch.device("meta"), template.quiet():
            ones = torch.ones(1, T, dtype=torch.long)
            base(input_ids=ones, attention_mask=ones, position_ids=torch.arange(T)[None], use_cache=False)
    except Exception as e:
        text = str(e).splitlines()[0] if str(e) else ""
        raise _cannot(up, f"its forward cannot be followed without values ({type(e).__name__}: {text})") from e
    finally:
        module.config._attn_implementation = "eager"
        if experts:
            module.set_experts_implementation("grouped_mm")
    if not probe.asked:
        raise _cannot(up, "it does not take its attention from transformers' interface")
    for i, a in enumerate(probe.asked):
        if a.mask.why_not:
            raise _cannot(up, f"in call {i} of attention {a.mask.why_not}")
        if a.heads % a.kv_heads or max(a.width, a.of_values) % 2:
            raise _cannot(up, f"attention has {a.heads} heads over {a.kv_heads} of {a.width} channels")
    return probe.asked


def abstract(spec: ModelSpec) -> dict[str, Any]:
    """The params tree with an `ArrayInfo` in place of every tensor, under the module's own names."""
    assert spec.upstream is not None
    up = spec.upstream
    found = template.bare(up, torch.float32)
    module, parts = found.module, found.parts
    layers: list[dict[str, Any]] = [{} for _ in module.get_submodule(found.blocks[:-1])] if found.blocks != "." else []
    tree: dict[str, Any] = {"embed": _dense(module, parts.embed), "layers": layers, "rest": {}}
    tensors = module.state_dict()
    named = [(name, _dense(module, name)) for name in found.linear]
    merged = _merged(module, up)
    named += [(name, _plain(name, tensors[name], merged)) for name in found.plain]
    for name, info in named:
        i, rest = found.place(name)
        (tree["rest"] if i is None else layers[i])[rest] = info
    return {**tree, "layers": tuple(layers), "head": None if parts.tied else _dense(module, parts.head)}


def names(spec: ModelSpec, stored: Iterable[str]) -> dict[str, str]:
    """Tensor of a checkpoint -> its name in the module, as transformers renames it; those that it ignores are left out,
    and so are second names of tied ones."""
    assert spec.upstream is not None
    found = template.bare(spec.upstream, torch.float32)
    module, there = found.module, found.module.state_dict()
    second = template.aliases(module)
    ignored = [re.compile(p) for p in module._keys_to_ignore_on_load_unexpected or ()]
    renames: list[Any] = []
    if not spec.upstream.code:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renames = [x for x in get_model_conversion_mapping(module) if isinstance(x, WeightRenaming)]
    from transformers.core_model_loading import rename_source_key

    out = {}
    for name in stored:
        own = name if name in there else rename_source_key(name, renames, [], module.base_model_prefix, there)[0]
        if own not in second and (own in there or not any(p.search(own) for p in ignored)):
            out[name] = own
    return out


def _dense(module: nn.Module, name: str) -> Any:
    m: Any = module.get_submodule(name)
    N, K = m.weight.shape
    bias = getattr(m, "bias", None)
    b = None if bias is None else ArrayInfo((N,), ((f"{name}.bias", N),), None)
    return Dense(ArrayInfo((N, K), ((f"{name}.weight", N),), 0.02), b)  # type: ignore[arg-type]


def _plain(name: str, t: torch.Tensor, merged: Mapping[str, tuple[str, ...]]) -> ArrayInfo:
    """Flat, whatever its shape: it is given its shape again when it is used. Experts [E, N, K] may lie in a checkpoint
    one by one."""
    n, ones = t.numel(), t.dim() < 2 and name.endswith("weight")
    std = None if t.dim() < 2 else 0.02
    target = next((target for target in merged if name.endswith(f".{target}")), None)
    if target is None or t.dim() != 3:
        return ArrayInfo((n,), ((name, n),), std, float(ones))
    begin, sources = name.removesuffix(target), merged[target]
    each = [begin + source.replace("*", str(e)) for e in range(len(t)) for source in sources]
    parts = tuple((one, n // len(each)) for one in each)
    return ArrayInfo((n,), parts, std, fused=Fused(name, tuple(t.shape)))


def _merged(module: Any, up: Upstream) -> dict[str, tuple[str, ...]]:
    """End of a parameter's name -> ends of those that a checkpoint holds for each expert instead, whose rows lie one
    after another in it. Other conversions that transformers knows are not done: such a checkpoint misses a tensor."""
    if up.code:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    found = {}
    for one in get_model_conversion_mapping(module, add_legacy=False):
        if isinstance(one, WeightConverter) and isinstance(one.operations[0], MergeModulelist):
            rest = one.operations[1:]
            if all(isinstance(op, Concatenate) and op.dim == 1 for op in rest) and len(one.target_patterns) == 1:
                found[one._original_target_patterns[0]] = tuple(one._original_source_patterns)
    return found


def _layer(up: Upstream, found: Bare, config: Any, i: int, a: Asked) -> Layer:
    """What the memory of a layer is computed from: its attention, and the widest product beside it."""
    chosen = int(getattr(config, "num_experts_per_tok", 0) or getattr(config, "moe_topk", 0) or 8)
    widest = found.parts.width
    last = len(found.module.get_submodule(found.blocks[:-1])) - 1 if found.blocks != "." else 0
    begin = f"{found.blocks}{min(i, last)}."
    for name, p in found.module.named_parameters():
        if name.startswith(begin) and p.dim() > 1:
            widest = max(widest, max(p.shape[-2:]) * (chosen if p.dim() > 2 else 1))
    width = max(a.width, a.of_values)
    mixer = Attention(
        a.heads, a.kv_heads, width, None, a.scale, window=a.mask.window, soft_cap=a.soft_cap, sinks=a.sinks
    )
    return Layer(mixer, Mlp(widest), 1e-6)


def _refuse_by_config(up: Upstream, given: Any, inner: Any) -> None:
    if getattr(given, "is_encoder_decoder", False) or getattr(inner, "add_cross_attention", False):
        raise _cannot(up, "it attends to an encoder")
    scaling = getattr(inner, "rope_parameters", None) or {}
    for one in (scaling, *(x for x in scaling.values() if isinstance(x, dict))):
        if one.get("rope_type", one.get("type")) in RESCALED:
            kind = one.get("rope_type", one.get("type"))
            raise _cannot(up, f"its rope ({kind}) changes with the length of a text, and KV in the pool is shared")
    if getattr(given, "quantization_config", None) is not None:
        raise SpecError(
            "quantization_config: the weights are stored quantized, which cannot be read yet",
            where=up.where,
            remedy="use the unquantized checkpoint",
            param="quantization_config",
        )


def _refuse_by_modules(up: Upstream, found: Bare) -> None:
    if getattr(found.module, "_is_stateful", False):
        raise _cannot(up, "it keeps a recurrent state")
    for name, m in found.module.named_modules():
        if isinstance(m, MIXING):
            raise _cannot(up, f"{name} ({type(m).__name__}) mixes tokens outside of attention")


def _longest(up: Upstream, config: Any) -> int:
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    raise SpecError("the config does not say how long a text may be", where=up.where, param="max_position_embeddings")


def _own_code(config: Mapping[str, Any], code: str) -> str:
    return code if "AutoModelForCausalLM" in (config.get("auto_map") or {}) else ""


def _cannot(up: Upstream, why: str) -> SpecError:
    return SpecError(
        f"the fallback cannot run {up.architecture}: {why}",
        where=up.where,
        remedy=template.NATIVE,
        param="architectures",
    )
