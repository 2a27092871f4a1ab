"""Routes for those who run a server: what it does now, what became of a request, whether it moves, a profile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fnengine.errors import FnError, NotFound
from fnengine.host.output import Finished
from fnengine.host.step import BLOCK
from fnengine.serve.answer import dump
from fnengine.serve.engine_port import EnginePort
from fnengine.serve.recent import Recent, timing

Endpoint = Callable[[Request], Awaitable[Response]]

EVERY = 0.25
"""Seconds between two surveys at least: whoever asks in between gets the one before."""
SHARE = 0.01
"""Of the event loop's time, what surveys may take at most: it is the time of steps, too."""
STUCK = 60.0
"""Seconds without a step, while there is work, from which on the engine counts as stuck."""
PROFILE_SECONDS = 60.0
"""A profile that nobody stops ends by itself: it grows with every operator."""


class Conflict(FnError):
    """What is asked for does not fit what goes on."""

    code, type = 409, "ConflictError"


class Watch:
    """What `/debug/state` shows: taken from the engine now and then, told as often as anybody asks.

    A survey runs between steps. So it is made at most every `EVERY` seconds, and more seldom where it takes long: not
    more than a `SHARE` of the time.
    """

    def __init__(self, take: Callable[[], dict[str, Any]], clock: Callable[[], float] = time.perf_counter):
        self._take, self._clock = take, clock
        self._text, self._next = "", float("-inf")
        self.taken = 0
        """Surveys made, ever."""

    def read(self) -> str:
        """The state as JSON, at most `EVERY` seconds old (older where making it is dear)."""
        begun = self._clock()
        if begun < self._next:
            return self._text
        self.taken += 1
        text = dump(self._take())
        spent = self._clock() - begun
        self._next = begun + max(EVERY, spent / SHARE)
        self._text = f'{text[:-1]},"survey":{{"seconds":{spent:.6f},"every":{self._next - begun:.3f}}}}}'
        return self._text


def state(engine: EnginePort, recent: Recent, stuck: float = STUCK) -> dict[str, Any]:
    """Gauges, requests, the pool and the last steps of an engine. Times are seconds ago."""
    now, gauges = engine.clock(), engine.gauges()
    survey = engine.survey()
    rows = []
    for row in survey.rows:
        told = asdict(row)
        for name in ("arrival", "scheduled", "first_token"):
            at = told.pop(name)
            told[f"since_{name}"] = None if at is None else round(now - at, 4)
        rows.append(told)
    return {
        "model": engine.name,
        "tasks": list(engine.tasks),
        "gauges": {**asdict(gauges), "waiting_by_reason": dict(gauges.waiting_by_reason)},
        "requests": rows,
        "unlisted": survey.unlisted,
        "pool": {
            "block": BLOCK,
            "blocks": gauges.blocks_total,
            "owners": {"free": -1, "cached": -2, "shared": -3, "in flight": -4},
            "lengths": survey.pool,
        },
        "steps": [
            {"ago": round(now - at, 4), "seconds": round(s, 6), "tokens": t, "rows": r, "prompt_tokens": p}
            for at, s, t, r, p in recent.steps
        ],
        "standing": recent.standing(),
        "stuck_after": stuck,
        "graphs": engine.graphs(),
    }


def timings(ids: Sequence[str], ends: Mapping[str, Finished]) -> Any:
    """`timing` of an answer: where its seconds went; a list for several prompts, in their order."""
    told = [None if (end := ends.get(id)) is None else asdict(timing(end)) for id in ids]
    return told[0] if len(told) == 1 else told


# --- profiles ---------------------------------------------------------------------------------------------------------


class Profile:
    """torch's profiler over the thread that runs the steps, one at a time; its traces go to a folder."""

    def __init__(self, folder: Path | None, log: Callable[[str], None]):
        self._folder, self._log = folder, log
        self._running: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._number = 0

    def start(self) -> None:
        """Raises NotFound where profiling is off, Conflict when one runs."""
        if self._folder is None:
            raise NotFound("profiling is off", remedy="start the server with --profile-dir DIR")
        if self._running is not None:
            raise Conflict("a profile is being taken already", remedy="POST /stop_profile first")
        import torch

        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        running = torch.profiler.profile(activities=kinds)
        running.start()
        self._running = running
        self._timer = asyncio.get_running_loop().call_later(PROFILE_SECONDS, self._forgotten)

    def _forgotten(self) -> None:
        self._log(f"a profile was not stopped within {PROFILE_SECONDS:.0f} s, so it ends now")
        self._task = asyncio.ensure_future(self.stop())

    async def stop(self) -> Path:
        """The file with the trace (chrome://tracing, Perfetto). Raises as `start` does, and Conflict when none runs."""
        if self._folder is None:
            raise NotFound("profiling is off", remedy="start the server with --profile-dir DIR")
        running, self._running = self._running, None
        if running is None:
            raise Conflict("no profile is being taken", remedy="POST /start_profile first")
        if self._timer is not None:
            self._timer.cancel()
        running.stop()  # on the thread that it was started on: the profiler's state belongs to it
        self._number += 1
        path = self._folder / time.strftime(f"fnengine-%Y%m%d-%H%M%S-{self._number}.json.gz")
        await asyncio.to_thread(running.export_chrome_trace, str(path))
        return path


# --- routes -----------------------------------------------------------------------------------------------------------


def routes(
    engine: EnginePort, recent: Recent, profile: Profile, stuck: float = STUCK
) -> tuple[tuple[str, str, Endpoint], ...]:
    """(path, methods, endpoint) of each."""
    watch = Watch(lambda: state(engine, recent, stuck))

    async def debug_state(request: Request) -> Response:
        return Response(watch.read(), media_type="application/json", headers={"cache-control": "no-store"})

    async def debug_requests(request: Request) -> Response:
        ended = [{"id": id, "finish": end.finish} for id, (_, end) in reversed(recent.ended.items())]
        return _json({"open": list(recent.open), "ended": ended})

    async def debug_request(request: Request) -> Response:
        id = request.path_params["id"]
        told = recent.timeline(id)
        if told is None:
            raise NotFound(
                f"no request {id[:200]!r} is open or among the last that ended", remedy="see /debug/requests"
            )
        return _json(told)

    async def health_decode(request: Request) -> Response:
        why, standing = engine.healthy(), recent.standing()  # for probes without a key: how much runs is not told
        status = "stopped" if why is not None else "idle" if standing is None else "busy"
        if standing is not None and standing > stuck:
            status = "stuck"
        return _json(
            {"status": status, "standing": standing, "limit": stuck}, 200 if status in ("idle", "busy") else 503
        )

    async def start_profile(request: Request) -> Response:
        profile.start()
        return _json({"profiling": True, "most_seconds": PROFILE_SECONDS})

    async def stop_profile(request: Request) -> Response:
        return _json({"profiling": False, "file": str(await profile.stop())})

    return (
        ("/debug/state", "GET", debug_state),
        ("/debug/requests", "GET", debug_requests),
        ("/debug/requests/{id:path}", "GET", debug_request),
        ("/health/decode", "GET", health_decode),
        ("/start_profile", "POST", start_profile),
        ("/stop_profile", "POST", stop_profile),
    )


def _json(value: Any, status: int = 200) -> Response:
    return Response(dump(value), status_code=status, media_type="application/json")
