"""Whatever /openapi.json allows, and what it forbids, sent to the bundled model: no 5xx, and errors in one shape.

Oracles: schemathesis makes the requests from the description; the shape of errors is written out.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections import Counter

import jsonschema_rs
import pytest
import schemathesis.openapi
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core import NotSet
from starlette.testclient import TestClient

import fnengine as fn
from fnengine.serve.app import make_app
from fnengine.serve.routes import UNBUILT

METHODS = ("get", "post", "delete", "put", "patch")
LEFT_OUT = ("/start_profile", "/stop_profile")
"""Torch's profiler takes seconds; it has tests of its own."""
SIZES = {"max_model_len": 64, "max_num_seqs": 8, "enforce_eager": True}


def description(app=None):
    return (app or make_app(fn.Engine.build(fn.load("demo"), **SIZES))).openapi()


@pytest.fixture(scope="module")
def served():
    """(client, engine, faults that the log was told)"""
    engine, faults = fn.Engine.build(fn.load("demo"), **SIZES), []
    with TestClient(make_app(engine, log=faults.append), raise_server_exceptions=True) as client:
        yield client, engine, faults
    engine.check()


OPERATIONS = {
    (method, path): operation
    for path, item in description()["paths"].items()
    for method, operation in item.items()
    if method in METHODS and path not in LEFT_OUT
}
WAYS = [(where, GenerationMode.POSITIVE) for where in OPERATIONS]
WAYS += [(where, GenerationMode.NEGATIVE) for where, operation in OPERATIONS.items() if "requestBody" in operation]


@pytest.fixture(scope="module")
def operations():
    schema = schemathesis.openapi.from_dict(description())
    return {(o.ok().method, o.ok().path): o.ok() for o in schema.get_all_operations()}


def wrong(error) -> str | None:
    """What an error's body lacks."""
    if not isinstance(error, dict) or "error" not in error:
        return "no error"
    inner = error["error"]
    if error.get("type") == "error":  # Anthropic's
        return None if {"type", "message"} <= inner.keys() else "type or message"
    if inner.keys() != {"message", "type", "param", "code"}:
        return f"keys {sorted(inner)}"
    return None if isinstance(inner["message"], str) and 0 < len(inner["message"]) < 4000 else "message"


TURNS = [{"role": "user", "content": "Hi"}]
WHOLE = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4},
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 4},
    "/v1/messages": {"messages": TURNS, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": TURNS},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    "/v1/embeddings": {"input": "Hi"},
    "/pooling": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
    **{path: {"text_1": "a", "text_2": "b"} for path in ("/score", "/v1/score")},
    **{path: {"query": "a", "documents": ["b"]} for path in ("/rerank", "/v1/rerank", "/v2/rerank")},
}
"""Bodies that are answered, to which few made ones are added: of a body with forty made fields one is always wrong."""


def send(client, case, few):
    """The answer to a case; with `few` that many of its fields beside a body that is right."""
    body, kw = case.body, {}
    if isinstance(body, dict) and few and case.path in WHOLE:
        names = sorted(body, key=lambda name: (hash_of(name, len(str(body))), name))[:few]
        body = WHOLE[case.path] | {name: body[name] for name in names}
    if not isinstance(body, NotSet):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
        kw = {"content": raw, "headers": {"content-type": "application/json"}}
    return client.request(case.method, case.formatted_path, params=dict(case.query or {}), **kw)


def hash_of(name, seed):
    return zlib.crc32(f"{name}/{seed}".encode())


seen = Counter()


def try_out(served, operation, mode, examples):
    client, engine, faults = served

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.integers(0, 3))
    def no_fault(case, few):
        faults.clear()
        r = send(client, case, few)
        seen[case.path, mode.value, r.status_code] += 1
        unbuilt = case.path in [path for path, _ in UNBUILT]
        assert r.status_code < 500 or (r.status_code == 501 and unbuilt), (r.status_code, r.text[:500], faults)
        assert not faults
        assert r.headers["x-request-id"]
        if r.status_code >= 400:
            assert wrong(r.json()) is None, (wrong(r.json()), r.text[:500])
        end = time.monotonic() + 20  # what is made in the background goes on behind its answer
        while (g := engine.gauges()).blocks_held or g.running or g.waiting:
            assert time.monotonic() < end, g
            time.sleep(0.005)

    no_fault()


@pytest.mark.parametrize("where, mode", WAYS, ids=[f"{m.value} {w[0]} {w[1]}" for w, m in WAYS])
def test_no_request_gives_a_5xx(served, operations, where, mode):
    op = operations[where]
    try_out(served, op, mode, 15 if op.body else 3)


@pytest.mark.slow
@pytest.mark.parametrize("where, mode", WAYS, ids=[f"{m.value} {w[0]} {w[1]}" for w, m in WAYS])
def test_no_request_of_very_many_gives_a_5xx(served, operations, where, mode):
    op = operations[where]
    try_out(served, op, mode, 500 if op.body else 20)


def test_the_description_is_whole():
    """Every reference leads somewhere, every schema is one, every part of a path is declared, every id used once."""
    found = description()
    text = json.dumps(found)
    for ref in set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', text)):
        assert ref in found["components"]["schemas"], ref
    ids = []
    for path, item in found["paths"].items():
        for operation in item.values():
            ids.append(operation["operationId"])
            declared = {p["name"] for p in operation.get("parameters", ())}
            assert declared == set(re.findall(r"\{(\w+)\}", path)), path
            body = operation.get("requestBody")
            if body:
                schema = body["content"]["application/json"]["schema"] | {"components": found["components"]}
                jsonschema_rs.validator_for(schema)
    assert len(ids) == len(set(ids))
    n = found["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"][
        "n"
    ]
    assert n["anyOf"][0] == {"type": "integer", "minimum": -(2**63), "exclusiveMaximum": 2**64}


def test_a_share_of_what_is_allowed_is_answered(served, operations):
    """Else nothing but refusals would be tried."""
    for path in WHOLE:
        for examples in (15, 60):  # of few the share varies with every field that is added to the description
            if seen[path, "positive", 200] < 2:
                try_out(served, operations["post", path], GenerationMode.POSITIVE, examples)
        assert seen[path, "positive", 200] >= 2, {k: n for k, n in seen.items() if k[0] == path}


def test_a_fault_is_caught(served, operations, monkeypatch):
    from fnengine.serve import translate

    def broken(*a, **kw):
        raise ZeroDivisionError

    monkeypatch.setattr(translate, "_sampling", broken)
    with pytest.raises(BaseException, match="500"):
        try_out(served, operations["post", "/v1/completions"], GenerationMode.POSITIVE, 30)
