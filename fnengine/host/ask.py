"""The smallest pipeline that serves a set of rows: what nobody needs is not computed."""

from __future__ import annotations

from collections.abc import Iterable

from fnengine.host.request import Sampling
from fnengine.host.step import PIPELINE, RARE


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
        if s.allowed_token_ids is not None:
            names.add("allowed")
        if s.bad_words:
            names.add("bad_words")
        if s.no_repeat_ngram_size:
            names.add("no_repeat_ngram")
        if s.dry_multiplier and s.dry_penalty_last_n:
            names.add("dry")
        if s.processors:
            names.add("own")
        if s.temperature > 0:
            noise = True
            if s.typical_p < 1:
                names.add("typical_p")
            if s.xtc_probability > 0:
                names.add("xtc")
            if s.min_p > 0:
                names.add("min_p")
            if s.top_k > 0:
                names.add("top_k")
            if s.top_p < 1:
                names.add("top_p")
    return tuple(name for name in PIPELINE if name in names), noise


def is_rare(sampling: Sampling) -> bool:
    """Whether it asks for a processor that few ask for."""
    return not set(RARE).isdisjoint(pipeline_of([(sampling, False)])[0])
