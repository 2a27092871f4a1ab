"""The byte ledger of a model that reads texts whole, on CPU: no pool, no rows, one batch at a time.

The largest batch is the budget's, or one text that is longer; the longest text is cut to what memory holds where nobody
asked for a length. Lines are those of `memory`, as far as there are such.

Measured, random weights, one text of the greatest length and eight of 64 tokens, two threads (2026-11-30): BERT-base in
float32, eager, held at most 738 MiB where the ledger says 825, in bfloat16, compiled, 673 of 681; ModernBERT-base in
float32 with a text of 4096 tokens 1270 of 1287.
"""

from __future__ import annotations

import dataclasses

from fnengine.errors import ConfigError
from fnengine.graphs.bucket import fit
from fnengine.kernels.whole import TILE
from fnengine.leaves import QUANTIZED
from fnengine.memory import (
    CODE,
    COMPILING,
    KEPT,
    MIB,
    ONEDNN,
    PIECES,
    THREAD,
    TOKEN_READ,
    TOKEN_TEXT,
    Account,
    Line,
    Shapes,
    activated,
    layer_bytes,
    said,
)
from fnengine.params import memory_plan
from fnengine.settings import PoolSize, Settings, wanted_len
from fnengine.spec import Attention

FUSED = 16 * MIB
"""What torch's fused attention sets up in its first calls (measured: 8 MiB beyond all other lines, in bfloat16)."""
LEAST = 16
"""Tokens: no shorter longest text is made up where memory is scarce."""


def account(s: Shapes) -> Account:
    """The ledger of a reader of these shapes; `s.max_len` is the longest text."""
    spec, item = s.spec, s.dtype.itemsize
    T = fit(max(s.mode.budget, s.max_len), s.mode.rows).tokens
    plan = memory_plan(spec, s.dtype, s.how)
    code = CODE + FUSED + (0 if s.how.kind in QUANTIZED else ONEDNN) + (COMPILING if s.compiling else 0)
    lean = dataclasses.replace(s, compiled=True)
    layer = max(layer_bytes(kind, spec.width, T, lean) for kind in spec.layers)
    if not s.compiled:
        layer += max(T * 2 * activated(kind.mlp) * 4 for kind in spec.layers)
    mixers = [kind.mixer for kind in spec.layers if isinstance(kind.mixer, Attention)]
    attention = max(attention_bytes(a, T, min(T, s.max_len), item, s.threads) for a in mixers)
    ends = T * spec.width * (2 * item + 4) + s.mode.rows * (spec.vector + spec.width) * 8
    rest = (
        Line("base", s.base, "interpreter, torch and what serving imports: measured, not computed"),
        Line("code", code, "native libraries, layers" + ", compiler" * s.compiling),
        Line("tokenizer", spec.vocab * TOKEN_TEXT, f"{spec.vocab:,} tokens"),
        Line("weights", plan.weights, s.how.name),
        Line("workspace", layer + ends + s.threads * THREAD, f"one layer of {T:,} tokens, on paper"),
        Line("allocator", PIECES + min(KEPT, layer + attention), "freed buffers that it does not give back"),
        Line("KV pool", 0, "none: texts are read whole"),
    )
    return Account(
        rest,
        (
            Line("attention", attention, "of the longest text, beside its layer, on paper"),
            Line("writing an answer", s.answer_bytes, "the largest, as objects and as JSON"),
        ),
        Line("answers", 3 * s.answer_bytes, "and texts held by the server"),
        Line("loading", max(plan.peak, plan.weights + spec.vocab * TOKEN_READ), "weights, one array in both forms"),
    )


def attention_bytes(a: Attention, T: int, longest: int, item: int, threads: int) -> int:
    """What `whole_attention` holds beside its inputs: the result, one text's q, k and v for every head, and scores of a
    tile of queries, of one head a thread in torch's own kernel, of all heads in the reference."""
    one = longest * a.heads * a.width
    if a.soft_cap > 0 or a.sinks:
        return T * a.heads * a.width * item + 4 * one * 4 + 3 * a.heads * TILE * longest * 4
    return T * a.heads * a.width * item + 4 * one * item + threads * TILE * longest * 8 + TILE * longest * 4


def fitted(s: Shapes, settings: Settings, available: int, now: int) -> tuple[int, str, Account]:
    """(tokens of the longest text, where that comes from, the ledger).

    Args:
        s: `max_len` is the model's own.
        available, now: bytes of memory that are left, and that this process has already.

    Raises:
        ConfigError: it does not fit.
    """
    if s.answer_bytes < MIB:
        raise ConfigError(f"must be at least 1 MiB, got {s.answer_bytes} bytes", where="--answer-memory")
    wanted = wanted_len(settings, s.max_len)
    length, why = (s.max_len, "the model's own") if wanted is None else (wanted, "--max-model-len")
    limit = available + now if settings.memory is None else settings.memory
    made = account(dataclasses.replace(s, max_len=length))
    while wanted is None and made.worst_step > limit and length > LEAST:
        length, why = max(LEAST, length // 2), f"cut from {s.max_len} to what {said(limit)} hold"
        made = account(dataclasses.replace(s, max_len=length))
    most = made.worst_step if settings.memory is None else made.peak
    if most > limit:
        where = "memory" if settings.memory is None else "--memory"
        raise ConfigError(
            f"{said(limit)} are too few for this model with texts of {length} tokens, which takes {said(most)}",
            where=where,
            remedy="fewer tokens a batch (--max-num-batched-tokens), shorter texts (--max-model-len) or "
            "a smaller --answer-memory",
        )
    return length, why, made


def pool_of(max_len: int, why: str) -> PoolSize:
    """What reports say of the pool that is not there."""
    return PoolSize(0, max_len, 0, f"texts are read whole; longest: {why}")
