"""From a typed body to what the engine is asked and what the answer must look like. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np

from fnengine.errors import ContextLengthError, RequestError
from fnengine.host.grammar import Grammar, from_fields
from fnengine.host.guide import Reasoning
from fnengine.host.repeats import Repetition
from fnengine.host.request import MAX_BAD, MAX_BREAKERS, MAX_DRAFT, Request, Sampling, Speculate, Stop
from fnengine.host.thinking import Budget
from fnengine.serve import tools as tooling
from fnengine.serve.engine_port import EnginePort, Text
from fnengine.serve.parsing.parser import Parsers, begin
from fnengine.serve.protocol import ChatBody, CompletionBody, Generate, PredictionBody, TokenizeBody
from fnengine.serve.reading import Reader

COMPLETION_TOKENS = 16
"""max_tokens of a completion that names none (OpenAI's legacy default)."""
MOST_CHOICES = 128
"""Largest n, as OpenAI's."""
BEAMS = "use_beam_search"
"""The field, and the name of the strategy that it stands for."""
BEAM_WIDTH = 4
"""Of a beam search that gives one text and names none."""
MOST_PROMPTS = 2048
"""Most prompts of a completion, as OpenAI's; beyond it a small body makes very many requests."""
MOST_STOPS, STOP_CHARS = 256, 1 << 14
"""Most stop strings, and most characters of them together: three million of them took half a second of the thread
that serves everybody."""
BREAKERS = ("\n", ":", '"', "*")
"""Sequence breakers of DRY where a request names none. Source: llama.cpp and text-generation-webui."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_RESERVED = frozenset(
    {
        "messages",
        "tools",
        "template",
        "chat_template",
        "add_generation_prompt",
        "continue_final",
        "continue_final_message",
        "tokenize",
        "bos_token",
        "eos_token",
        "self",
    }
)
"""Names that `chat_template_kwargs` may not set."""


@dataclass(frozen=True)
class Shape:
    """How an answer looks: everything that its writer needs beside the deltas."""

    kind: Literal["chat", "completion"]
    id: str
    created: int
    """Unix seconds"""
    model: str
    fingerprint: str
    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each prompt."""
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    """Most likely tokens beside the chosen one; None for no log-probabilities."""
    prompt_logprobs: int | None = None
    """Asked for by its own name (an extension), not by echo."""
    echo: tuple[str, ...] | None = None
    """Text of each prompt, put before each of its choices."""
    as_ids: bool = False
    """Name tokens `token_id:<n>` in log-probabilities."""
    return_ids: bool = False
    timing: bool = False
    """Say at the end where its seconds went."""
    role: str = "assistant"
    skip_special: bool = True
    best: int | None = None
    """Of each prompt's choices, the so many likeliest are the answer; None for all, in their order."""
    interval: int | None = None
    """Tokens of a chunk, at least; None is as the server was started."""
    strategy: str | None = None
    """Name of what decides the answer; None where tokens are sampled."""
    reader: Reader | None = None
    """How texts are read for reasoning and tool calls; None where all of them are content."""


@dataclass(frozen=True)
class Job:
    """What one HTTP request becomes: one engine request per prompt, and the shape of the answer."""

    requests: tuple[Request, ...]
    shape: Shape
    ignored: tuple[str, ...] = ()
    """Fields without effect, beside those that have none in any request."""
    write: Callable[[Shape, Text, Callable[[], Any]], Any] | None = None
    """Makes the `replies.Writer` of a protocol of its own; None is OpenAI's `Answer`."""
    background: Callable[[Any, Any, Coroutine[Any, Any, Any]], Any] | None = None
    """(flight, writer, the rest of its life, to be run by whoever is given it) -> an HTTP response at once."""


def tokens_held(job: Job) -> int:
    """Tokens that a request keeps while it is open: its prompts, and its prediction."""
    predicted = [len(r.speculate.prediction) for r in job.requests[:1] if r.speculate is not None]
    return sum(map(len, job.shape.prompts)) + sum(predicted)


def choose_model(engine: EnginePort, name: str | None) -> str | None:
    """The served name that a request means; None when it is not served here."""
    return engine.name if not name else name if name in engine.names else None


def from_completion(body: CompletionBody, engine: EnginePort, *, id: str, created: int, model: str) -> Job:
    """Requests and shape of /v1/completions.

    Raises:
        RequestError: a value is out of range or conflicts with another; `param` names it.
        ContextLengthError: a prompt leaves no room.
    """
    text = engine.tokenizer
    prompts = _prompts(body.prompt)
    special = body.add_special_tokens is not False
    if body.suffix:
        if body.echo:
            _refuse("suffix", "cannot be combined with echo", "leave one out")
        prompts = [_infill(p, body.suffix, text) for p in prompts]
    whole = [tuple(text.encode(p, add_special=special)) if isinstance(p, str) else tuple(p) for p in prompts]
    cut = _cut(body, engine.max_len)
    ids = [cut(one) for one in whole]
    for one in ids:  # before anything looks at all of it
        _check_room(len(one), body.max_tokens, engine.max_len)
    echo = bool(body.echo)
    skip = body.skip_special_tokens is not False
    check_ids(ids, text.vocab_size)
    if body.max_tokens == 0 and not echo:
        _refuse("max_tokens", "must be at least 1 unless echo is true, got 0")
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    logprobs = _limit_logprobs(body.logprobs, "logprobs", engine)
    shape = Shape(
        kind="completion",
        id=f"cmpl-{id}",
        created=created,
        model=model,
        fingerprint=engine.fingerprint,
        prompts=tuple(ids),
        logprobs=logprobs,
        echo=tuple(
            p if isinstance(p, str) and len(kept) == len(all) else text.decode(kept, skip_special=skip)
            for p, all, kept in zip(prompts, whole, ids, strict=True)
        )
        if echo
        else None,
        **_common_shape(body, engine),
    )
    prompt_k = shape.prompt_logprobs
    if echo and logprobs is not None:
        prompt_k = max(logprobs, prompt_k or 0)
    grammar = from_fields(body.model_extra or {})
    requests = _requests(
        body, engine, shape, ids, id=id, most=most, explicit=True, prompt_logprobs=prompt_k, grammar=grammar
    )
    return Job(requests, shape, () if grammar is None else grammar.ignored)


def from_chat(
    body: ChatBody,
    engine: EnginePort,
    *,
    id: str,
    created: int,
    model: str,
    role: str = "assistant",
    parsers: Parsers | None = None,
    auto_tools: bool = True,
    form: Grammar | None = None,
) -> Job:
    """Requests and shape of /v1/chat/completions. Raises as `from_completion` does.

    Args:
        form: what the answer has to be, where another protocol says it in words of its own.
    """
    text, parsers = engine.tokenizer, parsers or Parsers()
    asked_form = from_fields(body.model_extra or {})
    if form is not None and asked_form is not None:
        what = f"only one constraint is possible, and {form.field} is another"
        _refuse(asked_form.field, what, "leave one out")
    want = tooling.wanted(body, parsers, text, answer=form or asked_form, auto=auto_tools)
    effort = tooling.effort(body, parsers, text)
    rendered, tokens = _render(body, text, want.shown, effort.variables)
    ids = [_cut(body, engine.max_len)(tuple(tokens))]
    common = _common_shape(body, engine)
    going_on = _final_text(body) if body.continue_final_message else None
    start = begin(parsers, rendered, want.tools, going_on)
    reader = None
    if start is not None:
        common["skip_special"] &= not tooling.special_marks(parsers, text, want.tools is not None)
        reader = Reader(
            start,
            tooling.salt_of(id, created, ids[0]),
            short_ids=parsers.short_ids,
            show=body.include_reasoning is not False,
            thinks=parsers.thinks,
            skip_special=common["skip_special"],
        )
    if body.top_logprobs and not body.logprobs:
        _refuse("top_logprobs", "needs logprobs: true")
    top = _limit_logprobs(body.top_logprobs, "top_logprobs", engine)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if asked is not None and asked < 1:
        name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
        _refuse(name, f"must be at least 1, got {asked}")
    most = asked if asked is not None else engine.defaults.get("max_new_tokens")
    shape = Shape(
        kind="chat",
        id=f"chatcmpl-{id}",
        created=created,
        model=model,
        fingerprint=engine.fingerprint,
        prompts=tuple(ids),
        logprobs=(top or 0) if body.logprobs else None,
        role=role,
        reader=reader,
        **common,
    )
    explicit = asked is not None
    held = want.grammar is not None
    requests = _requests(
        body,
        engine,
        shape,
        ids,
        id=id,
        most=most,
        explicit=explicit,
        prompt_logprobs=shape.prompt_logprobs,
        grammar=want.grammar,
        reasoning=tooling.reasoning_of(start, text, want.call) if held else None,
        thinking=tooling.budget_of(start, text, effort.budget, want.call),
    )
    return Job(requests, shape, tuple(dict.fromkeys(want.ignored + effort.ignored)))


def from_tokenize(body: TokenizeBody, text: Text) -> list[int]:
    """Token ids of a prompt or of a rendered conversation."""
    if (body.prompt is None) == (body.messages is None):
        _refuse("prompt", "exactly one of prompt and messages is needed")
    if body.prompt is not None:
        return text.encode(body.prompt, add_special=body.add_special_tokens is not False)
    if body.tools is not None:
        tooling.check(body.tools)
    return _render(body, text, body.tools)[1]


def _refuse(param: str, what: str, remedy: str | None = None) -> NoReturn:
    raise RequestError(what, where=param, param=param, remedy=remedy)


def _prompts(prompt: Any) -> list[str | Sequence[int]]:
    """A list of prompts out of the four forms."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt or any(len(p) == 0 for p in prompt):
        _refuse("prompt", "must not be empty")
    if len(prompt) > MOST_PROMPTS:
        _refuse("prompt", f"must be at most {MOST_PROMPTS} prompts, got {len(prompt)}")
    return prompt


def check_ids(prompts: Sequence[Sequence[int]], vocab: int, param: str = "prompt") -> None:
    """Raises `RequestError` for a prompt without tokens, or with one outside the vocabulary."""
    for ids in prompts:
        if not ids:
            _refuse(param, "has no tokens")
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(i for i in ids if not 0 <= i < vocab)
            _refuse(param, f"holds token id {bad}, the vocabulary has {vocab} tokens")


def _limit_logprobs(k: int | None, param: str, engine: EnginePort) -> int | None:
    if k is None:
        return None
    most = engine.tokenizer.vocab_size if engine.max_logprobs < 0 else engine.max_logprobs
    if k == -1 and most >= engine.tokenizer.vocab_size:
        return most
    if not 0 <= k <= most:
        _refuse(param, f"must be between 0 and {most}, got {k}", "the limit is --max-logprobs")
    return k


def _common_shape(body: Generate, engine: EnginePort) -> dict[str, Any]:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MOST_CHOICES:
        _refuse("n", f"must be between 1 and {MOST_CHOICES}, got {n}")
    most = body.best_of if isinstance(body, CompletionBody) and body.best_of is not None else n
    if not n <= most <= MOST_CHOICES:
        _refuse("best_of", f"must be between n ({n}) and {MOST_CHOICES}, got {most}")
    if most > n and body.stream:
        _refuse("best_of", "cannot be streamed: nobody knows the best before the end", "leave stream out")
    if most > n and (body.strategy is not None or body.use_beam_search):
        _refuse("best_of", "cannot be asked of a strategy", "leave it out")
    if body.stream_interval is not None and not 1 <= body.stream_interval <= 1 << 20:
        _refuse("stream_interval", f"must be at least 1, got {body.stream_interval}")
    beams = _beams(body, n)
    options = body.stream_options
    stream = bool(body.stream)
    if options is not None and not stream and (options.model_fields_set):
        _refuse("stream_options", "needs stream: true")
    if body.prompt_logprobs is not None and stream:
        _refuse("prompt_logprobs", "cannot be streamed", "leave stream out")
    return {
        "n": most,
        "best": n if most > n else None,
        "interval": body.stream_interval,
        "stream": stream,
        "include_usage": bool(options and (options.include_usage or options.continuous_usage_stats)),
        "continuous_usage": bool(options and options.continuous_usage_stats),
        "prompt_logprobs": _limit_logprobs(body.prompt_logprobs, "prompt_logprobs", engine),
        "as_ids": bool(body.return_tokens_as_token_ids),
        "return_ids": bool(body.return_token_ids),
        "timing": bool(body.timing),
        "skip_special": body.skip_special_tokens is not False,
        "strategy": BEAMS if beams is not None else None if body.strategy is None else body.strategy.name,
    }


def _requests(
    body: Generate,
    engine: EnginePort,
    shape: Shape,
    ids: Sequence[tuple[int, ...]],
    *,
    id: str,
    most: int | None,
    explicit: bool,
    prompt_logprobs: int | None,
    grammar: Grammar | None = None,
    reasoning: Reasoning | None = None,
    thinking: Budget | None = None,
) -> tuple[Request, ...]:
    sampling = _sampling(body, engine)
    strategy = None if body.strategy is None else (body.strategy.name, body.strategy.args or {})
    if (beams := _beams(body, shape.n)) is not None:
        strategy = (BEAMS, beams)
    speculate = _speculate(body, engine)
    stop = _stop(body, most, engine.tokenizer.vocab_size, explicit)
    for prompt in ids:
        _check_room(len(prompt), most, engine.max_len)
    watched = tuple(dict.fromkeys(body.logprob_token_ids or ()))
    if watched and shape.logprobs is None and prompt_logprobs is None:
        _refuse("logprob_token_ids", "needs logprobs", "in chats logprobs: true")
    now = engine.clock()
    return tuple(
        Request(
            id=id if len(ids) == 1 else f"{id}-{i}",
            prompt=np.asarray(prompt, dtype=np.int32),
            sampling=sampling,
            stop=stop,
            n=shape.n,
            logprobs=shape.logprobs if shape.best is None else shape.logprobs or 0,
            prompt_logprobs=prompt_logprobs,
            watched=watched,
            priority=0 if body.priority is None else body.priority,
            salt=body.cache_salt or "",
            steer=body.steer or {},
            skip_special_tokens=shape.skip_special,
            grammar=grammar,
            reasoning=reasoning,
            thinking=thinking,
            strategy=strategy,
            speculate=speculate,
            arrival=now,
        )
        for i, prompt in enumerate(ids)
    )


def _beams(body: Generate, n: int) -> dict[str, Any] | None:
    """Arguments of the beam search that a request's fields ask for, which gives n texts; None where they do not."""
    if not body.use_beam_search:  # values that say what is done anyway are harmless, and some clients send them
        for name, nothing in (("beam_width", 1), ("length_penalty", 1), ("early_stopping", False)):
            if getattr(body, name) not in (None, nothing):
                _refuse(name, f"needs {BEAMS}: true")
        return None
    if body.strategy is not None:
        _refuse(BEAMS, "stands for a strategy, and strategy names another", "leave one out")
    width = body.beam_width if body.beam_width is not None else n if n > 1 else BEAM_WIDTH
    if not n <= width <= MOST_CHOICES:
        _refuse("beam_width", f"must be between n ({n}) and {MOST_CHOICES}, got {width}")
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    if not -10 <= penalty <= 10:
        _refuse("length_penalty", f"must be between -10 and 10, got {penalty}")
    early = False if body.early_stopping is None else body.early_stopping
    return {"width": width, "length_penalty": penalty, "early_stopping": early}


INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
"""Marks of models that fill a gap: before what precedes it, what follows it, and the middle (DeepSeek: around the gap).
Sources: the tokenizers of Qwen2.5-Coder, StarCoder2, Granite code, DeepSeek-Coder."""


def _infill(prompt: str | Sequence[int], suffix: str, text: Text) -> list[int]:
    """The prompt of a text that stands between two others, for a model whose tokenizer has marks for that."""
    for marks in INFILL:
        found = [text.encode(mark, add_special=False) for mark in marks]
        if all(len(ids) == 1 for ids in found):
            (before,), (behind,), (middle,) = found
            first = text.encode(prompt, add_special=False) if isinstance(prompt, str) else list(prompt)
            return [before, *first, behind, *text.encode(suffix, add_special=False), middle]
    _refuse("suffix", "needs a model that fills gaps, and this tokenizer has no marks for that", "leave it out")


def _cut(body: Generate, context: int) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """What `truncate_prompt_tokens` leaves of a prompt: its end, unless `truncation_side` is right. -1 is as much as
    leaves room for one token. Source: vLLM."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        if body.truncation_side is not None:
            _refuse("truncation_side", "needs truncate_prompt_tokens")
        return lambda ids: ids
    if not (limit == -1 or 1 <= limit <= context):
        _refuse("truncate_prompt_tokens", f"must be -1 or between 1 and {context}, got {limit}")
    most = context - 1 if limit == -1 else limit
    if body.truncation_side == "right":
        return lambda ids: ids[:most]
    return lambda ids: ids[-most:]


def _repetition(body: Generate) -> Repetition | None:
    asked = body.repetition_detection
    if asked is None or not asked.max_pattern_size:
        return None
    return Repetition(asked.max_pattern_size, asked.min_pattern_size or 1, asked.min_count)


def _check_room(length: int, most: int | None, context: int):
    if length > context or (length == context and most != 0):
        raise ContextLengthError(
            f"the prompt has {length} tokens and the context holds {context}, with at least one for the answer",
            param="prompt",
            remedy="shorten the prompt",
        )


def _sampling(body: Generate, engine: EnginePort) -> Sampling:
    values: dict[str, Any] = {}
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "typical_p",
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
        "xtc_probability",
        "xtc_threshold",
    ):
        value = getattr(body, name)
        if value is None:
            value = engine.defaults.get(name)
        if value is not None:
            values[name] = value
    if body.processors:
        values["processors"] = tuple((name, tuple(given)) for name, given in body.processors.items())
    text = engine.tokenizer
    if body.allowed_token_ids is not None:
        for i in body.allowed_token_ids:
            if not 0 <= i < text.vocab_size:
                _refuse("allowed_token_ids", f"holds token id {i}, the vocabulary has {text.vocab_size} tokens")
        values["allowed_token_ids"] = tuple(dict.fromkeys(body.allowed_token_ids))  # at most the vocabulary
    if values.get("dry_multiplier"):
        strings = BREAKERS if body.dry_sequence_breakers is None else body.dry_sequence_breakers
        values["dry_sequence_breakers"] = _breakers(strings, text)
    bias = _bias(body.logit_bias, text.vocab_size)
    return Sampling(logit_bias=bias, bad_words=_bad_words(body.bad_words or (), text), seed=body.seed, **values)


def _speculate(body: Generate, engine: EnginePort) -> Speculate | None:
    """The drafts that are asked for: what is not said is as the server was started. None leaves all of it to that."""
    asked, prediction = body.speculative, body.prediction
    if asked is None and prediction is None:
        return None
    given: dict[str, Any] = {}
    if asked is not None:
        if asked.k is not None and asked.num_speculative_tokens not in (None, asked.k):
            _refuse("speculative", "k and num_speculative_tokens are two names of one number", "give one of them")
        k = asked.num_speculative_tokens if asked.k is None else asked.k
        given = {"method": asked.method, "k": k, "adapt": asked.adapt}
        given = {name: value for name, value in given.items() if value is not None}
    default = engine.drafting.default or Speculate()
    if prediction is not None:
        if given.get("method", "prediction") != "prediction" or given.get("k") == 0:
            _refuse("prediction", "excludes other drafts, and none", "leave out speculative, or its method")
        return Speculate(**{"method": "prediction", "k": MAX_DRAFT, **given}, prediction=_predicted(prediction, engine))
    if given.get("method") == "prediction":
        _refuse("speculative.method", "prediction needs the field prediction")
    if given.get("method", default.method) != default.method:
        default = Speculate()
    return replace(default, **given)


def _predicted(prediction: PredictionBody, engine: EnginePort) -> tuple[int, ...]:
    """Token ids of the text that is expected, as they would stand in an answer."""
    parts = [_part(p, f"prediction.content.{i}") for i, p in enumerate(prediction.content)]
    ids = engine.tokenizer.encode("".join(p["text"] for p in parts), add_special=False)
    if len(ids) > engine.max_len:
        _refuse("prediction", f"has {len(ids)} tokens, and the context holds {engine.max_len}", "shorten it")
    return tuple(ids)


def _bad_words(words: Sequence[str], text: Text) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word as it begins a text and as it follows a space, which are other tokens in most
    vocabularies. Source: vLLM."""
    if len(words) > MAX_BAD:
        _refuse("bad_words", f"must be at most {MAX_BAD} words, got {len(words)}")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip():
            _refuse("bad_words", "words must not be empty")
        plain, spaced = (tuple(text.encode(s + word.lstrip(), add_special=False)) for s in ("", " "))
        found[plain] = None
        if spaced[-len(plain) :] != plain:  # else whatever ends like the one ends like the other
            found[spaced] = None
    return tuple(found)


def _breakers(strings: Sequence[str], text: Text) -> tuple[int, ...]:
    """The last token of each string behind a letter. Source: text-generation-webui."""
    if len(strings) > MAX_BREAKERS:
        _refuse("dry_sequence_breakers", f"must be at most {MAX_BREAKERS} strings, got {len(strings)}")
    if not all(strings):
        _refuse("dry_sequence_breakers", "strings must not be empty")
    return tuple(dict.fromkeys(text.encode("a" + s, add_special=False)[-1] for s in strings))


def _bias(bias: Mapping[str, float] | None, vocab: int) -> tuple[tuple[int, float], ...]:
    """(id, bias) pairs; keys are strings of integers, values are clamped to [-100, 100]."""
    pairs: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            _refuse("logit_bias", f"keys must be token ids written as strings, got {key[:40]!r}")
        id = int(key)
        if id >= vocab:
            _refuse("logit_bias", f"holds token id {id}, the vocabulary has {vocab} tokens")
        if id in pairs:
            _refuse("logit_bias", f"holds token id {id} twice")
        pairs[id] = min(100.0, max(-100.0, value))
    return tuple(sorted(pairs.items()))


def _stop(body: Generate, most: int | None, vocab: int, explicit: bool) -> Stop:
    stop = body.stop
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not s for s in strings):
        _refuse("stop", "strings must not be empty")
    if len(strings) > MOST_STOPS or sum(map(len, strings)) > STOP_CHARS:
        _refuse("stop", f"must be at most {MOST_STOPS} strings of {STOP_CHARS} characters together")
    for i in body.stop_token_ids or ():
        if not 0 <= i < vocab:
            _refuse("stop_token_ids", f"holds token id {i}, the vocabulary has {vocab} tokens")
    if most is not None and most < 0:
        _refuse("max_tokens", f"must be at least 0, got {most}")
    asked, least = body.stop_regex, body.min_tokens or 0
    if least < 0 or (most is not None and least > most):
        limit = "" if most is None else f" and max_tokens ({most}{'' if explicit else ', the default'})"
        _refuse("min_tokens", f"must be between 0{limit}, got {least}" if limit else f"must be at least 0, got {least}")
    return Stop(
        max_tokens=most,
        min_tokens=least,
        strings=strings,
        patterns=() if asked is None else (asked,) if isinstance(asked, str) else tuple(asked),
        ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        ignore_eos=bool(body.ignore_eos),
        include_stop=bool(body.include_stop_str_in_output),
        repetition=_repetition(body),
    )


