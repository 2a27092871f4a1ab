"""The scheduler: `submit` queues a request, `plan` makes the next step, `abort` ends a request; over a `Host`.

A plan walks the running runs in the order of their keys, which are also the order of preemption: whoever needs a block
takes it from the end of the list, from a run that this walk has not reached. So nobody who is in the step already loses
anything, the first run always gets what it needs, and a later run never sends an earlier one back.

    running   a b c d e f     c needs a block and none is left: f goes back to waiting, then e, then d;
              ----^           when c is the last, it sits this step out and keeps what it has

No time is read and nothing is launched here: `now` comes in, a `StepInput` goes out.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fnengine.errors import ContextLengthError, OutOfBlocks, QueueFull, RequestError
from fnengine.host import guide as guiding
from fnengine.host.ask import pipeline_of
from fnengine.host.blocks import Extension, Ledger, Path
from fnengine.host.output import Gauges
from fnengine.host.pack import Draft, add, ask, needs_of, pack
from fnengine.host.pooling import TAP, check_pooling
from fnengine.host.request import MAX_BIAS, PLAIN, Request, Sampling, check_sampling, check_watched, fold_in
from fnengine.host.runs import Host, Policy, Run, end, enqueue, first_waiting, key_of, preempt
from fnengine.host.states import NOWHERE, States
from fnengine.host.steer import salted, steering
from fnengine.host.step import NEWEST, Admission, StepInput

__all__ = ["Host", "Planned", "Policy", "Run", "abort", "extend", "gauges", "pipeline_of", "plan", "submit"]


@dataclass(frozen=True, eq=False)
class Planned:
    """A step to launch, and what `commit` needs to read it."""

    input: StepInput
    runs: tuple[Run, ...]
    """Of each batch row."""
    paths: tuple[Path, ...]
    """Tokens computed after it, of each batch row. Not held: the runs hold them."""
    leaving: tuple[Run, ...]
    """Runs whose blocks this step saves to host memory."""
    prompt_tokens: int
    """Of the new tokens, those of prompts."""
    stamp: int = 0
    """`States.stamp` when it was made."""

    @property
    def before(self) -> tuple[int, ...]:
        """Tokens computed before this step, of each batch row."""
        new = np.diff(self.input.start).tolist()
        return tuple(path.length - n for path, n in zip(self.paths, new, strict=True))


# --- submit -----------------------------------------------------------------------------------------------------------


def submit(host: Host, request: Request, now: float) -> tuple[Run, ...]:
    """The runs of a request, one a choice, waiting from now on.

    Raises:
        RequestError: a token outside the vocabulary, n < 1, too many suppressed ids, a layer that is not steered.
        ContextLengthError: it does not fit the context or the pool; the message holds both numbers.
        RequestError: its guide allows nothing to begin with.
        QueueFull: too many wait already.
    """
    max_tokens = _check(host, request)
    steer = steering(request.steer, host.policy.steer, host.policy.width)
    salt = salted(request.salt, steer)
    if host.waiting + request.n > host.policy.queue:
        host.rejections += 1
        raise QueueFull(
            f"{host.waiting} sequences wait already, {request.n} more do not fit the queue of {host.policy.queue}",
            remedy="try again later",
        )
    more = request.n * len(request.prompt)
    if host.waiting and host.waiting_tokens + more > host.policy.queue_tokens:
        host.rejections += 1
        raise QueueFull(
            f"{host.waiting_tokens} prompt tokens wait already, {more} more do not fit the queue, which takes "
            f"{host.policy.queue_tokens}",
            remedy="try again later",
        )
    assert request.id not in host.requests, f"request id {request.id!r} is in use"
    policy, stop, sampling = host.policy, request.stop, request.sampling
    seed = host.new_seed() if sampling.seed is None else sampling.seed
    prompt = np.ascontiguousarray(request.prompt, np.int32)
    n, ending = len(prompt), _ending(policy, request)
    runs = tuple(
        Run(
            request=request,
            index=i,
            seed=fold_in(seed, i),
            key=(request.priority, now, host.numbered + i),
            tokens=prompt,
            prompt_len=n,
            max_tokens=max_tokens,
            limit=n + max_tokens,
            path=host.ledger.empty(salt),
            known=n,
            total=n,
            until=n + max_tokens + (max_tokens == 0),
            ending=ending,
            needs=needs_of(sampling),
            plain=request.logprobs is None and not stop.min_tokens,
            suppress=ending if stop.min_tokens else (),
            suppress_until=n + stop.min_tokens if stop.min_tokens else 0,
            steer=steer,
            salt=salt,
            base=None if request.pooling is None else host.ledger.empty(salt),
            taps=() if request.pooling is None else (TAP,),
        )
        for i in range(request.n)
    )
    if request.guide is not None:
        mask_1W = guiding.first(request)
        for run in runs:
            guiding.begin(run, request.guide.fork(), mask_1W)
    host.numbered += request.n
    host.requests[request.id] = runs
    for run in runs:
        enqueue(host, run)
    return runs


def extend(
    host: Host,
    id: str,
    base: Path,
    tokens: np.ndarray,
    *,
    prompt_len: int,
    sampling: Sampling | None,
    seed: int,
    wish: Literal["last", "all"] | None,
    taps: tuple[str, ...] = (),
    likeliest: int = 0,
    priority: int,
    arrival: float,
) -> Run:
    """The extension of a path, waiting from now on; `commit` ends it with an event that has the longer path.

    Args:
        base: held by the caller until the run has ended.
        tokens: [n] int32 of the whole sequence, more of them than `base` has; nobody writes to it.
        sampling: how the token after it is chosen; None chooses none.
        arrival: of whoever wants it: those who came earlier are served first.
    """
    n = len(tokens)
    assert n > base.length and id not in host.requests, "nothing to compute, or an id in use"
    request = Request(id, tokens, sampling or PLAIN, priority=priority, arrival=arrival)
    chosen = int(sampling is not None)
    run = Run(
        request=request,
        index=0,
        seed=seed,
        key=(priority, arrival, host.numbered),
        tokens=tokens,
        prompt_len=prompt_len,
        max_tokens=chosen,
        limit=n + chosen,
        path=host.ledger.empty(base.salt),
        known=n,
        total=n,
        until=n + 1,
        needs=needs_of(sampling) if sampling is not None else 0,
        plain=True,
        salt=base.salt,
        base=base,
        wish=wish,
        taps=taps,
        likeliest=likeliest,
    )
    host.numbered += 1
    host.requests[id] = (run,)
    enqueue(host, run)
    return run


def stand_in(host: Host, request: Request, index: int, seed: int) -> Run:
    """A run that nobody plans, for a choice whose tokens come from elsewhere: what is told of choices is told of it."""
    prompt = np.ascontiguousarray(request.prompt, np.int32)
    n = len(prompt)
    host.numbered += 1
    return Run(
        request=request,
        index=index,
        seed=seed,
        key=(request.priority, request.arrival, host.numbered),
        tokens=prompt,
        prompt_len=n,
        max_tokens=request.stop.max_tokens or 0,
        limit=n,
        path=host.ledger.empty(request.salt),
        known=n,
        total=n,
        until=n,
        status="running",
    )


def _ending(policy: Policy, request: Request) -> tuple[int, ...]:
    """Ids that end the request's text, each once."""
    eos = () if request.stop.ignore_eos else policy.eos
    return tuple(dict.fromkeys((*eos, *request.stop.ids)))


