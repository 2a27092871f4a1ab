"""Models with recurrent layers, driven through a `Runtime` and an engine.

Oracle: transformers' own model in float32 (eager attention, its plain-torch recurrences), one dense forward. Beside it
two laws: a sequence's bits do not depend on how it was computed, and what is kept of states is what they are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine.host import states
from fnengine.model import Model
from tests.models import HYBRID, threads, tiny_model, upstream

TOLERANCE = 1e-4
"""Largest difference of a logit over the largest logit; seen are 2e-5, because the delta rule magnifies rounding."""

every = pytest.mark.parametrize("name", HYBRID)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(states, "EVERY", 2)  # states at 32, 64, ... tokens, so that short texts have some
    monkeypatch.setattr(states, "LEAST", 1)
    with threads(1):
        yield


def tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 131, n).tolist()


def runtime(model: Model, rows: int = 4, **options) -> fn.Runtime:
    sizes = dict(max_num_seqs=rows, max_model_len=160, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 20)
    return fn.Runtime(model, **{**sizes, "enforce_eager": True, **options})


def oracle(name: str, ids: list[int]) -> torch.Tensor:
    """[n, V]: transformers' logits of one dense forward."""
    with torch.no_grad():
        return upstream(name)(torch.tensor([ids]), use_cache=False).logits[0]


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@every
def test_logits(name: str):
    """Prefill, prefill in chunks, decoding, rows at different stages in one step, a fork, and a hit of the prefix."""
    a, b, other = tokens(90, 1), tokens(41, 2), tokens(9, 3)
    want_a, want_b = oracle(name, a), oracle(name, b)
    rt = runtime(tiny_model(name))
    first, logits = rt.extend(rt.empty, a[:75], logits="all")
    assert worst(logits, want_a[:75]) < TOLERANCE, "a whole prompt, in chunks"
    (first, middle), (second, of_b) = rt.extend([(first, a[75:87]), (rt.empty, b[:18])], logits="all")
    got_b = [of_b]
    assert worst(middle, want_a[75:87]) < TOLERANCE, "a chunk, with a whole prompt in the same step"
    for i in range(3):  # decoding beside a chunk
        (first, one), (second, more) = rt.extend(
            [(first, a[87 + i : 88 + i]), (second, b[18 + 7 * i : 25 + 7 * i])], logits="all"
        )
        assert worst(one, want_a[87 + i : 88 + i]) < TOLERANCE, "one token"
        got_b.append(more)
    assert worst(torch.cat(got_b), want_b[:39]) < TOLERANCE, "chunks"
    forked, logits = rt.extend(first[:77], other, logits="all")
    assert worst(logits, oracle(name, a[:77] + other)[77:]) < TOLERANCE, "a fork of a slice"
    for seq in (first, second, forked):
        seq.close()
    hits = rt._ledger.hits
    _, last = rt.extend(rt.empty, a)
    assert worst(last, want_a[-1]) < TOLERANCE, "a prefix that is there already"
    assert rt._ledger.hits - hits == 64
    rt.check()


@every
def test_greedy_text(name: str):
    """Each of 64 tokens is what transformers' own logits, after everything before it, are largest for."""
    prompt = tokens(11, seed=7)
    rt, got = runtime(tiny_model(name)), []
    seq, logits = rt.extend(rt.empty, prompt)
    for _ in range(64):
        got.append(int(logits.argmax()))
        seq, logits = rt.extend(seq, got[-1:])
    assert got == oracle(name, prompt + got)[10:-1].argmax(-1).tolist()
    assert len(set(got)) > 4, "a text of one repeated token would prove little"


@pytest.mark.parametrize("name", ["qwen3-next", "bamba"])
def test_the_same_bits_however_a_sequence_came_to_be(name: str):
    """Whole, in pieces, forked within a step and after it, sliced, from a cached prefix, and after its row was lost.
    Oracle: the bits of a runtime that does nothing else."""
    model, a, tail = tiny_model(name), tokens(83, 4), tokens(5, 5)
    fresh = runtime(model)
    _, want = fresh.extend(fresh.empty, a + tail)
    rt = runtime(model, kept_states=20)
    seq, _ = rt.extend(rt.empty, a[:50])
    seq, _ = rt.extend(seq, a[50:])
    twice = rt.extend([(seq, tail), (seq, tokens(70, 6)), (seq, tail)])
    assert torch.equal(twice[0][1], want) and torch.equal(twice[2][1], want), "in one step"
    assert torch.equal(rt.extend(seq, tail)[1], want), "after its row went on"
    assert torch.equal(rt.extend(twice[1][0][:83], tail)[1], want), "a slice"
    others = [rt.extend(rt.empty, tokens(20, 10 + i))[0] for i in range(6)]  # more than there are rows
    assert torch.equal(rt.extend(twice[0][0][:83], tail)[1], want), "after all rows were taken"
    again = rt.extend([(o, [7]) for o in others])
    for i, (o, logits) in enumerate(again):
        alone = runtime(model)
        assert torch.equal(alone.extend(alone.empty, [*tokens(20, 10 + i), 7])[1], logits), (
            "rows that were taken, again"
        )
        assert len(o) == 21
    before = rt._ledger.hits
    assert torch.equal(rt.extend(rt.empty, a + tail)[1], want) and rt._ledger.hits - before == 80, "a prefix"
    rt.check()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_few_places_cost_computing_and_nothing_else(kept: int):
    """Law: what is kept changes no logits. Oracle: a runtime with places for everything."""
    model = tiny_model("qwen3-5")

    def play(kept: int) -> list[torch.Tensor]:
        rt, rng = runtime(model, rows=3, kept_states=kept), np.random.default_rng(0)
        live, out = [rt.empty], []
        for i in range(40):
            some = [live[j] for j in rng.integers(0, len(live), rng.integers(1, 4))]
            new = rt.extend(
                [(s[: rng.integers(0, len(s) + 1)], tokens(int(rng.integers(1, 20)), i)) for s in some if len(s) < 120]
            )
            out += [logits for _, logits in new]
            live = [*live, *(s for s, _ in new)][-6:]
            rt.check()
        return out

    for got, want in zip(play(kept), play(50), strict=True):
        assert torch.equal(got, want)
