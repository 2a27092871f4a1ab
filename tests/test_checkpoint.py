"""Configs, checkpoints and names in; specs, weights and clear errors out.

Oracles: parameter counts that the models' makers publish (or that follow from them by hand), tensors written here and
read back, transformers' own config classes, a Hugging Face hub in miniature on localhost. Which of the published
configs could be compared with a public copy is said in tests/configs/README.md.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from fnengine import checkpoint, hub, leaves, model, params, tree
from fnengine.errors import CheckpointError, ConfigError, FnError, SpecError
from fnengine.families import spec_from_config
from fnengine.host import pooling
from fnengine.spec import Llama3Scaling
from tests.models import TINY, threads, tiny_folder, upstream

CONFIGS = Path(__file__).parent / "configs"

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


# Configs


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-2-7b-hf", 6_738_415_616),
        ("Mistral-7B-v0.1", 7_241_732_096),
        ("Mistral-7B-v0.3", 7_248_023_552),
        ("OLMo-2-0425-1B", 1_484_916_736),
        ("Bamba-9B", 9_780_235_392),
        ("Qwen3-Next-80B-A3B-Instruct", 79_674_391_296),
        ("Phi-3-mini-4k-instruct", 3_821_079_552),
        ("Phi-3.5-MoE-instruct", 41_873_153_344),
        ("DeepSeek-V2-Lite", 15_706_484_224),
        ("DeepSeek-V3", 671_026_419_200),
        ("SmolLM3-3B", 3_075_098_624),
        ("falcon-7b", 6_921_720_704),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-3-1b-it", 999_885_952),
        ("gpt2", 124_439_808),
        ("granite-3.1-2b-instruct", 2_533_531_648),
        ("opt-125m", 125_239_296),
        ("phi-2", 2_779_683_840),
        ("pythia-160m", 162_322_944),
        ("stablelm-2-1_6b", 1_644_515_328),
        ("starcoder2-3b", 3_030_371_328),
    ],
)
def test_published_configs(name: str, count: int):
    """Parameters as published, to the last one."""
    assert params.count(spec_from_config(config(name))) == count


def test_published_details():
    q3, l32 = spec_from_config(config("Qwen3-0.6B")), spec_from_config(config("Llama-3.2-1B"))
    a = q3.layers[0].mixer
    assert (a.heads, a.kv_heads, a.width, a.qk_norm, a.qkv_bias, a.window) == (16, 8, 128, True, False, None)
    assert (q3.dtype, q3.tied, q3.max_len, q3.eos, q3.bos) == ("bfloat16", True, 40960, (151645,), 151643)
    assert l32.layers[0].mixer.rope.scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert spec_from_config(config("Mistral-7B-v0.1")).layers[5].mixer.window == 4096
    assert spec_from_config(config("Mistral-7B-v0.3")).layers[5].mixer.window is None
    assert spec_from_config(config("Qwen2.5-0.5B")).layers[0].mixer.qkv_bias


@pytest.mark.parametrize("name", [p.stem for p in CONFIGS.glob("*.json")])
def test_old_and_new_spelling_agree(name: str):
    """transformers 5 rewrites a config (rope_parameters, dtype, layer_types); the spec stays the same."""
    import transformers

    old = config(name)
    cls = getattr(transformers, old["architectures"][0]).config_class
    new = cls.from_dict(dict(old)).to_dict()
    new["architectures"] = old["architectures"]
    assert "rope_scaling" not in new and ("rope_theta" not in old or new["rope_parameters"])
    assert spec_from_config(new) == spec_from_config(old)


def test_the_benchmark_shape_is_the_published_one():
    shape = Path(__file__).parents[1] / "benchmarks" / "configs" / "qwen3-0.6b"
    assert checkpoint.read_spec(shape) == spec_from_config(config("Qwen3-0.6B"))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("Qwen3-0.6B", {"architectures": ["Qwen3NexForCausalLM"]}, ["Qwen3NexForCausalLM", "nearest is Qwen3"]),
        ("Qwen3-0.6B", {"architectures": ["ElectraModel"]}, ["BertModel", "LlamaForCausalLM"]),
        ("Qwen3-0.6B", {"architectures": None, "model_type": "electra"}, ["electra", "LlamaForCausalLM"]),
        ("Qwen3-0.6B", {"architectures": None, "model_type": None}, ["architectures", "model_type"]),
        ("Qwen3-0.6B", {"logit_scale": 0.5}, ["logit_scale", "0.5", "change the maths"]),
        ("Qwen3-0.6B", {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ("Qwen3-0.6B", {"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, ["rope_scaling", "spiral", "llama3"]),
        ("Qwen3-0.6B", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 3}}, ["beta", "3", "rope_scaling"]),
        ("Qwen3-0.6B", {"rope_scaling": {"type": "linear"}}, ["factor", "rope_scaling"]),
        ("Qwen3-0.6B", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ("Qwen3-0.6B", {"num_key_value_heads": 5}, ["num_key_value_heads", "5", "16"]),
        ("Qwen3-0.6B", {"hidden_size": "1024"}, ["hidden_size", "'1024'", "integer"]),
        ("Qwen3-0.6B", {"hidden_size": None}, ["hidden_size"]),
        ("Qwen3-0.6B", {"rms_norm_eps": 0}, ["rms_norm_eps", "positive"]),
        ("Qwen3-0.6B", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
        ("Qwen3-0.6B", {"torch_dtype": "int8"}, ["torch_dtype", "int8"]),
        ("Qwen3-0.6B", {"layer_types": ["full_attention"]}, ["layer_types", "28"]),
        ("Qwen3-0.6B", {"layer_types": ["mamba"] * 28}, ["layer_types", "mamba"]),
        ("Qwen3-0.6B", {"eos_token_id": "x"}, ["eos_token_id", "'x'"]),
        ("Llama-3.2-1B", {"pretraining_tp": 2}, ["pretraining_tp", "2"]),
        ("Llama-2-7b-hf", {"num_attention_heads": 33, "num_key_value_heads": 33}, ["num_attention_heads", "4096"]),
        ("Qwen2.5-0.5B", {"use_mrope": True}, ["use_mrope", "True"]),
        ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, ["layer_types", "sliding_attention"]),
        ("Mistral-7B-v0.1", {"attention_bias": True}, ["attention_bias"]),
    ],
)
def test_config_errors_name_key_value_and_remedy(name: str, change: dict, says: list[str]):
    with pytest.raises(SpecError) as e:
        spec_from_config({**config(name), **change}, "here/config.json")
    text = str(e.value)
    assert text.startswith("here/config.json")
    for part in says:
        assert part in text


def test_inert_keys_change_nothing():
    plain = config("Llama-3.2-1B")
    more = {"_name_or_path": "x", "unsloth_fixed": True, "auto_map": {}, "pad_token_id": 3, "some_feature": None}
    assert spec_from_config({**plain, **more}) == spec_from_config(plain)


def test_windows_of_the_last_layers():
    """max_window_layers counts the layers below that see everything; layer_types wins where both are given."""
    on = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20}
    spec = spec_from_config({**config("Qwen2.5-0.5B"), **on})
    assert [la.mixer.window for la in spec.layers] == [None] * 20 + [64] * 4
    types = ["sliding_attention", "full_attention"] * 12
    spec = spec_from_config({**config("Qwen2.5-0.5B"), **on, "layer_types": types})
    assert [la.mixer.window for la in spec.layers] == [64, None] * 12


def test_generation_config_adds_ends_of_sequence(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config("Qwen3-0.6B")))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    assert checkpoint.read_spec(tmp_path).eos == (151645, 151643)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert checkpoint.read_spec(tmp_path).eos == (151645, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    assert checkpoint.read_spec(tmp_path).eos == (151645,)


# Weights


@pytest.mark.parametrize("name", TINY)
def test_weights_are_those_of_transformers(name: str):
    """Count by transformers' own sum, with the corrections of routers, which are buffers there; every fused array is
    the checkpoint's parts, one after another, those of experts expert by expert."""
    up = upstream(name)
    spec = checkpoint.read_spec(tiny_folder(name))
    corrections = [b for key, b in up.named_buffers() if key.endswith("e_score_correction_bias")]
    assert params.count(spec) == sum(p.numel() for p in (*up.parameters(), *corrections))
    stored = load_file(tiny_folder(name) / "model.safetensors")
    dense = leaves.Packing("dense", "a test looks inside")
    got = checkpoint.load(tiny_folder(name), spec, torch.float32, CPU, dense)
    infos = dict(params.arrays(params.abstract(spec)))
    arrays = dict(tree.items(got))
    assert arrays.keys() == infos.keys()
    for path, array in arrays.items():
        info = infos[path]
        if info.order is not None or (info.fused is not None and info.fused.rows is not None):
            continue  # tests/test_latent.py takes those apart
        if info.parts:
            want = torch.cat([stored[n] for n, _ in info.parts])
        else:  # GPT-OSS has all experts in one tensor, weights with columns first
            assert info.fused is not None
            want = stored[info.fused.name]
            want = want.transpose(1, 2) if path.endswith(".weight") else want
        assert torch.equal(array, want.reshape(info.shape)), path


