"""The HTTP contract over a scripted engine. Oracles: the `openai` client, raw bytes, and answers worked out by hand.

Test names carry the line of the contract they hold (A.1 framing ... A.13 endpoints). After every test the engine has no
open stream and the server no open request.
"""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

import fnengine
from fnengine.cli import main as cli
from fnengine.errors import ConfigError
from fnengine.graphs import Bucket, Usage, report
from fnengine.serve.run import bind, serve

if "scripted_engine" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("scripted_engine", Path(__file__).with_name("scripted_engine.py"))
    sys.modules["scripted_engine"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["scripted_engine"])
from scripted_engine import AB, BOS, EOS, OTHER_A, Script, ScriptedEngine, said

HALF = math.log(0.5)


class Server:
    """A served engine: `url`, `api` (the official client), `http` (raw)."""

    def __init__(self, engine, url, key=None):
        self.engine, self.url = engine, url
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=20)
        self.api = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=20)

    def post(self, path, body, **kw):
        return self.http.post(path, json=body, **kw)

    def events(self, path, body, **kw):
        """The data of a stream's events, [DONE] checked and dropped."""
        r = self.post(path, {**body, "stream": True}, **kw)
        assert r.status_code == 200, r.text
        blocks = r.text.split("\n\n")
        assert blocks[-1] == "" and blocks[-2] == "data: [DONE]"
        blocks = [b for b in blocks[:-2] if not b.startswith(":")]
        assert all(b.startswith("data: ") and "\n" not in b for b in blocks)
        return [json.loads(b[6:]) for b in blocks]

    def quiet(self):
        """Waits until nothing is open; what is left is a leak."""
        end = time.monotonic() + 3
        while (self.engine.live or self.load()) and time.monotonic() < end:
            time.sleep(0.005)
        assert not self.engine.live and not self.load()

    def load(self):
        return self.http.get("/load").json()["server_load"]


@contextmanager
def serving(engine, key=None, **options):
    ready, stop, failed, url = threading.Event(), threading.Event(), [], []

    def work():
        try:
            serve(
                engine,
                sock=bind("127.0.0.1", 0),
                on_ready=lambda u: (url.append(u), ready.set()),
                stop=stop,
                **options,
            )
        except BaseException as e:
            failed.append(e)
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(10)
    if failed:
        thread.join()
        raise failed[0]
    server = Server(engine, url[0], key)
    try:
        yield server
        server.quiet()
    finally:
        server.http.close()
        server.api.close()
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
    assert not failed


SCRIPTS = {
    "hello": said("Hello, wörld!"),
    "unlikely": said("xyz", unlikely=(1,)),
    "fails": said("abcdef", fail_at=3),
    "endless": Script(tuple(b"la ")),
    "<s>user:hi|assistant:": said("Hello there, 世界."),
    "<s>user:endless|assistant:": Script(tuple(b"la ")),
    "<s>user:fails|assistant:": said("abcdef", fail_at=3),
    "halves": Script((0xE4, 0xB8, 0x96, 0xE4, 0xB8, EOS)),
    "dup": Script((97, OTHER_A, AB, EOS)),
}


@pytest.fixture(scope="module")
def shared():
    engine = ScriptedEngine(SCRIPTS)
    with serving(engine) as server:
        yield server


@pytest.fixture
def server(shared):
    yield shared
    shared.engine.why = None
    shared.quiet()


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 50}


def problem(response, code, param=None, word=""):
    """The error body, checked to be OpenAI's."""
    assert response.status_code == code, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    assert error["param"] == param, error
    assert word in error["message"], error
    assert response.headers["x-request-id"]
    return error


# --- A.1 transport and framing ----------------------------------------------------------------------------------------


def test_a1_stream_headers_and_framing(server):
    with server.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as r:
        assert r.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert r.headers["cache-control"] == "no-cache" and r.headers["x-accel-buffering"] == "no"
        raw = r.read()
    assert raw.endswith(b"\n\ndata: [DONE]\n\n") and raw.isascii()
    assert all(line.startswith(b"data: ") for line in raw.split(b"\n\n")[:-1])


def test_a1_an_event_is_sent_when_it_happens(server):
    with serving(ScriptedEngine(SCRIPTS, pace=0.05)) as slow:
        times = []
        for _ in slow.api.completions.create(model="tiny", prompt="hello", max_tokens=5, stream=True):
            times.append(time.monotonic())
    assert times[-1] - times[0] > 0.15  # five tokens, four paces


@pytest.mark.parametrize("path,body", [("/v1/completions", {**TEXT, "prompt": "fails"})])
def test_a1_error_after_the_stream_began_is_an_event_then_done(server, path, body):
    events = server.events(path, body)
    assert events[-1]["error"]["message"] == "the device failed: 42" and events[-1]["error"]["code"] == 500
    assert all("error" not in e for e in events[:-1])
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "abc"
    with pytest.raises(openai.APIError, match="42"):
        list(server.api.completions.create(**body, stream=True))


def test_a1_keep_alive_comments_while_nothing_comes():
    with serving(ScriptedEngine(SCRIPTS, pace=0.25), silence=0.05) as slow:
        r = slow.post("/v1/completions", {**TEXT, "max_tokens": 2, "stream": True})
        assert r.text.count(": keep-alive\n\n") >= 2
        got = slow.api.completions.create(model="tiny", prompt="hello", max_tokens=2, stream=True)
        assert "".join(c.choices[0].text for c in got) == "He"


def test_a1_stream_options_need_stream(server):
    problem(server.post("/v1/completions", {**TEXT, "stream_options": {"include_usage": True}}), 400, "stream_options")
    for harmless in (None, {}):
        assert server.post("/v1/completions", {**TEXT, "stream_options": harmless}).status_code == 200


# --- A.2 identity -----------------------------------------------------------------------------------------------------


def test_a2_ids_objects_and_fingerprint(server):
    whole = server.post("/v1/chat/completions", CHAT).json()
    assert whole["id"].startswith("chatcmpl-") and whole["object"] == "chat.completion"
    assert whole["model"] == "tiny" and whole["system_fingerprint"] == "fp-1"
    whole = server.post("/v1/completions", TEXT).json()
    assert whole["id"].startswith("cmpl-") and whole["object"] == "text_completion"
    events = server.events("/v1/chat/completions", CHAT)
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({(e["id"], e["created"], e["model"]) for e in events}) == 1
    assert events[-1]["system_fingerprint"] == "fp-1"
    assert {e["object"] for e in server.events("/v1/completions", TEXT)} == {"text_completion"}


