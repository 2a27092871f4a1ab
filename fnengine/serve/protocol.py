"""Request bodies as typed values. Wrong types are RequestErrors that name the field; nothing is silently ignored.

Four kinds of field:
- typed below, or `grammar.FIELDS`: understood;
- `REFUSED`: understood by others, not by us: a 400 that names the field, unless the value asks for nothing;
- `HINTS`: accepted, without effect on the answer, and named in the header `x-fnengine-ignored`;
- anything else: named in that header too, and a 400 under `strict`.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from fnengine.errors import RequestError
from fnengine.host.grammar import FIELDS
from fnengine.serve.bodies import is_text, loads

LARGE = 1 << 18
"""Bytes of a body from which on its JSON is read in pieces."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
MAX_ARGS = 1 << 16
"""Most characters of a strategy's arguments, as JSON."""


def _whole(value: Any) -> Any:
    """5 for 5.0: JSON has one kind of number, and some clients write integers with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, Field(ge=-(2**63), lt=2**64), BeforeValidator(_whole)]


def _switch(value: Any) -> Any:
    """False as no drafts, true as those that the server makes by itself or by default."""
    return {} if value is True else {"k": 0} if value is False else value


def _parts(value: Any) -> Any:
    """A text as a list of one part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _bounded(args: Any) -> Any:
    """The arguments of a strategy, if they are not too many."""
    where = "strategy.args"
    try:
        n = len(json.dumps(args, ensure_ascii=False))
    except RecursionError:
        raise RequestError("are nested too deeply", where=where, param=where) from None
    if n > MAX_ARGS:
        raise RequestError(f"take {n} characters, {MAX_ARGS} are allowed", where=where, param=where)
    return args


Bool = bool | None
CONFIG = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(BaseModel):
    model_config = CONFIG

    include_usage: Bool = None
    continuous_usage_stats: Bool = None
    include_obfuscation: Bool = None


class StrategyBody(BaseModel):
    """Who decides what the answer is."""

    model_config = CONFIG | {"extra": "forbid"}

    name: str = Field(min_length=1, max_length=128)
    args: Annotated[dict[str, Any] | None, AfterValidator(_bounded)] = None


class SpeculativeBody(BaseModel):
    """Who guesses what comes next. What is left out is as the server was started."""

    model_config = CONFIG | {"extra": "forbid"}

    method: str | None = Field(default=None, min_length=1, max_length=128)
    k: Int | None = None
    num_speculative_tokens: Int | None = None
    """vLLM's name of k."""
    adapt: Bool = None


class PredictionBody(BaseModel):
    """What the answer is expected to be."""

    model_config = CONFIG | {"extra": "forbid"}

    type: Literal["content"]
    content: Annotated[list[dict[str, Any]], BeforeValidator(_parts)]


class RepetitionBody(BaseModel):
    """When a text that goes in circles ends."""

    model_config = CONFIG | {"extra": "forbid"}

    max_pattern_size: Int
    min_pattern_size: Int | None = None
    min_count: Int = 2


Speculative = Annotated[
    SpeculativeBody | None,
    BeforeValidator(_switch),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, SpeculativeBody.model_json_schema()]}),
]


class Generate(BaseModel):
    """Fields that completions and chat share."""

    model_config = CONFIG

    model: str | None = None
    stream: Bool = None
    stream_options: StreamOptions | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    no_repeat_ngram_size: Int | None = None
    typical_p: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: Int | None = None
    dry_penalty_last_n: Int | None = None
    dry_sequence_breakers: list[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    processors: dict[str, list[float]] | None = None
    steer: dict[str, list[float]] | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    strategy: StrategyBody | None = None
    speculative: Speculative = None
    prediction: PredictionBody | None = None
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: Bool = None
    ignore_eos: Bool = None
    skip_special_tokens: Bool = None
    add_special_tokens: Bool = None
    stream_interval: Int | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] | None = None
    repetition_detection: RepetitionBody | None = None
    use_beam_search: Bool = None
    beam_width: Int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    prompt_logprobs: Int | None = None
    logprob_token_ids: list[Int] | None = None
    return_tokens_as_token_ids: Bool = None
    return_token_ids: Bool = None
    timing: Bool = None
    timeout: float | None = Field(default=None, gt=0)
    """Seconds from here to the end of the answer; then it ends with an error."""
    priority: Int | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=128)
    request_id: str | None = Field(default=None, min_length=1, max_length=128)


