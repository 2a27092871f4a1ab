"""Models that read texts whole, as an engine, over HTTP and in Python. Oracles: transformers' models and tokenizers,
one text or pair at a time; shares, cosines and orders worked out by hand."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import numpy as np
import openai
import pytest
import torch
from starlette.testclient import TestClient

import fnengine as fn
from fnengine import model as fn_model
from fnengine.errors import ConfigError, ContextLengthError, QueueFull, RequestError
from fnengine.host.output import Delta
from fnengine.host.pooling import LABELS, spread
from fnengine.host.request import Request, Stop
from fnengine.reader import Reader
from fnengine.serve.app import make_app
from tests.models import tiny_model
from tests.test_encoders import TEXTS, with_modules
from tests.text_models import byte_tokenizer
from tests.whole_models import hidden, logits, spoken, unigram, upstream_tokenizer, whole_model

SENTENCES = ["The cat sat on the mat.", "dog", "a very bad film was not good?", "the book is slow"]
QUERY, DOCUMENTS = "is the film good?", ["a bad film", "the dog ran fast", "good film. very good"]


def loaded(name: str, **change: Any) -> fn.Model:
    spoken(name)
    model = whole_model(name)
    if not change:
        return model
    whole = model.spec.whole
    assert whole is not None and whole.head is not None
    head = dataclasses.replace(whole.head, **change)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, whole=dataclasses.replace(whole, head=head)))


def built(name: str, model: fn.Model | None = None, **options: Any) -> Reader:
    return Reader.build(model or loaded(name), enforce_eager=True, **options)


def ask(id: str, tokens: list[int], how: str = "mean", **kw: Any) -> Request:
    return Request(id, np.array(tokens, np.int32), stop=Stop(max_tokens=0), pooling=how, **kw)


def answers(reader: Reader, requests: list[Request]) -> list[Delta]:
    got: dict[str, Delta] = {}
    for r in requests:
        reader.submit_to(r, lambda d, id=r.id: got.__setitem__(id, d))
    while reader.turn():
        pass
    return [got[r.id] for r in requests]


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def pair_logits(name: str, a: str, b: str) -> np.ndarray:
    t = upstream_tokenizer(name)(a, b, return_token_type_ids=True)
    types = t["token_type_ids"] if name.startswith("bert") else None
    return logits(name, t["input_ids"], types).numpy()


def text_logits(name: str, text: str) -> np.ndarray:
    return logits(name, upstream_tokenizer(name)(text)["input_ids"]).numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- tokens of pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-one", "xlm-roberta-one"])
def test_pairs_are_joined_and_cut_as_transformers_does(name):
    ours, theirs = loaded(name).tokenizer, upstream_tokenizer(name)
    for a, b in ((QUERY, DOCUMENTS[0]), (DOCUMENTS[0], QUERY), ("dog", "dog"), ("", "a cat"), (QUERY, QUERY)):
        for most in (None, *range(4, 24)):
            for left in (False, True):
                theirs.truncation_side = "left" if left else "right"
                cut = {} if most is None else dict(truncation="longest_first", max_length=most)
                want = theirs(a, b, return_token_type_ids=True, **cut)
                ids, pair = ours.encode_pair(a, b, most=most, left=left)
                assert ids == want["input_ids"], (a, b, most, left)
                assert [int(pair > 0 and i >= pair) for i in range(len(ids))] == want["token_type_ids"]
    theirs.truncation_side = "right"  # as others expect it


# --- the engine -------------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_transformers_in_any_batch():
    """Several poolings in one batch, batches of 64 tokens, and each text's bits as if it were alone."""
    reader = built("bert", max_num_batched_tokens=64, max_num_seqs=4)
    asked = [(how, t) for how in ("mean", "last", "cls") for t in TEXTS]
    got = answers(reader, [ask(f"{i}", t, how) for i, (how, t) in enumerate(asked)])
    assert reader.gauges().steps > 4 and reader.gauges().running == reader.gauges().waiting == 0
    for (how, tokens), delta in zip(asked, got, strict=True):
        x = hidden("bert", tokens)
        want = {"mean": x.mean(0), "last": x[-1], "cls": x[0]}[how].numpy()
        np.testing.assert_allclose(delta.vector, want, rtol=1e-4, atol=1e-4)
        assert delta.finish == "length" and delta.usage is not None and delta.usage.prompt == len(tokens)
        (alone,) = answers(reader, [ask("alone", tokens, how)])
        assert np.array_equal(alone.vector, delta.vector)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "modernbert-labels", "gemma3", "qwen3-moe-labels"])
