"""The workloads, over anything that turns prompts into tokens. Torch-free.

    W1  `prompt` tokens in, `new` out, c requests at once     output tokens/s; prefill and decode apart
    W2  `long` tokens in, 1 out, one at a time                time to first token
    W3  `sharers` requests with a common prefix               seconds for all

Token ids are random and never repeat between runs, so no cache helps except where a prefix is shared on purpose.
Sides (engines) take turns within every repeat, A B A B, so that a machine that drifts drifts for both.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Tokens = list[int]


@dataclass(frozen=True)
class Sizes:
    prompt: int = 128
    new: int = 128
    long: int = 512
    prefix: int = 512
    own: int = 32
    sharers: int = 32
    short: int = 32
    """Output tokens of W3."""

    def divided(self, by: int) -> Sizes:
        """Smaller sizes, to try a script; the figures then mean nothing. Sharers and outputs stay at least 2."""
        return Sizes(*(max(2, getattr(self, name) // by) for name in self.__dataclass_fields__))

    @property
    def longest(self) -> int:
        return max(self.prompt + self.new, self.long + 1, self.prefix + self.own + self.short)


@dataclass(frozen=True)
class Timed:
    """One batch of requests, from the first submitted to the last finished."""

    seconds: float
    tokens: list[Tokens]
    facts: dict[str, Any] = field(default_factory=dict)


class Side(Protocol):
    """An engine under measurement."""

    name: str

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        """`new` greedy tokens for every prompt, all requests at once, end of sequence ignored."""
        ...


@dataclass(frozen=True)
class Measured:
    """One workload on one side."""

    workload: str
    """w1, w2 or w3"""
    side: str
    rows: int
    prompt: int
    new: int
    seconds: list[float]
    """One a repeat: all requests, prefill included."""
    prefill: list[float]
    """One a repeat: the same number of fresh prompts with one token out. For W2 and W3 empty."""
    facts: list[dict[str, Any]] = field(default_factory=list)
    """One a repeat: what the side says about its run."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def output_rate(self) -> float:
        """Output tokens a second."""
        return self.rows * self.new / self.median

    @property
    def prefill_seconds(self) -> float | None:
        return statistics.median(self.prefill) if self.prefill else None

    @property
    def step_seconds(self) -> float | None:
        """Time of a decode step: what `new` tokens took longer than one, by token."""
        if not self.prefill or self.new < 2:
            return None
        return statistics.median(a - b for a, b in zip(self.seconds, self.prefill, strict=True)) / (self.new - 1)


class Prompts:
    """Random prompts that never repeat, the same for every side that asks under the same name."""

    def __init__(self, vocab: int, seed: int = 0):
        self.vocab, self.seed = vocab, seed

    def one(self, length: int, *name: object) -> Tokens:
        draw = random.Random(f"{self.seed}/{'/'.join(map(str, name))}")
        # The first ids of a vocabulary are often special tokens.
        low = min(16, self.vocab // 4)
        return [draw.randrange(low, self.vocab) for _ in range(length)]

    def many(self, rows: int, length: int, *name: object) -> list[Tokens]:
        return [self.one(length, *name, i) for i in range(rows)]

    def sharing(self, rows: int, prefix: int, own: int, *name: object) -> list[Tokens]:
        common = self.one(prefix, *name, "prefix")
        return [common + self.one(own, *name, i) for i in range(rows)]


def checked(timed: Timed, rows: int, new: int) -> Timed:
    """The same, after asserting that every request got exactly `new` tokens."""
    lengths = [len(t) for t in timed.tokens]
    assert lengths == [new] * rows, f"{rows} requests of {new} tokens wanted, got lengths {sorted(set(lengths))}"
    return timed


def w1(sides: Sequence[Side], prompts: Prompts, sizes: Sizes, rows: int, repeats: int) -> list[Measured]:
    """`rows` requests at once; each repeat times fresh prompts with one token out, then with all."""
    for side in sides:
        side.run(prompts.many(rows, sizes.prompt, "w1", rows, "warm"), min(4, sizes.new))
    seconds, prefill, facts = _lists(sides), _lists(sides), _lists(sides)
    for side, repeat in turns(sides, repeats):
        first = prompts.many(rows, sizes.prompt, "w1", rows, repeat, "first")
        whole = prompts.many(rows, sizes.prompt, "w1", rows, repeat, "whole")
        prefill[side.name].append(checked(side.run(first, 1), rows, 1).seconds)
        timed = checked(side.run(whole, sizes.new), rows, sizes.new)
        seconds[side.name].append(timed.seconds)
        facts[side.name].append(timed.facts)
    return [
        Measured("w1", s.name, rows, sizes.prompt, sizes.new, seconds[s.name], prefill[s.name], facts[s.name])
        for s in sides
    ]


def w2(sides: Sequence[Side], prompts: Prompts, sizes: Sizes, repeats: int) -> list[Measured]:
    """One long prompt after another, one token out."""
    for side in sides:
        side.run(prompts.many(1, sizes.long, "w2", "warm"), 1)
    seconds, facts = _lists(sides), _lists(sides)
    for side, repeat in turns(sides, repeats):
        timed = checked(side.run(prompts.many(1, sizes.long, "w2", repeat), 1), 1, 1)
        seconds[side.name].append(timed.seconds)
        facts[side.name].append(timed.facts)
    return [Measured("w2", s.name, 1, sizes.long, 1, seconds[s.name], [], facts[s.name]) for s in sides]


def w3(sides: Sequence[Side], prompts: Prompts, sizes: Sizes, repeats: int) -> list[Measured]:
    """`sharers` requests that arrive together with a common prefix, fresh in every repeat."""
    rows, new = sizes.sharers, sizes.short
    for side in sides:
        side.run(prompts.sharing(2, sizes.prefix, sizes.own, "w3", "warm"), min(4, new))
    seconds, facts = _lists(sides), _lists(sides)
    for side, repeat in turns(sides, repeats):
        timed = checked(side.run(prompts.sharing(rows, sizes.prefix, sizes.own, "w3", repeat), new), rows, new)
        seconds[side.name].append(timed.seconds)
        facts[side.name].append(timed.facts)
    length = sizes.prefix + sizes.own
    return [Measured("w3", s.name, rows, length, new, seconds[s.name], [], facts[s.name]) for s in sides]


def turns(sides: Sequence[Side], repeats: int) -> Iterator[tuple[Side, int]]:
    """A, B, A, B, ...: every side once a repeat."""
    for repeat in range(repeats):
        for side in sides:
            yield side, repeat


def ratios(ours: Measured, theirs: Measured) -> list[float]:
    """How many times as fast ours was, repeat by repeat: their seconds over ours."""
    return [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]


def batched_equals_alone(side: Side, prompts: Prompts, sizes: Sizes, rows: int) -> bool:
    """Whether a request gets the same tokens among `rows` others as by itself: the engine's own promise."""
    many = prompts.many(rows, sizes.prompt, "check", rows)
    together = side.run(many, sizes.new).tokens
    return all(side.run([many[i]], sizes.new).tokens[0] == together[i] for i in {0, rows // 2, rows - 1})


def agreement(a: Sequence[Tokens], b: Sequence[Tokens]) -> float:
    """Share of requests whose tokens are the same in both."""
    assert len(a) == len(b)
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between neighbours."""
    assert values
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _lists(sides: Sequence[Side]) -> dict[str, list[Any]]:
    return {side.name: [] for side in sides}
