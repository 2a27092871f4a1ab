"""Counter-based noise in NumPy: the meaning of every sampling backend.

Noise belongs to (seed, position, token), never to a generator's state, so a row's token does not depend on what else
was drawn. `log32` spells the logarithm out in IEEE float32 steps (no fused multiply-add, no library), so every
backend that follows it step by step has the same bits, and two backends never disagree about a token.
"""

from __future__ import annotations

import numpy as np

MUL0, MUL1 = 0xD2511F53, 0xCD9E8D57
KEY0, KEY1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
"""log(1 + f) = f - f^2/2 + f^3 P(f), highest power first. Source: Cephes `logf` (Moshier)."""
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln 2 in two parts; the high one has few bits, so that exponent * LN2_HIGH is exact."""
SQRT_HALF = 0.70710678118654752


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Four random words for each counter, Philox4x32 with ten rounds.

    Shapes: counter [..., 4] uint32, key [..., 2] uint32 -> [..., 4] uint32.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(counter[..., i]).astype(np.uint64) for i in range(4)]
    k = [np.asarray(key[..., i]).astype(np.uint64) for i in range(2)]
    for _ in range(ROUNDS):
        p0, p1 = c[0] * np.uint64(MUL0), c[2] * np.uint64(MUL1)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(KEY0)) & low, (k[1] + np.uint64(KEY1)) & low]
    return np.stack(np.broadcast_arrays(*c), axis=-1).astype(np.uint32)


def philox_uniform(seed: int, position: int, stream: int, ids: np.ndarray) -> np.ndarray:
    """Float32 uniforms in the open interval (0, 1), one per token id.

    The first word's top 23 bits x become (x + 0.5) / 2^23. With 24 bits, x + 0.5 would round to 2^24 for the last x,
    hence to 1.0 and to infinite Gumbel noise: about once in 110 tokens at a vocabulary of 152k.

    Args:
        seed: 64 bits; low word is key 0, high word key 1. Negative values mean their two's complement.
        position: index in the whole sequence of the token being chosen.
        stream: 0 for sampling; other uses of the same seed and position take other numbers.
        ids: [n] token ids.
    """
    ids = np.asarray(ids)
    counter = np.zeros((*ids.shape, 4), np.uint32)
    counter[..., 0] = ids.astype(np.int64) & 0xFFFFFFFF
    counter[..., 1] = int(position) & 0xFFFFFFFF
    counter[..., 2] = int(stream) & 0xFFFFFFFF
    seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
    word = philox4x32(counter, key)[..., 0]
    return ((word >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def log32(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive normal float32, within 2 ulp; each step rounded to float32.

    x = 2^e m with m in [sqrt(1/2), sqrt(2)); f = m - 1; log x = e ln 2 + log(1 + f).
    """
    f32 = np.float32
    bits = np.asarray(x, f32).view(np.int32)
    e = (bits >> 23) - 126
    m = ((bits & 0x007FFFFF) | 0x3F000000).view(f32)
    small = m < f32(SQRT_HALF)
    e = (e - small).astype(f32)
    f = m + np.where(small, m, f32(0)) - f32(1)
    z = f * f
    y = np.full_like(f, LOG_COEFFICIENTS[0])
    for c in LOG_COEFFICIENTS[1:]:
        y = y * f + f32(c)
    y = y * f * z
    y = y + e * f32(LN2_LOW)
    y = y - z * f32(0.5)
    return (f + y) + e * f32(LN2_HIGH)


def gumbel(seed: int, position: int, stream: int, ids: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise -log(-log(u)) in float32, one per token id, between -2.82 and 16.64."""
    return -log32(-log32(philox_uniform(seed, position, stream, ids)))
