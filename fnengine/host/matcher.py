"""Which tokens a grammar allows: compiled grammars and where one stands in a text, as values.

    Grammar --compile--> Compiled --start--> Matcher --advance--> Matcher --advance--> ...
                        (any thread)            |-- allowed, forced, accepts_end, can, masks_along

A `Matcher` is a place in a text, and the `Guide` of a text that is held from its start. Advancing one gives another and
leaves the first as it was, so a sequence that is cut back just goes on from an older value. Underneath is one parser
per line of values, moved back and forth to the place that is asked about: a token costs microseconds either way. `fork`
gives a value a parser of its own (0.13 us per token so far): do that once per choice of n > 1 and per beam. Values of
one line belong to one thread at a time.

The text of a grammar is what tokens' true bytes add up to (`Tokenizer.token_bytes`), which is how text is defined here.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import llguidance
import numpy as np

from fnengine.errors import ConfigError, RequestError
from fnengine.host.grammar import Grammar, explain, lower
from fnengine.host.guide import NOTHING, Masks
from fnengine.host.schema import LIMITS, Limits
from fnengine.host.tokenizer import Tokenizer

TRIED = 16
"""Tokens of a random text that a compiled grammar has to match: what cannot be matched in time shows early."""
SPELLED = ("json_object", "json_schema", "regex", "choice")
"""Kinds of grammars that speak of bytes alone."""
WORN = ("too many states", "too many expressions")
"""Errors of a lexer that is full. All rows of one grammar share it, so a row may meet what others have filled."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A model's tokens as grammars see them. Make one with `vocabulary`; 152k tokens take a second of one core."""

    size: int
    """V, the width of the logits."""
    eos: tuple[int, ...]
    known_W: np.ndarray
    """int32 mask of the ids that a text can hold, end-of-sequence ids included."""
    ends_W: np.ndarray
    """int32 mask of `eos`."""
    controls: Mapping[str, int]
    """Tokens that stand for more than their text, by their spelling: never part of a string or a pattern."""
    backend: Any

    @property
    def words(self) -> int:
        """W, words of a mask."""
        return len(self.known_W)


AT_ONCE = 256
"""Tokens that are looked at between two pauses: about a millisecond."""


def vocabulary(
    tokenizer: Tokenizer, size: int, eos: Sequence[int], pause: Callable[[], None] = lambda: None
) -> Vocabulary:
    """The vocabulary of a model whose logits are `size` wide and whose texts end with one of `eos`.

    Args:
        pause: called now and then, so that a thread that makes one can let others go on. The library holds the
            interpreter's lock twice, for about 0.3 s of 152k tokens each.

    Raises: ConfigError when the tokenizer's text is not its tokens' bytes, or no token ends a text.
    """
    if tokenizer.decoding.kind == "window":
        raise ConfigError(
            "structured output needs tokens that are bytes, and this tokenizer has another decoder",
            where="tokenizer",
            remedy="use a model with a byte-level or byte-fallback tokenizer",
        )
    ends = tuple(dict.fromkeys(i for i in eos if 0 <= i < size))
    if not ends:
        raise ConfigError("structured output needs an end-of-sequence token, and none is known", where="tokenizer")
    added = tokenizer.backend.get_added_tokens_decoder()
    # An added token in brackets (<tool_call>) means more than its text even where it is not called special.
    marks = {i for i, t in added.items() if t.content[:1] + t.content[-1:] in ("<>", "[]") and len(t.content) > 2}
    special = {i for i in tokenizer.special_ids | marks | set(ends) if i < size}
    tokens: list[bytes] = []
    for at in range(0, size, AT_ONCE):
        tokens += [tokenizer.token_bytes(i) for i in range(at, min(at + AT_ONCE, size))]
        pause()
    spelled = {tokenizer.token(i) or "": i for i in sorted(special)}
    known = np.zeros(size + -size % 32, bool)
    known[:size] = np.fromiter(map(len, tokens), np.int64, size) > 0
    known[list(ends)] = True
    pieces = _Pieces(tokenizer, tokens, frozenset(special), ends[0], tokenizer.bos)
    library = llguidance.LLTokenizer
    pause()
    backend = library(llguidance.TokenizerWrapper(pieces), n_vocab=size, eos_token=list(ends), slices=[])
    pause()
    return Vocabulary(
        size=size,
        eos=ends,
        known_W=_pack(known),
        ends_W=_pack(np.isin(np.arange(len(known)), ends)),
        controls={text: i for text, i in spelled.items() if text},
        backend=backend.with_slices(library.general_slices()),
    )