def _render(
    body: ChatBody | TokenizeBody,
    text: Text,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """(text, token ids) of a conversation. The template writes BOS itself, so special tokens are not added again.

    Args:
        variables: for the template, unless the request sets them itself.
    """
    going_on = bool(body.continue_final_message)
    if going_on and body.add_generation_prompt:
        _refuse("continue_final_message", "cannot be combined with add_generation_prompt: true")
    opening = not going_on if body.add_generation_prompt is None else body.add_generation_prompt
    extra = {**(variables or {}), **(body.chat_template_kwargs or {})}
    for name in extra:
        if name in _RESERVED or not name.isidentifier():
            _refuse("chat_template_kwargs", f"cannot set {name[:40]!r}")
    assert body.messages is not None
    messages = [_message(m, f"messages.{i}") for i, m in enumerate(body.messages)]
    if going_on and messages[-1]["role"] != "assistant":
        _refuse("continue_final_message", "needs an assistant message at the end")
    if isinstance(body, ChatBody) and body.documents:
        extra["documents"] = body.documents
    rendered = text.render_chat(messages, tools=tools, add_generation_prompt=opening, continue_final=going_on, **extra)
    ids = text.encode(rendered, add_special=bool(body.add_special_tokens))
    if not ids:
        _refuse("messages", "give an empty prompt with this model's chat template")
    return rendered, ids


def _final_text(body: ChatBody) -> str:
    """The text of the last message, which the answer goes on with."""
    content = body.messages[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(p.get("text") or "" for p in content)


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One turn, checked, as chat templates expect it: `developer` becomes `system`, tool arguments become objects."""
    out = dict(message)
    role = message.get("role")
    if role not in ROLES:
        got = repr(role)[:40]
        _refuse(f"{where}.role", f"must be one of {', '.join(ROLES)}, got {got}")
    if role == "developer":  # OpenAI's newer name for system; templates in the wild know only the older one
        out["role"] = "system"
    content = message.get("content")
    calls = message.get("tool_calls")
    if content is None:
        if role != "assistant":
            _refuse(f"{where}.content", "is required")
        if not calls:
            _refuse(f"{where}.content", "is required in an assistant turn without tool_calls")
        out["content"] = None
    elif isinstance(content, list):
        out["content"] = [_part(p, f"{where}.content.{i}") for i, p in enumerate(content)]
    elif not isinstance(content, str):
        _refuse(f"{where}.content", "must be a string or a list of parts")
    if role == "tool" and not isinstance(message.get("tool_call_id", ""), str):
        _refuse(f"{where}.tool_call_id", "must be a string")
    if calls is not None:
        if not isinstance(calls, list) or role != "assistant":
            _refuse(f"{where}.tool_calls", "must be a list, in an assistant turn")
        out["tool_calls"] = [_call(c, f"{where}.tool_calls.{i}") for i, c in enumerate(calls)]
    return out


def _part(part: Any, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "text" or not isinstance(kind, str):
        _refuse(where, 'must be {"type": "text", "text": "..."}')
    raise RequestError(
        f"{str(kind)[:40]!r} parts are not implemented, this model reads text",
        where=f"{where}.type",
        param=f"{where}.type",
    )


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _refuse(f"{where}.function.name", "is required")
    assert isinstance(call, dict) and isinstance(function, dict)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            _refuse(f"{where}.function.arguments", "must be a JSON object in a string")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        _refuse(f"{where}.function.arguments", "must be a JSON object in a string")
    return {**call, "function": {**function, "arguments": arguments}}
