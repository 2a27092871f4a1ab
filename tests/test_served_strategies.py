"""Strategies among an engine's requests. Oracle: `decoding.run` over a Runtime, and the engine's own sampling."""

from __future__ import annotations

import asyncio
import itertools
import time

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import decoding
from fnengine.decoding import Bounds, Job
from fnengine.engine import Engine
from fnengine.errors import QueueFull, RequestError
from fnengine.host.request import Request, Sampling, Speculate, Stop
from fnengine.strategies import Strategies
from tests.models import tiny_model
from tests.text_models import byte_tokenizer

NUMBER = itertools.count()
PROMPT = np.random.default_rng(1).integers(3, 120, 37).tolist()
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=21, frequency_penalty=0.5)
SETTINGS = {"max_model_len": 96, "kv_cache_memory_bytes": 1 << 20, "enforce_eager": True, "max_num_seqs": 6}


@fn.strategy
async def raises(ctx, prompt, after=2):
    seq, new = ctx.empty, prompt
    for _ in range(after):
        seq, logits = await ctx.extend(seq, new)
        new = [int(logits.argmax())]
        ctx.emit(new)
    raise ValueError("the strategy's own fault")


@fn.strategy
async def spins(ctx, prompt):
    await ctx.extend(ctx.empty, prompt)
    while True:
        pass


@fn.strategy
async def sleeps(ctx, prompt):
    await ctx.extend(ctx.empty, prompt)
    await asyncio.sleep(60)


@fn.strategy
async def hoards(ctx, prompt):
    """Holds on to every sequence that it makes."""
    held = []
    for i in itertools.count():
        held.append((await ctx.extend(ctx.empty, [(i + j) % 100 for j in range(80)], logits=None))[0])
        ctx.emit([5])


@fn.strategy
async def cuts(ctx, prompt, rounds=6):
    """Verifies wrong guesses, cuts them off, and scores all tokens: forks, cuts, all logits, taps of many rows."""
    seq, logits = await ctx.extend(ctx.empty, prompt, logits="all")
    for _ in range(rounds):
        token = int(logits[-1].argmax())
        ctx.emit([token])
        wrong = [(token + 1) % 131, 7]
        pairs = [(seq, [token, *wrong]), (seq[: len(seq) - 3], [9, 9]), (seq, [token])]
        (long, logits, inside), _, (short, _, again) = await ctx.extend(pairs, logits="all", taps=("final",))
        assert (inside["final"][0] == again["final"][0]).all() and len(inside["final"]) == 3
        seq = long[: len(long) - 2]
        assert seq.tokens == short.tokens
        logits = logits[:1]


@fn.strategy
async def ponders(ctx, prompt):
    """Takes 5 ms to think about each token."""
    seq, new = ctx.empty, prompt
    for _ in range(ctx.max_tokens):
        seq, logits = await ctx.extend(seq, new)
        time.sleep(0.005)
        new = [int(logits.argmax())]
        ctx.emit(new)


MINE = (raises, spins, sleeps, hoards, cuts, ponders)


def build(**options) -> Engine:
    strategies = (*decoding.SHIPPED.values(), *MINE)
    model = tiny_model("qwen3", "float32")
    return Engine.build(model, tokenizer=byte_tokenizer(131), strategies=strategies, **{**SETTINGS, **options})


@pytest.fixture(scope="module", params=[False, True], ids=["depth 0", "depth 1"])
def engine(request):
    e = build(graph_twin=request.param, bounds=Bounds(turn=0.5, idle=20.0))
    yield e
    if e._stage is not None:
        e._stage.close()


def ask(name=None, args=None, sampling=SAMPLED, **kw) -> Request:
    stop = kw.pop("stop", None) or Stop(max_tokens=kw.pop("max_tokens", 12), ignore_eos=True)
    prompt = np.array(kw.pop("prompt", PROMPT), np.int32)
    strategy = None if name is None else (name, args or {})
    return Request(f"s{next(NUMBER)}", prompt, sampling, stop, strategy=strategy, **kw)


def run(e: Engine, *requests: Request) -> list[list[list]]:
    """Deltas by request and choice."""
    deltas = [[[] for _ in range(r.n)] for r in requests]
    for i, r in enumerate(requests):
        e.submit_to(r, lambda d, i=i: deltas[i][d.index].append(d))
    end = time.monotonic() + 60
    while e.turn():
        assert time.monotonic() < end, "no progress"
    settled(e)
    return deltas


def test_a_served_strategy_computes_without_helpers_of_its_own():
    """Oracle: OpenMP's number of threads, of the strategies' thread and of the engine's."""
    seen = []

    @fn.strategy
    async def counts(ctx, prompt):
        seen.append(torch.get_num_threads())
        ctx.emit([5])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, tokenizer = tiny_model("qwen3", "float32"), byte_tokenizer(131)
        e = Engine.build(model, tokenizer=tokenizer, strategies=[counts], **SETTINGS)
        run(e, ask("counts"))
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