def test_a2_the_model_asked_for_is_echoed_and_an_empty_one_filled_in(server):
    assert server.post("/v1/completions", {**TEXT, "model": "alias"}).json()["model"] == "alias"
    for body in ({**TEXT, "model": ""}, {**TEXT, "model": None}, {k: v for k, v in TEXT.items() if k != "model"}):
        assert server.post("/v1/completions", body).json()["model"] == "tiny"


def test_a2_request_id_in_and_out(server):
    r = server.post("/v1/completions", TEXT, headers={"x-request-id": "abc-1"})
    assert r.headers["x-request-id"] == "abc-1" and r.json()["id"] == "cmpl-abc-1"
    r = server.post("/v1/completions", TEXT, headers={"x-request-id": "no spaces allowed"})
    assert r.status_code == 200 and " " not in r.headers["x-request-id"]
    assert server.post("/v1/completions", {**TEXT, "request_id": "mine"}).json()["id"] == "cmpl-mine"


def test_a2_one_id_used_twice_at_once_serves_both(server):
    streams = [
        server.api.completions.create(
            model="tiny", prompt="endless", max_tokens=300, stream=True, extra_headers={"x-request-id": "same"}
        )
        for _ in range(2)
    ]
    texts = ["".join(c.choices[0].text for c in s) for s in streams]
    assert texts == ["la " * 100] * 2


# --- A.3 the shape of a chat stream -----------------------------------------------------------------------------------


def test_a3_first_middle_and_last_chunk(server):
    events = server.events("/v1/chat/completions", CHAT)
    first, *middle, last = [e["choices"][0] for e in events]
    assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
    assert all(set(c["delta"]) == {"content"} and c["finish_reason"] is None for c in middle)
    assert last["finish_reason"] == "stop" and last["delta"] == {}
    assert "".join(c["delta"]["content"] for c in middle) == "Hello there, 世界."


def test_a3_choices_interleave_one_per_chunk(server):
    events = server.events("/v1/chat/completions", {**CHAT, "n": 3})
    assert all(len(e["choices"]) == 1 for e in events)
    order = [e["choices"][0]["index"] for e in events]
    assert order != sorted(order) and set(order) == {0, 1, 2}
    text, ends, roles = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for e in events:
        c = e["choices"][0]
        assert not ends[c["index"]]
        text[c["index"]] += c["delta"].get("content", "")
        roles[c["index"]] += "role" in c["delta"]
        ends[c["index"]] += c["finish_reason"] is not None
    assert text == ["Hello there, 世界.", "1Hello there, 世界.", "2Hello there, 世界."]
    assert ends == roles == [1, 1, 1]


def test_a3_usage_chunk_when_asked_for(server):
    events = server.events("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    *chunks, usage = events
    assert usage["choices"] == [] and all(c["usage"] is None for c in chunks)
    n = len("Hello there, 世界.".encode()) + 1
    prompt = len("<s>user:hi|assistant:")
    assert usage["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": n,
        "total_tokens": prompt + n,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert all("usage" not in e for e in server.events("/v1/chat/completions", CHAT))


def test_a3_continuous_usage_counts_up(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.events("/v1/completions", {**TEXT, "stream_options": options})
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == len("Hello, wörld!".encode()) + 1


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "more", [{}, {"stop": ["wö", "zz"]}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1}]
)
def test_a3_concatenated_stream_is_the_whole_answer(server, n, more):
    body = {**TEXT, "n": n, "seed": 3, **more}
    whole = server.post("/v1/completions", body).json()
    events = server.events("/v1/completions", body)
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if "logprobs" in more:
            for name in choice["logprobs"]:
                assert [x for c in mine for x in (c["logprobs"] or {name: []})[name]] == choice["logprobs"][name]


# --- A.4 finish_reason ------------------------------------------------------------------------------------------------


def test_a4_stop_length_and_stop_reason(server):
    def ends(**kw):
        c = server.post("/v1/completions", {**TEXT, **kw}).json()["choices"][0]
        return c["text"], c["finish_reason"], c["stop_reason"]

    assert ends() == ("Hello, wörld!", "stop", None)
    assert ends(max_tokens=4) == ("Hell", "length", None)
    assert ends(stop=", ") == ("Hello", "stop", ", ")
    assert ends(stop_token_ids=[ord("o")]) == ("Hell", "stop", ord("o"))
    # the context holds 400 tokens, 8 of them the prompt ("endless" and BOS)
    text, finish, _ = ends(prompt="endless", max_tokens=1000)
    assert (len(text), finish) == (392, "length")


def test_a4_a_failure_is_no_finish_reason(server):
    problem(server.post("/v1/completions", {**TEXT, "prompt": "fails"}), 500, None, "the device failed: 42")


# --- A.5 prompts, n, echo ---------------------------------------------------------------------------------------------


def test_a5_four_forms_of_prompt_and_the_order_of_choices(server):
    def texts(prompt, **kw):
        choices = server.post("/v1/completions", {**TEXT, "prompt": prompt, **kw}).json()["choices"]
        assert [c["index"] for c in choices] == list(range(len(choices)))
        return [c["text"] for c in choices]

    assert texts("xy") == ["xy"] and texts([120, 121]) == ["xy"]
    assert texts(["xy", "z"]) == ["xy", "z"] and texts([[120, 121], [122]]) == ["xy", "z"]
    assert texts(["xy", "z"], n=2) == ["xy", "1xy", "z", "1z"]
    r = server.post("/v1/completions", {**TEXT, "prompt": ["xy", "z"], "n": 2}).json()
    assert r["usage"]["prompt_tokens"] == 3 + 2 and r["usage"]["completion_tokens"] == 3 + 4 + 2 + 3


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], ["a", [1]], [1, "a"], [1, [2]], 5, {"a": 1}, None, [True], [1.5]]
)
def test_a5_bad_prompts_are_400(server, prompt):
    problem(server.post("/v1/completions", {**TEXT, "prompt": prompt}), 400, "prompt")


