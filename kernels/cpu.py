"""The native CPU backend: thin callers of the library that `native.py` builds from `csrc/`.

Attention in bfloat16 rounds the weights after softmax to bfloat16 where the processor multiplies pairs of them
(AVX512-BF16); their sum, and everything else between input and output, is float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnengine.kernels import native
from fnengine.kernels.attention import PAGED_ATTENTION
from fnengine.kernels.contract import Backend, Contract
from fnengine.kernels.grouped import GROUPED_TILES
from fnengine.kernels.layout import KVLayout, Lanes, Rounded, heads_of, shapes_of, shared
from fnengine.kernels.library import register
from fnengine.kernels.linear import LINEAR, PANEL, atom_of
from fnengine.kernels.memory import zeros
from fnengine.kernels.noise import GUMBEL_ARGMAX
from fnengine.kernels.pool import COPY_BLOCKS
from fnengine.kernels.quantized import QUANTIZED_LINEAR, bits_of, shapes
from fnengine.kernels.recording import bits, empty, invoke
from fnengine.kernels.recurrence import CAUSAL_CONV, GATED_SCAN
from fnengine.kernels.rope import ROPE_WRITE
from fnengine.kernels.routing import ARRANGE_EXPERTS, TOP_EXPERTS
from fnengine.kernels.truncation import APPLY_MASK, TRUNCATE

ELEMENT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""dtype -> the library that serves it."""
BLOCK = 16
"""Tokens of a block of the pool; the library is built for it."""
WIDEST = 512
"""Channels of a head whose products of 16 and 8 bits a sum of 32 bits holds."""


def parts(dtype: torch.dtype, quantized: bool = False, kv: str = "auto") -> tuple[str, ...]:
    """The native libraries that a process with this dtype loads; `quantized` weights and `kv` of 8 bits (`auto` or
    `int8`) have their own."""
    element = ELEMENT[dtype]
    more = [native.QUANTIZED[element]] * quantized + [native.KV8[element]] * (kv == "int8")
    return (element, native.COMMON, *more)


def _library(dtype: torch.dtype | None = None) -> ctypes.CDLL:
    return _part(native.COMMON if dtype is None else ELEMENT[dtype])


def _part(name: str) -> ctypes.CDLL:
    library = native.load(name).library
    assert library is not None, "the cpu backend was called without having been chosen"
    return library


def _packed(x: Tensor) -> Tensor:
    """x with contiguous heads and channels; its tokens may be strided, as in a slice of a fused projection."""
    C = x.shape[2]
    return x if x.stride(2) == 1 and (x.stride(1) == C or x.shape[1] == 1) else x.contiguous()


def _pools(k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[ctypes.CDLL, int, int, int]:
    """(library, N, K, C) of pools in the layout that the library is built for."""
    rounded = k.dtype == torch.int8
    library = native.load(native.KV8[ELEMENT[dtype]] if rounded else ELEMENT[dtype]).library
    assert library is not None, "the cpu backend was called without having been chosen"
    K, C = heads_of(k, v)
    layout = Rounded() if rounded else Lanes(library.fn_atom())
    assert (k.shape, v.shape) == shapes_of(layout, len(v), BLOCK, K, C, shared(v)), (k.shape, v.shape, layout)
    assert k.dtype == v.dtype == layout.element(dtype) and k.is_contiguous() and v.is_contiguous()
    assert not rounded or C <= WIDEST, f"{C} channels would overflow 32 bits"
    return library, len(v), K, C


def _int32(x: Tensor) -> Tensor:
    assert x.dtype == torch.int32, x.dtype
    return x.contiguous()


def _paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: Tensor,
    row: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    sink: Tensor | None,
) -> Tensor:
    library, N, K, C = _pools(k_pool, v_pool, q.dtype)
    assert sink is None or (sink.dtype == q.dtype and sink.is_contiguous())
    q, table, row, start, length = _packed(q), _int32(table), _int32(row), _int32(start), _int32(length)
    out = empty(q.shape, q.dtype)
    bad = invoke(
        library.fn_paged_attention,
        q.data_ptr(),
        k_pool.data_ptr(),
        None if shared(v_pool) else v_pool.data_ptr(),
        None if sink is None else sink.data_ptr(),
        out.data_ptr(),
        table.data_ptr(),
        row.data_ptr(),
        start.data_ptr(),
        length.data_ptr(),
        q.stride(0),
        row.shape[0],
        table.shape[0],
        table.shape[1],
        N,
        q.shape[1],
        K,
        C,
        bits(scale),
        window,
        bits(soft_cap),
        torch.get_num_threads(),
        checked=True,
    )
    assert not bad, f"a row, length or block is out of range: {row=} {start=} {length=} {N=}"
    return out


