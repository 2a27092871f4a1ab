"""Models with recurrent layers, driven through a `Runtime` and an engine.

Oracle: transformers' own model in float32 (eager attention, its plain-torch recurrences), one dense forward. Beside it
two laws: a sequence's bits do not depend on how it was computed, and what is kept of states is what they are.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import checkpoint, memory, params
from fnengine.engine import Engine
from fnengine.errors import CheckpointError, ConfigError, KeptError, RequestError
from fnengine.families import spec_from_config
from fnengine.host import states
from fnengine.host.request import Request, Sampling, Speculate, Stop, fold_in
from fnengine.leaves import Packing
from fnengine.model import Model
from fnengine.settings import Mode
from fnengine.spec import DeltaNet, Mamba2, state_bytes
from tests import family_laws as laws
from tests.family_laws import oracle, tokens, worst
from tests.models import HYBRID, threads, tiny_folder, tiny_model
from tests.text_models import byte_tokenizer

TOLERANCE = 1e-4
"""Largest difference of a logit over the largest logit; seen are 2e-5, because the delta rule magnifies rounding."""

every = pytest.mark.parametrize("name", HYBRID)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(states, "EVERY", 2)  # states at 32, 64, ... tokens, so that short texts have some
    monkeypatch.setattr(states, "LEAST", 1)
    with threads(1):
        yield


def runtime(model: Model, rows: int = 4, **options) -> fn.Runtime:
    return laws.runtime(model, max_num_seqs=rows, **options)


@every
def test_logits(name: str):
    """A prompt longer than a step, a fork of a slice, and a prefix that ends where a state is kept."""
    cuts = laws.Cuts(90, 75, 87, fork=77)
    laws.logits_are_those_of_transformers(name, runtime(tiny_model(name)), TOLERANCE, cuts, hit=64)


@every
def test_greedy_text(name: str):
    laws.a_greedy_text_is_that_of_transformers(name, runtime(tiny_model(name)))


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


@pytest.mark.parametrize("name", ["qwen3-5", pytest.param("bamba", marks=pytest.mark.slow)])
def test_compiled_layers(name: str, caplog):
    """Oracle: the same steps uncompiled. Small steps are recorded, though a recording changes states when it is tried;
    and the law that a sequence's bits do not depend on its chunks holds for compiled layers, too."""
    ids = tokens(60, seed=6)
    eager = runtime(tiny_model(name))
    want = eager.extend(eager.empty, ids, logits="all")[1]
    rt = runtime(tiny_model(name), enforce_eager=False)
    assert rt.built.execution.startswith("compiled")
    got = []
    for cuts in ([0, 33, *range(34, 61)], [0, 7, 40, *range(45, 61)]):
        seq, parts = rt.empty, []
        for a, b in itertools.pairwise(cuts):
            seq, logits = rt.extend(seq, ids[a:b], logits="all")
            parts.append(logits)
        got.append(torch.cat(parts))
    assert worst(got[0], want) < TOLERANCE and torch.equal(*got)
    assert "without a recording" not in caplog.text


def test_steps_as_graphs_run_them():
    """Oracle: the same tokens without graphs. Padded steps leave every state but the null row's alone."""
    model, ids = tiny_model("qwen3-5"), tokens(50, 8)
    plain, twin = runtime(model), runtime(model, graph_twin=True, enforce_eager=False)
    for rt in (plain, twin):
        assert rt.built.device.kept == 4
    a, want = plain.extend(plain.empty, ids[:40])
    b, got = twin.extend(twin.empty, ids[:40])
    assert worst(got, want) < TOLERANCE
    for t in ids[40:]:
        (a, want), (b, got) = plain.extend(a, [t]), twin.extend(b, [t])
        assert worst(got, want) < TOLERANCE


# --- engines ----------------------------------------------------------------------------------------------------------

NUMBER = itertools.count()


