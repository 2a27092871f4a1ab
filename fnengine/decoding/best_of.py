"""Best of n: several samples, of which the likeliest is kept."""

from __future__ import annotations

from collections.abc import Sequence

from fnengine.decoding.sampled import samples
from fnengine.decoding.strategy import Context, strategy
from fnengine.errors import RequestError


@strategy
async def best_of(ctx: Context, prompt: Sequence[int], n: int = 4):
    """Of `n` samples the one with the largest mean log-probability of its tokens; ties go to the first."""
    if n < 1:
        raise RequestError(f"n must be at least 1, got {n}", param="n")
    done = await samples(ctx, prompt, n)
    best = max(done, key=lambda s: sum(s.logprobs) / max(len(s.logprobs), 1))
    ctx.emit(best.tokens, best.logprobs)
