"""Latent attention beyond what test_families.py and test_experts.py compare: what the pool keeps, kernels that take
keys for values, laws, and what is refused. Oracles: the contracts' references, the same kernels with values of their
own, published sizes, transformers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import checkpoint, kernels
from fnengine.engine import Engine
from fnengine.errors import ConfigError, SpecError
from fnengine.families import spec_from_config
from fnengine.host.request import Request, Sampling, Stop
from fnengine.kernels import cpu, triton
from fnengine.kernels.attention import PAGED_ATTENTION
from fnengine.kernels.checking import canonical, disagreement
from fnengine.kernels.layout import Lanes
from fnengine.kernels.rope import ROPE_WRITE
from fnengine.layers import asked_of_attention
from fnengine.leaves import Packing, packing
from fnengine.params import memory_plan
from fnengine.spec import kv_bytes_per_token
from fnengine.state import pool_bytes
from tests.family_laws import compiled_goes_as, tokens
from tests.models import threads, tiny_folder, tiny_model
from tests.test_families import TOLERANCE
from tests.text_models import byte_tokenizer

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent / "configs"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


# ---- kernels that take keys for values -------------------------------------------------------------------------------


def without_values(dtype: torch.dtype, seed: int):
    """The examples of attention whose heads have an even number of channels, with an empty pool of V."""
    for e in PAGED_ATTENTION.examples(dtype, seed):
        k = e["k_NBKC"]
        if k.shape[3] % 2 == 0:
            yield {**e, "v_NBKC": k.new_empty(len(k), 0)}


def written_once(dtype: torch.dtype, seed: int):
    """The examples of the write, likewise; what was the first query heads is left out, so that H + K are left."""
    for e in ROPE_WRITE.examples(dtype, seed):
        k = e["k_pool"]
        yield {**e, "v_pool": k.new_empty(len(k), 0), "qkv_TE": e["qkv_TE"][:, k.shape[2] * k.shape[3] :]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_kernels_take_keys_for_values(dtype: torch.dtype):
    if why := cpu.paged_attention.supports(CPU, dtype):
        pytest.skip(why)
    keys_serve_as_values(dtype)


def keys_serve_as_values(dtype: torch.dtype):
    """Oracles: the references; and bit by bit the same kernel with a pool of values that are a copy of the keys."""
    for backend, examples in ((cpu.paged_attention, without_values), (cpu.rope_write, written_once)):
        told = dataclasses.replace(backend, op=dataclasses.replace(backend.op, examples=examples))
        assert disagreement(told, dtype) is None
    attend = canonical(cpu.paged_attention)
    for e in without_values(dtype, 5):
        assert torch.equal(attend(*e.values()), attend(*{**e, "v_NBKC": e["k_NBKC"].clone()}.values()))


def in_chunks(dtype: torch.dtype, seed: int):
    """The examples of attention in chunks that end inside of tiles, at their borders, and beyond all there is."""
    for e, chunk in zip(PAGED_ATTENTION.examples(dtype, seed), (1, 7, 64, 100, 16, 129), strict=True):
        yield {**e, "window": -chunk}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_chunks(dtype: torch.dtype):
    if why := cpu.paged_attention.supports(CPU, dtype):
        pytest.skip(why)
    chunks_are_right(dtype)


def chunks_are_right(dtype: torch.dtype):
    """Oracle: the reference. Law: a query alone has the bits that it has in its row."""
    told = dataclasses.replace(cpu.paged_attention, op=dataclasses.replace(PAGED_ATTENTION, examples=in_chunks))
    assert disagreement(told, dtype) is None
    attend = canonical(cpu.paged_attention)
    for e in in_chunks(dtype, 3):
        whole, start, length = attend(*e.values()), e["start_R1"].tolist(), e["length_R"].tolist()
        for r in range(len(length)):
            for t in {start[r], start[r + 1] - 1} if start[r + 1] > start[r] else ():
                one = {"q_THC": e["q_THC"][t : t + 1], "row_R": e["row_R"][r : r + 1]}
                one |= {"start_R1": torch.tensor([0, 1]).int()}
                one |= {"length_R": torch.tensor([length[r] - (start[r + 1] - 1 - t)]).int()}
                assert torch.equal(attend(*{**e, **one}.values())[0], whole[t]), (r, t)


def test_the_reference_of_chunks_is_a_mask():
    """Oracle: softmax over the positions of the query's own chunk, written out."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=g) for shape in ((9, 2, 8), (3, 16, 1, 8), (3, 16, 1, 8)))
    at = [torch.tensor(x).int() for x in ([[2, 1, 0]], [0], [0, 9], [40])]
    got = PAGED_ATTENTION.reference(q, k, v, *at, 0.3, -12, 0.0, None)
    keys, values = (x[torch.tensor([2, 1, 0])].flatten(0, 2) for x in (k, v))
    for t, position in enumerate(range(31, 40)):
        seen = slice(position // 12 * 12, position + 1)
        want = (q[t] @ keys[seen].T * 0.3).softmax(-1) @ values[seen]
        torch.testing.assert_close(got[t], want)


def test_layouts_hold_keys_alone():
    """Law: packed and unpacked, keys are the same, and the empty pool of V stays empty."""
    k = torch.randn(3, 16, 1, 24)
    for layout in (Lanes(1), Lanes(2)):
        packed = layout.pack(k, k.new_empty(3, 0))
        back, v = layout.unpack(*packed)
        assert torch.equal(back, k) and v.shape == (3, 0)
        layout.clear(*packed, 5)
        assert not layout.unpack(*packed)[0][:, 5:].any() and torch.equal(layout.unpack(*packed)[0][:, :5], k[:, :5])


# ---- what the pool keeps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "each"), [("DeepSeek-V3", 70_272), ("DeepSeek-V2-Lite", 31_104)])
def test_a_token_takes_its_latent_and_one_key(name: str, each: int):
    """Oracle: 61 layers x 576 channels x 2 bytes, which DeepSeek published as 70.272 KB; 27 for the smaller one."""
    spec = spec_from_config(json.loads((CONFIGS / f"{name}.json").read_text()))
    ops = kernels.ops("cpu", torch.bfloat16)
    assert kv_bytes_per_token(spec, 2) == each and pool_bytes(ops.kv, spec, torch.bfloat16) == 16 * each
    plan = memory_plan(spec, torch.bfloat16, packing(CPU, torch.bfloat16))
    assert plan.weights > 2 * 15e9


def test_llama4_plans_its_memory():
    """Oracle: what was published, 109 billion parameters, of which some 1.2 see: it is the text model alone."""
    spec = spec_from_config(json.loads((CONFIGS / "Llama-4-Scout-17B-16E-text.json").read_text()))
    plan = memory_plan(spec, torch.bfloat16, packing(CPU, torch.bfloat16))
    assert 2 * 107e9 < plan.weights < 2 * 109e9 and kv_bytes_per_token(spec, 2) == 48 * 2 * 8 * 128 * 2


def runtime(name: str, dtype: str = "float32", **more: Any) -> fn.Runtime:
    sizes: dict[str, Any] = dict(max_num_seqs=4, max_model_len=128, max_num_batched_tokens=64, enforce_eager=True)
    return fn.Runtime(tiny_model(name, dtype), **{**sizes, "kv_cache_memory_bytes": 1 << 20, **more})


def test_the_ledger_counts_what_the_pool_takes():
    """Oracle: the tensors of the pool."""
    rt = runtime("deepseek-v3", "bfloat16")
    pool = rt._device.state.pool
    assert all(p.v.numel() == 0 and p.k.numel() == len(p.k) * 16 * 32 for p in pool)
    assert rt.built.account is not None
    assert rt.built.account.line("KV pool").bytes == sum(p.k.nbytes + p.v.nbytes for p in pool)


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_do_not_depend_on_neighbours(dtype: str):
    """Law: a token's logits have the same bits alone, among 1 to 40 other tokens, and after chunks."""
    ids = tokens(90, seed=9)
    rt = runtime("deepseek-v3", dtype)
    seq, _ = rt.extend(rt.empty, ids[:89])
    _, want = rt.extend(seq, ids[89:])
    for others in (1, 2, 3, 6, 11, 29, 40):
        (_, _), (_, got) = rt.extend([(rt.empty, tokens(others, seed=others)), (seq, ids[89:])])
        assert torch.equal(got, want), others
    again = runtime("deepseek-v3", dtype)
    seq = again.empty
    for cut in (ids[:1], ids[1:40], ids[40:]):
        seq, got = again.extend(seq, cut)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_sequences_go_on_as_they_would_have(tmp_path: Path, dtype: str):
    here, there = runtime("deepseek-v2", dtype), runtime("deepseek-v2", dtype)
    for n in (1, 16, 37):
        seq, _ = here.extend(here.empty, tokens(n, 1))
        here.save(seq, tmp_path / "seq")
        want = here.extend(seq, [5, 6, 7], logits="all")[1]
        assert torch.equal(there.extend(there.load(tmp_path / "seq"), [5, 6, 7], logits="all")[1], want), n


def test_swapped_and_preempted_rows_give_the_same_text():
    """Oracle: the functional loop, alone. Eight rows in a pool of nine blocks, with and without host memory."""
    prompt, sampling = tokens(37, 1), Sampling(temperature=0.9, top_p=0.95, seed=21)
    rt = runtime("deepseek-v3")
    seq, new, want = rt.empty, prompt, []
    for _ in range(20):
        seq, token = rt.extend(seq, new, sample=sampling)
        want.append(token)
        new = [token]
    model, number = tiny_model("deepseek-v3"), itertools.count()
    for swap in (0.0, 0.001):
        size = 9 * 16 * kv_bytes_per_token(model.spec, 4)
        e = Engine.build(
            model,
            tokenizer=byte_tokenizer(131),
            max_model_len=96,
            kv_cache_memory_bytes=size,
            enforce_eager=True,
            max_num_seqs=6,
            swap_space=swap,
        )
        got: list[list[int]] = [[] for _ in range(8)]
        for i in range(8):
            how = sampling if i in (3, 7) else Sampling(temperature=1.2, seed=i)
            ids = np.array(prompt if i in (3, 7) else tokens(20 + i, i), np.int32)
            r = Request(id=f"r{next(number)}", prompt=ids, sampling=how, stop=Stop(max_tokens=20, ignore_eos=True))
            e.submit_to(r, lambda d, to=got[i]: to.extend(d.tokens))
        turns = 0
        while e.turn():
            turns += 1
            assert turns < 5000, "no progress"
        assert got[3] == want and got[7] == want
        assert e.gauges().swaps > 0 if swap else e.gauges().preemptions > 0
        e.check()


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "llama4"])
def test_compiled_layers(name: str, caplog):
    """Oracle: the same steps uncompiled. One layer: of latents, or of a temperature and experts whose input is weighed;
    small steps are recorded."""
    model = tiny_model(name)
    last = {**model.params, "layers": model.params["layers"][-1:]}
    model = dataclasses.replace(model, spec=dataclasses.replace(model.spec, layers=model.spec.layers[-1:]), params=last)
    sizes: dict[str, Any] = dict(max_num_seqs=4, max_model_len=64, kv_cache_memory_bytes=1 << 20)
    compiled_goes_as(fn.Runtime(model, enforce_eager=True, **sizes), fn.Runtime(model, **sizes), caplog, TOLERANCE)


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_projections_of_latents_are_those_of_the_checkpoint():
    """Oracle: the checkpoint's tensors, by index. A head's rows of `kv_b_proj` are 12 of its key, then its value;
    pairs of channels that rotate follow each other there, and stand four apart here."""
    from safetensors.torch import load_file

    held = load_file(tiny_folder("deepseek-v2") / "model.safetensors")
    spec = checkpoint.read_spec(tiny_folder("deepseek-v2"))
    got = checkpoint.load(tiny_folder("deepseek-v2"), spec, torch.float32, CPU, Packing("dense", "a test looks inside"))
    p, at = got["layers"][0], "model.layers.0.self_attn."
    up = held[f"{at}kv_b_proj.weight"]
    for h in range(4):
        assert torch.equal(p["k_up"].weight[h], up[22 * h : 22 * h + 12].T)
        assert torch.equal(p["v_up"].weight[h], up[22 * h + 12 : 22 * h + 22])
    for i in range(4):
        for ours, theirs in ((i, 2 * i), (i + 4, 2 * i + 1)):
            assert torch.equal(p["kv_down"].weight[24 + ours], held[f"{at}kv_a_proj_with_mqa.weight"][24 + theirs])
            for h in range(4):
                row = 20 * h + 12
                assert torch.equal(p["q_up"].weight[row + ours], held[f"{at}q_b_proj.weight"][row + theirs])


