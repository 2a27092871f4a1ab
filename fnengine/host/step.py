"""The one value that crosses from the host to a device and the one that comes back. NumPy only, torch-free.

A `StepInput` is what a plan becomes: a ragged batch of new tokens and edits to the rows of the device. Index ranges,
for three rows with 3, 1 and 2 new tokens:

    token   | a b c | d | e f |          T = 6
    start   0       3   4     6          R + 1 = 4
    row       7       2   5              state rows, 0 <= row < M
    emit      0       1   1              row 7 is still prefilling
    pick                e     f          by default the last token of each row

A token is chosen after each *picked* token. A row whose newest tokens are a draft picks all of them and may emit as
many: the device chooses after each, and keeps the first, and every one whose forerunner was drafted right.

    token   | n x y |        n newest, x and y drafted after it; emit = 3
    chosen    x z .          z is where the draft went wrong: 2 tokens, x and z, and the row is 2 longer

The device (real or toy) derives everything else: token t of batch row r stands at position
`rows.length[row[r]] + t - start[r]`; its slot is `table[row[r], position // B] * B + position % B`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fnengine.host.request import Sampling

BLOCK = 16
"""Tokens of KV in a block (B)."""
NEWEST = -1
"""In `StepInput.token`: take the row's newest token, which the device sampled and the host may not know yet."""


@dataclass(frozen=True)
class Admission:
    """Everything about a row that a sequence brings with it; replaces whatever the row held before."""

    row: int
    length: int
    """Tokens whose KV is already in the blocks (prefix hits, resumed or forked sequences)."""
    blocks: np.ndarray
    """[p] int32 block ids, in order, covering at least `length` tokens."""
    tokens: np.ndarray
    """[n >= length] int32: the tokens behind that KV (penalties read them), and those known to come after it."""
    prompt_len: int
    """Tokens of the prompt; later ones count as generated (penalties)."""
    sampling: Sampling
    seed: int
    """Resolved 64-bit seed (never None)."""
    suppress: tuple[int, ...] = ()
    """Token ids that may not be chosen ..."""
    suppress_until: int = 0
    """... for positions before this one (min_tokens)."""
    state: int = -1
    """The place of the state that the row begins from, in layers that have states; -1 where it has no tokens yet."""
    near: np.ndarray | None = None
    """[p] int32 window blocks beside `blocks`, where layers have such; 0 or anything for those that nobody reads."""
    steer: tuple[tuple[str, np.ndarray], ...] = ()
    """(layer, [D] float32): what is added to the residual stream after layers that were declared."""
    watched: tuple[int, ...] = ()
    """Token ids, at most `request.MAX_WATCHED`, whose log-probabilities the row wants."""


@dataclass(frozen=True)
class Ask:
    """What a step computes beyond KV; hashable structure: another Ask is another trace.

    A row that emits gets a token through `pipeline`; the host sends the smallest pipeline that serves all rows.
    """

    pipeline: tuple[str, ...] = ()
    """Names of logits processors in order, a subset of `PIPELINE`; empty and `noise=False` is argmax."""
    noise: bool = False
    """Some row samples (temperature > 0): divide by temperature and add Gumbel noise where it does."""
    sample: bool = True
    """False: no token is chosen (rt.extend without `sample`)."""
    logprobs: int | None = None
    """Top-k log-probabilities after the picked tokens, beside the chosen token's where one is; None for none."""
    score: int | None = None
    """Log-probabilities of `StepInput.target` at every new token, with this many most likely ones; None for none."""
    watched: bool = False
    """With both: those of the tokens that each row watches."""
    logits: bool = False
    """Raw float32 logits after the picked tokens in the output."""
    picks: int = 0
    """E: how many tokens are picked; 0 picks the last of each row."""
    masked: bool = False
    """Some row may choose certain tokens only: see `StepInput.mask`."""
    taps: tuple[str, ...] = ()
    """Names of `spec.tap_names`: the model's inside at every new token, in the output."""


PIPELINE = (
    *("allowed", "bias", "bad_words", "no_repeat_ngram", "penalties", "dry", "own"),
    *("typical_p", "min_p", "top_k", "top_p", "xtc"),
)
"""Every logits processor of the step in the order in which they apply: what forbids tokens or moves logits, then, after
the temperature, what leaves tokens out. Source: transformers, vLLM and llama.cpp agree on the first group before the
second; min_p first of the truncations is vLLM's, xtc last is llama.cpp's."""
COMMON = ("bias", "penalties", "min_p", "top_k", "top_p")
"""Those that many requests ask for. The others are `RARE`: a graph that is to serve any request does not compute them,
because typical_p sorts the vocabulary and dry goes over the history in 50 passes."""
RARE = tuple(name for name in PIPELINE if name not in COMMON)


