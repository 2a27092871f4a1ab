# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# (Triton's functions take tensors and numbers for each other)
"""Where rows are cut, without a sort: four kernels, whose grids and memory follow from shapes.

    _peaks   the largest logit of each piece of a row
    _coarse  number and weight of tokens in 16 bins of (x - max) / T, a bin a unit wide, for each piece
    _gather  ids of the tokens in all bins down to the one where the row is cut, in order
    _cut     among these, by histograms over 16 parts of an interval of the floats' bits: at most 8 levels

Sums are of integers, so nothing depends on the pieces. A row that asks for nothing ends each kernel at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnengine.kernels.triton.noise import FLOATS, MOST, log32, splits

BINS = tl.constexpr(16)
BLOCK = 256
"""Tokens that a program bins at a time: [256, 16] counts and weights are 48 registers a thread of 8 warps."""
FOUND = 512
"""The same where a row has one program."""
INTERPRETED = 2048
"""The same in the interpreter, which takes as long for few tokens as for many."""
WORDS = 32


@triton.jit
def _weight(x, top, T):
    """int64 weight of logits: see `truncation.weights`."""
    y = tl.maximum(tl.where(x == top, 0.0, tl.div_rn(x - top, tl.zeros_like(x) + T)), -30.0)
    shifted = y * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = y - n * 0.693359375
    r = r + n * 2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    e = (p * (r * r) + r) + 1.0
    e = (e.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)
    return (e * 1099511627776.0).to(tl.int64)  # 2^40


@triton.jit
def _bin(x, top, T):
    """Bin of logits, the most likely first: whole units of T below the largest."""
    y = tl.where(x == top, 0.0, tl.div_rn(x - top, tl.zeros_like(x) + T))
    return tl.minimum(-y, 15.0).to(tl.int32)


@triton.jit
def _share(top_p, total):
    """Weight that a beginning of the ranking must reach."""
    share = top_p.to(tl.float64) * total.to(tl.float64)
    whole = share.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float64) < share).to(tl.int64), 1)


@triton.jit
def _wish(r, temperature, min_p, top_k, top_p, peaks, V, S, MOST: tl.constexpr):
    """(whether a row is cut, its largest logit, T, the least logit that min_p leaves, k, whether k and p are asked)"""
    T, low, k = tl.load(temperature + r), tl.load(min_p + r), tl.load(top_k + r)
    s = tl.arange(0, MOST)
    top = tl.max(tl.load(peaks + r * S + s, mask=s < S, other=-float("inf")), 0)
    by_k, by_mass = (k > 0) & (k < V), tl.load(top_p + r) < 1
    live = (T > 0) & ((low > 0) | by_k | by_mass) & (top > -float("inf"))
    floor = tl.where(low > 0, top + T * log32(tl.maximum(low, 1.1754943508222875e-38)), -float("inf"))
    return live, top, T, floor, k, by_k, by_mass


@triton.jit
def _peaks(logits, peaks, V, stride, length, BLOCK: tl.constexpr):
    r, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    begin, end = s * length, tl.minimum((s + 1) * length, V)
    while begin < end:
        id = begin + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(logits + r * stride + id, mask=id < V, other=-float("inf")))
        begin += BLOCK
    tl.store(peaks + r * tl.num_programs(1) + s, tl.max(most, 0))


@triton.jit
def _coarse(
    logits,
    temperature,
    min_p,
    top_k,
    top_p,
    peaks,
    counts,
    masses,
    V,
    stride,
    length,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    r, s, S = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    live, top, T, floor, _k, _by_k, _by_mass = _wish(r, temperature, min_p, top_k, top_p, peaks, V, S, MOST)
    if live:
        bins = tl.arange(0, BINS)
        count = tl.zeros((BLOCK, BINS), tl.int32)
        mass = tl.zeros((BLOCK, BINS), tl.int64)
        begin, end = s * length, tl.minimum((s + 1) * length, V)
        while begin < end:
            id = begin + tl.arange(0, BLOCK)
            x = tl.load(logits + r * stride + id, mask=id < V, other=-float("inf"))
            in_bin = (_bin(x, top, T)[:, None] == bins[None, :]) & ((id < V) & (x >= floor))[:, None]
            count += in_bin.to(tl.int32)
            mass += tl.where(in_bin, _weight(x, top, T)[:, None], 0)
            begin += BLOCK
        at = (r * S + s) * BINS + bins
        tl.store(counts + at, tl.sum(count, 0))
        tl.store(masses + at, tl.sum(mass, 0))


@triton.jit
def _decide(r, S, counts, masses, top_p, k, by_k, by_mass, MOST: tl.constexpr):
    """(bin where the row is cut, [MOST] tokens of each piece down to it, weight of all tokens, tokens to be kept if
    weights did not count)"""
    s, bins = tl.arange(0, MOST), tl.arange(0, BINS)
    at, there = (r * S + s)[:, None] * BINS + bins[None, :], (s < S)[:, None] & (bins >= 0)[None, :]
    count = tl.load(counts + at, mask=there, other=0)
    mass = tl.sum(tl.load(masses + at, mask=there, other=0), 0)
    in_bin = tl.sum(count, 0)
    total, n = tl.sum(mass, 0), tl.sum(in_bin, 0)
    goal = tl.where(by_k, tl.minimum(k, n), n)
    by_weight = tl.cumsum(mass, 0) >= _share(tl.load(top_p + r), total)
    by_number = tl.cumsum(in_bin, 0) >= goal
    reached = tl.where(by_mass & (by_k == 0), by_weight.to(tl.int32), by_number.to(tl.int32)) != 0
    cut = tl.min(tl.where(reached, bins, BINS - 1), 0)
    return cut, tl.sum(tl.where(bins[None, :] <= cut, count, 0), 1), total, goal


@triton.jit
def _gather(
    logits,
    temperature,
    min_p,
    top_k,
    top_p,
    peaks,
    counts,
    masses,
    ids,
    V,
    stride,
    length,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    r, s, S = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    live, top, T, floor, k, by_k, by_mass = _wish(r, temperature, min_p, top_k, top_p, peaks, V, S, MOST)
    if live:
        cut, pieces, _total, _goal = _decide(r, S, counts, masses, top_p, k, by_k, by_mass, MOST)
        piece = tl.arange(0, MOST)
        to = r * V + tl.sum(tl.where(piece < s, pieces, 0), 0)
        if tl.sum(tl.where(piece == s, pieces, 0), 0) > 0:
            begin, end = s * length, tl.minimum((s + 1) * length, V)
            while begin < end:
                id = begin + tl.arange(0, BLOCK)
                x = tl.load(logits + r * stride + id, mask=id < V, other=-float("inf"))
                kept = ((id < V) & (x >= floor) & (_bin(x, top, T) <= cut)).to(tl.int32)
                tl.store(ids + to + tl.cumsum(kept, 0) - 1, id, mask=kept != 0)
                to += tl.sum(kept, 0)
                begin += BLOCK


@triton.jit
def _key(x):
    """int64 that is larger for a larger float; -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _descend(row, ids, n, low, high, goal, top, T, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """(key, above): the largest key such that the measure of tokens with at least that key reaches `goal`, and the
    measure of those above it. The measure is the number of tokens or their weight; keys lie in [low, high]."""
    bins = tl.arange(0, BINS)
    above = tl.zeros((), tl.int64)
    shift = tl.full((), 28, tl.int64)
    while high > low:
        while ((high - low) >> shift) == 0:  # at 0 it is the difference itself
            shift -= 4
        measure = tl.zeros((BLOCK, BINS), tl.int64)
        begin = tl.full((), 0, tl.int32)
        while begin < n:
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(row + tl.load(ids + at, mask=at < n, other=0), mask=at < n, other=0.0)
            key = _key(x)
            inside = (at < n) & (key >= low) & (key <= high)
            in_bin = (((high - key) >> shift)[:, None] == bins[None, :]) & inside[:, None]
            if WEIGHED:
                measure += tl.where(in_bin, _weight(x, top, T)[:, None], 0)
            else:
                measure += in_bin.to(tl.int64)
            begin += BLOCK
        part = tl.sum(measure, 0)
        here = tl.min(tl.where(above + tl.cumsum(part, 0) >= goal, bins, BINS - 1), 0)
        above += tl.sum(tl.where(bins < here, part, 0), 0)
        high -= here.to(tl.int64) << shift
        low = tl.maximum(low, high - (tl.full((), 1, tl.int64) << shift) + 1)
        shift -= 4
    return high, above


@triton.jit(do_not_specialize=["S"])  # one kernel for every number of pieces
def _cut(
    logits,
    temperature,
    min_p,
    top_k,
    top_p,
    peaks,
    counts,
    masses,
    ids,
    last,
    V,
    stride,
    S,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    live, top, T, _floor, k, by_k, by_mass = _wish(r, temperature, min_p, top_k, top_p, peaks, V, S, MOST)
    if live:
        _bin_of_cut, pieces, total, goal = _decide(r, S, counts, masses, top_p, k, by_k, by_mass, MOST)
        n = tl.sum(pieces, 0)
        row, own = logits + r * stride, ids + r * V
        high = _key(top)
        least = tl.full((BLOCK,), 1 << 40, tl.int64)
        begin = tl.full((), 0, tl.int32)
        while begin < n:
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(row + tl.load(own + at, mask=at < n, other=0), mask=at < n, other=0.0)
            least = tl.where(at < n, tl.minimum(least, _key(x)), least)
            begin += BLOCK
        key = tl.min(least, 0)
        ties = tl.zeros((), tl.int64)
        if by_k | (by_mass == 0):
            key, above = _descend(row, own, n, key, high, goal.to(tl.int64), top, T, False, BLOCK)
            ties = goal.to(tl.int64) - above
        if by_mass:
            if by_k:  # what is left: tokens above the k-th, and as many equal ones as are needed
                sums = tl.zeros((BLOCK,), tl.int64)
                begin = tl.full((), 0, tl.int32)
                while begin < n:
                    at = begin + tl.arange(0, BLOCK)
                    x = tl.load(row + tl.load(own + at, mask=at < n, other=0), mask=at < n, other=0.0)
                    sums += tl.where((at < n) & (_key(x) > key), _weight(x, top, T), 0)
                    begin += BLOCK
                total = tl.sum(sums, 0) + ties * _weight_of(key, top, T)
            share = _share(tl.load(top_p + r), total)
            key, above = _descend(row, own, n, key, high, share, top, T, True, BLOCK)
            each = _weight_of(key, top, T)
            ties = (share - above + each - 1) // each
        seen = tl.zeros((), tl.int64)
        found = tl.full((), -1, tl.int32)
        begin = tl.full((), 0, tl.int32)
        while begin < n:
            at = begin + tl.arange(0, BLOCK)
            id = tl.load(own + at, mask=at < n, other=0)
            same = ((at < n) & (_key(tl.load(row + id, mask=at < n, other=0.0)) == key)).to(tl.int64)
            place = seen + tl.cumsum(same, 0)
            found = tl.maximum(found, tl.max(tl.where((same != 0) & (place == ties), id, -1), 0))
            seen += tl.sum(same, 0)
            begin += BLOCK
        tl.store(last + r, found)
    else:
        tl.store(last + r, -1)


@triton.jit
def _weight_of(key, top, T):
    """Weight of the logit that has this key."""
    bits = key.to(tl.int32)
    x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.max(_weight(tl.full((1,), 0.0, tl.float32) + x, top, T), 0)


def truncate(logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """See `TRUNCATE.doc`."""
    assert logits.dtype == temperature.dtype == min_p.dtype == top_p.dtype == torch.float32
    assert top_k.dtype == torch.int32, top_k.dtype
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    wishes = [x.contiguous() for x in (temperature, min_p, top_k, top_p)]
    R, V = logits.shape
    last = torch.empty(R, dtype=torch.int32, device=logits.device)
    if not R:
        return last
    block, found = (INTERPRETED, INTERPRETED) if logits.device.type == "cpu" else (BLOCK, FOUND)
    S, length = splits(R, V, block)

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    peaks = scratch(R, S, dtype=torch.float32)
    counts, masses = scratch(R, S, BINS.value, dtype=torch.int32), scratch(R, S, BINS.value, dtype=torch.int64)
    ids = scratch(R, V, dtype=torch.int32)
    sizes = {"MOST": MOST, "num_warps": 8}
    tables, stride = (peaks, counts, masses), logits.stride(0)
    _peaks[R, S](logits, peaks, V, stride, length, BLOCK=block, num_warps=4)
    _coarse[R, S](logits, *wishes, *tables, V, stride, length, BLOCK=block, **sizes, **FLOATS)
    _gather[R, S](logits, *wishes, *tables, ids, V, stride, length, BLOCK=block, **sizes, **FLOATS)
    _cut[(R,)](logits, *wishes, *tables, ids, last, V, stride, S, BLOCK=found, **sizes, **FLOATS)
    return last


@triton.jit
def _mask(logits, mask, out, V, stride, words, BLOCK: tl.constexpr):
    r, id = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(mask + r * words + id // 32, mask=id < V, other=0)
    x = tl.load(logits + r * stride + id, mask=id < V, other=0.0)
    tl.store(out + r * V + id, tl.where(((word >> (id % 32)) & 1) != 0, x, -float("inf")), mask=id < V)


def apply_mask(logits: Tensor, mask: Tensor) -> Tensor:
    """See `APPLY_MASK.doc`."""
    assert logits.dtype == torch.float32 and mask.dtype == torch.int32
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    R, V = logits.shape
    assert mask.shape == (R, triton.cdiv(V, WORDS)), (mask.shape, logits.shape)
    out = torch.empty(R, V, dtype=torch.float32, device=logits.device)
    if R and V:
        size = 2048
        _mask[R, triton.cdiv(V, size)](logits, mask.contiguous(), out, V, logits.stride(0), mask.shape[1], BLOCK=size)
    return out
