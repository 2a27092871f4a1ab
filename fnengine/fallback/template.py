"""A class of transformers as a module without values: where its weights are, and the same module with our products.

Linear layers, the embedding and the head are leaves (`leaves.py`), so they are tiled, packed or rounded like those of
any family; everything else (norms, biases, experts) is a tensor as upstream has it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fnengine import tree
from fnengine.errors import SpecError
from fnengine.fallback.attending import PAGED, register
from fnengine.leaves import Leaf, lookup, matmul
from fnengine.spec import Upstream

NATIVE = "a family of its own would say what it needs: fnengine/families"


@dataclass(frozen=True)
class Parts:
    """Where a module keeps what the forward is made of, by qualified names."""

    base: str
    """The child of the whole that makes hidden states of tokens."""
    embed: str
    head: str
    tied: bool
    vocab: int
    width: int
    """D"""


@dataclass(frozen=True)
class Bare:
    """A module whose parameters have no values."""

    module: Any
    parts: Parts
    linear: tuple[str, ...]
    """Products, the head aside."""
    plain: tuple[str, ...]
    """All other tensors of a checkpoint."""
    blocks: str
    """The list of layers, with a dot behind it."""

    def at(self, params: dict[str, Any], name: str) -> Any:
        """The leaf or tensor that lies in the params tree for a module or tensor of this name."""
        i, rest = self.place(name)
        return params["rest"][rest] if i is None else params["layers"][i][rest]

    def place(self, name: str) -> tuple[int | None, str]:
        """(layer, name within it); None and the whole name for what is in no layer."""
        if not name.startswith(self.blocks):
            return None, name
        number, _, rest = name.removeprefix(self.blocks).partition(".")
        return int(number), rest


@functools.lru_cache(maxsize=8)
def bare(upstream: Upstream, dtype: torch.dtype) -> Bare:
    """The module of a config, on the meta device.

    Raises:
        SpecError: transformers has no such class, or cannot build it, or it is not made of an embedding, a body and a
            head.
    """
    config, where = config_of(upstream), upstream.where
    register()
    try:
        with torch.device("meta"), quiet():
            module = model_class(config, upstream)._from_config(config, dtype=dtype, attn_implementation="eager")
    except SpecError:
        raise
    except Exception as e:
        raise SpecError(
            f"transformers cannot build {upstream.architecture}: {type(e).__name__}: {e}",
            where=where,
            remedy="is this the model's own config.json? A newer transformers may know more",
        ) from e
    module.eval()
    if module._can_set_experts_implementation():
        module.set_experts_implementation("grouped_mm")
    parts = _parts(module, upstream)
    ours = {parts.embed, parts.head}
    linear = tuple(n for n, m in module.named_modules() if type(m).forward is nn.Linear.forward and n not in ours)
    held = {f"{n}.{kind}" for n in (*linear, *ours) for kind in ("weight", "bias")}
    alias = aliases(module)
    plain = tuple(name for name in module.state_dict() if name not in held and name not in alias)
    lists = [(n, len(m)) for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    blocks = max(lists, key=lambda item: item[1], default=("", 0))[0] + "."
    return Bare(module, parts, linear, plain, blocks)


def config_of(upstream: Upstream) -> Any:
    """The config as transformers has it.

    Raises:
        SpecError: transformers does not know it.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise SpecError(
            f"the fallback needs transformers 5, this is {transformers.__version__}",
            where=upstream.where,
            remedy="pip install -U transformers",
        )
    given = json.loads(upstream.config)
    kind, where = given.get("model_type"), upstream.where
    try:
        with quiet():
            if upstream.code:
                return AutoConfig.from_pretrained(upstream.code, trust_remote_code=True)
            if kind not in CONFIG_MAPPING:
                raise SpecError(
                    f"transformers has no model_type {kind!r}, so the fallback cannot run it",
                    where=where,
                    remedy="a newer transformers may; --trust-remote-code runs what a repository brings itself",
                    param="model_type",
                )
            return CONFIG_MAPPING[kind].from_dict(given)
    except SpecError:
        raise
    except Exception as e:
        raise SpecError(f"transformers cannot read the config: {type(e).__name__}: {e}", where=where) from e


