"""`fnengine graphs show | report`: what a file of buckets holds, and what a running server did with its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(args: argparse.Namespace) -> int:
    """Prints what the kind asks for."""
    return KINDS[args.kind](args)


def show(args: argparse.Namespace) -> int:
    """The buckets of a file in the order in which they are tried, a line for each number of tokens."""
    from fnengine.graphs.ladder import load

    ladder, about = load(Path(args.file))
    if args.json:
        print(json.dumps({"buckets": [[b.tokens, b.rows] for b in ladder.buckets], "about": about}, indent=1))
        return 0
    print(*(f"{name:<10} {_shown(value)}" for name, value in about.items() if name != "held_out"), sep="\n")
    sizes: dict[int, list[int]] = {}
    for b in ladder.buckets:
        sizes.setdefault(b.tokens, []).append(b.rows)
    print(f"{'tokens':>8}  rows")
    print(*(f"{t:>8}  {' '.join(map(str, rows))}" for t, rows in sizes.items()), sep="\n")
    decode = sum(b.tokens == b.rows for b in ladder.buckets)
    print(f"{len(ladder.buckets)} buckets, {decode} of them of a token a row")
    for name, f in about.get("held_out", {}).items():
        print(
            f"held out, {name:<8} {f['step_ms']:.3f} ms a step, {f['than_default']:+.1%} to the default, "
            f"{f['padding_tokens']:.1%} padding"
        )
    return 0


def report(args: argparse.Namespace) -> int:
    """The table of a running server's graphs, its JSON, or a page with a picture."""
    from fnengine import environment
    from fnengine.cli.client import Server
    from fnengine.errors import ConfigError
    from fnengine.graphs import report

    body = Server(args.url, args.key or next(iter(environment.api_keys()), None)).get("/debug/graphs")
    usage = report.from_json(body)
    if args.html is not None:
        earlier = report.Usage()
        if args.before is not None:
            try:
                earlier = report.from_json(json.loads(Path(args.before).read_text()))
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise ConfigError(f"{args.before}: {e}", where="--before", remedy="an answer of --json") from e
        sides = ("before", earlier), ("now", usage)
        Path(args.html).write_text(report.page(f"Graphs of {args.url}", *sides, [body["about"]]), encoding="utf-8")
    if args.json:
        print(json.dumps(body, indent=1))
        return 0
    print(body["about"], *report.table(usage), sep="\n")
    return 0


def _shown(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


KINDS: dict[str, Callable[[argparse.Namespace], int]] = {"show": show, "report": report}
