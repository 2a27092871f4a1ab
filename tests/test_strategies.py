"""Decoding strategies: equal to their references, many at once in one step, nobody else's problem when they fail."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import decoding
from fnengine.decoding import (
    Bounds,
    Context,
    Job,
    Sample,
    beam,
    best_of,
    contrastive,
    forced,
    guided,
    sample,
    self_consistent,
)
from fnengine.decoding.consistency import compiled, found
from fnengine.decoding.watch import RAISES, RETURNS, STALLS, YIELDS, Watch
from fnengine.errors import ConfigError, ContextLengthError, OutOfBlocks, RequestError, StrategyStalled
from fnengine.host.request import Sampling, Stop, fold_in
from fnengine.spec import kv_bytes_per_token
from tests.models import tiny_model, upstream
from tests.text_models import byte_tokenizer

RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(3, 120, n).tolist() for n in (21, 37, 5, 16, 33, 2)]
PROMPT = PROMPTS[0]
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=0.9, top_p=0.95, seed=21, frequency_penalty=0.5, repetition_penalty=1.1)
OPTIONS = {"max_model_len": 96, "kv_cache_memory_bytes": 1 << 20, "enforce_eager": True}
QUICK = Bounds(turn=0.5, idle=30.0)


@pytest.fixture(scope="module")
def model():
    model = dataclasses.replace(tiny_model("qwen3", "float32"))
    model.__dict__["tokenizer"] = byte_tokenizer(model.spec.vocab)  # its cached property
    return model


@pytest.fixture(scope="module")
def llm(model):
    return fn.LLM(model, max_num_seqs=8, **OPTIONS)


@pytest.fixture(scope="module")
def shared(model):
    return fn.Runtime(model, max_num_seqs=8, **OPTIONS)


def conserved(rt):
    rt.check()
    assert rt.free_blocks == rt._device.blocks - 1, "a block is still held after all strategies have ended"


@pytest.fixture
def rt(shared):
    yield shared
    conserved(shared)


def small(model, blocks, **kw):
    size = (blocks + 1) * 16 * kv_bytes_per_token(model.spec, model.dtype.itemsize)
    return fn.Runtime(model, kv_cache_memory_bytes=size, max_model_len=16 * blocks, enforce_eager=True, **kw)


def one(rt, strategy, prompt=PROMPT, sampling=GREEDY, stop=None, **args):
    """The outcome of a single job, which must not fail."""
    (done,) = decoding.run(rt, [Job(strategy, prompt, args, sampling, stop or Stop(max_tokens=12, ignore_eos=True))])
    if done.error is not None:
        raise done.error
    return done


def plain(prompt: list[int]) -> torch.Tensor:
    """[V] what follows, by transformers, computed from nothing each time."""
    with torch.no_grad():
        return upstream("qwen3")(torch.tensor([prompt])).logits[0, -1]


@fn.strategy
async def greedy(ctx, prompt, n=12, wait=None):
    """Plain greedy decoding by way of logits."""
    seq, new = ctx.empty, prompt
    for _ in range(n):
        seq, logits = await ctx.extend(seq, new)
        new = [int(logits.argmax())]
        ctx.emit(new)
        if wait is not None:
            await asyncio.sleep(wait)


def greedy_tokens(prompt, n=12):
    with torch.no_grad():
        ids = upstream("qwen3").generate(
            torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return tuple(ids[0, len(prompt) :].tolist())


# --- each strategy is its reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, Sampling(temperature=1.3, min_p=0.02, top_k=40, seed=5)])
def test_the_function_that_defines_sampling_gives_the_engines_tokens(llm, rt, sampling):
    """Oracle: the engine's built-in path."""
    stop = Stop(max_tokens=20)
    jobs = [Job(sample, p, {}, sampling, stop) for p in PROMPTS]
    wanted = llm.generate(PROMPTS, sampling, stop)
    got = decoding.run(rt, jobs)
    assert [d.tokens for d in got] == [w.choices[0].tokens for w in wanted]
    assert [d.finish for d in got] == [w.choices[0].finish for w in wanted]


def test_unseeded_jobs_draw_what_unseeded_requests_draw(model):
    """Oracle: the engine, both from the same root seed."""
    llm = fn.LLM(model, seed=9, **OPTIONS)
    wanted = [c.choices[0].tokens for c in llm.generate(PROMPTS[:3], Sampling(), Stop(max_tokens=8))]
    rt = fn.Runtime(model, seed=9, **OPTIONS)
    got = decoding.run(rt, [Job(sample, p, stop=Stop(max_tokens=8)) for p in PROMPTS[:3]])
    assert [d.tokens for d in got] == wanted and len(set(wanted)) == 3


