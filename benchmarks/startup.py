"""W4: from the start of a process to its first token, with empty caches (cold) and with filled ones (warm).

Every start is a fresh process. Cold means an empty FNENGINE_CACHE folder: no compiled layers, no native kernels. The
operating system's page cache is not dropped and Python's own bytecode is there, in both cases.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, report, shape

LIMIT = 300.0
"""Seconds after which a start has failed."""


def environment_for(cache: Path, threads: int) -> dict[str, str]:
    """This process's environment with every cache in `cache`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    return {
        **kept,
        "FNENGINE_CACHE": str(cache),
        "FNENGINE_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }


def cold_and_warm(start: Callable[[Path], dict[str, float]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """`repeats` cold starts, each in an empty folder of its own, and after each a warm one in the same folder."""
    out: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="fnengine-cold-") as folder:
            out["cold"].append(start(Path(folder)))
            out["warm"].append(start(Path(folder)))
    return out


def child_start(model: Path, load_format: str, args: argparse.Namespace, cache: Path) -> dict[str, float]:
    """Seconds of one start in a fresh process, by phase; `first_token` is the whole."""
    command = [sys.executable, "-m", "benchmarks.startup", "--model", str(model), "--load-format", load_format]
    command += ["--dtype", args.dtype, "--max-model-len", str(args.max_model_len), "--quantization", args.quantization]
    command += ["--enforce-eager"] if args.enforce_eager else []
    command += ["--started", repr(time.monotonic())]  # one clock for all processes of a machine
    done = subprocess.run(
        command,
        cwd=machine.ROOT,
        env=environment_for(cache, args.threads),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    if done.returncode:
        raise RuntimeError(f"a start of {model} failed: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_process(models: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """W4 of every model, printed as it comes."""
    results = []
    others = machine.Others()
    for name in models:
        folder, found_format = shape.prepare(name)
        load_format = found_format if args.load_format == "auto" else args.load_format

        def start(cache: Path, folder: Path = folder, load_format: str = load_format) -> dict[str, float]:
            return child_start(folder, load_format, args, cache)

        both = cold_and_warm(start, args.repeats)
        about = {"dtype": args.dtype, "quantization": args.quantization, "load_format": load_format}
        results.append({"model": name, **about, "threads": args.threads, **both})
    share = others.share()
    print(table(results))
    print(
        "cold: empty FNENGINE_CACHE; the page cache is not dropped. Medians of", args.repeats, "fresh processes each."
    )
    print(f"others took {100 * share:.0f} % of the machine's processor time meanwhile")
    if share > report.BUSY:
        print("WARNING  the machine was not quiet: these figures are for trying the script, not for writing down")
    for r in results:
        r["others_share"] = share
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Seconds by phase, each since the process started."""
    phases = list(dict.fromkeys(phase for r in results for one in (*r["cold"], *r["warm"]) for phase in one))
    head = ("model", "caches", *(p.replace("_", " ") + " s" for p in phases))
    rows = []
    for r in results:
        for kind in ("cold", "warm"):
            medians = [statistics.median(one[p] for one in r[kind]) if p in r[kind][0] else None for p in phases]
            rows.append([r["model"], kind, *("-" if m is None else f"{m:.2f}" for m in medians)])
    return report.table(head, rows)


def main() -> None:
    """One start, in the process that is being measured: prints seconds since `--started` at the end of each phase."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--started", type=float, required=True)
    args = parser.parse_args()
    phases: dict[str, float] = {}

    def reached(phase: str) -> None:
        phases.setdefault(phase, time.monotonic() - args.started)

    import fnengine as fn
    import fnengine.engine

    reached("imported")
    model = fn.load(args.model, dtype=args.dtype, load_format=args.load_format, quantization=args.quantization)
    reached("loaded")
    length = min(args.max_model_len, model.spec.max_len)
    llm = fn.LLM(model, max_model_len=length, enforce_eager=args.enforce_eager)
    reached("built")
    llm.generate(
        [list(range(20, 28))],
        fn.Sampling(temperature=0),
        fn.Stop(max_tokens=1, ignore_eos=True),
        on_delta=lambda _i, _delta: reached("first_token"),
    )
    print(json.dumps(phases), flush=True)


if __name__ == "__main__":
    main()
