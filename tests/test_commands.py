"""Serve, chat, complete and bench. Oracles: the same text by two ways, a scripted model, NumPy, counts by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fnengine.cli import bench, chat, load, main, parser, talk
from fnengine.cli.client import Server, ServerError
from fnengine.errors import ConfigError

FNENGINE = [sys.executable, "-c", "import sys; from fnengine.cli import main; sys.exit(main())"]
PROMPT = "Once upon a time"


def start(*flags: str) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its URL."""
    process = subprocess.Popen([*FNENGINE, "serve", "--port", "0", *flags], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("ready at "):
            return process, line.split()[2]
    raise AssertionError("".join(said))


@pytest.fixture(scope="module")
def url():
    process, url = start()
    yield url
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_complete_here_and_on_a_server_are_one(url, capsys):
    """Oracle: the other way in; greedy, so there is one right answer."""
    asked = ["complete", PROMPT, "--max-tokens", "24", "--temperature", "0", "--debug"]
    assert main([*asked, "--url", url]) == 0
    there = capsys.readouterr().out
    assert main(asked) == 0
    assert capsys.readouterr().out == there
    assert len(there.split()) > 5


def test_sampled_text_has_one_seed_everywhere(url, capsys):
    asked = ["complete", PROMPT, "--max-tokens", "24", "--temperature", "1", "--top-p", "0.9", "--sampling-seed"]
    texts = []
    for seed in ("7", "7", "8"):
        assert main([*asked, seed, "--url", url + "/v1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_chat_over_a_server(url, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", iter_stdin("Hello! Who are you?\n"))
    assert main(["chat", "--url", url, "--temperature", "0"]) == 0
    assert "model" in capsys.readouterr().out


def test_bench_serve_counts(url, tmp_path):
    file = tmp_path / "figures.json"
    words = ["bench", "serve", "--url", url, "--num-prompts", "6", "--input-len", "9", "--output-len", "7"]
    assert main([*words, "--max-concurrency", "2", "--json", str(file)]) == 0
    got = json.loads(file.read_text())
    assert got["failed"] == 0
    assert got["output_tokens_per_s"] * got["seconds"] == pytest.approx(6 * 7)
    assert got["requests_per_s"] * got["seconds"] == pytest.approx(6)
    # Two at a time: three rounds of requests, none shorter than the shortest.
    assert got["seconds"] > 2 * got["ttft_ms_p50"] / 1e3
    assert got["ttft_ms_p50"] < got["e2e_ms_p50"]


def test_a_server_that_is_not_there(capsys):
    for words in (["bench", "serve"], ["chat"], ["complete", "x"]):
        assert main([*words, "--url", "http://127.0.0.1:9"]) == 2
        error = capsys.readouterr().err
        assert "http://127.0.0.1:9" in error and "fnengine serve" in error and error.count("\n") == 1


def test_a_server_error_is_passed_on(url):
    server = Server(url)
    with pytest.raises(ServerError, match="nobody"):
        list(server.events("/v1/completions", {"model": "nobody", "prompt": "x"}))
    (done,), _ = load.drive(server, "/v1/completions", [{"model": "nobody", "prompt": "x", "stream": True}])
    assert done.error is not None and "404" in done.error


def test_two_signals_end_a_server_at_once_and_quietly():
    process, url = start("--shutdown-timeout", "60")
    reading = threading.Event()

    def read() -> None:
        body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
        try:
            for _ in Server(url).events("/v1/completions", body):
                reading.set()
                time.sleep(0.005)
        except ServerError as e:
            assert "shutting down" in str(e) or "broke off" in str(e)

    client = threading.Thread(target=read)
    client.start()
    assert reading.wait(20)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert time.monotonic() - begin < 20, "the second signal must not wait for --shutdown-timeout"
    client.join(20)
    assert not client.is_alive()


# --- chat, with a scripted model --------------------------------------------------------------------------------------


class iter_stdin:
    """Lines for `input()`, not from a terminal."""

    def __init__(self, text: str):
        self._lines = iter(text.splitlines(keepends=True))

    def readline(self) -> str:
        return next(self._lines, "")

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError

    errors, encoding = "strict", "utf-8"


def echo(seen: list) -> talk.Chat:
    """A model that says how many messages it saw, in two pieces; it fails on `fail` and is interrupted on `stop`."""

    def answer(messages):
        seen.append([dict(m) for m in messages])
        yield f"{len(messages)} "
        if messages[-1]["content"] == "fail":
            raise ServerError("as asked")
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield "seen"

    return answer


def roles(messages) -> str:
    return "".join(m["role"][0] for m in messages)


def test_a_conversation(capsys, monkeypatch):
    lines = ["a", "fail", "b", "/what", "/reset", "c", "/system be kind", "d", "stop", "e", "/exit", "never"]
    monkeypatch.setattr("sys.stdin", iter_stdin("\n".join(lines)))
    seen: list = []
    chat.converse(echo(seen), "first", tty=False)
    # Each list as the model saw it: system, user, assistant. The failed turn is forgotten, the stopped one is kept.
    assert [roles(m) for m in seen] == ["su", "suau", "suau", "su", "su", "suau", "suauau"]
    assert seen[2][2]["content"] == "2 seen" and seen[2][3]["content"] == "b"
    assert seen[3][0]["content"] == "first" and seen[4][0]["content"] == "be kind"
    assert seen[6][4]["content"] == "4 "
    out, err = capsys.readouterr()
    assert out.startswith("2 seen\n") and "as asked" in err and "/reset" in err


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_percentiles_are_numpys(n):
    values = np.random.default_rng(n).exponential(size=n).tolist()
    for q in (0, 1, 50, 90, 99, 100):
        assert bench.percentile(values, q) == pytest.approx(float(np.percentile(values, q)))


def test_prompts_are_random_yet_the_same():
    a, b, c = (bench.prompts(1000, 3, 8, seed) for seed in (1, 1, 2))
    assert a == b != c
    assert all(16 <= t < 984 for p in a for t in p) and len({tuple(p) for p in a}) == 3
    assert bench.prompts(8, 1, 50, 0)[0] and max(bench.prompts(8, 1, 50, 0)[0]) < 8


def test_throughput_in_process(capsys):
    words = ["bench", "throughput", "--num-prompts", "3", "--input-len", "5", "--output-len", "4"]
    assert main([*words, "--json", "-", "--debug"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["output_tokens_per_s"] * got["seconds"] == pytest.approx(3 * 4)
    assert got["total_tokens_per_s"] * got["seconds"] == pytest.approx(3 * (5 + 4))
    assert 0 < got["ttft_ms_p50"] / 1e3 < got["seconds"]


def test_a_workload_beyond_the_context_is_refused(capsys):
    assert main(["bench", "latency", "--input-len", "1000", "--output-len", "1000"]) == 2
    assert "exceed the context" in capsys.readouterr().err


@pytest.mark.slow
def test_startup(capsys):
    assert main(["bench", "startup", "--json", "-"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["warm_s"] > 0 and got["cold_s"] > 0


def test_flags_can_be_said_again():
    words = ["--max-num-seqs", "4", "--no-enable-prefix-caching", "--dtype", "float32", "--max-model-len", "auto"]
    words += ["--kv-cache-memory-bytes", "8MiB", "--served-model-name", "a", "b"]
    args = parser().parse_args(["bench", "startup", *words])
    again = parser().parse_args(["bench", "startup", *bench.flags_of(args)])
    assert vars(again) == vars(args)
    assert bench.flags_of(parser().parse_args(["bench", "startup"])) == []


# --- the client's reading of a stream ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_survive_every_cut(size):
    """Oracle: the events that were put in, however the chunks of the body fall."""
    events = [b'{"a": 1}', b'{"b": "x y"}', b"[DONE]"]
    body = b": keep-alive\n\n" + b"".join(b"data: " + e + b"\n\n" for e in events)
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    wire = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"

    async def read(data: bytes, chunked: bool) -> list[bytes]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return [e async for e in load._events(reader, chunked)]

    assert asyncio.run(read(wire, True)) == events
    assert asyncio.run(read(body, False)) == events


@pytest.mark.parametrize("url", ["ftp://x", "nonsense", "http://"])
def test_a_url_that_is_none(url):
    with pytest.raises(ConfigError, match="no URL"):
        Server(url).first_model()


def test_sampling_values_come_only_when_given():
    args = argparse.Namespace(temperature=0.0, top_p=None, top_k=None, sampling_seed=None)
    assert talk.asked(args) == {"temperature": 0.0}
