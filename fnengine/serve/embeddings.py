"""Vectors of texts: /v1/embeddings and /pooling, and what is made of two of them, /score and /rerank; /classify.

Scores are cosines of embeddings, or what a classifier with one label says of a pair, which it reads as one text.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from pydantic import BaseModel, Field

from fnengine.errors import ContextLengthError, FnError, RequestError
from fnengine.host.output import Delta
from fnengine.host.pooling import LABELS, check_pooling, spread
from fnengine.host.request import Request, Stop
from fnengine.serve.engine_port import EnginePort, Text
from fnengine.serve.protocol import CONFIG, Bool, Int, TokenizeBody
from fnengine.serve.routes import Core, Route
from fnengine.serve.translate import Job, Shape, check_ids, from_tokenize

MOST_INPUTS = 2048
"""As OpenAI's."""

Body = Callable[["Vectors"], dict[str, Any]]
Input = str | list[int] | tuple[str, str]
"""A text, its token ids, or a pair of texts."""


class PoolBody(BaseModel):
    """What all of them say about how texts become vectors."""

    model_config = CONFIG

    model: str | None = None
    pooling: str | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: str | None = None
    add_special_tokens: Bool = None
    timeout: float | None = Field(default=None, gt=0)
    use_activation: Bool = None
    activation: Bool = None
    priority: Int | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=128)
    request_id: str | None = Field(default=None, min_length=1, max_length=128)


class TextBody(PoolBody):
    """One of: inputs, or a conversation, which the chat template makes one text of."""

    input: str | list[str] | list[Int] | list[list[Int]] | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    add_generation_prompt: Bool = None
    chat_template_kwargs: dict[str, Any] | None = None


class EmbeddingBody(TextBody):
    encoding_format: str | None = None
    dimensions: Int | None = None
    normalize: Bool = None


class ClassifyBody(TextBody):
    pass


class ScoreBody(PoolBody):
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None


class RerankBody(PoolBody):
    query: str
    documents: list[str | dict[str, Any]]
    top_n: Int | None = None
    return_documents: Bool = None


def _refuse(param: str, what: str, remedy: str | None = None) -> NoReturn:
    raise RequestError(what, where=param, param=param, remedy=remedy)


# --- from bodies to requests ------------------------------------------------------------------------------------------


def inputs_of(value: Any, param: str = "input") -> list[str | list[int]]:
    """A list of inputs out of the four forms."""
    many = [value] if isinstance(value, str) or (value and isinstance(value[0], int)) else list(value)
    if not many:
        _refuse(param, "must not be empty")
    if len(many) > MOST_INPUTS:
        _refuse(param, f"must be at most {MOST_INPUTS} inputs, got {len(many)}")
    for i, one in enumerate(many):
        if not len(one):
            _refuse(param if len(many) == 1 else f"{param}.{i}", "must not be empty")
    return many


