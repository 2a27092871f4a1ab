"""The laws of every family, in one form: its logits and greedy texts are those of transformers, in whatever pieces a
sequence is computed.

Oracle: transformers' own model of the same tiny random weights in float32 (eager attention), one dense forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import fnengine as fn
from fnengine.model import Model
from tests.models import tiny_model, upstream


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 131, n).tolist()


def runtime(model: Model, **options: Any) -> fn.Runtime:
    sizes: dict[str, Any] = dict(max_num_seqs=4, max_model_len=160, max_num_batched_tokens=64)
    return fn.Runtime(model, **{**sizes, "kv_cache_memory_bytes": 1 << 20, "enforce_eager": True, **options})


def oracle(name: str, ids: list[int]) -> torch.Tensor:
    """[n, V]: transformers' logits of one dense forward."""
    with torch.no_grad():
        return upstream(name)(torch.tensor([ids]), use_cache=False).logits[0]


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference of a logit over the largest logit."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@dataclass(frozen=True)
class Cuts:
    """Where a text is cut: computed up to `first`, then up to `second`, then token by token; forked at `fork`."""

    text: int = 53
    first: int = 37
    second: int = 50
    fork: int = 37


def logits_are_those_of_transformers(
    name: str,
    rt: fn.Runtime,
    tolerance: float,
    cuts: Cuts = Cuts(),
    hit: int | None = None,
) -> None:
    """Prefill, prefill in chunks, decoding, rows at different stages in one step, a fork after it and within one, and a
    hit of the prefix, of `hit` tokens if that is said."""
    a, b, other, n = tokens(cuts.text, 1), tokens(41, 2), tokens(9, 3), cuts.second
    want_a, want_b = oracle(name, a), oracle(name, b)
    first, logits = rt.extend(rt.empty, a[: cuts.first], logits="all")
    assert worst(logits, want_a[: cuts.first]) < tolerance, "a whole prompt"
    (first, middle), (second, of_b) = rt.extend([(first, a[cuts.first : n]), (rt.empty, b[:18])], logits="all")
    assert worst(middle, want_a[cuts.first : n]) < tolerance, "a chunk, with a whole prompt in the same step"
    got_b = [of_b]
    for i in range(3):  # decoding beside a chunk
        (first, one), (second, more) = rt.extend(
            [(first, a[n + i : n + i + 1]), (second, b[18 + 7 * i : 25 + 7 * i])], logits="all"
        )
        assert worst(one, want_a[n + i : n + i + 1]) < tolerance, "one token"
        got_b.append(more)
    assert worst(torch.cat(got_b), want_b[:39]) < tolerance, "chunks"
    begun = first[: cuts.fork]
    (forked, logits), (twin, once) = rt.extend([(begun, other), (begun, other[:1])], logits="all")
    want = oracle(name, a[: cuts.fork] + other)[cuts.fork :]
    assert worst(logits, want) < tolerance, "a fork"
    assert worst(once, want[:1]) < tolerance, "another one, in the same step"
    for seq in (first, second, forked, twin, begun):
        seq.close()
    hits = rt._ledger.hits
    _, last = rt.extend(rt.empty, a)
    assert worst(last, want_a[-1]) < tolerance, "a prefix that is there already"
    assert rt._ledger.hits - hits == hit if hit is not None else rt._ledger.hits > hits
    rt.check()


def a_greedy_text_is_that_of_transformers(name: str, rt: fn.Runtime) -> None:
    """Each of 64 tokens is what transformers' own logits, after everything before it, are largest for."""
    prompt, got = tokens(11, seed=7), []
    seq, logits = rt.extend(rt.empty, prompt)
    for _ in range(64):
        got.append(int(logits.argmax()))
        seq, logits = rt.extend(seq, got[-1:])
    assert got == oracle(name, prompt + got)[10:-1].argmax(-1).tolist()
    assert len(set(got)) > 4, "a text of one repeated token would prove little"


def compiled_is_uncompiled(name: str, caplog: Any, tolerance: float) -> None:
    """The same steps compiled; small ones come often enough to be recorded."""
    compiled_goes_as(runtime(tiny_model(name)), runtime(tiny_model(name), enforce_eager=False), caplog, tolerance)


def compiled_goes_as(plain: fn.Runtime, rt: fn.Runtime, caplog: Any, tolerance: float) -> None:
    """`compiled_is_uncompiled`, of two runtimes over one model."""
    ids = tokens(40, seed=6)
    want = plain.extend(plain.empty, ids, logits="all")[1]
    assert rt.built.execution.startswith("compiled")
    seq, first = rt.extend(rt.empty, ids[:33], logits="all")
    rest = []
    for t in ids[33:]:
        seq, logits = rt.extend(seq, [t])
        rest.append(logits)
    assert worst(torch.cat([first, torch.stack(rest)]), want) < tolerance
    assert "without a recording" not in caplog.text


def rows_do_not_depend_on_neighbours(model: Model) -> None:
    """A token's logits have the same bits alone and among 1 to 40 other tokens."""
    ids = tokens(20, seed=9)
    rt = runtime(model)
    seq, _ = rt.extend(rt.empty, ids[:19])
    _, want = rt.extend(seq, ids[19:])
    for others in (1, 2, 3, 6, 11, 29, 40):
        (_, _), (_, got) = rt.extend([(rt.empty, tokens(others, seed=others)), (seq, ids[19:])])
        assert torch.equal(got, want), others
