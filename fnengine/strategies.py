"""Strategies among an engine's requests: each `ctx.extend` becomes rows of the engine's own steps.

    strategies' thread    a: extend ->        b: emit ->          a goes on ->
    engine's thread       | hear | plan | step (a, b's rows, ordinary rows) | commit, answer | hear | ...

The two threads hand each other messages and share two things: the ledger, under one lock, because `seq[:n]` of a
strategy holds blocks while the engine plans; and sequences, which are values. After answers the engine waits for the
strategies to have thought, at most `PAUSE` of a step, so that they meet in one step and not in two halves.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fnengine.decoding.beam import beam
from fnengine.decoding.live import (
    Ask,
    Bounds,
    Emitted,
    Job,
    Live,
    Outcome,
    answered,
    does_nothing,
    holds_thread,
)
from fnengine.decoding.rounds import Selector, answer
from fnengine.decoding.strategy import Strategy
from fnengine.decoding.watch import Watch
from fnengine.errors import DeviceFault, FnError, OutOfBlocks, RequestError
from fnengine.host import plan as planning
from fnengine.host.commit import Event
from fnengine.host.output import Delta, TokenLogprob, Usage
from fnengine.host.plan import Host, Policy, Run
from fnengine.host.request import Request, Speculate, Stop, check_sampling, fold_in
from fnengine.host.text import Piece, TextStream
from fnengine.host.thinking import Budget
from fnengine.kernels import team
from fnengine.runtime import Runtime
from fnengine.sequence import Likeliest, Sequence, Tokens

if TYPE_CHECKING:
    from fnengine.host.grammar import Grammar

PAUSE, LONGEST_PAUSE = 0.1, 0.005
"""Share of the last step's time, and seconds, that a step waits at most for strategies that were just answered."""


ALWAYS: Mapping[str, Strategy] = {"use_beam_search": beam}
"""Strategies of this program that fields of requests stand for, by that field."""


class Audience(Protocol):
    """Whoever runs a strategy for somebody."""

    def emitted(self, part: Emitted) -> bool:
        """Takes a part of the answer; true when no more of it is wanted."""
        ...

    def ended(self, outcome: Outcome) -> None: ...

    def looked_up(self, cached: int) -> None:
        """Told once how many tokens the prefix cache had of the first text that the strategy computed from nothing."""
        ...


