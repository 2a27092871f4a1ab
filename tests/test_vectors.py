"""Embeddings, pooling, scores and rankings over HTTP. Oracles: the official client; vectors of the scripted engine
worked out by hand, (tokens, first, last, 1 or of a mean the sum); transformers for the engine's own."""

from __future__ import annotations

import base64
import math

import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from fnengine.serve.app import make_app
from tests.test_embeddings import PROMPTS, built, pooled
from tests.test_tools import served


def hand(*v: float) -> np.ndarray:
    return np.array(v, np.float32)


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


BOS, A, B = 256, 97, 98
OF_A, OF_AB = hand(2, BOS, A, 1), hand(3, BOS, B, 1)


@pytest.fixture(scope="module")
def client():
    with served({}, None) as (client, _):
        yield client


def post(client, path, **body):
    r = client.post(path, json=body)
    assert r.status_code == 200, r.text
    return r.json()


def test_the_official_client_reads_its_base64(client):
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="k", max_retries=0, http_client=client)
    got = api.embeddings.create(model="tiny", input=["a", "ab"])
    assert got.object == "list" and got.model == "tiny" and [d.index for d in got.data] == [0, 1]
    assert (got.usage.prompt_tokens, got.usage.total_tokens) == (5, 5)
    np.testing.assert_allclose(got.data[0].embedding, unit(OF_A), rtol=1e-6)
    np.testing.assert_allclose(got.data[1].embedding, unit(OF_AB), rtol=1e-6)


@pytest.mark.parametrize(
    "value,expected",
    [
        ("a", [OF_A]),
        (["a"], [OF_A]),
        ([BOS, A, B], [OF_AB]),
        ([[BOS, A], [BOS, A, B]], [OF_A, OF_AB]),
    ],
)
def test_four_forms_of_input(client, value, expected):
    data = post(client, "/v1/embeddings", input=value)["data"]
    assert [d["object"] for d in data] == ["embedding"] * len(expected)
    for d, v in zip(data, expected, strict=True):
        np.testing.assert_allclose(d["embedding"], unit(v), rtol=1e-6)


def test_base64_is_little_endian_float32(client):
    (d,) = post(client, "/v1/embeddings", input="a", encoding_format="base64", normalize=False)["data"]
    assert base64.b64decode(d["embedding"]) == b"".join(np.float32(x).tobytes() for x in (2, 256, 97, 1))


def test_dimensions_cut_first_and_normalise_then(client):
    for n in (1, 2, 4):
        (d,) = post(client, "/v1/embeddings", input="a", dimensions=n)["data"]
        np.testing.assert_allclose(d["embedding"], unit(OF_A[:n]), rtol=1e-6)
        (d,) = post(client, "/v1/embeddings", input="a", dimensions=n, normalize=False)["data"]
        assert d["embedding"] == OF_A[:n].tolist()


def test_pooling_gives_what_was_pooled(client):
    got = post(client, "/pooling", input="ab", pooling="mean")
    assert got["id"].startswith("pool-") and got["data"][0]["object"] == "pooling"
    assert got["data"][0]["data"] == [3, BOS, B, BOS + A + B]
    np.testing.assert_allclose(post(client, "/pooling", input="ab", normalize=True)["data"][0]["data"], unit(OF_AB))


@pytest.mark.parametrize(
    "body,tokens",
    [
        ({"truncate_prompt_tokens": 3}, [BOS, 97, 98]),  # the special token is kept
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, [BOS, 100, 101]),
        ({"truncate_prompt_tokens": 1}, [BOS]),
        ({"truncate_prompt_tokens": 100}, [BOS, *b"abcde"]),
        ({"truncate_prompt_tokens": 3, "add_special_tokens": False}, [97, 98, 99]),
        ({"truncate_prompt_tokens": 2, "input": [97, 98, 99]}, [97, 98]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left", "input": [97, 98, 99]}, [98, 99]),
    ],
)
def test_prompts_are_cut_to_what_may_stand(body, tokens):
    with served({}, None) as (client, engine):
        got = post(client, "/v1/embeddings", **{"input": "abcde", **body})
        assert engine.requests[-1].prompt.tolist() == tokens and got["usage"]["prompt_tokens"] == len(tokens)
        post(client, "/v1/embeddings", input="x" * 5000, truncate_prompt_tokens=-1)
        assert len(engine.requests[-1].prompt) == engine.max_len


