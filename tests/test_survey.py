"""The host as people look at it: who holds which block, who waits for what. Oracles: pools by hand, `blocks_of`."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from fnengine.host import plan as planning
from fnengine.host.blocks import CACHED, FREE, OTHER, SHARED, Ledger, Path
from fnengine.host.commit import commit
from fnengine.host.plan import Host, Policy
from fnengine.host.request import Request, Stop
from fnengine.host.step import StepOutput
from fnengine.host.survey import WAITING, lengths, survey


def grown(ledger: Ledger, path: Path, n: int) -> Path:
    longer = ledger.extend(path, n).path
    ledger.free(path)
    return longer


def test_owners_of_a_pool_worked_by_hand():
    """Blocks are handed out from 1 up. a holds 1 2 3; b shares 1 2 and has 4; 5 6 are cached; 7 is held by c alone,
    which is not asked about; 8 9 are free."""
    ledger = Ledger(10, 4)
    a = grown(ledger, ledger.empty(), 10)
    ledger.publish(a, range(8))
    b = grown(ledger, ledger.match(list(range(9))), 3)
    gone = grown(ledger, ledger.empty(), 8)
    ledger.publish(gone, range(100, 108))
    ledger.free(gone)
    c = grown(ledger, ledger.empty(), 1)
    assert [ledger.blocks_of(p).tolist() for p in (a, b, c)] == [[1, 2, 3], [1, 2, 4], [7]]
    owners = ledger.owners([a, b])
    assert owners.tolist() == [SHARED, SHARED, 0, 1, CACHED, CACHED, OTHER, FREE, FREE]
    assert lengths(owners) == (SHARED, 2, 0, 1, 1, 1, CACHED, 2, OTHER, 1, FREE, 2)
    assert ledger.owners([]).tolist() == [OTHER] * 4 + [CACHED] * 2 + [OTHER, FREE, FREE]
    ledger.check([a, b, c])


def expected(ledger: Ledger, paths: list[Path]) -> list[int]:
    """The slow way: every path's blocks, one by one."""
    held: dict[int, set[int]] = {}
    for i, path in enumerate(paths):
        for block in ledger.blocks_of(path).tolist():
            held.setdefault(block, set()).add(i)
    out = []
    for block in range(1, ledger.total + 1):
        node, who = ledger._nodes[block], held.get(block, set())
        one = next(iter(who)) if len(who) == 1 else SHARED
        out.append(one if who else FREE if node is None else OTHER if node.holds else CACHED)
    return out


class StopsAtTheFirstShared(Ledger):
    """Marks where two paths meet, and not what stands under that."""

    def owners(self, paths):
        owner = [FREE] * len(self._nodes)
        for node in self._cached:
            owner[node.block] = CACHED
        for i, (tip, *_) in enumerate(paths):
            node = tip
            while node is not None and owner[node.block] == FREE:
                owner[node.block] = i
                node = node.parent
            if node is not None:
                owner[node.block] = SHARED
        return array("i", owner[1:])


