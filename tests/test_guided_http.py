"""Structured output and forced calls over HTTP, through the official client, on the bundled model.

Oracles: Python's json with checks written out, `re.fullmatch`, and OpenAI's shapes.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import replace

import httpx
import pytest
from openai import BadRequestError, OpenAI
from starlette.testclient import TestClient

import fnengine as fn
from fnengine.serve.app import make_app
from fnengine.serve.run import bind, serve

HI = [{"role": "user", "content": "Tell me about Anna."}]
TEMPLATE = (
    "{% if tools %}<tool_call></tool_call>{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
)
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Anna", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {"$defs": {"c": {"enum": ["Oslo", "Rome"]}}, "type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}}
CITY |= {"required": ["city"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "strict": True, "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.fixture(scope="module")
def served():
    """(engine, url) of a server on a free port."""
    model = fn.load("demo")
    assert model.tokenizer is not None
    tokenizer = replace(model.tokenizer, templates={"default": TEMPLATE})
    engine = fn.Engine.build(model, tokenizer=tokenizer, max_model_len=512, max_num_seqs=8, enforce_eager=True)
    sock = bind("127.0.0.1", 0)
    ready, stop = threading.Event(), threading.Event()
    port = sock.getsockname()[1]
    options = dict(sock=sock, on_ready=lambda url: ready.set(), stop=stop)
    thread = threading.Thread(target=serve, args=(engine, "127.0.0.1", port), kwargs=options, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield engine, f"http://127.0.0.1:{port}"
    stop.set()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def client(served):
    with OpenAI(base_url=served[1] + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
    end = time.monotonic() + 10
    while (g := served[0].gauges()).running or g.waiting or g.blocks_held:
        assert time.monotonic() < end, f"still busy: {g}"
        time.sleep(0.01)
    served[0].check()


def chat(client, **kw):
    return client.chat.completions.create(model="demo", messages=HI, **{"max_tokens": 150, "seed": 1, **kw})


def person(text: str) -> bool:
    value = json.loads(text)
    return list(value) == ["name", "age"] and value["name"] in ("Anna", "Bob") and value["age"] in range(100)


STRICT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}


def test_a_strict_schema_with_choices_and_log_probabilities(client):
    got = chat(client, response_format=STRICT, n=3, temperature=1.5, logprobs=True, top_logprobs=2)
    assert [c.finish_reason for c in got.choices] == ["stop"] * 3
    for c in got.choices:
        assert person(c.message.content) and "".join(p.token for p in c.logprobs.content) == c.message.content


def test_a_stream_is_the_whole_answer(client):
    whole = chat(client, response_format=STRICT).choices[0].message.content
    parts = [c.choices[0].delta.content or "" for c in chat(client, response_format=STRICT, stream=True) if c.choices]
    assert "".join(parts) == whole and person(whole) and len([p for p in parts if p]) > 1


@pytest.mark.parametrize(
    "field,value,right",
    [
        ("guided_json", PERSON, person),
        ("guided_regex", "[0-9]{3}-[ab]+", lambda t: re.fullmatch("[0-9]{3}-[ab]+", t)),
        ("guided_choice", ["yes", "no"], lambda t: t in ("yes", "no")),
        ("guided_grammar", 'root ::= "a" | "b" root', lambda t: re.fullmatch("b*a", t)),
        ("structured_outputs", {"choice": ["yes", "no"]}, lambda t: t in ("yes", "no")),
        ("regex", "x{2}|y", lambda t: t in ("xx", "y")),
        ("ebnf", 'start: "a" | "bc"', lambda t: t in ("a", "bc")),
    ],
)
def test_every_spelling_is_held_to_in_both_routes(client, field, value, right):
    extra = {field: value}
    assert right(chat(client, extra_body=extra).choices[0].message.content)
    done = client.completions.create(model="demo", prompt="Once", max_tokens=400, extra_body=extra)
    assert right(done.choices[0].text) and done.choices[0].finish_reason == "stop"


def test_json_object_is_an_object_or_cut(client):
    for seed in range(3):
        choice = chat(client, response_format={"type": "json_object"}, seed=seed, max_tokens=60).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.finish_reason == "length"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_are_calls_whose_arguments_hold(client, choice):
    for seed in range(3):
        got = chat(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=seed, max_tokens=450)
        (call,) = got.choices[0].message.tool_calls
        assert got.choices[0].finish_reason == "tool_calls" and not got.choices[0].message.content
        assert isinstance(choice, str) or call.function.name == "weather"
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert list(arguments) == ["city"] and arguments["city"] in ("Oslo", "Rome")


def test_a_call_or_an_answer_of_the_format(served, client):
    """Whole and in a stream: valid arguments, or valid content and nothing else. This model calls when told to."""
    text, kinds = served[0].tokenizer, set()
    mark = next(i for i in range(text.vocab_size) if text.token_bytes(i) == b"<")
    for seed in range(4):
        ask = dict(tools=TOOLS, response_format=STRICT, seed=seed, max_tokens=450)
        ask |= {"parallel_tool_calls": False, "logit_bias": {str(mark): 100 if seed % 2 else 0}}
        got = chat(client, **ask).choices[0]
        if got.message.tool_calls:
            assert got.finish_reason == "tool_calls" and not got.message.content
            assert all(valid(c) for c in got.message.tool_calls)
        else:
            assert got.finish_reason == "stop" and person(got.message.content)
        kinds.add(got.finish_reason)
        if seed < 2:
            with client.chat.completions.stream(model="demo", messages=HI, **ask) as stream:
                final = stream.get_final_completion().choices[0]
            assert final.finish_reason == got.finish_reason
            assert (final.message.content or None) == got.message.content
            calls = [[c.function.arguments for c in m.tool_calls or ()] for m in (final.message, got.message)]
            assert calls[0] == calls[1]
    assert kinds == {"stop", "tool_calls"}


def valid(call) -> bool:
    arguments = json.loads(call.function.arguments)
    return arguments == {} if call.function.name == "now" else arguments in ({"city": "Oslo"}, {"city": "Rome"})


def test_free_text_beside_strict_functions_is_what_it_is_without(client):
    ask = dict(tools=TOOLS, seed=3, max_tokens=30, logprobs=True)
    loose = [{**t, "function": {**t["function"], "strict": False}} for t in TOOLS]
    got, want = chat(client, **ask).choices[0], chat(client, **{**ask, "tools": loose}).choices[0]
    assert got.message.content == want.message.content and got.finish_reason == want.finish_reason
    assert got.logprobs == want.logprobs


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": value}}}


BAD = [
    (schema({"type": "object", "not": {}}), "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
    ({"guided_json": PERSON, "tools": TOOLS, "tool_choice": "required"}, "guided_json"),
    ({"guided_grammar": 'start: "a"', "tools": TOOLS}, "guided_grammar"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}], "tool_choice": "required"},
     "tools.0.function.parameters"),
]  # fmt: skip


@pytest.mark.parametrize("body,param", BAD)
def test_what_cannot_be_held_to_is_a_400_that_names_it(client, body, param):
    with pytest.raises(BadRequestError) as e:
        chat(client, extra_body=body)
    assert e.value.body["param"] == param, e.value.body


def test_hostile_schemas_are_refused_while_a_stream_keeps_going(served, client):
    """Deep, wide and slow ones: each is a 400, and the other client's tokens keep coming."""
    deep = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(5000)}}
    slow = {"allOf": [{"type": "string", "pattern": f"(a|b){{{i}}}c.*{i}"} for i in range(1, 30)]}
    stream = chat(client, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    it, seen = iter(stream), []
    seen.append(next(it))
    url, codes = served[1] + "/v1/chat/completions", []

    def attack():
        for hostile in (deep, wide, slow):
            codes.append(httpx.post(url, json={"messages": HI, **schema(hostile)}, timeout=60).status_code)

    thread = threading.Thread(target=attack)
    thread.start()
    during = sum(1 for _ in it if thread.is_alive())
    thread.join(60)
    assert codes == [400, 400, 400] and during > 0
    assert chat(client, max_tokens=3).choices


def test_what_of_a_schema_has_no_effect_is_named(served):
    value = {"type": "object", "properties": {"a": {"type": "integer", "format": "int32"}}, "required": ["a"]}
    body = {"messages": HI, "max_tokens": 60, "guided_json": value}
    r = httpx.post(served[1] + "/v1/chat/completions", json=body, timeout=60)
    assert r.status_code == 200 and "format" in r.headers["x-fnengine-ignored"]


def test_a_budget_of_thinking_over_http(served):
    """Another application over the same model, whose texts begin as reasoning. Oracle: tokens of reasoning are those of
    the budget and those of the mark; streams, choices and grammars go on behind it."""
    tokenizer = served[0].tokenizer
    mark = tokenizer.encode("</think>", add_special=False)
    engine = fn.Engine.build(
        fn.load("demo"), tokenizer=tokenizer, max_model_len=512, max_num_seqs=8, enforce_eager=True
    )
    ask = {"messages": HI, "max_tokens": 60, "seed": 2, "thinking_token_budget": 6, "ignore_eos": True}
    with TestClient(make_app(engine, reasoning_parser="deepseek_r1")) as client:

        def chat(**body):
            r = client.post("/v1/chat/completions", json={**ask, **body})
            assert r.status_code == 200, r.text
            return r.json()

        got = chat(n=2, logprobs=True)
        spent = got["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert spent == 2 * (6 + len(mark))
        for choice in got["choices"]:
            said = [p["token"] for p in choice["logprobs"]["content"]]
            assert "".join(said[6 : 6 + len(mark)]).strip() == "</think>"
            assert choice["message"]["reasoning"] and choice["message"]["content"]
        free = chat(thinking_token_budget=None)["choices"][0]["message"]["reasoning"]
        assert free.startswith(got["choices"][0]["message"]["reasoning"].rstrip("\n")), "the same up to the budget"
        held = chat(response_format=STRICT, max_tokens=300)["choices"][0]
        assert person(held["message"]["content"]) and held["message"]["reasoning"]
        whole = chat()["choices"][0]["message"]
        events = client.post("/v1/chat/completions", json={**ask, "stream": True}).text.split("data: ")[1:-1]
        deltas = [c["delta"] for e in events for c in json.loads(e)["choices"]]
        for name in ("content", "reasoning"):
            assert "".join(d.get(name) or "" for d in deltas) == whole[name]
        assert chat(thinking_token_budget=0)["choices"][0]["message"]["reasoning"] is None
        assert chat(reasoning_effort="none", thinking_token_budget=None)["choices"][0]["message"]["reasoning"] is None
    engine.check()
