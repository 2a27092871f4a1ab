"""What HTTP costs beside the engine in this process, and what a strict JSON schema costs beside free text.

    python -m benchmarks.overhead http    [--streams 64] [--new 128] [--repeats 9] [--json FILE]
    python -m benchmarks.overhead grammar [--streams 32] [--new 128] [--repeats 9] [--json FILE]

Both take turns (A B A B) within every repeat, on the bundled model, with the same prompts, greedy, of fixed length; the
figure is the median of the ratios of token rates, repeat by repeat, with the least and the largest. `http`: the same
requests as `LLM.generate` in this process, and as streams of `fnengine serve` with one event a token, read by a client
that keeps bytes and looks at them afterwards; the server is stopped (SIGSTOP) while it is not its turn. The client runs
on the same cores, so its processor time, which is told, counts against the server. `grammar`: `LLM.generate` with and
without a schema; the schema's texts are as long as the free ones: an array in it has no end before they are cut.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from benchmarks import machine, report, server, shape
from benchmarks.processes import Group
from benchmarks.workloads import Prompts, Timed, Tokens, turns

PROMPT = 32
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 4},
        "kind": {"enum": ["story", "letter", "list"]},
        "lines": {
            "type": "array",
            "minItems": 200,
            "items": {
                "type": "object",
                "properties": {
                    "who": {"type": "string", "minLength": 3},
                    "says": {"type": "string", "minLength": 20},
                    "age": {"type": "integer", "minimum": 1, "maximum": 99},
                },
                "required": ["who", "says", "age"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "kind", "lines"],
    "additionalProperties": False,
}


class Side(Protocol):
    name: str

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed: ...


class Offline:
    """`LLM.generate` in this process."""

    def __init__(self, name: str, folder: Path, threads: int, max_len: int, schema: Any = None):
        import fnengine as fn
        from fnengine import environment
        from fnengine.host.grammar import json_schema

        environment.set_threads(threads)
        self.name = name
        self.llm = fn.LLM(fn.load(folder), max_model_len=max_len)
        self._how = {"grammar": None if schema is None else json_schema(schema)}
        self._sampling, self._stop = fn.Sampling(temperature=0), fn.Stop

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        stop = self._stop(max_tokens=new, ignore_eos=True)
        begun, used = time.perf_counter(), time.process_time()
        done = self.llm.generate(list(prompts), self._sampling, stop, **self._how)
        facts = {"processor": time.process_time() - used}
        return Timed(time.perf_counter() - begun, [list(c.choices[0].tokens) for c in done], facts)


class Sink(asyncio.Protocol):
    """A connection that sends one request and keeps what comes, until the other side closes."""

    def __init__(self, request: bytes, ended: asyncio.Future[None]):
        self._request, self._ended = request, ended
        self.parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def body(self) -> bytes:
        """What came behind the head, without the sizes of chunks."""
        head, _, rest = b"".join(self.parts).partition(b"\r\n\r\n")
        assert head.split(None, 2)[1] == b"200", head + rest[:300]
        assert b"transfer-encoding: chunked" in head.lower(), head
        out, at = [], 0
        while size := int(rest[at : (end := rest.index(b"\r\n", at))], 16):
            out.append(rest[end + 2 : end + 2 + size])
            at = end + 4 + size
        return b"".join(out)


async def stream_all(url: str, bodies: Sequence[bytes]) -> list[bytes]:
    """The bodies of the answers to completions that are all asked for at once, each on a connection of its own."""
    at, loop = urlsplit(url), asyncio.get_running_loop()

    async def one(raw: bytes) -> Sink:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw
        ended: asyncio.Future[None] = loop.create_future()
        transport, sink = await loop.create_connection(lambda: Sink(whole, ended), at.hostname, at.port)
        await ended
        transport.close()
        return sink

    return [sink.body() for sink in await asyncio.gather(*map(one, bodies))]


class Streamed:
    """`fnengine serve`, stopped between its turns."""

    name = "over HTTP"

    def __init__(self, url: str, group: Group | None):
        self.url, self.group = url, group
        if group is not None:
            group.pause()

    def run(self, prompts: Sequence[Tokens], new: int) -> Timed:
        import uvloop

        more = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        bodies = [json.dumps({"prompt": p, "max_tokens": new, **more}).encode() for p in prompts]
        if self.group is not None:
            self.group.resume()
        try:
            before = self._used()
            begun, used = time.perf_counter(), time.process_time()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                answers = runner.run(stream_all(self.url, bodies))
            seconds = time.perf_counter() - begun
            facts = {"client": time.process_time() - used, "processor": self._used() - before}
        finally:
            if self.group is not None:
                self.group.pause()
        events = [[json.loads(e[6:]) for e in a.split(b"\n\n")[:-2]] for a in answers]
        assert all(a.endswith(b"data: [DONE]\n\n") for a in answers)
        made = [e[-1]["usage"]["completion_tokens"] for e in events]
        facts["events_a_token"] = sum(map(len, events)) / sum(made)
        return Timed(seconds, [[-1] * n for n in made], facts)

    def _used(self) -> float:
        import psutil

        if self.group is None:
            return 0.0
        t = psutil.Process(self.group.process.pid).cpu_times()
        return t.user + t.system


def compare(sides: Sequence[Side], vocab: int, streams: int, new: int, repeats: int) -> dict[str, Any]:
    """Token rates by side and repeat, and ratios of the second side's to the first's. One turn each is not counted."""
    prompts = Prompts(vocab)
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    facts: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for side, repeat in turns(sides, repeats + 1):
        timed = side.run(prompts.many(streams, PROMPT, "overhead", repeat), new)
        made = sum(map(len, timed.tokens))
        assert made == streams * new, f"{side.name}: {made} tokens, wanted {streams * new}"
        if repeat:
            rates[side.name].append(made / timed.seconds)
            facts[side.name].append(
                {k: v / made if k in ("processor", "client") else v for k, v in timed.facts.items()}
            )
    first, second = (rates[side.name] for side in sides)
    shares = [b / a for a, b in zip(first, second, strict=True)]
    return {
        "streams": streams,
        "prompt": PROMPT,
        "new": new,
        "tokens_per_second": {name: statistics.median(r) for name, r in rates.items()},
        "all_tokens_per_second": rates,
        "processor_seconds_a_token": {
            name: {k: statistics.median(f[k] for f in fs) for k in fs[0]} for name, fs in facts.items()
        },
        "share": statistics.median(shares),
        "shares": shares,
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from fnengine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("http", "grammar"))
    parser.add_argument("--streams", type=int, default=None, help="at once (http 64, grammar 32)")
    parser.add_argument("--new", type=int, default=128, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=environment.threads())
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--server-args", default="", help="more flags for `fnengine serve`, in one string")
    parser.add_argument("--json", default=None)
    args = parser.parse_args(argv)
    args.streams = args.streams or {"http": 64, "grammar": 32}[args.what]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    folder, load_format = shape.prepare("demo")
    _, vocab, longest = shape.measure(folder, "float32")
    longest = min(args.max_model_len, longest)
    facts, others = machine.facts(args.threads), machine.Others()
    with ExitStack() as stack:
        if args.what == "http":
            more = args.server_args.split()
            running = stack.enter_context(
                server.Server(server.command(folder, load_format, "auto", args.threads, longest, more))
            )
            second: Side = Streamed(running.url, running.group)
        else:
            second = Offline("strict schema", folder, args.threads, longest, SCHEMA)
        first = Offline("in process", folder, args.threads, longest)
        found = compare([first, second], vocab, args.streams, args.new, args.repeats)
    share = others.share()
    print(f"machine  {facts['cpu']}, {args.threads} threads, {facts['date']}, commit {facts['commit']}")
    print(f"others   took {100 * share:.0f} % of the machine's processor time meanwhile")
    for name, rate in found["tokens_per_second"].items():
        used = found["processor_seconds_a_token"][name]
        told = ", ".join(f"{k} {1e6 * v:.1f} us" for k, v in used.items() if k in ("processor", "client"))
        print(f"{name:14} {rate:.0f} tokens/s; processor time a token: {told}")
    low, high = min(found["shares"]), max(found["shares"])
    print(f"{second.name} has {100 * found['share']:.1f} % of the rate ({100 * low:.1f} to {100 * high:.1f})")
    report.write(args.json, {"facts": facts, "what": args.what, "others_share": share, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
