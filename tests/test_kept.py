"""Sequences kept on disk. Oracles: the sequence that was never saved, bit for bit; `pack` of a cleared tensor; and
safetensors' own reader."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import kept, keys, leaves, tree
from fnengine.errors import ContextLengthError, KeptError, OutOfBlocks, RequestError
from fnengine.host.request import Sampling
from fnengine.kernels.layout import Codes, Fp8, KVLayout, Lanes, Rounded, Tokens, movable
from tests.models import tiny_folder
from tests.models import tiny_model as tiny

PROMPT = np.random.default_rng(2).integers(3, 120, 37).tolist()
MORE = [9, 44, 7]


def runtime(model, kv: str = "auto", **more) -> fn.Runtime:
    sizes = dict(max_num_seqs=4, max_model_len=96, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    return fn.Runtime(model, **{**sizes, **more}, kv_cache_dtype=kv)


def all_free(rt: fn.Runtime) -> bool:
    gc.collect()
    rt.check()
    return rt.free_blocks == rt._device.blocks - 1


def other_weights(model):
    """The same model with one value of one weight changed in its last bit."""

    def change(path: str, x: torch.Tensor) -> torch.Tensor:
        if path != "norm":
            return x
        bits = x.clone().view(torch.int32)
        bits[5] ^= 1
        return bits.view(x.dtype)

    return dataclasses.replace(model, params=tree.map_with_path(change, model.params))


# ---- resumed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, kv", [("float32", "auto"), ("bfloat16", "auto"), ("float32", "int8")])
def test_a_loaded_sequence_goes_on_as_the_saved_one(tmp_path, dtype, kv):
    model = tiny("qwen3", dtype)
    here, there = runtime(model, kv), runtime(model, kv)
    for n in (1, 16, 17, 37):
        seq, _ = here.extend(here.empty, PROMPT[:n])
        here.save(seq, tmp_path / "seq")
        want = here.extend(seq, MORE, logits="all")[1]
        again = there.load(tmp_path / "seq")
        assert again.tokens == PROMPT[:n]
        got = there.extend(again, MORE, logits="all")[1]
        assert torch.equal(got, want), n
    del seq, again
    assert all_free(here) and all_free(there)


RESUME = """
import sys
import numpy as np
import torch
import fnengine as fn
from fnengine import model as models

model = models.load(sys.argv[1], dtype="bfloat16", device="cpu")
out = []
for kv in ("auto", "int8"):
    rt = fn.Runtime(model, max_num_seqs=4, max_model_len=96, kv_cache_memory_bytes=1 << 20, enforce_eager=True,
                    kv_cache_dtype=kv)
    seq = rt.load(f"{sys.argv[2]}/{kv}")
    for token in map(int, sys.argv[3:]):
        seq, logits = rt.extend(seq, [token])
        out.append(logits)
