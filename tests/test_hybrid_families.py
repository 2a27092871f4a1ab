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
from fnengine import checkpoint, memory, params, tree
from fnengine.decoding.speculate import Stateless
from fnengine.engine import Engine
from fnengine.errors import CheckpointError, ConfigError, KeptError, RequestError
from fnengine.families import spec_from_config
from fnengine.families.names import QWEN
from fnengine.host import guide, states
from fnengine.host.request import Request, Sampling, Speculate, Stop, fold_in
from fnengine.leaves import Packing
from fnengine.model import Model
from fnengine.settings import Mode
from fnengine.spec import DeltaNet, Mamba2, state_bytes
from tests import family_laws as laws
from tests.family_laws import oracle, tokens, worst
from tests.models import HYBRID, threads, tiny_folder, tiny_model
from tests.test_steering import hooked
from tests.text_models import byte_tokenizer
from tests.toy import Rule

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


def nearly_right(known: list[int], wrong: int):
    """A proposer that knows the text and says every so manieth token of it wrong."""

    def guess(tokens, k):
        line = known[len(tokens) : len(tokens) + k]
        return [(t + 1) % 131 if (len(tokens) + j) % wrong == 0 else t for j, t in enumerate(line)]

    return lambda _: Stateless(guess)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("qwen3-next", "plain"),
        ("bamba", "ahead"),
        ("bamba", "preempted"),
        pytest.param("bamba", "plain", marks=pytest.mark.slow),
        pytest.param("qwen3-next", "ahead", marks=pytest.mark.slow),
        pytest.param("qwen3-next", "preempted", marks=pytest.mark.slow),
    ],
)
def test_drafts_change_no_token(name: str, how: str):
    """Right and wrong drafts of several lengths, n-gram lookup, sampling with log-probabilities, through places where
    states are kept, which later requests begin from. Oracles: greedy tokens of transformers; the same without drafts.
    """
    prompt, other = tokens(21, 40), tokens(30, 41)
    tight = 11 * memory.block_of(tiny_model(name).spec, runtime(tiny_model(name)).built.ops.kv, torch.float32)
    sizes = {"kv_cache_memory_bytes": tight} if how == "preempted" else {"graph_twin": how == "ahead"}
    plain = engine(name)
    drawn = {"sampling": Sampling(temperature=0.9, top_p=0.95, seed=3, presence_penalty=0.3), "logprobs": 2}
    greedy, sampled = answers(plain, [request(prompt, 90), request(other, 60, **drawn)])
    assert greedy == oracle(name, prompt + greedy)[20:-1].argmax(-1).tolist()
    makers = {f"wrong{n}": nearly_right(prompt + greedy, n) for n in (3, 7, 100)}
    makers["sampled"] = nearly_right(other + sampled, 5)
    e = engine(name, proposers=makers, **sizes)
    wants = [
        *(request(prompt, 90, speculate=Speculate(f"wrong{n}", k, False)) for n, k in ((3, 2), (7, 4), (100, 16))),
        request(other, 60, speculate=Speculate("sampled", 4, False), **drawn),
        request(prompt, 90, speculate=Speculate("ngram", 4)),
    ]
    got = answers(e, wants)
    assert got == [greedy, greedy, greedy, sampled, greedy]
    counts = e.drafting.counts
    assert counts.accepted > 100 and counts.proposed > counts.accepted + 20
    assert (e.gauges().preemptions > 0) == (how == "preempted")
    if how == "plain":  # what was kept on the way is right, too
        before = e.gauges().prefix_hits
        line = prompt + greedy
        assert answers(e, [request(line[:100], 11)]) == [line[100:111]] and e.gauges().prefix_hits - before == 96


def test_a_draft_model_beside_layers_with_states():
    """It has the target's rows and nothing of its states. Oracle: the same without drafts."""
    asked = [request(tokens(n, n), 50) for n in (9, 40, 33, 70)]
    want = answers(engine("qwen3-next"), asked)
    e = engine("qwen3-next", companion=tiny_model("qwen3"), speculate=Speculate("draft_model", 3, False))
    asked = [request(tokens(n, n), 50) for n in (9, 40, 33, 70)]
    assert answers(e, asked) == want and e.drafting.counts.proposed > 300
    with pytest.raises(ConfigError, match=r"a draft model with recurrent layers.*BambaForCausalLM"):
        engine("qwen3-next", companion=tiny_model("bamba"))


def test_drafts_over_recorded_layers():
    """Small steps of compiled layers are recorded, and trying that changes states and notes. Oracle: the same without
    drafts."""
    prompt = tokens(21, 40)
    (want,) = answers(engine("qwen3-5", enforce_eager=False), [request(prompt, 60)])
    e = engine("qwen3-5", enforce_eager=False, proposers={"known": nearly_right(prompt + want, 4)})
    for _ in range(3):
        assert answers(e, [request(prompt, 60, speculate=Speculate("known", 3, False))]) == [want]
    assert e.drafting.counts.accepted > 60


