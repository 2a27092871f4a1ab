"""`fnengine tune`: which shapes to capture for a load, chosen from its first half and judged on its second.

trace -> first half  -> the scheduler, replayed -> counts of (T, R) -> the tuner -> a ladder, kept in a file
      -> second half -> the scheduler, replayed -> step time and padding with: no graphs, the default, the tuned one
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnengine import __version__
from fnengine.config import resolve
from fnengine.errors import ConfigError

if TYPE_CHECKING:
    from fnengine.arrivals import Trace
    from fnengine.engine import Engine
    from fnengine.graphs.ladder import Ladder
    from fnengine.graphs.report import Usage
    from fnengine.graphs.tune import Costs
    from fnengine.simulate import Replay


def run(args: argparse.Namespace) -> int:
    """Measures, replays, chooses, prints, and writes the file."""
    options = resolve(args)
    from fnengine import arrivals
    from fnengine.graphs import ladder as ladders
    from fnengine.graphs import report
    from fnengine.graphs.tune import Budget, foresee

    trace, of = _trace(args)
    for path in filter(None, (args.out, args.html)):
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"there is no folder to write {path} to", where="--out" if path == args.out else "--html")
    from fnengine.cli.start import build_engine, facts, say

    # Nothing is captured at the start: what is measured is captured when its turn comes.
    lazy = dataclasses.replace(options.engine, graph_capture="lazy")
    engine = build_engine(dataclasses.replace(options, engine=lazy))
    say("\n".join(facts(engine)))
    say(f"trace: {of}, {len(trace)} requests in {trace[-1].arrival:.1f} s")
    costs, how, notes = measured(engine, trace, args)
    for note in notes:
        say(note)
    policy = engine.policy
    usual = ladders.default(policy.budget, policy.rows)
    first, second = (replayed(engine, half, usual, costs) for half in arrivals.halves(trace))
    budget = Budget(args.max_graphs, args.memory_for_graphs, args.startup_seconds)
    shapes = [(s.tokens, s.rows) for s in first.steps]
    tuned, spread = foresee(shapes, costs, budget, usual, tokens=policy.budget, rows=policy.rows)
    if not tuned.ladder.buckets:
        raise ConfigError(
            "no graph fits the budget or is worth its time here",
            where="tune",
            remedy="raise --memory-for-graphs, --startup-seconds or --max-graphs, or see --eager-overhead",
        )
    ways = {"none": None, "default": usual, "tuned": tuned.ladder}
    judged = {name: judge(second, ladder, costs) for name, ladder in ways.items()}
    against = judged["default"].seconds
    figures = {
        name: {
            "step_ms": 1e3 * j.seconds,
            "than_default": j.seconds / against - 1,
            "padding_tokens": j.usage.waste,
            "padding_time": j.padding,
            "eager_steps": sum(h.steps for h in j.usage.eager.values()) / max(j.usage.steps, 1),
            "graphs": 0 if ladder is None else len(ladder.buckets),
            "bytes": sum(costs.bytes(b) for b in (ladder.buckets if ladder else ())),
            "capture_seconds": sum(costs.capture(b) for b in (ladder.buckets if ladder else ())),
            "within_budget": ladder is None or budget.keeps(ladder, costs),
        }
        for (name, ladder), j in zip(ways.items(), judged.values(), strict=True)
    }
    body = {
        "about": {
            "model": engine.name,
            "device": how["device"],
            "trace": of,
            "date": time.strftime("%Y-%m-%d"),
            "fnengine": __version__,
            "sizes": {"rows": policy.rows, "budget": policy.budget, "max_len": policy.max_len},
        },
        "measured": how,
        "requests": {"tuned_on": len(first.answers), "held_out": len(second.answers)},
        "refused": first.refused + second.refused,
        "steps": {"tuned_on": len(first.steps), "held_out": len(second.steps)},
        "held_out": figures,
        "search": {
            "candidates": tuned.candidates,
            "method": tuned.method,
            "spread": spread,
            "above_the_optimum_at_most": tuned.expected / tuned.bound - 1 if tuned.bound > 0 else None,
        },
        "usage": {name: report.as_json(judged[name].usage) for name in ("default", "tuned")},
    }
    ladders.save(Path(args.out), tuned.ladder, {**body["about"], "held_out": figures})
    lines = [*text(body), *notes]
    if args.html is not None:
        sides = [(f"{name} ladder", judged[name].usage) for name in ("default", "tuned")]
        title = f"Graphs of {engine.name} on {how['device']}"
        Path(args.html).write_text(report.page(title, sides[0], sides[1], lines), encoding="utf-8")
    if args.json:
        print(json.dumps({**body, "buckets": [[b.tokens, b.rows] for b in tuned.ladder.buckets]}, indent=1))
        return 0
    print(*lines, "", *report.table(judged["tuned"].usage), sep="\n")
    print(f"{len(tuned.ladder.buckets)} buckets kept in {args.out}: fnengine serve --graphs {args.out}")
    return 0


def _trace(args: argparse.Namespace) -> tuple[Trace, str]:
    """The requests, and what they are called."""
    from fnengine import arrivals

    if args.trace is not None:
        trace, of = arrivals.read(Path(args.trace)), str(args.trace)
    else:
        how = arrivals.parse(args.synthetic or "")
        trace, of = arrivals.draw(how), f"synthetic {how}"
    if len(trace) < 4:
        raise ConfigError(f"{len(trace)} requests are too few to tune on one half and judge on the other", where=of)
    return trace, of


def measured(engine: Engine, trace: Trace, args: argparse.Namespace) -> tuple[Costs, dict[str, Any], list[str]]:
    """Costs of steps and graphs here, how they were found, and what must be said about them."""
    from statistics import fmean

    from fnengine.captures import AT_START
    from fnengine.graphs.ladder import Exact
    from fnengine.graphs.report import Usage
    from fnengine.graphs.tune import Costs
    from fnengine.measure import measure

    assert engine.built is not None
    policy, device = engine.policy, engine.built.device
    context = round(fmean(min(a.prompt + a.output // 2, policy.max_len) for a in trace))
    sizes: dict[str, Any] = dict(budget=policy.budget, rows=policy.rows, vocab=policy.vocab, context=context)
    how: dict[str, Any] = {"device": str(device.device), "context": context}
    if device.graphs is None:
        found = measure(device, **sizes, seconds=args.seconds)
        overhead, each, spent = args.eager_overhead, float(args.graph_bytes), args.capture_seconds
        eager, steps = (lambda t, r: found.surface(t, r) + overhead), found.surface
        how |= {"eager_overhead": overhead, "steps": [list(m) for m in found.medians]}
        notes = [
            f"there are no CUDA graphs here ({device.device}): steps were timed as they run, and of graphs it is "
            f"assumed, not measured, that one saves {1e3 * overhead:g} ms a step (--eager-overhead), weighs "
            f"{each / 2**20:g} MiB (--graph-bytes) and takes {spent:g} s to capture (--capture-seconds)",
        ]
    else:
        with device.running(None, Usage()):
            plain = measure(device, **sizes, seconds=args.seconds / 2)
        exact = dataclasses.replace(device.graphs.how, ladder=Exact(), after=0, eager=())
        with device.running(exact, counted := Usage()):
            found = measure(device, **sizes, seconds=args.seconds / 2)
        eager, steps = plain.surface, found.surface
        graphs = sum(s.graphs for s in counted.captured.values())
        each = len(AT_START) * sum(s.bytes for s in counted.captured.values()) / graphs
        spent = len(AT_START) * sum(s.seconds for s in counted.captured.values()) / graphs
        how |= {"steps": [list(m) for m in found.medians], "eager_steps": [list(m) for m in plain.medians]}
        notes = [
            f"captured {graphs} shapes: a bucket has {len(AT_START)} graphs and takes {each / 2**20:.1f} MiB and "
            f"{spent:.2f} s, on average",
        ]
    how |= {"shapes": len(found.medians), "rounds": found.rounds, "graph_bytes": each, "capture_seconds": spent}
    notes.insert(
        0, f"measured {len(found.medians)} shapes of step {found.rounds} times or more, rows at {context} tokens"
    )
    costs = Costs(lambda b: steps(b.tokens, b.rows), eager, lambda b: each, lambda b: spent)
    return costs, how, notes


def replayed(engine: Engine, trace: Trace, ladder: Ladder, costs: Costs) -> Replay:
    """What the engine's scheduler does with the trace when steps take what the ladder makes them take."""
    from fnengine.simulate import replay

    def seconds(tokens: int, rows: int) -> float:
        b = ladder.fit(tokens, rows)
        return costs.eager(tokens, rows) if b is None else costs.captured(b)

    device = engine.device
    got = replay(trace, engine.policy, seconds, blocks=device.blocks, depth=device.depth, host_slots=device.host_slots)
    if not got.steps:
        raise ConfigError(f"no request of one half of the trace can be served: {got.why}", where="--trace")
    return got