class CompletionBody(Generate):
    prompt: str | list[str] | list[Int] | list[list[Int]]
    echo: Bool = None
    suffix: str | None = None
    best_of: Int | None = None
    logprobs: Int | None = None


class ChatBody(Generate):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Int | None = None
    logprobs: Bool = None
    top_logprobs: Int | None = None
    add_generation_prompt: Bool = None
    continue_final_message: Bool = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Bool = None
    reasoning_effort: str | None = Field(default=None, max_length=32)
    thinking_token_budget: Int | None = None
    include_reasoning: Bool = None


class TokenizeBody(BaseModel):
    model_config = CONFIG

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    add_special_tokens: Bool = None
    add_generation_prompt: Bool = None
    continue_final_message: Bool = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    return_token_strs: Bool = None


class DetokenizeBody(BaseModel):
    model_config = CONFIG

    model: str | None = None
    tokens: list[Int]


class AbortBody(BaseModel):
    model_config = CONFIG

    request_ids: list[str]


HINTS = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "verbosity",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "session_id",
        "spaces_between_special_tokens",
    )
)
"""No effect on the answer."""

_NONE = (None,)
REFUSED: dict[str, tuple] = {
    "functions": _NONE,
    "function_call": (None, "none", "auto"),
    "guided_decoding_backend": (None, "auto", "guidance", "llguidance"),
    "logits_processors": (None, []),
    "custom_logit_processor": _NONE,
    "custom_params": _NONE,
    "vllm_xargs": (None, {}),
    "prompt_embeds": _NONE,
    "audio": _NONE,
    "modalities": (None, [], ["text"]),
    "mm_processor_kwargs": (None, {}),
    "media_io_kwargs": (None, {}),
    "logprobs_mode": (None, "raw_logprobs"),
    "chat_template": _NONE,
    "web_search_options": _NONE,
    "kv_transfer_params": _NONE,
    "lora": _NONE,
    "top_n_sigma": (None, -1, 0),
    "mirostat": (None, 0),
    "return_prompt_text": (None, False),
    "return_token_offsets": (None, False),
    "trace_decode_token_ids": (None, False, []),
    "output_kind": _NONE,
    "watermarking": (None, False),
    "flat_logprobs": (None, False),
}
"""Name -> values that ask for nothing. Every other value is a 400."""

_REMEDY = {
    "chat_template": "start the server with --chat-template FILE",
    "vllm_xargs": "the field is called processors here",
}

_COMPLETION_ONLY = {"prompt": _NONE, "echo": (None, False), "suffix": (None, ""), "best_of": (None, 1)}
_CHAT_ONLY = {
    "tools": _NONE,
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "reasoning_effort": (None, "none"),
    "include_reasoning": (None, True, False),
    "documents": (None, []),
    "thinking_token_budget": _NONE,
}


ALIASES = {
    "repeat_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output",
}
"""Names that SGLang and llama.cpp have for fields, and ours."""

M = TypeVar("M", bound=BaseModel)


