"""The books of kept states. Oracles: examples worked by hand; the toy device, whose tokens follow from its states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnengine.host import states as keeping
from fnengine.host.blocks import Ledger, Path
from fnengine.host.request import Sampling
from fnengine.host.states import NOWHERE, States
from tests.test_schedule import LAWS, play, request, tokens, traces
from tests.toy import World, world

B = 4
ROWS = 2


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """States at every second block, so that short texts have some."""
    monkeypatch.setattr(keeping, "EVERY", 2)
    monkeypatch.setattr(keeping, "LEAST", 1)


def books(count: int, blocks: int = 20) -> tuple[Ledger, States]:
    states = States(ROWS + 1, count, B)
    return Ledger(blocks, B, states=states), states


def path_of(ledger: Ledger, ids: list[int]) -> Path:
    path = ledger.extend(ledger.empty(), len(ids)).path
    ledger.publish(path, ids)
    return path


def test_where_states_are_wanted():
    states = States(3, 1, B)
    # every 8 tokens; a prompt of 15 ends its last block at 12, one token is left
    assert [n for n in range(20) if states.wanted(n, 15)] == [8, 12, 16]
    assert [n for n in range(20) if states.wanted(n, 8)] == [4, 8, 16]  # at 8 nothing would be left to compute
    assert [states.chunk(at, 100, 15) for at in (0, 5, 8, 12, 13)] == [8, 3, 4, 4, 3]
    assert states.chunk(8, 2, 15) == 2 and states.chunk(8, 0, 15) == 0


def test_a_prefix_is_found_up_to_the_last_kept_state():
    ledger, states = books(2)
    ids = list(range(14))
    path = path_of(ledger, ids)
    assert ledger.match(ids).length == 0, "without a state blocks are of no use"
    assert states.keep(path, 8, row=1)
    assert states.drain() == [(1, 3)] and states.drain() == []
    found = ledger.match(ids)
    assert found.length == 8 and states.find(found) == (8, 3)
    assert states.keep(path, 14, row=0) and states.drain() == [(0, 4)]
    assert states.find(path) == (14, 4)
    short = ledger.cut(path, 13)
    assert states.find(short) == (8, 3), "the state after 14 tokens is none after 13"
    ledger.check([path, found, short])


def test_the_state_that_nobody_used_for_longest_makes_room():
    ledger, states = books(2)
    path = path_of(ledger, list(range(12)))
    states.keep(path, 4, 0)
    states.keep(path, 8, 0)
    states.find(ledger.cut(path, 4))
    states.settle()
    assert states.keep(path, 12, 0)
    assert states.find(path) == (12, 4)
    assert states.find(ledger.cut(path, 11)) == (4, 3)


def test_a_state_that_is_about_to_be_read_makes_no_room():
    ledger, states = books(1)
    path = path_of(ledger, list(range(12)))
    states.keep(path, 4, 0)
    assert states.find(path) == (4, 3)
    assert not states.keep(path, 8, 1)
    states.settle()
    assert states.keep(path, 8, 1)


def test_a_state_goes_with_its_block_and_its_place_rests_while_it_is_read():
    ledger, states = books(1)
    path = ledger.extend(ledger.empty(), 6).path
    states.keep(path, 6, 0)
    assert states.drain() == [(0, 3)]
    assert states.find(path) == (6, 3)
    ledger.free(path)  # nobody can find it again, but the step in the making reads it
    other = ledger.extend(ledger.empty(), 4).path
    assert len(states) == 0 and not states.keep(other, 4, 1)
    states.settle()
    assert states.keep(other, 4, 1)
    ledger.check([other])


def test_what_is_written_over_has_no_state():
    ledger, states = books(2)
    path = ledger.extend(ledger.empty(), 3).path
    states.keep(path, 2, 0)
    states.keep(path, 3, 0)
    short = ledger.cut(path, 2)
    ledger.free(path)
    path = ledger.extend(short, 1).path  # in place: nobody else holds the block
    assert states.find(path) == (2, 3)
    ledger.check([short, path])


def test_states_of_equal_blocks_are_kept_with_the_indexed_one():
    ledger, states = books(3)
    ids = list(range(12))
    first = path_of(ledger, ids)
    second = ledger.extend(ledger.empty(), 12).path
    states.keep(second, 8, 0)
    ledger.publish(second, ids)  # its blocks are known already
    assert ledger.match([*ids, 0]).length == 8
    states.keep(second, 12, 0)
    ledger.free(second)
    assert ledger.match([*ids, 0]).length == 12
    ledger.check()
    ledger.free(first)
    assert ledger.match([*ids, 0]).length == 12


def test_a_fault_forgets_what_was_kept_since():
    ledger, states = books(3)
    path = path_of(ledger, list(range(12)))
    states.settle()
    states.keep(path, 4, 0)
    states.drain()
    states.keep(path, 8, 0)  # waits for the next step, and is as good as that
    states.settle()
    begun = states.stamp
    states.drain()
    states.forget_since(begun)
    assert states.find(path) == (4, 3)
    ledger.check([path])


def test_a_reset_forgets_all():
    ledger, states = books(2)
    path = path_of(ledger, list(range(8)))
    states.keep(path, 8, 0)
    ledger.reset_cache()
    assert states.find(path) == (0, NOWHERE) and states.drain() == []


# --- with the scheduler -----------------------------------------------------------------------------------------------


def test_a_prompt_ends_chunks_where_states_are_wanted_and_is_found_up_to_there():
    w = world(rows=2, kept=8, budget=200, blocks=32)
    plans = []
    w.watch = plans.append
    p = tokens(75)
    w.submit(request("a", p, 3))
    w.drain()
    assert [len(x.input.token) for x in plans] == [32, 32, 11, 1, 1]
    assert [x.input.keep.tolist() for x in plans if x.input.keep is not None] == [[[0, 3]], [[0, 4]]]
    plans.clear()
    (b,) = w.submit(request("b", p, 3))
    w.drain()
    assert [len(x.input.token) for x in plans] == [11, 1, 1] and b.cached == 64
    assert plans[0].input.admit[0].state == 4
    for run in w.runs:
        w.verify(run)


@pytest.mark.parametrize("depth", [0, 1])
def test_choices_and_equal_prompts_wait_for_the_state_of_the_first(depth):
    """75 tokens are computed once, up to the last kept state, and 11 by each of the others; who has another prompt
    does not wait. Oracle: worked by hand."""
    w = world(depth=depth, rows=6, kept=8, budget=200, blocks=64)
    plans = []
    w.watch = plans.append
    p = tokens(75)
    w.submit(request("a", p, 3, n=3, temperature=1.0))
    w.submit(request("b", [*p[:70], 9], 3))
    w.submit(request("c", tokens(20, 1), 3))
    w.drain()
    sizes = [x.input.token.size - sum(np.diff(x.input.start) == 1) for x in plans]
    assert sizes[:3] == [32 + 16, 32 + 4, 11 + 11 + 11 + 7] and sum(sizes) == sum(sizes[:3])
    assert [run.cached for run in w.runs] == [0, 64, 64, 64, 0]
    assert [len(x.input.admit) for x in plans[:3]] == [2, 0, 3]
    for run in w.runs:
        w.verify(run)


def test_without_places_nobody_waits():
    w = world(rows=4, kept=0, budget=200, blocks=64)
    plans = []
    w.watch = plans.append
    w.submit(request("a", tokens(40), 3, n=3, temperature=1.0))
    w.drain()
    assert len(plans[0].input.admit) == 3
    for run in w.runs:
        w.verify(run)


def test_a_run_that_was_sent_back_begins_at_a_kept_state_and_swaps_nothing():
    w = world(rows=2, kept=8, blocks=8, host_slots=8, recompute_seconds_per_token=1.0, swap_seconds_per_block=0.0)
    for name, n in (("a", 40), ("b", 41)):
        w.submit(request(name, tokens(n, n), 30))
    w.drain()
    assert w.host.preemptions > 0 and w.host.swaps == 0
    for run in w.runs:
        w.verify(run)


def rest(w: World) -> None:
    while w.tick():
        pass


def test_extensions_go_on_from_the_end_of_the_last():
    w = world(rows=2, kept=4, blocks=32)
    plans = []
    w.watch = plans.append
    greedy = dict(prompt_len=1, sampling=Sampling(temperature=0.0), seed=1, wish="all")
    w.extend("x", None, 0, tokens(20).tolist(), **greedy)
    rest(w)
    for i in range(5):
        w.extend("x", "x", 99, [9 + i], **greedy)
        rest(w)
    assert [len(x.input.token) for x in plans] == [16, 4, 1, 1, 1, 1, 1]
    w.extend("x", "x", 10, [3], **greedy)  # without a state: computed again, and not told
    rest(w)
    assert len(plans[-1].input.token) == 11
    w.let_go("x")
    w.drain()


@settings(max_examples=25, **LAWS)
@given(traces(), st.sampled_from([0, 1, 2, 5, 20]))
def test_traces_over_layers_with_states(trace, kept):
    """Preemption, forks, hits, faults, drafts; every tick checks that blocks and places are conserved."""
    sizes, events = trace
    play(({**sizes, "kept": kept}, events))


def test_a_wrong_state_is_caught(monkeypatch):
    """Mutant: a state is taken for that of a block before."""
    find = States.find

    def early(self, path):
        length, place = find(self, path)
        return (length - 16, place) if length > 16 else (length, place)

    monkeypatch.setattr(States, "find", early)
    with pytest.raises(AssertionError):
        test_a_run_that_was_sent_back_begins_at_a_kept_state_and_swaps_nothing()
