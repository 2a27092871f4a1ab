"""Classifier-free guidance: two sequences, one decision.

Source: Sanchez et al. 2023, Stay on topic with Classifier-Free Guidance, equation 7.
"""

from __future__ import annotations

from collections.abc import Sequence

from fnengine.decoding.sampled import draw
from fnengine.decoding.strategy import Context, strategy


@strategy
async def guided(ctx: Context, prompt: Sequence[int], scale: float = 1.5, negative: str | Sequence[int] | None = None):
    """Tokens drawn from log p(w | negative) + scale * (log p(w | prompt) - log p(w | negative)).

    Args:
        scale: 1 is plain decoding; more follows the prompt more closely, less than 0 avoids it.
        negative: what the text is led away from; None: the last token of the prompt, so that the text is led towards
            the rest of it.

    Both sequences grow by the same tokens. Positions and penalties are those of the prompt's sequence.
    """
    away = ctx.ids(negative) if negative is not None else (prompt[-1],)
    (seq, logits), (other, other_logits) = await ctx.extend([(ctx.empty, prompt), (ctx.empty, away)])
    for i in range(ctx.max_tokens):
        p, q = logits.log_softmax(-1), other_logits.log_softmax(-1)
        token = draw(scale * (p - q) + q, ctx.sampling, seq.tokens, len(prompt))
        ctx.emit([token])
        if token in ctx.eos:
            return "stop"
        if i + 1 < ctx.max_tokens:
            (seq, logits), (other, other_logits) = await ctx.extend([(seq, [token]), (other, [token])])
    return "length"