def test_compiled_layers_give_the_same_and_keep_the_law(name):
    reader = Reader.build(whole_model(name), tokenizer=byte_tokenizer(120))
    assert reader.made.execution.startswith("compiled"), reader.made.execution
    how = LABELS if reader.head else "mean"
    got = answers(reader, [ask(f"{i}", t, how) for i, t in enumerate(TEXTS)])
    for tokens, delta in zip(TEXTS, got, strict=True):
        want = logits(name, tokens) if reader.head else hidden(name, tokens).mean(0)
        np.testing.assert_allclose(delta.vector, want.numpy(), rtol=1e-4, atol=1e-4)
        (alone,) = answers(reader, [ask("alone", tokens, how)])
        assert np.array_equal(alone.vector, delta.vector)
    assert reader.gauges().recompiles == 0


def test_batches_are_taken_in_order_up_to_the_budget():
    """By hand: priority, then arrival; the next in turn is never passed over; a text alone may be longer."""
    reader = built("bert", max_num_batched_tokens=40, max_num_seqs=3)
    sizes = {
        "a": (10, 1),
        "b": (25, 1),
        "c": (10, 1),
        "d": (150, 0),
        "e": (1, 2),
        "f": (1, 2),
        "g": (1, 2),
        "h": (1, 2),
    }
    for id, (n, priority) in sizes.items():
        reader.submit_to(ask(id, [5] * n, priority=priority), lambda d: None)
    reader.abort("f")
    batches = []
    while batch := reader.take():
        batches.append("".join(x.request.id for x in batch))
    assert batches == ["d", "ab", "ceg", "h"]


def test_what_a_reader_refuses():
    reader = built("bert", max_queue=2)
    for request, error, param in (
        (dataclasses.replace(ask("x", [5]), pooling=None), RequestError, None),
        (ask("x", [5], LABELS), RequestError, "pooling"),
        (ask("x", [5], "max"), RequestError, "pooling"),
        (ask("x", [5] * 161), ContextLengthError, "input"),
        (ask("x", [131]), RequestError, "input"),
        (ask("x", []), RequestError, "input"),
        (dataclasses.replace(ask("x", [5]), n=2), RequestError, "pooling"),
        (dataclasses.replace(ask("x", [5]), stop=Stop()), RequestError, "pooling"),
    ):
        with pytest.raises(error) as e:
            reader.submit_to(request, lambda d: None)
        assert e.value.param == param
    for id in ("a", "b"):
        reader.submit_to(ask(id, [5, 6]), lambda d: None)
    with pytest.raises(RequestError, match="being served"):
        reader.submit_to(ask("a", [5]), lambda d: None)
    with pytest.raises(QueueFull):
        reader.submit_to(ask("c", [5]), lambda d: None)
    assert reader.gauges().rejections == 1 and reader.gauges().waiting == 2
    for options, where in (
        (dict(steer=("layers.0",)), "--steer"),
        (dict(kv_cache_dtype="int8"), "--kv-cache-dtype"),
        (dict(kv_cache_memory_bytes=1 << 20), "--kv-cache-memory-bytes"),
        (dict(max_model_len=161), "--max-model-len"),
        (dict(memory=10 << 20), "--memory"),
    ):
        with pytest.raises(ConfigError) as e:
            built("bert", **options)
        assert e.value.where == where
    with pytest.raises(ConfigError, match="reads texts whole"):
        fn.Engine.build(loaded("bert"))


