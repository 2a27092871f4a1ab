"""The official client, strict: every method it has for our endpoints, each answer held to the client's own types.

Oracles: the client's pydantic models with `_strict_response_validation`, which takes no value outside a closed list,
and the law that what the client read, written out again, is what was sent: nothing was bent to fit.
"""

from __future__ import annotations

import base64
import json
import time
from contextlib import contextmanager

import numpy as np
import openai
import pydantic
import pytest

from tests.test_tools import CALLS, NOW, PROMPT, QWEN, TWO_CALLS, WEATHER, said, served

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 40}
ASK = {**CHAT, "tools": [WEATHER, NOW]}
FUNCTIONS = [{"type": "function", "strict": False, **t["function"]} for t in (WEATHER, NOW)]
PERSON = '{"name": "Anna", "age": 7}'
SCRIPTS = {
    "hello": said("Hello, wörld!"),
    "<s>user:hi|assistant:": said("Hello there, 世界."),
    "<s>user:person|assistant:": said(PERSON),
    "<s>user:thinks|assistant:": said("<think>\nHm, é.\n</think>\n\nWell."),
    "<s>user:fails|assistant:": said("abcdef", fail_at=3),
    PROMPT: said(TWO_CALLS),
}


class Person(pydantic.BaseModel):
    name: str
    age: int


def same(read, sent) -> bool:
    """Equality of JSON values that keeps true and 1 apart."""
    if isinstance(read, dict) and isinstance(sent, dict):
        return read.keys() == sent.keys() and all(same(v, sent[k]) for k, v in read.items())
    if isinstance(read, list) and isinstance(sent, list):
        return len(read) == len(sent) and all(map(same, read, sent))
    return isinstance(read, bool) == isinstance(sent, bool) and read == sent


def as_typed(data):
    """An answer without what OpenAI's own API sends and its client's types do not have: `finish_reason` null in a chunk
    of a completion, null for the log-probability of a prompt's first token, vectors in base64, which the client asks
    for by default and reads behind its check."""
    data = json.loads(json.dumps(data))
    if data.get("object") == "text_completion":
        for choice in data["choices"]:
            streamed = "usage" not in data or data["usage"] is None
            if streamed and choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"
            lp = choice["logprobs"]
            if lp and lp["token_logprobs"][:1] == lp["top_logprobs"][:1] == [None] and lp["text_offset"][0] == 0:
                lp["token_logprobs"][0], lp["top_logprobs"][0] = 0.0, {}
    if data.get("object") == "list":
        for one in data["data"]:
            if isinstance(one.get("embedding"), str):
                one["embedding"] = np.frombuffer(base64.b64decode(one["embedding"], validate=True), "<f4").tolist()
    return data


class Strict(openai.OpenAI):
    """Checks every answer and every event of a stream, and counts them by type."""

    def __init__(self, **kw):
        super().__init__(base_url="http://testserver/v1", api_key="k", max_retries=0, timeout=20, **kw)
        self._strict_response_validation = True
        self.read: list[str] = []

    def _process_response_data(self, *, data, cast_to, response):
        data = as_typed(data)
        sent = json.loads(json.dumps(data))
        value = super()._process_response_data(data=data, cast_to=cast_to, response=response)
        if isinstance(value, pydantic.BaseModel):
            assert same(value.model_dump(mode="json", exclude_unset=True, by_alias=True, warnings="error"), sent)
        self.read.append(type(value).__name__)
        return value


@pytest.fixture(scope="module")
def shared():
    with served(SCRIPTS, QWEN) as (client, _):
        yield Strict(http_client=client)


@pytest.fixture
def api(shared):
    shared.read.clear()
    yield shared
    assert shared.read, "nothing was read strictly"


def raw(response):
    """What stands in an answer, of which the client had only the bytes."""
    assert response.http_response.status_code == 200 and response.headers["x-request-id"]
    return response.parse()


# --- completions ------------------------------------------------------------------------------------------------------

COMPLETIONS = [
    {},
    {"n": 2, "temperature": 1.0},
    {"logprobs": 3},
    {"echo": True, "logprobs": 0, "max_tokens": 2},
    {"prompt": ["hello", "hi"]},
    {"prompt": [[104, 105], [97]]},
    {"stop": ["lo"], "seed": 3, "user": "me"},
    {"max_tokens": 1},
    {"best_of": 3, "n": 2, "temperature": 1.0},
    {"extra_body": {"timing": True, "return_token_ids": True, "prompt_logprobs": 1}},
]


