"""The server's pure parts. Oracles: answers worked out by hand, laws over every way of cutting, prometheus_client."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as PrometheusHistogram

from fnengine.errors import RequestError
from fnengine.host.output import Delta, TokenLogprob, Usage
from fnengine.serve import answer as answering
from fnengine.serve import bodies, protocol, translate
from fnengine.serve.answer import Answer, offsets
from fnengine.serve.app import make_app
from fnengine.serve.bodies import PIECE, loads
from fnengine.serve.flight import Thinning, joined
from fnengine.serve.metrics import FIRST_TOKEN, Histogram, one_two_five

if "scripted_engine" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("scripted_engine", Path(__file__).with_name("scripted_engine.py"))
    sys.modules["scripted_engine"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["scripted_engine"])
from scripted_engine import AB, BOS, EOS, ByteText, ScriptedEngine, likely

TEXT = ByteText()


def shape(**kw) -> translate.Shape:
    facts = {"kind": "completion", "id": "cmpl-1", "created": 7, "model": "m", "fingerprint": "f"}
    return translate.Shape(**(facts | {"prompts": ((104, 105),)} | kw))


# --- chunks and bodies ------------------------------------------------------------------------------------------------


def test_a_chat_stream_written_out():
    a = Answer(shape(kind="chat", id="chatcmpl-1", include_usage=True), TEXT)
    head = 'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m","choices":['
    role = '{"role":"assistant","content":""}'
    got = a.chunks(0, Delta(0, 'a"é', (1, 2)))
    assert got == (
        head
        + f'{{"index":0,"delta":{role},"logprobs":null,"finish_reason":null}}],"usage":null}}\n\n'
        + head
        + '{"index":0,"delta":{"content":"a\\"\\u00e9"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    )
    assert a.chunks(0, Delta(0, "", (3,))) == ""  # nothing to show; counted all the same
    got = a.chunks(0, Delta(0, "", (4,), finish="stop", stop_reason=4, usage=Usage(2, 1, 4)))
    assert got == head + (
        '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":4}],'
        '"system_fingerprint":"f","usage":null}\n\n'
    )
    assert a.done
    assert a.last_chunk() == head + (
        '],"system_fingerprint":"f","usage":{"prompt_tokens":2,"completion_tokens":4,"total_tokens":6,'
        '"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
    )


def test_line_ends_of_every_kind_are_escaped():
    """str.splitlines knows eleven line ends; none may occur inside an event, or some client cuts it there."""
    text = "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029"
    got = Answer(shape(), TEXT).chunks(0, Delta(0, text, (1,)))
    assert len(got.splitlines()) == 2 and got.endswith("\n\n")
    assert json.loads(got[6:])["choices"][0]["text"] == text


@st.composite
def conversations(draw):
    """(shape, deltas): every choice's tokens cut at random, and the choices interleaved at random."""
    n, prompts = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kind = draw(st.sampled_from(["chat", "completion"])) if prompts == 1 else "completion"
    logprobs = draw(st.sampled_from([None, 0, 2]))
    echo = kind == "completion" and draw(st.booleans())
    ids = tuple((104, 105 + p) for p in range(prompts))
    s = shape(
        kind=kind,
        n=n,
        prompts=ids,
        logprobs=logprobs,
        echo=tuple(TEXT.decode(i) for i in ids) if echo else None,
        return_ids=draw(st.booleans()),
        include_usage=True,
    )
    queues = []
    for p in range(prompts):
        for i in range(n):
            tokens = [*draw(st.lists(st.integers(97, 122), min_size=0, max_size=6)), EOS]
            queue, at = [], 0
            while at < len(tokens):
                end = draw(st.integers(at + 1, len(tokens)))
                part = tuple(tokens[at:end])
                last = end == len(tokens)
                scored = (
                    (None, likely(ids[p][1], logprobs))
                    if at == 0 and i == 0 and echo and logprobs is not None
                    else None
                )
                delta = Delta(
                    i,
                    TEXT.decode(part),
                    part,
                    None if logprobs is None else tuple(likely(t, logprobs) for t in part),
                    scored,
                    "stop" if last else None,
                    None,
                    None,
                    Usage(2, 0, len(tokens)) if last else None,
                )
                queue.append((p, delta))
                at = end
            queues.append(queue)
    deltas = []
    while any(queues):
        q = draw(st.sampled_from([q for q in queues if q]))
        deltas.append(q.pop(0))
    return s, deltas


