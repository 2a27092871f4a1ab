"""Generated tokens to released text: byte-safe, stop strings taken out, ids and log-probabilities kept beside it.

    token ids -> Detokenizer -> text -> StopScan -> text that may be shown
         \\____________ TextStream ____________/     + the tokens and log-probabilities behind it

Everything here belongs to one choice of one request and does a bounded amount of work per token.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from fnengine.host.patterns import PatternScan, program
from fnengine.host.repeats import REPETITION, Repeats, Repetition
from fnengine.host.tokenizer import Tokenizer

LOST = "\ufffd"
"""What stands for bytes that are no character."""
_NONE: Mapping[int, str] = MappingProxyType({})
WINDOW = 8
"""Tokens that may wait for the rest of a character when only the backend can decode; byte tokens need at most 4."""


@dataclass
class Detokenizer:
    """Text of generated ids, as soon as it is certain. Make one with `start`.

    Law: all pushes and `finish` together give `decode(prompt + ids)` less what the prompt already showed; with no
    prompt, `tokenizer.decode(ids)`. A character that the prompt began and the ids complete is theirs; if they do not
    complete it, its U+FFFD stays with the prompt.
    """

    _source: _ByteText | _WindowText

    @staticmethod
    def start(tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special: bool = True) -> Detokenizer:
        """A detokenizer that stands behind `prompt` (ids, of which only a few at each end are read)."""
        kind = _WindowText if tokenizer.decoding.kind == "window" else _ByteText
        return Detokenizer(kind.start(tokenizer, prompt, skip_special))

    def push(self, id: int) -> str:
        """The text that is certain now and was not before; never part of a character."""
        return self._source.push(id)

    def finish(self) -> str:
        """The text of what still waits: U+FFFD for a character whose last bytes never came."""
        return self._source.finish()

    @property
    def waiting(self) -> bool:
        """Whether the newest token's text is not certain yet."""
        return self._source.waiting

    def whole(self) -> Mapping[int, str]:
        """Texts of the tokens whose `push` would give that and change nothing; some of them only."""
        return self._source.whole()


@dataclass
class _ByteText:
    """For tokens that are bytes: an incremental UTF-8 decoder and nothing else to remember."""

    tokenizer: Tokenizer
    skip_special: bool
    strip: int
    """Leading spaces that the whole text still has to lose."""
    decoder: codecs.IncrementalDecoder
    owed: int = 0
    """Waiting bytes that began in the prompt: if they turn out invalid, so many U+FFFD are the prompt's (ED A0, say,
    waits whole and becomes two)."""

    @staticmethod
    def start(tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool) -> _ByteText:
        here = _ByteText(tokenizer, skip_special, tokenizer.decoding.strip, _utf8())
        for id in prompt:
            if not here.strip:
                break
            here.push(id)
        if here.strip and here.waiting:
            here.strip = 0  # the prompt's first character has begun, and it is not a space
        tail = b""
        for id in reversed(prompt):
            if tokenizer.shows(id, skip_special):
                tail = tokenizer.token_bytes(id) + tail
            if len(tail) >= 4:
                break
        here.decoder = _utf8()
        for size in range(1, min(3, len(tail)) + 1):
            if tail[-size] & 0xC0 != 0x80:  # not a continuation: the last character begins here
                if not here.decoder.decode(tail[-size:]):
                    here.owed = len(tail[-size:].decode("utf-8", "replace"))
                else:
                    here.decoder = _utf8()
                break
        return here

    def push(self, id: int) -> str:
        if self.skip_special and id in self.tokenizer.special_ids:
            return ""
        return self._take(self.decoder.decode(self.tokenizer.token_bytes(id)))

    def finish(self) -> str:
        return self._take(self.decoder.decode(b"", True))

    @property
    def waiting(self) -> bool:
        return bool(self.decoder.getstate()[0])

    def whole(self) -> Mapping[int, str]:
        return _NONE if self.strip or self.owed or self.waiting else self.tokenizer.whole_texts

    def _take(self, text: str) -> str:
        if not text:
            return text
        for _ in range(self.owed):
            text = text.removeprefix(LOST)
        self.owed = 0
        if self.strip:
            rest = text.lstrip(" ")
            spaces = min(self.strip, len(text) - len(rest))
            self.strip = 0 if rest else self.strip - spaces
            text = text[spaces:]
        return text


def _utf8() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