@dataclass(frozen=True)
class Judged:
    """Steps as they would run with one ladder."""

    seconds: float
    """Mean of a step."""
    padding: float
    """Share of the time that goes into padding: what captured steps take beyond a graph of their exact shape."""
    usage: Usage


def judge(replay: Replay, ladder: Ladder | None, costs: Costs) -> Judged:
    """The same steps for every ladder, so that only the ladder differs."""
    from fnengine.graphs.bucket import LEAST, Bucket
    from fnengine.graphs.report import Usage

    usage, total, padding = Usage(), 0.0, 0.0
    for (t, r), n in sorted(replay.counts.items()):
        b = None if ladder is None else ladder.fit(t, r)
        each = costs.eager(t, r) if b is None else costs.captured(b)
        for _ in range(n):
            usage.add(t, r, bucket=b, reason="no graphs" if ladder is None else "no bucket holds it", seconds=each)
        total += n * each
        if b is not None:
            padding += n * (each - costs.captured(Bucket(max(t, LEAST), max(r, LEAST))))
    for b in ladder.buckets if ladder else ():
        usage.capture(b, int(costs.bytes(b)), costs.capture(b))
    return Judged(total / usage.steps, padding / total if total else 0.0, usage)


def text(body: dict[str, Any]) -> list[str]:
    """The held-out figures as aligned lines, and how far the search came."""
    steps, requests, search = body["steps"], body["requests"], body["search"]
    lines = [
        f"{'held-out half':<14}{'step ms':>10}{'to default':>12}{'padding':>10}{'of time':>9}{'eager':>8}{'graphs':>8}"
        f"{'MiB':>8}{'capture s':>11}"
    ]
    for name, f in body["held_out"].items():
        over = "" if f["within_budget"] else "  over the budget"
        lines.append(
            f"{name:<14}{f['step_ms']:>10.3f}{f['than_default']:>+12.1%}{f['padding_tokens']:>10.1%}"
            f"{f['padding_time']:>9.1%}{f['eager_steps']:>8.1%}{f['graphs']:>8}{f['bytes'] / 2**20:>8.0f}"
            f"{f['capture_seconds']:>11.1f}{over}"
        )
    lines.append(
        f"tuned on {steps['tuned_on']} steps of {requests['tuned_on']} requests, judged on {steps['held_out']} steps "
        f"of {requests['held_out']}"
    )
    if body["refused"]:
        lines.append(f"{body['refused']} requests of the trace do not fit this engine and were left out")
    gap = search["above_the_optimum_at_most"]
    lines.append(
        f"search: {search['candidates']} candidates, {search['method']}, mixed shapes spread by {search['spread']:g}"
        + ("" if gap is None else f"; at most {gap:.2%} above the best ladder of these for what it was tuned on")
    )
    return lines
