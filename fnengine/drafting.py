"""Drafts for the runs of an engine: who guesses for which request, and how many tokens a step.

    draft(...)   before a plan: a guess for each run whose newest token is known      -> run.draft
    landed(...)  after a commit: what came of it goes to the proposer's state, the pace and the counts

A proposer that reads the target's activations gets them from the run's own steps: of its whole prompt, so that the
prefix cache is not looked at, and of every token that stays.

A companion of the device drafts for all runs that want some in one round, and needs no proposer of theirs.

A proposer and the pace are those of `decoding.speculate`; verification happens inside the step (`host.step`), so drafts
never change tokens. What a step takes is learned for all runs together, by rows and by tokens a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fnengine.decoding.ngram import NGram
from fnengine.decoding.pace import Pace, Times, noted, observe, passed, pick, rested, resumed
from fnengine.decoding.prediction import Prediction, usage
from fnengine.decoding.speculate import AnyProposer, Draft, Drawing, Tapped, drafted, taps_of
from fnengine.decoding.suffix import Suffix
from fnengine.decoding.trees import ways
from fnengine.errors import FnError, RequestError
from fnengine.host import guide as guiding
from fnengine.host.commit import Event
from fnengine.host.plan import Planned, Run
from fnengine.host.request import MAX_DRAFT, Request, Speculate


@dataclass(frozen=True)
class Jointly:
    """In a proposer's place: the device's companion drafts, for all its runs at once."""


Maker = Callable[[Speculate], AnyProposer | Jointly]

MAKERS: Mapping[str, Maker] = {
    "ngram": lambda _: NGram(),
    "suffix": lambda _: Suffix(),
    "prediction": lambda how: Prediction.of(how.prediction),
}
"""name -> a proposer for one run, that every engine has."""


LOOK = 8
"""Rounds without a draft after which it is decided anew how many tokens to ask for. Between two steps, whose weights
have swept the caches, a lookup that takes 6 us in a loop takes 75, and a step of the bundled model 1,100 (one thread of
the two-core machine); deciding takes several times as long."""
SELDOM = 16
"""While all drafting rests, what a step takes is noted once in so many: noting takes 10 us."""


PREDICTED = 0.9
"""Acceptance that is believed of a prediction before it was tried: who sends one means it."""


UNTOLD = 64
"""Tokens of which a proposer with taps is not told before it is asked; beyond that it is, lest activations gather."""


@dataclass(slots=True, eq=False)
class _Guess:
    """What is known about one run's drafts."""

    proposer: AnyProposer | Jointly
    how: Speculate
    pace: Pace
    state: Any = None
    new: list[int] = field(default_factory=list)
    """Tokens that the state has not been told yet. Of a proposer with taps: it is told what `seen` allows."""
    seen: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Of a proposer with taps: [n, D] each, what was seen of the run's tokens and the state has not been told."""
    told: int = 0
    """Of a proposer with taps: tokens of the run that the state knows."""
    k: int = -1
    """Tokens to ask for; -1: to be decided."""
    rest: int = 0
    """Rounds left in which nobody asks."""
    empty: int = 0
    """Rounds since the pace was told, in which nothing came; and the seconds of the quickest."""
    silent: float = 0.0
    looked: int = 0
    """Tokens asked for in those rounds."""
    asked: int = 0
    """Tokens asked for, for the step in flight; and the seconds that proposing took."""
    proposing: float = 0.0


@dataclass(slots=True)
class Counts:
    """Draft tokens, ever."""

    steps: int = 0
    """Steps of runs that held a draft."""
    proposed: int = 0
    accepted: int = 0
    deep: list[int] = field(default_factory=list)
    """Of drafts so far, those of which at least 1, 2, 3, ... tokens were accepted."""


