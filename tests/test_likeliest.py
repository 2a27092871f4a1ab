"""The likeliest next tokens of an extend, found inside the step. Oracle: torch's log_softmax and sort of its logits."""

from __future__ import annotations

import asyncio
import gc

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import decoding
from fnengine.decoding import Job, beam
from fnengine.engine import Engine
from fnengine.errors import RequestError
from fnengine.host.request import Request, Sampling, Speculate, Stop
from fnengine.processors import GROUPED, leading
from tests.models import tiny_model
from tests.text_models import byte_tokenizer

PROMPT = np.random.default_rng(1).integers(3, 120, 37).tolist()
OTHER = np.random.default_rng(2).integers(3, 120, 11).tolist()
DRAWN = Sampling(temperature=0.9, top_p=0.95, seed=21)
OPTIONS = {"max_model_len": 96, "kv_cache_memory_bytes": 1 << 20, "enforce_eager": True, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def model():
    model = tiny_model("qwen3", "float32")
    model.__dict__["tokenizer"] = byte_tokenizer(model.spec.vocab)  # its cached property
    return model


@pytest.fixture(scope="module")
def shared(model):
    return fn.Runtime(model, **OPTIONS)


@pytest.fixture
def rt(shared):
    yield shared
    gc.collect()
    shared.check()
    assert shared.free_blocks == shared._device.blocks - 1, "a block is still held"


def ranked(logits: torch.Tensor, k: int) -> tuple[list[int], np.ndarray]:
    logprobs, ids = logits.float().log_softmax(-1).sort(descending=True, stable=True)
    return ids[:k].tolist(), logprobs[:k].numpy()


def same(found, logits: torch.Tensor, k: int) -> bool:
    ids, logprobs = ranked(logits, k)
    return found.ids.tolist() == ids and np.array_equal(found.logprobs, logprobs)


def test_they_are_the_leading_ones_of_its_logits(rt):
    seq, logits, found = rt.extend(rt.empty, PROMPT, logits="last", likeliest=5)
    assert same(found, logits, 5)
    pairs = [(seq, [7]), (rt.empty, OTHER), (seq[:20], [8, 9])]
    for _, logits, found in rt.extend(pairs, logits="last", likeliest=9):
        assert same(found, logits, 9)
    for _, logits, found in rt.extend(pairs, logits="all", likeliest=3):
        assert logits.dim() == 2 and same(found, logits[-1], 3)
    (_, token, found, taps), (_, _, again, _) = rt.extend(
        [(seq, [7]), (seq, [7])], sample=DRAWN, likeliest=4, taps=("final",)
    )
    _, drawn, logits = rt.extend(seq, [7], sample=DRAWN, logits="last")
    assert token == drawn and same(found, logits, 4) and same(again, logits, 4) and list(taps) == ["final"]


def test_without_a_name_there_are_no_logits_and_more_than_all_is_all(rt):
    seq, found = rt.extend(rt.empty, PROMPT, likeliest=1000)
    _, logits = rt.extend(seq[:-1], PROMPT[-1:])
    assert same(found, logits, 1000) and len(found.ids) == rt.model.spec.vocab < 1000


def test_a_prompt_longer_than_a_step_has_them_after_its_last_token(model):
    rt = fn.Runtime(model, max_num_batched_tokens=16, **OPTIONS)
    seq, found = rt.extend(rt.empty, PROMPT, likeliest=6)
    _, logits = rt.extend(rt.empty, PROMPT)
    assert len(seq) == len(PROMPT) and same(found, logits, 6)


def test_a_graph_gives_them_too(model):
    """Oracle: the same without graphs. The twin of a graph fixes its work and reads nothing back before the end."""
    made = []
    for options in ({}, {"graph_twin": True, "graph_capture": "lazy"}):
        rt = fn.Runtime(model, **OPTIONS, **options)
        seq, first = rt.extend(rt.empty, PROMPT, likeliest=8)
        seqs, found = [seq] * 4, [first]
        for token in range(7, 12):
            results = rt.extend([(s, [token + i]) for i, s in enumerate(seqs)], likeliest=8)
            seqs, found = [s for s, _ in results], [*found, *(x for _, x in results)]
        made.append(found)
    assert rt.built.device.graphs is not None and rt.built.device.graphs.captured
    for a, b in zip(*made, strict=True):
        assert a.ids.tolist() == b.ids.tolist() and np.array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("k", [-1, 1025, 2.0, True, "3"])
def test_what_is_no_number_of_tokens_is_refused(rt, k):
    with pytest.raises(RequestError, match="likeliest must be 0 to 1024"):
        rt.extend(rt.empty, PROMPT, likeliest=k)


KINDS = {
    "3": {"likeliest": 3},
    "7": {"likeliest": 7},
    "logits": {},
    "all": {"logits": "all", "likeliest": 2},
    "token": {"sample": DRAWN},
    "both": {"sample": DRAWN, "likeliest": 5},
    "taps": {"likeliest": 4, "taps": ("final",)},
}


@fn.strategy
async def asks(ctx, prompt, into, name):
    seq, _ = await ctx.extend(ctx.empty, prompt, logits=None)
    await asyncio.sleep(0)
    into[name] = (await ctx.extend(seq, [7, 8], **KINDS[name]))[1:]
    into[name + " pair"] = [r[1:] for r in await ctx.extend([(seq, [7]), (seq, [8, 9])], **KINDS[name])]


def check(into, rt):
    """Each is what the same extend gives alone. Logits and taps bit by bit: rows do not depend on their company."""
    seq, _ = rt.extend(rt.empty, PROMPT)
    for name, kw in KINDS.items():
        wanted = [rt.extend(seq, [7, 8], **kw)[1:]] + [r[1:] for r in rt.extend([(seq, [7]), (seq, [8, 9])], **kw)]
        for got, want in zip([into[name], *into[name + " pair"]], wanted, strict=True):
            assert len(got) == len(want), name
            for g, w in zip(got, want, strict=True):
                if isinstance(w, torch.Tensor):
                    assert torch.equal(g, w)
                elif isinstance(w, tuple):
                    assert all(map(np.array_equal, g, w)), name
                else:
                    assert g == w if isinstance(w, int) else torch.equal(g["final"], w["final"])


def test_strategies_that_ask_for_different_things_get_what_they_would_get_alone(rt):
    into = {}
    done = decoding.run(rt, [Job(asks, PROMPT, {"into": into, "name": name}) for name in KINDS])
    assert [d.error for d in done] == [None] * len(KINDS)
    check(into, rt)


def test_so_they_do_among_an_engines_requests(model, rt):
    """Beside requests that want other log-probabilities, or none, and in steps in which other rows choose several
    tokens, because drafts are verified."""
    engine, into, deltas, both = Engine.build(model, strategies=[asks], **{**OPTIONS, "max_num_seqs": 8}), {}, [], []
    assert engine.built is not None
    launch = engine.built.device.launch

    def seen(step):
        extends = [r for r in step.row[step.emit == 0] if step.ask.logprobs is not None]
        both.append(bool(extends) and step.emit.max() > 1)
        return launch(step)

    engine.built.device.launch = seen
    for name in KINDS:
        engine.submit_to(
            Request(name, np.array(PROMPT, np.int32), strategy=("asks", {"into": into, "name": name})), deltas.append
        )
    stop = Stop(max_tokens=12, ignore_eos=True)
    for i, k in enumerate((None, 2)):
        engine.submit_to(Request(f"plain {i}", np.array(OTHER, np.int32), DRAWN, stop, logprobs=k), deltas.append)
    drafts = Speculate("prediction", 4, False, tuple(OTHER * 3))
    for i in range(2):
        asked = Request(f"d{i}", np.array(OTHER * 2, np.int32), Sampling(temperature=0), stop, speculate=drafts)
        engine.submit_to(asked, deltas.append)
    while engine.turn():
        pass
    assert any(both)
    assert not [d.error for d in deltas if d.error]
    assert {len(p.top) for d in deltas for p in d.logprobs or ()} == {2}
    check(into, rt)


def test_beams_refuse_to_be_wider_than_their_candidates(rt):
    (done,) = decoding.run(rt, [Job(beam, PROMPT, {"width": 600})])
    assert isinstance(done.error, RequestError) and "width must be between 1 and" in str(done.error)


@pytest.mark.parametrize("V", [300, GROUPED, GROUPED + 1, 40_000])
def test_leading_ones_with_and_without_ties(V):
    """Oracle: a stable sort."""
    g = torch.Generator().manual_seed(V)
    apart = torch.randperm(3 * V, generator=g).view(3, V).float()
    tied = torch.randint(0, 40, (3, V), generator=g).float()
    cut = apart.clone()
    cut[1, :] = torch.where(cut[1] >= cut[1].sort(descending=True).values[9], 1e9, cut[1])  # ten lead, alike
    for x in (apart, tied, cut):
        for n in (1, 8, 10, 60):
            value, id = leading(x, n)
            values, ids = x.sort(dim=1, descending=True, stable=True)
            assert torch.equal(value, values[:, :n]) and torch.equal(id, ids[:, :n])