def copy_of(name: str, to: Path) -> Path:
    shutil.copytree(tiny_folder(name), to, dirs_exist_ok=True)
    return to


def test_sharded_equals_single(tmp_path: Path):
    """Shards with an index, and files without one, load to the same bits; progress ends at the total."""
    whole = load_file(tiny_folder("qwen3") / "model.safetensors")
    names = sorted(whole)
    want = dict(tree.items(model.load(tiny_folder("qwen3"), dtype="bfloat16").params))
    for kind in ("index", "none"):
        folder = copy_of("qwen3", tmp_path / kind)
        (folder / "model.safetensors").unlink()
        table = {}
        for i in range(3):
            shard = f"model-{i + 1:05d}-of-00003.safetensors"
            save_file({n: whole[n] for n in names[i::3]}, folder / shard)
            table |= dict.fromkeys(names[i::3], shard)
        if kind == "index":
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
            save_file({"junk": torch.zeros(1)}, folder / "not-in-the-index.safetensors")
        else:
            save_file(whole, folder / "consolidated.safetensors")
        seen: list[tuple[int, int]] = []
        m = model.load(folder, dtype="bfloat16", progress=lambda d, t, seen=seen: seen.append((d, t)))
        got = dict(tree.items(m.params))
        for path in ("embed.weight", "norm", "layers.0.norm1", "layers.1.q_norm"):
            assert torch.equal(got[path], want[path])
        x = torch.randn(5, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
        base = model.load(tiny_folder("qwen3"), dtype="bfloat16").params["layers"][1]["qkv"]
        assert torch.equal(leaves.matmul(m.params["layers"][1]["qkv"], x), leaves.matmul(base, x))
        total = sum(t.numel() * t.element_size() for t in whole.values())
        assert seen[-1] == (total, total)
        assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_inert_tensors_are_ignored(tmp_path: Path):
    """A tied model may bring its head again; Llama's old rotary buffers may be there."""
    folder = copy_of("llama31", tmp_path)
    whole = load_file(folder / "model.safetensors")
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"].clone()
    whole["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(whole, folder / "model.safetensors")
    model.load(folder)


def _rewrite(folder: Path, change) -> None:
    whole = load_file(folder / "model.safetensors")
    change(whole)
    save_file(whole, folder / "model.safetensors")


def _truncate(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def _bin_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _missing_shard(folder: Path) -> None:
    table = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def _index_lies(folder: Path) -> None:
    table = {"weight_map": {"no.such.tensor": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def _index_escapes(folder: Path) -> None:
    table = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: shutil.rmtree(f), ["no such directory"]),
        (lambda f: (f / "config.json").unlink(), ["config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json", "object"]),
        (lambda f: (f / "model.safetensors").unlink(), ["holds no *.safetensors", "--load-format dummy"]),
        (lambda f: _truncate(f, 5000), ["model.safetensors", "truncated or corrupt"]),
        (lambda f: _truncate(f, 4), ["model.safetensors", "truncated or corrupt"]),
        (lambda f: _truncate(f, 0), ["model.safetensors", "truncated or corrupt"]),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs"]),
        (lambda f: _rewrite(f, lambda w: w.pop(Q)), [f"tensor {Q} is missing"]),
        (lambda f: _rewrite(f, lambda w: w.pop("lm_head.weight")), ["lm_head.weight", "tie_word_embeddings"]),
        (lambda f: _rewrite(f, lambda w: w.update({Q: torch.zeros(3, 64)})), [Q, "[3, 64]", "[64, 64]"]),
        (lambda f: _rewrite(f, lambda w: w.update({Q: torch.zeros(64, 64).to(torch.int8)})), [Q, "I8"]),
        (lambda f: _rewrite(f, lambda w: w.update(extra=torch.zeros(2))), ["tensor extra belongs to nothing"]),
        (_bin_only, ["pickled", "--load-format pt"]),
        (_missing_shard, ["index.json", "model-00001-of-00002.safetensors", "missing"]),
        (_index_lies, ["no.such.tensor", "model.safetensors"]),
        (_index_escapes, ["../model.safetensors"]),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["weight_map"]),
    ],
)
def test_damage_is_named(tmp_path: Path, break_it, says: list[str]):
    folder = copy_of("llama2", tmp_path / "model")
    model.load(folder)
    break_it(folder)
    with pytest.raises(CheckpointError) as e:
        model.load(folder)
    for part in [str(folder), *says]:
        assert part in str(e.value)


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float8"}, {"device": "tpu"}, {"device": "mps"}, {"load_format": "gguf"}, {"device": "cuda:77"}]
)
def test_wrong_arguments(wrong: dict):
    with pytest.raises(ConfigError):
        model.load(tiny_folder("llama2"), **wrong)