def refuse_beside(
    *,
    n: int,
    stop: Stop | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    watched: Iterable[int] = (),
    steer: Mapping[str, Any] | None,
    grammar: Grammar | None,
    speculate: Speculate | None,
    thinking: Budget | None = None,
    drafts: str = "speculate",
) -> None:
    """Raises `RequestError` for what nobody may ask of a strategy, which decides about it itself. The only list.

    Args:
        drafts: what whoever asks knows `speculate` as.
    """
    asked = {
        "logprobs": logprobs is not None,
        "prompt_logprobs": prompt_logprobs is not None,
        "logprob_token_ids": bool(tuple(watched)),
        "min_tokens": stop is not None and stop.min_tokens > 0,
        "prediction": speculate is not None and bool(speculate.prediction),
        drafts: speculate is not None and speculate.k > 0,
        "steer": bool(steer),
        "thinking_token_budget": thinking is not None,
        "grammar" if grammar is None else grammar.field: grammar is not None,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        raise RequestError(f"{name} cannot be asked of a strategy", param=name, remedy="leave it out")
    if n < 1:
        raise RequestError(f"n must be at least 1, got {n}", param="n")


def named(request: Request, known: Mapping[str, Strategy] | None, policy: Policy) -> Strategy:
    """The strategy that a request names, which takes the arguments that the request has for it.

    Args:
        known: those that were enabled; None where none can be run.

    Raises:
        RequestError: there is none of that name here, or the request asks for what no strategy gives.
    """
    assert request.strategy is not None
    name, args = request.strategy
    if known is not None and name in ALWAYS:
        known = ALWAYS
    known = known or {}
    if name not in known:
        raise RequestError(
            f"no strategy is called {name[:80]!r} here",
            param="strategy",
            remedy=f"one of {', '.join(known)}" if known else "--strategy enables some",
        )
    refuse_beside(
        n=request.n,
        stop=request.stop,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        watched=request.watched,
        steer=request.steer,
        grammar=request.grammar,
        speculate=request.speculate,
        thinking=request.thinking,
        drafts="speculative",
    )
    check_sampling(request.sampling, policy.vocab, policy.processors)
    known[name].check(args)
    return known[name]


@dataclass(eq=False)
class Answer:
    """One choice of an answer that a strategy gives, as deltas of text.

    Args:
        prompt: its tokens.
        ends: ids whose text is not shown.
        sink: takes each delta.
    """

    index: int
    text: TextStream
    prompt: int
    stop: Stop
    ends: frozenset[int]
    sink: Callable[[Delta], None]
    on_end: Callable[[Delta], None] = lambda _delta: None
    """Told after the sink that this was the last."""
    cached: int = 0
    made: int = 0
    """Tokens given so far."""
    found: str | None = None
    """The stop string that ended it."""
    last: int = -1

    def emitted(self, part: Emitted) -> bool:
        """Takes tokens, of the first choice only; true when a stop string has ended the text."""
        if part.choice:
            return False
        piece, scores = Piece(), part.logprobs or [None] * len(part.tokens)
        for token, score in zip(part.tokens, scores, strict=True):
            piece += self.text.push(token, score, silent=token in self.ends)
            self.last = token
            if piece.stop is not None:
                self.found = piece.stop
                break
        if piece.tokens or piece.text:
            self.made += len(piece.tokens)
            self.sink(Delta(self.index, piece.text, piece.tokens, _scores(piece)))
        return self.found is not None

    def looked_up(self, cached: int) -> None:
        self.cached = cached

    def ended(self, outcome: Outcome) -> None:
        """Gives the text that still waited, and why it ended."""
        piece = Piece() if self.found is not None else self.text.finish()
        found = self.found or piece.stop
        reason: str | int | None = found
        if found is None and outcome.finish == "stop" and self.last in self.stop.ids:
            reason = self.last
        self.made += len(piece.tokens)
        error = None
        if outcome.error is not None:
            known = isinstance(outcome.error, FnError)
            error = str(outcome.error) if known else f"{type(outcome.error).__name__}: {outcome.error}"
        delta = Delta(
            index=self.index,
            text=piece.text,
            tokens=piece.tokens,
            logprobs=_scores(piece),
            finish="stop" if found is not None else outcome.finish,
            stop_reason=reason,
            error=error,
            usage=Usage(prompt=self.prompt, cached=min(self.cached, self.prompt), completion=self.made),
        )
        self.sink(delta)
        self.on_end(delta)


@dataclass(eq=False)
class Answers:
    """All choices of an answer, given by one strategy."""

    each: tuple[Answer, ...]

    def emitted(self, part: Emitted) -> bool:
        """Takes tokens of one choice; true when stop strings have ended all of them."""
        if part.choice < len(self.each) and self.each[part.choice].found is None:
            self.each[part.choice].emitted(part._replace(choice=0))
        return all(a.found is not None for a in self.each)

    def looked_up(self, cached: int) -> None:
        for choice in self.each:
            choice.looked_up(cached)

    def ended(self, outcome: Outcome) -> None:
        """Ends each choice for its own reason; one that nothing was said of for that of the first."""
        own = (outcome, *outcome.more)
        for i, choice in enumerate(self.each):
            choice.ended(own[i] if i < len(own) else replace(outcome, more=()))


def _scores(piece: Piece) -> tuple[TokenLogprob, ...] | None:
    """Log-probabilities beside the piece's tokens, if there are any."""
    return piece.logprobs if piece.tokens and None not in piece.logprobs else None


def _ended(run: Run, on_end: Callable[[Run], None], delta: Delta) -> None:
    """Notes on a stand-in what became of its choice, and tells of it."""
    assert delta.finish is not None and delta.usage is not None
    run.status, run.finish, run.known = "ended", delta.finish, run.prompt_len + delta.usage.completion
    on_end(run)


def _told(replies: list[tuple[Ask, Any]]) -> None:
    """Answers asks, on the strategies' thread."""
    for ask, given in replies:
        if ask.future.done():
            continue
        if isinstance(given, BaseException):
            ask.future.set_exception(given)
        else:
            ask.future.set_result(given)


@dataclass(eq=False, slots=True)
class _Guest:
    """A strategy that runs, as the engine's thread knows it."""

    live: Live
    audience: Audience
    priority: int
    arrival: float
    asking: int = 0
    looked: bool = False
    """Whether its audience was told of the prefix cache."""


@dataclass(eq=False, slots=True)
class _Extend:
    """An ask whose pairs are runs now."""

    guest: _Guest
    ask: Ask
    runs: list[Run]
    buffers: list[Tokens]
    open: int
    results: list[Any] = field(default_factory=list)


class Strategies:
    """The strategies of one engine. Everything but `_work` and below, and the port, is called on the engine's thread.

    Args:
        runtime: over the engine's own pool and ledger.
        host: the engine's scheduler.
        books: held while the ledger changes.
        wake: tells the engine's thread that there is something to hear; called on the strategies'.
    """

    def __init__(
        self,
        runtime: Runtime,
        host: Host,
        tokenizer: Any,
        *,
        eos: Iterable[int],
        books: threading.RLock,
        wake: Callable[[], None],
        bounds: Bounds | None = None,
    ):
        self.runtime, self.host, self._tokenizer, self.eos = runtime, host, tokenizer, tuple(eos)
        self.books, self.wake, self.bounds = books, wake, bounds or Bounds()
        self.closing = False
        self.guests: dict[Live, _Guest] = {}
        self._extends: dict[Run, tuple[_Extend, int]] = {}
        self._inbox: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self._name = f"strategy-{secrets.token_hex(8)}"
        """Begins the ids of extensions, which no client's id may be taken for."""
        self._numbers = itertools.count()
        self._looked = 0.0
        self._begin()

    def _begin(self) -> None:
        """A thread for strategies to come; another one, if the last was lost."""
        self.watch = Watch(self.bounds.turn, time.monotonic)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._replies: list[tuple[Ask, Any]] = []
        """Of asks that have been answered and not told yet: they are told when the engine turns to strategies again."""
        self._sent = self._seen = self._rested = 0
        self._quiet = threading.Condition()

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    # --- the engine's thread: strategies come and go -----------------------------------------------------------------

    def start(self, index: int, job: Job, audience: Audience, *, priority: int, arrival: float, salt: str = "") -> Live:
        """A strategy on its way; what it gives goes to the audience.

        Raises:
            RequestError, ContextLengthError: it cannot be run as it is.
        """
        live = Live(self, index, job, self.eos)
        live.salt = salt
        self.guests[live] = _Guest(live, audience, priority, arrival)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fnengine strategies", daemon=True)
            self._loop = asyncio.SelectorEventLoop(Selector(self._rest))  # pyright: ignore[reportArgumentType]
            self._thread.start()
        self._send(self._adopt, live)
        return live

    def serve(
        self,
        request: Request,
        strategy: Strategy,
        text: Callable[[Request], TextStream],
        sink: Callable[[Delta], None],
        on_end: Callable[[Run], None],
    ) -> tuple[tuple[Run, ...], list[Any]]:
        """(stand-ins, strategies on their way): one of each for every choice of a request.

        Args:
            sink: takes each choice's deltas.
            on_end: told of a choice's stand-in after its last delta.
        """
        assert request.strategy is not None
        stop, sampling = request.stop, request.sampling
        ends = frozenset((*stop.ids, *(() if stop.ignore_eos else self.eos)))
        root = self.host.new_seed() if sampling.seed is None else sampling.seed
        seeds = [fold_in(root, i) for i in range(request.n)]
        runs = tuple(planning.stand_in(self.host, request, i, seed) for i, seed in enumerate(seeds))
        prompt, args = runs[0].tokens.tolist(), request.strategy[1]
        answers = [
            Answer(i, text(request), len(prompt), stop, ends, sink, functools.partial(_ended, run, on_end))
            for i, run in enumerate(runs)
        ]
        audiences: Iterable[Audience] = answers
        if strategy.choices is not None:
            audiences, args = [Answers(tuple(answers))], {**args, strategy.choices: request.n}
        ways: list[Live] = []
        try:
            for i, audience in enumerate(audiences):
                job = Job(strategy, prompt, args, replace(sampling, seed=seeds[i]), stop)
                ways.append(
                    self.start(i, job, audience, priority=request.priority, arrival=request.arrival, salt=request.salt)
                )
        except BaseException:
            for way in ways:
                self.stop(way)
            raise
        return runs, ways

    def stop(self, live: Live) -> None:
        """Ends a strategy that nobody wants more of; its audience hears no more."""
        guest = self.guests.pop(live, None)
        if guest is None:
            return
        for extend in {id(e): e for e, _ in self._extends.values() if e.guest is guest}.values():
            self._give_up(extend)
        self._send(live.abort)

    def close(self) -> None:
        """Ends all of them, at once."""
        self.closing = True
        for live in list(self.guests):
            self.stop(live)
        if self._loop is not None and not self._loop.is_closed():
            self._send(self._loop.stop)

    @property
    def thinking(self) -> bool:
        """Whether some strategy runs that does not wait for a step."""
        return any(not g.asking for g in self.guests.values())

    def hear(self, step_seconds: float = 0.0) -> None:
        """Takes in what strategies ask, emit and return.

        Args:
            step_seconds: of the last step; if strategies were answered after it, they get a share of that to think.
        """
        if self._replies:
            self._hand_over()
            self._wait(min(step_seconds * PAUSE, LONGEST_PAUSE))
        self._look()
        while True:
            try:
                what, who, value = self._inbox.get_nowait()
            except queue.Empty:
                break
            with self.books:
                getattr(self, f"_on_{what}")(who, value)
        self._hand_over()

    def waits(self) -> bool:
        """Whether there is something to hear."""
        return not self._inbox.empty()

    def wait(self, timeout: float) -> None:
        """Waits for something to hear."""
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            self._look()
            return
        with self.books:
            getattr(self, f"_on_{message[0]}")(*message[1:])
        self._hand_over()

    def _wait(self, timeout: float) -> None:
        with self._quiet:
            self._quiet.wait_for(lambda: self._rested >= self._sent, timeout)

    # --- the engine's thread: asks -----------------------------------------------------------------------------------

    def _on_ask(self, live: Live, ask: Ask) -> None:
        guest = self.guests.get(live)
        if guest is None or ask.future.done():
            return
        guest.asking += 1
        try:
            if ask.pairs[0][0].runtime is not self.runtime:  # a second model: a step of its own, now
                (given,) = answer([ask])
                self._reply(guest, ask, given)
                return
            self._extend(guest, ask)
        except Exception as e:
            self._reply(guest, ask, answered(e))

    def _extend(self, guest: _Guest, ask: Ask) -> None:
        """Makes runs of an ask's pairs."""
        rt, ledger, vocab = self.runtime, self.host.ledger, self.runtime.model.spec.vocab
        arrays = [rt.checked(seq, tokens) for seq, tokens in ask.pairs]
        for sampling in ask.samplings:
            if sampling is not None:
                check_sampling(sampling, vocab, self.host.policy.processors)
        rt.affordable(sum(map(len, arrays)), ask.want, ask.taps)  # pyright: ignore[reportArgumentType]
        extend = _Extend(guest, ask, [], [], len(arrays))
        number = next(self._numbers)
        for i, ((seq, _), array, sampling) in enumerate(zip(ask.pairs, arrays, ask.samplings, strict=True)):
            buffer = seq._buffer.extend(len(seq), array)
            n = len(seq) + len(array)
            seed = 0
            if sampling is not None:
                seed = self.host.new_seed() if sampling.seed is None else sampling.seed
            run = planning.extend(
                self.host,
                f"{self._name}-{number}-{i}",
                ledger.share(seq._path),
                buffer.data[:n],
                prompt_len=seq._prompt_len or len(array),
                sampling=sampling,
                seed=seed,
                wish=ask.want,  # pyright: ignore[reportArgumentType]
                taps=ask.taps,
                likeliest=ask.likeliest,
                priority=guest.priority,
                arrival=guest.arrival,
            )
            extend.runs.append(run)
            extend.buffers.append(buffer)
            self._extends[run] = extend, i
        extend.results = [None] * extend.open

    def _on_withdraw(self, live: Live, ask: Ask) -> None:
        for extend in [e for e, i in self._extends.values() if e.ask is ask and i == 0]:
            self._give_up(extend)
            extend.guest.asking -= 1

    def landed(self, event: Event) -> None:
        """Takes what came of an extension; the ask is answered when that was its last."""
        found = self._extends.pop(event.run, None)
        run, rt = event.run, self.runtime
        if found is None:  # given up in the meantime
            if event.path is not None:
                self.host.ledger.free(event.path)
            return
        assert run.base is not None
        extend, i = found
        if not run.base.length and not extend.guest.looked:
            extend.guest.looked = True
            extend.guest.audience.looked_up(run.cached)
        self.host.ledger.free(run.base)
        if event.finish == "error":
            self._fail(extend, DeviceFault(event.error or "the step failed"))
            return
        assert event.path is not None
        seq = Sequence(rt, event.path, extend.buffers[i], run.prompt_len, run.known)
        told: list[Any] = list(event.tokens)
        if run.wish is not None:
            told.append(torch.cat(run.logits) if run.wish == "all" else run.logits[-1][0])
        if run.found is not None:
            told.append(Likeliest(*run.found))
        if run.taps:
            joined = map(torch.cat, zip(*run.inside, strict=True))
            told.append(dict(zip(run.taps, joined, strict=True)))
        extend.results[i] = (seq, *(told or [None]))
        extend.open -= 1
        if not extend.open:
            self._reply(extend.guest, extend.ask, extend.results[0] if extend.ask.single else extend.results)

    def unstick(self) -> bool:
        """Fails the newest ask when nobody else can go on: callers hold all blocks. False when there is none."""
        if not self._extends:
            return False
        gc.collect()  # sequences in reference cycles hold blocks that nobody can use
        if self.runtime.drain():
            return True
        run = max(self._extends, key=lambda r: r.key)
        ledger = self.host.ledger
        need = -(-(run.known - run.path.length) // ledger.block)
        self._fail(self._extends[run][0], OutOfBlocks(need, ledger.available, ledger.held))
        return True

    def _fail(self, extend: _Extend, error: Exception) -> None:
        self._give_up(extend)
        self._reply(extend.guest, extend.ask, answered(error))

    def _give_up(self, extend: _Extend) -> None:
        """Ends the runs of an ask that are still open; what came of the others is let go with their sequences."""
        for run in extend.runs:
            if self._extends.pop(run, None) is not None:
                planning.abort(self.host, run.request.id)
                assert run.base is not None
                self.host.ledger.free(run.base)
        extend.results = []

    def _reply(self, guest: _Guest, ask: Ask, given: Any) -> None:
        guest.asking -= 1
        self._replies.append((ask, given))

    def _hand_over(self) -> None:
        """Gives the strategies what they were waiting for, all of it at once: each call wakes their thread, which then
        wants the interpreter while this one has more to say."""
        if self._replies:
            replies, self._replies = self._replies, []
            self._send(_told, replies)

    # --- the engine's thread: answers, ends, stalls ------------------------------------------------------------------

    def _on_emitted(self, live: Live, part: Emitted) -> None:
        guest = self.guests.get(live)
        if guest is not None and guest.audience.emitted(part):
            self.stop(live)
            guest.audience.ended(Outcome((), "abort"))

    def _on_done(self, live: Live, outcome: Outcome) -> None:
        guest = self.guests.pop(live, None)
        if guest is not None:
            guest.audience.ended(outcome)

    def _look(self) -> None:
        """Stops turns that are too long, and strategies that do nothing; gives up a thread that cannot be stopped."""
        now = self.watch.clock()
        if now - self._looked < self.bounds.turn / 4:
            return
        self._looked = now
        if (lost := self.watch.look()) is not None:
            error = holds_thread(lost.owner.name)
            guests, self.guests = self.guests, {}
            for extend in {id(e): e for e, _ in self._extends.values()}.values():
                self._give_up(extend)
            self._begin()
            for live, guest in guests.items():
                live.error = error  # should its thread ever come back
                guest.audience.ended(Outcome(tuple(live.tokens), "error", None, error))
            return
        for live, guest in self.guests.items():
            if live.last and not guest.asking and not live.asking and now - live.last > self.bounds.idle:
                error = does_nothing(live.name, self.bounds.idle)
                self._send(live.condemn, error)

    def _send(self, function: Callable[..., Any], *args: Any) -> None:
        """Has the strategies' thread call a function."""
        self._sent += 1
        loop = self._loop

        def call() -> None:
            self._seen += 1
            function(*args)

        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(call)

    # --- the strategies' thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        loop, watch = self._loop, self.watch
        assert loop is not None
        watch.thread = threading.get_ident()
        team.alone()
        asyncio.set_event_loop(loop)
        loop.set_task_factory(watch.task)
        self._gate = asyncio.Semaphore(self.runtime.rows)
        try:
            loop.run_forever()
            if left := asyncio.all_tasks(loop):  # told to end, and given a second for it
                loop.run_until_complete(asyncio.wait(left, timeout=1.0))
        finally:
            loop.close()

    def _adopt(self, live: Live) -> None:
        assert self._loop is not None
        task = self._loop.create_task(self._go(live))
        live.keep = task  # a loop holds its tasks weakly

    async def _go(self, live: Live) -> None:
        async with self._gate:
            await live.go()
        self._tell("done", live, live.done)

    def _rest(self, busy: bool) -> bool:
        """Notes that everybody waits, when the loop is about to sleep."""
        if not busy and self._rested != self._seen:
            with self._quiet:
                self._rested = self._seen
                self._quiet.notify_all()
        return False

    def _tell(self, what: str, who: Any, value: Any) -> None:
        self._inbox.put((what, who, value))
        # Whoever wakes for one message hears all that have come, and sleeps only where there is none.
        if self._inbox.qsize() <= 1:
            self.wake()

    # --- the port of each strategy -----------------------------------------------------------------------------------

    def ask(self, live: Live, ask: Ask) -> None:
        self._tell("ask", live, ask)

    def withdraw(self, ask: Ask) -> None:
        self._tell("withdraw", None, ask)

    def emitted(self, live: Live, part: Emitted) -> None:
        self._tell("emitted", live, part)
