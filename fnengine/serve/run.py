"""A server on a port: binds first, serves until a signal, finishes or cuts what runs, returns."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from fnengine.errors import ConfigError
from fnengine.serve.app import cut, make_app
from fnengine.serve.connections import Limits, bounded, outermost, watch
from fnengine.serve.engine_port import EnginePort

SWITCH = 1e-3
"""Seconds after which a thread that runs Python has to let others run, Python's 5 ms otherwise: the one that serves
streams waits so long for threads that read large bodies."""
GRACE = 2.0
"""Seconds after the cut that connections get to send their last event before they are closed."""


def bind(host: str, port: int, uds: str | None = None) -> socket.socket:
    """A bound socket. Call it before loading a model, so that a port in use is known in milliseconds.

    Raises:
        ConfigError: the port or path is in use, not allowed, or the host cannot be resolved.
    """
    if uds is not None:
        return _bind_path(uds)
    if not 0 <= port < 65536:
        raise ConfigError(f"must be between 0 and 65535, got {port}", where="--port")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as e:
        raise ConfigError(f"cannot resolve {host!r}: {e}", where="--host", remedy="use 127.0.0.1 or 0.0.0.0") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as e:
        sock.close()
        if e.errno == errno.EADDRINUSE:
            remedy = f"stop the program that listens there, or choose another one, such as --port {port % 65535 + 1}"
            raise ConfigError(
                f"port {port} on {host or 'all addresses'} is in use", where="--port", remedy=remedy
            ) from None
        if e.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"port {port} is not allowed for this user", where="--port", remedy="choose one above 1023"
            ) from None
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror}", where="--host") from None
    sock.set_inheritable(True)
    return sock


def _bind_path(uds: str) -> socket.socket:
    path = Path(uds)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                probe.connect(uds)
            except OSError:
                path.unlink()  # left behind by a server that is no more
            else:
                raise ConfigError(f"{uds} is in use", where="--uds", remedy="choose another path")
            finally:
                probe.close()
        sock.bind(uds)
        sock.listen(2048)
    except OSError as e:
        sock.close()
        raise ConfigError(f"cannot listen on {uds}: {e.strerror or e}", where="--uds") from None
    except ConfigError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket, tls: bool = False) -> str:
    """Where a client on this machine reaches the socket."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    engine: EnginePort,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    uds: str | None = None,
    sock: socket.socket | None = None,
    shutdown_timeout: float = 0.0,
    log_level: str = "warning",
    access_log: bool = False,
    ssl_keyfile: str | None = None,
    ssl_certfile: str | None = None,
    root_path: str = "",
    on_ready: Callable[[str], None] = lambda url: None,
    stop: threading.Event | None = None,
    limits: Limits | None = None,
    **app_options: Any,
) -> None:
    """Serves an engine until SIGTERM or SIGINT, then returns normally (so that the process exits with 0).

    Args:
        sock: a socket from `bind`; else one is bound here.
        shutdown_timeout: seconds that requests in progress get to finish after a signal; then they are cut with an
            error event.
        on_ready: called once with the URL when connections are accepted.
        stop: setting it is as good as a signal, for servers that run in a thread.
        limits: of what a connection may take; None is the defaults.
        app_options: go to `make_app`.

    Raises:
        ConfigError: the address cannot be had, or certificate files cannot be read.
    """
    for flag, file in (("--ssl-keyfile", ssl_keyfile), ("--ssl-certfile", ssl_certfile)):
        if file is not None and not os.access(file, os.R_OK):
            raise ConfigError(f"cannot read {file}", where=flag)
    sock = bind(host, port, uds) if sock is None else sock
    app = make_app(engine, root_path=root_path, shutdown_timeout=0.0, **app_options)
    limits = limits or Limits()
    config = uvicorn.Config(
        outermost(app),
        http=bounded(_protocol(), limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level=log_level,
        access_log=access_log,
        root_path=root_path,
        server_header=False,
        backlog=2048,
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        timeout_graceful_shutdown=max(1, round(shutdown_timeout + GRACE)),
    )
    _raise_descriptors()
    server = uvicorn.Server(config)
    signals: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        # uvicorn's own handler answers a second Ctrl-C by dropping its connections with stack traces; here the second
        # one only ends the time that requests in progress have been given.
        signals.append(number)
        server.should_exit = True

    server.handle_exit = on_signal  # type: ignore[method-assign]
    # uvicorn raises the signal again once it is done, for whoever handled it before; here nobody needs to be told.
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            url = url_of(sock, ssl_certfile is not None)
            runner.run(_watch(server, app, sock, url, on_ready, stop, shutdown_timeout, signals, limits))
    finally:
        sys.setswitchinterval(interval)
        for s, handler in before.items():
            signal.signal(s, handler)
        sock.close()
        if uds is not None:
            Path(uds).unlink(missing_ok=True)


def _protocol() -> Any:
    if importlib.util.find_spec("httptools"):
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        return HttpToolsProtocol
    from uvicorn.protocols.http.h11_impl import H11Protocol

    return H11Protocol


def _raise_descriptors() -> None:
    """Lets this process hold as many sockets as it may: a thousand streams are more than most systems' soft limit."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit; some containers do not let it move
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


async def _served(server: uvicorn.Server, sock: socket.socket) -> None:
    with suppress(SystemExit):  # how uvicorn says that the application did not start; `_watch` says why
        await server.serve(sockets=[sock])


async def _watch(
    server: uvicorn.Server,
    app: FastAPI,
    sock: socket.socket,
    url: str,
    on_ready: Callable[[str], None],
    stop: threading.Event | None,
    timeout: float,
    signals: list[int],
    limits: Limits,
) -> None:
    """Runs the server; tells when it is ready, and cuts what still runs when its time after a signal is over."""
    clock = asyncio.get_running_loop().time
    task = asyncio.ensure_future(_served(server, sock))
    watching = asyncio.ensure_future(watch(server.server_state.connections, limits))
    ready, end = False, None
    while not task.done():
        await asyncio.wait({task}, timeout=0.01 if not ready else 0.1)
        if server.started and not ready:
            ready = True
            on_ready(url)
        if stop is not None and stop.is_set():
            server.should_exit = True
        if server.should_exit and end is None:
            end = clock() + timeout
        if end is not None and (clock() >= end or len(signals) > 1):
            cut(app, "the server is shutting down")
    watching.cancel()
    await task
    if not ready:
        fault = app.state.fault
        raise fault or ConfigError("the server did not start; the log above says why", where="serve")
