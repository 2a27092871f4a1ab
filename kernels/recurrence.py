"""What layers with a state do over the new tokens of rows: the contracts and the plain-torch references.

Dimension letters: S states (rows and kept ones), X channels of the convolution, Y its taps, G heads of q and k, H heads
of v, C channels of q and k, P channels of v, M rows, K tokens of a note. Everything is float32. A row whose new tokens
are all of its tokens begins from zeros, whatever its state holds.

A state cannot be cut, so it takes in no token that is only guessed. What such tokens bring is noted instead:

    tokens    t t t t | n g g g          n the newest token, g guessed after it; 1 of them turns out to be right
    state           ^ -> ^               takes in n and notes the three g; then behind = 1
    next step          ^ g n             takes in the first of what was noted, then its new tokens

So the next step takes in the guesses that were right, from what was given for them: their bits are those of tokens that
nobody guessed. A row without new tokens does so, too.
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
    heard_MKX: Tensor,
    row_R: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    behind_M: Tensor,
    guessed_R: Tensor,
) -> Tensor:
    """See `CAUSAL_CONV.doc`."""
    back, device, row_R = weight_XY.shape[1] - 1, x_TX.device, row_R.long()
    first_R, new_R = start_R1[:-1].long(), (start_R1[1:] - start_R1[:-1]).long()
    begins_R = (length_R == new_R) & (new_R > 0)
    behind_R = torch.where(begins_R, 0, behind_M[row_R]).long()
    tail_RYX = torch.where(begins_R[:, None, None], 0.0, tail_SYX[row_R])
    old_RZX = torch.cat([tail_RYX, heard_MKX[row_R]], 1)  # a row's new tokens follow the first back + behind of these
    index_T = torch.arange(len(x_TX), device=device)
    r_T = torch.searchsorted(start_R1, index_T.int(), right=True) - 1
    place_T = index_T - first_R[r_T]
    y_TX = torch.zeros_like(x_TX, memory_format=torch.contiguous_format)
    for j in range(back + 1):
        from_T = place_T - back + j  # where this tap looks, in the row's new tokens; before them it is in the old ones
        old_TX = old_RZX[r_T, from_T.clamp(max=-1) + back + behind_R[r_T]]
        new_TX = x_TX[(index_T - back + j).clamp(min=0)]
        y_TX += weight_XY[:, j] * torch.where((from_T >= 0)[:, None], new_TX, old_TX)
    if not len(x_TX):
        x_TX = x_TX.new_zeros(1, x_TX.shape[1])  # nobody reads it
    sure_R = new_R - guessed_R
    from_RY = sure_R[:, None] - back + torch.arange(back, device=device)
    here_RYX = x_TX[(first_R[:, None] + from_RY).clamp(min=0)]
    at_RY = (from_RY.clamp(max=-1) + back + behind_R[:, None])[:, :, None]
    tail_SYX[row_R] = torch.where((from_RY >= 0)[:, :, None], here_RYX, old_RZX.gather(1, at_RY.expand_as(tail_RYX)))
    k_K = torch.arange(heard_MKX.shape[1], device=device)
    from_RK = (first_R + sure_R)[:, None] + k_K
    guesses_RKX = x_TX[from_RK.clamp(max=len(x_TX) - 1)]
    heard_MKX[row_R] = torch.where((k_K < guessed_R[:, None])[:, :, None], guesses_RKX, heard_MKX[row_R])
    return y_TX if bias_X is None else y_TX + bias_X


def gated_scan(
    q_TGC: Tensor,
    k_TGC: Tensor,
    v_THP: Tensor,
    decay_TH: Tensor,
    beta_TH: Tensor | None,
    memory_SHCP: Tensor,
    noted_MKJ: Tensor,
    row_R: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    behind_M: Tensor,
    guessed_R: Tensor,
) -> Tensor:
    """See `GATED_SCAN.doc`."""
    (_, G, C), (_, H, P) = q_TGC.shape, v_THP.shape
    parts = [k_TGC.flatten(1), v_THP.flatten(1), decay_TH, *([] if beta_TH is None else [beta_TH])]
    note_TJ, sizes = torch.cat(parts, 1), [part.shape[1] for part in parts]
    o_THP = torch.zeros_like(v_THP, memory_format=torch.contiguous_format)

    def taken_in(m_HCP: Tensor, note_J: Tensor) -> Tensor:
        k_E, u_E, decay_H, *beta_H = note_J.split(sizes)
        k_HC, u_HP = k_E.view(G, C).repeat_interleave(H // G, 0), u_E.view(H, P)
        m_HCP = m_HCP * decay_H[:, None, None]
        if beta_H:
            u_HP = (u_HP - torch.einsum("hc,hcp->hp", k_HC, m_HCP)) * beta_H[0][:, None]
        return m_HCP + k_HC[:, :, None] * u_HP[:, None, :]

    starts, behind = start_R1.tolist(), behind_M.tolist()
    for row, a, b, length, guessed in zip(
        row_R.tolist(), starts, starts[1:], length_R.tolist(), guessed_R.tolist(), strict=False
    ):
        if a == b and not behind[row]:
            continue
        begins, sure = a < b and length == b - a, b - guessed
        m_HCP = torch.zeros_like(memory_SHCP[0]) if begins else memory_SHCP[row].clone()
        for j in range(0 if begins else behind[row]):
            m_HCP = taken_in(m_HCP, noted_MKJ[row, j])
        for t in range(a, b):
            if t == sure:
                memory_SHCP[row] = m_HCP
            m_HCP = taken_in(m_HCP, note_TJ[t])
            o_THP[t] = torch.einsum("hc,hcp->hp", q_TGC[t].repeat_interleave(H // G, 0), m_HCP)
        if sure == b:
            memory_SHCP[row] = m_HCP
        noted_MKJ[row, :guessed] = note_TJ[sure:b]
    return o_THP


def _rows(counts: list[int], before: list[int], noted: list[int], states: int, g: torch.Generator) -> dict[str, Tensor]:
    """Rows with so many new tokens each, and so many tokens before them, in states that are shuffled; so many are taken
    in of what was noted, and of two new tokens and more about half are guessed."""
    i32 = torch.int32
    row_R, behind_M = torch.randperm(states, generator=g)[: len(counts)], torch.zeros(states, dtype=i32)
    behind_M[row_R] = torch.tensor(noted).to(i32)
    return {
        "row_R": row_R.to(i32),
        "start_R1": torch.tensor([0, *counts]).cumsum(0).to(i32),
        "length_R": (torch.tensor(counts) + torch.tensor(before)).to(i32),
        "behind_M": behind_M,
        "guessed_R": torch.tensor([min(n // 2, MOST) for n in counts]).to(i32),
    }


MOST = 5
"""K of the examples."""

BATCHES = (
    ([1], [0], [0]),
    ([1, 1], [5, 9], [3, 0]),
    # rows that begin, one that only takes in what was noted, rows that go on, and padding without tokens
    ([3, 0, 7, 1, 2, 0], [0, 8, 4, 40, 1, 0], [0, 2, 5, 1, 0, 0]),
    ([19, 64], [0, 16], [0, 4]),
)


def _examples_conv(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for (counts, before, noted), X, Y in zip(BATCHES, (1, 70, 33, 128), (2, 4, 3, 4), strict=True):
        T, S = sum(counts), len(counts) + 3
        yield {
            "x_TX": torch.randn(T, X + 5, generator=g)[:, 2 : X + 2],  # rows are strided
            "weight_XY": torch.randn(X, Y, generator=g),
            "bias_X": torch.randn(X, generator=g) if X % 2 else None,
            "tail_SYX": torch.randn(S, Y - 1, X, generator=g),
            "heard_MKX": torch.randn(S, MOST, X, generator=g),
            **_rows(counts, before, noted, S, g),
        }


def _examples_scan(dtype: torch.dtype, seed: int) -> Iterator[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    for (counts, before, noted), (G, H, C, P), delta in zip(
        BATCHES, ((1, 1, 1, 1), (2, 6, 24, 8), (1, 3, 16, 70), (2, 2, 40, 128)), (True, False, True, True), strict=True
    ):
        T, S = sum(counts), len(counts) + 2
        fused = torch.randn(T, 2 * G * C + H * P, generator=g)  # of which q, k and v are slices
        q_TE, k_TE, v_TE = fused.split((G * C, G * C, H * P), dim=1)
        k_TE /= C**0.5 * 2  # with keys longer than 1 the delta rule would not be stable
        rates = 2 * H if delta else H
        noted_SKJ = torch.randn(S, MOST, G * C + H * P, generator=g) / (C**0.5 * 2)
        noted_SKJ = torch.cat([noted_SKJ, torch.rand(S, MOST, rates, generator=g)], 2)
        yield {
            "q_TGC": q_TE.unflatten(1, (G, C)),
            "k_TGC": k_TE.unflatten(1, (G, C)),
            "v_THP": v_TE.unflatten(1, (H, P)),
            "decay_TH": torch.rand(T, H, generator=g),
            "beta_TH": torch.rand(T, H, generator=g) if delta else None,
            "memory_SHCP": torch.randn(S, H, C, P, generator=g),
            "noted_MKJ": noted_SKJ,
            **_rows(counts, before, noted, S, g),
        }


CLOSE = {torch.float32: (1e-4, 1e-5)}
"""Sums of hundreds of tokens in another order."""

CAUSAL_CONV = Contract(
    name="causal_conv",
    doc="""(x_TX, weight_XY, bias_X or None, tail [S, Y - 1, X], heard [M, K, X], row_R, start_R1, length_R, behind_M,
    guessed_R int32) -> y_TX: channel by channel, the sum over taps j of weight[:, j] times the token Y - 1 - j before,
    plus the bias; writes the tails, and what was heard of guesses.

    Row r has the tokens start[r]:start[r+1], the last guessed[r] of which are guesses. Before them come the first
    behind[row[r]] of heard[row[r]], and before those its tail, tail[row[r]], Y - 1 tokens, newest last. Then the tail
    holds those before the guesses, and heard[row[r]] begins with these. The order of the sum is that of taps.""",
    reference=causal_conv,
    mutates=("tail_SYX", "heard_MKX"),
    examples=_examples_conv,
    tolerance=CLOSE,
)
GATED_SCAN = Contract(
    name="gated_scan",
    doc="""(q_TGC, k_TGC, v_THP, decay_TH, beta_TH or None, memory [S, H, C, P], noted [M, K, J], row_R, start_R1,
    length_R, behind_M, guessed_R int32) -> o_THP: what each token reads of its row's memory M, head by head, after it
    has changed it; writes the memory, as it is before the last guessed[r] tokens of the row, and notes of these.

        M := decay M;  u := beta (v - k^T M), or v without beta;  M := M + k u^T;  o := q^T M

    Before the row's tokens come the first behind[row[r]] of noted[row[r]]; a note is k, v, decay and, where there is
    one, beta. Heads of v share those of q and k in groups of H / G. With beta this is the gated delta rule (Yang et al.
    2024, arXiv 2412.06464), without it the recurrence of Mamba 2 (Dao and Gu 2024, arXiv 2405.21060).""",
    reference=gated_scan,
    mutates=("memory_SHCP", "noted_MKJ"),
    examples=_examples_scan,
    tolerance=CLOSE,
)
