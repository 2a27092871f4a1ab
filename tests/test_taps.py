"""Taps: the model's inside as an output of the step. Oracle: transformers' own hidden states."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import decoding, model, program
from fnengine.errors import RequestError
from fnengine.host.request import Sampling
from fnengine.spec import tap_names
from tests.models import tiny_model, upstream

PROMPT = np.random.default_rng(4).integers(3, 120, 41).tolist()
SIZES: dict[str, Any] = dict(max_num_seqs=6, max_model_len=128, kv_cache_memory_bytes=1 << 20)
EVERYWHERE = ("embedding", "layers.0.residual", "layers.1.residual", "final")


def expected(name: str, tokens: list[int]) -> dict[str, torch.Tensor]:
    """tap -> [n, D] of transformers; what the last layer gives is seen by a hook, for only its norm is among them."""
    model, last = upstream(name), []
    hook = model.model.layers[-1].register_forward_hook(
        lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    hook.remove()
    first, after, final = (x[0] for x in states)
    return dict(zip(EVERYWHERE, (first, after, last[0].reshape(len(tokens), -1), final), strict=True))


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module", params=["eager", "compiled", "twin"])
def options(request):
    return SIZES | {"eager": {"enforce_eager": True}, "compiled": {}, "twin": {"graph_twin": True}}[request.param]


@pytest.mark.parametrize("name", ["qwen3", "llama2"])
def test_taps_are_the_hidden_states_of_transformers(name, options):
    """Prefill in chunks, a fork in a ragged batch, decoding that comes often enough to be recorded or captured."""
    rt = fn.Runtime(tiny_model(name, "float32"), max_num_batched_tokens=16, **options)
    assert tap_names(rt.model.spec) == EVERYWHERE
    seq, logits, inside = rt.extend(rt.empty, PROMPT, taps=EVERYWHERE)
    close(inside, expected(name, PROMPT))
    assert torch.equal(logits, rt.extend(rt.empty, PROMPT)[1])
    (a, ia), (_, ib) = rt.extend([(seq, [5, 6, 7]), (seq[:30], [8])], logits=None, taps=("final", "embedding"))
    assert list(ia) == ["final", "embedding"]
    close(ia, {k: v[-3:] for k, v in expected(name, [*PROMPT, 5, 6, 7]).items()})
    close(ib, {k: v[-1:] for k, v in expected(name, [*PROMPT[:30], 8]).items()})
    for i in range(6):
        a, token, inside = rt.extend(
            a, [9 + i], sample=Sampling(temperature=0), logits=None, taps=["layers.1.residual", "layers.0.residual"]
        )
        want = expected(name, a.tokens)
        close(inside, {k: v[-1:] for k, v in want.items()})
        with torch.no_grad():
            assert token == int(upstream(name)(torch.tensor([a.tokens])).logits[0, -1].argmax())


@pytest.mark.parametrize("mutant", [False, True])
def test_tapped_steps_are_recorded_too(monkeypatch, mutant):
    """Layers between taps are programs of their own, and give the bits of the whole row of layers. The mutant keeps
    what a program gave, which the next one overwrites."""
    made: list[program.Recorded] = []

    class Seen(program.Recorded):
        def __init__(self, run):
            super().__init__(run)
            made.append(self)

    monkeypatch.setattr(program, "Recorded", Seen)
    rt = fn.Runtime(tiny_model("qwen3", "float32"), **SIZES)
    if not made:
        pytest.skip(f"layers are not recorded here: {rt.built.execution}")
    if mutant:
        honest = model.body
        monkeypatch.setattr(model, "body", lambda *a: honest(*a[:-1], after=dict.fromkeys(a[-1], lambda x: x)))
    plain, tapped = rt.extend(rt.empty, PROMPT[:5])[0], rt.extend(rt.empty, PROMPT[:5])[0]
    for i in range(5):
        plain, want = rt.extend(plain, [i + 3])
        tapped, got, inside = rt.extend(tapped, [i + 3], taps=["layers.0.residual"])
        if mutant and not torch.equal(got, want):
            return
        assert torch.equal(got, want)
        close(inside, {k: v[-1:] for k, v in expected("qwen3", tapped.tokens).items()})
    assert not mutant, "the mutant was not caught"
    assert made[0].why_not == ""
    assert sorted(key[2] for key in made[0].programs if key[0] == 2) == [1, 1, 2], (
        "the first layer, the second, and both"
    )


def test_taps_of_tokens_that_are_cached_are_computed(options):
    rt = fn.Runtime(tiny_model("qwen3", "float32"), **options)
    first = rt.extend(rt.empty, PROMPT)[0]
    second, inside = rt.extend(rt.empty, PROMPT, logits=None, taps=["final"])
    close(inside, expected("qwen3", PROMPT))
    assert first.tokens == second.tokens


def test_an_unknown_tap_is_refused_with_those_that_there_are():
    rt = fn.Runtime(tiny_model("qwen3", "float32"), enforce_eager=True, **SIZES)
    for name in ("layers.2.residual", "layers.0", "head"):
        with pytest.raises(RequestError, match=r"no tap .*embedding, layers.0.residual to layers.1.residual, or final"):
            rt.extend(rt.empty, PROMPT, taps=[name])


def test_too_many_taps_at_once_are_refused(monkeypatch):
    monkeypatch.setattr("fnengine.runtime.ALL_LOGITS_BYTES", 4 * 64 * 41 * 2 - 1)
    rt = fn.Runtime(tiny_model("qwen3", "float32"), enforce_eager=True, **SIZES)
    rt.extend(rt.empty, PROMPT, taps=["final"])
    with pytest.raises(RequestError, match="2 taps of 41 tokens"):
        rt.extend(rt.empty, PROMPT, taps=["final", "embedding"])


def test_strategies_that_ask_for_different_taps_share_a_call(monkeypatch):
    """Oracle: the same extends one by one, bit by bit. Those that are looked up in the prefix cache stay apart."""
    rt = fn.Runtime(tiny_model("qwen3", "float32"), enforce_eager=True, **SIZES)
    calls, honest, results = [], rt.extend, {}

    def extend(pairs, *tokens, **kw):
        calls.append((len(pairs), kw["logits"], kw["taps"]))
        return honest(pairs, *tokens, **kw)

    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "one": {"taps": ["final"]},
        "two": {"taps": ("layers.0.residual", "embedding"), "logits": None},
        "drawn": {"taps": ["final"], "sample": Sampling(temperature=0)},
    }

    @fn.strategy
    async def ask(ctx, prompt, name):
        seq, *told = await ctx.extend(ctx.empty, prompt, **kinds[name])
        await asyncio.sleep(0)
        results[name] = told, (await ctx.extend(seq, [7, 8], **kinds[name]))[1:]

    monkeypatch.setattr(rt, "extend", extend)
    done = decoding.run(rt, [(ask, PROMPT, {"name": name}) for name in kinds])
    monkeypatch.undo()
    assert [d.error for d in done] == [None] * 4
    union = ("final", "layers.0.residual", "embedding")
    assert calls == [(3, "last", union), (1, "last", ()), (4, "last", union)]
    for name, kw in kinds.items():
        seq, *first = rt.extend(rt.empty, PROMPT, **kw)
        for got, want in zip(results[name], (first, rt.extend(seq, [7, 8], **kw)[1:]), strict=True):
            assert len(got) == len(want)
            for g, w in zip(got, want, strict=True):
                pairs = zip(g.items(), w.items(), strict=True) if isinstance(w, dict) else [((0, g), (0, w))]
                for (k, x), (j, y) in pairs:
                    assert k == j and (torch.equal(x, y) if isinstance(y, torch.Tensor) else x == y)