@pytest.mark.parametrize("more", COMPLETIONS)
def test_completions(api, more):
    ask = {**TEXT, **more}
    whole = api.completions.create(**ask)
    assert same(raw(api.completions.with_raw_response.create(**ask)).choices[0].text, whole.choices[0].text)
    if "prompt_logprobs" in ask.get("extra_body", {}) or "best_of" in ask:  # which are not streamed
        return
    ask["stream_options"] = {"include_usage": True}
    chunks = list(api.completions.create(**ask, stream=True))
    assert api.read.count("Completion") == 2 + len(chunks)
    text = {c.index: "" for c in whole.choices}
    for chunk in chunks:
        for c in chunk.choices:
            text[c.index] += c.text
    assert text == {c.index: c.text for c in whole.choices} and chunks[-1].usage == whole.usage


# --- chat -------------------------------------------------------------------------------------------------------------

CHATS = [
    CHAT,
    {**CHAT, "n": 2, "temperature": 1.0},
    {**CHAT, "logprobs": True, "top_logprobs": 3},
    {**CHAT, "logprobs": True},
    {**CHAT, "max_completion_tokens": 3, "stop": ["zz"], "seed": 1, "metadata": {"a": "b"}, "store": False},
    {**CHAT, "messages": [{"role": "user", "content": "thinks"}], "reasoning_effort": "low"},
    ASK,
    {**ASK, "logprobs": True, "top_logprobs": 1, "n": 2},
    {**ASK, "parallel_tool_calls": False, "tool_choice": "auto"},
    {**ASK, "tool_choice": "none"},
    {**CHAT, "extra_body": {"timing": True, "return_token_ids": True, "return_tokens_as_token_ids": True}},
]


