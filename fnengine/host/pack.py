"""From chosen runs to the arrays of one `StepInput`, with the smallest `Ask` that serves them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from fnengine.host.ask import pipeline_of
from fnengine.host.request import Sampling
from fnengine.host.runs import Run
from fnengine.host.step import NEWEST, PIPELINE, Admission, Ask, StepInput

BIT = {name: 1 << i for i, name in enumerate(PIPELINE)}
NOISE = 1 << len(PIPELINE)


@cache
def _asked(bits: int) -> tuple[tuple[str, ...], bool]:
    """(names of processors in order, whether any row samples)"""
    return tuple(name for name in PIPELINE if bits & BIT[name]), bool(bits & NOISE)


def asked_of(draft: Draft) -> Ask:
    """How a step in the making draws tokens, and nothing else of it."""
    names, noise = _asked(draft.needs)
    return Ask(pipeline=names, noise=noise)


def needs_of(sampling: Sampling) -> int:
    """Bits of what one row's sampling asks of the step that chooses a token for it."""
    names, noise = pipeline_of([(sampling, False)])
    return sum(BIT[name] for name in names) | (NOISE if noise else 0)


@dataclass(slots=True)
class Draft:
    """A step in the making. Rows with one token come first, prompts after them."""

    runs: list[Run] = field(default_factory=list)
    """With one new token."""
    row: list[int] = field(default_factory=list)
    """Of each of these runs its row, ..."""
    token: list[int] = field(default_factory=list)
    """... the token or NEWEST, ..."""
    emit: list[int] = field(default_factory=list)
    """... and how many tokens it may choose."""
    many: list[tuple[Run, int, int, int]] = field(default_factory=list)
    """(run, first position, tokens, how many it may choose) of runs with more"""
    admit: list[Admission] = field(default_factory=list)
    grow: list[tuple[int, int, int]] = field(default_factory=list)
    copy: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    keep: list[tuple[int, int]] = field(default_factory=list)
    near_copy: list[tuple[int, int]] = field(default_factory=list)
    nears: Callable[[Iterable[int]], np.ndarray] | None = None
    """The window blocks of blocks, where there are such."""
    needs: int = 0
    """Bits of all rows that emit."""
    logprobs: int | None = None
    score: int | None = None
    watched: bool = False
    logits: bool = False
    picks: bool = False
    """Some row wants something after another token than its last."""
    masked: bool = False
    """Some row that emits has a guide."""
    taps: set[str] = field(default_factory=set)


def add(draft: Draft, run: Run, n: int, emits: int) -> None:
    """Puts the next `n` tokens of the run into the step. Its path has been extended by them already."""
    before = run.path.length - n
    if n == 1:
        draft.runs.append(run)
        draft.row.append(run.row)
        draft.token.append(NEWEST if run.newest else int(run.tokens[before]))
        draft.emit.append(emits)
    else:
        draft.many.append((run, before, n, emits))
    if emits:
        ask(draft, run)
    elif run.taps:
        draft.taps.update(run.taps)
    if run.wish is not None:
        draft.logits = True
    if run.likeliest and run.path.length == run.known:
        draft.logprobs = max(run.likeliest, draft.logprobs or 0)
    draft.picks |= emits > 1 or (n > 1 and run.wish == "all")
    if before < run.prompt_len and _targets(run, before, n) > 0:
        k = run.request.prompt_logprobs
        assert k is not None
        draft.score = k if draft.score is None else max(k, draft.score)
        draft.watched |= bool(run.request.watched)


def ask(draft: Draft, run: Run) -> None:
    """Adds what a run that emits asks of the step."""
    draft.needs |= run.needs
    if run.known < run.suppress_until:
        draft.needs |= BIT["bias"]
    draft.masked |= run.guide is not None
    if (k := run.request.logprobs) is not None:
        draft.logprobs = k if draft.logprobs is None else max(k, draft.logprobs)
        draft.watched |= bool(run.request.watched)
    if run.taps:
        draft.taps.update(run.taps)


def _targets(run: Run, before: int, n: int) -> int:
    """How many of the tokens at `before` ... are followed by a prompt token that is still to be scored.

    After a preemption prompts are matched or resumed no further than they were scored, so those are always the first.
    """
    return min(before + n, run.prompt_len - 1) - max(before, len(run.scores)) if run.unscored() else 0


