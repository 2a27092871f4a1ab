"""GGUF files and pickled ones as checkpoints.

Oracle: the safetensors that the same weights came from; transformers' own reader of GGUF, which undoes llama.cpp's
layouts in code of its own; and transformers' decoder of quantized blocks.
"""

from __future__ import annotations

import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

import fnengine as fn
from fnengine import checkpoint, cli, gguf_file
from fnengine import model as models
from fnengine.errors import CheckpointError, ConfigError, FnError, SpecError
from fnengine.hub import BUNDLED
from tests.models import threads, tiny_folder, tiny_model, upstream

ARCH = {
    "llama2": "llama",
    "llama31": "llama",
    "mixtral-open": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3-moe-all": "qwen3moe",
    "gemma": "gemma",
    "gemma2-tied": "gemma2",
    "gemma3-six": "gemma3",
    "phi3": "phi3",
    "phi3-long": "phi3",
    "granite": "granite",
    "olmo2": "olmo2",
}
"""Tiny model -> llama.cpp's architecture."""


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def write(name: str, file: Path, kind: Q = Q.F32, tokenizer: bool = False, **change: Any) -> Path:
    """A tiny model as llama.cpp's converter writes it: its names, rows of q and k permuted for Llama, norms of Gemma
    whole, experts in one tensor."""
    config = json.loads((tiny_folder(name) / "config.json").read_text())
    arch = ARCH[name]
    w = gguf.GGUFWriter(file, arch)
    H, L, D = config["num_attention_heads"], config["num_hidden_layers"], config["hidden_size"]
    C = config.get("head_dim") or D // H
    rope = config["rope_parameters"]
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(D)
    w.add_block_count(L)
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(H)
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    w.add_rope_dimension_count(int(C * rope.get("partial_rotary_factor", 1)))
    w.add_key_length(C)
    w.add_value_length(C)
    for key, add in (
        ("num_local_experts", w.add_expert_count),
        ("num_experts", w.add_expert_count),
        ("num_experts_per_tok", w.add_expert_used_count),
        ("moe_intermediate_size", w.add_expert_feed_forward_length),
        ("sliding_window", w.add_sliding_window),
        ("attn_logit_softcapping", w.add_attn_logit_softcapping),
        ("final_logit_softcapping", w.add_final_logit_softcapping),
        ("attention_multiplier", w.add_attention_scale),
        ("embedding_multiplier", w.add_embedding_scale),
        ("residual_multiplier", w.add_residual_scale),
        ("logits_scaling", w.add_logit_scale),
    ):
        if config.get(key) is not None:
            add(config[key])
    if name == "gemma3-six":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["full_attention"]["factor"])
    if name == "phi3-long":
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for which in ("short", "long"):
            w.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], np.float32))
    if name == "llama31":
        w.add_tensor("rope_freqs.weight", llama3_factors(rope, C))
    if tokenizer:
        add_tokenizer(w)
    else:
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    table = gguf.get_tensor_name_map(number, L)
    stacked: dict[str, list[torch.Tensor]] = {}
    for key, t in sorted(tensors(name).items(), key=lambda item: expert(item[0])):
        theirs = table.get_name(gguf_file.EXPERT.sub(".experts.", key), try_suffixes=(".weight", ".bias"))
        assert theirs is not None, key
        if arch in ("llama", "granite") and ("q_proj" in key or "k_proj" in key):
            heads = H if "q_proj" in key else config["num_key_value_heads"]
            t = t.view(heads, 2, -1, *t.shape[1:]).transpose(1, 2).reshape(t.shape)
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            t = t + 1
        if expert(key) >= 0:
            stacked.setdefault(theirs, []).append(t)
        else:
            add_tensor(w, theirs, t, kind)
    for theirs, each in stacked.items():
        add_tensor(w, theirs, torch.stack(each), kind)
    for key, value in change.items():
        w.add_string(key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


def add_tensor(w: gguf.GGUFWriter, name: str, t: torch.Tensor, kind: Q) -> None:
    kind = Q.F32 if t.dim() == 1 else kind
    if kind in (Q.F32, Q.F16):
        w.add_tensor(name, t.float().numpy().astype(np.float32 if kind == Q.F32 else np.float16))
    else:
        w.add_tensor(name, gguf.quantize(t.float().numpy(), kind), raw_dtype=kind)


def expert(name: str) -> int:
    found = gguf_file.EXPERT.search(name)
    return -1 if found is None else int(found[1])


@functools.cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(tiny_folder(name) / "model.safetensors")


def llama3_factors(rope: dict, C: int) -> np.ndarray:
    """By what llama.cpp divides each frequency, as its converter works it out."""
    low, high = rope["original_max_position_embeddings"] / rope["low_freq_factor"], None
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    out = []
    for f in 1.0 / rope["rope_theta"] ** (np.arange(0, C, 2) / C):
        length = 2 * np.pi / f
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        inside = 1 / ((1 - smooth) / rope["factor"] + smooth)
        out.append(1.0 if length < high else rope["factor"] if length > low else inside)
    return np.array(out, np.float32)


def add_tokenizer(w: gguf.GGUFWriter) -> None:
    """The bundled model's, cut to the tiny vocabulary."""
    given = json.loads((BUNDLED / "tokenizer.json").read_text())["model"]
    tokens = sorted(given["vocab"], key=given["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([1] * len(tokens))
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in given["merges"]])
    w.add_eos_token_id(0)


def logits(model: fn.Model, ids: list[int]) -> torch.Tensor:
    rt = fn.Runtime(model, max_num_seqs=2, max_model_len=96, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    return rt.extend(rt.empty, ids, logits="all")[1]


IDS = np.random.default_rng(3).integers(3, 131, 41).tolist()


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", ARCH)
def test_a_file_is_the_model_that_it_was_made_of(name: str, tmp_path: Path):
    model = models.load(write(name, tmp_path / "m.gguf"), device="cpu")
    own = tiny_model(name)
    assert model.dtype is torch.float32 and model.spec.architecture == own.spec.architecture
    with torch.no_grad():
        want = upstream(name)(torch.tensor([IDS]), use_cache=False).logits[0]
    assert off(logits(model, IDS), want) < 1e-4


@pytest.mark.parametrize("name", ["llama2", "qwen3", "qwen3-moe-all", "gemma2-tied"])
def test_transformers_reads_the_same_file_alike(name: str, tmp_path: Path):
    """So layouts are llama.cpp's, and not only undone as the test does them."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = write(name, tmp_path / "m.gguf", Q.F16 if "moe" in name else Q.Q8_0)
    theirs = type(upstream(name))(upstream(name).config).eval()
    found = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=theirs)["tensors"]
    with torch.no_grad():
        missing, unknown = theirs.load_state_dict(found, strict=False)
        assert not unknown and not [n for n in missing if n != "lm_head.weight"]
        theirs.tie_weights()
        want = theirs(torch.tensor([IDS]), use_cache=False).logits[0]
    assert off(logits(models.load(file, dtype="float32", device="cpu"), IDS), want) < 1e-4


@pytest.mark.parametrize(
    ("kind", "least", "most"), [(Q.F16, 1e-6, 5e-3), (Q.BF16, 1e-4, 5e-2), (Q.Q8_0, 1e-4, 5e-2), (Q.Q4_0, 1e-2, 0.9)]
)
def test_other_types(kind: Q, least: float, most: float, tmp_path: Path):
    """Off by what the type rounds, no more."""
    model = models.load(write("llama2", tmp_path / "m.gguf", kind), dtype="float32", device="cpu")
    own = upstream("llama2")(torch.tensor([IDS])).logits[0].detach()
    apart = float((logits(model, IDS) - own).square().mean().sqrt() / own.square().mean().sqrt())
    assert least < apart < most
    assert models.load(tmp_path / "m.gguf", device="cpu", load_format="gguf").dtype is (
        torch.float16 if kind is Q.F16 else torch.bfloat16
    )


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL])
def test_k_quants_are_decoded(kind: Q):
    """Oracle: transformers' decoder, on random blocks with scales that are numbers."""
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 255, (8, 4 * size), np.uint8)
    blocks = raw.reshape(-1, size)
    scales = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}.get(kind, (0,))
    for at in scales:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    tensor = type("T", (), dict(data=raw, tensor_type=kind, name="x", shape=np.array([4 * block, 8])))
    got = gguf_file.decoded(gguf_file.File(Path("x"), None), tensor)
    want = kernels.dequantize_blocks(torch.from_numpy(raw), kind.value, 8, 4 * block, torch.float32)
    torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-5, atol=1e-6)