def test_a_batch_that_fails_ends_its_requests_and_no_others(monkeypatch):
    reader = built("bert")
    honest = reader.made.read

    def fails(requests):
        if any(r.id == "bad" for r in requests):
            raise RuntimeError("out of luck")
        return honest(requests)

    reader.made = dataclasses.replace(reader.made, read=fails)
    (bad,) = answers(reader, [ask("bad", [5, 6])])
    assert bad.finish == "error" and "out of luck" in (bad.error or "") and bad.vector is None
    assert answers(reader, [ask("good", [5, 6])])[0].vector is not None


def test_the_loop_serves_aborts_and_stops():
    """What is aborted while it waits is never read; what is aborted while it is read is thrown away."""
    ended: dict[str, str] = {}
    seen: list[str] = []

    async def run() -> None:
        reader = built("bert", max_num_seqs=1)
        reader.on_finish.append(lambda f: ended.__setitem__(f.id, f.finish))
        honest, loop = reader.made.read, asyncio.get_running_loop()

        def watched(requests):
            seen.extend(r.id for r in requests)
            if requests[0].id == "b":
                asyncio.run_coroutine_threadsafe(aborted(), loop).result()
            return honest(requests)

        async def aborted() -> None:
            assert reader.gauges().running == 1 and reader.survey().rows[0].state == "prefilling"
            assert reader.abort("b") and not reader.abort("b")

        reader.made = dataclasses.replace(reader.made, read=watched)
        assert reader.healthy() is not None
        await reader.start()
        assert reader.healthy() is None
        streams = {id: reader.submit(ask(id, TEXTS[0])) for id in "abcd"}
        streams["c"].close()
        assert (await anext(streams["a"])).vector is not None
        assert (await anext(streams["d"])).vector is not None
        streams["b"].close()
        late = reader.submit(ask("late", TEXTS[0]))
        await reader.stop(5.0)
        assert (await anext(late)).vector is not None
        assert not reader.gauges().running and not reader.gauges().waiting and reader.healthy() == "stopped"

    asyncio.run(run())
    assert seen == ["a", "b", "d", "late"]
    assert ended == {"a": "length", "b": "abort", "c": "abort", "d": "length", "late": "length"}


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder():
    with TestClient(make_app(built("bert", names=("tiny",)))) as client:
        yield client


@pytest.fixture(scope="module")
def judge():
    with TestClient(make_app(built("bert-one", names=("tiny",)))) as client:
        yield client


@pytest.fixture(scope="module")
def classifier():
    with TestClient(make_app(built("bert-labels", names=("tiny",)))) as client:
        yield client


def post(client, path, **body):
    r = client.post(path, json=body)
    assert r.status_code == 200, r.text
    return r.json()


def test_embeddings_over_http(embedder):
    """By the official client, in base64 and as numbers; texts and token ids; the model's pooling and another."""
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="k", max_retries=0, http_client=embedder)
    ids = [upstream_tokenizer("bert")(s)["input_ids"] for s in SENTENCES]
    got = api.embeddings.create(model="tiny", input=SENTENCES)
    assert got.usage.prompt_tokens == sum(map(len, ids))
    for one, d in zip(ids, got.data, strict=True):
        np.testing.assert_allclose(d.embedding, unit(hidden("bert", one)[0].numpy()), rtol=1e-3, atol=1e-5)
    got = api.embeddings.create(
        model="tiny", input=ids, dimensions=7, encoding_format="float", extra_body={"pooling": "mean"}
    )
    for one, d in zip(ids, got.data, strict=True):
        np.testing.assert_allclose(d.embedding, unit(hidden("bert", one).mean(0)[:7].numpy()), rtol=1e-3, atol=1e-5)
    got = post(embedder, "/pooling", input=SENTENCES[0])["data"][0]["data"]
    np.testing.assert_allclose(got, hidden("bert", ids[0])[0].numpy(), rtol=1e-4, atol=1e-4)
    scores = post(embedder, "/score", text_1=SENTENCES[0], text_2=SENTENCES[1:])["data"]
    vectors = [unit(hidden("bert", one)[0].numpy()) for one in ids]
    np.testing.assert_allclose([s["score"] for s in scores], [vectors[0] @ v for v in vectors[1:]], rtol=1e-4)


