"""Ops against their contracts, over backends and dtypes. Oracles: dense attention in float64, published Philox vectors,
the contracts' references, and laws (a row's result is its own). Mutants at the end of each part must be caught."""

from __future__ import annotations

import copy
import ctypes
import itertools
import logging
import math
import platform
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fnengine.environment import cache_dir
from fnengine.kernels import (
    BACKENDS,
    Backend,
    attention,
    choose,
    cpu,
    describe,
    linear,
    memory,
    native,
    noise,
    ops,
    philox,
    reference,
    triton,
)
from fnengine.kernels.checking import POOLS as KV
from fnengine.kernels.checking import canonical, disagreement
from fnengine.kernels.layout import Lanes
from fnengine.kernels.rope import ROPE_WRITE
from tests import test_kv8, test_latent, test_quantized

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_this_machine(name: str, invariant: bool = False) -> list:
    """Backends of an op that this machine's CPU supports; with `invariant` those that claim to be."""
    fit = [b for b in BACKENDS[name] if b.supports(CPU, torch.float32) is None]
    return [pytest.param(b, id=b.name) for b in fit if b.invariant or not invariant]


def every_backend() -> list:
    return [pytest.param(b, id=f"{n}-{b.name}") for n, bs in BACKENDS.items() for b in bs]


def every_backend_and_dtype() -> list:
    return [
        pytest.param(b, dtype, id=f"{n}-{b.name}-{str(dtype)[6:]}")
        for n, bs in BACKENDS.items()
        for b in bs
        for dtype in b.op.tolerance
    ]


def needs(b: Backend, dtype: torch.dtype = torch.float32) -> None:
    """Skips where the backend can run neither on this machine's CPU nor in an interpreter."""
    if b.supports(CPU, dtype) and (why := b.interpreted(CPU, dtype) if b.interpreted else b.supports(CPU, dtype)):
        pytest.skip(why)


# ---- contracts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, dtype", every_backend_and_dtype())
def test_backend_equals_reference_in_float32(backend: Backend, dtype: torch.dtype):
    needs(backend, dtype)
    seeds = (0, 1) if backend.supports(CPU, dtype) is None else (0,)  # an interpreter is slow
    assert disagreement(backend, dtype, seeds=seeds) is None


@pytest.mark.parametrize("backend", every_backend())
def test_registered_schema_tells_the_truth(backend: Backend):
    """Mutation, aliasing and shapes as declared, checked by torch itself."""
    needs(backend)
    examples = list(backend.op.examples(torch.float32, 3))
    for example in examples if backend.supports(CPU, torch.float32) is None else examples[:2]:  # interpreters are slow
        if pools := [name for name in example if name in KV]:
            k, v = (example[name] for name in pools)
            example |= dict(zip(pools, backend.kv(torch.float32, "auto").pack(k, v), strict=True))
        torch.library.opcheck(backend.fn, tuple(example.values()), test_utils=("test_schema", "test_faketensor"))


