"""The ladder with the smallest expected step time under a budget, and how far from the best it can be.

Given are counts of steps by (T, R), the seconds of a captured bucket and of an eager step, what a graph weighs and how
long its capture takes. Wanted is a set of buckets that keeps the budget and minimises

    sum over steps of n * (captured(ladder.fit(T, R)), or eager(T, R) where nothing fits)

This is a facility location problem (buckets are facilities, steps their clients) in which the client does not choose:
`Ladder.fit` takes the first bucket that holds a step, in order of tokens and then rows. In two dimensions its like is
known as the assortment problem (Page 1975, Beasley 1985); in one it is solved by dynamic programming (Frank 1965).

Proved, not proved:

- **Chains.** A set of buckets is a chain when each holds all the steps that the one before it holds. The best chain is
  the best path through a graph whose edges are pairs of nested buckets, with the budgets as its resources; it is found
  exactly by labels, cut by a Lagrangian bound on what a path can still gain (Dumitrescu and Boland 2003). All sets of
  decode buckets (n, n) are chains, so for steps of a token a row the result is the optimum, proved. Should that take
  more than `LABELS` labels, the result says that it is not proved.
- **Any set.** Of a good chain (the best path of all that the Lagrangian met), two greedy sets and the default ladder
  the two best are taken, and single additions, removals and exchanges made while they help. The result is a local
  optimum, never worse than any of the four, so never worse than the default ladder where that keeps the budget. No
  factor is proved for it: fit's order makes the gain of a set neither monotone nor submodular.
- **A bound.** `Tuned.bound` is below every ladder made of the candidates: the Lagrangian bound of the plain facility
  location problem (Cornuejols, Fisher, Nemhauser 1977), whose clients may choose the cheapest bucket. So each result
  comes with its own proof of how far from the optimum it can be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from fnengine.graphs.bucket import LEAST, Bucket
from fnengine.graphs.cost import Shape
from fnengine.graphs.ladder import Ladder, holds

LABELS = 200_000
"""Most partial chains looked at: a few seconds."""
TOKEN_SIZES, ROW_SIZES = 40, 8
"""Most sizes among which candidates for mixed steps are looked for."""


@dataclass(frozen=True)
class Costs:
    """What a graph saves and what it takes. Every function is pure."""

    captured: Callable[[Bucket], float]
    """Seconds of a step that is replayed in the bucket."""
    eager: Callable[[int, int], float]
    """Seconds of a step of (T, R) without a graph."""
    bytes: Callable[[Bucket], float] = lambda b: 0.0
    capture: Callable[[Bucket], float] = lambda b: 0.0
    """Seconds of start-up."""


@dataclass(frozen=True)
class Budget:
    """What all graphs together may take; None is no limit."""

    graphs: int | None = None
    bytes: float | None = None
    seconds: float | None = None
    """Of capture."""

    def keeps(self, ladder: Ladder, costs: Costs) -> bool:
        """Whether a ladder is within it."""
        return bool((self._used(ladder.buckets, costs) <= self._limits() + 1e-9).all())

    def _limits(self) -> np.ndarray:
        return np.array([np.inf if x is None else x for x in (self.graphs, self.bytes, self.seconds)], float)

    def _used(self, buckets: tuple[Bucket, ...], costs: Costs) -> np.ndarray:
        each = [(1.0, costs.bytes(b), costs.capture(b)) for b in buckets]
        return np.array(each, float).reshape(-1, 3).sum(0)


@dataclass(frozen=True)
class Tuned:
    """A ladder and what it is expected to give, in mean seconds of a step."""

    ladder: Ladder
    expected: float
    default: float | None
    """With the ladder it was to beat."""
    none: float
    """With every step eager."""
    bound: float
    """No ladder of these candidates within this budget has a smaller mean."""
    proved: bool
    """The ladder is the best of these candidates."""
    candidates: int
    method: str
    """What found it."""


def expected(counts: Mapping[Shape, float], ladder: Ladder | None, costs: Costs) -> float:
    """Mean seconds of a step; None is no ladder."""
    total = 0.0
    for (t, r), n in counts.items():
        b = None if ladder is None else ladder.fit(t, r)
        total += n * (costs.eager(t, r) if b is None else costs.captured(b))
    return total / (sum(counts.values()) or 1)


# --- candidates -------------------------------------------------------------------------------------------------------


def candidates(counts: Mapping[Shape, float], also: Ladder | None = None) -> tuple[Bucket, ...]:
    """Buckets worth looking at: every decode size that was seen, products of token and row sizes, and those of `also`.

    There is always a best set of decode buckets whose sizes were all seen, if costs grow with size: a bucket may shrink
    to the largest step that it holds. The same holds for mixed ones; there sizes are thinned out, if they are many, to
    those that pad the fewest tokens.
    """
    line = {max(t, LEAST) for t, r in counts if t == r}
    found = {Bucket(n, n) for n in line}
    mixed = {s: n for s, n in counts.items() if s[0] != s[1]}
    if mixed:
        by_tokens: dict[int, float] = {}
        by_rows: dict[int, float] = {}
        for (t, r), n in mixed.items():
            by_tokens[t] = by_tokens.get(t, 0) + n
            by_rows[r] = by_rows.get(r, 0) + n * t
        for t in thinned(by_tokens, TOKEN_SIZES):
            for r in thinned(by_rows, ROW_SIZES):
                found |= {Bucket(t, max(rows, LEAST)) for rows in (r, r + 1) if t >= max(rows, LEAST)}
    found |= set(() if also is None else also.buckets)
    return Ladder(tuple(found)).buckets


def thinned(weights: Mapping[int, float], most: int) -> tuple[int, ...]:
    """At most so many of the sizes, the largest among them, chosen so that rounding up to them adds the least.

    Exact, by dynamic programming over the sizes; of more than 1000 sizes every k-th is looked at.
    """
    sizes = sorted(weights)
    if len(sizes) <= most:
        return tuple(sizes)
    seen = np.array(sizes)
    tops = seen[:: -(-len(sizes) // 1000)] if len(sizes) > 1000 else seen
    tops = np.unique(np.append(tops, seen[-1]))
    w = np.zeros(len(tops))
    np.add.at(w, np.searchsorted(tops, seen), [weights[s] for s in sizes])
    below = np.concatenate([[0.0], np.cumsum(w)])
    # cost[j, k]: what stands above size j - 1 and up to size k, rounded up to k. The unpadded sum is the same for all.
    cost = (below[None, 1:] - below[:-1, None]) * tops[None, :]
    cost[np.tril_indices(len(tops), -1)] = np.inf
    best, choice = cost[0], []
    for _ in range(most - 1):
        step = best[:-1, None] + cost[1:, :]
        at = step.argmin(0)
        choice.append(at)
        best = step[at, np.arange(len(tops))]
    k, picked = len(tops) - 1, [len(tops) - 1]
    for at in reversed(choice):
        k = int(at[k])
        picked.append(k)
    return tuple(int(tops[k]) for k in sorted(set(picked)))


def widened(
    counts: Mapping[Shape, float], ladder: Ladder, *, budget: int, rows: int, spread: float, share: float = 0.01
) -> dict[Shape, float]:
    """Counts as a longer trace might have them.

    A small `share` goes to shapes that were perhaps missed: every decode size up to `rows`, and the largest step of
    every mixed bucket of the ladder. Budget that nothing else needs is then spent on them. Of the weight of mixed
    steps, `spread` goes to shapes nearby, for their sizes hardly come twice: log-normal around each, as wide as the
    rule of thumb for densities says (Silverman 1986: deviation times n^(-1/5)). Steps that fill the budget stay.
    """
    out = {s: float(n) for s, n in counts.items()}
    mixed = [(s, n) for s, n in counts.items() if s[0] > s[1]]
    if spread and mixed:
        weight = np.array([n for _, n in mixed], float)
        logs = np.log([s for s, _ in mixed])
        mean = (weight[:, None] * logs).sum(0) / weight.sum()
        width = np.sqrt((weight[:, None] * (logs - mean) ** 2).sum(0) / weight.sum()) * weight.sum() ** -0.2
        z = [NormalDist().inv_cdf((k + 0.5) / _POINTS) for k in range(_POINTS)]
        for (t, r), n in mixed:
            if t >= budget:
                continue
            out[t, r] -= spread * n
            for k in range(_POINTS):
                r2 = min(max(round(r * math.exp(width[1] * z[k * 4 % _POINTS])), 1), rows)
                t2 = min(max(round(t * math.exp(width[0] * z[k])), r2 + 1), budget)
                out[t2, r2] = out.get((t2, r2), 0.0) + spread * n / _POINTS
    unseen = [(n, n) for n in range(1, rows + 1)]
    unseen += [(b.tokens, b.rows - 1) for b in ladder.buckets if b.tokens > b.rows > 1]
    each = share * sum(counts.values()) / max(len(unseen), 1)
    for s in unseen:
        out[s] = out.get(s, 0.0) + each
    return {s: n for s, n in out.items() if n > 1e-12}


SPREADS = (0.0, 0.5)
"""That are tried. Over six synthetic traces they differed by less than 0.1 % of the step time, 1.0 from 0.5 by less."""
_POINTS = 9
"""For each step; odd, and no multiple of the 4 that pairs token sizes with row sizes."""


def foresee(
    steps: Sequence[Shape], costs: Costs, budget: Budget, default: Ladder, *, tokens: int, rows: int
) -> tuple[Tuned, float]:
    """(ladder for steps like these, the spread it was tuned with).

    The spread is the one with which the first half of the steps gives the best ladder for the second; then all steps
    are tuned for. `Tuned.expected` and `bound` are of the widened counts.

    Args:
        steps: shapes in the order in which they ran.
        tokens, rows: most of a step.
    """
    sizes = {"budget": tokens, "rows": rows}
    halves = Counter(steps[: len(steps) // 2]), Counter(steps[len(steps) // 2 :])
    scores = {}
    if halves[0] and any(t > r for t, r in halves[1]):
        for spread in SPREADS:
            tried = tune(widened(halves[0], default, spread=spread, **sizes), costs, budget, default=default)
            scores[spread] = expected(halves[1], tried.ladder, costs)
    best = min(scores, key=lambda spread: scores[spread], default=0.0)
    return tune(widened(Counter(steps), default, spread=best, **sizes), costs, budget, default=default), best


# --- the problem as arrays --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """Candidates by classes of steps that the same candidates hold. A choice is a mask [B]."""

    buckets: tuple[Bucket, ...]
    held: np.ndarray
    """[B, S] bool"""
    n: np.ndarray
    """[S] steps in a class"""
    eager: np.ndarray
    """[S] seconds of all its steps without a graph"""
    cost: np.ndarray
    """[B] seconds of a step in the bucket"""
    takes: np.ndarray
    """[B, 3] graphs, bytes, capture seconds"""
    limits: np.ndarray
    """[3]"""
    weight: np.ndarray = field(init=False)
    """[B, S] `held` as float64"""

    def __post_init__(self):
        object.__setattr__(self, "weight", self.held.astype(float))

    def first(self, chosen: np.ndarray) -> np.ndarray:
        """[S] index of the bucket that each class runs in, B for none."""
        at = np.flatnonzero(chosen)
        if not len(at):
            return np.full(len(self.n), len(self.buckets))
        held = self.held[at]
        return np.where(held.any(0), at[held.argmax(0)], len(self.buckets))

    def paid(self, first: np.ndarray) -> np.ndarray:
        """[S] seconds of all steps of each class."""
        costs = np.append(self.cost, 0.0)[first] * self.n
        return np.where(first == len(self.buckets), self.eager, costs)

    def total(self, chosen: np.ndarray) -> float:
        return float(self.paid(self.first(chosen)).sum())

    def used(self, chosen: np.ndarray) -> np.ndarray:
        return self.takes[chosen].sum(0)

    def fits(self, chosen: np.ndarray) -> bool:
        return bool((self.used(chosen) <= self.limits + 1e-9).all())

    def gains(self, chosen: np.ndarray) -> np.ndarray:
        """[B] seconds saved by adding each bucket; below 0 where fit's order makes it a loss."""
        first = self.first(chosen)
        earlier = np.arange(len(self.buckets))[:, None] < first[None, :]
        mine = self.weight * earlier
        return mine @ self.paid(first) - self.cost * (mine @ self.n)


