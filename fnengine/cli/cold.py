"""`fnengine doctor --why-cold`: which artifacts a start would find in the cache, and which fields made it miss others.

Nothing is built or compiled to say so, and no weights are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from fnengine import environment
from fnengine.cli.bench import flags_of
from fnengine.cli.compile import asked, config_folder
from fnengine.config import resolve

if TYPE_CHECKING:
    from fnengine.artifacts import Status
    from fnengine.keys import Difference

SHOWN = 6
"""Most fields printed of one part of a key: where the dtype differs, so does every shape. JSON has them all."""


def run(args: argparse.Namespace) -> int:
    """0 whether warm or cold: both are answers."""
    options = resolve(args)
    from fnengine import artifacts

    needs = artifacts.needs(config_folder(options), **asked(options))
    found = artifacts.statuses(needs)
    if args.json:
        rows = [dataclasses.asdict(s) for s in found]
        facts = {"cache": str(environment.cache_dir()), "eager": needs.eager, "unable": needs.unable}
        print(json.dumps({**facts, "artifacts": rows}, indent=1))
        return 0
    print(f"cache {environment.cache_dir()}")
    for status in found:
        print(*lines(status), sep="\n")
    if needs.eager is not None:
        print(f"layers run eagerly and need no artifacts: {needs.eager}")
    if needs.unable is not None:
        print(f"nothing can be compiled here: {needs.unable}")
    elif any(s.warm is None for s in found):
        model = args.model if args.model_flag is None else args.model_flag
        print("to fill the cache:", *["fnengine compile", *([] if model is None else [model]), *flags_of(args)])
    return 0


def lines(status: Status) -> list[str]:
    """What to say of one artifact."""
    head = f"{status.name:<16} {status.digest:<20} "
    if status.warm is not None:
        return [head + ("warm" if status.warm != "through Inductor" else "warm, but loaded through Inductor (slower)")]
    near = status.nearest
    if near is None:
        what = "library" if status.name.startswith("native") else "model"
        return [f"{head}cold: nothing kept for this {what}"]
    if not near.differences:
        return [f"{head}cold: the key is kept ({near.name}.json), what it names is gone"]
    return [f"{head}cold: nearest kept is {near.name}, which differs in", *_fields(near.differences)]


def _fields(differences: tuple[Difference, ...]) -> list[str]:
    parts: dict[str, list[Difference]] = {}
    for d in differences:
        parts.setdefault(d.field.partition(".")[0], []).append(d)
    shown = []
    for part, found in parts.items():
        shown += [f"    {d.field}: {d.old} -> {d.new}" for d in found[:SHOWN]]
        if found[SHOWN:]:
            shown.append(f"    {part}: {len(found) - SHOWN} more (--json shows all)")
    return shown