def settled(e: Engine) -> None:
    """Nothing is left of anybody: no block, no row, no request."""
    end = time.monotonic() + 10
    while e.host.ledger.held and time.monotonic() < end:
        e.turn()
        if e._stage is not None:
            e._stage.hear()
            with e._books:
                e._stage.runtime.drain()
    e.host.check()
    assert e.gauges().blocks_held == 0 and not e.host.requests and not e._live
    assert e._stage is None or not (e._stage.guests or e._stage._extends)


def tokens(deltas) -> list[int]:
    return [t for d in deltas for t in d.tokens]


def offline(name, args=None, sampling=SAMPLED, n=12) -> list[int]:
    rt = fn.Runtime(tiny_model("qwen3", "float32"), **SETTINGS)
    stop = Stop(max_tokens=n, ignore_eos=True)
    strategy = {**decoding.SHIPPED, **{s.name: s for s in MINE}}[name]
    (outcome,) = decoding.run(rt, [Job(strategy, PROMPT, args or {}, sampling, stop)], eos=())
    if outcome.error is not None:
        raise outcome.error
    return list(outcome.tokens)


WAYS = [
    ("sample", {}),
    ("beam", {"width": 3}),
    ("best_of", {"n": 3}),
    ("guided", {"negative": PROMPT[:5], "scale": 1.5}),
    ("forced", {"continuation": PROMPT[5:12]}),
    ("cuts", {}),
]


@pytest.mark.parametrize("name, args", WAYS, ids=[w[0] for w in WAYS])
def test_a_strategy_gives_what_it_gives_over_a_runtime(engine, name, args):
    ((deltas,),) = run(engine, ask(name, args))
    assert deltas[-1].finish in ("stop", "length"), deltas[-1]
    assert tokens(deltas) == offline(name, args)
    assert deltas[-1].usage.completion == len(tokens(deltas))


def test_strategies_and_requests_share_steps_and_disturb_nobody(engine):
    (alone,) = run(engine, ask())
    before = engine.gauges().steps
    several = run(engine, ask(), ask("sample"), ask("beam", {"width": 2}), ask("sample", n=2), ask(prompt=PROMPT[:9]))
    assert tokens(several[0][0]) == tokens(alone[0]) == tokens(several[1][0]) == tokens(several[3][0])
    assert tokens(several[2][0]) == offline("beam", {"width": 2})
    assert tokens(several[3][1]) != tokens(several[3][0])
    # Seven sequences of twelve tokens each, and one step for the prompts, take eighty steps apart.
    assert engine.gauges().steps - before < 60


def test_text_stop_strings_and_ids(engine):
    (plain,) = run(engine, ask())
    whole = "".join(d.text for d in plain[0])
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    for stop in (Stop(max_tokens=12, strings=(middle,)), Stop(max_tokens=12, ids=(tokens(plain[0])[6],))):
        a, b = run(engine, ask(stop=stop), ask("sample", stop=stop))
        assert "".join(d.text for d in a[0]) == "".join(d.text for d in b[0])
        assert (
            (a[0][-1].finish, a[0][-1].stop_reason)
            == (b[0][-1].finish, b[0][-1].stop_reason)
            == ("stop", stop.strings[0] if stop.strings else stop.ids[0])
        )


def test_an_exception_fails_that_request_alone_and_says_what(engine):
    bad, good, other = run(engine, ask("raises"), ask(), ask("sample"))
    assert bad[0][-1].finish == "error" and "the strategy's own fault" in bad[0][-1].error
    assert len(tokens(bad[0])) == 2
    assert tokens(good[0]) == tokens(other[0]) and len(tokens(good[0])) == 12


def test_one_that_never_yields_is_stopped_and_holds_no_request_up(engine):
    """Time stands still, so that it spins until the request beside it has ended; then its bound passes. Strategies
    share its thread: they wait until it is stopped, and go on."""
    run(engine, ask("sample"))  # now there is a stage
    watch, now, end = engine._stage.watch, time.monotonic(), time.monotonic() + 60
    watch.clock = lambda: now
    try:
        got = {name: [] for name in ("spins", "plain", "sample")}
        for name, put in got.items():
            engine.submit_to(ask(None if name == "plain" else name), put.append)
        while not (got["plain"] and got["plain"][-1].finish and watch._now and watch._now.owner.name == "spins"):
            engine.turn()
            assert time.monotonic() < end, "no progress beside it"
        assert len(tokens(got["plain"])) == 12 and not got["spins"]
        now += engine.bounds.turn + 0.1
        while engine.turn():
            assert time.monotonic() < end, "it was not stopped"
    finally:
        watch.clock = time.monotonic
    settled(engine)
    last = got["spins"][-1]
    assert last.finish == "error" and "computed for more than 0.5 s without an await" in last.error
    assert tokens(got["sample"]) == tokens(got["plain"])


