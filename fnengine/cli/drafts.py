"""`--speculative-config`: who drafts for requests that say nothing, and the draft model or head if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fnengine import hub
from fnengine.cli.own import find
from fnengine.companions import Beside, SecondModel, check_pair
from fnengine.config import Options
from fnengine.decoding import eagle, mtp
from fnengine.decoding.speculate import Proposer
from fnengine.drafting import MAKERS, Maker
from fnengine.errors import ConfigError, RequestError
from fnengine.host.request import Speculate
from fnengine.load import load
from fnengine.model import Model

WHERE = "--speculative-config"
KEYS = {
    "method": str,
    "num_speculative_tokens": int,
    "k": int,
    "adapt": bool,
    "model": str,
    "dtype": str,
    "quantization": str,
    "revision": str,
}
"""Key -> type. Those from `model` on are about a draft model; a head has a `model`, too, and a `revision`."""
OF_MODEL = ("model", "dtype", "quantization", "revision")
BESIDE = {"draft_model": OF_MODEL, "eagle": ("model", "revision"), "mtp": ()}
"""Method -> its own keys, of what is loaded beside the model and drafts for many sequences at once; `mtp` is in the
model's own checkpoint."""


@dataclass(frozen=True)
class Drafts:
    """What `Engine.build` wants to know of drafts."""

    speculate: Speculate | None = None
    proposers: Mapping[str, Maker] = field(default_factory=dict)
    companion: Beside | None = None
    about: str = ""
    """For people: who drafts; empty where nobody does."""


def read(config: Mapping[str, Any]) -> Speculate:
    """Who drafts, and how many tokens.

    Raises:
        ConfigError: a key is unknown, missing, of the wrong type, or has no meaning beside the others.
    """
    for key, value in config.items():
        if key == "kv_cache_memory_bytes":
            what = "KV of drafts lies in the engine's own pool"
            raise ConfigError(what, where=WHERE, remedy="--kv-cache-memory-bytes sizes both together")
        if key not in KEYS:
            raise ConfigError(f"{key!r} is not implemented", where=WHERE, remedy=f"the keys are {', '.join(KEYS)}")
        if type(value) is not KEYS[key]:
            raise ConfigError(f"{key} must be a {KEYS[key].__name__}, got {value!r}", where=WHERE)
    method = config.get("method", "draft_model" if "model" in config else None)
    method = "eagle" if method == "eagle3" else method  # another engine's name of it
    if method is None or (method not in ("ngram", "suffix", *BESIDE) and ":" not in method):
        got = "method is missing" if method is None else f"no method is called {method!r}"
        raise ConfigError(
            got, where=WHERE, remedy="ngram, suffix, mtp, draft_model, eagle, or module:Class of your own"
        )
    if bool(BESIDE.get(method)) != ("model" in config):
        what = f"{method} needs a model" if BESIDE.get(method) else f"a model means nothing to {method}"
        raise ConfigError(what, where=WHERE, remedy='{"method": "draft_model", "model": "folder or name"}')
    if extra := [key for key in OF_MODEL if key in config and key not in BESIDE.get(method, ())]:
        raise ConfigError(f"{extra[0]} is about a draft model, and there is none", where=WHERE)
    if config.get("k", config.get("num_speculative_tokens")) != config.get("num_speculative_tokens", config.get("k")):
        raise ConfigError("k and num_speculative_tokens are two names of one number", where=WHERE)
    k = config.get("num_speculative_tokens", config.get("k", Speculate.k))
    try:
        return Speculate(method, k, config.get("adapt", True))
    except RequestError as e:
        raise ConfigError(str(e), where=WHERE) from None


def prepare(config: Mapping[str, Any] | None, target: Model, options: Options) -> Drafts:
    """Drafts as a command line wants them; a draft model or head is loaded.

    Raises:
        ConfigError, and what loading raises.
    """
    if config is None:
        return Drafts()
    how = read(config)
    if how.method in MAKERS:
        return Drafts(how, about=f"{how.method}, up to {how.k} tokens")
    if how.method not in BESIDE:
        return Drafts(how, {how.method: maker(how.method)}, about=f"{how.method}, up to {how.k} tokens")
    beside = _beside(how.method, config, target, options)
    return Drafts(how, companion=beside, about=f"{beside.name}, up to {how.k} tokens")


def maker(spec: str) -> Maker:
    """Makes a proposer of one's own for each sequence; an object that is one already serves all of them."""
    found = find(spec, WHERE, "my_proposers:Mine")
    if isinstance(found, type):
        try:
            made: Any = found()
        except Exception as e:
            raise ConfigError(f"{spec}() raises {type(e).__name__}: {e}", where=WHERE) from e
        if isinstance(made, Proposer):
            return lambda _: found()
    elif isinstance(found, Proposer):
        return lambda _: found
    raise ConfigError(f"{spec} is no proposer", where=WHERE, remedy="it needs start, propose and advance")


def _beside(method: str, config: Mapping[str, Any], target: Model, options: Options) -> Beside:
    if method == "mtp":
        return mtp.load(target)
    name, revision, cache = config["model"], config.get("revision"), options.model.download_dir
    if method == "eagle":
        return eagle.load(hub.resolve(name, revision, cache), target)
    draft = load(
        name,
        dtype=config.get("dtype", "auto"),
        quantization=config.get("quantization", "none"),
        revision=revision,
        device=str(target.device),
        cache_dir=cache,
    )
    try:
        check_pair(target, draft)
    except ConfigError as e:
        raise ConfigError(str(e), where=WHERE) from None
    return SecondModel(draft)
