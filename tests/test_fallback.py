"""Classes that no family knows, run as transformers' own modules over our pool.

Oracle: transformers' own model in float32 (eager attention), one dense forward; of classes that a family has, the
family; of masks, the places that they let through.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import checkpoint, cli, fallback, kernels
from fnengine import model as models
from fnengine.errors import ConfigError, SpecError
from fnengine.fallback import attending, compare, probe, template
from fnengine.graphs import compile
from fnengine.model import Model
from fnengine.spec import features, tap_names
from tests import family_laws as laws
from tests.family_laws import oracle, tokens, worst
from tests.models import OTHERS, threads, tiny_folder, tiny_model
from tests.text_models import byte_tokenizer

TOLERANCE = 1e-4
"""Largest difference of a logit over the largest logit; seen are below 2e-6, and 1e-5 with experts."""

every = pytest.mark.parametrize("name", OTHERS)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def runtime(model: Model, eager: bool = True) -> fn.Runtime:
    return laws.runtime(model, enforce_eager=eager, max_model_len=128)


def forced(name: str, **options) -> Model:
    return models.load(tiny_folder(name), dtype="float32", device="cpu", impl="transformers", **options)


@every
def test_logits(name: str):
    """The laws of families."""
    laws.logits_are_those_of_transformers(name, runtime(tiny_model(name)), TOLERANCE)


@pytest.mark.parametrize("name", ["persimmon", "exaone4"])
def test_greedy_text(name: str):
    laws.a_greedy_text_is_that_of_transformers(name, runtime(tiny_model(name)))


@pytest.mark.parametrize(
    "name", ["qwen3", "gemma2", "gpt-oss", "qwen3-moe", "opt", "gemma4", "gemma4-moe", "ministral3"]
)
def test_a_class_that_a_family_has_is_equal_to_it(name: str):
    """Windows, caps, sinks, norms of heads, experts, scaled embeddings, offsets of positions: found by looking."""
    ids, family, other = tokens(40, 4), tiny_model(name), forced(name)
    assert other.spec.upstream is not None and family.spec.upstream is None
    kinds = [
        [(k.mixer.heads, k.mixer.kv_heads, k.mixer.width, k.mixer.window) for k in m.spec.layers]
        for m in (family, other)
    ]
    assert kinds[0] == kinds[1]
    got, want = (rt.extend(rt.empty, ids, logits="all")[1] for rt in (runtime(other), runtime(family)))
    assert worst(got, want) < TOLERANCE


def test_an_engine_serves_it():
    """Requests side by side, greedy and sampled, with drafts. Oracle: transformers' logits, and `Runtime`."""
    model, small = forced("persimmon"), dict(max_num_seqs=4, max_model_len=96, kv_cache_memory_bytes=1 << 20)
    small["enforce_eager"] = True
    drafts = fn.Speculate("ngram", 3)
    engine = fn.Engine.build(model, tokenizer=byte_tokenizer(131), speculate=drafts, **small)
    assert "runs as transformers' own module" in engine.built.execution
    prompt, stop = tokens(9, 5) * 2, fn.Stop(max_tokens=12, ignore_eos=True)
    got: dict[str, list[int]] = {"greedy": [], "sampled": []}
    how = {"greedy": fn.Sampling(temperature=0.0), "sampled": fn.Sampling(temperature=0.8, seed=3)}
    for name, sampling in how.items():
        request = fn.Request(name, np.array(prompt, np.int32), sampling, stop)
        engine.submit_to(request, lambda d, name=name: got[name].extend(d.tokens))
    while engine.turn():
        pass
    engine.check()
    assert got["greedy"] == oracle("persimmon", prompt + got["greedy"])[17:-1].argmax(-1).tolist()
    rt = fn.Runtime(model, **small)
    seq, new, want = rt.empty, prompt, []
    for _ in range(12):
        seq, token = rt.extend(seq, new, sample=how["sampled"])
        want, new = [*want, token], [token]
    assert got["sampled"] == want


@pytest.mark.parametrize("name", ["exaone4"])
def test_compiled_blocks(name: str):
    """Oracle: transformers. Blocks that are alike share an artifact; a second engine loads what the first compiled."""
    model, ids = tiny_model(name), tokens(40, 6)
    for _ in range(2):
        rt = runtime(model, eager=False)
        assert rt.built.execution.startswith("compiled: block0")
        assert len(rt.built.traces.log) == len({k.mixer.window for k in model.spec.layers})
        seq, first = rt.extend(rt.empty, ids[:33], logits="all")
        rest = []
        for t in ids[33:]:
            seq, logits = rt.extend(seq, [t])
            rest.append(logits)
        assert worst(torch.cat([first, torch.stack(rest)]), oracle(name, ids)) < TOLERANCE
    assert rt.built.traces.compiled == 0


