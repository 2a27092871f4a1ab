"""The scheduler on the toy device. Oracle: `toy.expected`, the tokens of each request computed for it alone."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fnengine.errors import ContextLengthError, QueueFull, RequestError
from fnengine.host import ahead, garbage
from fnengine.host import commit as committing
from fnengine.host import guide as guiding
from fnengine.host import pack as packing
from fnengine.host import plan as planning
from fnengine.host import runs as running
from fnengine.host.blocks import Ledger
from fnengine.host.request import Request, Sampling, Stop, fold_in
from fnengine.host.step import NEWEST, Ask
from tests.toy import Rule, World, expected, world

RECOMPUTE = {"recompute_seconds_per_token": 0.0, "swap_seconds_per_block": 1.0}
SWAP = {"recompute_seconds_per_token": 1.0, "swap_seconds_per_block": 0.0}


def tokens(n: int, seed: int = 0, vocab: int = 97) -> np.ndarray:
    return np.random.default_rng(seed).integers(6, vocab, n).astype(np.int32)


def request(id: str, prompt, max_tokens: int | None = 4, *, temperature=0.0, seed=3, **kw) -> Request:
    stop = kw.pop("stop", None) or Stop(max_tokens=max_tokens)
    return Request(id, np.array(prompt, np.int32), Sampling(temperature=temperature, seed=seed), stop, **kw)


def run_all(w: World, *requests: Request) -> World:
    for r in requests:
        w.submit(r)
    w.drain()
    for r in w.runs:
        w.verify(r)
        assert r.finish in ("stop", "length")
    return w


# --- worked by hand ---------------------------------------------------------------------------------------------------


def test_two_tokens_worked_by_hand():
    # digest: 11 -> 12, 20 -> 31*12 + 21 = 393. chosen = 7 + 1*11 + 2*20 + 393 = 451 = 63 mod 97.
    # then 63 -> 31*393 + 64 = 12247; chosen = 7 + 51 + 3*63 + 12247 = 12494 = 78 mod 97.
    w = world()
    (run,) = w.submit(request("a", [11, 20], 2))
    w.drain()
    assert run.tokens[: run.known].tolist() == [11, 20, 63, 78]
    assert (run.generated, run.finish, w.device.launches) == (2, "length", 2)


@pytest.mark.parametrize("depth", [0, 1])
def test_decoding_runs_come_first_and_take_the_newest_token(depth):
    w = world(depth=depth, budget=8)
    w.submit(request("a", tokens(4), 30, stop=Stop(max_tokens=30, ignore_eos=True)))
    w.tick()
    w.submit(request("b", tokens(20, 1), 3))
    plans = []
    w.watch = plans.append
    w.tick()
    step = plans[0].input
    assert step.token[0] == NEWEST and step.start.tolist() == [0, 1, 8]  # 1 of a's, then 7 of b's prompt
    assert step.emit.tolist() == [1, 0]
    w.drain()
    for r in w.runs:
        w.verify(r)


def test_choices_of_one_request_share_blocks_within_one_step():
    w = world(blocks=16, budget=200)
    plans = []
    w.watch = plans.append
    runs = w.submit(request("a", tokens(40), 3, n=3, temperature=1.0))
    w.tick()
    step = plans[0].input
    # 40 tokens for choice 0; the others find its two full blocks, published by this same plan, and compute 8.
    assert np.diff(step.start).tolist() == [40, 8, 8]
    assert [a.length for a in step.admit] == [0, 32, 32]
    first = step.admit[0].blocks[:2].tolist()
    assert all(a.blocks[:2].tolist() == first for a in step.admit)
    assert w.host.ledger.held == 2 + 3
    w.drain()
    assert len({tuple(w.records[id(r)].tokens) for r in runs}) > 1, "choices draw with seeds of their own"
    for r in runs:
        w.verify(r)
    assert [r.cached for r in runs] == [0, 32, 32]


def test_a_later_request_finds_the_generated_text_too():
    w = world()
    (a,) = w.submit(request("a", tokens(20), stop=Stop(max_tokens=20, ignore_eos=True)))
    w.drain()
    chat = [*a.tokens[: a.known].tolist(), 9, 9]
    (b,) = w.submit(request("b", chat, 2))
    w.drain()
    w.verify(b)
    assert b.cached == 32  # 39 tokens of a are computed, two full blocks of them indexed
    assert (w.host.ledger.queries, w.host.ledger.hits) == (20 + 42, 32)


@pytest.mark.parametrize("depth", [0, 1])
def test_prompt_logprobs_are_complete_and_skip_the_cache(depth):
    w = world(depth=depth, budget=24)
    p = tokens(50)
    run_all(w, request("warm", p, 2))
    run_all(w, request("a", p, 3, prompt_logprobs=2, logprobs=1), request("b", p, 0, prompt_logprobs=0))
    a, b = w.runs[1:]
    assert (a.cached, b.cached) == (0, 0)
    assert w.records[id(b)].tokens == [] and b.finish == "length" and w.records[id(b)].events == 1


def test_a_request_of_no_tokens_ends_after_its_prompt():
    w = run_all(world(budget=16), request("a", tokens(40), 0))
    assert w.device.launches == 3 and w.records[id(w.runs[0])].events == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_min_tokens_stop_ids_and_ignore_eos(depth):
    p = tokens(5, 4)
    free = run_all(world(depth=depth, eos=()), request("a", p, 12)).runs[0]
    third = int(free.tokens[len(p) + 2])
    stop = run_all(world(depth=depth, eos=()), request("a", p, stop=Stop(max_tokens=12, ids=(third,)))).runs[0]
    assert (stop.generated, stop.finish) == (3, "stop")
    eos = run_all(world(depth=depth, eos=(third,)), request("a", p, 12)).runs[0]
    assert (eos.generated, eos.finish) == (3, "stop")
    ignored = Stop(max_tokens=12, ignore_eos=True)
    assert run_all(world(depth=depth, eos=(third,)), request("a", p, stop=ignored)).runs[0].generated == 12
    late = run_all(world(depth=depth, eos=(third,)), request("a", p, stop=Stop(max_tokens=12, min_tokens=6))).runs[0]
    assert late.generated >= 6 and late.tokens[len(p) + 2] == third + 1, "suppressed: the next id instead"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stop_found_in_the_text_drops_the_token_in_flight(depth):
    w = world(depth=depth)

    def third(event):
        if event.run.generated == 3:
            committing.finish(w.host, event.run, "stop")

    w.after = third
    (run,) = w.submit(request("a", tokens(30), 12))
    w.drain()
    assert len(w.records[id(run)].tokens) == run.generated == 3
    assert w.device.launches == 3 + depth  # at depth 1 a fourth step was on its way, and was dropped
    assert run.row == -1 and run.path.length == 0


def test_the_context_ends_a_run_and_the_last_token_is_never_computed():
    w = run_all(world(max_len=32, blocks=3), request("a", tokens(20), None, stop=Stop(ignore_eos=True)))
    assert w.runs[0].known == 32 and w.device.state[0].length == 31


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_queue_is_bounded_by_tokens_too():
    w = world(max_len=64, blocks=12, queue=100, rows=1, queue_tokens=40)
    w.submit(request("a", tokens(50), 4))  # nobody waits, so it may be longer than the bound
    w.tick()
    w.submit(request("b", tokens(20), 4))
    w.submit(request("c", tokens(10), 4, n=2))
    with pytest.raises(QueueFull, match=r"40 prompt tokens wait already, 1 more .* takes 40"):
        w.submit(request("d", tokens(1), 4))
    assert planning.gauges(w.host).rejections == 1 and w.host.waiting_tokens == 40
    planning.abort(w.host, "c")
    assert w.host.waiting_tokens == 20
    w.submit(request("e", tokens(20), 4))
    w.drain()
    assert w.host.waiting_tokens == 0
    w.host.check()


def test_refusals_say_what_and_leave_nothing_behind():
    w = world(max_len=64, blocks=3, queue=2)  # a pool of 32 tokens serves sequences of 33
    with pytest.raises(ContextLengthError, match=r"64 tokens, the context holds 64"):
        w.submit(request("a", tokens(64), 4))
    with pytest.raises(ContextLengthError, match=r"30 prompt tokens and 20 .* holds a sequence of 33"):
        w.submit(request("a", tokens(30), 20))
    with pytest.raises(ContextLengthError, match="holds a sequence of 33"):
        w.submit(request("a", tokens(40), None))
    for bad in ([], [97], [-1]):
        with pytest.raises(RequestError) as e:
            w.submit(request("a", bad))
        assert e.value.param == "prompt"
    with pytest.raises(RequestError) as e:
        w.submit(request("a", [1], n=0))
    assert e.value.param == "n"
    with pytest.raises(RequestError, match="min_tokens"):
        w.submit(request("a", tokens(30), stop=Stop(min_tokens=10)))
    w.submit(request("a", tokens(4)))
    w.submit(request("b", tokens(4)))
    with pytest.raises(QueueFull):
        w.submit(request("c", tokens(4)))
    assert planning.gauges(w.host).rejections == 1
    w.tick()
    w.submit(request("d", tokens(4)))  # the two are running, so there is room again
    w.drain()


def test_the_rest_of_the_context_is_what_the_pool_can_hold():
    w = run_all(world(max_len=64, blocks=3), request("a", tokens(30), stop=Stop(ignore_eos=True)))
    assert w.runs[0].known == 33


def test_seeds_come_from_the_root_in_order_of_submission():
    w = world(seed=11)
    a = w.submit(request("a", [7], seed=None, n=2))
    w.submit(request("b", [7], seed=5))
    (c,) = w.submit(request("c", [7], seed=None))
    assert [r.seed for r in a] == [fold_in(11, 1), fold_in(fold_in(11, 1), 1)]
    assert c.seed == fold_in(11, 2)
    assert w.runs[2].seed == 5


# --- preemption -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("costs", [RECOMPUTE, SWAP], ids=["recompute", "swap"])
def test_a_pool_too_small_for_both_sends_the_later_back(depth, costs):
    w = world(depth=depth, blocks=7, host_slots=8, **costs)
    stop = Stop(max_tokens=50, ignore_eos=True)
    run_all(w, request("a", tokens(20), stop=stop), request("b", tokens(20, 1), stop=stop))
    a, b = w.runs
    assert (a.preemptions, b.preemptions > 0) == (0, True)
    assert w.host.preemptions == b.preemptions
    assert w.host.swaps == (b.preemptions if costs is SWAP else 0)
    assert a.last_token < b.last_token


def test_swapping_needs_slots_and_falls_back_to_recompute():
    w = world(blocks=7, host_slots=1, **SWAP)
    stop = Stop(max_tokens=50, ignore_eos=True)
    run_all(w, request("a", tokens(20), stop=stop), request("b", tokens(20, 1), stop=stop))
    assert w.host.preemptions > 0 and w.host.swaps == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_an_urgent_request_takes_the_place_of_a_less_urgent_one(depth):
    w = world(depth=depth, rows=1)
    stop = Stop(max_tokens=30, ignore_eos=True)
    (slow,) = w.submit(request("slow", tokens(20), stop=stop, priority=1))
    (same,) = w.submit(request("same", tokens(20, 2), 3, priority=1))
    for _ in range(4):
        w.tick()
    (urgent,) = w.submit(request("urgent", tokens(20, 1), 5, priority=0))
    w.drain()
    assert slow.preemptions == 1 and urgent.preemptions == 0
    assert urgent.last_token < slow.last_token < same.scheduled
    for r in w.runs:
        w.verify(r)


def test_requests_of_equal_priority_never_send_each_other_back_to_get_in():
    w = world(rows=1)
    (a,) = w.submit(request("a", tokens(20), 10))
    w.tick()
    w.submit(request("b", tokens(20, 1), 3))
    w.drain()
    assert a.preemptions == 0


# --- aborts and faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("when", range(6))
def test_abort_at_any_time_and_twice(depth, when):
    w = world(depth=depth, budget=16, blocks=12)
    w.submit(request("a", tokens(40), 20, n=2))
    w.submit(request("b", tokens(40, 1), 8))
    for _ in range(when):
        w.tick()
    w.abort("a")
    w.abort("a")
    w.abort("nobody")
    w.drain()
    for r in w.runs:
        w.verify(r)
    assert [r.finish for r in w.runs[:2]] == ["abort", "abort"] and w.runs[2].finish in ("stop", "length")


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("costs", [RECOMPUTE, SWAP], ids=["recompute", "swap"])
def test_a_fault_ends_its_runs_and_leaves_no_trace(depth, at, costs):
    w = world(depth=depth, blocks=9, budget=24, host_slots=8, fail_at=(at,), **costs)
    stop = Stop(max_tokens=30, ignore_eos=True)
    shared = tokens(32)
    for i in range(4):
        w.submit(request(f"r{i}", [*shared.tolist(), i], stop=stop))
    w.device.ledger = None  # between a fault and its commit the index is ahead of the pool
    w.drain()
    assert any(r.finish == "error" for r in w.runs)
    for r in w.runs:
        w.verify(r)
        assert (r.finish == "error") == (w.records[id(r)].finish == "error")
    w.device.check_index(w.host.ledger)
    (late,) = w.submit(request("late", [*shared.tolist(), 50], 5))
    w.drain()
    w.verify(late)
    assert late.finish in ("stop", "length")


def reader_of_a_failed_step() -> World:
    """At depth 1, b joins the blocks that a's step is to write, before that step is known to have failed."""
    w = world(depth=1, fail_at=(0,))
    w.device.ledger = None
    shared = tokens(32).tolist()
    w.submit(request("a", [*shared, 1], 20))
    w.tick()
    w.submit(request("b", [*shared, 2], 20))
    w.submit(request("c", tokens(20, 9), 20))
    w.drain()
    assert w.runs[1].cached == 32
    for r in w.runs:
        w.verify(r)
    return w


