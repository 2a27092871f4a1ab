"""A parsed command line -> options, each with the origin of its value."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fnengine import environment
from fnengine.cli.flags import FLAGS
from fnengine.errors import ConfigError, RequestError
from fnengine.settings import Settings


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and the text that surrounds it."""

    model: str | None = None
    """Folder or Hugging Face name; None is the bundled model."""
    tokenizer: str | None = None
    served_model_name: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    model_impl: str = "auto"
    trust_remote_code: bool = False
    family: tuple[str, ...] = ()
    """Modules or files with families of the user's own."""
    quantization: str = "none"
    revision: str | None = None
    download_dir: str | None = None
    chat_template: str | None = None
    """Path of a Jinja file."""
    chat_template_content_format: str = "auto"
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] | None = None
    """Sampling defaults that go before the model's."""


@dataclass(frozen=True)
class ServeOptions:
    """Where and how an engine is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    response_role: str = "assistant"
    stream_interval: int = 1
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    enable_auto_tool_choice: bool = True
    logits_processors: tuple[str, ...] = ()
    """module:function of each; requests know it by the function's name."""
    strategy: tuple[str, ...] = ()
    """Names of strategies that requests may ask for, or module:function."""
    speculative_config: Mapping[str, Any] | None = None
    strict: bool = False
    return_tokens_as_token_ids: bool = False
    enable_force_include_usage: bool = False
    metrics_compat: str | None = None
    metrics_open: bool = False
    enable_log_requests: bool = False
    access_log: str | None = None
    profile_dir: str | None = None
    stuck_after: float = 60.0
    uvicorn_log_level: str = "warning"
    request_timeout: float = 0.0
    """Seconds; 0 is no limit."""
    shutdown_timeout: float = 0.0
    api_key: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None


@dataclass(frozen=True)
class Options:
    """Everything a command line says about an engine and its server."""

    model: ModelOptions
    engine: Settings
    serve: ServeOptions
    threads: int
    origins: dict[str, str] = field(default_factory=dict)
    """Flag -> where its value came from; flags that are missing here have their default."""


ALIASES = {"half": "float16", "float": "float32"}
"""vLLM's other names of dtypes."""


DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
DEFAULTS += ("no_repeat_ngram_size", "typical_p")
"""Sampling fields that may have a default of the server's."""


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults that go before the model's.

    Raises:
        ConfigError: one of them is none, or out of range.
    """
    from fnengine.host.request import Sampling

    where, known = "--override-generation-config", (*DEFAULTS, "max_new_tokens")
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{name!r} is no sampling default", where=where, remedy=f"one of {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a number, got {value!r}", where=where)
    most = given.get("max_new_tokens", 1)
    if not isinstance(most, int) or most < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {most}", where=where)
    try:
        Sampling(**{name: value for name, value in given.items() if name in DEFAULTS})
    except RequestError as e:
        raise ConfigError(str(e), where=where) from None
    return dict(given)


def resolve(args: argparse.Namespace) -> Options:
    """The options of a parsed command line; the environment fills what it leaves open.

    Call it before torch is imported: it sets the number of threads.

    Raises:
        ConfigError: values that exclude each other or have no meaning.
    """
    given = vars(args)
    parts: dict[str, dict[str, Any]] = {"model": {}, "engine": {}, "serve": {}}
    origins = {}
    for flag in FLAGS:
        if flag.dest not in given or flag.to == "-":
            continue
        part, _, name = flag.to.partition(".")
        if name:
            value = given[flag.dest]
            parts[part][name] = tuple(_flat(value)) if flag.many else value
        origins[flag.name] = given.get("origins", {}).get(flag.name, "command line")
    name, same = given.get("model"), given.get("model_flag")
    if name is not None and same is not None and name != same:
        raise ConfigError(f"two models are given, {name} and {same}", where="--model", remedy="give one of them")
    model = ModelOptions(model=name if same is None else same, **parts["model"])
    overrides(model.override_generation_config or {})
    if model.dtype in ALIASES:
        model = dataclasses.replace(model, dtype=ALIASES[model.dtype])
    if "api_key" not in parts["serve"] and (keys := environment.api_keys()):
        parts["serve"]["api_key"] = keys
        origins["--api-key"] = "FNENGINE_API_KEY"
    if given.get("disable_log_requests") and given.get("enable_log_requests"):
        raise ConfigError("excludes --enable-log-requests", where="--disable-log-requests", remedy="give one of them")
    if "threads" in given:
        environment.set_threads(given["threads"])
    else:
        origins["--threads"] = environment.threads_origin()
    return Options(
        model, Settings(**parts["engine"]), _checked(ServeOptions(**parts["serve"])), environment.threads(), origins
    )


def _checked(serve: ServeOptions) -> ServeOptions:
    if (serve.ssl_keyfile is None) != (serve.ssl_certfile is None):
        missing = "--ssl-keyfile" if serve.ssl_keyfile is None else "--ssl-certfile"
        raise ConfigError("TLS needs a key and a certificate", where=missing, remedy="give both files")
    if serve.stream_interval < 1:
        raise ConfigError(f"must be at least 1, got {serve.stream_interval}", where="--stream-interval")
    if not 0 <= serve.shutdown_timeout < float("inf"):
        raise ConfigError(f"must be 0 or more, got {serve.shutdown_timeout}", where="--shutdown-timeout")
    if not 0 <= serve.request_timeout < float("inf"):
        raise ConfigError(f"must be 0 or more, got {serve.request_timeout}", where="--request-timeout")
    if not 0 < serve.stuck_after < float("inf"):
        raise ConfigError(f"must be more than 0, got {serve.stuck_after}", where="--stuck-after")
    if "" in serve.api_key:
        raise ConfigError("a key must not be empty", where="--api-key")
    return serve


def _flat(values: list[Any]) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def table(options: Options) -> list[tuple[str, str, str]]:
    """(flag, value, origin) of every option; keys are counted, not shown."""
    rows = [
        ("--model", _shown(options.model.model or "demo"), "default" if options.model.model is None else "command line")
    ]
    for flag in FLAGS:
        if flag.to == "-":
            continue
        part, _, name = flag.to.partition(".")
        value = getattr(getattr(options, part), name) if name else getattr(options, part)
        text = f"{len(value)} set" if name == "api_key" and value else _shown(value)
        rows.append((flag.name, text, options.origins.get(flag.name, "default")))
    return rows


def _shown(value: Any) -> str:
    if value is None or value == () or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return json.dumps(value)
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