def model_class(config: Any, upstream: Upstream) -> Any:
    """The class of transformers that a config names.

    Raises:
        SpecError: it is no causal language model.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if upstream.code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        named = config.auto_map["AutoModelForCausalLM"]
        return get_class_from_dynamic_module(named, upstream.code)
    found = getattr(transformers, upstream.architecture, None)
    causal = {cls for value in MODEL_FOR_CAUSAL_LM_MAPPING.values() for cls in _each(value)}
    if found is None or found not in causal:
        raise SpecError(
            f"{upstream.architecture} is no causal language model of transformers",
            where=upstream.where,
            remedy="the fallback runs classes of AutoModelForCausalLM",
            param="architectures",
        )
    return found


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _parts(module: Any, upstream: Upstream) -> Parts:
    embed, head = module.get_input_embeddings(), module.get_output_embeddings()
    name = {id(m): n for n, m in module.named_modules()}

    def refuse(what: str) -> SpecError:
        return SpecError(f"{upstream.architecture} {what}", where=upstream.where, remedy=NATIVE)

    if not isinstance(embed, nn.Embedding) or id(embed) not in name or "." not in name[id(embed)]:
        raise refuse("has no embedding of tokens inside of a body")
    if head is None or type(head).forward is not nn.Linear.forward or "." in name[id(head)]:
        raise refuse("has no head that is one product")
    (V, D), (heads, read) = embed.weight.shape, head.weight.shape
    if (heads, read) != (V, D):
        raise refuse(f"embeds in [{V}, {D}] and has a head of [{heads}, {read}]")
    base = name[id(embed)].partition(".")[0]
    return Parts(base, name[id(embed)], name[id(head)], head.weight is embed.weight, V, D)


def aliases(module: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one -> its name."""
    first: dict[int, str] = {}
    found = {}
    for name, p in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        if first.setdefault(id(p), name) != name:
            found[name] = first[id(p)]
    return found


class Held:
    """A leaf whose tensors stand in a module as buffers, put together again: once for the same ones, because that takes
    as long as a small product."""

    def __init__(self, outline: Leaf):
        self.outline = outline
        self.names = [name for name, _ in tree.items(outline)]
        self.tensors: list[Tensor] = []
        self.made = outline

    def of(self, module: nn.Module) -> Leaf:
        tensors: list[Any] = [module._buffers[name] for name in self.names]
        if len(tensors) != len(self.tensors) or any(a is not b for a, b in zip(tensors, self.tensors, strict=True)):
            there = dict(zip(self.names, tensors, strict=True))
            self.made = tree.map_with_path(lambda name, _: there[name], self.outline)
            self.tensors = tensors
        return self.made


class Multiplied(nn.Module):
    """y = x W^T + b of a leaf, whose tensors stand here as buffers so that a functional call can put them in."""

    def __init__(self, leaf: Leaf, like: nn.Linear, wide: bool):
        super().__init__()
        self.leaf, self.wide = Held(leaf), wide
        self.in_features, self.out_features = like.in_features, like.out_features
        _stand_in(self, leaf)

    def forward(self, x: Tensor) -> Tensor:
        return matmul(self.leaf.of(self), x.reshape(-1, self.in_features), self.wide).view(
            *x.shape[:-1], self.out_features
        )


