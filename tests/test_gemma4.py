"""Gemma 4 beyond what test_dense_families.py compares: what its layers have that others have not.

Oracles: transformers' own model in float32; published sizes; the same steps uncompiled or alone. Mutants of each part
must be caught.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fnengine as fn
from fnengine import checkpoint, memory, params
from fnengine.engine import Engine
from fnengine.errors import CheckpointError, SpecError
from fnengine.families import spec_from_config
from fnengine.host.request import Sampling, Speculate, Stop
from fnengine.leaves import Packing
from fnengine.spec import Attention, Beside, Both, Layer, ModelSpec, ProportionalScaling, Rope, kv_bytes_per_token
from tests import family_laws as laws
from tests.family_laws import oracle, runtime, tokens, worst
from tests.models import threads, tiny_folder, tiny_model
from tests.test_dense_families import TOLERANCE, whole
from tests.text_models import byte_tokenizer

CONFIGS = Path(__file__).parent / "configs"
BOTH = ["gemma4", "gemma4-moe"]


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def changed(spec: ModelSpec, change: dict[str, Any]) -> ModelSpec:
    """The spec with parts of every layer changed: of the mixer, of the layer itself, or of its experts."""

    def other(kind: Layer) -> Layer:
        parts = {f.name for f in dataclasses.fields(kind.mixer)}
        mixer = {k: v for k, v in change.items() if k in parts}
        half = {k: v for k, v in change.items() if k in ("scaled_weights", "normalized")}
        own = {k: v for k, v in change.items() if k in ("beside", "scaled")}
        mlp = kind.mlp
        if half and isinstance(mlp, Both):
            named = {"scaled" if k == "scaled_weights" else k: v for k, v in half.items()}
            mlp = dataclasses.replace(mlp, routed=dataclasses.replace(mlp.routed, **named))
        return dataclasses.replace(kind, mixer=dataclasses.replace(kind.mixer, **mixer), mlp=mlp, **own)

    return dataclasses.replace(spec, layers=tuple(map(other, spec.layers)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma4", {"beside": Beside(24, "silu")}),
        ("gemma4", {"scaled": False}),
        ("gemma4", {"v_norm": False}),
        ("gemma4", {"scale": 0.25}),
        ("gemma4", {"window": None}),
        ("gemma4", {"lenders": (0, 1, 2, 0, 2)}),
        ("gemma4-moe", {"scaled_weights": False}),
        ("gemma4-moe", {"normalized": False}),
        ("gemma4-moe", {"rope": "all of a head"}),
    ],
    ids=str,
)
def test_mutants_are_caught(name: str, change: dict[str, Any]):
    model, ids = tiny_model(name), tokens(41, seed=5)
    spec = model.spec
    if "lenders" in change:
        spec = dataclasses.replace(spec, **change)
    elif "rope" in change:
        last = spec.layers[-1]
        assert isinstance(last.mixer.rope, Rope)
        rope = dataclasses.replace(last.mixer.rope, scaling=None)
        spec = dataclasses.replace(
            spec,
            layers=(*spec.layers[:-1], dataclasses.replace(last, mixer=dataclasses.replace(last.mixer, rope=rope))),
        )
    else:
        spec = changed(spec, change)
    assert worst(whole(dataclasses.replace(model, spec=spec), ids), oracle(name, ids)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", BOTH)
def test_compiled_layers(name: str, caplog):
    """Each kind of layer is compiled once."""
    laws.compiled_is_uncompiled(name, caplog, TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BOTH)
def test_rows_do_not_depend_on_neighbours(name: str, dtype: str):
    laws.rows_do_not_depend_on_neighbours(tiny_model(name, dtype))


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16(name: str):
    """Oracle: transformers in float32, within what bfloat16 leaves."""
    ids = tokens(41, seed=2)
    got, want = whole(tiny_model(name, "bfloat16"), ids), oracle(name, ids)
    off = (got - want).square().mean(1).median()
    assert float((off / want.square().mean()).sqrt()) < 0.08


def test_steps_as_graphs_run_them():
    """Law: what is replayed over static buffers, here by the eager twin, padded and poisoned, is what is computed."""
    ids = tokens(30, 7)
    small: dict[str, Any] = dict(max_model_len=128, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 20)
    rt = fn.Runtime(tiny_model("gemma4"), max_num_seqs=4, graph_twin=True, enforce_eager=True, **small)
    seq, first = rt.extend(rt.empty, ids[:17], logits="all")
    got = [first.clone()]
    for t in ids[17:]:
        seq, one = rt.extend(seq, [t], logits="all")
        got.append(one.clone())
    assert worst(torch.cat(got), oracle("gemma4", ids)) < TOLERANCE


def test_layers_that_borrow_keep_nothing():
    """Oracle: worked by hand. Of five layers two borrow, so a token has two narrow layers and a wide one."""
    model = tiny_model("gemma4")
    assert model.spec.lenders == (0, 1, 2, 1, 2)
    assert kv_bytes_per_token(model.spec, 4) == 2 * 2 * 4 * (16 + 16 + 32)
    rt = runtime(model)
    pool = rt._device.pools
    assert [p.k.numel() > 0 for p in pool] == [True, True, True, False, False]
    assert rt.built.account is not None
    assert rt.built.account.line("KV pool").bytes == sum(p.k.nbytes + p.v.nbytes for p in pool)


def test_saved_sequences_go_on_as_they_would_have(tmp_path: Path):
    here, there = runtime(tiny_model("gemma4")), runtime(tiny_model("gemma4"))
    seq, _ = here.extend(here.empty, tokens(37, 1))
    here.save(seq, tmp_path / "seq")
    want = here.extend(seq, [5, 6, 7], logits="all")[1]
    assert torch.equal(there.extend(there.load(tmp_path / "seq"), [5, 6, 7], logits="all")[1], want)


def test_taps_and_steering_stand_between_its_layers():
    """Layers are then run in parts, each with its own inputs. Oracle: the same without taps."""
    ids = tokens(30, 4)
    rt = runtime(tiny_model("gemma4"))
    _, got, seen = rt.extend(rt.empty, ids, logits="all", taps=["layers.1.residual", "layers.3.residual"])
    assert torch.equal(got, whole(tiny_model("gemma4"), ids)) and len(seen) == 2


def test_it_drafts_for_another():
    """A draft model's passes say which tokens they read. Oracle: greedy tokens of transformers."""
    prompt = tokens(20, 3)
    engine = Engine.build(
        tiny_model("gemma4-moe"),
        max_num_seqs=3,
        max_model_len=96,
        kv_cache_memory_bytes=1 << 20,
        enforce_eager=True,
        companion=tiny_model("gemma4"),
        speculate=Speculate("draft_model", 3),
        tokenizer=byte_tokenizer(131),
    )
    got: list[int] = []
    request = fn.Request(
        "one", torch.tensor(prompt).int().numpy(), Sampling(temperature=0), Stop(max_tokens=20, ignore_eos=True)
    )
    engine.submit_to(request, lambda d: got.extend(d.tokens))
    while engine.turn():
        pass
    engine.check()
    assert got == oracle("gemma4-moe", prompt + got)[19:-1].argmax(-1).tolist()
    assert engine.gauges().drafted > 0


