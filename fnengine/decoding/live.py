"""One strategy on its way: what it is run on, the verbs of its context, what became of it.

It lives on the strategies' thread; a `Port` takes what it asks for and what it emits. There are two: the rounds of
`decoding.run`, and the engine's own steps (`fnengine.strategies`).
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from fnengine.decoding.strategy import Context, Strategy
from fnengine.decoding.watch import OWNER, Watch
from fnengine.errors import ContextLengthError, FnError, RequestError, StrategyStalled
from fnengine.host.output import Finish, TokenLogprob
from fnengine.host.request import Sampling, Stop, fold_in
from fnengine.runtime import Runtime
from fnengine.sequence import Sequence, wishes


class Port(Protocol):
    """Whoever runs strategies, as one of them sees it."""

    runtime: Runtime
    watch: Watch
    closing: bool
    """Everything is about to end: nothing more may be asked."""

    @property
    def tokenizer(self) -> Any: ...

    def ask(self, live: Live, ask: Ask) -> None:
        """Takes an ask, whose future will be answered on the strategies' thread."""
        ...

    def withdraw(self, ask: Ask) -> None:
        """Forgets an ask that nobody waits for any more."""
        ...

    def emitted(self, live: Live, part: Emitted) -> None: ...


@dataclass(frozen=True)
class Bounds:
    """How long a strategy may keep to itself."""

    turn: float = 5.0
    """Seconds between two awaits; all other strategies wait so long."""
    idle: float = 60.0
    """Seconds without an `extend`, an `emit` or its end, whatever it awaits."""


@dataclass(frozen=True)
class Job:
    """A strategy with what it is to be run on."""

    strategy: Strategy
    prompt: str | Iterable[int]
    args: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    stop: Stop = field(default_factory=lambda: Stop(max_tokens=16))
    """`max_tokens`, `ids` and `ignore_eos` count; the others are about text, of which a strategy has none."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    tokens: tuple[int, ...]
    """What it emitted, also when it failed later."""
    finish: Finish
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token, if it emitted every token with one."""
    error: BaseException | None = None
    """With finish == "error"."""
    more: tuple[Outcome, ...] = ()
    """Of its other choices, where it gave several."""