@dataclass(frozen=True)
class StepInput:
    """One step's work. Arrays are exact (unpadded); the device pads to its bucket."""

    row: np.ndarray
    """[R] int32 state row of each batch row; a state row occurs at most once."""
    start: np.ndarray
    """[R+1] int32: batch row r has the new tokens start[r]:start[r+1], at least one."""
    token: np.ndarray
    """[T] int32 token ids, or NEWEST."""
    emit: np.ndarray
    """[R] int32: tokens the row may choose in this step: 0, 1, or one more than it has draft tokens at its end."""
    copy: np.ndarray
    """[C, 2] int32 (source, target) blocks, copied in every layer before any KV write."""
    grow: np.ndarray
    """[G, 3] int32 (row, column, block): blocks added to rows' tables."""
    admit: tuple[Admission, ...] = ()
    ask: Ask = Ask()
    target: np.ndarray | None = None
    """[T] int32: with `ask.score`, the token that follows each new token, or -1 where none is asked for."""
    pick: np.ndarray | None = None
    """[E] int32, ascending: with `ask.picks`, the tokens after which logits are made; of a row that emits at least its
    last emit[r] tokens."""
    mask: np.ndarray | None = None
    """[E, ceil(V / 32)] int32: with `ask.masked`, what may be chosen after each picked token (of R rows where none are
    picked): tokens v with bit v % 32 of word v // 32. Rows of -1 allow all. Log-probabilities stay those of all."""
    swap_out: np.ndarray | None = None
    """[S, 2] int32 (block, host slot): KV saved to host memory before anything else in the step."""
    swap_in: np.ndarray | None = None
    """[S, 2] int32 (host slot, block): KV brought back, after swap_out and before copies."""
    keep: np.ndarray | None = None
    """[K, 2] int32 (row, place): states kept, in all recurrent layers, before anything else in the step; the rows that
    are admitted take theirs after that."""
    near_grow: np.ndarray | None = None
    """[G] int32: the window blocks beside those of `grow`, where layers have such."""
    near_copy: np.ndarray | None = None
    """[C, 2] int32: `copy` in the pools of layers with a window."""

    def picked(self) -> np.ndarray:
        """[R + 1] int: batch row r has the picked tokens picked[r]:picked[r+1]."""
        if self.pick is None:
            return np.arange(len(self.row) + 1)
        return np.searchsorted(self.pick, self.start)


@dataclass(frozen=True)
class Scores:
    """Log-probabilities: float32, log_softmax of the raw logits."""

    chosen: np.ndarray
    """[n] of the token chosen (or asked about); 0 where nothing was asked."""
    top_ids: np.ndarray
    """[n, k] int32, most likely first, ties by lowest id."""
    top: np.ndarray
    """[n, k]"""
    watched: np.ndarray | None = None
    """[n, 128] of the tokens that the row watches, in its order; beyond them anything"""


@dataclass(frozen=True)
class StepOutput:
    """What a step gave, in the order of the input's batch rows."""

    token: np.ndarray
    """[R, W] int32 tokens chosen; only the first `count[r]` count. W is the most that a row may choose, at least 1."""
    count: np.ndarray
    """[R] int32: 0 while prefilling, 1 when decoding, up to emit[r] where drafts were right."""
    logprobs: Scores | None = None
    """n = R * W, row by row; those of a row that chooses nothing are after the last token it picks"""
    score: Scores | None = None
    """n = T, in the order of `StepInput.token`"""
    logits: Any = None
    """The device's own tensor, [E, V] float32, when asked for."""
    taps: tuple[Any, ...] = ()
    """The device's own tensors, [T, D] each in the model's dtype, in the order of `Ask.taps`."""


class Ticket(Protocol):
    """A launched step."""

    def read(self) -> StepOutput:
        """Waits for the step and returns its output; raises what the step raised."""
        ...


class Device(Protocol):
    """Whatever runs steps: the real one (`fnengine.device`) or the toy one of the tests.

    Steps take effect in the order of `launch`. `depth` is how many steps the host may have in flight beside the one
    it reads: 0 where the device is the host's own cores, 1 where it is not.
    """

    depth: int
    blocks: int
    """N: blocks in the pool, the null block 0 included."""
    rows: int
    """M: state rows, the null row not counted."""
    max_len: int
    """Most tokens a row can hold."""
    host_slots: int
    """Blocks of host memory for swapping; 0 when there is none."""
    kept: int | None
    """Places of states beside those of the M + 1 rows; None where no layer has a state."""
    windows: tuple[int, int] | None
    """(window blocks of the pools of layers with a window, the null block included; tokens that the longest window
    covers); None where those layers lie in the same blocks as all others."""

    def launch(self, step: StepInput) -> Ticket: ...
