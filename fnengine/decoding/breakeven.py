"""What speculation gains, from acceptance and measured step times: speed-up by k and batch size, table and picture.

    expected(k) = 1 + y (a1 + a1 a2 + ... + a1..ak)                         tokens a round
    speed-up(k, R) = expected(k) plain(R) / (verify(k, R) + R propose(k))

y is the share of rounds with a draft, a_i the acceptance of position i if all before it were accepted. Times are
medians of whole rounds through `Runtime.extend`, drawing and rolling back included, at R sequences a batch. A draft
that is a tree takes as many rows a sequence as it has ways; k are its levels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from fnengine.decoding.speculate import AnyProposer, Drawing, Tally, begun, taps_of
from fnengine.errors import OutOfBlocks
from fnengine.host.request import Sampling
from fnengine.runtime import Runtime
from fnengine.sampling import prepared


@dataclass(frozen=True)
class Times:
    """Seconds, measured."""

    plain: dict[int, float]
    """By batch size R: a step of a token a row, drawn inside of it."""
    verify: dict[tuple[int, int], float]
    """By (k, R): a step of k + 1 tokens a row, the verification, and the way back to one token more."""
    propose: dict[int, float]
    """By k: one row's draft."""
    context: int
    ways: int = 1
    """Rows of each sequence in `verify`."""


@dataclass(frozen=True)
class Gain:
    """One k and one batch size."""

    k: int
    batch: int
    speedup: float
    cost: float
    """A speculative round's time over a plain step's."""
    break_even: float | None
    """The acceptance, the same at every position, from which it pays; None: not even 1 would do."""