class Emitted(NamedTuple):
    """A part of an answer on its way out."""

    index: int
    """Of the job."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    choice: int = 0


@dataclass(eq=False, slots=True)
class Ask:
    """One `extend` that a strategy waits for."""

    pairs: list[tuple[Sequence, Any]]
    single: bool
    want: str | None
    samplings: list[Sampling | None]
    taps: tuple[str, ...]
    likeliest: int
    future: asyncio.Future[Any]

    @property
    def tokens(self) -> int:
        return sum(len(t) for _, t in self.pairs)


def holds_thread(name: str) -> StrategyStalled:
    """The error of strategies on a thread that one of them does not give back."""
    return StrategyStalled(
        f"strategy {name!r} holds the strategies' thread and cannot be interrupted",
        remedy="it waits in native code, or catches every exception; use `asyncio.to_thread` for the first",
    )


def does_nothing(name: str, seconds: float) -> StrategyStalled:
    """The error of a strategy from which nothing has come for so long."""
    return StrategyStalled(
        f"strategy {name!r} has neither extended nor emitted anything for {seconds:g} s",
        remedy="run it with other `Bounds`, if it has reason to wait",
    )


class Live:
    """A job on its way, and the verbs of its context. Used on the strategies' thread."""

    def __init__(self, port: Port, index: int, job: Job, eos: Iterable[int]):
        self.port, self.index, self.job = port, index, job
        self.name = job.strategy.name
        rt = port.runtime
        self.prompt = tuple(port.tokenizer.encode(job.prompt) if isinstance(job.prompt, str) else job.prompt)
        if not self.prompt:
            raise RequestError("the prompt is empty", param="prompt")
        room = rt.max_len - len(self.prompt)
        wanted = room if job.stop.max_tokens is None else job.stop.max_tokens
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(self.prompt)} tokens, the context holds {rt.max_len}, prompt and output together",
                param="prompt",
                remedy="shorten the prompt",
            )
        job.strategy.check(job.args)
        seed = job.sampling.seed
        seed = rt.new_seed() if seed is None else fold_in(seed, 0)
        ends = () if job.stop.ignore_eos else tuple(eos)
        self.context = Context(
            eos=frozenset((*ends, *job.stop.ids)),
            vocab=rt.model.spec.vocab,
            max_tokens=min(wanted, room),
            seed=seed,
            sampling=replace(job.sampling, seed=seed),
            _verbs=self,
        )
        self.tasks: set[asyncio.Task[Any]] = set()
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.others: dict[int, list[int]] = {}
        """Tokens of its other choices."""
        self.asking = 0
        self.last = 0.0
        """When it last asked, emitted or was answered; 0 before it has begun."""
        self.error: BaseException | None = None
        self.stopped = False
        """Somebody has had enough of it."""
        self.done: Outcome | None = None
        self.salt = ""
        """Its sequences share cached blocks only within one salt."""
        self.keep: asyncio.Task[Any] | None = None
        """Its task, which a loop holds weakly."""

    # --- verbs ----------------------------------------------------------------------------------------------------

    def empty(self) -> Sequence:
        return self.port.runtime.nothing(self.salt)

    async def extend(
        self, pairs: list[tuple[Any, Any]], single: bool, logits: Any, sample: Any, taps: Any, likeliest: Any
    ) -> Any:
        if not pairs:
            return []
        ask = self._ask(pairs, single, logits, sample, taps, likeliest)
        del pairs
        self.port.ask(self, ask)
        self.asking += 1
        try:
            return await ask.future
        finally:
            if not ask.future.done() or ask.future.cancelled():
                ask.future.cancel()
                self.port.withdraw(ask)
            else:
                ask.future.exception()  # answered, but cancelled before it heard: not an error that nobody saw
            del ask  # an error's traceback holds this frame, and the future the error: a cycle that keeps sequences
            self.asking -= 1
            self.last = self.port.watch.clock()

    def _ask(
        self, pairs: list[tuple[Any, Any]], single: bool, logits: Any, sample: Any, taps: Any, likeliest: Any
    ) -> Ask:
        """What it asks for, checked as far as that needs no ledger."""
        for seq, _ in pairs:
            if not isinstance(seq, Sequence):
                raise RequestError(f"{seq!r} is no sequence", param="seq", remedy="begin with ctx.empty")
        if len({id(seq.runtime) for seq, _ in pairs}) > 1:
            raise RequestError("one extend is about sequences of one Runtime", param="seq")
        spec = pairs[0][0].runtime.model.spec
        want, samplings, names = wishes(len(pairs), logits, sample, taps, likeliest, spec)
        if self.error is not None:
            raise self.error
        if self.stopped or self.port.closing:
            raise asyncio.CancelledError
        whole = [(s, t if isinstance(t, np.ndarray) else list(t)) for s, t in pairs]
        return Ask(whole, single, want, samplings, names, likeliest, asyncio.get_running_loop().create_future())

    def emit(
        self, tokens: Iterable[int], logprobs: Iterable[float | TokenLogprob] | None = None, choice: int = 0
    ) -> None:
        if choice < 0:
            raise RequestError(f"choice must be at least 0, got {choice}", where=f"strategy {self.name!r}")
        so_far = self.others.setdefault(choice, []) if choice else self.tokens
        ids = [int(t) for t in tokens]
        if bad := [t for t in ids if not 0 <= t < self.context.vocab]:
            raise RequestError(f"token {bad[0]} is outside the vocabulary of {self.context.vocab}", param="tokens")
        if len(so_far) + len(ids) > self.context.max_tokens:
            raise RequestError(
                f"{len(so_far)} and {len(ids)} more tokens were emitted, {self.context.max_tokens} are allowed",
                where=f"strategy {self.name!r}",
                remedy="end at ctx.max_tokens",
            )
        scores = None
        if logprobs is not None:
            scores = tuple(
                p if isinstance(p, TokenLogprob) else TokenLogprob(t, float(p))
                for t, p in zip(ids, logprobs, strict=True)
            )
            self.logprobs += () if choice else scores
        so_far += ids
        self.last = self.port.watch.clock()
        if ids and not self.stopped:
            self.port.emitted(self, Emitted(self.index, tuple(ids), scores, choice))

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self.port.tokenizer.encode(text, add_special=add_special)

    def decode(self, ids: Iterable[int]) -> str:
        return self.port.tokenizer.decode(list(ids))

    # --- its life -------------------------------------------------------------------------------------------------

    async def go(self) -> None:
        """From its first turn to its outcome. Raises nothing."""
        if self.stopped or self.port.closing:
            self.done = Outcome((), "abort")
            return
        inside = copy_context()
        inside.run(OWNER.set, self)
        self.last = self.port.watch.clock()
        coro = self.job.strategy.function(self.context, list(self.prompt), **self.job.args)
        task = asyncio.get_running_loop().create_task(coro, context=inside)
        await asyncio.wait([task])
        while left := [t for t in self.tasks if t is not task]:  # what it left running ends with it
            for other in left:
                other.cancel()
            await asyncio.wait(left)
        reason = None
        if task.cancelled():
            self.stopped = True
        elif (raised := task.exception()) is not None:
            self.error = self.error or raised
        else:
            reason = task.result()
        self.done = self._outcome(reason)

    def _outcome(self, reason: Any) -> Outcome:
        """What became of it, given what its function returned."""
        tokens, limit = tuple(self.tokens), self.context.max_tokens
        scores = tuple(self.logprobs) if tokens and len(self.logprobs) == len(tokens) else None
        if self.error is None and reason not in (None, "stop", "length"):
            what = f"strategy {self.name!r} returned {reason!r}"
            self.error = RequestError(what, remedy="return 'stop', 'length' or None")
        if self.error is not None:
            return Outcome(tokens, "error", scores, bare(self.error))
        if self.stopped:
            return Outcome(tokens, "abort", scores)

        def why(ids: tuple[int, ...]) -> Finish:
            ended = bool(ids) and ids[-1] in self.context.eos
            return reason or ("length" if len(ids) >= limit and not ended else "stop")

        more = [Outcome(ids, why(ids)) for _, ids in sorted((i, tuple(t)) for i, t in self.others.items())]
        return Outcome(tokens, why(tokens), scores, more=tuple(more))

    def condemn(self, error: BaseException) -> None:
        """Ends it with this error."""
        self.error = self.error or error
        for task in list(self.tasks):
            task.cancel()

    def abort(self) -> None:
        """Ends it because nobody wants more of it."""
        self.stopped = True
        for task in list(self.tasks):
            task.cancel()


def answered(error: Exception) -> Exception:
    """The error for who asked, without its traceback: frames point to those that called them, and so to every ask of
    the round. Of an error that nobody expected the traceback becomes a note."""
    at: BaseException | None = error
    while at is not None:
        if not isinstance(at, FnError) and at.__traceback__ is not None:
            at.add_note("in the step:\n" + "".join(traceback.format_tb(at.__traceback__)))
        at.__traceback__ = None
        at = at.__cause__ or at.__context__
        if at is error:
            break
    return error


def bare(error: BaseException) -> BaseException:
    """The error with its places and without their values: frames that are kept would keep sequences alive."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        traceback.clear_frames(at.__traceback__)
        if at.__traceback__ is not None:
            at.__traceback__ = at.__traceback__.tb_next  # the frame that is still at work
        at = at.__cause__ or at.__context__
    return error