def test_dtype_auto_is_the_checkpoints():
    assert model.load(tiny_folder("llama2", "bfloat16"), device="cpu").dtype == torch.bfloat16
    assert model.load(tiny_folder("llama2"), device="cpu").dtype == torch.float32
    spec = checkpoint.read_spec(tiny_folder("llama2", "float16"))
    got, why = checkpoint.pick_dtype(spec, "auto", CPU)
    native = leaves.packing(CPU, torch.float16).kind != "dense"
    assert (got, native) in ((torch.float16, True), (torch.float32, False)) and "float16" in why


# Dummy weights and the memory plan


def test_dummy_weights(tmp_path: Path):
    """A function of the seed; normal with deviation 0.02, norms 1, biases 0; only config.json is needed."""
    shutil.copy(tiny_folder("qwen2") / "config.json", tmp_path)
    spec = checkpoint.read_spec(tmp_path)
    dense = leaves.Packing("dense", "a test looks inside")
    a, b, c = (dict(tree.items(checkpoint.dummy(spec, torch.float32, CPU, dense, seed=s))) for s in (0, 0, 1))
    for path, array in a.items():
        assert torch.equal(array, b[path])
        if path.endswith("weight"):
            assert not torch.equal(array, c[path])
            assert abs(float(array.std()) - 0.02) < 0.001 and abs(float(array.mean())) < 0.001, path
        else:
            assert torch.equal(array, torch.full_like(array, 0.0 if path.endswith("bias") else 1.0))
    assert not torch.equal(a["layers.0.qkv.weight"], a["layers.1.qkv.weight"])
    m = model.load(tmp_path, load_format="dummy")
    assert any("random" in note for note in m.notes)


