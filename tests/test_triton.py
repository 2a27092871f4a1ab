"""Triton's kernels beyond the contracts that `test_kernels` holds every backend to: the laws of attention, KV
of 8 bits.

Here they run in Triton's interpreter, over small tiles and parts so that short rows have many of them; the tests marked
gpu run them as they are. Oracles: the plain-torch references, and the same work done another way.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fnengine import kernels
from fnengine.kernels import attention, cpu, reference, triton
from fnengine.kernels.layout import Codes, Fp8, KVLayout, Rounded, Tokens, gather, put, round_codes
from fnengine.kernels.rope import ROPE_WRITE
from tests.test_kernels import first_variation, moved, one_query

CPU = torch.device("cpu")
LAYOUTS: dict[str, KVLayout] = {"auto": Tokens(), "int8": Codes(), "fp8": Fp8()}


@pytest.fixture
def interpreter() -> None:
    if why := triton.interpreted(CPU, torch.float32):
        pytest.skip(why)


def small_tiles(near: int):
    from fnengine.kernels.triton.attention import Tiles

    return Tiles(16, 16, near, 2 * near, 4 * near, warps=4, stages=1, programs=1)


def attend(e: dict, programs: int = 3, near: int = 16, kv: str = "auto") -> torch.Tensor:
    """Attention of an example by so many programs, with its pools as `kv` has them."""
    from fnengine.kernels.triton.attention import paged_attention

    k, v = LAYOUTS[kv].pack(e["k_NBKC"], e["v_NBKC"])
    return paged_attention(*(e | {"k_NBKC": k, "v_NBKC": v}).values(), small_tiles(near), programs)


def example(
    dtype: torch.dtype,
    rows: list[tuple[int, int]],
    heads: tuple[int, int, int] = (3, 1, 20),
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: bool = False,
) -> dict:
    """Inputs of attention: rows of (new tokens, length) in blocks here and there."""
    g = torch.Generator().manual_seed(len(rows))
    H, K, C = heads
    P = max(-(-length // 16) for _, length in rows) + 1
    table = (torch.randperm(len(rows) * P, generator=g) + 1).int().view(-1, P)
    new = torch.tensor([0, *(n for n, _ in rows)])
    T = int(new.sum())
    pool = torch.randn(2, len(rows) * P + 1, 16, K, C, generator=g).to(dtype)
    return {
        "q_THC": torch.randn(T, H + 2 * K, C, generator=g).to(dtype)[:, :H],
        "k_NBKC": pool[0],
        "v_NBKC": pool[1],
        "table_MP": table,
        "row_R": torch.randperm(len(rows), generator=g).int(),
        "start_R1": new.cumsum(0).int(),
        "length_R": torch.tensor([length for _, length in rows]).int(),
        "scale": C**-0.5,
        "window": window,
        "soft_cap": soft_cap,
        "sink_H": torch.randn(H, generator=g).to(dtype) if sinks else None,
    }


@cache
def rows_keep_their_bits() -> bool:
    """Whether NumPy's product, by which the interpreter multiplies, gives a row the same bits wherever it stands. Its
    BLAS does on processors with AVX-512, and does not on an EPYC with AVX2."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 20), np.float32), rng.standard_normal((20, 16), np.float32)
    return bool((np.roll(a @ b, 5, 0) == np.roll(a, 5, 0) @ b).all())


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit where the interpreter can be held to that, else within what rounding gives."""
    return torch.equal(a, b) if rows_keep_their_bits() else torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)


ROWS = [(1, 100), (0, 9), (7, 7), (10, 45), (1, 1), (1, 65)]


def by_reference(e: dict, kv: str = "auto") -> torch.Tensor:
    """The reference in float32 over what the pools hold."""
    layout = LAYOUTS[kv]
    k, v = (x.float() for x in layout.unpack(*layout.pack(e["k_NBKC"], e["v_NBKC"])))
    wide = {name: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in e.items()}
    return attention.paged_attention(*(wide | {"k_NBKC": k, "v_NBKC": v}).values())


# ---- attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_attention_equals_the_reference_over_the_same_pool(interpreter, dtype: torch.dtype, kv: str):
    """With KV of 8 bits the oracle reads what the pool holds, so the contract's tolerance stays as it is."""
    rtol, atol = attention.PAGED_ATTENTION.tolerance[dtype]
    e = example(dtype, ROWS[:4], heads=(4, 2, 20), window=40, soft_cap=2.0, sinks=True)
    torch.testing.assert_close(attend(e, kv=kv).float(), by_reference(e, kv), rtol=rtol, atol=atol)


