"""How many tokens to draft next, from what drafts have brought and cost so far. Values and two functions: `pick` and
`observe`.

The rule: k is the number of draft tokens with the most expected tokens per second,

                     1 + y (a1 + a1 a2 + ... + a1..ak)
    value(k) = -----------------------------------------------,        value(0) = 1 / step(1)
               draft(k) + y step(k + 1) + (1 - y) step(1)

where a_i is the acceptance of position i given that all before it were accepted, y the share of askings that brought
any draft, step(n) the seconds of a target's step of n tokens, and draft(k) those of proposing. All are measured as
they happen. Where even the best k is worth less than plain decoding (by more than `MARGIN`), drafting rests until what
the last try cost is less than `SHARE` of the time since; then the proposer is asked again. So tries that fail cost a
known share of the whole, however dear one of them is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

DECAY = 0.95
"""Of counts at each new one: the last 20 matter."""
WINDOW = 8
"""Times of a size that are kept; the least of them counts, because other work on a machine only ever adds."""
WARM = 3
"""Times before a size counts as measured: the first ones of a size compile, record or capture it."""
MARGIN = 1.01
"""Plain decoding has to be better by this: lookups that cost nearly nothing are not given up for finding nothing."""
SHARE = 1 / 128
"""Of the time that passes, what tries that fail may take."""
FIRST_WAIT, LAST_WAIT = 16, 256
"""Rounds of the rest after a try that brought something, though not enough, and of the longest one."""
SILENT = 0.25
"""Askings that brought a draft, believed before anything was asked: who is silent 8 times in a row is taken to bring
one in 28 times."""
PROBE_WEIGHT = 4.0
"""Earlier tries that a probe counts against: times change, that is why one probes. With 2, a failed one was followed by
three more."""
PLAIN_EVERY = 128
"""A plain step is taken after so many speculative ones, lest its time be forgotten while contexts grow."""

Times = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Pace:
    """What is known about one sequence's drafts."""

    most: int
    tried: tuple[float, ...]
    """By position, decayed; taken likewise."""
    taken: tuple[float, ...]
    steps: Times
    """Seconds of steps by number of tokens less one, the last `WINDOW` of each size."""
    drafts: Times
    """Seconds of proposing, by k; k = 0 takes none, so that what was not tried lies on a line from there."""
    asked: float = 0.0
    """Askings, decayed; brought: those that brought a draft."""
    brought: float = 0.0
    rest: int = -1
    """Rounds left without drafts; 0: one is due, to see whether times have changed; -1: drafting goes on."""
    wait: int = FIRST_WAIT
    """Length of the next rest, from what the last try cost."""
    since_plain: int = 0
    prior: float = 0.5
    """Acceptance that is believed of what was never tried."""

    @property
    def unsure(self) -> bool:
        """Whether a plain step has to be timed before anything can be said."""
        return len(self.steps[0]) < WARM or self.since_plain >= PLAIN_EVERY

    @classmethod
    def of(cls, most: int) -> Pace:
        """Nothing is known yet."""
        return cls(most, (0.0,) * most, (0.0,) * most, ((),) * (most + 1), ((0.0,) * WARM, *((),) * most))


def pick(pace: Pace, room: int) -> int:
    """Draft tokens to ask for, at most `room`."""
    most = min(pace.most, room)
    if most < 1 or pace.rest > 0 or pace.unsure:
        return 0
    best, worth = max(enumerate(values(pace, most), start=1), key=lambda kv: kv[1])
    return best if pace.rest == 0 or worth * MARGIN >= 1 / min(pace.steps[0]) else 0


def values(pace: Pace, most: int) -> Iterator[float]:
    """Expected tokens per second with k = 1, 2, ..., most."""
    y = (pace.brought + SILENT) / (pace.asked + SILENT)
    plain, expected, chain, before = min(pace.steps[0]), 1.0, 1.0, pace.prior
    for k in range(1, most + 1):
        # A position that was seldom reached is believed to be like the one before it.
        before = (pace.taken[k - 1] + before) / (pace.tried[k - 1] + 1)
        chain *= before
        expected += y * chain
        yield expected / (_seconds(pace.drafts, k) + y * _seconds(pace.steps, k) + (1 - y) * plain)


def _seconds(times: Times, i: int) -> float:
    """Seconds of size i, from sizes that were measured: between them on a line, beyond them as the nearest. So what
    was never tried looks cheap, and is tried."""
    known = [(j, min(t)) for j, t in enumerate(times) if len(t) >= WARM]
    below, above = [p for p in known if p[0] <= i], [p for p in known if p[0] >= i]
    if below and above:
        (j, a), (m, b) = below[-1], above[0]
        return a if m == j else a + (b - a) * (i - j) / (m - j)
    return (below[-1] if below else above[0])[1] if known else 0.0