@pytest.mark.parametrize("part", ["behind", "heard", "noted"])
def test_a_state_that_forgets_right_guesses_is_caught(part: str, monkeypatch):
    """Mutants: nothing is taken in of what was noted, or notes are lost."""
    real = Engine.build

    def build(*a, **kw):
        e = real(*a, **kw)
        launch = e.device.launch

        def lossy(step):
            ticket = launch(step)
            if part == "behind":
                e.device.state.rows.behind.zero_()
            for m in e.device.memories if part != "behind" else ():
                getattr(m, part).zero_()
            return ticket

        e.device.launch = lossy
        return e

    monkeypatch.setattr(Engine, "build", build)
    with pytest.raises(AssertionError):
        test_drafts_change_no_token("bamba", "plain")


@pytest.mark.parametrize("ahead", [False, True])
def test_forced_runs_of_a_guide_and_drafts_beside_it(ahead: bool):
    """A third of a made-up guide's places leave no choice. Oracle: the same engine token by token, nothing forced."""

    def text(forced: int, **kw) -> tuple[list[list[int]], int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guide, "FORCED", forced)
            e = engine("qwen3-5", graph_twin=ahead)
            asked = [request(tokens(30, i), 60, guide=Rule(i, 131), **kw) for i in range(5)]
            return answers(e, asked), e.gauges().steps

    (want, slow), (got, fast) = text(0), text(16)
    assert got == want and fast < slow - 4 and max(map(len, got)) > 20
    assert text(16, speculate=Speculate("suffix", 4, False))[0] == want


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


@pytest.mark.parametrize(
    ("name", "places"), [("qwen3-next", 8), ("bamba", 0), pytest.param("bamba", 8, marks=pytest.mark.slow)]
)
def test_a_loaded_sequence_goes_on_as_the_saved_one(name: str, places: int, tmp_path):
    """Also one whose row is gone, whose state is not kept, and a slice; and what is loaded is found by others. Oracle:
    the bits of a runtime in which nothing was saved."""
    model, more, file = tiny_model(name), tokens(9, 51), tmp_path / "kept"
    here, there = runtime(model, rows=2, kept_states=places), runtime(model, rows=2, kept_states=places)
    for n, cut in ((1, 1), (16, 16), (37, 37), (75, 75), (75, 50)):
        fresh = runtime(model)
        want = fresh.extend(fresh.empty, tokens(n, n)[:cut] + more, logits="all")[1][cut:]
        seq = here.extend(here.empty, tokens(n, n))[0][:cut]
        for lost in (False, True):
            if lost:
                for i in range(9):
                    here.extend(here.empty, tokens(40, 100 + i))
            here.save(seq, file)
            again = there.load(file)
            assert again.tokens == tokens(n, n)[:cut] and torch.equal(there.extend(again, more, logits="all")[1], want)
            assert torch.equal(here.extend(seq, more, logits="all")[1], want), "saving changes nothing"
            here.check()
            there.check()
            if places:
                steps: list[int] = []
                launch = there.built.device.launch
                there.built.device.launch = lambda step, f=launch, to=steps: to.append(len(step.token)) or f(step)
                there.extend(there.load(file), more)
                there.built.device.launch = launch
                assert sum(steps) == 9, "nothing was computed again"
    here.save(here.empty, file)
    assert len(there.load(file)) == 0


def test_a_damaged_file_of_states_is_refused_and_changes_nothing(tmp_path):
    model, file = tiny_model("bamba"), tmp_path / "kept"
    rt = runtime(model)
    seq, _ = rt.extend(rt.empty, tokens(40, 1))
    rt.save(seq, file)
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1  # of the last state: 160 bytes of tokens are behind it
    file.write_bytes(bytes(data))
    fresh = runtime(model)
    free = fresh.free_blocks
    with pytest.raises(KeptError, match="not what was written"):
        fresh.load(file)
    assert fresh.free_blocks == free and len(fresh._ledger.states or ()) == 0
    with pytest.raises(KeptError, match="made by something else"):
        runtime(tiny_model("qwen3-5")).load(file)


def test_what_cannot_be_done_is_refused_by_name():
    model = tiny_model("bamba")
    with pytest.raises(ConfigError, match="--kept-states"):
        runtime(model, kept_states=-1)


FIRST, SECOND = ({f"layers.{i}": np.random.default_rng(i).normal(0, 1, 64).astype(np.float32)} for i in (0, 1))