def _rope_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot: Tensor,
    eps: float,
) -> Tensor:
    assert cos.dtype == sin.dtype == torch.float32
    library, N, K, C = _pools(k_pool, v_pool, qkv.dtype)
    assert all(norm is None or (norm.dtype == qkv.dtype and norm.is_contiguous()) for norm in (q_norm, k_norm))
    T, W = cos.shape
    qkv, slot = (qkv if qkv.stride(1) == 1 else qkv.contiguous()), _int32(slot)
    cos, sin = cos.contiguous(), sin.contiguous()
    q = empty((T, qkv.shape[1] // C - (1 if shared(v_pool) else 2) * K, C), qkv.dtype)
    bad = invoke(
        library.fn_rope_write,
        qkv.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        k_pool.data_ptr(),
        None if shared(v_pool) else v_pool.data_ptr(),
        slot.data_ptr(),
        q.data_ptr(),
        qkv.stride(0),
        T,
        q.shape[1],
        K,
        C,
        W,
        N * BLOCK,
        bits(eps),
        torch.get_num_threads(),
        checked=True,
    )
    assert not bad, f"a slot is out of range or a head too wide: {slot=} {N=} {C=}"
    return q


def _copy_blocks(pools: list[Tensor], pairs: Tensor) -> None:
    if not pools:
        return
    assert all(p.is_contiguous() and p.shape[0] == pools[0].shape[0] for p in pools)
    pairs = _int32(pairs)
    n = len(pools)
    address = (ctypes.c_void_p * n)(*(p.data_ptr() for p in pools))
    size = (ctypes.c_int64 * n)(*(p.stride(0) * p.element_size() for p in pools))
    bad = _library().fn_copy_blocks(
        address, size, n, pairs.data_ptr(), pairs.shape[0], pools[0].shape[0], torch.get_num_threads()
    )
    assert not bad, f"a block is out of range: {pairs=}"


def _float32(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    assert x.dtype == torch.float32, x.dtype
    return x if x.stride(-1) == 1 else x.contiguous()


def _gumbel_argmax(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int, last: Tensor | None = None
) -> Tensor:
    assert seed.dtype == torch.int64, seed.dtype
    logits, temperature = _float32(logits), _float32(temperature)
    seed, position, last = seed.contiguous(), _int32(position), None if last is None else _int32(last)
    R, V = logits.shape
    token = torch.empty(R, dtype=torch.int32)
    _library().fn_gumbel_argmax(
        logits.data_ptr(),
        temperature.data_ptr(),
        seed.data_ptr(),
        position.data_ptr(),
        None if last is None else last.data_ptr(),
        token.data_ptr(),
        R,
        V,
        logits.stride(0),
        stream,
        torch.get_num_threads(),
    )
    return token


def _truncate(logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    logits, temperature, min_p, top_p = (_float32(x) for x in (logits, temperature, min_p, top_p))
    top_k = _int32(top_k)
    R, V = logits.shape
    last = torch.empty(R, dtype=torch.int32)
    _library().fn_truncate(
        logits.data_ptr(),
        temperature.data_ptr(),
        min_p.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        last.data_ptr(),
        R,
        V,
        logits.stride(0),
        torch.get_num_threads(),
    )
    return last


def _apply_mask(logits: Tensor, mask: Tensor) -> Tensor:
    logits, mask = _float32(logits), _int32(mask)
    R, V = logits.shape
    assert mask.shape == (R, -(-V // 32)), (mask.shape, logits.shape)
    out = torch.empty(R, V)
    _library().fn_apply_mask(
        logits.data_ptr(),
        mask.data_ptr(),
        out.data_ptr(),
        R,
        V,
        logits.stride(0),
        mask.shape[1],
        torch.get_num_threads(),
    )
    return out


def _linear(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, wide: bool = False) -> Tensor:
    P, atoms, _, atom = tiles.shape
    T, K = x.shape
    assert x.dtype == tiles.dtype and tiles.is_contiguous() and atoms == -(-K // atom) and -(-n // PANEL) == P
    if K % atom:
        x = F.pad(x, (0, -K % atom))
    elif x.stride(1) != 1 or x.stride(0) % atom:
        x = x.contiguous()
    y = empty((T, n), torch.float32 if wide else x.dtype)
    invoke(
        _library(x.dtype).fn_linear,
        x.data_ptr(),
        tiles.data_ptr(),
        None if bias is None else bias.contiguous().data_ptr(),
        y.data_ptr(),
        T,
        n,
        atoms * atom,
        x.stride(0),
        n,
        int(wide),
        torch.get_num_threads(),
    )
    return y


def _grouped_tiles(x: Tensor, offsets: Tensor, tiles: Tensor, bias: Tensor | None, n: int) -> Tensor:
    E, P, atoms, _, atom = tiles.shape
    T, K = x.shape
    assert x.dtype == tiles.dtype and tiles.is_contiguous() and atoms == -(-K // atom) and -(-n // PANEL) == P
    assert offsets.shape == (E + 1,) and (bias is None or bias.shape == (E, n))
    if K % atom:
        x = F.pad(x, (0, -K % atom))
    elif x.stride(1) != 1 or x.stride(0) % atom:
        x = x.contiguous()
    y = empty((T, n), x.dtype)
    invoke(
        _library(x.dtype).fn_grouped_tiles,
        x.data_ptr(),
        _int32(offsets).data_ptr(),
        tiles.data_ptr(),
        None if bias is None else bias.contiguous().data_ptr(),
        y.data_ptr(),
        E,
        n,
        atoms * atom,
        x.stride(0),
        n,
        torch.get_num_threads(),
    )
    return y


def _top_experts(score: Tensor, n: int) -> Tensor:
    score, (T, E) = _float32(score), score.shape
    assert n <= E, (n, E)
    best = empty((T, n), torch.int32)
    threads = torch.get_num_threads()
    invoke(_library().fn_top_experts, score.data_ptr(), best.data_ptr(), T, E, n, score.stride(0), threads)
    return best


def _arrange_experts(expert: Tensor, experts: int) -> Tensor:
    expert, S = _int32(expert), expert.shape[0]
    out = empty((experts + 1 + 2 * S,), torch.int32)
    bad = invoke(_library().fn_arrange_experts, expert.data_ptr(), out.data_ptr(), S, experts, checked=True)
    assert not bad, f"an expert is out of range: {expert=} {experts=}"
    return out


def _causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    heard: Tensor,
    row: Tensor,
    start: Tensor,
    length: Tensor,
    behind: Tensor,
    guessed: Tensor,
) -> Tensor:
    x, weight = _float32(x), _float32(weight).contiguous()
    X, taps = weight.shape
    assert x.shape[1] == X and tail.shape[1:] == (taps - 1, X) and tail.is_contiguous() and tail.dtype == torch.float32
    assert heard.shape[2] == X and heard.is_contiguous() and heard.dtype == torch.float32
    assert len(behind) == len(heard) <= len(tail)
    row, start, length, behind, guessed = (_int32(t) for t in (row, start, length, behind, guessed))
    y = empty(x.shape, torch.float32)
    bad = invoke(
        _library().fn_causal_conv,
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else _float32(bias).data_ptr(),
        tail.data_ptr(),
        heard.data_ptr(),
        row.data_ptr(),
        start.data_ptr(),
        length.data_ptr(),
        behind.data_ptr(),
        guessed.data_ptr(),
        y.data_ptr(),
        x.stride(0),
        row.shape[0],
        heard.shape[0],
        heard.shape[1],
        X,
        taps,
        torch.get_num_threads(),
        checked=True,
    )
    assert not bad, f"a row or its guesses are out of range, or {taps} taps are too many: {row=} {start=} {guessed=}"
    return y


def _gated_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    noted: Tensor,
    row: Tensor,
    start: Tensor,
    length: Tensor,
    behind: Tensor,
    guessed: Tensor,
) -> Tensor:
    (_, G, C), (T, H, P) = q.shape, v.shape
    assert k.shape == (T, G, C) and decay.shape == (T, H) and memory.shape[1:] == (H, C, P) and H % G == 0
    assert memory.is_contiguous() and memory.dtype == torch.float32
    q, k, v = (_packed(_float32(t)) for t in (q, k, v))
    decay = _float32(decay).contiguous()
    beta = None if beta is None else _float32(beta).contiguous()
    assert noted.shape[2] == G * C + H * P + H * (1 if beta is None else 2)
    assert noted.is_contiguous() and noted.dtype == torch.float32 and len(behind) == len(noted) <= len(memory)
    row, start, length, behind, guessed = (_int32(t) for t in (row, start, length, behind, guessed))
    out = empty(v.shape, torch.float32)
    bad = invoke(
        _library().fn_gated_scan,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        decay.data_ptr(),
        None if beta is None else beta.data_ptr(),
        memory.data_ptr(),
        noted.data_ptr(),
        row.data_ptr(),
        start.data_ptr(),
        length.data_ptr(),
        behind.data_ptr(),
        guessed.data_ptr(),
        out.data_ptr(),
        row.shape[0],
        noted.shape[0],
        noted.shape[1],
        noted.shape[2],
        G,
        H,
        C,
        P,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        torch.get_num_threads(),
        checked=True,
    )
    assert not bad, f"a row or its guesses are out of range, or keys of {C} channels are too wide: {row=} {start=}"
    return out


def tile(weight: Tensor) -> Tensor:
    """The same as `linear.tile` with this machine's atom, by the library."""
    atom = atom_of(weight.dtype)
    N, K = weight.shape
    if K % atom or weight.stride(1) != 1 or weight.stride(0) % atom:
        weight = F.pad(weight, (0, -K % atom)).contiguous()
        K = weight.shape[1]
    out = zeros((-(-N // PANEL), K // atom, PANEL, atom), weight.dtype)
    _library(weight.dtype).fn_tile(weight.data_ptr(), out.data_ptr(), N, K, weight.stride(0), torch.get_num_threads())
    return out


def _quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, n: int, dynamic: bool = False, wide: bool = False
) -> Tensor:
    T, K = x.shape
    bits = bits_of(codes)
    assert codes.is_contiguous() and scales.is_contiguous() and scales.dtype == torch.bfloat16
    assert (codes.shape, scales.shape) == shapes(n, K, bits), (codes.shape, scales.shape, n, K)
    x = x if x.stride(1) == 1 or K == 1 else x.contiguous()
    y = empty((T, n), torch.float32 if wide else x.dtype)
    invoke(
        _part(native.QUANTIZED[ELEMENT[x.dtype]]).fn_quantized_linear,
        x.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.contiguous().data_ptr(),
        y.data_ptr(),
        T,
        n,
        K,
        x.stride(0),
        n,
        bits,
        int(dynamic),
        int(wide),
        torch.get_num_threads(),
    )
    return y


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The same as `quantized.quantize`, by the library."""
    N, K = weight.shape
    weight = weight if weight.stride(1) == 1 or K == 1 else weight.contiguous()
    code_shape, scale_shape = shapes(N, K, bits)
    codes = zeros(code_shape, torch.uint8)
    scales = torch.empty(scale_shape, dtype=torch.bfloat16)
    _part(native.QUANTIZED[ELEMENT[weight.dtype]]).fn_quantize(
        weight.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        N,
        K,
        weight.stride(0),
        bits,
        torch.get_num_threads(),
    )
    return codes, scales


def unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why native code cannot serve a device and a dtype, or None; whether it can be built is another question."""
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if dtype not in ELEMENT:
        return f"has no {dtype}"
    return None


def _of_element(device: torch.device, dtype: torch.dtype) -> str | None:
    return unfit(device, dtype) or _missing(ELEMENT[dtype])


def _of_none(device: torch.device, dtype: torch.dtype) -> str | None:
    return unfit(device, dtype) or _missing(native.COMMON)


def _of_quantized(device: torch.device, dtype: torch.dtype) -> str | None:
    return unfit(device, dtype) or _missing(native.QUANTIZED[ELEMENT[dtype]])


def _missing(part: str) -> str | None:
    found = native.load(part)
    return None if found.library is not None else found.reason


def _layout(dtype: torch.dtype, kind: str) -> KVLayout:
    return Rounded() if kind == "int8" else Lanes(atom_of(dtype))


def expected_layout(dtype: torch.dtype, kind: str) -> KVLayout:
    """How KV will lie in the pool once the library is built, without building it.

    Raises:
        BuildFailed: there is no compiler.
    """
    if kind == "int8":
        return Rounded()
    return Lanes(native.expected_atom(native.find_compiler(), native.host_isa(), ELEMENT[dtype]))


def _fp8(device: torch.device, kind: str) -> str | None:
    return "no kernels for KV in fp8; int8 is KV of 8 bits on CPUs" if kind == "fp8" else None


def _backend(op: Contract, fn: Callable[..., Any], supports: Callable[..., str | None]) -> Backend:
    def note(dtype: torch.dtype) -> str:
        return native.load(native.COMMON if supports is _of_none else ELEMENT[dtype]).reason

    backend = Backend("cpu", op, register(op.name, "cpu", fn, key="CPU"), supports, True, note, _layout)
    return replace(backend, refuses=_fp8) if op in (PAGED_ATTENTION, ROPE_WRITE) else backend


paged_attention = _backend(PAGED_ATTENTION, _paged_attention, _of_element)
linear = _backend(LINEAR, _linear, _of_element)
grouped_tiles = _backend(GROUPED_TILES, _grouped_tiles, _of_element)
top_experts = _backend(TOP_EXPERTS, _top_experts, _of_none)
arrange_experts = _backend(ARRANGE_EXPERTS, _arrange_experts, _of_none)
quantized_linear = _backend(QUANTIZED_LINEAR, _quantized_linear, _of_quantized)
rope_write = _backend(ROPE_WRITE, _rope_write, _of_element)
copy_blocks = _backend(COPY_BLOCKS, _copy_blocks, _of_none)
gumbel_argmax = _backend(GUMBEL_ARGMAX, _gumbel_argmax, _of_none)
truncate = _backend(TRUNCATE, _truncate, _of_none)
apply_mask = _backend(APPLY_MASK, _apply_mask, _of_none)
causal_conv = _backend(CAUSAL_CONV, _causal_conv, _of_none)
gated_scan = _backend(GATED_SCAN, _gated_scan, _of_none)
