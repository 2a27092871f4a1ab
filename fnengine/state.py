"""State, Batch and Out: the device side of a step, and the pure function that derives positions from them.

Dimension letters: T new tokens, R batch rows, M state rows, P blocks a row, N blocks in pool, B tokens a block, K KV
heads, C head width, V vocabulary, J bias entries a row, S longest sequence. The last state row (index M) is the null
row and block 0 is the null block, so padding needs no branch: it reads and writes where nobody looks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fnengine.graphs.bucket import Bucket
from fnengine.host.step import Ask
from fnengine.tree import static


@dataclass(frozen=True)
class Rows:
    """What the device knows of each row. Donated to the step, which writes it in place."""

    length: Tensor
    """[M+1] int32 tokens whose KV is in the pool."""
    table: Tensor
    """[M+1, P] int32 block table; unused columns are 0, the null block."""
    history: Tensor
    """[M+1, S+1] int32 token at each position; history[row, length] is the newest, not yet computed, token."""
    prompt_len: Tensor
    """[M+1] int32"""
    temperature: Tensor
    """[M+1] float32; 0 means argmax."""
    top_k: Tensor
    """[M+1] int32; 0 means all."""
    top_p: Tensor
    """[M+1] float32"""
    min_p: Tensor
    """[M+1] float32"""
    frequency: Tensor
    """[M+1] float32"""
    presence: Tensor
    """[M+1] float32"""
    repetition: Tensor
    """[M+1] float32"""
    seed: Tensor
    """[M+1] int64, the 64 bits of the seed"""
    bias_id: Tensor
    """[M+1, J] int32 token ids, -1 where unused."""
    bias: Tensor
    """[M+1, J] float32 added to that token's logit ..."""
    bias_until: Tensor
    """[M+1, J] int32 ... while choosing positions before this one."""


@dataclass(frozen=True)
class Pool:
    """KV of one layer, N blocks of it; what a block looks like inside is `kernels.Ops.kv`'s to say.

    Separate tensors, never views of one: each is donated on its own.
    """

    k: Tensor
    """[N, ...]"""
    v: Tensor
    """[N, ...]"""


@dataclass(frozen=True)
class State:
    pool: tuple[Pool, ...]
    """One per layer."""
    rows: Rows


@dataclass(frozen=True)
class Batch:
    """A staged `StepInput`, padded to its bucket; row edits, swaps and copies of blocks have been done by then.

    Padding rows have row = M, and the last of them owns all padding tokens.
    """

    row: Tensor
    """[R] int32"""
    start: Tensor
    """[R+1] int32"""
    token: Tensor
    """[T] int32, or -1 for the row's newest token."""
    emit: Tensor
    """[R] int32"""
    target: Tensor | None
    """[T] int32 or None, see `StepInput.target`."""
    ask: Ask = static(default=Ask())


@dataclass(frozen=True)
class Packed:
    """A `Batch` in one piece: one copy brings it to a device, and one buffer holds it for a captured step."""

    ints: Tensor
    """[n] int32: row, start, token, emit, and target where the ask has one, each where `packed_parts` says"""
    bucket: Bucket = static()
    ask: Ask = static(default=Ask())

    def batch(self) -> Batch:
        """Views of the parts."""
        row, start, token, emit, target = (self.ints[part] for part in packed_parts(self.bucket, self.ask))
        return Batch(row, start, token, emit, None if self.ask.score is None else target, self.ask)


ALIGNED = 4
"""Every part of a packed batch begins at a multiple of so many integers: 16 bytes. On a GPU a kernel is compiled once
more for an address that is not such a multiple, and Inductor's code copies what lies at one, in every layer."""


def packed_parts(bucket: Bucket, ask: Ask) -> list[slice]:
    """Where the parts of `Packed.ints` lie; the last one ends it."""
    T, R = bucket.tokens, bucket.rows
    parts, at = [], 0
    for n in (R, R + 1, T, R, 0 if ask.score is None else T):
        parts.append(slice(at, at + n))
        at += -(-n // ALIGNED) * ALIGNED
    return parts


@dataclass(frozen=True)
class Where:
    """Derived on the device, once a step, for all layers."""

    row: Tensor
    """[R] int32 state row"""
    start: Tensor
    """[R+1] int32"""
    row_T: Tensor
    """[T] int64 state row of each token"""
    position: Tensor
    """[T] int32 index of the token in its sequence"""
    slot: Tensor
    """[T] int32 block * B + offset: where its KV goes"""
    length: Tensor
    """[R] int32 KV length including the new tokens"""
    table: Tensor
    """[M+1, P] int32, the rows' own"""


@dataclass(frozen=True)
class Top:
    """Log-probabilities, float32."""

    chosen: Tensor
    """[n]"""
    ids: Tensor
    """[n, k] int32"""
    values: Tensor
    """[n, k]"""


@dataclass(frozen=True)
class Out:
    token: Tensor
    """[R, W] int32"""
    count: Tensor
    """[R] int32"""
    logprobs: Top | None = None
    """n = R"""
    score: Top | None = None
    """n = T"""
    logits: Tensor | None = None
    """[R, V] or [T, V] float32"""


def locate(rows: Rows, batch: Batch, block: int) -> Where:
    """Positions, slots and lengths of a batch, from the rows' lengths and tables. Pure.

    A padding token beyond the null row's table is clamped to its last column, which is the null block too.
    """
    T = batch.token.shape[0]
    index = torch.arange(T, device=batch.token.device, dtype=torch.int32)
    r = torch.searchsorted(batch.start, index, right=True).sub_(1)
    row_T = batch.row[r].long()
    position = rows.length[row_T] + index - batch.start[r]
    column = (position // block).clamp_(max=rows.table.shape[1] - 1).long()
    slot = rows.table[row_T, column] * block + position % block
    length = rows.length[batch.row.long()] + batch.start[1:] - batch.start[:-1]
    return Where(batch.row, batch.start, row_T, position, slot, length, rows.table)
