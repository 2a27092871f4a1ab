"""Strategies, drafts and predictions over HTTP and from the command line, through the official client.

Oracles: `LLM.generate` of the same prompts, for strategies; the same requests without drafts, for drafts.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
from openai import BadRequestError, InternalServerError, OpenAI

import fnengine as fn
from fnengine import cli
from fnengine.cli import drafts, own, start
from fnengine.config import resolve
from fnengine.decoding import SHIPPED, Bounds, Job, run
from fnengine.decoding.draft_model import DraftModel
from fnengine.decoding.speculate import Stateless
from fnengine.engine import Engine
from fnengine.errors import ConfigError, OutOfBlocks, RequestError
from fnengine.serve.run import bind, serve

STORY = "Once upon a time"
OPTIONS = {"max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True}
ECHO = "The boat went out to sea. The boat went out to sea. The boat"
MINE = '''
import asyncio
import fnengine as fn

@fn.strategy
async def shout(ctx, prompt, word="no", times=1):
    for _ in range(times):
        ctx.emit(ctx.encode(word, add_special=False))
    return "stop"

async def plain(ctx, prompt):
    pass

class Parrot:
    """Repeats the newest token."""
    def start(self, tokens, how):
        return tokens[-1]
    def propose(self, state, k):
        return fn.decoding.speculate.Draft((state,) * k)
    def advance(self, state, tokens):
        return tokens[-1]

class Taps(Parrot):
    taps = ("layers.1",)

class Needs(Parrot):
    def __init__(self, file):
        pass

number = 5
'''


@fn.strategy
async def fails(ctx, prompt, after=3):
    seq, new = ctx.empty, prompt
    for _ in range(after):
        seq, logits = await ctx.extend(seq, new)
        new = [int(logits.argmax())]
        ctx.emit(new)
    raise ValueError("it rained")


@fn.strategy
async def waits(ctx, prompt):
    _, logits = await ctx.extend(ctx.empty, prompt)
    ctx.emit([int(logits.argmax())])
    await asyncio.sleep(60)


@pytest.fixture(scope="module")
def model():
    return fn.load("demo")


@pytest.fixture(scope="module")
def served(model):
    """(engine, url) of a server on a free port."""
    strategies = (SHIPPED["beam"], SHIPPED["best_of"], SHIPPED["sample"], fails, waits)
    engine = Engine.build(model, strategies=strategies, bounds=Bounds(turn=5.0, idle=50.0), **OPTIONS)
    sock, ready, stop = bind("127.0.0.1", 0), threading.Event(), threading.Event()
    port = sock.getsockname()[1]
    options = dict(sock=sock, on_ready=lambda url: ready.set(), stop=stop, metrics=("fnengine", "vllm"))
    thread = threading.Thread(target=serve, args=(engine, "127.0.0.1", port), kwargs=options, daemon=True)
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
    settled(engine)


def settled(engine, seconds=10):
    end = time.monotonic() + seconds
    while engine.gauges().blocks_held or engine._live or (engine._stage and engine._stage.guests):
        assert time.monotonic() < end, engine.gauges()
        time.sleep(0.01)


def complete(client, prompt=STORY, stream=False, **body: Any) -> Any:
    known = {k: body.pop(k) for k in ("n", "stop", "max_tokens", "temperature", "seed", "stream_options") if k in body}
    known = {"max_tokens": 12, "temperature": 0, **known}
    return client.completions.create(model="demo", prompt=prompt, stream=stream, extra_body=body, **known)


def offline(model, strategy, args=None, prompt=STORY, **stop):
    llm = fn.LLM(model, **OPTIONS)
    how = fn.Stop(**{"max_tokens": 12, **stop})
    return llm.generate(prompt, fn.Sampling(temperature=0), how, strategy=SHIPPED[strategy], strategy_args=args)[0]


def test_a_strategy_answers_as_it_does_offline(model, client):
    """Whole, in a stream, in a chat, n times, and up to a stop string."""
    beam = {"name": "beam", "args": {"width": 3}}
    want = offline(model, "beam", {"width": 3})
    whole = complete(client, strategy=beam)
    assert whole.choices[0].text == want.text and want.text
    assert whole.usage.completion_tokens == len(want.choices[0].tokens)
    parts = list(complete(client, stream=True, strategy=beam, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in parts if p.choices) == want.text
    assert parts[-1].usage == whole.usage
    mark = want.text[len(want.text) // 2 :][:3]
    cut = complete(client, strategy=beam, stop=[mark]).choices[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (want.text[: want.text.index(mark)], "stop", mark)
    several = complete(client, strategy={"name": "sample"}, n=3, temperature=1, seed=4)
    plain = complete(client, n=3, temperature=1, seed=4)
    assert [c.text for c in several.choices] == [c.text for c in plain.choices]
    assert several.usage.completion_tokens == plain.usage.completion_tokens
    ask = dict(model="demo", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, temperature=0)
    talk = client.chat.completions.create(**ask, extra_body={"strategy": {"name": "sample", "args": {}}})
    assert talk.choices[0].message.content == client.chat.completions.create(**ask).choices[0].message.content


def test_beam_search_by_fields_gives_its_best_texts(served, model, client):
    """Its fields need no --strategy. Oracle: the strategy offline, all of whose texts one run gives."""
    rt = fn.Runtime(model, **OPTIONS)
    job = Job(SHIPPED["beam"], STORY, {"width": 3, "texts": 2, "length_penalty": 0.5}, stop=fn.Stop(max_tokens=20))
    (done,) = run(rt, [job], eos=served[0].policy.eos)
    want = [model.decode(o.tokens) for o in (done, *done.more)]
    ask = dict(use_beam_search=True, beam_width=3, n=2, length_penalty=0.5)
    steps = served[0].gauges().steps
    whole = complete(client, max_tokens=20, **ask)
    assert [c.text for c in whole.choices] == want and len(set(want)) == 2
    assert served[0].gauges().steps - steps < 30, "one search for both"
    assert whole.usage.completion_tokens == sum(len(o.tokens) for o in (done, *done.more))
    texts = ["", ""]
    for part in complete(client, stream=True, max_tokens=20, **ask):
        for c in part.choices:
            texts[c.index] += c.text
    assert texts == want
    mark = want[1][4:7]
    cut = complete(client, stop=[mark], max_tokens=20, **ask)
    assert [c.text for c in cut.choices] == [t.partition(mark)[0] for t in want]
    by_name = complete(
        client, strategy={"name": "beam", "args": {"width": 3, "length_penalty": 0.5}}, n=2, max_tokens=20
    )
    assert [c.text for c in by_name.choices] == want


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"strategy": {"name": "magic"}}, "strategy", "no strategy is called 'magic' here.*beam, best_of, sample"),
        ({"strategy": {"name": "guided", "args": {}}}, "strategy", "no strategy is called 'guided' here"),
        (
            {"strategy": {"name": "beam", "args": {"hight": 2}}},
            "strategy.args",
            "'beam'.*hight.*its arguments are width",
        ),
        ({"strategy": {"name": "beam", "args": {"ctx": 2}}}, "strategy.args", "multiple values"),
        ({"strategy": {"args": {}}}, "strategy.name", "required"),
        ({"strategy": {"name": "beam", "arg": {}}}, "strategy.arg", "not permitted"),
        ({"strategy": "beam"}, "strategy", "beam"),
        ({"strategy": {"name": "beam", "args": {"width": "x" * 70000}}}, "strategy.args", "65536 are allowed"),
        ({"strategy": {"name": "beam"}, "logprobs": 1}, "logprobs", "cannot be asked of a strategy"),
        ({"strategy": {"name": "beam"}, "min_tokens": 2}, "min_tokens", "cannot be asked of a strategy"),
        ({"strategy": {"name": "beam"}, "speculative": {"k": 2}}, "speculative", "cannot be asked of a strategy"),
        (
            {"strategy": {"name": "beam"}, "prediction": {"type": "content", "content": "x"}},
            "prediction",
            "cannot be asked of a strategy",
        ),
        ({"speculative": {"method": "magic"}}, "speculative", "'magic'.*ngram, suffix"),
        ({"speculative": {"method": "prediction"}}, "speculative.method", "field prediction"),
        ({"speculative": {"k": 17}}, "speculative", "between 0 and 16"),
        ({"speculative": {"k": -1}}, "speculative", "between 0 and 16"),
        ({"speculative": {"k": 2, "num_speculative_tokens": 3}}, "speculative", "two names"),
        ({"speculative": {"k": "2"}}, "speculative.k", "integer"),
        ({"speculative": {"size": 2}}, "speculative.size", "not permitted"),
        ({"speculative": 4}, "speculative", "dictionary"),
        ({"prediction": "x"}, "prediction", "dictionary"),
        ({"prediction": {"type": "text", "content": "x"}}, "prediction.type", "content"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction.content", "list"),
        ({"prediction": {"type": "content", "content": [{"type": "image"}]}}, "prediction.content.0.type", "image"),
        ({"prediction": {"type": "content", "content": "x y" * 400}}, "prediction", "context holds 256"),
        ({"prediction": {"type": "content", "content": "x"}, "speculative": False}, "prediction", "excludes"),
        (
            {"prediction": {"type": "content", "content": "x"}, "speculative": {"method": "ngram"}},
            "prediction",
            "exclu",
        ),
    ],
)
def test_what_cannot_be_asked_is_a_400_that_names_it(client, body, param, words):
    with pytest.raises(BadRequestError, match=f"(?s).*{words}") as e:
        complete(client, **body)
    assert e.value.param == param


def test_what_a_strategy_raises_is_told_and_not_tried_again(served, client):
    with pytest.raises(InternalServerError, match="strategy 'fails': ValueError: it rained") as e:
        complete(client, strategy={"name": "fails"})
    assert e.value.param == "strategy" and e.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(InternalServerError, match="n must be between 1 and 1024, got 1000000000"):
        complete(client, strategy={"name": "best_of", "args": {"n": 10**9}})
    with httpx.stream(
        "POST", served[1] + "/v1/completions", json={"prompt": STORY, "strategy": {"name": "fails"}, "stream": True}
    ) as r:
        events = [line[6:] for line in r.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and "it rained" in json.loads(events[-2])["error"]["message"]
    assert len([e for e in events[:-2] if json.loads(e)["choices"]]) >= 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_strategy(served, stream):
    engine, url = served
    body = json.dumps({"prompt": STORY, "strategy": {"name": "waits"}, "stream": stream, "max_tokens": 50}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        end = time.monotonic() + 20
        while not (engine._stage and engine._stage.guests and engine.gauges().blocks_held):
            assert time.monotonic() < end
            time.sleep(0.01)
    settled(engine)


def test_drafts_change_no_token_and_are_counted(served, client):
    engine, url = served
    plain = complete(client, ECHO, max_tokens=32)
    bodies: list[dict] = [
        {"speculative": {"method": "ngram", "k": 4, "adapt": False}},
        {"speculative": {"method": "suffix", "num_speculative_tokens": 3}},
        {"speculative": True},
        {"speculative": {}},
    ]
    for body in bodies:
        before = engine.drafting.counts.steps
        assert complete(client, ECHO, max_tokens=32, **body).choices[0].text == plain.choices[0].text
        assert engine.drafting.counts.steps > before
    before = engine.drafting.counts.steps
    assert complete(client, ECHO, max_tokens=32, speculative=False).choices == plain.choices
    assert engine.drafting.counts.steps == before
    told = httpx.get(url + "/metrics").text
    counts = engine.drafting.counts
    assert counts.accepted > 0
    for prefix in ("fnengine", "vllm"):
        for name, value in {
            "num_drafts": counts.steps,
            "num_draft_tokens": counts.proposed,
            "num_accepted_tokens": counts.accepted,
        }.items():
            line = f'{prefix}:spec_decode_{name}_total{{engine="0",model_name="{engine.name}"}} {float(value)}'
            assert line in told, name
        places = [
            x for x in told.splitlines() if x.startswith(f"{prefix}:spec_decode_num_accepted_tokens_per_pos_total")
        ]
        deep = [float(x.rsplit(" ", 1)[1]) for x in places]
        assert sum(deep) == counts.accepted and deep == sorted(deep, reverse=True) and len(deep) >= 4
    gauges = httpx.get(url + "/debug/state").json()["gauges"]
    assert gauges["accepted"] == counts.accepted


def test_a_prediction_is_counted_as_the_api_does(served, client):
    """The answer itself, one word of it changed: all of its tokens are accepted but those of the word."""
    engine, ask = served[0], dict(model="demo", messages=[{"role": "user", "content": "Tell me"}], temperature=0)
    plain = client.chat.completions.create(**ask, max_tokens=40)
    text = plain.choices[0].message.content
    assert plain.usage.completion_tokens_details is None
    n = len(engine.tokenizer.encode(text, add_special=False))
    steps = engine.gauges().steps
    right = client.chat.completions.create(**ask, max_tokens=40, prediction={"type": "content", "content": text})
    assert right.choices[0].message.content == text
    assert engine.gauges().steps - steps < 20  # at most 16 tokens a draft; forty steps without
    details = right.usage.completion_tokens_details
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == n
    assert details.rejected_prediction_tokens <= 1
    words = text.split(" ")
    half = " ".join([*words[: len(words) // 2], "XYZ"])
    parts = [{"type": "text", "text": half[:5]}, {"type": "text", "text": half[5:]}]
    stream = client.chat.completions.create(
        **ask, max_tokens=40, n=2, stream=True, stream_options={"include_usage": True},
        prediction={"type": "content", "content": parts},
    )  # fmt: skip
    *_, last = stream
    details = last.usage.completion_tokens_details
    total = 2 * len(engine.tokenizer.encode(half, add_special=False))
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == total
    assert details.rejected_prediction_tokens >= 2


# --- the command line -------------------------------------------------------------------------------------------------


def options(*words):
    return resolve(cli.parser().parse_args(["serve", *words, "--enforce-eager", "--max-model-len", "128"]))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "my_decoding.py").write_text(MINE)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    yield
    for name in ("my_decoding", "my_broken"):
        sys.modules.pop(name, None)


def test_strategies_are_enabled_by_name_and_told(mine, model):
    o = options("--strategy", "beam", "--strategy", "my_decoding:shout", "--speculative-config", '{"method": "suffix"}')
    engine = start.build_engine(o, model)
    assert list(engine.strategies) == ["beam", "shout"]
    told = start.facts(engine)
    assert "strategies: beam, shout" in told and "drafts: suffix, up to 4 tokens a step" in told
    assert not [f for f in start.facts(start.build_engine(options(), model)) if "strateg" in f or "drafts" in f]


@pytest.mark.parametrize(
    "name, words",
    [
        ("magic", "no strategy is called 'magic'.*sample, beam.*module:function"),
        ("no_such_module:x", "cannot import no_such_module"),
        ("my_decoding:absent", "my_decoding has no absent"),
        ("my_decoding:plain", "is no strategy, it is an async function.*@fnengine.strategy"),
        ("my_decoding:number", "is no strategy, it is of type int"),
        ("my_broken:x", "cannot import my_broken: ZeroDivisionError"),
        ("my_decoding:", "is not module:name"),
    ],
)
def test_what_is_no_strategy_is_said_at_the_start(mine, name, words):
    with pytest.raises(ConfigError, match=f"--strategy: .*{words}"):
        own.strategies([name])


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "method is missing.*ngram, suffix, mtp, draft_model"),
        ({"method": "medusa"}, "no method is called 'medusa'"),
        ({"method": "ngram", "prompt_lookup_max": 3}, "'prompt_lookup_max' is not implemented.*the keys are"),
        ({"method": "ngram", "num_speculative_tokens": "4"}, "num_speculative_tokens must be a int, got '4'"),
        ({"method": "ngram", "num_speculative_tokens": True}, "must be a int"),
        ({"method": "ngram", "num_speculative_tokens": 40}, "between 0 and 16"),
        ({"method": "ngram", "num_speculative_tokens": 4, "k": 3}, "two names"),
        ({"method": "draft_model"}, "needs a model"),
        ({"method": "eagle3"}, "eagle needs a model"),
        ({"method": "eagle", "model": "demo-eagle", "dtype": "float32"}, "dtype is about a draft model"),
        ({"model": "demo", "kv_cache_memory_bytes": 1 << 20}, "the engine's own pool.*--kv-cache-memory-bytes"),
        ({"method": "ngram", "model": "demo"}, "a model means nothing to ngram"),
        ({"method": "ngram", "dtype": "float32"}, "dtype is about a draft model"),
        ({"method": "my_decoding:absent"}, "has no absent"),
        ({"method": "my_decoding:number"}, "is no proposer"),
        ({"method": "my_decoding:Needs"}, r"Needs\(\) raises TypeError"),
    ],
)
def test_what_is_wrong_with_a_speculative_config_is_said(mine, model, config, words):
    with pytest.raises(ConfigError, match=f"--speculative-config: .*{words}"):
        drafts.prepare(config, model, options())


@pytest.mark.parametrize("config", [
    {"method": "ngram", "num_speculative_tokens": 3},
    {"method": "my_decoding:Parrot", "adapt": False},
    {"model": "demo", "num_speculative_tokens": 3, "adapt": False},
    {"method": "eagle3", "model": "demo-eagle", "num_speculative_tokens": 3, "adapt": False},
])  # fmt: skip
def test_a_server_drafts_for_requests_that_say_nothing(mine, model, config):
    engine = start.build_engine(options("--speculative-config", json.dumps(config)), model)
    plain = fn.LLM(model, **OPTIONS).generate(ECHO, fn.Sampling(temperature=0), fn.Stop(max_tokens=24))
    assert answer(engine) == plain[0].choices[0].tokens
    counts = engine.drafting.counts
    assert counts.proposed > 0
    if config.get("model") == "demo":  # its own draft model: every guess is right
        assert counts.accepted == counts.proposed


def answer(engine, **kw):
    deltas = []
    ids = np.array(engine.tokenizer.encode(ECHO), np.int32)
    engine.submit_to(fn.Request("a", ids, fn.Sampling(temperature=0), fn.Stop(max_tokens=24), **kw), deltas.append)
    while engine.turn():
        pass
    assert deltas[-1].finish != "error", deltas[-1]
    return tuple(t for d in deltas for t in d.tokens)


def test_a_draft_model_whose_pool_is_full_drafts_nothing(mine, model, monkeypatch):
    draft = DraftModel(fn.Runtime(model, **OPTIONS))
    how = fn.Speculate("small", adapt=False)
    engine = Engine.build(model, speculate=how, proposers={"small": lambda _: draft}, **OPTIONS)
    plain, proposed = answer(engine), engine.drafting.counts.proposed
    assert proposed

    def full(self, *args, **kw):
        raise OutOfBlocks(3, 1, 2)

    monkeypatch.setattr(fn.Runtime, "extend", full)
    assert answer(engine) == plain
    assert engine.drafting.counts.proposed == proposed


def test_a_draft_model_of_other_tokens_is_refused(model, monkeypatch):
    from tests.models import tiny_model

    monkeypatch.setattr("fnengine.cli.drafts.load", lambda *_, **__: tiny_model("qwen3", "float32"))
    with pytest.raises(ConfigError, match=r"--speculative-config: .*a draft model of \d+ tokens for a target of"):
        drafts.prepare({"method": "draft_model", "model": "x"}, model, options())


def test_a_proposer_that_reads_what_is_not_there_is_refused_by_name(mine, model):
    def broken(how):
        raise ValueError("no file")

    taps = {"eagle": lambda _: own.find("my_decoding:Taps", "test", "")()}
    with pytest.raises(RequestError, match=r"'eagle' reads layers.1 of a model that has embedding, layers.0.residual"):
        fn.LLM(model, proposers=taps, speculate=fn.Speculate("eagle"), **OPTIONS)
    llm = fn.LLM(model, proposers={**taps, "broken": broken}, **OPTIONS)
    for name, words in {
        "eagle": "reads layers.1 of a model",
        "broken": "could not be made: ValueError: no file",
    }.items():
        with pytest.raises(RequestError, match=words):
            llm.generate(STORY, speculate=fn.Speculate(name))
    assert llm.generate(STORY, stop=fn.Stop(max_tokens=3))[0].choices[0].usage.completion == 3


def test_llm_drafts_by_default_and_on_request(model):
    sampling, stop = fn.Sampling(temperature=0), fn.Stop(max_tokens=24)
    parrot = {"parrot": lambda _: Stateless(lambda tokens, k: [tokens[-1]] * k)}
    llm = fn.LLM(model, proposers=parrot, speculate=fn.Speculate("ngram"), **OPTIONS)
    counts = llm.engine.drafting.counts
    none = llm.generate(ECHO, sampling, stop, speculate=fn.Speculate(k=0))
    assert counts.proposed == 0
    assert llm.generate(ECHO, sampling, stop)[0].text == none[0].text
    by_default = counts.proposed
    assert by_default > 0
    assert llm.generate(ECHO, sampling, stop, speculate=fn.Speculate("parrot"))[0].text == none[0].text
    assert counts.proposed > by_default
    with pytest.raises(RequestError, match="speculate cannot be asked of a strategy"):
        llm.generate(ECHO, speculate=fn.Speculate("parrot"), strategy=SHIPPED["sample"])
