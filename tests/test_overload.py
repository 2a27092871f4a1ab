"""Clients that ask for too much, wait too little, read too slowly, or never finish a sentence. Raw sockets, a scripted
engine. Oracles: the contract's codes, and what is open afterwards: nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import openai
import psutil
import pytest

from fnengine.host.answers import ENTRY, TOKEN
from fnengine.serve.connections import Limits, Overdue, state_of
from tests import test_serve
from tests.test_serve import CHAT, SCRIPTS, TEXT, Script, ScriptedEngine, problem, serving

ENDLESS = {"model": "tiny", "prompt": "endless", "max_tokens": 399}
WIDE = {**SCRIPTS, "wide": Script(tuple(b"la " * 100_000))}


def until(truth, seconds=5.0):
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end, "never true"
        time.sleep(0.01)


def call(server, buffer=None):
    at = socket.socket()
    if buffer is not None:
        at.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    at.settimeout(10)
    at.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    return closing(at)


def head_of(body, **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "x", "content-type": "application/json", "content-length": len(raw), **headers}
    return b"POST /v1/completions HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode() + b"\r\n"


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_request_that_gives_itself_too_little_time_ends_with_408():
    with serving(ScriptedEngine(SCRIPTS, pace=0.02)) as server:
        began = time.monotonic()
        r = server.post("/v1/completions", {**ENDLESS, "timeout": 0.2})
        assert 0.15 < time.monotonic() - began < 3
        assert problem(r, 408, "timeout", "0.2 seconds")["type"] == "TimeoutError"
        assert r.headers["x-should-retry"] == "false"
        events = server.events("/v1/completions", {**ENDLESS, "timeout": 0.2})
        assert len(events) > 2 and events[-1]["error"]["code"] == 408
        with pytest.raises(openai.APIError, match="timeout"):
            list(server.api.completions.create(**ENDLESS, stream=True, extra_body={"timeout": 0.1}))
        chat = {**CHAT, "messages": [{"role": "user", "content": "endless"}], "timeout": 0.1}
        problem(server.post("/v1/chat/completions", chat), 408, "timeout")
        assert server.post("/v1/responses", {"input": "endless", "timeout": 0.1}).status_code == 408
        server.quiet()


def test_a_request_that_is_in_time_does_not_notice():
    with serving(ScriptedEngine(SCRIPTS)) as server:
        whole = server.post("/v1/completions", TEXT).json()["choices"]
        for limit in (5, 0.9, 1e300):
            assert server.post("/v1/completions", {**TEXT, "timeout": limit}).json()["choices"] == whole
        for bad in (0, -1, "1", True):
            problem(server.post("/v1/completions", {**TEXT, "timeout": bad}), 400, "timeout")


def test_the_servers_own_deadline_is_for_requests_that_name_none():
    with serving(ScriptedEngine(SCRIPTS, pace=0.02), request_timeout=0.2) as server:
        began = time.monotonic()
        says = problem(
            server.post("/v1/completions", ENDLESS), 408, None, "0.2 seconds of the server's --request-timeout"
        )
        assert says["type"] == "TimeoutError" and time.monotonic() - began < 3
        assert server.events("/v1/completions", ENDLESS)[-1]["error"]["code"] == 408
        assert server.post("/v1/responses", {"input": "endless"}).status_code == 408
        longer = server.post("/v1/completions", {**ENDLESS, "max_tokens": 30, "timeout": 20})  # 0.6 s
        assert longer.json()["choices"][0]["finish_reason"] == "length"
        assert server.post("/v1/completions", {**ENDLESS, "max_tokens": 2}).status_code == 200
        server.quiet()


# --- connections ------------------------------------------------------------------------------------------------------


class Connection:
    """What is looked at of uvicorn's."""


