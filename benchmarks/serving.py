"""The workloads over HTTP: streaming /v1/completions with token-id prompts, beside the floor and beside other servers.

    python -m benchmarks.serving --workload w1,w3 [--model benchmarks/shapes/qwen3-0.6b] [--concurrency 8,32]
        [--repeats 3] [--url http://127.0.0.1:8000] [--peer-url http://127.0.0.1:9000] [--json FILE]
    python -m benchmarks.serving --workload w4       process start to first token over HTTP, cold and warm

Starts `fnengine serve` itself, or takes a running server with --url. Reports time to first token and inter-token
latency at p50 and p99 over all requests of all repeats. Inter-token latency is the time between two events of a
stream that bring tokens; tokens an event says how many come in one. (Not called http.py: a module of that name beside
a script that is run by its path hides Python's own.)
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import client, machine, peers, report, server, shape, startup, workloads
from benchmarks.engine import SHAPE
from benchmarks.workloads import Measured, Prompts, Sizes, Timed, Tokens, percentile


class Http:
    """A server: a side. Keeps the times of every answer."""

    def __init__(self, name: str, url: str, model: str | None = None):
        self.name, self.url, self.model = name, url, model

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        bodies = [client.body_of(p, new, self.model) for p in prompts]
        start = time.perf_counter()
        exchanges = asyncio.run(client.all_at_once(self.url, bodies))
        seconds = time.perf_counter() - start
        answers = [client.read(x) for x in exchanges]
        errors = [a.error for a in answers if a.error is not None]
        assert not errors, f"{self.name}: {len(errors)} of {len(answers)} requests failed, first: {errors[0]}"
        # A server that sends no ids is believed about their number.
        tokens = [a.tokens or [-1] * a.produced for a in answers]
        facts = {
            "first": [a.first for a in answers],
            "gaps": [g for a in answers for g in a.gaps],
            "tokens_an_event": sum(a.produced for a in answers) / max(1, sum(len(a.times) for a in answers)),
        }
        return Timed(seconds, tokens, facts)


def latencies(m: Measured) -> dict[str, Any]:
    """Time to first token and inter-token latency over all repeats, in seconds."""
    first = [f for facts in m.facts for f in facts["first"] if f is not None]
    gaps = [g for facts in m.facts for g in facts["gaps"]]
    out: dict[str, Any] = {"requests": len(first)}
    for name, values in (("ttft", first), ("itl", gaps)):
        for q in (50, 99):
            out[f"{name}_p{q}"] = percentile(values, q) if values else None
    out["tokens_an_event"] = sum(facts["tokens_an_event"] for facts in m.facts) / len(m.facts)
    return out


HEAD = (
    "workload", "server", "tok/s", "seconds", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "tokens/event",
    "read GB/s", "GFLOP/s", "floor s", "% of floor",
)  # fmt: skip


def row(f: dict[str, Any]) -> list[str]:
    """A line of the table under `HEAD`."""
    seen = f["latency"]
    least, share = report.row(f)[-2:]
    times = ["-" if seen[k] is None else f"{1e3 * seen[k]:.1f}" for k in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")]
    return [
        report.label(f),
        f["side"],
        f"{f['output_tokens_per_second']:.1f}",
        f"{f['seconds']:.3f}",
        *times,
        f"{seen['tokens_an_event']:.2f}",
        f"{f['achieved_read'] / 1e9:.1f}",
        f"{f['achieved_flops'] / 1e9:.0f}",
        least,
        share,
    ]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from fnengine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="w1", help="of w1, w2, w3, w4, separated by commas")
    parser.add_argument("--model", default=None, help=f"demo, or a folder (default: {SHAPE}; w4: that and demo)")
    parser.add_argument("--load-format", default="auto", help="auto: dummy for a folder without weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", default="8,32", help="of W1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=environment.threads())
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--url", default=None, help="a running server of ours, of --model")
    parser.add_argument("--server-args", default="", help="more flags for `fnengine serve`, in one string")
    parser.add_argument("--peer", default="", help="known peers with a server, separated by commas")
    parser.add_argument("--peer-url", default=None, help="a running server of another engine, of the same shape")
    parser.add_argument("--peer-model", default=None, help="the model's name or file for the peer")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--divide", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--json", default=None)
    args = parser.parse_args(argv)
    args.workload = args.workload.split(",")
    unknown = set(args.workload) - {"w1", "w2", "w3", "w4"}
    if unknown:
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; known: w1, w2, w3, w4")
    return args


def serve_flags(args: argparse.Namespace) -> list[str]:
    return args.server_args.split() + (["--enforce-eager"] if args.enforce_eager else [])


def peer_servers(args: argparse.Namespace, folder: Path, dtype: str, max_len: int, stack: ExitStack) -> list[Http]:
    """The other servers asked for that are here; the others are named and left out."""
    found = []
    if args.peer_url:
        found.append(Http("peer", args.peer_url, args.peer_model))
    names = list(peers.PEERS) if args.peer == "all" else [n for n in args.peer.split(",") if n]
    for name in names:
        peer = peers.PEERS.get(name)
        why = f"no peer is called {name}" if peer is None else peers.missing(peer)
        if peer is None or peer.server is None or why is not None:
            print(f"peer missing: {name}: {why or 'it has no server; python -m benchmarks.engine measures it'}")
            continue
        port = server.free_port()
        model = args.peer_model or str(folder)
        command = peers.filled(peer.server, model=model, dtype=dtype, threads=args.threads, max_len=max_len, port=port)
        running = stack.enter_context(server.Server(command, port))
        found.append(Http(name, running.url, model))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    out: dict[str, Any] = {"facts": machine.facts(args.threads)}
    if "w4" in args.workload:
        out["w4"] = first_tokens([args.model] if args.model else ["demo", SHAPE], args)
    if set(args.workload) - {"w4"}:
        steady(args, out)
    report.write(args.json, out)
    return 0


def steady(args: argparse.Namespace, out: dict[str, Any]) -> None:
    """Runs W1 to W3 into `out` and prints them."""
    folder, found_format = shape.prepare(args.model or SHAPE)
    load_format = found_format if args.load_format == "auto" else args.load_format
    dtype = shape.own_dtype(folder, args.dtype)
    sizes = Sizes().divided(args.divide) if args.divide > 1 else Sizes()
    form, vocab, longest = shape.measure(folder, dtype)
    max_len = min(args.max_model_len, longest)
    quick = args.divide > 1
    others, rates = machine.Others(), [machine.measure_apart(dtype, args.threads, quick=quick)]
    measured: list[Measured] = []
    memory = None
    with ExitStack() as stack:
        if args.url is None:
            command = server.command(folder, load_format, dtype, args.threads, max_len, serve_flags(args))
            own = stack.enter_context(server.Server(command))
            ours = Http("fnengine", own.url)
            out["server"] = own.command
        else:
            own, ours = None, Http("fnengine", args.url)
        sides = [ours, *peer_servers(args, folder, dtype, max_len, stack)]
        prompts = Prompts(vocab)
        if "w1" in args.workload:
            for rows in (int(c) for c in args.concurrency.split(",")):
                measured += workloads.w1(sides, prompts, sizes, rows, args.repeats)
        if "w2" in args.workload:
            measured += workloads.w2(sides, prompts, sizes, args.repeats if quick else max(5, args.repeats))
        if "w3" in args.workload:
            measured += workloads.w3(sides, prompts, sizes, args.repeats)
        if own is not None:
            memory = peak_memory(own.pid)
    rates.append(machine.measure_apart(dtype, args.threads, quick=quick))
    share = others.share()

    best = machine.best_rates(rates)
    rows = []
    for m in measured:
        f = report.figures(m, form, best, sizes)
        f["latency"] = latencies(m)
        del f["facts"]  # every single gap; the percentiles are kept
        rows.append(f)
    by_workload = {(m.workload, m.rows): m for m in measured if m.side == ours.name}
    pairs = [report.paired(by_workload[m.workload, m.rows], m) for m in measured if m.side != ours.name]
    name = args.model or SHAPE
    print(f"\n{name}, {dtype}, {load_format} weights, over HTTP at {ours.url}, divided by {args.divide}")
    print(report.machine_lines(out["facts"], rates, dtype, share))
    print("\n" + report.table(HEAD, map(row, rows)))
    if pairs:
        print("\nfnengine is so many times as fast, repeat by repeat:")
        print(report.table(("workload", "against", "whole", "prefill", "decode"), map(report.ratio_row, pairs)))
    if memory is not None:
        print(f"\npeak resident memory of the server: {memory / 1e9:.2f} GB")
    out |= {
        "model": name,
        "dtype": dtype,
        "load_format": load_format,
        "sizes": vars(sizes),
        "rates": rates,
        "others_share": share,
        "results": rows,
        "ratios": pairs,
        "peak_rss_bytes": memory,
    }


def peak_memory(pid: int) -> int | None:
    """Most bytes that a process has held so far; None where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def first_tokens(models: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """W4 over HTTP: seconds from starting `fnengine serve` to a healthy answer and to the first streamed token."""
    results = []
    others = machine.Others()
    for name in models:
        folder, found_format = shape.prepare(name)
        load_format = found_format if args.load_format == "auto" else args.load_format
        _, _, longest = shape.measure(folder, shape.own_dtype(folder, args.dtype))
        command = server.command(
            folder, load_format, args.dtype, args.threads, min(args.max_model_len, longest), serve_flags(args)
        )

        def start(cache: Path, command: list[str] = command) -> dict[str, float]:
            with server.Server(command, environment=startup.environment_for(cache, args.threads)) as running:
                up = time.monotonic() - running.started
                asked = time.monotonic()
                x = asyncio.run(client.exchange(running.url, client.body_of(list(range(20, 28)), 1)))
                answer = client.read(x)
                assert answer.error is None and answer.first is not None, answer.error
                return {"healthy": up, "first_token": asked - running.started + answer.first}

        both = startup.cold_and_warm(start, args.repeats)
        results.append({"model": name, "dtype": args.dtype, "load_format": load_format, **both})
    share = others.share()
    print(startup.table(results))
    print("cold: empty FNENGINE_CACHE; the page cache is not dropped. Medians of", args.repeats, "fresh servers each.")
    print(f"others took {100 * share:.0f} % of the machine's processor time meanwhile")
    for r in results:
        r["others_share"] = share
    return results


if __name__ == "__main__":
    sys.exit(main())
