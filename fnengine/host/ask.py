"""The smallest pipeline that serves a set of rows: what nobody needs is not computed."""

from __future__ import annotations

from collections.abc import Iterable

from fnengine.host.request import Sampling
from fnengine.host.step import PIPELINE


def pipeline_of(rows: Iterable[tuple[Sampling, bool]]) -> tuple[tuple[str, ...], bool]:
    """(names of logits processors in order, whether any row samples), given each row's sampling and whether it forbids
    tokens now."""
    names: set[str] = set()
    noise = False
    for s, suppresses in rows:
        if s.logit_bias or suppresses:
            names.add("bias")
        if s.frequency_penalty or s.presence_penalty or s.repetition_penalty != 1:
            names.add("penalties")
        if s.temperature > 0:
            noise = True
            if s.min_p > 0:
                names.add("min_p")
            if s.top_k > 0:
                names.add("top_k")
            if s.top_p < 1:
                names.add("top_p")
    return tuple(name for name in PIPELINE if name in names), noise