def _check(host: Host, request: Request) -> int:
    """Effective max_tokens of a request that can be served."""
    policy, stop, vocab = host.policy, request.stop, host.policy.vocab
    prompt = np.asarray(request.prompt)
    n = len(prompt)
    if request.n < 1:
        raise RequestError(f"n must be at least 1, got {request.n}", param="n")
    if n == 0:
        raise RequestError("a prompt has at least one token", param="prompt")
    check_pooling(request.pooling)
    if request.pooling is not None and (request.n, stop.max_tokens, request.prompt_logprobs) != (1, 0, None):
        raise RequestError(
            "an embedding is no text", param="pooling", remedy="n=1, max_tokens=0 and no log-probabilities"
        )
    if prompt.min() < 0 or prompt.max() >= vocab:
        bad = int(prompt[(prompt < 0) | (prompt >= vocab)][0])
        raise RequestError(f"token {bad} is outside the vocabulary of {vocab}", param="prompt")
    check_sampling(request.sampling, vocab, policy.processors)
    check_watched(request, vocab)
    for i in stop.ids:
        if not 0 <= i < vocab:
            raise RequestError(f"token {i} is outside the vocabulary of {vocab}", param="stop_token_ids")
    if stop.min_tokens and len(request.sampling.logit_bias) + len(_ending(policy, request)) > MAX_BIAS:
        raise RequestError(
            f"logit_bias, stop ids and end-of-sequence ids make more than {MAX_BIAS} entries", param="stop_token_ids"
        )
    # The last token that is generated is never computed, so a pool of p tokens serves a sequence of p + 1.
    room = policy.max_len - n
    pool = host.ledger.total * host.ledger.block + 1 - n  # layers with a window need a window of it, which is there
    if room < min(1, 1 if stop.max_tokens is None else stop.max_tokens):
        raise ContextLengthError(
            f"the prompt has {n} tokens, the context holds {policy.max_len}, prompt and output together",
            param="prompt",
            remedy="shorten the prompt",
        )
    if stop.max_tokens is None:
        wanted, room = 1, min(room, pool)
        max_tokens = room
    else:
        max_tokens = wanted = min(stop.max_tokens, room)
    if max(wanted, 1) > pool:
        raise ContextLengthError(
            f"{n} prompt tokens and {wanted} to generate do not fit the KV pool, which holds a sequence of {n + pool}",
            param="max_tokens" if pool > 0 else "prompt",
            remedy="ask for less, or make the pool larger with --kv-cache-memory-bytes",
        )
    if stop.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {stop.min_tokens}, only {max_tokens} tokens can be generated", param="min_tokens"
        )
    return max_tokens


