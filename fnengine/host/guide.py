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
    from fnengine.host.matcher import Cache, Vocabulary
    from fnengine.host.request import Request
    from fnengine.host.runs import Run
    from fnengine.host.tokenizer import Tokenizer

FORCED = 16
"""Most tokens that are appended in one step because nothing else may come: each wants logits of its own."""


NOTHING = "no token is left to choose by the grammar and whatever else forbids tokens in this request"


class Masks:
    """[N, W] masks, one of each place, in memory that a library may write to."""

    __slots__ = ("address", "array", "stride")

    def __init__(self, array_NW: np.ndarray):
        assert array_NW.dtype == np.int32 and array_NW.ndim == 2 and array_NW.flags.c_contiguous
        self.array = array_NW
        self.address: int = array_NW.ctypes.data
        self.stride: int = 4 * array_NW.shape[1]
        """Bytes of a mask."""


class Guide(Protocol):
    """A place in a text. Going on from it gives another one and leaves it as it was."""

    @property
    def words(self) -> int:
        """W, words of a mask."""
        ...

    def allow(self, masks: Masks, i: int) -> None:
        """Writes what may come next, nothing where nothing may: bit v % 32 of word v // 32 of mask i. Raises
        RequestError where finding out became too much work."""
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

    def allow(self, masks: Masks, i: int) -> None:
        if (begin := self.reasoning.begin) is None:
            masks.array[i] = self.free_W
            return
        self.inner.allow(masks, i)
        masks.array.view(np.uint32)[i, begin // 32] |= np.uint32(1 << begin % 32)

    def after(self, token: int) -> Guide | None:
        begin, end = self.reasoning.begin, self.reasoning.end
        if begin is not None:
            return replace(self, reasoning=Reasoning(end)) if token == begin else self.inner.after(token)
        if not self._free(token):
            raise RequestError(NOTHING, where="reasoning")
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
        held = m.start(self._cache.get(grammar, vocabulary))
        return held if reasoning is None else Late(held, reasoning, ~vocabulary.ends_W, self.tokenizer.token_bytes)


def _matching():
    """The module that needs the grammar library: an engine that nobody asks for a grammar starts without it."""
    from fnengine.host import matcher

    return matcher


def first(request: Request) -> np.ndarray:
    """[1, W] what the request's guide allows to come first, which runs may share.

    Raises: RequestError when that is nothing.
    """
    guide = request.guide
    assert guide is not None
    masks = Masks(np.empty((1, guide.words), np.int32))
    guide.allow(masks, 0)
    if not masks.array.any():
        raise _stuck(request)
    return masks.array


def _stuck(request: Request) -> RequestError:
    field = None if request.grammar is None else request.grammar.field
    return RequestError(NOTHING, where=field, param=field)


def begin(run: Run, guide: Guide, mask_1W: np.ndarray) -> None:
    """Gives a run its guide; the mask is what `first` says."""
    run.guide, run.masks = guide, mask_1W
    run.patient = True


def follow(run: Run, token: int) -> bool:
    """Takes a token that was chosen into the run's guide; whether the text is complete with it.

    A run that nothing holds any more goes on like one without a guide.

    Raises: RequestError when the guide does not allow it.
    """
    assert run.guide is not None
    run.guide = guide = run.guide.after(token)
    if guide is not None:
        return guide.done()
    run.draft, run.masks = (), None
    run.patient = run.guessed
    return False


def look(runs: Sequence[Run]) -> dict[int, RequestError]:
    """Makes the runs' masks for their next tokens, in one array, and drafts of what has to come; by index, why a run
    cannot go on: nothing may come, or its grammar became too much work."""
    guides = [run.guide for run in runs]
    assert guides and guides[0] is not None
    masks, refused = Masks(np.empty((len(runs), guides[0].words), np.int32)), {}
    for i, guide in enumerate(guides):
        assert guide is not None
        try:
            guide.allow(masks, i)
        except RequestError as e:
            refused[i] = e
    array_NW = masks.array
    for i, (run, words) in enumerate(zip(runs, np.count_nonzero(array_NW, axis=1).tolist(), strict=True)):
        run.draft, run.masks = (), array_NW[i : i + 1]
        if words < 2 and i not in refused:
            try:
                _along(run, run.masks[0])
            except RequestError as e:
                refused[i] = e
    return refused


def _along(run: Run, mask_W: np.ndarray) -> None:
    """A draft of what has to come after a token that is alone in its mask, with its masks.

    Raises: RequestError when nothing may come.
    """
    here: Guide | None = run.guide
    assert here is not None
    bits = int(mask_W.view(np.uint32).max())
    if not bits:
        raise _stuck(run.request)
    tokens = () if bits & bits - 1 else here.forced()[: max(min(FORCED, run.limit - run.known - 1), 0)]
    if not tokens:
        return
    masks = Masks(np.zeros((len(tokens) + 1, len(mask_W)), np.int32))
    for i, token in enumerate(tokens):
        assert here is not None, "a token is forced where nothing holds the text"
        masks.array.view(np.uint32)[i, token // 32] = 1 << token % 32
        here = here.after(token)
    if here is None:
        masks.array[-1] = -1
    else:
        here.allow(masks, len(tokens))
        if not masks.array[-1].any():
            raise _stuck(run.request)
    run.draft, run.masks = tokens, masks.array


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
    draft = tuple(draft[: here.can(draft)])
    masks, n = Masks(np.full((len(draft) + 1, run.masks.shape[1]), -1, np.int32)), 0
    masks.array[0] = run.masks[0]
    for token in draft:
        try:
            here = None if here is None else here.after(token)
            if here is not None:
                here.allow(masks, n + 1)
        except RequestError:
            break
        if not masks.array[n + 1].any():
            break
        n += 1
    run.draft, run.masks = draft[:n], masks.array[: n + 1]
