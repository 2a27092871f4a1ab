"""A budget of thinking: from when on a text has to end its reasoning, as a guide that stands beside or around another.

    prompt ... <think> | t t t t t  close | answer
                         <- budget ->

Marks are found in the bytes of the text, as a parser finds them, however the model cuts them into tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fnengine.errors import RequestError

if TYPE_CHECKING:
    from fnengine.host.guide import Guide, Masks

FIELD = "thinking_token_budget"


@dataclass(frozen=True)
class Budget:
    """How long a text may reason, and how it is brought to an end."""

    tokens: int
    """Most tokens of reasoning, those of marks not."""
    ends: tuple[str, ...]
    """Marks that end it by themselves, any of them."""
    close: tuple[int, ...]
    """Token ids that are forced to end it."""
    begin: str | None = None
    """The mark that the text begins with if it reasons; None: it begins inside of reasoning."""
    never: int | None = None
    """The token that may not follow what was forced: it would begin reasoning again."""

    def __post_init__(self):
        assert self.tokens >= 0 and self.close and all(self.ends)


def found(tail: bytes, piece: bytes, marks: Sequence[bytes]) -> tuple[bool, bytes]:
    """(whether one of the marks ends in `piece`, the bytes that may be the beginning of one later), after `tail`."""
    window = tail + piece
    keep = max(map(len, marks)) - 1
    return any(m in window for m in marks), window[len(window) - keep :] if keep < len(window) else window


@dataclass(frozen=True, eq=False)
class Brief:
    """A text whose reasoning ends in time. Make one with `brief`."""

    inner: Guide | None
    """What else holds the text, from its start; None: nothing does."""
    budget: Budget
    words: int
    bytes_of: Callable[[int], bytes]
    """Of a token."""
    inside: bool = False
    spent: int = 0
    tail: bytes = b""
    """Before: all of the text. Inside: as much of its end as may become a mark."""
    left: tuple[int, ...] = ()
    """What has to come."""
    closed: bool = False
    """It was forced, and the token behind it is still to come."""

    def allow(self, masks: Masks, i: int) -> None:
        bits_W = masks.array.view(np.uint32)[i]
        if self.left:
            bits_W[:] = 0
            bits_W[self.left[0] // 32] = np.uint32(1 << self.left[0] % 32)
            return
        if self.inner is None:
            masks.array[i] = -1
        else:
            self.inner.allow(masks, i)
        if self.closed and (never := self.budget.never) is not None:
            bits_W[never // 32] &= ~np.uint32(1 << never % 32)

    def after(self, token: int) -> Guide | None:
        if not self._may(token):
            raise RequestError(f"token {token} may not come where reasoning has to end", where=FIELD, param=FIELD)
        inner = None if self.inner is None else self.inner.after(token)
        if self.left:
            left = self.left[1:]
            over = not left and self.budget.never is None
            return inner if over else replace(self, inner=inner, left=left, closed=not left)
        if self.closed:
            return inner
        piece, begin = self.bytes_of(token), (self.budget.begin or "").encode()
        if not self.inside:
            head = (self.tail + piece).lstrip()
            if head.startswith(begin):
                return self._entered(inner, 0, head[len(begin) :])
            return replace(self, inner=inner, tail=head) if begin.startswith(head) else inner
        over, tail = found(self.tail, piece, [e.encode() for e in self.budget.ends])
        return inner if over else self._entered(inner, self.spent + 1, tail)

    def _entered(self, inner: Guide | None, spent: int, tail: bytes) -> Brief:
        left = self.budget.close if spent >= self.budget.tokens else ()
        return replace(self, inner=inner, inside=True, spent=spent, tail=tail, left=left)

    def _may(self, token: int) -> bool:
        if self.left:
            return token == self.left[0]
        return not self.closed or token != self.budget.never

    def can(self, draft: Sequence[int]) -> int:
        here: Guide | None = self
        for i, token in enumerate(draft):
            if here is None:
                break
            if not isinstance(here, Brief):
                return i + here.can(draft[i:])
            if not here._may(token) or (here.inner is not None and not here.inner.can((token,))):
                return i
            here = here.after(token)
        return len(draft)

    def forced(self) -> tuple[int, ...]:
        if self.left or self.inner is None or self.closed:
            return self.left
        most = self.budget.tokens - self.spent if self.inside else 1
        return self.inner.forced()[:most]

    def done(self) -> bool:
        return self.inner is not None and self.inner.done()

    def fork(self) -> Guide:
        return self if self.inner is None else replace(self, inner=self.inner.fork())


def brief(inner: Guide | None, budget: Budget, words: int, bytes_of: Callable[[int], bytes]) -> Brief:
    """The guide of a budget at the start of a text."""
    here = Brief(inner, budget, words, bytes_of)
    return here if budget.begin is not None else here._entered(inner, 0, b"")