def connection(cycle=None, *, began=False, paused=False, closing=False):
    scope = object()
    if cycle is not None:
        cycle = SimpleNamespace(scope=object() if began else scope, response_complete=False, **cycle)
    flow = SimpleNamespace(write_paused=paused)
    out = Connection()
    out.cycle, out.scope, out.flow, out.transport = cycle, scope, flow, SimpleNamespace(is_closing=lambda: closing)
    return out


@pytest.mark.parametrize(
    "at, state",
    [
        (connection(), "head"),
        (connection({"more_body": True}), "body"),
        (connection({"more_body": False}), None),
        (connection({"more_body": False}, began=True), "head"),
        (connection({"more_body": False}, paused=True), "unread"),
        (connection({"more_body": False}, closing=True), "unread"),
    ],
)
def test_what_a_connection_waits_for(at, state):
    assert state_of(at) == state


def test_time_counts_from_the_beginning_of_a_state():
    overdue, one, two = Overdue(Limits(head=10, body=20)), connection(), connection({"more_body": True})
    assert overdue([one, two], 0) == [] and overdue([one, two], 10) == []
    assert overdue([one, two], 11) == [one]
    one.cycle = SimpleNamespace(scope=one.scope, more_body=True)  # its head is whole now
    assert overdue([one, two], 12) == [] and overdue([one, two], 21) == [two]
    assert overdue([one], 32) == [] and overdue([one], 33) == [one]


SHORT = Limits(head=0.8, body=0.8, unread=0.8, head_bytes=20_000, every=0.1)


@pytest.fixture(scope="module")
def server():
    with serving(ScriptedEngine(WIDE, max_len=500_000), limits=SHORT) as server:
        yield server


def ended(at, within=6.0):
    """What was read until the other side closed the connection."""
    at.settimeout(within)
    got = b""
    try:
        while part := at.recv(1 << 16):
            got += part
    except ConnectionResetError:
        pass
    return got


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/comp", head_of(TEXT)[:-2], head_of(TEXT), head_of(TEXT) + json.dumps(TEXT).encode()[:-1]],
    ids=["nothing", "half a line", "half a head", "no body", "half a body"],
)
def test_who_does_not_finish_a_request_is_cut(server, sent):
    with call(server) as at:
        at.sendall(sent)
        assert ended(at) == b""
    server.quiet()


def test_a_letter_at_a_time_is_cut_too(server):
    with call(server) as at, pytest.raises(OSError):
        for letter in head_of(TEXT, **{"x-long": "y" * 1000}):
            at.sendall(bytes([letter]))
            time.sleep(0.02)
    server.quiet()


@pytest.mark.parametrize("before", [b"", head_of(TEXT) + json.dumps(TEXT).encode()], ids=["first", "second"])
def test_a_head_without_an_end_is_431(server, before):
    with call(server) as at:
        at.sendall(before)
        got = b"" if not before else at.recv(1 << 16)
        assert not before or b" 200 OK" in got
        at.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for i in range(200_000):
                at.sendall(b"x-%d: %s\r\n" % (i, b"y" * 100))
        # nothing is promised of what a client reads that went on sending; whoever stops is told
    with call(server) as at:
        at.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 21_000)
        assert ended(at).startswith(b"HTTP/1.1 431 ")
    server.quiet()


def test_who_does_not_read_is_cut_and_its_request_ended(server):
    with call(server, 4096) as at:
        body = json.dumps({"model": "tiny", "prompt": "wide", "max_tokens": 300_000, "stream": True}).encode()
        at.sendall(head_of(body) + body)
        until(lambda: server.engine.live)
        until(lambda: not server.engine.live, 20)
    server.quiet()


def test_a_reader_that_is_only_slow_gets_everything(server):
    with call(server, 4096) as at:
        body = json.dumps({"model": "tiny", "prompt": "endless", "max_tokens": 800, "stream": True}).encode()
        at.sendall(head_of(body, connection="close") + body)
        got = b""
        while part := at.recv(1 << 13):
            got += part
            time.sleep(0.005)
    assert got.count(b"\ndata: ") + got.startswith(b"data: ") >= 800 and b"[DONE]" in got
    server.quiet()


