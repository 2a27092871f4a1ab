"""The engine over a real tiny model: equal to the functional loop, whatever else is in the batch; nothing leaks."""

from __future__ import annotations

import asyncio
import itertools
import json

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine.engine import Engine
from fnengine.errors import QueueFull, RequestError
from fnengine.host.request import Request, Sampling, Speculate, Stop, fold_in
from tests.models import tiny_model, upstream
from tests.text_models import byte_tokenizer

NUMBER = itertools.count()
PROMPT = np.random.default_rng(1).integers(3, 120, 37).tolist()
SAMPLED = Sampling(temperature=0.9, top_p=0.95, min_p=0.01, seed=21, frequency_penalty=0.5, repetition_penalty=1.1)


def engine(**options) -> Engine:
    options = {
        "max_model_len": 96,
        "kv_cache_memory_bytes": 1 << 20,
        "enforce_eager": True,
        "max_num_seqs": 6,
        **options,
    }
    return Engine.build(tiny_model("qwen3", "float32"), tokenizer=byte_tokenizer(131), **options)


def request(prompt=PROMPT, sampling=SAMPLED, max_tokens=20, **kw) -> Request:
    stop = kw.pop("stop", None) or Stop(max_tokens=max_tokens, ignore_eos=True)
    return Request(id=f"r{next(NUMBER)}", prompt=np.array(prompt, np.int32), sampling=sampling, stop=stop, **kw)


def run(e: Engine, requests: list[Request], arrive_every: int = 0) -> list[list[list]]:
    """Deltas by request and choice; with `arrive_every` the requests come that many turns apart."""
    deltas = [[[] for _ in range(r.n)] for r in requests]
    waiting = list(enumerate(requests))
    turns = 0
    while waiting or e.turn():
        if waiting and (arrive_every == 0 or turns % arrive_every == 0):
            for i, r in waiting if arrive_every == 0 else waiting[:1]:
                e.submit_to(r, lambda d, i=i: deltas[i][d.index].append(d))
            waiting = [] if arrive_every == 0 else waiting[1:]
        turns += 1
        assert turns < 5000, "no progress"
    e.check()
    assert e.gauges().blocks_held == 0
    return deltas


def tokens(deltas) -> list[int]:
    return [t for d in deltas for t in d.tokens]


def by_hand(prompt, sampling, n) -> list[int]:
    """The definition of plain sampling: a loop over extend."""
    rt = fn.Runtime(tiny_model("qwen3", "float32"), max_model_len=96, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    seq, new, out = rt.empty, prompt, []
    for _ in range(n):
        seq, token = rt.extend(seq, new, sample=sampling)
        out.append(token)
        new = [token]
    return out


@pytest.fixture(scope="module")
def alone() -> list[int]:
    return by_hand(PROMPT, SAMPLED, 20)


def test_greedy_text_is_that_of_transformers():
    with torch.no_grad():
        ids = upstream("qwen3").generate(
            torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    got = run(engine(), [request(sampling=Sampling(temperature=0))])
    assert tokens(got[0][0]) == ids[0, len(PROMPT) :].tolist()


def test_the_engine_is_the_functional_loop(alone):
    assert tokens(run(engine(), [request()])[0][0]) == alone


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 8},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 2},
        {"blocks": 9},
        {"blocks": 9, "swap_space": 0.001},
        {"depth": 1},
        {"depth": 1, "blocks": 9},
    ],
    ids=["chunked", "uncached", "two rows", "preempted", "swapped", "overlapped", "overlapped and preempted"],
)
def test_a_seeded_request_gives_the_same_tokens_in_any_company(alone, options):
    options = dict(options)
    depth = options.pop("depth", 0)
    if "blocks" in options:
        from fnengine.spec import kv_bytes_per_token

        options["kv_cache_memory_bytes"] = (
            options.pop("blocks") * 16 * kv_bytes_per_token(tiny_model("qwen3", "float32").spec, 4)
        )
    e = engine(**options)
    e.device.depth = depth  # 1: the next step is planned and launched before this one is read
    rng = np.random.default_rng(3)
    crowd = [
        request(
            PROMPT[: rng.integers(2, 37)] + rng.integers(3, 120, 5).tolist(),
            Sampling(temperature=1.2, seed=i),
            15,
            priority=i % 3,
        )
        for i in range(7)
    ]
    mixed = [*crowd[:4], request(priority=1), *crowd[4:], request()]
    got = run(e, mixed, arrive_every=2)
    assert tokens(got[4][0]) == alone and tokens(got[8][0]) == alone
    if "swap_space" in options:
        assert e.gauges().swaps > 0
    elif "kv_cache_memory_bytes" in options:
        assert e.gauges().preemptions > 0


