"""Measurements beside floors: figures for JSON, tables for people. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import floor
from benchmarks.floor import Job, Rates, Shape
from benchmarks.workloads import Measured, Sizes, ratios


def job_of(m: Measured, shape: Shape, sizes: Sizes, read_once: bool = False) -> Job:
    """What the workload comes down to for the floor."""
    if m.workload == "w3":
        return floor.shared_prefix(shape, m.rows, sizes.prefix, sizes.own, m.new, read_once)
    return floor.batch(shape, m.rows, m.prompt, m.new)


def figures(m: Measured, shape: Shape, rates: Rates, sizes: Sizes) -> dict[str, Any]:
    """Everything about one measurement, by name; seconds, bytes and operations unless the name says otherwise.

    `achieved_read` counts each byte that the floor counts, once a step. Of W3, `floor_seconds` reads the common
    prefix once a row and step, `floor_seconds_prefix_once` once a step for all rows.
    """
    job = job_of(m, shape, sizes)
    least = job.seconds(rates)
    whole_bytes = job.prefill.bytes + job.steps * job.decode.bytes
    whole_flops = job.prefill.flops + job.steps * job.decode.flops
    out: dict[str, Any] = {
        "workload": m.workload,
        "side": m.side,
        "rows": m.rows,
        "prompt": m.prompt,
        "new": m.new,
        "seconds": m.median,
        "all_seconds": m.seconds,
        "output_tokens_per_second": m.output_rate,
        "floor_seconds": least,
        "of_floor": least / m.median,
        "achieved_read": whole_bytes / m.median,
        "achieved_flops": whole_flops / m.median,
    }
    if m.workload == "w2":
        out["time_to_first_token"] = m.median
    if m.workload == "w3":
        out["floor_seconds_prefix_once"] = job_of(m, shape, sizes, read_once=True).seconds(rates)
    if m.prefill_seconds is not None:
        out["prefill"] = {
            "seconds": m.prefill_seconds,
            "all_seconds": m.prefill,
            "floor_seconds": job.prefill.seconds(rates),
            "of_floor": job.prefill.seconds(rates) / m.prefill_seconds,
            "achieved_flops": job.prefill.flops / m.prefill_seconds,
            "tokens_per_second": m.rows * m.prompt / m.prefill_seconds,
        }
    if m.step_seconds is not None and m.step_seconds > 0:
        out["decode"] = {
            "step_seconds": m.step_seconds,
            "floor_seconds": job.decode.seconds(rates),
            "of_floor": job.decode.seconds(rates) / m.step_seconds,
            "achieved_read": job.decode.bytes / m.step_seconds,
            "achieved_flops": job.decode.flops / m.step_seconds,
            "tokens_per_second": m.rows / m.step_seconds,
        }
    facts = [f for f in m.facts if f]
    if facts:
        out["facts"] = facts
    return out


def paired(ours: Measured, theirs: Measured) -> dict[str, Any]:
    """How many times as fast ours was, repeat by repeat, prefill and decode apart where they are known."""
    out: dict[str, Any] = {"peer": theirs.side, "workload": ours.workload, "rows": ours.rows}
    out["whole"] = ratios(ours, theirs)
    if ours.prefill and theirs.prefill:
        out["prefill"] = [b / a for a, b in zip(ours.prefill, theirs.prefill, strict=True)]
        if ours.new > 1:
            decode = [[t - p for t, p in zip(m.seconds, m.prefill, strict=True)] for m in (ours, theirs)]
            out["decode"] = [b / a for a, b in zip(*decode, strict=True) if a > 0]
    return out


def label(f: dict[str, Any]) -> str:
    return f"{f['workload'].upper()} c={f['rows']}" if f["workload"] == "w1" else f["workload"].upper()


HEAD = (
    "workload",
    "engine",
    "tok/s",
    "seconds",
    "prefill s",
    "prefill GFLOP/s",
    "ms/step",
    "decode GB/s",
    "decode GFLOP/s",
    "floor s",
    "% of floor",
)


def row(f: dict[str, Any]) -> list[str]:
    """A line of the table under `HEAD`."""
    pre, dec = f.get("prefill", {}), f.get("decode", {})
    if f["workload"] == "w2":
        pre = {"seconds": f["seconds"], "achieved_flops": f["achieved_flops"]}
    least = f"{f['floor_seconds']:.3f}"
    share = f"{100 * f['of_floor']:.0f}"
    if "floor_seconds_prefix_once" in f:
        least += f" ({f['floor_seconds_prefix_once']:.3f})"
        share += f" ({100 * f['floor_seconds_prefix_once'] / f['seconds']:.0f})"
    return [
        label(f),
        f["side"],
        f"{f['output_tokens_per_second']:.1f}",
        f"{f['seconds']:.3f}",
        _number(pre.get("seconds"), 1, 3),
        _number(pre.get("achieved_flops"), 1e-9, 0),
        _number(dec.get("step_seconds"), 1e3, 2),
        _number(dec.get("achieved_read"), 1e-9, 1),
        _number(dec.get("achieved_flops"), 1e-9, 0),
        least,
        share,
    ]


def ratio_row(p: dict[str, Any]) -> list[str]:
    """A line under ("workload", "against", "whole", "prefill", "decode"): each repeat's ratio."""

    def each(values: Sequence[float] | None) -> str:
        return "-" if not values else " ".join(f"{v:.2f}" for v in values)

    return [label(p), p["peer"], each(p["whole"]), each(p.get("prefill")), each(p.get("decode"))]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need; the first two to the left, figures to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = []
    for line in lines:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(out)


def machine_lines(facts: dict[str, Any], measured: Sequence[dict[str, float]], dtype: str, others: float) -> str:
    """Machine, date, commit and command, the rates, and a warning when others kept the machine busy."""
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    both = [
        f"{name} {' then '.join(f'{m[key] / 1e9:.1f}' for m in measured)} {unit}"
        for name, key, unit in (("B", "read", "GB/s"), ("F", "matmul", f"GFLOP/s {dtype}"))
    ]
    lines = [
        f"machine  {facts['cpu']}, {facts['cores']} cores, {facts['memory_GB']} GB, {facts['threads']} threads",
        f"run      {facts['date']}, commit {facts['commit']}: {facts['command']}",
        f"software Python {facts['python']}, {versions}",
        f"rates    {'; '.join(both)} (before and after; the floor takes the higher)",
        f"others   took {100 * others:.0f} % of the machine's processor time meanwhile",
    ]
    if others > BUSY:
        lines.append(
            "WARNING  the machine was not quiet: these figures are for trying the script, not for writing down"
        )
    return "\n".join(lines)


BUSY = 0.05
"""Share of the processors' time taken by others above which figures are not worth keeping."""


def write(path: str | None, value: Any) -> None:
    """The value as JSON in a file, its folder made; nothing without a path."""
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(value, indent=1) + "\n")


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"
