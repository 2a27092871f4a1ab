"""What followed the longest end of the text that stands in it earlier, however long, found in O(1) a new token.

A suffix automaton is built as tokens come. After each one, the link of its last state is the longest suffix that
occurs earlier; the place is noted, so a proposal is a look into two lists, and the state after any number of tokens
can be asked again.
Source: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text". On drafting with it: Hu et
al. 2024, "SAM Decoding".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fnengine.decoding.ngram import following
from fnengine.decoding.speculate import Draft, Drawing, Text, grown, text


class Automaton:
    """Every substring of the tokens pushed so far. Only grows: what was noted for a token stays."""

    __slots__ = ("end", "last", "length", "link", "match", "next", "where")

    def __init__(self, tokens: Iterable[int] = ()):
        self.next: list[dict[int, int]] = [{}]
        """By state: token -> state. State 0 is the empty string."""
        self.link, self.length, self.end = [-1], [0], [-1]
        """By state: the state of its longest proper suffix with other occurrences; longest string; an end of one."""
        self.last = 0
        self.match: list[int] = []
        """By token: length of the longest suffix up to it that occurs earlier; `where`: an end of that occurrence."""
        self.where: list[int] = []
        for t in tokens:
            self.push(t)

    def push(self, token: int) -> None:
        """One token more."""
        i, next, link, length = len(self.match), self.next, self.link, self.length
        new = self._state({}, 0, length[self.last] + 1, i)
        at = self.last
        while at != -1 and token not in next[at]:
            next[at][token] = new
            at = link[at]
        if at != -1:
            to = next[at][token]
            if length[at] + 1 != length[to]:
                copy = self._state(dict(next[to]), link[to], length[at] + 1, self.end[to])
                link[to] = copy
                while at != -1 and next[at].get(token) == to:
                    next[at][token] = copy
                    at = link[at]
                to = copy
            link[new] = to
        self.last = new
        longest = link[new]
        self.match.append(length[longest])
        self.where.append(self.end[longest])
        self.end[longest] = i  # so the next one who ends here finds a later place than the first

    def _state(self, next: dict[int, int], link: int, length: int, end: int) -> int:
        self.next.append(next)
        self.link.append(link)
        self.length.append(length)
        self.end.append(end)
        return len(self.next) - 1


@dataclass(frozen=True)
class Seen:
    """A text and the automaton of it, or of a text that begins with it."""

    text: Text
    automaton: Automaton


@dataclass(frozen=True)
class Suffix:
    """Proposes where the match has at least `shortest` tokens."""

    shortest: int = 2

    def start(self, tokens: Sequence[int], how: Drawing) -> Seen:
        return Seen(text(tokens), Automaton(tokens))

    def propose(self, state: Seen, k: int) -> Draft:
        i = state.text.length - 1
        if i < 0 or state.automaton.match[i] < self.shortest:
            return Draft(())
        return Draft(following(state.text.ids, state.automaton.where[i], k))

    def advance(self, state: Seen, tokens: Sequence[int]) -> Seen:
        ids, automaton = state.text.ids, state.automaton
        if len(automaton.match) != len(ids):  # it went on with another text; this one gets its own
            automaton = Automaton(ids.tolist())
        for t in tokens:
            automaton.push(int(t))
        return Seen(grown(state.text, tokens), automaton)
