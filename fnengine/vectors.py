"""Vectors, labels and scores of texts in this process, from an `Engine` or a `Reader`: what `LLM` has methods for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fnengine.engine import Engine
from fnengine.errors import DeviceFault, RequestError
from fnengine.host.output import Delta
from fnengine.host.pooling import LABELS, check_pooling, spread
from fnengine.host.request import Request, Stop
from fnengine.reader import Reader

Text = str | list[int]
"""A text or its token ids."""
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Verdict:
    """What a classifier says of a text."""

    label: str
    """The one with the largest share, of equal ones the first."""
    shares: np.ndarray
    """[N] float32: of each label, in the model's order."""


def as_list(texts: Text | Iterable[Text]) -> list[Text]:
    """Several texts, of which a lone one is a list of one."""
    many = [texts] if isinstance(texts, str) else list(texts)
    return [many] if many and isinstance(many[0], int) else many  # type: ignore[list-item, return-value]


def check_task(engine: Engine | Reader, task: str, what: str) -> None:
    """Raises RequestError where an engine cannot do what is asked."""
    if task not in engine.tasks:
        raise RequestError(f"{engine.name} {what}", remedy=f"what it does is {', '.join(engine.tasks)}")


def read(engine: Engine | Reader, prompts: Sequence[tuple[Sequence[int], int]], pooling: str) -> list[np.ndarray]:
    """The vector of each (token ids, where the second text begins), in order.

    Raises:
        RequestError, ContextLengthError: nothing was read of any.
    """
    deltas: dict[int, Delta] = {}
    submitted = []
    try:
        for i, (ids, pair) in enumerate(prompts):
            if not ids:
                raise RequestError("the text is empty", param="texts")
            request = Request(
                id=f"read-{next(_NUMBERS)}",
                prompt=np.array(ids, np.int32),
                stop=Stop(max_tokens=0),
                pooling=pooling,
                pair=pair,
            )
            engine.submit_to(request, partial(deltas.__setitem__, i))
            submitted.append(request.id)
        while engine.turn():
            pass
    except BaseException:
        for request_id in submitted:
            engine.abort(request_id)
        while engine.turn():
            pass
        raise
    for delta in deltas.values():
        if delta.vector is None:
            raise DeviceFault(delta.error or "the request failed")
    return [deltas[i].vector for i in range(len(prompts))]


def embed(
    engine: Engine | Reader,
    texts: Text | Iterable[Text],
    pooling: str | None = None,
    normalize: bool = True,
    dimensions: int | None = None,
) -> np.ndarray:
    """[n, D] float32: an embedding of each text."""
    check_task(engine, "embed", "labels texts and gives no embeddings")
    check_pooling(pooling)
    if dimensions is not None and not 1 <= dimensions <= engine.width:
        raise RequestError(f"must be between 1 and {engine.width}, got {dimensions}", param="dimensions")
    prompts = [(engine.tokenizer.encode(t) if isinstance(t, str) else t, 0) for t in as_list(texts)]
    if not prompts:
        return np.empty((0, dimensions or engine.width), np.float32)
    found = np.stack(read(engine, prompts, pooling or engine.pooling))[:, :dimensions]
    if not normalize:
        return found
    length = np.linalg.norm(found.astype(np.float64), axis=1, keepdims=True)
    return (found / np.maximum(length, 1e-12)).astype(np.float32)


def classify(engine: Engine | Reader, texts: Text | Iterable[Text], use_activation: bool = True) -> list[Verdict]:
    """A `Verdict` on each text."""
    check_task(engine, "classify", "has no labels")
    assert engine.head is not None
    prompts = [(engine.tokenizer.encode(t) if isinstance(t, str) else t, 0) for t in as_list(texts)]
    how = engine.head.spread if use_activation else "identity"
    shares = [spread(how, v) for v in read(engine, prompts, LABELS)]
    return [Verdict(engine.head.labels[int(s.argmax())], s) for s in shares]


def score(
    engine: Engine | Reader, first: str | Sequence[str], second: str | Sequence[str], use_activation: bool = True
) -> list[float]:
    """How well texts go with texts: one with each of many, or pair by pair."""
    check_task(engine, "score", "has more than one label, so a pair has no one score")
    one, two = ([x] if isinstance(x, str) else list(x) for x in (first, second))
    if len(one) not in (1, len(two)):
        raise RequestError(f"must be one text, or as many as the others ({len(two)}), got {len(one)}", param="first")
    head = engine.head
    if head is None:
        vectors = embed(engine, [*one, *two]).astype(np.float64)
        left = vectors[: len(one)]
        return (left * vectors[len(one) :]).sum(1).tolist()
    pairs = [engine.tokenizer.encode_pair(a, b) for a, b in zip(one * (len(two) // len(one)), two, strict=True)]
    how = head.judged if use_activation else "identity"
    return [float(spread(how, v)[0]) for v in read(engine, pairs, LABELS)]
