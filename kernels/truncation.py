"""Where a row's ranking is cut (min_p, top_k, top_p), and masks of allowed tokens: contracts and references in torch.

All three parameters keep the first so many tokens of one ranking, largest logit first and ties by lowest id. So the
answer of `truncate` is one token: the last that is kept. Nothing of the size of the vocabulary is written.

top_p adds up probabilities. Floating-point sums depend on their order, hence on how a backend cuts up the row, and two
backends would disagree about the token that crosses. Here a token's weight is an integer, the whole part of
2^40 exp((x - max) / T) with `exp32` spelled out in float32 steps: sums are exact in any order, up to 2^22 tokens. What
is lost below 2^-40 of the largest makes at most 1.4e-7 of it for 151,936 tokens, as much as float32 rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract
from fnengine.kernels.noise import log32

SCALE = 2.0**40
"""Weight of the most likely token."""
LEAST_MIN_P = 2.0**-126
"""Smaller ones count as this: `log32` takes normal numbers."""
MAGIC = 12582912.0
"""1.5 * 2^23: adding it leaves the nearest integer in the low bits."""
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
"""exp(r) = 1 + r + r^2 P(r), highest power first. Source: Cephes `expf` (Moshier)."""
AT_ONCE = 1 << 17
"""Logits that the reference ranks together on CPU."""


def exp32(x: Tensor) -> Tensor:
    """e^x for float32 x <= 0, within 2 ulp down to -30 and constant from there; each step rounded to float32.

    x = n ln 2 + r, |r| <= ln 2 / 2.
    """
    x = x.clamp(min=-30.0)
    shifted = x * 1.44269504088896341 + MAGIC
    n = shifted - MAGIC
    r = x - n * 0.693359375
    r = r + n * 2.12194440e-4
    p = torch.full_like(r, EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + c
    e = (p * (r * r) + r) + 1.0
    return (e.view(torch.int32) + (n.int() << 23)).view(torch.float32)


def weights(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """[R, V] int64 weights of tokens, 2^40 for the most likely one, 0 below e^-27.7 of it; T > 0."""
    top = logits_RV.amax(1, keepdim=True)
    below = torch.where(logits_RV == top, 0.0, (logits_RV - top) / temperature_R[:, None])
    return (exp32(below) * SCALE).long()


def truncate(logits_RV: Tensor, temperature_R: Tensor, min_p_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """See `TRUNCATE.doc`."""
    R, V = logits_RV.shape
    last = torch.full((R,), -1, dtype=torch.int32, device=logits_RV.device)
    n = max(1, AT_ONCE // V) if logits_RV.device.type == "cpu" else max(1, R)
    for part in (slice(i, i + n) for i in range(0, R, n)):
        given = (x[part] for x in (logits_RV, temperature_R, min_p_R, top_k_R, top_p_R))
        last[part] = _truncate(*given)
    return last


def _truncate(logits_RV: Tensor, T: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    V = logits_RV.shape[1]
    x, order = (logits_RV + 0.0).sort(dim=1, descending=True, stable=True)  # -0 is 0
    by_p, by_k, by_mass = min_p > 0, (top_k > 0) & (top_k < V), top_p < 1
    live = (T > 0) & (by_p | by_k | by_mass) & (x[:, 0] > -torch.inf)
    T = torch.where(T > 0, T, 1.0)
    floor = x[:, 0] + T * log32(min_p.clamp(min=LEAST_MIN_P))
    n = torch.where(by_p, (x >= floor[:, None]).sum(1), V)
    n = torch.where(by_k, n.minimum(top_k), n)
    weight = torch.where(torch.arange(V, device=x.device) < n[:, None], weights(x, T), 0)
    mass = weight.cumsum(1)
    goal = (top_p.double() * mass[:, -1].double()).ceil().long().clamp(min=1)
    n = torch.where(by_mass, (mass < goal[:, None]).sum(1) + 1, n)
    return torch.where(live, order.gather(1, n.long()[:, None] - 1)[:, 0], -1).int()


def _examples(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for R, V in ((1, 1), (5, 37), (7, 1000), (2, 2100), (0, 50)):
        logits = torch.randn(R, V, generator=g) * torch.tensor([3.0, 0.01, 30.0])[torch.arange(R) % 3, None]
        if R > 4 and V > 40:
            logits[0, torch.randint(0, V, (V // 3,), generator=g)] = -torch.inf
            logits[1] = (logits[1] * 100).round() / 4
            logits[2] = 1.5
            logits[3] = -torch.inf
            logits[4, torch.randint(0, V, (V // 2,), generator=g)] = 0.0
            logits[4, torch.randint(0, V, (V // 2,), generator=g)] = -0.0
        row = torch.arange(R)
        yield {
            "logits_RV": logits,
            "temperature_R": torch.tensor([0.7, 1.0, 1.3, 0.01, 100.0, 0.0])[(row + seed) % 6],
            "min_p_R": torch.tensor([0.0, 0.001, 0.0, 0.3, 0.0])[(row + seed) % 5],
            "top_k_R": torch.tensor([0, 5, 0, 40, V, 1, V + 3], dtype=torch.int32)[(2 * row + seed) % 7],
            "top_p_R": torch.tensor([0.9, 1.0, 1.0 - 2**-24, 1e-6, 0.5])[(3 * row + seed) % 5],
        }


TRUNCATE = Contract(
    name="truncate",
    doc="""(logits_RV float32, temperature_R float32, min_p_R float32, top_k_R int32, top_p_R float32) -> last_R int32.

    The lowest-ranked token that is kept, in the ranking by falling logits, ties by lowest id; -1 where nothing is asked
    of a row: T = 0, all logits -inf, or neutral parameters (min_p 0, top_k 0 or from V up, top_p 1). In this order:
    min_p keeps logits >= max + T log(min_p), in float32 with `philox.log32`; top_k the first k of these; top_p the
    shortest beginning of what is left whose weight is at least top_p of all that is left. Weights are the integers of
    `weights`, and the product of top_p and their sum is float64, so every backend gives the same token. Logits must not
    be NaN.""",
    reference=truncate,
    mutates=(),
    examples=_examples,
    tolerance={torch.float32: (0.0, 0.0)},
)


def apply_mask(logits_RV: Tensor, mask_RW: Tensor) -> Tensor:
    """See `APPLY_MASK.doc`."""
    V = logits_RV.shape[1]
    bits = torch.arange(32, device=mask_RW.device, dtype=torch.int32)
    allowed = (mask_RW[:, :, None] >> bits & 1).flatten(1)[:, :V]
    return torch.where(allowed != 0, logits_RV, -torch.inf)


def _examples_mask(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for R, V in ((1, 1), (3, 32), (4, 1000), (2, 4099), (0, 50)):
        mask = torch.randint(-(2**31), 2**31, (R, -(-V // 32)), generator=g).int()
        mask[: R // 2, ::3] = -1
        mask[R // 2 :, 1::3] = 0
        yield {"logits_RV": torch.randn(R, V, generator=g), "mask_RW": mask}


APPLY_MASK = Contract(
    name="apply_mask",
    doc="""(logits_RV float32, mask_RW int32) -> logits_RV, W = ceil(V / 32).

    -inf where bit v % 32 of word v // 32 is 0, counted from the least significant; bits beyond V mean nothing.""",
    reference=apply_mask,
    mutates=(),
    examples=_examples_mask,
    tolerance={torch.float32: (0.0, 0.0)},
)
