"""HTTP to tokens and back over the bundled model, through the official client. Oracle: the functional API."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI

import fnengine as fn
from fnengine.serve.run import bind, serve

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def model():
    return fn.load("demo")


@pytest.fixture(scope="module")
def served(model):
    """(engine, url) of a server on a free port."""
    engine = fn.Engine.build(
        model, max_model_len=512, max_num_seqs=16, enforce_eager=True, max_queue=40, steer=("layers.2",)
    )
    sock = bind("127.0.0.1", 0)
    ready, stop = threading.Event(), threading.Event()
    port = sock.getsockname()[1]
    thread = threading.Thread(
        target=serve,
        args=(engine, "127.0.0.1", port),
        kwargs=dict(sock=sock, on_ready=lambda url: ready.set(), stop=stop),
        daemon=True,
    )
    thread.start()
    assert ready.wait(30)
    yield engine, f"http://127.0.0.1:{port}"
    stop.set()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def client(served):
    engine, url = served
    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client
    wait_idle(engine)
    engine.check()


def wait_idle(engine, seconds=10):
    end = time.monotonic() + seconds
    while (g := engine.gauges()).running or g.waiting or g.blocks_held:
        assert time.monotonic() < end, f"still busy: {g}"
        time.sleep(0.01)


def by_hand(model, prompt, sampling, n, steer=None):
    rt = fn.Runtime(model, max_model_len=512, max_num_seqs=4, enforce_eager=True, steer=("layers.2",))
    seq, new, out = rt.empty, prompt, []
    for _ in range(n):
        seq, token = rt.extend(seq, new, sample=sampling, steer=steer)
        out.append(token)
        new = [token]
    return out


def test_a_seeded_completion_is_the_functional_loop(client, model):
    got = client.completions.create(
        model="demo",
        prompt=STORY,
        max_tokens=24,
        temperature=0.9,
        seed=3,
        extra_body={"top_p": 0.9, "ignore_eos": True},
    )
    expected = by_hand(model, model.encode(STORY), fn.Sampling(temperature=0.9, top_p=0.9, seed=3), 24)
    assert got.choices[0].text == model.decode(expected)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(model.encode(STORY)), 24)


def test_a_steered_request_is_the_functional_loop_and_its_neighbour_is_not_steered(client, model):
    steer = {"layers.2": [0.0, 30.0] * 96}
    prompt = STORY + ", there was a little girl who lived in a big house with a red door."
    greedy = fn.Sampling(temperature=0)
    texts = [model.decode(by_hand(model, model.encode(prompt), greedy, 12, s)) for s in (steer, None)]
    assert texts[0] != texts[1]
    more = {"ignore_eos": True}
    for body, text in (({**more, "steer": steer}, texts[0]), (more, texts[1])) * 2:
        got = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0, extra_body=body)
        assert got.choices[0].text == text
    ask = dict(model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0)
    chats = [client.chat.completions.create(**ask, extra_body=body) for body in ({"steer": steer}, {})]
    assert chats[0].choices[0].message.content != chats[1].choices[0].message.content


def test_streamed_text_is_the_whole_text(client):
    ask = dict(
        model="demo", messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=60, seed=5, temperature=0.7
    )
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_greedy_rule_of_lm_eval(client, model):
    """echo + max_tokens 1 + logprobs 1: equality of token_logprob and the largest of top_logprobs decides."""
    rt = fn.Runtime(model, max_model_len=512, max_num_seqs=4, enforce_eager=True)
    prompt = model.encode(STORY + ", there was a dog.")
    _, logits = rt.extend(rt.empty, prompt, logits="all")
    best = logits.argmax(-1).tolist()
    got = client.completions.create(
        model="demo", prompt=[prompt], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1
    )
    lp = got.choices[0].logprobs
    assert lp.token_logprobs[0] is None and lp.top_logprobs[0] is None
    assert len(lp.token_logprobs) == len(prompt) + 1
    for i in range(1, len(prompt)):
        greedy = lp.token_logprobs[i] == max(lp.top_logprobs[i].values())
        assert greedy == (prompt[i] == best[i - 1])


def test_many_clients_some_of_whom_leave(served):
    engine, url = served
    failures = []

    def visit(i):
        rng = np.random.default_rng(i)
        body = {
            "model": "demo",
            "prompt": STORY[: rng.integers(3, 16)],
            "max_tokens": int(rng.integers(5, 60)),
            "stream": True,
            "seed": i,
        }
        try:
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as r:
                assert r.status_code == 200
                lines = []
                for line in r.iter_lines():
                    lines.append(line)
                    if i % 3 == 0 and len(lines) > rng.integers(0, 20):
                        return
                assert "data: [DONE]" in lines[-2:]
        except Exception as e:
            failures.append(repr(e))

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(90)
    assert not failures
    wait_idle(engine)
    engine.check()


def test_leaving_aborts_within_a_step(served):
    engine, url = served
    body = {"model": "demo", "prompt": STORY, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as r:
        next(r.iter_lines())
        assert engine.gauges().running == 1
    steps = engine.gauges().steps
    wait_idle(engine, 5)
    assert engine.gauges().steps - steps < 100, "it was not generated to its end"


def test_the_prefix_cache_is_reported(client):
    prompt = "The quick brown fox jumps over the lazy dog and runs into the forest, where it meets a bear. " * 2
    ask = dict(model="demo", prompt=prompt, max_tokens=2, temperature=0)
    first = client.completions.create(**ask)
    second = client.completions.create(**ask)
    assert second.usage.prompt_tokens_details.cached_tokens >= 16
    assert second.choices[0].text == first.choices[0].text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": STORY, "temperature": -1}, "temperature"),
        ({"prompt": STORY, "best_of": 3, "n": 4}, "best_of"),
        ({"prompt": STORY, "suffix": "end"}, "suffix"),
        ({"prompt": "", "max_tokens": 3}, "prompt"),
        ({"prompt": [1, 2, 999999]}, "prompt"),
        ({"prompt": STORY, "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"prompt": STORY, "max_tokens": "many"}, "max_tokens"),
        ({"prompt": STORY, "steer": {"layers.3": [0.5] * 192}}, "steer"),
        ({"prompt": STORY, "steer": {"layers.2": [0.5] * 191}}, "steer"),
        ({"prompt": STORY, "steer": {"layers.2": [1e39] * 192}}, "steer"),
        ({"prompt": [5] * 600, "max_tokens": 3}, None),
    ],
)
def test_bad_requests_are_named_and_harmless(client, body, param):
    with pytest.raises(BadRequestError) as e:
        client.post("/completions", body={"model": "demo", **body}, cast_to=object)
    assert param is None or e.value.body["param"] == param, e.value.body
    assert client.completions.create(model="demo", prompt=STORY, max_tokens=1).choices


def test_a_prompt_beyond_the_context_names_both_numbers(client):
    with pytest.raises(BadRequestError, match="600") as e:
        client.completions.create(model="demo", prompt=[5] * 600, max_tokens=3)
    assert "512" in str(e.value)


def test_a_full_queue_is_429_with_retry_after(served):
    engine, url = served
    body = {"model": "demo", "prompt": [STORY] * 4, "n": 16, "max_tokens": 40, "ignore_eos": True}
    r = httpx.post(url + "/v1/completions", json=body, timeout=60)
    assert r.status_code == 429 and float(r.headers["retry-after"]) > 0, r.text
    wait_idle(engine)
    engine.check()


def test_raw_bytes_that_are_no_json(served):
    engine, url = served
    for raw in (b"{", b"\xff\xfe", b'{"prompt": "\xff"}', b"[]", b"null"):
        r = httpx.post(url + "/v1/completions", content=raw, headers={"content-type": "application/json"})
        assert r.status_code == 400 and json.loads(r.text)["error"]["message"]
    with pytest.raises(Exception, match="in use"):
        bind("127.0.0.1", int(url.rsplit(":", 1)[1]))
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as s:
        s.sendall(b"nonsense\r\n\r\n")
        assert b"400" in s.recv(100)
    assert engine.healthy() is None