class LookedUp(nn.Module):
    """Rows of a leaf. What upstream does to an embedding beside looking it up its own module does to the rows."""

    def __init__(self, leaf: Leaf, own: nn.Embedding):
        super().__init__()
        self.leaf = Held(leaf)
        self.own = None if type(own).forward is nn.Embedding.forward else own
        if self.own is not None:
            self.own.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        _stand_in(self, leaf)

    def forward(self, ids: Tensor) -> Tensor:
        rows = lookup(self.leaf.of(self), ids.reshape(-1))
        if self.own is None:
            return rows.view(*ids.shape, -1)
        each = torch.arange(len(rows), device=rows.device).view(ids.shape)
        return torch.func.functional_call(self.own, {"weight": rows}, (each,))


class Made:
    """What a body returns: hidden states, and None for everything else that an output may have."""

    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, i: Any) -> Any:
        return (self.last_hidden_state,)[i]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Given(nn.Module):
    """Stands for the body where only the head is wanted: what is handed in as embeddings is what the body made.

    `inside` are names of modules between the whole and its embedding, any of which the whole may call.
    """

    def __init__(self, inside: Sequence[str]):
        super().__init__()
        for name in inside:
            object.__setattr__(self, name, self)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Made:
        return Made(inputs_embeds)


def _stand_in(module: nn.Module, leaf: Leaf) -> None:
    for name, t in tree.items(leaf):
        module.register_buffer(name, torch.empty_like(t, device="meta"))
    if "weight" not in module._buffers:  # upstream may ask it for its dtype
        module.weight = torch.empty(0, dtype=getattr(leaf, "dtype", None), device="meta")


@dataclass(frozen=True)
class Ready:
    """A module with our products in it, and the body and the head as modules of their own."""

    body: Any
    head: Any
    config: Any
    dtype: torch.dtype

    def attention(self, name: str) -> None:
        """Chooses an attention of transformers' interface, for both."""
        self.config._attn_implementation = name


def ready(upstream: Upstream, params: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Ready:
    """The module for params of this structure. It holds no value of theirs, but buffers that a class computes itself.

    Raises:
        SpecError: a buffer that is in no checkpoint was not computed by the class.
    """
    found = bare(upstream, dtype)
    module, parts = copy.deepcopy(found.module), found.parts
    _own_buffers(module, found.module, device, upstream)
    for name, leaf in leaves_of(found, params).items():
        like = module.get_submodule(name)
        new: Any = LookedUp if name == parts.embed else functools.partial(Multiplied, wide=False)
        _replace(module, name, new(leaf, like))
    body, like = module.get_submodule(parts.base), module.get_submodule(parts.head)
    _replace(module, parts.base, Given(parts.embed.split(".")[1:-1]))
    leaf = params["embed"] if params["head"] is None else params["head"]
    _replace(module, parts.head, Multiplied(leaf, like, True))  # type: ignore[arg-type]
    made = Ready(body, module, module.config, dtype)
    made.attention(PAGED)
    return made


def leaves_of(found: Bare, params: dict[str, Any]) -> dict[str, Leaf]:
    """Module -> its leaf, of everything but the head."""
    return {found.parts.embed: params["embed"], **{name: found.at(params, name) for name in found.linear}}


def _replace(module: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, by)


def _own_buffers(module: Any, like: nn.Module, device: torch.device, upstream: Upstream) -> None:
    """Gives values to buffers that no checkpoint holds: the class computes them, as it does when transformers loads."""
    kept = set(like.state_dict())
    for name, owner in module.named_modules():
        own = [n for n in owner._buffers if f"{name}.{n}".lstrip(".") not in kept and owner._buffers[n] is not None]
        if not own:
            continue
        for n in own:
            b = owner._buffers[n]
            owner._buffers[n] = torch.full_like(b, float("nan") if b.is_floating_point() else -1, device=device)
        with quiet():
            module._init_weights(owner)
        for n in own:
            b = owner._buffers[n]
            if bool(b.isnan().any()) if b.is_floating_point() else bool((b == -1).all()):
                raise SpecError(
                    f"{upstream.architecture} has a buffer {name}.{n} that no checkpoint holds and it does not compute",
                    where=upstream.where,
                    remedy=NATIVE,
                )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' advice is about configs that somebody else wrote."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
