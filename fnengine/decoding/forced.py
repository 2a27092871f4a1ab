"""Forced decoding: what a given continuation scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fnengine.decoding.strategy import Context, strategy
from fnengine.errors import RequestError

CHUNK = 256
"""Tokens whose logits are there at a time: 156 MB of float32 at V = 151,936."""


@strategy
async def forced(ctx: Context, prompt: Sequence[int], continuation: str | Sequence[int]):
    """The continuation itself, with the log-probability of each of its tokens: those that `prompt_logprobs` gives for
    the prompt and the continuation as one."""
    tokens = ctx.ids(continuation, add_special=False)
    if len(tokens) > ctx.max_tokens:
        raise RequestError(
            f"the continuation has {len(tokens)} tokens, max_tokens is {ctx.max_tokens}",
            param="continuation",
            remedy="raise max_tokens",
        )
    if not tokens:
        return "stop"
    seq, before = await ctx.extend(ctx.empty, prompt)
    before_nV = before[None]
    for at in range(0, len(tokens), CHUNK):
        part = tokens[at : at + CHUNK]
        last = at + CHUNK >= len(tokens)
        if new := part[:-1] if last else part:  # nobody asks what follows the last one
            seq, after_nV = await ctx.extend(seq, new, logits="all")
            logits_nV = torch.cat([before_nV, after_nV])
        else:
            logits_nV = before_nV
        before_nV = logits_nV[len(part) :]
        logp_n = logits_nV[: len(part)].log_softmax(1)[torch.arange(len(part)), torch.tensor(part)]
        ctx.emit(part, logp_n.tolist())
    return "stop"