# --- plan -------------------------------------------------------------------------------------------------------------


def plan(host: Host, now: float) -> Planned | None:
    """The next step, or None if there is nothing to compute now. Every step that is returned must be launched in order,
    and then committed (or failed) in order."""
    ledger, host.now = host.ledger, now
    ledger.settle()
    if ledger.states is not None:
        ledger.states.settle()
    if host.resting_slots:
        host.free_slots += host.resting_slots
        host.resting_slots.clear()
    running, i = host.running, 0
    _thin(host)
    reserved = sum([r.total - r.path.length == 1 and r.total < r.until for r in running])
    walk = _Walk(host.policy.budget, reserved, max(host.policy.picks - len(running), 1))
    urgent = _most_urgent(host)
    while i < len(running):
        run = running[i]
        if urgent < run.key[0] and not walk.shut:
            # More urgent than this run and all after it: it may take their place.
            first = first_waiting(host)
            assert first is not None
            if _admit(host, walk, first, now, urgent=True):
                i += 1
            else:
                walk.shut = True
            urgent = _most_urgent(host)
            continue
        if run.patient and run.newest and run.inflight:
            walk.reserved -= run.wanted() == 1  # nothing was kept for one whose last token is on its way
        elif run.draft and _verify(host, walk, run):
            pass
        elif not (run.newest and _generate(ledger, walk, run)):
            _advance(host, walk, run)
        i += 1
    draft = walk.draft
    aside: list[Run] = []
    if ledger.states is not None:  # before anybody is admitted, who may begin from one of them
        _keep(ledger.states, draft)
    while host.waiting and not walk.shut and (first := first_waiting(host)):
        if len(aside) < len(host.free_rows) and _comes(host, first):
            aside.append(heapq.heappop(host.queue)[1])  # those behind it are served meanwhile
        else:
            walk.shut = not _admit(host, walk, first, now, urgent=False)
    for run in aside:
        heapq.heappush(host.queue, (run.key, run))
    if not draft.runs and not draft.many:
        return None
    if ledger.states is not None:
        draft.keep = ledger.states.drain()
    host.steps += 1
    draft.nears = None if ledger.windows is None else ledger.nears_of
    step = pack(draft, host.leaving)
    leaving = tuple([e[0] for e in host.leaving])
    host.leaving = []
    runs = (*draft.runs, *[m[0] for m in draft.many])
    stamp = 0 if ledger.states is None else ledger.states.stamp
    return Planned(step, runs, tuple([run.path for run in runs]), leaving, walk.prompt_tokens, stamp)