def measure(
    runtime: Runtime,
    proposer: AnyProposer,
    prompt: Sequence[int],
    *,
    ks: Sequence[int],
    batches: Sequence[int],
    seconds: float,
    ways: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Times of rounds, one shape after the other, round after round, so that a slow moment falls on all of them.

    Batches that the runtime has no rows or blocks for are left out. `ways` is `ways_of` the drafts.
    """
    rng, vocab = np.random.default_rng(0), runtime.model.spec.vocab
    how = Sampling(temperature=0.8, seed=1)
    draw = prepared(how, vocab, runtime.model.device)  # as `speculate` verifies
    spans: dict[tuple[int, int], list[float]] = {}
    proposing: dict[int, list[float]] = {k: [] for k in ks}
    prompt = list(prompt)[-max(1, runtime.max_len - 3 * (len(ks) + 1) - max(ks) - 1) :]
    also: dict[str, Any] = {"taps": taps} if (taps := taps_of(proposer)) else {}
    seen = runtime.extend(runtime.empty, prompt, logits=None, taps=taps)[-1] if taps else {}
    state = begun(proposer, prompt, Drawing(how, len(prompt)), seen)
    begin, passes = clock(), 0
    most = runtime.settings.mode(runtime.model.device.type).rows
    sizes = [R for R in batches if most >= R]
    while passes < 4 or clock() - begin < seconds:
        for R in list(sizes):
            try:
                base = runtime.extend([(runtime.empty, list(prompt))] * R, logits=None)
                seqs = [s for s, _ in base]
                for k in (0, *ks):
                    for _ in range(3):
                        tokens = rng.integers(0, vocab, (R, k + 1))
                        forks = [(s, line) for s, line in zip(seqs, tokens, strict=True) for _ in range(ways)]
                        began = clock()
                        if k == 0:
                            made = runtime.extend(list(zip(seqs, tokens, strict=True)), sample=how)
                            seqs = [s for s, _ in made]
                        else:
                            made = runtime.extend(forks, logits="all", **also)[::ways]
                            at = [len(s) + 1 for s in seqs]
                            logits_nV = torch.stack([r[1] for r in made]).flatten(0, 1)
                            draw(logits_nV, [n + i for n in at for i in range(k + 1)])
                            seqs = [r[0][:n] for r, n in zip(made, at, strict=True)]
                        spans.setdefault((k, R), []).append(clock() - began)
            except OutOfBlocks:
                sizes.remove(R)
                spans = {key: t for key, t in spans.items() if key[1] != R}
        for k in ks:
            began = clock()
            proposer.propose(state, k)
            proposing[k].append(clock() - began)
        passes += 1
    found = {key: median(t[3:] or t) for key, t in spans.items()}  # the first ones of a size prepare it
    return Times(
        plain={R: t for (k, R), t in found.items() if k == 0},
        verify={key: t for key, t in found.items() if key[0]},
        propose={k: median(t) for k, t in proposing.items()},
        context=len(prompt),
        ways=ways,
    )


def ways_of(tally: Tally) -> int:
    """Ways through a draft, rounded up from their mean."""
    return max(1, -(-tally.leaves // max(tally.drafts, 1)))


def expected(tally: Tally, k: int) -> float:
    """Tokens a round with k draft tokens asked for."""
    share = tally.tried[0] / tally.asked if tally.tried and tally.asked else 0.0
    total, chain = 1.0, share
    for a in tally.acceptance[:k]:
        chain *= a
        total += chain
    return total


def gains(tally: Tally, times: Times) -> list[Gain]:
    """Of every k and batch size that were measured."""
    out = []
    for (k, R), seconds in sorted(times.verify.items()):
        cost = (seconds + R * times.propose[k]) / times.plain[R]
        out.append(Gain(k, R, expected(tally, k) / cost, cost, break_even(k, cost)))
    return out


def break_even(k: int, cost: float) -> float | None:
    """The a with 1 + a + ... + a^k = cost, in [0, 1]; None where cost is more than k + 1."""
    if cost > k + 1:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        a = (low + high) / 2
        low, high = (a, high) if sum(a**i for i in range(k + 1)) < cost else (low, a)
    return high


def table(tally: Tally, found: list[Gain]) -> list[str]:
    """Aligned lines: acceptance by position, then speed-up and break-even by k and batch."""
    lines = ["position    tried  accepted    rate"]
    for i, (tried, taken) in enumerate(zip(tally.tried, tally.taken, strict=True), start=1):
        lines.append(f"{i:>8}{tried:>9}{taken:>10}{taken / tried if tried else 0:>8.1%}")
    batches = sorted({g.batch for g in found})
    lines += ["", "speed-up (acceptance from which it pays, the same at each position)"]
    lines.append(f"{'k':>4}" + "".join(f"{f'batch {R}':>18}" for R in batches))
    for k in sorted({g.k for g in found}):
        cells = []
        for g in (g for R in batches for g in found if (g.k, g.batch) == (k, R)):
            least = "never" if g.break_even is None else f"{g.break_even:.0%}"
            cells.append(f"{f'{g.speedup:.2f} ({least})':>18}")
        lines.append(f"{k:>4}" + "".join(cells))
    return lines


COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#555555")


def picture(found: list[Gain], width: int = 560, height: int = 320) -> str:
    """Speed-up over k as inline SVG, a line for each batch size, and one at 1."""
    ks, batches = sorted({g.k for g in found}), sorted({g.batch for g in found})
    top = max(1.2, *(g.speedup for g in found)) * 1.05
    left, bottom = 46, height - 34

    def x(k: float) -> float:
        return left + (k - ks[0]) / max(ks[-1] - ks[0], 1) * (width - left - 96)

    def y(v: float) -> float:
        return bottom - v / top * (bottom - 14)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="speed-up by k and batch size">',
        f'<line x1="{left}" y1="{bottom}" x2="{width - 90}" y2="{bottom}" stroke="#888"/>',
        f'<line x1="{left}" y1="14" x2="{left}" y2="{bottom}" stroke="#888"/>',
        f'<line x1="{left}" y1="{y(1):.1f}" x2="{width - 90}" y2="{y(1):.1f}" stroke="#888" stroke-dasharray="4 4"/>',
        f'<text x="{(left + width - 90) / 2:.0f}" y="{height - 4}" text-anchor="middle">draft tokens a step (k)</text>',
    ]
    step = 0.5 if top < 4 else 1.0
    for i in range(int(top / step) + 1):
        parts.append(f'<text x="{left - 6}" y="{y(i * step) + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    parts += [f'<text x="{x(k):.1f}" y="{bottom + 15}" text-anchor="middle">{k}</text>' for k in ks]
    for i, R in enumerate(batches):
        line = sorted((g for g in found if g.batch == R), key=lambda g: g.k)
        points = " ".join(f"{x(g.k):.1f},{y(g.speedup):.1f}" for g in line)
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 84}" y="{y(line[-1].speedup) + 4:.1f}" fill="{colour}">batch {R}</text>')
    return "".join([*parts, "</svg>"])
