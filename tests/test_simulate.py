"""Replays of traces. Oracles: the real Engine on the toy device in lock-step, and instances worked by hand."""

from __future__ import annotations

from collections import deque

import pytest

from fnengine.arrivals import Arrival, Synthetic, draw
from fnengine.engine import Engine
from fnengine.host.output import StepFacts
from fnengine.host.plan import Policy
from fnengine.host.step import StepInput, StepOutput
from fnengine.simulate import replay, requests
from tests.text_models import byte_tokenizer
from tests.toy import ToyDevice


def seconds(tokens: int, rows: int) -> float:
    """A cost model for tests: exact in binary, so that clocks agree to the last bit."""
    return (256 + 4 * tokens + rows) / 4096


def policy(**options) -> Policy:
    return Policy(**{"budget": 64, "rows": 6, "queue": 1000, "max_len": 128, "vocab": 97, **options})


class Timed:
    """The toy device, on a clock that reading moves on as the cost model says."""

    def __init__(self, toy: ToyDevice):
        self.toy, self.now, self.free = toy, 0.0, 0.0
        self.depth, self.blocks, self.rows, self.max_len = toy.depth, toy.blocks, toy.rows, toy.max_len
        self.host_slots, self.kept, self.windows = toy.host_slots, toy.kept, toy.windows
        self.launched: list[tuple[int, int, float]] = []

    def launch(self, step: StepInput):
        T, R = len(step.token), len(step.row)
        self.launched.append((T, R, self.now))
        self.free = done = max(self.free, self.now) + seconds(T, R)
        ticket = self.toy.launch(step)

        class Later:
            def read(later) -> StepOutput:
                self.now = max(self.now, done)
                return ticket.read()

        return Later()


def through_the_engine(trace, p: Policy, *, depth: int, blocks: int, host_slots: int = 0) -> Timed:
    """The trace through `Engine`, whose clock is the device's."""
    toy = ToyDevice(depth=depth, blocks=blocks, rows=p.rows, max_len=p.max_len, host_slots=host_slots)
    device = Timed(toy)
    engine = Engine(device, byte_tokenizer(131), p, clock=lambda: device.now)
    facts: list[StepFacts] = []
    engine.on_step.append(facts.append)
    waiting = deque(zip(trace, requests(trace, p.vocab), strict=True))
    while True:
        while waiting and waiting[0][0].arrival <= device.now:
            engine.submit_to(waiting.popleft()[1], lambda delta: None)
        if not engine.turn():
            if not waiting:
                break
            device.now = max(device.now, waiting[0][0].arrival)
    engine.check()
    assert [(f.tokens, f.rows) for f in facts] == [(t, r) for t, r, _ in device.launched]
    return device


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("blocks", "host_slots", "options", "how"),
    [
        (400, 0, {}, {"rate": 2}),
        (400, 0, {}, {"rate": 8, "burst": 5, "prefix": 40}),
        (18, 0, {}, {"rate": 8}),
        (18, 12, {"swap_seconds_per_block": 1e-9}, {"rate": 8}),
        (400, 0, {"chunked": False, "budget": 100}, {"rate": 4}),
        (400, 0, {"caching": False, "budget": 16, "rows": 3}, {"rate": 4, "prefix": 32}),
    ],
    ids=["idle at times", "bursts with a prefix", "preempted", "swapped", "whole prompts", "narrow"],
)
def test_the_steps_are_those_of_the_engine(depth, blocks, host_slots, options, how):
    """Oracle: `Engine` itself, on a device that computes, with the same clock."""
    p = policy(**options)
    trace = draw(Synthetic(requests=40, prompt=30, output=12, longest=60, seed=7, **how))
    device = through_the_engine(trace, p, depth=depth, blocks=blocks, host_slots=host_slots)
    got = replay(trace, p, seconds, blocks=blocks, depth=depth, host_slots=host_slots)
    assert [(s.tokens, s.rows, s.at) for s in got.steps] == device.launched
    assert len(got.answers) == 40 and all(a.tokens == t.output for a, t in zip(got.answers, trace, strict=True))
    assert got == replay(trace, p, seconds, blocks=blocks, depth=depth, host_slots=host_slots), "the same again"
    if blocks < 20:
        assert got.preemptions > 0
    # A mutant that must be caught: a replay at the other depth.
    other = replay(trace, p, seconds, blocks=blocks, depth=1 - depth, host_slots=host_slots)
    assert [(s.tokens, s.rows, s.at) for s in other.steps] != device.launched


def test_one_request_by_hand():
    """20 tokens of prompt, 3 of answer, from 1 s on: one step of (20, 1), two of (1, 1)."""
    got = replay((Arrival(1.0, 20, 3),), policy(), lambda t, r: t / 10, blocks=8, depth=0)
    assert [(s.tokens, s.rows, s.at) for s in got.steps] == [(20, 1, 1.0), (1, 1, 3.0), (1, 1, pytest.approx(3.1))]
    (a,) = got.answers
    assert (a.first, a.whole, a.tokens) == (2.0, pytest.approx(2.2), 3) and got.seconds == pytest.approx(3.2)
    assert got.counts == {(20, 1): 1, (1, 1): 2}


def test_at_depth_one_the_device_does_not_wait_for_the_host():
    """A plan costs as much as a step: one after the other at depth 0, side by side at depth 1."""
    trace = (Arrival(0.0, 4, 50),)
    each = [replay(trace, policy(), lambda t, r: 1.0, blocks=8, depth=d, host_seconds=1.0).seconds for d in (0, 1)]
    assert each == [100.0, 51.0]


def test_what_does_not_fit_is_counted_and_told():
    got = replay((Arrival(0.0, 200, 3), Arrival(0.1, 20, 3)), policy(), seconds, blocks=20)
    assert got.refused == 1 and "200 tokens" in (got.why or "") and len(got.answers) == 1
