"""`fnengine bench`: throughput and latency in process, start-up time, and concurrent streams against a server.

Prompts are random token ids, output is greedy and as long as asked for. Every figure is measured in the run that prints
it. Workloads beside the machine's own limits and beside other engines are in `benchmarks/` of the repository.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fnengine import __version__, environment
from fnengine.cli.flags import FLAGS
from fnengine.config import resolve
from fnengine.errors import ConfigError, FnError

if TYPE_CHECKING:
    from fnengine.engine import Engine
    from fnengine.host.request import Request

Figures = dict[str, Any]
"""Name with its unit (`ttft_ms_p50`) -> number or text."""


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table, and writes JSON where asked."""
    figures = KINDS[args.kind](args)
    figures = {"bench": args.kind, "fnengine": __version__, **figures}
    text = json.dumps(figures, indent=1)
    if args.json == "-":
        print(text)
        return 0
    wide = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{wide}}  {_shown(value)}")
    if args.json is not None:
        try:
            Path(args.json).write_text(text + "\n")
        except OSError as e:
            raise ConfigError(f"cannot write {args.json}: {e.strerror}", where="--json") from None
    return 0


def _shown(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def percentile(values: list[float], q: float) -> float:
    """The q-th percentile (0 to 100), between neighbours linearly."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(name: str, seconds: list[float]) -> Figures:
    """Mean, median and tail of some times, in milliseconds."""
    if not seconds:
        return {}
    ms = [1e3 * s for s in seconds]
    return {
        f"{name}_ms_mean": fmean(ms),
        f"{name}_ms_p50": percentile(ms, 50),
        f"{name}_ms_p90": percentile(ms, 90),
        f"{name}_ms_p99": percentile(ms, 99),
    }


def prompts(vocab: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for the same seed, away from the ends of the vocabulary, where special ids live."""
    draw = random.Random(seed)
    edge = min(16, vocab // 4)
    return [[draw.randrange(edge, vocab - edge) for _ in range(length)] for _ in range(count)]


# --- in process -------------------------------------------------------------------------------------------------------


def throughput(args: argparse.Namespace) -> Figures:
    """All prompts at once."""
    engine = _engine(args)
    _generate(engine, _requests(engine, args, 2, min(args.output_len, 4), args.prompt_seed + 1_000_003))
    requests = _requests(engine, args, args.num_prompts, args.output_len, args.prompt_seed)
    times = _generate(engine, requests)
    seconds = times.whole
    made = args.num_prompts * args.output_len
    return {
        **_about(engine, args),
        "prompts": args.num_prompts,
        "seconds": seconds,
        "requests_per_s": args.num_prompts / seconds,
        "output_tokens_per_s": made / seconds,
        "total_tokens_per_s": (made + args.num_prompts * args.input_len) / seconds,
        **spread("ttft", times.first),
        **spread("itl", times.gaps),
    }


def latency(args: argparse.Namespace) -> Figures:
    """One batch at a time, with fresh prompts each time."""
    engine = _engine(args)
    measured = []
    for i in range(args.num_iters_warmup + args.num_iters):
        seed = args.prompt_seed + 1_000_003 * (i + 1)
        times = _generate(engine, _requests(engine, args, args.batch_size, args.output_len, seed))
        if i >= args.num_iters_warmup:
            measured.append(times)
    return {
        **_about(engine, args),
        "batch_size": args.batch_size,
        "iterations": args.num_iters,
        **spread("batch", [t.whole for t in measured]),
        **spread("ttft", [x for t in measured for x in t.first]),
        **spread("itl", [x for t in measured for x in t.gaps]),
    }


def _engine(args: argparse.Namespace) -> Engine:
    options = resolve(args)
    from fnengine.cli.start import build_engine, facts, say

    engine = build_engine(options)
    say("\n".join(facts(engine)))
    longest = args.input_len + args.output_len
    if longest > engine.max_len:
        raise ConfigError(
            f"{args.input_len} + {args.output_len} tokens exceed the context of {engine.max_len}",
            where="--input-len",
            remedy="ask for fewer",
        )
    return engine


def _about(engine: Engine, args: argparse.Namespace) -> Figures:
    built = engine.built
    assert built is not None
    return {
        "model": engine.name,
        "device": str(built.device.device),
        "threads": environment.threads(),
        "execution": built.execution,
        "input_len": args.input_len,
        "output_len": args.output_len,
    }


def _requests(engine: Engine, args: argparse.Namespace, count: int, output: int, seed: int) -> list[Request]:
    import numpy as np

    from fnengine.host.request import Request, Sampling, Stop

    return [
        Request(
            id=f"bench-{seed}-{i}",
            prompt=np.array(ids, np.int32),
            sampling=Sampling(temperature=0.0),
            stop=Stop(max_tokens=output, ignore_eos=True),
        )
        for i, ids in enumerate(prompts(engine.policy.vocab, count, args.input_len, seed))
    ]


@dataclass
class Times:
    """Seconds of some requests that ran together."""

    whole: float = 0.0
    first: list[float] = field(default_factory=list)
    """To the first token, one a request."""
    gaps: list[float] = field(default_factory=list)
    """Between a token and the one before it, of all requests."""


def _generate(engine: Engine, requests: list[Request]) -> Times:
    """Runs the requests to their ends."""
    from fnengine.cli.talk import tagged

    times, last, made = Times(), {}, 0
    begin = time.perf_counter()
    for i, delta in tagged(engine, requests):
        if delta.tokens:
            now = time.perf_counter()
            if i in last:
                times.gaps.append(now - last[i])
            else:
                times.first.append(now - begin)
            last[i] = now
        made += len(delta.tokens)
    times.whole = time.perf_counter() - begin
    wanted = sum(r.stop.max_tokens or 0 for r in requests)
    assert made == wanted, f"{made} tokens came, {wanted} were asked for"
    return times


# --- start-up ---------------------------------------------------------------------------------------------------------


def startup(args: argparse.Namespace) -> Figures:
    """Process start to the first byte of text, with empty caches, and again with the caches that run left."""
    name = args.model if args.model_flag is None else args.model_flag
    words = ["complete", "1 2 3 4 5 6 7 8", "--max-tokens", "1", "--ignore-eos", *flags_of(args)]
    words += [] if name is None else ["--model", name]
    with tempfile.TemporaryDirectory(prefix="fnengine-bench-") as folder:
        cold = _first_byte(words, Path(folder))
        warm = [_first_byte(words, Path(folder)) for _ in range(args.repeats)]
    return {"model": name or "demo", "cold_s": cold, "warm_s": percentile(warm, 50), "warm_runs": len(warm)}


def _first_byte(words: list[str], cache: Path) -> float:
    """Seconds from starting `fnengine *words` to its first byte on stdout."""
    command = [sys.executable, "-c", "import sys; from fnengine.cli import main; sys.exit(main())", *words]
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment.with_cache(cache)
    ) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        _, errors = process.communicate()
    if not byte or process.returncode:
        raise FnError(f"the process ended with {process.returncode}: {errors.decode(errors='replace')[-500:]}")
    return seconds


def flags_of(args: argparse.Namespace) -> list[str]:
    """The words that say again which flags of the engine were given."""
    words: list[str] = []
    for f in FLAGS:
        if f.dest not in args:
            continue
        value = getattr(args, f.dest)
        if isinstance(value, bool):
            words.append(f.name if value else f.name.replace("--", "--no-", 1))
        else:
            many = value if isinstance(value, (list, tuple)) else [value]
            words += [f.name, *("auto" if v is None else str(v) for v in many)]
    return words


# --- over HTTP --------------------------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> Figures:
    """Concurrent streams against a running server."""
    from fnengine.cli.client import Server
    from fnengine.cli.load import drive

    server = Server(args.url, args.key or next(iter(environment.api_keys()), None))
    name = args.model_flag or server.first_model()
    vocab = _vocab(server, name)
    bodies = [
        {
            "model": name,
            "prompt": ids,
            "max_tokens": args.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for ids in prompts(vocab, args.num_prompts, args.input_len, args.prompt_seed)
    ]
    drive(server, "/v1/completions", [{**bodies[0], "max_tokens": 2}])
    done, seconds = drive(
        server, "/v1/completions", bodies, limit=args.max_concurrency, rate=args.request_rate, seed=args.prompt_seed
    )
    failed = [d for d in done if d.error is not None]
    good = [d for d in done if d.error is None]
    made = sum(d.tokens for d in good)
    figures: Figures = {
        "url": args.url,
        "model": name,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "prompts": args.num_prompts,
        "concurrency": args.max_concurrency or args.num_prompts,
        "request_rate_per_s": args.request_rate or "all at once",
        "failed": len(failed),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": made / seconds,
        **spread("ttft", [d.first for d in good]),
        **spread("itl", [gap for d in good for gap in d.gaps]),
        **spread("tpot", [(d.whole - d.first) / (d.tokens - 1) for d in good if d.tokens > 1]),
        **spread("e2e", [d.whole for d in good]),
    }
    if failed:
        figures["first_error"] = failed[0].error
    return figures


def _vocab(server: Any, name: str) -> int:
    """An upper bound for token ids that the server takes: found by asking it, for no endpoint tells."""
    try:
        return 1 + max(server.post("/tokenize", {"model": name, "prompt": "zZ 9~ the end of it all"})["tokens"])
    except FnError:
        return 256


KINDS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "throughput": throughput,
    "latency": latency,
    "startup": startup,
    "serve": serve,
}
