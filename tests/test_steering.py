"""Steering: a vector added to the residual stream of one request. Oracle: transformers with a hook that adds it."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import decoding, step
from fnengine.engine import Engine
from fnengine.errors import ConfigError, RequestError
from fnengine.host import plan
from fnengine.host.request import Request, Sampling, Stop
from fnengine.host.steer import steering
from fnengine.runtime import Runtime
from fnengine.spec import kv_bytes_per_token
from tests.models import tiny_model, upstream
from tests.text_models import byte_tokenizer

draw = np.random.default_rng(6)
PROMPT = draw.integers(3, 120, 37).tolist()
FIRST, SECOND = (draw.normal(0, 1.5, 64).astype(np.float32) for _ in range(2))
STEER = {"layers.0": FIRST}
BOTH = {"layers.1": SECOND.tolist(), "layers.0": torch.from_numpy(FIRST)}
SIZES: dict[str, Any] = dict(
    max_num_seqs=6, max_model_len=128, kv_cache_memory_bytes=1 << 20, steer=("layers.1", "layers.0")
)
KINDS: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}, "compiled": {}, "twin": {"graph_twin": True}}
GREEDY = Sampling(temperature=0)


@contextlib.contextmanager
def hooked(name: str, steer: dict[str, Any]):
    """transformers' model with the vectors added after layers."""

    def adding(vector: Any):
        by = torch.as_tensor(vector, dtype=torch.float32)
        return lambda _m, _a, out: (out[0] + by, *out[1:]) if isinstance(out, tuple) else out + by

    model = upstream(name)
    hooks = [model.model.layers[int(k.split(".")[1])].register_forward_hook(adding(v)) for k, v in steer.items()]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def expected(name: str, tokens: list[int], steer: dict[str, Any]) -> torch.Tensor:
    """[n, V] logits"""
    with hooked(name, steer) as model, torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def greedy(prompt: list[int], n: int, steer: dict[str, Any]) -> list[int]:
    out: list[int] = []
    for _ in range(n):
        out.append(int(expected("qwen3", prompt + out, steer)[-1].argmax()))
    return out


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", "float32")


@pytest.fixture
def rt(model):
    rt = Runtime(model, enforce_eager=True, **SIZES)
    yield rt
    rt.check()


