"""`fnengine compile`: everything that a start of this model would build or compile, put into the cache now.

Only the config is read: an artifact depends on shapes, so weights are neither downloaded nor read. With `--weights`
they are, and are kept in the form that products want (`packed.py`). Here is also where products are measured
(`products.py`), which a start never does, and with `--tune-kernels` the knobs of a GPU's kernels (`tune_kernels.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnengine import environment
from fnengine.cli import own, tune_kernels
from fnengine.config import Options, resolve
from fnengine.errors import ConfigError

if TYPE_CHECKING:
    from fnengine.artifacts import Needs
    from fnengine.products import Measured


def run(args: argparse.Namespace) -> int:
    """Prints a line for each artifact as soon as it is there."""
    options = resolve(args)
    from fnengine import artifacts, hub, products
    from fnengine.cli.doctor import size

    begin = time.perf_counter()
    needs = artifacts.needs(config_folder(options), **asked(options))
    if args.tune_kernels:
        tune_kernels.check(needs.device)
    rows: list[artifacts.Made] = []
    measured: products.Measured | None = None
    if not args.json:
        print(f"cache {environment.cache_dir()}", flush=True)
    for made in artifacts.fill(needs):
        if isinstance(made, products.Measured):
            measured = made
            if not args.json:
                how = (
                    f"measured in {made.seconds:.1f} s" if made.new else "measured before (delete it to measure again)"
                )
                print(f"products, {how}, {made.path}", *products.table(made), sep="\n", flush=True)
            continue
        rows.append(made)
        if not args.json:
            how = "compiled" if made.compiled else "already there"
            print(f"{made.name:<16} {made.digest:<20} {how:<13} {made.seconds:6.2f} s  {size(made.bytes)}", flush=True)
    weights = _keep_weights(options, needs) if args.weights else None
    tuned = _tune_kernels(needs, args.json) if args.tune_kernels else None
    name, dtype = hub.display_name(options.model.model), str(needs.dtype).removeprefix("torch.")
    if args.json:
        facts = {"model": name, "dtype": dtype, "device": str(needs.device), "threads": options.threads}
        found = {
            "cache": str(environment.cache_dir()),
            "eager": needs.eager,
            "artifacts": [dataclasses.asdict(made) for made in rows],
            "products": None if measured is None else _as_json(measured),
            "weights": weights,
            "tuned": tuned,
        }
        print(json.dumps({**facts, **found}, indent=1))
        return 0
    if needs.eager is not None:
        print(f"layers run eagerly and need no artifacts: {needs.eager}")
    if weights is not None:
        print(weights["note"] or f"weights {weights['file']}, {size(weights['bytes'])}, {weights['seconds']:.2f} s")
    new = sum(made.compiled for made in rows)
    print(
        f"{name} in {dtype} on {needs.device} with {options.threads} threads: {new} compiled, "
        f"{len(rows) - new} already there, {time.perf_counter() - begin:.1f} s"
    )
    return 0


def _as_json(found: Measured) -> dict[str, Any]:
    """Seconds of each kind by rows, and the kind that was chosen, for each shape."""

    def shape(N: int, K: int) -> dict[str, Any]:
        times, out = found.times.get((N, K), {}), found.out.get((N, K), {})
        return {"shape": [N, K], "kind": found.kinds[N, K], "seconds": times, "out": out}

    return {"file": str(found.path), "new": found.new, "shapes": [shape(*s) for s in found.kinds]}


def _tune_kernels(needs: Needs, quiet: bool) -> list[dict[str, Any]]:
    found = []
    for one in tune_kernels.measure(needs.spec, needs.device, needs.dtype, needs.kv, needs.quantization):
        found.append(one)
        if not quiet:
            print(tune_kernels.line(one), flush=True)
    return found


def _keep_weights(options: Options, needs: Needs) -> dict[str, Any]:
    from fnengine import checkpoint, hub

    m, begin = options.model, time.perf_counter()
    folder = hub.resolve(m.model, m.revision, m.download_dir, progress=sys.stderr.isatty())
    try:
        kept = checkpoint.keep(folder, needs.spec, needs.dtype, needs.device, m.quantization)
    except OSError as e:
        raise ConfigError(
            f"the weights cannot be kept: {e}",
            where=str(environment.cache_dir()),
            remedy="free some space, or set FNENGINE_CACHE",
        ) from e
    if isinstance(kept, str):
        return {"file": None, "note": kept}
    path, new = kept
    note = None if new else f"weights {path}: already there"
    return {"file": str(path), "bytes": path.stat().st_size, "seconds": time.perf_counter() - begin, "note": note}


def config_folder(options: Options) -> Path:
    """The folder of the model's config; of a repository on the hub only that is fetched."""
    from fnengine import hub

    m = options.model
    files = (*hub.CONFIG, *hub.CODE) if m.trust_remote_code else hub.CONFIG
    return hub.resolve(m.model, m.revision, m.download_dir, progress=sys.stderr.isatty(), files=files)


def asked(options: Options) -> dict[str, Any]:
    """What the options say that artifacts depend on, beside threads, which the environment holds."""
    own.families(options.model.family)
    return {
        "impl": options.model.model_impl,
        "trust": options.model.trust_remote_code,
        "dtype": options.model.dtype,
        "device": options.model.device,
        "quantization": options.model.quantization,
        "kv_cache_dtype": options.engine.kv_cache_dtype,
        "attention_backend": options.engine.attention_backend,
        "enforce_eager": options.engine.enforce_eager,
    }