BEAMS = [
    (1, False, 1.0),
    *[(width, early, penalty) for width in (2, 3, 4) for early in (False, True) for penalty in (1.0, 2.5)],
    (4, False, -1.0),
    (4, True, 0.0),
    (3, "never", 2.5),
    (4, "never", 0.0),
]
"""(width, early stopping, length penalty)"""


@pytest.fixture(scope="module")
def ends():
    """Three ids that hypotheses meet on their way, so that some of them finish at every length."""
    seen: Counter = Counter()
    for prompt in PROMPTS[:3]:
        with torch.no_grad():
            ids = upstream("qwen3").generate(
                torch.tensor([prompt]),
                max_new_tokens=14,
                do_sample=False,
                num_beams=8,
                num_return_sequences=8,
                eos_token_id=None,
                pad_token_id=0,
            )
        for row in ids[:, len(prompt) + 2 :].tolist():
            seen.update(set(row))
    return [t for t, _ in seen.most_common(3)]


@functools.cache
def searched_upstream(prompt, ends, width, early, penalty):
    """Tokens of transformers' beam search."""
    options = {"num_beams": width, "early_stopping": early, "length_penalty": penalty} if width > 1 else {}
    with torch.no_grad():
        ids = upstream("qwen3").generate(
            torch.tensor([prompt]),
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
            **options,
        )
    return tuple(ids[0, len(prompt) :].tolist())


def searched(rt, prompt, ends, width, early, penalty):
    args = {"width": width, "early_stopping": early, "length_penalty": penalty}
    (done,) = decoding.run(rt, [Job(beam, prompt, args, stop=Stop(max_tokens=14))], eos=ends)
    assert done.error is None and done.finish == ("stop" if done.tokens[-1] in ends else "length")
    return done.tokens


@pytest.mark.parametrize("case", BEAMS, ids=str)
def test_beam_search_is_that_of_transformers(rt, ends, case):
    """Oracle: transformers' generate."""
    for prompt in PROMPTS[:3]:
        assert searched(rt, prompt, ends, *case) == searched_upstream(tuple(prompt), tuple(ends), *case)


def test_a_beam_search_without_spare_candidates_is_caught(rt, ends, monkeypatch):
    """Mutant: only `width` candidates are looked at, so that a hypothesis which ends leaves its place empty."""
    module = sys.modules["fnengine.decoding.beam"]
    honest = module._candidates
    monkeypatch.setattr(module, "_candidates", lambda beams, logits, n: honest(beams, logits, n // 4))
    assert any(
        searched(rt, p, ends, *case) != searched_upstream(tuple(p), tuple(ends), *case)
        for p in PROMPTS[:3]
        for case in BEAMS[-4:]
    )


def test_the_cases_of_beam_search_differ(ends):
    """So that the tests above can fail: each parameter changes a result, and hypotheses end at several lengths."""

    def differ(a, b):
        found = [[searched_upstream(tuple(p), tuple(ends), *case) for case in (a, b)] for p in PROMPTS[:3]]
        return any(x != y for x, y in found)

    assert differ((1, False, 1.0), (4, False, 1.0)) and differ((2, False, 1.0), (4, False, 1.0))
    assert differ((4, False, 1.0), (4, True, 1.0)) and differ((4, False, 2.5), (4, False, -1.0))
    assert len({len(searched_upstream(tuple(p), tuple(ends), *case)) for p in PROMPTS[:3] for case in BEAMS}) > 3


def test_beam_search_without_any_end_is_that_of_transformers(rt):
    """Oracle: transformers' generate, which then looks at fewer candidates."""
    with torch.no_grad():
        ids = upstream("qwen3").generate(
            torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False, num_beams=3, eos_token_id=None, pad_token_id=0
        )
    assert list(one(rt, beam, width=3, stop=Stop(max_tokens=10, ignore_eos=True)).tokens) == ids[0, 21:].tolist()


def test_the_best_texts_of_a_beam_search_are_those_of_transformers(rt, ends):
    """Oracle: transformers' generate with as many sequences to return; each as long as its own text."""
    with torch.no_grad():
        ids = upstream("qwen3").generate(
            torch.tensor([PROMPT]),
            max_new_tokens=14,
            do_sample=False,
            num_beams=4,
            num_return_sequences=3,
            eos_token_id=ends,
            pad_token_id=0,
        )
    parts: dict[int, list[int]] = {}
    job = Job(beam, PROMPT, {"width": 4, "texts": 3}, stop=Stop(max_tokens=14))
    (done,) = decoding.run(rt, [job], on_emit=lambda p: parts.setdefault(p.choice, []).extend(p.tokens), eos=ends)
    found = [list(done.tokens), *(list(o.tokens) for o in done.more)]
    assert found == list(parts.values()) and len(found) == 3
    for row, text, outcome in zip(ids.tolist(), found, (done, *done.more), strict=True):
        end = next((i + 1 for i, t in enumerate(row[21:]) if t in ends), 14)
        assert text == row[21 : 21 + end] and outcome.finish == ("stop" if text[-1] in ends else "length")
    (bad,) = decoding.run(rt, [Job(beam, PROMPT, {"width": 2, "texts": 3})], eos=ends)
    assert "texts must be between 1 and width" in str(bad.error)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_p=0.9, seed=3)])
