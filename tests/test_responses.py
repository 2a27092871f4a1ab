"""OpenAI's responses over HTTP, with a scripted engine. Oracles: the official client's types and its reading of the
stream, the order of events that the API documents, and the law that a stream put together is the whole response."""

from __future__ import annotations

import json
import time

import openai
import pytest

from fnengine.errors import NotFound
from fnengine.serve.responses import Store, Stored
from tests.test_tools import CALLS, NOW, PROMPT, QWEN, TWO_CALLS, WEATHER, said, served

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", **t["function"]} for t in (WEATHER, NOW)]
SCRIPTS = {
    "<s>user:hi|assistant:": said("Hello, wörld!"),
    "<s>system:be|user:hi|assistant:Hello, wörld!|user:more|assistant:": said("less"),
    "<s>user:fails|assistant:": said("abcdef", fail_at=3),
    PROMPT: said(TWO_CALLS),
}


def official(client):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="k", max_retries=0, http_client=client)


def stripped(value):
    """Without ids and times."""
    if isinstance(value, dict):
        return {k: stripped(v) for k, v in value.items() if k not in ("id", "call_id", "completed_at", "created_at")}
    return [stripped(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def shared():
    with served(SCRIPTS, QWEN) as both:
        yield both


def test_a_response_and_its_stream():
    with served(SCRIPTS) as (client, _):
        api = official(client)
        whole = api.responses.create(model="tiny", input="hi")
        assert whole.id.startswith("resp_") and whole.object == "response" and whole.status == "completed"
        assert whole.output_text == "Hello, wörld!" and whole.model == "tiny" and whole.error is None
        (item,) = whole.output
        assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
        u = whole.usage
        assert (u.input_tokens, u.input_tokens_details.cached_tokens, u.output_tokens, u.total_tokens) == (
            21,
            3,
            15,
            36,
        )
        events = list(api.responses.create(model="tiny", input="hi", stream=True))
        kinds = [e.type for e in events]
        deltas = kinds.count("response.output_text.delta")
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * deltas,
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert deltas > 5 and [e.sequence_number for e in events] == list(range(len(events)))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
        assert events[0].response.status == "in_progress" and events[0].response.output == []
        assert stripped(events[-1].response.model_dump()) == stripped(whole.model_dump())
        with api.responses.stream(model="tiny", input="hi") as stream:  # the client accumulates, and checks
            assert stripped(stream.get_final_response().output[0].content[0].text) == whole.output_text
        raw = client.post("/v1/responses", json={"input": "hi", "stream": True}).text
        assert raw.startswith("event: response.created\ndata: {") and "[DONE]" not in raw


def test_the_limit_makes_it_incomplete():
    with served(SCRIPTS) as (client, _):
        api = official(client)
        whole = api.responses.create(model="tiny", input="hi", max_output_tokens=4)
        assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert whole.output_text == "Hell" and whole.output[0].status == "incomplete"
        *_, last = api.responses.create(model="tiny", input="hi", max_output_tokens=4, stream=True)
        assert last.type == "response.incomplete" and stripped(last.response.output[0].model_dump()) == stripped(
            whole.output[0].model_dump()
        )


def test_reasoning_and_calls_are_items():
    with served(SCRIPTS, QWEN) as (client, _):
        api = official(client)
        whole = api.responses.create(model="tiny", input="hi", tools=TOOLS)
        assert [i.type for i in whole.output] == ["reasoning", "message", "function_call", "function_call"]
        assert whole.output[0].content[0].text == "Hm, é." and whole.output_text == CALLS.split("\n")[0]
        assert json.loads(whole.output[2].arguments) == {"city": "Paris"} and whole.output[2].name == "get_weather"
        events = list(api.responses.create(model="tiny", input="hi", tools=TOOLS, stream=True))
        assert stripped(events[-1].response.model_dump()) == stripped(whole.model_dump())
        told = [e.item for e in events if e.type == "response.output_item.done"]
        assert [stripped(i.model_dump()) for i in told] == [stripped(i.model_dump()) for i in whole.output]
        text = {e.output_index: "" for e in events if "delta" in e.type}
        for e in events:
            if e.type.endswith(".delta"):
                text[e.output_index] += e.delta
        assert text[0] == "Hm, é." and text[3] == whole.output[3].arguments


def test_a_conversation_goes_on_from_what_is_stored():
    with served(SCRIPTS) as (client, engine):
        api = official(client)
        first = api.responses.create(model="tiny", input="hi", instructions="ignored later")
        assert first.output_text  # the scripted engine repeats a prompt that it has no script for
        first = api.responses.create(model="tiny", input=[{"role": "user", "content": "hi"}])
        second = api.responses.create(model="tiny", input="more", instructions="be", previous_response_id=first.id)
        assert second.output_text == "less" and second.previous_response_id == first.id
        assert stripped(api.responses.retrieve(first.id).model_dump()) == stripped(first.model_dump())
        items = api.responses.input_items.list(second.id)
        assert [i.content[0].text for i in items.data] == ["more"]
        api.responses.delete(first.id)
        for call in (api.responses.retrieve, api.responses.delete):
            with pytest.raises(openai.NotFoundError, match="stored"):
                call(first.id)
        with pytest.raises(openai.NotFoundError):
            api.responses.create(model="tiny", input="more", previous_response_id=first.id)
        again = api.responses.create(model="tiny", input="x", previous_response_id=second.id)  # has its own history
        assert b"more" in engine.tokenizer.decode(engine.requests[-1].prompt.tolist()).encode() and again.id
        silent = api.responses.create(model="tiny", input="hi", store=False)
        with pytest.raises(openai.NotFoundError):
            api.responses.retrieve(silent.id)


def test_results_of_calls_go_back():
    """Oracle: the scripted template, written out."""
    want = "<s>user:hi|assistant:look[now{}]|tool:7|assistant:"
    with served({want: said("ok")}) as (client, engine):
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "look"}]},
            {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "7"},
        ]
        assert official(client).responses.create(model="tiny", input=items).output_text == "ok"
        assert engine.tokenizer.decode(engine.requests[-1].prompt.tolist(), skip_special=False) == want


