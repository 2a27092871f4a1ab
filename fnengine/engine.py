"""The host loop: requests in, deltas out; plan, launch, commit, and nothing else.

    submit -> waiting -> plan -> launch -> (depth steps later) read -> commit -> text -> Delta

One thread runs everything: the event loop's. On CPU (depth 0) a step has all cores and the loop gets a bounded number
of turns between steps, in which HTTP and text work happen. On CUDA (depth 1) the next step is launched before the one
in flight is read, and reading waits in a thread, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fnengine import environment
from fnengine.build import Built, build, fingerprint, policy_of
from fnengine.companions import Beside, SecondModel
from fnengine.decoding.live import Bounds
from fnengine.decoding.strategy import Strategy
from fnengine.drafting import Drafting, Jointly, Maker
from fnengine.errors import DeviceFault, FnError, QueueFull, RequestError
from fnengine.graphs.report import as_json
from fnengine.host import ahead
from fnengine.host import commit as committing
from fnengine.host import plan as planning
from fnengine.host.answers import fits, most_unread
from fnengine.host.blocks import Ledger
from fnengine.host.commit import Event
from fnengine.host.garbage import Collector
from fnengine.host.guide import Guides
from fnengine.host.output import Delta, Finished, Gauges, StepFacts, Usage
from fnengine.host.plan import Host, Planned, Policy, Run
from fnengine.host.pooling import DEFAULT, declared, embedding
from fnengine.host.request import Request, Speculate
from fnengine.host.states import states_of
from fnengine.host.step import BLOCK, Device, Ticket
from fnengine.host.survey import Survey, survey, told
from fnengine.host.text import Piece, TextStream
from fnengine.host.tokenizer import Tokenizer
from fnengine.host.windows import windows_of
from fnengine.model import Model
from fnengine.processors import Own
from fnengine.runtime import Runtime
from fnengine.settings import Settings
from fnengine.spec import tap_names
from fnengine.strategies import Strategies, named
from fnengine.stream import Stream

log = logging.getLogger("fnengine")

Sink = Callable[[Delta], None]

LOOP_TURNS = 4
"""Turns of the event loop between two steps on CPU: a request needs about three to get from socket to `submit`."""

_NOTHING = Piece()
_tuple = tuple.__new__


@dataclass
class _Live:
    """What the engine keeps of a request while it runs."""

    request: Request
    sink: Sink
    runs: tuple[Run, ...]
    text: list[TextStream]
    open: int
    finish: str = "stop"
    max_tokens: int = 0
    guests: list[Any] = field(default_factory=list)
    """Strategies that run for it."""


class Engine:
    """Serves requests over one device.

    Args:
        device: runs steps (`fnengine.device.TorchDevice`, or the toy one).
        tokenizer: text in and out.
        policy: sizes and costs the scheduler goes by.
        clock: seconds, monotonic; the only time the engine sees.
    """

    def __init__(
        self,
        device: Device,
        tokenizer: Tokenizer,
        policy: Policy,
        *,
        names: tuple[str, ...] = ("model",),
        seed: int = 0,
        defaults: dict[str, Any] | None = None,
        fingerprint: str = "",
        max_logprobs: int = 20,
        answer_bytes: int = Settings.answer_bytes,
        built: Built | None = None,
        drafting: Drafting | None = None,
        strategies: Mapping[str, Strategy] | None = None,
        bounds: Bounds | None = None,
        pooling: str = DEFAULT,
        runtime: Callable[[Ledger, threading.RLock], Runtime] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.drafting = drafting or Drafting()
        self.device, self.tokenizer, self.policy, self.clock = device, tokenizer, policy, clock
        self.names, self.defaults = names, defaults or {}
        self.fingerprint, self.built = fingerprint, built
        self.max_logprobs = policy.vocab if max_logprobs < 0 else max_logprobs
        self.answer_bytes = answer_bytes
        self.guides = Guides(tokenizer, policy.vocab, policy.eos)
        books: dict[str, Any] = dict(states=states_of(device), windows=windows_of(device))
        ledger = Ledger(device.blocks, BLOCK, caching=policy.caching, **books)
        self.host = Host(policy, ledger, rows=device.rows, host_slots=device.host_slots, seed=seed)
        self.on_step: list[Callable[[StepFacts], None]] = []
        self.on_finish: list[Callable[[Finished], None]] = []
        self.strategies = dict(strategies or {})
        self.bounds = bounds or Bounds()
        self.pooling = pooling
        """Of embeddings that ask for none."""
        self._runtime_of = runtime
        self._stage: Strategies | None = None
        self._books = threading.RLock()
        """Held while the ledger changes: strategies cut sequences on a thread of their own."""
        self._seconds = 0.0
        """Of the last step."""
        self._flight: deque[tuple[Planned, Ticket, float]] = deque()
        self._live: dict[str, _Live] = {}
        self._task: asyncio.Task[None] | None = None
        self._loop_of: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()
        self._garbage = Collector(clock)
        self._state = "not started"
        self._steps = 0
        self._compiled = 0 if built is None else built.traces.compiled

    @classmethod
    def build(
        cls,
        model: Model,
        settings: Settings | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        names: tuple[str, ...] = (),
        generation_config: str = "auto",
        processors: Mapping[str, Own] | None = None,
        proposers: Mapping[str, Maker] | None = None,
        speculate: Speculate | None = None,
        strategies: Iterable[Strategy] = (),
        bounds: Bounds | None = None,
        companion: Model | Beside | None = None,
        **options: Any,
    ) -> Engine:
        """An engine for a loaded model.

        Args:
            strategies: that requests may name; `bounds` says how long one may keep to itself.
            speculate: drafts for requests that say nothing about them.
            proposers: name -> (how -> a proposer for one run), for `Speculate(method=name)`.
            companion: a draft model or head, which drafts for many sequences at once on the model's rows and blocks;
                its method in `Speculate` is `draft_model`, or the head's, such as `eagle`.
            generation_config: `vllm` ignores the model's own sampling defaults.
            processors: name -> function of logits that requests may ask for, `Sampling(processors=...)`.
        """
        settings = settings or Settings(**options)
        beside = SecondModel(companion) if isinstance(companion, Model) else companion
        built = build(model, settings, lazy=False, processors=processors, companion=beside)
        device, made = built.device, dict(proposers or {})
        if beside is not None:
            made[beside.method] = lambda _: Jointly()
        tokenizer = tokenizer or model.tokenizer
        environment.trim()  # what reading it took
        policy = policy_of(model, settings, built, tokenizer)
        engine = cls(
            device,
            tokenizer,
            policy,
            names=names or (model.name,),
            seed=settings.seed,
            defaults=model.generation_defaults if generation_config == "auto" else {},
            fingerprint=fingerprint(model, settings, built),
            max_logprobs=settings.max_logprobs,
            answer_bytes=settings.answer_bytes,
            built=built,
            drafting=Drafting(
                speculate,
                made,
                tap_names(model.spec),
            ),
            strategies={s.name: s for s in strategies},
            bounds=bounds,
            pooling=declared(model.folder),
            runtime=lambda ledger, books: Runtime.over(model, settings, built, ledger, books),
        )
        follows = device.companion is not None and device.companion.catches_up
        engine.drafting.jointly = lambda wishes: ahead.drafts(
            engine.host, wishes, device.draft, built.drafts_to, follows=follows
        )
        return engine

    tasks = ("generate", "embed", "pool", "score")
    """What may be asked of it; scores are cosines."""
    head = None
    """Labels are a `Reader`'s."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def most(self) -> int:
        """Sequences that are computed at once."""
        return self.policy.rows

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.policy.width

    @property
    def max_len(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        return self.policy.max_len

    # --- requests -------------------------------------------------------------------------------------------------

    async def prepare(self, request: Request) -> Request:
        """The request, ready to be submitted at once: a grammar is compiled in a thread while others keep their pace.

        Raises:
            RequestError: the grammar is none, or too large.
        """
        if request.grammar is None or request.guide is not None:
            return self.guides.prepare(request)
        return await asyncio.to_thread(self.guides.prepare, request)

    def submit(self, request: Request) -> Stream:
        """The request's stream of deltas; it waits in the queue from now on.

        Raises:
            RequestError, ContextLengthError: the request cannot be served as it is.
            QueueFull: too many wait already.
        """
        most = most_unread(request, rows=self.policy.rows, answer_bytes=self.answer_bytes)
        stream = Stream(self, request, most)
        self.submit_to(request, stream.put)
        return stream

    def submit_to(self, request: Request, sink: Sink) -> None:
        """Like `submit`, with a function that takes each delta as it comes."""
        if request.id in self._live:
            raise RequestError(f"a request with id {request.id!r} is being served already", param="request_id")
        if request.strategy is not None:
            self._follow(request, sink)
            self._work.set()
            return
        for name in ("logprobs", "prompt_logprobs"):
            k = getattr(request, name)
            if k is not None and not 0 <= k <= self.max_logprobs:
                raise RequestError(
                    f"{name} must be between 0 and {self.max_logprobs}, got {k}",
                    param=name,
                    remedy="the limit is set by --max-logprobs",
                )
        fits(request, rows=self.policy.rows, budget=self.policy.budget, answer_bytes=self.answer_bytes)
        self.drafting.check(request)
        proposer = None if request.pooling is not None else self.drafting.made(request)
        request = self.guides.prepare(request)
        now = self.clock()
        request = replace(request, arrival=now)
        runs = planning.submit(self.host, request, now)
        text = [self._text(request) for _ in runs]
        self._live[request.id] = _Live(
            request, sink, runs, text, len(runs), max_tokens=max((r.max_tokens for r in runs), default=0)
        )
        self.drafting.begin(request, runs, proposer)
        self._work.set()

    def _text(self, request: Request) -> TextStream:
        stops = request.stop
        return TextStream.start(
            self.tokenizer,
            request.prompt,  # pyright: ignore[reportArgumentType]
            stops.strings,
            patterns=stops.patterns,
            include_stop=stops.include_stop,
            from_token=max(0, stops.min_tokens - 1),
            skip_special=request.skip_special_tokens,
            repetition=stops.repetition,
        )

    def abort(self, request_id: str) -> bool:
        """Ends a request; its blocks return when the steps in flight that hold them are committed."""
        live = self._live.pop(request_id, None)
        with self._books:
            planning.abort(self.host, request_id)
            if live is not None:
                self._leave(live)
        if live is None:
            return False
        live.finish = "abort"
        self._finished(live)
        return True

    # --- the loop -------------------------------------------------------------------------------------------------

    def launch(self) -> bool:
        """Plans and launches one step if there is anything to compute; False when there is not."""
        if self._stage is not None:
            self._stage.hear(self._seconds)
        now = self.clock()
        with self._books:
            if self._stage is not None:
                self._stage.runtime.drain()
            if self.drafting.guesses:
                self.drafting.draft(self._fail)
            planned = planning.plan(self.host, now)
        if planned is None:
            return False
        try:
            ticket = self.device.launch(planned.input)
        except Exception as e:
            while self._flight:  # steps are committed, or failed, in order
                self.collect()
            self._fault(planned, e)
            return True
        self._flight.append((planned, ticket, now))
        return True

    def collect(self) -> None:
        """Reads and commits the oldest step in flight, waiting for it."""
        planned, ticket, launched = self._flight.popleft()
        try:
            output = ticket.read()
        except Exception as e:
            self._fault(planned, e)
            return
        now = self.clock()
        self._seconds = now - launched
        with self._books:
            events = committing.commit(self.host, planned, output, now)
            self._steps += 1
            if self.drafting.guesses:
                self.drafting.landed(planned, events, self._seconds)
            for event in events:
                self._deliver(event)
        if self.on_step:
            facts = StepFacts(
                tokens=len(planned.input.token),
                rows=len(planned.input.row),
                prompt_tokens=planned.prompt_tokens,
                generated=sum([len(e.tokens) for e in events if e.run.base is None]),
                gaps=tuple([e.gap for e in events if e.gap is not None]),
                first=tuple([now - e.run.arrival for e in events if e.first]),
                seconds=now - launched,
            )
            for observe in self.on_step:
                observe(facts)

    def turn(self) -> bool:
        """One turn of the loop, for callers without an event loop: True while there is work."""
        launched = self.launch()
        if self._flight and (not launched or len(self._flight) > self.device.depth):
            self.collect()
            return True
        if launched or self._flight:
            return True
        if self._stage is None or not self._stage.guests:
            return False
        if not self._unstick():
            self._stage.wait(self.bounds.turn / 4)
        return True

    def _unstick(self) -> bool:
        """With nothing in flight and nothing to launch: whether a strategy was made to give way to those who wait."""
        stage = self._stage
        if stage is None or not self.host.requests or stage.thinking:
            return False
        with self._books:
            return stage.unstick()

    async def start(self) -> None:
        """Starts the loop on the running event loop; twice is harmless."""
        if self._task is None or self._task.done():
            self._state = "running"
            self._garbage.start()
            self._loop_of = asyncio.get_running_loop()
            self._task = asyncio.get_running_loop().create_task(self._loop())

    async def stop(self, timeout: float = 0.0) -> None:
        """Lets requests finish for at most `timeout` seconds, ends the rest, stops the loop."""
        self._garbage.stop()
        if self._task is None:
            return
        end = self.clock() + timeout
        while self._live and self.clock() < end and not self._task.done():
            await asyncio.sleep(0.01)
        for live in list(self._live.values()):
            self._error(live, "the server is shutting down")
        while self._flight:
            self.collect()
        if self._stage is not None:
            self._stage.close()
        self._state = "stopped"
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None

    async def _loop(self) -> None:
        try:
            while True:
                launched = self.launch()
                if self._flight and (not launched or len(self._flight) > self.device.depth):
                    if self.device.depth:
                        # Wait for the device off the loop; committing stays on it.
                        await asyncio.to_thread(_wait, self._flight[0][1])
                    self.collect()
                elif not launched and not self._flight:
                    self._garbage.turn(busy=False)
                    await self._rest()
                self._garbage.turn(busy=True)
                for _ in range(LOOP_TURNS):
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise
        except Exception as e:
            log.exception("the engine's loop ended")
            self._state = f"the engine's loop ended: {type(e).__name__}: {e}"
            for live in list(self._live.values()):
                self._error(live, "internal error: the engine's loop ended")

    async def _rest(self) -> None:
        """Waits until there is something to do, or a strategy to be looked after."""
        if self._unstick():
            return
        self._work.clear()
        stage = self._stage
        if stage is None or not stage.guests:
            await self._work.wait()
        elif not stage.waits():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._work.wait(), self.bounds.turn / 4)

    # --- strategies -----------------------------------------------------------------------------------------------

    def _follow(self, request: Request, sink: Sink) -> None:
        """Runs the strategy that a request names, once for each choice."""
        strategy = named(request, self.strategies if self._runtime_of is not None else None, self.policy)
        assert self._runtime_of is not None
        n, waiting = request.n, self.host.waiting + (0 if self._stage is None else len(self._stage.guests))
        if waiting + n > self.policy.queue:
            self.host.rejections += 1
            raise QueueFull(f"{waiting} sequences wait already, {n} more do not fit", remedy="try again later")
        if self._stage is None:
            runtime = self._runtime_of(self.host.ledger, self._books)
            eos, wake, bounds = self.policy.eos, self._wake, self.bounds
            self._stage = Strategies(
                runtime, self.host, self.tokenizer, eos=eos, books=self._books, wake=wake, bounds=bounds
            )
        request = replace(request, arrival=self.clock())
        runs, guests = self._stage.serve(request, strategy, self._text, sink, self._answered)
        most = request.stop.max_tokens or 0
        self._live[request.id] = _Live(request, sink, runs, [], n, max_tokens=most, guests=guests)

    def _answered(self, run: Run) -> None:
        """Counts a choice that a strategy has ended."""
        if (live := self._live.get(run.request.id)) is not None:
            assert run.finish is not None
            self._closed(live, run.finish)

    def _leave(self, live: _Live) -> None:
        """Ends what runs for a request beside its runs."""
        self.drafting.forget(live.runs)
        for guest in live.guests:
            assert self._stage is not None
            self._stage.stop(guest)

    def _wake(self) -> None:
        """Tells the loop, from another thread, that there is something to hear."""
        if self._loop_of is not None and not self._loop_of.is_closed():
            with contextlib.suppress(RuntimeError):  # closed in between
                self._loop_of.call_soon_threadsafe(self._work.set)

    # --- out ------------------------------------------------------------------------------------------------------

    def _deliver(self, event: Event) -> None:
        """Text, stop strings and the end of a choice, as one delta."""
        run, tokens, logprobs, prompt_logprobs, finish, stop_token = event[:6]
        request = run.request
        live = self._live.get(request.id)
        if live is None:
            if run.base is not None and self._stage is not None:
                self._stage.landed(event)
            return
        text, stop_reason, piece = live.text[run.index], None, _NOTHING
        if finish is None and len(tokens) == 1 and (shown := text.whole.get(tokens[0])) is not None:
            # A named tuple made like this costs half of a call of the class: this is done for nearly every token.
            live.sink(
                _tuple(Delta, (run.index, shown, tokens, logprobs, prompt_logprobs, None, None, None, None, None))
            )
            return
        last = len(tokens) - 1
        for j, token in enumerate(tokens):
            logprob = None if logprobs is None else logprobs[j]
            pushed = text.push(token, logprob, silent=stop_token is not None and j == last)
            piece = piece + pushed if j else pushed
            if pushed.stop is not None:
                break
        if finish is None and piece.stop is None:  # the many: nothing ends
            if piece.tokens or piece.text or prompt_logprobs is not None:
                scores = None if request.logprobs is None else piece.logprobs
                live.sink(Delta(run.index, piece.text, piece.tokens, scores, prompt_logprobs))
            return
        if piece.stop is None:
            piece += text.finish()
            if stop_token is not None and stop_token not in self.policy.eos:
                stop_reason = stop_token
        if piece.stop is not None:
            if finish is None:
                committing.finish(self.host, run, "stop")
            finish, stop_reason = "stop", piece.stop
        assert finish is not None
        accepted, rejected = self.drafting.predicted(run) or (None, None)
        self.drafting.forget((run,))
        live.sink(
            Delta(
                index=run.index,
                text=piece.text,
                tokens=piece.tokens,
                logprobs=piece.logprobs if request.logprobs is not None else None,
                prompt_logprobs=prompt_logprobs,
                finish=finish,
                stop_reason=stop_reason,
                error=event.error,
                usage=Usage(len(request.prompt), run.cached, run.generated, accepted, rejected),
                vector=embedding(run, finish),
            )
        )
        self._closed(live, finish)

    def _closed(self, live: _Live, finish: str) -> None:
        """Counts a choice that has ended."""
        live.open -= 1
        live.finish = finish
        if live.open == 0:
            self._live.pop(live.request.id, None)
            self._finished(live)

    def _fault(self, planned: Planned, error: Exception) -> None:
        """Ends the requests of a failed step; the others go on."""
        fault = error if isinstance(error, FnError) else DeviceFault(f"{type(error).__name__}: {error}")
        log.error("a step failed: %s", fault, exc_info=error)
        with self._books:
            for event in committing.fail(self.host, planned, str(fault)):
                self._deliver(event)

    def _fail(self, run: Run, error: FnError) -> None:
        """Ends a request because of what was done for one of its runs."""
        if (live := self._live.get(run.request.id)) is not None:
            self._error(live, str(error))

    def _error(self, live: _Live, message: str) -> None:
        """Ends a request with an error delta for every choice that is still open."""
        self._live.pop(live.request.id, None)
        self._leave(live)
        open_choices = [r.index for r in live.runs if not r.ended]
        planning.abort(self.host, live.request.id)
        live.finish = "error"
        for index in open_choices:
            usage = Usage(len(live.request.prompt), live.runs[0].cached, live.runs[index].generated)
            live.sink(Delta(index=index, finish="error", error=message, usage=usage))
        self._finished(live)

    def _finished(self, live: _Live) -> None:
        if not self.on_finish:
            return
        facts = told(live.request, live.runs, live.finish, live.max_tokens, self.clock())
        for observe in self.on_finish:
            observe(facts)

    # --- readings -------------------------------------------------------------------------------------------------

    def healthy(self) -> str | None:
        """None when able to serve, else why not."""
        return None if self._state == "running" else self._state

    def gauges(self) -> Gauges:
        recompiles = 0 if self.built is None else self.built.traces.compiled - self._compiled
        c = self.drafting.counts
        drafts = {"drafted": c.proposed, "accepted": c.accepted, "draft_steps": c.steps, "accepted_deep": tuple(c.deep)}
        return replace(planning.gauges(self.host), steps=self._steps, recompiles=recompiles, **drafts)

    def survey(self, blocks: bool = True) -> Survey:
        """Every request, and with `blocks` the pool, for people who look on; not for every step."""
        return survey(self.host, blocks)

    def graphs(self) -> dict[str, Any] | None:
        """What ran in which captured graph, and what padding cost, and of passes that draft the same under `drafts`;
        None where nothing is captured."""
        usage = None if self.built is None else self.built.device.usage
        if usage is None or self.built is None:
            return None
        found = {"about": self.built.capture, **as_json(replace(usage, recompiles=self.gauges().recompiles))}
        passes = self.built.device.draft_usage
        return found if passes is None else {**found, "drafts": as_json(passes)}

    def reset_prefix_cache(self) -> None:
        """Forgets cached blocks that no sequence holds."""
        self.host.ledger.reset_cache()

    def check(self) -> None:
        """Asserts that the ledger's books balance."""
        self.host.ledger.check()


def _wait(ticket: Ticket) -> None:
    with contextlib.suppress(Exception):  # collect() reads it again on the loop and reports what it raises
        ticket.read()
