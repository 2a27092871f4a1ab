"""A short form of `benchmarks.hostile` against the bundled model, and the benchmark's own judgement.

Oracles: codes below 500, the same text for honest clients as when alone, and books that balance afterwards.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter

import psutil
import pytest

import fnengine as fn
from benchmarks import hostile
from benchmarks.hostile import KINDS, Honest, Tally, attacks, verdict
from fnengine.serve.connections import Limits
from fnengine.serve.run import bind, serve


@pytest.fixture(scope="module")
def served():
    """(engine, url, what the log was told) of a server on a free port."""
    engine = fn.Engine.build(fn.load("demo"), max_model_len=512, max_num_seqs=16, enforce_eager=True)
    ready, stop, faults, urls = threading.Event(), threading.Event(), [], []
    options = dict(
        sock=bind("127.0.0.1", 0),
        stop=stop,
        log=faults.append,
        limits=Limits(every=0.1),
        on_ready=lambda url: (urls.append(url), ready.set()),
    )
    thread = threading.Thread(target=serve, args=(engine,), kwargs=options, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield engine, urls[0], faults
    stop.set()
    thread.join(20)
    assert not thread.is_alive()


def assailed(served, plan, rate=200.0, clients=1):
    """What honest clients and attackers saw, after which nothing is left."""
    engine, url, faults = served
    process = psutil.Process()
    asyncio.run(hostile.assault(url, plan[:5], rate, Tally()))  # threads and files that stay
    before = process.num_fds()
    seen, tally, _ = asyncio.run(hostile.campaign(url, plan, rate, clients, 0.1, 16))
    end = time.monotonic() + 20
    while (g := engine.gauges()).running or g.waiting or g.blocks_held or process.num_fds() > before + 2:
        assert time.monotonic() < end, (g, process.num_fds(), before)
        time.sleep(0.02)
    engine.check()
    assert not faults, faults
    assert not tally.wrong and not seen.errors, (tally.wrong, tally.examples, seen.errors)
    return seen, tally


def test_every_kind_of_attack_leaves_others_and_the_books_alone(served):
    seen, tally = assailed(served, attacks(1, 6 * len(KINDS)))
    kinds = {name.rsplit(" ", 1)[0] for name in tally.statuses}
    assert len(kinds) == len(KINDS) and seen.answers >= 1
    codes = Counter()
    for name, n in tally.statuses.items():
        codes[name.rsplit(" ", 1)[1]] += n
    assert {"0", "200", "400", "404", "413"} <= codes.keys(), codes


@pytest.mark.slow
def test_ten_thousand_attacks(served):
    assailed(served, attacks(2, 10_000), 300.0, 2)


def test_a_fault_is_not_missed(served, monkeypatch):
    from fnengine.serve import translate

    def broken(*a, **kw):
        raise ZeroDivisionError

    monkeypatch.setattr(translate, "_sampling", broken)
    _, url, faults = served
    tally = Tally()
    asyncio.run(hostile.assault(url, attacks(1, 40), 200.0, tally))
    assert any(what.endswith(": 500") for what in tally.wrong) and tally.examples and faults
    faults.clear()


def test_attacks_are_the_same_for_the_same_seed():
    assert attacks(3, 60) == attacks(3, 60) != attacks(4, 60)
    assert [a.kind for a in attacks(3, len(KINDS))] == [k(random.Random(0)).kind for k in KINDS]


def test_streams_are_held_and_let_go(served):
    engine, url, _ = served
    held = asyncio.run(hostile.hold(url, 60, 0.3, 400))
    assert held["open_at_once"] == 60 and held["errors"] == {}
    end = time.monotonic() + 10
    while (g := engine.gauges()).running or g.waiting or g.blocks_held:
        assert time.monotonic() < end, g
        time.sleep(0.02)
    engine.check()


def test_gaps_are_told_apart_by_when_they_were():
    seen = Honest(times=[[0.0, 1.0, 2.5, 3.0, 5.5, 6.5], [9.0], []])
    seen.sort(2.0, 6.0)  # the gaps from 1 to 2.5 and from 5.5 to 6.5 lie across
    assert seen.quiet == [1.0] and seen.under_attack == [0.5, 2.5]


def test_the_verdict_names_each_fault():
    even = Honest(quiet=[0.01] * 50, under_attack=[0.011] * 50, answers=3)
    flat = {"growth": 0.001}
    held = {"wanted": 5, "open_at_once": 5, "errors": {}}
    same = {"descriptors": 10, "threads": 3}

    def judged(tally=None, seen=even, left=(), after=same, held=held, flat=flat, exit_code=0):
        more = {"tolerance": 0.02, "slower": 2.0, "exit_code": exit_code}
        return verdict(tally or Tally(), seen, left, same, after, held, flat, **more)

    assert judged() == []
    assert judged(Tally(wrong=Counter({"deep nesting: 500": 2}))) == ["2 x deep nesting: 500"]
    slow = Honest(quiet=[0.01] * 50, under_attack=[0.03] * 50)
    assert judged(seen=slow) == [f"tokens came 3.00 times as slowly (p{q})" for q in (50, 99)]
    assert judged(seen=Honest()) == ["honest clients saw too little to compare"]
    assert judged(left=["kv_blocks_held is 3"]) == ["left behind: kv_blocks_held is 3"]
    assert judged(after={"descriptors": 40, "threads": 3}) == ["descriptors: 10 before, 40 after"]
    assert judged(held=held | {"open_at_once": 4}) == ["only 4 of 5 streams were open at once"]
    assert judged(held=held | {"errors": {"HTTP/1.1 429": 1}}) == ["open streams: 1 x HTTP/1.1 429"]
    assert judged(flat={"growth": 0.05}) == ["memory grew by 5.0 % while streams were held"]
    assert judged(flat=None) == ["too few samples of memory"]
    assert judged(exit_code=-9) == ["the server ended with -9"]