@pytest.mark.parametrize(
    "more,param",
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input.0.name"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "x"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": "json_object"}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "strict": True, "schema": {"foo": 1}}}},
            "text.format.schema",
        ),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"temperature": 101}, "temperature"),
        ({"n": 2}, "n"),
        ({"timing": True}, "timing"),
        ({"input": 5}, "input"),
    ],
)
def test_bad_requests_name_the_field(shared, more, param):
    client, engine = shared
    r = client.post("/v1/responses", json={"input": "hi", **more})
    assert (r.status_code, r.json()["error"]["param"]) == (400, param), r.text
    assert not engine.requests


def test_the_format_of_the_text_is_held_to():
    """In both spellings, on its own and beside tools, where it is a part of a grammar with calls."""
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    with served(SCRIPTS) as (client, engine):
        for form, kind in (({"type": "json_object"}, "json_object"), (schema, "json_schema")):
            whole = official(client).responses.create(model="tiny", input="hi", text={"format": form})
            assert whole.text.format.type == kind and engine.requests[-1].grammar.kind == kind
            assert engine.requests[-1].grammar.field.startswith("text.format")
        official(client).responses.create(model="tiny", input="hi", text={"format": {"type": "text"}})
        assert engine.requests[-1].grammar is None
        official(client).responses.create(model="tiny", input="hi", text={"format": schema}, tools=TOOLS)
        assert engine.requests[-1].grammar.kind == "lark"
        for path, body in (("responses", {"input": "hi"}), ("messages", {"messages": MESSAGES, "max_tokens": 5})):
            assert client.post(f"/v1/{path}", json={**body, "guided_regex": "a+"}).status_code == 200
            assert engine.requests[-1].grammar.kind == "regex", path


def wait(api, id):
    end = time.monotonic() + 10
    while (got := api.responses.retrieve(id)).status == "in_progress":
        assert time.monotonic() < end
        time.sleep(0.005)
    return got


def test_responses_in_the_background_end_are_cancelled_and_fail():
    with served(SCRIPTS, pace=0.01) as (client, engine):
        api = official(client)
        begun = api.responses.create(model="tiny", input="hi", background=True)
        assert (begun.status, begun.background, begun.usage) == ("in_progress", True, None)
        r = client.post("/v1/responses", json={"input": "more", "previous_response_id": begun.id})
        assert (r.status_code, r.json()["error"]["param"]) == (400, "previous_response_id")
        whole = wait(api, begun.id)
        assert whole.status == "completed" and whole.output_text == "Hello, wörld!" and whole.background
        assert stripped(api.responses.cancel(begun.id).to_dict()) == stripped(whole.to_dict())
        on = dict(model="tiny", instructions="be", input="more", previous_response_id=begun.id)
        assert api.responses.create(**on).output_text

        begun = api.responses.create(model="tiny", input="hi", background=True)
        while not api.responses.retrieve(begun.id).output:
            time.sleep(0.005)
        ended = api.responses.cancel(begun.id)
        assert ended.status == "cancelled" and ended.output[0].status == "incomplete"
        assert "Hello, wörld!".startswith(ended.output_text) and not engine.live
        assert api.responses.retrieve(begun.id).to_dict() == ended.to_dict()
        begun = api.responses.create(model="tiny", input="fails", background=True)
        failed = wait(api, begun.id)
        assert failed.status == "failed" and "42" in failed.error.message
        begun = api.responses.create(model="tiny", input="hi", background=True)
        api.responses.delete(begun.id)
        for gone in (begun.id, "resp_x"):
            with pytest.raises(openai.NotFoundError):
                api.responses.cancel(gone)
        with pytest.raises(openai.BadRequestError, match="background"):
            api.responses.cancel(api.responses.create(model="tiny", input="hi").id)
        assert client.get("/load").json() == {"server_load": 0} and not engine.live


def test_a_fault_is_a_failed_response():
    with served(SCRIPTS) as (client, _):
        *_, last = official(client).responses.create(model="tiny", input="fails", stream=True)
        assert (
            last.type == "response.failed" and last.response.status == "failed" and "42" in last.response.error.message
        )
        assert client.post("/v1/responses", json={"input": "fails"}).status_code == 500
        ignored = {"reasoning": {"summary": "auto"}, "text": {"verbosity": "low"}, "include": [], "fancy": 1}
        r = client.post("/v1/responses", json={"input": "hi", **ignored})
        assert r.headers["x-fnengine-ignored"] == "fancy, include, reasoning.summary, text.verbosity"


def test_the_store_is_bounded_by_number_and_bytes():
    def one(id, n=10):
        return Stored({"id": id}, ({"text": "x" * n},), ())

    store = Store(3, 1000)
    for id in "abc":
        store.put(one(id))
    store.get("a")
    store.put(one("d"))
    with pytest.raises(NotFound):
        store.get("b")  # a was asked for since
    assert store.get("a") and len(store) == 3
    size = store.bytes
    store.put(one("a"))
    assert (store.bytes, len(store)) == (size, 3), "one that is put again is there once"
    store.put(one("big", 900))
    assert store.get("big") and len(store) <= 3 and store.bytes <= 1000
    store.put(one("huge", 2000))
    with pytest.raises(NotFound):
        store.get("huge")
    for id in list(store._kept):
        store.drop(id)
    assert store.bytes == 0 and not len(store)
