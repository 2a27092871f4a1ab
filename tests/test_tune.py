"""The tuner and its report. Oracles: brute force over all subsets, plain Python, sums by hand, and laws."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnengine import arrivals
from fnengine.graphs import cost, report, tune
from fnengine.graphs.bucket import Bucket
from fnengine.graphs.ladder import Ladder, default
from fnengine.graphs.report import Usage
from fnengine.graphs.tune import Budget, Costs
from fnengine.host.plan import Policy
from fnengine.simulate import replay

# --- the optimiser ----------------------------------------------------------------------------------------------------


def brute(counts, costs: Costs, budget: Budget, among) -> float:
    """The least mean over all subsets of the candidates, by trying them."""
    best = tune.expected(counts, None, costs)
    for k in range(1, len(among) + 1):
        for some in itertools.combinations(among, k):
            ladder = Ladder(some)
            if budget.keeps(ladder, costs):
                best = min(best, tune.expected(counts, ladder, costs))
    return best


def rough(seed: int, monotone: bool = True) -> Costs:
    """Made-up costs: of size if monotone, of nothing at all otherwise."""

    def noise(*key: int) -> float:
        return random.Random(repr((seed, key))).random()

    if not monotone:
        return Costs(
            lambda b: 1 + noise(b.tokens, b.rows),
            lambda t, r: 1 + 2 * noise(t, r, 1),
            lambda b: 1 + noise(b.tokens, 2),
            lambda b: noise(b.tokens, b.rows, 3),
        )
    a, c, e = noise(1), noise(2), 3 * noise(3)
    return Costs(
        lambda b: 1 + a * b.tokens + c * b.rows,
        lambda t, r: 1 + e + a * t + c * r,
        lambda b: 1 + b.tokens / 8,
        lambda b: 0.1 + noise(b.tokens, b.rows) / 5,
    )


budgets = st.builds(
    Budget,
    graphs=st.one_of(st.none(), st.integers(0, 5)),
    bytes=st.one_of(st.none(), st.floats(0, 12)),
    seconds=st.one_of(st.none(), st.floats(0, 1.2)),
)
weights = st.integers(1, 50)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(1, 24), weights, min_size=1, max_size=8), budgets, st.integers(0, 99), st.booleans())
def test_the_decode_line_is_solved_exactly(sizes, budget, seed, monotone):
    counts, costs = {(n, n): w for n, w in sizes.items()}, rough(seed, monotone)
    among = tune.candidates(counts)
    got = tune.tune(counts, costs, budget)
    assert got.proved and got.expected == pytest.approx(brute(counts, costs, budget, among), rel=1e-12)
    assert got.bound == got.expected == pytest.approx(tune.expected(counts, got.ladder, costs), rel=1e-12)
    assert budget.keeps(got.ladder, costs) and got.none == pytest.approx(tune.expected(counts, None, costs))


shapes = st.integers(1, 12).flatmap(lambda r: st.tuples(st.integers(r, 30), st.just(r)))
GAPS: list[float] = []


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.dictionaries(shapes, weights, min_size=1, max_size=9),
    st.sets(shapes, min_size=1, max_size=9),
    budgets,
    st.integers(0, 99),
    st.booleans(),
)
def test_of_any_steps_the_bound_holds_and_the_budget_is_kept(counts, pairs, budget, seed, monotone):
    costs = rough(seed, monotone)
    among = tuple(Bucket(max(t, 2), max(r, 2)) for t, r in pairs)
    got = tune.tune(counts, costs, budget, among=among)
    best = brute(counts, costs, budget, Ladder(among).buckets)
    assert got.bound <= best * (1 + 1e-9), "the bound is above the optimum"
    assert got.expected >= best * (1 - 1e-9) and budget.keeps(got.ladder, costs)
    assert got.expected == pytest.approx(tune.expected(counts, got.ladder, costs), rel=1e-12)
    if got.proved:
        assert got.expected == pytest.approx(best, rel=1e-8)
    GAPS.append(got.expected / best - 1)


def test_exchanges_find_nearly_always_the_optimum():
    """Measured over the random instances of the test before: no factor is proved."""
    if not GAPS:
        pytest.skip("runs after the test before")
    assert sum(g > 1e-9 for g in GAPS) <= 0.05 * len(GAPS), sorted(GAPS)[-10:]
    assert max(GAPS) < 0.1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.dictionaries(shapes, weights, min_size=1, max_size=30), st.integers(0, 99), st.integers(6, 30))
def test_never_worse_than_the_default_on_what_it_was_tuned_for(counts, seed, graphs):
    costs, usual = rough(seed), default(32, 12)
    budget = Budget(graphs=graphs)
    got = tune.tune(counts, costs, budget, default=usual)
    assert got.default == pytest.approx(tune.expected(counts, usual, costs))
    if budget.keeps(usual, costs):
        assert got.expected <= got.default * (1 + 1e-12)
    assert got.expected <= got.none * (1 + 1e-12)


def test_an_instance_by_hand():
    """Decode sizes 3 (10 steps) and 8 (1 step), a token costs 1, eager 100: one graph is 8 for all, two are exact."""
    costs = Costs(lambda b: b.tokens, lambda t, r: 100.0)
    counts = {(3, 3): 10, (8, 8): 1}
    one, two = (tune.tune(counts, costs, Budget(graphs=n)) for n in (1, 2))
    assert one.ladder.buckets == (Bucket(8, 8),) and one.expected == 8
    assert two.ladder.buckets == (Bucket(3, 3), Bucket(8, 8)) and two.expected == pytest.approx(38 / 11)
    assert tune.tune(counts, costs, Budget(graphs=0)).ladder.buckets == ()
    assert tune.tune(counts, Costs(lambda b: 5.0, lambda t, r: 1.0)).ladder.buckets == (), "graphs that cost more"


def test_padding_tokens_have_a_row():
    """A mixed step of 10 tokens in 3 rows fits (10, 3) exactly and 12 tokens only with a fourth row."""
    costs = Costs(lambda b: b.tokens + b.rows / 100, lambda t, r: 100.0)
    got = tune.tune({(10, 3): 1, (12, 3): 1}, costs, Budget(graphs=1))
    assert got.ladder.buckets == (Bucket(12, 4),)
    got = tune.tune({(10, 3): 1, (12, 3): 1}, costs, Budget(graphs=2))
    assert got.ladder.buckets == (Bucket(10, 3), Bucket(12, 3))


def test_a_tuner_that_forgets_the_padding_row_is_caught(monkeypatch):
    """Mutant: rows are compared without the row that owns padding tokens. Oracle: the mean that `Ladder.fit` gives."""
    costs, counts = Costs(lambda b: b.tokens + b.rows / 100, lambda t, r: 100.0), {(10, 3): 1, (12, 3): 1}
    real = tune._problem

    def forgetful(counts, buckets, *rest):
        p = real(counts, buckets, *rest)
        T, R = ([getattr(b, x) for b in p.buckets] for x in ("tokens", "rows"))
        held = [[t <= a and r <= b for t, r in counts] for a, b in zip(T, R, strict=True)]
        return dataclasses.replace(p, held=np.array(held), n=np.ones(2), eager=np.full(2, 100.0))

    for mutant in (False, True):
        if mutant:
            monkeypatch.setattr(tune, "_problem", forgetful)
        got = tune.tune(counts, costs, Budget(graphs=1))
        assert (got.expected == pytest.approx(tune.expected(counts, got.ladder, costs))) is not mutant


def test_a_trace_of_real_size_is_quick_and_close_to_its_bound():
    """Three budgets at once, 64 decode sizes and 3000 mixed shapes."""
    rng = random.Random(4)
    counts: dict = {}
    for _ in range(4000):
        r = min(64, max(1, round(rng.gauss(30, 12))))
        t = r if rng.random() < 0.6 else min(2048, r + round(rng.lognormvariate(5.5, 0.8)))
        counts[t, r] = counts.get((t, r), 0) + 1
    costs = Costs(
        lambda b: 4e-3 + 4e-5 * b.tokens + 1e-5 * b.rows,
        lambda t, r: 7e-3 + 4e-5 * t + 1e-5 * r,
        lambda b: 4e6 + 2e4 * b.tokens,
        lambda b: 0.15 + 1e-4 * b.tokens,
    )
    usual = default(2048, 64)
    got = tune.tune(counts, costs, Budget(48, 1 << 30, 10.0), default=usual)
    assert got.expected < got.default < got.none
    assert got.bound > 0.97 * got.expected


def test_a_ladder_for_the_future_beats_the_default_on_what_it_has_not_seen():
    """A law of the whole way, on synthetic load: arrivals, the scheduler, the tuner, the half that was held out."""
    costs = Costs(
        lambda b: 4e-3 + 2e-5 * b.tokens + 1e-5 * b.rows,
        lambda t, r: max(8e-3, 4e-3 + 2e-5 * t + 1e-5 * r),
        lambda b: 16e6,
        lambda b: 0.2,
    )
    sizes = Policy(budget=256, rows=24, queue=1000, max_len=2048, vocab=30000)
    usual, budget = default(256, 24), Budget(None, 2 << 30, 10.0)
    trace = arrivals.draw(arrivals.Synthetic(requests=120, rate=12, prompt=80, output=60, seed=1))
    first, second = (replay(h, sizes, costs.eager, blocks=2000, depth=1) for h in arrivals.halves(trace))
    steps = [(s.tokens, s.rows) for s in first.steps]
    got, spread = tune.foresee(steps, costs, budget, usual, tokens=256, rows=24)
    assert spread in tune.SPREADS and budget.keeps(usual, costs) and budget.keeps(got.ladder, costs)
    with_default, with_tuned = (tune.expected(second.counts, x, costs) for x in (usual, got.ladder))
    assert with_tuned < with_default < tune.expected(second.counts, None, costs)
    u = Usage()
    for (t, r), n in second.counts.items():
        for _ in range(n):
            u.add(t, r, bucket=got.ladder.fit(t, r))
    assert u.waste < 0.05


def test_widened_counts_keep_their_sum_and_their_bounds():
    counts = {(5, 5): 10, (100, 4): 3, (300, 9): 5, (512, 7): 2}
    wide = tune.widened(counts, default(512, 16), budget=512, rows=16, spread=0.5, share=0.1)
    assert sum(wide.values()) == pytest.approx(1.1 * sum(counts.values()))
    assert all(r <= t <= 512 and r <= 16 for t, r in wide)
    assert wide[512, 7] >= 2 and wide[300, 9] >= 2.5 and len(wide) > len(counts) + 16


def test_thinned_sizes_are_the_best_by_brute_force():
    rng = random.Random(0)
    for _ in range(30):
        w = {rng.randrange(1, 60): rng.randrange(1, 20) for _ in range(9)}
        most = rng.randrange(1, 5)

        def padded(tops, w=w):
            return sum(n * min(t for t in tops if t >= s) for s, n in w.items())

        best = min(
            padded((*some, max(w))) for k in range(min(most, len(w))) for some in itertools.combinations(sorted(w), k)
        )
        got = tune.thinned(w, most)
        assert len(got) <= most and padded(got) == best


# --- costs ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(2, 40), st.integers(2, 300), st.integers(0, 1000))
def test_a_surface_is_monotone_whatever_was_measured(level, rows, budget, seed):
    rng = random.Random(seed)
    measured = {s: rng.random() for s in cost.sample(max(budget, rows), rows, level)}
    f = cost.surface(measured)
    sizes = sorted({1, *range(2, 2 * rows, 3), *range(rows, 2 * budget, 17)})
    for r in [n for n in sizes if n <= 2 * rows]:
        line = [f(t, r) for t in sizes if t >= r]
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(line))
    for t in sizes:
        line = [f(t, r) for r in sizes if r <= t]
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(line))


def test_a_surface_is_what_was_measured_and_linear_between():
    def plane(t, r):
        return 1e-3 + 2e-5 * t + 3e-5 * r

    points = cost.sample(512, 32, 2)
    f = cost.surface({s: plane(*s) for s in points})
    for t, r in [*points, (9, 9), (33, 7), (400, 31), (511, 2), (5, 3), (32, 32), (1024, 32), (600, 40)]:
        assert f(t, r) == pytest.approx(plane(t, r)), (t, r)
    assert f(1, 1) == f(2, 2)
    assert set(cost.sample(512, 32, 1)) <= set(points)
    bent = cost.surface({(2, 2): 1.0, (4, 2): 3.0, (4, 4): 2.0})
    assert bent(4, 2) == bent(4, 4) == 2.5, "(M + m) / 2"


# --- the report -------------------------------------------------------------------------------------------------------


def usage() -> Usage:
    u = Usage()
    u.add(3, 3, bucket=Bucket(4, 4), seconds=0.002)
    u.add(4, 4, bucket=Bucket(4, 4), seconds=0.004, relaxed="noise")
    u.add(90, 5, bucket=Bucket(100, 8), seconds=0.01)
    u.add(999, 7, reason="<no bucket>", seconds=0.5)
    u.capture(Bucket(4, 4), 1 << 20, 0.25)
    u.capture(Bucket(4, 4), 1 << 20, 0.25)
    u.capture(Bucket(9, 9), 3 << 20, 1.0)
    u.recompiles = 2
    return u


def test_counts_by_hand():
    u = usage()
    assert (u.steps, u.padded) == (4, 1 + 0 + 10)
    assert u.waste == pytest.approx(11 / (3 + 4 + 90 + 999 + 11))
    assert report.waste_of(Bucket(4, 4), u.buckets[Bucket(4, 4)]) == pytest.approx(1 / 8)
    lines = report.table(u)
    four = next(x for x in lines if "4 x 4" in x).split()
    assert four[3:] == ["2", "7", "8", "12.5%", "3.000", "2.0", "0.50"]
    assert next(x for x in lines if "9 x 9" in x).split()[3:5] == ["0", "0"], "captured, never hit"
    assert lines[-1].endswith("2") and lines[-2] == "relaxed keys: noise 1" and "<no bucket>" in lines[-4]
    assert Usage().waste == 0 and len(report.table(Usage())) == 2


def test_merging_adds_and_changes_nothing():
    a, b = usage(), usage()
    whole = report.merge([a, b, Usage()])
    assert a == b == usage() == report.merge([a])
    assert (whole.steps, whole.padded, whole.recompiles, whole.relaxed["noise"]) == (8, 22, 4, 2)
    assert whole.captured[Bucket(4, 4)].bytes == 4 << 20 and whole.waste == pytest.approx(a.waste)
    assert report.from_json(json.loads(json.dumps(report.as_json(whole)))) == whole


def test_the_page_is_whole_and_fetches_nothing():
    page = report.page("a < b", ("before", usage()), ("after & co", Usage()), ["it's <fine>"])
    opened: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "!doctype"):
                opened.append(tag)
            assert not {"src", "href"} & {k for k, _ in attrs}

        def handle_endtag(self, tag):
            if tag == "rect":
                return
            while opened and opened[-1] == "rect":
                opened.pop()
            assert opened.pop() == tag

    Check().feed(page.replace("/>", "></rect>"))
    assert not opened and "a &lt; b" in page and "it&#x27;s &lt;fine&gt;" in page and "&lt;no bucket&gt;" in page
    # One scale for all bars, as lengths are compared: the eager one (999 tokens) is 11.1 times the bucket of 90.
    width = {m[1]: float(m[0]) for m in re.findall(r'width="([\d.]+)" height="14" fill="(#\w+)"', page)}
    blue = [float(w) for w in re.findall(r'width="([\d.]+)" height="14" fill="#2b6cb0"', page)]
    assert width["#8a8a8a"] / max(blue) == pytest.approx(999 / 90, rel=0.01)