def assemble(s, deltas):
    """What a client puts together from a stream, per choice: text, log-probabilities, ids, finish."""
    a = Answer(s, TEXT)
    raw = "".join(a.chunks(p, d) for p, d in deltas) + a.last_chunk()
    events = [json.loads(e[6:]) for e in raw.split("\n\n")[:-1]]
    out = [{"text": "", "lp": [], "ids": [], "finish": []} for _ in range(s.n * len(s.prompts))]
    for e in events[:-1]:
        (c,) = e["choices"]
        o = out[c["index"]]
        assert not o["finish"], "nothing follows the terminal chunk"
        o["text"] += c["text"] if s.kind == "completion" else c["delta"].get("content", "")
        lp = c["logprobs"]
        if lp is not None:
            o["lp"] += lp["content"] if s.kind == "chat" else list(zip(*lp.values(), strict=True))
        o["ids"] += c.get("token_ids", [])
        if c["finish_reason"] is not None:
            o["finish"].append(c["finish_reason"])
    return out, events[-1]["usage"]


def whole(s, deltas):
    a = Answer(s, TEXT)
    for p, d in deltas:
        a.take(p, d)
    body = json.loads(answering.dump(a.body()))
    out = []
    for c in body["choices"]:
        lp = c["logprobs"]
        if lp is not None:
            lp = lp["content"] if s.kind == "chat" else [list(x) for x in zip(*lp.values(), strict=True)]
        text = c["text"] if s.kind == "completion" else c["message"]["content"]
        out.append({"text": text, "lp": lp or [], "ids": c.get("token_ids", []), "finish": [c["finish_reason"]]})
    return out, body["usage"]


def law(case):
    """The stream put together, the whole answer, and the deltas simply added up are the same."""
    s, deltas = case
    streamed, usage = assemble(s, deltas)
    for i, o in enumerate(streamed):
        prompt, index = divmod(i, s.n)
        mine = [d for p, d in deltas if (p, d.index) == (prompt, index)]
        echoed = "" if s.echo is None else s.echo[prompt]
        assert o["text"] == echoed + "".join(d.text for d in mine)
        tokens = [t for d in mine for t in d.tokens]
        assert o["ids"] == (tokens if s.return_ids else []) and o["finish"] == ["stop"]
        scored = len(tokens) + (len(s.prompts[prompt]) if s.echo is not None else 0)
        assert len(o["lp"]) == (0 if s.logprobs is None else scored)
    assert usage["completion_tokens"] == sum(len(d.tokens) for _, d in deltas)
    for o in streamed:
        o["lp"] = json.loads(json.dumps(o["lp"]))
    assert (streamed, usage) == whole(s, deltas)


@settings(max_examples=150, deadline=None)
@given(conversations())
def test_a_stream_put_together_is_the_whole_answer(case):
    law(case)


@settings(max_examples=100, deadline=None)
@given(conversations(), st.integers(1, 5))
def test_thinning_changes_nothing_but_the_number_of_chunks(case, interval):
    s, deltas = case
    thin = Thinning(interval)
    fewer = [x for item in deltas for x in thin([item])]
    streamed, usage = assemble(s, fewer)
    plain, _ = assemble(s, deltas)
    assert [o["text"] for o in streamed] == [o["text"] for o in plain] and len(fewer) <= len(deltas)
    assert [o["ids"] for o in streamed] == [o["ids"] for o in plain]
    assert usage["completion_tokens"] == sum(len(d.tokens) for _, d in deltas)


