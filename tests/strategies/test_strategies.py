"""Decoding strategies are equal to their references."""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import decoding
from fnengine.decoding import (
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
from fnengine.errors import RequestError
from fnengine.host.request import Sampling, Stop
from tests.models import tiny_model, upstream
from tests.strategies.setting import (
    DRAWN,
    GREEDY,
    OPTIONS,
    PROMPT,
    PROMPTS,
    conserved,
    greedy_tokens,
    one,
    plain,
)

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