@pytest.mark.parametrize("ask", CHATS)
def test_chat(api, ask):
    whole = api.chat.completions.create(**ask)
    again = raw(api.chat.completions.with_raw_response.create(**ask))
    assert again.choices[0].message.content == whole.choices[0].message.content
    chunks = list(api.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert api.read.count("ChatCompletionChunk") == len(chunks) and chunks[-1].usage == whole.usage
    text = {c.index: "" for c in whole.choices}
    for chunk in chunks:
        for c in chunk.choices:
            text[c.index] += c.delta.content or ""
    assert text == {c.index: c.message.content or "" for c in whole.choices}
    with api.chat.completions.with_streaming_response.create(**ask, stream=True) as response:
        assert response.status_code == 200 and list(response.iter_lines())[-2] == "data: [DONE]"


@pytest.mark.parametrize("ask", [ask for ask in CHATS if "stop" not in ask])  # that one is cut, which is an error here
def test_the_clients_own_accumulation_of_a_chat(api, ask):
    """`chat.completions.stream` puts a stream together by itself, and refuses what does not fit."""
    ask = {k: v for k, v in ask.items() if k != "tools"} | (
        {"tools": [openai.pydantic_function_tool(Person)]} if "tools" in ask else {}
    )
    if "tools" in ask:
        ask["messages"] = [{"role": "user", "content": "person"}]
    with api.chat.completions.stream(**ask) as stream:
        kinds = {event.type for event in stream}
        made = stream.get_final_completion()
    whole = api.chat.completions.create(**ask)
    assert "chunk" in kinds and [c.message.content for c in made.choices] == [c.message.content for c in whole.choices]
    assert [c.finish_reason for c in made.choices] == [c.finish_reason for c in whole.choices]
    assert [c.logprobs and c.logprobs.content for c in made.choices] == [
        c.logprobs and c.logprobs.content for c in whole.choices
    ]


def test_calls_as_the_client_reads_them(api):
    message = api.chat.completions.create(**ASK).choices[0].message
    assert [json.loads(c.function.arguments) for c in message.tool_calls] == [
        {"city": "Paris"},
        {"city": "Rome", "days": 2},
    ]
    assert message.content == CALLS.split("\n")[0]
    with api.chat.completions.stream(**ASK) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
    assert [(e.name, e.index) for e in done] == [("get_weather", 0), ("get_weather", 1)]
    assert [e.arguments for e in done] == [c.function.arguments for c in message.tool_calls]


def test_parse_reads_a_type(api):
    ask = {**CHAT, "messages": [{"role": "user", "content": "person"}], "response_format": Person}
    assert api.chat.completions.parse(**ask).choices[0].message.parsed == Person(name="Anna", age=7)
    assert raw(api.chat.completions.with_raw_response.parse(**ask)).choices[0].message.parsed.age == 7
    with api.chat.completions.stream(**ask) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Anna", age=7)
    with pytest.raises(openai.LengthFinishReasonError):
        api.chat.completions.parse(**ask, max_tokens=3)


# --- embeddings, models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["hello", ["hello", "hi"], [104, 105], [[104], [105, 106]]])
@pytest.mark.parametrize("form", ["float", "base64", None])
def test_embeddings(api, value, form):
    more = {} if form is None else {"encoding_format": form}
    got = api.embeddings.create(model="tiny", input=value, **more)
    many = isinstance(value, list) and not isinstance(value[0], int)
    assert [d.index for d in got.data] == list(range(len(value) if many else 1))
    assert form == "base64" or len(got.data[0].embedding) == 4
    if form != "base64":
        assert api.embeddings.create(model="tiny", input=value, dimensions=2, **more).data[0].object == "embedding"
    assert raw(api.embeddings.with_raw_response.create(model="tiny", input=value, **more)).usage == got.usage


def test_models(api):
    assert [m.id for m in api.models.list()] == ["tiny", "alias"]
    assert api.models.retrieve("alias").owned_by == "fnengine"
    assert [m.id for m in raw(api.models.with_raw_response.list()).data] == ["tiny", "alias"]
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other")
    with pytest.raises(openai.APIStatusError) as e:
        api.models.delete("tiny")
    assert e.value.status_code == 405


# --- responses --------------------------------------------------------------------------------------------------------

RESPONSES = [
    {"input": "hi"},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
    {"input": "hi", "max_output_tokens": 3},
    {"input": "hi", "instructions": "be kind", "temperature": 0.5, "top_p": 0.9, "metadata": {"a": "b"}},
    {"input": "thinks", "reasoning": {"effort": "low"}},
    {"input": "hi", "tools": FUNCTIONS},
    {"input": "hi", "tools": FUNCTIONS, "parallel_tool_calls": False, "tool_choice": "auto"},
    {"input": "hi", "tools": FUNCTIONS, "tool_choice": "none", "store": False},
]


@pytest.mark.parametrize("ask", RESPONSES)
def test_responses(api, ask):
    ask = {"model": "tiny", **ask}
    whole = api.responses.create(**ask)
    events = list(api.responses.create(**ask, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].type == f"response.{whole.status}" and events[-1].response.output_text == whole.output_text
    assert raw(api.responses.with_raw_response.create(**ask)).output_text == whole.output_text
    with api.responses.stream(**ask) as stream:
        list(stream)
        if whole.status == "completed":
            assert stream.get_final_response().output_text == whole.output_text


def test_a_response_is_read_counted_and_forgotten(api):
    made = api.responses.create(model="tiny", input="hi")
    assert api.responses.retrieve(made.id) == made
    (item,) = api.responses.input_items.list(made.id)
    assert (item.role, item.content[0].text) == ("user", "hi")
    everything = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "calling"},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "noon"}]},
    ]
    long = api.responses.create(model="tiny", input=everything)
    kinds = [type(i).__name__ for i in api.responses.input_items.list(long.id)]
    assert kinds == [
        *["ResponseInputMessageItem"] * 2,
        "ResponseReasoningItem",
        "ResponseOutputMessage",
        "ResponseFunctionToolCallItem",
        *["ResponseFunctionToolCallOutputItem"] * 2,
    ]
    with pytest.raises(openai.BadRequestError, match="background"):
        api.responses.cancel(made.id)
    assert api.responses.delete(made.id) is None
    for gone in (api.responses.retrieve, api.responses.delete, api.responses.cancel, api.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)


