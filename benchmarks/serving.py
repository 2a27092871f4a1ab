"""The workloads over HTTP: streaming /v1/completions with token-id prompts, beside the floor and beside other servers.

    python -m benchmarks.serving --workload w1,w3 [--model benchmarks/configs/qwen3-0.6b] [--concurrency 8,32]
        [--repeats 3] [--url http://127.0.0.1:8000] [--peer-url http://127.0.0.1:9000] [--json FILE]
    python -m benchmarks.serving --strategy sample --concurrency 32 [--model demo]     a strategy beside plain requests
    python -m benchmarks.serving --workload w4       process start to first token over HTTP, cold and warm

Starts `fnengine serve` itself, or takes a running server with --url. Reports time to first token and inter-token
latency at p50 and p99 over all requests of all repeats. Inter-token latency is the time between two events of a
stream that bring tokens; tokens an event says how many come in one. With --strategy a second side sends the same
prompts to the same server, without prefix caching, and asks for that strategy; `sample` has to give the same tokens, or
the exit status is 1. (Not called http.py: a module of that name beside
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

from benchmarks import client, comparison, machine, peers, report, server, shape, startup
from benchmarks.comparison import SHAPE
from benchmarks.processes import Group
from benchmarks.workloads import Measured, Timed, Tokens, percentile


class Http:
    """A server: a side. Keeps the times of every answer. One that we started is stopped between its turns."""

    def __init__(self, name: str, url: str, model: str | None = None, group: Group | None = None, **more: Any):
        self.name, self.url, self.model, self.group, self.more = name, url, model, group, more
        """`more` are fields of every request."""
        if group is not None:
            group.pause()

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        if self.group is None:
            return self._run(prompts, new)
        self.group.resume()
        try:
            return self._run(prompts, new)
        finally:
            self.group.pause()

    def _run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        bodies = [client.body_of(p, new, self.model, **self.more) for p in prompts]
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
            "answers": tokens,
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
    parser = comparison.parser(__doc__, "w1", "8,32")
    parser.add_argument("--url", default=None, help="a running server of ours, of --model")
    parser.add_argument("--server-args", default="", help="more flags for `fnengine serve`, in one string")
    parser.add_argument("--strategy", default=None, help="measure this strategy beside plain requests")
    parser.add_argument("--peer-url", default=None, help="a running server of another engine, of the same shape")
    parser.add_argument("--peer-model", default=None, help="the model's name at --peer-url")
    return comparison.parse(parser, argv)


def serve_flags(args: argparse.Namespace) -> list[str]:
    more = ["--enforce-eager"] if args.enforce_eager else []
    if args.strategy is not None:
        more += ["--strategy", args.strategy, "--no-enable-prefix-caching"]
    return [*args.server_args.split(), "--quantization", args.quantization, *more]


def peer_servers(args: argparse.Namespace, subject: peers.Subject, stack: ExitStack) -> list[Http]:
    """The other servers asked for that are here; the others are named and left out."""

    def start(name: str) -> Http:
        if name in peers.PEERS and peers.PEERS[name].server is None:
            raise peers.PeerError(f"{name}: it has no server; python -m benchmarks.engine measures it")
        peer = peers.known(name, subject)
        assert peer.server is not None
        port = server.free_port()
        places = peers.places(peer, subject, port)
        environment = peers.surroundings(peer, subject.threads)
        try:
            running = stack.enter_context(server.Server(peers.filled(peer.server, places), port, environment))
        except server.ServerError as e:
            raise peers.PeerError(f"{name}: {e}") from None
        return Http(name, running.url, str(places["model"]), running.group)

    given = [Http("peer", args.peer_url, args.peer_model)] if args.peer_url else []
    return [*given, *comparison.here(args.peer, start)]


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    out: dict[str, Any] = {"facts": machine.facts(args.threads)}
    if "w4" in args.workload:
        out["w4"] = first_tokens([args.model] if args.model else ["demo", SHAPE], args)
    right = True
    if set(args.workload) - {"w4"}:
        right = steady(args, out)
    report.write(args.json, out)
    return 0 if right else 1


def steady(args: argparse.Namespace, out: dict[str, Any]) -> bool:
    """Runs W1 to W3 into `out` and prints them. False when the strategy that defines sampling gave other tokens."""
    plan = comparison.plan(args)
    others, rates = machine.Others(), [plan.rates()]
    with ExitStack() as stack:
        if args.url is None:
            command = server.command(
                plan.folder, plan.load_format, plan.dtype, args.threads, plan.max_len, serve_flags(args)
            )
            own = stack.enter_context(server.Server(command))
            ours = Http("fnengine", own.url, group=own.group)
            out["server"] = own.command
        else:
            ours = Http("fnengine", args.url)
        sides = [ours, *peer_servers(args, plan.subject, stack)]
        if args.strategy is not None:
            asked = {"name": args.strategy, "args": {}}
            sides.append(Http(f"strategy {args.strategy}", ours.url, group=ours.group, strategy=asked))
        measured = comparison.measure(sides, plan)
        memory = {side.name: side.group.peak_bytes() for side in sides if side.group is not None and not side.more}
    rates.append(plan.rates())
    under = comparison.Conditions(
        out["facts"], rates, others.share(), f" over HTTP at {ours.url}", {"peak_rss_bytes": memory}
    )

    def refine(m: Measured, figures: dict[str, Any]) -> None:
        figures["latency"] = latencies(m)
        del figures["facts"]  # every single gap; the percentiles are kept

    out |= comparison.conclude(plan, measured, ours.name, under, HEAD, row, refine)
    if memory:
        print(comparison.memory_line(memory))
    if args.strategy == "sample" and not same_answers(measured, ours.name, "strategy sample"):
        print("\nWRONG  the strategy gave other tokens than plain requests")
        return False
    return True


def same_answers(measured: Sequence[Measured], one: str, other: str) -> bool:
    """Whether two sides gave the same tokens in every repeat of every workload."""
    answers: dict[str, list[Any]] = {
        side: [[facts["answers"] for facts in m.facts] for m in measured if m.side == side] for side in (one, other)
    }
    return answers[one] == answers[other]


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