@pytest.mark.parametrize("name", ["bert-one", "xlm-roberta-one", "modernbert-mean"])
def test_a_cross_encoder_reads_pairs(name, judge):
    """/score and /rerank: sigmoids of transformers' one number for each pair, token types included."""
    reader = built(name, names=("tiny",))
    with TestClient(make_app(reader)) as client:
        want = sigmoid(np.array([pair_logits(name, QUERY, d)[0] for d in DOCUMENTS]))
        for path in ("/score", "/v1/score"):
            got = post(client, path, text_1=QUERY, text_2=DOCUMENTS)
            np.testing.assert_allclose([d["score"] for d in got["data"]], want, rtol=1e-4)
        tokens = sum(len(upstream_tokenizer(name)(QUERY, d)["input_ids"]) for d in DOCUMENTS)
        assert got["usage"]["prompt_tokens"] == tokens and got["data"][0]["object"] == "score"
        pairs = post(client, "/score", queries=DOCUMENTS, documents=[QUERY] * 3)["data"]
        other = sigmoid(np.array([pair_logits(name, d, QUERY)[0] for d in DOCUMENTS]))
        np.testing.assert_allclose([d["score"] for d in pairs], other, rtol=1e-4)
        bare = post(client, "/score", text_1=QUERY, text_2=DOCUMENTS[0], use_activation=False)["data"][0]["score"]
        np.testing.assert_allclose(bare, pair_logits(name, QUERY, DOCUMENTS[0])[0], rtol=1e-4, atol=1e-5)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            ranked = post(client, path, query=QUERY, documents=DOCUMENTS, top_n=2)["results"]
            assert [r["index"] for r in ranked] == np.argsort(-want)[:2].tolist()
            np.testing.assert_allclose([r["relevance_score"] for r in ranked], np.sort(want)[::-1][:2], rtol=1e-4)
        assert reader.tasks == ("classify", "pool", "score")


def test_a_pair_is_cut_when_asked(judge):
    long = " ".join(["the cat sat on a mat"] * 40)
    r = judge.post("/score", json={"text_1": QUERY, "text_2": long})
    assert (r.status_code, r.json()["error"]["param"]) == (400, "text_1") and "160" in r.text
    got = post(judge, "/score", text_1=QUERY, text_2=long, truncate_prompt_tokens=-1)
    want = upstream_tokenizer("bert-one")(
        QUERY, long, truncation="longest_first", max_length=160, return_token_type_ids=True
    )
    assert got["usage"]["prompt_tokens"] == 160
    number = logits("bert-one", want["input_ids"], want["token_type_ids"]).numpy()[0]
    np.testing.assert_allclose(got["data"][0]["score"], sigmoid(number), rtol=1e-4)


def test_scores_follow_what_the_config_says_of_them():
    with TestClient(make_app(built("bert-one", loaded("bert-one", judged="identity")))) as client:
        got = post(client, "/score", text_1=QUERY, text_2=DOCUMENTS[0])["data"][0]["score"]
    np.testing.assert_allclose(got, pair_logits("bert-one", QUERY, DOCUMENTS[0])[0], rtol=1e-4, atol=1e-5)


def test_classification_over_http(classifier):
    for path in ("/classify", "/v1/classify"):
        got = post(classifier, path, input=SENTENCES)
        assert got["id"].startswith("classify-") and got["object"] == "list" and got["model"] == "tiny"
        for i, (d, text) in enumerate(zip(got["data"], SENTENCES, strict=True)):
            number = text_logits("bert-labels", text)
            want = np.exp(number) / np.exp(number).sum()
            np.testing.assert_allclose(d["probs"], want, rtol=1e-4, atol=1e-6)
            assert (d["index"], d["num_classes"]) == (i, 3)
            assert d["label"] == ("calm", "glad", "sad")[int(number.argmax())]
    bare = post(classifier, "/classify", input=SENTENCES[0], use_activation=False)["data"][0]["probs"]
    np.testing.assert_allclose(bare, text_logits("bert-labels", SENTENCES[0]), rtol=1e-4, atol=1e-5)
    shares = post(classifier, "/pooling", input=SENTENCES[0])["data"][0]["data"]
    number = text_logits("bert-labels", SENTENCES[0])
    np.testing.assert_allclose(shares, np.exp(number) / np.exp(number).sum(), rtol=1e-4)