def steered(name: str, ids: list[int], steer: dict) -> torch.Tensor:
    """[n, V]: transformers' logits, with a hook that adds the vectors."""
    with hooked(name, steer) as model, torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", ["qwen3-next", pytest.param("bamba", marks=pytest.mark.slow)])
def test_steered_sequences(name: str, tmp_path):
    """Chunks, a fork, a slice, a prefix, rows that were lost, a file. Oracle: transformers with a hook."""
    rt = runtime(tiny_model(name), rows=2, kept_states=2, steer=("layers.0", "layers.1"))
    ids, more = tokens(75, 60), tokens(5, 61)
    for steer in (FIRST, {**FIRST, **SECOND}, {}):
        want = steered(name, ids + more, steer)
        seq, logits = rt.extend(rt.empty, ids[:40], logits="all", steer=steer)
        assert worst(logits, want[:40]) < TOLERANCE
        seq, logits = rt.extend(seq, ids[40:], logits="all", steer=steer)
        assert worst(logits, want[40:75]) < TOLERANCE
        assert worst(rt.extend(seq, more, steer=steer)[1], want[-1]) < TOLERANCE
        for i in range(5):
            rt.extend(rt.empty, tokens(40, 100 + i), steer=SECOND)
        assert worst(rt.extend(seq[:50], ids[50:] + more, logits="all", steer=steer)[1], want[50:]) < TOLERANCE
        assert worst(rt.extend(rt.empty, ids + more, steer=steer)[1], want[-1]) < TOLERANCE
        with pytest.raises(RequestError, match="steered alike from its first token"):
            rt.extend(seq, more, steer=SECOND)
        fresh, _ = rt.extend(rt.empty, ids, steer=steer)
        rt.save(fresh, tmp_path / "kept")
        assert worst(rt.extend(rt.load(tmp_path / "kept"), more, steer=steer)[1], want[-1]) < TOLERANCE
        for i in range(5):
            rt.extend(rt.empty, tokens(40, 200 + i))
        if steer:
            with pytest.raises(KeptError, match="not kept any more, and they were steered"):
                rt.save(fresh, tmp_path / "kept")
        else:
            rt.save(fresh, tmp_path / "kept")
        rt.check()


@pytest.mark.parametrize("preempted", [False, True])
def test_steered_requests(preempted: bool):
    """Beside each other, with one prompt, sent back, with drafts. Oracle: transformers' greedy tokens with a hook."""
    name, prompt = "qwen3-5", tokens(45, 62)
    tight = 12 * memory.block_of(tiny_model(name).spec, runtime(tiny_model(name)).built.ops.kv, torch.float32)
    e = engine(name, steer=("layers.0", "layers.1"), **({"kv_cache_memory_bytes": tight} if preempted else {}))
    every = [FIRST, {}, SECOND, {**FIRST, **SECOND}, FIRST]
    got = answers(e, [request(prompt, 40, steer=s, speculate=Speculate("suffix", 3, False)) for s in every])
    for steer, ids in zip(every, got, strict=True):
        assert ids == steered(name, prompt + ids, steer)[44:-1].argmax(-1).tolist()
    assert (e.gauges().preemptions > 0) == preempted


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
    further = {n for _, info in params.arrays(params.further(spec, QWEN, 0, spec.layers[2])) for n, _ in info.parts}
    assert {"mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.q_proj.weight"} < further
    assert all(n.startswith("mtp.") for n in further)


def test_states_are_a_line_of_the_ledger():
    """Oracle: worked by hand. Qwen3-Next has 36 recurrent layers with 32 heads of 128 x 128 and tails of 3 x 8192; of
    each of 16 guesses a row notes 8192 channels, keys of 2048 and values of 4096, and 32 decays and rates."""
    import json
    from pathlib import Path

    config = json.loads((Path(__file__).parent / "configs" / "Qwen3-Next-80B-A3B-Instruct.json").read_text())
    spec = spec_from_config(config)
    assert state_bytes(spec) == 36 * 4 * (32 * 128 * 128 + 3 * 8192)
    shapes = memory.Shapes(spec, torch.bfloat16, Packing("tiled", ""), Mode(512, 8), max_len=4096, blocks=9, kept=3)
    notes = 36 * 4 * 16 * (8192 + 2048 + 4096 + 2 * 32)
    assert memory.account(shapes).line("states").bytes == (8 + 1 + 3) * state_bytes(spec) + (8 + 1) * notes
    assert shapes.per_block == 12 * 16 * 2 * 2 * 256 * 2, "only layers of attention have blocks"
    held = runtime(tiny_model("bamba"), rows=5, kept_states=7)
    own = sum(t.nbytes for m in held.built.device.memories for t in tree.leaves(m))
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
