"""The byte ledger of an engine on CPU: what its process will hold, line by line, from shapes, before it is loaded.

    base  code  tokenizer  weights  rows  swap  recordings  workspace  allocator  KV pool    at rest, the pool full
    + the largest of what comes and goes (sampling, scoring, writing an answer) + answers    at worst
    base  code  weights, and one array in both of its forms                                  while loading

Only `base` is no function of shapes: it is what a process that can serve holds before it has a model, and is measured
in the process that asks. Constants say what they were measured on. Every line is an upper bound that some request
reaches, so `--memory` minus all lines but the pool is the pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from fnengine import tree
from fnengine.device import make_state
from fnengine.errors import ConfigError
from fnengine.graphs.bucket import fit
from fnengine.graphs.ladder import MIXED
from fnengine.host.answers import most_logprobs
from fnengine.host.request import MAX_WATCHED
from fnengine.host.runs import picks_of
from fnengine.host.step import BLOCK
from fnengine.kernels.layout import KVLayout, Tokens
from fnengine.kernels.memory import HUGE
from fnengine.kernels.quantized import GROUP
from fnengine.kernels.recording import RECORDED_TOKENS
from fnengine.kernels.truncation import AT_ONCE as RANKED_AT_ONCE
from fnengine.leaves import QUANTIZED, Packing
from fnengine.params import memory_plan, products
from fnengine.program import PROGRAMS
from fnengine.sampling import AT_ONCE, rows_at_once
from fnengine.settings import Apart, Mode, PoolSize, Settings, pool_of, size_pool, split, wanted_len, window_blocks
from fnengine.spec import (
    Both,
    Half,
    Latent,
    Layer,
    Mixer,
    Mlp,
    ModelSpec,
    MoE,
    Recurrent,
    angle_pairs,
    attentions,
    reach,
    recurrents,
    routed,
)
from fnengine.state import memory_bytes, pool_bytes
from fnengine.step import SCORED_AT_ONCE

MIB = 1 << 20

CODE = 20 * MIB
"""Native libraries, replayed artifacts and what torch sets up in its first steps, beyond `base` (measured: 18 MiB)."""
ONEDNN = 8 * MIB
"""oneDNN, which is asked for its layout wherever weights are not quantized (measured: 9 MiB)."""
COMPILING = 130 * MIB
"""Inductor and Dynamo in a process that had to compile its layers (measured: 126 to 132 MiB); they stay."""
TOKEN_TEXT = 620
"""Bytes of the tokenizer a token of the vocabulary (measured on a BPE of 151,936 tokens and 151,680 merges: 341 once
read and trimmed, and 270 to 276 more when the text of every token was seen once, which is kept)."""
TOKEN_READ = 900
"""The same while the tokenizer is read (measured: 690 to 900), before `environment.trim`."""
PIECES = 4 * MIB
"""What stays between small buffers, and of the host's objects, once every kind of request was served (measured: 3 to
4 MiB)."""
KEPT = 64 * MIB
"""Most that the allocator keeps of freed small buffers (`environment.SERVING`)."""
THREAD = 1 * MIB
"""Scratch memory of a thread in products of few rows."""
PARTIALS = 512 << 10
"""Most bytes a thread of sums of parts of KV that wait to be merged, which `csrc/attention.cpp` holds itself to."""
CALLS = 12
"""Most native calls of a layer, and ..."""
CALL_BYTES = 34 * 8 + 6 * 24
"""... bytes of one in a recording: its words and the addresses that move."""
PROCESSED = 16
"""Bytes a logit alive while processors change some of the rows: what they got, a copy, the rows, what these become."""
RANKED = 56
"""Bytes a logit alive where truncation ranks whole rows, one at a time, for want of a compiler, or where typical_p
does: values and 64-bit ids, weights, masses, and what they are made from."""
LOOKED_BACK = 48
"""Bytes a token of the history of rows whose processors look for repetitions: tokens in both widths, where they match,
how far, and what that costs."""
SEARCHED = 8
"""Bytes a token of the vocabulary of a thread that looks for where truncation cuts a row (`csrc/truncate.cpp`)."""


@dataclass(frozen=True)
class Extra:
    """Bytes that a companion, which drafts on the model's rows and blocks, takes beside it."""

    name: str
    weights: int
    per_block: int
    """KV of a block."""
    rows: int = 0
    """What it keeps of all rows."""
    recorded: int = 0
    workspace: int = 0
    """Of its largest layer; it and the model's do not live at the same time."""
    beside: int = 0
    """Alive while the model's layers run."""
    loading: int = 0
    """While its weights are read."""
    on_card: int = 0
    """On a GPU, buffers of its largest step."""


