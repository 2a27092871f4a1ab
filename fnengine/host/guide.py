"""What holds a run's text to a form: which tokens may come next, as a value that stands beside the run.

    submit    run.guide, at the start of the text, and run.masks: what may come next
    step      chooses under masks[0]; with a draft of k tokens, under masks[0:k + 1], one after each token
    commit    follow(run, token) for each token that was taken, then look(run): masks and, where the text can only go
              on in one way, that way as the next draft

A guide depends on nothing but the tokens that are known, so preemption, aborts and faults leave it as it is. Tokens
that must come are a draft that is always right: they cost one step together, and their log-probabilities come along.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fnengine.errors import ConfigError, RequestError
from fnengine.host.thinking import brief, found

if TYPE_CHECKING:
    from fnengine.host.grammar import Grammar
    from fnengine.host.matcher import Cache, Matcher, Vocabulary
    from fnengine.host.request import Request
    from fnengine.host.runs import Run
    from fnengine.host.tokenizer import Tokenizer

FORCED = 16
"""Most tokens that are appended in one step because nothing else may come: each wants logits of its own."""


_NOTHING = "no token is left to choose by the grammar and whatever else forbids tokens in this request"


class Guide(Protocol):
    """A place in a text. Going on from it gives another one and leaves it as it was."""

    @property
    def words(self) -> int:
        """W, words of a mask."""
        ...

    def allow(self, mask_W: np.ndarray) -> None:
        """Writes what may come next: bit v % 32 of word v // 32. Raises RequestError where nothing may."""
        ...

    def after(self, token: int) -> Guide | None:
        """The place after a token; None where nothing holds the text any more. Raises RequestError for one that may
        not come."""
        ...

    def can(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft may come, from its start."""
        ...

    def forced(self) -> tuple[int, ...]:
        """Tokens that have to come next, in order: masks along them allow nothing else."""
        ...

    def done(self) -> bool:
        """Whether the text is complete, so that nothing but an end may come."""
        ...

    def fork(self) -> Guide:
        """The same place, for another run."""
        ...


@dataclass(frozen=True, eq=False)
class Held:
    """A text that follows a grammar from here on."""

    matcher: Matcher

    @property
    def words(self) -> int:
        return self.matcher.compiled.vocabulary.words

    def allow(self, mask_W: np.ndarray) -> None:
        _matching().allowed(self.matcher, mask_W)

    def after(self, token: int) -> Guide:
        m = _matching()
        if not m.can(self.matcher, (token,)):
            raise RequestError(_NOTHING, where=self.matcher.compiled.grammar.field)
        return Held(m.advance(self.matcher, (token,)))

    def can(self, draft: Sequence[int]) -> int:
        return _matching().can(self.matcher, draft)

    def forced(self) -> tuple[int, ...]:
        return _matching().forced(self.matcher)

    def done(self) -> bool:
        return _matching().done(self.matcher)

    def fork(self) -> Guide:
        return Held(_matching().fork(self.matcher))


@dataclass(frozen=True)
class Reasoning:
    """How a text says that its reasoning is over."""

    end: str
    """The mark that ends it."""
    begin: int | None = None
    """The token that the text may begin with, to reason first; None: it begins inside of reasoning."""


@dataclass(frozen=True, eq=False)
class Late:
    """A text that another guide holds once its reasoning is over; it does not end before."""

    inner: Guide
    reasoning: Reasoning
    free_W: np.ndarray
    """What may come while it reasons: all but ends of the text."""
    bytes_of: Callable[[int], bytes]
    """Of a token."""
    tail: bytes = b""
    """The last bytes of reasoning, as many as may become its mark."""

    @property
    def words(self) -> int:
        return self.inner.words

    def allow(self, mask_W: np.ndarray) -> None:
        if (begin := self.reasoning.begin) is None:
            mask_W[:] = self.free_W
            return
        self.inner.allow(mask_W)
        mask_W.view(np.uint32)[begin // 32] |= np.uint32(1 << begin % 32)

    def after(self, token: int) -> Guide | None:
        begin, end = self.reasoning.begin, self.reasoning.end
        if begin is not None:
            return replace(self, reasoning=Reasoning(end)) if token == begin else self.inner.after(token)
        if not self._free(token):
            raise RequestError(_NOTHING, where="reasoning")
        over, tail = found(self.tail, self.bytes_of(token), [end.encode()])
        return self.inner if over else replace(self, tail=tail)

    def _free(self, token: int) -> bool:
        return bool(int(self.free_W[token // 32]) >> token % 32 & 1)

    def can(self, draft: Sequence[int]) -> int:
        here: Guide | None = self
        for i, token in enumerate(draft):
            if here is None:
                break
            if not isinstance(here, Late):
                return i + here.can(draft[i:])
            if here.reasoning.begin is not None and token != here.reasoning.begin:
                return i + here.inner.can(draft[i:])
            if not here._free(token):
                return i
            here = here.after(token)
        return len(draft)

    def forced(self) -> tuple[int, ...]:
        return ()

    def done(self) -> bool:
        return False

    def fork(self) -> Guide:
        return replace(self, inner=self.inner.fork())


@dataclass(eq=False)
class Guides:
    """Makes the guides of one engine's requests, in any thread; what was compiled is kept for the next ones."""

    tokenizer: Tokenizer
    size: int
    """V, the width of the logits."""
    eos: tuple[int, ...]
    pause: Callable[[], None] = partial(time.sleep, 0.0005)
    """Lets other threads go on while the vocabulary is read."""
    _vocabulary: Vocabulary | None = None
    _cache: Cache | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, request: Request) -> Request:
        """The request with the guide of its grammar, which has to be compiled for it, and of its budget of thinking.

        Raises: RequestError naming the grammar's field when it is no grammar, allows no text, is too large, or cannot
            be followed with this model's tokens.
        """
        grammar, thinking = request.grammar, request.thinking
        if request.guide is not None or (grammar is None and thinking is None):
            return request
        guide = None if grammar is None else self.of(grammar, request.reasoning)
        if thinking is not None:
            guide = brief(guide, thinking, -(-self.size // 32), self.tokenizer.token_bytes)
        return replace(request, guide=guide)

    def of(self, grammar: Grammar, reasoning: Reasoning | None = None) -> Guide:
        """The guide of a grammar at the start of a text, or where the text's reasoning ends."""
        m = _matching()
        with self._lock:
            if self._vocabulary is None or self._cache is None:
                try:
                    self._vocabulary = m.vocabulary(self.tokenizer, self.size, self.eos, self.pause)
                    self._cache = m.Cache()
                except ConfigError as e:
                    raise RequestError(str(e), where=grammar.field, param=grammar.field) from e
        vocabulary = self._vocabulary
        held = Held(m.start(self._cache.get(grammar, vocabulary)))
        return held if reasoning is None else Late(held, reasoning, ~vocabulary.ends_W, self.tokenizer.token_bytes)


def _matching():
    """The module that needs the grammar library: an engine that nobody asks for a grammar starts without it."""
    from fnengine.host import matcher

    return matcher


def begin(run: Run, guide: Guide, mask_W: np.ndarray) -> None:
    """Gives a run its guide; `mask_W` is what it allows, which runs may share."""
    run.guide, run.masks = guide, mask_W[None]
    run.patient, run.plain = True, False


def follow(run: Run, token: int) -> bool:
    """Takes a token that was chosen into the run's guide; whether the text is complete with it.

    A run that nothing holds any more goes on like one without a guide.

    Raises: RequestError when the guide does not allow it.
    """
    assert run.guide is not None
    run.guide = run.guide.after(token)
    if run.guide is not None:
        return run.guide.done()
    run.draft, run.masks = (), None
    run.patient = run.guessed
    run.plain = run.request.logprobs is None and not run.request.stop.min_tokens and not run.taps
    return False


def look(run: Run) -> None:
    """Makes the run's masks for its next token, and a draft of what has to come.

    Raises: RequestError when nothing may come, or the grammar became too much work.
    """
    here: Guide | None = run.guide
    assert here is not None
    tokens = here.forced()[: max(min(FORCED, run.limit - run.known - 1), 0)]
    masks = np.zeros((len(tokens) + 1, here.words), np.int32)
    for i, token in enumerate(tokens):
        assert here is not None, "a token is forced where nothing holds the text"
        masks.view(np.uint32)[i, token // 32] = 1 << token % 32
        here = here.after(token)
    if here is None:
        masks[-1] = -1
    else:
        here.allow(masks[-1])
    run.draft, run.masks = tokens, masks


def guess(run: Run, draft: Sequence[int]) -> None:
    """Makes of somebody's guess the run's draft: all of it, or as much as the run's guide allows.

    A guess that would be too much work ends before that.
    """
    here: Guide | None = run.guide
    if here is None:
        run.draft = tuple(draft)
        return
    assert run.masks is not None
    if run.draft:
        return  # what must come is there already
    masks = [run.masks[0]]
    for token in draft[: here.can(draft)]:
        mask_W = np.full_like(masks[0], -1)
        try:
            here = None if here is None else here.after(token)
            if here is not None:
                here.allow(mask_W)
        except RequestError:
            break
        masks.append(mask_W)
    run.draft, run.masks = tuple(draft[: len(masks) - 1]), np.stack(masks)
