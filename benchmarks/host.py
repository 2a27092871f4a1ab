"""What the host costs a step: 256 rows decoding on a device that computes nothing, with W requests waiting behind them.

    python -m benchmarks.host [--waiting 10,100,1000,10000,100000] [--rows 256] [--json FILE] [--plot FILE.svg]

The device (`NullDevice`) answers every step at once with tokens drawn beforehand. A step's **critical path** is
everything the engine does between the moment `Ticket.read` returns step n's tokens and the moment `Device.launch` is
called with step n + 1: on a device of depth 0 (CPU) the device stands idle for exactly that long.

    launch n | read n | commit  metrics  deliver | (submit) | plan  pack | launch n + 1 | ...
                      |<---- after: 1st part --->|          |<- 2nd part |

    commit    `host.commit.commit`: tokens into the books, ends, rows and blocks given back
    metrics   the server's observer of steps (`serve.metrics.Meter.on_step`)
    deliver   detokenizing, stop strings, deltas, sinks, and whatever of the engine is in no other column
    plan      `host.plan.plan` without pack: admissions, preemption, blocks
    pack      `host.pack.pack`: the arrays of the step
    host      all of the above: read n -> launch n + 1, by two readings of the clock

Nothing is subtracted but the time in which this script itself submits the requests that keep the queue at W: it stands
between the two parts and is reported as `submit`, microseconds a request. The time inside `launch` and `read` of the
device is not the host's. A sink is a function that keeps the delta; sockets, HTTP and JSON are not measured here. With
depth 1 (CUDA) the same work is done while the next step already computes, so `host` is then what a step of the device
must at least take, not what is added to it.

Loads: `decode`, nobody ends or is admitted; `steady`, 64 to 192 tokens out, so about two of 256 rows end and two are
admitted a step; `churn`, 4 to 12 tokens out, so about 32 end and 32 are admitted, 1024 prompt tokens a step. Python's
garbage collector runs as in a server (`host.garbage`); its longest pause in the measured steps is in the table, and
beside it what a full collection costs at the end of the run, which a server spends a thousandth of its time on.
Every engine is made, filled and dropped in turn; `--repeats` runs each that many times, and the table has the medians
of the repeats. `p10` is the tenth percentile of the host's time: what it takes when others leave the machine alone.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report, shape
from fnengine.engine import Engine
from fnengine.host import commit as committing
from fnengine.host import plan as planning
from fnengine.host.garbage import Collector
from fnengine.host.output import Delta
from fnengine.host.plan import Policy
from fnengine.host.request import Request, Sampling, Stop
from fnengine.host.step import BLOCK, StepInput, StepOutput
from fnengine.host.tokenizer import Tokenizer
from fnengine.serve.metrics import Meter

VOCAB, PROMPT = 8192, 32
LOADS = {"decode": (1 << 20, 1 << 20), "steady": (64, 192), "churn": (4, 12)}
"""Fewest and most tokens a request generates."""
PHASES = ("commit", "metrics", "deliver", "plan", "pack")
WARM = 100
"""Steps before the measured ones; those of `steady` are as many again, so that ends are spread out."""


@dataclass
class NullDevice:
    """Implements `host.step.Device` and computes nothing: every row that emits gets a token drawn beforehand."""

    rows: int
    blocks: int
    max_len: int
    tokens: np.ndarray
    """[some, rows, 1] int32, taken in turn"""
    depth: int = 0
    host_slots: int = 0
    kept: int | None = None
    windows: tuple[int, int] | None = None
    launched: int = 0
    launch_at: float = 0.0
    """When the newest step was launched, by `time.perf_counter`."""
    read_at: float = 0.0

    def launch(self, step: StepInput) -> NullTicket:
        self.launch_at = time.perf_counter()
        self.launched += 1
        tokens = self.tokens[self.launched % len(self.tokens), : len(step.row)]
        return NullTicket(self, StepOutput(tokens, step.emit))


@dataclass
class NullTicket:
    device: NullDevice
    output: StepOutput

    def read(self) -> StepOutput:
        self.device.read_at = time.perf_counter()
        return self.output


@dataclass
class Clock:
    """Seconds spent in functions that were replaced by timed ones, since the last `take`."""

    spent: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; its seconds are added to `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start

        return timed

    def take(self) -> dict[str, float]:
        """What was spent; from zero again."""
        spent, self.spent = self.spent, {}
        return spent


@contextmanager
def phases(clock: Clock) -> Iterator[None]:
    """Within it the host's plan, pack and commit are timed by `clock`."""
    places = ((planning, "plan"), (planning, "pack"), (committing, "commit"))
    kept = [getattr(module, name) for module, name in places]
    for (module, name), call in zip(places, kept, strict=True):
        setattr(module, name, clock.timed(name, call))
    try:
        yield
    finally:
        for (module, name), call in zip(places, kept, strict=True):
            setattr(module, name, call)