def test_a_fault_reaches_those_who_read_its_blocks_and_nobody_else(monkeypatch):
    w = reader_of_a_failed_step()
    assert [r.finish for r in w.runs[:2]] == ["error", "error"] and w.runs[2].finish in ("stop", "length")
    monkeypatch.setattr(Ledger, "stands_on", lambda ledger, path, nodes: False)
    with pytest.raises(AssertionError):
        reader_of_a_failed_step()


# --- what a step is asked for -----------------------------------------------------------------------------------------


def ask_of(*wishes: dict):
    """The `Ask` of one step that chooses a token for each of the wishes."""
    w = world(rows=8, budget=200)
    plans = []
    w.watch = plans.append
    for i, wish in enumerate(wishes):
        more = {k: wish[k] for k in ("logprobs", "prompt_logprobs") if k in wish}
        stop = Stop(max_tokens=4, min_tokens=wish.get("min_tokens", 0))
        sampling = Sampling(seed=1, **{k: v for k, v in wish.items() if k not in (*more, "min_tokens")})
        w.submit(Request(f"r{i}", tokens(20, i), sampling, stop, **more))
    w.tick()
    return plans[0].input.ask


def test_a_step_computes_no_more_than_some_row_needs():
    greedy = {"temperature": 0.0}
    assert ask_of(greedy) == Ask()
    assert ask_of(greedy | {"top_p": 0.5, "top_k": 3, "min_p": 0.1}) == Ask(), "argmax survives every truncation"
    assert ask_of({}) == Ask(noise=True)
    assert ask_of({"top_k": -1}) == Ask(noise=True)
    both = ask_of(greedy | {"presence_penalty": 0.5}, {"top_p": 0.9}, {"top_k": 4, "logit_bias": ((3, 1.0),)})
    assert both == Ask(("bias", "penalties", "top_k", "top_p"), noise=True)
    assert ask_of(greedy | {"min_tokens": 2}) == Ask(("bias",))
    assert ask_of(greedy | {"typical_p": 0.5, "xtc_probability": 0.5}) == Ask(), "neither is about the likeliest token"
    rare = {"allowed_token_ids": (1,), "bad_words": ((2,),), "no_repeat_ngram_size": 3, "dry_multiplier": 1.0}
    assert ask_of(greedy | rare) == Ask(("allowed", "bad_words", "no_repeat_ngram", "dry"))
    assert ask_of(greedy | {"dry_multiplier": 1.0, "dry_penalty_last_n": 0}) == Ask()
    assert ask_of({"typical_p": 0.5, "top_k": 3}, {"xtc_probability": 0.5}) == Ask(("typical_p", "top_k", "xtc"), True)
    assert ask_of(greedy, greedy | {"logprobs": 0}, greedy | {"logprobs": 3}).logprobs == 3
    assert ask_of(greedy, greedy | {"prompt_logprobs": 2}).score == 2