@dataclass(frozen=True)
class Shapes:
    """Everything the ledger is a function of."""

    spec: ModelSpec
    dtype: torch.dtype
    how: Packing
    mode: Mode
    max_len: int
    blocks: int
    """N, the null block included."""
    host_slots: int = 0
    max_logprobs: int = 20
    """-1 means the vocabulary."""
    answer_bytes: int = Settings.answer_bytes
    threads: int = 1
    compiled: bool = True
    """Layers run compiled and recorded; else by the plain functions."""
    compiling: bool = False
    """Layers are not in the cache, so this process compiles them."""
    base: int = 0
    """Bytes of a process that can serve and has no model yet (`base_now`)."""
    kv: KVLayout = Tokens()
    """How KV lies in the pool."""
    own: int = 0
    """Logits processors of the engine's own."""
    steer: int = 0
    """Layers that may be steered."""
    extra: Extra | None = None
    """What drafts beside the model."""
    kept: int = 0
    """States of recurrent layers beside those of the rows."""
    apart: Apart | None = None
    """Window blocks, which there are where they are fewer than blocks or somebody asked for them."""

    @property
    def kinds(self) -> set[str]:
        """In which the weights of the layers are stored."""
        return {self.how.at(*shape).kind for shape, _ in products(self.spec).layers}

    @property
    def head(self) -> str:
        """In which kind the head is stored."""
        return self.how.at(self.spec.vocab, self.spec.width).kind

    @property
    def per_block(self) -> int:
        """Bytes of a block of KV, all layers, and a companion's."""
        return block_of(self.spec, self.kv, self.dtype) + (0 if self.extra is None else self.extra.per_block)

    @property
    def near(self) -> int:
        """Window blocks."""
        a = self.apart
        return a.blocks if a is not None and (a.asked or a.blocks < self.blocks) else 0

    @property
    def pool(self) -> int:
        """Bytes of KV."""
        if self.apart is None or not self.near:
            return self.blocks * self.per_block
        return self.blocks * (self.per_block - self.apart.bytes) + self.near * self.apart.bytes

    @property
    def states(self) -> int:
        """Bytes of the states of recurrent layers: those of the rows, the null row's, and the kept ones; and of what
        rows note of guesses."""
        return memory_bytes(self.spec, self.mode.rows, self.kept)


def block_of(spec: ModelSpec, kv: KVLayout, dtype: torch.dtype) -> int:
    """Bytes of a block of KV, all layers.

    Raises:
        ConfigError: no layer has KV.
    """
    if not attentions(spec):
        raise ConfigError("a model without any layer of attention is not implemented", where=spec.architecture)
    return pool_bytes(kv, spec, dtype)


def apart_of(
    spec: ModelSpec,
    kv: KVLayout,
    dtype: torch.dtype,
    settings: Settings,
    mode: Mode,
    attention: str = "",
    beside: str = "",
) -> tuple[Apart | None, str]:
    """(window blocks that this model may have, why it has none, if it has windows).

    Args:
        attention: name of the backend.
        beside: what drafts on the model's rows and blocks; empty for nothing.

    Raises:
        ConfigError: see `settings.window_blocks`.
    """
    reach_of = reach(spec)
    longest = wanted_len(settings, spec.max_len) or spec.max_len
    if not reach_of:
        why = "no layer has a window"
    elif recurrents(spec):
        why = "recurrent layers begin again at their own places"
    elif spec.upstream is not None:
        why = "transformers' own module"
    elif beside:
        why = f"{beside} drafts on the same blocks"
    elif longest <= reach_of:
        why = f"no sequence is longer than {reach_of} tokens"
    elif settings.swap_space:
        why = "--swap-space saves blocks of one kind"
    elif not settings.enable_chunked_prefill:
        why = "prompts come in one piece"
    elif attention == "torch":
        why = "torch's attention reads blocks before a window"
    else:
        why = ""
    return window_blocks(settings, mode, reach_of, pool_bytes(kv, spec, dtype, seeing=False), why)