def test_ops_survive_tracing_in_one_graph():
    """A function over `Ops` traces without a break and gives what it gives eagerly."""
    o = ops(CPU, torch.float32)
    example = list(attention.PAGED_ATTENTION.examples(torch.float32, 5))[1]

    def step(q, k, v, table, row, start, length, qkv, angle, slot):
        o.rope_write(qkv, None, None, angle, angle, k, v, slot, 0.0)
        return o.paged_attention(q, k, v, table, row, start, length, 0.125, 0, 0.0, None) * 2

    q, k, v, table, row, start, length = list(example.values())[:7]
    K, C = k.shape[2:]
    k, v = o.kv.pack(k, v)
    slot = torch.tensor([17, 18, 40], dtype=torch.int32)
    extra = (torch.randn(3, 4 * K * C), torch.randn(3, C // 2), slot)
    arguments = (q, k, v, table, row, start, length, *extra)
    a, b = copy.deepcopy(arguments), copy.deepcopy(arguments)
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(*a), step(*b))
    assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


# ---- attention --------------------------------------------------------------------------------------------------


def dense(q, k, v, table, row, start, length, scale, window, soft_cap, sink):
    """Attention one query and head at a time in float64, straight from the definition."""
    T, H, C = q.shape
    B, K = k.shape[1:3]
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out = np.zeros((T, H, C))
    for r in range(len(length)):
        p = np.arange(int(length[r]))
        keys, values = (x[table[row[r]].numpy()[p // B], p % B].reshape(-1, K, C) for x in (k, v))
        for t in range(int(start[r]), int(start[r + 1])):
            at = int(length[r]) - (int(start[r + 1]) - t)
            first = max(0, at - window + 1) if window else 0
            for h in range(H):
                score = keys[first : at + 1, h // (H // K)] @ q[t, h] * scale
                if soft_cap:
                    score = soft_cap * np.tanh(score / soft_cap)
                weight = np.exp(score)
                total = weight.sum() + (0 if sink is None else math.exp(float(sink[h])))
                out[t, h] = weight / total @ values[first : at + 1, h // (H // K)]
    return torch.tensor(out)


def small_examples() -> list[dict]:
    return list(attention.PAGED_ATTENTION.examples(torch.float32, 11))


@cache
def dense_answers() -> list[torch.Tensor]:
    return [dense(*e.values()) for e in small_examples()]


def agrees_with_dense(fn, first: int | None = None) -> bool:
    pairs = list(zip(small_examples(), dense_answers(), strict=True))[:first]
    return all(torch.allclose(fn(**e).double(), want, rtol=1e-5, atol=1e-5) for e, want in pairs)


@pytest.mark.parametrize("backend", on_this_machine("paged_attention"))
def test_attention_equals_dense_float64(backend: Backend):
    assert agrees_with_dense(lambda **e: canonical(backend)(*e.values()))


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(lambda e: e | {"window": 0}, id="ignores the window"),
        pytest.param(lambda e: e | {"soft_cap": 0.0}, id="caps no scores"),
        pytest.param(lambda e: e | {"sink_H": None}, id="has no sinks"),
        pytest.param(lambda e: e | {"window": e["window"] and e["window"] + 1}, id="window is one too wide"),
        pytest.param(lambda e: e | {"row_R": e["row_R"].roll(1)}, id="takes another row's table"),
        pytest.param(lambda e: e | {"k_NBKC": e["k_NBKC"].flip(2)}, id="groups heads the other way round"),
        pytest.param(lambda e: e | {"length_R": (e["length_R"] + 1)}, id="is off by one position"),
    ],
)
def test_dense_oracle_catches_an_attention_that(mutate):
    assert not agrees_with_dense(lambda **e: attention.paged_attention(**mutate(e)))


def one_query(e: dict, r: int, t: int) -> dict:
    """The example reduced to query t of batch row r, as a decode step would have asked it."""
    end = int(e["start_R1"][r + 1])
    return e | {
        "q_THC": e["q_THC"][t : t + 1].clone(),
        "row_R": e["row_R"][r : r + 1],
        "start_R1": torch.tensor([0, 1], dtype=torch.int32),
        "length_R": e["length_R"][r : r + 1] - (end - t - 1),
    }


def moved(e: dict, seed: int) -> dict:
    """The example with its blocks laid out elsewhere in the pool."""
    N = e["k_NBKC"].shape[0]
    to = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(N - 1, generator=torch.manual_seed(seed)) + 1])
    k, v = torch.empty_like(e["k_NBKC"]), torch.empty_like(e["v_NBKC"])
    k[to], v[to] = e["k_NBKC"], e["v_NBKC"]
    return e | {"k_NBKC": k, "v_NBKC": v, "table_MP": to[e["table_MP"].long()].int()}


def long_examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    """Rows with one KV head that cross borders of parts of KV, which lie at multiples of 512 tokens; fewer than three
    items of work each, and enough of it to be shared out."""
    g = torch.Generator().manual_seed(seed)
    cases = (  # H, C, window, soft cap, sinks, shared tokens, [(new tokens, length)]
        (4, 64, 0, 0.0, False, 0, [(1, 1100)]),
        (4, 64, 0, 1.5, True, 0, [(4, 1026), (1, 513)]),
        (4, 64, 700, 0.0, True, 0, [(3, 1500)]),
        (4, 64, 8, 0.0, False, 0, [(20, 530)]),  # later queries of the item do not see the first part
        (8, 20, 0, 0.0, True, 0, [(20, 530)]),
        (4, 64, 0, 0.0, True, 560, [(1, 1100), (2, 900)]),  # a part goes on behind what is shared
        (4, 64, 0, 0.0, False, 1024, [(1, 1100), (1, 1089)]),
        (4, 64, 0, 0.0, False, 448, [(1, 1100), (2, 452)]),
        (32, 128, 0, 0.0, True, 0, [(4, 5700)]),  # sums of all parts are more than there is room for
    )
    for H, C, window, soft_cap, sinks, shared, rows in cases:
        P = -(-max(n for _, n in rows) // 16)
        table = (torch.randperm(len(rows) * P, generator=g) + 1).int().view(len(rows), P)
        table[:, : shared // 16] = table[0, : shared // 16]
        new = [n for n, _ in rows]
        pool = torch.randn(2, len(rows) * P + 1, 16, 1, C, generator=g).to(dtype)
        yield {
            "q_THC": torch.randn(sum(new), H, C, generator=g).to(dtype),
            "k_NBKC": pool[0],
            "v_NBKC": pool[1],
            "table_MP": table,
            "row_R": torch.arange(len(rows)).int(),
            "start_R1": torch.tensor([0, *new]).cumsum(0).int(),
            "length_R": torch.tensor([n for _, n in rows]).int(),
            "scale": C**-0.5,
            "window": window,
            "soft_cap": soft_cap,
            "sink_H": torch.randn(H, generator=g).to(dtype) if sinks else None,
        }


Examples = Callable[[torch.dtype, int], Iterator[dict[str, Any]]]


def first_variation(fn, dtype: torch.dtype, examples: Examples = attention.PAGED_ATTENTION.examples) -> str | None:
    """Where a query's bits depend on its company: whole batch against the query alone, moved blocks, other threads."""
    threads = torch.get_num_threads()
    for n, e in enumerate(examples(dtype, 21)):
        whole = fn(**e)
        if not torch.equal(fn(**moved(e, n)), whole):
            return f"example {n}: blocks moved"
        try:
            for other in {1, 2, 3} - {threads}:
                torch.set_num_threads(other)
                if not torch.equal(fn(**e), whole):
                    return f"example {n}: number of threads"
        finally:
            torch.set_num_threads(threads)
        start = e["start_R1"].tolist()
        for r in range(len(start) - 1):
            for t in {start[r], (start[r] + start[r + 1]) // 2, start[r + 1] - 1} if start[r + 1] > start[r] else ():
                if not torch.equal(fn(**one_query(e, r, t))[0], whole[t]):
                    return f"example {n}: row {r}, query {t} alone"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", on_this_machine("paged_attention", invariant=True))
def test_a_query_has_the_same_bits_in_any_company(backend: Backend, dtype: torch.dtype):
    assert first_variation(lambda **e: canonical(backend)(*e.values()), dtype) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", on_this_machine("paged_attention", invariant=True))
def test_a_query_of_a_long_row_has_the_same_bits_in_any_company(backend: Backend, dtype: torch.dtype):
    """On 1, 2 and 3 threads: with 1 a row is read in one go, with more its parts are shared out where that helps."""
    needs(backend, dtype)
    assert first_variation(lambda **e: canonical(backend)(*e.values()), dtype, long_examples) is None


@cache
def long_dense_answers() -> list[torch.Tensor]:
    return [dense(*e.values()) for e in long_examples(torch.float32, 11)]


@pytest.mark.parametrize("backend", on_this_machine("paged_attention"))
def test_attention_over_long_rows_equals_dense_float64(backend: Backend):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for e, want in zip(long_examples(torch.float32, 11), long_dense_answers(), strict=True):
                got = canonical(backend)(*e.values())
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


FORK = ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@pytest.mark.parametrize(
    "H, K, rows, threads, asked",
    [
        pytest.param(4, 1, [(1, 8192)], 2, 2, id="one row and KV head"),
        pytest.param(16, 8, [(1, 2048)], 16, 16, id="fewer KV heads than threads"),
        pytest.param(4, 1, [(1, 500)], 2, 1, id="a row of one part is one piece of work"),
        pytest.param(32, 1, [(3, 8192)], 16, 16, id="more sums than there is room for"),
    ],
)
def test_as_many_threads_are_asked_for_as_there_are_parts(H, K, rows, threads, asked):
    """Oracle: what the library asks its OpenMP runtime for, and one thread's answer. The runtime here is a single
    thread that does the work of all, so that it may be asked for more than this machine has."""
    needs(cpu.paged_attention)
    g = torch.Generator().manual_seed(0)
    P, C = rows[0][1] // 16 + 1, 128
    q, pool = torch.randn(rows[0][0], H, C, generator=g), torch.randn(2, P + 1, 16, K, C, generator=g)
    k, v = cpu.paged_attention.kv(torch.float32, "auto").pack(*pool)
    where = (torch.arange(1, P + 1).int()[None], torch.zeros(1).int(), torch.tensor([0, rows[0][0]]).int())
    arguments = (q, k, v, *where, torch.tensor([rows[0][1]]).int(), C**-0.5, 0, 0.0, None)
    library = native.load("float32").library
    assert library is not None
    seen = []

    @FORK
    def alone(run, data, count, flags):
        seen.append(count)
        run(data)

    runtime, before = native.openmp_runtime(), torch.get_num_threads()
    real = ctypes.cast(ctypes.CDLL(runtime).GOMP_parallel, ctypes.c_void_p) if runtime else None
    try:
        library.fn_use_threads(ctypes.cast(alone, ctypes.c_void_p))
        torch.set_num_threads(threads)
        shared_out = cpu.paged_attention.fn(*arguments)
        torch.set_num_threads(1)
        assert torch.equal(cpu.paged_attention.fn(*arguments), shared_out)
    finally:
        library.fn_use_threads(real)
        torch.set_num_threads(before)
    assert max(seen, default=1) == asked


def test_laws_catch_parts_that_follow_the_number_of_threads(tmp_path, monkeypatch):
    """The mutant is the native code itself, with parts of 256 tokens where it has more than one thread."""
    needs(cpu.paged_attention)
    for file in native.SOURCE.glob("*.[ch]*"):
        (tmp_path / file.name).write_text(file.read_text())
    mutant = (tmp_path / "attention.cpp").read_text()
    for right, wrong in (
        ("constexpr int PART = 512;", "int PART = 512;"),
        ("static_assert(PART % TILE", "static_assert(TILE % TILE"),
        ("    attend_all(a, threads);", "    PART = threads > 1 ? 256 : 512, attend_all(a, threads);"),
    ):
        assert mutant.count(right) == 1
        mutant = mutant.replace(right, wrong)
    (tmp_path / "attention.cpp").write_text(mutant)
    monkeypatch.setattr(native, "SOURCE", tmp_path)
    monkeypatch.setattr(native, "SOURCES", {"float32": ("attention.cpp", "linear.cpp", "rope.cpp")})
    monkeypatch.setattr(native, "FLAGS", tuple("-O1" if f == "-O3" else f for f in native.FLAGS))
    path = native.build(native.find_compiler(), tmp_path / "cache", native.host_isa(), "float32")
    wrong = native.Native(native.open_library(path, "float32")[0], "a mutant")
    monkeypatch.setattr(native, "load", lambda part: wrong)
    found = first_variation(lambda **e: canonical(cpu.paged_attention)(*e.values()), torch.float32, long_examples)
    assert found == "example 0: number of threads"


def test_invariance_law_catches_kv_split_by_number_of_queries():
    """A flash-decoding split whose number of parts follows the batch is right and yet not invariant."""

    def split(q_THC, k_NBKC, v_NBKC, table_MP, row_R, start_R1, length_R, scale, window, soft_cap, sink_H):
        parts = 1 + q_THC.shape[0] % 3
        out = torch.zeros_like(q_THC)
        for r in range(len(length_R)):
            a, b, n = int(start_R1[r]), int(start_R1[r + 1]), int(length_R[r])
            at = table_MP[row_R[r]].long()
            k, v = k_NBKC[at].flatten(0, 1)[:n], v_NBKC[at].flatten(0, 1)[:n]
            G = q_THC.shape[1] // k.shape[1]
            for t in range(a, b):
                end = n - (b - t) + 1
                begin = max(0, end - window) if window else 0
                score = torch.einsum("hc,shc->hs", q_THC[t], k[begin:end].repeat_interleave(G, 1)) * scale
                value = v[begin:end].repeat_interleave(G, 1)
                pieces = [
                    (s.logsumexp(1), torch.einsum("hs,shc->hc", s.softmax(1), w))
                    for s, w in zip(score.chunk(parts, 1), value.chunk(parts, 0), strict=True)
                ]
                weight = torch.stack([p[0] for p in pieces]).softmax(0)
                out[t] = sum(w[:, None] * p[1] for w, p in zip(weight, pieces, strict=True))
        return out

    assert agrees_with_dense(split, first=2)
    assert first_variation(split, torch.float32) is not None


def seen_from(position: int, window: int) -> int:
    """The first position that a query at this one sees."""
    return position // -window * -window if window < 0 else max(0, position - window + 1) if window else 0


def reads_rubbish(
    fn: Callable[..., Any], dtype: torch.dtype, examples: Examples = attention.PAGED_ATTENTION.examples
) -> str | None:
    """Where NaN in every slot that belongs to no row's tokens, or to a block that none of its queries sees, changes an
    answer."""
    for n, e in enumerate(examples(dtype, 31)):
        B = e["k_NBKC"].shape[1]
        k, v = torch.full_like(e["k_NBKC"], torch.nan), torch.full_like(e["v_NBKC"], torch.nan)
        new = e["start_R1"].diff().tolist()
        for r, length, queries in zip(e["row_R"].tolist(), e["length_R"].tolist(), new, strict=True):
            at = torch.arange(seen_from(length - queries, e["window"]) // B * B, length)
            slot = e["table_MP"][r, at // B].long(), at % B
            k[slot], v[slot] = e["k_NBKC"][slot], e["v_NBKC"][slot]
        if not torch.equal(fn(*(e | {"k_NBKC": k, "v_NBKC": v}).values()), fn(*e.values())):
            return f"example {n}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", on_this_machine("paged_attention"))
def test_rubbish_behind_the_end_of_a_row_is_not_read(backend: Backend, dtype: torch.dtype):
    """A block's former owner, or a token that was taken back, may have left NaN where the row has no tokens yet; with
    pairs of tokens that is beside the row's last token, too. Blocks before a window may be anybody's by now."""
    needs(backend, dtype)
    for examples in (attention.PAGED_ATTENTION.examples, long_examples):
        assert reads_rubbish(canonical(backend), dtype, examples) is None


@pytest.mark.parametrize("backend", on_this_machine("paged_attention"))
@pytest.mark.parametrize("window", [-64, -48, 1, 16, 17, 100])
def test_blocks_before_a_window_or_a_chunk_are_not_read(backend: Backend, window: int):
    needs(backend)
    for examples in (attention.PAGED_ATTENTION.examples, long_examples):

        def windowed(dtype: torch.dtype, seed: int, examples: Examples = examples) -> Iterator[dict[str, Any]]:
            return (e | {"window": window} for e in examples(dtype, seed))

        if window < 0 and backend.name == "triton":
            pytest.skip("no kernels for chunks")
        assert reads_rubbish(canonical(backend), torch.float32, windowed) is None


def test_rubbish_is_noticed_where_it_is_read():
    """The mutant gives tokens behind the end a weight of 0 and multiplies."""

    def mutant(q_THC, k_NBKC, v_NBKC, table_MP, row_R, start_R1, length_R, *rest):
        out = attention.paged_attention(q_THC, k_NBKC, v_NBKC, table_MP, row_R, start_R1, length_R, *rest)
        for r in range(len(length_R)):
            behind = v_NBKC[table_MP[row_R[r], (int(length_R[r]) - 1) // 16].long(), int(length_R[r]) % 16]
            out[int(start_R1[r]) : int(start_R1[r + 1])] += 0 * behind.sum()
        return out

    assert reads_rubbish(mutant, torch.float32) is not None


@pytest.mark.parametrize("backend", on_this_machine("paged_attention"))
def test_padding_longer_than_its_table_is_inert(backend: Backend):
    """The null row may own more padding tokens than its table has columns for; other rows do not notice."""
    e = small_examples()[1]
    T, pad = e["q_THC"].shape[0], e["table_MP"].shape[1] * 16 + 5
    table = torch.cat([e["table_MP"], torch.zeros(1, e["table_MP"].shape[1], dtype=torch.int32)])
    padded = e | {
        "q_THC": torch.cat([e["q_THC"], torch.randn(pad, *e["q_THC"].shape[1:])]),
        "table_MP": table,
        "row_R": torch.cat([e["row_R"], torch.tensor([len(table) - 1], dtype=torch.int32)]),
        "start_R1": torch.cat([e["start_R1"], torch.tensor([T + pad], dtype=torch.int32)]),
        "length_R": torch.cat([e["length_R"], torch.tensor([pad], dtype=torch.int32)]),
    }
    got, want = canonical(backend)(*padded.values())[:T], canonical(backend)(*e.values())
    assert torch.equal(got, want) if backend.invariant else torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def sharing_rows(dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> dict:
    """Rows of 1 to 6 new tokens: most begin with the same blocks, some only with a part of them, one with its own."""
    g = torch.Generator().manual_seed(heads)
    lengths = [200, 130, 131, 64, 65, 300, 200, 90, 257, 128, 129, 192, 71]
    new = [1, 1, 2, 1, 1, 4, 6, 3, 1, 1, 1, 2, 1]
    shared = [128, 128, 128, 48, 64, 256, 192, 0, 256, 112, 128, 64, 64]
    P = 20
    table = torch.randperm(len(lengths) * P, generator=g).view(len(lengths), P).int() + 1
    for r, tokens in enumerate(shared):
        table[r, : tokens // 16] = table[5, : tokens // 16]
    pool = torch.randn(2, len(lengths) * P + 1, 16, kv_heads, width, generator=g).to(dtype)
    return {
        "q": torch.randn(sum(new), heads, width, generator=g).to(dtype),
        "k": pool[0],
        "v": pool[1],
        "table": table,
        "row": torch.randperm(len(lengths), generator=g).int(),
        "start": torch.tensor([0, *new]).cumsum(0).int(),
        "length": torch.tensor(lengths, dtype=torch.int32),
        "scale": width**-0.5,
        "window": 0,
        "soft_cap": 2.0 if heads == 4 else 0.0,
        "sink": torch.randn(heads, generator=g).to(dtype) if heads in (4, 3) else None,
    }


@pytest.mark.parametrize("backend", on_this_machine("paged_attention"))
@pytest.mark.parametrize("size", [1e-3, 0.1, 0.2, 1.0, 30.0])
def test_caps_are_right_for_scores_of_every_size(backend: Backend, size: float):
    """Oracle: float64. tanh is a series for small scores and made of exponentials for large ones."""
    e = small_examples()[1] | {"soft_cap": 2.0, "sink_H": torch.tensor([0.0, -torch.inf, 3.0, -50.0])}
    e |= {"scale": size / 8}
    got = canonical(backend)(*e.values())
    torch.testing.assert_close(got.double(), dense(*e.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 64), (2, 2, 20), (32, 1, 32), (3, 1, 128)])
def test_rows_that_share_a_prefix_have_the_bits_they_have_alone(dtype, heads, kv_heads, width):
    """Law: reading shared tiles once for all rows changes nothing. Oracle: each row in a call of its own."""
    needs(cpu.paged_attention, dtype)
    e = sharing_rows(dtype, heads, kv_heads, width)
    e["table"] = e["table"][e["row"].argsort()]  # batch row r has table r
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for window in (0, 100):
                together = canonical(cpu.paged_attention)(*(e | {"window": window}).values())
                for r in range(len(e["length"])):
                    lo, hi = int(e["start"][r]), int(e["start"][r + 1])
                    one = {
                        "q": e["q"][lo:hi],
                        "row": e["row"][r : r + 1],
                        "start": torch.tensor([0, hi - lo], dtype=torch.int32),
                        "length": e["length"][r : r + 1],
                        "window": window,
                    }
                    assert torch.equal(canonical(cpu.paged_attention)(*(e | one).values()), together[lo:hi]), (
                        r,
                        window,
                    )
    finally:
        torch.set_num_threads(before)


def test_native_ops_refuse_addresses_outside_of_the_pool():
    needs(cpu.paged_attention)
    e = small_examples()[1]
    with pytest.raises(AssertionError, match="out of range"):
        canonical(cpu.paged_attention)(*(e | {"table_MP": e["table_MP"] + 10_000}).values())
    with pytest.raises(AssertionError, match="out of range"):
        canonical(cpu.paged_attention)(*(e | {"row_R": e["row_R"] + 100}).values())
    pool = torch.zeros(2, 16, 1, 8)
    angle, slot = torch.ones(1, 4), torch.tensor([32], dtype=torch.int32)
    with pytest.raises(AssertionError, match="out of range"):
        canonical(cpu.rope_write)(torch.ones(1, 24), None, None, angle, angle, pool, pool.clone(), slot, 1e-6)
    with pytest.raises(AssertionError, match="out of range"):
        cpu.copy_blocks.fn([pool], torch.tensor([[0, 2]], dtype=torch.int32))


# ---- noise ------------------------------------------------------------------------------------------------------

PUBLISHED = [  # counter, key, result: kat_vectors of the authors' Random123, philox4x32 with 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, result", PUBLISHED, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, result):
    c, k, want = (np.array([int(w, 16) for w in words.split()], np.uint32) for words in (counter, key, result))
    assert (philox.philox4x32(c, k) == want).all()


def test_uniforms_are_inside_the_open_interval_and_noise_is_finite():
    """Every word's class maps inside (0, 1): the first, the last and a stride of the 2^23 values."""
    x = np.unique(np.concatenate([np.arange(0, 2**23, 97), [1, 2, 2**23 - 2, 2**23 - 1]])).astype(np.float32)
    u = (x + np.float32(0.5)) * np.float32(2.0**-23)
    assert (np.diff(u) > 0).all() and u[0] > 0 and u[-1] < 1
    log = philox.log32(u)
    exact = np.log(u.astype(np.float64))
    assert np.abs((log - exact) / exact).max() < 2.0**-22
    g = -philox.log32(-log)
    assert np.isfinite(g).all() and g.max() < 16.6356, "LARGEST_NOISE of csrc/noise.cpp"


def test_24_bits_would_give_infinite_noise():
    """Why the mapping takes 23 bits: the mutant rounds to 1."""
    assert (np.float32(2**24 - 1) + np.float32(0.5)) * np.float32(2.0**-24) == 1.0


def numpy_choice(logits: np.ndarray, T: float, seed: int, position: int, stream: int) -> int:
    if T == 0:
        return int(logits.argmax())
    g = philox.gumbel(seed, position, stream, np.arange(len(logits)))
    return int((logits / np.float32(T) + g).argmax())


@pytest.mark.parametrize("backend", on_this_machine("gumbel_argmax"))
@pytest.mark.parametrize("V, spread", [(5, 1.0), (1000, 0.01), (50_001, 3.0), (33_333, 20.0)])
def test_tokens_equal_the_numpy_definition(backend: Backend, V: int, spread: float):
    R = 24
    g = torch.manual_seed(V)
    logits = torch.randn(R, V, generator=g) * spread
    logits[:, 1] = logits[:, 0]
    logits[3, : V // 2] = -torch.inf
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.5])[torch.arange(R) % 4]
    seed = torch.randint(-(2**62), 2**62, (R,), generator=g) * 2 + 1
    position = torch.randint(0, 2**31 - 1, (R,), generator=g).int()
    for stream in (0, 3):
        token = backend.fn(logits, temperature, seed, position, stream)
        want = [
            numpy_choice(logits[r].numpy(), float(temperature[r]), int(seed[r]), int(position[r]), stream)
            for r in range(R)
        ]
        assert token.tolist() == want


@pytest.mark.parametrize("backend", on_this_machine("gumbel_argmax"))
def test_noise_is_the_numpy_definition_to_the_last_bit(backend: Backend):
    """Logits that cancel the noise: every sum is exactly 0, so the lowest id wins, unless some bit is larger."""
    seed, position = [2**61 + 7, -12345, 99], [0, 1, 2**31 - 1]
    g = np.stack([philox.gumbel(s, p, 2, np.arange(9000)) for s, p in zip(seed, position, strict=True)])
    arguments = (torch.ones(3), torch.tensor(seed), torch.tensor(position).int(), 2)
    assert backend.fn(torch.tensor(-g), *arguments).tolist() == [0, 0, 0]
    nudged = -g.copy()
    nudged[:, 4321] = np.nextafter(nudged[:, 4321], np.float32(np.inf))
    assert backend.fn(torch.tensor(nudged), *arguments).tolist() == [4321, 4321, 4321]


@pytest.mark.parametrize("backend", on_this_machine("gumbel_argmax"))
def test_ties_and_minus_infinity(backend: Backend):
    low = -torch.inf
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [low, low, low, low], [low, low, 0.0, low]]).repeat(1, 13)[:, :50]
    logits[2] = low
    logits[2, 31] = -1e30
    zero, warm = torch.zeros(3), torch.ones(3)
    where = (torch.arange(3), torch.arange(3, dtype=torch.int32), 0)
    assert backend.fn(logits, zero, *where).tolist() == [1, 0, 31]
    assert backend.fn(logits, warm, *where)[1:].tolist() == [0, 31]


@pytest.mark.parametrize("backend", on_this_machine("gumbel_argmax"))
def test_frequencies_follow_softmax(backend: Backend):
    """Chi-square of 20000 draws over 12 tokens; a right sampler fails for one seed in a million."""
    n, V, T = 20_000, 12, 0.8
    logits = torch.randn(V, generator=torch.manual_seed(3)) * 1.5
    want = (logits.double() / T).softmax(0).numpy() * n
    token = backend.fn(
        logits.expand(n, V).contiguous(), torch.full((n,), T), torch.arange(n) * 7919, torch.arange(n).int(), 0
    )
    got = np.bincount(token.numpy(), minlength=V)
    statistic = ((got - want) ** 2 / want).sum()
    assert statistic < 49.1  # 11 degrees of freedom: P(chi2 > 49.1) = 1e-6 (Wilson-Hilferty)
    z = ((statistic / 11) ** (1 / 3) - (1 - 2 / 99)) / math.sqrt(2 / 99)
    assert z > -4.8, "too good to be random"


def test_a_token_does_not_depend_on_its_neighbours():
    for backend in BACKENDS["gumbel_argmax"]:
        if backend.supports(CPU, torch.float32) is None:
            logits = torch.randn(9, 20_000, generator=torch.manual_seed(1))
            T, seed, position = torch.linspace(0, 2, 9), torch.arange(9) * 10**15, torch.arange(9).int()
            whole = backend.fn(logits, T, seed, position, 0)
            for r in range(9):
                s = slice(r, r + 1)
                assert backend.fn(logits[s], T[s], seed[s], position[s], 0) == whole[r]


def test_torch_noise_equals_numpy_noise():
    g = noise.gumbel_noise(torch.tensor([2**62 + 12345, -1]), torch.tensor([0, 77], dtype=torch.int32), 5, 3000)
    for r, (seed, position) in enumerate([(2**62 + 12345, 0), (-1, 77)]):
        assert (g[r].numpy() == philox.gumbel(seed, position, 5, np.arange(3000))).all()


# ---- products ---------------------------------------------------------------------------------------------------


def rows_of_a_product_are_their_own(backend: Backend, dtype: torch.dtype) -> None:
    """Law: a row of x gives the same bits whatever rows stand beside it and however many threads work."""
    g = torch.Generator().manual_seed(0)
    N, K = 100, 514
    tiles = cpu.tile(torch.randn(N, K, generator=g).to(dtype))
    x, bias = torch.randn(50, K, generator=g).to(dtype), torch.randn(N, generator=g).to(dtype)
    alone = torch.cat([backend.fn(row, tiles, bias, N) for row in x.split(1)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for T in (2, 3, 4, 5, 8, 9, 12, 13, 16, 20, 24, 25, 36, 50):
                assert torch.equal(backend.fn(x[:T], tiles, bias, N), alone[:T]), (T, threads)
                assert torch.equal(backend.fn(x[-T:], tiles, bias, N), alone[-T:]), (T, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_product_are_their_own(dtype: torch.dtype):
    needs(cpu.linear, dtype)
    rows_of_a_product_are_their_own(cpu.linear, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K", [(1, 1), (31, 2), (64, 16), (70, 37), (33, 512)])
def test_tiles_are_laid_out_as_written(dtype: torch.dtype, N: int, K: int):
    """Oracle: the plain-torch layout, and the way back."""
    needs(cpu.linear, dtype)
    for weight in (torch.randn(N, K).to(dtype), torch.randn(K, N).to(dtype).T, torch.randn(N, K + 1).to(dtype)[:, :K]):
        tiles = cpu.tile(weight)
        assert torch.equal(tiles, linear.tile(weight, linear.atom_of(dtype)))
        assert torch.equal(linear.untile(tiles, N, K), weight)


# ---- how KV lies in the pool -----------------------------------------------------------------------------------


@pytest.mark.parametrize("atom", [1, 2])
@pytest.mark.parametrize("C", [1, 8, 13])
def test_lanes_are_laid_out_as_written(atom: int, C: int):
    """Oracle: element by element from the definition, and the way back."""
    N, B, K = 3, 16, 2
    k, v = torch.randn(2, N, B, K, C)
    layout = Lanes(atom)
    packed = layout.pack(k, v)
    assert tuple(tuple(x.shape) for x in packed) == layout.shapes(N, B, K, C)
    for n, t, h, c in itertools.product(range(N), range(B), range(K), range(C)):
        assert packed[0][n, h, c // atom, t, c % atom] == k[n, t, h, c]
        assert packed[1][n, h, t // atom, c, t % atom] == v[n, t, h, c]
    assert packed[0].count_nonzero() == k.count_nonzero(), "an odd last channel has a zero beside it"
    assert all(torch.equal(a, b) for a, b in zip(layout.unpack(*packed), (k, v), strict=True))


# ---- from projection to pool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_rotated_and_written_the_same_in_any_company(dtype: torch.dtype):
    """Law: q and what the pools hold have the same bits for a token alone and among others, on any threads."""
    needs(cpu.rope_write, dtype)
    example = list(ROPE_WRITE.examples(dtype, 4))[2]
    qkv, q_norm, k_norm, cos, sin, k_pool, v_pool, slot, eps = example.values()
    pools = (k_pool.clone(), v_pool.clone())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        q = canonical(cpu.rope_write)(qkv, q_norm, k_norm, cos, sin, *pools, slot, eps)
    finally:
        torch.set_num_threads(before)
    for t in range(len(slot)):
        one = slice(t, t + 1)
        alone = canonical(cpu.rope_write)(qkv[one], q_norm, k_norm, cos[one], sin[one], k_pool, v_pool, slot[one], eps)
        assert torch.equal(alone[0], q[t])
    assert torch.equal(k_pool, pools[0]) and torch.equal(v_pool, pools[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [17, 48, 64, 128])
def test_tokens_in_a_row_are_written_as_each_alone(dtype: torch.dtype, C: int):
    """Law: tokens that follow each other in blocks, which are written whole lines at a time, leave the bits that each
    leaves alone, and leave their neighbours' alone. Runs begin and end anywhere in a block; 130 tokens are shared out
    in larger pieces than 41."""
    needs(cpu.rope_write, dtype)
    H, K, half = 4, 2, C // 2
    for T, first in ((41, 16), (41, 3), (5, 10), (130, 7)):
        shapes = cpu.expected_layout(dtype, "auto").shapes(1 + -(-(T + 16) // 16), 16, K, C)
        together = [torch.randn(s).to(dtype) for s in shapes]
        alone = [p.clone() for p in together]
        qkv, norm = torch.randn(T, (H + 2 * K) * C).to(dtype), torch.rand(C).to(dtype)
        cos, sin = torch.randn(2, T, half)
        slot = torch.arange(first, first + T, dtype=torch.int32)
        q = cpu.rope_write.fn(qkv, norm, norm, cos, sin, *together, slot, 1e-6)
        for t in range(T):
            one = slice(t, t + 1)
            q_one = cpu.rope_write.fn(qkv[one], norm, norm, cos[one], sin[one], *alone, slot[one], 1e-6)
            assert torch.equal(q_one[0], q[t]), t
        assert all(map(torch.equal, together, alone)), (T, first)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("delta", [True, False])
def test_guesses_come_into_a_state_when_they_were_right(backend, delta):
    """Rounds of guesses, some of them right, and tokens that follow. Oracle: the same op over what was right at once,
    to the bit."""
    g = torch.Generator().manual_seed(1)
    G, H, C, P, X, Y, K = 2, 4, 24, 40, 70, 4, 6
    T, row, S = 60, 2, 5

    def inputs(n: int) -> tuple[torch.Tensor | None, ...]:
        k = torch.randn(n, G, C, generator=g) / (C**0.5 * 2)
        rates = torch.rand(2, n, H, generator=g)
        beta = rates[1] if delta else None
        return torch.randn(n, G, C, generator=g), k, torch.randn(n, H, P, generator=g), rates[0], beta

    right, x_TX = inputs(T), torch.randn(T, X, generator=g)
    weight = torch.randn(X, Y, generator=g)
    conv, scan = (next(b.fn for b in BACKENDS[op] if b.name == backend) for op in ("causal_conv", "gated_scan"))
    J = G * C + H * P + (2 if delta else 1) * H

    def fresh() -> tuple[torch.Tensor, ...]:
        sizes = (S, Y - 1, X), (S, K, X), (S, H, C, P), (S, K, J)
        return tuple(torch.randn(*size, generator=g) for size in sizes)

    def run(state, x, parts, length: int, behind: int, guessed: int) -> tuple[torch.Tensor, torch.Tensor]:
        i32 = lambda *v: torch.tensor(v, dtype=torch.int32)  # noqa: E731
        tail, heard, memory, noted = state
        at = i32(row), i32(0, len(x)), i32(length), torch.full((S,), behind, dtype=torch.int32), i32(guessed)
        return conv(x, weight, None, tail, heard, *at), scan(*parts, memory, noted, *at)

    one = fresh()
    y, o = run(one, x_TX, right, T, 0, 0)
    many, at, behind = fresh(), 0, 0
    for guessed, kept in ((0, 0), (3, 3), (3, 0), (5, 2), (6, 6), (1, 1), (6, 5), (2, 1)):
        new, wrong = 1 + guessed, inputs(guessed)
        bad_x = torch.randn(guessed, X, generator=g)

        def line(a, b, at=at, kept=kept):
            return None if a is None else torch.cat([a[at : at + 1 + kept], b[kept:]])

        parts = tuple(line(a, b) for a, b in zip(right, wrong, strict=True))
        got = run(many, line(x_TX, bad_x), parts, at + new, behind, guessed)
        assert torch.equal(got[0][: 1 + kept], y[at : at + 1 + kept])
        assert torch.equal(got[1][: 1 + kept], o[at : at + 1 + kept]), (at, behind, guessed, kept)
        at, behind = at + 1 + kept, kept
        if kept == 2:  # a state that catches up without new tokens
            run(many, x_TX[:0], tuple(None if a is None else a[:0] for a in right), at, behind, 0)
            behind = 0
    rest = tuple(None if a is None else a[at:] for a in right)
    got = run(many, x_TX[at:], rest, T, behind, 0)
    assert torch.equal(got[0], y[at:]) and torch.equal(got[1], o[at:])
    for a, b in ((many[0], one[0]), (many[2], one[2])):
        assert torch.equal(a[row], b[row])


# ---- choosing and building --------------------------------------------------------------------------------------


def test_ops_report_what_was_chosen(monkeypatch):
    o = ops("cpu", torch.bfloat16)
    experts = ("grouped_tiles", "top_experts", "arrange_experts")
    others = (*experts, "penalize", "whole_attention", "causal_conv", "gated_scan")  # called by name
    assert [line[0] for line in describe(o)] == [n for n in BACKENDS if not n.endswith("linear") and n not in others]
    assert o.invariant == all(line[2] for line in describe(o))
    plain = ops("cpu", torch.bfloat16, only="reference")
    assert {line[1] for line in describe(plain)} == {"reference"} and not plain.invariant
    for with_triton in (True, False):
        monkeypatch.setattr(triton, "installed", lambda found=with_triton: found)
        chosen = dict(line[:2] for line in describe(ops("cuda", torch.bfloat16)))
        on_gpu = {name for name, backend in chosen.items() if backend == "triton"}
        assert on_gpu == (set(chosen) if with_triton else set())
        assert set(chosen.values()) <= {"triton", "reference"}
    with pytest.raises(LookupError, match="none is called abacus"):
        ops("cpu", torch.bfloat16, only="abacus")


def test_without_a_compiler_the_reference_is_chosen_and_the_remedy_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FNENGINE_CACHE", str(tmp_path))  # a kept library would do
    with caplog.at_level(logging.WARNING, logger="fnengine"):
        found = native._load.__wrapped__("float32")
    assert found.library is None and "apt install g++" in found.reason
    assert len(caplog.records) == 1 and "apt install g++" in caplog.text
    monkeypatch.setattr(native, "load", lambda part: found)
    chosen = choose(BACKENDS["paged_attention"], CPU, torch.float32)
    assert chosen.backend is reference.paged_attention
    assert "cpu: no C++ compiler found" in chosen.reason


@pytest.fixture
def compiler() -> str:
    try:
        return native.find_compiler()
    except native.BuildFailed as e:
        pytest.skip(str(e))


def test_a_failed_build_says_what_the_compiler_said(compiler, tmp_path, monkeypatch):
    (tmp_path / "broken.cpp").write_text("int f( { }")
    (tmp_path / "threads.cpp").write_text("")
    monkeypatch.setattr(native, "SOURCE", tmp_path)
    monkeypatch.setattr(native, "SOURCES", {"common": ("broken.cpp",)})
    with pytest.raises(native.BuildFailed, match=r"broken\.cpp.*error"):
        native.build(compiler, tmp_path / "cache", native.host_isa(), "common")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(compiler, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(native.BuildFailed, match="FNENGINE_CACHE"):
        native.build(compiler, tmp_path / "file" / "cache", native.host_isa(), "common")


def test_racing_builds_leave_one_whole_file(compiler, tmp_path, monkeypatch):
    (tmp_path / "a.cpp").write_text('extern "C" int seven() { return 7; }')
    (tmp_path / "threads.cpp").write_text("")
    monkeypatch.setattr(native, "SOURCE", tmp_path)
    monkeypatch.setattr(native, "SOURCES", {"common": ("a.cpp",)})
    made: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: made.append(native.build(compiler, tmp_path / "cache", native.host_isa(), "common"))
        )
        for _ in range(3)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert (
        len(made) == 3
        and len(set(made)) == 1
        and sorted((tmp_path / "cache").iterdir()) == [made[0].with_suffix(".json"), made[0]]
    )
    assert ctypes.CDLL(str(made[0])).seven() == 7
    (tmp_path / "a.cpp").write_text('extern "C" int seven() { return 8; }')
    assert native.build(compiler, tmp_path / "cache", native.host_isa(), "common") != made[0], (
        "the key must hold the sources"
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other instruction sets of x86")
@pytest.mark.parametrize("isa", ["x86-64-v3", "x86-64"])
def test_builds_for_lesser_processors_are_right_too(compiler, isa, monkeypatch):
    """The AVX2 and the baseline variants, which this machine would not choose, against dense and for invariance."""
    if isa == "x86-64-v3" and "AVX2" not in torch.backends.cpu.get_cpu_capability() + "AVX2" * (
        "AVX512" in torch.backends.cpu.get_cpu_capability()
    ):
        pytest.skip("this processor has no AVX2")

    def load(part: str) -> native.Native:
        path = native.build(compiler, cache_dir() / "native", (f"-march={isa}",), part)
        return native.Native(native.open_library(path, part)[0], isa)

    libraries = {part: load(part) for part in native.SOURCES}
    monkeypatch.setattr(native, "load", lambda part: libraries[part])
    assert agrees_with_dense(lambda **e: canonical(cpu.paged_attention)(*e.values()))
    bare = canonical(cpu.paged_attention)
    assert first_variation(lambda **e: bare(*e.values()), torch.float32, long_examples) is None
    for dtype in DTYPES:
        assert first_variation(lambda **e: canonical(cpu.paged_attention)(*e.values()), dtype) is None
        assert reads_rubbish(canonical(cpu.paged_attention), dtype) is None
        test_latent.keys_serve_as_values(dtype)
        test_latent.chunks_are_right(dtype)
        test_kv8.attention_is_right(dtype)
        test_kv8.laws_of_attention(dtype)
        test_kv8.writes_what_the_layout_says(dtype)
        test_backend_equals_reference_in_float32(cpu.rope_write, dtype)
        test_a_token_is_rotated_and_written_the_same_in_any_company(dtype)
        test_backend_equals_reference_in_float32(cpu.paged_attention, dtype)
        test_backend_equals_reference_in_float32(cpu.linear, dtype)
        rows_of_a_product_are_their_own(cpu.linear, dtype)
        test_backend_equals_reference_in_float32(cpu.quantized_linear, dtype)
        test_quantized.rows_are_their_own(dtype)
        test_quantized.test_the_library_makes_the_same_codes(70, 300, dtype, 4)
    test_tokens_equal_the_numpy_definition(cpu.gumbel_argmax, 1000, 0.01)
    test_tokens_equal_the_numpy_definition(cpu.gumbel_argmax, 50_001, 3.0)
    for backend in (cpu.gumbel_argmax, cpu.truncate, cpu.apply_mask):
        test_backend_equals_reference_in_float32(backend, torch.float32)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    """Two runtimes would be two pools of spinning threads on the same cores."""
    needs(cpu.gumbel_argmax)
    torch.randn(300, 300) @ torch.randn(300, 300)
    R = 8
    cpu.gumbel_argmax.fn(torch.randn(R, 20_000), torch.ones(R), torch.arange(R), torch.arange(R).int(), 0)
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    names = {line[5] for line in lines if len(line) == 6}
    runtimes = {n for n in names if Path(n).name.startswith(("libgomp", "libiomp", "libomp"))}
    assert len(runtimes) == 1, runtimes
    assert all("threads of" in native.load(part).reason for part in (native.COMMON, "float32"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reference_on_cuda_equals_reference_on_cpu():
    for bs in BACKENDS.values():
        op = bs[-1].op
        for example in op.examples(torch.float32, 2):
            there = {k: [y.cuda() for y in v] if isinstance(v, list) else v for k, v in example.items()}
            there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in there.items()}
            got, want = bs[-1].fn(*there.values()), bs[-1].fn(*example.values())
            if want is not None:
                torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
            for name in op.mutates:
                a, b = there[name], example[name]
                for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
                    assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize("size", [0, 1, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 3])
def test_fresh_memory_is_zero_aligned_and_its_own(size):
    """Oracle: the numbers themselves, and for large pages the kernel's own account of this process."""
    a, b = memory.zeros((size,), torch.uint8), memory.zeros((size,), torch.uint8)
    assert a.shape == (size,) and int(a.sum()) == 0
    assert size == 0 or a.data_ptr() % (memory.HUGE if size >= memory.HUGE else 4096) == 0
    a.fill_(7)
    assert int(b.sum()) == 0 and int(a.sum()) == 7 * size


def huge_pages() -> int:
    """Bytes of this process in pages of 2 MiB."""
    line = next(x for x in Path("/proc/self/smaps_rollup").read_text().splitlines() if x.startswith("AnonHugePages"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_weights_lie_in_huge_pages_where_there_are_some():
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists() or "[never]" in allowed.read_text():
        pytest.skip("this machine gives none")
    before = huge_pages()
    held = memory.zeros((64 << 20,), torch.uint8).fill_(1)
    if huge_pages() == before:
        pytest.skip("none is free at the moment")
    assert huge_pages() - before <= held.nbytes
    if cpu.linear.supports(torch.device("cpu"), torch.bfloat16) is None:
        before = huge_pages()
        weight = cpu.tile(torch.zeros(16384, 1024, dtype=torch.bfloat16))
        assert huge_pages() - before > weight.nbytes // 2