def test_choices_share_the_prompt_and_have_their_own_seeds():
    e = engine()
    got = run(e, [request(n=3)])
    each = [tokens(d) for d in got[0]]
    assert len({tuple(t) for t in each}) == 3
    for i, t in enumerate(each):
        alone = Sampling(**{**SAMPLED.__dict__, "seed": fold_in(21, i)})
        assert t == by_hand(PROMPT, alone, 20)
    assert e.gauges().prefix_hits >= 2 * 32, "two of three choices find the prompt's two full blocks"


def test_stops_and_usage(alone):
    e = engine()
    stop_id = alone[7]
    cut = alone.index(stop_id)
    got = run(e, [request(stop=Stop(max_tokens=20, ids=(stop_id,), ignore_eos=True))])[0][0]
    assert tokens(got) == alone[: cut + 1]
    assert (got[-1].finish, got[-1].stop_reason) == ("stop", stop_id)
    assert (got[-1].usage.prompt, got[-1].usage.completion) == (37, cut + 1)
    later = run(e, [request(stop=Stop(max_tokens=20, min_tokens=10, ids=(stop_id,), ignore_eos=True))])[0][0]
    assert stop_id not in tokens(later)[:10] and len(tokens(later)) > 10
    text = e.tokenizer.decode(alone)
    word = text[5:7]
    at = text.index(word)
    stopped = run(e, [request(stop=Stop(max_tokens=20, strings=(word,), ignore_eos=True))])[0][0]
    assert "".join(d.text for d in stopped) == text[:at]
    assert (stopped[-1].finish, stopped[-1].stop_reason) == ("stop", word)


