"""State, Batch and Out: the device side of a step, and the pure function that derives positions from them.

Dimension letters: T new tokens, R batch rows, M state rows, P blocks a row, N blocks in pool, B tokens a block, K KV
heads, C head width, V vocabulary, J bias entries a row, S longest sequence. The last state row (index M) is the null
row and block 0 is the null block, so padding needs no branch: it reads and writes where nobody looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from fnengine.graphs.bucket import Bucket
from fnengine.host.request import MAX_ARGUMENTS, MAX_BAD, MAX_BIAS, MAX_BREAKERS, MAX_DRAFT, MAX_WATCHED, Sampling
from fnengine.host.step import BLOCK, Ask
from fnengine.kernels.layout import KVLayout, Shape, shapes_of
from fnengine.spec import (
    Attending,
    Mixer,
    ModelSpec,
    Recurrent,
    attentions,
    borrows,
    recurrents,
    shares,
    sight,
    state_bytes,
)
from fnengine.tree import static


@dataclass(frozen=True)
class Rows:
    """What the device knows of each row. Donated to the step, which writes it in place."""

    length: Tensor
    """[M+1] int32 tokens whose KV is in the pool."""
    table: Tensor
    """[M+1, P] int32 block table; unused columns are 0, the null block."""
    near: Tensor
    """[M+1, P] int32 table of window blocks: a column that nobody sees any more holds anything; [M+1, 0] where layers
    with a window lie in the same blocks as all others."""
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
    restricted: Tensor
    """[M+1] bool: only allowed tokens may be chosen ..."""
    allowed: Tensor
    """[M+1, ceil(V / 32)] int32 ... which have bit v % 32 of word v // 32: 19 KB a row at V = 151,936."""
    ngram: Tensor
    """[M+1] int32; no n tokens in a row come twice; 0 lets them."""
    dry_multiplier: Tensor
    """[M+1] float32; 0 turns DRY off."""
    dry_base: Tensor
    """[M+1] float32"""
    dry_allowed: Tensor
    """[M+1] int32"""
    dry_range: Tensor
    """[M+1] int32 last tokens that are looked at; -1 means all."""
    dry_breaker: Tensor
    """[M+1, 32] int32 token ids, -1 where unused."""
    typical_p: Tensor
    """[M+1] float32"""
    xtc_probability: Tensor
    """[M+1] float32"""
    xtc_threshold: Tensor
    """[M+1] float32"""
    bad_id: Tensor
    """[M+1, 512] int32 tokens of bad words, one word behind the other."""
    bad_at: Tensor
    """[M+1, 512] int32: of a word's last token minus its length, of the others their distance to it; 0: unused."""
    own: Tensor
    """[M+1, U] bool: which of the engine's own U processors are asked for."""
    own_args: Tensor
    """[M+1, U, 8] float32"""
    steer: Tensor
    """[M+1, S, D] float32: what is added to the row's residual stream after each of S declared layers."""
    watched: Tensor
    """[M+1, 128] int32 token ids whose log-probabilities are wanted, -1 where unused."""
    behind: Tensor | None = None
    """[M+1] int32, where layers have states: the last tokens of its length that these have noted and not taken in yet,
    guesses that turned out to be right."""


