"""What a decoding strategy is: an async function of a context and a prompt, made one by `@strategy`.

    @fnengine.strategy
    async def greedy(ctx, prompt):
        seq, new = ctx.empty, prompt
        for _ in range(ctx.max_tokens):
            seq, logits = await ctx.extend(seq, new)
            new = [int(logits.argmax())]
            ctx.emit(new)
            if new[0] in ctx.eos:
                return "stop"

It says what the answer is with `ctx.emit`, and may return why it ended (`stop` or `length`; None: found out from what
was emitted). Who runs it is none of its business: `decoding.run` does so over a `Runtime`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fnengine.errors import ConfigError, RequestError
from fnengine.host.output import TokenLogprob
from fnengine.host.request import Sampling

Ending = Literal["stop", "length"] | None
"""Why a strategy ended, as it says itself."""


class Verbs(Protocol):
    """What a context asks of whoever runs its strategy."""

    def empty(self) -> Any: ...
    def extend(
        self, pairs: list[tuple[Any, Any]], single: bool, logits: Any, sample: Any, taps: Any, likeliest: Any
    ) -> Awaitable[Any]: ...
    def emit(self, tokens: Iterable[int], logprobs: Iterable[float | TokenLogprob] | None, choice: int) -> None: ...
    def encode(self, text: str, add_special: bool) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True, eq=False)
class Context:
    """What a strategy is given beside its prompt: the request's own facts, and the verbs."""

    eos: frozenset[int]
    """Ids that end the text: the model's and those of the request; none of the model's with `ignore_eos`."""
    vocab: int
    """V"""
    max_tokens: int
    """Most tokens that may be emitted."""
    seed: int
    """64 bits, the request's own or one made for it. `fold_in(seed, i)` makes seeds for choices."""
    sampling: Sampling
    """The request's own, with `seed` in it."""
    _verbs: Verbs = field(repr=False)

    @property
    def empty(self) -> Any:
        """The sequence of no tokens."""
        return self._verbs.empty()

    async def extend(
        self,
        seq: Any,
        tokens: Any = None,
        *,
        logits: Literal["last", "all", "default"] | None = "default",
        sample: Sampling | list[Sampling] | None = None,
        taps: Iterable[str] = (),
        likeliest: int = 0,
    ) -> Any:
        """What `Runtime.extend` gives for the same arguments, computed together with what other strategies wait for.

        A sequence of another `Runtime` is extended there (a second model).
        """
        single = tokens is not None
        pairs = [(seq, tokens)] if single else [(s, t) for s, t in seq]
        return await self._verbs.extend(pairs, single, logits, sample, taps, likeliest)

    def emit(
        self, tokens: Iterable[int], logprobs: Iterable[float | TokenLogprob] | None = None, choice: int = 0
    ) -> None:
        """Adds tokens to the answer, with their log-probabilities if those are to be shown; they are streamed.

        Args:
            choice: which of the answers, of a strategy that gives several.

        Raises:
            RequestError: more than `max_tokens` in all, or no tokens of the vocabulary.
        """
        self._verbs.emit(tokens, logprobs, choice)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special` puts BOS before it where the model wants one."""
        return self._verbs.encode(text, add_special)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._verbs.decode(ids)

    def ids(self, prompt: str | Iterable[int], add_special: bool = True) -> tuple[int, ...]:
        """Token ids of what is text or token ids already: for arguments of strategies."""
        return tuple(self.encode(prompt, add_special) if isinstance(prompt, str) else prompt)


@dataclass(frozen=True, eq=False)
class Strategy:
    """A named strategy. Called like its function, so that strategies can be made of strategies."""

    name: str
    function: Callable[..., Coroutine[Any, Any, Ending]]
    choices: str | None = None
    """The argument that says how many choices of a request one run gives; None: each choice is a run of its own."""

    def __call__(self, ctx: Context, prompt: Iterable[int], **args: Any) -> Coroutine[Any, Any, Ending]:
        return self.function(ctx, prompt, **args)

    def check(self, args: Mapping[str, Any]) -> None:
        """Nothing, for arguments that it takes.

        Raises:
            RequestError: one is unknown or missing.
        """
        known = inspect.signature(self.function)
        try:
            known.bind(None, None, **args)
        except TypeError as e:
            names = [p for p in known.parameters][2:]
            raise RequestError(
                f"strategy {self.name!r}: {e}",
                param="strategy.args",
                remedy=f"its arguments are {', '.join(names)}" if names else "it takes no arguments",
            ) from None


def strategy(function: Callable[..., Coroutine[Any, Any, Any]], choices: str | None = None) -> Strategy:
    """The strategy that an `async def name(ctx, prompt, **args)` is.

    Args:
        choices: its argument for how many answers it gives, if it can give several.

    Raises:
        ConfigError: it is no such function.
    """
    name = getattr(function, "__name__", repr(function))
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"{name} is not an async function", where="@strategy", remedy="write `async def`")
    try:
        inspect.signature(function).bind_partial(None, None)
    except TypeError:
        raise ConfigError(
            f"{name} does not take a context and a prompt", where="@strategy", remedy=f"write {name}(ctx, prompt, ...)"
        ) from None
    return Strategy(name, function, choices)
