"""`fnengine models`: the families that can be loaded, and what sets each apart, read off their specs; and with
`--fallback` the classes of transformers that no family knows."""

from __future__ import annotations

import argparse

from fnengine import fallback
from fnengine.cli import own
from fnengine.families import FAMILIES, smallest
from fnengine.spec import features


def run(args: argparse.Namespace) -> int:
    """Prints one line for each family, of a config that says nothing but its sizes, and one for each other class."""
    shipped = set(FAMILIES)
    own.families(name for names in args.family or () for name in names.split(","))
    for family in FAMILIES.values():
        apart = ", ".join(features(smallest(family))) or "as Llama"
        status = "native" if family.name in shipped else "own"
        print(f"{family.name:<12} {family.architecture:<24} {status:<9} {apart}")
    if args.fallback:
        native = {family.architecture for family in FAMILIES.values()}
        for kind, architecture in fallback.classes():
            if architecture not in native:
                print(f"{kind:<12} {architecture:<24} fallback  if what its config asks for can run over a paged pool")
    return 0