def engine(name: str, **options) -> Engine:
    sizes = dict(max_num_seqs=3, max_model_len=128, max_num_batched_tokens=48, kv_cache_memory_bytes=1 << 20)
    return Engine.build(tiny_model(name), tokenizer=byte_tokenizer(131), **{**sizes, "enforce_eager": True, **options})


def request(prompt: list[int], n: int, **kw) -> Request:
    sampling, stop = kw.pop("sampling", Sampling(temperature=0)), Stop(max_tokens=n, ignore_eos=True)
    return Request(f"r{next(NUMBER)}", np.array(prompt, np.int32), sampling, stop, **kw)


def answers(e: Engine, requests: list[Request]) -> list[list[int]]:
    """Tokens of each request, which come two turns apart."""
    got: list[list[int]] = [[] for _ in requests]
    waiting, turns = list(enumerate(requests)), 0
    while waiting or e.turn():
        if waiting and turns % 2 == 0:
            i, r = waiting.pop(0)
            e.submit_to(r, lambda d, i=i: got[i].extend(d.tokens))
        turns += 1
        assert turns < 5000, "no progress"
    e.check()
    assert e.gauges().blocks_held == 0
    return got


@pytest.mark.parametrize("blocks", [None, 12], ids=["roomy", "preempted"])
@pytest.mark.parametrize("depth", [0, 1])
def test_an_engine_in_company(depth: int, blocks: int | None):
    """Oracle: transformers' greedy tokens, whatever else is in the batch, found in the cache, or sent back."""
    name, common = "qwen3-5", tokens(50, 20)
    size = (
        {}
        if blocks is None
        else {
            "kv_cache_memory_bytes": blocks
            * memory.block_of(tiny_model(name).spec, runtime(tiny_model(name)).built.ops.kv, torch.float32)
        }
    )
    e = engine(name, **size)
    e.device.depth = depth
    prompts = [common + tokens(n, n) for n in (9, 21, 3, 14, 30)]
    got = answers(e, [request(p, 24) for p in [*prompts, prompts[1]]])
    for p, ids in zip([*prompts, prompts[1]], got, strict=True):
        assert ids == oracle(name, p + ids)[len(p) - 1 : -1].argmax(-1).tolist()
    gauges = e.gauges()
    assert gauges.preemptions > 0 if blocks else gauges.prefix_hits > 0


def test_choices_and_embeddings():
    """Oracle: a runtime's loop with each choice's seed, and its taps."""
    model, prompt = tiny_model("qwen3-5"), tokens(60, 3)
    e, rt = engine("qwen3-5"), runtime(model)
    drawn, three = Sampling(temperature=1.0, seed=5), [[], [], []]
    several = Request("several", np.array(prompt, np.int32), drawn, Stop(max_tokens=12, ignore_eos=True), n=3)
    e.submit_to(several, lambda d: three[d.index].extend(d.tokens))
    vectors = {}
    for pooling in ("mean", "last"):
        one = Request(pooling, np.array(prompt, np.int32), Sampling(), Stop(max_tokens=0), pooling=pooling)
        e.submit_to(one, lambda d, p=pooling: vectors.update({p: d.vector}))
    while e.turn():
        pass
    e.check()
    for i, got in enumerate(three):
        seq, new = rt.empty, prompt
        for token in got:
            seq, chosen = rt.extend(seq, new, sample=dataclasses.replace(drawn, seed=fold_in(5, i)))
            new = [chosen]
            assert chosen == token
    seen = rt.extend(rt.empty, prompt, logits=None, taps=["final"])[1]["final"]
    assert np.allclose(vectors["mean"], seen.mean(0), atol=1e-5) and np.allclose(vectors["last"], seen[-1], atol=1e-5)


@fn.strategy
async def by_logits(ctx, prompt, n=20):
    """Greedy decoding, token by token."""
    seq, new = ctx.empty, prompt
    for _ in range(n):
        seq, logits = await ctx.extend(seq, new)
        new = [int(logits.argmax())]
        ctx.emit(new)