@pytest.mark.parametrize("name", ["qwen3", "llama2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steer", [STEER, BOTH], ids=["one layer", "two layers"])
def test_steered_logits_are_those_of_transformers_with_a_hook(name, kind, steer):
    """A prompt in chunks, steps of one token that come often enough to be recorded or captured, a fork, a tap."""
    if name == "llama2" and steer is BOTH:
        pytest.skip("the other three say it")
    rt = Runtime(tiny_model(name, "float32"), max_num_batched_tokens=16, **SIZES, **KINDS[kind])
    assert not torch.allclose(expected(name, PROMPT, steer), expected(name, PROMPT, {}), atol=0.1)
    seq, logits = rt.extend(rt.empty, PROMPT, logits="all", steer=steer)
    close(logits, expected(name, PROMPT, steer))
    grown = seq
    seen: list[torch.Tensor] = []  # what the next layer reads
    for token in range(5, 10):
        grown, logits, inside = rt.extend(grown, [token], steer=steer, taps=["layers.0.residual"])
        close(logits, expected(name, grown.tokens, steer)[-1])
        hook = upstream(name).model.layers[1].register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
        expected(name, grown.tokens, steer)
        hook.remove()
        close(inside["layers.0.residual"], seen[-1].reshape(-1, 64)[-1:])
    close(rt.extend(seq[:20], [7, 8], steer=steer)[1], expected(name, [*PROMPT[:20], 7, 8], steer)[-1])
    rt.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbours_keep_their_bits(kind, dtype):
    """Law: a row's bits do not know whether another is steered, nor whether any layer may be."""
    model = tiny_model("qwen3", dtype)
    rt = Runtime(model, **SIZES, **KINDS[kind])
    plain = Runtime(model, **{**SIZES, "steer": ()}, **KINDS[kind])
    other = PROMPT[::-1]
    taps = ["layers.0.residual", "final"]
    seqs = [rt.empty, rt.empty]
    alone = [plain.empty, plain.empty]
    for new in ([PROMPT, other], [[5], [6]], [[7], [8]], [[9], [10]]):
        (_, first, _), (b, logits, inside) = rt.extend(list(zip(seqs, new, strict=True)), steer=[BOTH, None], taps=taps)
        (c, unsteered, _), _ = rt.extend(list(zip(seqs, new, strict=True)), taps=taps)
        (d, want, _), (e, wanted, want_inside) = plain.extend(list(zip(alone, new, strict=True)), taps=taps)
        assert torch.equal(logits, wanted) and torch.equal(unsteered, want) and not torch.equal(first, want)
        assert all(torch.equal(inside[t], want_inside[t]) for t in taps)
        seqs, alone = [c, b], [d, e]


def test_what_is_not_steered_is_not_even_added_zero():
    """-0.0 + 0.0 is 0.0; a mutant that adds is told from the honest function."""
    x = torch.tensor([[-0.0, 1.0], [-0.0, -0.0]])
    by, row = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 1])
    got = step.steered_by(by, row, x)
    assert torch.equal(got, torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    assert got.view(torch.int32)[:, 0].tolist() == x.view(torch.int32)[:, 0].tolist()
    assert (x + by[row]).view(torch.int32)[1, 1] != x.view(torch.int32)[1, 1], "the mutant"


# --- the prefix cache -------------------------------------------------------------------------------------------------


def answers(engine: Engine, steers: list[dict[str, Any]], n: int = 8) -> list[tuple[list[int], int]]:
    """(greedy tokens, cached prompt tokens) of requests with one prompt, one after another and then again at once."""
    got: list[tuple[list[int], int]] = []

    def submit(i: int, steer: dict[str, Any]) -> None:
        request = Request(
            id=f"r{i}", prompt=np.array(PROMPT), sampling=GREEDY, stop=Stop(max_tokens=n, ignore_eos=True), steer=steer
        )
        tokens: list[int] = []
        got.append((tokens, 0))

        def sink(delta: Any) -> None:
            tokens.extend(delta.tokens)
            if delta.usage is not None:
                got[i] = tokens, delta.usage.cached

        engine.submit_to(request, sink)

    for i, steer in enumerate(steers * 2):
        submit(i, steer)
        while i < len(steers) and engine.turn():
            pass
    while engine.turn():
        pass
    engine.check()
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mutant", [False, True])
def test_steered_and_unsteered_requests_share_no_blocks(model, kind, mutant, monkeypatch):
    """Oracle: transformers, with and without the hook. The mutant leaves the steering out of the salt."""
    if mutant:
        monkeypatch.setattr(plan, "salted", lambda salt, _steering: salt)
    engine = Engine.build(model, tokenizer=byte_tokenizer(131), **SIZES, **KINDS[kind])
    steers = [{}, {"layers.0": FIRST}, {"layers.0": SECOND}, {"layers.0": np.zeros(64)}]
    got = answers(engine, steers)
    want = [greedy(PROMPT, 8, steer) for steer in steers] * 2
    assert len({tuple(w) for w in want}) == 3
    if mutant:
        assert [tokens for tokens, _ in got] != want
        return
    assert [tokens for tokens, _ in got] == want
    # Each steering finds its own blocks the second time; zeros are no steering and find those of none the first time.
    assert [cached for _, cached in got] == [0, 0, 0, 32, 32, 32, 32, 32]


@pytest.mark.parametrize("swap", [0.0, 0.001])
def test_a_preempted_request_is_steered_when_it_comes_back(model, swap):
    """Oracle: a pool with room for all. Rows go from steered requests to others and back."""
    block = 16 * kv_bytes_per_token(model.spec, 4)
    got = {}
    for blocks in (200, 14):
        sizes = {**SIZES, "kv_cache_memory_bytes": (blocks + 1) * block, "enable_prefix_caching": False}
        engine = Engine.build(model, tokenizer=byte_tokenizer(131), enforce_eager=True, swap_space=swap, **sizes)
        got[blocks] = [t for t, _ in answers(engine, [STEER, {}, {"layers.1": SECOND}, {}, STEER], n=48)]
        assert (engine.gauges().preemptions > 0) == (blocks == 14)
    assert got[200] == got[14]


def test_sequences_find_only_what_was_computed_under_their_steering(rt):
    def hits() -> int:
        before, rt._ledger.hits = rt._ledger.hits, 0
        return before

    plain = rt.extend(rt.empty, PROMPT)[1]
    hits()
    close(rt.extend(rt.empty, PROMPT, steer=STEER)[1], expected("qwen3", PROMPT, STEER)[-1])
    assert hits() == 0
    steered = rt.extend(rt.empty, PROMPT, steer=STEER)[1]
    close(steered, expected("qwen3", PROMPT, STEER)[-1])
    assert hits() == 32
    assert torch.equal(rt.extend(rt.empty, PROMPT)[1], plain)
    assert hits() == 32


@pytest.mark.parametrize("mutant", [False, True])
@pytest.mark.parametrize("before,after", [(None, STEER), (STEER, None), (STEER, {"layers.0": SECOND})])
def test_what_was_computed_under_two_steerings_is_found_by_nobody(rt, before, after, mutant, monkeypatch):
    """Oracle: a Runtime whose cache is empty. The mutant publishes all that a sequence has."""
    if mutant:
        honest = rt._ledger.publish
        monkeypatch.setattr(rt._ledger, "publish", lambda path, tokens: honest(path, tokens.base))
    fresh = Runtime(rt.model, enforce_eager=True, **SIZES)
    begin = rt.extend(rt.empty, PROMPT[:20], steer=before)[0]
    mixed = rt.extend(begin, PROMPT[20:], steer=after)[0]
    longer = rt.extend(mixed, list(range(5, 40)), steer=before)[0]
    again = rt.extend(longer[:30], PROMPT[30:], steer=before)[0]
    del begin
    wrong = 0
    for steer in (before, after):
        got = rt.extend(rt.empty, [*PROMPT, *range(5, 40), 3], steer=steer)[1]
        wrong += not torch.equal(got, fresh.extend(fresh.empty, [*PROMPT, *range(5, 40), 3], steer=steer)[1])
    assert bool(wrong) == mutant
    # A prefix that is of one steering is published like any other.
    pure = rt.extend(again[:20], PROMPT[20:], steer=before)
    want = fresh.extend(fresh.empty, PROMPT, steer=before)
    assert torch.equal(pure[1], want[1])
    assert (pure[0]._pure, again._pure, longer[:7]._pure) == (37, 20, 7)


@pytest.mark.parametrize("mutant", [False, True])
def test_a_row_is_a_cache_of_a_sequence_under_one_steering(rt, mutant, monkeypatch):
    """A row holds a vector, or none, when its sequence is extended under another; the mutant takes it all the same."""
    if mutant:
        honest = rt._row_for

        def blind(seq, base, _steer, *more):
            held = rt._rows.get(seq._row[0])
            return honest(seq, base, held[2] if held else "", *more)

        monkeypatch.setattr(rt, "_row_for", blind)
    for steer in (None, STEER, BOTH, None):
        seq = rt.extend(rt.empty, PROMPT)[0]
        logits = rt.extend(seq, [7], steer=steer)[1]
        with torch.no_grad():  # only the last token is steered
            cache = upstream("qwen3")(torch.tensor([PROMPT]), use_cache=True).past_key_values
            with hooked("qwen3", steer or {}) as oracle:
                # transformers calls it `cache` from 5.24 on, and warns of the old name.
                name = "cache" if "cache" in inspect.signature(oracle.forward).parameters else "past_key_values"
                want = oracle(torch.tensor([[7]]), **{name: cache}).logits[0, -1]
        if mutant and not torch.allclose(logits, want, atol=1e-3):
            return
        close(logits, want)
    assert not mutant, "the mutant was not caught"


def test_a_kept_sequence_stays_what_it_was(rt, tmp_path):
    """It is published under its own steering when it comes back, and only so far as it is of one."""
    steered = rt.extend(rt.empty, PROMPT, steer=STEER)[0]
    mixed = rt.extend(rt.extend(rt.empty, PROMPT[:20])[0], PROMPT[20:], steer=STEER)[0]
    for name, seq in (("steered", steered), ("mixed", mixed)):
        rt.save(seq, tmp_path / name)
        there = Runtime(rt.model, enforce_eager=True, **SIZES)
        back = there.load(tmp_path / name)
        assert (back._path.salt, back._pure) == (seq._path.salt, seq._pure)
        assert torch.equal(there.extend(back, [9], steer=STEER)[1], rt.extend(seq, [9], steer=STEER)[1])
        assert torch.equal(there.extend(there.empty, PROMPT)[1], rt.extend(rt.empty, PROMPT)[1])
        assert there._ledger.hits == {"steered": 0, "mixed": 16}[name]
        there.extend(there.empty, PROMPT, steer=STEER)
        assert there._ledger.hits == {"steered": 32, "mixed": 16}[name]


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given,why",
    [
        ({"layers.2": FIRST}, r"'layers.2' is not one that may be steered.*one of layers.0, layers.1"),
        ({"layers.0": FIRST[:5]}, "has 5 numbers, the model is 64 wide"),
        ({"layers.0": [FIRST]}, r"has the shape \[1, 64\]"),
        ({"layers.0": [1e39] * 64}, "not finite"),
        ({"layers.0": [float("nan")] * 64}, "not finite"),
        ({"layers.0": ["x"] * 64}, "not made of numbers"),
        ({"layers.0": [[1], [2, 3]]}, "not made of numbers"),
        (FIRST, "must be layer -> vector"),
        ([STEER, STEER], "1 pairs but 2 steerings"),
    ],
)
def test_steering_that_means_nothing_is_refused(rt, given, why):
    with pytest.raises(RequestError, match=why) as caught:
        rt.extend(rt.empty, PROMPT, steer=given)
    assert caught.value.param == "steer"


