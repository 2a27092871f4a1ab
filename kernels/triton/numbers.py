# pyright: reportArgumentType=false, reportReturnType=false
"""Roundings that kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, kind: tl.constexpr, INTERPRETED: tl.constexpr):
    """x (float32) rounded to the nearest of `kind`, ties to even. The interpreter cuts bfloat16 off, so there the bits
    are rounded first."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000, bits)
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def whole(x):
    """x rounded to a whole number, ties to even, where |x| < 2^22. Needs contraction off: x may be a product."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3(x):
    """x (float32) as the bits of a float8_e4m3fn: to the nearest, ties to even, at most 448; NaN stays NaN.

    By integers, so that every card and the interpreter have the same."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = whole(size * 512.0).to(tl.uint32)
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def bound(x, INTERPRETED: tl.constexpr):
    """x, an integer, as a bound of a loop, used where it stands (an assignment makes it a tensor again). The
    interpreter's scalars are arrays of one element, which NumPy >= 2.4 does not take for an integer."""
    if INTERPRETED:
        return x.handle.data.item()
    else:
        return x