def test_rounded_again_to_our_leaves(tmp_path: Path):
    file = write("llama2", tmp_path / "m.gguf", Q.Q8_0)
    model = models.load(file, dtype="float32", device="cpu", quantization="int8")
    assert model.how.kind == "int8"
    assert off(logits(model, IDS), logits(models.load(file, dtype="float32", device="cpu"), IDS)) < 0.1


def test_its_tokenizer_and_the_command_line(tmp_path: Path, capsys):
    """Oracle: the tokenizer that the vocabulary came from."""
    file = write("llama2", tmp_path / "tiny.gguf", tokenizer=True, **{"tokenizer.chat_template": "{{ messages }}"})
    from fnengine.host.tokenizer import Tokenizer

    ours, own = Tokenizer.load(file), Tokenizer.load(BUNDLED)
    for text in ("Once upon a time, 12 cats' toys.", "  \n\tüß 漢字"):
        assert ours.encode(text, add_special=False) == own.encode(text, add_special=False)
        assert ours.decode(ours.encode(text)) == text
    assert ours.templates["default"] == "{{ messages }}"
    assert fn.load(file).name == "tiny"
    assert cli.main(["plan", str(file), "--memory", "4GiB", "--max-model-len", "64"]) == 0
    assert "weights" in capsys.readouterr().out