@pytest.mark.parametrize("name", ["qwen3", "llama2", "qwen2"])
@pytest.mark.parametrize("kind", leaves.LAYOUTS)
def test_memory_plan_equals_what_is_held(name: str, kind: str):
    """Bytes planned from shapes are the bytes of the loaded tree."""
    how = layout(kind, torch.bfloat16)
    spec = checkpoint.read_spec(tiny_folder(name))
    plan = params.memory_plan(spec, torch.bfloat16, how)
    loaded = checkpoint.load(tiny_folder(name), spec, torch.bfloat16, CPU, how)
    held = 0
    for _, leaf in tree.items(loaded, stop=leaves.KINDS):
        held += leaf.nbytes if isinstance(leaf, torch.Tensor) else leaves.weight_bytes(leaf)
    assert plan.weights == held
    assert plan.packed_head == (131 * 64 * 2 if spec.tied and kind == "packed" else 0)
    assert plan.peak >= plan.weights


# Leaves


def layout(kind: str, dtype: torch.dtype) -> leaves.Packing:
    """A layout by name, where this machine has it."""
    found = leaves.layouts(CPU, dtype)[kind]
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", leaves.LAYOUTS)
@pytest.mark.parametrize(("N", "K"), [(96, 64), (131, 72), (512, 1024)])
def test_rows_of_matmul_are_independent(kind: str, dtype: torch.dtype, N: int, K: int):
    """Law: each row of a product has the same bits for every number of rows, 1 to 40 and beyond."""
    g = torch.Generator().manual_seed(0)
    leaf = leaves.Dense(torch.randn(N, K, generator=g).to(dtype), torch.randn(N, generator=g).to(dtype))
    leaf = layout(kind, dtype).place(leaf)
    x = torch.randn(130, K, generator=g).to(dtype)
    with threads(2):
        whole = leaves.matmul(leaf, x)
        for M in [*range(4, 41), 63, 64, 65, 129]:
            assert torch.equal(leaves.matmul(leaf, x[:M]), whole[:M]), M
            assert torch.equal(leaves.matmul(leaf, x[-M:]), whole[-M:]), M
        for M in (1, 2, 3):
            assert torch.equal(leaves.matmul(leaf, x[:M]), whole[:M]), M


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", leaves.LAYOUTS)
def test_products_of_every_layout(kind: str, dtype: torch.dtype):
    """Oracle: the product in float64, to the rounding of the dtype."""
    how = layout(kind, dtype)
    g = torch.Generator().manual_seed(0)
    dense = leaves.Dense(torch.randn(131, 73, generator=g).to(dtype), torch.randn(131, generator=g).to(dtype))
    x = torch.randn(29, 73, generator=g).to(dtype)
    want = x.double() @ dense.weight.double().T + dense.bias.double()
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    leaf = how.place(dense)
    torch.testing.assert_close(leaves.matmul(leaf, x).double(), want, rtol=tolerance, atol=tolerance)
    if how.indexable:
        ids = torch.tensor([130, 0, 31, 32, 0], dtype=torch.int32)
        assert torch.equal(leaves.lookup(leaf, ids), dense.weight[ids.long()])