@pytest.mark.parametrize("scale", [1.5, 3.0, 0.0])
def test_guidance_is_two_forwards_and_one_decision(rt, sampling, scale):
    """Oracle: a loop over two separate forwards of transformers."""
    a, b, wanted = list(PROMPT), list(PROMPTS[2]), []
    for _ in range(12):
        p, q = plain(a).log_softmax(-1), plain(b).log_softmax(-1)
        token = fn.sample(
            q + scale * (p - q), position=len(a), seed=3, temperature=sampling.temperature, top_p=sampling.top_p
        )
        wanted.append(token)
        a.append(token)
        b.append(token)
    assert list(one(rt, guided, sampling=sampling, scale=scale, negative=PROMPTS[2]).tokens) == wanted


def test_guidance_by_the_last_token_is_transformers_default(rt):
    """Oracle: transformers' own guidance."""
    with torch.no_grad():
        ids = upstream("qwen3").generate(
            torch.tensor([PROMPT]),
            max_new_tokens=12,
            do_sample=False,
            guidance_scale=2.0,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert list(one(rt, guided, scale=2.0).tokens) == ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("window", [1, 6])
def test_contrastive_decoding_by_a_shorter_context(rt, window):
    """Oracle: the paper's score, spelt over the vocabulary, from separate forwards of transformers."""
    a, b, wanted = list(PROMPT), PROMPT[-window:], []
    for _ in range(12):
        p, q = plain(a).softmax(-1).double(), plain(b).softmax(-1).double()
        score = {w: float((p[w] / q[w]).log()) for w in range(len(p)) if p[w] >= 0.1 * p.max()}
        token = max(score, key=lambda w: score[w])
        wanted.append(token)
        a.append(token)
        b.append(token)
    done = one(rt, contrastive, alpha=0.1, window=window)
    assert list(done.tokens) == wanted != list(greedy_tokens(PROMPT))
    assert one(rt, contrastive, alpha=1.0, window=window).tokens == greedy_tokens(PROMPT)


def test_contrastive_decoding_against_a_second_model(rt):
    """Oracle: as above, the amateur being another model."""
    amateur = fn.Runtime(tiny_model("llama2", "float32"), **OPTIONS)
    a, wanted = list(PROMPT), []
    for _ in range(8):
        with torch.no_grad():
            q = (upstream("llama2")(torch.tensor([a])).logits[0, -1] / 0.5).softmax(-1)
        p = plain(a).softmax(-1)
        score = torch.where(p >= 0.05 * p.max(), (p / q).log(), -torch.inf)
        a.append(int(score.argmax()))
        wanted.append(a[-1])
    stop = Stop(max_tokens=8, ignore_eos=True)
    done = one(rt, contrastive, stop=stop, alpha=0.05, amateur=amateur, temperature=0.5)
    assert list(done.tokens) == wanted
    conserved(amateur)


def choices(llm, n, stop, sampling=DRAWN):
    return llm.generate([PROMPT], sampling, stop, n=n, logprobs=0)[0].choices


def test_best_of_n_is_the_likeliest_of_the_engines_choices(llm, rt):
    """Oracle: the engine's n choices with their log-probabilities."""
    stop = Stop(max_tokens=10)
    drawn = choices(llm, 6, stop)
    means = [sum(p.logprob for p in c.logprobs) / len(c.tokens) for c in drawn]
    done = one(rt, best_of, sampling=DRAWN, stop=stop, n=6)
    best = drawn[int(np.argmax(means))]
    assert done.tokens == best.tokens and len({c.tokens for c in drawn}) == 6
    assert [p.logprob for p in done.logprobs] == pytest.approx([p.logprob for p in best.logprobs], abs=1e-5)


def test_self_consistency_is_a_vote(llm, rt):
    """Oracle: the engine's choices, counted here."""
    stop, n = Stop(max_tokens=6, ignore_eos=True), 9
    hot = Sampling(temperature=0.5, seed=4)
    texts = [(c.text, c.tokens) for c in choices(llm, n, stop, hot)]
    second = [t[1] for t, _ in texts]
    count = Counter(second)
    assert 1 < count.most_common(1)[0][1] < n, "a vote that everybody or nobody wins shows nothing"
    winner = max(count.values())
    wanted = next(tokens for (_, tokens), s in zip(texts, second, strict=True) if count[s] == winner)
    assert one(rt, self_consistent, sampling=hot, stop=stop, answer="^.(.)", n=n).tokens == wanted
    assert one(rt, self_consistent, sampling=hot, stop=stop, answer="no such text", n=n).tokens == texts[0][1]
    with pytest.raises(RequestError, match="no regular expression"):
        one(rt, self_consistent, answer="(")


def test_a_pattern_that_takes_for_ever_is_given_up(rt, monkeypatch):
    """Oracle: the clock. The time of `(a|aa)+$` over n letters a and one b doubles with every letter or so: 60 of them
    would take years. Patterns that would be as long to compile are refused before."""
    slow, began = compiled("(a|aa)+$"), time.monotonic()
    assert found(slow, ["xaa", "a b"], 0.2) == ["a", None]  # the group the last time round
    with pytest.raises(RequestError, match=r"search for '\(a\|aa\)\+\$' took more than 0.2 s") as e:
        found(slow, ["aa", "a" * 60 + "b", "a"], 0.2)
    assert e.value.param == "answer" and e.value.remedy and time.monotonic() - began < 5
    module = sys.modules["fnengine.decoding.consistency"]
    monkeypatch.setattr(module, "SEARCHING", 0.05)
    monkeypatch.setattr(module, "samples", lambda *a: asyncio.sleep(0, [Sample((97,) * 60, (0.0,) * 60)]))
    monkeypatch.setattr(Context, "decode", lambda *a: "a" * 60 + "b")
    with pytest.raises(RequestError, match="took more than"):
        one(rt, self_consistent, answer="(a|aa)+$")
    for large in ("a" * 1001, "(?:a{1000}){1000}", "(?:(?:a{,60}){ 60}){30,60}", "(" * 400 + ")" * 400):
        with pytest.raises(RequestError) as e:
            compiled(large)
        assert e.value.param == "answer"


@pytest.mark.parametrize("chunk", [256, 4, 1])
def test_forced_decoding_scores_as_prompt_logprobs_do(llm, rt, monkeypatch, chunk):
    """Oracle: the engine's prompt_logprobs of both as one prompt."""
    monkeypatch.setattr(sys.modules["fnengine.decoding.forced"], "CHUNK", chunk)
    tail = PROMPTS[1][:11]
    done = one(rt, forced, continuation=tail)
    (scored,) = llm.generate([PROMPT + tail], GREEDY, Stop(max_tokens=1), prompt_logprobs=0)
    assert done.tokens == tuple(tail) and done.finish == "stop"
    assert [p.logprob for p in done.logprobs] == [p.logprob for p in scored.prompt_logprobs[len(PROMPT) :]]
    with pytest.raises(RequestError, match="max_tokens is 12"):
        one(rt, forced, continuation=PROMPTS[1])


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

    (done,) = decoding.run(rt, [(fork, RNG.integers(3, 120, 4100).tolist())])
    assert done.error is None and copies == [1] and free[0] - free[1] == 1
    conserved(rt)


# --- failures ---------------------------------------------------------------------------------------------------------


@fn.strategy
async def broken(ctx, prompt, after=2):
    """Holds sequences when it fails."""
    held = [ctx.empty]
    for i in range(after):
        held.append((await ctx.extend(held[-1], prompt if i == 0 else [4]))[0])
        ctx.emit([5])
    raise ValueError("a number that nobody expected")


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
    found = re.match(r"test_strategies\.py:(\d+): ", str(done.error))
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


# --- LLM --------------------------------------------------------------------------------------------------------------


def held(llm):
    llm._runtime.drain()
    llm.engine.check()
    return llm.engine.gauges().blocks_held


def test_generate_with_a_strategy(llm):
    """Oracle: generate without one, where the strategy is plain sampling."""
    stop = Stop(max_tokens=14, strings=(chr(0x4E00 + 77),), ids=(50,))
    for sampling in (GREEDY, DRAWN, Sampling(temperature=1.5, seed=6)):
        wanted = llm.generate(PROMPTS, sampling, stop, n=2)
        deltas: list = []
        put = functools.partial(lambda to, i, d: to.append((i, d)), deltas)
        got = llm.generate(PROMPTS, sampling, stop, n=2, strategy=sample, on_delta=put)
        for w, g in zip(wanted, got, strict=True):
            assert g.prompt == w.prompt
            for a, b in zip(w.choices, g.choices, strict=True):
                assert (a.text, a.tokens, a.finish, a.stop_reason) == (b.text, b.tokens, b.finish, b.stop_reason)
                assert a.usage.completion == b.usage.completion
        for i, g in enumerate(got):
            for c in g.choices:
                assert "".join(d.text for j, d in deltas if (j, d.index) == (i, c.index)) == c.text
    assert held(llm) == 0


def test_a_stop_string_ends_a_strategy(llm):
    """Oracle: the text without it, cut by hand."""
    (whole,) = llm.generate([PROMPT], GREEDY, Stop(max_tokens=12, ignore_eos=True), strategy=greedy)
    text = whole.text
    at = next(i for i in range(4, len(text)) if text.index(text[i]) == i)
    stop = Stop(max_tokens=12, ignore_eos=True, strings=(text[at],))
    (cut,) = llm.generate([PROMPT], GREEDY, stop, strategy=greedy)
    choice = cut.choices[0]
    assert (choice.text, choice.finish, choice.stop_reason) == (text[:at], "stop", text[at])
    assert choice.tokens == whole.choices[0].tokens[: at + 1] and choice.usage.completion == at + 1
    assert held(llm) == 0


def test_strategies_and_plain_requests_take_turns_on_one_pool(llm):
    """Law: rows that the one has left are not mistaken for its own by the other."""

    def drawn():
        return [c.choices[0].tokens for c in llm.generate(PROMPTS, DRAWN)]

    def searched():
        return [c.choices[0].tokens for c in llm.generate(PROMPTS, strategy=beam, strategy_args={"width": 4})]

    before = drawn(), searched()
    assert (drawn(), searched()) == before and before[0] != before[1]
    (scored,) = llm.generate([PROMPT], strategy=forced, strategy_args={"continuation": PROMPTS[2]})
    assert [p.id for p in scored.choices[0].logprobs] == PROMPTS[2]
    with pytest.raises(ValueError, match="nobody expected"):
        llm.generate(PROMPTS, strategy=broken)
    assert held(llm) == 0


def test_what_generate_refuses(llm):
    refused = {
        "logprobs": {"logprobs": 0},
        "prompt_logprobs": {"prompt_logprobs": 1},
        "min_tokens": {"stop": Stop(max_tokens=4, min_tokens=2)},
        "steer": {"steer": {"layers.0": np.zeros(4)}},
        "speculate": {"speculate": fn.Speculate("ngram", k=2)},
    }
    for name, kw in refused.items():
        with pytest.raises(RequestError, match="cannot be asked of a strategy") as e:
            llm.generate([PROMPT], strategy=sample, **kw)
        assert e.value.param == name
    with pytest.raises(RequestError, match="n must be at least 1"):
        llm.generate([PROMPT], strategy=sample, n=0)
    with pytest.raises(RequestError, match="without a strategy"):
        llm.generate([PROMPT], strategy_args={"n": 1})
    with pytest.raises(RequestError, match="takes no arguments"):
        llm.generate([PROMPT], strategy=sample, strategy_args={"n": 1})


def test_seeds_of_samples_are_those_of_choices():
    assert fold_in(5, 0) == 5 and len({fold_in(5, i) for i in range(9)}) == 9
