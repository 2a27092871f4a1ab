"""A second, smaller model writes the draft, with the target's own noise.

Noise belongs to (seed, position, token), so where both models give a token about the same probability they draw the
same one: at temperature 1 coupled draws agree far more often than independent ones, and at temperature 0 nothing
changes.

An engine has a draft model as its companion (`fnengine.companions`), which drafts for many sequences at once.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

import torch

from fnengine.decoding.speculate import Draft, Drawing, Text, grown, text
from fnengine.errors import OutOfBlocks
from fnengine.runtime import Runtime, Sequence
from fnengine.sampling import probabilities


@dataclass(frozen=True)
class Ahead:
    """A text, and the draft model's sequence of its beginning or of all of it and some guesses more."""

    text: Text
    how: Drawing
    seq: Sequence
    guesses: tuple[int, ...] = ()


@dataclass(frozen=True)
class DraftModel:
    """Drafts by `extend` on a runtime of its own, one token a step; rejected ones are cut off with `seq[:n]`."""

    runtime: Runtime
    claims: bool = False
    """Also give the distributions that tokens were drawn from, which rejection sampling can use. Without them it takes
    each token as certain, which is as true and accepts less."""

    def start(self, tokens: Tokens[int], how: Drawing) -> Ahead:
        return Ahead(text(tokens), how, self.runtime.empty)

    def propose(self, state: Ahead, k: int) -> Draft:
        """A draft; none where the draft model's own pool is full, and then this text's blocks go back."""
        try:
            return self._propose(state, k)
        except OutOfBlocks:
            return Draft((), None, replace(state, seq=self.runtime.empty, guesses=()))

    def _propose(self, state: Ahead, k: int) -> Draft:
        rt, how, ids = self.runtime, state.how, state.text.ids
        k = min(k, rt.max_len + 1 - len(ids))
        if k < 1:
            return Draft(())
        seq = state.seq[: len(ids) - 1] if len(state.seq) >= len(ids) else state.seq
        if len(seq) < how.prompt_len:
            # The first extend is the prompt, which penalties tell from the rest.
            seq = rt.empty
            if len(ids) > how.prompt_len:
                seq, _ = rt.extend(seq, ids[: how.prompt_len], logits=None)
        new, tokens, claims = ids[len(seq) :], [], []
        for _ in range(k):
            if self.claims:
                seq, token, logits = rt.extend(seq, new, sample=how.sampling, logits="last")
                before = [*ids.tolist(), *tokens]
                claims.append(probabilities(logits[None], position=[len(before)], **how.parameters([before]))[0])
            else:
                seq, token = rt.extend(seq, new, sample=how.sampling)
            tokens.append(token)
            new = [token]
        after = replace(state, seq=seq, guesses=tuple(tokens[:-1]))
        return Draft(tuple(tokens), torch.stack(claims) if claims else None, after)

    def advance(self, state: Ahead, tokens: Tokens[int]) -> Ahead:
        right = 0
        while right < min(len(tokens), len(state.guesses)) and tokens[right] == state.guesses[right]:
            right += 1
        keep = state.text.length + right
        seq = state.seq[:keep] if len(state.seq) > keep else state.seq
        return Ahead(grown(state.text, tokens), state.how, seq)