def _thin(host: Host) -> None:
    """Leaves out what must come where it would make the step larger by more than twice as many tokens: a step of 32
    rows and 2 such tokens may be padded to 40. Each comes alone then, by its mask; guesses have a pace of their own."""
    must = [run for run in host.running if run.draft and run.guide is not None and not run.guessed]
    if not must:
        return
    padded, more = host.policy.padded, sum([len(run.draft) for run in must])
    rest = sum([max(run.wanted(), 1 + len(run.draft)) for run in host.running]) - more
    rest = min(rest, host.policy.budget)
    if padded(rest + more) - padded(rest) > 2 * more:
        for run in must:
            run.draft = ()


def _keep(states: States, draft: Draft) -> None:
    """Puts into the step the states that are to be kept before it, where rows stand at such a place."""
    fresh = {a.row for a in draft.admit}
    for run, n in [*((run, 1) for run in draft.runs), *((m[0], m[2]) for m in draft.many)]:
        before = run.path.length - n
        if states.wanted(before, _prompt_of(run)) and run.row not in fresh:
            states.keep(run.path, before, run.row)


def _comes(host: Host, run: Run) -> bool:
    """Whether somebody is computing the first tokens of a waiting run, up to a place whose state will be kept: blocks
    are shared within a step, states only after it, so choices and equal prompts would all compute what one has to."""
    states = host.ledger.states
    if states is None or not states.count or not host.policy.chunked or not host.policy.caching:
        return False
    if run.base is not None or run.taps or run.unscored():  # it computes all of its prompt anyway
        return False
    for other in host.running:
        at, prompt, known = other.path.length, _prompt_of(other), min(other.known, run.known)
        place = at if states.wanted(at, prompt) else at + states.chunk(at, known, prompt)
        if place < known and other.salt == run.salt and np.array_equal(run.tokens[:place], other.tokens[:place]):
            return True
    return False


def _prompt_of(run: Run) -> int:
    """Tokens of the run that were there when it began."""
    return run.prompt_len if run.base is None else run.known


def _chunk(host: Host, walk: _Walk, run: Run, computed: int) -> int:
    """How many of the run's next tokens the step takes; 0 for none."""
    n = walk.chunk(run.total - computed, host.policy.chunked)
    if host.ledger.states is not None and host.policy.chunked:
        n = host.ledger.states.chunk(computed, n, _prompt_of(run))
    return n


def _most_urgent(host: Host) -> float:
    """Priority of the first waiting run; infinite when nobody waits. What a plan preempts is never before those that
    it has still to look at, so only an admission changes what this means to it."""
    first = first_waiting(host)
    return math.inf if first is None else first.priority


class _Walk:
    """Where a plan stands."""

    __slots__ = ("draft", "left", "picks", "prompt_tokens", "reserved", "shut")

    def __init__(self, budget: int, reserved: int, picks: int):
        self.draft = Draft()
        self.picks = picks
        """Tokens of more than one a row after which logits may still be wanted."""
        self.left = budget
        """Tokens of the budget not given out."""
        self.reserved = reserved
        """Of those, kept for runs further on that want one token, so that prompts do not stop generation."""
        self.prompt_tokens = 0
        self.shut = False
        """Nobody is admitted any more."""

    def chunk(self, want: int, chunked: bool) -> int:
        """How many of the wanted tokens of a prompt the step takes; 0 for none."""
        room = max(self.left - self.reserved, 0)
        if chunked:
            return min(want, room)
        return want if want <= room or not (self.draft.many or self.prompt_tokens) else 0


