"""What a step gave, taken into the books: tokens, ends, log-probabilities. `finish` and `fail` end runs early.

A token that was launched before its run's end was known is dropped here and moves nothing. Stop strings are not decided
here: whoever makes text of the tokens finds them and calls `finish`.
"""

from __future__ import annotations

from typing import NamedTuple

from fnengine.host.output import Finish, TokenLogprob
from fnengine.host.plan import Planned
from fnengine.host.runs import Host, Run, drop_saved, end, landed
from fnengine.host.step import Scores, StepOutput


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


_tuple = tuple.__new__


def commit(host: Host, planned: Planned, output: StepOutput, now: float) -> list[Event]:
    """Events of a step that was read, in the order of its batch rows. Steps are committed in the order of plans."""
    step, events = planned.input, []
    emit, token = step.emit.tolist(), output.token[:, 0].tolist()
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
        if emit[r]:
            logprobs = None
            if scores is not None and (k := run.request.logprobs) is not None:
                logprobs = (_logprob(scores, r, token[r], k),)
            events.append(_append(host, run, token[r], logprobs, now))
        elif run.max_tokens == 0 and planned.paths[r].length == run.prompt_len:
            end(host, run, "length")
            events.append(Event(run, prompt_logprobs=_scores_of(run), finish="length"))
    return events


def _append(host: Host, run: Run, token: int, logprobs: tuple[TokenLogprob, ...] | None, now: float) -> Event:
    """The run with one more token, ended if that was its last."""
    last, run.last_token = run.last_token, now
    known = run.append(token)
    if last is not None and known != run.limit and token not in run.ending:
        # For nearly every token; costs half of what calling the class costs.
        return _tuple(Event, (run, (token,), logprobs, None, None, None, False, now - last, None))
    first = last is None
    if first:
        run.first_token = now
    finish, stop_token = None, None
    if token in run.ending and run.generated > run.request.stop.min_tokens:
        finish, stop_token = "stop", token
    elif known == run.limit:
        finish = "length"
    if finish is not None:
        end(host, run, finish)
    gap, prompt_logprobs = (None, _scores_of(run)) if last is None else (now - last, None)
    return Event(run, (token,), logprobs, prompt_logprobs, finish, stop_token, first, gap)


def finish(host: Host, run: Run, reason: Finish) -> None:
    """Ends a run for a reason found outside, such as a stop string; a token it has in flight will be dropped."""
    end(host, run, reason)


def fail(host: Host, planned: Planned, error: str) -> list[Event]:
    """Error events of a step that failed, in place of `commit`.

    Its runs end, and so do runs that stand on blocks it should have written or on KV it should have saved: what those
    hold is unknown. Nothing of it stays in the prefix index. Everybody else goes on.
    """
    ledger, lost = host.ledger, set()
    events = []

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
    for run in [r for r in host.running if ledger.stands_on(r.path, lost)]:
        fail_run(run)
    return events


def _score(planned: Planned, output: StepOutput, r: int, run: Run) -> None:
    """Adds the scores of batch row `r` to its run."""
    step = planned.input
    assert output.score is not None and step.target is not None and run.request.prompt_logprobs is not None
    for t in range(step.start[r], step.start[r + 1]):
        if (target := int(step.target[t])) >= 0:
            run.scores.append(_logprob(output.score, t, target, run.request.prompt_logprobs))


def _scores_of(run: Run) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's log-probabilities, if they were asked of this run."""
    if run.index or run.request.prompt_logprobs is None:
        return None
    assert not run.unscored(), "a prompt was computed but not scored"
    return (None, *run.scores)


def _logprob(scores: Scores, at: int, token: int, k: int) -> TokenLogprob:
    top = tuple(zip(scores.top_ids[at, :k].tolist(), scores.top[at, :k].tolist(), strict=True))
    return TokenLogprob(token, float(scores.chosen[at]), top)