def test_abort_frees_blocks_wherever_it_stands(engine):
    for name in ("sleeps", "cuts", "beam", "spins"):
        r, got = ask(name), []
        engine.submit_to(r, got.append)
        for _ in range(4):
            engine.turn()
        engine.abort(r.id)
        settled(engine)
        assert not got or got[-1].finish is None
    (after,) = run(engine, ask("sample"))
    assert len(tokens(after[0])) == 12


def test_when_the_pool_is_held_the_one_that_asks_is_told(engine):
    (bad,), (good,) = run(engine, ask("hoards", max_tokens=90)), run(engine, ask("sample"))
    assert bad[0][-1].finish == "error" and "KV blocks needed" in bad[0][-1].error
    assert len(tokens(good[0])) == 12


def test_a_hoarder_gives_way_to_a_request_that_waits(engine):
    bad, good = run(engine, ask("hoards", max_tokens=90), ask(prompt=(PROMPT * 3)[:80], max_tokens=10))
    assert bad[0][-1].finish == "error" and len(tokens(good[0])) == 10


def test_what_a_request_may_not_ask_of_a_strategy(engine):
    for field, kw in {
        "logprobs": {"logprobs": 1},
        "prompt_logprobs": {"prompt_logprobs": 0},
        "min_tokens": {"stop": Stop(max_tokens=5, min_tokens=2)},
        "speculative": {"speculate": Speculate()},
    }.items():
        with pytest.raises(RequestError, match=f"{field} cannot be asked of a strategy"):
            engine.submit_to(ask("sample", **kw), print)
    with pytest.raises(RequestError, match=r"no strategy is called 'magic' here.*beam"):
        engine.submit_to(ask("magic"), print)
    with pytest.raises(RequestError, match=r"strategy 'beam'.*hight"):
        engine.submit_to(ask("beam", {"hight": 3}), print)
    assert not engine._live


@pytest.mark.parametrize("want, taps, word", [("all", (), "logits take more"), (None, ("final",), "taps of 37 tokens")])
def test_what_takes_too_much_room_is_refused_here_as_by_a_runtime(engine, monkeypatch, want, taps, word):
    @fn.strategy
    async def greedy(ctx, prompt):
        await ctx.extend(ctx.empty, prompt, logits=want, taps=taps)

    monkeypatch.setitem(engine.strategies, "greedy", greedy)
    monkeypatch.setattr("fnengine.runtime.ALL_LOGITS_BYTES", 1000)
    (bad,) = run(engine, ask("greedy"))
    assert bad[0][-1].finish == "error" and word in bad[0][-1].error


def test_a_full_queue_is_said():
    e = build(max_queue=2)
    with pytest.raises(QueueFull):
        e.submit_to(ask("sample", n=3), print)
    assert e.gauges().rejections == 1


def test_a_thread_that_cannot_be_stopped_is_given_up():
    """It waits in native code. The next strategies get a thread of their own."""

    @fn.strategy
    async def stuck(ctx, prompt):
        time.sleep(6)

    e = build(bounds=Bounds(turn=0.2))
    e.strategies["stuck"] = stuck
    (bad,) = run(e, ask("stuck"))
    assert bad[0][-1].finish == "error" and "cannot be interrupted" in bad[0][-1].error
    (good,) = run(e, ask("sample"))
    assert len(tokens(good[0])) == 12
    e._stage.close()


def test_over_the_event_loop():
    """As a server runs it: strategies wake the loop, streams end, stopping ends what runs."""

    async def main():
        e = build(bounds=Bounds(turn=0.5))
        await e.start()
        streams = [e.submit(r) for r in (ask("sample"), ask(), ask("beam", {"width": 2}), ask("sleeps"))]

        async def read(stream):
            return [d async for d in stream]

        sleeper = asyncio.ensure_future(read(streams[3]))
        got = await asyncio.wait_for(asyncio.gather(*map(read, streams[:3])), 60)
        assert tokens(got[0]) == tokens(got[1])
        assert tokens(got[2]) == offline("beam", {"width": 2})
        await e.stop()
        last = await asyncio.wait_for(sleeper, 10)
        assert last[-1].finish == "error" and "shutting down" in last[-1].error
        assert e.healthy() == "stopped"

    asyncio.run(main())


def test_strategies_that_are_not_waited_for_are_caught(engine, monkeypatch):
    """Without a share of the step's time to think, strategies and requests fall into two halves: more steps."""
    if engine.device.depth:
        pytest.skip("a step in flight is launched before the strategies hear of the one before it")

    def steps():
        before = engine.gauges().steps
        run(engine, *[ask("ponders") for _ in range(4)], ask(max_tokens=12))
        return engine.gauges().steps - before

    monkeypatch.setattr("fnengine.strategies.PAUSE", 1e9)
    monkeypatch.setattr("fnengine.strategies.LONGEST_PAUSE", 5.0)
    together = steps()
    assert together <= 20
    monkeypatch.setattr(Strategies, "_wait", lambda self, timeout: None)
    assert steps() > together
