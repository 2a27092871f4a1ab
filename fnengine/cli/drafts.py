"""`--speculative-config`: who drafts for requests that say nothing, and the draft model if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fnengine.build import memory
from fnengine.cli.own import find
from fnengine.config import Options
from fnengine.decoding import mtp
from fnengine.decoding.draft_model import DraftModel, check_pair
from fnengine.decoding.speculate import Proposer
from fnengine.drafting import MAKERS, Maker
from fnengine.errors import ConfigError, RequestError
from fnengine.host.request import Speculate
from fnengine.load import load
from fnengine.model import Model
from fnengine.runtime import Runtime

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
    "kv_cache_memory_bytes": int,
}
"""Key -> type. Those from `model` on are about a draft model."""
OF_MODEL = ("model", "dtype", "quantization", "revision", "kv_cache_memory_bytes")


@dataclass(frozen=True)
class Drafts:
    """What `Engine.build` wants to know of drafts."""

    speculate: Speculate | None = None
    proposers: Mapping[str, Maker] = field(default_factory=dict)
    about: str = ""
    """For people: who drafts; empty where nobody does."""


def read(config: Mapping[str, Any]) -> Speculate:
    """Who drafts, and how many tokens.

    Raises:
        ConfigError: a key is unknown, missing, of the wrong type, or has no meaning beside the others.
    """
    for key, value in config.items():
        if key not in KEYS:
            raise ConfigError(f"{key!r} is not implemented", where=WHERE, remedy=f"the keys are {', '.join(KEYS)}")
        if type(value) is not KEYS[key]:
            raise ConfigError(f"{key} must be a {KEYS[key].__name__}, got {value!r}", where=WHERE)
    method = config.get("method", "draft_model" if "model" in config else None)
    if method is None or (method not in ("ngram", "suffix", "mtp", "draft_model") and ":" not in method):
        got = "method is missing" if method is None else f"no method is called {method!r}"
        raise ConfigError(got, where=WHERE, remedy="ngram, suffix, mtp, draft_model, or module:Class of your own")
    if (method == "draft_model") != ("model" in config):
        what = "needs a model" if method == "draft_model" else f"a model means nothing to {method}"
        raise ConfigError(what, where=WHERE, remedy='{"method": "draft_model", "model": "folder or name"}')
    if extra := [key for key in OF_MODEL if key in config and "model" not in config]:
        raise ConfigError(f"{extra[0]} is about a draft model, and there is none", where=WHERE)
    if config.get("k", config.get("num_speculative_tokens")) != config.get("num_speculative_tokens", config.get("k")):
        raise ConfigError("k and num_speculative_tokens are two names of one number", where=WHERE)
    k = config.get("num_speculative_tokens", config.get("k", Speculate.k))
    try:
        return Speculate(method, k, config.get("adapt", True))
    except RequestError as e:
        raise ConfigError(str(e), where=WHERE) from None


def prepare(config: Mapping[str, Any] | None, target: Model, options: Options) -> Drafts:
    """Drafts as a command line wants them; a draft model is loaded, with a KV pool of its own, or the layer that the
    target's checkpoint ships.

    Raises:
        ConfigError, and what loading raises.
    """
    if config is None:
        return Drafts()
    how = read(config)
    if how.method in MAKERS:
        return Drafts(how, about=f"{how.method}, up to {how.k} tokens")
    if how.method == "mtp":
        uncounted(options, "layers that draft")
        head, about = mtp.load(target), f"the layer that {target.name} ships to draft"
        return Drafts(how, {"mtp": lambda _: head}, f"{about}, up to {how.k} tokens")
    if how.method != "draft_model":
        return Drafts(how, {how.method: maker(how.method)}, f"{how.method}, up to {how.k} tokens")
    draft = _draft_model(config, target, options)
    proposer = DraftModel(draft)
    about = f"draft model {draft.model.name}, up to {how.k} tokens, KV pool of {draft.free_blocks} blocks"
    return Drafts(how, {"draft_model": lambda _: proposer}, about)


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


def uncounted(options: Options, what: str) -> None:
    """Raises ConfigError where a budget was given that does not hold what drafts."""
    if options.engine.memory is not None:
        raise ConfigError(f"--memory does not count {what}", where=WHERE, remedy="give --kv-cache-memory-bytes")


def _draft_model(config: Mapping[str, Any], target: Model, options: Options) -> Runtime:
    settings = options.engine
    uncounted(options, "a draft model")
    draft = load(
        config["model"],
        dtype=config.get("dtype", "auto"),
        quantization=config.get("quantization", "none"),
        revision=config.get("revision"),
        device=str(target.device.type),
        cache_dir=options.model.download_dir,
    )
    try:
        check_pair(target, draft)
    except RequestError as e:
        raise ConfigError(str(e), where=WHERE) from None
    pool = config.get("kv_cache_memory_bytes")
    if pool is None and target.device.type == "cuda":
        # A tenth of what is free: the engine's own pool, which is sized next, takes what is left.
        pool = memory(target.device)[0] // 10
    length = settings.max_model_len
    return Runtime(
        draft,
        enforce_eager=settings.enforce_eager,
        max_num_seqs=settings.max_num_seqs,
        performance_mode=settings.performance_mode,
        max_model_len=None if length is None else min(length, draft.spec.max_len),
        kv_cache_memory_bytes=pool,
        seed=settings.seed,
    )
