"""The benchmark of what HTTP and grammars cost. Oracles: tokens asked for, bytes written by hand, ratios by hand."""

from __future__ import annotations

import socket
import threading

import pytest

import fnengine as fn
from benchmarks import overhead
from benchmarks.workloads import Timed
from fnengine.serve.run import bind, serve


class Fixed:
    """A side whose turns take the given seconds."""

    def __init__(self, name, seconds):
        self.name, self.seconds = name, iter(seconds)
        self.seen = []

    def run(self, prompts, new):
        self.seen.append(prompts)
        return Timed(next(self.seconds), [[1] * new for _ in prompts], {"processor": 0.4})


def test_ratios_are_taken_repeat_by_repeat_and_the_first_turn_is_not_counted():
    a, b = Fixed("a", [9.0, 1.0, 2.0, 4.0]), Fixed("b", [1.0, 2.0, 2.0, 5.0])
    found = overhead.compare([a, b], 100, streams=2, new=10, repeats=3)
    assert found["shares"] == [0.5, 1.0, 0.8] and found["share"] == 0.8
    assert found["tokens_per_second"] == {"a": 10.0, "b": 10.0}
    assert found["processor_seconds_a_token"]["a"] == {"processor": 0.02}
    assert a.seen == b.seen and a.seen[0] != a.seen[1], "the same prompts for both, others every time"
    short = Fixed("short", [1.0])
    short.run = lambda prompts, new: Timed(1.0, [[1]] * len(prompts))
    with pytest.raises(AssertionError, match="2 tokens, wanted 20"):
        overhead.compare([short, b], 100, streams=2, new=10, repeats=1)


def test_chunks_are_taken_apart_by_hand():
    sink = overhead.Sink(b"", None)  # type: ignore[arg-type]
    sink.parts = [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"cde\r\nA\r\n0123456789\r\n0\r\n\r\n",
    ]
    assert sink.body() == b"abcde0123456789"
    sink.parts = [b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}"]
    with pytest.raises(AssertionError, match="429"):
        sink.body()


def test_both_sides_on_the_bundled_model():
    engine = fn.Engine.build(fn.load("demo"), max_model_len=128, max_num_seqs=8, enforce_eager=True)
    ready, stop, urls = threading.Event(), threading.Event(), []
    options = dict(sock=bind("127.0.0.1", 0), stop=stop, on_ready=lambda url: (urls.append(url), ready.set()))
    thread = threading.Thread(target=serve, args=(engine,), kwargs=options, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        timed = overhead.Streamed(urls[0], None).run([[5, 6, 7], [8, 9, 10]], 12)
        assert [len(t) for t in timed.tokens] == [12, 12] and 0.5 < timed.facts["events_a_token"] < 2
    finally:
        stop.set()
        thread.join(20)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(urls[0].rsplit(":", 1)[1])), 1)


def test_texts_under_the_schema_are_as_long_as_free_ones():
    from fnengine.host.grammar import json_schema

    llm = fn.LLM("demo", max_model_len=256, max_num_seqs=4, enforce_eager=True)
    greedy, stop = fn.Sampling(temperature=0), fn.Stop(max_tokens=128, ignore_eos=True)
    done = llm.generate([[20, 30, 40], [50, 60]], greedy, stop, grammar=json_schema(overhead.SCHEMA))
    assert [len(c.choices[0].tokens) for c in done] == [128, 128]
    assert all(c.choices[0].finish == "length" and c.text.lstrip().startswith("{") for c in done)