@pytest.mark.parametrize("kind", leaves.LAYOUTS)
def test_every_layout_holds_the_same_weights(kind: str):
    """Products agree with the dense ones; a tied embedding is held twice only if packed."""
    how = layout(kind, torch.float32)
    spec = checkpoint.read_spec(tiny_folder("qwen3"))
    dense = checkpoint.load(tiny_folder("qwen3"), spec, torch.float32, CPU, leaves.Packing("dense", "test"))
    placed = checkpoint.load(tiny_folder("qwen3"), spec, torch.float32, CPU, how)
    of_kind = dict(zip(leaves.LAYOUTS, (leaves.Tiled, leaves.Packed, leaves.Dense), strict=True))[kind]
    assert isinstance(placed["layers"][0]["qkv"], of_kind)
    assert isinstance(placed["embed"], leaves.Dense if kind == "packed" else of_kind)
    assert (placed["head"] is None) == (kind != "packed")
    x = torch.randn(5, 64)
    for key in ("qkv", "down"):
        leaf = dense["layers"][1][key]
        y = torch.randn(5, leaf.weight.shape[1]) if key == "down" else x
        torch.testing.assert_close(
            leaves.matmul(placed["layers"][1][key], y), leaves.matmul(leaf, y), rtol=1e-5, atol=1e-5
        )


# Names


