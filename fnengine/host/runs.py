"""What the scheduler remembers: the policy it goes by, the runs it serves, and how a run ends or steps back.

A *run* is one choice of a request. There are no phases: a run has `total` tokens, of which `path.length` are computed,
and a step lets the second catch up with the first. The newest tokens may be in flight, chosen but not read:

    tokens   p p p p p p g g ? |         p prompt, g generated and known, ? in flight
    known                    8 |
    total                      9         what the next step computes is position 8, as NEWEST
    computed (path.length)   8

A run may bring a *draft*, tokens that somebody guesses will come next. A step then computes the newest token and the
draft, and chooses after each; while it is in flight nothing more is computed, and `commit` cuts what was guessed wrong:

    tokens   p p p p p p g g d d d       d drafted
    known                    8 |
    total, computed              11      in flight: 1 to 4 tokens will be known

An *extension* is a run of a caller's own: it begins at a path that the caller holds (`base`), computes the tokens after
it, and ends with the longer path in an event. Only what it asks for comes back: a token, logits. A request for an
embedding is one, too, from no tokens at all: what its taps give is pooled as it comes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import numpy as np

from fnengine.host.blocks import Ledger, Path, Salt
from fnengine.host.guide import Guide
from fnengine.host.output import Finish, TokenLogprob
from fnengine.host.request import Request, fold_in
from fnengine.host.steer import Steering

Key = tuple[int, float, int]
"""(priority, arrival, number): the order in which runs are served; unique."""

key_of = attrgetter("key")

RECENT = 1024
"""Preemptions that are remembered."""


class Preempted(NamedTuple):
    """A run that was sent back to wait."""

    id: str
    """The request's."""
    index: int
    when: float
    """Seconds of the engine's clock."""
    computed: int
    """Tokens whose KV it gave up, or saved."""
    saved: bool
    """Its KV went to host memory."""


PICKS = 32
"""Tokens after which a step makes logits, where fewer rows would make fewer: a draft of 16 has room, and a prompt whose
logits are all wanted comes 32 tokens at a time, 20 MB of them for a vocabulary of 151,936."""


DRAFTED, DRAFT_LOGITS = 4, 64 << 20
"""Where all sequences may draft at once: tokens of each whose logits have room beside its newest one's, as far as that
takes no more bytes."""