def test_a_step_without_a_finished_prompt_chooses_nothing():
    w = world(budget=16)
    plans = []
    w.watch = plans.append
    w.submit(request("a", tokens(40), temperature=1.0, logprobs=1))
    w.tick()
    assert plans[0].input.ask == Ask(sample=False)
    w.tick()
    w.tick()
    assert plans[2].input.ask == Ask(noise=True, logprobs=1)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("dear", [False, True])
def test_what_must_come_takes_one_step(depth, dear):
    """A text of 30 tokens that is forced but for two places, where one of two may come; a token at a time where steps
    of more tokens than three, one of each row, would be padded to many."""
    line = tokens(30, 3).tolist()

    class Line(Rule):
        def may(self):
            at = len(self.text)
            if self.done():
                return frozenset({5})
            return frozenset({line[at], line[at] + 1} if at in (10, 20) else {line[at]})

        def after(self, token):
            assert token in self.may()
            return Line(self.salt, self.vocab, (*self.text, token))

        def fork(self):
            return self

        def done(self):
            return len(self.text) == len(line)

    w = world(depth=depth, padded=lambda n: n + 100 * (dear and n > 3))
    w.submit(request("a", tokens(5), 40, guide=Line(0, 97), logprobs=1, n=2))
    w.submit(request("b", tokens(9, 1), 40))
    w.drain()
    for run in w.runs:
        w.verify(run)
    a = w.runs[0]
    assert (a.generated, a.finish) == (30, "stop") and len(w.records[id(a)].logprobs) == 30
    # 1 + 10 + 1 ... : the first token, what is forced behind it and one more, twice again, with at most 16 at a time.
    assert w.records[id(a)].events == (30 if dear else 4)