@dataclass
class _WindowText:
    """For any other tokenizer: decode the last few tokens with and without the new one, and take the difference.

        ... | shown before | waiting | new        shown = decode(first), text = decode(all)[len(shown):]

    The tokens shown last stay in the window, because a decoder treats the first token of what it gets differently.
    """

    tokenizer: Tokenizer
    skip_special: bool
    ids: list[int]
    read: int
    """The first `read` ids of the window have been shown ..."""
    shown: str
    """... as this text."""

    @staticmethod
    def start(tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool) -> _WindowText:
        tail: list[int] = []
        for id in reversed(prompt):
            if tokenizer.shows(id, skip_special):
                tail.append(id)
            if len(tail) == WINDOW:
                break
        tail.reverse()
        return _WindowText(tokenizer, skip_special, tail, len(tail), tokenizer.decode(tail, skip_special=False))

    def push(self, id: int) -> str:
        if not self.tokenizer.shows(id, self.skip_special):
            return ""
        self.ids.append(id)
        text = self.tokenizer.decode(self.ids, skip_special=False)
        if text.endswith(LOST) and len(self.ids) - self.read < WINDOW:
            return ""
        return self._show(text)

    def finish(self) -> str:
        return self._show(self.tokenizer.decode(self.ids, skip_special=False)) if self.waiting else ""

    @property
    def waiting(self) -> bool:
        return self.read < len(self.ids)

    def whole(self) -> Mapping[int, str]:
        return _NONE

    def _show(self, text: str) -> str:
        shown = self.shown if text.startswith(self.shown) else self.shown.rstrip(LOST)
        new = text[len(shown) :]
        self.ids = self.ids[self.read :]
        self.read = len(self.ids)
        self.shown = self.tokenizer.decode(self.ids, skip_special=False)
        return new


@dataclass
class StopScan:
    """Finds the stop string that completes first (ties: the first in the list) in text that comes in pieces.

    Held back is the longest end of the text that could still grow into a stop string, so at most the longest
    stop string less one character. Each character costs amortised constant time per stop string, however long the
    strings are. Source: Knuth, Morris, Pratt 1977, one automaton per string.
    """

    stops: tuple[str, ...]
    include: bool = False
    """Keep the matched string in the text."""
    _border: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    """Per string and length n: the longest proper prefix of it that also ends its first n characters."""
    _matched: list[int] = field(init=False)
    """Per string: how many of its characters end the text so far."""
    _held: str = field(init=False, default="")
    _first: frozenset[str] = field(init=False, repr=False)
    """Characters that stop strings begin with."""

    def __post_init__(self):
        assert all(self.stops), "stop strings must not be empty"
        self._border = tuple(map(_borders, self.stops))
        self._first = frozenset(s[0] for s in self.stops)
        self._matched = [0] * len(self.stops)

    def feed(self, text: str, count: bool = True) -> tuple[str, str | None]:
        """(text that may be shown, stop string or None). After a match the scan is over and the rest is dropped.

        Args:
            count: False: strings that complete within this text do not stop it (one that completes later does).
        """
        if not self.stops or not text:
            return text, None
        matched = self._matched
        if not any(matched) and self._first.isdisjoint(text):
            return text, None
        for at, c in enumerate(text):
            hit = -1
            for k, stop in enumerate(self.stops):
                n, border = matched[k], self._border[k]
                while n and (n == len(stop) or stop[n] != c):
                    n = border[n]
                if stop[n] == c:
                    n += 1
                matched[k] = n
                if n == len(stop) and hit < 0:
                    hit = k
            if hit >= 0 and count:
                stop = self.stops[hit]
                whole = self._held + text[: at + 1]
                self._held = ""
                return whole if self.include else whole[: len(whole) - len(stop)], stop
        whole = self._held + text
        # A whole match that did not count can only go on as its border.
        hold = max(n if n < len(s) else b[n] for n, s, b in zip(matched, self.stops, self._border, strict=True))
        self._held = whole[len(whole) - hold :]
        return whole[: len(whole) - hold], None

    def flush(self) -> tuple[str, str | None]:
        """(the text still held back, None: no string completes where nothing comes); the scan is over."""
        held, self._held = self._held, ""
        return held, None


def _borders(s: str) -> tuple[int, ...]:
    border = [0] * (len(s) + 1)
    n = 0
    for i in range(1, len(s)):
        while n and s[n] != s[i]:
            n = border[n]
        if s[n] == s[i]:
            n += 1
        border[i + 1] = n
    return tuple(border)