def play(kind: type[Ledger], seeds: int) -> bool:
    """Whether random forests of paths are told right every time."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        ledger = kind(60, 4)
        paths = [ledger.empty() for _ in range(4)]
        texts: list[list[int]] = [[] for _ in paths]
        for _ in range(40):
            i = int(rng.integers(len(paths)))
            if rng.random() < 0.3:
                j = int(rng.integers(len(paths)))
                n = int(rng.integers(paths[j].length + 1))
                cut = ledger.cut(paths[j], n)
                ledger.free(paths[i])
                paths[i], texts[i] = cut, texts[j][:n]
            elif paths[i].length < 30:
                n = int(rng.integers(1, 9))
                texts[i] = texts[i] + rng.integers(0, 2, n).tolist()
                paths[i] = grown(ledger, paths[i], n)
                if rng.random() < 0.7:
                    ledger.publish(paths[i], texts[i])
            asked = paths[: 1 + int(rng.integers(len(paths)))]
            if ledger.owners(asked).tolist() != expected(ledger, asked):
                return False
        ledger.check(paths)
    return True


def test_owners_of_random_pools():
    assert play(Ledger, 60)


def test_the_random_pools_catch_a_walk_that_stops_early():
    assert not play(StopsAtTheFirstShared, 60)


@pytest.mark.parametrize("values", [[], [7], [1, 1, 1], [-1, 0, 0, -3, -3, -3, 5]])
def test_lengths_are_undone_by_writing_them_out(values):
    told = lengths(array("i", values))
    assert [v for v, n in zip(told[::2], told[1::2], strict=True) for _ in range(n)] == values
    assert all(n > 0 for n in told[1::2])


# --- rows -------------------------------------------------------------------------------------------------------------


def make_host(blocks=9, rows=4, **policy) -> Host:
    p = Policy(budget=64, rows=rows, queue=1000, max_len=200, vocab=100, **policy)
    return Host(p, Ledger(blocks, caching=p.caching), rows=rows)


def ask(host, id, prompt, most=50, now=0.0, **kw):
    planning.submit(host, Request(id, np.arange(prompt, dtype=np.int32) % 90, stop=Stop(max_tokens=most), **kw), now)


def step(host, now):
    planned = planning.plan(host, now)
    assert planned is not None
    n = len(planned.runs)
    commit(host, planned, StepOutput(np.full((n, 1), 99, np.int32), planned.input.emit.astype(np.int32)), now)


def test_rows_say_state_place_and_what_is_waited_for():
    """Two rows: the third request waits for one, the fourth for its turn. One block of 16 tokens holds each prompt."""
    host = make_host(rows=2)
    for i in range(4):
        ask(host, f"r{i}", 10 + i, now=float(i), priority=0)
    step(host, 5.0)
    s = survey(host)
    assert [(r.id, r.state, r.waiting_for) for r in s.rows] == [
        ("r0", "generating", None),
        ("r1", "generating", None),
        ("r2", "waiting", "a row"),
        ("r3", "waiting", "its turn"),
    ]
    assert [(r.prompt, r.computed, r.generated, r.blocks) for r in s.rows[:3]] == [
        (10, 10, 1, 1),
        (11, 11, 1, 1),
        (12, 0, 0, 0),
    ]
    assert (s.rows[1].arrival, s.rows[1].scheduled, s.rows[1].first_token) == (1.0, 5.0, 5.0)
    assert s.pool == (0, 1, 1, 1, FREE, 6) and s.unlisted == 0 and survey(host, blocks=False).pool is None
    host.check()


def test_a_prompt_that_is_half_computed_is_prefilling_and_a_full_pool_is_waited_for():
    host = make_host(blocks=9)  # 128 tokens
    ask(host, "long", 100, most=10)
    ask(host, "next", 40, most=10, now=1.0)
    step(host, 2.0)  # 64 tokens are all a step takes
    assert [(r.state, r.waiting_for) for r in survey(host).rows] == [("prefilling", None), ("waiting", "blocks")]


def test_preemptions_are_remembered_with_their_time():
    """Seven blocks of 16: three prompts of 30 tokens take two each, and the 3rd token of each wants one more."""
    host = make_host(blocks=8, caching=False)
    for i in range(3):
        ask(host, f"r{i}", 30 - i, most=40, now=float(i))
    for now in range(10, 20):
        step(host, float(now))
    s = survey(host)
    assert s.preempted and s.preempted[0].id == "r2" and 10 < s.preempted[0].when < 20
    assert s.preempted[0].computed >= 28 and not s.preempted[0].saved
    row = next(r for r in s.rows if r.id == "r2")
    assert row.preemptions == 1 and row.state == "waiting" and row.waiting_for == "blocks"


def test_a_long_queue_is_cut_and_counted():
    host = make_host(rows=1)
    for i in range(WAITING + 31):
        ask(host, f"r{i}", 4, priority=-i, now=0.0)
    planning.abort(host, "r130")  # the most urgent one
    s = survey(host)
    assert [r.id for r in s.rows[:2]] == ["r129", "r128"] and len(s.rows) == WAITING and s.unlisted == 30
