"""Names of the ops in torch's own registry, so that compilers and exporters carry them as one opaque call.

`torch.library.define` and `impl` rather than the `custom_op` decorator: the decorator's checks cost several
microseconds a call, and attention alone is called once a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.layout import heads_of, shared

NAMESPACE = "fnengine"

SCHEMAS = {
    "paged_attention": "(Tensor q, Tensor k_pool, Tensor v_pool, Tensor table, Tensor row, Tensor start, "
    "Tensor length, float scale, int window, float soft_cap, Tensor? sink) -> Tensor",
    "whole_attention": "(Tensor q, Tensor k, Tensor v, Tensor start, float scale, int window, float soft_cap, "
    "Tensor? sink, bool causal) -> Tensor",
    "rope_write": "(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor(a!) k_pool, "
    "Tensor(b!) v_pool, Tensor slot, float eps) -> Tensor",
    "copy_blocks": "(Tensor(a!)[] pools, Tensor pairs) -> ()",
    "linear": "(Tensor x, Tensor tiles, Tensor? bias, int n, bool wide=False) -> Tensor",
    "quantized_linear": "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int n, bool dynamic=False, "
    "bool wide=False) -> Tensor",
    "fp8_linear": "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int n, bool wide=False) -> Tensor",
    "grouped_linear": "(Tensor x, Tensor offsets, Tensor weight) -> Tensor",
    "grouped_tiles": "(Tensor x, Tensor offsets, Tensor tiles, Tensor? bias, int n) -> Tensor",
    "top_experts": "(Tensor score, int n) -> Tensor",
    "arrange_experts": "(Tensor expert, int experts) -> Tensor",
    "gumbel_argmax": "(Tensor logits, Tensor temperature, Tensor seed, Tensor position, int stream, "
    "Tensor? last=None) -> Tensor",
    "truncate": "(Tensor logits, Tensor temperature, Tensor min_p, Tensor top_k, Tensor top_p) -> Tensor",
    "apply_mask": "(Tensor logits, Tensor mask) -> Tensor",
    "causal_conv": "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) tail, Tensor(b!) heard, Tensor row, "
    "Tensor start, Tensor length, Tensor behind, Tensor guessed) -> Tensor",
    "gated_scan": "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta, Tensor(a!) memory, Tensor(b!) noted, "
    "Tensor row, Tensor start, Tensor length, Tensor behind, Tensor guessed) -> Tensor",
    "penalize": "(Tensor logits, Tensor row, Tensor length, Tensor history, Tensor prompt_len, Tensor frequency, "
    "Tensor presence, Tensor repetition) -> Tensor",
}
"""op -> its signature with what it mutates; the same for every backend of the op."""


def _shape_of_attention(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _shape_of_choice(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape[:1], dtype=torch.int32, device=logits.device)


def _shape_of_logits(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _shape_of_queries(
    qkv: Tensor, q_norm: Any, k_norm: Any, cos: Tensor, sin: Tensor, k_pool: Tensor, v_pool: Tensor, *_: Any
) -> Tensor:
    K, C = heads_of(k_pool, v_pool)
    H = qkv.shape[1] // C - (1 if shared(v_pool) else 2) * K
    return torch.empty((qkv.shape[0], H, C), dtype=qkv.dtype, device=qkv.device)


def _shape_of_linear(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, wide: bool = False) -> Tensor:
    return torch.empty((x.shape[0], n), dtype=torch.float32 if wide else x.dtype, device=x.device)


def _shape_of_quantized(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    dynamic: bool = False,
    wide: bool = False,
) -> Tensor:
    return torch.empty((x.shape[0], n), dtype=torch.float32 if wide else x.dtype, device=x.device)


def _shape_of_fp8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, n: int, wide: bool = False) -> Tensor:
    return _shape_of_linear(x, codes, bias, n, wide)


def _shape_of_grouped(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    return torch.empty((x.shape[0], weight.shape[1]), dtype=x.dtype, device=x.device)


def _shape_of_grouped_tiles(x: Tensor, offsets: Tensor, tiles: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)


def _shape_of_top(score: Tensor, n: int) -> Tensor:
    return torch.empty((score.shape[0], n), dtype=torch.int32, device=score.device)


def _shape_of_arrangement(expert: Tensor, experts: int) -> Tensor:
    return torch.empty((experts + 1 + 2 * expert.shape[0],), dtype=torch.int32, device=expert.device)


def _shape_of_conv(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _shape_of_scan(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _nothing(*_: Any) -> None:
    return None


SHAPES: dict[str, Callable[..., Any]] = {
    "paged_attention": _shape_of_attention,
    "whole_attention": _shape_of_attention,
    "rope_write": _shape_of_queries,
    "copy_blocks": _nothing,
    "linear": _shape_of_linear,
    "quantized_linear": _shape_of_quantized,
    "fp8_linear": _shape_of_fp8,
    "grouped_linear": _shape_of_grouped,
    "grouped_tiles": _shape_of_grouped_tiles,
    "top_experts": _shape_of_top,
    "arrange_experts": _shape_of_arrangement,
    "gumbel_argmax": _shape_of_choice,
    "truncate": _shape_of_choice,
    "apply_mask": _shape_of_logits,
    "penalize": _shape_of_logits,
    "causal_conv": _shape_of_conv,
    "gated_scan": _shape_of_scan,
}
"""op -> what it gives back, without computing it (for tracing)."""

IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
"""Registered operator -> the function that it runs."""

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

OUTSIDE = ("paged_attention", "gated_scan")
"""Ops that may stay out of a graph which holds everything around them: some of their backends cannot be captured."""

Around = Callable[[Callable[..., Tensor], tuple[Any, ...]], Tensor]
_AROUND: list[Around] = []
"""Innermost last."""


@contextmanager
def outside(around: Around) -> Iterator[None]:
    """While it is open, calls of `OUTSIDE` ops go to `around(fn, args)`, wherever they are made, compiled code too."""
    _AROUND.append(around)
    try:
        yield
    finally:
        _AROUND.remove(around)


def register(
    op: str, backend: str, fn: Callable[..., Any], key: str = "CompositeExplicitAutograd"
) -> Callable[..., Any]:
    """The callable `torch.ops.fnengine.<op>_<backend>`, which runs `fn`; `key` is the dispatch key it serves."""
    name = f"{op}_{backend}"
    run = fn

    def through(*args: Any) -> Any:
        return _AROUND[-1](run, args) if _AROUND else run(*args)

    if op in OUTSIDE:
        fn = through
    _LIBRARY.define(name + SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, fn, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", SHAPES[op], lib=_LIBRARY)
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    IMPLEMENTATIONS[registered] = run
    return registered
