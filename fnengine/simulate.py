"""What the scheduler would do with a trace of arrivals: its steps and their times, with nothing computed.

The scheduler is the engine's own (`host.plan`, `host.commit`), turned as `Engine.turn` turns it. The device gives token
0 for everything, and a virtual clock goes on by what a cost model says of each step:

    depth 0   plan n, wait for n, commit n, plan n + 1, ...
    depth 1   plan n + 1 while n runs, wait for n, commit n; the device goes from step to step without a pause

Planning costs `host_seconds` a step, arrivals are submitted at the first plan after them, and all of it is the same
whenever it is run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fnengine.arrivals import Arrival, Trace
from fnengine.errors import QueueFull, RequestError
from fnengine.host import commit as committing
from fnengine.host import plan as planning
from fnengine.host.blocks import Ledger
from fnengine.host.plan import Host, Planned, Policy
from fnengine.host.request import Request, Sampling, Stop
from fnengine.host.runs import Run
from fnengine.host.step import BLOCK, StepInput, StepOutput

Seconds = Callable[[int, int], float]
"""(T, R) -> seconds of such a step on the device."""


@dataclass(frozen=True)
class Step:
    """One step of a replay."""

    tokens: int
    """T"""
    rows: int
    """R"""
    at: float
    """When it was planned, in seconds from the first arrival."""
    seconds: float
    """On the device."""


@dataclass(frozen=True)
class Answer:
    """What became of one request. Seconds."""

    arrival: float
    first: float
    """From its arrival to its first token."""
    whole: float
    """From its arrival to its last token."""
    tokens: int


@dataclass(frozen=True)
class Replay:
    """A trace, replayed."""

    steps: tuple[Step, ...]
    answers: tuple[Answer, ...]
    """In order of arrival; without those that were refused."""
    refused: int
    why: str | None
    """Of the first that was refused."""
    preemptions: int
    seconds: float
    """From the first arrival to the last token."""

    @property
    def counts(self) -> Counter[tuple[int, int]]:
        """Steps by (T, R)."""
        return Counter((s.tokens, s.rows) for s in self.steps)


def requests(trace: Trace, vocab: int, seed: int = 0) -> tuple[Request, ...]:
    """The requests of a trace: random tokens after the common prefix, greedy, as long as the trace says."""
    most = max((a.prefix for a in trace), default=0)
    rng = np.random.default_rng(seed)
    common = rng.integers(0, vocab, most, np.int32)

    def one(i: int, a: Arrival) -> Request:
        own = rng.integers(0, vocab, a.prompt - a.prefix, np.int32)
        return Request(
            id=f"replay-{i}",
            prompt=np.concatenate([common[: a.prefix], own]),
            sampling=Sampling(temperature=0.0, seed=0),
            stop=Stop(max_tokens=a.output, ignore_eos=True),
        )

    return tuple(one(i, a) for i, a in enumerate(trace))


def replay(
    trace: Trace,
    policy: Policy,
    seconds: Seconds,
    *,
    blocks: int,
    depth: int = 0,
    host_slots: int = 0,
    host_seconds: float = 0.0,
    seed: int = 0,
) -> Replay:
    """What a server of these sizes does with the trace.

    Args:
        seconds: the cost model.
        blocks: N of the pool, the null block included.
        depth: steps in flight beside the one that is read, as a device's.
        host_seconds: of planning a step; the device waits for it at depth 0 only.
    """
    host = Host(policy, Ledger(blocks, BLOCK, caching=policy.caching), rows=policy.rows, host_slots=host_slots)
    waiting = deque(zip(trace, requests(trace, policy.vocab, seed), strict=True))
    flight: deque[tuple[Planned, float]] = deque()
    steps: list[Step] = []
    arrived: list[tuple[Arrival, Run]] = []
    refused, why, now, free = 0, None, 0.0, 0.0
    ends: dict[int, float] = {}
    while True:
        while waiting and waiting[0][0].arrival <= now:
            arrival, request = waiting.popleft()
            try:
                arrived.append((arrival, planning.submit(host, request, now)[0]))
            except (RequestError, QueueFull) as e:
                refused, why = refused + 1, why or str(e)
        planned = planning.plan(host, now)
        if planned is not None:
            T, R, began = len(planned.input.token), len(planned.input.row), now
            took = seconds(T, R)
            now += host_seconds
            free = max(free, now) + took
            steps.append(Step(T, R, began, took))
            flight.append((planned, free))
        if flight and (planned is None or len(flight) > depth):
            oldest, done = flight.popleft()
            now = max(now, done)
            for event in committing.commit(host, oldest, _nothing(oldest.input), now):
                if event.finish is not None:
                    ends[id(event.run)] = now
        elif planned is None:
            if not waiting:
                break
            assert not host.running, "the scheduler has nothing to do, yet requests are open"
            now = max(now, waiting[0][0].arrival)
    assert len(ends) == len(arrived) and not host.waiting, "requests are open at the end of a replay"
    answers = tuple(
        Answer(a.arrival, (run.first_token or ends[id(run)]) - a.arrival, ends[id(run)] - a.arrival, run.generated)
        for a, run in arrived
    )
    return Replay(tuple(steps), answers, refused, why, host.preemptions, max(ends.values(), default=0.0))


def _nothing(step: StepInput) -> StepOutput:
    """Token 0 for every row that asks for one."""
    return StepOutput(np.zeros((len(step.row), 1), np.int32), step.emit)