def test_a_guide_that_fails_ends_its_own_run_only():
    class Fails(Rule):
        def after(self, token):
            return Fails(self.salt, self.vocab, (*self.text, token))

        def fork(self):
            return self

        def allow(self, masks, i):
            if len(self.text) == 3:
                raise RequestError("too much work")
            masks.array[i] = -1

        def forced(self):
            return ()

        def done(self):
            return False

    w = world()
    errors = []
    w.after = lambda e: errors.append(e.error) if e.error else None
    (bad,) = w.submit(request("a", tokens(5), 20, guide=Fails(0, 97)))
    (good,) = w.submit(request("b", tokens(9, 1), 20))
    w.drain()
    w.verify(good)
    assert (bad.finish, bad.generated, errors) == ("error", 3, ["too much work"]) and good.finish in ("stop", "length")


def test_ids_are_suppressed_only_until_min_tokens():
    w = world()
    plans = []
    w.watch = plans.append
    run_all(w, request("a", tokens(20), stop=Stop(max_tokens=5, min_tokens=2, ids=(8, 5))))
    assert plans[0].input.admit[0].suppress == (5, 8) and plans[0].input.admit[0].suppress_until == 22
    assert [p.input.ask.pipeline for p in plans[:4]] == [("bias",), ("bias",), (), ()]