def test_the_tolerance_notices_kv_of_8_bits(interpreter):
    """So what the test above shows is not that nothing was rounded."""
    e = example(torch.float32, [(1, 90)])
    for kv in ("int8", "fp8"):
        assert not torch.allclose(attend(e, kv=kv), by_reference(e), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_bits_do_not_depend_on_how_many_programs_there_are(interpreter, monkeypatch, kv: str):
    """Law: rows are split, or not, by how many programs wait for work and how much scratch memory there is."""
    from fnengine.kernels.triton import attention as kernel

    e = example(torch.float32, ROWS[:4], window=70, sinks=True)
    whole = attend(e, programs=1, kv=kv)
    assert all(torch.equal(attend(e, programs, kv=kv), whole) for programs in (2, 9))
    monkeypatch.setattr(kernel, "SCRATCH", 9 * kernel.slot_bytes(3, 20))
    assert torch.equal(attend(e, 9, kv=kv), whole)
    monkeypatch.setattr(kernel, "SCRATCH", 0)
    assert torch.equal(attend(e, 9, kv=kv), whole)
    assert not torch.equal(attend(e, near=32, kv=kv), whole), "were parts another size, bits would show it"


def test_split_rows_are_merged_by_the_second_kernel(interpreter, monkeypatch):
    """The law above would hold where nothing is ever split; without the second kernel answers must be missing."""
    from fnengine.kernels.triton import attention as kernel

    e = example(torch.float32, ROWS)
    whole, launches = attend(e, 9), kernel.launches
    monkeypatch.setattr(kernel, "launches", lambda *args: launches(*args)[:1])
    part = attend(e, 9)
    missing = [t for t in range(len(whole)) if not torch.equal(part[t], whole[t])]
    long = [0, *range(8, 18), 19]  # all but those of 7 and of 1 position, which have one part
    assert missing == long


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_a_query_has_the_same_bits_alone_and_in_other_blocks(interpreter, dtype: torch.dtype):
    for window in (0, 40) if dtype == torch.float32 else (40,):
        e = example(dtype, ROWS, window=window)
        whole = attend(e)
        assert torch.equal(attend(moved(e, 5)), whole)
        for r, t in ((0, 0), (2, 5), (3, 8), (3, 17), (5, 19)):
            assert alike(attend(one_query(e, r, t))[0], whole[t]), (window, r, t)


def test_a_prompt_in_chunks_has_the_bits_it_has_at_once(interpreter):
    """Law, for cuts within tiles, at their borders and one by one."""
    n, length = 30, 75
    e = example(torch.float32, [(n, length)], window=40)
    whole = attend(e)
    for cuts in ([0, 16, 30], [0, 5, 29, 30]):
        for a, b in itertools.pairwise(cuts):
            chunk = {
                "q_THC": e["q_THC"][a:b],
                "start_R1": torch.tensor([0, b - a]).int(),
                "length_R": torch.tensor([length - n + b]).int(),
            }
            assert alike(attend(e | chunk), whole[a:b]), (a, b)


@pytest.mark.parametrize("kv, window", [("auto", 0), ("fp8", 0), ("auto", 20), ("auto", 40)])
def test_what_stands_behind_the_end_of_a_row_or_before_its_window_is_not_read(interpreter, kv: str, window: int):
    """NaN in the pool, and columns of the table that point nowhere. (Scales of int8 are the next test's.)"""
    e = example(torch.float32, ROWS, window=window)
    first = [max(0, end - n - window + 1) if window else 0 for n, end in ROWS]
    k, v = torch.full_like(e["k_NBKC"], torch.nan), torch.full_like(e["v_NBKC"], torch.nan)
    table = torch.full_like(e["table_MP"], 2**31 - 1)
    for r, length, seen in zip(e["row_R"].tolist(), e["length_R"].tolist(), first, strict=True):
        columns = slice(seen // 16, -(-length // 16))
        table[r, columns] = e["table_MP"][r, columns]
        for p in range(seen // 16 * 16, length):
            slot = int(e["table_MP"][r, p // 16]), p % 16
            k[slot], v[slot] = e["k_NBKC"][slot], e["v_NBKC"][slot]
    rubbish = e | {"k_NBKC": k, "v_NBKC": v, "table_MP": table}
    assert torch.equal(attend(rubbish, kv=kv), attend(e, kv=kv))


def test_scales_behind_the_end_of_a_row_are_not_read(interpreter):
    from fnengine.kernels.triton.attention import paged_attention

    e = example(torch.bfloat16, [(1, 21)])
    pools = Codes().pack(e["k_NBKC"], e["v_NBKC"])
    want = paged_attention(*(e | dict(zip(("k_NBKC", "v_NBKC"), pools, strict=True))).values())
    for pool in pools:
        pool[int(e["table_MP"][0, 1]), :, :64].view(torch.float32)[:, 5:] = torch.nan
    got = paged_attention(*(e | dict(zip(("k_NBKC", "v_NBKC"), pools, strict=True))).values())
    assert torch.equal(got, want) and got.isfinite().all()


def test_padding_longer_than_its_table_is_inert(interpreter):
    e = example(torch.float32, [(1, 40), (3, 21)])
    T, pad = len(e["q_THC"]), e["table_MP"].shape[1] * 16 + 5
    padded = e | {
        "q_THC": torch.cat([e["q_THC"], torch.randn(pad, *e["q_THC"].shape[1:])]),
        "table_MP": torch.cat([e["table_MP"], torch.zeros_like(e["table_MP"][:1])]),
        "row_R": torch.cat([e["row_R"], torch.tensor([2]).int()]),
        "start_R1": torch.cat([e["start_R1"], torch.tensor([T + pad]).int()]),
        "length_R": torch.cat([e["length_R"], torch.tensor([pad]).int()]),
    }
    assert torch.equal(attend(padded)[:T], attend(e))


@pytest.mark.parametrize("length", [1, 255, 256, 257, 4095, 4096, 4097, 6144, 6145, 131072])
def test_parts_are_counted_as_they_are_cut(length: int):
    """Oracle: cutting one position after another. Scratch memory has a bound whatever the shapes."""
    if not triton.installed():
        pytest.skip("triton is not installed")
    from fnengine.kernels.triton.attention import SCRATCH, slot_bytes, slots_of, tiles_for

    tiles = tiles_for(torch.bfloat16, 128, 4)
    cuts = [p for p in range(length) if p % (tiles.near if p < tiles.edge else tiles.far) == 0]
    assert tiles.parts(length) == len(cuts)
    assert slots_of(tiles, 512, length, 32, 128) * slot_bytes(32, 128) <= SCRATCH
    assert (slots_of(tiles, 1, length, 32, 128) == len(cuts)) == (len(cuts) > 1)


# ---- KV of 8 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [3, 16, 20])
def test_codes_by_tokens_lie_as_written(C: int):
    """Oracle: the bytes, one by one, and what `Rounded` makes of the same values."""
    N, B, K = 2, 16, 2
    k, v = torch.randn(2, N, B, K, C) * torch.logspace(-3, 3, B)[:, None, None]
    packed = Codes().pack(k, v)
    assert tuple(tuple(x.shape) for x in packed) == Codes().shapes(N, B, K, C)
    for n, t, h in itertools.product(range(N), range(B), range(K)):
        for x, bytes_ in zip((k, v), packed, strict=True):
            scale = bytes_[n, h, 4 * t : 4 * t + 4].clone().view(torch.float32)
            assert scale == x[n, t, h].abs().max() / 127
            assert torch.equal(bytes_[n, h, 64 + t * C : 64 + t * C + C], round_codes(x[n, t, h])[0])
    for a, b in zip(Codes().unpack(*packed), Rounded().unpack(*Rounded().pack(k, v)), strict=True):
        assert torch.equal(a, b)


def test_fp8_rounds_to_the_nearest_and_stops_at_the_largest():
    """Oracle: the spacing of the format; torch's own conversion makes NaN of what is too large."""
    x = torch.tensor([0.0, -0.0, 1.0, 1.0625, 1.0626, 449.0, -1e30, 2.0**-10, 2.0**-9, 500.0]).view(1, 2, 1, 5)
    want = torch.tensor([0.0, -0.0, 1.0, 1.0, 1.125, 448.0, -448.0, 0.0, 2.0**-9, 448.0]).view(1, 2, 1, 5)
    assert all(torch.equal(y, want) for y in Fp8().unpack(*Fp8().pack(x, x)))
    y = torch.randn(4, 16, 2, 8) * 20
    assert ((Fp8().pack(y, y)[0].float() - y).abs() <= torch.maximum(y.abs() / 16, torch.tensor(2.0**-10))).all()
    pools = tuple(torch.zeros(4, 16, 2, 8).to(torch.float8_e4m3fn) for _ in range(2))
    for slot in torch.randperm(64).split(7):
        put(*pools, slot, y.flatten(0, 1)[slot], y.flatten(0, 1)[slot])
    assert all(torch.equal(p.float(), Fp8().pack(y, y)[0].float()) for p in pools)
    assert torch.equal(gather(*pools, torch.tensor([[2, 0]]))[0].float(), pools[0].float()[[2, 0]][None])


def test_the_reference_reads_and_writes_fp8():
    """Oracle: the reference over the pool in float32."""
    e = example(torch.float32, ROWS)
    pools = Fp8().pack(e["k_NBKC"], e["v_NBKC"])
    got = reference.paged_attention.fn(*(e | dict(zip(("k_NBKC", "v_NBKC"), pools, strict=True))).values())
    torch.testing.assert_close(got, by_reference(e, "fp8"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_kv_is_written_as_the_layout_says(interpreter, dtype: torch.dtype, kv: str):
    """Oracle: the layout made of all tokens anew, byte for byte where nothing is rotated; the rest stays as it was."""
    from fnengine.kernels.triton.rope import rope_write

    layout = LAYOUTS[kv]
    for n, e in enumerate(ROPE_WRITE.examples(dtype, 7)):
        if n == 2:
            continue  # 33 tokens take their time
        pools = [x * 3 for x in (e["k_pool"], e["v_pool"])]
        K, C = pools[0].shape[2:]
        heads = e["qkv_TE"].unflatten(1, (-1, C))
        heads *= torch.logspace(-4, 4, C)  # beyond the largest and below the smallest of fp8
        got = layout.pack(*pools)
        still = (torch.ones_like(e["cos_TW"]), torch.zeros_like(e["sin_TW"]))
        q = rope_write(e["qkv_TE"], None, None, *still, *got, e["slot_T"], 1e-6)
        put(*pools, e["slot_T"].long(), heads[:, -2 * K : -K], heads[:, -K:])
        assert torch.equal(q, heads[:, : -2 * K])
        for a, b in zip(got, layout.pack(*pools), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_token_is_rotated_and_written_the_same_in_any_company(interpreter):
    from fnengine.kernels.triton.rope import rope_write

    e = list(ROPE_WRITE.examples(torch.bfloat16, 4))[3]
    qkv, q_norm, k_norm, cos, sin, k_pool, v_pool, slot, eps = e.values()
    pools = k_pool.clone(), v_pool.clone()
    q = rope_write(qkv, q_norm, k_norm, cos, sin, *pools, slot, eps)
    for t in range(len(slot)):
        one = slice(t, t + 1)
        alone = rope_write(qkv[one], q_norm, k_norm, cos[one], sin[one], k_pool, v_pool, slot[one], eps)
        assert torch.equal(alone[0], q[t])
    assert torch.equal(k_pool, pools[0]) and torch.equal(v_pool, pools[1])


def test_kinds_of_kv_are_chosen_by_name_and_refused_with_a_reason(interpreter):
    for name, kind, layout in (
        ("reference", "fp8", Fp8()),
        ("triton", "fp8", Fp8()),
        ("triton", "int8", Codes()),
        ("triton", "auto", Tokens()),
    ):
        chosen = [
            kernels.choose(kernels.BACKENDS[op], CPU, torch.float32, name, kind)
            for op in ("paged_attention", "rope_write")
        ]
        assert all(c.backend.kv(torch.float32, kind) == layout for c in chosen)
    assert kernels.ops(CPU, torch.float32, "reference", "fp8").kv == Fp8()
    assert cpu.paged_attention.refuses(CPU, "int8") is None
    if cpu.paged_attention.supports(CPU, torch.float32) is None:
        with pytest.raises(LookupError, match="with KV in fp8: cpu: no kernels for KV in fp8; int8"):
            kernels.ops(CPU, torch.float32, "cpu", "fp8")
        mixed = kernels.ops(CPU, torch.float32, kv="fp8")
        assert mixed.kv == Fp8() and "no kernels for KV in fp8" in mixed.paged_attention.reason
        assert mixed.paged_attention.backend is reference.paged_attention
        assert mixed.copy_blocks.backend is cpu.copy_blocks
        expected = kernels.expected(CPU, torch.float32, kv="fp8")
        assert (expected.kv, expected.rope_write.backend) == (mixed.kv, mixed.rope_write.backend)


# ---- compiled for a card that is not there ----------------------------------------------------------------------

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fnengine.kernels.layout import Codes, Fp8, Tokens
from fnengine.kernels.triton import attention, pool, rope

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
         torch.float8_e4m3fn: "fp8e4nv"}

def assembly(launch):
    names, values = launch.kernel.arg_names, [*launch.tensors, *launch.numbers]
    tensors = [isinstance(x, torch.Tensor) for x in values]
    kinds = ["*" + NAMES[x.dtype] if t else "fp32" if isinstance(x, float) else "i32"
             for x, t in zip(values, tensors)]
    signature = dict(zip(names, kinds)) | dict.fromkeys(names[len(values):], "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(values) if tensors[i] or x in (1024, 4096)}
    source = ASTSource(launch.kernel, signature, launch.constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options).asm["ptx"]

T, K, G, C, N, B, P = 32, 8, 4, 128, 64, 16, 64
zeros = lambda *shape: torch.zeros(shape, dtype=torch.int32)
for dtype, layout in ((torch.bfloat16, Tokens()), (torch.bfloat16, Fp8()), (torch.bfloat16, Codes())):
    k, v = (torch.empty(s, dtype=layout.element(dtype)) for s in layout.shapes(N, B, K, C))
    q, tiles = torch.empty(T, K * G, C, dtype=dtype), attention.tiles_for(dtype, C, G)
    at = zeros(T, P), zeros(T), zeros(T + 1), zeros(T)
    attend, collect = attention.launches(q, k, v, *at, 0.1, 100, 5.0, q[0, :, 0].clone(), q, tiles, 132)
    angles = torch.empty(T, C // 2)
    qkv = torch.empty(T, (K * G + 2 * K) * C, dtype=dtype)
    write = rope.launch_of(qkv, q[0, 0], q[0, 0], angles, angles, k, v, zeros(T), 1e-6, q)
    for launch in (attend, collect, write) if layout == Tokens() else (attend, write):
        ptx = assembly(launch)
        wide = ptx.count(", 0x10,") + ptx.count(".v4.b32")
        print(dtype, layout.name, launch.kernel.__name__, ptx.count("wgmma.mma_async"), wide, ptx.count("cp.async.c"))
"""


def test_kernels_compile_for_an_h200_with_its_own_instructions(tmp_path):
    """Triton and its assembler need no GPU for that. Attention in bfloat16 must multiply by wgmma and fetch KV ahead,
    in pieces of 16 bytes; what the interpreter takes and the compiler does not is caught here."""
    if not triton.installed():
        pytest.skip("triton is not installed")
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = tmp_path / "compile_for_sm_90.py"  # Triton reads the sources of kernels, so it is a file
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=clean | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 7
    for dtype, *_, kernel, products, wide, ahead in lines:
        if kernel == "_attend" and dtype == "torch.bfloat16":
            assert int(products) >= 8 and int(wide) >= 16 and int(ahead) >= 16, lines


# ---- on a GPU ---------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(e: dict) -> dict:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in e.items()}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kv", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "rows, more",
    [
        ([(1, 131072)], {}),
        ([(1, 1)] * 512, {}),
        ([(1, n) for n in (255, 256, 257, 258, 511, 512, 513, 4096, 4097)], {"window": 256}),
        ([(1, 6200), (300, 4200), (0, 5), (17, 17), (1, 2049)], {"soft_cap": 30.0, "sinks": True}),
        ([(0, 7), (0, 0)], {}),
        ([(700, 700)], {"window": 128, "heads": (14, 2, 80)}),
        ([(40, 3000), (1, 900)], {"heads": (8, 4, 256)}),
    ],
    ids=["128k", "512 rows", "window", "mixed", "no tokens", "narrow", "wide heads"],
)
def test_native_kernels_equal_the_reference(rows, more, dtype, kv):
    layout = LAYOUTS[kv]
    e = on_gpu(example(dtype, rows, **({"heads": (8, 2, 128)} | more)))
    k, v = layout.pack(e["k_NBKC"], e["v_NBKC"])
    got = triton.paged_attention.fn(*(e | {"k_NBKC": k, "v_NBKC": v}).values())
    rtol, atol = attention.PAGED_ATTENTION.tolerance[dtype]
    torch.testing.assert_close(got.float(), by_reference(e, kv), rtol=max(rtol, 1e-4), atol=max(atol, 1e-4))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_native_bits_are_a_querys_own(dtype: torch.dtype):
    def fn(**e):
        return triton.paged_attention.fn(*on_gpu(e).values()).cpu()

    assert first_variation(fn, dtype) is None


@pytest.mark.gpu
@gpu
def test_native_bits_do_not_depend_on_programs_or_on_splitting(monkeypatch):
    from fnengine.kernels.triton import attention as kernel

    e = on_gpu(example(torch.bfloat16, [(1, 9000), (130, 5000), (1, 300), (4, 4)], heads=(8, 2, 128)))
    whole = kernel.paged_attention(*e.values())
    assert all(torch.equal(kernel.paged_attention(*e.values(), programs=n), whole) for n in (1, 7, 60))
    monkeypatch.setattr(kernel, "SCRATCH", 0)
    assert torch.equal(kernel.paged_attention(*e.values()), whole)


@pytest.mark.gpu
@gpu
def test_a_captured_graph_follows_lengths_and_tables():
    """Oracle: the same call outside of a graph, bit by bit."""
    e = on_gpu(example(torch.bfloat16, [(1, 5000), (1, 3), (2, 700), (1, 64)], heads=(8, 2, 128)))
    fn = triton.paged_attention.fn
    fn(*e.values())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn(*e.values())
    for lengths, start in (([5000, 3, 700, 64], [0, 1, 2, 4, 5]), ([1, 4100, 257, 900], [0, 0, 3, 4, 5])):
        e["length_R"].copy_(torch.tensor(lengths))
        e["start_R1"].copy_(torch.tensor(start))
        e["row_R"].copy_(torch.tensor([2, 0, 3, 1]))
        graph.replay()
        assert torch.equal(out, fn(*e.values()))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kv", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_native_writes_equal_the_reference(dtype: torch.dtype, kv: str):
    layout = LAYOUTS[kv]
    for e in map(on_gpu, ROPE_WRITE.examples(dtype, 1)):
        pools = layout.pack(e["k_pool"], e["v_pool"])
        got = triton.rope_write.fn(*(e | dict(zip(("k_pool", "v_pool"), pools, strict=True))).values())
        want = ROPE_WRITE.reference(*e.values())
        rtol, atol = ROPE_WRITE.tolerance[dtype]
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
        step = {"auto": atol, "int8": 0.05, "fp8": 0.3}[kv]  # one step of the format at the largest of these values
        for a, b in zip(layout.unpack(*pools), (e["k_pool"], e["v_pool"]), strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=step)
