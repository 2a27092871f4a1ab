"""What graphs did, as a value: hits and padding per bucket, steps that ran eagerly and why, what capture cost.

    usage.add(5, 5, bucket=Bucket(6, 6), seconds=0.003)     a step that was replayed, one token of six is padding
    usage.add(9000, 40, reason="no bucket holds it")        a step that was not
    print(*table(usage), sep="\\n")

A `Usage` only counts. Merging, tables, JSON and the picture are functions over it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fnengine.graphs.bucket import Bucket


@dataclass(slots=True)
class Hits:
    """Steps that ran in one bucket."""

    steps: int = 0
    tokens: int = 0
    """Real ones, summed over steps."""
    rows: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Spent:
    """The graphs of one bucket; there are several when steps of several trees met it."""

    graphs: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """Spent on capturing them."""


@dataclass(slots=True)
class Usage:
    """Counts of what ran where. Plain and mutable, because every step adds to it."""

    buckets: dict[Bucket, Hits] = field(default_factory=dict)
    eager: dict[str, Hits] = field(default_factory=dict)
    """By the reason why no graph was replayed."""
    relaxed: Counter[str] = field(default_factory=Counter)
    """Replayed in a graph of a wider key than the step's own, by what was widened."""
    captured: dict[Bucket, Spent] = field(default_factory=dict)
    recompiles: int = 0
    """Compilations after warm-up."""

    def add(
        self,
        tokens: int,
        rows: int,
        *,
        bucket: Bucket | None = None,
        reason: str = "no bucket holds it",
        relaxed: str | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Counts one step: in its bucket, or with None as an eager one for that reason."""
        if bucket is None:
            hits = self.eager.get(reason) or self.eager.setdefault(reason, Hits())
        else:
            hits = self.buckets.get(bucket) or self.buckets.setdefault(bucket, Hits())
        hits.steps += 1
        hits.tokens += tokens
        hits.rows += rows
        hits.seconds += seconds
        if relaxed is not None:
            self.relaxed[relaxed] += 1

    def capture(self, bucket: Bucket, bytes: int, seconds: float) -> None:
        """Counts one graph that was captured."""
        kept = self.captured.setdefault(bucket, Spent())
        kept.graphs += 1
        kept.bytes += bytes
        kept.seconds += seconds

    @property
    def steps(self) -> int:
        """All of them, eager ones included."""
        return sum(h.steps for h in (*self.buckets.values(), *self.eager.values()))

    @property
    def padded(self) -> int:
        """Tokens that were computed for nobody. Eager steps have none."""
        return sum(b.tokens * h.steps - h.tokens for b, h in self.buckets.items())

    @property
    def waste(self) -> float:
        """Padding tokens over all tokens that were computed, eager ones included; 0 when nothing ran."""
        real = sum(h.tokens for h in (*self.buckets.values(), *self.eager.values()))
        return self.padded / (real + self.padded) if real else 0.0


def waste_of(bucket: Bucket, hits: Hits) -> float:
    """Padding tokens over all tokens of one bucket's steps."""
    return 1 - hits.tokens / (bucket.tokens * hits.steps) if hits.steps else 0.0


def merge(usages: Iterable[Usage]) -> Usage:
    """The sum of several."""
    out = Usage()
    for u in usages:
        for mine, theirs in ((out.buckets, u.buckets), (out.eager, u.eager)):
            for key, h in theirs.items():
                was = mine.get(key, Hits())  # pyright: ignore[reportArgumentType, reportCallIssue]
                mine[key] = Hits(  # pyright: ignore[reportArgumentType]
                    was.steps + h.steps, was.tokens + h.tokens, was.rows + h.rows, was.seconds + h.seconds
                )
        for bucket, c in u.captured.items():
            was = out.captured.get(bucket, Spent())
            out.captured[bucket] = Spent(was.graphs + c.graphs, was.bytes + c.bytes, was.seconds + c.seconds)
        out.relaxed += u.relaxed
        out.recompiles += u.recompiles
    return out


def every_bucket(*usages: Usage) -> list[Bucket]:
    """Buckets that were hit or captured in any of them, in the order in which they are tried."""
    found = {b for u in usages for b in (*u.buckets, *u.captured)}
    return sorted(found, key=lambda b: (b.tokens, b.rows))


# --- text and JSON ----------------------------------------------------------------------------------------------------


def table(usage: Usage) -> list[str]:
    """Aligned lines: a bucket each, then eager steps by reason, then the sums."""
    head = f"{'bucket':>14}{'hits':>9}{'tokens':>11}{'computed':>11}{'waste':>8}{'ms':>9}{'MiB':>8}{'capture s':>11}"
    lines = [head]
    for b in every_bucket(usage):
        h, c = usage.buckets.get(b, Hits()), usage.captured.get(b)
        cost = f"{'-':>8}{'-':>11}" if c is None else f"{c.bytes / 2**20:>8.1f}{c.seconds:>11.2f}"
        lines.append(
            f"{shape(b):>14}{h.steps:>9}{h.tokens:>11}{b.tokens * h.steps:>11}{waste_of(b, h):>8.1%}{_ms(h):>9}{cost}"
        )
    for reason, h in sorted(usage.eager.items()):
        lines.append(f"{'eager':>14}{h.steps:>9}{h.tokens:>11}{h.tokens:>11}{0:>8.1%}{_ms(h):>9}  {reason}")
    real = sum(h.tokens for h in (*usage.buckets.values(), *usage.eager.values()))
    whole = merge([usage])
    size = sum(c.bytes for c in whole.captured.values()) / 2**20
    seconds = sum(c.seconds for c in whole.captured.values())
    every = Hits(usage.steps, 0, 0, sum(h.seconds for h in (*usage.buckets.values(), *usage.eager.values())))
    cost = f"{size:>8.1f}{seconds:>11.2f}" if usage.captured else f"{'-':>8}{'-':>11}"
    lines.append(
        f"{'all':>14}{usage.steps:>9}{real:>11}{real + usage.padded:>11}{usage.waste:>8.1%}{_ms(every):>9}{cost}"
    )
    if usage.relaxed:
        lines.append("relaxed keys: " + ", ".join(f"{name} {n}" for name, n in sorted(usage.relaxed.items())))
    if usage.recompiles:
        lines.append(f"recompiles after warm-up: {usage.recompiles}")
    return lines


def shape(b: Bucket) -> str:
    """`tokens x rows`"""
    return f"{b.tokens} x {b.rows}"


def _ms(h: Hits) -> str:
    return f"{1e3 * h.seconds / h.steps:.3f}" if h.steps and h.seconds else "-"


def as_json(usage: Usage) -> dict[str, Any]:
    """The same for programs; `from_json` reads it."""

    def fields(h: Hits) -> dict[str, Any]:
        return {"steps": h.steps, "tokens": h.tokens, "rows": h.rows, "seconds": h.seconds}

    buckets = []
    for b in every_bucket(usage):
        h, c = usage.buckets.get(b, Hits()), usage.captured.get(b, Spent())
        kept = {"graphs": c.graphs, "bytes": c.bytes, "capture_seconds": c.seconds}
        buckets.append({"bucket": [b.tokens, b.rows], **fields(h), "waste": waste_of(b, h), **kept})
    return {
        "steps": usage.steps,
        "waste": usage.waste,
        "buckets": buckets,
        "eager": {reason: fields(h) for reason, h in sorted(usage.eager.items())},
        "relaxed": dict(sorted(usage.relaxed.items())),
        "recompiles": usage.recompiles,
    }


def from_json(body: dict[str, Any]) -> Usage:
    """The usage that `as_json` wrote."""

    def hits(d: dict[str, Any]) -> Hits:
        return Hits(d["steps"], d["tokens"], d["rows"], d["seconds"])

    of = [(Bucket(*d["bucket"]), d) for d in body["buckets"]]
    return Usage(
        {b: hits(d) for b, d in of if d["steps"]},
        {reason: hits(d) for reason, d in body["eager"].items()},
        Counter(body["relaxed"]),
        {b: Spent(d["graphs"], d["bytes"], d["capture_seconds"]) for b, d in of if d["graphs"]},
        body["recompiles"],
    )


# --- the picture ------------------------------------------------------------------------------------------------------

_REAL, _PADDING, _EAGER = "#2b6cb0", "#dd8a2c", "#8a8a8a"
_WIDE, _LINE, _LEFT, _RIGHT = 460, 18, 92, 128


def picture(before: tuple[str, Usage], after: tuple[str, Usage]) -> str:
    """An SVG of two usages side by side: a bar a bucket, as long as the tokens it computed, the padding in orange.

    Both sides have one scale, so lengths can be compared across.
    """
    sides = [_bars(u) for _, u in (before, after)]
    most = max([bar[1] + bar[2] for side in sides for bar in side], default=1) or 1
    height = 46 + _LINE * max(map(len, sides), default=0)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _WIDE} {height}" role="img" '
        f'font-family="sans-serif" font-size="11" aria-label="padding per bucket, before and after">'
    ]
    for s, ((name, usage), side) in enumerate(zip((before, after), sides, strict=True)):
        x = s * _WIDE
        out.append(
            f'<text x="{x + 6}" y="18" font-size="14" font-weight="bold">{escape(name)}: '
            f"{usage.waste:.1%} padding, {usage.steps} steps</text>"
        )
        for i, (label, real, padding, note, colour) in enumerate(side):
            y, scale = 34 + i * _LINE, (_WIDE - _LEFT - _RIGHT) / most
            end = x + _LEFT + scale * (real + padding)
            out += [
                f'<text x="{x + _LEFT - 6}" y="{y + 11}" text-anchor="end">{escape(label)}</text>',
                f'<rect x="{x + _LEFT}" y="{y}" width="{scale * real:.1f}" height="{_LINE - 4}" fill="{colour}"/>',
                f'<rect x="{x + _LEFT + scale * real:.1f}" y="{y}" width="{scale * padding:.1f}" '
                f'height="{_LINE - 4}" fill="{_PADDING}"/>',
                f'<text x="{end + 5:.1f}" y="{y + 11}">{escape(note)}</text>',
            ]
    return "\n".join([*out, "</svg>"])


