"""Drafts inside of the engine's steps. Oracle: the same requests without them, whatever was drafted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fnengine.decoding import prediction
from fnengine.decoding.speculate import Draft, Stateless
from fnengine.engine import Engine
from fnengine.errors import RequestError
from fnengine.host import commit as committing
from fnengine.host.request import Request, Sampling, Speculate, Stop
from tests.models import tiny_model
from tests.text_models import byte_tokenizer

NUMBER = itertools.count()
PROMPT = np.random.default_rng(1).integers(3, 120, 37).tolist()
GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, min_p=0.01, seed=21, frequency_penalty=0.5, repetition_penalty=1.1)


def wrong_at(n: int):
    """Repeats the text's own newest token, but for every n-th."""
    return lambda _: Stateless(lambda tokens, k: [(tokens[-1] + (len(tokens) % n == 0)) % 131] * k)


def fails(_):
    def guess(tokens, k):
        raise ValueError("no idea")

    return Stateless(guess)


class Tree:
    """Two ways at once."""

    def start(self, tokens, how):
        return None

    def propose(self, state, k):
        return Draft((5, 6, 7), parents=(-1, -1, 1)) if k > 1 else Draft(())

    def advance(self, state, tokens):
        return None


MAKERS = {
    "wrong": wrong_at(3),
    "fails": fails,
    "tree": lambda _: Tree(),
    "long": lambda _: Stateless(lambda t, k: [1] * 20),
}


@pytest.fixture(scope="module", params=[False, True], ids=["depth 0", "depth 1"])
def engine(request) -> Engine:
    """One engine that steps at once, and one that is a step ahead and padded, as on a GPU."""
    return Engine.build(
        tiny_model("qwen3", "float32"),
        tokenizer=byte_tokenizer(131),
        max_model_len=96,
        kv_cache_memory_bytes=1 << 20,
        enforce_eager=True,
        max_num_seqs=6,
        graph_twin=request.param,
        proposers=MAKERS,
    )


def ask(sampling=GREEDY, how=None, **kw) -> Request:
    stop = kw.pop("stop", None) or Stop(max_tokens=kw.pop("max_tokens", 24), ignore_eos=True)
    return Request(
        f"r{next(NUMBER)}", np.array(kw.pop("prompt", PROMPT), np.int32), sampling, stop, speculate=how, **kw
    )


def run(e: Engine, *requests: Request) -> list[list[list]]:
    """Deltas by request and choice."""
    deltas = [[[] for _ in range(r.n)] for r in requests]
    for i, r in enumerate(requests):
        e.submit_to(r, lambda d, i=i: deltas[i][d.index].append(d))
    turns = 0
    while e.turn():
        turns += 1
        assert turns < 2000, "no progress"
    e.check()
    e.host.check()
    assert e.gauges().blocks_held == 0 and not e.drafting.guesses
    return deltas


def tokens(deltas) -> list[int]:
    return [t for d in deltas for t in d.tokens]


def replayed(deltas) -> Speculate:
    """The answer itself as its own prediction, two of its tokens changed."""
    right = tokens(deltas)
    for i in (7, 15):
        if i < len(right):
            right[i] = (right[i] + 1) % 131
    return Speculate("prediction", k=4, adapt=False, prediction=tuple(right))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_change_no_token_no_logprob_and_no_text(engine, sampling):
    """With n > 1, log-probabilities, penalties, prompts in chunks, a cached prefix, beside others."""
    kw = {"n": 2, "logprobs": 3}
    plain = run(engine, ask(sampling, **kw), ask(SAMPLED, prompt=PROMPT[:9]))
    before = engine.gauges()
    drafts = run(
        engine, ask(sampling, replayed(plain[0][0]), **kw), ask(SAMPLED, Speculate("wrong"), prompt=PROMPT[:9])
    )
    after = engine.gauges()
    for a, b in zip(plain, drafts, strict=True):
        for x, y in zip(a, b, strict=True):
            assert tokens(x) == tokens(y) and "".join(d.text for d in x) == "".join(d.text for d in y)
            assert [p for d in x for p in d.logprobs or ()] == [p for d in y for p in d.logprobs or ()]
            assert (x[-1].finish, x[-1].usage.completion) == (y[-1].finish, y[-1].usage.completion)
    assert after.accepted - before.accepted > 15 and after.drafted > after.accepted