def test_layers_are_declared(model):
    engine = Engine.build(model, tokenizer=byte_tokenizer(131), enforce_eager=True, **{**SIZES, "steer": ()})
    with pytest.raises(RequestError, match=r"start with --steer layers\.0"):
        answers(engine, [STEER])
    assert engine.device.state.rows.steer.numel() == 0
    with pytest.raises(ConfigError, match=r"no layer 'layers.9'.*layers.0 to layers.1"):
        Runtime(model, **{**SIZES, "steer": ("layers.9",)})


def test_equal_steering_has_equal_digests():
    declared = ("layers.0", "layers.1")
    a, b = (
        steering(dict(reversed({**STEER, "layers.1": SECOND}.items())), declared, 64),
        steering({**STEER, "layers.1": SECOND}, declared, 64),
    )
    assert a is not None and b is not None and a.digest == b.digest
    others = [
        steering(g, declared, 64) for g in (STEER, {"layers.1": FIRST}, {"layers.0": -FIRST}, {"layers.1": SECOND})
    ]
    assert len({x.digest for x in (a, *others) if x is not None}) == 5


def test_a_strategy_is_not_steered(demo):
    with pytest.raises(RequestError, match="steer cannot be asked of a strategy"):
        demo.generate("Once", steer={"layers.0": [1.0] * demo.model.spec.width}, strategy=decoding.sample)