def test_joined_deltas():
    a = Delta(1, "x", (1,), (TokenLogprob(1, -1.0),), (None,))
    b = Delta(1, "y", (2,), (TokenLogprob(2, -2.0),), finish="stop", usage=Usage(1, 0, 2))
    assert joined(a, b) == b._replace(
        text="xy", tokens=(1, 2), logprobs=a.logprobs + b.logprobs, prompt_logprobs=(None,)
    )


def drops_held(original):
    def piece(self, prompt, delta):
        return iter(()) if self._waits and prompt not in self.scored and delta.index else original(self, prompt, delta)

    return piece


def twice_ended(original):
    def chunk(self, c, piece):
        text = original(self, c, piece)
        return text * 2 if "finish" in piece else text

    return chunk


def swaps_choices(original):
    def chunk(self, c, piece):
        return original(self, self.choices[-1 - c.index], piece)

    return chunk


@pytest.mark.parametrize(
    "name,mutate",
    [("pieces", drops_held), ("_chunk", twice_ended), ("_chunk", swaps_choices)],
    ids=["drops held", "twice ended", "swaps choices"],
)
def test_mutants_of_the_stream_law_are_caught(monkeypatch, name, mutate):
    original = getattr(Answer, name)

    def breaks(case):
        monkeypatch.setattr(Answer, name, mutate(original))
        try:
            law(case)
        except (AssertionError, KeyError, IndexError):
            return True
        finally:
            monkeypatch.setattr(Answer, name, original)
        return False

    # Any case will do: looking for the smallest one takes minutes.
    find(
        conversations(),
        breaks,
        settings=settings(max_examples=500, deadline=None, database=None, phases=[Phase.generate]),
    )


# --- offsets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids,within,expected",
    [
        ((97,), "a", [5]),
        ((97, AB, 98), "aabb", [5, 6, 8]),
        (tuple("aé世b".encode()), "aé世b", [5, 6, 6, 7, 7, 7, 8]),
        ((BOS, 97, 98), "ab", [5, 5, 6]),
        ((97, EOS), "a", [5, 6]),
        ((32, 97, 98), "ab", [5, 5, 6]),  # a dropped leading space
        ((97, 98, 99), "a", [5, 6, 6]),  # cut by a stop string
    ],
)
def test_offsets_by_hand(ids, within, expected):
    assert offsets(TEXT, ids, within, 5) == expected


@given(st.text(min_size=2, max_size=30))
def test_offsets_of_bytes_name_their_own_character(text):
    raw = text.encode("utf-8", "ignore")
    text = raw.decode()
    if len(raw) > 1:
        expected = [i for i, c in enumerate(text) for _ in c.encode()]
        assert offsets(TEXT, tuple(raw), text, 0) == expected


# --- reading bodies ---------------------------------------------------------------------------------------------------


def test_integers_may_be_written_with_a_point_and_nothing_else_is_bent():
    body, _ = protocol.parse(protocol.CompletionBody, {"prompt": "x", "max_tokens": 5.0, "temperature": 1})
    assert body.max_tokens == 5 and isinstance(body.max_tokens, int) and body.temperature == 1.0
    for bad in ({"max_tokens": "5"}, {"max_tokens": True}, {"temperature": "1"}, {"echo": 1}, {"stop": 5}):
        with pytest.raises(RequestError) as e:
            protocol.parse(protocol.CompletionBody, {"prompt": "x", **bad})
        assert e.value.param == next(iter(bad))


def test_every_refused_field_accepts_each_of_its_neutral_values_and_no_other():
    for name, neutral in protocol.REFUSED.items():
        for value in neutral:
            _, ignored = protocol.parse(protocol.CompletionBody, {"prompt": "x", name: value})
            assert ignored == ()
        with pytest.raises(RequestError) as e:
            protocol.parse(protocol.CompletionBody, {"prompt": "x", name: {"something": "else"}})
        assert e.value.param == name and name in str(e.value)