def pack(draft: Draft, leaving: list[tuple[Run, np.ndarray, tuple[int, ...]]]) -> StepInput:
    """The arrays of the step. `leaving` is what is swapped out before it."""
    many, first = draft.many, len(draft.runs)
    R = first + len(many)
    T = first + sum(m[2] for m in many)
    row, emit = np.empty(R, np.int32), np.empty(R, np.int32)
    start, token = np.empty(R + 1, np.int32), np.empty(T, np.int32)
    row[:first], token[:first], emit[:first] = draft.row, draft.token, draft.emit
    start[: first + 1] = np.arange(first + 1)
    target = None if draft.score is None else np.full(T, -1, np.int32)
    at = first
    for r, (run, before, n, emits) in enumerate(many, first):
        row[r], emit[r] = run.row, emits
        token[at : at + n] = run.tokens[before : before + n]
        if target is not None and (k := _targets(run, before, n)) > 0:
            a = max(len(run.scores) - before, 0)
            target[at + a : at + a + k] = run.tokens[before + a + 1 : before + a + k + 1]
        at += n
        start[r + 1] = at
    if target is not None:
        # A prompt's next-to-last token may come alone, and then it has a target.
        for t, run in enumerate(draft.runs):
            if _targets(run, run.path.length - 1, 1) > 0:
                target[t] = run.tokens[run.path.length]
    names, noise = _asked(draft.needs)
    pick = _pick(draft, start) if draft.picks else None
    return StepInput(
        row=row,
        start=start,
        token=token,
        emit=emit,
        copy=np.array(draft.copy, np.int32).reshape(-1, 2),
        grow=np.array(draft.grow, np.int32).reshape(-1, 3),
        admit=tuple(draft.admit),
        ask=Ask(
            pipeline=names,
            noise=noise,
            sample=bool(emit.any()),
            logprobs=draft.logprobs,
            score=draft.score,
            watched=draft.watched,
            logits=draft.logits,
            picks=0 if pick is None else len(pick),
            masked=draft.masked,
            taps=tuple(sorted(draft.taps)),  # in one order: fewer traces
        ),
        target=target,
        pick=pick,
        mask=_mask(draft, start, pick) if draft.masked else None,
        swap_out=_pairs((b, s) for _, blocks, slots in leaving for b, s in zip(blocks, slots, strict=True)),
        swap_in=_pairs(draft.swap_in),
        keep=_pairs(draft.keep),
        near_grow=None if draft.nears is None else draft.nears(block for *_, block in draft.grow),
        near_copy=_pairs(draft.near_copy),
    )


def _pick(draft: Draft, start: np.ndarray) -> np.ndarray:
    """The last tokens of each row, as many as it may choose tokens or wants logits."""
    count = [e or int(_looks(run)) for run, e in zip(draft.runs, draft.emit, strict=True)]
    for run, _, n, emits in draft.many:
        count.append(n if run.wish == "all" else emits or int(_looks(run)))
    return np.concatenate(
        [np.arange(end - c, end, dtype=np.int32) for end, c in zip(start[1:].tolist(), count, strict=True)]
    )


def _looks(run: Run) -> bool:
    """Whether it wants to see what comes after its last token, without choosing it."""
    return run.wish is not None or run.likeliest > 0


def _mask(draft: Draft, start: np.ndarray, pick: np.ndarray | None) -> np.ndarray:
    """What may be chosen after each picked token: everything in rows without a guide."""
    rows = [*zip(draft.runs, draft.emit, strict=True), *((run, emits) for run, _, _, emits in draft.many)]
    words = next(run.masks.shape[1] for run, _ in rows if run.masks is not None)
    if pick is None:
        free = np.full((1, words), -1, np.int32)
        return np.concatenate([run.masks[:1] if n and run.masks is not None else free for run, n in rows])
    # Row r's picked tokens end before `end[r]`; the last of them are those after which it chooses.
    end = np.searchsorted(pick, start[1:])
    mask = np.full((end[-1], words), -1, np.int32)
    for (run, emits), last in zip(rows, end.tolist(), strict=True):
        if emits and run.masks is not None:
            mask[last - emits : last] = run.masks[:emits]
    return mask


def _pairs(pairs: Iterable[tuple[int, int]]) -> np.ndarray | None:
    array = np.array(list(pairs), np.int32).reshape(-1, 2)
    return array if len(array) else None