def test_a5_a_missing_prompt_and_foreign_ids_are_400(server):
    problem(server.post("/v1/completions", {"model": "tiny"}), 400, "prompt", "required")
    problem(server.post("/v1/completions", {**TEXT, "prompt": [1, 260]}), 400, "prompt", "260")
    problem(server.post("/v1/completions", {**TEXT, "prompt": [-1]}), 400, "prompt")


def test_a5_echo_without_new_tokens(server):
    r = server.post("/v1/completions", {**TEXT, "echo": True, "max_tokens": 0, "logprobs": 1}).json()
    c = r["choices"][0]
    assert c["text"] == "hello" and c["finish_reason"] == "length" and r["usage"]["completion_tokens"] == 0
    assert c["logprobs"]["tokens"] == ["<s>", *"hello"]
    assert c["logprobs"]["token_logprobs"] == [None] + [HALF] * 5
    assert c["logprobs"]["top_logprobs"] == [None, *({x: HALF} for x in "hello")]
    assert (
        server.post("/v1/completions", {**TEXT, "echo": True, "max_tokens": 0}).json()["choices"][0]["text"] == "hello"
    )
    problem(server.post("/v1/completions", {**TEXT, "max_tokens": 0}), 400, "max_tokens")


def test_a5_lm_eval_scoring_request(server):
    """lm-eval's own reading: slices [ctxlen:-1] and exact equality of the two fields."""
    context, continuation = list(b"ab"), list(b"cde")
    ids = [context + continuation, [*context, EOS]]
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    for c in server.post("/v1/completions", {"model": "tiny", **body}).json()["choices"]:
        lp = c["logprobs"]
        assert len(lp["tokens"]) == len(ids[c["index"]]) + 1
        scored = lp["token_logprobs"][2:-1]
        assert len(scored) == len(ids[c["index"]]) - 2
        for value, top in zip(scored, lp["top_logprobs"][2:-1], strict=True):
            assert value == max(top.values())


@pytest.mark.parametrize("field,value", [("prompt_embeds", "AAAA"), ("vllm_xargs", {"a": 1})])
def test_a5_unimplemented_fields_are_named(server, field, value):
    problem(server.post("/v1/completions", {**TEXT, field: value}), 400, field, "not implemented")


def test_a5_prompt_logprobs(server):
    problem(server.post("/v1/completions", {**TEXT, "prompt_logprobs": 1, "stream": True}), 400, "prompt_logprobs")
    r = server.post("/v1/completions", {**TEXT, "prompt_logprobs": 2}).json()
    first, second, *_ = r["choices"][0]["prompt_logprobs"]
    assert first is None and r["choices"][0]["logprobs"] is None
    assert second["104"] == {"logprob": HALF, "rank": 1, "decoded_token": "h"} and len(second) == 2
    r = server.post("/v1/chat/completions", {**CHAT, "prompt_logprobs": 0}).json()
    assert r["prompt_logprobs"][1]["115"] == {"logprob": HALF, "rank": None, "decoded_token": "s"}


# --- A.6 log-probabilities --------------------------------------------------------------------------------------------


def test_a6_chat_logprobs(server):
    r = server.api.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    content = r.choices[0].logprobs.content
    assert content[0].token == "H" and content[0].bytes == [72] and content[0].logprob == HALF
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [
        ("H", HALF),
        ("I", math.log(0.25)),
        ("J", math.log(0.125)),
    ]
    assert content[13].bytes == [0xE4]  # a third of 世
    assert r.choices[0].logprobs.refusal is None
    assert len(content) == r.usage.completion_tokens