@dataclass
class Drafting:
    """The drafts of one engine.

    Args:
        default: for requests that say nothing; None guesses nothing.
        makers: name -> proposer, beside those that every engine has.
        taps: what proposers may read of the model.
    """

    default: Speculate | None = None
    makers: Mapping[str, Maker] = field(default_factory=dict)
    taps: tuple[str, ...] = ()
    jointly: Callable[[list[tuple[Run, int]]], list[tuple[int, ...]]] | None = None
    """The companion's drafts of at most so many tokens for each of these runs."""
    clock: Callable[[], float] = time.perf_counter
    counts: Counts = field(default_factory=Counts)
    guesses: dict[Run, _Guess] = field(default_factory=dict)
    seconds: dict[int, Times] = field(default_factory=dict)
    """Rows, rounded up to a power of two -> seconds of steps by tokens a row, less one."""
    rows: int = 1
    """Of the last step, rounded up so."""
    earlier: dict[tuple[str, int], Pace] = field(default_factory=dict)
    """Method and k -> the pace of the last run that ended, with which the next one begins."""
    unnoted: int = 0
    """Steps since one was noted."""

    def __post_init__(self) -> None:
        self.makers = {**MAKERS, **self.makers}
        if self.default is not None:
            self._check(self.default)
            self._make(self.default)

    def check(self, request: Request) -> None:
        """Raises `RequestError` for a request whose drafts nobody can make."""
        if request.speculate is not None:
            self._check(request.speculate)

    def _check(self, how: Speculate) -> None:
        if how.k and how.method not in self.makers:
            raise RequestError(
                f"nobody is called {how.method[:80]!r} who makes drafts here",
                param="speculative",
                remedy=f"one of {', '.join(self.makers)}",
            )

    def made(self, request: Request) -> AnyProposer | Jointly | None:
        """The proposer of the first choice; None if nobody wants drafts.

        Raises:
            RequestError: it cannot be made, or reads of the model what is not there.
        """
        return self._make(request.speculate or self.default)

    def _make(self, how: Speculate | None) -> AnyProposer | Jointly | None:
        if how is None or not how.k:
            return None
        try:
            proposer = self.makers[how.method](how)
        except FnError:
            raise
        except Exception as e:
            raise RequestError(
                f"the proposer {how.method!r} could not be made: {type(e).__name__}: {e}", param="speculative"
            ) from e
        if isinstance(proposer, Jointly):
            return proposer
        if unknown := [name for name in taps_of(proposer) if name not in self.taps]:
            raise RequestError(
                f"{how.method!r} reads {', '.join(unknown)} of a model that has {', '.join(self.taps) or 'no taps'}",
                param="speculative",
            )
        return proposer

    def begin(self, request: Request, runs: tuple[Run, ...], first: AnyProposer | Jointly | None) -> None:
        """Guesses for these runs from now on, with what `made` gave."""
        how = request.speculate or self.default
        if first is None or how is None:
            return
        for i, run in enumerate(runs):
            proposer = self.makers[how.method](how) if i else first
            pace = Pace.of(how.k)
            if how.method == "prediction":  # another prediction may be a better one
                pace = replace(pace, prior=PREDICTED)
            elif (earlier := self.earlier.get((how.method, how.k))) is not None:
                pace = resumed(pace, earlier)
            self.guesses[run] = _Guess(proposer, how, pace)
            run.patient, run.guessed = True, True
            run.taps = () if isinstance(proposer, Jointly) else taps_of(proposer)
            run.plain = run.plain and not run.taps

    def forget(self, runs: tuple[Run, ...]) -> None:
        for run in runs:
            guess = self.guesses.pop(run, None)
            if guess is not None and guess.pace.asked:
                self.earlier[guess.how.method, guess.how.k] = guess.pace

    def draft(self, failed: Callable[[Run, FnError], None]) -> None:
        """Gives a draft to each run that has one now. A proposer that raises, or breaks its contract, ends its run."""
        together: list[tuple[Run, _Guess]] = []
        for run, guess in list(self.guesses.items()):
            if run.inside and not self._saw(run, guess, failed):
                continue
            if guess.rest or run.inflight or run.path.length + 1 != run.known or run.status != "running":
                continue
            if run.draft and run.guide is not None:  # what must come next needs no guess
                continue
            if guess.k < 0:
                self._decide(run, guess, self.rows)
            guess.asked = min(guess.k, run.limit - run.known - 1)
            if guess.asked < 1:
                guess.asked = 0
                continue
            if isinstance(guess.proposer, Jointly):
                together.append((run, guess))
                continue
            began = self.clock()
            try:
                made = self._propose(run, guess)
            except Exception as e:
                failed(run, _fault(guess, e))
                continue
            guess.proposing = self.clock() - began
            if not made.tokens:
                guess.silent = min(guess.silent, guess.proposing) if guess.empty else guess.proposing
                guess.empty, guess.looked = guess.empty + 1, guess.asked
                if guess.empty >= LOOK:
                    guess.k = -1
            way = made.tokens
            if made.parents is not None:  # a row holds one way; of a tree, the longest
                way = tuple(made.tokens[i] for i in max(ways(made.parents), key=len))
            guiding.guess(run, way)
        if together:
            self._draft_together(together, failed)

    def _draft_together(self, wishes: list[tuple[Run, _Guess]], failed: Callable[[Run, FnError], None]) -> None:
        """Gives these runs the companion's drafts. Its round holds up all of them, so each counts all of its time."""
        assert self.jointly is not None
        began = self.clock()
        try:
            ways = self.jointly([(run, guess.asked) for run, guess in wishes])
        except Exception as e:
            for run, guess in wishes:
                failed(run, _fault(guess, e))
            return
        seconds = self.clock() - began
        for (run, guess), way in zip(wishes, ways, strict=True):
            # Where nothing comes there was no room, or a prompt to catch up with: no sign of what drafts bring.
            guess.proposing = seconds
            guess.new.clear()
            guiding.guess(run, way)

    def _decide(self, run: Run, guess: _Guess, rows: int) -> None:
        """How many tokens to ask for from now on, or how long to rest."""
        if not guess.how.adapt:
            guess.k = guess.how.k
            return
        pace = self._paced(guess, rows)
        guess.k = pick(pace, guess.how.k)
        if not pace.steps[0]:  # no step of so many rows was timed yet
            guess.k = -1
        elif not guess.k:
            guess.pace = observe(pace, 0, 0, 0, 0.0, min(pace.steps[0], default=0.0))
            guess.rest, guess.k = max(guess.pace.rest, 0), -1
            # While drafting rests, a GPU goes on without waiting for the host.
            run.patient = not guess.rest or run.guide is not None

    def _saw(self, run: Run, guess: _Guess, failed: Callable[[Run, FnError], None]) -> bool:
        """Takes what was seen of the run's tokens; False where its proposer failed."""
        # Copied: a piece is a view of all rows' tokens, and would keep them.
        guess.seen += [tuple(x.clone() for x in piece) for piece in run.inside]
        run.inside.clear()
        try:
            if run.seen + 1 - guess.told > UNTOLD:
                _tell(run, guess)
        except Exception as e:
            failed(run, _fault(guess, e))
            return False
        return True

    def _propose(self, run: Run, guess: _Guess) -> Draft:
        proposer = guess.proposer
        assert not isinstance(proposer, Jointly)
        if isinstance(proposer, Tapped):
            _tell(run, guess)
        elif guess.state is None:
            guess.state = proposer.start(run.tokens[: run.prompt_len].tolist(), _drawing(run))
        if guess.new:
            assert not isinstance(proposer, Tapped)
            guess.state, guess.new = proposer.advance(guess.state, guess.new), []
        made = drafted(proposer.propose(guess.state, guess.asked), guess.asked)
        guess.state = guess.state if made.state is None else made.state
        return made

    def landed(self, planned: Planned, events: list[Event], seconds: float) -> None:
        """Learns from a step that was committed."""
        rows = self.rows = _rounded(len(planned.runs))
        self.unnoted += 1
        if not planned.prompt_tokens and (self.unnoted >= SELDOM or not all(g.rest for g in self.guesses.values())):
            self.unnoted = 0
            each = min(max(round(len(planned.input.token) / len(planned.runs)), 1), MAX_DRAFT + 1)
            times = self.seconds.get(rows, ((),) * (MAX_DRAFT + 1))
            self.seconds[rows] = noted(times, each - 1, seconds)
        for event in events:
            guess = self.guesses.get(event.run)
            if guess is None:
                continue
            if not event.run.taps:
                guess.new += event.tokens
            if event.proposed and guess.asked:  # what had to come is no guess of a proposer's
                self._count(guess, event, rows, seconds)
            elif guess.rest:
                guess.rest -= 1
                if not guess.rest:
                    guess.pace, event.run.patient = rested(guess.pace), True
            guess.asked, guess.proposing = 0, 0.0

    def _count(self, guess: _Guess, event: Event, rows: int, seconds: float) -> None:
        counts = self.counts
        counts.steps += 1
        counts.proposed += event.proposed
        counts.accepted += event.accepted
        counts.deep += [0] * (event.proposed - len(counts.deep))
        for position in range(event.accepted):
            counts.deep[position] += 1
        if guess.how.adapt:
            pace = self._paced(guess, rows)
            guess.pace = observe(pace, guess.asked, event.proposed, event.accepted, guess.proposing, seconds)
            guess.k = -1

    def _paced(self, guess: _Guess, rows: int) -> Pace:
        """The run's pace, with the seconds that steps of so many rows take, told of rounds in which nothing came."""
        times = self.seconds.get(rows)
        pace = guess.pace if times is None else replace(guess.pace, steps=times[: guess.how.k + 1])
        if guess.empty:
            pace = guess.pace = passed(pace, guess.empty, guess.looked, guess.silent)
            guess.empty = 0
        return pace

    def predicted(self, run: Run) -> tuple[int, int] | None:
        """(accepted, rejected) tokens of the run's prediction, if it has one."""
        guess = self.guesses.get(run)
        if guess is None or not isinstance(guess.proposer, Prediction):
            return None
        start = guess.proposer.start((), Drawing(run.request.sampling, 0)) if guess.state is None else guess.state
        return usage(guess.proposer, guess.proposer.advance(start, guess.new))


def _drawing(run: Run) -> Drawing:
    return Drawing(replace(run.request.sampling, seed=run.seed), run.prompt_len)


def _tell(run: Run, guess: _Guess) -> None:
    """Tells the state of a proposer with taps all tokens that come after one of which something was seen."""
    proposer = guess.proposer
    assert isinstance(proposer, Tapped)
    if not guess.seen:
        return
    seen = dict(zip(run.taps, map(torch.cat, zip(*guess.seen, strict=True)), strict=True))
    end = run.seen + 1
    tokens = run.tokens[guess.told : end].tolist()
    if guess.state is None:  # of a long prompt, the beginning
        guess.state = proposer.start(tokens, _drawing(run), seen)
    else:
        guess.state = proposer.advance(guess.state, tokens, seen)
    guess.told = end
    guess.seen.clear()


def _rounded(rows: int) -> int:
    return 1 << (max(rows, 1) - 1).bit_length()


def _fault(guess: _Guess, error: Exception) -> FnError:
    if isinstance(error, FnError):
        return error
    return RequestError(
        f"the proposer {guess.how.method!r} raised {type(error).__name__}: {error}", param="speculative"
    )