@pytest.mark.parametrize("name", ["persimmon", "ernie-moe"])
def test_steps_can_be_captured(name: str):
    """Law: what is replayed over static buffers, here by the eager twin, padded and poisoned, is what is computed."""
    ids = tokens(30, 7)
    small = dict(max_model_len=128, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    rt = fn.Runtime(tiny_model(name), max_num_seqs=4, graph_twin=True, **small)
    seq, first = rt.extend(rt.empty, ids[:17], logits="all")
    got = [first.clone()]
    for t in ids[17:]:
        seq, one = rt.extend(seq, [t], logits="all")
        got.append(one.clone())
    assert worst(torch.cat(got), oracle(name, ids)) < TOLERANCE


def test_blocks_that_cannot_be_compiled_run_as_they_are():
    """Gemma 4 hands its blocks a dictionary that they write to."""
    rt = fn.Runtime(forced("gemma4"), max_num_seqs=2, max_model_len=64, kv_cache_memory_bytes=1 << 20)
    assert rt.built.execution.startswith("eager: block 0 is called with a KVSharingDict")


def test_blocks_are_alike_only_if_nothing_in_them_differs():
    """Mutant: one block of three with another scale of its own."""
    spec, model = tiny_model("exaone4").spec, tiny_model("exaone4")
    ops = kernels.ops("cpu", torch.float32)
    kinds, why = fallback.wanted_blocks(spec, model.params, ops, torch.float32, torch.device("cpu"))
    assert [k.layers for k in kinds] == [(0, 2), (1,)] and not why
    block = template.bare(spec.upstream, torch.float32).module.model.layers[2]
    block.self_attn.scaling *= 2
    try:
        kinds, _ = fallback.wanted_blocks(spec, model.params, ops, torch.float32, torch.device("cpu"))
    finally:
        block.self_attn.scaling /= 2
    assert [k.layers for k in kinds] == [(0,), (1,), (2,)]


def test_a_size_taken_for_a_constant_is_no_artifact():
    """An artifact has no guards, so one for a single number of tokens would read and write beyond any other."""

    def fn_of(x: torch.Tensor) -> torch.Tensor:
        return x * len(x)

    with pytest.raises(compile.CannotCompile, match="taken for a constant"):
        compile.trace(fn_of, [torch.zeros(7, 3)], [(0,)])


def test_quantized_products():
    """Linear layers are leaves like any, so they may be rounded; the check compares over the same leaves."""
    model = forced("persimmon", quantization="int8")
    ids = tokens(30, 6)
    got = (rt := runtime(model)).extend(rt.empty, ids, logits="all")[1]
    off = (got - oracle("persimmon", ids)).square().mean().sqrt() / oracle("persimmon", ids).square().mean().sqrt()
    assert 1e-4 < off < 0.05


def test_bfloat16():
    model = models.load(tiny_folder("persimmon"), dtype="bfloat16", device="cpu")
    ids = tokens(30, 6)
    got, want = (rt := runtime(model)).extend(rt.empty, ids, logits="all")[1], oracle("persimmon", ids)
    assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < 0.08


def test_what_a_start_says():
    model = tiny_model("persimmon")
    said = [note for note in model.notes if "fallback" in note or "apart" in note]
    assert len(said) == 2 and "operator by operator" in said[0]
    assert "20 + 7 tokens in two steps of the pool" in said[1]
    assert tap_names(model.spec) == ("final",) and features(model.spec)[0] == "transformers' own module"
    with pytest.raises(ConfigError, match="to steer"):
        fn.Runtime(model, steer=("layers.1",))


def config(name: str, **change) -> dict:
    return {**json.loads((tiny_folder(name) / "config.json").read_text()), **change}


def small(kind: str, architecture: str, **more) -> dict:
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=131)
    return {**dict(model_type=kind, architectures=[architecture]), **sizes, **more}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (small("bloom", "BloomForCausalLM", n_head=4, n_layer=2), "does not take its attention from"),
        (small("rwkv", "RwkvForCausalLM"), "keeps a recurrent state"),
        (small("mamba", "MambaForCausalLM"), "keeps a recurrent state"),
        (
            small("lfm2", "Lfm2ForCausalLM", num_key_value_heads=2, layer_types=["conv", "full_attention"]),
            "mixes tokens outside of attention",
        ),
        (small("bart", "BartForCausalLM"), "attends to an encoder"),
        (small("t5", "T5ForConditionalGeneration"), "attends to an encoder"),
        (small("bert", "BertForMaskedLM"), "no causal language model"),
        (small("nothing", "NothingForCausalLM"), "has no model_type 'nothing'.*trust-remote-code"),
        (small("helium", "HeliumForCausalLM", rope_parameters=dict(rope_type="dynamic", factor=2.0)), "rope .dynamic."),
        (small("helium", "HeliumForCausalLM", quantization_config={"quant_method": "gptq"}), "stored quantized"),
        (small("helium", "HeliumForCausalLM", num_attention_heads=0), "transformers cannot"),
        (dict(model_type="helium"), "names no architecture"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(given: dict, why: str):
    with pytest.raises(SpecError, match=why):
        fallback.read(given, "config.json")


def window(w: int):
    return lambda b, h, q, kv: (kv <= q) & (kv > q - w)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (lambda b, h, q, kv: kv <= q, None),
        (window(4096), 4096),
        (window(1), 1),
        (lambda b, h, q, kv: (kv <= q) & (kv // 8192 == q // 8192), "neither"),  # chunks
        (lambda b, h, q, kv: (kv <= q) & ((kv > q - 100) | (kv < 4)), "neither"),  # a window and four sinks
        (lambda b, h, q, kv: kv < 10_000_000, "after"),  # both ways
        (lambda b, h, q, kv: kv < q, "itself"),
    ],
)
def test_masks_are_read_by_asking_them(mask, said):
    found = attending.seen_by(mask)
    if isinstance(said, str):
        assert said in found.why_not
    else:
        assert (found.window, found.why_not) == (said, "")


class Wrong:
    """Mutants of the module: what the check at load has to find."""

    @staticmethod
    def counts_positions_itself(body):
        honest = body.forward

        def forward(input_ids, position_ids, **kw):
            return honest(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kw)

        body.forward = forward

    @staticmethod
    def carries_state(body):
        norm = body.norm if "norm" in dict(body.named_children()) else body.final_layernorm
        honest = norm.forward
        norm.forward = lambda x: honest(x + 0.3 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1))