def picks_of(rows: int, vocab: int, drafting: bool) -> int:
    """Most tokens of a step after which logits are made. `drafting`: a companion drafts for many sequences at once."""
    some = max(rows, PICKS)
    return max(some, min(rows * (DRAFTED + 1), DRAFT_LOGITS // (4 * vocab))) if drafting else some


@dataclass(frozen=True)
class Policy:
    """Sizes and costs the scheduler goes by."""

    budget: int
    """New tokens a step. Exceeded only by a single prompt longer than it when `chunked` is off."""
    rows: int
    """Most runs computed at once."""
    queue: int
    """Most waiting runs; more are refused."""
    max_len: int
    """Longest sequence in tokens, prompt and output together."""
    vocab: int
    eos: tuple[int, ...] = ()
    caching: bool = True
    """Reuse of computed prefixes. The ledger is built with the same value."""
    chunked: bool = True
    """A prompt may be computed in several steps."""
    recompute_seconds_per_token: float = 1e-3
    """Cost of computing a token again. The default is no measurement: 1.2 GFLOP a token at 1 TFLOP/s,
    a model of 0.6e9 parameters."""
    swap_seconds_per_block: float = 2e-4
    """Cost of moving a block one way. The default is no measurement: 1.8 MB (16 tokens of 112 KiB, the
    same model) at 9 GB/s."""
    processors: tuple[str, ...] = ()
    """Names of the engine's own logits processors."""
    picks: int = PICKS
    """Most tokens of a step after which logits are made, when drafts or callers want more than one a row."""
    steer: tuple[str, ...] = ()
    """Layers that may be steered, ..."""
    width: int = 0
    """... by vectors of so many numbers."""
    padded: Callable[[int], int] = int
    """Tokens that a step computes, of those that are in it."""
    queue_tokens: int = 1 << 22
    """Most prompt tokens of waiting runs together; more are refused, unless nobody waits."""

    def __post_init__(self):
        assert self.budget >= 1 and self.rows >= 1 and self.queue >= 0 and self.max_len >= 2 and self.vocab >= 1


@dataclass(slots=True, eq=False)
class Run:
    """One choice of a request on its way. Only the functions of `fnengine.host` change it."""

    request: Request
    index: int
    """The choice, 0 <= index < n."""
    seed: int
    """Resolved, 64 bits, of this choice."""
    key: Key
    tokens: np.ndarray
    """[capacity] int32; the first `known` are the prompt and what was generated and read."""
    prompt_len: int
    max_tokens: int
    """Effective: never beyond the context."""
    limit: int
    """Length at which it must end: prompt_len + max_tokens."""
    path: Path
    """The computed tokens, those of steps in flight included."""
    known: int
    total: int
    """Tokens of the sequence, those in flight included."""
    until: int
    """Total at which nothing more is computed: the limit, or one more when only the prompt is to be computed."""
    ending: tuple[int, ...] = ()
    """Token ids that end its text, once min_tokens are there."""
    needs: int = 0
    """Bits of `pack`: what its sampling asks of the step that chooses a token for it."""
    draft: tuple[int, ...] = ()
    """Tokens guessed to come after the newest one, for the next step; only while nothing is in flight."""
    drafted: int = 0
    """Draft tokens in flight."""
    patient: bool = False
    """It sits a step out rather than go on from a token that nobody has read: a draft may come of it."""
    guessed: bool = False
    """Somebody guesses drafts for it."""
    guide: Guide | None = None
    """What its text is held to, behind the tokens that are known."""
    masks: np.ndarray | None = None
    """[1 + draft tokens, W] int32: what the guide allows next, and after each token of the draft."""
    base: Path | None = None
    """Of an extension: what is computed already. It is held, by whoever brought it, until the run has ended."""
    wish: Literal["last", "all"] | None = None
    """Of an extension: logits after its last token, or after every one. None for any other run."""
    logits: list[Any] = field(default_factory=list)
    """What came of them so far."""
    likeliest: int = 0
    """Of an extension: so many of the likeliest tokens after its last token, with their log-probabilities, ..."""
    found: tuple[np.ndarray, np.ndarray] | None = None
    """... which are these: ids and log-probabilities."""
    taps: tuple[str, ...] = ()
    """What of the model's inside is wanted at each of its tokens, and what came of it: of an extension all so far, of
    any other run what nobody has taken yet, of tokens that stay."""
    inside: list[Any] = field(default_factory=list)
    seen: int = 0
    """Its tokens of which something came into `inside`, ever; not of an extension."""
    plain: bool = False
    """Beside `needs`, and a mask where it has a guide, it never asks anything of a step that chooses a token for it."""
    suppress: tuple[int, ...] = ()
    suppress_until: int = 0
    """`suppress` may not be chosen for positions before this one."""
    steer: Steering | None = None
    salt: Salt = ""
    """Of its blocks: the request's own and its steering's."""
    status: Literal["waiting", "running", "ended"] = "waiting"
    finish: Finish | None = None
    row: int = -1
    """State row while it has one; kept by an ended run until its steps in flight are committed."""
    inflight: int = 0
    """Steps launched and not committed."""
    newest: bool = False
    """The row holds the newest token already: the device chose it."""
    owed: int = 0
    """Blocks that the rest of its prompt will take."""
    published: int = 0
    """Full blocks handed to the prefix index."""
    slots: tuple[int, ...] = ()
    """Host slots that hold its blocks while it is swapped out."""
    saved: int = 0
    """Tokens of KV in `slots`."""
    since: int = -1
    """`States.stamp` when the state was kept that it began from."""
    scores: list[TokenLogprob] = field(default_factory=list)
    """Of prompt tokens 1, 2, ..., when asked for."""
    scheduled: float | None = None
    """First time a step held one of its tokens; seconds of the engine's clock, like the next two."""
    first_token: float | None = None
    last_token: float | None = None
    preemptions: int = 0
    cached: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""

    @property
    def arrival(self) -> float:
        return self.key[1]

    @property
    def priority(self) -> int:
        return self.key[0]

    @property
    def ended(self) -> bool:
        return self.status == "ended"

    @property
    def generated(self) -> int:
        """Tokens generated and kept."""
        return self.known - self.prompt_len

    @property
    def computed(self) -> int:
        return self.path.length

    def wanted(self) -> int:
        """Tokens to compute now: none once everything that may be generated has been launched."""
        return self.total - self.path.length if self.total < self.until else 0

    def unscored(self) -> bool:
        """Prompt log-probabilities are asked for (they are choice 0's to give) and not complete."""
        return self.index == 0 and self.request.prompt_logprobs is not None and len(self.scores) < self.prompt_len - 1

    def append(self, token: int) -> int:
        """Adds a token that was read; how many are known now."""
        known, tokens = self.known, self.tokens
        if known == len(tokens):
            tokens = self.room(1)
        tokens[known] = token
        self.known = known = known + 1
        return known

    def room(self, n: int) -> np.ndarray:
        """`tokens`, with room for so many more."""
        known, tokens = self.known, self.tokens
        if known + n > len(tokens):
            self.tokens = np.empty(max(min(2 * known, self.limit), known + n) + 1, np.int32)
            self.tokens[:known] = tokens[:known]
        return self.tokens


class Host:
    """The scheduler's state, explicit and mutable: `submit`, `plan`, `commit`, `finish`, `abort` and `fail` change it.

    Args:
        ledger: the books of the device's pool.
        rows: state rows of the device.
        host_slots: blocks of host memory for swapping.
        seed: root of the seeds of requests that bring none.
    """

    def __init__(self, policy: Policy, ledger: Ledger, *, rows: int, host_slots: int = 0, seed: int = 0):
        self.policy, self.ledger, self.seed = policy, ledger, seed
        self.rows = min(rows, policy.rows)
        self.host_slots = host_slots
        self.requests: dict[str, tuple[Run, ...]] = {}
        """Requests with a choice that has not ended."""
        self.running: list[Run] = []
        """Runs with a row, in order of their keys."""
        self.queue: list[tuple[Key, Run]] = []
        """Heap of waiting runs; those that ended while waiting leave when they reach the top."""
        self.waiting = 0
        """Live runs in `queue`."""
        self.waiting_tokens = 0
        """Tokens of their prompts."""
        self.deferred = 0
        """Of those, preempted ones whose steps in flight must be read first."""
        self.ending = 0
        """Ended runs that keep row and blocks until their steps in flight are committed."""
        self.owed = 0
        """Blocks that prompts being computed will still take."""
        self.free_rows = list(range(self.rows - 1, -1, -1))
        self.free_slots = list(range(host_slots - 1, -1, -1))
        self.resting_slots: list[int] = []
        """Slots read by the last plan. A step writes slots before it reads any, so they rest until the next plan."""
        self.leaving: list[tuple[Run, np.ndarray, tuple[int, ...]]] = []
        """(run, blocks, slots) to swap out in the next step that is launched, before anything else."""
        self.numbered = 0
        """Runs submitted, ever."""
        self.unseeded = 0
        """Requests submitted without a seed, ever."""
        self.preemptions = 0
        self.swaps = 0
        """Of the preemptions, those that saved their blocks."""
        self.rejections = 0
        """Requests refused because the queue was full."""
        self.steps = 0
        """Steps planned."""
        self.now = 0.0
        """When the newest plan was made; seconds of the engine's clock."""
        self.preempted: deque[Preempted] = deque(maxlen=RECENT)
        """The newest preemptions, newest last."""

    def new_seed(self) -> int:
        """The next seed for a request that brings none: 64 bits, from the root seed."""
        self.unseeded += 1
        return fold_in(self.seed, self.unseeded)

    def check(self, held: Iterable[Path] | None = ()) -> None:
        """Asserts that rows, slots, blocks and counts balance. For tests and audits.

        Args:
            held: paths that others hold, such as the bases of extensions; None: nobody knows which.
        """
        live = [run for runs in self.requests.values() for run in runs if not run.ended]
        running = [r for r in live if r.status == "running"]
        assert sorted(running, key=key_of) == self.running, "running runs are not those of the requests, in order"
        rows = [r.row for r in self.running]
        assert len(rows) + len(self.free_rows) + self.ending == self.rows, "rows are not conserved"
        assert len({*rows, *self.free_rows}) == len(rows) + len(self.free_rows), "a row has two owners"
        queued = [run for _, run in self.queue if not run.ended]
        assert len(queued) == len(live) - len(running) == self.waiting, "waiting runs are miscounted"
        assert self.waiting_tokens == sum(r.prompt_len for r in queued), "tokens of waiting runs are miscounted"
        assert self.deferred == sum(1 for r in queued if r.inflight), "deferred runs are miscounted"
        assert self.owed == sum(r.owed for r in self.running), "owed blocks are miscounted"
        slots = [s for r in queued for s in r.slots] + self.free_slots + self.resting_slots
        assert sorted(slots) == list(range(self.host_slots)), "host slots are not conserved"
        # Paths of runs that are ending are not listed anywhere but in the plans in flight.
        self.ledger.check(None if self.ending or held is None else [*held, *(r.path for r in self.running)])


def enqueue(host: Host, run: Run) -> None:
    """Puts a run among the waiting, dropping ended ones if they are the most of the heap."""
    if len(host.queue) > 2 * host.waiting + 16:
        host.queue = [e for e in host.queue if not e[1].ended]
        heapq.heapify(host.queue)
    heapq.heappush(host.queue, (run.key, run))
    run.status = "waiting"
    host.waiting += 1
    host.waiting_tokens += run.prompt_len
    host.deferred += run.inflight > 0


def first_waiting(host: Host) -> Run | None:
    """The waiting run to serve next, left where it is."""
    queue = host.queue
    while queue and queue[0][1].ended:
        heapq.heappop(queue)
    return queue[0][1] if queue else None


def preempt(host: Host, run: Run) -> None:
    """Takes row and blocks from a running run, which waits again with its tokens kept.

    Its KV is saved to host memory if slots are free and moving it out and in costs less than computing it again.
    """
    policy, blocks = host.policy, host.ledger.blocks_of(run.path)
    run.draft = ()
    if run.masks is not None:  # of an array with those of a whole step
        run.masks = run.masks[:1].copy()
    if run.base is not None:  # an extension begins again; what is seen of any other run's tokens is so once and for all
        run.logits.clear()
        run.inside.clear()
    _leave(host, run)
    computed = run.path.length - run.drafted  # a draft that is in flight may be wrong
    blocks = blocks[: -(-computed // host.ledger.block)]
    # The base of an extension stays where it is, and neither states nor window blocks are saved: what was kept of them
    # is found again.
    apart = host.ledger.states is not None or host.ledger.windows is not None
    n = 0 if run.base is not None or apart else len(blocks)
    move, redo = 2 * n * policy.swap_seconds_per_block, computed * policy.recompute_seconds_per_token
    if 0 < n <= len(host.free_slots) and move < redo:
        run.slots, run.saved = tuple(host.free_slots[-n:]), computed
        del host.free_slots[-n:]
        host.leaving.append((run, blocks, run.slots))
        host.swaps += 1
    _release(host, run)
    host.preemptions += 1
    run.preemptions += 1
    host.preempted.append(Preempted(run.request.id, run.index, host.now, computed, bool(run.slots)))
    enqueue(host, run)


def end(host: Host, run: Run, reason: Finish) -> None:
    """Ends a run; row and blocks return now, or when its steps in flight have been committed. Twice is harmless."""
    if run.ended:
        return
    run.draft, run.guide, run.masks = (), None, None
    if run.status == "running":
        _leave(host, run)
        if run.inflight:
            host.ending += 1
        else:
            _publish_rest(host, run, reason)
            _release(host, run)
    else:
        host.waiting -= 1
        host.waiting_tokens -= run.prompt_len
        host.deferred -= run.inflight > 0
        drop_saved(host, run)
    run.status, run.finish = "ended", reason
    if all(r.ended for r in host.requests[run.request.id]):
        del host.requests[run.request.id]


def landed(host: Host, run: Run) -> None:
    """Counts a step of the run as read; an ended run lets go of its row and blocks after its last one."""
    run.inflight -= 1
    if run.inflight:
        return
    if run.status == "waiting":
        host.deferred -= 1
    elif run.ended and run.row >= 0:
        host.ending -= 1
        assert run.finish is not None
        _publish_rest(host, run, run.finish)
        _release(host, run)


def drop_saved(host: Host, run: Run) -> None:
    """Forgets the KV a waiting run has in host memory."""
    if run.slots:
        host.leaving = [e for e in host.leaving if e[0] is not run]
        host.free_slots += run.slots
        run.slots, run.saved = (), 0


def _leave(host: Host, run: Run) -> None:
    """Out of the running, with what it owed."""
    at = bisect_left(host.running, run.key, key=key_of)
    assert host.running[at] is run
    del host.running[at]
    host.owed -= run.owed
    run.owed = 0


def _release(host: Host, run: Run) -> None:
    host.ledger.free(run.path)
    host.free_rows.append(run.row)
    run.path, run.row = host.ledger.empty(run.salt), -1
    run.newest, run.published = False, 0


def _publish_rest(host: Host, run: Run, reason: Finish) -> None:
    """Indexes a last full block whose newest token was not known yet when the block was filled."""
    if reason != "error":
        host.ledger.publish(run.path, run.tokens[: min(run.known, run.path.length)])