def test_whole_answers_that_nobody_reads_are_counted_until_they_are_cut(monkeypatch):
    """Each is more than sockets buffer: a third finds no room until the first two are cut."""

    def bind(*where):
        at = honest(*where)
        at.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)  # what it accepts has the same
        return at

    honest = test_serve.bind
    monkeypatch.setattr(test_serve, "bind", bind)
    tokens, one = 1500, TOKEN + ENTRY * 21
    answer = {
        "model": "tiny",
        "prompt": "wide",
        "max_tokens": tokens,
        "logprobs": 20,
        "return_tokens_as_token_ids": True,
    }
    limits = Limits(unread=2.0, every=0.1)
    engine = ScriptedEngine(WIDE, max_len=500_000)
    with (
        serving(engine, limits=limits, answer_bytes=int(1.05 * one * tokens)) as server,
        call(server, 4096) as a,
        call(server, 4096) as b,
    ):
        raw = json.dumps(answer).encode()
        for at in (a, b):
            at.sendall(head_of(raw) + raw)
            until(lambda at=at: at.recv(1, socket.MSG_PEEK), 10)
        r = server.post("/v1/completions", answer)
        assert r.status_code == 503 and "--answer-memory" in r.text and r.headers["retry-after"] == "1"
        until(lambda: server.post("/v1/completions", answer).status_code == 200, 10)


def test_half_closed_sockets_leave_nothing_behind(server):
    before = psutil.Process().num_fds()
    for _ in range(20):
        with call(server) as at:
            body = json.dumps(TEXT).encode()
            at.sendall(head_of(body) + body)
            at.shutdown(socket.SHUT_WR)
            ended(at)
    server.quiet()
    until(lambda: psutil.Process().num_fds() <= before + 2)


def test_a_killed_client_leaves_nothing_behind(server):
    """A reset in the middle of a stream is what a killed client looks like from here."""
    for _ in range(20):
        with call(server) as at:
            body = json.dumps({"model": "tiny", "prompt": "wide", "max_tokens": 300_000, "stream": True}).encode()
            at.sendall(head_of(body) + body)
            at.recv(100)
            at.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    server.quiet()


def test_clients_ended_by_sigkill_leave_nothing_behind(server):
    """Real processes, killed while they read a stream."""
    body = json.dumps({"model": "tiny", "prompt": "wide", "max_tokens": 300_000, "stream": True}).encode()
    port = int(server.url.rsplit(":", 1)[1])
    begin = f"import socket; s = socket.create_connection(('127.0.0.1', {port})); s.sendall({head_of(body) + body!r})"
    program = begin + "\nwhile s.recv(4096): pass"
    before = psutil.Process().num_fds()
    clients = [subprocess.Popen([sys.executable, "-S", "-c", program]) for _ in range(4)]
    until(lambda: len(server.engine.live) == 4, 20)
    for p in clients:
        p.kill()
        p.wait()
    server.quiet()
    until(lambda: psutil.Process().num_fds() <= before + 2)


def test_many_open_streams_are_held_and_freed():
    """A short form of what `benchmarks.hostile` does with a thousand."""
    with serving(ScriptedEngine(SCRIPTS, pace=0.05)) as server:
        process, before = psutil.Process(), psutil.Process().num_fds()
        sockets = []
        body = json.dumps({**ENDLESS, "stream": True}).encode()
        for _ in range(150):
            at = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), 10)
            at.sendall(head_of(body) + body)
            sockets.append(at)
        until(lambda: len(server.engine.live) == 150)
        assert server.load() == 150
        for at in sockets:
            assert at.recv(1 << 12).startswith(b"HTTP/1.1 200")
            at.close()
        server.quiet()
        until(lambda: process.num_fds() <= before + 4)