def test_a_reward_model_reads_a_conversation():
    """Through the chat template, whose text is given to transformers' model of one label, without special tokens."""
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} . {% endfor %}"
    template += "{% if add_generation_prompt %}a{% endif %}"
    spoken("qwen2-one")
    tokenizer = dataclasses.replace(loaded("qwen2-one").tokenizer, templates={"default": template})
    talk = [{"role": "user", "content": "is the film good?"}, {"role": "assistant", "content": "very good"}]
    with TestClient(make_app(built("qwen2-one", tokenizer=tokenizer))) as client:
        for more, end in (({}, ""), ({"add_generation_prompt": True}, "a")):
            text = "u is the film good? . a very good . " + end
            ids = upstream_tokenizer("qwen2-one")(text, add_special_tokens=False)["input_ids"]
            got = post(client, "/classify", messages=talk, use_activation=False, **more)["data"][0]["probs"]
            np.testing.assert_allclose(got, logits("qwen2-one", ids), rtol=1e-4, atol=1e-5)
            reward = post(client, "/pooling", messages=talk, use_activation=False, **more)["data"][0]["data"]
            assert reward == got
        r = client.post("/classify", json={"messages": talk, "input": "a"})
        assert (r.status_code, r.json()["error"]["param"]) == (400, "messages")
        for body, param in (
            ({"messages": [{"content": "no role"}]}, "messages.0.role"),
            ({"messages": []}, "messages"),
            ({"messages": talk, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
            ({}, "input"),
        ):
            r = client.post("/classify", json=body)
            assert (r.status_code, r.json()["error"]["param"]) == (400, param), r.text


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.mark.parametrize(
    "which,path,body,says",
    [
        ("embedder", "/v1/chat/completions", CHAT, "/v1/embeddings"),
        ("embedder", "/v1/completions", {"prompt": "hi"}, "/v1/embeddings"),
        ("embedder", "/v1/responses", {"input": "hi"}, "/v1/embeddings"),
        ("embedder", "/v1/messages", {"model": "tiny", **CHAT}, "/v1/embeddings"),
        ("embedder", "/classify", {"input": "hi"}, "/v1/embeddings"),
        ("classifier", "/v1/embeddings", {"input": "hi"}, "/classify"),
        ("classifier", "/score", {"text_1": "a", "text_2": "b"}, "/classify"),
        ("classifier", "/rerank", {"query": "a", "documents": ["b"]}, "/classify"),
        ("classifier", "/v1/chat/completions", CHAT, "/classify"),
        ("judge", "/v1/embeddings", {"input": "hi"}, "/score and /rerank"),
    ],
)
def test_what_a_model_cannot_serve_is_a_400_that_says_what_it_can(which, path, body, says, request):
    r = request.getfixturevalue(which).post(path, json=body)
    assert r.status_code == 400 and "tiny does not serve" in r.text and says in r.text, r.text


def test_language_models_have_no_labels():
    engine = fn.Engine.build(
        tiny_model("qwen3"), tokenizer=byte_tokenizer(120), kv_cache_memory_bytes=1 << 20, enforce_eager=True
    )
    with TestClient(make_app(engine)) as client:
        r = client.post("/classify", json={"input": "hi"})
        assert r.status_code == 400 and "does not serve /classify" in r.text and "/v1/embeddings" in r.text


BAD = [
    ("classifier", "/classify", {"input": []}, "input"),
    ("classifier", "/classify", {"input": ["a", ""]}, "input.1"),
    ("classifier", "/classify", {"input": "a", "pooling": "mean"}, "pooling"),
    ("classifier", "/classify", {"input": [131]}, "input"),
    ("classifier", "/pooling", {"input": "a", "dimensions": 2}, "dimensions"),
    ("classifier", "/pooling", {"input": "a", "normalize": True}, "normalize"),
    ("judge", "/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
    ("judge", "/score", {"text_1": "a", "text_2": "b", "pooling": "mean"}, "pooling"),
    ("judge", "/rerank", {"query": "", "documents": ["a"]}, "query"),
    ("embedder", "/v1/embeddings", {"input": "a", "dimensions": 49}, "dimensions"),
    ("embedder", "/v1/embeddings", {"input": "the " * 200}, "input"),
    ("embedder", "/v1/embeddings", {"input": "a", "pooling": "labels"}, "pooling"),
]


@pytest.mark.parametrize("which,path,body,param", BAD)
def test_bad_requests_name_the_field(which, path, body, param, request):
    r = request.getfixturevalue(which).post(path, json=body)
    assert (r.status_code, r.json()["error"]["param"]) == (400, param), r.text


def test_what_is_shown_of_a_reader(embedder):
    """Readings that people and dashboards look at hold for a model without a pool."""
    post(embedder, "/v1/embeddings", input=SENTENCES)
    (card,) = embedder.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 160)
    assert embedder.get("/health").status_code == 200
    decoding = embedder.get("/health/decode").json()
    assert decoding["status"] == "idle"
    metrics = embedder.get("/metrics").text
    values = {k: float(v) for k, v in (x.rsplit(" ", 1) for x in metrics.splitlines() if not x.startswith("#"))}
    steps = next(v for k, v in values.items() if k.startswith("fnengine:steps_total"))
    prompts = next(v for k, v in values.items() if k.startswith("fnengine:prompt_tokens_total"))
    assert steps >= 1 and prompts >= 30 and not any(np.isnan(v) for v in values.values())
    state = embedder.get("/debug/state").json()
    assert state["pool"] == {**state["pool"], "blocks": 0, "lengths": []} and state["steps"]
    assert state["tasks"] == ["embed", "pool", "score"]
    id = post(embedder, "/v1/embeddings", input="dog", request_id="mine")["id"]
    assert id == "embd-mine"
    told = embedder.get("/debug/requests/mine").json()
    assert told["state"] == "ended" and told["timing"]["total"] > 0
    assert embedder.post("/tokenize", json={"prompt": "dog"}).json()["count"] == 3
    assert embedder.get("/").status_code == 200 and embedder.get("/debug/graphs").status_code == 404


def test_a_full_queue_is_429():
    reader = built("bert", max_queue=1, names=("tiny",))
    with TestClient(make_app(reader)) as client:
        r = client.post("/v1/embeddings", json={"input": ["a", "b", "c"]})
        assert r.status_code == 429 and r.headers["retry-after"]
        assert reader.gauges().waiting == 0, "what was accepted of it was taken back"
        assert post(client, "/v1/embeddings", input="a")["data"]


# --- in Python --------------------------------------------------------------------------------------------------------


def test_llm_embeds_classifies_and_scores():
    """The same numbers as over HTTP, from the same oracles."""
    llm = fn.LLM(loaded("xlm-roberta-one"), enforce_eager=True)
    want = sigmoid(np.array([pair_logits("xlm-roberta-one", QUERY, d)[0] for d in DOCUMENTS]))
    np.testing.assert_allclose(llm.score(QUERY, DOCUMENTS), want, rtol=1e-4)
    np.testing.assert_allclose(llm.score([QUERY] * 3, DOCUMENTS), want, rtol=1e-4)
    (one,) = llm.classify(QUERY)
    assert one.label == "LABEL_0"
    np.testing.assert_allclose(one.shares, sigmoid(text_logits("xlm-roberta-one", QUERY)), rtol=1e-4)
    for call in (
        lambda: llm.embed("a"),
        lambda: llm.generate("a"),
        lambda: llm.engine,
        lambda: llm.score(["a"] * 2, ["b"]),
    ):
        with pytest.raises(RequestError):
            call()
    llm = fn.LLM(loaded("roberta"), enforce_eager=True)
    ids = [upstream_tokenizer("roberta")(s)["input_ids"] for s in SENTENCES]
    got = llm.embed(SENTENCES, pooling="mean")
    assert got.shape == (4, 48) and got.dtype == np.float32
    for one, v in zip(ids, got, strict=True):
        np.testing.assert_allclose(v, unit(hidden("roberta", one).mean(0).numpy()), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        llm.embed(ids[0], normalize=False)[0], hidden("roberta", ids[0])[0], rtol=1e-4, atol=1e-4
    )
    assert llm.embed([]).shape == (0, 48)
    with pytest.raises(RequestError, match="no labels"):
        llm.classify("a")


def test_llm_embeds_with_a_language_model_and_goes_on_generating():
    folder = spoken("qwen3-labels")
    model = fn_model.load(folder, dtype="float32", device="cpu")
    labels = fn.LLM(model, enforce_eager=True).classify(["a cat", "a dog"], use_activation=False)
    for text, verdict in zip(("a cat", "a dog"), labels, strict=True):
        np.testing.assert_allclose(verdict.shares, text_logits("qwen3-labels", text), rtol=1e-4, atol=1e-4)
    writer = dataclasses.replace(tiny_model("qwen3"), folder=folder)
    llm = fn.LLM(writer, kv_cache_memory_bytes=1 << 20, enforce_eager=True, max_num_seqs=4)
    before = (
        llm.generate("a cat", fn.Sampling(temperature=0), fn.Stop(max_tokens=4, ignore_eos=True))[0].choices[0].tokens
    )
    vectors = llm.embed(["a cat", "the dog ran"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert abs(llm.score("a cat", ["the dog ran"])[0] - float(vectors[0] @ vectors[1])) < 1e-5
    after = (
        llm.generate("a cat", fn.Sampling(temperature=0), fn.Stop(max_tokens=4, ignore_eos=True))[0].choices[0].tokens
    )
    assert before == after


def test_an_embedder_of_sentence_transformers_as_a_whole(tmp_path):
    """EmbeddingGemma's form with a Unigram tokenizer: mean, two layers, normalised. By hand."""
    first, second = with_modules(tmp_path)
    unigram(tmp_path)
    llm = fn.LLM(str(tmp_path), dtype="float32", device="cpu", enforce_eager=True)
    ids = llm.model.encode(SENTENCES[0])
    want = hidden("gemma3", ids).mean(0) @ first["linear.weight"].T
    want = torch.tanh(want @ second["linear.weight"].T + second["linear.bias"]).numpy()
    np.testing.assert_allclose(llm.embed(SENTENCES[0])[0], unit(want), rtol=1e-3, atol=1e-5)


def test_shares_by_hand():
    np.testing.assert_allclose(
        spread("softmax", np.log(np.array([1, 2, 5], np.float32))), [0.125, 0.25, 0.625], rtol=1e-6
    )
    np.testing.assert_allclose(spread("sigmoid", np.array([0, -1000, 1000], np.float32)), [0.5, 0, 1])
    assert spread("identity", np.array([3, -2], np.float32)).tolist() == [3, -2]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_commands_tell_the_truth_about_a_reader(capsys):
    from fnengine import cli

    folder = str(spoken("bert-labels"))
    assert cli.main(["plan", "--json", folder]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["pool"]["blocks"] == 0 and planned["pool"]["max_len"] == 160 and planned["lines"]["weights"] > 0
    assert cli.main(["plan", folder]) == 0
    assert "texts of up to 160 tokens" in capsys.readouterr().out
    assert cli.main(["doctor", "--json", "--enforce-eager", folder]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "gives 3 labels: calm, glad, sad" in told["texts"].values() and "bert" in told["model"]["shape"]
    assert cli.main(["complete", "--enforce-eager", "--model", folder, "hello"]) == 2
    assert "reads texts whole" in capsys.readouterr().err
    assert cli.main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("BertModel", "XLMRobertaModel", "ModernBertModel", "reads texts whole"))
