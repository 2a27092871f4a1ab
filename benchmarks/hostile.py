"""Requests that are broken, huge or malicious, and what they do to everybody else: no 5xx, no leak, others go on.

    python -m benchmarks.hostile [--requests 10000] [--rate 200] [--hold 1000] [--seed 0] [--json FILE]

Starts `fnengine serve` of the bundled model (or takes --url of one on this machine, with --pid). A few honest clients
stream all the time; the time between their tokens is measured while nobody attacks, before and after, and while
`--requests` attacks come, drawn from some twenty kinds by a seed. Then `--hold` streams are opened at once and held.
Wrong are: an answer of 500 or more (501 of a route that says so excepted), an honest client's error, another text than
when alone, tokens that come at half the pace or slower, blocks, requests, descriptors or threads that are left, memory
that grows. Exit status 0 or 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from benchmarks import client, machine, report, server, shape, soak
from benchmarks.workloads import percentile

Ending = Literal["read", "reset", "half", "leave", "unread"]
LEAVE = 1.0
"""Seconds that an attacker who waits for nothing stays."""
LIMIT = 60.0
"""Seconds in which a request that is whole must be answered."""
UNBUILT = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/classify",
    "/v1/responses/compact",
    "/sleep",
    "/wake_up",
)


@dataclass(frozen=True)
class Attack:
    """Bytes to send, piece by piece, and what to do then."""

    kind: str
    pieces: tuple[bytes, ...]
    ending: Ending = "read"
    """`read` wants an answer, or the end of the connection; `half` the same with its own side closed; the others go."""
    pause: float = 0.0
    """Seconds between two pieces."""
    path: str = ""


@dataclass
class Tally:
    statuses: Counter[str] = field(default_factory=Counter)
    """"kind status" -> number; a status of 0 is a connection that ended without an answer."""
    wrong: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    """Seconds that the slowest answer took, ..."""
    slowest_kind: str = ""
    """... and the kind of attack that it answered."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """(what was sent, what came) of the first wrong answers."""


# --- what attackers send ----------------------------------------------------------------------------------------------

STREAM = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 200, "stream": True, "ignore_eos": True}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 3, "store": False},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
    "/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/abort_requests": {"request_ids": ["x"]},
}
FIELDS = (
    "model", "stream", "stream_options", "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "logprobs", "echo", "repetition_penalty", "seed", "logit_bias", "allowed_token_ids",
    "bad_words", "no_repeat_ngram_size", "typical_p", "dry_multiplier", "dry_base", "dry_allowed_length",
    "dry_sequence_breakers", "xtc_probability", "processors", "steer", "max_tokens", "min_tokens", "strategy",
    "speculative", "prediction", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "prompt_logprobs",
    "timing", "timeout", "priority", "cache_salt", "request_id", "prompt", "messages", "tools", "tool_choice",
    "reasoning_effort", "chat_template_kwargs", "response_format", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "structured_outputs", "input", "instructions", "text", "reasoning", "top_logprobs", "system",
    "thinking", "metadata", "encoding_format", "dimensions", "tokens", "documents", "top_n",
    "stop_regex", "logprob_token_ids",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 1e308, -1e308, 0.5, "", "x", "\x00", "\ud7ff",
    [], [[]], [None], {}, {"": {}}, [1, "a"], [[1], "a"], {"a": [{}]}, "9" * 400, ["x"] * 100, list(range(300)),
)  # fmt: skip
SCHEMAS: tuple[Any, ...] = (
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "a{1,100000}"},
    {"type": "string", "minLength": 10**9},
    {"type": "array", "minItems": 10**6, "items": {"type": "string"}},
    {"enum": [f"value {i}" for i in range(20_000)]},
    {"allOf": [{"anyOf": [{"type": "string"}, {"type": "integer"}]}] * 200},
    {"type": "object", "properties": {f"p{i}": {"$ref": "#"} for i in range(500)}, "required": ["p0"]},
    {"type": ["nothing"]},
    {"type": "object", "patternProperties": {"^(x+x+)+y": {}}},
    True,
)
PATTERNS = ("(a+)+$", "(" * 5000, "[", "a{99999}{99999}", "(a|aa)+$", "\\", "(?<=a)b", ".*" * 2000, "a{1,1000}{1,1000}")
GRAMMARS = (
    "start: start", "start: a\na: b\nb: a", "root ::= root root | root", "start: /(/", "x" * 50_000, "%ignore", "\x00",
    "start: " + " ".join(["("] * 3000), "start: a*\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3000)),
)  # fmt: skip


def request(path: str, raw: bytes, *, method: str = "POST", type: str = "application/json", **headers: Any) -> bytes:
    """An HTTP request as it should be, but for what it holds."""
    lines = {"Host": "x", "Content-Type": type, "Content-Length": len(raw), "Connection": "close", **headers}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in lines.items())
    return head.encode("latin-1") + b"\r\n" + raw


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def somewhere(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(sorted(ROUTES))
    return path, dict(ROUTES[path])


def whole(kind: str, path: str, raw: bytes, **more: Any) -> Attack:
    return Attack(kind, (request(path, raw, **more),), path=path)


def bad_json(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    raw = encoded(body)
    cut = rng.randrange(len(raw))
    broken = (raw[:cut], raw + b"}", raw.replace(b":", b"=", 1), b"", b"null", b"[" + raw + b"]", b'"x"', raw * 2)
    return whole("bad json", path, rng.choice(broken))


def deep(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    depth = rng.choice((50, 1000, 100_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    nest = opened * depth + (b"1" if opened != b"[" else b"") + (closed * depth if rng.random() < 0.7 else b"")
    name = rng.choice(("prompt", "messages", "guided_json", "unknown", "metadata", "logit_bias"))
    return whole("deep nesting", path, encoded(body)[:-1] + b', "' + name.encode() + b'": ' + nest + b"}")


def wrong_types(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    return whole("wrong types", path, encoded(body))


def no_numbers(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    raw = encoded(body)[:-1] + b', "temperature": ' + rng.choice((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x1"))
    return whole("no numbers", path, raw + b"}")


def no_text(rng: random.Random) -> Attack:
    path, _ = somewhere(rng)
    text = rng.choice((b"\xff\xfe", b"\xc3(", b"\\ud800", b"\\u0000", b"\xed\xa0\x80", rng.randbytes(50)))
    return whole("no text", path, b'{"prompt": "' + text + b'", "input": "' + text + b'", "max_tokens": 2}')


def huge(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    name = rng.choice(("prompt", "input", "model", "user", "stop", "request_id", "cache_salt", "guided_regex", "query"))
    body[name] = rng.choice(("x", "é", "\n", "<|im_end|>")) * rng.choice((10_000, 300_000))
    return whole("huge strings", path, encoded(body))


def ranges(rng: random.Random) -> Attack:
    path = rng.choice(("/v1/completions", "/v1/chat/completions"))
    body = dict(ROUTES[path])
    names = ("n", "logprobs", "top_logprobs", "max_tokens", "min_tokens", "prompt_logprobs", "top_k", "seed",
             "priority", "dry_penalty_last_n", "no_repeat_ngram_size", "timeout", "temperature")  # fmt: skip
    name = rng.choice(names)
    body[name] = rng.choice((2**31, 2**62, 10**20, -(2**31), 129, 1e300, 0, -1))
    if rng.random() < 0.3 and name != "max_tokens":  # 128 whole contexts are work, and no attack
        body["n"] = 128
    return whole("ranges", path, encoded(body))


def tokens(rng: random.Random) -> Attack:
    ids = [rng.choice((-1, 2**31, 2**63, 10**9, 1, 2047, 2048)) for _ in range(rng.choice((1, 20, 5000)))]
    path = rng.choice(("/v1/completions", "/detokenize", "/v1/embeddings"))
    body = dict(ROUTES[path])
    name = rng.choice(("prompt", "tokens", "input", "stop_token_ids", "allowed_token_ids"))
    body[name] = ids if rng.random() < 0.7 else [ids, [], [1]]
    return whole("tokens", path, encoded(body))


def grammars(rng: random.Random) -> Attack:
    body = dict(ROUTES["/v1/completions"])
    kind = rng.randrange(4)
    if kind == 0:
        body["guided_json"] = rng.choice(SCHEMAS)
    elif kind == 1:
        body["guided_regex"] = rng.choice(PATTERNS)
    elif kind == 2:
        body["guided_grammar"] = rng.choice(GRAMMARS)
    else:
        nest: Any = {"type": "string"}
        for _ in range(rng.choice((10, 70, 400))):
            nest = {"type": "object", "properties": {"a": nest}, "required": ["a"]}
        body["guided_json"] = nest
    return whole("grammars", "/v1/completions", encoded(body))


def expressions(rng: random.Random) -> Attack:
    path = rng.choice(("/v1/completions", "/v1/chat/completions"))
    hard = (*PATTERNS, "(a?){40}a{40}b", "([a-z ]*[a-z]){20}!", "(?i)(\\w+\\s?)+#", "(?m)(.*\\n)*end$")
    many = [rng.choice(hard) for _ in range(rng.choice((1, 1, 2, 40)))]
    body = {**ROUTES[path], "max_tokens": 40, "stop_regex": many[0] if len(many) == 1 else many}
    return whole("expressions", path, encoded(body))


def templates(rng: random.Random) -> Attack:
    body = dict(ROUTES["/v1/chat/completions"])
    evil = rng.choice(("{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ messages }}"))
    body["messages"] = [{"role": rng.choice(("user", "system", "tool", "nobody")), "content": evil, "name": evil}]
    body["chat_template_kwargs"] = rng.choice(({"x": evil}, {"messages": []}, {"self": 1}, {"a b": 1}, {}))
    if rng.random() < 0.3:
        body["chat_template"] = evil
    if rng.random() < 0.3:
        body["tools"] = [{"type": "function", "function": {"name": evil, "parameters": rng.choice(SCHEMAS)}}]
    return whole("templates", "/v1/chat/completions", encoded(body))


def paths(rng: random.Random) -> Attack:
    path = rng.choice(
        ("/../../etc/passwd", "/v1/models/%00", "/v1/models/" + "a" * 5000, "/%ff%fe", "//", "/v1/responses/%2e%2e/x",
         "/debug/requests/" + "9" * 3000, "/page.js/../x", "/v1/completions/", "/docs%0d%0aX:1", "*", *UNBUILT)
    )  # fmt: skip
    method = rng.choice(("GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD", "TRACE", "PROPFIND"))
    return whole("paths", path, b"{}", method=method)


def kinds_of_content(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    type = rng.choice(("text/plain", "", "multipart/form-data", "application/x-www-form-urlencoded", "a" * 3000))
    encoding = rng.choice(("gzip", "br", "x", "identity"))
    return whole("content types", path, encoded(body), type=type, Content_Encoding=encoding, Accept="image/png")


def chunked(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
    raw = encoded(body)
    bodies = (
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(raw), raw),
        b"zz\r\n" + raw,
        b"ffffffffffffffff\r\n" + raw,
        b"-5\r\n" + raw,
        b"%x\r\n%s" % (len(raw) + 10, raw),
        b"10000\r\n" + b"x" * 65536 + b"\r\n",
    )
    chosen = rng.choice(bodies)
    return Attack("chunked", (head + chosen,), "half" if chosen is not bodies[0] else "read", path=path)


def too_large(rng: random.Random) -> Attack:
    path, _ = somewhere(rng)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {rng.choice((10**9, 2**63, 10**30))}\r\n\r\n"
    return Attack("too large", (head.encode() + b"x" * 1000,), path=path)


def lying_length(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    raw = encoded(body)
    told = rng.choice((len(raw) + 50, len(raw) - 2, 0, "x", -1, f"{len(raw)}, 3"))
    return Attack("lying length", (request(path, raw, Content_Length=told),), "half", path=path)


def heads(rng: random.Random) -> Attack:
    many = b"".join(b"x-%d: %s\r\n" % (i, b"y" * rng.choice((1, 500))) for i in range(rng.choice((100, 1000))))
    odd = (
        many,
        b"x" * 100_000 + b"\r\n",
        b"x: \x00\r\n",
        b"x : y\r\n",
        b": y\r\n",
        b"Authorization: Bearer " + b"k" * 9000,
    )
    return Attack("heads", (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + rng.choice(odd) + b"\r\n\r\n",), "half")


def garbage(rng: random.Random) -> Attack:
    return Attack(
        "garbage", (rng.choice((rng.randbytes(200), b"\x16\x03\x01" + rng.randbytes(100), b"\r\n" * 50)),), "half"
    )


def slow(rng: random.Random) -> Attack:
    path, body = somewhere(rng)
    raw = request(path, encoded(body))
    n = rng.randint(5, 20)
    step = max(1, len(raw) // n)
    pieces = tuple(raw[i : i + step] for i in range(0, len(raw), step))
    return Attack("slow", pieces[: rng.randint(1, len(pieces))], "leave", pause=0.05, path=path)


def halved(rng: random.Random) -> Attack:
    return Attack("half-closed", (request("/v1/completions", encoded(STREAM)),), "half", path="/v1/completions")


def gone(rng: random.Random) -> Attack:
    body = {**STREAM, "stream": rng.random() < 0.5, "n": rng.choice((1, 4))}
    return Attack("gone", (request("/v1/completions", encoded(body)),), "reset", path="/v1/completions")


def unread(rng: random.Random) -> Attack:
    body = {**STREAM, "logprobs": 20, "max_tokens": 400}
    return Attack("unread", (request("/v1/completions", encoded(body)),), "unread", path="/v1/completions")


def pipelined(rng: random.Random) -> Attack:
    raw = b"".join(
        request("/v1/models", b"", method="GET", Connection="keep-alive") for _ in range(rng.choice((3, 40)))
    )
    return Attack("pipelined", (raw,), "leave")


KINDS: tuple[Callable[[random.Random], Attack], ...] = (
    bad_json, deep, wrong_types, no_numbers, no_text, huge, ranges, tokens, grammars, expressions, templates,
    paths, kinds_of_content, chunked, too_large, lying_length, heads, garbage, slow, halved, gone, unread, pipelined,
)  # fmt: skip


def attacks(seed: int, count: int) -> list[Attack]:
    """The same ones for the same seed; every kind in turn, then at random."""
    rng = random.Random(seed)
    return [(KINDS[i] if i < len(KINDS) else rng.choice(KINDS))(rng) for i in range(count)]


# --- sending ----------------------------------------------------------------------------------------------------------


async def strike(url: str, attack: Attack, tally: Tally) -> None:
    """One attack on a connection of its own."""
    at, began, status = urlsplit(url), time.perf_counter(), 0
    first = b""
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    try:
        with suppress(ConnectionError):
            for piece in attack.pieces:
                writer.write(piece)
                await writer.drain()
                if attack.pause:
                    await asyncio.sleep(attack.pause)
            if attack.ending == "half" and writer.can_write_eof():
                writer.write_eof()
            if attack.ending in ("read", "half"):
                async with asyncio.timeout(LIMIT):
                    first = await reader.read(1 << 16)
                    while attack.ending == "half" and await reader.read(1 << 16):
                        pass
                parts = first.split(None, 2)
                status = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
                if (took := time.perf_counter() - began) > tally.slowest:
                    tally.slowest, tally.slowest_kind = took, attack.kind
            elif attack.ending == "unread":
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                await asyncio.sleep(LEAVE)
            elif attack.ending == "leave":
                await asyncio.sleep(LEAVE * 0.2)
            else:
                await asyncio.sleep(0.02)
    except TimeoutError:
        tally.wrong[f"{attack.kind}: no answer within {LIMIT:g} s"] += 1
    finally:
        writer.transport.abort()
    tally.statuses[f"{attack.kind} {status}"] += 1
    if status >= 500 and not (status == 501 and attack.path in UNBUILT):
        tally.wrong[f"{attack.kind}: {status}"] += 1
        if len(tally.examples) < 20:
            tally.examples.append((repr(attack.pieces[0][:2000]), repr(first[:500])))


async def assault(url: str, plan: Sequence[Attack], rate: float, tally: Tally) -> None:
    """All attacks, `rate` of them begun a second, whatever becomes of those before."""
    begun, open_now = time.perf_counter(), asyncio.Semaphore(256)

    async def one(attack: Attack) -> None:
        try:
            await strike(url, attack, tally)
        except OSError as e:
            tally.wrong[f"cannot connect: {type(e).__name__}"] += 1
        finally:
            open_now.release()

    async with asyncio.TaskGroup() as group:
        for i, attack in enumerate(plan):
            await asyncio.sleep(max(0.0, begun + i / rate - time.perf_counter()))
            await open_now.acquire()
            group.create_task(one(attack))


# --- everybody else ---------------------------------------------------------------------------------------------------


@dataclass
class Honest:
    """What honest clients saw, while nobody attacked and while somebody did."""

    quiet: list[float] = field(default_factory=list)
    """Seconds between two tokens."""
    under_attack: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    times: list[list[float]] = field(default_factory=list)
    """When the tokens of each answer came."""
    over: bool = False

    def sort(self, began: float, ended: float) -> None:
        """Tells gaps of the time of the attacks from the others; one that lies across is neither."""
        for times in self.times:
            for a, b in itertools.pairwise(times):
                if b <= began or a >= ended:
                    self.quiet.append(b - a)
                elif began <= a and b <= ended:
                    self.under_attack.append(b - a)


async def honest(url: str, number: int, new: int, seen: Honest) -> None:
    """Repeats one greedy request until it is over; its text never changes."""
    body = client.body_of([(31 * number + 7 * i) % 1000 + 5 for i in range(20)], new)
    reference = None
    while not seen.over:
        answer = client.read(await client.exchange(url, body))
        if answer.error is not None:
            seen.errors[answer.error[:200]] += 1
            continue
        reference = answer.tokens if reference is None else reference
        if answer.tokens != reference:
            seen.errors["other tokens than before"] += 1
        seen.answers += 1
        seen.times.append(answer.times)


async def campaign(url: str, plan: Sequence[Attack], rate: float, clients: int, rest: float, new: int):
    """(what honest clients saw, what attackers got): a rest, the attacks, a rest."""
    seen, tally = Honest(), Tally()
    people = [asyncio.ensure_future(honest(url, i, new, seen)) for i in range(clients)]
    await asyncio.sleep(rest)
    began = time.perf_counter()
    await assault(url, plan, rate, tally)
    ended = time.perf_counter()
    await asyncio.sleep(rest)
    seen.over = True
    await asyncio.gather(*people)
    seen.sort(began, ended)
    return seen, tally, ended - began


# --- many open streams ------------------------------------------------------------------------------------------------


async def hold(url: str, count: int, seconds: float, new: int) -> dict[str, Any]:
    """Opens so many streams at once, reads all of them for some seconds, and leaves."""
    errors: Counter[str] = Counter()
    opened = 0
    everyone, over = asyncio.Event(), asyncio.Event()
    at = urlsplit(url)

    async def one(number: int) -> None:
        nonlocal opened
        body = client.body_of([(31 * number + 7 * i) % 1000 + 5 for i in range(20)], new)
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        try:
            writer.write(request("/v1/completions", encoded(body)))
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n")[0]:
                errors[head.split(b"\r\n")[0].decode()] += 1
            opened += 1
            if opened == count:
                everyone.set()
            while not over.is_set() and await reader.read(1 << 16):
                pass
        except OSError as e:
            errors[type(e).__name__] += 1
        finally:
            writer.transport.abort()

    tasks = [asyncio.ensure_future(one(i)) for i in range(count)]
    with suppress(TimeoutError):
        await asyncio.wait_for(everyone.wait(), 60 + count / 10)
    at_once = opened
    await asyncio.sleep(seconds)
    over.set()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"wanted": count, "open_at_once": at_once, "seconds": seconds, "errors": dict(errors)}


# --- the verdict ------------------------------------------------------------------------------------------------------


def pace(seen: Honest) -> dict[str, float]:
    """Seconds between tokens in quiet and under attack, and how many times longer."""
    out: dict[str, float] = {}
    for q in (50, 90, 99):
        if seen.quiet and seen.under_attack:
            a, b = percentile(seen.quiet, q), percentile(seen.under_attack, q)
            out |= {f"quiet_p{q}": a, f"attacked_p{q}": b, f"times_p{q}": b / a}
    return out


def drained(url: str, limit: float = 30.0) -> tuple[list[str], float]:
    """(what is still held, seconds waited). Requests that ended with an error are not counted as such here: grammars
    that nothing satisfies end like that, and what is the server's own fault was a 500."""
    began = time.monotonic()
    while True:
        found = soak.leaks(server.metrics(server.get(url, "/metrics", 30.0)[1]))
        held = [what for what in found if "ended with an error" not in what]
        waited = time.monotonic() - began
        if not held or waited > limit:
            return held, waited
        time.sleep(0.1)


