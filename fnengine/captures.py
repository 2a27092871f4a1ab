"""What of an engine's steps is captured: the ladder, what graphs are asked, and what one may stand for.

`graphs/` knows shapes and opaque questions; this module knows `Ask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fnengine.graphs import ladder as ladders
from fnengine.graphs.bucket import Bucket
from fnengine.graphs.captured import CudaGraphs, Twin
from fnengine.graphs.dispatch import FULL, PIECEWISE, Capturing, mode_of
from fnengine.host.step import COMMON, Ask
from fnengine.kernels import Backend, Ops, library
from fnengine.settings import Mode, Settings

GREEDY = Ask()
ANYTHING = Ask(pipeline=COMMON, noise=True)
"""Serves rows of any common sampling parameters: a processor leaves a row alone that does not ask for it, and a row at
temperature 0 gets no noise. The rare processors (`host.step.RARE`) are left out: every sampled step would pay for a
sort of all rows' logits and for dozens of passes over their histories. A step with a row that wants one runs eagerly
and is counted, as one with log-probabilities does, or has a graph of its own where capture is lazy."""
AT_START = (GREEDY, ANYTHING)
"""What graphs captured at the start compute; other questions are captured when asked twice, or run eagerly."""


def covers(more: Ask, ask: Ask) -> bool:
    """Whether the tokens and log-probabilities of `ask` are among those of `more`, whoever reads them looks no further.

    Prompts alone (`sample=False`) are served by any: a row that does not emit keeps its tokens.
    """
    return (
        set(more.pipeline) >= set(ask.pipeline)
        and more.noise >= ask.noise
        and more.sample >= ask.sample
        and more.score == ask.score
        and more.logits >= ask.logits
        and more.picks == ask.picks
        and more.masked == ask.masked
        and more.watched >= ask.watched
        and more.taps == ask.taps
        and (ask.logprobs is None or (more.logprobs is not None and more.logprobs >= ask.logprobs))
    )


def relaxed(ask: Ask) -> tuple[Ask, ...]:
    """What graphs captured at the start compute that covers `ask`, the least first."""
    starts = [replace(more, picks=ask.picks, masked=ask.masked) for more in AT_START]
    return tuple(more for more in starts if more != ask and covers(more, ask))


def fitted(bucket: Bucket, ask: Ask) -> Ask:
    """The ask with as many picked tokens as a graph of this bucket has: all of a small one, else a power of two."""
    if not ask.picks:
        return ask
    return replace(ask, picks=min(1 << (ask.picks - 1).bit_length(), bucket.tokens))


def late(ask: Ask) -> bool:
    """Whether a step that asks this is captured when it comes again, also where all others are at the start: it
    verifies drafts, whose sizes follow what is accepted, or follows a grammar."""
    return (ask.picks > 0 or ask.masked) and not ask.logits and not ask.taps and ask.score is None


@dataclass(frozen=True)
class Plan:
    """What will be captured, and why so."""

    capturing: Capturing[Ask] | None
    reason: str


def plan(
    settings: Settings, mode: Mode, ops: Ops, device: torch.device, lazy: bool, more: Sequence[Backend] = ()
) -> Plan:
    """What of the steps is captured with these settings.

    Args:
        lazy: what `graph_capture` means where it is not set.
        more: what the model's layers call beside `ops`.

    Raises:
        ConfigError: there is no such mode, or the file of the ladder cannot be read.
    """
    name = settings.graph_mode.upper()
    decode, mixed = mode_of(name)
    twin = device.type == "cpu" and settings.graph_twin
    ladder, whence = ladders.default(mode.budget, mode.rows), "the default ladder"
    if settings.graphs is not None:
        ladder, whence = ladders.load(Path(settings.graphs))[0], settings.graphs
    if device.type == "cpu" and not twin:
        return Plan(None, "nothing is captured on CPU, where small steps are recorded")
    if decode is None and mixed is None:
        return Plan(None, "nothing is captured: --graph-mode NONE")
    if settings.enforce_eager and not twin:
        return Plan(None, "nothing is captured: --enforce-eager")
    reason = f"{name}, {len(ladder.buckets)} buckets from {whence}"
    cannot = [b for b in (ops.paged_attention.backend, *more) if not b.capturable]
    if FULL in (decode, mixed) and cannot:
        name, what = "PIECEWISE", cannot[0]
        said = "attention" if what is ops.paged_attention.backend else what.op.name
        reason = f"{name}, because a graph cannot hold {what.name} {said}; " + reason
    kinds = {
        FULL: Twin() if twin else CudaGraphs(device),
        PIECEWISE: Twin(library.outside) if twin else CudaGraphs(device, library.outside),
    }
    wanted = {kind: recorder for kind, recorder in kinds.items() if kind in mode_of(name)}
    lazy = settings.graph_capture == "lazy" or (settings.graph_capture is None and lazy)
    if lazy:
        reason += ", each captured when it is met for the second time"
    return Plan(
        Capturing(ladder, name, wanted, () if lazy else AT_START, relaxed, fitted, 1 if lazy else None, late), reason
    )
