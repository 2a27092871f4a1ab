"""Beam search: the likeliest text that a bounded number of hypotheses finds.

The rules are those of transformers' `generate(num_beams=..., do_sample=False)`, so that the tokens are the same: how
many candidates are looked at, when a hypothesis counts as finished, when nothing better can come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fnengine.decoding.strategy import Context, strategy
from fnengine.errors import RequestError

NEVER = -1.0e9
"""Score of what is no hypothesis."""


@dataclass(frozen=True)
class Beam:
    """A hypothesis: what was generated, and the sum of its log-probabilities."""

    tokens: tuple[int, ...]
    logprob: Tensor
    """float32, as in transformers: where two sums round to the same, order decides."""


@dataclass(frozen=True)
class Finished:
    """A hypothesis that has ended, with its length-normalised score."""

    tokens: tuple[int, ...]
    score: Tensor
    whole: bool = True
    """False for what only fills the list."""


@partial(strategy, choices="texts")
async def beam(
    ctx: Context,
    prompt: Sequence[int],
    width: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    texts: int = 1,
):
    """The best of the texts that beam search finds; the request's sampling plays no part in it.

    Args:
        width: hypotheses kept at each length. 1 is greedy decoding.
        length_penalty: a finished text scores its log-probability over length ** length_penalty; > 0 favours long ones.
        early_stopping: True ends when `width` texts are finished; False when none of the running hypotheses, ended here
            and now, would beat the worst of them; "never" when none could beat it at any length.
        texts: so many of the best ones, best first, one for each choice.

    Copy-on-write: hypotheses are sequences used several times, so they share their blocks until they differ.
    """
    if width < 1 or max(2, 1 + len(ctx.eos)) * width > ctx.vocab:
        raise RequestError(
            f"width must be between 1 and {ctx.vocab // max(2, 1 + len(ctx.eos))} here, got {width}", param="width"
        )
    if early_stopping not in (True, False, "never"):
        raise RequestError(
            f"early_stopping must be true, false or 'never', got {early_stopping!r}", param="early_stopping"
        )
    if not ctx.max_tokens:
        return "length"
    if not 1 <= texts <= width:
        raise RequestError(f"texts must be between 1 and width ({width}), got {texts}", param="texts")
    early = early_stopping if width > 1 else True
    seq, logits = await ctx.extend(ctx.empty, prompt)
    seqs, logits_RV = [seq], logits[None]
    del seq
    beams = [Beam((), torch.zeros((), device=logits.device))]
    finished = [Finished((), torch.tensor(NEVER, device=logits.device), False)] * width
    promising = True
    for length in range(1, ctx.max_tokens + 1):
        tops, parents = _candidates(beams, logits_RV, max(2, 1 + len(ctx.eos)) * width)
        ended = [b.tokens[-1] in ctx.eos or length == ctx.max_tokens for b in tops]
        full = early is True and all(f.whole for f in finished)
        if promising and not full:
            news = [
                Finished(b.tokens, b.logprob / length**length_penalty)
                for b, end in zip(tops[:width], ended, strict=False)
                if end
            ]
            finished = sorted([*finished, *news], key=lambda f: -float(f.score))[:width]
        go_on = [i for i, end in enumerate(ended) if not end][:width]
        if not go_on:
            break
        best = float(tops[go_on[0]].logprob / _reach(length, ctx.max_tokens, length_penalty, early) ** length_penalty)
        worst = float(finished[-1].score)
        promising = promising and any(best > (worst if f.whole else NEVER) for f in finished)
        if not promising or (early is True and all(f.whole for f in finished)):
            break
        beams = [tops[i] for i in go_on]
        results = await ctx.extend([(seqs[parents[i]], [tops[i].tokens[-1]]) for i in go_on])
        seqs, logits_RV = [s for s, _ in results], torch.stack([x for _, x in results])
    for i, text in enumerate(finished[:texts]):
        ctx.emit(text.tokens, choice=i)


def _candidates(beams: list[Beam], logits_RV: Tensor, n: int) -> tuple[list[Beam], list[int]]:
    """The `n` likeliest hypotheses that are one token longer, best first, and which of `beams` each one continues."""
    sums_RV = logits_RV.log_softmax(1) + torch.stack([b.logprob for b in beams])[:, None]
    V = sums_RV.shape[1]
    top_n, at_n = sums_RV.flatten().topk(n)
    parents = (at_n // V).tolist()
    tokens = (at_n % V).tolist()
    return [
        Beam((*beams[p].tokens, t), top_n[i]) for i, (p, t) in enumerate(zip(parents, tokens, strict=True))
    ], parents


def _reach(length: int, most: int, penalty: float, early: Any) -> int:
    """The length at which a running hypothesis is imagined to end."""
    return most if early == "never" and penalty > 0 else length
