"""KV of 8 bits: its layout, attention over it, and the laws that hold for it as for any other KV.

Oracles: the definition written out, dense float64 attention over the decoded pool, and the same work done another way.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fnengine import kernels
from fnengine.build import build
from fnengine.errors import ConfigError
from fnengine.kernels import attention, cpu, native, reference
from fnengine.kernels.layout import Rounded, put, round_codes
from fnengine.kernels.rope import ROPE_WRITE
from fnengine.program import wanted_layers
from fnengine.runtime import Runtime
from fnengine.settings import Settings, check_kv
from fnengine.state import block_bytes
from tests import test_kernels
from tests.models import tiny_model

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT8 = Rounded()


def needs_native(dtype: torch.dtype = torch.float32) -> None:
    if why := cpu.paged_attention.supports(CPU, dtype):
        pytest.skip(why)


@pytest.mark.parametrize("C", [2, 8, 13, 64])
def test_codes_lie_as_written_and_err_by_at_most_half_a_scale(C: int):
    """Oracle: the bytes, one by one; law: |x - decoded| <= scale / 2, with a scale of a token's own largest value."""
    N, B, K = 3, 16, 2
    k, v = torch.randn(2, N, B, K, C) * torch.logspace(-3, 3, B)[:, None, None]
    k[1, 2] = 0
    packed = INT8.pack(k, v)
    assert tuple(tuple(x.shape) for x in packed) == INT8.shapes(N, B, K, C)
    for n, t, h in itertools.product(range(N), range(B), range(K)):
        for x, bytes_ in zip((k, v), packed, strict=True):
            scale = bytes_[n, h, 4 * t : 4 * t + 4].clone().view(torch.float32)
            assert scale == x[n, t, h].abs().max() / 127
        code = [packed[0][n, h, 64 + (c // 2 * 16 + t) * 2 + c % 2] for c in range(C)]
        assert torch.equal(torch.stack(code), round_codes(k[n, t, h])[0])
        code = [packed[1][n, h, 64 + (t // 2 * C + c) * 2 + t % 2] for c in range(C)]
        assert torch.equal(torch.stack(code), round_codes(v[n, t, h])[0])
    for x, y in zip((k, v), INT8.unpack(*packed), strict=True):
        assert ((x - y).abs() <= x.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()
    one_by_one = tuple(torch.zeros(s, dtype=torch.int8) for s in INT8.shapes(N, B, K, C))
    for slot in torch.randperm(N * B).split(7):
        put(*one_by_one, slot, k.flatten(0, 1)[slot], v.flatten(0, 1)[slot])
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, packed, strict=True))


def writes_what_the_layout_says(dtype: torch.dtype) -> None:
    """Oracle: `put`, byte for byte where the rotation is none; the rest of the pool stays as it was."""
    for e in ROPE_WRITE.examples(dtype, 7):
        k, v = (x * 3 for x in (e["k_pool"], e["v_pool"]))
        got, want = INT8.pack(k, v), INT8.pack(k, v)
        heads = e["qkv_TE"].unflatten(1, (-1, k.shape[3]))
        still = (torch.ones_like(e["cos_TW"]), torch.zeros_like(e["sin_TW"]))
        cpu.rope_write.fn(e["qkv_TE"], None, None, *still, *got, e["slot_T"], 1e-6)
        K = k.shape[2]
        put(*want, e["slot_T"].long(), heads[:, -2 * K : -K], heads[:, -K:])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_writes_what_the_layout_says(dtype: torch.dtype):
    needs_native(dtype)
    writes_what_the_layout_says(dtype)


def decoded(e: dict) -> dict:
    k, v = INT8.unpack(*INT8.pack(e["k_NBKC"], e["v_NBKC"]))
    return e | {"k_NBKC": k, "v_NBKC": v}


def attention_is_right(dtype: torch.dtype) -> None:
    """Oracle: dense float64 over the decoded pool. Queries and weights have 16 bits, so float32 is not reached."""
    rtol, atol = {torch.float32: (5e-4, 5e-4)}.get(dtype) or attention.PAGED_ATTENTION.tolerance[dtype]
    long = test_kernels.long_examples(dtype, 11) if dtype == torch.float32 else ()
    for e in itertools.chain(attention.PAGED_ATTENTION.examples(dtype, 11), long):
        got = test_kernels.canonical(cpu.paged_attention, "int8")(*e.values())
        want = test_kernels.dense(*decoded(e).values())
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_equals_dense_over_the_decoded_pool(dtype: torch.dtype):
    needs_native(dtype)
    attention_is_right(dtype)


def test_the_reference_decodes():
    """Oracle: the reference over a pool that was decoded beforehand."""
    for e in attention.PAGED_ATTENTION.examples(torch.float32, 12):
        got = test_kernels.canonical(reference.paged_attention, "int8")(*e.values())
        torch.testing.assert_close(got, attention.paged_attention(*decoded(e).values()), rtol=1e-5, atol=1e-5)


def test_the_tolerance_notices_a_wrong_scale():
    e = test_kernels.small_examples()[1]
    k, v = INT8.pack(e["k_NBKC"], e["v_NBKC"])
    INT8.scales(k)[:, :, 3::5] *= 1.05
    wrong = dict(zip(("k_NBKC", "v_NBKC"), INT8.unpack(k, v), strict=True))
    got, want = (test_kernels.dense(*(e | x).values()) for x in (wrong, decoded(e)))
    assert not torch.allclose(got, want, rtol=5e-4, atol=5e-4)


def laws_of_attention(dtype: torch.dtype) -> None:
    fn = test_kernels.canonical(cpu.paged_attention, "int8")
    long = (test_kernels.long_examples,) if dtype == torch.float32 else ()  # parts know of float32 only
    for examples in (attention.PAGED_ATTENTION.examples, *long):
        assert test_kernels.first_variation(lambda **e: fn(*e.values()), dtype, examples) is None
        assert test_kernels.reads_rubbish(fn, dtype, examples) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_has_the_same_bits_in_any_company_and_reads_no_rubbish(dtype: torch.dtype):
    """The laws of `test_kernels`; where there is no token scales are NaN."""
    needs_native(dtype)
    laws_of_attention(dtype)


# ---- engines ----------------------------------------------------------------------------------------------------


def logits_of(rt: Runtime, parts: list[list[int]]) -> torch.Tensor:
    seq, logits = rt.empty, None
    for part in parts:
        seq, logits = rt.extend(seq, part)
    assert logits is not None
    return logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forks_and_cached_prefixes_equal_what_is_computed_afresh(dtype: str):
    """A fork copies the partial tail block, scales and all; a cached prefix is another's blocks. Oracle: a runtime of
    its own for each text."""
    needs_native(getattr(torch, dtype))
    model = tiny_model("qwen3", dtype)
    ids = [3 + i * 7 % 120 for i in range(90)]

    def runtime() -> Runtime:
        return Runtime(model, kv_cache_memory_bytes=1 << 20, kv_cache_dtype="int8", enforce_eager=True)

    rt = runtime()
    seq, _ = rt.extend(rt.empty, ids[:53])
    for tail in ([5, 6, 7], [9, 8]):
        forked = rt.extend(seq, tail)[1]
        assert torch.equal(forked, logits_of(runtime(), [ids[:53] + tail]))
    again = logits_of(rt, [ids[:80]])
    assert torch.equal(again, logits_of(runtime(), [ids[:20], ids[20:80]]))
    whole = logits_of(Runtime(model, kv_cache_memory_bytes=1 << 20, enforce_eager=True), [ids[:80]])
    error = (again - whole).norm() / whole.norm()
    assert 0 < error < 0.05, f"rounded KV should change logits a little: {error}"


def test_a_pool_of_the_same_bytes_holds_more_blocks():
    needs_native()
    model = tiny_model("qwen3", "bfloat16")
    limits = Settings(kv_cache_memory_bytes=1 << 18, max_num_seqs=64, enforce_eager=True)
    built = [build(model, dataclasses.replace(limits, kv_cache_dtype=kind)) for kind in ("auto", "int8")]
    for b in built:
        per_block = sum(block_bytes(b.ops.kv, x.mixer, model.dtype) for x in model.spec.layers)
        held = sum(t.nbytes for p in b.device.state.pool for t in (p.k, p.v))
        assert held == b.pool.blocks * per_block == b.pool.bytes <= 1 << 18
    assert built[1].pool.blocks > 1.5 * built[0].pool.blocks


def test_what_cannot_be_is_refused():
    model = tiny_model("qwen3")
    with pytest.raises(ConfigError, match="int4"):
        Runtime(model, kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match=r"for GPUs.*int8 is as small"):
        Runtime(model, kv_cache_dtype="fp8")
    check_kv("fp8", "cuda")


def test_artifacts_know_the_layout():
    model = tiny_model("qwen3")
    ops = [kernels.ops("cpu", torch.float32, kv=kind) for kind in ("auto", "int8")]
    keys = [wanted_layers(model.spec, model.params, o, torch.float32, CPU)[0].wanted.key for o in ops]
    assert [k["kv"] for k in keys] == [o.kv.name for o in ops] and keys[0]["kv"] != keys[1]["kv"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_is_known_before_anything_is_built(dtype: torch.dtype):
    try:
        native.find_compiler()
    except native.BuildFailed as e:
        pytest.skip(str(e))
    for kind in ("auto", "int8"):
        assert kernels.expected("cpu", dtype, kind).kv == kernels.ops("cpu", dtype, kv=kind).kv