def test_corrections_are_not_rounded(tmp_path: Path):
    """Those of DeepSeek V3 lie closer together than bfloat16 can tell. Oracle: the checkpoint's own tensor."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder("deepseek-v3"), tmp_path / "m"))
    held = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    held[name] = 3 + torch.arange(8) / 1024
    save_file(held, folder / "model.safetensors")
    got = fn.load(folder, dtype="bfloat16", device="cpu").params["layers"][1]["correction"]
    assert torch.equal(got, held[name])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_latents_are_not_rounded_to_8_bits():
    with pytest.raises(ConfigError, match="int8: latents, which are keys and values at once"):
        runtime("deepseek-v3", kv_cache_dtype="int8")


def test_gpu_kernels_say_why_they_pass():
    asked = [asked_of_attention(layer.mixer) for layer in tiny_model("deepseek-v3").spec.layers]
    for backend in (triton.paged_attention, triton.rope_write):
        assert "latent attention" in str(backend.lacks(CPU, asked))
        assert backend.lacks(CPU, [dataclasses.replace(asked[0], shares=False)]) is None


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("deepseek-v3", {"n_group": 3}, ["n_group", "does not divide n_routed_experts = 8"]),
        ("deepseek-v3", {"scoring_func": "softmax"}, ["scoring_func", "sigmoid"]),
        ("deepseek-v3", {"num_experts_per_tok": 5}, ["num_experts_per_tok", "more than there are experts, 4"]),
        ("deepseek-v3", {"quantization_config": {"quant_method": "awq"}}, ["stored quantized (awq)"]),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, ["topk_method", "greedy"]),
        ("deepseek-v2", {"num_key_value_heads": 2}, ["num_key_value_heads", "belong to all heads"]),
        ("deepseek-v2", {"kv_lora_rank": 23}, ["kv_lora_rank", "odd"]),
    ],
    ids=str,
)
def test_configs_that_cannot_be_built_say_why(name: str, change: dict, says: list[str]):
    with pytest.raises(SpecError) as e:
        spec_from_config({**checkpoint.read_json(tiny_folder(name) / "config.json"), **change})
    assert all(part in str(e.value) for part in says), str(e.value)
