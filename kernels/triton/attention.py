# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# (it takes tl.constexpr for a class of values, and jit functions for Python's)
"""Attention over the paged pool on a GPU: one kernel for prefill, decode and everything between.

A fixed number of programs walks over work items that each of them finds in `start` and `length` by itself, so a launch
depends on shapes only and a CUDA graph may hold it. An item is a tile of one row's queries times the heads of a group,
one KV head, and either all the KV that the tile sees or one part of it.

    positions   0 ..... near ..... 2 near ..... edge ............ edge + far ............ end
    parts       |   0    |    1     | ...        |        i        |        i + 1         |
    tiles       | | | | || | | | | |

KV is cut at fixed positions: into parts, and those into tiles of `keys`. The softmax runs over the tiles of a part from
a fresh maximum; parts are merged in their order by `_merge`. Whether one program merges them in its loop, or several
leave them in scratch memory for the second kernel, is the same arithmetic in the same order, so it may depend on how
much work there is while a query's bits do not. A tile or part in which a query sees nothing leaves its sums as they
are, bit by bit, so neighbours in a tile do not matter either. What would matter is the shape of a tile: reductions and
tensor-core instructions differ. So decode has prefill's shape, and pads it: 64 queries of a tile cost less than its KV
takes to arrive (64 keys of 128 channels in bfloat16: about 830 cycles of arithmetic beside 1590 of an H200's memory,
on paper). Products and sums that a compiler might contract are spelled with `fma`, and contraction is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnengine import environment
from fnengine.kernels.layout import ROUNDED_BLOCK, heads_of
from fnengine.kernels.triton import tuned
from fnengine.kernels.triton.launch import Launch
from fnengine.kernels.triton.numbers import bound, narrow

SCRATCH = 64 << 20
"""Bytes that parts may take; beyond it the rows with the most parts are split and the others are not."""
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiles:
    """How work is cut. Bits depend on the first six (and on nothing else), so those follow from shapes of heads alone;
    the others are free, and may be tuned for a card (`tuned.FREE`)."""

    queries: int
    """Rows of a tile: query tokens x heads of a group; at least 64 for `wgmma`."""
    keys: int
    """KV positions of a tile."""
    near: int
    """Positions of a part below `edge`, a multiple of `keys`."""
    far: int
    """Positions of a part from `edge` on: fewer parts to store and merge where a row is long anyway."""
    edge: int
    """A multiple of `near` and `far`."""
    warps: int
    stages: int
    """Tiles of KV under way."""
    programs: int
    """Programs on a multiprocessor."""
    merge_warps: int = 4
    merge_programs: int = 8

    def __post_init__(self) -> None:
        assert self.near % self.keys == self.far % self.keys == self.edge % self.near == self.edge % self.far == 0

    def parts(self, length: int) -> int:
        """The number of parts of so many positions."""
        beyond = max(0, length - self.edge)
        return -(-min(length, self.edge) // self.near) + -(-beyond // self.far)


def tiles_for(dtype: torch.dtype, width: int, group: int) -> Tiles:
    """The tiles for heads of `width` channels, `group` of which share a KV head."""
    least, C = triton.next_power_of_2(group), max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:  # no tensor cores: sums of 32 bits
        return Tiles(max(32, least), 32 if C <= 128 else 16, 256, 2048, 4096, warps=4, stages=2, programs=2)
    if C <= 128:
        return Tiles(max(64, least), 64, 256, 2048, 4096, warps=4, stages=3, programs=2)
    if C <= 256:
        return Tiles(max(64, least), 64, 256, 2048, 4096, warps=8, stages=2, programs=1)
    return Tiles(max(16, least), 32, 256, 2048, 4096, warps=4, stages=2, programs=1)


def shape_of(dtype: torch.dtype, kv: torch.dtype, width: int, group: int) -> tuned.Shape:
    """What a choice of free knobs depends on: nothing of a batch, because each choice is a kernel to be compiled."""
    return dtype, kv, width, group


def _chosen(q: Tensor, kv: torch.dtype, group: int) -> Tiles:
    C = q.shape[2]
    return tuned.choice(q.device, "paged_attention", shape_of(q.dtype, kv, C, group), tiles_for(q.dtype, C, group))


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def slots_of(tiles: Tiles, T: int, positions: int, H: int, C: int) -> int:
    """Parts of a token's heads that scratch memory holds for tables of so many positions: 0 where nothing is split."""
    parts = tiles.parts(positions)
    return min(T * parts, SCRATCH // slot_bytes(H, C)) if parts > 1 else 0


def slot_bytes(H: int, C: int) -> int:
    """Bytes of a part of one token: sums, maximum and weight of each head in float32."""
    return 4 * H * (max(16, triton.next_power_of_2(C)) + 2)


@triton.jit
def _part_of(position, NEAR: tl.constexpr, FAR: tl.constexpr, EDGE: tl.constexpr):
    return tl.where(position < EDGE, position // NEAR, EDGE // NEAR + (position - EDGE) // FAR)


@triton.jit
def _begin(part, NEAR: tl.constexpr, FAR: tl.constexpr, EDGE: tl.constexpr):
    """The first position of a part."""
    return tl.where(part * NEAR < EDGE, part * NEAR, EDGE + (part - EDGE // NEAR) * FAR)


@triton.jit
def _seen_from(position, WINDOW: tl.constexpr):
    """The first position that a query at `position` sees."""
    if WINDOW > 0:
        return tl.maximum(position - (WINDOW - 1), 0)
    else:
        return position * 0


@triton.jit
def _plan(
    start,
    length,
    R,
    slots,
    few,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(tiles, parts, queries, first slot or -1) of every row.

    A row is split where that makes work for idle programs and its parts have a place; rows with few parts go without
    first.
    """
    r = tl.arange(0, ROWS)
    first = tl.load(start + r, mask=r < R, other=0)
    n = tl.load(start + r + 1, mask=r < R, other=0) - first
    end = tl.load(length + r, mask=r < R, other=0)
    tiles = (n + TOKENS - 1) // TOKENS
    parts = _part_of(end - 1, NEAR, FAR, EDGE) - _part_of(_seen_from(end - n, WINDOW), NEAR, FAR, EDGE) + 1
    wanted = tl.where((tiles * K <= few) & (n > 0), n * parts, 0)
    least = 2
    for _ in tl.static_range(6):
        least = tl.where(tl.sum(tl.where(parts >= least, wanted, 0)) > slots, least * 2, least)
    wanted = tl.where(parts >= least, wanted, 0)
    upto = tl.cumsum(wanted, 0)
    slot = tl.where((wanted > 0) & (upto <= slots), upto - wanted, -1)
    return tiles, parts, n, slot


@triton.jit
def _merge(most, total, sums, most_b, total_b, sums_b):
    """Softmax sums of two stretches of KV as those of both. A stretch in which nothing was seen changes no bit."""
    top = tl.maximum(most, most_b)
    safe = tl.where(top == -float("inf"), 0.0, top)
    a, b = tl.exp2(most - safe), tl.exp2(most_b - safe)
    return top, tl.fma(total, a, total_b * b), tl.fma(sums, a[:, None], sums_b * b[:, None])


@triton.jit
def _finish(most, total, sums, sink, heads, inside, SINKS: tl.constexpr):
    """Attention from its sums; a sink is one more weight."""
    if SINKS:
        logit = tl.load(sink + heads, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(most, logit)
        safe = tl.where(top == -float("inf"), 0.0, top)
        fade = tl.exp2(most - safe)
        total = tl.fma(total, fade, tl.exp2(logit - safe))
        sums = sums * fade[:, None]
    return sums / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["R", "P", "slots", "few"])
def _attend(
    q,
    k,
    v,
    k_scale,
    v_scale,
    table,
    row,
    start,
    length,
    sink,
    out,
    part_sums,
    part_most,
    R,
    P,
    slots,
    few,
    scale,
    q_token,
    q_head,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    EDGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    CODES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    H: tl.constexpr = K * G
    TOKENS: tl.constexpr = QUERIES // G
    kind = q.dtype.element_ty
    factor_kind = tl.float32 if INTERPRETED else kind  # the interpreter's product takes bfloat16 for integers
    # Of codes, a head of a block is B scales and then B x C codes; otherwise tokens of K x C follow one another.
    if CODES:
        BLOCK: tl.constexpr = K * (4 * B + B * C)
        TOKEN: tl.constexpr = C
        HEAD: tl.constexpr = 4 * B + B * C
        SKIP: tl.constexpr = 4 * B
    else:
        BLOCK: tl.constexpr = B * K * C
        TOKEN: tl.constexpr = K * C
        HEAD: tl.constexpr = C
        SKIP: tl.constexpr = 0

    tiles_R, parts_R, _, slot_R = _plan(start, length, R, slots, few, K, ROWS, TOKENS, WINDOW, NEAR, FAR, EDGE)
    stop_R = tl.cumsum(tiles_R * tl.where(slot_R >= 0, parts_R, 1) * K, 0)
    r_R = tl.arange(0, ROWS)
    m = tl.arange(0, QUERIES)
    c = tl.arange(0, CP)
    for item in range(
        bound(tl.program_id(0), INTERPRETED), bound(tl.max(stop_R), INTERPRETED), bound(tl.num_programs(0), INTERPRETED)
    ):
        # What is to be done.
        r = tl.sum((stop_R <= item).to(tl.int32))
        piece = item - tl.max(tl.where(stop_R <= item, stop_R, 0))
        slot = tl.sum(tl.where(r_R == r, slot_R, 0))
        first = tl.load(start + r)
        n = tl.load(start + r + 1) - first
        end = tl.load(length + r)
        column = table + tl.load(row + r).to(tl.int64) * P
        head = piece % K
        piece = piece // K
        part_0 = _part_of(_seen_from(end - n, WINDOW), NEAR, FAR, EDGE)
        parts = tl.where(slot >= 0, _part_of(end - 1, NEAR, FAR, EDGE) - part_0 + 1, 1)
        part = part_0 + piece % parts
        tile = (n + TOKENS - 1) // TOKENS - 1 - piece // parts  # the last tile sees most and is begun first
        token = tile * TOKENS + m // G
        inside = (token < n) & (m < TOKENS * G)
        position = tl.where(inside, end - n + token, -1)
        lo = _seen_from(end - n + tile * TOKENS, WINDOW)
        hi = end - n + tl.minimum(tile * TOKENS + TOKENS, n)
        if slot >= 0:
            lo = tl.maximum(lo, _begin(part, NEAR, FAR, EDGE))
            hi = tl.minimum(hi, _begin(part + 1, NEAR, FAR, EDGE))

        heads = head * G + m % G
        q_at = (first + token).to(tl.int64)[:, None] * q_token + heads[:, None] * q_head + c[None, :]
        q_mask = inside[:, None] & (c < C)[None, :]
        q_MC = tl.load(q + q_at, mask=q_mask, other=0.0).to(factor_kind)

        most = tl.full([QUERIES], -float("inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        sums = tl.zeros([QUERIES, CP], tl.float32)
        most_p, total_p, sums_p = most, total, sums
        last = (hi + KEYS - 1) // KEYS
        for t in range(bound(lo // KEYS, INTERPRETED), bound(last, INTERPRETED)):
            at = t * KEYS + tl.arange(0, KEYS)
            live = at < end  # behind the end lies what a former owner left, in the table and in the pool
            if WINDOW > 0:  # and before the window a later one's
                live = live & (at >= lo)
            block = tl.load(column + tl.minimum(at // B, P - 1), mask=live, other=0).to(tl.int64)
            kv_at = (block * BLOCK + ((at % B) * TOKEN + head * HEAD + SKIP))[:, None] + c[None, :]
            kv_mask = live[:, None] if CP == C else live[:, None] & (c < C)[None, :]
            k_NC = tl.load(k + kv_at, mask=kv_mask, other=0.0).to(factor_kind)
            if CODES:
                scale_at = block * (BLOCK // 4) + (head * (HEAD // 4) + at % B)
                k_scale_N = tl.load(k_scale + scale_at, mask=live, other=0.0)
                v_scale_N = tl.load(v_scale + scale_at, mask=live, other=0.0)
            score = tl.dot(q_MC, tl.trans(k_NC), input_precision="ieee")
            if CODES:
                score = score * k_scale_N[None, :]
            if CAP > 0:
                x = score * (scale / CAP)
                e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
                score = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
                factor = CAP * LOG2_E
            else:
                factor = scale * LOG2_E
            sees = at[None, :] <= position[:, None]
            if WINDOW > 0:
                sees = sees & (at[None, :] > position[:, None] - WINDOW)
            score = tl.where(sees, score, -float("inf"))
            top = tl.maximum(most_p, tl.max(score, 1) * factor)
            safe = tl.where(top == -float("inf"), 0.0, top)
            weight = tl.exp2(tl.fma(score, factor, -safe[:, None]))
            fade = tl.exp2(most_p - safe)
            total_p = tl.fma(total_p, fade, tl.sum(weight, 1))
            v_NC = tl.load(v + kv_at, mask=kv_mask, other=0.0)
            if CODES:
                if kind == tl.float16:  # a weight times a small scale has few bits left in float16
                    v_NC = (v_NC.to(tl.float32) * v_scale_N[:, None]).to(kind)
                else:
                    weight = weight * v_scale_N[None, :]
            weight = narrow(weight, kind, INTERPRETED).to(factor_kind)
            sums_p = tl.dot(weight, v_NC.to(factor_kind), sums_p * fade[:, None], input_precision="ieee")
            most_p = top
            behind = (t + 1) * KEYS
            if (t + 1 == last) | (behind % tl.where(behind <= EDGE, NEAR, FAR) == 0):
                most, total, sums = _merge(most, total, sums, most_p, total_p, sums_p)
                most_p = tl.full([QUERIES], -float("inf"), tl.float32)
                total_p = tl.zeros([QUERIES], tl.float32)
                sums_p = tl.zeros([QUERIES, CP], tl.float32)

        if slot >= 0:
            to = (slot + token * parts + part - part_0).to(tl.int64) * H + heads
            inside = inside & (lo < hi)
            tl.store(part_sums + to[:, None] * CP + c[None, :], sums, mask=inside[:, None])
            tl.store(part_most + to * 2, most, mask=inside)
            tl.store(part_most + to * 2 + 1, total, mask=inside)
        else:
            o_MC = _finish(most, total, sums, sink, heads, inside, SINKS)
            o_at = ((first + token).to(tl.int64) * H + heads)[:, None] * C + c[None, :]
            tl.store(out + o_at, narrow(o_MC, kind, INTERPRETED), mask=q_mask)


@triton.jit(do_not_specialize=["R", "slots", "few"])
def _collect(
    start,
    length,
    sink,
    out,
    part_sums,
    part_most,
    R,
    slots,
    few,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    EDGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Merges what `_attend` left in parts: an item is a token and a KV head."""
    H: tl.constexpr = K * G
    _, parts_R, n_R, slot_R = _plan(start, length, R, slots, few, K, ROWS, QUERIES // G, WINDOW, NEAR, FAR, EDGE)
    stop_R = tl.cumsum(tl.where(slot_R >= 0, n_R, 0) * K, 0)
    r_R = tl.arange(0, ROWS)
    g = tl.arange(0, GP)
    c = tl.arange(0, CP)
    for item in range(
        bound(tl.program_id(0), INTERPRETED), bound(tl.max(stop_R), INTERPRETED), bound(tl.num_programs(0), INTERPRETED)
    ):
        r = tl.sum((stop_R <= item).to(tl.int32))
        piece = item - tl.max(tl.where(stop_R <= item, stop_R, 0))
        slot = tl.sum(tl.where(r_R == r, slot_R, 0))
        parts = tl.sum(tl.where(r_R == r, parts_R, 0))
        first = tl.load(start + r)
        n = tl.load(start + r + 1) - first
        end = tl.load(length + r)
        token = piece // K
        heads = (piece % K) * G + g
        inside = g < G
        position = end - n + token
        part_0 = _part_of(_seen_from(end - n, WINDOW), NEAR, FAR, EDGE)
        lo = _part_of(_seen_from(position, WINDOW), NEAR, FAR, EDGE)
        hi = _part_of(position, NEAR, FAR, EDGE) + 1
        most = tl.full([GP], -float("inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        sums = tl.zeros([GP, CP], tl.float32)
        for part in tl.range(bound(lo, INTERPRETED), bound(hi, INTERPRETED), loop_unroll_factor=4):
            at = (slot + token * parts + part - part_0).to(tl.int64) * H + heads
            sums_p = tl.load(part_sums + at[:, None] * CP + c[None, :], mask=inside[:, None], other=0.0)
            most_p = tl.load(part_most + at * 2, mask=inside, other=0.0)
            total_p = tl.load(part_most + at * 2 + 1, mask=inside, other=0.0)
            most, total, sums = _merge(most, total, sums, most_p, total_p, sums_p)
        o_GC = _finish(most, total, sums, sink, heads, inside, SINKS)
        o_at = ((first + token).to(tl.int64) * H + heads)[:, None] * C + c[None, :]
        tl.store(out + o_at, narrow(o_GC, out.dtype.element_ty, INTERPRETED), mask=inside[:, None] & (c < C)[None, :])


def launches(
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
    out: Tensor,
    tiles: Tiles,
    multiprocessors: int,
) -> list[Launch]:
    """The kernels that compute attention into `out`, from shapes alone."""
    K, C = heads_of(k_pool, v_pool)
    T, H, G = q.shape[0], q.shape[1], q.shape[1] // K
    R, P = row.shape[0], table.shape[1]
    codes = k_pool.dim() == 3
    B = ROUNDED_BLOCK if codes else k_pool.shape[1]
    CP, most = max(16, triton.next_power_of_2(C)), tiles.parts(P * B)
    slots = slots_of(tiles, T, P * B, H, C)
    programs = multiprocessors * tiles.programs
    scales = (k_pool.view(torch.float32), v_pool.view(torch.float32)) if codes else (k_pool, v_pool)
    part_sums = torch.empty((slots, H, CP), dtype=torch.float32, device=q.device)
    part_most = torch.empty((slots, H, 2), dtype=torch.float32, device=q.device)
    # Two sizes of a plan serve all usual batches, so warming up compiles few kernels.
    rows = 64 if R <= 64 else max(512, triton.next_power_of_2(R))
    common = {
        "K": K,
        "G": G,
        "C": C,
        "CP": CP,
        "ROWS": rows,
        "QUERIES": tiles.queries,
        "NEAR": tiles.near,
        "FAR": tiles.far,
        "EDGE": tiles.edge,
        "WINDOW": window,
        "SINKS": sink is not None,
        "INTERPRETED": environment.triton_interpreted(),
    }
    end = q if sink is None else sink
    attend = Launch(
        _attend,
        (max(1, min(programs, T * K * most)),),
        (q, k_pool, v_pool, *scales, table, row, start, length, end, out, part_sums, part_most),
        (R, P, slots, programs, scale, q.stride(0), q.stride(1)),
        common | {"B": B, "KEYS": tiles.keys, "CAP": soft_cap, "CODES": codes},
        {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False},
    )
    collect = Launch(
        _collect,
        (max(1, min(multiprocessors * tiles.merge_programs, T * K)),),
        (start, length, end, out, part_sums, part_most),
        (R, slots, programs),
        common | {"GP": triton.next_power_of_2(G)},
        {"num_warps": tiles.merge_warps, "enable_fp_fusion": False},
    )
    return [attend, collect] if slots else [attend]


def paged_attention(
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
    tiles: Tiles | None = None,
    programs: int | None = None,
) -> Tensor:
    """See `PAGED_ATTENTION.doc`. `tiles` and `programs` (multiprocessors to fill) are for tuning and tests."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not len(q):
        return out
    K, C = heads_of(k_pool, v_pool)
    assert q.shape[2] == C and q.shape[1] % K == 0 and scale > 0, (q.shape, K, C, scale)
    assert k_pool.is_contiguous() and v_pool.is_contiguous() and k_pool.dtype == v_pool.dtype
    assert all(x.dtype == torch.int32 for x in (table, row, start, length))
    assert sink is None or sink.is_contiguous()
    q = q if q.stride(2) == 1 else q.contiguous()
    table, row, start, length = (x.contiguous() for x in (table, row, start, length))
    tiles = tiles or _chosen(q, k_pool.dtype, q.shape[1] // K)
    programs = programs or multiprocessors(q.device)
    at = (table, row, start, length)
    for launch in launches(q, k_pool, v_pool, *at, scale, window, soft_cap, sink, out, tiles, programs):
        launch()
    return out
