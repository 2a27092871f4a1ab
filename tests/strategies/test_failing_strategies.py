"""Strategies that fail, stall or say what they may not are nobody else's problem."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import fnengine as fn
from fnengine import decoding
from fnengine.decoding import (
    Bounds,
    Job,
    beam,
)
from fnengine.decoding.watch import RAISES, RETURNS, STALLS, YIELDS, Watch
from fnengine.errors import ConfigError, ContextLengthError, OutOfBlocks, RequestError, StrategyStalled
from fnengine.host.request import Stop
from tests.strategies.setting import (
    DRAWN,
    PROMPT,
    PROMPTS,
    QUICK,
    broken,
    conserved,
    greedy,
    greedy_tokens,
    small,
)

# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_exception_fails_its_own_strategy_with_its_message(rt):
    """Law: the others go on; what it had emitted and its error are there, its blocks are not."""
    done = decoding.run(rt, [(greedy, PROMPTS[0]), (broken, PROMPTS[1]), (greedy, PROMPTS[2])])
    assert [d.finish for d in done] == ["stop", "error", "stop"] and done[1].tokens == (5, 5)
    assert isinstance(done[1].error, ValueError) and "nobody expected" in str(done[1].error)
    assert [done[i].tokens for i in (0, 2)] == [greedy_tokens(PROMPTS[i]) for i in (0, 2)]
    gc.disable()
    try:  # and without any help of the collector, although the error is kept
        kept = decoding.run(rt, [(broken, PROMPTS[1])])
        conserved(rt)
        assert kept[0].error.__traceback__ is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_strategy_that_wants_to_leave_leaves_alone(rt, error):
    @fn.strategy
    async def leave(ctx, prompt):
        await ctx.extend(ctx.empty, prompt)
        raise error

    done = decoding.run(rt, [(leave, PROMPT), (greedy, PROMPT)])
    assert error.__name__ in str(done[0].error) and done[1].tokens == greedy_tokens(PROMPT)


def test_a_bad_call_is_its_callers_alone(rt):
    """Law: of asks that share a call each gets its own answer."""

    @fn.strategy
    async def wrong(ctx, prompt):
        await ctx.extend(ctx.empty, [10**6])

    @fn.strategy
    async def odd(ctx, prompt):
        await ctx.extend(prompt, [1])

    @fn.strategy
    async def caught(ctx, prompt):
        with pytest.raises(RequestError, match="at least one"):
            await ctx.extend(ctx.empty, [])
        assert await ctx.extend([]) == []
        ctx.emit([3])

    done = decoding.run(rt, [(wrong, PROMPT), (greedy, PROMPT), (odd, PROMPT), (caught, PROMPT)])
    assert "outside the vocabulary" in str(done[0].error) and "no sequence" in str(done[2].error)
    assert done[1].tokens == greedy_tokens(PROMPT) and done[3].tokens == (3,)


def test_exhaustion_reaches_the_strategy_that_asked(model):
    """Law: the others are computed, and who lets go may try again."""
    rt = small(model, 12)

    @fn.strategy
    async def greedy_of_blocks(ctx, prompt):
        held = []
        try:
            while True:
                held.append((await ctx.extend(ctx.empty, [len(held) + 3] * 40))[0])
        except OutOfBlocks as e:
            assert e.needed > e.free
        held.clear()
        seq, _ = await ctx.extend(ctx.empty, prompt)
        ctx.emit([len(seq)])

    @fn.strategy
    async def too_much(ctx, prompt):
        a, _ = await ctx.extend(ctx.empty, [3] * 80)
        b, _ = await ctx.extend(ctx.empty, [4] * 150)
        ctx.emit([len(a), len(b)])

    done = decoding.run(rt, [(greedy_of_blocks, PROMPT), (greedy, PROMPTS[2])])
    assert [d.error for d in done] == [None, None]
    assert done[0].tokens == (len(PROMPT),) and done[1].tokens == greedy_tokens(PROMPTS[2])
    conserved(rt)
    done = decoding.run(rt, [(too_much, PROMPT), (greedy, PROMPTS[2])])
    assert isinstance(done[0].error, OutOfBlocks) and done[1].tokens == greedy_tokens(PROMPTS[2])
    conserved(rt)


def test_cancelling_one_frees_its_blocks_and_disturbs_nobody(rt):
    """Law: blocks are counted while the other one still runs."""
    free: list = []

    def on_emit(part):
        if part.index == 1:
            free.append(rt.free_blocks)
        return part.index == 0 and len(part.tokens) == 1

    @fn.strategy
    async def holds(ctx, prompt):
        seq, _ = await ctx.extend(ctx.empty, prompt * 3)
        try:
            for _ in range(50):
                ctx.emit([4])
                seq, _ = await ctx.extend(seq, [4])
        finally:
            free.append("cleaned up")

    long = Stop(max_tokens=60)
    before = rt.free_blocks
    done = decoding.run(rt, [Job(holds, PROMPT, stop=long), Job(greedy, PROMPTS[2], {"n": 8})], on_emit=on_emit)
    assert (done[0].finish, done[0].tokens, done[0].error) == ("abort", (4,), None)
    assert done[1].tokens == greedy_tokens(PROMPTS[2], 8)
    assert "cleaned up" in free and free[-1] >= before - 1


def test_an_error_of_the_caller_ends_all(rt):
    """Law: what `on_emit` raises comes out of `run`, after every strategy has let go."""

    def on_emit(part):
        raise KeyError("the caller's own")

    threads = threading.active_count()
    with pytest.raises(KeyError, match="own"):
        decoding.run(rt, [(greedy, p) for p in PROMPTS], on_emit=on_emit)
    assert threading.active_count() == threads
    conserved(rt)


@fn.strategy
async def spins(ctx, prompt):
    _seq, _ = await ctx.extend(ctx.empty, prompt)
    while True:
        pass


@fn.strategy
async def swallows(ctx, prompt):
    seq, _ = await ctx.extend(ctx.empty, prompt)
    while len(seq):
        try:
            while True:
                pass
        except Exception:
            pass


@fn.strategy
async def child_spins(ctx, prompt):
    async def spin():
        while True:
            pass

    seq, _ = await ctx.extend(ctx.empty, prompt)
    await asyncio.gather(spin(), ctx.extend(seq, [3]), return_exceptions=True)
    ctx.emit([9])
    await ctx.extend(seq, [3])


@fn.strategy
async def stubborn(ctx, prompt):
    seq, _ = await ctx.extend(ctx.empty, prompt)
    try:
        while len(seq):
            pass
    except BaseException:
        pass
    await ctx.extend(seq, [3])
    ctx.emit([9])


@pytest.mark.parametrize("stalling", [spins, swallows, child_spins, stubborn], ids=lambda s: s.name)
def test_a_strategy_that_never_awaits_is_stopped_and_others_go_on(rt, stalling):
    """Law: StrategyStalled for it, their own tokens for the others, within a few bounds."""
    begun = time.monotonic()
    done = decoding.run(rt, [(greedy, PROMPTS[0]), (stalling, PROMPTS[1]), (greedy, PROMPTS[2])], bounds=QUICK)
    assert isinstance(done[1].error, StrategyStalled) and done[1].finish == "error" and done[1].tokens == ()
    assert "0.5 s without an await" in str(done[1].error)
    assert [done[i].tokens for i in (0, 2)] == [greedy_tokens(PROMPTS[i]) for i in (0, 2)]
    assert time.monotonic() - begun < 20


def test_a_stalled_strategy_is_told_where(rt):
    (done,) = decoding.run(rt, [(spins, PROMPT)], bounds=QUICK)
    lines = Path(__file__).read_text().splitlines()
    line = 1 + next(i for i, s in enumerate(lines) if s.startswith("async def spins"))
    found = re.match(r"test_failing_strategies\.py:(\d+): ", str(done.error))
    assert found and 2 <= int(found[1]) - line <= 3


def test_one_that_awaits_but_does_nothing_is_stopped_too(rt):
    """Law: sleeping or spinning through the loop ends at the idle bound, and does not keep others from their rounds."""

    @fn.strategy
    async def sleeps(ctx, prompt):
        seq, _ = await ctx.extend(ctx.empty, prompt)
        await asyncio.sleep(1000 + len(seq))

    @fn.strategy
    async def yields(ctx, prompt):
        seq, _ = await ctx.extend(ctx.empty, prompt)
        while len(seq):
            await asyncio.sleep(0)

    @fn.strategy
    async def refuses(ctx, prompt):
        while True:
            try:
                await asyncio.sleep(0.01)
                if ctx.seed == 1:
                    return
            except asyncio.CancelledError:
                await ctx.extend(ctx.empty, prompt)

    jobs = [(s, PROMPT) for s in (sleeps, yields, refuses)]
    done = decoding.run(rt, [*jobs, (greedy, PROMPT)], bounds=Bounds(turn=0.4, idle=0.8))
    for d in done[:3]:
        assert isinstance(d.error, StrategyStalled) and "0.8 s" in str(d.error)
    assert done[3].tokens == greedy_tokens(PROMPT)


def test_a_thread_lost_in_native_code_is_given_up(rt):
    """Law: `run` comes back and names the culprit; once the code returns, the thread ends and the blocks are there."""

    @fn.strategy
    async def lost(ctx, prompt):
        seq, _ = await ctx.extend(ctx.empty, prompt)
        time.sleep(2.0 + 0 * len(seq))

    threads = threading.active_count()
    done = decoding.run(rt, [(greedy, PROMPT), (lost, PROMPT)], bounds=Bounds(turn=0.2))
    assert all(isinstance(d.error, StrategyStalled) and "'lost' holds" in str(d.error) for d in done)
    end = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() == threads
    conserved(rt)


class Nobody:
    name = "nobody"
    tasks: set = set()  # noqa: RUF012

    def condemn(self, error):
        raise AssertionError


def test_no_exception_from_outside_gets_past_a_turn():
    """Law: whenever `look` raises, it is heard within the turn that it is meant for, or taken back. Turns of a few
    microseconds under a bound of 0, so that it comes at every place of `turn`. The collector is off: what is raised in
    a callback of it is ignored by Python, reported as such, and raised by the next `look` again."""
    gc.disable()
    watch, kinds, stop = Watch(0.0), Counter(), False

    def looks():
        while not stop:
            watch.look()

    def takes(value):
        if value == 1:
            raise StopIteration(5)
        if value == 2:
            raise KeyError
        return value

    watch.thread = threading.get_ident()
    other = threading.Thread(target=looks)
    other.start()
    try:
        end = time.monotonic() + 1.0
        n = 0
        while time.monotonic() < end:
            n += 1
            kinds[watch.turn(Nobody(), takes, n % 4)[0]] += 1
            for _ in range(20):  # a late one would be heard here
                pass
    finally:
        stop = True
        other.join()
        gc.enable()
    assert set(kinds) <= {YIELDS, RETURNS, RAISES, STALLS} and kinds[STALLS] > 0 and kinds[RETURNS] > 0


# --- what a strategy may say ------------------------------------------------------------------------------------------


def test_the_context_holds_the_requests_facts(rt):
    seen = []

    @fn.strategy
    async def look(ctx, prompt):
        seen.append(ctx)
        assert prompt == PROMPT and len(ctx.empty) == 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            ctx.seed = 3

    stop = Stop(max_tokens=500, ids=(17,))
    jobs = [Job(look, PROMPT, {}, DRAWN, stop), Job(look, PROMPT, {}, DRAWN, Stop(max_tokens=3, ignore_eos=True))]
    assert [d.finish for d in decoding.run(rt, jobs)] == ["stop", "stop"]
    ctx, other = seen
    assert ctx.eos == {2, 17} and other.eos == set()
    assert (ctx.vocab, ctx.max_tokens, other.max_tokens) == (131, 96 - len(PROMPT), 3)
    assert ctx.seed == 21 and ctx.sampling == DRAWN
    assert ctx.decode(ctx.encode(chr(0x4E00 + 9))) == chr(0x4E00 + 9)


@pytest.mark.parametrize(
    ("says", "finish", "error"),
    [
        (lambda ctx: ctx.emit([4] * 16), "length", None),
        (lambda ctx: ctx.emit([4, 2]), "stop", None),
        (lambda ctx: ctx.emit([4]), "stop", None),
        (lambda ctx: ctx.emit([4] * 17), "error", "17 more tokens were emitted, 16 are allowed"),
        (lambda ctx: ctx.emit([131]), "error", "outside the vocabulary"),
        (lambda ctx: "length", "length", None),
        (lambda ctx: "done", "error", "returned 'done'"),
    ],
)
def test_why_a_strategy_ended(rt, says, finish, error):
    @fn.strategy
    async def speak(ctx, prompt):
        return says(ctx)

    (done,) = decoding.run(rt, [(speak, PROMPT)])
    assert done.finish == finish and (error is None) == (done.error is None)
    assert error is None or error in str(done.error)


def test_what_is_no_strategy_is_refused(rt):
    with pytest.raises(ConfigError, match="not an async function"):
        fn.strategy(lambda ctx, prompt: None)
    with pytest.raises(ConfigError, match="context and a prompt"):

        @fn.strategy
        async def alone(ctx):
            pass

    for args, message in (({"widht": 3}, "its arguments are width"), ({"ctx": 3}, "multiple values")):
        with pytest.raises(RequestError, match=message):
            decoding.run(rt, [(beam, PROMPT, args)])
    with pytest.raises(RequestError, match="empty"):
        decoding.run(rt, [(greedy, [])])
    with pytest.raises(ContextLengthError, match="96"):
        decoding.run(rt, [(greedy, [5] * 96)])
    assert decoding.run(rt, []) == []