# --- configs and checkpoints ------------------------------------------------------------------------------------------


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["gemma-4-E2B-it", "gemma-4-26B-A4B-it"])
def test_published_sizes_are_those_of_transformers(name: str):
    """Oracle: parameters and buffers of transformers' own text model, without values."""
    import transformers

    config, spec = published(name), spec_from_config(published(name))
    text = transformers.Gemma4TextConfig(**config["text_config"])
    with torch.device("meta"):
        theirs = transformers.Gemma4ForCausalLM(text)
    scalars = sum(b.numel() for n, b in theirs.named_buffers() if n.endswith("layer_scalar"))
    assert params.count(spec) == sum(p.numel() for p in theirs.parameters()) + scalars
    plan = params.memory_plan(spec, torch.bfloat16, Packing("dense", "test"))
    assert plan.weights == 2 * params.count(spec)
    shapes = memory.Shapes(spec, torch.bfloat16, Packing("dense", ""), memory.Mode(512, 8), max_len=4096, blocks=9)
    assert memory.account(shapes).line("workspace").bytes > 0


def test_e2b_is_read():
    """Oracle: its published numbers. 15 of 35 layers have KV, every fifth of wide heads."""
    spec = spec_from_config(published("gemma-4-E2B-it"))
    assert len(set(spec.layers)) == 4, "narrow and wide, with KV of their own and without: four artifacts"
    assert kv_bytes_per_token(spec, 2) == 2 * 2 * (12 * 256 + 3 * 512)
    near, far = spec.layers[0].mixer, spec.layers[4].mixer
    assert isinstance(near, Attention) and isinstance(far, Attention) and isinstance(far.rope, Rope)
    assert (near.width, near.window, far.width, far.window, far.kv_heads) == (256, 512, 512, None, 1)
    assert far.rope.scaling == ProportionalScaling(64) and far.rope.theta == 1e6
    assert [k.mlp.width for k in (spec.layers[14], spec.layers[15])] == [6144, 12288]
    assert spec.lenders[15:20] == (13, 13, 13, 13, 14)


def test_layers_that_borrow_may_have_tensors_that_nobody_reads(tmp_path: Path):
    """Checkpoints may hold keys and values of such layers, too, which upstream ignores; nothing else may be left."""
    from safetensors.torch import load_file, save_file

    source, held = tiny_folder("gemma4"), load_file(tiny_folder("gemma4") / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    at = "model.layers.4.self_attn."
    more = {f"{at}{n}.weight": torch.ones(2) for n in ("k_proj", "v_proj", "k_norm")}
    save_file({**held, **more}, tmp_path / "model.safetensors")
    spec = checkpoint.read_spec(tmp_path)
    cpu, how = torch.device("cpu"), Packing("dense", "test")
    checkpoint.load(tmp_path, spec, torch.float32, cpu, how)
    save_file({**held, "model.layers.4.self_attn.x_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"x_proj\.weight belongs to nothing"):
        checkpoint.load(tmp_path, spec, torch.float32, cpu, how)
    del held["model.layers.1.layer_scalar"]
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.layer_scalar is missing"):
        checkpoint.load(tmp_path, spec, torch.float32, cpu, how)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all' is not implemented"),
        ({"num_kv_shared_layers": 35}, "leaves no sliding_attention layer with KV of its own"),
        ({"vocab_size_per_layer_input": 100}, "is less than vocab_size"),
        ({"enable_moe_block": True}, "the config has no num_experts"),
        ({"hidden_activation": "tanh"}, "hidden_activation = 'tanh' is not implemented"),
        ({"per_layer_config": [7]}, "is no object of layers by their numbers"),
        ({"per_layer_config": {"00": 7}}, "says nothing that is understood of layer 0"),
        ({"per_layer_config": {"3": {"heads": 2}}}, r"per_layer_config\.3.*heads = 2"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_built_say_why(change: dict[str, Any], says: str):
    config = published("gemma-4-E2B-it")
    with pytest.raises(SpecError, match=says):
        spec_from_config({**config, "text_config": {**config["text_config"], **change}})
