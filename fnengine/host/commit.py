"""What a step gave, taken into the books: tokens, ends, log-probabilities. `finish` and `fail` end runs early.

A token that was launched before its run's end was known is dropped here and moves nothing. Stop strings are not decided
here: whoever makes text of the tokens finds them and calls `finish`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fnengine.errors import RequestError
from fnengine.host import guide as guiding
from fnengine.host.blocks import Path
from fnengine.host.output import Finish, TokenLogprob
from fnengine.host.plan import Planned
from fnengine.host.pooling import fold
from fnengine.host.runs import Host, Run, drop_saved, end, landed
from fnengine.host.step import Scores, StepOutput
from fnengine.host.windows import BACK


class Event(NamedTuple):
    """What a step did for one run. A step that only computed a part of a prompt makes none."""

    run: Run
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token, when asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One per prompt token, None for the first; once, when the prompt has been computed."""
    finish: Finish | None = None
    stop_token: int | None = None
    """The end-of-sequence or stop id that ended the run; it is the last of `tokens`."""
    first: bool = False
    """This is the first token of the run."""
    gap: float | None = None
    """Seconds since the token before."""
    error: str | None = None
    """With finish == "error"."""
    proposed: int = 0
    """Draft tokens that the step verified."""
    accepted: int = 0
    """Of those, found right."""
    path: Path | None = None
    """Of an extension that has come to its end: everything that is computed, held; whoever takes it lets it go. None
    where it was for an embedding."""


_tuple = tuple.__new__


def commit(host: Host, planned: Planned, output: StepOutput, now: float) -> list[Event]:
    """Events of a step that was read, in the order of its batch rows. Steps are committed in the order of plans."""
    step, events = planned.input, []
    guided: list[int] = []
    emit, token = step.emit.tolist(), output.token[:, 0].tolist()
    W = output.token.shape[1]
    if W == 1:
        assert (output.count == step.emit).all(), "the device chose other tokens than it was asked for"
    scored, scores = step.ask.score is not None, output.logprobs
    for r, run in enumerate(planned.runs):
        if run.status == "running":  # what `landed` does for most
            run.inflight -= 1
        else:
            landed(host, run)
            if run.status == "ended":
                continue
        if scored and run.unscored():
            _score(planned, output, r, run)
        if run.taps and run.base is None:
            _see(planned, output, r, run)
        if run.base is not None:
            _collect(host, planned, output, r, run, events)
        elif run.drafted:
            events.append(_judge(host, run, output, r, now))
            if run.guide is not None:  # an ended run has none
                guided.append(len(events) - 1)
        elif emit[r]:
            logprobs = None
            if scores is not None and (k := run.request.logprobs) is not None:
                logprobs = (_logprob(scores, r * W, token[r], k, run.request.watched),)
            events.append(_append(host, run, token[r], logprobs, now))
            if run.guide is not None:
                guided.append(len(events) - 1)
        elif run.until > run.limit and planned.paths[r].length == run.limit:
            end(host, run, "length")
            events.append(Event(run, prompt_logprobs=_scores_of(run), finish="length"))
    if guided:
        for i, error in guiding.look([events[at].run for at in guided]).items():
            event = events[guided[i]]
            events[guided[i]] = _refused(host, event.run, error)._replace(tokens=event.tokens, logprobs=event.logprobs)
    return events


def _collect(host: Host, planned: Planned, output: StepOutput, r: int, run: Run, events: list[Event]) -> None:
    """Takes an extension's logits, and ends it when all its tokens are computed."""
    assert run.base is not None
    if run.status != "running":  # sent back while the step was in flight: its blocks are gone
        run.total = run.known
        return
    step, whole = planned.input, planned.paths[r].length == run.known
    a, b = int(step.start[r]), int(step.start[r + 1])
    again = max(run.base.length - (planned.paths[r].length - (b - a)), 0)  # tokens of the base, computed once more
    if run.wish == "all" or (run.wish == "last" and whole):
        picked = step.picked()
        last = int(picked[r + 1])
        first = int(picked[r]) + again if run.wish == "all" else last - 1
        run.logits.append(output.logits[first:last])
    if run.taps:
        seen = tuple(output.taps[step.ask.taps.index(name)][a + again : b] for name in run.taps)
        pooling = run.request.pooling
        run.inside = [*run.inside, seen] if pooling is None else fold(pooling, run.inside, seen[0])
    if not whole:
        return
    if run.likeliest:
        assert output.logprobs is not None
        at, k = r * output.token.shape[1], run.likeliest
        run.found = output.logprobs.top_ids[at, :k], output.logprobs.top[at, :k]
    tokens = (int(output.token[r, 0]),) if step.emit[r] else ()
    path = host.ledger.share(run.path) if run.request.pooling is None else None  # nobody goes on from an embedding
    if path is not None:
        path = host.ledger.trim(path, path.length - BACK)
    if path is not None and host.ledger.states is not None:  # whoever gets it will go on from here, most likely
        host.ledger.states.keep(path, path.length, run.row)
    end(host, run, "length")
    events.append(Event(run, tokens, finish="length", path=path))