def test_scores_are_cosines_and_rankings_are_sorted(client):
    """(tokens, first, last, 1) of three texts, by hand."""
    texts = {"a": OF_A, "ab": OF_AB, "é": hand(3, BOS, 0xA9, 1)}
    cos = {t: float(unit(OF_A) @ unit(v)) for t, v in texts.items()}
    got = post(client, "/score", text_1="a", text_2=list(texts))
    assert [d["index"] for d in got["data"]] == [0, 1, 2] and got["usage"]["prompt_tokens"] == 2 + 2 + 3 + 3
    np.testing.assert_allclose([d["score"] for d in got["data"]], list(cos.values()), rtol=1e-6)
    pairs = post(client, "/v1/score", queries=["ab", "a"], documents=["ab", "é"])["data"]
    np.testing.assert_allclose([d["score"] for d in pairs], [1, cos["é"]], rtol=1e-6)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        got = post(client, path, query="a", documents=["é", {"text": "a"}, "ab"], top_n=2)["results"]
        assert [(r["index"], r["document"]["text"]) for r in got] == [(1, "a"), (2, "ab")]
        assert math.isclose(got[1]["relevance_score"], cos["ab"], rel_tol=1e-6)
    assert "document" not in post(client, "/rerank", query="a", documents=["b"], return_documents=False)["results"][0]


BAD = [
    ("/v1/embeddings", {}, "input"),
    ("/v1/embeddings", {"input": ""}, "input"),
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": ["a", ""]}, "input.1"),
    ("/v1/embeddings", {"input": [1, 999]}, "input"),
    ("/v1/embeddings", {"input": ["a", 1]}, "input"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
    ("/v1/embeddings", {"input": "a" * 2000}, "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 5}, "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ("/v1/embeddings", {"input": "a", "pooling": "max"}, "pooling"),
    ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": "a", "truncation_side": "both"}, "truncation_side"),
    ("/score", {"text_1": "a"}, "text_2"),
    ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
    ("/rerank", {"query": "a", "documents": []}, "documents"),
    ("/rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents.0"),
    ("/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
]


@pytest.mark.parametrize("path,body,param", BAD)
def test_bad_requests_name_the_field(client, path, body, param):
    r = client.post(path, json=body)
    assert (r.status_code, r.json()["error"]["param"]) == (400, param), r.text


def test_what_is_missing_is_501_by_name(client):
    for path, word in (
        ("/v1/load_lora_adapter", "LoRA"),
        ("/v1/unload_lora_adapter", "LoRA"),
    ):
        r = client.post(path, json={})
        assert r.status_code == 501 and word in r.json()["error"]["message"], r.text
        assert r.json()["error"]["type"] == "NotImplementedError" and r.headers["x-should-retry"] == "false"


def test_tokenizer_info_says_what_lm_eval_asks_for(client):
    got = client.get("/tokenizer_info").json()
    assert got["eos_token"] == "</s>" and got["bos_token"] == "<s>" and got["vocab_size"] == 260
    assert "chat_template" in got and client.get("/ready").status_code == 200


def test_vectors_of_the_engine_are_those_of_transformers():
    with TestClient(make_app(built(max_num_batched_tokens=16))) as client:
        for how in ("last", "mean"):
            data = post(client, "/v1/embeddings", input=PROMPTS, pooling=how)["data"]
            for d, prompt in zip(data, PROMPTS, strict=True):
                np.testing.assert_allclose(d["embedding"], unit(pooled("qwen3", prompt, how)), rtol=1e-5, atol=1e-5)
        got = post(client, "/v1/completions", prompt=PROMPTS[0], max_tokens=3, return_token_ids=True, ignore_eos=True)
        assert got["choices"][0]["prompt_token_ids"] == PROMPTS[0] and len(got["choices"][0]["token_ids"]) == 3