def test_strategies_go_on_where_they_left(monkeypatch):
    """Oracle: greedy tokens of transformers; each `extend` of a strategy computes its new token alone."""
    name, prompt = "bamba", tokens(37, 30)
    model = dataclasses.replace(tiny_model(name))
    model.__dict__["tokenizer"] = byte_tokenizer(131)  # its cached property
    steps: list[int] = []
    llm = fn.LLM(model, max_model_len=128, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    launch = llm.engine.device.launch
    monkeypatch.setattr(llm.engine.device, "launch", lambda step: steps.append(len(step.token)) or launch(step))
    stop = Stop(max_tokens=20, ignore_eos=True)
    (done,) = llm.generate([prompt], Sampling(temperature=0), stop, strategy=by_logits)
    got = list(done.choices[0].tokens)
    assert got == oracle(name, prompt + got)[36:-1].argmax(-1).tolist()
    assert sum(steps) == 37 + 19


def test_what_cannot_be_done_is_refused_by_name(tmp_path):
    model = tiny_model("bamba")
    with pytest.raises(ConfigError, match="BambaForCausalLM has recurrent layers"):
        engine("bamba", speculate=Speculate("ngram", 3))
    with pytest.raises(ConfigError, match="BambaForCausalLM has recurrent layers"):
        runtime(model, steer=("layers.0",))
    with pytest.raises(ConfigError, match="--kept-states"):
        runtime(model, kept_states=-1)
    rt = runtime(model)
    seq, _ = rt.extend(rt.empty, [5, 6])
    with pytest.raises(KeptError, match="recurrent"):
        rt.save(seq, tmp_path / "kept")
    e = engine("bamba")
    with pytest.raises(RequestError, match="recurrent") as refused:
        e.submit_to(request([5, 6], 3, speculate=Speculate("ngram", 3)), lambda _: None)
    assert refused.value.param == "speculative"
    assert len(answers(e, [request([5, 6], 3)])[0]) == 3, "the engine lives on"


def test_taps_tell_of_new_tokens_only():
    """Also where tokens before them are computed again. Oracle: a whole extend of the same tokens."""
    model, ids = tiny_model("qwen3-next"), tokens(50, 31)
    rt, fresh = runtime(model), runtime(model)
    seq, _ = rt.extend(rt.empty, ids)
    _, seen = rt.extend(seq[:45], ids[45:], logits=None, taps=["layers.1.residual"])
    _, want = fresh.extend(fresh.empty, ids, logits=None, taps=["layers.1.residual"])
    assert torch.equal(seen["layers.1.residual"], want["layers.1.residual"][45:])


# --- checkpoints and memory -------------------------------------------------------------------------------------------


@every
def test_every_tensor_of_a_checkpoint_is_read(name: str, tmp_path):
    """None is missing, none unused, else loading raises; heads that predict further tokens may lie beside them."""
    from safetensors.torch import load_file, save_file

    source = tiny_folder(name)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    held = {n for _, info in params.arrays(params.abstract(tiny_model(name).spec)) for n, _ in info.parts}
    fused = {i.fused.name for _, i in params.arrays(params.abstract(tiny_model(name).spec)) if i.fused}
    assert set(weights) <= held | fused
    further = {} if name == "bamba" else {"mtp.layers.0.fc.weight": torch.zeros(3)}
    save_file({**weights, **further}, tmp_path / "model.safetensors")
    spec = checkpoint.read_spec(tmp_path)
    checkpoint.load(tmp_path, spec, torch.float32, torch.device("cpu"), Packing("dense", ""))
    save_file({**weights, "model.layers.0.extra.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="extra"):
        checkpoint.load(tmp_path, spec, torch.float32, torch.device("cpu"), Packing("dense", ""))


@pytest.mark.parametrize(
    ("architecture", "count"),
    [
        ("Qwen3_5ForCausalLM", 8_953_803_264),
        ("Qwen3_5MoeForCausalLM", 34_660_610_688),
        ("Qwen3_5ForConditionalGeneration", 8_953_803_264),
    ],
)
def test_the_default_configs_of_qwen_3_5(architecture: str, count: int):
    """Oracle: parameters of transformers' own models, without the tower that sees."""
    import transformers

    config = getattr(transformers, architecture).config_class().to_dict()
    spec = spec_from_config({**config, "architectures": [architecture]})
    assert params.count(spec) == count
    assert [isinstance(k.mixer, DeltaNet) for k in spec.layers[:4]] == [True, True, True, False]


def test_a_model_that_also_sees_is_read_for_its_text():
    """Oracle: the text model's logits; names differ, weights are the same."""
    import transformers

    text = transformers.AutoConfig.from_pretrained(tiny_folder("qwen3-5")).to_dict()
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text, "vision_config": {"depth": 1}}
    spec = spec_from_config({**whole, "tie_word_embeddings": True, "image_token_id": 7})
    mine = tiny_model("qwen3-5").spec
    assert (spec.layers, spec.tied) == (mine.layers, mine.tied)
    names = {n for _, info in params.arrays(params.abstract(spec)) for n, _ in info.parts}
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv.weight" in names
    assert "model.language_model.layers.2.self_attn.q_proj.weight" in names


def test_states_are_a_line_of_the_ledger():
    """Oracle: worked by hand. Qwen3-Next has 36 recurrent layers with 32 heads of 128 x 128 and tails of 3 x 8192."""
    import json
    from pathlib import Path

    config = json.loads((Path(__file__).parent / "configs" / "Qwen3-Next-80B-A3B-Instruct.json").read_text())
    spec = spec_from_config(config)
    assert state_bytes(spec) == 36 * 4 * (32 * 128 * 128 + 3 * 8192)
    shapes = memory.Shapes(spec, torch.bfloat16, Packing("tiled", ""), Mode(512, 8), max_len=4096, blocks=9, kept=3)
    assert memory.account(shapes).line("states").bytes == (8 + 1 + 3) * state_bytes(spec)
    assert shapes.per_block == 12 * 16 * 2 * 2 * 256 * 2, "only layers of attention have blocks"
    held = runtime(tiny_model("bamba"), rows=5, kept_states=7)
    own = sum(t.nbytes for m in held.built.device.memories for t in (m.tail, m.matrix))
    assert held.built.account is not None and held.built.account.line("states").bytes == own


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3-next", {"taps": 3}),
        ("qwen3-next", {"key_heads": 1, "heads": 2}),
        ("bamba", {"least": 0.0, "most": float("inf")}),
        ("bamba", {"groups": 1, "key_width": 24}),
    ],
)
def test_mutants_are_caught(name: str, change: dict):
    """A wrong convolution, heads that share wrong keys, steps without bounds, one group for two: shapes or logits
    show it."""
    model, ids = tiny_model(name), tokens(41, 3)
    kinds = tuple(
        dataclasses.replace(k, mixer=dataclasses.replace(k.mixer, **change))
        if isinstance(k.mixer, (DeltaNet, Mamba2))
        else k
        for k in model.spec.layers
    )
    told = dataclasses.replace(model, spec=dataclasses.replace(model.spec, layers=kinds))
    try:
        rt = runtime(told)
        got = rt.extend(rt.empty, ids, logits="all")[1]
    except RuntimeError:
        return
    assert worst(got, oracle(name, ids)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["qwen3-5", "bamba"])
def test_rounded_weights(name: str):
    """Oracle: transformers in float32, within what 8 bits leave; and the bits do not depend on chunks."""
    model, ids = fn.load(str(tiny_folder(name)), dtype="float32", device="cpu", quantization="int8"), tokens(40, 12)
    got = []
    for cut in (13, 40):
        rt = runtime(model)
        seq, first = rt.extend(rt.empty, ids[:cut], logits="all")
        got.append(torch.cat([first, rt.extend(seq, ids[cut:], logits="all")[1]]) if cut < 40 else first)
    assert torch.equal(*got)
    off = (got[0] - oracle(name, ids)).square().mean().sqrt() / oracle(name, ids).square().mean().sqrt()
    assert 1e-5 < float(off) < 0.1