def test_a6_chat_top_logprobs_rules(server):
    problem(server.post("/v1/chat/completions", {**CHAT, "top_logprobs": 2}), 400, "top_logprobs")
    assert server.post("/v1/chat/completions", {**CHAT, "top_logprobs": 0}).status_code == 200
    problem(
        server.post("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}), 400, "top_logprobs", "20"
    )
    r = server.post("/v1/chat/completions", {**CHAT, "logprobs": True}).json()
    assert r["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a6_completion_logprobs_count_the_chosen_token_in(server):
    lp = server.post("/v1/completions", {**TEXT, "prompt": "unlikely", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert lp["tokens"] == ["x", "y", "z", "</s>"]
    assert lp["top_logprobs"][0] == {"x": HALF, "y": math.log(0.25)}
    # the second token was an unlikely draw: k + 1 entries
    assert lp["top_logprobs"][1] == {
        "\ufffd": HALF,
        "token_id:129": math.log(0.25),
        "y": math.log(0.01),
    }
    assert lp["token_logprobs"][1] == lp["top_logprobs"][1]["y"]
    assert lp["text_offset"] == [0, 1, 2, 3]
    lp = server.post("/v1/completions", {**TEXT, "prompt": "unlikely", "logprobs": 0}).json()["choices"][0]["logprobs"]
    assert lp["top_logprobs"][:2] == [{"x": HALF}, {"y": math.log(0.01)}]
    problem(server.post("/v1/completions", {**TEXT, "logprobs": 21}), 400, "logprobs")
    problem(server.post("/v1/completions", {**TEXT, "logprobs": True}), 400, "logprobs")


def test_a6_minus_infinity_is_a_number(server):
    lp = server.post("/v1/completions", {**TEXT, "logprobs": 6}).json()["choices"][0]["logprobs"]
    assert min(lp["top_logprobs"][0].values()) == -9999.0


def test_a6_equal_token_texts_keep_both_entries(server):
    lp = server.post("/v1/completions", {**TEXT, "prompt": "dup", "logprobs": 1}).json()["choices"][0]["logprobs"]
    assert lp["tokens"] == ["a", "a", "ab", "</s>"] and lp["text_offset"] == [0, 1, 2, 4]
    body = {**TEXT, "prompt": "dup", "logprobs": 1, "return_tokens_as_token_ids": True}
    lp = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert lp["tokens"] == ["token_id:97", "token_id:259", "token_id:258", "token_id:257"]
    assert lp["top_logprobs"][1] == {"token_id:259": HALF}


def test_a6_offsets_count_characters_after_echo(server):
    body = {**TEXT, "prompt": "hello", "echo": True, "logprobs": 0}
    c = server.post("/v1/completions", body).json()["choices"][0]
    assert c["text"] == "helloHello, wörld!"
    # BOS has no text; then h e l l o, then H e l l o , space w; both bytes of ö start at 13; r l d ! EOS
    assert c["logprobs"]["text_offset"] == [0, 0, 1, 2, 3, 4, *range(5, 13), 13, 13, 14, 15, 16, 17, 18]


# --- A.7 stop and text ------------------------------------------------------------------------------------------------


def test_a7_stop_forms(server):
    def text(**kw):
        return server.post("/v1/completions", {**TEXT, **kw}).json()["choices"][0]["text"]

    assert text(stop="wö") == "Hello, " and text(stop=["zzz", "lo"]) == "Hel"
    assert text(stop="lo", include_stop_str_in_output=True) == "Hello"
    assert text(stop=None) == "Hello, wörld!" and text(stop=[]) == "Hello, wörld!"
    assert text(min_tokens=8, stop_token_ids=[ord("e")]) == "Hello, wörld!"
    assert text(max_tokens=17, ignore_eos=True) == "Hello, wörld!He"
    assert text(skip_special_tokens=False) == "Hello, wörld!</s>"
    for bad in ("", [""], ["a", ""]):
        problem(server.post("/v1/completions", {**TEXT, "stop": bad}), 400, "stop", "empty")
    for bad in (5, [5], {"a": 1}, True):
        problem(server.post("/v1/completions", {**TEXT, "stop": bad}), 400, "stop")


def test_a7_min_tokens_beyond_max_tokens(server):
    problem(server.post("/v1/completions", {**TEXT, "min_tokens": 51}), 400, "min_tokens")
    problem(server.post("/v1/completions", {"prompt": "hello", "min_tokens": 17}), 400, "min_tokens", "16")


def test_a7_characters_arrive_whole(server):
    events = server.events("/v1/completions", {**TEXT, "prompt": "halves", "return_token_ids": True})
    assert [e["choices"][0]["text"] for e in events if e["choices"][0]["text"]] == ["世", "\ufffd"]
    ids = [i for e in events for i in e["choices"][0]["token_ids"]]
    assert ids == [0xE4, 0xB8, 0x96, 0xE4, 0xB8, EOS]


# --- A.8 sampling -----------------------------------------------------------------------------------------------------

RANGES = {
    "temperature": (-0.1, 101, "1", True, [1]),
    "top_p": (0, 1.1, -1, "x"),
    "top_k": (-2, 1.5, "5"),
    "min_p": (-0.1, 1.1),
    "frequency_penalty": (-2.1, 2.1),
    "presence_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, -1),
    "typical_p": (0, 1.1, "x"),
    "no_repeat_ngram_size": (-1, 51, 1.5),
    "dry_multiplier": (-1, "x"),
    "dry_base": (0.5,),
    "dry_allowed_length": (0, 1.5),
    "dry_penalty_last_n": (-2,),
    "xtc_probability": (-0.1, 1.1),
    "xtc_threshold": (-0.1, 1.1),
    "bad_words": ("x", [""], [" "], [5], ["x" * 600], ["x"] * 600),
    "processors": ("x", {"x": 1}, {"x": ["1"]}, {"x": [0] * 9}),
    "steer": ("x", {"x": 1}, {"x": ["1"]}),
    "allowed_token_ids": ([], [260], [-1], "x", [1.5]),
    "seed": (2**64, -(2**63) - 1, 1.5, "1"),
    "n": (0, -1, 129, 1.5, "2"),
    "max_tokens": (-1, 1.5, "16"),
    "min_tokens": (-1,),
    "priority": ("high", 1.5),
    "stream": ("yes", 1),
    "logit_bias": ([], {"a": 1}, {"1": "x"}, {"999": 1}, {"-1": 1}),
    "stop_token_ids": ([260], [-1], "x"),
    "cache_salt": ("", "x" * 129),
    "stream_options": (5, "x"),
    "model": (5,),
    "prompt_logprobs": (-1, 21),
}


@pytest.mark.parametrize("field,value", [(f, v) for f, values in RANGES.items() for v in values])
def test_a8_out_of_range_is_400_naming_the_field(server, field, value):
    r = server.post("/v1/completions", {**TEXT, field: value})
    assert r.status_code == 400, r.text
    assert r.json()["error"]["param"].split(".")[0] == field


def test_a8_values_reach_the_engine(server):
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "frequency_penalty": 0.5}
    values |= {"presence_penalty": -0.5, "repetition_penalty": 1.1, "seed": 42}
    body = {**TEXT, **values, "logit_bias": {"5": 300, "6": -1.5, "7": -300}, "priority": -2, "cache_salt": "s"}
    assert server.post("/v1/completions", {**body, "n": 2, "max_tokens": 16.0}).status_code == 200
    request = server.engine.requests[-1]
    assert {k: getattr(request.sampling, k) for k in values} == values
    assert request.sampling.logit_bias == ((5, 100.0), (6, -1.5), (7, -100.0))
    assert (request.priority, request.salt, request.n, request.stop.max_tokens) == (-2, "s", 2, 16)
    assert server.post("/v1/completions", {**TEXT, "seed": None}).status_code == 200
    assert server.engine.requests[-1].sampling.seed is None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a8_rare_values_reach_the_engine(server, path):
    """Tokens are bytes here, so " ab" ends like "ab" and is not listed beside it."""
    values = {"typical_p": 0.5, "no_repeat_ngram_size": 3, "dry_multiplier": 0.8, "dry_base": 1.5}
    values |= {"dry_allowed_length": 3, "dry_penalty_last_n": 64, "xtc_probability": 0.5, "xtc_threshold": 0.2}
    base = TEXT if path == "/v1/completions" else CHAT
    lists = {"bad_words": [" ab", "c"], "allowed_token_ids": [97, 98], "dry_sequence_breakers": [".", "xy"]}
    lists["processors"] = {"mine": [1, 2.5], "other": []}
    lists["steer"] = {"layers.3": [0.5, -1]}
    r = server.post(path, {**base, **values, **lists})
    assert r.status_code == 200 and "x-fnengine-ignored" not in r.headers, r.text
    sampling = server.engine.requests[-1].sampling
    assert {k: getattr(sampling, k) for k in values} == values
    assert sampling.bad_words == ((97, 98), (99,)) and sampling.allowed_token_ids == (97, 98)
    assert server.engine.requests[-1].steer == {"layers.3": [0.5, -1.0]}
    assert sampling.dry_sequence_breakers == (46, 121)
    assert sampling.processors == (("mine", (1, 2.5)), ("other", ()))
    assert server.post(path, {**base, "dry_multiplier": 1}).status_code == 200
    assert bytes(server.engine.requests[-1].sampling.dry_sequence_breakers) == b'\n:"*'
    for breakers in ([""], ["x"] * 33, "x"):
        bad = server.post(path, {**base, "dry_multiplier": 1, "dry_sequence_breakers": breakers})
        problem(bad, 400, "dry_sequence_breakers")


def test_a8_temperature_zero_with_n_gives_equal_choices(server):
    choices = server.post("/v1/completions", {**TEXT, "temperature": 0, "n": 3}).json()["choices"]
    assert [c["text"] for c in choices] == ["Hello, wörld!"] * 3


def test_a8_max_tokens_rules(server):
    def most(path, body):
        assert server.post(path, body).status_code == 200
        return server.engine.requests[-1].stop.max_tokens

    assert most("/v1/completions", {"prompt": "hello"}) == 16
    assert most("/v1/chat/completions", CHAT) is None
    assert most("/v1/chat/completions", {**CHAT, "max_tokens": 9}) == 9
    assert most("/v1/chat/completions", {**CHAT, "max_tokens": 9, "max_completion_tokens": 5}) == 5
    bad = server.post("/v1/chat/completions", {**CHAT, "max_completion_tokens": 0})
    problem(bad, 400, "max_completion_tokens")


def test_a8_a_prompt_longer_than_the_context_names_both_numbers(server):
    for n in (400, 500):
        error = problem(server.post("/v1/completions", {**TEXT, "prompt": [5] * n}), 400, "prompt", str(n))
        assert "400" in error["message"] and error["type"] == "BadRequestError" and error["code"] == 400
    assert server.post("/v1/completions", {**TEXT, "prompt": [5] * 399}).status_code == 200
    problem(server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 400}]}), 400, "prompt")