def empty_rows(
    M: int,
    *,
    columns: int,
    tokens: int,
    vocab: int,
    device: torch.device,
    biases: int = MAX_BIAS,
    lists: bool = True,
    own: int = 0,
    steer: tuple[int, int] = (0, 0),
    states: bool = False,
    near: bool = False,
) -> Rows:
    """M rows that hold nothing and ask for nothing.

    Args:
        columns, tokens: widths of block tables and histories.
        near: whether they have a table of window blocks.
        lists: whether there is room for allowed tokens, bad words, sequence breakers and watched tokens.
        own: processors of the engine's own.
        steer: layers that may be steered, and the model's width.
        states: whether layers have states.
    """

    def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full((M, *shape), value, dtype=dtype, device=device)

    f32, i32, some = torch.float32, torch.int32, int(lists)
    return Rows(
        length=full(0, i32),
        table=full(0, i32, columns),
        near=full(0, i32, columns * near),
        history=full(0, i32, tokens),
        prompt_len=full(0, i32),
        temperature=full(0, f32),
        top_k=full(0, i32),
        top_p=full(1, f32),
        min_p=full(0, f32),
        frequency=full(0, f32),
        presence=full(0, f32),
        repetition=full(1, f32),
        seed=full(0, torch.int64),
        bias_id=full(-1, i32, biases),
        bias=full(0, f32, biases),
        bias_until=full(0, i32, biases),
        restricted=full(False, torch.bool),
        allowed=full(0, i32, some * -(-vocab // 32)),
        ngram=full(0, i32),
        dry_multiplier=full(0, f32),
        dry_base=full(1, f32),
        dry_allowed=full(1, i32),
        dry_range=full(-1, i32),
        dry_breaker=full(-1, i32, some * MAX_BREAKERS),
        typical_p=full(1, f32),
        xtc_probability=full(0, f32),
        xtc_threshold=full(0, f32),
        bad_id=full(0, i32, some * MAX_BAD),
        bad_at=full(0, i32, some * MAX_BAD),
        own=full(False, torch.bool, own),
        own_args=full(0, f32, own, MAX_ARGUMENTS),
        steer=full(0, f32, *steer),
        watched=full(-1, i32, some * MAX_WATCHED),
        behind=full(0, i32) if states else None,
    )


def common_columns(samplings: Sequence[Sampling]) -> dict[str, np.ndarray]:
    """Field of `Rows` -> its values for these samplings, [n] each: what every request has."""
    s, f32 = samplings, np.float32
    return {
        "temperature": np.array([x.temperature for x in s], f32),
        "top_k": np.array([min(max(x.top_k, 0), 2**31 - 1) for x in s], np.int32),
        "top_p": np.array([x.top_p for x in s], f32),
        "min_p": np.array([x.min_p for x in s], f32),
        "frequency": np.array([x.frequency_penalty for x in s], f32),
        "presence": np.array([x.presence_penalty for x in s], f32),
        "repetition": np.array([x.repetition_penalty for x in s], f32),
    }


def rare_columns(samplings: Sequence[Sampling], vocab: int, processors: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Field of `Rows` -> its values for these samplings, [n, ...] each: what only rare processors read. `processors`
    are the names of the engine's own."""
    s, n, i32, f32 = samplings, len(samplings), np.int32, np.float32
    allowed = np.zeros((n, -(-vocab // 32)), np.uint32)
    breaker = np.full((n, MAX_BREAKERS), -1, i32)
    bad_id, bad_at = np.zeros((n, MAX_BAD), i32), np.zeros((n, MAX_BAD), i32)
    own, own_args = np.zeros((n, len(processors)), np.bool_), np.zeros((n, len(processors), MAX_ARGUMENTS), f32)
    for r, x in enumerate(s):
        for name, given in x.processors:
            i = processors.index(name)
            own[r, i], own_args[r, i, : len(given)] = True, given
        if x.allowed_token_ids is not None:
            ids = np.asarray(x.allowed_token_ids, np.int64)
            np.bitwise_or.at(allowed[r], ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
        breaker[r, : len(x.dry_sequence_breakers)] = x.dry_sequence_breakers
        end = 0
        for word in x.bad_words:
            begin, end = end, end + len(word)
            bad_id[r, begin:end] = word
            bad_at[r, begin:end] = [*range(len(word) - 1, 0, -1), -len(word)]
    return {
        "restricted": np.array([x.allowed_token_ids is not None for x in s], np.bool_),
        "allowed": allowed.view(i32),
        "ngram": np.array([x.no_repeat_ngram_size for x in s], i32),
        "dry_multiplier": np.array([x.dry_multiplier for x in s], f32),
        "dry_base": np.array([x.dry_base for x in s], f32),
        "dry_allowed": np.array([x.dry_allowed_length for x in s], i32),
        "dry_range": np.array([x.dry_penalty_last_n for x in s], i32),
        "dry_breaker": breaker,
        "typical_p": np.array([x.typical_p for x in s], f32),
        "xtc_probability": np.array([x.xtc_probability for x in s], f32),
        "xtc_threshold": np.array([x.xtc_threshold for x in s], f32),
        "bad_id": bad_id,
        "bad_at": bad_at,
        "own": own,
        "own_args": own_args,
    }


@dataclass(frozen=True)
class Pool:
    """KV of one layer, N blocks of it; what a block looks like inside is `kernels.Ops.kv`'s to say.

    Separate tensors, never views of one: each is donated on its own.
    """

    k: Tensor
    """[N, ...]; [N, 0] where a layer reads another's"""
    v: Tensor
    """[N, ...]; [N, 0] where values are keys, or k is empty"""


def pool_shapes(kv: KVLayout, mixer: Attending, N: int) -> tuple[Shape, Shape]:
    """Shapes of the two tensors of a layer's pool of N blocks: empty ones, where it reads another's."""
    if borrows(mixer):
        return (N, 0), (N, 0)
    return lent_shapes(kv, mixer, N)


def lent_shapes(kv: KVLayout, mixer: Attending, N: int) -> tuple[Shape, Shape]:
    """Shapes of the two tensors that a layer reads, its own or those it borrows."""
    return shapes_of(kv, N, BLOCK, mixer.kv_heads, mixer.width, shares(mixer))


def pool_bytes(kv: KVLayout, spec: ModelSpec, dtype: torch.dtype, seeing: bool | None = None) -> int:
    """Bytes of one block of the pools of all layers, of KV computed in `dtype`; with `seeing`, of those that see
    everything, or (False) of those with a window."""
    mixers = [m for m in attentions(spec) if seeing is None or seeing == (not sight(m))]
    return sum(block_bytes(kv, mixer, dtype) for mixer in mixers)


def block_bytes(kv: KVLayout, mixer: Attending, dtype: torch.dtype) -> int:
    """Bytes of one block of the pool of a layer."""
    return sum(prod(shape) for shape in pool_shapes(kv, mixer, 1)) * kv.element(dtype).itemsize


@dataclass(frozen=True)
class Memory:
    """What one recurrent layer remembers, in S places: those of the rows, the null row's, and those of states that are
    kept. Donated like a pool. A row of no tokens remembers nothing, whatever lies here.

    A state cannot be cut, so it holds no token that is only guessed: of these a row has notes, of which its next step
    takes in those that were right (`Rows.behind`).
    """

    tail: Tensor
    """[S, Y - 1, X] float32: what the convolution reads of the last tokens, newest last."""
    matrix: Tensor
    """[S, H, C, P] float32"""
    heard: Tensor
    """[M+1, NOTED, X] float32: what the convolution is to read of guesses, ..."""
    noted: Tensor
    """[M+1, NOTED, J] float32: ... and the matrix: k, v, decay and, in a delta net, rate."""


NOTED = MAX_DRAFT
"""Most guesses of a row in a step."""


def memory_shapes(mixer: Recurrent) -> tuple[tuple[Shape, Shape], tuple[Shape, Shape]]:
    """Shapes of a state of a layer, the tail and the matrix, and of a row's notes for each."""
    return ((mixer.taps - 1, mixer.channels), mixer.memory), ((NOTED, mixer.channels), (NOTED, mixer.note))


def memory_bytes(spec: ModelSpec, rows: int, kept: int) -> int:
    """Bytes of what all recurrent layers remember, of so many rows, the null row, and states that are kept."""
    notes = sum(4 * sum(map(prod, memory_shapes(m)[1])) for m in recurrents(spec))
    return (rows + 1 + kept) * state_bytes(spec) + (rows + 1) * notes


LayerState = Pool | Memory
"""What a layer keeps of tokens: attention each of them, in blocks; a recurrent layer one state of all of them."""


@dataclass(frozen=True)
class Carry:
    """What a companion keeps of each row, [M+1, n] each."""

    seen: Tensor
    """After the tokens that the target has computed."""
    ahead: Tensor
    """After the newest token that was drafted."""


@dataclass(frozen=True)
class State:
    pool: tuple[LayerState, ...]
    """One per layer; behind them a companion's, where there is one."""
    rows: Rows
    carry: Carry | None = None
    """Of a companion that keeps something of each row between steps."""


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
    pick: Tensor | None = None
    """[E] int32, see `StepInput.pick`; None: the last token of each row. Padding picks the first once more."""
    mask: Tensor | None = None
    """[E, ceil(V / 32)] int32 or None, see `StepInput.mask`. Padding allows what the first row does."""
    ask: Ask = static(default=Ask())


@dataclass(frozen=True)
class Packed:
    """A `Batch` in one piece: one copy brings it to a device, and one buffer holds it for a captured step. Masks are a
    second one: they are hundreds of times as large (19 KB a row at V = 151,936), and seldom there."""

    ints: Tensor
    """[n] int32: row, start, token, emit, target and pick where the ask has them, each where `packed_parts` says"""
    bucket: Bucket = static()
    ask: Ask = static(default=Ask())
    mask: Tensor | None = None
    """That of `Batch`."""

    def batch(self) -> Batch:
        """Views of the parts."""
        ask = self.ask
        row, start, token, emit, target, pick = (self.ints[part] for part in packed_parts(self.bucket, ask))
        target, pick = None if ask.score is None else target, pick if ask.picks else None
        return Batch(row, start, token, emit, target, pick, self.mask, ask)


ALIGNED = 4
"""Every part of a packed batch begins at a multiple of so many integers: 16 bytes. On a GPU a kernel is compiled once
more for an address that is not such a multiple, and Inductor's code copies what lies at one, in every layer."""


def packed_parts(bucket: Bucket, ask: Ask) -> list[slice]:
    """Where the parts of `Packed.ints` lie; the last one ends it."""
    T, R = bucket.tokens, bucket.rows
    parts, at = [], 0
    for n in (R, R + 1, T, R, 0 if ask.score is None else T, ask.picks):
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
    guessed: Tensor | None = None
    """[R] int32, where layers have states: the last new tokens, which are only guessed"""
    behind: Tensor | None = None
    """[M+1] int32, the rows' own"""
    near_slot: Tensor | None = None
    """[T] int32: where KV of layers with a window goes, if they have blocks of their own ..."""
    near: Tensor | None = None
    """[M+1, P] int32: ... and the table of those"""
    token: Tensor | None = None
    """[T] int32, the tokens themselves; None where nobody has said, and no layer reads them"""
    beside: Tensor | None = None
    """What layers read beside the residual stream, if they do: [l, T, P] of l layers in a row, [T, P] of one"""

    def of(self, mixer: Mixer) -> tuple[Tensor, Tensor]:
        """(slot, table) of the blocks in which a layer with this mixer keeps KV."""
        if self.near_slot is None or self.near is None or not sight(mixer):
            return self.slot, self.table
        return self.near_slot, self.near


@dataclass(frozen=True)
class Top:
    """Log-probabilities, float32."""

    chosen: Tensor
    """[n]"""
    ids: Tensor
    """[n, k] int32"""
    values: Tensor
    """[n, k]"""
    watched: Tensor | None = None
    """[n, 128] of the tokens that the row watches"""


@dataclass(frozen=True)
class Out:
    """What a step gives; E = R where nothing is picked."""

    token: Tensor
    """[E] int32 chosen after each picked token; those that nobody may choose, or that follow a wrong draft, too."""
    count: Tensor
    """[R] int32 tokens that the row has chosen: the first of its last emit[r]."""
    logprobs: Top | None = None
    """n = E"""
    score: Top | None = None
    """n = T"""
    logits: Tensor | None = None
    """[E, V] float32"""
    taps: tuple[Tensor, ...] = ()
    """[T, D] each, in the order of `Ask.taps`"""


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
    where = Where(batch.row, batch.start, row_T, position, slot, length, rows.table)
    if rows.behind is not None:
        where = replace(where, guessed=(batch.emit - 1).clamp_(min=0), behind=rows.behind)
    if rows.near.shape[1]:
        where = replace(where, near_slot=rows.near[row_T, column] * block + position % block, near=rows.near)
    return where