@pytest.fixture(scope="module")
def demo():
    return fn.LLM("demo", max_num_seqs=4, max_model_len=256, enforce_eager=True, steer=("layers.0",))


def test_generate_and_chat_are_steered(demo):
    """Oracle: the loop over `extend`, whose steering is checked above; a tap of the model itself is the vector."""
    rt = Runtime(demo.model, max_num_seqs=4, max_model_len=256, enforce_eager=True, steer=("layers.0",))
    tap = rt.extend(rt.empty, demo.model.encode("A dragon!"), taps=["layers.0.residual"])[2]["layers.0.residual"]
    steer = {"layers.0": tap[-1]}
    talk = [{"role": "user", "content": "Tell me a story."}]
    ids = demo.engine.tokenizer.encode(demo.engine.tokenizer.render_chat(talk), add_special=False)

    def by_hand(prompt: list[int], steer: dict[str, Any] | None) -> list[int]:
        seq, new, out = rt.empty, prompt, []
        for _ in range(8):
            seq, token = rt.extend(seq, new, sample=GREEDY, steer=steer)
            out.append(token)
            new = [token]
        return out

    stop = Stop(max_tokens=8, ignore_eos=True)
    for given in (steer, None, steer):
        (told,) = demo.generate("Once upon a time", GREEDY, stop, steer=given)
        assert list(told.choices[0].tokens) == by_hand(demo.model.encode("Once upon a time"), given)
        (told,) = demo.chat(talk, GREEDY, stop, steer=given)
        assert list(told.choices[0].tokens) == by_hand(ids, given)
    assert by_hand(ids, steer) != by_hand(ids, None)