def _judge(host: Host, run: Run, output: StepOutput, r: int, now: float) -> Event:
    """The run with as much of its draft as was right and the token chosen after that, and the rest of its path cut."""
    W, n = output.token.shape[1], int(output.count[r])
    assert 1 <= n <= run.drafted + 1, "the device chose other tokens than it was asked for"
    k = run.request.logprobs if output.logprobs is not None else None
    proposed, run.drafted, event = run.drafted, 0, None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    for j, token in enumerate(output.token[r, :n].tolist()):
        scores = None
        if k is not None and output.logprobs is not None:
            scores = (_logprob(output.logprobs, r * W + j, token, k, run.request.watched),)
        one = _append(host, run, token, scores, now)
        tokens, logprobs = tokens + one.tokens, logprobs + (one.logprobs or ())
        event = one if event is None else event._replace(finish=one.finish, stop_token=one.stop_token, error=one.error)
        if one.finish is not None:
            break
    assert event is not None
    if run.status == "running":  # else it has ended, or was sent back, and holds no path
        cut = host.ledger.cut(run.path, run.known - 1)
        host.ledger.free(run.path)
        run.path, run.newest = cut, True
    run.total = run.known
    return event._replace(tokens=tokens, logprobs=None if k is None else logprobs, proposed=proposed, accepted=n - 1)


def _append(host: Host, run: Run, token: int, logprobs: tuple[TokenLogprob, ...] | None, now: float) -> Event:
    """The run with one more token, ended if that was its last."""
    last, run.last_token = run.last_token, now
    known, complete = run.append(token), False
    if run.guide is not None:  # which is asked about an end as well: where nothing is left to choose, any token comes
        try:
            complete = guiding.follow(run, token)
        except RequestError as e:
            run.known = known - 1  # nobody is told of the token
            return _refused(host, run, e)
    if last is not None and known != run.limit and token not in run.ending and not complete:
        # For nearly every token; costs half of what calling the class costs.
        return _tuple(Event, (run, (token,), logprobs, None, None, None, False, now - last, None, 0, 0, None))
    first = last is None
    if first:
        run.first_token = now
    finish, stop_token = None, None
    if token in run.ending and run.generated > run.request.stop.min_tokens:
        finish, stop_token = "stop", token
    elif known == run.limit:
        finish = "length"
    if complete:
        finish = "stop"
    if finish is not None:
        end(host, run, finish)
    gap, prompt_logprobs = (None, _scores_of(run)) if last is None else (now - last, None)
    return Event(run, (token,), logprobs, prompt_logprobs, finish, stop_token, first, gap)


def _refused(host: Host, run: Run, error: RequestError) -> Event:
    """The run, ended where its guide lets it go on no more."""
    end(host, run, "error")
    return Event(run, finish="error", error=str(error))


def finish(host: Host, run: Run, reason: Finish) -> None:
    """Ends a run for a reason found outside, such as a stop string; a token it has in flight will be dropped."""
    end(host, run, reason)


def fail(host: Host, planned: Planned, error: str) -> list[Event]:
    """Error events of a step that failed, in place of `commit`.

    Its runs end, and so do runs that stand on blocks it should have written, on KV it should have saved or on states
    that were kept since it was planned: what those hold is unknown. Nothing of it stays in the prefix index. Everybody
    else goes on.
    """
    ledger, lost = host.ledger, set()
    events = []
    if ledger.states is not None:
        ledger.states.forget_since(planned.stamp)

    def fail_run(run: Run) -> None:
        if not run.ended:
            end(host, run, "error")
            events.append(Event(run, finish="error", error=error))

    for run, path, before in zip(planned.runs, planned.paths, planned.before, strict=True):
        lost |= ledger.unpublish(path, before)
        landed(host, run)
        fail_run(run)
    for run in planned.leaving:
        if run.status == "running":
            fail_run(run)
        elif not run.ended:
            drop_saved(host, run)
    begun = planned.stamp if ledger.states is not None else math.inf  # a state that was kept since may be wrong, too
    for run in [r for r in host.running if r.since >= begun or ledger.stands_on(r.path, lost)]:
        fail_run(run)
    return events


def _score(planned: Planned, output: StepOutput, r: int, run: Run) -> None:
    """Adds the scores of batch row `r` to its run."""
    step = planned.input
    k, watched = run.request.prompt_logprobs, run.request.watched
    assert output.score is not None and step.target is not None and k is not None
    for t in range(step.start[r], step.start[r + 1]):
        if (target := int(step.target[t])) >= 0:
            run.scores.append(_logprob(output.score, t, target, k, watched))


def _see(planned: Planned, output: StepOutput, r: int, run: Run) -> None:
    """Keeps what was seen of the tokens of batch row `r`: not of a draft's wrong ones, and of those that are computed
    again, after a preemption, not again."""
    step = planned.input
    begin, n = int(step.start[r]), int(step.start[r + 1] - step.start[r])
    before = planned.paths[r].length - n
    stay = before + (int(output.count[r]) if run.drafted else n)
    if stay > run.seen:
        assert before <= run.seen, "tokens were computed that nobody saw"
        a, b = begin + run.seen - before, begin + stay - before
        run.inside.append(tuple(output.taps[step.ask.taps.index(name)][a:b] for name in run.taps))
        run.seen = stay


def _scores_of(run: Run) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's log-probabilities, if they were asked of this run."""
    if run.index or run.request.prompt_logprobs is None:
        return None
    assert not run.unscored(), "a prompt was computed but not scored"
    return (None, *run.scores)


def _logprob(scores: Scores, at: int, token: int, k: int, watched: tuple[int, ...]) -> TokenLogprob:
    top = tuple(zip(scores.top_ids[at, :k].tolist(), scores.top[at, :k].tolist(), strict=True))
    if not watched:
        return TokenLogprob(token, float(scores.chosen[at]), top)
    assert scores.watched is not None
    seen = zip(watched, scores.watched[at, : len(watched)].tolist(), strict=True)
    return TokenLogprob(token, float(scores.chosen[at]), top, tuple(seen))
