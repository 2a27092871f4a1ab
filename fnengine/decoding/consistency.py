"""Self-consistency: several samples answer, and the most frequent answer wins.

Source: Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning in Language Models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from fnengine.decoding.sampled import samples
from fnengine.decoding.strategy import Context, strategy
from fnengine.errors import RequestError


@strategy
async def self_consistent(ctx: Context, prompt: Sequence[int], answer: str, n: int = 5):
    """Of `n` samples the first whose answer is the most frequent one.

    Args:
        answer: a regular expression. The answer of a sample is its last match in the sample's text: the first group,
            or all of it where there is none; spaces around it do not count. A sample without a match has no vote.

    Answers with equally many votes: the one that the first sample to give either of them gives. Without any vote the
    first sample is the result.
    """
    if n < 1:
        raise RequestError(f"n must be at least 1, got {n}", param="n")
    try:
        pattern = re.compile(answer)
    except re.error as e:
        raise RequestError(f"{answer!r} is no regular expression: {e}", param="answer") from None
    done = await samples(ctx, prompt, n)
    answers = [_last(pattern, ctx.decode(s.tokens)) for s in done]
    votes = Counter(a for a in answers if a is not None)
    # A Counter keeps the order in which it met its keys, and max takes the first of equals.
    winner = max(votes, key=lambda a: votes[a]) if votes else answers[0]
    best = done[answers.index(winner)]
    ctx.emit(best.tokens, best.logprobs)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = list(pattern.finditer(text))
    if not found:
        return None
    return (found[-1].group(1 if pattern.groups else 0) or "").strip()
