"""Regular expressions that end a text, found as the text comes: linear time, whatever the pattern.

A text ends with the first of its characters at which some part of it, from anywhere up to there, is matched; that part
begins as far to the left as it can. So where it ends depends on the text alone, not on how it was cut into tokens, and
nobody has to wait for what a greedy `*` may still find.

    pattern \\s*END      text   The cat.  \\n END of
                                       |     |           the match ends here, and begins there

A pattern is a machine of nodes (Thompson 1968); all ways through it are gone at once, each remembered by where it began
(Pike's machine). A character costs at most one visit of each node, and of the text only what a match may have begun in
is held. What such a machine cannot do (references to groups, looking ahead or behind) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

from fnengine.errors import RequestError

MOST_PATTERNS, MOST_NODES, MOST_CHARS = 16, 128, 4096
"""Of one request: patterns, nodes of all their machines (a repetition {n} has n copies), characters. A character of a
text that keeps all 128 nodes busy takes up to 90 us, one at which nothing begins 0.3."""
MOST_KNOWN = 4096
"""Pairs of characters of which is remembered what may begin there."""
MOST_DEEP = 64
"""Groups within groups."""

Test = Callable[[str], bool]
"""Whether a character is one of a set."""


# --- syntax: that of Python's `re`, as far as it goes -----------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    ignore: bool = False
    """i: letters of either case."""
    lines: bool = False
    """m: ^ and $ mean lines."""
    dots: bool = False
    """s: . is a line end, too."""


@dataclass(frozen=True)
class One:
    """A character of a set."""

    test: Test


@dataclass(frozen=True)
class Edge:
    """A place, told by the characters around it: begin, line (begin of one), end (of a line), word, within."""

    kind: str


@dataclass(frozen=True)
class Then:
    parts: tuple[Tree, ...]


@dataclass(frozen=True)
class Either:
    parts: tuple[Tree, ...]


@dataclass(frozen=True)
class Times:
    part: Tree
    least: int
    most: int | None


Tree = One | Edge | Then | Either | Times


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"


def _inverse(test: Test) -> Test:
    return lambda c: not test(c)


def _among(tests: Sequence[Test], negated: bool) -> Test:
    return lambda c: any([test(c) for test in tests]) != negated


def _range(first: str, last: str) -> Test:
    return lambda c: first <= c <= last


def _folded(test: Test) -> Test:
    return lambda c: test(c) or test(c.lower()) or test(c.upper())


_KINDS: dict[str, Test] = {"d": str.isdecimal, "s": str.isspace, "w": _is_word}
_KINDS |= {name.upper(): _inverse(test) for name, test in _KINDS.items()}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
_HEX = {"x": 2, "u": 4, "U": 8}
_EDGES = {"A": "begin", "b": "word", "B": "within"}


class _Reader:
    """One pattern, read from left to right."""

    def __init__(self, pattern: str, param: str):
        self.text, self.at, self.param, self.deep = pattern, 0, param, 0
        self.flags = Flags()

    def refuse(self, what: str, remedy: str | None = None) -> NoReturn:
        shown = self.text if len(self.text) <= 80 else self.text[:80] + "..."
        raise RequestError(f"{shown!r} {what}", where=self.param, param=self.param, remedy=remedy)

    def whole(self) -> Tree:
        if self.text.startswith("(?") and self.text[2:3] in tuple("aimsux"):
            close = self.text.find(")")
            names = self.text[2:close]
            if close < 0 or not set(names) <= set("imsu"):
                self.refuse("has flags that are not i, m or s")
            self.flags = Flags("i" in names, "m" in names, "s" in names)
            self.at = close + 1
        tree = self.either()
        if self.at < len(self.text):
            self.refuse(f"has a ) at {self.at} that closes nothing")
        return tree

    def either(self) -> Tree:
        ways = [self.then()]
        while self.take("|"):
            ways.append(self.then())
        return ways[0] if len(ways) == 1 else Either(tuple(ways))

    def then(self) -> Tree:
        parts: list[Tree] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            part = self.atom()
            if (times := self.times()) is not None:
                part = Times(part, *times)
                if self.times() is not None:
                    self.refuse(f"repeats a repetition at {self.at}", "put the first one into (?:...)")
            parts.append(part)
        return parts[0] if len(parts) == 1 else Then(tuple(parts))

    def take(self, mark: str) -> bool:
        found = self.text.startswith(mark, self.at)
        self.at += len(mark) if found else 0
        return found

    def times(self) -> tuple[int, int | None] | None:
        """(least, most) of a repetition that stands here; None for none. Whether it is lazy does not matter: a text
        ends as soon as it can."""
        c = self.text[self.at : self.at + 1]
        if c in ("*", "+", "?") and c:
            self.at += 1
            found: tuple[int, int | None] = {"*": (0, None), "+": (1, None), "?": (0, 1)}[c]
        elif c == "{" and (counts := self._counts()) is not None:
            found = counts
        else:
            return None
        if self.take("+"):
            self.refuse("has a repetition that gives nothing back, which is another language", "leave out the +")
        self.take("?")
        return found

    def _counts(self) -> tuple[int, int | None] | None:
        close = self.text.find("}", self.at)
        least, comma, most = self.text[self.at + 1 : max(close, 0)].partition(",")
        numbers = [n for n in (least, most) if n]
        if close < 0 or not all(n.isascii() and n.isdigit() for n in numbers) or not (numbers or comma):
            return None  # then { is a character
        self.at = close + 1
        low = int(least or 0)
        high = (int(most) if most else None) if comma else low
        if high is not None and high < low:
            self.refuse(f"has a repetition {{{least},{most}}} of which the most is less than the least")
        return low, high

    def atom(self) -> Tree:
        c = self.text[self.at]
        self.at += 1
        if c == "(":
            return self.group()
        if c == "[":
            return One(self.set())
        if c == ".":
            return One((lambda c: True) if self.flags.dots else (lambda c: c != "\n"))
        if c == "^":
            return Edge("line" if self.flags.lines else "begin")
        if c == "$":
            if not self.flags.lines:
                self.refuse("has a $, where a text is over anyway", "begin it with (?m) where ends of lines are meant")
            return Edge("end")
        if c in "*+?":
            self.refuse(f"repeats nothing at {self.at - 1}")
        if c != "\\":
            return self.one(_literal(c))
        c = self.text[self.at : self.at + 1]
        if c in _EDGES and c:
            self.at += 1
            return Edge(_EDGES[c])
        return self.one(self.escape())

    def one(self, test: Test) -> One:
        return One(_folded(test) if self.flags.ignore else test)

    def group(self) -> Tree:
        if self.text.startswith("?", self.at):
            if self.take("?P<"):
                name, closed, _ = self.text[self.at :].partition(">")
                if not closed or not name.isidentifier():
                    self.refuse(f"has a name at {self.at} that is none")
                self.at += len(name) + 1
            elif not self.take("?:"):
                kind = self.text[self.at : self.at + 3]
                what = f"has a group ({kind} at {self.at - 1}, which cannot be followed in a text that is still coming"
                self.refuse(what, "groups are (...), (?:...) and (?P<name>...)")
        self.deep += 1
        if self.deep > MOST_DEEP:
            self.refuse(f"has more than {MOST_DEEP} groups within each other")
        tree = self.either()
        if not self.take(")"):
            self.refuse("has a ( that is not closed")
        self.deep -= 1
        return tree

    def escape(self) -> Test:
        """What is meant by the characters behind a backslash."""
        c = self.text[self.at : self.at + 1]
        if not c:
            self.refuse("ends in a backslash")
        if c in _KINDS:
            self.at += 1
            return _KINDS[c]
        return _literal(self.char())

    def char(self) -> str:
        c = self.text[self.at]
        self.at += 1
        if c in _CONTROL:
            return _CONTROL[c]
        if c in _HEX:
            n = _HEX[c]
            digits = self.text[self.at : self.at + n]
            if len(digits) < n or not all(d in "0123456789abcdefABCDEF" for d in digits) or int(digits, 16) > 0x10FFFF:
                self.refuse(f"has a \\{c} at {self.at - 2} without {n} hexadecimal digits of a character")
            self.at += n
            return chr(int(digits, 16))
        if c.isascii() and c.isalnum():
            what = "refers to a group" if c.isdigit() else "has no meaning here"
            self.refuse(f"has a \\{c} at {self.at - 2}, which {what}")
        return c

    def set(self) -> Test:
        """The set whose [ has been read."""
        begin, negated, tests = self.at, self.take("^"), []
        first = self.at
        while not (self.text.startswith("]", self.at) and self.at > first):
            if self.at >= len(self.text):
                self.refuse(f"has a [ at {begin - 1} that is not closed")
            one = self._member()
            ranged = self.text.startswith("-", self.at) and self.text[self.at + 1 : self.at + 2] not in ("]", "")
            if not ranged:
                tests.append(_literal(one) if isinstance(one, str) else one)
                continue
            self.at += 1
            last = self._member()
            if not isinstance(one, str) or not isinstance(last, str) or last < one:
                self.refuse(f"has a range at {self.at} without a begin, or an end before it")
            tests.append(_range(one, last))
        self.at += 1
        if self.flags.ignore:
            tests = [_folded(test) for test in tests]
        return _among(tests, negated)

    def _member(self) -> str | Test:
        c = self.text[self.at]
        self.at += 1
        if c != "\\":
            return c
        kind = self.text[self.at : self.at + 1]
        if kind in _KINDS and kind:
            self.at += 1
            return _KINDS[kind]
        if not kind:
            self.refuse("ends in a backslash")
        if kind == "b":
            self.at += 1
            return "\b"
        return self.char()


def _literal(char: str) -> Test:
    return lambda c: c == char


# --- machines ---------------------------------------------------------------------------------------------------------

_CHAR, _SPLIT, _EDGE, _END = range(4)


@dataclass(frozen=True, eq=False)
class Program:
    """A machine that looks for several patterns at once."""

    names: tuple[str, ...]
    """What each pattern is called where it ends a text."""
    op: list[int] = field(default_factory=list)
    """Of each node: a character of a set, two ways, an edge, or the end of a pattern."""
    what: list[object] = field(default_factory=list)
    """The set, nothing, the kind of edge, which pattern"""
    next: list[tuple[int, ...]] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)
    """A node for each pattern."""
    looks: list[bool] = field(default_factory=list)
    """Whether a node wants to know the next character before it is gone through; one entry, if any does."""
    known: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    def node(self, op: int, what: object = None, *next: int) -> int:
        self.op.append(op)
        self.what.append(what)
        self.next.append(next)
        return len(self.op) - 1

    def begins(self, before: str, c: str) -> tuple[int, ...]:
        """Where one stands after the character `c`, of a match that begins with it, behind `before` ("" at the
        text's begin)."""
        found = self.known.get((before, c))
        if found is None:
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            here: dict[int, int] = {}
            for begin in self.begin:
                self.reach(here, begin, 0, before, c)
            after: dict[int, int] = {}
            for node in here:
                if self.op[node] == _CHAR and self.what[node](c):  # pyright: ignore[reportCallIssue]
                    self.reach(after, self.next[node][0], 0, c, None)
            found = self.known[before, c] = tuple(after)
        return found

    def reach(self, into: dict[int, int], node: int, start: int, before: str, c: str | None) -> None:
        """Adds the nodes that are reached without a character, and those on the way; whoever was there first stays.

        Args:
            c: the character that comes, "" at the text's end, None if it is not known yet.
        """
        todo = [node]
        while todo:
            node = todo.pop()
            if node in into:
                continue
            into[node] = start
            op = self.op[node]
            if op == _SPLIT or (op == _EDGE and _holds(self.what[node], before, c)):
                todo += reversed(self.next[node])


def _holds(kind: object, before: str, c: str | None) -> bool:
    """Whether a place is such an edge; what is not known yet does not hold yet."""
    if kind == "begin":
        return before == ""
    if kind == "line":
        return before in ("", "\n")
    if c is None:
        return False
    if kind == "end":
        return c in ("", "\n")
    apart = (before != "" and _is_word(before)) != (c != "" and _is_word(c))
    return apart == (kind == "word")


@lru_cache(maxsize=64)
def program(strings: tuple[str, ...], patterns: tuple[str, ...], param: str = "stop_regex") -> Program:
    """The machine that looks for strings and patterns. Of those that are there at once the first one counts.

    Raises:
        RequestError: there is too much of it, or a pattern cannot be followed, or matches no text at all.
    """
    if len(patterns) > MOST_PATTERNS or sum(map(len, patterns)) > MOST_CHARS:
        what = f"must be at most {MOST_PATTERNS} patterns of {MOST_CHARS} characters together"
        raise RequestError(what, where=param, param=param)
    made = Program((*strings, *patterns))
    for i, string in enumerate(strings):
        node = made.node(_END, i)
        for c in reversed(string):
            node = made.node(_CHAR, _literal(c), node)
        made.begin.append(node)
    free = len(made.op)
    for i, pattern in enumerate(patterns, len(strings)):
        reader = _Reader(pattern, param)
        tree = reader.whole()
        if _nullable(tree):
            reader.refuse("matches no text at all, which is everywhere", "let it match a character at least")
        if sum(_sizes(tree)) + len(made.op) - free + 1 > MOST_NODES:
            reader.refuse(f"makes more than {MOST_NODES} nodes, all patterns together", "repeat less, or say less")
        made.begin.append(_add(made, tree, made.node(_END, i)))
    if any(op == _EDGE and what in ("end", "word", "within") for op, what in zip(made.op, made.what, strict=True)):
        made.looks.append(True)
    return made


def _nullable(tree: Tree) -> bool:
    match tree:
        case One():
            return False
        case Edge():
            return True
        case Then(parts):
            return all(map(_nullable, parts))
        case Either(parts):
            return any(map(_nullable, parts))
        case Times(part, least, _):
            return least == 0 or _nullable(part)


def _sizes(tree: Tree) -> Iterator[int]:
    """Numbers that add up to the nodes of the tree, which need not be made for that."""
    match tree:
        case One() | Edge():
            yield 1
        case Then(parts):
            for part in parts:
                yield from _sizes(part)
        case Either(parts):
            yield len(parts) - 1
            for part in parts:
                yield from _sizes(part)
        case Times(part, least, most):
            size = sum(_sizes(part))
            yield size * (least + 1) + 1 if most is None else size * most + most - least


def _add(made: Program, tree: Tree, after: int) -> int:
    """Adds a tree before the node `after`; its first node."""
    match tree:
        case One(test):
            return made.node(_CHAR, test, after)
        case Edge(kind):
            return made.node(_EDGE, kind, after)
        case Then(parts):
            for part in reversed(parts):
                after = _add(made, part, after)
            return after
        case Either(parts):
            ways = [_add(made, part, after) for part in parts]
            while len(ways) > 1:
                ways[-2:] = [made.node(_SPLIT, None, ways[-2], ways[-1])]
            return ways[0]
        case Times(part, least, most):
            if most is None:
                loop = made.node(_SPLIT, None)
                made.next[loop] = (_add(made, part, loop), after)
                after = loop
            else:
                behind = after
                for _ in range(most - least):
                    after = made.node(_SPLIT, None, _add(made, part, after), behind)
            for _ in range(least):
                after = _add(made, part, after)
            return after


# --- in a text --------------------------------------------------------------------------------------------------------


@dataclass
class PatternScan:
    """Finds the pattern that completes first in text that comes in pieces, as `text.StopScan` does for strings alone.

    Held back is the text from the leftmost character on with which a match may have begun; with `include` none is,
    because what is shown ends where the match does.
    """

    program: Program
    include: bool = False
    """Keep the match in the text."""
    _live: dict[int, int] = field(default_factory=dict)
    """Node -> where the match began that stands there, in characters of the text; those further left come first."""
    _before: str = ""
    """The last character."""
    _counted: bool = True
    """Whether matches that end behind it count."""
    _at: int = 0
    """Characters so far."""
    _held: str = ""
    """The last of them."""

    @property
    def stops(self) -> tuple[str, ...]:
        return self.program.names

    def feed(self, text: str, count: bool = True) -> tuple[str, str | None]:
        """(text that may be shown, name of the pattern or None). After a match the scan is over and the rest is
        dropped.

        Args:
            count: False: matches that end within this text do not stop it (one that ends later does).
        """
        made, live, before, at = self.program, self._live, self._before, self._at
        op, what, next, looks = made.op, made.what, made.next, bool(made.looks)
        offset = at - len(self._held)
        whole = self._held + text
        for c in text:
            begun = made.begins(before, c)
            if not live and not begun:
                before, at, self._counted = c, at + 1, count
                continue
            if looks and live and (stop := self._look(live, before, c)) is not None:
                return self._stopped(whole, offset, stop, at)
            after: dict[int, int] = {}
            for node, start in live.items():
                if op[node] == _CHAR and what[node](c):  # pyright: ignore[reportCallIssue]
                    then = next[node][0]
                    if op[then] == _CHAR:
                        after.setdefault(then, start)
                    else:
                        made.reach(after, then, start, c, None)
            for node in begun:
                after.setdefault(node, at)
            before, at, live, self._counted = c, at + 1, after, count
            if count and (stop := self._ended(live)) is not None and not (looks and self._waits(live)):
                return self._stopped(whole, offset, stop, at)
        self._live, self._before, self._at = live, before, at
        keep = at if self.include or not live else next_of(live)
        self._held = whole[keep - offset :]
        return whole[: keep - offset], None

    def flush(self) -> tuple[str, str | None]:
        """(the text still held back, name of a pattern that the text's end completes); the scan is over."""
        whole, offset = self._held, self._at - len(self._held)
        if self.program.looks and (stop := self._look(self._live, self._before, "")) is not None:
            return self._stopped(whole, offset, stop, self._at)
        self._held = ""
        return whole, None

    def _look(self, live: dict[int, int], before: str, c: str) -> tuple[int, int] | None:
        """Goes through edges that are known now; (pattern, begin) of a match that ends here, before `c`."""
        if not self._waits(live):
            return None
        again: dict[int, int] = {}
        for node, start in live.items():
            self.program.reach(again, node, start, before, c)
        found = self._ended(again) if self._counted else None
        live.clear()
        live.update(again)
        return found

    def _waits(self, live: dict[int, int]) -> bool:
        """Whether somebody wants to know the next character, who may have the better right to the same end."""
        return any([self.program.op[node] == _EDGE for node in live])

    def _ended(self, live: dict[int, int]) -> tuple[int, int] | None:
        """(pattern, begin) of the first pattern whose end has been reached."""
        op, what = self.program.op, self.program.what
        ends = [(what[node], start) for node, start in live.items() if op[node] == _END]
        return min(ends) if ends else None  # pyright: ignore[reportReturnType]

    def _stopped(self, whole: str, offset: int, stop: tuple[int, int], at: int) -> tuple[str, str]:
        """The text before the match that ends at `at`, or with it."""
        pattern, start = stop
        self._held = ""
        return whole[: (at if self.include else start) - offset], self.program.names[pattern]


def next_of(live: dict[int, int]) -> int:
    """The leftmost begin of what is on its way."""
    return next(iter(live.values()))