def test_no_field_is_of_two_kinds():
    typed = set(protocol.CompletionBody.model_fields) | set(protocol.ChatBody.model_fields)
    assert not typed & protocol.HINTS and not typed & protocol.REFUSED.keys()
    assert not protocol.HINTS & protocol.REFUSED.keys()


# --- large bodies -----------------------------------------------------------------------------------------------------

jsons = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda x: st.lists(x, max_size=5) | st.dictionaries(st.text(max_size=5), x, max_size=3)
    | st.lists(st.integers(-9, 99) | st.floats(-1e3, 1e3), max_size=12),
    max_leaves=12,
)  # fmt: skip


def outcome(load, text):
    """A value, or the kind of error; where it lies may differ in lists of numbers."""
    try:
        return repr(load(text))
    except (ValueError, RecursionError) as e:
        return type(e)


@settings(max_examples=300, deadline=None)
@given(
    jsons,
    st.sampled_from([None, 1]),
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from('[]{},:"1-e. \\')), max_size=2),
)
def test_json_in_pieces_is_json(value, indent, changes):
    """Oracle: `json.loads`, on texts that are JSON and on others."""
    text = json.dumps(value, indent=indent)
    for at, c in changes:
        text = text[: at % (len(text) + 1)] + c + text[at % (len(text) + 1) :]
    for piece in (1, 3, 20):
        assert outcome(lambda t, p=piece: loads(t, float, p), text) == outcome(json.loads, text)


def test_large_bodies_are_read_in_pieces_and_say_what_is_wrong():
    many = list(range(200_000))
    assert protocol.read_json(json.dumps({"prompt": many}).encode()) == {"prompt": many}
    for bad, says in (
        ('{"a": [%s,]}', "not JSON"),
        ('{"a": [%s, NaN]}', "NaN"),
        ('{"a": [%s], "b": "\\ud800"}', "surrogate"),
        ('{"a": [%s]} x', "Extra data"),
        ('{"a": [%s], "b": ' + "[" * 5000 + "]" * 5000 + "}", "deeply"),
        ("[%s]", "object"),
    ):
        with pytest.raises(RequestError, match=says):
            protocol.read_json((bad % ",".join(map(str, many))).encode())
    pair = protocol.read_json(f'{{"a": {json.dumps(many)}, "b": "\\ud83d\\ude00"}}'.encode())
    assert pair["b"] == "\U0001f600"


def test_nothing_of_a_large_body_is_read_at_once_but_pieces_and_strings(monkeypatch):
    """`json.loads` keeps every other thread waiting until it is done, 200 ms for a million token ids."""
    read = []
    monkeypatch.setattr(bodies.json, "loads", lambda t, load=json.loads: (read.append(len(t)), load(t))[1])
    text = json.dumps({"prompt": [list(range(50_000)), [0.5] * 50_000], "stop": ["a"] * 9000})
    found = loads(text, float)
    assert len(found["prompt"][0]) == len(found["prompt"][1]) == 50_000 and len(found["stop"]) == 9000
    assert max(read) <= PIECE + 2 and sum(read) > 0.9 * len(text) - 9000 * 5


# --- hostile bodies ---------------------------------------------------------------------------------------------------

NAMES = sorted({*protocol.CompletionBody.model_fields, *protocol.ChatBody.model_fields, *protocol.REFUSED})
NAMES += sorted(protocol.HINTS)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "x"]) | scalars,
        "content": st.text(max_size=5) | values,
        "tool_calls": values,
        "name": values,
    },
)


