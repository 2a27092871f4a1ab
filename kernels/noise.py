"""Choosing a token with counter-based Gumbel noise: contract and plain-torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract
from fnengine.kernels.philox import (
    KEY0,
    KEY1,
    LN2_HIGH,
    LN2_LOW,
    LOG_COEFFICIENTS,
    MUL0,
    MUL1,
    ROUNDS,
    SQRT_HALF,
)

_LOW = 0xFFFFFFFF


def _first_word(c0: Tensor, c1: Tensor, c2: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """First word of Philox4x32-10 of (c0, c1, c2, 0); int64 tensors that hold 32-bit words, broadcast together.

    Products wrap modulo 2^64, and after the mask an arithmetic shift gives the same high word as a logical one.
    """
    c3: Tensor | int = 0
    for _ in range(ROUNDS):
        p0, p1 = c0 * MUL0, c2 * MUL1
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + KEY0) & _LOW, (k1 + KEY1) & _LOW
    return c0


def log32(x: Tensor) -> Tensor:
    """`philox.log32`, step by step in torch."""
    bits = x.view(torch.int32)
    m = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    small = m < SQRT_HALF
    e = ((bits >> 23) - 126 - small.int()).float()
    f = torch.where(small, m + m, m) - 1.0
    z = f * f
    y = torch.full_like(f, LOG_COEFFICIENTS[0])
    for c in LOG_COEFFICIENTS[1:]:
        y = y * f + c
    y = y * f * z
    y = y + e * LN2_LOW
    y = y - z * 0.5
    return (f + y) + e * LN2_HIGH


def uniform(seed_R: Tensor, position_R: Tensor, stream: int) -> Tensor:
    """One float32 in (0, 1) a row, `philox.philox_uniform` of token id 0."""
    seed, position = seed_R.long(), position_R.long() & _LOW
    other = torch.full_like(position, stream & _LOW)
    word = _first_word(torch.zeros_like(position), position, other, seed & _LOW, (seed >> 32) & _LOW)
    return ((word >> 9).float() + 0.5) * 2.0**-23


def gumbel_noise(seed_R: Tensor, position_R: Tensor, stream: int, V: int) -> Tensor:
    """Gumbel noise [R, V] float32, equal bit for bit to `philox.gumbel` row by row."""
    ids = torch.arange(V, device=seed_R.device, dtype=torch.int64)[None, :]
    seed, position = seed_R.long()[:, None], position_R.long()[:, None] & _LOW
    other = torch.full_like(position, stream & _LOW)
    word = _first_word(ids, position, other, seed & _LOW, (seed >> 32) & _LOW)
    u = ((word >> 9).float() + 0.5) * 2.0**-23
    return -log32(-log32(u))


def kept(logits_RV: Tensor, last_R: Tensor) -> Tensor:
    """[R, V] whether truncation keeps a token: it is ranked no lower than `last_R`, ties going to the lowest id."""
    least = logits_RV.gather(1, last_R.clamp(min=0).long()[:, None])
    ids = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return (logits_RV > least) | (logits_RV == least) & (ids <= last_R[:, None]) | (last_R < 0)[:, None]


def gumbel_argmax(
    logits_RV: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    position_R: Tensor,
    stream: int,
    last_R: Tensor | None = None,
) -> Tensor:
    """See `GUMBEL_ARGMAX.doc`."""
    V = logits_RV.shape[1]
    logits = logits_RV.float()
    if last_R is not None:
        logits = torch.where(kept(logits, last_R), logits, -torch.inf)
    if logits.device.type == "cpu":
        token = logits.argmax(1)
        warm = (temperature_R > 0).nonzero()[:, 0]
        for r in warm.split(max(1, 2**17 // V)):  # few enough rows that their words stay in cache
            token[r] = (logits[r] / temperature_R[r, None] + gumbel_noise(seed_R[r], position_R[r], stream, V)).argmax(
                1
            )
        return token.int()
    warm = (temperature_R > 0)[:, None]
    scaled = logits / torch.where(warm, temperature_R[:, None], 1.0)
    noisy = scaled + gumbel_noise(seed_R, position_R, stream, V)
    return torch.where(warm, noisy, logits).argmax(1).int()


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for R, V in ((1, 1), (3, 37), (5, 1000), (2, 4099), (0, 50)):
        logits = torch.randn(R, V, generator=g) * 3
        if R and V > 40:
            logits[0, torch.randint(0, V, (V // 3,), generator=g)] = -torch.inf
            logits[-1] = -torch.inf
        yield {
            "logits_RV": logits,
            "temperature_R": torch.tensor([0.7, 0.0, 1.3, 0.01, 9.0])[torch.arange(R) % 5],
            "seed_R": torch.randint(-(2**62), 2**62, (R,), generator=g),
            "position_R": torch.randint(0, 5000, (R,), generator=g, dtype=torch.int32),
            "stream": int(R == 3),
            "last_R": None if R == 1 else torch.arange(R, dtype=torch.int32) * 7 % V - 1,
        }


GUMBEL_ARGMAX = Contract(
    name="gumbel_argmax",
    doc="""(logits_RV float32, temperature_R float32, seed_R int64, position_R int32, stream int, last_R int32 or None)
    -> token_R int32.

    argmax over tokens of logits / T + Gumbel where T > 0, else argmax of logits; ties go to the lowest id. A logit of
    -inf wins only when all are -inf, then id 0. Noise is `philox.gumbel`, whose float32 steps a backend follows one
    by one, hence equal tokens. Logits must not be NaN. Tokens ranked below token `last_R` (smaller logits, or equal
    ones with higher ids: `kept`) count as -inf, unless it is -1: it is what `truncate` gives.""",
    reference=gumbel_argmax,
    mutates=(),
    examples=_examples,
    tolerance={torch.float32: (0.0, 0.0)},
)