def test_local_folders_and_demo(tmp_path: Path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.display_name(tmp_path / "." / "") == tmp_path.name
    assert hub.display_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert hub.display_name(None) == hub.display_name("demo") == "demo"


@pytest.mark.parametrize(
    ("name", "says"), [("./nowhere", "no such directory"), ("a/b/c", "no such directory"), ("a b", "no such directory")]
)
def test_names_that_cannot_be(name: str, says: str):
    with pytest.raises(CheckpointError, match=says):
        hub.resolve(name)


def test_a_local_folder_has_no_revision(tmp_path: Path):
    with pytest.raises(CheckpointError, match="revision"):
        hub.resolve(tmp_path, revision="main")
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        hub.resolve(tmp_path / "x")


def test_huggingface_hub_is_imported_lazily():
    code = "import sys; from fnengine import hub; hub.resolve('.'); assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment(), timeout=60)


SHA = "0123456789abcdef0123456789abcdef01234567"


class TinyHub(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub: one repository, one that is gated, everything else unknown."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}

    def _send(self, status: int, body: bytes, head: bool, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def do_GET(self, head: bool = False) -> None:
        path = self.path.split("?")[0]
        if path.startswith(("/api/models/tiny/gated", "/tiny/gated")):
            return self._send(403, b"{}", head, X_Error_Code="GatedRepo")
        if path.startswith("/api/models/tiny/real/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", SHA):
                return self._send(404, b"{}", head, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": n} for n in self.files]
            body = json.dumps({"id": "tiny/real", "sha": SHA, "siblings": siblings}).encode()
            return self._send(200, body, head, Content_Type="application/json")
        if path.startswith("/api/models/tiny/real/tree/"):
            rows = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.files.items()]
            return self._send(200, json.dumps(rows).encode(), head, Content_Type="application/json")
        if path.startswith(f"/tiny/real/resolve/{SHA}/"):
            name = path.split(SHA + "/")[1]
            tag = f'"{name.encode().hex()}"'
            return self._send(200, self.files[name], head, ETag=tag, X_Repo_Commit=SHA)
        return self._send(404, b"{}", head, X_Error_Code="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def log_message(self, *args: object) -> None:
        pass


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **more}


def test_hub_names(tmp_path: Path):
    """Download, then the cache offline; unknown, gated, unknown revision, no network: each with its remedy."""
    source = tiny_folder("qwen3")
    TinyHub.files = {p.name: p.read_bytes() for p in source.iterdir()}
    TinyHub.files |= {"consolidated.safetensors": b"x", "onnx/model.json": b"x", "README.md": b"x"}
    TinyHub.files |= {"1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}', "2_Dense/model.safetensors": b"x"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), TinyHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
import json, sys
from fnengine import hub
from fnengine.errors import CheckpointError
out = []
for name, more in json.loads(sys.argv[1]):
    try:
        folder = hub.resolve(name, cache_dir=sys.argv[2], progress=False, **more)
        out.append([str(folder), sorted(p.name for p in folder.iterdir())])
    except CheckpointError as e:
        out.append(str(e))
print(json.dumps(out))
"""

    def ask(asked: list, **env: str) -> list:
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(asked), str(tmp_path)],
            env=_environment(**env),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    try:
        online = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
        cold, first, warm, unknown, gated, revision = ask(
            [
                ("tiny/real", {"offline": True}),
                ("tiny/real", {}),
                ("tiny/real", {"offline": True}),
                ("tiny/unknown", {}),
                ("tiny/gated", {}),
                ("tiny/real", {"revision": "v9"}),
            ],
            **online,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert "not in the cache" in cold and "online" in cold
    assert first == warm and first[1] == sorted([*(p.name for p in source.iterdir()), "1_Pooling", "2_Dense"])
    assert pooling.declared(first[0]) == "mean"
    assert "no such repository" in unknown and "tiny/unknown" in unknown and "HF_TOKEN" in unknown
    assert "gated" in gated and "https://huggingface.co/tiny/gated" in gated
    assert "no such revision" in revision and "v9" in revision
    (gone, still) = ask([("tiny/other", {}), ("tiny/real", {})], **online)
    assert "cannot be reached" in gone and still == first
    assert checkpoint.read_spec(Path(first[0])) == checkpoint.read_spec(source)


def test_errors_are_user_errors():
    assert issubclass(CheckpointError, FnError) and issubclass(SpecError, FnError)
