"""Tools and reasoning over HTTP, with a scripted engine. Oracles: OpenAI's shapes of messages and deltas, the `openai`
client, and the law that a stream put together is the whole answer.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from starlette.testclient import TestClient

from fnengine import cli
from fnengine.errors import ConfigError
from fnengine.serve.app import make_app

if "scripted_engine" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("scripted_engine", Path(__file__).with_name("scripted_engine.py"))
    sys.modules["scripted_engine"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["scripted_engine"])
from scripted_engine import ScriptedEngine, said

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "metric": {"type": "boolean"},
                "zone": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
PARIS = ("get_weather", '{"city": "Paris"}')
ROME = ("get_weather", '{"city": "Rome", "days": 2}')
CALLS = """Let me look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}
</tool_call>"""

QWEN = "{% if tools %}<tool_call></tool_call>{% endif %}{{ enable_thinking }}<think></think>"
"""What the server looks at of a template: marks and names. The scripted tokenizer writes prompts in its own way."""
HI = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
ASK = {**HI, "tools": [WEATHER, NOW]}
PROMPT = "<s>tools:get_weather,now|user:hi|assistant:"
TWO_CALLS = "<think>\nHm, é.\n</think>\n\n" + CALLS


@contextmanager
def served(scripts, template=QWEN, **options):
    """(client, engine) of an application in this process."""
    pace = options.pop("pace", 0.0)
    engine = ScriptedEngine(scripts, max_len=1000, pace=pace, templates={"default": template} if template else {})
    with TestClient(make_app(engine, **options)) as client:
        yield client, engine
        assert not engine.live


def events_of(client, body):
    r = client.post("/v1/chat/completions", json={**body, "stream": True})
    assert r.status_code == 200, r.text
    blocks = r.text.split("\n\n")
    assert blocks[-2] == "data: [DONE]"
    return [json.loads(b[6:]) for b in blocks[:-2]]


def put_together(events, index=0):
    """The choice that a client makes of a stream, as the API says it should."""
    message, logprobs, ids, finish = {"content": "", "reasoning_content": "", "reasoning": ""}, [], [], []
    found = []
    for e in events:
        for c in e["choices"]:
            if c["index"] != index:
                continue
            assert not finish, "nothing follows the end"
            for key, value in c["delta"].items():
                if key == "role":
                    message["role"] = value
                elif key != "tool_calls":
                    message[key] += value
            for piece in c["delta"].get("tool_calls", ()):
                if piece["index"] == len(found):
                    assert set(piece) == {"index", "id", "type", "function"} and piece["function"]["arguments"] == ""
                    found.append({"id": piece["id"], "type": piece["type"], "function": dict(piece["function"])})
                else:
                    assert piece["index"] == len(found) - 1 and set(piece["function"]) == {"arguments"}
                    assert set(piece) == {"index", "function"}
                    found[-1]["function"]["arguments"] += piece["function"]["arguments"]
            logprobs += (c["logprobs"] or {"content": []})["content"]
            ids += c.get("token_ids", [])
            finish += [c["finish_reason"]] if c["finish_reason"] else []
    return message | ({"tool_calls": found} if found else {}), logprobs, ids, finish


def same(whole, message):
    """Whether the message of a whole answer is what a stream made, its ids apart: null is nothing."""
    ours, theirs = ([{**c, "id": ""} for c in m.get("tool_calls", ())] for m in (whole, message))
    keys = ("content", "reasoning_content", "reasoning")
    return ours == theirs and all((whole.get(k) or "") == message[k] for k in keys)


def test_calls_and_reasoning_whole():
    with served({PROMPT: said(TWO_CALLS)}) as (client, _):
        r = client.post("/v1/chat/completions", json=ASK).json()
        choice, usage = r["choices"][0], r["usage"]
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls" and message["content"] == "Let me look."
        assert message["reasoning_content"] == message["reasoning"] == "Hm, é."
        assert [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]] == [PARIS, ROME]
        ids = [c["id"] for c in message["tool_calls"]]
        assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)
        assert usage["completion_tokens"] == len(TWO_CALLS.encode()) + 1
        assert usage["completion_tokens_details"] == {
            "reasoning_tokens": len(TWO_CALLS.split("</think>")[0].encode()) + 8
        }
        again = client.post("/v1/chat/completions", json=ASK).json()["choices"][0]["message"]["tool_calls"]
        assert not {c["id"] for c in again} & set(ids)


@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 2},
        {"logprobs": True, "top_logprobs": 1, "return_token_ids": True},
        {"stop": ["Rome", "zzz"]},
        {"max_tokens": 60},
        {"include_reasoning": False},
        {"parallel_tool_calls": False},
    ],
    ids=lambda m: next(iter(m), "plain"),
)
def test_a_stream_put_together_is_the_whole_answer(more, interval):
    with served({PROMPT: said(TWO_CALLS)}, stream_interval=interval) as (client, _):
        answer = client.post("/v1/chat/completions", json={**ASK, **more, "seed": 1}).json()
        events = events_of(client, {**ASK, **more, "seed": 1, "stream_options": {"include_usage": True}})
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert events[-1]["usage"] == answer["usage"]
        for choice in answer["choices"]:
            message, logprobs, ids, finish = put_together(events, choice["index"])
            assert same(choice["message"], message) and finish == [choice["finish_reason"]]
            if "logprobs" in more:
                assert logprobs == choice["logprobs"]["content"] and ids == choice["token_ids"]
                assert len(logprobs) == len(ids) == len(TWO_CALLS.encode()) + 1
        first = answer["choices"][0]
        calls = [c["function"]["name"] for c in first["message"].get("tool_calls", ())]
        if "stop" in more:  # the second call was cut in its middle, behind the begin of its arguments
            assert calls == ["get_weather"] * 2 and first["finish_reason"] == "tool_calls"
            assert first["message"]["tool_calls"][1]["function"]["arguments"] == '{"city": "'
        if "max_tokens" in more:
            assert not calls and first["finish_reason"] == "length" and "<tool_call>" in first["message"]["content"]
        if "include_reasoning" in more:
            assert first["message"]["reasoning"] is None and answer["usage"]["completion_tokens_details"]
        if "parallel_tool_calls" in more:
            assert calls == ["get_weather"]


@pytest.mark.parametrize("interval", [1, 5])
def test_harmony_through_the_server(interval):
    text = "<|channel|>analysis<|message|>Hm, é<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    template = "<|channel|><|message|>{{ tools }}"
    with served({PROMPT: said(text)}, template, stream_interval=interval) as (client, _):
        events = events_of(client, {**ASK, "stream_options": {"include_usage": True}})
        message, _, _, finish = put_together(events)
        assert message["content"] == "Hi" and message["reasoning"] == "Hm, é" and finish == ["stop"]
        details = events[-1]["usage"]["completion_tokens_details"]
        assert details == {"reasoning_tokens": len("Hm, é<|end|>".encode())}


def test_the_official_client_reads_calls():
    with served({PROMPT: said(TWO_CALLS)}) as (client, _):
        api = openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=client, max_retries=0)
        message = api.chat.completions.create(**ASK).choices[0].message
        assert message.tool_calls[1].function.arguments == ROME[1] and message.reasoning_content == "Hm, é."
        with api.chat.completions.stream(**ASK) as stream:
            final = stream.get_final_completion().choices[0]
        assert [c.function.name for c in final.message.tool_calls] == ["get_weather"] * 2
        assert final.message.tool_calls[0].function.arguments == PARIS[1] and final.finish_reason == "tool_calls"


def test_reasoning_that_the_prompt_opened_and_effort():
    opened = {"chat_template_kwargs": {"opening": "<think>"}}
    scripts = {
        "<s>user:hi|assistant:<think>": said("Hm</think>Hi"),
        "<s>reasoning_effort=none|enable_thinking=False|user:hi|assistant:": said("none"),
        "<s>reasoning_effort=high|user:hi|assistant:": said("high"),
    }
    with served(scripts) as (client, _):

        def ask(**body):
            r = client.post("/v1/chat/completions", json={**HI, **body})
            return r.json()["choices"][0]["message"], r.headers.get("x-fnengine-ignored", "")

        message, ignored = ask(**opened)
        assert (message["content"], message["reasoning"], ignored) == ("Hi", "Hm", "")
        message, ignored = ask(reasoning_effort="none")
        assert (message["content"], message["reasoning"], ignored) == ("none", None, "")
        message, ignored = ask(reasoning_effort="high")  # this template knows on and off, nothing between
        assert (message["content"], ignored) == ("high", "")


def test_budgets_of_thinking_come_of_either_field():
    opened = {"chat_template_kwargs": {"opening": "<think>"}}
    with served({}) as (client, engine):

        def thinking(**body):
            r = client.post("/v1/chat/completions", json={**HI, **body})
            assert r.status_code == 200, r.text
            return engine.requests[-1].thinking

        assert thinking() is None and thinking(thinking_token_budget=-1) is None
        got = thinking(thinking_token_budget=7, **opened)
        assert (got.tokens, got.begin, got.ends, bytes(got.close)) == (7, None, ("</think>",), b"</think>")
        assert thinking(thinking_token_budget=7).begin == "<think>"
        assert thinking(thinking_token_budget=0, chat_template_kwargs={"opening": "<think></think>"}) is None
        assert thinking(reasoning_effort="low").tokens == 1024 and thinking(reasoning_effort="high") is None
        assert thinking(reasoning_effort="low", thinking_token_budget=3).tokens == 3
        assert thinking(reasoning_effort="low", thinking_token_budget=-1) is None
        assert thinking(reasoning_effort="none") is None  # the template turns it off
        for body, param in (
            ({"thinking_token_budget": -2}, "thinking_token_budget"),
            ({"thinking_token_budget": "7"}, "thinking_token_budget"),
            ({"reasoning_effort": "immense"}, "reasoning_effort"),
        ):
            r = client.post("/v1/chat/completions", json={**HI, **body})
            assert (r.status_code, r.json()["error"]["param"]) == (400, param)
        r = client.post("/v1/completions", json={"prompt": "x", "thinking_token_budget": 7})
        assert (r.status_code, r.json()["error"]["param"]) == (400, "thinking_token_budget")
        asked = {"max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 5}}
        assert client.post("/v1/messages", json={**HI, **asked}).status_code == 200
        assert engine.requests[-1].thinking.tokens == 5
        client.post("/v1/responses", json={"input": "hi", "thinking_token_budget": 8})
        assert engine.requests[-1].thinking.tokens == 8
    with served({}, "{{ enable_thinking }}{{ tools }}") as (client, engine):
        r = client.post("/v1/chat/completions", json={**HI, "thinking_token_budget": 7})
        assert r.status_code == 400 and "--reasoning-parser" in r.json()["error"]["message"]
        r = client.post("/v1/messages", json={**HI, **asked})
        assert r.headers["x-fnengine-ignored"] == "thinking.budget_tokens" and engine.requests[-1].thinking is None
    with served({}, "<|channel|><|message|>{{ tools }}{{ reasoning_effort }}") as (client, engine):
        client.post("/v1/chat/completions", json={**HI, "thinking_token_budget": 2, "reasoning_effort": "low"})
        got = engine.requests[-1].thinking
        assert got.tokens == 2 and bytes(got.close) == b"<|end|><|start|>assistant<|channel|>" and got.never == ord("a")


def test_tools_that_may_not_be_called_are_not_shown():
    with served({}) as (client, engine):
        client.post("/v1/chat/completions", json={**ASK, "tool_choice": "none"})
        assert b"tools:" not in bytes(engine.requests[-1].prompt.tolist()[1:])
        r = client.post("/tokenize", json={"messages": HI["messages"], "tools": [NOW]})
        assert bytes(r.json()["tokens"]) == b"<s>tools:now|user:hi|assistant:"


def test_strict_functions_bring_a_grammar_where_the_model_may_choose():
    """Free text, calls of the schemas; with a format of the answer, calls or that. Reasoning comes before either."""
    strict = {**NOW, "function": {**NOW["function"], "strict": True}}
    bad = {**strict, "function": {**strict["function"], "parameters": {"foo": 1}}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 5}}}
    with served({}) as (client, engine):

        def asked(**body):
            r = client.post("/v1/chat/completions", json={**HI, **body})
            assert r.status_code == 200 and "x-fnengine-ignored" not in r.headers, r.text
            return engine.requests[-1]

        assert asked(tools=[WEATHER, NOW]).grammar is None
        free = asked(tools=[WEATHER, strict], chat_template_kwargs={"opening": "<think>"})
        assert "TEXT" in free.grammar.text.splitlines()[0] and free.reasoning.end == "</think>"
        either = asked(tools=[WEATHER, NOW], response_format=schema)
        assert '"const": 5' in either.grammar.text and "TEXT" not in either.grammar.text.splitlines()[0]
        only = asked(tools=[WEATHER, NOW], response_format=schema, tool_choice="required")
        assert only.grammar.text == asked(tools=[WEATHER, NOW], tool_choice="required").grammar.text
        none = asked(tools=[WEATHER, NOW], response_format=schema, tool_choice="none")
        assert none.grammar.kind == "json_schema"
        for body, param in (
            ({"guided_grammar": 'start: "a"'}, "guided_grammar"),
            ({"guided_json": {}, "tool_choice": "required"}, "guided_json"),
            ({"tools": [bad]}, "tools.0.function.parameters"),
        ):
            r = client.post("/v1/chat/completions", json={**HI, "tools": [WEATHER], **body})
            assert r.status_code == 400 and r.json()["error"]["param"].startswith(param), r.text
    harmony = "<|channel|><|message|>{{ tools }}"
    with served({}, harmony) as (client, engine):
        r = client.post("/v1/chat/completions", json={**HI, "tools": [strict], "thinking_token_budget": 3})
        assert r.status_code == 200 and engine.requests[-1].reasoning is None and engine.requests[-1].thinking
        assert "analysis" in engine.requests[-1].grammar.text


BAD = [
    ({"tools": []}, "tools"),
    ({"tools": "x"}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
    ({"tools": [NOW, {"type": "function"}]}, "tools.1.function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [NOW, NOW]}, "tools.1.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools.0.function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools.0.function.strict"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": [NOW], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"messages": [{"role": "tool", "content": "7", "tool_call_id": 5}]}, "messages.0.tool_call_id"),
]


def test_bad_tools_are_400_and_say_where():
    with served({}) as (client, engine):
        for body, param in BAD:
            r = client.post("/v1/chat/completions", json={**HI, **body})
            assert (r.status_code, r.json()["error"]["param"]) == (400, param), (body, r.text)
        assert not engine.requests


def test_a_forced_call_brings_its_grammar_and_where_reasoning_ends():
    """`<think>` is several tokens of this vocabulary, so a text may reason only where its prompt has begun that."""
    with served({}) as (client, engine):
        for choice in ("required", {"type": "function", "function": {"name": "now"}}):
            assert client.post("/v1/chat/completions", json={**ASK, "tool_choice": choice}).status_code == 200
        both, one = (r.grammar for r in engine.requests)
        assert both.field == "tools" and "get_weather" in both.text and "get_weather" not in one.text
        assert engine.requests[0].reasoning is None
        opened = {"chat_template_kwargs": {"opening": "<think>"}, "response_format": {"type": "json_object"}}
        assert client.post("/v1/chat/completions", json={**HI, **opened}).status_code == 200
        assert engine.requests[-1].reasoning.end == "</think>" and engine.requests[-1].reasoning.begin is None


@pytest.mark.parametrize(
    "template,options,word",
    [
        ("{{ messages }}", {}, "does not show tools"),
        ("{{ tools }}", {}, "--tool-call-parser"),
        ("{{ tools }}", {"tool_call_parser": "none"}, "--tool-call-parser"),
        (QWEN, {"enable_auto_tool_choice": False}, "--enable-auto-tool-choice"),
    ],
)
def test_tools_that_would_be_lost_are_refused(template, options, word):
    with served({}, template, **options) as (client, _):
        r = client.post("/v1/chat/completions", json=ASK)
        assert r.status_code == 400 and word in r.json()["error"]["message"]


def test_flags_reach_the_server_and_unknown_names_are_errors_with_all_names():
    with pytest.raises(ConfigError, match="hermes"):
        make_app(ScriptedEngine(), tool_call_parser="hermse")
    with served({PROMPT: said("[TOOL_CALLS]now{}")}, "{{ tools }}", tool_call_parser="mistral") as (client, _):
        (call,) = client.post("/v1/chat/completions", json=ASK).json()["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": "{}"} and len(call["id"]) == 9
    parse = cli.parser().parse_args
    args = parse(["serve", "m", "--tool-call-parser", "qwen3", "--reasoning-parser", "deepseek_r1"])
    assert (args.tool_call_parser, args.reasoning_parser) == ("hermes", "deepseek_r1")
    with pytest.raises(ConfigError, match="llama3_json"):
        parse(["serve", "m", "--tool-call-parser", "nope"])


def test_some_of_the_tools_may_be_allowed():
    """All are shown to the model; a grammar holds what it calls. In the shapes of chats and of responses."""
    with served({}) as (client, engine):
        for mode in ("auto", "required"):
            allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "now"}}]}
            choice = {"type": "allowed_tools", "allowed_tools": allowed}
            assert client.post("/v1/chat/completions", json={**ASK, "tool_choice": choice}).status_code == 200
            chat = engine.requests[-1]
            assert "get_weather" not in chat.grammar.text and b"get_weather" in bytes(chat.prompt.tolist()[1:])
            assert ("TEXT" in chat.grammar.text.splitlines()[0]) == (mode == "auto")
            tools = [{"type": "function", **t["function"]} for t in (WEATHER, NOW)]
            choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "now"}]}
            r = client.post("/v1/responses", json={"input": "hi", "tools": tools, "tool_choice": choice})
            assert r.status_code == 200 and engine.requests[-1].grammar.text == chat.grammar.text
        for bad in ({"mode": "none"}, {"tools": []}, {"tools": ["now"]}, {"tools": [{"name": "then"}]}):
            choice = {"type": "allowed_tools", "allowed_tools": {**allowed, **bad}}
            r = client.post("/v1/chat/completions", json={**ASK, "tool_choice": choice})
            assert (r.status_code, r.json()["error"]["param"]) == (400, "tool_choice")
