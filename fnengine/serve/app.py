"""The HTTP application over one engine: routes, and what is the same for all of them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from fnengine import __version__
from fnengine.errors import FnError, NotFound, RequestError, Unauthorized
from fnengine.serve import described, embeddings, messages, operations, page, protocol, responses, translate
from fnengine.serve import metrics as measuring
from fnengine.serve.access import line
from fnengine.serve.answer import Answer
from fnengine.serve.engine_port import EnginePort
from fnengine.serve.flight import Flight, Thinning, open_flight
from fnengine.serve.parsing.choose import choose
from fnengine.serve.recent import Recent
from fnengine.serve.replies import (
    Aborted,
    Blame,
    BodyTooLarge,
    Fault,
    NotImplementedHere,
    Room,
    TooLate,
    Unavailable,
    as_json,
    error,
    events,
    header,
    problem,
    whole,
)
from fnengine.serve.routes import Core, Route, check_task, unbuilt
from fnengine.serve.sse import SILENCE, EventStream
from fnengine.settings import Settings

OPEN = frozenset({"/health", "/health/decode", "/ping", "/ready", "/version"}) | page.OPEN
"""Routes that need no key."""
LARGE = 1 << 16
"""Bytes of a body from which on parsing and tokenizing leave the event loop, which other streams need."""
PROMPT_TOKEN = 48
"""Bytes of a token of a prompt while its request is open: as an object, in the answer's shape, in the engine."""
_KIND = re.compile(r"^(chatcmpl-|cmpl-|msg_|resp_|embd-|pool-|score-|rerank-|classify-)")
"""What ids of answers begin with, before the request's own."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def complain(text: str) -> None:
    """Where faults go when nobody says otherwise."""
    print(text, file=sys.stderr, flush=True)


def make_app(
    engine: EnginePort,
    *,
    api_keys: Sequence[str] = (),
    strict: bool = False,
    metrics: Sequence[str] = ("fnengine",),
    metrics_open: bool = False,
    allowed_origins: Sequence[str] = (),
    root_path: str = "",
    response_role: str = "assistant",
    max_body: int = 64 << 20,
    answer_bytes: int = Settings.answer_bytes,
    constants: Mapping[str, tuple[float, str]] | None = None,
    shutdown_timeout: float = 0.0,
    stream_interval: int = 1,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    enable_auto_tool_choice: bool = True,
    tokens_as_ids: bool = False,
    always_usage: bool = False,
    silence: float = SILENCE,
    request_timeout: float = 0.0,
    profile_dir: str | None = None,
    stuck: float = operations.STUCK,
    access: Callable[[str], None] | None = None,
    version: str = __version__,
    log: Callable[[str], None] = complain,
    wall: Callable[[], float] = time.time,
) -> FastAPI:
    """An application that serves one engine, which it starts and stops with itself.

    Args:
        api_keys: any of them opens all routes but `OPEN`; none means no keys are asked for.
        strict: unknown fields are a 400 instead of a name in the header `x-fnengine-ignored`.
        metrics: prefixes under which every metric appears; ("fnengine", "vllm") keeps vLLM's dashboards working.
        metrics_open: /metrics needs no key.
        allowed_origins: for browsers (CORS).
        max_body: bytes.
        answer_bytes: most that an answer may take before it is sent whole; twice this for all together, and once more
            for what clients of streams have not read.
        constants: name -> (value, help) of gauges that do not change.
        shutdown_timeout: seconds the engine may take to finish what runs.
        stream_interval: tokens a chunk holds at least, the first and last of a choice excepted.
        tool_call_parser, reasoning_parser: names as `serve.parsing.choose` has them.
        enable_auto_tool_choice: whether models may choose tools by themselves.
        tokens_as_ids: name tokens `token_id:<n>` where a request does not say.
        always_usage: every stream ends with usage.
        silence: seconds without an event before a keep-alive comment.
        request_timeout: seconds from here to the end of an answer whose request names none; 0 is no limit.
        profile_dir: where /stop_profile leaves its traces; None turns profiling off.
        stuck: seconds without a step, while there is work, from which on /health/decode is a 503.
        access: takes a line of JSON for each request that was answered.
        log: takes a text about a fault; users never see stack traces.
        wall: Unix seconds, for `created`.

    Raises:
        ConfigError: there is no parser of such a name.
    """
    parsers = choose(engine.tokenizer.templates, tool_call_parser, reasoning_parser)
    flights: dict[str, Flight] = {}
    meter = measuring.Meter(engine, prefixes=tuple(metrics), constants=constants)
    recent = Recent(engine, wall)
    profile = operations.Profile(None if profile_dir is None else Path(profile_dir), log)
    room = Room(answer_bytes, 2 * answer_bytes)
    born = int(wall())

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        try:
            await engine.start()
        except Exception as e:
            app.state.fault = e  # the server only says that starting failed; `run.serve` says why
            raise
        try:
            yield
        finally:
            cut(app, "the server is shutting down")
            await engine.stop(shutdown_timeout)

    app = FastAPI(title="fnengine", version=version, root_path=root_path, lifespan=lifespan, redirect_slashes=False)
    app.state.flights = flights
    app.state.fault = None

    # --- one request ----------------------------------------------------------------------------------------------

    async def read(request: Request, model: type[protocol.M]) -> tuple[protocol.M, tuple[str, ...]]:
        size, parts = 0, []
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and len(announced) < 20 and int(announced) > max_body:
            size = int(announced)
        else:
            async for part in request.stream():
                size += len(part)
                if size > max_body:
                    break
                parts.append(part)
        if size > max_body:
            raise BodyTooLarge(f"the body is larger than {max_body} bytes", where="body")
        raw = b"".join(parts)
        request.scope["fnengine.large"] = size > LARGE

        def work():
            return protocol.parse(model, protocol.read_json(raw), strict=strict)

        return await asyncio.to_thread(work) if size > LARGE else work()

    def defaults(body: Any, shape: translate.Shape) -> translate.Shape:
        """What requests that do not say get here."""
        if tokens_as_ids and getattr(body, "return_tokens_as_token_ids", None) is None:
            shape = replace(shape, as_ids=True)
        return replace(shape, include_usage=True) if always_usage and shape.stream else shape

    def named(body: Any) -> str:
        name = translate.choose_model(engine, body.model)
        if name is None:
            raise NotFound(
                f"no model is called {body.model[:200]!r}",
                param="model",
                remedy=f"served here: {', '.join(engine.names)}",
            )
        return name

    async def generate(
        request: Request, model: type[Any], make: Callable[..., translate.Job], task: str = "generate"
    ) -> Response:
        body, ignored = await read(request, model)
        name = named(body)
        check_task(engine, task)
        why = engine.healthy()
        if why is not None:
            raise Unavailable(f"the engine cannot serve: {why}")
        flight = open_flight(flights, body.request_id or request.scope.get("fnengine.id"))
        deadline = None
        if limit := body.timeout or request_timeout:
            own = "timeout" if body.timeout else None
            whose = "`timeout`" if own else "the server's --request-timeout"
            late = TooLate(f"no end within the {limit:g} seconds of {whose}", where=own, param=own)
            deadline = asyncio.get_running_loop().call_later(limit, flight.close, late)

        def over():
            if deadline is not None:
                deadline.cancel()
            flight.close()

        try:

            def work():
                return make(body, engine, id=flight.id, created=int(wall()), model=name)

            job = await asyncio.to_thread(work) if request.scope["fnengine.large"] or _large(body) else work()
            job = replace(job, shape=defaults(body, job.shape))
            prompts = room.take(0, PROMPT_TOKEN * translate.tokens_held(job))
        except BaseException:
            over()
            raise

        def close():
            nonlocal prompts
            over()
            room.held, prompts = room.held - prompts, 0

        ids, ends, before = [r.id for r in job.requests], request.scope["fnengine.ends"], engine.gauges()
        try:
            requests = [await engine.prepare(r) for r in job.requests]
            if flight.reason is not None:  # ended from outside in the meantime
                raise flight.reason
            flight.submit(engine, requests)
        except BaseException:
            close()
            raise
        recent.arrived(ids, before, ends)
        answer = (job.write or Answer)(job.shape, engine.tokenizer, lambda: operations.timings(ids, ends))
        grammar = job.requests[0].grammar
        blame = Blame(job.shape.strategy, None if grammar is None else grammar.field)
        ignored = tuple(sorted({*ignored, *job.ignored}))
        headers = {"x-fnengine-ignored": header(ignored)} if ignored else {}
        if job.shape.stream:
            thin = Thinning(job.shape.interval or stream_interval)

            def straight(write: Callable[[str], bool]) -> None:
                if thin.interval <= 1:
                    flight.straight(lambda prompt, delta: answer.straight(prompt, delta, write))

            return EventStream(events(flight, answer, thin, log, blame), close, headers, silence, straight)

        async def rest(client: Request | None) -> Response:
            try:
                return await whole(client, flight, answer, headers, room, blame)
            finally:
                close()

        return await rest(request) if job.background is None else job.background(flight, answer, rest(None))

    async def completions(request: Request) -> Response:
        return await generate(request, protocol.CompletionBody, translate.from_completion)

    from_chat = partial(translate.from_chat, role=response_role, parsers=parsers, auto_tools=enable_auto_tool_choice)

    async def chat(request: Request) -> Response:
        return await generate(request, protocol.ChatBody, from_chat)

    async def tokenize(request: Request) -> Response:
        body, ignored = await read(request, protocol.TokenizeBody)
        named(body)
        text = engine.tokenizer
        ids = await asyncio.to_thread(translate.from_tokenize, body, text)
        strings = [text.token_text(i) for i in ids] if body.return_token_strs else None
        out = {"count": len(ids), "max_model_len": engine.max_len, "tokens": list(ids), "token_strs": strings}
        return as_json(out, headers={"x-fnengine-ignored": header(ignored)} if ignored else None)

    async def detokenize(request: Request) -> Response:
        body, ignored = await read(request, protocol.DetokenizeBody)
        named(body)
        vocab = engine.tokenizer.vocab_size
        for i in body.tokens:
            if not 0 <= i < vocab:
                raise RequestError(f"token id {i} is not in the vocabulary of {vocab}", where="tokens", param="tokens")
        text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens, skip_special=False)
        return as_json({"prompt": text}, headers={"x-fnengine-ignored": header(ignored)} if ignored else None)

    async def tokenizer_info(request: Request) -> Response:
        text = engine.tokenizer
        facts = {"vocab_size": text.vocab_size, "model_max_length": engine.max_len}
        return as_json({**text.specials, **facts, "chat_template": text.templates.get("default")})

    # --- readings -------------------------------------------------------------------------------------------------

    def card(name: str) -> dict[str, Any]:
        may = {"allow_sampling": True, "allow_logprobs": True, "allow_view": True}
        may |= {"allow_create_engine": False, "allow_search_indices": False, "allow_fine_tuning": False}
        permission = {"id": f"modelperm-{name}", "object": "model_permission", "created": born, **may}
        permission |= {"organization": "*", "group": None, "is_blocking": False}
        return {
            "id": name,
            "object": "model",
            "created": born,
            "owned_by": "fnengine",
            "root": engine.name,
            "parent": None,
            "max_model_len": engine.max_len,
            "permission": [permission],
        }

    async def models(request: Request) -> Response:
        return as_json({"object": "list", "data": [card(name) for name in engine.names]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in engine.names:
            raise NotFound(
                f"no model is called {name[:200]!r}", param="model", remedy=f"served here: {', '.join(engine.names)}"
            )
        return as_json(card(name))

    async def health(request: Request) -> Response:
        why = engine.healthy()
        return Response(status_code=200) if why is None else problem(Unavailable(why))

    async def show_version(request: Request) -> Response:
        return as_json({"version": version})

    async def show_metrics(request: Request) -> Response:
        text, kind = meter.text()
        return Response(text, headers={"content-type": kind})

    async def debug_graphs(request: Request) -> Response:
        graphs = engine.graphs()
        if graphs is None:
            raise NotFound("no steps are captured here", remedy="CUDA graphs run on GPUs, unless --graph-mode is NONE")
        return as_json(graphs)

    async def load(request: Request) -> Response:
        return as_json({"server_load": len(flights)})

    async def reset_prefix_cache(request: Request) -> Response:
        engine.reset_prefix_cache()
        return Response(status_code=200)

    async def abort_requests(request: Request) -> Response:
        body, _ = await read(request, protocol.AbortBody)
        aborted = []
        for wanted in body.request_ids:
            flight = flights.get(wanted) or flights.get(_KIND.sub("", wanted))
            if flight is not None:
                flight.close(Aborted("the request was aborted through /abort_requests"))
                aborted.append(wanted)
        return as_json({"aborted": aborted})

    components: dict[str, Any] = {}

    # --- the table of routes --------------------------------------------------------------------------------------

    def route(
        path: str,
        methods: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        model: Any = None,
        tell: Callable[[FnError], Response] = problem,
    ):
        async def answered(request: Request) -> Response:
            try:
                return await endpoint(request)
            except FnError as e:
                if e.code >= 500 and not isinstance(e, Unavailable | NotImplementedHere):
                    log(f"{path}: {e}")
                return tell(e)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                log(f"{path}: {traceback.format_exc()}")
                fault = tell(Fault("internal error; the server's log says more"))
                fault.headers["x-should-retry"] = "false"
                return fault

        answered.__name__, answered.__doc__ = endpoint.__name__, endpoint.__doc__
        extra, found = described.extra(path, model, tell is not problem)
        components.update(found)
        for method in methods.split():
            app.add_api_route(
                path,
                answered,
                methods=[method],
                openapi_extra=extra,
                response_model=None,
                operation_id=re.sub(r"\W+", "_", f"{method}{path}").lower().rstrip("_"),
            )

    route("/v1/completions", "POST", completions, protocol.CompletionBody)
    route("/v1/chat/completions", "POST", chat, protocol.ChatBody)
    route("/v1/models", "GET", models)
    route("/v1/models/{name:path}", "GET", one_model)
    route("/tokenize", "POST", tokenize, protocol.TokenizeBody)
    route("/tokenizer_info", "GET", tokenizer_info)
    route("/detokenize", "POST", detokenize, protocol.DetokenizeBody)
    route("/health", "GET", health)
    route("/ping", "GET POST", health)
    route("/ready", "GET", health)
    route("/version", "GET", show_version)
    route("/metrics", "GET", show_metrics)
    route("/load", "GET", load)
    route("/debug/graphs", "GET", debug_graphs)
    route("/reset_prefix_cache", "POST", reset_prefix_cache)
    route("/abort_requests", "POST", abort_requests, protocol.AbortBody)
    core = Core(engine, read, named, generate, from_chat, wall, parsers.thinks, log)
    own: list[Route] = [*embeddings.routes(core), *messages.routes(core), *responses.routes(core), *unbuilt()]
    for r in own:
        route(r.path, r.methods, r.endpoint, r.model, r.problem)
    for path, methods, endpoint in operations.routes(engine, recent, profile, stuck):
        route(path, methods, endpoint)
    for path, endpoint in page.routes():
        app.add_route(path, endpoint, methods=["GET"], include_in_schema=False)

    described.add_components(app, components)

    async def refused(request: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        what = f"{request.method} {request.url.path[:200]}"
        if e.status_code == 404:
            return problem(NotFound(f"there is no route {what}"))
        kind = "MethodNotAllowedError" if e.status_code == 405 else "BadRequestError"
        return error(e.status_code, f"{what}: {e.detail}", kind, None, e.status_code, dict(e.headers or {}))

    app.add_exception_handler(HTTPException, refused)
    open_routes = OPEN | {"/metrics"} if metrics_open else OPEN
    app.add_middleware(guard, keys=tuple(api_keys), open_routes=open_routes, access=access, wall=wall)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-fnengine-ignored", "retry-after"],
        )
    return app


def cut(app: FastAPI, reason: str) -> int:
    """Ends every open request with an error that says why; their number."""
    flights = list(app.state.flights.values())
    for flight in flights:
        flight.close(Unavailable(reason))
    return len(flights)


# --- answers ----------------------------------------------------------------------------------------------------------


def _large(body: Any) -> bool:
    if not protocol.FIELDS.isdisjoint(body.model_extra or ()) or getattr(body, "tools", None):  # schemas to be read
        return True
    prediction = body.prediction if isinstance(body, protocol.Generate) else None
    if prediction is not None and len(str(prediction.content)) > LARGE:
        return True
    if isinstance(body, protocol.ChatBody):
        return len(body.messages) > 64 or sum(len(str(m.get("content"))) for m in body.messages) > LARGE
    if not isinstance(body, protocol.CompletionBody):
        return True
    prompt = body.prompt
    return (
        len(prompt) > LARGE
        if isinstance(prompt, str)
        else sum(len(p) for p in prompt if not isinstance(p, int)) > LARGE
    )


# --- before every route -----------------------------------------------------------------------------------------------


def guard(
    app: Any,
    *,
    keys: tuple[str, ...],
    open_routes: frozenset[str],
    access: Callable[[str], None] | None = None,
    wall: Callable[[], float] = time.time,
):
    """An ASGI application that asks for a key, gives every request an id that its answer carries, and tells `access`
    of it when it has been answered."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allowed(headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if not token:  # Anthropic's clients have a header of their own
            scheme, token = b"bearer", headers.get(b"x-api-key", b"")
        given = hashlib.sha256(token.strip()).digest()
        matches = [hmac.compare_digest(given, d) for d in digests]  # all of them, so that time tells nothing
        return scheme.lower() == b"bearer" and any(matches)

    async def guarded(scope, receive, send):
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        wanted = headers.get(b"x-request-id", b"").decode("latin-1")
        id = wanted if _REQUEST_ID.fullmatch(wanted) else uuid.uuid4().hex
        scope["fnengine.id"], scope["fnengine.ends"] = id, {}
        begun, status = time.perf_counter(), 499  # unless an answer begins before the client has gone
        path = scope["path"].removeprefix(scope.get("root_path", ""))

        async def answer(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode("latin-1"))]
            await send(message)

        if digests and path not in open_routes and scope["method"] != "OPTIONS" and not allowed(headers):
            what = (
                "the API key is wrong" if headers.keys() & {b"authorization", b"x-api-key"} else "an API key is needed"
            )
            wrong = Unauthorized(what, remedy="send the header Authorization: Bearer KEY")
            inner = problem(wrong)
        else:
            inner = app
        try:
            await inner(scope, receive, answer)
        finally:
            if access is not None:
                access(line(scope, status, wall(), time.perf_counter() - begun))

    return guarded