class Loopback:
    """Calls an ASGI application in process, without a transport in between."""

    def __init__(self, app):
        self.app = app

    async def post(self, path: str, raw: bytes):
        got = {"status": 0, "body": b"", "headers": {}}
        waiting = asyncio.Event()
        first = True

        async def receive():
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": raw, "more_body": False}
            await waiting.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                got["status"], got["headers"] = message["status"], dict(message["headers"])
            else:
                got["body"] += message.get("body", b"")

        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
        scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": []}
        scope |= {"client": ("t", 1), "server": ("t", 80)}
        await self.app(scope, receive, send)
        waiting.set()
        return got


def _hostile():
    engine, faults = ScriptedEngine(max_len=60), []
    return engine, make_app(engine, log=faults.append), faults


HOSTILE = _hostile()
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/abort_requests"]


@settings(max_examples=400, deadline=None)
@given(
    path=st.sampled_from(PATHS),
    body=st.dictionaries(st.sampled_from([*NAMES, "tokens", "request_ids"]), values, max_size=4),
    base=st.booleans(),
    messages=st.lists(turns, max_size=2) | values,
)
def test_hostile_values_never_give_a_500_and_leave_nothing_open(path, body, base, messages):
    if base:
        body = {"prompt": "x", "max_tokens": 3} | body if path == "/v1/completions" else {"max_tokens": 3} | body
        if path in ("/v1/chat/completions", "/tokenize"):
            body.setdefault("messages", messages)

    engine, app, faults = HOSTILE

    async def main():
        faults.clear()
        await engine.start()
        got = await asyncio.wait_for(Loopback(app).post(path, json.dumps(body).encode()), 20)
        await engine.stop(0)
        assert got["status"] in (200, 400, 404), (got, body, faults)
        assert not faults and not engine.live and not app.state.flights
        del engine.requests[:], engine.aborted[:]
        if got["status"] != 200:
            error = json.loads(got["body"])["error"]
            assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 2000

    asyncio.run(main())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_hostile_bytes_are_400(raw):
    _, app, _ = HOSTILE
    assert asyncio.run(Loopback(app).post("/v1/completions", raw))["status"] == 400


# --- metrics ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 5000) | st.sampled_from(FIRST_TOKEN), max_size=50))
def test_histogram_counts_as_prometheus_client_does(observed):
    registry = CollectorRegistry()
    oracle = PrometheusHistogram("x", "x", buckets=FIRST_TOKEN, registry=registry)
    mine = Histogram(FIRST_TOKEN)
    half = len(observed) // 2
    for v in observed:
        oracle.observe(v)
    mine.add(observed[:half])
    mine.add(observed[half:])
    samples = {s.labels.get("le", s.name): s.value for s in next(iter(registry.collect())).samples}
    for bound, count in mine.buckets():
        assert samples[bound] == count
    assert math.isclose(samples["x_sum"], mine.sum, abs_tol=1e-9)


def test_one_two_five():
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100) and one_two_five(7) == (1, 2, 5)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("usage", [True, False])
def test_the_short_way_to_a_chunk_writes_what_the_long_one_does(kind, usage):
    asked = shape(kind=kind, prompts=((1,), (2, 3)), n=2, stream=True, include_usage=usage)
    short, long = Answer(asked, ByteText()), Answer(asked, ByteText())
    long._fronts = None
    deltas = [
        (p, Delta(i, text, (97,) * k))
        for p, i, text, k in [(0, 0, "a", 1), (1, 1, 'é"\n\u2028', 3), (0, 0, "bc", 2), (1, 1, "", 1), (1, 1, "x", 1)]
    ]
    ends = [(p, Delta(i, "", (), finish="stop", usage=Usage(1, 0, 3))) for p in (0, 1) for i in (0, 1)]
    for prompt, delta in deltas + ends:
        assert short.chunks(prompt, delta) == long.chunks(prompt, delta)
    assert [(c.length, c.tokens) for c in short.choices] == [(c.length, c.tokens) for c in long.choices]
    assert short.last_chunk() == long.last_chunk()