@contextmanager
def pauses() -> Iterator[list[float]]:
    """Seconds of every garbage collection within it."""
    found: list[float] = []
    started = 0.0

    def watch(phase: str, info: dict[str, int]) -> None:
        nonlocal started
        if phase == "start":
            started = time.perf_counter()
        else:
            found.append(time.perf_counter() - started)

    gc.callbacks.append(watch)
    try:
        yield found
    finally:
        gc.callbacks.remove(watch)


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of `VOCAB` tokens, by the same code as a real model's."""
    with tempfile.TemporaryDirectory(prefix="fnengine-host-") as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(shape.made_tokenizer(VOCAB), ensure_ascii=False))
        return Tokenizer.load(folder)


class Crowd:
    """An engine with all rows busy and a number of requests waiting, and the means to keep it so."""

    def __init__(self, text: Tokenizer, load: str, rows: int, waiting: int, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.rows, self.waiting, self.lengths = rows, waiting, LOADS[load]
        most = max(1024, 2 * self.lengths[1]) if load != "decode" else 8192
        self.stop_at = min(self.lengths[1], most - PROMPT - 1)
        per_row = -(-(PROMPT + min(self.stop_at, 2048)) // BLOCK) + 1
        device = NullDevice(
            rows=rows,
            blocks=2 * rows * per_row,
            max_len=most,
            tokens=self.rng.integers(256, VOCAB, (64, rows, 1)).astype(np.int32),
        )
        policy = Policy(budget=2048, rows=rows, queue=waiting + 2 * rows, max_len=most, vocab=VOCAB)
        self.device, self.engine = device, Engine(device, text, policy)
        self.meter = Meter(self.engine)
        self.deltas: list[Delta] = []
        self.number = itertools.count()

    def submit(self) -> float:
        """Seconds that one more request took to be submitted."""
        n = next(self.number)
        low, high = self.lengths
        stop = Stop(max_tokens=min(int(self.rng.integers(low, high + 1)), self.stop_at), ignore_eos=True)
        prompt = self.rng.integers(256, VOCAB, PROMPT).astype(np.int32)
        request = Request(f"r{n}", prompt, Sampling(temperature=0.8, top_p=0.95), stop)
        start = time.perf_counter()
        self.engine.submit_to(request, self.deltas.append)
        return time.perf_counter() - start

    def fill(self) -> list[float]:
        """Submits until all rows can be busy and `waiting` more wait; the seconds of each."""
        host, spent = self.engine.host, []
        while host.waiting + len(host.running) < self.waiting + self.rows:
            spent.append(self.submit())
        return spent


def measure(text: Tokenizer, load: str, rows: int, waiting: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step by phase (median, p99), microseconds a submission, and what the steps held."""
    crowd, clock = Crowd(text, load, rows, waiting), Clock()
    engine, device, garbage = crowd.engine, crowd.device, Collector(time.monotonic)
    garbage.start()
    engine.on_step[:] = [clock.timed("metrics", observe) for observe in engine.on_step]
    filling = crowd.fill()
    rows_of: list[dict[str, float]] = []
    submits: list[float] = []
    admitted = 0
    with phases(clock), pauses() as collections:
        after, spent_after = 0.0, {}
        for i in range((2 * WARM if load == "steady" else WARM) + steps):
            before = len(engine.host.running)
            start = time.perf_counter()
            assert engine.turn(), "nothing to do"
            garbage.turn(busy=True)
            done = time.perf_counter()
            now = clock.take()
            if i == (2 * WARM if load == "steady" else WARM):
                assert before == rows or load != "decode", "not all rows are busy"
                rows_of.clear(), submits.clear(), collections.clear()
                admitted = engine.host.numbered
            # plan and pack of this step follow the commit, metrics and deliver of the one before
            host = after + (device.launch_at - start)
            inside = {**{k: spent_after.get(k, 0.0) for k in ("commit", "metrics")}, "pack": now.get("pack", 0.0)}
            inside["plan"] = now["plan"] - inside["pack"]
            inside["deliver"] = host - sum(inside.values())
            rows_of.append({**inside, "host": host})
            after, spent_after = done - device.read_at, now
            submits += crowd.fill()
            crowd.deltas.clear()
        measured = list(collections)
    engine.host.check()
    start = time.perf_counter()
    gc.collect()
    full = time.perf_counter() - start
    garbage.stop()
    out: dict[str, Any] = {
        "load": load,
        "rows": rows,
        "waiting": engine.host.waiting,
        "steps": len(rows_of),
        "ended_a_step": (engine.host.numbered - admitted) / len(rows_of),
    }
    for name in (*PHASES, "host"):
        values = sorted(r[name] * 1e3 for r in rows_of)
        out[name] = {
            "p10": _at(values, 0.1),
            "median": statistics.median(values),
            "p99": _at(values, 0.99),
            "most": values[-1],
        }
    every = sorted(s * 1e6 for s in filling + submits)
    out["submit_us"] = {"median": statistics.median(every), "p99": _at(every, 0.99), "most": every[-1]}
    out["gc_ms"] = {"most": max(measured, default=0.0) * 1e3, "sum": sum(measured) * 1e3, "n": len(measured)}
    out["gc_full_ms"] = full * 1e3
    return out


def _at(values: Sequence[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of several repeats: the median of every figure."""
    out: dict[str, Any] = {}
    for name, value in runs[0].items():
        if isinstance(value, dict):
            out[name] = middle([r[name] for r in runs])
        else:
            number = isinstance(value, int | float)
            out[name] = type(value)(statistics.median(r[name] for r in runs)) if number else value
    return out


HEAD = (
    "load",
    "waiting",
    "ended",
    *PHASES,
    "host ms",
    "p10",
    "p99",
    "most",
    "submit us",
    "p99",
    "longest gc ms",
    "full gc ms",
)


def line(f: dict[str, Any]) -> list[str]:
    """A line of the table under `HEAD`."""
    return [
        f["load"],
        f"{f['waiting']:,}",
        f"{f['ended_a_step']:.1f}",
        *(f"{f[name]['median']:.3f}" for name in PHASES),
        f"{f['host']['median']:.3f}",
        f"{f['host']['p10']:.3f}",
        f"{f['host']['p99']:.3f}",
        f"{f['host']['most']:.3f}",
        f"{f['submit_us']['median']:.1f}",
        f"{f['submit_us']['p99']:.1f}",
        f"{f['gc_ms']['most']:.2f}",
        f"{f['gc_full_ms']:.0f}",
    ]


def svg(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The critical path over the number waiting, logarithmic: a line of medians for each load, p10 below it dashed."""
    wide, high, left, top, bottom = 720, 380, 56, 44, 56
    least, most = (f(r["waiting"] for r in results) for f in (min, max))
    ceiling = 1.15 * max(1.0, *(r["host"]["median"] for r in results))

    def x(n: float) -> float:
        return left + (wide - left - 90) * (math.log10(n / least) / max(math.log10(most / least), 1e-9))

    def y(ms: float) -> float:
        return high - bottom - (high - bottom - top) * ms / ceiling

    def text(at: float, height: float, words: str, more: str = "") -> str:
        return f'<text x="{at:.1f}" y="{height:.1f}" {more}>{words}</text>'

    title = f"{results[0]['rows']} rows: host time a step between its tokens and the next launch, ms"
    about = f"{facts['cpu']}, {facts['date'][:10]}, commit {facts['commit']}; solid: median, dashed: 10th percentile"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        text(left, 20, title, 'font-weight="bold"'),
        text(left, 35, about, 'font-size="10" fill="#555"'),
    ]
    step = 0.5 if ceiling < 5 else 1.0
    for i in range(int(ceiling / step) + 1):
        ms = i * step
        grey, at = "#888" if ms == 1 else "#ddd", f"{y(ms):.1f}"
        out.append(f'<line x1="{left}" x2="{wide - 90}" y1="{at}" y2="{at}" stroke="{grey}"/>')
        out.append(text(left - 8, y(ms) + 4, f"{ms:g}", 'text-anchor="end"'))
    decades = range(math.ceil(math.log10(least)), math.floor(math.log10(most)) + 1)
    out += [text(x(10**k), high - bottom + 18, f"{10**k:,}", 'text-anchor="middle"') for k in decades]
    out.append(text((left + wide - 90) / 2, high - 14, "requests waiting", 'text-anchor="middle"'))
    for load, colour in zip(LOADS, ("#1b6ca8", "#c8553d", "#4b8b3b"), strict=True):
        mine = sorted((r for r in results if r["load"] == load), key=lambda r: r["waiting"])
        for which, dash in (("median", ""), ("p10", ' stroke-dasharray="4 4"')):
            points = " ".join(f"{x(r['waiting']):.1f},{y(r['host'][which]):.1f}" for r in mine)
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if mine:
            out.append(text(wide - 84, y(mine[-1]["host"]["median"]) + 4, load, f'fill="{colour}"'))
    return "\n".join([*out, "</svg>"]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", default="10,100,1000,10000,100000")
    parser.add_argument("--load", default=",".join(LOADS))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500, help="measured steps a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default=None)
    parser.add_argument("--plot", default=None, help="an SVG of the critical path over the number waiting")
    args = parser.parse_args(argv)
    text, others = tokenizer(), machine.Others()
    waits, loads = [int(w) for w in args.waiting.split(",")], args.load.split(",")
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {(load, w): [] for load in loads for w in waits}
    for _ in range(args.repeats):
        for (load, w), found in runs.items():
            found.append(measure(text, load, args.rows, w, args.steps))
    results = [middle(found) for found in runs.values()]
    facts = machine.facts(1)
    taken = others.share()
    print(report.table(HEAD, map(line, results)))
    print(f"{facts['cpu']}, {facts['date']}, commit {facts['commit']}, others took {100 * taken:.0f} %")
    if taken > report.BUSY:
        print("WARNING  the machine was not quiet: these figures are not for writing down")
    report.write(args.json, {**facts, "others": taken, "repeats": args.repeats, "results": results})
    if args.plot:
        Path(args.plot).write_text(svg(results, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