def _problem(
    counts: Mapping[Shape, float], buckets: tuple[Bucket, ...], costs: Costs, budget: Budget, keep: frozenset[Bucket]
) -> _Problem:
    steps = [(s, n) for s, n in counts.items() if n > 0]
    t, r = (np.array([s[i] for s, _ in steps], int) for i in (0, 1))
    n = np.array([n for _, n in steps], float)
    eager = np.array([n * costs.eager(*s) for s, n in steps], float)
    T, R = (np.array([getattr(b, x) for b in buckets], int)[:, None] for x in ("tokens", "rows"))
    held = (t <= T) & (r + (t < T) <= R)
    assert len(steps) > 500 or all(
        held[i, j] == holds(b, *s) for i, b in enumerate(buckets[:50]) for j, (s, _) in enumerate(steps[:50])
    )
    cost = np.array([costs.captured(b) for b in buckets], float)
    takes = np.array([(1.0, costs.bytes(b), costs.capture(b)) for b in buckets], float).reshape(-1, 3)
    # Of buckets that hold the same steps those are left out for which an earlier one costs and takes no more.
    seen: dict[bytes, list[int]] = {}
    some = []
    for i, b in enumerate(buckets):
        alike = seen.setdefault(held[i].tobytes(), [])
        no_better = any(cost[j] <= cost[i] and (takes[j] <= takes[i]).all() for j in alike)
        if not (takes[i] <= budget._limits()).all():
            continue  # alone it is too much
        if b in keep or (held[i].any() and not no_better):
            some.append(i)
            alike.append(i)
    held = held[some]
    # Steps that the same buckets hold are one class, exactly.
    if held.size:
        packed = np.packbits(held, axis=0)
        _, index = np.unique(packed, axis=1, return_inverse=True)
        index = index.reshape(-1)
    else:
        index = np.zeros(len(steps), int)
    S = int(index.max(initial=-1)) + 1
    classes = np.zeros((len(some), S), bool)
    classes[:, index] = held
    return _Problem(
        tuple(buckets[i] for i in some),
        classes,
        np.bincount(index, n, S),
        np.bincount(index, eager, S),
        cost[some],
        takes[some],
        budget._limits(),
    )


