"""What a user asks for, as frozen values. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fnengine.errors import RequestError
from fnengine.host.patterns import program
from fnengine.host.repeats import Repetition

if TYPE_CHECKING:
    from fnengine.host.grammar import Grammar
    from fnengine.host.guide import Guide, Reasoning
    from fnengine.host.thinking import Budget

MAX_BIAS = 512
"""Most (token id, bias) entries a row can hold: logit_bias plus what min_tokens forbids."""
MAX_BAD = 512
"""Most tokens of all bad words of a row together."""
MAX_BREAKERS = 32
"""Most sequence breakers of a row."""
MAX_REPEAT = 50
"""Longest repetition that DRY tells from longer ones, and the largest n-gram that can be kept from repeating."""
MAX_ARGUMENTS = 8
"""Most arguments of a processor of the engine's own."""
MAX_WATCHED = 128
"""Most tokens whose log-probabilities a request may want everywhere, as vLLM's."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the defaults change nothing and sample at temperature 1.

    Raises `RequestError` naming the field when a value is out of range.
    """

    temperature: float = 1.0
    """0 means argmax, ties to the lowest id."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 and -1 mean all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches top_p, in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one, in [0, 1]."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the generated text, in [-2, 2]."""
    presence_penalty: float = 0.0
    """Subtracted once if the token occurs in the generated text, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output; > 0."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs, added to the logits; clamped to [-100, 100]."""
    allowed_token_ids: tuple[int, ...] | None = None
    """No other token is chosen; None means all are allowed."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of token ids: the last token of one is not chosen where the tokens before it stand at the end."""
    no_repeat_ngram_size: int = 0
    """No so many tokens in a row come a second time, in prompt and output together; 0 lets them."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the expected one until their probability reaches typical_p, in
    (0, 1]; 1 keeps all."""
    dry_multiplier: float = 0.0
    """A token that would make a repetition of n tokens one longer loses dry_multiplier * dry_base^(n -
    dry_allowed_length), if n is at least that length; 0 turns it off."""
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    """Repetitions are looked for among so many of the last tokens; -1 means all, 0 none."""
    dry_sequence_breakers: tuple[int, ...] = ()
    """Token ids over which no repetition goes on, and which are not penalised."""
    xtc_probability: float = 0.0
    """How often the likeliest tokens are left out: all that have at least xtc_threshold of the probability, except the
    least likely of these."""
    xtc_threshold: float = 0.1
    processors: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """(name, arguments) of functions that the engine was started with; arguments that are not given are 0."""
    seed: int | None = None
    """Any 64-bit integer; None draws one from the engine's root seed at submission."""

    def __post_init__(self):
        def need(ok: bool, name: str, rule: str, got: Any = None):
            if not ok:
                got = getattr(self, name) if got is None else got
                raise RequestError(f"{name} must be {rule}, got {got}", param=name)

        need(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        need(self.top_k >= -1, "top_k", "-1, 0 or a positive integer")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        need(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        need(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        need(0 < self.repetition_penalty < math.inf, "repetition_penalty", "greater than 0")
        need(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        need(len(self.logit_bias) <= MAX_BIAS // 2, "logit_bias", f"at most {MAX_BIAS // 2} entries")
        for _, bias in self.logit_bias:
            need(math.isfinite(bias), "logit_bias", "finite")
        allowed, words, breakers = self.allowed_token_ids, self.bad_words, self.dry_sequence_breakers
        need(allowed is None or len(allowed) > 0, "allowed_token_ids", "at least one id", "none")
        need(all(len(w) > 0 for w in words), "bad_words", "sequences of at least one token", "an empty one")
        n = sum(len(w) for w in words)
        need(n <= MAX_BAD, "bad_words", f"at most {MAX_BAD} tokens together", n)
        size = self.no_repeat_ngram_size
        need(0 <= size <= MAX_REPEAT, "no_repeat_ngram_size", f"between 0 and {MAX_REPEAT}")
        need(0 < self.typical_p <= 1, "typical_p", "in (0, 1]")
        need(0 <= self.dry_multiplier <= 1e6, "dry_multiplier", "between 0 and 1e6")
        need(1 <= self.dry_base <= 100, "dry_base", "between 1 and 100")
        need(1 <= self.dry_allowed_length < 2**31, "dry_allowed_length", "at least 1")
        need(-1 <= self.dry_penalty_last_n < 2**31, "dry_penalty_last_n", "-1, 0 or a positive integer")
        need(len(breakers) <= MAX_BREAKERS, "dry_sequence_breakers", f"at most {MAX_BREAKERS} tokens", len(breakers))
        need(0 <= self.xtc_probability <= 1, "xtc_probability", "in [0, 1]")
        need(0 <= self.xtc_threshold <= 1, "xtc_threshold", "in [0, 1]")
        names = [name for name, _ in self.processors]
        need(len(set(names)) == len(names), "processors", "of different names")
        for name, given in self.processors:
            most, n = MAX_ARGUMENTS, len(given)
            need(n <= most, "processors", f"of at most {most} arguments each", f"{n} for {name[:80]!r}")
            need(all(map(math.isfinite, given)), "processors", f"of finite arguments, for {name[:80]!r}", list(given))


def check_sampling(sampling: Sampling, vocab: int, processors: Sequence[str]) -> None:
    """Raises `RequestError` naming the field that holds a token outside the vocabulary, or a processor that is not one
    of the engine's own."""
    for name, _ in sampling.processors:
        if name not in processors:
            known = ", ".join(processors)
            raise RequestError(
                f"no processor is called {name[:80]!r} here",
                param="processors",
                remedy=f"one of {known}" if known else "start the engine with processors={name: function}",
            )
    fields = {
        "logit_bias": (i for i, _ in sampling.logit_bias),
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "bad_words": (i for word in sampling.bad_words for i in word),
        "dry_sequence_breakers": sampling.dry_sequence_breakers,
    }
    for name, ids in fields.items():
        for i in ids:
            if not 0 <= i < vocab:
                raise RequestError(f"token {i} is outside the vocabulary of {vocab}", param=name)


def check_watched(request: Request, vocab: int) -> None:
    """Raises `RequestError` for tokens to be watched that are too many, none, or watched by nobody."""
    ids, name = request.watched, "logprob_token_ids"
    if ids and request.logprobs is None and request.prompt_logprobs is None:
        raise RequestError("needs logprobs", where=name, param=name)
    if len(ids) > MAX_WATCHED:
        raise RequestError(f"must be at most {MAX_WATCHED} tokens, got {len(ids)}", where=name, param=name)
    for i in ids:
        if not 0 <= i < vocab:
            raise RequestError(f"token {i} is outside the vocabulary of {vocab}", where=name, param=name)


MAX_DRAFT = 16
"""Most tokens of a draft."""


@dataclass(frozen=True)
class Speculate:
    """Guesses of what comes next, verified in the step that computes them: fewer steps, the same tokens."""

    method: str = "ngram"
    """Who guesses: `ngram`, `suffix`, `prediction`, or a name that the engine was started with."""
    k: int = 4
    """Most draft tokens a step; 0 guesses nothing."""
    adapt: bool = True
    """Draft fewer tokens, or none for a while, where measured speed says so."""
    prediction: tuple[int, ...] = ()
    """What the answer is expected to be, for `prediction`."""

    def __post_init__(self):
        if not 0 <= self.k <= MAX_DRAFT:
            raise RequestError(f"draft tokens must be between 0 and {MAX_DRAFT}, got {self.k}", param="speculative")


PLAIN = Sampling()
"""What a row has whose tokens nobody draws. Made once: a new one is checked field by field, for every fork's row."""


@dataclass(frozen=True)
class Stop:
    """When a sequence ends."""

    max_tokens: int | None = None
    """Most tokens to generate; None means the rest of the context."""
    min_tokens: int = 0
    """No end-of-sequence, stop string or stop id ends the text before this many tokens."""
    strings: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    """Regular expressions: the text ends with the first character at which one is matched, see `patterns`."""
    ids: tuple[int, ...] = ()
    """Token ids that end the text, beside the model's end-of-sequence ids."""
    ignore_eos: bool = False
    include_stop: bool = False
    """Keep the matched stop string, or match of a pattern, in the text."""
    repetition: Repetition | None = None
    """What counts as going in circles, which ends the text; None for nothing."""

    def __post_init__(self):
        if self.max_tokens is not None and self.max_tokens < 0:
            raise RequestError(f"max_tokens must be at least 0, got {self.max_tokens}", param="max_tokens")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise RequestError(
                f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}",
                param="min_tokens",
            )
        if any(not s for s in self.strings):
            raise RequestError("stop strings must not be empty", param="stop")
        if self.patterns:
            program(self.strings, self.patterns)


@dataclass(frozen=True)
class Request:
    """One prompt and what to make of it. `n` choices become n rows that share the prompt's full blocks."""

    id: str
    prompt: np.ndarray
    """[n] int32 token ids, at least one."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Stop = field(default_factory=Stop)
    n: int = 1
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of this many most likely ones; None for none at all."""
    prompt_logprobs: int | None = None
    """The same for the prompt's own tokens (skips the prefix cache, so that they are all computed)."""
    watched: tuple[int, ...] = ()
    """Token ids whose log-probabilities come with all of these, likely or not."""
    priority: int = 0
    """Lower is served first; ties in order of arrival."""
    salt: str = ""
    """Sequences share cached blocks only within one salt, and under the same steering."""
    steer: Mapping[str, Any] = field(default_factory=dict)
    """layer -> vector of D numbers that is added to the residual stream after it, for every token. Only layers that the
    engine was started with, `Settings.steer`, such as layers.3."""
    skip_special_tokens: bool = True
    strategy: tuple[str, Mapping[str, Any]] | None = None
    """(name, arguments) of the function that decides what the answer is; None samples token by token."""
    speculate: Speculate | None = None
    """Who guesses what comes next; None leaves it to the engine."""
    grammar: Grammar | None = None
    """What the text must look like; None is any text."""
    reasoning: Reasoning | None = None
    """Of a text that reasons first: the grammar holds it from the end of that on."""
    thinking: Budget | None = None
    """How long the text may reason; None leaves it to the model."""
    guide: Guide | None = None
    """Grammar and budget made ready, by `Engine.prepare`; where it is not there, `Engine.submit` does that first."""
    pooling: str | None = None
    """One of `pooling.POOLINGS`: the answer is no text but the prompt's embedding, and `stop.max_tokens` is 0; or
    `pooling.LABELS`, of a model that has some: what it says of each."""
    pair: int = 0
    """Where in the prompt the second text of a pair begins, for models that are told; 0: it is one text."""
    arrival: float = 0.0
    """Seconds of the engine's clock."""


def fold_in(seed: int, index: int) -> int:
    """The seed of choice `index`: the seed itself for 0, an independent one otherwise.

    Source: splitmix64 finaliser (Steele, Lea, Flood 2014) over seed + index times the golden gamma.
    """
    mask = (1 << 64) - 1
    if index == 0:
        return seed & mask
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