np.save(f"{sys.argv[2]}/logits.npy", torch.stack(out).numpy())
"""


def test_another_process_resumes_it_bit_by_bit(tmp_path):
    model, want = tiny("qwen3", "bfloat16"), []
    for kv in ("auto", "int8"):
        rt = runtime(model, kv)
        seq, _ = rt.extend(rt.empty, PROMPT)
        rt.save(seq, tmp_path / kv)
        for token in MORE:
            seq, logits = rt.extend(seq, [token])
            want.append(logits)
    arguments = [str(tiny_folder("qwen3", "bfloat16")), str(tmp_path), *map(str, MORE)]
    done = subprocess.run([sys.executable, "-c", RESUME, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array_equal(np.load(tmp_path / "logits.npy"), torch.stack(want).numpy())


def test_penalties_know_the_tokens_and_where_the_prompt_ended(tmp_path):
    model = tiny("qwen3")
    here, there = runtime(model), runtime(model)
    s = Sampling(temperature=1.0, seed=5, frequency_penalty=2, presence_penalty=2, repetition_penalty=1.4)

    def some(rt, seq):
        found, token = [], 11
        for _ in range(24):
            seq, token = rt.extend(seq, [token], sample=s)
            found.append(token)
        return found

    seq, _ = here.extend(here.empty, PROMPT[:20])
    seq, _ = here.extend(seq, PROMPT[20:])  # generated, as far as penalties know
    here.save(seq, tmp_path / "seq")
    again = there.load(tmp_path / "seq")
    assert some(there, again) == some(here, seq)
    again._prompt_len = len(again)
    assert some(there, again[:]) != some(here, seq), "this prompt shows no difference, so the test could not fail"


def test_forks_slices_and_the_prefix_cache_of_what_was_loaded(tmp_path):
    model = tiny("qwen3")
    here, there = runtime(model), runtime(model)
    seq, _ = here.extend(here.empty, PROMPT)
    here.save(seq, tmp_path / "seq")
    again = there.load(tmp_path / "seq")
    (left, a), (right, b) = there.extend([(again, [5, 6]), (again, [7])])
    (_, a2), (_, b2) = here.extend([(seq, [5, 6]), (seq, [7])])
    assert torch.equal(a, a2) and torch.equal(b, b2)
    assert torch.equal(there.extend(left[:20], [8])[1], here.extend(seq[:20], [8])[1])
    hits = there._ledger.hits
    cached, _ = there.extend(there.empty, [*PROMPT[:32], 3])
    assert there._ledger.hits == hits + 32, "full blocks of a loaded sequence are found by others"
    twice = there.load(tmp_path / "seq")
    assert torch.equal(there.extend(twice, MORE)[1], here.extend(seq, MORE)[1])
    there.save(left, tmp_path / "left")
    assert there.load(tmp_path / "left").tokens == [*PROMPT, 5, 6]
    del again, left, right, cached, twice
    assert all_free(there)


def test_the_empty_sequence(tmp_path):
    rt = runtime(tiny("qwen3"))
    rt.save(rt.empty, str(tmp_path / "seq"))
    seq, logits = rt.extend(rt.load(str(tmp_path / "seq")), PROMPT)
    assert torch.equal(logits, rt.extend(rt.empty, PROMPT)[1]) and seq.tokens == PROMPT


# ---- what is in a file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [16, 21])
@pytest.mark.parametrize("layout", [Tokens(), Fp8(), Lanes(1), Lanes(2), Rounded(), Codes()], ids=lambda x: x.name)
def test_clearing_writes_what_packing_zeros_would(layout: KVLayout, C: int):
    g = torch.Generator().manual_seed(C)
    k, v = torch.randn(2, 3, 16, 2, C, generator=g)
    for n in range(17):
        got = layout.pack(k, v)
        layout.clear(*got, n)
        behind = torch.arange(16)[:, None, None] >= n
        want = layout.pack(*(x.masked_fill(behind, 0.0) for x in (k, v)))
        assert all(torch.equal(movable(a), movable(b)) for a, b in zip(got, want, strict=True)), n


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_file_says_nothing_of_what_stood_behind_the_end(tmp_path, kv, monkeypatch):
    """A slice has the very file of a sequence that never was longer."""
    model = tiny("qwen3", "bfloat16")

    def files(name: str) -> bool:
        long, short = runtime(model, kv), runtime(model, kv)
        long.save(long.extend(long.empty, PROMPT)[0][:21], tmp_path / f"{name}-slice")
        short.save(short.extend(short.empty, PROMPT[:21])[0], tmp_path / f"{name}-short")
        return (tmp_path / f"{name}-slice").read_bytes() == (tmp_path / f"{name}-short").read_bytes()

    assert files("as it is")
    kind = type(runtime(model, kv).built.ops.kv)
    monkeypatch.setattr(kind, "clear", lambda *_: None)
    assert not files("mutant")


def test_safetensors_reads_it(tmp_path):
    from safetensors import safe_open

    rt = runtime(tiny("qwen3", "bfloat16"))
    rt.save(rt.extend(rt.empty, PROMPT)[0], tmp_path / "seq.safetensors")
    with safe_open(str(tmp_path / "seq.safetensors"), framework="pt") as file:
        assert file.get_tensor("tokens").tolist() == PROMPT
        about = file.metadata()
        pool = rt._device.state.pool
        assert [tuple(file.get_tensor(f"layers.{i}.k").shape[1:]) for i in range(2)] == [p.k.shape[1:] for p in pool]
    assert json.loads(about["key"]) == rt._identity and int(about["prompt_len"]) == len(PROMPT)


def test_weights_are_known_by_content():
    model = tiny("qwen3")
    assert kept.content(model.params) == kept.content({**model.params})
    assert kept.content(model.params) != kept.content(other_weights(model).params)
    if torch.backends.mkldnn.is_available():  # opaque weights: the handle of one is no part of what it is
        one, two = (leaves.pack_leaf(leaves.Dense(torch.ones(32, 32) * f)) for f in (1, 1))
        three = leaves.pack_leaf(leaves.Dense(torch.ones(32, 32) * 2))
        assert kept.content({"a": one}) == kept.content({"a": two}) != kept.content({"a": three})


# ---- refused --------------------------------------------------------------------------------------------------------


def refused(rt: fn.Runtime, path: Path) -> str:
    with pytest.raises(KeptError) as caught:
        rt.load(path)
    rt.check()
    assert rt.free_blocks == rt._device.blocks - 1 and str(path) in str(caught.value)
    return str(caught.value)


def test_another_engine_is_refused_by_the_fields_that_differ(tmp_path, monkeypatch):
    model = tiny("qwen3")
    rt = runtime(model)
    rt.save(rt.extend(rt.empty, PROMPT)[0], tmp_path / "seq")
    other = runtime(other_weights(model))
    said = refused(other, tmp_path / "seq")
    assert "weights.content" in said and "weights.dtype" not in said
    said = refused(runtime(tiny("qwen3", "bfloat16")), tmp_path / "seq")
    assert "weights.dtype: float32 there, bfloat16 here" in said
    assert "kv.layout" in refused(runtime(model, "int8"), tmp_path / "seq")
    assert "model.digest" in refused(runtime(tiny("llama31")), tmp_path / "seq")
    with monkeypatch.context() as patch:
        fresh = runtime(model)
        changed = {**kept._sources(), "kernels": {**kept._sources()["kernels"], "rope.py": "0"}}
        patch.setattr(kept, "_sources", lambda: changed)
        assert "source.kernels.rope.py" in refused(fresh, tmp_path / "seq")
        patch.setattr(kept, "_sources", dict)
        assert re.search(r"; and \d+ more", refused(runtime(model), tmp_path / "seq"))
    # A mutant that does not look at the weights gives other logits, and nobody is told.
    monkeypatch.setattr(kept, "content", lambda _params: "the same")
    here, there = runtime(model), runtime(other_weights(model))
    seq, _ = here.extend(here.empty, PROMPT)
    here.save(seq, tmp_path / "mutant")
    assert not torch.equal(there.extend(there.load(tmp_path / "mutant"), MORE)[1], here.extend(seq, MORE)[1])


def test_every_damage_is_noticed(tmp_path):
    rt = runtime(tiny("qwen3"))
    path = tmp_path / "seq"
    seq, _ = rt.extend(rt.empty, PROMPT[:20])
    rt.save(seq, path)
    del seq
    rt._ledger.reset_cache()
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for n in (0, 7, 8, 100, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:n])
        assert "damaged" in refused(rt, path)
    path.write_bytes(whole + b"x")
    assert "damaged" in refused(rt, path)
    rng = np.random.default_rng(0)
    digest = whole.index(b'"digest": "') + 11
    places = [0, 3, 8, digest, header - 1, header, len(whole) - 1, len(whole) - 70]
    for at in [*places, *rng.integers(0, header, 20).tolist(), *rng.integers(header, len(whole), 20).tolist()]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(rt, path)
    path.write_bytes(whole)
    assert rt.load(path).tokens == PROMPT[:20]
    refused(rt, tmp_path / "missing")
    refused(rt, tmp_path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    rt = runtime(tiny("qwen3"))
    monkeypatch.setattr(kept, "FORMAT", "sequence 0")
    rt.save(rt.extend(rt.empty, PROMPT)[0], tmp_path / "seq")
    monkeypatch.undo()
    assert "is of format 'sequence 0'" in refused(rt, tmp_path / "seq")


def test_no_block_is_lost_where_it_does_not_fit(tmp_path):
    model = tiny("qwen3")
    rt = runtime(model)
    rt.save(rt.extend(rt.empty, PROMPT)[0], tmp_path / "seq")
    from fnengine.spec import kv_bytes_per_token

    few = runtime(model, max_model_len=48, kv_cache_memory_bytes=4 * 16 * kv_bytes_per_token(model.spec, 4))
    held, _ = few.extend(few.empty, PROMPT[:5])
    with pytest.raises(OutOfBlocks):
        few.load(tmp_path / "seq")
    few.check()
    assert few.free_blocks == 2
    held.close()
    assert few.load(tmp_path / "seq").tokens == PROMPT
    with pytest.raises(ContextLengthError, match="37 tokens exceed the context of 32"):
        runtime(model, max_model_len=32).load(tmp_path / "seq")


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    rt = runtime(tiny("qwen3"))
    seq, _ = rt.extend(rt.empty, PROMPT)
    rt.save(seq[:20], tmp_path / "seq")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kept.os, "replace", full)
        with pytest.raises(KeptError, match="cannot be written: No space left"):
            rt.save(seq, tmp_path / "seq")
    assert rt.load(tmp_path / "seq").tokens == PROMPT[:20] and os.listdir(tmp_path) == ["seq"]
    with pytest.raises(KeptError, match="cannot be written"):
        rt.save(seq, tmp_path / "no such folder" / "seq")
    rt.save(seq, tmp_path / "seq")
    assert rt.load(tmp_path / "seq").tokens == PROMPT
    other = runtime(tiny("qwen3"))
    with pytest.raises(RequestError, match="another Runtime"):
        other.save(seq, tmp_path / "seq")
    seq.close()
    with pytest.raises(RequestError, match="was closed"):
        rt.save(seq, tmp_path / "seq")


def test_identity_leaves_out_what_decides_no_bit():
    """Threads decide none of eager steps, as other tests say; neither does where a model lies, nor its name."""
    model = tiny("qwen3")
    here = runtime(model)._identity
    assert not keys.differences(here, runtime(dataclasses.replace(model, name="x", folder=Path("/")))._identity)
    assert "threads" not in here["machine"] and "instructions" in here["machine"]