def test_input_tokens_are_those_that_usage_tells(api):
    ask = {"model": "tiny", "input": "hi", "instructions": "be kind", "tools": FUNCTIONS}
    counted = api.responses.input_tokens.count(**ask)
    assert counted.input_tokens == api.responses.create(**ask).usage.input_tokens
    with pytest.raises(openai.BadRequestError):
        api.responses.input_tokens.count(model="tiny", input=[{"type": "nothing"}])


def test_parse_of_a_response_reads_calls(api):
    made = api.responses.parse(model="tiny", input="hi", tools=FUNCTIONS)
    assert [i.name for i in made.output if i.type == "function_call"] == ["get_weather"] * 2


def test_parse_of_a_response_reads_a_type(api):
    ask = {"model": "tiny", "input": "person", "text_format": Person}
    made = api.responses.parse(**ask)
    assert made.output_parsed == Person(name="Anna", age=7) and made.text.format.type == "json_schema"
    assert raw(api.responses.with_raw_response.parse(**ask)).output_parsed.age == 7
    with api.responses.stream(**ask) as stream:
        list(stream)
        assert stream.get_final_response().output_parsed == Person(name="Anna", age=7)


def test_a_response_in_the_background(api):
    made = api.responses.create(model="tiny", input="hi", background=True)
    assert made.background and made.status in ("queued", "in_progress", "completed")
    end = time.monotonic() + 10
    while (now := api.responses.retrieve(made.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert now.status == "completed" and now.output_text == "Hello there, 世界."
    assert api.responses.cancel(made.id).status in ("completed", "cancelled")


def test_a_fault_in_a_stream_is_what_the_client_raises(api):
    fails = [{"role": "user", "content": "fails"}]
    with pytest.raises(openai.APIError, match="42"):
        list(api.chat.completions.create(model="tiny", messages=fails, stream=True))
    with pytest.raises(openai.InternalServerError, match="42"):
        api.chat.completions.create(model="tiny", messages=fails)
    events = list(api.responses.create(model="tiny", input="fails", stream=True))
    assert events[-1].type == "response.failed" and "42" in events[-1].response.error.message


# --- what we have no endpoint for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda api: api.chat.completions.list(),
        lambda api: api.chat.completions.retrieve("x"),
        lambda api: api.chat.completions.update("x", metadata={}),
        lambda api: api.chat.completions.delete("x"),
        lambda api: api.chat.completions.messages.list("x"),
        lambda api: api.responses.compact(model="tiny"),
        lambda api: api.images.generate(prompt="x"),
        lambda api: api.files.list(),
    ],
)
def test_what_is_not_there_is_an_error_the_client_knows(shared, call):
    with pytest.raises(openai.APIStatusError) as e:
        call(shared)
    assert e.value.status_code in (404, 405, 501) and e.value.body.keys() == {"message", "type", "param", "code"}


# --- the proof can fail -----------------------------------------------------------------------------------------------


@contextmanager
def bent(change):
    """A strict client whose answers have been changed on the way."""
    with served(SCRIPTS, QWEN) as (client, _):
        send = client.send

        def sent(request, **kw):
            response = send(request, **kw)
            response.read()
            response._content = change(response.content)
            return response

        client.send = sent
        yield Strict(http_client=client)


@pytest.mark.parametrize(
    "old, new, wrong",
    [
        (b'"finish_reason":"stop"', b'"finish_reason":"abort"', openai.APIResponseValidationError),
        (b'"finish_reason":"stop"', b'"finish_reason":null', openai.APIResponseValidationError),
        (b'"index":0', b'"index":"0"', AssertionError),
        (b'"object":"chat.completion"', b'"object":"chat"', openai.APIResponseValidationError),
        (b'"refusal":null', b'"refusal":false', openai.APIResponseValidationError),
    ],
)
def test_a_bent_answer_is_caught(old, new, wrong):
    with bent(lambda content: content.replace(old, new)) as api, pytest.raises(wrong):
        api.chat.completions.create(**CHAT)


def test_a_bent_event_is_caught():
    def change(content):
        return content.replace(b'"type":"response.output_text.delta"', b'"type":"response.text"')

    with bent(change) as api, pytest.raises(openai.APIResponseValidationError):
        list(api.responses.create(model="tiny", input="hi", stream=True))
