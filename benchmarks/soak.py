"""Many streaming clients that come, read, and go away as they like: no error, no lost block, memory flat.

    python -m benchmarks.soak [--seconds 120] [--clients 256] [--model demo] [--seed 0] [--json FILE]

Starts `fnengine serve` on 127.0.0.1 (or takes --url of one there, with --pid for its memory). Every client sends one
request after another with random prompt and output lengths; a part of them is cut off after a random number of
events, half of those by a reset. Beside them one client repeats one greedy request, whose text must never change.
At the end all clients leave, and within ten seconds the server must run nothing and hold no block. Its resident memory
must be flat: the median of the last quarter at most `--tolerance` above that of the second. Exit status 0 or 1.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks import client, machine, report, server, shape
from benchmarks.workloads import percentile

PROMPT = (1, 200)
OUTPUT = (1, 96)
"""Shortest and longest prompt and output, in tokens; drawn uniformly."""

CUTS = 0.3
"""Share of requests that the client leaves in the middle."""

DRAIN = 10.0
"""Seconds after the last client within which everything must be free."""


@dataclass
class Tally:
    """What the clients saw. Every request is in exactly one of finished, cut, ended (by the clock) and errors."""

    finished: int = 0
    cut: int = 0
    ended: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    canary: int = 0
    """Repeats of the request whose text must not change."""

    def as_dict(self) -> dict[str, Any]:
        times = {
            f"{name}_p{q}": percentile(values, q)
            for name, values in (("ttft", self.first), ("itl", self.gaps))
            for q in (50, 99)
            if values
        }
        return {
            "finished": self.finished,
            "cut": self.cut,
            "ended_by_the_clock": self.ended,
            "tokens": self.tokens,
            "errors": dict(self.errors),
            "canary_repeats": self.canary,
            **times,
        }


@dataclass(frozen=True)
class Plan:
    """One request of a client, drawn before it is sent."""

    prompt: list[int]
    new: int
    cut_after: int | None
    abrupt: bool


def draw(rng: random.Random, vocab: int, longest: int) -> Plan:
    """A random request that fits the context."""
    new = rng.randint(OUTPUT[0], min(OUTPUT[1], longest // 2))
    length = rng.randint(PROMPT[0], min(PROMPT[1], longest - new))
    cut = rng.randint(0, new) if rng.random() < CUTS else None
    return Plan([rng.randrange(vocab) for _ in range(length)], new, cut, rng.random() < 0.5)


def check(plan: Plan, x: client.Exchange, tally: Tally) -> None:
    """Counts one exchange: whole and of the wanted length, cut as planned, or an error."""
    answer = client.read(x)
    if answer.error is not None:
        tally.errors[answer.error[:200]] += 1
    elif x.cut:
        tally.ended += x.late
        tally.cut += not x.late
        tally.tokens += sum(answer.counts)
    elif answer.produced != plan.new or answer.finish != "length":
        tally.errors[f"{answer.produced} tokens, finish {answer.finish!r}, wanted all of max_tokens"] += 1
    else:
        tally.finished += 1
        tally.tokens += answer.produced
        tally.gaps.extend(answer.gaps)
    if answer.first is not None:
        tally.first.append(answer.first)


async def one_client(url: str, number: int, seed: int, vocab: int, longest: int, end: float, tally: Tally) -> None:
    """Sends requests until the clock says `end`; the one in progress then is left."""
    rng = random.Random(f"{seed}/{number}")
    await asyncio.sleep(rng.random())
    while time.monotonic() < end:
        plan = draw(rng, vocab, longest)
        body = client.body_of(plan.prompt, plan.new)
        x = await client.exchange(url, body, cut_after=plan.cut_after, abrupt=plan.abrupt, leave_at=end)
        check(plan, x, tally)


async def canary(url: str, vocab: int, end: float, tally: Tally) -> None:
    """Repeats one greedy request; its text is that of the first time, when nobody else was there."""
    body = client.body_of([(7 * i + 3) % vocab for i in range(40)], 24)
    reference = client.read(await client.exchange(url, body))
    if reference.error is not None:
        tally.errors[f"canary: {reference.error[:200]}"] += 1
        return
    while time.monotonic() < end:
        again = client.read(await client.exchange(url, body))
        tally.canary += 1
        if again.error is not None:
            tally.errors[f"canary: {again.error[:200]}"] += 1
        elif again.tokens != reference.tokens or again.text != reference.text:
            tally.errors["canary: other tokens than when alone"] += 1
        await asyncio.sleep(0.5)


async def load(url: str, clients: int, seconds: float, seed: int, vocab: int, longest: int) -> Tally:
    """Everything that the clients do, for about `seconds`."""
    tally = Tally()
    end = time.monotonic() + seconds
    watch = asyncio.ensure_future(canary(url, vocab, end, tally))
    await asyncio.sleep(0.2)  # the canary's first answer is to be one without company
    await asyncio.gather(*(one_client(url, i, seed, vocab, longest, end, tally) for i in range(clients)), watch)
    return tally


FILL = 200_000
"""Largest pool in tokens that is filled before the clients come."""


async def fill(url: str, vocab: int, longest: int, seed: int) -> int:
    """Touches every block of the pool once, and gives the number of tokens; 0 when the pool is larger than `FILL`.

    Memory that was allocated becomes resident when it is first written, so a pool in first use looks like a leak.
    """
    samples = server.metrics((await asyncio.to_thread(server.get, url, "/metrics", 30.0))[1])
    tokens = int(server.total(samples, "fnengine:kv_blocks_total") or 0) * 16
    if not 0 < tokens <= FILL:
        return 0
    rng = random.Random(f"{seed}/fill")
    count = -(-tokens // (longest - 1)) + 1
    bodies = [client.body_of([rng.randrange(vocab) for _ in range(longest - 1)], 1) for _ in range(count)]
    for i in range(0, count, 16):
        for x in await client.all_at_once(url, bodies[i : i + 16]):
            error = client.read(x).error
            if error is not None:
                raise RuntimeError(f"filling the pool failed: {error}")
    return tokens


class Memory:
    """Resident bytes of a process and its descendants, over time."""

    def __init__(self, pid: int, every: float = 0.5):
        import psutil

        self.samples: list[tuple[float, int]] = []
        self._root, self._every, self._stop = psutil.Process(pid), every, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> list[tuple[float, int]]:
        """[(seconds since the start, bytes)]"""
        self._stop.set()
        self._thread.join()
        return self.samples

    def _sample(self) -> None:
        import psutil

        start = time.monotonic()
        while not self._stop.wait(self._every):
            try:
                family = [self._root, *self._root.children(recursive=True)]
                total = sum(p.memory_info().rss for p in family)
            except psutil.Error:
                continue
            self.samples.append((time.monotonic() - start, total))


def flatness(samples: Sequence[tuple[float, int]]) -> dict[str, float] | None:
    """Median bytes of the second and of the last quarter of the time, and their growth; None for too few samples."""
    if len(samples) < 8:
        return None
    start, end = samples[0][0], samples[-1][0]
    quarter = (end - start) / 4
    second = [b for t, b in samples if start + quarter <= t < start + 2 * quarter]
    last = [b for t, b in samples if t >= start + 3 * quarter]
    if not second or not last:
        return None
    a, b = statistics.median(second), statistics.median(last)
    return {"second_quarter": a, "last_quarter": b, "growth": b / a - 1, "peak": max(b for _, b in samples)}


def leaks(samples: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]) -> list[str]:
    """What the server still holds or counts wrongly when no client is there, from its metrics; empty when nothing."""
    wrong = []
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_blocks_held"):
        value = server.total(samples, f"fnengine:{name}")
        if value is None:
            wrong.append(f"/metrics has no fnengine:{name}")
        elif value != 0:
            wrong.append(f"{name} is {value:g}")
    failed = server.total(samples, "fnengine:request_success_total", finished_reason="error")
    if failed is None:
        wrong.append('/metrics has no fnengine:request_success_total{finished_reason="error"}')
    elif failed:
        wrong.append(f"{failed:g} requests ended with an error")
    return wrong


def drained(
    read: Callable[[], Mapping[Any, float]], limit: float = DRAIN
) -> tuple[list[str], float, Mapping[Any, float]]:
    """(what is still held, seconds waited, the last metrics): polls until nothing is held or `limit` has passed."""
    start = time.monotonic()
    while True:
        samples = read()
        wrong = leaks(samples)
        waited = time.monotonic() - start
        if not wrong or waited > limit:
            return wrong, waited, samples
        time.sleep(0.1)


def verdict(
    tally: Tally,
    held: Sequence[str],
    flat: Mapping[str, float] | None,
    tolerance: float,
    *,
    memory_known: bool = True,
    exit_code: int | None = 0,
) -> list[str]:
    """Everything that went wrong; empty means passed."""
    wrong = [f"{n} x {what}" for what, n in tally.errors.most_common()]
    wrong += [f"after the last client: {h}" for h in held]
    if not tally.finished:
        wrong.append("no request finished")
    if not tally.canary:
        wrong.append("the canary never sang")
    if memory_known:
        if flat is None:
            wrong.append("too few samples of memory")
        elif flat["growth"] > tolerance:
            wrong.append(f"memory grew by {100 * flat['growth']:.1f} % from the second quarter to the last")
    if exit_code:
        wrong.append(f"the server ended with {exit_code}")
    return wrong


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from fnengine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=environment.threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.02, help="growth of memory that is still flat")
    parser.add_argument("--server-args", default="", help="more flags for `fnengine serve`, in one string")
    parser.add_argument("--url", default=None, help="a running server on 127.0.0.1")
    parser.add_argument("--pid", type=int, default=None, help="its process, for memory")
    parser.add_argument("--json", default=None)
    args = parser.parse_args(argv)
    if args.url is not None and urlsplit(args.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error("the soak talks to this machine only: give a --url on 127.0.0.1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    folder, found_format = shape.prepare(args.model)
    load_format = found_format if args.load_format == "auto" else args.load_format
    _, vocab, longest = shape.measure(folder, "float32")
    longest = min(args.max_model_len, longest)
    facts, others = machine.facts(args.threads), machine.Others()
    exit_code: int | None = 0
    with ExitStack() as stack:
        own = None
        if args.url is None:
            command = server.command(folder, load_format, args.dtype, args.threads, longest, args.server_args.split())
            own = stack.enter_context(server.Server(command))
        url, pid = (args.url, args.pid) if own is None else (own.url, own.pid)
        filled = asyncio.run(fill(url, vocab, longest, args.seed))
        memory = None if pid is None else Memory(pid)
        began = time.monotonic()
        tally = asyncio.run(load(url, args.clients, args.seconds, args.seed, vocab, longest))
        seconds = time.monotonic() - began
        samples = [] if memory is None else memory.stop()
        if own is not None and not own.alive:
            held, waited, last = [f"the server has ended: {own.said()[-500:]}"], 0.0, {}
        else:
            held, waited, last = drained(lambda: server.metrics(server.get(url, "/metrics", 30.0)[1]))
            after = client.read(asyncio.run(client.exchange(url, client.body_of([1, 2, 3], 4), limit=30.0)))
            if after.error is not None or after.produced != 4:
                held = [*held, f"a request afterwards failed: {after.error}"]
    if own is not None:
        exit_code = own.exit_code
    flat = flatness(samples)
    wrong = verdict(tally, held, flat, args.tolerance, memory_known=memory is not None, exit_code=exit_code)
    share = others.share()
    seen = tally.as_dict()
    counted = {
        reason: server.total(last, "fnengine:request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    print(f"soak: {args.clients} clients, {seconds:.1f} s, {args.model}, seed {args.seed}, {url}")
    print(f"pool     {f'{filled} tokens, all touched once before' if filled else 'too large to fill before'}")
    print(f"machine  {facts['cpu']}, {args.threads} threads, {facts['date']}, commit {facts['commit']}")
    print(f"others   took {100 * share:.0f} % of the machine's processor time meanwhile")
    print(
        f"requests {seen['finished']} finished, {seen['cut']} cut, {seen['ended_by_the_clock']} left at the end, "
        f"{sum(tally.errors.values())} errors; {seen['tokens']} tokens ({seen['tokens'] / seconds:.0f}/s), "
        f"canary {tally.canary} times the same"
    )
    if tally.first and tally.gaps:
        ms = {k: f"{1e3 * seen[k]:.1f}" for k in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")}
        print(
            f"latency  first token {ms['ttft_p50']} ms at p50, {ms['ttft_p99']} at p99; "
            f"between tokens {ms['itl_p50']} and {ms['itl_p99']}"
        )
    print(f"server   counted {counted}; free of blocks and requests after {waited:.1f} s")
    if flat is not None:
        print(
            f"memory   {flat['second_quarter'] / 1e6:.0f} MB in the second quarter, "
            f"{flat['last_quarter'] / 1e6:.0f} MB in the last ({100 * flat['growth']:+.2f} %)"
        )
    for w in wrong:
        print(f"WRONG    {w}")
    print("verdict  " + ("FAILED" if wrong else "passed"))
    report.write(
        args.json,
        {
            "facts": facts,
            "clients": args.clients,
            "seconds": seconds,
            "model": args.model,
            "seed": args.seed,
            "others_share": share,
            "filled_tokens": filled,
            "seen": seen,
            "server_counted": counted,
            "seconds_to_drain": waited,
            "memory": flat,
            "memory_samples": samples,
            "wrong": wrong,
        },
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