def test_a8_generation_config_supplies_defaults_and_the_request_wins():
    engine = ScriptedEngine(SCRIPTS, defaults={"temperature": 0.6, "top_k": 20, "max_new_tokens": 11})
    with serving(engine) as server:
        server.post("/v1/chat/completions", CHAT)
        server.post("/v1/chat/completions", {**CHAT, "temperature": 0, "top_k": -1, "max_tokens": 5})
    first, second = engine.requests
    assert (first.sampling.temperature, first.sampling.top_k, first.stop.max_tokens) == (0.6, 20, 11)
    assert (second.sampling.temperature, second.sampling.top_k, second.stop.max_tokens) == (0, -1, 5)


# --- messages ---------------------------------------------------------------------------------------------------------


def prompt_of(server, **body):
    r = server.post("/tokenize", body)
    assert r.status_code == 200, r.text
    return bytes(r.json()["tokens"]).decode()


def test_messages_parts_roles_and_tool_turns(server):
    messages = [
        {"role": "developer", "content": "be good"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    rendered = "<s>system:be good|user:ab|assistant:[f{'x': 1}]|tool:7|"
    assert prompt_of(server, messages=messages) == rendered + "assistant:"
    assert prompt_of(server, messages=messages, add_generation_prompt=False) == rendered
    assert prompt_of(server, messages=CHAT["messages"], chat_template_kwargs={"prefix": "!"}).startswith("!<s>")


def test_messages_continue_final(server):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Sure"}]
    assert prompt_of(server, messages=messages, continue_final_message=True) == "<s>user:hi|assistant:Sure"
    for body in (
        {"messages": messages, "continue_final_message": True, "add_generation_prompt": True},
        {"messages": CHAT["messages"], "continue_final_message": True},
    ):
        problem(server.post("/v1/chat/completions", body), 400, "continue_final_message")


BAD_MESSAGES = [
    ([], "messages"),
    ("hi", "messages"),
    ([5], "messages.0"),
    ([{"role": "king", "content": "x"}], "messages.0.role"),
    ([{"content": "x"}], "messages.0.role"),
    ([{"role": "user"}], "messages.0.content"),
    ([{"role": "user", "content": 5}], "messages.0.content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content.0.type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0"),
    ([{"role": "user", "content": ["x"]}], "messages.0.content.0"),
    ([{"role": "assistant", "tool_calls": [{}]}], "messages.0.tool_calls.0.function.name"),
    (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "messages.0.tool_calls.0.function.arguments",
    ),
]


@pytest.mark.parametrize("messages,param", BAD_MESSAGES)
def test_messages_bad_ones_are_400_and_say_where(server, messages, param):
    problem(server.post("/v1/chat/completions", {"messages": messages}), 400, param)


def test_messages_template_error_is_400(server):
    body = {**CHAT, "chat_template_kwargs": {"fail": True}}
    problem(server.post("/v1/chat/completions", body), 400, "messages", "the chat template says: no")
    for name in ("messages", "tokenize", "a b"):
        body = {**CHAT, "chat_template_kwargs": {name: 1}}
        problem(server.post("/v1/chat/completions", body), 400, "chat_template_kwargs")


CHAT_REFUSED = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tools", []),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("thinking_token_budget", 5),
    ("functions", [{}]),
    ("guided_json", 5),
    ("beam_width", 3),
    ("best_of", 2),
    ("suffix", "x"),
    ("stop_regex", "(?=x)"),
    ("audio", {"voice": "x"}),
    ("modalities", ["text", "audio"]),
    ("logits_processors", ["x"]),
    ("top_n_sigma", 1.5),
    ("chat_template", "{{ 1 }}"),
    ("echo", True),
    ("prompt", "x"),
]


@pytest.mark.parametrize("field,value", CHAT_REFUSED)
def test_unimplemented_chat_fields_are_400_and_named(server, field, value):
    problem(server.post("/v1/chat/completions", {**CHAT, field: value}), 400, field)


def test_neutral_values_of_unimplemented_fields_are_fine(server):
    neutral = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "use_beam_search": False}
    neutral |= {"modalities": ["text"], "logits_processors": None, "functions": None, "audio": None, "best_of": 1}
    r = server.post("/v1/chat/completions", {**CHAT, **neutral})
    assert r.status_code == 200 and "x-fnengine-ignored" not in r.headers