@pytest.mark.parametrize("wrong", [Wrong.counts_positions_itself, Wrong.carries_state])
def test_the_check_finds_what_no_look_without_values_can(wrong, monkeypatch):
    model = tiny_model("persimmon")
    honest = compare.parts

    def parts(*args):
        made = honest(*args)
        wrong(made.ready.body)
        return made

    monkeypatch.setattr(compare, "parts", parts)
    with pytest.raises(SpecError, match="does not compute what transformers"):
        compare.check(model.spec, model.params, model.dtype, model.device)


def test_a_wrong_window_gives_other_logits():
    """Mutant of what was read off a mask: the law above would see it."""
    model, ids = tiny_model("exaone4"), tokens(40, 8)
    layers = tuple(dataclasses.replace(k, mixer=dataclasses.replace(k.mixer, window=None)) for k in model.spec.layers)
    wrong = dataclasses.replace(model, spec=dataclasses.replace(model.spec, layers=layers))
    got = (rt := runtime(wrong)).extend(rt.empty, ids, logits="all")[1]
    assert worst(got, oracle("exaone4", ids)) > 10 * TOLERANCE


def test_a_folders_own_code_runs_only_when_it_is_trusted(tmp_path: Path):
    """Oracle: the class whose code it is a copy of."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_folder("persimmon"), folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import PersimmonConfig, PersimmonForCausalLM\n\n\n"
        "class OwnConfig(PersimmonConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(PersimmonForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    given = {**config("persimmon"), "model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(given))
    with pytest.raises(SpecError, match="--trust-remote-code"):
        checkpoint.read_spec(folder)
    model = models.load(folder, device="cpu", trust=True)
    ids = tokens(30, 9)
    got = (rt := runtime(model)).extend(rt.empty, ids, logits="all")[1]
    assert worst(got, oracle("persimmon", ids)) < TOLERANCE


def test_dummy_weights_and_the_ledger_need_no_weights(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config("ernie-moe")))
    model = models.load(tmp_path, device="cpu", load_format="dummy")
    assert model.spec.upstream is not None and "random" in " ".join(model.notes)
    assert cli.main(["plan", str(tmp_path), "--max-model-len", "64", "--memory", "4GiB"]) == 0
    assert "weights" in capsys.readouterr().out


def test_memory_of_weights_is_known_before_they_are_read():
    """Oracle: the bytes of the tree."""
    from fnengine import tree
    from fnengine.params import memory_plan

    for name in ("persimmon", "ernie-moe"):
        model = tiny_model(name)
        assert memory_plan(model.spec, model.dtype, model.how).weights == sum(
            t.nbytes for t in tree.leaves(model.params)
        )


def test_model_impl_is_one_of_three():
    with pytest.raises(ConfigError, match="auto or native or transformers"):
        checkpoint.read_spec(tiny_folder("qwen3"), "vllm")
    with pytest.raises(SpecError, match="no family knows"):
        checkpoint.read_spec(tiny_folder("persimmon"), "native")


def test_a_probe_leaves_the_module_as_it_was():
    """Two looks at one config find the same."""
    given = config("exaone4")
    assert probe.read(given, "a") == probe.read(given, "b")