@dataclass(frozen=True)
class Line:
    name: str
    bytes: int
    why: str
    """Where the number comes from, for people."""


@dataclass(frozen=True)
class Account:
    """The ledger."""

    rest: tuple[Line, ...]
    """Held at once when the pool is full; the pool is the last of them."""
    passing: tuple[Line, ...]
    """What comes and goes, one of them at a time."""
    answers: Line
    """What the server holds of answers that are not sent yet."""
    loading: Line
    """Beside `base` and `code` while weights are read, instead of everything else."""

    def line(self, name: str) -> Line:
        """The line of that name."""
        return next(x for x in (*self.rest, *self.passing, self.answers, self.loading) if x.name == name)

    @property
    def at_rest(self) -> int:
        return sum(x.bytes for x in self.rest)

    @property
    def worst_step(self) -> int:
        """At rest, and the largest of what a step adds for its time."""
        return self.at_rest + max(x.bytes for x in self.passing if x.name != "writing an answer")

    @property
    def at_worst(self) -> int:
        return self.at_rest + self.answers.bytes + max(x.bytes for x in self.passing)

    @property
    def while_loading(self) -> int:
        return self.line("base").bytes + self.line("code").bytes + self.loading.bytes

    @property
    def peak(self) -> int:
        """The most the process ever holds."""
        return max(self.at_worst, self.while_loading)

    @property
    def beside_pool(self) -> int:
        """Of `at_worst`, everything but the pool: what `--memory` has to hold before the first block."""
        return self.at_worst - self.line("KV pool").bytes