def read_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request body.

    Raises:
        RequestError: invalid UTF-8, malformed JSON, NaN or Infinity, lone surrogates, or no object.
    """

    def constant(name: str):
        raise RequestError(f"the body holds {name}, which JSON does not have", where="body")

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise RequestError(f"not UTF-8 at byte {e.start}", where="body", remedy="encode the JSON as UTF-8") from None
    try:
        value = loads(text, constant) if len(raw) > LARGE else json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as e:
        raise RequestError(f"not JSON: {e.msg} at line {e.lineno} column {e.colno}", where="body") from None
    except RecursionError:
        raise RequestError("nested too deeply", where="body") from None
    except ValueError as e:  # an integer of thousands of digits
        raise RequestError(f"not readable as JSON: {str(e)[:200]}", where="body") from None
    if not isinstance(value, dict):
        raise RequestError(f"must be a JSON object, got {_kind(value)}", where="body")
    if _HALF.search(text) and not is_text(value):  # only an escape can smuggle one in
        raise RequestError("a string holds half of a surrogate pair", where="body")
    return value


def parse(model: type[M], data: dict[str, Any], *, strict: bool = False) -> tuple[M, tuple[str, ...]]:
    """A typed body from a JSON object, and the names of its fields that have no effect.

    Raises:
        RequestError: a field has the wrong type or range, asks for something that is not implemented, or (with
            `strict`) is unknown; `param` names it.
    """
    refused = REFUSED if issubclass(model, Generate) else {}
    if model is ChatBody:
        refused = refused | _COMPLETION_ONLY
    elif model is CompletionBody:
        refused = refused | _CHAT_ONLY
    for name in data.keys() & ALIASES.keys() if refused else ():
        ours = ALIASES[name]
        if data.get(ours) is not None:
            raise RequestError(f"is another name of {ours}", where=name, param=name, remedy="give one of them")
        data = {**{k: v for k, v in data.items() if k != name}, ours: data[name]}
    for name in data.keys() & refused.keys():
        value = data[name]
        if not any(_same(value, ok) for ok in refused[name]):
            raise RequestError("is not implemented", where=name, param=name, remedy=_REMEDY.get(name, "leave it out"))
    try:
        body = model.model_validate(data)
    except ValidationError as e:
        raise _first(e) from None
    nothing: dict[str, Any] = body.model_extra or {}
    known = HINTS | refused.keys() | (FIELDS if refused else frozenset())
    unknown = [k for k in nothing if k not in known]
    hints = [k for k, v in nothing.items() if k in HINTS and v is not None]
    if isinstance(body, Generate) and body.stream_options is not None:
        unknown += [f"stream_options.{k}" for k in body.stream_options.model_extra or {}]
    if strict and unknown:
        raise RequestError("unknown field", where=unknown[0][:80], param=unknown[0][:80], remedy="leave it out")
    return body, tuple(sorted(unknown + hints))  # pyright: ignore[reportReturnType]


def _same(a: Any, b: Any) -> bool:
    """Equality that keeps true and 1 apart, and 1 and 1.0 together."""
    if type(a) in (int, float) and type(b) in (int, float):
        return a == b
    return type(a) is type(b) and a == b


_TAGS = ("str", "list[", "function-", "constrained-", "int", "dict[", "nullable", "bool", "literal[")


def _first(error: ValidationError) -> RequestError:
    """The first complaint, in words, with the field as `param` (without pydantic's names of union members)."""
    found = error.errors(include_url=False, include_context=False, include_input=True)
    e = found[0]
    loc = [str(p) for i, p in enumerate(e["loc"]) if i == 0 or not str(p).startswith(_TAGS)]
    param = ".".join(loc)
    if loc[0] == "prompt" and e["type"] != "missing":
        return RequestError(
            "must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
            where="prompt",
            param="prompt",
        )
    if loc[0] in ("stop", "stop_regex"):
        return RequestError("must be a string or a list of strings", where=loc[0], param=loc[0])
    if e["type"] == "missing":
        return RequestError("is required", where=param, param=param)
    message = e["msg"].replace("Input should be", "must be")
    return RequestError(f"{message}, got {_kind(e['input'])}", where=param, param=param)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return str(value) if abs(value) < 1e18 else "a huge number"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    return "a list" if isinstance(value, list) else "an object"
