"""`fnengine run-batch`: a file of requests, as OpenAI's batches have them, answered by an engine in this process.

Every line goes through the application that `fnengine serve` serves, without a socket: fields, errors and answers are
those of the routes, and many lines are in the engine at once. A line of the output is written whole, in one write, when
its request has been answered; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnengine.config import resolve
from fnengine.errors import ConfigError, DeviceFault

if TYPE_CHECKING:
    from fnengine.serve.engine_port import EnginePort

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
URLS += ("/v1/score", "/v1/rerank", "/v1/classify")
TRIES, PAUSE = 8, 0.5
"""How often a line is tried that finds no room (429, 503), and seconds before the second time, doubled each time."""


@dataclass(frozen=True)
class Line:
    """One request of the input."""

    number: int
    id: str
    asked: dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Answers what the output does not hold yet, then 0, also where requests were refused."""
    source, target = Path(args.input), Path(args.output)
    todo = survey(source)
    done = answered(target)
    options = resolve(args)
    from fnengine.cli.start import build_server, say

    left = len(todo - done)
    if not left:
        say(f"{target} holds all {len(todo)} answers")
        return 0
    engine = build_server(options)
    most = args.max_concurrency or 2 * engine.most
    began = time.perf_counter()
    room = options.engine.answer_bytes
    refused = asyncio.run(answer(engine, source, target, done, most=most, answer_bytes=room))  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - began
    say(f"{left} requests answered in {seconds:.1f} s, {refused} of them with errors; {len(todo) - left} were there")
    return 0


# --- files ------------------------------------------------------------------------------------------------------------


def lines(source: Path) -> Iterator[Line]:
    """The requests of a file; empty lines are none.

    Raises:
        ConfigError: it cannot be read, or a line cannot be answered under an id; the message names the line.
    """
    try:
        file = open(source, encoding="utf-8")  # noqa: SIM115
    except OSError as e:
        raise ConfigError(f"cannot read {source}: {e.strerror}", where="-i") from None
    with file:
        try:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                where = f"{source}, line {number}"
                try:
                    asked = json.loads(text)
                except (ValueError, RecursionError) as e:
                    raise ConfigError(f"not JSON: {e}", where=where) from None
                id = asked.get("custom_id") if isinstance(asked, dict) else None
                if not isinstance(id, str) or not id:
                    raise ConfigError("has no custom_id", where=where, remedy='give it one, "custom_id": "..."')
                yield Line(number, id, asked)
        except UnicodeDecodeError as e:
            raise ConfigError(f"not UTF-8: {e}", where=str(source)) from None


def survey(source: Path) -> set[str]:
    """Ids of all requests of a file. Raises `ConfigError` where `lines` does, and for an id that comes twice."""
    found: set[str] = set()
    for line in lines(source):
        if line.id in found:
            raise ConfigError(f"custom_id {line.id[:80]!r} comes twice", where=f"{source}, line {line.number}")
        found.add(line.id)
    return found


def answered(target: Path) -> set[str]:
    """Ids that an output holds already. A last line that was cut off in the middle is taken away.

    Raises:
        ConfigError: it cannot be read or written, or is no output of a batch.
    """
    found: set[str] = set()
    try:
        with open(target, "ab+") as file:
            file.seek(0)
            whole = 0
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    file.truncate(whole)
                    break
                whole += len(raw)
                try:
                    found.add(json.loads(raw)["custom_id"])
                except (ValueError, KeyError, TypeError):
                    raise ConfigError(
                        "is no line of a batch's output", where=f"{target}, line {number}", remedy="name another file"
                    ) from None
    except OSError as e:
        raise ConfigError(f"cannot write {target}: {e.strerror}", where="-o") from None
    return found


# --- answers ----------------------------------------------------------------------------------------------------------


async def answer(
    engine: EnginePort, source: Path, target: Path, done: set[str], *, most: int, **app_options: Any
) -> int:
    """Answers every request that is not done, at most so many at once; how many were answered with an error.

    Args:
        app_options: go to `make_app`.

    Raises:
        DeviceFault: the engine can serve no more; what was answered is in the file.
        ConfigError: the output cannot be written.
    """
    from tqdm import tqdm

    from fnengine.serve.app import make_app

    app, refused = make_app(engine, **app_options), 0
    waiting = (line for line in lines(source) if line.id not in done)
    file = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    total = len(survey(source) - done)

    async def work(bar: Any) -> None:
        nonlocal refused
        for line in waiting:  # each worker takes the next one: no more lines are in memory than are worked on
            told = await answer_line(app, engine, line)
            refused += told["error"] is not None
            write(file, target, json.dumps(told, ensure_ascii=False).encode() + b"\n")
            bar.update()

    try:
        async with app.router.lifespan_context(app):
            with tqdm(total=total, unit="request", disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(most, total)):
                        group.create_task(work(bar))
    except* (DeviceFault, ConfigError) as errors:
        raise errors.exceptions[0] from None
    finally:
        os.close(file)
    return refused


def write(file: int, target: Path, line: bytes) -> None:
    """Adds a line, in one write."""
    try:
        written = os.write(file, line)
    except OSError as e:
        raise ConfigError(f"cannot write {target}: {e.strerror}", where="-o") from None
    if written != len(line):  # what is there of it is taken away by the next run
        raise ConfigError(f"cannot write {target}: no space left", where="-o")


async def answer_line(app: Any, engine: EnginePort, line: Line) -> dict[str, Any]:
    """What the output says of one request."""
    told: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.id, "response": None}
    if (wrong := refusal(line.asked)) is not None:
        param, message = wrong
        error = {"message": f"{param}: {message}", "type": "BadRequestError", "param": param, "code": 400}
        return told | {"error": error}
    body = json.dumps(line.asked["body"]).encode()
    for attempt in range(TRIES):
        status, id, value = await post(app, line.asked["url"], body)
        if status >= 500 and (why := engine.healthy()) is not None:
            raise DeviceFault(f"the engine cannot serve: {why}", remedy="the next run goes on where this one stopped")
        if status not in (429, 503):
            break
        await asyncio.sleep(PAUSE * 2**attempt)
    return told | {
        "response": {"status_code": status, "request_id": id, "body": value},
        "error": value["error"] if status >= 400 else None,
    }


def refusal(asked: dict[str, Any]) -> tuple[str, str] | None:
    """(field, why) of a line that no route is asked; None of a good one."""
    if asked.get("method", "POST") != "POST":
        return "method", "must be POST"
    if asked.get("url") not in URLS:
        return "url", f"must be one of {', '.join(URLS)}, got {str(asked.get('url'))[:80]!r}"
    if not isinstance(asked.get("body"), dict):
        return "body", "must be an object"
    return ("body.stream", "a batch is not streamed") if asked["body"].get("stream") else None


async def post(app: Any, path: str, body: bytes) -> tuple[int, str, Any]:
    """(status, request id, JSON) of a request to an application in this process."""
    parts: list[bytes] = []
    status, id, asked = 500, "", iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        found = next(asked, None)
        return found if found is not None else await asyncio.Event().wait()  # this client never goes away

    async def send(message: Any) -> None:
        nonlocal status, id
        if message["type"] == "http.response.start":
            status = message["status"]
            id = dict(message["headers"]).get(b"x-request-id", b"").decode("latin-1")
        else:
            parts.append(message.get("body", b""))

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "server": None}
    scope |= {"headers": [(b"content-type", b"application/json")], "client": None}
    await app(scope, receive, send)
    return status, id, json.loads(b"".join(parts))