def _generate(ledger: Ledger, walk: _Walk, run: Run) -> bool:
    """What `_advance` does with a run that goes on generating and need not wait for a block; False, and nothing done,
    with any other. Nearly all rows of most steps are such, and this is all that a plan costs for them."""
    total, before, draft = run.total, run.path, walk.draft
    if before.length + 1 != total or total >= run.until or run.owed or not walk.left or total <= run.prompt_len:
        return False
    path = ledger.advance(before, 1)
    if path is None:
        return False
    run.path = path
    if (tip := path.tip) is not before.tip:
        assert tip is not None
        draft.grow.append((run.row, tip.column, tip.block))
    walk.reserved -= 1
    walk.left -= 1
    full = run.known // ledger.block
    if full > run.published:
        ledger.publish(path, run.tokens[: full * ledger.block])
        run.published = full
    draft.runs.append(run)
    draft.row.append(run.row)
    draft.token.append(NEWEST)
    draft.emit.append(1)
    if run.guide is not None:
        draft.masked = True
    if run.plain:
        draft.needs |= run.needs
    else:
        ask(draft, run)
    run.inflight += 1
    run.total = total + 1
    return True


def _verify(host: Host, walk: _Walk, run: Run) -> bool:
    """Puts a run's newest token and as much of its draft into the step as budget, blocks and length allow; False, and
    the draft dropped, if that is none of it. Nobody gives up a block for a guess."""
    draft, run.draft = run.draft, ()
    ledger, known, before = host.ledger, run.known, run.path.length
    if run.inflight or before + 1 != known or known != run.total:
        return False
    B = ledger.block
    room = _room(host) * B + -before % B
    k = min(len(draft), run.limit - known - 1, walk.left - walk.reserved, room - 1, walk.picks)
    if ledger.states is not None:  # a draft ends, too, where a state is wanted
        k = ledger.states.chunk(before, k + 1, _prompt_of(run)) - 1
    if k <= 0:
        return False
    try:
        extension = ledger.extend(run.path, k + 1)
    except OutOfBlocks:  # a block that is copied from is not to be had yet
        return False
    run.room(k)[known : known + k] = draft[:k]
    ledger.free(run.path)
    run.path, run.drafted, run.total = extension.path, k, known + k
    walk.draft.grow += [(run.row, column, block) for column, block in extension.grown]
    walk.draft.copy += extension.copy
    walk.draft.near_copy += extension.near_copy
    walk.reserved -= 1
    walk.left -= k + 1
    walk.picks -= k
    full = known // B
    if full > run.published:
        ledger.publish(run.path, run.tokens[: full * B])
        run.published = full
    add(walk.draft, run, k + 1, k + 1)
    run.inflight += 1
    run.newest = False
    return True


def _advance(host: Host, walk: _Walk, run: Run) -> None:
    """Puts a running run's next tokens into the step, if budget and blocks allow."""
    want = run.total - run.path.length  # run.wanted(), spelt out for the many
    if want <= 0 or run.total >= run.until:
        return
    ledger = host.ledger
    if want == 1:
        walk.reserved -= 1
        n = min(walk.left, 1)
    else:
        n = _chunk(host, walk, run, run.path.length)
    if run.wish == "all":
        n = min(n, walk.picks)
    if n <= 0:
        return
    run.path = ledger.trim(run.path, run.path.length)
    while True:
        try:
            extension = ledger.extend(run.path, n)
            break
        except OutOfBlocks:
            # Blocks of runs that ended come back by themselves; a run after this one gives up its own, the last first.
            if not host.ending and host.running[-1] is not run:
                _preempt_last(host, walk)
                continue
            fits = ledger.available * ledger.block + -run.path.length % ledger.block
            if not host.policy.chunked or not 0 < fits < n:
                return
            n = fits
    ledger.free(run.path)
    run.path = extension.path
    if extension.grown:
        walk.draft.grow += [(run.row, column, block) for column, block in extension.grown]
        if extension.copy:
            walk.draft.copy += extension.copy
            walk.draft.near_copy += extension.near_copy
    _take(host, walk, run, n)


