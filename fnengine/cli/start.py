"""From options to a loaded model and an engine, with what happens on the way told on stderr."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

import tokenizers

from fnengine import memory
from fnengine.cli import drafts, own
from fnengine.config import ModelOptions, Options
from fnengine.engine import Engine
from fnengine.errors import CheckpointError, ConfigError
from fnengine.host.tokenizer import Decoding, Tokenizer
from fnengine.hub import resolve
from fnengine.kernels import describe
from fnengine.load import load
from fnengine.model import Model
from fnengine.reader import Reader


def say(text: str) -> None:
    """Progress and facts go to stderr, so that stdout holds only what was asked for."""
    print(text, file=sys.stderr, flush=True)


def load_model(options: ModelOptions) -> Model:
    """The model that the options name. Raises what `fnengine.load` raises."""
    own.families(options.family)
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    return load(
        options.model,
        dtype=options.dtype,
        device=options.device,
        load_format=options.load_format,
        quantization=options.quantization,
        impl=options.model_impl,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
        cache_dir=options.download_dir,
        progress=sys.stderr.isatty(),
    )


def build_engine(options: Options, model: Model | None = None) -> Engine:
    """An engine for the model that the options name, or for the given one."""
    named = own.strategies(options.serve.strategy)
    processors = own.processors(options.serve.logits_processors)
    if (config := options.serve.speculative_config) is not None:
        drafts.read(config)  # what is wrong with it should not take a model to be known
    model = model or load_model(options.model)
    drafting = drafts.prepare(config, model, options)
    engine = Engine.build(
        model,
        options.engine,
        tokenizer=tokenizer_of(options.model, model),
        names=options.model.served_model_name,
        generation_config=options.model.generation_config,
        speculate=drafting.speculate,
        proposers=drafting.proposers,
        companion=drafting.companion,
        strategies=named,
        processors=processors,
    )
    engine.defaults = {**engine.defaults, **(options.model.override_generation_config or {})}
    return engine


def build_server(options: Options, model: Model | None = None) -> Engine | Reader:
    """What serves the model that the options name: an engine, or a reader of one that reads texts whole.

    Raises:
        ConfigError: flags about what is generated have no meaning for a reader.
    """
    model = model or load_model(options.model)
    if model.spec.whole is None:
        return build_engine(options, model)
    s = options.serve
    for flag, given in (("--strategy", s.strategy), ("--speculative-config", s.speculative_config)):
        if given:
            raise ConfigError(f"{model.name} reads texts whole and writes none", where=flag, remedy="leave it out")
    return Reader.build(
        model, options.engine, tokenizer=tokenizer_of(options.model, model), names=options.model.served_model_name
    )


def tokenizer_of(options: ModelOptions, model: Model) -> Tokenizer:
    """The model's tokenizer, or the one asked for, with the chat template asked for.

    Random weights in a folder without a tokenizer get one in which every id is a word of its own.
    """
    if options.tokenizer is not None:
        tokenizer = Tokenizer.load(resolve(options.tokenizer, cache_dir=options.download_dir, progress=False))
        if tokenizer.vocab_size > model.spec.vocab:
            raise ConfigError(
                f"{tokenizer.vocab_size} ids, but the model knows {model.spec.vocab}",
                where="--tokenizer",
                remedy="give the tokenizer that the model was trained with",
            )
    else:
        try:
            tokenizer = model.tokenizer
        except CheckpointError:
            if options.load_format != "dummy":
                raise
            tokenizer = stand_in(model.spec.vocab)
    if options.chat_template is not None:
        try:
            source = Path(options.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"cannot read {options.chat_template}: {e}", where="--chat-template") from None
        tokenizer = dataclasses.replace(tokenizer, templates={"default": source})
    if options.chat_template_content_format != "auto":
        tokenizer = dataclasses.replace(tokenizer, content_format=options.chat_template_content_format)
    return tokenizer


def stand_in(vocab: int) -> Tokenizer:
    """A tokenizer for measuring: id i is the word ` i`, and every unknown word is id 0."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"\u0120{i}": i for i in range(vocab)}, unk_token="\u01200")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    return Tokenizer(backend, Decoding("byte_level"), frozenset())


def facts_of_reader(reader: Reader) -> list[str]:
    """What a user wants to know of a reader that has just been built, a line each."""
    made = reader.made
    gives = f"embeddings of {reader.width} numbers, pooled by {reader.pooling}"
    if reader.head is not None:
        labels = reader.head.labels
        gives = f"{len(labels)} label{'s' * (len(labels) != 1)}: {', '.join(labels[:8])}" + ", ..." * (len(labels) > 8)
    return [
        f"{reader.name}: texts of up to {made.max_len} tokens ({made.length}), up to {made.rows} texts and "
        f"{made.budget} tokens a batch",
        f"gives {gives}",
        *([] if made.account is None else [f"memory: {memory.sentence(made.account)}"]),
        f"attention: {made.attend.backend.name} ({made.attend.reason})",
        f"layers: {made.execution}",
    ]


def facts(engine: Engine | Reader) -> list[str]:
    """What a user wants to know of an engine that has just been built, a line each."""
    if isinstance(engine, Reader):
        return facts_of_reader(engine)
    built = engine.built
    assert built is not None
    how = engine.drafting.default
    chosen = sorted({(backend, reason) for _, backend, _, reason in describe(built.ops)})
    kernels = "; ".join(f"{backend} ({reason})" for backend, reason in chosen)
    return [
        f"{engine.name}: context {engine.max_len} tokens, up to {built.mode.rows} sequences and "
        f"{built.mode.budget} new tokens a step",
        f"KV pool: {built.pool.blocks} blocks, {built.pool.bytes / 2**20:.0f} MiB ({built.pool.reason})",
        *([] if built.account is None else [f"memory: {memory.sentence(built.account)}"]),
        f"kernels: {kernels}",
        f"steps: {built.execution}",
        *([f"processors: {', '.join(f'{n} ({how})' for n, how in built.own.items())}"] if built.own else []),
        *([f"strategies: {', '.join(engine.strategies)}"] if engine.strategies else []),
        *([] if how is None or not how.k else [f"drafts: {how.method}, up to {how.k} tokens a step"]),
        *([f"beside it: {built.drafts}"] if built.drafts else []),
    ]