def account(s: Shapes) -> Account:
    """The ledger of an engine of these shapes."""
    spec, item, V = s.spec, s.dtype.itemsize, s.spec.vocab
    b = fit(s.mode.budget, s.mode.rows)
    plan = memory_plan(spec, s.dtype, s.how)
    rows = _rows(spec, s.dtype, s.mode.rows, s.max_len, s.own, s.steer, s.apart is not None)
    per_block = s.per_block
    k = V if s.max_logprobs < 0 else min(s.max_logprobs, V)
    layers = len(spec.layers)
    code = CODE + (0 if s.how.kind in QUANTIZED else ONEDNN) + (COMPILING if s.compiling else 0)
    workspace = max(layer_bytes(kind, spec.width, b.tokens, s) for kind in spec.layers)
    workspace += max(attention_bytes(a, b.tokens, b.rows, s.threads) for a in attentions(spec))
    workspace += s.threads * (THREAD + SEARCHED * V) + inputs_bytes(spec, b.tokens, item)
    x = s.extra or Extra("", 0, 0)
    workspace = max(workspace + x.beside, x.workspace)
    narrow = item if item != 4 and s.head in ("packed", "dense") else 0
    ranked = max(V, RANKED_AT_ONCE) * RANKED if isinstance(s.kv, Tokens) else 0  # the reference's layout
    picks = picks_of(b.rows, V, s.extra is not None)
    sampled = _sampling(picks, V, narrow, min(k, most_logprobs(picks)), s.max_len, ranked)
    scored = b.rows * V * 4 + _scoring(b.tokens, V, narrow, min(k, most_logprobs(b.tokens)))
    programs = 0
    if s.compiled and s.kinds.isdisjoint(("packed", "dense")):
        most = min(b.tokens, RECORDED_TOKENS)
        arena = max(layer_bytes(kind, spec.width, most, s) for kind in spec.layers)
        programs = -(-arena // HUGE) * HUGE + PROGRAMS * layers * CALLS * CALL_BYTES
    small = PIECES + min(KEPT, _small(min(b.rows, AT_ONCE), V) + _small(SCORED_AT_ONCE, V, narrow))
    second = () if s.extra is None else (Line("companion", x.weights, f"weights of {x.name}, which drafts"),)
    beside = f" and {s.near:,} of layers with a window" if s.near else ""
    loading = max(plan.peak, plan.weights + V * TOKEN_READ, plan.weights + V * TOKEN_TEXT + x.loading)
    rest = (
        Line("base", s.base, "interpreter, torch and what serving imports: measured, not computed"),
        Line("code", code, "native libraries, layers" + ", compiler" * s.compiling),
        Line("tokenizer", V * TOKEN_TEXT, f"{V:,} tokens"),
        Line("weights", plan.weights, f"{s.how.name}, {'the embedding is the head' if spec.tied else 'own head'}"),
        *second,
        Line("rows", rows + x.rows, f"{s.mode.rows} + 1 rows of {s.max_len:,} tokens"),
        *([Line("states", s.states, f"{s.mode.rows} + 1 of rows and their notes, {s.kept} kept")] if s.states else []),
        Line("swap space", s.host_slots * per_block, f"{s.host_slots} blocks of host memory"),
        Line("recorded steps", programs + x.recorded, f"up to {RECORDED_TOKENS} tokens, at most {PROGRAMS} sizes"),
        Line("workspace", workspace, f"one layer of {b.tokens:,} tokens, {s.threads} threads"),
        Line("allocator", small, "freed buffers that it does not give back"),
        Line("KV pool", s.pool, f"{s.blocks:,} blocks of {BLOCK} tokens{beside}, the null block included"),
    )
    passing = (
        Line("sampling", sampled, f"logits and log-probabilities of {picks} rows x {V:,}, {AT_ONCE} rows processed"),
        Line("scoring", scored, f"prompts, {SCORED_AT_ONCE} rows x {V:,} at a time"),
        Line("writing an answer", s.answer_bytes, "the largest, as objects and as JSON"),
    )
    return Account(
        rest,
        passing,
        Line("answers", 3 * s.answer_bytes, "and prompts held by the server, and what clients left unread"),
        Line("loading", loading, "weights, and one array in both of its forms"),
    )


def beside(s: Shapes, name: str) -> Extra:
    """What a draft model of these shapes takes beside its target."""
    a = account(s)
    once = dataclasses.replace(s.mode, budget=min(s.mode.budget, MIXED))
    rows = _rows(s.spec, s.dtype, s.mode.rows, s.max_len)
    return Extra(
        name,
        weights=a.line("weights").bytes,
        per_block=s.per_block,
        recorded=a.line("recorded steps").bytes,
        workspace=a.line("workspace").bytes,
        loading=a.line("loading").bytes,
        on_card=on_card(s.spec, s.dtype, once, s.max_len, graphs=0, compiled=s.compiled) - rows - LIBRARIES,
    )


LIBRARIES = 256 * MIB
"""On a GPU: 32 MiB of cuBLAS for each of three streams, and 64 MiB of parts of attention in steps and in graphs."""
GRAPH = 4 * MIB
"""Of one graph outside of its tensors: some 400 kernels with their arguments. Assumed, no card has been measured."""


def on_card(
    spec: ModelSpec,
    dtype: torch.dtype,
    mode: Mode,
    max_len: int,
    *,
    graphs: int,
    compiled: bool,
    steer: int = 0,
    drafting: bool = False,
    near: bool = False,
) -> int:
    """Bytes that an engine takes on a GPU beside weights and KV: rows, the buffers of the largest step run directly and
    those of the largest one in a graph, which are kept apart, and what libraries and graphs hold. On paper: it keeps
    the pool from taking what steps need."""
    item, V, D, R = dtype.itemsize, spec.vocab, spec.width, mode.rows

    def step(T: int) -> int:
        layer = 0
        for kind in spec.layers:
            a, m, sparse = kind.mixer, kind.mlp, routed(kind.mlp)
            half = max(half_width(m, D), mixer_widths(a, D)[0]) - D
            live = (
                item * (4 * D + half)
                + angle_pairs(a.rope) * 8
                + recurrent_bytes(a)
                + (0 if sparse is None else routed_bytes(sparse, D))
            )
            layer = max(layer, T * (live if compiled else live + 16 * activated(m)))  # float32, operator by operator
        # Logits, in both dtypes; what a bias, penalties and truncation each make of them; a row's tokens for penalties:
        # ids of 4 and 8 bytes, twice, and five values.
        picks = picks_of(R, V, drafting) if drafting else R
        return layer + inputs_bytes(spec, T, item) + picks * (V * (16 + item) + max_len * 44)

    captured = step(min(mode.budget, MIXED)) + graphs * GRAPH if graphs else 0
    return _rows(spec, dtype, R, max_len, steer=steer, near=near) + step(mode.budget) + captured + LIBRARIES


def _rows(
    spec: ModelSpec, dtype: torch.dtype, rows: int, max_len: int, own: int = 0, steer: int = 0, near: bool = False
) -> int:
    """Bytes of what a device knows of its rows, which no layout of KV changes."""
    meta = torch.device("meta")
    sizes: dict[str, Any] = dict(blocks=1, rows=rows, max_len=max_len, own=own, steer=steer, near=1 if near else None)
    state = make_state(spec, Tokens(), **sizes, dtype=dtype, device=meta)
    return sum(t.nbytes for t in tree.leaves(state.rows))


PACKED, TOGETHER = 4 << 20, 12
"""Bytes of rows that a native product packs at a time, and how many rows it takes together (`csrc/linear.cpp`)."""


def layer_bytes(kind: Layer, D: int, T: int, s: Shapes) -> int:
    """Bytes of the buffers of one layer that live at the same time, for T tokens.

    From `layers.layer`: in attention x, qkv, q and o; around them x, its norm and a product; in the MLP x, gate and up,
    and their product. Beside them what the chosen product makes of its input.
    """
    a, m, sparse = kind.mixer, kind.mlp, routed(kind.mlp)
    q = a.heads * a.width
    kv = 0 if isinstance(a, Recurrent) else a.kv_heads * a.width
    deepest = max(D, q, m.width, 0 if sparse is None else sparse.shared)
    widths = (*mixer_widths(a, D), half_width(m, D))
    scratch = T * deepest * 4  # widened to float32
    if s.how.kind in QUANTIZED:
        size, group = 1 if s.how.kind.endswith("dynamic") else 2, GROUP[QUANTIZED[s.how.kind]]
        scratch = T * (-(-deepest // 32) * 32 * size + -(-deepest // group) * 8)  # integers, a factor and a sum a group
    elif "tiled" not in {*s.kinds, s.head} or s.how.atom == 2:
        scratch = 0
    if "tiled" in {*s.kinds, s.head} and T > TOGETHER:
        rows = -(-T // TOGETHER) * TOGETHER
        scratch += min(PACKED, rows * deepest * (2 if s.how.atom == 2 else 4))
    angles = T * angle_pairs(a.rope) * 8
    live = T * max(widths) * s.dtype.itemsize
    if sparse is not None:
        live += T * routed_bytes(sparse, D)
    live += T * recurrent_bytes(a)
    if not s.compiled:  # SiLU in float32, and all scores of a row at once in the reference
        scores = 0 if isinstance(a, Recurrent) else a.heads * s.max_len
        live += T * (2 * activated(m) * 4 + 2 * scores * 4) + 2 * s.max_len * kv * 4
    return live + scratch + angles


def mixer_widths(a: Mixer, D: int) -> tuple[int, int]:
    """Elements of a token alive at once in the first half of a layer: where the mixer runs, and before it.

    Of latents: x; queries before and after they meet the matrices of their heads, once more in the order of heads; all
    that is written, and queries as they come back; what attention gives, twice, and what heads make of it.
    """
    q = a.heads * a.width
    if isinstance(a, Latent):
        own = a.heads * (a.still + a.turning)
        return D + 3 * q + a.heads * a.values, 2 * D + max(a.query_rank, 2 * own) + 2 * q + 2 * a.width
    if isinstance(a, Recurrent):
        fused = a.channels + q + 2 * a.heads
        return D + fused, 2 * D + fused
    fused = (1 + a.gated) * q + 2 * a.kv_heads * a.width
    return D + fused + 2 * q, 2 * D + fused


def inputs_bytes(spec: ModelSpec, T: int, item: int) -> int:
    """Bytes of what layers read beside the residual stream: three forms of it at once, while it is made."""
    wide = sum(kind.beside.width for kind in spec.layers if kind.beside is not None)
    return T * wide * max(3 * item, item + 8)


def recurrent_bytes(a: Mixer) -> int:
    """Bytes of a token that a mixer with a state takes in float32: what passes the convolution, before, after and as
    what the recurrence reads, and what that gives, its square and its gate."""
    return 4 * (4 * a.channels + 4 * a.heads * a.width) if isinstance(a, Recurrent) else 0


def half_width(m: Half, D: int) -> int:
    """Most elements of a token alive at once in the feed-forward half of a layer. With experts its row stands there
    once for each of its own, then what they make of it; x, its norm and what the shared one reads stay beside them, or
    what an MLP beside them gave and what the router reads."""
    if isinstance(m, Both):
        return max(half_width(m.dense, D), 2 * D + half_width(m.routed, D))
    if isinstance(m, Mlp):
        return max(2 * D + 2 * m.width, D + 3 * m.width)
    own = 2 * D + m.chosen * max(D + 2 * m.width, 3 * m.width)
    return max(own, 2 * D + max(2 * m.shared + D, 3 * m.shared) if m.shared else 0)


def activated(m: Half) -> int:
    """Elements of a token before a down projection."""
    if isinstance(m, Both):
        return max(m.dense.width, activated(m.routed))
    return m.width if isinstance(m, Mlp) else max(m.chosen * m.width, m.shared)


def widest(kind: Layer, D: int) -> int:
    """Elements of a token in the largest buffer of a layer."""
    sparse = routed(kind.mlp)
    rows = 1 if sparse is None else sparse.chosen
    a = kind.mixer
    fused = mixer_widths(a, D)[1] - 2 * D if not isinstance(a, Latent) else (a.heads + 2) * a.width
    return max(2 * activated(kind.mlp), fused, rows * D)


def routed_bytes(m: MoE, D: int) -> int:
    """Bytes of a token that experts cost beside elements: the sum in float32, twice, what it was scored by, four times,
    and its numbers, places and weights."""
    return 2 * D * 4 + 4 * m.experts * 4 + m.chosen * 24


def attention_bytes(a: Mixer, T: int, R: int, threads: int) -> int:
    """Scratch memory of native attention, for T tokens in R rows. Sums of a (query, head) pair are a running softmax of
    two cache lines and C floats; they exist twice, for the parts of KV that were merged and for the one that goes on.

    A thread goes over a tile of 64 tokens with 96 pairs, or with all heads of four queries, each with its query, scores
    and weights; its 11 buffers begin on lines of their own. Rows that share a prefix keep their sums, of four queries
    each at most, until they go on alone. Latents of a tile are laid out once more, as values.
    """
    C = -(-a.width // 16) * 16
    sums = 2 * (128 + C * 4)
    each = max(96, 4 * a.heads) * (C * 4 + 2 * 64 * 4 + 12 + sums) + C * 4 + 11 * 128
    each += 64 * C * 4 * isinstance(a, Latent)
    return threads * (each + PARTIALS) + min(T, 4 * R) * a.heads * sums


def _sampling(R: int, V: int, narrow: int, k: int, S: int, ranked: int) -> int:
    """Logits in float32 beside what they were widened from (`narrow` bytes each; 0: the head gives float32), or beside
    what processors, truncation without native code (`ranked` bytes) or log-probabilities make of some of them."""
    head = R * V * (4 + narrow)
    some = min(R, AT_ONCE)
    processing = R * V * 4 + some * V * PROCESSED + max(ranked, some * S * LOOKED_BACK)
    return max(head, processing, R * V * 4 + _logprobs(min(R, rows_at_once(k)), V, k) + R * (k * 16 + MAX_WATCHED * 4))


def _scoring(T: int, V: int, narrow: int, k: int) -> int:
    n = min(T, SCORED_AT_ONCE)
    head = n * V * (4 + narrow)
    return max(head, n * V * 4 + _logprobs(min(n, rows_at_once(k)), V, k)) + T * (k * 16 + MAX_WATCHED * 4)


def _logprobs(n: int, V: int, k: int) -> int:
    """log_softmax, and its k leading values: sorted whole with 64-bit ids where k is large."""
    return n * V * 4 + n * (V * 12 + k * 4 if 4 * k >= V or k > 4096 else k * 96 + V)


def _small(n: int, V: int, item: int = 4) -> int:
    """Bytes of [n, V], if the allocator takes them from the heap."""
    return n * V * item if n * V * item < 32 * MIB else 0


def base_now() -> int:
    """Bytes resident in this process: before a model is loaded, the base."""
    return psutil.Process().memory_info().rss


def fitted(s: Shapes, memory: int, length: int | None) -> Shapes:
    """The same shapes with as many blocks as `memory` bytes hold beside everything else, at most what all rows use.

    Args:
        s: `max_len` is the longest that is wanted, `blocks` is ignored.
        length: what the user asked for, in tokens, which must fit; None cuts `max_len` to what does.

    Raises:
        ConfigError: it does not fit; says by how much, and which flags would make it fit.
    """
    per_block = s.per_block
    need = BLOCK * (-(-(length or BLOCK) // BLOCK))
    least = account(dataclasses.replace(s, blocks=1 + need // BLOCK, max_len=length or BLOCK))
    if least.peak > memory:
        what = f"{need} tokens of KV" if length else "a single block of KV"
        raise ConfigError(
            f"{said(memory)} are {said(least.peak - memory)} too few for this model with {what}, "
            f"{s.mode.rows} sequences and {s.mode.budget} tokens a step, which take {said(least.peak)}",
            where="--memory",
            remedy=_remedy(s, memory, length) or f"no flag saves that much: give at least {said(least.peak)}",
        )
    blocks, max_len = 0, s.max_len
    for _ in range(8):  # a shorter row is a smaller row: a few rounds settle it
        beside = account(dataclasses.replace(s, blocks=1, max_len=max_len)).beside_pool
        blocks, _ = split(memory - beside, per_block, 1 + s.mode.rows * -(-max_len // BLOCK), s.apart)
        if length is not None or blocks * BLOCK - BLOCK >= max_len:
            break
        max_len = max(BLOCK, (blocks - 1) * BLOCK)
    blocks = min(blocks, 1 + s.mode.rows * -(-max_len // BLOCK))
    return dataclasses.replace(s, blocks=blocks, max_len=max_len)


def _remedy(s: Shapes, memory: int, length: int | None) -> str:
    """Flags that would make it fit, those that change least first; empty when none does."""

    def fits(x: Shapes, tokens: int | None) -> bool:
        tokens = tokens or BLOCK
        x = dataclasses.replace(x, blocks=1 + -(-tokens // BLOCK), max_len=tokens)
        return account(x).peak <= memory

    found = []
    for words, x, tokens in _changes(s, length):
        if fits(x, tokens):
            found.append(words)
        if len(found) == 3:
            break
    return "or ".join(f"{words} " for words in found).strip()


def _changes(s: Shapes, length: int | None) -> Iterator[tuple[str, Shapes, int | None]]:
    """(flags, the shapes they give, the length), single changes first."""
    n = length
    while n is not None and n > 256:
        n //= 2
        yield f"--max-model-len {n}", s, n
    singles: list[tuple[str, Shapes]] = []
    rows, budget = s.mode.rows, s.mode.budget
    while rows > 4:
        rows //= 2
        budget = min(s.mode.budget, max(rows, 128))
        mode = Mode(budget=budget, rows=rows)
        singles.append((f"--max-num-seqs {rows} --max-num-batched-tokens {budget}", dataclasses.replace(s, mode=mode)))
    small = (16 * MIB, "--answer-memory 16MiB")
    if s.answer_bytes > small[0]:
        singles.append((small[1], dataclasses.replace(s, answer_bytes=small[0])))
    singles += [(f"--quantization {q}", dataclasses.replace(s, how=Packing(q, ""))) for q in _fewer_bits(s)]
    for words, x in singles:
        yield words, x, length
    # Everything that can be small is, and then weights of fewer bits.
    least = dataclasses.replace(s, mode=Mode(budget=128, rows=4), answer_bytes=min(s.answer_bytes, small[0]))
    words = f"--max-num-seqs 4 --max-num-batched-tokens 128 {small[1]}"
    for q in ("", *_fewer_bits(s)):
        x = dataclasses.replace(least, how=Packing(q, "")) if q else least
        more = f"{words} --quantization {q}" if q else words
        yield more, x, length
        if length is not None and length > 256:
            yield f"{more} --max-model-len 256", x, 256


def _fewer_bits(s: Shapes) -> tuple[str, ...]:
    """Quantizations that make weights smaller than theirs does; a dynamic one is as small as its plain one, and
    proposed only in place of another. Experts have none."""
    kind = s.how.kind
    if any(routed(layer.mlp) for layer in s.spec.layers):
        return ()
    if kind not in QUANTIZED:
        return "int8", "int4"
    return (kind.replace("int8", "int4"),) if QUANTIZED[kind] == 8 else ()


def said(n: int) -> str:
    """Bytes in MiB below 10 GiB, else in GiB."""
    return f"{n / 2**30:.2f} GiB" if n >= 10 * 2**30 else f"{n / MIB:,.0f} MiB"


def size(s: Shapes, settings: Settings, available: int, total: int, now: int = 0) -> tuple[PoolSize, Account]:
    """The pool, by `--memory` or by what is available, and the ledger with it.

    Args:
        s: `max_len` is the model's own, `blocks` is ignored.
        available, total: bytes of the machine or the cgroup.
        now: bytes that are resident in this process already.

    Raises:
        ConfigError: it does not fit, or flags exclude each other.
    """
    per_token = s.per_block // BLOCK
    length = wanted_len(settings, s.max_len)
    if s.answer_bytes < MIB:
        raise ConfigError(f"must be at least 1 MiB, got {s.answer_bytes} bytes", where="--answer-memory")
    if settings.memory is None:
        beside = account(dataclasses.replace(s, blocks=1, max_len=length or s.max_len)).beside_pool
        pool = size_pool(
            settings=settings,
            model_len=s.max_len,
            bytes_per_token=per_token,
            rows=s.mode.rows,
            device="cpu",
            available=available,
            total=total,
            beside=max(beside - now, 0),
            apart=s.apart,
        )
        s = s if pool.near else dataclasses.replace(s, apart=None)
        return pool, account(dataclasses.replace(s, blocks=pool.blocks, max_len=pool.max_len))
    if settings.kv_cache_memory_bytes is not None:
        raise ConfigError("excludes --kv-cache-memory-bytes", where="--memory", remedy="give one of them")
    asked = s.apart
    s = fitted(s if length is None else dataclasses.replace(s, max_len=length), settings.memory, length)
    if not s.near:
        s = dataclasses.replace(s, apart=None)
    kept = account(s)
    reason = f"--memory {said(settings.memory)}, of which {said(kept.beside_pool)} is for everything else"
    if s.pool + kept.beside_pool < settings.memory - BLOCK * per_token:
        reason = f"{s.mode.rows} rows x {s.max_len} tokens, less than {reason}"
    return pool_of(s.blocks, s.max_len, s.per_block, reason, s.apart, asked), kept


def sentence(a: Account) -> str:
    """The ledger in one line, for logs."""
    rest = ", ".join(f"{x.name} {said(x.bytes)}" for x in a.rest if x.bytes >= MIB)
    return f"{said(a.at_rest)} at rest ({rest}), {said(a.at_worst)} at worst, {said(a.while_loading)} while loading"