def said(body: TextBody, text: Text) -> list[str | list[int]]:
    """What a body gives to be read."""
    if body.messages is None:
        return inputs_of(body.input) if body.input is not None else _refuse("input", "is required, or messages")
    if body.input is not None:
        _refuse("messages", "is one input, and there is another one", "send either")
    asked = TokenizeBody(
        messages=body.messages,
        add_generation_prompt=body.add_generation_prompt is True,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    return [from_tokenize(asked, text)]


def tokens_of(text: Text, one: str | list[int], body: PoolBody, limit: int) -> tuple[int, ...]:
    """Token ids of an input, cut to what `truncate_prompt_tokens` lets stand; special tokens of a text stay."""
    if isinstance(one, str):
        special = body.add_special_tokens is not False
        ids = text.encode(one, add_special=special)
        plain = text.encode(one, add_special=False) if special and len(ids) > limit else ids
    else:
        ids = plain = one
    if len(ids) <= limit:
        return tuple(ids)
    before = next((a for a in range(len(ids) - len(plain) + 1) if ids[a : a + len(plain)] == plain), 0)
    behind = len(ids) - before - len(plain)
    room = max(limit - before - behind, 0)
    kept = plain[len(plain) - room :] if body.truncation_side == "left" else plain[:room]
    return (*ids[:before], *kept, *ids[len(ids) - behind :])


def prompt_of(text: Text, one: Input, body: PoolBody, limit: int) -> tuple[tuple[int, ...], int]:
    """(token ids of an input, where the second text begins if it is a pair)."""
    if not isinstance(one, tuple):
        return tokens_of(text, one, body, limit), 0
    ids, pair = text.encode_pair(*one, body.add_special_tokens is not False, limit, body.truncation_side == "left")
    return tuple(ids), pair


def job_of(body: PoolBody, inputs: Sequence[Input], engine: EnginePort, kind: str, tell: Body, **named: Any) -> Job:
    """A request for the vector of each input, and who writes what becomes of them.

    Raises:
        RequestError, ContextLengthError: `param` names the field.
    """
    check_pooling(body.pooling)
    limit, most = body.truncate_prompt_tokens, engine.max_len
    if limit is not None and not (limit == -1 or 1 <= limit <= most):
        _refuse("truncate_prompt_tokens", f"must be -1 or between 1 and {most}, got {limit}")
    if body.truncation_side not in (None, "left", "right"):
        _refuse("truncation_side", f"must be left or right, got {body.truncation_side[:40]!r}")
    cut = 1 << 62 if limit is None else most if limit == -1 else limit
    read = [prompt_of(engine.tokenizer, one, body, cut) for one in inputs]
    ids = [one for one, _ in read]
    for one in ids:  # before anything looks at all of it
        if len(one) > most:
            raise ContextLengthError(
                f"an input has {len(one)} tokens and the context holds {most}",
                param=named.get("param", "input"),
                remedy="shorten it, or send truncate_prompt_tokens: -1",
            )
    check_ids(ids, engine.tokenizer.vocab_size, named.get("param", "input"))
    id, now = named["id"], engine.clock()
    requests = tuple(
        Request(
            id=id if len(ids) == 1 else f"{id}-{i}",
            prompt=np.asarray(prompt, dtype=np.int32),
            stop=Stop(max_tokens=0),
            pooling=body.pooling or engine.pooling,
            pair=pair,
            priority=0 if body.priority is None else body.priority,
            salt=body.cache_salt or "",
            arrival=now,
        )
        for i, (prompt, pair) in enumerate(read)
    )
    shape = Shape("completion", f"{kind}-{id}", named["created"], named["model"], engine.fingerprint, tuple(ids))
    return Job(requests, shape, write=lambda shape, *_: Vectors(shape, tell))


class Vectors:
    """The vectors of a request as they come; `tell` makes the body of all of them."""

    def __init__(self, shape: Shape, tell: Body):
        self.shape, self.tell = shape, tell
        self.found: list[np.ndarray | None] = [None] * len(shape.prompts)

    @property
    def done(self) -> bool:
        return all(v is not None for v in self.found)

    def take(self, prompt: int, delta: Delta) -> None:
        self.found[prompt] = delta.vector

    def vectors(self) -> list[np.ndarray]:
        """[D] float32 each, in the order of the inputs."""
        return [v for v in self.found if v is not None]

    def body(self) -> dict[str, Any]:
        return self.tell(self)

    def usage(self) -> dict[str, Any]:
        n = sum(map(len, self.shape.prompts))
        return {"prompt_tokens": n, "total_tokens": n, "completion_tokens": 0}

    def chunks(self, prompt: int, delta: Delta) -> str:
        raise AssertionError("vectors are not streamed")

    def last(self) -> str:
        raise AssertionError("vectors are not streamed")

    def failed(self, error: FnError) -> str:
        raise AssertionError("vectors are not streamed")


# --- from vectors to bodies -------------------------------------------------------------------------------------------


def shaped(vector: np.ndarray, dimensions: int | None, normalize: bool) -> np.ndarray:
    """The first so many numbers of a vector, of length 1 if asked (matryoshka: cut first)."""
    cut = vector[:dimensions]
    return (cut / max(float(np.linalg.norm(cut.astype(np.float64))), 1e-12)).astype("<f4") if normalize else cut


def written(vector: np.ndarray, form: str) -> list[float] | str:
    """A vector as numbers, or as little-endian float32 in base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii") if form == "base64" else vector.tolist()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(shaped(a, None, True).astype(np.float64) @ shaped(b, None, True).astype(np.float64))


def embedding_job(body: EmbeddingBody, engine: EnginePort, *, raw: bool, **named: Any) -> Job:
    """The job of /v1/embeddings; with `raw` of /pooling, whose vectors keep their length unless asked."""
    form, width = body.encoding_format or "float", engine.width
    if form not in ("float", "base64"):
        _refuse("encoding_format", f"must be float or base64, got {form[:40]!r}")
    if body.dimensions is not None and not 1 <= body.dimensions <= width:
        _refuse("dimensions", f"must be between 1 and {width}, got {body.dimensions}")
    normalize = not raw if body.normalize is None else body.normalize
    kind, place = ("pooling", "data") if raw else ("embedding", "embedding")
    shares = "identity"
    if engine.head is not None and (body.pooling or engine.pooling) == LABELS:
        shares = engine.head.spread if activates(body) else shares
        if body.dimensions is not None or body.normalize:
            _refuse("normalize" if body.normalize else "dimensions", "is for embeddings, and this gives labels")

    def tell(of: Vectors) -> dict[str, Any]:
        data = [
            {"object": kind, "index": i, place: written(shaped(spread(shares, v), body.dimensions, normalize), form)}
            for i, v in enumerate(of.vectors())
        ]
        return listed(of, data)

    return job_of(body, said(body, engine.tokenizer), engine, "pool" if raw else "embd", tell, **named)


def activates(body: PoolBody) -> bool:
    """Whether numbers of labels become shares."""
    return (body.use_activation if body.activation is None else body.activation) is not False


def listed(of: Vectors, data: list[dict[str, Any]]) -> dict[str, Any]:
    """The body around a list of results."""
    s = of.shape
    return {"id": s.id, "object": "list", "created": s.created, "model": s.model, "data": data, "usage": of.usage()}


def classify_job(body: ClassifyBody, engine: EnginePort, **named: Any) -> Job:
    """The job of /classify: the share of each label, and the first of the largest."""
    head = engine.head
    assert head is not None, "check_task comes first"
    if body.pooling is not None:
        _refuse("pooling", "is the model's own where texts are classified")
    how = head.spread if activates(body) else "identity"

    def tell(of: Vectors) -> dict[str, Any]:
        shares = [spread(how, v) for v in of.vectors()]
        data = [
            {"index": i, "label": head.labels[int(s.argmax())], "probs": s.tolist(), "num_classes": len(s)}
            for i, s in enumerate(shares)
        ]
        return listed(of, data)

    return job_of(body, said(body, engine.tokenizer), engine, "classify", tell, **named)


def compared(
    body: PoolBody, engine: EnginePort, one: list[Any], two: list[Any]
) -> tuple[list[Input], Callable[[list[np.ndarray]], list[float]]]:
    """(what is read, how scores come from its vectors), for one text with each of many, or pair by pair."""
    head, left = engine.head, one * len(two) if len(one) == 1 else one
    if head is None:

        def cosines(vectors: list[np.ndarray]) -> list[float]:
            first = vectors[: len(one)] * (len(two) if len(one) == 1 else 1)
            return [cosine(a, b) for a, b in zip(first, vectors[len(one) :], strict=True)]

        return [*one, *two], cosines
    if body.pooling is not None:
        _refuse("pooling", "is the model's own where pairs are scored")
    how = head.judged if activates(body) else "identity"
    return list(zip(left, two, strict=True)), lambda vectors: [float(spread(how, v)[0]) for v in vectors]


def score_job(body: ScoreBody, engine: EnginePort, **named: Any) -> Job:
    """The job of /score: one text with each of many, or pair by pair."""
    first, second = (body.text_1, body.text_2) if body.queries is None else (body.queries, body.documents)
    names = ("text_1", "text_2") if body.queries is None else ("queries", "documents")
    for value, name in ((first, names[0]), (second, names[1])):
        if value is None:
            _refuse(name, "is required")
    one, two = inputs_of(first, names[0]), inputs_of(second, names[1])
    if len(one) not in (1, len(two)):
        _refuse(names[0], f"must be one text, or as many as {names[1]} ({len(two)}), got {len(one)}")

    inputs, scores = compared(body, engine, one, two)

    def tell(of: Vectors) -> dict[str, Any]:
        return listed(
            of, [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores(of.vectors()))]
        )

    return job_of(body, inputs, engine, "score", tell, param=names[0], **named)


def rerank_job(body: RerankBody, engine: EnginePort, **named: Any) -> Job:
    """The job of /rerank: documents by their score with the query, best first."""
    texts = []
    for i, d in enumerate(body.documents):
        text = d.get("text") if isinstance(d, dict) else d
        if not isinstance(text, str):
            _refuse(f"documents.{i}", 'must be a string or {"text": "..."}')
        texts.append(text)
    inputs_of(texts, "documents")
    inputs_of(body.query, "query")
    if body.top_n is not None and body.top_n < 0:
        _refuse("top_n", f"must be at least 0, got {body.top_n}")

    inputs, scores = compared(body, engine, [body.query], texts)

    def tell(of: Vectors) -> dict[str, Any]:
        found: list[dict[str, Any]] = [
            {"index": i, "relevance_score": score} for i, score in enumerate(scores(of.vectors()))
        ]
        if body.return_documents is not False:
            found = [{**f, "document": {"text": texts[f["index"]]}} for f in found]
        best = sorted(found, key=lambda f: (-f["relevance_score"], f["index"]))[: body.top_n or None]
        return {"id": of.shape.id, "model": of.shape.model, "usage": of.usage(), "results": best}

    return job_of(body, inputs, engine, "rerank", tell, param="documents", **named)


def routes(core: Core) -> list[Route]:
    """The routes of vectors."""

    def serves(task: str, model: type[BaseModel], make: Callable[..., Job], *paths: str, **more: Any) -> list[Route]:
        async def vectors(request: Any):
            return await core.generate(
                request, model, lambda body, engine, **named: make(body, engine, **more, **named), task
            )

        return [Route(path, "POST", vectors, model) for path in paths]

    return [
        *serves("embed", EmbeddingBody, embedding_job, "/v1/embeddings", raw=False),
        *serves("pool", EmbeddingBody, embedding_job, "/pooling", raw=True),
        *serves("classify", ClassifyBody, classify_job, "/classify", "/v1/classify"),
        *serves("score", ScoreBody, score_job, "/score", "/v1/score"),
        *serves("score", RerankBody, rerank_job, "/rerank", "/v1/rerank", "/v2/rerank"),
    ]
