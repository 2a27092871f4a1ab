"""Triton's products with rounded weights and with experts' weights. Oracles: the contracts' references, the table of
codes against PTX read word by word, laws (a row's result is its own; nothing depends on where tiles end)."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fnengine.kernels import BACKENDS, fp8, grouped, quantized, triton
from fnengine.kernels.quantized import CODES, QUANTIZED_LINEAR

CPU = torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _installed():
    pytest.importorskip("triton")


@pytest.fixture
def interpreter():
    if why := triton.interpreted(CPU, torch.float32):
        pytest.skip(why)


# ---- tiles ------------------------------------------------------------------------------------------------------


def test_tiles_cover_every_product_and_split_by_the_weights_shape_alone():
    """Laws of `cut`: powers of two that `tl.dot` takes, whole steps in every part, the same parts for few tokens."""
    from fnengine.kernels.triton.tiles import FEW, cut

    for N, K in itertools.product((1, 64, 1024, 4096, 28672, 152_064), (1, 130, 1024, 4096, 14336)):
        few = {cut(T, N, K).splits for T in (1, 2, 16, 17, FEW)}
        assert len(few) == 1 and -(-K // 128) % few.pop() == 0
        for T in (1, 2, 16, 17, 33, FEW, FEW + 1, 700, 8192):
            tile = cut(T, N, K)
            assert all(x >= 16 and x & x - 1 == 0 for x in (tile.rows, tile.tokens))
            assert tile.tokens >= min(T, FEW) and tile.rows % 32 == 0 and (T <= FEW or tile.splits == 1)
    assert cut(1, 4096, 14336).splits == 4, "an H200 has 132 multiprocessors, 4096 rows are 64 tiles"


# ---- PTX --------------------------------------------------------------------------------------------------------


def ran(asm: str, word: int, outputs: int) -> list[int]:
    """The output registers of a piece of PTX, given its one input. Just the instructions that `lookup_asm` writes."""
    registers: dict[str, int] = {f"${outputs}": word}

    def value(x: str) -> int:
        return registers[x] if x in registers else int(x, 0)

    body = re.sub(r"\.reg[^;]*;", "", asm.strip("{} "))
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = line.split(" ", 1)
        to, *given = (x.strip() for x in rest.split(","))
        v = [value(x) for x in given]
        if name == "and.b32":
            registers[to] = v[0] & v[1]
        elif name == "or.b32":
            registers[to] = v[0] | v[1]
        elif name == "shr.b32":
            registers[to] = v[0] >> v[1]
        elif name == "prmt.b32":  # PTX ISA, prmt: selectors of 4 bits; the highest would spread a sign
            octets = (v[0] | v[1] << 32).to_bytes(8, "little")
            picks = [v[2] >> 4 * i & 15 for i in range(4)]
            assert all(pick < 8 for pick in picks), line
            registers[to] = int.from_bytes(bytes(octets[pick] for pick in picks), "little")
        else:
            raise AssertionError(line)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_looking_up_codes_in_registers_gives_the_table(dtype: torch.dtype):
    """Oracle: `CODES`, for every byte at every place of a word; the interpreter of kernels cannot run PTX."""
    from fnengine.kernels.triton import quantized as kernel

    per_word, outputs = 4 // dtype.itemsize, 2 * dtype.itemsize
    for first in range(256):
        octets = [first, (first * 7 + 3) % 256, 255 - first, (first + 128) % 256]
        words = ran(kernel._asm(dtype), int.from_bytes(bytes(octets), "little"), outputs)
        got = torch.tensor(words, dtype=torch.uint32).view(dtype).float().tolist()
        assert len(got) == outputs * per_word
        assert got[:4] == [CODES[b & 15] for b in octets] and got[4:] == [CODES[b >> 4] for b in octets]


def test_a_table_with_two_codes_swapped_is_noticed():
    from fnengine.kernels.triton import quantized as kernel

    wrong = list(CODES)
    wrong[9], wrong[10] = wrong[10], wrong[9]
    words = [ran(kernel.lookup_asm(kernel._words(t)), 0x00000009, 2) for t in (list(CODES), wrong)]
    assert words[0] != words[1]


# ---- laws, interpreted ------------------------------------------------------------------------------------------


def exact_product(bits: int, N: int, K: int, T: int) -> dict[str, Any]:
    """Small integers for x, so that a group's sum is exact in any order, as matrix products of the interpreter are not
    in a fixed one."""
    g = torch.Generator().manual_seed(bits)
    codes, scales = quantized.quantize(torch.randn(N, K, generator=g) / K**0.5, bits)
    return {"x_TK": torch.randint(-8, 9, (T, K), generator=g).float(), "codes": codes, "scales": scales}


@pytest.mark.parametrize("bits, dynamic", [(8, False), (8, True), (4, False), (4, True)])
def test_a_row_has_the_bits_it_has_alone(bits: int, dynamic: bool, interpreter, monkeypatch):
    """Law: among few tokens, whose sums are split over programs, and among many, whose sums are not. Both are the
    reference's product."""
    from fnengine.kernels.triton import tiles

    monkeypatch.setattr(tiles, "SHORTEST", 256)
    N, K = 40, 512
    e = exact_product(bits, N, K, 66)
    assert tiles.cut(3, N, K).splits == 2 and tiles.cut(66, N, K).splits == 1
    fn = BACKENDS["quantized_linear"][1].fn
    x, rest = e["x_TK"], (e["codes"], e["scales"], None, N, dynamic, True)
    want = QUANTIZED_LINEAR.reference(x, *rest)
    few, many = fn(x[:18], *rest), fn(x, *rest)
    torch.testing.assert_close(few, want[:18], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(many, want, rtol=1e-4, atol=1e-4)
    for rows in (slice(0, 1), slice(17, 18), slice(3, 6)):
        assert torch.equal(fn(x[rows], *rest), few[rows])
    assert torch.equal(fn(x[1:], *rest), many[1:])


def test_fp8_rows_have_the_bits_they_have_alone(interpreter):
    """The same for rows rounded to fp8; and rounding itself is the reference's, to the last bit."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(66, 140, generator=g) * 10 ** torch.linspace(-6, 6, 66)[:, None]
    x[5], x[6, 3] = 0, -0.0
    codes, factors = triton.round_rows(x)
    want, divisors = fp8.round_rows(x)
    assert torch.equal(codes.view(fp8.FP8).float(), want.view(fp8.FP8).float()) and torch.equal(factors, divisors)
    x = torch.randint(-8, 9, (66, 140), generator=g).float()
    weight = fp8.quantize(torch.randint(-8, 9, (40, 140), generator=g).float())
    fn = BACKENDS["fp8_linear"][1].fn
    many = fn(x, *weight, None, 40)
    for rows in (slice(0, 66), slice(17, 18), slice(3, 6)):
        assert torch.allclose(fn(x[rows], *weight, None, 40), many[rows], rtol=1e-6, atol=0)


@pytest.mark.parametrize("counts", [(64, 0, 70), (129,), (0, 0, 1, 65, 0)])
def test_experts_of_more_tokens_than_a_tile_has(counts: tuple[int, ...], interpreter):
    """Oracle: each expert's product by itself. The number of programs follows from shapes; none may be missing."""
    T, E, N, K = sum(counts), len(counts), 24, 40
    g = torch.Generator().manual_seed(T)
    x, weight = torch.randint(-8, 9, (T, K), generator=g).float(), torch.randint(-8, 9, (E, N, K), generator=g).float()
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    got = BACKENDS["grouped_linear"][0].fn(x, offsets, weight)
    want = torch.cat([x[offsets[e] : offsets[e + 1]] @ weight[e].T for e in range(E)])
    assert torch.equal(got, want)


# ---- mutants ----------------------------------------------------------------------------------------------------


def examples_are_met(fn: Callable[..., torch.Tensor]) -> bool:
    rtol, atol = QUANTIZED_LINEAR.tolerance[torch.float32]
    return all(
        torch.allclose(fn(**e), QUANTIZED_LINEAR.reference(**e), rtol=rtol, atol=atol)
        for e in QUANTIZED_LINEAR.examples(torch.float32, 0)
    )


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(lambda s: s.roll(1, 1), id="takes the scale of another group"),
        pytest.param(lambda s: s.roll(1, 2), id="takes the scale of another row"),
        pytest.param(lambda s: s.flip(0), id="takes the scales of another panel"),
        pytest.param(lambda s: s[:, :1].expand_as(s).contiguous(), id="never goes on to the next group"),
        pytest.param(lambda s: s[:, torch.arange(s.shape[1]) // 2 * 2], id="has groups twice as wide"),
    ],
)
def test_the_contracts_examples_catch_a_product_that(mutate):
    assert examples_are_met(QUANTIZED_LINEAR.reference)
    assert not examples_are_met(lambda scales, **e: QUANTIZED_LINEAR.reference(scales=mutate(scales), **e))


# ---- compiled ---------------------------------------------------------------------------------------------------

COMPILES = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fnengine.kernels.triton import fp8, grouped, quantized, tiles

def ptx(fn, types, constants, tile):
    names = fn.arg_names
    assert set(types) | set(constants) == set(names), set(names) ^ (set(types) | set(constants))
    aligned = [n for n in types if types[n][0] == "*" or n in ("N", "K", "x_stride", "panel")]
    source = ASTSource(
        fn,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

N, K = 4096, 14336
ints = dict.fromkeys(("T", "N", "K", "row_tiles", "token_tiles"), "i32")
for T, bits, dynamic in itertools.product((1, 700), (8, 4), (False, True)):
    x = "i8" if dynamic else "bf16"
    import torch
    tile = tiles.cut(T, N, K, 128, *quantized._shape(bits, torch.int8 if dynamic else torch.bfloat16))
    types = {"x": "*" + x, "factors": "*fp32", "codes": "*u8", "scales": "*bf16", "bias": "*bf16", "y": "*bf16"}
    types |= {"parts": "*fp32", "x_stride": "i32", "panel": "i32", "groups": "i32", **ints}
    shape = {"STEPS": K // 128 // tile.splits, "WHOLE": True, "BITS": bits, "GROUP": 128 if bits == 8 else 32}
    shape |= {"STEP": 128, "DYNAMIC": dynamic, "HAS_BIAS": True, "SPLIT": tile.splits > 1, "ROWS": tile.rows}
    code = ptx(quantized._product, types, {**shape, "TOKENS": tile.tokens, "NATIVE": True, "BAND": 8}, tile)
    print("wgmma" in code, T, bits, dynamic)
for T in (1, 700):
    tile = tiles.cut(T, N, K)
    types = {"x": "*fp8e4nv", "factors": "*fp32", "codes": "*fp8e4nv", "scales": "*fp32", "bias": "*bf16", "y": "*bf16"}
    shape = {"STEPS": K // 128 // tile.splits, "WHOLE": True, "STEP": 128, "HAS_BIAS": True, "SPLIT": tile.splits > 1}
    shape |= {"ROWS": tile.rows, "TOKENS": tile.tokens, "BAND": 8}
    print("wgmma" in ptx(fp8._product, {**types, "parts": "*fp32", **ints}, shape, tile), T, "fp8")
for T in (16, 8192):
    tile = grouped.cut(T, 64, 1536)
    types = {"x": "*bf16", "offsets": "*i32", "weight": "*bf16", "y": "*bf16", "N": "i32", "x_stride": "i32"}
    shape = {"K": 2048, "E": 64, "EXPERTS": 64, "ROWS": tile.rows, "TOKENS": tile.tokens, "CHANNELS": tile.channels}
    print("wgmma" in ptx(grouped._product, types, {**shape, "NATIVE": True}, tile), T, "grouped")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile_for_hopper_and_use_its_matrix_units():
    """No GPU is needed: Triton brings ptxas. Every variant at the shapes of an 8B model holds wgmma instructions."""
    whole = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=whole, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 12 and all(line.startswith("True") for line in lines), done.stdout


# ---- on a GPU ---------------------------------------------------------------------------------------------------

N, K = 4096, 14336


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm())


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bits, dynamic", [(8, False), (8, True), (4, False), (4, True)])
def test_native_products_at_real_shapes(bits: int, dynamic: bool, dtype: torch.dtype):
    """Oracle: the reference on the same device in float32. Law: rows of few tokens are their own, bit by bit."""
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(N, K, generator=g) / K**0.5
    codes, scales = (t.cuda() for t in quantized.quantize(weight, bits))
    x = torch.randn(700, K, generator=g).to(dtype).cuda()
    bias = torch.randn(N, generator=g).to(dtype).cuda()
    fn, most = triton.quantized_linear.fn, {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    want = QUANTIZED_LINEAR.reference(x.float(), codes, scales, bias.float(), N, dynamic, True)
    few = fn(x[:64], codes, scales, bias, N, dynamic)
    for M in (1, 3, 64, 700):
        got = fn(x[:M], codes, scales, bias, N, dynamic)
        assert off(got, want[:M]) < max(most, 2e-3 * dynamic), M
        assert off(fn(x[:M], codes, scales, bias, N, dynamic, True), want[:M]) < (2e-3 if dynamic else 1e-4), M
        assert M > 64 or torch.equal(got, few[:M])


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", [pytest.param(b, id=b.name) for b in BACKENDS["fp8_linear"][:2]])
def test_native_fp8_at_real_shapes(backend):
    """Oracle: the reference, whose sums are float32; sums of Hopper's own would be off by about 1e-3."""
    if why := backend.supports(torch.device("cuda"), torch.bfloat16):
        pytest.skip(why)
    g = torch.Generator().manual_seed(0)
    weight = fp8.quantize((torch.randn(N, K, generator=g) / K**0.5).cuda())
    x = torch.randn(700, K, generator=g).bfloat16().cuda()
    assert all(torch.equal(a, b) for a, b in zip(triton.round_rows(x), fp8.round_rows(x), strict=True))
    want = fp8.fp8_linear(x, *weight, None, N, True)
    for M in (1, 3, 64, 700):
        assert off(backend.fn(x[:M], *weight, None, N), want[:M]) < 4e-3, M
        if backend.name == "triton":
            assert off(backend.fn(x[:M], *weight, None, N, True), want[:M]) < 1e-3, M


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", [pytest.param(b, id=b.name) for b in BACKENDS["grouped_linear"][:2]])
@pytest.mark.parametrize("T", [16, 8192])
def test_native_experts_at_real_shapes(backend, T: int):
    """Oracle: the reference. 64 experts, some without tokens."""
    if why := backend.supports(torch.device("cuda"), torch.bfloat16):
        pytest.skip(why)
    g = torch.Generator().manual_seed(T)
    weight = (torch.randn(64, 1536, 2048, generator=g) / 2048**0.5).bfloat16().cuda()
    x = torch.randn(T, 2048, generator=g).bfloat16().cuda()
    expert = (torch.rand(T, generator=g) ** 2 * 60).long()
    offsets = torch.cat([torch.zeros(1), torch.bincount(expert, minlength=64).cumsum(0)]).int().cuda()
    assert off(backend.fn(x, offsets, weight), grouped.grouped_linear(x, offsets, weight)) < 4e-3


@on_gpu
@pytest.mark.gpu
def test_products_are_captured_and_replayed():
    """A CUDA graph holds every launch; new values in the same memory give what a call gives."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(N, 4096, generator=g) / 64
    codes, scales = (t.cuda() for t in quantized.quantize(weight, 4))
    x = torch.randn(3, 4096, generator=g).bfloat16().cuda()
    for dynamic in (False, True):
        arguments = (codes, scales, None, N, dynamic)
        triton.quantized_linear.fn(x, *arguments)  # compiled before capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = triton.quantized_linear.fn(x, *arguments)
        x.copy_(torch.randn(3, 4096, generator=g))
        graph.replay()
        assert torch.equal(y, triton.quantized_linear.fn(x, *arguments))
