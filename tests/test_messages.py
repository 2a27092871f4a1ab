"""Anthropic's messages over HTTP, with a scripted engine. Oracles: the documented shapes and order of events, written
out here, and the law that a stream put together is the whole message."""

from __future__ import annotations

import json

import jiter
import pytest

from tests.test_tools import CALLS, NOW, PROMPT, QWEN, TWO_CALLS, WEATHER, said, served

HI = {"model": "tiny", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [
    {"name": t["function"]["name"], "input_schema": t["function"]["parameters"], "description": "d"}
    for t in (WEATHER, NOW)
]
SCRIPTS = {
    "<s>user:hi|assistant:": said("Hello, wörld!"),
    "<s>user:fails|assistant:": said("abcdef", fail_at=3),
    PROMPT: said(TWO_CALLS),
}


def events(client, body, **kw):
    """(name, data) of a stream; every event is two lines, and the name is the data's type."""
    r = client.post("/v1/messages", json={**body, "stream": True}, **kw)
    assert r.status_code == 200, r.text
    blocks = r.text.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        value = json.loads(data[6:])
        assert value["type"] == name[7:]
        found.append(value)
    return found


def joined(found):
    """The message that a stream makes, as Anthropic's own client accumulates it."""
    message = None
    for e in found:
        if e["type"] == "message_start":
            assert message is None
            message = json.loads(json.dumps(e["message"]))
        assert message is not None
        if e["type"] == "content_block_start":
            assert e["index"] == len(message["content"])
            message["content"].append(dict(e["content_block"]))
            text = ""
        elif e["type"] == "content_block_delta":
            block, delta = message["content"][e["index"]], e["delta"]
            if delta["type"] == "input_json_delta":
                text += delta["partial_json"]
                block["input"] = jiter.from_json(text.encode(), partial_mode=True)  # as anthropic does
            else:
                name = {"text_delta": "text", "thinking_delta": "thinking"}[delta["type"]]
                block[name] += delta[name]
        elif e["type"] == "message_delta":
            message |= e["delta"]
            message["usage"] = e["usage"]
    return message


def test_a_message_and_its_stream():
    with served(SCRIPTS) as (client, _):
        r = client.post("/v1/messages", json=HI)
        whole = r.json()
        assert whole["id"].startswith("msg_") and whole["type"] == "message" and whole["role"] == "assistant"
        assert whole["model"] == "tiny" and whole["content"] == [{"type": "text", "text": "Hello, wörld!"}]
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
        usage = whole["usage"]
        # bytes of "<s>user:hi|assistant:" behind the tokenizer's eyes: the scripted engine says that 3 were cached
        n = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert (n, usage["cache_read_input_tokens"], usage["output_tokens"]) == (21, 3, 15)
        found = events(client, HI)
        kinds = [e["type"] for e in found]
        deltas = kinds.count("content_block_delta")
        assert kinds == [
            "message_start",
            "content_block_start",
            *["content_block_delta"] * deltas,
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert deltas > 5 and found[0]["message"]["content"] == [] and found[0]["message"]["stop_reason"] is None
        assert joined(found) == {**whole, "id": found[0]["message"]["id"]}


@pytest.mark.parametrize(
    "more,reason,sequence,text",
    [
        ({"max_tokens": 4}, "max_tokens", None, "Hell"),
        ({"stop_sequences": ["w", "zz"]}, "stop_sequence", "w", "Hello, "),
    ],
)
def test_why_a_message_ends(more, reason, sequence, text):
    with served(SCRIPTS) as (client, _):
        whole = client.post("/v1/messages", json={**HI, **more}).json()
        assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
        assert whole["content"] == [{"type": "text", "text": text}]
        found = events(client, {**HI, **more})
        assert joined(found) == {**whole, "id": found[0]["message"]["id"]}


def test_tools_and_thinking_are_blocks():
    with served(SCRIPTS, QWEN) as (client, _):
        body = {**HI, "tools": TOOLS, "max_tokens": 400}
        whole = client.post("/v1/messages", json=body).json()
        kinds = [b["type"] for b in whole["content"]]
        assert kinds == ["thinking", "text", "tool_use", "tool_use"] and whole["stop_reason"] == "tool_use"
        thinking, text, paris, rome = whole["content"]
        assert thinking["thinking"] == "Hm, é." and thinking["signature"] == ""
        assert text["text"] == CALLS.split("\n")[0]
        assert (paris["name"], paris["input"]) == ("get_weather", {"city": "Paris"})
        assert rome["input"] == {"city": "Rome", "days": 2} and paris["id"] != rome["id"]
        found = joined(events(client, body))
        pieces = [e for e in events(client, body) if e.get("delta", {}).get("type") == "input_json_delta"]
        assert len(pieces) > 20, "arguments come with their tokens"
        cut = client.post("/v1/messages", json={**body, "stop_sequences": ["Rome"]}).json()
        assert cut["content"][-1]["input"] == {"unreadable": '{"city": "'}, "what broke off is told as it is"
        for a, b in zip(found["content"], whole["content"], strict=True):
            assert {k: v for k, v in a.items() if k != "id"} == {k: v for k, v in b.items() if k != "id"}


def test_a_conversation_with_results_reaches_the_template():
    """Oracle: the scripted template, written out."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "look"}, {"type": "tool_use", "id": "c1", "name": "now", "input": {}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "7"}]},
                {"type": "text", "text": "so?"},
            ],
        },
    ]
    want = "<s>system:be|user:hi|assistant:look[now{}]|tool:7|user:so?|assistant:"
    with served({want: said("ok")}) as (client, engine):
        body = {**HI, "system": [{"type": "text", "text": "be"}], "messages": messages}
        assert client.post("/v1/messages", json=body).json()["content"] == [{"type": "text", "text": "ok"}]
        assert engine.tokenizer.decode(engine.requests[-1].prompt.tolist(), skip_special=False) == want
        count = client.post("/v1/messages/count_tokens", json={k: v for k, v in body.items() if k != "max_tokens"})
        assert count.json() == {"input_tokens": len(engine.requests[-1].prompt)}


BAD = [
    ({"max_tokens": None}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "image"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, 400, "tool_use_id"),
    ({"system": 5}, 400, "system"),
    ({"stop_sequences": [""]}, 400, "stop_sequences.0"),
    ({"temperature": -1}, 400, "temperature"),
    ({"n": 2}, 400, "n:"),
    ({"return_token_ids": True}, 400, "return_token_ids"),
    ({"thinking": {"type": "maybe"}}, 400, "thinking.type"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "tools.0.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "some"}}, 400, "tool_choice.type"),
    ({"model": "none"}, 404, "none"),
]


@pytest.fixture(scope="module")
def shared():
    with served(SCRIPTS, QWEN) as both:
        yield both


@pytest.mark.parametrize("more,code,word", BAD)
def test_errors_have_anthropics_shape(shared, more, code, word):
    body = {k: v for k, v in {**HI, **more}.items() if v is not None}
    client, engine = shared
    r = client.post("/v1/messages", json=body)
    told = r.json()
    assert r.status_code == code and told["type"] == "error" and word in told["error"]["message"], told
    assert told["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[code]
    assert not engine.requests


def test_a_fault_in_a_stream_is_an_error_event_and_keys_may_come_in_their_own_header():
    with served(SCRIPTS, api_keys=["k"]) as (client, _):
        fails = {**HI, "messages": [{"role": "user", "content": "fails"}]}
        assert client.post("/v1/messages", json=HI).status_code == 401
        assert client.post("/v1/messages", json=HI, headers={"x-api-key": "wrong"}).status_code == 401
        found = events(client, fails, headers={"x-api-key": "k"})
        assert found[-1]["type"] == "error" and "42" in found[-1]["error"]["message"]
        assert "message_stop" not in [e["type"] for e in found]
        r = client.post("/v1/messages", json=fails, headers={"x-api-key": "k"})
        assert (r.status_code, r.json()["error"]["type"]) == (500, "api_error")


def test_what_has_no_effect_is_named():
    with served(SCRIPTS) as (client, _):
        body = {**HI, "thinking": {"type": "enabled", "budget_tokens": 1024}, "metadata": {"user_id": "x"}}
        ignored = client.post("/v1/messages", json=body).headers["x-fnengine-ignored"]
        assert ignored == "metadata"


def test_formats_and_strict_tools_are_held_to():
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    tool = {"name": "now", "input_schema": {"type": "object", "properties": {}}, "strict": True}
    with served({}) as (client, engine):

        def asked(code=200, **body):
            r = client.post("/v1/messages", json={**HI, "max_tokens": 5, **body})
            assert r.status_code == code, r.text
            return engine.requests[-1].grammar if code == 200 else r.json()["error"]["message"]

        assert asked() is None
        for body in ({"output_format": schema}, {"output_config": {"format": schema, "effort": "low"}}):
            assert asked(**body).kind == "json_schema"
        assert asked(tools=[tool]).kind == "lark" and asked(tools=[{**tool, "strict": False}]) is None
        assert "output_format.type" in asked(400, output_format={"type": "xml"})
        assert "output_config.format.schema" in asked(400, output_config={"format": {"type": "json_schema"}})
        assert "older name" in asked(400, output_format=schema, output_config={"format": schema})