def _take(host: Host, walk: _Walk, run: Run, n: int) -> None:
    """The run's path has grown by `n` tokens: counts them, publishes what is full, drafts its batch row."""
    computed, known, total, B = run.path.length, run.known, run.total, host.ledger.block
    walk.left -= n
    walk.picks -= n if run.wish == "all" else 0
    if computed - n < run.prompt_len:
        walk.prompt_tokens += min(computed, run.prompt_len) - (computed - n)
    full = (known if known < computed else computed) // B
    if full > run.published:
        host.ledger.publish(run.path, run.tokens[: full * B])
        run.published = full
    if run.owed or computed < total:
        owed = -(-total // B) - -(-computed // B)
        host.owed += owed - run.owed
        run.owed = owed
    emits = computed == total < run.limit
    add(walk.draft, run, n, int(emits))
    run.inflight += 1
    run.newest = emits
    run.total += emits


def _preempt_last(host: Host, walk: _Walk) -> None:
    last = host.running[-1]
    walk.reserved -= last.wanted() == 1
    preempt(host, last)


def _admit(host: Host, walk: _Walk, run: Run, now: float, *, urgent: bool) -> bool:
    """Gives the first waiting run a row and its first tokens; False if it has to wait, and everyone behind it.

    It needs blocks for all its tokens beside what running prompts will still take, so that it is not sent back at once.
    An `urgent` run may send back runs of strictly lower priority; none of them is in the step yet.
    """
    if run.inflight:  # preempted with a token on its way: the row that held it is gone, so it must be read first
        return False
    ledger, B, running = host.ledger, host.ledger.block, host.running
    while not host.free_rows:
        if not urgent or host.ending or running[-1].priority <= run.priority:
            return False
        _preempt_last(host, walk)
    if walk.left - walk.reserved <= 0 and host.policy.chunked:
        return False
    if run.base is not None and (
        run.base.length or run.wish == "all" or (run.taps and run.request.pooling != "last")
    ):  # every token after the base is wanted, also those that the cache has
        path = ledger.share(run.base)
    else:
        # What is found in the cache is not computed, and so neither scored nor seen.
        n = min(len(run.scores) + 1, run.known) if run.unscored() else run.known
        n = min(run.seen + 1, n) if run.taps and run.base is None else n
        path = ledger.match(run.tokens[:n], run.salt, count=False)
    place = since = NOWHERE
    if ledger.states is not None:
        whole = path
        length, place = ledger.states.find(whole)
        since = ledger.states.when(place)
        path = ledger.cut(whole, length)
        ledger.free(whole)
    path = ledger.resumed(path)
    base = max(path.length, run.saved)
    n = _chunk(host, walk, run, base)
    if run.wish == "all":
        n = min(n, walk.picks)
    if n <= 0:
        ledger.free(path)
        return False
    while running and not _fits(host, path, run.total, base + n):
        if not urgent or host.ending or running[-1].priority <= run.priority:
            break
        _preempt_last(host, walk)
    alone = not running and not host.ending
    extension = None
    if alone or _fits(host, path, run.total, base + n):
        extension = _extend(ledger, path, base + n - path.length)
    if extension is None:
        ledger.free(path)
        return False
    popped = heapq.heappop(host.queue)[1]
    assert popped is run
    host.waiting -= 1
    host.waiting_tokens -= run.prompt_len
    if run.scheduled is None:
        run.scheduled, run.cached = now, path.length
        if host.policy.caching and not run.unscored() and run.base is None and not run.taps:
            ledger.queries += run.known
            ledger.hits += path.length
    blocks = ledger.blocks_of(extension.path)
    if run.slots:
        first = path.length // B
        if path.length < run.saved:
            walk.draft.swap_in += list(zip(run.slots[first:], blocks[first : len(run.slots)].tolist(), strict=True))
        host.resting_slots += run.slots
        run.slots, run.saved = (), 0
    ledger.free(path)
    walk.draft.copy += extension.copy
    walk.draft.near_copy += extension.near_copy
    run.path, run.status, run.row, run.since = extension.path, "running", host.free_rows.pop(), since
    insort(running, run, key=key_of)
    walk.draft.admit.append(
        Admission(
            row=run.row,
            length=base,
            blocks=blocks,
            tokens=run.tokens[: run.known],
            prompt_len=run.prompt_len,
            sampling=run.request.sampling,
            seed=run.seed,
            suppress=run.suppress,
            suppress_until=run.suppress_until,
            state=place,
            near=None if ledger.windows is None else ledger.nears_of(blocks.tolist()),
            steer=() if run.steer is None else run.steer.vectors,
            watched=run.request.watched,
        )
    )
    _take(host, walk, run, n)
    return True


def _extend(ledger: Ledger, path: Path, n: int) -> Extension | None:
    try:
        return ledger.extend(path, n)
    except OutOfBlocks:
        return None


def _fits(host: Host, path: Path, total: int, upto: int) -> bool:
    """Whether a run that begins after `path` has blocks for all of its `total` tokens, and window blocks for those up
    to `upto` and for the most that it will hold, beside what running prompts will still take."""
    ledger, B, windows = host.ledger, host.ledger.block, host.ledger.windows
    if -(-total // B) - path.length // B + host.owed + _spare(host) > ledger.spare:
        return False
    if windows is None:
        return True
    now = -(-upto // B) - path.length // B
    later = min(-(-total // B), windows.span + 1) - (-(-path.length // B) - path.low)
    owed = sum([min(r.owed, windows.span) for r in host.running if r.owed])
    return max(now, later) + owed + len(host.running) <= windows.available


def _room(host: Host) -> int:
    """Blocks, with window blocks where there are such, that running prompts leave."""
    ledger, windows = host.ledger, host.ledger.windows
    n = ledger.spare - host.owed
    if windows is not None:
        n = min(n, windows.available - min(host.owed, windows.span))
    return max(n, 0)


def _spare(host: Host) -> int:
    """Blocks left alone when a run is admitted, so that those running can grow for a while."""
    return max(1, host.ledger.total // 100) if host.running else 0


# --- abort, gauges ----------------------------------------------------------------------------------------------------


def abort(host: Host, request_id: str) -> None:
    """Ends every choice of a request, wherever it stands. Safe at any time, for unknown ids, and twice."""
    for run in host.requests.get(request_id, ()):
        end(host, run, "abort")


def gauges(host: Host) -> Gauges:
    """A reading of the scheduler; `steps` counts plans and `recompiles` is left at 0."""
    ledger, windows = host.ledger, host.ledger.windows
    return Gauges(
        running=len(host.running),
        waiting=host.waiting,
        waiting_by_reason=(("capacity", host.waiting - host.deferred), ("deferred", host.deferred)),
        kv_usage=ledger.held / ledger.total if ledger.total else 0.0,
        kv_waste=ledger.waste(),
        blocks_total=ledger.total,
        blocks_held=ledger.held,
        blocks_cached=ledger.cached,
        prefix_queries=ledger.queries,
        prefix_hits=ledger.hits,
        preemptions=host.preemptions,
        swaps=host.swaps,
        rejections=host.rejections,
        steps=host.steps,
        recompiles=0,
        window_blocks_total=0 if windows is None else windows.total,
        window_blocks_held=0 if windows is None else windows.held,
        window_blocks_cached=0 if windows is None else windows.cached,
    )