# --- cost and waste ---------------------------------------------------------------------------------------------------


class Counted(tuple):
    """A key that counts how often keys are compared: what a heap or a sorted list of them costs."""

    compared = 0

    def __lt__(self, other):
        Counted.compared += 1
        return tuple.__lt__(self, other)


class Watched(list):
    """A queue that lets only its first entry be read one by one; `heapq` goes past this and is counted by its keys."""

    looked = 0

    def __getitem__(self, i):
        assert i == 0, "somebody looks into the middle of the queue"
        Watched.looked += 1
        return super().__getitem__(i)

    def __iter__(self):
        raise AssertionError("somebody walks through the queue")


def work_of_steps(waiting: int, steps: int = 40) -> tuple[float, float, int]:
    """(comparisons a step, looks at the queue a step, function calls in all) of a busy host with so many waiting.

    Rows end and others are admitted all the time, now and then somebody more urgent comes and sends another back.
    """
    w = world(rows=8, blocks=64, budget=64, queue=1 << 20)
    w.device.ledger, w.audit = None, lambda: None
    rng = np.random.default_rng(3)
    stop = [Stop(max_tokens=int(n), ignore_eos=True) for n in rng.integers(4, 30, 16)]
    for i in range(waiting):
        w.submit(request(f"r{i}", tokens(20, i % 50), stop=stop[i % 16], priority=int(rng.integers(1, 4))))
    for _ in range(10):
        w.tick()
    w.host.queue = Watched((Counted(key), run) for key, run in list.__iter__(w.host.queue))
    Counted.compared = Watched.looked = calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for i in range(steps):
            if i % 10 == 5:
                w.submit(request(f"urgent{i}", tokens(20, i), 3))
            w.tick()
    finally:
        sys.setprofile(None)
    assert w.host.preemptions and len(w.host.queue) < waiting, "the steps did not do what they are counted for"
    return Counted.compared / steps, Watched.looked / steps, calls


def test_the_work_of_a_step_does_not_grow_with_the_queue():
    few, many = work_of_steps(200), work_of_steps(20_000)
    # A heap of n entries takes one out in at most 2 log2(n) comparisons: 100 times the queue is 14 more each.
    admitted = 8
    assert many[0] <= few[0] + 14 * admitted
    assert many[1] <= few[1] + admitted
    assert many[2] <= 1.3 * few[2], "function calls of forty steps"


def walk_the_queue(monkeypatch):
    """A plan that sorts whoever waits."""
    real = planning.first_waiting

    def first_waiting(host):
        host.queue[:] = sorted(list.__iter__(host.queue))
        return real(host)

    monkeypatch.setattr(planning, "first_waiting", first_waiting)


def test_a_plan_that_sorts_the_queue_is_caught(monkeypatch):
    few = work_of_steps(200)
    walk_the_queue(monkeypatch)
    many = work_of_steps(2000, steps=10)
    assert many[0] > few[0] + 14 * 8


