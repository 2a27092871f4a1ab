"""Contrastive decoding: what an expert finds likely and an amateur does not.

Source: Li et al. 2022, Contrastive Decoding: Open-ended Text Generation as Optimization, equations 2 and 3, token by
token in place of the paper's beam search.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import torch

from fnengine.decoding.sampled import draw
from fnengine.decoding.strategy import Context, strategy
from fnengine.errors import RequestError
from fnengine.runtime import Runtime


@strategy
async def contrastive(
    ctx: Context,
    prompt: Sequence[int],
    alpha: float = 0.1,
    amateur: Runtime | None = None,
    window: int | None = None,
    temperature: float = 1.0,
):
    """Tokens drawn from log p_expert(w) - log p_amateur(w) over those w with p_expert(w) >= alpha max p_expert.

    Args:
        alpha: in (0, 1]; 1 is greedy decoding of the expert.
        amateur: a Runtime of another model with the same vocabulary; None: the same model.
        window: tokens at the end of the prompt that the amateur sees, before those generated, all of which it sees.
            None: 1 for the same model, the whole prompt for another one.
        temperature: the amateur's logits are divided by it.

    With temperature 0 in the request it is the paper's score maximised greedily.
    """
    if not 0 < alpha <= 1:
        raise RequestError(f"alpha must be in (0, 1], got {alpha}", param="alpha")
    if temperature <= 0:
        raise RequestError(f"the amateur's temperature must be positive, got {temperature}", param="temperature")
    if window is not None and window < 1:
        raise RequestError(f"window must be at least 1, got {window}", param="window")
    if amateur is not None and amateur.model.spec.vocab != ctx.vocab:
        raise RequestError(
            f"the amateur's vocabulary has {amateur.model.spec.vocab} tokens, the expert's {ctx.vocab}", param="amateur"
        )
    empty = ctx.empty if amateur is None else amateur.empty
    seen = window or (1 if amateur is None else len(prompt))
    both = asyncio.gather(ctx.extend(ctx.empty, prompt), ctx.extend(empty, prompt[-seen:]))
    (seq, logits), (other, other_logits) = await both
    for i in range(ctx.max_tokens):
        p, q = logits.log_softmax(-1), (other_logits / temperature).log_softmax(-1)
        score = torch.where(p >= p.max() + math.log(alpha), p - q.to(p.device), -torch.inf)
        token = draw(score, ctx.sampling, seq.tokens, len(prompt))
        ctx.emit([token])
        if token in ctx.eos:
            return "stop"
        if i + 1 < ctx.max_tokens:
            both = asyncio.gather(ctx.extend(seq, [token]), ctx.extend(other, [token]))
            (seq, logits), (other, other_logits) = await both
    return "length"
