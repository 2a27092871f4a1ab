"""Weights of 8 and 4 bits. Oracles: what rounding promises, the product in float64, the plain-torch layout, laws (a
row's result is its own), bytes planned from shapes, the model with whole weights."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from fnengine import checkpoint, cli, kernels, leaves, model, params, tree
from fnengine.cli import refused
from fnengine.cli.flags import QUANTIZATIONS, read_quantization
from fnengine.cli.start import load_model
from fnengine.config import resolve
from fnengine.errors import ConfigError
from fnengine.kernels import cpu, fp8, quantized
from fnengine.runtime import Runtime
from tests.models import threads, tiny_folder

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1), (31, 9), (33, 37), (64, 256), (70, 300), (131, 128))


def needs_native(dtype: torch.dtype = torch.float32) -> None:
    if why := cpu.quantized_linear.supports(CPU, dtype):
        pytest.skip(why)


def random_weight(N: int, K: int) -> torch.Tensor:
    """Normal, with a column of zeros, a row of zeros and one large value."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(N * 1000 + K)) * 0.02
    w[0, K // 2] = 0.5
    w[N // 2] = 0
    w[:, K // 3] = 0
    return w


@pytest.mark.parametrize("N, K", SIZES)
def test_eight_bits_err_by_at_most_half_a_scale(N: int, K: int):
    """Law: |w - dequantized| <= scale / 2, with the scale of w's group, and a scale is no larger than it has to be."""
    w = random_weight(N, K)
    codes, scales = quantized.quantize(w, 8)
    each = scales.float().transpose(1, 2).flatten(0, 1)[:N].repeat_interleave(quantized.GROUP[8], 1)[:, :K]
    error = (w - quantized.dequantize(codes, scales, N, K)).abs()
    assert (error <= each / 2 * (1 + 1e-5)).all()
    assert (each <= w.abs().max() / 127 * (1 + 2**-6)).all()


@pytest.mark.parametrize("N, K", SIZES)
def test_four_bits_take_the_nearest_code(N: int, K: int):
    """Law: no other code of the same scale is nearer to w; and trying scales is never worse than the first one."""
    w = random_weight(N, K)
    codes, scales = quantized.quantize(w, 4)
    got = quantized.dequantize(codes, scales, N, K)
    G = quantized.GROUP[4]
    each = scales.float().transpose(1, 2).flatten(0, 1)[:N].repeat_interleave(G, 1)[:, :K]
    others = each[..., None] * torch.tensor(quantized.CODES).float()
    assert torch.allclose((w - got).abs(), (w[..., None] - others).abs().amin(-1), rtol=1e-5, atol=1e-9)
    for begin in range(0, K, G):
        group = w[:, begin : begin + G]
        largest = group.gather(1, group.abs().argmax(1, keepdim=True))
        first = (largest / quantized.CODES[0]).bfloat16().float()
        choices = first[..., None] * torch.tensor(quantized.CODES).float()
        plain = (group[..., None] - choices).abs().amin(-1).square().sum(1)
        assert ((group - got[:, begin : begin + G]).square().sum(1) <= plain * (1 + 1e-5) + 1e-12).all()


def test_a_normal_weight_keeps_so_much():
    """Relative error of a normal weight: about 0.65 % and 7.6 % (a uniform 4-bit grid with one scale to 32: 8.6 %)."""
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    for bits, most in ((8, 0.0068), (4, 0.0775)):
        error = quantized.dequantize(*quantized.quantize(w, bits), 256, 1024) - w
        assert 0.9 * most < float(error.norm() / w.norm()) < most


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("N, K", SIZES)
def test_the_library_makes_the_same_codes(N: int, K: int, dtype: torch.dtype, bits: int):
    """Oracle: plain torch, to the last bit, for contiguous, transposed and strided weights."""
    needs_native(dtype)
    w = random_weight(N, K).to(dtype)
    want = quantized.quantize(w, bits)
    wide = torch.cat([w, torch.ones(N, 3, dtype=dtype)], 1)
    for form in (w, w.T.contiguous().T, wide[:, :K]):
        got = cpu.quantize(form, bits)
        assert got[0].shape, got[1].shape == quantized.shapes(N, K, bits)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def products_agree_with_float64(dtype: torch.dtype) -> None:
    """To the rounding of 16-bit rows and of the result; with rows of 8 bits, of the rows rounded so beforehand (a value
    half way between two integers may go either way)."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    g = torch.Generator().manual_seed(1)
    for N, K in SIZES:
        for bits in (8, 4):
            codes, scales = quantized.quantize(random_weight(N, K) * 30, bits)
            bias = torch.randn(N, generator=g).to(dtype)
            for T in (1, 2, 3, 7, 12, 29):
                x = torch.randn(T, K, generator=g).to(dtype)
                x[:, : K // 2] *= 100  # a span's values differ much in size
                want = x.double() @ quantized.dequantize(codes, scales, N, K).double().T + bias.double()
                got = cpu.quantized_linear.fn(x, codes, scales, bias, N)
                assert float((got.double() - want).norm() / want.norm()) < tolerance, (N, K, bits, T)
                wide = cpu.quantized_linear.fn(x, codes, scales, bias, N, False, True)
                assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), got)
                rounded = quantized.round_rows(x, 8, quantized.GROUP[bits]).double()
                want = rounded @ quantized.dequantize(codes, scales, N, K).double().T + bias.double()
                got = cpu.quantized_linear.fn(x, codes, scales, bias, N, True)
                off = float((got.double() - want).norm() / want.norm())
                assert off < max(tolerance, 2e-3), (N, K, bits, T, off)


@pytest.mark.parametrize("bits", [8, 4])
def test_sums_of_the_largest_integers_do_not_overflow(bits: int):
    """Hand-worked: weights and rows all at their largest value, of one sign; a group then holds the largest sum that
    there can be, and integers stand for both exactly."""
    needs_native()
    for sign in (1.0, -1.0):
        codes, scales = quantized.quantize(torch.full((40, 256), -127.0), bits)
        x = torch.full((3, 256), sign * 32767.0)
        for dynamic in (False, True):
            y = cpu.quantized_linear.fn(x, codes, scales, None, 40, dynamic)
            torch.testing.assert_close(y, torch.full((3, 40), -127.0 * sign * 32767.0 * 256), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_products_equal_float64(dtype: torch.dtype):
    needs_native(dtype)
    products_agree_with_float64(dtype)


def rows_are_their_own(dtype: torch.dtype) -> None:
    """Law: a row of x gives the same bits whatever rows stand beside it and however many threads work."""
    g = torch.Generator().manual_seed(0)
    N, K = 100, 514
    for bits, dynamic in itertools.product((8, 4), (False, True)):
        leaf = cpu.quantize(torch.randn(N, K, generator=g).to(dtype), bits)
        x, bias = torch.randn(50, K, generator=g).to(dtype), torch.randn(N, generator=g).to(dtype)
        alone = torch.cat([cpu.quantized_linear.fn(row, *leaf, bias, N, dynamic) for row in x.split(1)])
        for n in (1, 2, 3):
            with threads(n):
                for T in (2, 3, 4, 5, 8, 9, 12, 13, 16, 20, 24, 25, 36, 50):
                    for some, want in ((x[:T], alone[:T]), (x[-T:], alone[-T:])):
                        got = cpu.quantized_linear.fn(some, *leaf, bias, N, dynamic)
                        assert torch.equal(got, want), (bits, dynamic, T, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_rows_of_a_product_are_their_own(dtype: torch.dtype):
    needs_native(dtype)
    rows_are_their_own(dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(bits: int, value: float, dynamic: bool):
    """Law: an undefined channel makes its own row undefined and no other; a row of zeros gives the bias."""
    needs_native()
    codes, scales = quantized.quantize(random_weight(40, 300), bits)
    x = torch.randn(3, 300)
    x[1, 200], x[2] = value, 0
    y = cpu.quantized_linear.fn(x, codes, scales, torch.ones(40), 40, dynamic)
    rows = [r for r in range(40) if float(quantized.dequantize(codes, scales, 40, 300)[r].abs().max()) > 0]
    assert y[1, rows].isnan().all() and y[0].isfinite().all() and torch.equal(y[2], torch.ones(40))


# Leaves and models


@pytest.mark.parametrize("kind", leaves.QUANTIZED)
def test_rows_can_be_looked_up(kind: str):
    """Oracle: the dequantized weight, in the model's dtype."""
    how = leaves.quantizing(CPU, torch.bfloat16, kind)
    leaf = how.place(leaves.Dense(random_weight(131, 72).bfloat16()))
    assert isinstance(leaf, leaves.Quantized) and how.indexable
    ids = torch.tensor([130, 0, 31, 32, 0], dtype=torch.int32)
    want = quantized.dequantize(leaf.codes, leaf.scales, 131, 72).bfloat16()[ids.long()]
    assert torch.equal(leaves.lookup(leaf, ids), want)


@pytest.mark.parametrize("name", ["qwen3", "llama2", "qwen2"])
@pytest.mark.parametrize("kind", leaves.QUANTIZED)
def test_memory_plan_equals_what_is_held(name: str, kind: str):
    """Bytes planned from shapes are the bytes of the loaded tree; a head, tied or not, has 8 bits."""
    how = leaves.quantizing(CPU, torch.bfloat16, kind)
    spec = checkpoint.read_spec(tiny_folder(name))
    loaded = checkpoint.load(tiny_folder(name), spec, torch.bfloat16, CPU, how)
    held = 0
    for _, leaf in tree.items(loaded, stop=leaves.KINDS):
        held += leaf.nbytes if isinstance(leaf, torch.Tensor) else leaves.weight_bytes(leaf)
    plan = params.memory_plan(spec, torch.bfloat16, how)
    assert plan.weights == held and plan.packed_head == 0 and plan.peak > plan.weights
    head = loaded["embed" if spec.tied else "head"]
    assert isinstance(head, leaves.Quantized) and quantized.bits_of(head.codes) == 8
    assert isinstance(loaded["embed"], leaves.Quantized if spec.tied else leaves.Dense)
    assert quantized.bits_of(loaded["layers"][0]["qkv"].codes) == leaves.QUANTIZED[kind]


def dense(path: str, leaf: Any) -> Any:
    """A leaf with the weight that its codes stand for."""
    if not isinstance(leaf, leaves.Quantized):
        return leaf
    return leaves.Dense(quantized.dequantize(leaf.codes, leaf.scales, *leaf.shape), leaf.bias)


@pytest.mark.parametrize("kind, most", [("int8", 0.1), ("int4", 0.5), ("int8-dynamic", 0.1), ("int4-dynamic", 0.5)])
@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_a_model_runs_with_the_logits_of_its_rounded_weights(name: str, kind: str, most: float):
    """Logits are those of a dense model with the rounded weights (but for rows rounded to 8 bits), near those of whole
    weights (these tiny models have large random ones), and equal whatever chunks the prompt came in; a greedy loop
    runs."""
    folder = tiny_folder(name)
    loaded = model.load(folder, dtype="float32", device="cpu", quantization=kind)
    assert any(kind in note for note in loaded.notes)
    rt = Runtime(loaded)
    prompt = [3, 14, 15, 92, 65, 35, 8, 97]
    seq, got = rt.extend(rt.empty, prompt)
    whole = Runtime(model.load(folder, dtype="float32", device="cpu"))
    same = Runtime(dataclasses.replace(loaded, params=tree.map_with_path(dense, loaded.params, stop=leaves.KINDS)))
    for other, least, bound in ((same, 0, 0.05 if "dynamic" in kind else 1e-3), (whole, 1e-3, most)):
        _, want = other.extend(other.empty, prompt)
        assert least <= float((got - want).norm() / want.norm()) < bound
    if cpu.quantized_linear.supports(CPU, torch.float32) is None:
        part, _ = rt.extend(rt.empty, prompt[:3])
        assert torch.equal(rt.extend(part, prompt[3:])[1], got)
    for _ in range(5):
        seq, got = rt.extend(seq, [int(got.argmax())])
    assert len(seq) == len(prompt) + 5


def test_without_the_library_plain_torch_serves(monkeypatch):
    """The reference decodes at every call: the same products, and the note says that it is slow."""
    x, dense = torch.randn(3, 37), leaves.Dense(random_weight(33, 37))
    fast = leaves.matmul(leaves.quantize_leaf(dense, 4, False), x)
    reason = "no C++ compiler found"
    monkeypatch.setattr(leaves.kernels.native, "load", lambda part: leaves.kernels.native.Native(None, reason))
    leaves._quantized_linear.cache_clear()
    try:
        how = leaves.quantizing(CPU, torch.float32, "int4")
        assert "slow" in how.reason and reason in how.reason
        torch.testing.assert_close(leaves.matmul(how.place(dense), x), fast, rtol=2e-4, atol=2e-4)
    finally:
        leaves._quantized_linear.cache_clear()


@pytest.mark.parametrize("kind", ["awq", "gptq", "fp4", "", "INT8"])
def test_other_kinds_are_refused(kind: str):
    """By the library and by the command line, each saying what there is."""
    with pytest.raises(ConfigError, match="int8"):
        model.load(tiny_folder("llama2"), device="cpu", quantization=kind)
    with pytest.raises(ValueError, match="int8"):
        read_quantization(kind)


def test_the_flag_knows_every_kind():
    assert ("none", *leaves.ROUNDED) == QUANTIZATIONS


def test_the_flag_reaches_the_model():
    """By both of its names, and told in the table of options."""
    for words in (["--quantization", "int4"], ["-q", "int4"], ["--quantization=int4"]):
        options = resolve(cli.parser().parse_args(refused.refuse(["complete", *words, "hello"])))
        assert options.model.quantization == "int4"
        assert load_model(options.model).params["layers"][0]["qkv"].codes.dtype == torch.uint8


def test_other_devices_are_refused():
    with pytest.raises(ConfigError, match="cpu and cuda only, not on mps"):
        leaves.packing(torch.device("mps"), torch.bfloat16, "int8")
    assert leaves.packing(torch.device("cuda"), torch.bfloat16, "none").kind == "dense"


def test_integers_are_for_gpus_too():
    """By Triton where it is installed, else slowly and saying so; no GPU need be there to plan for one."""
    how = leaves.packing(torch.device("cuda"), torch.bfloat16, "int4")
    assert how.kind == "int4"
    assert ("by Triton" if kernels.triton.installed() else "slow") in how.reason


# 8-bit floats


def test_fp8_is_refused_where_nothing_multiplies_it():
    """The message says why, and what to use instead; so does the command line's."""
    with pytest.raises(ConfigError, match=r"not possible on cpu(.|\n)*int8"):
        leaves.packing(CPU, torch.bfloat16, "fp8")
    with pytest.raises(ConfigError, match="int8"):
        model.load(tiny_folder("llama2"), device="cpu", quantization="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            leaves.packing(torch.device("cuda"), torch.bfloat16, "fp8")
    assert read_quantization("fp8") == "fp8"


@pytest.mark.parametrize("N, K", SIZES)
def test_floats_of_8_bits_err_by_at_most_a_sixteenth(N: int, K: int):
    """Law: 3 bits of mantissa round to within 2^-4 of a value, or half of the smallest step, 2^-10 of a row's scale."""
    w = random_weight(N, K)
    codes, scales = fp8.quantize(w)
    assert (codes.shape, scales.shape) == fp8.shapes(N, K)
    got = fp8.dequantize(codes, scales, N, K)
    assert ((w - got).abs() <= (w.abs() / 16 + scales[:N, None] * 2**-10) * (1 + 1e-5)).all()
    assert int(codes[N:].count_nonzero()) == 0 and int(codes[:, K:].count_nonzero()) == 0
    largest = w.abs().amax(1)
    torch.testing.assert_close(got.abs().amax(1), largest, rtol=1e-6, atol=1e-30)


def test_a_leaf_of_fp8_multiplies_and_is_looked_up():
    """Oracle: float64 with the rounded weight and rows, and the dequantized rows; bytes are those planned."""
    w, x = random_weight(33, 72), torch.randn(5, 72)
    how = leaves.Packing("fp8", "for the test")
    leaf = how.place(leaves.Dense(w, torch.ones(33)))
    assert isinstance(leaf, leaves.Fp8) and leaves.weight_bytes(leaf) == how.nbytes(33, 72, torch.float32) + 33 * 4
    meta = how.place(leaves.Dense(w.to("meta"), None))
    assert isinstance(meta, leaves.Fp8) and (meta.codes.shape, meta.scales.shape) == (
        leaf.codes.shape,
        leaf.scales.shape,
    )
    rows, factor = fp8.round_rows(x)
    rounded = rows[:, :72].view(fp8.FP8).double() * factor[:, None].double()
    want = rounded @ fp8.dequantize(leaf.codes, leaf.scales, 33, 72).double().T + 1
    torch.testing.assert_close(leaves.matmul(leaf, x).double(), want, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([32, 0, 0, 7], dtype=torch.int32)
    assert torch.equal(leaves.lookup(leaf, ids), fp8.dequantize(leaf.codes, leaf.scales, 33, 72)[ids.long()])
    assert how.ends.kind == "int8"


def test_a_model_of_fp8_is_near_the_whole_one():
    """Through the plain-torch reference, as no CPU is asked to multiply it otherwise: logits near those of whole
    weights and not equal to them, and the planned bytes are held."""
    folder, how = tiny_folder("llama2"), leaves.Packing("fp8", "for the test")
    whole = model.load(folder, dtype="float32", device="cpu")
    loaded = checkpoint.load(folder, whole.spec, torch.float32, CPU, how)
    held = sum(
        leaf.nbytes if isinstance(leaf, torch.Tensor) else leaves.weight_bytes(leaf)
        for _, leaf in tree.items(loaded, stop=leaves.KINDS)
    )
    assert params.memory_plan(whole.spec, torch.float32, how).weights == held
    assert isinstance(loaded["layers"][0]["qkv"], leaves.Fp8) and not isinstance(loaded["head"], leaves.Fp8)
    rt, same = (Runtime(m, enforce_eager=True) for m in (dataclasses.replace(whole, params=loaded), whole))
    prompt = [3, 14, 15, 92, 65, 35, 8, 97]
    got, want = rt.extend(rt.empty, prompt)[1], same.extend(same.empty, prompt)[1]
    assert 1e-3 < float((got - want).norm() / want.norm()) < 0.3
