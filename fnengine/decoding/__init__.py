"""Decoding strategies as async functions over `extend`: the decorator, the shipped ones, and `run` for many at once."""

from __future__ import annotations

from fnengine.decoding.beam import beam
from fnengine.decoding.best_of import best_of
from fnengine.decoding.consistency import self_consistent
from fnengine.decoding.contrastive import contrastive
from fnengine.decoding.forced import forced
from fnengine.decoding.guidance import guided
from fnengine.decoding.rounds import Bounds, Emitted, Job, Outcome, run
from fnengine.decoding.sampled import Sample, draw, sample, samples
from fnengine.decoding.strategy import Context, Strategy, strategy

SHIPPED: dict[str, Strategy] = {
    s.name: s for s in (sample, beam, best_of, guided, contrastive, self_consistent, forced)
}
"""By name."""

__all__ = [
    "SHIPPED",
    "Bounds",
    "Context",
    "Emitted",
    "Job",
    "Outcome",
    "Sample",
    "Strategy",
    "beam",
    "best_of",
    "contrastive",
    "draw",
    "forced",
    "guided",
    "run",
    "sample",
    "samples",
    "self_consistent",
    "strategy",
]