def _pack(bits: np.ndarray) -> np.ndarray:
    """[W] int32, bit v % 32 of word v // 32 for [32 W] truth values."""
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


CUT, MOST_CUT = 64, 4096
"""Characters of the texts whose tokens are kept, and how many texts."""


class _Pieces:
    """What the library asks of a tokenizer: its bytes, and how it cuts a text (only for forced tokens)."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: frozenset[int], eos: int, bos: int | None):
        self.tokens, self.special_token_ids = tokens, sorted(special)
        self.eos_token_id, self.bos_token_id = eos, bos
        self._tokenizer, self._special = tokenizer, special
        self._cut: dict[str, list[int]] = {}

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """Of tokens by their bytes; only few texts need it."""
        found: dict[bytes, int] = {}
        for i, token in enumerate(self.tokens):
            if token and i not in self._special:
                found.setdefault(token, i)
        return found

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens), default=0)

    def __call__(self, text: str) -> list[int]:
        assert isinstance(text, str)  # the library tries bytes first and asks with strings then
        if (known := self._cut.get(text)) is not None:  # what has to come is asked about again and again
            return known
        ids = self._as_tokens(text)
        if len(text) <= CUT:
            if len(self._cut) >= MOST_CUT:
                self._cut.clear()
            self._cut[text] = ids
        return ids

    def _as_tokens(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special=False)
        wanted = text.encode()
        if self._joined(ids) == wanted:
            return ids
        # Tokenizers that put a space before the text: cut one that begins with something, and take that away again.
        lead = self._tokenizer.encode("\n", add_special=False)
        ids = self._tokenizer.encode("\n" + text, add_special=False)
        rest = ids[len(lead) :]
        return rest if ids[: len(lead)] == lead and self._joined(rest) == wanted else self._greedy(wanted)

    def _joined(self, ids: Sequence[int]) -> bytes | None:
        if any(i in self._special or i >= len(self.tokens) for i in ids):
            return None
        return b"".join(self.tokens[i] for i in ids)

    def _greedy(self, text: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((n for n in sizes if text[at : at + n] in self._ids), 0)
            if not size:
                break  # a byte that no token has: the rest is not forced but masked
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids


@dataclass(eq=False)
class Compiled:
    """A grammar ready to match, for any number of rows. Its parsers share a lexer, which learns as it is used."""

    grammar: Grammar
    vocabulary: Vocabulary
    limits: Limits
    source: str
    """The grammar as the library reads it."""
    exact: bool
    """Its masks are what may come, as the library makes them: it can name no token by number."""
    seed: Any
    """A parser at the start of a text, only ever copied."""


def compile(grammar: Grammar, vocabulary: Vocabulary, limits: Limits = LIMITS) -> Compiled:
    """The grammar, compiled; releases the interpreter lock, so a thread can do it beside the event loop.

    Raises: RequestError naming the grammar's field when it is no grammar, allows no text, or is too large.
    """
    source = lower(grammar, vocabulary.controls, limits)
    compiled = Compiled(grammar, vocabulary, limits, source, grammar.kind in SPELLED, None)
    compiled.seed = _parser(compiled)
    _try(compiled)
    return compiled


def _parser(compiled: Compiled) -> Any:
    """A parser of its own lexer, at the start of a text."""
    limits = compiled.limits
    parser = llguidance.LLMatcher(
        compiled.vocabulary.backend,
        compiled.source,
        log_level=0,
        limits=llguidance.LLParserLimits(
            max_items_in_row=limits.row_items,
            initial_lexer_fuel=limits.lexer_fuel,
            step_lexer_fuel=limits.step_fuel,
            step_max_items=limits.step_items,
            max_lexer_states=limits.states,
            max_grammar_size=limits.grammar_size,
            verbose_errors=False,
        ),
    )
    if parser.is_error():
        _fail(compiled, parser.get_error())
    return parser


def _try(compiled: Compiled) -> None:
    """Matches a random text, which also warms the lexer.

    Raises: RequestError when no text is allowed, or matching it is too much work.
    """
    matcher, draw = start(compiled), random.Random(0)
    for n in range(TRIED):
        mask_W = allowed(matcher, dead_end=n > 0)
        ids = np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))
        if not len(ids) or done(matcher):
            return
        matcher = advance(matcher, [int(ids[draw.randrange(len(ids))])])


@dataclass(eq=False)
class Cache:
    """The newest compiled grammars of one vocabulary, for any threads."""

    size: int = 32
    """Most grammars that are kept. A hostile one can come to hold about 30 MB."""
    _kept: OrderedDict[tuple[Grammar, int, Limits], Compiled] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, grammar: Grammar, vocabulary: Vocabulary, limits: Limits = LIMITS) -> Compiled:
        """What `compile` returns, from memory where it was there. Two threads may compile the same one at once."""
        key = (grammar, id(vocabulary), limits)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        made = compile(grammar, vocabulary, limits)
        with self._lock:
            self._kept[key] = made  # which holds the vocabulary, so its id is not given to another
            self._kept.move_to_end(key)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return made

    def peek(self, grammar: Grammar, vocabulary: Vocabulary, limits: Limits = LIMITS) -> Compiled | None:
        """The compiled grammar if it is there, at once: no thread is needed for it then."""
        with self._lock:
            return self._kept.get((grammar, id(vocabulary), limits))


Text = tuple[Any, int]
"""Tokens of a text, the newest outermost: (the text before it or None, token). Tuples of tuples and numbers cost the
garbage collector nothing, however long the text."""


@dataclass(eq=False, slots=True)
class _Line:
    """A parser and where it is."""

    parser: Any
    text: Text | None
    length: int


_tuple = tuple.__new__


class Matcher(NamedTuple):
    """A place in a text of a grammar. Make one with `start`, another with `advance`. What it has as a `Guide` of such a
    text takes tokens that the step has chosen, so what may not come is an error of the request there."""

    compiled: Compiled
    line: _Line
    text: Text | None
    """Tokens so far, without the end."""
    length: int
    """Of the text, in tokens."""
    ended: bool
    """Whether the newest token ended the text."""

    @property
    def words(self) -> int:
        return self.compiled.vocabulary.words

    def allow(self, masks: Masks, i: int) -> None:
        compiled, line, text, _, ended = self
        if ended:
            masks.array[i] = compiled.vocabulary.ends_W
            return
        if line.text is not text:
            _seek(self)
        parser = line.parser
        parser.unsafe_compute_mask_ptr(masks.address + i * masks.stride, masks.stride)
        if parser.is_error():
            _guard(self, lambda p: p.unsafe_compute_mask_ptr(masks.address + i * masks.stride, masks.stride))
        if compiled.exact:
            return
        mask_W = masks.array[i]
        mask_W &= compiled.vocabulary.known_W  # a grammar may name any token by number, padding too
        if not line.parser.is_accepting():  # nor may it end the text early that way
            mask_W &= ~compiled.vocabulary.ends_W

    def after(self, token: int) -> Matcher:
        compiled, line, text, length, ended = self
        if line.text is not text:
            _seek(self)
        if ended or token in compiled.vocabulary.eos:
            if ended or not line.parser.is_accepting():
                raise _choiceless(compiled)
            return Matcher(compiled, line, text, length, True)
        if line.parser.try_consume_tokens([token]) != 1 and not _consumed(self, [token]):
            raise _choiceless(compiled)
        line.text = text = (text, token)
        line.length = length = length + 1
        return _tuple(Matcher, (compiled, line, text, length, False))  # half of what calling the class costs

    def can(self, draft: Sequence[int]) -> int:
        return can(self, draft)

    def forced(self) -> tuple[int, ...]:
        return forced(self)

    def done(self) -> bool:
        if self.ended:
            return True
        if self.line.text is not self.text:
            _seek(self)
        parser = self.line.parser
        return parser.is_stopped() and parser.is_accepting()

    def fork(self) -> Matcher:
        return fork(self)


def start(compiled: Compiled) -> Matcher:
    """The place before the first token."""
    return Matcher(compiled, _Line(compiled.seed.deep_copy(), None, 0), None, 0, False)


def fork(matcher: Matcher) -> Matcher:
    """The same place with a parser of its own: going on from it costs the other line nothing."""
    parser = _seek(matcher).parser.deep_copy()
    return matcher._replace(line=_Line(parser, matcher.text, matcher.length))


def advance(matcher: Matcher, tokens: Sequence[int]) -> Matcher:
    """The place after `tokens`, each of which must be allowed. After the end, ends change nothing.

    Raises: RequestError when the grammar became too much work.
    """
    eos = matcher.compiled.vocabulary.eos
    ids, ended = [int(t) for t in tokens], matcher.ended
    count = 0 if ended else next((i for i, t in enumerate(ids) if t in eos), len(ids))
    assert all(t in eos for t in ids[count:]), f"tokens {ids[count:]} after the end of the text"
    line = _seek(matcher)
    if count:
        took = line.parser.try_consume_tokens(ids[:count])
        if took < count:
            if took:
                line.parser.rollback(took)
            assert _consumed(matcher, ids[:count]), f"{ids[:count]} are not allowed after {matcher.length} tokens"
        text = matcher.text
        for token in ids[:count]:
            text = text, token
        line.text, line.length = text, matcher.length + count
        matcher = Matcher(matcher.compiled, line, text, line.length, False)
    if count < len(ids) and not ended:
        assert line.parser.is_accepting(), "the text cannot end here"
        # The parser is not told: it stays where the text ends, so going back needs no special case.
        return matcher._replace(ended=True)
    return matcher


def allowed(matcher: Matcher, out_W: np.ndarray | None = None, *, dead_end: bool = False) -> np.ndarray:
    """[W] int32 mask of the tokens that may come next, bit v % 32 of word v // 32; only ends after the end.

    Args:
        out_W: contiguous, written and returned where given, so that a step's masks are one array.
        dead_end: return a mask of nothing instead of raising where no token is allowed.

    Raises: RequestError when no token is allowed here, or the grammar became too much work.
    """
    mask_W = np.empty(matcher.words, np.int32) if out_W is None else out_W
    matcher.allow(Masks(mask_W[None]), 0)
    if not dead_end and not mask_W.any():
        what = "no text satisfies the grammar" if not matcher.length else "no token can go on from here"
        _fail(matcher.compiled, what)
    return mask_W


def forced(matcher: Matcher) -> tuple[int, ...]:
    """Tokens that the text has to go on with, as the tokenizer would cut them; empty where there is a choice.

    Masks allow nothing else along them, so a row that appends them all at once has the same text as one that does not.
    """
    if matcher.ended:
        return ()
    _seek(matcher)
    tokens = _guard(matcher, lambda parser: parser.compute_ff_tokens())
    return tuple(tokens[: _guard(matcher, lambda parser: parser.validate_tokens(tokens))])


def accepts_end(matcher: Matcher) -> bool:
    """Whether the text may end here."""
    return matcher.ended or _seek(matcher).parser.is_accepting()


def done(matcher: Matcher) -> bool:
    """Whether nothing but an end may come: the row can stop without another step."""
    return matcher.done()


def can(matcher: Matcher, draft: Sequence[int]) -> int:
    """How many tokens of a draft are allowed, from its start; one end may be the last of them.

    Where a text is forced, masks are narrower: they allow it in one way of cutting it only.
    """
    if matcher.ended or not len(draft):
        return 0
    eos = matcher.compiled.vocabulary.eos
    ids = [int(t) for t in draft]
    until = next((i for i, t in enumerate(ids) if t in eos), len(ids))
    _seek(matcher)
    took = _guard(matcher, lambda parser: parser.validate_tokens(ids[:until])) if until else 0
    if took < until or until == len(ids):
        return took
    return took + accepts_end(advance(matcher, ids[:until]))


def masks_along(matcher: Matcher, draft: Sequence[int]) -> np.ndarray:
    """[n + 1, W] int32: what may come here and after each of the n tokens of the draft that `can` come."""
    count = can(matcher, draft)
    out_NW = np.empty((count + 1, matcher.compiled.vocabulary.words), np.int32)
    for i in range(count + 1):
        allowed(matcher, out_NW[i])
        if i < count:
            matcher = advance(matcher, draft[i : i + 1])
    return out_NW


def _seek(matcher: Matcher) -> _Line:
    """The matcher's line, its parser at the matcher's place."""
    line, here, length = matcher.line, matcher.text, matcher.length
    if line.text is here:
        return line
    there, at, missing = line.text, line.length, []
    while here is not there:  # back to what both have in common
        if length >= at:
            assert here is not None
            here, token = here
            length -= 1
            missing.append(token)
        if at > length:
            assert there is not None
            there, at = there[0], at - 1
    if line.length > at:
        assert line.parser.rollback(line.length - at), line.parser.get_error()
    missing.reverse()
    if missing and line.parser.try_consume_tokens(missing) < len(missing):
        _renew(matcher)
    line.text, line.length = matcher.text, matcher.length
    return line


def _guard(matcher: Matcher, ask: Callable[[Any], Any]) -> Any:
    """What the parser answers; once with a new lexer where the old one was full, also one that is full already.

    Raises: RequestError when the parser has failed.
    """
    line = matcher.line
    for again in (True, False):
        answer = None if line.parser.is_error() else ask(line.parser)
        error = line.parser.get_error() if line.parser.is_error() else ""
        if not error:
            return answer
        full = any(w in error for w in WORN)
        _renew(matcher, fresh=full)  # a failed parser never recovers, and other values stand on this line
        if not (again and full):
            _fail(matcher.compiled, error)


def _consumed(matcher: Matcher, ids: list[int]) -> bool:
    """Whether the parser takes the tokens after all, which it did not: it may have failed. It takes all or none.

    Raises: RequestError when it has failed, and not because its lexer was full.
    """
    if not matcher.line.parser.is_error():
        return False
    took = _guard(matcher, lambda parser: parser.try_consume_tokens(ids))
    if 0 < took < len(ids):
        matcher.line.parser.rollback(took)
    return took == len(ids)


def _renew(matcher: Matcher, fresh: bool = True) -> None:
    """Gives the matcher's line a parser at its place, of a new lexer if `fresh`."""
    compiled, line, text, tokens = matcher.compiled, matcher.line, matcher.text, []
    if fresh:
        compiled.seed = _parser(compiled)
    while text is not None:
        text, token = text
        tokens.append(token)
    tokens.reverse()
    line.parser, line.text, line.length = compiled.seed.deep_copy(), matcher.text, matcher.length
    if line.parser.try_consume_tokens(tokens) < len(tokens):
        line.parser, line.text, line.length = compiled.seed.deep_copy(), None, 0
        _fail(compiled, "too much work to match")


def _choiceless(compiled: Compiled) -> RequestError:
    return RequestError(NOTHING, where=compiled.grammar.field)


def _fail(compiled: Compiled, error: str) -> NoReturn:
    """Raises RequestError with the first lines of what the library says."""
    if error.startswith("NoExtension"):
        error = "no text satisfies the grammar"
    error = error.partition("<state>")[0].replace("<non-verbose/>", "")
    lines = [line.strip() for line in error.splitlines()]
    text = " ".join(line for line in lines if line)[:300]
    raise RequestError(explain(compiled.grammar, text), where=compiled.grammar.field, param=compiled.grammar.field)
