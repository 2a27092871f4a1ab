"""Beam search: the likeliest text that a bounded number of hypotheses finds.

The rules are those of transformers' `generate(num_beams=..., do_sample=False)`, so that the tokens are the same: how
many candidates are looked at, when a hypothesis counts as finished, when nothing better can come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from fnengine.decoding.strategy import Context, strategy
from fnengine.errors import RequestError
from fnengine.sequence import MOST_LIKELIEST, Likeliest

NEVER = -1.0e9
"""Score of what is no hypothesis."""


@dataclass(frozen=True)
class Beam:
    """A hypothesis: what was generated, and the sum of its log-probabilities."""

    tokens: tuple[int, ...]
    logprob: np.float32
    """Summed in float32, as in transformers: where two sums round to the same, order decides."""


@dataclass(frozen=True)
class Finished:
    """A hypothesis that has ended, with its length-normalised score."""

    tokens: tuple[int, ...]
    score: np.float32
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
    each = max(2, 1 + len(ctx.eos))
    most = min(ctx.vocab, MOST_LIKELIEST) // each
    if not 1 <= width <= most:
        raise RequestError(f"width must be between 1 and {most} here, got {width}", param="width")
    if early_stopping not in (True, False, "never"):
        raise RequestError(
            f"early_stopping must be true, false or 'never', got {early_stopping!r}", param="early_stopping"
        )
    if not ctx.max_tokens:
        return "length"
    if not 1 <= texts <= width:
        raise RequestError(f"texts must be between 1 and width ({width}), got {texts}", param="texts")
    early = early_stopping if width > 1 else True
    # Of each hypothesis's continuations no more can be among the best of all than are looked at.
    n = each * width
    seq, found = await ctx.extend(ctx.empty, prompt, likeliest=n)
    seqs, nexts = [seq], [found]
    del seq
    beams = [Beam((), np.float32(0))]
    finished = [Finished((), np.float32(NEVER), False)] * width
    promising = True
    for length in range(1, ctx.max_tokens + 1):
        tops, parents = _candidates(beams, nexts, n)
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
        results = await ctx.extend([(seqs[parents[i]], [tops[i].tokens[-1]]) for i in go_on], likeliest=n)
        seqs, nexts = [s for s, _ in results], [x for _, x in results]
    for i, text in enumerate(finished[:texts]):
        ctx.emit(text.tokens, choice=i)


def _candidates(beams: list[Beam], nexts: list[Likeliest], n: int) -> tuple[list[Beam], list[int]]:
    """The `n` likeliest hypotheses that are one token longer, best first, and which of `beams` each one continues."""
    sums: np.ndarray = np.concatenate([b.logprob + x.logprobs for b, x in zip(beams, nexts, strict=True)])
    at = np.argsort(-sums, kind="stable")[:n].tolist()
    tokens = np.concatenate([x.ids for x in nexts])[at].tolist()
    each = len(nexts[0].ids)
    parents = [i // each for i in at]
    return [
        Beam((*beams[p].tokens, t), np.float32(sums[i])) for p, t, i in zip(parents, tokens, at, strict=True)
    ], parents


def _reach(length: int, most: int, penalty: float, early: Any) -> int:
    """The length at which a running hypothesis is imagined to end."""
    return most if early == "never" and penalty > 0 else length
