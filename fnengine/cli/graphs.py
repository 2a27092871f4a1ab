"""`fnengine graphs show`: what a file of buckets holds, and what it was made for."""

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


def _shown(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


KINDS: dict[str, Callable[[argparse.Namespace], int]] = {"show": show}