def test_logprobs_are_log_softmax_of_raw_logits():
    with torch.no_grad():
        reference = upstream("qwen3")(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    got = run(engine(), [request(max_tokens=1, logprobs=3, prompt_logprobs=2)])[0][0]
    scored = next(d.prompt_logprobs for d in got if d.prompt_logprobs)
    assert scored[0] is None and len(scored) == len(PROMPT)
    for i in range(1, len(PROMPT)):
        assert scored[i].id == PROMPT[i]
        assert scored[i].logprob == pytest.approx(float(reference[i - 1, PROMPT[i]]), abs=1e-4)
        assert [t for t, _ in scored[i].top] == reference[i - 1].topk(2).indices.tolist()
    first = got[0].logprobs[0]
    assert first.logprob == pytest.approx(float(reference[-1, first.id]), abs=1e-4)
    assert [t for t, _ in first.top] == reference[-1].topk(3).indices.tolist()


def test_watched_tokens_have_the_log_probabilities_that_transformers_gives_them():
    """Beside rows that watch others or none, drafts, prompts in chunks, and rows that were sent back."""
    with torch.no_grad():
        reference = upstream("qwen3")(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    e = engine(max_num_batched_tokens=8, kv_cache_memory_bytes=1 << 17)
    some, others = (5, 130, 0), tuple(range(128))
    asked = [
        request(logprobs=1, prompt_logprobs=0, watched=some, n=2),
        request(logprobs=0, watched=others, speculate=Speculate("ngram", 3)),
        request(logprobs=2),
        request(),
    ]
    (first, _), (second,), (third,), (fourth,) = run(e, asked)
    scored = next(d.prompt_logprobs for d in first if d.prompt_logprobs)
    for i in range(1, len(PROMPT)):
        assert [id for id, _ in scored[i].watched] == list(some)
        assert [p for _, p in scored[i].watched] == pytest.approx(reference[i - 1, list(some)].tolist(), abs=1e-4)
    text = tokens(second)
    with torch.no_grad():
        after = upstream("qwen3")(torch.tensor([PROMPT + text])).logits[0].log_softmax(-1)[len(PROMPT) - 1 :]
    found = [p for d in second for p in d.logprobs]
    assert [p.id for p in found] == text
    for at, p in enumerate(found):
        assert [x for _, x in p.watched] == pytest.approx(after[at, list(others)].tolist(), abs=1e-4)
        assert p.id not in others or dict(p.watched)[p.id] == p.logprob, "not the same float"
    assert all(not p.watched for d in third for p in d.logprobs) and fourth[0].logprobs is None


def test_what_cannot_be_watched_is_refused_and_nothing_is_held():
    e = engine()
    for bad in (dict(watched=(131,)), dict(watched=(-1,)), dict(watched=tuple(range(129)))):
        with pytest.raises(RequestError, match="logprob_token_ids"):
            e.submit(request(logprobs=0, **bad))
    with pytest.raises(RequestError, match="needs logprobs"):
        e.submit(request(watched=(1,)))
    assert e.gauges().waiting == 0


def test_a_failing_step_ends_its_requests_and_the_engine_lives():
    e = engine()
    honest, fail = e.device.step, True

    def step(params, state, batch):
        if fail:
            raise RuntimeError("boom")
        return honest(params, state, batch)

    e.device.step = step
    got = run(e, [request()])
    assert got[0][0][-1].finish == "error" and "boom" in got[0][0][-1].error
    fail = False
    assert len(tokens(run(e, [request()])[0][0])) == 20


def test_abort_returns_blocks_within_one_step():
    e = engine()
    requests = [request(n=2), request(PROMPT[::-1])]
    out = []
    for r in requests:
        e.submit_to(r, out.append)
    for _ in range(3):
        e.turn()
    assert e.gauges().blocks_held > 0
    for r in requests:
        assert e.abort(r.id)
        assert not e.abort(r.id)
    e.turn()
    assert e.gauges().blocks_held == 0 and e.gauges().running == 0
    e.check()


def test_refusals():
    e = engine(max_queue=2)
    with pytest.raises(RequestError, match="96"):
        e.submit(request(PROMPT * 3))
    with pytest.raises(RequestError, match="logprobs"):
        e.submit(request(logprobs=21))
    for _ in range(2):
        e.submit_to(request(), lambda d: None)
    with pytest.raises(QueueFull):
        e.submit(request())
    while e.turn():
        pass
    e.check()


def test_streams_and_disconnects_on_an_event_loop(alone):
    async def main():
        e = engine()
        await e.start()
        got = [d async for d in e.submit(request())]
        assert tokens(got) == alone
        streams = [e.submit(request(PROMPT[: 5 + i], Sampling(temperature=1, seed=i), 30)) for i in range(8)]
        for i, s in enumerate(streams):
            await anext(s)
            if i % 2:
                s.close()
                s.close()
        for s in streams[::2]:
            assert sum([len(d.tokens) async for d in s]) == 29
        assert e.healthy() is None and e.gauges().blocks_held == 0
        open_stream = e.submit(request(max_tokens=50))
        await anext(open_stream)
        await e.stop(0)
        last = [d async for d in open_stream][-1]
        assert last.finish == "error"
        e.check()

    asyncio.run(main())


def test_a_stream_that_nobody_reads_is_given_up(caplog):
    """Of 60 deltas with 21 log-probabilities 1 MiB in six shares keeps the fewest, 32; who comes back reads why."""

    async def main():
        e = engine(answer_bytes=1 << 20)
        await e.start()
        unread = e.submit(request(PROMPT[:9], max_tokens=60, logprobs=20))
        read = e.submit(request(PROMPT[:9], max_tokens=60, logprobs=20))
        assert sum([len(d.tokens) async for d in read]) == 60, "who reads gets everything"
        assert e.gauges().blocks_held == 0
        (last,) = [d async for d in unread]
        assert last.finish == "abort" and "33 deltas unread; at most 32" in (last.error or "")
        quick = e.submit(request(PROMPT[:9], max_tokens=60))  # without log-probabilities 341 may wait
        while e.gauges().running or e.gauges().waiting:
            await asyncio.sleep(0)
        assert sum([len(d.tokens) async for d in quick]) == 60
        await e.stop(0)
        e.check()

    asyncio.run(main())
    assert "was aborted: the client left 33 deltas unread" in caplog.text


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_never_reads_holds_neither_blocks_nor_deltas(prompts, monkeypatch):
    """The application over a real engine; the client takes one event and then nothing, until its request is over."""
    from fnengine.host import answers
    from fnengine.serve import flight
    from fnengine.serve.app import make_app

    monkeypatch.setattr(flight, "AT_ONCE", 4)
    body = {"prompt": [PROMPT[:9]] * prompts, "max_tokens": 60, "logprobs": 5, "stream": True, "ignore_eos": True}

    async def main():
        e = engine(answer_bytes=1 << 20)
        monkeypatch.setattr(answers, "LEAST_UNREAD", 8)
        monkeypatch.setattr(e, "answer_bytes", 1 << 18)  # 12 deltas of 3,584 bytes in each of six shares
        await e.start()
        app, sent, reads = make_app(e), [], asyncio.Event()
        asked = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive():
            found = next(asked, None)
            return found if found is not None else await asyncio.Event().wait()

        async def send(message):
            sent.append(message.get("body", b""))
            if len(sent) > 1:
                await reads.wait()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b""}
        scope |= {"headers": [], "root_path": "", "scheme": "http", "server": ("a", 1), "client": ("b", 2)}
        task = asyncio.ensure_future(app(scope, receive, send))
        async with asyncio.timeout(60):
            while not e.gauges().running:
                assert not task.done(), sent
                await asyncio.sleep(0)
            while e.gauges().running or e.gauges().waiting or e.gauges().blocks_held:
                await asyncio.sleep(0)
            assert len(sent) == 2
            reads.set()
            await task
        text = b"".join(sent).decode()
        assert "deltas unread" in text and text.endswith("data: [DONE]\n\n")
        assert not app.state.flights
        await e.stop(0)
        e.check()

    asyncio.run(main())