def process_facts(pid: int) -> dict[str, int]:
    import psutil

    p = psutil.Process(pid)
    return {"descriptors": p.num_fds(), "threads": p.num_threads()}


def verdict(
    tally: Tally,
    seen: Honest,
    left: Sequence[str],
    before: dict[str, int] | None,
    after: dict[str, int] | None,
    held: dict[str, Any] | None,
    flat: dict[str, float] | None,
    *,
    tolerance: float,
    slower: float,
    exit_code: int | None = 0,
) -> list[str]:
    """Everything that went wrong; empty means passed."""
    wrong = [f"{n} x {what}" for what, n in tally.wrong.most_common()]
    wrong += [f"honest client: {n} x {what}" for what, n in seen.errors.most_common()]
    wrong += [f"left behind: {what}" for what in left]
    times = pace(seen)
    if not times:
        wrong.append("honest clients saw too little to compare")
    wrong += [
        f"tokens came {times[f'times_p{q}']:.2f} times as slowly (p{q})"
        for q in (50, 99)
        if times and times[f"times_p{q}"] >= slower
    ]
    if before is not None and after is not None:
        wrong += [f"{k}: {before[k]} before, {after[k]} after" for k in before if after[k] > before[k] + 8]
    if held is not None:
        wrong += [f"open streams: {n} x {what}" for what, n in held["errors"].items()]
        if held["open_at_once"] != held["wanted"]:
            wrong.append(f"only {held['open_at_once']} of {held['wanted']} streams were open at once")
        if flat is None:
            wrong.append("too few samples of memory")
        elif flat["growth"] > tolerance:
            wrong.append(f"memory grew by {100 * flat['growth']:.1f} % while streams were held")
    if exit_code:
        wrong.append(f"the server ended with {exit_code}")
    return wrong


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from fnengine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=200.0, help="attacks begun a second")
    parser.add_argument("--clients", type=int, default=4, help="honest ones")
    parser.add_argument("--rest", type=float, default=15.0, help="seconds without attacks, before and after")
    parser.add_argument("--new", type=int, default=64, help="tokens of an honest request")
    parser.add_argument("--hold", type=int, default=1000, help="streams held at once; 0 leaves that out")
    parser.add_argument("--hold-seconds", type=float, default=60.0)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=environment.threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.02, help="growth of memory that is still flat")
    parser.add_argument("--slower", type=float, default=2.0, help="times as slow as which tokens may not come")
    parser.add_argument("--server-args", default="", help="more flags for `fnengine serve`, in one string")
    parser.add_argument("--url", default=None, help="a running server on 127.0.0.1")
    parser.add_argument("--pid", type=int, default=None, help="its process")
    parser.add_argument("--json", default=None)
    args = parser.parse_args(argv)
    if args.url is not None and urlsplit(args.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error("only a server on this machine is attacked: give a --url on 127.0.0.1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    folder, load_format = shape.prepare("demo")
    _, vocab, longest = shape.measure(folder, "float32")
    longest = min(args.max_model_len, longest)
    facts, others, exit_code = machine.facts(args.threads), machine.Others(), 0
    with ExitStack() as stack:
        own = None
        if args.url is None:
            command = server.command(folder, load_format, "auto", args.threads, longest, args.server_args.split())
            own = stack.enter_context(server.Server(command))
        url, pid = (args.url, args.pid) if own is None else (own.url, own.pid)
        filled = asyncio.run(soak.fill(url, vocab, longest, args.seed))
        before = None if pid is None else process_facts(pid)
        plan = attacks(args.seed, args.requests)
        seen, tally, seconds = asyncio.run(campaign(url, plan, args.rate, args.clients, args.rest, args.new))
        held, flat = None, None
        if args.hold:
            memory = None if pid is None else soak.Memory(pid)
            held = asyncio.run(hold(url, args.hold, args.hold_seconds, longest - 64))
            flat = None if memory is None else soak.flatness(memory.stop())
        if own is not None and not own.alive:
            left, waited = [f"the server has ended: {own.said()[-500:]}"], 0.0
        else:
            left, waited = drained(url)
        time.sleep(1.0)  # keep-alive connections of ours
        after = None if pid is None or (own is not None and not own.alive) else process_facts(pid)
    if own is not None:
        exit_code = own.exit_code
    wrong = verdict(
        tally, seen, left, before, after, held, flat, tolerance=args.tolerance, slower=args.slower, exit_code=exit_code
    )
    times = pace(seen)
    by_status: Counter[str] = Counter()
    for name, n in tally.statuses.items():
        by_status[name.rsplit(" ", 1)[1]] += n
    print(f"hostile: {len(plan)} attacks in {seconds:.1f} s, seed {args.seed}, {url}; pool filled with {filled} tokens")
    print(f"machine  {facts['cpu']}, {args.threads} threads, {facts['date']}, commit {facts['commit']}")
    print(f"others   took {100 * others.share():.0f} % of the machine's processor time meanwhile")
    print("answers  " + ", ".join(f"{n} x {s if s != '0' else 'none'}" for s, n in sorted(by_status.items())))
    print(f"slowest  {tally.slowest:.2f} s ({tally.slowest_kind})")
    if times:
        told = ", ".join(
            f"p{q} {1e3 * times[f'quiet_p{q}']:.1f} -> {1e3 * times[f'attacked_p{q}']:.1f}" for q in (50, 90, 99)
        )
        print(f"others   {seen.answers} answers; ms between tokens: {told}")
    print(f"process  {before} before, {after} after, drained in {waited:.1f} s")
    if held is not None:
        print(f"held     {held}; memory {flat}")
    for sent, came in tally.examples:
        print(f"WRONG    {sent}\n      -> {came}")
    for what in wrong:
        print(f"WRONG    {what}")
    print("passed" if not wrong else "FAILED")
    out = {
        "facts": facts, "arguments": vars(args), "attacks": dict(sorted(tally.statuses.items())), "seconds": seconds,
        "slowest": tally.slowest, "slowest_kind": tally.slowest_kind,
        "examples": tally.examples, "pace": times, "honest_answers": seen.answers, "before": before, "after": after,
        "held": held, "memory": flat, "others_share": others.share(), "wrong": wrong,
    }  # fmt: skip
    report.write(args.json, out)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