def observe(
    pace: Pace,
    asked: int,
    proposed: int,
    accepted: int,
    proposing: float,
    verifying: float,
    *,
    tried: int | None = None,
) -> Pace:
    """The pace after a round in which `asked` tokens were asked for and `proposed` came.

    Of a tree, tokens are counted as levels; `tried` are those that the target reached, which need not be all: a way
    may end above the deepest leaf.
    """
    if pace.rest > WINDOW:
        return replace(pace, rest=pace.rest - 1)  # the many rounds of a rest cost nearly nothing
    steps = noted(pace.steps, proposed, verifying)
    since = 0 if proposed == 0 else pace.since_plain + 1
    if not asked:
        rest = pace.rest if pace.unsure else pace.wait if pace.rest < 0 else pace.rest - 1
        return replace(pace, steps=steps, since_plain=since, rest=max(rest, -1))
    probe = pace.rest == 0
    scale = min(1.0, PROBE_WEIGHT / max(pace.tried[0], 1e-9)) if probe and proposed else 1.0
    seen, taken = [scale * t for t in pace.tried], [scale * t for t in pace.taken]
    share = min(1.0, PROBE_WEIGHT / max(pace.asked, 1e-9)) if probe else DECAY
    for i in range(min(accepted + 1, proposed) if tried is None else tried):
        seen[i] = DECAY * seen[i] + 1
        taken[i] = DECAY * taken[i] + (i < accepted)
    drafts = noted(pace.drafts, asked, proposing)
    cost = min(drafts[asked]) + min(steps[proposed]) - min(steps[0], default=verifying)
    wait = FIRST_WAIT if accepted else rest_after(cost, steps[0])
    return replace(
        pace,
        tried=tuple(seen),
        taken=tuple(taken),
        steps=steps,
        drafts=drafts,
        asked=share * pace.asked + 1,
        brought=share * pace.brought + (proposed > 0),
        # A try that brings nothing is not followed by others that have to bring the counts down again.
        rest=wait if probe and not accepted and cost > 0 else -1,
        wait=wait,
        since_plain=since,
    )


def rested(pace: Pace) -> Pace:
    """The pace when a rest is over: the next round is a try."""
    return replace(pace, rest=0)


def passed(pace: Pace, rounds: int, asked: int, proposing: float) -> Pace:
    """The pace after so many rounds in which `asked` tokens were asked for and none came, of which the quickest took
    `proposing`: what `observe` gives one by one, as to what can be expected."""
    kept, drafts = DECAY**rounds, pace.drafts
    for _ in range(min(rounds, WARM)):
        drafts = noted(drafts, asked, proposing)
    return replace(
        pace,
        asked=kept * pace.asked + (1 - kept) / (1 - DECAY),
        brought=kept * pace.brought,
        drafts=drafts,
        rest=-1,
        wait=rest_after(rounds * proposing, pace.steps[0]),
        since_plain=0,
    )


def rest_after(cost: float, plain: tuple[float, ...]) -> int:
    """Rounds in which a try that cost so many seconds becomes `SHARE` of the time; `plain`: seconds of plain steps."""
    if not plain or cost <= 0:
        return FIRST_WAIT
    return max(1, min(LAST_WAIT, math.ceil(cost / (SHARE * min(plain)))))


def resumed(pace: Pace, earlier: Pace) -> Pace:
    """A pace for another text that begins with what an earlier text's taught, believed as far as `PROBE_WEIGHT` tries
    go; where that one rested, a try is due."""
    if earlier.most != pace.most:
        return pace
    scale = min(1.0, PROBE_WEIGHT / max(earlier.tried[0], 1e-9))
    share = min(1.0, PROBE_WEIGHT / max(earlier.asked, 1e-9))
    return replace(
        pace,
        tried=tuple(scale * t for t in earlier.tried),
        taken=tuple(scale * t for t in earlier.taken),
        drafts=earlier.drafts,
        asked=share * earlier.asked,
        brought=share * earlier.brought,
        rest=min(earlier.rest, 0),
        wait=earlier.wait,
    )


def noted(times: Times, i: int, seconds: float) -> Times:
    """The times with one more of size i."""
    return (*times[:i], (*times[i], seconds)[-WINDOW:], *times[i + 1 :])
