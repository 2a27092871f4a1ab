"""The offline convenience that people know: `LLM(...).generate(prompts)` and `.chat(messages)`, and of models that read
texts `.embed(texts)`, `.classify(texts)` and `.score(text, texts)`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fnengine import decoding, vectors
from fnengine.companions import Beside
from fnengine.decoding.rounds import Job
from fnengine.decoding.strategy import Strategy
from fnengine.drafting import Maker
from fnengine.engine import Engine
from fnengine.errors import ConfigError, DeviceFault, RequestError
from fnengine.host.output import Delta, TokenLogprob, Usage
from fnengine.host.request import Request, Sampling, Speculate, Stop, fold_in
from fnengine.host.text import TextStream
from fnengine.load import load
from fnengine.model import Model
from fnengine.processors import Own
from fnengine.reader import Reader
from fnengine.runtime import Runtime
from fnengine.sequence import as_arrays
from fnengine.settings import Settings
from fnengine.strategies import Answer, refuse_beside
from fnengine.vectors import Text, Verdict

if TYPE_CHECKING:
    from fnengine.host.grammar import Grammar

Prompt = str | list[int]


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    tokens: tuple[int, ...]
    finish: str
    """`stop` or `length`"""
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] | None
    usage: Usage


@dataclass(frozen=True)
class Completion:
    """What became of one prompt."""

    prompt: Prompt
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class LLM:
    """A model and an engine in this process.

    Args:
        model: a directory, a Hugging Face name, `demo` (the bundled model), or a loaded `Model`.
        dtype, load_format, quantization, revision, device: as in `fnengine.load`.
        processors, speculate, proposers, companion: as in `Engine.build`.
        options: fields of `Settings`.

    Example:
        >>> llm = LLM("demo")
        >>> llm.generate("Once upon a time", stop=Stop(max_tokens=20))[0].text
    """

    def __init__(
        self,
        model: str | Model | None = None,
        *,
        dtype: str = "auto",
        load_format: str = "auto",
        quantization: str = "none",
        revision: str | None = None,
        device: str = "auto",
        processors: Mapping[str, Own] | None = None,
        speculate: Speculate | None = None,
        proposers: Mapping[str, Maker] | None = None,
        companion: Model | Beside | None = None,
        **options: Any,
    ):
        if not isinstance(model, Model):
            model = load(
                model,
                dtype=dtype,
                load_format=load_format,
                quantization=quantization,
                revision=revision,
                device=device,
            )
        self.model = model
        settings = Settings(**options)
        self._numbers = itertools.count()
        self._reader: Reader | None = None
        if model.spec.whole is not None:
            if processors or speculate or proposers or companion:
                raise ConfigError(f"{model.name} writes no text that processors or drafts could be for", where="LLM")
            self._reader = Reader.build(model, settings)
            return
        self._engine = Engine.build(
            model, settings, processors=processors, speculate=speculate, proposers=proposers, companion=companion
        )
        assert self._engine.built is not None
        # Over the engine's own pool and prefix cache: between two calls of `generate` the engine is at rest.
        self._runtime = Runtime.over(model, settings, self._engine.built, self._engine.host.ledger)

    @property
    def engine(self) -> Engine:
        """What generates. Raises RequestError for a model that writes nothing."""
        if self._reader is not None:
            vectors.check_task(self._reader, "generate", "reads texts and writes none")
        return self._engine

    def _reads(self) -> Engine | Reader:
        """What gives vectors."""
        if self._reader is not None:
            return self._reader
        self._runtime.drain()
        return self._engine

    def embed(
        self,
        texts: Text | Iterable[Text],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> np.ndarray:
        """[n, D] float32, embeddings of texts in order. A text is a string or token ids; a lone one gives [1, D].

        `pooling` is last, mean or cls; None takes the checkpoint's own. `dimensions` keeps the first so many numbers,
        before they are normalised.

        Raises:
            RequestError, ContextLengthError: nothing was embedded; or the model labels texts.
        """
        return vectors.embed(self._reads(), texts, pooling, normalize, dimensions)

    def classify(self, texts: Text | Iterable[Text], *, use_activation: bool = True) -> list[Verdict]:
        """A `Verdict` on each text, in order; without `use_activation` its shares are the labels' bare numbers.

        Raises:
            RequestError, ContextLengthError: nothing was classified; or the model has no labels.
        """
        return vectors.classify(self._reads(), texts, use_activation)

    def score(
        self, first: str | Iterable[str], second: str | Iterable[str], *, use_activation: bool = True
    ) -> list[float]:
        """How well one text goes with each of many, or texts pair by pair: what a classifier with one label says of the
        pair, or the cosine of two embeddings.

        Raises:
            RequestError, ContextLengthError: nothing was scored; or the model has several labels.
        """
        one, two = (x if isinstance(x, str) else list(x) for x in (first, second))
        return vectors.score(self._reads(), one, two, use_activation)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling | None = None,
        stop: Stop | None = None,
        *,
        n: int = 1,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        logprob_token_ids: Sequence[int] = (),
        steer: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        speculate: Speculate | None = None,
        on_delta: Callable[[int, Delta], None] | None = None,
        strategy: Strategy | None = None,
        strategy_args: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """A `Completion` per prompt, in order. A prompt is text or token ids; a lone one gives a list of one.

        Without `sampling` the model's generation defaults apply; without `stop`, 16 tokens at most. Tokens of
        `logprob_token_ids` are `watched` beside every log-probability that is asked for.
        `on_delta(prompt index, delta)` sees output as it comes. With a `strategy` (one of `fnengine.decoding`, or your
        own) that function decides what the text is; log-probabilities are then those that it gives. `steer`, layer ->
        vector, is added to the residual stream after that layer, for layers of `Settings.steer`. Texts follow
        `grammar`, one of `fnengine.host.grammar`. `speculate` says who guesses what comes next; tokens are the same,
        `Speculate(k=0)` guesses nothing.

        Raises:
            RequestError, ContextLengthError: nothing was generated for any prompt.
            Whatever a strategy raised, after all of them have ended.
        """
        many = [prompts] if isinstance(prompts, str) else list(prompts)
        if many and isinstance(many[0], int):
            many = [many]  # type: ignore[list-item]
        vectors.check_task(self._reader or self._engine, "generate", "reads texts and writes none")
        self._runtime.drain()
        if strategy is not None:
            refuse_beside(
                n=n,
                stop=stop,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                watched=logprob_token_ids,
                steer=steer,
                grammar=grammar,
                speculate=speculate,
            )
            how = sampling or self.default_sampling()
            ids = [self.engine.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in many]  # type: ignore[arg-type]
            return self._follow(many, ids, strategy, strategy_args or {}, how, stop or Stop(max_tokens=16), n, on_delta)  # type: ignore[arg-type]
        if strategy_args:
            raise RequestError("strategy_args without a strategy", param="strategy_args")
        requests = []
        for prompt in many:
            ids = self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)  # type: ignore[arg-type]
            if not ids:
                raise RequestError("the prompt is empty", param="prompt")
            requests.append(
                Request(
                    id=f"llm-{next(self._numbers)}",
                    prompt=np.array(ids, np.int32),
                    sampling=sampling or self.default_sampling(),
                    stop=stop or Stop(max_tokens=16),
                    n=n,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    watched=tuple(logprob_token_ids),
                    steer=as_arrays(steer) or {},
                    grammar=grammar,
                    speculate=speculate,
                )
            )
        return self._run(many, requests, on_delta)  # type: ignore[arg-type]

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling: Sampling | None = None,
        stop: Stop | None = None,
        *,
        n: int = 1,
        steer: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        speculate: Speculate | None = None,
        on_delta: Callable[[int, Delta], None] | None = None,
        strategy: Strategy | None = None,
        strategy_args: Mapping[str, Any] | None = None,
        **template: Any,
    ) -> list[Completion]:
        """Like `generate`, from one conversation or a list of them; without `stop`, up to the end of the context."""
        talks = [messages] if messages and isinstance(messages[0], dict) else messages
        tokenizer = self.engine.tokenizer
        prompts = [tokenizer.encode(tokenizer.render_chat(m, **template), add_special=False) for m in talks]  # pyright: ignore[reportArgumentType]
        asked: dict[str, Any] = dict(
            n=n,
            steer=steer,
            grammar=grammar,
            speculate=speculate,
            on_delta=on_delta,
            strategy=strategy,
            strategy_args=strategy_args,
        )
        return self.generate(prompts, sampling, stop or Stop(), **asked)

    def _follow(
        self,
        prompts: list[Prompt],
        ids: list[list[int]],
        strategy: Strategy,
        args: Mapping[str, Any],
        sampling: Sampling,
        stop: Stop,
        n: int,
        on_delta: Callable[[int, Delta], None] | None,
    ) -> list[Completion]:
        """Completions by way of `decoding.run`, each prompt n times with n seeds."""
        eos = self.engine.policy.eos
        ends = frozenset((*stop.ids, *(() if stop.ignore_eos else eos)))
        deltas: list[list[Delta]] = [[] for _ in range(len(ids) * n)]

        def tell(at: int, delta: Delta) -> None:
            deltas[at].append(delta)
            if on_delta is not None:
                on_delta(at // n, delta)

        jobs, answers = [], []
        for prompt in ids:
            seed = self.engine.host.new_seed() if sampling.seed is None else sampling.seed
            for i in range(n):
                sink = functools.partial(tell, len(jobs))
                how: dict[str, Any] = dict(patterns=stop.patterns, include_stop=stop.include_stop)
                text = TextStream.start(self.engine.tokenizer, prompt, stop.strings, **how)
                jobs.append(Job(strategy, prompt, args, replace(sampling, seed=fold_in(seed, i)), stop))
                answers.append(Answer(i, text, len(prompt), stop, ends, sink))
        self._runtime.forget_rows()
        outcomes = decoding.run(self._runtime, jobs, on_emit=lambda part: answers[part.index].emitted(part), eos=eos)
        self._runtime.drain()
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        for answer, outcome in zip(answers, outcomes, strict=True):
            answer.ended(outcome)
        return [_gather(p, [deltas[i * n + j] for j in range(n)]) for i, p in enumerate(prompts)]

    def default_sampling(self) -> Sampling:
        """What generation_config.json says, temperature 1 where it is silent."""
        known = {k: v for k, v in self.engine.defaults.items() if k in Sampling.__dataclass_fields__}
        return Sampling(**known)

    def _run(
        self, prompts: list[Prompt], requests: list[Request], on_delta: Callable[[int, Delta], None] | None
    ) -> list[Completion]:
        deltas: list[list[list[Delta]]] = [[[] for _ in range(r.n)] for r in requests]

        def sink(i: int) -> Callable[[Delta], None]:
            def put(delta: Delta) -> None:
                deltas[i][delta.index].append(delta)
                if on_delta is not None:
                    on_delta(i, delta)

            return put

        submitted = []
        try:
            for i, request in enumerate(requests):
                self.engine.submit_to(request, sink(i))
                submitted.append(request.id)
            while self.engine.turn():
                pass
        except BaseException:
            for request_id in submitted:
                self.engine.abort(request_id)
            while self.engine.turn():
                pass
            raise
        return [_gather(p, d) for p, d in zip(prompts, deltas, strict=True)]


def _gather(prompt: Prompt, deltas: list[list[Delta]]) -> Completion:
    choices, scored = [], None
    for index, parts in enumerate(deltas):
        last = parts[-1]
        if last.finish == "error":
            raise DeviceFault(last.error or "the request failed")
        assert last.finish is not None and last.usage is not None
        scored = next((d.prompt_logprobs for d in parts if d.prompt_logprobs is not None), scored)
        asked = any(d.logprobs is not None for d in parts)
        choices.append(
            Choice(
                index=index,
                text="".join(d.text for d in parts),
                tokens=tuple(t for d in parts for t in d.tokens),
                finish=last.finish,
                stop_reason=last.stop_reason,
                logprobs=tuple(p for d in parts for p in d.logprobs or ()) if asked else None,
                usage=last.usage,
            )
        )
    return Completion(prompt, tuple(choices), scored)