def _bars(usage: Usage) -> list[tuple[str, int, int, str, str]]:
    """(label, real tokens, padding tokens, note, colour) of every bucket that was hit, and of eager steps."""
    bars = []
    for b in every_bucket(usage):
        if h := usage.buckets.get(b):
            bars.append(
                (shape(b), h.tokens, b.tokens * h.steps - h.tokens, f"{waste_of(b, h):.1%} of {h.steps} steps", _REAL)
            )
    if usage.eager:
        steps, tokens = (sum(getattr(h, n) for h in usage.eager.values()) for n in ("steps", "tokens"))
        bars.append(("eager", tokens, 0, f"{steps} steps", _EAGER))
    return bars


def page(title: str, before: tuple[str, Usage], after: tuple[str, Usage], notes: Iterable[str] = ()) -> str:
    """A self-contained HTML page: the picture, what the notes say, and both tables."""
    tables = "".join(
        f"<h2>{escape(name)}</h2>\n<pre>{escape(chr(10).join(table(u)))}</pre>\n" for name, u in (before, after)
    )
    said = "".join(f"<li>{escape(n)}</li>\n" for n in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        "<style>body{font:14px sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;background:#fff;color:#111}"
        "pre{overflow-x:auto;font-size:12px}svg{width:100%;height:auto}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n<p>A bar is what a bucket computed, in tokens: blue for somebody, orange padding, "
        f"grey without a graph.</p>\n{picture(before, after)}\n<ul>\n{said}</ul>\n{tables}</body></html>\n"
    )