# --- the best chain ---------------------------------------------------------------------------------------------------


def _edges(p: _Problem) -> tuple[np.ndarray, np.ndarray]:
    """(gain [B + 1, B] of going from a bucket to a larger one, allowed [B + 1, B]); the last row starts a chain.

    The gain counts the steps that the second holds and the first does not.
    """
    B = len(p.buckets)
    value = p.weight @ p.eager - p.cost * (p.weight @ p.n)
    common = (p.weight * p.eager) @ p.weight.T, (p.weight * p.n) @ p.weight.T
    gain = np.empty((B + 1, B))
    gain[:B] = value[None, :] - (common[0] - common[1] * p.cost[None, :])
    gain[B] = value
    sizes = p.weight.sum(1)
    nested = p.weight @ p.weight.T >= sizes[:, None] - 0.5  # the first holds nothing that the second does not
    allowed = np.ones((B + 1, B), bool)
    allowed[:B] = nested & (np.arange(B)[:, None] < np.arange(B)[None, :]) & (sizes[:, None] < sizes[None, :])
    return gain, allowed


def _tails(gain: np.ndarray, allowed: np.ndarray, price: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(most that a chain can still gain from each bucket, and from the start last; where it goes next, -1 for nowhere),
    when each bucket costs its price and there are no limits."""
    B = len(price)
    tail, then = np.zeros(B + 1), np.full(B + 1, -1)
    for j in [*range(B - 1, -1, -1), B]:
        options = np.where(allowed[j], gain[j] - price + tail[:B], -np.inf)
        if B and (best := options.max()) > 0:
            tail[j], then[j] = best, options.argmax()
    return tail, then


def _best_chain(p: _Problem, most: int) -> tuple[np.ndarray, bool]:
    """(mask of the best chain, whether that is proved), after looking at so many labels at most."""
    B = len(p.buckets)
    none = np.zeros(B, bool)
    if not B:
        return none, True
    gain, allowed = _edges(p)
    limited = np.isfinite(p.limits)
    scale = np.where(limited & (p.limits > 0), p.limits, 1.0)
    takes = np.where(limited, p.takes / scale, 0.0)
    limits = np.where(limited, p.limits / scale, 0.0)
    prices, best, best_gain, bound = np.zeros(3), none, 0.0, np.inf
    kept_tail, kept_prices = None, prices
    for i in range(80):
        tail, then = _tails(gain, allowed, takes @ prices)
        upper = tail[B] + prices @ limits
        path, j = none.copy(), B
        while (j := int(then[j])) >= 0:
            path[j] = True
        if p.fits(path) and (g := p.eager.sum() - p.total(path)) > best_gain:
            best, best_gain = path, g
        if upper < bound:
            bound, kept_tail, kept_prices = upper, tail, prices
        over = takes[path].sum(0) - limits
        if bound - best_gain <= 1e-12 * max(bound, 1e-30) or not limited.any() or not over.any():
            break
        stride = (bound - best_gain + 1e-3 * bound) / (1 + i / 10) / (over @ over)
        prices = np.where(limited, np.maximum(prices + stride * over, 0.0), 0.0)
    assert kept_tail is not None
    if bound - best_gain <= 1e-12 * max(bound, 1e-30):
        return best, True
    if not most:
        return best, False
    # Labels: (gain, what is used) of partial chains that end in a bucket. `back` finds the way.
    labels: list[np.ndarray] = []
    names: list[np.ndarray] = []
    back: list[tuple[int, int]] = []
    proved = True
    allowance = limits + 1e-9 * np.maximum(limits, 1.0)
    for k in range(B):
        sources = [(np.zeros((1, 4)), np.array([-1]), B)]
        sources += [(labels[j], names[j], j) for j in np.flatnonzero(allowed[:k, k]) if len(labels[j])]
        rows = np.concatenate([a + np.array([gain[j, k], *takes[k]]) for a, _, j in sources])
        came = np.concatenate([b for _, b, _ in sources])
        left = allowance - rows[:, 1:]
        hope = rows[:, 0] + kept_tail[k] + np.maximum(left, 0) @ kept_prices
        good = (left >= 0)[:, limited].all(1) & (hope > best_gain * (1 + 1e-12))
        rows, came = rows[good], came[good]
        rows, came = _undominated(rows, came)
        if len(back) + len(rows) > most:
            proved = False
            rows, came = rows[:0], came[:0]
        names.append(np.arange(len(back), len(back) + len(rows)))
        back += [(int(c), k) for c in came]
        labels.append(rows)
        if len(rows) and (top := rows[:, 0].max()) > best_gain:
            at = int(names[k][rows[:, 0].argmax()])
            best_gain, best = top, none.copy()
            while at >= 0:
                at, j = back[at]
                best[j] = True
    return best, proved


def _undominated(rows: np.ndarray, came: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those (gain, used...) for which no other gains as much and uses as little."""
    order = np.lexsort((*rows[:, 1:].T, -rows[:, 0]))
    rows, came = rows[order], came[order]
    used = rows[:, 1:]
    used = used[:, (used != used[:1]).any(0)]
    if used.shape[1] <= 1:  # one resource: whoever uses less than all that gain more
        least = np.minimum.accumulate(used[:, 0]) if used.size else np.zeros(0)
        kept = np.append(True, used[1:, 0] < least[:-1]) if used.size else np.arange(len(rows)) == 0
        return rows[kept], came[kept]
    front, kept = np.empty_like(used), []
    for i, mine in enumerate(used):
        if not (front[: len(kept)] <= mine + 1e-15).all(1).any():
            front[len(kept)] = mine
            kept.append(i)
    return rows[kept], came[kept]


# --- any set ----------------------------------------------------------------------------------------------------------


def _greedy(p: _Problem, chosen: np.ndarray, by_share: bool) -> np.ndarray:
    """The set, with buckets added while that helps: the largest gain first, or the largest for what it takes."""
    chosen = chosen.copy()
    finite = np.isfinite(p.limits) & (p.limits > 0)
    shares = (p.takes[:, finite] / p.limits[finite]).max(1, initial=0.0) + 1e-9
    while True:
        room = (p.used(chosen) + p.takes <= p.limits + 1e-9).all(1) & ~chosen
        gains = np.where(room, p.gains(chosen), 0.0)
        at = int((gains / shares if by_share else gains).argmax()) if len(gains) else 0
        if not len(gains) or gains[at] <= _least(p):
            return chosen
        chosen[at] = True


def _least(p: _Problem) -> float:
    """A gain below this is rounding."""
    return 1e-12 * float(p.eager.sum())


def _exchanged(p: _Problem, chosen: np.ndarray) -> np.ndarray:
    """The set, after additions, removals and exchanges of one while they help."""
    chosen = _greedy(p, chosen, False)
    best, improved = p.total(chosen), True
    while improved:
        improved = False
        for s in np.flatnonzero(chosen):
            without = chosen.copy()
            without[s] = False
            total = p.total(without)
            if total <= best + _least(p):  # as good with one graph less
                chosen, best, improved = without, total, True
                continue
            room = (p.used(without) + p.takes <= p.limits + 1e-9).all(1) & ~without
            gains = np.where(room, p.gains(without), -np.inf)
            at = int(gains.argmax())
            if total - gains[at] < best - _least(p):
                without[at] = True
                chosen, improved = _greedy(p, without, False), True
                best = p.total(chosen)
    return chosen


def _bound(p: _Problem, upper: float) -> float:
    """Seconds that no set within the limits is below, if each step might choose its cheapest bucket.

    Prices u of the steps are raised and lowered by subgradients; every u gives a bound. Buckets that are worth more
    than nothing at these prices are taken as far as the tightest limit goes, in parts if need be.
    """
    each = np.where(p.held, p.cost[:, None] * p.n[None, :], np.inf)
    u, best = p.paid(p.first(np.ones(len(p.buckets), bool))).copy(), -np.inf
    u = np.minimum(u, p.eager)
    finite = np.isfinite(p.limits)
    for i in range(200):
        saves = np.where(p.held, np.maximum(u[None, :] - each, 0.0), 0.0)
        worth = saves.sum(1)
        taken, value = (worth > 0).astype(float), float(worth.sum())
        for k in np.flatnonzero(finite):
            size = p.takes[:, k]
            order = np.argsort(-worth / np.maximum(size, 1e-30))
            room = np.clip(p.limits[k] - (np.cumsum(size[order]) - size[order]), 0.0, size[order])
            part = np.where(size[order] > 0, room / np.maximum(size[order], 1e-30), 1.0)
            if (whole := float(worth[order] @ part)) < value:
                value, taken = whole, np.zeros_like(worth)
                taken[order] = part * (worth[order] > 0)
        bound = float(u.sum()) - value
        best = max(best, bound)
        if upper - best <= 1e-9 * upper:
            break
        slack = 1 - taken @ (saves > 0)
        slack = np.where((slack > 0) & (u >= p.eager), 0.0, slack)
        if not (norm := float(slack @ slack)):
            break
        u = np.clip(u + (upper - bound) * (0.98**i) / norm * slack, 0.0, p.eager)
    return best


# --- all together -----------------------------------------------------------------------------------------------------


def tune(
    counts: Mapping[Shape, float],
    costs: Costs,
    budget: Budget | None = None,
    *,
    default: Ladder | None = None,
    among: tuple[Bucket, ...] | None = None,
) -> Tuned:
    """The best ladder that was found for these steps within the budget, its expected time, and a bound.

    Args:
        counts: steps by (T, R).
        default: a ladder to beat. Its buckets are candidates, and it is taken as it is when nothing better is found.
        among: the candidates; None derives them from the steps.
    """
    budget = budget or Budget()
    counts = {s: float(n) for s, n in counts.items() if n > 0}
    assert counts, "no steps to tune for"
    if among is None:
        among = candidates(counts, default)
    elif default is not None:
        among = Ladder((*among, *default.buckets)).buckets
    also = frozenset(() if default is None else default.buckets)
    p = _problem(counts, Ladder(among).buckets, costs, budget, also)
    n = sum(counts.values())
    if len(p.buckets) <= 1 or _one_chain(p):
        # Every set is a chain: there is nothing to look for beyond the best one.
        found, proved = _best_chain(p, LABELS)
        method = "the best chain" if proved else f"exchanges from the best of {LABELS} partial chains"
        if not proved:
            found = _exchanged(p, found)
        total = p.total(found)
        bound = total if proved else min(_bound(p, total), total)
    else:
        chain, _ = _best_chain(p, 0)
        nothing = np.zeros(len(p.buckets), bool)
        starts = {"a chain": chain}
        starts |= {"greedy": _greedy(p, nothing, False), "greedy by share": _greedy(p, nothing, True)}
        usual = np.array([b in also for b in p.buckets], bool)
        if default is not None and p.fits(usual):
            starts["the default ladder"] = usual
        # Exchanges are what takes the time, so only the two best starts are worth them.
        by_total = sorted(starts, key=lambda name: p.total(starts[name]))
        ends = {name: _exchanged(p, starts[name]) for name in by_total[:2]}
        name = min(ends, key=lambda name: p.total(ends[name]))
        found, total, method = ends[name], p.total(ends[name]), f"exchanges from {name}"
        bound = min(_bound(p, total), total)
        proved = total - bound <= 1e-9 * total
    ladder = Ladder(tuple(b for b, yes in zip(p.buckets, found, strict=True) if yes))
    assert budget.keeps(ladder, costs)
    return Tuned(
        ladder=ladder,
        expected=total / n,
        default=None if default is None else expected(counts, default, costs),
        none=float(p.eager.sum()) / n,
        bound=bound / n,
        proved=proved,
        candidates=len(p.buckets),
        method=method,
    )


def _one_chain(p: _Problem) -> bool:
    """Whether every bucket holds all that every one before it holds."""
    return bool((p.held[:-1] <= p.held[1:]).all())