def test_a_right_prediction_takes_fewer_steps_and_is_counted(engine):
    (plain,) = run(engine, ask())
    before = engine.gauges().steps
    (drafts,) = run(engine, ask(how=replayed(plain[0])))
    assert tokens(drafts[0]) == tokens(plain[0])
    # 24 tokens one by one, or at best five a step; two tokens of the prediction are wrong, and its place is lost there.
    assert engine.gauges().steps - before <= 12 + (2 if engine.device.depth else 0)
    usage, alone = drafts[0][-1].usage, prediction.Prediction(replayed(plain[0]).prediction)
    want = prediction.usage(alone, alone.advance(alone.start(PROMPT, None), tokens(plain[0])))
    assert (usage.accepted, usage.rejected) == want and want[0] > 15 and plain[0][-1].usage.accepted is None


@pytest.mark.parametrize(
    "how", [Speculate("wrong", 3, False), Speculate("ngram"), Speculate("suffix", 8), Speculate("tree")]
)
def test_stop_strings_and_ends_cut_accepted_drafts(engine, how):
    (plain,) = run(engine, ask(SAMPLED))
    whole = "".join(d.text for d in plain[0])
    some = whole[len(whole) // 2 : len(whole) // 2 + 2]
    for stop in (
        Stop(max_tokens=24, strings=(some,)),
        Stop(max_tokens=24, ids=(tokens(plain[0])[9],)),
        Stop(max_tokens=7),
    ):
        (a,), (b,) = run(engine, ask(SAMPLED, stop=stop)), run(engine, ask(SAMPLED, how, stop=stop))
        assert tokens(a[0]) == tokens(b[0]) and a[0][-1].finish == b[0][-1].finish
        assert "".join(d.text for d in a[0]) == "".join(d.text for d in b[0])
        assert a[0][-1].stop_reason == b[0][-1].stop_reason


def test_min_tokens_holds_inside_of_a_draft(engine):
    (plain,) = run(engine, ask(SAMPLED))
    ends = (tokens(plain[0])[3], tokens(plain[0])[11])
    stop = Stop(max_tokens=24, min_tokens=9, ids=ends)
    (a,) = run(engine, ask(SAMPLED, stop=stop))
    (b,) = run(engine, ask(SAMPLED, replayed(a[0]), stop=stop))
    assert tokens(a[0]) == tokens(b[0]) and len(tokens(a[0])) >= 9


def test_a_proposer_that_fails_ends_its_own_request_only(engine):
    (plain,) = run(engine, ask())
    for name, word in (("fails", "no idea"), ("long", "20 draft tokens")):
        bad, good = run(engine, ask(how=Speculate(name, adapt=False)), ask())
        assert bad[0][-1].finish == "error" and word in bad[0][-1].error
        assert tokens(good[0]) == tokens(plain[0])


def test_an_unknown_method_is_refused_by_name(engine):
    with pytest.raises(RequestError, match=r"magic.*one of ngram, suffix, prediction, wrong"):
        engine.submit_to(ask(how=Speculate("magic")), print)
    with pytest.raises(RequestError, match="between 0 and 16"):
        Speculate("ngram", 17)


def test_the_engine_s_own_default_and_turning_it_off(engine):
    engine.drafting.default = Speculate("wrong", 2, adapt=False)
    try:
        before = engine.gauges().drafted
        run(engine, ask(how=Speculate(k=0)))
        assert engine.gauges().drafted == before
        run(engine, ask())
        assert engine.gauges().drafted > before
    finally:
        engine.drafting.default = None


def test_a_draft_taken_as_it_came_is_caught(engine, monkeypatch):
    """A commit that believes every draft."""
    real = committing._judge

    def judge(host, run, output, r, now):
        n = run.drafted
        output.count[r] = n + 1
        output.token[r, :n] = run.tokens[run.known : run.known + n]
        return real(host, run, output, r, now)

    (plain,) = run(engine, ask())
    monkeypatch.setattr(committing, "_judge", judge)
    (drafts,) = run(engine, ask(how=Speculate("wrong", adapt=False)))
    assert tokens(plain[0]) != tokens(drafts[0])


class Clocked:
    """An engine whose clock is made up: a step takes 1 and 0.1 for each token that a row has more, and a proposal
    `draft`."""

    def __init__(self, guess, draft: float, slope: float = 0.1) -> None:
        self.now, self.asked = 0.0, 0

        def guessed(tokens, k):
            self.now += draft
            self.asked += 1
            return guess(tokens, k)

        self.engine = e = Engine.build(
            tiny_model("qwen3", "float32"),
            tokenizer=byte_tokenizer(131),
            max_model_len=256,
            kv_cache_memory_bytes=1 << 20,
            enforce_eager=True,
            proposers={"made up": lambda _: Stateless(guessed)},
        )
        e.clock = e.drafting.clock = lambda: self.now
        launch = e.device.launch

        def timed(step):
            self.now += 1.0 + slope * (len(step.token) - len(step.row))
            return launch(step)

        e.device.launch = timed

    def seconds(self, k: int) -> float:
        """Of 200 tokens, with at most k drafted at a time; the prompt's step left out."""
        before = self.now
        run(self.engine, ask(GREEDY, Speculate("made up", k), max_tokens=200, prompt=PROMPT[:1]))
        return self.now - before


def test_drafts_rest_where_they_lose():
    """A step of two tokens takes five times as long as one of one, and no draft is ever right: the first request finds
    out, the others know."""
    e = Clocked(lambda tokens, k: [(tokens[-1] + 1) % 131] * k, draft=0.0, slope=4.0)
    e.seconds(1)
    counts = e.engine.drafting.counts
    assert 0 < counts.steps < 200 * 0.05 and e.now < 200 * 1.2
    found_out = counts.steps
    assert e.seconds(1) < 200 / 0.97 and 0 < counts.steps - found_out <= 2


@pytest.mark.parametrize("draft,slope", [(0.0, 0.05), (0.07, 0.1), (0.5, 0.1)])
@pytest.mark.parametrize("guess", ["wrong", "silent"])
def test_text_on_which_drafts_fail_costs_less_than_3_percent(guess, draft, slope):
    """What the engine promises, with times made up so that only the rule is tested: never below 0.97 of plain decoding.
    The first request of an engine learns; it may cost 5 %."""

    def wrong(tokens, k):
        return [(tokens[-1] + 1) % 131] * k if guess == "wrong" else []

    e = Clocked(wrong, draft, slope)
    first, then = e.seconds(4), e.seconds(4)
    assert first < 200 / 0.95 and then < 200 / 0.97, (first, then, e.asked)


def test_drafts_begin_again_with_another_request():
    """What an earlier text taught is not believed for long: the same engine drafts where drafts are right."""
    known = {}
    e = Clocked(lambda tokens, k: known.get(len(tokens), [130] * k)[:k], draft=0.05)
    e.seconds(4)
    (plain,) = run(e.engine, ask(GREEDY, max_tokens=200, prompt=PROMPT[:1]))
    line = PROMPT[:1] + tokens(plain[0])
    known.update({i: line[i : i + 4] for i in range(1, len(line))})
    assert e.seconds(4) < 200 / 2


def test_steps_that_verify_drafts_are_captured(engine):
    """Where steps are captured at all, when they come again, in few sizes: what is picked is rounded up."""
    if engine.device.graphs is None:
        pytest.skip("nothing is captured on CPU")

    def again():
        before = sum(hits.steps for hits in engine.device.usage.eager.values())
        run(engine, *[ask(how=Speculate("wrong", k, adapt=False), prompt=PROMPT[: 9 + k]) for k in (1, 2, 3, 4)])
        return sum(hits.steps for hits in engine.device.usage.eager.values()) - before

    again()
    again()
    assert again() == 0
    captured = [key for key in engine.device.graphs.captured if key.ask.picks]
    assert captured and all(key.ask.picks in (2, 4, 8, 16, key.bucket.tokens) for key in captured)