# --- A.11 usage -------------------------------------------------------------------------------------------------------


def test_a11_usage_counts_bos_and_cached_tokens(server):
    usage = server.api.completions.create(**TEXT).usage
    assert usage.prompt_tokens == 6 and usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens == 15 and usage.total_tokens == 21


# --- A.12 errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b'{"temperature": Infinity, "prompt": "x"}',
        b"[" * 100000,
        b'{"seed": ' + b"9" * 5000 + b', "prompt": "x"}',
        b'{"prompt": "\\ud800"}',
    ],
)
def test_a12_malformed_bodies_are_400(server, raw):
    problem(server.http.post("/v1/completions", content=raw), 400)
    problem(server.http.post("/v1/chat/completions", content=raw), 400)


def test_a12_unknown_model_route_and_method(server):
    error = problem(server.post("/v1/completions", {**TEXT, "model": "gpt-9"}), 404, "model", "gpt-9")
    assert error["type"] == "NotFoundError" and "tiny" in error["message"]
    problem(server.http.get("/v1/nothing"), 404)
    problem(server.http.get("/v1/models/nothing/at/all"), 404, "model")
    error = problem(server.http.get("/v1/completions"), 405)
    assert error["type"] == "MethodNotAllowedError"
    with pytest.raises(openai.NotFoundError):
        server.api.chat.completions.create(model="gpt-9", messages=CHAT["messages"])


def test_a12_too_large_a_body():
    with serving(ScriptedEngine(SCRIPTS), max_body=1000) as server:
        problem(server.post("/v1/completions", {**TEXT, "prompt": "x" * 1000}), 413)

        def parts():
            for _ in range(20):
                yield b"x" * 100

        problem(server.http.post("/v1/completions", content=parts()), 413)
        assert server.post("/v1/completions", TEXT).status_code == 200


def test_a12_a_full_queue_is_429_with_retry_after():
    with serving(ScriptedEngine(SCRIPTS, queue=1, pace=0.005)) as server:
        busy = server.api.completions.create(model="tiny", prompt="endless", max_tokens=300, stream=True)
        next(iter(busy))
        r = server.post("/v1/completions", TEXT)
        assert problem(r, 429)["type"] == "RateLimitError" and r.headers["retry-after"] == "3"
        with pytest.raises(openai.RateLimitError):
            server.api.completions.create(**TEXT)
        busy.close()
        server.quiet()
        # of three prompts none is served when one is refused
        problem(server.post("/v1/completions", {**TEXT, "prompt": ["a", "b", "c"]}), 429)


def test_a12_an_answer_beyond_answer_memory_is_400_alone_and_503_in_company():
    """By hand: 512 bytes a token and 48 a token of the prompt; 100,000 for one answer, 200,000 for all."""

    def asked(tokens):
        return {"model": "tiny", "prompt": "endless", "max_tokens": tokens}

    with serving(ScriptedEngine(SCRIPTS, pace=0.005), answer_bytes=100_000) as server:
        error = problem(server.post("/v1/completions", asked(300)), 400, word="--answer-memory")
        assert "stream it" in error["message"]
        assert len(server.events("/v1/completions", asked(300))) == 300, "what is streamed is not held"
        codes, bodies = [], []

        def ask():
            r = httpx.post(f"{server.url}/v1/completions", json=asked(180), timeout=20)
            codes.append(r.status_code)
            bodies.append(r.text)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert sorted(codes) == [200, 200, 503], bodies  # 3 x 92,160 do not fit, 2 do
        assert "--answer-memory" in bodies[codes.index(503)]
        server.quiet()
        for _ in range(3):  # what they held came back
            assert server.post("/v1/completions", asked(180)).status_code == 200


def test_a12_a_fault_in_the_server_shows_no_stack_and_is_not_retried(server, monkeypatch):
    def broken(request):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.engine, "submit", broken)
    r = server.post("/v1/completions", TEXT)
    problem(r, 500)
    assert "secret" not in r.text and "Traceback" not in r.text and r.headers["x-should-retry"] == "false"


def test_a12_an_engine_that_cannot_serve_is_503(server):
    server.engine.why = "the loop ended"
    problem(server.post("/v1/completions", TEXT), 503, None, "the loop ended")
    problem(server.http.get("/health"), 503, None, "the loop ended")


# --- A.13 other endpoints ---------------------------------------------------------------------------------------------


def test_a13_models(server):
    data = server.http.get("/v1/models").json()
    assert data["object"] == "list" and [m["id"] for m in data["data"]] == ["tiny", "alias"]
    card = data["data"][0]
    assert card["object"] == "model" and card["max_model_len"] == 400 and card["root"] == "tiny"
    assert set(card) >= {"id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"}
    assert server.http.get("/v1/models/alias").json()["id"] == "alias"
    assert [m.id for m in server.api.models.list()] == ["tiny", "alias"]


def test_a13_health_ping_version_load(server):
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        r = server.http.request(method, path)
        assert r.status_code == 200 and r.content == b""
    assert set(server.http.get("/version").json()) == {"version"}
    assert server.http.get("/load").json() == {"server_load": 0}