def test_a_damaged_file_says_so(tmp_path: Path):
    """Cut at many places, and with numbers in its header that nobody can mean: an error each time, never a hang."""
    whole = write("llama2", tmp_path / "m.gguf").read_bytes()
    broken = [whole[:n] for n in (0, 3, 20, 30, 100, 500, 900, len(whole) // 2, len(whole) - 1)]
    broken.append(whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:])  # tensors
    broken.append(whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:])  # metadata
    key = b"x" * 8
    array = whole[:8] + struct.pack("<QQQ", 0, 1, len(key)) + key + struct.pack("<IIQ", 9, 0, 1 << 62)
    broken += [array, array + bytes(64), b"GGUF" + struct.pack("<I", 99) + whole[8:], b"not a model at all" * 9]
    nested = whole[:8] + struct.pack("<QQQ", 0, 1, len(key)) + key + struct.pack("<I", 9)
    broken.append(nested + struct.pack("<IQ", 9, 1) * 100_000)
    for i, data in enumerate(broken):
        file = tmp_path / f"broken{i}.gguf"
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"truncated or no GGUF|has no general.architecture|has no"):
            models.load(file, device="cpu")


def test_what_is_refused(tmp_path: Path):
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(SpecError, match=r"general.architecture = 'rwkv7'.*llama.*are read"):
        checkpoint.read_spec(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="only as GGUF"):
        shutil.copy(tiny_folder("llama2") / "config.json", tmp_path)
        models.load(tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"no \.gguf file"):
        models.load(tiny_folder("llama2"), device="cpu", load_format="gguf")
    with pytest.raises(FnError, match="no such directory"):
        fn.load("./nowhere.gguf")


# --- pickled files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    shutil.copy(tiny_folder("qwen3") / "config.json", tmp_path)
    held, cut = tensors("qwen3"), len(tensors("qwen3")) // 2
    for i, part in enumerate((list(held.items())[:cut], list(held.items())[cut:])):
        torch.save(dict(part), tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    return tmp_path


def test_pickled_weights_are_read_only_when_asked(pickled: Path):
    with pytest.raises(CheckpointError, match="--load-format pt"):
        models.load(pickled, device="cpu")
    model = models.load(pickled, device="cpu", load_format="pt")
    assert torch.equal(logits(model, IDS), logits(tiny_model("qwen3"), IDS))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/fnengine-was-here"),))


def test_no_code_is_unpickled(pickled: Path):
    torch.save({"model.norm.weight": Evil()}, pickled / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        models.load(pickled, device="cpu", load_format="pt")
    assert not Path("/tmp/fnengine-was-here").exists()
    (pickled / "pytorch_model-00002-of-00002.bin").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is damaged"):
        models.load(pickled, device="cpu", load_format="pt")
