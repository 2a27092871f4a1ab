"""Whether a fallback computes what its class does, on the weights at hand, before anybody is answered.

The same few tokens go through the plain module at once, with transformers' own attention and masks, and through ours
in two steps of a paged pool, the second beside a row that begins later. What depends on anything but tokens, positions
and attention (a convolution, a recurrent state, positions counted by itself) differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fnengine import kernels
from fnengine.errors import SpecError
from fnengine.fallback import template
from fnengine.fallback.forward import Fallback, parts
from fnengine.host.step import BLOCK
from fnengine.kernels import Heads
from fnengine.spec import ModelSpec
from fnengine.state import Pool, Where

LONG, CUT, SHORT = 20, 11, 7
"""Tokens of the row that is cut, where, and of the other one."""
MOST = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Root mean square difference of logits over that of logits, at most: what rounding of a dtype may do. Differences in
kind are larger: a lost state or a wrong position gives other logits, not nearly the same."""


def check(spec: ModelSpec, params: Any, dtype: torch.dtype, device: torch.device, made: Fallback | None = None) -> str:
    """What was compared and how far apart it is; `made` is the forward to look at, if not a new one.

    Raises:
        SpecError: the two differ.
    """
    assert spec.upstream is not None
    draw = torch.Generator().manual_seed(0)
    long, short = (torch.randint(min(spec.vocab, 1000), (n,), generator=draw).to(device) for n in (LONG, SHORT))
    with torch.no_grad():
        want = torch.cat([plain(spec, params, dtype, device, ids) for ids in (long, short)])
        got = paged(made or parts(spec, params, dtype, device), spec, params, dtype, device, long, short)
    apart = float((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-30))
    said = (
        f"logits of {LONG} + {SHORT} tokens in two steps of the pool against transformers' own attention at once, in "
        f"{str(dtype)[6:]}: {apart:.1e} apart (root mean square, of the logits')"
    )
    if not apart <= MOST[dtype]:
        raise SpecError(
            f"the fallback does not compute what transformers' {spec.architecture} does: {said}",
            where=spec.upstream.where,
            remedy=template.NATIVE,
        )
    return said


def plain(spec: ModelSpec, params: Any, dtype: torch.dtype, device: torch.device, ids: Tensor) -> Tensor:
    """[n, V] logits of a text by transformers' own attention, over the same leaves."""
    made = parts(spec, params, dtype, device)
    made.ready.attention("eager")
    body, head = made.tensors(params)
    given = dict(input_ids=ids[None], position_ids=torch.arange(len(ids), device=device)[None], use_cache=False)
    hidden = functional_call(made.ready.body, body, (), given, tie_weights=False)[0]
    return (
        functional_call(made.ready.head, head, (), dict(inputs_embeds=hidden, use_cache=False), tie_weights=False)
        .logits[0]
        .float()
    )


def paged(
    made: Fallback,
    spec: ModelSpec,
    params: Any,
    dtype: torch.dtype,
    device: torch.device,
    long: Tensor,
    short: Tensor,
) -> Tensor:
    """[LONG + SHORT, V] logits of both texts by our attention, the long one in two steps."""
    mixers = {layer.mixer for layer in spec.layers}
    ops = kernels.ops(device, dtype, heads=[Heads(m.width, m.window or 0, m.soft_cap, m.sinks) for m in mixers])
    shapes = [ops.kv.shapes(4, BLOCK, x.mixer.kv_heads, x.mixer.width) for x in spec.layers]
    pool = [Pool(*(torch.zeros(s, dtype=ops.kv.element(dtype), device=device) for s in one)) for one in shapes]

    def step(ids: Tensor, sizes: list[int], before: list[int]) -> Tensor:
        where = _where(sizes, before, device)
        hidden, _ = made.body(spec, params, pool, where, ops, ids)
        return made.head_logits(spec, params, hidden)

    first = step(long[:CUT], [CUT], [0])
    second = step(torch.cat([long[CUT:], short]), [LONG - CUT, SHORT], [CUT, 0])
    return torch.cat([first, second])


def _where(sizes: list[int], before: list[int], device: torch.device) -> Where:
    """Of rows that hold so many tokens and get so many: the first in blocks 1 and 3, the second in 2."""

    def ints(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    table = [[1, 3], [2, 0], [0, 0]]
    tokens = [(r, old + i) for r, (n, old) in enumerate(zip(sizes, before, strict=True)) for i in range(n)]
    start = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return Where(
        row=ints(range(len(sizes))),
        start=ints(start),
        row_T=ints([r for r, _ in tokens], torch.int64),
        position=ints([at for _, at in tokens]),
        slot=ints([table[r][at // BLOCK] * BLOCK + at % BLOCK for r, at in tokens]),
        length=ints([n + old for n, old in zip(sizes, before, strict=True)]),
        table=ints(table),
    )