def test_a13_tokenize_and_detokenize(server):
    r = server.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert r == {
        "count": 4,
        "max_model_len": 400,
        "tokens": [BOS, 104, 0xC3, 0xA9],
        "token_strs": ["<s>", "h", "\ufffd", "\ufffd"],
    }
    r = server.post("/tokenize", {"prompt": "hé", "add_special_tokens": False}).json()
    assert r["tokens"] == [104, 0xC3, 0xA9] and r["token_strs"] is None
    assert server.post("/detokenize", {"tokens": [BOS, 104, 0xC3, 0xA9]}).json() == {"prompt": "<s>hé"}
    problem(server.post("/detokenize", {"tokens": [260]}), 400, "tokens")
    problem(server.post("/detokenize", {"tokens": "x"}), 400, "tokens")
    problem(server.post("/tokenize", {}), 400, "prompt")
    problem(server.post("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}), 400, "prompt")
    problem(server.post("/tokenize", {"prompt": "x", "model": "no"}), 404, "model")


def test_a13_metrics(server):
    server.post("/v1/completions", TEXT)
    r = server.http.get("/metrics")
    assert r.headers["content-type"].startswith("text/plain")
    lines = dict(x.rsplit(" ", 1) for x in r.text.splitlines() if not x.startswith("#"))
    label = '{engine="0",model_name="tiny"}'
    assert float(lines[f"fnengine:kv_cache_usage_perc{label}"]) == 0.25
    assert float(lines[f"fnengine:kv_cache_waste_perc{label}"]) == 0.125
    assert float(lines[f"fnengine:prefix_cache_hits_total{label}"]) == 4
    assert float(lines[f"fnengine:generation_tokens_total{label}"]) > 0
    ended = 'fnengine:request_success_total{engine="0",finished_reason="stop",model_name="tiny"}'
    assert float(lines[ended]) >= 1
    assert "vllm:" not in r.text


def test_a13_reset_prefix_cache(server):
    before = server.engine.resets
    assert server.http.post("/reset_prefix_cache").status_code == 200 and server.engine.resets == before + 1


def test_a13_keys():
    with serving(ScriptedEngine(SCRIPTS), key="right", api_keys=["other", "right"]) as server:
        assert server.post("/v1/completions", TEXT).status_code == 200
        bare = httpx.Client(base_url=server.url)
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}, {"authorization": ""}):
            for method, path in (
                ("POST", "/v1/completions"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/nope"),
            ):
                r = bare.request(method, path, headers=headers)
                assert problem(r, 401)["code"] == "invalid_api_key" and r.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ping", "/version"):
            assert bare.get(path).status_code == 200
        assert bare.options("/v1/completions").status_code == 405
        assert bare.get("/v1/models", headers={"authorization": "bearer other"}).status_code == 200
        bare.close()
        with pytest.raises(openai.AuthenticationError):
            server.api.with_options(api_key="wrong").models.list()


def test_graphs_are_reported_with_their_hits_padding_and_fallbacks(server, capsys, tmp_path):
    """Oracle: sums by hand. Two steps in (4, 4), of 3 and 4 tokens, one in (64, 7), of 50; one that was too large."""
    assert server.http.get("/debug/graphs").status_code == 404
    assert "graph_hits" not in server.http.get("/metrics").text
    usage = Usage()
    for bucket, bytes in ((Bucket(4, 4), 1000), (Bucket(64, 7), 5000)):
        usage.capture(bucket, bytes, 0.25)
    usage.add(3, 3, bucket=Bucket(4, 4), seconds=0.01, relaxed="more was asked")
    usage.add(4, 4, bucket=Bucket(4, 4), seconds=0.01)
    usage.add(50, 6, bucket=Bucket(64, 7), seconds=0.02)
    usage.add(900, 2, reason="beyond the ladder", seconds=0.1)
    server.engine.captured = {"about": "FULL, by hand", **report.as_json(usage)}
    try:
        told = server.http.get("/debug/graphs").json()
        assert told["about"] == "FULL, by hand" and told["steps"] == 4
        assert [(b["bucket"], b["steps"], b["tokens"]) for b in told["buckets"]] == [([4, 4], 2, 7), ([64, 7], 1, 50)]
        lines = set(server.http.get("/metrics").text.splitlines())
        of = 'engine="0",model_name="tiny"'
        assert lines >= {
            f'fnengine:graph_hits_total{{bucket="4x4",{of}}} 2.0',
            f'fnengine:graph_tokens_total{{bucket="64x7",{of}}} 50.0',
            f'fnengine:graph_padding_tokens_total{{bucket="4x4",{of}}} 1.0',
            f'fnengine:graph_padding_tokens_total{{bucket="64x7",{of}}} 14.0',
            f'fnengine:graph_fallbacks_total{{{of},reason="beyond the ladder"}} 1.0',
            f'fnengine:graph_relaxed_total{{{of},reason="more was asked"}} 1.0',
            f"fnengine:graphs_captured{{{of}}} 2.0",
            f"fnengine:graph_bytes{{{of}}} 6000.0",
            f"fnengine:graph_capture_seconds{{{of}}} 0.5",
        }
        (tmp_path / "before.json").write_text(json.dumps(told))
        page = tmp_path / "page.html"
        words = [
            "graphs",
            "report",
            "--url",
            server.url,
            "--html",
            str(page),
            "--before",
            str(tmp_path / "before.json"),
        ]
        assert cli(words) == 0
        out = capsys.readouterr().out
        assert out.startswith("FULL, by hand\n") and "beyond the ladder" in out and "64 x 7" in out
        assert page.read_text().count("<svg") == 1 and "4 x 4" in page.read_text()
    finally:
        server.engine.captured = None


def test_a13_metrics_without_a_key_by_option():
    engine = ScriptedEngine(SCRIPTS)
    with serving(engine, key="k", api_keys=["k"], metrics_open=True, metrics=("fnengine", "vllm")) as server:
        text = httpx.get(f"{server.url}/metrics").text
        assert "vllm:num_requests_running" in text and "fnengine:num_requests_running" in text


def test_a13_browsers():
    with serving(ScriptedEngine(SCRIPTS), key="k", api_keys=["k"], allowed_origins=["http://a.example"]) as server:
        ask = {"origin": "http://a.example", "access-control-request-method": "POST"}
        r = httpx.options(f"{server.url}/v1/completions", headers=ask)
        assert r.status_code == 200 and r.headers["access-control-allow-origin"] == "http://a.example"
        r = server.post("/v1/completions", TEXT, headers={"origin": "http://a.example"})
        assert r.headers["access-control-allow-origin"] == "http://a.example"


def test_a13_unknown_fields_are_named_in_a_header(server):
    r = server.post("/v1/completions", {**TEXT, "zeta": 1, "frobnicate": None, "user": "me", "é\n,": 2})
    assert r.status_code == 200 and r.headers["x-fnengine-ignored"] == "frobnicate, user, zeta, \\u00e9\\n\\u002c"
    r = server.post("/v1/completions", {**TEXT, "stream": True, "stream_options": {"odd": 1}})
    assert r.headers["x-fnengine-ignored"] == "stream_options.odd"
    assert "x-fnengine-ignored" not in server.post("/v1/completions", TEXT).headers


def test_a13_unknown_fields_are_refused_in_strict_mode():
    with serving(ScriptedEngine(SCRIPTS), strict=True) as server:
        problem(server.post("/v1/completions", {**TEXT, "frobnicate": 1}), 400, "frobnicate")
        assert server.post("/v1/completions", {**TEXT, "user": "me"}).status_code == 200


# --- a client that goes away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_a13_a_client_that_goes_away_aborts_within_a_step(n, stream):
    engine = ScriptedEngine(SCRIPTS, pace=0.02, max_len=100000)
    with serving(engine) as server:
        body = json.dumps({**TEXT, "prompt": ["endless", "endless"], "max_tokens": 5000, "n": n, "stream": stream})
        host, port = server.url.removeprefix("http://").split(":")
        sock = socket.create_connection((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body.encode())
        while len(engine.live) < 2:
            time.sleep(0.001)
        time.sleep(0.05)
        before = engine.steps
        sock.close()
        while engine.live and engine.steps < before + 20:
            time.sleep(0.001)
        assert len(engine.aborted) == 2 and not engine.live
        assert max(at for _, at in engine.aborted) <= before + 1
        ended = 'fnengine:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 2.0'
        assert ended in server.http.get("/metrics").text.splitlines()


def test_a13_abort_requests(server):
    with serving(ScriptedEngine(SCRIPTS, pace=0.005, max_len=100000)) as slow:
        stream = slow.api.completions.create(
            model="tiny", prompt="endless", max_tokens=5000, stream=True, extra_headers={"x-request-id": "kill-me"}
        )
        first = next(iter(stream))
        r = slow.post("/abort_requests", {"request_ids": [first.id, "unknown"]})
        assert r.json() == {"aborted": [first.id]}
        with pytest.raises(openai.APIError, match="aborted"):
            list(stream)
        slow.quiet()
        got = []
        body = {"prompt": "endless", "max_tokens": 5000, "request_id": "kill-me"}
        waiting = threading.Thread(target=lambda: got.append(httpx.post(f"{slow.url}/v1/completions", json=body)))
        waiting.start()
        while not slow.engine.live:
            time.sleep(0.001)
        slow.post("/abort_requests", {"request_ids": ["kill-me"]})
        waiting.join()
        problem(got[0], 503, None, "aborted")
        assert got[0].headers["x-should-retry"] == "false"  # or the client would start it again
        slow.quiet()
        assert slow.post("/abort_requests", {"request_ids": ["kill-me"]}).json() == {"aborted": []}
    problem(server.post("/abort_requests", {}), 400, "request_ids")


def test_a13_shutdown_finishes_or_cuts_what_runs():
    """With time the stream ends by itself; without it ends with an error event and [DONE]."""
    for timeout, expected in ((5.0, "finish"), (0.0, "cut")):
        engine, lines = ScriptedEngine(SCRIPTS, pace=0.01), []
        ready, stop, url = threading.Event(), threading.Event(), []
        thread = threading.Thread(
            target=lambda e=engine, r=ready, s=stop, u=url, t=timeout: serve(
                e, sock=bind("127.0.0.1", 0), on_ready=lambda x: (u.append(x), r.set()), stop=s, shutdown_timeout=t
            )
        )
        thread.start()
        assert ready.wait(10)
        body = {**TEXT, "prompt": "endless", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{url[0]}/v1/completions", json=body, timeout=20) as r:
            for line in r.iter_lines():
                lines += [line] if line else []
                stop.set()
        thread.join(10)
        assert not thread.is_alive() and not engine.live
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2][6:])
        if expected == "finish":
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert "shutting down" in last["error"]["message"]


def test_a13_sigterm_exits_with_0_and_finishes_what_runs(tmp_path):
    """A process of its own: 0 is the exit status after SIGTERM, and the open stream gets its [DONE]."""
    script = tmp_path / "served.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(fnengine.__file__).parent.parent)]!r}\n"
        "from scripted_engine import Script, ScriptedEngine\n"
        "from fnengine.serve.run import bind, serve\n"
        "engine = ScriptedEngine({'endless': Script(tuple(b'la '))}, pace=0.01)\n"
        "ready = lambda url: print(url, flush=True)\n"
        "serve(engine, sock=bind('127.0.0.1', 0), on_ready=ready, shutdown_timeout=5)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        body = {"prompt": "endless", "max_tokens": 50, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as r:
            lines = r.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.stdout.close()
    chunks = [json.loads(line[6:]) for line in [first, *rest[:-1]]]
    assert rest[-1] == "data: [DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(c["choices"][0]["text"] for c in chunks) == "la " * 16 + "la"


def test_stream_interval_makes_fewer_chunks(server):
    with serving(ScriptedEngine(SCRIPTS), stream_interval=4) as fewer:
        events = fewer.events("/v1/completions", TEXT)
        # H; ello; comma, space, w and the two bytes of ö, which come as one; rld!; the end
        assert [len(e["choices"][0]["text"].encode()) for e in events] == [1, 4, 5, 4, 0]
        assert "".join(e["choices"][0]["text"] for e in events) == "Hello, wörld!"


def test_every_route_is_in_the_schema_with_its_body(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    assert len(paths) >= 43
    bodies = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/abort_requests"]
    bodies += ["/v1/embeddings", "/pooling", "/score", "/rerank", "/v1/messages", "/v1/responses"]
    for path in (*bodies, "/v1/messages/count_tokens"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["type"] == "object" and schema["properties"]


def test_an_engine_that_does_not_start_says_why(caplog):
    engine = ScriptedEngine()

    async def start():
        raise ConfigError("no memory for the pool", where="--kv-cache-memory-bytes")

    engine.start = start
    with pytest.raises(ConfigError, match="no memory"):
        serve(engine, sock=bind("127.0.0.1", 0))


# --- the port ---------------------------------------------------------------------------------------------------------


def test_a_port_in_use_says_so():
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=r"in use.*choose another"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="--port"):
        bind("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match="--host"):
        bind("no.such.host.invalid", 0)


def test_a_unix_socket(tmp_path):
    path = str(tmp_path / "s")
    sock = bind("", 0, uds=path)
    with pytest.raises(ConfigError, match="in use"):
        bind("", 0, uds=path)
    sock.close()
    bind("", 0, uds=path).close()  # nobody listens any more: taken over