def test_full_collections_take_a_bounded_share_of_the_time():
    now, collected = 0.0, []

    def collect():
        nonlocal now
        collected.append(now)
        now += 0.1

    before = gc.get_threshold(), gc.get_freeze_count()
    c = garbage.Collector(lambda: now, collect)
    c.start()
    c.start()
    try:
        assert gc.get_threshold()[2] == garbage.NEVER and gc.get_freeze_count() > before[1]
        while now < 1000:
            now += 0.02
            c.turn(busy=True)
        assert 5 < len(collected) - 1 <= now / garbage.PERIOD / 0.1
        while now < 1100:
            now += 0.02
            c.turn(busy=False)
        assert len(collected) > 40
    finally:
        c.stop()
        c.stop()
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_waste_of_lognormal_lengths_is_under_four_percent():
    rng = np.random.default_rng(5)
    sigma = 0.8
    lengths = rng.lognormal(np.log(512) - sigma**2 / 2, sigma, 96).astype(int).clip(20, 2000)
    w = world(rows=32, blocks=2048, max_len=2048, budget=4096)
    w.device.ledger = None  # comparing the whole index after each of 2,000 steps takes a minute
    waste = []
    w.audit = lambda: None
    for i, n in enumerate(lengths.tolist()):
        out = min(n // 4 + 1, 60)
        w.submit(request(f"r{i}", tokens(n - out, i), stop=Stop(max_tokens=out, ignore_eos=True)))
    while w.tick():
        if w.host.running:
            waste.append(planning.gauges(w.host).kv_waste)
            by_hand = [r.path.length for r in w.host.running]
            need, have = sum(by_hand), 16 * sum(-(-n // 16) for n in by_hand)
            assert waste[-1] == pytest.approx((have - need) / have)
    assert 350 < lengths.mean() < 700
    assert 0 < np.mean(waste) < 0.04


def test_an_extension_that_is_sent_back_begins_again():
    """Its logits come once. An urgent request takes its row while it is half computed."""
    w = world(rows=1, budget=16, max_len=100)
    w.extend("x", None, 0, tokens(60).tolist(), prompt_len=1, sampling=Sampling(), seed=5, wish="all")
    w.tick()
    w.tick()
    assert len(w.extensions["x"].logits) == 2
    w.submit(request("urgent", tokens(5, 1), priority=-1))
    run = w.extensions["x"]
    while w.tick():
        pass
    assert run.preemptions == 1 and w.extended == 1
    w.extend("y", "x", 37, tokens(9).tolist(), prompt_len=1, sampling=None, seed=5, wish="last")
    while w.tick():
        pass
    assert w.extended == 2 and w.paths["y"][0].length == 46
    for name in list(w.paths):
        w.let_go(name)
    w.drain()


def test_an_extension_that_keeps_what_it_computes_again_is_caught(monkeypatch):
    logits_twice(monkeypatch)
    with pytest.raises(AssertionError):
        test_an_extension_that_is_sent_back_begins_again()


# --- random traces ----------------------------------------------------------------------------------------------------


@st.composite
def traces(draw):
    """Sizes of a world, and what happens at which tick."""
    max_len = draw(st.integers(40, 110))
    sizes = {
        "depth": draw(st.integers(0, 1)),
        "rows": draw(st.integers(1, 5)),
        "max_len": max_len,
        "blocks": 1 + draw(st.integers(-(-max_len // 16), 14)),
        "host_slots": draw(st.sampled_from([0, 3, 20])),
        "caching": draw(st.booleans()),
        "chunked": draw(st.integers(0, 3)) > 0,
        **draw(st.sampled_from([RECOMPUTE, SWAP, {}])),
    }
    sizes["budget"] = draw(st.integers(sizes["rows"], 64))
    sizes["fail_at"] = draw(st.sampled_from([(), (), (), (2,), (5,), (1, 9)]))
    events = []
    for i in range(draw(st.integers(1, 9))):
        shared = draw(st.integers(0, 3))
        own = draw(st.integers(0 if shared else 1, 20))
        prompt = np.concatenate([tokens(16 * shared, 1000), tokens(own, draw(st.integers(0, 3)))])
        prompt = prompt[: max_len - 1]
        most = draw(st.one_of(st.none(), st.integers(0, 40)))
        stop = Stop(
            max_tokens=most,
            min_tokens=draw(st.integers(0, min(5, most or 0))) if len(prompt) + 5 < max_len else 0,
            ids=draw(st.sampled_from([(), (8,), (9, 40)])),
            ignore_eos=draw(st.booleans()),
        )
        r = request(
            f"r{i}",
            prompt,
            stop=stop,
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=draw(st.integers(0, 50)),
            n=draw(st.sampled_from([1, 1, 1, 2, 4])),
            priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
            logprobs=draw(st.sampled_from([None, None, 0, 2])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
            guide=draw(st.sampled_from([None, None, Rule(1, 97), Rule(2, 97)])),
        )
        at = draw(st.integers(0, 40))
        events.append((at, i, "submit", r))
        if draw(st.integers(0, 4)) == 0:
            events.append((at + draw(st.integers(0, 20)), i, "abort", r.id))
    sizes["guesses"] = draw(st.sampled_from([0, 0, 1, 3, 9]))
    for i in range(draw(st.sampled_from([0, 0, 4, 16]))):
        at, id = draw(st.integers(0, 40)), f"x{draw(st.integers(0, 3))}"
        what = {
            "of": draw(st.sampled_from([None, None, None, "x0", "x1", "x2", "x3"])),
            "cut": draw(st.integers(0, 60)),
            "new": tokens(draw(st.integers(1, 60)), 1000).tolist(),
            "prompt_len": 1,
            "sampling": draw(st.sampled_from([None, Sampling(temperature=0.0), Sampling()])),
            "seed": 5,
            "wish": draw(st.sampled_from([None, "last", "all"])),
            "likeliest": draw(st.sampled_from([0, 0, 3])),
        }
        events.append((at, 100 + i, "extend", (id, what)))
        if draw(st.integers(0, 2)) == 0:
            events.append((at + draw(st.integers(0, 20)), 100 + i, "let go", id))
    return sizes, sorted(events, key=lambda e: (e[0], e[1], e[2] == "abort"))


def guesser(most: int, policy):
    """A drafter that is right for a while, drawn from the run's length, and then wrong or at its end."""
    known: dict[int, tuple[int, ...]] = {}

    def guess(run) -> tuple[int, ...]:
        if id(run) not in known:
            seed = run.request.sampling.seed
            known[id(run)] = expected(run.request, run.index, seed, run.max_tokens, policy).tokens
        rng = np.random.default_rng(run.known)
        right, wrong = rng.integers(0, most + 1), rng.integers(0, 3)
        return (*known[id(run)][run.generated : run.generated + right], *rng.integers(0, 97, wrong).tolist())

    return guess


def play(trace) -> World:
    """Runs a trace to its end, checking what must hold of every one."""
    sizes, events = trace
    sizes = dict(sizes)
    guesses = sizes.pop("guesses")
    w = world(**sizes)
    if guesses:
        w.drafter, w.jointly = guesser(guesses, w.host.policy), sizes["max_len"] % 2 > 0
    if w.device.fail_at:
        w.device.ledger = None  # from a fault to its commit the index names blocks that hold something else
    todo = list(events)
    reached: dict[int, float] = {}

    def in_order(planned) -> None:
        """Nobody is scheduled for the first time while someone before it has been waiting for that since earlier."""
        step = planned.input
        assert len(step.row) <= sizes["rows"]
        if sizes["chunked"]:
            assert len(step.token) <= sizes["budget"]
        if step.swap_in is not None:
            # A step writes host slots before it reads any, so what it reads must not be given out again in its plan.
            assert not set(step.swap_in[:, 0].tolist()) & set(w.host.free_slots), "a slot that is being read is free"
        for run in planned.runs:
            reached.setdefault(id(run), w.now)
        new = [r for r in planned.runs if r.scheduled == w.now and r.base is None]
        for run in new:
            behind = [r for r in w.runs if not r.ended and r.key < run.key and id(r) not in reached]
            # One that waits for the state of its prompt may be: somebody in the step computes it.
            assert all(planning._comes(w.host, r) for r in behind), "a run was overtaken"

    w.watch = in_order
    while todo or w.host.requests or w.flight:
        while todo and todo[0][0] <= w.now:
            _, _, what, value = todo.pop(0)
            if what == "submit":
                w.submit(value)
            elif what == "abort":
                w.abort(value)
            elif what == "extend":
                w.extend(value[0], **value[1])
            else:
                w.let_go(value)
        if not w.tick() and w.host.requests:  # blocks that callers hold are waited for
            for name in list(w.extensions):
                w.give_up(name)
            for name in list(w.paths):
                w.let_go(name)
        assert w.now < 5000, "no progress"
    for name in list(w.paths):
        w.let_go(name)
    w.drain()
    w.device.check_index(w.host.ledger)
    for run in w.runs:
        assert run.ended
        w.verify(run)
        assert (run.generated, run.row, run.inflight, run.slots) == (len(w.records[id(run)].tokens), -1, 0, ())
    return w


LAWS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@settings(max_examples=150, **LAWS)
@given(traces())
def test_every_trace_gives_everyone_their_own_tokens(trace):
    play(trace)


def test_random_traces_have_drafts_and_extensions_in_them():
    """What the traces are for: drafts right and wrong, in rounds, too, extensions of held paths."""
    seen = {"proposed": 0, "accepted": 0, "extended": 0, "rounds": 0}

    @settings(max_examples=60, derandomize=True, database=None, phases=[Phase.generate], **LAWS)
    @given(traces())
    def game(trace):
        w = play(crowded(trace))
        seen["proposed"] += w.proposed
        seen["accepted"] += w.accepted
        seen["extended"] += w.extended
        seen["rounds"] += w.rounds

    game()
    assert seen["rounds"] > 20, seen
    assert seen["proposed"] > seen["accepted"] + 100 > 200 and seen["extended"] > 30, seen


# --- mutants ----------------------------------------------------------------------------------------------------------


def keep_dropped(monkeypatch):
    """A commit that takes the token of a run that ended while it was in flight."""
    real = committing.landed

    def landed(host, run):
        real(host, run)
        if run.finish == "stop":
            run.status = "running"

    monkeypatch.setattr(committing, "landed", landed)


def forget_growth(monkeypatch):
    """A plan that does not tell the device of new blocks."""
    real = planning.pack

    def pack(draft, leaving):
        draft.grow.clear()
        return real(draft, leaving)

    monkeypatch.setattr(planning, "pack", pack)


def forget_swap_in(monkeypatch):
    """A plan that resumes a run without bringing its KV back."""
    real = planning.pack

    def pack(draft, leaving):
        draft.swap_in.clear()
        return real(draft, leaving)

    monkeypatch.setattr(planning, "pack", pack)


def slots_at_once(monkeypatch):
    """Host slots that are handed out again in the step that reads them."""
    real = planning._admit

    def admit(host, walk, run, now, *, urgent):
        done = real(host, walk, run, now, urgent=urgent)
        host.free_slots += host.resting_slots
        host.resting_slots.clear()
        return done

    monkeypatch.setattr(planning, "_admit", admit)


def leak_on_preemption(monkeypatch):
    """A preemption that keeps its blocks."""
    real = running._release

    def release(host, run):
        if run.preemptions == 0 and not run.ended:
            host.ledger.share(run.path)
        real(host, run)

    monkeypatch.setattr(running, "_release", release)


def resume_at_once(monkeypatch):
    """A preempted run that is admitted again before its token in flight was read."""
    real = planning._admit

    def admit(host, walk, run, now, *, urgent):
        if run.inflight:
            kept, run.inflight, run.total = run.inflight, 0, run.known
            done = real(host, walk, run, now, urgent=urgent)
            run.inflight += kept
            return done
        return real(host, walk, run, now, urgent=urgent)

    monkeypatch.setattr(planning, "_admit", admit)


def never_unpublish(monkeypatch):
    """A fault that leaves what its step should have written in the index."""
    monkeypatch.setattr(Ledger, "unpublish", lambda ledger, path, from_length: set())


def publish_unknown(monkeypatch):
    """A plan that publishes blocks whose newest token is not known yet."""
    real = planning._generate

    def generate(ledger, walk, run):
        done = real(ledger, walk, run)
        if done and run.path.length % 16 == 0:
            known = np.zeros(run.path.length, np.int32)
            known[: run.known] = run.tokens[: run.path.length][: run.known]
            ledger.publish(run.path, known)
        return done

    monkeypatch.setattr(planning, "_generate", generate)


def save_drafts(monkeypatch):
    """A swap that keeps the KV of a draft in flight as if it were right."""
    real = running.preempt

    def preempt(host, run):
        run.drafted, kept = 0, run.drafted
        real(host, run)
        run.drafted = kept

    monkeypatch.setattr(planning, "preempt", preempt)


def crowded(trace):
    """The trace in a pool that is hardly large enough, with a step in flight, swaps and drafts."""
    sizes, events = trace
    least = 2 + -(-sizes["max_len"] // 16)
    tight = {"depth": 1, "host_slots": 20, "guesses": 3, "blocks": least, "rows": 5, "budget": 32, "fail_at": ()}
    return {**sizes, **SWAP, **tight}, events


def keep_wrong_drafts(monkeypatch):
    """A commit that leaves the KV of a wrong draft in the path."""
    monkeypatch.setattr(Ledger, "cut", lambda ledger, path, n: ledger.share(path))


def logits_twice(monkeypatch):
    """A preempted extension that keeps the logits of what it computes again."""
    real = running.preempt

    def preempt(host, run):
        kept = list(run.logits)
        real(host, run)
        run.logits += kept

    monkeypatch.setattr(planning, "preempt", preempt)


def shift_masks(monkeypatch):
    """A step that gives each row its neighbour's mask."""
    real = packing._mask
    monkeypatch.setattr(packing, "_mask", lambda *args: np.roll(real(*args), 1, 0))


def guess_freely(monkeypatch):
    """A draft that goes on under the mask of its first token."""
    real = guiding.guess

    def guess(run, draft):
        real(run, draft)
        if run.masks is not None:
            run.masks = np.repeat(run.masks[:1], len(run.masks), 0)

    monkeypatch.setattr(guiding, "guess", guess)


def draft_anywhere(monkeypatch):
    """A round of drafts that does not tell the device where they may lie."""
    real = ahead.Ahead
    monkeypatch.setattr(ahead, "Ahead", lambda **k: real(**{**k, "grow": k["grow"][:0]}))


def follow_too_far(monkeypatch):
    """A round of drafts that takes the newest token for seen, whose KV lies in a lent block."""
    real = Ledger.followed
    monkeypatch.setattr(Ledger, "followed", lambda ledger, path: (real(ledger, path) + 1) // 16 * 16)


def impatient(monkeypatch):
    """A guided run that goes on from a token that nobody has read."""
    real = guiding.begin

    def begin(run, guide, mask_W):
        real(run, guide, mask_W)
        run.patient = False

    monkeypatch.setattr(guiding, "begin", begin)


@pytest.mark.parametrize(
    "mutant",
    [
        shift_masks,
        guess_freely,
        draft_anywhere,
        follow_too_far,
        impatient,
        save_drafts,
        keep_wrong_drafts,
        keep_dropped,
        forget_growth,
        forget_swap_in,
        slots_at_once,
        leak_on_preemption,
        resume_at_once,
        publish_unknown,
        never_unpublish,
    ],
)
def test_broken_schedulers_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    change = crowded if mutant in (save_drafts, guess_freely, impatient) else (lambda trace: trace)

    @settings(max_examples=200, derandomize=True, database=None, phases=[Phase.generate], **LAWS)
    @given(traces())
    def game(trace):
        play(change(trace))

    with pytest.raises((AssertionError, IndexError, KeyError, ExceptionGroup)):
        game()