class Piece(NamedTuple):
    """What may be shown now. Adding two gives the piece of both."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    """The tokens whose text is now shown in full, in order."""
    logprobs: tuple[Any, ...] = ()
    """What was pushed beside each of `tokens`."""
    stop: str | None = None
    """The stop string, or the pattern, that ended the text."""

    def __add__(self, other: Piece) -> Piece:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Piece(
            self.text + other.text, self.tokens + other.tokens, self.logprobs + other.logprobs, self.stop or other.stop
        )


@dataclass
class TextStream:
    """Pieces of one choice: text, tokens and log-probabilities that belong together leave together.

    A token leaves with the last of its text. One without text of its own (skipped, silent) leaves with the next text or
    at the end. After a piece with `stop`, or after `finish`, the stream is over.
    """

    _detok: Detokenizer
    _scan: StopScan | PatternScan
    from_token: int = 0
    """Stop strings that complete in the text of tokens before this index (0 is the first generated) do not count."""
    _pushed: int = 0
    """Tokens"""
    _seen: int = 0
    """Characters that the detokenizer has given."""
    _shown: int = 0
    """Characters that pieces have carried."""
    _queue: deque[tuple[int, Any, int]] = field(default_factory=deque)
    """(id, log-probability, `_shown` at which its text is out) of the tokens that wait."""
    _over: bool = False
    repeats: Repeats | None = None
    """Ends a text that goes in circles; what is there of it stays."""
    whole: Mapping[int, str] = field(default_factory=dict)
    """Tokens whose `push` would give just this text, themselves and their log-probability, and change nothing: the way
    of most tokens, without the way."""

    @staticmethod
    def start(
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        *,
        patterns: Sequence[str] = (),
        include_stop: bool = False,
        from_token: int = 0,
        skip_special: bool = True,
        repetition: Repetition | None = None,
    ) -> TextStream:
        """A stream that stands behind `prompt`. For min_tokens = m, `from_token` is max(0, m - 1): the text may end
        with the m-th token, not before. Patterns are regular expressions beside the stop strings."""
        detok = Detokenizer.start(tokenizer, prompt, skip_special)
        scan = StopScan(tuple(stops), include_stop)
        if patterns:
            scan = PatternScan(program(tuple(stops), tuple(patterns)), include_stop)
        here = TextStream(detok, scan, from_token)
        here.repeats = None if repetition is None else Repeats(repetition)
        here.whole = _NONE if stops or patterns or repetition is not None else detok.whole()
        return here

    def push(self, token: int, logprob: Any = None, *, silent: bool = False) -> Piece:
        """What `token` lets out.

        Args:
            logprob: anything; comes back beside the token.
            silent: the token has no text (a stop id, an end-of-sequence).
        """
        if not silent and (text := self.whole.get(token)) is not None:
            return Piece(text, (token,), (logprob,))
        assert not self._over, "the stream is over"
        text = "" if silent else self._detok.push(token)
        self._seen += len(text)
        # Waiting bytes always turn into exactly one character: the one they begin, or U+FFFD.
        self._queue.append((token, logprob, self._seen + (self._detok.waiting and not silent)))
        self._pushed += 1
        piece = self._let_out(text)
        if self.repeats is not None:
            if self.repeats.push(token) and self._pushed > self.from_token and not self._over:
                piece += self.finish()
                return piece if piece.stop is not None else piece._replace(stop=REPETITION)
            return piece
        self.whole = _NONE if self._queue or self._over or self._scan.stops else self._detok.whole()
        return piece

    def finish(self) -> Piece:
        """Everything that still waits. A stop string may complete even here, by the U+FFFD of a broken character."""
        if self._over:
            return Piece()
        if self.whole:  # nothing waits
            self.whole, self._over = _NONE, True
            return Piece()
        self.whole = _NONE
        piece = self._let_out(self._detok.finish())
        if piece.stop is None:
            rest, stop = self._scan.flush()
            piece += Piece(rest, *self._take_all(), stop)
        self._over = True
        return piece

    def _let_out(self, text: str) -> Piece:
        shown, stop = self._scan.feed(text, count=self._pushed > self.from_token)
        self._shown += len(shown)
        if stop is not None:
            self._over = True
            return Piece(shown, *self._take_all(), stop)
        if not shown:
            return Piece()
        ready = []
        while self._queue and self._queue[0][2] <= self._shown:
            ready.append(self._queue.popleft())
        return Piece(shown, tuple(r[0] for r in ready), tuple(r[1] for r in ready))

    def _take_all(self) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        ready = list(self._queue)
        self._queue.clear()
        return tuple(r[0] for r in ready), tuple(r[1] for r in ready)


def offsets(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    prefix_len: int = 0,
    *,
    prompt: Sequence[int] = (),
    skip_special: bool = True,
) -> list[int]:
    """Where each token starts in the returned text, in characters; a token inside a character starts where it does.

    Args:
        prefix_len: characters of the returned text before the first of `ids` (the echoed prompt).
        prompt: ids before `ids`, as for `Detokenizer.start`.
    """
    detok = Detokenizer.start(tokenizer, prompt, skip_special)
    starts = []
    for id in ids:
        starts.append(prefix_len)
        prefix_len += len(detok.push(id))
    return starts
