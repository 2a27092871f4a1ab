"""Strategies side by side: what they wait for at once is one step."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import decoding
from fnengine.decoding import (
    Job,
    beam,
    best_of,
    contrastive,
    forced,
    guided,
    sample,
)
from fnengine.host.request import Stop
from tests.strategies.setting import (
    DRAWN,
    PROMPT,
    PROMPTS,
    conserved,
    greedy,
    greedy_tokens,
    one,
)

# --- many at once -----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(rt, monkeypatch):
    """(pairs, logits) of each call of `extend`."""
    seen, honest = [], rt.extend

    def extend(pairs, *tokens, **kw):
        if not tokens:
            seen.append((len(pairs), kw.get("logits")))
        return honest(pairs, *tokens, **kw)

    monkeypatch.setattr(rt, "extend", extend)
    return seen


def test_what_all_wait_for_is_one_call(rt, calls):
    """Law: strategies in lockstep cost as many calls as one of them."""
    got = decoding.run(rt, [Job(greedy, p) for p in PROMPTS])
    assert calls == [(6, "last")] * 12
    assert [d.tokens for d in got] == [greedy_tokens(p) for p in PROMPTS]


def test_strategies_compute_without_helpers_of_their_own(rt):
    """Oracle: OpenMP's number of threads, of the strategies' thread, of the caller's, and of one that begins later."""
    seen = []

    @fn.strategy
    async def counts(ctx, prompt):
        await ctx.extend(ctx.empty, prompt)
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one(rt, counts)
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 2]


def test_calls_that_want_different_logits_are_shared_where_that_is_cheap(rt, calls):
    """Oracle: the same extends one by one, bit by bit."""
    results = {}

    @fn.strategy
    async def ask(ctx, prompt, name, **kw):
        seq, _ = await ctx.extend(ctx.empty, prompt, logits=None)
        await asyncio.sleep(0)
        results[name] = (await ctx.extend(seq, [7, 8], **kw))[1:]
        results[name + " pair"] = [r[1:] for r in await ctx.extend([(seq, [7]), (seq, [8, 9])], **kw)]

    kinds = {
        "last": {},
        "all": {"logits": "all"},
        "none": {"logits": None},
        "token": {"sample": DRAWN},
        "both": {"sample": DRAWN, "logits": "last"},
    }
    done = decoding.run(rt, [(ask, PROMPT, {"name": k, **kw}) for k, kw in kinds.items()])
    assert [d.error for d in done] == [None] * 5
    # 10 pairs in the last round, 8 rows in a step: one ask goes into a call of its own.
    assert calls == [(5, None), (5, "all"), (8, "all"), (2, "last")]
    seq, _ = rt.extend(rt.empty, PROMPT)
    for name, kw in kinds.items():
        wanted = [rt.extend(seq, [7, 8], **kw)[1:]] + [r[1:] for r in rt.extend([(seq, [7]), (seq, [8, 9])], **kw)]
        for got, want in zip([results[name], *results[name + " pair"]], wanted, strict=True):
            assert len(got) == len(want)
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g, w) if isinstance(w, torch.Tensor) else g == w


def test_a_fresh_prompt_still_finds_its_prefix_beside_a_call_that_wants_all(rt, calls):
    """Law: the prefix cache is asked for every call that may be; a call with all logits may not."""

    @fn.strategy
    async def whole(ctx, prompt):
        await ctx.extend(ctx.empty, prompt, logits="all")

    decoding.run(rt, [Job(greedy, PROMPTS[1], {"n": 1}), Job(whole, PROMPTS[2])])
    assert sorted(c[1] for c in calls) == ["all", "last"]


def test_different_strategies_in_one_run_are_what_they_are_alone(rt):
    """Oracle: each by itself."""
    stop = Stop(max_tokens=9, ignore_eos=True)
    jobs = [
        Job(sample, PROMPTS[0], {}, DRAWN, stop),
        Job(beam, PROMPTS[1], {"width": 3}, stop=stop),
        Job(guided, PROMPTS[2], {"scale": 2.0}, DRAWN, stop),
        Job(best_of, PROMPTS[3], {"n": 3}, DRAWN, stop),
        Job(forced, PROMPTS[4], {"continuation": PROMPTS[5]}, stop=stop),
        Job(contrastive, PROMPTS[5], {}, DRAWN, stop),
    ]
    together = decoding.run(rt, jobs)
    assert all(d.error is None for d in together)
    assert together == [decoding.run(rt, [job])[0] for job in jobs]
    assert together == decoding.run(rt, jobs, at_once=2)


def test_tasks_of_a_strategy_share_its_rounds_and_end_with_it(rt, calls):
    """Law: `asyncio.gather` of branches is one call a round; what is left running is ended."""
    left = []

    async def forever():
        try:
            await asyncio.sleep(1000)
        finally:
            left.append("ended")

    @fn.strategy
    async def branches(ctx, prompt):
        seq, _ = await ctx.extend(ctx.empty, prompt)
        left.append(asyncio.create_task(forever()))
        await asyncio.gather(*(ctx.extend(seq, [t]) for t in (4, 5, 6)))
        ctx.emit([3])

    (done,) = decoding.run(rt, [(branches, PROMPT)])
    assert (done.tokens, done.finish, done.error) == ((3,), "stop", None)
    assert calls == [(1, "last"), (3, "last")] and left[1:] == ["ended"]


def test_what_is_emitted_is_streamed_in_order_to_the_callers_thread(rt):
    """Law: parts come in order, before the end, in the thread that called `run`."""
    seen = {0: [], 1: []}
    counts = []

    def on_emit(part):
        assert threading.current_thread() is threading.main_thread()
        seen[part.index] += part.tokens
        counts.append(len(seen[0]))

    done = decoding.run(rt, [(greedy, PROMPTS[0]), (greedy, PROMPTS[1], {"n": 3})], on_emit=on_emit)
    assert [tuple(seen[i]) for i in (0, 1)] == [d.tokens for d in done]
    assert len(set(counts)) > 3


def test_a_fork_of_4k_tokens_copies_at_most_one_block(model):
    """Law: counted in the steps themselves."""
    long = dataclasses.replace(model, spec=dataclasses.replace(model.spec, max_len=8192))
    rt = fn.Runtime(long, max_model_len=4160, kv_cache_memory_bytes=1 << 24, enforce_eager=True)
    copies, honest, free = [], rt._device.launch, []

    def launch(step):
        copies.append(len(step.copy))
        return honest(step)

    rt._device.launch = launch

    @fn.strategy
    async def fork(ctx, prompt):
        seq, _ = await ctx.extend(ctx.empty, prompt, logits=None)
        free.append(rt.free_blocks)
        copies.clear()
        a, b = await ctx.extend([(seq, [5]), (seq, [6])])
        free.append(rt.free_blocks)
        assert a[0].tokens[-1] == 5 and b[0].tokens[-1] == 6

    (done,) = decoding.run(rt, [(fork, np.random.default_rng(8).integers(3, 120, 4100).tolist())])
    assert done.error is None and copies == [1] and free[0] - free[1] == 1
    conserved(rt)
