"""What layers with a state do over the new tokens of rows: the contracts and the plain-torch references.

Dimension letters: S states (rows and kept ones), X channels of the convolution, Y its taps, G heads of q and k, H heads
of v, C channels of q and k, P channels of v. Everything is float32. A row whose new tokens are all of its tokens begins
from zeros, whatever its state holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnengine.kernels.contract import Contract


def causal_conv(
    x_TX: Tensor,
    weight_XY: Tensor,
    bias_X: Tensor | None,
    tail_SYX: Tensor,
    row_R: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
) -> Tensor:
    """See `CAUSAL_CONV.doc`."""
    back, device = weight_XY.shape[1] - 1, x_TX.device
    first_R, new_R = start_R1[:-1].long(), (start_R1[1:] - start_R1[:-1]).long()
    begins_R = (length_R == new_R) & (new_R > 0)
    old_RYX = torch.where(begins_R[:, None, None], 0.0, tail_SYX[row_R.long()])
    index_T = torch.arange(len(x_TX), device=device)
    r_T = torch.searchsorted(start_R1, index_T.int(), right=True) - 1
    place_T = index_T - first_R[r_T]
    y_TX = torch.zeros_like(x_TX, memory_format=torch.contiguous_format)
    for j in range(back + 1):
        from_T = place_T - back + j  # where this tap looks, in the row's new tokens; before them it is in the tail
        old_TX = old_RYX[r_T, from_T.clamp(max=-1) + back]
        new_TX = x_TX[(index_T - back + j).clamp(min=0)]
        y_TX += weight_XY[:, j] * torch.where((from_T >= 0)[:, None], new_TX, old_TX)
    from_RY = new_R[:, None] - back + torch.arange(back, device=device)
    here_RYX = x_TX[(first_R[:, None] + from_RY).clamp(min=0)]
    there_RYX = old_RYX.gather(1, (from_RY + back).clamp(max=back - 1)[:, :, None].expand_as(old_RYX))
    tail_SYX[row_R.long()] = torch.where((from_RY >= 0)[:, :, None], here_RYX, there_RYX)
    return y_TX if bias_X is None else y_TX + bias_X


def gated_scan(
    q_TGC: Tensor,
    k_TGC: Tensor,
    v_THP: Tensor,
    decay_TH: Tensor,
    beta_TH: Tensor | None,
    memory_SHCP: Tensor,
    row_R: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
) -> Tensor:
    """See `GATED_SCAN.doc`."""
    many = v_THP.shape[1] // q_TGC.shape[1]
    q_THC, k_THC = q_TGC.repeat_interleave(many, 1), k_TGC.repeat_interleave(many, 1)
    o_THP = torch.zeros_like(v_THP, memory_format=torch.contiguous_format)
    for row, a, b, length in zip(
        row_R.tolist(), start_R1.tolist(), start_R1.tolist()[1:], length_R.tolist(), strict=False
    ):
        if a == b:
            continue
        m_HCP = torch.zeros_like(memory_SHCP[0]) if length == b - a else memory_SHCP[row].clone()
        for t in range(a, b):
            m_HCP *= decay_TH[t][:, None, None]
            u_HP = v_THP[t]
            if beta_TH is not None:
                u_HP = (u_HP - torch.einsum("hc,hcp->hp", k_THC[t], m_HCP)) * beta_TH[t][:, None]
            m_HCP += k_THC[t][:, :, None] * u_HP[:, None, :]
            o_THP[t] = torch.einsum("hc,hcp->hp", q_THC[t], m_HCP)
        memory_SHCP[row] = m_HCP
    return o_THP


def _rows(counts: list[int], before: list[int], states: int, g: torch.Generator) -> dict[str, Tensor]:
    """Rows with so many new tokens each, and so many tokens before them, in states that are shuffled."""
    i32 = torch.int32
    return {
        "row_R": torch.randperm(states, generator=g)[: len(counts)].to(i32),
        "start_R1": torch.tensor([0, *counts]).cumsum(0).to(i32),
        "length_R": (torch.tensor(counts) + torch.tensor(before)).to(i32),
    }


BATCHES = (
    ([1], [0]),
    ([1, 1], [5, 9]),
    ([3, 0, 7, 1, 2], [0, 0, 4, 40, 1]),  # rows that begin, rows that go on, and padding without tokens
    ([19, 64], [0, 16]),
)


def _examples_conv(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for (counts, before), X, Y in zip(BATCHES, (1, 70, 33, 128), (2, 4, 3, 4), strict=True):
        T, S = sum(counts), len(counts) + 3
        yield {
            "x_TX": torch.randn(T, X + 5, generator=g)[:, 2 : X + 2],  # rows are strided
            "weight_XY": torch.randn(X, Y, generator=g),
            "bias_X": torch.randn(X, generator=g) if X % 2 else None,
            "tail_SYX": torch.randn(S, Y - 1, X, generator=g),
            **_rows(counts, before, S, g),
        }


def _examples_scan(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for (counts, before), (G, H, C, P), delta in zip(
        BATCHES, ((1, 1, 1, 1), (2, 6, 24, 8), (1, 3, 16, 70), (2, 2, 40, 128)), (True, False, True, True), strict=True
    ):
        T, S = sum(counts), len(counts) + 2
        fused = torch.randn(T, 2 * G * C + H * P, generator=g)  # of which q, k and v are slices
        q_TE, k_TE, v_TE = fused.split((G * C, G * C, H * P), dim=1)
        k_TE /= C**0.5 * 2  # with keys longer than 1 the delta rule would not be stable
        yield {
            "q_TGC": q_TE.unflatten(1, (G, C)),
            "k_TGC": k_TE.unflatten(1, (G, C)),
            "v_THP": v_TE.unflatten(1, (H, P)),
            "decay_TH": torch.rand(T, H, generator=g),
            "beta_TH": torch.rand(T, H, generator=g) if delta else None,
            "memory_SHCP": torch.randn(S, H, C, P, generator=g),
            **_rows(counts, before, S, g),
        }


CLOSE = {torch.float32: (1e-4, 1e-5)}
"""Sums of hundreds of tokens in another order."""

CAUSAL_CONV = Contract(
    name="causal_conv",
    doc="""(x_TX, weight_XY, bias_X or None, tail [S, Y - 1, X], row_R, start_R1, length_R int32) -> y_TX: channel by
    channel, the sum over taps j of weight[:, j] times the token Y - 1 - j before, plus the bias; writes the tails.

    Row r has the tokens start[r]:start[r+1], and its tail, tail[row[r]], holds the Y - 1 tokens before them, newest
    last; then it holds those before the next ones. The order of the sum is that of taps.""",
    reference=causal_conv,
    mutates=("tail_SYX",),
    examples=_examples_conv,
    tolerance=CLOSE,
)
GATED_SCAN = Contract(
    name="gated_scan",
    doc="""(q_TGC, k_TGC, v_THP, decay_TH, beta_TH or None, memory [S, H, C, P], row_R, start_R1, length_R int32) ->
    o_THP: what each token reads of its row's memory M, head by head, after it has changed it; writes the memory.

        M := decay M;  u := beta (v - k^T M), or v without beta;  M := M + k u^T;  o := q^T M

    Heads of v share those of q and k in groups of H / G. With beta this is the gated delta rule (Yang et al. 2024,
    arXiv 2412.06464), without it the recurrence of Mamba 2 (Dao and Gu 2024, arXiv 2405.21060).""",
    reference=gated_scan,
    mutates=("memory_SHCP",),
    examples=_examples_scan,
    tolerance=CLOSE,
)
